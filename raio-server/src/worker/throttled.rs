//! The requests of a worker that wait because their client, or their export, goes beyond its rate
//! ([`crate::throttle`]): in order for each client and export.

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
}

impl Throttled {
    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// Takes in a request that would move this number of bytes. Returns None if it may begin. Else it waits
    /// here, behind those of its flow that wait already, and returns when [`Throttled::begin`] is due.
    pub fn wait(
        &mut self,
        flow: &Arc<Flow>,
        request: usize,
        bytes: u64,
        now: Instant,
    ) -> Option<(Waiting, Instant)> {
        if let Some(Queue { waiting, asks_at, .. }) = self.queues.get_mut(&flow.id) {
            let whose = waiting.back().map_or(Whose::Client, |last| last.whose);
            let new = Waiting { request, bytes, since: now, whose };
            waiting.push_back(new);
            return Some((new, *asks_at));
        }
        let Wait { until, whose } = flow.begin(bytes, now).err()?;
        let new = Waiting { request, bytes, since: now, whose };
        self.queues.insert(flow.id, Queue { flow: Arc::clone(flow), waiting: [new].into(), asks_at: until });
        Some((new, until))
    }

    /// Takes out all that may begin now, and tells when it is to be asked again, if any waits on.
    pub fn begin(&mut self, now: Instant) -> (Vec<Waiting>, Option<Instant>) {
        let (mut begun, mut next) = (Vec::new(), None);
        self.queues.retain(|_, Queue { flow, waiting, asks_at }| {
            while let Some(first) = waiting.front()
                && *asks_at <= now
            {
                match flow.begin(first.bytes, now) {
                    Ok(()) => begun.extend(waiting.pop_front()),
                    Err(Wait { until, .. }) => *asks_at = until,
                }
            }
            if waiting.is_empty() {
                return false;
            }
            next = Some(next.map_or(*asks_at, |next: Instant| next.min(*asks_at)));
            true
        });
        (begun, next)
    }

    /// Takes out a request of a flow. False if it does not wait here.
    pub fn take(&mut self, flow: &Flow, request: usize) -> bool {
        let Some(Queue { waiting, .. }) = self.queues.get_mut(&flow.id) else { return false };
        let at = waiting.iter().position(|waiting| waiting.request == request);
        at.and_then(|at| waiting.remove(at)).is_some()
    }

    /// Takes out all.
    pub fn take_all(&mut self) -> Vec<usize> {
        let all = std::mem::take(&mut self.queues).into_values();
        all.flat_map(|queue| queue.waiting).map(|waiting| waiting.request).collect()
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

    fn begun(throttled: &mut Throttled, now: Instant) -> Vec<usize> {
        throttled.begin(now).0.into_iter().map(|waiting| waiting.request).collect()
    }

    #[test]
    fn requests_wait_in_order_and_begin_when_their_time_has_come() {
        let now = Instant::now();
        let flow = &flows(1, now)[0];
        let mut throttled = Throttled::default();
        let (first, (_, until)) =
            (0..).find_map(|request| Some((request, throttled.wait(flow, request, 0, now)?))).unwrap();
        assert!(first >= 50, "{first}");
        assert!(until > now && until <= now + Duration::from_millis(1));
        for request in first + 1..first + 20 {
            assert!(throttled.wait(flow, request, 0, now).is_some());
        }
        assert!(begun(&mut throttled, now).is_empty());
        assert!(throttled.take(flow, first + 1));
        assert!(!throttled.take(flow, first + 1) && !throttled.take(flow, 0));
        let later = now + Duration::from_millis(10);
        let (some, next) = throttled.begin(later);
        let some: Vec<_> = some.into_iter().map(|waiting| waiting.request).collect();
        assert_eq!(some[..3], [first, first + 2, first + 3]);
        assert!((9..=11).contains(&some.len()) && next > Some(later), "{some:?} {next:?}");
        // What comes now does not overtake those that wait.
        assert!(throttled.wait(flow, 1000, 0, later + Duration::from_millis(1)).is_some());
        let (rest, next) = throttled.begin(now + Duration::from_secs(1));
        let last = rest.last().map(|waiting| waiting.request);
        assert_eq!((some.len() + rest.len(), last, next), (20, Some(1000), None));
        assert!(throttled.is_empty());
    }

    #[test]
    fn those_of_several_clients_have_the_same() {
        let now = Instant::now();
        let flows = flows(2, now);
        let mut throttled = Throttled::default();
        for request in 0..300 {
            throttled.wait(&flows[request % 2], request, 0, now);
        }
        let mut all = Vec::new();
        for ms in 1..=100 {
            all.extend(begun(&mut throttled, now + Duration::from_millis(ms)));
        }
        let of_first = all.iter().filter(|&&request| request % 2 == 0).count();
        assert!(all.len() >= 90 && of_first.abs_diff(all.len() / 2) <= 10, "{all:?}");
        assert_eq!(throttled.take_all().len() + all.len() + 51, 300);
        assert!(throttled.is_empty());
    }
}
