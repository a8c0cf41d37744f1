//! Closes that nobody waits for, as a context's own requests: see [`PendingCloses`].

use std::sync::Arc;

use raio_transport::error::{Class, Status};
use raio_transport::protocol::Command;
use raio_transport::transport::{Bulk, SendOptions};

use super::{Context, NO_FILE, OperationState};
#[cfg(doc)]
use crate::control::PendingCloses;
use crate::session::Shared;

/// Those that were sent and not answered, by their slots. What the server may not have when the context ends
/// is sent again by another connection: a close does no harm where nothing is open any more.
#[derive(Debug)]
pub(super) struct SentCloses {
    session: Arc<Shared>,
    sent: Vec<(u32, Command<'static>)>,
}

impl SentCloses {
    pub(super) fn new(session: &Arc<Shared>) -> Self {
        Self { session: Arc::clone(session), sent: Vec::new() }
    }

    /// The one in this slot, if there is one, has ended in this way.
    pub(super) fn ended(&mut self, index: u32, status: Status) {
        let Some(at) = self.sent.iter().position(|&(slot, _)| slot == index) else { return };
        let (_, close) = self.sent.swap_remove(at);
        if !status.is_ok() && status.class == Class::Transport {
            self.session.close_later(close);
        }
    }
}

impl Drop for SentCloses {
    fn drop(&mut self) {
        if !self.session.is_inherited() {
            self.sent.drain(..).for_each(|(_, close)| self.session.close_later(close));
        }
    }
}

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
            (slot.file, slot.opcode, slot.timed_out) = (NO_FILE, close.opcode(), false);
            slot.set_state(OperationState::Abandoned);
            self.closes.sent.push((index, close));
        }
        self.channel.flush();
    }
}
