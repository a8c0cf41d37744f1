//! Trees of this machine. Each call goes from a descriptor of the root to the directory, without following
//! links, and then to one name in it.

use std::cell::OnceCell;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FlockOperation, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, UTIME_OMIT,
    chmodat, flock, mkdirat, openat, openat2, readlinkat, renameat, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::{Access, Answer, Ended, New, Request, Tree, TreeEntry, partial_path};
use crate::failure::Failure;
use crate::location::Location;
use crate::place::{
    LocalFile, OWNER_WRITES, PartialFile, Place, open_partial, set_len, timespec, to_ns, write_sparsely,
};
use crate::tuning::SMALL_FILE_BYTES;

/// A directory of this machine.
pub struct LocalTree {
    /// Empty as long as it does not exist.
    root: OnceCell<OwnedFd>,
    root_path: PathBuf,
    location: Location,
    access: Access,
    /// The directory of the last call.
    last: Option<(PathBuf, OwnedFd)>,
    /// Requests are done at once.
    ended: VecDeque<Ended>,
}

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC);

fn mode_of(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o777)
}

fn io(error: Errno) -> io::Error {
    error.into()
}

fn open_root(path: &Path, access: &Access) -> Result<OwnedFd, Errno> {
    let nofollow = if access.is_root_followed { OFlags::empty() } else { OFlags::NOFOLLOW };
    openat(CWD, path, OFlags::PATH | DIRECTORY | nofollow, Mode::empty())
}

impl LocalTree {
    /// It may not exist yet.
    pub fn open(location: &Location, access: &Access) -> Result<Self, Failure> {
        let Location::Local(path) = location else {
            return Err(Failure::usage(format!("{location} is not of this machine.")));
        };
        let root = match open_root(path, access) {
            Ok(root) => OnceCell::from(root),
            Err(Errno::NOENT) => OnceCell::new(),
            Err(error) => return Err(Failure::io(format!("Cannot open {location}"), &io(error))),
        };
        let (location, access, root_path) = (location.clone(), access.clone(), path.clone());
        Ok(Self { root, root_path, location, access, last: None, ended: VecDeque::new() })
    }

    fn failed(&self, what: &str, path: &Path, error: Errno) -> Failure {
        Failure::io(format!("Cannot {what} {}", self.location.join(path)), &io(error))
    }

    fn root(&self) -> Result<BorrowedFd<'_>, Errno> {
        if let Some(root) = self.root.get() {
            return Ok(root.as_fd());
        }
        // Another thread may have made it.
        let root = open_root(&self.root_path, &self.access)?;
        Ok(self.root.get_or_init(|| root).as_fd())
    }

    /// A directory of the tree.
    fn open_dir(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        if self.access.follows {
            return openat(self.root()?, path, flags | DIRECTORY, Mode::empty());
        }
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        openat2(self.root()?, path, flags | DIRECTORY, Mode::empty(), beneath)
    }

    /// The directory that something is in, and its name there.
    fn parent<'p>(&mut self, path: &'p Path) -> Result<(BorrowedFd<'_>, &'p OsStr), Errno> {
        let Some(name) = path.file_name() else { return Ok((self.root()?, OsStr::new("."))) };
        let above = path.parent().unwrap_or(Path::new(""));
        if self.last.as_ref().is_none_or(|(last, _)| last != above) {
            self.last = Some((above.to_owned(), self.open_dir(above, OFlags::PATH)?));
        }
        let (_, directory) = self.last.as_ref().ok_or(Errno::NOENT)?;
        Ok((directory.as_fd(), name))
    }

    fn open_file(&mut self, path: &Path) -> Result<File, Errno> {
        let nofollow = if self.access.follows { OFlags::empty() } else { OFlags::NOFOLLOW };
        let (directory, name) = self.parent(path)?;
        // A pipe that has come into the file's place is not waited for.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | nofollow;
        openat(directory, name, flags, Mode::empty()).map(File::from)
    }

    /// Makes the partial file for a path. Only one program writes to it at a time.
    fn partial(&mut self, path: &Path, mode: u32) -> Result<TreePartial, Failure> {
        let partial = partial_path(&self.access, path);
        let location = self.location.join(&partial);
        let open = |this: &mut Self| {
            let (directory, name) = this.parent(&partial)?;
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let open = || openat(directory, name, flags, mode_of(mode | OWNER_WRITES));
            let remove = || unlinkat(directory, name, AtFlags::empty()).is_ok();
            let file = open_partial(open, |&errno| errno == Errno::ACCESS, remove);
            let directory = rustix::io::fcntl_dupfd_cloexec(directory, 3)?;
            Ok((File::from(file?), directory, name.to_owned()))
        };
        let (file, directory, name) = open(self).map_err(|error| self.failed("create", &partial, error))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Failure::new(format!("Another raio writes to {location}. Wait until it has ended, or stop it."))
        })?;
        let destination = path.file_name().unwrap_or_default().to_owned();
        let display = self.location.join(path).to_string();
        let file = LocalFile::from_file(file, display.clone());
        Ok(TreePartial { file, directory, name, destination, display, location, mode, is_published: false })
    }

    /// Creates a file with these bytes, or replaces one, or a link.
    fn put(&mut self, path: &Path, bytes: &[u8], new: &New) -> Result<(), Failure> {
        let mut partial = self.partial(path, new.mode)?;
        let write = |file: &File| {
            set_len(file, 0)?;
            write_sparsely(file, bytes, 0)?;
            set_len(file, bytes.len() as u64)?;
            if new.is_exact {
                rustix::fs::fchmod(file, mode_of(new.mode))?;
            }
            if let Some(modified_ns) = new.modified_ns {
                rustix::fs::futimens(file, &times(modified_ns))?;
            }
            if new.is_durable { file.sync_all() } else { Ok(()) }
        };
        let written = partial.file.with_file(write);
        let failed = |error| Failure::io(format!("Cannot write {}", self.location.join(path)), &error);
        let ended = written.map_err(failed).and_then(|()| partial.publish(new.is_durable));
        if ended.is_err() {
            partial.remove();
        }
        ended
    }

    /// Makes a symbolic link, or replaces a link or file.
    fn symlink(&mut self, target: &Path, path: &Path, modified_ns: Option<i64>) -> Result<(), Failure> {
        let partial = partial_path(&self.access, path);
        let partial = partial.file_name().unwrap_or_default();
        let create = |this: &mut Self| {
            let (directory, name) = this.parent(path)?;
            match symlinkat(target, directory, partial) {
                Err(Errno::EXIST) => {
                    // Of a run that was killed.
                    unlinkat(directory, partial, AtFlags::empty())?;
                    symlinkat(target, directory, partial)?;
                }
                created => created?,
            }
            if let Some(modified_ns) = modified_ns {
                utimensat(directory, partial, &times(modified_ns), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            renameat(directory, partial, directory, name)
        };
        create(self).map_err(|error| self.failed("create the link", path, error))
    }
}

fn entry_of(name: OsString, it: &Stat) -> TreeEntry {
    TreeEntry {
        name,
        mode: it.st_mode,
        size: it.st_size as u64,
        modified_ns: to_ns(it.st_mtime, it.st_mtime_nsec as i64),
        inode: it.st_ino,
    }
}

fn times(modified_ns: i64) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: timespec(modified_ns),
    }
}

impl Tree for LocalTree {
    fn location(&self, path: &Path) -> Location {
        self.location.join(path)
    }

    fn entries(&mut self, path: &Path) -> Result<Vec<TreeEntry>, Failure> {
        let list = || {
            let directory = self.open_dir(path, OFlags::RDONLY)?;
            let mut entries = Vec::new();
            for entry in Dir::read_from(&directory)? {
                let name = OsString::from_vec(entry?.file_name().to_bytes().to_vec());
                if name == "." || name == ".." {
                    continue;
                }
                match statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(status) => entries.push(entry_of(name, &status)),
                    // It was removed just now.
                    Err(Errno::NOENT) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(entries)
        };
        let mut entries = list().map_err(|error| self.failed("list", path, error))?;
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn entry(&mut self, path: &Path, follows: bool) -> Result<Option<TreeEntry>, Failure> {
        let flags = if follows { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW };
        let status = self.parent(path).and_then(|(directory, name)| statat(directory, name, flags));
        match status {
            Ok(status) => Ok(Some(entry_of(path.file_name().unwrap_or_default().to_owned(), &status))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(self.failed("examine", path, error)),
        }
    }

    fn read(&mut self, path: &Path, length: u64) -> Result<(Vec<u8>, TreeEntry), Failure> {
        let file = self.open_file(path).map_err(|error| self.failed("open", path, error))?;
        let read = || {
            let it = file.metadata()?;
            let mut bytes = Vec::with_capacity(length.min(it.len()) as usize);
            (&file).take(length).read_to_end(&mut bytes)?;
            Ok((it, bytes))
        };
        let (it, bytes) = read()
            .map_err(|error| Failure::io(format!("Cannot read {}", self.location.join(path)), &error))?;
        let entry = TreeEntry {
            name: path.file_name().unwrap_or_default().to_owned(),
            mode: it.mode(),
            // It may have become longer meanwhile.
            size: it.len().max(bytes.len() as u64),
            modified_ns: to_ns(it.mtime(), it.mtime_nsec()),
            inode: it.ino(),
        };
        Ok((bytes, entry))
    }

    fn source(&mut self, path: &Path) -> Result<Box<dyn Place>, Failure> {
        let file = self.open_file(path).map_err(|error| self.failed("open", path, error))?;
        Ok(Box::new(LocalFile::from_file(file, self.location.join(path).to_string())))
    }

    fn read_link(&mut self, path: &Path) -> Result<PathBuf, Failure> {
        let target = self.parent(path).and_then(|(directory, name)| readlinkat(directory, name, Vec::new()));
        let target = target.map_err(|error| self.failed("read the link", path, error))?;
        Ok(PathBuf::from(OsString::from_vec(target.into_bytes())))
    }

    fn begin(&mut self, path: &Path, mode: u32) -> Result<Box<dyn PartialFile>, Failure> {
        Ok(Box::new(self.partial(path, mode)?))
    }

    fn create_dir(&mut self, path: &Path, mode: u32) -> Result<bool, Failure> {
        if path.as_os_str().is_empty() {
            let made = mkdirat(CWD, &self.root_path, mode_of(mode));
            if made != Ok(()) && made != Err(Errno::EXIST) {
                return made.map(|()| true).map_err(|error| self.failed("create the directory", path, error));
            }
            self.root().map_err(|error| self.failed("open", path, error))?;
            return Ok(made.is_ok());
        }
        let made = self.parent(path).and_then(|(directory, name)| mkdirat(directory, name, mode_of(mode)));
        match made {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) if self.entry(path, false)?.is_some_and(|it| it.is_dir()) => Ok(false),
            Err(error) => Err(self.failed("create the directory", path, error)),
        }
    }

    fn set(&mut self, path: &Path, mode: Option<u32>, modified_ns: Option<i64>) -> Result<(), Failure> {
        let set = |this: &mut Self| {
            let (directory, name) = this.parent(path)?;
            // It is what was made here or listed; a link that has come into its place is not followed.
            if let Some(mode) = mode {
                let file = openat(
                    directory,
                    name,
                    OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC,
                    Mode::empty(),
                );
                match file {
                    Ok(file) => rustix::fs::fchmod(&file, mode_of(mode))?,
                    // It may not be read; only its owner can change that.
                    Err(Errno::ACCESS) => chmodat(directory, name, mode_of(mode), AtFlags::empty())?,
                    Err(error) => return Err(error),
                }
            }
            match modified_ns {
                Some(modified_ns) => {
                    utimensat(directory, name, &times(modified_ns), AtFlags::SYMLINK_NOFOLLOW)
                }
                None => Ok(()),
            }
        };
        set(self).map_err(|error| self.failed("set the attributes of", path, error))
    }

    fn remove_dir(&mut self, path: &Path) -> Result<(), Failure> {
        self.last = None;
        let removed =
            self.parent(path).and_then(|(directory, name)| unlinkat(directory, name, AtFlags::REMOVEDIR));
        removed.map_err(|error| self.failed("remove", path, error))
    }

    fn remove_file(&mut self, path: &Path) -> Result<(), Failure> {
        let removed =
            self.parent(path).and_then(|(directory, name)| unlinkat(directory, name, AtFlags::empty()));
        removed.map_err(|error| self.failed("remove", path, error))
    }

    fn start(&mut self, token: usize, request: Request) {
        let result = match request {
            Request::Read { path, .. } => {
                // Files of /proc have no size, and contents nevertheless.
                self.read(&path, SMALL_FILE_BYTES).map(|(bytes, entry)| Answer::Read(bytes, entry))
            }
            Request::Put { path, bytes, new } => self.put(&path, &bytes, &new).map(|()| Answer::Done),
            Request::CreateDir { path, mode } => {
                self.create_dir(&path, mode).map(|made| if made { Answer::Done } else { Answer::Exists })
            }
            Request::Set { path, mode, modified_ns } => {
                self.set(&path, mode, modified_ns).map(|()| Answer::Done)
            }
            Request::ReadLink { path } => self.read_link(&path).map(Answer::Link),
            Request::Symlink { path, target, modified_ns } => {
                self.symlink(&target, &path, modified_ns).map(|()| Answer::Done)
            }
            Request::Remove { path } => self.remove_file(&path).map(|()| Answer::Done),
        };
        self.ended.push_back(Ended { token, result });
    }

    fn next(&mut self) -> Result<Option<Ended>, Failure> {
        Ok(self.ended.pop_front())
    }
}

/// A file that is written beside its destination, by descriptors of their directory.
struct TreePartial {
    file: LocalFile,
    directory: OwnedFd,
    name: OsString,
    destination: OsString,
    display: String,
    location: Location,
    /// The permissions that it is to have, less the umask. Its owner may write to it until it is published.
    mode: u32,
    is_published: bool,
}

impl PartialFile for TreePartial {
    fn place(&self) -> &dyn Place {
        &self.file
    }

    fn set_skips_zeros(&mut self, skips: bool) {
        self.file.set_skips_zeros(skips);
    }

    fn location(&self, _: &Location) -> Location {
        self.location.clone()
    }

    fn publish(&mut self, durable: bool) -> Result<(), Failure> {
        let directory = &self.directory;
        let failed = |error| Failure::io(format!("Cannot write {}", self.display), &io(error));
        let ended = self.file.end_writing(self.mode);
        ended.map_err(|error| Failure::io(format!("Cannot write {}", self.display), &error))?;
        renameat(directory, &self.name, directory, &self.destination).map_err(failed)?;
        self.is_published = true;
        if durable {
            let opened = openat(directory, ".", OFlags::RDONLY | DIRECTORY, Mode::empty());
            opened.and_then(|it| rustix::fs::fsync(&it)).map_err(failed)?;
        }
        Ok(())
    }

    fn remove(&self) {
        let _ = unlinkat(&self.directory, &self.name, AtFlags::empty());
    }
}

impl Drop for TreePartial {
    fn drop(&mut self) {
        // Nothing was written: it is of no use.
        let is_empty = || self.file.with_file(|file| file.metadata().is_ok_and(|it| it.len() == 0));
        if !self.is_published && is_empty() {
            self.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tuning::ZERO_RUN_BYTES;

    fn tree(path: &Path) -> LocalTree {
        let access = Access { follows: false, is_root_followed: true, tag: "1".into() };
        LocalTree::open(&Location::Local(path.to_owned()), &access).unwrap()
    }

    const NEW: New = New { mode: 0o640, is_exact: true, modified_ns: Some(5), is_durable: false };

    #[test]
    fn nothing_is_written_through_a_link_that_leads_out() {
        let directory = tempfile::tempdir().unwrap();
        let (inside, outside) = (directory.path().join("in"), directory.path().join("out"));
        std::fs::create_dir_all(&inside).unwrap();
        std::fs::create_dir_all(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("l")).unwrap();
        std::os::unix::fs::symlink(outside.join("f"), inside.join("f")).unwrap();
        let mut tree = tree(&inside);
        assert!(tree.put(Path::new("l/f"), b"x", &NEW).is_err());
        assert!(tree.create_dir(Path::new("l"), 0o755).is_err(), "a link is no directory");
        assert!(tree.create_dir(Path::new("l/d"), 0o755).is_err());
        assert!(tree.symlink(Path::new("x"), Path::new("l/m"), None).is_err());
        tree.put(Path::new("f"), b"x", &NEW).expect("a link itself is replaced");
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
        assert_eq!(std::fs::read(inside.join("f")).unwrap(), b"x");
    }

    #[test]
    fn a_partial_file_to_which_nothing_was_written_goes_away() {
        let directory = tempfile::tempdir().unwrap();
        let mut tree = tree(directory.path());
        let count = || std::fs::read_dir(directory.path()).unwrap().count();
        let partial = tree.begin(Path::new("f"), 0o600).unwrap();
        assert_eq!(count(), 1);
        drop(partial);
        assert_eq!(count(), 0);
        let partial = tree.begin(Path::new("f"), 0o600).unwrap();
        partial.place().set_size(1).unwrap();
        drop(partial);
        assert_eq!(count(), 1, "what was written can be resumed");
        let mut partial = tree.begin(Path::new("f"), 0o600).unwrap();
        partial.place().set_size(0).unwrap();
        partial.publish(true).unwrap();
        drop(partial);
        assert!(directory.path().join("f").exists(), "an empty file is a file, too");
    }

    #[test]
    fn files_have_their_bytes_permissions_and_time_and_holes() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let mut tree = tree(directory.path());
        let mut bytes = vec![0; 10 * ZERO_RUN_BYTES];
        bytes[3] = 1;
        tree.put(Path::new("f"), &bytes, &NEW).unwrap();
        let it = std::fs::metadata(directory.path().join("f")).unwrap();
        assert_eq!((it.mode() & 0o777, it.mtime(), it.mtime_nsec()), (0o640, 0, 5));
        assert!(it.blocks() * 512 <= 2 * ZERO_RUN_BYTES as u64, "{} blocks", it.blocks());
        let (read, entry) = tree.read(Path::new("f"), 1 << 20).unwrap();
        assert!(read == bytes && entry.size == bytes.len() as u64 && entry.modified_ns == 5);
        let names: Vec<_> = tree.entries(Path::new("")).unwrap().into_iter().map(|it| it.name).collect();
        assert_eq!(names, ["f"], "and no partial file is left");
    }
}
