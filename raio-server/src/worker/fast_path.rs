//! Small reads of what is in the page cache: answered where they came in.
//!
//! Such a request is never a [`crate::request::Request`]: it needs no state, no slot of its own and no
//! completion. It goes right behind the connection's other answers. Whatever else a request may need or meet
//! (memory that must be waited for, a disk, an error) is for [`super::pipeline`]; up to there nothing has
//! happened.

use raio_transport::protocol::Command;
use raio_transport::transport::{RequestKey, ServerTransport};

use super::Worker;
use super::pipeline::ITERATION_BYTES_MAX;
use crate::request::Range;

/// No more than this: the others want their turn, too.
const BYTES_MAX: u32 = 16 << 10;
/// After each so many bytes of a turn the connections of which nothing has left in it may send what they
/// have: a client that looks for it works on that while the others are read.
const SEND_EACH: usize = 32 << 10;

impl Worker {
    /// Whether this turn may do another one.
    pub(super) fn has_budget(&self) -> bool {
        self.at_once_bytes + BYTES_MAX as usize <= ITERATION_BYTES_MAX
    }

    /// Carries out and answers a read. Whether it has; if not, nothing has happened.
    pub(super) fn fast_path(&mut self, connection: usize, name: RequestKey, command: &Command<'_>) -> bool {
        let Command::Read { file, offset, length } = *command else { return false };
        // It does not overtake its connection's own requests.
        if length == 0 || length > BYTES_MAX || self.connections[connection].is_waiting {
            return false;
        }
        let Some(file) = self.file(connection, file) else { return false };
        let (Some(fd), true, false) = (file.open.fd(), file.open.access.read, file.open.is_direct()) else {
            return false;
        };
        let len = length as usize;
        if Range::new(offset, length.into()).is_none() || self.withheld(connection, len).is_some() {
            return false;
        }
        let engine = &mut self.engine;
        let mut read = |bytes: &mut [u8]| engine.try_read_cached(fd, bytes, offset).is_some();
        if !self.transport.respond_filled(name, len, &mut self.arena, &mut read) {
            return false;
        }
        let before = self.at_once_bytes;
        self.at_once_bytes += len;
        self.iteration_bytes += len;
        self.counters.read_bytes.add(length.into());
        self.counters.answered.add(1);
        // Where nobody spins the client would only be woken more often.
        let is_due = self.at_once_bytes / SEND_EACH > before / SEND_EACH;
        if is_due && !self.shared.spin.is_zero() {
            self.transport.flush_early(&mut self.reactor);
        }
        true
    }
}
