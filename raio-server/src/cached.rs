//! Status and contents of small files that the kernel has in memory, for a worker's thread: nothing here
//! waits for a disk or a file system.
//!
//! A path is resolved with RESOLVE_CACHED, by which the kernel fails rather than asks a file system. What is
//! found is used only if it lies on a mount that the pool has found to be of a file system whose open, status
//! and close do not wait for others than itself (FUSE and NFS do, though their names are cached). Everything
//! else is for the pool: [`crate::names`].
//!
//! A descriptor may be the last to refer to a file that has just been removed, and closing it then frees the
//! file's blocks. So the pool closes what has no name any more, or is large.

use std::os::fd::{AsFd, OwnedFd};

use raio_transport::reactor;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::{Errno, ReadWriteFlags};

use crate::engine::{Job, KEEPS_STATUS, Lane};
use crate::export::{Confinement, Export, Location};
use crate::syscalls::{FileInfo, Mount, reopen, stat_on_mount};
use crate::tuning::cached_files::{CLOSED_BLOCKS_MAX, MOUNTS_MAX};

/// A mount that [`CachedFiles`] may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsableMount {
    mount: Mount,
    /// Its files lie in memory, and are read without RWF_NOWAIT, which it does not know.
    in_memory: bool,
}

impl UsableMount {
    /// The mount that a file is on, if it is usable. Asks the file system: not for a worker's thread.
    pub fn of(fd: impl AsFd) -> Option<Self> {
        let kind = rustix::fs::fstatfs(&fd).ok()?.f_type;
        let (_, mount) = stat_on_mount(&fd).ok()?;
        KEEPS_STATUS.contains(&kind).then_some(Self { mount: mount?, in_memory: kind == libc::TMPFS_MAGIC })
    }
}

/// Whether closing a file of this status, and asking for it, takes no waiting.
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

/// What one worker knows of mounts, and the directories that it has open for the length of an iteration.
#[derive(Debug, Default)]
pub struct CachedFiles {
    mounts: Vec<UsableMount>,
    bases: Vec<Base>,
}

/// A file that was found.
struct Found {
    node: OwnedFd,
    info: FileInfo,
    in_memory: bool,
}

impl CachedFiles {
    /// The pool has found that this mount may be used.
    pub fn learn(&mut self, mount: UsableMount) {
        if !self.mounts.contains(&mount) {
            // They change with each mount. Which is forgotten does not matter: it is learned anew.
            self.mounts.truncate(MOUNTS_MAX - 1);
            self.mounts.insert(0, mount);
        }
    }

    /// Closes the directories. What is mounted over them, or takes their place, is seen from then on.
    pub fn end_iteration(&mut self) {
        self.bases.clear();
    }

    /// The status of what is at a path; None: that cannot be told here.
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

    /// Fills `bytes` from the start of a small regular file. Returns how many there were, and the status
    /// afterwards. None: that cannot be done here.
    pub fn get(
        &mut self,
        export: &Export,
        at: &Location,
        nofollow: bool,
        bytes: &mut [u8],
    ) -> Option<Result<(usize, FileInfo), Errno>> {
        let Found { node, info, in_memory } = match self.find(export, at, nofollow)? {
            Ok(found) => found,
            Err(errno) => return Some(Err(errno)),
        };
        let size = usize::try_from(info.status.size.get()).unwrap_or(usize::MAX);
        let is_regular = FileType::from_raw_mode(info.status.mode.get()) == FileType::RegularFile;
        let read = if is_regular && closes_at_once(&info) {
            let wanted = size.min(bytes.len());
            let flags = if in_memory { ReadWriteFlags::empty() } else { ReadWriteFlags::NOWAIT };
            read_cached(&node, export, &mut bytes[..wanted], size, flags)
        } else {
            None
        };
        close(node, &info, export);
        read.map(Ok)
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
                    Some((info, UsableMount { in_memory, .. })) => Some(Ok(Found { node, info, in_memory })),
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

/// Opens a file that was looked up, and reads its beginning from the page cache. None if something of that
/// would have to wait. The file had this size.
fn read_cached(
    node: &OwnedFd,
    export: &Export,
    bytes: &mut [u8],
    size: usize,
    how: ReadWriteFlags,
) -> Option<(usize, FileInfo)> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOATIME;
    let file = reopen(node, flags).ok()?;
    let wanted = bytes.len();
    let read = match wanted {
        0 => Ok(0),
        _ => rustix::io::preadv2(&file, &mut [std::io::IoSliceMut::new(bytes)], 0, how),
    };
    let after = stat_on_mount(&file).ok();
    let info = after.map(|(info, _)| info);
    match &info {
        Some(info) => close(file, info, export),
        None => close_in_pool(file, export.lanes().control),
    }
    // If it is not cached, or has been changed meanwhile, it is read in the pool.
    let info = info.filter(|info| info.status.size.get() as usize == size)?;
    (read == Ok(wanted)).then_some((wanted, info))
}

fn close(fd: OwnedFd, info: &FileInfo, export: &Export) {
    if closes_at_once(info) {
        let _ = reactor::close(fd);
    } else {
        close_in_pool(fd, export.lanes().control);
    }
}

fn close_in_pool(fd: OwnedFd, lane: Lane) {
    lane.submit(lane.ticket(), Job::Close(fd, std::sync::Arc::default(), None));
}
