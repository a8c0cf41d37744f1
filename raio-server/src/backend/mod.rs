//! How operations on files are carried out: the third seam, beside the two roles of a transport.
//!
//! An operation owns its slot, its path, its descriptor; they come back in the [`Completion`] that ends it: one for each operation.
//! A backend belongs to one worker, which lends it the reactor.

mod threads;
mod uring;

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use raio_transport::protocol::FileStatus;
use raio_transport::reactor::{self, Event, Fallocate, OpId, OpenHow, Reactor};
use raio_transport::transport::SlotRange;
use rustix::fs::OFlags;
use rustix::io::ReadWriteFlags;

pub use threads::Threads;
pub use uring::Uring;

/// The owner number of a backend's tokens; far from those of the transports.
pub const OWNER: u8 = 0x80;

/// The key of operations whose end interests nobody.
pub const NOBODY: u64 = u64::MAX;

/// An open file as backends take it.
#[derive(Clone, Debug)]
pub struct Handle {
    /// The descriptor.
    pub fd: Arc<OwnedFd>,
    /// The same, for this worker's reactor.
    pub file: reactor::File,
    /// How to read what is in the page cache without waiting. None: it is not read from there...
    pub reads_cache: Option<ReadWriteFlags>,
    /// ... and what is written may stay there.
    pub writes_cache: bool,
}

impl Handle {
    /// Takes a descriptor for use by one worker.
    pub fn new(reactor: &mut Reactor, fd: Arc<OwnedFd>) -> Self {
        let flags = rustix::fs::fcntl_getfl(&fd).unwrap_or(OFlags::DIRECT);
        let caches = !flags.contains(OFlags::DIRECT);
        // What lives in memory is there, as a rule (or swapped out), and knows no RWF_NOWAIT.
        let in_memory = rustix::fs::fstatfs(&fd).is_ok_and(|info| info.f_type == libc::TMPFS_MAGIC);
        let reads_cache =
            caches.then_some(if in_memory { ReadWriteFlags::empty() } else { ReadWriteFlags::NOWAIT });
        let writes_cache = caches && !flags.intersects(OFlags::SYNC | OFlags::DSYNC);
        Self { file: reactor.file(Arc::clone(&fd)), fd, reads_cache, writes_cache }
    }
}

/// An operation on a file.
#[derive(Debug)]
pub enum Operation {
    /// pread(2) into a slot.
    Read {
        /// Where to.
        target: SlotRange,
        /// Offset in the file.
        offset: u64,
    },
    /// pwrite(2) from a slot.
    Write {
        /// From where.
        source: SlotRange,
        /// Offset in the file.
        offset: u64,
    },
    /// fsync(2) or fdatasync(2).
    Fsync {
        /// fdatasync.
        data_only: bool,
    },
    /// fallocate(2).
    Fallocate {
        /// How.
        how: Fallocate,
        /// Offset in the file.
        offset: u64,
        /// Length.
        length: u64,
    },
    /// statx(2).
    Stat,
    /// openat2(2); the file is the directory.
    Open {
        /// Relative to the directory.
        path: CString,
        /// How.
        how: Box<OpenHow>,
    },
}

/// What an ended operation gives back.
#[derive(Debug)]
pub enum Outcome {
    /// Nothing.
    None,
    /// The slot of a read or write, as it was passed.
    Slot(SlotRange),
    /// The file that was opened.
    Fd(OwnedFd),
    /// The status that was asked for.
    Stat(Box<FileInfo>),
}

/// A file's status, and what more statx(2) knows.
#[derive(Clone, Copy, Debug)]
pub struct FileInfo {
    /// As clients see it.
    pub status: FileStatus,
    /// What O_DIRECT wants offsets and lengths to be multiples of, if the file system says so.
    pub direct_align: Option<u32>,
}

/// The end of an operation.
#[derive(Debug)]
pub struct Completion {
    /// From [`Backend::submit`].
    pub key: u64,
    /// What the system call returned: a count, or the errno.
    pub result: Result<u32, i32>,
    /// What comes back.
    pub outcome: Outcome,
}

/// Carries out operations on files.
pub trait Backend {
    /// Begins an operation. Its completion comes from a later [`Backend::next`]. The id is for [`Backend::cancel`].
    fn submit(
        &mut self,
        reactor: &mut Reactor,
        key: u64,
        file: &Handle,
        operation: Operation,
    ) -> Option<OpId>;

    /// Fills `bytes` from the page cache. None if that has not all of it, or it cannot be known: [`Backend::submit`] does more.
    fn read_at_once(&mut self, file: &Handle, bytes: &mut [u8], offset: u64) -> Option<()> {
        let _ = (file, bytes, offset);
        None
    }

    /// Writes `bytes` into the page cache. None if that may have to wait, or went wrong: [`Backend::submit`] does more.
    fn write_at_once(&mut self, file: &Handle, bytes: &[u8], offset: u64) -> Option<()> {
        let _ = (file, bytes, offset);
        None
    }

    /// Closes a descriptor. Its completion says whether that brought an error to light.
    fn close(&mut self, reactor: &mut Reactor, key: u64, fd: OwnedFd);

    /// Asks for an operation to end early. Best effort: it ends with ECANCELED, or as it would have.
    fn cancel(&mut self, reactor: &mut Reactor, key: u64, id: Option<OpId>);

    /// Takes in what happened on the ring to an operation whose token has the owner [`OWNER`].
    fn handle(&mut self, event: Event);

    /// The next operation that has ended.
    fn next(&mut self) -> Option<Completion>;
}

/// Both libc's and rustix's statx have the kernel's fields, and are different types.
macro_rules! file_info {
    ($stat:expr) => {{
        let stat = $stat;
        let ns =
            |seconds: i64, ns: u32| seconds.saturating_mul(1_000_000_000).saturating_add(ns.into()).into();
        let device = |major, minor| libc::makedev(major, minor).into();
        $crate::backend::FileInfo {
            status: FileStatus {
                size: stat.stx_size.into(),
                blocks: stat.stx_blocks.into(),
                inode: stat.stx_ino.into(),
                device: device(stat.stx_dev_major, stat.stx_dev_minor),
                rdevice: device(stat.stx_rdev_major, stat.stx_rdev_minor),
                accessed_ns: ns(stat.stx_atime.tv_sec, stat.stx_atime.tv_nsec),
                modified_ns: ns(stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
                changed_ns: ns(stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
                mode: u32::from(stat.stx_mode).into(),
                links: stat.stx_nlink.into(),
                uid: stat.stx_uid.into(),
                gid: stat.stx_gid.into(),
                block_bytes: stat.stx_blksize.into(),
                direct_align: 1.into(),
            },
            direct_align: (stat.stx_mask & libc::STATX_DIOALIGN != 0 && stat.stx_dio_offset_align > 0)
                .then_some(stat.stx_dio_offset_align),
        }
    }};
}
use file_info;

#[cfg(test)]
mod tests;
