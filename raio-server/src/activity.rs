//! What sessions do: what each worker counts for a session, and where its latest connection is from.
//!
//! The counters are those of [`crate::stats`]: a worker writes its own with plain loads and stores, for each
//! session that has connections there, and a reader adds up the counters of all workers.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use raio_transport::sync::lock;

use crate::peer::PeerAddress;
use crate::stats::Counter;

/// How a connection reaches the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// TCP.
    Tcp,
    /// A Unix socket.
    Unix,
    /// A queue pair.
    Rdma,
}

impl Medium {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Unix, Self::Rdma];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
            Self::Rdma => "rdma",
        }
    }
}

/// What one worker counts for one session.
#[derive(Debug, Default)]
pub struct SessionCounters {
    /// Connections now, by [`Medium`].
    connections: [Counter; Medium::ALL.len()],
    /// Requests now that the fast path has not answered.
    in_flight: Counter,
    /// Requests answered.
    requests: Counter,
    /// Of these, with a failure.
    errors: Counter,
    /// Bytes read and answered.
    read_bytes: Counter,
    /// Bytes written.
    written_bytes: Counter,
    /// Requests whose latency was measured, ...
    measured: Counter,
    /// ... what they have taken together, and the longest of them, in nanoseconds.
    latency_sum_ns: Counter,
    latency_max_ns: Counter,
}

impl SessionCounters {
    /// A connection has opened, or has moved here from another medium.
    pub fn connected(&self, medium: Medium) {
        self.connections[medium as usize].add(1);
    }

    /// It has closed, or moves to another medium.
    pub fn disconnected(&self, medium: Medium) {
        let connections = &self.connections[medium as usize];
        connections.set(connections.get().saturating_sub(1));
    }

    /// A request has begun that the fast path has not answered.
    #[inline]
    pub fn begun(&self) {
        self.in_flight.add(1);
    }

    /// It is over, or its connection is.
    #[inline]
    pub fn ended(&self) {
        self.in_flight.set(self.in_flight.get().saturating_sub(1));
    }

    /// A request is answered.
    #[inline]
    pub fn answered(&self, is_ok: bool) {
        self.requests.add(1);
        if !is_ok {
            self.errors.add(1);
        }
    }

    /// Bytes were read and answered.
    #[inline]
    pub fn read(&self, bytes: u64) {
        self.read_bytes.add(bytes);
    }

    /// Bytes were written.
    #[inline]
    pub fn written(&self, bytes: u64) {
        self.written_bytes.add(bytes);
    }

    /// A request has taken this long.
    pub fn took(&self, time: Duration) {
        let ns = time.as_nanos() as u64;
        self.measured.add(1);
        self.latency_sum_ns.add(ns);
        self.latency_max_ns.set(self.latency_max_ns.get().max(ns));
    }
}

/// What a session has done on all workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Connections now, by [`Medium`].
    pub connections: [u64; Medium::ALL.len()],
    /// Requests now that the fast path has not answered.
    pub in_flight: u64,
    /// Requests answered.
    pub requests: u64,
    /// Of these, with a failure.
    pub errors: u64,
    /// Bytes read and answered.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests whose latency was measured, ...
    pub measured: u64,
    /// ... what they have taken together, and the longest of them.
    pub latency_sum: Duration,
    /// See there.
    pub latency_max: Duration,
}

impl Totals {
    fn add(&mut self, counters: &SessionCounters) {
        self.connections.iter_mut().zip(&counters.connections).for_each(|(sum, n)| *sum += n.get());
        self.in_flight += counters.in_flight.get();
        self.requests += counters.requests.get();
        self.errors += counters.errors.get();
        self.read_bytes += counters.read_bytes.get();
        self.written_bytes += counters.written_bytes.get();
        self.measured += counters.measured.get();
        self.latency_sum += Duration::from_nanos(counters.latency_sum_ns.get());
        self.latency_max = self.latency_max.max(Duration::from_nanos(counters.latency_max_ns.get()));
    }
}

/// What a session does. See the module documentation.
#[derive(Debug, Default)]
pub struct Activity(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    began: Option<Instant>,
    /// Where the latest connection is from.
    peer: Option<PeerAddress>,
    /// With the index of the worker.
    by_worker: Vec<(usize, Arc<SessionCounters>)>,
    /// What it had done when it was last ranked.
    ranked_at: u64,
}

/// How much a session has done since it was last ranked, and since it began.
pub type Rank = (u64, u64);

impl Activity {
    /// A connection of it has come.
    pub fn came(&self, peer: Option<PeerAddress>, now: Instant) {
        let mut inner = lock(&self.0);
        inner.began.get_or_insert(now);
        inner.peer = peer;
    }

    /// What a worker counts. The same each time that it asks.
    pub fn counters(&self, worker: usize) -> Arc<SessionCounters> {
        let by_worker = &mut lock(&self.0).by_worker;
        if let Some((_, known)) = by_worker.iter().find(|(at, _)| *at == worker) {
            return Arc::clone(known);
        }
        let new = Arc::new(SessionCounters::default());
        // Most sessions are at one worker.
        by_worker.reserve_exact(1);
        by_worker.push((worker, Arc::clone(&new)));
        new
    }

    /// Where its latest connection is from, and when the session has begun.
    pub fn origin(&self) -> (Option<PeerAddress>, Option<Instant>) {
        let inner = lock(&self.0);
        (inner.peer, inner.began)
    }

    /// The sums over all workers.
    pub fn totals(&self) -> Totals {
        lock(&self.0).totals()
    }

    /// Its place among sessions by what they do, since the last such question of anybody.
    pub fn rank(&self) -> Rank {
        let mut inner = lock(&self.0);
        let totals = inner.totals();
        // A request counts as much as a block of the smallest size.
        let done = totals.read_bytes + totals.written_bytes + 512 * totals.requests;
        let before = std::mem::replace(&mut inner.ranked_at, done);
        (done.saturating_sub(before), done)
    }
}

impl Inner {
    fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        self.by_worker.iter().for_each(|(_, counters)| totals.add(counters));
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_workers_count_is_added_up_and_kept_when_a_connection_comes_back() {
        let activity = Activity::default();
        for _ in 0..2 {
            let [first, second] = [3, 0].map(|worker| activity.counters(worker));
            first.begun();
            first.answered(true);
            first.read(4096);
            second.answered(false);
            second.written(10);
            second.took(Duration::from_micros(5));
            second.connected(Medium::Rdma);
        }
        activity.counters(3).ended();
        activity.counters(3).took(Duration::from_micros(7));
        activity.counters(0).disconnected(Medium::Rdma);
        let expected = Totals {
            connections: [0, 0, 1],
            in_flight: 1,
            requests: 4,
            errors: 2,
            read_bytes: 8192,
            written_bytes: 20,
            measured: 3,
            latency_sum: Duration::from_micros(17),
            latency_max: Duration::from_micros(7),
        };
        assert_eq!(activity.totals(), expected);
    }

    #[test]
    fn a_session_is_ranked_by_what_it_has_done_since_the_last_time() {
        let activity = Activity::default();
        let counters = activity.counters(0);
        counters.read(1000);
        assert_eq!(activity.rank(), (1000, 1000));
        counters.answered(true);
        assert_eq!(activity.rank(), (512, 1512));
        assert_eq!(activity.rank(), (0, 1512));
    }

    #[test]
    fn a_session_has_begun_once_and_is_where_its_latest_connection_is() {
        let activity = Activity::default();
        let began = Instant::now();
        activity.came(Some(PeerAddress::User(7)), began);
        activity.came(Some(PeerAddress::User(8)), began + Duration::from_secs(1));
        assert_eq!(activity.origin(), (Some(PeerAddress::User(8)), Some(began)));
    }
}
