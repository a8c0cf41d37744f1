//! Operations on paths, and all others that answer more than a number: opens, closes, and what asks for a
//! status.
//!
//! What is made by an open is a [`File`] as soon as the server has answered: dropped on whichever way, it is
//! closed.

use std::path::Path;
use std::sync::Arc;

use raio_transport::Status;
use raio_transport::channel::Reopenable;
use raio_transport::error::Violation;
use raio_transport::memory::{Buffers, Divided};
use raio_transport::message;
use raio_transport::protocol::path::PathCommand;
use raio_transport::protocol::{
    Command, Extent, FLAG_EXCLUSIVE, FLAG_NO_REPLACE, FLAG_NOFOLLOW, FLAG_REMOVE, FileHandle, FileStatus,
    FileSystemStatus, OPEN_DSYNC, OPEN_SYNC, Opcode,
};
use raio_transport::transport::{Bulk, Reply, SendOptions};

use super::unclosed::Unclosed;
use super::{Context, NO_FILE, New, OperationState, Request};
use crate::control::is_closed_anyway;
use crate::error::{Error, not_supported, protocol_error, unsupported};
use crate::file::{File, Inner};
use crate::names::{
    ReadDir, check_put, check_xattr, data_of, link_of, path_bytes, path_command, room_for, xattr_command,
    xattr_names,
};
use crate::open_flags::open_flags;
use crate::operation::{
    Answer, Checksum, ChecksumAlgorithm, Completion, OperationCrc, PathOperation, RejectedPath,
    SubmitOptions, Ticket,
};
use crate::session::{Shared, status_of};
use crate::tuning::{FIRST_PAGE_BYTES, PAGE_BYTES, XATTR_BYTES_MAX};

/// What a slot has of an operation beyond a read or a write.
#[derive(Debug, Default)]
pub(super) struct Extra {
    opening: Option<Opening>,
    /// The server is to be told that a file is closed, or a listing ended.
    closing: Option<Unclosed>,
    /// The buffers of a get that are larger than a request may be. It has a part of them.
    whole: Option<Divided>,
    /// The directory that is listed.
    entries: Option<ReadDir>,
    /// Its buffers are the library's.
    has_own_room: bool,
    /// The index of the file that is copied from: an operation is in flight on it, too.
    pub(super) source: Option<u32>,
    /// Which checksum was asked for.
    algorithm: Option<ChecksumAlgorithm>,
    /// The file has a lock, or none any more, if the operation succeeds.
    locks: Option<(FileHandle, bool)>,
}

/// A file that is being opened.
#[derive(Debug)]
struct Opening {
    flags: u32,
    path: Box<[u8]>,
    /// [`raio_transport::channel::OpenFiles::reopenings`] when it was submitted.
    reopenings: u64,
    /// It is open, and its status is asked for.
    file: Option<File>,
    /// It is among the session's open files.
    is_known: bool,
}

/// Whether an operation may have an [`Answer`], or is more than one request.
#[inline(always)]
pub(super) fn has_answer(opcode: Opcode) -> bool {
    !matches!(
        opcode,
        Opcode::Read
            | Opcode::Write
            | Opcode::Fsync
            | Opcode::Discard
            | Opcode::WriteZeroes
            | Opcode::Allocate
    )
}

impl Extra {
    /// Of a checksum.
    pub(super) fn checksum(algorithm: ChecksumAlgorithm) -> Box<Self> {
        Box::new(Self { algorithm: Some(algorithm), ..Self::default() })
    }

    /// Of a lock on this file, or the end of one.
    pub(super) fn lock(file: FileHandle, is_locked: bool) -> Box<Self> {
        Box::new(Self { locks: Some((file, is_locked)), ..Self::default() })
    }

    /// Of a close.
    pub(super) fn close(session: &Arc<Shared>, close: Command<'static>) -> Box<Self> {
        Box::new(Self { closing: Some(Unclosed::new(session, close)), ..Self::default() })
    }

    /// Takes what is about the request, which goes on when the operation is abandoned.
    pub(super) fn of_request(&mut self) -> Box<Self> {
        let (closing, source, locks) = (self.closing.take(), self.source.take(), self.locks.take());
        Box::new(Self { closing, source, locks, ..Self::default() })
    }

    /// The server has answered an abandoned request in this way.
    pub(super) fn answered(&mut self, session: &Shared, status: Status) {
        if let Some(closing) = self.closing.take() {
            closing.answered(status);
        }
        if status.is_ok() {
            self.set_locked(session);
        }
    }

    fn set_locked(&self, session: &Shared) {
        if let Some((file, is_locked)) = self.locks {
            session.files().set_locked(file, is_locked);
        }
    }

    /// Its operation ends with this completion.
    #[cold]
    pub(super) fn end(mut self, session: &Arc<Shared>, completion: &mut Completion) {
        if let Some(whole) = self.whole.take() {
            // The part must be gone first.
            completion.buffers = None;
            completion.buffers = whole.into_whole().ok();
        }
        if self.has_own_room {
            completion.buffers = None;
        }
        match &mut completion.result {
            Ok(_) => {
                self.set_locked(session);
                if let Some(closing) = self.closing.take() {
                    closing.done();
                }
                completion.answer = self.entries.map(|entries| Box::new(Answer::Entries(entries)));
            }
            Err(error) => {
                // It was opened, and perhaps created.
                error.is_unknown |= self.opening.take_if(|opening| opening.file.is_some()).is_some();
            }
        }
    }
}

/// What is sent of an operation on a path.
struct PathRequest {
    opcode: Opcode,
    command: Vec<u8>,
    /// How many bytes of data go either way.
    length: usize,
    /// Of an open: the flags as they are sent.
    flags: u32,
}

/// An operation on this path, and the second name that it may have.
fn path_request(
    opcode: Opcode,
    flags: u16,
    mode: u32,
    path: &Path,
    other: Option<&Path>,
) -> Result<PathRequest, Error> {
    path_command(opcode, flags, mode, path, other.map(Path::as_os_str)).map(encoded)
}

fn encoded(command: PathCommand<'_>) -> PathRequest {
    let mut body = Vec::new();
    Command::Path(command).encode(&mut body);
    PathRequest { opcode: command.opcode, command: body, length: command.length as usize, flags: 0 }
}

impl PathOperation {
    /// What is sent of it to a server that takes this number of bytes in a request.
    fn request(&self, io_bytes_max: usize) -> Result<PathRequest, Error> {
        let on = |opcode, path| path_request(opcode, 0, 0, path, None);
        let sized = |command, length: usize| {
            encoded(PathCommand { length: length.min(io_bytes_max) as u64, ..command })
        };
        match self {
            Self::Open { path, flags, mode } => {
                let flags = open_flags(*flags)?;
                let mut command = Vec::new();
                Command::Open { flags, mode: mode & 0o7777, path: path_bytes(path)? }.encode(&mut command);
                Ok(PathRequest { opcode: Opcode::Open, command, length: 0, flags })
            }
            Self::Stat { path, nofollow } => {
                path_request(Opcode::StatPath, if *nofollow { FLAG_NOFOLLOW } else { 0 }, 0, path, None)
            }
            Self::Get { path, buffers } => {
                Ok(sized(PathCommand::new(Opcode::Get, path_bytes(path)?), buffers.len()))
            }
            Self::Put { path, buffers, options } => {
                let path = path_bytes(path)?;
                check_put(buffers.len(), io_bytes_max)?;
                Ok(encoded(options.command(path, buffers.len())))
            }
            Self::Mkdir { path, mode } => path_request(Opcode::Mkdir, 0, *mode, path, None),
            Self::Rmdir { path } => on(Opcode::Rmdir, path),
            Self::Unlink { path } => on(Opcode::Unlink, path),
            Self::Rename { from, to, no_replace } => {
                path_request(Opcode::Rename, if *no_replace { FLAG_NO_REPLACE } else { 0 }, 0, from, Some(to))
            }
            Self::Link { original, link } => path_request(Opcode::Link, 0, 0, original, Some(link)),
            Self::Symlink { target, link } => path_request(Opcode::Symlink, 0, 0, link, Some(target)),
            Self::Readlink { path } => on(Opcode::Readlink, path),
            Self::SetAttributes { path, attributes } => {
                // The size that a file is to have is no data.
                let command = attributes.command(path_bytes(path)?);
                Ok(PathRequest { length: 0, ..encoded(command) })
            }
            Self::Statfs { path } => on(Opcode::Statfs, path),
            Self::GetXattr { path, name } => {
                Ok(sized(xattr_command(Opcode::GetXattr, 0, path, name)?, XATTR_BYTES_MAX))
            }
            Self::SetXattr { path, name, buffers, exclusive } => {
                let flags = if *exclusive { FLAG_EXCLUSIVE } else { 0 };
                let command = xattr_command(Opcode::SetXattr, flags, path, name)?;
                check_xattr(buffers.len(), io_bytes_max)?;
                Ok(encoded(PathCommand { length: buffers.len() as u64, ..command }))
            }
            Self::ListXattr { path } => {
                Ok(sized(PathCommand::new(Opcode::ListXattr, path_bytes(path)?), XATTR_BYTES_MAX))
            }
            Self::RemoveXattr { path, name } => {
                xattr_command(Opcode::SetXattr, FLAG_REMOVE, path, name).map(encoded)
            }
            Self::List { path } => {
                Ok(sized(PathCommand::new(Opcode::List, path_bytes(path)?), FIRST_PAGE_BYTES))
            }
            Self::ListNext { entries } => {
                let (length, mut command) = (PAGE_BYTES.min(io_bytes_max), Vec::new());
                entries.next_command(length).encode(&mut command);
                Ok(PathRequest { opcode: Opcode::ListNext, command, length, flags: 0 })
            }
        }
    }
}

impl Context {
    /// Queues an operation on a path: see [`Context::submit_with`]. What it finds out is the completion's
    /// [`Answer`].
    ///
    /// A file whose open times out, or is forgotten with the context, is closed again.
    pub fn submit_path(
        &mut self,
        operation: PathOperation,
        options: SubmitOptions,
        token: u64,
    ) -> Result<Ticket, Box<RejectedPath>> {
        self.submit_path_failing(operation, options, None, token)
    }

    /// The same for one that may have failed already.
    pub(crate) fn submit_path_failing(
        &mut self,
        operation: PathOperation,
        options: SubmitOptions,
        failure: Option<Error>,
        token: u64,
    ) -> Result<Ticket, Box<RejectedPath>> {
        let checked = (self.check_room())
            .and_then(|()| self.check_session(&operation))
            .and_then(|()| operation.request(self.io_bytes_max()));
        let request = match checked {
            Ok(request) => request,
            Err(error) => return Err(Box::new(RejectedPath { operation, error })),
        };
        let mut extra = None;
        let mut is_complete = false;
        let (bulk, crc) = match operation {
            PathOperation::Get { buffers, .. } => {
                let part = match buffers.len() > request.length {
                    true => {
                        let mut whole = Divided::new(buffers);
                        let part = whole.take(request.length);
                        extra = Some(Box::new(Extra { whole: Some(whole), ..Extra::default() }));
                        part
                    }
                    false => buffers,
                };
                (Bulk::In(part), 0)
            }
            PathOperation::Put { buffers, .. } | PathOperation::SetXattr { buffers, .. } => {
                let crc = match options.crc {
                    OperationCrc::AsSession => 0,
                    OperationCrc::Computed => crc_of(&buffers),
                    OperationCrc::Given(crc) => crc,
                };
                (Bulk::Out(buffers), crc)
            }
            PathOperation::Open { path, .. } => {
                let opening = Opening {
                    flags: request.flags,
                    path: path.into_os_string().into_encoded_bytes().into(),
                    reopenings: self.session.files().reopenings(),
                    file: None,
                    is_known: false,
                };
                extra = Some(Box::new(Extra { opening: Some(opening), ..Extra::default() }));
                (Bulk::None, 0)
            }
            PathOperation::List { .. }
            | PathOperation::ListNext { .. }
            | PathOperation::GetXattr { .. }
            | PathOperation::ListXattr { .. } => {
                let entries = match operation {
                    PathOperation::List { .. } => Some(ReadDir::new(Arc::clone(&self.session))),
                    PathOperation::ListNext { entries } => {
                        is_complete = entries.is_complete();
                        Some(entries)
                    }
                    _ => None,
                };
                extra = Some(Box::new(Extra { entries, has_own_room: true, ..Extra::default() }));
                (if is_complete { Bulk::None } else { room_for(request.length) }, 0)
            }
            _ => (Bulk::None, 0),
        };
        let send = SendOptions::with_crc((options.crc != OperationCrc::AsSession).then_some(crc));
        let failure = failure
            .or_else(|| unsupported(request.opcode, &self.channel))
            .or_else(|| send.why_not_granted(self.channel.grant()).map(not_supported));
        let new = New {
            file: NO_FILE,
            opcode: request.opcode,
            request: Request::Encoded(request.command.into()),
            bulk,
            length: request.length as u64,
            is_lent: false,
            extra,
        };
        let ticket = match is_complete && failure.is_none() {
            true => self.complete_at_once(new, token),
            false => self.take_in(new, token, send, failure),
        };
        if let Some(timeout) = options.timeout {
            self.set_timeout(ticket, timeout);
        }
        Ok(ticket)
    }

    /// Closes a file, for which there is room.
    #[cold]
    pub(super) fn enqueue_close(
        &mut self,
        file: &File,
        token: u64,
        options: SendOptions,
        failure: Option<Error>,
    ) -> Ticket {
        let closing = if failure.is_none() { file.begin_close() } else { None };
        let close = Command::Close(file.inner().handle());
        let new = New {
            file: NO_FILE,
            opcode: Opcode::Close,
            request: Request::Command(close),
            bulk: Bulk::None,
            length: 0,
            is_lent: false,
            extra: closing.map(|_| Extra::close(&self.session, close)),
        };
        match (closing, failure) {
            (None, None) => self.complete_at_once(new, token),
            (_, failure) => self.take_in(new, token, options, failure),
        }
    }

    /// Takes an operation for which the server is not needed.
    fn complete_at_once(&mut self, new: New, token: u64) -> Ticket {
        let ticket = self.occupy(new, token, SendOptions::PLAIN);
        self.complete(ticket.index, Ok(0), Bulk::None, 0);
        ticket
    }

    /// A list can go on in its own session alone.
    fn check_session(&self, operation: &PathOperation) -> Result<(), Error> {
        match operation {
            PathOperation::ListNext { entries } if !Arc::ptr_eq(entries.session(), &self.session) => {
                let text = "The list belongs to another session. Submit it to a context of its session.";
                Err(Error::call(libc::EBADF, text))
            }
            _ => Ok(()),
        }
    }

    /// A reply to an operation that [`has_answer`].
    #[cold]
    pub(super) fn handle_answer(&mut self, index: u32, mut reply: Reply) {
        let slot = &self.slots[index as usize];
        let opcode = slot.opcode;
        if is_closed_anyway(opcode, &reply, &self.channel) {
            return self.complete(index, Ok(0), reply.bulk, 0);
        }
        let length = slot.length;
        let mut result = self.result_of(index, length, &reply);
        let mut answer = None;
        if result.is_ok() {
            let opened = match opcode {
                Opcode::Open => Some(self.opened(index, &reply)),
                Opcode::Stat if self.opening(index).is_some() => Some(self.opened_status(index, &reply)),
                _ => None,
            };
            let found = match opened {
                Some(Ok(None)) => return,
                Some(opened) => opened,
                None => match self.entries(index) {
                    Some(entries) => entries.take_in(&mut reply).map(|()| None),
                    None if opcode == Opcode::Checksum => self.checksum_of(index, &reply),
                    None => answer_of(opcode, &mut reply),
                },
            };
            match found {
                Ok(found) => answer = found,
                Err(error) => {
                    self.channel.abort(Violation::Field);
                    result = Err(error);
                }
            }
        }
        if self.opening(index).is_some()
            && opcode == Opcode::Stat
            && result.as_ref().is_err_and(|error| error.errno() == libc::EBADF)
        {
            let text = "The server was restarted when it had opened the file. Open it again.";
            result = Err(Error::new(Status::transport(libc::ECONNRESET), text));
        }
        self.complete(index, result, reply.bulk, reply.data_crc);
        if let (Some(answer), OperationState::Done(completion)) =
            (answer, &mut self.slots[index as usize].state)
        {
            completion.answer = Some(Box::new(answer));
        }
    }

    fn entries(&mut self, index: u32) -> Option<&mut ReadDir> {
        self.slots[index as usize].extra.as_mut()?.entries.as_mut()
    }

    /// A copy begins that reads this file. The destination, which has this index, keeps it.
    pub(super) fn begin_copy(&mut self, source: &Arc<Inner>, destination: u32) -> Box<Extra> {
        let channel = &self.channel;
        self.files.operation_started(destination);
        let index = self.files.index_of(source, || channel.verifier(source.handle()));
        self.files.operation_started(index);
        self.files.operation_completed(destination);
        Box::new(Extra { source: Some(index), ..Extra::default() })
    }

    /// The checksum in the reply to an operation that has asked for one.
    fn checksum_of(&self, index: u32, reply: &Reply) -> Result<Option<Answer>, Error> {
        let asked = self.slots[index as usize].extra.as_ref().and_then(|extra| extra.algorithm);
        let checksum = match (asked, &reply.body[..]) {
            (Some(ChecksumAlgorithm::Crc32c), &[a, b, c, d, 0, 0, 0, 0]) => {
                Checksum::Crc32c(u32::from_le_bytes([a, b, c, d]))
            }
            (Some(ChecksumAlgorithm::Blake3), body) => {
                Checksum::Blake3(body.try_into().map_err(|_| protocol_error())?)
            }
            _ => return Err(protocol_error()),
        };
        Ok(Some(Answer::Checksum(checksum)))
    }

    fn opening(&mut self, index: u32) -> Option<&mut Opening> {
        self.slots[index as usize].extra.as_mut()?.opening.as_mut()
    }

    /// The server has opened a file. None if its status must be asked for.
    fn opened(&mut self, index: u32, reply: &Reply) -> Result<Option<Answer>, Error> {
        let handle = FileHandle(u32::try_from(reply.result).map_err(|_| protocol_error())?);
        let session = Arc::clone(&self.session);
        let Some(opening) = self.opening(index) else { return Err(protocol_error()) };
        let is_synced = opening.flags & (OPEN_SYNC | OPEN_DSYNC) != 0;
        opening.file = Some(File::new(session, handle, 0, is_synced));
        match reply.body.is_empty() {
            false => self.opened_status(index, reply),
            // It was opened by a request whose connection has broken: its outcome is all that there is.
            true => {
                self.ask_for_status(index, handle);
                Ok(None)
            }
        }
    }

    /// The status of a file that was opened has come. None if it must be asked for again.
    fn opened_status(&mut self, index: u32, reply: &Reply) -> Result<Option<Answer>, Error> {
        let status = FileStatus::decode(&reply.body).map_err(|_| protocol_error())?;
        let session = Arc::clone(&self.session);
        let Some(opening) = self.opening(index) else { return Err(protocol_error()) };
        let Some(mut file) = opening.file.take() else { return Err(protocol_error()) };
        let handle = file.inner().handle();
        if !std::mem::replace(&mut opening.is_known, true) {
            file = file.with_verifier(status.verifier.get());
            let path = std::mem::take(&mut opening.path);
            let opened = Reopenable { flags: opening.flags, path, identity: status.identity };
            session.files().insert(handle, opened);
            if session.files().reopenings() != opening.reopenings {
                // Others may be connected to a server that has been started since it was opened.
                opening.file = Some(file);
                self.ask_for_status(index, handle);
                return Ok(None);
            }
        }
        Ok(Some(Answer::File(file)))
    }

    /// The slot of an open asks for the file's status next.
    fn ask_for_status(&mut self, index: u32, handle: FileHandle) {
        let slot = &mut self.slots[index as usize];
        slot.opcode = Opcode::Stat;
        slot.state = OperationState::Queued(Request::Command(Command::Stat(handle)), Bulk::None);
        self.queued.push_front(index);
    }
}

/// CRC32C of what the buffers hold.
pub(super) fn crc_of(buffers: &Buffers) -> u32 {
    message::crc_of(buffers.slices(0..buffers.len()))
}

/// The answer in the reply to an operation, if it has one.
fn answer_of(opcode: Opcode, reply: &mut Reply) -> Result<Option<Answer>, Error> {
    Ok(Some(match opcode {
        Opcode::Stat | Opcode::StatPath | Opcode::Get => Answer::Status(status_of(reply)?),
        Opcode::Readlink => Answer::Link(link_of(reply)?),
        Opcode::Statfs => {
            let status = FileSystemStatus::decode(&reply.body).map_err(|_| protocol_error())?;
            Answer::FileSystem(status)
        }
        Opcode::GetXattr => Answer::Xattr(data_of(reply)?),
        Opcode::ListXattr => Answer::XattrNames(xattr_names(reply)?),
        Opcode::Extents => {
            let extents = Extent::decode(&reply.body).map_err(|_| protocol_error())?;
            let extents = extents.iter().map(|extent| (extent.offset.get(), extent.length.get()));
            Answer::Extents { extents: extents.collect(), end: reply.result }
        }
        _ => return Ok(None),
    }))
}
