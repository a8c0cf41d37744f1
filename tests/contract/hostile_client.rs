//! A client that breaks the protocol ends its own connection, for the reason that is counted, and nothing
//! else.

use raio_transport::error::{Status, Violation};
use raio_transport::handshake::Offer;
use raio_transport::loopback;
use raio_transport::memory::{Buffer, Buffers};
use raio_transport::message::{self, FEATURE_CRC, FEATURE_REQUEST_CRC, HEADER_BYTES, RemoteRegion};
use raio_transport::transport::CloseReason;

use crate::harness::{Op, Transport, command, pattern, serve_plain};
use crate::raw::{Got, Raw, answer_to};

fn request(crc: bool) -> Vec<u8> {
    let request = message::RequestHeader::of_command(5);
    let mut bytes = Vec::new();
    request.encode(&command(Op::Hold, 0), crc, &mut bytes);
    bytes
}

fn encoded(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(&mut bytes);
    bytes
}

/// The request, with one byte changed.
fn changed(at: usize, value: u8) -> Vec<u8> {
    let mut bytes = request(false);
    bytes[at] = value;
    bytes
}

contract! {
    fn each_violation_closes_its_connection_and_no_other(transport) {
        let server = serve_plain(transport);
        let mut bystander = server.bystander();
        let response = encoded(|out| answer_to(5).encode(&[], false, out));
        for (n, (what, bytes, violation)) in [
            ("a response", response, Violation::Kind(2)),
            ("kind 0", changed(0, 0), Violation::Kind(0)),
            ("a one-way message", encoded(|out| {
                message::encode_one_way(b"now", true, false, out);
            }), Violation::Kind(7)),
            ("a receipt", encoded(|out| {
                message::encode_receipt(message::Receipt { released: 1, is_last: false }, false, out);
            }), Violation::Kind(8)),
            ("kind 9", changed(0, 9), Violation::Kind(9)),
            ("a queue pair that nobody offered to take", encoded(|out| {
                message::encode_queue_pair(Ok(&crate::upgrade::SOME_ADDRESS), false, out);
            }), Violation::Kind(6)),
            ("both directions at once", changed(1, 3), Violation::Reserved),
            ("an unknown flag", changed(1, 4), Violation::Reserved),
            ("a body that is no multiple of 8", changed(2, 15), Violation::Length),
            ("a body that is too long", changed(3, 0x11), Violation::Length),
            ("an address without a region", changed(16, 1), Violation::Reserved),
            ("a key without a region", changed(24, 1), Violation::Reserved),
            ("a length without a region", changed(28, 1), Violation::Reserved),
            ("a checksum of data that was not granted", changed(32, 1), Violation::Reserved),
            ("a checksum that was not granted", changed(36, 1), Violation::Reserved),
            ("a ping with data", encoded(|out| {
                message::encode_ping(1, false, out);
                out[4] = 1;
            }), Violation::Reserved),
            ("a pong with a flag", encoded(|out| {
                message::encode_pong(1, 0, false, out);
                out[1] = 1;
            }), Violation::Reserved),
            ("a goaway with an id", encoded(|out| {
                message::encode_goaway(Status::OK, "", false, out);
                out[8] = 1;
            }), Violation::Reserved),
            ("a goaway of no class", encoded(|out| {
                message::encode_goaway(Status::protocol(5), "", false, out);
                out[18] = 9;
            }), Violation::Field),
        ]
        .into_iter()
        .enumerate()
        {
            let (mut raw, _) = Raw::open_client(&server, &Offer::new(what));
            // Something is outstanding while it happens.
            raw.request(1, &command(Op::Hold, 0), &[]);
            raw.send(&bytes);
            assert_eq!(server.closed(n), CloseReason::Violation(violation), "{what}");
            let (status, text) = raw.goaway().unwrap_or_else(|| panic!("{what}: it is told why"));
            assert_eq!((status, text), (Status::protocol(libc::EPROTO), format!("{violation}.")), "{what}");
            bystander.works();
        }
        server.until_empty(1);
    }

    fn what_is_to_be_answered_before_a_violation_does_not_keep_the_reason_back(transport) {
        let server = serve_plain(transport);
        let (mut raw, _) = Raw::open_client(&server, &Offer::new("pings"));
        let ping = encoded(|out| message::encode_ping(1, false, out));
        // In one receive, where that is possible.
        let violation = [77; 40];
        if transport == Transport::Loopback {
            // Its messages come alone.
            raw.send(&ping);
            raw.send(&violation);
        } else {
            raw.send(&[&ping[..], &violation].concat());
        }
        assert_eq!(server.closed(0), CloseReason::Violation(Violation::Kind(77)));
        let (status, text) = raw.goaway().expect("it is told why");
        assert_eq!((status, text), (Status::protocol(libc::EPROTO), format!("{}.", Violation::Kind(77))));
        server.until_empty(0);
    }

    fn a_wrong_checksum_closes_the_connection(transport) {
        let server = serve_plain(transport);
        let offer = Offer { features: FEATURE_CRC, ..Offer::new("checked") };
        let good = request(true);
        for (n, at) in [0, 2, 8, 16, 20, 36, HEADER_BYTES, good.len() - 1].into_iter().enumerate() {
            let (mut raw, _) = Raw::open_client(&server, &offer);
            let mut bad = good.clone();
            // A kind and a length that make sense, so that it is the sum that is wrong.
            bad[at] ^= if at == 0 { 2 } else { 8 };
            raw.send(&bad);
            if at == 2 {
                // It is longer now.
                raw.send(&[0; 8]);
            }
            let expected = match (transport, at) {
                // Its length is that of a message here, so that is what is wrong.
                (Transport::Loopback | Transport::Rdma | Transport::RdmaAfterTcp, 2) => Violation::Length,
                _ => Violation::Checksum,
            };
            let reason = server.closed(n);
            if at == 2 {
                // The header says 24 bytes of body where there were 16: cut short, or not what was summed up.
                let possible = [expected, Violation::Checksum].map(CloseReason::Violation);
                assert!(possible.contains(&reason));
            } else {
                assert_eq!(reason, CloseReason::Violation(expected), "byte {at}");
            }
        }
        server.serves_others();
    }

    fn data_with_a_wrong_checksum_is_not_used_and_its_client_may_send_it_again(transport) {
        for features in [FEATURE_CRC, FEATURE_REQUEST_CRC] {
            let server = serve_plain(transport);
            let (mut raw, _) = Raw::open_client(&server, &Offer { features, ..Offer::new("checked") });
            let (all, has_crc) = (features == FEATURE_CRC, features != FEATURE_CRC);
            let data = pattern(0, 8000);
            for (id, flipped, expected) in [(1, 1, Status::DAMAGED), (2, 0, Status::OK)] {
                let request = message::RequestHeader {
                    id,
                    body_len: 0,
                    data_len: 8000,
                    region: RemoteRegion::None,
                    has_crc,
                    data_crc: message::data_crc(&data) ^ flipped,
                };
                raw.send(&encoded(|out| {
                    request.encode(&command(Op::Put, 0), all, out);
                    out.extend_from_slice(&data);
                }));
                let Got::Response(response, ..) = raw.next() else { panic!("no response") };
                assert_eq!((response.status, response.has_crc), (expected, has_crc));
            }
            drop(raw);
            server.serves_others();
            server.until_empty(0);
        }
    }

    fn checksums_of_single_requests_must_be_granted_and_right_and_cover_what_has_no_data(transport) {
        let server = serve_plain(transport);
        let good = encoded(|out| {
            let (id, body_len, data_len, data_crc) = (1, 0, 0, 0);
            let region = RemoteRegion::None;
            let request =
                message::RequestHeader { id, body_len, data_len, region, has_crc: true, data_crc };
            request.encode(&command(Op::Echo, 0), false, out);
        });
        for (n, (features, flipped, expected)) in [
            (0, None, Violation::Reserved),
            // All messages have them: no flag is to say so.
            (FEATURE_CRC | FEATURE_REQUEST_CRC, None, Violation::Reserved),
            (FEATURE_REQUEST_CRC, Some(HEADER_BYTES), Violation::Checksum),
            (FEATURE_REQUEST_CRC, Some(HEADER_BYTES - 1), Violation::Checksum),
            // The flag itself.
            (FEATURE_REQUEST_CRC, Some(1), Violation::Reserved),
        ]
        .into_iter()
        .enumerate()
        {
            let (mut raw, _) = Raw::open_client(&server, &Offer { features, ..Offer::new("checked") });
            let mut bytes = good.clone();
            if let Some(at) = flipped {
                bytes[at] ^= 0x80;
            }
            raw.send(&bytes);
            assert_eq!(server.closed(n), CloseReason::Violation(expected), "{features} {flipped:?}");
        }
        let features = FEATURE_REQUEST_CRC;
        let (mut raw, _) = Raw::open_client(&server, &Offer { features, ..Offer::new("checked") });
        raw.send(&good);
        let Got::Response(response, ..) = raw.next() else { panic!("no response") };
        assert_eq!((response.status, response.has_crc, response.data_crc), (Status::OK, true, 0));
        server.serves_others();
    }

    fn a_goaway_ends_the_connection_in_order(transport) {
        let server = serve_plain(transport);
        let (mut raw, _) = Raw::open_client(&server, &Offer::new("polite"));
        raw.send(&encoded(|out| message::encode_goaway(Status::OK, "Thank you.", false, out)));
        assert_eq!(server.closed(0), CloseReason::Finished);
        let (mut raw, _) = Raw::open_client(&server, &Offer::new("hasty"));
        raw.request(1, &command(Op::Hold, 0), &[]);
        raw.send(&encoded(|out| message::encode_goaway(Status::OK, "Must go.", false, out)));
        assert_eq!(server.closed(1), CloseReason::Lost(0));
        server.until_empty(0);
    }

    fn a_thousand_pings_are_each_answered(transport) {
        let server = serve_plain(transport);
        let (mut raw, _) = Raw::open_client(&server, &Offer::new("curious"));
        for round in 0..20 {
            for id in 0..50 {
                if !transport.is_stream() && id >= 20 {
                    // It has no more receives posted; a stream would just wait.
                    break;
                }
                raw.send(&encoded(|out| message::encode_ping(round * 50 + id, false, out)));
            }
            for id in 0..if !transport.is_stream() { 20 } else { 50 } {
                assert_eq!(raw.next(), crate::raw::Got::Pong(round * 50 + id));
            }
        }
        server.each_seen(|seen| assert!(seen.closed.is_empty()));
    }
}

#[test]
fn a_region_to_be_fetched_makes_no_sense_on_a_stream() {
    for transport in Transport::TCP {
        let server = serve_plain(transport);
        let (mut raw, _) = Raw::open_client(&server, &Offer::new("rdma"));
        let region = RemoteRegion::Out { address: 0, key: 1, len: 4096 };
        let request = message::RequestHeader { region, ..message::RequestHeader::of_command(1) };
        raw.send(&encoded(|out| request.encode(&command(Op::Put, 0), false, out)));
        assert_eq!(server.closed(0), CloseReason::Violation(Violation::Field));
        server.serves_others();
    }
}

#[test]
fn memory_that_was_not_laid_open_cannot_be_reached() {
    let server = serve_plain(Transport::Loopback);
    let open =
        |raw: &Raw, access, len| raw.end().expose(access, Buffers::One(Buffer::Owned(vec![7; len].into())));
    // What the request says, and what there is: access and length.
    let (write, read) = (loopback::Access::Write, loopback::Access::Read);
    for (n, (what, op, access, there, address, len)) in [
        ("no memory", Op::Put, None, 0, 0, 100),
        ("memory to be written only", Op::Put, Some(write), 100, 0, 100),
        ("too little memory to fetch from", Op::Put, Some(read), 100, 0, 101),
        ("an address beyond the memory", Op::Put, Some(read), 100, 101, 0x10),
        ("an address that wraps around", Op::Put, Some(read), 100, u64::MAX, 2),
        ("no memory to place data in", Op::Get, None, 0, 0, 100),
        ("memory to be read only", Op::Get, Some(read), 100, 0, 100),
        ("too little memory to place data in", Op::Get, Some(write), 100, 1, 100),
    ]
    .into_iter()
    .enumerate()
    {
        let (mut raw, _) = Raw::open_client(&server, &Offer::new(what));
        let key = access.map_or(99, |access| open(&raw, access, there));
        let region = if op == Op::Put {
            RemoteRegion::Out { address, key, len }
        } else {
            RemoteRegion::In { address, key, len }
        };
        let request = message::RequestHeader { region, ..message::RequestHeader::of_command(1) };
        raw.send(&encoded(|out| request.encode(&command(op, 0), false, out)));
        assert_eq!(server.closed(n), CloseReason::Violation(Violation::Field), "{what}");
        server.serves_others();
    }
    server.until("everything to be given back", |seen| (seen.arena_bytes == 0).then_some(()));
}

#[test]
fn inline_data_beyond_what_was_granted_is_a_violation_where_it_could_be_fetched() {
    let server = serve_plain(Transport::Loopback);
    let (mut raw, grant) = Raw::open_client(&server, &Offer::new("large"));
    raw.request(1, &command(Op::Put, 0), &vec![0; grant.inline_bytes_max as usize + 1]);
    assert_eq!(server.closed(0), CloseReason::Violation(Violation::Length));
    server.serves_others();
}
