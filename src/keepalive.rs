//! A server's silence, as the client's side of every transport judges it: first it pings, then it gives the
//! server up.
//!
//! It is given up only some time after a ping: if its client did not come here for long, the silence was not
//! the server's. The transport says when it asks and hears, and what is owed; what a ping looks like is its
//! own business.

use std::time::{Duration, Instant};

use crate::handshake::Grant;
use crate::message::UNASKED_PONG;

#[derive(Debug)]
pub(crate) struct Keepalive {
    keepalive: Duration,
    request_timeout: Duration,
    last_rx: Instant,
    /// Since when something has been outstanding.
    asked: Instant,
    /// The number of the last ping, and when it was sent, if that was since the server was last heard.
    pings: u64,
    pinged: Option<Instant>,
    /// When a ping that the caller asked for must have been answered.
    ping_deadline: Option<Instant>,
}

/// What silence calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Wait,
    Ping,
    /// Give it up, if there is nothing to be read either.
    TimedOut,
}

impl Keepalive {
    pub fn new(grant: &Grant) -> Self {
        let now = Instant::now();
        Self {
            keepalive: grant.keepalive,
            request_timeout: grant.keepalive * 3,
            last_rx: now,
            asked: now,
            pings: 0,
            pinged: None,
            ping_deadline: None,
        }
    }

    /// How long the server may be silent while it owes something.
    pub fn set_request_timeout(&mut self, timeout: Duration) {
        self.request_timeout = timeout.max(Duration::from_millis(1));
    }

    /// When the server was last heard.
    pub fn last_rx(&self) -> Instant {
        self.last_rx
    }

    /// Something has come from the server.
    pub fn on_receive(&mut self) {
        self.last_rx = Instant::now();
        self.pinged = None;
        self.ping_deadline = None;
    }

    /// From now on something is outstanding, and nothing was before.
    pub fn on_send(&mut self) {
        self.asked = Instant::now();
    }

    /// The number for a ping that is sent now.
    pub fn ping(&mut self) -> u64 {
        self.pings += 1;
        self.pinged = Some(Instant::now());
        self.pings
    }

    /// Whether a pong of this number may come: it answers a ping, or nobody asked for it.
    pub fn permits_pong(&self, id: u64) -> bool {
        id == UNASKED_PONG || id <= self.pings
    }

    /// The server must be heard within this time, whatever it owes.
    pub fn expect_within(&mut self, timeout: Duration) {
        self.ping_deadline = Some(Instant::now() + timeout);
    }

    fn ping_after(&self) -> Duration {
        self.keepalive.min(self.request_timeout / 3)
    }

    /// When the server is next to be pinged, or to be given up. `owes`: something is outstanding.
    pub fn deadline(&self, owes: bool) -> Option<Instant> {
        let after = self.ping_after();
        let owed = owes.then(|| {
            let since = self.last_rx.max(self.asked);
            match self.pinged {
                None => since + after,
                Some(pinged) => (since + self.request_timeout).max(pinged + (self.request_timeout - after)),
            }
        });
        owed.into_iter().chain(self.ping_deadline).min()
    }

    /// What is to be done now.
    pub fn action(&self, now: Instant, owes: bool) -> Action {
        if self.deadline(owes).is_none_or(|end| now < end) {
            Action::Wait
        } else if self.pinged.is_none() {
            Action::Ping
        } else {
            Action::TimedOut
        }
    }
}
