use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;
use crate::handshake::{Offer, Policy};
use crate::memory::Buffer;
use crate::message::{FEATURE_CRC, FEATURE_PONG_TIME, FEATURE_REQUEST_CRC, Link};
use crate::trace::Clock;
use crate::tuning::CLOCK_SAMPLES;
use crate::tuning::LARGE_BYTES;

const SECOND: Duration = Duration::from_secs(1);

/// What a server grants: 8 requests, a keepalive of 5 seconds and so 15 seconds for a request.
fn grant(features: u64) -> Grant {
    let offer = Offer { features, ..Offer::new("test") };
    let policy = Policy { queue_depth: 8, keepalive: 5 * SECOND, ..Policy::default() };
    let Parsed::Item((peer, _), _) = policy.welcome(&offer.hello()).unwrap() else { panic!("it is whole") };
    peer.grant
}

/// A core over a stream, and the time at which it was made.
fn core(features: u64) -> (Core, Instant) {
    let start = Instant::now();
    (Core::new(grant(features), start), start)
}

fn room(len: usize) -> Bulk {
    Bulk::In(Buffers::One(Buffer::Owned(vec![0; len].into())))
}

fn out(data: Vec<u8>) -> Bulk {
    Bulk::Out(Buffers::One(Buffer::Owned(data.into())))
}

/// Bytes that differ by where they are and by the seed.
fn pattern(len: usize, seed: usize) -> Vec<u8> {
    static TABLE: LazyLock<Vec<u8>> =
        LazyLock::new(|| (0..1 << 16).map(|at| (at * 7 + at / 251) as u8).collect());
    TABLE[seed % 256..][..len].to_vec()
}

fn bytes_of(bulk: &Bulk) -> Vec<u8> {
    match bulk {
        Bulk::None => Vec::new(),
        Bulk::In(buffers) | Bulk::Out(buffers) => {
            buffers.slices(0..buffers.len()).collect::<Vec<_>>().concat()
        }
    }
}

/// Queues a request as a stream's transport does.
fn send<L: Default>(core: &mut Core<L>, tag: u64, bulk: Bulk) -> Option<RequestId> {
    send_with(core, tag, bulk, SendOptions::PLAIN)
}

fn send_with<L: Default>(
    core: &mut Core<L>,
    tag: u64,
    bulk: Bulk,
    options: SendOptions,
) -> Option<RequestId> {
    if !core.may_send(&[0; 24], bulk.len(), options) {
        return None;
    }
    let region = match bulk.len_in() {
        0 => RemoteRegion::None,
        len => RemoteRegion::In { address: 0, key: 0, len: len as u32 },
    };
    let exposed = Exposed { region, data_len: bulk.len_out(), lease: L::default() };
    Some(core.send(tag, &[tag as u8; 24], bulk, options, exposed).unwrap())
}

/// Everything that is to be sent, in pieces of at most `n` bytes.
fn sent<L>(core: &mut Core<L>, n: usize) -> Vec<u8> {
    let mut stream = Vec::new();
    while core.has_unsent() {
        stream.extend(sent_once(core, n));
    }
    stream
}

/// How many bytes are to be sent.
fn sent_len<L>(core: &Core<L>) -> usize {
    let mut len = 0;
    core.unsent(|slice| {
        len += slice.len();
        true
    });
    len
}

/// The next `n` bytes that are to be sent.
fn sent_once<L>(core: &mut Core<L>, n: usize) -> Vec<u8> {
    let mut piece = Vec::new();
    core.unsent(|slice| {
        piece.extend_from_slice(slice);
        piece.len() < n
    });
    piece.truncate(n);
    core.on_sent(piece.len());
    piece
}

fn response(id: RequestId, data: &[u8]) -> ResponseHeader {
    ResponseHeader {
        id: id.0,
        body_len: 0,
        data_len: data.len() as u32,
        status: Status::OK,
        credits: 1,
        result: data.len() as u64,
        has_crc: false,
        data_crc: 0,
    }
}

/// A response on the stream.
fn answer(id: RequestId, data: &[u8], crc: bool, stream: &mut Vec<u8>) {
    let data_crc = if crc { message::data_crc(data) } else { 0 };
    ResponseHeader { has_crc: false, data_crc, ..response(id, data) }.encode(&[], crc, stream);
    stream.extend_from_slice(data);
}

fn encoded(response: ResponseHeader) -> Vec<u8> {
    let mut out = Vec::new();
    response.encode(&[], false, &mut out);
    out
}

/// Takes in a stream's bytes as a transport does, all of which are complete.
fn receive<L>(core: &mut Core<L>, bytes: &[u8]) -> Vec<Reply> {
    let mut replies = Vec::new();
    let mut taken = 0;
    loop {
        let progress = core.on_bytes(&bytes[taken..], &mut replies);
        taken += progress.taken;
        if !progress.flush {
            break;
        }
        sent(core, usize::MAX);
    }
    assert!(taken == bytes.len() || core.has_failed(), "{taken} of {} bytes", bytes.len());
    replies
}

/// What is handed out after the end.
fn lost<L>(core: &mut Core<L>) -> Vec<Reply> {
    assert!(core.has_failed());
    let mut replies = Vec::new();
    core.hand_out_lost(&mut replies, |_, _, _| 0);
    assert_eq!(core.outstanding(), 0);
    replies
}

fn violation(core: &Core) -> Violation {
    match core.failure() {
        Some(Error::Violation(violation)) => *violation,
        other => panic!("{other:?} is no violation"),
    }
}

fn parse_one(bytes: &[u8]) -> Message<'_> {
    let limits = Limits { crc: false, request_crc: false, data_bytes_max: 1 << 20, pong_time: false };
    match message::parse(bytes, &limits).unwrap() {
        Parsed::Item(message, taken) => {
            assert_eq!(taken, bytes.len());
            message
        }
        Parsed::Need(n) => panic!("{n} bytes are needed"),
    }
}

// Requests and credits
// ----------------------------------------------------------------------------------------------------------

#[test]
fn there_are_as_many_requests_as_credits_and_one_more_for_control() {
    let (mut core, _) = core(0);
    let ids: Vec<_> = (0..8).map(|tag| send(&mut core, tag, Bulk::None).unwrap()).collect();
    assert_eq!((core.credits(), core.outstanding()), (0, 8));
    assert!(!core.may_send(&[], 0, SendOptions::PLAIN));
    assert!(core.may_send(&[], 0, SendOptions::CONTROL));
    sent(&mut core, usize::MAX);
    let mut bytes = Vec::new();
    answer(ids[3], &[], false, &mut bytes);
    assert_eq!(receive(&mut core, &bytes)[0].tag, 3);
    assert_eq!((core.credits(), core.outstanding()), (1, 7));
    assert!(send(&mut core, 9, Bulk::None).is_some());
}

#[test]
fn a_request_that_is_dequeued_leaves_no_trace_in_the_stream() {
    let (mut core, _) = core(0);
    let ids: Vec<_> = (0..4).map(|tag| send(&mut core, tag, out(vec![tag as u8; 8])).unwrap()).collect();
    assert_eq!(bytes_of(&core.dequeue(ids[2]).unwrap().0), [2; 8]);
    assert!(core.dequeue(ids[2]).is_none());
    assert!(core.dequeue(ids[0]).is_some());
    assert_eq!((core.outstanding(), core.credits()), (2, 6));
    // Once the first byte has been sent it is too late.
    core.on_sent(1);
    assert!(core.dequeue(ids[1]).is_none());
    let mut stream = vec![0];
    stream.extend(sent(&mut core, usize::MAX));
    assert_eq!(stream.len(), 2 * (message::HEADER_BYTES + 24 + 8));
    assert!(stream.ends_with(&[3; 32]));
    assert!(core.dequeue(ids[3]).is_none());
}

#[test]
fn a_request_that_cannot_be_sent_ends_as_one_that_was_answered() {
    let (mut core, start) = core(0);
    let error = Error::io("There is no memory", std::io::Error::from_raw_os_error(libc::ENOMEM));
    let id = core.send_failed(5, room(10), (), &error).unwrap();
    assert_eq!(core.on_wait(start, None), Wait::Return);
    assert_eq!(core.credits(), 8);
    let mut replies = Vec::new();
    core.take_done(&mut replies);
    assert_eq!((replies[0].tag, replies[0].status), (5, Status::transport(libc::ENOMEM)));
    assert_eq!(replies[0].bulk.len_in(), 10);
    assert!(core.dequeue(id).is_none());
    assert!(core.is_idle());
}

#[test]
fn most_of_what_is_awaited_may_be_large() {
    let (mut core, _) = core(0);
    let large = send(&mut core, 0, room(LARGE_BYTES)).unwrap();
    assert!(core.awaits_large());
    let small = send(&mut core, 1, room(LARGE_BYTES - 1)).unwrap();
    assert!(!core.awaits_large());
    core.dequeue(small).unwrap();
    assert!(core.awaits_large());
    core.dequeue(large).unwrap();
    assert!(!core.awaits_large());
}

// Sending and receiving
// ----------------------------------------------------------------------------------------------------------

#[test]
fn headers_without_data_between_them_are_one_piece() {
    let (mut core, _) = core(0);
    send(&mut core, 0, room(100));
    send(&mut core, 1, Bulk::None);
    send(&mut core, 2, out(vec![7; 100]));
    send(&mut core, 3, Bulk::None);
    let mut pieces = Vec::new();
    core.unsent(|slice| {
        pieces.push(slice.len());
        true
    });
    assert_eq!(pieces, [3 * 64, 100, 64]);
}

#[test]
fn messages_are_sent_whole_where_each_is_sent_at_once() {
    let (mut core, _) = core(0);
    send(&mut core, 0, Bulk::None);
    send(&mut core, 1, out(vec![7; 100]));
    let front = core.front().unwrap();
    assert_eq!((front.head.len(), front.data.is_none()), (64, true));
    core.on_sent(64);
    let front = core.front().unwrap();
    assert_eq!((front.head.len(), front.data.unwrap().len()), (64, 100));
    core.on_sent(164);
    assert!(core.front().is_none());
}

#[test]
fn an_answer_that_comes_before_the_data_was_sent_waits_for_the_buffer() {
    let (mut core, _) = core(0);
    let id = send(&mut core, 9, out(pattern(1000, 1))).unwrap();
    core.on_sent(64 + 500);
    let rejection = encoded(ResponseHeader { status: Status::storage(libc::EBADF), ..response(id, &[]) });
    assert!(receive(&mut core, &rejection).is_empty(), "the buffer is still being sent");
    assert_eq!(core.outstanding(), 1);
    assert!(!core.is_idle());
    assert_eq!(sent(&mut core, 7), pattern(1000, 1)[500..]);
    let mut replies = Vec::new();
    core.take_done(&mut replies);
    assert_eq!((replies[0].tag, replies[0].status), (9, Status::storage(libc::EBADF)));
    assert_eq!(core.outstanding(), 0);
    assert!(core.is_idle());
}

#[test]
fn an_answer_that_comes_before_the_command_was_sent_is_a_violation() {
    for sent in [0, 63] {
        let (mut core, _) = core(0);
        let id = send(&mut core, 0, out(vec![1; 100])).unwrap();
        core.on_sent(sent);
        receive(&mut core, &encoded(response(id, &[])));
        assert_eq!(violation(&core), Violation::RequestId);
        assert_eq!(lost(&mut core).len(), 1);
    }
}

#[test]
fn a_large_answer_may_be_read_into_place() {
    let (mut core, _) = core(FEATURE_CRC);
    let id = send(&mut core, 0, room(1000)).unwrap();
    sent(&mut core, usize::MAX);
    let data = pattern(1000, 2);
    let mut bytes = Vec::new();
    answer(id, &data, true, &mut bytes);
    assert!(receive(&mut core, &bytes[..100]).is_empty());
    assert_eq!(core.data_left(), 1040 - 100);
    let (buffers, range) = core.data_room().unwrap();
    assert_eq!(range, 60..1000);
    buffers.write_at(60, &data[60..]);
    core.on_data(940);
    assert_eq!((core.data_left(), core.counters.bounced_bytes), (0, 60));
    let replies = receive(&mut core, &[]);
    assert_eq!(bytes_of(&replies[0].bulk), data);
    assert!(core.data_room().is_none());
}

#[test]
fn the_server_may_not_give_what_was_not_asked_for() {
    let [first, second] = [RequestId(0), RequestId(1)];
    let mut request = Vec::new();
    message::RequestHeader::of_command(0).encode(&[0; 24], false, &mut request);
    let mut pong = Vec::new();
    message::encode_pong(1, 0, false, &mut pong);
    let address = QueuePairAddress {
        gid: [1; 16],
        qpn: 2,
        psn: 3,
        peer_psn: 4,
        mtu: 1024,
        lid: 0,
        reads: 0,
        link: Link::Ethernet,
    };
    let mut queue_pair = Vec::new();
    message::encode_queue_pair(Ok(&address), false, &mut queue_pair);
    let twice = [encoded(response(first, &[])), encoded(response(first, &[]))].concat();
    for (bytes, expected, answered) in [
        (encoded(ResponseHeader { data_len: 4097, ..response(first, &[]) }), Violation::Length, 0),
        (encoded(ResponseHeader { data_len: u32::MAX, ..response(first, &[]) }), Violation::Length, 0),
        (encoded(ResponseHeader { data_len: 1, ..response(second, &[]) }), Violation::Length, 0),
        (encoded(response(RequestId(7), &[])), Violation::RequestId, 0),
        (encoded(response(RequestId(1 << 32), &[])), Violation::RequestId, 0),
        (encoded(response(RequestId(u64::MAX), &[])), Violation::RequestId, 0),
        (twice, Violation::RequestId, 1),
        (encoded(ResponseHeader { credits: 3, ..response(first, &[]) }), Violation::Credits, 0),
        (request, Violation::Kind(1), 0),
        (pong, Violation::RequestId, 0),
        (queue_pair, Violation::Kind(6), 0),
        (vec![0xff; 40], Violation::Kind(0xff), 0),
    ] {
        let (mut core, _) = core(0);
        assert_eq!(send(&mut core, 0, room(4096)), Some(first));
        assert_eq!(send(&mut core, 1, Bulk::None), Some(second));
        sent(&mut core, usize::MAX);
        let mut replies = receive(&mut core, &bytes);
        assert_eq!(violation(&core), expected);
        // The server hears why.
        let ending = core.take_ending().unwrap();
        let goaway = ending.goaway.unwrap();
        let Message::Goaway(status, text) = parse_one(&goaway) else { panic!("no goaway") };
        assert_eq!(status, Status::protocol(libc::EPROTO));
        assert_eq!(message::text(text), expected.to_string());
        assert!(!ending.is_orderly);
        replies.extend(lost(&mut core));
        assert_eq!(replies.len(), 2);
        assert!(replies[..answered].iter().all(|reply| reply.status.is_ok()));
        assert!(replies[answered..].iter().all(|reply| reply.status == Status::protocol(libc::EPROTO)));
    }
}

#[test]
fn checksums_of_headers_are_checked() {
    for place in [10, 39] {
        let (mut core, _) = core(FEATURE_CRC);
        let id = send(&mut core, 0, room(4096)).unwrap();
        sent(&mut core, usize::MAX);
        let mut bytes = Vec::new();
        answer(id, &pattern(4096, 0), true, &mut bytes);
        bytes[place] ^= 0x10;
        receive(&mut core, &bytes);
        assert_eq!(violation(&core), Violation::Checksum, "byte {place}");
        assert_eq!(lost(&mut core)[0].status.class, Class::Protocol);
    }
}

#[test]
fn a_request_with_checksums_is_answered_with_checksums_and_others_are_not() {
    let data = pattern(1000, 3);
    // What the response has, and what it is to have.
    for (has_crc, wants_crc) in [(true, true), (false, false), (true, false), (false, true)] {
        let (mut core, _) = core(FEATURE_REQUEST_CRC);
        let options = SendOptions::with_crc(wants_crc.then_some(0));
        let id = send_with(&mut core, 0, room(1000), options).unwrap();
        let request = sent(&mut core, usize::MAX);
        let Ok(Parsed::Item(Message::Request(header, _), _)) =
            message::parse(&request, &core.grant().limits())
        else {
            panic!("no request")
        };
        assert_eq!(header.has_crc, wants_crc);
        let data_crc = if has_crc { message::data_crc(&data) } else { 0 };
        let mut bytes = Vec::new();
        ResponseHeader { has_crc, data_crc, ..response(id, &data) }.encode(&[], false, &mut bytes);
        bytes.extend_from_slice(&data);
        let replies = receive(&mut core, &bytes);
        if has_crc == wants_crc {
            assert_eq!((replies[0].data_len, replies[0].data_crc), (1000, data_crc));
        } else {
            assert_eq!(violation(&core), Violation::Checksum);
        }
    }
}

#[test]
fn placed_data_without_a_message_is_no_answer_to_a_request_with_checksums() {
    let mut core = placed(FEATURE_REQUEST_CRC);
    let id = send_with(&mut core, 0, room(100), SendOptions::with_crc(Some(0))).unwrap();
    sent(&mut core, usize::MAX);
    core.on_placed(ResponseHeader::of_data(id.0, 100), &mut Vec::new(), reclaim);
    assert!(matches!(core.failure(), Some(Error::Violation(Violation::Checksum))));
}

#[test]
fn the_checksum_of_data_is_the_one_that_the_program_has_computed() {
    for features in [FEATURE_CRC, FEATURE_REQUEST_CRC] {
        let (mut core, _) = core(features);
        let options = SendOptions::with_crc(Some(0x1234_5678));
        send_with(&mut core, 0, out(vec![7; 100]), options).unwrap();
        let bytes = sent(&mut core, usize::MAX);
        let Ok(Parsed::Item(Message::Request(header, _), _)) = message::parse(&bytes, &core.grant().limits())
        else {
            panic!("no request")
        };
        assert_eq!(header.data_crc, 0x1234_5678);
    }
}

#[test]
fn pings_are_answered_together() {
    let (mut core, _) = core(0);
    let pings = |n: usize| {
        let mut pings = Vec::new();
        (0..n as u64).for_each(|id| message::encode_ping(id, false, &mut pings));
        pings
    };
    let progress = core.on_bytes(&pings(2), &mut Vec::new());
    assert_eq!(progress, Progress { taken: 80, flush: true });
    let pongs = sent(&mut core, usize::MAX);
    assert_eq!(parse_one(&pongs[..40]), Message::Pong(0, 0));
    assert_eq!(parse_one(&pongs[40..]), Message::Pong(1, 0));
    // No more of them wait than may.
    let many = pings(2 * CLIENT_PONGS_MAX);
    for taken in [0, many.len() / 2] {
        let progress = core.on_bytes(&many[taken..], &mut Vec::new());
        assert_eq!(progress, Progress { taken: many.len() / 2, flush: true });
        assert_eq!(sent(&mut core, usize::MAX).len(), many.len() / 2);
    }
    let progress = core.on_messages(&many, &mut Vec::new(), |_, (), _| 0);
    assert_eq!(progress, Progress { taken: many.len() / 2, flush: true });
}

#[test]
fn a_server_that_pings_and_takes_no_pongs_is_stalled() {
    let (mut core, _) = core(0);
    let mut ping = Vec::new();
    message::encode_ping(1, false, &mut ping);
    for _ in 0..CLIENT_PONGS_MAX {
        assert!(core.on_bytes(&ping, &mut Vec::new()).flush);
    }
    assert!(!core.has_failed());
    core.on_bytes(&ping, &mut Vec::new());
    assert_eq!(violation(&core), Violation::Stalled);
}

#[test]
fn what_waits_to_be_sent_does_not_keep_the_reason_from_the_server() {
    let data = pattern(5000, 3);
    // How much of the first message has been sent: nothing, a part of its header, of its data.
    for part in [0, 1, 40, 4000] {
        let (mut core, _) = core(0);
        send(&mut core, 0, out(data.clone())).unwrap();
        send(&mut core, 1, Bulk::None).unwrap();
        let mut whole = sent_once(&mut core, part);
        let mut bytes = Vec::new();
        message::encode_ping(1, false, &mut bytes);
        bytes.push(0xff);
        bytes.resize(80, 0);
        receive(&mut core, &bytes);
        assert_eq!(violation(&core), Violation::Kind(0xff));
        assert!(!core.has_unsent());
        whole.extend(core.take_ending().unwrap().goaway.unwrap());
        let limits =
            message::Limits { crc: false, request_crc: false, data_bytes_max: 1 << 20, pong_time: false };
        let mut goaway = &whole[..];
        if part > 0 {
            let Ok(Parsed::Item(Message::Request(..), len)) = message::parse(&whole, &limits) else {
                panic!("the message that was begun is not finished")
            };
            assert_eq!(&whole[len..len + 5000], &data[..]);
            goaway = &whole[len + 5000..];
        }
        assert!(matches!(parse_one(goaway), Message::Goaway(..)), "{part}");
        assert_eq!(lost(&mut core).len(), 2);
    }
}

#[test]
fn an_answer_to_a_write_that_is_half_sent_may_be_a_violation() {
    let (mut core, _) = core(FEATURE_CRC);
    let id = send(&mut core, 0, out(vec![7; 5000])).unwrap();
    sent_once(&mut core, 1000);
    let mut bytes = Vec::new();
    ResponseHeader { has_crc: false, data_crc: 1, ..response(id, &[]) }.encode(&[], true, &mut bytes);
    receive(&mut core, &bytes);
    assert_eq!(violation(&core), Violation::Checksum);
    assert_eq!(lost(&mut core).len(), 1);
}

#[test]
fn the_server_says_where_its_queue_pair_is_only_if_asked_and_once() {
    let (mut core, _) = core(0);
    let address = QueuePairAddress {
        gid: [1; 16],
        qpn: 2,
        psn: 3,
        peer_psn: 4,
        mtu: 1024,
        lid: 0,
        reads: 1,
        link: Link::Ethernet,
    };
    core.request_upgrade(&address);
    assert_eq!(parse_one(&sent(&mut core, usize::MAX)), Message::QueuePair(Ok(address)));
    assert!(core.take_upgrade().is_none());
    let mut rejection = Vec::new();
    let status = Status::transport(libc::ENODEV);
    message::encode_queue_pair(Err((status, "None here.")), false, &mut rejection);
    receive(&mut core, &rejection);
    let answer = core.take_upgrade().unwrap();
    assert!(matches!(answer, Err(Error::Rejected { text, .. }) if text == "None here."));
    assert!(core.take_upgrade().is_none() && !core.has_failed());
    receive(&mut core, &rejection);
    assert_eq!(violation(&core), Violation::Kind(6));
}

// Data that is placed
// ----------------------------------------------------------------------------------------------------------

/// A core whose requests' data is brought back from a lease.
fn placed(features: u64) -> Core<Option<Vec<u8>>> {
    Core::new(grant(features), Instant::now())
}

fn reclaim(bulk: &mut Bulk, lease: &mut Option<Vec<u8>>, data_len: usize) -> usize {
    match (bulk, lease) {
        (Bulk::In(buffers), Some(data)) if data_len <= buffers.len() => {
            buffers.write_at(0, &data[..data_len]);
            data_len
        }
        _ => 0,
    }
}

fn send_placed(core: &mut Core<Option<Vec<u8>>>, tag: u64, data: &[u8]) -> RequestId {
    let region = RemoteRegion::In { address: 1, key: 2, len: data.len() as u32 };
    let exposed = Exposed { region, data_len: 0, lease: Some(data.to_vec()) };
    core.send(tag, &[0; 24], room(data.len()), SendOptions::PLAIN, exposed).unwrap()
}

#[test]
fn placed_data_is_brought_back_with_the_answer() {
    for crc in [false, true] {
        let mut core = placed(if crc { FEATURE_CRC } else { 0 });
        let data = pattern(100, 4);
        let ids = [send_placed(&mut core, 0, &data), send_placed(&mut core, 1, &data)];
        sent(&mut core, usize::MAX);
        let mut messages = Vec::new();
        for id in ids {
            let data_crc = if crc { message::data_crc(&data) } else { 0 };
            ResponseHeader { has_crc: false, data_crc, ..response(id, &data) }.encode(
                &[],
                crc,
                &mut messages,
            );
        }
        let mut replies = Vec::new();
        let progress = core.on_messages(&messages, &mut replies, reclaim);
        assert_eq!(progress, Progress { taken: messages.len(), flush: false });
        assert_eq!(replies.len(), 2);
        assert!(replies.iter().all(|reply| reply.data_len == 100 && bytes_of(&reply.bulk) == data));
        assert_eq!(core.counters.bounced_bytes, 200);
    }
}

#[test]
fn a_response_without_a_message_has_no_checksum() {
    for crc in [false, true] {
        let mut core = placed(if crc { FEATURE_CRC } else { 0 });
        let data = pattern(100, 4);
        let id = send_placed(&mut core, 0, &data);
        sent(&mut core, usize::MAX);
        let mut replies = Vec::new();
        core.on_placed(ResponseHeader::of_data(id.0, 100), &mut replies, reclaim);
        assert_eq!((replies.len(), core.has_failed()), if crc { (0, true) } else { (1, false) });
    }
}

#[test]
fn messages_that_are_not_whole_are_a_violation() {
    for bytes in [vec![], encoded(response(RequestId(0), &[]))[..39].to_vec()] {
        let mut core = placed(0);
        core.on_messages(&bytes, &mut Vec::new(), reclaim);
        assert!(matches!(core.failure(), Some(Error::Violation(Violation::Length))));
    }
}

#[test]
fn an_answer_to_a_message_that_has_not_been_sent_is_a_violation() {
    let mut core = placed(0);
    let id = send_placed(&mut core, 0, &[1; 10]);
    let mut replies = Vec::new();
    core.on_messages(&encoded(response(id, &[])), &mut replies, |_, _, _| panic!("it is not reclaimed"));
    assert!(matches!(core.failure(), Some(Error::Violation(Violation::RequestId))));
    let mut reclaimed = 0;
    core.hand_out_lost(&mut replies, |_, lease, _| {
        reclaimed += usize::from(lease.take().is_some());
        0
    });
    assert_eq!((replies.len(), reclaimed), (1, 1));
}

// Time
// ----------------------------------------------------------------------------------------------------------

#[test]
fn a_silent_server_is_pinged_now_and_then_and_given_up_in_the_end() {
    let (mut core, start) = core(0);
    // Nothing outstanding, nothing sent.
    assert_eq!(core.on_wait(start + 1000 * SECOND, None), Wait::Sleep(None));
    assert!(!core.on_silence(start + 1000 * SECOND, || start + 1000 * SECOND));
    send(&mut core, 0, Bulk::None);
    sent(&mut core, usize::MAX);
    let asked = start + 2000 * SECOND;
    core.on_owed(asked);
    // A server that works long but answers pings is waited for, and is asked no more than it must be.
    for n in 1..=20 {
        let due = asked + 5 * n * SECOND;
        assert_eq!(core.on_wait(due - SECOND, None), Wait::Sleep(Some(SECOND)));
        assert!(!core.on_silence(due - SECOND, || due - SECOND));
        assert!(core.on_silence(due, || due));
        let Message::Ping(id) = parse_one(&sent(&mut core, usize::MAX)) else { panic!("not a ping") };
        assert_eq!(id, u64::from(n));
        assert!(!core.on_silence(due, || due), "it has just been asked");
        let mut pong = Vec::new();
        message::encode_pong(id, 0, false, &mut pong);
        receive(&mut core, &pong);
        core.on_receive(due, || due);
    }
    let last = asked + 100 * SECOND;
    assert_eq!(core.last_rx(), last);
    assert_eq!(core.on_wait(last + 5 * SECOND, None), Wait::Flush);
    sent(&mut core, usize::MAX);
    for second in 5..15 {
        let left = (15 - second) * SECOND;
        assert_eq!(core.on_wait(last + second * SECOND, None), Wait::Sleep(Some(left)));
        assert!(!core.on_silence(last + second * SECOND, || last + second * SECOND));
    }
    // What there is to be received comes first.
    assert_eq!(core.on_wait(last + 15 * SECOND, None), Wait::Return);
    assert!(!core.has_failed());
    assert!(!core.on_silence(last + 15 * SECOND, || last + 15 * SECOND));
    assert_eq!(core.failure().unwrap().errno(), libc::ETIMEDOUT);
    assert!(core.failure().unwrap().to_string().contains("silent for 15.0 s"));
    let replies = lost(&mut core);
    assert_eq!((replies.len(), replies[0].status), (1, Status::transport(libc::ETIMEDOUT)));
}

/// The core of a client whose server tells its time, and that server's clock, a minute ahead of the first.
fn core_with_clocks() -> (Core, Instant, Clock, Clock) {
    let (core, start) = core(FEATURE_PONG_TIME);
    let ours = Clock::new();
    (core, start, ours, ours.ahead(Duration::from_secs(60)))
}

/// Pings at `sent`; the server reads its clock after `there`, and the pong is there after `back` more.
fn exchange_times(core: &mut Core, sent: Instant, there: Duration, back: Duration, theirs: &Clock) {
    core.ping(sent, SECOND);
    let Message::Ping(id) = parse_one(&self::sent(core, usize::MAX)) else { panic!("not a ping") };
    let mut pong = Vec::new();
    message::encode_pong(id, theirs.realtime_ns(sent + there), false, &mut pong);
    receive(core, &pong);
    // What was received was looked for from before.
    core.on_receive(sent, || sent + there + back);
}

#[test]
fn the_offset_of_the_servers_clock_is_that_of_the_soonest_of_the_latest_pongs() {
    let (mut core, start, ours, theirs) = core_with_clocks();
    assert_eq!(core.clock_sample(), None);
    let us = Duration::from_micros;
    exchange_times(&mut core, start, us(300), us(100), &theirs);
    exchange_times(&mut core, start + SECOND, us(10), us(20), &theirs);
    exchange_times(&mut core, start + 2 * SECOND, us(100), us(5000), &theirs);
    let best = core.clock_sample().unwrap();
    assert_eq!(best.round_trip, us(30));
    assert_eq!(best.offset_ns(&ours), 60_000_000_000 - 5_000);
    // Half a round trip is the most that it can be wrong by.
    for n in 0..CLOCK_SAMPLES as u32 {
        exchange_times(&mut core, start + (10 + n) * SECOND, us(0), us(100 + u64::from(n)), &theirs);
    }
    let best = core.clock_sample().unwrap();
    assert_eq!((best.round_trip, best.offset_ns(&ours)), (us(100), 60_000_000_000 - 50_000), "drift");
}

#[test]
fn a_pong_without_a_time_or_to_an_earlier_ping_tells_nothing_of_the_clock() {
    let (mut core, start, _, theirs) = core_with_clocks();
    core.ping(start, SECOND);
    core.ping(start, SECOND);
    sent(&mut core, usize::MAX);
    for (id, time_ns) in [(1, theirs.realtime_ns(start)), (2, 0), (message::UNASKED_PONG, 7)] {
        let mut pong = Vec::new();
        message::encode_pong(id, time_ns, false, &mut pong);
        receive(&mut core, &pong);
        core.on_receive(start, || panic!("there is nothing to be read the clock for"));
    }
    assert_eq!(core.clock_sample(), None);
}

#[test]
fn a_client_that_did_not_look_for_long_does_not_blame_the_server() {
    let (mut core, start) = core(0);
    let id = send(&mut core, 0, Bulk::None).unwrap();
    sent(&mut core, usize::MAX);
    core.on_owed(start);
    // Nothing was heard for longer than the request timeout, but the server was not asked either.
    let late = start + 100 * SECOND;
    assert!(core.on_silence(late, || late));
    sent(&mut core, usize::MAX);
    // The answer came in time; that it was not read in time is nobody's fault: it is looked for first.
    let later = late + 100 * SECOND;
    assert_eq!(core.on_wait(later, None), Wait::Return);
    let mut bytes = Vec::new();
    answer(id, &[], false, &mut bytes);
    assert_eq!(receive(&mut core, &bytes).len(), 1);
    core.on_receive(later, || later);
    assert!(!core.on_silence(later, || later) && !core.has_failed());
}

#[test]
fn a_request_counts_from_when_the_clock_is_first_looked_at() {
    let (mut core, start) = core(0);
    assert!(!core.begins_to_owe());
    send(&mut core, 0, Bulk::None);
    assert!(core.begins_to_owe());
    let asked = start + 50 * SECOND;
    assert_eq!(core.on_wait(asked, None), Wait::Sleep(Some(5 * SECOND)));
    assert!(!core.begins_to_owe());
    // Others behind it change nothing.
    send(&mut core, 1, Bulk::None);
    assert!(!core.begins_to_owe());
    assert_eq!(core.on_wait(asked + SECOND, None), Wait::Sleep(Some(4 * SECOND)));
}

#[test]
fn a_ping_that_nobody_answers_ends_the_connection() {
    let (mut core, start) = core(0);
    core.ping(start, SECOND);
    assert!(matches!(parse_one(&sent(&mut core, usize::MAX)), Message::Ping(1)));
    assert_eq!(core.on_wait(start, None), Wait::Sleep(Some(SECOND)));
    assert_eq!(core.on_wait(start + SECOND, None), Wait::Return);
    core.on_silence(start + SECOND, || start + SECOND);
    assert_eq!(core.failure().unwrap().errno(), libc::ETIMEDOUT);
    // No ping follows the end.
    core.ping(start + SECOND, SECOND);
    assert!(!core.has_unsent());
}

#[test]
fn a_short_request_timeout_is_kept() {
    let (mut core, start) = core(0);
    core.set_request_timeout(3 * SECOND);
    send(&mut core, 0, Bulk::None);
    core.on_owed(start);
    assert!(core.on_silence(start + SECOND, || start + SECOND));
    assert!(!core.on_silence(start + 2 * SECOND, || start + 2 * SECOND) && !core.has_failed());
    core.on_silence(start + 3 * SECOND, || start + 3 * SECOND);
    assert!(core.has_failed());
}

#[test]
fn a_caller_waits_no_longer_than_it_will() {
    let (mut core, start) = core(0);
    assert_eq!(core.on_wait(start, Some(start + SECOND)), Wait::Sleep(Some(SECOND)));
    assert_eq!(core.on_wait(start + SECOND, Some(start + SECOND)), Wait::Return);
    core.hand_out_later(vec![]);
    core.fail_lost(libc::EPIPE, "gone");
    assert_eq!(core.on_wait(start, None), Wait::Return);
}

// The end
// ----------------------------------------------------------------------------------------------------------

#[test]
fn a_goaway_ends_everything_with_its_text() {
    for (status, lost_as) in [
        (Status::policy(libc::ESHUTDOWN), Status::transport(libc::ECONNRESET)),
        (Status::protocol(libc::EPROTO), Status::protocol(libc::EPROTO)),
        (Status::transport(libc::ETIMEDOUT), Status::transport(libc::ETIMEDOUT)),
        (Status::OK, Status::transport(libc::ECONNRESET)),
    ] {
        let (mut core, _) = core(0);
        let id = send(&mut core, 0, room(10)).unwrap();
        send(&mut core, 1, out(vec![1; 10])).unwrap();
        sent(&mut core, usize::MAX);
        let mut bytes = Vec::new();
        answer(id, &[5; 10], false, &mut bytes);
        message::encode_goaway(status, "The server stops.", false, &mut bytes);
        // What comes behind it is not looked at.
        bytes.extend([0xff; 40]);
        let replies = receive(&mut core, &bytes);
        assert_eq!((replies.len(), replies[0].status), (1, Status::OK));
        let errno = if status.is_ok() { libc::ECONNRESET } else { status.errno };
        assert_eq!(core.failure().unwrap().errno(), errno);
        assert!(core.failure().unwrap().to_string().contains("The server stops."));
        let ending = Ending { goaway: None, is_orderly: false };
        assert_eq!(core.take_ending(), Some(ending));
        assert_eq!(core.take_ending(), None);
        assert!(!core.may_send(&[], 0, SendOptions::CONTROL));
        let replies = lost(&mut core);
        assert_eq!((replies.len(), replies[0].status), (1, lost_as));
    }
}

#[test]
fn only_an_end_with_nothing_outstanding_is_orderly() {
    let (mut core, _) = core(0);
    let mut goaway = Vec::new();
    message::encode_goaway(Status::OK, "", false, &mut goaway);
    receive(&mut core, &goaway);
    assert!(core.take_ending().unwrap().is_orderly);
    assert!(core.failure().unwrap().to_string().contains("without giving a reason"));
}

#[test]
fn the_first_reason_is_the_one_that_counts() {
    let (mut core, _) = core(0);
    send(&mut core, 0, Bulk::None);
    core.fail_violation(Violation::Silent);
    core.fail_lost(libc::EPIPE, "gone");
    assert_eq!(violation(&core), Violation::Silent);
    assert_eq!(lost(&mut core)[0].status, Status::transport(libc::ETIMEDOUT));
}

#[test]
fn requests_that_are_lost_have_few_errnos() {
    for (errno, expected) in
        [(libc::EIO, libc::ECONNRESET), (libc::EHOSTUNREACH, libc::ECONNRESET), (libc::EPIPE, libc::EPIPE)]
    {
        let (mut core, _) = core(0);
        send(&mut core, 0, Bulk::None);
        core.fail_lost(errno, "it broke");
        assert_eq!(core.failure().unwrap().errno(), errno);
        assert_eq!(lost(&mut core)[0].status, Status::transport(expected));
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Send { bytes: usize, is_out: bool },
    Sent(usize),
    Answer { nth: usize, cut: usize },
    Dequeue(usize),
    Ping,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0usize..3000, any::<bool>()).prop_map(|(bytes, is_out)| Op::Send { bytes, is_out }),
        (1usize..4000).prop_map(Op::Sent),
        (0usize..8, 1usize..3000).prop_map(|(nth, cut)| Op::Answer { nth, cut }),
        (0usize..8).prop_map(Op::Dequeue),
        Just(Op::Ping),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However it is cut up, what is sent is the same, and so is what comes back for each request, once.
    #[test]
    fn every_request_is_over_once(ops in prop::collection::vec(op(), 1..120), crc: bool, ends: bool) {
        let (mut core, now) = core(if crc { FEATURE_CRC } else { 0 });
        let limits = core.grant().limits();
        // Ids and tags of requests that were sent and are not yet over, what each awaits, and the streams.
        let mut live: Vec<(RequestId, u64, usize)> = Vec::new();
        let mut over = Vec::new();
        let mut expected = 0;
        let (mut up, mut down) = (Peer::default(), Vec::new());
        for (tag, op) in ops.into_iter().enumerate() {
            let tag = tag as u64;
            match op {
                Op::Send { bytes, is_out } => {
                    let bulk = if is_out { out(pattern(bytes, tag as usize)) } else { room(bytes) };
                    if let Some(id) = send(&mut core, tag, bulk) {
                        live.push((id, tag, if is_out { 0 } else { bytes }));
                        expected += 1;
                    }
                }
                Op::Sent(n) => {
                    let mut piece = Vec::new();
                    core.unsent(|slice| { piece.extend_from_slice(slice); piece.len() < n });
                    piece.truncate(n);
                    core.on_sent(piece.len());
                    up.take(&piece, &limits);
                }
                Op::Answer { nth, cut } => {
                    // One that the server has seen.
                    let mut open = live.iter().copied().filter(|(id, ..)| up.seen.contains(id));
                    if let Some((id, tag, bytes)) = open.nth(nth) {
                        live.retain(|other| other.0 != id);
                        answer(id, &pattern(bytes, tag as usize), crc, &mut down);
                    }
                    let mut replies = Vec::new();
                    let progress = core.on_bytes(&down[..down.len().min(cut)], &mut replies);
                    down.drain(..progress.taken);
                    over.extend(replies);
                }
                Op::Dequeue(nth) => {
                    if let Some(&(id, ..)) = live.get(nth) && core.dequeue(id).is_some() {
                        live.remove(nth);
                        expected -= 1;
                    }
                }
                Op::Ping => core.ping(now, SECOND),
            }
            core.take_done(&mut over);
            prop_assert!(!core.has_failed());
        }
        if ends {
            core.fail_lost(libc::ECONNRESET, "gone");
            core.hand_out_lost(&mut over, |_, _, _| 0);
        } else {
            up.take(&sent(&mut core, 1000), &limits);
            for (id, tag, bytes) in live.drain(..) {
                answer(id, &pattern(bytes, tag as usize), crc, &mut down);
            }
            over.extend(receive(&mut core, &down));
            core.take_done(&mut over);
            prop_assert!(over.iter().all(|reply| reply.status.is_ok()));
            prop_assert_eq!(core.credits(), 8);
            prop_assert_eq!(up.seen.len(), expected);
        }
        prop_assert_eq!(core.outstanding(), 0);
        for reply in &over {
            if reply.status.is_ok() && matches!(reply.bulk, Bulk::In(_)) {
                prop_assert!(bytes_of(&reply.bulk) == pattern(reply.data_len, reply.tag as usize));
            }
        }
        let mut tags: Vec<_> = over.iter().map(|reply| reply.tag).collect();
        tags.sort_unstable();
        tags.dedup();
        prop_assert_eq!((tags.len(), over.len()), (expected, expected));
    }
}

/// The server's end of a stream.
#[derive(Default)]
struct Peer {
    inbox: Vec<u8>,
    /// Requests whose command has wholly come.
    seen: Vec<RequestId>,
    /// Of the data of the last, which must be as its command says.
    left: Vec<u8>,
}

impl Peer {
    fn take(&mut self, bytes: &[u8], limits: &Limits) {
        self.inbox.extend_from_slice(bytes);
        loop {
            let n = self.left.len().min(self.inbox.len());
            assert!(self.inbox[..n] == self.left[..n]);
            self.inbox.drain(..n);
            self.left.drain(..n);
            if !self.left.is_empty() {
                return;
            }
            let Parsed::Item(message, taken) = message::parse(&self.inbox, limits).unwrap() else { return };
            if let Message::Request(request, body) = message {
                self.seen.push(RequestId(request.id));
                self.left = pattern(request.data_len as usize, usize::from(body[0]));
            }
            self.inbox.drain(..taken);
        }
    }
}

#[test]
fn what_a_broken_connection_takes_with_it_can_be_kept_to_be_sent_again() {
    let (mut core, _) = core(0);
    core.keep_lost();
    let ids = [room(8), out(vec![2; 8]), room(100_000), out(vec![4; 50])]
        .map(|bulk| send(&mut core, bulk.len_in() as u64 + bulk.len_out() as u64, bulk).unwrap());
    // The fourth is sent but for its last byte.
    let all = sent_len(&core);
    assert_eq!(sent_once(&mut core, all - 1).len(), all - 1);
    // The first is answered; of the third's response a part has come.
    let mut stream = Vec::new();
    answer(ids[0], &[1; 8], false, &mut stream);
    answer(ids[2], &[3; 100_000], false, &mut stream);
    let replies = receive(&mut core, &stream[..1000]);
    assert_eq!(replies.iter().map(|reply| reply.tag).collect::<Vec<_>>(), [8]);
    core.fail_lost(libc::ECONNRESET, "it was cut");
    let mut replies = Vec::new();
    core.hand_out_lost(&mut replies, |_, _, _| 0);
    assert!(replies.is_empty(), "{replies:?}");
    assert_eq!(core.outstanding(), 3);
    let lost = core.take_lost();
    assert_eq!(core.outstanding(), 0);
    let of = |id| lost.iter().find(|lost| lost.id == id).expect("it was not answered");
    for (id, len, was_sent) in [(ids[1], 8, true), (ids[2], 100_000, true), (ids[3], 50, false)] {
        assert_eq!((of(id).tag, of(id).was_sent, of(id).options), (len, was_sent, SendOptions::PLAIN));
        assert_eq!((*of(id).command).to_vec(), [len as u8; 24]);
        assert_eq!(of(id).bulk.len_in() as u64 + of(id).bulk.len_out() as u64, len);
    }
    assert!(core.take_lost().is_empty(), "each once");
}

#[test]
fn a_reply_that_came_before_the_end_is_no_loss() {
    let (mut core, _) = core(0);
    core.keep_lost();
    let id = send(&mut core, 7, out(vec![7; 500])).unwrap();
    // The server fails it before it has its data.
    sent_once(&mut core, 100);
    let failure = ResponseHeader { status: Status::storage(libc::ENOSPC), ..response(id, &[]) };
    assert!(receive(&mut core, &encoded(failure)).is_empty());
    core.fail_lost(libc::ECONNRESET, "it was cut");
    let mut replies = Vec::new();
    core.hand_out_lost(&mut replies, |_, _, _| 0);
    assert_eq!((replies[0].tag, replies[0].status.errno), (7, libc::ENOSPC));
    assert!(core.take_lost().is_empty());
}

#[test]
fn a_request_is_found_by_its_tag() {
    let (mut core, _) = core(0);
    let id = send(&mut core, 70, room(8)).unwrap();
    assert_eq!((core.find(70), core.find(71)), (Some(id), None));
}

#[test]
fn what_a_server_that_shuts_down_has_not_executed_is_sent_again() {
    for keeps in [true, false] {
        let (mut core, _) = core(0);
        if keeps {
            core.keep_lost();
        }
        let whole = send(&mut core, 1, out(vec![1; 500])).unwrap();
        sent(&mut core, 1000);
        let half = send(&mut core, 2, out(vec![2; 500])).unwrap();
        sent_once(&mut core, 100);
        let status = Status::transport(libc::ESHUTDOWN);
        let mut replies = Vec::new();
        for id in [whole, half] {
            replies.extend(receive(&mut core, &encoded(ResponseHeader { status, ..response(id, &[]) })));
        }
        sent(&mut core, 1000);
        core.take_done(&mut replies);
        core.fail_lost(libc::ESHUTDOWN, "it shuts down");
        core.hand_out_lost(&mut replies, |_, _, _| 0);
        let lost = core.take_lost();
        if keeps {
            assert!(replies.is_empty());
            assert_eq!(
                lost.iter().map(|lost| (lost.tag, lost.was_sent)).collect::<Vec<_>>(),
                [(1, false), (2, false)]
            );
            assert_eq!(bytes_of(&lost[1].bulk), [2; 500]);
        } else {
            assert_eq!(replies.iter().map(|reply| reply.status).collect::<Vec<_>>(), [status; 2]);
            assert!(lost.is_empty());
        }
    }
}

#[test]
fn a_server_that_has_answered_all_it_executed_leaves_nothing_in_doubt() {
    for (status, was_sent) in
        [(Status::transport(libc::ESHUTDOWN), false), (Status::storage(libc::EIO), true)]
    {
        let (mut core, _) = core(0);
        core.keep_lost();
        send(&mut core, 1, out(vec![1; 8])).unwrap();
        sent(&mut core, 1000);
        let mut goaway = Vec::new();
        message::encode_goaway(status, "It shuts down.", false, &mut goaway);
        assert!(receive(&mut core, &goaway).is_empty());
        assert!(lost_but(&mut core).iter().all(|lost| lost.was_sent == was_sent));
    }
}

/// What is kept after the end.
fn lost_but(core: &mut Core) -> Vec<Lost> {
    let mut replies = Vec::new();
    core.hand_out_lost(&mut replies, |_, (), _| 0);
    assert!(replies.is_empty());
    let lost = core.take_lost();
    assert_eq!(lost.len(), 1);
    lost
}
