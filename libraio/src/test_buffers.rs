//! Buffers as the tests fill and read them.

use crate::{Buffer, Buffers, Completion};

/// Bytes that differ from those 251 bytes before and behind.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

/// A buffer to be read into.
pub fn room(len: usize) -> Buffers {
    Buffers::One(Buffer::Owned(vec![0; len].into()))
}

pub fn bytes(buffers: &Buffers) -> Vec<u8> {
    buffers.slices(0..buffers.len()).flatten().copied().collect()
}

/// The whole buffers of an operation that has completed.
pub fn bytes_of(completion: Completion) -> Vec<u8> {
    bytes(&completion.buffers.unwrap())
}
