//! Requests that have taken long: a worker keeps the latest of them, and where their time went.
//!
//! What is answered in the iteration in which it came cannot have. Of others each stage is timed
//! ([`crate::timeline`]), and only one that has taken long is written down here.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use raio_transport::protocol::Opcode;

use super::Worker;
use super::requests::Requests;
use crate::peer::PeerAddress;
use crate::request::{Request, Work};
use crate::session::Session;
use crate::timeline::Stage;
use crate::tuning::slow::KEPT;

/// A request that has taken long.
#[derive(Clone, Debug)]
pub struct SlowRequest {
    /// When it ended, or when somebody asked.
    pub at: Instant,
    /// Whose it is, if that is known still.
    pub session: Option<Arc<Session>>,
    /// Where its connection was from.
    pub peer: Option<PeerAddress>,
    /// What was asked for.
    pub opcode: Opcode,
    /// The place of its export among all.
    pub export: Option<usize>,
    /// How many bytes it was to move, or has moved.
    pub bytes: u64,
    /// How long it was at each stage.
    pub stages: [Duration; Stage::ALL.len()],
    /// How it has ended.
    pub end: SlowEnd,
}

/// How a request that has taken long has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlowEnd {
    /// Not yet.
    Running,
    /// With this errno; 0 if it has succeeded.
    Answered(i32),
    /// Its connection was lost before.
    Lost,
}

/// The latest requests of a worker that have taken long.
#[derive(Debug, Default)]
pub struct SlowRequests {
    threshold: Duration,
    /// The latest last.
    latest: VecDeque<SlowRequest>,
}

impl SlowRequests {
    /// Of requests that take this long, or longer.
    pub fn new(threshold: Duration) -> Self {
        Self { threshold, latest: VecDeque::new() }
    }

    /// From now on of requests that take another time.
    pub fn set_threshold(&mut self, threshold: Duration) {
        self.threshold = threshold;
    }

    /// Whether a request has taken long.
    #[inline]
    pub fn is_slow(&self, request: &Request, now: Instant) -> bool {
        request.timeline.total(now) >= self.threshold
    }

    fn note(&mut self, slow: SlowRequest) {
        if self.latest.len() == KEPT {
            self.latest.pop_front();
        }
        self.latest.push_back(slow);
    }

    /// Those that have ended, then those that have not, as far as there is room, oldest first.
    fn all(
        &self,
        requests: &Requests,
        now: Instant,
        describe: impl Fn(usize) -> SlowRequest,
    ) -> Vec<SlowRequest> {
        let mut running: Vec<_> = requests.iter().filter(|(_, request)| self.is_slow(request, now)).collect();
        running.sort_by_key(|(_, request)| std::cmp::Reverse(request.timeline.total(now)));
        running.truncate(KEPT);
        self.latest.iter().cloned().chain(running.into_iter().map(|(key, _)| describe(key))).collect()
    }
}

impl Worker {
    /// A request is over; notes it if it has taken long.
    #[inline]
    pub(super) fn note_if_slow(&mut self, key: usize, end: SlowEnd, bytes: Option<u64>) {
        let now = self.reactor.clock().now();
        if self.slow.is_slow(&self.requests[key], now) {
            self.note_slow(key, end, bytes, now);
        }
    }

    #[cold]
    fn note_slow(&mut self, key: usize, end: SlowEnd, bytes: Option<u64>, now: Instant) {
        let slow = self.slow_request(key, end, now);
        self.slow.note(SlowRequest { bytes: bytes.unwrap_or(slow.bytes), ..slow });
    }

    fn slow_request(&self, key: usize, end: SlowEnd, now: Instant) -> SlowRequest {
        let request = &self.requests[key];
        let connection = request.connection.map(|connection| &self.connections[connection]);
        let member = match connection {
            Some(connection) => Some(&connection.member),
            None => self.orphans.get(&key).map(|orphan| &orphan.member),
        };
        SlowRequest {
            at: now,
            peer: connection.and_then(|connection| connection.peer()),
            session: member.map(|member| Arc::clone(&member.session)),
            opcode: request.opcode,
            export: export_of(&request.work),
            bytes: request.work.data_len(),
            stages: request.timeline.at(now),
            end,
        }
    }

    /// The latest requests that have taken long, and those in flight that take long.
    pub(super) fn slow_requests(&self) -> Vec<SlowRequest> {
        let now = self.reactor.clock().now();
        self.slow.all(&self.requests, now, |key| self.slow_request(key, SlowEnd::Running, now))
    }
}

/// The export that a request is about.
fn export_of(work: &Work) -> Option<usize> {
    match work {
        Work::Copy(copy) => Some(copy.destination().export),
        work => work.export(),
    }
}
