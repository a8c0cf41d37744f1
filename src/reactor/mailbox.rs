//! Wake-ups and messages from other threads. Who has to write to the eventfd, and why no wake-up is lost:
//! [`flags`].

mod flags;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic;

use crossbeam_queue::SegQueue;
use flags::Flags;
use rustix::event::{EventfdFlags, eventfd};

/// Wakes one reactor, from any thread. Clones wake the same one.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    flags: Flags,
    eventfd: Arc<OwnedFd>,
}

impl Waker {
    pub(super) fn new() -> io::Result<Self> {
        let eventfd = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        Ok(Self(Arc::new(Inner { flags: Flags::new(), eventfd })))
    }

    /// Makes the reactor's present or next turn come back.
    pub fn wake(&self) {
        if self.0.flags.set() {
            // It can only fail with EAGAIN, when the counter is at its limit: then the reactor is awake
            // already.
            let _ = rustix::io::write(&self.0.eventfd, &1u64.to_ne_bytes());
        }
    }

    pub(super) fn eventfd(&self) -> &Arc<OwnedFd> {
        &self.0.eventfd
    }

    pub(super) fn is_set(&self) -> bool {
        self.0.flags.is_set()
    }

    /// Takes the wake-up, if there is one.
    pub(super) fn take(&self) -> bool {
        self.0.flags.take()
    }

    /// Announces sleep. False if there is a wake-up already: do not sleep then.
    pub(super) fn prepare_sleep(&self) -> bool {
        self.0.flags.prepare_sleep()
    }

    pub(super) fn awake(&self) {
        self.0.flags.awake();
    }

    /// Empties the eventfd after it woke the reactor.
    pub(super) fn drain(&self) {
        let _ = rustix::io::read(&self.0.eventfd, &mut [0; 8]);
    }
}

/// Puts messages into a reactor's mailbox, from any thread.
#[derive(Debug)]
pub struct Sender<T> {
    queue: Arc<SegQueue<T>>,
    waker: Waker,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { queue: Arc::clone(&self.queue), waker: self.waker.clone() }
    }
}

impl<T> Sender<T> {
    /// Puts a message in and wakes the reactor. Never blocks.
    pub fn send(&self, message: T) {
        self.queue.push(message);
        self.waker.wake();
    }

    /// Puts messages in as they are made, and wakes the reactor once, behind the last one.
    pub fn send_all(&self, messages: impl Iterator<Item = T>) {
        messages.for_each(|message| self.queue.push(message));
        self.waker.wake();
    }

    /// Takes back the oldest message that the reactor has not taken.
    pub fn take_back(&self) -> Option<T> {
        self.queue.pop()
    }

    /// How many messages the reactor has not taken.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }
}

/// A reactor's mailbox. Look into it after every turn: a message is no event.
#[derive(Debug)]
pub struct Receiver<T>(Arc<SegQueue<T>>);

impl<T> Receiver<T> {
    /// The oldest message.
    pub fn take(&self) -> Option<T> {
        // Nearly always it is empty, which this sees with fewer instructions.
        if self.0.is_empty() { None } else { self.0.pop() }
    }
}

/// A mailbox whose messages wake the reactor of `waker`.
pub fn mailbox<T>(waker: Waker) -> (Sender<T>, Receiver<T>) {
    let queue = Arc::new(SegQueue::new());
    (Sender { queue: Arc::clone(&queue), waker }, Receiver(queue))
}
