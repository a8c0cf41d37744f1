//! A worker: one thread that owns a reactor, an arena, the connections that were placed on it, and their
//! requests.
//!
//! [`Worker::run_once`] is an iteration of its loop: it takes in what has happened, moves each request along
//! as far as it goes, then sends all responses at once. The parts each know one thing and are tested alone:
//!
//! | part | what it knows |
//! |---|---|
//! | [`connections`], [`local_sessions`] | who is connected, and which files each session has here |
//! | [`requests`] | which requests are in progress, and where each is |
//! | [`throttled`] | which requests wait because of a rate |
//! | [`admission`] | who gets memory, how much of it, and when |
//! | [`device_queues`] | what devices have, and what is held back for them |
//! | [`latencies`], [`slow`], [`tracer`] | how long requests take, and what becomes of each |
//!
//! The worker connects them: [`command`] takes a request in, [`fast_path`] answers it on arrival or
//! [`pipeline`] moves it along, [`lifecycle`] is how connections begin and end, and [`fence`] how one takes
//! the place of another. Nothing here is shared with other threads but [`Shared`], which is for the control
//! path.

pub mod admission;
#[cfg(all(feature = "test-attack", debug_assertions))]
#[allow(unsafe_code)]
mod attack;
mod command;
mod connections;
mod device_queues;
#[cfg(any(test, feature = "test-worker"))]
pub mod driven;
mod fast_path;
mod fence;
#[cfg(debug_assertions)]
mod filter;
mod latencies;
mod lifecycle;
mod local_sessions;
mod paths;
mod pipeline;
mod requests;
mod slow;
#[cfg(test)]
mod tests;
mod throttled;
mod tracer;

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use anyhow::Context;
use raio_transport::address::Scheme;
use raio_transport::handshake::{Identity, Policy};
use raio_transport::memory::{Arena, Slot};
use raio_transport::message::SessionId;
use raio_transport::protocol::{FileHandle, OPERATION_FEATURES};
use raio_transport::reactor::{self, DisabledRing, Event, Reactor, Receiver, Sender, Token, Wait};
use raio_transport::sync::lock;
use raio_transport::trace::{Clock, Ring};
use raio_transport::transport::{
    self, Accepted, AcceptedStream, Incoming, QueuePairMemory, ServerEvent, ServerTransport,
};
use raio_transport::{Status, mux, rdma, tcp};

use crate::activity::{Medium, SessionCounters};
use crate::audit::Audit;
use crate::cached::CachedFiles;
use crate::config::{BackendKind, Config};
use crate::engine::{self, Engine, Threads, Uring};
use crate::export::{ExportTable, Exports};
use crate::keys::{Keys, Revocation, Rights};
use crate::limits::ConnectionPermit;
use crate::log::log_client;
use crate::orphan_guard::OrphanGuard;
use crate::peer::{Origin, PeerAddress};
use crate::placement::Placement;
use crate::reply::Reply;
use crate::request::State;
use crate::session::Session;
use crate::sessions::{ConnectionName, Sessions};
use crate::stats::{CountedClients, Counters};
use crate::stored::StoredDirectories;
use crate::throttle::Throttles;
use crate::trace::Trace;
use crate::tuning::drain::{DELIVERY_CHECK, GOAWAY_TIMEOUT, GRACE, GRACE_OF_SILENT, QUIESCE_TIMEOUT};
use crate::tuning::statistics::{MEASURED_MAX, PUBLISHED_EVERY};
use admission::Admission;
use connections::{Arrival, Connections, Standing};
use device_queues::DeviceQueues;
use fence::Orphan;
use latencies::Latencies;
use local_sessions::LocalSessions;
use requests::Requests;
use slow::SlowRequests;
pub use slow::{SlowEnd, SlowRequest};
use throttled::Throttled;
use tracer::Tracer;

/// The owner numbers of the transports' operations.
const TCP: u8 = 0;
const RDMA: u8 = 1;
/// The owner number of the worker's own timers. Most only wake it.
const TIMER: Token = Token { owner: 0xff, value: 0 };
/// Channels may have expired.
const EXPIRY: Token = Token { owner: 0xff, value: 1 };
/// A connection may have waited for long.
const FENCE_CHECK: Token = Token { owner: 0xff, value: 2 };

/// What all workers share.
#[derive(Debug)]
pub struct Shared {
    /// What clients may open.
    pub exports: ExportTable,
    /// Who they are, and what they have open.
    pub sessions: Sessions,
    /// What clients that have gone have left behind.
    pub orphan_guard: OrphanGuard,
    /// How many operations and bytes a second clients and exports may have.
    pub throttles: Throttles,
    /// What is counted for clients that have keys.
    pub clients: CountedClients,
    /// How many bytes clients store, where that is limited.
    pub stored: Arc<StoredDirectories>,
    /// What each connection is granted.
    pub policy: Arc<Policy>,
    /// How to reach each worker, once all have started.
    pub workers: OnceLock<Vec<WorkerSenders>>,
    /// Who has how many connections.
    pub placement: Placement,
    /// What the configuration asks for.
    pub backend: BackendKind,
    /// Each worker's arena.
    pub arena_bytes: usize,
    /// What the messages of each worker's connections may take beside it.
    pub heap_bytes: usize,
    /// What each worker begins with.
    pub settings: Settings,
    /// Where requests are traced to.
    pub trace: Option<Trace>,
    /// Connections may come by rdma_cm, so there must be RDMA.
    pub rdma: bool,
    /// Who may connect, if clients must have keys.
    pub keys: Option<Arc<Keys>>,
    /// The audit log, if there is one.
    pub audit: Option<Arc<Audit>>,
    /// What is locked as long as anything of the server can happen: see [`crate::claim`].
    pub claims: Mutex<Vec<Arc<OwnedFd>>>,
    /// How many configurations there have been: the first one is number 1.
    pub config_generation: AtomicU64,
    /// The last one that was read was wrong, and so not applied.
    pub last_reload_failed: AtomicBool,
}

impl Shared {
    /// What a client may open.
    pub fn rights(&self, identity: &Identity) -> Rights {
        self.keys.as_ref().map_or(Rights::All, |keys| keys.rights(identity))
    }

    /// What `clients.toml` calls a client, for the log.
    fn client_name(&self, identity: &Identity) -> Option<String> {
        let client = self.keys.as_ref()?.client(identity)?;
        Some(client.name.clone())
    }

    /// What a configuration asks for, with its exports and a table for its sessions.
    pub fn new(config: &Config, exports: Exports, sessions: Sessions) -> anyhow::Result<Self> {
        let defaults = Policy::default();
        let policy = Policy {
            features: defaults.features | OPERATION_FEATURES,
            queue_depth: config.queue_depth,
            data_bytes_max: config.io_bytes_max,
            stall_timeout: config.stall_timeout,
            linger: config.linger,
            name: concat!("raio_server/", env!("CARGO_PKG_VERSION")).to_owned(),
            ..defaults
        };
        let trace = config.trace.as_deref().map(|path| Trace::create(path, policy.clock, config.workers));
        let exports = ExportTable::new(exports);
        Ok(Self {
            exports,
            sessions,
            orphan_guard: OrphanGuard::default(),
            throttles: Throttles::new(config.exports.iter().map(|export| export.rates), Instant::now()),
            clients: CountedClients::new(config.workers),
            stored: Arc::default(),
            policy: Arc::new(policy),
            workers: OnceLock::new(),
            placement: Placement::new(config.workers),
            backend: config.backend,
            arena_bytes: config.arena_bytes,
            heap_bytes: config.heap_bytes,
            settings: Settings::of(config),
            keys: None,
            audit: None,
            trace: trace.transpose()?,
            rdma: config.listen.iter().any(|(scheme, _)| *scheme == Scheme::Rdma),
            claims: Mutex::default(),
            config_generation: AtomicU64::new(1),
            last_reload_failed: AtomicBool::new(false),
        })
    }
}

/// How to reach a worker.
#[derive(Clone, Debug)]
pub struct WorkerSenders {
    /// Its mailbox.
    pub mailbox: Sender<Mail>,
    /// Connections that it is to serve.
    pub connections: Sender<(RawConnection, Arc<ConnectionPermit>)>,
}

/// A connection that was accepted, and nothing more.
#[derive(Debug)]
pub enum RawConnection {
    /// A stream socket, and whom it leads to if that is known.
    Tcp(AcceptedStream, Option<PeerAddress>),
    /// One that a worker has passed on to another: its permit there is counted.
    Passed(AcceptedStream, Option<PeerAddress>),
    /// One that a client asks for.
    Rdma(Box<dyn Incoming>),
}

impl RawConnection {
    /// Where the client is, if that is known.
    pub fn peer(&self) -> Option<PeerAddress> {
        match self {
            Self::Tcp(_, peer) | Self::Passed(_, peer) => *peer,
            Self::Rdma(incoming) => incoming.peer().map(PeerAddress::Ip),
        }
    }
}

/// What may change of a worker's settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How long it spins when it is idle.
    pub spin: Duration,
    /// While others wait for memory, a connection that makes no progress for so long is closed.
    pub stall_timeout: Duration,
    /// The longest that a channel whose connection has broken is kept.
    pub linger: Duration,
    /// A request that takes this long is slow.
    pub slow: Duration,
    /// What a session, and what an address ([`crate::limits::Who`]), may have of its memory by the options.
    pub memory_caps: [usize; 2],
}

impl Settings {
    /// Those that a configuration asks for.
    pub fn of(config: &Config) -> Self {
        Self {
            spin: config.spin,
            stall_timeout: config.stall_timeout,
            linger: config.linger,
            slow: config.slow,
            memory_caps: [config.session_caps, config.address_caps]
                .map(|caps| config.each_workers(caps.memory)),
        }
    }
}

/// What other threads tell a worker.
#[derive(Debug)]
pub enum Mail {
    /// A handle was closed by another worker.
    Forget {
        /// Whose.
        session: SessionId,
        /// Which.
        handle: FileHandle,
    },
    /// Another connection has taken the place of this one: close it.
    Fence(ConnectionName),
    /// What this connection waited for may be over.
    Settle(ConnectionName),
    /// What held back requests has ended, or the audit log has room for opens again.
    Release,
    /// Some clients may do less than before: their sessions end.
    Revoke(Arc<Revocation>),
    /// An administrator ends a session.
    Kill {
        /// Which.
        session: Arc<Session>,
        /// Who wants it.
        by: String,
        /// Is told whether there was one.
        done: Reply<bool>,
    },
    /// Somebody wants to know which requests have taken long.
    Slow(Reply<Vec<SlowRequest>>),
    /// Record all requests from now on, by this clock in this ring.
    BeginTrace(Clock, Ring),
    /// Do so no more, and give the ring back.
    EndTrace(Reply<(usize, Ring)>),
    /// Somebody wants to see that the worker goes on: it does as soon as it takes its mail.
    Wake,
    /// Exports are over: leave them.
    Leave,
    /// Replace the claims in the ring's table of files (see [`crate::claim`]), and send whether there was
    /// room for all of them.
    Claim(Vec<Arc<OwnedFd>>, mpsc::Sender<bool>),
    /// Have these settings from now on.
    Set(Settings),
    /// Hand over what was traced since the last time.
    Trace,
    /// Finish what is in flight, by then, and end.
    Drain(Instant),
}

/// A worker that was told to stop.
struct Drain {
    reject_at: Instant,
    deadline: Instant,
    /// When to look again whether the clients have been told.
    check_at: Instant,
    goaway_deadline: Option<Instant>,
}

/// See the module documentation.
pub struct Worker {
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    /// Its place among the workers.
    index: usize,
    mail: Receiver<Mail>,
    incoming: Receiver<(RawConnection, Arc<ConnectionPermit>)>,
    reactor: Reactor,
    /// [`Shared::claims`], and what has taken its place, in the ring's table of files.
    claims: Vec<reactor::File>,
    arena: Arena,
    transport: mux::Mux,
    engine: Box<dyn Engine>,
    /// [`crate::cached`].
    cached: CachedFiles,
    connections: Connections,
    sessions: LocalSessions,
    requests: Requests,
    admission: Admission,
    settings: Settings,
    device_queues: DeviceQueues,
    latencies: Latencies,
    /// Which have taken long.
    slow: SlowRequests,
    /// Whose requests this iteration has taken in and answered, of those that are measured.
    measured: Vec<Arc<SessionCounters>>,
    tracer: Tracer,
    /// Iterations since the gauges were published.
    unpublished: u32,
    /// Files that are being closed for nobody: their session has ended.
    closing: usize,
    /// Requests that their connections have left behind, by their keys.
    orphans: HashMap<usize, Orphan>,
    /// Requests that wait for what others have left behind, oldest first, with their memory if they have it.
    held: Vec<(usize, Option<Slot>)>,
    /// Requests that wait because of a rate.
    throttled: Throttled,
    /// When a timer is set for them.
    throttled_until: Option<Instant>,
    /// Connections that have joined a session so far.
    joined: u64,
    /// The earliest time for which there is a timer for [`EXPIRY`].
    expires: Option<Instant>,
    /// There is a timer for [`FENCE_CHECK`].
    checks_fences: bool,
    /// The export of the open that is answered at once, and counted.
    opened_at_once: Option<usize>,
    /// Requests for a later iteration.
    deferred: VecDeque<transport::Request>,
    /// An option limits the requests of a session or an address, or `clients.toml` those of a client.
    counts_requests: bool,
    events: Vec<Event>,
    /// Another thread has got writes since the worker last waited.
    handed_over: bool,
    /// The last iteration did something, which may have consequences that no event announces.
    is_busy: bool,
    drain: Option<Drain>,
    /// What a test has it do otherwise: bits of [`Quirk`].
    #[cfg(any(test, feature = "test-worker"))]
    quirks: u8,
}

/// What a worker does otherwise if a test wants that.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
enum Quirk {
    /// Mail does not come before the next iteration.
    LateMail = 1,
    /// A mistake: nobody waits for what connections leave behind.
    ForgetsOrphans = 2,
}

/// What the server learns of a worker's start.
#[derive(Debug)]
pub struct Started {
    /// Where to reach it.
    pub senders: WorkerSenders,
    /// The processor that the worker is pinned to, or the error; None if there are too few processors.
    pub pinned: Option<Result<usize, rustix::io::Errno>>,
    /// Why it has no io_uring.
    pub fallback: Option<String>,
    /// Why its arena could not be registered with the ring.
    pub unregistered: Option<std::io::Error>,
    /// Why it does without the RDMA that there is.
    pub no_rdma: Option<raio_transport::Error>,
    /// Its ring does not hold [`Shared::claims`]: a server that takes this one's place does not wait for what
    /// the ring has begun.
    pub unclaimed: bool,
}

impl Worker {
    /// How a worker's reactor is made, and its ring before it.
    pub fn reactor_config(spin: Duration, is_restricted: bool) -> reactor::Config {
        reactor::Config { spin, is_restricted, ..reactor::Config::default() }
    }

    /// Makes a worker, in its own thread, over a ring that was made for its reactor. `cpu` is where it is to
    /// stay.
    pub fn with_ring(
        ring: DisabledRing,
        index: usize,
        shared: Arc<Shared>,
        counters: Arc<Counters>,
        cpu: Option<usize>,
    ) -> anyhow::Result<(Self, Started)> {
        // Restricted or not the ring is already.
        let config = Self::reactor_config(shared.settings.spin, false);
        let reactor = Reactor::with_ring(ring, &config).context("Cannot make an event loop")?;
        Self::on(reactor, index, shared, counters, cpu)
    }

    /// The same with a ring of its own.
    #[cfg(test)]
    fn new(
        index: usize,
        shared: Arc<Shared>,
        counters: Arc<Counters>,
        cpu: Option<usize>,
    ) -> anyhow::Result<(Self, Started)> {
        let ring = DisabledRing::new(&Self::reactor_config(shared.settings.spin, true));
        Self::with_ring(ring, index, shared, counters, cpu)
    }

    /// The same over an event loop that there is.
    fn on(
        mut reactor: Reactor,
        index: usize,
        shared: Arc<Shared>,
        counters: Arc<Counters>,
        cpu: Option<usize>,
    ) -> anyhow::Result<(Self, Started)> {
        let io_bytes_max = shared.policy.data_bytes_max as usize;
        // Twice the largest request, for a direct read takes up to a block more on each side. Down to a
        // multiple of that, for up would be more than was allowed.
        let slot_bytes_max = (2 * io_bytes_max).next_power_of_two();
        let arena_bytes = shared.arena_bytes - shared.arena_bytes % slot_bytes_max;
        let arena = Arena::new(arena_bytes, slot_bytes_max).with_context(|| {
            format!(
                "Cannot map {} MiB of memory for a worker. Give a smaller --memory",
                shared.arena_bytes >> 20
            )
        })?;
        let unregistered = reactor.register_arena(&arena).err();
        let claims = lock(&shared.claims).clone();
        let claims: Vec<_> = claims.into_iter().map(|fd| reactor.file(fd)).collect();
        let unclaimed = reactor.has_ring() && claims.iter().any(|claim| !claim.is_registered());
        let engine: Box<dyn Engine> = if shared.backend == BackendKind::Uring && reactor.has_ring() {
            Box::new(Uring::new(&reactor))
        } else {
            Box::new(Threads::new(&reactor))
        };
        let pinned = cpu.map(|cpu| {
            let mut set = rustix::thread::CpuSet::new();
            set.set(cpu);
            rustix::thread::sched_setaffinity(None, &set).map(|()| cpu)
        });
        let mut no_rdma = None;
        let mut rdma = None;
        if rdma::unavailable().is_none() {
            let (charging, counting) = (Arc::clone(&shared), Arc::clone(&counters));
            let memory: QueuePairMemory = Box::new(move |address, bytes| {
                let origin = address.map(Origin::from);
                let permit = charging.sessions.queue_pair(origin, bytes).inspect_err(|text| {
                    counting.rejected_queue_pairs.add(1);
                    log_client!(
                        info,
                        origin origin,
                        "queue-pair-rejected",
                        "A queue pair was rejected. {text}"
                    );
                })?;
                Ok(Box::new(permit))
            });
            match rdma::server(&mut reactor, RDMA, Arc::clone(&shared.policy), &arena, memory) {
                Ok(server) => rdma = Some(server),
                Err(error) if shared.rdma => return Err(error.into()),
                Err(error) => no_rdma = Some(error),
            }
        }
        let (mailbox, mail) = reactor::mailbox(reactor.waker());
        let fallback = reactor.fallback_reason().map(str::to_owned);
        let (connections, incoming) = reactor::mailbox(reactor.waker());
        let started = Started {
            senders: WorkerSenders { mailbox, connections },
            pinned,
            fallback,
            unregistered,
            no_rdma,
            unclaimed,
        };
        counters.arena_bytes.set(arena.len() as u64);
        reactor.set_idle_time(Arc::clone(&counters.idle));
        let policy = Policy { queue_pair: rdma.is_some(), ..Policy::clone(&shared.policy) };
        let mut tcp = tcp::TcpServer::new(TCP, Arc::new(policy));
        tcp.set_heap_max(shared.heap_bytes);
        let placing = Arc::clone(&shared);
        tcp.set_place(Box::new(move |peer| {
            let to = if peer.is_control() { index } else { placing.placement.claim(index) };
            (to != index).then_some(to)
        }));
        let mut transports: Vec<Box<dyn ServerTransport>> = vec![Box::new(tcp)];
        transports.extend(rdma);
        let transport = mux::Mux::new(transports);
        let worker = Self {
            transport,
            admission: Admission::new(
                &arena,
                io_bytes_max,
                shared.exports.places_max(),
                shared.settings.memory_caps,
            ),
            counts_requests: shared.sessions.count_requests()
                || shared.keys.as_ref().is_some_and(|keys| keys.counts_requests()),
            tracer: Tracer::new(shared.trace.as_ref()),
            slow: SlowRequests::new(shared.settings.slow),
            settings: shared.settings,
            shared,
            counters,
            index,
            mail,
            incoming,
            reactor,
            claims,
            arena,
            engine,
            cached: CachedFiles::new(),
            connections: Connections::default(),
            sessions: LocalSessions::of_worker(index),
            requests: Requests::default(),
            device_queues: DeviceQueues::default(),
            latencies: Latencies::default(),
            measured: Vec::with_capacity(MEASURED_MAX),
            unpublished: 0,
            closing: 0,
            orphans: HashMap::new(),
            held: Vec::new(),
            throttled: Throttled::default(),
            throttled_until: None,
            joined: 0,
            expires: None,
            checks_fences: false,
            opened_at_once: None,
            deferred: VecDeque::new(),
            events: Vec::new(),
            handed_over: false,
            is_busy: false,
            drain: None,
            #[cfg(any(test, feature = "test-worker"))]
            quirks: 0,
        };
        Ok((worker, started))
    }

    /// Works until it is told to stop. Returns whether everything in flight was answered by then.
    pub fn run(&mut self) -> anyhow::Result<bool> {
        #[cfg(debug_assertions)]
        filter::install()?;
        loop {
            self.run_once()?;
            if let Some(outcome) = self.drained() {
                self.publish_gauges();
                self.hand_over_last_trace();
                return Ok(outcome);
            }
        }
    }

    /// Never, but in a test that wants it.
    #[inline(always)]
    fn has_quirk(&self, quirk: Quirk) -> bool {
        #[cfg(any(test, feature = "test-worker"))]
        let has = self.quirks & quirk as u8 != 0;
        #[cfg(not(any(test, feature = "test-worker")))]
        let has = {
            let _ = quirk;
            false
        };
        has
    }

    /// One iteration of the loop.
    fn run_once(&mut self) -> anyhow::Result<()> {
        // What has happened: events, other threads' mail, and operations that have ended.
        self.poll_events()?;
        self.admission.begin_iteration();
        if !self.has_quirk(Quirk::LateMail) {
            self.take_mail();
        }
        self.take_completions();
        // Requests that wait for memory come before those that have just arrived.
        self.show_life();
        self.admit();
        self.begin_throttled();
        self.evict_stalled();
        self.take_requests();
        self.pass_on();
        // What volumes have carried out at once, then what the engine has gathered.
        self.take_completions();
        self.handed_over |= self.engine.flush();
        self.flush();
        self.cached.end_iteration();
        self.publish();
        Ok(())
    }

    /// Submits what the last iteration asked for, and takes in what has ended. Sleeps here if there is
    /// nothing to do.
    fn poll_events(&mut self) -> anyhow::Result<()> {
        let wait = if self.is_busy { Wait::Poll } else { Wait::Block };
        // Who has just got a batch of writes may want this core: no spinning against it.
        let spins = wait == Wait::Poll || !std::mem::take(&mut self.handed_over);
        self.reactor.set_spin_multiplier(if spins { self.device_queues.in_flight().max(1) } else { 0 });
        let happened = self.transport.run_once(&mut self.reactor, wait, &mut self.events);
        self.is_busy = happened.context("The event loop failed")?;
        // Usually empty; draining an empty vector costs 22 instructions.
        if !self.events.is_empty() {
            let (mut may_expire, mut is_late) = (false, false);
            for event in self.events.drain(..) {
                if event.token.owner == engine::OWNER {
                    self.engine.handle(event);
                } else {
                    may_expire |= event.token == EXPIRY;
                    is_late |= event.token == FENCE_CHECK;
                }
            }
            if may_expire {
                self.expire();
            }
            if is_late {
                self.check_fences();
            }
        }
        Ok(())
    }

    fn take_mail(&mut self) {
        while let Some((connection, permit)) = self.incoming.take() {
            self.is_busy = true;
            // By a worker that drains, too: a client reconnects when it has begun a session, and not before.
            self.adopt(connection, permit);
        }
        while let Some(mail) = self.mail.take() {
            self.is_busy = true;
            match mail {
                Mail::Forget { session, handle } => self.sessions.forget(session, handle),
                Mail::Fence(connection) => self.close_fenced(connection),
                Mail::Settle(connection) => self.settle(connection),
                Mail::Release => self.release_held(),
                Mail::Revoke(revocation) => self.revoke(&revocation),
                Mail::Kill { session, by, done } => done.send(self.kill(&session, &by)),
                Mail::Slow(reply) => reply.send(self.slow_requests()),
                Mail::BeginTrace(clock, ring) => _ = self.tracer.set_live(Some((clock, ring))),
                Mail::EndTrace(reply) => {
                    if let Some(ring) = self.tracer.set_live(None) {
                        reply.send((self.index, ring));
                    }
                }
                Mail::Wake => {}
                Mail::Leave => self.leave_exports(),
                Mail::Claim(claims, taken) => {
                    self.claims = claims.into_iter().map(|claim| self.reactor.file(claim)).collect();
                    let has_room =
                        !self.reactor.has_ring() || self.claims.iter().all(reactor::File::is_registered);
                    let _ = taken.send(has_room);
                }
                Mail::Set(settings) => {
                    self.reactor.set_spin(settings.spin);
                    self.transport.set_timeouts(settings.stall_timeout, settings.linger);
                    self.admission.set_caps(settings.memory_caps);
                    self.slow.set_threshold(settings.slow);
                    self.settings = settings;
                }
                Mail::Trace => self.hand_over_trace(),
                Mail::Drain(deadline) => {
                    let reject_at = self.reactor.clock().now() + GRACE;
                    let silent_until = self.reactor.clock().now() + GRACE_OF_SILENT;
                    for at in [reject_at, silent_until, deadline] {
                        self.reactor.timer(at, TIMER);
                    }
                    self.drain =
                        Some(Drain { reject_at, deadline, check_at: reject_at, goaway_deadline: None });
                }
            }
        }
    }

    fn adopt(&mut self, connection: RawConnection, permit: Arc<ConnectionPermit>) {
        let peer = connection.peer();
        let incoming = match connection {
            RawConnection::Tcp(stream, _) | RawConnection::Passed(stream, _) => Accepted::Stream(stream),
            RawConnection::Rdma(incoming) => Accepted::Other(incoming),
        };
        let adopted = self.transport.adopt(&mut self.reactor, incoming);
        let id = match adopted {
            Ok(id) => id,
            Err(error) => {
                log_client!(
                    info,
                    peer,
                    "connection-failed",
                    "A connection failed when it was accepted: {error}."
                );
                return;
            }
        };
        self.unpublished = PUBLISHED_EVERY;
        self.transport.hold(id, Arc::clone(&permit) as _);
        self.connections.arrive(id, Arrival { permit, peer });
    }

    fn take_completions(&mut self) {
        while let Some(completion) = self.engine.next() {
            self.is_busy = true;
            self.completed(completion);
        }
        self.feed_devices();
    }

    /// Passes on the connections that belong to other workers.
    fn pass_on(&mut self) {
        while let Some(passed) = self.transport.next_passed() {
            self.unpublished = PUBLISHED_EVERY;
            if let (Some(workers), Some(Arrival { permit, peer })) =
                (self.shared.workers.get(), self.connections.take_arriving(passed.connection))
            {
                let connection = RawConnection::Passed(passed.stream, peer);
                workers[passed.to].connections.send((connection, permit));
            }
        }
    }

    fn take_requests(&mut self) {
        while self.admission.has_budget()
            && let Some(request) = self.deferred.pop_front()
        {
            self.is_busy = true;
            self.take_request(&request);
        }
        while let Some(event) = self.transport.next_event() {
            self.is_busy = true;
            match event {
                ServerEvent::Opened(id, peer) => self.opened(id, *peer),
                ServerEvent::Moved(from, to) => self.moved(from, to),
                ServerEvent::Request(request) if self.admission.has_budget() => self.take_request(&request),
                // To take it on and have it wait for memory would cost more.
                ServerEvent::Request(request) => self.deferred.push_back(request),
                ServerEvent::Fetched(key, range) => self.fetched(key, range),
                ServerEvent::Damaged(key, _) => self.damaged(key),
                ServerEvent::Closed(id, reason) => {
                    self.unpublished = PUBLISHED_EVERY;
                    self.closed(id, &reason);
                }
                ServerEvent::OneWay(..)
                | ServerEvent::Receipt(..)
                | ServerEvent::Refused(_)
                | ServerEvent::Answered(..) => unreachable!("the policy grants none"),
            }
        }
    }

    fn take_request(&mut self, request: &transport::Request) {
        let Some(connection) = self.connections.key(request.key.connection) else { return };
        match self.connections[connection].standing {
            Standing::Settled => self.command(connection, request),
            Standing::Told => self.command_when_told(connection, request),
            Standing::Waiting => self.command_while_waiting(connection, request),
            Standing::Closing(_) => {}
        }
    }

    /// Sends the responses, a batch for each connection.
    fn flush(&mut self) {
        self.transport.flush(&mut self.reactor);
        if self.transport.has_gated() {
            self.promise_life_sign();
        }
        self.is_busy |= self.admission.is_exhausted();
        if self.latencies.end_iteration() {
            let began = self.reactor.clock().now();
            let now = self.reactor.clock().read();
            self.latencies.record(began, now, &self.counters);
            self.measured.drain(..).for_each(|counters| counters.took(now.saturating_duration_since(began)));
        }
    }

    /// Publishes the gauges. While the worker is busy another iteration follows at once, and one of them does
    /// it; but at once if there are more or fewer connections, for others are placed by that.
    fn publish(&mut self) {
        self.counters.iterations.add(1);
        self.unpublished += 1;
        if !self.is_busy || self.unpublished >= PUBLISHED_EVERY {
            self.publish_gauges();
        }
    }

    fn publish_gauges(&mut self) {
        self.unpublished = 0;
        let counters = &self.counters;
        counters.connections.set(self.transport.connections() as u64);
        counters.need_slot.set(self.requests.in_state(State::NeedSlot) as u64);
        counters.fetching.set(self.requests.in_state(State::Fetching) as u64);
        counters.executing.set((self.requests.in_state(State::Executing) + self.closing) as u64);
        counters.slot_bytes.set(self.arena.used_bytes() as u64);
        let (heap_bytes, message_waits) = self.transport.heap();
        counters.heap_bytes.set(heap_bytes as u64);
        counters.message_waits.set(message_waits);
        counters.sleeps.set(self.reactor.sleeps());
        counters.iteration_bytes_max.set(self.admission.iteration_bytes_max() as u64);
        for (counter, waits) in counters.memory_waits.iter().zip(self.admission.share_waits()) {
            counter.set(waits);
        }
    }

    // The end
    // ----------------------------------------------------------------------------------------------------

    /// The first request of a connection has come.
    #[cold]
    fn begin_grace(&mut self, connection: usize) {
        let until = self.reactor.clock().now() + GRACE;
        let connection = &mut self.connections[connection];
        (connection.has_asked, connection.grace_until) = (true, until);
        if self.drain.is_some() {
            self.reactor.timer(until, TIMER);
        }
    }

    /// Whether new requests of a connection are rejected.
    fn is_rejecting(&self, connection: usize) -> bool {
        self.drain.as_ref().is_some_and(|drain| {
            let now = self.reactor.clock().now();
            now >= drain.reject_at && now >= self.connections[connection].grace_until
        })
    }

    /// Whether the worker was told to stop and is done; if so, whether everything was answered.
    fn drained(&mut self) -> Option<bool> {
        let drain = self.drain.as_mut()?;
        let now = self.reactor.clock().now();
        if now < drain.reject_at {
            return None;
        }
        if !self.throttled.is_empty() {
            self.is_busy = true;
            self.reject_throttled();
            return None;
        }
        if now >= drain.deadline {
            return Some(self.connections.none_is_open() && self.requests.is_empty());
        }
        if self.connections.none_is_open() {
            if now >= drain.check_at {
                if self.transport.is_delivered() {
                    return Some(true);
                }
                drain.check_at = now + DELIVERY_CHECK;
                self.reactor.timer(drain.check_at, TIMER);
            }
            let goaway_deadline = *drain.goaway_deadline.get_or_insert_with(|| {
                self.reactor.timer(now + GOAWAY_TIMEOUT, TIMER);
                now + GOAWAY_TIMEOUT
            });
            return (now >= goaway_deadline).then_some(true);
        }
        // What has arrived in the meantime is answered first; for a while, as somebody may go on sending.
        if !self.deferred.is_empty() || (self.is_busy && now < drain.reject_at + QUIESCE_TIMEOUT) {
            return None;
        }
        for (key, connection) in self.connections.iter() {
            let is_idle = self.requests.oldest(key).is_none() && now >= connection.grace_until;
            if is_idle && self.transport.unsent_bytes(connection.id) == 0 {
                self.is_busy = true;
                let status = Status::transport(libc::ESHUTDOWN);
                self.transport.close(
                    &mut self.reactor,
                    connection.id,
                    status,
                    "The server is shutting down. Connect again later.",
                );
            }
        }
        None
    }
}
