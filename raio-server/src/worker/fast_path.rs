//! Small reads of what is in the page cache: answered where they came in.
//!
//! Such a request is never a [`crate::request::Request`]: it needs no state, no slot of its own and no
//! completion. It goes right behind the connection's other answers. Whatever else a request may need or meet
//! (memory that must be waited for, a disk, an error) is for [`super::pipeline`]; up to there nothing has
//! happened.

use std::time::Duration;

use raio_transport::Status;
use raio_transport::protocol::{Direction, Opcode};
use raio_transport::trace::Phase;
use raio_transport::transport::{RequestKey, ServerTransport};

use super::Worker;
use super::admission::{Decision, Demand};
use super::pipeline::unsent_bytes;
use crate::request::Range;
use crate::session::OpenFile;
use crate::tuning::fast_path::BYTES_MAX;

impl Worker {
    /// Carries out and answers a read that has been authorized. Whether it has; if not, nothing has happened.
    #[inline(always)]
    pub(super) fn fast_path(
        &mut self,
        connection: usize,
        name: RequestKey,
        open: &OpenFile,
        range: Range,
    ) -> bool {
        let Range { offset, length } = range;
        // It does not overtake its connection's own requests. What has a rate may have to wait.
        if length > BYTES_MAX.into()
            || open.is_direct()
            || open.flow.is_some()
            || self.admission.is_waiting(connection)
        {
            return false;
        }
        let bytes = length as usize;
        let demand = Demand { connection, bytes, export: None };
        let unsent = &unsent_bytes(&self.transport, &self.connections);
        if self.admission.decide(&demand, &self.arena, unsent) != Decision::Admit {
            return false;
        }
        if self.latencies.measures_fast_path() {
            // What the fast path answers in this iteration counts from here.
            self.reactor.clock().now();
        }
        let (volume, engine) = (&open.volume, &mut *self.engine);
        let mut read = |bytes: &mut [u8]| volume.try_read_cached(engine, bytes, offset).is_some();
        if !self.transport.respond_filled(name, bytes, &mut self.arena, &mut read) {
            return false;
        }
        self.counters.fast_path.add(1);
        self.count_response(Opcode::Read, Status::OK);
        self.count_for_export(Opcode::Read, Some(open.export), Direction::ToClient, Status::OK, length);
        self.count_for_client(connection, Direction::ToClient, Status::OK, length);
        if let Some(audited) = &open.audited {
            audited.on_read(length);
        }
        let counters = &self.connections[connection].counters;
        counters.answered(true);
        counters.read(length);
        if self.latencies.measures_fast_path() {
            self.measured(connection, Duration::ZERO);
        }
        self.latencies.answered_by_fast_path(open.export);
        if self.tracer.is_on() {
            self.trace(name, Phase::Point, "fast_path", 0);
            self.trace(name, Phase::End, Opcode::Read.operation().name, length);
        }
        // Where nobody spins the client would only be woken more often.
        if self.admission.spend(bytes) && !self.settings.spin.is_zero() {
            self.transport.flush_early(&mut self.reactor);
        }
        true
    }
}
