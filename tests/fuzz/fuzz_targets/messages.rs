//! Everything that is decoded without a connection: framing, both handshakes, options, commands, private data
//! of rdma_cm.
//!
//! What is decoded is encoded again and must be the same bytes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use raio_fuzz::{Mode, mend_handshake, mend_messages};
use raio_transport::handshake::{Offer, Policy, PushWindows};
use raio_transport::message::{
    FEATURE_CRC, Hello, Limits, Message, Parsed, Welcome, encode_goaway, encode_one_way, encode_ping,
    encode_pong, encode_queue_pair, encode_receipt, parse, parse_handshake, parse_options, text,
};
use raio_transport::protocol::{Command, FileStatus};
use raio_transport::{Violation, message};

/// It is not the product's to offer, and the fuzzer is built without RDMA.
#[path = "../../../src/rdma/private_data.rs"]
mod private_data;

fuzz_target!(|input: &[u8]| {
    let Some((&mode, bytes)) = input.split_first() else { return };
    let mode = Mode(mode);
    private(bytes);
    let mut bytes = bytes.to_vec();
    if mode.has(Mode::HANDSHAKE) {
        if !mode.has(Mode::RAW) {
            mend_handshake(&mut bytes);
        }
        handshake(&bytes);
    } else {
        let crc = mode.has(Mode::CRC);
        if crc && !mode.has(Mode::RAW) {
            mend_messages(&mut bytes);
        }
        messages(&bytes, &Limits { crc, request_crc: false, data_bytes_max: 1 << 20, pong_time: true });
        command(&bytes);
    }
});

fn private(bytes: &[u8]) {
    let rejection = match private_data::check_request(bytes) {
        Ok(()) => private_data::rejection(0, ""),
        Err((errno, text)) => private_data::rejection(errno, &text),
    };
    let rejections = [&*rejection, bytes];
    for (errno, text) in rejections.into_iter().filter_map(private_data::parse_rejection) {
        // As it would be passed on: all of it, for it has been cut before.
        let again = private_data::rejection(errno, &text);
        assert!(again.len() <= 148);
        let (same, prefix) = private_data::parse_rejection(&again).expect("a rejection");
        assert!(same == errno && text.starts_with(&prefix), "{text:?} becomes {prefix:?}");
    }
    assert_eq!(private_data::check_request(&private_data::request()), Ok(()));
}

fn handshake(bytes: &[u8]) {
    let push = PushWindows { to_server: 3, to_client: 2, requests: 1 };
    let policy = Policy { server: [7; 16], queue_pair: true, push, ..Policy::default() };
    if let Ok(Parsed::Item((peer, welcome), taken)) = policy.welcome(bytes) {
        assert!(taken <= bytes.len() && peer.grant.queue_depth <= policy.queue_depth);
        assert!(peer.name.len() <= 256);
        let offer = Offer {
            features: peer.grant.features,
            queue_depth: peer.grant.queue_depth,
            queue_pair: peer.grant.queue_pair,
            channel: peer.channel,
            supersedes: peer.supersedes,
            push: peer.grant.push,
            ..Offer::new("the same")
        };
        match offer.grant(&welcome) {
            Ok(Parsed::Item(grant, _)) => assert_eq!(grant, peer.grant),
            other => panic!("a welcome is not understood: {other:?}"),
        }
    }
    for (features, requires_crc) in [(0, false), (FEATURE_CRC, false), (FEATURE_CRC, true)] {
        let offer = Offer { features, requires_crc, ..Offer::new("any") };
        if let Ok(Parsed::Item(grant, taken)) = offer.grant(bytes) {
            assert!(taken <= bytes.len() && grant.queue_depth > 0 && grant.features & !features == 0);
            assert!(grant.crc() || !requires_crc);
        }
    }
    let _ = parse_handshake::<Hello>(bytes);
    if let Ok(Parsed::Item((_, options), _)) = parse_handshake::<Welcome>(bytes) {
        parse_options(options).for_each(drop);
    }
    parse_options(bytes).for_each(drop);
}

fn messages(mut bytes: &[u8], limits: &Limits) {
    while let Ok(parsed) = parse(bytes, limits) {
        let (message, taken) = match parsed {
            Parsed::Need(n) => {
                assert!(n > bytes.len());
                return;
            }
            Parsed::Item(message, taken) => (message, taken),
        };
        let mut again = Vec::new();
        match message {
            Message::Request(request, body) => {
                request.encode(body, limits.crc, &mut again);
                command(body);
            }
            Message::Response(response, body) => {
                response.encode(body, limits.crc, &mut again);
                let _ = FileStatus::decode(body);
            }
            Message::Ping(id) => encode_ping(id, limits.crc, &mut again),
            Message::Pong(id, time_ns) => encode_pong(id, time_ns, limits.crc, &mut again),
            Message::Goaway(status, body) => {
                encode_goaway(status, &text(body), limits.crc, &mut again);
                // Its text may have been no UTF-8, or padded differently.
                again.clear();
                again.extend_from_slice(&bytes[..taken]);
            }
            Message::QueuePair(Ok(address)) => encode_queue_pair(Ok(&address), limits.crc, &mut again),
            Message::QueuePair(Err((status, body))) => {
                encode_queue_pair(Err((status, &text(body))), limits.crc, &mut again);
                again.clear();
                again.extend_from_slice(&bytes[..taken]);
            }
            Message::OneWay(message, wants_receipt) => {
                encode_one_way(message, wants_receipt, limits.crc, &mut again);
            }
            Message::Receipt(receipt) => encode_receipt(receipt, limits.crc, &mut again),
        }
        assert_eq!(again, &bytes[..taken], "{message:?}");
        bytes = &bytes[taken..];
    }
}

fn command(body: &[u8]) {
    if let Ok(command) = Command::decode(body) {
        let mut again = Vec::new();
        command.encode(&mut again);
        assert_eq!(again, body, "{command:?}");
    }
}
