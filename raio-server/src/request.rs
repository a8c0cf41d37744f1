//! A request, from its arrival to its answer, whatever transport it came by.
//!
//! ```text
//!   NeedSlot --> Fetching (writes) --> Executing --> answered: the request is gone
//! ```
//!
//! What needs no memory starts at Executing. That no memory is free is a state and not an error: the request
//! waits in its connection's FIFO. This module knows what a request does next and what comes of it;
//! [`crate::worker`] moves it along.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use raio_transport::Status;
use raio_transport::memory::Slot;
use raio_transport::message;
use raio_transport::protocol::{Direction, FileHandle, Opcode};
use raio_transport::transport::{Body, RequestKey, Response, SlotRange};
use rustix::fs::FlockOperation;
use zerocopy::IntoBytes;

use crate::checksum::Checksum;
use crate::device_queue::DispatchLimiter;
use crate::engine::{Completion, Descriptor, Operation, Outcome, Pending};
use crate::listing::Listing;
use crate::names::PathTask;
use crate::open::Opening;
use crate::session::{ObjectKey, OpenFile};
use crate::syscalls::FileInfo;
use crate::throttle::Flow;
use crate::timeline::{Stage, Timeline};
use crate::tuning::ranges::PIECE_BYTES;

/// An open file as one worker has it.
#[derive(Debug)]
pub struct WorkerFile {
    /// Its handle in its session.
    pub handle: FileHandle,
    /// What all workers share.
    pub open: Arc<OpenFile>,
    /// When its O_DIRECT reads and writes begin.
    pub device_queue: RefCell<DispatchLimiter>,
}

impl WorkerFile {
    /// A file that nothing has been done with.
    pub fn new(handle: FileHandle, open: Arc<OpenFile>) -> Self {
        Self { handle, open, device_queue: RefCell::default() }
    }
}

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It waits for memory, in its connection's FIFO.
    NeedSlot,
    /// The transport brings its data.
    Fetching,
    /// The engine has it, or will have it when its device has less to do: see [`crate::device_queue`].
    Executing,
}

impl From<Stage> for State {
    fn from(stage: Stage) -> Self {
        match stage {
            Stage::NeedSlot | Stage::Held | Stage::Throttled => Self::NeedSlot,
            Stage::Fetching => Self::Fetching,
            Stage::Executing => Self::Executing,
        }
    }
}

/// A request that is not yet answered.
#[derive(Debug)]
pub struct Request {
    /// Its name at the transport...
    pub key: RequestKey,
    /// ... and the worker's connection. None once that is gone: the engine still has the request, and its
    /// answer is for nobody.
    pub connection: Option<usize>,
    /// What was asked for.
    pub opcode: Opcode,
    /// In the iteration of which time, if its latency is measured.
    pub arrived: Option<Instant>,
    /// How long it was at which stage.
    pub timeline: Timeline,
    /// Where it is.
    pub state: State,
    /// What it does.
    pub work: Work,
    /// The slot that it holds, for the accounts of its connection and its export.
    pub slot_bytes: usize,
    /// The export whose account that is. None: it is the only one, or none whose requests may hang.
    pub export: Option<usize>,
    /// It is to be cancelled.
    pub is_cancelled: bool,
    /// It is, because its export is over.
    pub is_revoked: bool,
    /// The cancel command that waits for its end.
    pub cancel_request: Option<Box<(RequestKey, Option<Instant>)>>,
    /// Where its operation is, for cancelling.
    pub operation: Option<Pending>,
}

/// What a request does.
#[derive(Debug)]
pub enum Work {
    /// See [`raio_transport::protocol::Opcode::Read`].
    Read(Rc<WorkerFile>, Read),
    /// See [`raio_transport::protocol::Opcode::Write`].
    Write(Rc<WorkerFile>, Write),
    /// See [`raio_transport::protocol::Opcode::Fsync`].
    Fsync(Rc<WorkerFile>, bool),
    /// Discard, write zeroes or allocate.
    InPieces(Rc<WorkerFile>, Pieces),
    /// See [`raio_transport::protocol::Opcode::Stat`]. With the result: a reopen of a file that is open
    /// answers with its handle.
    Stat(Rc<WorkerFile>, u64),
    /// See [`raio_transport::protocol::Opcode::Open`].
    Open(Arc<Opening>),
    /// See [`raio_transport::protocol::Opcode::Close`].
    Close,
    /// See [`raio_transport::protocol::Opcode::Truncate`].
    Truncate(Rc<WorkerFile>, u64),
    /// See [`raio_transport::protocol::Opcode::Extents`].
    Extents(Rc<WorkerFile>, Range),
    /// See [`raio_transport::protocol::Opcode::Copy`].
    Copy(Box<Copying>),
    /// See [`raio_transport::protocol::Opcode::Checksum`].
    Checksum(Rc<WorkerFile>, Box<Checksumming>),
    /// See [`raio_transport::protocol::Opcode::Lock`].
    Lock(Rc<WorkerFile>, FlockOperation),
    /// An operation on a path.
    Path(Arc<PathTask>),
    /// A list of the exports, with room for this many bytes.
    ListExports(u32),
    /// See [`raio_transport::protocol::Opcode::ListNext`].
    ListNext(Arc<Listing>, ListNext),
}

/// The page of a listing that a request asks for.
#[derive(Clone, Copy, Debug)]
pub struct ListNext {
    /// Whether it is an odd one.
    pub is_odd: bool,
    /// The room for it, in bytes.
    pub length: u32,
}

/// A part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Where.
    pub offset: u64,
    /// How much.
    pub length: u64,
}

impl Range {
    /// None if it does not lie within what a file can have (offsets are signed).
    pub fn new(offset: u64, length: u64) -> Option<Self> {
        let end_max = i64::MAX as u64;
        (offset <= end_max && length <= end_max - offset).then_some(Self { offset, length })
    }

    /// The first offset behind it.
    pub fn end(self) -> u64 {
        self.offset + self.length
    }

    /// The smallest range around it whose ends are multiples of `align`.
    fn widened(self, align: u64) -> Option<Self> {
        let offset = self.offset - self.offset % align;
        let end = self.end().checked_next_multiple_of(align)?;
        Self::new(offset, end - offset)
    }

    /// Whether its ends are multiples of `align`.
    pub fn is_aligned(self, align: u64) -> bool {
        self.offset.is_multiple_of(align) && self.length.is_multiple_of(align)
    }
}

/// A read. With O_DIRECT it reads a wider range than was asked for, and answers with the middle.
#[derive(Clone, Copy, Debug)]
pub struct Read {
    range: Range,
    span: Range,
    align: usize,
    done: usize,
}

impl Read {
    /// None if the range that must be read lies beyond what a file can have.
    #[inline]
    pub fn new(range: Range, align: u32) -> Option<Self> {
        let span = if range.length == 0 || align == 1 { range } else { range.widened(align.into())? };
        Some(Self { range, span, align: align as usize, done: 0 })
    }

    /// What was asked for.
    pub fn range(&self) -> Range {
        self.range
    }

    /// The memory that it needs.
    pub fn slot_len(&self) -> usize {
        self.span.length as usize
    }

    fn next(&self, slot: Slot) -> Operation {
        let target = SlotRange { slot, start: self.done, len: self.slot_len() - self.done };
        Operation::Read { target, offset: self.span.offset + self.done as u64 }
    }

    /// Takes in that `n` more bytes have been read. Whether that is the end of it: all, or the end of the
    /// file.
    fn advance(&mut self, n: usize) -> bool {
        self.done += n;
        // A direct read stops off the alignment only at the end of the file, and could not go on from there.
        n == 0 || self.done >= self.slot_len() || !self.done.is_multiple_of(self.align)
    }

    /// Whether some of what was asked for has been read.
    fn has_answer(&self) -> bool {
        self.span.offset + self.done as u64 > self.range.offset
    }

    /// Where in the slot the answer lies.
    fn answer(&self, slot: Slot) -> SlotRange {
        let start = (self.range.offset - self.span.offset) as usize;
        let len = self.done.saturating_sub(start).min(self.range.length as usize);
        SlotRange { slot, start, len }
    }
}

/// A write.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    range: Range,
    done: usize,
}

impl Write {
    /// Of the whole range.
    pub fn new(range: Range) -> Self {
        Self { range, done: 0 }
    }

    fn len(&self) -> usize {
        self.range.length as usize
    }

    /// The answer to a write that could not go on.
    fn cut_short(&self, errno: i32) -> Response {
        if self.done > 0 { success(self.done as u64) } else { storage_failure("Writing", errno) }
    }

    fn next(&self, slot: Slot) -> Operation {
        let source = SlotRange { slot, start: self.done, len: self.len() - self.done };
        Operation::Write { source, offset: self.range.offset + self.done as u64 }
    }
}

/// What is done to a range of any length, in pieces.
#[derive(Clone, Copy, Debug)]
pub enum RangeCommand {
    /// See [`raio_transport::protocol::Opcode::Discard`].
    Discard,
    /// See [`raio_transport::protocol::Opcode::WriteZeroes`].
    WriteZeroes,
    /// See [`raio_transport::protocol::Opcode::Allocate`].
    Allocate {
        /// The file's size stays.
        keep_size: bool,
    },
}

/// A range that a command is carried out on, and how much of it is done. What is done stays when it fails: to
/// cut the file would cut off what another has appended meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Pieces {
    command: RangeCommand,
    range: Range,
    done: u64,
    /// No further piece is begun.
    is_stopped: bool,
}

impl Pieces {
    /// Of the whole range.
    pub fn new(command: RangeCommand, range: Range) -> Self {
        Self { command, range, done: 0, is_stopped: false }
    }

    /// What is left to do.
    fn rest(&self) -> Range {
        Range { offset: self.range.offset + self.done, length: self.range.length - self.done }
    }

    fn next(&self) -> Operation {
        let Range { offset, length } = self.rest();
        match self.command {
            RangeCommand::Discard => Operation::Discard { offset, length },
            RangeCommand::WriteZeroes => Operation::WriteZeroes { offset, length },
            RangeCommand::Allocate { keep_size } => Operation::Allocate { offset, length, keep_size },
        }
    }

    fn name(&self) -> &'static str {
        match self.command {
            RangeCommand::Discard => "Discarding",
            RangeCommand::WriteZeroes => "Writing zeros",
            RangeCommand::Allocate { .. } => "Allocating",
        }
    }

    /// Takes in that a piece has ended. Whether there is more to do.
    fn advance(&mut self, result: Result<u32, i32>, outcome: &Outcome) -> Result<bool, i32> {
        result?;
        if let Outcome::Cleared(done) = outcome {
            self.done += done;
        }
        match self.rest().length {
            0 => Ok(false),
            _ if self.is_stopped => Err(libc::ECANCELED),
            _ => Ok(true),
        }
    }
}

/// A copy of a range, in pieces, and how much of it is done.
#[derive(Debug)]
pub struct Copying {
    source: Rc<WorkerFile>,
    source_descriptor: Arc<Descriptor>,
    range: Range,
    destination: Rc<WorkerFile>,
    destination_offset: u64,
    done: u64,
    /// No further piece is begun.
    is_stopped: bool,
    /// The next piece counts for the rates of the source already.
    is_source_charged: bool,
}

impl Copying {
    /// Of the range of the source, which has this descriptor.
    pub fn new(
        (source, source_descriptor, range): (Rc<WorkerFile>, Arc<Descriptor>, Range),
        (destination, destination_offset): (Rc<WorkerFile>, u64),
    ) -> Self {
        let (done, is_stopped, is_source_charged) = (0, false, false);
        Self {
            source,
            source_descriptor,
            range,
            destination,
            destination_offset,
            done,
            is_stopped,
            is_source_charged,
        }
    }

    /// The file that is read.
    pub fn source(&self) -> &OpenFile {
        &self.source.open
    }

    /// The file that is written.
    pub fn destination(&self) -> &OpenFile {
        &self.destination.open
    }

    fn next(&self) -> Operation {
        Operation::Copy {
            source: Arc::clone(&self.source_descriptor),
            source_offset: self.range.offset + self.done,
            offset: self.destination_offset + self.done,
            length: self.range.length - self.done,
        }
    }

    /// The bytes of the next piece.
    fn piece_len(&self) -> u64 {
        (self.range.length - self.done).min(PIECE_BYTES)
    }

    /// Whose rates the next piece is to count for: those of the source, then those of the destination.
    fn flow(&self) -> Option<&Arc<Flow>> {
        let of_source = self.source.open.flow.as_ref().filter(|_| !self.is_source_charged);
        of_source.or(self.destination.open.flow.as_ref())
    }

    /// It counts for those. Whether there are others.
    fn charged(&mut self) -> bool {
        let was_source = self.source.open.flow.is_some() && !self.is_source_charged;
        self.is_source_charged = was_source;
        was_source && self.destination.open.flow.is_some()
    }

    /// Takes in the end of a piece.
    fn advance(&mut self, n: u64) -> Step {
        self.done += n;
        self.is_source_charged = false;
        if n == 0 || self.done >= self.range.length || self.is_stopped {
            return Step::Done(success(self.done));
        }
        Step::Piece
    }

    /// What there is to answer of it if it does not go on: nothing, if nothing is done.
    fn cut_short(&self) -> Option<Response> {
        (self.done > 0).then(|| success(self.done))
    }
}

/// A checksum of a range, which is read in pieces.
#[derive(Debug)]
pub struct Checksumming {
    range: Range,
    done: u64,
    /// Of what is done.
    checksum: Checksum,
    /// No further piece is begun.
    is_stopped: bool,
}

impl Checksumming {
    /// Of the whole range.
    pub fn new(range: Range, checksum: Checksum) -> Self {
        Self { range, done: 0, checksum, is_stopped: false }
    }

    fn next(&self) -> Operation {
        Operation::Checksum {
            checksum: self.checksum.clone(),
            offset: self.range.offset + self.done,
            length: self.range.length - self.done,
        }
    }

    /// The bytes of the next piece.
    fn piece_len(&self) -> u64 {
        (self.range.length - self.done).min(PIECE_BYTES)
    }

    /// Takes in the end of a piece.
    fn advance(&mut self, n: u64, checksum: Checksum) -> Step {
        let is_over = n < self.piece_len() || n == self.range.length - self.done;
        self.checksum = checksum;
        self.done += n;
        match is_over {
            true => Step::Done(self.answer()),
            false if self.is_stopped => Step::Done(cancelled()),
            false => Step::Piece,
        }
    }

    /// The checksum of what is done.
    pub fn answer(&self) -> Response {
        Response { body: self.checksum.to_wire()[..].into(), ..success(self.done) }
    }
}

/// What comes of a completion.
#[derive(Debug)]
pub enum Step {
    /// There is another piece to do, which counts for the rates by itself: [`Work::first`] begins it.
    Piece,
    /// There is more to do.
    Again(Operation),
    /// There is more to do, which may have to wait.
    Blocking(Operation),
    /// It is done.
    Done(Response),
}

impl Work {
    /// The memory that it needs before it can begin.
    pub fn slot_len(&self) -> usize {
        match self {
            Self::Read(_, read) => read.slot_len(),
            Self::Write(_, write) => write.len(),
            Self::Path(task) if task.opcode.operation().direction != Direction::None => task.length as usize,
            Self::ListNext(_, ListNext { length, .. }) | Self::ListExports(length) => *length as usize,
            _ => 0,
        }
    }

    /// Whether the memory is for data that its client sends.
    pub fn is_sent_data(&self) -> bool {
        match self {
            Self::Write(..) => true,
            Self::Path(task) => task.opcode.operation().direction == Direction::ToServer,
            _ => false,
        }
    }

    /// The data that it is to move, in bytes; of a copy or a checksum that of the next piece.
    pub fn data_len(&self) -> u64 {
        match self {
            Self::Read(_, read) => read.range().length,
            Self::Write(_, write) => write.range.length,
            Self::Path(task) if matches!(task.opcode, Opcode::Get | Opcode::Put) => task.length,
            Self::Copy(copy) => copy.piece_len(),
            Self::Checksum(_, checksum) => checksum.piece_len(),
            _ => 0,
        }
    }

    /// What its client has of the export, if that is limited. A close is not: it ends something.
    pub fn flow(&self) -> Option<&Arc<Flow>> {
        match self {
            Self::Open(opening) => opening.flow.as_ref(),
            Self::Path(task) => task.flow.as_ref(),
            Self::ListNext(listing, _) => listing.flow.as_ref(),
            Self::Copy(copy) => copy.flow(),
            work => work.file()?.open.flow.as_ref(),
        }
    }

    /// It counts for the rates of its flow. Whether there is another flow: a copy has two.
    pub fn charged(&mut self) -> bool {
        if let Self::Copy(copy) = self { copy.charged() } else { false }
    }

    /// Which way its data goes.
    pub fn direction(&self) -> Direction {
        match self {
            Self::Read(..) | Self::Checksum(..) => Direction::ToClient,
            Self::Write(..) => Direction::ToServer,
            // Of the others the data is no file's.
            Self::Path(task) if matches!(task.opcode, Opcode::Get | Opcode::Put) => {
                task.opcode.operation().direction
            }
            _ => Direction::None,
        }
    }

    /// Whether it must not run twice, so that its end is recorded ([`raio_transport::protocol::Operation`]).
    pub fn is_recorded(&self) -> bool {
        match self {
            Self::Write(..) | Self::InPieces(..) | Self::Truncate(..) | Self::Copy(_) => true,
            Self::Path(task) => task.opcode.operation().is_recorded,
            Self::Open(opening) => opening.reopens.is_none(),
            _ => false,
        }
    }

    /// What it changes, if it is a change: a range of a file, or the names and attributes of an export.
    pub fn changes(&self) -> Option<(ObjectKey, std::ops::Range<u64>)> {
        let of_file = |file: &WorkerFile, range: Range| Some((file.open.object, range.offset..range.end()));
        match self {
            Self::Write(file, write) => of_file(file, write.range),
            Self::InPieces(file, pieces) => of_file(file, pieces.range),
            Self::Truncate(file, _) => Some((file.open.object, 0..u64::MAX)),
            Self::Copy(copy) => {
                let start = copy.destination_offset;
                Some((copy.destination.open.object, start..start + copy.range.length))
            }
            Self::Path(task) if task.opcode.operation().is_recorded => {
                Some((ObjectKey::names_of(task.at.export.place()), 0..u64::MAX))
            }
            _ => None,
        }
    }

    /// The answer if it does not go on, because nobody wants it any more: cancelled, or what was done until
    /// then.
    pub fn abandoned(&self) -> Response {
        match self {
            Self::Write(_, write) if write.done > 0 => success(write.done as u64),
            Self::InPieces(_, pieces) => failure_after(pieces.done, pieces.name(), libc::ECANCELED),
            work => work.partly_done().unwrap_or_else(cancelled),
        }
    }

    /// The answer if it does not go on after some pieces of a copy are done. None if nothing is done.
    pub fn partly_done(&self) -> Option<Response> {
        if let Self::Copy(copy) = self { copy.cut_short() } else { None }
    }

    /// The file that it works on; of a copy the destination. An open has its directory, and a close nothing.
    pub fn file(&self) -> Option<&Rc<WorkerFile>> {
        match self {
            Self::Read(file, _)
            | Self::Write(file, _)
            | Self::Fsync(file, _)
            | Self::InPieces(file, _)
            | Self::Truncate(file, _)
            | Self::Extents(file, _)
            | Self::Checksum(file, _)
            | Self::Lock(file, _)
            | Self::Stat(file, _) => Some(file),
            Self::Copy(copy) => Some(&copy.destination),
            Self::Open(_) | Self::Close | Self::Path(_) | Self::ListNext(..) | Self::ListExports(_) => None,
        }
    }

    /// Whether its export is served no more as it was when the request came, or its file was opened.
    pub fn is_revoked(&self) -> bool {
        match self {
            Self::Open(opening) => opening.at.export.tenure().is_over(),
            Self::Path(task) => task.at.export.tenure().is_over(),
            Self::ListNext(listing, _) => listing.lanes.tenure.is_over(),
            Self::Copy(copy) => copy.source.open.is_revoked() || copy.destination.open.is_revoked(),
            work => work.file().is_some_and(|file| file.open.is_revoked()),
        }
    }

    /// The place of its export among all; none for a close.
    pub fn export(&self) -> Option<usize> {
        match self {
            Self::Open(opening) => Some(opening.at.export.place()),
            Self::Path(task) => Some(task.at.export.place()),
            Self::ListNext(listing, _) => Some(listing.export),
            work => Some(work.file()?.open.export),
        }
    }

    /// The export that has a share of the memory for requests like this, because they may hang.
    pub fn hanging_export(&self) -> Option<usize> {
        match self {
            Self::Path(task) => Some(task.at.export.place()),
            Self::ListNext(listing, _) => Some(listing.export),
            work => work.file()?.open.hanging_export,
        }
    }

    /// The file, if this goes straight to its device.
    pub fn direct_file(&self) -> Option<&Rc<WorkerFile>> {
        match self {
            Self::Read(file, _) | Self::Write(file, _) if file.open.is_direct() => Some(file),
            _ => None,
        }
    }

    /// The first operation, or that of the next piece. Reads and writes have a slot.
    pub fn first(&self, slot: Option<Slot>) -> Operation {
        match (self, slot) {
            (Self::Read(_, read), Some(slot)) => read.next(slot),
            (Self::Write(_, write), Some(slot)) => write.next(slot),
            (Self::Fsync(_, data_only), None) => Operation::Fsync { data_only: *data_only },
            (Self::InPieces(_, pieces), None) => pieces.next(),
            (Self::Stat(..), None) => Operation::Stat,
            (Self::Truncate(_, size), None) => Operation::Truncate { size: *size },
            (Self::Extents(_, Range { offset, length }), None) => {
                Operation::Extents { offset: *offset, length: *length }
            }
            (Self::Copy(copy), None) => copy.next(),
            (Self::Checksum(_, checksum), None) => checksum.next(),
            (Self::Lock(_, lock), None) => Operation::Lock(*lock),
            (work, slot) => unreachable!("{work:?} cannot begin with {slot:?}"),
        }
    }

    /// Has it end early if it is done in pieces: nobody wants it any more.
    pub fn stop(&mut self) {
        match self {
            Self::InPieces(_, pieces) => pieces.is_stopped = true,
            Self::Copy(copy) => copy.is_stopped = true,
            Self::Checksum(_, checksum) => checksum.is_stopped = true,
            _ => {}
        }
    }

    /// What comes of the end of an operation. Not for opens, whose end is the session's business.
    pub fn completed(&mut self, completion: Completion) -> Step {
        let Completion { result, outcome, .. } = completion;
        match (self, result, outcome) {
            (Self::Read(_, read), _, Outcome::WouldBlock(range)) => Step::Blocking(read.next(range.slot)),
            (Self::Write(_, write), _, Outcome::WouldBlock(range)) => Step::Blocking(write.next(range.slot)),
            (Self::Read(_, read), Ok(n), Outcome::Slot(range)) => {
                if !read.advance(n as usize) {
                    return Step::Again(read.next(range.slot));
                }
                Step::Done(data(read.answer(range.slot)))
            }
            (Self::Write(_, write), Ok(n), Outcome::Slot(range)) => {
                write.done += n as usize;
                if write.done >= write.len() {
                    return Step::Done(success(write.range.length));
                }
                if n == 0 {
                    return Step::Done(write.cut_short(libc::EIO));
                }
                Step::Again(write.next(range.slot))
            }
            // Cancelled means that nothing was done; of this a part was.
            (Self::Write(_, write), Err(libc::ECANCELED), Outcome::Slot(range)) if write.done > 0 => {
                Step::Again(write.next(range.slot))
            }
            // As the kernel: what was done comes first, and the error with whoever goes on from there.
            (Self::Write(_, write), Err(errno), _) => Step::Done(write.cut_short(errno)),
            (Self::Read(_, read), Err(errno), Outcome::Slot(range))
                if errno != libc::ECANCELED && read.has_answer() =>
            {
                Step::Done(data(read.answer(range.slot)))
            }
            (Self::InPieces(_, pieces), result, outcome) => match pieces.advance(result, &outcome) {
                Ok(true) => Step::Again(pieces.next()),
                Ok(false) => Step::Done(success(0)),
                Err(errno) => Step::Done(failure_after(pieces.done, pieces.name(), errno)),
            },
            (Self::Stat(file, result), Ok(_), Outcome::Stat(info)) => {
                Step::Done(Response { result: *result, ..status_of(file, *info) })
            }
            // As it is now. What was lost before this fsync has changed it, and a client that has written
            // before that knows another one; so it notices also if another file's fsync has failed while
            // this one ran. It cannot know the new one yet, for it is new since this fsync began.
            (Self::Fsync(file, _), Ok(_), _) => Step::Done(success(file.open.verifier.get())),
            (Self::Close | Self::Truncate(..), Ok(_), _) => Step::Done(success(0)),
            (Self::Extents(..), Ok(_), Outcome::Extents(extents, end)) => {
                Step::Done(Response { body: extents.as_bytes().into(), ..success(end) })
            }
            (Self::Copy(copy), Ok(n), _) => copy.advance(n.into()),
            // As of a write: what was done comes first.
            (Self::Copy(copy), Err(errno), _) => {
                Step::Done(copy.cut_short().unwrap_or_else(|| storage_failure("Copying", errno)))
            }
            (Self::Checksum(_, checksum), Ok(n), Outcome::Checksum(next)) => checksum.advance(n.into(), next),
            (Self::Lock(..), Ok(_), Outcome::Locked(true)) => Step::Done(success(0)),
            (Self::Lock(..), Ok(_), Outcome::Locked(false)) => Step::Done(locked_by_another()),
            (work, Err(errno), _) => Step::Done(storage_failure(work.name(), errno)),
            (work, Ok(n), outcome) => unreachable!("{work:?} ended with {n} and {outcome:?}"),
        }
    }

    /// For an error message.
    fn name(&self) -> &'static str {
        match self {
            Self::Read(..) => "Reading",
            Self::Write(..) => "Writing",
            Self::Fsync(..) => "Flushing",
            Self::InPieces(_, pieces) => pieces.name(),
            Self::Stat(..) => "Asking for the status",
            Self::Open(_) => "Opening",
            Self::Close => "Closing",
            Self::Truncate(..) => "Truncating",
            Self::Extents(..) => "Looking for data",
            Self::Copy(_) => "Copying",
            Self::Checksum(..) => "Reading for a checksum",
            Self::Lock(..) => "Locking",
            Self::Path(_) => "The operation on the path",
            Self::ListNext(..) | Self::ListExports(_) => "Listing",
        }
    }
}

/// The answer that brings a file's status.
pub fn status_of(file: &WorkerFile, info: FileInfo) -> Response {
    let mut status = info.status;
    status.direct_align = file.open.alignment.into();
    status.identity = file.open.identity;
    status.verifier = file.open.verifier.get().into();
    Response { status: Status::OK, result: 0, body: status.as_bytes().into(), data: None }
}

fn no_body() -> Body {
    Body::default()
}

/// The answer that brings data.
fn data(range: SlotRange) -> Response {
    Response { status: Status::OK, result: range.len as u64, body: no_body(), data: Some(range) }
}

/// The answer to what succeeded.
pub fn success(result: u64) -> Response {
    Response { status: Status::OK, result, body: no_body(), data: None }
}

/// The answer to a lock that conflicts with another one.
fn locked_by_another() -> Response {
    let text = "Another open file has a lock that conflicts: of a client, or of a program on the server's \
                host (flock). Try again later.";
    failure(Status { retryable: true, ..Status::storage(libc::EAGAIN) }, text)
}

/// The answer to a request that a server which shuts down does not take.
pub fn shutting_down() -> Response {
    failure(Status::transport(libc::ESHUTDOWN), "The server is shutting down. Connect again later.")
}

/// The answer to what was cancelled before anything was done.
pub fn cancelled() -> Response {
    failure(Status::storage(libc::ECANCELED), "The request was cancelled.")
}

/// The answer to what failed, with an error message for a human.
pub fn failure(status: Status, text: &str) -> Response {
    Response { status, result: 0, body: message::clipped(text).as_bytes().into(), data: None }
}

/// The answer to what the file or device failed.
pub fn storage_failure(what: &str, errno: i32) -> Response {
    failure(Status::storage(errno), &format!("{what} failed on the server: {}", reason(errno)))
}

/// The end of an error message: what the errno says, and the remedy.
fn reason(errno: i32) -> String {
    let error = std::io::Error::from_raw_os_error(errno);
    match errno {
        libc::EAGAIN => format!(
            "{error}. It may have no thread for this: try again later, or raise its limit on processes with \
             `ulimit -u` or TasksMax=."
        ),
        libc::ESTALE => format!(
            "{error}. The server's operator has changed or removed its export, or the file system has lost \
             the file: open it again."
        ),
        _ => format!("{error}."),
    }
}

/// The answer to what failed when a part of it was done: the result is that part's length.
fn failure_after(done: u64, what: &str, errno: i32) -> Response {
    let text = format!("{what} failed on the server after {done} bytes: {}", reason(errno));
    Response { result: done, ..failure(Status::storage(errno), &text) }
}

#[cfg(test)]
mod tests {
    use raio_transport::memory::Arena;

    use super::*;
    use crate::engine::Lanes;
    use crate::pool::Pool;
    use crate::session::Access;
    use crate::volume::{Memory, Null, Volume};

    fn slot(len: usize) -> Slot {
        Arena::new(len, len).unwrap().alloc(len).unwrap()
    }

    fn file() -> Rc<WorkerFile> {
        let open = OpenFile::of_volume(Null::new(0), Access { read: true, write: true });
        Rc::new(WorkerFile::new(FileHandle(1), Arc::new(open)))
    }

    fn range(offset: u64, length: u64) -> Range {
        Range::new(offset, length).unwrap()
    }

    /// The slot and range of an operation, to be given back in a completion.
    fn taken(operation: Operation) -> (SlotRange, u64) {
        match operation {
            Operation::Read { target: range, offset } | Operation::Write { source: range, offset } => {
                (range, offset)
            }
            other => panic!("{other:?}"),
        }
    }

    fn completion(result: Result<u32, i32>, outcome: Outcome) -> Completion {
        Completion { key: 0, result, outcome }
    }

    #[test]
    fn ranges_that_wrap_or_are_negative_do_not_exist() {
        let max = i64::MAX as u64;
        assert!(Range::new(max, 0).is_some() && Range::new(0, max).is_some());
        assert!(Range::new(max, 1).is_none());
        assert!(Range::new(max + 1, 0).is_none());
        assert!(Range::new(1, u64::MAX).is_none());
        assert!(Range::new(u64::MAX, u64::MAX).is_none());
        assert!(range(max - 1, 1).widened(4096).is_none());
        assert!(range(4096, 512).is_aligned(512) && !range(4096, 512).is_aligned(4096));
    }

    #[test]
    fn a_short_read_goes_on_until_the_end_of_the_file() {
        let mut work = Work::Read(file(), Read::new(range(100, 50), 1).unwrap());
        let (target, offset) = taken(work.first(Some(slot(4096))));
        assert_eq!((target.start, target.len, offset), (0, 50, 100));
        let Step::Again(next) = work.completed(completion(Ok(20), Outcome::Slot(target))) else {
            panic!("it ended")
        };
        let (target, offset) = taken(next);
        assert_eq!((target.start, target.len, offset), (20, 30, 120));
        let Step::Done(response) = work.completed(completion(Ok(0), Outcome::Slot(target))) else {
            panic!("it goes on")
        };
        let data = response.data.unwrap();
        assert_eq!((response.result, data.start, data.len), (20, 0, 20));
    }

    #[test]
    fn an_unaligned_direct_read_answers_with_the_middle_of_what_it_read() {
        for (offset, length, read, answer) in [
            (4100, 10, 4096, (4, 10)),
            // The end of the file lies within, before, or at the beginning of what was asked for.
            (4100, 10, 8, (4, 4)),
            (4100, 10, 4, (4, 0)),
            (4100, 10, 2, (4, 0)),
            (4100, 10, 0, (4, 0)),
            (4096, 4096, 4096, (0, 4096)),
            (8191, 2, 8192, (4095, 2)),
        ] {
            let mut work = Work::Read(file(), Read::new(range(offset, length), 4096).unwrap());
            let (target, _) = taken(work.first(Some(slot(work.slot_len()))));
            let Step::Done(response) = work.completed(completion(Ok(read), Outcome::Slot(target))) else {
                panic!("{offset} {length} {read} goes on")
            };
            let data = response.data.unwrap();
            assert_eq!((data.start, data.len), answer, "{offset} {length} {read}");
            assert_eq!(response.result, answer.1 as u64);
        }
    }

    #[test]
    fn a_direct_read_that_is_cut_at_the_alignment_goes_on() {
        let mut work = Work::Read(file(), Read::new(range(1, 8000), 512).unwrap());
        assert_eq!(work.slot_len(), 8192);
        let (target, _) = taken(work.first(Some(slot(8192))));
        let Step::Again(next) = work.completed(completion(Ok(512), Outcome::Slot(target))) else {
            panic!("it ended")
        };
        assert_eq!(taken(next).1, 512);
    }

    #[test]
    fn a_short_write_goes_on_until_all_is_written_and_reports_what_was_done_before_an_error() {
        let mut work = Work::Write(file(), Write::new(range(10, 100)));
        let (source, _) = taken(work.first(Some(slot(4096))));
        let Step::Again(next) = work.completed(completion(Ok(60), Outcome::Slot(source))) else {
            panic!("it ended")
        };
        let (source, offset) = taken(next);
        assert_eq!((source.start, source.len, offset), (60, 40, 70));
        let Step::Done(response) = work.completed(completion(Err(libc::ENOSPC), Outcome::Slot(source)))
        else {
            panic!("it goes on")
        };
        assert_eq!((response.status, response.result), (Status::OK, 60));
        assert!(response.data.is_none());

        let mut work = Work::Write(file(), Write::new(range(10, 100)));
        let (source, _) = taken(work.first(Some(slot(4096))));
        let Step::Done(response) = work.completed(completion(Err(libc::ENOSPC), Outcome::Slot(source)))
        else {
            panic!("it goes on")
        };
        assert_eq!(response.status, Status::storage(libc::ENOSPC));

        let mut work = Work::Write(file(), Write::new(range(10, 100)));
        let (source, _) = taken(work.first(Some(slot(4096))));
        let Step::Done(response) = work.completed(completion(Ok(100), Outcome::Slot(source))) else {
            panic!("it goes on")
        };
        assert_eq!((response.status, response.result), (Status::OK, 100));
    }

    #[test]
    fn what_was_done_before_there_was_no_thread_is_reported() {
        let mut work = Work::Write(file(), Write::new(range(0, 100)));
        let (source, _) = taken(work.first(Some(slot(4096))));
        let Step::Again(next) = work.completed(completion(Ok(60), Outcome::Slot(source))) else {
            panic!("it ended")
        };
        let step = work.completed(completion(Err(libc::EAGAIN), Outcome::Slot(taken(next).0)));
        let Step::Done(response) = step else { panic!("{step:?}") };
        assert_eq!((response.status, response.result), (Status::OK, 60));

        let mut work = Work::InPieces(file(), Pieces::new(RangeCommand::WriteZeroes, range(0, 100)));
        work.first(None);
        work.completed(completion(Ok(0), Outcome::Cleared(60)));
        let step = work.completed(completion(Err(libc::EAGAIN), Outcome::None));
        let Step::Done(response) = step else { panic!("{step:?}") };
        assert_eq!((response.status, response.result), (Status::storage(libc::EAGAIN), 60));
    }

    #[test]
    fn a_range_is_zeroed_piece_by_piece() {
        let mut work = Work::InPieces(file(), Pieces::new(RangeCommand::WriteZeroes, range(100, 1000)));
        let Operation::WriteZeroes { offset: 100, length: 1000 } = work.first(None) else {
            panic!("it begins otherwise")
        };
        let step = work.completed(completion(Ok(0), Outcome::Cleared(300)));
        let Step::Again(Operation::WriteZeroes { offset: 400, length: 700 }) = step else {
            panic!("{step:?}")
        };
        let Step::Done(response) = work.completed(completion(Ok(0), Outcome::Cleared(700))) else {
            panic!("it goes on")
        };
        assert_eq!((response.status, response.result), (Status::OK, 0));
    }

    #[test]
    fn zeroing_that_fails_or_is_stopped_tells_how_much_is_done() {
        for is_stopped in [false, true] {
            let mut work =
                Work::InPieces(file(), Pieces::new(RangeCommand::WriteZeroes, range(100, 1 << 40)));
            work.first(None);
            if is_stopped {
                work.stop();
            }
            let mut step = work.completed(completion(Ok(0), Outcome::Cleared(500)));
            if !is_stopped {
                step = work.completed(completion(Err(libc::ENOSPC), Outcome::None));
            }
            let Step::Done(response) = step else { panic!("it goes on") };
            let errno = if is_stopped { libc::ECANCELED } else { libc::ENOSPC };
            assert_eq!((response.status.errno, response.result), (errno, 500));
        }
    }

    /// A copy of this many bytes from 100 to 0, and what an end of a piece makes of it.
    fn copy(length: u64) -> Work {
        let memory = Memory::new(4096, Lanes::new(Pool::without_threads())).unwrap();
        let descriptor = Arc::clone(memory.file_descriptor().unwrap());
        let copy = Copying::new((file(), descriptor, range(100, length)), (file(), 0));
        Work::Copy(Box::new(copy))
    }

    fn ended(step: Step) -> (i32, u64) {
        let Step::Done(response) = step else { panic!("it goes on: {step:?}") };
        (response.status.errno, response.result)
    }

    #[test]
    fn a_copy_goes_on_piece_by_piece_and_says_how_much_is_done() {
        let piece = Ok(PIECE_BYTES as u32);
        let length = 3 * PIECE_BYTES;
        let mut work = copy(length);
        assert_eq!((work.data_len(), work.changes().unwrap().1), (PIECE_BYTES, 0..length));
        assert!(matches!(work.completed(completion(piece, Outcome::None)), Step::Piece));
        let Operation::Copy { source_offset, offset, length: left, .. } = work.first(None) else {
            panic!("it begins otherwise")
        };
        assert_eq!((source_offset, offset, left), (100 + PIECE_BYTES, PIECE_BYTES, 2 * PIECE_BYTES));
        // What was done comes first, and then the error or the end of the source.
        assert_eq!(ended(work.completed(completion(Err(libc::ENOSPC), Outcome::None))), (0, PIECE_BYTES));
        assert_eq!(work.partly_done().unwrap().result, PIECE_BYTES);
        assert_eq!(ended(work.completed(completion(Ok(0), Outcome::None))), (0, PIECE_BYTES));
        let mut work = copy(length);
        assert!(work.partly_done().is_none() && work.abandoned().status.errno == libc::ECANCELED);
        assert_eq!(ended(work.completed(completion(Err(libc::EIO), Outcome::None))), (libc::EIO, 0));
        let mut work = copy(length);
        work.stop();
        assert_eq!(ended(work.completed(completion(piece, Outcome::None))), (0, PIECE_BYTES));
        let mut work = copy(10);
        assert_eq!(
            (work.data_len(), ended(work.completed(completion(Ok(10), Outcome::None)))),
            (10, (0, 10))
        );
    }

    #[test]
    fn a_checksum_ends_at_the_end_of_the_file_and_is_nothing_if_it_is_stopped() {
        let begin = || {
            let checksum = Checksum::new(raio_transport::protocol::FLAG_BLAKE3).unwrap();
            Work::Checksum(file(), Box::new(Checksumming::new(range(7, 2 * PIECE_BYTES), checksum)))
        };
        let piece = |work: &Work, n: u64| {
            let Operation::Checksum { checksum, .. } = work.first(None) else { panic!("{work:?}") };
            completion(Ok(n as u32), Outcome::Checksum(checksum))
        };
        let mut work = begin();
        let first = piece(&work, PIECE_BYTES);
        assert!(matches!(work.completed(first), Step::Piece));
        let Operation::Checksum { offset, length, .. } = work.first(None) else { panic!("{work:?}") };
        assert_eq!((offset, length), (7 + PIECE_BYTES, PIECE_BYTES));
        let last = piece(&work, 5);
        assert_eq!(ended(work.completed(last)), (0, PIECE_BYTES + 5));
        let mut work = begin();
        work.stop();
        let first = piece(&work, PIECE_BYTES);
        assert_eq!(ended(work.completed(first)), (libc::ECANCELED, 0));
    }

    #[test]
    fn a_lock_that_conflicts_may_be_tried_again() {
        let mut work = Work::Lock(file(), FlockOperation::NonBlockingLockShared);
        let Step::Done(response) = work.completed(completion(Ok(0), Outcome::Locked(false))) else {
            panic!("it goes on")
        };
        assert_eq!((response.status.errno, response.status.retryable), (libc::EAGAIN, true));
        assert_eq!(ended(work.completed(completion(Ok(0), Outcome::Locked(true)))), (0, 0));
    }
}
