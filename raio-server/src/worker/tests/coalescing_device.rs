//! A device that reports only when it has nothing left to do: see [`crate::device_queue`].

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Weak;

use rustix::fs::{Mode, OFlags};

use super::*;
use crate::client::Client;
use crate::engine::{Call, Closing, Completion, CompletionQueue, Descriptor, Lane, Operation, Pending};

const DEPTH: usize = 32;
/// What the device gets of so many, and what is held back.
const BEGUN: usize = 20;
const HELD: usize = DEPTH - BEGUN;

/// The ring; but reads are reported only once all of them have ended, and the test lets them be.
struct Late {
    ring: Uring,
    may_report: Rc<Cell<bool>>,
    reads: usize,
    ended: Vec<Completion>,
    reported: VecDeque<Completion>,
}

impl Engine for Late {
    fn submit(
        &mut self,
        reactor: &mut Reactor,
        key: u64,
        client: &Weak<Client>,
        file: &Arc<Descriptor>,
        operation: Operation,
    ) -> Option<Pending> {
        self.reads += usize::from(matches!(operation, Operation::Read { .. }));
        self.ring.submit(reactor, key, client, file, operation)
    }

    fn submit_blocking(
        &mut self,
        key: u64,
        client: &Weak<Client>,
        file: &Arc<Descriptor>,
        operation: Operation,
    ) -> Pending {
        self.ring.submit_blocking(key, client, file, operation)
    }

    fn call(&mut self, key: u64, client: &Weak<Client>, lane: Lane, call: Call) -> Pending {
        self.ring.call(key, client, lane, call)
    }

    fn close(&mut self, file: Arc<Descriptor>, closing: Closing) {
        self.ring.close(file, closing);
    }

    fn completions(&mut self) -> &mut CompletionQueue {
        self.ring.completions()
    }

    /// It never is in time.
    fn cancel(&mut self, _: &mut Reactor, _: u64, _: Pending) {}

    fn flush(&mut self) -> bool {
        self.ring.flush()
    }

    fn handle(&mut self, event: Event) {
        self.ring.handle(event);
    }

    fn next(&mut self) -> Option<Completion> {
        while let Some(completion) = self.ring.next() {
            match completion.outcome {
                engine::Outcome::Slot(_) => self.ended.push(completion),
                _ => self.reported.push_back(completion),
            }
        }
        if self.may_report.get() && self.ended.len() == self.reads {
            self.reads = 0;
            self.reported.extend(self.ended.drain(..));
        }
        self.reported.pop_front()
    }
}

/// A bench whose worker knows the device already, and what lets that report. None if the file system here has
/// no O_DIRECT.
fn late_bench() -> Option<(Bench, Rc<Cell<bool>>)> {
    let directory = directory_of_blocks();
    let path = directory.path().join("file");
    if let Err(error) = rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECT, Mode::empty()) {
        eprintln!("SKIPPED: no O_DIRECT in {}: {error}", path.display());
        return None;
    }
    let mut worker = worker(&export(&directory), "0");
    let may_report = Rc::new(Cell::new(false));
    worker.engine = Box::new(Late {
        ring: Uring::new(&worker.reactor),
        may_report: Rc::clone(&may_report),
        reads: 0,
        ended: Vec::new(),
        reported: VecDeque::new(),
    });
    let mut bench = Bench::new(worker, directory, OPEN_READ | OPEN_DIRECT);
    may_report.set(true);
    bench.read(DEPTH);
    bench.collect(DEPTH);
    assert_eq!((bench.worker.device_queues.in_flight(), bench.worker.requests.len()), (0, 0));
    may_report.set(false);
    Some((bench, may_report))
}

#[test]
fn has_something_to_do_as_soon_as_it_reports() {
    let Some((mut bench, may_report)) = late_bench() else { return };
    bench.read(DEPTH);
    for _ in 0..50 {
        until(&mut bench.worker, "all are taken in", |worker| worker.requests.len() == DEPTH);
        assert_eq!(bench.worker.device_queues.in_flight(), BEGUN);
        may_report.set(true);
        until(&mut bench.worker, "it reports", |worker| worker.requests.len() == HELD);
        assert_eq!(bench.worker.device_queues.in_flight(), HELD, "it has nothing to do");
        may_report.set(false);
        assert!(bench.collect(BEGUN).is_empty());
        bench.read(BEGUN);
    }
}

#[test]
fn a_request_that_is_held_back_can_be_cancelled_at_once() {
    let Some((mut bench, may_report)) = late_bench() else { return };
    let last = bench.read(DEPTH);
    let mut body = Vec::new();
    Command::Cancel { id: last.0 }.encode(&mut body);
    bench.client.send(u64::MAX, &body, Bulk::None, SendOptions::CONTROL).expect("a credit is left");
    bench.client.flush();
    let replies = bench.collect(2);
    let errnos: Vec<_> = replies.iter().map(|reply| (reply.tag, reply.status.errno)).collect();
    let last = bench.next_block as u64 - 1;
    assert_eq!(errnos, [(last, libc::ECANCELED), (u64::MAX, 0)]);
    may_report.set(true);
    assert!(bench.collect(DEPTH - 1).is_empty());
}

#[test]
fn a_client_that_goes_leaves_nothing_behind() {
    let Some((mut bench, may_report)) = late_bench() else { return };
    bench.read(DEPTH);
    until(&mut bench.worker, "all are taken in", |worker| worker.requests.len() == DEPTH);
    drop(bench.client);
    until(&mut bench.worker, "what is held back is gone", |worker| worker.requests.len() <= BEGUN);
    may_report.set(true);
    until(&mut bench.worker, "the rest is gone", |worker| worker.requests.is_empty());
    assert_eq!((bench.worker.device_queues.in_flight(), bench.worker.arena.used_bytes()), (0, 0));
}
