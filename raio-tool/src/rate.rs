//! Limits how many bytes go per second.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use raio_transport::sync::lock;

/// A limit that threads share.
pub struct RateLimiter {
    /// Bytes per second; None: there is no limit.
    rate: Option<u64>,
    /// When the next bytes may go.
    next_at: Mutex<Instant>,
}

impl RateLimiter {
    /// The first bytes may go now.
    pub fn new(rate: Option<u64>) -> Self {
        Self { rate, next_at: Mutex::new(Instant::now()) }
    }

    /// How long it is until the next bytes may go.
    pub fn until_due(&self) -> Duration {
        if self.rate.is_none() {
            return Duration::ZERO;
        }
        lock(&self.next_at).saturating_duration_since(Instant::now())
    }

    /// These bytes go now.
    pub fn charge(&self, bytes: u64) {
        if let Some(rate) = self.rate {
            let mut next = lock(&self.next_at);
            *next = (*next).max(Instant::now()) + Duration::from_secs_f64(bytes as f64 / rate as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_now_delays_what_goes_next() {
        let limiter = RateLimiter::new(Some(10));
        assert_eq!(limiter.until_due(), Duration::ZERO);
        limiter.charge(10_000);
        limiter.charge(10_000);
        let due = limiter.until_due();
        assert!(due > Duration::from_secs(1000) && due <= Duration::from_secs(2000), "{due:?}");
    }

    #[test]
    fn without_a_rate_everything_goes_at_once() {
        let limiter = RateLimiter::new(None);
        limiter.charge(u64::MAX);
        assert_eq!(limiter.until_due(), Duration::ZERO);
    }
}
