//! Finds peers whose host cannot be reached any more while something that was sent to them has not been
//! acknowledged. TCP itself would try for a quarter of an hour, and TCP_USER_TIMEOUT would close connections
//! whose peer lives and takes nothing.
//!
//! A connection that sends is put on a list, and a few times in [`Policy::unreachable_timeout`] the kernel is
//! asked about those on it, until nothing is outstanding. So a send makes no call more, and an idle
//! connection costs nothing.
//!
//! A peer is given up if nothing at all has come from it for that time, and the kernel has meanwhile tried
//! again in vain. The time alone says too little. To a peer that takes nothing (its window is zero) nothing
//! is sent but window probes, up to two minutes apart: it lives if it answers those. And a connection may
//! have been idle for long before.
//!
//! [`Policy::unreachable_timeout`]: crate::handshake::Policy::unreachable_timeout

use std::collections::VecDeque;
use std::time::Duration;

use super::Kind;
use crate::reactor::{Reactor, TcpInfo, Token};
use crate::transport::ConnectionId;
use crate::tuning::{WATCH_AT_ONCE, WATCH_ATTEMPTS, WATCH_CHECKS};

/// A connection to which something was sent.
struct Watched {
    connection: ConnectionId,
    /// As they were when the peer was last found to have sent something.
    segments_in: u32,
    retransmitted: u32,
    /// Looks since then.
    looks: u8,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing is outstanding.
    Settled,
    Wait,
    Unreachable,
}

impl Watched {
    fn new(connection: ConnectionId) -> Self {
        Self { connection, segments_in: 0, retransmitted: 0, looks: 0 }
    }

    fn judge(&mut self, info: &TcpInfo) -> Verdict {
        if info.unacked == 0 && info.unsent_bytes == 0 {
            return Verdict::Settled;
        }
        if info.segments_in != self.segments_in {
            self.segments_in = info.segments_in;
            self.retransmitted = info.retransmitted;
            self.looks = 0;
            return Verdict::Wait;
        }
        self.looks = self.looks.saturating_add(1);
        // Answered probes are not counted by the kernel.
        let attempts = u32::from(info.probes) + info.retransmitted.wrapping_sub(self.retransmitted);
        if self.looks >= WATCH_CHECKS && attempts >= WATCH_ATTEMPTS {
            Verdict::Unreachable
        } else {
            Verdict::Wait
        }
    }
}

/// The connections to which something was sent.
pub(super) struct Watch {
    owner: u8,
    interval: Duration,
    /// In the order in which they are checked.
    watched: VecDeque<Watched>,
    /// So many of them have not been checked in this round.
    left: usize,
}

impl Watch {
    /// A list whose timer's token has this owner.
    pub fn new(owner: u8, unreachable_timeout: Duration) -> Self {
        Self { owner, interval: unreachable_timeout / WATCH_CHECKS.into(), watched: VecDeque::new(), left: 0 }
    }

    /// Something is sent to this peer, which is not on the list.
    #[cold]
    pub fn add(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        if self.watched.is_empty() {
            self.check_in(reactor, self.interval);
        }
        self.watched.push_back(Watched::new(id));
    }

    fn check_in(&self, reactor: &mut Reactor, time: Duration) {
        let at = reactor.clock().now() + time;
        reactor.timer(at, Token { owner: self.owner, value: Kind::Watch as u64 });
    }

    /// Checks the connections on the list, a part of them at a time. `check` says of one, for which it is
    /// given the judge, whether it stays on the list.
    pub fn check(
        &mut self,
        reactor: &mut Reactor,
        mut check: impl FnMut(ConnectionId, &mut dyn FnMut(&TcpInfo) -> Verdict) -> bool,
    ) {
        if self.left == 0 {
            self.left = self.watched.len();
        }
        for _ in 0..WATCH_AT_ONCE.min(self.left) {
            self.left -= 1;
            if let Some(mut watched) = self.watched.pop_front()
                && check(watched.connection, &mut |info| watched.judge(info))
            {
                self.watched.push_back(watched);
            }
        }
        if self.left > 0 {
            self.check_in(reactor, Duration::ZERO);
        } else if !self.watched.is_empty() {
            self.check_in(reactor, self.interval);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection with segments that have not been acknowledged; the peer was heard at the first look.
    fn unacked() -> (Watched, TcpInfo) {
        let info = TcpInfo { unacked: 3, segments_in: 70, retransmitted: 50, ..TcpInfo::default() };
        let mut watched = Watched::new(ConnectionId { transport: 0, index: 0, generation: 0 });
        assert_eq!(watched.judge(&info), Verdict::Wait);
        (watched, info)
    }

    /// A connection that waits for room at the peer.
    fn zero_window() -> (Watched, TcpInfo) {
        let (watched, info) = unacked();
        (watched, TcpInfo { unacked: 0, unsent_bytes: 5000, ..info })
    }

    #[test]
    fn a_peer_that_acknowledges_nothing_is_unreachable_after_the_timeout() {
        let (mut watched, mut info) = unacked();
        for _ in 1..WATCH_CHECKS {
            info.retransmitted += 1;
            assert_eq!(watched.judge(&info), Verdict::Wait);
        }
        assert_eq!(watched.judge(&info), Verdict::Unreachable);
    }

    #[test]
    fn a_peer_that_sends_anything_is_given_the_whole_timeout_again() {
        let (mut watched, mut info) = unacked();
        for _ in 0..5 {
            info.segments_in += 1;
            for _ in 0..WATCH_CHECKS {
                info.retransmitted += 1;
                assert_eq!(watched.judge(&info), Verdict::Wait);
            }
        }
    }

    #[test]
    fn a_peer_to_which_the_kernel_has_not_tried_again_is_not_unreachable() {
        let (mut watched, mut info) = unacked();
        info.retransmitted += WATCH_ATTEMPTS - 1;
        for _ in 0..1000 {
            assert_eq!(watched.judge(&info), Verdict::Wait);
        }
        info.retransmitted += 1;
        assert_eq!(watched.judge(&info), Verdict::Unreachable);
    }

    #[test]
    fn a_peer_with_a_zero_window_that_answers_probes_two_minutes_apart_is_kept() {
        let (mut watched, mut info) = zero_window();
        for _ in 0..10 {
            for _ in 0..4 * WATCH_CHECKS {
                assert_eq!(watched.judge(&info), Verdict::Wait);
            }
            // A look may come before the answer.
            info.probes = 1;
            assert_eq!(watched.judge(&info), Verdict::Wait);
            info.probes = 0;
            info.segments_in += 1;
        }
    }

    #[test]
    fn a_peer_with_a_zero_window_that_does_not_answer_probes_is_unreachable() {
        let (mut watched, mut info) = zero_window();
        for _ in 0..WATCH_CHECKS {
            assert_eq!(watched.judge(&info), Verdict::Wait);
        }
        info.probes = WATCH_ATTEMPTS as u8;
        assert_eq!(watched.judge(&info), Verdict::Unreachable);
    }

    /// Then what is in flight is sent again in the place of probes.
    #[test]
    fn a_peer_that_takes_its_window_back_and_answers_is_kept() {
        let (mut watched, mut info) = unacked();
        for _ in 0..10 {
            for _ in 0..4 * WATCH_CHECKS {
                assert_eq!(watched.judge(&info), Verdict::Wait);
            }
            info.retransmitted += 1;
            assert_eq!(watched.judge(&info), Verdict::Wait);
            info.segments_in += 1;
        }
    }

    #[test]
    fn a_peer_that_has_acknowledged_everything_is_not_watched() {
        let (mut watched, info) = unacked();
        assert_eq!(watched.judge(&TcpInfo { unacked: 0, ..info }), Verdict::Settled);
    }
}
