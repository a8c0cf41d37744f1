//! File data on its way from the page cache to a socket with no copy: the cache's own pages, in a pipe.
//!
//! A copy of a large read costs more than all the rest of it. splice(2) puts references to the pages into a pipe, and from there into
//! the socket. What is sent is what the file has when it is sent, which is before the read is over; so it is as good as a copy.
//! Checksums need the bytes, and what is not in the page cache a slot: reads that want those are not for here.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crossbeam_queue::ArrayQueue;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use crate::memory::Slot;

/// What a pipe holds; the most that everybody may ask for.
const PIPE_BYTES: usize = 1 << 20;
/// So many pipes at most, and so twice as many descriptors. They are made as they are needed.
const PIPES_MAX: usize = 8;
const PAGE_BYTES: usize = 4096;

#[derive(Debug)]
struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
}

/// The pipes of one thread.
#[derive(Debug)]
pub struct PagePool {
    /// A place for each; one that is empty has no pipe yet.
    spare: Arc<ArrayQueue<Option<Pipe>>>,
}

/// Data in a pipe.
#[derive(Debug)]
pub struct Pages {
    pipe: Option<Pipe>,
    left: usize,
    spare: Arc<ArrayQueue<Option<Pipe>>>,
    /// Where it would have been copied to.
    slot: Option<Slot>,
}

impl Default for PagePool {
    fn default() -> Self {
        let spare = ArrayQueue::new(PIPES_MAX);
        for _ in 0..PIPES_MAX {
            // There is room for all of them.
            let _ = spare.push(None);
        }
        Self { spare: Arc::new(spare) }
    }
}

impl PagePool {
    /// Takes `len` bytes at `offset` of a file, if its page cache has all of them. None if not, or if it cannot be known.
    /// Blocks only if a page is just being read, or leaves the cache in this moment.
    pub fn take(&self, file: BorrowedFd<'_>, offset: u64, len: usize) -> Option<Pages> {
        if !offset.is_multiple_of(PAGE_BYTES as u64) || len > PIPE_BYTES || !is_cached(file, offset, len) {
            return None;
        }
        let pipe = self.spare.pop()?.or_else(|| Pipe::new().ok());
        let mut pages = Pages { pipe, left: 0, spare: Arc::clone(&self.spare), slot: None };
        let mut at = offset;
        while let Some(pipe) = &pages.pipe
            && pages.left < len
        {
            match splice(file, Some(&mut at), &pipe.into, None, len - pages.left, SpliceFlags::NONBLOCK) {
                Ok(n) if n > 0 => pages.left += n,
                Err(Errno::INTR) => {}
                // The end of the file, for instance.
                _ => break,
            }
        }
        (pages.left == len).then_some(pages)
    }
}

impl Pipe {
    fn new() -> rustix::io::Result<Self> {
        let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        fcntl_setpipe_size(&into, PIPE_BYTES)?;
        Ok(Self { out, into })
    }
}

impl Pages {
    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.left
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// They have come in the place of this slot's bytes. It counts as memory in use until they are gone.
    pub fn in_place_of(mut self, slot: Slot) -> Self {
        self.slot = Some(slot);
        self
    }

    /// The size of that slot.
    pub fn slot_len(&self) -> usize {
        self.slot.as_ref().map_or(0, Slot::len)
    }

    /// Passes on as much as a non-blocking socket takes, at most `len_max`. `more` is to follow. A socket that is closed raises SIGPIPE, which
    /// Rust programs ignore.
    pub(super) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        len_max: usize,
        more: bool,
    ) -> rustix::io::Result<usize> {
        let Some(pipe) = &self.pipe else { return Err(Errno::PIPE) };
        let mut flags = SpliceFlags::NONBLOCK;
        flags.set(SpliceFlags::MORE, more);
        let n = splice(&pipe.out, None, socket, None, self.left.min(len_max), flags)?;
        self.left -= n;
        // It is not empty, and it was not full.
        if n == 0 { Err(Errno::IO) } else { Ok(n) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let pipe = self.pipe.take();
        // One that is not empty is closed, and what is in it is forgotten. There is room: it came from there.
        let _ = self.spare.push(if self.left == 0 { pipe } else { None });
    }
}

/// Whether a file's page cache has all of this, as far as can be known.
fn is_cached(file: BorrowedFd<'_>, offset: u64, len: usize) -> bool {
    /// The same on all architectures that Rust's standard library knows.
    const SYS_CACHESTAT: libc::c_long = 451;
    // The kernel's `struct cachestat_range`: offset and length...
    let range = [offset, len as u64];
    // ... and `struct cachestat`: pages in the cache, dirty, in writeback, evicted, recently evicted.
    let mut found = [0u64; 5];
    // SAFETY: cachestat(2) reads two and writes five numbers of 64 bits, which live until it returns. Kernels before 6.5 do not know it.
    let result =
        unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), found.as_mut_ptr(), 0) };
    if result != 0 || found[0] < len.div_ceil(PAGE_BYTES) as u64 {
        return false;
    }
    // What is just being read is there too. It ends in order, more or less, so ask for the last.
    let mut byte = [0];
    let last = offset + len as u64 - 1;
    preadv2(file, &mut [IoSliceMut::new(&mut byte)], last, ReadWriteFlags::NOWAIT) == Ok(1)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::memory::Arena;

    const LEN: usize = 300_000;

    fn file() -> (File, Vec<u8>) {
        let bytes: Vec<u8> = (0..LEN).map(|i| (i % 251) as u8).collect();
        let fd = rustix::fs::memfd_create("pages", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(&bytes).unwrap();
        (file, bytes)
    }

    /// Whether the kernel tells what is in the page cache.
    fn is_known(file: &File) -> bool {
        let known = is_cached(file.as_fd(), 0, LEN);
        if !known {
            eprintln!("SKIPPED: this kernel has no cachestat(2), which came with Linux 6.5");
        }
        known
    }

    #[test]
    fn pages_come_out_of_a_socket_as_they_are_in_the_file() {
        let (file, bytes) = file();
        if !is_known(&file) {
            return;
        }
        let mut arena = Arena::new(1 << 20, 1 << 20).unwrap();
        let pool = PagePool::default();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        for (offset, len) in [(0, LEN), (8192, 200_000), (4096, 4096), (4096, 1)] {
            let slot = arena.alloc(len).unwrap();
            let pages = pool.take(file.as_fd(), offset, len).expect("it was just written");
            let mut pages = pages.in_place_of(slot);
            assert!(pages.slot_len() >= len);
            let mut received = Vec::new();
            while !pages.is_empty() {
                let n = match pages.send(ours.as_fd(), LEN, false) {
                    Err(Errno::AGAIN) => 0,
                    result => result.unwrap(),
                };
                let mut some = vec![0; n];
                theirs.read_exact(&mut some).unwrap();
                received.extend(some);
            }
            assert!(received == bytes[offset as usize..][..len]);
        }
        assert_eq!(arena.used_bytes(), 0, "the slots are free again");
    }

    #[test]
    fn there_are_no_pages_off_their_limits_or_beyond_the_end_or_a_pipe() {
        let (file, _) = file();
        let pool = PagePool::default();
        for (offset, len) in
            [(1, 4096), (LEN as u64 / 4096 * 4096, 8192), (1 << 40, 4096), (0, PIPE_BYTES + 1)]
        {
            assert!(pool.take(file.as_fd(), offset, len).is_none());
        }
    }

    #[test]
    fn pages_that_are_dropped_leave_nothing_in_a_pipe_for_others() {
        let (file, bytes) = file();
        if !is_known(&file) {
            return;
        }
        let pool = PagePool::default();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        for _ in 0..2 * PIPES_MAX {
            assert!(pool.take(file.as_fd(), 0, 8192).is_some());
        }
        let all: Vec<_> = std::iter::from_fn(|| pool.take(file.as_fd(), 4096, 10)).collect();
        assert_eq!(all.len(), PIPES_MAX);
        for mut pages in all {
            let mut received = [0; 10];
            assert_eq!(pages.send(ours.as_fd(), LEN, false), Ok(10));
            theirs.read_exact(&mut received).unwrap();
            assert_eq!(received, bytes[4096..][..10]);
        }
        assert!(pool.take(file.as_fd(), 0, 10).is_some(), "the pipes are free again");
    }
}
