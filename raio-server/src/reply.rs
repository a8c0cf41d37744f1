//! An answer of another thread: who asks does not wait for it, but looks whether it is there when it is
//! woken.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Wakes who has asked.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// Where an answer goes. If it is dropped, who has asked sees that there will be none.
pub struct Reply<T> {
    sender: Sender<T>,
    wake: Wake,
}

impl<T> Reply<T> {
    /// An answer, and where it arrives. Several may answer.
    pub fn new(wake: &Wake) -> (Self, Receiver<T>) {
        let (sender, receiver) = channel();
        (Self { sender, wake: Arc::clone(wake) }, receiver)
    }

    /// Answers. Who has asked may have gone.
    pub fn send(&self, answer: T) {
        let _ = self.sender.send(answer);
        (self.wake)();
    }
}

impl<T> Clone for Reply<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), wake: Arc::clone(&self.wake) }
    }
}

impl<T> fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::TryRecvError;

    use super::*;

    #[test]
    fn who_has_asked_is_woken_by_each_answer_and_sees_when_there_will_be_none() {
        let woken = Arc::new(AtomicUsize::new(0));
        let wake: Wake = {
            let woken = Arc::clone(&woken);
            Arc::new(move || _ = woken.fetch_add(1, Ordering::Relaxed))
        };
        let (reply, answers) = Reply::new(&wake);
        let other = reply.clone();
        assert_eq!(answers.try_recv(), Err(TryRecvError::Empty));
        other.send(1);
        reply.send(2);
        drop((reply, other));
        assert_eq!((answers.try_recv(), answers.try_recv()), (Ok(1), Ok(2)));
        assert_eq!(answers.try_recv(), Err(TryRecvError::Disconnected));
        assert_eq!(woken.load(Ordering::Relaxed), 2);
    }
}
