//! How long requests take, from the iteration that takes them in to the one that answers them.
//!
//! A request that is answered by the iteration that took it in has taken as long as that, until its responses
//! have been passed on. The clock is read for it once all are, and not at all for most of those that the fast
//! path answers: of these, one iteration in [`FAST_PATH_EVERY`] counts.

use std::time::Instant;

use raio_transport::protocol::{OPERATIONS, Opcode};

use crate::stats::Counters;
use crate::tuning::statistics::FAST_PATH_EVERY;

/// See the module documentation.
#[derive(Debug, Default)]
pub struct Latencies {
    iterations: u64,
    /// Requests that this iteration has taken in and answered.
    answered: [u32; OPERATIONS.len()],
    has_answered: bool,
}

impl Latencies {
    /// A new iteration. Returns whether those that the fast path answers in it count.
    pub fn begin_iteration(&mut self) -> bool {
        self.iterations += 1;
        self.samples_fast_path()
    }

    /// Whether requests that the fast path answers count in this iteration.
    pub fn samples_fast_path(&self) -> bool {
        self.iterations.is_multiple_of(FAST_PATH_EVERY)
    }

    /// A request is answered in the iteration of `now` that was taken in in that of `arrived`.
    pub fn answered(&mut self, opcode: Opcode, arrived: Instant, now: Instant, counters: &Counters) {
        if arrived == now {
            self.answered_at_once(opcode);
        } else {
            counters.latency(opcode).record(now - arrived, 1);
        }
    }

    /// A request is answered in the iteration that took it in.
    pub fn answered_at_once(&mut self, opcode: Opcode) {
        self.answered[opcode as usize - 1] += 1;
        self.has_answered = true;
    }

    /// Whether [`Latencies::end_iteration`] has something to record.
    pub fn has_answered(&self) -> bool {
        self.has_answered
    }

    /// The responses of an iteration have been passed on.
    pub fn end_iteration(&mut self, began: Instant, now: Instant, counters: &Counters) {
        self.has_answered = false;
        for (count, operation) in self.answered.iter_mut().zip(&OPERATIONS) {
            if *count > 0 {
                counters.latency(operation.opcode).record(now - began, std::mem::take(count).into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn counts(counters: &Counters) -> (u64, u64) {
        (counters.latency(Opcode::Read).count(), counters.latency(Opcode::Write).count())
    }

    #[test]
    fn a_request_has_taken_as_long_as_from_its_iteration_to_that_of_its_response() {
        let (mut latencies, counters) = (Latencies::default(), Counters::new(0));
        let now = Instant::now();
        latencies.answered(Opcode::Write, now, now + Duration::from_millis(1), &counters);
        assert_eq!((counts(&counters), latencies.has_answered()), ((0, 1), false));
        assert_eq!(counters.latency(Opcode::Write).quantile(0.5), Duration::from_nanos(1 << 20));
    }

    #[test]
    fn one_that_is_answered_by_its_own_iteration_counts_at_its_end() {
        let (mut latencies, counters) = (Latencies::default(), Counters::new(0));
        let began = Instant::now();
        latencies.answered(Opcode::Read, began, began, &counters);
        latencies.answered_at_once(Opcode::Read);
        assert_eq!((counts(&counters), latencies.has_answered()), ((0, 0), true));
        latencies.end_iteration(began, began + Duration::from_micros(5), &counters);
        assert_eq!((counts(&counters), latencies.has_answered()), ((2, 0), false));
        latencies.end_iteration(began, began + Duration::from_micros(5), &counters);
        assert_eq!(counts(&counters), (2, 0), "once");
    }

    #[test]
    fn the_fast_path_counts_in_one_iteration_of_many() {
        let mut latencies = Latencies::default();
        let sampled = (0..10 * FAST_PATH_EVERY).filter(|_| latencies.begin_iteration()).count();
        assert_eq!(sampled, 10);
    }
}
