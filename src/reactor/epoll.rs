//! The epoll engine, for where io_uring is forbidden: tries each operation, and waits for readiness if it
//! would block.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use rustix::event::epoll::{self, EventData, EventFlags};
use slab::Slab;

use super::nonblocking::{attempt, ended};
use super::received::Pool;
use super::{Config, Event, Op, OpId, Token, Waker};
use crate::tuning::EPOLL_EVENTS_MAX;

/// The key under which the waker's eventfd is registered; no descriptor has this number.
const WAKER: u64 = u64::MAX;

struct Pending {
    token: Token,
    generation: u32,
    op: Op,
}

/// The operations that wait for one descriptor: at most one that reads and one that writes.
#[derive(Default)]
struct Waiting {
    read: Option<usize>,
    write: Option<usize>,
}

pub(super) struct Epoll {
    epoll: OwnedFd,
    pending: Slab<Pending>,
    generation: u32,
    /// Operations to be tried.
    fresh: VecDeque<usize>,
    waiting: HashMap<RawFd, Waiting>,
    ready: Vec<epoll::Event>,
    pool: Rc<Pool>,
    waker: Waker,
}

impl Epoll {
    pub fn new(config: &Config, waker: &Waker) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &**waker.eventfd(), EventData::new_u64(WAKER), EventFlags::IN)?;
        Ok(Self {
            epoll,
            pending: Slab::new(),
            generation: 0,
            fresh: VecDeque::new(),
            waiting: HashMap::new(),
            ready: Vec::with_capacity(EPOLL_EVENTS_MAX),
            pool: Pool::new(config.received_count, config.received_bytes, false)?,
            waker: waker.clone(),
        })
    }

    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    pub fn submit(&mut self, token: Token, op: Op) -> OpId {
        assert!(
            descriptor(&op).is_some(),
            "a file operation was submitted to a reactor without io_uring: {op:?}"
        );
        self.generation = self.generation.wrapping_add(1);
        let key = self.pending.insert(Pending { token, generation: self.generation, op });
        self.fresh.push_back(key);
        OpId(u64::from(self.generation) << 32 | key as u64)
    }

    pub fn cancel(&mut self, id: OpId) {
        let key = id.0 as u32 as usize;
        if let Some(pending) = self.pending.get_mut(key)
            && u64::from(pending.generation) == id.0 >> 32
        {
            // Its next try ends it; generation 0 marks it, for `submit` hands it out only after four thousand
            // million others.
            pending.generation = 0;
            self.fresh.push_back(key);
        }
    }

    pub fn poll(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()> {
        let before = events.len();
        self.try_fresh(events);
        let timeout = if events.len() > before { Some(Duration::ZERO) } else { timeout };
        let timeout = timeout.map(|t| rustix::event::Timespec {
            tv_sec: t.as_secs().min(i64::MAX as u64) as i64,
            tv_nsec: t.subsec_nanos().into(),
        });
        self.ready.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.ready), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for at in 0..self.ready.len() {
            let key = self.ready[at].data.u64();
            if key == WAKER {
                self.waker.drain();
                continue;
            }
            let fd = key as RawFd;
            if let Some(waiting) = self.waiting.remove(&fd) {
                // Both: an error or hang-up makes each of them end, and one that still would block waits
                // again.
                self.fresh.extend(waiting.read);
                self.fresh.extend(waiting.write);
            }
        }
        self.try_fresh(events);
        Ok(())
    }

    fn try_fresh(&mut self, events: &mut Vec<Event>) {
        while let Some(key) = self.fresh.pop_front() {
            let Some(pending) = self.pending.get_mut(key) else { continue };
            let cancelled = pending.generation == 0;
            let outcome = if cancelled { Err(libc::ECANCELED) } else { attempt(&mut pending.op, &self.pool) };
            let outcome = match outcome {
                Err(libc::EAGAIN) => match self.wait_for(key) {
                    Ok(()) => continue,
                    Err(errno) => Err(errno),
                },
                outcome => outcome,
            };
            match outcome {
                Err(libc::EINTR) => self.fresh.push_back(key),
                Ok(_) | Err(_) => {
                    let Pending { token, op, .. } = self.pending.remove(key);
                    if cancelled {
                        self.forget(&op, key);
                    }
                    events.push(ended(token, op, outcome));
                }
            }
        }
    }

    /// Takes an operation off the list of those that wait for its descriptor.
    fn forget(&mut self, op: &Op, key: usize) {
        if let Some((fd, _)) = descriptor(op)
            && let Some(waiting) = self.waiting.get_mut(&fd)
        {
            for side in [&mut waiting.read, &mut waiting.write] {
                if *side == Some(key) {
                    *side = None;
                }
            }
        }
    }

    /// Waits for the descriptor of an operation that would block. Fails if epoll does not take it: most
    /// likely there are too many (ENOSPC, see fs.epoll.max_user_watches), or no memory.
    fn wait_for(&mut self, key: usize) -> Result<(), i32> {
        let op = &self.pending[key].op;
        let Some((fd, writes)) = descriptor(op) else { return Ok(()) };
        let waiting = self.waiting.entry(fd).or_default();
        let side = if writes { &mut waiting.write } else { &mut waiting.read };
        debug_assert!(
            side.is_none_or(|other| other == key),
            "two operations wait on the same side of a descriptor"
        );
        *side = Some(key);
        let mut flags = EventFlags::ONESHOT;
        flags.set(EventFlags::IN, waiting.read.is_some());
        flags.set(EventFlags::OUT, waiting.write.is_some());
        let data = EventData::new_u64(fd as u64);
        let file = op_file(op);
        // A descriptor that was closed has left the epoll set by itself, and its number may be another's now.
        let armed = epoll::modify(&self.epoll, file, data, flags)
            .or_else(|_| epoll::add(&self.epoll, file, data, flags));
        armed.map_err(|error| {
            *if writes { &mut waiting.write } else { &mut waiting.read } = None;
            error.raw_os_error()
        })
    }
}

/// The file of an operation that this engine can do.
fn op_file(op: &Op) -> &super::File {
    match op {
        Op::Accept { listener: file }
        | Op::Recv { socket: file, .. }
        | Op::RecvInto { socket: file, .. }
        | Op::Send { socket: file, .. }
        | Op::Readable { file } => file,
        _ => unreachable!("`submit` rejects file operations"),
    }
}

/// Its descriptor, and whether it writes. None for operations that this engine cannot do.
fn descriptor(op: &Op) -> Option<(RawFd, bool)> {
    match op {
        Op::Accept { .. } | Op::Recv { .. } | Op::RecvInto { .. } | Op::Readable { .. } => {
            Some((op_file(op).as_raw_fd(), false))
        }
        Op::Send { .. } => Some((op_file(op).as_raw_fd(), true)),
        _ => None,
    }
}
