//! The outstanding requests of a client, and its credits.

use crate::error::Violation;
use crate::handshake::Grant;
use crate::transport::RequestId;

/// The requests: ids are slot index and generation, so that a late response never hits a reused slot.
#[derive(Debug)]
pub(super) struct Outstanding<T> {
    slots: Vec<(u16, Option<T>)>,
    free: Vec<u32>,
    /// Credits: how many more requests may be sent, the one for control messages among them.
    credits: u32,
    credits_max: u32,
}

impl<T> Outstanding<T> {
    /// For a connection with this grant.
    pub fn new(grant: &Grant) -> Self {
        let credits = grant.credits();
        Self {
            slots: (0..credits).map(|_| (0, None)).collect(),
            free: (0..credits).rev().collect(),
            credits,
            credits_max: credits,
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
    pub fn may_insert(&self, control: bool) -> bool {
        self.credits > u32::from(!control) && !self.free.is_empty()
    }

    /// Spends a credit on a request. Returns the value if there is none left.
    pub fn insert(&mut self, value: T, control: bool) -> Result<RequestId, T> {
        if !self.may_insert(control) {
            return Err(value);
        }
        let Some(index) = self.free.pop() else { return Err(value) };
        self.credits -= 1;
        let (generation, slot) = &mut self.slots[index as usize];
        *slot = Some(value);
        Ok(RequestId(u64::from(*generation) << 16 | u64::from(index)))
    }

    /// The request with this id.
    pub fn get(&self, id: RequestId) -> Option<&T> {
        let (generation, slot) = self.slots.get(id.0 as u16 as usize)?;
        if u64::from(*generation) == id.0 >> 16 { slot.as_ref() } else { None }
    }

    /// The request with this id, to change.
    pub fn get_mut(&mut self, id: RequestId) -> Option<&mut T> {
        let (generation, slot) = self.slots.get_mut(id.0 as u16 as usize)?;
        if u64::from(*generation) == id.0 >> 16 { slot.as_mut() } else { None }
    }

    /// Ends a request: takes it out and takes back `credits`. A response that names no outstanding request,
    /// returns more credits than the requests that are over have spent, or leaves nothing outstanding and no
    /// credit to go on with, is the peer's violation.
    pub fn finish(&mut self, id: RequestId, credits: u16) -> Result<T, Violation> {
        let index = id.0 as u16;
        let left = (self.len() as u32).saturating_sub(1);
        let (generation, slot) = self.slots.get_mut(index as usize).ok_or(Violation::RequestId)?;
        if u64::from(*generation) != id.0 >> 16 {
            return Err(Violation::RequestId);
        }
        let credits = self.credits + u32::from(credits);
        // Credits come with responses alone: with none for ordinary requests, and no response to come, there
        // would never be one.
        if credits > self.credits_max - left || (left == 0 && credits <= 1) {
            return Err(Violation::Credits);
        }
        let value = slot.take().ok_or(Violation::RequestId)?;
        *generation = generation.wrapping_add(1);
        self.free.push(index.into());
        self.credits = credits;
        Ok(value)
    }

    /// Takes out everything, for a connection that has ended.
    pub fn drain(&mut self) -> impl Iterator<Item = T> + '_ {
        let free = &mut self.free;
        self.credits = self.credits_max;
        self.slots.iter_mut().enumerate().filter_map(move |(index, (generation, slot))| {
            let value = slot.take()?;
            *generation = generation.wrapping_add(1);
            free.push(index as u32);
            Some(value)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

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
        }
    }

    #[test]
    fn the_last_credit_is_for_control_messages() {
        let mut outstanding = Outstanding::new(&grant(2));
        outstanding.insert((), false).unwrap();
        outstanding.insert((), false).unwrap();
        assert!(outstanding.insert((), false).is_err());
        outstanding.insert((), true).unwrap();
        assert!(outstanding.insert((), true).is_err());
    }

    #[test]
    fn a_late_response_does_not_hit_a_reused_slot() {
        let mut outstanding = Outstanding::new(&grant(1));
        let first = outstanding.insert('a', false).unwrap();
        assert_eq!(outstanding.finish(first, 1), Ok('a'));
        let second = outstanding.insert('b', false).unwrap();
        assert_ne!(first, second);
        assert_eq!(outstanding.finish(first, 1), Err(Violation::RequestId));
        assert_eq!(outstanding.finish(second, 1), Ok('b'));
    }

    #[test]
    fn credits_that_were_never_spent_are_a_violation() {
        let mut outstanding = Outstanding::new(&grant(1));
        let id = outstanding.insert((), false).unwrap();
        assert_eq!(outstanding.finish(id, 2), Err(Violation::Credits));
    }

    #[test]
    fn credits_of_a_request_that_is_not_over_are_a_violation() {
        let mut outstanding = Outstanding::new(&grant(4));
        let first = outstanding.insert((), false).unwrap();
        outstanding.insert((), false).unwrap();
        assert_eq!(outstanding.finish(first, 2), Err(Violation::Credits));
        assert_eq!(outstanding.finish(first, 1), Ok(()));
    }

    #[test]
    fn credits_that_are_all_kept_are_a_violation() {
        let mut outstanding = Outstanding::new(&grant(2));
        let first = outstanding.insert('a', false).unwrap();
        let second = outstanding.insert('b', false).unwrap();
        // They may yet come with the next response.
        assert_eq!(outstanding.finish(first, 0), Ok('a'));
        assert_eq!(outstanding.finish(second, 0), Err(Violation::Credits));
        assert_eq!(outstanding.finish(second, 1), Ok('b'));
    }
}
