//! The backend over the reactor's io_uring.
//!
//! What the page cache can do at once is done at once, by a plain system call: a read of what is there, and a write of whole pages.
//! Of a large read not even the data is copied: the answer gets the cache's own pages. The ring would do the same within its submission, with more ado; and writes that a file system cannot do without blocking (ext4
//! says so of all) it would give to a thread of the kernel, which costs ten times as much.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use raio_transport::protocol::FileStatus;
use raio_transport::reactor::{Event, Op, OpId, PagePool, Payload, Reactor, Token};
use raio_transport::transport::SlotRange;
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2};

use super::{Backend, Completion, Handle, OWNER, Operation, Outcome, file_info};

/// Writes of whole pages need not read what surrounds them.
const PAGE_BYTES: u64 = 4096;
/// Shorter reads cost less to copy than their pages to pass on.
const PAGES_BYTES_MIN: usize = 128 << 10;
/// What takes so long has waited: a write, most likely, for dirty pages to reach the disk...
const WAITED: Duration = Duration::from_millis(1);
/// ... and for so many times as long as it took the ring does it.
const PAUSE: u32 = 100;

/// Passes operations on to the ring.
#[derive(Debug, Default)]
pub struct Uring {
    ended: VecDeque<Completion>,
    page_pool: PagePool,
    /// What may wait is not done at once after it has waited.
    writes: Pause,
    pages: Pause,
}

/// When not to do something at once.
#[derive(Debug, Default)]
struct Pause(Option<Instant>);

impl Pause {
    /// Begins something that may wait. None: better not.
    fn begin(&self) -> Option<Instant> {
        let now = Instant::now();
        self.0.is_none_or(|until| now >= until).then_some(now)
    }

    /// Ends it.
    fn end(&mut self, begin: Instant) {
        let took = begin.elapsed();
        self.0 = (took >= WAITED).then(|| begin + took * PAUSE);
    }
}

impl Uring {
    /// Does an operation by a system call if that will hardly block. If not, it is for the ring.
    fn at_once(
        &mut self,
        file: &Handle,
        operation: Operation,
    ) -> Result<(Result<u32, i32>, Outcome), Operation> {
        match operation {
            Operation::Read { target, offset, or_pages: true }
                if file.reads_cache && target.start == 0 && target.len >= PAGES_BYTES_MIN =>
            {
                let SlotRange { mut slot, start, len } = target;
                if let Some(begin) = self.pages.begin() {
                    let taken = self.page_pool.take(file.fd.as_fd(), offset, len, slot);
                    self.pages.end(begin);
                    match taken {
                        Ok(pages) => return Ok((Ok(len as u32), Outcome::Pages(pages))),
                        Err(back) => slot = back,
                    }
                }
                let target = SlotRange { slot, start, len };
                self.at_once(file, Operation::Read { target, offset, or_pages: false })
            }
            Operation::Read { mut target, offset, or_pages } if file.reads_cache => {
                let bytes = &mut target.slot.bytes_mut()[target.start..target.start + target.len];
                let result = preadv2(&file.fd, &mut [IoSliceMut::new(bytes)], offset, ReadWriteFlags::NOWAIT);
                done(result, target).map_err(|target| Operation::Read { target, offset, or_pages })
            }
            Operation::Write { source, offset }
                if file.writes_cache
                    && offset.is_multiple_of(PAGE_BYTES)
                    && (source.len as u64).is_multiple_of(PAGE_BYTES) =>
            {
                let Some(begin) = self.writes.begin() else {
                    return Err(Operation::Write { source, offset });
                };
                let bytes = &source.slot.bytes()[source.start..source.start + source.len];
                let result = pwritev2(&file.fd, &[IoSlice::new(bytes)], offset, ReadWriteFlags::empty());
                self.writes.end(begin);
                done(result, source).map_err(|source| Operation::Write { source, offset })
            }
            operation => Err(operation),
        }
    }
}

/// What came of a system call, or the slot for another attempt by the ring.
fn done(result: Result<usize, Errno>, range: SlotRange) -> Result<(Result<u32, i32>, Outcome), SlotRange> {
    match result {
        Ok(n) => Ok((Ok(n as u32), Outcome::Slot(range))),
        // The rest of the file system's errors would be the ring's too.
        Err(Errno::AGAIN | Errno::INTR | Errno::OPNOTSUPP) => Err(range),
        Err(error) => Ok((Err(error.raw_os_error()), Outcome::Slot(range))),
    }
}

impl Backend for Uring {
    fn submit(
        &mut self,
        reactor: &mut Reactor,
        key: u64,
        file: &Handle,
        operation: Operation,
    ) -> Option<OpId> {
        let operation = match self.at_once(file, operation) {
            Ok((result, outcome)) => {
                self.ended.push_back(Completion { key, result, outcome });
                return None;
            }
            Err(operation) => operation,
        };
        let Handle { fd, file, .. } = file;
        let file = || file.clone();
        let op = match operation {
            Operation::Read { target, offset, .. } => Op::Read { file: file(), target, offset },
            Operation::Write { source, offset } => Op::Write { file: file(), source, offset },
            Operation::Fsync { data_only } => Op::Fsync { file: file(), data_only },
            Operation::Fallocate { how, offset, length } => {
                Op::Fallocate { file: file(), how, offset, length }
            }
            Operation::Stat => Op::Stat { file: Arc::clone(fd) },
            Operation::Open { path, how } => Op::Open { directory: Some(file()), path, how },
        };
        Some(reactor.submit(Token { owner: OWNER, value: key }, op))
    }

    fn close(&mut self, reactor: &mut Reactor, key: u64, fd: OwnedFd) {
        reactor.submit(Token { owner: OWNER, value: key }, Op::Close { fd });
    }

    fn cancel(&mut self, reactor: &mut Reactor, _key: u64, id: Option<OpId>) {
        if let Some(id) = id {
            reactor.cancel(id);
        }
    }

    fn handle(&mut self, event: Event) {
        let outcome = match event.payload {
            Payload::Slot(range) => Outcome::Slot(range),
            Payload::Fd(fd) => Outcome::Fd(fd),
            Payload::Stat(stat) => Outcome::Stat(Box::new(file_info!(*stat))),
            Payload::None | Payload::Received(_) | Payload::Batch(_) | Payload::Timer => Outcome::None,
        };
        self.ended.push_back(Completion { key: event.token.value, result: event.result, outcome });
    }

    fn next(&mut self) -> Option<Completion> {
        self.ended.pop_front()
    }
}
