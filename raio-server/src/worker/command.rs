//! What the commands mean: from raio's protocol to work for the backend.
//!
//! Everything a client says is checked here. What it cannot know (a file that is not there, a range that is not aligned) is that
//! request's failure, with a sentence; what only a broken client says ends the connection.

use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;

use raio_transport::protocol::{Command, FileHandle};
use raio_transport::transport::{self, Response};
use raio_transport::{Status, Violation};
use rustix::fs::OFlags;

use super::Worker;
use crate::backend::{Completion, FileInfo, Handle, Outcome};
use crate::export::{Refusal, Shown, Target};
use crate::request::{
    Opening, Range, Read, Work, WorkerFile, Write, Zero, failure, status_of, storage_failure, success,
};
use crate::session::{Access, FileKind, OpenFile};

/// How often an open is tried again when the kernel cannot tell whether a rename led it out of the export.
const RETRIES_MAX: u32 = 32;
/// The alignment for O_DIRECT where nobody says what it is: enough for every disk.
const DIRECT_ALIGN_DEFAULT: u32 = 4096;

/// What becomes of a command at first.
enum First {
    Work(Work),
    Answer(Response),
}

impl Worker {
    /// Takes in a request of a connection that is open.
    pub(super) fn command(&mut self, connection: usize, request: &transport::Request) {
        let command = match Command::decode(&request.body) {
            Ok(command) => command,
            Err(violation) => return self.violate(connection, violation),
        };
        if command.read_length() != request.region_len || command.write_length() != request.data_len {
            return self.violate(connection, Violation::Length);
        }
        self.counters.request(command.opcode());
        if self.is_refusing() {
            let text = "The server is shutting down. Connect again later.";
            return self.respond(request.key, failure(Status::transport(libc::ESHUTDOWN), text));
        }
        if self.at_once(connection, request.key, &command) {
            return;
        }
        let first = match command {
            Command::Open { flags, mode, path } => self.open(connection, flags, mode, path),
            Command::Close(handle) => return self.close(connection, request, handle),
            Command::Cancel { id } => return self.cancel_by_id(connection, request, id),
            Command::Stat(handle) => self.on_file(connection, handle, |file| Ok(Work::Stat(file))),
            Command::Fsync { file, data_only } => {
                self.on_file(connection, file, |file| Ok(Work::Fsync(file, data_only)))
            }
            Command::Read { file, offset, length } => {
                let slot_max = self.slot_bytes_max();
                self.on_range(connection, file, offset, length.into(), |file, range| {
                    read(file, range, slot_max)
                })
            }
            Command::Write { file, offset, length } => {
                self.on_range(connection, file, offset, length.into(), write)
            }
            Command::Discard { file, offset, length } => {
                self.on_range(connection, file, offset, length, |file, range| {
                    Ok(Work::Discard(writable(file)?, range))
                })
            }
            Command::WriteZeroes { file, offset, length } => {
                self.on_range(connection, file, offset, length, |file, range| {
                    Ok(Work::Zero(within_size(writable(file)?, range)?, Zero::new(range)))
                })
            }
        };
        match first {
            First::Work(work) => {
                self.begin(connection, request.key, work);
            }
            First::Answer(response) => self.respond(request.key, response),
        }
    }

    fn on_file(
        &mut self,
        connection: usize,
        handle: FileHandle,
        then: impl FnOnce(Rc<WorkerFile>) -> Result<Work, Response>,
    ) -> First {
        match self.file(connection, handle).ok_or_else(unknown_handle).and_then(then) {
            Ok(work) => First::Work(work),
            Err(response) => First::Answer(response),
        }
    }

    fn on_range(
        &mut self,
        connection: usize,
        handle: FileHandle,
        offset: u64,
        length: u64,
        then: impl FnOnce(Rc<WorkerFile>, Range) -> Result<Work, Response>,
    ) -> First {
        let Some(file) = self.file(connection, handle) else { return First::Answer(unknown_handle()) };
        let Some(range) = Range::new(offset, length) else {
            let text = "Offset and length lead beyond what a file can have (2^63 - 1 bytes).";
            return First::Answer(failure(Status::storage(libc::EINVAL), text));
        };
        match then(file, range) {
            Err(response) => First::Answer(response),
            // Checked like any other, and then there is nothing to do.
            Ok(_) if length == 0 => First::Answer(success(0)),
            Ok(work) => First::Work(work),
        }
    }

    // Open ---------------------------------------------------------------------------------------------------------------

    fn open(&mut self, connection: usize, flags: u32, mode: u32, path: &[u8]) -> First {
        match self.shared.exports.resolve(flags, mode, path) {
            Err(Refusal { status, text }) => First::Answer(failure(status, &text)),
            Ok(Target::Ready(open)) => {
                let backend = open.fd().map(|fd| Handle::new(&mut self.reactor, Arc::clone(fd)));
                let info = FileInfo { status: Default::default(), direct_align: None };
                First::Answer(self.give_handle(connection, open, backend, info))
            }
            Ok(Target::Path { export, path, how }) => First::Work(Work::Open(Box::new(Opening {
                export,
                path,
                how,
                access: Access::from_flags(flags),
                retries: RETRIES_MAX,
                file: None,
            }))),
        }
    }

    /// An operation of an open has ended: openat2 first, then statx.
    pub(super) fn open_proceeds(&mut self, key: usize, completion: Completion) {
        let request = &mut self.requests[key];
        let connection = request.connection;
        let Work::Open(opening) = &mut request.work else { unreachable!("the caller looked") };
        let response = match (completion.result, completion.outcome) {
            (Ok(_), Outcome::Fd(fd)) => {
                opening.file = Some(Handle::new(&mut self.reactor, Arc::new(fd)));
                return self.open_on(key);
            }
            (Ok(_), Outcome::Stat(info)) => match (opening.file.take(), connection) {
                (Some(file), Some(connection)) => {
                    let is_direct = opening.how.flags & libc::O_DIRECT as u64 != 0;
                    let (export, access) = (opening.export, opening.access);
                    match self.shared.exports.all()[export].check_type(info.status.mode.get()) {
                        Ok(()) => self.opened_file(connection, file, *info, access, is_direct),
                        Err(errno) => {
                            storage_failure(&format!("Opening {}", Shown(opening.path.as_bytes())), errno)
                        }
                    }
                }
                // Nobody waits for it any more.
                _ => success(0),
            },
            (Err(libc::EAGAIN), _) if opening.file.is_none() && opening.retries > 0 => {
                opening.retries -= 1;
                return self.open_on(key);
            }
            (Err(errno), _) => {
                let is_direct = opening.how.flags & libc::O_DIRECT as u64 != 0;
                let hint = match errno {
                    libc::EXDEV => " The path leads out of the export.",
                    libc::EINVAL if is_direct => " Its file system may not have O_DIRECT.",
                    libc::EMFILE | libc::ENFILE => {
                        " Raise the server's limit with `ulimit -n` or LimitNOFILE=."
                    }
                    _ => "",
                };
                let error = std::io::Error::from_raw_os_error(errno);
                let path = Shown(opening.path.as_bytes());
                failure(Status::storage(errno), &format!("Cannot open {path} on the server: {error}.{hint}"))
            }
            (Ok(_), outcome) => unreachable!("an open ended with {outcome:?}"),
        };
        self.answer(key, response);
    }

    fn open_on(&mut self, key: usize) {
        let request = &self.requests[key];
        let Work::Open(opening) = &request.work else { unreachable!("the caller looked") };
        let Some(handle) = opening.file.as_ref().or(self.directory(opening.export)).cloned() else {
            unreachable!("an export without a directory opens nothing")
        };
        let operation = request.work.first(None);
        self.requests[key].operation = self.backend.submit(&mut self.reactor, key as u64, &handle, operation);
    }

    fn opened_file(
        &mut self,
        connection: usize,
        handle: Handle,
        info: FileInfo,
        access: Access,
        is_direct: bool,
    ) -> Response {
        // It was there so that a FIFO could not hold up the open. On the ring it would make reads fail that have to wait.
        if let Ok(flags) = rustix::fs::fcntl_getfl(&handle.fd) {
            let _ = rustix::fs::fcntl_setfl(&handle.fd, flags - OFlags::NONBLOCK);
        }
        let is_device = info.status.mode.get() & libc::S_IFMT == libc::S_IFBLK;
        let direct_align = if is_direct {
            let sector = || rustix::fs::ioctl_blksszget(handle.fd.as_fd()).ok().filter(|_| is_device);
            info.direct_align.or_else(sector).unwrap_or(DIRECT_ALIGN_DEFAULT).max(1)
        } else {
            1
        };
        let fd = Arc::clone(&handle.fd);
        let kind = if is_device { FileKind::Device(fd) } else { FileKind::Regular(fd) };
        self.give_handle(connection, OpenFile::new(kind, access, direct_align), Some(handle), info)
    }

    fn give_handle(
        &mut self,
        connection: usize,
        open: OpenFile,
        backend: Option<Handle>,
        mut info: FileInfo,
    ) -> Response {
        let session = self.connections[connection].session;
        let open = Arc::new(open);
        let Some(handle) = self.sessions[session].session.insert(Arc::clone(&open)) else {
            let text = "The server has as many files open as it may. Close some, or raise its limit with `ulimit -n`.";
            return failure(Status::storage(libc::EMFILE), text);
        };
        if let Some(size) = open.fixed_size() {
            info = crate::request::made_up_status(size);
        }
        let file = self.remember(session, WorkerFile::new(handle, open, backend));
        Response { result: handle.0.into(), ..status_of(&file, info) }
    }

    // Close and cancel -----------------------------------------------------------------------------------------------------

    fn close(&mut self, connection: usize, request: &transport::Request, handle: FileHandle) {
        let session = self.connections[connection].session;
        let Some(file) = self.sessions[session].session.close(handle) else {
            return self.respond(request.key, unknown_handle());
        };
        self.forget(session, handle);
        self.tell_others(self.sessions[session].session.id, handle);
        let key = self.begin(connection, request.key, Work::Close);
        if !self.retire(key as u64, file) {
            // Another worker, or a request in flight, will be its last user.
            self.answer(key, success(0));
        }
    }

    fn cancel_by_id(&mut self, connection: usize, request: &transport::Request, id: u64) {
        let Some(key) = self.request_by_id(connection, id) else {
            let text = "The request that was to be cancelled is not outstanding.";
            return self.respond(request.key, failure(Status::storage(libc::ENOENT), text));
        };
        if self.requests[key].canceller.is_some() {
            let text = "The request is being cancelled already.";
            return self.respond(request.key, failure(Status::storage(libc::EALREADY), text));
        }
        self.requests[key].canceller = Some(request.key);
        self.cancel(connection, key);
    }
}

fn unknown_handle() -> Response {
    failure(Status::storage(libc::EBADF), "No file of this session has that handle. Open it first.")
}

fn readable(file: Rc<WorkerFile>) -> Result<Rc<WorkerFile>, Response> {
    if file.open.access.read {
        return Ok(file);
    }
    Err(failure(Status::storage(libc::EBADF), "The file is not open for reading."))
}

fn writable(file: Rc<WorkerFile>) -> Result<Rc<WorkerFile>, Response> {
    if file.open.access.write {
        return Ok(file);
    }
    Err(failure(Status::storage(libc::EBADF), "The file is not open for writing."))
}

/// Exports of a fixed size do not grow.
fn within_size(file: Rc<WorkerFile>, range: Range) -> Result<Rc<WorkerFile>, Response> {
    match file.open.fixed_size() {
        Some(size) if range.end() > size => Err(failure(
            Status::storage(libc::ENOSPC),
            &format!("The export ends at {size} bytes and does not grow."),
        )),
        _ => Ok(file),
    }
}

fn read(file: Rc<WorkerFile>, range: Range, slot_bytes_max: usize) -> Result<Work, Response> {
    let file = readable(file)?;
    let align = file.open.direct_align;
    match Read::new(range, align) {
        Some(read) if read.slot_len() <= slot_bytes_max => Ok(Work::Read(file, read)),
        _ => {
            let text = format!(
                "With O_DIRECT this file wants multiples of {align} bytes, and the range cannot be widened to that."
            );
            Err(failure(Status::storage(libc::EINVAL), &text))
        }
    }
}

fn write(file: Rc<WorkerFile>, range: Range) -> Result<Work, Response> {
    let file = within_size(writable(file)?, range)?;
    let align = file.open.direct_align;
    if !range.is_aligned(align.into()) {
        let text = format!(
            "With O_DIRECT this file takes writes only at multiples of {align} bytes, of lengths that are multiples of {align} bytes."
        );
        return Err(failure(Status::storage(libc::EINVAL), &text));
    }
    Ok(Work::Write(file, Write::new(range)))
}
