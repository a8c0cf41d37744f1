//! Files of a server, by libraio: a session for each command or thread, and a connection for each lane.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use raio::{
    Answer, Attributes, Buffer, Buffers, Checksum, ChecksumAlgorithm, Completion, Context, File, FileStatus,
    Operation, Session,
};
use raio_transport::Class;
use raio_transport::address::Address;
use raio_transport::sync::lock;

use super::local::beside;
use super::{Done, Facts, Io, Lane, OWNER_WRITES, PartialFile, Place, Sort, open_partial};
use crate::failure::Failure;
use crate::global::Global;
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::tuning::{SMALL_FILE_BYTES, STOP_CHECK_INTERVAL};

/// Sessions with servers, one for each URL. Their calls go one at a time: a thread that is not to wait for
/// others has its own.
pub struct Sessions<'a> {
    global: &'a Global,
    /// By their URLs; or why there is none.
    sessions: Mutex<HashMap<String, Result<Arc<Session>, Failure>>>,
}

impl<'a> Sessions<'a> {
    /// None yet.
    pub fn new(global: &'a Global) -> Self {
        Self { global, sessions: Mutex::default() }
    }

    /// The options of all commands.
    pub fn global(&self) -> &Global {
        self.global
    }

    /// The session for what is on a server, and its path there.
    pub fn at<'l>(&self, location: &'l Location) -> Result<(Arc<Session>, &'l Path), Failure> {
        let (url, path) = on_server(self.global, location)?;
        let mut sessions = lock(&self.sessions);
        let session = sessions.entry(url).or_insert_with_key(|url| {
            // Others may be on another server.
            connect(self.global, url).map(Arc::new).map_err(Failure::of_one)
        });
        Ok((session.clone()?, path))
    }
}

impl Sessions<'_> {
    /// Whether both are on the same server, by its URL.
    pub fn is_same_server(&self, one: &Location, other: &Location) -> Result<bool, Failure> {
        Ok(on_server(self.global, one)?.0 == on_server(self.global, other)?.0)
    }

    /// Fails unless both are on the same server. `advice` says what to do then.
    pub fn check_same_server(&self, one: &Location, other: &Location, advice: &str) -> Result<(), Failure> {
        if self.is_same_server(one, other)? {
            return Ok(());
        }
        Err(Failure::usage(format!("{one} and {other} are on different servers. {advice}")))
    }

    /// Whether it is a directory. What does not exist on a server is none, unless its name ends with a slash.
    pub fn is_directory(&self, location: &Location) -> Result<bool, Failure> {
        match location {
            Location::Local(path) => return Ok(path.is_dir()),
            Location::Stream | Location::Null => return Ok(false),
            Location::Remote { .. } => {}
        }
        let (session, path) = self.at(location)?;
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Ok(true);
        }
        match session.metadata(path) {
            Ok(status) => Ok(status.mode.get() & libc::S_IFMT == libc::S_IFDIR),
            // Of a server of before 0.3, which has no names, a slash must tell.
            Err(error) if matches!(error.errno(), libc::ENOENT | libc::EOPNOTSUPP) => Ok(false),
            Err(error) => Err(Failure::remote(format!("Cannot examine {location}"), &error)),
        }
    }
}

/// The URL of the server that a location is on, and its path there.
fn on_server<'l>(global: &Global, location: &'l Location) -> Result<(String, &'l Path), Failure> {
    let Location::Remote { server, path } = location else {
        return Err(Failure::usage(format!(
            "{location} is not on a server. Write raio://HOST[:PORT]/EXPORT/PATH, or :/EXPORT/PATH with \
             RAIO_URL."
        )));
    };
    Ok((server.clone().map_or_else(|| global.url(), Ok)?, path))
}

/// An open file of a server.
#[derive(Debug)]
pub struct RemoteFile {
    session: Arc<Session>,
    file: Arc<File>,
    path: PathBuf,
    name: String,
    /// Does single calls, one at a time. None before the first one, and after its connection was lost.
    caller: Mutex<Option<Context>>,
    /// Which parts have data, as far as the server was asked.
    extents: Mutex<Extents>,
}

/// The parts of a range that have data, in order.
#[derive(Debug, Default)]
struct Extents {
    range: Range<u64>,
    data: Vec<Range<u64>>,
}

impl Extents {
    /// As a server has sent them. What is outside of the range counts for nothing.
    fn new(range: Range<u64>, extents: &[(u64, u64)]) -> Self {
        let cut = |&(begin, length): &(u64, u64)| {
            begin.max(range.start)..begin.saturating_add(length).min(range.end)
        };
        let data = extents.iter().map(cut).filter(|part| part.start < part.end).collect();
        Self { range, data }
    }

    /// The first part with data at or behind `from`.
    fn next(&self, from: u64) -> Option<Range<u64>> {
        let part = self.data.iter().find(|part| part.end > from)?;
        Some(part.start.max(from)..part.end)
    }
}

/// Opens a session with the server at this URL.
pub fn connect(global: &Global, url: &str) -> Result<Session, Failure> {
    let _: Address = url.parse()?;
    Session::connect(url, &global.session_options())
        .map_err(|error| Failure::remote(format!("Cannot connect to {url}"), &error))
}

/// What is known of a file by its status.
pub fn facts_of(status: &FileStatus) -> Facts {
    let mode = status.mode.get();
    Facts {
        sort: Sort::of_mode(mode),
        size: Some(status.size.get()),
        mode,
        owner: (status.uid.get(), status.gid.get()),
        times_ns: (status.accessed_ns.get(), status.modified_ns.get()),
        identity: (status.device.get(), status.inode.get()),
    }
}

impl RemoteFile {
    /// Opens a file, with the flags of open(2). `mode` is that of a file which is made.
    pub fn open(global: &Global, location: &Location, flags: i32, mode: u32) -> Result<Self, Failure> {
        let (url, path) = on_server(global, location)?;
        Self::open_in(Arc::new(connect(global, &url)?), path, location.to_string(), flags, mode)
    }

    /// The same in a session. `name` is what the user calls it.
    pub fn open_in(
        session: Arc<Session>,
        path: &Path,
        name: String,
        flags: i32,
        mode: u32,
    ) -> Result<Self, Failure> {
        let file = session
            .open(path, flags, mode)
            .map_err(|error| Failure::remote(format!("Cannot open {name}"), &error))?;
        Ok(Self::new(session, path, name, file))
    }

    fn new(session: Arc<Session>, path: &Path, name: String, file: File) -> Self {
        Self {
            session,
            file: Arc::new(file),
            path: path.to_owned(),
            name,
            caller: Mutex::default(),
            extents: Mutex::default(),
        }
    }

    /// Its status as the server has it.
    pub fn status(&self) -> Result<FileStatus, Failure> {
        self.file.status().map_err(|error| self.failed("examine", &error))
    }

    /// A context of its session, and the file for it.
    pub fn context(&self, depth: usize) -> Result<(Context, Arc<File>), Failure> {
        let context = self.session.context(depth);
        let context = context.map_err(|error| self.failed("open another connection for", &error))?;
        Ok((context, Arc::clone(&self.file)))
    }

    /// Has the server do one operation, and waits for its end.
    pub fn call(&self, what: &str, operation: Operation) -> Result<Option<Box<Answer>>, Failure> {
        let completion = self.complete(what, operation, None)?;
        completion.result.map_err(|error| self.failed(what, &error))?;
        Ok(completion.answer)
    }

    /// The same for one that may take long: Ctrl-C ends the wait. The next call has the same connection,
    /// unless it is lost.
    fn complete(
        &self,
        what: &str,
        operation: Operation,
        interrupt: Option<&Interrupt>,
    ) -> Result<Completion, Failure> {
        let kept = lock(&self.caller).take();
        let mut context = match kept {
            Some(context) => context,
            None => self.context(1)?.0,
        };
        let submitted = context.submit(&self.file, operation, 0);
        submitted.map_err(|rejected| self.failed(what, &rejected.error))?;
        loop {
            if let Some(completion) = context.next() {
                let is_lost = |error: &raio::Error| error.status.class == Class::Transport;
                if !completion.result.as_ref().is_err_and(is_lost) {
                    *lock(&self.caller) = Some(context);
                }
                return Ok(completion);
            }
            interrupt.map_or(Ok(()), Interrupt::check)?;
            let timeout = interrupt.map(|_| STOP_CHECK_INTERVAL);
            wait(&mut context, timeout).map_err(|error| self.failed(what, &error))?;
        }
    }

    fn failed(&self, what: &str, error: &raio::Error) -> Failure {
        Failure::remote(format!("Cannot {what} {}", self.name), error)
    }
}

/// The next completion, if there is one. Does not wait.
pub fn poll(context: &mut Context) -> Result<Option<Completion>, raio::Error> {
    if let Some(completion) = context.next() {
        return Ok(Some(completion));
    }
    match context.wait(0, usize::MAX, None) {
        Err(error) if error.errno() != libc::EINTR => Err(error),
        _ => Ok(context.next()),
    }
}

/// Waits for a completion. A signal ends the wait early.
pub fn wait(context: &mut Context, timeout: Option<Duration>) -> Result<(), raio::Error> {
    match context.wait(1, usize::MAX, timeout) {
        Err(error) if error.errno() == libc::EINTR => Ok(()),
        waited => waited.map(drop),
    }
}

impl Place for RemoteFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn facts(&self) -> Result<Facts, Failure> {
        self.status().map(|status| facts_of(&status))
    }

    fn lane(&self, depth: usize) -> Result<Box<dyn Lane>, Failure> {
        let (context, file) = self.context(depth)?;
        Ok(Box::new(RemoteLane { context, file, name: self.name.clone() }))
    }

    fn next_data(&self, from: u64, size: u64) -> Result<Option<Range<u64>>, Failure> {
        // What may have no holes is not worth a request.
        if from >= size || size <= SMALL_FILE_BYTES {
            return Ok((from < size).then_some(from..size));
        }
        let mut known = lock(&self.extents);
        let mut at = from;
        while at < size {
            if !known.range.contains(&at) {
                let operation = Operation::Extents { offset: at, length: size - at };
                let answer = match self.call("find the holes of", operation) {
                    Err(failure) if failure.is_final() => return Err(failure),
                    answered => answered.ok().flatten(),
                };
                *known = match answer.map(|answer| *answer) {
                    Some(Answer::Extents { extents, end }) if end > at => {
                        Extents::new(at..end.min(size), &extents)
                    }
                    // A server of before 0.3, or something that has no holes: all of it may have data.
                    _ => Extents::new(at..size, &[(at, size - at)]),
                };
            }
            match known.next(at) {
                Some(data) => return Ok(Some(data)),
                None => at = known.range.end,
            }
        }
        Ok(None)
    }

    fn checksum(
        &self,
        algorithm: ChecksumAlgorithm,
        interrupt: &Interrupt,
    ) -> Result<Option<(Checksum, u64)>, Failure> {
        let operation = Operation::Checksum { offset: 0, length: i64::MAX as u64, algorithm };
        let Completion { result, answer, .. } = self.complete("read", operation, Some(interrupt))?;
        match (result, answer.map(|answer| *answer)) {
            (Ok(bytes), Some(Answer::Checksum(checksum))) => Ok(Some((checksum, bytes))),
            (Err(error), _) if error.errno() != libc::EOPNOTSUPP => Err(self.failed("read", &error)),
            // The server is too old, or the export is no file.
            _ => Ok(None),
        }
    }

    fn as_remote(&self) -> Option<&RemoteFile> {
        Some(self)
    }

    fn copy_within(
        &self,
        source: &dyn Place,
        range: Range<u64>,
        interrupt: &Interrupt,
    ) -> Result<Option<u64>, Failure> {
        let source = source.as_remote().filter(|source| Arc::ptr_eq(&source.session, &self.session));
        let Some(source) = source else { return Ok(None) };
        let operation = Operation::Copy {
            offset: range.start,
            source: source.file.as_source(),
            source_offset: range.start,
            length: range.end - range.start,
        };
        match self.complete("copy to", operation, Some(interrupt))?.result {
            Ok(bytes) => Ok(Some(bytes)),
            // As above.
            Err(error) if error.errno() == libc::EOPNOTSUPP => Ok(None),
            Err(error) => Err(self.failed("copy to", &error)),
        }
    }

    fn set_size(&self, size: u64) -> Result<(), Failure> {
        let now = self.facts()?.size.unwrap_or(0);
        if now == size {
            return Ok(());
        }
        if size == 0 {
            // Servers of before 0.3 can do this, too.
            let emptied = self.session.open(&self.path, libc::O_WRONLY | libc::O_TRUNC, 0);
            return emptied.map(drop).map_err(|error| self.failed("empty", &error));
        }
        let attributes = Attributes { size: Some(size), ..Attributes::default() };
        let set = self.session.set_attributes(&self.path, &attributes);
        set.map_err(|error| self.failed("set the size of", &error))
    }

    fn zero(&self, range: Range<u64>) -> Result<(), Failure> {
        let (offset, length) = (range.start, range.end - range.start);
        self.call("write zeros to", Operation::WriteZeroes { offset, length }).map(drop)
    }

    fn sync(&self) -> Result<(), Failure> {
        self.call("make durable", Operation::Fsync { data_only: false }).map(drop)
    }

    fn preserve(&self, facts: &Facts) -> Result<(), Failure> {
        let (mode, modified_ns) = (Some(facts.mode & 0o777), Some(facts.times_ns.1));
        let attributes = Attributes { mode, modified_ns, ..Attributes::default() };
        let set = self.session.set_attributes(&self.path, &attributes);
        set.map_err(|error| self.failed("preserve attributes of", &error))
    }
}

/// A file of a server that is written beside its destination.
#[derive(Debug)]
pub struct RemotePartial {
    file: RemoteFile,
    destination: PathBuf,
    /// The permissions that it is to have, less the server's umask.
    mode: u32,
    is_published: bool,
}

impl RemotePartial {
    /// Creates it, or opens the one that is there. Its name says what it is a copy of (`tag`), so that the
    /// same copy finds it again. `name` is what the user calls the destination.
    pub fn open(
        session: Arc<Session>,
        destination: &Path,
        name: String,
        tag: &str,
        mode: u32,
    ) -> Result<Self, Failure> {
        let path = beside(destination, &format!(".partial-{tag}"));
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_NOFOLLOW;
        let open = || session.open(&path, flags, mode | OWNER_WRITES);
        let is_denied = |error: &raio::Error| error.errno() == libc::EACCES;
        let opened = open_partial(open, is_denied, || session.remove_file(&path).is_ok());
        let file = opened.map_err(|error| Failure::remote(format!("Cannot open {name}"), &error))?;
        let file = RemoteFile::new(session, &path, name, file);
        Ok(Self { file, destination: destination.to_owned(), mode, is_published: false })
    }
}

impl PartialFile for RemotePartial {
    fn place(&self) -> &dyn Place {
        &self.file
    }

    fn location(&self, to: &Location) -> Location {
        let server = if let Location::Remote { server, .. } = to { server.clone() } else { None };
        Location::Remote { server, path: self.file.path.clone() }
    }

    fn publish(&mut self, durable: bool) -> Result<(), Failure> {
        if self.mode & OWNER_WRITES == 0 {
            let mode = Some(self.file.facts()?.mode & self.mode);
            let attributes = Attributes { mode, ..Attributes::default() };
            let set = self.file.session.set_attributes(&self.file.path, &attributes);
            set.map_err(|error| self.file.failed("set the permissions of", &error))?;
        }
        let renamed = self.file.session.rename(&self.file.path, &self.destination);
        renamed.map_err(|error| self.file.failed("rename the partial file of", &error))?;
        self.is_published = true;
        // The file systems that servers are for write the new name to their journal with the file.
        if durable { self.file.sync() } else { Ok(()) }
    }

    fn remove(&self) {
        let _ = self.file.session.remove_file(&self.file.path);
    }
}

impl Drop for RemotePartial {
    fn drop(&mut self) {
        // Nothing was written: it is of no use.
        if !self.is_published && self.file.status().is_ok_and(|it| it.size.get() == 0) {
            self.remove();
        }
    }
}

/// A connection with requests in flight.
struct RemoteLane {
    context: Context,
    file: Arc<File>,
    name: String,
}

impl RemoteLane {
    fn submit(&mut self, what: &str, operation: Operation, token: usize) -> Result<(), Failure> {
        let submitted = self.context.submit(&self.file, operation, token as u64);
        submitted
            .map(drop)
            .map_err(|rejected| Failure::remote(format!("Cannot {what} {}", self.name), &rejected.error))
    }

    fn done(&self, completion: Completion) -> Done {
        let Completion { token, result, buffers: data, .. } = completion;
        let data = bytes_of(data);
        let result = result.map(|length| length as usize);
        let result = result.map_err(|error| Failure::remote(format!("Cannot access {}", self.name), &error));
        Done { token: token as usize, data, result }
    }

    fn lost(&self, error: &raio::Error) -> Failure {
        Failure::remote(format!("Cannot access {}", self.name), error)
    }
}

/// Memory of a request.
pub fn buffers(data: Vec<u8>) -> Buffers {
    Buffers::One(Buffer::Owned(data.into_boxed_slice()))
}

/// The same memory when the request has ended.
pub fn bytes_of(buffers: Option<Buffers>) -> Vec<u8> {
    match buffers {
        Some(Buffers::One(Buffer::Owned(bytes))) => bytes.into_vec(),
        _ => Vec::new(),
    }
}

impl Lane for RemoteLane {
    fn read(&mut self, io: Io) -> Result<(), Failure> {
        let read = Operation::Read { offset: io.offset, buffers: buffers(io.data) };
        self.submit("read", read, io.token)
    }

    fn write(&mut self, io: Io) -> Result<(), Failure> {
        let write = Operation::Write { offset: io.offset, buffers: buffers(io.data) };
        self.submit("write to", write, io.token)
    }

    fn next(&mut self) -> Result<Option<Done>, Failure> {
        let next = poll(&mut self.context).map_err(|error| self.lost(&error))?;
        Ok(next.map(|completion| self.done(completion)))
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), Failure> {
        wait(&mut self.context, Some(timeout)).map_err(|error| self.lost(&error))
    }

    fn poll_fd(&mut self) -> Result<Option<BorrowedFd<'_>>, Failure> {
        let name = &self.name;
        let fd = self.context.poll_fd();
        fd.map(Some).map_err(|error| Failure::remote(format!("Cannot wait for {name}"), &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_with_data_are_within_the_range_whatever_a_server_says() {
        let extents = Extents::new(10..50, &[(0, 12), (20, 5), (30, 0), (45, u64::MAX), (60, 1)]);
        assert_eq!(extents.data, [10..12, 20..25, 45..50]);
        assert_eq!(extents.next(10), Some(10..12));
        assert_eq!(extents.next(12), Some(20..25));
        assert_eq!(extents.next(22), Some(22..25));
        assert_eq!(extents.next(50), None);
    }
}
