//! A file's descriptor, and how its reads and writes are best carried out.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use rustix::fs::{OFlags, SeekFrom, StatVfsMountFlags};
use rustix::io::ReadWriteFlags;

use super::{Closing, Lanes};
use crate::log;
use crate::syscalls::{FileInfo, stat_cached};
use crate::tenure::Use;
use crate::tuning::cached_files::CLOSED_BLOCKS_MAX;
use crate::tuning::cached_reads::HOLES_MAX;
use crate::verifier::Verifier;

/// File systems whose buffered reads io_uring waits for without a thread (FOP_BUFFER_RASYNC in the kernel),
/// and whose O_DIRECT takes RWF_NOWAIT: XFS (but see [`locks_buffered_reads`]), F2FS, and ext4 with its
/// predecessors. Elsewhere it could wait within io_uring_enter(2); on btrfs for checksums, which each read
/// looks up on the disk.
const ASYNCHRONOUS: [libc::__fsword_t; 3] =
    [libc::XFS_SUPER_MAGIC, libc::F2FS_SUPER_MAGIC, libc::EXT4_SUPER_MAGIC];

/// File systems whose open files are asked for their status without waiting: ext4 with its predecessors, XFS,
/// Btrfs and tmpfs. On FUSE and NFS statx(2) may ask a server.
pub const KEEPS_STATUS: [libc::__fsword_t; 4] =
    [libc::EXT4_SUPER_MAGIC, libc::XFS_SUPER_MAGIC, libc::BTRFS_SUPER_MAGIC, libc::TMPFS_MAGIC];

/// How a file on a file system of this type, or a device, is read from the page cache without waiting. None:
/// it is not.
pub fn cached_reads(file_system: Option<libc::__fsword_t>) -> Option<ReadWriteFlags> {
    match file_system {
        // What lives in memory is there, as a rule (or swapped out), and knows no RWF_NOWAIT.
        Some(libc::TMPFS_MAGIC) => Some(ReadWriteFlags::empty()),
        _ => waits_asynchronously(file_system).then_some(ReadWriteFlags::NOWAIT),
    }
}

/// Whether closing a file that was only read from, or looked up, and has just had this status takes no
/// waiting: it would if the file had lost its last name, for the file's blocks to be freed.
pub fn closes_at_once(info: &FileInfo) -> bool {
    info.status.links.get() > 0 && info.status.blocks.get() <= CLOSED_BLOCKS_MAX
}

/// Whether io_uring waits for reads and writes on a file system of this type, or a device, without a thread.
fn waits_asynchronously(file_system: Option<libc::__fsword_t>) -> bool {
    file_system.is_none_or(|kind| ASYNCHRONOUS.contains(&kind))
}

/// Whether io_uring waits within io_uring_enter(2) for the lock of a file of this kind when it reads by way
/// of the page cache. XFS takes it for such a read, and a write has it while it waits for the disk. io_uring
/// then tries once more without RWF_NOWAIT, to learn of the pages without waiting for them.
fn locks_buffered_reads(kind: Option<libc::__fsword_t>) -> bool {
    kind == Some(libc::XFS_SUPER_MAGIC)
}

/// A file's descriptor. The pool closes it when its last user drops it. close(2) may wait, for example for a
/// file server to store written data or for the kernel to free gigabytes of memory, and it may return an
/// error.
#[derive(Debug)]
pub struct Descriptor {
    /// None once it is being closed.
    pub(super) fd: Option<OwnedFd>,
    lanes: Lanes,
    _use: Use,
    /// That of its export.
    pub(super) verifier: Arc<Verifier>,
    pub(super) closing: OnceLock<Closing>,
    /// How to read what is in the page cache without waiting. None: it is not read from there.
    pub(super) cached_reads: Option<ReadWriteFlags>,
    /// Writes go to the page cache and may stay there.
    pub(super) is_write_back: bool,
    /// It is open with O_DIRECT.
    pub(super) is_direct: bool,
    /// Closing it writes nothing, and asks nobody: it waits only if that frees the file.
    closes_quietly: bool,
    /// Its status is in memory.
    has_cached_status: bool,
    /// io_uring reads and writes it without waiting within the system call.
    pub(super) is_asynchronous: bool,
}

impl Descriptor {
    /// Takes a descriptor of a file of the export that has these lanes, on a file system of this type; None
    /// for a device. May wait for the file system: not for a worker's thread.
    pub fn new(
        fd: OwnedFd,
        file_system: Option<libc::__fsword_t>,
        lanes: Lanes,
        verifier: Arc<Verifier>,
    ) -> Arc<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd).unwrap_or(OFlags::DIRECT);
        let is_device = file_system.is_none();
        let is_asynchronous = waits_asynchronously(file_system);
        // Whatever the flags of a read say, it waits for the journal if it has to change the time of
        // access...
        let keeps_atime = rustix::fs::fcntl_setfl(&fd, flags | OFlags::NOATIME).is_ok()
            || is_device
            || mount_keeps_atime(&fd);
        if is_asynchronous && !keeps_atime && log::permit(None, "files of other users") {
            tracing::info!(
                "A file belongs to another user, so the server cannot open it with O_NOATIME, and reads it \
                 more slowly. Run the \
                 server as the owner, give it CAP_FOWNER, or mount the file system with noatime."
            );
        }
        // ... and if it does not know where on the disk the file is.
        if is_asynchronous && keeps_atime && !is_device {
            load_extents(&fd);
        }
        Self::with(fd, flags, keeps_atime, file_system, lanes, verifier)
    }

    /// Takes a descriptor of a small file, for reading, which is open with O_NOATIME on a file system of this
    /// type. Waits for nothing.
    pub fn of_small_file(
        fd: OwnedFd,
        file_system: libc::__fsword_t,
        lanes: Lanes,
        verifier: Arc<Verifier>,
    ) -> Arc<Self> {
        Self::with(fd, OFlags::RDONLY, true, Some(file_system), lanes, verifier)
    }

    /// `flags`: those that it is open with. `keeps_atime`: reads leave its time of access.
    fn with(
        fd: OwnedFd,
        flags: OFlags,
        keeps_atime: bool,
        file_system: Option<libc::__fsword_t>,
        lanes: Lanes,
        verifier: Arc<Verifier>,
    ) -> Arc<Self> {
        let is_direct = flags.contains(OFlags::DIRECT);
        let is_asynchronous = waits_asynchronously(file_system) && keeps_atime;
        let cached_reads = cached_reads(file_system).filter(|flags| keeps_atime || flags.is_empty());
        let has_cached_status = file_system.is_some_and(|kind| KEEPS_STATUS.contains(&kind));
        Arc::new(Self {
            fd: Some(fd),
            _use: Use::of(&lanes.tenure),
            lanes,
            verifier,
            closing: OnceLock::new(),
            cached_reads: cached_reads.filter(|_| !is_direct),
            is_write_back: !is_direct && !flags.intersects(OFlags::SYNC | OFlags::DSYNC),
            is_direct,
            closes_quietly: has_cached_status && flags & OFlags::RWMODE == OFlags::RDONLY,
            has_cached_status,
            is_asynchronous: is_asynchronous && (is_direct || !locks_buffered_reads(file_system)),
        })
    }

    /// Takes the descriptor out if closing it takes no waiting.
    pub(super) fn take_if_closed_at_once(&mut self) -> Option<OwnedFd> {
        let info = stat_cached(self.fd.as_ref().filter(|_| self.closes_quietly)?).ok()?;
        self.fd.take_if(|_| closes_at_once(&info))
    }

    /// Its status, if the kernel has it in memory, and takes no lock for it that a write holds.
    pub fn try_stat(&self) -> Option<FileInfo> {
        self.has_cached_status.then(|| stat_cached(self).ok()).flatten()
    }

    /// The lanes of its export.
    pub fn lanes(&self) -> &Lanes {
        &self.lanes
    }

    /// Whether it is open with O_DIRECT.
    pub fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// Its file is being closed: close(2) is called, and this completed, once the last user has gone. Once at
    /// most.
    pub fn close(&self, closing: Closing) {
        let closed = self.closing.set(closing);
        debug_assert!(closed.is_ok(), "a file is closed once");
    }
}

/// Whether reads of the file leave its time of access, because of how its file system is mounted.
fn mount_keeps_atime(fd: &OwnedFd) -> bool {
    rustix::fs::fstatvfs(fd)
        .is_ok_and(|info| info.f_flag.intersects(StatVfsMountFlags::NOATIME | StatVfsMountFlags::RDONLY))
}

/// Has the file system read where on the disk the file is. Else a read that the page cache does not have
/// would do so, and wait for it, in spite of RWF_NOWAIT. The kernel keeps what it has read as long as it has
/// memory.
fn load_extents(fd: &OwnedFd) {
    let mut end = 0;
    for _ in 0..HOLES_MAX {
        // Looking for a hole goes through all extents up to there.
        let hole = rustix::fs::seek(fd, SeekFrom::Data(end))
            .and_then(|data| rustix::fs::seek(fd, SeekFrom::Hole(data)));
        let Ok(hole) = hole else { return };
        end = hole;
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.fd {
            Some(fd) => fd.as_fd(),
            None => unreachable!("only `drop` takes it, in `job`"),
        }
    }
}
