//! Handles with magic numbers: what C's opaque pointers point at.

use std::cell::UnsafeCell;
use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::tuning::HANDLE_QUARANTINE;
use raio_transport::sync::lock;

/// What an opaque C pointer points at. Never unmapped; the magic number is there while it has content.
#[repr(C)]
pub struct Handle<T> {
    magic: AtomicUsize,
    content: UnsafeCell<Option<T>>,
}

impl<T> Handle<T> {
    /// The magic number of a handle at this address that has content.
    fn magic_of(pointer: *mut Self) -> usize {
        pointer.addr() ^ 0x0172_6169_6f21_9d3b ^ size_of::<T>()
    }

    /// A handle with this content.
    pub(super) fn create(pool: &Mutex<VecDeque<usize>>, content: T) -> *mut Self {
        let mut pool = lock(pool);
        let reused = if pool.len() > HANDLE_QUARANTINE { pool.pop_front() } else { None };
        drop(pool);
        let pointer = match reused {
            Some(address) => std::ptr::with_exposed_provenance_mut::<Self>(address),
            None => {
                let handle = Self { magic: AtomicUsize::new(0), content: UnsafeCell::new(None) };
                let pointer = Box::into_raw(Box::new(handle));
                pointer.expose_provenance();
                pointer
            }
        };
        // SAFETY: the pointer is of a handle that was leaked on purpose, and as it is neither live nor in the
        // pool any more, nobody else reaches its content.
        unsafe {
            *(*pointer).content.get() = Some(content);
            (*pointer).magic.store(Self::magic_of(pointer), Ordering::Release);
        }
        pointer
    }

    /// Whether this is a handle with content.
    ///
    /// # Safety
    /// `pointer` is null, or points at readable memory of a handle's size. (Any such memory will do: that is
    /// what the magic number is for.)
    unsafe fn is_live(pointer: *mut Self) -> bool {
        !pointer.is_null()
            && pointer.is_aligned()
            // SAFETY: the caller vouches that the memory is readable; an integer may have any bits.
            && unsafe { (*pointer).magic.load(Ordering::Acquire) } == Self::magic_of(pointer)
    }

    /// The content, if this is a live handle.
    ///
    /// # Safety
    /// As [`Handle::is_live`]; and no other reference to the content is in use while this one is: the header
    /// gives a context, and what belongs to it, to one thread at a time.
    pub(super) unsafe fn get<'a>(pointer: *mut Self) -> Option<&'a mut T> {
        // SAFETY: the caller's contract is the same.
        if !unsafe { Self::is_live(pointer) } {
            return None;
        }
        // SAFETY: the magic number says that this is a live handle of ours; the caller vouches for exclusive
        // use.
        unsafe { (*(*pointer).content.get()).as_mut() }
    }

    /// Takes the content out, and returns the handle to the pool.
    ///
    /// # Safety
    /// As [`Handle::get`].
    pub(super) unsafe fn destroy(pool: &Mutex<VecDeque<usize>>, pointer: *mut Self) -> Option<T> {
        // SAFETY: the caller's contract is the same.
        if !unsafe { Self::is_live(pointer) } {
            return None;
        }
        // SAFETY: as in `get`; clearing the magic number first makes later calls see an empty handle.
        let content = unsafe {
            (*pointer).magic.store(0, Ordering::Release);
            (*(*pointer).content.get()).take()
        };
        lock(pool).push_back(pointer.expose_provenance());
        content
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destroyed_handle_is_found_empty_until_it_is_reused() {
        // Static, as those of the library, for handles are never freed: who looks for leaks finds them here.
        static POOL: Mutex<VecDeque<usize>> = Mutex::new(VecDeque::new());
        let pool = &POOL;
        let first = Handle::create(pool, 1u32);
        // SAFETY: every pointer is of this test's own handles, or null.
        unsafe {
            assert_eq!(Handle::get(first), Some(&mut 1));
            assert_eq!(Handle::<u32>::get(std::ptr::null_mut()), None);
            assert_eq!(Handle::destroy(pool, first), Some(1));
            assert_eq!(Handle::get(first), None);
            assert_eq!(Handle::destroy(pool, first), None, "once");
            for n in 0..HANDLE_QUARANTINE as u32 {
                let other = Handle::create(pool, n);
                assert_ne!(other, first);
                Handle::destroy(pool, other);
            }
            assert_eq!(Handle::create(pool, 2), first, "the oldest comes first");
            Handle::destroy(pool, first);
        }
    }

    #[test]
    fn other_memory_is_no_handle() {
        let mut zeros = Handle { magic: AtomicUsize::new(0), content: UnsafeCell::new(Some(3u64)) };
        // SAFETY: it is readable memory of a handle's size.
        assert_eq!(unsafe { Handle::get(&raw mut zeros) }, None);
    }
}
