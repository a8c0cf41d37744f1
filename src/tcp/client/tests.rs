use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::LazyLock;
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::error::Status;
use crate::handshake::Policy;
use crate::memory::{Buffer, Buffers};
use crate::message::{self, FEATURE_CRC, Limits, Message, Parsed, ResponseHeader};

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
fn pair(policy: &Policy, features: u64) -> (TcpClient, Peer) {
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
    let client = TcpClient::connect(address, &offer, Instant::now() + Duration::from_secs(10)).unwrap();
    (client, server.join().unwrap())
}

impl Peer {
    /// The next request, with its data.
    fn request(&mut self) -> (message::RequestHeader, Vec<u8>) {
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
        let response = ResponseHeader {
            id,
            body_len: 0,
            data_len: data.len() as u32,
            status: Status::OK,
            credits: 1,
            result: data.len() as u64,
            has_crc: false,
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

/// Bytes that differ by where they are and by the seed.
fn pattern(len: usize, seed: usize) -> Vec<u8> {
    static TABLE: LazyLock<Vec<u8>> =
        LazyLock::new(|| (0..(1 << 20) + 256).map(|at| (at * 7 + at / 251) as u8).collect());
    TABLE[seed % 256..][..len].to_vec()
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
fn receive(client: &mut TcpClient, n: usize) -> Vec<Reply> {
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

fn response(id: u64) -> ResponseHeader {
    ResponseHeader {
        id,
        body_len: 0,
        data_len: 0,
        status: Status::OK,
        credits: 1,
        result: 0,
        has_crc: false,
        data_crc: 0,
    }
}

fn encoded(response: ResponseHeader) -> Vec<u8> {
    let mut out = Vec::new();
    response.encode(&[], false, &mut out);
    out
}

#[test]
fn a_batch_goes_out_in_one_call_and_its_answers_come_in_by_one() {
    let (mut client, mut peer) = pair(&policy(), 0);
    for tag in 0..8 {
        client.send(tag, &[tag as u8; 24], room(4096), SendOptions::PLAIN).unwrap();
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
        client.send(1, &[0; 24], room(1 << 20), SendOptions::PLAIN).unwrap();
        client.send(2, &[0; 24], out(data.clone()), SendOptions::PLAIN).unwrap();
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
    client.send(0, &[0; 24], Bulk::Out(pieces(true)), SendOptions::PLAIN).unwrap();
    client.send(1, &[0; 24], Bulk::In(pieces(false)), SendOptions::PLAIN).unwrap();
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
        ids.push(
            client.send(tag, &[0; 24], out(pattern(1 << 20, tag as usize)), SendOptions::PLAIN).unwrap(),
        );
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
fn a_server_hears_what_it_did_wrong() {
    let (mut client, mut peer) = pair(&policy(), 0);
    client.send(0, &[0; 24], room(4096), SendOptions::PLAIN).unwrap();
    client.flush();
    peer.request();
    peer.stream.write_all(&encoded(response(7))).unwrap();
    assert_eq!(receive(&mut client, 1)[0].status, Status::protocol(libc::EPROTO));
    assert!(matches!(client.failure(), Some(Error::Violation(Violation::RequestId))));
    loop {
        match message::parse(&peer.inbox, &peer.limits).unwrap() {
            Parsed::Need(_) => peer.fill(),
            Parsed::Item(message, _) => {
                assert!(matches!(message, Message::Goaway(..)), "{message:?}");
                break;
            }
        }
    }
}

#[test]
fn a_server_that_pings_and_takes_no_pongs_is_stalled() {
    let (mut client, mut peer) = pair(&policy(), 0);
    // Room for few pongs, each of which is a system call.
    socket2::SockRef::from(&client.stream).set_send_buffer_size(16 << 10).unwrap();
    socket2::SockRef::from(&peer.stream).set_recv_buffer_size(16 << 10).unwrap();
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
    assert_eq!(message::parse(&peer.inbox, &peer.limits), Ok(Parsed::Item(Message::Pong(77, 0), 40)));
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
    client.send(0, &[0; 24], room(10), SendOptions::PLAIN).unwrap();
    client.send(1, &[0; 24], out(vec![1; 10]), SendOptions::PLAIN).unwrap();
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
    assert!(client.send(2, &[0; 24], Bulk::None, SendOptions::CONTROL).is_err());
}

#[test]
fn a_stream_that_ends_anywhere_loses_each_request_once() {
    let mut whole = Vec::new();
    let data = pattern(20_000, 0);
    ResponseHeader { data_len: 20_000, result: 20_000, ..response(0) }.encode(&[], false, &mut whole);
    whole.extend_from_slice(&data);
    for cut in [0, 1, 39, 40, 41, 10_000, 20_039, 20_040] {
        let (mut client, mut peer) = pair(&policy(), 0);
        for tag in 0..3 {
            client.send(tag, &[0; 24], room(20_000), SendOptions::PLAIN).unwrap();
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
    client.send(0, &[0; 24], out(vec![0; 100]), SendOptions::PLAIN).unwrap();
    client.send(1, &[0; 24], room(100), SendOptions::PLAIN).unwrap();
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
        (Some(b"HTTP/1.1 400 Bad RequestHeader\r\n\r\n".to_vec()), libc::EPROTO),
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
        let error = TcpClient::connect(address, &Offer::new("test"), deadline).unwrap_err();
        assert_eq!(error.errno(), errno, "{error}");
        server.join().unwrap();
    }
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    let error = TcpClient::connect(nobody, &Offer::new("test"), deadline).unwrap_err();
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
            client.send(tag as u64, &[0; 24], room(size), SendOptions::PLAIN).unwrap();
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
                    encoded(ResponseHeader { data_len, credits, ..response(id) })
                }),
                any::<u64>().prop_map(|id| {
                    let mut out = vec![];
                    message::encode_ping(id, false, &mut out);
                    out
                }),
            ],
            1..20,
        ),
    ) {
        let (mut client, mut peer) = pair(&policy(), 0);
        for tag in 0..6 {
            client.send(tag, &[0; 24], room(8192), SendOptions::PLAIN).unwrap();
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
    let ends: [fn(TcpClient); 2] = [drop, |mut client| client.abort(Violation::Silent)];
    for end in ends {
        let (mut client, mut peer) = pair(&policy, 0);
        let data = Bulk::Out(Buffers::One(Buffer::Owned(vec![1; 16 << 20].into())));
        client.send(1, &[2; 24], data, SendOptions::PLAIN).unwrap();
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
        client.send(1, &[1; 24], Bulk::None, SendOptions::PLAIN).unwrap();
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
