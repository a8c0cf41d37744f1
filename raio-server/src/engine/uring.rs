//! The engine over the reactor's io_uring.
//!
//! What is in the page cache is read at once, by a plain system call: the ring would do the same within its
//! submission, with more ado. The ring has what the kernel does without a thread: O_DIRECT, with RWF_NOWAIT,
//! and reads of what is not in the page cache, on file systems that wait for it asynchronously. Everything
//! else would wait in the submission, or for one of a few threads that all rings' operations share, so it is
//! for the lanes. So is what the ring could not do without waiting.

use std::io::IoSliceMut;
use std::sync::{Arc, Weak};
use std::time::Instant;

use raio_transport::reactor::{Event, Op, OpenFile, Payload, Reactor, Token};
use rustix::io::{Errno, preadv2};

use super::job::is_failed_write;
use super::{
    Call, Closing, Completion, CompletionQueue, Descriptor, Engine, Lane, Miss, OWNER, Operation, Outcome,
    Pending, Threads,
};
use crate::client::Client;
use crate::tuning::cached_reads::{PAUSE, WAITED};

/// In the value of a token, beside the key: the operation is a write.
const WRITE: u64 = 1 << 63;

/// Passes operations on to the ring.
#[derive(Debug)]
pub struct Uring {
    lanes: Threads,
    /// The last read of what may wait has waited.
    has_waited: bool,
    /// Until then what may wait is not read at once, because it has waited twice.
    paused_until: Option<Instant>,
}

impl Uring {
    /// For the worker of this reactor.
    pub fn new(reactor: &Reactor) -> Self {
        Self { lanes: Threads::new(reactor), has_waited: false, paused_until: None }
    }

    /// Reads what the page cache has. None: that may wait.
    #[inline(always)]
    fn read_cached(
        &mut self,
        file: &Descriptor,
        bytes: &mut [u8],
        offset: u64,
    ) -> Option<Result<u32, Errno>> {
        let flags = file.cached_reads.filter(|_| !file.lanes().misses.are_enough())?;
        let begin = if flags.is_empty() {
            let now = Instant::now();
            if self.paused_until.is_some_and(|until| now < until) {
                return None;
            }
            Some(now)
        } else {
            None
        };
        let result = preadv2(file, &mut [IoSliceMut::new(bytes)], offset, flags);
        if let Some(begin) = begin {
            let took = begin.elapsed();
            let has_waited = std::mem::replace(&mut self.has_waited, took >= WAITED);
            // Once may mean that another thread had the core.
            if self.has_waited && has_waited {
                self.paused_until = Some(begin + took * PAUSE);
            }
        }
        match result {
            // The last two: a sandbox forbids it.
            Err(Errno::AGAIN | Errno::INTR | Errno::OPNOTSUPP | Errno::PERM | Errno::NOSYS) => None,
            result => Some(result.map(|n| n as u32)),
        }
    }
}

impl Engine for Uring {
    fn submit(
        &mut self,
        reactor: &mut Reactor,
        key: u64,
        client: &Weak<Client>,
        file: &Arc<Descriptor>,
        operation: Operation,
    ) -> Option<Pending> {
        let on = || Arc::clone(file) as Arc<dyn OpenFile>;
        let mut value = key;
        let op = match operation {
            Operation::Read { mut target, offset } => {
                if let Some(result) = self.read_cached(file, target.bytes_mut(), offset) {
                    let (result, outcome) = (result.map_err(Errno::raw_os_error), Outcome::Slot(target));
                    self.completions().push(Completion { key, result, outcome });
                    return None;
                }
                let is_miss = !file.is_direct;
                if !file.is_asynchronous || is_miss && file.lanes().misses.are_enough() {
                    return Some(self.lanes.submit_blocking(
                        key,
                        client,
                        file,
                        Operation::Read { target, offset },
                    ));
                }
                let file: Arc<dyn OpenFile> =
                    if is_miss { Arc::new(Miss::new(file, target.len)) } else { on() };
                Op::Read { file, target, offset, nowait: !is_miss }
            }
            Operation::Write { source, offset } if file.is_direct && file.is_asynchronous => {
                value |= WRITE;
                Op::Write { file: on(), source, offset, nowait: true }
            }
            operation => return self.lanes.submit(reactor, key, client, file, operation),
        };
        Some(Pending::Ring(reactor.submit(Token { owner: OWNER, value }, op)))
    }

    fn submit_blocking(
        &mut self,
        key: u64,
        client: &Weak<Client>,
        file: &Arc<Descriptor>,
        operation: Operation,
    ) -> Pending {
        self.lanes.submit_blocking(key, client, file, operation)
    }

    fn call(&mut self, key: u64, client: &Weak<Client>, lane: Lane, call: Call) -> Pending {
        self.lanes.call(key, client, lane, call)
    }

    fn close(&mut self, file: Arc<Descriptor>, closing: Closing) {
        self.lanes.close(file, closing);
    }

    fn try_read_cached(&mut self, file: &Descriptor, bytes: &mut [u8], offset: u64) -> Option<()> {
        let n = self.read_cached(file, bytes, offset)?.ok()?;
        (n as usize == bytes.len()).then_some(())
    }

    fn completions(&mut self) -> &mut CompletionQueue {
        self.lanes.completions()
    }

    fn cancel(&mut self, reactor: &mut Reactor, key: u64, pending: Pending) {
        match pending {
            Pending::Ring(id) => reactor.cancel(id),
            pending => self.lanes.cancel(reactor, key, pending),
        }
    }

    fn flush(&mut self) -> bool {
        self.lanes.flush()
    }

    fn handle(&mut self, event: Event) {
        let Payload::Slot(range) = event.payload else {
            unreachable!("reads and writes have a slot, yet there is {event:?}")
        };
        let outcome = match event.result {
            Err(libc::EAGAIN | libc::EOPNOTSUPP) => Outcome::WouldBlock(range),
            // The lane tries again. If that fails, too, its thread may wait until the verifier is written.
            Err(errno) if event.token.value & WRITE != 0 && is_failed_write(errno) => {
                Outcome::WouldBlock(range)
            }
            _ => Outcome::Slot(range),
        };
        let key = event.token.value & !WRITE;
        self.completions().push(Completion { key, result: event.result, outcome });
    }
}
