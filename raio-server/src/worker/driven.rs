//! A worker that a test drives, in the test's own thread and by the test's clock.
//!
//! Nothing happens by itself: an iteration of the worker, a blocking operation (elsewhere a thread of the
//! pool does it) and the passing of time are calls. So what becomes of a run depends on those calls alone.
//! The reactor is the one over epoll and the engine is `threads`, because the kernel ends operations of
//! io_uring when it likes.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use clap::Parser;
use raio_transport::reactor::{self, Reactor};
use raio_transport::transport::{AcceptedStream, ServerTransport};

use super::{Mail, RawConnection, Shared, Worker, WorkerSenders};
use crate::config::{BackendKind, Config, Options};
use crate::engine::Job;
use crate::export::Exports;
use crate::limits::{Limits, Room};
use crate::placement::Placement;
use crate::pool::{Begun, Pool};
use crate::sessions::Sessions;
use crate::stats::Counters;

/// What a worker has because of its clients, and all workers count: nothing once they are gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InUse {
    /// Connections, as the transport has them, and as the worker has them.
    pub connections: [usize; 2],
    /// Sessions, as the worker has them, and as all workers share them.
    pub sessions: [usize; 2],
    /// Channels without a connection, and requests that connections have left behind or that wait for such.
    pub channels: [usize; 2],
    /// Files that have a handle, and files that are being closed.
    pub files: [usize; 2],
    /// Connections, open files and what else the limits count.
    pub places: usize,
    /// Data connections, by which new ones are placed.
    pub data_connections: usize,
    /// Requests that are not answered, and those that are deferred to the next iteration.
    pub requests: [usize; 2],
    /// Bytes that requests hold, and connections that wait for some, by the books of the admission.
    pub admitted: (usize, usize),
    /// Bytes of the arena.
    pub slot_bytes: usize,
    /// Bytes of messages beside it.
    pub heap_bytes: usize,
    /// Operations of the reactor.
    pub operations: usize,
    /// Jobs of the pool.
    pub jobs: usize,
}

/// See the module documentation. Everything is done by the thread that made it.
pub struct TestWorker {
    config: Config,
    places: usize,
    shared: Arc<Shared>,
    limits: Arc<Limits>,
    pool: &'static Pool<Job>,
    /// Jobs that were begun and have not ended, oldest first.
    begun: Vec<Begun<Job>>,
    /// Whom to send mail, and the worker. None only while it is replaced.
    running: Option<(WorkerSenders, Worker)>,
    now: Instant,
}

impl TestWorker {
    /// A worker of a server with these options, whose clients may have `places` connections and open files
    /// together. Of the options the listeners, the backend and the number of workers do not count.
    pub fn new(options: &[&str], places: usize) -> anyhow::Result<Self> {
        let config = Options::try_parse_from(["raio_server"].iter().chain(options))?.check(1)?;
        let config = Config { backend: BackendKind::Threads, workers: 1, spin: Duration::ZERO, ..config };
        let pool = Pool::without_threads();
        let exports = Exports::open(&config.exports, pool)?;
        let (limits, sessions) = limits(&config, places)?;
        let shared = Arc::new(Shared::new(&config, exports, sessions)?);
        let now = Instant::now();
        let running = Some(start(&shared, 0, now)?);
        Ok(Self { config, places, shared, limits, pool, begun: Vec::new(), running, now })
    }

    /// The worker has drained, and its process ends. Another one begins, with the same exports.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.running = None;
        while self.run_job(0) {}
        let shared = Arc::get_mut(&mut self.shared).context("The worker has left something behind")?;
        (self.limits, shared.sessions) = limits(&self.config, self.places)?;
        shared.placement = Placement::new(1);
        self.running = Some(start(&self.shared, 0, self.now)?);
        Ok(())
    }

    fn senders(&self) -> &WorkerSenders {
        &self.running.as_ref().expect("there is a worker").0
    }

    fn worker(&mut self) -> &mut Worker {
        &mut self.running.as_mut().expect("there is a worker").1
    }

    /// Fills the free memory of the arena, to see if any of it is sent as it is.
    pub fn fill_arena(&mut self, byte: u8) {
        let arena = &mut self.worker().arena;
        let len = arena.slot_bytes_max();
        let slots: Vec<_> = std::iter::from_fn(|| arena.alloc(len)).collect();
        slots.into_iter().for_each(|mut slot| slot.bytes_mut().fill(byte));
    }

    /// Hands over a stream socket, non-blocking, as the main thread does. The error says why there may not be
    /// one more connection.
    pub fn connect(&mut self, socket: OwnedFd) -> anyhow::Result<()> {
        let permit = self.limits.connect(None).map_err(|excess| anyhow!(excess.text))?;
        self.senders()
            .connections
            .send((RawConnection::Tcp(AcceptedStream::new(socket), None), Arc::new(permit)));
        Ok(())
    }

    /// One iteration of the worker. It never sleeps.
    pub fn run_once(&mut self) -> anyhow::Result<()> {
        let worker = self.worker();
        worker.is_busy = true;
        worker.run_once()
    }

    /// Carries out one of the blocking operations that may begin, the oldest if `which` is 0, or else of
    /// those that were begun. Returns false if there is none.
    pub fn run_job(&mut self, which: usize) -> bool {
        self.pool.run_one(which) || self.end_job(which)
    }

    /// Begins one of the blocking operations that may begin, the oldest if `which` is 0: from now on it
    /// cannot be cancelled. Returns false if there is none.
    pub fn begin_job(&mut self, which: usize) -> bool {
        let before = self.begun.len();
        self.begun.extend(self.pool.begin_one(which));
        self.begun.len() > before
    }

    /// Carries out one of those that were begun, the oldest if `which` is 0. Returns false if there is none.
    pub fn end_job(&mut self, which: usize) -> bool {
        let Some(at) = which.checked_rem(self.begun.len()) else { return false };
        self.pool.end_one(self.begun.remove(at));
        true
    }

    /// Lets time pass.
    pub fn advance(&mut self, by: Duration) {
        self.now += by;
        let now = self.now;
        self.worker().reactor.clock().set(now);
    }

    /// Tells the worker to stop, within this time.
    pub fn drain(&mut self, within: Duration) {
        self.senders().mailbox.send(Mail::Drain(self.now + within));
    }

    /// Whether it has drained and is to end; if so, whether everything was answered.
    pub fn drained(&mut self) -> Option<bool> {
        self.worker().drained()
    }

    /// What there is now.
    pub fn in_use(&mut self) -> InUse {
        let (_, worker) = self.running.as_mut().expect("there is a worker");
        let Shared { sessions, placement, .. } = &*self.shared;
        InUse {
            connections: [worker.transport.connections(), worker.connections.len()],
            sessions: [worker.sessions.len(), sessions.len()],
            channels: [sessions.channel_counts().parked, worker.orphans.len() + worker.held.len()],
            files: [sessions.open_files(), worker.closing],
            places: self.limits.places(),
            data_connections: placement.data_connections().iter().sum(),
            requests: [worker.requests.len(), worker.deferred.len()],
            admitted: worker.admission.in_use(),
            slot_bytes: worker.arena.used_bytes(),
            heap_bytes: worker.transport.heap().0,
            operations: worker.reactor.in_flight(),
            jobs: self.pool.unfinished(),
        }
    }
}

fn limits(config: &Config, places: usize) -> anyhow::Result<(Arc<Limits>, Sessions)> {
    let room = Room { descriptors: places, files: places / 2, bytes: config.places_bytes, workers: 1 };
    let limits = Limits::new(room, config.session_caps, config.address_caps);
    let sessions_max = config.sessions_max.context("Give --max-sessions")?;
    Ok((Arc::clone(&limits), Sessions::new(sessions_max, limits)))
}

/// Starts a worker whose clock stands at this time.
pub(super) fn start(
    shared: &Arc<Shared>,
    index: usize,
    now: Instant,
) -> anyhow::Result<(WorkerSenders, Worker)> {
    // Few and small buffers, so that a test runs out of them.
    let config = reactor::Config {
        epoll: true,
        spin: Duration::ZERO,
        received_count: 4,
        received_bytes: 4096,
        ..reactor::Config::default()
    };
    let reactor = Reactor::new(&config).context("Cannot make an event loop")?;
    reactor.clock().set(now);
    let counters = Arc::new(Counters::new(shared.exports.current().all().len(), shared.exports.places_max()));
    let (worker, started) = Worker::on(reactor, index, Arc::clone(shared), counters, None)?;
    Ok((started.senders, worker))
}
