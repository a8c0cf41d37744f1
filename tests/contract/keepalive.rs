//! Keepalive: a peer that promised to speak, a server that owes an answer.

use std::time::{Duration, Instant};

use raio_transport::error::{Class, Error, Status, Violation};
use raio_transport::handshake::{Offer, Policy};
use raio_transport::message::{self, FEATURE_PONG_TIME};
use raio_transport::trace::Clock;
use raio_transport::transport::{Bulk, CloseReason};

use crate::harness::{Client, Op, PATIENCE, command, room, serve, serve_plain};
use crate::raw::{Got, Raw};

fn brief() -> Policy {
    Policy { keepalive: Duration::from_millis(50), ..Policy::default() }
}

/// Waits for the answer to a ping.
fn ping(client: &mut Client) {
    let asked = Instant::now();
    client.transport.ping(PATIENCE);
    while client.transport.last_rx() < asked {
        client.transport.wait(Some(asked + PATIENCE)).unwrap();
        client.transport.receive(&mut Vec::new());
        assert!(client.transport.failure().is_none(), "{:?}", client.transport.failure());
    }
}

contract! {
    fn a_client_that_promised_to_speak_and_is_silent_is_closed(transport) {
        let server = serve_plain(transport);
        let offer = Offer { keepalive: Duration::from_millis(40), ..Offer::new("forgetful") };
        let (mut raw, _) = Raw::open_client(&server, &offer);
        assert_eq!(server.closed(0), CloseReason::Violation(Violation::Silent));
        let (status, text) = raw.goaway().expect("it is told why");
        assert_eq!(status.errno, libc::ETIMEDOUT);
        assert!(text.contains("silent"), "{text}");
        server.serves_others();
        server.until_empty(0);
    }

    fn a_client_that_keeps_its_promise_is_kept(transport) {
        let server = serve_plain(transport);
        let offer = Offer { keepalive: Duration::from_millis(500), ..Offer::new("faithful") };
        let mut client = server.connect(&offer).unwrap();
        let until = Instant::now() + offer.keepalive * 5;
        while Instant::now() < until {
            client.transport.ping(PATIENCE);
            client.transport.receive(&mut Vec::new());
            std::thread::sleep(Duration::from_millis(50));
        }
        client.works();
        server.each_seen(|seen| assert!(seen.closed.is_empty()));
    }

    fn a_client_that_promised_nothing_may_be_silent(transport) {
        let server = serve(transport, Policy {
            keepalive: Duration::from_millis(20),
            stall_timeout: Duration::from_millis(50),
            handshake_timeout: Duration::from_secs(2),
            ..Policy::default()
        });
        let mut client = server.client();
        std::thread::sleep(Duration::from_millis(2200));
        server.each_seen(|seen| assert!(seen.closed.is_empty(), "{:?}", seen.reasons()));
        assert!(client.transport.failure().is_none());
        let reply = client.call(&command(Op::Echo, 0), Bulk::None);
        assert_eq!(reply.status, Status::OK);
    }

    fn a_server_that_is_silent_while_it_owes_an_answer_is_given_up(transport) {
        let (mut client, mut raw) = Raw::server(transport, &brief(), 0);
        client.send(0, &command(Op::Get, 0), room(100));
        client.send(1, &command(Op::Get, 0), room(100));
        let began = Instant::now();
        client.transport.flush();
        let replies = client.until_failed();
        assert_eq!(replies.len(), 2);
        for reply in &replies {
            assert_eq!((reply.status.class, reply.status.errno), (Class::Transport, libc::ETIMEDOUT));
        }
        assert_eq!(client.transport.failure().map(Error::errno), Some(libc::ETIMEDOUT));
        assert!(began.elapsed() >= brief().keepalive * 3);
        // It asked first.
        raw.next_request();
        raw.next_request();
        assert!(matches!(raw.next(), Got::Ping(_)));
    }

    fn a_server_that_works_long_but_answers_pings_is_waited_for(transport) {
        let keepalive = Duration::from_millis(500);
        let server = serve(transport, Policy { keepalive, ..Policy::default() });
        let mut client = server.client();
        client.send(0, &command(Op::Hold, 0), Bulk::None);
        client.transport.flush();
        let until = Instant::now() + keepalive * 5;
        let mut replies = Vec::new();
        while Instant::now() < until {
            client.transport.wait(Some(until)).unwrap();
            client.transport.receive(&mut replies);
        }
        let failure = client.transport.failure();
        assert!(replies.is_empty() && failure.is_none(), "{failure:?}");
        client.send(1, &command(Op::Release, 0), Bulk::None);
        assert_eq!((client.next().tag, client.next().tag), (0, 1));
    }

    fn a_client_that_was_away_for_long_does_not_blame_the_server(transport) {
        let server = serve(transport, brief());
        let mut client = server.client();
        client.send(0, &command(Op::Hold, 0), Bulk::None);
        client.transport.flush();
        for _ in 0..3 {
            std::thread::sleep(brief().keepalive * 6);
            client.transport.receive(&mut Vec::new());
            assert!(client.transport.failure().is_none(), "{:?}", client.transport.failure());
        }
        client.send(1, &command(Op::Release, 0), Bulk::None);
        client.transport.flush();
        std::thread::sleep(brief().keepalive * 6);
        assert_eq!((client.next().tag, client.next().tag), (0, 1));
    }

    fn a_client_finds_the_offset_of_the_servers_clock(transport) {
        let ours = Clock::new();
        let ahead = Duration::from_secs(3600);
        let server = serve(transport, Policy { clock: ours.ahead(ahead), ..Policy::default() });
        let offer = Offer { features: FEATURE_PONG_TIME, ..Offer::new("traced") };
        let mut client = server.connect(&offer).unwrap();
        assert!(client.transport.grant().pong_time());
        for _ in 0..10 {
            ping(&mut client);
        }
        let sample = client.transport.clock_sample().expect("the server told its time");
        let error = sample.offset_ns(&ours) - ahead.as_nanos() as i64;
        let most = sample.round_trip.as_nanos() as u64 / 2 + 1;
        assert!(error.unsigned_abs() <= most, "{error} ns off, of at most {most}");
        client.works();
    }

    fn a_server_that_cannot_tell_its_time_need_not(transport) {
        let old = serve(transport, Policy { features: 0, ..Policy::default() });
        let offer = Offer { features: FEATURE_PONG_TIME, ..Offer::new("traced") };
        let mut client = old.connect(&offer).unwrap();
        assert!(!client.transport.grant().pong_time());
        ping(&mut client);
        assert_eq!(client.transport.clock_sample(), None);
        client.works();
    }

    fn a_time_that_was_not_asked_for_is_a_violation(transport) {
        let (mut client, mut raw) = Raw::server(transport, &Policy::default(), 0);
        client.transport.ping(PATIENCE);
        let Got::Ping(id) = raw.next() else { panic!("no ping came") };
        let mut pong = Vec::new();
        message::encode_pong(id, 1, false, &mut pong);
        raw.send(&pong);
        client.until_failed();
        let failure = client.transport.failure();
        assert!(matches!(failure, Some(Error::Violation(Violation::Reserved))), "{failure:?}");
    }

    fn an_idle_client_can_ask_whether_the_server_is_there(transport) {
        let (mut client, mut raw) = Raw::server(transport, &Policy::default(), 0);
        let heard = client.transport.last_rx();
        client.transport.ping(PATIENCE);
        let Got::Ping(id) = raw.next() else { panic!("no ping came") };
        let mut pong = Vec::new();
        message::encode_pong(id, 0, false, &mut pong);
        raw.send(&pong);
        let deadline = Instant::now() + PATIENCE;
        while client.transport.last_rx() == heard {
            assert!(Instant::now() < deadline, "the pong did not count");
            client.transport.wait(Some(deadline)).unwrap();
            client.transport.receive(&mut Vec::new());
        }
        client.transport.ping(Duration::from_millis(30));
        client.until_failed();
        assert_eq!(client.transport.failure().map(Error::errno), Some(libc::ETIMEDOUT));
    }
}
