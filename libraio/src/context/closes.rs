//! Closes that nobody waits for, which a context sends among its other requests: see [`PendingCloses`].

use raio_transport::transport::{Bulk, SendOptions};

use super::paths::Extra;
use super::{Context, NO_FILE, OperationState};
#[cfg(doc)]
use crate::control::PendingCloses;

impl Context {
    /// Sends those that are pending, as far as there are credits.
    #[cold]
    pub(super) fn send_closes(&mut self) {
        while self.channel.credits() > 0
            && let Some(close) = self.session.pending_closes().pop()
        {
            let index = self.vacant_slot();
            self.body.clear();
            close.encode(&mut self.body);
            if self.channel.send(index.into(), &self.body, Bulk::None, SendOptions::PLAIN).is_err() {
                self.free.push(index);
                self.session.pending_closes().push(close);
                break;
            }
            let slot = &mut self.slots[index as usize];
            // Nothing of the operation that had the slot before is to be taken for this.
            (slot.token, slot.file, slot.opcode, slot.timed_out) = (0, NO_FILE, close.opcode(), false);
            slot.extra = Some(Extra::close(&self.session, close));
            slot.set_state(OperationState::Abandoned);
        }
        self.channel.flush();
    }
}
