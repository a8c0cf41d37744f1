//! The outstanding requests of a client, and its credits.

use crate::error::Violation;
use crate::handshake::Grant;
use crate::protocol::Opcode;
use crate::transport::{IdHistory as History, KeptCommand, RequestId, SendOptions, UsedIds};

/// The requests: ids are slot index and generation, so that a late response never hits a reused slot.
#[derive(Debug)]
pub(super) struct Outstanding<T> {
    slots: Vec<Slot<T>>,
    /// As many as there are credits, or more: what is outstanding has spent one each.
    free: Vec<u32>,
    /// Credits: how many more requests may be sent, the one for control messages among them.
    credits: u32,
    credits_max: u32,
}

#[derive(Debug)]
struct Slot<T> {
    history: History,
    value: Option<T>,
    /// Of the slot's last request, also after that is over: a request that is answered moves, and this does
    /// not.
    sent: Sent,
}

/// What another connection needs of a request, besides its buffers, if this one breaks.
#[derive(Clone, Debug)]
pub(super) struct Sent {
    pub command: KeptCommand,
    pub options: SendOptions,
}

impl<T> Outstanding<T> {
    /// For a connection with this grant.
    pub fn new(grant: &Grant) -> Self {
        let credits = grant.credits();
        let none = || Sent { command: KeptCommand::Short([0; 24]), options: SendOptions::PLAIN };
        let slot = |_| Slot { history: History::default(), value: None, sent: none() };
        Self {
            slots: (0..credits).map(slot).collect(),
            free: (0..credits).rev().collect(),
            credits,
            credits_max: credits,
        }
    }

    /// Goes on with the generations of the channel's earlier connections. Nothing is outstanding yet.
    pub fn set_used_ids(&mut self, used: &UsedIds) {
        for (slot, &history) in self.slots.iter_mut().zip(&used.0) {
            slot.history = history;
        }
    }

    /// Adds to what the channel's earlier connections have used what this one has.
    pub fn add_used_ids(&self, used: &mut UsedIds) {
        if used.0.len() < self.slots.len() {
            used.0.resize(self.slots.len(), History::default());
        }
        for (history, slot) in used.0.iter_mut().zip(&self.slots) {
            *history = slot.history;
        }
    }

    /// Credits left for ordinary requests.
    pub fn credits(&self) -> usize {
        self.credits.saturating_sub(1) as usize
    }

    /// How many are outstanding.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether none is outstanding.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether there is a credit for a request.
    #[inline]
    pub fn may_insert(&self, control: bool) -> bool {
        self.credits > u32::from(!control)
    }

    /// Spends a credit on a request with this command. Returns the value if there is none left.
    #[inline]
    pub fn insert(&mut self, value: T, options: SendOptions, command: &[u8]) -> Result<RequestId, T> {
        if !self.may_insert(options.control) {
            return Err(value);
        }
        let Some(index) = self.free.pop() else { return Err(value) };
        let slot = &mut self.slots[index as usize];
        let vacant @ None = &mut slot.value else { return Err(value) };
        self.credits -= 1;
        if Opcode::is_recorded_on_wire(command) {
            slot.history.on_recorded();
        }
        slot.sent = Sent { command: KeptCommand::from(command), options };
        *vacant = Some(value);
        Ok(slot.history.id(index))
    }

    /// What was sent of the last request of this one's slot: of itself, if it is outstanding or was the last
    /// to be finished there.
    pub fn sent(&self, id: RequestId) -> &Sent {
        &self.slots[id.slot()].sent
    }

    /// All requests.
    pub fn iter(&self) -> impl Iterator<Item = (&T, &Sent)> {
        self.slots.iter().filter_map(|slot| Some((slot.value.as_ref()?, &slot.sent)))
    }

    /// The id of the first request for which this is so.
    pub fn find(&self, mut is_it: impl FnMut(&T) -> bool) -> Option<RequestId> {
        let index = self.slots.iter().position(|slot| slot.value.as_ref().is_some_and(&mut is_it))?;
        Some(self.slots[index].history.id(index as u32))
    }

    /// The request with this id.
    pub fn get(&self, id: RequestId) -> Option<&T> {
        let slot = self.slots.get(id.0 as u16 as usize)?;
        if u64::from(slot.history.generation) == id.0 >> 16 { slot.value.as_ref() } else { None }
    }

    /// The request with this id, to change.
    pub fn get_mut(&mut self, id: RequestId) -> Option<&mut T> {
        let slot = self.slots.get_mut(id.0 as u16 as usize)?;
        if u64::from(slot.history.generation) == id.0 >> 16 { slot.value.as_mut() } else { None }
    }

    /// Ends a request that passes the check: takes it out and takes back `credits`. A response that names no
    /// outstanding request, returns more credits than the requests that are over have spent, or leaves
    /// nothing outstanding and no credit to go on with, is the peer's violation.
    #[inline]
    pub fn finish(
        &mut self,
        id: RequestId,
        credits: u16,
        check: impl FnOnce(&T) -> Result<(), Violation>,
    ) -> Result<T, Violation> {
        let index = id.0 as u16;
        let left = (self.len() as u32).saturating_sub(1);
        let slot = self.slots.get_mut(index as usize).ok_or(Violation::RequestId)?;
        let value = slot.value.as_ref().filter(|_| u64::from(slot.history.generation) == id.0 >> 16);
        check(value.ok_or(Violation::RequestId)?)?;
        let credits = self.credits + u32::from(credits);
        // Credits come with responses alone: with none for ordinary requests, and no response to come, there
        // would never be one.
        if credits > self.credits_max - left || (left == 0 && credits <= 1) {
            return Err(Violation::Credits);
        }
        let value = slot.value.take().ok_or(Violation::RequestId)?;
        slot.history.on_over();
        self.free.push(index.into());
        self.credits = credits;
        Ok(value)
    }

    /// Takes out everything, for a connection that has ended.
    pub fn drain(&mut self) -> impl Iterator<Item = (RequestId, T, &Sent)> {
        let free = &mut self.free;
        self.credits = self.credits_max;
        self.slots.iter_mut().enumerate().filter_map(move |(index, slot)| {
            let value = slot.value.take()?;
            let id = slot.history.id(index as u32);
            slot.history.on_over();
            free.push(index as u32);
            Some((id, value, &slot.sent))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A command that the server does not record, and one that it does.
    const READ: [u8; 2] = [Opcode::Read as u8, 0];
    const WRITE: [u8; 2] = [Opcode::Write as u8, 0];

    fn grant(queue_depth: u32) -> Grant {
        Grant {
            version: 1,
            features: 0,
            server: [0; 16],
            queue_depth,
            data_bytes_max: 4096,
            inline_bytes_max: 0,
            keepalive: Duration::from_secs(1),
            queue_pair: false,
            linger: Duration::ZERO,
            push: crate::handshake::PushWindows::NONE,
        }
    }

    #[test]
    fn the_last_credit_is_for_control_messages() {
        let mut outstanding = Outstanding::new(&grant(2));
        outstanding.insert((), SendOptions::PLAIN, &READ).unwrap();
        outstanding.insert((), SendOptions::PLAIN, &READ).unwrap();
        assert!(outstanding.insert((), SendOptions::PLAIN, &READ).is_err());
        outstanding.insert((), SendOptions::CONTROL, &READ).unwrap();
        assert!(outstanding.insert((), SendOptions::CONTROL, &READ).is_err());
    }

    #[test]
    fn a_late_response_does_not_hit_a_reused_slot() {
        let mut outstanding = Outstanding::new(&grant(1));
        let first = outstanding.insert('a', SendOptions::PLAIN, &READ).unwrap();
        assert_eq!(outstanding.finish(first, 1, |_| Ok(())), Ok('a'));
        let second = outstanding.insert('b', SendOptions::PLAIN, &READ).unwrap();
        assert_ne!(first, second);
        assert_eq!(outstanding.finish(first, 1, |_| Ok(())), Err(Violation::RequestId));
        assert_eq!(outstanding.finish(second, 1, |_| Ok(())), Ok('b'));
    }

    #[test]
    fn credits_that_were_never_spent_are_a_violation() {
        let mut outstanding = Outstanding::new(&grant(1));
        let id = outstanding.insert((), SendOptions::PLAIN, &READ).unwrap();
        assert_eq!(outstanding.finish(id, 2, |_| Ok(())), Err(Violation::Credits));
    }

    #[test]
    fn credits_of_a_request_that_is_not_over_are_a_violation() {
        let mut outstanding = Outstanding::new(&grant(4));
        let first = outstanding.insert((), SendOptions::PLAIN, &READ).unwrap();
        outstanding.insert((), SendOptions::PLAIN, &READ).unwrap();
        assert_eq!(outstanding.finish(first, 2, |_| Ok(())), Err(Violation::Credits));
        assert_eq!(outstanding.finish(first, 1, |_| Ok(())), Ok(()));
    }

    #[test]
    fn credits_that_are_all_kept_are_a_violation() {
        let mut outstanding = Outstanding::new(&grant(2));
        let first = outstanding.insert('a', SendOptions::PLAIN, &READ).unwrap();
        let second = outstanding.insert('b', SendOptions::PLAIN, &READ).unwrap();
        // They may yet come with the next response.
        assert_eq!(outstanding.finish(first, 0, |_| Ok(())), Ok('a'));
        assert_eq!(outstanding.finish(second, 0, |_| Ok(())), Err(Violation::Credits));
        assert_eq!(outstanding.finish(second, 1, |_| Ok(())), Ok('b'));
    }

    #[test]
    fn a_recorded_request_does_not_get_the_id_of_the_last_one_of_its_slot() {
        let mut outstanding = Outstanding::new(&grant(1));
        // The control credit's slot, so that all have the other one.
        let mut run = |command: &[u8]| {
            let id = outstanding.insert((), SendOptions::PLAIN, command).unwrap();
            outstanding.finish(id, 1, |_| Ok(())).unwrap();
            id
        };
        let first = run(&WRITE);
        for _ in 0..65_535 {
            assert_ne!(run(&READ), first);
        }
        assert_ne!(run(&WRITE), first);
        for _ in 0..65_534 {
            run(&READ);
        }
        // One that is not recorded may have it.
        assert_eq!(run(&READ), first);
    }

    #[test]
    fn the_generations_of_a_channel_go_on_over_its_connections() {
        let mut used = UsedIds::default();
        let mut earlier = Vec::new();
        // The server grants more, and less, than before.
        for depth in [2, 1, 3, 2] {
            let mut outstanding = Outstanding::new(&grant(depth));
            outstanding.set_used_ids(&used);
            for _ in 0..depth {
                let id = outstanding.insert((), SendOptions::PLAIN, &WRITE).unwrap();
                assert!(!earlier.contains(&id), "{id:?}");
                earlier.push(id);
            }
            assert_eq!(outstanding.drain().count(), depth as usize);
            outstanding.add_used_ids(&mut used);
        }
    }

    #[test]
    fn a_request_is_found_by_what_it_holds() {
        let mut outstanding = Outstanding::new(&grant(2));
        let first = outstanding.insert('a', SendOptions::PLAIN, &READ).unwrap();
        outstanding.insert('b', SendOptions::PLAIN, &READ).unwrap();
        assert_eq!(outstanding.find(|&value| value == 'a'), Some(first));
        outstanding.finish(first, 1, |_| Ok(())).unwrap();
        assert_eq!(outstanding.find(|&value| value == 'a'), None);
    }
}
