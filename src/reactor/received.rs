//! The buffers that [`super::Op::Recv`] receives into: a pool that the kernel (or the epoll engine) takes one
//! from when data has arrived.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;

use crate::memory::{Arena, Slot};

/// Received bytes. Dropping it gives the buffer back to the pool.
#[derive(Debug)]
pub struct Received {
    pool: Rc<Pool>,
    index: u16,
    len: usize,
}

impl std::ops::Deref for Received {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the buffer lies within the pool's memory and is this value's alone until it is dropped:
        // neither the kernel's ring nor the free list has it. `len` is at most its size (`Pool::received`).
        unsafe { std::slice::from_raw_parts(self.pool.buffer(self.index), self.len) }
    }
}

impl std::ops::DerefMut for Received {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`: the buffer is this value's alone, and so borrowed as it is.
        unsafe { std::slice::from_raw_parts_mut(self.pool.buffer(self.index), self.len) }
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        self.pool.give_back(self.index);
    }
}

pub(super) struct Pool {
    /// Holds all buffers; shared with the kernel, each buffer the kernel's while it is in the ring or the
    /// free list, the holder's of its `Received` otherwise.
    memory: Slot,
    buffer_bytes: usize,
    count: u16,
    /// For the epoll engine: buffers that nobody has.
    free: RefCell<Vec<u16>>,
    /// For the ring engine: the kernel's ring of buffers, and our tail in it.
    ring: Option<Slot>,
    tail: Cell<u16>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("count", &self.count).field("buffer_bytes", &self.buffer_bytes).finish()
    }
}

impl Pool {
    /// `count` must be a power of two (the kernel wants it).
    pub fn new(count: u16, buffer_bytes: u32, with_ring: bool) -> io::Result<Rc<Self>> {
        assert!(count.is_power_of_two());
        let whole = |bytes: usize| {
            let slot = Arena::new(bytes, bytes)?.alloc(bytes);
            slot.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
        };
        let buffer_bytes = buffer_bytes as usize;
        let pool = Self {
            memory: whole(usize::from(count) * buffer_bytes)?,
            buffer_bytes,
            count,
            free: RefCell::new(Vec::new()),
            ring: if with_ring { Some(whole(usize::from(count) * size_of::<BufRingEntry>())?) } else { None },
            tail: Cell::new(0),
        };
        for index in 0..count {
            pool.give_back(index);
        }
        Ok(Rc::new(pool))
    }

    fn buffer(&self, index: u16) -> *mut u8 {
        debug_assert!(index < self.count);
        // SAFETY: the memory holds `count` buffers of this size.
        unsafe { self.memory.as_ptr().add(usize::from(index) * self.buffer_bytes) }
    }

    /// The address of the kernel's ring of buffers, for registration.
    pub fn ring_address(&self) -> u64 {
        self.ring.as_ref().map_or(0, |ring| ring.as_ptr() as u64)
    }

    pub fn count(&self) -> u16 {
        self.count
    }

    /// A buffer that the kernel has filled.
    pub fn received(self: &Rc<Self>, index: u16, len: usize) -> Received {
        assert!(index < self.count && len <= self.buffer_bytes);
        Received { pool: Rc::clone(self), index, len }
    }

    /// Fills a free buffer by `fill`, which is given its address and size. None if no buffer is free.
    pub fn fill(
        self: &Rc<Self>,
        fill: impl FnOnce(*mut u8, usize) -> io::Result<usize>,
    ) -> Option<io::Result<Received>> {
        let index = self.free.borrow_mut().pop()?;
        Some(match fill(self.buffer(index), self.buffer_bytes) {
            Ok(len) => Ok(self.received(index, len)),
            Err(error) => {
                self.give_back(index);
                Err(error)
            }
        })
    }

    fn give_back(&self, index: u16) {
        let Some(ring) = &self.ring else {
            self.free.borrow_mut().push(index);
            return;
        };
        let base: *mut BufRingEntry = ring.as_ptr().cast();
        let tail = self.tail.get();
        let at = usize::from(tail & (self.count - 1));
        // SAFETY: the ring has `count` entries and `at` is less; the kernel reads an entry only after the
        // tail has passed it, and there are never more than `count` buffers, so it is not reading this one.
        // The tail lies in the reserved field of the first entry, is written by us alone, and is read by the
        // kernel with acquire semantics.
        unsafe {
            let entry = &mut *base.add(at);
            entry.set_addr(self.buffer(index) as u64);
            entry.set_len(self.buffer_bytes as u32);
            entry.set_bid(index);
            let tail_address = BufRingEntry::tail(base).cast::<AtomicU16>();
            (*tail_address).store(tail.wrapping_add(1), Ordering::Release);
        }
        self.tail.set(tail.wrapping_add(1));
    }
}
