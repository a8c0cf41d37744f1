//! How the end of an operation reaches its worker.

use std::collections::VecDeque;

use raio_transport::reactor::{Reactor, Receiver, Sender, mailbox};

use super::{Completion, Outcome};
use crate::limits::FilePermit;

/// The operations of one worker that have ended: those that ended on its own thread, and a mailbox for those
/// that end on another, which wakes the worker.
#[derive(Debug)]
pub struct CompletionQueue {
    ended: VecDeque<Completion>,
    sender: Sender<Completion>,
    mailbox: Receiver<Completion>,
    /// Completions that are to come by mail: with none there is nothing to look for.
    expected: usize,
}

impl CompletionQueue {
    /// For the worker of this reactor.
    pub fn new(reactor: &Reactor) -> Self {
        let (sender, mailbox) = mailbox(reactor.waker());
        Self { ended: VecDeque::new(), sender, mailbox, expected: 0 }
    }

    /// An operation has ended on the worker's own thread.
    pub fn push(&mut self, completion: Completion) {
        self.ended.push_back(completion);
    }

    /// The operation with this key is going to end on another thread.
    pub fn completer(&mut self, key: u64) -> Completer {
        self.expect_one();
        Completer { sender: Some(self.sender()), key }
    }

    /// One completion more is going to be sent to [`CompletionQueue::sender`].
    pub(super) fn expect_one(&mut self) {
        self.expected += 1;
    }

    /// The mailbox.
    pub(super) fn sender(&self) -> Sender<Completion> {
        self.sender.clone()
    }

    /// One that was expected is not going to be sent: it has ended here.
    pub(super) fn push_instead(&mut self, completion: Completion) {
        self.expected -= 1;
        self.push(completion);
    }

    /// The next operation that has ended.
    pub fn next(&mut self) -> Option<Completion> {
        if let Some(completion) = self.ended.pop_front() {
            return Some(completion);
        }
        if self.expected == 0 {
            return None;
        }
        let completion = self.mailbox.take()?;
        self.expected -= 1;
        Some(completion)
    }
}

/// The right, and the duty, to end one operation, from any thread. One that is dropped ends it with EIO, so
/// that no request waits for ever.
#[derive(Debug)]
pub struct Completer {
    /// None once it has been used.
    sender: Option<Sender<Completion>>,
    key: u64,
}

impl Completer {
    /// The operation has ended. Wakes the worker; never blocks.
    pub fn complete(mut self, result: Result<u32, i32>, outcome: Outcome) {
        self.send(result, outcome);
    }

    fn send(&mut self, result: Result<u32, i32>, outcome: Outcome) {
        if let Some(sender) = self.sender.take() {
            sender.send(Completion { key: self.key, result, outcome });
        }
    }
}

impl Drop for Completer {
    fn drop(&mut self) {
        self.send(Err(libc::EIO), Outcome::None);
    }
}

/// The close of an open file, which counts as open until [`Closing::complete`].
#[derive(Debug)]
pub struct Closing {
    completer: Completer,
    permit: FilePermit,
}

impl Closing {
    /// Of the file that has this permit.
    pub fn new(completer: Completer, permit: FilePermit) -> Self {
        Self { completer, permit }
    }

    /// The file is closed. The result is close(2)'s, if there was one: what had not been written until then
    /// may have failed.
    pub fn complete(self, result: Result<(), i32>) {
        // First, because a client that learns of the close may open another file at once.
        drop(self.permit);
        self.completer.complete(result.map(|()| 0), Outcome::None);
    }

    /// The same, for a caller that sends the completion itself.
    pub(super) fn ended(mut self, result: Result<(), i32>) -> Completion {
        self.completer.sender = None;
        Completion { key: self.completer.key, result: result.map(|()| 0), outcome: Outcome::None }
    }
}

#[cfg(test)]
mod tests {
    use raio_transport::reactor::Config;

    use super::*;

    #[test]
    fn an_operation_that_nobody_ends_has_failed() {
        let reactor = Reactor::new(&Config::default()).unwrap();
        let mut queue = CompletionQueue::new(&reactor);
        assert!(queue.next().is_none());
        let (kept, lost) = (queue.completer(1), queue.completer(2));
        assert!(queue.next().is_none());
        std::thread::spawn(move || drop(lost)).join().unwrap();
        kept.complete(Ok(3), Outcome::None);
        let ended: Vec<_> = std::iter::from_fn(|| queue.next()).map(|c| (c.key, c.result)).collect();
        assert_eq!(ended, [(2, Err(libc::EIO)), (1, Ok(3))]);
        assert_eq!(queue.expected, 0);
    }
}
