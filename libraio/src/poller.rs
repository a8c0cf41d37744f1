//! The descriptor that a foreign event loop polls: an epoll instance with the socket, a flag and a timer in
//! it. The socket is another one after a reconnect; the timer is then also for the next attempt.
//!
//! The socket is watched for writing only while output is pending. The flag is raised while completions are
//! there that the program has not collected. The timer wakes a program with something in flight in time to
//! ping a silent server. All are level-triggered and changed lazily, so that a context that keeps busy makes
//! no system calls for them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use raio_transport::channel::Watch;
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
    /// Duplicates of what the channel watches. The originals close with their connection, and what a forked
    /// child has of them would stay in the epoll instance.
    watched: Vec<OwnedFd>,
    /// The connection that is watched; None while one is being made.
    connection: Option<u64>,
    /// The socket is watched for writing.
    out: bool,
    raised: bool,
    /// When the timer goes off.
    tick_at: Option<Instant>,
}

impl Poller {
    pub(crate) fn new() -> std::io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let flag = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        for fd in [flag.as_fd(), timer.as_fd()] {
            epoll::add(&epoll, fd, EventData::new_u64(0), EventFlags::IN)?;
        }
        let (watched, connection) = (Vec::new(), None);
        Ok(Self { epoll, flag, timer, watched, connection, out: false, raised: false, tick_at: None })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Brings it in line: with what the channel watches, whether there is something to collect, and how soon
    /// at the latest the context must be called while its connection is whole. `due`: when in any case.
    pub(crate) fn sync(
        &mut self,
        watch: Watch<'_>,
        collect: bool,
        tick: Option<Duration>,
        due: Option<Instant>,
    ) {
        let mut tick_at = None;
        match watch {
            Watch::Connected(socket, out, connection) if self.connection == Some(connection) => {
                if out != self.out
                    && let Some(watched) = self.watched.first()
                {
                    let _ = socket;
                    let flags = if out { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
                    if epoll::modify(&self.epoll, watched, EventData::new_u64(0), flags).is_ok() {
                        self.out = out;
                    }
                }
            }
            Watch::Connected(socket, out, connection) => {
                self.watch(&[(socket, out)]);
                (self.connection, self.out) = (Some(connection), out);
            }
            Watch::Connecting(fds, due) => {
                self.watch(&fds);
                self.connection = None;
                tick_at = Some(due);
            }
            // The failure is to be collected.
            Watch::Failed => {
                self.watch(&[]);
                self.connection = None;
                tick_at = Some(Instant::now());
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
        // The timer stays set when nothing is in flight any more: one wake-up for nothing is cheaper than two
        // system calls for each operation.
        let is_set_by = |at| self.tick_at.is_some_and(|set| set <= at);
        let tick_at = match (tick_at, tick) {
            (Some(at), _) if !is_set_by(at) => Some(at),
            (None, Some(tick)) if self.tick_at.is_none() => Some(Instant::now() + tick),
            _ => None,
        };
        let due = due.filter(|&due| !is_set_by(due));
        let Some(tick_at) = tick_at.into_iter().chain(due).min() else { return };
        // A timer of no time would never go off.
        let left = tick_at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let value = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        if timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok() {
            self.tick_at = Some(tick_at);
        }
    }

    /// Watches these descriptors, and whether for writing, in the place of those before.
    fn watch(&mut self, fds: &[(BorrowedFd<'_>, bool)]) {
        for fd in self.watched.drain(..) {
            let _ = epoll::delete(&self.epoll, &fd);
        }
        for &(fd, out) in fds {
            // Without descriptors to spare the timer must do.
            let Ok(fd) = rustix::io::fcntl_dupfd_cloexec(fd, 0) else { continue };
            let flags = if out { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            if epoll::add(&self.epoll, &fd, EventData::new_u64(0), flags).is_ok() {
                self.watched.push(fd);
            }
        }
    }
}
