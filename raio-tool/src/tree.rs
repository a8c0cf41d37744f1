//! A directory with all that is beneath it, of this machine or of a server, for one thread.
//!
//! Paths are beneath the directory; the empty path is the directory itself. What is written never leaves it:
//! on this machine no symbolic link on the way is followed, and a server resolves the links of an export.

mod local;
mod remote;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::place::{PartialFile, Place};

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
    /// Makes a file with these bytes, or replaces one, or a link. Returns whether it could: there may be too
    /// many for one request.
    fn put(&mut self, path: &Path, bytes: &[u8], new: &New) -> Result<bool, Failure>;
    /// Begins a file that becomes longer than that.
    fn begin(&mut self, path: &Path, mode: u32) -> Result<Box<dyn PartialFile>, Failure>;
    /// Makes a directory. Returns whether it was made: there may be one.
    fn create_dir(&mut self, path: &Path, mode: u32) -> Result<bool, Failure>;
    /// Makes a symbolic link, or replaces a link or file.
    fn symlink(&mut self, target: &Path, path: &Path, modified_ns: Option<i64>) -> Result<(), Failure>;
    /// Sets permissions and time of a file or directory.
    fn set(&mut self, path: &Path, mode: Option<u32>, modified_ns: Option<i64>) -> Result<(), Failure>;
    /// Removes an empty directory.
    fn remove_dir(&mut self, path: &Path) -> Result<(), Failure>;
    /// Removes what is no directory.
    fn remove_file(&mut self, path: &Path) -> Result<(), Failure>;
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

/// The end of the name of the partial file for a path. It is another one for each path, as long names lose
/// their end.
fn partial_tag(access: &Access, path: &Path) -> String {
    let subject = [access.tag.as_bytes(), b"\n", path.as_os_str().as_encoded_bytes()].concat();
    blake3::hash(&subject).to_hex()[..16].to_owned()
}
