//! Timeouts of single operations.
//!
//! An operation that takes too long ends with ETIMEDOUT. If it was not sent, that is all. If it was, the
//! server is asked to cancel it, and has [`CANCEL_GRACE`] to answer. After that the operation is abandoned:
//! its buffers go back to the program, and the request, which may be executed yet, goes on with others, in
//! the slot that it has. The completion has a slot of its own. Where the network may reach the buffers (RDMA)
//! nothing can be abandoned, and the operation ends when the server answers, or the connection ends.
//!
//! Operations without a timeout are not touched by any of this.

use std::time::{Duration, Instant};

use raio_transport::Status;
use raio_transport::protocol::Opcode;
use raio_transport::transport::{Bulk, Reply};

use super::cancel::NOTHING;
use super::parts::SentPart;
use super::{ABANDONED, Context, OperationSlot, OperationState, TAG_PARTS, TAG_TIMED_OUT};
use crate::control::close_of;
use crate::error::Error;
use crate::operation::Ticket;
use crate::tuning::{CANCEL_GRACE, CANCELS_SHARE};

impl Context {
    /// Has an operation end with ETIMEDOUT when it is not over by then.
    pub(crate) fn set_timeout(&mut self, ticket: Ticket, timeout: Duration) {
        let slot = &mut self.slots[ticket.index as usize];
        // One so far away that there is no such instant is none.
        if !matches!(slot.state, OperationState::Done(_))
            && let Some(at) = Instant::now().checked_add(timeout)
        {
            slot.deadline = Some(at);
            self.timeouts.insert((at, ticket.index));
        }
    }

    /// Whether requests of abandoned operations are still with the server, by what has arrived.
    pub(crate) fn has_abandoned(&mut self) -> bool {
        let is_any = |context: &Self| {
            context.slots.iter().any(|slot| matches!(slot.state, OperationState::Abandoned))
                || context.parts.iter().flatten().any(|part| part.operation == ABANDONED)
        };
        is_any(self) && {
            self.poll();
            is_any(self)
        }
    }

    /// When a wait until `deadline` must look at the operations' timeouts.
    pub(super) fn wake_by(&self, deadline: Option<Instant>) -> Option<Instant> {
        let first = self.timeouts.first().map(|&(at, _)| at);
        first.into_iter().chain(deadline).min()
    }

    /// Ends operations that have taken too long.
    #[cold]
    pub(super) fn expire(&mut self) {
        let now = Instant::now();
        let mut has_expired = false;
        while let Some(&(at, index)) = self.timeouts.first()
            && at <= now
        {
            self.timeouts.pop_first();
            self.slots[index as usize].deadline = None;
            self.end_late(index);
            let slot = &mut self.slots[index as usize];
            if matches!(slot.state, OperationState::Sent | OperationState::Split(_)) {
                slot.deadline = Some(now + CANCEL_GRACE);
                self.timeouts.insert((now + CANCEL_GRACE, index));
            }
            has_expired = true;
        }
        if has_expired {
            self.send_cancels();
            self.lend();
            self.send_queued();
            self.channel.flush();
        }
    }

    /// Ends an operation that has taken too long, or asks the server to, if it has not been asked.
    fn end_late(&mut self, index: u32) {
        let is_first = !std::mem::replace(&mut self.slots[index as usize].timed_out, true);
        let is_to_be_asked = is_first && self.channel.is_connected();
        match self.slots[index as usize].state {
            OperationState::Queued(..) => {
                self.queued.retain(|&waiting| waiting != index);
                self.waiting_lent.retain(|&waiting| waiting != index);
                self.complete_unsent(index, timed_out());
            }
            OperationState::Sent => {
                let tag = u64::from(index);
                if let Some(bulk) = self.channel.dequeue(tag) {
                    self.slots[index as usize].state = OperationState::Queued(NOTHING, bulk);
                    self.complete_unsent(index, timed_out());
                } else if is_to_be_asked {
                    self.cancels.push(tag);
                } else if let Some(bulk) = self.channel.detach(tag) {
                    self.abandon(index, bulk);
                }
            }
            OperationState::Split(_) => self.end_split_late(index, is_to_be_asked),
            OperationState::Free | OperationState::Abandoned | OperationState::Done(_) => {}
        }
    }

    /// The same for an operation that is sent in parts.
    fn end_split_late(&mut self, index: u32, is_to_be_asked: bool) {
        self.complete_unsent(index, timed_out());
        for place in 0..self.parts.len() {
            let Some(part) = self.parts[place].filter(|part| part.operation == index) else { continue };
            let tag = TAG_PARTS + place as u64;
            let error = if let Some(bulk) = self.channel.dequeue(tag) {
                drop(bulk);
                self.parts[place] = None;
                timed_out()
            } else if is_to_be_asked {
                self.cancels.push(tag);
                continue;
            } else if let Some(bulk) = self.channel.detach(tag) {
                drop(bulk);
                self.parts[place] = Some(SentPart { operation: ABANDONED, ..part });
                late(self.slots[index as usize].opcode)
            } else {
                continue;
            };
            if let OperationState::Split(split) = &mut self.slots[index as usize].state {
                split.part_over(part.at, part.length, Err(error), 0);
            }
            self.settle(index);
        }
    }

    /// Asks the server to cancel what has timed out, as far as there are credits. What was sent last comes
    /// first: the server is likely to have it in a queue yet, and to answer at once. What it executes it
    /// answers when that is over, so only a part of the credits is used.
    pub(super) fn send_cancels(&mut self) {
        let most = 1 + self.channel.grant().queue_depth as usize / CANCELS_SHARE;
        while let Some(&tag) = self.cancels.last() {
            if self.channel.is_connected() && self.is_late(tag) {
                if self.cancels_sent >= most || !self.channel.cancel(tag, TAG_TIMED_OUT) {
                    break;
                }
                self.cancels_sent += 1;
            }
            self.cancels.pop();
        }
    }

    /// Whether what has this tag has timed out, and is with the server. Another request may have the tag by
    /// now.
    fn is_late(&self, tag: u64) -> bool {
        let operation = match tag.checked_sub(TAG_PARTS) {
            Some(place) => self.parts[place as usize].map(|part| part.operation),
            None => self.is_sent(tag).then_some(tag as u32),
        };
        operation.is_some_and(|index| index == ABANDONED || self.slots[index as usize].timed_out)
    }

    /// The server has answered such a request.
    pub(super) fn cancel_over(&mut self) {
        self.cancels_sent -= 1;
        self.send_cancels();
    }

    /// Completes an operation whose request goes on, with the buffers that it no longer uses.
    fn abandon(&mut self, index: u32, bulk: Bulk) {
        let twin = self.vacant_slot();
        let generation = self.slots[twin as usize].generation;
        let slot = &mut self.slots[index as usize];
        let (file, opcode, unstable) = (slot.file, slot.opcode, slot.unstable);
        let mut extra = slot.extra.take();
        slot.extra = extra.as_mut().map(|extra| extra.of_request());
        let completed = OperationSlot {
            generation,
            eventfd: slot.eventfd.take(),
            is_lent: std::mem::take(&mut slot.is_lent),
            state: std::mem::replace(&mut slot.state, OperationState::Abandoned),
            cancelling: false,
            deadline: None,
            request: None,
            extra,
            ..*slot
        };
        self.slots[twin as usize] = completed;
        if opcode == Opcode::Fsync {
            self.files.put_back_unstable(file, unstable);
        }
        // The request is still in flight on the file.
        self.files.operation_started(file);
        self.complete(twin, Err(late(opcode)), bulk, 0);
    }

    /// The request of an abandoned operation is over.
    #[cold]
    pub(super) fn abandoned_over(&mut self, index: u32, reply: &Reply) {
        let slot = &mut self.slots[index as usize];
        if reply.status.is_ok() && slot.opcode.operation().is_recorded {
            self.files.written(slot.file, slot.unstable);
        }
        if let Some(extra) = &mut slot.extra {
            extra.answered(&self.session, reply.status);
        }
        if let Some(close) = close_of(slot.opcode, reply) {
            self.session.close_later(close);
        }
        self.abandoned_unsent(index);
    }

    /// The same for one that was not executed.
    pub(super) fn abandoned_unsent(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        if let Some(source) = slot.extra.take().and_then(|extra| extra.source) {
            self.files.operation_completed(source);
        }
        self.files.operation_completed(slot.file);
        slot.state = OperationState::Free;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
    }
}

/// An operation has not been done in time, and will not be.
pub(super) fn timed_out() -> Error {
    Error::call(
        libc::ETIMEDOUT,
        "The operation's timeout has passed. It was cancelled, and nothing was done.",
    )
}

/// An operation is not over in time, though it was sent.
fn late(opcode: Opcode) -> Error {
    // A lock is not recorded, since taking it twice is taking it.
    let may_be_done = opcode.operation().is_recorded || opcode == Opcode::Lock;
    let text = match may_be_done {
        true => {
            "The operation's timeout has passed, and the server has not cancelled it: it may have been done, \
             or may yet be."
        }
        false => "The operation's timeout has passed, and the server has not answered it.",
    };
    Error { is_unknown: may_be_done, ..Error::new(Status::transport(libc::ETIMEDOUT), text) }
}
