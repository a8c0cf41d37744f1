//! The time of an iteration of the event loop.

use std::cell::Cell;
use std::time::Instant;

/// A clock that stands still for an iteration of the event loop: it is read when somebody first asks, and
/// then not again before the next iteration, for reading it costs about 70 instructions.
#[derive(Debug, Default)]
pub struct LoopClock {
    now: Cell<Option<Instant>>,
    /// It goes on only when it is set.
    is_fixed: Cell<bool>,
}

impl LoopClock {
    /// A clock that stands at this time: for tests.
    pub fn at(now: Instant) -> Self {
        Self { now: Cell::new(Some(now)), is_fixed: Cell::new(true) }
    }

    /// It is this time from now on, until it is set again: a virtual clock, for tests. Timers and deadlines
    /// follow it.
    #[cfg(any(test, feature = "test-peers"))]
    pub fn set(&self, now: Instant) {
        self.now.set(Some(now));
        self.is_fixed.set(true);
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
        if self.is_fixed.get() { self.now() } else { Instant::now() }
    }

    /// A new iteration begins.
    pub(super) fn advance(&self) {
        if !self.is_fixed.get() {
            self.now.set(None);
        }
    }
}
