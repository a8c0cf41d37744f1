//! A limit on how often something is logged, for each peer address and kind of line, so that a flood from one
//! hides nobody else's lines.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Instant;

use crate::peer::Origin;
use crate::tuning::log::{RATE_LIMIT_KEYS, RATE_LIMIT_LINES, RATE_LIMIT_WINDOW};

/// What lines are limited by: whom they are about (None: nobody in particular, or one of very many), and a
/// short name of their kind.
pub type Key = (Option<Origin>, &'static str);

/// Permits a number of lines of each kind in a window, and counts the rest.
#[derive(Debug, Default)]
pub struct RateLimit(HashMap<Key, Window>);

#[derive(Debug)]
struct Window {
    since: Instant,
    passed: u32,
    suppressed: u64,
}

impl RateLimit {
    /// Whether a line may be logged now.
    pub fn permit(&mut self, peer: Option<Origin>, kind: &'static str, now: Instant) -> bool {
        let key = (peer.map(network), kind);
        let is_told_apart = self.0.len() < RATE_LIMIT_KEYS || self.0.contains_key(&key);
        let key = if is_told_apart { key } else { (None, kind) };
        let window = self.0.entry(key).or_insert(Window { since: now, passed: 0, suppressed: 0 });
        if window.passed < RATE_LIMIT_LINES {
            window.passed += 1;
            return true;
        }
        window.suppressed += 1;
        false
    }

    /// Whether nothing is counted, so that [`RateLimit::end_windows`] has nothing to do.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Ends the windows whose time is over. Returns what was suppressed in them, and how often.
    pub fn end_windows(&mut self, now: Instant) -> Vec<(Key, u64)> {
        let over = self.0.extract_if(|_, window| now >= window.since + RATE_LIMIT_WINDOW);
        over.filter(|(_, window)| window.suppressed > 0)
            .map(|(key, window)| (key, window.suppressed))
            .collect()
    }
}

/// Whoever has one IPv6 address has its whole network of 64 bits.
fn network(origin: Origin) -> Origin {
    match origin {
        Origin::Ip(IpAddr::V6(address)) => {
            IpAddr::from(Ipv6Addr::from(u128::from(address) & !u128::from(u64::MAX))).into()
        }
        origin => origin,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_hides_neither_other_peers_nor_other_kinds_and_is_counted() {
        let now = Instant::now();
        let mut limit = RateLimit::default();
        let flood = Origin::Ip("2001:db8::1".parse().unwrap());
        let same = Origin::Ip("2001:db8::2".parse().unwrap());
        let other = Some(Origin::Ip("192.0.2.1".parse().unwrap()));
        let passed =
            (0..1000).filter(|n| limit.permit(Some(if n % 2 == 0 { flood } else { same }), "magic", now));
        assert_eq!(passed.count(), RATE_LIMIT_LINES as usize);
        assert!(limit.permit(other, "magic", now) && limit.permit(Some(flood), "field", now));
        assert!(limit.end_windows(now).is_empty());
        let network = Some(Origin::Ip("2001:db8::".parse().unwrap()));
        assert_eq!(
            limit.end_windows(now + RATE_LIMIT_WINDOW),
            [((network, "magic"), 1000 - u64::from(RATE_LIMIT_LINES))]
        );
        assert!(limit.is_empty() && limit.permit(Some(flood), "magic", now));
    }

    #[test]
    fn very_many_addresses_take_little_memory_and_few_lines() {
        let now = Instant::now();
        let mut limit = RateLimit::default();
        let addresses = (0..100_000u32).map(|n| Some(Origin::Ip(n.to_be_bytes().into())));
        let passed = addresses.filter(|&peer| limit.permit(peer, "magic", now)).count();
        assert!(
            passed <= RATE_LIMIT_KEYS + RATE_LIMIT_LINES as usize && limit.0.len() <= RATE_LIMIT_KEYS + 1
        );
    }
}
