//! The control connection of a session: it carries what blocks its caller for a round trip (open, stat,
//! close), one call at a time. Who may use it when is the session's business.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use raio_transport::channel::Channel;
use raio_transport::protocol::{Command, FileHandle, Opcode};
use raio_transport::transport::{Bulk, NotSent, Reply, SendOptions};

use crate::error::{Error, oversized, reconnecting, session_stopped, timed_out, unsupported};
use crate::tuning::{STOP_CHECK_INTERVAL, SUSPECT_TIMEOUT};
use raio_transport::sync::lock;

/// Closes of files, and ends of listings, that nobody waits for. The next thread with the control connection
/// sends them (the thread that completes an operation does not, because it would wait for another thread's
/// round trip), or a context with its next requests: the control connection has few credits, and a program
/// that opens files as fast as it can would have ever more of them open.
#[derive(Debug, Default)]
pub(crate) struct PendingCloses {
    commands: Mutex<Vec<Command<'static>>>,
    /// How many there are, to be looked at without a lock.
    count: AtomicUsize,
}

impl PendingCloses {
    pub(crate) fn push(&self, command: Command<'static>) {
        self.change(|commands| commands.push(command));
    }

    pub(crate) fn pop(&self) -> Option<Command<'static>> {
        self.change(Vec::pop)
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Relaxed) == 0
    }

    pub(crate) fn clear(&self) {
        self.change(Vec::clear);
    }

    fn change<T>(&self, change: impl FnOnce(&mut Vec<Command<'static>>) -> T) -> T {
        let mut commands = lock(&self.commands);
        let result = change(&mut commands);
        self.count.store(commands.len(), Ordering::Relaxed);
        result
    }
}

/// Whether this is a close of a file that the server does not have open any more: an earlier connection has
/// brought it the same close, or it was restarted, and the file not opened again as it was being closed.
pub(crate) fn is_closed_anyway(opcode: Opcode, reply: &Reply, channel: &Channel) -> bool {
    opcode == Opcode::Close && reply.status.errno == libc::EBADF && channel.connections() > 1
}

/// The command that ends a listing.
pub(crate) fn end_of_listing(listing: u64) -> Command<'static> {
    Command::ListNext { listing, is_odd: false, length: 0 }
}

/// Closes what was opened by a request, if it opens something, whose answer nobody wants any more.
pub(crate) fn close_of(opcode: Opcode, reply: &Reply) -> Option<Command<'static>> {
    match opcode {
        _ if !reply.status.is_ok() => None,
        Opcode::Open => u32::try_from(reply.result).ok().map(|file| Command::Close(FileHandle(file))),
        Opcode::List if reply.result != 0 => Some(end_of_listing(reply.result)),
        _ => None,
    }
}

/// A control connection.
pub(crate) struct Control {
    channel: Channel,
    replies: Vec<Reply>,
    body: Vec<u8>,
    tag: u64,
    /// Requests that nobody waits for any more, and that open something: it is closed.
    abandoned: Vec<(u64, Opcode)>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("tag", &self.tag).finish_non_exhaustive()
    }
}

impl Control {
    pub(crate) fn new(channel: Channel) -> Self {
        Self { channel, replies: Vec::new(), body: Vec::new(), tag: 0, abandoned: Vec::new() }
    }

    /// Whether something that must not run twice was sent and not answered.
    pub(crate) fn is_owed(&self) -> bool {
        self.channel.has_unanswered_recorded()
    }

    /// Waits for the answers to closes, for a short time: the end of a connection with nothing unanswered
    /// ends its channel.
    pub(crate) fn settle(&mut self) {
        let deadline = Instant::now() + STOP_CHECK_INTERVAL;
        while self.channel.is_waiting() && !self.is_owed() && Instant::now() < deadline {
            self.channel.receive(&mut self.replies);
            if self.channel.is_waiting() && self.channel.wait(Some(deadline)).is_err() {
                return;
            }
        }
    }

    /// Pings a server that has let another connection of the session time out.
    pub(crate) fn ping_suspect(&mut self) {
        self.channel.ping(SUSPECT_TIMEOUT);
    }

    /// The most bytes of one request.
    pub(crate) fn data_bytes_max(&self) -> usize {
        self.channel.grant().data_bytes_max as usize
    }

    /// Has the server execute a command, and waits for its answer. `is_stopped` tells whether another thread
    /// has stopped the session.
    pub(crate) fn call(
        &mut self,
        command: &Command<'_>,
        bulk: Bulk,
        deadline: Instant,
        closes: &PendingCloses,
        is_stopped: &dyn Fn() -> bool,
    ) -> Result<Reply, Error> {
        if let Some(failure) = self.channel.failure() {
            return Err(Error::not_connected(failure));
        }
        // A connection that has broken since the last call is made again before anything is sent by it.
        self.receive(closes);
        if let Some(error) = unsupported(command.opcode(), &self.channel) {
            return Err(error);
        }
        let Some(tag) = self.send(command, bulk, deadline, closes, is_stopped) else {
            let other = || if is_stopped() { session_stopped() } else { self.late() };
            return Err(self.channel.failure().map_or_else(other, Error::not_connected));
        };
        loop {
            self.receive(closes);
            if let Some(at) = self.replies.iter().position(|reply| reply.tag == tag) {
                let reply = self.replies.swap_remove(at);
                return match reply.status.is_ok() || is_closed_anyway(command.opcode(), &reply, &self.channel)
                {
                    true => Ok(reply),
                    false => Err(Error::from_reply(&reply, self.channel.failure())),
                };
            }
            if let Some(failure) = self.channel.failure() {
                return Err(Error::not_connected(failure));
            }
            if self.channel.take_oversized().iter().any(|lost| lost.tag == tag) {
                return Err(oversized());
            }
            if is_stopped() {
                return Err(session_stopped());
            }
            let now = Instant::now();
            if now >= deadline {
                if let opcode @ (Opcode::Open | Opcode::List) = command.opcode() {
                    self.abandoned.push((tag, opcode));
                }
                return Err(self.late());
            }
            // A signal is the caller's business, but not a reason to give up half way. The transport ends a
            // wait for a dead server.
            match self.channel.wait(Some(deadline.min(now + STOP_CHECK_INTERVAL))) {
                Err(error) if error.errno() != libc::EINTR => return Err(error.into()),
                _ => {}
            }
        }
    }

    /// Why a call has had no answer by its deadline.
    fn late(&self) -> Error {
        match self.channel.is_connected() {
            true => timed_out(),
            false => reconnecting(self.channel.recovery()),
        }
    }

    /// Sends a command. Returns its tag; None if the connection has ended, the session was stopped, or the
    /// deadline passes without a credit.
    fn send(
        &mut self,
        command: &Command<'_>,
        mut bulk: Bulk,
        deadline: Instant,
        closes: &PendingCloses,
        is_stopped: &dyn Fn() -> bool,
    ) -> Option<u64> {
        self.tag += 1;
        self.body.clear();
        command.encode(&mut self.body);
        while let Err(NotSent(unsent)) = self.channel.send(self.tag, &self.body, bulk, SendOptions::PLAIN) {
            bulk = unsent;
            // Closes that nobody waited for have used up the credits.
            self.receive(closes);
            let now = Instant::now();
            if self.channel.failure().is_some() || is_stopped() || now >= deadline {
                return None;
            }
            if self.channel.credits() == 0 {
                let _ = self.channel.wait(Some(deadline.min(now + STOP_CHECK_INTERVAL)));
            }
        }
        self.channel.flush();
        Some(self.tag)
    }

    /// Sends pending closes as far as there are credits, and takes in what has arrived. Whether all are sent;
    /// the rest goes with a later call.
    pub(crate) fn send_closes(&mut self, closes: &PendingCloses) -> bool {
        self.receive(closes);
        while let Some(command) = closes.pop() {
            self.tag += 1;
            self.body.clear();
            command.encode(&mut self.body);
            if self.channel.send(self.tag, &self.body, Bulk::None, SendOptions::PLAIN).is_err() {
                closes.push(command);
                break;
            }
        }
        self.channel.flush();
        closes.is_empty()
    }

    /// Receives replies, and forgets those of before. What abandoned requests have opened goes to `closes`.
    fn receive(&mut self, closes: &PendingCloses) {
        self.replies.clear();
        self.channel.receive(&mut self.replies);
        if self.abandoned.is_empty() {
            return;
        }
        for reply in &self.replies {
            if let Some(at) = self.abandoned.iter().position(|&(tag, _)| tag == reply.tag) {
                let (_, opcode) = self.abandoned.swap_remove(at);
                if let Some(close) = close_of(opcode, reply) {
                    closes.push(close);
                }
            }
        }
    }
}
