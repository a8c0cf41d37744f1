//! Status and contents of small files that the kernel has in memory, for a worker's thread: nothing here
//! waits for a disk or a file system.
//!
//! A path is resolved with RESOLVE_CACHED, by which the kernel fails rather than asks a file system. What is
//! found is used only if it lies on a mount that the pool has found to be of a file system whose open, status
//! and close do not wait for others than itself (FUSE and NFS do, though their names are cached). Everything
//! else is for the pool: [`crate::names`].
//!
//! A small file is opened by its path once more, when what is there was found to be a regular file, so that
//! no device and no FIFO is opened. To open what was looked up there is only /proc, which takes longer than
//! all the rest. If another file has taken the place meanwhile, it is closed, and the pool starts afresh.
//!
//! A descriptor may be the last to refer to a file that has just been removed, and closing it then frees the
//! file's blocks. So it is closed here only if the file had a name a moment before and is not large, and
//! otherwise by the pool.

use std::io::IoSliceMut;
use std::os::fd::OwnedFd;

use raio_transport::reactor;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::engine::{KEEPS_STATUS, cached_reads, closes_at_once};
use crate::export::{Confinement, Export, Location};
use crate::file_identity::{FileIdentity, FileSystem};
use crate::syscalls::{FileInfo, Mount, stat_cached};
use crate::tenure::Use;
use crate::tuning::cached_files::{INODE_EXTENTS, MOUNTS_MAX};

/// A mount that [`CachedFiles`] may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsableMount {
    mount: Mount,
    /// The type of its file system.
    kind: libc::__fsword_t,
    /// How its files are told from others; None: the pool does that.
    files: Option<FileSystem>,
}

impl UsableMount {
    /// The mount that a file with this status is on, if it is usable. The type is that of its file system.
    pub fn of(info: &FileInfo, kind: libc::__fsword_t) -> Option<Self> {
        let mount = info.mount.filter(|_| KEEPS_STATUS.contains(&kind))?;
        Some(Self { mount, kind, files: None })
    }

    /// The same, whose files are told from others by this.
    pub fn of_files(self, files: Option<FileSystem>) -> Self {
        Self { files, ..self }
    }
}

/// A small file that was opened for reading.
#[derive(Debug)]
pub struct CachedFile {
    /// It waits, as others do, and has O_NOATIME.
    pub fd: OwnedFd,
    /// Its status.
    pub info: FileInfo,
    /// The type of its file system.
    pub kind: libc::__fsword_t,
    /// What tells it from all other files.
    pub identity: FileIdentity,
    /// [`FileSystem::storage`].
    pub storage: u64,
}

/// A directory that paths are resolved beneath.
#[derive(Debug)]
struct Base {
    export: Use,
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
}

/// A file that was found: open with O_PATH, or for reading.
struct Found {
    fd: OwnedFd,
    info: FileInfo,
    on: UsableMount,
}

impl CachedFiles {
    /// What a worker begins with.
    pub fn new() -> Self {
        Self { mounts: Vec::new(), bases: Vec::new() }
    }

    /// The pool has found that this mount may be used.
    pub fn learn(&mut self, mount: UsableMount) {
        match self.mounts.iter_mut().find(|known| known.mount == mount.mount) {
            Some(known) => known.files = known.files.or(mount.files),
            None => {
                // They change with each mount. Which is forgotten does not matter: it is learned anew.
                self.mounts.truncate(MOUNTS_MAX - 1);
                self.mounts.insert(0, mount);
            }
        }
    }

    /// Closes the directories: what is mounted over them, or takes their place, is seen from then on.
    #[inline(always)]
    pub fn end_iteration(&mut self) {
        if !self.bases.is_empty() {
            self.bases.clear();
        }
    }

    /// The status of a path; None: it cannot be answered from the cache.
    pub fn stat(
        &mut self,
        export: &Export,
        at: &Location,
        nofollow: bool,
    ) -> Option<Result<FileInfo, Errno>> {
        let Found { fd, info, .. } = match self.find(export, at, nofollow)? {
            Ok(found) => found,
            Err(errno) => return Some(Err(errno)),
        };
        let kind = FileType::from_raw_mode(info.status.mode.get());
        close(fd, &info, export);
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
        let Found { fd, info, on } = match self.open_small(export, at, nofollow)? {
            Ok(file) => file,
            Err(errno) => return Some(Err(errno)),
        };
        let size = usize::try_from(info.status.size.get()).unwrap_or(usize::MAX);
        let wanted = size.min(bytes.len());
        let read = match (cached_reads(Some(on.kind)), wanted) {
            (_, 0) => Ok(0),
            (Some(how), _) => rustix::io::preadv2(&fd, &mut [IoSliceMut::new(&mut bytes[..wanted])], 0, how),
            (None, _) => Err(Errno::AGAIN),
        };
        close(fd, &info, export);
        // If it is not cached, or is shorter now, it is read in the pool.
        (read == Ok(wanted)).then_some(Ok((wanted, info)))
    }

    /// Opens a small regular file for reading, for a client. None: that cannot be done here.
    pub fn open(
        &mut self,
        export: &Export,
        at: &Location,
        nofollow: bool,
    ) -> Option<Result<CachedFile, Errno>> {
        let Found { fd, info, on } = match self.open_small(export, at, nofollow)? {
            Ok(file) => file,
            Err(errno) => return Some(Err(errno)),
        };
        let known = on.files.and_then(|files| Some((files, files.identity(&fd).ok()?)));
        // The flag was for the open: it makes io_uring fail rather than wait.
        let opened = rustix::fs::fcntl_setfl(&fd, OFlags::NOATIME);
        let (Some((files, identity)), Ok(())) = (known, opened) else {
            close(fd, &info, export);
            return None;
        };
        Some(Ok(CachedFile { fd, info, kind: on.kind, identity, storage: files.storage }))
    }

    /// Opens a small regular file for reading, if that needs no waiting.
    fn open_small(&mut self, export: &Export, at: &Location, nofollow: bool) -> Option<Result<Found, Errno>> {
        let node = match self.find(export, at, nofollow)? {
            Ok(node) => node,
            Err(errno) => return Some(Err(errno)),
        };
        let is_regular = FileType::from_raw_mode(node.info.status.mode.get()) == FileType::RegularFile;
        // Where on the disk so few blocks are the inode itself tells, which is in memory. Of larger files
        // that may have to be read first, in spite of RWF_NOWAIT.
        let is_small =
            node.info.status.size.get() <= u64::from(node.info.status.block_bytes.get()) * INODE_EXTENTS;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOATIME;
        let found = if is_regular && is_small { self.look_up(export, at, flags, nofollow) } else { None };
        let Some(Ok(file)) = found else {
            close(node.fd, &node.info, export);
            return None;
        };
        let inode = |found: &Found| (found.on.mount, found.info.status.inode);
        if inode(&file) != inode(&node) {
            close(node.fd, &node.info, export);
            // Whatever it is.
            export.lanes().close_read(file.fd);
            return None;
        }
        // It is not the last to have the file.
        let _ = reactor::close(node.fd);
        Some(Ok(file))
    }

    /// Looks a path up, and opens nothing.
    fn find(&mut self, export: &Export, at: &Location, nofollow: bool) -> Option<Result<Found, Errno>> {
        if self.mounts.is_empty() {
            return None;
        }
        self.look_up(export, at, OFlags::PATH, nofollow)
    }

    fn look_up(
        &mut self,
        export: &Export,
        at: &Location,
        flags: OFlags,
        nofollow: bool,
    ) -> Option<Result<Found, Errno>> {
        let base = self.base(export, at)?;
        let nofollow = if nofollow { OFlags::NOFOLLOW } else { OFlags::empty() };
        let resolve = at.resolve | ResolveFlags::CACHED;
        let flags = flags | OFlags::CLOEXEC | nofollow;
        let base = &self.bases[base].fd;
        match rustix::fs::openat2(base, at.beneath(), flags, Mode::empty(), resolve) {
            Ok(fd) => {
                let found = stat_cached(&fd).ok();
                match found.and_then(|info| Some((info, self.usable(&info)?))) {
                    Some((info, on)) => Some(Ok(Found { fd, info, on })),
                    None => {
                        export.lanes().close_read(fd);
                        None
                    }
                }
            }
            Err(errno @ (Errno::NOENT | Errno::NOTDIR)) => Some(Err(errno)),
            // It is not cached, or the pool finds better words.
            Err(_) => None,
        }
    }

    fn usable(&self, info: &FileInfo) -> Option<UsableMount> {
        self.mounts.iter().find(|usable| Some(usable.mount) == info.mount).copied()
    }

    /// The place of the directory that a path is resolved beneath.
    fn base(&mut self, export: &Export, at: &Location) -> Option<usize> {
        let directory = at.confinement.as_ref().map(|Confinement { directory, .. }| directory.as_str());
        let is_it =
            |base: &Base| base.export.is_of(at.export.tenure()) && base.directory.as_deref() == directory;
        if let Some(place) = self.bases.iter().position(is_it) {
            return Some(place);
        }
        let use_of_export = Use::of(at.export.tenure());
        // The pool says so.
        if at.export.tenure().is_over() {
            return None;
        }
        let root = export.root()?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let cached = ResolveFlags::NO_SYMLINKS | ResolveFlags::CACHED;
        let path = root.lasting_directory()?;
        let mut fd = rustix::fs::openat2(CWD, path, flags, Mode::empty(), cached).ok()?;
        let mut info = stat_cached(&fd).ok()?;
        // The pool takes in that another directory is there, and the log says so.
        if !root.has_seen(&info.status) {
            return None;
        }
        if let Some(directory) = directory {
            let resolve = at.resolve | cached;
            fd = rustix::fs::openat2(&fd, directory, flags, Mode::empty(), resolve).ok()?;
            info = stat_cached(&fd).ok()?;
        }
        self.usable(&info)?;
        self.bases.push(Base { export: use_of_export, directory: directory.map(str::to_owned), fd });
        Some(self.bases.len() - 1)
    }
}

fn close(fd: OwnedFd, info: &FileInfo, export: &Export) {
    if closes_at_once(info) {
        let _ = reactor::close(fd);
    } else {
        export.lanes().close_read(fd);
    }
}
