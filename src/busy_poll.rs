//! Adaptive busy-polling: when to poll before sleeping, and when not to.
//!
//! Polling saves the wake-up of a sleeping core (tens of microseconds) and costs that core's time. It pays as
//! long as the next event arrives within the polling window, so the window shrinks while events arrive later
//! than that. It does harm where other threads want the core: the scheduler then makes up for the time polled
//! by running them first, for milliseconds. So a thread that finds that it was preempted while it polled does
//! not poll for a while.

use crate::tuning::{PREEMPTED_AFTER, PREEMPTED_PAUSE};
use std::time::{Duration, Instant};

/// How long one thread polls before it sleeps: the configured time while events arrive within it, less and
/// less while they do not.
#[derive(Debug)]
pub struct BusyPoll {
    most: Duration,
    budget: Duration,
    paused_until: Option<Instant>,
}

/// One wait for the next event.
#[derive(Debug)]
pub struct PollWindow {
    until: Instant,
    polled: Instant,
    /// See [`BusyPoll::begin`].
    multiplier: u32,
}

impl BusyPoll {
    /// Polls for at most `most` before each sleep; zero: never.
    pub fn new(most: Duration) -> Self {
        Self { most, budget: most, paused_until: None }
    }

    /// Begins a wait. It may poll for `multiplier` times the usual window.
    pub fn begin(&mut self, multiplier: u32) -> PollWindow {
        let now = Instant::now();
        if self.paused_until.is_some_and(|until| now >= until) {
            self.paused_until = None;
        }
        let budget = if self.paused_until.is_some() { Duration::ZERO } else { self.budget * multiplier };
        PollWindow { until: now + budget, polled: now, multiplier }
    }

    /// Whether to keep polling. Yields the core first: another thread may be about to produce the event.
    pub fn should_continue(&mut self, window: &mut PollWindow) -> bool {
        if window.polled >= window.until {
            return false;
        }
        std::thread::yield_now();
        let now = Instant::now();
        let away = now - window.polled;
        let preempted = away >= PREEMPTED_AFTER;
        if preempted {
            self.paused_until = Some(now + away * PREEMPTED_PAUSE);
            window.until = now;
        }
        window.polled = now;
        !preempted
    }

    /// Records that the event arrived `took` after the wait began.
    pub fn record(&mut self, window: &PollWindow, took: Duration) {
        // Some allowance, for a sleep adds the time it takes to wake up.
        if took <= self.most * (window.multiplier + 1) {
            self.budget = self.most;
        } else {
            self.budget /= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polling_stops_when_it_does_not_pay_and_begins_again_when_it_would() {
        let mut busy_poll = BusyPoll::new(Duration::from_secs(3600));
        let mut window = busy_poll.begin(1);
        assert!(busy_poll.should_continue(&mut window) || busy_poll.paused_until.is_some());
        for _ in 0..64 {
            busy_poll.record(&window, Duration::from_secs(10_000));
        }
        assert_eq!(busy_poll.budget, Duration::ZERO);
        let mut window = busy_poll.begin(1);
        assert!(!busy_poll.should_continue(&mut window));
        busy_poll.record(&window, Duration::from_secs(3600));
        assert_eq!(busy_poll.budget, Duration::from_secs(3600));
    }

    #[test]
    fn a_preempted_thread_does_not_poll_for_a_while() {
        let mut busy_poll = BusyPoll::new(Duration::from_secs(3600));
        let mut window = busy_poll.begin(1);
        std::thread::sleep(PREEMPTED_AFTER);
        assert!(!busy_poll.should_continue(&mut window));
        let mut window = busy_poll.begin(1);
        assert!(!busy_poll.should_continue(&mut window));
    }

    #[test]
    fn zero_is_never() {
        let mut busy_poll = BusyPoll::new(Duration::ZERO);
        let window = busy_poll.begin(1);
        busy_poll.record(&window, Duration::ZERO);
        let mut window = busy_poll.begin(1);
        assert!(!busy_poll.should_continue(&mut window));
    }
}
