//! All sessions: clients by their uuid, and the channels of each.
//!
//! A session lives as long as it has channels. A connection without one counts as a channel that nobody comes
//! back to. What happens to a channel is decided in [`crate::channel`]; here is who is told of it. All of it
//! is under one lock, which is taken when a connection says hello, when it ends, and when a request ends that
//! it has left behind.

mod by_address;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use raio_transport::error::Status;
use raio_transport::handshake::{Identity, Peer};
use raio_transport::message::SessionId;
use raio_transport::sync::lock;
use slab::Slab;

use self::by_address::{ByAddress, Key};
use crate::channel::{Channel, Guard, Guards, Outcomes};
use crate::handles::generation_of_next_session;
use crate::limits::{AddressAccount, Excess, Limits, QueuePairPermit};
use crate::peer::Origin;
use crate::session::{ClosedFile, EndReason, OpenFile, Session};
use crate::stats::ChannelCounts;
use crate::tuning::channels::{KILLED_MAX, PARKED_BYTES};

/// A connection of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnectionName {
    /// Its worker.
    pub worker: usize,
    /// Its key there ...
    pub key: usize,
    /// ... and a number that no other connection of the worker has had.
    pub serial: u64,
}

/// Which channel of its session it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChannelKey {
    /// By its number.
    Numbered(u32),
    /// That of a connection which has none.
    Unnumbered(ConnectionName),
}

/// What is to be done because of what has happened to a channel.
#[derive(Debug, Default)]
#[must_use]
pub struct Effects {
    /// Connections that are to be closed: another one has taken their place.
    pub close: Vec<ConnectionName>,
    /// Connections that may be settled now: [`Sessions::settle`].
    pub wake: Vec<ConnectionName>,
    /// Files that are to be closed: their session has ended.
    pub files: Vec<ClosedFile>,
    /// Sessions that have ended.
    pub ended: Vec<Arc<Session>>,
    /// The connection that has ended has left a channel that is kept.
    pub is_kept: bool,
    /// Channels that were forgotten because their clients did not reconnect in time.
    pub expired: usize,
    /// Channels that were forgotten because others needed the room.
    pub evicted: usize,
    /// Sessions that the client which has joined has given up.
    pub superseded: usize,
    /// When [`Sessions::expire`] is due, if a channel was parked.
    pub expires: Option<Instant>,
}

/// Why a connection may not join.
#[derive(Debug)]
pub enum NotJoined {
    /// There are as many sessions as there may be.
    Excess(Excess),
    /// A connection that is newer, or its client, has made it obsolete: for the client.
    Stale(String),
    /// An administrator has ended the session.
    Killed,
}

/// A connection as its session knows it.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its session.
    pub session: Arc<Session>,
    /// Its channel.
    pub channel: ChannelKey,
    /// Its name.
    pub name: ConnectionName,
}

/// What a connection that has ended leaves behind.
#[derive(Debug)]
pub struct Remains {
    /// What it has recorded, if it was settled.
    pub outcomes: Option<Outcomes>,
    /// What it waited for, if it was not.
    pub fence: Option<Fence>,
    /// Recorded requests that execute.
    pub executing: usize,
    /// How long its channel is kept; zero if nobody will come back.
    pub linger: Duration,
}

/// What a connection must wait for before its requests may run.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub struct Fence {
    /// The channel is that of the connections before it. If not, nothing is known of their requests. It may
    /// become known until the connection is settled.
    pub is_known: bool,
    /// How it follows on the connections before it.
    pub succeeds: Succession,
    /// Sessions of its client that had been given up, and were not over.
    superseded: Vec<Arc<Session>>,
}

/// How a connection follows on the one of its channel before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Succession {
    /// There was none here.
    None,
    /// That one had ended, this long before.
    After(Duration),
    /// The server had not seen the end of that one.
    AtOnce,
}

/// What a connection still waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsettled {
    /// Connections of its channel that have not ended.
    pub connections: usize,
    /// Requests of those that have, which execute.
    pub orphans: usize,
    /// Sessions that it has superseded.
    pub sessions: usize,
}

/// A connection that has joined.
#[derive(Debug)]
pub struct Joined {
    /// Who it is.
    pub member: Member,
    /// It is the session's first connection.
    pub is_new: bool,
    /// Where its requests are recorded, if it has a numbered channel and need not wait.
    pub outcomes: Option<Outcomes>,
    /// What it waits for, if it must.
    pub fence: Option<Fence>,
}

/// All sessions of the server.
#[derive(Debug)]
pub struct Sessions {
    table: Mutex<Table>,
    /// How many there are, for those who ask often.
    count: AtomicUsize,
    sessions_max: AtomicUsize,
    limits: Arc<Limits>,
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
struct Table {
    by_id: HashMap<SessionId, Of>,
    /// All of them, in an order that allows to list them in parts.
    listed: Slab<Arc<Session>>,
    /// Sessions that an administrator has ended, the latest last: their clients do not begin them anew by
    /// connecting again.
    killed: VecDeque<SessionId>,
    /// Sessions without a connection, and since when.
    idle: ByAddress<SessionId>,
    /// When parked channels expire.
    deadlines: BTreeMap<Key, (SessionId, ChannelKey)>,
    /// Parked channels, with the bytes that they take.
    parked: ByAddress<(SessionId, ChannelKey)>,
    /// How many bytes parked channels may take.
    parked_bytes_max: usize,
    /// Tells keys of the same time apart.
    serial: u64,
    /// With which the handles of the next session begin: see [`crate::handles::Handles::new`].
    first_generation: u32,
    counts: ChannelCounts,
    guards: Guards,
}

/// What there is of a session.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
struct Of {
    session: Arc<Session>,
    /// Its place in [`Table::listed`].
    listed: usize,
    channels: HashMap<ChannelKey, Place>,
    connections: usize,
    /// Its client has given it up: nobody joins it.
    is_superseded: bool,
    /// Who waits for its end.
    waiters: Vec<ConnectionName>,
    /// Its key in [`Table::idle`].
    idle: Option<Key>,
}

#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
struct Place {
    channel: Channel<ConnectionName>,
    /// Its key in [`Table::parked`], and until it expires in [`Table::deadlines`].
    parked: Option<Key>,
    /// When its latest connection ended, if that has ended.
    lost_at: Option<Instant>,
}

impl Sessions {
    /// None yet. There may be `sessions_max` at a time, and a few for addresses that have few, with what
    /// `limits` allows them.
    pub fn new(sessions_max: usize, limits: Arc<Limits>) -> Self {
        let table = Table {
            by_id: HashMap::new(),
            listed: Slab::new(),
            killed: VecDeque::new(),
            idle: ByAddress::default(),
            deadlines: BTreeMap::new(),
            parked: ByAddress::default(),
            parked_bytes_max: limits.parked_bytes_max(),
            serial: 0,
            first_generation: 1,
            counts: ChannelCounts::default(),
            guards: Guards::default(),
        };
        let (count, sessions_max) = (AtomicUsize::new(0), AtomicUsize::new(sessions_max));
        Self { table: Mutex::new(table), count, sessions_max, limits }
    }

    /// The table, to begin or end sessions.
    fn locked(&self) -> Locked<'_> {
        Locked { table: lock(&self.table), count: &self.count }
    }

    /// The same, whose first one has handles that begin with this generation.
    pub fn with_first_generation(self, first_generation: u32) -> Self {
        lock(&self.table).first_generation = first_generation;
        self
    }

    /// A connection of a client says hello. What is returned besides is to be done even if it may not join.
    pub fn join(
        &self,
        peer: &Peer,
        address: &AddressAccount,
        connection: ConnectionName,
        now: Instant,
    ) -> (Result<Joined, NotJoined>, Effects) {
        let mut effects = Effects::default();
        let mut table = self.locked();
        let joined = table.join(peer, connection, now, &mut effects, |table, effects| {
            // Sessions without a connection are evicted for it.
            let sessions_max = self.sessions_max.load(Ordering::Relaxed);
            while let Err(excess) = self.limits.begin_session(table.by_id.len(), sessions_max, address) {
                if !table.evict_session(effects) {
                    return Err(excess);
                }
            }
            let (identity, limits) = (peer.identity.clone(), Arc::clone(&self.limits));
            let session = Session::new(peer.session, identity, address.clone(), limits);
            let next = generation_of_next_session(table.first_generation);
            let first_generation = std::mem::replace(&mut table.first_generation, next);
            Ok(Arc::new(session.with_first_generation(first_generation)))
        });
        let joined = joined.map(|mut joined| {
            table.supersede(peer, &mut joined, now, &mut effects);
            joined
        });
        (joined, effects)
    }

    /// Ends the sessions of these clients, as far as they can be ended now.
    pub fn revoke(&self, of: impl Fn(&Identity) -> bool, now: Instant) -> Effects {
        let mut effects = Effects::default();
        let mut table = self.locked();
        let theirs = table.by_id.iter_mut().filter(|(_, place)| of(&place.session.identity));
        let revoked = theirs.map(|(&id, place)| {
            place.session.end_because(EndReason::Revoked);
            place.is_superseded = true;
            id
        });
        for id in revoked.collect::<Vec<_>>() {
            table.give_up(id, now, &mut effects);
        }
        effects
    }

    /// Ends a session because an administrator wants it, as far as it can be ended now. None: it has ended.
    pub fn kill(&self, session: &Arc<Session>, now: Instant) -> Option<Effects> {
        let mut effects = Effects::default();
        let mut table = self.locked();
        let of = table.by_id.get_mut(&session.id).filter(|of| Arc::ptr_eq(&of.session, session))?;
        session.end_because(EndReason::Killed);
        of.is_superseded = true;
        if table.killed.len() == KILLED_MAX {
            table.killed.pop_front();
        }
        table.killed.push_back(session.id);
        table.give_up(session.id, now, &mut effects);
        Some(effects)
    }

    /// Sessions, a part of them at a time: those from a place on, and the place of the next part if there is
    /// one. Begin with 0. What begins or ends in the meantime may be missing; nothing is there twice.
    pub fn list(&self, from: usize, at_most: usize) -> (Vec<Arc<Session>>, Option<usize>) {
        let mut part = Vec::with_capacity(at_most);
        let table = lock(&self.table);
        let to = table.listed.capacity().min(from.saturating_add(at_most));
        part.extend((from..to).filter_map(|at| table.listed.get(at)).map(Arc::clone));
        (part, (to < table.listed.capacity()).then_some(to))
    }

    /// From now on there may be so many at a time. Those that there are stay.
    pub fn set_max(&self, sessions_max: usize) {
        self.sessions_max.store(sessions_max, Ordering::Relaxed);
    }

    /// Closes what is open of exports that are over: see [`Session::revoke_files`].
    pub fn revoke_files(&self) -> Vec<Arc<OpenFile>> {
        let sessions: Vec<_> = lock(&self.table).by_id.values().map(|of| Arc::clone(&of.session)).collect();
        sessions.iter().flat_map(|session| session.revoke_files()).collect()
    }

    /// A connection asks whether its requests may run: whether nothing can happen any more of what they must
    /// not come before. If so it gets what its channel has recorded.
    pub fn settle(&self, member: &Member, fence: &mut Fence) -> Result<Outcomes, Unsettled> {
        let Member { session, channel, name } = member;
        let mut table = lock(&self.table);
        let must_wait = table.guards.have(Guard::Supersede);
        let by_id = &mut table.by_id;
        let is_left = |given_up: &Arc<Session>| {
            by_id.get(&given_up.id).is_some_and(|of| Arc::ptr_eq(&of.session, given_up))
        };
        fence.superseded.retain(is_left);
        let sessions = if must_wait { fence.superseded.len() } else { 0 };
        let Some(place) = by_id.get_mut(&session.id).and_then(|of| of.channels.get_mut(channel)) else {
            debug_assert!(false, "a session has the channels of its connections");
            return Err(Unsettled { connections: 0, orphans: 0, sessions });
        };
        fence.is_known = place.channel.is_known();
        let (connections, orphans) = place.channel.waits_for();
        let outcomes = if sessions == 0 { place.channel.settle(*name) } else { None };
        table.counts.not_known += u64::from(outcomes.is_some() && !fence.is_known);
        outcomes.ok_or(Unsettled { connections, orphans, sessions })
    }

    /// The client of a connection has heard that nothing is known of its earlier requests: of what it sends
    /// from now on all is known. Until then the answer may have been lost with its connection, and the next
    /// one is given the same.
    pub fn heard(&self, member: &Member) {
        let Member { session, channel, .. } = member;
        let mut table = lock(&self.table);
        let of = table.by_id.get_mut(&session.id).filter(|of| Arc::ptr_eq(&of.session, session));
        if let Some(place) = of.and_then(|of| of.channels.get_mut(channel)) {
            place.channel.heard();
        }
    }

    /// A connection that has joined has ended.
    pub fn ended(&self, member: &Member, remains: Remains, now: Instant) -> Effects {
        let Member { session, channel, name } = member;
        let Remains { outcomes, fence, executing, linger } = remains;
        let mut effects = Effects::default();
        let mut table = self.locked();
        table.counts.orphans += executing;
        for given_up in fence.into_iter().flat_map(|fence| fence.superseded) {
            if let Some(of) = table.by_id.get_mut(&given_up.id) {
                of.waiters.retain(|waiter| waiter != name);
            }
        }
        let Some(of) = table.by_id.get_mut(&session.id) else { return effects };
        of.connections -= 1;
        if let Some(place) = of.channels.get_mut(channel) {
            // Otherwise another one has taken its place.
            let is_latest = place.channel.live() == Some(*name);
            place.channel.ended(*name, outcomes, executing, now + linger);
            if is_latest {
                place.lost_at = Some(now);
                effects.is_kept = !linger.is_zero();
            }
        }
        table.counts.broken += u64::from(effects.is_kept);
        table.review(session.id, *channel, now, &mut effects);
        effects
    }

    /// A request that a connection has left behind has ended, like this if it has done something.
    pub fn orphan_ended(&self, member: &Member, ended: Option<(u32, Status, u64)>, now: Instant) -> Effects {
        let Member { session, channel, .. } = member;
        let mut effects = Effects::default();
        let mut table = self.locked();
        table.counts.orphans -= 1;
        let of = table.by_id.get_mut(&session.id);
        if let Some(place) = of.and_then(|of| of.channels.get_mut(channel)) {
            place.channel.orphan_ended(ended);
        }
        table.review(session.id, *channel, now, &mut effects);
        effects
    }

    /// Forgets the channels whose time is over. [`Effects::expires`] says when the next one's is.
    pub fn expire(&self, now: Instant) -> Effects {
        let mut effects = Effects::default();
        let mut table = self.locked();
        while let Some(first) = table.deadlines.first_entry().filter(|first| first.key().0 <= now) {
            let (session, channel) = first.remove();
            table.counts.expired += 1;
            effects.expired += 1;
            table.review(session, channel, now, &mut effects);
        }
        effects.expires = table.deadlines.first_key_value().map(|(&(at, _), _)| at);
        effects
    }

    /// See [`Limits::queue_pair`].
    pub fn queue_pair(&self, address: Option<Origin>, bytes: usize) -> Result<QueuePairPermit, String> {
        self.limits.queue_pair(address, bytes)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// How many there may be.
    pub fn max(&self) -> usize {
        self.sessions_max.load(Ordering::Relaxed)
    }

    /// Whether their requests are counted.
    pub fn count_requests(&self) -> bool {
        self.limits.counts_requests()
    }

    /// Open files of all of them.
    pub fn open_files(&self) -> usize {
        self.limits.files()
    }

    /// What has happened to channels.
    pub fn channel_counts(&self) -> ChannelCounts {
        let table = lock(&self.table);
        ChannelCounts { parked: table.parked.len(), lingering: table.idle.len(), ..table.counts }
    }
}

/// The table, locked. The number of sessions is published when it is unlocked.
struct Locked<'a> {
    table: MutexGuard<'a, Table>,
    count: &'a AtomicUsize,
}

impl Deref for Locked<'_> {
    type Target = Table;

    fn deref(&self) -> &Table {
        &self.table
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Table {
        &mut self.table
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.count.store(self.table.by_id.len(), Ordering::Relaxed);
    }
}

impl Table {
    fn join(
        &mut self,
        peer: &Peer,
        connection: ConnectionName,
        now: Instant,
        effects: &mut Effects,
        begin: impl FnOnce(&mut Self, &mut Effects) -> Result<Arc<Session>, Excess>,
    ) -> Result<Joined, NotJoined> {
        let (channel, epoch) = match peer.channel {
            Some(channel) => (ChannelKey::Numbered(channel.number), channel.epoch),
            None => (ChannelKey::Unnumbered(connection), 1),
        };
        if self.killed.contains(&peer.session) {
            return Err(NotJoined::Killed);
        }
        let is_new = !self.by_id.contains_key(&peer.session);
        if is_new {
            let session = begin(self, effects).map_err(NotJoined::Excess)?;
            let of = Of {
                listed: self.listed.insert(Arc::clone(&session)),
                session,
                channels: HashMap::new(),
                connections: 0,
                is_superseded: false,
                waiters: Vec::new(),
                idle: None,
            };
            self.by_id.insert(peer.session, of);
        }
        let of = self.by_id.get_mut(&peer.session).expect("it is there, or has just been entered");
        if of.is_superseded && self.guards.have(Guard::GivenUp) {
            self.counts.stale += 1;
            let text = "The session was given up, and is ending. Begin another one.";
            return Err(NotJoined::Stale(text.into()));
        }
        let address = of.session.address();
        let (place, is_resumed) = match of.channels.entry(channel) {
            Entry::Occupied(place) => (place.into_mut(), true),
            Entry::Vacant(vacant) => (vacant.insert(Place::default()), false),
        };
        place.channel.guards = self.guards;
        let before = match place.channel.join(epoch, connection) {
            Ok(before) => before,
            Err(stale) => {
                self.counts.stale += 1;
                let text = format!(
                    "The channel has had a connection with epoch {}, and this one's is {epoch}. Connect \
                     with a higher one.",
                    stale.known
                );
                return Err(NotJoined::Stale(text));
            }
        };
        self.counts.fenced += u64::from(before.is_some());
        let succeeds = match place.lost_at.take() {
            Some(lost_at) => Succession::After(now.saturating_duration_since(lost_at)),
            None if is_resumed => Succession::AtOnce,
            None => Succession::None,
        };
        effects.close.extend(before.filter(|_| self.guards.have(Guard::Fence)));
        if let Some(parked) = place.parked.take() {
            self.deadlines.remove(&parked);
            self.parked.remove(address, parked);
        }
        self.counts.resumed += u64::from(is_resumed);
        of.connections += 1;
        if let Some(idle) = of.idle.take() {
            self.idle.remove(address, idle);
        }
        let is_known = place.channel.is_known();
        let fence = peer.begins_with_outcome().then(|| Fence { is_known, succeeds, superseded: Vec::new() });
        let outcomes = match fence {
            None => place.channel.settle(connection).filter(|_| peer.channel.is_some()),
            Some(_) => None,
        };
        let member = Member { session: Arc::clone(&of.session), channel, name: connection };
        Ok(Joined { member, is_new, outcomes, fence })
    }

    /// Ends the sessions that a client has given up, as far as they can be ended now.
    fn supersede(&mut self, peer: &Peer, joined: &mut Joined, now: Instant, effects: &mut Effects) {
        for &id in peer.supersedes.iter().filter(|&&id| id != peer.session) {
            let Some(of) = self.by_id.get_mut(&id) else { continue };
            if !std::mem::replace(&mut of.is_superseded, true) {
                self.counts.superseded += 1;
                effects.superseded += 1;
            }
            let session = Arc::clone(&of.session);
            self.give_up(id, now, effects);
            if let (Some(of), Some(fence)) = (self.by_id.get_mut(&id), &mut joined.fence) {
                of.waiters.push(joined.member.name);
                fence.superseded.push(session);
            }
        }
    }

    /// Gives up all channels of a session.
    fn give_up(&mut self, id: SessionId, now: Instant, effects: &mut Effects) {
        let of = self.by_id.get(&id);
        let channels: Vec<_> = of.into_iter().flat_map(|of| of.channels.keys().copied()).collect();
        for channel in channels {
            let of = self.by_id.get_mut(&id);
            if let Some(place) = of.and_then(|of| of.channels.get_mut(&channel)) {
                let live = place.channel.give_up(now);
                self.counts.fenced += u64::from(live.is_some());
                effects.close.extend(live.filter(|_| self.guards.have(Guard::Fence)));
                self.review(id, channel, now, effects);
            }
        }
    }

    /// Something has happened to a channel: forgets it if it is over, and else has it settle or expire.
    fn review(&mut self, id: SessionId, key: ChannelKey, now: Instant, effects: &mut Effects) {
        let Some(of) = self.by_id.get_mut(&id) else { return };
        let address = of.session.address();
        let Some(place) = of.channels.get_mut(&key) else { return };
        if place.channel.is_over(now) {
            return self.forget(id, key, effects);
        }
        if place.channel.is_settled() {
            effects.wake.extend(place.channel.live());
        }
        if let Some(until) = place.channel.parked_until() {
            let parked = *place.parked.get_or_insert_with(|| {
                self.serial += 1;
                (until, self.serial)
            });
            self.parked.insert(address, parked, PARKED_BYTES + place.channel.bytes(), (id, key));
            if until > now && self.deadlines.insert(parked, (id, key)).is_none() {
                effects.expires = Some(until);
            }
        }
        if of.connections == 0 && of.idle.is_none() {
            self.serial += 1;
            let idle = (now, self.serial);
            of.idle = Some(idle);
            self.idle.insert(address, idle, 1, id);
        }
        self.evict_channels(effects);
    }

    /// Takes a channel out, and its session if that has no other.
    fn forget(&mut self, id: SessionId, key: ChannelKey, effects: &mut Effects) {
        let Some(of) = self.by_id.get_mut(&id) else { return };
        let address = of.session.address();
        let Some(place) = of.channels.remove(&key) else { return };
        if let Some(parked) = place.parked {
            self.deadlines.remove(&parked);
            self.parked.remove(address, parked);
        }
        if !of.channels.is_empty() {
            return;
        }
        if let Some(of) = self.by_id.remove(&id) {
            self.listed.remove(of.listed);
            if let Some(idle) = of.idle {
                self.idle.remove(address, idle);
            }
            if self.guards.have(Guard::Wake) {
                effects.wake.extend(of.waiters);
            }
            effects.files.extend(of.session.end());
            effects.ended.push(of.session);
        }
    }

    /// Forgets channels if the parked ones take too much memory: of the address whose channels take most,
    /// those that expire first.
    fn evict_channels(&mut self, effects: &mut Effects) {
        while self.parked.size() > self.parked_bytes_max {
            let is_quiet = |(id, key): &(SessionId, ChannelKey)| {
                let place = self.by_id.get(id).and_then(|of| of.channels.get(key));
                place.is_some_and(|place| place.channel.is_settled())
            };
            let Some(&(id, key)) = self.parked.first_to_go().find(|&parked| is_quiet(parked)) else { return };
            self.counts.evicted_channels += 1;
            effects.evicted += 1;
            self.forget(id, key, effects);
        }
    }

    /// Ends a session without a connection of which nothing executes: of the address that has most of them,
    /// that without one for longest. False if there is none.
    fn evict_session(&mut self, effects: &mut Effects) -> bool {
        let is_quiet = |id: &SessionId| {
            let of = self.by_id.get(id);
            of.is_some_and(|of| of.channels.values().all(|place| place.channel.is_settled()))
        };
        let Some(&id) = self.idle.first_to_go().find(|&id| is_quiet(id)) else { return false };
        self.counts.evicted_sessions += 1;
        let channels = self.by_id.get(&id).map(|of| of.channels.keys().copied().collect::<Vec<_>>());
        for channel in channels.into_iter().flatten() {
            effects.evicted += 1;
            self.forget(id, channel, effects);
        }
        true
    }
}

#[cfg(test)]
impl Clone for Sessions {
    fn clone(&self) -> Self {
        Self {
            table: Mutex::new(lock(&self.table).clone()),
            count: AtomicUsize::new(self.len()),
            sessions_max: AtomicUsize::new(self.sessions_max.load(Ordering::Relaxed)),
            limits: Arc::clone(&self.limits),
        }
    }
}

#[cfg(test)]
mod model;

#[cfg(test)]
mod tests {
    use raio_transport::handshake::{ChannelOffer, Offer, Policy};
    use raio_transport::message::Parsed;

    use super::*;
    use crate::limits::{Caps, Room};
    use crate::session::Access;
    use crate::tuning::channels::PARKED_PART;
    use crate::tuning::limits::RESERVE;
    use crate::volume::Null;

    const LINGER: Duration = Duration::from_secs(90);

    /// All sessions, and a time that passes when it is told to.
    struct Run {
        sessions: Sessions,
        now: Instant,
        serial: u64,
    }

    fn limits(files: usize, bytes: usize) -> Arc<Limits> {
        let room = Room { descriptors: 1000, files, bytes, workers: 1 };
        Limits::new(room, Caps::default(), Caps::default())
    }

    fn id(number: u8) -> SessionId {
        SessionId([number; 16])
    }

    /// A client of the session with this number, perhaps of a channel in an epoch.
    fn peer(number: u8, channel: Option<(u32, u64)>) -> Peer {
        let channel = channel.map(|(number, epoch)| ChannelOffer { number, epoch, linger: LINGER });
        let hello = Offer { session: id(number), channel, ..Offer::new("test") }.hello();
        let Ok(Parsed::Item((peer, _), _)) = Policy::default().welcome(&hello) else { panic!("no welcome") };
        peer
    }

    impl Run {
        fn new(sessions_max: usize, limits: Arc<Limits>) -> Self {
            Self { sessions: Sessions::new(sessions_max, limits), now: Instant::now(), serial: 0 }
        }

        fn join_as(&mut self, peer: &Peer) -> (Result<Joined, NotJoined>, Effects) {
            self.serial += 1;
            let name = ConnectionName { worker: 0, key: 0, serial: self.serial };
            self.sessions.join(peer, &None, name, self.now)
        }

        fn try_join(&mut self, number: u8, channel: Option<(u32, u64)>) -> Result<Joined, NotJoined> {
            self.join_as(&peer(number, channel)).0
        }

        fn join(&mut self, number: u8, channel: Option<(u32, u64)>) -> Joined {
            self.try_join(number, channel).expect("it may join")
        }

        /// A connection ends, and leaves requests behind.
        fn end(&mut self, joined: Joined, executing: usize, linger: Duration) -> Effects {
            let Joined { member, outcomes, fence, .. } = joined;
            let remains = Remains { outcomes, fence, executing, linger };
            self.sessions.ended(&member, remains, self.now)
        }

        /// It waits no more.
        fn settle(&mut self, joined: &mut Joined) -> Result<(), Unsettled> {
            let fence = joined.fence.as_mut().expect("it waits");
            joined.outcomes = Some(self.sessions.settle(&joined.member, fence)?);
            Ok(())
        }

        fn counts(&self) -> ChannelCounts {
            self.sessions.channel_counts()
        }
    }

    fn run() -> Run {
        Run::new(9, limits(10, 1 << 30))
    }

    fn null() -> Arc<OpenFile> {
        Arc::new(OpenFile::of_volume(Null::new(1), Access { read: true, write: true }))
    }

    #[test]
    fn a_session_ends_with_its_last_connection_if_none_has_a_channel_and_closes_its_files() {
        let mut run = run();
        let (first, second) = (run.join(1, None), run.join(1, None));
        assert!(first.is_new && !second.is_new);
        let session = Arc::clone(&second.member.session);
        assert!(Arc::ptr_eq(&first.member.session, &session));
        let file = null();
        let handle = session.insert(Arc::clone(&file), &None).unwrap();
        assert_eq!(run.end(first, 0, Duration::ZERO).ended.len(), 0);
        assert!(!file.is_closed());
        assert_eq!((run.sessions.len(), run.sessions.open_files()), (1, 1));
        let effects = run.end(second, 0, Duration::ZERO);
        assert_eq!((effects.ended.len(), effects.files.len()), (1, 1));
        drop(effects);
        assert!(file.is_closed() && session.get(handle).is_none());
        assert_eq!((run.sessions.len(), run.sessions.open_files()), (0, 0));
    }

    #[test]
    fn sessions_do_not_see_each_others_files() {
        let mut run = run();
        let handle = run.join(1, None).member.session.insert(null(), &None).unwrap();
        assert!(run.join(2, None).member.session.get(handle).is_none());
    }

    #[test]
    fn many_sessions_are_listed_in_parts_while_others_begin_and_end() {
        const ALL: usize = 100_000;
        let mut run = Run::new(2 * ALL, limits(10, 1 << 30));
        let mut joined: VecDeque<_> = (0..ALL as u128)
            .map(|number| {
                let id = SessionId(number.to_be_bytes());
                run.join_as(&Peer { session: id, ..peer(1, None) }).0.expect("it may join")
            })
            .collect();
        let session = |joined: &Joined| Arc::clone(&joined.member.session);
        let stay: Vec<_> = joined.iter().skip(ALL / 2).map(session).collect();
        let (mut seen, mut from, mut longest) = (Vec::new(), Some(0), Duration::ZERO);
        let mut number = ALL as u128;
        while let Some(at) = from {
            let began = Instant::now();
            let (part, next) = run.sessions.list(at, 256);
            longest = longest.max(began.elapsed());
            assert!(part.len() <= 256 && next.is_none_or(|next| next > at));
            seen.extend(part);
            from = next;
            // One ends and another one begins, in its place or elsewhere.
            let _ = run.end(joined.pop_front().expect("there are more"), 0, Duration::ZERO);
            number += 1;
            let id = SessionId(number.to_be_bytes());
            joined.push_back(run.join_as(&Peer { session: id, ..peer(1, None) }).0.expect("it may join"));
        }
        let mut places: Vec<_> = seen.iter().map(Arc::as_ptr).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), seen.len(), "none is there twice");
        assert!(
            stay.iter().all(|session| places.binary_search(&Arc::as_ptr(session)).is_ok()),
            "none is missing"
        );
        assert_eq!(run.sessions.len(), ALL);
        // The table is locked for some 25 us each time. A slow machine may be preempted in between.
        assert!(longest < Duration::from_millis(100), "{longest:?}");
        while let Some(joined) = joined.pop_front() {
            let _ = run.end(joined, 0, Duration::ZERO);
        }
        assert!(lock(&run.sessions.table).listed.is_empty());
    }

    #[test]
    fn a_session_that_is_killed_is_not_begun_anew_by_its_client() {
        let mut run = run();
        let (joined, other) = (run.join(1, Some((0, 1))), run.join(2, Some((0, 1))));
        let session = Arc::clone(&joined.member.session);
        let effects = run.sessions.kill(&session, run.now).expect("it is there");
        assert_eq!((effects.close, session.end_reason()), (vec![joined.member.name], EndReason::Killed));
        assert!(matches!(run.try_join(1, Some((0, 2))), Err(NotJoined::Killed)), "while it ends");
        assert_eq!(run.end(joined, 0, LINGER).ended.len(), 1);
        assert!(run.sessions.kill(&session, run.now).is_none(), "it has ended");
        assert!(matches!(run.try_join(1, Some((0, 3))), Err(NotJoined::Killed)), "and later");
        assert_eq!((run.sessions.len(), other.member.session.end_reason()), (1, EndReason::None));
        // A server remembers some.
        for number in 0..=KILLED_MAX {
            let id = SessionId((number as u128 + 1000).to_be_bytes());
            let joined = run.join_as(&Peer { session: id, ..peer(1, None) }).0.expect("it may join");
            let _ = run.sessions.kill(&joined.member.session, run.now).expect("it is there");
            let _ = run.end(joined, 0, Duration::ZERO);
        }
        assert!(run.try_join(1, None).is_ok(), "this one is forgotten");
        assert_eq!(lock(&run.sessions.table).killed.len(), KILLED_MAX);
    }

    #[test]
    fn a_session_that_begins_anew_gives_other_handles_than_before_it_expired() {
        let mut run = run();
        let mut seen = std::collections::HashSet::new();
        for epoch in 1..100 {
            let joined = run.join(1, Some((0, epoch)));
            assert!(joined.is_new);
            let session = Arc::clone(&joined.member.session);
            for _ in 0..3 {
                let handle = session.insert(null(), &None).unwrap();
                assert!(seen.insert(handle), "{handle:?} was that of another file");
                session.close(handle).unwrap();
            }
            let _ = run.end(joined, 0, LINGER);
            run.now += LINGER;
            assert_eq!(run.sessions.expire(run.now).ended.len(), 1);
        }
    }

    #[test]
    fn one_session_too_many_is_not_let_in_but_those_that_are_may_have_more_connections() {
        let mut run = Run::new(1, limits(9, 1 << 30));
        let first = run.join(1, None);
        assert!(matches!(run.try_join(2, None), Err(NotJoined::Excess(_))));
        let second = run.join(1, None);
        let _ = run.end(first, 0, Duration::ZERO);
        assert!(run.try_join(2, None).is_err());
        let _ = run.end(second, 0, Duration::ZERO);
        assert!(run.try_join(2, None).is_ok());
    }

    #[test]
    fn sessions_cannot_have_more_files_than_they_may_together() {
        let mut run = Run::new(9, limits(2, 1 << 30));
        let [session, other] = [1, 2].map(|number| run.join(number, None).member.session);
        let first = session.insert(null(), &None).unwrap();
        while session.insert(null(), &None).is_ok() {}
        let theirs = (0..).take_while(|_| other.insert(null(), &None).is_ok()).count();
        assert!(theirs > 0 && run.sessions.open_files() < 2 + RESERVE);
        while run.try_join(3, None).is_ok_and(|third| third.member.session.insert(null(), &None).is_ok()) {}
        session.close(first).unwrap();
        assert!(run.join(4, None).member.session.insert(null(), &None).is_ok());
    }

    #[test]
    fn a_channel_whose_connection_has_broken_keeps_its_session_for_the_linger_time() {
        let mut run = run();
        let joined = run.join(1, Some((3, 1)));
        let session = Arc::clone(&joined.member.session);
        session.insert(null(), &None).unwrap();
        let effects = run.end(joined, 0, LINGER);
        assert_eq!(
            (effects.ended.len(), effects.is_kept, effects.expires),
            (0, true, Some(run.now + LINGER))
        );
        assert_eq!((run.counts().broken, run.counts().parked, run.counts().lingering), (1, 1, 1));

        run.now += LINGER / 2;
        let mut joined = run.join(1, Some((3, 2)));
        assert!(Arc::ptr_eq(&joined.member.session, &session) && !joined.is_new);
        let fence = joined.fence.as_ref().unwrap();
        assert_eq!((fence.is_known, fence.succeeds), (true, Succession::After(LINGER / 2)));
        run.settle(&mut joined).unwrap();
        assert_eq!((run.counts().parked, run.counts().lingering, run.counts().resumed), (0, 0, 1));
        run.now += LINGER;
        assert_eq!(run.sessions.expire(run.now).ended.len(), 0, "it has a connection");
        let _ = run.end(joined, 0, LINGER);
        run.now += LINGER;
        let effects = run.sessions.expire(run.now);
        assert_eq!((effects.ended.len(), effects.expired, effects.expires), (1, 1, None));
        assert_eq!((effects.files.len(), run.counts().expired), (1, 1));

        let mut joined = run.join(1, Some((3, 3)));
        run.settle(&mut joined).unwrap();
        let fence = joined.fence.unwrap();
        assert!(joined.is_new && !fence.is_known && fence.succeeds == Succession::None);
        assert_eq!(run.counts().not_known, 1);
    }

    #[test]
    fn that_a_channel_is_not_known_is_said_until_its_client_has_heard_it() {
        let mut run = run();
        for epoch in 5..8 {
            let mut joined = run.join(1, Some((3, epoch)));
            run.settle(&mut joined).unwrap();
            assert!(!joined.fence.as_ref().unwrap().is_known, "the answer before may have been lost");
            let _ = run.end(joined, 0, LINGER);
        }
        let mut joined = run.join(1, Some((3, 8)));
        run.settle(&mut joined).unwrap();
        let mut next = run.join(1, Some((3, 9)));
        assert!(!next.fence.as_ref().unwrap().is_known);
        run.sessions.heard(&joined.member);
        let _ = run.end(joined, 0, LINGER);
        run.settle(&mut next).unwrap();
        assert!(next.fence.unwrap().is_known, "it has heard it in the meantime");
    }

    #[test]
    fn a_goaway_ends_a_channel_at_once_and_its_session_with_the_last() {
        let mut run = run();
        let (control, data) = (run.join(1, Some((0, 1))), run.join(1, Some((1, 1))));
        assert_eq!(run.end(data, 0, Duration::ZERO).ended.len(), 0);
        assert!(!run.join(1, Some((1, 2))).fence.unwrap().is_known, "it is another channel");
        let _ = run.end(control, 0, LINGER);
        assert_eq!(run.sessions.len(), 1);
    }

    #[test]
    fn a_connection_takes_the_place_of_one_that_has_not_ended_and_waits_for_it() {
        let mut run = run();
        let first = run.join(1, Some((3, 1)));
        assert!(first.outcomes.is_some() && first.fence.is_none());
        let old = first.member.name;
        let (joined, effects) = run.join_as(&peer(1, Some((3, 2))));
        let mut joined = joined.unwrap();
        assert_eq!(effects.close, [old]);
        assert_eq!(joined.fence.as_ref().unwrap().succeeds, Succession::AtOnce);
        assert!(matches!(run.try_join(1, Some((3, 2))), Err(NotJoined::Stale(_))));
        let waits = Unsettled { connections: 1, orphans: 0, sessions: 0 };
        assert_eq!(run.settle(&mut joined), Err(waits));
        let (member, effects) = (first.member.clone(), run.end(first, 1, LINGER));
        assert!(effects.wake.is_empty(), "it has left a request behind");
        assert!(!effects.is_kept, "another one has its place");
        assert_eq!(run.settle(&mut joined), Err(Unsettled { connections: 0, orphans: 1, sessions: 0 }));
        let ended = Some((7, Status::OK, 512));
        let effects = run.sessions.orphan_ended(&member, ended, run.now);
        assert_eq!(effects.wake, [joined.member.name]);
        run.settle(&mut joined).unwrap();
        let answer = joined.outcomes.unwrap().of(7).answer();
        assert_eq!(answer, Ok(Some((Status::OK, 512))));
        let ChannelCounts { fenced, stale, orphans, .. } = run.counts();
        assert_eq!((fenced, stale, orphans), (1, 1, 0));
    }

    #[test]
    fn sessions_that_are_superseded_end_first() {
        let mut run = run();
        let (first, second) = (run.join(1, Some((0, 1))), run.join(1, Some((1, 1))));
        first.member.session.insert(null(), &None).unwrap();
        let parked = run.join(2, Some((0, 1)));
        let _ = run.end(parked, 0, LINGER);
        let newcomer = Peer { supersedes: vec![id(1), id(2), id(3), id(4)], ..peer(4, Some((0, 1))) };
        let (joined, effects) = run.join_as(&newcomer);
        let mut joined = joined.unwrap();
        assert_eq!((effects.close.len(), effects.ended.len()), (2, 1), "the parked one is over");
        assert_eq!((effects.superseded, run.counts().superseded), (2, 2));
        let waits = |sessions| Unsettled { connections: 0, orphans: 0, sessions };
        assert_eq!(run.settle(&mut joined), Err(waits(1)));
        assert!(matches!(run.try_join(1, Some((1, 2))), Err(NotJoined::Stale(_))), "nobody joins it");
        let _ = run.end(first, 0, LINGER);
        let (member, _) = (second.member.clone(), run.end(second, 1, LINGER));
        assert_eq!(run.settle(&mut joined), Err(waits(1)));
        let effects = run.sessions.orphan_ended(&member, None, run.now);
        assert_eq!((effects.ended.len(), effects.files.len()), (1, 1));
        assert_eq!(effects.wake, [joined.member.name]);
        run.settle(&mut joined).unwrap();
        assert_eq!(run.sessions.len(), 1);
    }

    #[test]
    fn who_waits_for_a_session_and_goes_is_not_waited_for() {
        let mut run = run();
        let old = run.join(1, None);
        for epoch in 1..100 {
            let newcomer = Peer { supersedes: vec![id(1)], ..peer(2, Some((0, epoch))) };
            let joined = run.join_as(&newcomer).0.unwrap();
            let _ = run.end(joined, 0, LINGER);
        }
        assert!(run.end(old, 0, LINGER).wake.is_empty());
    }

    #[test]
    fn a_session_without_a_connection_makes_room_for_another_the_oldest_first() {
        let mut run = Run::new(2, limits(9, 1 << 30));
        for number in [1, 2] {
            let joined = run.join(number, Some((0, 1)));
            let _ = run.end(joined, usize::from(number == 1), LINGER);
            run.now += Duration::from_secs(1);
        }
        let _third = run.join(3, Some((0, 1)));
        assert_eq!((run.counts().evicted_sessions, run.sessions.len()), (1, 2));
        assert!(run.try_join(4, None).is_err(), "of the first something executes");
        assert!(!run.join(1, Some((0, 2))).is_new);
    }

    #[test]
    fn channels_without_a_connection_take_a_part_of_the_memory_and_no_more() {
        let channels = 10;
        let mut run = Run::new(9, limits(9, PARKED_PART * channels * PARKED_BYTES));
        let _other = run.join(1, None);
        for number in 0..2 * channels as u32 {
            let joined = run.join(1, Some((number, 1)));
            let _ = run.end(joined, 0, LINGER);
            run.now += Duration::from_secs(1);
        }
        assert_eq!((run.counts().parked, run.counts().evicted_channels), (channels, channels as u64));
        assert!(!run.join(1, Some((0, 2))).fence.unwrap().is_known, "the oldest is gone");
        assert!(run.join(1, Some((19, 2))).fence.unwrap().is_known);
    }

    #[test]
    fn a_client_that_leaves_very_much_behind_does_not_push_out_what_others_have_left() {
        let limits = limits(9, PARKED_PART * 10 * PARKED_BYTES);
        let mut run = Run::new(4, Arc::clone(&limits));
        let account = |text: &str| {
            limits.connect(text.parse().ok().map(Origin::Ip)).expect("a permit").address().clone()
        };
        let (theirs, greedy) = (account("10.0.0.1"), account("10.0.0.2"));
        let mut leave = |address: &AddressAccount, number, channel, linger| {
            run.serial += 1;
            let name = ConnectionName { worker: 0, key: 0, serial: run.serial };
            let (joined, _) = run.sessions.join(&peer(number, channel), address, name, run.now);
            let is_known =
                joined.as_ref().is_ok_and(|joined| joined.fence.as_ref().is_some_and(|fence| fence.is_known));
            let _ = run.end(joined.expect("it may join"), 0, linger);
            run.now += Duration::from_secs(1);
            is_known
        };
        leave(&theirs, 1, Some((1, 1)), LINGER / 2);
        leave(&greedy, 2, Some((0, 1)), LINGER);
        for channel in 1..100 {
            leave(&greedy, 2, Some((channel, 1)), LINGER);
        }
        for session in 3..20 {
            leave(&greedy, session, Some((0, 1)), LINGER);
        }
        assert!(leave(&theirs, 1, Some((1, 2)), LINGER), "nothing is known of its channel");
        assert!(run.counts().evicted_channels > 0 && run.counts().evicted_sessions > 0);
    }

    #[test]
    fn nothing_is_left_when_all_have_gone() {
        let mut run = run();
        for number in 0..5 {
            let joined = run.join(number, Some((number.into(), 1)));
            let _ = run.end(joined, 0, LINGER);
        }
        run.now += LINGER;
        assert_eq!(run.sessions.expire(run.now).ended.len(), 5);
        let table = lock(&run.sessions.table);
        assert!(table.by_id.is_empty() && table.deadlines.is_empty());
        assert_eq!((table.idle.len(), table.parked.len(), table.parked.size()), (0, 0, 0));
    }
}
