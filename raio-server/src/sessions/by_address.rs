//! What is kept for clients that may come back, by the addresses that they are from, so that one which leaves
//! much behind does not push out what others have left.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

use crate::peer::Origin;

/// A time, and what tells those of the same time apart.
pub type Key = (Instant, u64);

/// Things that have a key, a size and an address, if that is known.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub struct ByAddress<T> {
    shares: HashMap<Option<Origin>, Share<T>>,
    /// The shares in the order in which they are to have less: the largest first, and of those of one size
    /// that with the earliest key.
    order: BTreeSet<(Reverse<usize>, Key, Option<Origin>)>,
    size: usize,
    len: usize,
}

/// What an address has.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
struct Share<T> {
    things: BTreeMap<Key, (usize, T)>,
    size: usize,
}

impl<T> Default for ByAddress<T> {
    fn default() -> Self {
        Self { shares: HashMap::new(), order: BTreeSet::new(), size: 0, len: 0 }
    }
}

impl<T> ByAddress<T> {
    /// Enters a thing, in place of the one with this key if there is one.
    pub fn insert(&mut self, address: Option<Origin>, key: Key, size: usize, thing: T) {
        self.remove(address, key);
        self.change(address, |share| {
            share.things.insert(key, (size, thing));
            share.size += size;
        });
        self.size += size;
        self.len += 1;
    }

    /// Takes a thing out, if it is there.
    pub fn remove(&mut self, address: Option<Origin>, key: Key) {
        let share = self.shares.get(&address);
        let Some(&(size, _)) = share.and_then(|share| share.things.get(&key)) else { return };
        self.change(address, |share| {
            share.things.remove(&key);
            share.size -= size;
        });
        self.size -= size;
        self.len -= 1;
    }

    /// Changes an address's share, and keeps the order.
    fn change(&mut self, address: Option<Origin>, change: impl FnOnce(&mut Share<T>)) {
        let share = self.shares.entry(address).or_insert(Share { things: BTreeMap::new(), size: 0 });
        if let Some((&first, _)) = share.things.first_key_value() {
            self.order.remove(&(Reverse(share.size), first, address));
        }
        change(share);
        match share.things.first_key_value() {
            Some((&first, _)) => _ = self.order.insert((Reverse(share.size), first, address)),
            None => _ = self.shares.remove(&address),
        }
    }

    /// The size of all of them.
    pub fn size(&self) -> usize {
        self.size
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// In the order in which they are to be given up: first what the address has that has most, and of that
    /// first what has the earliest key.
    pub fn first_to_go(&self) -> impl Iterator<Item = &T> {
        let shares = self.order.iter().filter_map(|(_, _, address)| self.shares.get(address));
        shares.flat_map(|share| share.things.values().map(|(_, thing)| thing))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_the_address_has_that_has_most_goes_first_and_the_earliest_of_it() {
        let [here, there] = ["10.0.0.1", "10.0.0.2"].map(|text| text.parse().ok().map(Origin::Ip));
        let begin = Instant::now();
        let at = |n: u64| (begin + Duration::from_secs(n), n);
        let mut things = ByAddress::default();
        things.insert(there, at(0), 3, "t0");
        for (n, name) in [(3, "h3"), (1, "h1"), (2, "h2")] {
            things.insert(here, at(n), 2, name);
        }
        assert_eq!(Vec::from_iter(things.first_to_go()), [&"h1", &"h2", &"h3", &"t0"]);
        things.insert(there, at(0), 7, "T0");
        assert_eq!(Vec::from_iter(things.first_to_go()), [&"T0", &"h1", &"h2", &"h3"]);
        assert_eq!((things.size(), things.len()), (13, 4));
        things.insert(there, at(0), 6, "like all others");
        assert_eq!(
            things.first_to_go().next(),
            Some(&"like all others"),
            "the earliest of those with as much"
        );
        things.remove(there, at(1));
        things.remove(there, at(0));
        for n in 1..=3 {
            things.remove(here, at(n));
        }
        assert_eq!((things.size(), things.len()), (0, 0));
        assert!(things.shares.is_empty() && things.order.is_empty());
    }
}
