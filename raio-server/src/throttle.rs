//! A limit on how often something is logged, so that a peer cannot fill the log.

use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(10);
const LINES_MAX: u32 = 10;

/// Lets so many lines through in a while, and counts the rest.
#[derive(Debug)]
pub struct Throttle {
    since: Instant,
    passed: u32,
    suppressed: u64,
}

impl Throttle {
    /// With nothing logged yet.
    pub fn new() -> Self {
        Self { since: Instant::now(), passed: 0, suppressed: 0 }
    }

    /// Whether a line may be logged now; if so, how many were suppressed before it.
    pub fn pass(&mut self) -> Option<u64> {
        if self.since.elapsed() >= WINDOW {
            self.since = Instant::now();
            self.passed = 0;
        }
        if self.passed == LINES_MAX {
            self.suppressed += 1;
            return None;
        }
        self.passed += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_suppressed_is_counted() {
        let mut throttle = Throttle::new();
        assert_eq!((0..LINES_MAX + 5).filter(|_| throttle.pass().is_some()).count(), LINES_MAX as usize);
        throttle.since -= WINDOW;
        assert_eq!(throttle.pass(), Some(5));
        assert_eq!(throttle.pass(), Some(0));
    }
}
