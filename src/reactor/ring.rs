//! The io_uring engine: turns operations into submissions and completions into events.
//!
//! An operation in flight lives in a slab; `user_data` is its key and a generation, so that nothing late can
//! hit a reused key. What the kernel points at (slots, boxes, strings) is on the heap and stays put while the
//! slab grows.

#[cfg(feature = "test-peers")]
mod attempt;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::types::{self, CancelBuilder, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use slab::Slab;

use super::nonblocking::{attempt, ended};
use super::received::Pool;
use super::{Config, Event, Op, OpId, Payload, Token, Waker};
use crate::memory::{Arena, FIXED_CHUNK_BYTES, SlotRange};
use crate::tuning::{POSTS_MAX, RING_DRAIN_TIMEOUT, WATCHED_MAX, WATCHED_POLLS_MAX};

/// `user_data` of submissions whose completions mean nothing to anybody.
const IGNORED: u64 = u64::MAX;
/// `user_data` of the poll on the waker's eventfd.
const WAKER: u64 = u64::MAX - 1;
/// The group of the buffers for [`Op::Recv`].
const BUFFER_GROUP: u16 = 0;
/// Their buffers. Each may be held until the end of a turn, and the next be received meanwhile.
const WATCHED_BUFFERS: u16 = 2 * WATCHED_MAX as u16;

struct InFlight {
    token: Token,
    generation: u32,
    op: Op,
}

pub(super) struct Ring {
    ring: IoUring,
    /// Tells this ring's fixed buffers from another's, see `Slot::fixed_index`.
    id: u32,
    in_flight: Slab<InFlight>,
    generation: u32,
    /// Submissions that found the queue full.
    backlog: VecDeque<squeue::Entry>,
    reaped: Vec<(u64, i32, u32)>,
    pool: Rc<Pool>,
    waker: Waker,
    has_files: bool,
    /// Receives that the kernel does not have: this thread looks for what arrives, as long as it spins.
    watched: Vec<Watched>,
    watched_pool: Option<Rc<Pool>>,
    /// Something watched has just ended, so that another look would be one too many.
    has_looked: bool,
    /// What has ended without the kernel's queue.
    ended: Vec<Event>,
}

/// See [`WATCHED_MAX`].
struct Watched {
    key: usize,
    looks: u32,
}

/// A system call that there must be for a ring, and how it failed.
pub(super) struct Unavailable(&'static str, io::Error);

impl Unavailable {
    fn of(call: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self(call, error)
    }
}

impl fmt::Display for Unavailable {
    /// Why io_uring is not used, and what to do about it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const PROFILE: &str = "allow io_uring_setup, io_uring_enter and io_uring_register in the seccomp \
            profile of the container or unit";
        let Self(call, error) = self;
        match error.raw_os_error() {
            Some(libc::EPERM) => {
                write!(
                    f,
                    "{call} is forbidden (EPERM). Set `sysctl kernel.io_uring_disabled=0`, or {PROFILE}"
                )
            }
            Some(libc::ENOSYS) => {
                write!(f, "there is no {call} (ENOSYS). Use Linux 6.1 or newer, or {PROFILE}")
            }
            Some(libc::EINVAL) => {
                write!(f, "this kernel's {call} is too old (EINVAL): Linux 6.1 or newer is needed")
            }
            Some(libc::ENOMEM) => f.write_str(
                "there is no memory for its rings (ENOMEM). Raise the memlock limit with `ulimit -l`",
            ),
            _ => write!(f, "{call}: {error}"),
        }
    }
}

/// What [`entry`], [`Ring::cancel`] and [`Ring::watch_waker`] submit. A restricted ring takes nothing else.
const OPCODES: [u8; 9] = [
    opcode::Accept::CODE,
    opcode::AsyncCancel::CODE,
    opcode::PollAdd::CODE,
    opcode::Read::CODE,
    opcode::ReadFixed::CODE,
    opcode::Recv::CODE,
    opcode::SendMsg::CODE,
    opcode::Write::CODE,
    opcode::WriteFixed::CODE,
];
const FLAGS: squeue::Flags = squeue::Flags::BUFFER_SELECT.union(squeue::Flags::FIXED_FILE);
/// What io_uring_register(2) does for a ring that is enabled: IORING_REGISTER_BUFFERS, .._FILES_UPDATE and
/// .._SYNC_CANCEL.
const REGISTRATIONS: [u8; 3] = [0, 6, 24];

/// A ring that takes no submissions yet. It can go to the thread that is to use it.
pub(super) struct Disabled {
    ring: IoUring,
    /// Why it takes whatever the kernel knows, though it was to be restricted.
    unrestricted: Option<io::Error>,
}

impl Disabled {
    pub fn new(config: &Config) -> Result<Self, Unavailable> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_clamp()
            .setup_cqsize(config.entries.saturating_mul(4))
            .build(config.entries)
            .map_err(Unavailable::of("io_uring_setup"))?;
        let mut unrestricted = None;
        if config.is_restricted {
            let mut restrictions: Vec<_> = OPCODES.map(Restriction::sqe_op).into();
            restrictions.push(Restriction::sqe_flags_allowed(FLAGS.bits()));
            restrictions.extend(REGISTRATIONS.map(Restriction::register_op));
            unrestricted = ring.submitter().register_restrictions(&mut restrictions).err();
        }
        Ok(Self { ring, unrestricted })
    }

    pub fn unrestricted(&self) -> Option<&io::Error> {
        self.unrestricted.as_ref()
    }
}

impl Ring {
    /// Enables a ring: from now on it belongs to this thread.
    pub fn new(Disabled { ring, .. }: Disabled, config: &Config, waker: &Waker) -> Result<Self, Unavailable> {
        static NEXT_ID: AtomicU32 = AtomicU32::new(0);
        let pool =
            Pool::new(config.received_count, config.received_bytes, true).map_err(Unavailable::of("mmap"))?;
        // SAFETY: the ring of buffers has `count` entries, is page-aligned (slots are), and lives in `pool`,
        // which is dropped after the ring or leaked with what is in flight.
        unsafe {
            ring.submitter().register_buf_ring_with_flags(pool.ring_address(), pool.count(), BUFFER_GROUP, 0)
        }
        .map_err(Unavailable::of("io_uring_register"))?;
        // Sockets beyond the table are used unregistered; so are all of them if the limit on open files is
        // too low for it.
        let has_files = ring.submitter().register_files_sparse(config.files).is_ok();
        ring.submitter().register_enable_rings().map_err(Unavailable::of("io_uring_register"))?;
        // A sandbox may allow the one and not the other.
        ring.submit().map_err(Unavailable::of("io_uring_enter"))?;
        // One that does not spin does not look.
        let watched_pool = if config.spin.is_zero() {
            None
        } else {
            Some(Pool::new(WATCHED_BUFFERS, config.received_bytes, false).map_err(Unavailable::of("mmap"))?)
        };
        let mut this = Self {
            ring,
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            in_flight: Slab::with_capacity(config.entries as usize),
            generation: 0,
            backlog: VecDeque::new(),
            reaped: Vec::new(),
            pool,
            waker: waker.clone(),
            has_files,
            watched: Vec::new(),
            watched_pool,
            has_looked: false,
            ended: Vec::new(),
        };
        this.watch_waker();
        Ok(this)
    }

    pub fn has_files(&self) -> bool {
        self.has_files
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    pub fn register_arena(&mut self, arena: &Arena) -> io::Result<()> {
        let chunks = arena.chunks(FIXED_CHUNK_BYTES);
        // SAFETY: the chunks are the arena's mapping. The kernel pins its pages, so that unmapping it before
        // the ring is gone leaves the kernel with pages of its own and no dangling address.
        unsafe { self.ring.submitter().register_buffers(&chunks)? };
        arena.set_registered(self.id);
        Ok(())
    }

    /// Puts a file into the table, or takes one out (-1). Nothing in flight uses the index: it would hold the
    /// `File` that has it.
    pub fn set_file(&mut self, index: u32, fd: RawFd) -> bool {
        self.ring.submitter().register_files_update(index, &[fd]).is_ok()
    }

    fn watch_waker(&mut self) {
        let fd = types::Fd(self.waker.eventfd().as_raw_fd());
        self.push(opcode::PollAdd::new(fd, libc::POLLIN as u32).build().user_data(WAKER));
    }

    fn push(&mut self, entry: squeue::Entry) {
        if self.backlog.is_empty() {
            // SAFETY: what the entry points at is owned by `in_flight` (or is static, or the waker's) until
            // its completion.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            self.enter(0, None);
            // SAFETY: as above.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
        }
        self.backlog.push_back(entry);
    }

    pub fn submit(&mut self, token: Token, op: Op) -> OpId {
        let is_watched =
            self.watched_pool.is_some() && self.watched.len() < WATCHED_MAX && matches!(op, Op::Recv { .. });
        let key = self.insert(token, op);
        if is_watched {
            self.watched.push(Watched { key, looks: 0 });
            return OpId(self.user_data(key));
        }
        self.arm(key)
    }

    fn insert(&mut self, token: Token, op: Op) -> usize {
        self.generation = (self.generation + 1) & 0x7fff_ffff;
        self.in_flight.insert(InFlight { token, generation: self.generation, op })
    }

    fn user_data(&self, key: usize) -> u64 {
        u64::from(self.in_flight[key].generation) << 32 | key as u64
    }

    /// Gives an operation to the kernel.
    fn arm(&mut self, key: usize) -> OpId {
        let entry = entry(&mut self.in_flight[key].op, self.id);
        let user_data = self.user_data(key);
        self.push(entry.user_data(user_data));
        OpId(user_data)
    }

    /// Looks at the sockets watched. Whether something has ended.
    fn look(&mut self) -> bool {
        let Some(pool) = self.watched_pool.clone() else { return false };
        let mut at = 0;
        while let Some(watched) = self.watched.get_mut(at) {
            let key = watched.key;
            watched.looks += 1;
            match attempt(&mut self.in_flight[key].op, &pool) {
                Err(libc::EAGAIN | libc::EINTR) if watched.looks < WATCHED_POLLS_MAX => at += 1,
                Err(libc::EAGAIN | libc::EINTR | libc::ENOBUFS) => {
                    self.watched.swap_remove(at);
                    self.arm(key);
                }
                outcome => {
                    self.watched.swap_remove(at);
                    let InFlight { token, op, .. } = self.in_flight.remove(key);
                    self.ended.push(ended(token, op, outcome));
                }
            }
        }
        !self.ended.is_empty()
    }

    /// From now on the kernel looks: this thread is about to sleep, or has something to cancel.
    fn arm_watched(&mut self) {
        while let Some(Watched { key, .. }) = self.watched.pop() {
            self.arm(key);
        }
    }

    pub fn cancel(&mut self, id: OpId) {
        self.arm_watched();
        self.push(opcode::AsyncCancel::new(id.0).build().user_data(IGNORED));
    }

    pub fn submit_now(&mut self) {
        self.enter(0, None);
    }

    pub fn poll_ready(&mut self) -> bool {
        !self.ring.completion().is_empty()
            || {
                let submission = self.ring.submission();
                submission.taskrun() || submission.cq_overflow()
            }
            || {
                self.has_looked = self.look();
                self.has_looked
            }
    }

    pub fn poll(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        let (idle, news) = {
            let submission = self.ring.submission();
            (
                submission.is_empty() && self.backlog.is_empty(),
                submission.taskrun() || submission.cq_overflow(),
            )
        };
        if !idle || news {
            self.enter(0, None);
            self.post_rest();
        }
        self.reap(events);
        // Even if something has ended already: sends keep ending, and who is watched would never be heard.
        if !std::mem::take(&mut self.has_looked) {
            self.look();
        }
        events.append(&mut self.ended);
        Ok(())
    }

    pub fn sleep(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()> {
        self.arm_watched();
        self.enter(1, timeout);
        self.post_rest();
        self.reap(events);
        Ok(())
    }

    /// Has the kernel post the other completions that there are: newer ones (6.18) post 20 at a time.
    fn post_rest(&mut self) {
        for _ in 0..POSTS_MAX {
            if !self.ring.submission().taskrun() {
                break;
            }
            self.enter(0, None);
        }
    }

    /// Passes submissions on, and waits for `want` completions.
    fn enter(&mut self, want: usize, timeout: Option<Duration>) {
        loop {
            while let Some(entry) = self.backlog.front() {
                // SAFETY: as in `push`.
                if unsafe { self.ring.submission().push(entry) }.is_err() {
                    break;
                }
                self.backlog.pop_front();
            }
            let timespec = timeout.map(Timespec::from);
            let args = match &timespec {
                Some(timespec) => SubmitArgs::new().timespec(timespec),
                None => SubmitArgs::new(),
            };
            // What would end the wait may be among those that found no room yet.
            let want = if self.backlog.is_empty() { want } else { 0 };
            match self.ring.submitter().submit_with_args(want, &args) {
                Ok(_) if !self.backlog.is_empty() && self.ring.submission().is_empty() => {}
                // Interrupted, out of time, or completions must be taken in before more is accepted: the
                // caller reaps, and comes again.
                Ok(_) => return,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN | libc::ENOMEM) => return,
                    _ => panic!("io_uring_enter failed, which means that the ring is misused: {error}"),
                },
            }
        }
    }

    fn reap(&mut self, events: &mut Vec<Event>) {
        let mut reaped = std::mem::take(&mut self.reaped);
        reaped.extend(self.ring.completion().map(|cqe| (cqe.user_data(), cqe.result(), cqe.flags())));
        for (user_data, result, flags) in reaped.drain(..) {
            match user_data {
                IGNORED => {}
                WAKER => {
                    self.waker.drain();
                    self.watch_waker();
                }
                _ => {
                    if let Some(event) = self.complete(user_data, result, flags) {
                        events.push(event);
                    }
                }
            }
        }
        self.reaped = reaped;
    }

    fn complete(&mut self, user_data: u64, result: i32, flags: u32) -> Option<Event> {
        let key = user_data as u32 as usize;
        let current = self.in_flight.get(key).is_some_and(|op| u64::from(op.generation) == user_data >> 32);
        debug_assert!(current, "a completion for an operation that is not in flight");
        if !current {
            return None;
        }
        let InFlight { token, op, .. } = self.in_flight.remove(key);
        let code = if result < 0 { Err(-result) } else { Ok(result as u32) };
        // SAFETY: the kernel has just opened this descriptor for this completion, and nobody else knows it.
        let new_fd = || code.ok().map(|fd| unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
        let payload = match op {
            Op::Accept { .. } => new_fd().map_or(Payload::None, Payload::Fd),
            Op::Recv { .. } => match cqueue::buffer_select(flags) {
                Some(index) => Payload::Received(self.pool.received(index, code.unwrap_or(0) as usize)),
                None => Payload::None,
            },
            Op::RecvInto { target: range, .. }
            | Op::Read { target: range, .. }
            | Op::Write { source: range, .. } => Payload::Slot(range),
            Op::Send { mut batch, .. } => {
                batch.advance(code.unwrap_or(0) as usize);
                Payload::Batch(batch)
            }
            Op::Readable { .. } => Payload::None,
        };
        Some(Event { token, result: code, payload })
    }
}

impl Drop for Ring {
    /// Cancels what is in flight and waits for it to end; what does not end is leaked, for the kernel may
    /// still write to it.
    fn drop(&mut self) {
        let deadline = Instant::now() + RING_DRAIN_TIMEOUT;
        for Watched { key, .. } in self.watched.drain(..) {
            self.in_flight.remove(key);
        }
        self.enter(0, None);
        // This waits for what cannot be cancelled (a read from a disk that hangs), so it has a limit too.
        let limit = Timespec::from(RING_DRAIN_TIMEOUT / 2);
        let _ = self.ring.submitter().register_sync_cancel(Some(limit), CancelBuilder::any());
        let mut events = Vec::new();
        while !self.in_flight.is_empty() && Instant::now() < deadline {
            self.enter(1, Some(Duration::from_millis(50)));
            let mut reaped: Vec<_> =
                self.ring.completion().map(|cqe| (cqe.user_data(), cqe.result(), cqe.flags())).collect();
            events.extend(
                reaped
                    .drain(..)
                    .filter(|(user_data, ..)| !matches!(*user_data, IGNORED | WAKER))
                    .filter_map(|(user_data, result, flags)| self.complete(user_data, result, flags)),
            );
            events.clear();
        }
        if !self.in_flight.is_empty() {
            tracing::warn!(
                name: "operations-leaked",
                count = self.in_flight.len(),
                "Operations did not end in time; their memory is leaked."
            );
            std::mem::forget(std::mem::take(&mut self.in_flight));
            std::mem::forget(Rc::clone(&self.pool));
        }
    }
}

/// Builds an entry for a file: by its index if it is registered, else by its descriptor.
macro_rules! on {
    ($file:expr, $fd:ident => $build:expr) => {
        match $file.0.fixed {
            Some(index) => {
                let $fd = types::Fixed(index);
                $build
            }
            None => {
                let $fd = types::Fd($file.as_raw_fd());
                $build
            }
        }
    };
}

/// The submission for an operation. It points into heap memory that `op` owns.
fn entry(op: &mut Op, ring: u32) -> squeue::Entry {
    let address = |range: &SlotRange| {
        let bytes = range.bytes();
        (bytes.as_ptr().cast_mut(), range.len as u32, range.slot.fixed_index(ring))
    };
    match op {
        Op::Accept { listener } => {
            on!(listener, fd => opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut())
            .flags(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK)
            .build())
        }
        Op::Recv { socket, len_max } => {
            on!(socket, fd => opcode::Recv::new(fd, std::ptr::null_mut(), *len_max)
            .buf_group(BUFFER_GROUP)
            .build())
            .flags(squeue::Flags::BUFFER_SELECT)
        }
        Op::RecvInto { socket, target } => {
            let (pointer, len, _) = address(target);
            on!(socket, fd => opcode::Recv::new(fd, pointer, len).build())
        }
        Op::Send { socket, batch } => {
            let msghdr = batch.msghdr();
            on!(socket, fd => opcode::SendMsg::new(fd, msghdr).flags(libc::MSG_NOSIGNAL as u32).build())
        }
        Op::Readable { file } => on!(file, fd => opcode::PollAdd::new(fd, libc::POLLIN as u32).build()),
        Op::Read { file, target, offset, nowait } => {
            let fd = types::Fd(file.as_fd().as_raw_fd());
            match address(target) {
                (pointer, len, Some(index)) => opcode::ReadFixed::new(fd, pointer, len, index)
                    .offset(*offset)
                    .rw_flags(rw_flags(*nowait))
                    .build(),
                (pointer, len, None) => {
                    opcode::Read::new(fd, pointer, len).offset(*offset).rw_flags(rw_flags(*nowait)).build()
                }
            }
        }
        Op::Write { file, source, offset, nowait } => {
            let fd = types::Fd(file.as_fd().as_raw_fd());
            match address(source) {
                (pointer, len, Some(index)) => opcode::WriteFixed::new(fd, pointer, len, index)
                    .offset(*offset)
                    .rw_flags(rw_flags(*nowait))
                    .build(),
                (pointer, len, None) => {
                    opcode::Write::new(fd, pointer, len).offset(*offset).rw_flags(rw_flags(*nowait)).build()
                }
            }
        }
    }
}

fn rw_flags(nowait: bool) -> i32 {
    if nowait { libc::RWF_NOWAIT } else { 0 }
}
