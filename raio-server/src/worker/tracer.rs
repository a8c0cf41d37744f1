//! What is recorded of each request, if that is asked for: by `--trace` in a ring, by an administrator in
//! another one for some seconds, by `--log trace` in the log.

use std::mem;

use raio_transport::trace::{Clock, Phase, Record, Ring};
use raio_transport::transport::RequestKey;
use tracing::field::display;

use super::Worker;
use crate::trace::Trace;
#[cfg(test)]
use crate::tuning::statistics::TRACE_RECORDS;

/// A worker's ring of records.
#[derive(Debug)]
pub struct Tracer {
    ring: Option<(Clock, Ring)>,
    /// An administrator wants to see it.
    live: Option<(Clock, Ring)>,
    /// The log has a line for each record.
    logs: bool,
    /// Any of these.
    is_on: bool,
}

impl Tracer {
    /// Of what is to be written to this file.
    pub fn new(trace: Option<&Trace>) -> Self {
        let ring = trace.map(|trace| (trace.clock(), trace.ring()));
        Self::of(ring, tracing::enabled!(tracing::Level::TRACE))
    }

    /// One whose records are written nowhere.
    #[cfg(test)]
    pub fn in_memory() -> Self {
        Self::of(Some((Clock::new(), Ring::new(TRACE_RECORDS))), false)
    }

    fn of(ring: Option<(Clock, Ring)>, logs: bool) -> Self {
        let is_on = ring.is_some() || logs;
        Self { ring, live: None, logs, is_on }
    }

    /// Whether anything is recorded.
    pub fn is_on(&self) -> bool {
        self.is_on
    }

    /// Records in this ring, too, from now on; or no more. Returns the ring before.
    pub fn set_live(&mut self, live: Option<(Clock, Ring)>) -> Option<Ring> {
        let before = mem::replace(&mut self.live, live);
        self.is_on = self.ring.is_some() || self.live.is_some() || self.logs;
        before.map(|(_, ring)| ring)
    }
}

impl Worker {
    /// Records that a request has come to a point.
    pub(super) fn trace(&mut self, request: RequestKey, phase: Phase, name: &'static str, bytes: u64) {
        if self.tracer.is_on() {
            self.record(request, phase, name, bytes);
        }
    }

    /// The clock is read for each record: what an iteration does is to be told apart.
    #[cold]
    fn record(&mut self, request: RequestKey, phase: Phase, name: &'static str, bytes: u64) {
        let connection = self.connections.key(request.connection);
        let peer = connection.and_then(|connection| self.connections[connection].peer());
        if self.tracer.logs {
            let client = peer.map(display);
            tracing::trace!(client, request = request.id, bytes, "{phase:?} of a request: {name}.");
        }
        for (clock, ring) in self.tracer.ring.iter_mut().chain(&mut self.tracer.live) {
            ring.push(Record {
                time_ns: clock.now_ns(),
                name,
                phase,
                connection: peer.map_or(0, |peer| peer.port()),
                request: request.id as u32,
                bytes: bytes as u32,
            });
        }
    }

    /// Has what was recorded since the last time written.
    pub(super) fn hand_over_trace(&mut self) {
        if let (Some(trace), Some((_, ring))) = (&self.shared.trace, &mut self.tracer.ring)
            && let Err(kept) = trace.write(self.index, std::mem::replace(ring, trace.ring()))
        {
            *ring = kept;
        }
    }

    /// The same at the worker's end.
    pub(super) fn hand_over_last_trace(&mut self) {
        if let (Some(trace), Some((_, ring))) = (&self.shared.trace, self.tracer.ring.take()) {
            trace.write_last(self.index, ring);
        }
    }
}
