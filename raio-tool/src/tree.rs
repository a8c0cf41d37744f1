//! A directory with all that is beneath it, of this machine or of a server, for one thread.
//!
//! Paths are beneath the directory; the empty path is the directory itself. What is written never leaves it:
//! on this machine no symbolic link on the way is followed, and a server resolves the links of an export.

mod local;
mod remote;

use std::ffi::OsString;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::place::{PartialFile, Place, beside};

use self::local::LocalTree;
use self::remote::RemoteTree;

/// What is known of something in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeEntry {
    /// Its name; any bytes but `/` and zero.
    pub name: OsString,
    /// Type and permissions, as `st_mode`.
    pub mode: u32,
    /// In bytes.
    pub size: u64,
    /// Last change of the contents, in nanoseconds since the epoch.
    pub modified_ns: i64,
    /// Inode number.
    pub inode: u64,
}

impl TreeEntry {
    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }

    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }

    /// Whether it is a symbolic link.
    pub fn is_link(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFLNK
    }

    /// Its permissions.
    pub fn permissions(&self) -> u32 {
        self.mode & 0o777
    }
}

/// How a file is made.
#[derive(Clone, Copy, Debug)]
pub struct New {
    /// Permissions.
    pub mode: u32,
    /// It gets exactly these permissions, whatever the umask.
    pub is_exact: bool,
    /// Time of its last change, in nanoseconds since the epoch; None: now.
    pub modified_ns: Option<i64>,
    /// It is durable before it takes its name.
    pub is_durable: bool,
}

/// What is requested of a tree, many at a time.
#[derive(Debug)]
pub enum Request {
    /// Read the first bytes of a regular file: [`Answer::Read`].
    Read {
        /// Of the file.
        path: PathBuf,
        /// How many bytes it has, as far as is known. There may be more in the answer.
        length: u64,
    },
    /// Create a file with these bytes, or replace one, or a link: [`Answer::Done`] or [`Answer::TooLarge`].
    Put {
        /// Of the file.
        path: PathBuf,
        /// All that it is to have.
        bytes: Vec<u8>,
        /// How it is made.
        new: New,
    },
    /// Create a directory: [`Answer::Done`] or [`Answer::Exists`].
    CreateDir {
        /// Of the directory.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Set permissions and time of a file or directory: [`Answer::Done`].
    Set {
        /// Of the file or directory.
        path: PathBuf,
        /// Its permissions.
        mode: Option<u32>,
        /// Time of its last change, in nanoseconds since the epoch.
        modified_ns: Option<i64>,
    },
    /// Read the target of a symbolic link: [`Answer::Link`].
    ReadLink {
        /// Of the link.
        path: PathBuf,
    },
    /// Create a symbolic link, or replace a link or file: [`Answer::Done`].
    Symlink {
        /// Of the link.
        path: PathBuf,
        /// What it leads to.
        target: PathBuf,
        /// Time of its last change, in nanoseconds since the epoch; None: now.
        modified_ns: Option<i64>,
    },
    /// Remove what is no directory: [`Answer::Done`].
    Remove {
        /// Of what is removed.
        path: PathBuf,
    },
}

/// What a request has brought.
#[derive(Debug)]
pub enum Answer {
    /// The bytes, and the file's status from before they were read. If its size is larger, there is more.
    Read(Vec<u8>, TreeEntry),
    /// The target of a symbolic link.
    Link(PathBuf),
    /// It is done.
    Done,
    /// There are too many bytes for one request.
    TooLarge,
    /// There is such a directory.
    Exists,
}

/// A request that has ended.
#[derive(Debug)]
pub struct Ended {
    /// As given.
    pub token: usize,
    /// What it has brought.
    pub result: Result<Answer, Failure>,
}

/// A directory with all that is beneath it.
pub trait Tree: Send {
    /// What the user calls something in it.
    fn location(&self, path: &Path) -> Location;
    /// What is in a directory, by name.
    fn entries(&mut self, path: &Path) -> Result<Vec<TreeEntry>, Failure>;
    /// The status of a path; None: it does not exist. With `follows` that of a link's target.
    fn entry(&mut self, path: &Path, follows: bool) -> Result<Option<TreeEntry>, Failure>;
    /// The first bytes of a regular file, and its status from before that. If its size is larger, there is
    /// more.
    fn read(&mut self, path: &Path, length: u64) -> Result<(Vec<u8>, TreeEntry), Failure>;
    /// A file to read.
    fn source(&mut self, path: &Path) -> Result<Box<dyn Place>, Failure>;
    /// The target of a symbolic link.
    fn read_link(&mut self, path: &Path) -> Result<PathBuf, Failure>;
    /// Begins a file that becomes longer than that, or opens the partial file that an earlier copy has left.
    fn begin(&mut self, path: &Path, mode: u32) -> Result<Box<dyn PartialFile>, Failure>;
    /// Makes a directory. Returns whether it was made: there may be one.
    fn create_dir(&mut self, path: &Path, mode: u32) -> Result<bool, Failure>;
    /// Sets permissions and time of a file or directory.
    fn set(&mut self, path: &Path, mode: Option<u32>, modified_ns: Option<i64>) -> Result<(), Failure>;
    /// Removes an empty directory.
    fn remove_dir(&mut self, path: &Path) -> Result<(), Failure>;
    /// Removes what is no directory.
    fn remove_file(&mut self, path: &Path) -> Result<(), Failure>;
    /// Starts a request. At most [`crate::tuning::REQUESTS_IN_FLIGHT`] are to be in flight.
    fn start(&mut self, token: usize, request: Request);
    /// The next request that has ended, in any order. Sends those that were started, and does not wait.
    fn next(&mut self) -> Result<Option<Ended>, Failure>;
    /// Waits until one may have ended, or for this long. Not at all where they end at once.
    fn wait(&mut self, _timeout: Duration) -> Result<(), Failure> {
        Ok(())
    }
    /// What poll(2) finds readable when one may have ended. None: none is in flight, or they end at once.
    fn poll_fd(&mut self) -> Result<Option<BorrowedFd<'_>>, Failure> {
        Ok(None)
    }
}

/// How a tree is used.
#[derive(Clone, Debug)]
pub struct Access {
    /// Symbolic links in it lead to what they are links to. Not for trees that are written.
    pub follows: bool,
    /// The directory itself may be a link to one, as the user has named it.
    pub is_root_followed: bool,
    /// Part of the names of partial files.
    pub tag: String,
}

/// Opens the tree at a location, with a session of its own if it is on a server.
pub fn open(global: &Global, location: &Location, access: &Access) -> Result<Box<dyn Tree>, Failure> {
    match location {
        Location::Local(_) => Ok(Box::new(LocalTree::open(location, access)?)),
        Location::Remote { .. } => Ok(Box::new(RemoteTree::open(global, location, access)?)),
        Location::Stream | Location::Null => Err(Failure::usage(format!(
            "{location} is no directory. Name one of this machine or of a server."
        ))),
    }
}

/// The partial file for a path.
pub fn partial_path(access: &Access, path: &Path) -> PathBuf {
    beside(path, &format!(".partial-{}", partial_tag(access, path)))
}

/// The end of the name of the partial file for a path, and of its journal. It is unique for each path,
/// because long names are truncated.
pub fn partial_tag(access: &Access, path: &Path) -> String {
    let subject = [access.tag.as_bytes(), b"\n", path.as_os_str().as_encoded_bytes()].concat();
    blake3::hash(&subject).to_hex()[..16].to_owned()
}
