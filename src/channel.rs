//! A channel as its program has it: one connection after another, each in the place of the broken one before.
//!
//! While the connection is whole a [`Channel`] passes everything on to its transport. When the connection
//! breaks, the requests that were outstanding stay with the channel, which connects again, asks the server
//! what became of those that must not run twice, sends the others again, and goes on. If the server does not
//! know the channel any more, it opens the session's files again before. [`crate::resume`] has the
//! decisions; this moves the bytes. All of it happens within the calls of the program: there is no thread.
//!
//! A transport is dropped before the next one is made, so that nothing lands in buffers that are sent again.

mod beginning;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use zerocopy::little_endian::U32;

use crate::connecting::{self, Awaited};
use crate::error::{Error, Status, Violation};
use crate::handshake::{Grant, Offer};
use crate::memory::{ArenaMemory, Region, WeakRegion, process};
use crate::message;
use crate::mux::{self, Reached};
use crate::protocol::{
    Command, FileHandle, FileStatus, OPEN_CREATE, OPEN_EXCLUSIVE, OPEN_READ, OPEN_TRUNCATE, OUTCOMES_MAX,
    RequestOutcome,
};
use crate::resume::{self, End, Fate, Machine, State, Step};
use crate::sync::lock;
use crate::trace::ClockSample;
use crate::transport::{
    Body, Bulk, ClientCounters, ClientEvent, ClientTransport, Lost, NotPushed, NotSent, OneWay, Reply,
    RequestId, SendOptions, UsedIds,
};

pub use beginning::Beginning;
use beginning::{Connected, Given};

/// A connection that is being made. Dropping it gives it up.
pub trait Dialing: Send {
    /// Goes on as far as that is possible at `now`. Some once it is over; it is not called after that.
    fn step(&mut self, now: Instant) -> Option<Result<Reached, Error>>;

    /// Readable when a step can go on. None if only the time tells.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>>;

    /// When the next step is due even if nothing can be polled by then.
    fn step_by(&self) -> Instant;

    /// The highest epoch that it may have offered.
    fn epoch(&self) -> Option<u64>;
}

impl Dialing for mux::Dial {
    fn step(&mut self, now: Instant) -> Option<Result<Reached, Error>> {
        self.step(now)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.poll_fd()
    }

    fn step_by(&self) -> Instant {
        self.step_by()
    }

    fn epoch(&self) -> Option<u64> {
        self.epoch()
    }
}

/// Begins to connect to the server, by a deadline.
pub type Dialer = Box<dyn FnMut(&Offer, Instant, Instant) -> Box<dyn Dialing> + Send>;

/// How a channel behaves.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// For how long it tries to continue after a loss; zero: it ends with its connection.
    pub window: Duration,
    /// It repeats what may have been executed when the server does not know what became of it.
    pub redo: bool,
    /// The owner of the channel divides requests that are too large for a server which was started again with
    /// a smaller grant: [`Channel::take_oversized`]. If not, such a server ends the channel.
    pub divides: bool,
    /// For each attempt to connect.
    pub connect_timeout: Duration,
    /// See [`ClientTransport::request_timeout`]. None: what the transport has.
    pub request_timeout: Option<Duration>,
}

/// What a channel leaves behind that is dropped while requests may be executed yet that must not run twice: a
/// channel that has this number and a higher epoch begins when they cannot happen any more.
#[derive(Debug)]
pub struct Abandoned {
    /// Its number.
    pub number: u32,
    /// Its latest epoch.
    pub epoch: u64,
    /// The ids that it has used.
    pub used: UsedIds,
}

/// What became of a channel's requests over its losses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResumeCounters {
    /// Connections that took the place of a broken one.
    pub reconnects: u64,
    /// Requests sent again.
    pub resent: u64,
    /// Requests that may have been executed, and ended as failed.
    pub unknown: u64,
}

/// The open files of a session, as they are opened again on a server that does not have them.
#[derive(Debug, Default)]
pub struct OpenFiles {
    files: Mutex<BTreeMap<u32, OpenFile>>,
    /// The incarnation of the server on which they are open, as far as is known.
    server: Mutex<Option<[u8; 16]>>,
    /// How often a channel has begun, or has begun to open all of them again.
    reopenings: AtomicU64,
}

/// One of them.
#[derive(Clone, Debug)]
struct OpenFile {
    file: Arc<Reopenable>,
    /// It has a lock, which would be lost: it is not opened again.
    is_locked: bool,
}

/// How a file is opened again.
#[derive(Debug)]
pub struct Reopenable {
    /// The flags that it was opened with (`OPEN_*`).
    pub flags: u32,
    /// Its path.
    pub path: Box<[u8]>,
    /// Its [`FileStatus::identity`] when it was opened.
    pub identity: [u8; 16],
}

impl OpenFiles {
    /// A file was opened.
    pub fn insert(&self, handle: FileHandle, file: Reopenable) {
        lock(&self.files).insert(handle.0, OpenFile { file: Arc::new(file), is_locked: false });
    }

    /// It was closed.
    pub fn remove(&self, handle: FileHandle) {
        lock(&self.files).remove(&handle.0);
    }

    /// It has a lock from now on ([`crate::protocol::Opcode::Lock`]), or none any more. A lock is lost with
    /// the session, and others may have had it since: then requests on the file fail, and it is not opened
    /// again.
    pub fn set_locked(&self, handle: FileHandle, is_locked: bool) {
        if let Some(open) = lock(&self.files).get_mut(&handle.0) {
            open.is_locked = is_locked;
        }
    }

    /// How often a channel has begun, or has begun to open all of them again. If that changes while a file is
    /// opened, from before the call until after [`OpenFiles::insert`], the server of that channel may not
    /// have it: a call about it by the channel that has opened it finds out, and has it opened again.
    pub fn reopenings(&self) -> u64 {
        self.reopenings.load(Ordering::SeqCst)
    }

    fn is_empty(&self) -> bool {
        lock(&self.files).is_empty()
    }

    fn has(&self, handle: FileHandle) -> bool {
        lock(&self.files).contains_key(&handle.0)
    }

    /// A channel has its first connection. To be called before it is found out which files are open: the
    /// server that has opened one may have ended, and its answer not be read yet.
    fn channel_begins(&self) {
        self.reopenings.fetch_add(1, Ordering::SeqCst);
    }

    /// One that is open for reading.
    fn readable(&self) -> Option<FileHandle> {
        let files = lock(&self.files);
        let found = files.iter().rev().find(|(_, open)| open.file.flags & OPEN_READ != 0);
        found.map(|(&handle, _)| FileHandle(handle))
    }

    /// A connection to this server was made. Whether there are files that it may not have open.
    fn are_missing(&self, server: [u8; 16]) -> bool {
        *lock(&self.server).get_or_insert(server) != server && !self.is_empty()
    }

    /// All have been opened on this server.
    fn are_at(&self, server: [u8; 16]) {
        *lock(&self.server) = Some(server);
    }

    fn list(&self) -> Vec<(FileHandle, OpenFile)> {
        let files = lock(&self.files);
        self.reopenings.fetch_add(1, Ordering::SeqCst);
        files.iter().map(|(&handle, open)| (FileHandle(handle), open.clone())).collect()
    }
}

/// What an event loop polls for a channel.
#[derive(Debug)]
pub enum Watch<'a> {
    /// The connection's descriptor, and whether also for writing. The number tells one connection from the
    /// next.
    Connected(BorrowedFd<'a>, bool, u64),
    /// The channel is connecting: descriptors, and whether for writing; and when [`Channel::receive`] is due
    /// at the latest. They are others after each call.
    Connecting(Vec<(BorrowedFd<'a>, bool)>, Instant),
    /// It has failed.
    Failed,
}

/// See the module documentation.
pub struct Channel {
    /// Some: connected, and nothing is left of earlier connections.
    transport: Option<Box<dyn ClientTransport>>,
    /// The latest.
    grant: Grant,
    /// Why it was given up.
    failure: Option<Error>,
    /// A request was answered over this connection.
    has_answered: bool,
    /// Connections so far.
    connections: u64,
    rest: Box<Rest>,
}

/// What is not needed while the connection is whole.
struct Rest {
    dialer: Dialer,
    offer: Offer,
    settings: Settings,
    /// What tells it the time.
    clock: fn() -> Instant,
    files: Arc<OpenFiles>,
    /// The process that it belongs to: a forked child does not connect again.
    process: u64,
    machine: Machine,
    /// When the program's requests could be sent over the latest connection.
    connected_at: Instant,
    /// When the latest one was lost over which they could.
    lost_at: Option<Instant>,
    phase: Phase,
    /// The server has lost the files, and has not got all back.
    must_reopen: bool,
    /// It has said so over this connection.
    has_heard: bool,
    /// It is another process than the one that the program's requests were sent to.
    is_another_server: bool,
    /// To be sent again.
    again: VecDeque<Lost>,
    /// May have been executed.
    asked: Vec<Lost>,
    /// Too large for the grant that there is now.
    oversized: Vec<Lost>,
    /// Over, and not handed out.
    over: Vec<Reply>,
    /// Requests have ended as unknown that may be executed yet: the server has not said otherwise.
    has_left_unknown: bool,
    /// Why there is no connection.
    why: String,
    used: UsedIds,
    /// Those of earlier connections.
    counters: ClientCounters,
    resumed: ResumeCounters,
    regions: Vec<WeakRegion>,
    arenas: Vec<ArenaMemory>,
    /// Verifiers of the files that were opened again, at the last time.
    verifiers: HashMap<u32, u64>,
    /// Which connection was the latest over which that was done; 0: none but the first.
    reopened_at: u64,
    /// How requests end of files that could not be.
    stale: HashMap<u32, End>,
    why_tcp: Option<String>,
    on_abandoned: Option<Box<dyn FnOnce(Abandoned) + Send>>,
}

#[derive(Default)]
enum Phase {
    /// Connected, given up, or between two attempts.
    #[default]
    Idle,
    Dialing(Box<dyn Dialing>),
    /// An outcome is outstanding.
    Resolving(Box<dyn ClientTransport>),
    Reopening(Box<dyn ClientTransport>, Reopening),
    /// Connected, with fewer credits than there is to be sent again.
    Resending(Box<dyn ClientTransport>),
}

#[derive(Default)]
struct Reopening {
    files: Vec<(FileHandle, OpenFile)>,
    sent: usize,
    answered: usize,
    /// How requests of files end that could not be opened.
    stale: HashMap<u32, End>,
    /// The verifiers of the others.
    verifiers: HashMap<u32, u64>,
    /// Files that were closed meanwhile, over another connection: that may have come before the server had
    /// them open. Some once all have been answered.
    closing: Option<Vec<FileHandle>>,
    closes_sent: usize,
    closes_answered: usize,
}

impl Reopening {
    fn new(files: &OpenFiles) -> Self {
        Self { files: files.list(), ..Self::default() }
    }

    /// Sends what can be sent, and takes in what has been answered. Whether anything has. `open` are the
    /// files that are open now.
    fn step(&mut self, transport: &mut dyn ClientTransport, open: &OpenFiles) -> bool {
        self.send_files(transport);
        transport.flush();
        let has_arrived = self.take_in(transport);
        if self.answered == self.files.len() && self.closing.is_none() {
            let reopened = self.verifiers.keys().map(|&handle| FileHandle(handle));
            self.closing = Some(reopened.filter(|&handle| !open.has(handle)).collect());
        }
        self.send_closes(transport);
        transport.flush();
        has_arrived
    }

    fn send_files(&mut self, transport: &mut dyn ClientTransport) {
        while let Some((handle, OpenFile { file, is_locked })) = self.files.get(self.sent) {
            let flags = file.flags & !(OPEN_CREATE | OPEN_EXCLUSIVE | OPEN_TRUNCATE);
            let (file, identity, path) = (*handle, file.identity, &file.path[..]);
            let command = match is_locked {
                // The session may still be there, and then its files are open, and have their locks.
                true => Command::Stat(file),
                false => Command::Reopen { flags, file, identity, path },
            };
            if !send(transport, self.sent, &command) {
                break;
            }
            self.sent += 1;
        }
    }

    fn send_closes(&mut self, transport: &mut dyn ClientTransport) {
        let closing = self.closing.as_deref().unwrap_or_default();
        while let Some(&handle) = closing.get(self.closes_sent) {
            if !send(transport, self.files.len() + self.closes_sent, &Command::Close(handle)) {
                break;
            }
            self.closes_sent += 1;
        }
    }

    /// Whether anything has been answered.
    fn take_in(&mut self, transport: &mut dyn ClientTransport) -> bool {
        let mut replies = Vec::new();
        transport.receive(&mut replies);
        // Of what a server has not done that shuts down nothing is known. The connection is about to end, and
        // the next server is asked.
        for reply in replies.iter().filter(|reply| !reply.status.is_shutdown()) {
            let Some((handle, OpenFile { file, is_locked })) = self.files.get(reply.tag as usize) else {
                // Whatever it says, the file is not open any more.
                self.closes_answered += 1;
                continue;
            };
            self.answered += 1;
            if !reply.status.is_ok() {
                let end = match is_locked {
                    true => resume::at_lock_lost(),
                    false => resume::at_reopen_failure(reply.status),
                };
                self.stale.insert(handle.0, end);
                continue;
            }
            match FileStatus::decode(&reply.body) {
                Ok(status)
                    if (*is_locked || reply.result == u64::from(handle.0))
                        && status.identity == file.identity =>
                {
                    self.verifiers.insert(handle.0, status.verifier.get());
                }
                _ => transport.abort(Violation::Field),
            }
        }
        !replies.is_empty()
    }

    fn is_over(&self) -> bool {
        self.closing.as_ref().is_some_and(|closing| self.closes_answered == closing.len())
    }
}

/// Whether there was a credit for it.
fn send(transport: &mut dyn ClientTransport, tag: usize, command: &Command<'_>) -> bool {
    let mut body = Vec::new();
    command.encode(&mut body);
    transport.send(tag as u64, &body, Bulk::None, SendOptions::PLAIN).is_ok()
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").field("machine", &self.rest.machine).finish_non_exhaustive()
    }
}

impl Channel {
    /// Makes the channel's first connection, by `deadline`, and waits for it. `offer` has the channel; if
    /// that has had connections before, or sessions are superseded, it also waits until nothing of them can
    /// still happen. `used` are the ids that the channel has used.
    pub fn connect(
        dialer: Dialer,
        offer: Offer,
        used: UsedIds,
        settings: Settings,
        files: Arc<OpenFiles>,
        deadline: Instant,
    ) -> Result<Self, Error> {
        let mut beginning = Beginning::new(dialer, offer, used, settings, files, deadline);
        loop {
            if let Some(begun) = beginning.step() {
                return begun;
            }
            beginning.wait()?;
        }
    }

    /// A channel that has its first connection.
    fn begun(given: Given, first: Connected) -> Self {
        let Given { dialer, offer, used, settings, files, clock, seed } = given;
        let Connected { mut transport, why_tcp, epoch, reopened, .. } = first;
        let reconnects = !settings.window.is_zero() && offer.channel.is_some();
        if reconnects {
            transport.core_mut().keep_lost();
        }
        let window = if reconnects { settings.window } else { Duration::ZERO };
        Self {
            grant: *transport.grant(),
            transport: Some(transport),
            failure: None,
            has_answered: false,
            connections: 1,
            rest: Box::new(Rest {
                dialer,
                // Only the first connection supersedes.
                offer: Offer { supersedes: Vec::new(), ..offer },
                settings: Settings { window, ..settings },
                clock,
                files,
                process: process(),
                machine: Machine::new(epoch, window, seed),
                connected_at: clock(),
                lost_at: None,
                phase: Phase::Idle,
                must_reopen: false,
                has_heard: false,
                is_another_server: false,
                again: VecDeque::new(),
                asked: Vec::new(),
                oversized: Vec::new(),
                over: Vec::new(),
                has_left_unknown: false,
                why: String::new(),
                used,
                counters: ClientCounters::default(),
                resumed: ResumeCounters::default(),
                regions: Vec::new(),
                arenas: Vec::new(),
                verifiers: reopened.verifiers,
                reopened_at: 0,
                stale: reopened.stale,
                why_tcp,
                on_abandoned: None,
            }),
        }
    }

    /// Has this called when the channel is dropped while requests may be executed yet that must not run
    /// twice.
    pub fn on_abandoned(&mut self, hook: impl FnOnce(Abandoned) + Send + 'static) {
        self.rest.on_abandoned = Some(Box::new(hook));
    }

    /// Why the first connection is over TCP, if it might have been over RDMA: a message for people.
    pub fn why_tcp(&self) -> Option<&str> {
        self.rest.why_tcp.as_deref()
    }

    // While it is connected
    // ------------------------------------------------------------------------------------------------------

    /// Whether requests can be sent now, as far as there are credits. If not it is connecting, or has failed.
    #[inline]
    pub fn is_connected(&self) -> bool {
        self.transport.is_some()
    }

    /// Why the channel was given up, if it was.
    #[inline]
    pub fn failure(&self) -> Option<&Error> {
        self.failure.as_ref()
    }

    /// For people, while the connection is being made again: since when, and what stands in the way.
    #[cold]
    pub fn recovery(&self) -> Option<String> {
        let Rest { machine, clock, why, .. } = &*self.rest;
        let seconds = clock().saturating_duration_since(machine.since()?).as_secs_f64();
        let lost = format!("The connection to the server was lost {seconds:.1} s ago");
        Some(match machine.state() {
            State::Lost(_) | State::Dialing => format!("{lost}, and is being made again: {why}."),
            State::Resolving => {
                format!("{lost}. It has been made again, and the server finishes earlier requests first.")
            }
            State::Reopening => {
                format!("{lost}. It has been made again, and the files are being opened again.")
            }
            State::Connected | State::Failed => return None,
        })
    }

    /// When the connection before this one was lost, and since when requests can be sent over this one. None
    /// if it is the first, or lost.
    pub fn outage(&self) -> Option<(Instant, Instant)> {
        Some((self.rest.lost_at?, self.rest.connected_at)).filter(|(lost, connected)| lost <= connected)
    }

    /// What the server granted, at the last time.
    #[inline]
    pub fn grant(&self) -> &Grant {
        &self.grant
    }

    /// Whether it is connected, and something is outstanding.
    pub fn is_waiting(&self) -> bool {
        self.transport.as_ref().is_some_and(|transport| transport.outstanding() > 0)
    }

    /// Credits left for ordinary requests: none while it is not connected.
    #[inline]
    pub fn credits(&self) -> usize {
        self.transport.as_ref().map_or(0, |transport| transport.credits())
    }

    /// Queues a request: see [`ClientTransport::send`]. Fails without a credit.
    #[inline]
    pub fn send(
        &mut self,
        tag: u64,
        body: &[u8],
        bulk: Bulk,
        options: SendOptions,
    ) -> Result<RequestId, NotSent> {
        match &mut self.transport {
            Some(transport) => transport.send(tag, body, bulk, options),
            None => Err(NotSent(bulk)),
        }
    }

    /// Sends what is queued, as far as the server takes it.
    #[inline]
    pub fn flush(&mut self) {
        if let Some(transport) = &mut self.transport {
            transport.flush();
        }
    }

    /// Takes in what has arrived, and appends what is over to `replies`. If the connection has broken, or is
    /// being made, goes on with that. Returns whether anything has arrived, or happened.
    #[inline]
    pub fn receive(&mut self, replies: &mut Vec<Reply>) -> bool {
        let Some(transport) = &mut self.transport else { return self.recover(replies) };
        let before = replies.len();
        let arrived = transport.receive(replies);
        self.has_answered |= replies.len() > before;
        if transport.failure().is_none() {
            return arrived;
        }
        self.lose();
        if self.rest.settings.window.is_zero() {
            self.rest.has_left_unknown |= replies[before..].iter().any(|reply| reply.is_unknown);
        }
        self.recover(replies);
        true
    }

    /// Sleeps until there may be something to receive, what is queued can be sent, or `deadline` has come:
    /// see [`ClientTransport::wait`].
    #[inline]
    pub fn wait(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        match &mut self.transport {
            Some(transport) => transport.wait(deadline),
            None => self.wait_to_recover(deadline),
        }
    }

    /// Takes back a request of which no byte has been sent on the connection that there is. Returns its
    /// buffers.
    pub fn dequeue(&mut self, tag: u64) -> Option<Bulk> {
        if let Some(at) = self.rest.again.iter().position(|lost| lost.tag == tag) {
            return self.rest.again.remove(at).map(|lost| lost.bulk);
        }
        let transport = self.live()?;
        let request = transport.core().find(tag)?;
        transport.dequeue(request)
    }

    /// Takes away the buffers of the request with this tag, which goes on without them, over later
    /// connections, too. None if they are in use: see [`ClientTransport::detach`].
    #[cold]
    pub fn detach(&mut self, tag: u64) -> Option<Bulk> {
        let rest = &mut *self.rest;
        let mut lost = rest.asked.iter_mut().chain(&mut rest.again).chain(&mut rest.oversized);
        if let Some(lost) = lost.find(|lost| lost.tag == tag) {
            return Some(lost.bulk.detach());
        }
        match (&mut self.transport, &mut rest.phase) {
            (Some(transport), _) | (None, Phase::Resending(transport)) => transport.detach(tag),
            _ => None,
        }
    }

    /// Asks the server to cancel the request with this tag; the answer has the tag `answer`. Whether it was
    /// asked: not without a connection, or a credit.
    pub fn cancel(&mut self, tag: u64, answer: u64) -> bool {
        let Some(transport) = self.live() else { return false };
        let Some(request) = transport.core().find(tag) else { return false };
        let mut body = Vec::new();
        Command::Cancel { id: request.0 }.encode(&mut body);
        let asked = transport.send(answer, &body, Bulk::None, SendOptions::CONTROL).is_ok();
        transport.flush();
        asked
    }

    /// Queues a one-way message: see [`ClientTransport::send_one_way`]. It ends with its connection: what has
    /// no receipt when [`Channel::connections`] changes may not have arrived.
    pub fn send_one_way(&mut self, message: OneWay<'_>) -> Result<(), NotPushed> {
        self.transport.as_mut().map_or(Err(NotPushed::Closed), |transport| transport.send_one_way(message))
    }

    /// The next unsolicited message of the server, or receipt, over the connection that there is: see
    /// [`ClientTransport::next_event`]. What it had sent over an earlier one and was not taken is lost, and
    /// so is what it would have sent while there was none.
    pub fn next_event(&mut self) -> Option<ClientEvent> {
        self.transport.as_mut()?.next_event()
    }

    /// Is done with the oldest one-way message of this connection: see [`ClientTransport::release`].
    pub fn release(&mut self) {
        if let Some(transport) = &mut self.transport {
            transport.release();
        }
    }

    /// Answers a request of the server's that came over this connection: see [`ClientTransport::answer`].
    pub fn answer(&mut self, request: u64, status: Status, result: u64, body: &[u8]) {
        if let Some(transport) = &mut self.transport {
            transport.answer(request, status, result, body);
        }
    }

    /// Ends the connection because the server broke the protocol. The channel goes on with another.
    pub fn abort(&mut self, violation: Violation) {
        if let Some(transport) = self.live() {
            transport.abort(violation);
        }
    }

    /// What to poll.
    pub fn watch(&mut self) -> Watch<'_> {
        let due = self.due();
        if self.failure.is_some() {
            return Watch::Failed;
        }
        if let Some(transport) = &mut self.transport {
            let (fd, out) = transport.poll_fd();
            return Watch::Connected(fd, out, self.connections);
        }
        match &mut self.rest.phase {
            Phase::Idle => Watch::Connecting(Vec::new(), due),
            Phase::Dialing(dialing) => {
                let due = due.min(dialing.step_by());
                Watch::Connecting(dialing.poll_fd().map(|fd| (fd, false)).into_iter().collect(), due)
            }
            Phase::Resolving(transport) | Phase::Reopening(transport, _) | Phase::Resending(transport) => {
                // So that a silent server is pinged.
                let due = due.min((self.rest.clock)() + transport.request_timeout() / 3);
                Watch::Connecting(vec![transport.poll_fd()], due)
            }
        }
    }

    /// How long the server may be silent while something is outstanding: see
    /// [`ClientTransport::request_timeout`].
    pub fn request_timeout(&self) -> Duration {
        self.transport.as_deref().or(self.phase_transport()).map_or_else(
            || self.rest.settings.request_timeout.unwrap_or(self.grant.keepalive * 3),
            |transport| transport.request_timeout(),
        )
    }

    /// Asks the server whether it is there: see [`ClientTransport::ping`].
    pub fn ping(&mut self, timeout: Duration) {
        if let Some(transport) = &mut self.transport {
            transport.ping(timeout);
        }
    }

    /// How the server's clock stands to this side's.
    pub fn clock_sample(&self) -> Option<ClockSample> {
        self.transport.as_ref()?.clock_sample()
    }

    /// When the server was last heard. None without a connection.
    pub fn last_rx(&self) -> Option<Instant> {
        Some(self.transport.as_ref()?.last_rx())
    }

    /// The local port of the connection.
    pub fn local_port(&self) -> Option<u16> {
        self.transport.as_ref()?.local_port()
    }

    /// What was counted, over all connections.
    pub fn counters(&self) -> ClientCounters {
        let live = self.transport.as_deref().or(self.phase_transport());
        let mut sum = self.rest.counters;
        if let Some(transport) = live {
            add(&mut sum, transport.counters());
        }
        sum
    }

    /// Connections so far. It changes when the channel goes on after a loss.
    #[inline]
    pub fn connections(&self) -> u64 {
        self.connections
    }

    /// Which one was the latest over which the session's files were opened again, since the server had lost
    /// them. 0: none but the first.
    pub fn reopened_at(&self) -> u64 {
        self.rest.reopened_at
    }

    /// What was counted of its losses.
    pub fn resume_counters(&self) -> ResumeCounters {
        self.rest.resumed
    }

    /// The verifier that a file had when it was opened again, if it was.
    pub fn verifier(&self, file: FileHandle) -> Option<u64> {
        self.rest.verifiers.get(&file.0).copied()
    }

    /// How requests of a file end that could not be opened again.
    pub fn stale(&self, file: FileHandle) -> Option<Status> {
        self.rest.stale.get(&file.0).map(|end| end.status)
    }

    /// Lets the network reach a region: see [`ClientTransport::register_region`].
    pub fn register_region(&mut self, region: &Region) -> Result<(), Error> {
        if let Some(transport) = &mut self.transport {
            transport.register_region(region)?;
        }
        self.rest.regions.push(region.downgrade());
        Ok(())
    }

    /// Undoes it.
    pub fn unregister_region(&mut self, region: &Region) {
        self.rest.regions.retain(|other| !other.is(region));
        if let Some(transport) = self.live() {
            transport.unregister_region(region);
        }
    }

    /// The same for an arena whose slots are read into.
    pub fn register_arena(&mut self, arena: &ArenaMemory) -> Result<(), Error> {
        if let Some(transport) = &mut self.transport {
            transport.register_arena(arena)?;
        }
        self.rest.arenas.push(arena.clone());
        Ok(())
    }

    /// Whether requests may have been executed, or may yet be, of which that is not known.
    pub fn has_unanswered_recorded(&self) -> bool {
        let live = self.transport.as_ref().or(match &self.rest.phase {
            Phase::Resending(transport) => Some(transport),
            _ => None,
        });
        self.rest.has_left_unknown
            || !self.rest.asked.is_empty()
            || live.is_some_and(|live| live.core().has_unanswered_recorded())
    }

    /// The transport that has the program's requests.
    fn live(&mut self) -> Option<&mut Box<dyn ClientTransport>> {
        match (&mut self.transport, &mut self.rest.phase) {
            (Some(transport), _) | (None, Phase::Resending(transport)) => Some(transport),
            _ => None,
        }
    }

    fn phase_transport(&self) -> Option<&dyn ClientTransport> {
        match &self.rest.phase {
            Phase::Resolving(transport) | Phase::Reopening(transport, _) | Phase::Resending(transport) => {
                Some(&**transport)
            }
            Phase::Idle | Phase::Dialing(_) => None,
        }
    }

    // A loss
    // ------------------------------------------------------------------------------------------------------

    /// The connection has ended.
    #[cold]
    fn lose(&mut self) {
        let Some(mut transport) = self.transport.take() else { return };
        let has_answered = std::mem::take(&mut self.has_answered);
        let now = (self.rest.clock)();
        let owed_since = transport.core().owed_since().unwrap_or(now);
        let rest = &mut *self.rest;
        let failure = transport.failure().map(copy_of);
        let is_violation = matches!(failure, Some(Error::Violation(_)));
        rest.why = failure.as_ref().map(ToString::to_string).unwrap_or_default();
        rest.lost_at = Some(now);
        let lost = rest.bury(&mut *transport);
        // Nothing lands in the buffers after this.
        drop(transport);
        if rest.settings.window.is_zero() {
            self.failure = failure;
            return rest.machine.give_up();
        }
        // Until then it was whole, as far as is known.
        let good_until = if has_answered || lost.is_empty() { now } else { owed_since };
        let good_for = good_until.saturating_duration_since(rest.connected_at);
        let was_useful = rest.machine.was_useful(has_answered, is_violation, good_for);
        for lost in lost {
            match resume::at_loss(&lost.command, lost.was_sent) {
                Fate::Again => rest.again.push_back(lost),
                Fate::Ask => rest.asked.push(lost),
                Fate::Over(end) => rest.end(lost, end),
            }
        }
        tracing::info!(
            name: "reconnecting",
            "The connection was lost: {why}. Connecting again.",
            why = rest.why
        );
        rest.machine.on_loss(now, was_useful);
    }

    /// Goes on without a connection that is whole. Whether anything happened.
    #[cold]
    fn recover(&mut self, replies: &mut Vec<Reply>) -> bool {
        let before = replies.len();
        let mut has_happened = false;
        if self.rest.process == process() {
            let clock = self.rest.clock;
            while self.transport.is_none() && self.failure.is_none() && self.go_on(clock(), replies) {
                has_happened = true;
            }
        }
        replies.append(&mut self.rest.over);
        has_happened || replies.len() > before
    }

    /// One step. Whether there may be another one at once.
    fn go_on(&mut self, now: Instant, replies: &mut Vec<Reply>) -> bool {
        let rest = &mut *self.rest;
        match rest.machine.step(now) {
            Step::None | Step::Wait(_) => {}
            Step::GiveUp => {
                let seconds = rest.settings.window.as_secs_f64();
                let text = format!(
                    "the server was away for longer than the reconnect window of {seconds} s ({})",
                    rest.why
                );
                let errno = libc::ETIMEDOUT;
                self.give_up(Error::Closed { errno, text }, Status::transport(errno));
                return true;
            }
            Step::Dial(epoch, end) => {
                if let Some(channel) = &mut rest.offer.channel {
                    channel.epoch = epoch;
                }
                let deadline = end.min(now + rest.settings.connect_timeout);
                rest.phase = Phase::Dialing((rest.dialer)(&rest.offer, now, deadline));
            }
        }
        match std::mem::take(&mut rest.phase) {
            Phase::Idle => false,
            Phase::Dialing(mut dialing) => {
                let Some(reached) = dialing.step(now) else {
                    rest.phase = Phase::Dialing(dialing);
                    return false;
                };
                if let Some(epoch) = dialing.epoch() {
                    rest.machine.on_epoch(epoch);
                }
                drop(dialing);
                match reached {
                    Ok(reached) => self.on_welcome(reached.transport),
                    Err(error) => self.on_dial_failed(error),
                }
                true
            }
            Phase::Resolving(transport) => self.resolve(transport),
            Phase::Reopening(transport, reopening) => self.reopen(transport, reopening),
            Phase::Resending(mut transport) => {
                let before = replies.len();
                transport.receive(replies);
                self.has_answered |= replies.len() > before;
                if transport.failure().is_some() {
                    self.transport = Some(transport);
                    self.lose();
                    return true;
                }
                self.resend(transport);
                replies.len() > before
            }
        }
    }

    fn on_dial_failed(&mut self, error: Error) {
        let is_final = resume::is_final(&error);
        self.rest.why = error.to_string();
        self.rest.machine.on_dial_failed((self.rest.clock)(), is_final);
        if is_final {
            self.give_up(error, Status::transport(libc::ECONNRESET));
        }
    }

    /// The server has welcomed this connection: it is asked what became of earlier requests.
    fn on_welcome(&mut self, mut transport: Box<dyn ClientTransport>) {
        let rest = &mut *self.rest;
        let grant = *transport.grant();
        if grant.data_bytes_max < self.grant.data_bytes_max && !rest.settings.divides {
            let text = format!(
                "The server was started again with a smaller --io-max: {} bytes instead of {}.",
                grant.data_bytes_max, self.grant.data_bytes_max
            );
            return self.on_dial_failed(Error::Unsupported(text));
        }
        if let Some(timeout) = rest.settings.request_timeout {
            transport.set_request_timeout(timeout);
        }
        let core = transport.core_mut();
        core.set_used_ids(&rest.used);
        core.keep_lost();
        let regions = rest.regions.iter().filter_map(WeakRegion::upgrade);
        let mut registered = Ok(());
        for region in regions {
            registered = registered.and_then(|()| transport.register_region(&region));
        }
        for arena in &rest.arenas {
            registered = registered.and_then(|()| transport.register_arena(arena));
        }
        if let Err(error) = registered {
            return self.on_dial_failed(error);
        }
        rest.is_another_server |= grant.server != self.grant.server;
        self.grant = grant;
        rest.has_heard = false;
        rest.machine.on_dialed();
        self.ask(transport);
    }

    /// Asks for the next outcomes.
    fn ask(&mut self, mut transport: Box<dyn ClientTransport>) {
        let asked = self.rest.asked.iter().take(OUTCOMES_MAX);
        let ids: Vec<U32> = asked.map(|lost| U32::new(lost.id.0 as u32)).collect();
        let mut body = Vec::new();
        Command::Outcome { ids: &ids }.encode(&mut body);
        // If the connection has ended already, that is found out by the next `receive`.
        let _ = transport.send(0, &body, Bulk::None, SendOptions::CONTROL);
        transport.flush();
        self.rest.phase = Phase::Resolving(transport);
    }

    /// Waits for an outcome. Whether there may be more to do at once.
    fn resolve(&mut self, mut transport: Box<dyn ClientTransport>) -> bool {
        let mut replies = Vec::new();
        transport.receive(&mut replies);
        let Some(reply) = replies.pop() else {
            if transport.failure().is_some() {
                self.lose_again(transport);
                return true;
            }
            self.rest.phase = Phase::Resolving(transport);
            return false;
        };
        match reply.status.errno {
            0 => match self.take_outcomes(&reply.body) {
                Ok(()) if self.rest.asked.is_empty() => self.on_resolved(transport),
                Ok(()) => self.ask(transport),
                Err(violation) => {
                    transport.abort(violation);
                    self.lose_again(transport);
                }
            },
            libc::ESTALE => {
                self.on_gone();
                // The server says so until it knows that this was heard: if it did not, and this connection
                // broke, what was sent over it would be forgotten, too.
                if std::mem::replace(&mut self.rest.has_heard, true) {
                    self.on_resolved(transport);
                } else {
                    self.ask(transport);
                }
            }
            errno if reply.status.retryable => {
                self.rest.why = format!("the server does not resume the session now (errno {errno})");
                self.lose_again(transport);
            }
            errno => {
                let text = format!("the server does not resume the session: {}", message::text(&reply.body));
                self.give_up(Error::Closed { errno, text }, Status::transport(libc::ECONNRESET));
            }
        }
        true
    }

    /// What became of the first of `asked`.
    fn take_outcomes(&mut self, body: &[u8]) -> Result<(), Violation> {
        let rest = &mut *self.rest;
        let count = rest.asked.len().min(OUTCOMES_MAX);
        let outcomes = RequestOutcome::decode(body)?;
        if outcomes.len() != count {
            return Err(Violation::Length);
        }
        // All are checked before any is believed.
        let mut fates = Vec::with_capacity(count);
        for (outcome, lost) in outcomes.iter().zip(&rest.asked) {
            if u64::from(outcome.id()) != lost.id.0 {
                return Err(Violation::RequestId);
            }
            fates.push(resume::after_outcome(outcome.answer()?));
        }
        let asked: Vec<_> = rest.asked.drain(..count).collect();
        for (lost, fate) in asked.into_iter().zip(fates) {
            match fate {
                Fate::Over(end) => rest.end(lost, end),
                Fate::Again | Fate::Ask => rest.again.push_back(lost),
            }
        }
        Ok(())
    }

    /// The server does not know the channel any more.
    fn on_gone(&mut self) {
        let rest = &mut *self.rest;
        rest.must_reopen = true;
        let asked = rest.asked.drain(..).map(|lost| (lost, Fate::Ask));
        let again = rest.again.drain(..).map(|lost| (lost, Fate::Again));
        for (lost, fate) in again.chain(asked).collect::<Vec<_>>() {
            // What this server does not know cannot be repeated, and stays unknown.
            let redo =
                rest.settings.redo && resume::why_not_granted(&lost.command, self.grant.features).is_none();
            match resume::at_gone(&lost.command, fate, redo) {
                Fate::Over(end) => rest.end(lost, end),
                Fate::Again | Fate::Ask => rest.again.push_back(lost),
            }
        }
    }

    fn on_resolved(&mut self, transport: Box<dyn ClientTransport>) {
        self.rest.machine.on_resolved(self.rest.must_reopen);
        if self.rest.must_reopen {
            self.rest.stale.clear();
            self.rest.phase = Phase::Reopening(transport, Reopening::new(&self.rest.files));
        } else {
            self.on_connected(transport);
        }
    }

    /// Opens files again. Whether there may be more to do at once.
    fn reopen(&mut self, mut transport: Box<dyn ClientTransport>, mut reopening: Reopening) -> bool {
        let has_arrived = reopening.step(&mut *transport, &self.rest.files);
        let rest = &mut *self.rest;
        if transport.failure().is_some() {
            self.lose_again(transport);
        } else if !reopening.is_over() {
            rest.phase = Phase::Reopening(transport, reopening);
            return has_arrived;
        } else {
            rest.must_reopen = false;
            rest.files.are_at(transport.grant().server);
            rest.stale = reopening.stale;
            rest.verifiers = reopening.verifiers;
            rest.reopened_at = self.connections + 1;
            for lost in std::mem::take(&mut rest.again) {
                // Another channel may have opened the file on this server, and so may have this one before
                // the close: it is sent, unless the handle is that of another file by now.
                if let Ok(Command::Close(handle)) = Command::decode(&lost.command) {
                    match rest.files.has(handle) {
                        true => rest.end(lost, End::SUCCESS),
                        false => rest.again.push_back(lost),
                    }
                    continue;
                }
                let mut files = resume::files_of(&lost.command).into_iter().flatten();
                match files.find_map(|file| rest.stale.get(&file.0).copied()) {
                    Some(end) => rest.end(lost, end),
                    None => rest.again.push_back(lost),
                }
            }
            rest.machine.on_reopened();
            self.on_connected(transport);
        }
        true
    }

    fn on_connected(&mut self, transport: Box<dyn ClientTransport>) {
        let rest = &mut *self.rest;
        self.connections += 1;
        rest.resumed.reconnects += 1;
        rest.connected_at = (rest.clock)();
        // The server may be older than the one before.
        for lost in std::mem::take(&mut rest.again) {
            let why_not = resume::why_not_granted(&lost.command, self.grant.features)
                .or_else(|| lost.options.why_not_granted(&self.grant));
            match why_not {
                Some(text) => rest.end_with(lost, End::UNSUPPORTED, &text),
                None => rest.again.push_back(lost),
            }
        }
        let away = rest.lost_at.map(|lost_at| rest.connected_at.saturating_duration_since(lost_at));
        let server = match (std::mem::take(&mut rest.is_another_server), rest.reopened_at == self.connections)
        {
            (true, _) => "a server that was restarted",
            (false, true) => "a server that had forgotten it",
            (false, false) => "the server",
        };
        tracing::info!(
            name: "session-goes-on",
            "The session goes on after {away} ms, with {server}: {count} requests are sent again.",
            away = away.unwrap_or_default().as_millis(),
            count = rest.again.len()
        );
        self.has_answered = false;
        self.set_oversized_apart();
        self.resend(transport);
    }

    /// A server that was started again may grant less than before: what is larger is not sent again.
    fn set_oversized_apart(&mut self) {
        let rest = &mut *self.rest;
        let most = self.grant.data_bytes_max as usize;
        for lost in std::mem::take(&mut rest.again) {
            match &lost.bulk {
                Bulk::In(buffers) | Bulk::Out(buffers) if buffers.len() > most => rest.oversized.push(lost),
                _ => rest.again.push_back(lost),
            }
        }
    }

    /// Requests that are larger than what the server grants since it was started again, and that were not
    /// executed: with [`Settings::divides`]. There are some only when [`Channel::connections`] has changed.
    pub fn take_oversized(&mut self) -> Vec<Lost> {
        std::mem::take(&mut self.rest.oversized)
    }

    fn resend(&mut self, mut transport: Box<dyn ClientTransport>) {
        let rest = &mut *self.rest;
        while let Some(lost) = rest.again.pop_front() {
            let Lost { tag, id, command, bulk, options, was_sent } = lost;
            if let Err(NotSent(bulk)) = transport.send(tag, &command, bulk, options) {
                rest.again.push_front(Lost { tag, id, command, bulk, options, was_sent });
                break;
            }
            rest.resumed.resent += 1;
        }
        transport.flush();
        if rest.again.is_empty() {
            self.transport = Some(transport);
        } else {
            rest.phase = Phase::Resending(transport);
        }
    }

    /// A connection has ended before it was of use. Nothing of the program's was outstanding on it.
    fn lose_again(&mut self, mut transport: Box<dyn ClientTransport>) {
        let rest = &mut *self.rest;
        if let Some(failure) = transport.failure() {
            rest.why = failure.to_string();
        }
        rest.bury(&mut *transport);
        drop(transport);
        rest.machine.on_loss((rest.clock)(), false);
    }

    /// The channel is given up: everything is over.
    fn give_up(&mut self, failure: Error, status: Status) {
        let rest = &mut *self.rest;
        tracing::warn!(name: "session-lost", "The session is given up: {failure}.");
        rest.phase = Phase::Idle;
        rest.machine.give_up();
        rest.why = failure.to_string();
        let asked = rest.asked.drain(..).map(|lost| (lost, Fate::Ask));
        let again = rest.again.drain(..).map(|lost| (lost, Fate::Again));
        for (lost, fate) in again.chain(asked).collect::<Vec<_>>() {
            rest.end(lost, resume::at_failure(fate, status));
        }
        self.failure = Some(failure);
    }

    /// When the next step is due, whatever can be polled.
    fn due(&self) -> Instant {
        let end = self.rest.machine.end();
        match self.rest.machine.state() {
            State::Lost(at) => end.map_or(at, |end| at.min(end)),
            _ => end.unwrap_or_else(self.rest.clock),
        }
    }

    #[cold]
    fn wait_to_recover(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        if self.failure.is_some() || !self.rest.over.is_empty() {
            return Ok(());
        }
        let due = self.due();
        let until = deadline.map_or(due, |deadline| deadline.min(due));
        match &mut self.rest.phase {
            Phase::Idle => sleep(None, until),
            Phase::Dialing(dialing) => sleep(dialing.poll_fd(), until.min(dialing.step_by())),
            Phase::Resolving(transport) | Phase::Reopening(transport, _) | Phase::Resending(transport) => {
                transport.wait(Some(until))
            }
        }
    }
}

impl Rest {
    /// A request is over.
    fn end(&mut self, lost: Lost, end: End) {
        let End { status, is_unknown, .. } = end;
        let text = if is_unknown && self.asked_in_vain() {
            let why = match self.is_another_server {
                true => "The server was restarted while this was executing",
                false => "The connection was lost while this was executing, and the server has forgotten it",
            };
            format!("{why}: it may have been done. It will not be done later.")
        } else if is_unknown {
            format!("The connection was lost, and this may have been done, or may yet be: {}.", self.why)
        } else if status.is_ok() {
            String::new()
        } else {
            match status.errno {
                libc::ESTALE => "The server was restarted, and the file is another one now.".into(),
                libc::ENOLCK => resume::LOCK_LOST.into(),
                libc::EAGAIN => "The connection was lost; the request goes on.".into(),
                _ if status == Status::transport(status.errno) => {
                    format!("The connection was lost: {}.", self.why)
                }
                // The file's or device's.
                _ => String::new(),
            }
        };
        self.end_with(lost, end, &text);
    }

    /// The same, with a message for people.
    fn end_with(&mut self, lost: Lost, end: End, text: &str) {
        let End { status, result, is_unknown } = end;
        self.resumed.unknown += u64::from(is_unknown);
        self.has_left_unknown |= is_unknown && !self.asked_in_vain();
        let body = Body::from(message::clipped(text).as_bytes());
        self.over.push(Reply {
            tag: lost.tag,
            status,
            is_unknown,
            result,
            body,
            data_len: 0,
            data_crc: 0,
            bulk: lost.bulk,
        });
    }

    /// The server has said that it does not know.
    fn asked_in_vain(&self) -> bool {
        self.machine.state() == State::Resolving
    }

    /// Takes what a connection that has ended leaves behind.
    fn bury(&mut self, transport: &mut dyn ClientTransport) -> Vec<Lost> {
        add(&mut self.counters, transport.counters());
        transport.core().add_used_ids(&mut self.used);
        transport.core_mut().take_lost()
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        if self.rest.process != process() {
            return;
        }
        let is_abandoned = self.has_unanswered_recorded();
        let rest = &mut *self.rest;
        for mut transport in [
            self.transport.take(),
            match std::mem::take(&mut rest.phase) {
                Phase::Resolving(transport)
                | Phase::Reopening(transport, _)
                | Phase::Resending(transport) => Some(transport),
                Phase::Idle | Phase::Dialing(_) => None,
            },
        ]
        .into_iter()
        .flatten()
        {
            if !is_abandoned && !transport.grant().linger.is_zero() {
                transport.send_goaway();
            }
            rest.bury(&mut *transport);
        }
        if let (true, Some(hook), Some(channel)) =
            (is_abandoned, rest.on_abandoned.take(), rest.offer.channel)
        {
            let used = std::mem::take(&mut rest.used);
            hook(Abandoned { number: channel.number, epoch: rest.machine.epoch(), used });
        }
    }
}

fn add(sum: &mut ClientCounters, counters: ClientCounters) {
    sum.sends += counters.sends;
    sum.receives += counters.receives;
    sum.bounced_bytes += counters.bounced_bytes;
    sum.checksum_errors += counters.checksum_errors;
}

/// The same failure, for one that outlives its transport.
fn copy_of(error: &Error) -> Error {
    match error {
        Error::Violation(violation) => Error::Violation(*violation),
        Error::Closed { errno, text } => Error::Closed { errno: *errno, text: text.clone() },
        other => Error::Closed { errno: other.errno(), text: other.to_string() },
    }
}

/// Sleeps until the descriptor is readable, or until then.
fn sleep(fd: Option<BorrowedFd<'_>>, until: Instant) -> Result<(), Error> {
    let awaited: Vec<_> = fd.map(Awaited::input).into_iter().collect();
    connecting::sleep(&awaited, until)
        .map_err(|errno| Error::io("Waiting for the server was interrupted", errno))
}

/// Connects with a call that waits, in one step.
pub fn waiting(
    offer: &Offer,
    connect: impl FnOnce() -> Result<Box<dyn ClientTransport>, Error> + Send + 'static,
) -> Box<dyn Dialing> {
    struct Waiting<F>(Option<F>, Option<u64>);
    impl<F: FnOnce() -> Result<Box<dyn ClientTransport>, Error> + Send> Dialing for Waiting<F> {
        fn step(&mut self, _: Instant) -> Option<Result<Reached, Error>> {
            let transport = self.0.take()?();
            Some(transport.map(|transport| Reached { transport, why_tcp: None }))
        }

        fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }

        fn step_by(&self) -> Instant {
            Instant::now()
        }

        fn epoch(&self) -> Option<u64> {
            self.1
        }
    }
    Box::new(Waiting(Some(connect), offer.channel.map(|channel| channel.epoch)))
}
