//! A worker with everything it has (transport, ring, arena, exports) and its client, in one thread, where
//! they take turns.

mod administration;
mod cached_files;
mod channels;
mod coalescing_device;
mod driven;
mod fast_path;
mod instructions;
mod limits;
mod simulation;
mod volumes;

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use clap::Parser;
use raio_transport::handshake::Offer;
use raio_transport::memory::{Buffer, Buffers};
use raio_transport::message::SessionId;
use raio_transport::protocol::{Command, OPEN_DIRECT, OPEN_READ, OPEN_WRITE};
use raio_transport::tcp::TcpClient;
use raio_transport::transport::{Bulk, ClientTransport, Reply, RequestId, SendOptions};

use super::*;
use crate::config::{Config, Options};
use crate::limits::{Caps, Limits, Room};
use crate::pool::Pool;

const ROOM: Room = Room { descriptors: 64, files: 16, bytes: 1 << 20, workers: 1 };

fn no_limits() -> Arc<Limits> {
    Limits::new(ROOM, Caps::default(), Caps::default())
}

fn worker(export: &str, spin_us: &str) -> Worker {
    let options =
        Options::parse_from(["raio_server", "--export", export, "--spin-us", spin_us, "--memory", "128M"]);
    let config = options.check(1).expect("the options make sense");
    let exports = Exports::open(&config.exports, Pool::start().unwrap()).expect("it can be exported");
    worker_of(exports, &config)
}

fn worker_of(exports: Exports, config: &Config) -> Worker {
    worker_within(no_limits(), exports, config)
}

fn worker_within(limits: Arc<Limits>, exports: Exports, config: &Config) -> Worker {
    let shared = Shared::new(config, exports, Sessions::new(16, limits)).expect("there is no trace");
    let (worker, started) =
        Worker::new(0, Arc::new(shared), Arc::new(Counters::new(1, 1)), None).expect("a worker starts");
    assert!(started.fallback.is_none(), "these tests are for io_uring, but {:?}", started.fallback);
    worker
}

fn run_once(worker: &mut Worker) {
    // Never sleeps: there is nobody else to bring news.
    worker.is_busy = true;
    worker.run_once().expect("the worker goes on");
}

/// Runs iterations until it is as it should be.
fn until(worker: &mut Worker, what: &str, is_so: impl Fn(&Worker) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so(worker) {
        assert!(Instant::now() < deadline, "{what}: not within 30 s");
        run_once(worker);
    }
}

fn connect(worker: &mut Worker) -> TcpClient {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    theirs.set_nonblocking(true).expect("it can be set up");
    let permit = no_limits().connect(None).expect("a permit");
    worker.adopt(RawConnection::Tcp(AcceptedStream::new(OwnedFd::from(theirs)), None), Arc::new(permit));
    let offer = Offer { features: OPERATION_FEATURES, ..Offer::new("test") };
    let deadline = Instant::now() + Duration::from_secs(60);
    let connecting = std::thread::spawn(move || {
        TcpClient::from_stream(TcpStream::from(OwnedFd::from(ours)), &offer, deadline)
    });
    while !connecting.is_finished() {
        run_once(worker);
        std::thread::sleep(Duration::from_millis(1));
    }
    connecting.join().expect("it does not panic").expect("the worker grants a connection")
}

fn open(worker: &mut Worker, client: &mut TcpClient, flags: u32, path: &[u8]) -> FileHandle {
    let mut body = Vec::new();
    Command::Open { flags, mode: 0, path }.encode(&mut body);
    client.send(0, &body, Bulk::None, SendOptions::CONTROL).expect("a credit is left");
    client.flush();
    let mut replies = Vec::new();
    while replies.is_empty() {
        run_once(worker);
        client.receive(&mut replies);
    }
    assert_eq!(replies[0].status, Status::OK);
    FileHandle(replies[0].result as u32)
}

const BLOCK: usize = 4096;
const FILE_BLOCKS: usize = 256;

fn block(at: usize) -> Vec<u8> {
    [at as u8, !(at as u8)].repeat(BLOCK / 2)
}

/// A directory with a `file` of blocks.
fn directory_of_blocks() -> tempfile::TempDir {
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let blocks = (0..FILE_BLOCKS).flat_map(block).collect::<Vec<_>>();
    std::fs::write(directory.path().join("file"), blocks).unwrap();
    directory
}

/// How [`directory_of_blocks`] is exported.
fn export(directory: &tempfile::TempDir) -> String {
    format!("d={}", directory.path().display())
}

/// A worker, and a client that reads blocks of a file.
struct Bench {
    worker: Worker,
    client: TcpClient,
    file: FileHandle,
    next_block: usize,
    _directory: Option<tempfile::TempDir>,
}

impl Bench {
    fn new(mut worker: Worker, directory: tempfile::TempDir, flags: u32) -> Self {
        let mut client = connect(&mut worker);
        let file = open(&mut worker, &mut client, flags, b"/d/file");
        Self { worker, client, file, next_block: 0, _directory: Some(directory) }
    }

    /// Sends a command that has no data. Its reply has this tag.
    fn send(&mut self, tag: u64, command: &Command<'_>) {
        let mut body = Vec::new();
        command.encode(&mut body);
        self.client.send(tag, &body, Bulk::None, SendOptions::CONTROL).expect("a credit is left");
        self.client.flush();
    }

    /// The next replies, so many of them, in the order in which they came.
    fn replies(&mut self, count: usize) -> Vec<Reply> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut replies = Vec::new();
        while replies.len() < count {
            assert!(Instant::now() < deadline, "{} of {count} replies came", replies.len());
            run_once(&mut self.worker);
            self.client.receive(&mut replies);
        }
        assert_eq!(replies.len(), count);
        replies
    }

    /// Asks for the next blocks. Returns the last request.
    fn read(&mut self, count: usize) -> RequestId {
        let mut body = Vec::new();
        let mut last = None;
        for _ in 0..count {
            body.clear();
            let offset = (self.next_block * BLOCK) as u64;
            Command::Read { file: self.file, offset, length: BLOCK as u32 }.encode(&mut body);
            let buffer = Buffers::One(Buffer::Owned(vec![0; BLOCK].into()));
            let tag = self.next_block as u64;
            last = Some(
                self.client.send(tag, &body, Bulk::In(buffer), SendOptions::PLAIN).expect("a credit is left"),
            );
            self.next_block = (self.next_block + 1) % FILE_BLOCKS;
        }
        self.client.flush();
        last.expect("at least one")
    }

    /// Runs iterations until so many replies have come, and looks at the data of those that succeeded. Gives
    /// the others.
    fn collect(&mut self, count: usize) -> Vec<Reply> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let (mut came, mut failed, mut replies) = (0, Vec::new(), Vec::new());
        while came < count {
            assert!(Instant::now() < deadline, "{came} of {count} replies came");
            run_once(&mut self.worker);
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
