//! The descriptor that a foreign event loop polls: an epoll instance with the socket, a flag and a timer in
//! it.
//!
//! The socket is watched for writing only while output is pending. The flag is raised while completions are
//! there that the program has not collected. The timer wakes a program with something in flight in time to
//! ping a silent server. All are level-triggered and changed lazily, so that a context that keeps busy makes
//! no system calls for them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// A descriptor to poll.
#[derive(Debug)]
pub(crate) struct Poller {
    epoll: OwnedFd,
    /// An eventfd: the flag.
    flag: OwnedFd,
    timer: OwnedFd,
    /// The socket is watched for writing.
    out: bool,
    raised: bool,
    /// When the timer goes off.
    tick_at: Option<Instant>,
}

impl Poller {
    /// For a context with this socket.
    pub(crate) fn new(socket: BorrowedFd<'_>) -> std::io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let flag = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        for fd in [socket, flag.as_fd(), timer.as_fd()] {
            epoll::add(&epoll, fd, EventData::new_u64(0), EventFlags::IN)?;
        }
        Ok(Self { epoll, flag, timer, out: false, raised: false, tick_at: None })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Brings it in line: whether output is pending on the socket, whether there is something to collect, and
    /// how soon at the latest the context must be called.
    pub(crate) fn sync(&mut self, socket: BorrowedFd<'_>, out: bool, collect: bool, tick: Option<Duration>) {
        if out != self.out {
            let flags = if out { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            if epoll::modify(&self.epoll, socket, EventData::new_u64(0), flags).is_ok() {
                self.out = out;
            }
        }
        if collect != self.raised {
            // An eventfd that is read or written in turn can neither block nor overflow.
            let done = if collect {
                rustix::io::write(&self.flag, &1u64.to_ne_bytes()).is_ok()
            } else {
                rustix::io::read(&self.flag, &mut [0; 8]).is_ok()
            };
            if done {
                self.raised = collect;
            }
        }
        if let Some(at) = self.tick_at
            && Instant::now() >= at
        {
            let _ = rustix::io::read(&self.timer, &mut [0; 8]);
            self.tick_at = None;
        }
        if let (Some(tick), None) = (tick, self.tick_at) {
            // The timer stays set when nothing is in flight any more: one wake-up for nothing is cheaper than
            // two system calls for each operation.
            let value = Timespec { tv_sec: tick.as_secs() as i64, tv_nsec: i64::from(tick.subsec_nanos()) };
            let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
            if timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok() {
                self.tick_at = Some(Instant::now() + tick);
            }
        }
    }
}
