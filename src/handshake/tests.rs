//! Golden bytes of the handshake as docs/PROTOCOL.md has it, their checksums from an independent
//! implementation; and what each side makes of the other's.

use proptest::prelude::*;

use super::*;
use crate::message::tests::hex;

const HELLO: &str = "72 61 69 6f 0d 0a 1a 0a  02 00 02 00 10 00 00 00
                     01 00 00 00 00 00 00 00  10 11 12 13 14 15 16 17
                     18 19 1a 1b 1c 1d 1e 1f  00 00 00 00 00 00 00 00
                     20 00 00 00 dc 05 00 00  57 a2 c2 90 00 00 00 00
                     01 00 00 00 06 00 00 00  67 6f 6c 64 65 6e 00 00";

const WELCOME: &str = "72 61 69 6f 0d 0a 1a 0a  02 00 00 00 10 00 00 00
                       01 00 00 00 00 00 00 00  20 21 22 23 24 25 26 27
                       28 29 2a 2b 2c 2d 2e 2f  20 00 00 00 00 00 10 00
                       00 20 00 00 88 13 00 00  6c 15 d2 1d 00 00 00 00
                       01 00 00 00 04 00 00 00  72 61 69 6f 00 00 00 00";

const REFUSAL: &str = "72 61 69 6f 0d 0a 1a 0a  00 00 57 00 10 00 00 00
                       00 00 00 00 00 00 00 00  20 21 22 23 24 25 26 27
                       28 29 2a 2b 2c 2d 2e 2f  00 00 00 00 00 00 00 00
                       00 00 00 00 00 00 00 00  37 f5 9a d9 00 00 00 00
                       02 00 00 00 08 00 00 00  4e 6f 20 73 65 61 74 2e";

fn offer() -> Offer {
    Offer {
        session: SessionId(std::array::from_fn(|n| n as u8 + 0x10)),
        channel: None,
        supersedes: Vec::new(),
        features: FEATURE_CRC,
        requires_crc: true,
        queue_depth: 32,
        keepalive: Duration::from_millis(1500),
        name: "golden".into(),
        queue_pair: false,
        push: PushWindows::NONE,
        tls: None,
    }
}

fn policy() -> Policy {
    Policy { server: std::array::from_fn(|n| n as u8 + 0x20), inline_bytes_max: 8192, ..Policy::default() }
}

fn grant() -> Grant {
    Grant {
        version: 2,
        features: FEATURE_CRC,
        server: policy().server,
        queue_depth: 32,
        data_bytes_max: 1 << 20,
        inline_bytes_max: 8192,
        keepalive: Duration::from_secs(5),
        queue_pair: false,
        linger: Duration::ZERO,
        push: PushWindows::NONE,
    }
}

#[test]
fn a_hello_has_these_bytes() {
    assert_eq!(offer().hello(), hex(HELLO), "{:02x?}", offer().hello());
}

#[test]
fn a_welcome_has_these_bytes() {
    let hello = hex(HELLO);
    let Ok(Parsed::Item((peer, welcome), taken)) = policy().welcome(&hello) else { panic!("not welcome") };
    assert_eq!(welcome, hex(WELCOME), "{welcome:02x?}");
    assert_eq!(taken, hello.len());
    assert_eq!((peer.session, peer.channel, peer.name.as_str()), (offer().session, None, "golden"));
    assert_eq!((peer.keepalive, peer.grant), (Duration::from_millis(1500), grant()));
}

#[test]
fn a_client_that_could_move_to_a_queue_pair_asks_with_these_bytes() {
    const ASKS: &str = "03 00 00 00 00 00 00 00";
    let offer = Offer { queue_pair: true, ..offer() };
    let hello = offer.hello();
    assert_eq!(hello[64..], [&hex(HELLO)[64..], &hex(ASKS)].concat());
    for (queue_pair, answer) in [(true, ASKS), (false, "03 00 02 00 00 00 00 00")] {
        let policy = Policy { queue_pair, ..policy() };
        let Ok(Parsed::Item((peer, welcome), _)) = policy.welcome(&hello) else { panic!("not welcome") };
        assert_eq!(welcome[64..], [&hex(WELCOME)[64..], &hex(answer)].concat());
        assert_eq!(peer.grant, Grant { queue_pair, ..grant() });
        let Ok(Parsed::Item(granted, _)) = offer.grant(&welcome) else { panic!("no grant") };
        assert_eq!(granted, peer.grant);
        // Who has not asked must not be granted it.
        let unasked = Offer { queue_pair: false, ..offer.clone() }.grant(&welcome);
        assert_eq!(matches!(unasked, Err(Error::Violation(Violation::Field))), queue_pair);
    }
}

#[test]
fn a_client_asks_for_a_queue_pair_once_and_says_no_more_about_it() {
    let policy = Policy { queue_pair: true, ..policy() };
    let Ok(Parsed::Item((hello, _), _)) = message::parse_handshake::<message::Hello>(&offer().hello()) else {
        panic!("no hello")
    };
    let option = |value| HandshakeOption { kind: OPTION_QUEUE_PAIR, flags: 0, value };
    for options in [&[option(b"x")][..], &[option(b""), option(b"")]] {
        let bytes = message::encode_handshake(hello, options);
        assert_eq!(policy.welcome(&bytes).err(), Some(Violation::Field));
    }
}

#[test]
fn a_client_names_its_channel_and_the_sessions_that_it_has_given_up_with_these_bytes() {
    const CHANNEL: &str = "04 00 01 00 08 00 00 00  07 00 00 00 10 27 00 00";
    const SUPERSEDE: &str = "05 00 01 00 10 00 00 00  30 31 32 33 34 35 36 37  38 39 3a 3b 3c 3d 3e 3f";
    let channel = ChannelOffer { number: 7, epoch: 0x0102_0304, linger: Duration::from_secs(10) };
    let given_up = SessionId(std::array::from_fn(|n| n as u8 + 0x30));
    let offer = Offer { channel: Some(channel), supersedes: vec![given_up], ..offer() };
    let hello = offer.hello();
    assert_eq!(hello[64..], [&hex(HELLO)[64..], &hex(CHANNEL), &hex(SUPERSEDE)].concat());
    assert_eq!(hello[40..48], hex("04 03 02 01 00 00 00 00"));
    let policy = Policy { linger: Duration::from_secs(5), ..policy() };
    let Ok(Parsed::Item((peer, welcome), _)) = policy.welcome(&hello) else { panic!("not welcome") };
    let granted = ChannelOffer { linger: Duration::from_secs(5), ..channel };
    assert_eq!((peer.channel, &peer.supersedes), (Some(granted), &vec![given_up]));
    assert!(peer.begins_with_outcome() && !peer.is_control());
    let answers = "04 00 00 00 08 00 00 00  07 00 00 00 88 13 00 00  05 00 00 00 00 00 00 00";
    assert_eq!(welcome[64..], [&hex(WELCOME)[64..], &hex(answers)].concat());
    let Ok(Parsed::Item(grant, _)) = offer.grant(&welcome) else { panic!("no grant") };
    assert_eq!(grant.linger, granted.linger);
    // A client that has asked for less, for nothing, or for another channel, must not be granted this.
    let others =
        [ChannelOffer { linger: Duration::from_secs(1), ..channel }, ChannelOffer { number: 8, ..channel }];
    for channel in [None, Some(others[0]), Some(others[1])] {
        let asked = Offer { channel, ..offer.clone() }.grant(&welcome);
        assert!(matches!(asked, Err(Error::Violation(Violation::Field))), "{asked:?}");
    }
}

#[test]
fn a_channel_or_a_supersede_that_makes_no_sense_is_a_violation() {
    let Ok(Parsed::Item((hello, _), _)) = message::parse_handshake::<message::Hello>(&offer().hello()) else {
        panic!("no hello")
    };
    let first = Hello { epoch: U64::new(1), ..hello };
    let option = |kind, value| HandshakeOption { kind, flags: OPTION_REQUIRED, value };
    let (channel, superseded) = ([0; 8], [1; 16 * (SUPERSEDED_MAX + 1)]);
    for (hello, options, violation) in [
        (hello, vec![option(OPTION_CHANNEL, &channel[..])], Violation::Field),
        (first, vec![option(OPTION_CHANNEL, &channel[..]); 2], Violation::Field),
        (first, vec![option(OPTION_CHANNEL, &channel[..7])], Violation::Length),
        (first, vec![option(OPTION_CHANNEL, &[0; 16][..])], Violation::Length),
        (first, vec![option(OPTION_SUPERSEDE, &superseded[..])], Violation::Field),
        (first, vec![option(OPTION_SUPERSEDE, &superseded[..16]); 2], Violation::Field),
        (first, vec![option(OPTION_SUPERSEDE, &superseded[..15])], Violation::Length),
        (first, vec![option(OPTION_SUPERSEDE, &[])], Violation::Field),
    ] {
        let bytes = message::encode_handshake(hello, &options);
        assert_eq!(policy().welcome(&bytes).err(), Some(violation), "{options:?}");
    }
}

#[test]
fn a_refusal_has_these_bytes() {
    assert_eq!(policy().rejection(libc::EUSERS, "No seat."), hex(REFUSAL));
}

#[test]
fn both_ends_agree_on_what_was_granted() {
    let bytes = hex(WELCOME);
    let Ok(Parsed::Item(got, taken)) = offer().grant(&bytes) else { panic!("no grant") };
    assert_eq!((got, taken), (grant(), bytes.len()));
    for len in 0..bytes.len() {
        assert!(matches!(offer().grant(&bytes[..len]), Ok(Parsed::Need(n)) if n > len), "after {len} bytes");
        assert!(
            matches!(policy().welcome(&hex(HELLO)[..len]), Ok(Parsed::Need(n)) if n > len),
            "after {len} bytes"
        );
    }
}

#[test]
fn feature_bits_that_a_side_does_not_know_are_ignored_by_it() {
    let newer = Offer { features: !0, ..offer() };
    let Ok(Parsed::Item((peer, welcome), _)) = policy().welcome(&newer.hello()) else { panic!("no welcome") };
    assert_eq!(peer.grant.features, policy().features, "the server grants what it has");
    let Ok(Parsed::Item(granted, _)) = newer.grant(&welcome) else { panic!("no grant") };
    assert_eq!(granted, peer.grant);
    // A server that says more than it was asked.
    let Ok(Parsed::Item((parts, _), _)) = message::parse_handshake::<Welcome>(&welcome) else {
        panic!("no welcome")
    };
    let features = U64::new(OPERATION_FEATURES_MASK | FEATURE_CRC);
    let bytes = message::encode_handshake(Welcome { features, ..parts }, &[]);
    let Ok(Parsed::Item(granted, _)) = offer().grant(&bytes) else { panic!("no grant") };
    assert_eq!(granted.features, FEATURE_CRC, "operations that were not asked for mean nothing");
    let bytes = message::encode_handshake(Welcome { features: U64::new(!0), ..parts }, &[]);
    assert!(offer().grant(&bytes).is_err(), "what changes the messages must have been asked for");
}

#[test]
fn a_refusal_is_read_with_its_sentence() {
    match offer().grant(&hex(REFUSAL)) {
        Err(Error::Rejected { status, text }) => {
            assert_eq!((status, text.as_str()), (Status::policy(libc::EUSERS), "No seat."));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_windows_of_unsolicited_messages_have_these_bytes() {
    let offer = Offer { push: PushWindows { to_server: 1, to_client: 0x203, requests: 4 }, ..offer() };
    let hello = offer.hello();
    assert_eq!(&hello[hello.len() - 16..], hex("06 00 00 00 08 00 00 00  01 00 03 02 04 00 00 00"));
    let policy = Policy { push: PushWindows { to_server: 9, to_client: 2, requests: 0 }, ..policy() };
    let Ok(Parsed::Item((_, welcome), _)) = policy.welcome(&hello) else { panic!("not welcome") };
    assert_eq!(&welcome[welcome.len() - 16..], hex("06 00 00 00 08 00 00 00  01 00 02 00 00 00 00 00"));
}

#[test]
fn a_server_that_grants_more_than_was_offered_or_reserved_bits_break_the_protocol() {
    let generous = |push: PushWindows, value: &[u8]| {
        let offer = Offer { push, ..offer() };
        let Ok(Parsed::Item((_, welcome), _)) = policy().welcome(&Offer { push, ..offer.clone() }.hello())
        else {
            panic!("not welcome")
        };
        let Ok(Parsed::Item((fixed, _), _)) = message::parse_handshake::<Welcome>(&welcome) else { panic!() };
        let option = HandshakeOption { kind: OPTION_PUSH, flags: 0, value };
        offer.grant(&message::encode_handshake(fixed, &[option])).err().map(|error| error.errno())
    };
    let push = PushWindows { to_server: 1, to_client: 2, requests: 3 };
    assert_eq!(generous(push, &[1, 0, 2, 0, 3, 0, 0, 0]), None);
    for value in [
        [2, 0, 2, 0, 3, 0, 0, 0],
        [1, 0, 3, 0, 3, 0, 0, 0],
        [1, 0, 2, 0, 4, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],
    ] {
        assert_eq!(generous(push, &value), Some(libc::EPROTO), "{value:?}");
    }
    assert_eq!(generous(push, &[0; 7]), Some(libc::EPROTO));
    assert_eq!(generous(PushWindows::NONE, &[1, 0, 0, 0, 0, 0, 0, 0]), Some(libc::EPROTO));
}

#[test]
fn a_wrong_first_byte_is_enough_to_tell() {
    for bytes in [&b"R"[..], b"rai0", b"raio\n"] {
        assert!(matches!(policy().welcome(bytes), Err(Violation::Magic)));
        assert!(matches!(offer().grant(bytes), Err(Error::Violation(Violation::Magic))));
    }
    assert!(matches!(policy().welcome(b"raio\r\n"), Ok(Parsed::Need(64))));
}

#[test]
fn a_keepalive_out_of_bounds_is_clamped_and_an_errno_out_of_bounds_is_a_violation() {
    for (said, taken) in
        [(1, 100), (99, 100), (5_000, 5_000), (60_001, 60_000), (u64::from(u32::MAX), 60_000)]
    {
        let policy = Policy { keepalive: Duration::from_millis(said), ..policy() };
        let offer = Offer::new("client");
        let Ok(Parsed::Item((_, welcome), _)) = policy.welcome(&offer.hello()) else { panic!("not welcome") };
        let Ok(Parsed::Item(grant, _)) = offer.grant(&welcome) else { panic!("no grant") };
        assert_eq!(grant.keepalive, Duration::from_millis(taken));
    }
    let rejected = |errno| Offer::new("client").grant(&policy().rejection(errno, "no")).unwrap_err().errno();
    assert_eq!([1, 4_095, 4_096, 65_535].map(rejected), [1, 4_095, libc::EPROTO, libc::EPROTO]);
}

#[test]
fn the_text_of_a_peer_stays_on_one_line_and_has_no_control_characters() {
    let nasty = "a\nb\r\x1b[31mc\t\u{9b}d\u{2028}e\u{202e}f\x7f";
    let clean = "a?b??[31mc??d?e?f?";
    let error = Offer::new("client").grant(&policy().rejection(libc::EPERM, nasty)).unwrap_err();
    assert!(error.to_string().ends_with(&format!(": {clean}")), "{error}");
    let Ok(Parsed::Item((peer, _), _)) = policy().welcome(&Offer::new(nasty).hello()) else {
        panic!("not welcome")
    };
    assert_eq!(peer.name, clean);
    assert_eq!(message::text(&[&[b'x'; 300][..], &[0; 4]].concat()), "x".repeat(256));
}

#[test]
fn a_session_id_is_in_no_debug_output() {
    let offer = Offer { session: SessionId([0xab; 16]), ..Offer::new("client") };
    let Ok(Parsed::Item((peer, _), _)) = policy().welcome(&offer.hello()) else { panic!("not welcome") };
    for text in [format!("{offer:?}"), format!("{peer:?}"), format!("{:x?}", offer.session)] {
        assert!(!text.contains("171") && !text.contains("ab,"), "{text}");
    }
}

proptest! {
    #[test]
    fn any_offer_and_any_policy_end_in_the_same_grant_on_both_sides(
        session: [u8; 16],
        channel: Option<(u32, u64, u32)>,
        wants_crc: bool,
        wants_queue_pair: bool,
        superseded in prop::collection::vec(any::<[u8; 16]>(), 0..=SUPERSEDED_MAX),
        has_queue_pairs: bool,
        queue_depth in prop_oneof![Just(0u32), 1u32..200_000],
        keepalive_ms in 0u32..1_000_000,
        name in "\\PC{0,300}",
        depth_max in 1u32..=65_534,
        data_bytes_max in 4096u32..=u32::MAX,
        inline_bytes_max: u32,
        policy_keepalive_ms in 100u32..60_000,
        push: [u16; 3],
        push_max: [u16; 3],
    ) {
        let windows = |[to_server, to_client, requests]: [u16; 3]| {
            PushWindows { to_server, to_client, requests }
        };
        let channel = channel.map(|(number, epoch, linger_ms)| ChannelOffer {
            number,
            epoch: epoch.max(1),
            linger: Duration::from_millis(linger_ms.into()),
        });
        let offer = Offer {
            session: SessionId(session),
            channel,
            supersedes: superseded.iter().copied().map(SessionId).collect(),
            features: if wants_crc { FEATURE_CRC } else { 0 },
            requires_crc: wants_crc,
            queue_depth,
            keepalive: Duration::from_millis(keepalive_ms.into()),
            name: name.clone(),
            queue_pair: wants_queue_pair,
            push: windows(push),
            tls: None,
        };
        let policy = Policy {
            queue_depth: depth_max,
            data_bytes_max,
            inline_bytes_max,
            keepalive: Duration::from_millis(policy_keepalive_ms.into()),
            queue_pair: has_queue_pairs,
            push: windows(push_max),
            ..Policy::default()
        };
        let Ok(Parsed::Item((peer, welcome), _)) = policy.welcome(&offer.hello()) else {
            panic!("not welcome")
        };
        let Ok(Parsed::Item(grant, _)) = offer.grant(&welcome) else { panic!("{:?}", offer.grant(&welcome)) };
        prop_assert_eq!(grant, peer.grant);
        let said = (peer.session, &peer.supersedes, peer.keepalive);
        prop_assert_eq!(said, (SessionId(session), &offer.supersedes, offer.keepalive));
        let linger = |channel: ChannelOffer| channel.linger.min(policy.linger);
        let granted = channel.map(|channel| ChannelOffer { linger: linger(channel), ..channel });
        prop_assert_eq!(peer.channel, granted);
        prop_assert_eq!(grant.linger, granted.map_or(Duration::ZERO, |channel| channel.linger));
        prop_assert_eq!(peer.name, message::text(name.as_bytes()));
        prop_assert_eq!(grant.crc(), wants_crc);
        prop_assert_eq!(grant.queue_pair, wants_queue_pair && has_queue_pairs);
        prop_assert!(grant.queue_depth >= 1 && grant.queue_depth <= depth_max);
        prop_assert!(queue_depth == 0 || grant.queue_depth <= queue_depth);
        let granted = std::array::from_fn(|n| push[n].min(push_max[n]));
        prop_assert_eq!(grant.push, windows(granted));
    }

    #[test]
    fn no_byte_of_a_handshake_can_change_unnoticed(at in any::<prop::sample::Index>(), change in 1u8..) {
        let mut hello = hex(HELLO);
        let index = at.index(hello.len());
        hello[index] ^= change;
        prop_assert!(!matches!(policy().welcome(&hello), Ok(Parsed::Item(..))));
        let mut welcome = hex(WELCOME);
        welcome[index] ^= change;
        prop_assert!(!matches!(offer().grant(&welcome), Ok(Parsed::Item(..))));
    }

    #[test]
    fn nothing_makes_either_side_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = policy().welcome(&bytes);
        let _ = offer().grant(&bytes);
        // The same with a sum that is right, so that more than the sum is looked at.
        if bytes.len() >= 48 {
            let fixed = [&MAGIC[..], &bytes[..48], &[0; 8]].concat();
            let options = &bytes[48..];
            let options: Vec<_> = options
                .chunks(20)
                .map(|value| {
                    HandshakeOption { kind: value[0].into(), flags: u16::from(value[0] >> 6), value }
                })
                .collect();
            let hello = zerocopy::FromBytes::read_from_bytes(&fixed).unwrap();
            let _ = policy().welcome(&message::encode_handshake::<message::Hello>(hello, &options));
            let welcome = zerocopy::FromBytes::read_from_bytes(&fixed).unwrap();
            let _ = offer().grant(&message::encode_handshake::<Welcome>(welcome, &options));
        }
    }
}
