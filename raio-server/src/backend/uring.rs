//! The backend over the reactor's io_uring.
//!
//! What the page cache can do at once is done at once, by a plain system call: a read of what is there, and a write of whole pages.
//! The ring would do the same within its submission, with more ado; and writes that a file system cannot do without blocking (ext4
//! says so of all) it would give to a thread of the kernel, which costs ten times as much.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use raio_transport::protocol::FileStatus;
use raio_transport::reactor::{Event, Op, OpId, Payload, Reactor, Token};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2};

use super::{Backend, Completion, Handle, OWNER, Operation, Outcome, file_info};

/// Writes of whole pages need not read what surrounds them.
const PAGE_BYTES: u64 = 4096;
/// What takes so long has waited: a write, most likely, for dirty pages to reach the disk...
const WAITED: Duration = Duration::from_millis(1);
/// ... and for so many times as long as it took the ring does it.
const PAUSE: u32 = 100;

/// Passes operations on to the ring.
#[derive(Debug, Default)]
pub struct Uring {
    ended: VecDeque<Completion>,
    /// What may wait is not done at once after it has waited.
    writes: Pause,
    reads: Pause,
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
    /// Reads what the page cache has. None: it is for the ring.
    fn read_cached(
        &mut self,
        file: &Handle,
        bytes: &mut [u8],
        offset: u64,
    ) -> Option<rustix::io::Result<usize>> {
        let flags = file.reads_cache?;
        let may_wait = if flags.is_empty() { Some(self.reads.begin()?) } else { None };
        let result = preadv2(&file.fd, &mut [IoSliceMut::new(bytes)], offset, flags);
        if let Some(begin) = may_wait {
            self.reads.end(begin);
        }
        Some(result)
    }

    /// Writes whole pages into the page cache. None: it is for the ring.
    fn write_cached(
        &mut self,
        file: &Handle,
        bytes: &[u8],
        offset: u64,
    ) -> Option<rustix::io::Result<usize>> {
        let pages = offset.is_multiple_of(PAGE_BYTES) && (bytes.len() as u64).is_multiple_of(PAGE_BYTES);
        if !file.writes_cache || !pages {
            return None;
        }
        let begin = self.writes.begin()?;
        let result = pwritev2(&file.fd, &[IoSlice::new(bytes)], offset, ReadWriteFlags::empty());
        self.writes.end(begin);
        Some(result)
    }

    /// Does an operation by a system call if that will hardly block. None: it is for the ring.
    fn at_once(&mut self, file: &Handle, operation: &mut Operation) -> Option<Result<u32, i32>> {
        let result = match operation {
            Operation::Read { target, offset } => {
                let bytes = target.bytes_mut();
                self.read_cached(file, bytes, *offset)?
            }
            Operation::Write { source, offset } => {
                let bytes = source.bytes();
                self.write_cached(file, bytes, *offset)?
            }
            _ => return None,
        };
        match result {
            Ok(n) => Some(Ok(n as u32)),
            // The rest of the file system's errors would be the ring's too.
            Err(Errno::AGAIN | Errno::INTR | Errno::OPNOTSUPP) => None,
            Err(error) => Some(Err(error.raw_os_error())),
        }
    }
}

impl Backend for Uring {
    fn submit(
        &mut self,
        reactor: &mut Reactor,
        key: u64,
        file: &Handle,
        mut operation: Operation,
    ) -> Option<OpId> {
        if let Some(result) = self.at_once(file, &mut operation) {
            let outcome = match operation {
                Operation::Read { target: range, .. } | Operation::Write { source: range, .. } => {
                    Outcome::Slot(range)
                }
                _ => unreachable!("only reads and writes are done at once"),
            };
            self.ended.push_back(Completion { key, result, outcome });
            return None;
        }
        let Handle { fd, file, .. } = file;
        let file = || file.clone();
        let op = match operation {
            Operation::Read { target, offset } => Op::Read { file: file(), target, offset },
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

    fn read_at_once(&mut self, file: &Handle, bytes: &mut [u8], offset: u64) -> Option<()> {
        let n = self.read_cached(file, bytes, offset)?.ok()?;
        (n == bytes.len()).then_some(())
    }

    fn write_at_once(&mut self, file: &Handle, bytes: &[u8], offset: u64) -> Option<()> {
        let n = self.write_cached(file, bytes, offset)?.ok()?;
        (n == bytes.len()).then_some(())
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
