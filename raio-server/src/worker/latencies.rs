//! How long requests take, from the iteration that takes them in to the one that answers them.
//!
//! To read the clock costs too much for every request. So one in [`MEASURED_EVERY`] reads and writes is
//! measured, and all that is rarer. A request that is answered by the iteration that took it in has taken as
//! long as that, until its responses have been passed on: the clock is read for all of them at its end. Of
//! iterations in which the fast path answers, one in [`MEASURED_EVERY`] is measured, from the first read that
//! it answers.

use std::time::Instant;

use raio_transport::protocol::Opcode;

use crate::stats::Counters;
use crate::tuning::statistics::MEASURED_EVERY;

/// Runs of like requests in an iteration for which there is room from the start. More are rare, and the room
/// for them is kept.
const RUNS: usize = 64;

/// See the module documentation.
#[derive(Debug)]
pub struct Latencies {
    /// Reads and writes that the fast path has not answered.
    data_requests: u32,
    /// Iterations in which the fast path has answered.
    fast_iterations: u32,
    /// The next of these is measured.
    measures_fast_path: bool,
    /// The fast path has answered in this iteration.
    has_fast_path: bool,
    /// Measured requests that this iteration has taken in and answered: by operation and export, those that
    /// came one after the other together.
    answered: Vec<(Opcode, Option<usize>, u32)>,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            data_requests: 0,
            fast_iterations: 0,
            measures_fast_path: true,
            has_fast_path: false,
            answered: Vec::with_capacity(RUNS),
        }
    }
}

impl Latencies {
    /// Whether what the fast path answers in this iteration is measured: the clock is to be read before.
    pub fn measures_fast_path(&self) -> bool {
        self.measures_fast_path
    }

    /// Whether a request that has come is measured.
    pub fn measures(&mut self, opcode: Opcode) -> bool {
        if !matches!(opcode, Opcode::Read | Opcode::Write | Opcode::Get | Opcode::Stat | Opcode::StatPath) {
            return true;
        }
        self.data_requests = self.data_requests.wrapping_add(1);
        self.data_requests % MEASURED_EVERY == 1
    }

    /// The fast path has answered a read on an export.
    pub fn answered_by_fast_path(&mut self, export: usize) {
        self.has_fast_path = true;
        if self.measures_fast_path {
            self.answered_at_once(Opcode::Read, Some(export));
        }
    }

    /// A request, on an export if it is on one, is answered in the iteration of `now` that was taken in in
    /// that of `arrived`.
    pub fn answered(
        &mut self,
        (opcode, export): (Opcode, Option<usize>),
        arrived: Instant,
        now: Instant,
        counters: &Counters,
    ) {
        if arrived == now {
            self.answered_at_once(opcode, export);
        } else {
            counters.took(export, opcode, now - arrived, 1);
        }
    }

    /// A request is answered in the iteration that took it in.
    fn answered_at_once(&mut self, opcode: Opcode, export: Option<usize>) {
        match self.answered.last_mut() {
            Some((of, on, count)) if (*of, *on) == (opcode, export) => *count += 1,
            _ => self.answered.push((opcode, export, 1)),
        }
    }

    /// The responses of an iteration have been passed on. Returns whether [`Latencies::record`] has something
    /// to do.
    pub fn end_iteration(&mut self) -> bool {
        if std::mem::take(&mut self.has_fast_path) {
            self.fast_iterations = self.fast_iterations.wrapping_add(1);
            self.measures_fast_path = self.fast_iterations.is_multiple_of(MEASURED_EVERY);
        }
        !self.answered.is_empty()
    }

    /// Counts what an iteration has taken in and answered.
    pub fn record(&mut self, began: Instant, now: Instant, counters: &Counters) {
        for (opcode, export, count) in self.answered.drain(..) {
            counters.took(export, opcode, now - began, count.into());
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
        let (mut latencies, counters) = (Latencies::default(), Counters::new(2, 2));
        let now = Instant::now();
        latencies.answered((Opcode::Write, Some(0)), now, now + Duration::from_millis(1), &counters);
        assert_eq!((counts(&counters), latencies.end_iteration()), ((0, 1), false));
        assert_eq!(counters.latency(Opcode::Write).quantile(0.5), Duration::from_nanos(1 << 20));
    }

    #[test]
    fn one_that_is_answered_by_its_own_iteration_counts_at_its_end() {
        let (mut latencies, counters) = (Latencies::default(), Counters::new(2, 2));
        let began = Instant::now();
        latencies.answered((Opcode::Read, Some(0)), began, began, &counters);
        latencies.answered_by_fast_path(1);
        latencies.answered_by_fast_path(1);
        assert_eq!(counts(&counters), (0, 0));
        assert!(latencies.end_iteration());
        latencies.record(began, began + Duration::from_micros(5), &counters);
        assert_eq!((counts(&counters), latencies.end_iteration()), ((3, 0), false));
        assert_eq!(counters.latency(Opcode::Read).sum(), Duration::from_micros(15));
    }

    #[test]
    fn one_in_many_is_measured_of_what_is_frequent_and_all_that_is_rarer() {
        let mut latencies = Latencies::default();
        let writes: Vec<_> = (0..3 * MEASURED_EVERY).map(|_| latencies.measures(Opcode::Write)).collect();
        assert!(writes[0]);
        assert_eq!(writes.iter().filter(|&&measured| measured).count(), 3);
        let frequent = [Opcode::Read, Opcode::Get, Opcode::Stat, Opcode::StatPath];
        let measured = (0..4 * MEASURED_EVERY).filter(|n| latencies.measures(frequent[*n as usize % 4]));
        assert_eq!(measured.count(), 4);
        assert!((0..10).all(|_| latencies.measures(Opcode::Fsync)));
    }

    #[test]
    fn the_fast_path_is_measured_in_one_of_the_iterations_in_which_it_answers() {
        let mut latencies = Latencies::default();
        let mut measured = 0;
        for at in 0..6 * MEASURED_EVERY {
            // Every other iteration has nothing to do.
            if at % 2 == 1 {
                measured += u32::from(latencies.measures_fast_path());
                latencies.answered_by_fast_path(0);
            }
            latencies.end_iteration();
        }
        assert_eq!(measured, 3);
    }
}
