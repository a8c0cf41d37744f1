//! Golden bytes: what docs/PROTOCOL.md says, written out by hand; the checksums are those of an independent
//! implementation. And properties: what is encoded is decoded, and nothing that a peer can send makes
//! decoding panic.

use proptest::prelude::*;

use super::*;

/// Bytes from hex digits; blanks do not matter.
pub(crate) fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u32> =
        text.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_digit(16).unwrap()).collect();
    digits.chunks_exact(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect()
}

const PLAIN: Limits = Limits { crc: false, request_crc: false, data_bytes_max: 1 << 20, pong_time: true };
const CHECKED: Limits = Limits { crc: true, request_crc: false, data_bytes_max: 1 << 20, pong_time: true };

const ID: u64 = 0x0807_0605_0403_0201;

#[test]
fn checksums_are_crc32c_whole_and_in_pieces() {
    // The check value of the catalogue of CRC algorithms.
    assert_eq!(data_crc(b"123456789"), 0xe306_9283);
    let mut digest = crc_digest();
    digest.update(b"1234");
    digest.update(b"56789");
    assert_eq!(digest.finalize(), 0xe306_9283);
}

/// That `encode` makes exactly these bytes and that they are parsed as exactly this message.
#[track_caller]
fn golden(text: &str, limits: &Limits, message: Message<'_>, encode: impl FnOnce(&mut Vec<u8>)) {
    let bytes = hex(text);
    let mut encoded = Vec::new();
    encode(&mut encoded);
    assert_eq!(encoded, bytes, "encoded: {encoded:02x?}");
    assert_eq!(parse(&bytes, limits), Ok(Parsed::Item(message, bytes.len())));
}

fn a_request(region: RemoteRegion) -> RequestHeader {
    RequestHeader { region, ..RequestHeader::of_command(ID) }
}

fn a_response(status: Status) -> ResponseHeader {
    ResponseHeader {
        id: ID,
        body_len: 0,
        data_len: 0,
        status,
        credits: 1,
        result: 0,
        has_crc: false,
        data_crc: 0,
    }
}

#[test]
fn a_request_without_a_body_has_these_bytes() {
    let request = a_request(RemoteRegion::None);
    golden(
        "01 00 00 00  00 00 00 00  01 02 03 04 05 06 07 08
         00 00 00 00 00 00 00 00   00 00 00 00  00 00 00 00
         00 00 00 00  00 00 00 00",
        &PLAIN,
        Message::Request(request, &[]),
        |out| request.encode(&[], false, out),
    );
}

#[test]
fn a_request_with_room_for_data_has_these_bytes() {
    let region = RemoteRegion::In { address: 0x1122_3344_5566_7788, key: 0xaabb_ccdd, len: 0x1000 };
    let request = RequestHeader { body_len: 8, ..a_request(region) };
    golden(
        "01 01 08 00  00 00 00 00  01 02 03 04 05 06 07 08
         88 77 66 55 44 33 22 11   dd cc bb aa  00 10 00 00
         00 00 00 00  00 00 00 00
         61 62 63 00 00 00 00 00",
        &PLAIN,
        Message::Request(request, b"abc\0\0\0\0\0"),
        |out| request.encode(b"abc", false, out),
    );
}

#[test]
fn a_request_with_data_to_be_fetched_has_these_bytes() {
    let region = RemoteRegion::Out { address: 0x1122_3344_5566_7788, key: 1, len: 0x000f_ffff };
    let request = a_request(region);
    golden(
        "01 02 00 00  00 00 00 00  01 02 03 04 05 06 07 08
         88 77 66 55 44 33 22 11   01 00 00 00  ff ff 0f 00
         00 00 00 00  00 00 00 00",
        &PLAIN,
        Message::Request(request, &[]),
        |out| request.encode(&[], false, out),
    );
}

#[test]
fn a_request_with_inline_data_and_checksums_has_these_bytes() {
    let request = RequestHeader {
        body_len: 16,
        data_len: 9,
        has_crc: false,
        data_crc: data_crc(b"some data"),
        ..a_request(RemoteRegion::None)
    };
    golden(
        "01 00 10 00  09 00 00 00  01 02 03 04 05 06 07 08
         00 00 00 00 00 00 00 00   00 00 00 00  00 00 00 00
         d7 44 f6 ac  9b 7e 0a 98
         74 77 65 6c 76 65 20 62 79 74 65 73 00 00 00 00",
        &CHECKED,
        Message::Request(request, b"twelve bytes\0\0\0\0"),
        |out| request.encode(b"twelve bytes", true, out),
    );
}

#[test]
fn a_request_and_a_response_with_checksums_of_their_own_have_these_bytes() {
    let limits = Limits { request_crc: true, ..PLAIN };
    let request = RequestHeader {
        body_len: 16,
        data_len: 9,
        has_crc: true,
        data_crc: data_crc(b"some data"),
        ..a_request(RemoteRegion::None)
    };
    golden(
        "01 80 10 00  09 00 00 00  01 02 03 04 05 06 07 08
         00 00 00 00 00 00 00 00   00 00 00 00  00 00 00 00
         d7 44 f6 ac  c7 3e 02 6a
         74 77 65 6c 76 65 20 62 79 74 65 73 00 00 00 00",
        &limits,
        Message::Request(request, b"twelve bytes\0\0\0\0"),
        |out| request.encode(b"twelve bytes", false, out),
    );
    let status = Status { errno: 5, class: Class::Storage, retryable: true };
    let response = ResponseHeader { has_crc: true, ..a_response(status) };
    golden(
        "02 81 00 00  00 00 00 00  01 02 03 04 05 06 07 08
         05 00 03 00  01 00 00 00  00 00 00 00 00 00 00 00
         00 00 00 00  62 f4 3c 40",
        &limits,
        Message::Response(response, &[]),
        |out| response.encode(&[], false, out),
    );
}

#[test]
fn a_successful_response_has_these_bytes() {
    let response = ResponseHeader { credits: 3, result: 0x1122_3344_5566_7788, ..a_response(Status::OK) };
    golden(
        "02 00 00 00  00 00 00 00  01 02 03 04 05 06 07 08
         00 00 00 00  03 00 00 00  88 77 66 55 44 33 22 11
         00 00 00 00  00 00 00 00",
        &PLAIN,
        Message::Response(response, &[]),
        |out| response.encode(&[], false, out),
    );
}

#[test]
fn a_response_with_data_and_checksums_has_these_bytes() {
    let response = ResponseHeader {
        data_len: 9,
        result: 0x1122_3344_5566_7788,
        has_crc: false,
        data_crc: data_crc(b"some data"),
        ..a_response(Status::OK)
    };
    golden(
        "02 00 00 00  09 00 00 00  01 02 03 04 05 06 07 08
         00 00 00 00  01 00 00 00  88 77 66 55 44 33 22 11
         d7 44 f6 ac  61 7a e5 8e",
        &CHECKED,
        Message::Response(response, &[]),
        |out| response.encode(&[], true, out),
    );
}

#[test]
fn each_class_of_failure_has_these_bytes() {
    for (status, text) in [
        (
            Status::transport(libc::ECONNRESET),
            "02 01 08 00 00 00 00 00 01 02 03 04 05 06 07 08 68 00 01 00 01 00 00 00",
        ),
        (
            Status::protocol(libc::EINVAL),
            "02 00 08 00 00 00 00 00 01 02 03 04 05 06 07 08 16 00 02 00 01 00 00 00",
        ),
        (
            Status::storage(libc::EIO),
            "02 00 08 00 00 00 00 00 01 02 03 04 05 06 07 08 05 00 03 00 01 00 00 00",
        ),
        (
            Status::storage(libc::EAGAIN),
            "02 01 08 00 00 00 00 00 01 02 03 04 05 06 07 08 0b 00 03 00 01 00 00 00",
        ),
        (
            Status::policy(libc::EROFS),
            "02 00 08 00 00 00 00 00 01 02 03 04 05 06 07 08 1e 00 04 00 01 00 00 00",
        ),
    ] {
        let response = ResponseHeader { body_len: 8, ..a_response(status) };
        let text =
            format!("{text} 00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  4f 68 2e 00 00 00 00 00");
        golden(&text, &PLAIN, Message::Response(response, b"Oh.\0\0\0\0\0"), |out| {
            response.encode(b"Oh.", false, out);
        });
    }
}

#[test]
fn pings_and_pongs_have_these_bytes() {
    let rest = "00 00 00  00 00 00 00  07 00 00 00 00 00 00 00
                00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  00 00 00 00";
    golden(&format!("03 {rest} 00 00 00 00"), &PLAIN, Message::Ping(7), |out| encode_ping(7, false, out));
    golden(&format!("03 {rest} 89 c0 2f ce"), &CHECKED, Message::Ping(7), |out| encode_ping(7, true, out));
    golden(&format!("04 {rest} 00 00 00 00"), &PLAIN, Message::Pong(7, 0), |out| {
        encode_pong(7, 0, false, out)
    });
    golden(&format!("04 {rest} bd e2 48 55"), &CHECKED, Message::Pong(7, 0), |out| {
        encode_pong(7, 0, true, out)
    });
}

#[test]
fn a_pong_has_a_time_only_where_that_was_granted() {
    let timed = "04 00 00 00  00 00 00 00  07 00 00 00 00 00 00 00
                 00 00 00 00 00 00 00 00  15 cd 5b 07 00 00 00 00  00 00 00 00  00 00 00 00";
    golden(timed, &PLAIN, Message::Pong(7, 123_456_789), |out| encode_pong(7, 123_456_789, false, out));
    let ungranted = Limits { pong_time: false, ..PLAIN };
    assert_eq!(parse(&hex(timed), &ungranted), Err(Violation::Reserved));
    let mut ping = hex(timed);
    ping[0] = Kind::Ping as u8;
    assert_eq!(parse(&ping, &PLAIN), Err(Violation::Reserved), "only pongs");
}

#[test]
fn goaways_have_these_bytes() {
    golden(
        "05 01 08 00  00 00 00 00  00 00 00 00 00 00 00 00
         6e 00 01 00 00 00 00 00   00 00 00 00 00 00 00 00
         00 00 00 00  c5 57 92 85
         42 79 65 2e 00 00 00 00",
        &CHECKED,
        Message::Goaway(Status::transport(libc::ETIMEDOUT), b"Bye.\0\0\0\0"),
        |out| encode_goaway(Status::transport(libc::ETIMEDOUT), "Bye.", true, out),
    );
    golden(
        "05 00 00 00  00 00 00 00  00 00 00 00 00 00 00 00
         00 00 00 00 00 00 00 00   00 00 00 00 00 00 00 00
         00 00 00 00  00 00 00 00",
        &PLAIN,
        Message::Goaway(Status::OK, &[]),
        |out| encode_goaway(Status::OK, "", false, out),
    );
}

#[test]
fn queue_pairs_have_these_bytes() {
    let ours = QueuePairAddress {
        gid: std::array::from_fn(|n| n as u8 + 0x20),
        qpn: 0x11_2233,
        psn: 0x44_5566,
        peer_psn: 0x77_8899,
        mtu: 4096,
        lid: 0,
        reads: 16,
        link: Link::Ethernet,
    };
    let body = "20 21 22 23 24 25 26 27   28 29 2a 2b 2c 2d 2e 2f
                33 22 11 00  66 55 44 00   99 88 77 00  00 10 00 00
                00 00 10 00 02 00 00 00";
    let header = "06 00 28 00  00 00 00 00   00 00 00 00 00 00 00 00
                  00 00 00 00 00 00 00 00   00 00 00 00 00 00 00 00
                  00 00 00 00";
    golden(&format!("{header} 00 00 00 00 {body}"), &PLAIN, Message::QueuePair(Ok(ours)), |out| {
        encode_queue_pair(Ok(&ours), false, out);
    });
    golden(&format!("{header} c2 7c e8 64 {body}"), &CHECKED, Message::QueuePair(Ok(ours)), |out| {
        encode_queue_pair(Ok(&ours), true, out);
    });
    // Retryable or not: what stays on TCP asks once.
    let status = Status { retryable: false, ..Status::transport(libc::ENODEV) };
    golden(
        "06 00 08 00  00 00 00 00   00 00 00 00 00 00 00 00
         13 00 01 00 00 00 00 00   00 00 00 00 00 00 00 00
         00 00 00 00  00 00 00 00
         4e 6f 6e 65 2e 00 00 00",
        &PLAIN,
        Message::QueuePair(Err((status, b"None.\0\0\0"))),
        |out| encode_queue_pair(Err((Status::transport(libc::ENODEV), "None.")), false, out),
    );
}

#[test]
fn one_way_messages_and_receipts_have_these_bytes() {
    golden(
        "07 00 10 00  00 00 00 00  00 00 00 00 00 00 00 00
         00 00 00 00 00 00 00 00   0c 00 00 00  00 00 00 00
         00 00 00 00  00 00 00 00
         74 77 65 6c 76 65 20 62 79 74 65 73 00 00 00 00",
        &PLAIN,
        Message::OneWay(b"twelve bytes", false),
        |out| encode_one_way(b"twelve bytes", false, false, out),
    );
    golden(
        "07 01 00 00  00 00 00 00  00 00 00 00 00 00 00 00
         00 00 00 00 00 00 00 00   00 00 00 00  00 00 00 00
         00 00 00 00  00 00 00 00",
        &PLAIN,
        Message::OneWay(b"", true),
        |out| encode_one_way(b"", true, false, out),
    );
    for (is_last, flags) in [(false, "00"), (true, "01")] {
        let receipt = Receipt { released: ID, is_last };
        golden(
            &format!(
                "08 {flags} 00 00  00 00 00 00  01 02 03 04 05 06 07 08
                 00 00 00 00 00 00 00 00   00 00 00 00  00 00 00 00
                 00 00 00 00  00 00 00 00"
            ),
            &PLAIN,
            Message::Receipt(receipt),
            |out| encode_receipt(receipt, false, out),
        );
    }
}

#[test]
fn one_way_messages_with_other_lengths_or_reserved_bits_are_found_out() {
    let mut good = Vec::new();
    encode_one_way(b"twelve bytes", true, false, &mut good);
    for (at, value, violation) in [
        (1, 2, Violation::Reserved),              // a flag
        (4, 1, Violation::Reserved),              // data
        (8, 1, Violation::Reserved),              // an id
        (16, 1, Violation::Reserved),             // the middle
        (24, 17, Violation::Length),              // longer than the body
        (24, 8, Violation::Length),               // a whole word shorter
        (26, 1, Violation::Length),               // much longer
        (28, 1, Violation::Reserved),             // behind the length
        (32, 1, Violation::Reserved),             // a checksum
        (good.len() - 1, 1, Violation::Reserved), // padding
    ] {
        let mut bytes = good.clone();
        bytes[at] = value;
        assert_eq!(parse(&bytes, &PLAIN), Err(violation), "at {at}");
    }
    let mut receipt = Vec::new();
    encode_receipt(Receipt { released: 7, is_last: true }, false, &mut receipt);
    for at in [2, 4, 16, 24, 32] {
        let mut bytes = receipt.clone();
        bytes[at] = 8;
        bytes.extend([0; 8]);
        assert_eq!(parse(&bytes, &PLAIN), Err(Violation::Reserved), "at {at}");
    }
    receipt[1] = 2;
    assert_eq!(parse(&receipt, &PLAIN), Err(Violation::Reserved));
}

#[test]
fn a_queue_pair_beyond_its_bounds_is_found_out() {
    let ours = QueuePairAddress {
        gid: [1; 16],
        qpn: 2,
        psn: 0,
        peer_psn: 0xff_ffff,
        mtu: 256,
        lid: 0xbfff,
        reads: 0,
        link: Link::InfiniBand,
    };
    type Change = fn(&mut QueuePairAddress);
    let good: [Change; 4] =
        [|_| (), |a| a.qpn = 0xff_ffff, |a| (a.link, a.lid) = (Link::Ethernet, 0), |a| a.reads = u16::MAX];
    let bad: [Change; 11] = [
        |a| a.gid = [0; 16],
        |a| a.gid[0] = 0xff,
        |a| a.qpn = 1,
        |a| a.qpn = 1 << 24,
        |a| a.psn = 1 << 24,
        |a| a.peer_psn = u32::MAX,
        |a| a.mtu = 128,
        |a| a.mtu = 3000,
        |a| a.lid = 0,
        |a| a.lid = 0xc000,
        |a| a.link = Link::Ethernet,
    ];
    let said = |change: Change| {
        let mut address = ours;
        change(&mut address);
        let mut bytes = Vec::new();
        encode_queue_pair(Ok(&address), false, &mut bytes);
        (address, bytes)
    };
    for change in good {
        let (address, bytes) = said(change);
        let message = Message::QueuePair(Ok(address));
        assert_eq!(parse(&bytes, &PLAIN), Ok(Parsed::Item(message, bytes.len())));
    }
    for (n, change) in bad.into_iter().enumerate() {
        assert_eq!(parse(&said(change).1, &PLAIN), Err(Violation::Field), "number {n}");
    }
}

#[test]
fn options_have_these_bytes() {
    let bytes = hex("01 00 00 00 03 00 00 00  61 62 63 00 00 00 00 00
         ff 7f 02 00 00 00 00 00
         34 12 01 00 08 00 00 00  31 32 33 34 35 36 37 38");
    let options: Vec<_> = parse_options(&bytes).map(Result::unwrap).collect();
    let expected = [
        HandshakeOption { kind: OPTION_NAME, flags: 0, value: b"abc" },
        HandshakeOption { kind: 0x7fff, flags: OPTION_UNSUPPORTED, value: b"" },
        HandshakeOption { kind: 0x1234, flags: OPTION_REQUIRED, value: b"12345678" },
    ];
    assert_eq!(options, expected);
}

#[test]
fn options_that_contradict_their_lengths_are_refused_and_end_the_list() {
    for (text, violation) in [
        ("01 00 00", Violation::Length),
        ("01 00 00 00 09 00 00 00  61 62 63 00 00 00 00 00", Violation::Length),
        ("01 00 00 00 ff ff ff ff  61 62 63 00 00 00 00 00", Violation::Length),
        ("01 00 04 00 03 00 00 00  61 62 63 00 00 00 00 00", Violation::Reserved),
        ("01 00 00 00 03 00 00 00  61 62 63 00 00 00 00 01", Violation::Reserved),
    ] {
        let bytes = hex(text);
        let options: Vec<_> = parse_options(&bytes).collect();
        assert_eq!(options, [Err(violation)], "{text}");
    }
}

#[test]
fn a_sentence_is_cut_between_characters() {
    let long = "ä".repeat(200);
    assert_eq!(clipped(&long).len(), 256);
    let odd = format!("x{long}");
    assert_eq!(clipped(&odd).len(), 255);
    let mut bytes = Vec::new();
    encode_goaway(Status::OK, &odd, false, &mut bytes);
    let Ok(Parsed::Item(Message::Goaway(_, body), _)) = parse(&bytes, &PLAIN) else { panic!() };
    assert_eq!(text(body), clipped(&odd));
}

fn any_status() -> impl Strategy<Value = Status> {
    let failure = (1..=4095, 1u8..=4, any::<bool>()).prop_map(|(errno, class, retryable)| Status {
        errno,
        class: Class::from_wire(class).unwrap(),
        retryable,
    });
    prop_oneof![Just(Status::OK), failure]
}

fn any_region() -> impl Strategy<Value = RemoteRegion> {
    let inner = || (any::<u64>(), any::<u32>(), 0u32..=1 << 20);
    prop_oneof![
        Just(RemoteRegion::None),
        inner().prop_map(|(address, key, len)| RemoteRegion::In { address, key, len }),
        inner().prop_map(|(address, key, len)| RemoteRegion::Out { address, key, len }),
    ]
}

fn any_request() -> impl Strategy<Value = RequestHeader> {
    (any::<u64>(), any_region(), 0u32..=1 << 20, any::<u32>()).prop_map(|(id, region, data_len, data_crc)| {
        let data_len = if matches!(region, RemoteRegion::Out { .. }) { 0 } else { data_len };
        RequestHeader { id, body_len: 0, data_len, region, has_crc: false, data_crc }
    })
}

fn any_response() -> impl Strategy<Value = ResponseHeader> {
    (any::<u64>(), any_status(), 0u32..=1 << 20, any::<u16>(), any::<u64>(), any::<u32>()).prop_map(
        |(id, status, data_len, credits, result, data_crc)| ResponseHeader {
            id,
            body_len: 0,
            data_len,
            status,
            credits,
            result,
            has_crc: false,
            data_crc,
        },
    )
}

fn any_body() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        9 => prop::collection::vec(any::<u8>(), 0..100),
        1 => prop::collection::vec(any::<u8>(), BODY_BYTES_MAX - 20..=BODY_BYTES_MAX),
    ]
}

/// Every kind of message, encoded, and what it must be parsed as.
#[derive(Clone, Debug)]
enum Sample {
    Request(RequestHeader, Vec<u8>),
    Response(ResponseHeader, Vec<u8>),
    Ping(u64),
    Pong(u64, u64),
    Goaway(Status, String),
    QueuePair(QueuePairAddress),
    NoQueuePair(Status, String),
    OneWay(Vec<u8>, bool),
    Receipt(Receipt),
}

fn any_queue_pair() -> impl Strategy<Value = QueuePairAddress> {
    let number = 0u32..1 << 24;
    (
        any::<[u8; 16]>(),
        2u32..1 << 24,
        number.clone(),
        number,
        0u32..5,
        any::<u16>(),
        prop::option::of(1u16..0xc000),
    )
        .prop_map(|(gid, qpn, psn, peer_psn, mtu, reads, lid)| QueuePairAddress {
            gid: [&[gid[0].clamp(1, 0xfe)], &gid[1..]].concat().try_into().unwrap(),
            qpn,
            psn,
            peer_psn,
            mtu: 256 << mtu,
            lid: lid.unwrap_or(0),
            reads,
            link: if lid.is_some() { Link::InfiniBand } else { Link::Ethernet },
        })
}

fn any_sample() -> impl Strategy<Value = Sample> {
    prop_oneof![
        (any_request(), any_body()).prop_map(|(request, body)| Sample::Request(request, body)),
        (any_response(), any_body()).prop_map(|(response, body)| Sample::Response(response, body)),
        any::<u64>().prop_map(Sample::Ping),
        any::<(u64, u64)>().prop_map(|(id, time_ns)| Sample::Pong(id, time_ns)),
        (any_status(), "\\PC{0,300}").prop_map(|(status, text)| Sample::Goaway(status, text)),
        any_queue_pair().prop_map(Sample::QueuePair),
        (any_status(), "\\PC{0,300}")
            .prop_filter("a failure", |(status, _)| !status.is_ok())
            .prop_map(|(status, text)| Sample::NoQueuePair(Status { retryable: false, ..status }, text)),
        (any_body(), any::<bool>()).prop_map(|(message, wants)| Sample::OneWay(message, wants)),
        any::<(u64, bool)>().prop_map(|(released, is_last)| Sample::Receipt(Receipt { released, is_last })),
    ]
}

impl Sample {
    fn encode(&self, crc: bool, out: &mut Vec<u8>) {
        match self {
            Self::Request(request, body) => self.plain_request(request, crc).encode(body, crc, out),
            Self::Response(response, body) => {
                let data_crc = if crc { response.data_crc } else { 0 };
                ResponseHeader { has_crc: false, data_crc, ..*response }.encode(body, crc, out);
            }
            Self::Ping(id) => encode_ping(*id, crc, out),
            Self::Pong(id, time_ns) => encode_pong(*id, *time_ns, crc, out),
            Self::Goaway(status, text) => encode_goaway(*status, text, crc, out),
            Self::QueuePair(address) => encode_queue_pair(Ok(address), crc, out),
            Self::NoQueuePair(status, text) => encode_queue_pair(Err((*status, text)), crc, out),
            Self::OneWay(message, wants_receipt) => encode_one_way(message, *wants_receipt, crc, out),
            Self::Receipt(receipt) => encode_receipt(*receipt, crc, out),
        }
    }

    fn plain_request(&self, request: &RequestHeader, crc: bool) -> RequestHeader {
        RequestHeader { has_crc: false, data_crc: if crc { request.data_crc } else { 0 }, ..*request }
    }

    fn is(&self, message: &Message<'_>, crc: bool) -> bool {
        let padded_body = |body: &[u8]| {
            let mut body = body.to_vec();
            body.resize(padded(body.len()), 0);
            body
        };
        match (self, message) {
            (Self::Request(request, body), Message::Request(got, got_body)) => {
                let body = padded_body(body);
                let expected =
                    RequestHeader { body_len: body.len() as u16, ..self.plain_request(request, crc) };
                *got == expected && *got_body == body
            }
            (Self::Response(response, body), Message::Response(got, got_body)) => {
                let body = padded_body(body);
                let data_crc = if crc { response.data_crc } else { 0 };
                *got == ResponseHeader { body_len: body.len() as u16, has_crc: false, data_crc, ..*response }
                    && *got_body == body
            }
            (Self::Ping(id), Message::Ping(got)) => id == got,
            (Self::Pong(id, time_ns), Message::Pong(got, got_time)) => (id, time_ns) == (got, got_time),
            (Self::Goaway(status, sentence), Message::Goaway(got, body)) => {
                got == status && text(body) == text(sentence.as_bytes())
            }
            (Self::QueuePair(address), Message::QueuePair(got)) => *got == Ok(*address),
            (Self::NoQueuePair(status, sentence), Message::QueuePair(Err((got, body)))) => {
                got == status && text(body) == text(sentence.as_bytes())
            }
            (Self::OneWay(message, wants), Message::OneWay(got, got_wants)) => {
                message == got && wants == got_wants
            }
            (Self::Receipt(receipt), Message::Receipt(got)) => receipt == got,
            _ => false,
        }
    }
}

proptest! {
    #[test]
    fn what_is_encoded_is_parsed(samples in prop::collection::vec(any_sample(), 1..5), crc: bool) {
        let limits = Limits { crc, ..PLAIN };
        let mut bytes = Vec::new();
        samples.iter().for_each(|sample| sample.encode(crc, &mut bytes));
        let mut rest = &bytes[..];
        for sample in &samples {
            let Ok(Parsed::Item(message, taken)) = parse(rest, &limits) else {
                panic!("{:?} for {sample:?}", parse(rest, &limits));
            };
            prop_assert!(sample.is(&message, crc), "{message:?} for {sample:?}");
            rest = &rest[taken..];
        }
        prop_assert!(rest.is_empty());
    }

    #[test]
    fn a_message_that_is_cut_short_needs_exactly_the_rest(
        sample in any_sample(),
        crc: bool,
        cut in 0.0..1.0,
    ) {
        let limits = Limits { crc, ..PLAIN };
        let mut bytes = Vec::new();
        sample.encode(crc, &mut bytes);
        let len = (bytes.len() as f64 * cut) as usize;
        let needed = if len < HEADER_BYTES { HEADER_BYTES } else { bytes.len() };
        prop_assert_eq!(parse(&bytes[..len], &limits), Ok(Parsed::Need(needed)));
    }

    #[test]
    fn a_changed_bit_is_found_where_checksums_are_granted(
        sample in any_sample(),
        bit in any::<prop::sample::Index>(),
    ) {
        let mut bytes = Vec::new();
        sample.encode(true, &mut bytes);
        let bit = bit.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        match parse(&bytes, &CHECKED) {
            Err(_) => {}
            // It seems to be longer now, and the sum would show it when the rest comes.
            Ok(Parsed::Need(n)) => prop_assert!(n > bytes.len()),
            Ok(other) => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn nothing_makes_parsing_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        crc: bool,
        kind in 0u8..8,
    ) {
        let limits = Limits { crc, ..PLAIN };
        let _ = parse(&bytes, &limits);
        // Most random bytes fail at the first field, so give the rest a chance.
        let mut likely = bytes;
        for (at, value) in [(0, kind), (1, 0), (3, 0), (6, 0), (7, 0)] {
            if let Some(byte) = likely.get_mut(at) {
                *byte = value;
            }
        }
        if let Ok(Parsed::Item(_, taken)) = parse(&likely, &limits) {
            prop_assert!(taken <= likely.len());
        }
    }

    #[test]
    fn options_are_parsed_as_they_were_encoded(
        options in prop::collection::vec(
            (any::<u16>(), 0u16..4, prop::collection::vec(any::<u8>(), 0..40)),
            0..8,
        ),
    ) {
        let given: Vec<_> = options
            .iter()
            .map(|(kind, flags, value)| HandshakeOption { kind: *kind, flags: *flags, value })
            .collect();
        let fixed = Hello::read_from_bytes(&[&MAGIC[..], &[0; 56]].concat()).unwrap();
        let bytes = encode_handshake(fixed, &given);
        let Ok(Parsed::Item((hello, tail), taken)) = parse_handshake::<Hello>(&bytes) else { panic!() };
        prop_assert_eq!((taken, hello.options_len.get() as usize), (bytes.len(), tail.len()));
        let got: Vec<_> = parse_options(tail).map(Result::unwrap).collect();
        prop_assert_eq!(got, given);
    }

    #[test]
    fn nothing_makes_parsing_a_handshake_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        len in 0u8..32,
    ) {
        let _ = parse_handshake::<Hello>(&bytes);
        let mut likely = [&MAGIC[..], &bytes].concat();
        if likely.len() >= 16 {
            likely[12..16].copy_from_slice(&[len * 8, 0, 0, 0]);
        }
        let _ = parse_handshake::<Welcome>(&likely);
        let options = parse_options(&bytes).filter(Result::is_ok).count();
        prop_assert!(options <= bytes.len() / 8);
    }

    #[test]
    fn a_checksum_in_pieces_is_that_of_the_whole(
        data in prop::collection::vec(any::<u8>(), 0..500),
        cut in any::<prop::sample::Index>(),
    ) {
        let cut = cut.index(data.len() + 1);
        let (first, second) = data.split_at(cut);
        prop_assert_eq!(crc_of([first, second].into_iter()), data_crc(&data));
        let combined = combined_crc(data_crc(first), data_crc(second), second.len() as u64);
        prop_assert_eq!(combined, data_crc(&data));
        prop_assert_eq!(data_crc(&data), crc32c::crc32c(&data));
    }
}
