//! Small reads and writes that the page cache takes care of: answered where they came in.
//!
//! Such a request is never a [`crate::request::Request`]: it needs no state, no slot of its own and no completion. A read goes right behind the
//! connection's other answers, a write comes from where it was received. Whatever else a request may need or meet (memory that
//! must be waited for, a disk, an error) is for [`super::pipeline`]; up to there nothing has happened.

use raio_transport::protocol::Command;
use raio_transport::transport::{RequestKey, ServerTransport};

use super::Worker;
use super::pipeline::TURN_BYTES_MAX;
use crate::request::{Range, success};

/// No more than this: the others want their turn, too.
const BYTES_MAX: u32 = 16 << 10;
/// After each so many bytes of a turn the connections of which nothing has left in it may send what they have: a client that looks for it
/// works on that while the others are read.
const SEND_EACH: usize = 32 << 10;

impl Worker {
    /// Whether this turn may do another one.
    pub(super) fn has_time(&self) -> bool {
        self.at_once_bytes + BYTES_MAX as usize <= TURN_BYTES_MAX
    }

    /// Carries out and answers a read or write. Whether it has; if not, nothing has happened.
    pub(super) fn at_once(&mut self, connection: usize, name: RequestKey, command: &Command<'_>) -> bool {
        let (is_read, handle, offset, length) = match *command {
            Command::Read { file, offset, length } => (true, file, offset, length),
            Command::Write { file, offset, length } => (false, file, offset, length),
            _ => return false,
        };
        // It overtakes nobody who waits for memory.
        if length == 0 || length > BYTES_MAX || self.is_out_of_room || self.connections[connection].is_waiting
        {
            return false;
        }
        let Some(file) = self.file(connection, handle) else { return false };
        let (Some(backend_file), Some(range)) = (&file.backend, Range::new(offset, length.into())) else {
            return false;
        };
        let len = length as usize;
        if file.open.is_direct() || self.withheld(connection, len).is_some() {
            return false;
        }
        let backend = &mut self.backend;
        let is_done = if is_read {
            let mut read = |bytes: &mut [u8]| backend.read_at_once(backend_file, bytes, offset).is_some();
            file.open.access.read && self.transport.respond_filled(name, len, &mut self.arena, &mut read)
        } else {
            file.open.access.write
                && file.open.fixed_size().is_none_or(|size| range.end() <= size)
                && self
                    .transport
                    .data_at_hand(name)
                    .is_some_and(|bytes| backend.write_at_once(backend_file, bytes, offset).is_some())
        };
        if !is_done {
            return false;
        }
        let before = self.at_once_bytes;
        self.at_once_bytes += len;
        self.turn_bytes += len;
        if is_read {
            self.counters.read_bytes.add(length.into());
            self.counters.answered.add(1);
            // Where nobody spins the client would only be woken more often.
            let is_due = self.at_once_bytes / SEND_EACH > before / SEND_EACH;
            if is_due && !self.shared.spin.is_zero() {
                self.transport.flush_early(&mut self.reactor);
            }
        } else {
            self.counters.written_bytes.add(length.into());
            self.respond(name, success(length.into()));
        }
        true
    }
}
