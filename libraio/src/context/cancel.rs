//! Cancels operations that a context has in flight.

use std::time::Instant;

use raio_transport::error::Violation;
use raio_transport::protocol::Command;

use super::{Context, OperationState, Request, TAG_CANCEL, TAG_PARTS};
use crate::error::Error;
use crate::operation::{Completion, Ticket};
use crate::tuning::CANCEL_GRACE;

/// Why [`Context::cancel`] fails.
const TOO_LATE: &str =
    "Too late to cancel: the operation is executing or has completed. Its own completion follows.";

/// In the place of a command that is not sent.
pub(super) const NOTHING: Request = Request::Command(Command::Cancel { id: 0 });

impl Context {
    /// Tries to cancel an operation: its completion (ECANCELED) if it did nothing and will do nothing. Blocks
    /// for a round trip if it has been sent; a server that does not answer within the request timeout is
    /// taken for dead, and the connection ends. Otherwise its completion comes in the normal way, and this
    /// fails with EAGAIN (too late), ENOTCONN, or EINVAL (no such operation).
    pub fn cancel(&mut self, ticket: Ticket) -> Result<Completion, Error> {
        self.check_process()?;
        let result = self.try_cancel(ticket);
        self.sync_poller();
        result
    }

    fn try_cancel(&mut self, ticket: Ticket) -> Result<Completion, Error> {
        let index = ticket.index;
        let none = || {
            Error::call(
                libc::EINVAL,
                "The operation is not in flight in this context. Pass the ticket of one that is.",
            )
        };
        let slot = self.slots.get_mut(index as usize).ok_or_else(none)?;
        if slot.generation != ticket.generation {
            return Err(none());
        }
        let cancelled = Error::call(libc::ECANCELED, "The operation was cancelled.");
        match slot.state {
            OperationState::Free => return Err(none()),
            OperationState::Abandoned | OperationState::Done(_) => return Err(self.not_now(TOO_LATE)),
            OperationState::Queued(..) => {
                slot.cancelling = true;
                self.queued.retain(|&waiting| waiting != index);
                self.waiting_lent.retain(|&waiting| waiting != index);
                self.complete_unsent(index, cancelled);
            }
            OperationState::Sent => {
                slot.cancelling = true;
                match self.channel.dequeue(index.into()) {
                    Some(bulk) => {
                        self.slots[index as usize].state = OperationState::Queued(NOTHING, bulk);
                        self.complete_unsent(index, cancelled);
                    }
                    None => self.cancel_remotely(index.into()),
                }
            }
            OperationState::Split(_) => {
                slot.cancelling = true;
                self.cancel_split(index, cancelled);
            }
        }
        self.lend();
        self.send_queued();
        self.channel.flush();
        let slot = &mut self.slots[index as usize];
        let is_undone = std::mem::replace(&mut slot.cancelling, false);
        match &slot.state {
            OperationState::Done(completion)
                if is_undone
                    && completion.result.as_ref().is_err_and(|error| error.errno() == libc::ECANCELED) =>
            {
                self.done.retain(|&done| done != index);
                self.collect(index).ok_or_else(none)
            }
            _ => Err(self.failure().unwrap_or_else(|| self.not_now(TOO_LATE))),
        }
    }

    /// Whether the operation or part with this tag is with the server.
    pub(super) fn is_sent(&self, tag: u64) -> bool {
        match tag.checked_sub(TAG_PARTS) {
            Some(place) => self.parts[place as usize].is_some(),
            None => {
                matches!(self.slots[tag as usize].state, OperationState::Sent | OperationState::Abandoned)
            }
        }
    }

    /// Asks the server to cancel what has this tag, and waits for its answer. That, if cancelled, has ended
    /// by then.
    pub(super) fn cancel_remotely(&mut self, tag: u64) {
        self.cancel_answered = false;
        let mut is_asked = self.channel.cancel(tag, TAG_CANCEL);
        let begin = Instant::now();
        let mut deadline = begin + self.request_timeout;
        loop {
            self.poll();
            if self.cancel_answered || (self.channel.failure().is_some() && !self.is_sent(tag)) {
                return;
            }
            // The control credit is free, unless operations that have timed out are being cancelled: each
            // cancel waits for its answer before it returns.
            if !is_asked {
                is_asked = self.is_sent(tag) && self.channel.cancel(tag, TAG_CANCEL);
                if !is_asked {
                    // What they cancel may hang.
                    let gives_up = self.cancels_sent == 0 || begin.elapsed() >= CANCEL_GRACE;
                    if gives_up || !self.is_sent(tag) {
                        return;
                    }
                }
                deadline = if is_asked { begin + self.request_timeout } else { begin + CANCEL_GRACE };
            }
            if is_asked && Instant::now() >= deadline {
                // It answers pings, but not this.
                self.channel.abort(Violation::Silent);
                continue;
            }
            match self.channel.wait(self.wake_by(Some(deadline))) {
                Err(error) if error.errno() != libc::EINTR => self.channel.abort(Violation::Silent),
                _ => {}
            }
        }
    }
}
