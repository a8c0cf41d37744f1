//! How long a thread has waited for something to do.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a reactor has waited since this was made, spinning or asleep. The reactor's thread alone writes
/// it, and reads no clock for it that it does not read anyway; any thread reads it.
#[derive(Debug)]
pub struct IdleTime {
    made: Instant,
    /// The waits that are over.
    total_ns: AtomicU64,
    /// Since when it waits, in nanoseconds from when this was made; 0 if it does not.
    since_ns: AtomicU64,
    /// The most that was read of idle and of busy time: neither goes back.
    read_ns: [AtomicU64; 2],
}

impl Default for IdleTime {
    fn default() -> Self {
        Self {
            made: Instant::now(),
            total_ns: AtomicU64::default(),
            since_ns: AtomicU64::default(),
            read_ns: Default::default(),
        }
    }
}

impl IdleTime {
    /// The reactor begins to wait.
    pub(super) fn begin(&self, now: Instant) {
        self.since_ns.store((now - self.made).as_nanos().max(1) as u64, Ordering::Relaxed);
    }

    /// It has waited for this time.
    pub(super) fn end(&self, waited: Duration) {
        // A reader in between misses this wait for a moment, and does not count it twice.
        self.since_ns.store(0, Ordering::Release);
        let total = self.total_ns.load(Ordering::Relaxed);
        self.total_ns.store(total + waited.as_nanos() as u64, Ordering::Release);
    }

    /// How long it has waited by now, and how long it has not.
    pub fn read(&self, now: Instant) -> (Duration, Duration) {
        let now = (now - self.made).as_nanos() as u64;
        let (since, total) = loop {
            let since = self.since_ns.load(Ordering::Acquire);
            let total = self.total_ns.load(Ordering::Acquire);
            if self.since_ns.load(Ordering::Relaxed) == since {
                break (since, total);
            }
        };
        let waits = if since == 0 { 0 } else { now.saturating_sub(since) };
        let idle = (total + waits).min(now);
        let [idle, busy] = [idle, now - idle];
        let most = |at: usize, ns: u64| {
            Duration::from_nanos(self.read_ns[at].fetch_max(ns, Ordering::Relaxed).max(ns))
        };
        (most(0, idle), most(1, busy))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_counts_from_its_begin_and_nothing_goes_back() {
        let time = IdleTime::default();
        let at = |ms| time.made + Duration::from_millis(ms);
        let read = |ms| {
            let (idle, busy) = time.read(at(ms));
            (idle.as_millis(), busy.as_millis())
        };
        assert_eq!(read(10), (0, 10));
        time.begin(at(10));
        assert_eq!(read(30), (20, 10));
        time.end(Duration::from_millis(25));
        assert_eq!(read(40), (25, 15));
        // The clock of another reader is behind.
        assert_eq!(read(35), (25, 15));
    }
}
