//! Work that threads share, and that makes more work.

use std::sync::{Condvar, Mutex, PoisonError};

use raio_transport::sync::lock;

/// Items that are to be done, the newest first: so of a tree little more than one path is in it.
#[derive(Debug)]
pub struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<T> {
    items: Vec<T>,
    /// Items that threads have taken and not yet done.
    busy: usize,
    is_over: bool,
}

impl<T> Queue<T> {
    /// With a first item.
    pub fn new(first: T) -> Self {
        let state = State { items: vec![first], busy: 0, is_over: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Adds items; the first one of them is taken first.
    pub fn add(&self, items: Vec<T>) {
        lock(&self.state).items.extend(items.into_iter().rev());
        self.changed.notify_all();
    }

    /// Takes an item. Waits while others may still add some. None: all is done, or was stopped.
    pub fn next(&self) -> Option<T> {
        let mut state = lock(&self.state);
        loop {
            if state.is_over || state.items.is_empty() && state.busy == 0 {
                return None;
            }
            if let Some(item) = state.items.pop() {
                state.busy += 1;
                return Some(item);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes an item if there is one. Does not wait.
    pub fn take(&self) -> Option<T> {
        let mut state = lock(&self.state);
        let item = if state.is_over { None } else { state.items.pop() };
        state.busy += usize::from(item.is_some());
        item
    }

    /// Whether no more is to be done.
    pub fn is_stopped(&self) -> bool {
        lock(&self.state).is_over
    }

    /// Items that were taken are done.
    pub fn done(&self, count: usize) {
        lock(&self.state).busy -= count;
        self.changed.notify_all();
    }

    /// No more is to be done.
    pub fn stop(&self) {
        lock(&self.state).is_over = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn threads_do_all_items_and_what_they_add_and_then_end() {
        let (queue, count) = (Queue::new(10_u32), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while let Some(item) = queue.next() {
                        count.fetch_add(1, Ordering::Relaxed);
                        queue.add(if item > 0 { vec![item - 1; 2] } else { Vec::new() });
                        queue.done(1);
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), (1 << 11) - 1);
    }

    #[test]
    fn what_is_stopped_gives_nothing_more() {
        let queue = Queue::new(1);
        queue.add(vec![2, 3]);
        assert_eq!(queue.next(), Some(2));
        queue.stop();
        assert_eq!(queue.next(), None);
    }
}
