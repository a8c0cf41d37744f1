//! Peers that are slow, or do nothing at all: they cost bounded memory and nobody else's time, and when
//! others wait for memory their connection.

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use raio_transport::error::Violation;
use raio_transport::handshake::{Offer, Policy};
use raio_transport::message::{self, RemoteRegion};
use raio_transport::transport::CloseReason;

use crate::harness::{Op, PATIENCE, Server, Setup, Transport, command, pattern, serve, tcp_pair};
use crate::raw::{Got, Raw};

const STALL: Duration = Duration::from_millis(500);
/// Over RDMA the device gives a peer up that posts no receives, which may be before the server does.
const NO_RECEIVES: CloseReason = CloseReason::Violation(Violation::Stalled);

fn impatient() -> Policy {
    Policy { stall_timeout: STALL, queue_depth: 16, data_bytes_max: 64 << 10, ..Policy::default() }
}

/// How many connections were closed for memory.
fn evicted(server: &Server) -> usize {
    let mut count = 0;
    let is_evicted = |(_, reason): &&(_, CloseReason)| *reason == CloseReason::Evicted;
    server.each_seen(|seen| count += seen.closed.iter().filter(is_evicted).count());
    count
}

fn get(id: u64, len: u32) -> Vec<u8> {
    let region = RemoteRegion::In { address: 0, key: 0, len };
    let request = message::RequestHeader { region, ..message::RequestHeader::of_command(id) };
    let mut bytes = Vec::new();
    request.encode(&command(Op::Get, id), false, &mut bytes);
    bytes
}

contract! {
    fn a_client_that_takes_no_answers_costs_bounded_memory_and_then_its_connection(transport) {
        let policy = impatient();
        let setup = Setup { policy: policy.clone(), arena_bytes: 64 << 20, ..Setup::default() };
        let server = Server::start(transport, setup);
        let mut bystander = server.bystander();
        let (mut raw, grant) = Raw::open_client(&server, &Offer::new("full"));
        // It keeps within its credits, but takes nothing: it asks again when what it asked for has been
        // answered.
        let mut asked = 0;
        loop {
            bystander.works();
            let (answered, is_closed) =
                server.until("a look", |seen| Some((seen.requests, !seen.closed.is_empty())));
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
        let reason = server.closed(0);
        // What waits for its room over RDMA counts against the credits, which the client does not know about
        // as it takes nothing.
        let is_rdma = transport.is_rdma();
        let credits = CloseReason::Violation(Violation::Credits);
        let ends_for_rdma = is_rdma && (reason == credits || reason == NO_RECEIVES);
        assert!(reason == CloseReason::Evicted || ends_for_rdma, "{reason:?}");
        bystander.works();
        server.until("everything to be given back", |seen| (seen.arena_bytes == 0).then_some(()));
        let (slot_bytes, credits) = (128 << 10, 17);
        let bound = if is_rdma {
            // A send queue full of answers, one work request each, and the credits that wait for room in it.
            (2 * credits + 8) * slot_bytes + credits * slot_bytes
        } else {
            // What is being sent, and what was answered behind it before it was no longer read from. Each is
            // at most the server's own limit of 1 MiB, the requests that were received when less than that
            // waited, and those of the receive that was begun before these were answered.
            2 * (2 * credits * slot_bytes + (1 << 20))
        };
        server.each_seen(|seen| {
            let unsent = seen.unsent_bytes_max;
            assert!(unsent > 0 && unsent <= bound, "{unsent} bytes");
            assert!(seen.arena_bytes_max <= bound + (1 << 20), "{} bytes", seen.arena_bytes_max);
        });
    }

    fn a_client_that_only_pings_and_posts_no_receives_is_closed(transport) {
        if transport.is_stream() {
            return;
        }
        let server = serve(transport, impatient());
        let (mut raw, _) = Raw::open_client(&server, &Offer::new("curious"));
        let thread = std::thread::spawn(move || {
            let deadline = Instant::now() + PATIENCE;
            let mut ping = Vec::new();
            message::encode_ping(1, false, &mut ping);
            while Instant::now() < deadline && raw.send(&ping) {}
            raw
        });
        let reason = server.closed(0);
        assert!(
            reason == CloseReason::Evicted || (transport.is_rdma() && reason == NO_RECEIVES),
            "{reason:?}"
        );
        thread.join().unwrap();
        server.serves_others();
    }

    fn a_client_that_is_slow_to_take_its_answers_gets_them_all(transport) {
        // Where processors are busy or emulated, it may be a good deal slower than it means to be.
        let policy = Policy { data_bytes_max: 256 << 10, stall_timeout: 10 * STALL, ..impatient() };
        let server = serve(transport, policy);
        let (mut raw, grant) = Raw::open_client(&server, &Offer::new("slow"));
        for round in 0..3 {
            for n in 0..u64::from(grant.queue_depth) {
                raw.request_in(round * 100 + n, &command(Op::Get, n), 200_000);
            }
            for _ in 0..grant.queue_depth {
                std::thread::sleep(Duration::from_millis(5));
                let Got::Response(response, _, data) = raw.next() else { panic!("no response") };
                assert_eq!(response.data_len, 200_000);
                assert!(!transport.is_stream() || data == pattern(response.id % 100, 200_000));
            }
        }
        server.each_seen(|seen| assert!(seen.closed.is_empty()));
    }
}

#[test]
fn a_client_that_pings_and_reads_nothing_is_soon_not_read_from_and_holds_no_memory_that_others_want() {
    let mut pings = Vec::new();
    (0..100).for_each(|id| message::encode_ping(id, false, &mut pings));
    for transport in Transport::TCP {
        let server = serve(transport, impatient());
        let (mut raw, _) = Raw::open_narrow_client(&server, &Offer::new("deaf"));
        raw.stream().set_nonblocking(true).unwrap();
        let (mut taken, mut since) = (0, Instant::now());
        while since.elapsed() < 3 * STALL {
            match raw.stream().write(&pings[taken % pings.len()..]) {
                Ok(n) => (taken, since) = (taken + n, Instant::now()),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
            assert!(taken < 2 << 20, "the server reads on though its answers are not taken");
        }
        assert_eq!(evicted(&server), 0, "{transport:?}");
        server.serves_others();
    }
}

#[test]
fn a_client_that_sends_a_byte_at_a_time_is_served() {
    for transport in Transport::TCP {
        let server = serve(transport, Policy::default());
        let (mut raw, _) = Raw::open_client(&server, &Offer::new("bytewise"));
        let mut bytes = get(1, 5000);
        let write = message::RequestHeader {
            id: 2,
            body_len: 0,
            data_len: 500,
            region: RemoteRegion::None,
            has_crc: false,
            data_crc: 0,
        };
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
fn a_client_that_begins_a_message_and_stops_is_closed_if_it_holds_memory() {
    let mut bytes = Vec::new();
    let request = message::RequestHeader {
        id: 1,
        body_len: 0,
        data_len: 60_000,
        region: RemoteRegion::None,
        has_crc: false,
        data_crc: 0,
    };
    request.encode(&command(Op::Put, 0), false, &mut bytes);
    bytes.extend_from_slice(&pattern(0, 60_000));
    for transport in Transport::TCP {
        let server = serve(transport, impatient());
        let begin = |len| {
            let (mut raw, _) = Raw::open_client(&server, &Offer::new("sleepy"));
            raw.send(&bytes[..len]);
            raw
        };
        // In the header and in the body, and in the data; all at the same time.
        let _harmless = [1, 39, 47].map(begin);
        let mut harmful = [57, 30_000, 59_999].map(begin);
        for (n, raw) in harmful.iter_mut().enumerate() {
            assert_eq!(server.closed(n), CloseReason::Evicted);
            let (status, _) = raw.goaway().expect("it is told why");
            assert_eq!(status.errno, libc::ENOBUFS);
        }
        server.serves_others();
        server.until("everything to be given back", |seen| (seen.arena_bytes == 0).then_some(()));
        assert_eq!(evicted(&server), harmful.len(), "{transport:?}");
    }
}

#[test]
fn a_client_that_trickles_a_message_for_too_long_is_closed() {
    // The second makes 4 KiB of progress in a stall timeout, which is little for the memory that it holds.
    for trickle in [1, 300] {
        let server =
            serve(Transport::TcpUring, Policy { stall_timeout: Duration::from_millis(200), ..impatient() });
        let (mut raw, _) = Raw::open_client(&server, &Offer::new("trickle"));
        let mut bytes = Vec::new();
        let request = message::RequestHeader {
            id: 1,
            body_len: 0,
            data_len: 60_000,
            region: RemoteRegion::None,
            has_crc: false,
            data_crc: 0,
        };
        request.encode(&command(Op::Put, 0), false, &mut bytes);
        raw.send(&bytes);
        let deadline = Instant::now() + PATIENCE;
        let mut sent = 0;
        while raw.stream().write_all(&vec![0; trickle]).is_ok() {
            sent += trickle;
            assert!(Instant::now() < deadline && sent < 60_000, "it is never closed");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(server.closed(0), CloseReason::Evicted);
        server.serves_others();
    }
}

#[test]
fn a_client_that_takes_its_answers_in_driblets_is_read_from_no_faster() {
    for transport in Transport::TCP {
        let server = serve(transport, Policy { queue_depth: 2048, ..Policy::default() });
        // Small buffers for sending: a send takes a part, and ends soon.
        let (mut stream, accepted) = tcp_pair();
        for socket in [&stream, &accepted].map(socket2::SockRef::from) {
            socket.set_recv_buffer_size(64 << 10).unwrap();
            socket.set_send_buffer_size(4096).unwrap();
        }
        server.serve(accepted);
        stream.write_all(&Offer::new("driblets").hello()).unwrap();
        stream.set_nonblocking(true).unwrap();
        // 48 bytes each, and each is answered with 80.
        let mut asks = Vec::new();
        for id in 0..4096 {
            let request = message::RequestHeader::of_command(id);
            request.encode(&command(Op::Refuse, 0)[..8], false, &mut asks);
        }
        let (mut sent, mut taken) = (0, 0);
        // So many small steps take a busy machine long.
        let deadline = Instant::now() + 4 * PATIENCE;
        let mut buffer = [0; 2048];
        while Instant::now() < deadline && taken < (4 << 20) {
            while let Ok(n) = stream.write(&asks[sent % asks.len()..]) {
                sent += n;
            }
            match stream.read(&mut buffer) {
                Ok(n) => taken += n,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        // What was asked for and not taken is in the sockets, or in the server.
        let asked = sent / 48 * 80;
        assert!(taken >= 4 << 20 && asked < taken + (1 << 20), "{transport:?}: {asked} asked, {taken} taken");
    }
}

#[test]
fn a_message_that_is_begun_late_has_the_whole_stall_timeout() {
    for transport in Transport::TCP {
        let server = serve(transport, impatient());
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (mut raw, _) = Raw::open_client(&server, &Offer::new("late"));
            // That of the handshake comes; then an answer sets the stall check, which comes while the second
            // message is half sent.
            std::thread::sleep(STALL * 12 / 10);
            raw.send(&get(1, 100));
            assert!(matches!(raw.next(), Got::Response(..)));
            std::thread::sleep(STALL * 7 / 10);
            let bytes = get(2, 100);
            let began = Instant::now();
            raw.send(&bytes[..10]);
            std::thread::sleep(STALL * 6 / 10);
            raw.send(&bytes[10..]);
            let got = raw.next();
            // Where processors are busy it may have been too late: that says nothing of the server.
            if began.elapsed() < STALL {
                assert!(matches!(got, Got::Response(..)), "{transport:?}: {got:?}");
                break;
            }
            assert!(
                Instant::now() < deadline,
                "this machine is too busy to send half a message in {STALL:?}"
            );
        }
    }
}
