//! Delays changes of a file that overlap orphans: requests whose connections have ended, and that execute.
//!
//! When a client has gone, what it has written may still be executing, and end long after. Another client
//! that writes to the same place then, and is told that it has written, must not find the old bytes there. So
//! while such a request executes, changes of any client that overlap it wait.
//!
//! With no such request, and that is nearly always, all of it costs one load for each change of a file.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use raio_transport::sync::lock;
use slab::Slab;

use crate::session::ObjectKey;

/// See the module documentation. Shared by all workers.
#[derive(Debug, Default)]
pub struct OrphanGuard {
    /// How many execute.
    count: AtomicUsize,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    executing: Slab<(ObjectKey, Range<u64>)>,
    /// Workers that hold something back.
    waiting: Vec<usize>,
}

impl OrphanGuard {
    /// Whether there may be something to wait for.
    #[inline]
    pub fn is_active(&self) -> bool {
        self.count.load(Ordering::Relaxed) > 0
    }

    /// A request that changes this range executes, and its connection has gone. Returns its key.
    pub fn enter(&self, object: ObjectKey, range: Range<u64>) -> usize {
        let mut table = lock(&self.table);
        let key = table.executing.insert((object, range));
        self.count.store(table.executing.len(), Ordering::Relaxed);
        key
    }

    /// It has ended. Returns the workers that are to ask again.
    pub fn leave(&self, key: usize) -> Vec<usize> {
        let mut table = lock(&self.table);
        table.executing.remove(key);
        self.count.store(table.executing.len(), Ordering::Relaxed);
        std::mem::take(&mut table.waiting)
    }

    /// Whether a change of this range must wait. If so its worker is told when it is to ask again.
    pub fn holds_back(&self, object: ObjectKey, range: &Range<u64>, worker: usize) -> bool {
        let mut table = lock(&self.table);
        let overlaps = |(_, (other, theirs)): (usize, &(ObjectKey, Range<u64>))| {
            *other == object && theirs.start < range.end && range.start < theirs.end
        };
        let is_held = table.executing.iter().any(overlaps);
        if is_held && !table.waiting.contains(&worker) {
            table.waiting.push(worker);
        }
        is_held
    }

    /// How many execute.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: ObjectKey = ObjectKey(1, 2);
    const OTHER: ObjectKey = ObjectKey(1, 3);

    #[test]
    fn what_overlaps_waits_and_nothing_else_does() {
        let guard = OrphanGuard::default();
        assert!(!guard.is_active());
        let key = guard.enter(FILE, 100..200);
        assert!(guard.is_active());
        for range in [100..200, 0..101, 199..300, 120..130, 0..300] {
            assert!(guard.holds_back(FILE, &range, 0), "{range:?}");
            assert!(!guard.holds_back(OTHER, &range, 0), "{range:?}");
        }
        for range in [0..100, 200..300] {
            assert!(!guard.holds_back(FILE, &range, 0), "{range:?}");
        }
        guard.leave(key);
        assert!(!guard.is_active() && !guard.holds_back(FILE, &(100..200), 0));
    }

    #[test]
    fn each_worker_that_waits_is_told_once_when_one_ends_and_asks_again() {
        let guard = OrphanGuard::default();
        let (first, second) = (guard.enter(FILE, 0..10), guard.enter(FILE, 5..15));
        for worker in [1, 0, 1] {
            assert!(guard.holds_back(FILE, &(0..15), worker));
        }
        assert_eq!(guard.leave(first), [1, 0]);
        assert!(guard.holds_back(FILE, &(0..15), 1));
        assert_eq!(guard.leave(second), [1]);
        assert!(guard.leave(guard.enter(FILE, 0..1)).is_empty());
    }
}
