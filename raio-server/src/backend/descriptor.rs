//! A file's descriptor, and how its reads and writes are best carried out.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use raio_transport::reactor::Sender;
use rustix::fs::{FileType, OFlags};
use rustix::io::ReadWriteFlags;

use super::{Completion, Job, Lanes};

/// File systems whose buffered reads io_uring waits for without a thread (FOP_BUFFER_RASYNC in the kernel), and whose O_DIRECT takes
/// RWF_NOWAIT: XFS, btrfs, F2FS, and ext4 with its predecessors. Elsewhere it could wait within io_uring_enter(2).
const ASYNCHRONOUS: [libc::__fsword_t; 4] =
    [libc::XFS_SUPER_MAGIC, libc::BTRFS_SUPER_MAGIC, libc::F2FS_SUPER_MAGIC, libc::EXT4_SUPER_MAGIC];

/// A file's descriptor. When its last user drops it, whoever that is, the pool closes it: close(2) may wait, for a server that is to store
/// what was written or for gigabytes of memory to be freed, and may bring an error to light.
#[derive(Debug)]
pub struct Descriptor {
    /// None once it is being closed.
    fd: Option<OwnedFd>,
    lanes: Lanes,
    on_close: OnceLock<(Sender<Completion>, u64)>,
    /// How to read what is in the page cache without waiting. None: it is not read from there.
    pub(super) cached_reads: Option<ReadWriteFlags>,
    /// Writes go to the page cache and may stay there.
    pub(super) is_write_back: bool,
    /// It is open with O_DIRECT.
    pub(super) is_direct: bool,
    /// io_uring reads and writes it without waiting within the system call.
    pub(super) is_asynchronous: bool,
}

impl Descriptor {
    /// Takes a descriptor of a file of the export that has these lanes. May wait for the file system: not for a worker's thread.
    pub fn new(fd: OwnedFd, lanes: Lanes) -> Arc<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd).unwrap_or(OFlags::DIRECT);
        let is_direct = flags.contains(OFlags::DIRECT);
        let is_device = rustix::fs::fstat(&fd)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice);
        // Of a device that would be the file system which has its node.
        let kind = rustix::fs::fstatfs(&fd).ok().filter(|_| !is_device).map(|info| info.f_type);
        // What lives in memory is there, as a rule (or swapped out), and knows no RWF_NOWAIT.
        let in_memory = kind == Some(libc::TMPFS_MAGIC);
        let nowait = if in_memory { ReadWriteFlags::empty() } else { ReadWriteFlags::NOWAIT };
        Arc::new(Self {
            fd: Some(fd),
            lanes,
            on_close: OnceLock::new(),
            cached_reads: (!is_direct).then_some(nowait),
            is_write_back: !is_direct && !flags.intersects(OFlags::SYNC | OFlags::DSYNC),
            is_direct,
            is_asynchronous: is_device || kind.is_some_and(|kind| ASYNCHRONOUS.contains(&kind)),
        })
    }

    /// The lanes of its export.
    pub fn lanes(&self) -> &Lanes {
        &self.lanes
    }

    /// Has the result of close(2) sent once the last user has gone, as the completion with this key. Once at most.
    pub fn report_close(&self, to: Sender<Completion>, key: u64) {
        let reported = self.on_close.set((to, key));
        debug_assert!(reported.is_ok(), "a file is closed once");
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.fd {
            Some(fd) => fd.as_fd(),
            None => unreachable!("only `drop` takes it"),
        }
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take() {
            self.lanes.control.submit(Job::close(fd, self.on_close.take()));
        }
    }
}
