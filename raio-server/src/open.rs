//! Opening a file of an export, by blocking system calls: for a thread of the pool.
//!
//! A file is looked up with O_PATH first, which opens nothing. Only if its type is one that is served is it
//! opened, through /proc/self/fd: so no FIFO gets a reader, no device is started, no socket is touched,
//! whatever is renamed meanwhile. A file that is not there is created with O_EXCL, so that nothing else is
//! opened in its place.

use std::borrow::Cow;
use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::Arc;

use raio_transport::Status;
use raio_transport::protocol::FileHandle;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid};
use rustix::io::Errno;
use rustix::path::Arg;

use crate::audit::Audited;
use crate::cached::{CachedFile, UsableMount};
use crate::engine::Descriptor;
use crate::export::{Export, Location};
use crate::file_identity::{Facts, FileIdentity};
use crate::path::split;
use crate::rejection::{EscapedPath, Rejection};
use crate::root::{Root, check_file_system};
use crate::session::{Access, ObjectKey, OpenFile};
use crate::stored::Stored;
use crate::subtree::Owner;
use crate::syscalls::{FileInfo, openat2, reopen, stat};
use crate::throttle::Flow;
use crate::tuning::files::CREATIONS_MAX;
use crate::verifier::FileVerifier;
use crate::volume::{BlockDevice, RegularFile, Volume};

/// A file to be opened.
#[derive(Clone, Debug)]
pub struct Opening {
    /// Where.
    pub at: Location,
    /// To whom it belongs, if it is created.
    pub owner: Owner,
    /// Where its bytes are counted, if they are limited, and how many there may be.
    pub stored: Option<(Arc<Stored>, u64)>,
    /// How: the flags of openat2(2).
    pub flags: OFlags,
    /// The permissions of what is created.
    pub mode: Mode,
    /// For what.
    pub access: Access,
    /// If somebody has a lease on the file, it waits for them to give it up. Else it fails with EAGAIN then,
    /// and they are asked to.
    pub waits_for_lease: bool,
    /// It takes the place of a file that an earlier server had open.
    pub reopens: Option<Reopens>,
    /// What the file is to the audit log, if there is one.
    pub audited: Option<Arc<Audited>>,
    /// What its client has of the export, if that is limited.
    pub flow: Option<Arc<Flow>>,
}

/// What a reopen wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reopens {
    /// The handle that the file is to have.
    pub handle: FileHandle,
    /// What the file has to be.
    pub identity: FileIdentity,
}

/// A file that has been opened.
#[derive(Debug)]
pub struct Opened {
    /// The file.
    pub file: OpenFile,
    /// Its status.
    pub info: FileInfo,
    /// The mount that it is on, if workers may use what is cached of it.
    pub mount: Option<UsableMount>,
}

/// A file that was found, or created, and opened.
struct Found {
    fd: OwnedFd,
    /// In bytes, before the open that may have emptied it. Known where stored bytes are counted.
    size_before: u64,
    /// The type of its file system; None of a device.
    file_system: Option<libc::__fsword_t>,
}

/// What an [`Opening`] comes to.
pub type OpenResult = Result<Opened, Rejection>;

impl Opening {
    /// Opens the file. May take as long as its file system does, or the holder of a lease on it.
    pub fn open(&self, export: &Export) -> OpenResult {
        let Some(root) = export.root() else { return Err(self.failed(Errno::NOTDIR)) };
        let base = self.at.enter(export)?;
        let Found { fd, size_before, file_system } =
            self.find_or_create(export.name(), root, base.as_fd())
                .map_err(|rejection| root.explain(export.name(), rejection))?;
        let info = stat(&fd).map_err(|errno| self.failed(errno))?;
        let facts = Facts::of(&fd).map_err(|errno| self.failed(errno))?;
        export.note_basis(facts.basis);
        if self.reopens.is_some_and(|reopens| reopens.identity != facts.identity) {
            return Err(another_file(self.at.path.as_bytes()));
        }
        let verifier = FileVerifier::new(Arc::clone(export.verifier()), facts.storage);
        let mount = file_system.and_then(|file_system| UsableMount::of(&info, file_system));
        let mount = mount.map(|mount| mount.of_files(facts.file_system));
        let fd = Descriptor::new(fd, file_system, export.lanes().clone(), Arc::clone(export.verifier()));
        let is_device = file_system.is_none();
        let volume: Arc<dyn Volume> = if is_device {
            Arc::new(BlockDevice::new(fd, &info))
        } else {
            Arc::new(RegularFile::new(fd, &info, root.size_limit()))
        };
        let (object, size) = (ObjectKey::of(&info.status), info.status.size.get());
        let stored = self.stored.as_ref().filter(|_| !is_device);
        let stored = stored
            .map(|(stored, bytes_max)| stored.opened(*bytes_max, (object.0, object.1), size_before, size));
        let file = OpenFile::new(volume, self.access, export.place(), facts.identity, verifier);
        let mut file = file.in_tenure(export.tenure()).of_object(object);
        file.stored = stored;
        Ok(Opened { file, info, mount })
    }

    /// The file, which was opened for reading where it is.
    pub fn small_file(&self, export: &Export, file: CachedFile) -> OpenFile {
        let CachedFile { fd, info, kind, identity, storage } = file;
        let fd = Descriptor::of_small_file(fd, kind, export.lanes().clone(), Arc::clone(export.verifier()));
        let size_limit = export.root().and_then(Root::size_limit);
        let volume = Arc::new(RegularFile::new(fd, &info, size_limit));
        let verifier = FileVerifier::new(Arc::clone(export.verifier()), storage);
        OpenFile::new(volume, self.access, export.place(), identity, verifier)
            .in_tenure(export.tenure())
            .of_object(ObjectKey::of(&info.status))
    }

    fn has(&self, flags: OFlags) -> bool {
        self.flags.contains(flags)
    }

    fn find_or_create(&self, name: &str, root: &Root, base: BorrowedFd<'_>) -> Result<Found, Rejection> {
        let must_be_new = self.has(OFlags::CREATE | OFlags::EXCL);
        let creates = self.has(OFlags::CREATE) && !root.is_device();
        let lookup = OFlags::PATH | self.flags.intersection(OFlags::NOFOLLOW);
        let mut path = Cow::Borrowed(self.at.beneath());
        for _ in 0..CREATIONS_MAX {
            if !(must_be_new && creates) {
                match self.openat(base, &*path, lookup) {
                    Ok(_) if must_be_new => return Err(self.failed(Errno::EXIST)),
                    Ok(node) => return self.open_node(name, root, &node),
                    // What open(2) says of `file/`, the attempt to create it says, too.
                    Err(Errno::NOENT | Errno::NOTDIR) if creates => {}
                    Err(Errno::NOENT) if root.is_device() => {
                        return Err(self.rejection(libc::ENXIO, "The device is not there (any more)."));
                    }
                    Err(Errno::XDEV) => return Err(self.leads_out(base, &path, lookup)),
                    Err(errno) => return Err(self.failed(errno)),
                }
            }
            match self.create(name, root, base, &path, lookup)? {
                Some((fd, file_system)) => return Ok(Found { fd, size_before: 0, file_system }),
                None => path = self.behind_link(base, path)?,
            }
        }
        Err(self.failed(Errno::LOOP))
    }

    /// Creates the file; None if there is something already and that may be. Its directory is looked up
    /// first: where files are not served none is created either.
    fn create(
        &self,
        name: &str,
        root: &Root,
        base: BorrowedFd<'_>,
        path: &CStr,
        lookup: OFlags,
    ) -> Result<Option<(OwnedFd, Option<libc::__fsword_t>)>, Rejection> {
        let failed = |errno| match errno {
            Errno::XDEV => self.leads_out(base, path, lookup),
            errno => self.failed(errno),
        };
        let (parent, file) = split(path.to_bytes());
        let directory = self.openat(base, parent, OFlags::PATH | OFlags::DIRECTORY).map_err(failed)?;
        check_file_system(&directory).map_err(|(errno, why)| self.rejection(errno, why))?;
        match self.openat(directory.as_fd(), file, self.flags | OFlags::EXCL) {
            Err(Errno::EXIST) if !self.has(OFlags::EXCL) => Ok(None),
            Err(errno) => Err(failed(errno)),
            Ok(fd) => {
                let (_, file_system) = self.checked(name, root, &fd)?;
                self.give_to_owner(directory.as_fd(), file, &fd)?;
                Ok(Some((fd, file_system)))
            }
        }
    }

    /// Sets the owner and the group of a new file, which has the name `file` in the directory. If that fails
    /// the file is removed.
    fn give_to_owner(&self, directory: BorrowedFd<'_>, file: &[u8], fd: &OwnedFd) -> Result<(), Rejection> {
        let Owner { uid, gid } = self.owner;
        if (uid, gid) == (None, None) {
            return Ok(());
        }
        let Err(errno) = rustix::fs::fchown(fd, uid.map(Uid::from_raw), gid.map(Gid::from_raw)) else {
            return Ok(());
        };
        let owners = [("user", uid), ("group", gid)];
        let owners = owners.iter().filter_map(|(kind, id)| id.map(|id| format!("{kind} {id}")));
        let owners = owners.collect::<Vec<_>>().join(" and ");
        let remains = match remove(directory, file, fd) {
            Ok(()) => String::new(),
            Err(errno) => format!(" The new file is left there, and empty ({errno})."),
        };
        let hint = format!(
            "The new file cannot be given to {owners}, as clients.toml says: the file system does not allow \
             that, or does not know them.{remains}"
        );
        Err(self.at.policy("open", errno.raw_os_error(), &hint))
    }

    /// The path to create a file at when there is something at `path` that a lookup did not find: most likely
    /// a symbolic link to where there is nothing. open(2) with O_CREAT would create its target.
    fn behind_link<'a>(&self, base: BorrowedFd<'_>, path: Cow<'a, CStr>) -> Result<Cow<'a, CStr>, Rejection> {
        let target = match self.openat(base, &*path, OFlags::PATH | OFlags::NOFOLLOW) {
            Ok(node) => rustix::fs::readlinkat(&node, c"", Vec::new()),
            Err(errno) => Err(errno),
        };
        match target {
            Ok(_) if self.has(OFlags::NOFOLLOW) => Err(self.failed(Errno::LOOP)),
            Ok(target) => {
                let path = Path::new(OsStr::from_bytes(path.to_bytes()));
                let parent = path.parent().unwrap_or(Path::new(""));
                let joined = parent.join(OsStr::from_bytes(target.as_bytes()));
                match CString::new(joined.into_os_string().into_vec()) {
                    Ok(path) => Ok(Cow::Owned(path)),
                    Err(_) => Err(self.failed(Errno::INVAL)),
                }
            }
            // It has been created, or has gone, meanwhile.
            Err(Errno::INVAL | Errno::NOENT) => Ok(path),
            Err(errno) => Err(self.failed(errno)),
        }
    }

    /// Opens what the lookup has found, if that may be.
    fn open_node(&self, name: &str, root: &Root, node: &OwnedFd) -> Result<Found, Rejection> {
        let (kind, file_system) = self.checked(name, root, node)?;
        let size_before = match self.stored {
            Some(_) => rustix::fs::fstat(node).map_err(|errno| self.failed(errno))?.st_size as u64,
            None => 0,
        };
        // Leases are on regular files, and to devices O_NONBLOCK means something else.
        let nonblock = if self.waits_for_lease || kind != FileType::RegularFile {
            OFlags::empty()
        } else {
            OFlags::NONBLOCK
        };
        let flags = self.flags - (OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW);
        let opened = reopen(node, flags | nonblock).and_then(|fd| {
            if !nonblock.is_empty() {
                rustix::io::ioctl_fionbio(&fd, false)?;
            }
            Ok(Found { fd, size_before, file_system })
        });
        opened.map_err(|errno| match errno {
            Errno::NOENT => {
                self.rejection(libc::ENOSYS, "The server has no /proc (any more), by which it opens files.")
            }
            // A device node whose driver has gone.
            Errno::NODEV => self.failed(Errno::NXIO),
            errno => self.failed(errno),
        })
    }

    /// The type of what was found, and that of its file system; None of a device, whose node lies there.
    fn checked(
        &self,
        name: &str,
        root: &Root,
        node: &OwnedFd,
    ) -> Result<(FileType, Option<libc::__fsword_t>), Rejection> {
        let (kind, file_system) =
            root.check(name, node).map_err(|(errno, why)| self.rejection(errno, why))?;
        Ok((kind, Some(file_system).filter(|_| kind != FileType::BlockDevice)))
    }

    fn openat(&self, base: BorrowedFd<'_>, path: impl Arg + Copy, flags: OFlags) -> Result<OwnedFd, Errno> {
        let creates = flags.contains(OFlags::CREATE) && !flags.contains(OFlags::PATH);
        let mode = if creates { self.mode } else { Mode::empty() };
        self.at.openat(base, path, flags, mode)
    }

    fn failed(&self, errno: Errno) -> Rejection {
        let hint = match errno {
            Errno::INVAL if self.has(OFlags::DIRECT) => "Its file system may not have O_DIRECT.",
            Errno::MFILE | Errno::NFILE => "Raise the server's limit with `ulimit -n` or LimitNOFILE=.",
            _ => "",
        };
        self.rejection(errno.raw_os_error(), hint)
    }

    /// Why the kernel does not go there. For a client that has no more than a directory, nothing is there: a
    /// second lookup could find something else than the first, and tell of what is outside.
    fn leads_out(&self, base: BorrowedFd<'_>, path: &CStr, lookup: OFlags) -> Rejection {
        if self.at.confinement.is_some() {
            return self.failed(Errno::NOENT);
        }
        let within = self.at.resolve - ResolveFlags::NO_XDEV;
        let hint = match openat2(base, path, lookup, Mode::empty(), within) {
            Ok(_) | Err(Errno::NOENT) => {
                "Another file system is mounted there; `cross-mounts = true` would serve it."
            }
            Err(_) => "The path leaves the export, or goes through an absolute symbolic link.",
        };
        self.rejection(libc::EXDEV, hint)
    }

    fn rejection(&self, errno: i32, hint: &str) -> Rejection {
        self.at.rejection("open", errno, hint)
    }
}

/// Removes a file that has just been created, if its name in the directory is still its own. No system call
/// does both, so another file could take its place in between; only who may remove files there can do that.
fn remove(directory: BorrowedFd<'_>, name: &[u8], file: &OwnedFd) -> Result<(), Errno> {
    let identity = |stat: Stat| (stat.st_dev, stat.st_ino);
    let created = rustix::fs::fstat(file)?;
    let found = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if identity(created) != identity(found) {
        return Ok(());
    }
    rustix::fs::unlinkat(directory, name, AtFlags::empty())
}

/// Why a file is not reopened: another file is at its path.
pub fn another_file(path: &[u8]) -> Rejection {
    let path = EscapedPath(path);
    Rejection {
        status: Status::storage(libc::ESTALE),
        text: format!(
            "{path} is not the file that was open before the server began anew: another one has its place. \
             Open it by its path if that is what you want."
        ),
    }
}
