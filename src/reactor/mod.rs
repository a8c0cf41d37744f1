//! One event loop for one thread: I/O operations, timers, signals, file watches, readiness, and wake-ups from
//! other threads.
//!
//! A [`Reactor`] is an io_uring; where the kernel or a seccomp profile forbids that it falls back to epoll,
//! which can do everything but file operations (those then belong to a thread pool, see the server's
//! `threads` backend).
//!
//! Operations own what they use. An [`Op`] moves its file, its slot, its path into the reactor, and they come
//! back in the [`Event`] that ends it: one event for one operation, no more, no less. What the kernel still
//! uses when a reactor is dropped and does not let go of in time is leaked, never freed.
//!
//! A turn ([`Reactor::run_once`]) submits everything that was asked for since the last one and hears of
//! everything that has ended, in one system call. With nothing to do it spins a little (configurable), then
//! sleeps in that one place.
//!
//! Tokens carry an owner number so that a worker can tell whose event it is; the value is the owner's.

mod batch;
mod clock;
mod epoll;
mod idle_time;
mod kernel_tls;
mod mailbox;
mod nonblocking;
mod received;
mod ring;
mod sources;
mod tcp_info;
mod timers;

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

pub use batch::SendBatch;
pub use clock::LoopClock;
pub use idle_time::IdleTime;
pub use kernel_tls::{attach_tls, receive_control_record, send_control_record, set_tls_keys};
pub use mailbox::{Receiver, Sender, Waker, mailbox};
pub use received::Received;
pub use sources::{FileWatch, Signals, block_signals};
pub use tcp_info::{TcpInfo, bound_tcp_retries};
pub use timers::TimerId;

use crate::busy_poll::{BusyPoll, PollWindow};
use crate::memory::{Arena, SlotRange};
use crate::tuning::{SPIN_MULTIPLIER_MAX, TIMERS_EVERY};

/// Names an operation or timer to its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    /// Which part of the program.
    pub owner: u8,
    /// That part's own number.
    pub value: u64,
}

/// How a reactor is made.
#[derive(Clone, Debug)]
pub struct Config {
    /// Submission queue entries; completions have four times as many.
    pub entries: u32,
    /// How long to spin before sleeping.
    pub spin: Duration,
    /// Buffers for [`Op::Recv`]: how many...
    pub received_count: u16,
    /// ... and how large.
    pub received_bytes: u32,
    /// Slots for registered files.
    pub files: u32,
    /// Do not even try io_uring.
    pub epoll: bool,
    /// The kernel is to reject what the reactor never asks of its ring.
    pub is_restricted: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            entries: 1024,
            spin: Duration::from_micros(50),
            received_count: 64,
            received_bytes: 64 << 10,
            files: 4096,
            epoll: false,
            is_restricted: false,
        }
    }
}

/// A ring for a reactor that another thread will make of it, with [`Reactor::with_ring`]: io_uring_setup(2)
/// may be forbidden there.
pub struct DisabledRing(Result<ring::Disabled, String>);

impl DisabledRing {
    /// Makes a ring, if there is io_uring here and the reactor is to have it.
    pub fn new(config: &Config) -> Self {
        if config.epoll {
            return Self(Err("it was not asked for".to_owned()));
        }
        Self(ring::Disabled::new(config).map_err(|error| error.to_string()))
    }

    /// Whether there is a ring.
    pub fn is_some(&self) -> bool {
        self.0.is_ok()
    }

    /// Why the ring is not restricted, though [`Config::is_restricted`] asked for that.
    pub fn unrestricted(&self) -> Option<&io::Error> {
        self.0.as_ref().ok()?.unrestricted()
    }
}

impl std::fmt::Debug for DisabledRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DisabledRing").field(&self.0.as_ref().err()).finish()
    }
}

/// A socket, or another descriptor that can be polled, as the reactor's operations take it. The descriptor
/// closes when the last clone, in flight or not, is gone.
#[derive(Clone, Debug)]
pub struct File(Rc<FileInner>);

#[derive(Debug)]
struct FileInner {
    fd: Arc<OwnedFd>,
    /// Its index among the ring's registered files.
    fixed: Option<u32>,
    /// Where that index goes back to.
    retired: Rc<RefCell<Vec<u32>>>,
}

impl Drop for FileInner {
    fn drop(&mut self) {
        if let Some(index) = self.fixed {
            self.retired.borrow_mut().push(index);
        }
    }
}

impl File {
    /// The descriptor itself.
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.0.fd)
    }

    /// Whether the ring has it among its registered files: then it stays open until nothing of the ring is in
    /// flight, even if the process is killed.
    pub fn is_registered(&self) -> bool {
        self.0.fixed.is_some()
    }

    /// The descriptor, as long as it is open.
    pub fn downgrade(&self) -> Weak<OwnedFd> {
        Arc::downgrade(&self.0.fd)
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl AsRawFd for File {
    fn as_raw_fd(&self) -> RawFd {
        self.0.fd.as_raw_fd()
    }
}

/// A file as [`Op::Read`] and [`Op::Write`] share in it. It is not registered with the ring, which would hold
/// on to it after its last user.
pub trait OpenFile: AsFd + Send + Sync + std::fmt::Debug {}

impl<T: AsFd + Send + Sync + std::fmt::Debug> OpenFile for T {}

/// close(2), and what it says: the file system may have failed to store what was written before. The
/// descriptor is closed all the same. May wait for the file system.
pub fn close(fd: OwnedFd) -> Result<(), i32> {
    // SAFETY: the descriptor is this function's own, and nobody uses it after this.
    match unsafe { libc::close(fd.into_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)),
    }
}

/// An operation. Reads and writes of files need io_uring ([`Reactor::has_ring`]); the rest work on either
/// engine.
#[derive(Debug)]
pub enum Op {
    /// Accepts a connection: [`Payload::Fd`].
    Accept {
        /// A listening socket.
        listener: File,
    },
    /// Receives into a buffer of the reactor's, chosen when data arrives, so that idle connections hold no
    /// memory: [`Payload::Received`]. Result 0 is the end of the stream. ENOBUFS: all buffers are in use, try
    /// again.
    Recv {
        /// A stream socket.
        socket: File,
        /// The most bytes; [`Config::received_bytes`] at most.
        len_max: u32,
    },
    /// Receives into a slot, at least one byte, at most the range: [`Payload::Slot`]. Result 0 is the end of
    /// the stream.
    RecvInto {
        /// A stream socket.
        socket: File,
        /// Where to.
        target: SlotRange,
    },
    /// Sends a batch, or the front of it: [`Payload::Batch`], advanced by the result.
    Send {
        /// A stream socket.
        socket: File,
        /// What.
        batch: Box<SendBatch>,
    },
    /// Waits until the file is readable: result 1.
    Readable {
        /// A file that can be polled.
        file: File,
    },
    /// pread(2) into a slot: [`Payload::Slot`].
    Read {
        /// The file.
        file: Arc<dyn OpenFile>,
        /// Where to.
        target: SlotRange,
        /// Offset in the file.
        offset: u64,
        /// RWF_NOWAIT: rather than wait, or have a thread of the kernel's wait, it ends with EAGAIN, or with
        /// EOPNOTSUPP where the file cannot be read like that.
        nowait: bool,
    },
    /// pwrite(2) from a slot: [`Payload::Slot`].
    Write {
        /// The file.
        file: Arc<dyn OpenFile>,
        /// From where.
        source: SlotRange,
        /// Offset in the file.
        offset: u64,
        /// As for a read.
        nowait: bool,
    },
}

/// What an ended operation gives back.
#[derive(Debug)]
pub enum Payload {
    /// Nothing.
    None,
    /// The slot of [`Op::RecvInto`], [`Op::Read`], [`Op::Write`], as it was passed.
    Slot(SlotRange),
    /// What [`Op::Recv`] received.
    Received(Received),
    /// The batch of [`Op::Send`], advanced.
    Batch(Box<SendBatch>),
    /// The descriptor of [`Op::Accept`].
    Fd(OwnedFd),
    /// A timer has come.
    Timer,
}

/// The end of an operation, or a timer.
#[derive(Debug)]
pub struct Event {
    /// The token it was submitted with.
    pub token: Token,
    /// What the system call returned: a count, or the errno.
    pub result: Result<u32, i32>,
    /// What comes back.
    pub payload: Payload,
}

/// An operation in flight, for [`Reactor::cancel`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpId(u64);

/// Whether a turn may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Come back at once.
    Poll,
    /// BusyPoll, then sleep, until there is an event or a wake-up.
    Block,
}

enum Engine {
    Ring(Box<ring::Ring>),
    Epoll(epoll::Epoll),
}

/// See the module documentation. `!Send`: it lives in the thread that made it.
pub struct Reactor {
    engine: Engine,
    /// Why there is no ring, if there is none.
    fallback: Option<String>,
    timers: timers::Timers,
    /// Iterations since they were looked at.
    timers_passed: u8,
    waker: Waker,
    spin: BusyPoll,
    /// Indices among the registered files that are free, and those whose file has gone.
    fixed_free: Vec<u32>,
    fixed_retired: Rc<RefCell<Vec<u32>>>,
    /// See [`Reactor::expect`].
    expected: u32,
    sleeps: u64,
    idle_time: Arc<IdleTime>,
    clock: LoopClock,
}

impl Reactor {
    /// Makes a reactor for this thread.
    pub fn new(config: &Config) -> io::Result<Self> {
        Self::with_ring(DisabledRing::new(config), config)
    }

    /// The same, of a ring that was made with this configuration.
    pub fn with_ring(ring: DisabledRing, config: &Config) -> io::Result<Self> {
        let waker = Waker::new()?;
        let enabled = ring.0.and_then(|disabled| {
            ring::Ring::new(disabled, config, &waker).map_err(|error| error.to_string())
        });
        let (engine, fallback) = match enabled {
            Ok(ring) => (Engine::Ring(Box::new(ring)), None),
            Err(reason) => (Engine::Epoll(epoll::Epoll::new(config, &waker)?), Some(reason)),
        };
        let files =
            if matches!(engine, Engine::Ring(ref ring) if ring.has_files()) { config.files } else { 0 };
        Ok(Self {
            engine,
            fallback,
            timers: timers::Timers::default(),
            timers_passed: 0,
            waker,
            spin: BusyPoll::new(config.spin),
            fixed_free: (0..files).rev().collect(),
            fixed_retired: Rc::default(),
            expected: 1,
            sleeps: 0,
            idle_time: Arc::default(),
            clock: LoopClock::default(),
        })
    }

    /// Whether this is an io_uring, so that file operations can be submitted.
    pub fn has_ring(&self) -> bool {
        matches!(self.engine, Engine::Ring(_))
    }

    /// Why it is not an io_uring, as the rest of an error message that begins "io_uring is not used: ".
    pub fn fallback_reason(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// Wakes this reactor from other threads.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// The time, as of this iteration of the event loop.
    pub fn clock(&self) -> &LoopClock {
        &self.clock
    }

    /// Has the time counted here that it waits for something to do, spinning or asleep.
    pub fn set_idle_time(&mut self, idle_time: Arc<IdleTime>) {
        self.idle_time = idle_time;
    }

    /// How often it has gone to sleep.
    pub fn sleeps(&self) -> u64 {
        self.sleeps
    }

    /// Registers the memory of an arena with the ring, once, so that the kernel need not pin pages for each
    /// operation. On failure (often the memlock limit) everything works unregistered, a little slower.
    pub fn register_arena(&mut self, arena: &Arena) -> io::Result<()> {
        match &mut self.engine {
            Engine::Ring(ring) => ring.register_arena(arena),
            Engine::Epoll(_) => Ok(()),
        }
    }

    /// Takes a file or socket for use in operations. Sockets must be non-blocking.
    pub fn file(&mut self, fd: impl Into<Arc<OwnedFd>>) -> File {
        let fd = fd.into();
        self.reuse_retired();
        let mut fixed = None;
        if let Engine::Ring(ring) = &mut self.engine
            && let Some(index) = self.fixed_free.pop()
        {
            if ring.set_file(index, fd.as_raw_fd()) {
                fixed = Some(index);
            } else {
                self.fixed_free.push(index);
            }
        }
        File(Rc::new(FileInner { fd, fixed, retired: Rc::clone(&self.fixed_retired) }))
    }

    /// Lets go of the registered files whose last [`File`] has been dropped.
    fn reuse_retired(&mut self) {
        let mut retired = self.fixed_retired.borrow_mut();
        if let Engine::Ring(ring) = &mut self.engine {
            for index in retired.drain(..) {
                if ring.set_file(index, -1) {
                    self.fixed_free.push(index);
                }
            }
        }
    }

    /// Begins an operation. Its end is an event of a later turn.
    ///
    /// # Panics
    /// If a file operation is submitted and there is no ring: the caller's bug.
    pub fn submit(&mut self, token: Token, op: Op) -> OpId {
        match &mut self.engine {
            Engine::Ring(ring) => ring.submit(token, op),
            Engine::Epoll(epoll) => epoll.submit(token, op),
        }
    }

    /// Does an [`Op::Send`] by a plain system call, which spares most sends the engine's detours, and gives
    /// its end. None: it would block, so it was submitted, and its end is an event of a later turn.
    pub fn send(&mut self, token: Token, socket: File, mut batch: Box<SendBatch>) -> Option<Event> {
        let sent = nonblocking::send(&socket, &mut batch);
        let op = Op::Send { socket, batch };
        match sent {
            Err(libc::EAGAIN | libc::EINTR) => {
                self.submit(token, op);
                None
            }
            sent => Some(nonblocking::ended(token, op, sent.map(|n| (n, Payload::None)))),
        }
    }

    /// Asks for an operation to end early. Best effort: it ends with ECANCELED, or as it would have.
    pub fn cancel(&mut self, id: OpId) {
        match &mut self.engine {
            Engine::Ring(ring) => ring.cancel(id),
            Engine::Epoll(epoll) => epoll.cancel(id),
        }
    }

    /// Passes on what was asked for now, rather than with the next turn.
    pub fn submit_now(&mut self) {
        if let Engine::Ring(ring) = &mut self.engine {
            ring.submit_now();
        }
    }

    /// From now on it spins for another time before it sleeps.
    pub fn set_spin(&mut self, spin: Duration) {
        self.spin = BusyPoll::new(spin);
    }

    /// So many operations are worth waiting for: from now on a turn may spin for so many times as long as it
    /// was configured to, at most ten times. Several that were begun together end later than one, and often
    /// together. None: it does not spin.
    pub fn set_spin_multiplier(&mut self, operations: usize) {
        self.expected = operations.min(SPIN_MULTIPLIER_MAX) as u32;
    }

    /// For tests: has the kernel answer what no reactor asks of its ring. What that is, and the errno; 0 if
    /// it was done. Empty if there is no ring.
    #[cfg(feature = "test-peers")]
    pub fn attempt_through_ring(&mut self) -> Vec<(&'static str, i32)> {
        match &mut self.engine {
            Engine::Ring(ring) => ring.attempt(),
            Engine::Epoll(_) => Vec::new(),
        }
    }

    /// Operations in flight.
    pub fn in_flight(&self) -> usize {
        match &self.engine {
            Engine::Ring(ring) => ring.in_flight(),
            Engine::Epoll(epoll) => epoll.in_flight(),
        }
    }

    /// Timers that are set, and have not come.
    pub fn timers(&self) -> usize {
        self.timers.len()
    }

    /// Sets a timer.
    pub fn timer(&mut self, at: Instant, token: Token) -> TimerId {
        self.timers.insert(at, token)
    }

    /// Stops a timer. Stopping one that has come already does nothing.
    pub fn cancel_timer(&mut self, id: TimerId) {
        self.timers.remove(id);
    }

    /// Submits what was asked for, and appends what has ended to `events`. With [`Wait::Block`] and nothing
    /// ended it spins, then sleeps, until something has, a timer comes, or a [`Waker`] wakes it (which is no
    /// event).
    pub fn run_once(&mut self, wait: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        self.poll_with(wait, events, &mut |_| false)
    }

    /// The same for a thread that has more to look at than this reactor: `look` is asked now and then whether
    /// there is news elsewhere, and if so the turn comes back. Its argument says that the reactor is about to
    /// sleep, so that news from then on must wake it.
    pub fn poll_with(
        &mut self,
        wait: Wait,
        events: &mut Vec<Event>,
        look: &mut dyn FnMut(bool) -> bool,
    ) -> io::Result<()> {
        let polled = self.poll_until(wait, events, look);
        self.clock.advance();
        polled
    }

    fn poll_until(
        &mut self,
        wait: Wait,
        events: &mut Vec<Event>,
        look: &mut dyn FnMut(bool) -> bool,
    ) -> io::Result<()> {
        if !self.fixed_retired.borrow().is_empty() {
            self.reuse_retired();
        }
        let before = events.len();
        self.engine_poll(events)?;
        self.timers_passed += 1;
        if events.len() == before || self.timers_passed >= TIMERS_EVERY {
            self.timers_passed = 0;
            self.timers.expire(&self.clock, events);
        }
        if wait == Wait::Poll || events.len() > before || self.waker.take() || look(false) {
            return Ok(());
        }
        let begin = Instant::now();
        self.idle_time.begin(begin);
        let mut spinning = self.spin.begin(self.expected);
        while self.spin.should_continue(&mut spinning) {
            for _ in 0..32 {
                if self.engine_has_news() || self.waker.is_set() {
                    self.engine_poll(events)?;
                    if events.len() > before || self.waker.take() {
                        self.end_wait(&spinning, begin);
                        return Ok(());
                    }
                }
                std::hint::spin_loop();
            }
            if look(false) {
                self.end_wait(&spinning, begin);
                return Ok(());
            }
            if self.timers.next().is_some_and(|at| at <= self.clock.read()) {
                break;
            }
        }
        if look(true) {
            self.idle_time.end(begin.elapsed());
            return Ok(());
        }
        if self.waker.prepare_sleep() {
            self.sleeps += 1;
            let result = self.engine_sleep(events);
            self.waker.awake();
            result?;
        }
        self.waker.take();
        self.timers.expire(&self.clock, events);
        self.end_wait(&spinning, begin);
        Ok(())
    }

    /// It has waited since `begin`, and goes on.
    fn end_wait(&mut self, spinning: &PollWindow, begin: Instant) {
        let waited = begin.elapsed();
        self.spin.record(spinning, waited);
        self.idle_time.end(waited);
    }

    fn engine_poll(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        match &mut self.engine {
            Engine::Ring(ring) => ring.poll(events),
            Engine::Epoll(epoll) => epoll.poll(Some(Duration::ZERO), events),
        }
    }

    /// Whether [`Reactor::engine_poll`] would find something. Epoll has no cheaper way to know than to ask.
    fn engine_has_news(&mut self) -> bool {
        match &mut self.engine {
            Engine::Ring(ring) => ring.poll_ready(),
            Engine::Epoll(_) => true,
        }
    }

    fn engine_sleep(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        let timeout = self.timers.next().map(|at| at.saturating_duration_since(self.clock.read()));
        match &mut self.engine {
            Engine::Ring(ring) => ring.sleep(timeout, events),
            Engine::Epoll(epoll) => epoll.poll(timeout, events),
        }
    }
}

impl std::fmt::Debug for Reactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reactor")
            .field("has_ring", &self.has_ring())
            .field("in_flight", &self.in_flight())
            .finish()
    }
}

#[cfg(test)]
mod tests;
