//! Trees of a server, by a session of their own.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use raio::{Attributes, Error, FileStatus, PutOptions, Session};

use super::{Access, New, Tree, TreeEntry, partial_tag};
use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::place::{PartialFile, Place, RemoteFile, RemotePartial, Sessions, beside};

/// A directory of a server.
pub struct RemoteTree {
    session: Arc<Session>,
    root: PathBuf,
    location: Location,
    access: Access,
    /// Permissions that the server's umask is known to leave.
    unmasked: u32,
}

impl RemoteTree {
    /// With a session of its own.
    pub fn open(global: &Global, location: &Location, access: &Access) -> Result<Self, Failure> {
        let (session, root) = Sessions::new(global).at(location)?;
        let (root, location, access) = (root.to_owned(), location.clone(), access.clone());
        Ok(Self { session, root, location, access, unmasked: 0 })
    }

    fn at(&self, path: &Path) -> PathBuf {
        if path.as_os_str().is_empty() { self.root.clone() } else { self.root.join(path) }
    }

    fn failed(&self, what: &str, path: &Path, error: &Error) -> Failure {
        Failure::remote(format!("Cannot {what} {}", self.location.join(path)), error)
    }

    /// Gives a file that was just made the permissions that the umask took from it.
    fn unmask(&mut self, at: &Path, mode: u32) -> Result<(), Error> {
        if mode & !self.unmasked == 0 {
            return Ok(());
        }
        let found = self.session.symlink_metadata(at)?.mode.get() & 0o777;
        self.unmasked |= found & mode;
        if found == mode {
            return Ok(());
        }
        self.session.set_attributes(at, &Attributes { mode: Some(mode), ..Attributes::default() })
    }
}

fn entry_of(path: &Path, status: &FileStatus) -> TreeEntry {
    TreeEntry {
        name: path.file_name().unwrap_or_default().to_owned(),
        mode: status.mode.get(),
        size: status.size.get(),
        modified_ns: status.modified_ns.get(),
        inode: status.inode.get(),
    }
}

impl Tree for RemoteTree {
    fn location(&self, path: &Path) -> Location {
        self.location.join(path)
    }

    fn entries(&mut self, path: &Path) -> Result<Vec<TreeEntry>, Failure> {
        let mut entries = Vec::new();
        let failed = |error| self.failed("list", path, &error);
        for entry in self.session.read_dir(self.at(path)).map_err(failed)? {
            let it = entry.map_err(failed)?;
            if !it.has_status {
                let what = self.location.join(path);
                return Err(Failure::usage(format!("{what} are exports. Name a directory in one.")));
            }
            let (mode, size, modified_ns, inode) = (it.mode, it.size, it.modified_ns, it.inode);
            entries.push(TreeEntry { name: it.name, mode, size, modified_ns, inode });
        }
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn entry(&mut self, path: &Path, follows: bool) -> Result<Option<TreeEntry>, Failure> {
        let at = self.at(path);
        let status = if follows { self.session.metadata(&at) } else { self.session.symlink_metadata(&at) };
        match status {
            Ok(status) => Ok(Some(entry_of(path, &status))),
            Err(error) if error.errno() == libc::ENOENT => Ok(None),
            Err(error) => Err(self.failed("examine", path, &error)),
        }
    }

    fn read(&mut self, path: &Path, length: u64) -> Result<(Vec<u8>, TreeEntry), Failure> {
        let got = self.session.get(self.at(path), length as usize);
        let (bytes, status) = got.map_err(|error| self.failed("read", path, &error))?;
        Ok((bytes, entry_of(path, &status)))
    }

    fn source(&mut self, path: &Path) -> Result<Box<dyn Place>, Failure> {
        let nofollow = if self.access.follows { 0 } else { libc::O_NOFOLLOW };
        let (session, name) = (Arc::clone(&self.session), self.location.join(path).to_string());
        let file = RemoteFile::open_in(session, &self.at(path), name, libc::O_RDONLY | nofollow, 0)?;
        Ok(Box::new(file))
    }

    fn read_link(&mut self, path: &Path) -> Result<PathBuf, Failure> {
        self.session.read_link(self.at(path)).map_err(|error| self.failed("read the link", path, &error))
    }

    fn put(&mut self, path: &Path, bytes: &[u8], new: &New) -> Result<bool, Failure> {
        let options = PutOptions {
            mode: new.mode,
            modified_ns: new.modified_ns,
            exclusive: false,
            fsync: new.is_durable,
        };
        let at = self.at(path);
        let put = self.session.put(&at, bytes, &options);
        match put.and_then(|()| if new.is_exact { self.unmask(&at, new.mode) } else { Ok(()) }) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == libc::EFBIG => Ok(false),
            Err(error) => Err(self.failed("write", path, &error)),
        }
    }

    fn begin(&mut self, path: &Path, mode: u32) -> Result<Box<dyn PartialFile>, Failure> {
        let (session, name) = (Arc::clone(&self.session), self.location.join(path).to_string());
        let tag = partial_tag(&self.access, path);
        let partial = RemotePartial::open(session, &self.at(path), name, &tag, mode)?;
        partial.place().set_size(0)?;
        Ok(Box::new(partial))
    }

    fn create_dir(&mut self, path: &Path, mode: u32) -> Result<bool, Failure> {
        match self.session.create_dir(self.at(path), mode) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == libc::EEXIST => {
                let is_followed = path.as_os_str().is_empty() && self.access.is_root_followed;
                match self.entry(path, is_followed)? {
                    Some(entry) if entry.is_dir() => Ok(false),
                    _ => Err(self.failed("create the directory", path, &error)),
                }
            }
            Err(error) => Err(self.failed("create the directory", path, &error)),
        }
    }

    fn symlink(&mut self, target: &Path, path: &Path, modified_ns: Option<i64>) -> Result<(), Failure> {
        let at = self.at(path);
        let partial = beside(&at, &format!(".partial-{}", partial_tag(&self.access, path)));
        let create = || match self.session.symlink(target, &partial) {
            Err(error) if error.errno() == libc::EEXIST => {
                // Of a run that was killed.
                self.session.remove_file(&partial)?;
                self.session.symlink(target, &partial)
            }
            created => created,
        };
        let attributes = Attributes { modified_ns, nofollow: true, ..Attributes::default() };
        create()
            .and_then(|()| match modified_ns {
                Some(_) => self.session.set_attributes(&partial, &attributes),
                None => Ok(()),
            })
            .and_then(|()| self.session.rename(&partial, &at))
            .map_err(|error| self.failed("create the link", path, &error))
    }

    fn set(&mut self, path: &Path, mode: Option<u32>, modified_ns: Option<i64>) -> Result<(), Failure> {
        let attributes = Attributes { mode, modified_ns, ..Attributes::default() };
        let set = self.session.set_attributes(self.at(path), &attributes);
        set.map_err(|error| self.failed("set the attributes of", path, &error))
    }

    fn remove_dir(&mut self, path: &Path) -> Result<(), Failure> {
        self.session.remove_dir(self.at(path)).map_err(|error| self.failed("remove", path, &error))
    }

    fn remove_file(&mut self, path: &Path) -> Result<(), Failure> {
        self.session.remove_file(self.at(path)).map_err(|error| self.failed("remove", path, &error))
    }
}
