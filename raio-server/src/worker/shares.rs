//! What sessions, the clients of one address, and the requests on one export have of a worker's memory.
//!
//! What requests on an export hold is counted exactly, those of clients that have gone among them. For its
//! file system may hang, and memory that it holds then comes back from nobody.
//!
//! What sessions and addresses have changes with every request and every send, and only counts where memory
//! is short or an option limits it. So it is noted, once in an iteration and for those connections alone that
//! have got memory, when the sums are asked for.

use std::collections::HashMap;
use std::net::IpAddr;

use raio_transport::memory::BLOCK_BYTES;
use raio_transport::transport::ServerTransport;
use slab::Slab;

use super::Worker;
use super::connection::Connection;
use crate::limits::{AddressAccount, Who};
use crate::request::{Request, State, Work};

/// While others wait, and half of the memory is in use, a session or an address may have this part of all.
const SHARE: usize = 4;

/// What the connections of one session, or from one address, have here.
#[derive(Debug, Default)]
pub(super) struct Holder {
    /// Memory, as it was noted.
    held: usize,
    /// How many of them wait for memory.
    waiting: usize,
}

/// A connection's part in what its session and its address have.
#[derive(Debug)]
pub(super) struct Share {
    /// What all workers count for its address.
    pub(super) account: AddressAccount,
    /// Its address, in [`Addresses`].
    address: Option<usize>,
    /// Memory, as it was noted: a part of [`Holder::held`].
    noted: usize,
    /// It is in `Worker::holding`.
    is_holding: bool,
    /// Its next request waits because of a limit, and that has been counted.
    pub(super) is_limited: bool,
}

impl Share {
    pub(super) fn new(account: AddressAccount, address: Option<usize>) -> Self {
        Self { account, address, noted: 0, is_holding: false, is_limited: false }
    }

    /// The connection has got memory. Returns whether it is to be entered in `Worker::holding`.
    pub(super) fn begins_to_hold(&mut self) -> bool {
        self.is_limited = false;
        !std::mem::replace(&mut self.is_holding, true)
    }
}

/// The addresses that connections are from.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    all: Slab<Address>,
    by_ip: HashMap<IpAddr, usize>,
}

#[derive(Debug)]
struct Address {
    ip: IpAddr,
    connections: usize,
    holder: Holder,
}

impl Addresses {
    /// A connection from this address has opened. Returns the address's place, for [`Share::new`].
    pub(super) fn join(&mut self, ip: IpAddr) -> usize {
        let all = &mut self.all;
        let new = || all.insert(Address { ip, connections: 0, holder: Holder::default() });
        let key = *self.by_ip.entry(ip).or_insert_with(new);
        self.all[key].connections += 1;
        key
    }

    fn leave(&mut self, key: usize) {
        self.all[key].connections -= 1;
        if self.all[key].connections == 0 {
            self.by_ip.remove(&self.all.remove(key).ip);
        }
    }
}

/// What the requests on one export have.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OfExport {
    /// Memory.
    held: usize,
    /// How many of them wait for their clients to send data.
    fetching: usize,
}

impl Worker {
    /// Whether requests on an export hold so much memory that they may not have so much more: not more than
    /// they leave free for others, beyond the reserve.
    pub(super) fn is_over_export(&self, export: usize, bytes: usize) -> bool {
        let (held, free) = (self.of_exports[export].held, self.arena.free_bytes());
        held > 0 && held + bytes > free.saturating_sub(self.reserve_bytes.min(free / 2))
    }

    /// The account for a request's memory. If there is no other export its requests may have all.
    pub(super) fn export_of(&self, work: &Work) -> Option<usize> {
        if self.of_exports.len() > 1 { work.export() } else { None }
    }

    /// Whether some of an export's memory may come back once a client sends, or is closed because it does
    /// not.
    pub(super) fn is_fetching(&self, export: usize) -> bool {
        self.of_exports[export].fetching > 0
    }

    /// A request has got its slot.
    pub(super) fn export_holds(&mut self, request: usize) {
        let request = &self.requests[request];
        if let Some(export) = request.export {
            self.of_exports[export].held += request.slot_bytes;
        }
    }

    /// A request begins to wait for its data, or does not any more.
    pub(super) fn export_fetches(&mut self, request: usize, begins: bool) {
        if let Some(export) = self.requests[request].export {
            let fetching = &mut self.of_exports[export].fetching;
            *fetching = if begins { *fetching + 1 } else { *fetching - 1 };
        }
    }

    /// Takes out a request that is over.
    pub(super) fn remove_request(&mut self, key: usize) -> Request {
        if self.requests[key].state == State::Fetching {
            self.export_fetches(key, false);
        }
        let request = self.requests.remove(key);
        self.in_state[request.state as usize] -= 1;
        if let Some(export) = request.export {
            self.of_exports[export].held -= request.slot_bytes;
        }
        request
    }

    fn holders(&mut self, connection: usize) -> [Option<(Who, &mut Holder)>; 2] {
        let Connection { session, share, .. } = &self.connections[connection];
        let of_address = share.address.map(|key| (Who::Address, &mut self.addresses.all[key].holder));
        [Some((Who::Session, &mut self.sessions[*session].holder)), of_address]
    }

    /// A connection has requests that wait for memory: it takes turns with the others.
    pub(super) fn waits(&mut self, connection: usize) {
        if !std::mem::replace(&mut self.connections[connection].is_waiting, true) {
            self.round_robin.push_back(connection);
            self.waiting += 1;
            self.promise_life_sign();
            self.holders(connection).into_iter().flatten().for_each(|(_, holder)| holder.waiting += 1);
        }
    }

    /// It has none any more.
    pub(super) fn waits_no_more(&mut self, connection: usize) {
        self.connections[connection].is_waiting = false;
        self.waiting -= 1;
        self.holders(connection).into_iter().flatten().for_each(|(_, holder)| holder.waiting -= 1);
    }

    /// Notes what a connection holds.
    fn note(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        let held = connection.slot_bytes + self.transport.unsent_bytes(connection.id);
        self.set_noted(key, held);
        if held > 0 && !std::mem::replace(&mut self.connections[key].share.is_holding, true) {
            self.holding.push(key);
        }
    }

    fn set_noted(&mut self, key: usize, held: usize) {
        let before = std::mem::replace(&mut self.connections[key].share.noted, held);
        for (_, holder) in self.holders(key).into_iter().flatten() {
            holder.held = holder.held - before + held;
        }
    }

    /// Notes what all connections hold that held something.
    fn note_all(&mut self) {
        if std::mem::replace(&mut self.is_noted, true) {
            return;
        }
        let mut holding = std::mem::take(&mut self.holding);
        holding.retain(|&key| {
            self.note(key);
            let share = &mut self.connections[key].share;
            share.is_holding = share.noted > 0;
            share.is_holding
        });
        self.holding = holding;
    }

    /// A connection has ended.
    pub(super) fn forget_share(&mut self, key: usize) {
        self.set_noted(key, 0);
        let share = &self.connections[key].share;
        if share.is_holding {
            self.holding.retain(|&other| other != key);
        }
        if let Some(address) = share.address {
            self.addresses.leave(address);
        }
    }

    /// Who has so much that an option keeps a connection from having so much more. Whoever holds nothing may
    /// have any request.
    pub(super) fn over_cap(&mut self, connection: usize, bytes: usize) -> Option<Who> {
        self.note_all();
        self.note(connection);
        let (bytes, caps) = (bytes.next_power_of_two().max(BLOCK_BYTES), self.shared.memory_caps);
        let is_over =
            |(who, holder): &(Who, &mut Holder)| holder.held > 0 && holder.held + bytes > caps[*who as usize];
        self.holders(connection).into_iter().flatten().find(is_over).map(|(who, _)| who)
    }

    /// Who has more than a share that counts while others wait, and keeps a connection from having more by
    /// that.
    pub(super) fn over_share(&mut self, connection: usize, bytes: usize) -> Option<Who> {
        if self.waiting == 0 {
            return None;
        }
        self.note_all();
        self.note(connection);
        let (share, waiting) = (self.share_bytes.max(self.arena.len() / SHARE), self.waiting);
        let is_over = |(_, holder): &(Who, &mut Holder)| {
            holder.held > 0 && holder.held + bytes > share && waiting > holder.waiting
        };
        self.holders(connection).into_iter().flatten().find(is_over).map(|(who, _)| who)
    }

    /// Counts that a connection's next request waits because somebody has as much as they may.
    pub(super) fn is_limited(&mut self, connection: usize, who: Who) {
        if !std::mem::replace(&mut self.connections[connection].share.is_limited, true) {
            self.counters.memory_waits[who as usize].add(1);
        }
    }
}
