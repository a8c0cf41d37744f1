//! Looking up a client's path by blocking system calls: for a thread of the pool.
//!
//! The kernel resolves a path beneath its export, or beneath the directory of it that the client does not
//! leave, and rejects what leads out (openat2(2)). What is created, removed or renamed is one name in a
//! directory that was looked up in this way: whatever is moved meanwhile, nothing is reached that was not
//! beneath the export then.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use raio_transport::Status;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::path::Arg;

use crate::export::{Confinement, Export, Location};
use crate::log::log_client;
use crate::path::{last_name, split};
use crate::peer::Origin;
use crate::rejection::Rejection;
use crate::root::check_file_system;
use crate::syscalls::openat2;

/// The directory that a path is looked up beneath. None: the path is the server's own.
#[derive(Debug)]
pub struct Base(Option<OwnedFd>);

impl AsFd for Base {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_ref().map_or(CWD, AsFd::as_fd)
    }
}

/// A directory, and a name in it.
#[derive(Debug)]
pub struct Entry<'a> {
    /// Open with O_PATH.
    pub directory: OwnedFd,
    /// Not empty, neither `.` nor `..`; slashes may follow, by which the kernel tells whether it has to be a
    /// directory.
    pub name: &'a CStr,
}

impl Entry<'_> {
    /// Whether slashes follow.
    pub fn has_slash(&self) -> bool {
        self.name.to_bytes().ends_with(b"/")
    }
}

impl Location {
    /// Opens the directory that the path is looked up beneath.
    pub fn enter(&self, export: &Export) -> Result<Base, Rejection> {
        let Some(root) = export.root() else { return Err(self.failed("open", Errno::NOTDIR)) };
        match (root.enter(export.name())?, &self.confinement) {
            (Some(directory), Some(confinement)) => {
                self.confine(export.name(), &directory, confinement).map(|directory| Base(Some(directory)))
            }
            (directory, _) => Ok(Base(directory)),
        }
    }

    /// The directory that a client does not leave. No symbolic link leads to it, so that those who may make
    /// some in the export do not choose what the client sees. Whatever keeps it from being opened, to the
    /// client it is not there; the operator hears why.
    fn confine(
        &self,
        name: &str,
        export: &OwnedFd,
        Confinement { directory, .. }: &Confinement,
    ) -> Result<OwnedFd, Rejection> {
        let resolve = self.resolve | ResolveFlags::NO_SYMLINKS;
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        openat2(export.as_fd(), directory.as_str(), flags, Mode::empty(), resolve).map_err(|errno| {
            log_client!(
                warn,
                origin None::<Origin>,
                "client-directory-missing",
                export = name,
                "A client has only {directory:?} of an export, which cannot be opened ({errno}). It must be \
                 a directory, to which no symbolic link leads. Make it, or change clients.toml."
            );
            self.failed("open", Errno::NOENT)
        })
    }

    /// The path beneath [`Location::enter`].
    pub fn beneath(&self) -> &CStr {
        let rest = self.confinement.as_ref().map_or(0, |confinement| confinement.rest);
        match CStr::from_bytes_with_nul(&self.path.as_bytes_with_nul()[rest..]) {
            Ok(path) if !path.is_empty() => path,
            _ => c".",
        }
    }

    /// Opens what is at a path beneath the base, as the export allows it.
    pub fn openat(
        &self,
        base: BorrowedFd<'_>,
        path: impl Arg + Copy,
        flags: OFlags,
        mode: Mode,
    ) -> Result<OwnedFd, Errno> {
        openat2(base, path, flags, mode, self.resolve)
    }

    /// Opens what the path leads to, if files are served there. Returns the type of the file system, too.
    pub fn open(
        &self,
        what: &str,
        base: &Base,
        flags: OFlags,
    ) -> Result<(OwnedFd, libc::__fsword_t), Rejection> {
        let node = self.openat(base.as_fd(), self.beneath(), flags, Mode::empty());
        let node = node.map_err(|errno| self.failed(what, errno))?;
        self.check(what, &node).map(|file_system| (node, file_system))
    }

    /// Looks up the directory that the last name of the path is, or will be, in. None: the path is there, and
    /// ends with no name, but with `.` or `..`, or is the export's own.
    pub fn entry(&self, what: &str, base: &Base) -> Result<Option<Entry<'_>>, Rejection> {
        let path = self.beneath().to_bytes_with_nul();
        let (parent, name) = split(&path[..path.len() - 1]);
        let name = CStr::from_bytes_with_nul(&path[path.len() - 1 - name.len()..]);
        let Ok(name) = name else { return Err(self.failed(what, Errno::INVAL)) };
        if matches!(last_name(name.to_bytes()), None | Some(b"." | b"..")) || base.0.is_none() {
            return self.open(what, base, OFlags::PATH).map(|_| None);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let directory = self.openat(base.as_fd(), parent, flags, Mode::empty());
        let directory = directory.map_err(|errno| self.failed(what, errno))?;
        self.check(what, &directory)?;
        Ok(Some(Entry { directory, name }))
    }

    fn check(&self, what: &str, node: &OwnedFd) -> Result<libc::__fsword_t, Rejection> {
        check_file_system(node).map_err(|(errno, why)| self.rejection(what, errno, why))
    }

    /// The rejection of what the kernel does not do. `what` is a verb.
    pub fn failed(&self, what: &str, errno: Errno) -> Rejection {
        match errno {
            // For a client that has no more than a directory there is nothing outside.
            Errno::XDEV if self.confinement.is_some() => self.failed(what, Errno::NOENT),
            Errno::XDEV => self.rejection(
                what,
                libc::EXDEV,
                "The path leaves the export, has an absolute symbolic link, or enters another file system.",
            ),
            Errno::MFILE | Errno::NFILE => self.rejection(
                what,
                errno.raw_os_error(),
                "Raise the server's limit with `ulimit -n` or LimitNOFILE=.",
            ),
            errno => self.rejection(what, errno.raw_os_error(), ""),
        }
    }

    /// A rejection with this errno and hint, which may be empty.
    pub fn rejection(&self, what: &str, errno: i32, hint: &str) -> Rejection {
        Rejection::of_path(what, self.path.as_bytes(), errno, hint)
    }

    /// The same, of the operator's making: it is logged.
    pub fn policy(&self, what: &str, errno: i32, hint: &str) -> Rejection {
        Rejection { status: Status::policy(errno), ..self.rejection(what, errno, hint) }
    }
}
