//! What a well-behaved client gets.

use std::time::Duration;

use raio_transport::error::Status;
use raio_transport::handshake::{ChannelOffer, Offer, Policy};
use raio_transport::memory::{Buffer, Buffers};
use raio_transport::message::{
    self, BODY_BYTES_MAX, FEATURE_CRC, FEATURE_CRC_STREAM, FEATURE_REQUEST_CRC, text,
};
use raio_transport::transport::{Bulk, CloseReason, SendOptions};

use crate::harness::{
    Op, Server, Setup, Transport, bytes_of, command, data, pattern, room, serve, serve_plain,
};
use crate::random::Random;

contract! {
    fn one_request_at_a_time_is_answered_in_order(transport) {
        let server = serve_plain(transport);
        let mut client = server.client();
        for n in 0..200u64 {
            client.send(n, &command(Op::Echo, n), Bulk::None);
            let reply = client.next();
            assert_eq!((reply.tag, reply.status, &*reply.body), (n, Status::OK, &command(Op::Echo, n)[..]));
        }
        drop(client);
        assert_eq!(server.closed(0), CloseReason::Finished);
        server.until_empty(0);
    }

    fn each_of_many_in_flight_is_answered_once(transport) {
        let mut random = Random::new();
        for features in [0, FEATURE_CRC, FEATURE_REQUEST_CRC] {
            // No sign of life may push along what would otherwise never leave.
            let policy = Policy { keepalive: Duration::from_secs(3600), ..Policy::default() };
            let server = serve(transport, policy);
            let mut client = server.connect(&Offer { features, ..Offer::new("busy") }).unwrap();
            let depth = client.transport.grant().queue_depth as usize;
            let grant = *client.transport.grant();
            assert_eq!((grant.crc(), grant.request_crc()), (features == FEATURE_CRC, features != 0));
            let mut expected = std::collections::HashMap::new();
            let mut tag = 0;
            let requests = 800;
            while tag < requests || !expected.is_empty() {
                while tag < requests && expected.len() < depth {
                    let len = [random.index(9_000), random.index(70_000)][random.index(2)];
                    let (op, bulk) = match random.index(3) {
                        0 => (Op::Get, room(len)),
                        1 => (Op::Put, data(pattern(tag, len))),
                        _ => (Op::Echo, Bulk::None),
                    };
                    if features != 0 && !tag.is_multiple_of(3) {
                        client.send_with_crc(tag, &command(op, tag), bulk);
                    } else {
                        client.send(tag, &command(op, tag), bulk);
                    }
                    expected.insert(tag, (op, len));
                    tag += 1;
                }
                let reply = client.next();
                let (op, len) = expected.remove(&reply.tag).expect("it was sent and not yet answered");
                assert_eq!(reply.status, Status::OK);
                let has_crc = grant.crc() || (features != 0 && !reply.tag.is_multiple_of(3));
                match op {
                    Op::Get => {
                        let data = pattern(reply.tag, len);
                        assert!(bytes_of(&reply.bulk) == data);
                        assert_eq!(reply.data_crc, if has_crc { message::data_crc(&data) } else { 0 });
                    }
                    Op::Put => assert_eq!(reply.result, len as u64),
                    _ => assert_eq!(&*reply.body, &command(op, reply.tag)),
                }
            }
            assert_eq!(client.transport.outstanding(), 0);
            assert_eq!(client.transport.credits(), depth);
            drop(client);
            server.until_empty(0);
        }
    }

    fn checksums_of_a_stream_end_where_it_becomes_a_queue_pair(transport) {
        for (features, expected) in [
            (FEATURE_CRC, true),
            (FEATURE_CRC | FEATURE_CRC_STREAM, transport != Transport::RdmaAfterTcp),
        ] {
            let server = serve_plain(transport);
            let mut client = server.connect(&Offer { features, ..Offer::new("stream") }).unwrap();
            assert_eq!(client.transport.grant().crc(), expected);
            client.get(1, 70_000);
            client.put(2, 70_000);
            client.get(3, 100);
            client.put(4, 100);
            drop(client);
            server.until_empty(0);
        }
    }

    fn a_later_request_may_be_answered_first(transport) {
        let server = serve_plain(transport);
        let mut client = server.client();
        for tag in 0..5 {
            client.send(tag, &command(Op::Hold, 0), Bulk::None);
        }
        client.send(5, &command(Op::Echo, 0), Bulk::None);
        assert_eq!(client.next().tag, 5);
        client.send(6, &command(Op::Release, 0), Bulk::None);
        let tags: Vec<_> = (0..6).map(|_| client.next().tag).collect();
        assert_eq!(tags, [4, 3, 2, 1, 0, 6]);
    }

    fn bodies_of_any_length_pass(transport) {
        let server = serve_plain(transport);
        let mut client = server.client();
        for len in [0, 8, 16, 24, 32, 40, 48, 1000, BODY_BYTES_MAX - 8, BODY_BYTES_MAX] {
            let mut body = pattern(1, len);
            if len >= 8 {
                body[..8].copy_from_slice(&command(Op::Echo, 0)[..8]);
            }
            let reply = client.call(&body, Bulk::None);
            assert_eq!((&*reply.body, reply.result), (&body[..], len as u64));
        }
    }

    fn data_of_any_length_passes_inline_and_fetched(transport) {
        for features in [0, FEATURE_CRC] {
            let policy = Policy { data_bytes_max: 1 << 20, inline_bytes_max: 4096, ..Policy::default() };
            let server = serve(transport, policy);
            let mut client = server.connect(&Offer { features, ..Offer::new("sizes") }).unwrap();
            for len in [0, 1, 7, 512, 4095, 4096, 4097, 32_767, 32_768, 100_001, (1 << 20) - 1, 1 << 20] {
                client.get(len as u64, len);
                client.put(len as u64, len);
            }
            drop(client);
            server.until_empty(0);
        }
    }

    fn data_may_lie_in_pieces(transport) {
        let server = serve_plain(transport);
        let mut client = server.client();
        let lens = [1, 0, 4096, 13, 60_000, 3, 0];
        let total = lens.iter().sum();
        let expected = pattern(9, total);
        let mut rest = &expected[..];
        let pieces = lens.map(|len| {
            let (piece, behind) = rest.split_at(len);
            rest = behind;
            Buffer::Owned(piece.into())
        });
        let reply = client.call(&command(Op::Put, 9), Bulk::Out(Buffers::Many(pieces.into())));
        assert_eq!(reply.result, total as u64);
        let pieces = lens.map(|len| Buffer::Owned(vec![0; len].into()));
        let reply = client.call(&command(Op::Get, 9), Bulk::In(Buffers::Many(pieces.into())));
        assert!(bytes_of(&reply.bulk) == expected);
        let Bulk::In(Buffers::Many(pieces)) = reply.bulk else {
            panic!("the pieces came back as something else")
        };
        assert!(pieces.iter().map(Buffer::len).eq(lens));
    }

    fn a_failure_brings_its_status_and_its_sentence(transport) {
        let server = serve_plain(transport);
        let mut client = server.client();
        let reply = client.call(&command(Op::Refuse, 0), Bulk::None);
        assert_eq!(reply.status, Status::policy(libc::EACCES));
        assert_eq!(text(&reply.body), "This is not for you; ask somebody else.");
        client.works();
    }

    fn data_that_is_not_fetched_is_discarded(transport) {
        for len in [1, 100, 8192, 8193, 200_000] {
            let server = serve_plain(transport);
            let mut client = server.client();
            for tag in 0..8 {
                let op = if tag % 2 == 0 { Op::Refuse } else { Op::Put };
                client.send(tag, &command(op, 5), data(pattern(5, len)));
            }
            for _ in 0..8 {
                let reply = client.next();
                if reply.tag.is_multiple_of(2) {
                    assert_eq!(reply.status, Status::policy(libc::EACCES));
                } else {
                    assert_eq!(reply.result, len as u64);
                }
                assert!(bytes_of(&reply.bulk) == pattern(5, len), "the buffers come back as they were");
            }
            client.works();
        }
    }

    fn room_that_is_not_filled_is_left_alone(transport) {
        let server = serve_plain(transport);
        let mut client = server.client();
        let reply = client.call(&command(Op::Refuse, 0), room(5000));
        assert_eq!((reply.data_len, bytes_of(&reply.bulk)), (0, vec![0; 5000]));
        client.works();
    }

    fn data_waits_while_the_server_has_no_memory_for_it(transport) {
        let policy = Policy { data_bytes_max: 64 << 10, ..Policy::default() };
        let server = Server::start(transport, Setup { policy, arena_bytes: 128 << 10, ..Setup::default() });
        let mut clients = [server.client(), server.client()];
        for tag in 0..40 {
            for client in &mut clients {
                if tag % 2 == 0 {
                    client.send(tag, &command(Op::Put, tag), data(pattern(tag, 40_000)));
                } else {
                    client.send(tag, &command(Op::Get, tag), room(40_000));
                }
            }
        }
        clients.iter_mut().for_each(|client| client.transport.flush());
        for _ in 0..40 {
            for client in &mut clients {
                let reply = client.next();
                let failure = client.transport.failure();
                assert_eq!(reply.result, 40_000, "{:?}, and {failure:?}", reply.status);
                assert!(bytes_of(&reply.bulk) == pattern(reply.tag, 40_000));
            }
        }
        server.each_seen(|seen| assert!(seen.arena_bytes_max <= 128 << 10));
        drop(clients);
        server.until_empty(0);
    }

    fn clients_of_several_workers_do_not_mix(transport) {
        let server = Server::start(transport, Setup { workers: 3, ..Setup::default() });
        std::thread::scope(|scope| {
            for n in 0..6 {
                let server = &server;
                scope.spawn(move || {
                    let mut client = server.client();
                    for round in 0..50 {
                        let seed = n * 1000 + round;
                        client.put(seed, 10_000 + n as usize);
                        client.get(seed, 10_000 + n as usize);
                    }
                });
            }
        });
        server.each_seen(|seen| assert_eq!(seen.opened.len(), 2));
    }

    fn a_request_that_has_not_been_sent_can_be_recalled(transport) {
        let server = serve_plain(transport);
        let mut client = server.client();
        let credits = client.transport.credits();
        client.send(1, &command(Op::Echo, 1), Bulk::None);
        let (body, bulk) = (command(Op::Put, 2), data(pattern(2, 9000)));
        let id = client.transport.send(2, &body, bulk, SendOptions::PLAIN).unwrap();
        let room_id = client.transport.send(3, &command(Op::Get, 3), room(9000), SendOptions::PLAIN).unwrap();
        client.send(4, &command(Op::Put, 4), data(pattern(4, 9000)));
        let bulk = client.transport.dequeue(id).expect("it has not been flushed");
        assert!(matches!(&bulk, Bulk::Out(_)) && bytes_of(&bulk) == pattern(2, 9000));
        let bulk = client.transport.dequeue(room_id).expect("nor has this");
        assert!(matches!(&bulk, Bulk::In(_)) && bytes_of(&bulk).len() == 9000);
        assert!(client.transport.dequeue(id).is_none(), "it is not there any more");
        let mut tags = [client.next().tag, client.next().tag];
        tags.sort_unstable();
        assert_eq!(tags, [1, 4]);
        assert_eq!(client.transport.credits(), credits);
        server.each_seen(|seen| assert_eq!(seen.requests, 2));
    }

    fn both_ends_know_each_other(transport) {
        let policy = Policy { queue_depth: 8, name: "the server".into(), ..Policy::default() };
        let server = serve(transport, policy.clone());
        let channel = Some(ChannelOffer { number: 7, epoch: 3, linger: Duration::from_secs(1) });
        let offer = Offer { queue_depth: 5, channel, ..Offer::new("the client") };
        let client = server.connect(&offer).unwrap();
        let peer = server.until("the client", |seen| seen.opened.first().map(|(_, peer)| peer.clone()));
        // A session of a key or a user is known by another id than the client says.
        assert_eq!(peer.session != offer.session, transport.has_tls() || transport == Transport::Unix);
        assert_eq!((peer.channel, peer.name.as_str()), (channel, "the client"));
        assert_eq!(&peer.grant, client.transport.grant());
        assert_eq!((peer.grant.queue_depth, peer.grant.server), (5, policy.server));
        let greedy = server.connect(&Offer { queue_depth: 1000, ..offer }).unwrap();
        assert_eq!(greedy.transport.grant().queue_depth, 8);
    }
}
