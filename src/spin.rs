//! When to wait actively before sleeping, and when not to.
//!
//! Spinning spares the wake-up of a sleeping core (tens of microseconds), at the price of that core's time. It pays while news comes
//! within the time that is spun. It does harm where others want the core: the scheduler makes up for the time spun by letting
//! them run first, for milliseconds. So one who finds that he was put aside while he spun does not spin for a while.

use std::time::{Duration, Instant};

/// Between two looks at the clock while spinning there is at most this long, unless the thread was put aside.
const PUT_ASIDE: Duration = Duration::from_micros(250);
/// So many times as long it does not spin then.
const PAUSE: u32 = 10;

/// How long one thread waits actively: as long as was asked for while news comes within that time, less and less while it does not.
#[derive(Debug)]
pub struct Spin {
    most: Duration,
    budget: Duration,
    paused_until: Option<Instant>,
}

/// One wait.
#[derive(Debug)]
pub struct Spinning {
    until: Instant,
    looked: Instant,
    /// See [`Spin::begin`].
    times: u32,
}

impl Spin {
    /// Spins for at most so long; zero: never.
    pub fn new(most: Duration) -> Self {
        Self { most, budget: most, paused_until: None }
    }

    /// Begins a wait that may last for so many times as long.
    pub fn begin(&mut self, times: u32) -> Spinning {
        let now = Instant::now();
        if self.paused_until.is_some_and(|until| now >= until) {
            self.paused_until = None;
        }
        let budget = if self.paused_until.is_some() { Duration::ZERO } else { self.budget * times };
        Spinning { until: now + budget, looked: now, times }
    }

    /// Whether to go on spinning. Lets others have the core first: they may have the news to bring.
    pub fn goes_on(&mut self, spinning: &mut Spinning) -> bool {
        if spinning.looked >= spinning.until {
            return false;
        }
        std::thread::yield_now();
        let now = Instant::now();
        let away = now - spinning.looked;
        let put_aside = away >= PUT_ASIDE;
        if put_aside {
            self.paused_until = Some(now + away * PAUSE);
            spinning.until = now;
        }
        spinning.looked = now;
        !put_aside
    }

    /// News came so long after this wait began.
    pub fn learn(&mut self, spinning: &Spinning, took: Duration) {
        // Some allowance, for a sleep adds the time it takes to wake up.
        if took <= self.most * (spinning.times + 1) {
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
    fn spinning_stops_when_it_does_not_pay_and_begins_again_when_it_would() {
        let mut spin = Spin::new(Duration::from_secs(3600));
        let mut spinning = spin.begin(1);
        assert!(spin.goes_on(&mut spinning) || spin.paused_until.is_some());
        for _ in 0..64 {
            spin.learn(&spinning, Duration::from_secs(10_000));
        }
        assert_eq!(spin.budget, Duration::ZERO);
        let mut spinning = spin.begin(1);
        assert!(!spin.goes_on(&mut spinning));
        spin.learn(&spinning, Duration::from_secs(3600));
        assert_eq!(spin.budget, Duration::from_secs(3600));
    }

    #[test]
    fn one_who_was_put_aside_does_not_spin_for_a_while() {
        let mut spin = Spin::new(Duration::from_secs(3600));
        let mut spinning = spin.begin(1);
        std::thread::sleep(PUT_ASIDE);
        assert!(!spin.goes_on(&mut spinning));
        let mut spinning = spin.begin(1);
        assert!(!spin.goes_on(&mut spinning));
    }

    #[test]
    fn zero_is_never() {
        let mut spin = Spin::new(Duration::ZERO);
        let spinning = spin.begin(1);
        spin.learn(&spinning, Duration::ZERO);
        let mut spinning = spin.begin(1);
        assert!(!spin.goes_on(&mut spinning));
    }
}
