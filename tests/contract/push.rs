//! Unsolicited messages: one-way messages in both directions, with receipts, and requests of the server to
//! its client. Each has a window of its own, and none stops the requests of the same connection.

use std::time::{Duration, Instant};

use raio_transport::error::{Error, Status, Violation};
use raio_transport::handshake::{Offer, Policy, PushWindows};
use raio_transport::message::{self, BODY_BYTES_MAX, FEATURE_CRC, Receipt, RemoteRegion};
use raio_transport::transport::{Bulk, ClientEvent, CloseReason, NotPushed, OneWay};

use crate::harness::{
    BYSTANDER, Client, Op, PATIENCE, PUSH, Server, Transport, command, serve, serve_plain, unsolicited,
};
use crate::random::Random;
use crate::raw::{Got, Raw};

const WINDOWS: PushWindows = PushWindows { to_server: 8, to_client: 6, requests: 3 };

fn offer() -> Offer {
    Offer { push: WINDOWS, ..Offer::new("pushing") }
}

fn connect(server: &Server) -> Client {
    server.connect(&offer()).unwrap()
}

/// Has the server do something of which the response says how much.
fn call(client: &mut Client, op: Op, argument: u64) -> u64 {
    let reply = client.call(&command(op, argument), Bulk::None);
    assert!(reply.status.is_ok(), "{reply:?}");
    reply.result
}

/// Waits until the server has received `count` one-way messages, and returns them.
fn seen_by(server: &Server, count: usize) -> Vec<Vec<u8>> {
    server.until("one-way messages", |seen| {
        (seen.one_ways.len() >= count)
            .then(|| seen.one_ways.iter().map(|(_, message)| message.clone()).collect())
    })
}

fn one_way(event: ClientEvent) -> Vec<u8> {
    match event {
        ClientEvent::OneWay(message) => message.to_vec(),
        other => panic!("{other:?} is no one-way message"),
    }
}

/// Sends a one-way message as soon as there is room.
fn push_soon(client: &mut Client, message: OneWay<'_>) {
    let deadline = Instant::now() + PATIENCE;
    while let Err(why) = client.transport.send_one_way(message) {
        assert_eq!(why, NotPushed::Full);
        assert!(Instant::now() < deadline, "no room came");
        client.transport.flush();
        client.transport.wait(Some(deadline)).unwrap();
        client.transport.receive(&mut Vec::new());
    }
}

/// A server by hand whose client takes unsolicited messages.
fn hand_made_server(transport: Transport) -> (Client, Raw) {
    let policy = Policy { push: PUSH, ..Policy::default() };
    Raw::server_for(transport, &policy, offer(), Duration::ZERO)
}

fn failure(client: &mut Client) -> Violation {
    client.until_failed();
    match client.transport.failure() {
        Some(Error::Violation(violation)) => *violation,
        other => panic!("{other:?} is no violation"),
    }
}

contract! {
    fn one_way_messages_of_every_length_arrive_in_order_among_requests(transport) {
        let server = serve_plain(transport);
        let mut client = connect(&server);
        let mut sent = Vec::new();
        let lengths = [0, 1, 7, 8, 9, 31, 32, 33, 500, BODY_BYTES_MAX - 1, BODY_BYTES_MAX];
        for len in lengths.into_iter().cycle().take(40) {
            let message: Vec<u8> = (0..len).map(|n| (n + sent.len()) as u8).collect();
            push_soon(&mut client, OneWay { message: &message, tag: 0, wants_receipt: false });
            sent.push(message);
            if sent.len() % 5 == 0 {
                client.works();
            }
        }
        client.transport.flush();
        assert!(seen_by(&server, 40) == sent);
        client.works();
    }

    fn a_receipt_comes_for_each_message_that_wants_one_in_order(transport) {
        let server = serve_plain(transport);
        let mut client = connect(&server);
        for tag in 0..100 {
            push_soon(&mut client, OneWay { message: b"to be signed for", tag, wants_receipt: tag % 3 != 0 });
        }
        let tags: Vec<_> = (0..66).map(|_| match client.next_event() {
            ClientEvent::Receipt(tag) => tag,
            other => panic!("{other:?}"),
        }).collect();
        assert!(tags.iter().copied().eq((0..100).filter(|tag| tag % 3 != 0)), "{tags:?}");
    }

    fn a_window_that_is_full_stops_one_way_messages_and_nothing_else(transport) {
        let server = serve_plain(transport);
        let mut client = connect(&server);
        call(&mut client, Op::Keep, 0);
        for tag in 0..8 {
            client.push(tag, b"kept", true);
        }
        let more = OneWay { message: b"more", tag: 8, wants_receipt: true };
        assert_eq!(client.transport.send_one_way(more), Err(NotPushed::Full));
        client.works();
        seen_by(&server, 8);
        assert_eq!(client.transport.send_one_way(more), Err(NotPushed::Full), "nothing was released");
        assert_eq!(call(&mut client, Op::Keep, 2), 2);
        for tag in 0..2 {
            assert!(matches!(client.next_event(), ClientEvent::Receipt(got) if got == tag));
        }
        client.push(8, b"more", false);
        client.push(9, b"more", false);
        assert_eq!(client.transport.send_one_way(more), Err(NotPushed::Full));
        client.works();
        assert_eq!(seen_by(&server, 10).len(), 10);
    }

    fn a_server_sends_no_more_than_its_client_has_room_for_and_serves_it_all_the_same(transport) {
        let server = serve_plain(transport);
        let mut client = connect(&server);
        assert_eq!(call(&mut client, Op::SendOneWay, 20), 6);
        client.works();
        assert_eq!(call(&mut client, Op::SendOneWay, 20), 0);
        for n in 0..6 {
            assert!(one_way(client.next_event()) == unsolicited(n));
        }
        server.each_seen(|seen| assert_eq!(seen.receipts, [0; 0], "nothing was released"));
        for _ in 0..4 {
            client.transport.release();
        }
        client.transport.flush();
        server.until("receipts", |seen| (seen.receipts == [0, 1, 2, 3]).then_some(()));
        assert_eq!(call(&mut client, Op::SendOneWay, 20), 4);
        client.works();
    }

    fn a_side_that_refuses_one_way_messages_receives_none_and_requests_go_on(transport) {
        let server = serve_plain(transport);
        let mut client = connect(&server);
        call(&mut client, Op::SendOneWay, 3);
        client.transport.refuse();
        assert!(client.transport.next_event().is_none(), "received messages that were not taken are dropped");
        client.transport.flush();
        server.until("the refusal", |seen| (seen.refused == 1).then_some(()));
        assert_eq!(call(&mut client, Op::SendOneWay, 3), 0);
        client.transport.refuse();
        // The other way.
        client.push(1, b"before", true);
        client.works();
        call(&mut client, Op::RefuseOneWay, 0);
        let mut events: Vec<_> = vec![client.next_event()];
        if matches!(events[0], ClientEvent::Receipt(1)) {
            events.push(client.next_event());
        }
        assert!(matches!(events.last(), Some(ClientEvent::Refused)), "{events:?}");
        let more = OneWay { message: b"after", tag: 2, wants_receipt: false };
        assert_eq!(client.transport.send_one_way(more), Err(NotPushed::Refused));
        client.works();
        server.each_seen(|seen| assert_eq!(seen.one_ways.len(), 1));
    }

    fn a_server_asks_its_client_which_answers_in_any_order(transport) {
        let server = serve_plain(transport);
        let mut client = connect(&server);
        assert_eq!(call(&mut client, Op::RequestClient, 5), 3);
        let mut asked: Vec<_> = (0..3).map(|n| match client.next_event() {
            ClientEvent::Request(id, body) => {
                let question = unsolicited(n);
                assert!(body[..question.len()] == question);
                assert_eq!(body.len(), question.len().next_multiple_of(8));
                id
            }
            other => panic!("{other:?} is no request"),
        }).collect();
        client.works();
        while let Some(id) = asked.pop() {
            let status = if id % 2 == 0 { Status::OK } else { Status::policy(libc::EPERM) };
            client.transport.answer(id, status, 100 + id, b"answer");
        }
        client.transport.flush();
        let answers = server.until("answers", |seen| (seen.answers.len() == 3).then(|| seen.answers.clone()));
        for (answer, tag) in answers.iter().zip([2, 1, 0]) {
            assert_eq!((answer.tag, answer.result, &*answer.body), (tag, 100 + tag, &b"answer\0\0"[..]));
            assert_eq!(answer.status.is_ok(), tag % 2 == 0);
        }
        assert_eq!(call(&mut client, Op::RequestClient, 1), 1, "an answer makes room");
        assert!(matches!(client.next_event(), ClientEvent::Request(..)));
    }

    fn all_of_it_is_checked_where_messages_have_checksums(transport) {
        let server = serve_plain(transport);
        let offer = Offer { features: FEATURE_CRC, requires_crc: true, ..offer() };
        let mut client = server.connect(&offer).unwrap();
        client.push(5, b"checked", true);
        assert!(matches!(client.next_event(), ClientEvent::Receipt(5)));
        assert_eq!((call(&mut client, Op::SendOneWay, 1), call(&mut client, Op::RequestClient, 1)), (1, 1));
        assert!(one_way(client.next_event()) == unsolicited(0));
        let ClientEvent::Request(id, _) = client.next_event() else { panic!("no request") };
        client.transport.release();
        client.transport.answer(id, Status::OK, 1, &[]);
        client.transport.flush();
        server.until("the answer", |seen| (seen.answers.len() == 1 && seen.receipts == [0]).then_some(()));
    }

    fn what_was_not_offered_or_not_granted_is_refused(transport) {
        let server = serve_plain(transport);
        let mut client = server.client();
        let message = OneWay { message: b"no", tag: 0, wants_receipt: false };
        assert_eq!(client.transport.send_one_way(message), Err(NotPushed::Refused));
        assert_eq!((call(&mut client, Op::SendOneWay, 1), call(&mut client, Op::RequestClient, 1)), (0, 0));
        let server = serve(transport, Policy::default());
        let mut client = connect(&server);
        assert_eq!(client.transport.send_one_way(message), Err(NotPushed::Refused));
        assert_eq!((call(&mut client, Op::SendOneWay, 1), call(&mut client, Op::RequestClient, 1)), (0, 0));
        client.works();
    }

    fn what_had_come_before_the_end_can_be_taken_after_it(transport) {
        let server = serve_plain(transport);
        let mut client = connect(&server);
        assert_eq!(call(&mut client, Op::SendOneWay, 2), 2);
        client.send(1, &command(Op::Close, 0), Bulk::None);
        client.transport.flush();
        client.until_failed();
        for n in 0..2 {
            assert!(client.transport.next_event().is_some_and(|event| one_way(event) == unsolicited(n)));
        }
        assert!(client.transport.next_event().is_none());
        client.transport.release();
        client.transport.refuse();
        let message = OneWay { message: b"late", tag: 0, wants_receipt: false };
        assert_eq!(client.transport.send_one_way(message), Err(NotPushed::Closed));
        assert!(matches!(server.closed(0), CloseReason::Local));
        server.until_empty(0);
    }

    fn a_client_that_sends_what_it_may_not_is_closed_and_no_other(transport) {
        let server = serve_plain(transport);
        let mut bystander = server.bystander();
        type Make = fn(&mut Vec<u8>);
        let cases: [(&str, Violation, Make); 4] = [
            ("more one-way messages than the window", Violation::Credits, |out| {
                (0..9).for_each(|_| message::encode_one_way(b"one more", false, false, out));
            }),
            ("a receipt for nothing", Violation::Credits, |out| {
                message::encode_receipt(Receipt { released: 1, is_last: false }, false, out);
            }),
            ("a receipt without news", Violation::Credits, |out| {
                message::encode_receipt(Receipt { released: 0, is_last: false }, false, out);
            }),
            ("an answer to no question", Violation::RequestId, |out| {
                crate::raw::answer_to(7).encode(&[], false, out);
            }),
        ];
        for (n, (what, violation, make)) in cases.into_iter().enumerate() {
            let (mut raw, _) = Raw::open_client(&server, &offer());
            // What is kept is not released.
            raw.request(1, &command(Op::Keep, 0), &[]);
            assert!(matches!(raw.next(), Got::Response(..)));
            let mut bytes = Vec::new();
            make(&mut bytes);
            raw.send_each(&bytes);
            assert_eq!(server.closed(n), CloseReason::Violation(violation), "{what}");
            assert_eq!(raw.goaway().map(|(status, _)| status.errno), Some(libc::EPROTO), "{what}");
            bystander.works();
        }
        server.until_empty(1);
    }

    fn a_server_that_sends_what_it_may_not_ends_the_connection(transport) {
        type Make = fn(&mut Vec<u8>);
        let cases: [(&str, Violation, Make); 5] = [
            ("more one-way messages than the window", Violation::Credits, |out| {
                (0..7).for_each(|_| message::encode_one_way(b"one more", false, false, out));
            }),
            ("a receipt for nothing", Violation::Credits, |out| {
                message::encode_receipt(Receipt { released: 1, is_last: false }, false, out);
            }),
            ("more questions than were offered", Violation::Credits, |out| {
                (0..4).for_each(|id| ask(id, RemoteRegion::None, out));
            }),
            ("the same question twice", Violation::RequestId, |out| {
                (0..2).for_each(|_| ask(1, RemoteRegion::None, out));
            }),
            ("a question for data", Violation::Field, |out| {
                ask(1, RemoteRegion::In { address: 0, key: 1, len: 8 }, out);
            }),
        ];
        for (what, violation, make) in cases {
            let (mut client, mut raw) = hand_made_server(transport);
            let mut bytes = Vec::new();
            make(&mut bytes);
            raw.send_each(&bytes);
            assert_eq!(failure(&mut client), violation, "{what}");
        }
    }

    fn random_traffic_both_ways_keeps_its_order_and_loses_nothing(transport) {
        let mut random = Random::new();
        let server = serve_plain(transport);
        let mut client = connect(&server);
        let (mut sent, mut wanted, mut received, mut held, mut owed) = (0, Vec::new(), 0, 0, Vec::new());
        let (mut sent_by_server, mut asked) = (0, 0);
        let mut tags = Vec::new();
        for _ in 0..400 {
            match random.below(8) {
                0 | 1 => {
                    let wants_receipt = random.below(2) == 0;
                    let message = OneWay { message: &unsolicited(sent), tag: sent, wants_receipt };
                    if client.transport.send_one_way(message).is_ok() {
                        wanted.extend(wants_receipt.then_some(sent));
                        sent += 1;
                    }
                }
                2 => sent_by_server += call(&mut client, Op::SendOneWay, random.below(4)),
                3 => asked += call(&mut client, Op::RequestClient, random.below(3)),
                4 if held > 0 => {
                    client.transport.release();
                    held -= 1;
                }
                5 if !owed.is_empty() => {
                    let id = owed.swap_remove(random.index(owed.len()));
                    client.transport.answer(id, Status::OK, id, &[]);
                }
                6 => client.transport.flush(),
                _ => {
                    client.transport.receive(&mut Vec::new());
                }
            }
            while let Some(event) = client.transport.next_event() {
                match event {
                    ClientEvent::OneWay(_) => {
                        received += 1;
                        held += 1;
                        assert!(held <= 6);
                    }
                    ClientEvent::Receipt(tag) => tags.push(tag),
                    ClientEvent::Request(id, _) => {
                        owed.push(id);
                        assert!(owed.len() <= 3);
                    }
                    ClientEvent::Refused => panic!("nobody has refused"),
                }
            }
        }
        while tags.len() < wanted.len() || received < sent_by_server {
            match client.next_event() {
                ClientEvent::OneWay(_) => received += 1,
                ClientEvent::Receipt(tag) => tags.push(tag),
                ClientEvent::Request(id, _) => owed.push(id),
                ClientEvent::Refused => panic!("nobody has refused"),
            }
        }
        for id in owed.drain(..) {
            client.transport.answer(id, Status::OK, id, &[]);
        }
        client.transport.flush();
        assert_eq!((tags, received), (wanted, sent_by_server));
        let messages = seen_by(&server, sent as usize);
        assert!(messages.iter().enumerate().all(|(n, message)| *message == unsolicited(n as u64)));
        server.until("all answers", |seen| (seen.answers.len() as u64 == asked).then_some(()));
        client.works();
    }

    fn a_client_that_takes_nothing_it_is_sent_does_not_hold_up_others(transport) {
        let server = serve_plain(transport);
        let mut bystander = server.connect(&Offer { push: WINDOWS, ..Offer::new(BYSTANDER) }).unwrap();
        let mut idle: Vec<_> = (0..5).map(|_| connect(&server)).collect();
        for client in &mut idle {
            assert_eq!((call(client, Op::SendOneWay, 99), call(client, Op::RequestClient, 99)), (6, 3));
        }
        for _ in 0..20 {
            bystander.push(0, b"still here", true);
            assert!(matches!(bystander.next_event(), ClientEvent::Receipt(0)));
            bystander.works();
        }
        drop(idle);
        server.until_empty(1);
    }
}

fn ask(id: u64, region: RemoteRegion, out: &mut Vec<u8>) {
    message::RequestHeader { region, ..message::RequestHeader::of_command(id) }.encode(
        b"what now",
        false,
        out,
    );
}
