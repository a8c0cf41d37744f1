//! The buffers that a context lends for reads: mapped when they are first needed, and reused.

use std::io;

use raio_transport::memory::{Arena, ArenaMemory, Buffer};

use crate::tuning::LENT_BYTES_MIN;

/// Lent buffers. Each returns to its arena when it is dropped; here they are counted.
#[derive(Debug)]
pub(crate) struct LentPool {
    arenas: Vec<Arena>,
    /// Buffers that are being read into or are with the caller.
    lent: usize,
    max: usize,
}

impl LentPool {
    /// Lends at most `max` buffers at a time.
    pub(crate) fn new(max: usize) -> Self {
        Self { arenas: Vec::new(), lent: 0, max }
    }

    /// Whether fewer than the most are lent out.
    pub(crate) fn has_buffer(&self) -> bool {
        self.lent < self.max
    }

    /// Lends a buffer of `length` bytes. An arena that is mapped for it, and for others of up to
    /// `io_bytes_max`, is passed to `register`.
    pub(crate) fn lend<E>(
        &mut self,
        length: usize,
        io_bytes_max: usize,
        register: impl FnOnce(&ArenaMemory) -> Result<(), E>,
    ) -> io::Result<Buffer>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let found = self.arenas.iter_mut().rev().find_map(|arena| arena.alloc(length));
        let slot = match found {
            Some(slot) => slot,
            None => {
                let mapped: usize = self.arenas.iter().map(Arena::len).sum();
                let mut arena = Arena::new(mapped.max(LENT_BYTES_MIN), io_bytes_max.max(length))?;
                let slot = arena.alloc(length).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
                register(&arena.memory()).map_err(io::Error::other)?;
                self.arenas.push(arena);
                slot
            }
        };
        self.lent += 1;
        Ok(Buffer::Slot(slot, length))
    }

    /// Counts a buffer that was dropped.
    pub(crate) fn take_back(&mut self) {
        self.lent = self.lent.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn buffers_are_bounded_in_number_and_their_memory_is_registered_once() {
        let mut pool = LentPool::new(2);
        let mut registered = 0;
        let mut lend = |pool: &mut LentPool| {
            pool.lend(4096, 65_536, |_| {
                registered += 1;
                Ok::<_, Infallible>(())
            })
        };
        let first = lend(&mut pool).unwrap();
        let second = lend(&mut pool).unwrap();
        assert!(!pool.has_buffer());
        drop(first);
        pool.take_back();
        assert!(pool.has_buffer());
        lend(&mut pool).unwrap();
        assert_eq!((second.len(), registered), (4096, 1));
    }

    #[test]
    fn an_arena_that_cannot_be_registered_is_not_used() {
        let mut pool = LentPool::new(2);
        let failure = || raio_transport::Error::Unsupported("no".into());
        assert!(pool.lend(10, 65_536, |_| Err(failure())).is_err());
        assert!(pool.has_buffer() && pool.arenas.is_empty());
    }
}
