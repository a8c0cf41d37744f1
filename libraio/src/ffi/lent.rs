//! The lent buffers that a program has, by the handle in their event.

#![deny(unsafe_code)]

use std::ffi::c_ulonglong;

use raio_transport::memory::Buffers;

/// A handle is a generation and an index, and never 0.
#[derive(Default)]
pub(super) struct LentBuffers {
    entries: Vec<(u32, Option<Buffers>)>,
    free: Vec<u32>,
}

impl LentBuffers {
    pub(super) fn add(&mut self, buffers: Buffers) -> c_ulonglong {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push((1, None));
            self.entries.len() as u32 - 1
        });
        let (generation, entry) = &mut self.entries[index as usize];
        *entry = Some(buffers);
        c_ulonglong::from(*generation) << 32 | c_ulonglong::from(index)
    }

    pub(super) fn take(&mut self, handle: c_ulonglong) -> Option<Buffers> {
        let index = handle as u32;
        let (generation, entry) = self.entries.get_mut(index as usize)?;
        if c_ulonglong::from(*generation) != handle >> 32 {
            return None;
        }
        let buffers = entry.take()?;
        // Never 0, so that no handle is.
        *generation = generation.checked_add(1).unwrap_or(1);
        self.free.push(index);
        Some(buffers)
    }
}

#[cfg(test)]
mod tests {
    use raio_transport::memory::Buffer;

    use super::*;

    #[test]
    fn a_handle_is_good_for_one_return() {
        let mut lent = LentBuffers::default();
        let buffers = || Buffers::One(Buffer::Owned(vec![7; 3].into()));
        let first = lent.add(buffers());
        assert_ne!(first, 0);
        assert_eq!(lent.take(first).map(|buffers| buffers.len()), Some(3));
        assert!(lent.take(first).is_none());
        let second = lent.add(buffers());
        assert_ne!(second, first, "its place is used again, its handle is not");
        assert!(lent.take(first).is_none());
        assert!(lent.take(0).is_none() && lent.take(u64::MAX).is_none());
        assert!(lent.take(second).is_some());
    }
}
