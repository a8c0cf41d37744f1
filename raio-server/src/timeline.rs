//! How long a request was at each of its stages.
//!
//! The times are those of iterations of the worker's loop, whose clock is read once: what begins and ends in
//! one has taken no time.

use std::time::{Duration, Instant};

/// Where a request's time goes. More than [`crate::request::State`]: also why it waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It waits for memory.
    NeedSlot,
    /// The transport brings its data.
    Fetching,
    /// The volume has it, or will have it when its device has less to do.
    Executing,
    /// It waits for what a client that has gone has left behind, or for the audit log.
    Held,
    /// It waits because of a rate.
    Throttled,
}

impl Stage {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 5] = [Self::NeedSlot, Self::Fetching, Self::Executing, Self::Held, Self::Throttled];

    /// What traces call it, too.
    pub fn name(self) -> &'static str {
        match self {
            Self::NeedSlot => "need_slot",
            Self::Fetching => "fetching",
            Self::Executing => "executing",
            Self::Held => "held",
            Self::Throttled => "throttled",
        }
    }
}

/// The time of a request so far.
#[derive(Clone, Copy, Debug)]
pub struct Timeline {
    /// When it has entered this stage.
    since: Instant,
    stage: Stage,
    /// Microseconds in each stage before.
    spent_us: [u32; Stage::ALL.len()],
}

impl Timeline {
    /// Of a request that comes now.
    #[inline]
    pub fn new(now: Instant) -> Self {
        Self { since: now, stage: Stage::NeedSlot, spent_us: [0; Stage::ALL.len()] }
    }

    /// It enters a stage.
    #[inline]
    pub fn enter(&mut self, stage: Stage, now: Instant) {
        if now != self.since {
            self.spend(now);
        }
        self.stage = stage;
    }

    fn spend(&mut self, now: Instant) {
        let us = now.saturating_duration_since(self.since).as_micros();
        let spent = &mut self.spent_us[self.stage as usize];
        *spent = spent.saturating_add(u32::try_from(us).unwrap_or(u32::MAX));
        self.since = now;
    }

    /// How long it was at each stage until now.
    pub fn at(mut self, now: Instant) -> [Duration; Stage::ALL.len()] {
        self.spend(now);
        self.spent_us.map(|us| Duration::from_micros(us.into()))
    }

    /// How long it has taken until now.
    #[inline]
    pub fn total(mut self, now: Instant) -> Duration {
        if now != self.since {
            self.spend(now);
        }
        Duration::from_micros(self.spent_us.iter().map(|&us| u64::from(us)).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stage_has_the_time_that_passed_in_it() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut timeline = Timeline::new(start);
        timeline.enter(Stage::Fetching, at(5));
        timeline.enter(Stage::Executing, at(5));
        timeline.enter(Stage::Throttled, at(6));
        timeline.enter(Stage::Executing, at(8));
        let expected = [5, 0, 1 + 2, 0, 2].map(Duration::from_millis);
        assert_eq!(timeline.at(at(10)), expected);
        assert_eq!(timeline.total(at(10)), Duration::from_millis(10));
        assert_eq!(Timeline::new(start).total(start), Duration::ZERO);
    }

    #[test]
    fn a_stage_that_lasts_for_ever_has_the_longest_time_there_is() {
        let start = Instant::now();
        let spent = Timeline::new(start).at(start + Duration::from_secs(10_000));
        assert_eq!(spent[0], Duration::from_micros(u32::MAX.into()));
    }
}
