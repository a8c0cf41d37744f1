//! A context: one connection with its own queue of operations, used by one thread at a time.
//!
//! An operation owns its buffers from [`Context::submit`] to the [`Completion`] that gives them back. Up to
//! `maxevents` are in a context; of those the server has as many as it granted, the rest wait here in order.
//! Reads into a lent buffer wait apart while all buffers are lent out. The fast path neither allocates nor
//! locks: an operation is a slot of a table, a submission one send, a wake-up one receive.
//!
//! Flow control: the server grants credits, and operations beyond them are queued here; a full context
//! rejects operations with EAGAIN, which is the program's backpressure. Data is zero-copy where the transport
//! has it: RDMA places it in registered memory ([`Context::register`]), and large data over TCP is received
//! into the operation's buffers.
//!
//! A read or write that is longer than the server's largest request is a [`Split`]. It takes its place in the
//! queue once for each of its parts, so that others are sent between them.

mod cancel;
mod closes;
mod parts;
mod paths;
mod timeouts;
mod unclosed;

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use raio_transport::Status;
use raio_transport::busy_poll::BusyPoll;
use raio_transport::channel::Channel;
use raio_transport::error::Violation;
use raio_transport::memory::{Buffers, Region};
use raio_transport::protocol::{Command, Opcode};
use raio_transport::resume::LOCK_LOST;
use raio_transport::transport::{Bulk, NotSent, Reply, SendOptions};
use rustix::event::{PollFd, PollFlags, Timespec};

use self::parts::SentPart;
use self::paths::Extra;
use crate::error::{Error, not_supported, protocol_error, unsupported};
use crate::file::{File, FileRefs};
use crate::lent_pool::LentPool;
use crate::operation::{Completion, Lock, Operation, OperationCrc, Rejected, Stats, SubmitOptions, Ticket};
use crate::poller::Poller;
use crate::session::{Session, Shared};
use crate::split::Split;
use crate::trace::{TraceId, Tracer};
use crate::tuning::{
    BURST_MAX, LENT_BYTES_MAX, MAXEVENTS_MAX, POLLS_PER_YIELD, RESUME_GRACE, SPIN_EACH, SPIN_MULTIPLIER_MAX,
};

/// The tag of a cancel request.
const TAG_CANCEL: u64 = u64::MAX;
/// The tag of cancel requests for operations that have timed out.
const TAG_TIMED_OUT: u64 = u64::MAX - 1;
/// The slot of a part whose operation is over.
const ABANDONED: u32 = u32::MAX;
/// The first tag of parts of operations; operations have the index of their slot.
const TAG_PARTS: u64 = 1 << 32;
/// The file of operations that have none.
const NO_FILE: u32 = u32::MAX;

/// One connection of a session, with its queue of operations.
///
/// ```no_run
/// use raio::{Buffer, Buffers, Operation, Options, Session};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let session = Session::connect("raio://127.0.0.1", &Options::default())?;
/// let file = session.open("/scratch/data", libc::O_RDONLY, 0)?;
/// let mut context = session.context(32)?;
/// for n in 0..32 {
///     let buffers = Buffers::One(Buffer::Owned(vec![0; 4096].into()));
///     let read = Operation::Read { offset: n * 4096, buffers };
///     context.submit(&file, read, n).map_err(|rejected| rejected.error)?;
/// }
/// context.flush();
/// let mut left = 32;
/// while left > 0 {
///     context.wait(1, usize::MAX, None)?;
///     while let Some(completion) = context.next() {
///         println!("block {}: {} bytes", completion.token, completion.result?);
///         left -= 1;
///     }
/// }
/// # Ok(())
/// # }
/// ```
pub struct Context {
    session: Arc<Shared>,
    channel: Channel,
    /// Connections of the channel whose effects on the files are known here.
    connections: u64,
    maxevents: usize,
    request_timeout: Duration,
    /// Grows up to `maxevents`.
    slots: Vec<OperationSlot>,
    free: Vec<u32>,
    /// Slots that wait for a credit, FIFO.
    queued: VecDeque<u32>,
    /// Slots that wait for a lent buffer, FIFO.
    waiting_lent: VecDeque<u32>,
    /// Completed slots that are not collected, FIFO.
    done: VecDeque<u32>,
    /// Slots submitted and not completed.
    in_flight: usize,
    /// Parts of operations that were sent and are not over: at most as many as there are credits.
    parts: Vec<Option<SentPart>>,
    /// Kept for their memory.
    replies: Vec<Reply>,
    body: Vec<u8>,
    /// The answer to a cancel request has come.
    cancel_answered: bool,
    /// Operations that have a timeout, by the time at which it passes.
    timeouts: BTreeSet<(Instant, u32)>,
    /// Tags of requests that have timed out, and are to be cancelled.
    cancels: Vec<u64>,
    /// Such requests that the server has not answered.
    cancels_sent: usize,
    files: FileRefs,
    lent: LentPool,
    poller: Option<Poller>,
    /// With `RAIO_TRACE` alone.
    tracer: Option<Box<Tracer>>,
    spin: BusyPoll,
    /// Completions collected since it last yielded the core, without having waited.
    burst: u32,
    stats: Stats,
}

#[derive(Debug)]
struct OperationSlot {
    generation: u32,
    token: u64,
    file: u32,
    opcode: Opcode,
    is_lent: bool,
    /// Being cancelled: [`Context::cancel`] collects it.
    cancelling: bool,
    /// When its timeout passes.
    deadline: Option<Instant>,
    /// It has passed.
    timed_out: bool,
    /// Signalled when it completes.
    eventfd: Option<Arc<OwnedFd>>,
    length: u64,
    /// How its requests are sent: with checksums of their own, and which a write's is.
    options: SendOptions,
    /// Of an fsync: what it is to make durable ([`FileRefs::take_unstable`]). Of a write, and the like: the
    /// file's verifier when it was sent.
    unstable: u64,
    /// When it was submitted, and its request once that was sent: for the trace.
    submitted_ns: u64,
    request: Option<TraceId>,
    /// Of operations that answer more than a number. Reads and writes have none.
    extra: Option<Box<Extra>>,
    state: OperationState,
}

/// An operation that is to take a slot.
struct New {
    /// Its index, or [`NO_FILE`].
    file: u32,
    opcode: Opcode,
    request: Request,
    bulk: Bulk,
    length: u64,
    is_lent: bool,
    extra: Option<Box<Extra>>,
}

/// What is sent of an operation.
#[derive(Debug)]
enum Request {
    Command(Command<'static>),
    /// A command with a path, in wire form.
    Encoded(Box<[u8]>),
}

#[derive(Debug)]
enum OperationState {
    Free,
    /// For a credit, or for a lent buffer.
    Queued(Request, Bulk),
    Sent,
    /// Longer than a request may be: some of its parts are sent, others wait.
    Split(Box<Split>),
    /// Its completion is elsewhere, and its request is still with the server.
    Abandoned,
    Done(Completion),
}

impl OperationSlot {
    /// Sets the state. On the fast path there is nothing to drop, which is found out here without a call.
    #[inline(always)]
    fn set_state(&mut self, state: OperationState) {
        match std::mem::replace(&mut self.state, state) {
            empty @ (OperationState::Free | OperationState::Sent) => std::mem::forget(empty),
            before => drop(before),
        }
    }

    fn is_unacknowledged_write(&self) -> bool {
        !matches!(self.state, OperationState::Free | OperationState::Done(_))
            && self.opcode.operation().is_recorded
    }

    /// The operation's name in a trace.
    fn name(&self) -> &'static str {
        self.opcode.operation().name
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("maxevents", &self.maxevents)
            .field("in_flight", &self.in_flight)
            .field("done", &self.done.len())
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Makes a context for at most `maxevents` operations in flight (1 to [`MAXEVENTS_MAX`]). It opens a
    /// connection of its own.
    pub fn context(&self, maxevents: usize) -> Result<Context, Error> {
        Context::new(Arc::clone(self.shared()), maxevents)
    }
}

impl Context {
    fn new(session: Arc<Shared>, maxevents: usize) -> Result<Self, Error> {
        if !(1..=MAXEVENTS_MAX).contains(&maxevents) {
            return Err(Error::call(
                libc::EINVAL,
                format!(
                    "A context cannot have {maxevents} operations in flight. Pass a number from 1 to \
                     {MAXEVENTS_MAX}."
                ),
            ));
        }
        session.check_process()?;
        if !session.is_open() {
            return Err(Error::call(libc::EBADF, "The session was stopped. Open a new one."));
        }
        let options = session.options();
        let wanted = match options.queue_depth {
            0 => maxevents as u32,
            depth => depth.min(maxevents as u32),
        };
        let deadline = Instant::now() + options.connect_timeout;
        let mut channel = Shared::connect(&session, wanted, deadline)?;
        let request_timeout = channel.request_timeout();
        let tracer = Tracer::for_context(&mut channel, deadline)?;
        let spin = BusyPoll::new(options.spin);
        Ok(Self {
            session,
            channel,
            connections: 1,
            maxevents,
            request_timeout,
            slots: Vec::new(),
            free: Vec::new(),
            queued: VecDeque::new(),
            waiting_lent: VecDeque::new(),
            done: VecDeque::new(),
            in_flight: 0,
            parts: Vec::new(),
            replies: Vec::new(),
            body: Vec::new(),
            cancel_answered: false,
            timeouts: BTreeSet::new(),
            cancels: Vec::new(),
            cancels_sent: 0,
            files: FileRefs::default(),
            lent: LentPool::new(maxevents),
            poller: None,
            tracer,
            spin,
            burst: 0,
            stats: Stats::default(),
        })
    }

    /// Registers a region of the caller's memory for zero-copy I/O over RDMA. Over TCP it changes nothing.
    pub fn register(&mut self, region: &Region) -> Result<(), Error> {
        self.check_process()?;
        Ok(self.channel.register_region(region)?)
    }

    /// Unregisters it. No operation on the region's memory may be in flight
    /// ([`Region::in_use`]).
    pub fn unregister(&mut self, region: &Region) {
        if !self.session.is_inherited() {
            self.channel.unregister_region(region);
        }
    }

    /// The largest read or write that is one request. A longer one is sent in parts.
    pub fn io_bytes_max(&self) -> usize {
        self.channel.grant().data_bytes_max as usize
    }

    /// Whether it rejects operations until completions are collected.
    pub fn is_full(&self) -> bool {
        self.in_flight + self.done.len() >= self.maxevents
    }

    /// Why the connection ended, if it has.
    pub fn failure(&self) -> Option<Error> {
        self.channel.failure().map(Error::not_connected)
    }

    /// While the connection is lost and being made again: a message for people, that says since when, and
    /// what stands in the way. Operations are taken meanwhile, and wait.
    pub fn reconnecting(&self) -> Option<String> {
        if self.channel.is_connected() { None } else { self.channel.recovery() }
    }

    /// What cannot be done now. If the context is connecting again, that may be why.
    #[cold]
    pub(crate) fn not_now(&self, text: &str) -> Error {
        match self.reconnecting() {
            Some(recovery) => Error::call(libc::EAGAIN, format!("{text} {recovery}")),
            None => Error::call(libc::EAGAIN, text),
        }
    }

    /// Has one added to an eventfd when an operation ends, as soon as the library hears of it: within
    /// `submit`, `wait`, `cancel` and `release`. Not for one that [`Context::cancel`] returns. An eventfd
    /// that is full stays as it is.
    pub fn notify(&mut self, ticket: Ticket, eventfd: Arc<OwnedFd>) {
        let Some(slot) = self.slots.get_mut(ticket.index as usize) else { return };
        match slot.state {
            _ if slot.generation != ticket.generation => {}
            OperationState::Done(_) => signal(&eventfd),
            _ => slot.eventfd = Some(eventfd),
        }
    }

    /// Queues an operation; [`Context::flush`] and [`Context::wait`] send it. Never blocks. `token` comes
    /// back in the completion.
    pub fn submit(&mut self, file: &File, operation: Operation, token: u64) -> Result<Ticket, Box<Rejected>> {
        match self.check(file, &operation) {
            Ok(()) => Ok(self.enqueue(file, operation, token, SendOptions::PLAIN, None)),
            Err(error) => Err(Box::new(Rejected { operation, error })),
        }
    }

    /// The same, with options of this operation's own.
    pub fn submit_with(
        &mut self,
        file: &File,
        operation: Operation,
        options: SubmitOptions,
        token: u64,
    ) -> Result<Ticket, Box<Rejected>> {
        let ticket = match options.crc {
            OperationCrc::AsSession => self.submit(file, operation, token)?,
            OperationCrc::Computed => self.submit_with_crc(file, operation, None, token)?,
            OperationCrc::Given(crc) => self.submit_with_crc(file, operation, Some(crc), token)?,
        };
        if let Some(timeout) = options.timeout {
            self.set_timeout(ticket, timeout);
        }
        Ok(ticket)
    }

    /// See [`OperationCrc`]. `crc` is that of a write's data; None: it is computed now.
    pub(crate) fn submit_with_crc(
        &mut self,
        file: &File,
        operation: Operation,
        crc: Option<u32>,
        token: u64,
    ) -> Result<Ticket, Box<Rejected>> {
        match self.check(file, &operation) {
            Ok(()) => {
                let crc = match &operation {
                    Operation::Write { buffers, .. } => crc.unwrap_or_else(|| paths::crc_of(buffers)),
                    _ => 0,
                };
                let options = SendOptions::with_crc(Some(crc));
                let failure = options.why_not_granted(self.channel.grant()).map(not_supported);
                Ok(self.enqueue(file, operation, token, options, failure))
            }
            Err(error) => Err(Box::new(Rejected { operation, error })),
        }
    }

    /// Takes an operation that has failed already: its completion says `failure`.
    pub(crate) fn submit_failed(
        &mut self,
        file: &File,
        operation: Operation,
        token: u64,
        failure: Error,
    ) -> Result<Ticket, Box<Rejected>> {
        match self.check(file, &operation) {
            Ok(()) => Ok(self.enqueue(file, operation, token, SendOptions::PLAIN, Some(failure))),
            Err(error) => Err(Box::new(Rejected { operation, error })),
        }
    }

    /// How many operations it takes before completions must be collected.
    pub(crate) fn room(&self) -> usize {
        self.maxevents - self.in_flight - self.done.len()
    }

    /// A forked child may not touch the connection of its parent.
    fn check_process(&self) -> Result<(), Error> {
        if self.session.is_inherited() {
            return Err(Error::call(
                libc::EINVAL,
                "The context belongs to the parent process. Open a session and create a context in the \
                 child.",
            ));
        }
        Ok(())
    }

    /// Whether an operation can be taken now.
    #[inline(always)]
    fn check_room(&self) -> Result<(), Error> {
        self.check_process()?;
        if let Some(failure) = self.channel.failure() {
            return Err(Error::not_connected(failure));
        }
        if self.is_full() {
            return Err(self.not_now(
                "The context is full. Collect completions first, or create it with a larger maxevents.",
            ));
        }
        Ok(())
    }

    fn check(&self, file: &File, operation: &Operation) -> Result<(), Error> {
        self.check_room()?;
        if file.inner().is_closing() || !Arc::ptr_eq(file.inner().session(), &self.session) {
            return Err(Error::call(
                libc::EBADF,
                "The file is closed or belongs to another session. Open it in the context's session.",
            ));
        }
        let (offset, length) = match operation {
            Operation::Read { offset, buffers } | Operation::Write { offset, buffers } => {
                (*offset, buffers.len() as u64)
            }
            Operation::ReadLent { offset, length } => (*offset, *length as u64),
            Operation::Fsync { .. } | Operation::Stat | Operation::Lock(_) | Operation::Close => (0, 0),
            Operation::Truncate { size } => (*size, 0),
            Operation::Copy { offset, source, source_offset, length } => {
                let source = source.inner();
                if source.is_closing() || !Arc::ptr_eq(source.session(), &self.session) {
                    return Err(Error::call(
                        libc::EBADF,
                        "The file to copy from is closed or belongs to another session. Open it in the \
                         context's session.",
                    ));
                }
                check_range(*source_offset, *length)?;
                check_range(*offset, *length)?;
                (*offset, 0)
            }
            Operation::Discard { offset, length }
            | Operation::Extents { offset, length }
            | Operation::WriteZeroes { offset, length }
            | Operation::Checksum { offset, length, .. }
            | Operation::Allocate { offset, length, .. } => {
                check_range(*offset, *length)?;
                (*offset, 0)
            }
        };
        if offset > i64::MAX as u64 {
            return Err(Error::call(
                libc::EINVAL,
                "The offset is negative. Pass one counted from the start of the file.",
            ));
        }
        if length > self.io_bytes_max() as u64 {
            return check_long(operation, offset, length);
        }
        Ok(())
    }

    fn enqueue(
        &mut self,
        file: &File,
        operation: Operation,
        token: u64,
        options: SendOptions,
        mut failure: Option<Error>,
    ) -> Ticket {
        if let Operation::Close = operation {
            return self.enqueue_close(file, token, options, failure);
        }
        let handle = file.inner().handle();
        let channel = &self.channel;
        // Of operations that a server may not know. Reads and writes do not look.
        let mut need = |opcode| failure = failure.take().or_else(|| unsupported(opcode, channel));
        let mut extra = None;
        let file_index = self.files.index_of(file.inner(), || channel.verifier(handle));
        let (command, bulk, length, is_lent) = match operation {
            Operation::Read { offset, buffers } => {
                // Of one that is longer than a request may be the command is not sent.
                let length = buffers.len();
                let command = Command::Read { file: handle, offset, length: length as u32 };
                (command, Bulk::In(buffers), length as u64, false)
            }
            Operation::ReadLent { offset, length } => {
                let length = length as u32;
                (Command::Read { file: handle, offset, length }, Bulk::None, length.into(), true)
            }
            Operation::Write { offset, buffers } => {
                // Of one that is longer than a request may be the command is not sent.
                let length = buffers.len();
                let command = Command::Write { file: handle, offset, length: length as u32 };
                (command, Bulk::Out(buffers), length as u64, false)
            }
            Operation::Fsync { data_only } => {
                (Command::Fsync { file: handle, data_only }, Bulk::None, 0, false)
            }
            Operation::Discard { offset, length } => {
                need(Opcode::Discard);
                (Command::Discard { file: handle, offset, length }, Bulk::None, length, false)
            }
            Operation::WriteZeroes { offset, length } => {
                need(Opcode::WriteZeroes);
                (Command::WriteZeroes { file: handle, offset, length }, Bulk::None, length, false)
            }
            Operation::Allocate { offset, length, keep_size } => {
                need(Opcode::Allocate);
                (Command::Allocate { file: handle, offset, length, keep_size }, Bulk::None, length, false)
            }
            Operation::Truncate { size } => {
                need(Opcode::Truncate);
                (Command::Truncate { file: handle, size }, Bulk::None, 0, false)
            }
            Operation::Stat => (Command::Stat(handle), Bulk::None, 0, false),
            Operation::Extents { offset, length } => {
                need(Opcode::Extents);
                (Command::Extents { file: handle, offset, length }, Bulk::None, length, false)
            }
            Operation::Copy { offset, source, source_offset, length } => {
                need(Opcode::Copy);
                let source = source.inner();
                let command = Command::Copy {
                    source: source.handle(),
                    offset: source_offset,
                    length,
                    destination: handle,
                    destination_offset: offset,
                };
                extra = Some(self.begin_copy(source, file_index));
                (command, Bulk::None, length, false)
            }
            Operation::Checksum { offset, length, algorithm } => {
                need(Opcode::Checksum);
                let checksum = algorithm.flag();
                extra = Some(Extra::checksum(algorithm));
                (Command::Checksum { file: handle, offset, length, checksum }, Bulk::None, length, false)
            }
            Operation::Lock(lock) => {
                need(Opcode::Lock);
                extra = Some(Extra::lock(handle, lock != Lock::Unlock));
                (Command::Lock { file: handle, lock: lock.flag() }, Bulk::None, 0, false)
            }
            Operation::Close => unreachable!("handled above"),
        };
        let (opcode, request) = (command.opcode(), Request::Command(command));
        let new = New { file: file_index, opcode, request, bulk, length, is_lent, extra };
        self.take_in(new, token, options, failure)
    }

    /// Gives an operation a slot, and sends it if that is possible now. One with a `failure` is over.
    #[inline(always)]
    fn take_in(&mut self, new: New, token: u64, options: SendOptions, failure: Option<Error>) -> Ticket {
        let (length, is_lent) = (new.length, new.is_lent);
        let has_buffers = !matches!(new.bulk, Bulk::None);
        let ticket = self.occupy(new, token, options);
        let index = ticket.index;
        if let Some(failure) = failure {
            self.complete_unsent(index, failure);
        } else if is_lent {
            self.waiting_lent.push_back(index);
            self.lend();
        } else if length > self.io_bytes_max() as u64 && has_buffers {
            self.queue_split(index);
        } else {
            self.queued.push_back(index);
        }
        self.send_queued();
        ticket
    }

    /// Gives an operation a slot.
    #[inline(always)]
    fn occupy(&mut self, new: New, token: u64, options: SendOptions) -> Ticket {
        let New { file: file_index, opcode, request, bulk, length, is_lent, extra } = new;
        let index = self.vacant_slot();
        let slot = &mut self.slots[index as usize];
        slot.token = token;
        slot.file = file_index;
        slot.opcode = opcode;
        slot.is_lent = is_lent;
        slot.cancelling = false;
        slot.timed_out = false;
        slot.length = length;
        slot.options = options;
        slot.unstable = match slot.opcode {
            Opcode::Read => 0,
            Opcode::Fsync => self.files.take_unstable(file_index),
            _ => self.files.verifier(file_index),
        };
        if let Some(tracer) = &self.tracer {
            slot.submitted_ns = tracer.now_ns();
            slot.request = None;
        }
        // There is none since its last operation has ended.
        if extra.is_some() {
            slot.extra = extra;
        }
        slot.set_state(OperationState::Queued(request, bulk));
        let ticket = Ticket { index, generation: slot.generation };
        self.in_flight += 1;
        self.stats.submitted += 1;
        self.files.operation_started(file_index);
        ticket
    }

    /// A slot that is free.
    #[inline]
    fn vacant_slot(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.slots.push(OperationSlot {
                generation: 0,
                token: 0,
                file: 0,
                opcode: Opcode::Read,
                is_lent: false,
                cancelling: false,
                deadline: None,
                timed_out: false,
                eventfd: None,
                length: 0,
                options: SendOptions::PLAIN,
                unstable: 0,
                submitted_ns: 0,
                request: None,
                extra: None,
                state: OperationState::Free,
            });
            self.slots.len() as u32 - 1
        })
    }

    /// Lends buffers to reads that wait for one, as far as there are any.
    fn lend(&mut self) {
        while self.lent.has_buffer()
            && let Some(index) = self.waiting_lent.pop_front()
        {
            let length = self.slots[index as usize].length as usize;
            let (io_bytes_max, channel) = (self.io_bytes_max(), &mut self.channel);
            let lent = self.lent.lend(length, io_bytes_max, |memory| channel.register_arena(memory));
            match lent {
                Ok(buffer) => {
                    if let OperationState::Queued(_, bulk) = &mut self.slots[index as usize].state {
                        *bulk = Bulk::In(Buffers::One(buffer));
                    }
                    if length > io_bytes_max {
                        self.queue_split(index);
                    } else {
                        self.queued.push_back(index);
                    }
                }
                Err(error) => {
                    let status = Status::storage(error.raw_os_error().unwrap_or(libc::ENOMEM));
                    let text =
                        format!("Cannot allocate a lent buffer ({error}). Release some that were collected.");
                    // It has no buffer that `complete` would take back.
                    self.slots[index as usize].is_lent = false;
                    self.complete(index, Err(Error::new(status, text)), Bulk::None, 0);
                }
            }
        }
    }

    /// Hands queued operations to the transport, as far as there are credits.
    fn send_queued(&mut self) {
        while self.channel.credits() > 0
            && let Some(index) = self.queued.pop_front()
        {
            let slot = &mut self.slots[index as usize];
            let state = std::mem::replace(&mut slot.state, OperationState::Free);
            let OperationState::Queued(request, bulk) = state else {
                slot.state = state;
                match self.send_part(index) {
                    true => continue,
                    false => break,
                }
            };
            self.body.clear();
            match &request {
                Request::Command(command) => command.encode(&mut self.body),
                Request::Encoded(command) => self.body.extend_from_slice(command),
            }
            match self.channel.send(index.into(), &self.body, bulk, slot.options) {
                Ok(id) => {
                    slot.set_state(OperationState::Sent);
                    if let Some(tracer) = &self.tracer {
                        slot.request = Some(tracer.sent(slot.name(), slot.submitted_ns, id, slot.length));
                    }
                }
                Err(NotSent(bulk)) => {
                    // The connection has ended: `poll` is about to hear of it.
                    slot.state = OperationState::Queued(request, bulk);
                    self.queued.push_front(index);
                    break;
                }
            }
        }
    }

    /// Sends what is queued, as far as the server takes it. Never blocks.
    pub fn flush(&mut self) {
        if !self.session.is_inherited() {
            self.channel.flush();
            self.sync_poller();
        }
    }

    /// Receives what has arrived. Returns whether anything has, if only a part of a response.
    fn poll(&mut self) -> bool {
        let mut replies = std::mem::take(&mut self.replies);
        let arrived = self.channel.receive(&mut replies);
        for reply in replies.drain(..) {
            self.handle_reply(reply);
        }
        self.replies = replies;
        if self.channel.connections() != self.connections {
            // After the replies: what was acknowledged before the loss had the verifiers of that time.
            let before = std::mem::replace(&mut self.connections, self.channel.connections());
            self.session.suspect();
            if let Some(tracer) = &mut self.tracer {
                tracer.reconnected(&self.channel);
            }
            if self.channel.reopened_at() > before {
                let channel = &self.channel;
                self.files.set_verifiers(|handle| channel.verifier(handle));
                // What is still in flight is sent to this server.
                for slot in self.slots.iter_mut().filter(|slot| slot.is_unacknowledged_write()) {
                    slot.unstable = self.files.verifier(slot.file);
                }
            }
            self.fail_unsupported();
            self.divide_oversized();
        }
        if !self.session.pending_closes().is_empty() {
            self.send_closes();
        }
        if !self.queued.is_empty() || !self.waiting_lent.is_empty() {
            if let Some(failure) = self.failure() {
                for index in self.queued.drain(..).chain(self.waiting_lent.drain(..)).collect::<Vec<_>>() {
                    self.complete_unsent(index, failure.clone());
                }
            } else {
                // A lent buffer comes free by a read that failed, too.
                self.lend();
                self.send_queued();
                self.channel.flush();
            }
        }
        if !self.timeouts.is_empty() {
            self.expire();
        }
        arrived
    }

    /// Completes queued operations that the server does not know, which may be older than the one before.
    #[cold]
    fn fail_unsupported(&mut self) {
        for index in std::mem::take(&mut self.queued) {
            let slot = &self.slots[index as usize];
            let no_crc = || slot.options.why_not_granted(self.channel.grant()).map(not_supported);
            match unsupported(slot.opcode, &self.channel).or_else(no_crc) {
                Some(error) => self.complete_unsent(index, error),
                None => self.queued.push_back(index),
            }
        }
    }

    fn handle_reply(&mut self, reply: Reply) {
        if reply.tag >= TAG_PARTS {
            return self.handle_part(reply);
        }
        let index = reply.tag as u32;
        let slot = &self.slots[index as usize];
        if matches!(slot.state, OperationState::Abandoned) {
            return self.abandoned_over(index, &reply);
        }
        if let (Some(tracer), Some(request)) = (&self.tracer, slot.request) {
            tracer.answered(request, reply.result);
        }
        if paths::has_answer(slot.opcode) {
            return self.handle_answer(index, reply);
        }
        let result = self.result_of(index, slot.length, &reply);
        self.complete(index, result, reply.bulk, reply.data_crc);
    }

    /// The byte count in the reply to an operation, or to a part of it with this length; or why it failed.
    #[inline(always)]
    fn result_of(&mut self, index: u32, length: u64, reply: &Reply) -> Result<u64, Error> {
        let slot = &self.slots[index as usize];
        if !reply.status.is_ok() {
            Err(self.failure_of(index, reply))
        } else if slot.opcode == Opcode::Fsync && !self.files.synced(slot.file, slot.unstable, reply.result) {
            self.stats.lost += 1;
            let text = "The server has lost writes that were acknowledged before this fsync: it, or its \
                        machine, was restarted, or its disk failed. Write again what was not durable before.";
            Err(Error { is_lost: true, ..Error::new(Status::storage(libc::EIO), text) })
        } else {
            let (is_valid, count) = match slot.opcode {
                Opcode::Read | Opcode::Get => (reply.result == reply.data_len as u64, reply.result),
                Opcode::Write | Opcode::Copy | Opcode::Checksum => (reply.result <= length, reply.result),
                Opcode::Put => (true, length),
                _ => (true, 0),
            };
            if is_valid {
                if slot.opcode.operation().is_recorded {
                    self.files.written(slot.file, slot.unstable);
                }
                Ok(count)
            } else {
                self.channel.abort(Violation::Field);
                Err(protocol_error())
            }
        }
    }

    /// Why an operation failed.
    #[cold]
    fn failure_of(&mut self, index: u32, reply: &Reply) -> Error {
        let slot = &self.slots[index as usize];
        if slot.opcode == Opcode::Fsync {
            self.files.put_back_unstable(slot.file, slot.unstable);
        }
        if slot.timed_out && reply.status.errno == libc::ECANCELED {
            return timeouts::timed_out();
        }
        let failure = self.channel.failure();
        if failure.is_some_and(|failure| failure.errno() == libc::ETIMEDOUT) {
            self.session.suspect();
        }
        if reply.status.errno == libc::EBADF
            && let Some(status) = self.stale(index)
        {
            let text = match status.errno {
                libc::ENOLCK => LOCK_LOST,
                _ => {
                    "The server was restarted, and the file could not be opened again: it is another one \
                     now. Open it again."
                }
            };
            return Error::new(status, text);
        }
        Error::from_reply(reply, failure)
    }

    /// Why a file of an operation could not be opened again, if so. A copy has two files.
    fn stale(&self, index: u32) -> Option<Status> {
        let slot = &self.slots[index as usize];
        let source = slot.extra.as_ref().and_then(|extra| extra.source);
        let mut files = [Some(slot.file), source].into_iter().flatten();
        files.find_map(|file| self.channel.stale(self.files.handle(file)?))
    }

    /// Completes an operation that was not sent, or as much of it as was not.
    fn complete_unsent(&mut self, index: u32, error: Error) {
        let slot = &mut self.slots[index as usize];
        if let OperationState::Split(split) = &mut slot.state {
            split.stop(&error);
            return self.settle(index);
        }
        if slot.opcode == Opcode::Fsync {
            self.files.put_back_unstable(slot.file, slot.unstable);
        }
        let state = std::mem::replace(&mut slot.state, OperationState::Free);
        let bulk = if let OperationState::Queued(_, bulk) = state { bulk } else { Bulk::None };
        self.complete(index, Err(error), bulk, 0);
    }

    /// Completes an operation: its slot keeps the completion until it is collected. `data_crc` is that of
    /// what was read.
    fn complete(&mut self, index: u32, result: Result<u64, Error>, bulk: Bulk, data_crc: u32) {
        let slot = &mut self.slots[index as usize];
        let mut buffers = match bulk {
            Bulk::In(buffers) | Bulk::Out(buffers) => Some(buffers),
            Bulk::None => None,
        };
        self.in_flight -= 1;
        self.stats.completed += 1;
        let mut cancelled = false;
        match (&result, slot.opcode) {
            (Ok(n), Opcode::Read | Opcode::Get) => self.stats.bytes_read += n,
            (Ok(n), Opcode::Write | Opcode::Put) => self.stats.bytes_written += n,
            (Ok(_), _) => {}
            (Err(error), _) => {
                self.stats.failed += 1;
                self.stats.unknown += u64::from(error.is_unknown);
                cancelled = slot.cancelling && error.errno() == libc::ECANCELED;
                if slot.is_lent && buffers.take().is_some() {
                    self.lent.take_back();
                }
            }
        }
        if let Some(deadline) = slot.deadline.take() {
            self.timeouts.remove(&(deadline, index));
        }
        if let Some(eventfd) = slot.eventfd.take()
            && !cancelled
        {
            signal(&eventfd);
        }
        let token = slot.token;
        let is_lent = slot.is_lent && buffers.is_some();
        let is_read = matches!(slot.opcode, Opcode::Read | Opcode::Get);
        let crc = (slot.options.has_crc && is_read && result.is_ok()).then_some(data_crc);
        let extra = slot.extra.take();
        slot.set_state(OperationState::Done(Completion {
            token,
            result,
            buffers,
            is_lent,
            crc,
            answer: None,
        }));
        if let (Some(extra), OperationState::Done(completion)) = (extra, &mut slot.state) {
            if let Some(source) = extra.source {
                self.files.operation_completed(source);
            }
            extra.end(&self.session, completion);
        }
        self.done.push_back(index);
        self.files.operation_completed(slot.file);
    }

    /// Waits until `min` completions are there to be collected, or `timeout` has passed; with `min` 0 takes
    /// in what has arrived. Without a timeout it waits for no more than is in flight. Takes nothing in while
    /// `max` are there. Returns how many are there.
    ///
    /// Fails with EINTR after a signal if nothing is there to be collected, and with ENOTCONN once the
    /// connection has ended and every completion has been collected.
    pub fn wait(&mut self, min: usize, max: usize, timeout: Option<Duration>) -> Result<usize, Error> {
        self.check_process()?;
        self.channel.flush();
        if self.burst >= BURST_MAX {
            self.burst = 0;
            std::thread::yield_now();
        }
        let ready = self.done.len();
        // With a poll descriptor, the caller may count on the socket being drained when fewer than `max`
        // come.
        let enough = if min == 0 || self.poller.is_some() { max } else { min };
        if ready > 0 && ready >= enough {
            return Ok(ready);
        }
        self.poll();
        let waited = if self.keeps_waiting(min, timeout) && timeout != Some(Duration::ZERO) {
            self.wait_for(min, timeout)
        } else {
            Ok(())
        };
        self.sync_poller();
        if !self.done.is_empty() {
            return Ok(self.done.len());
        }
        waited?;
        match self.channel.failure() {
            Some(failure) if self.in_flight == 0 => Err(Error::not_connected(failure)),
            _ => Ok(0),
        }
    }

    /// Whether a wait for `min` completions must go on. With a timeout it lasts that long even if fewer are
    /// in flight, so that a loop around it does not spin.
    fn keeps_waiting(&self, min: usize, timeout: Option<Duration>) -> bool {
        self.done.len() < min
            && (self.in_flight > 0 || (timeout.is_some() && self.channel.failure().is_none()))
    }

    /// By how much a wait may poll longer than usual: a server answers many operations together, which takes
    /// longer than one.
    fn spin_multiplier(&self) -> u32 {
        1 + (self.in_flight / SPIN_EACH).min(SPIN_MULTIPLIER_MAX - 1) as u32
    }

    /// Polls for a while, then sleeps, until `min` completions are there or as many as there can be.
    fn wait_for(&mut self, min: usize, timeout: Option<Duration>) -> Result<(), Error> {
        let begin = Instant::now();
        // One so far away that there is no such instant is none.
        let deadline = timeout.and_then(|timeout| begin.checked_add(timeout));
        self.burst = 0;
        let mut since = begin;
        let mut spinning = self.spin.begin(self.spin_multiplier());
        while self.keeps_waiting(min, timeout) {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                break;
            }
            // Any byte that arrives counts: a large response takes longer than anybody should spin, and comes
            // in many parts.
            let arrived = if self.spin.should_continue(&mut spinning) {
                (0..POLLS_PER_YIELD).any(|_| self.poll())
            } else {
                self.stats.sleeps += 1;
                let waited = self.channel.wait(self.wake_by(deadline));
                let arrived = self.poll();
                waited?;
                arrived
            };
            if arrived {
                let now = Instant::now();
                self.spin.record(&spinning, now - since);
                since = now;
                spinning = self.spin.begin(self.spin_multiplier());
            }
        }
        Ok(())
    }

    /// The next completion, if one has arrived. Does not poll: see [`Context::wait`].
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Option<Completion> {
        let index = self.done.pop_front()?;
        self.burst += 1;
        self.collect(index)
    }

    /// Frees the slot of an operation that has ended.
    fn collect(&mut self, index: u32) -> Option<Completion> {
        let slot = &mut self.slots[index as usize];
        let OperationState::Done(completion) = std::mem::replace(&mut slot.state, OperationState::Free)
        else {
            return None;
        };
        slot.generation = slot.generation.wrapping_add(1);
        if let (Some(tracer), Some(request)) = (&self.tracer, slot.request) {
            tracer.collected(slot.name(), request, completion.result.as_ref().map_or(0, |&bytes| bytes));
        }
        self.free.push(index);
        Some(completion)
    }

    /// Brings the poll descriptor in line with what has been collected, after [`Context::next`].
    pub fn sync_poller(&mut self) {
        if let Some(poller) = &mut self.poller
            && !self.session.is_inherited()
        {
            let tick = self.channel.grant().keepalive.min(self.request_timeout / 3);
            let watch = self.channel.watch();
            let due = self.timeouts.first().map(|&(at, _)| at);
            poller.sync(watch, !self.done.is_empty(), (self.in_flight > 0).then_some(tick), due);
        }
    }

    /// A descriptor for poll(2) or epoll(7): readable when [`Context::wait`] may have something to do. Call
    /// that with `min` 0 then, and [`Context::next`] until it gives nothing.
    pub fn poll_fd(&mut self) -> Result<BorrowedFd<'_>, Error> {
        self.check_process()?;
        if let Some(failure) = self.channel.failure() {
            return Err(Error::not_connected(failure));
        }
        if self.poller.is_none() {
            let poller = Poller::new().map_err(|error| {
                Error::call(
                    error.raw_os_error().unwrap_or(libc::EMFILE),
                    format!(
                        "Cannot create a descriptor to poll ({error}). Close some descriptors, or raise \
                             `ulimit -n`."
                    ),
                )
            })?;
            self.poller = Some(poller);
        }
        self.sync_poller();
        match &self.poller {
            Some(poller) => Ok(poller.fd()),
            None => unreachable!("made above"),
        }
    }

    /// The ticket of the operation with this index and token, if it is in flight or not yet collected.
    pub fn ticket(&self, index: u32, token: u64) -> Option<Ticket> {
        let slot = self.slots.get(index as usize)?;
        let is_there = match slot.state {
            OperationState::Free => false,
            // Its completion has another slot, if it is one of an operation.
            OperationState::Abandoned => {
                self.done.iter().any(|&done| self.slots[done as usize].token == token)
            }
            _ => true,
        };
        (is_there && slot.token == token).then_some(Ticket { index, generation: slot.generation })
    }

    /// Returns a buffer that the context lent. Reads that wait for one continue.
    pub fn release(&mut self, buffers: Buffers) {
        drop(buffers);
        self.lent.take_back();
        if !self.waiting_lent.is_empty() && !self.session.is_inherited() {
            self.lend();
            self.send_queued();
            self.channel.flush();
            self.sync_poller();
        }
    }

    /// The counters.
    pub fn stats(&self) -> Stats {
        let transport = self.channel.counters();
        let resumed = self.channel.resume_counters();
        Stats {
            reconnects: resumed.reconnects,
            resent: resumed.resent,
            bounced_bytes: transport.bounced_bytes,
            sends: transport.sends,
            receives: transport.receives,
            in_flight: self.in_flight as u64,
            queue_depth: self.channel.grant().queue_depth.into(),
            io_bytes_max: self.io_bytes_max() as u64,
            checksum_errors: self.stats.checksum_errors + transport.checksum_errors,
            has_crc: self.channel.grant().crc(),
            ..self.stats
        }
    }

    /// Waits until nothing is in flight, and drops the context. Reads that wait for a lent buffer are
    /// dropped. It waits for the request timeout at most if the server is silent, and for the call timeout at
    /// most if the server only answers pings. Then it abandons the operations that are left; an abandoned
    /// write may still reach the file later.
    pub fn close(mut self) {
        if self.session.is_inherited() {
            return;
        }
        let waiting: Vec<_> = self.waiting_lent.drain(..).collect();
        for index in waiting {
            self.complete_unsent(index, Error::call(libc::ECANCELED, "The context was closed."));
        }
        self.channel.flush();
        let begin = Instant::now();
        let deadline = begin + self.session.options().call_timeout;
        while self.in_flight > 0 && Instant::now() < deadline {
            self.poll();
            // A session that is resumed at once is waited for, but not its whole window.
            if !self.channel.is_connected() && begin.elapsed() >= RESUME_GRACE {
                break;
            }
            let deadline = if self.channel.is_connected() { deadline } else { begin + RESUME_GRACE };
            if self.in_flight > 0
                && self.channel.wait(Some(deadline)).is_err_and(|error| error.errno() != libc::EINTR)
            {
                break;
            }
        }
    }
}

/// A range must end at an offset that a file can have.
fn check_range(offset: u64, length: u64) -> Result<(), Error> {
    if length > i64::MAX as u64 || offset > i64::MAX as u64 - length {
        return Err(Error::call(
            libc::EINVAL,
            "The range ends beyond the largest file offset (2^63 - 1). Pass a smaller offset or length.",
        ));
    }
    Ok(())
}

/// Whether an operation can be sent in parts.
#[cold]
fn check_long(operation: &Operation, offset: u64, length: u64) -> Result<(), Error> {
    if matches!(operation, Operation::ReadLent { .. }) && length > LENT_BYTES_MAX {
        return Err(Error::call(
            libc::EINVAL,
            format!(
                "A read into a lent buffer may have at most {LENT_BYTES_MAX} bytes; this one has {length}. \
                 Pass a buffer, or split it."
            ),
        ));
    }
    if length > i64::MAX as u64 - offset {
        return Err(Error::call(
            libc::EINVAL,
            "The operation ends beyond the largest file offset (2^63 - 1). Pass a smaller offset or length.",
        ));
    }
    Ok(())
}

/// Adds one to an eventfd, unless its counter is full. As the kernel does for libaio, it does not wait: a
/// full counter wakes its readers already. Between the two calls another thread could fill the counter, and
/// then write(2) blocks. O_NONBLOCK would prevent that, but would also change the program's own descriptor.
fn signal(eventfd: &OwnedFd) {
    let mut writable = [PollFd::new(eventfd, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    if rustix::event::poll(&mut writable, Some(&now)).is_ok_and(|ready| ready > 0) {
        let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
    }
}
