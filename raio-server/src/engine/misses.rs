//! Reads that the page cache does not have, and how many of them workers begin.
//!
//! RWF_NOWAIT keeps a read from waiting for its pages. It does not keep it from asking the disk for them, and
//! who asks a disk that has as many requests as it takes waits for one of them to end (`nr_requests`: 32 and
//! more). So workers ask for few at a time. Reads beyond are for the lanes, whatever the page cache has.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Descriptor;
use crate::tuning::cached_reads::{MISS_BYTES, MISSES_MAX};

/// Requests that an export's disk has because of workers' buffered reads.
#[derive(Debug, Default)]
pub struct Misses(AtomicUsize);

impl Misses {
    /// Whether the disk has enough to do. Workers that ask at the same time may each go beyond it by a read.
    pub fn are_enough(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= MISSES_MAX
    }
}

/// A file that is being read from the disk. Counted until it is dropped.
#[derive(Debug)]
pub struct Miss {
    file: Arc<Descriptor>,
    requests: usize,
}

impl Miss {
    /// A read of this many bytes.
    pub fn new(file: &Arc<Descriptor>, bytes: usize) -> Self {
        let requests = bytes.div_ceil(MISS_BYTES);
        file.lanes().misses.0.fetch_add(requests, Ordering::Relaxed);
        Self { file: Arc::clone(file), requests }
    }
}

impl AsFd for Miss {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Miss {
    fn drop(&mut self) {
        self.file.lanes().misses.0.fetch_sub(self.requests, Ordering::Relaxed);
    }
}
