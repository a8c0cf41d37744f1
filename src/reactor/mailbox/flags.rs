//! Who has to write to the eventfd: the protocol between wakers and a sleeper, over two flags.
//!
//! A waker sets `set`, then looks at `sleeping`; the sleeper sets `sleeping`, then looks at `set`. Between
//! the two steps of each there is a sequentially consistent fence, so at least one of them sees the other:
//! the eventfd is written only when the sleeper is, or is about to be, asleep, and no wake-up is lost.
//! `tests/waker_model.rs` tries the interleavings of this file.

use super::atomic::{AtomicBool, Ordering, fence};

#[derive(Debug)]
pub struct Flags {
    set: AtomicBool,
    sleeping: AtomicBool,
}

impl Flags {
    pub fn new() -> Self {
        Self { set: AtomicBool::new(false), sleeping: AtomicBool::new(false) }
    }

    /// Leaves a wake-up. True: the sleeper may be asleep, so wake it.
    #[must_use]
    pub fn set(&self) -> bool {
        // Release: who takes the wake-up sees what was done before it. A swap, so that the order with `take`
        // is beyond doubt.
        self.set.swap(true, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        self.sleeping.load(Ordering::Relaxed)
    }

    /// Whether there is a wake-up. Only [`Flags::take`] makes what was done before it visible.
    pub fn is_set(&self) -> bool {
        self.set.load(Ordering::Relaxed)
    }

    /// Takes the wake-up, if there is one.
    pub fn take(&self) -> bool {
        self.is_set() && self.set.swap(false, Ordering::AcqRel)
    }

    /// Announces sleep. False if there is a wake-up already: do not sleep then.
    pub fn prepare_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.is_set() {
            self.awake();
            return false;
        }
        true
    }

    pub fn awake(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }
}
