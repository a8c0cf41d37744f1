//! Operations that are longer than the server's largest request: each is sent in parts.

use std::collections::VecDeque;

use raio_transport::memory::Buffers;
use raio_transport::protocol::Command;
use raio_transport::transport::{Bulk, Lost, NotSent, Reply, SendOptions};

use super::{
    ABANDONED, Context, OperationSlot, OperationState, Request, TAG_CANCEL, TAG_PARTS, TAG_TIMED_OUT,
};
use crate::error::{Error, oversized};
use crate::split::{Part, Split};
use crate::trace::{TraceId, Tracer};

/// A part of an operation, outstanding.
#[derive(Clone, Copy, Debug)]
pub(super) struct SentPart {
    /// The operation's slot, or [`ABANDONED`].
    pub(super) operation: u32,
    /// Where it begins in the operation's range.
    pub(super) at: u64,
    pub(super) length: u64,
    /// Its request: for the trace.
    pub(super) request: Option<TraceId>,
}

impl Context {
    /// A queued operation, longer than a request may be, takes its place in the queue. One that cannot be
    /// divided fails.
    #[cold]
    pub(super) fn queue_split(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        match std::mem::replace(&mut slot.state, OperationState::Free) {
            OperationState::Queued(Request::Command(command), Bulk::In(buffers) | Bulk::Out(buffers)) => {
                self.split(index, &command, buffers);
            }
            OperationState::Queued(Request::Encoded(_), bulk) => {
                self.complete(index, Err(oversized()), bulk, 0);
            }
            _ => unreachable!("it has its buffers"),
        }
    }

    /// An operation is longer than a request may be, and nothing of it is under way.
    fn split(&mut self, index: u32, command: &Command<'_>, buffers: Buffers) {
        let (is_read, file, offset) = match *command {
            Command::Read { file, offset, .. } => (true, file, offset),
            Command::Write { file, offset, .. } => (false, file, offset),
            _ => unreachable!("no other operation on a file has data"),
        };
        let most = self.io_bytes_max();
        let slot = &mut self.slots[index as usize];
        let split = Split::new(is_read, file, offset, buffers, slot.options.given_crc(), most);
        self.stats.checksum_errors += u64::from(split.is_damaged());
        slot.state = OperationState::Split(Box::new(split));
        self.settle(index);
    }

    /// Queues a split operation again if there is more to be sent of it, and completes it if all is over.
    #[cold]
    pub(super) fn settle(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        let OperationState::Split(split) = &mut slot.state else { return };
        if split.has_next() != split.is_queued {
            split.is_queued = !split.is_queued;
            match split.is_queued {
                true => self.queued.push_back(index),
                false => self.queued.retain(|&queued| queued != index),
            }
        }
        if split.is_over()
            && let OperationState::Split(split) = std::mem::replace(&mut slot.state, OperationState::Free)
        {
            // If it is cancelled after a part was done, that is how it has ended, and not that it was undone.
            slot.cancelling &= !split.has_effect();
            let (result, bulk, crc) = split.finish();
            self.complete(index, result, bulk, crc);
        }
    }

    /// Sends the next part of a split operation, which has just been taken from the queue. Fails if the
    /// connection has ended; `poll` is about to hear of it.
    #[cold]
    pub(super) fn send_part(&mut self, index: u32) -> bool {
        let most = self.io_bytes_max();
        let slot = &mut self.slots[index as usize];
        let OperationState::Split(split) = &mut slot.state else {
            unreachable!("`queued` has slots that are queued or split")
        };
        split.is_queued = false;
        let next = split.next(most);
        let Some(Part { at, length, crc, command, bulk }) = next else {
            // Of a write whose data has changed the rest is not sent.
            self.settle(index);
            return true;
        };
        self.body.clear();
        command.encode(&mut self.body);
        let place = self.parts.iter().position(Option::is_none).unwrap_or_else(|| {
            self.parts.push(None);
            self.parts.len() - 1
        });
        let options = SendOptions::with_crc(crc);
        let sent = self.channel.send(TAG_PARTS + place as u64, &self.body, bulk, options);
        let is_sent = match sent {
            Ok(request) => {
                let sent = |tracer: &Tracer| tracer.sent(slot.name(), slot.submitted_ns, request, length);
                let request = self.tracer.as_deref().map(sent);
                self.parts[place] = Some(SentPart { operation: index, at, length, request });
                true
            }
            Err(NotSent(bulk)) => {
                split.put_back(at, bulk, crc);
                false
            }
        };
        self.settle(index);
        is_sent
    }

    /// A reply to something else than a whole operation.
    #[cold]
    pub(super) fn handle_part(&mut self, reply: Reply) {
        if reply.tag == TAG_CANCEL {
            self.cancel_answered = true;
            return;
        }
        if reply.tag == TAG_TIMED_OUT {
            return self.cancel_over();
        }
        let place = (reply.tag - TAG_PARTS) as usize;
        let Some(SentPart { operation: index, at, length, request }) = self.parts[place].take() else {
            return;
        };
        if index == ABANDONED {
            return;
        }
        let result = self.result_of(index, length, &reply);
        if let (Some(tracer), Some(request)) = (&self.tracer, request) {
            tracer.answered(request, reply.result);
            tracer.collected(self.slots[index as usize].name(), request, reply.result);
        }
        let crc = reply.data_crc;
        drop(reply);
        if let OperationState::Split(split) = &mut self.slots[index as usize].state {
            split.part_over(at, length, result, crc);
        }
        self.settle(index);
    }

    /// The server takes less in one request than the one that was there before.
    #[cold]
    pub(super) fn divide_oversized(&mut self) {
        let most = self.io_bytes_max();
        for Lost { tag, command, bulk, options, .. } in self.channel.take_oversized() {
            if tag < TAG_PARTS {
                let index = tag as u32;
                if matches!(self.slots[index as usize].state, OperationState::Abandoned) {
                    self.abandoned_unsent(index);
                    continue;
                }
                match (Command::decode(&command), bulk) {
                    (
                        Ok(command @ (Command::Read { .. } | Command::Write { .. })),
                        Bulk::In(buffers) | Bulk::Out(buffers),
                    ) => self.split(index, &command, buffers),
                    (_, bulk) => self.complete(index, Err(oversized()), bulk, 0),
                }
            } else if let Some(part) = self.parts[(tag - TAG_PARTS) as usize].take() {
                if part.operation == ABANDONED {
                    continue;
                }
                if let OperationState::Split(split) = &mut self.slots[part.operation as usize].state {
                    split.put_back(part.at, bulk, options.given_crc());
                }
                self.settle(part.operation);
            }
        }
        let is_long = |slot: &OperationSlot| match &slot.state {
            OperationState::Queued(_, Bulk::In(buffers) | Bulk::Out(buffers)) => buffers.len() > most,
            _ => false,
        };
        let queued = std::mem::take(&mut self.queued);
        let (long, queued): (VecDeque<_>, _) =
            queued.into_iter().partition(|&index| is_long(&self.slots[index as usize]));
        self.queued = queued;
        for index in long {
            self.queue_split(index);
        }
    }

    /// Cancels the parts of an operation, the last ones first, so that what is done has no gap.
    pub(super) fn cancel_split(&mut self, index: u32, cancelled: Error) {
        self.complete_unsent(index, cancelled.clone());
        let mut sent: Vec<_> = (self.parts.iter().enumerate())
            .filter_map(|(place, part)| Some((place, part.filter(|part| part.operation == index)?)))
            .collect();
        sent.sort_unstable_by_key(|(_, part)| std::cmp::Reverse(part.at));
        for (place, SentPart { at, length, request, .. }) in sent {
            // Others may have ended while this one was waited for, and parts of other operations may have
            // their places.
            if self.parts[place].is_none_or(|part| (part.operation, part.at) != (index, at)) {
                continue;
            }
            let tag = TAG_PARTS + place as u64;
            let Some(bulk) = self.channel.dequeue(tag) else {
                self.cancel_remotely(tag);
                continue;
            };
            drop(bulk);
            self.parts[place] = None;
            if let (Some(tracer), Some(request)) = (&self.tracer, request) {
                tracer.collected(self.slots[index as usize].name(), request, 0);
            }
            if let OperationState::Split(split) = &mut self.slots[index as usize].state {
                split.part_over(at, length, Err(cancelled.clone()), 0);
            }
            self.settle(index);
        }
    }
}
