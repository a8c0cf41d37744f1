//! What the commands mean: from raio's protocol to work for the engine.
//!
//! Everything a client says is checked here. What it cannot know (a file that is not there, a range that is
//! not aligned) is that request's failure, with a sentence; what only a broken client says ends the
//! connection.

use std::rc::Rc;
use std::sync::Arc;

use raio_transport::error::Class;
use raio_transport::protocol::{Command, FileHandle};
use raio_transport::transport::{self, Response};
use raio_transport::{Status, Violation};
use tracing::field::display;

use super::Worker;
use super::connection::{Connection, log_client};
use crate::engine::Closing;
use crate::export::Target;
use crate::limits::Excess;
use crate::log;
use crate::open::{OpenResult, Opened, Opening};
use crate::rejection::{EscapedPath, Rejection};
use crate::request::{
    Pieces, Range, RangeCommand, Read, Work, WorkerFile, Write, failure, status_of, success,
};
use crate::session::{Access, OpenFile};
use crate::syscalls::FileInfo;
use crate::volume::SizeLimit;

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
        if self.is_rejecting() {
            let text = "The server is shutting down. Connect again later.";
            return self.respond(request.key, failure(Status::transport(libc::ESHUTDOWN), text));
        }
        if self.fast_path(connection, request.key, &command) {
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
                    Ok(Work::InPieces(writable(file)?, Pieces::new(RangeCommand::Discard, range)))
                })
            }
            Command::WriteZeroes { file, offset, length } => {
                self.on_range(connection, file, offset, length, |file, range| {
                    in_pieces(RangeCommand::WriteZeroes, file, range)
                })
            }
            Command::Allocate { file, offset, length, keep_size } => {
                self.on_range(connection, file, offset, length, |file, range| {
                    in_pieces(RangeCommand::Allocate { keep_size }, file, range)
                })
            }
        };
        match first {
            First::Work(work) => {
                if !self.counts_requests || self.count_request(connection, request) {
                    self.begin(connection, request.key, work);
                }
            }
            First::Answer(response) => self.respond(request.key, response),
        }
    }

    /// Counts one more request of a connection's session and address, or answers it: they have as many as
    /// they may.
    #[cold]
    fn count_request(&mut self, connection: usize, request: &transport::Request) -> bool {
        let Connection { session, account, .. } = &self.connections[connection];
        let counted = self.sessions[*session].session.begin_request(account);
        if let Err(Excess { who, text }) = &counted {
            self.counters.rejected_requests[*who as usize].add(1);
            let status = Status { retryable: true, ..Status::policy(libc::EAGAIN) };
            self.respond(request.key, failure(status, text));
        }
        counted.is_ok()
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

    // Open
    // ---------------------------------------------------------------------------------------------------------------

    fn open(&mut self, connection: usize, flags: u32, mode: u32, path: &[u8]) -> First {
        let Connection { peer, name, .. } = &self.connections[connection];
        let client = peer.map(display);
        tracing::debug!(client, name, "A client opens {} (flags {flags:#x}).", EscapedPath(path));
        match self.shared.exports.resolve(flags, mode, path) {
            Err(rejection) => First::Answer(self.open_rejected(Some(connection), rejection)),
            Ok(Target::Ready(file, info)) => First::Answer(self.give_handle(connection, file, info)),
            Ok(Target::Path { export, path, how }) => First::Work(Work::Open(Arc::new(Opening {
                export,
                path,
                how,
                access: Access::from_flags(flags),
                waits_for_lease: false,
            }))),
        }
    }

    /// An open has ended.
    pub(super) fn open_ended(&mut self, key: usize, result: OpenResult) {
        if let Err(rejection) = &result
            && rejection.status.errno == libc::EAGAIN
            && self.wait_for_lease(key)
        {
            return;
        }
        let response = match (result, self.requests[key].connection) {
            (Ok(Opened { file, info }), Some(connection)) => self.give_handle(connection, file, info),
            // Nobody waits for it any more.
            (Ok(_), None) => success(0),
            (Err(rejection), connection) => self.open_rejected(connection, rejection),
        };
        self.answer(key, response);
    }

    fn open_rejected(&self, connection: Option<usize>, rejection: Rejection) -> Response {
        let Rejection { status, text } = rejection;
        if let Some(Connection { peer, name, .. }) = connection.map(|key| &self.connections[key]) {
            // What the file system says is the client's business, what the operator has decided is theirs.
            if status.class == Class::Policy {
                log_client!(info, peer, "opens that were rejected", name, "An open was rejected: {text}");
            } else {
                tracing::debug!(client = peer.map(display), name, "An open has failed: {text}");
            }
        }
        failure(status, &text)
    }

    fn give_handle(&mut self, connection: usize, open: OpenFile, info: FileInfo) -> Response {
        let session = self.connections[connection].session;
        let open = Arc::new(open);
        let account = &self.connections[connection].account;
        let handle = match self.sessions[session].session.insert(Arc::clone(&open), account) {
            Ok(handle) => handle,
            Err(Excess { who, text }) => {
                self.counters.rejected_files[who as usize].add(1);
                return failure(Status::storage(libc::EMFILE), &text);
            }
        };
        let file = self.remember(session, WorkerFile::new(handle, open));
        Response { result: handle.0.into(), ..status_of(&file, info) }
    }

    // Close and cancel
    // -----------------------------------------------------------------------------------------------------

    fn close(&mut self, connection: usize, request: &transport::Request, handle: FileHandle) {
        let session = self.connections[connection].session;
        let Some((file, permit)) = self.sessions[session].session.close(handle) else {
            return self.respond(request.key, unknown_handle());
        };
        self.forget(session, handle);
        self.tell_others(self.sessions[session].session.id, handle);
        let key = self.begin(connection, request.key, Work::Close);
        // Another worker, or a request in flight, may be its last user.
        file.volume.close(Closing::new(self.engine.completions().completer(key as u64), permit));
    }

    fn cancel_by_id(&mut self, connection: usize, request: &transport::Request, id: u64) {
        let Some(key) = self.request_by_id(connection, id) else {
            let text = "The request that was to be cancelled is not outstanding.";
            return self.respond(request.key, failure(Status::storage(libc::ENOENT), text));
        };
        if self.requests[key].cancel_request.is_some() {
            let text = "The request is being cancelled already.";
            return self.respond(request.key, failure(Status::storage(libc::EALREADY), text));
        }
        self.requests[key].cancel_request = Some(request.key);
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

/// Files do not grow beyond what the configuration allows.
fn within_size(file: Rc<WorkerFile>, range: Range) -> Result<Rc<WorkerFile>, Response> {
    match file.open.size_limit {
        Some(SizeLimit { bytes, errno }) if range.end() > bytes => {
            let text = if errno == libc::EFBIG {
                format!(
                    "Files of this export cannot be larger than {bytes} bytes. Its operator can raise `max-file-size`."
                )
            } else {
                format!("The export ends at {bytes} bytes and does not grow.")
            };
            Err(failure(Status::storage(errno), &text))
        }
        _ => Ok(file),
    }
}

/// What may make the file longer.
fn in_pieces(command: RangeCommand, file: Rc<WorkerFile>, range: Range) -> Result<Work, Response> {
    Ok(Work::InPieces(within_size(writable(file)?, range)?, Pieces::new(command, range)))
}

fn read(file: Rc<WorkerFile>, range: Range, slot_bytes_max: usize) -> Result<Work, Response> {
    let file = readable(file)?;
    let align = file.open.alignment;
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
    let align = file.open.alignment;
    if !range.is_aligned(align.into()) {
        let text = format!(
            "With O_DIRECT this file takes writes only at multiples of {align} bytes, of lengths that are multiples of {align} bytes."
        );
        return Err(failure(Status::storage(libc::EINVAL), &text));
    }
    Ok(Work::Write(file, Write::new(range)))
}
