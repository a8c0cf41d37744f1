//! The handshake, done well and badly, by clients and by servers.

use std::io::Write;
use std::time::Duration;

use raio_transport::Error;
use raio_transport::error::Violation;
use raio_transport::handshake::{Offer, Policy};
use raio_transport::message::{
    self, FEATURE_CRC, HANDSHAKE_BYTES_MAX, HandshakeOption, Hello, OPTION_NAME, OPTION_REQUIRED,
    OPTION_TEXT, OPTION_UNSUPPORTED, Parsed, VERSION, Welcome,
};
use raio_transport::transport::CloseReason;

use crate::harness::{Op, Server, Transport, UNWELCOME, command, serve, serve_plain};
use crate::raw::{Got, Raw};

/// The fixed part of an ordinary hello.
fn hello() -> Hello {
    let bytes = Offer::new("odd").hello();
    let Ok(Parsed::Item((hello, _), _)) = message::parse_handshake::<Hello>(&bytes) else { panic!() };
    hello
}

fn option(kind: u16, flags: u16, value: &[u8]) -> HandshakeOption<'_> {
    HandshakeOption { kind, flags, value }
}

/// Sends a hello that must be rejected with `violation`; what the server says to it. The server goes on.
fn rejected(server: &Server, hello: &[u8], violation: Violation) -> (i32, String) {
    let n = server.until("a look", |seen| Some(seen.closed.len()));
    let mut raw = Raw::client(server);
    raw.send(hello);
    assert_eq!(server.closed(n), CloseReason::Violation(violation));
    let answer = raw.answer().expect("it is told why");
    let (kind, _, text) = &answer.options[0];
    assert_eq!((*kind, answer.welcome.version.get()), (OPTION_TEXT, 0));
    assert_eq!(raw.next(), Got::End);
    server.serves_others();
    (answer.welcome.errno.get().into(), String::from_utf8(text.clone()).unwrap())
}

fn violation_of(error: Error) -> Violation {
    match error {
        Error::Violation(violation) => violation,
        other => panic!("{other:?} is no violation"),
    }
}

/// What a client makes of these bytes as its welcome.
fn client_gets(transport: Transport, offer: Offer, welcome: &[u8]) -> Error {
    let (client, mut raw) = Raw::server_before_handshake(transport, offer);
    raw.handshake_bytes().expect("a hello comes");
    raw.send(welcome);
    drop(raw);
    client.join().unwrap().map(|_| ()).unwrap_err()
}

/// An ordinary welcome, changed.
fn welcome(change: impl FnOnce(&mut Welcome)) -> Vec<u8> {
    let offer = Offer::new("any");
    let Ok(Parsed::Item((_, bytes), _)) = Policy::default().welcome(&offer.hello()) else { panic!() };
    let Ok(Parsed::Item((mut welcome, _), _)) = message::parse_handshake::<Welcome>(&bytes) else { panic!() };
    change(&mut welcome);
    message::encode_handshake(welcome, &[])
}

contract! {
    fn a_client_that_is_too_slow_is_refused(transport) {
        // Enough for others on a busy machine.
        let policy = Policy { handshake_timeout: Duration::from_secs(1), ..Policy::default() };
        let server = serve(transport, policy);
        let mut silent = Raw::client(&server);
        assert_eq!(server.closed(0), CloseReason::Violation(Violation::HandshakeTimeout));
        assert_eq!(i32::from(silent.answer().expect("it is told why").welcome.errno.get()), libc::ETIMEDOUT);
        assert_eq!(silent.next(), Got::End);
        server.serves_others();
        server.until_empty(0);
    }

    fn a_hello_that_is_too_long_is_refused_before_it_is_whole(transport) {
        let server = serve_plain(transport);
        let value = vec![b'x'; HANDSHAKE_BYTES_MAX];
        let long = message::encode_handshake(hello(), &[option(OPTION_NAME, 0, &value)]);
        let (errno, text) = rejected(&server, &long[..200], Violation::HandshakeTooLong);
        assert_eq!(errno, libc::EPROTO);
        assert!(text.contains("longer than allowed"), "{text}");
    }

    fn the_longest_hello_is_taken(transport) {
        let server = serve_plain(transport);
        let value = vec![b'x'; HANDSHAKE_BYTES_MAX - 64 - 8];
        let longest = message::encode_handshake(hello(), &[option(OPTION_NAME, 0, &value)]);
        assert_eq!(longest.len(), HANDSHAKE_BYTES_MAX);
        let mut raw = Raw::client(&server);
        raw.send(&longest);
        assert_eq!(raw.answer().unwrap().welcome.errno.get(), 0);
        let name = server.until("the client", |seen| seen.opened.first().map(|(_, peer)| peer.name.clone()));
        assert_eq!(name.len(), 256, "a name is cut to what a log line can bear");
    }

    fn a_peer_with_another_magic_is_closed_without_a_word(transport) {
        let server = serve_plain(transport);
        let strangers = [&b"GET / HTTP/1.1\r\n\r\n"[..], b"raio\n", b"\0", &[0xff; 4096]];
        for (n, bytes) in strangers.iter().enumerate() {
            let mut raw = Raw::client(&server);
            raw.send(bytes);
            assert_eq!(server.closed(n), CloseReason::Violation(Violation::Magic));
            assert_eq!(raw.next(), Got::End);
        }
        server.serves_others();
        server.until_empty(0);
    }

    fn a_client_of_another_version_is_refused_with_both_versions(transport) {
        let server = serve_plain(transport);
        for (min, max) in [(VERSION + 1, VERSION + 4), (0, VERSION - 1)] {
            let mut hello = hello();
            (hello.version_min, hello.version_max) = (min.into(), max.into());
            let violation = Violation::Version { min, max, ours: VERSION };
            let (errno, text) = rejected(&server, &message::encode_handshake(hello, &[]), violation);
            assert_eq!(errno, libc::EPROTONOSUPPORT);
            assert!(text.contains(&format!("{min} to {max}")), "{text}");
        }
        let mut newer = hello();
        (newer.version_min, newer.version_max) = (0.into(), u16::MAX.into());
        let mut raw = Raw::client(&server);
        raw.send(&message::encode_handshake(newer, &[]));
        assert_eq!(raw.answer().unwrap().welcome.version.get(), VERSION, "what both have is chosen");
        let mut nonsense = hello();
        (nonsense.version_min, nonsense.version_max) = (2.into(), 1.into());
        rejected(&server, &message::encode_handshake(nonsense, &[]), Violation::Field);
    }

    fn an_unknown_option_is_skipped_and_answered_unsupported(transport) {
        let server = serve_plain(transport);
        let mut raw = Raw::client(&server);
        let options = [
            option(0x7fff, 0, b"from the future"),
            option(OPTION_NAME, 0, b"odd"),
            option(0x1234, 0, b""),
        ];
        raw.send(&message::encode_handshake(hello(), &options));
        let answer = raw.answer().unwrap();
        assert_eq!(answer.welcome.errno.get(), 0);
        let server_name = b"raio".to_vec();
        assert_eq!(
            answer.options,
            [
                (0x7fff, OPTION_UNSUPPORTED, vec![]),
                (OPTION_NAME, 0, server_name),
                (0x1234, OPTION_UNSUPPORTED, vec![]),
            ]
        );
        raw.request(1, &command(Op::Echo, 1), &[]);
        assert!(matches!(raw.next(), Got::Response(..)));
    }

    fn an_unknown_option_that_is_required_is_refused(transport) {
        let server = serve_plain(transport);
        let options = [option(0x7fff, OPTION_REQUIRED, b"from the future")];
        let hello = message::encode_handshake(hello(), &options);
        let (errno, text) = rejected(&server, &hello, Violation::RequiredOption(0x7fff));
        assert_eq!(errno, libc::EPROTONOSUPPORT);
        assert!(text.contains("32767"), "{text}");
    }

    fn a_damaged_hello_is_refused(transport) {
        let server = serve_plain(transport);
        let good = Offer::new("damaged").hello();
        for at in [16, 24, 41, 63, 64, 70, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            rejected(&server, &bad, Violation::Checksum);
        }
        let mut reserved = hello();
        reserved.reserved = 1.into();
        rejected(&server, &message::encode_handshake(reserved, &[]), Violation::Reserved);
        rejected(
            &server,
            &message::encode_handshake(hello(), &[option(OPTION_NAME, 1 << 5, b"x")]),
            Violation::Reserved,
        );
    }

    fn garbage_after_the_handshake_closes_that_connection(transport) {
        let server = serve_plain(transport);
        let (mut raw, _) = Raw::open_client(&server, &Offer::new("garbage"));
        raw.send(&[0xa5; 4096]);
        assert_eq!(server.closed(0), CloseReason::Violation(Violation::Kind(0xa5)));
        assert!(raw.goaway().is_some());
        server.serves_others();
    }

    fn a_feature_that_the_server_lacks_is_one_clear_sentence(transport) {
        let server = serve(transport, Policy { features: 0, ..Policy::default() });
        let offer = Offer { features: FEATURE_CRC, requires_crc: true, ..Offer::new("crc") };
        let error = server.connect(&offer).map(|_| ()).unwrap_err();
        assert_eq!(error.errno(), libc::EPROTONOSUPPORT);
        assert!(error.to_string().contains("Connect without"), "{error}");
        server.serves_others();
    }

    fn a_client_says_why_a_server_refused_it(transport) {
        let bytes = Policy::default().rejection(libc::EUSERS, "All seats are taken. Come back later.");
        let error = client_gets(transport, Offer::new("late"), &bytes);
        assert_eq!(error.errno(), libc::EUSERS);
        assert!(error.to_string().contains("All seats are taken"), "{error}");
    }

    fn a_client_that_is_turned_away_hears_why_and_no_other_notices(transport) {
        let server = serve_plain(transport);
        let mut before = server.bystander();
        let error = server.connect(&Offer::new(UNWELCOME)).map(|_| ()).unwrap_err();
        assert_eq!(error.errno(), libc::EUSERS);
        assert!(error.to_string().contains("All seats are taken."), "{error}");
        assert_eq!(server.closed(0), CloseReason::Rejected);
        before.works();
        server.serves_others();
    }

    fn a_client_gives_up_a_server_that_is_none(transport) {
        let offer = || Offer { queue_depth: 8, ..Offer::new("careful") };
        let client_gets = |bytes: &[u8]| violation_of(client_gets(transport, offer(), bytes));
        let good = welcome(|w| w.queue_depth = 8.into());
        let mut damaged = good.clone();
        damaged[30] ^= 1;
        assert_eq!(client_gets(&damaged), Violation::Checksum);
        assert_eq!(client_gets(b"SSH-2.0-OpenSSH_9.2\r\n"), Violation::Magic);
        let mut long = good.clone();
        long[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(client_gets(&long), Violation::HandshakeTooLong);
        for (what, bytes) in [
            ("a version that was not offered", welcome(|w| {
                w.queue_depth = 8.into();
                w.version = (VERSION + 1).into();
            })),
            ("a feature that was not asked for", welcome(|w| {
                w.queue_depth = 8.into();
                w.features = 1.into();
            })),
            ("no request at all", welcome(|w| w.queue_depth = 0.into())),
            ("more requests than asked for", welcome(|w| w.queue_depth = 9.into())),
            ("hardly any data", welcome(|w| { w.queue_depth = 8.into(); w.data_bytes_max = 100.into(); })),
            ("no time at all", welcome(|w| { w.queue_depth = 8.into(); w.keepalive_ms = 0.into(); })),
        ] {
            assert_eq!(client_gets(&bytes), Violation::Field, "{what}");
        }
    }

    fn a_client_gives_up_a_server_that_is_silent_or_goes(transport) {
        // By RDMA it takes longer to be connected at all.
        let time = Duration::from_millis(if transport == Transport::Rdma { 2000 } else { 50 });
        let (client, raw) = Raw::server_with_deadline(transport, Offer::new("patient"), time);
        assert_eq!(client.join().unwrap().map(|_| ()).unwrap_err().errno(), libc::ETIMEDOUT);
        drop(raw);
        let (client, raw) = Raw::server_before_handshake(transport, Offer::new("left"));
        drop(raw);
        let errno = client.join().unwrap().map(|_| ()).unwrap_err().errno();
        assert!([libc::ECONNRESET, libc::EPIPE, libc::ECONNREFUSED].contains(&errno), "{errno}");
    }
}

#[test]
fn a_hello_in_pieces_is_taken_and_what_follows_at_once_too() {
    for transport in Transport::TCP {
        let server = serve_plain(transport);
        let mut raw = Raw::client(&server);
        let mut bytes = Offer::new("pieces").hello();
        // The first request does not wait for the welcome.
        let request = message::RequestHeader::of_command(1);
        request.encode(&command(Op::Echo, 1), false, &mut bytes);
        for byte in bytes {
            raw.stream().write_all(&[byte]).unwrap();
        }
        assert_eq!(raw.answer().unwrap().welcome.errno.get(), 0);
        assert!(matches!(raw.next(), Got::Response(..)));
    }
}

#[test]
fn a_hello_that_trickles_in_is_refused_when_its_time_is_over() {
    let server =
        serve(Transport::TcpEpoll, Policy { handshake_timeout: Duration::from_secs(1), ..Policy::default() });
    let mut raw = Raw::client(&server);
    for byte in Offer::new("trickle").hello() {
        if raw.stream().write_all(&[byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(server.closed(0), CloseReason::Violation(Violation::HandshakeTimeout));
    server.serves_others();
}
