//! A device that reports only when it has nothing left to do: see [`crate::pace`].

use std::cell::Cell;

use raio_transport::reactor::OpId;
use raio_transport::transport::RequestId;
use rustix::fs::{Mode, OFlags};

use super::*;
use crate::backend::{Completion, Operation};

const BLOCK: usize = 4096;
const FILE_BLOCKS: usize = 256;
const DEPTH: usize = 32;
/// What the device gets of so many, and what is held back.
const BEGUN: usize = 20;
const HELD: usize = DEPTH - BEGUN;

/// The ring; but reads are reported only once all of them have ended, and the test lets them be.
#[derive(Default)]
struct Late {
    ring: Uring,
    may_report: Rc<Cell<bool>>,
    reads: usize,
    ended: Vec<Completion>,
    reported: VecDeque<Completion>,
}

impl Backend for Late {
    fn submit(
        &mut self,
        reactor: &mut Reactor,
        key: u64,
        file: &Handle,
        operation: Operation,
    ) -> Option<OpId> {
        self.reads += usize::from(matches!(operation, Operation::Read { .. }));
        self.ring.submit(reactor, key, file, operation)
    }

    fn close(&mut self, reactor: &mut Reactor, key: u64, fd: OwnedFd) {
        self.ring.close(reactor, key, fd);
    }

    /// It never is in time.
    fn cancel(&mut self, _: &mut Reactor, _: u64, _: Option<OpId>) {}

    fn handle(&mut self, event: Event) {
        self.ring.handle(event);
    }

    fn next(&mut self) -> Option<Completion> {
        while let Some(completion) = self.ring.next() {
            match completion.outcome {
                backend::Outcome::Slot(_) => self.ended.push(completion),
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

struct Bench {
    worker: Worker,
    client: Client,
    file: FileHandle,
    may_report: Rc<Cell<bool>>,
    next_block: usize,
    _directory: tempfile::TempDir,
}

impl Bench {
    /// None if the file system here has no O_DIRECT. The worker knows the device already.
    fn new() -> Option<Self> {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, (0..FILE_BLOCKS).flat_map(block).collect::<Vec<_>>()).unwrap();
        if let Err(error) = rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECT, Mode::empty()) {
            eprintln!("SKIPPED: no O_DIRECT in {}: {error}", directory.path().display());
            return None;
        }
        let mut worker = worker(&format!("d={}", directory.path().display()));
        let late = Late::default();
        let may_report = Rc::clone(&late.may_report);
        worker.backend = Box::new(late);
        let mut client = connect(&mut worker);
        let file = open(&mut worker, &mut client, OPEN_READ | OPEN_DIRECT, b"/d/file");
        let mut bench = Self { worker, client, file, may_report, next_block: 0, _directory: directory };
        bench.may_report.set(true);
        bench.read(DEPTH);
        bench.collect(DEPTH);
        assert_eq!((bench.worker.at_devices, bench.worker.requests.len()), (0, 0));
        bench.may_report.set(false);
        Some(bench)
    }

    /// Asks for the next blocks. Gives the last request.
    fn read(&mut self, count: usize) -> RequestId {
        let mut body = Vec::new();
        let mut last = None;
        for _ in 0..count {
            body.clear();
            let offset = (self.next_block * BLOCK) as u64;
            Command::Read { file: self.file, offset, length: BLOCK as u32 }.encode(&mut body);
            let buffer = Buffers::One(Buffer::Owned(vec![0; BLOCK].into()));
            let tag = self.next_block as u64;
            last = Some(self.client.send(tag, &body, Bulk::In(buffer), false).expect("a credit is left"));
            self.next_block = (self.next_block + 1) % FILE_BLOCKS;
        }
        self.client.flush();
        last.expect("at least one")
    }

    /// Takes turns until it is as it should be.
    fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !is_so(self) {
            assert!(Instant::now() < deadline, "{what}: not within 30 s");
            turn(&mut self.worker);
        }
    }

    /// Takes turns until so many replies have come, and looks at the data of those that succeeded. Gives the others.
    fn collect(&mut self, count: usize) -> Vec<Reply> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let (mut came, mut failed, mut replies) = (0, Vec::new(), Vec::new());
        while came < count {
            assert!(Instant::now() < deadline, "{came} of {count} replies came");
            turn(&mut self.worker);
            self.client.receive(&mut replies);
            came += replies.len();
            for reply in replies.drain(..) {
                match &reply.bulk {
                    Bulk::In(Buffers::One(Buffer::Owned(bytes))) if reply.status.is_ok() => {
                        assert_eq!(reply.result, BLOCK as u64);
                        assert!(**bytes == *block(reply.tag as usize), "block {} has other bytes", reply.tag);
                    }
                    _ => failed.push(reply),
                }
            }
        }
        assert_eq!(came, count);
        failed
    }
}

fn block(at: usize) -> Vec<u8> {
    [at as u8, !(at as u8)].repeat(BLOCK / 2)
}

#[test]
fn has_something_to_do_as_soon_as_it_reports() {
    let Some(mut bench) = Bench::new() else { return };
    bench.read(DEPTH);
    for _ in 0..50 {
        bench.until("all are taken in", |bench| bench.worker.requests.len() == DEPTH);
        assert_eq!(bench.worker.at_devices, BEGUN);
        bench.may_report.set(true);
        bench.until("it reports", |bench| bench.worker.requests.len() == HELD);
        assert_eq!(bench.worker.at_devices, HELD, "it has nothing to do");
        bench.may_report.set(false);
        assert!(bench.collect(BEGUN).is_empty());
        bench.read(BEGUN);
    }
}

#[test]
fn a_request_that_is_held_back_can_be_cancelled_at_once() {
    let Some(mut bench) = Bench::new() else { return };
    let last = bench.read(DEPTH);
    let mut body = Vec::new();
    Command::Cancel { id: last.0 }.encode(&mut body);
    bench.client.send(u64::MAX, &body, Bulk::None, true).expect("a credit is left");
    bench.client.flush();
    let replies = bench.collect(2);
    let errnos: Vec<_> = replies.iter().map(|reply| (reply.tag, reply.status.errno)).collect();
    let last = bench.next_block as u64 - 1;
    assert_eq!(errnos, [(last, libc::ECANCELED), (u64::MAX, 0)]);
    bench.may_report.set(true);
    assert!(bench.collect(DEPTH - 1).is_empty());
}

#[test]
fn a_client_that_goes_leaves_nothing_behind() {
    let Some(mut bench) = Bench::new() else { return };
    bench.read(DEPTH);
    bench.until("all are taken in", |bench| bench.worker.requests.len() == DEPTH);
    let Bench { mut worker, client, may_report, _directory, .. } = bench;
    drop(client);
    let mut until = |count| {
        let deadline = Instant::now() + Duration::from_secs(30);
        while worker.requests.len() > count {
            assert!(Instant::now() < deadline, "{} requests instead of {count}", worker.requests.len());
            turn(&mut worker);
        }
    };
    until(BEGUN);
    may_report.set(true);
    until(0);
    assert_eq!((worker.at_devices, worker.arena.used_bytes()), (0, 0));
}
