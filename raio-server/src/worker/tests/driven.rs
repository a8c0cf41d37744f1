//! What happens to clients as time passes, on a clock that the test sets.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use raio_transport::Status;
use raio_transport::handshake::{ChannelOffer, Offer, Policy};
use raio_transport::message::{
    self, Parsed, RemoteRegion, RequestHeader, SessionId, Welcome, parse_handshake,
};
use raio_transport::protocol::{Command, OPEN_READ};

use crate::worker::driven::{InUse, TestWorker};

const INSTANT: Duration = Duration::from_millis(1);

fn worker() -> TestWorker {
    let options = ["--export", "m=mem:64k,rw", "--io-max", "64k", "--memory", "2M", "--max-sessions", "4"];
    TestWorker::new(&options, 16).expect("a worker")
}

fn connect(worker: &mut TestWorker) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    for end in [&ours, &theirs] {
        end.set_nonblocking(true).expect("it can be set up");
    }
    worker.connect(theirs.into()).expect("there is a place");
    run(worker);
    ours
}

fn run(worker: &mut TestWorker) {
    for _ in 0..5 {
        worker.run_once().expect("the worker goes on");
    }
}

/// A client that has had its welcome.
fn welcomed(worker: &mut TestWorker, offer: &Offer) -> UnixStream {
    let mut client = connect(worker);
    client.write_all(&offer.hello()).unwrap();
    run(worker);
    let mut bytes = [0; 1024];
    let n = client.read(&mut bytes).expect("a welcome");
    assert!(matches!(parse_handshake::<Welcome>(&bytes[..n]), Ok(Parsed::Item(..))));
    client
}

fn offer() -> Offer {
    Offer { session: SessionId([1; 16]), ..Offer::new("test") }
}

#[test]
fn a_client_that_says_nothing_is_closed_when_its_time_is_over_and_not_before() {
    let mut worker = worker();
    let _client = connect(&mut worker);
    worker.advance(Policy::default().handshake_timeout - INSTANT);
    run(&mut worker);
    assert_eq!(worker.in_use().connections, [1, 1]);
    worker.advance(INSTANT);
    run(&mut worker);
    // Its last words have a while to arrive.
    worker.advance(Duration::from_secs(2));
    run(&mut worker);
    assert_eq!(worker.in_use(), InUse::default());
}

#[test]
fn who_breaks_the_promise_to_say_something_is_closed_and_the_session_ends() {
    let mut worker = worker();
    let keepalive = Duration::from_secs(1);
    let _client = welcomed(&mut worker, &Offer { keepalive, ..offer() });
    assert_eq!(worker.in_use().sessions, [1, 1]);
    for _ in 0..3 {
        assert_eq!(worker.in_use().sessions, [1, 1], "a ping may come at the end of an interval");
        worker.advance(keepalive);
        run(&mut worker);
    }
    worker.advance(keepalive);
    run(&mut worker);
    assert_eq!(worker.in_use().sessions, [0, 0]);
    // It lingers, so that the client learns why.
    worker.advance(Duration::from_secs(10));
    run(&mut worker);
    assert_eq!(worker.in_use(), InUse::default());
}

#[test]
fn a_blocking_operation_runs_when_it_is_told_to() {
    let mut worker = worker();
    let mut client = welcomed(&mut worker, &offer());
    let mut send = |id, command: Command<'_>, worker: &mut TestWorker| {
        let (mut body, mut bytes) = (Vec::new(), Vec::new());
        command.encode(&mut body);
        let region = match command.read_length() {
            0 => RemoteRegion::None,
            len => RemoteRegion::In { address: 0, key: 0, len },
        };
        RequestHeader { id, body_len: 0, data_len: 0, region, has_crc: false, data_crc: 0 }
            .encode(&body, false, &mut bytes);
        client.write_all(&bytes).unwrap();
        run(worker);
    };
    send(1, Command::Open { flags: OPEN_READ, mode: 0, path: b"/m" }, &mut worker);
    let file = raio_transport::protocol::FileHandle(1 << 20);
    send(2, Command::Read { file, offset: 0, length: 4096 }, &mut worker);
    worker.advance(Duration::from_secs(60));
    run(&mut worker);
    assert_eq!((worker.in_use().requests, worker.in_use().jobs), ([1, 0], 1));
    assert!(worker.run_job(0) && !worker.run_job(0));
    run(&mut worker);
    assert_eq!(worker.in_use().requests, [0, 0]);

    send(3, Command::Fsync { file, data_only: false }, &mut worker);
    assert!(worker.begin_job(0) && !worker.begin_job(0));
    drop(client);
    run(&mut worker);
    assert_eq!(
        worker.in_use().requests,
        [1, 0],
        "a job that was begun goes on when its client has disconnected"
    );
    assert!(worker.end_job(0) && !worker.end_job(0));
    run(&mut worker);
    assert_eq!(worker.in_use(), InUse::default());
}

#[test]
fn a_worker_that_is_told_to_stop_does_so_in_time_and_another_begins() {
    let mut worker = worker();
    let _client = welcomed(&mut worker, &offer());
    worker.drain(Duration::from_secs(10));
    run(&mut worker);
    let mut outcome = worker.drained();
    for _ in 0..100 {
        worker.advance(Duration::from_millis(50));
        run(&mut worker);
        outcome = outcome.or(worker.drained());
    }
    assert_eq!(outcome, Some(true));
    // One whose time is over leaves what it has.
    worker.restart().expect("another worker");
    let _client = welcomed(&mut worker, &offer());
    worker.drain(Duration::ZERO);
    run(&mut worker);
    worker.advance(Duration::from_secs(1));
    assert_eq!(worker.drained(), Some(false));
    assert_eq!(worker.in_use().sessions, [1, 1]);
    worker.restart().expect("another worker");
    assert_eq!(worker.in_use(), InUse::default());
    welcomed(&mut worker, &offer());
}

fn resumable(epoch: u64) -> Offer {
    let channel = Some(ChannelOffer { number: 1, epoch, linger: Duration::from_secs(60) });
    Offer { channel, ..offer() }
}

#[test]
fn a_channel_whose_connection_has_broken_is_kept_for_the_time_that_was_granted() {
    let mut worker = worker();
    drop(welcomed(&mut worker, &resumable(1)));
    run(&mut worker);
    let parked = InUse { sessions: [0, 1], channels: [1, 0], ..InUse::default() };
    assert_eq!(worker.in_use(), parked);
    worker.advance(Duration::from_secs(60) - INSTANT);
    run(&mut worker);
    assert_eq!(worker.in_use(), parked);
    drop(welcomed(&mut worker, &resumable(2)));
    run(&mut worker);
    worker.advance(Duration::from_secs(60) - INSTANT);
    run(&mut worker);
    assert_eq!(worker.in_use(), parked, "the time begins anew");
    worker.advance(INSTANT);
    run(&mut worker);
    assert_eq!(worker.in_use(), InUse::default());
}

#[test]
fn a_goaway_ends_a_channel_and_nothing_is_kept() {
    let mut worker = worker();
    let mut client = welcomed(&mut worker, &resumable(1));
    let mut goaway = Vec::new();
    message::encode_goaway(Status::OK, "", false, &mut goaway);
    client.write_all(&goaway).unwrap();
    run(&mut worker);
    drop(client);
    run(&mut worker);
    assert_eq!(worker.in_use(), InUse::default());
}

#[test]
fn a_server_that_is_told_not_to_linger_keeps_no_channel() {
    let options = ["--export", "m=mem:64k,rw", "--memory", "64M", "--max-sessions", "4", "--linger", "0"];
    let mut worker = TestWorker::new(&options, 16).expect("a worker");
    drop(welcomed(&mut worker, &resumable(1)));
    run(&mut worker);
    assert_eq!(worker.in_use(), InUse::default());
}
