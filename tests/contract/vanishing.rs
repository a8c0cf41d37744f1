//! A peer that goes away, at each step. Whatever the server held for it comes back; a client gets an end for
//! each request.

use std::io::Write;
use std::net::Shutdown;

use raio_transport::error::{Class, Status};
use raio_transport::handshake::{Offer, Policy};
use raio_transport::message::{self, RemoteRegion};
use raio_transport::transport::{Bulk, CloseReason};

use crate::harness::{Op, Seen, Server, Setup, Transport, command, data, pattern, room, serve_plain};
use crate::raw::{Got, Raw, answer_to};

fn was_lost(reason: CloseReason) -> bool {
    matches!(reason, CloseReason::Lost(_))
}

/// A request for a write of 200,000 bytes, as bytes.
fn large_write() -> Vec<u8> {
    let mut bytes = Vec::new();
    let request = message::RequestHeader {
        id: 1,
        body_len: 0,
        data_len: 200_000,
        region: RemoteRegion::None,
        has_crc: false,
        data_crc: 0,
    };
    request.encode(&command(Op::Put, 0), false, &mut bytes);
    bytes.extend_from_slice(&pattern(0, 200_000));
    bytes
}

contract! {
    fn a_client_that_goes_before_its_hello_leaves_nothing(transport) {
        let server = serve_plain(transport);
        drop(Raw::client(&server));
        assert!(was_lost(server.closed(0)) || server.closed(0) == CloseReason::Finished);
        server.until_empty(0);
        server.serves_others();
    }

    fn a_client_that_goes_after_the_welcome_has_finished(transport) {
        let server = serve_plain(transport);
        drop(Raw::open_client(&server, &Offer::new("brief")));
        assert_eq!(server.closed(0), CloseReason::Finished);
        server.until_empty(0);
    }

    fn a_client_that_goes_with_requests_outstanding_is_lost_and_all_is_given_back(transport) {
        let server = serve_plain(transport);
        let mut client = server.client();
        for tag in 0..10 {
            client.send(tag, &command(Op::Hold, 0), room(10_000));
        }
        client.transport.flush();
        server.until("the requests", |seen| (seen.requests == 10).then_some(()));
        drop(client);
        assert!(was_lost(server.closed(0)));
        server.until_empty(0);
        server.serves_others();
    }

    fn what_a_client_that_goes_has_queued_is_not_sent(transport) {
        let server = serve_plain(transport);
        for n in 0..2 {
            let mut client = server.client();
            // The second has an unanswered request, too.
            for tag in 0..n {
                client.send(tag, &command(Op::Hold, 0), room(100));
            }
            client.transport.flush();
            server.until("the requests", |seen| (seen.requests == n).then_some(()));
            client.send(2, &command(Op::Put, 2), data(pattern(2, 100)));
            client.send(3, &command(Op::Put, 3), data(pattern(3, 100_000)));
            drop(client);
            let reason = server.closed(n as usize);
            assert!(n == 0 || was_lost(reason));
            server.each_seen(|seen| {
                assert_eq!(seen.requests, n, "a request was sent after its client had gone");
            });
        }
        server.until_empty(0);
        server.serves_others();
    }

    fn a_client_that_goes_while_its_data_waits_for_memory_frees_its_place(transport) {
        let policy = Policy { data_bytes_max: 64 << 10, ..Policy::default() };
        let server = Server::start(transport, Setup { policy, arena_bytes: 64 << 10, ..Setup::default() });
        // The one slot is taken by answers that this client does not collect.
        let (mut greedy, _) = Raw::open_client(&server, &Offer::new("greedy"));
        for id in 0..120 {
            greedy.request_in(id, &command(Op::Get, id), 64 << 10);
        }
        let mut waiting = server.client();
        waiting.send(0, &command(Op::Put, 0), data(pattern(0, 50_000)));
        waiting.transport.flush();
        drop(waiting);
        drop(greedy);
        server.closed(1);
        server.until_empty(0);
        server.serves_others();
    }

    fn a_client_that_goes_with_answers_on_the_way_leaves_nothing(transport) {
        let server = serve_plain(transport);
        for n in 0..10 {
            let (mut raw, grant) = Raw::open_client(&server, &Offer::new("impatient"));
            for id in 0..u64::from(grant.queue_depth) {
                raw.request_in(id, &command(Op::Get, id), 200_000);
            }
            drop(raw);
            server.closed(n);
            server.until_empty(0);
        }
        server.serves_others();
    }

    fn a_hundred_clients_come_and_go_and_leave_nothing(transport) {
        let server = serve_plain(transport);
        for _ in 0..100 {
            server.client().works();
        }
        let finished = |seen: &Seen| {
            seen.closed.iter().filter(|(_, reason)| *reason == CloseReason::Finished).count()
        };
        server.until("the last to be gone", |seen| (finished(seen) == 100).then_some(()));
        server.until_empty(0);
        server.each_seen(|seen| {
            // A client by rdma_cm gives up an attempt that takes too long, and begins another.
            let is_expected = |reason: &CloseReason| match reason {
                CloseReason::Finished => true,
                CloseReason::Lost(0) => transport == Transport::Rdma,
                _ => false,
            };
            let all_expected = seen.closed.iter().all(|(_, reason)| is_expected(reason));
            assert!(all_expected, "{:?}", seen.reasons());
        });
    }

    fn a_server_that_goes_ends_every_request_once(transport) {
        // Before it has read anything, with all outstanding, and after some answers.
        for answered in [0, 0, 3] {
            let (mut client, mut raw) = Raw::server(transport, &Policy::default(), 0);
            for tag in 0..8 {
                let bulk = if tag % 2 == 0 { room(5000) } else { data(pattern(tag, 5000)) };
                client.send(tag, &command(Op::Get, tag), bulk);
            }
            client.transport.flush();
            for _ in 0..answered {
                let request = raw.next_request();
                raw.respond(&request, &[]);
            }
            drop(raw);
            let replies = client.until_failed();
            let mut tags: Vec<_> = replies.iter().map(|reply| reply.tag).collect();
            tags.sort_unstable();
            assert_eq!(tags, [0, 1, 2, 3, 4, 5, 6, 7]);
            for reply in &replies {
                assert!(reply.status.is_ok() || reply.status.class == Class::Transport, "{reply:?}");
                assert!(!matches!(reply.bulk, Bulk::None), "the buffers come back");
            }
            let lost = replies.iter().filter(|reply| !reply.status.is_ok()).count();
            // On TCP a reset may overtake answers that were on their way.
            assert!(lost >= 8 - answered && (transport.is_stream() || lost == 8 - answered), "{lost}");
        }
    }

    fn a_server_that_says_goaway_closes_with_its_sentence(transport) {
        let server = serve_plain(transport);
        let mut client = server.client();
        client.send(1, &command(Op::Hold, 0), Bulk::None);
        client.send(2, &command(Op::Close, 0), Bulk::None);
        client.transport.flush();
        let replies = client.until_failed();
        assert_eq!(replies.len(), 2);
        assert!(replies.iter().all(|reply| reply.status.class == Class::Transport), "{replies:?}");
        let failure = client.transport.failure().unwrap();
        assert!(failure.to_string().contains("Come back tomorrow"), "{failure}");
        assert_eq!(server.closed(0), CloseReason::Local);
        server.until_empty(0);
        server.serves_others();
    }
}

#[test]
fn a_client_that_goes_in_the_middle_of_its_hello_leaves_nothing() {
    for transport in Transport::TCP {
        let server = serve_plain(transport);
        let hello = Offer::new("torn").hello();
        for (n, len) in [1, 8, 16, 63, 64, hello.len() - 1].into_iter().enumerate() {
            let mut raw = Raw::client(&server);
            raw.send(&hello[..len]);
            drop(raw);
            let reason = server.closed(n);
            assert!(was_lost(reason.clone()) || reason == CloseReason::Finished, "{reason:?}");
        }
        server.until_empty(0);
        server.serves_others();
    }
}

#[test]
fn a_client_that_goes_in_the_middle_of_a_message_is_lost() {
    let bytes = large_write();
    for transport in Transport::TCP {
        let server = serve_plain(transport);
        // In the header, in the body, before the data, in the data: received with the rest, and received into
        // the slot.
        for (n, len) in [1, 39, 40, 47, 55, 56, 57, 10_000, 100_000, 199_999].into_iter().enumerate() {
            let (mut raw, _) = Raw::open_client(&server, &Offer::new("torn"));
            raw.send(&bytes[..len]);
            drop(raw);
            assert!(was_lost(server.closed(n)), "after {len} bytes");
            server.until_empty(0);
        }
        server.serves_others();
    }
}

#[test]
fn a_client_that_resets_the_connection_is_lost() {
    for transport in Transport::TCP {
        let server = serve_plain(transport);
        let (mut raw, _) = Raw::open_client(&server, &Offer::new("reset"));
        raw.request_in(2, &command(Op::Hold, 0), 1000);
        raw.send(&large_write()[..5000]);
        server.until("the requests", |seen| (seen.requests == 2).then_some(()));
        socket2::SockRef::from(&*raw.stream()).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(raw);
        assert_eq!(server.closed(0), CloseReason::Lost(libc::ECONNRESET));
        server.until_empty(0);
        server.serves_others();
    }
}

#[test]
fn a_client_that_stops_sending_is_gone_though_it_would_still_read() {
    for transport in Transport::TCP {
        let server = serve_plain(transport);
        let (mut idle, _) = Raw::open_client(&server, &Offer::new("idle"));
        idle.stream().shutdown(Shutdown::Write).unwrap();
        assert_eq!(server.closed(0), CloseReason::Finished);
        assert_eq!(idle.next(), Got::End);
        let (mut busy, _) = Raw::open_client(&server, &Offer::new("busy"));
        busy.request(1, &command(Op::Hold, 0), &[]);
        busy.stream().shutdown(Shutdown::Write).unwrap();
        assert_eq!(server.closed(1), CloseReason::Lost(0));
        assert_eq!(busy.next(), Got::End);
        server.until_empty(0);
        server.serves_others();
    }
}

#[test]
fn a_client_that_stops_reading_only_is_lost_when_it_is_answered() {
    for transport in Transport::TCP {
        let server = serve_plain(transport);
        let (mut raw, _) = Raw::open_client(&server, &Offer::new("deaf"));
        raw.stream().shutdown(Shutdown::Read).unwrap();
        // Linux takes what comes and forgets it, so it is served; it must not hurt.
        for id in 0..10 {
            raw.request_in(id, &command(Op::Get, id), 100_000);
        }
        server.until("the requests", |seen| (seen.requests == 10).then_some(()));
        drop(raw);
        server.closed(0);
        server.until_empty(0);
        server.serves_others();
    }
}

#[test]
fn a_server_that_stops_sending_is_gone() {
    let (mut client, mut raw) = Raw::server(Transport::TcpEpoll, &Policy::default(), 0);
    client.send(0, &command(Op::Get, 0), room(100));
    client.transport.flush();
    raw.next_request();
    raw.stream().shutdown(Shutdown::Write).unwrap();
    let replies = client.until_failed();
    assert_eq!(replies.len(), 1);
    assert_eq!(replies[0].status, Status::transport(libc::ECONNRESET));
}

#[test]
fn a_server_that_goes_in_the_middle_of_an_answer_ends_every_request_once() {
    let mut bytes = Vec::new();
    for _ in 0..2 {
        message::ResponseHeader { data_len: 50_000, ..answer_to(0) }.encode(&[0; 8], false, &mut bytes);
    }
    for len in [1, 39, 40, 47, 48] {
        let (mut client, mut raw) = Raw::server(Transport::TcpEpoll, &Policy::default(), 0);
        client.send(0, &command(Op::Get, 0), room(50_000));
        client.send(1, &command(Op::Get, 1), room(50_000));
        client.transport.flush();
        let request = raw.next_request();
        raw.next_request();
        bytes[8..16].copy_from_slice(&request.id.to_le_bytes());
        raw.send(&bytes[..len]);
        if len == 48 {
            raw.stream().write_all(&pattern(0, 49_999)).unwrap();
        }
        drop(raw);
        let mut tags: Vec<_> = client
            .until_failed()
            .iter()
            .map(|reply| {
                assert_eq!(reply.status.class, Class::Transport);
                reply.tag
            })
            .collect();
        tags.sort_unstable();
        assert_eq!(tags, [0, 1], "after {len} bytes");
    }
}
