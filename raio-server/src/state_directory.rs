//! The directory that `--state` names: small text files that outlive the server's process.
//!
//! | file | what it has |
//! |---|---|
//! | `lock` | nothing; locked for a moment by servers that start ([`crate::claim`]) |
//! | `server.PID.NUMBER` | what a server exports for writing; locked as long as anything of it can happen |
//! | `verifier.NUMBER` | the write verifier of an export ([`crate::verifier`]) |
//!
//! The files may contain anything: a process that can write there is trusted no more than a client. All
//! calls may wait for the file system.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::tuning::state::{FILE_BYTES_MAX, FILES_MAX};

const ONLY_MINE: Mode = Mode::RUSR.union(Mode::WUSR);

/// See the module documentation.
#[derive(Debug)]
pub struct StateDirectory {
    path: PathBuf,
    fd: OwnedFd,
}

impl StateDirectory {
    /// Creates the directory, in one that exists, for a user with these numbers, who perhaps could not do
    /// that. If it cannot be created, opening it will say why.
    pub fn make_for((uid, gid): (u32, u32), path: &Path) -> anyhow::Result<()> {
        match rustix::fs::mkdir(path, ONLY_MINE | Mode::XUSR) {
            Ok(()) => Ok(std::os::unix::fs::lchown(path, Some(uid), Some(gid))?),
            Err(_) => Ok(()),
        }
    }

    /// Opens the directory, or creates it in one that exists. Tries whether files can be written there.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let cannot = || format!("Cannot use the state directory {}", path.display());
        match rustix::fs::mkdir(path, ONLY_MINE | Mode::XUSR) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno).with_context(cannot),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, path, flags, Mode::empty()).with_context(cannot)?;
        let this = Self { path: path.to_owned(), fd };
        let trial = format!("trial.{}", std::process::id());
        this.replace(&trial, "").and_then(|()| this.remove(&trial)).with_context(cannot)?;
        Ok(this)
    }

    /// The directory itself.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Its path.
    pub fn root(&self) -> &Path {
        &self.path
    }

    /// The path of a file in it, for messages.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Opens a regular file of it. Anything else with that name is EINVAL.
    pub fn open_file(&self, name: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, name, flags, ONLY_MINE)?;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
        if kind == FileType::RegularFile { Ok(fd) } else { Err(Errno::INVAL) }
    }

    /// The text of a file; None if there is no such file. The error names the file.
    pub fn read(&self, name: &str) -> anyhow::Result<Option<String>> {
        let cannot = || format!("Cannot read {}", self.path(name).display());
        match self.open_file(name, OFlags::RDONLY) {
            Ok(fd) => read_text(fd).with_context(cannot).map(Some),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno).with_context(cannot),
        }
    }

    /// Writes a file anew. It is the old one or the new one at any time, and durable when this returns.
    pub fn replace(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let temporary = format!("{name}.new");
        let written = (|| -> anyhow::Result<()> {
            let fd = self.open_file(&temporary, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC)?;
            let mut file = std::fs::File::from(fd);
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            rustix::fs::renameat(&self.fd, &*temporary, &self.fd, name)?;
            Ok(rustix::fs::fsync(&self.fd)?)
        })();
        written.with_context(|| format!("Cannot write {}", self.path(name).display()))
    }

    /// Removes a file, if it is there.
    pub fn remove(&self, name: &str) -> anyhow::Result<()> {
        match rustix::fs::unlinkat(&self.fd, name, rustix::fs::AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno).with_context(|| format!("Cannot remove {}", self.path(name).display())),
        }
    }

    /// The names of the files that begin with `prefix`.
    pub fn names(&self, prefix: &str) -> anyhow::Result<Vec<String>> {
        let cannot = || format!("Cannot list {}", self.path.display());
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd).with_context(cannot)? {
            let entry = entry.with_context(cannot)?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if name.starts_with(prefix) {
                names.push(name.to_owned());
            }
            ensure!(
                names.len() <= FILES_MAX,
                "{} has more than {FILES_MAX} files whose names begin with {prefix:?}. Remove them.",
                self.path.display()
            );
        }
        Ok(names)
    }
}

/// The text of a file that may be anything.
pub fn read_text(fd: OwnedFd) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    std::fs::File::from(fd).take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= FILE_BYTES_MAX, "it is longer than {FILE_BYTES_MAX} bytes");
    String::from_utf8(bytes).map_err(|_| anyhow::anyhow!("it is not text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_what_was_written_last() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        let state = StateDirectory::open(&path).unwrap();
        assert_eq!(state.read("a").unwrap(), None);
        state.replace("a", "one").unwrap();
        state.replace("a", "two").unwrap();
        assert_eq!(state.read("a").unwrap().as_deref(), Some("two"));
        assert_eq!(std::fs::read_dir(&path).unwrap().count(), 1, "a temporary file stays behind");
        state.remove("a").unwrap();
        state.remove("a").unwrap();
        assert_eq!(StateDirectory::open(&path).unwrap().names("").unwrap().len(), 2, ". and .. alone");
    }

    #[test]
    fn what_is_no_small_text_file_is_an_error_that_names_it() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDirectory::open(directory.path()).unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("long"), vec![b'a'; FILE_BYTES_MAX as usize + 1]).unwrap();
        std::fs::write(path("bytes"), [0xff]).unwrap();
        std::fs::create_dir(path("directory")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", path("link")).unwrap();
        rustix::fs::mknodat(CWD, path("fifo"), FileType::Fifo, ONLY_MINE, 0).unwrap();
        for name in ["long", "bytes", "directory", "link", "fifo"] {
            let error = format!("{:#}", state.read(name).unwrap_err());
            assert!(error.contains(&*path(name).to_string_lossy()), "{error}");
        }
    }
}
