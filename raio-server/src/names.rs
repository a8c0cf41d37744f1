//! Operations on paths, by blocking system calls: for a thread of the pool.
//!
//! [`crate::lookup`] says how a path is looked up. What these need of the worker (who the client is, what it
//! may do, where its listings are) comes in a [`PathTask`] and goes back in a [`PathAnswer`].

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use raio_transport::protocol::path::PathCommand;
use raio_transport::protocol::{
    FLAG_EXCLUSIVE, FLAG_FSYNC, FLAG_NO_REPLACE, FLAG_NOFOLLOW, FLAG_REMOVE, FLAG_SET_MODE, FLAG_SET_SIZE,
    FLAG_SET_TIME, FileStatus, FileSystemStatus, Opcode,
};
use raio_transport::transport::SlotRange;
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT,
    Uid, XattrFlags,
};
use rustix::io::{Errno, retry_on_intr};
use zerocopy::IntoBytes;

use crate::audit::Audited;
use crate::cached::UsableMount;
use crate::export::{Export, Location};
use crate::listing::{Listing, remove_unfinished};
use crate::lookup::{Base, Entry};
use crate::path::last_name;
use crate::rejection::Rejection;
use crate::root::Root;
use crate::stored::Stored;
use crate::subtree::Owner;
use crate::syscalls::{openat2, proc_path, reopen, stat, stat_node};
use crate::throttle::Flow;
use crate::unfinished::unfinished_put;

/// An operation on a path that is to be carried out.
#[derive(Clone, Debug)]
pub struct PathTask {
    /// Which.
    pub opcode: Opcode,
    /// Its flags.
    pub flags: u16,
    /// As in [`PathCommand`].
    pub mode: u32,
    /// The same.
    pub length: u64,
    /// The same.
    pub modified_ns: i64,
    /// The path.
    pub at: Location,
    /// What else it names.
    pub other: Other,
    /// To whom what it creates belongs.
    pub owner: Owner,
    /// Where its client's bytes are counted, if they are limited, and how many there may be.
    pub stored: Option<(Arc<Stored>, u64)>,
    /// It waits for the holder of a lease on the file. Else it fails with EAGAIN then.
    pub waits_for_lease: bool,
    /// What it is to the audit log, if there is one.
    pub audited: Option<Arc<Audited>>,
    /// What its client has of the export, if that is limited.
    pub flow: Option<Arc<Flow>>,
    /// The number of this server, in the names of unfinished files, if it writes to the export.
    pub server: Option<u64>,
    /// What a listing that it begins is named by.
    pub listing: u64,
}

/// What a command names beside its path.
#[derive(Clone, Debug)]
pub enum Other {
    /// Nothing.
    Nothing,
    /// A path.
    Path(Location),
    /// Where a symbolic link is to lead, or an extended attribute.
    Name(CString),
}

/// What an operation has brought.
#[derive(Debug, Default)]
pub struct PathAnswer {
    /// The result in the response.
    pub result: u64,
    /// The body.
    pub body: Vec<u8>,
    /// The data.
    pub data: Option<SlotRange>,
    /// A listing that goes on. Its name is the result.
    pub listing: Option<Arc<Listing>>,
    /// The mount of what was found, if workers may use what is cached of it.
    pub mount: Option<UsableMount>,
}

impl PathAnswer {
    fn of_status(status: FileStatus) -> Self {
        Self { body: status.as_bytes().into(), ..Self::default() }
    }

    fn of_data(data: SlotRange) -> Self {
        Self { result: data.len as u64, data: Some(data), ..Self::default() }
    }
}

/// What a [`PathTask`] comes to.
pub type PathResult = Result<PathAnswer, Rejection>;

/// What the pool returns of an operation on a path: how it ended, and its memory if that was not used.
pub type PathEnd = (PathResult, Option<SlotRange>);

/// What an operation does, as a verb for messages.
pub fn verb(opcode: Opcode) -> &'static str {
    match opcode {
        Opcode::StatPath => "get the status of",
        Opcode::Get => "get",
        Opcode::Put => "put",
        Opcode::List | Opcode::ListNext => "list",
        Opcode::Mkdir => "make the directory",
        Opcode::Rmdir => "remove the directory",
        Opcode::Unlink => "remove",
        Opcode::Rename => "rename",
        Opcode::Link => "link",
        Opcode::Symlink => "make the symbolic link",
        Opcode::Readlink => "read the link",
        Opcode::SetAttributes => "set attributes of",
        Opcode::Statfs => "get the file system of",
        _ => "use the extended attributes of",
    }
}

/// Whether it creates what its path names.
pub fn creates(opcode: Opcode) -> bool {
    matches!(opcode, Opcode::Put | Opcode::Mkdir | Opcode::Symlink)
}

const READ_ONLY: OFlags = OFlags::RDONLY;

impl PathTask {
    /// The command's part of it.
    pub fn new(command: &PathCommand<'_>, at: Location, other: Other) -> Self {
        let &PathCommand { opcode, flags, mode, length, modified_ns, .. } = command;
        Self {
            opcode,
            flags,
            mode,
            length,
            modified_ns,
            at,
            other,
            owner: Owner::default(),
            stored: None,
            waits_for_lease: false,
            audited: None,
            flow: None,
            server: None,
            listing: 0,
        }
    }

    /// Carries it out; `data` is what came with it, or the room for what it brings, which stays there if it
    /// is not used. May take as long as the file system does.
    pub fn run(&self, export: &Export, data: &mut Option<SlotRange>) -> PathResult {
        let Some(root) = export.root() else { return Err(self.failed(Errno::OPNOTSUPP)) };
        let base = self.at.enter(export).map_err(|rejection| root.explain(export.name(), rejection))?;
        let answer = match self.opcode {
            Opcode::StatPath => self.status(root, export.name(), &base),
            Opcode::Get => self.get(&base, data),
            Opcode::Put => self.put(root, &base, data),
            Opcode::List => self.list(export, &base, data),
            Opcode::Mkdir => self.mkdir(&base),
            Opcode::Rmdir => self.rmdir(&base),
            Opcode::Unlink => self.unlink(&base),
            Opcode::Rename => self.rename(export, &base),
            Opcode::Link => self.link(export, &base),
            Opcode::Symlink => self.symlink(&base),
            Opcode::Readlink => self.readlink(&base),
            Opcode::SetAttributes => self.set_attributes(root, &base),
            Opcode::Statfs => self.statfs(&base),
            _ => self.xattr(&base, data),
        };
        answer.map_err(|rejection| root.explain(export.name(), rejection))
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    fn failed(&self, errno: Errno) -> Rejection {
        self.at.failed(verb(self.opcode), errno)
    }

    fn rejection(&self, errno: i32, hint: &str) -> Rejection {
        self.at.rejection(verb(self.opcode), errno, hint)
    }

    /// What the path leads to, open with O_PATH.
    fn node(&self, base: &Base) -> Result<OwnedFd, Rejection> {
        self.found(base).map(|(node, _)| node)
    }

    /// The same, and the type of its file system.
    fn found(&self, base: &Base) -> Result<(OwnedFd, libc::__fsword_t), Rejection> {
        let nofollow = if self.has(FLAG_NOFOLLOW) || self.opcode == Opcode::Readlink {
            OFlags::NOFOLLOW
        } else {
            OFlags::empty()
        };
        self.at.open(verb(self.opcode), base, OFlags::PATH | nofollow)
    }

    /// The directory of the path, and the last name in it.
    fn entry(&self, base: &Base, at_end: Errno) -> Result<Entry<'_>, Rejection> {
        let entry = self.at.entry(verb(self.opcode), base)?;
        entry.ok_or_else(|| self.failed(at_end))
    }

    fn nothing(&self, done: Result<(), Errno>) -> PathResult {
        done.map(|()| PathAnswer::default()).map_err(|errno| self.failed(errno))
    }

    // What is there
    // ----------------------------------------------------------------------------------------------------

    fn status(&self, root: &Root, name: &str, base: &Base) -> PathResult {
        let (node, file_system) = self.found(base)?;
        let mut info = stat_node(&node).map_err(|errno| self.failed(errno))?;
        // To learn how large a device is it must be open.
        if FileType::from_raw_mode(info.status.mode.get()) == FileType::BlockDevice
            && root.check(name, &node).is_ok()
            && let Ok(open) = reopen(&node, READ_ONLY)
        {
            info = stat(open).map_err(|errno| self.failed(errno))?;
        }
        let mount = UsableMount::of(&info, file_system);
        Ok(PathAnswer { mount, ..PathAnswer::of_status(info.status) })
    }

    /// Opens a regular file that was looked up.
    fn open_file(&self, node: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Rejection> {
        let kind = rustix::fs::fstat(node).map(|stat| FileType::from_raw_mode(stat.st_mode));
        match kind.map_err(|errno| self.failed(errno))? {
            FileType::RegularFile => {}
            FileType::Directory => return Err(self.failed(Errno::ISDIR)),
            FileType::Symlink => return Err(self.failed(Errno::LOOP)),
            _ => return Err(self.rejection(libc::ENODEV, "It is no regular file.")),
        }
        // The holder of a lease is asked to give it up, which may take long.
        let nonblock = if self.waits_for_lease { OFlags::empty() } else { OFlags::NONBLOCK };
        reopen(node, flags | nonblock).map_err(|errno| self.failed(errno))
    }

    fn get(&self, base: &Base, room: &mut Option<SlotRange>) -> PathResult {
        let (node, file_system) = self.found(base)?;
        let file = self.open_file(&node, READ_ONLY)?;
        // Before the data: what is newer than its time of change is read again by who compares times.
        let info = stat(&file).map_err(|errno| self.failed(errno))?;
        let read = room.take().map(|mut room| {
            let read = read_all(&file, room.bytes_mut())?;
            room.len = read;
            Ok(room)
        });
        let data = read.transpose().map_err(|errno: Errno| self.failed(errno))?;
        let result = data.as_ref().map_or(0, |data| data.len as u64);
        let mount = UsableMount::of(&info, file_system);
        Ok(PathAnswer { result, data, mount, ..PathAnswer::of_status(info.status) })
    }

    fn list(&self, export: &Export, base: &Base, room: &mut Option<SlotRange>) -> PathResult {
        let flags = READ_ONLY | OFlags::DIRECTORY;
        let (directory, _) = self.at.open(verb(self.opcode), base, flags)?;
        let (lanes, flow) = (export.lanes().clone(), self.flow.clone());
        let listing =
            Listing::new(self.listing, export.place(), flow, lanes, directory).removing_for(self.server);
        next_page(&Arc::new(listing), false, room).map_err(|errno| self.failed(errno))
    }

    fn readlink(&self, base: &Base) -> PathResult {
        let node = self.node(base)?;
        let target = rustix::fs::readlinkat(&node, c"", Vec::new()).map_err(|errno| match errno {
            // What readlinkat(2) says with an empty path.
            Errno::NOENT => self.failed(Errno::INVAL),
            errno => self.failed(errno),
        })?;
        let body = target.into_bytes();
        Ok(PathAnswer { result: body.len() as u64, body, ..PathAnswer::default() })
    }

    fn statfs(&self, base: &Base) -> PathResult {
        let node = self.node(base)?;
        let info = rustix::fs::fstatvfs(&node).map_err(|errno| self.failed(errno))?;
        let status = FileSystemStatus {
            block_bytes: info.f_frsize.into(),
            blocks: info.f_blocks.into(),
            blocks_free: info.f_bfree.into(),
            blocks_available: info.f_bavail.into(),
            files: info.f_files.into(),
            files_free: info.f_ffree.into(),
            name_bytes_max: info.f_namemax.into(),
        };
        Ok(PathAnswer { body: status.as_bytes().into(), ..PathAnswer::default() })
    }

    // Names
    // ----------------------------------------------------------------------------------------------------

    fn mkdir(&self, base: &Base) -> PathResult {
        let Entry { directory, name } = self.entry(base, Errno::EXIST)?;
        let mode = Mode::from_raw_mode(self.mode);
        rustix::fs::mkdirat(&directory, name, mode).map_err(|errno| self.failed(errno))?;
        self.give_to_owner(&directory, name, AtFlags::REMOVEDIR)
    }

    fn rmdir(&self, base: &Base) -> PathResult {
        let at_end = match last_name(self.at.path.as_bytes()) {
            Some(b"..") => Errno::NOTEMPTY,
            Some(_) => Errno::INVAL,
            None => Errno::BUSY,
        };
        let Entry { directory, name } = self.entry(base, at_end)?;
        let remove = || rustix::fs::unlinkat(&directory, name, AtFlags::REMOVEDIR);
        let removed = match remove() {
            // Clients do not see what a server that was killed has left there.
            Err(Errno::NOTEMPTY) if self.removes_unfinished(&directory, name) => remove(),
            result => result,
        };
        self.nothing(removed)
    }

    fn removes_unfinished(&self, parent: &OwnedFd, name: &CStr) -> bool {
        let Some(server) = self.server else { return false };
        let flags = READ_ONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        let directory = openat2(parent.as_fd(), name, flags, Mode::empty(), self.at.resolve);
        directory.and_then(|directory| remove_unfinished(directory, server)).unwrap_or(false)
    }

    fn unlink(&self, base: &Base) -> PathResult {
        let entry = self.entry(base, Errno::ISDIR)?;
        let before = self.stored.as_ref().and_then(|_| size_of_last_link(&entry));
        rustix::fs::unlinkat(&entry.directory, entry.name, AtFlags::empty())
            .map_err(|errno| self.failed(errno))?;
        self.freed(before);
        Ok(PathAnswer::default())
    }

    /// The last name of the other path; None if it ends without.
    fn other_entry(&self, export: &Export) -> Result<Option<Entry<'_>>, Rejection> {
        let Other::Path(other) = &self.other else { return Err(self.failed(Errno::INVAL)) };
        other.entry(verb(self.opcode), &other.enter(export)?)
    }

    fn rename(&self, export: &Export, base: &Base) -> PathResult {
        let from = self.at.entry(verb(self.opcode), base)?;
        let to = self.other_entry(export)?;
        let only_new = self.has(FLAG_NO_REPLACE);
        // In the order of rename(2).
        let from = from.ok_or_else(|| self.failed(Errno::BUSY))?;
        let to = to.ok_or_else(|| self.failed(if only_new { Errno::EXIST } else { Errno::BUSY }))?;
        let flags = if only_new { RenameFlags::NOREPLACE } else { RenameFlags::empty() };
        let before = self.stored.as_ref().and_then(|_| size_of_last_link(&to));
        rustix::fs::renameat_with(&from.directory, from.name, &to.directory, to.name, flags)
            .map_err(|errno| self.failed(errno))?;
        self.freed(before);
        Ok(PathAnswer::default())
    }

    fn link(&self, export: &Export, base: &Base) -> PathResult {
        let failed = |errno| self.failed(errno);
        let (directory, name) = match self.at.entry(verb(self.opcode), base)? {
            Some(from) if !from.has_slash() => {
                // What is not there is told before what keeps the new name from being made.
                let found = rustix::fs::statat(&from.directory, from.name, AtFlags::SYMLINK_NOFOLLOW);
                found.map_err(failed)?;
                (from.directory, from.name)
            }
            // It is a directory, of which there are no links; or something is wrong with the new name.
            _ => (self.node(base)?, c"."),
        };
        let to = self.other_entry(export)?.ok_or_else(|| failed(Errno::EXIST))?;
        let linked = rustix::fs::linkat(&directory, name, &to.directory, to.name, AtFlags::empty());
        self.nothing(linked)
    }

    fn symlink(&self, base: &Base) -> PathResult {
        let Entry { directory, name } = self.entry(base, Errno::EXIST)?;
        let Other::Name(target) = &self.other else { return Err(self.failed(Errno::INVAL)) };
        rustix::fs::symlinkat(target, &directory, name).map_err(|errno| self.failed(errno))?;
        self.give_to_owner(&directory, name, AtFlags::empty())
    }

    /// Sets the owner and the group of what was just created. If that fails it is removed.
    fn give_to_owner(&self, directory: &OwnedFd, name: &CStr, removal: AtFlags) -> PathResult {
        let Owner { uid, gid } = self.owner;
        if (uid, gid) == (None, None) {
            return Ok(PathAnswer::default());
        }
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        let given = rustix::fs::chownat(directory, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW);
        given.map(|()| PathAnswer::default()).map_err(|errno| {
            let _ = rustix::fs::unlinkat(directory, name, removal);
            self.not_given(errno)
        })
    }

    fn not_given(&self, errno: Errno) -> Rejection {
        let hint = "It cannot be given to the owner that clients.toml says: the file system does not allow \
                    that, or does not know them.";
        self.at.policy(verb(self.opcode), errno.raw_os_error(), hint)
    }

    // Whole files
    // ----------------------------------------------------------------------------------------------------

    fn put(&self, root: &Root, base: &Base, data: &mut Option<SlotRange>) -> PathResult {
        let bytes = data.as_ref().map_or(&[][..], SlotRange::bytes);
        let length = bytes.len() as u64;
        let entry = self.entry(base, Errno::ISDIR)?;
        if entry.has_slash() {
            return Err(self.failed(Errno::ISDIR));
        }
        self.check_size(root, length)?;
        let before = self.stored.as_ref().and_then(|_| size_of_last_link(&entry)).unwrap_or(0);
        self.store(before, length)?;
        let put = self.write_new(&entry, bytes).and_then(|()| {
            if self.has(FLAG_FSYNC) {
                let synced = reopen(&entry.directory, READ_ONLY | OFlags::DIRECTORY)
                    .and_then(|directory| retry_on_intr(|| rustix::fs::fsync(&directory)));
                synced.map_err(|errno| self.failed(errno))?;
            }
            Ok(PathAnswer { result: length, ..PathAnswer::default() })
        });
        if put.is_err() {
            self.change_stored(length, before);
        }
        put
    }

    /// Puts a new file at the path, complete or not at all.
    fn write_new(&self, entry: &Entry<'_>, bytes: &[u8]) -> Result<(), Rejection> {
        let failed = |errno| self.failed(errno);
        let new = self.create(entry).map_err(failed)?;
        self.fill(&new.fd, bytes)
            .and_then(|()| self.publish(entry, &new).map_err(failed))
            .inspect_err(|_| new.remove(&entry.directory))
    }

    /// A file without a name, so that nothing is left of it if the server is killed. Where the file system
    /// has no such files, or it will belong to another user and this one may not link it, it has a name.
    fn create(&self, entry: &Entry<'_>) -> Result<NewFile, Errno> {
        let mode = Mode::from_raw_mode(self.mode);
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let at = entry.directory.as_fd();
        if self.owner == Owner::default() {
            match openat2(at, c".", OFlags::TMPFILE | OFlags::WRONLY, mode, resolve) {
                Ok(fd) => return Ok(NewFile { fd, name: None }),
                Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => {}
                Err(errno) => return Err(errno),
            }
        }
        let name = self.unfinished_name();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let fd = openat2(at, &*name, flags, mode, resolve)?;
        Ok(NewFile { fd, name: Some(name) })
    }

    fn unfinished_name(&self) -> CString {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name = unfinished_put(self.server.unwrap_or_default(), NUMBER.fetch_add(1, Ordering::Relaxed));
        CString::new(name).unwrap_or_default()
    }

    fn fill(&self, fd: &OwnedFd, bytes: &[u8]) -> Result<(), Rejection> {
        let failed = |errno| self.failed(errno);
        write_all(fd, bytes).map_err(failed)?;
        let Owner { uid, gid } = self.owner;
        if (uid, gid) != (None, None) {
            rustix::fs::fchown(fd, uid.map(Uid::from_raw), gid.map(Gid::from_raw))
                .map_err(|errno| self.not_given(errno))?;
        }
        if self.has(FLAG_SET_TIME) {
            rustix::fs::futimens(fd, &times(self.modified_ns)).map_err(failed)?;
        }
        if self.has(FLAG_FSYNC) {
            retry_on_intr(|| rustix::fs::fsync(fd)).map_err(failed)?;
        }
        Ok(())
    }

    /// Gives the new file its name. A lookup finds it, or what was there before.
    fn publish(&self, entry: &Entry<'_>, new: &NewFile) -> Result<(), Errno> {
        let Entry { directory, name } = entry;
        let rename = |from: &CStr| {
            let flags = if self.has(FLAG_EXCLUSIVE) { RenameFlags::NOREPLACE } else { RenameFlags::empty() };
            rustix::fs::renameat_with(directory, from, directory, *name, flags)
        };
        if let Some(unfinished) = &new.name {
            return rename(unfinished);
        }
        let path = proc_path(&new.fd);
        let link = |to: &CStr| rustix::fs::linkat(CWD, &*path, directory, to, AtFlags::SYMLINK_FOLLOW);
        match link(name) {
            // A link does not replace what is there, and a rename needs a name to begin with.
            Err(Errno::EXIST) if !self.has(FLAG_EXCLUSIVE) => {
                let unfinished = self.unfinished_name();
                link(&unfinished)?;
                rename(&unfinished).inspect_err(|_| {
                    let _ = rustix::fs::unlinkat(directory, &*unfinished, AtFlags::empty());
                })
            }
            result => result,
        }
    }

    // Attributes
    // ----------------------------------------------------------------------------------------------------

    fn set_attributes(&self, root: &Root, base: &Base) -> PathResult {
        let node = self.node(base)?;
        let failed = |errno| self.failed(errno);
        if self.has(FLAG_SET_SIZE) {
            self.set_size(root, &node)?;
        }
        let path = proc_path(&node);
        if self.has(FLAG_SET_MODE) {
            // chmod(2) would follow it.
            let is_link = rustix::fs::fstat(&node)
                .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink);
            if is_link {
                return Err(failed(Errno::OPNOTSUPP));
            }
            let mode = Mode::from_raw_mode(self.mode);
            rustix::fs::chmodat(CWD, &*path, mode, AtFlags::empty()).map_err(failed)?;
        }
        if self.has(FLAG_SET_TIME) {
            rustix::fs::utimensat(CWD, &*path, &times(self.modified_ns), AtFlags::empty()).map_err(failed)?;
        }
        Ok(PathAnswer::default())
    }

    fn set_size(&self, root: &Root, node: &OwnedFd) -> Result<(), Rejection> {
        let failed = |errno| self.failed(errno);
        let file = self.open_file(node, OFlags::WRONLY)?;
        let stat = rustix::fs::fstat(&file).map_err(failed)?;
        let before = stat.st_size as u64;
        if self.length > before {
            self.check_size(root, self.length)?;
        }
        self.store(before, self.length)?;
        let set = retry_on_intr(|| rustix::fs::ftruncate(&file, self.length));
        match (set, &self.stored) {
            (Err(errno), _) => {
                self.change_stored(self.length, before);
                Err(failed(errno))
            }
            (Ok(()), Some((stored, _))) => {
                stored.is_now((stat.st_dev, stat.st_ino), self.length);
                Ok(())
            }
            (Ok(()), None) => Ok(()),
        }
    }

    fn xattr(&self, base: &Base, data: &mut Option<SlotRange>) -> PathResult {
        let node = self.node(base)?;
        let path = &*proc_path(&node);
        let failed = |errno| match errno {
            // An empty buffer would only ask for the length.
            Errno::RANGE => self.rejection(libc::ERANGE, "It is longer than there is room for."),
            errno => self.failed(errno),
        };
        let name = match &self.other {
            Other::Name(name) if name.to_bytes().starts_with(XATTR_CLASS) => &**name,
            Other::Nothing => c"",
            _ => {
                let hint = "Only extended attributes whose names begin with `user.` are served.";
                return Err(self.rejection(libc::EOPNOTSUPP, hint));
            }
        };
        match (self.opcode, data.take()) {
            (Opcode::SetXattr, _) if self.has(FLAG_REMOVE) => {
                rustix::fs::removexattr(path, name).map_err(failed)?;
            }
            (Opcode::SetXattr, data) => {
                let value = data.as_ref().map_or(&[][..], SlotRange::bytes);
                let flags = if self.has(FLAG_EXCLUSIVE) { XattrFlags::CREATE } else { XattrFlags::empty() };
                rustix::fs::setxattr(path, name, value, flags).map_err(failed)?;
            }
            (Opcode::GetXattr, Some(mut room)) => {
                room.len = rustix::fs::getxattr(path, name, room.bytes_mut()).map_err(failed)?;
                return Ok(PathAnswer::of_data(room));
            }
            (Opcode::ListXattr, Some(mut room)) => {
                let len = rustix::fs::listxattr(path, room.bytes_mut()).map_err(failed)?;
                room.len = keep_class(&mut room.bytes_mut()[..len]);
                return Ok(PathAnswer::of_data(room));
            }
            _ => return Err(failed(Errno::RANGE)),
        }
        Ok(PathAnswer::default())
    }

    // Limits
    // ----------------------------------------------------------------------------------------------------

    fn check_size(&self, root: &Root, size: u64) -> Result<(), Rejection> {
        match root.size_limit() {
            Some(limit) if size > limit.bytes => {
                let hint = format!("A file there may have at most {} bytes.", limit.bytes);
                Err(self.rejection(limit.errno, &hint))
            }
            _ => Ok(()),
        }
    }

    /// Counts a change of what the client stores, unless that would be too much.
    fn store(&self, before: u64, now: u64) -> Result<(), Rejection> {
        let Some((stored, bytes_max)) = &self.stored else { return Ok(()) };
        let counted = stored.replace(*bytes_max, before, now);
        counted.map_err(|full| self.rejection(libc::EDQUOT, &full.to_string()))
    }

    fn change_stored(&self, from: u64, to: u64) {
        if let Some((stored, _)) = &self.stored {
            stored.change(from, to);
        }
    }

    fn freed(&self, bytes: Option<u64>) {
        self.change_stored(bytes.unwrap_or(0), 0);
    }
}

/// The class of extended attributes that are served.
const XATTR_CLASS: &[u8] = b"user.";

/// Moves the names of the class that is served to the front. Returns their length.
fn keep_class(names: &mut [u8]) -> usize {
    let (mut kept, mut at) = (0, 0);
    while let Some(len) = names[at..].iter().position(|&byte| byte == 0) {
        let end = at + len + 1;
        if names[at..end].starts_with(XATTR_CLASS) {
            names.copy_within(at..end, kept);
            kept += end - at;
        }
        at = end;
    }
    kept
}

/// The next page of a listing, or the same again: see [`Listing::fill`].
pub fn next_page(
    listing: &Arc<Listing>,
    is_odd: bool,
    room: &mut Option<SlotRange>,
) -> Result<PathAnswer, Errno> {
    let Some(mut room) = room.take() else { return Err(Errno::INVAL) };
    let page = listing.fill(is_odd, room.bytes_mut())?;
    room.len = page.len;
    let goes_on = !page.is_last;
    if goes_on && page.len == 0 {
        return Err(Errno::INVAL);
    }
    Ok(PathAnswer {
        result: if goes_on { listing.id } else { 0 },
        listing: goes_on.then(|| Arc::clone(listing)),
        ..PathAnswer::of_data(room)
    })
}

/// A file that a put has begun.
struct NewFile {
    fd: OwnedFd,
    name: Option<CString>,
}

impl NewFile {
    fn remove(&self, directory: &OwnedFd) {
        if let Some(name) = &self.name {
            let _ = rustix::fs::unlinkat(directory, &**name, AtFlags::empty());
        }
    }
}

/// The size of a regular file that has no other name.
fn size_of_last_link(entry: &Entry<'_>) -> Option<u64> {
    let stat = rustix::fs::statat(&entry.directory, entry.name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    let is_last = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_nlink == 1;
    is_last.then_some(stat.st_size as u64)
}

/// The modification time is this, and the access time stays.
fn times(modified_ns: i64) -> Timestamps {
    let seconds = modified_ns.div_euclid(1_000_000_000);
    let nanoseconds = modified_ns.rem_euclid(1_000_000_000);
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: seconds, tv_nsec: nanoseconds as _ },
    }
}

/// Reads until the buffer is full, or the file ends.
fn read_all(fd: impl AsFd, bytes: &mut [u8]) -> Result<usize, Errno> {
    let mut done = 0;
    while done < bytes.len() {
        let read = retry_on_intr(|| rustix::io::pread(&fd, &mut bytes[done..], done as u64))?;
        if read == 0 {
            break;
        }
        done += read;
    }
    Ok(done)
}

fn write_all(fd: impl AsFd, bytes: &[u8]) -> Result<(), Errno> {
    let fd: BorrowedFd<'_> = fd.as_fd();
    let mut done = 0;
    while done < bytes.len() {
        match retry_on_intr(|| rustix::io::pwrite(fd, &bytes[done..], done as u64))? {
            0 => return Err(Errno::IO),
            written => done += written,
        }
    }
    Ok(())
}
