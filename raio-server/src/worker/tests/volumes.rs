//! Volumes that are not the server's own: one that a thread of its own completes, as the callback of a
//! storage library would, and one that wraps another.

use std::sync::Weak;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use super::*;
use crate::client::Client as Origin;
use crate::engine::completions::Completer;
use crate::engine::{Closing, Lanes, Operation, Outcome, Pending};
use crate::export::Export;
use crate::volume::{Context, Memory, Properties, SizeLimit, Volume};

const SIZE: u64 = (FILE_BLOCKS * BLOCK) as u64;
const DEPTH: usize = 16;
/// The errno that its close ends with.
const CLOSE_ERRNO: i32 = libc::EDQUOT;

/// What the image's thread is told.
pub(super) enum Tell {
    Begin(u64, Completer, Operation),
    Cancel(u64),
    Close(Closing),
    /// It ends what it has, the last first, and goes on doing so from now on...
    Release,
    /// ... until it is to keep everything.
    Hold,
}

/// An image somewhere else: its operations end on a thread of its own, in another order than they began.
#[derive(Debug)]
pub(super) struct Image {
    thread: mpsc::Sender<Tell>,
    next_id: AtomicU64,
}

/// The thread's side.
struct Storage {
    bytes: Vec<u8>,
    in_flight: Vec<(u64, Completer, Operation)>,
    closing: Vec<Closing>,
    is_held: bool,
    /// It ends early what is cancelled.
    can_cancel: bool,
}

impl Storage {
    fn run(mut self, told: &mpsc::Receiver<Tell>) {
        while let Ok(first) = told.recv() {
            for tell in std::iter::once(first).chain(told.try_iter()) {
                match tell {
                    Tell::Begin(id, completer, operation) => self.in_flight.push((id, completer, operation)),
                    Tell::Cancel(id) => self.cancel(id),
                    Tell::Close(closing) => self.closing.push(closing),
                    Tell::Release => self.is_held = false,
                    Tell::Hold => self.is_held = true,
                }
            }
            if !self.is_held {
                while let Some((_, completer, operation)) = self.in_flight.pop() {
                    let (result, outcome) = self.carry_out(operation);
                    completer.complete(result, outcome);
                }
            }
            if self.in_flight.is_empty() {
                self.closing.drain(..).for_each(|closing| closing.complete(Err(CLOSE_ERRNO)));
            }
        }
    }

    fn cancel(&mut self, id: u64) {
        let at = self.in_flight.iter().position(|(other, ..)| *other == id);
        if let Some(at) = at.filter(|_| self.can_cancel) {
            let (_, completer, operation) = self.in_flight.remove(at);
            let outcome = match operation {
                Operation::Read { target: range, .. } | Operation::Write { source: range, .. } => {
                    Outcome::Slot(range)
                }
                _ => Outcome::None,
            };
            completer.complete(Err(libc::ECANCELED), outcome);
        }
    }

    fn carry_out(&mut self, operation: Operation) -> (Result<u32, i32>, Outcome) {
        match operation {
            Operation::Read { mut target, offset } => {
                let len = target.len;
                target.bytes_mut().copy_from_slice(&self.bytes[offset as usize..][..len]);
                (Ok(len as u32), Outcome::Slot(target))
            }
            Operation::Write { source, offset } => {
                self.bytes[offset as usize..][..source.len].copy_from_slice(source.bytes());
                (Ok(source.len as u32), Outcome::Slot(source))
            }
            Operation::Fsync { .. } => (Ok(0), Outcome::None),
            _ => (Err(libc::EOPNOTSUPP), Outcome::None),
        }
    }
}

impl Image {
    /// Held until it is released.
    pub(super) fn new(can_cancel: bool) -> (Self, mpsc::Sender<Tell>) {
        let (thread, told) = mpsc::channel();
        let bytes = (0..FILE_BLOCKS).flat_map(block).collect();
        let storage =
            Storage { bytes, in_flight: Vec::new(), closing: Vec::new(), is_held: true, can_cancel };
        std::thread::spawn(move || storage.run(&told));
        (Self { thread: thread.clone(), next_id: AtomicU64::new(0) }, thread)
    }

    fn tell(&self, tell: Tell) {
        self.thread.send(tell).expect("its thread lives as long as it");
    }
}

impl Volume for Image {
    fn submit(
        &self,
        context: &mut Context<'_>,
        key: u64,
        _client: &Weak<Origin>,
        operation: Operation,
    ) -> Option<Pending> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        self.tell(Tell::Begin(id, context.engine.completions().completer(key), operation));
        Some(Pending::Volume(id))
    }

    fn cancel(&self, _context: &mut Context<'_>, _key: u64, pending: Pending) {
        let Pending::Volume(id) = pending else { unreachable!("{pending:?} is not of this volume") };
        self.tell(Tell::Cancel(id));
    }

    fn close(self: Arc<Self>, _engine: &mut dyn Engine, closing: Closing) {
        self.tell(Tell::Close(closing));
    }

    fn properties(&self) -> Properties {
        let size_limit = Some(SizeLimit { bytes: SIZE, errno: libc::ENOSPC });
        Properties { size_limit, ..Properties::default() }
    }
}

/// A filter that changes nothing, and counts what passes.
#[derive(Debug)]
struct PassThrough<V> {
    volume: Arc<V>,
    passed: Arc<AtomicU64>,
}

impl<V: Volume> Volume for PassThrough<V> {
    fn submit(
        &self,
        context: &mut Context<'_>,
        key: u64,
        client: &Weak<Origin>,
        operation: Operation,
    ) -> Option<Pending> {
        self.passed.fetch_add(1, Ordering::Relaxed);
        self.volume.submit(context, key, client, operation)
    }

    fn submit_blocking(
        &self,
        context: &mut Context<'_>,
        key: u64,
        client: &Weak<Origin>,
        operation: Operation,
    ) -> Option<Pending> {
        self.volume.submit_blocking(context, key, client, operation)
    }

    fn cancel(&self, context: &mut Context<'_>, key: u64, pending: Pending) {
        self.volume.cancel(context, key, pending);
    }

    fn close(self: Arc<Self>, engine: &mut dyn Engine, closing: Closing) {
        Arc::clone(&self.volume).close(engine, closing);
    }

    fn try_read_cached(&self, engine: &mut dyn Engine, bytes: &mut [u8], offset: u64) -> Option<()> {
        self.passed.fetch_add(1, Ordering::Relaxed);
        self.volume.try_read_cached(engine, bytes, offset)
    }

    fn properties(&self) -> Properties {
        self.volume.properties()
    }
}

/// A client with the only file of a worker open, whose volume this is.
fn bench(volume: impl Volume + 'static) -> Bench {
    let options = Options::parse_from(["raio_server", "--export", "unused=null:1", "--memory", "128M"]);
    let config = options.check(1).expect("the options make sense");
    let lanes = Lanes::new(Pool::start().unwrap());
    let exports = Exports::of(vec![Arc::new(Export::of_volume("v", volume, SIZE, lanes))]);
    let mut worker = worker_of(exports, &config);
    let mut client = connect(&mut worker);
    let file = open(&mut worker, &mut client, OPEN_READ | OPEN_WRITE, b"/v");
    Bench { worker, client, file, next_block: 0, _directory: None }
}

fn image(can_cancel: bool) -> (Bench, mpsc::Sender<Tell>) {
    let (image, thread) = Image::new(can_cancel);
    (bench(image), thread)
}

impl Bench {
    /// Sends a block to be written at the place of another. Its reply has this tag.
    fn write(&mut self, at: usize, bytes: Vec<u8>) {
        let mut body = Vec::new();
        let (offset, length) = ((at * BLOCK) as u64, BLOCK as u32);
        Command::Write { file: self.file, offset, length }.encode(&mut body);
        let buffer = Buffers::One(Buffer::Owned(bytes.into()));
        self.client.send(at as u64, &body, Bulk::Out(buffer), SendOptions::PLAIN).expect("a credit is left");
        self.client.flush();
    }

    /// Runs iterations until the volume has so many operations.
    fn until_submitted(&mut self, count: usize) {
        until(&mut self.worker, "all are submitted", |worker| {
            worker.requests.in_state(State::Executing) == count
        });
    }
}

/// How each reply went, by its tag, in the order in which they came.
fn outcomes(replies: &[Reply]) -> Vec<(u64, i32)> {
    replies.iter().map(|reply| (reply.tag, reply.status.errno)).collect()
}

#[test]
fn another_thread_ends_reads_writes_and_flushes_in_its_own_order() {
    let (mut bench, thread) = image(true);
    bench.read(DEPTH);
    bench.until_submitted(DEPTH);
    thread.send(Tell::Release).unwrap();
    let replies = bench.replies(DEPTH);
    let last_first: Vec<_> = (0..DEPTH as u64).rev().map(|tag| (tag, 0)).collect();
    assert_eq!(outcomes(&replies), last_first);
    for reply in &replies {
        let Bulk::In(Buffers::One(Buffer::Owned(bytes))) = &reply.bulk else { panic!("it had a buffer") };
        assert!(**bytes == *block(reply.tag as usize), "block {} has other bytes", reply.tag);
    }

    thread.send(Tell::Hold).unwrap();
    for at in 0..DEPTH {
        bench.write(at, block(at + 1));
    }
    bench.send(77, &Command::Fsync { file: bench.file, data_only: false });
    bench.until_submitted(DEPTH + 1);
    thread.send(Tell::Release).unwrap();
    let replies = bench.replies(DEPTH + 1);
    assert_eq!(outcomes(&replies)[0], (77, 0));
    assert_eq!(outcomes(&replies)[1..], last_first);

    bench.next_block = 0;
    bench.read(DEPTH);
    for reply in bench.replies(DEPTH) {
        let Bulk::In(Buffers::One(Buffer::Owned(bytes))) = &reply.bulk else { panic!("it had a buffer") };
        assert!(**bytes == *block(reply.tag as usize + 1), "block {} is not what was written", reply.tag);
    }
    bench.send(78, &Command::Discard { file: bench.file, offset: 0, length: 1 });
    assert_eq!(outcomes(&bench.replies(1)), [(78, libc::EOPNOTSUPP)]);
}

#[test]
fn a_request_on_another_thread_is_cancelled_if_that_can() {
    for can_cancel in [true, false] {
        let (mut bench, thread) = image(can_cancel);
        let last = bench.read(DEPTH);
        bench.until_submitted(DEPTH);
        bench.send(u64::MAX, &Command::Cancel { id: last.0 });
        let last = DEPTH as u64 - 1;
        if can_cancel {
            let expected = [(last, libc::ECANCELED), (u64::MAX, 0)];
            assert_eq!(outcomes(&bench.replies(2)), expected);
            thread.send(Tell::Release).unwrap();
            assert!(bench.collect(DEPTH - 1).is_empty());
        } else {
            until(&mut bench.worker, "it is told", |worker| {
                worker.requests.of(0).any(|request| worker.requests[request].is_cancelled)
            });
            thread.send(Tell::Release).unwrap();
            let replies = bench.replies(DEPTH + 1);
            assert_eq!(outcomes(&replies)[..2], [(last, 0), (u64::MAX, libc::EALREADY)]);
        }
        drop(bench.client);
        until(&mut bench.worker, "all is given back", |worker| worker.requests.is_empty());
    }
}

#[test]
fn a_file_is_closed_behind_its_requests_and_the_result_is_the_volumes() {
    let (mut bench, thread) = image(true);
    bench.read(DEPTH);
    bench.until_submitted(DEPTH);
    bench.send(99, &Command::Close(bench.file));
    bench.until_submitted(DEPTH + 1);
    assert_eq!(bench.worker.shared.sessions.open_files(), 1, "it counts until it is closed");
    thread.send(Tell::Release).unwrap();
    let replies = bench.replies(DEPTH + 1);
    assert_eq!(outcomes(&replies).last(), Some(&(99, CLOSE_ERRNO)));
    assert_eq!(bench.worker.shared.sessions.open_files(), 0);
}

#[test]
fn a_client_that_goes_leaves_nothing_on_another_thread() {
    for can_cancel in [true, false] {
        let (mut bench, thread) = image(can_cancel);
        bench.read(DEPTH);
        for at in 0..DEPTH {
            bench.write(at, block(at));
        }
        bench.until_submitted(2 * DEPTH);
        let Bench { client, mut worker, .. } = bench;
        drop(client);
        until(&mut worker, "the connection has gone", |worker| worker.connections.none_is_open());
        if !can_cancel {
            assert_eq!(worker.requests.len(), 2 * DEPTH, "their memory is still in use");
            thread.send(Tell::Release).unwrap();
        }
        until(&mut worker, "nothing is left", |worker| worker.requests.is_empty() && worker.closing == 0);
        assert_eq!((worker.arena.used_bytes(), worker.shared.sessions.open_files()), (0, 0));
    }
}

#[test]
fn what_wraps_a_volume_sees_every_request() {
    let passed = Arc::<AtomicU64>::default();
    let (volume, thread) = Image::new(true);
    thread.send(Tell::Release).unwrap();
    let mut bench = bench(PassThrough { volume: Arc::new(volume), passed: Arc::clone(&passed) });
    bench.read(DEPTH);
    assert!(bench.collect(DEPTH).is_empty());
    bench.send(99, &Command::Close(bench.file));
    assert_eq!(outcomes(&bench.replies(1)), [(99, CLOSE_ERRNO)]);
    // The fast path asks first.
    assert_eq!(passed.load(Ordering::Relaxed), 2 * DEPTH as u64);
}

#[test]
fn what_wraps_a_volume_of_the_engine_passes_the_fast_path_on() {
    let passed = Arc::<AtomicU64>::default();
    let volume = Memory::new(SIZE, Lanes::new(Pool::start().unwrap())).unwrap();
    let mut bench = bench(PassThrough { volume: Arc::new(volume), passed: Arc::clone(&passed) });
    for at in 0..DEPTH {
        bench.write(at, block(at));
    }
    assert!(outcomes(&bench.replies(DEPTH)).iter().all(|&(_, errno)| errno == 0));
    assert_eq!(passed.swap(0, Ordering::Relaxed), DEPTH as u64);
    bench.read(DEPTH);
    assert!(bench.collect(DEPTH).is_empty());
    assert_eq!(passed.load(Ordering::Relaxed), DEPTH as u64, "a read was not answered by the fast path");
}
