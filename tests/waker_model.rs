//! No wake-up is lost: loom tries the interleavings, and the outcomes that the memory model allows, of the
//! reactor's own protocol between wakers and sleeper (`src/reactor/mailbox/flags.rs`, the file itself). The
//! sleeper goes through the steps of a turn, with a mailbox that promises nothing by itself. A sleeper that
//! nobody wakes is a deadlock, which loom reports.

mod atomic {
    pub use loom::sync::atomic::{AtomicBool, Ordering, fence};
}

// Observers ask more than the protocol takes.
#[allow(dead_code)]
#[path = "../src/reactor/mailbox/flags.rs"]
mod flags;

use flags::Flags;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

struct Reactor {
    flags: Flags,
    /// Messages in the mailbox. Relaxed: that they are seen in time is the flags' business.
    mailbox: AtomicUsize,
    eventfd: Mutex<u64>,
    readable: Condvar,
    writes: AtomicUsize,
}

impl Reactor {
    fn new() -> Self {
        Self {
            flags: Flags::new(),
            mailbox: AtomicUsize::new(0),
            eventfd: Mutex::new(0),
            readable: Condvar::new(),
            writes: AtomicUsize::new(0),
        }
    }

    /// `mailbox::Sender::send`.
    fn send(&self) {
        self.mailbox.fetch_add(1, Ordering::Relaxed);
        if self.flags.set() {
            self.writes.fetch_add(1, Ordering::Relaxed);
            *self.eventfd.lock().unwrap() += 1;
            self.readable.notify_one();
        }
    }

    /// `Reactor::run_once`, which may sleep.
    fn turn(&self) {
        if self.flags.take() {
            return;
        }
        if self.flags.prepare_sleep() {
            let mut eventfd = self.eventfd.lock().unwrap();
            while *eventfd == 0 {
                eventfd = self.readable.wait(eventfd).unwrap();
            }
            *eventfd = 0;
            drop(eventfd);
            self.flags.awake();
        }
        self.flags.take();
    }

    /// Turns until so many messages have come.
    fn receive(&self, expected: usize) {
        let mut received = 0;
        while received < expected {
            self.turn();
            received += self.mailbox.swap(0, Ordering::Relaxed);
        }
        assert_eq!(received, expected);
    }
}

/// Interleavings with at most three preemptions: with more the first test alone takes minutes, and finds
/// nothing new.
fn check(model: impl Fn() + Sync + Send + 'static) {
    if option_env!("RUSTFLAGS").is_some_and(|flags| flags.contains("sanitizer")) {
        eprintln!(
            "SKIPPED under a sanitizer: it takes the stacks of loom's coroutines for leaks, and there is no \
             memory to check here."
        );
        return;
    }
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

#[test]
fn one_waker_is_heard_each_time() {
    check(|| {
        let reactor = Arc::new(Reactor::new());
        let waker = Arc::clone(&reactor);
        let thread = thread::spawn(move || {
            waker.send();
            waker.send();
        });
        reactor.receive(2);
        thread.join().unwrap();
    });
}

#[test]
fn two_wakers_are_both_heard() {
    check(|| {
        let reactor = Arc::new(Reactor::new());
        let threads = [(); 2].map(|()| {
            let waker = Arc::clone(&reactor);
            thread::spawn(move || waker.send())
        });
        reactor.receive(2);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn a_sleeper_that_is_awake_costs_no_system_call() {
    check(|| {
        let reactor = Reactor::new();
        reactor.send();
        reactor.send();
        assert_eq!(reactor.writes.load(Ordering::Relaxed), 0);
        reactor.receive(2);
    });
}
