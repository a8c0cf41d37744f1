//! What a client by RDMA sleeps on: one descriptor that stands for the completion channel, rdma_cm's events,
//! the device's and the companion's.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::io::Errno;

use crate::client::timespec;

use super::super::cm::{Event, EventChannel};
use super::super::device::{CompletionChannel, Domain};
use super::super::queue_pair::QueuePair;

#[derive(Debug)]
pub(super) struct Descriptors {
    channel: Arc<CompletionChannel>,
    /// rdma_cm's, if that has made the connection.
    events: Option<Arc<EventChannel>>,
    domain: Arc<Domain>,
    _async_fd: OwnedFd,
    epoll: OwnedFd,
    /// Raised when a program is about to poll and there is something already.
    wakeup: OwnedFd,
    is_awake: bool,
    /// A completion will be announced.
    is_armed: bool,
    /// A program polls the descriptor by itself.
    is_watched: bool,
    /// When they were last emptied.
    taken: Instant,
}

impl Descriptors {
    pub fn new(
        domain: &Arc<Domain>,
        channel: Arc<CompletionChannel>,
        events: Option<Arc<EventChannel>>,
        companion: Option<BorrowedFd<'_>>,
        now: Instant,
    ) -> io::Result<Self> {
        let async_fd = domain.device.async_fd()?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let wakeup = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let fds = [channel.fd(), async_fd.as_fd(), wakeup.as_fd()];
        for fd in fds.into_iter().chain(events.iter().map(|events| events.fd())).chain(companion) {
            epoll::add(&epoll, fd, EventData::new_u64(0), EventFlags::IN)?;
        }
        Ok(Self {
            channel,
            events,
            domain: Arc::clone(domain),
            _async_fd: async_fd,
            epoll,
            wakeup,
            is_awake: false,
            is_armed: false,
            is_watched: false,
            taken: now,
        })
    }

    /// The one that stands for all.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// The completion channel's.
    pub fn completions(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }

    pub fn is_armed(&self) -> bool {
        self.is_armed
    }

    /// Whether a program polls the descriptor by itself.
    pub fn is_watched(&self) -> bool {
        self.is_watched
    }

    /// Whether they were last emptied so long before `now`.
    pub fn taken_before(&self, now: Instant, time: Duration) -> bool {
        now.saturating_duration_since(self.taken) >= time
    }

    /// Has the next completion announced.
    pub fn arm(&mut self, qp: &QueuePair) -> io::Result<()> {
        if !self.is_armed {
            qp.arm()?;
            self.is_armed = true;
        }
        Ok(())
    }

    /// A program is about to poll the descriptor by itself, from now on.
    pub fn watch(&mut self, qp: &mut QueuePair) {
        if !std::mem::replace(&mut self.is_watched, true) {
            self.is_armed = qp.arm().is_ok();
            if qp.look() {
                self.is_awake = rustix::io::write(&self.wakeup, &1u64.to_ne_bytes()).is_ok();
            }
        }
    }

    /// Sleeps until one of them has something to say, or for `timeout`. Whether one has.
    pub fn sleep(&self, timeout: Option<Duration>) -> Result<bool, Errno> {
        let mut fds = [PollFd::from_borrowed_fd(self.epoll.as_fd(), PollFlags::IN)];
        Ok(rustix::event::poll(&mut fds, timeout.map(timespec).as_ref())? > 0)
    }

    /// Empties the completion channel and logs what the device says. rdma_cm's events are left:
    /// [`Descriptors::next_event`].
    pub fn take(&mut self, now: Instant) {
        self.taken = now;
        let is_armed = &mut self.is_armed;
        self.channel.take_events(|_| *is_armed = false);
        if std::mem::take(&mut self.is_awake) {
            let _ = rustix::io::read(&self.wakeup, &mut [0; 8]);
        }
        for what in self.domain.device.take_async_events() {
            tracing::warn!(
                name: "rdma-device-event",
                device = self.domain.device.name(),
                "An RDMA device says: {what}."
            );
        }
    }

    /// What rdma_cm has to say.
    pub fn next_event(&self) -> Option<Event> {
        self.events.as_ref().and_then(EventChannel::next)
    }

    /// Leaves them to the process that a forked child was copied from.
    pub fn forget(&mut self) {
        std::mem::forget((self.events.take(), Arc::clone(&self.channel), Arc::clone(&self.domain)));
    }
}
