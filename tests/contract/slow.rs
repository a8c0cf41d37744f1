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
        let mut bystander = server.client();
        let (mut raw, _) = Raw::open_client(&server, &Offer::new("full"));
        // It asks and asks, for much more than any buffer in between takes, and reads nothing.
        let thread = std::thread::spawn(move || {
            let mut asked = 0u64;
            let deadline = Instant::now() + PATIENCE;
            while Instant::now() < deadline {
                let taken = if transport.is_tcp() {
                    raw.send(&get(asked, 64 << 10))
                } else {
                    raw.request_in(asked, &command(Op::Get, asked), 64 << 10)
                };
                if !taken {
                    break;
                }
                asked += 1;
            }
            (raw, asked)
        });
        // Meanwhile others are served.
        let until = Instant::now() + STALL / 2;
        while Instant::now() < until {
            bystander.works();
        }
        assert_eq!(server.closed(0), CloseReason::Violation(Violation::Stalled));
        let (_raw, asked) = thread.join().unwrap();
        assert!(asked > 16, "it asked {asked} times");
        bystander.works();
        server.until("everything to be given back", |seen| (seen.arena_bytes == 0).then_some(()));
        // What is in the ring, and a batch behind it: each at most what 17 requests and the server's own limit of 1 MiB make.
        let bound = 2 * (17 * (128 << 10) + (1 << 20)) + (1 << 20);
        server.each_seen(|seen| {
            assert!(seen.unsent_bytes_max <= bound, "{} bytes", seen.unsent_bytes_max);
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
        let server = serve(transport, Policy { data_bytes_max: 256 << 10, ..impatient() });
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
        let write = message::Request {
            id: 2,
            body_len: 0,
            data_len: 500,
            region: RemoteRegion::None,
            data_crc: 0,
        };
        write.encode(&command(Op::Put, 4), false, &mut bytes);
        bytes.extend_from_slice(&pattern(4, 500));
        message::encode_ping(3, false, &mut bytes);
        for byte in bytes {
            raw.stream().write_all(&[byte]).unwrap();
        }
        let Got::Response(_, _, data) = raw.next() else { panic!("no response") };
        assert!(data == pattern(1, 5000));
        let Got::Response(response, ..) = raw.next() else { panic!("no response") };
        assert_eq!(response.result, 500);
        assert_eq!(raw.next(), Got::Pong(3));
    }
}

#[test]
fn a_client_that_begins_a_message_and_stops_is_closed() {
    let mut bytes = Vec::new();
    let request = message::Request {
        id: 1,
        body_len: 0,
        data_len: 60_000,
        region: RemoteRegion::None,
        data_crc: 0,
    };
    request.encode(&command(Op::Put, 0), false, &mut bytes);
    bytes.extend_from_slice(&pattern(0, 60_000));
    for transport in [Transport::TcpUring, Transport::TcpEpoll] {
        let server = serve(transport, impatient());
        // In the header, in the body, in the data.
        for (n, len) in [1, 39, 50, 57, 30_000, 59_999].into_iter().enumerate() {
            let (mut raw, _) = Raw::open_client(&server, &Offer::new("sleepy"));
            raw.send(&bytes[..len]);
            assert_eq!(server.closed(n), CloseReason::Violation(Violation::Stalled), "after {len} bytes");
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
