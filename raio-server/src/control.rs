//! What an administrator asks of the server while it runs: to see what its sessions, exports and workers do,
//! to end a session, to end itself.
//!
//! Everything here is called by a thread that nobody waits for, and that waits for nobody: what others must
//! be asked for is a [`Kill`], a [`SlowList`], a [`LiveTrace`], which is polled until it is there or its time
//! is over. A worker that is stuck leaves out its own part, and no more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::errno::Errno;
use raio_transport::keys::fingerprint_of;
use raio_transport::protocol::Opcode;
use raio_transport::reactor::Sender;
use raio_transport::trace::{Ring, TraceText};
use serde::Serialize;

use crate::activity::{Medium, Totals};
use crate::export::Export;
use crate::http::Next;
use crate::reply::{Reply, Wake};
use crate::session::Session;
use crate::stalled::{self, Pulse, Stalled};
use crate::stats::{Counter, Counters, ExportCounters};
use crate::timeline::Stage;
use crate::tuning::control::{
    ANSWER_TIMEOUT, LOOK_INTERVAL, RELOAD_CHECK, SESSIONS_AT_A_TIME, TRACE_PART, TRACE_SECONDS_MAX,
};
use crate::tuning::statistics::TRACE_RECORDS;
use crate::worker::{Mail, Shared, SlowEnd, SlowRequest, WorkerSenders};

/// What the main thread is to do.
pub enum Order {
    /// Apply the configuration file anew, and say what has changed, or why nothing has.
    Reload(Reply<Result<Vec<String>, String>>),
    /// End, as after a signal.
    Drain,
}

/// Why something is not done: a status of HTTP, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotDone {
    /// See there.
    pub status: u16,
    /// See there.
    pub text: String,
}

impl NotDone {
    fn new(status: u16, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }
}

/// What is needed to send a worker a question, and to read its counters.
#[derive(Clone, Debug)]
pub struct WorkerView {
    /// How to reach it.
    pub senders: WorkerSenders,
    /// What it counts.
    pub counters: Arc<Counters>,
    /// Where it runs, if it stays there.
    pub cpu: Option<usize>,
}

/// See the module documentation.
pub struct Control {
    shared: Arc<Shared>,
    workers: Vec<WorkerView>,
    orders: Sender<Order>,
    pulse: Pulse,
    /// Wakes who asks.
    wake: Wake,
    is_tracing: Arc<AtomicBool>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("workers", &self.workers.len()).finish_non_exhaustive()
    }
}

impl Control {
    /// Of these workers, and of the main thread, which gets the orders. `wake` wakes who polls.
    pub fn new(shared: Arc<Shared>, workers: Vec<WorkerView>, orders: Sender<Order>, wake: Wake) -> Self {
        let pulse = Pulse::new(workers.len());
        Self { shared, workers, orders, pulse, wake, is_tracing: Arc::default() }
    }

    fn counters(&self) -> impl Iterator<Item = &Counters> + Clone {
        self.workers.iter().map(|worker| &*worker.counters)
    }

    // The whole server
    // ----------------------------------------------------------------------------------------------------

    /// Has the server complete the requests in flight, and end.
    pub fn drain(&self) {
        self.orders.send(Order::Drain);
    }

    /// Has the server apply its configuration file anew.
    pub fn reload(&self) -> Reload {
        let (reply, done) = Reply::new(&self.wake);
        self.orders.send(Order::Reload(reply));
        Reload { done }
    }

    /// Looks which workers go on. It is known a moment later: [`Control::known_at`].
    pub fn look(&self, now: Instant) {
        let wake = |worker: usize| self.workers[worker].senders.mailbox.send(Mail::Wake);
        self.pulse.look(self.counters(), now, wake);
    }

    /// None if it is known of each worker whether it goes on; else when to ask again.
    pub fn known_at(&self, now: Instant) -> Option<Instant> {
        (!self.pulse.is_known(self.counters(), now)).then_some(now + LOOK_INTERVAL)
    }

    /// For how long each worker has not finished an iteration, if that is long.
    pub fn stuck(&self, now: Instant) -> Vec<Option<Duration>> {
        self.pulse.stuck(self.counters(), now)
    }

    /// Everything that does not go on.
    pub fn stalled(&self, now: Instant) -> Vec<Stalled> {
        stalled::all(&self.pulse, self.counters(), self.shared.exports.current().all(), now)
    }

    /// The same as JSON.
    pub fn stalled_json(&self, now: Instant) -> String {
        to_json(&self.stalled(now))
    }

    // Sessions
    // ----------------------------------------------------------------------------------------------------

    /// Calls this for each session. The table of sessions is never locked for long.
    fn for_each_session(&self, mut each: impl FnMut(&Arc<Session>)) {
        let mut from = Some(0);
        while let Some(at) = from {
            let (part, next) = self.shared.sessions.list(at, SESSIONS_AT_A_TIME);
            part.iter().for_each(&mut each);
            from = next;
        }
    }

    /// The sessions; or of them a number of those that have done most since this was last asked.
    pub fn sessions(&self, top: Option<usize>, now: Instant) -> String {
        let mut all = Vec::new();
        self.for_each_session(|session| {
            let rank = if top.is_some() { session.activity.rank() } else { (0, 0) };
            all.push((rank, Arc::clone(session)));
        });
        let total = all.len();
        if let Some(top) = top {
            all.sort_unstable_by_key(|(rank, _)| std::cmp::Reverse(*rank));
            all.truncate(top);
        }
        let sessions = all.iter().map(|(_, session)| self.session_view(session, now)).collect::<Vec<_>>();
        to_json(&SessionsView { sessions, total })
    }

    fn session_view(&self, session: &Session, now: Instant) -> SessionView {
        let Totals {
            connections,
            in_flight,
            requests,
            errors,
            read_bytes,
            written_bytes,
            measured,
            latency_sum,
            latency_max,
        } = session.activity.totals();
        let (peer, began) = session.activity.origin();
        let us = |time: Duration| time.as_nanos() as f64 / 1000.0;
        let mean = if measured > 0 { us(latency_sum) / measured as f64 } else { 0.0 };
        let media = Medium::ALL.into_iter().zip(connections).filter(|(_, connections)| *connections > 0);
        SessionView {
            id: session_id(session),
            client: self.client(session),
            peer: peer.map(|peer| peer.shown()),
            age_seconds: began.map_or(0.0, |began| rounded(now.saturating_duration_since(began))),
            connections: connections.iter().sum(),
            transports: media.map(|(medium, _)| medium.name()).collect(),
            open_files: session.open_files(),
            in_flight,
            requests,
            errors,
            read_bytes,
            written_bytes,
            latency_us: LatencyView { count: measured, mean, max: us(latency_max) },
        }
    }

    /// What `clients.toml` calls a session's client.
    fn client(&self, session: &Session) -> Option<String> {
        let keys = self.shared.keys.as_ref()?;
        keys.client(&session.identity).map(|client| client.name.clone())
    }

    /// Ends a session, by its id or the front of it. `by` is who wants that.
    pub fn kill(&self, id: &str, by: &str, now: Instant) -> Result<Kill, NotDone> {
        let is_id = (8..=ID_BYTES * 2).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_id {
            let text = format!("{id:?} is no id of a session: GET /sessions has them.");
            return Err(NotDone::new(400, text));
        }
        let id = id.to_ascii_lowercase();
        let mut found = Vec::new();
        self.for_each_session(|session| {
            if session_id(session).starts_with(&id) {
                found.push(Arc::clone(session));
            }
        });
        let session = match found.len() {
            0 => return Err(no_session(&id)),
            1 => found.remove(0),
            several => {
                let text = format!("{several} sessions have ids that begin with {id}. Give all of it.");
                return Err(NotDone::new(409, text));
            }
        };
        // Any worker does, for the table of sessions is that of all.
        let stuck = self.stuck(now);
        let goes_on = |at: &usize| stuck[*at].is_none() && !self.shared.placement.is_stuck(*at);
        let worker = (0..self.workers.len()).find(goes_on).unwrap_or(0);
        let (reply, done) = Reply::new(&self.wake);
        let id = session_id(&session);
        let mail = Mail::Kill { session, by: by.to_owned(), done: reply };
        self.workers[worker].senders.mailbox.send(mail);
        Ok(Kill { id, done, until: now + ANSWER_TIMEOUT })
    }

    // Exports and workers
    // ----------------------------------------------------------------------------------------------------

    /// The exports.
    pub fn exports(&self) -> String {
        let current = self.shared.exports.current();
        let exports = current.all();
        let mut open_files = vec![0; exports.iter().map(|export| export.place() + 1).max().unwrap_or(0)];
        self.for_each_session(|session| session.count_files(&mut open_files));
        let view = |export: &Arc<Export>| {
            let at = export.place();
            let of_export = || self.counters().filter_map(|worker| worker.exports.get(at));
            let sum =
                |counter: fn(&ExportCounters) -> &Counter| of_export().map(|one| counter(one).get()).sum();
            let why = stalled::why_unavailable(export);
            ExportView {
                name: export.name().to_owned(),
                path: export.root().map(|root| root.path().to_string_lossy().into_owned()),
                access: if export.number().is_some() { "rw" } else { "ro" },
                direct: export.is_direct(),
                state: if why.is_some() { "unavailable" } else { "available" },
                why,
                open_files: open_files[at],
                requests: of_export().map(ExportCounters::all_requests).sum(),
                errors: sum(|one| &one.errors),
                read_bytes: sum(|one| &one.read_bytes),
                written_bytes: sum(|one| &one.written_bytes),
                throttled: sum(|one| &one.throttled),
                throttled_us: sum(|one| &one.throttled_us),
            }
        };
        to_json(&ExportsView { exports: exports.iter().map(view).collect() })
    }

    /// The workers. What is known of them is better after a look, once it is known.
    pub fn workers(&self, now: Instant) -> String {
        let data_connections = self.shared.placement.data_connections();
        let all = self.workers.iter().zip(data_connections).zip(self.stuck(now)).enumerate();
        let view = |(index, ((worker, data_connections), stuck)): (usize, ((&WorkerView, usize), _))| {
            let stuck: Option<Duration> = stuck;
            let counters = &worker.counters;
            let (idle, busy) = counters.idle.read(now);
            WorkerReport {
                index,
                cpu: worker.cpu,
                connections: counters.connections.get(),
                data_connections,
                answered: counters.answered.get(),
                busy_us: busy.as_micros() as u64,
                idle_us: idle.as_micros() as u64,
                stuck: stuck.is_some(),
                stuck_ms: stuck.map_or(0, |stuck| stuck.as_millis() as u64),
                arena_bytes: counters.arena_bytes.get(),
                slot_bytes: counters.slot_bytes.get(),
                need_slot: counters.need_slot.get(),
                fetching: counters.fetching.get(),
                executing: counters.executing.get(),
                slot_waits: counters.slot_waits.get(),
            }
        };
        to_json(&WorkersView { workers: all.map(view).collect(), stalled: self.stalled(now) })
    }

    // Requests
    // ----------------------------------------------------------------------------------------------------

    /// Asks for the requests that have taken long.
    pub fn slow(&self, now: Instant) -> SlowList {
        let asked = self.workers.iter().map(|worker| {
            let (reply, answer) = Reply::new(&self.wake);
            worker.senders.mailbox.send(Mail::Slow(reply));
            Asked::Waiting(answer)
        });
        SlowList { asked: asked.collect(), until: now + ANSWER_TIMEOUT }
    }

    /// The answer to that.
    pub fn slow_answer(&self, list: &SlowList, now: Instant) -> String {
        let (mut all, mut missing) = (Vec::new(), Vec::new());
        for (worker, asked) in list.asked.iter().enumerate() {
            match asked {
                Asked::Waiting(_) => missing.push(worker),
                Asked::There(slow) => all.extend(slow.iter().map(|slow| (worker, slow))),
            }
        }
        all.sort_by_key(|(_, slow)| slow.at);
        // So that later answers do not have other times than earlier ones.
        let (realtime, slow) = (Timestamp::now(), all.into_iter());
        let slow = slow.map(|(worker, slow)| self.slow_view(worker, slow, now, realtime)).collect();
        to_json(&SlowListView { slow, missing_workers: missing })
    }

    fn slow_view(&self, worker: usize, slow: &SlowRequest, now: Instant, realtime: Timestamp) -> SlowView {
        let ago = now.saturating_duration_since(slow.at);
        let time = jiff::SignedDuration::try_from(ago).ok().and_then(|ago| realtime.checked_sub(ago).ok());
        let stages = Stage::ALL.into_iter().zip(slow.stages).filter(|(_, time)| !time.is_zero());
        let session = slow.session.as_deref();
        SlowView {
            time: format!("{:.3}", time.unwrap_or(realtime)),
            worker,
            session: session.map(session_id),
            client: session.and_then(|session| self.client(session)),
            peer: slow.peer.map(|peer| peer.shown()),
            operation: name_of(slow.opcode),
            export: slow.export.and_then(|place| self.export_name(place)),
            bytes: slow.bytes,
            total_us: slow.stages.iter().sum::<Duration>().as_micros() as u64,
            result: match slow.end {
                SlowEnd::Running | SlowEnd::Answered(0) => None,
                SlowEnd::Answered(errno) => Some(errno_name(errno)),
                SlowEnd::Lost => Some("ECONNRESET".to_owned()),
            },
            is_running: slow.end == SlowEnd::Running,
            stages: stages
                .map(|(stage, time)| StageView { name: stage.name(), us: time.as_micros() as u64 })
                .collect(),
        }
    }

    fn export_name(&self, place: usize) -> Option<String> {
        let exports = self.shared.exports.current();
        exports.all().iter().find(|export| export.place() == place).map(|export| export.name().to_owned())
    }

    /// Has all workers record their requests for some seconds.
    pub fn trace(&self, seconds: u64, now: Instant) -> Result<LiveTrace, NotDone> {
        if !(1..=TRACE_SECONDS_MAX).contains(&seconds) {
            let text = format!("seconds is {seconds}. Give a number from 1 to {TRACE_SECONDS_MAX}.");
            return Err(NotDone::new(400, text));
        }
        if self.is_tracing.swap(true, Ordering::Relaxed) {
            return Err(NotDone::new(409, "Another trace is being recorded. Try again when it has ended."));
        }
        let clock = self.shared.policy.clock;
        let mailboxes: Vec<_> = self.workers.iter().map(|worker| worker.senders.mailbox.clone()).collect();
        mailboxes.iter().for_each(|mailbox| mailbox.send(Mail::BeginTrace(clock, Ring::new(TRACE_RECORDS))));
        Ok(LiveTrace {
            text: TraceText::new("raio_server", clock),
            mailboxes,
            wake: Arc::clone(&self.wake),
            is_tracing: Arc::clone(&self.is_tracing),
            state: TraceState::Recording { until: now + Duration::from_secs(seconds), is_begun: false },
        })
    }
}

/// A configuration that is being applied.
#[derive(Debug)]
pub struct Reload {
    done: Receiver<Result<Vec<String>, String>>,
}

impl Reload {
    /// Returns what has changed, as JSON, or why nothing has. It may take as long as a file system.
    pub fn ended(&mut self, now: Instant) -> Next<Result<String, NotDone>> {
        match self.done.try_recv() {
            Ok(Ok(changed)) => Next::Ready(Ok(to_json(&ReloadedView { changed }))),
            Ok(Err(why)) => Next::Ready(Err(NotDone::new(422, why))),
            Err(TryRecvError::Empty) => Next::At(now + RELOAD_CHECK),
            Err(TryRecvError::Disconnected) => {
                let text = "The server has begun to end, or cannot start a thread. See its log.";
                Next::Ready(Err(NotDone::new(503, text)))
            }
        }
    }
}

/// A session that is being ended.
#[derive(Debug)]
pub struct Kill {
    id: String,
    done: Receiver<bool>,
    until: Instant,
}

impl Kill {
    /// Returns the session's id once it has ended.
    pub fn ended(&mut self, now: Instant) -> Next<Result<String, NotDone>> {
        match self.done.try_recv() {
            Ok(true) => Next::Ready(Ok(self.id.clone())),
            Ok(false) => Next::Ready(Err(no_session(&self.id))),
            Err(TryRecvError::Empty) if now < self.until => Next::At(self.until),
            Err(_) => {
                let text = "No worker has answered, so the session ends when one goes on. GET /workers tells \
                            which are stuck.";
                Next::Ready(Err(NotDone::new(504, text)))
            }
        }
    }
}

#[derive(Debug)]
enum Asked {
    Waiting(Receiver<Vec<SlowRequest>>),
    There(Vec<SlowRequest>),
}

/// Requests that have taken long, which workers were asked for.
#[derive(Debug)]
pub struct SlowList {
    asked: Vec<Asked>,
    until: Instant,
}

impl SlowList {
    /// Whether all have answered, or it is time to do without the others.
    pub fn poll(&mut self, now: Instant) -> Next<()> {
        let mut is_missing = false;
        for asked in &mut self.asked {
            let Asked::Waiting(answer) = asked else { continue };
            match answer.try_recv() {
                Ok(slow) => *asked = Asked::There(slow),
                // One that has ended has none.
                Err(TryRecvError::Disconnected) => {}
                Err(TryRecvError::Empty) => is_missing = true,
            }
        }
        if is_missing && now < self.until { Next::At(self.until) } else { Next::Ready(()) }
    }
}

/// A trace that is being recorded, or written. When it is dropped workers record no more.
pub struct LiveTrace {
    text: TraceText,
    mailboxes: Vec<Sender<Mail>>,
    wake: Wake,
    is_tracing: Arc<AtomicBool>,
    state: TraceState,
}

enum TraceState {
    Recording { until: Instant, is_begun: bool },
    Collecting { rings: Vec<(usize, Ring)>, answers: Receiver<(usize, Ring)>, until: Instant },
    Writing { rings: Vec<(usize, Ring)>, at: usize },
    Done,
}

impl LiveTrace {
    /// The next part of the text; None after the last one.
    pub fn next_part(&mut self, now: Instant) -> Next<Option<String>> {
        loop {
            match &mut self.state {
                TraceState::Recording { is_begun: is_begun @ false, .. } => {
                    *is_begun = true;
                    return Next::Ready(Some(self.text.head()));
                }
                TraceState::Recording { until, .. } if now < *until => return Next::At(*until),
                TraceState::Recording { .. } => {
                    let answers = self.end();
                    let until = now + ANSWER_TIMEOUT;
                    self.state = TraceState::Collecting { rings: Vec::new(), answers, until };
                }
                TraceState::Collecting { rings, answers, until } => {
                    rings.extend(answers.try_iter());
                    if rings.len() < self.mailboxes.len() && now < *until {
                        return Next::At(*until);
                    }
                    let mut rings = std::mem::take(rings);
                    rings.sort_by_key(|(worker, _)| *worker);
                    self.state = TraceState::Writing { rings, at: 0 };
                }
                TraceState::Writing { rings, at } => {
                    let Some((worker, ring)) = rings.first() else {
                        self.state = TraceState::Done;
                        return Next::Ready(Some(TraceText::TAIL.to_owned()));
                    };
                    let (thread, name) = (*worker as u32, format!("worker {worker}"));
                    let first = if *at == 0 { self.text.thread(thread, &name, ring) } else { String::new() };
                    let part = ring.records().skip(*at).take(TRACE_PART);
                    let part = first + &self.text.records(thread, part);
                    *at += TRACE_PART;
                    if *at as u64 >= ring.len() {
                        rings.remove(0);
                        *at = 0;
                    }
                    return Next::Ready(Some(part));
                }
                TraceState::Done => return Next::Ready(None),
            }
        }
    }

    /// Has the workers record no more. Returns where their rings arrive.
    fn end(&self) -> Receiver<(usize, Ring)> {
        let (reply, answers) = Reply::new(&self.wake);
        self.mailboxes.iter().for_each(|mailbox| mailbox.send(Mail::EndTrace(reply.clone())));
        answers
    }
}

impl Drop for LiveTrace {
    fn drop(&mut self) {
        if matches!(self.state, TraceState::Recording { .. }) {
            drop(self.end());
        }
        self.is_tracing.store(false, Ordering::Relaxed);
    }
}

/// Bytes of a session's id: more than the audit log has of it, so that no two have the same.
const ID_BYTES: usize = 8;

/// What tells a session from others. Its uuid is a secret of its client's.
fn session_id(session: &Session) -> String {
    fingerprint_of(&session.id.0, ID_BYTES)
}

fn no_session(id: &str) -> NotDone {
    let text = format!(
        "There is no session {id}: it has ended, or never was. `raio admin sessions` shows those that there \
         are."
    );
    NotDone::new(404, text)
}

fn name_of(opcode: Opcode) -> &'static str {
    opcode.operation().name
}

fn errno_name(errno: i32) -> String {
    format!("{:?}", Errno::from_raw(errno))
}

fn rounded(time: Duration) -> f64 {
    time.as_millis() as f64 / 1000.0
}

fn to_json(value: &impl Serialize) -> String {
    // Maps with keys that are no strings are what fails, and there are none.
    serde_json::to_string(value).unwrap_or_default()
}

#[derive(Serialize)]
struct ReloadedView {
    changed: Vec<String>,
}

#[derive(Serialize)]
struct SessionsView {
    sessions: Vec<SessionView>,
    total: usize,
}

#[derive(Serialize)]
struct SessionView {
    id: String,
    client: Option<String>,
    peer: Option<String>,
    age_seconds: f64,
    connections: u64,
    transports: Vec<&'static str>,
    open_files: usize,
    in_flight: u64,
    requests: u64,
    errors: u64,
    read_bytes: u64,
    written_bytes: u64,
    latency_us: LatencyView,
}

#[derive(Serialize)]
struct LatencyView {
    count: u64,
    mean: f64,
    max: f64,
}

#[derive(Serialize)]
struct ExportsView {
    exports: Vec<ExportView>,
}

#[derive(Serialize)]
struct ExportView {
    name: String,
    path: Option<String>,
    access: &'static str,
    direct: bool,
    state: &'static str,
    why: Option<String>,
    open_files: u64,
    requests: u64,
    errors: u64,
    read_bytes: u64,
    written_bytes: u64,
    throttled: u64,
    throttled_us: u64,
}

#[derive(Serialize)]
struct WorkersView {
    workers: Vec<WorkerReport>,
    stalled: Vec<Stalled>,
}

#[derive(Serialize)]
struct WorkerReport {
    index: usize,
    cpu: Option<usize>,
    connections: u64,
    data_connections: usize,
    answered: u64,
    busy_us: u64,
    idle_us: u64,
    stuck: bool,
    stuck_ms: u64,
    arena_bytes: u64,
    slot_bytes: u64,
    need_slot: u64,
    fetching: u64,
    executing: u64,
    slot_waits: u64,
}

#[derive(Serialize)]
struct SlowListView {
    slow: Vec<SlowView>,
    /// Workers that have not answered in time.
    missing_workers: Vec<usize>,
}

#[derive(Serialize)]
struct SlowView {
    time: String,
    worker: usize,
    session: Option<String>,
    client: Option<String>,
    peer: Option<String>,
    operation: &'static str,
    export: Option<String>,
    bytes: u64,
    total_us: u64,
    result: Option<String>,
    is_running: bool,
    stages: Vec<StageView>,
}

#[derive(Serialize)]
struct StageView {
    name: &'static str,
    us: u64,
}
