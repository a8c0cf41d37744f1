//! Connections that are being made: what every transport's way to one has in common.
//!
//! Making a connection takes several round trips. A [`Connecting`] does what can be done now and says what it
//! waits for, so that a program that only polls descriptors can connect, too. `finish` waits in its place.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

/// A descriptor, and what it must be ready for.
#[derive(Clone, Copy, Debug)]
pub struct Awaited<'fd> {
    /// The descriptor.
    pub fd: BorrowedFd<'fd>,
    /// It is waited for until something can be received.
    pub input: bool,
    /// It is waited for until something can be sent.
    pub output: bool,
}

impl<'fd> Awaited<'fd> {
    /// Waits until something can be received.
    pub fn input(fd: BorrowedFd<'fd>) -> Self {
        Self { fd, input: true, output: false }
    }

    /// Waits until something can be sent.
    pub fn output(fd: BorrowedFd<'fd>) -> Self {
        Self { fd, input: false, output: true }
    }

    /// The same for poll(2).
    pub fn poll_fd(&self) -> PollFd<'fd> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, self.input);
        flags.set(PollFlags::OUT, self.output);
        PollFd::from_borrowed_fd(self.fd, flags)
    }
}

/// A connection that is being made. Nothing here blocks; dropping it gives the connection up.
pub trait Connecting: Send {
    /// The connection, or why there is none.
    type Outcome;

    /// Goes on as far as that is possible at `now`. Some once it is over; it is not called after that.
    fn step(&mut self, now: Instant) -> Option<Self::Outcome>;

    /// What to poll until the next step, at most two descriptors. After a step they may be others.
    fn awaited(&mut self) -> Vec<Awaited<'_>>;

    /// When the next step is due even if nothing can be polled by then.
    fn step_by(&self) -> Instant;
}

/// Waits for a connection that is being made.
pub(crate) fn finish<C: Connecting + ?Sized>(connecting: &mut C) -> C::Outcome {
    loop {
        if let Some(outcome) = connecting.step(Instant::now()) {
            return outcome;
        }
        let step_by = connecting.step_by();
        let _ = sleep(&connecting.awaited(), step_by);
    }
}

/// Sleeps until one of the descriptors can be used, or until `deadline`. It may fail before: with EINTR
/// after a signal, or because the kernel cannot let the thread sleep. A caller that ignores this tries again
/// until the deadline.
pub(crate) fn sleep(awaited: &[Awaited<'_>], deadline: Instant) -> Result<(), Errno> {
    let mut fds: Vec<_> = awaited.iter().map(Awaited::poll_fd).collect();
    let left = deadline.saturating_duration_since(Instant::now());
    rustix::event::poll(&mut fds, Timespec::try_from(left).ok().as_ref()).map(drop)
}
