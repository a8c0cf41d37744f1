//! Which worker has a connection.
//!
//! The main thread places a connection before anything is known of it. Once its hello has come, and says that
//! it carries data, the worker that read it claims a place for it at the worker with the fewest, and passes
//! it on there if that is another one. So workers differ by at most one such connection when they are made;
//! those that carry control commands alone cost nothing and stay where they are.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use raio_transport::sync::lock;

/// The data connections of all workers.
#[derive(Debug)]
pub struct Placement {
    loads: Mutex<Vec<Load>>,
    /// The server ends.
    is_over: AtomicBool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Load {
    data_connections: usize,
    /// It does not take what was placed on it.
    is_stuck: bool,
}

impl Placement {
    /// For a number of workers.
    pub fn new(workers: usize) -> Self {
        Self { loads: Mutex::new(vec![Load::default(); workers]), is_over: AtomicBool::new(false) }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Load>> {
        lock(&self.loads)
    }

    /// Counts a data connection where there are fewest: at `here`, rather than at another worker that has as
    /// few. Returns where.
    pub fn claim(&self, here: usize) -> usize {
        let mut loads = self.lock();
        if self.is_over.load(Ordering::Relaxed) {
            loads[here].data_connections += 1;
            return here;
        }
        let rank = |at: usize, load: &Load| (load.is_stuck, load.data_connections, at != here);
        let fewest = loads.iter().enumerate().min_by_key(|&(at, load)| rank(at, load));
        let at = fewest.map_or(here, |(at, _)| at);
        loads[at].data_connections += 1;
        at
    }

    /// From now on each stays where it is: another worker may have ended.
    pub fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }

    /// Counts a data connection that stays at this worker.
    pub fn add(&self, worker: usize) {
        self.lock()[worker].data_connections += 1;
    }

    /// A data connection of this worker's has ended, or goes elsewhere.
    pub fn release(&self, worker: usize) {
        self.lock()[worker].data_connections -= 1;
    }

    /// Whether a worker takes what is placed on it. One that does not gets no more, unless none does.
    pub fn set_stuck(&self, worker: usize, is_stuck: bool) {
        self.lock()[worker].is_stuck = is_stuck;
    }

    /// Whether it gets no more.
    pub fn is_stuck(&self, worker: usize) -> bool {
        self.lock()[worker].is_stuck
    }

    /// How many data connections each worker has.
    pub fn data_connections(&self) -> Vec<usize> {
        self.lock().iter().map(|load| load.data_connections).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_gets_as_many_whoever_asks_and_one_that_is_stuck_gets_none() {
        let placement = Placement::new(3);
        for _ in 0..9 {
            placement.claim(1);
        }
        assert_eq!(placement.data_connections(), [3, 3, 3]);
        assert_eq!(placement.claim(2), 2, "nobody has fewer");
        placement.release(0);
        assert_eq!(placement.claim(2), 0);
        placement.set_stuck(0, true);
        placement.release(0);
        assert_eq!(placement.claim(0), 1);
        placement.set_stuck(1, true);
        placement.set_stuck(2, true);
        assert_eq!(placement.claim(0), 0, "all are");
    }
}
