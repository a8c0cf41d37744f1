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

/// How many stages are noted before they are added up.
const MARKS: usize = 4;

/// The time of a request so far. Its stages are noted as they come, and subtracted when somebody asks, which
/// is seldom: most requests are quick.
#[derive(Clone, Copy, Debug)]
pub struct Timeline {
    began: Instant,
    /// The latest stages, and when it has entered each.
    stages: [Stage; MARKS],
    since: [Instant; MARKS],
    /// Which of them it is at.
    last: usize,
    /// Microseconds in each stage before these.
    spent_us: [u32; Stage::ALL.len()],
}

impl Timeline {
    /// Of a request that comes now.
    #[inline]
    pub fn new(now: Instant) -> Self {
        let (stages, since) = ([Stage::NeedSlot; MARKS], [now; MARKS]);
        Self { began: now, stages, since, last: 0, spent_us: [0; Stage::ALL.len()] }
    }

    /// It enters a stage.
    #[inline]
    pub fn enter(&mut self, stage: Stage, now: Instant) {
        if now != self.since[self.last] {
            if self.last + 1 == MARKS {
                self.add_up(now);
            } else {
                self.last += 1;
                self.since[self.last] = now;
            }
        }
        self.stages[self.last] = stage;
    }

    /// Adds up what is noted. From now on it is at the latest stage.
    #[cold]
    fn add_up(&mut self, now: Instant) {
        for at in 0..=self.last {
            let end = if at < self.last { self.since[at + 1] } else { now };
            let us = end.saturating_duration_since(self.since[at]).as_micros();
            let spent = &mut self.spent_us[self.stages[at] as usize];
            *spent = spent.saturating_add(u32::try_from(us).unwrap_or(u32::MAX));
        }
        (self.stages[0], self.since[0], self.last) = (self.stages[self.last], now, 0);
    }

    /// How long it was at each stage until now.
    pub fn at(mut self, now: Instant) -> [Duration; Stage::ALL.len()] {
        self.add_up(now);
        self.spent_us.map(|us| Duration::from_micros(us.into()))
    }

    /// How long it has taken until now.
    #[inline]
    pub fn total(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.began)
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
        // However many there are.
        for ms in 0..20 {
            timeline.enter(if ms % 2 == 0 { Stage::Held } else { Stage::Executing }, at(10 + ms));
        }
        let expected = [5, 0, 1 + 2 + 10, 10, 2].map(Duration::from_millis);
        assert_eq!(timeline.at(at(30)), expected);
        assert_eq!(timeline.total(at(30)), Duration::from_millis(30));
        assert_eq!(Timeline::new(start).total(start), Duration::ZERO);
    }

    #[test]
    fn a_stage_that_lasts_for_ever_has_the_longest_time_there_is() {
        let start = Instant::now();
        let spent = Timeline::new(start).at(start + Duration::from_secs(10_000));
        assert_eq!(spent[0], Duration::from_micros(u32::MAX.into()));
    }
}
