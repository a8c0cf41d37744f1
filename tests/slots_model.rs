//! No slot is lost, none is handed out twice, and none before its last user is done with it: loom tries the
//! interleavings, and the outcomes that the memory model allows, of the list by which slots come back to
//! their arena (`src/memory/returned.rs`, the file itself). A use of a slot's memory that another one does
//! not happen before is a race, which loom reports.

mod atomic {
    pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
}

#[path = "../src/memory/returned.rs"]
mod returned;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;
use returned::Returned;

struct Arena {
    returned: Returned,
    /// Each counts how often its slot was used.
    memory: Vec<UnsafeCell<u32>>,
}

impl Arena {
    fn new(blocks: usize) -> Arc<Self> {
        let memory = (0..blocks).map(|_| UnsafeCell::new(0)).collect();
        Arc::new(Self { returned: Returned::new(blocks), memory })
    }

    /// Uses a slot and drops it.
    fn use_and_drop(&self, block: u32) {
        self.memory[block as usize].with_mut(|count| {
            // SAFETY: the slot is this thread's alone, or loom says otherwise.
            unsafe { *count += 1 }
        });
        self.returned.push(block, block as u8 + 7);
    }

    /// Takes back what has been dropped.
    fn take_back(&self) -> Vec<u32> {
        let taken = self.returned.take().inspect(|&(block, order)| assert_eq!(order, block as u8 + 7));
        taken.map(|(block, _)| block).collect()
    }
}

/// Interleavings with at most three preemptions: all of them take half a minute, and find nothing new.
fn check(model: impl Fn() + Sync + Send + 'static) {
    if option_env!("RUSTFLAGS").is_some_and(|flags| flags.contains("sanitizer")) {
        eprintln!("SKIPPED under a sanitizer: it takes the stacks of loom's coroutines for leaks.");
        return;
    }
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

#[test]
fn slots_that_threads_drop_come_back_once_each() {
    check(|| {
        let arena = Arena::new(3);
        let droppers: Vec<_> = [0, 1]
            .map(|block| {
                let arena = Arc::clone(&arena);
                thread::spawn(move || arena.use_and_drop(block))
            })
            .into();
        arena.use_and_drop(2);
        let mut taken = arena.take_back();
        for dropper in droppers {
            dropper.join().unwrap();
        }
        taken.extend(arena.take_back());
        taken.sort_unstable();
        assert_eq!(taken, [0, 1, 2]);
    });
}

#[test]
fn a_slot_that_has_come_back_is_used_and_dropped_again_while_others_drop_theirs() {
    check(|| {
        let arena = Arena::new(2);
        let dropper = {
            let arena = Arc::clone(&arena);
            thread::spawn(move || arena.use_and_drop(0))
        };
        arena.use_and_drop(1);
        let first = arena.take_back();
        for &block in &first {
            arena.use_and_drop(block);
        }
        dropper.join().unwrap();
        let mut last = arena.take_back();
        last.sort_unstable();
        assert_eq!(last, [0, 1]);
        let uses = |block: u32| {
            // SAFETY: both slots have come back.
            arena.memory[block as usize].with(|count| unsafe { *count })
        };
        for block in last {
            assert_eq!(uses(block), 1 + u32::from(first.contains(&block)));
        }
    });
}
