//! What a program does to names: directories, attributes, and whole small files. Each call blocks for a round
//! trip.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use raio_transport::memory::{Buffer, Buffers};
use raio_transport::protocol::path::{NAMES_BYTES_MAX, PathCommand, XATTR_NAME_BYTES_MAX};
use raio_transport::protocol::{
    Command, FLAG_EXCLUSIVE, FLAG_FSYNC, FLAG_NO_REPLACE, FLAG_NOFOLLOW, FLAG_ODD_PAGE, FLAG_REMOVE,
    FLAG_SET_MODE, FLAG_SET_SIZE, FLAG_SET_TIME, FileStatus, FileSystemStatus, Opcode, PATH_BYTES_MAX,
    entries,
};
use raio_transport::transport::{Bulk, Reply};

use crate::control::end_of_listing;
use crate::error::{Error, protocol_error};
use crate::session::{Session, Shared, status_of};
use crate::tuning::{FIRST_PAGE_BYTES, PAGE_BYTES, XATTR_BYTES_MAX};

/// How [`Session::put`] makes a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PutOptions {
    /// Its permissions; the server's umask applies.
    pub mode: u32,
    /// Its modification time, in nanoseconds since the Epoch; None: the present.
    pub modified_ns: Option<i64>,
    /// Fails with EEXIST if there is something at the path.
    pub exclusive: bool,
    /// It returns when the file and its name are durable.
    pub fsync: bool,
}

impl Default for PutOptions {
    fn default() -> Self {
        Self { mode: 0o644, modified_ns: None, exclusive: false, fsync: false }
    }
}

/// What [`Session::set_attributes`] sets; what is None stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permissions, at most 0o777.
    pub mode: Option<u32>,
    /// The size of a regular file, in bytes.
    pub size: Option<u64>,
    /// The modification time, in nanoseconds since the Epoch.
    pub modified_ns: Option<i64>,
    /// Sets them of a symbolic link itself. (Links have no permissions: EOPNOTSUPP.)
    pub nofollow: bool,
}

/// An entry of a directory: see [`Session::read_dir`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Its name; any bytes but `/` and zero.
    pub name: OsString,
    /// Type and permissions, as `st_mode`; the type alone if `has_status` is false.
    pub mode: u32,
    /// Length in bytes.
    pub size: u64,
    /// Last change of the contents, in nanoseconds since the Epoch.
    pub modified_ns: i64,
    /// Inode number.
    pub inode: u64,
    /// Whether size, time and permissions are known. They are not of exports that are files.
    pub has_status: bool,
}

impl DirEntry {
    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }

    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }

    /// Whether it is a symbolic link.
    pub fn is_symlink(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFLNK
    }

    /// The modification time.
    pub fn modified(&self) -> SystemTime {
        let distance = Duration::from_nanos(self.modified_ns.unsigned_abs());
        if self.modified_ns < 0 {
            SystemTime::UNIX_EPOCH - distance
        } else {
            SystemTime::UNIX_EPOCH + distance
        }
    }
}

/// The bytes of a path, if it can be one.
pub(crate) fn path_bytes(path: &Path) -> Result<&[u8], Error> {
    let path = path.as_os_str().as_bytes();
    if path.is_empty() {
        return Err(Error::call(libc::ENOENT, "The path is empty. Pass one such as /EXPORT/file."));
    }
    // PATH_MAX counts C's terminating zero.
    if path.len() >= PATH_BYTES_MAX {
        return Err(Error::call(
            libc::ENAMETOOLONG,
            format!("The path is {} bytes long. Pass one of at most 4,095 bytes.", path.len()),
        ));
    }
    if path.contains(&0) {
        return Err(Error::call(libc::EINVAL, "The path contains a zero byte. Pass one without."));
    }
    Ok(path)
}

/// The bytes of what a command names beside its path.
pub(crate) fn other_bytes<'a>(path: &[u8], other: &'a OsStr) -> Result<&'a [u8], Error> {
    let other = path_bytes(Path::new(other))?;
    if path.len() + other.len() > NAMES_BYTES_MAX {
        return Err(Error::call(
            libc::ENAMETOOLONG,
            format!(
                "Both names together are {} bytes long. Pass at most {NAMES_BYTES_MAX} bytes in all.",
                path.len() + other.len()
            ),
        ));
    }
    Ok(other)
}

/// A command on this path, and the second name that it may have.
pub(crate) fn path_command<'a>(
    opcode: Opcode,
    flags: u16,
    mode: u32,
    path: &'a Path,
    other: Option<&'a OsStr>,
) -> Result<PathCommand<'a>, Error> {
    let path = path_bytes(path)?;
    let other = other.map_or(Ok(&[][..]), |other| other_bytes(path, other))?;
    Ok(PathCommand { flags, mode: mode & 0o7777, other, ..PathCommand::new(opcode, path) })
}

/// One on an extended attribute.
pub(crate) fn xattr_command<'a>(
    opcode: Opcode,
    flags: u16,
    path: &'a Path,
    name: &'a OsStr,
) -> Result<PathCommand<'a>, Error> {
    if name.len() > XATTR_NAME_BYTES_MAX {
        let text = format!(
            "The attribute's name is {} bytes long. Pass one of at most {XATTR_NAME_BYTES_MAX} bytes.",
            name.len()
        );
        return Err(Error::call(libc::ERANGE, text));
    }
    path_command(opcode, flags, 0, path, Some(name))
}

/// Whether this number of bytes can be put.
pub(crate) fn check_put(length: usize, length_max: usize) -> Result<(), Error> {
    if length <= length_max {
        return Ok(());
    }
    let text = format!(
        "A put has at most {length_max} bytes; this one has {length}. Write to a new file, and rename it."
    );
    Err(Error::call(libc::EFBIG, text))
}

/// Whether an extended attribute can have a value of this length.
pub(crate) fn check_xattr(length: usize, length_max: usize) -> Result<(), Error> {
    match length <= XATTR_BYTES_MAX.min(length_max) {
        true => Ok(()),
        false => Err(Error::call(libc::E2BIG, "The value is too long. Pass at most 64 KiB.")),
    }
}

/// The target of a symbolic link, by the answer to a readlink.
pub(crate) fn link_of(reply: &Reply) -> Result<PathBuf, Error> {
    let target = reply.body.get(..reply.result as usize).ok_or_else(protocol_error)?;
    Ok(PathBuf::from(OsString::from_vec(target.to_vec())))
}

/// Memory of the library's for this many bytes.
pub(crate) fn room_for(length: usize) -> Bulk {
    match length {
        0 => Bulk::None,
        _ => Bulk::In(Buffers::One(Buffer::Owned(vec![0; length].into()))),
    }
}

/// The bytes that a reply has placed in memory of the library's, which it takes.
pub(crate) fn data_of(reply: &mut Reply) -> Result<Vec<u8>, Error> {
    let mut bytes = match std::mem::replace(&mut reply.bulk, Bulk::None) {
        Bulk::In(Buffers::One(Buffer::Owned(bytes))) => Vec::from(bytes),
        // There was to be no data.
        Bulk::None => Vec::new(),
        _ => return Err(protocol_error()),
    };
    bytes.truncate(reply.data_len);
    Ok(bytes)
}

/// The names of extended attributes, by the answer to a list_xattr.
pub(crate) fn xattr_names(reply: &mut Reply) -> Result<Vec<OsString>, Error> {
    let names = data_of(reply)?;
    let names = names.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    Ok(names.map(|name| OsString::from_vec(name.to_vec())).collect())
}

impl Session {
    fn call_path(&self, command: PathCommand<'_>, bulk: Bulk) -> Result<Reply, Error> {
        self.shared().call_with(&Command::Path(command), bulk)
    }

    fn plain(&self, opcode: Opcode, path: &Path) -> Result<Reply, Error> {
        self.call_path(path_command(opcode, 0, 0, path, None)?, Bulk::None)
    }

    /// A command that brings at most `length` bytes, and no more than a request may.
    fn fetch(&self, command: PathCommand<'_>, length: usize) -> Result<Reply, Error> {
        self.shared().call_sized(|length_max| {
            let length = length.min(length_max);
            Ok((Command::Path(PathCommand { length: length as u64, ..command }), room_for(length)))
        })
    }

    /// A command that takes these bytes. `check` gets the most that a request may have.
    fn send(
        &self,
        command: PathCommand<'_>,
        bytes: &[u8],
        check: impl FnOnce(usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let call = self.shared().call_sized(|length_max| {
            check(length_max)?;
            let bulk = match bytes.len() {
                0 => Bulk::None,
                _ => Bulk::Out(Buffers::One(Buffer::Owned(bytes.into()))),
            };
            Ok((Command::Path(command), bulk))
        });
        call.map(drop)
    }

    /// Returns the status of a path, and follows symbolic links. `/` is the list of exports. Identity and
    /// verifier are zero.
    pub fn metadata(&self, path: impl AsRef<Path>) -> Result<FileStatus, Error> {
        status_of(&self.plain(Opcode::StatPath, path.as_ref())?)
    }

    /// The same; of a symbolic link its own.
    pub fn symlink_metadata(&self, path: impl AsRef<Path>) -> Result<FileStatus, Error> {
        let command = path_command(Opcode::StatPath, FLAG_NOFOLLOW, 0, path.as_ref(), None)?;
        status_of(&self.call_path(command, Bulk::None)?)
    }

    /// The first `length` bytes of a file, and its status, in one request. If the status has a larger size,
    /// there is more. `length` is at most [`crate::Context::io_bytes_max`].
    pub fn get(&self, path: impl AsRef<Path>, length: usize) -> Result<(Vec<u8>, FileStatus), Error> {
        let path = path_bytes(path.as_ref())?;
        let mut reply = self.fetch(PathCommand::new(Opcode::Get, path), length)?;
        let status = status_of(&reply)?;
        Ok((data_of(&mut reply)?, status))
    }

    /// Atomically creates or replaces a file with these bytes, in one request. Others see the complete new
    /// file or the old one, also after a crash of the server process. At most
    /// [`crate::Context::io_bytes_max`] bytes (EFBIG).
    pub fn put(&self, path: impl AsRef<Path>, bytes: &[u8], options: &PutOptions) -> Result<(), Error> {
        let command = options.command(path_bytes(path.as_ref())?, bytes.len());
        self.send(command, bytes, |length_max| check_put(bytes.len(), length_max))
    }

    /// The entries of a directory, in no particular order; of `/` the exports. They come page by page.
    pub fn read_dir(&self, path: impl AsRef<Path>) -> Result<ReadDir, Error> {
        let path = path_bytes(path.as_ref())?;
        let mut reply = self.fetch(PathCommand::new(Opcode::List, path), FIRST_PAGE_BYTES)?;
        let mut entries = ReadDir::new(Arc::clone(self.shared()));
        entries.take_in(&mut reply)?;
        Ok(entries)
    }

    /// Creates a directory.
    pub fn create_dir(&self, path: impl AsRef<Path>, mode: u32) -> Result<(), Error> {
        let command = path_command(Opcode::Mkdir, 0, mode, path.as_ref(), None)?;
        self.call_path(command, Bulk::None).map(drop)
    }

    /// Removes an empty directory.
    pub fn remove_dir(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.plain(Opcode::Rmdir, path.as_ref()).map(drop)
    }

    /// Removes a file, or what else is no directory.
    pub fn remove_file(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.plain(Opcode::Unlink, path.as_ref()).map(drop)
    }

    /// Renames a file or directory within its export, and replaces an existing file, as rename(2).
    pub fn rename(&self, from: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<(), Error> {
        self.on_both(Opcode::Rename, 0, from.as_ref(), to.as_ref().as_os_str())
    }

    /// The same, but fails with EEXIST if there is something already.
    pub fn rename_no_replace(&self, from: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<(), Error> {
        self.on_both(Opcode::Rename, FLAG_NO_REPLACE, from.as_ref(), to.as_ref().as_os_str())
    }

    /// Gives a file another name in its export.
    pub fn hard_link(&self, original: impl AsRef<Path>, link: impl AsRef<Path>) -> Result<(), Error> {
        self.on_both(Opcode::Link, 0, original.as_ref(), link.as_ref().as_os_str())
    }

    /// Creates a symbolic link at `link` that leads to `target`, which is kept as it is. The server follows
    /// those that stay in the export.
    pub fn symlink(&self, target: impl AsRef<OsStr>, link: impl AsRef<Path>) -> Result<(), Error> {
        self.on_both(Opcode::Symlink, 0, link.as_ref(), target.as_ref())
    }

    fn on_both(&self, opcode: Opcode, flags: u16, path: &Path, other: &OsStr) -> Result<(), Error> {
        self.call_path(path_command(opcode, flags, 0, path, Some(other))?, Bulk::None).map(drop)
    }

    /// Returns the target of a symbolic link.
    pub fn read_link(&self, path: impl AsRef<Path>) -> Result<PathBuf, Error> {
        link_of(&self.plain(Opcode::Readlink, path.as_ref())?)
    }

    /// Sets attributes of a file or directory.
    pub fn set_attributes(&self, path: impl AsRef<Path>, attributes: &Attributes) -> Result<(), Error> {
        self.call_path(attributes.command(path_bytes(path.as_ref())?), Bulk::None).map(drop)
    }

    /// Returns the space and inodes of a path's file system, as statfs(2).
    pub fn statfs(&self, path: impl AsRef<Path>) -> Result<FileSystemStatus, Error> {
        let reply = self.plain(Opcode::Statfs, path.as_ref())?;
        FileSystemStatus::decode(&reply.body).map_err(|_| protocol_error())
    }

    /// The value of an extended attribute; its name begins with `user.`.
    pub fn get_xattr(&self, path: impl AsRef<Path>, name: impl AsRef<OsStr>) -> Result<Vec<u8>, Error> {
        let command = xattr_command(Opcode::GetXattr, 0, path.as_ref(), name.as_ref())?;
        data_of(&mut self.fetch(command, XATTR_BYTES_MAX)?)
    }

    /// The names of the extended attributes that begin with `user.`.
    pub fn list_xattr(&self, path: impl AsRef<Path>) -> Result<Vec<OsString>, Error> {
        let path = path_bytes(path.as_ref())?;
        xattr_names(&mut self.fetch(PathCommand::new(Opcode::ListXattr, path), XATTR_BYTES_MAX)?)
    }

    /// Sets an extended attribute. With `exclusive` it fails with EEXIST if there is one with the name.
    pub fn set_xattr(
        &self,
        path: impl AsRef<Path>,
        name: impl AsRef<OsStr>,
        value: &[u8],
        exclusive: bool,
    ) -> Result<(), Error> {
        let flags = if exclusive { FLAG_EXCLUSIVE } else { 0 };
        let command = xattr_command(Opcode::SetXattr, flags, path.as_ref(), name.as_ref())?;
        let command = PathCommand { length: value.len() as u64, ..command };
        self.send(command, value, |length_max| check_xattr(value.len(), length_max))
    }

    /// Removes an extended attribute.
    pub fn remove_xattr(&self, path: impl AsRef<Path>, name: impl AsRef<OsStr>) -> Result<(), Error> {
        let command = xattr_command(Opcode::SetXattr, FLAG_REMOVE, path.as_ref(), name.as_ref())?;
        self.call_path(command, Bulk::None).map(drop)
    }
}

impl PutOptions {
    /// The command that puts a file of this length.
    pub(crate) fn command<'a>(&self, path: &'a [u8], length: usize) -> PathCommand<'a> {
        let mut flags = if self.exclusive { FLAG_EXCLUSIVE } else { 0 };
        flags |= if self.fsync { FLAG_FSYNC } else { 0 };
        flags |= if self.modified_ns.is_some() { FLAG_SET_TIME } else { 0 };
        PathCommand {
            flags,
            mode: self.mode & 0o7777,
            length: length as u64,
            modified_ns: self.modified_ns.unwrap_or(0),
            ..PathCommand::new(Opcode::Put, path)
        }
    }
}

impl Attributes {
    /// The command that sets them.
    pub(crate) fn command<'a>(&self, path: &'a [u8]) -> PathCommand<'a> {
        let mut flags = if self.nofollow { FLAG_NOFOLLOW } else { 0 };
        flags |= if self.mode.is_some() { FLAG_SET_MODE } else { 0 };
        flags |= if self.size.is_some() { FLAG_SET_SIZE } else { 0 };
        flags |= if self.modified_ns.is_some() { FLAG_SET_TIME } else { 0 };
        PathCommand {
            flags,
            mode: self.mode.unwrap_or(0) & 0o7777,
            length: self.size.unwrap_or(0),
            modified_ns: self.modified_ns.unwrap_or(0),
            ..PathCommand::new(Opcode::SetAttributes, path)
        }
    }
}

/// The entries of a directory: see [`Session::read_dir`] and [`crate::PathOperation::List`]. Beyond those
/// that are [`ReadDir::buffered`], the next one is waited for. Dropping it tells the server that no more are
/// wanted.
#[derive(Debug)]
pub struct ReadDir {
    session: Arc<Shared>,
    /// What the server names it by; 0: it has all been read.
    listing: u64,
    /// Which page comes next: [`FLAG_ODD_PAGE`].
    is_odd: bool,
    entries: VecDeque<DirEntry>,
}

const _: () = assert!(FLAG_ODD_PAGE == 1);

impl ReadDir {
    /// Nothing yet.
    pub(crate) fn new(session: Arc<Shared>) -> Self {
        Self { session, listing: 0, is_odd: true, entries: VecDeque::new() }
    }

    /// How many entries come without waiting for the server.
    pub fn buffered(&self) -> usize {
        self.entries.len()
    }

    /// Whether the server has no more entries than those that are here.
    pub fn is_complete(&self) -> bool {
        self.listing == 0
    }

    pub(crate) fn session(&self) -> &Arc<Shared> {
        &self.session
    }

    /// What asks for the next page, of this length.
    pub(crate) fn next_command(&self, length: usize) -> Command<'static> {
        Command::ListNext { listing: self.listing, is_odd: self.is_odd, length: length as u32 }
    }

    /// Takes in a page.
    pub(crate) fn take_in(&mut self, reply: &mut Reply) -> Result<(), Error> {
        let listing = reply.result;
        let bytes = data_of(reply)?;
        for entry in entries(&bytes) {
            let entry = entry.map_err(|_| protocol_error())?;
            self.entries.push_back(DirEntry {
                name: OsString::from_vec(entry.name.to_vec()),
                mode: entry.mode,
                size: entry.size,
                modified_ns: entry.modified_ns,
                inode: entry.inode,
                has_status: entry.has_status,
            });
        }
        let before = std::mem::replace(&mut self.listing, listing);
        if before != 0 {
            self.is_odd = !self.is_odd;
        }
        // One that has no end would be asked for ever.
        if listing != 0 && bytes.is_empty() {
            return Err(protocol_error());
        }
        if listing == 0 && before != 0 {
            self.session.close_later(end_of_listing(before));
        }
        Ok(())
    }

    fn next_page(&mut self) -> Result<(), Error> {
        let mut reply = self.session.call_sized(|length_max| {
            let length = PAGE_BYTES.min(length_max);
            Ok((self.next_command(length), room_for(length)))
        })?;
        self.take_in(&mut reply)
    }
}

impl Iterator for ReadDir {
    type Item = Result<DirEntry, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.entries.is_empty() && self.listing != 0 {
            if let Err(error) = self.next_page() {
                self.listing = 0;
                return Some(Err(error));
            }
        }
        self.entries.pop_front().map(Ok)
    }
}

impl Drop for ReadDir {
    fn drop(&mut self) {
        if self.listing != 0 && !self.session.is_inherited() {
            self.session.close_later(end_of_listing(self.listing));
        }
    }
}
