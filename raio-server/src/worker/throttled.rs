//! The requests of a worker that wait because their client, or their export, goes beyond its rate
//! ([`crate::throttle`]): in order for each client and export, and these take turns.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use crate::throttle::{Flow, Wait, Whose};

/// A request that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Which.
    pub request: usize,
    /// The bytes that it is to move.
    pub bytes: u64,
    /// Since when.
    pub since: Instant,
    /// For whose rate, at first.
    pub whose: Whose,
}

/// Those that wait for one flow, oldest first, and when to ask it again.
#[derive(Debug)]
struct Queue {
    flow: Arc<Flow>,
    waiting: VecDeque<Waiting>,
    asks_at: Instant,
}

/// See the module documentation. Requests are the worker's keys for them.
#[derive(Debug, Default)]
pub struct Throttled {
    /// By the id of the flow.
    queues: HashMap<u64, Queue>,
    turns: VecDeque<u64>,
}

impl Throttled {
    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// A request has come that would move so many bytes. None: it may begin. Else it waits here, behind those
    /// of its flow that wait already; [`Throttled::next_at`] may be another time then.
    pub fn wait(&mut self, flow: &Arc<Flow>, request: usize, bytes: u64, now: Instant) -> Option<Waiting> {
        if let Some(Queue { waiting, .. }) = self.queues.get_mut(&flow.id) {
            let whose = waiting.back().map_or(Whose::Client, |last| last.whose);
            let new = Waiting { request, bytes, since: now, whose };
            waiting.push_back(new);
            return Some(new);
        }
        let Wait { until, whose } = flow.begin(bytes, now).err()?;
        let new = Waiting { request, bytes, since: now, whose };
        let queue = Queue { flow: Arc::clone(flow), waiting: [new].into(), asks_at: until };
        self.queues.insert(flow.id, queue);
        self.turns.push_back(flow.id);
        Some(new)
    }

    /// The next request that may begin now.
    pub fn next(&mut self, now: Instant) -> Option<Waiting> {
        for _ in 0..self.turns.len() {
            let id = self.turns.pop_front()?;
            let Some(queue) = self.queues.get_mut(&id) else { continue };
            let Some(&first) = queue.waiting.front() else {
                self.queues.remove(&id);
                continue;
            };
            self.turns.push_back(id);
            if queue.asks_at > now {
                continue;
            }
            match queue.flow.begin(first.bytes, now) {
                Ok(()) => {
                    queue.waiting.pop_front();
                    return Some(first);
                }
                Err(Wait { until, .. }) => queue.asks_at = until,
            }
        }
        None
    }

    /// When the next one may begin, if any waits.
    pub fn next_at(&self) -> Option<Instant> {
        self.queues.values().filter(|queue| !queue.waiting.is_empty()).map(|queue| queue.asks_at).min()
    }

    /// Takes out a request. False if it does not wait here.
    pub fn take(&mut self, request: usize) -> bool {
        for queue in self.queues.values_mut() {
            if let Some(at) = queue.waiting.iter().position(|waiting| waiting.request == request) {
                queue.waiting.remove(at);
                return true;
            }
        }
        false
    }

    /// The requests that wait.
    pub fn requests(&self) -> impl Iterator<Item = usize> + '_ {
        self.queues.values().flat_map(|queue| &queue.waiting).map(|waiting| waiting.request)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::throttle::{ClientRates, Holder, Rates, Throttles};

    fn flows(count: usize, now: Instant) -> Vec<Arc<Flow>> {
        let rates = Rates::new(Some(1000), None, None).unwrap();
        let throttles = Throttles::new([rates].into_iter(), now);
        let flow = |n| throttles.flow(Holder::Client(format!("{n}")), 0, &ClientRates::NONE, now).unwrap();
        (0..count).map(flow).collect()
    }

    fn all_next(throttled: &mut Throttled, now: Instant) -> Vec<usize> {
        std::iter::from_fn(|| throttled.next(now)).map(|waiting| waiting.request).collect()
    }

    #[test]
    fn requests_wait_in_order_and_begin_when_their_time_has_come() {
        let now = Instant::now();
        let flow = &flows(1, now)[0];
        let mut throttled = Throttled::default();
        let waits = |throttled: &mut Throttled, request| throttled.wait(flow, request, 0, now).is_some();
        let begun = (0..).find(|&request| waits(&mut throttled, request)).unwrap();
        assert!(begun >= 50, "{begun}");
        for request in begun + 1..begun + 20 {
            assert!(waits(&mut throttled, request));
        }
        assert!(all_next(&mut throttled, now).is_empty());
        assert!(throttled.take(begun + 1) && !throttled.take(begun + 1) && !throttled.take(0));
        let next_at = throttled.next_at().unwrap();
        assert!(next_at > now && next_at <= now + Duration::from_millis(1));
        let later = now + Duration::from_millis(10);
        let first = all_next(&mut throttled, later);
        assert_eq!(first[..3], [begun, begun + 2, begun + 3]);
        assert!((9..=11).contains(&first.len()), "{first:?}");
        // What comes now does not overtake those that wait.
        assert!(throttled.wait(flow, 1000, 0, later + Duration::from_millis(1)).is_some());
        let rest = all_next(&mut throttled, now + Duration::from_secs(1));
        assert_eq!((first.len() + rest.len(), rest.last()), (20, Some(&1000)));
        assert!(throttled.is_empty() && throttled.next_at().is_none());
    }

    #[test]
    fn those_of_several_clients_take_turns() {
        let now = Instant::now();
        let flows = flows(2, now);
        let mut throttled = Throttled::default();
        for request in 0..300 {
            throttled.wait(&flows[request % 2], request, 0, now);
        }
        let begun = all_next(&mut throttled, now + Duration::from_millis(100));
        let of_first = begun.iter().filter(|&&request| request % 2 == 0).count();
        assert!(begun.len() >= 50 && of_first.abs_diff(begun.len() / 2) <= 10, "{begun:?}");
    }
}
