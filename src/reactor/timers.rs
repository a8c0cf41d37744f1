//! Timers: a heap of deadlines. A cancelled timer stays in the heap until its time and is then passed over.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

use slab::Slab;

use super::{Event, LoopClock, Payload, Token};

/// A timer that has been set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TimerId {
    key: usize,
    serial: u64,
}

#[derive(Default)]
pub(super) struct Timers {
    heap: BinaryHeap<Reverse<(Instant, u64, usize)>>,
    /// Serial number and token by key; the serial tells a reused key from the heap's stale entries.
    live: Slab<(u64, Token)>,
    serial: u64,
}

impl Timers {
    pub fn insert(&mut self, at: Instant, token: Token) -> TimerId {
        self.serial += 1;
        let key = self.live.insert((self.serial, token));
        self.heap.push(Reverse((at, self.serial, key)));
        TimerId { key, serial: self.serial }
    }

    pub fn remove(&mut self, id: TimerId) {
        if self.live.get(id.key).is_some_and(|&(serial, _)| serial == id.serial) {
            self.live.remove(id.key);
        }
        // Do not let cancelled timers pile up: many short-lived connections each cancel one.
        if self.heap.len() > 64 && self.heap.len() > 2 * self.live.len() {
            let live = &self.live;
            self.heap.retain(|Reverse((_, serial, key))| live.get(*key).is_some_and(|(s, _)| s == serial));
        }
    }

    /// How many are set.
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// When the next timer comes.
    pub fn next(&mut self) -> Option<Instant> {
        while let Some(&Reverse((at, serial, key))) = self.heap.peek() {
            if self.live.get(key).is_some_and(|&(s, _)| s == serial) {
                return Some(at);
            }
            self.heap.pop();
        }
        None
    }

    /// Appends the timers that have come by the clock.
    pub fn expire(&mut self, clock: &LoopClock, events: &mut Vec<Event>) {
        if self.live.is_empty() {
            return;
        }
        let now = clock.read();
        while self.next().is_some_and(|at| at <= now) {
            if let Some(Reverse((_, _, key))) = self.heap.pop() {
                let (_, token) = self.live.remove(key);
                events.push(Event { token, result: Ok(0), payload: Payload::Timer });
            }
        }
    }
}
