//! Counters: what the server did, and what it is at.
//!
//! Each worker has its own, written by itself alone with plain loads and stores; whoever asks adds them up.
//! What is read while workers run is not one moment's truth, but each number is right.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use raio_transport::protocol::{OPERATIONS, Opcode};
use raio_transport::reactor::IdleTime;
use raio_transport::sync::lock;
use raio_transport::transport::CloseReason;

use crate::disks::Disk;
use crate::limits::{WHO_COUNT, Who};
use crate::throttle::{WHOSE_COUNT, Whose};
use crate::tuning::statistics::CLIENTS_SHOWN;

/// A number that one thread writes and others read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds. Only its own thread may.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed) + n, Ordering::Relaxed);
    }

    /// Sets. Only its own thread may.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// Reads, from any thread.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Why connections close, by [`CloseReason::name`]. Handshakes that fail are among them.
const REASONS: [&str; 24] = [
    "finished",
    "goaway",
    "lost",
    "local",
    "rejected",
    "evicted",
    "unreachable",
    "key_used_up",
    "magic",
    "version",
    "handshake_timeout",
    "handshake_too_long",
    "required_option",
    "checksum",
    "kind",
    "reserved",
    "length",
    "credits",
    "request_id",
    "field",
    "silent",
    "record",
    "alert",
    "stalled",
];

/// Latencies are counted in buckets of which eight are between a duration and its double.
const BUCKETS_PER_OCTAVE_LOG2: u32 = 3;
/// From 1 µs to 69 s, in powers of two of nanoseconds. What takes less or more is in the first or last
/// bucket.
const SHORTEST_LOG2: u32 = 10;
const LONGEST_LOG2: u32 = 36;
const BUCKETS: usize = ((LONGEST_LOG2 - SHORTEST_LOG2) << BUCKETS_PER_OCTAVE_LOG2) as usize;

/// How many requests have taken how long: a histogram with logarithmic buckets, of which each is an eighth of
/// what it stands for wide.
#[derive(Debug)]
pub struct Histogram {
    buckets: [Counter; BUCKETS],
    /// How long all of them together have taken, in nanoseconds.
    sum_ns: Counter,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: std::array::from_fn(|_| Counter::default()), sum_ns: Counter::default() }
    }
}

impl Histogram {
    /// Counts requests that have taken this long. Only its own thread may.
    pub fn record(&self, took: Duration, count: u64) {
        let ns = (took.as_nanos() as u64).clamp(1 << SHORTEST_LOG2, (1 << LONGEST_LOG2) - 1);
        let octave = ns.ilog2();
        let within = (ns >> (octave - BUCKETS_PER_OCTAVE_LOG2)) & ((1 << BUCKETS_PER_OCTAVE_LOG2) - 1);
        let bucket = u64::from((octave - SHORTEST_LOG2) << BUCKETS_PER_OCTAVE_LOG2) + within;
        self.buckets[bucket as usize].add(count);
        self.sum_ns.add((took.as_nanos() as u64).saturating_mul(count));
    }

    /// The end of a bucket.
    fn end(bucket: usize) -> Duration {
        let octave = SHORTEST_LOG2 + (bucket as u32 >> BUCKETS_PER_OCTAVE_LOG2);
        let within = bucket as u64 & ((1 << BUCKETS_PER_OCTAVE_LOG2) - 1);
        let eighths = (1 << BUCKETS_PER_OCTAVE_LOG2) + within + 1;
        Duration::from_nanos(eighths << (octave - BUCKETS_PER_OCTAVE_LOG2))
    }

    /// Adds what another has counted.
    fn add(&self, other: &Self) {
        self.buckets.iter().zip(&other.buckets).for_each(|(sum, counter)| sum.add(counter.get()));
        self.sum_ns.add(other.sum_ns.get());
    }

    /// How many requests were counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(Counter::get).sum()
    }

    /// How long all of them together have taken.
    pub fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum_ns.get())
    }

    /// For each power of two of nanoseconds from the first bucket's end on: how many took less.
    pub fn octaves(&self) -> impl Iterator<Item = (Duration, u64)> {
        let mut below = 0;
        self.buckets.chunks(1 << BUCKETS_PER_OCTAVE_LOG2).zip(SHORTEST_LOG2 + 1..).map(
            move |(octave, log2)| {
                below += octave.iter().map(Counter::get).sum::<u64>();
                (Duration::from_nanos(1 << log2), below)
            },
        )
    }

    /// A duration that this part of the requests, or more, have not exceeded; zero if there were none.
    pub fn quantile(&self, part: f64) -> Duration {
        let wanted = ((self.count() as f64 * part).ceil() as u64).max(1);
        let mut seen = 0;
        let reaches = |counter: &Counter| {
            seen += counter.get();
            seen >= wanted
        };
        self.buckets.iter().position(reaches).map_or(Duration::ZERO, Self::end)
    }
}

/// What one worker counts for one export.
#[derive(Debug, Default)]
pub struct ExportCounters {
    /// Requests that were carried out and answered.
    requests: PerOperation<Counter>,
    /// How long those that were measured took. There is room once there is one.
    latencies: PerOperation<OnceLock<Box<Histogram>>>,
    /// Of the requests, those with a failure.
    pub errors: Counter,
    /// Bytes read and answered.
    pub read_bytes: Counter,
    /// Bytes written.
    pub written_bytes: Counter,
    /// Requests that were delayed because of a rate, the client's or the export's ...
    pub throttled: Counter,
    /// ... and by how much, in microseconds.
    pub throttled_us: Counter,
}

/// Those of each export, by its place. There is room for exports that are yet to come.
#[derive(Debug, Default)]
pub struct ByExport(Box<[OnceLock<Box<ExportCounters>>]>);

impl ByExport {
    /// Those of the export in this place.
    pub fn get(&self, place: usize) -> Option<&ExportCounters> {
        self.0.get(place)?.get().map(|counters| &**counters)
    }

    /// Those of all exports that there are or have been.
    fn iter(&self) -> impl Iterator<Item = &ExportCounters> {
        self.0.iter().filter_map(|counters| counters.get().map(|counters| &**counters))
    }

    /// There is an export in this place, or is about to be. Any thread may say so.
    pub fn prepare(&self, place: usize) {
        if let Some(counters) = self.0.get(place) {
            counters.get_or_init(Box::default);
        }
    }
}

impl ExportCounters {
    /// A request with this opcode was carried out and answered.
    pub fn request(&self, opcode: Opcode) {
        self.requests.of(opcode).add(1);
    }

    /// How many have been.
    pub fn requests(&self, opcode: Opcode) -> u64 {
        self.requests.of(opcode).get()
    }

    /// How many have been, of all kinds.
    pub fn all_requests(&self) -> u64 {
        self.requests.0.iter().map(Counter::get).sum()
    }

    /// Requests with this opcode have taken this long.
    fn took(&self, opcode: Opcode, took: Duration, count: u64) {
        self.latencies.of(opcode).get_or_init(Box::default).record(took, count);
    }

    fn latency(&self, opcode: Opcode) -> Option<&Histogram> {
        self.latencies.of(opcode).get().map(|histogram| &**histogram)
    }
}

/// What one worker counts for one client of `clients.toml`. Each worker's lie in cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct ClientCounters {
    /// Requests that were answered.
    pub requests: Counter,
    /// Bytes read and answered.
    pub read_bytes: Counter,
    /// Bytes written.
    pub written_bytes: Counter,
}

/// What is counted for one client.
#[derive(Debug)]
pub struct CountedClient {
    sessions: AtomicU64,
    workers: Box<[ClientCounters]>,
}

impl CountedClient {
    /// What one worker counts.
    pub fn worker(&self, index: usize) -> &ClientCounters {
        &self.workers[index]
    }
}

/// A session of a client, counted as long as this is there.
#[derive(Debug)]
pub struct CountedSession(Arc<CountedClient>);

impl CountedSession {
    /// Whose it is.
    pub fn client(&self) -> &Arc<CountedClient> {
        &self.0
    }
}

impl Drop for CountedSession {
    fn drop(&mut self) {
        self.0.sessions.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The clients of `clients.toml` that have had a session. There are no more of them than that file has had.
#[derive(Debug)]
pub struct CountedClients {
    workers: usize,
    by_name: Mutex<HashMap<String, Arc<CountedClient>>>,
}

/// The sums of what is counted for a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientTotals {
    /// What `clients.toml` calls it.
    pub name: String,
    /// Its sessions now.
    pub sessions: u64,
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes read and answered.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
}

impl CountedClients {
    /// For so many workers.
    pub fn new(workers: usize) -> Self {
        Self { workers, by_name: Mutex::default() }
    }

    /// A session of the client with this name has begun.
    pub fn begin_session(&self, name: &str) -> CountedSession {
        let mut by_name = lock(&self.by_name);
        let client = match by_name.get(name) {
            Some(client) => Arc::clone(client),
            None => {
                let workers = (0..self.workers).map(|_| ClientCounters::default()).collect();
                let client = Arc::new(CountedClient { sessions: AtomicU64::default(), workers });
                by_name.insert(name.to_owned(), Arc::clone(&client));
                client
            }
        };
        drop(by_name);
        client.sessions.fetch_add(1, Ordering::Relaxed);
        CountedSession(client)
    }

    /// Those that have had most requests, most first: no more than [`CLIENTS_SHOWN`].
    pub fn busiest(&self) -> Vec<ClientTotals> {
        let clients: Vec<_> = {
            let by_name = lock(&self.by_name);
            by_name.iter().map(|(name, client)| (name.clone(), Arc::clone(client))).collect()
        };
        let mut totals: Vec<_> = clients.into_iter().map(|(name, client)| client.totals(name)).collect();
        totals.sort_by(|a, b| (b.requests, &a.name).cmp(&(a.requests, &b.name)));
        totals.truncate(CLIENTS_SHOWN);
        totals
    }
}

impl CountedClient {
    fn totals(&self, name: String) -> ClientTotals {
        let sum = |counter: fn(&ClientCounters) -> &Counter| {
            self.workers.iter().map(|worker| counter(worker).get()).sum()
        };
        ClientTotals {
            name,
            sessions: self.sessions.load(Ordering::Relaxed),
            requests: sum(|c| &c.requests),
            read_bytes: sum(|c| &c.read_bytes),
            written_bytes: sum(|c| &c.written_bytes),
        }
    }
}

/// One for each operation. An array of more than 32 elements has no default of its own.
#[derive(Debug)]
struct PerOperation<T>([T; OPERATIONS.len()]);

impl<T: Default> Default for PerOperation<T> {
    fn default() -> Self {
        Self(std::array::from_fn(|_| T::default()))
    }
}

impl<T> PerOperation<T> {
    fn of(&self, opcode: Opcode) -> &T {
        &self.0[opcode as usize - 1]
    }
}

/// What one worker counts.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections now, those in their handshake among them.
    pub connections: Counter,
    /// Requests that wait for memory now.
    pub need_slot: Counter,
    /// Requests whose data is under way now.
    pub fetching: Counter,
    /// Requests in the engine now, and files that are being closed after their session.
    pub executing: Counter,
    /// Requests answered.
    pub answered: Counter,
    /// Of these, with a failure.
    pub errors: Counter,
    /// Bytes read and answered.
    pub read_bytes: Counter,
    /// Bytes written.
    pub written_bytes: Counter,
    /// Writes whose data arrived damaged.
    pub checksum_errors: Counter,
    /// Bytes of the arena in slots now.
    pub slot_bytes: Counter,
    /// Bytes of the arena.
    pub arena_bytes: Counter,
    /// Bytes that messages take beyond what each connection has for them.
    pub heap_bytes: Counter,
    /// Times that a connection was not read from because its messages took too many.
    pub message_waits: Counter,
    /// The most bytes of the arena that one iteration has given out.
    pub iteration_bytes_max: Counter,
    /// Connections that were rejected because their session, or their client, has as many as it may.
    pub rejected_connections: [Counter; WHO_COUNT],
    /// Queue pairs for which there was no memory.
    pub rejected_queue_pairs: Counter,
    /// Opens that were rejected because there were as many open files as there may be, by [`Who`] has them.
    pub rejected_files: [Counter; WHO_COUNT],
    /// Requests that were rejected because there were as many in flight as there may be.
    pub rejected_requests: [Counter; WHO_COUNT],
    /// Times that a request had to wait for memory.
    pub slot_waits: Counter,
    /// Times that a request had to wait for one that a client which has gone has left behind.
    pub orphan_waits: Counter,
    /// Opens that waited for the audit log to be written.
    pub audit_waits: Counter,
    /// Requests that were delayed because of a rate, by [`Whose`] it is.
    pub rate_waits: [Counter; WHOSE_COUNT],
    /// Times that one had to because its session, or its address, has as much as it may.
    pub memory_waits: [Counter; WHO_COUNT],
    /// Iterations of the loop.
    pub iterations: Counter,
    /// Times that the loop went to sleep.
    pub sleeps: Counter,
    /// Requests that were answered on arrival, by the fast path.
    pub fast_path: Counter,
    /// How long the worker has waited for something to do.
    pub idle: Arc<IdleTime>,
    /// By the export's place among all.
    pub exports: ByExport,
    /// Of requests that are on no export, and of those that were rejected before they began.
    pub no_export: ExportCounters,
    requests: PerOperation<Counter>,
    /// Failures by operation and errno, once there is one.
    failures: OnceLock<Box<[Counter]>>,
    closes: [Counter; REASONS.len()],
}

/// Errno is less than this; what is not counts as the last one.
const ERRNOS: usize = 136;

impl Counters {
    /// For exports in these places, the first ones, of so many that there may be.
    pub fn new(exports: usize, places_max: usize) -> Self {
        let by_export = ByExport((0..places_max.max(exports)).map(|_| OnceLock::new()).collect());
        (0..exports).for_each(|place| by_export.prepare(place));
        Self { exports: by_export, ..Self::default() }
    }

    /// What is counted for an export; None is for what is on none.
    pub fn export(&self, export: Option<usize>) -> &ExportCounters {
        export.and_then(|export| self.exports.get(export)).unwrap_or(&self.no_export)
    }

    /// All that is counted by export.
    fn all_exports(&self) -> impl Iterator<Item = &ExportCounters> {
        self.exports.iter().chain([&self.no_export])
    }

    /// Requests with this opcode on an export have taken this long.
    pub fn took(&self, export: Option<usize>, opcode: Opcode, took: Duration, count: u64) {
        self.export(export).took(opcode, took, count);
    }

    /// How long requests with this opcode take, on all exports.
    pub fn latency(&self, opcode: Opcode) -> Histogram {
        let sum = Histogram::default();
        self.all_exports().filter_map(|export| export.latency(opcode)).for_each(|part| sum.add(part));
        sum
    }

    /// A request with this opcode has failed.
    #[cold]
    pub fn failed(&self, opcode: Opcode, errno: i32) {
        let failures = self
            .failures
            .get_or_init(|| (0..OPERATIONS.len() * ERRNOS).map(|_| Counter::default()).collect());
        let errno = usize::try_from(errno).unwrap_or(0).min(ERRNOS - 1);
        failures[(opcode as usize - 1) * ERRNOS + errno].add(1);
    }

    /// The failures by operation and errno, of which there are any.
    pub fn failures(&self) -> impl Iterator<Item = (Opcode, i32, u64)> {
        let counters = self.failures.get().into_iter().flat_map(|counters| counters.iter().enumerate());
        counters
            .filter(|(_, counter)| counter.get() > 0)
            .map(|(at, counter)| (OPERATIONS[at / ERRNOS].opcode, (at % ERRNOS) as i32, counter.get()))
    }

    /// How many connections have closed for each reason.
    pub fn closes(&self) -> impl Iterator<Item = (&'static str, u64)> {
        REASONS.into_iter().zip(self.closes.iter().map(Counter::get))
    }

    /// A request with this opcode has come.
    pub fn request(&self, opcode: Opcode) {
        self.requests.of(opcode).add(1);
    }

    /// A request on an export is delayed because of a rate.
    pub fn throttled(&self, whose: Whose, export: Option<usize>) {
        self.rate_waits[whose as usize].add(1);
        if let Some(export) = export.and_then(|export| self.exports.get(export)) {
            export.throttled.add(1);
        }
    }

    /// It begins after it was delayed for this time.
    pub fn throttled_time(&self, export: Option<usize>, time: Duration) {
        if let Some(export) = export.and_then(|export| self.exports.get(export)) {
            export.throttled_us.add(time.as_micros() as u64);
        }
    }

    /// A connection has closed.
    pub fn close(&self, reason: &str) {
        if let Some(index) = REASONS.iter().position(|&name| name == reason) {
            self.closes[index].add(1);
        } else {
            debug_assert!(false, "close reason {reason} has no counter");
        }
    }

    /// A connection has closed by itself, by its peer or by its transport.
    pub fn close_reason(&self, reason: &CloseReason) {
        self.close(reason.name());
    }
}

/// What has happened to channels, and how many there are, for the statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChannelCounts {
    /// Connections that ended, and whose channel was kept.
    pub broken: u64,
    /// Connections that have taken the place of one before.
    pub resumed: u64,
    /// Connections whose client asked what became of requests of a channel that the server did not know.
    pub not_known: u64,
    /// Sessions that their client gave up for another one.
    pub superseded: u64,
    /// Connections that were closed because another one took their place, or their session was given up.
    pub fenced: u64,
    /// Connections that were rejected because a newer one had come.
    pub stale: u64,
    /// Channels that were forgotten because nobody came back in time ...
    pub expired: u64,
    /// ... because too many were parked ...
    pub evicted_channels: u64,
    /// ... and sessions, because others wanted to begin one.
    pub evicted_sessions: u64,
    /// Channels without a connection now.
    pub parked: usize,
    /// Sessions without one now.
    pub lingering: usize,
    /// Requests that execute now and must not run twice, whose connection has ended.
    pub orphans: usize,
}

/// What only the whole server knows.
#[derive(Debug)]
pub struct Whole<'a> {
    /// How files are read and written.
    pub backend: &'a str,
    /// Connections that were accepted.
    pub accepted: u64,
    /// Of these, those that were rejected because their address has as many as it may.
    pub rejected_by_address: u64,
    /// Sessions now.
    pub sessions: usize,
    /// What has happened to their channels.
    pub channels: ChannelCounts,
    /// Records of the audit log that were written, and that were lost, if there is one.
    pub audit: Option<[u64; 2]>,
    /// Files that they have open.
    pub open_files: usize,
    /// Connections for data that each worker has.
    pub data_connections: &'a [usize],
    /// The exports' places and names.
    pub exports: &'a [(usize, &'a str)],
    /// How long the server runs.
    pub uptime: Duration,
    /// `serving` or `draining`.
    pub phase: &'a str,
    /// How many configurations it has had.
    pub config_generation: u64,
    /// Whether each worker does not go on.
    pub stuck: &'a [bool],
    /// What the lanes of each export have to do, as JSON.
    pub lanes: &'a [String],
    /// What does not go on, as JSON.
    pub stalled: &'a str,
    /// What the exports lie on.
    pub disks: &'a [Disk],
    /// The busiest clients that have keys.
    pub clients: &'a [ClientTotals],
}

/// One line of JSON: the sums over all workers, with what only the whole server knows.
pub fn json<'a>(workers: impl Iterator<Item = &'a Counters> + Clone, whole: &Whole<'_>) -> String {
    let Whole { backend, accepted, rejected_by_address, sessions, open_files, .. } = *whole;
    let sum =
        |counter: fn(&Counters) -> &Counter| workers.clone().map(|worker| counter(worker).get()).sum::<u64>();
    let mut out = format!("{{\"version\":\"{}\",\"backend\":\"{backend}\"", env!("CARGO_PKG_VERSION"));
    let mut number = |name: &str, value: u64| {
        let _ = write!(out, ",\"{name}\":{value}");
    };
    number("workers", workers.clone().count() as u64);
    number("accepted", accepted);
    number("connections", sum(|c| &c.connections));
    number("sessions", sessions as u64);
    number("open_files", open_files as u64);
    number("answered", sum(|c| &c.answered));
    number("fast_path", sum(|c| &c.fast_path));
    number("errors", sum(|c| &c.errors));
    number("read_bytes", sum(|c| &c.read_bytes));
    number("written_bytes", sum(|c| &c.written_bytes));
    number("checksum_errors", sum(|c| &c.checksum_errors));
    number("slot_bytes", sum(|c| &c.slot_bytes));
    number("arena_bytes", sum(|c| &c.arena_bytes));
    number("heap_bytes", sum(|c| &c.heap_bytes));
    number("slot_waits", sum(|c| &c.slot_waits));
    number(
        "iteration_bytes_max",
        workers.clone().map(|worker| worker.iteration_bytes_max.get()).max().unwrap_or(0),
    );
    number("iterations", sum(|c| &c.iterations));
    number("sleeps", sum(|c| &c.sleeps));
    number("log_lines_lost", crate::log::lost());
    number("uptime_seconds", whole.uptime.as_secs());
    number("config_generation", whole.config_generation);
    let _ = write!(out, ",\"phase\":\"{}\"", whole.phase);
    let mut object = |name: &str, fields: &mut dyn Iterator<Item = (&str, u64)>| {
        let fields: Vec<_> = fields.map(|(name, value)| format!("\"{name}\":{value}")).collect();
        let _ = write!(out, ",\"{name}\":{{{}}}", fields.join(","));
    };
    object(
        "rejected",
        &mut [
            ("address_connections", rejected_by_address),
            ("address_files", sum(|c| &c.rejected_files[Who::Address as usize])),
            ("address_requests", sum(|c| &c.rejected_requests[Who::Address as usize])),
            ("client_connections", sum(|c| &c.rejected_connections[Who::Client as usize])),
            ("client_files", sum(|c| &c.rejected_files[Who::Client as usize])),
            ("client_requests", sum(|c| &c.rejected_requests[Who::Client as usize])),
            ("queue_pairs", sum(|c| &c.rejected_queue_pairs)),
            ("session_connections", sum(|c| &c.rejected_connections[Who::Session as usize])),
            ("session_files", sum(|c| &c.rejected_files[Who::Session as usize])),
            ("session_requests", sum(|c| &c.rejected_requests[Who::Session as usize])),
        ]
        .into_iter(),
    );
    let channels = &whole.channels;
    object(
        "channels",
        &mut [
            ("broken", channels.broken),
            ("resumed", channels.resumed),
            ("not_known", channels.not_known),
            ("superseded", channels.superseded),
            ("fenced", channels.fenced),
            ("stale", channels.stale),
            ("expired", channels.expired),
            ("evicted_channels", channels.evicted_channels),
            ("evicted_sessions", channels.evicted_sessions),
            ("parked", channels.parked as u64),
            ("lingering_sessions", channels.lingering as u64),
            ("orphaned_requests", channels.orphans as u64),
        ]
        .into_iter(),
    );
    object(
        "waits",
        &mut [
            ("address_memory", sum(|c| &c.memory_waits[Who::Address as usize])),
            ("audit", sum(|c| &c.audit_waits)),
            ("client_memory", sum(|c| &c.memory_waits[Who::Client as usize])),
            ("client_rate", sum(|c| &c.rate_waits[Whose::Client as usize])),
            ("export_rate", sum(|c| &c.rate_waits[Whose::Export as usize])),
            ("messages", sum(|c| &c.message_waits)),
            ("orphans", sum(|c| &c.orphan_waits)),
            ("session_memory", sum(|c| &c.memory_waits[Who::Session as usize])),
        ]
        .into_iter(),
    );
    if let Some([written, lost]) = whole.audit {
        object("audit", &mut [("written", written), ("lost", lost)].into_iter());
    }
    object(
        "in_flight",
        &mut [
            ("need_slot", sum(|c| &c.need_slot)),
            ("fetching", sum(|c| &c.fetching)),
            ("executing", sum(|c| &c.executing)),
        ]
        .into_iter(),
    );
    object(
        "requests",
        &mut OPERATIONS.iter().map(|operation| {
            (operation.name, workers.clone().map(|worker| worker.requests.of(operation.opcode).get()).sum())
        }),
    );
    object(
        "closes",
        &mut REASONS
            .into_iter()
            .enumerate()
            .map(|(index, name)| (name, workers.clone().map(|worker| worker.closes[index].get()).sum())),
    );
    write_latencies(&mut out, workers.clone());
    write_exports(&mut out, workers.clone(), whole);
    write_disks(&mut out, whole.disks);
    write_clients(&mut out, whole.clients);
    write_workers(&mut out, workers, whole);
    let _ = write!(out, ",\"stalled\":{}}}", whole.stalled);
    out
}

fn write_workers<'a>(out: &mut String, workers: impl Iterator<Item = &'a Counters>, whole: &Whole<'_>) {
    let now = Instant::now();
    out.push_str(",\"per_worker\":[");
    for (at, (worker, data_connections)) in workers.zip(whole.data_connections).enumerate() {
        let comma = if at > 0 { "," } else { "" };
        let (idle, busy) = worker.idle.read(now);
        let _ = write!(
            out,
            "{comma}{{\"connections\":{},\"data_connections\":{data_connections},\"answered\":{},\
             \"iterations\":{},\"sleeps\":{},\"busy_us\":{},\"idle_us\":{},\"stuck\":{}}}",
            worker.connections.get(),
            worker.answered.get(),
            worker.iterations.get(),
            worker.sleeps.get(),
            busy.as_micros(),
            idle.as_micros(),
            whole.stuck.get(at).copied().unwrap_or(false)
        );
    }
    out.push(']');
}

fn write_disks(out: &mut String, disks: &[Disk]) {
    out.push_str(",\"disks\":[");
    for (at, disk) in disks.iter().enumerate() {
        let comma = if at > 0 { "," } else { "" };
        let exports: Vec<_> = disk.exports.iter().map(|name| format!("\"{}\"", json_escaped(name))).collect();
        let _ = write!(
            out,
            "{comma}{{\"name\":\"{}\",\"exports\":[{}],\"reads\":{},\"read_bytes\":{},\"writes\":{},\
             \"written_bytes\":{},\"busy_ms\":{},\"in_flight\":{}}}",
            json_escaped(&disk.name),
            exports.join(","),
            disk.reads,
            disk.read_bytes,
            disk.writes,
            disk.written_bytes,
            disk.busy_ms,
            disk.in_flight
        );
    }
    out.push(']');
}

fn write_clients(out: &mut String, clients: &[ClientTotals]) {
    out.push_str(",\"clients\":{");
    for (at, client) in clients.iter().enumerate() {
        let comma = if at > 0 { "," } else { "" };
        let _ = write!(
            out,
            "{comma}\"{}\":{{\"sessions\":{},\"requests\":{},\"read_bytes\":{},\"written_bytes\":{}}}",
            json_escaped(&client.name),
            client.sessions,
            client.requests,
            client.read_bytes,
            client.written_bytes
        );
    }
    out.push('}');
}

/// In microseconds, by operation.
fn write_latencies<'a>(out: &mut String, workers: impl Iterator<Item = &'a Counters> + Clone) {
    out.push_str(",\"latency_us\":{");
    for (at, operation) in OPERATIONS.iter().enumerate() {
        let sum = Histogram::default();
        workers.clone().for_each(|worker| sum.add(&worker.latency(operation.opcode)));
        let comma = if at > 0 { "," } else { "" };
        out.push_str(comma);
        write_latency(out, operation.name, &sum);
    }
    out.push('}');
}

fn write_latency(out: &mut String, operation: &str, histogram: &Histogram) {
    let us = |part| histogram.quantile(part).as_nanos() as f64 / 1000.0;
    let _ = write!(
        out,
        "\"{operation}\":{{\"count\":{},\"p50\":{:.1},\"p90\":{:.1},\"p99\":{:.1},\"p999\":{:.1},\"max\":{:.1}}}",
        histogram.count(),
        us(0.5),
        us(0.9),
        us(0.99),
        us(0.999),
        us(1.0)
    );
}

/// How long requests on an export took (None: on no export), by operation: those of which there were any.
pub fn latencies_of<'a>(
    workers: impl Iterator<Item = &'a Counters> + Clone,
    export: Option<usize>,
) -> impl Iterator<Item = (Opcode, Histogram)> {
    OPERATIONS.iter().filter_map(move |operation| {
        let mut parts = workers.clone().filter_map(|worker| worker.export(export).latency(operation.opcode));
        let sum = Histogram::default();
        sum.add(parts.next()?);
        parts.for_each(|part| sum.add(part));
        Some((operation.opcode, sum))
    })
}

/// A string as JSON has it between quotes.
fn json_escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c < ' ' => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out
}

fn write_exports<'a>(
    out: &mut String,
    workers: impl Iterator<Item = &'a Counters> + Clone,
    whole: &Whole<'_>,
) {
    out.push_str(",\"exports\":{");
    for (export, &(place, name)) in whole.exports.iter().enumerate() {
        let counters = || workers.clone().filter_map(|worker| worker.exports.get(place));
        let sum = |counter: fn(&ExportCounters) -> &Counter| {
            counters().map(|counters| counter(counters).get()).sum::<u64>()
        };
        let comma = if export > 0 { "," } else { "" };
        let name = json_escaped(name);
        let _ = write!(
            out,
            "{comma}\"{name}\":{{\"requests\":{},\"errors\":{},\"read_bytes\":{},\"written_bytes\":{},\
             \"throttled\":{},\"throttled_us\":{},\"latency_us\":{{",
            counters().map(ExportCounters::all_requests).sum::<u64>(),
            sum(|c| &c.errors),
            sum(|c| &c.read_bytes),
            sum(|c| &c.written_bytes),
            sum(|c| &c.throttled),
            sum(|c| &c.throttled_us)
        );
        for (at, (opcode, latency)) in latencies_of(workers.clone(), Some(place)).enumerate() {
            out.push_str(if at > 0 { "," } else { "" });
            write_latency(out, opcode.operation().name, &latency);
        }
        let lanes = whole.lanes.get(export).map_or("{}", String::as_str);
        let _ = write!(out, "}},\"lanes\":{lanes}}}");
    }
    out.push('}');
}

#[cfg(test)]
mod tests {
    use raio_transport::Violation;

    use super::*;

    #[test]
    fn names_are_escaped_as_json_has_it() {
        assert_eq!(json_escaped("a \"b\" \\ \n\u{1}ä"), "a \\\"b\\\" \\\\ \\u000a\\u0001ä");
    }

    #[test]
    fn workers_add_up() {
        let workers = [Counters::new(2, 2), Counters::new(2, 2)];
        for worker in &workers {
            worker.read_bytes.add(5);
            worker.iteration_bytes_max.set(7);
            worker.request(Opcode::Cancel);
            worker.took(Some(0), Opcode::Read, Duration::from_micros(100), 2);
            worker.exports.get(1).unwrap().written_bytes.add(9);
            worker.throttled(Whose::Export, Some(1));
            worker.throttled_time(Some(1), Duration::from_micros(1500));
            worker.close_reason(&CloseReason::Violation(Violation::Stalled));
        }
        let whole = Whole {
            backend: "uring",
            accepted: 3,
            rejected_by_address: 4,
            sessions: 1,
            channels: ChannelCounts { stale: 5, ..ChannelCounts::default() },
            audit: None,
            open_files: 2,
            data_connections: &[4, 5],
            exports: &[(0, "a"), (1, "b\"")],
            uptime: Duration::from_secs(9),
            phase: "serving",
            config_generation: 2,
            lanes: &["{\"data\":{}}".to_owned()],
            stalled: "[]",
            stuck: &[true, false],
            disks: &[],
            clients: &[],
        };
        let json = json(workers.iter(), &whole);
        assert!(json.starts_with('{') && json.ends_with("}],\"stalled\":[]}") && !json.contains('\n'));
        for part in [
            "\"read_bytes\":10",
            "\"stale\":5",
            "\"export_rate\":2",
            "\"iteration_bytes_max\":7",
            "\"cancel\":2",
            "\"stalled\":2",
            "\"accepted\":3",
            "\"address_connections\":4",
            "\"open_files\":2",
            "\"read\":0",
            "\"read\":{\"count\":4,\"p50\":106.5,",
            "\"b\\\"\":{\"requests\":0,\"errors\":0,\"read_bytes\":0,\"written_bytes\":18,",
            "\"throttled\":2,\"throttled_us\":3000,\"latency_us\":{},\"lanes\":{}}}",
            "},\"lanes\":{\"data\":{}}},",
            "\"throttled_us\":0,\"latency_us\":{\"read\":{\"count\":4,",
            "\"uptime_seconds\":9,\"config_generation\":2,\"phase\":\"serving\"",
            ",\"stuck\":true},{",
            "\"per_worker\":[{\"connections\":0,\"data_connections\":4,",
        ] {
            assert!(json.contains(part), "{part} is not in {json}");
        }
    }

    #[test]
    fn a_latency_is_counted_within_an_eighth_of_what_it_was() {
        for ns in [1 << 10, 1500, 4096, 4097, 99_999, 1_000_000, 123_456_789, 60_000_000_000_u64] {
            let histogram = Histogram::default();
            histogram.record(Duration::from_nanos(ns), 1);
            let counted = histogram.quantile(0.5).as_nanos() as u64;
            assert!(ns < counted && counted <= ns + ns / 8 + 1, "{ns} ns count as {counted}");
        }
        for (ns, counted) in [(0, 1 << 10), (u64::MAX, 1 << LONGEST_LOG2)] {
            let histogram = Histogram::default();
            histogram.record(Duration::from_nanos(ns), 1);
            assert!(histogram.quantile(1.0) <= Duration::from_nanos(counted + counted / 8));
        }
    }

    #[test]
    fn octaves_end_at_powers_of_two_and_count_all_below() {
        let histogram = Histogram::default();
        histogram.record(Duration::from_nanos(2047), 1);
        histogram.record(Duration::from_nanos(2048), 2);
        histogram.record(Duration::from_secs(100), 4);
        let octaves: Vec<_> = histogram.octaves().collect();
        assert_eq!(octaves[..2], [(Duration::from_nanos(2048), 1), (Duration::from_nanos(4096), 3)]);
        assert_eq!(octaves[octaves.len() - 2..].iter().map(|octave| octave.1).collect::<Vec<_>>(), [3, 7]);
        assert_eq!(histogram.sum(), Duration::from_nanos(2047 + 2 * 2048 + 400_000_000_000));
    }

    #[test]
    fn failures_are_counted_by_operation_and_errno() {
        let counters = Counters::new(0, 0);
        assert_eq!(counters.failures().count(), 0);
        counters.failed(Opcode::Read, libc::EIO);
        counters.failed(Opcode::Read, libc::EIO);
        counters.failed(Opcode::Cancel, i32::MAX);
        let failures: Vec<_> = counters.failures().collect();
        assert_eq!(failures, [(Opcode::Read, libc::EIO, 2), (Opcode::Cancel, ERRNOS as i32 - 1, 1)]);
    }

    #[test]
    fn the_busiest_clients_are_shown_with_what_all_workers_count() {
        let clients = CountedClients::new(2);
        let sessions: Vec<_> =
            (0..CLIENTS_SHOWN + 1).map(|n| clients.begin_session(&format!("c{n:03}"))).collect();
        let again = clients.begin_session("c007");
        for worker in 0..2 {
            let counters = again.client().worker(worker);
            counters.requests.add(2);
            counters.read_bytes.add(10);
        }
        let busiest = clients.busiest();
        assert_eq!((busiest.len(), &*busiest[1].name), (CLIENTS_SHOWN, "c000"));
        let first =
            ClientTotals { name: "c007".into(), sessions: 2, requests: 4, read_bytes: 20, written_bytes: 0 };
        assert_eq!(busiest[0], first);
        drop((again, sessions));
        assert!(clients.busiest().iter().all(|client| client.sessions == 0));
    }

    #[test]
    fn quantiles_are_of_all_that_was_counted() {
        let histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.99), Duration::ZERO);
        histogram.record(Duration::from_micros(10), 90);
        histogram.record(Duration::from_micros(1000), 10);
        let us = |part| histogram.quantile(part).as_micros();
        assert_eq!((us(0.0), us(0.5), us(0.9), us(0.91), us(1.0)), (10, 10, 10, 1048, 1048));
    }

    #[test]
    fn every_reason_to_close_has_a_counter() {
        use Violation as V;
        let violations = [
            V::Magic,
            V::Version { min: 0, max: 0, ours: 0 },
            V::HandshakeTimeout,
            V::HandshakeTooLong,
            V::RequiredOption(0),
            V::Checksum,
            V::Kind(0),
            V::Reserved,
            V::Length,
            V::Credits,
            V::RequestId,
            V::Field,
            V::Silent,
            V::Record,
            V::Alert(80),
            V::Stalled,
        ];
        let reasons = [
            CloseReason::Finished,
            CloseReason::Goaway,
            CloseReason::Lost(0),
            CloseReason::Local,
            CloseReason::Rejected,
            CloseReason::Evicted,
            CloseReason::Unreachable,
            CloseReason::KeyUsedUp,
        ];
        for reason in reasons.into_iter().chain(violations.map(CloseReason::Violation)) {
            assert!(REASONS.contains(&reason.name()), "{reason:?}");
        }
    }
}
