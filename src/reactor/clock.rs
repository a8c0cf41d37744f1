//! The time of an iteration of the event loop.

use std::cell::Cell;
use std::time::Instant;

/// A clock that stands still for an iteration of the event loop: it is read when somebody first asks, and
/// then not again before the next iteration, for reading it costs about 70 instructions.
#[derive(Debug, Default)]
pub struct LoopClock(Cell<Option<Instant>>);

impl LoopClock {
    /// A clock that stands at this time: for tests.
    pub fn at(now: Instant) -> Self {
        Self(Cell::new(Some(now)))
    }

    /// The time, as of this iteration.
    pub fn now(&self) -> Instant {
        self.0.get().unwrap_or_else(|| {
            let now = Instant::now();
            self.0.set(Some(now));
            now
        })
    }

    /// A new iteration begins.
    pub(super) fn advance(&self) {
        self.0.set(None);
    }
}
