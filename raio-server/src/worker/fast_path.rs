//! Small reads of what is in the page cache: answered where they came in.
//!
//! Such a request is never a [`crate::request::Request`]: it needs no state, no slot of its own and no
//! completion. It goes right behind the connection's other answers. Whatever else a request may need or meet
//! (memory that must be waited for, a disk, an error) is for [`super::pipeline`]; up to there nothing has
//! happened.

use raio_transport::protocol::Command;
use raio_transport::transport::{RequestKey, ServerTransport};

use super::Worker;
use super::admission::{Decision, Demand};
use super::pipeline::unsent_bytes;
use crate::request::Range;
use crate::tuning::fast_path::BYTES_MAX;

impl Worker {
    /// Carries out and answers a read. Whether it has; if not, nothing has happened.
    pub(super) fn fast_path(&mut self, connection: usize, name: RequestKey, command: &Command<'_>) -> bool {
        let Command::Read { file, offset, length } = *command else { return false };
        // It does not overtake its connection's own requests.
        if length == 0 || length > BYTES_MAX || self.admission.is_waiting(connection) {
            return false;
        }
        let Some(file) = self.file(connection, file) else { return false };
        if !file.open.access.read || file.open.is_direct() {
            return false;
        }
        let len = length as usize;
        if Range::new(offset, length.into()).is_none() {
            return false;
        }
        let demand = Demand { connection, bytes: len, export: None };
        let unsent = &unsent_bytes(&self.transport, &self.connections);
        if self.admission.decide(&demand, &self.arena, unsent) != Decision::Admit {
            return false;
        }
        let (volume, engine) = (&file.open.volume, &mut *self.engine);
        let mut read = |bytes: &mut [u8]| volume.try_read_cached(engine, bytes, offset).is_some();
        if !self.transport.respond_filled(name, len, &mut self.arena, &mut read) {
            return false;
        }
        self.counters.read_bytes.add(length.into());
        self.counters.answered.add(1);
        // Where nobody spins the client would only be woken more often.
        if self.admission.spend(len) && !self.shared.spin.is_zero() {
            self.transport.flush_early(&mut self.reactor);
        }
        true
    }
}
