//! The blocks of slots that were dropped: any thread gives one back, the arena's thread takes them.
//!
//! A stack whose links lie in a table. It is taken as a whole, so a link is never followed while its block
//! may be given back again. `tests/slots_model.rs` tries the interleavings of this file.

use super::atomic::{AtomicU32, AtomicU64, Ordering};

#[derive(Debug)]
pub struct Returned {
    /// The last block that was given back, and one more; 0: there is none.
    last: AtomicU32,
    /// Of each block that was given back: its order, and from bit 8 what `last` was before.
    links: Box<[AtomicU64]>,
}

impl Returned {
    /// For an arena with this number of blocks.
    pub fn new(blocks: usize) -> Self {
        Self { last: AtomicU32::new(0), links: (0..blocks).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Gives back the slot that begins with this block.
    pub fn push(&self, block: u32, order: u8) {
        let link = &self.links[block as usize];
        let mut before = self.last.load(Ordering::Relaxed);
        loop {
            link.store(u64::from(before) << 8 | u64::from(order), Ordering::Relaxed);
            // Release: who takes the block sees its link, and is behind every use of its memory.
            match self.last.compare_exchange_weak(before, block + 1, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => before = now,
            }
        }
    }

    /// Takes all, the last first: block and order.
    pub fn take(&self) -> impl Iterator<Item = (u32, u8)> {
        // A swap only if there is something: mostly there is not.
        let is_empty = self.last.load(Ordering::Relaxed) == 0;
        let mut next = if is_empty { 0 } else { self.last.swap(0, Ordering::Acquire) };
        std::iter::from_fn(move || {
            let block = next.checked_sub(1)?;
            let link = self.links[block as usize].load(Ordering::Relaxed);
            next = (link >> 8) as u32;
            Some((block, link as u8))
        })
    }
}
