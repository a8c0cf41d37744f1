//! What the server tells about itself: statistics as JSON, the status page, and whether it serves.
//!
//! No worker waits for a reader: the handlers read atomics, and tables whose locks are held for a few
//! instructions.

mod admin;
mod metrics;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Instant;

use jiff::Timestamp;

use crate::control::Control;
use crate::disks::disks_of;
use crate::export::Export;
use crate::http::{Access, Answer, Next, Parts, Request, Response, Site};
use crate::stalled;
use crate::stats::{self, Counter, Counters, Whole};
use crate::tuning::http::{BEAT_TIMEOUT, EVENT_INTERVAL};
use crate::worker::Shared;

/// How far the server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Progress {
    /// It accepts nothing yet.
    Starting,
    /// It accepts connections.
    Serving,
    /// It completes what is in flight, and ends.
    Draining,
}

/// What the main thread alone knows, for others to read.
#[derive(Debug)]
pub struct MainState {
    /// Connections that were accepted.
    pub accepted: Counter,
    /// Connections that got no permit.
    pub rejected: Counter,
    /// A worker has failed.
    pub worker_failed: AtomicBool,
    /// When the server started.
    pub started_at: Timestamp,
    progress: AtomicU8,
    started: Instant,
    /// When the main thread has shown last that it goes on, in milliseconds since the start.
    beat_ms: AtomicU64,
}

impl Default for MainState {
    fn default() -> Self {
        Self {
            accepted: Counter::default(),
            rejected: Counter::default(),
            worker_failed: AtomicBool::default(),
            started_at: Timestamp::now(),
            progress: AtomicU8::new(Progress::Starting as u8),
            started: Instant::now(),
            beat_ms: AtomicU64::default(),
        }
    }
}

impl MainState {
    /// The main thread goes on.
    pub fn beat(&self) {
        self.beat_ms.store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// The server has got this far.
    pub fn set_progress(&self, progress: Progress) {
        self.progress.store(progress as u8, Ordering::Relaxed);
    }

    fn is(&self, progress: Progress) -> bool {
        self.progress.load(Ordering::Relaxed) == progress as u8
    }

    /// Whether the server works: if not, why.
    fn health(&self) -> Result<(), &'static str> {
        let now = self.started.elapsed().as_millis() as u64;
        if self.worker_failed.load(Ordering::Relaxed) {
            return Err("A worker has failed, and its log says why. Start the server anew.");
        }
        if now.saturating_sub(self.beat_ms.load(Ordering::Relaxed)) > BEAT_TIMEOUT.as_millis() as u64 {
            return Err("The main thread does not go on. Start the server anew.");
        }
        Ok(())
    }
}

/// Everything that the server tells about itself.
#[derive(Debug)]
pub struct Observed {
    /// What the workers share.
    pub shared: Arc<Shared>,
    /// What each of them counts.
    pub workers: Vec<Arc<Counters>>,
    /// What the main thread knows.
    pub main: Arc<MainState>,
    /// How files are read and written.
    pub backend: &'static str,
    /// What an administrator asks of it.
    pub control: Control,
}

impl Observed {
    /// The statistics, as a line of JSON.
    pub fn stats(&self) -> String {
        let sessions = &self.shared.sessions;
        let current = self.shared.exports.current();
        let exports = current.all();
        let on_device = |export: &Arc<Export>| Some((export.name().to_owned(), export.root()?.device()?));
        let on_device: Vec<_> = exports.iter().filter_map(on_device).collect();
        let lanes: Vec<_> = exports.iter().map(|export| stalled::lanes_json(export.lanes())).collect();
        let exports: Vec<_> = exports.iter().map(|export| (export.place(), export.name())).collect();
        let now = Instant::now();
        self.control.look(now);
        let whole = Whole {
            backend: self.backend,
            accepted: self.main.accepted.get(),
            rejected_by_address: self.main.rejected.get(),
            sessions: sessions.len(),
            channels: sessions.channel_counts(),
            audit: self.shared.audit.as_ref().map(|audit| audit.counts()),
            open_files: sessions.open_files(),
            data_connections: &self.shared.placement.data_connections(),
            exports: &exports,
            uptime: self.main.started.elapsed(),
            phase: if self.main.is(Progress::Draining) { "draining" } else { "serving" },
            config_generation: self.shared.config_generation.load(Ordering::Relaxed),
            stuck: &self.stuck_workers(),
            lanes: &lanes,
            stalled: &self.control.stalled_json(now),
            disks: &disks_of(on_device.iter().map(|(name, device)| (&**name, *device))),
            clients: &self.shared.clients.busiest(),
        };
        stats::json(self.counters(), &whole)
    }

    fn counters(&self) -> impl Iterator<Item = &Counters> + Clone {
        self.workers.iter().map(|counters| &**counters)
    }

    /// Whether each worker does not take what it is given, or has not gone on since somebody looked.
    fn stuck_workers(&self) -> Vec<bool> {
        let stuck = self.control.stuck(Instant::now());
        let is_stuck =
            |(worker, stuck): (usize, Option<_>)| stuck.is_some() || self.shared.placement.is_stuck(worker);
        stuck.into_iter().enumerate().map(is_stuck).collect()
    }

    /// Whether it accepts connections: if not, why.
    fn readiness(&self) -> Result<(), &'static str> {
        self.control.look(Instant::now());
        self.main.health()?;
        if self.main.is(Progress::Starting) {
            return Err("The server starts.");
        }
        if self.main.is(Progress::Draining) {
            return Err("The server completes the requests in flight, and ends.");
        }
        if self.stuck_workers().into_iter().all(|is_stuck| is_stuck) {
            return Err("No worker takes connections.");
        }
        Ok(())
    }
}

/// Something that can be asked for.
struct Route {
    method: &'static str,
    path: &'static str,
    /// What a client must be allowed to ask.
    access: Access,
    answer: fn(&Arc<Observed>, &Request<'_>) -> Answer,
}

const fn public(path: &'static str, answer: fn(&Arc<Observed>, &Request<'_>) -> Answer) -> Route {
    Route { method: "GET", path, access: Access::Public, answer }
}

const ROUTES: &[Route] = &[
    public("/", |_, _| Answer::Now(page())),
    public("/healthz", |it, _| Answer::Now(verdict(it.main.health()))),
    public("/readyz", |it, _| Answer::Now(verdict(it.readiness()))),
    public("/metrics", |it, _| Answer::Now(Response::new(200, metrics::CONTENT_TYPE, metrics::metrics(it)))),
    public("/stats", |it, _| Answer::Now(Response::json(200, it.stats() + "\n"))),
    public("/events", |it, request| {
        Answer::Stream("text/event-stream", Box::new(Events { of: Arc::clone(it), next: request.now }))
    }),
];

impl Site for Arc<Observed> {
    fn answer(&self, request: &Request<'_>) -> Answer {
        let of_path = || ROUTES.iter().chain(admin::ROUTES).filter(|route| route.path == request.path);
        let mut known = of_path().peekable();
        if known.peek().is_none() {
            return Answer::Now(Response::error(404, "There is no such page. See raio_server(8)."));
        }
        match known.find(|route| route.method == request.method) {
            Some(route) if request.access < route.access => Answer::Now(denied(route.access)),
            Some(route) => (route.answer)(self, request),
            None => {
                let allowed = of_path().next();
                let method = allowed.map_or("GET", |route| route.method);
                let text = format!("{} takes the method {method} alone.", request.path);
                Answer::Now(Response::error(405, &text).with("Allow", method))
            }
        }
    }
}

/// Why a client that may not ask gets no answer.
fn denied(needed: Access) -> Response {
    if needed == Access::Admin {
        return Response::error(403, "This is for the admin socket alone: see --admin in raio_server(8).");
    }
    let text = "This tells who the clients are. Ask over the admin socket, or send the token of --http-token \
                as a bearer token.";
    Response::error(401, text).with("WWW-Authenticate", "Bearer")
}

/// The status page: it loads nothing from elsewhere, and nobody may put it into a page of theirs.
fn page() -> Response {
    const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
                          img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
                          frame-ancestors 'none'";
    Response::new(200, "text/html; charset=utf-8", include_str!("status/page.html"))
        .with("Content-Security-Policy", POLICY)
        .with("Referrer-Policy", "no-referrer")
}

/// For programs that start, stop and balance servers.
fn verdict(verdict: Result<(), &str>) -> Response {
    match verdict {
        Ok(()) => Response::new(200, "text/plain; charset=utf-8", "ok\n"),
        Err(why) => Response::error(503, why),
    }
}

/// The statistics, again and again.
struct Events {
    of: Arc<Observed>,
    next: Instant,
}

impl Parts for Events {
    fn poll(&mut self, now: Instant) -> Next<Option<String>> {
        if now < self.next {
            return Next::At(self.next);
        }
        self.next = now + EVENT_INTERVAL;
        Next::Ready(Some(format!("data: {}\n\n", self.of.stats())))
    }
}
