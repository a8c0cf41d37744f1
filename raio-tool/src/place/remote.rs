//! Files of a server, by libraio: a session for each file, and a connection for each lane.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use raio::{Buffer, Buffers, Completion, Context, File, FileStatus, Operation, Session};
use raio_transport::address::Address;

use super::{Done, Facts, Io, Lane, Place, Sort};
use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;

/// An open file of a server.
#[derive(Debug)]
pub struct RemoteFile {
    session: Session,
    file: Arc<File>,
    path: PathBuf,
    name: String,
}

/// Opens a session with the server at this URL.
pub fn connect(global: &Global, url: &str) -> Result<Session, Failure> {
    let _: Address = url.parse()?;
    Session::connect(url, &global.session_options())
        .map_err(|error| Failure::remote(format!("Cannot connect to {url}"), &error))
}

impl RemoteFile {
    /// Opens a file, with the flags of open(2). `mode` is that of a file which is made.
    pub fn open(global: &Global, location: &Location, flags: i32, mode: u32) -> Result<Self, Failure> {
        let Location::Remote { server, path } = location else {
            return Err(Failure::usage(format!(
                "{location} is not on a server. Write raio://HOST[:PORT]/EXPORT/PATH, or :/EXPORT/PATH with \
                 RAIO_URL."
            )));
        };
        let url = server.clone().map_or_else(|| global.url(), Ok)?;
        let session = connect(global, &url)?;
        let file = session
            .open(path, flags, mode)
            .map_err(|error| Failure::remote(format!("Cannot open {location}"), &error))?;
        Ok(Self { session, file: Arc::new(file), path: path.clone(), name: location.to_string() })
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
    pub fn call(&self, what: &str, operation: Operation) -> Result<u64, Failure> {
        let (mut context, file) = self.context(1)?;
        let submitted = context.submit(&file, operation, 0);
        submitted.map_err(|rejected| self.failed(what, &rejected.error))?;
        loop {
            if let Some(completion) = context.next() {
                return completion.result.map_err(|error| self.failed(what, &error));
            }
            wait(&mut context, None).map_err(|error| self.failed(what, &error))?;
        }
    }

    fn failed(&self, what: &str, error: &raio::Error) -> Failure {
        Failure::remote(format!("Cannot {what} {}", self.name), error)
    }
}

/// Waits for a completion. A signal ends the wait early.
fn wait(context: &mut Context, timeout: Option<Duration>) -> Result<(), raio::Error> {
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
        let status = self.status()?;
        let mode = status.mode.get();
        Ok(Facts {
            sort: Sort::of_mode(mode),
            size: Some(status.size.get()),
            mode,
            owner: (status.uid.get(), status.gid.get()),
            times_ns: (status.accessed_ns.get(), status.modified_ns.get()),
            identity: (status.device.get(), status.inode.get()),
        })
    }

    fn lane(&self, depth: usize) -> Result<Box<dyn Lane>, Failure> {
        let (context, file) = self.context(depth)?;
        Ok(Box::new(RemoteLane { context, file, name: self.name.clone() }))
    }

    fn set_size(&self, size: u64) -> Result<(), Failure> {
        let now = self.facts()?.size.unwrap_or(0);
        if now == size {
            return Ok(());
        }
        if size == 0 {
            let emptied = self.session.open(&self.path, libc::O_WRONLY | libc::O_TRUNC, 0);
            return emptied.map(drop).map_err(|error| self.failed("empty", &error));
        }
        if now > size {
            return Err(Failure::new(format!(
                "{} has {now} bytes, and can only be made empty. Copy it anew, without --resume.",
                self.name
            )));
        }
        // A last byte makes it this long.
        let buffers = Buffers::One(Buffer::Owned(vec![0].into()));
        self.call("set the size of", Operation::Write { offset: size - 1, buffers })?;
        Ok(())
    }

    fn zero(&self, range: Range<u64>) -> Result<(), Failure> {
        let (offset, length) = (range.start, range.end - range.start);
        self.call("write zeros to", Operation::WriteZeroes { offset, length }).map(drop)
    }

    fn sync(&self) -> Result<(), Failure> {
        self.call("make durable", Operation::Fsync { data_only: false }).map(drop)
    }

    fn preserve(&self, _: &Facts) -> Result<(), Failure> {
        Err(Failure::usage(format!(
            "{} is on a server, which cannot set times and permissions. Leave out --preserve.",
            self.name
        )))
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
        let Completion { token, result, buffers, .. } = completion;
        let data = match buffers {
            Some(Buffers::One(Buffer::Owned(bytes))) => bytes.into_vec(),
            _ => Vec::new(),
        };
        let result = result.map(|length| length as usize);
        let result = result.map_err(|error| Failure::remote(format!("Cannot access {}", self.name), &error));
        Done { token: token as usize, data, result }
    }

    fn lost(&self, error: &raio::Error) -> Failure {
        Failure::remote(format!("Cannot access {}", self.name), error)
    }
}

fn buffers(data: Vec<u8>) -> Buffers {
    Buffers::One(Buffer::Owned(data.into_boxed_slice()))
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
        if let Some(completion) = self.context.next() {
            return Ok(Some(self.done(completion)));
        }
        match self.context.wait(0, usize::MAX, None) {
            Err(error) if error.errno() != libc::EINTR => return Err(self.lost(&error)),
            _ => {}
        }
        Ok(self.context.next().map(|completion| self.done(completion)))
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
