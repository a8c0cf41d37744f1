//! How many of a file's O_DIRECT requests its device gets at a time.
//!
//! Some devices report only when they have nothing left to do, and then everything at once: virtual ones do,
//! whose host works their queue to its end before it interrupts. Such a device would be idle until the
//! answers have gone out and the client's next requests have come in. So it gets a part of what there is, and
//! the rest in the moment it reports, to work on in the meantime. A device that reports one by one gets
//! everything as it comes.

use std::collections::VecDeque;

use raio_transport::memory::Slot;

use crate::tuning::device::TOGETHER_MIN;

/// One file's, at one worker.
#[derive(Debug)]
pub struct DispatchLimiter {
    /// The device has so many...
    in_flight: usize,
    /// ... and gets no more than this.
    limit: usize,
    /// How many there have been of late, with those held, when the device reported.
    depth: usize,
    /// So many have ended since [`DispatchLimiter::on_batch_complete`].
    ended: usize,
    /// The keys of the others, and their memory, oldest first. If there are any, the device has as many as it
    /// gets.
    held: VecDeque<(usize, Slot)>,
}

impl Default for DispatchLimiter {
    fn default() -> Self {
        Self { in_flight: 0, limit: usize::MAX, depth: 0, ended: 0, held: VecDeque::new() }
    }
}

impl DispatchLimiter {
    /// Takes in a request. Its memory comes back if it is to begin now; if not, [`DispatchLimiter::next`]
    /// gives it later.
    pub fn admit(&mut self, key: usize, slot: Slot) -> Option<Slot> {
        if self.in_flight >= self.limit {
            self.held.push_back((key, slot));
            return None;
        }
        self.in_flight += 1;
        Some(slot)
    }

    /// One that was begun has ended. Whether it is the first since [`DispatchLimiter::on_batch_complete`].
    pub fn ended(&mut self) -> bool {
        self.in_flight -= 1;
        self.ended += 1;
        self.ended == 1
    }

    /// No more have ended for now: learns how the device reports.
    pub fn on_batch_complete(&mut self) {
        let ended = std::mem::take(&mut self.ended);
        if self.in_flight == 0 && ended >= TOGETHER_MIN {
            // A report may come between the answers and the next requests; a single one of few says little.
            self.depth = (ended + self.held.len()).max(self.depth - self.depth / 8);
            // What is held must last for a client's round trip. More of it would mean more reports, each of
            // which the device waits out.
            self.limit = self.depth - self.depth * 3 / 8;
        } else {
            self.limit = self.limit.saturating_add(self.limit / 8 + 1);
        }
    }

    /// The key of the next of those held, if it is to begin now.
    pub fn due(&self) -> Option<usize> {
        let &(key, _) = self.held.front()?;
        (self.in_flight < self.limit).then_some(key)
    }

    /// Takes out the next of those held, if it is to begin now.
    pub fn next(&mut self) -> Option<(usize, Slot)> {
        self.due()?;
        let next = self.held.pop_front()?;
        self.in_flight += 1;
        Some(next)
    }

    /// Takes out a request that is held. Returns its memory; None if it is not held.
    pub fn take_back(&mut self, key: usize) -> Option<Slot> {
        let at = self.held.iter().position(|&(held, _)| held == key)?;
        self.held.remove(at).map(|(_, slot)| slot)
    }

    /// Whether the device reports everything at once.
    pub fn coalesces_completions(&self) -> bool {
        self.limit < usize::MAX
    }
}

#[cfg(test)]
mod tests {
    use raio_transport::memory::Arena;

    use super::*;
    use crate::random::Random;

    /// A device, and a client that keeps so many requests outstanding.
    struct Bench {
        device_queue: DispatchLimiter,
        arena: Arena,
        next_key: usize,
        /// What the device has.
        begun: VecDeque<(usize, Slot)>,
    }

    impl Bench {
        fn new() -> Self {
            let arena = Arena::new(1 << 20, 4096).unwrap();
            Self { device_queue: DispatchLimiter::default(), arena, next_key: 0, begun: VecDeque::new() }
        }

        fn request(&mut self, count: usize) {
            for _ in 0..count {
                let slot = self.arena.alloc(512).unwrap();
                if let Some(slot) = self.device_queue.admit(self.next_key, slot) {
                    self.begun.push_back((self.next_key, slot));
                }
                self.next_key += 1;
            }
        }

        /// The device reports this number of requests. Returns their keys.
        fn report(&mut self, count: usize) -> Vec<usize> {
            let keys: Vec<_> = self.begun.drain(..count).map(|(key, _)| key).collect();
            for at in 0..count {
                assert_eq!(self.device_queue.ended(), at == 0);
            }
            self.device_queue.on_batch_complete();
            while let Some(next) = self.device_queue.next() {
                self.begun.push_back(next);
            }
            keys
        }
    }

    #[test]
    fn a_device_that_reports_everything_at_once_has_something_to_do_in_the_moment_it_reports() {
        let mut bench = Bench::new();
        bench.request(32);
        assert_eq!(bench.begun.len(), 32, "nothing is known yet");
        assert_eq!(bench.report(32).len(), 32);
        bench.request(32);
        for _ in 0..100 {
            assert_eq!(bench.begun.len(), 20);
            assert_eq!(bench.report(20).len(), 20);
            assert_eq!(bench.begun.len(), 12);
            bench.request(20);
        }
    }

    #[test]
    fn a_device_that_reports_by_and_by_gets_everything_at_once() {
        let mut bench = Bench::new();
        bench.request(32);
        for count in [1, 7, 8, 15] {
            bench.report(count);
            bench.request(count);
            assert_eq!(bench.begun.len(), 32);
        }
        // Once by chance...
        bench.report(32);
        bench.request(32);
        assert_eq!(bench.begun.len(), 20);
        // ... is forgotten.
        for _ in 0..4 {
            bench.report(1);
            bench.request(1);
        }
        assert_eq!(bench.begun.len(), 32);
    }

    #[test]
    fn a_client_that_asks_for_few_waits_for_nothing() {
        let mut bench = Bench::new();
        for _ in 0..10 {
            bench.request(TOGETHER_MIN - 1);
            assert_eq!(bench.begun.len(), TOGETHER_MIN - 1);
            bench.report(TOGETHER_MIN - 1);
        }
    }

    #[test]
    fn a_request_that_is_held_can_be_taken_back_and_no_other() {
        let mut bench = Bench::new();
        bench.request(32);
        bench.report(32);
        bench.request(32);
        let begun: Vec<_> = bench.begun.iter().map(|&(key, _)| key).collect();
        assert_eq!(begun, (32..52).collect::<Vec<_>>());
        assert!(bench.device_queue.take_back(51).is_none());
        assert!(bench.device_queue.take_back(52).is_some());
        assert!(bench.device_queue.take_back(52).is_none());
        bench.report(20);
        assert_eq!(bench.begun.front().map(|&(key, _)| key), Some(53));
    }

    #[test]
    fn whatever_the_device_does_every_request_begins_in_its_turn() {
        let mut random = Random::new();
        let mut up_to = |most: usize| random.index(most + 1);
        for _ in 0..100 {
            let mut bench = Bench::new();
            let mut ended = Vec::new();
            for _ in 0..1000 {
                bench.request(up_to(64 - (bench.next_key - ended.len())));
                let has = bench.begun.len();
                assert!(has > 0 || bench.next_key == ended.len(), "idle, and somebody waits");
                if has > 0 {
                    let count = if up_to(1) == 0 { has } else { 1 + up_to(has - 1) };
                    ended.extend(bench.report(count));
                }
            }
            assert_eq!(ended, (0..ended.len()).collect::<Vec<_>>());
        }
    }
}
