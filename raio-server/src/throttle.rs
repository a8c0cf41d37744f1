//! Rates: how many operations and bytes a second a client may have, on one export or on all, and how many all
//! clients of an export may have together. A request beyond that is not rejected: it waits at its worker
//! ([`crate::worker`]).
//!
//! A rate is a token bucket, kept as the time until which the requests so far have used it up (the generic
//! cell rate algorithm, ITU-T I.371): one more may begin while that time is not further ahead than the burst.
//! So a request of any size begins at once after a pause, and what follows it waits the longer.
//!
//! Clients share the rate of an export by their weights, by start-time fair queueing (Goyal, Vin, Cheng,
//! 1996). Each request has a start tag: the sum of what its client's requests before it have cost, divided by
//! the client's weight, or the tag of what the export does now if that is more. Those with the lowest tags
//! begin first. The workers do not tell one another of requests that wait: each asks here for its own, and a
//! client may be ahead of the others by what the export does in [`LEAD`] until they have asked.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::{Duration, Instant};

use raio_transport::sync::lock;

use crate::peer::Origin;
use crate::size::Size;
use crate::tuning::throttle::{
    BANDWIDTH_MIN, BURST_DEFAULT, BURST_MAX, BURST_MIN, FORGOTTEN_AFTER, IOPS_MAX, LEAD, RETRY_AFTER,
    WEIGHT_MAX,
};

/// How many operations and bytes there may be in a second. None: as many as there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    iops: Option<u64>,
    bandwidth: Option<u64>,
    /// For how long an unused rate may be caught up with.
    burst: Duration,
}

impl Rates {
    /// No limits.
    pub const NONE: Self = Self { iops: None, bandwidth: None, burst: BURST_DEFAULT };

    /// By what the configuration says: operations a second, bytes a second, and a burst in seconds. The error
    /// is an error message.
    pub fn new(iops: Option<u64>, bandwidth: Option<Size>, burst: Option<f64>) -> Result<Self, String> {
        if let Some(iops) = iops.filter(|iops| !(1..=IOPS_MAX).contains(iops)) {
            return Err(format!("iops is {iops}. Give a number from 1 to {IOPS_MAX}, or leave it out."));
        }
        let bandwidth = bandwidth.map(|Size(bytes)| bytes);
        if let Some(bandwidth) = bandwidth.filter(|&bytes| bytes < BANDWIDTH_MIN) {
            return Err(format!(
                "bandwidth is {bandwidth} bytes a second. Give at least {BANDWIDTH_MIN}, or leave it out."
            ));
        }
        let burst = match burst {
            None => BURST_DEFAULT,
            Some(_) if (iops, bandwidth) == (None, None) => {
                return Err("burst means nothing without iops or bandwidth. Give one of them.".into());
            }
            Some(seconds) => Duration::try_from_secs_f64(seconds)
                .ok()
                .filter(|burst| (BURST_MIN..=BURST_MAX).contains(burst))
                .ok_or_else(|| {
                    format!(
                        "burst is {seconds} seconds. Give a number from {} to {}, or leave it out.",
                        BURST_MIN.as_secs_f64(),
                        BURST_MAX.as_secs_f64()
                    )
                })?,
        };
        Ok(Self { iops, bandwidth, burst })
    }

    /// Whether there is any limit.
    pub fn limit(&self) -> bool {
        self.iops.is_some() || self.bandwidth.is_some()
    }

    /// Those that allow what either does.
    pub fn or(&self, other: &Self) -> Self {
        let more = |one: Option<u64>, other| one.zip(other).map(|(one, other): (u64, u64)| one.max(other));
        Self {
            iops: more(self.iops, other.iops),
            bandwidth: more(self.bandwidth, other.bandwidth),
            burst: self.burst.max(other.burst),
        }
    }

    /// How long an operation takes by the one rate, and its bytes by the other.
    fn cost(&self, bytes: u64) -> [Duration; 2] {
        let second = Duration::from_secs(1).as_nanos() as u64;
        let operation = self.iops.map_or(0, |iops| second / iops);
        let bytes = self.bandwidth.map_or(0, |rate| {
            u64::try_from(u128::from(bytes) * u128::from(second) / u128::from(rate)).unwrap_or(u64::MAX)
        });
        [operation, bytes].map(Duration::from_nanos)
    }
}

/// What a client may have of one export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The client's requests on it.
    pub rates: Rates,
    /// How much the client has of the export's rates, beside others: twice the weight is twice as much.
    pub weight: u32,
}

impl Share {
    /// Nothing is said of it.
    pub const DEFAULT: Self = Self { rates: Rates::NONE, weight: 1 };

    /// With a weight as the configuration says it. The error is an error message.
    pub fn new(rates: Rates, weight: Option<u32>) -> Result<Self, String> {
        let weight = weight.unwrap_or(1);
        if !(1..=WEIGHT_MAX).contains(&weight) {
            return Err(format!(
                "weight is {weight}. Give a number from 1 to {WEIGHT_MAX}, or leave it out."
            ));
        }
        Ok(Self { rates, weight })
    }

    /// One that allows what either does.
    pub fn or(&self, other: &Self) -> Self {
        Self { rates: self.rates.or(&other.rates), weight: self.weight.max(other.weight) }
    }
}

/// Whose rate a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The client's: on this export, or on all.
    Client,
    /// The export's, of all its clients.
    Export,
}

/// How many kinds of [`Whose`] there are.
pub const WHOSE_COUNT: usize = 2;

/// A request must wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// When to ask again.
    pub until: Instant,
    /// For which rate.
    pub whose: Whose,
}

/// Rates, and until when they are used up.
#[derive(Debug)]
struct Bucket {
    rates: Rates,
    used_until: [Instant; 2],
}

impl Bucket {
    fn new(rates: Rates, now: Instant) -> Self {
        Self { rates, used_until: [now; 2] }
    }

    /// From when on another request may begin.
    fn opens_at(&self) -> Instant {
        let [operations, bytes] = self.used_until;
        let until = operations.max(bytes);
        until.checked_sub(self.rates.burst).unwrap_or(until)
    }

    /// A request begins.
    fn take(&mut self, bytes: u64, now: Instant) {
        for (until, cost) in self.used_until.iter_mut().zip(self.rates.cost(bytes)) {
            *until = (*until).max(now) + cost;
        }
    }
}

/// Start and finish tags: the time that requests take by the export's rates, divided by a weight. The unit is
/// a part of a nanosecond that is small enough to be divided.
type Tag = u128;

fn tag(time: Duration, weight: u64) -> Tag {
    (time.as_nanos() << 20) / Tag::from(weight)
}

/// A flow that waits.
#[derive(Clone, Copy, Debug)]
struct Waiter {
    /// It asks again by then. Later it does not count any more, so it need not say that it no longer waits.
    until: Instant,
    weight: u32,
}

/// The rates of an export, and who waits for them.
#[derive(Debug)]
struct Queue {
    bucket: Bucket,
    /// The start tag of the request that began last.
    virtual_time: Tag,
    /// By the start tags of their next requests and their ids.
    waiting: BTreeMap<(Tag, u64), Waiter>,
    /// The sum of their weights.
    weights: u64,
}

impl Queue {
    fn new(rates: Rates, now: Instant) -> Arc<Mutex<Self>> {
        let bucket = Bucket::new(rates, now);
        Arc::new(Mutex::new(Self { bucket, virtual_time: 0, waiting: BTreeMap::new(), weights: 0 }))
    }

    fn insert(&mut self, start: Tag, id: u64, waiter: Waiter) {
        self.waiting.insert((start, id), waiter);
        self.weights += u64::from(waiter.weight);
    }

    fn remove(&mut self, start: Tag, id: u64) {
        if let Some(Waiter { weight, .. }) = self.waiting.remove(&(start, id)) {
            self.weights -= u64::from(weight);
        }
    }

    /// The lowest tag of those who wait.
    fn lowest(&mut self, now: Instant) -> Option<Tag> {
        while let Some((&(start, id), waiter)) = self.waiting.first_key_value() {
            if waiter.until >= now {
                return Some(start);
            }
            self.remove(start, id);
        }
        None
    }
}

/// What one client has of one export. Each worker asks it before it begins a request.
#[derive(Debug)]
pub struct Flow {
    /// Tells it from others.
    pub id: u64,
    /// The client's rates on all exports.
    client: Option<Arc<ClientBucket>>,
    own: Mutex<Own>,
    export: Option<Arc<Mutex<Queue>>>,
}

/// What a flow has by itself.
#[derive(Debug)]
struct Own {
    bucket: Bucket,
    weight: u32,
    /// Where the next request begins at the earliest.
    finish: Tag,
    /// The start tag of its next request, if that waits for the export's rates.
    start: Option<Tag>,
}

/// The rates of a client on all exports.
#[derive(Debug)]
pub struct ClientBucket(Mutex<Bucket>);

impl Flow {
    /// Begins a request of this number of bytes, unless it must wait. Any thread may call it, and no thread
    /// waits: the locks are held for a few instructions.
    pub fn begin(&self, bytes: u64, now: Instant) -> Result<(), Wait> {
        // In this order everywhere.
        let mut client = self.client.as_ref().map(|client| lock(&client.0));
        let mut own = lock(&self.own);
        let mut export = self.export.as_ref().map(|export| lock(export));

        let of_client = client.as_ref().map_or(now, |bucket| bucket.opens_at());
        let opens_at = of_client.max(own.bucket.opens_at());
        if opens_at > now {
            // It does not wait for the export now. When it does, that counts from then on.
            if let (Some(queue), Some(start)) = (&mut export, own.start.take()) {
                queue.remove(start, self.id);
            }
            return Err(Wait { until: opens_at.max(now + RETRY_AFTER), whose: Whose::Client });
        }
        if let Some(queue) = &mut export {
            let start = own.start.unwrap_or_else(|| own.finish.max(queue.virtual_time));
            // What it has waited with is told anew, if it waits on.
            queue.remove(start, self.id);
            let lowest = queue.lowest(now);
            let opens_at = queue.bucket.opens_at();
            let weights = queue.weights + u64::from(own.weight);
            let is_ahead = lowest.is_some_and(|lowest| start > lowest + tag(LEAD, weights));
            if is_ahead || opens_at > now {
                let until = opens_at.max(now + RETRY_AFTER);
                own.start = Some(start);
                queue.insert(start, self.id, Waiter { until: until + FORGOTTEN_AFTER, weight: own.weight });
                return Err(Wait { until, whose: Whose::Export });
            }
            let cost = queue.bucket.rates.cost(bytes).into_iter().max().unwrap_or_default();
            own.start = None;
            own.finish = start + tag(cost, own.weight.into());
            queue.virtual_time = queue.virtual_time.max(lowest.map_or(start, |lowest| start.min(lowest)));
            queue.bucket.take(bytes, now);
        }
        own.bucket.take(bytes, now);
        if let Some(bucket) = &mut client {
            bucket.take(bytes, now);
        }
        Ok(())
    }

    /// Changes what the client may have.
    fn set(&self, share: &Share) {
        let mut own = lock(&self.own);
        own.bucket.rates = share.rates;
        own.weight = share.weight;
    }
}

/// Who has rates.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Holder {
    /// A client of `clients.toml`, by its name.
    Client(String),
    /// Where there are no keys: all who come from there.
    Address(Option<Origin>),
}

/// What `clients.toml` says of a client's rates.
#[derive(Clone, Copy, Debug)]
pub struct ClientRates {
    /// On all exports together.
    pub all: Rates,
    /// On the export in question.
    pub share: Share,
}

impl ClientRates {
    /// Nothing is said of them.
    pub const NONE: Self = Self { all: Rates::NONE, share: Share::DEFAULT };
}

/// Values by key, as long as they are used elsewhere.
#[derive(Debug)]
struct InUse<K, V> {
    all: HashMap<K, Weak<V>>,
    /// At this number those that are not used any more are removed.
    swept_at: usize,
}

impl<K, V> Default for InUse<K, V> {
    fn default() -> Self {
        Self { all: HashMap::new(), swept_at: 16 }
    }
}

impl<K: Eq + Hash, V> InUse<K, V> {
    fn get(&self, key: &K) -> Option<Arc<V>> {
        self.all.get(key).and_then(Weak::upgrade)
    }

    fn insert(&mut self, key: K, value: &Arc<V>) {
        if self.all.len() >= self.swept_at {
            self.all.retain(|_, value| value.strong_count() > 0);
            self.swept_at = 16.max(2 * self.all.len());
        }
        self.all.insert(key, Arc::downgrade(value));
    }
}

/// All rates of a server. Shared by its workers; locked when a file is opened, and by each operation on a
/// path whose client has a limit.
#[derive(Debug)]
pub struct Throttles {
    /// By the export's place; None: it has no rates.
    exports: RwLock<Vec<Option<Arc<Mutex<Queue>>>>>,
    clients: Mutex<InUse<String, ClientBucket>>,
    flows: Mutex<InUse<(Holder, usize), Flow>>,
    next_id: AtomicU64,
}

impl Throttles {
    /// Of exports that have these rates.
    pub fn new(exports: impl Iterator<Item = Rates>, now: Instant) -> Self {
        let queues = exports.map(|rates| rates.limit().then(|| Queue::new(rates, now)));
        Self {
            exports: RwLock::new(queues.collect()),
            clients: Mutex::default(),
            flows: Mutex::default(),
            next_id: AtomicU64::new(0),
        }
    }

    /// Whether there is a limit on what a client with these rates has of the export in this place.
    pub fn limits(&self, export: usize, rates: &ClientRates) -> bool {
        let is_limited =
            |queue: &Option<_>| queue.is_some() || rates.all.limit() || rates.share.rates.limit();
        self.queues().get(export).is_some_and(is_limited)
    }

    fn queues(&self) -> RwLockReadGuard<'_, Vec<Option<Arc<Mutex<Queue>>>>> {
        self.exports.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on all clients together have these rates of the export in this place. Files that are open
    /// have none if there were none when they were opened.
    pub fn set_export(&self, export: usize, rates: Rates, now: Instant) {
        let mut queues = self.exports.write().unwrap_or_else(PoisonError::into_inner);
        if queues.len() <= export {
            queues.resize(export + 1, None);
        }
        let queue = &mut queues[export];
        if let Some(queue) = queue {
            lock(queue).bucket.rates = rates;
        }
        if !rates.limit() {
            *queue = None;
        } else if queue.is_none() {
            *queue = Some(Queue::new(rates, now));
        }
    }

    /// What a client has of the export in this place, if there is a limit on it. What its rates are is taken
    /// over for all its flows.
    pub fn flow(
        &self,
        holder: Holder,
        export: usize,
        rates: &ClientRates,
        now: Instant,
    ) -> Option<Arc<Flow>> {
        if !self.limits(export, rates) {
            return None;
        }
        let queue = self.queues().get(export).cloned().flatten();
        let client = match &holder {
            Holder::Client(name) if rates.all.limit() => Some(self.client(name, rates.all, now)),
            _ => None,
        };
        let mut flows = lock(&self.flows);
        let key = (holder, export);
        let known = flows.get(&key);
        // A client that had no rates on all exports when it began has them now, or the other way round, or
        // the export has: its flow is replaced.
        let fits = |flow: &Arc<Flow>| {
            (flow.client.is_some(), flow.export.is_some()) == (client.is_some(), queue.is_some())
        };
        if let Some(flow) = known.filter(fits) {
            flow.set(&rates.share);
            return Some(flow);
        }
        let own = Own {
            bucket: Bucket::new(rates.share.rates, now),
            weight: rates.share.weight,
            finish: 0,
            start: None,
        };
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let flow = Arc::new(Flow { id, client, own: Mutex::new(own), export: queue });
        flows.insert(key, &flow);
        Some(flow)
    }

    fn client(&self, name: &str, rates: Rates, now: Instant) -> Arc<ClientBucket> {
        let mut clients = lock(&self.clients);
        let name = name.to_owned();
        if let Some(client) = clients.get(&name) {
            lock(&client.0).rates = rates;
            return client;
        }
        let client = Arc::new(ClientBucket(Mutex::new(Bucket::new(rates, now))));
        clients.insert(name, &client);
        client
    }

    /// Takes over what clients may have now. `rates` tells it by the name of a client and the place of an
    /// export; None: it is no client any more, or has no part of the export, and keeps what it had until its
    /// session ends.
    pub fn update(&self, rates: impl Fn(&str, usize) -> Option<ClientRates>) {
        let flows = lock(&self.flows);
        for ((holder, export), flow) in &flows.all {
            if let Holder::Client(name) = holder
                && let Some(flow) = flow.upgrade()
                && let Some(ClientRates { all, share }) = rates(name, *export)
            {
                flow.set(&share);
                if let Some(client) = &flow.client {
                    lock(&client.0).rates = all;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn rates(iops: Option<u64>, bandwidth: Option<u64>, burst: Option<f64>) -> Rates {
        Rates::new(iops, bandwidth.map(Size), burst).unwrap()
    }

    fn client(name: &str) -> Holder {
        Holder::Client(name.into())
    }

    /// A client that always has a request, or one at a time with a pause.
    struct Load {
        flow: Arc<Flow>,
        bytes: u64,
        /// It pauses.
        idle_until: Option<Instant>,
        every: Duration,
        asks_at: Instant,
        begun: u64,
    }

    impl Load {
        fn new(flow: Arc<Flow>, bytes: u64, now: Instant) -> Self {
            Self { flow, bytes, idle_until: None, every: Duration::ZERO, asks_at: now, begun: 0 }
        }

        /// One request at a time, and the next after this time.
        fn light(self, every: Duration) -> Self {
            Self { every, ..self }
        }

        fn run(&mut self, now: Instant) {
            while self.asks_at <= now && self.idle_until.is_none_or(|until| until <= now) {
                match self.flow.begin(self.bytes, now) {
                    Ok(()) => {
                        self.begun += 1;
                        self.idle_until = (!self.every.is_zero()).then(|| now + self.every);
                    }
                    Err(Wait { until, .. }) => self.asks_at = until,
                }
            }
        }
    }

    /// Runs loads for a time, in steps of 0.1 ms. Returns how many requests of each have begun.
    fn run(loads: &mut [Load], start: Instant, duration: Duration) -> Vec<u64> {
        let step = MS / 10;
        for n in 0..(duration.as_nanos() / step.as_nanos()) as u32 {
            // Not always in the same order: workers are not, either.
            let first = n as usize % loads.len();
            let (front, back) = loads.split_at_mut(first);
            back.iter_mut().chain(front).for_each(|load| load.run(start + step * n));
        }
        loads.iter().map(|load| load.begun).collect()
    }

    fn within(value: u64, expected: u64, percent: u64) -> bool {
        value.abs_diff(expected) * 100 <= expected * percent
    }

    #[test]
    fn a_client_has_its_rate_within_a_tenth_in_the_first_second_and_in_each_other() {
        let now = Instant::now();
        for (limit, bytes, expected) in [
            (rates(Some(100), None, None), 4096, 100),
            (rates(Some(1000), None, None), 4096, 1000),
            (rates(Some(50_000), None, None), 4096, 50_000),
            (rates(None, Some(100 << 20), None), 1 << 20, 100),
            (rates(None, Some(100 << 20), None), 4096, 25_600),
            (rates(Some(1000), Some(100 << 20), None), 1 << 20, 100),
            (rates(Some(1000), Some(100 << 20), None), 4096, 1000),
        ] {
            for client_wide in [false, true] {
                let throttles = Throttles::new([Rates::NONE].into_iter(), now);
                let share = Share { rates: if client_wide { Rates::NONE } else { limit }, weight: 1 };
                let all = if client_wide { limit } else { Rates::NONE };
                let flow = throttles.flow(client("a"), 0, &ClientRates { all, share }, now).unwrap();
                let mut loads = [Load::new(flow, bytes, now)];
                let mut before = 0;
                for second in 0..3 {
                    let start = now + Duration::from_secs(second);
                    let begun = run(&mut loads, start, Duration::from_secs(1))[0];
                    assert!(
                        within(begun - before, expected, 10),
                        "{limit:?} {bytes} second {second}: {}",
                        begun - before
                    );
                    before = begun;
                }
            }
        }
    }

    #[test]
    fn what_was_not_used_is_caught_up_with_as_far_as_the_burst_goes() {
        let now = Instant::now();
        let throttles = Throttles::new([rates(Some(1000), None, Some(0.5))].into_iter(), now);
        let flow = throttles.flow(client("a"), 0, &ClientRates::NONE, now).unwrap();
        let begun_at = |now| (0..).take_while(|_| flow.begin(4096, now).is_ok()).count();
        assert_eq!(begun_at(now), 501);
        assert_eq!(begun_at(now + 100 * MS), 100);
        assert_eq!(begun_at(now + Duration::from_secs(60)), 501);
    }

    #[test]
    fn a_request_of_any_size_begins_at_once_and_the_next_waits_for_it() {
        let now = Instant::now();
        let throttles = Throttles::new([rates(None, Some(1 << 20), None)].into_iter(), now);
        let flow = throttles.flow(client("a"), 0, &ClientRates::NONE, now).unwrap();
        assert_eq!(flow.begin(16 << 20, now), Ok(()));
        let Wait { until, whose } = flow.begin(1, now).unwrap_err();
        assert_eq!((until, whose), (now + Duration::from_secs(16) - BURST_DEFAULT, Whose::Export));
        assert_eq!(flow.begin(1, until), Ok(()));
    }

    #[test]
    fn clients_that_always_have_requests_share_an_export_by_their_weights_with_requests_of_any_size() {
        let now = Instant::now();
        let limits = [rates(Some(4000), None, None), rates(None, Some(64 << 20), None)];
        for (limit, scale) in limits.into_iter().flat_map(|limit| [(limit, 1), (limit, 1000)]) {
            let throttles = Throttles::new([limit].into_iter(), now);
            let clients = [("a", 1, 4096), ("b", 2, 64 << 10), ("c", 5, 16 << 10)];
            let mut loads: Vec<_> = clients
                .into_iter()
                .map(|(name, weight, bytes)| {
                    // Only the ratios matter.
                    let weight = weight * scale;
                    let rates =
                        ClientRates { share: Share { weight, ..Share::DEFAULT }, ..ClientRates::NONE };
                    Load::new(throttles.flow(client(name), 0, &rates, now).unwrap(), bytes, now)
                })
                .collect();
            // Who comes first has what was not used before.
            let first = run(&mut loads, now, Duration::from_secs(1));
            let all = run(&mut loads, now + Duration::from_secs(1), Duration::from_secs(1));
            let expected: Vec<_> = if limit.iops.is_some() {
                vec![500, 1000, 2500]
            } else {
                vec![(8 << 20) / 4096, (16 << 20) >> 16, (40 << 20) >> 14]
            };
            for ((first, all), expected) in first.iter().zip(&all).zip(&expected) {
                assert!(first * 10 >= expected * 9, "{limit:?}: {first} of {expected} at first");
                let begun = all - first;
                assert!(within(begun, *expected, 10), "{limit:?}: {begun} of {expected}");
            }
        }
    }

    #[test]
    fn what_one_client_does_not_use_the_others_have_and_it_does_not_wait() {
        let now = Instant::now();
        let throttles = Throttles::new([rates(Some(1000), None, None)].into_iter(), now);
        let flow = |name: &str| throttles.flow(client(name), 0, &ClientRates::NONE, now).unwrap();
        // One in 20 ms is a tenth of what it might have.
        let mut loads = [
            Load::new(flow("busy"), 4096, now),
            Load::new(flow("other"), 4096, now),
            Load::new(flow("light"), 4096, now).light(20 * MS),
        ];
        let begun = run(&mut loads, now, Duration::from_secs(2));
        assert!(within(begun[0], 950, 10) && within(begun[1], 950, 10), "{begun:?}");
        assert!(begun[2] >= 90, "{begun:?}");
    }

    #[test]
    fn a_client_that_is_at_its_own_limit_leaves_the_rest_of_the_export_to_others() {
        let now = Instant::now();
        let throttles = Throttles::new([rates(Some(1000), None, None)].into_iter(), now);
        let share = Share { rates: rates(Some(100), None, None), weight: 9 };
        let limited = throttles.flow(client("a"), 0, &ClientRates { all: Rates::NONE, share }, now).unwrap();
        let other = throttles.flow(client("b"), 0, &ClientRates::NONE, now).unwrap();
        let begun = run(
            &mut [Load::new(limited, 4096, now), Load::new(other, 4096, now)],
            now,
            Duration::from_secs(2),
        );
        assert!(within(begun[0], 200, 10) && within(begun[1], 1800, 10), "{begun:?}");
    }

    #[test]
    fn a_client_that_has_gone_while_it_waited_does_not_delay_others() {
        let now = Instant::now();
        let throttles = Throttles::new([rates(Some(1000), None, None)].into_iter(), now);
        let [gone, other] =
            ["gone", "other"].map(|name| throttles.flow(client(name), 0, &ClientRates::NONE, now).unwrap());
        while gone.begin(4096, now).is_ok() {}
        drop(gone);
        let begun = run(&mut [Load::new(other, 4096, now)], now, Duration::from_secs(1));
        assert!(within(begun[0], 1000, 10), "{begun:?}");
    }

    #[test]
    fn a_client_has_its_rate_on_all_exports_together_and_one_flow_on_each() {
        let now = Instant::now();
        let throttles = Throttles::new([Rates::NONE; 2].into_iter(), now);
        let limits = ClientRates { all: rates(Some(1000), None, None), ..ClientRates::NONE };
        let flow = |export| throttles.flow(client("a"), export, &limits, now).unwrap();
        assert!(Arc::ptr_eq(&flow(0), &flow(0)) || Arc::strong_count(&flow(0)) == 1);
        let kept = flow(0);
        assert!(Arc::ptr_eq(&kept, &flow(0)));
        let mut loads = [Load::new(kept, 4096, now), Load::new(flow(1), 4096, now)];
        let begun: u64 = run(&mut loads, now, Duration::from_secs(1)).iter().sum();
        assert!(within(begun, 1000, 10), "{begun}");
        assert!(throttles.flow(client("b"), 0, &ClientRates::NONE, now).is_none());
        assert!(throttles.flow(client("b"), 2, &limits, now).is_none());
    }

    #[test]
    fn changed_rates_count_from_then_on() {
        let now = Instant::now();
        let throttles = Throttles::new([Rates::NONE].into_iter(), now);
        let limits = |iops| ClientRates { all: rates(Some(iops), None, None), ..ClientRates::NONE };
        let flow = throttles.flow(client("a"), 0, &limits(100), now).unwrap();
        let mut loads = [Load::new(flow, 4096, now)];
        let before = run(&mut loads, now, Duration::from_secs(1))[0];
        throttles.update(|name, export| (name == "a" && export == 0).then(|| limits(2000)));
        let after = run(&mut loads, now + Duration::from_secs(1), Duration::from_secs(1))[0] - before;
        assert!(within(before, 100, 10) && within(after, 2000, 10), "{before} {after}");
    }

    #[test]
    fn clients_that_have_gone_leave_nothing() {
        let now = Instant::now();
        let throttles = Throttles::new([rates(Some(1000), None, None)].into_iter(), now);
        let limits = ClientRates { all: rates(Some(10), None, None), ..ClientRates::NONE };
        let kept: Vec<_> =
            (0..20).map(|n| throttles.flow(client(&format!("kept {n}")), 0, &limits, now)).collect();
        for n in 0..1000 {
            throttles.flow(client(&format!("{n}")), 0, &limits, now).unwrap();
        }
        let (flows, clients) = (lock(&throttles.flows).all.len(), lock(&throttles.clients).all.len());
        assert!((20..=41).contains(&flows) && (20..=41).contains(&clients), "{flows} {clients}");
        drop(kept);
    }

    #[test]
    fn each_mistake_is_told_with_what_is_right() {
        for (iops, bandwidth, burst, needle) in [
            (Some(0), None, None, "iops is 0"),
            (Some(IOPS_MAX + 1), None, None, "from 1 to"),
            (None, Some(1), None, "bandwidth is 1 bytes"),
            (None, None, Some(1.0), "without iops or bandwidth"),
            (Some(1), None, Some(0.0), "burst is 0 seconds"),
            (Some(1), None, Some(-1.0), "burst is -1"),
            (Some(1), None, Some(f64::NAN), "burst is NaN"),
            (Some(1), None, Some(1e300), "from 0.01 to 3600"),
        ] {
            let error = Rates::new(iops, bandwidth.map(Size), burst).unwrap_err();
            assert!(error.contains(needle) && error.ends_with('.'), "{error}");
        }
        assert!(Share::new(Rates::NONE, Some(0)).is_err());
        assert!(Share::new(Rates::NONE, Some(WEIGHT_MAX + 1)).is_err());
    }
}
