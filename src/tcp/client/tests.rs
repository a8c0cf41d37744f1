use std::io::Write;
use std::net::TcpListener;
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::error::{Class, Status};
use crate::handshake::Policy;
use crate::memory::{Buffer, Buffers};
use crate::message::{self, FEATURE_CRC, Limits, Message, Response};

/// The server's end of a connection, written by hand so that it can misbehave.
struct Peer {
    stream: TcpStream,
    limits: Limits,
    inbox: Vec<u8>,
}

fn policy() -> Policy {
    Policy { queue_depth: 8, keepalive: Duration::from_secs(5), ..Policy::default() }
}

/// A client and its server's end, after the handshake.
fn pair(policy: &Policy, features: u64) -> (Client, Peer) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let offer = Offer { features, ..Offer::new("test") };
    let policy = policy.clone();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut inbox = vec![0; 4096];
        let mut end = 0;
        let (peer, welcome) = loop {
            end += stream.read(&mut inbox[end..]).unwrap();
            if let Parsed::Item(item, taken) = policy.welcome(&inbox[..end]).unwrap() {
                assert_eq!(taken, end);
                break item;
            }
        };
        stream.write_all(&welcome).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Peer { stream, limits: peer.grant.limits(), inbox: Vec::new() }
    });
    let client = Client::connect(address, &offer, Instant::now() + Duration::from_secs(10)).unwrap();
    (client, server.join().unwrap())
}

impl Peer {
    /// The next request, with its data.
    fn request(&mut self) -> (message::Request, Vec<u8>) {
        loop {
            if let Parsed::Item(message, taken) = message::parse(&self.inbox, &self.limits).unwrap()
                && let Message::Request(request, _) = message
                && self.inbox.len() >= taken + request.data_len as usize
            {
                let end = taken + request.data_len as usize;
                let data = self.inbox[taken..end].to_vec();
                self.inbox.drain(..end);
                return (request, data);
            }
            self.fill();
        }
    }

    fn fill(&mut self) {
        let mut bytes = [0; 65536];
        let n = self.stream.read(&mut bytes).unwrap();
        assert!(n > 0, "the client closed");
        self.inbox.extend_from_slice(&bytes[..n]);
    }

    fn answer(&self, id: u64, data: &[u8], out: &mut Vec<u8>) {
        let response = Response {
            id,
            body_len: 0,
            data_len: data.len() as u32,
            status: Status::OK,
            credits: 1,
            result: data.len() as u64,
            data_crc: if self.limits.crc { message::data_crc(data) } else { 0 },
        };
        response.encode(&[], self.limits.crc, out);
        out.extend_from_slice(data);
    }
}

fn room(len: usize) -> Bulk {
    Bulk::In(Buffers::One(Buffer::Owned(vec![0; len].into())))
}

fn out(data: Vec<u8>) -> Bulk {
    Bulk::Out(Buffers::One(Buffer::Owned(data.into())))
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251 + seed) as u8).collect()
}

fn bytes_of(bulk: &Bulk) -> Vec<u8> {
    match bulk {
        Bulk::None => Vec::new(),
        Bulk::In(buffers) | Bulk::Out(buffers) => {
            buffers.slices(0..buffers.len()).flatten().copied().collect()
        }
    }
}

/// Receives until `n` replies are there.
fn receive(client: &mut Client, n: usize) -> Vec<Reply> {
    let mut replies = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(10);
    while replies.len() < n {
        assert!(Instant::now() < deadline, "only {} of {n} replies came", replies.len());
        client.receive(&mut replies);
        if replies.len() < n {
            client.wait(Some(deadline)).unwrap();
        }
    }
    assert_eq!(replies.len(), n);
    replies
}

/// Sends `n` reads, has the server send `bytes`, and gives the failure with the replies.
fn provoke(n: usize, bytes: &[u8]) -> (Violation, Vec<Reply>) {
    let (mut client, mut peer) = pair(&policy(), 0);
    for tag in 0..n {
        client.send(tag as u64, &[0; 24], room(4096), false).unwrap();
    }
    client.flush();
    for _ in 0..n {
        peer.request();
    }
    peer.stream.write_all(bytes).unwrap();
    let mut replies = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(10);
    while client.failure().is_none() {
        client.receive(&mut replies);
        assert!(Instant::now() < deadline);
    }
    assert_eq!(client.outstanding(), 0);
    let violation = match client.failure() {
        Some(Error::Violation(violation)) => *violation,
        other => panic!("{other:?} is no violation"),
    };
    // The server hears why.
    peer.inbox.clear();
    loop {
        match message::parse(&peer.inbox, &peer.limits).unwrap() {
            Parsed::Need(_) => peer.fill(),
            Parsed::Item(message, _) => {
                assert!(matches!(message, Message::Goaway(..)), "{message:?}");
                break;
            }
        }
    }
    (violation, replies)
}

fn response(id: u64) -> Response {
    Response { id, body_len: 0, data_len: 0, status: Status::OK, credits: 1, result: 0, data_crc: 0 }
}

fn encoded(response: Response) -> Vec<u8> {
    let mut out = Vec::new();
    response.encode(&[], false, &mut out);
    out
}

#[test]
fn a_batch_goes_out_in_one_call_and_its_answers_come_in_by_one() {
    let (mut client, mut peer) = pair(&policy(), 0);
    for tag in 0..8 {
        client.send(tag, &[tag as u8; 24], room(4096), false).unwrap();
    }
    client.flush();
    assert_eq!(client.counters().sends, 1);
    let mut bytes = Vec::new();
    for n in 0..8 {
        let (request, _) = peer.request();
        assert_eq!(request.region_in_len(), 4096);
        peer.answer(request.id, &pattern(4096, n), &mut bytes);
    }
    peer.stream.write_all(&bytes).unwrap();
    thread::sleep(Duration::from_millis(50));
    let replies = receive(&mut client, 8);
    assert_eq!(client.counters().receives, 1);
    for (n, reply) in replies.iter().enumerate() {
        assert_eq!((reply.tag, reply.data_len, reply.status), (n as u64, 4096, Status::OK));
        assert_eq!(bytes_of(&reply.bulk), pattern(4096, n));
    }
    assert_eq!(client.credits(), 8);
}

#[test]
fn large_data_is_read_into_place_and_sent_from_place() {
    for features in [0, FEATURE_CRC] {
        let (mut client, mut peer) = pair(&policy(), features);
        let data = pattern(1 << 20, 3);
        client.send(1, &[0; 24], room(1 << 20), false).unwrap();
        client.send(2, &[0; 24], out(data.clone()), false).unwrap();
        let server = thread::spawn(move || {
            let (read, _) = peer.request();
            let (write, data) = peer.request();
            let mut bytes = Vec::new();
            peer.answer(read.id, &data, &mut bytes);
            peer.answer(write.id, &[], &mut bytes);
            peer.stream.write_all(&bytes).unwrap();
            (write, data, peer)
        });
        client.flush();
        let replies = receive(&mut client, 2);
        let (write, received, _peer) = server.join().unwrap();
        assert_eq!(write.data_len, 1 << 20);
        assert_eq!(write.data_crc, if features == 0 { 0 } else { message::data_crc(&data) });
        assert!(received == data && bytes_of(&replies[0].bulk) == data);
        let bounced = client.counters().bounced_bytes;
        assert!(bounced <= READ_AHEAD_BYTES as u64, "{bounced} bytes were copied");
    }
}

#[test]
fn data_in_many_pieces_keeps_its_order() {
    let (mut client, mut peer) = pair(&policy(), 0);
    let pieces = |fill: bool| {
        Buffers::Many(
            (0..300)
                .map(|n| Buffer::Owned(if fill { pattern(n + 1, n) } else { vec![0; n + 1] }.into()))
                .collect(),
        )
    };
    let data: Vec<u8> = (0..300).flat_map(|n| pattern(n + 1, n)).collect();
    client.send(0, &[0; 24], Bulk::Out(pieces(true)), false).unwrap();
    client.send(1, &[0; 24], Bulk::In(pieces(false)), false).unwrap();
    client.flush();
    let (write, received) = peer.request();
    assert_eq!(received, data);
    let (read, _) = peer.request();
    let mut bytes = Vec::new();
    peer.answer(read.id, &data, &mut bytes);
    peer.answer(write.id, &[], &mut bytes);
    peer.stream.write_all(&bytes).unwrap();
    let replies = receive(&mut client, 2);
    assert_eq!(bytes_of(&replies[0].bulk), data);
}

#[test]
fn a_server_that_takes_nothing_blocks_nobody_and_gets_everything_in_the_end() {
    let policy = Policy { queue_depth: 32, ..policy() };
    let (mut client, mut peer) = pair(&policy, 0);
    let mut ids = Vec::new();
    for tag in 0..32 {
        ids.push(client.send(tag, &[0; 24], out(pattern(1 << 20, tag as usize)), false).unwrap());
    }
    client.flush();
    assert!(client.poll_fd().1, "32 MiB fit into no socket");
    // The last has not been sent, the first has in part.
    assert!(client.dequeue(ids[0]).is_none());
    assert_eq!(bytes_of(&client.dequeue(ids[31]).unwrap()), pattern(1 << 20, 31));
    assert_eq!(client.outstanding(), 31);
    let server = thread::spawn(move || {
        let mut bytes = Vec::new();
        for n in 0..31 {
            let (request, data) = peer.request();
            assert!(data == pattern(1 << 20, n));
            peer.answer(request.id, &[], &mut bytes);
        }
        peer.stream.write_all(&bytes).unwrap();
        peer
    });
    let replies = receive(&mut client, 31);
    assert!(replies.iter().enumerate().all(|(n, reply)| reply.tag == n as u64 && reply.status.is_ok()));
    server.join().unwrap();
}

#[test]
fn a_request_that_is_recalled_leaves_no_trace_in_the_stream() {
    let (mut client, mut peer) = pair(&policy(), 0);
    let ids: Vec<_> = (0..4)
        .map(|tag| client.send(tag, &[tag as u8; 24], out(vec![tag as u8; 8]), false).unwrap())
        .collect();
    assert!(client.dequeue(ids[2]).is_some());
    assert!(client.dequeue(ids[2]).is_none());
    assert!(client.dequeue(ids[0]).is_some());
    client.flush();
    assert!(client.dequeue(ids[1]).is_none(), "it has been sent");
    for tag in [1, 3] {
        let (request, data) = peer.request();
        assert_eq!((request.id, data), (ids[tag].0, vec![tag as u8; 8]));
    }
    assert_eq!(client.outstanding(), 2);
    assert_eq!(client.credits(), 6);
}

#[test]
fn an_answer_that_comes_before_the_data_was_sent_waits_for_the_buffer() {
    let policy = Policy { data_bytes_max: 64 << 20, ..policy() };
    let (mut client, mut peer) = pair(&policy, 0);
    client.send(9, &[0; 24], out(pattern(64 << 20, 1)), false).unwrap();
    client.flush();
    peer.fill();
    let Parsed::Item(Message::Request(request, _), _) = message::parse(&peer.inbox, &peer.limits).unwrap()
    else {
        panic!("no request came")
    };
    let rejection = Response { status: Status::storage(libc::EBADF), ..response(request.id) };
    peer.stream.write_all(&encoded(rejection)).unwrap();
    let mut replies = Vec::new();
    let until = Instant::now() + Duration::from_millis(200);
    while Instant::now() < until {
        client.receive(&mut replies);
    }
    assert!(replies.is_empty(), "the buffer is still being sent");
    assert_eq!(client.outstanding(), 1);
    let server = thread::spawn(move || {
        peer.request();
        peer
    });
    let replies = receive(&mut client, 1);
    assert_eq!(replies[0].status, Status::storage(libc::EBADF));
    server.join().unwrap();
    assert!(client.failure().is_none());
    assert_eq!(client.outstanding(), 0);
}

#[test]
fn the_server_may_not_give_what_was_not_asked_for() {
    let mut long = Vec::new();
    Response { data_len: 4097, ..response(0) }.encode(&[], false, &mut long);
    let mut request = Vec::new();
    message::Request { id: 0, body_len: 0, data_len: 0, region: RemoteRegion::None, data_crc: 0 }.encode(
        &[0; 24],
        false,
        &mut request,
    );
    let mut pong = Vec::new();
    message::encode_pong(1, false, &mut pong);
    let mut twice = encoded(response(0));
    twice.extend(encoded(response(0)));
    for (bytes, violation, answered) in [
        (long, Violation::Length, 0),
        (encoded(Response { data_len: u32::MAX, ..response(0) }), Violation::Length, 0),
        (encoded(response(7)), Violation::RequestId, 0),
        (encoded(response(1 << 32)), Violation::RequestId, 0),
        (encoded(response(u64::MAX)), Violation::RequestId, 0),
        (twice, Violation::RequestId, 1),
        (encoded(Response { credits: 3, ..response(0) }), Violation::Credits, 0),
        (request, Violation::Kind(1), 0),
        (pong, Violation::RequestId, 0),
        (vec![0xff; 40], Violation::Kind(0xff), 0),
    ] {
        let (found, replies) = provoke(2, &bytes);
        assert_eq!(found, violation);
        assert_eq!(replies.len(), 2);
        assert!(replies[..answered].iter().all(|reply| reply.status.is_ok()));
        assert!(replies[answered..].iter().all(|reply| reply.status == Status::protocol(libc::EPROTO)));
    }
}

#[test]
fn data_for_a_request_without_room_is_a_violation() {
    let (mut client, mut peer) = pair(&policy(), 0);
    client.send(0, &[0; 24], Bulk::None, false).unwrap();
    client.flush();
    peer.request();
    peer.stream.write_all(&encoded(Response { data_len: 1, ..response(0) })).unwrap();
    assert_eq!(receive(&mut client, 1)[0].status, Status::protocol(libc::EPROTO));
}

#[test]
fn checksums_are_checked() {
    for place in [10, 39, 40, 4135] {
        let (mut client, mut peer) = pair(&policy(), FEATURE_CRC);
        client.send(0, &[0; 24], room(4096), false).unwrap();
        client.flush();
        let mut bytes = Vec::new();
        let (request, _) = peer.request();
        peer.answer(request.id, &pattern(4096, 0), &mut bytes);
        bytes[place] ^= 0x10;
        peer.stream.write_all(&bytes).unwrap();
        assert_eq!(receive(&mut client, 1)[0].status.class, Class::Protocol);
        assert!(matches!(client.failure(), Some(Error::Violation(Violation::Checksum))), "byte {place}");
    }
}

#[test]
fn a_server_that_pings_and_takes_no_pongs_is_stalled() {
    let (mut client, mut peer) = pair(&policy(), 0);
    let mut pings = Vec::new();
    for id in 0..20_000 {
        message::encode_ping(id, false, &mut pings);
    }
    let feeder = thread::spawn(move || while peer.stream.write_all(&pings).is_ok() {});
    let mut replies = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(20);
    while client.failure().is_none() {
        client.receive(&mut replies);
        assert!(Instant::now() < deadline);
        assert!(client.core.unsent_bytes() < 1 << 20);
    }
    assert!(matches!(client.failure(), Some(Error::Violation(Violation::Stalled))));
    drop(client);
    feeder.join().unwrap();
}

#[test]
fn pings_are_answered() {
    let (mut client, mut peer) = pair(&policy(), FEATURE_CRC);
    let mut ping = Vec::new();
    message::encode_ping(77, true, &mut ping);
    peer.stream.write_all(&ping).unwrap();
    client.wait(Some(Instant::now() + Duration::from_secs(10))).unwrap();
    assert!(client.receive(&mut Vec::new()));
    peer.fill();
    assert_eq!(message::parse(&peer.inbox, &peer.limits), Ok(Parsed::Item(Message::Pong(77), 40)));
}

#[test]
fn a_server_that_pings_without_end_does_not_keep_its_client() {
    let (mut client, peer) = pair(&policy(), 0);
    // Room for more than one read takes, so that there always is more.
    socket2::SockRef::from(&client.stream).set_recv_buffer_size(4 << 20).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    let mut pongs = peer.stream.try_clone().unwrap();
    let reader = thread::spawn(move || while !matches!(pongs.read(&mut [0; 65536]), Ok(0) | Err(_)) {});
    let writer = thread::spawn(move || {
        let mut pings = Vec::new();
        (0..4096).for_each(|id| message::encode_ping(id, false, &mut pings));
        while Instant::now() < end && (&peer.stream).write_all(&pings).is_ok() {}
        let _ = peer.stream.shutdown(Shutdown::Both);
    });
    // Once the flood is there.
    thread::sleep(Duration::from_millis(300));
    assert!(client.receive(&mut Vec::new()));
    assert!(Instant::now() < end, "it came back only when the server had enough");
    drop(client);
    writer.join().unwrap();
    reader.join().unwrap();
}

#[test]
fn a_goaway_ends_everything_with_its_sentence() {
    let (mut client, mut peer) = pair(&policy(), 0);
    client.send(0, &[0; 24], room(10), false).unwrap();
    client.send(1, &[0; 24], out(vec![1; 10]), false).unwrap();
    client.flush();
    let mut bytes = Vec::new();
    let (request, _) = peer.request();
    peer.answer(request.id, &[5; 10], &mut bytes);
    message::encode_goaway(Status::policy(libc::ESHUTDOWN), "The server stops.", false, &mut bytes);
    peer.stream.write_all(&bytes).unwrap();
    let replies = receive(&mut client, 2);
    assert_eq!(replies[0].status, Status::OK);
    assert_eq!(replies[1].status, Status::transport(libc::ECONNRESET));
    let failure = client.failure().unwrap();
    assert_eq!(failure.errno(), libc::ESHUTDOWN);
    assert!(failure.to_string().contains("The server stops."));
    assert!(client.send(2, &[0; 24], Bulk::None, true).is_err());
}

#[test]
fn a_stream_that_ends_anywhere_loses_each_request_once() {
    let mut whole = Vec::new();
    let data = pattern(20_000, 0);
    Response { data_len: 20_000, result: 20_000, ..response(0) }.encode(&[], false, &mut whole);
    whole.extend_from_slice(&data);
    for cut in [0, 1, 39, 40, 41, 10_000, 20_039, 20_040] {
        let (mut client, mut peer) = pair(&policy(), 0);
        for tag in 0..3 {
            client.send(tag, &[0; 24], room(20_000), false).unwrap();
        }
        client.flush();
        for _ in 0..3 {
            peer.request();
        }
        peer.stream.write_all(&whole[..cut]).unwrap();
        drop(peer);
        let mut replies = Vec::new();
        while client.failure().is_none() {
            client.wait(None).unwrap();
            client.receive(&mut replies);
        }
        client.receive(&mut replies);
        let mut tags: Vec<_> = replies.iter().map(|reply| reply.tag).collect();
        tags.sort_unstable();
        assert_eq!(tags, [0, 1, 2], "cut after {cut}");
        let lost = replies.iter().filter(|r| r.status == Status::transport(libc::ECONNRESET)).count();
        assert_eq!(lost, if cut == whole.len() { 2 } else { 3 }, "cut after {cut}");
    }
}

#[test]
fn a_silent_server_is_pinged_then_given_up() {
    let policy = Policy { keepalive: Duration::from_millis(100), ..policy() };
    let (mut client, mut peer) = pair(&policy, 0);
    // Nothing outstanding, nothing sent.
    client.wait(Some(Instant::now() + Duration::from_millis(400))).unwrap();
    assert!(!client.receive(&mut Vec::new()));
    assert_eq!(client.counters().sends, 0);
    client.send(0, &[0; 24], Bulk::None, false).unwrap();
    client.flush();
    peer.request();
    // A server that works long but answers pings is waited for.
    let start = Instant::now();
    let worker = thread::spawn(move || {
        while start.elapsed() < Duration::from_millis(700) {
            peer.fill();
            let Parsed::Item(Message::Ping(id), 40) = message::parse(&peer.inbox, &peer.limits).unwrap()
            else {
                panic!("not a ping")
            };
            peer.inbox.clear();
            let mut pong = Vec::new();
            message::encode_pong(id, false, &mut pong);
            peer.stream.write_all(&pong).unwrap();
        }
        peer
    });
    let mut replies = Vec::new();
    while client.failure().is_none() {
        client.wait(None).unwrap();
        client.receive(&mut replies);
    }
    let _peer = worker.join().unwrap();
    assert!(start.elapsed() >= Duration::from_millis(900), "{:?}", start.elapsed());
    assert_eq!(replies.len(), 1);
    assert_eq!(replies[0].status, Status::transport(libc::ETIMEDOUT));
    assert_eq!(client.failure().unwrap().errno(), libc::ETIMEDOUT);
}

#[test]
fn a_client_that_did_not_look_for_long_does_not_blame_the_server() {
    let policy = Policy { keepalive: Duration::from_millis(100), ..policy() };
    let (mut client, mut peer) = pair(&policy, 0);
    client.send(0, &[0; 24], Bulk::None, false).unwrap();
    client.send(1, &[0; 24], Bulk::None, false).unwrap();
    client.flush();
    let (request, _) = peer.request();
    thread::sleep(Duration::from_millis(500));
    let mut replies = Vec::new();
    // Nothing was heard for longer than the request timeout, but the server was not asked either.
    assert!(!client.receive(&mut replies));
    assert!(client.failure().is_none());
    let mut bytes = Vec::new();
    peer.answer(request.id, &[], &mut bytes);
    peer.stream.write_all(&bytes).unwrap();
    thread::sleep(Duration::from_millis(500));
    // The answer came in time; that it was not read in time is nobody's fault.
    client.wait(None).unwrap();
    client.receive(&mut replies);
    assert!(client.failure().is_none());
    assert_eq!(replies.len(), 1);
}

#[test]
fn a_ping_that_nobody_answers_ends_the_connection() {
    let (mut client, _peer) = pair(&policy(), 0);
    client.ping(Duration::from_millis(50));
    let start = Instant::now();
    while client.failure().is_none() {
        client.wait(Some(start + Duration::from_secs(5))).unwrap();
        client.receive(&mut Vec::new());
        assert!(start.elapsed() < Duration::from_secs(5));
    }
    assert_eq!(client.failure().unwrap().errno(), libc::ETIMEDOUT);
}

#[test]
fn abort_hands_out_everything_once() {
    let (mut client, _peer) = pair(&policy(), 0);
    client.send(0, &[0; 24], out(vec![0; 100]), false).unwrap();
    client.send(1, &[0; 24], room(100), false).unwrap();
    client.abort(Violation::Silent);
    let mut replies = Vec::new();
    client.receive(&mut replies);
    client.receive(&mut replies);
    assert_eq!(replies.len(), 2);
    assert!(replies.iter().all(|reply| reply.status == Status::transport(libc::ETIMEDOUT)));
}

#[test]
fn handshakes_that_fail_say_why() {
    let policy = policy();
    for (answer, errno) in [
        (Some(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()), libc::EPROTO),
        (Some(policy.rejection(libc::EUSERS, "All seats are taken.")), libc::EUSERS),
        (Some(vec![]), libc::ECONNRESET),
        (None, libc::ETIMEDOUT),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            match answer {
                Some(bytes) => stream.write_all(&bytes).unwrap(),
                // Until the client goes.
                None => drop(stream.read(&mut [0])),
            }
        });
        let patience =
            if errno == libc::ETIMEDOUT { Duration::from_millis(250) } else { Duration::from_secs(20) };
        let deadline = Instant::now() + patience;
        let error = Client::connect(address, &Offer::new("test"), deadline).unwrap_err();
        assert_eq!(error.errno(), errno, "{error}");
        server.join().unwrap();
    }
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    let error = Client::connect(nobody, &Offer::new("test"), deadline).unwrap_err();
    assert_eq!(error.errno(), libc::ECONNREFUSED);
    assert!(error.to_string().contains("check that raio_server listens there"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However the stream is cut up, the same replies come out.
    #[test]
    fn the_stream_may_be_cut_anywhere(
        sizes in prop::collection::vec(prop_oneof![0usize..64, 0usize..5000, 0usize..200_000], 1..8),
        cuts in prop::collection::vec(1usize..40_000, 1..30),
        crc: bool,
    ) {
        let (mut client, mut peer) = pair(&policy(), if crc { FEATURE_CRC } else { 0 });
        let mut bytes = Vec::new();
        for (tag, &size) in sizes.iter().enumerate() {
            client.send(tag as u64, &[0; 24], room(size), false).unwrap();
            client.flush();
            let (request, _) = peer.request();
            peer.answer(request.id, &pattern(size, tag), &mut bytes);
            message::encode_ping(tag as u64, crc, &mut bytes);
        }
        let mut replies = Vec::new();
        let mut rest = &bytes[..];
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
            peer.stream.write_all(now).unwrap();
            client.receive(&mut replies);
            rest = later;
        }
        let left = sizes.len() - replies.len();
        replies.extend(receive(&mut client, left));
        prop_assert!(client.failure().is_none());
        for (tag, reply) in replies.iter().enumerate() {
            prop_assert_eq!((reply.tag, reply.data_len), (tag as u64, sizes[tag]));
            prop_assert!(bytes_of(&reply.bulk) == pattern(sizes[tag], tag));
        }
        prop_assert_eq!(client.outstanding(), 0);
    }

    /// No bytes of a server make the client panic, hang, or lose or invent a request.
    #[test]
    fn a_hostile_stream_ends_the_connection_at_most(
        parts in prop::collection::vec(
            prop_oneof![
                prop::collection::vec(any::<u8>(), 0..200),
                (0u64..6, 0u32..9000, 0u16..3).prop_map(|(id, data_len, credits)| {
                    encoded(Response { data_len, credits, ..response(id) })
                }),
                any::<u64>().prop_map(|id| { let mut out = vec![]; message::encode_ping(id, false, &mut out); out }),
            ],
            1..20,
        ),
    ) {
        let (mut client, mut peer) = pair(&policy(), 0);
        for tag in 0..6 {
            client.send(tag, &[0; 24], room(8192), false).unwrap();
        }
        client.flush();
        for _ in 0..6 {
            peer.request();
        }
        peer.stream.write_all(&parts.concat()).unwrap();
        peer.stream.shutdown(Shutdown::Write).unwrap();
        let mut tags: Vec<_> = receive(&mut client, 6).iter().map(|reply| reply.tag).collect();
        tags.sort_unstable();
        prop_assert_eq!(tags, [0, 1, 2, 3, 4, 5]);
    }
}

/// What the server's end still receives after the client has ended: how many bytes, and the error at their
/// end.
fn rest_of(peer: &mut Peer) -> (usize, Option<i32>) {
    let mut bytes = [0; 65536];
    let mut total = 0;
    loop {
        match peer.stream.read(&mut bytes) {
            Ok(0) => return (total, None),
            Ok(n) => total += n,
            Err(error) => return (total, error.raw_os_error()),
        }
    }
}

#[test]
fn what_a_client_has_given_up_is_not_sent() {
    let policy = Policy { data_bytes_max: 16 << 20, ..policy() };
    let ends: [fn(Client); 2] = [drop, |mut client| client.abort(Violation::Silent)];
    for end in ends {
        let (mut client, mut peer) = pair(&policy, 0);
        let data = Bulk::Out(Buffers::One(Buffer::Owned(vec![1; 16 << 20].into())));
        client.send(1, &[2; 24], data, false).unwrap();
        client.flush();
        end(client);
        let (received, error) = rest_of(&mut peer);
        assert_eq!(error, Some(libc::ECONNRESET), "after {received} bytes");
        assert!(received < 16 << 20, "everything was sent");
    }
}

#[test]
fn only_a_client_with_nothing_unanswered_ends_in_good_order() {
    for answered in [true, false] {
        let (mut client, mut peer) = pair(&policy(), 0);
        client.send(1, &[1; 24], Bulk::None, false).unwrap();
        client.flush();
        let (request, _) = peer.request();
        if answered {
            let mut out = Vec::new();
            peer.answer(request.id, &[], &mut out);
            peer.stream.write_all(&out).unwrap();
            let mut replies = Vec::new();
            while replies.is_empty() {
                client.wait(None).unwrap();
                client.receive(&mut replies);
            }
        }
        drop(client);
        assert_eq!(rest_of(&mut peer), (0, if answered { None } else { Some(libc::ECONNRESET) }));
    }
}
