//! A vectored send: small bytes (headers) and slots, in order.

use std::collections::VecDeque;
use std::ops::Range;

use crate::memory::{Arena, SlotRange};
use crate::tuning::{FILLED_BYTES_MAX, SEND_BYTES_MAX};

/// The most pieces that one sendmsg(2) takes.
const IOV_MAX: usize = 1024;

/// What one connection is to send, in order. While the kernel has it, it is inside the reactor.
#[derive(Default)]
pub struct SendBatch {
    bytes: Vec<u8>,
    pieces: VecDeque<Piece>,
    /// Bytes of [`SendBatch::push_filled`] since it was last empty.
    filled: usize,
    /// What the kernel reads; rebuilt for each send.
    iov: Vec<libc::iovec>,
    msghdr: Option<libc::msghdr>,
}

#[derive(Debug)]
enum Piece {
    Bytes(Range<usize>),
    Slot(SlotRange),
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Self::Bytes(range) => range.len(),
            Self::Slot(range) => range.len,
        }
    }
}

impl SendBatch {
    /// Appends what `write` appends to the vector.
    pub fn push_bytes(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.bytes.len();
        write(&mut self.bytes);
        let end = self.bytes.len();
        if start == end {
            return;
        }
        match self.pieces.back_mut() {
            Some(Piece::Bytes(range)) if range.end == start => range.end = end,
            _ => self.pieces.push_back(Piece::Bytes(start..end)),
        }
    }

    /// Appends a part of a slot. The slot comes free when it has been sent.
    pub fn push_slot(&mut self, range: SlotRange) {
        debug_assert!(range.start + range.len <= range.slot.len());
        if range.len > 0 {
            self.pieces.push_back(Piece::Slot(range));
        }
    }

    /// Appends `len` bytes that `fill` writes: behind what is in the last slot if that has room, else in a
    /// new one from `arena`, which has room for `expected` bytes if that is not too much. One after another
    /// they are one piece to the kernel, which costs it less than many. Gives the size of a new slot, 0 if
    /// none was needed; None if there is no memory, or `fill` says no: then nothing has been appended.
    pub fn push_filled(
        &mut self,
        len: usize,
        expected: usize,
        arena: &mut Arena,
        fill: impl FnOnce(&mut [u8]) -> bool,
    ) -> Option<usize> {
        let mut size = len.max(expected.min(FILLED_BYTES_MAX));
        if let Some(Piece::Slot(SlotRange { slot, start, len: filled })) = self.pieces.back_mut() {
            let end = *start + *filled;
            if slot.len() - end >= len {
                return fill(&mut slot.bytes_mut()[end..end + len]).then(|| {
                    *filled += len;
                    self.filled += len;
                    0
                });
            }
            // Where there were many there may be more.
            size = len.max((2 * slot.len()).min(FILLED_BYTES_MAX));
        }
        let mut slot = arena.alloc(size)?;
        if !fill(&mut slot.bytes_mut()[..len]) {
            return None;
        }
        let size = slot.len();
        self.filled += len;
        self.pieces.push_back(Piece::Slot(SlotRange { slot, start: 0, len }));
        Some(size)
    }

    /// How many bytes [`SendBatch::push_filled`] has appended since the batch was empty.
    pub fn filled(&self) -> usize {
        self.filled
    }

    /// Whether everything has been sent.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.pieces.iter().map(Piece::len).sum()
    }

    /// All bytes, in order.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> {
        self.pieces.iter().map(|piece| match piece {
            Piece::Bytes(range) => &self.bytes[range.clone()],
            Piece::Slot(range) => range.bytes(),
        })
    }

    /// Heap that it keeps when it is empty.
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Forgets the first `n` bytes: they have been sent.
    pub(crate) fn advance(&mut self, mut n: usize) {
        while n > 0 {
            let Some(piece) = self.pieces.front_mut() else { break };
            let taken = n.min(piece.len());
            n -= taken;
            if taken == piece.len() {
                self.pieces.pop_front();
                continue;
            }
            match piece {
                Piece::Bytes(range) => range.start += taken,
                Piece::Slot(range) => {
                    range.start += taken;
                    range.len -= taken;
                }
            }
        }
        if self.pieces.is_empty() {
            self.bytes.clear();
            self.filled = 0;
        }
    }

    /// All of it, as if it had been sent.
    #[cfg(test)]
    pub(crate) fn take_all(&mut self) -> Vec<u8> {
        let all: Vec<u8> = self.slices().flatten().copied().collect();
        self.advance(all.len());
        all
    }

    /// The message header for the kernel. It points into this batch, which must not move or change until the
    /// kernel is done.
    pub(super) fn msghdr(&mut self) -> *const libc::msghdr {
        self.iov.clear();
        let mut left = SEND_BYTES_MAX;
        for piece in self.pieces.iter().take(IOV_MAX) {
            let bytes = match piece {
                Piece::Bytes(range) => &self.bytes[range.clone()],
                Piece::Slot(range) => range.bytes(),
            };
            let len = bytes.len().min(left);
            self.iov.push(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: len });
            left -= len;
            if left == 0 {
                break;
            }
        }
        // SAFETY: msghdr is plain data for which all zeros is valid: no name, no control data, no flags.
        let mut msghdr: libc::msghdr = unsafe { std::mem::zeroed() };
        msghdr.msg_iov = self.iov.as_mut_ptr();
        msghdr.msg_iovlen = self.iov.len() as _;
        self.msghdr.insert(msghdr)
    }
}

impl std::fmt::Debug for SendBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendBatch").field("pieces", &self.pieces).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Arena;

    #[test]
    fn what_is_filled_in_one_after_another_is_one_piece_as_long_as_a_slot_has_room() {
        let mut arena = Arena::new(8 << 20, 2 << 20).unwrap();
        let mut batch = SendBatch::default();
        let mut expected = Vec::new();
        let mut slots = Vec::new();
        for i in 0..40u8 {
            let slot_len = batch
                .push_filled(4136, 0, &mut arena, |bytes| {
                    bytes.fill(i);
                    true
                })
                .unwrap();
            expected.extend([i; 4136]);
            slots.extend(Some(slot_len).filter(|&len| len > 0));
            // What could not be brought leaves nothing behind.
            assert_eq!(batch.push_filled(5000, 0, &mut arena, |_| false), None);
        }
        assert_eq!(slots, [8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10]);
        assert_eq!(batch.filled(), expected.len());
        assert_eq!(arena.used_bytes(), slots.iter().sum());
        batch.push_bytes(|out| out.push(0xff));
        expected.push(0xff);
        batch.msghdr();
        assert_eq!(batch.iov.len(), slots.len() + 1);
        let mut sent: Vec<u8> = Vec::new();
        for piece in &batch.pieces {
            match piece {
                Piece::Bytes(range) => sent.extend(&batch.bytes[range.clone()]),
                Piece::Slot(range) => sent.extend(range.bytes()),
            }
        }
        assert!(sent == expected);
        batch.advance(sent.len());
        assert!(batch.is_empty() && arena.used_bytes() == 0, "the slots are free again");
    }

    #[test]
    fn who_knows_how_much_there_will_be_gets_one_slot_for_it() {
        let mut arena = Arena::new(8 << 20, 2 << 20).unwrap();
        for (expected, size) in [(4136, 8 << 10), (66_176, 128 << 10), (1 << 20, FILLED_BYTES_MAX)] {
            let mut batch = SendBatch::default();
            assert_eq!(batch.push_filled(4136, expected, &mut arena, |_| true), Some(size));
            for _ in 1..(expected / 4136).min(size / 4136) {
                assert_eq!(batch.push_filled(4136, expected, &mut arena, |_| true), Some(0));
            }
            let filled = batch.filled();
            batch.advance(filled);
            assert!(batch.is_empty() && batch.filled() == 0);
        }
    }

    #[test]
    fn without_memory_nothing_is_filled_in() {
        let mut arena = Arena::new(64 << 10, 64 << 10).unwrap();
        let mut batch = SendBatch::default();
        let all = arena.alloc(64 << 10).unwrap();
        assert_eq!(batch.push_filled(1, 0, &mut arena, |_| unreachable!("where to?")), None);
        assert!(batch.is_empty());
        drop(all);
        assert!(batch.push_filled(1, 0, &mut arena, |_| true).is_some());
    }

    #[test]
    fn a_send_takes_no_more_than_its_share_of_a_turn() {
        let mut arena = Arena::new(8 << 20, 2 << 20).unwrap();
        let mut batch = SendBatch::default();
        let mut left = 0;
        for len in [2 << 20, 1000, 1200 << 10, 1] {
            batch.push_bytes(|out| out.extend_from_slice(&[0; 40]));
            batch.push_slot(SlotRange { slot: arena.alloc(len).unwrap(), start: 0, len });
            left += 40 + len;
        }
        while !batch.is_empty() {
            batch.msghdr();
            let taken: usize = batch.iov.iter().map(|piece| piece.iov_len).sum();
            assert_eq!(taken, left.min(SEND_BYTES_MAX));
            batch.advance(taken);
            left -= taken;
        }
        assert_eq!(left, 0);
    }
}
