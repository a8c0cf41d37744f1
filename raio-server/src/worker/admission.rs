//! Admission: who gets memory for a request, how much of it, and when.
//!
//! There are no priorities. Fairness comes from limits and from FIFO queues:
//!
//! - a connection has a **quota**, a dynamic threshold: a part of the arena, less once half of it is in use;
//! - some of the arena is a **reserve**, for small requests of connections that hold little;
//! - a session and an address have a **share** while others wait, or what an option says at any time, and so
//!   does a client what `clients.toml` says;
//! - the requests on one **export** have what leaves as much for the others, for its file system may hang;
//! - an **iteration** of the worker's loop gives out so much, and the rest waits for the next.
//!
//! A request that is not admitted waits in its connection's FIFO, and the connections that have one take
//! turns: **round-robin**, request by request. Whoever has waited longest with nothing, because there is no
//! memory, is **starved**: until it has some nobody gets any but the small.
//!
//! What the requests on an export hold is counted exactly, those of clients that have gone among them: memory
//! that a hanging file system holds comes back from nobody. What a session and an address hold changes with
//! every request and every send, and only counts where memory is short or an option limits it. So it is noted
//! when it is asked for, once in an iteration and for those connections alone that have got memory.
//!
//! Connections, sessions and requests are the worker's keys for them. Nothing here knows a transport, and
//! time is passed in.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use raio_transport::memory::{Arena, BLOCK_BYTES, Slot};
use slab::Slab;

use crate::limits::{WHO_COUNT, Who};
use crate::peer::Origin;
use crate::tuning::fast_path;
use crate::tuning::memory::{
    GROUP_PART, ITERATION_BYTES_MAX, QUOTA_PART, RESERVE_PART, SMALL_BYTES, SMALL_PART,
};

/// What becomes of a request for memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It may have it.
    Admit,
    /// Its connection has as much as it may have now.
    OverQuota,
    /// Its session or its address has.
    OverShare(Who),
    /// There is no memory of this size now, though its connection holds none.
    NoMemory,
    /// The requests on this export have as much as they may have now.
    OverExport(usize),
    /// This iteration has given out enough.
    NextIteration,
}

/// A request for memory.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// Whose it is.
    pub connection: usize,
    /// How many bytes.
    pub bytes: usize,
    /// On whose account it goes besides. None: there is but one export, or it cannot hang.
    pub export: Option<usize>,
}

/// What connections without progress are looked for: [`Admission::check_stalled`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StallCheck {
    /// Those that were without at the last check, too, are to be closed.
    pub close: bool,
    /// When it is to be checked again.
    pub next: Instant,
}

/// A connection's account.
#[derive(Debug, Default)]
struct Account {
    session: usize,
    address: Option<usize>,
    /// Its client, and how many bytes that may hold, if they are limited.
    client: Option<(usize, usize)>,
    /// Bytes in the slots of its requests. Its unsent responses have more: the transport knows.
    slot_bytes: usize,
    /// Its requests that wait for memory, oldest first: what is to be known of each is here, so that nobody
    /// else need be asked.
    waiting: VecDeque<(usize, Demand)>,
    /// It is in the round-robin. It stays there for a while when its last waiting request is cancelled.
    is_waiting: bool,
    /// What it held when that was last noted: a part of [`Group::held`].
    noted: usize,
    /// It is in [`Admission::holding`].
    is_holding: bool,
    /// Its next request waits because of a share, and that has been counted.
    is_over_share: bool,
}

/// What the connections of one session, of one address, or of one client have.
#[derive(Debug, Default)]
struct Group {
    /// Bytes, as they were noted.
    held: usize,
    /// How many of them wait for memory.
    waiting: usize,
}

#[derive(Debug)]
struct Address {
    origin: Origin,
    connections: usize,
    group: Group,
}

#[derive(Debug)]
struct LimitedClient {
    name: String,
    connections: usize,
    group: Group,
}

/// What the requests on one export have.
#[derive(Clone, Copy, Debug, Default)]
struct ExportUse {
    /// Bytes.
    held: usize,
    /// How many of them wait for their clients to send data.
    fetching: usize,
}

/// See the module documentation.
#[derive(Debug)]
pub struct Admission {
    /// Bytes that a connection may hold while half of the arena is free.
    quota: usize,
    /// Bytes that are kept for small requests.
    reserve: usize,
    /// Bytes that a session, and an address, may hold by the options.
    caps: Option<[usize; 2]>,
    /// By the connection's key.
    accounts: Vec<Account>,
    /// By the session's key.
    sessions: Vec<Group>,
    addresses: Slab<Address>,
    address_by_origin: HashMap<Origin, usize>,
    /// Those whose memory is limited.
    clients: Slab<LimitedClient>,
    exports: Vec<ExportUse>,
    /// Connections with requests that wait.
    round_robin: VecDeque<usize>,
    /// The one of them that has waited longest with no memory at all, because there is none.
    starved: Option<usize>,
    /// Connections that have got memory since it was last noted what all hold, or held some then.
    holding: Vec<usize>,
    /// All of them have been noted in this iteration.
    is_noted: bool,
    /// The most bytes that an earlier iteration has given out.
    iteration_bytes_max: usize,
    /// Bytes that this iteration has given out...
    iteration_bytes: usize,
    /// ... and those of them that the fast path has.
    fast_path_bytes: usize,
    /// Somebody waits for the next iteration and nothing else.
    is_exhausted: bool,
    /// Somebody has starved since the last stall check.
    is_short: bool,
    stall_check: Option<Instant>,
    /// When connections that wait are next shown that the server lives.
    life_sign: Option<Instant>,
    /// Times that a request waited because of a share, by [`Who`].
    share_waits: [u64; WHO_COUNT],
}

impl Admission {
    /// For an arena, requests of at most `io_bytes_max` bytes, so many exports, and what the options say that
    /// a session and an address may hold (`usize::MAX`: nothing).
    pub fn new(arena: &Arena, io_bytes_max: usize, exports: usize, caps: [usize; 2]) -> Self {
        Self {
            quota: (2 * io_bytes_max).max(arena.len() / QUOTA_PART),
            reserve: (arena.len() / RESERVE_PART).min(arena.len() - arena.slot_bytes_max()),
            caps: (caps != [usize::MAX; 2]).then_some(caps),
            accounts: Vec::new(),
            sessions: Vec::new(),
            addresses: Slab::new(),
            address_by_origin: HashMap::new(),
            clients: Slab::new(),
            exports: vec![ExportUse::default(); exports],
            round_robin: VecDeque::new(),
            starved: None,
            holding: Vec::new(),
            is_noted: false,
            iteration_bytes_max: 0,
            iteration_bytes: 0,
            fast_path_bytes: 0,
            is_exhausted: false,
            is_short: false,
            stall_check: None,
            life_sign: None,
            share_waits: [0; WHO_COUNT],
        }
    }

    /// From now on a session, and an address, may hold so much by the options. Who holds more keeps it.
    pub fn set_caps(&mut self, caps: [usize; 2]) {
        self.caps = (caps != [usize::MAX; 2]).then_some(caps);
    }

    // Connections
    // ----------------------------------------------------------------------------------------------------

    /// A connection of a session has opened, from an address if that is known.
    pub fn open(&mut self, connection: usize, session: usize, origin: Option<Origin>) {
        if self.accounts.len() <= connection {
            self.accounts.resize_with(connection + 1, Account::default);
        }
        if self.sessions.len() <= session {
            self.sessions.resize_with(session + 1, Group::default);
        }
        let address = origin.map(|origin| {
            let addresses = &mut self.addresses;
            let new = || addresses.insert(Address { origin, connections: 0, group: Group::default() });
            let key = *self.address_by_origin.entry(origin).or_insert_with(new);
            self.addresses[key].connections += 1;
            key
        });
        self.accounts[connection] = Account { session, address, ..Account::default() };
    }

    /// Limits what all connections of a client may hold, in bytes. For one that has just opened.
    pub fn limit_client(&mut self, connection: usize, name: &str, bytes: usize) {
        let known = self.clients.iter().find(|(_, client)| client.name == name).map(|(key, _)| key);
        let key = known.unwrap_or_else(|| {
            let name = name.to_owned();
            self.clients.insert(LimitedClient { name, connections: 0, group: Group::default() })
        });
        self.clients[key].connections += 1;
        self.accounts[connection].client = Some((key, bytes));
    }

    /// A connection has ended, and with it those of its requests that wait. What the others have stays on the
    /// exports' accounts until [`Admission::release`].
    pub fn close(&mut self, connection: usize) {
        if self.accounts[connection].is_waiting {
            self.not_starved(connection);
            self.round_robin.retain(|&other| other != connection);
            self.waits_no_more(connection);
        }
        self.set_noted(connection, 0);
        let account = std::mem::take(&mut self.accounts[connection]);
        if account.is_holding {
            self.holding.retain(|&other| other != connection);
        }
        if let Some(key) = account.address {
            self.addresses[key].connections -= 1;
            if self.addresses[key].connections == 0 {
                self.address_by_origin.remove(&self.addresses.remove(key).origin);
            }
        }
        if let Some((key, _)) = account.client {
            self.clients[key].connections -= 1;
            if self.clients[key].connections == 0 {
                self.clients.remove(key);
            }
        }
    }

    /// Whether requests of this connection wait: none of them may be overtaken.
    pub fn is_waiting(&self, connection: usize) -> bool {
        self.accounts[connection].is_waiting
    }

    /// Bytes that requests hold, and connections that wait for some, as they are counted here.
    #[cfg(any(test, feature = "test-worker"))]
    pub fn in_use(&self) -> (usize, usize) {
        let of_connections: usize = self.accounts.iter().map(|account| account.slot_bytes).sum();
        let of_exports: usize = self.exports.iter().map(|export| export.held + export.fetching).sum();
        let waiting: usize = self.sessions.iter().map(|session| session.waiting).sum();
        (of_connections + of_exports, waiting + self.round_robin.len())
    }

    // Iterations
    // ----------------------------------------------------------------------------------------------------

    /// A new iteration of the worker's loop.
    pub fn begin_iteration(&mut self) {
        self.iteration_bytes_max = self.iteration_bytes_max();
        self.iteration_bytes = 0;
        self.fast_path_bytes = 0;
        self.is_exhausted = false;
        self.is_noted = false;
    }

    /// Whether this iteration may take in another request for the fast path.
    pub fn has_budget(&self) -> bool {
        self.fast_path_bytes + fast_path::BYTES_MAX as usize <= ITERATION_BYTES_MAX
    }

    /// Whether somebody waits for the next iteration and nothing else.
    pub fn is_exhausted(&self) -> bool {
        self.is_exhausted
    }

    /// Bytes that this iteration has given out.
    #[cfg(test)]
    pub fn iteration_bytes(&self) -> usize {
        self.iteration_bytes
    }

    /// The most bytes that an iteration has given out.
    pub fn iteration_bytes_max(&self) -> usize {
        self.iteration_bytes_max.max(self.iteration_bytes)
    }

    /// The fast path has answered with so many bytes. Returns whether the responses so far should leave
    /// early.
    pub fn spend(&mut self, bytes: usize) -> bool {
        let before = self.fast_path_bytes;
        self.fast_path_bytes += bytes;
        self.iteration_bytes += bytes;
        self.fast_path_bytes / fast_path::FLUSH_BYTES > before / fast_path::FLUSH_BYTES
    }

    // Decisions
    // ----------------------------------------------------------------------------------------------------

    /// Whether a request may have memory now. `unsent` says how many bytes the unsent responses of a
    /// connection hold.
    pub fn decide(&mut self, demand: &Demand, arena: &Arena, unsent: &impl Fn(usize) -> usize) -> Decision {
        let Demand { connection, bytes, export } = *demand;
        // First of all: whoever waits for a file system holds up nobody.
        if let Some(export) = export
            && self.is_over_export(export, bytes, arena.free_bytes())
        {
            return Decision::OverExport(export);
        }
        if (self.caps.is_some() || self.accounts[connection].client.is_some())
            && let Some(who) = self.over_cap(connection, bytes, unsent)
        {
            return Decision::OverShare(who);
        }
        let held = self.accounts[connection].slot_bytes + unsent(connection);
        // A little is for everybody.
        if held + bytes > SMALL_BYTES.min(arena.free_bytes() / SMALL_PART) {
            let decision = self.decide_large(demand, held, arena, unsent);
            if decision != Decision::Admit {
                return decision;
            }
        }
        if self.iteration_bytes > 0 && self.iteration_bytes + bytes > ITERATION_BYTES_MAX {
            self.is_exhausted = true;
            return Decision::NextIteration;
        }
        Decision::Admit
    }

    /// Of a connection that holds more than a little, or wants to.
    #[inline(never)]
    fn decide_large(
        &mut self,
        demand: &Demand,
        held: usize,
        arena: &Arena,
        unsent: &impl Fn(usize) -> usize,
    ) -> Decision {
        let Demand { connection, bytes, .. } = *demand;
        if 2 * arena.free_bytes() < arena.len()
            && let Some(who) = self.over_share(connection, bytes, arena.len(), unsent)
        {
            return Decision::OverShare(who);
        }
        if self.is_within_quota(connection, held, bytes, arena) {
            Decision::Admit
        } else if held > 0 {
            Decision::OverQuota
        } else {
            Decision::NoMemory
        }
    }

    fn is_within_quota(&self, connection: usize, held: usize, bytes: usize, arena: &Arena) -> bool {
        let (all, free) = (arena.len(), arena.free_bytes());
        if self.starved.is_some_and(|starved| starved != connection) || free < bytes + self.reserve {
            return false;
        }
        let quota = if 2 * free >= all {
            self.quota
        } else {
            self.quota * (2 * free / BLOCK_BYTES) / (all / BLOCK_BYTES)
        };
        held == 0 || held + bytes <= quota
    }

    /// Whether requests on an export hold so much that they may not have so much more: not more than they
    /// leave free for others, beyond the reserve.
    fn is_over_export(&self, export: usize, bytes: usize, free: usize) -> bool {
        let held = self.exports[export].held;
        held > 0 && held + bytes > free.saturating_sub(self.reserve.min(free / 2))
    }

    /// Whose limit, by an option or by `clients.toml`, a request for this number of bytes would exceed. One
    /// who holds nothing may have any request.
    fn over_cap(&mut self, connection: usize, bytes: usize, unsent: &impl Fn(usize) -> usize) -> Option<Who> {
        self.note_all(unsent);
        self.note(connection, unsent);
        let bytes = bytes.next_power_of_two().max(BLOCK_BYTES);
        let [session, address] = self.caps.unwrap_or([usize::MAX; 2]);
        let client = self.accounts[connection].client.map_or(usize::MAX, |(_, cap)| cap);
        let caps = [session, address, client];
        let is_over =
            |(who, group): &(Who, &mut Group)| group.held > 0 && group.held + bytes > caps[*who as usize];
        self.groups(connection).into_iter().flatten().find(is_over).map(|(who, _)| who)
    }

    /// Who has more than a share that counts while others wait, and keeps a connection from having more by
    /// that.
    fn over_share(
        &mut self,
        connection: usize,
        bytes: usize,
        arena_bytes: usize,
        unsent: &impl Fn(usize) -> usize,
    ) -> Option<Who> {
        let waiting = self.round_robin.len();
        if waiting == 0 {
            return None;
        }
        self.note_all(unsent);
        self.note(connection, unsent);
        let share = self.quota.max(arena_bytes / GROUP_PART);
        let is_over = |(who, group): &(Who, &mut Group)| {
            *who != Who::Client && group.held > 0 && group.held + bytes > share && waiting > group.waiting
        };
        self.groups(connection).into_iter().flatten().find(is_over).map(|(who, _)| who)
    }

    // Memory
    // ----------------------------------------------------------------------------------------------------

    /// Gives a request that has just come its memory, unless it has to wait: [`Admission::wait`].
    pub fn admit(
        &mut self,
        demand: &Demand,
        arena: &mut Arena,
        unsent: &impl Fn(usize) -> usize,
    ) -> Option<Slot> {
        if self.is_waiting(demand.connection) {
            return None;
        }
        match self.alloc(demand, arena, unsent) {
            Ok(slot) => Some(slot),
            Err(decision) => {
                self.count_wait(demand.connection, decision);
                None
            }
        }
    }

    /// Has a request wait for its memory.
    pub fn wait(&mut self, request: usize, demand: Demand) {
        let account = &mut self.accounts[demand.connection];
        account.waiting.push_back((request, demand));
        if !std::mem::replace(&mut account.is_waiting, true) {
            self.round_robin.push_back(demand.connection);
            self.groups(demand.connection).into_iter().flatten().for_each(|(_, group)| group.waiting += 1);
        }
    }

    /// Takes a waiting request out of its connection's FIFO.
    pub fn cancel(&mut self, connection: usize, request: usize) {
        self.accounts[connection].waiting.retain(|&(other, _)| other != request);
    }

    /// The next of the waiting requests that may have its memory, and the memory. Only small ones overtake
    /// the connection that is starved: else a large request would never have its turn.
    pub fn next(&mut self, arena: &mut Arena, unsent: &impl Fn(usize) -> usize) -> Option<(usize, Slot)> {
        if self.round_robin.is_empty() {
            return None;
        }
        // What was dropped since is free.
        arena.used_bytes();
        let mut passed_over = 0;
        while passed_over < self.round_robin.len() {
            let connection = *self.round_robin.front()?;
            let Some(&(request, demand)) = self.accounts[connection].waiting.front() else {
                self.round_robin.pop_front();
                self.waits_no_more(connection);
                self.not_starved(connection);
                continue;
            };
            let decision = match self.alloc(&demand, arena, unsent) {
                Ok(slot) => {
                    self.round_robin.rotate_left(1);
                    self.accounts[connection].waiting.pop_front();
                    return Some((request, slot));
                }
                Err(Decision::NextIteration) => return None,
                Err(decision) => decision,
            };
            self.round_robin.rotate_left(1);
            passed_over += 1;
            self.count_wait(connection, decision);
            if decision == Decision::NoMemory {
                self.starved.get_or_insert(connection);
                self.is_short = true;
            } else {
                self.not_starved(connection);
            }
            // Some of an export's memory may come back once a client sends, or is closed because it does not.
            if let Decision::OverExport(export) = decision {
                self.is_short |= self.exports[export].fetching > 0;
            }
        }
        None
    }

    fn alloc(
        &mut self,
        demand: &Demand,
        arena: &mut Arena,
        unsent: &impl Fn(usize) -> usize,
    ) -> Result<Slot, Decision> {
        match self.decide(demand, arena, unsent) {
            Decision::Admit => {}
            decision => return Err(decision),
        }
        let slot = arena.alloc(demand.bytes).ok_or(Decision::NoMemory)?;
        let Demand { connection, bytes, export } = *demand;
        self.not_starved(connection);
        self.iteration_bytes += bytes;
        let account = &mut self.accounts[connection];
        account.slot_bytes += slot.len();
        account.is_over_share = false;
        if !std::mem::replace(&mut account.is_holding, true) {
            self.holding.push(connection);
        }
        if let Some(export) = export {
            self.exports[export].held += slot.len();
        }
        Ok(slot)
    }

    /// A request is over that had a slot of so many bytes. Its connection may have gone before.
    pub fn release(&mut self, connection: Option<usize>, export: Option<usize>, slot_bytes: usize) {
        if let Some(connection) = connection {
            self.accounts[connection].slot_bytes -= slot_bytes;
        }
        if let Some(export) = export {
            self.exports[export].held -= slot_bytes;
        }
    }

    /// A request on this export begins to wait for its client's data, or does so no more.
    pub fn set_fetching(&mut self, export: Option<usize>, is_fetching: bool) {
        if let Some(export) = export {
            let fetching = &mut self.exports[export].fetching;
            *fetching = if is_fetching { *fetching + 1 } else { *fetching - 1 };
        }
    }

    // Those who wait
    // ----------------------------------------------------------------------------------------------------

    /// Connections with requests that wait.
    pub fn waiting(&self) -> impl Iterator<Item = usize> + '_ {
        self.round_robin.iter().copied()
    }

    /// Times that a request waited because of a session's and an address's share.
    pub fn share_waits(&self) -> [u64; WHO_COUNT] {
        self.share_waits
    }

    /// Somebody waits, and is to be shown within `period` that the server lives. Returns for when a timer is
    /// wanted, if there is none.
    pub fn arm_life_sign(&mut self, now: Instant, period: Duration) -> Option<Instant> {
        let is_new = self.life_sign.is_none();
        let at = *self.life_sign.get_or_insert(now + period);
        is_new.then_some(at)
    }

    /// Whether there is a life sign to come.
    pub fn has_life_sign(&self) -> bool {
        self.life_sign.is_some()
    }

    /// Whether it is due. It is armed no more then.
    pub fn take_life_sign(&mut self, now: Instant) -> bool {
        self.life_sign.take_if(|at| *at <= now).is_some()
    }

    /// Whether the next [`Admission::check_stalled`] may do anything, whatever the time.
    pub fn may_be_stalled(&self) -> bool {
        self.is_short || self.stall_check.is_some()
    }

    /// Whether connections that hold memory and make no progress are to be looked for now: others have waited
    /// for it with nothing, and do so still if it is checked again after `timeout`.
    pub fn check_stalled(&mut self, now: Instant, timeout: Duration) -> Option<StallCheck> {
        if self.stall_check.is_some_and(|at| now < at) {
            return None;
        }
        if !std::mem::take(&mut self.is_short) {
            self.stall_check = None;
            return None;
        }
        let close = self.stall_check.is_some();
        let next = now + timeout;
        self.stall_check = Some(next);
        Some(StallCheck { close, next })
    }

    fn waits_no_more(&mut self, connection: usize) {
        self.accounts[connection].is_waiting = false;
        self.groups(connection).into_iter().flatten().for_each(|(_, group)| group.waiting -= 1);
    }

    fn not_starved(&mut self, connection: usize) {
        self.starved.take_if(|starved| *starved == connection);
    }

    fn count_wait(&mut self, connection: usize, decision: Decision) {
        if let Decision::OverShare(who) = decision
            && !std::mem::replace(&mut self.accounts[connection].is_over_share, true)
        {
            self.share_waits[who as usize] += 1;
        }
    }

    // What sessions, addresses and clients hold
    // ----------------------------------------------------------------------------------------------------

    fn groups(&mut self, connection: usize) -> [Option<(Who, &mut Group)>; WHO_COUNT] {
        let Account { session, address, client, .. } = self.accounts[connection];
        let of_address = address.map(|key| (Who::Address, &mut self.addresses[key].group));
        let of_client = client.map(|(key, _)| (Who::Client, &mut self.clients[key].group));
        [Some((Who::Session, &mut self.sessions[session])), of_address, of_client]
    }

    /// Notes what a connection holds.
    fn note(&mut self, connection: usize, unsent: &impl Fn(usize) -> usize) {
        let held = self.accounts[connection].slot_bytes + unsent(connection);
        self.set_noted(connection, held);
        if held > 0 && !std::mem::replace(&mut self.accounts[connection].is_holding, true) {
            self.holding.push(connection);
        }
    }

    fn set_noted(&mut self, connection: usize, held: usize) {
        let before = std::mem::replace(&mut self.accounts[connection].noted, held);
        for (_, group) in self.groups(connection).into_iter().flatten() {
            group.held = group.held - before + held;
        }
    }

    /// Notes what all connections hold that held something.
    fn note_all(&mut self, unsent: &impl Fn(usize) -> usize) {
        if std::mem::replace(&mut self.is_noted, true) {
            return;
        }
        let mut holding = std::mem::take(&mut self.holding);
        holding.retain(|&connection| {
            self.note(connection, unsent);
            let account = &mut self.accounts[connection];
            account.is_holding = account.noted > 0;
            account.is_holding
        });
        self.holding = holding;
    }
}

#[cfg(test)]
mod tests;
