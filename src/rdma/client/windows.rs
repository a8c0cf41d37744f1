//! The memory windows of requests, where the device has them: which are to be bound before their requests are
//! sent, and which are to be invalidated.
//!
//! The work requests of both go in front of the messages in a chain, so that messages still share a SEND. A
//! window is invalidated by this side as soon as its request is answered: the server has no say in it. The
//! reply does not wait for that, because a completion comes only after those of all SENDs before it, and so
//! when the server's device wants it to.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::super::device::Mr;
use super::super::queue_pair::{Binding, QueuePair, WindowId};
use crate::error::Error;

#[derive(Debug, Default)]
pub(super) struct Windows {
    unbound: VecDeque<Binding>,
    /// Bound, and their requests are over.
    over: Vec<WindowId>,
}

impl Windows {
    /// A window for a request. Returns it, and the key that the request is to give the server.
    pub fn open(
        &mut self,
        qp: &mut QueuePair,
        mr: Arc<Mr>,
        address: u64,
        len: usize,
        is_written: bool,
    ) -> Result<(WindowId, u32), Error> {
        let (window, key) = qp.take_window()?;
        self.unbound.push_back(Binding { window, mr, address, len, is_written });
        Ok((window, key))
    }

    /// Its request has been answered.
    pub fn close(&mut self, window: WindowId) {
        self.over.push(window);
    }

    /// Its request has not been sent, and is not any more.
    pub fn take_back(&mut self, qp: &mut QueuePair, window: WindowId) {
        match self.unbound.iter().position(|binding| binding.window == window) {
            Some(at) => {
                self.unbound.remove(at);
                qp.put_back(window);
            }
            None => self.over.push(window),
        }
    }

    /// Whether windows wait to be invalidated.
    pub fn has_over(&self) -> bool {
        !self.over.is_empty()
    }

    /// Chains what invalidates windows that are over, as far as there is room. Whether there were any.
    pub fn invalidate(&mut self, qp: &mut QueuePair) -> bool {
        let n = self.over.len().min(qp.room());
        self.over.drain(..n).for_each(|window| qp.invalidate(window));
        n > 0
    }

    /// Chains what binds windows, as far as there is room for that and a message. Whether all are bound, so
    /// that requests may be sent.
    pub fn bind(&mut self, qp: &mut QueuePair) -> bool {
        while qp.room() > 1
            && let Some(binding) = self.unbound.pop_front()
        {
            qp.bind(binding);
        }
        self.unbound.is_empty()
    }

    /// The connection has ended, and its queue pair is gone.
    pub fn clear(&mut self) {
        self.unbound.clear();
        self.over.clear();
    }

    /// Leaves them to the process that a forked child was copied from.
    pub fn forget(&mut self) {
        std::mem::forget(std::mem::take(self));
    }
}

/// Polls until no window is bound to a registration, and so only the caller keeps it. Returns false if the
/// deadline passes or the queue pair fails before.
pub(super) fn await_invalidated(qp: &mut QueuePair, mr: &Arc<Mr>, deadline: Instant) -> bool {
    loop {
        qp.look_at_sends();
        if Arc::strong_count(mr) == 1 {
            return true;
        }
        if qp.has_failed() || Instant::now() >= deadline {
            return false;
        }
        std::thread::yield_now();
    }
}
