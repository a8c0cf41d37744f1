//! The server: starts the workers, places connections on them, and ends them.
//!
//! The main thread has a reactor of its own, for accepting, for signals, and to hear when a worker ends. It
//! serves nothing itself.

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock, Mutex, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use jiff::Timestamp;
use raio_transport::handshake::Identity;
use raio_transport::reactor::{
    self, DisabledRing, Event, Op, Reactor, Receiver, Sender, Signals, Token, Wait,
};
use raio_transport::transport::AcceptedStream;
use raio_transport::{open_files, random, rdma};
use rustix::fs::{Mode, OFlags};
use rustix::net::{SendFlags, Shutdown};

use crate::acceptor::{Connection, Handshaken, TlsAcceptor};
use crate::audit::{Audit, Who};
use crate::claim::{Attempt, Claim, try_claim};
use crate::config::{BackendKind, Config};
use crate::control::{Control, Order, WorkerView};
use crate::engine::Job;
use crate::export::{Export, Exports};
use crate::export_spec::Source;
use crate::hand_over::{self, HandOver, Meeting, Offered, Predecessor};
use crate::handles::GENERATION_MAX;
use crate::keys::{Abilities, Keys, Revocation};
use crate::limits::{ConnectionPermit, Excess, Limits, Room, descriptors_for, session_limits};
use crate::listener::{self, Listener};
use crate::log::log_client;
use crate::peer::PeerAddress;
use crate::pool::Pool;
use crate::privileges::{self, Chown, Giving, User};
use crate::reload::{
    Claims, Granted, Reloader, Running, counted_places, keep_verifier, kinds, say_unknown_exports,
};
use crate::sandbox::{Grant, Sandbox};
use crate::service::Service;
use crate::sessions::Sessions;
use crate::state_directory::StateDirectory;
use crate::stats::Counters;
use crate::status::{Observed, Progress};
use crate::stored::Place;
use crate::trace::Trace;
use crate::tuning::http::BEAT as BEAT_INTERVAL;
use crate::tuning::main_thread::{
    DESCRIPTORS_OWN, DRAIN_SLACK, DRAIN_TIMEOUT, ENTRY_TIMEOUT, EXPIRY_CHECK, STUCK_AFTER,
};
use crate::tuning::state::{CLAIM_RETRY, CLAIM_SAY_AFTER};
use crate::verifier::Verifier;
use crate::worker::{Mail, RawConnection, Shared, Started, Worker, WorkerSenders};
use crate::{file_identity, hidden, http, log, probe};

const LISTENER: u8 = 0;
const SIGNALS: Token = Token { owner: 1, value: 0 };
const DRAIN_DEADLINE: Token = Token { owner: 2, value: 0 };
const CHECK: Token = Token { owner: 3, value: 0 };
const EXPIRY: Token = Token { owner: 4, value: 0 };
const HAND_OVER: u8 = 5;
const BEAT: Token = Token { owner: 7, value: 0 };
const ENTRY_DEADLINE: Token = Token { owner: 6, value: 0 };
const REPORT: Token = Token { owner: 8, value: 0 };

/// The threads for file operations.
static POOL: LazyLock<&'static Pool<Job>> = LazyLock::new(Pool::new);

/// The signals that the server listens to. They must be blocked before the first thread starts.
pub const HANDLED_SIGNALS: [i32; 5] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGHUP];

/// A running server.
pub struct Server {
    reactor: Reactor,
    listener: Listener,
    signals: Signals,
    shared: Arc<Shared>,
    workers: Vec<WorkerHandle>,
    ended: Receiver<Ended>,
    /// Shakes hands with clients that must have keys, ...
    acceptor: Option<TlsAcceptor>,
    /// ... and sends their connections here.
    secured: Receiver<Handshaken>,
    /// What administrators want.
    orders: Receiver<Order>,
    /// What is told about it.
    observed: Arc<Observed>,
    /// Serves that over HTTP, if it is to ...
    http: Option<http::Handle>,
    /// ... at these sockets, which a successor gets.
    http_offered: Vec<Offered>,
    limits: Arc<Limits>,
    reloader: Arc<Reloader>,
    /// There is a configuration file.
    has_file: bool,
    /// A reload runs, ...
    is_reloading: bool,
    /// ... another one is to follow, ...
    reloads_again: bool,
    /// ... and who wants to hear of that one.
    reloads_asked: Vec<OnReloaded>,
    reload_sender: Sender<Reloaded>,
    reloaded: Receiver<Reloaded>,
    /// [`CHECK`] will come.
    is_checking: bool,
    phase: Phase,
    /// Waits for a successor, if one may come. The last to be dropped: then the successor goes on.
    hand_over: Option<HandOver>,
    /// What has started this process hears of it.
    service: Service,
}

/// Hears what a reload has changed, or why nothing was changed.
pub type OnReloaded = Box<dyn FnOnce(&anyhow::Result<Vec<String>>) + Send>;

/// A reload that has ended, and who wants to hear of it.
struct Reloaded {
    result: anyhow::Result<Vec<String>>,
    asked: Vec<OnReloaded>,
}

/// How far a server is that was told to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// It was not.
    Serving,
    /// It stops to accept.
    Closing,
    /// Connections that it has accepted shake hands.
    ShakingHands,
    /// The workers complete the requests in flight, and end.
    Draining,
}

struct WorkerHandle {
    senders: WorkerSenders,
    counters: Arc<Counters>,
    /// Where it stays.
    cpu: Option<usize>,
    /// At the last check: connections that it had not taken, and its iterations.
    checked: (usize, u64),
}

/// A worker has ended; if in good order, whether everything was answered.
#[derive(Debug)]
struct Ended {
    worker: usize,
    outcome: Option<bool>,
}

/// Says that a worker has ended however it does, by a panic too.
struct EndedOnDrop {
    ended: Ended,
    sender: Sender<Ended>,
}

impl Drop for EndedOnDrop {
    fn drop(&mut self) {
        let Ended { worker, outcome } = self.ended;
        self.sender.send(Ended { worker, outcome });
    }
}

/// Whether a server could start with this, as far as can be told without listening.
pub fn check(config: &Config) -> anyhow::Result<()> {
    let user = config.user.as_deref().map(User::find).transpose()?;
    config.hand_over.as_deref().map_or(Ok(()), hand_over::check_path)?;
    config.http_token.as_deref().map(listener::read_token).transpose()?;
    let descriptors = open_files::raise(config.sessions_max.map_or(0, descriptors_for));
    let keys = config.keys.as_deref().map(|directory| Keys::open(directory, false)).transpose()?;
    try_kernel_tls(config)?;
    reduce(config, user.as_ref())?;
    let (.., exports) = limits_and_exports(config, descriptors)?;
    for directory in &config.exports_beneath {
        beneath(config, directory)?;
    }
    check_clients(config, keys.as_ref(), &exports).map(drop)
}

/// Whether the server gives up power.
fn is_reduced(config: &Config) -> bool {
    config.is_sandboxed || config.user.is_some()
}

/// Becomes the user, and gives up most of what is not needed to start.
fn reduce(config: &Config, user: Option<&User>) -> anyhow::Result<()> {
    if is_reduced(config) { privileges::reduce(user) } else { Ok(()) }
}

/// Tries what [`Config::has_kernel_tls`] needs: the kernel loads that for root alone.
fn try_kernel_tls(config: &Config) -> anyhow::Result<()> {
    if config.has_kernel_tls { probe::for_kernel_tls() } else { Ok(()) }
}

/// Checks what clients are to have by what there is, and by what the server can do. Returns what becomes of
/// CAP_CHOWN, which only clients need.
fn check_clients(config: &Config, keys: Option<&Keys>, exports: &Exports) -> anyhow::Result<Chown> {
    let Some(keys) = keys else { return Ok(Chown::GivenUp) };
    let (users, groups) = keys.owners();
    let giving = Giving::needed_for(&users, &groups, is_reduced(config))?;
    let chown = giving.chown();
    let counts_requests = keys.limits_requests();
    let counted_exports = keys.counted_exports();
    keys.check_by(Abilities { exports: kinds(exports.all()), giving, counts_requests, counted_exports })?;
    say_unknown_exports(keys);
    Ok(chown)
}

/// How many sessions there may be, the limits on their connections and files, and what clients may open.
fn limits_and_exports(config: &Config, descriptors: usize) -> anyhow::Result<(usize, Arc<Limits>, Exports)> {
    let (sessions_max, files_max) = session_limits(descriptors, config.sessions_max)?;
    let room = Room {
        descriptors: descriptors.saturating_sub(DESCRIPTORS_OWN),
        files: files_max,
        bytes: config.places_bytes,
        workers: config.workers,
    };
    let limits = Limits::new(room, config.session_caps, config.address_caps);
    let has_paths = config.exports.iter().any(|export| matches!(export.source, Source::Path(_)));
    if has_paths || config.path().is_some() {
        probe::for_files()?;
    }
    Ok((sessions_max, limits, Exports::open(&config.exports, *POOL)?))
}

/// What is exported for writing, and where it is claimed.
struct ToClaim<'a> {
    written: Vec<&'a Arc<Export>>,
    /// Of each of them.
    claims: Vec<Claim>,
    /// None: there is none, or nothing to lock.
    directory: Option<Arc<StateDirectory>>,
}

impl<'a> ToClaim<'a> {
    /// Finds out what is to be claimed. The error of a state directory that cannot be used is logged, unless
    /// the options are strict.
    fn find(config: &Config, exports: &'a Exports) -> anyhow::Result<Self> {
        let (mut written, mut claims) = (Vec::new(), Vec::new());
        for export in exports.all() {
            if let Some(claim) = export.claim()? {
                claims.push(claim);
                written.push(export);
            }
        }
        if claims.is_empty() && (config.state.is_none() || config.path().is_none()) {
            return Ok(Self { written, claims, directory: None });
        }
        let directory = match &config.state {
            Some(path) => StateDirectory::open(path).map_err(|error| hidden::explain(error, path, true)),
            None => Err(anyhow!("There is no state directory")),
        };
        let directory = match directory {
            Ok(directory) => Arc::new(directory),
            // An export that is written to may be added later.
            Err(_) if claims.is_empty() => return Ok(Self { written, claims, directory: None }),
            Err(error) if config.is_strict => {
                return Err(error.context(
                    "With --strict nothing is exported for writing without a state directory. Name one that \
                     the server may write to with --state",
                ));
            }
            Err(error) => {
                tracing::warn!(
                    name: "state-directory-missing",
                    "{error}, so nothing keeps another server from writing to the same files, or a \
                     killed one's last writes from landing after new ones; and after a restart the next \
                     fsync of each client that has written fails once. Name one with --state.",
                    error = describe(&error)
                );
                return Ok(Self { written, claims, directory: None });
            }
        };
        if let Some(export) = written.iter().zip(&claims).find(|(_, claim)| claim.contains(directory.root()))
        {
            tracing::warn!(
                name: "state-directory-exported",
                export = export.0.name(),
                "The state directory lies in an export, where clients may write to it, and so make this \
                 server wait for ever or believe that writes are not lost. Name another one with --state."
            );
        }
        Ok(Self { written, claims, directory: Some(directory) })
    }

    /// What is claimed, by the exports' names.
    fn by_name(&self) -> Claims {
        let names = self.written.iter().map(|export| export.name().to_owned());
        names.zip(self.claims.iter().cloned()).collect()
    }

    /// Makes sure that nobody else writes to what is exported for writing, and nothing of a server that has
    /// been killed can do so any more; then has the exports keep their verifiers. Returns what holds the
    /// lock; None if there is no state directory, or nothing to lock.
    fn claim(self, wait: impl FnMut(&str) -> anyhow::Result<bool>) -> anyhow::Result<Claimed> {
        let Some(directory) = self.directory.filter(|_| !self.claims.is_empty()) else {
            return Ok(Claimed::Yes(None));
        };
        let lock = match claim_when_free(&directory, &self.claims, wait)? {
            Some(lock) => lock,
            None => return Ok(Claimed::Stopped),
        };
        let boot = file_identity::boot();
        Verifier::remove_old(&directory, boot)?;
        for (export, claim) in self.written.iter().zip(&self.claims) {
            keep_verifier(&directory, export, claim, boot)?;
        }
        Ok(Claimed::Yes(Some(lock)))
    }
}

/// What came of [`ToClaim::claim`].
enum Claimed {
    /// The exports may be served, as long as the lock is open.
    Yes(Option<Arc<OwnedFd>>),
    /// The server was told to stop.
    Stopped,
}

/// Waits until nobody else has what is claimed. `wait` is told why, and returns false if the server is to
/// stop instead.
fn claim_when_free(
    directory: &StateDirectory,
    claims: &[Claim],
    mut wait: impl FnMut(&str) -> anyhow::Result<bool>,
) -> anyhow::Result<Option<Arc<OwnedFd>>> {
    loop {
        match try_claim(directory, claims, &[])? {
            Attempt::Locked(lock) => return Ok(Some(lock)),
            Attempt::Busy(why) => {
                if !wait(&why)? {
                    return Ok(None);
                }
            }
        }
    }
}

/// A server that waits for another one to end.
struct Waiting<'a> {
    reactor: &'a mut Reactor,
    signals: &'a mut Signals,
    service: &'a mut Service,
    since: Instant,
    /// What the log says that it waits for.
    said: String,
}

impl Waiting<'_> {
    /// Waits a little. Whether it is worth another try: the server has not been told to stop.
    fn wait(&mut self, why: &str) -> anyhow::Result<bool> {
        if self.since.elapsed() >= CLAIM_SAY_AFTER && self.said != why {
            tracing::warn!(name: "waiting-for-server", "Not ready yet: {why}. Waiting until it has ended.");
            self.said = why.to_owned();
        }
        self.service.wait(why);
        self.reactor.timer(Instant::now() + CLAIM_RETRY, CHECK);
        let mut events = Vec::new();
        self.reactor.run_once(Wait::Block, &mut events).context("The main event loop failed")?;
        if events.iter().any(|event| event.token == SIGNALS) {
            let stop = [libc::SIGTERM, libc::SIGINT];
            if self.signals.read(self.reactor).iter().any(|signal| stop.contains(signal)) {
                tracing::info!(name: "stopped-early", "Told to stop, before anything was served.");
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits until a server has ended that has begun to. Whether this one has not been told to stop.
    fn wait_for_end(&mut self, predecessor: &Predecessor) -> anyhow::Result<bool> {
        let socket = self.reactor.file(predecessor.descriptor());
        self.reactor.submit(CHECK, Op::Readable { file: socket });
        let why = format!("process {} completes the requests in flight", predecessor.pid);
        while !predecessor.has_ended() {
            if !self.wait(&why)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Server {
    /// Opens the exports, waits until they are nobody else's, listens, and starts the workers. None: it was
    /// told to stop before.
    ///
    /// If a server runs that hands over to this one, its sockets are taken first, and it is told to end once
    /// nothing is left that usually fails.
    ///
    /// The order is that of its power. What only root can do comes first: limits, rings, other users. Then
    /// it opens what it is going to serve, as the user that it stays. Then the sandbox closes, in two steps:
    /// RDMA devices are opened between them, because the kernel takes no commands from a process that has
    /// changed its credentials since. Threads inherit all of this, so they start last.
    pub fn start(config: Arc<Config>, mut service: Service) -> anyhow::Result<Option<Self>> {
        service.say_unreached();
        let given = config;
        let config = &*given;
        let mut sandbox = config.is_sandboxed.then(Sandbox::default);
        let descriptors = open_files::raise(config.sessions_max.map_or(0, descriptors_for));
        privileges::raise_memlock();
        let has_rdma = rdma::load().is_none();
        let (main_ring, rings) = make_rings(config, sandbox.as_mut());
        let (place, mut predecessor) = match meet(config)? {
            Some(Meeting { place, predecessor }) => (Some(place), predecessor),
            None => (None, None),
        };
        let http = open_http(config, predecessor.as_mut())?;
        // The server's key may be one that only root can read.
        let keys = config.keys.as_deref().map(|directory| Keys::open(directory, true)).transpose()?;
        try_kernel_tls(config)?;
        become_user(config)?;

        warn_if_unreadable(config);
        let (sessions_max, limits, exports) = limits_and_exports(config, descriptors)?;
        let chown = check_clients(config, keys.as_ref(), &exports)?;
        if exports.all().is_empty() {
            tracing::warn!(
                name: "no-exports",
                "Nothing is exported yet. Add an [export.NAME] table to the configuration file, and send \
                 SIGHUP."
            );
        }
        if keys.as_ref().is_some_and(|keys| keys.count() == 0) {
            tracing::warn!(
                name: "no-clients",
                "clients.toml names no client yet, so nobody can connect. Add some, and send SIGHUP."
            );
        }
        let mut reactor =
            Reactor::with_ring(main_ring, &main_reactor(config)).context("Cannot make an event loop")?;
        let mut signals =
            Signals::new(&mut reactor, &HANDLED_SIGNALS, SIGNALS).context("Cannot watch for signals")?;
        let first_generation = 1 + (random::number() % u64::from(GENERATION_MAX)) as u32;
        let sessions =
            Sessions::new(sessions_max, Arc::clone(&limits)).with_first_generation(first_generation);
        let keys = keys.map(Arc::new);
        let audit = config.audit.as_ref().map(|target| Audit::open(target, config.audit_full)).transpose()?;
        let audit = audit.map(Arc::new);
        let mut shared = Shared { keys, audit, ..Shared::new(config, exports, sessions)? };
        if config.is_open_to_others {
            tracing::warn!(
                name: "clear",
                "Clients need no key (--clear): everybody who reaches an address of --listen may open every \
                 export, and what is sent can be read and changed on its way."
            );
        }
        let mut listener = Listener::new(LISTENER);
        let for_all = shared.keys.is_some();
        let exports = shared.exports.current();
        let to_claim = ToClaim::find(config, &exports)?;
        let claims = to_claim.by_name();
        listener.use_passed(&mut reactor, &config.listen, service.take_sockets())?;
        let mut taken_over = None;
        if let Some(predecessor) = &mut predecessor {
            let given = predecessor.take_sockets();
            let count = listener.take_over(&mut reactor, &config.listen, for_all, given)?;
            taken_over = Some((predecessor.pid, count));
        }
        let mut waiting = Waiting {
            reactor: &mut reactor,
            signals: &mut signals,
            service: &mut service,
            since: Instant::now(),
            said: String::new(),
        };
        if let Some(predecessor) = predecessor {
            predecessor.end()?;
            // What is only read may be read by both for a while.
            if !to_claim.claims.is_empty() && !waiting.wait_for_end(&predecessor)? {
                return Ok(None);
            }
        }
        let state = to_claim.directory.clone();
        let lock = match to_claim.claim(|why| waiting.wait(why))? {
            Claimed::Yes(lock) => lock,
            Claimed::Stopped => return Ok(None),
        };
        shared.claims = Mutex::new(lock.into_iter().collect());
        if let Some((pid, count)) = taken_over {
            service.succeed();
            tracing::info!(name: "took-over", "Took over {count} listening sockets from process {pid}.");
        }
        listener.bind_streams(&mut reactor, &config.listen, for_all)?;
        let granted = match &mut sandbox {
            Some(sandbox) => {
                let grants = grants(config, &shared, state.as_deref(), has_rdma)?;
                let is_confined = close_in(sandbox, &exports, &grants, chown)?;
                is_confined.then(|| granted_paths(config, &exports)).transpose()?
            }
            None => {
                stay_free(config, chown)?;
                None
            }
        };
        // Opens the devices.
        let _ = rdma::unavailable();
        listener.bind_rdma(&mut reactor, &config.listen)?;
        if let Some(mut sandbox) = sandbox {
            sandbox.filter_calls();
            sandbox.report();
        }

        start_helpers(&shared)?;
        let shared = Arc::new(shared);
        start_counting(&shared)?;
        let (sender, secured) = reactor::mailbox(reactor.waker());
        let acceptor = match &shared.keys {
            Some(keys) => {
                let (policy, audit) = (Arc::clone(&shared.policy), shared.audit.clone());
                let (keys, is_in_kernel) = (Arc::clone(keys), config.has_kernel_tls);
                Some(TlsAcceptor::start(keys, is_in_kernel, policy, audit, sender)?)
            }
            None => None,
        };
        let (sender, ended) = reactor::mailbox(reactor.waker());
        let (workers, started) = start_workers(rings, &shared, &sender)?;
        let _ = shared.workers.set(workers.iter().map(|worker| worker.senders.clone()).collect());
        if let Some(audit) = &shared.audit {
            let mailboxes: Vec<_> = workers.iter().map(|worker| worker.senders.mailbox.clone()).collect();
            audit.start(move || mailboxes.iter().for_each(|mailbox| mailbox.send(Mail::Release)))?;
        }
        let (sender, orders) = reactor::mailbox(reactor.waker());
        let waker = http::Waker::new().context("Cannot make an eventfd for HTTP")?;
        let observed = Arc::new(Observed {
            control: control(&shared, &workers, sender, &waker),
            shared: Arc::clone(&shared),
            workers: workers.iter().map(|worker| Arc::clone(&worker.counters)).collect(),
            main: Arc::default(),
            backend: say_what_was_missing(config, &started),
        });
        let http_offered = listener::http_offered(config, &http);
        let http = start_http(http, &observed, waker)?;
        let counts_requests = shared.sessions.count_requests()
            || shared.keys.as_ref().is_some_and(|keys| keys.counts_requests());
        let reloader = Arc::new(Reloader {
            limits: Arc::clone(&limits),
            counters: workers.iter().map(|worker| Arc::clone(&worker.counters)).collect(),
            pool: *POOL,
            descriptors,
            state,
            granted,
            counts_requests,
            running: Mutex::new(Running { config: Arc::clone(&given), claims }),
            shared: Arc::clone(&shared),
        });
        let (reload_sender, reloaded) = reactor::mailbox(reactor.waker());
        let hand_over = place.map(|place| HandOver::new(&mut reactor, HAND_OVER, place));
        // Who is told that the server is ready may ask whether it is. Who connects is accepted in a moment.
        observed.main.set_progress(Progress::Serving);
        Ok(Some(Self {
            reactor,
            listener,
            signals,
            shared,
            workers,
            ended,
            acceptor,
            secured,
            orders,
            observed,
            http,
            http_offered,
            limits,
            reloader,
            has_file: config.path().is_some(),
            is_reloading: false,
            reloads_again: false,
            reloads_asked: Vec::new(),
            reload_sender,
            reloaded,
            is_checking: false,
            phase: Phase::Serving,
            hand_over,
            service,
        }))
    }

    /// Where it listens, as URLs, and with which key.
    pub fn urls(&self) -> String {
        let urls = self.listener.urls();
        match &self.shared.keys {
            Some(keys) => format!("{urls} with key {}", keys.host().public()),
            None => urls,
        }
    }

    /// Serves until told to stop.
    pub fn run(mut self) -> anyhow::Result<ExitCode> {
        self.listener.start(&mut self.reactor);
        if let Some(hand_over) = &mut self.hand_over {
            hand_over.start(&mut self.reactor);
        }
        self.await_expiry();
        if self.http.is_some() {
            self.beat();
        }
        self.service.ready();
        self.report();
        let mut events = Vec::new();
        let mut running = self.workers.len();
        let mut all_answered = true;
        while running > 0 {
            self.reactor.run_once(Wait::Block, &mut events).context("The main event loop failed")?;
            for event in events.drain(..) {
                match event.token {
                    Token { owner: LISTENER, .. } => {
                        if let Some(connection) = self.listener.handle(&mut self.reactor, event) {
                            self.observed.main.accepted.add(1);
                            self.place(connection);
                        }
                    }
                    Token { owner: HAND_OVER, .. } => self.meet_successor(event),
                    ENTRY_DEADLINE => self.drain(),
                    CHECK => self.check(),
                    BEAT => self.beat(),
                    REPORT => self.report(),
                    EXPIRY => {
                        if let Some(expired) = self.shared.keys.as_ref().and_then(|keys| keys.expired()) {
                            self.revoke(expired);
                        }
                        self.await_expiry();
                    }
                    SIGNALS => {
                        for signal in self.signals.read(&mut self.reactor) {
                            if let Some(code) = self.signal(signal) {
                                return Ok(code);
                            }
                        }
                    }
                    _ => {
                        tracing::warn!(
                            name: "drain-timeout",
                            "What was in flight did not finish in {DRAIN_TIMEOUT:?}. Stopping all the same."
                        );
                        return Ok(ExitCode::FAILURE);
                    }
                }
            }
            while let Some(reloaded) = self.reloaded.take() {
                self.reloaded(reloaded);
            }
            while let Some(handshaken) = self.secured.take() {
                match handshaken {
                    Handshaken::Secured(Connection { stream, peer, permit }) => {
                        self.assign(RawConnection::Tcp(stream, peer), permit);
                    }
                    Handshaken::Finished => self.drain(),
                }
            }
            while let Some(order) = self.orders.take() {
                self.obey(order);
            }
            if self.phase == Phase::Closing && self.listener.has_stopped() {
                self.shake_last_hands();
            }
            while let Some(Ended { worker, outcome }) = self.ended.take() {
                let answered = outcome.ok_or_else(|| {
                    self.observed.main.worker_failed.store(true, Ordering::Relaxed);
                    anyhow!("Worker {worker} has failed; see above. Start the server anew.")
                })?;
                all_answered &= answered;
                running -= 1;
            }
        }
        if !all_answered {
            tracing::warn!(
                name: "drain-timeout",
                "What was in flight did not finish in {DRAIN_TIMEOUT:?}. Stopping all the same."
            );
        }
        if let Some(trace) = &self.shared.trace {
            trace.flush();
        }
        if let Some(audit) = &self.shared.audit {
            audit.flush();
        }
        Ok(if all_answered { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// Hands a connection to the worker that has fewest.
    fn place(&mut self, connection: RawConnection) {
        let peer = connection.peer();
        let permit = match self.limits.connect(peer.map(PeerAddress::origin)) {
            Ok(permit) => permit,
            Err(Excess { text, .. }) => {
                self.observed.main.rejected.add(1);
                log_client!(info, peer, "connection-rejected", "A connection was rejected. {text}");
                if let Some(audit) = &self.shared.audit {
                    audit.rejected(Who::default().at(peer), libc::EUSERS, &text);
                }
                match connection {
                    // To one with TLS it would mean nothing.
                    RawConnection::Tcp(stream, _) if !self.is_to_have_key(&stream) => {
                        // As much as the socket takes; nobody waits for a client here.
                        let rejection = self.shared.policy.rejection(libc::EUSERS, &text);
                        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                        let _ = rustix::net::send(stream.socket(), &rejection, flags);
                        let _ = rustix::net::shutdown(stream.socket(), Shutdown::Write);
                    }
                    RawConnection::Rdma(incoming) => incoming.reject(libc::EUSERS, &text),
                    // It has its permit.
                    RawConnection::Tcp(..) | RawConnection::Passed(..) => {}
                }
                return;
            }
        };
        let permit = Arc::new(permit);
        match (connection, &self.acceptor) {
            (RawConnection::Tcp(stream, peer), Some(acceptor)) if self.is_to_have_key(&stream) => {
                acceptor.begin(Connection { stream, peer, permit })
            }
            (connection, _) => self.assign(connection, permit),
        }
    }

    /// Whether the client must show by a key who it is: that of a Unix socket is known.
    fn is_to_have_key(&self, stream: &AcceptedStream) -> bool {
        self.acceptor.is_some() && *stream.identity() == Identity::Anonymous
    }

    /// Has the sessions of clients end that may do less than before.
    fn revoke(&self, revocation: Revocation) {
        // The table of sessions is that of all workers.
        if let Some(worker) = self.workers.first() {
            worker.senders.mailbox.send(Mail::Revoke(Arc::new(revocation)));
        }
    }

    /// Shows that the main thread goes on, and will do so again.
    fn beat(&mut self) {
        self.observed.main.beat();
        self.reactor.timer(Instant::now() + BEAT_INTERVAL, BEAT);
    }

    /// Sets the timer for the next key that expires.
    fn await_expiry(&mut self) {
        let Some(keys) = &self.shared.keys else { return };
        let left = keys.next_expiry().map(|at| at.duration_since(Timestamp::now()).unsigned_abs());
        let left = left.map_or(EXPIRY_CHECK, |left| left.min(EXPIRY_CHECK));
        self.reactor.timer(Instant::now() + left, EXPIRY);
    }

    /// Reads the configuration file and who may connect again, in a thread of its own, and applies what has
    /// changed. `on_end` learns what that is, or why nothing was changed. One that is asked for meanwhile
    /// comes after it.
    pub fn reload(&mut self, on_end: Option<OnReloaded>) {
        self.reloads_asked.extend(on_end);
        if std::mem::replace(&mut self.is_reloading, true) {
            self.reloads_again = true;
            return;
        }
        self.service.reloading();
        let asked = std::mem::take(&mut self.reloads_asked);
        let (reloader, sender) = (Arc::clone(&self.reloader), self.reload_sender.clone());
        let run = move || {
            let result = catch_unwind(AssertUnwindSafe(|| reloader.reload()));
            let result = result.unwrap_or_else(|_| Err(anyhow!("The server has failed there; see above")));
            sender.send(Reloaded { result, asked });
        };
        let spawned = std::thread::Builder::new().name("raio-reload".into()).spawn(run);
        if let Err(error) = spawned {
            let result = Err(anyhow!("Cannot start a thread ({error})"));
            self.reload_sender.send(Reloaded { result, asked: Vec::new() });
        }
    }

    /// A reload has ended.
    fn reloaded(&mut self, Reloaded { result, asked }: Reloaded) {
        self.is_reloading = false;
        match &result {
            Ok(changes) if changes.is_empty() => {
                tracing::info!(
                    name: "reloaded-nothing",
                    "The configuration was read again. Nothing has changed."
                );
            }
            Ok(changes) => {
                for change in changes {
                    tracing::info!(name: "reloaded-change", "{change}");
                }
                tracing::info!(name: "reloaded", "The new configuration is applied.");
            }
            Err(error) => tracing::error!(
                name: "reload-failed",
                "The new configuration is not applied, and nothing was changed: {error}.",
                error = describe(error).trim_end_matches('.')
            ),
        }
        if self.phase == Phase::Serving {
            self.service.ready();
        }
        asked.into_iter().for_each(|on_end| on_end(&result));
        self.await_expiry();
        if std::mem::take(&mut self.reloads_again) {
            self.reload(None);
        }
    }

    /// Assigns a connection to the worker that has fewest.
    fn assign(&mut self, connection: RawConnection, permit: Arc<ConnectionPermit>) {
        let placement = &self.shared.placement;
        let rank = |at: usize, worker: &WorkerHandle| {
            let waiting = worker.senders.connections.waiting() as u64;
            (placement.is_stuck(at), worker.counters.connections.get() + waiting)
        };
        let fewest = self.workers.iter().enumerate().min_by_key(|&(at, worker)| rank(at, worker));
        if let Some((_, worker)) = fewest {
            worker.senders.connections.send((connection, permit));
        }
        self.check_later();
    }

    fn check_later(&mut self) {
        if !std::mem::replace(&mut self.is_checking, true) {
            self.reactor.timer(Instant::now() + STUCK_AFTER, CHECK);
        }
    }

    /// Takes back the connections that a worker does not take, and hands them to others.
    fn check(&mut self) {
        self.is_checking = false;
        let mut stuck = Vec::new();
        for (at, worker) in self.workers.iter_mut().enumerate() {
            let (waiting, iterations) =
                (worker.senders.connections.waiting(), worker.counters.iterations.get());
            let (waited, was_at) = std::mem::replace(&mut worker.checked, (waiting, iterations));
            // What was taken back woke it all the same: its next iteration shows that it goes on.
            let was_stuck = self.shared.placement.is_stuck(at);
            let is_stuck = iterations == was_at && (was_stuck || waiting > 0 && waited > 0);
            self.shared.placement.set_stuck(at, is_stuck);
            if is_stuck {
                stuck.push(at);
            }
            if is_stuck || waiting > 0 {
                self.is_checking = true;
            }
        }
        if std::mem::take(&mut self.is_checking) {
            self.check_later();
        }
        if stuck.len() == self.workers.len() {
            return;
        }
        for at in stuck {
            while let Some((connection, permit)) = self.workers[at].senders.connections.take_back() {
                match connection {
                    RawConnection::Passed(stream, peer) => {
                        self.shared.placement.release(at);
                        let to = self.shared.placement.claim(at);
                        let senders = &self.workers[to].senders;
                        senders.connections.send((RawConnection::Passed(stream, peer), permit));
                    }
                    connection => self.assign(connection, permit),
                }
            }
        }
    }

    /// Acts on a signal. Returns the exit code if the server is to exit at once.
    fn signal(&mut self, signal: i32) -> Option<ExitCode> {
        if signal == libc::SIGUSR1 {
            log::print(&self.observed.stats());
            return None;
        }
        if signal == libc::SIGUSR2 && self.shared.trace.is_some() {
            self.workers.iter().for_each(|worker| worker.senders.mailbox.send(Mail::Trace));
            return None;
        }
        if signal == libc::SIGUSR2 {
            tracing::info!(
                name: "sigusr2-ignored",
                "SIGUSR2 is ignored: there is no trace. Start the server with --trace FILE."
            );
            return None;
        }
        if signal == libc::SIGHUP {
            if let Some(audit) = &self.shared.audit {
                audit.reopen();
            }
            if self.shared.keys.is_some() || self.has_file {
                self.reload(None);
            } else if self.shared.audit.is_none() {
                tracing::info!(
                    name: "sighup-ignored",
                    "SIGHUP is ignored: there is no configuration file (--config) to be read again. To \
                     change the configuration, stop the server and start it anew, or start its successor \
                     (--hand-over)."
                );
            }
            return None;
        }
        if self.phase != Phase::Serving {
            tracing::warn!(name: "stopped-at-once", "Told to stop a second time: stopping at once.");
            return Some(ExitCode::from(128 + signal as u8));
        }
        tracing::info!(name: "stopping", "Told to stop: completing the requests in flight.");
        self.service.stopping();
        self.stop();
        None
    }

    /// Does what an administrator wants.
    fn obey(&mut self, order: Order) {
        match order {
            Order::Reload(reply) => self.reload(Some(Box::new(move |result| {
                reply.send(match result {
                    Ok(changed) => Ok(changed.clone()),
                    Err(error) => Err(describe(error)),
                });
            }))),
            Order::Drain if self.phase == Phase::Serving => {
                tracing::info!(
                    name: "drained",
                    "An administrator ends the server: completing the requests in flight."
                );
                self.service.stopping();
                self.stop();
            }
            Order::Drain => {}
        }
    }

    /// Speaks with the successor.
    fn meet_successor(&mut self, event: Event) {
        let Some(hand_over) = &mut self.hand_over else { return };
        let offered = || self.listener.offered().into_iter().chain(self.http_offered.clone()).collect();
        let successor = hand_over.handle(&mut self.reactor, event, offered);
        if let Some(successor) = successor {
            // Its sockets are the successor's now.
            self.http.iter().for_each(http::Handle::stop_accepting);
            tracing::info!(
                name: "handing-over",
                "Handing over to process {successor}: completing the requests in flight."
            );
            self.service.hand_over(successor);
            self.stop();
        }
    }

    /// Tells the service manager how the server is.
    fn report(&mut self) {
        let Some(interval) = self.service.interval() else { return };
        let status = self.status();
        self.service.report(&status);
        self.reactor.timer(Instant::now() + interval, REPORT);
    }

    /// What the server does, in a line for people.
    fn status(&self) -> String {
        let count =
            |number: usize, thing: &str| format!("{number} {thing}{}", if number == 1 { "" } else { "s" });
        let sessions = count(self.shared.sessions.len(), "session");
        if self.phase != Phase::Serving {
            return format!("Completing the requests in flight; {sessions}");
        }
        let exports = count(self.shared.exports.current().all().len(), "export");
        let mut status = format!("Serving {exports} on {}; {sessions}", self.listener.urls());
        let now = Instant::now();
        self.observed.control.look(now);
        for (at, stuck) in self.observed.control.stuck(now).into_iter().enumerate() {
            if let Some(time) = stuck {
                status += &format!("; worker {at} has been stuck for {} s", time.as_secs());
            }
        }
        status
    }

    /// Begins to end: no more connections are accepted.
    fn stop(&mut self) {
        self.phase = Phase::Closing;
        self.observed.main.set_progress(Progress::Draining);
        self.listener.stop(&mut self.reactor);
        if let Some(hand_over) = &mut self.hand_over {
            hand_over.stop(&mut self.reactor);
        }
        self.reactor.timer(Instant::now() + ENTRY_TIMEOUT, ENTRY_DEADLINE);
    }

    /// Nothing is accepted any more. What has been comes to the workers before they are told to end.
    fn shake_last_hands(&mut self) {
        self.phase = Phase::ShakingHands;
        if let Some(hand_over) = &mut self.hand_over {
            hand_over.confirm();
        }
        match &mut self.acceptor {
            Some(acceptor) => acceptor.finish(),
            None => self.drain(),
        }
    }

    /// Has the workers complete the requests in flight, and end.
    fn drain(&mut self) {
        if self.phase == Phase::Draining {
            return;
        }
        self.phase = Phase::Draining;
        self.shared.placement.end();
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        for worker in &self.workers {
            worker.senders.mailbox.send(Mail::Drain(deadline));
        }
        self.reactor.timer(deadline + DRAIN_SLACK, DRAIN_DEADLINE);
    }
}

/// An error with its causes, but none that the text before it ends with.
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text += ": ";
            text += &cause;
        }
    }
    text
}

/// How the main thread's reactor is made.
fn main_reactor(config: &Config) -> reactor::Config {
    reactor::Config {
        entries: 64,
        spin: Duration::ZERO,
        received_count: 1,
        received_bytes: 4096,
        files: 64,
        epoll: false,
        is_restricted: config.is_sandboxed,
    }
}

/// The rings of the main thread and of the workers: later none can be made.
fn make_rings(config: &Config, sandbox: Option<&mut Sandbox>) -> (DisabledRing, Vec<DisabledRing>) {
    let main = DisabledRing::new(&main_reactor(config));
    if let Some(sandbox) = sandbox
        && main.is_some()
    {
        sandbox.note_rings(main.unrestricted());
    }
    let of_worker = Worker::reactor_config(config.spin, config.is_sandboxed);
    (main, (0..config.workers).map(|_| DisabledRing::new(&of_worker)).collect())
}

/// Becomes the user that the configuration names, with little power; that user may need a state directory.
fn become_user(config: &Config) -> anyhow::Result<()> {
    let user = config.user.as_deref().map(User::find).transpose()?;
    if let (Some(user), Some(state)) = (&user, &config.state) {
        StateDirectory::make_for(user.ids(), state)?;
    }
    reduce(config, user.as_ref())?;
    if rustix::process::geteuid().is_root() {
        tracing::warn!(
            name: "running-as-root",
            "The server runs as root, so clients can do with the exports what root can. Run it as a user of \
             its own (--user) that may access nothing but the exports."
        );
    }
    Ok(())
}

/// Says so if the configuration file cannot be read again.
fn warn_if_unreadable(config: &Config) {
    if let Some(path) = config.path()
        && let Err(error) = std::fs::File::open(path)
    {
        tracing::warn!(
            name: "configuration-unreadable",
            "The user that the server runs as cannot read {path} ({error}), so SIGHUP will not apply what \
             changes there. Let that user read it.",
            path = path.display()
        );
    }
}

/// Looks for a server that hands over to this one, and lets the next one find this one. Called before the
/// server becomes another user: the successor connects as the user that started it, or as root.
fn meet(config: &Config) -> anyhow::Result<Option<Meeting>> {
    let Some(path) = &config.hand_over else { return Ok(None) };
    Meeting::begin(path, trusted_users(config)?).map(Some)
}

/// Root, the user that starts the server, and the one that it becomes.
fn trusted_users(config: &Config) -> anyhow::Result<Vec<u32>> {
    let user = config.user.as_deref().map(User::find).transpose()?;
    let mut users = vec![0, rustix::process::geteuid().as_raw()];
    users.extend(user.map(|user| user.ids().0));
    Ok(users)
}

/// Listens for HTTP, at the sockets of a predecessor where it has them. Called before the server becomes
/// another user.
fn open_http(config: &Config, predecessor: Option<&mut Predecessor>) -> anyhow::Result<http::Sockets> {
    let owner = config.user.as_deref().map(User::find).transpose()?.map(|user| user.ids().0);
    let given = predecessor.map(Predecessor::take_http_sockets).unwrap_or_default();
    listener::bind_http(config, trusted_users(config)?, owner, given)
}

/// What administrators ask of these workers, and of the main thread.
fn control(
    shared: &Arc<Shared>,
    workers: &[WorkerHandle],
    orders: Sender<Order>,
    waker: &http::Waker,
) -> Control {
    let view = |worker: &WorkerHandle| WorkerView {
        senders: worker.senders.clone(),
        counters: Arc::clone(&worker.counters),
        cpu: worker.cpu,
    };
    let waker = waker.clone();
    Control::new(
        Arc::clone(shared),
        workers.iter().map(view).collect(),
        orders,
        Arc::new(move || waker.wake()),
    )
}

/// Starts to serve HTTP, if there is where.
fn start_http(
    sockets: http::Sockets,
    observed: &Arc<Observed>,
    waker: http::Waker,
) -> anyhow::Result<Option<http::Handle>> {
    if sockets.tcp.is_empty() && sockets.admin.is_none() {
        return Ok(None);
    }
    let handle = http::start(sockets, Arc::clone(observed), waker);
    handle.map(Some).context("Cannot start a thread for HTTP. Raise the limit on processes with `ulimit -u`")
}

/// Says that there is no sandbox.
fn stay_free(config: &Config, chown: Chown) -> anyhow::Result<()> {
    tracing::warn!(
        name: "sandbox-off",
        "The sandbox is off (--sandbox=off): an attacker who takes over the server has all that its user may \
         do."
    );
    if config.user.is_some() { privileges::drop_all(chown) } else { Ok(()) }
}

/// The files that the sandbox must allow to open.
fn grants(
    config: &Config,
    shared: &Shared,
    state: Option<&StateDirectory>,
    has_rdma: bool,
) -> anyhow::Result<Vec<Grant>> {
    let mut grants = shared.exports.current().grants()?;
    // Exports that may be added.
    for directory in &config.exports_beneath {
        grants.push(beneath(config, directory)?);
    }
    // It is read again.
    if let Some(path) = config.path() {
        let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
        grants.push(Grant::to_read_files(directory.unwrap_or(Path::new(".")))?);
    }
    // It may be opened anew.
    if let Some(directory) = shared.audit.as_ref().and_then(|audit| audit.directory()) {
        grants.push(Grant::of_log(directory)?);
    }
    // Who may connect is read again.
    if let Some(keys) = config.keys.as_deref() {
        grants.push(Grant::to_read(keys)?);
    }
    if let Some(state) = state {
        grants.push(Grant::of_state(state.fd())?);
    }
    // What tells disks from one another, and RDMA devices.
    grants.extend(Grant::to_read(Path::new("/sys")).ok());
    if has_rdma {
        grants.extend(Grant::of_devices(Path::new("/dev/infiniband")).ok());
    }
    Ok(grants)
}

/// A directory in which exports may be added, as far as the server's user may read and write there.
fn beneath(config: &Config, directory: &Path) -> anyhow::Result<Grant> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(directory, flags, Mode::empty());
    opened.and_then(|opened| Grant::of_export(opened, true, true)).with_context(|| {
        format!("{}: the directory {} cannot be used", config.name("exports-beneath"), directory.display())
    })
}

/// Where exports may be added.
fn granted_paths(config: &Config, exports: &Exports) -> anyhow::Result<Vec<Granted>> {
    let mut granted: Vec<_> = exports.all().iter().filter_map(|export| Granted::of_export(export)).collect();
    for directory in &config.exports_beneath {
        granted.push(Granted::beneath(directory.canonicalize()?));
    }
    Ok(granted)
}

/// Puts on all of the sandbox but the filter of system calls. Returns whether it restricts which files can be
/// opened.
fn close_in(
    sandbox: &mut Sandbox,
    exports: &Exports,
    grants: &[Grant],
    chown: Chown,
) -> anyhow::Result<bool> {
    // It is kept.
    file_identity::boot();
    privileges::drop_all(chown)?;
    if let Err(errno) = privileges::hide() {
        sandbox.note_gap(format!("prctl(2) does not work ({errno})"));
    }
    let is_confined = sandbox.confine_files(grants);
    if is_confined {
        exports.confine();
    }
    Ok(is_confined)
}

/// Starts the threads beside the workers.
fn start_helpers(shared: &Shared) -> anyhow::Result<()> {
    const REMEDY: &str = "Raise the limit on processes with `ulimit -u`";
    log::start().with_context(|| format!("Cannot start a thread for the log. {REMEDY}"))?;
    POOL.start_first().with_context(|| format!("Cannot start a thread for file operations. {REMEDY}"))?;
    shared.trace.as_ref().map_or(Ok(()), Trace::start)
}

/// Has a thread count what clients store, if that is limited.
fn start_counting(shared: &Arc<Shared>) -> anyhow::Result<()> {
    let Some(keys) = &shared.keys else { return Ok(()) };
    let places = counted_places(keys, &shared.exports.current());
    if places.is_empty() {
        return Ok(());
    }
    shared.stored.set(places);
    let (opening, naming) = (Arc::clone(shared), Arc::clone(shared));
    let open =
        move |(export, directory): &Place| opening.exports.current().open_directory(*export, directory);
    let name = move |(export, directory): &Place| {
        let exports = naming.exports.current();
        let export = exports.all().iter().find(|one| one.place() == *export);
        let export = export.map_or("(removed)", |export| export.name());
        if directory.is_empty() {
            format!("Export {export}")
        } else {
            format!("Export {export}, {directory:?}")
        }
    };
    shared.stored.start(open, name).context(
        "Cannot start a thread that counts what clients store. Raise the limit on processes with `ulimit -u`",
    )
}

fn start_workers(
    rings: Vec<DisabledRing>,
    shared: &Arc<Shared>,
    ended: &Sender<Ended>,
) -> anyhow::Result<(Vec<WorkerHandle>, Vec<Started>)> {
    let count = rings.len();
    let cpus = cpus_to_pin(count);
    let mut workers = Vec::new();
    let mut all_started = Vec::new();
    for (index, ring) in rings.into_iter().enumerate() {
        let counters =
            Arc::new(Counters::new(shared.exports.current().all().len(), shared.exports.places_max()));
        let (sender, receiver) = mpsc::sync_channel(1);
        let thread = {
            let (shared, counters, cpu) =
                (Arc::clone(shared), Arc::clone(&counters), cpus.get(index).copied());
            let ended = EndedOnDrop { ended: Ended { worker: index, outcome: None }, sender: ended.clone() };
            move || {
                // All of it, so that it is dropped here.
                let mut ended = ended;
                let (mut worker, started) = match Worker::with_ring(ring, index, shared, counters, cpu) {
                    Ok(made) => made,
                    Err(error) => {
                        let _ = sender.send(Err(error));
                        return;
                    }
                };
                #[cfg(all(feature = "test-attack", debug_assertions))]
                worker.attack();
                let _ = sender.send(Ok(started));
                match worker.run() {
                    Ok(outcome) => ended.ended.outcome = Some(outcome),
                    Err(error) => tracing::error!(
                        name: "worker-failed",
                        worker = index,
                        "A worker has failed: {error}.",
                        error = describe(&error)
                    ),
                }
            }
        };
        std::thread::Builder::new()
            .name(format!("raio-{index}"))
            .spawn(thread)
            .with_context(|| format!("Cannot start {count} workers. Ask for fewer with --workers"))?;
        let started = receiver.recv().context("A worker has failed; see above")??;
        workers.push(WorkerHandle {
            senders: started.senders.clone(),
            counters,
            cpu: started.pinned.and_then(Result::ok),
            checked: (0, 0),
        });
        all_started.push(started);
    }
    Ok((workers, all_started))
}

/// A CPU for each worker, if there are enough.
fn cpus_to_pin(workers: usize) -> Vec<usize> {
    let Ok(allowed) = rustix::thread::sched_getaffinity(None) else { return Vec::new() };
    let cpus: Vec<_> = (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)).collect();
    if cpus.len() < workers { Vec::new() } else { cpus }
}

/// Logs what the system did not give, once, with the remedy. Returns the backend's name.
fn say_what_was_missing(config: &Config, started: &[Started]) -> &'static str {
    let fallback = started.iter().find_map(|worker| worker.fallback.as_deref());
    if let Some(reason) = fallback {
        tracing::warn!(
            name: "no-io-uring",
            "io_uring is not used: {reason}. Files are served by threads instead, which is slower."
        );
    }
    if let Some(error) = started.iter().find_map(|worker| worker.unregistered.as_ref()) {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
        let limit = limit.map_or("unlimited".to_owned(), |bytes| format!("{} KiB", bytes >> 10));
        tracing::warn!(
            name: "buffers-not-registered",
            "Cannot register {arena} MiB of buffers with io_uring for each of {workers} workers ({error}): \
             the memlock limit is {limit}. It works all the same, a little slower. Raise the limit with \
             `ulimit -l`, or LimitMEMLOCK= in the unit.",
            arena = config.arena_bytes >> 20,
            workers = config.workers
        );
    }
    if let Some(error) = started.iter().find_map(|worker| worker.pinned?.err()) {
        tracing::info!(
            name: "workers-not-pinned",
            "The workers are not pinned to processors: {error}. The kernel may move them. \
             SystemCallFilter=sched_setaffinity in the unit allows it."
        );
    }
    if let Some(error) = started.iter().find_map(|worker| worker.no_rdma.as_ref()) {
        tracing::warn!(name: "no-rdma", "RDMA is not used, so clients of raio:// stay on TCP: {error}.");
    }
    if started.iter().any(|worker| worker.unclaimed) {
        tracing::warn!(
            name: "no-room-to-claim",
            "The limit on open files leaves no room for a ring's table of files, so if this server is \
             killed, the next one does not wait for its requests in flight. Raise it with `ulimit -n`, or \
             LimitNOFILE= in the unit."
        );
    }
    if config.backend == BackendKind::Threads || fallback.is_some() { "threads" } else { "uring" }
}
