//! How a channel begins: its first connection, by steps, none of which waits.

use std::sync::Arc;
use std::time::Instant;

use super::{Channel, Dialer, Dialing, OpenFiles, Reopening, Settings, copy_of, sleep};
use crate::error::Error;
use crate::handshake::{Offer, random_id};
use crate::message;
use crate::mux::Reached;
use crate::protocol::Command;
use crate::transport::{Bulk, ClientTransport, UsedIds};

/// A channel whose first connection is being made: [`Channel::connect`] waits for it, this does not. Dropping
/// it gives the channel up.
pub struct Beginning {
    /// None once it is over.
    given: Option<Given>,
    deadline: Instant,
    first: First,
}

/// What the channel is made of.
pub(super) struct Given {
    pub dialer: Dialer,
    pub offer: Offer,
    pub used: UsedIds,
    pub settings: Settings,
    pub files: Arc<OpenFiles>,
    /// What tells it the time.
    pub clock: fn() -> Instant,
    /// Pauses between attempts to connect are drawn from it.
    pub seed: u64,
}

/// A connection that may be the channel's first.
pub(super) struct Connected {
    pub transport: Box<dyn ClientTransport>,
    pub why_tcp: Option<String>,
    pub epoch: u64,
    /// Files of the session that the server may not have had.
    pub reopened: Reopening,
}

enum First {
    Unbegun,
    Dialing(Box<dyn Dialing>),
    /// The server is to say that nothing of earlier connections, or of superseded sessions, can still happen.
    Asking(Connected),
    /// It has been started again since the session's files were opened.
    Reopening(Connected),
    Over,
}

impl std::fmt::Debug for Beginning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Beginning").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

impl Beginning {
    /// With the arguments of [`Channel::connect`]. The first step begins.
    pub fn new(
        dialer: Dialer,
        offer: Offer,
        used: UsedIds,
        settings: Settings,
        files: Arc<OpenFiles>,
        deadline: Instant,
    ) -> Self {
        let seed = u128::from_ne_bytes(random_id()) as u64;
        let given = Given { dialer, offer, used, settings, files, clock: Instant::now, seed };
        Self { given: Some(given), deadline, first: First::Unbegun }
    }

    /// The channel takes the time from this clock, and draws its pauses from this seed: for tests.
    #[cfg(any(test, feature = "test-peers"))]
    pub fn with_clock(mut self, clock: fn() -> Instant, seed: u64) -> Self {
        if let Some(given) = &mut self.given {
            (given.clock, given.seed) = (clock, seed);
        }
        self
    }

    /// Goes on as far as that is possible now. Some once it is over; it is not called after that.
    pub fn step(&mut self) -> Option<Result<Channel, Error>> {
        let connected = match self.go_on() {
            Ok(None) => return None,
            Ok(Some(connected)) => connected,
            Err(error) => return Some(Err(error)),
        };
        self.given.take().map(|given| Ok(Channel::begun(given, connected)))
    }

    fn go_on(&mut self) -> Result<Option<Connected>, Error> {
        let Some(given) = &mut self.given else { return Ok(None) };
        loop {
            let now = (given.clock)();
            self.first = match std::mem::replace(&mut self.first, First::Over) {
                First::Unbegun => First::Dialing((given.dialer)(&given.offer, now, self.deadline)),
                First::Dialing(mut dialing) => {
                    let Some(reached) = dialing.step(now) else {
                        self.first = First::Dialing(dialing);
                        return Ok(None);
                    };
                    let Reached { mut transport, why_tcp, .. } = reached?;
                    let epoch = dialing.epoch().unwrap_or(0);
                    if let Some(timeout) = given.settings.request_timeout {
                        transport.set_request_timeout(timeout);
                    }
                    transport.core_mut().set_used_ids(&given.used);
                    let reopened = Reopening::default();
                    let mut connected = Connected { transport, why_tcp, epoch, reopened };
                    if epoch > 1 || !given.offer.supersedes.is_empty() {
                        connected.ask();
                        First::Asking(connected)
                    } else if given.files.are_missing(connected.transport.grant().server) {
                        connected.reopened = Reopening::new(&given.files);
                        First::Reopening(connected)
                    } else {
                        return Ok(Some(connected));
                    }
                }
                First::Asking(mut connected) => match connected.answer(now, self.deadline)? {
                    None => {
                        self.first = First::Asking(connected);
                        return Ok(None);
                    }
                    Some(is_known)
                        if !is_known || given.files.are_missing(connected.transport.grant().server) =>
                    {
                        connected.reopened = Reopening::new(&given.files);
                        First::Reopening(connected)
                    }
                    Some(_) => return Ok(Some(connected)),
                },
                First::Reopening(mut connected) => {
                    let Connected { transport, reopened, .. } = &mut connected;
                    reopened.step(&mut **transport);
                    connected.check(now, self.deadline)?;
                    if connected.reopened.is_over() {
                        given.files.are_at(connected.transport.grant().server);
                        return Ok(Some(connected));
                    }
                    self.first = First::Reopening(connected);
                    return Ok(None);
                }
                First::Over => return Ok(None),
            }
        }
    }

    /// Sleeps until the next step may have something to do.
    pub(super) fn wait(&mut self) -> Result<(), Error> {
        // A signal is no reason to give up half way.
        match &mut self.first {
            First::Dialing(dialing) => {
                let until = dialing.step_by().min(self.deadline);
                let _ = sleep(dialing.poll_fd(), until);
            }
            First::Asking(Connected { transport, .. }) | First::Reopening(Connected { transport, .. }) => {
                match transport.wait(Some(self.deadline)) {
                    Err(error) if error.errno() != libc::EINTR => return Err(error),
                    _ => {}
                }
            }
            First::Unbegun | First::Over => {}
        }
        Ok(())
    }
}

impl Connected {
    fn ask(&mut self) {
        let mut body = Vec::new();
        Command::Outcome { ids: &[] }.encode(&mut body);
        // If the connection has ended already, that is found out by the next `receive`.
        let _ = self.transport.send(0, &body, Bulk::None, true);
        self.transport.flush();
    }

    /// Whether the server knows the channel, once it has said that nothing of before can still happen.
    fn answer(&mut self, now: Instant, deadline: Instant) -> Result<Option<bool>, Error> {
        let mut replies = Vec::new();
        self.transport.receive(&mut replies);
        // If the connection has ended, so has the request.
        match replies.pop().filter(|_| self.transport.failure().is_none()) {
            Some(reply) => match reply.status.errno {
                0 => Ok(Some(true)),
                // A channel that is not known is as good as a new one.
                libc::ESTALE => Ok(Some(false)),
                errno => {
                    let text = message::text(&reply.body);
                    Err(Error::Closed { errno, text: format!("the server does not begin a session: {text}") })
                }
            },
            None => self.check(now, deadline).map(|()| None),
        }
    }

    /// Whether it can go on.
    fn check(&self, now: Instant, deadline: Instant) -> Result<(), Error> {
        if let Some(failure) = self.transport.failure() {
            return Err(copy_of(failure));
        }
        if now >= deadline {
            let text = "the server still has requests of an earlier connection of this program under way";
            return Err(Error::Closed { errno: libc::ETIMEDOUT, text: text.into() });
        }
        Ok(())
    }
}
