//! Memory that the server may reach: what the program has registered, its arenas, and bounce slots for all
//! else.
//!
//! Where the device has memory windows, a registration itself gives the server no access: each request has a
//! window of its own, for the length and the direction of its data (`windows`). Elsewhere a registration has
//! two keys, for a request gives out only the one that it needs; but each of them is of the whole
//! registration, and stays until the connection ends.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::device::{Access, Domain, Mr};
use crate::error::Error;
use crate::memory::{Arena, ArenaMemory, Buffer, Buffers, Mapping, Region, Slot};
use crate::tuning::RDMA_BOUNCE_BYTES_MIN;

#[derive(Debug)]
pub(super) struct Registration {
    regions: HashMap<u64, Registered>,
    arenas: Vec<(Arc<Mapping>, Registered)>,
    bounce: Vec<(Arena, Registered)>,
    /// The longest slot that is asked for.
    slot_bytes_max: usize,
    has_windows: bool,
    /// Last, for the keys are of it.
    domain: Arc<Domain>,
}

/// Registered memory.
#[derive(Debug)]
enum Registered {
    /// Windows are bound to it.
    ForWindows(Arc<Mr>),
    Whole {
        /// For the server to write. None for memory that cannot be written to at all.
        write: Option<Mr>,
        /// For the server to read.
        read: Mr,
    },
}

/// The key by which the server reaches a request's data.
#[derive(Debug)]
pub(super) enum Key {
    /// That of the whole registration.
    OfAll(u32),
    /// That of a window which is to be bound to this.
    OfWindow(Arc<Mr>),
}

/// Where the server reaches a request's data.
#[derive(Debug)]
pub(super) struct Reached {
    pub address: u64,
    pub key: Key,
    /// What is reached in place of the request's buffers.
    pub bounce: Option<Slot>,
}

impl Registered {
    fn of_mapping(domain: &Arc<Domain>, mapping: &Arc<Mapping>, has_windows: bool) -> Result<Self, Error> {
        let of = |access| Mr::of_mapping(domain, mapping, access);
        Ok(if has_windows {
            Self::ForWindows(Arc::new(of(Access::LocalWriteWindows)?))
        } else {
            Self::Whole { write: Some(of(Access::RemoteWrite)?), read: of(Access::RemoteRead)? }
        })
    }

    /// The key for one direction.
    fn key(&self, is_in: bool) -> Option<Key> {
        match self {
            Self::ForWindows(mr) => Some(Key::OfWindow(Arc::clone(mr))),
            Self::Whole { write, .. } if is_in => write.as_ref().map(|write| Key::OfAll(write.rkey())),
            Self::Whole { read, .. } => Some(Key::OfAll(read.rkey())),
        }
    }
}

impl Registration {
    /// Nothing is registered yet. No request has more than `data_bytes_max`.
    pub fn new(domain: Arc<Domain>, data_bytes_max: usize, has_windows: bool) -> Self {
        Self {
            regions: HashMap::new(),
            arenas: Vec::new(),
            bounce: Vec::new(),
            slot_bytes_max: data_bytes_max,
            has_windows,
            domain,
        }
    }

    pub fn device_name(&self) -> String {
        self.domain.device.name()
    }

    pub fn add_region(&mut self, region: &Region) -> Result<(), Error> {
        let writable = |access| match Mr::of_region(&self.domain, region, access) {
            Ok(mr) => Ok(Some(mr)),
            // It is mapped for reading: good for writes to a file.
            Err(error) if error.errno() == libc::EFAULT => Ok(None),
            Err(error) => Err(error),
        };
        let registered = if self.has_windows {
            let Some(mr) = writable(Access::LocalWriteWindows)? else {
                // The kernel binds windows to writable memory only. Other memory is copied: a key of all of
                // it would give the server more than its requests do. But it must be memory.
                Mr::of_region(&self.domain, region, Access::Local)?;
                return Ok(());
            };
            Registered::ForWindows(Arc::new(mr))
        } else {
            let write = writable(Access::RemoteWrite)?;
            Registered::Whole { write, read: Mr::of_region(&self.domain, region, Access::RemoteRead)? }
        };
        self.regions.insert(region.number(), registered);
        Ok(())
    }

    /// Returns what windows may yet be bound to: it is deregistered once that is dropped and they are
    /// invalidated.
    pub fn remove_region(&mut self, region: &Region) -> Option<Arc<Mr>> {
        match self.regions.remove(&region.number())? {
            Registered::ForWindows(mr) => Some(mr),
            Registered::Whole { .. } => None,
        }
    }

    pub fn add_arena(&mut self, arena: &ArenaMemory) -> Result<(), Error> {
        let registered = Registered::of_mapping(&self.domain, arena.mapping(), self.has_windows)?;
        self.arenas.push((Arc::clone(arena.mapping()), registered));
        Ok(())
    }

    /// Has the server reach these buffers, or a bounce slot in their place, with their data if it is to read.
    pub fn expose(&mut self, buffers: &Buffers, is_in: bool) -> Result<Reached, Error> {
        let len = buffers.len();
        if len == 0 {
            return Ok(Reached { address: 0, key: Key::OfAll(0), bounce: None });
        }
        if let Some((address, key)) = self.reachable(buffers, is_in) {
            return Ok(Reached { address, key, bounce: None });
        }
        let (mut slot, key) = self.bounce(len, is_in)?;
        if !is_in {
            let mut rest = slot.bytes_mut();
            for part in buffers.slices(0..len) {
                let (now, later) = rest.split_at_mut(part.len());
                now.copy_from_slice(part);
                rest = later;
            }
        }
        let address = slot.bytes().as_ptr().expose_provenance() as u64;
        Ok(Reached { address, key, bounce: Some(slot) })
    }

    /// The address and key of memory for the server, if it can reach this by itself.
    fn reachable(&self, buffers: &Buffers, is_in: bool) -> Option<(u64, Key)> {
        let [buffer] = buffers.pieces() else { return None };
        let registered = match buffer.origin() {
            Buffer::Raw(raw) => self.regions.get(&raw.region()?.number())?,
            Buffer::Slot(slot, _) => &self.arenas.iter().find(|(mapping, _)| slot.is_of(mapping))?.1,
            Buffer::Owned(_) | Buffer::Part(_) => return None,
        };
        let key = registered.key(is_in)?;
        Some((buffer.bytes().as_ptr().expose_provenance() as u64, key))
    }

    /// A slot for data whose memory is not registered, with the key for the server.
    fn bounce(&mut self, len: usize, is_in: bool) -> Result<(Slot, Key), Error> {
        let found = self
            .bounce
            .iter_mut()
            .rev()
            .find_map(|(arena, registered)| Some((arena.alloc(len)?, registered)));
        let (slot, registered) = match found {
            Some((slot, registered)) => (slot, registered),
            None => {
                let mapped: usize = self.bounce.iter().map(|(arena, _)| arena.len()).sum();
                let bytes = mapped.max(RDMA_BOUNCE_BYTES_MIN);
                let no_memory = |source| {
                    Error::io("There is no memory for data that is not registered; free some", source)
                };
                let mut arena = Arena::new(bytes, self.slot_bytes_max).map_err(no_memory)?;
                let slot =
                    arena.alloc(len).ok_or_else(|| no_memory(std::io::ErrorKind::OutOfMemory.into()))?;
                let registered = Registered::of_mapping(&self.domain, &arena.mapping(), self.has_windows)?;
                self.bounce.push((arena, registered));
                let Some((_, registered)) = self.bounce.last_mut() else {
                    unreachable!("it was just pushed")
                };
                (slot, registered)
            }
        };
        let Some(key) = registered.key(is_in) else { unreachable!("our own memory can be written to") };
        Ok((slot, key))
    }

    /// Leaves it to the process that a forked child was copied from.
    pub fn forget(&mut self) {
        std::mem::forget((std::mem::take(&mut self.regions), std::mem::take(&mut self.arenas)));
        std::mem::forget((std::mem::take(&mut self.bounce), Arc::clone(&self.domain)));
    }
}
