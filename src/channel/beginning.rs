//! How a channel begins: its first connection, by steps, none of which waits.

use std::sync::Arc;
use std::time::Instant;

use super::{Channel, Dialer, Dialing, OpenFiles, Reopening, Settings, copy_of, sleep};
use crate::error::Error;
use crate::handshake::Offer;
use crate::message;
use crate::mux::Reached;
use crate::protocol::{Command, FileHandle};
use crate::random;
use crate::transport::{Bulk, ClientTransport, Reply, SendOptions, UsedIds};

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
    /// The server has said that it does not know the channel.
    pub is_gone: bool,
    /// Files of the session that the server may not have had.
    pub reopened: Reopening,
}

enum First {
    Unbegun,
    Dialing(Box<dyn Dialing>),
    /// The server is to say that nothing of earlier connections, or of superseded sessions, can still happen.
    Asking(Connected),
    /// The server is to say whether it has the session's files: it may have ended the session, of which it
    /// had heard nothing for long.
    Probing(Connected),
    /// It has not.
    Reopening(Connected),
    Begun(Connected),
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
        let seed = random::number();
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
                    let Reached { mut transport, why_tcp } = reached?;
                    let epoch = dialing.epoch().unwrap_or(0);
                    if let Some(timeout) = given.settings.request_timeout {
                        transport.set_request_timeout(timeout);
                    }
                    transport.core_mut().set_used_ids(&given.used);
                    given.files.channel_begins();
                    let reopened = Reopening::default();
                    let mut connected = Connected { transport, why_tcp, epoch, is_gone: false, reopened };
                    if epoch > 1 || !given.offer.supersedes.is_empty() {
                        connected.ask();
                        First::Asking(connected)
                    } else {
                        connected.look_for(&given.files)
                    }
                }
                First::Probing(mut connected) => match connected.reply(now, self.deadline)? {
                    None => {
                        self.first = First::Probing(connected);
                        return Ok(None);
                    }
                    Some(reply) if reply.status.errno == libc::EBADF => connected.reopen(&given.files),
                    Some(_) => First::Begun(connected),
                },
                First::Asking(mut connected) => match connected.answer(now, self.deadline)? {
                    None => {
                        self.first = First::Asking(connected);
                        return Ok(None);
                    }
                    // That it knows the channel says nothing of the session's files: it may have ended the
                    // session between two attempts to connect.
                    Some(true) => connected.look_for(&given.files),
                    Some(false) => connected.reopen(&given.files),
                },
                First::Reopening(mut connected) => {
                    let Connected { transport, reopened, .. } = &mut connected;
                    reopened.step(&mut **transport, &given.files);
                    connected.check(now, self.deadline)?;
                    if connected.reopened.is_over() {
                        given.files.are_at(connected.transport.grant().server);
                        First::Begun(connected)
                    } else {
                        self.first = First::Reopening(connected);
                        return Ok(None);
                    }
                }
                First::Begun(connected) => return Ok(Some(connected)),
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
            First::Asking(Connected { transport, .. })
            | First::Probing(Connected { transport, .. })
            | First::Reopening(Connected { transport, .. }) => match transport.wait(Some(self.deadline)) {
                Err(error) if error.errno() != libc::EINTR => return Err(error),
                _ => {}
            },
            First::Unbegun | First::Begun(_) | First::Over => {}
        }
        Ok(())
    }
}

impl Connected {
    fn ask(&mut self) {
        self.send(&Command::Outcome { ids: &[] }, SendOptions::CONTROL);
    }

    /// Finds out whether the server has the session's files.
    fn look_for(mut self, files: &OpenFiles) -> First {
        match files.readable() {
            _ if files.is_empty() => First::Begun(self),
            Some(file) if !files.are_missing(self.transport.grant().server) => {
                self.probe(file);
                First::Probing(self)
            }
            _ => self.reopen(files),
        }
    }

    /// Has the server look at a file that is open for reading, without touching its storage.
    fn probe(&mut self, file: FileHandle) {
        self.send(&Command::Read { file, offset: 0, length: 0 }, SendOptions::PLAIN);
    }

    fn send(&mut self, command: &Command<'_>, options: SendOptions) {
        let mut body = Vec::new();
        command.encode(&mut body);
        // If the connection has ended already, that is found out by the next `receive`.
        let _ = self.transport.send(0, &body, Bulk::None, options);
        self.transport.flush();
    }

    fn reopen(mut self, files: &OpenFiles) -> First {
        self.reopened = Reopening::new(files);
        First::Reopening(self)
    }

    /// The reply to what was sent, if it has come.
    fn reply(&mut self, now: Instant, deadline: Instant) -> Result<Option<Reply>, Error> {
        let mut replies = Vec::new();
        self.transport.receive(&mut replies);
        // If the connection has ended, so has the request.
        match replies.pop().filter(|_| self.transport.failure().is_none()) {
            Some(reply) => Ok(Some(reply)),
            None => self.check(now, deadline).map(|()| None),
        }
    }

    /// Whether the server knows the channel, once it has said that nothing of before can still happen. That
    /// it does not it says until it knows that this was heard, so it is asked once more.
    fn answer(&mut self, now: Instant, deadline: Instant) -> Result<Option<bool>, Error> {
        let Some(reply) = self.reply(now, deadline)? else { return Ok(None) };
        match reply.status.errno {
            0 => Ok(Some(!self.is_gone)),
            // A channel that is not known is as good as a new one.
            libc::ESTALE if self.is_gone => Ok(Some(false)),
            libc::ESTALE => {
                self.is_gone = true;
                self.ask();
                Ok(None)
            }
            errno => {
                let text = message::text(&reply.body);
                Err(Error::Closed { errno, text: format!("the server does not begin a session: {text}") })
            }
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
