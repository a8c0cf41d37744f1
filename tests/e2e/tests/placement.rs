//! Which worker serves whom.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use raio::{Options, Session};
use raio_e2e::{HeldThread, PATIENCE, Raw, Server, is_at_rest};
use raio_transport::Status;
use raio_transport::handshake::Offer;
use raio_transport::message;
use raio_transport::protocol::OPEN_READ;
use rustix::process::Signal;
use serde_json::Value;

fn data_connections(statistics: &Value) -> Vec<u64> {
    let workers = statistics["per_worker"].as_array().expect("an entry for each worker");
    workers.iter().map(|worker| worker["data_connections"].as_u64().expect("a number")).collect()
}

#[test]
fn every_worker_gets_as_many_data_connections_whatever_control_connections_there_are() {
    let mut server = Server::start_with(&["n=null:1M"], &["--workers", "4"]);
    let url = server.url();
    // A session's control connection comes first, then its context's.
    let clients: Vec<_> = (0..12)
        .map(|_| {
            let session = Session::connect(&url, &Options::default()).expect("a session");
            let context = session.context(4).expect("a context");
            (session, context)
        })
        .collect();
    let statistics = server.statistics();
    assert_eq!(data_connections(&statistics), [3; 4], "{statistics}");
    drop(clients);
    server.statistics_when(|now| data_connections(now) == [0; 4]);
    // A client that does not say what its connection is for may read and write on it.
    let clients: Vec<_> = (0..6).map(|_| Raw::open(&url, "/n", OPEN_READ).expect("a file")).collect();
    let statistics = server.statistics();
    let mut counts = data_connections(&statistics);
    counts.sort_unstable();
    assert_eq!(counts, [1, 1, 2, 2], "{statistics}");
    drop(clients);
}

#[test]
fn clients_that_come_and_go_at_once_leave_no_trace() {
    let mut server = Server::start_with(&["n=null:1M"], &["--workers", "2", "--listen", "tcp://127.0.0.1:0"]);
    let mut goaway = Vec::new();
    message::encode_goaway(Status::OK, "", false, &mut goaway);
    for _ in 0..20 {
        let mut stream = TcpStream::connect(server.address()).expect("it listens");
        // In one segment, so that the connection has ended before the server has heard that it began.
        stream.write_all(&[Offer::new("brief").hello(), goaway.clone()].concat()).expect("it is sent");
        // It may end with a reset.
        let _ = stream.read_to_end(&mut Vec::new());
    }
    let statistics = server.statistics_when(is_at_rest);
    assert_eq!(data_connections(&statistics), [0; 2], "{statistics}");
}

#[test]
fn a_worker_that_does_not_run_gets_no_connections() {
    let mut server = Server::start_with(&["n=null:1M"], &["--workers", "2"]);
    let url = server.url();
    let held = HeldThread::new(server.pid(), "raio-0");
    // Half of them are placed on it, before anybody can know, and are taken back.
    let clients: Vec<_> = (0..8).map(|_| Raw::open(&url, "/n", OPEN_READ).expect("a file")).collect();
    assert_eq!(data_connections(&server.statistics()), [0, 8]);
    let begin = Instant::now();
    let more: Vec<_> = (0..8).map(|_| Raw::open(&url, "/n", OPEN_READ).expect("a file")).collect();
    assert!(begin.elapsed() < Duration::from_secs(5), "it is known by now");
    drop(held);
    // It is given some as soon as it runs.
    let deadline = Instant::now() + PATIENCE;
    let mut late = Vec::new();
    while data_connections(&server.statistics())[0] == 0 {
        assert!(Instant::now() < deadline, "it gets none");
        late.push(Raw::open(&url, "/n", OPEN_READ).expect("a file"));
    }
    drop((clients, more, late));
    server.signal(Signal::TERM);
    assert!(server.wait().success());
}
