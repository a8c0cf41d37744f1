//! Trees of a server, by a session of their own.

use std::collections::{HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use raio::{
    Attributes, Completion, Context, Error, FileStatus, PathOperation, PutOptions, Session, SubmitOptions,
};

use super::{Access, Answer, Ended, New, Request, Tree, TreeEntry, partial_path, partial_tag};
use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::place::remote::{self, buffers, bytes_of};
use crate::place::{PartialFile, Place, RemoteFile, RemotePartial, Sessions};
use crate::tuning::REQUESTS_IN_FLIGHT;

/// A directory of a server.
pub struct RemoteTree {
    session: Arc<Session>,
    root: PathBuf,
    location: Location,
    access: Access,
    /// Permissions that the server's umask is known to leave.
    unmasked: u32,
    /// For requests. None before the first one.
    context: Option<Context>,
    /// Those in flight, by their tokens: the path, and what is waited for.
    requests: HashMap<usize, (PathBuf, Step)>,
    ended: VecDeque<Ended>,
}

impl RemoteTree {
    /// With a session of its own.
    pub fn open(global: &Global, location: &Location, access: &Access) -> Result<Self, Failure> {
        let (session, root) = Sessions::new(global).at(location)?;
        let (root, location, access) = (root.to_owned(), location.clone(), access.clone());
        Ok(Self {
            session,
            root,
            location,
            access,
            unmasked: 0,
            context: None,
            requests: HashMap::new(),
            ended: VecDeque::new(),
        })
    }

    fn at(&self, path: &Path) -> PathBuf {
        if path.as_os_str().is_empty() { self.root.clone() } else { self.root.join(path) }
    }

    /// The path of the partial file or link for a path.
    fn partial(&self, path: &Path) -> PathBuf {
        self.at(&partial_path(&self.access, path))
    }

    fn symlink(&self, path: &Path, target: &Path) -> PathOperation {
        PathOperation::Symlink { target: target.to_owned(), link: self.partial(path) }
    }

    fn lost(&self, error: &Error) -> Failure {
        Failure::remote(format!("Cannot access {}", self.location), error)
    }

    fn failed(&self, what: &str, path: &Path, error: &Error) -> Failure {
        Failure::remote(format!("Cannot {what} {}", self.location.join(path)), error)
    }

    /// A directory was to be made where there is something.
    fn check_dir(&mut self, path: &Path, error: &Error) -> Result<(), Failure> {
        let is_followed = path.as_os_str().is_empty() && self.access.is_root_followed;
        match self.entry(path, is_followed)? {
            Some(entry) if entry.is_dir() => Ok(()),
            _ => Err(self.failed("create the directory", path, error)),
        }
    }

    fn context(&mut self) -> Result<&mut Context, Error> {
        match &mut self.context {
            Some(context) => Ok(context),
            none => Ok(none.insert(self.session.context(REQUESTS_IN_FLIGHT)?)),
        }
    }

    /// Sends a step of a request.
    fn submit(&mut self, token: usize, path: PathBuf, step: Step, operation: PathOperation) {
        let submitted = self.context().and_then(|context| {
            let submitted = context.submit_path(operation, SubmitOptions::default(), token as u64);
            submitted.map(drop).map_err(|rejected| rejected.error)
        });
        match submitted {
            Ok(()) => drop(self.requests.insert(token, (path, step))),
            Err(error) => {
                let result = self.over(&path, step, &error);
                self.ended.push_back(Ended { token, result });
            }
        }
    }

    /// What a step that has failed means for its request.
    fn over(&mut self, path: &Path, step: Step, error: &Error) -> Result<Answer, Failure> {
        match (step, error.errno()) {
            (Step::Put(_), libc::EFBIG) => Ok(Answer::TooLarge),
            (Step::CreateDir, libc::EEXIST) => self.check_dir(path, error).map(|()| Answer::Exists),
            (step, _) => Err(self.failed(step.what(), path, error)),
        }
    }

    /// A step has ended. Returns the end of its request, unless there is another step.
    fn take_in(&mut self, completion: Completion) -> Option<Ended> {
        let Completion { token, result, buffers, answer, .. } = completion;
        let token = token as usize;
        let (path, mut step) = self.requests.remove(&token)?;
        let length = match (result, step) {
            (Ok(length), done) => {
                step = done;
                length
            }
            (Err(error), Step::Symlink(link)) if error.errno() == libc::EEXIST && !link.is_second => {
                let operation = PathOperation::Unlink { path: self.partial(&path) };
                self.submit(token, path, Step::Clear(link), operation);
                return None;
            }
            (Err(error), step) => return Some(Ended { token, result: self.over(&path, step, &error) }),
        };
        let (status, target) = match answer.map(|answer| *answer) {
            Some(raio::Answer::Status(status)) => (Some(status), None),
            Some(raio::Answer::Link(target)) => (None, Some(target)),
            _ => (None, None),
        };
        match (step, status) {
            (Step::Read, Some(status)) => {
                let mut bytes = bytes_of(buffers);
                bytes.truncate(length as usize);
                return Some(Ended { token, result: Ok(Answer::Read(bytes, entry_of(&path, &status))) });
            }
            (Step::Put(new), _) if new.is_exact && new.mode & !self.unmasked != 0 => {
                let operation = PathOperation::Stat { path: self.at(&path), nofollow: true };
                self.submit(token, path, Step::Examine(new.mode), operation);
            }
            (Step::Examine(mode), Some(status)) if status.mode.get() & 0o777 != mode => {
                self.unmasked |= status.mode.get() & mode;
                let attributes = Attributes { mode: Some(mode), ..Attributes::default() };
                let operation = PathOperation::SetAttributes { path: self.at(&path), attributes };
                self.submit(token, path, Step::Unmask, operation);
            }
            (Step::Examine(mode), _) => {
                self.unmasked |= mode;
                return Some(Ended { token, result: Ok(Answer::Done) });
            }
            (Step::Clear(link), _) => {
                let operation = self.symlink(&path, &link.target);
                self.submit(
                    token,
                    path,
                    Step::Symlink(Box::new(NewLink { is_second: true, ..*link })),
                    operation,
                );
            }
            (Step::Symlink(link), _) if link.modified_ns.is_some() => {
                let attributes =
                    Attributes { modified_ns: link.modified_ns, nofollow: true, ..Attributes::default() };
                let operation = PathOperation::SetAttributes { path: self.partial(&path), attributes };
                self.submit(token, path, Step::SetTime, operation);
            }
            (Step::Symlink(_) | Step::SetTime, _) => {
                let (from, to) = (self.partial(&path), self.at(&path));
                self.submit(token, path, Step::Rename, PathOperation::Rename { from, to, no_replace: false });
            }
            (Step::ReadLink, _) => {
                return Some(Ended { token, result: Ok(Answer::Link(target.unwrap_or_default())) });
            }
            _ => return Some(Ended { token, result: Ok(Answer::Done) }),
        }
        None
    }
}

/// A symbolic link to create.
#[derive(Debug)]
struct NewLink {
    target: PathBuf,
    modified_ns: Option<i64>,
    /// The partial link of a killed run was removed: this is the second attempt.
    is_second: bool,
}

/// What a request waits for.
#[derive(Debug)]
enum Step {
    Read,
    Put(New),
    /// It was put, and perhaps the umask has taken some of these permissions.
    Examine(u32),
    /// The umask has taken some.
    Unmask,
    CreateDir,
    Set,
    ReadLink,
    /// The partial link is created.
    Symlink(Box<NewLink>),
    /// The partial link of a killed run is removed.
    Clear(Box<NewLink>),
    /// The modification time of the partial link is set.
    SetTime,
    /// The partial link is renamed to its destination.
    Rename,
    Remove,
}

impl Step {
    fn what(&self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Put(_) | Self::Examine(_) | Self::Unmask => "write",
            Self::CreateDir => "create the directory",
            Self::Set => "set the attributes of",
            Self::ReadLink => "read the link",
            Self::Symlink(_) | Self::Clear(_) | Self::SetTime | Self::Rename => "create the link",
            Self::Remove => "remove",
        }
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

    fn begin(&mut self, path: &Path, mode: u32) -> Result<Box<dyn PartialFile>, Failure> {
        let (session, name) = (Arc::clone(&self.session), self.location.join(path).to_string());
        let tag = partial_tag(&self.access, path);
        let partial = RemotePartial::open(session, &self.at(path), name, &tag, mode)?;
        Ok(Box::new(partial))
    }

    fn create_dir(&mut self, path: &Path, mode: u32) -> Result<bool, Failure> {
        match self.session.create_dir(self.at(path), mode) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == libc::EEXIST => self.check_dir(path, &error).map(|()| false),
            Err(error) => Err(self.failed("create the directory", path, &error)),
        }
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

    fn start(&mut self, token: usize, request: Request) {
        let (path, step, operation) = match request {
            Request::Read { path, length } => {
                let operation =
                    PathOperation::Get { path: self.at(&path), buffers: buffers(vec![0; length as usize]) };
                (path, Step::Read, operation)
            }
            Request::Put { path, bytes, new } => {
                let options = PutOptions {
                    mode: new.mode,
                    modified_ns: new.modified_ns,
                    exclusive: false,
                    fsync: new.is_durable,
                };
                let operation = PathOperation::Put { path: self.at(&path), buffers: buffers(bytes), options };
                (path, Step::Put(new), operation)
            }
            Request::CreateDir { path, mode } => {
                let operation = PathOperation::Mkdir { path: self.at(&path), mode };
                (path, Step::CreateDir, operation)
            }
            Request::Set { path, mode, modified_ns } => {
                let attributes = Attributes { mode, modified_ns, ..Attributes::default() };
                let operation = PathOperation::SetAttributes { path: self.at(&path), attributes };
                (path, Step::Set, operation)
            }
            Request::ReadLink { path } => {
                let operation = PathOperation::Readlink { path: self.at(&path) };
                (path, Step::ReadLink, operation)
            }
            Request::Symlink { path, target, modified_ns } => {
                let operation = self.symlink(&path, &target);
                (path, Step::Symlink(Box::new(NewLink { target, modified_ns, is_second: false })), operation)
            }
            Request::Remove { path } => {
                let operation = PathOperation::Unlink { path: self.at(&path) };
                (path, Step::Remove, operation)
            }
        };
        self.submit(token, path, step, operation);
    }

    fn next(&mut self) -> Result<Option<Ended>, Failure> {
        loop {
            if let Some(ended) = self.ended.pop_front() {
                return Ok(Some(ended));
            }
            let Some(context) = self.context.as_mut().filter(|_| !self.requests.is_empty()) else {
                return Ok(None);
            };
            let Some(completion) = remote::poll(context).map_err(|error| self.lost(&error))? else {
                return Ok(None);
            };
            if let Some(ended) = self.take_in(completion) {
                return Ok(Some(ended));
            }
        }
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), Failure> {
        let Some(context) = &mut self.context else { return Ok(()) };
        remote::wait(context, Some(timeout)).map_err(|error| self.lost(&error))
    }

    fn poll_fd(&mut self) -> Result<Option<BorrowedFd<'_>>, Failure> {
        let location = &self.location;
        let Some(context) = &mut self.context else { return Ok(None) };
        let fd = context.poll_fd();
        fd.map(Some).map_err(|error| Failure::remote(format!("Cannot wait for {location}"), &error))
    }
}
