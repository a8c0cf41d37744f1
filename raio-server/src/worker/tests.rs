//! A worker with everything it has (transport, ring, arena, exports) and its client, in one thread, where they take turns.

mod instructions;
mod late_device;

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use clap::Parser;
use raio_transport::handshake::{Offer, random_id};
use raio_transport::memory::{Buffer, Buffers};
use raio_transport::protocol::{Command, OPEN_DIRECT, OPEN_READ, OPEN_WRITE};
use raio_transport::tcp::Client;
use raio_transport::transport::{Bulk, ClientTransport, Reply};

use super::*;
use crate::config::Options;

fn worker(export: &str) -> Worker {
    let options =
        Options::parse_from(["raio_server", "--export", export, "--spin-us", "0", "--memory", "64M"]);
    let config = options.check(1).expect("the options make sense");
    let shared = Shared {
        exports: Exports::open(&config.exports).expect("it can be exported"),
        sessions: Sessions::new(16, 16),
        policy: Arc::default(),
        mailboxes: OnceLock::new(),
        backend: config.backend,
        arena_bytes: config.arena_bytes,
        spin: config.spin,
        rdma: false,
    };
    let (worker, started) = Worker::new(0, Arc::new(shared), Arc::default(), None).expect("a worker starts");
    assert!(started.fallback.is_none(), "these tests are for io_uring, but {:?}", started.fallback);
    worker
}

fn turn(worker: &mut Worker) {
    // Never sleeps: there is nobody else to bring news.
    worker.is_busy = true;
    worker.turn().expect("the worker goes on");
}

fn connect(worker: &mut Worker) -> Client {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    theirs.set_nonblocking(true).expect("it can be set up");
    worker.adopt(RawConnection::Tcp(theirs.into()));
    let offer = Offer { session: random_id(), ..Offer::new("test") };
    let deadline = Instant::now() + Duration::from_secs(60);
    let connecting = std::thread::spawn(move || {
        Client::from_stream(TcpStream::from(OwnedFd::from(ours)), &offer, deadline)
    });
    while !connecting.is_finished() {
        turn(worker);
        std::thread::sleep(Duration::from_millis(1));
    }
    connecting.join().expect("it does not panic").expect("the worker grants a connection")
}

fn open(worker: &mut Worker, client: &mut Client, flags: u32, path: &[u8]) -> FileHandle {
    let mut body = Vec::new();
    Command::Open { flags, mode: 0, path }.encode(&mut body);
    client.send(0, &body, Bulk::None, true).expect("a credit is left");
    client.flush();
    let mut replies = Vec::new();
    while replies.is_empty() {
        turn(worker);
        client.receive(&mut replies);
    }
    assert_eq!(replies[0].status, Status::OK);
    FileHandle(replies[0].result as u32)
}
