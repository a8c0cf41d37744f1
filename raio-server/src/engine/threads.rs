//! The engine of blocking system calls: everything runs in lanes. For where io_uring is forbidden, and for
//! what it cannot do without waiting.
//!
//! Completions come back through a mailbox, which wakes the worker.

use std::sync::{Arc, Weak};

use raio_transport::reactor::{self, Event, Reactor};

use super::job::{Task, take};
use super::{Call, Closing, CompletionQueue, Descriptor, Engine, Job, Lane, Operation, Pending};
use crate::client::Client;
use crate::pool::Ticket;
use crate::tuning::lanes::WRITE_BATCH;

/// A worker's way to the pool.
#[derive(Debug)]
pub struct Threads {
    completions: CompletionQueue,
    /// This iteration's writes to the page cache, in batches: to hand over each by itself would cost more
    /// than to do it.
    writes: Vec<Batch>,
}

/// Writes of one lane.
#[derive(Debug)]
struct Batch {
    lane: Lane,
    ticket: Ticket,
    tasks: Vec<Task>,
}

impl Threads {
    /// For the worker of this reactor.
    pub fn new(reactor: &Reactor) -> Self {
        Self { completions: CompletionQueue::new(reactor), writes: Vec::new() }
    }

    fn begin(&mut self, lane: Lane, task: Task) -> Pending {
        self.completions.expect_one();
        let ticket = lane.ticket();
        lane.submit(ticket, Job::new(self.completions.sender(), vec![task]));
        Pending::Lane(lane, ticket)
    }
}

impl Engine for Threads {
    fn submit(
        &mut self,
        _reactor: &mut Reactor,
        key: u64,
        client: &Weak<Client>,
        file: &Arc<Descriptor>,
        operation: Operation,
    ) -> Option<Pending> {
        if !file.is_write_back || !matches!(operation, Operation::Write { .. }) {
            return Some(self.submit_blocking(key, client, file, operation));
        }
        self.completions.expect_one();
        let lane = file.lanes().data;
        let task = Task::on(key, client, file, operation);
        let has_room = |batch: &&mut Batch| batch.lane == lane && batch.tasks.len() < WRITE_BATCH;
        let ticket = match self.writes.iter_mut().find(has_room) {
            Some(batch) => {
                batch.tasks.push(task);
                batch.ticket
            }
            None => {
                let ticket = lane.ticket();
                self.writes.push(Batch { lane, ticket, tasks: vec![task] });
                ticket
            }
        };
        Some(Pending::Lane(lane, ticket))
    }

    fn submit_blocking(
        &mut self,
        key: u64,
        client: &Weak<Client>,
        file: &Arc<Descriptor>,
        operation: Operation,
    ) -> Pending {
        let lanes = file.lanes();
        let lane = match operation {
            Operation::Read { .. } | Operation::Write { .. } => lanes.data,
            Operation::Fsync { .. }
            | Operation::Discard { .. }
            | Operation::WriteZeroes { .. }
            | Operation::Allocate { .. }
            | Operation::Truncate { .. }
            | Operation::Extents { .. } => lanes.flush,
            Operation::Copy { .. } | Operation::Checksum { .. } => lanes.ranges,
            Operation::Stat | Operation::Lock(_) => lanes.control,
        };
        self.begin(lane, Task::on(key, client, file, operation))
    }

    fn call(&mut self, key: u64, client: &Weak<Client>, lane: Lane, call: Call) -> Pending {
        self.begin(lane, Task::call(key, client, call))
    }

    fn close(&mut self, file: Arc<Descriptor>, closing: Closing) {
        match Arc::try_unwrap(file) {
            Ok(mut file) => match file.take_if_closed_at_once() {
                Some(fd) => self.completions.push_instead(closing.ended(reactor::close(fd))),
                None => file.close(closing),
            },
            Err(file) => file.close(closing),
        }
    }

    fn completions(&mut self) -> &mut CompletionQueue {
        &mut self.completions
    }

    fn cancel(&mut self, _reactor: &mut Reactor, key: u64, pending: Pending) {
        let Pending::Lane(lane, ticket) = pending else { return };
        let task = match self.writes.iter_mut().find(|batch| batch.ticket == ticket) {
            Some(batch) => take(&mut batch.tasks, key),
            None => lane.take_back(ticket, |job| job.take(key)),
        };
        if let Some(task) = task {
            self.completions.push_instead(task.cancelled());
        }
    }

    fn flush(&mut self) -> bool {
        if self.writes.is_empty() {
            return false;
        }
        for Batch { lane, ticket, tasks } in self.writes.drain(..) {
            if !tasks.is_empty() {
                lane.submit(ticket, Job::new(self.completions.sender(), tasks));
            }
        }
        true
    }

    fn handle(&mut self, event: Event) {
        unreachable!("this engine submits nothing to the reactor, yet there is {event:?}");
    }
}
