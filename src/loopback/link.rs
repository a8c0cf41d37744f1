//! The link: two ends that pass whole messages, and memory that one end exposes to the other.
//!
//! Each end has an inbox with room for so many messages (its posted receives) and an eventfd that says
//! "look": something has arrived, there is room again, or the other end has gone. Memory exposed moves into
//! the link and stays there until it is withdrawn, so whoever copies from or to it does so under the link's
//! lock and never after it was withdrawn.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::event::{EventfdFlags, eventfd};

use crate::memory::Buffers;
use crate::message::RemoteRegion;
use crate::sync::lock;

/// Receives that an end has posted before [`LoopbackEnd::set_receives`]: enough for a handshake.
const RECEIVES_DEFAULT: usize = 2;

/// What the other end may do with memory that is exposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// [`LoopbackEnd::place`].
    Write,
    /// [`LoopbackEnd::fetch`].
    Read,
}

/// Why a message was not taken.
#[derive(Debug, PartialEq, Eq)]
pub enum Rejected {
    /// The other end has no receive posted. Here is the message; the eventfd will say when there is room.
    Full(Vec<u8>),
    /// The other end has gone.
    Gone,
}

/// One end of a link. Dropping it is how a peer vanishes.
#[derive(Debug)]
pub struct LoopbackEnd {
    link: Arc<Link>,
    side: usize,
}

#[derive(Debug)]
struct Link {
    sides: Mutex<[Side; 2]>,
    eventfds: [Arc<OwnedFd>; 2],
}

#[derive(Debug)]
struct Side {
    inbox: VecDeque<Vec<u8>>,
    receives: usize,
    /// The other end found the inbox full.
    awaited: bool,
    gone: bool,
    /// Memory of this side's that the other may reach, by key.
    open: HashMap<u32, (Access, Buffers)>,
    next_key: u32,
}

impl LoopbackEnd {
    /// A new link's two ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let side = || Side {
            inbox: VecDeque::new(),
            receives: RECEIVES_DEFAULT,
            awaited: false,
            gone: false,
            open: HashMap::new(),
            next_key: 1,
        };
        let eventfd = || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map(Arc::new);
        let sides = Mutex::new([side(), side()]);
        let link = Arc::new(Link { sides, eventfds: [eventfd()?, eventfd()?] });
        Ok((Self { link: Arc::clone(&link), side: 0 }, Self { link, side: 1 }))
    }

    fn sides(&self) -> MutexGuard<'_, [Side; 2]> {
        // A panic elsewhere leaves the sides whole: every change under the lock is one step.
        lock(&self.link.sides)
    }

    fn ring(&self, side: usize) {
        // It can only fail with EAGAIN, when the counter is at its limit and the end has been told often
        // enough.
        let _ = rustix::io::write(&self.link.eventfds[side], &1u64.to_ne_bytes());
    }

    /// Readable when there is a reason to look.
    pub fn eventfd(&self) -> &Arc<OwnedFd> {
        &self.link.eventfds[self.side]
    }

    /// Says that this end is about to look: to be called before, so that what comes in between is not missed.
    pub fn look(&self) {
        let _ = rustix::io::read(&self.link.eventfds[self.side], &mut [0; 8]);
    }

    /// Makes the eventfd readable again: this end looked and left something for later.
    pub fn look_again(&self) {
        self.ring(self.side);
    }

    /// How many messages may wait for this end.
    pub fn set_receives(&self, receives: usize) {
        let mut sides = self.sides();
        sides[self.side].receives = receives;
        if std::mem::take(&mut sides[self.side].awaited) {
            self.ring(1 - self.side);
        }
    }

    /// Whether [`LoopbackEnd::send`] would not find the inbox full; stays so until this end sends. If it
    /// would, the eventfd will say when there is room.
    pub fn has_room(&self) -> bool {
        let mut sides = self.sides();
        let peer = &mut sides[1 - self.side];
        let full = peer.inbox.len() >= peer.receives && !peer.gone;
        peer.awaited |= full;
        !full
    }

    /// Sends a message.
    pub fn send(&self, message: Vec<u8>) -> Result<(), Rejected> {
        let mut sides = self.sides();
        let peer = &mut sides[1 - self.side];
        if peer.gone {
            return Err(Rejected::Gone);
        }
        if peer.inbox.len() >= peer.receives {
            peer.awaited = true;
            return Err(Rejected::Full(message));
        }
        peer.inbox.push_back(message);
        self.ring(1 - self.side);
        Ok(())
    }

    /// The next message.
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut sides = self.sides();
        let message = sides[self.side].inbox.pop_front()?;
        if std::mem::take(&mut sides[self.side].awaited) {
            self.ring(1 - self.side);
        }
        Some(message)
    }

    /// Whether the other end has gone. What it sent before can still be received.
    pub fn has_lost_peer(&self) -> bool {
        self.sides()[1 - self.side].gone
    }

    /// A key for memory that is yet to be exposed.
    pub(super) fn reserve_key(&self) -> u32 {
        let side = &mut self.sides()[self.side];
        let key = side.next_key;
        side.next_key = key.wrapping_add(1);
        key
    }

    /// Lays memory open under a key that was reserved.
    pub(super) fn lay_open_as(&self, key: u32, access: Access, buffers: Buffers) {
        self.sides()[self.side].open.insert(key, (access, buffers));
    }

    /// Lays memory open. Returns the key for it.
    pub fn expose(&self, access: Access, buffers: Buffers) -> u32 {
        let key = self.reserve_key();
        self.lay_open_as(key, access, buffers);
        key
    }

    /// Takes memory back that was exposed.
    pub fn withdraw(&self, key: u32) -> Option<Buffers> {
        self.sides()[self.side].open.remove(&key).map(|(_, buffers)| buffers)
    }

    /// Copies `data` to the front of the other end's memory. False if it has not laid that open, or if the
    /// data does not fit.
    #[must_use]
    pub fn place(&self, region: RemoteRegion, data: &[u8]) -> bool {
        let RemoteRegion::In { address, key, len } = region else { return data.is_empty() };
        let mut sides = self.sides();
        match sides[1 - self.side].open.get_mut(&key) {
            Some((Access::Write, buffers))
                if data.len() <= len as usize && within(address, len, buffers.len()) =>
            {
                buffers.write_at(address as usize, data);
                true
            }
            _ => false,
        }
    }

    /// Fills `target` from the front of the other end's memory. False if it has not laid that open, or if it
    /// is not so long.
    #[must_use]
    pub fn fetch(&self, region: RemoteRegion, mut target: &mut [u8]) -> bool {
        let RemoteRegion::Out { address, key, len } = region else { return target.is_empty() };
        let sides = self.sides();
        match sides[1 - self.side].open.get(&key) {
            Some((Access::Read, buffers))
                if target.len() <= len as usize && within(address, len, buffers.len()) =>
            {
                let start = address as usize;
                for slice in buffers.slices(start..start + target.len()) {
                    let (head, rest) = target.split_at_mut(slice.len());
                    head.copy_from_slice(slice);
                    target = rest;
                }
                true
            }
            _ => false,
        }
    }
}

/// Addresses count from the front of what was exposed.
fn within(address: u64, len: u32, open: usize) -> bool {
    address <= open as u64 && u64::from(len) <= open as u64 - address
}

impl Drop for LoopbackEnd {
    fn drop(&mut self) {
        let mut sides = self.sides();
        sides[self.side].gone = true;
        sides[self.side].open.clear();
        sides[self.side].inbox.clear();
        drop(sides);
        self.ring(1 - self.side);
    }
}
