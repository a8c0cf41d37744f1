//! Peers that are slow, or do nothing at all: they cost bounded memory and nobody else's time, and in the end their connection.

use std::io::Write;
use std::time::{Duration, Instant};

use raio_transport::error::Violation;
use raio_transport::handshake::{Offer, Policy};
use raio_transport::message::{self, RemoteRegion};
use raio_transport::transport::CloseReason;

use crate::harness::{Op, PATIENCE, Server, Setup, Transport, command, pattern, serve};
use crate::raw::{Got, Raw};

const STALL: Duration = Duration::from_millis(300);

fn impatient() -> Policy {
    Policy { stall_timeout: STALL, queue_depth: 16, data_bytes_max: 64 << 10, ..Policy::default() }
}

fn get(id: u64, len: u32) -> Vec<u8> {
    let region = RemoteRegion::In { address: 0, key: 0, len };
    let request = message::Request { id, body_len: 0, data_len: 0, region, data_crc: 0 };
    let mut bytes = Vec::new();
    request.encode(&command(Op::Get, id), false, &mut bytes);
    bytes
}

contract! {
    fn a_client_that_takes_no_answers_costs_bounded_memory_and_then_its_connection(transport) {
        let policy = impatient();
        let setup = Setup { policy: policy.clone(), workers: 1, arena_bytes: 64 << 20 };
        let server = Server::start(transport, setup);
        let mut bystander = server.bystander();
        let (mut raw, grant) = Raw::open_client(&server, &Offer::new("full"));
        // It keeps within its credits, but takes nothing: it asks again when what it asked for has been answered.
        let mut asked = 0;
        loop {
            bystander.works();
            let (answered, is_closed) = server.until("a look", |seen| Some((seen.requests, !seen.closed.is_empty())));
            if is_closed {
                break;
            }
            if answered == asked {
                for _ in 0..grant.queue_depth {
                    raw.request_in(asked, &command(Op::Get, asked), 64 << 10);
                    asked += 1;
                }
            }
        }
        assert_eq!(server.closed(0), CloseReason::Violation(Violation::Stalled));
        bystander.works();
        server.until("everything to be given back", |seen| (seen.arena_bytes == 0).then_some(()));
        // What is being sent, and what was answered behind it before it was no longer read from: each at most what the
        // granted requests and the server's own limit of 1 MiB make.
        let bound = 2 * (17 * (128 << 10) + (1 << 20));
        server.each_seen(|seen| {
            assert!(seen.unsent_bytes_max > 0 && seen.unsent_bytes_max <= bound, "{} bytes", seen.unsent_bytes_max);
            assert!(seen.arena_bytes_max <= bound + (1 << 20), "{} bytes", seen.arena_bytes_max);
        });
    }

    fn a_client_that_only_pings_and_reads_nothing_is_closed(transport) {
        let server = serve(transport, impatient());
        let (mut raw, _) = Raw::open_client(&server, &Offer::new("curious"));
        let thread = std::thread::spawn(move || {
            let deadline = Instant::now() + PATIENCE;
            let mut ping = Vec::new();
            let count = if transport.is_tcp() { 500 } else { 1 };
            for id in 0..count {
                message::encode_ping(id, false, &mut ping);
            }
            while Instant::now() < deadline && raw.send(&ping) {}
            raw
        });
        assert_eq!(server.closed(0), CloseReason::Violation(Violation::Stalled));
        thread.join().unwrap();
        server.serves_others();
    }

    fn a_client_that_is_slow_to_take_its_answers_gets_them_all(transport) {
        // RDMA is Soft-RoCE on emulated processors here, and the wire is what is slow.
        let stall_timeout = if transport == Transport::Rdma { 10 * STALL } else { STALL };
        let server = serve(transport, Policy { data_bytes_max: 256 << 10, stall_timeout, ..impatient() });
        let (mut raw, grant) = Raw::open_client(&server, &Offer::new("slow"));
        for round in 0..3 {
            for n in 0..u64::from(grant.queue_depth) {
                raw.request_in(round * 100 + n, &command(Op::Get, n), 200_000);
            }
            for _ in 0..grant.queue_depth {
                std::thread::sleep(Duration::from_millis(5));
                let Got::Response(response, _, data) = raw.next() else { panic!("no response") };
                assert_eq!(response.data_len, 200_000);
                assert!(!transport.is_tcp() || data == pattern(response.id % 100, 200_000));
            }
        }
        server.each_seen(|seen| assert!(seen.closed.is_empty()));
    }
}

#[test]
fn a_client_that_sends_a_byte_at_a_time_is_served() {
    for transport in [Transport::TcpUring, Transport::TcpEpoll] {
        let server = serve(transport, impatient());
        let (mut raw, _) = Raw::open_client(&server, &Offer::new("bytewise"));
        let mut bytes = get(1, 5000);
        let write =
            message::Request { id: 2, body_len: 0, data_len: 500, region: RemoteRegion::None, data_crc: 0 };
        write.encode(&command(Op::Put, 4), false, &mut bytes);
        bytes.extend_from_slice(&pattern(4, 500));
        message::encode_ping(3, false, &mut bytes);
        for byte in bytes {
            raw.stream().write_all(&[byte]).unwrap();
        }
        let mut pongs = 0;
        for _ in 0..3 {
            match raw.next() {
                Got::Response(response, _, data) if response.id == 1 => assert!(data == pattern(1, 5000)),
                Got::Response(response, ..) => assert_eq!((response.id, response.result), (2, 500)),
                Got::Pong(3) => pongs += 1,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(pongs, 1);
    }
}

#[test]
fn a_client_that_begins_a_message_and_stops_is_closed() {
    let mut bytes = Vec::new();
    let request =
        message::Request { id: 1, body_len: 0, data_len: 60_000, region: RemoteRegion::None, data_crc: 0 };
    request.encode(&command(Op::Put, 0), false, &mut bytes);
    bytes.extend_from_slice(&pattern(0, 60_000));
    for transport in [Transport::TcpUring, Transport::TcpEpoll] {
        let server = serve(transport, impatient());
        // In the header, in the body, in the data; all at the same time.
        let mut all = [1, 39, 50, 57, 30_000, 59_999].map(|len| {
            let (mut raw, _) = Raw::open_client(&server, &Offer::new("sleepy"));
            raw.send(&bytes[..len]);
            raw
        });
        for (n, raw) in all.iter_mut().enumerate() {
            assert_eq!(server.closed(n), CloseReason::Violation(Violation::Stalled));
            let (status, _) = raw.goodbye().expect("it is told why");
            assert_eq!(status.errno, libc::ETIMEDOUT);
        }
        server.serves_others();
        server.until("everything to be given back", |seen| (seen.arena_bytes == 0).then_some(()));
    }
}

#[test]
fn a_client_that_trickles_a_message_for_too_long_is_closed() {
    let server = serve(Transport::TcpUring, impatient());
    let (mut raw, _) = Raw::open_client(&server, &Offer::new("trickle"));
    let mut bytes = Vec::new();
    let request =
        message::Request { id: 1, body_len: 0, data_len: 60_000, region: RemoteRegion::None, data_crc: 0 };
    request.encode(&command(Op::Put, 0), false, &mut bytes);
    raw.send(&bytes);
    let deadline = Instant::now() + PATIENCE;
    while raw.stream().write_all(&[0]).is_ok() {
        assert!(Instant::now() < deadline, "it is never closed");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(server.closed(0), CloseReason::Violation(Violation::Stalled));
    server.serves_others();
}
