//! Memory of a fixed size, zeros at the start: one memfd, which all who open the export share.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};

use super::served::Served;
use super::{Properties, SizeLimit};
use crate::engine::{Closing, Descriptor, Engine, Lanes};

/// A `mem:` export.
#[derive(Debug)]
pub struct Memory {
    fd: Arc<Descriptor>,
    size: u64,
}

impl Memory {
    /// So many bytes.
    pub fn new(size: u64, lanes: Lanes) -> rustix::io::Result<Self> {
        // Nobody waits for its end: no file system has it.
        let lanes = lanes.with_new_tenure();
        let fd = Descriptor::new(memfd(size)?, Some(libc::TMPFS_MAGIC), lanes, Arc::default());
        Ok(Self { fd, size })
    }
}

/// Memory that keeps its size.
fn memfd(size: u64) -> rustix::io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("raio-mem", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, size)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK)?;
    Ok(fd)
}

impl Served for Memory {
    fn descriptor(&self) -> &Arc<Descriptor> {
        &self.fd
    }

    /// It stays, for others.
    fn close(self: Arc<Self>, _engine: &mut dyn Engine, closing: Closing) {
        closing.complete(Ok(()));
    }

    fn properties(&self) -> Properties {
        let size_limit = Some(SizeLimit { bytes: self.size, errno: libc::ENOSPC });
        Properties { size_limit, may_hang: false, has_locks: false, ..Properties::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_keeps_its_size() {
        let fd = memfd(4096).unwrap();
        assert_eq!(rustix::io::pwrite(&fd, b"x", 4096), Err(rustix::io::Errno::PERM));
        assert_eq!(rustix::io::pwrite(&fd, b"x", 4095), Ok(1));
    }
}
