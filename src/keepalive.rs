//! Keepalive, as a client does it on every transport: a server that owes something and is silent is pinged,
//! and then given up.
//!
//! It is given up only some time after a ping: if its client did not look for long, the silence was not the
//! server's. Time is passed in; what a ping looks like and how it is sent is the caller's business.

use std::collections::VecDeque;
use std::num::NonZero;
use std::time::{Duration, Instant};

use crate::handshake::Grant;
use crate::message::UNASKED_PONG;
use crate::trace::ClockSample;
use crate::tuning::CLOCK_SAMPLES;

/// When the server was last heard, when it was last pinged, and what follows from it.
#[derive(Debug)]
pub(crate) struct Keepalive {
    interval: Duration,
    request_timeout: Duration,
    last_rx: Instant,
    /// Since when something has been outstanding.
    last_idle: Instant,
    /// The number of the last ping, when it was sent, and the same if nothing was received since.
    pings: u64,
    last_ping: Instant,
    pinged: Option<Instant>,
    /// The server's time from the pong to the last ping, while that is being taken in.
    pong_ns: Option<NonZero<u64>>,
    /// From the latest pongs with a time, at most [`CLOCK_SAMPLES`].
    samples: VecDeque<ClockSample>,
    /// When a ping that the caller asked for must have been answered.
    ping_deadline: Option<Instant>,
}

/// What is to be done about a silent server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Nothing before [`Keepalive::deadline`].
    Wait,
    /// Send a ping: [`Keepalive::on_ping`].
    Ping,
    /// Give it up, if there is nothing to be read either.
    TimedOut,
}

impl Keepalive {
    /// For a connection that was made with this grant at `now`.
    pub fn new(grant: &Grant, now: Instant) -> Self {
        Self {
            interval: grant.keepalive,
            request_timeout: grant.keepalive * 3,
            last_rx: now,
            last_idle: now,
            pings: 0,
            last_ping: now,
            pinged: None,
            pong_ns: None,
            samples: VecDeque::new(),
            ping_deadline: None,
        }
    }

    /// How long the server may be silent while it owes something.
    pub fn request_timeout(&self) -> Duration {
        self.request_timeout
    }

    /// Sets the request timeout, from now on.
    pub fn set_request_timeout(&mut self, timeout: Duration) {
        self.request_timeout = timeout.max(Duration::from_millis(1));
    }

    /// When something was last received.
    pub fn last_rx(&self) -> Instant {
        self.last_rx
    }

    /// Since when something has been outstanding, if something is.
    pub fn last_idle(&self) -> Instant {
        self.last_idle
    }

    /// Something was received at `now` or after. If it had a pong with a time, `taken_at` returns the time
    /// after it was received.
    pub fn on_receive(&mut self, now: Instant, taken_at: impl FnOnce() -> Instant) {
        self.last_rx = now;
        self.pinged = None;
        self.ping_deadline = None;
        if let Some(peer_ns) = self.pong_ns.take() {
            if self.samples.len() == CLOCK_SAMPLES {
                self.samples.pop_front();
            }
            self.samples.push_back(ClockSample::new(self.last_ping, taken_at(), peer_ns.get()));
        }
    }

    /// A pong was received that is permitted. Only the one to the last ping tells how long it took.
    pub fn on_pong(&mut self, id: u64, time_ns: u64) {
        if id == self.pings {
            self.pong_ns = NonZero::new(time_ns);
        }
    }

    /// Of the latest pongs the one that came soonest, for its time has the least error.
    pub fn clock_sample(&self) -> Option<ClockSample> {
        self.samples.iter().copied().min_by_key(|sample| sample.round_trip)
    }

    /// From now on something is outstanding, and nothing was before.
    pub fn on_send(&mut self, now: Instant) {
        self.last_idle = now;
    }

    /// The number for a ping that is sent now.
    pub fn on_ping(&mut self, now: Instant) -> u64 {
        self.pings += 1;
        self.last_ping = now;
        self.pinged = Some(now);
        self.pings
    }

    /// Whether a pong of this number may come: it answers a ping, or nobody asked for it.
    pub fn permits_pong(&self, id: u64) -> bool {
        id == UNASKED_PONG || id <= self.pings
    }

    /// Something must be received by `deadline`, whatever the server owes.
    pub fn expect_by(&mut self, deadline: Instant) {
        self.ping_deadline = Some(deadline);
    }

    fn ping_after(&self) -> Duration {
        self.interval.min(self.request_timeout / 3)
    }

    /// When the server is next to be pinged, or to be given up. `owes`: something is outstanding.
    pub fn deadline(&self, owes: bool) -> Option<Instant> {
        let after = self.ping_after();
        let owed = owes.then(|| {
            let since = self.last_rx.max(self.last_idle);
            match self.pinged {
                None => since + after,
                Some(pinged) => (since + self.request_timeout).max(pinged + (self.request_timeout - after)),
            }
        });
        owed.into_iter().chain(self.ping_deadline).min()
    }

    /// What is to be done now. `owes`: something is outstanding.
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

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// One whose interval is a second, so that the request timeout is three, and when it was made.
    fn keepalive() -> (Keepalive, Instant) {
        let grant = Grant {
            version: 1,
            features: 0,
            server: [0; 16],
            queue_depth: 1,
            data_bytes_max: 4096,
            inline_bytes_max: 0,
            keepalive: SECOND,
            queue_pair: false,
            linger: Duration::ZERO,
            push: crate::handshake::PushWindows::NONE,
        };
        let start = Instant::now();
        (Keepalive::new(&grant, start), start)
    }

    #[test]
    fn a_server_that_owes_nothing_may_be_silent() {
        let (keepalive, start) = keepalive();
        assert_eq!(keepalive.deadline(false), None);
        assert_eq!(keepalive.action(start + 1000 * SECOND, false), Action::Wait);
    }

    #[test]
    fn a_silent_server_is_pinged_once_then_given_up() {
        let (mut keepalive, start) = keepalive();
        keepalive.on_send(start + 10 * SECOND);
        let at = |tenths: u32| start + 10 * SECOND + SECOND / 10 * tenths;
        assert_eq!(keepalive.action(at(9), true), Action::Wait);
        assert_eq!(keepalive.action(at(10), true), Action::Ping);
        assert_eq!(keepalive.on_ping(at(10)), 1);
        for tenths in 10..30 {
            assert_eq!(keepalive.action(at(tenths), true), Action::Wait, "{tenths}");
        }
        assert_eq!(keepalive.deadline(true), Some(at(30)));
        assert_eq!(keepalive.action(at(30), true), Action::TimedOut);
    }

    #[test]
    fn whatever_is_received_puts_off_the_next_ping() {
        let (mut keepalive, start) = keepalive();
        keepalive.on_send(start);
        keepalive.on_ping(start + SECOND);
        keepalive.on_receive(start + 2 * SECOND, Instant::now);
        assert_eq!(keepalive.last_rx(), start + 2 * SECOND);
        assert_eq!(keepalive.deadline(true), Some(start + 3 * SECOND));
        assert_eq!(keepalive.action(start + 3 * SECOND, true), Action::Ping);
    }

    #[test]
    fn a_client_that_did_not_look_for_long_pings_first() {
        let (mut keepalive, start) = keepalive();
        keepalive.on_send(start);
        let late = start + 100 * SECOND;
        assert_eq!(keepalive.action(late, true), Action::Ping);
        keepalive.on_ping(late);
        assert_eq!(keepalive.deadline(true), Some(late + 2 * SECOND));
    }

    #[test]
    fn a_ping_of_the_callers_must_be_answered_in_time_although_nothing_is_owed() {
        let (mut keepalive, start) = keepalive();
        keepalive.on_ping(start);
        keepalive.expect_by(start + SECOND / 2);
        assert_eq!(keepalive.action(start + SECOND / 4, false), Action::Wait);
        assert_eq!(keepalive.action(start + SECOND / 2, false), Action::TimedOut);
        keepalive.on_receive(start + SECOND / 2, Instant::now);
        assert_eq!(keepalive.action(start + SECOND, false), Action::Wait);
    }

    #[test]
    fn only_pongs_that_were_asked_for_may_come() {
        let (mut keepalive, start) = keepalive();
        assert!(keepalive.permits_pong(UNASKED_PONG));
        assert!(!keepalive.permits_pong(1));
        let id = keepalive.on_ping(start);
        assert!(keepalive.permits_pong(id));
        assert!(!keepalive.permits_pong(id + 1));
    }

    #[test]
    fn a_short_request_timeout_has_the_ping_come_sooner() {
        let (mut keepalive, start) = keepalive();
        keepalive.set_request_timeout(SECOND * 3 / 10);
        keepalive.on_send(start);
        assert_eq!(keepalive.deadline(true), Some(start + SECOND / 10));
        keepalive.on_ping(start + SECOND / 10);
        assert_eq!(keepalive.deadline(true), Some(start + SECOND * 3 / 10));
    }
}
