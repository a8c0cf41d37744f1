//! A server that breaks the protocol ends the client's connection: every request that is outstanding ends,
//! once, with an error, and its buffers come back.

use std::time::Instant;

use raio_transport::error::{Class, Error, Status, Violation};
use raio_transport::handshake::Policy;
use raio_transport::message::{self, FEATURE_CRC, FEATURE_REQUEST_CRC, RemoteRegion};
use raio_transport::transport::{Bulk, Reply, SendOptions};

use crate::harness::{Client, Op, PATIENCE, Transport, bytes_of, command, data, pattern, room};
use crate::raw::{Got, Raw, answer_to};

/// Sends a read, a write and a command, has the server say `bytes` (made from the three requests), and
/// returns how each ended.
fn provoke(
    transport: Transport,
    features: u64,
    bytes: impl FnOnce(&mut Raw, [message::RequestHeader; 3]) -> Vec<u8>,
) -> (Client, Vec<Reply>) {
    let (mut client, mut raw) = Raw::server(transport, &Policy::default(), features);
    client.send(0, &command(Op::Get, 0), room(4096));
    client.send(1, &command(Op::Put, 1), data(pattern(1, 100)));
    client.send(2, &command(Op::Echo, 0), Bulk::None);
    client.transport.flush();
    let requests = std::array::from_fn(|_| raw.next_request());
    let bytes = bytes(&mut raw, requests);
    raw.send(&bytes);
    let replies = client.until_failed();
    let mut tags: Vec<_> = replies.iter().map(|reply| reply.tag).collect();
    tags.sort_unstable();
    assert_eq!(tags, [0, 1, 2], "each ends once");
    for reply in &replies {
        match reply.tag {
            0 => assert!(matches!(&reply.bulk, Bulk::In(buffers) if buffers.len() == 4096)),
            1 => assert!(matches!(&reply.bulk, Bulk::Out(_)) && bytes_of(&reply.bulk) == pattern(1, 100)),
            _ => assert!(matches!(&reply.bulk, Bulk::None)),
        }
    }
    // Nothing more comes, and nothing more is taken.
    let mut more = Vec::new();
    client.transport.receive(&mut more);
    assert!(more.is_empty());
    assert!(client.transport.send(9, &[], room(10), SendOptions::PLAIN).is_err());
    client.transport.wait(None).unwrap();
    (client, replies)
}

/// The same, for bytes that are a violation.
fn violation(
    transport: Transport,
    features: u64,
    bytes: impl FnOnce(&mut Raw, [message::RequestHeader; 3]) -> Vec<u8>,
) -> Violation {
    let (client, replies) = provoke(transport, features, bytes);
    for reply in &replies {
        assert_eq!(reply.status.class, Class::Protocol, "{reply:?}");
    }
    match client.transport.failure() {
        Some(Error::Violation(violation)) => *violation,
        other => panic!("{other:?} is no violation"),
    }
}

/// Receives until data has arrived damaged so often, and so many requests are over.
fn receive(client: &mut Client, replies: &mut Vec<Reply>, checksum_errors: u64, over: usize) {
    let deadline = Instant::now() + PATIENCE;
    while client.transport.counters().checksum_errors < checksum_errors || replies.len() < over {
        assert!(Instant::now() < deadline, "{:?}", client.transport.failure());
        client.transport.receive(replies);
    }
}

fn response(id: u64, change: impl FnOnce(&mut message::ResponseHeader)) -> Vec<u8> {
    let mut response = answer_to(id);
    change(&mut response);
    let mut bytes = Vec::new();
    response.encode(&[], false, &mut bytes);
    bytes
}

contract! {
    fn each_violation_ends_every_request_once(transport) {
        type Make = fn([message::RequestHeader; 3]) -> Vec<u8>;
        let cases: [(&str, Violation, Make); 14] = [
            ("a request", Violation::Kind(1), |[get, ..]| {
                let mut bytes = Vec::new();
                let region = RemoteRegion::None;
                message::RequestHeader { region, ..get }.encode(&[], false, &mut bytes);
                bytes
            }),
            ("an unknown kind", Violation::Kind(77), |_| vec![77; 40]),
            ("an answer to nothing", Violation::RequestId, |_| response(u64::MAX, |_| ())),
            ("an answer to a later generation", Violation::RequestId, |[get, ..]| {
                response(get.id + (1 << 32), |_| ())
            }),
            ("more data than there is room for", Violation::Length, |[get, ..]| {
                response(get.id, |r| r.data_len = 4097)
            }),
            ("more data than was granted", Violation::Length, |[get, ..]| {
                response(get.id, |r| r.data_len = u32::MAX)
            }),
            ("data for a write", Violation::Length, |[_, put, _]| response(put.id, |r| r.data_len = 1)),
            ("data for a command", Violation::Length, |[_, _, echo]| response(echo.id, |r| r.data_len = 1)),
            ("credits that were not spent", Violation::Credits, |[get, ..]| {
                response(get.id, |r| r.credits = 4)
            }),
            ("endless credits", Violation::Credits, |[_, put, _]| response(put.id, |r| r.credits = u16::MAX)),
            ("an errno without a class", Violation::Field, |[get, ..]| {
                response(get.id, |r| r.status = Status { errno: 5, class: Class::None, retryable: false })
            }),
            ("success that may be retried", Violation::Field, |[get, ..]| {
                response(get.id, |r| r.status = Status { errno: 0, class: Class::None, retryable: true })
            }),
            ("a checksum that was not granted", Violation::Reserved, |[get, ..]| {
                response(get.id, |r| r.data_crc = 5)
            }),
            ("a pong that nobody asked for", Violation::RequestId, |_| {
                let mut bytes = Vec::new();
                message::encode_pong(9, 0, false, &mut bytes);
                bytes
            }),
        ];
        for (what, expected, make) in cases {
            assert_eq!(violation(transport, 0, |_, requests| make(requests)), expected, "{what}");
        }
    }

    fn what_is_to_be_answered_before_a_violation_does_not_keep_the_reason_back(transport) {
        let (mut client, mut raw) = Raw::server(transport, &Policy::default(), 0);
        client.send(0, &command(Op::Echo, 0), Bulk::None);
        client.transport.flush();
        raw.next_request();
        // In one receive.
        let mut bytes = Vec::new();
        message::encode_ping(1, false, &mut bytes);
        bytes.extend([77; 40]);
        raw.send(&bytes);
        client.until_failed();
        let (status, text) = raw.goaway().expect("the server is told why");
        assert_eq!((status, text), (Status::protocol(libc::EPROTO), Violation::Kind(77).to_string()));
    }

    fn an_answer_that_comes_twice_is_a_violation(transport) {
        let (mut client, mut raw) = Raw::server(transport, &Policy::default(), 0);
        client.send(0, &command(Op::Echo, 0), Bulk::None);
        client.send(1, &command(Op::Echo, 0), Bulk::None);
        client.transport.flush();
        let (first, _) = (raw.next_request(), raw.next_request());
        let bytes = response(first.id, |_| ());
        raw.send(&bytes);
        raw.send(&bytes);
        let replies = client.until_failed();
        let ended: Vec<_> = replies.iter().map(|reply| (reply.tag, reply.status.is_ok())).collect();
        assert_eq!(ended, [(0, true), (1, false)]);
        assert!(matches!(client.transport.failure(), Some(Error::Violation(Violation::RequestId))));
    }

    fn a_server_that_keeps_every_credit_is_given_up(transport) {
        let policy = Policy { queue_depth: 2, ..Policy::default() };
        let (mut client, mut raw) = Raw::server(transport, &policy, 0);
        for tag in 0..2 {
            client.send(tag, &command(Op::Echo, 0), Bulk::None);
        }
        client.transport.flush();
        for _ in 0..2 {
            let bytes = response(raw.next_request().id, |response| response.credits = 0);
            raw.send(&bytes);
        }
        let replies = client.until_failed();
        let ended: Vec<_> = replies.iter().map(|reply| (reply.tag, reply.status.is_ok())).collect();
        assert_eq!(ended, [(0, true), (1, false)]);
        assert!(matches!(client.transport.failure(), Some(Error::Violation(Violation::Credits))));
    }

    fn a_wrong_checksum_of_a_header_is_a_violation(transport) {
        let damaged_header = violation(transport, FEATURE_CRC, |_, [get, ..]| {
            let mut bytes = Vec::new();
            answer_to(get.id).encode(&[], true, &mut bytes);
            bytes[25] ^= 1;
            bytes
        });
        assert_eq!(damaged_header, Violation::Checksum);
    }

    fn data_with_a_wrong_checksum_is_asked_for_again_and_given_up_the_third_time(transport) {
        for (damaged, features) in (1..=3).flat_map(|n| [(n, FEATURE_CRC), (n, FEATURE_REQUEST_CRC)]) {
            let (mut client, mut raw) = Raw::server(transport, &Policy::default(), features);
            client.send_with_crc(7, &command(Op::Get, 0), room(4096));
            client.transport.flush();
            let good = pattern(0, 1000);
            let mut replies = Vec::new();
            for time in 1..=damaged {
                let request = raw.next_request();
                raw.respond_with(&request, &good, message::data_crc(&good) ^ 1);
                receive(&mut client, &mut replies, time, 0);
            }
            if damaged < 3 {
                assert!(replies.is_empty());
                let request = raw.next_request();
                raw.respond(&request, &good);
            }
            receive(&mut client, &mut replies, damaged, 1);
            let reply = &replies[0];
            assert!(matches!(&reply.bulk, Bulk::In(buffers) if buffers.len() == 4096));
            assert_eq!(reply.status, if damaged == 3 { Status::DAMAGED } else { Status::OK });
            if damaged < 3 {
                assert_eq!((reply.tag, reply.data_len, &bytes_of(&reply.bulk)[..1000]), (7, 1000, &good[..]));
            }
            assert!(client.transport.failure().is_none(), "the connection goes on");
        }
    }

    fn a_write_that_arrives_damaged_is_sent_again_and_given_up_the_third_time(transport) {
        for (damaged, features) in (1..=3).flat_map(|n| [(n, FEATURE_CRC), (n, FEATURE_REQUEST_CRC)]) {
            let (mut client, mut raw) = Raw::server(transport, &Policy::default(), features);
            client.send_with_crc(7, &command(Op::Put, 1), data(pattern(1, 100)));
            client.transport.flush();
            for time in 0..=damaged.min(2) {
                let request = raw.next_request();
                let status = if time < damaged { Status::DAMAGED } else { Status::OK };
                let mut bytes = Vec::new();
                let has_crc = request.has_crc;
                assert_eq!(has_crc, features != FEATURE_CRC, "also when it is sent again");
                let response = message::ResponseHeader { status, has_crc, ..answer_to(request.id) };
                response.encode(&[], !has_crc, &mut bytes);
                raw.send(&bytes);
                let mut replies = Vec::new();
                let is_last = time == damaged.min(2);
                receive(&mut client, &mut replies, damaged.min(time + 1), usize::from(is_last));
                assert_eq!(replies.len(), usize::from(is_last));
                if let Some(reply) = replies.pop() {
                    assert_eq!(reply.status, if damaged == 3 { Status::DAMAGED } else { Status::OK });
                    assert_eq!(bytes_of(&reply.bulk), pattern(1, 100));
                }
            }
            assert!(client.transport.failure().is_none(), "the connection goes on");
        }
    }

    fn a_goaway_ends_every_request_with_its_sentence(transport) {
        let (client, replies) = provoke(transport, 0, |_, _| {
            let mut bytes = Vec::new();
            let status = Status::transport(libc::ESHUTDOWN);
            message::encode_goaway(status, "We close at eight.", false, &mut bytes);
            bytes
        });
        assert!(replies.iter().all(|reply| reply.status.class == Class::Transport), "{replies:?}");
        let failure = client.transport.failure().unwrap();
        assert!(failure.to_string().contains("We close at eight."), "{failure}");
        assert_eq!(failure.errno(), libc::ESHUTDOWN);
    }

    fn a_server_that_pings_is_answered(transport) {
        let (mut client, mut raw) = Raw::server(transport, &Policy::default(), 0);
        client.send(0, &command(Op::Echo, 0), Bulk::None);
        client.transport.flush();
        let request = raw.next_request();
        let mut bytes = Vec::new();
        message::encode_ping(77, false, &mut bytes);
        raw.send(&bytes);
        let mut replies = Vec::new();
        let before = client.transport.last_rx();
        let deadline = Instant::now() + crate::harness::PATIENCE;
        while client.transport.last_rx() == before {
            client.transport.wait(Some(deadline)).unwrap();
            client.transport.receive(&mut replies);
        }
        assert_eq!(raw.next(), Got::Pong(77));
        raw.respond(&request, &[]);
        assert_eq!(client.next().status, Status::OK);
    }

    fn a_server_that_answers_in_any_order_is_fine(transport) {
        let (mut client, mut raw) = Raw::server(transport, &Policy::default(), 0);
        for tag in 0..20 {
            client.send(tag, &command(Op::Get, tag), room(3000));
        }
        client.transport.flush();
        let mut requests: Vec<_> = (0..20).map(|tag| (tag, raw.next_request())).collect();
        requests.reverse();
        requests.swap(3, 11);
        for (tag, request) in &requests {
            raw.respond(request, &pattern(*tag, 1500));
        }
        for (tag, _) in &requests {
            let reply = client.next();
            assert_eq!((reply.tag, reply.data_len), (*tag, 1500));
            assert!(bytes_of(&reply.bulk)[..1500] == pattern(*tag, 1500));
        }
    }

    fn an_abort_ends_every_request_once(transport) {
        let (mut client, mut raw) = Raw::server(transport, &Policy::default(), 0);
        for tag in 0..5 {
            client.send(tag, &command(Op::Get, tag), room(3000));
        }
        client.transport.flush();
        raw.next_request();
        client.transport.abort(Violation::Field);
        let mut tags: Vec<_> = client.until_failed().iter().map(|reply| reply.tag).collect();
        tags.sort_unstable();
        assert_eq!(tags, [0, 1, 2, 3, 4]);
        raw.goaway();
    }
}
