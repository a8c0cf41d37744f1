//! A block device.

use std::sync::Arc;

use super::Properties;
use super::served::Served;
use crate::engine::Descriptor;
use crate::syscalls::FileInfo;
use crate::tuning::files::DIRECT_ALIGN_DEFAULT;

/// A block device. Its descriptor closes with the last user.
#[derive(Debug)]
pub struct BlockDevice {
    fd: Arc<Descriptor>,
    alignment: u32,
}

impl BlockDevice {
    /// Takes a descriptor of a device that has this status. May wait for the device: not for a worker's
    /// thread.
    pub fn new(fd: Arc<Descriptor>, info: &FileInfo) -> Self {
        let sector = rustix::fs::ioctl_blksszget(&fd).ok();
        let direct = || info.direct_align.or(sector).unwrap_or(DIRECT_ALIGN_DEFAULT).max(1);
        let alignment = if fd.is_direct() { direct() } else { 1 };
        Self { fd, alignment }
    }
}

impl Served for BlockDevice {
    fn descriptor(&self) -> &Arc<Descriptor> {
        &self.fd
    }

    fn properties(&self) -> Properties {
        Properties { alignment: self.alignment, ..Properties::default() }
    }
}
