//! The time of an iteration of the event loop.

use std::cell::Cell;
use std::time::Instant;

/// A clock that stands still for an iteration of the event loop: it is read when somebody first asks, and
/// then not again before the next iteration, for reading it costs about 70 instructions.
#[derive(Debug, Default)]
pub struct LoopClock {
    now: Cell<Option<Instant>>,
    /// It does not go on.
    is_fixed: bool,
}

impl LoopClock {
    /// A clock that stands at this time: for tests.
    pub fn at(now: Instant) -> Self {
        Self { now: Cell::new(Some(now)), is_fixed: true }
    }

    /// The time, as of this iteration.
    pub fn now(&self) -> Instant {
        self.now.get().unwrap_or_else(|| {
            let now = Instant::now();
            self.now.set(Some(now));
            now
        })
    }

    /// The time at this moment, for what is due so long after it: the thread may have been held up since the
    /// iteration began, and a peer would have that much less time.
    pub fn read(&self) -> Instant {
        if self.is_fixed { self.now() } else { Instant::now() }
    }

    /// A new iteration begins.
    pub(super) fn advance(&self) {
        self.now.set(None);
    }
}
