//! The server: two workers that run when the run says so.

use std::os::fd::OwnedFd;
use std::sync::{Arc, LazyLock, Mutex};

use clap::Parser;
use raio_transport::sync::lock;
use raio_transport::transport::{AcceptedStream, ServerTransport};

use super::disk::{Disk, FILE_BYTES, FILES, SimulatedFile, identity};
use super::{clock, driven};
use crate::config::{BackendKind, Config, Options};
use crate::engine::Lanes;
use crate::export::{Export, Exports};
use crate::limits::{Caps, Limits, Room};
use crate::pool::Pool;
use crate::sessions::Sessions;
use crate::worker::{Mail, Quirk, RawConnection, Shared, Worker, WorkerSenders};

pub const WORKERS: usize = 2;
/// As many sessions as all clients of a run have.
const SESSIONS_MAX: usize = 64;
/// The longest that channels are kept.
const LINGER: &str = "200";

/// See the module documentation.
pub struct Server {
    workers: Vec<(WorkerSenders, Worker)>,
    shared: Arc<Shared>,
    limits: Arc<Limits>,
    drains: bool,
}

/// Of a pool without threads. No operation of the disk's comes there.
static LANES: LazyLock<Lanes> = LazyLock::new(|| Lanes::new(Pool::without_threads()));

impl Server {
    /// One that serves this disk. Its handles begin with `generation`.
    pub fn start(disk: &Arc<Mutex<Disk>>, generation: u32, is_careless: bool) -> Self {
        let options = [
            "raio_server",
            "--export",
            "unused=null:1",
            "--memory",
            "4M",
            "--io-max",
            "64k",
            "--linger",
            LINGER,
        ];
        let config = Options::parse_from(options).check(WORKERS).expect("the options make sense");
        let config = Config { backend: BackendKind::Threads, workers: WORKERS, ..config };
        let exports = (0..FILES as u32).map(|file| {
            let volume = SimulatedFile { disk: Arc::clone(disk), file };
            let verifier = lock(disk).verifier(file as usize);
            let export = Export::of_volume(&name(file), volume, FILE_BYTES, LANES.clone());
            Arc::new(export.known_as(identity(file as usize), verifier).at_place(file as usize))
        });
        let exports = Exports::of(exports.collect());
        let room = Room { descriptors: 1024, files: 512, bytes: 1 << 24, workers: WORKERS };
        let limits = Limits::new(room, Caps::default(), Caps::default());
        let sessions = Sessions::new(SESSIONS_MAX, Arc::clone(&limits)).with_first_generation(generation);
        let shared = Arc::new(Shared::new(&config, exports, sessions).expect("there is no trace"));
        let workers: Vec<_> = (0..WORKERS)
            .map(|index| driven::start(&shared, index, clock()).expect("a worker starts"))
            .map(|(senders, mut worker)| {
                worker.quirks = if is_careless { Quirk::ForgetsOrphans as u8 } else { 0 };
                (senders, worker)
            })
            .collect();
        let senders = workers.iter().map(|(senders, _)| senders.clone()).collect();
        shared.workers.set(senders).expect("nobody has");
        Self { workers, shared, limits, drains: false }
    }

    /// A connection is accepted, for this worker.
    pub fn accept(&self, at: usize, socket: OwnedFd) {
        let permit = self.limits.connect(None).expect("there is room");
        self.workers[at]
            .0
            .connections
            .send((RawConnection::Tcp(AcceptedStream::new(socket), None), Arc::new(permit)));
    }

    /// One iteration of a worker.
    pub fn run(&mut self, at: usize, is_mail_late: bool) {
        let worker = &mut self.workers[at].1;
        worker.reactor.clock().set(clock());
        if is_mail_late {
            worker.quirks |= Quirk::LateMail as u8;
        }
        // It never sleeps.
        worker.is_busy = true;
        worker.run_once().expect("the worker goes on");
        worker.quirks &= !(Quirk::LateMail as u8);
    }

    /// It is told to stop, in good order, as soon as it has answered what it has.
    pub fn drain(&mut self, within: std::time::Duration) {
        self.drains = true;
        for (senders, _) in &self.workers {
            senders.mailbox.send(Mail::Drain(clock() + within));
        }
    }

    /// Whether it was told to stop, and has.
    pub fn has_drained(&mut self) -> bool {
        self.drains && self.workers.iter_mut().all(|(_, worker)| worker.drained().is_some())
    }

    /// What is left of clients: sessions, files, connections, requests, orphans.
    pub fn left(&self) -> [usize; 5] {
        let of_workers = |count: fn(&Worker) -> usize| self.workers.iter().map(|(_, w)| count(w)).sum();
        [
            self.shared.sessions.len(),
            self.shared.sessions.open_files(),
            of_workers(|worker| worker.transport.connections()),
            of_workers(|worker| worker.requests.len() + worker.held.len()),
            of_workers(|worker| worker.orphans.len()) + self.shared.orphan_guard.len(),
        ]
    }
}

/// What a file's export is called.
pub fn name(file: u32) -> String {
    format!("v{file}")
}
