//! Status and contents of small files that the kernel has in memory, for a worker's thread: nothing here
//! waits for a disk or a file system.
//!
//! A path is resolved with RESOLVE_CACHED, by which the kernel fails rather than asks a file system. What is
//! found is used only if it lies on a mount that the pool has found to be of a file system whose open, status
//! and close do not wait for others than itself (FUSE and NFS do, though their names are cached). Everything
//! else is for the pool: [`crate::names`].
//!
//! A descriptor may be the last to refer to a file that has just been removed, and closing it then frees the
//! file's blocks. So the pool closes files that were read, all of an iteration together. What was only looked
//! up is closed at once, if it has a name a moment before and is not large.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use raio_transport::reactor;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::path::DecInt;

use crate::engine::{Job, KEEPS_STATUS, Lane};
use crate::export::{Confinement, Export, Location};
use crate::syscalls::{FileInfo, Mount, stat_on_mount};
use crate::tuning::cached_files::{CLOSED_BLOCKS_MAX, CLOSING_MAX, INODE_EXTENTS, MOUNTS_MAX};

/// A mount that [`CachedFiles`] may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsableMount {
    mount: Mount,
    /// How its small files are read without waiting; None: they are not.
    reads: Option<ReadWriteFlags>,
}

impl UsableMount {
    /// The mount that a file on a file system of this type is on, if it is usable.
    pub fn of(fd: impl AsFd, file_system: libc::__fsword_t) -> Option<Self> {
        if !KEEPS_STATUS.contains(&file_system) {
            return None;
        }
        let (_, mount) = stat_on_mount(&fd).ok()?;
        let reads = match file_system {
            // Its files lie in memory, and it knows no RWF_NOWAIT.
            libc::TMPFS_MAGIC => Some(ReadWriteFlags::empty()),
            // For each read it looks up checksums, on the disk.
            libc::BTRFS_SUPER_MAGIC => None,
            _ => Some(ReadWriteFlags::NOWAIT),
        };
        Some(Self { mount: mount?, reads })
    }
}

/// Whether closing a file that has just had this status takes no waiting.
fn closes_at_once(info: &FileInfo) -> bool {
    info.status.links.get() > 0 && info.status.blocks.get() <= CLOSED_BLOCKS_MAX
}

/// A directory that paths are resolved beneath.
#[derive(Debug)]
struct Base {
    export: usize,
    /// The directory that a client does not leave.
    directory: Option<String>,
    fd: OwnedFd,
}

/// What one worker knows of mounts, and what it has open for the length of an iteration.
#[derive(Debug)]
pub struct CachedFiles {
    mounts: Vec<UsableMount>,
    /// Directories that paths are resolved beneath.
    bases: Vec<Base>,
    /// /proc/self/fd, by which files are opened that were looked up.
    descriptors: Option<OwnedFd>,
    /// Files that were read, with a lane of their export: the pool is to close them.
    read: Vec<(Lane, OwnedFd)>,
    /// Those that it has not closed yet.
    closing: Arc<AtomicUsize>,
}

/// A file that was found.
struct Found {
    node: OwnedFd,
    info: FileInfo,
    reads: Option<ReadWriteFlags>,
}

impl CachedFiles {
    /// What a worker begins with.
    pub fn new() -> Self {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptors = rustix::fs::open("/proc/self/fd", flags, Mode::empty()).ok();
        Self { mounts: Vec::new(), bases: Vec::new(), descriptors, read: Vec::new(), closing: Arc::default() }
    }

    /// The pool has found that this mount may be used.
    pub fn learn(&mut self, mount: UsableMount) {
        if !self.mounts.contains(&mount) {
            // They change with each mount. Which is forgotten does not matter: it is learned anew.
            self.mounts.truncate(MOUNTS_MAX - 1);
            self.mounts.insert(0, mount);
        }
    }

    /// Closes the directories: what is mounted over them, or takes their place, is seen from then on. The
    /// pool closes the files.
    #[inline(always)]
    pub fn end_iteration(&mut self) {
        if !self.bases.is_empty() {
            self.close_all();
        }
    }

    #[cold]
    fn close_all(&mut self) {
        self.bases.clear();
        while let Some(&(lane, _)) = self.read.last() {
            let of_lane: Vec<_> = self.read.extract_if(.., |(other, _)| *other == lane).collect();
            let fds: Vec<_> = of_lane.into_iter().map(|(_, fd)| fd).collect();
            self.closing.fetch_add(fds.len(), Ordering::Relaxed);
            lane.submit(lane.ticket(), Job::CloseAll(fds, Arc::clone(&self.closing)));
        }
    }

    /// The status of a path; None: it cannot be answered from the cache.
    pub fn stat(
        &mut self,
        export: &Export,
        at: &Location,
        nofollow: bool,
    ) -> Option<Result<FileInfo, Errno>> {
        let found = match self.find(export, at, nofollow)? {
            Ok(found) => found,
            Err(errno) => return Some(Err(errno)),
        };
        let Found { node, info, .. } = found;
        let kind = FileType::from_raw_mode(info.status.mode.get());
        close(node, &info, export);
        // How large a device is the pool finds out.
        (kind != FileType::BlockDevice).then_some(Ok(info))
    }

    /// Fills `bytes` from the start of a small regular file. Returns how many there were, and the status, as
    /// it was before. None: that cannot be done here.
    pub fn get(
        &mut self,
        export: &Export,
        at: &Location,
        nofollow: bool,
        bytes: &mut [u8],
    ) -> Option<Result<(usize, FileInfo), Errno>> {
        if self.closing.load(Ordering::Relaxed) + self.read.len() >= CLOSING_MAX {
            return None;
        }
        let Found { node, info, reads } = match self.find(export, at, nofollow)? {
            Ok(found) => found,
            Err(errno) => return Some(Err(errno)),
        };
        let lane = export.lanes().control;
        let size = usize::try_from(info.status.size.get()).unwrap_or(usize::MAX);
        let wanted = size.min(bytes.len());
        let is_regular = FileType::from_raw_mode(info.status.mode.get()) == FileType::RegularFile;
        // Where on the disk so few blocks are the inode itself tells, which is in memory. Of larger files
        // that may have to be read first, in spite of RWF_NOWAIT.
        let is_small = info.status.size.get() <= u64::from(info.status.block_bytes.get()) * INODE_EXTENTS;
        let file = if is_regular && is_small { self.reopen(&node) } else { None };
        self.read.push((lane, node));
        let (file, how) = (file?, reads?);
        let read = match wanted {
            0 => Ok(0),
            _ => rustix::io::preadv2(&file, &mut [IoSliceMut::new(&mut bytes[..wanted])], 0, how),
        };
        self.read.push((lane, file));
        // If it is not cached, or is shorter now, it is read in the pool.
        (read == Ok(wanted)).then_some(Ok((wanted, info)))
    }

    /// Opens what was looked up, for reading, if that needs no waiting.
    fn reopen(&self, node: &OwnedFd) -> Option<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOATIME | OFlags::CLOEXEC;
        let number = DecInt::from_fd(node);
        rustix::fs::openat(self.descriptors.as_ref()?, number.as_c_str(), flags, Mode::empty()).ok()
    }

    /// Looks a path up.
    fn find(&mut self, export: &Export, at: &Location, nofollow: bool) -> Option<Result<Found, Errno>> {
        if self.mounts.is_empty() {
            return None;
        }
        let base = self.base(export, at)?;
        let nofollow = if nofollow { OFlags::NOFOLLOW } else { OFlags::empty() };
        let resolve = at.resolve | ResolveFlags::CACHED;
        let flags = OFlags::PATH | OFlags::CLOEXEC | nofollow;
        let base = &self.bases[base].fd;
        match rustix::fs::openat2(base, at.beneath(), flags, Mode::empty(), resolve) {
            Ok(node) => {
                let found = stat_on_mount(&node).ok();
                let usable = found.and_then(|(info, mount)| Some((info, self.usable(mount)?)));
                match usable {
                    Some((info, UsableMount { reads, .. })) => Some(Ok(Found { node, info, reads })),
                    None => {
                        close_in_pool(node, export.lanes().control);
                        None
                    }
                }
            }
            Err(errno @ (Errno::NOENT | Errno::NOTDIR)) => Some(Err(errno)),
            // It is not cached, or the pool finds better words.
            Err(_) => None,
        }
    }

    fn usable(&self, mount: Option<Mount>) -> Option<UsableMount> {
        self.mounts.iter().find(|usable| Some(usable.mount) == mount).copied()
    }

    /// The place of the directory that a path is resolved beneath.
    fn base(&mut self, export: &Export, at: &Location) -> Option<usize> {
        let directory = at.confinement.as_ref().map(|Confinement { directory, .. }| directory.as_str());
        let is_it = |base: &Base| base.export == at.export && base.directory.as_deref() == directory;
        if let Some(place) = self.bases.iter().position(is_it) {
            return Some(place);
        }
        let path = export.root()?.lasting_directory()?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let cached = ResolveFlags::NO_SYMLINKS | ResolveFlags::CACHED;
        let mut fd = rustix::fs::openat2(CWD, path, flags, Mode::empty(), cached).ok()?;
        if let Some(directory) = directory {
            let resolve = at.resolve | cached;
            fd = rustix::fs::openat2(&fd, directory, flags, Mode::empty(), resolve).ok()?;
        }
        let (_, mount) = stat_on_mount(&fd).ok()?;
        self.usable(mount)?;
        self.bases.push(Base { export: at.export, directory: directory.map(str::to_owned), fd });
        Some(self.bases.len() - 1)
    }
}

fn close(fd: OwnedFd, info: &FileInfo, export: &Export) {
    if closes_at_once(info) {
        let _ = reactor::close(fd);
    } else {
        close_in_pool(fd, export.lanes().control);
    }
}

fn close_in_pool(fd: OwnedFd, lane: Lane) {
    lane.submit(lane.ticket(), Job::Close(fd, Arc::default(), None));
}
