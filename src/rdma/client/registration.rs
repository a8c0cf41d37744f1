//! Memory that the server may reach: what the program has registered, its arenas, and bounce slots for all
//! else. Each has two keys, for an access gives out only the one that it needs.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::device::{Access, Domain, Mr};
use crate::error::Error;
use crate::memory::{Arena, ArenaMemory, Buffer, Buffers, Mapping, Region, Slot};
use crate::tuning::RDMA_BOUNCE_BYTES_MIN;

#[derive(Debug)]
pub(super) struct Registration {
    regions: HashMap<u64, Keys>,
    arenas: Vec<(Arc<Mapping>, Keys)>,
    bounce: Vec<(Arena, Keys)>,
    /// The longest slot that is asked for.
    slot_bytes_max: usize,
    /// Last, for the keys are of it.
    domain: Arc<Domain>,
}

/// The keys of memory, by the direction that they allow.
#[derive(Debug)]
struct Keys {
    /// For the server to write. None for memory that cannot be written to at all.
    write: Option<Mr>,
    /// For the server to read.
    read: Mr,
}

/// Where the server reaches a request's data.
#[derive(Debug)]
pub(super) struct Reached {
    pub address: u64,
    pub key: u32,
    /// What is reached in place of the request's buffers.
    pub bounce: Option<Slot>,
}

impl Keys {
    fn of_mapping(domain: &Arc<Domain>, mapping: &Arc<Mapping>) -> Result<Self, Error> {
        Ok(Self {
            write: Some(Mr::of_mapping(domain, mapping, Access::RemoteWrite)?),
            read: Mr::of_mapping(domain, mapping, Access::RemoteRead)?,
        })
    }

    /// The key for one direction.
    fn key(&self, is_in: bool) -> Option<u32> {
        if is_in { self.write.as_ref().map(Mr::rkey) } else { Some(self.read.rkey()) }
    }
}

impl Registration {
    /// Nothing is registered yet. No request has more than `data_bytes_max`.
    pub fn new(domain: Arc<Domain>, data_bytes_max: usize) -> Self {
        Self {
            regions: HashMap::new(),
            arenas: Vec::new(),
            bounce: Vec::new(),
            slot_bytes_max: data_bytes_max,
            domain,
        }
    }

    pub fn device_name(&self) -> String {
        self.domain.device.name()
    }

    pub fn add_region(&mut self, region: &Region) -> Result<(), Error> {
        let write = match Mr::of_region(&self.domain, region, Access::RemoteWrite) {
            Ok(write) => Some(write),
            // It is mapped for reading: good for writes to a file.
            Err(error) if error.errno() == libc::EFAULT => None,
            Err(error) => return Err(error),
        };
        let keys = Keys { write, read: Mr::of_region(&self.domain, region, Access::RemoteRead)? };
        self.regions.insert(region.number(), keys);
        Ok(())
    }

    pub fn remove_region(&mut self, region: &Region) {
        self.regions.remove(&region.number());
    }

    pub fn add_arena(&mut self, arena: &ArenaMemory) -> Result<(), Error> {
        let keys = Keys::of_mapping(&self.domain, arena.mapping())?;
        self.arenas.push((Arc::clone(arena.mapping()), keys));
        Ok(())
    }

    /// Has the server reach these buffers, or a bounce slot in their place, with their data if it is to read.
    pub fn expose(&mut self, buffers: &Buffers, is_in: bool) -> Result<Reached, Error> {
        let len = buffers.len();
        if len == 0 {
            return Ok(Reached { address: 0, key: 0, bounce: None });
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
    fn reachable(&self, buffers: &Buffers, is_in: bool) -> Option<(u64, u32)> {
        let [buffer] = buffers.pieces() else { return None };
        let keys = match buffer.origin() {
            Buffer::Raw(raw) => self.regions.get(&raw.region()?.number())?,
            Buffer::Slot(slot, _) => &self.arenas.iter().find(|(mapping, _)| slot.is_of(mapping))?.1,
            Buffer::Owned(_) | Buffer::Part(_) => return None,
        };
        let key = keys.key(is_in)?;
        Some((buffer.bytes().as_ptr().expose_provenance() as u64, key))
    }

    /// A slot for data whose memory is not registered, with the key for the server.
    fn bounce(&mut self, len: usize, is_in: bool) -> Result<(Slot, u32), Error> {
        let found = self.bounce.iter_mut().rev().find_map(|(arena, keys)| Some((arena.alloc(len)?, keys)));
        let (slot, keys) = match found {
            Some((slot, keys)) => (slot, keys),
            None => {
                let mapped: usize = self.bounce.iter().map(|(arena, _)| arena.len()).sum();
                let bytes = mapped.max(RDMA_BOUNCE_BYTES_MIN);
                let no_memory = |source| {
                    Error::io("There is no memory for data that is not registered; free some", source)
                };
                let mut arena = Arena::new(bytes, self.slot_bytes_max).map_err(no_memory)?;
                let slot =
                    arena.alloc(len).ok_or_else(|| no_memory(std::io::ErrorKind::OutOfMemory.into()))?;
                let keys = Keys::of_mapping(&self.domain, &arena.mapping())?;
                self.bounce.push((arena, keys));
                let Some((_, keys)) = self.bounce.last_mut() else { unreachable!("it was just pushed") };
                (slot, keys)
            }
        };
        let Some(key) = keys.key(is_in) else { unreachable!("our own memory can be written to") };
        Ok((slot, key))
    }

    /// Leaves it to the process that a forked child was copied from.
    pub fn forget(&mut self) {
        std::mem::forget((std::mem::take(&mut self.regions), std::mem::take(&mut self.arenas)));
        std::mem::forget((std::mem::take(&mut self.bounce), Arc::clone(&self.domain)));
    }
}
