//! Channels: which connection of a channel may act, and what became of the requests of those before it.
//!
//! ```text
//!   Live(epoch) --connection ends--> Parked --nothing executes, time is over--> gone
//!   Live | Parked --higher epoch joins--> Fencing --nothing of older ones is left--> Live(epoch)
//! ```
//!
//! A connection that has broken may have left behind requests that execute: *orphans*. Nothing of the channel
//! may happen after the connection that takes its place was told that nothing will. So that one is settled
//! only when the connections before it have ended, and their orphans, too.
//!
//! Nothing here does I/O, waits, or reads a clock. A `Channel` does not know what names a connection.

use std::time::Instant;

use raio_transport::error::Status;
use raio_transport::protocol::RequestOutcome;

/// The lower bits of a recorded request's id: its slot. The upper ones are the slot's generation.
const SLOT_BITS: u32 = 16;

/// The slot in the id of a recorded request. None if it cannot be one: more than 32 bits, or a slot beyond
/// `queue_depth`.
pub fn slot_of(id: u64, queue_depth: u32) -> Option<u32> {
    let slot = u32::try_from(id).ok()? & ((1 << SLOT_BITS) - 1);
    (slot <= queue_depth).then_some(slot)
}

/// How recorded requests have ended: the last of each slot. It takes 16 bytes for each slot up to the highest
/// that was used.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
pub struct Outcomes(Vec<RequestOutcome>);

impl Outcomes {
    /// A request has ended like this.
    pub fn record(&mut self, id: u32, status: Status, result: u64) {
        let slot = (id & ((1 << SLOT_BITS) - 1)) as usize;
        if self.0.len() <= slot {
            self.grow(slot);
        }
        self.0[slot] = RequestOutcome::done(id, status, result);
    }

    #[cold]
    fn grow(&mut self, slot: usize) {
        // No slot but the first has a request with this id.
        self.0.resize(slot + 1, RequestOutcome::never(0));
    }

    /// What became of a request that came by a connection which has ended, and that executes no more.
    pub fn of(&self, id: u32) -> RequestOutcome {
        let slot = (id & ((1 << SLOT_BITS) - 1)) as usize;
        let last = self.0.get(slot).filter(|last| last.id() == id);
        last.copied().unwrap_or_else(|| RequestOutcome::never(id))
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<RequestOutcome>()
    }
}

/// A connection that is not newer than one that the channel has had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stale {
    /// The highest epoch so far.
    pub known: u64,
}

/// What keeps a connection from running its requests too early, or the next one from waiting for ever. The
/// model in `sessions/model.rs` switches them off, one at a time, to show that each is needed. In programs
/// all of them are always on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// A connection joins only with a higher epoch than all before it.
    Epoch,
    /// A connection whose place another one has taken is closed.
    Fence,
    /// A connection is not settled before those of older epochs have ended ...
    Connections,
    /// ... nor before the requests have that those have left behind.
    Orphans,
    /// What was recorded is handed over to the next connection.
    Outcomes,
    /// A channel is not forgotten as long as something of it may happen.
    Keep,
    /// Nobody is told that a request was never executed by a channel that may have been forgotten since.
    Known,
    /// The same, until its client has heard of that.
    Heard,
    /// A connection is not settled before the sessions are over that it has superseded.
    Supersede,
    /// Nobody joins a session that was superseded.
    GivenUp,
    /// Who waits for a session is told of its end.
    Wake,
}

/// Which guards are on: in programs, all of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Guards {
    /// One that is off.
    #[cfg(test)]
    pub off: Option<Guard>,
}

impl Guards {
    /// Whether this one is.
    #[cfg(not(test))]
    #[inline(always)]
    pub const fn have(self, _: Guard) -> bool {
        true
    }

    /// Whether this one is.
    #[cfg(test)]
    pub fn have(self, guard: Guard) -> bool {
        self.off != Some(guard)
    }
}

/// A channel of a session. `C` names a connection.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub struct Channel<C> {
    /// The highest that has joined.
    epoch: u64,
    /// It is that of all requests which its client may ask about. Not if it was begun by a client that had a
    /// channel before, and that may not have heard yet that nothing is known of it.
    is_known: bool,
    /// The connection with that epoch, until it ends.
    live: Option<C>,
    /// When the channel may be forgotten, since the connection with that epoch has ended.
    parked_until: Option<Instant>,
    /// Connections of older epochs that have not ended.
    older: Vec<C>,
    /// Requests of connections that have ended which execute.
    orphans: usize,
    /// What has been recorded, unless a connection that has not ended has it.
    outcomes: Outcomes,
    /// Those that it has.
    pub guards: Guards,
}

/// See [`Channel::key`].
#[cfg(test)]
pub type ChannelState<N> = (u64, bool, Option<N>, Vec<N>, Option<Instant>, usize, bool);

impl<C> Default for Channel<C> {
    fn default() -> Self {
        Self {
            epoch: 0,
            is_known: false,
            live: None,
            parked_until: None,
            older: Vec::new(),
            orphans: 0,
            outcomes: Outcomes::default(),
            guards: Guards::default(),
        }
    }
}

impl<C: Copy + PartialEq> Channel<C> {
    /// A connection takes the place of the one before it, which is returned if it has not ended: it is to be
    /// closed. Of several that race the one with the highest epoch stays.
    pub fn join(&mut self, epoch: u64, connection: C) -> Result<Option<C>, Stale> {
        if epoch <= self.epoch && self.guards.have(Guard::Epoch) {
            return Err(Stale { known: self.epoch });
        }
        // A client's first connection has nothing to ask about.
        self.is_known |= epoch == 1 || (self.epoch > 0 && !self.guards.have(Guard::Heard));
        self.epoch = epoch;
        self.parked_until = None;
        let before = self.live.replace(connection);
        self.older.extend(before);
        Ok(before)
    }

    /// A connection has ended. It hands over what it has recorded, if it was settled, and leaves `executing`
    /// recorded requests that execute. If it was the last the channel may be forgotten from `until` on.
    pub fn ended(&mut self, connection: C, outcomes: Option<Outcomes>, executing: usize, until: Instant) {
        if self.live == Some(connection) {
            self.live = None;
            self.parked_until = Some(until);
        } else {
            self.older.retain(|&other| other != connection);
        }
        self.orphans += executing;
        // Only one at a time is settled, so nothing is lost.
        if let Some(outcomes) = outcomes.filter(|_| self.guards.have(Guard::Outcomes)) {
            self.outcomes = outcomes;
        }
    }

    /// The client has heard that nothing is known of its earlier requests, and does not ask about them again.
    pub fn heard(&mut self) {
        self.is_known = true;
    }

    /// Whether nobody is to be told that nothing is known of earlier requests.
    pub fn is_known(&self) -> bool {
        self.is_known || !self.guards.have(Guard::Known)
    }

    /// An orphan has ended, like this if it has done something.
    pub fn orphan_ended(&mut self, ended: Option<(u32, Status, u64)>) {
        self.orphans -= 1;
        if let Some((id, status, result)) = ended {
            self.outcomes.record(id, status, result);
        }
    }

    /// Nobody may join any more. Returns the connection that is to be closed.
    pub fn give_up(&mut self, now: Instant) -> Option<C> {
        let live = self.live.take();
        self.older.extend(live);
        self.parked_until = Some(now);
        live
    }

    /// Whether nothing of a connection but the live one can happen any more.
    pub fn is_settled(&self) -> bool {
        (self.older.is_empty() || !self.guards.have(Guard::Connections))
            && (self.orphans == 0 || !self.guards.have(Guard::Orphans))
    }

    /// Has a connection take what was recorded. None if it is not settled, or not the live one.
    pub fn settle(&mut self, connection: C) -> Option<Outcomes> {
        (self.is_settled() && self.live == Some(connection)).then(|| std::mem::take(&mut self.outcomes))
    }

    /// The connection whose requests may run, or will once the channel is settled.
    pub fn live(&self) -> Option<C> {
        self.live
    }

    /// Connections of older epochs that have not ended, and orphans.
    pub fn waits_for(&self) -> (usize, usize) {
        (self.older.len(), self.orphans)
    }

    /// When it may be forgotten. None if it has a connection.
    pub fn parked_until(&self) -> Option<Instant> {
        self.parked_until
    }

    /// Whether it is to be forgotten. Not as long as something of it may happen, for who asks must wait.
    pub fn is_over(&self, now: Instant) -> bool {
        (self.is_settled() || !self.guards.have(Guard::Keep))
            && self.parked_until.is_some_and(|until| until <= now)
    }

    /// What tells it from others, for the model: its epoch, whether it is known, its connections as `name`
    /// has them, when it may be forgotten, how many orphans it has, and whether it knows that a request was
    /// executed.
    #[cfg(test)]
    pub fn key<N: Ord>(&self, id: u32, name: impl Fn(C) -> N) -> ChannelState<N> {
        let mut older: Vec<_> = self.older.iter().map(|&connection| name(connection)).collect();
        older.sort_unstable();
        let is_recorded = self.outcomes.of(id) != RequestOutcome::never(id);
        (self.epoch, self.is_known, self.live.map(name), older, self.parked_until, self.orphans, is_recorded)
    }

    /// Bytes of memory that what was recorded takes.
    pub fn bytes(&self) -> usize {
        self.outcomes.bytes()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn id(generation: u32, slot: u32) -> u32 {
        generation << SLOT_BITS | slot
    }

    #[test]
    fn only_the_last_recorded_request_of_a_slot_was_executed() {
        let mut outcomes = Outcomes::default();
        assert_eq!(outcomes.of(0), RequestOutcome::never(0));
        outcomes.record(id(1, 3), Status::OK, 4096);
        assert_eq!(outcomes.of(id(1, 3)), RequestOutcome::done(id(1, 3), Status::OK, 4096));
        for other in [id(0, 3), id(2, 3), id(1, 2), id(1, 4), id(0, 0), id(0, 2), 0] {
            assert_eq!(outcomes.of(other), RequestOutcome::never(other));
        }
        let full = Status::storage(libc::ENOSPC);
        outcomes.record(id(2, 3), full, 0);
        assert_eq!(outcomes.of(id(1, 3)), RequestOutcome::never(id(1, 3)));
        assert_eq!(outcomes.of(id(2, 3)), RequestOutcome::done(id(2, 3), full, 0));
    }

    #[test]
    fn outcomes_take_16_bytes_for_each_slot_up_to_the_highest() {
        let mut outcomes = Outcomes::default();
        assert_eq!(outcomes.bytes(), 0);
        outcomes.record(id(7, 127), Status::OK, 1);
        assert_eq!(outcomes.bytes(), 2048);
    }

    #[test]
    fn an_id_has_a_slot_up_to_the_queue_depth() {
        assert_eq!(slot_of(id(9, 128).into(), 128), Some(128));
        assert_eq!(slot_of(id(9, 129).into(), 128), None);
        assert_eq!(slot_of(1 << 32, 128), None);
    }

    fn now() -> Instant {
        Instant::now()
    }

    #[test]
    fn only_a_higher_epoch_takes_the_place_of_a_connection() {
        let mut channel = Channel::default();
        assert_eq!(channel.join(1, 'a'), Ok(None));
        assert_eq!(channel.join(1, 'b'), Err(Stale { known: 1 }));
        assert_eq!(channel.join(5, 'c'), Ok(Some('a')));
        assert_eq!(channel.join(4, 'd'), Err(Stale { known: 5 }), "the higher of two that race stays");
        assert_eq!(channel.live(), Some('c'));
        channel.ended('c', None, 0, now());
        assert_eq!(channel.join(5, 'e'), Err(Stale { known: 5 }), "nor when it has ended");
    }

    #[test]
    fn a_connection_is_settled_when_all_before_it_have_ended_and_their_orphans() {
        let mut channel = Channel::default();
        channel.join(1, 'a').unwrap();
        let mut outcomes = channel.settle('a').expect("it is the first");
        outcomes.record(7, Status::OK, 1);
        channel.join(2, 'b').unwrap();
        channel.join(3, 'c').unwrap();
        assert!(channel.settle('c').is_none() && channel.settle('b').is_none());
        channel.ended('b', None, 0, now());
        assert!(channel.settle('c').is_none());
        channel.ended('a', Some(outcomes), 2, now());
        assert_eq!(channel.waits_for(), (0, 2));
        channel.orphan_ended(Some((8, Status::OK, 512)));
        assert!(channel.settle('c').is_none());
        channel.orphan_ended(None);
        assert!(channel.settle('a').is_none(), "it has ended");
        let outcomes = channel.settle('c').unwrap();
        assert_eq!(outcomes.of(7), RequestOutcome::done(7, Status::OK, 1));
        assert_eq!(outcomes.of(8), RequestOutcome::done(8, Status::OK, 512));
        assert_eq!(outcomes.of(9), RequestOutcome::never(9));
    }

    #[test]
    fn a_channel_is_kept_for_its_time_and_as_long_as_something_executes() {
        let now = now();
        let [soon, later] = [1, 2].map(|seconds| now + Duration::from_secs(seconds));
        let mut channel = Channel::default();
        channel.join(1, 'a').unwrap();
        assert!(!channel.is_over(later));
        channel.ended('a', None, 1, soon);
        assert!(!channel.is_over(later), "it has an orphan");
        channel.orphan_ended(None);
        assert!(!channel.is_over(now) && channel.is_over(soon));
        channel.join(2, 'b').unwrap();
        assert!(!channel.is_over(later));
    }

    #[test]
    fn one_that_was_given_up_is_over_when_its_connection_has_ended() {
        let now = now();
        let mut channel = Channel::default();
        channel.join(1, 'a').unwrap();
        assert_eq!(channel.give_up(now), Some('a'));
        assert!(!channel.is_over(now));
        channel.ended('a', None, 1, now + Duration::from_secs(90));
        assert!(!channel.is_over(now));
        channel.orphan_ended(Some((1, Status::OK, 1)));
        assert!(channel.is_over(now), "nobody comes back for the linger time");
    }

    /// What happens to a channel.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Join { epoch: u64 },
        Begin { connection: usize, slot: u32 },
        End { request: usize },
        Close { connection: usize },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (1..12u64).prop_map(|epoch| Step::Join { epoch }),
            (0..6usize, 0..3u32).prop_map(|(connection, slot)| Step::Begin { connection, slot }),
            (0..6usize).prop_map(|request| Step::End { request }),
            (0..6usize).prop_map(|connection| Step::Close { connection }),
        ]
    }

    /// A request that executes.
    #[derive(Clone, Copy, Debug)]
    struct Executing {
        id: u32,
        connection: u64,
        is_orphan: bool,
    }

    /// Everything that ever happened, without forgetting: what a channel and its connections keep in less.
    #[derive(Default)]
    struct Run {
        channel: Channel<u64>,
        epoch: u64,
        /// Those that have not ended, and what each keeps while it is settled. A name is an epoch.
        open: Vec<(u64, Option<Outcomes>)>,
        executing: Vec<Executing>,
        /// How many bytes each request has written, of all that ever ended.
        done: HashMap<u32, u64>,
        last_ids: HashMap<u32, u32>,
        generation: u32,
    }

    impl Run {
        fn step(&mut self, step: Step) {
            match step {
                Step::Join { epoch } => {
                    let joined = self.channel.join(epoch, epoch);
                    assert_eq!(joined.is_ok(), epoch > self.epoch);
                    if joined.is_ok() {
                        self.epoch = epoch;
                        self.open.push((epoch, None));
                    }
                }
                Step::Begin { connection, slot } => {
                    let Some((name, Some(_))) = self.open.get(connection) else { return };
                    if self.executing.iter().any(|request| !request.is_orphan && request.id & 0xffff == slot)
                    {
                        return;
                    }
                    self.generation += 1;
                    let id = id(self.generation, slot);
                    self.last_ids.insert(slot, id);
                    self.executing.push(Executing { id, connection: *name, is_orphan: false });
                }
                Step::End { request } => {
                    if request >= self.executing.len() {
                        return;
                    }
                    let Executing { id, connection, is_orphan } = self.executing.remove(request);
                    self.done.insert(id, id.into());
                    if is_orphan {
                        self.channel.orphan_ended(Some((id, Status::OK, id.into())));
                    } else {
                        let keeper = self.open.iter_mut().find(|(name, _)| *name == connection);
                        let (_, Some(outcomes)) = keeper.expect("it has not ended") else { panic!() };
                        outcomes.record(id, Status::OK, id.into());
                    }
                }
                Step::Close { connection } => {
                    if connection >= self.open.len() {
                        return;
                    }
                    let (name, outcomes) = self.open.remove(connection);
                    let own = self.executing.iter_mut().filter(|request| request.connection == name);
                    let orphans = own.map(|request| request.is_orphan = true).count();
                    self.channel.ended(name, outcomes, orphans, Instant::now());
                }
            }
            self.settle();
        }

        /// The newest connection asks.
        fn settle(&mut self) {
            let others_live = self.open.iter().any(|(name, _)| *name != self.epoch)
                || self.executing.iter().any(|request| request.connection != self.epoch);
            let Some((name, keeps @ None)) = self.open.last_mut() else { return };
            let settled = self.channel.settle(*name);
            assert_eq!(settled.is_some(), *name == self.epoch && !others_live);
            let Some(outcomes) = settled else { return };
            for &id in self.last_ids.values() {
                let answer = outcomes.of(id).answer().unwrap();
                assert_eq!(answer.map(|(_, result)| result), self.done.get(&id).copied(), "of {id:#x}");
            }
            *keeps = Some(outcomes);
        }
    }

    proptest! {
        #[test]
        fn who_is_settled_knows_all_that_was_executed(steps in prop::collection::vec(step(), 1..60)) {
            let mut run = Run::default();
            steps.into_iter().for_each(|step| run.step(step));
        }
    }
}
