use std::io::IoSlice;

use proptest::prelude::*;

use super::records::TlsRecords;
use super::*;
use crate::error::{Error, Violation};

const NEVER: u64 = u64::MAX;

struct Handshakes {
    client: Handshake,
    server: Handshake,
}

impl Handshakes {
    fn new(records_per_key: u64) -> Self {
        let (client_key, server_key) = (SecretKey::generate(), SecretKey::generate());
        let client = ClientTls::new(&client_key, &[server_key.public()]);
        let server = ServerTls::new(&server_key, move |key| *key == client_key.public());
        Self {
            client: Handshake::client(&client.with_records_per_key(records_per_key)).unwrap(),
            server: Handshake::server(&server.with_records_per_key(records_per_key)).unwrap(),
        }
    }

    /// All three flights, each as `change` makes it. Whether both sides are done with it.
    fn shake(&mut self, mut change: impl FnMut(usize, &mut Vec<u8>)) -> Result<bool, Error> {
        assert!(!self.client.advance(&[])?);
        let mut done = [false; 2];
        for flight in 0..3 {
            let (from, to) = if flight == 1 {
                (&mut self.server, &mut self.client)
            } else {
                (&mut self.client, &mut self.server)
            };
            let mut bytes = from.unsent().to_vec();
            from.on_sent(bytes.len());
            change(flight, &mut bytes);
            done[usize::from(flight == 1)] = to.advance(&bytes)?;
        }
        Ok(done == [true; 2])
    }

    fn into_records(self) -> (TlsRecords, TlsRecords) {
        let (client, rest) = self.client.into_records().unwrap();
        assert!(rest.is_empty());
        let (server, rest) = self.server.into_records().unwrap();
        assert!(rest.is_empty());
        (client, server)
    }
}

/// Both sides' layers after a handshake, the client's first.
pub(crate) fn pair(records_per_key: u64) -> (TlsRecords, TlsRecords) {
    let mut handshakes = Handshakes::new(records_per_key);
    assert!(handshakes.shake(|_, _| ()).unwrap());
    handshakes.into_records()
}

fn sealed(records: &mut TlsRecords, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    records.seal([data].into_iter(), data.len(), &mut out);
    out
}

/// What these bytes open to, received at once.
fn opened(records: &mut TlsRecords, mut bytes: Vec<u8>) -> Result<Vec<u8>, Violation> {
    let (first, rest) = records.open_away(&mut bytes)?;
    Ok([&first, &bytes[rest]].concat())
}

fn data(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

#[test]
fn flights_may_come_in_any_pieces() {
    let mut handshakes = Handshakes::new(NEVER);
    let Handshakes { client, server } = &mut handshakes;
    assert!(!client.advance(&[]).unwrap());
    for (flight, (from, to)) in [(0, (0, 1)), (1, (1, 0)), (2, (0, 1))] {
        let bytes = [&*client, &*server][from].unsent().to_vec();
        [&mut *client, &mut *server][from].on_sent(bytes.len());
        for (at, byte) in bytes.iter().enumerate() {
            let done = [&mut *client, &mut *server][to].advance(&[*byte]).unwrap();
            assert_eq!(done, flight > 0 && at + 1 == bytes.len());
        }
    }
}

/// Takes in as much of this as the handshake wants, record by record. Whether that ends it.
fn read_by_record(handshake: &mut Handshake, bytes: &mut Vec<u8>) -> bool {
    while !bytes.is_empty() {
        let piece: Vec<u8> = bytes.drain(..handshake.wanted().min(bytes.len())).collect();
        if handshake.advance(&piece).unwrap() {
            return true;
        }
    }
    false
}

#[test]
fn a_handshake_that_is_read_by_records_leaves_those_behind_it_where_they_are() {
    for behind in [&b"behind"[..], &[]] {
        let Handshakes { mut client, mut server } = Handshakes::new(NEVER);
        assert!(!client.advance(&[]).unwrap());
        let mut flight = client.unsent().to_vec();
        client.on_sent(flight.len());
        assert!(!read_by_record(&mut server, &mut flight));
        let mut flight = server.unsent().to_vec();
        server.on_sent(flight.len());
        assert!(read_by_record(&mut client, &mut flight));
        let mut flight = [client.unsent(), behind].concat();
        assert!(read_by_record(&mut server, &mut flight));
        assert_eq!(flight, behind);
        let (_, keys) = server.into_kernel_keys().unwrap();
        // Of AES-128-GCM, from the first record on.
        for info in [keys.sending, keys.receiving] {
            assert_eq!((info.bytes().len(), &info.bytes()[32..]), (40, &[0; 8][..]));
        }
    }
    // One that was read too far cannot go on in the kernel.
    let mut handshakes = Handshakes::new(NEVER);
    let read_too_far = |flight, bytes: &mut Vec<u8>| bytes.extend(&b"x"[..usize::from(flight == 2)]);
    assert!(handshakes.shake(read_too_far).unwrap());
    assert!(handshakes.server.into_kernel_keys().is_err());
}

#[test]
fn a_handshake_with_a_changed_byte_fails_on_one_side_at_least() {
    let mut lengths = [0; 3];
    assert!(Handshakes::new(NEVER).shake(|flight, bytes| lengths[flight] = bytes.len()).unwrap());
    for (flight, len) in lengths.into_iter().enumerate() {
        for at in 0..len {
            let mut handshakes = Handshakes::new(NEVER);
            let outcome = handshakes.shake(|of, bytes| {
                if let Some(byte) = bytes.get_mut(at).filter(|_| of == flight) {
                    *byte ^= 0x40;
                }
            });
            // Ignored: a record's legacy version, and the content of change_cipher_spec.
            if matches!(outcome, Ok(true)) {
                let (mut client, mut server) = handshakes.into_records();
                assert_eq!(opened(&mut server, sealed(&mut client, b"hello")).unwrap(), b"hello");
            }
        }
    }
}

#[test]
fn a_handshake_cut_short_does_not_end() {
    let mut lengths = [0; 3];
    assert!(Handshakes::new(NEVER).shake(|flight, bytes| lengths[flight] = bytes.len()).unwrap());
    for (flight, len) in lengths.into_iter().enumerate() {
        for end in 0..len {
            let cut = |of, bytes: &mut Vec<u8>| {
                if of == flight {
                    bytes.truncate(end);
                }
            };
            assert!(!Handshakes::new(NEVER).shake(cut).unwrap(), "flight {flight}, {end} of {len} bytes");
        }
    }
}

#[test]
fn records_are_damaged_by_any_bit_and_nothing_of_them_is_used() {
    for at in 0..8 * 40 {
        let (mut client, mut server) = pair(NEVER);
        let mut bytes = sealed(&mut client, &data(18));
        assert_eq!(bytes.len(), 40);
        bytes[at / 8] ^= 1 << (at % 8);
        match opened(&mut server, bytes) {
            Err(violation) => assert_eq!(violation, Violation::Record),
            // It seems to be longer.
            Ok(opened) => assert!(opened.is_empty() && (3 * 8..5 * 8).contains(&at), "bit {at}"),
        }
    }
}

#[test]
fn records_that_are_repeated_left_out_or_exchanged_are_not_opened() {
    for order in [&[0, 0][..], &[1], &[0, 2], &[1, 0]] {
        let (mut client, mut server) = pair(NEVER);
        let records = [0, 1, 2].map(|n| sealed(&mut client, &[n; 9]));
        let outcomes: Vec<_> = order.iter().map(|&at| opened(&mut server, records[at].clone())).collect();
        assert_eq!(*outcomes.last().unwrap(), Err(Violation::Record), "{order:?}");
    }
    // Nor are a side's own.
    let (mut client, _) = pair(NEVER);
    let own = sealed(&mut client, b"data");
    assert_eq!(opened(&mut client, own), Err(Violation::Record));
}

#[test]
fn keys_change_after_so_many_records_and_when_the_peer_asks() {
    let (mut client, mut server) = pair(3);
    for round in 0..20 {
        let bytes = data(40_000 + round);
        let records = sealed(&mut client, &bytes);
        assert_eq!(opened(&mut server, records), Ok(bytes));
        // With the one that announces the next key.
        assert!(client.sealed_by_key() <= 3 + 1);
    }
    for (answers, by_key) in [(0, 1), (0, 2), (1, 1)] {
        if answers > 0 {
            let mut request = Vec::new();
            client.request_update(&mut request);
            assert!(opened(&mut server, request).unwrap().is_empty());
        }
        let records = sealed(&mut server, b"data");
        assert_eq!(opened(&mut client, records).unwrap(), b"data");
        assert_eq!(server.sealed_by_key(), by_key);
    }
}

#[test]
fn changes_of_keys_without_data_in_between_are_limited() {
    let (mut client, mut server) = pair(NEVER);
    let mut outcome = Ok(Vec::new());
    let mut count = 0;
    while outcome.is_ok() {
        assert!(count < 100);
        let mut update = Vec::new();
        client.request_update(&mut update);
        outcome = opened(&mut server, update);
        count += 1;
    }
    assert_eq!((outcome, count), (Err(Violation::Record), 17));
}

#[test]
fn nothing_comes_after_the_end() {
    let (mut client, mut server) = pair(NEVER);
    let mut bytes = sealed(&mut client, b"last");
    client.seal_end(&mut bytes);
    assert_eq!(opened(&mut server, bytes).unwrap(), b"last");
    let more = sealed(&mut client, b"more");
    assert_eq!(opened(&mut server, more), Err(Violation::Record));
}

#[test]
fn records_of_other_kinds_and_shapes_are_violations() {
    let outcome = |kind, data: &[u8]| {
        let (mut client, mut server) = pair(NEVER);
        let mut out = Vec::new();
        client.seal_as(kind, data, &mut out);
        opened(&mut server, out)
    };
    assert_eq!(outcome(23, b"data").unwrap(), b"data");
    assert_eq!(outcome(23, b"").unwrap(), b"");
    // A handshake message that is none, half of one, a ticket, heartbeats, an alert of no length.
    for (kind, data) in
        [(22, &b""[..]), (22, &[24, 0, 0, 1]), (22, &[4, 0, 0, 0]), (24, b"x"), (20, &[1]), (21, b"")]
    {
        assert_eq!(outcome(kind, data), Err(Violation::Record), "{kind} {data:?}");
    }
    assert_eq!(outcome(21, &[2, 40]), Err(Violation::Alert(40)));
    // Zeros behind the type are padding; nothing but that is no record.
    assert_eq!(outcome(0, b"data\x17\0\0").unwrap(), b"data");
    assert_eq!(outcome(0, b"\0\0"), Err(Violation::Record));
    // The most that may be in one, and more.
    assert_eq!(outcome(23, &data(16 << 10)).unwrap().len(), 16 << 10);
    assert_eq!(outcome(23, &data((16 << 10) + 1)), Err(Violation::Record));
    // In the clear, too short, and longer than any.
    for bytes in [&[22, 3, 3, 0, 1, 0][..], &[23, 3, 3, 0, 1, 0], &[23, 3, 3, 0xff, 0xff]] {
        assert_eq!(opened(&mut pair(NEVER).1, bytes.to_vec()), Err(Violation::Record), "{bytes:?}");
    }
}

#[test]
fn what_is_sent_in_parts_is_sealed_once() {
    let (mut client, mut server) = pair(NEVER);
    let plain = data(100_000);
    let (mut gone, mut wire) = (0, Vec::new());
    while gone < plain.len() {
        let slices = [
            IoSlice::new(&plain[gone..plain.len().min(gone + 7)]),
            IoSlice::new(&plain[plain.len().min(gone + 7)..]),
        ];
        let bytes = client.unsent(&slices, 30_000);
        let n = bytes.len().min(1_000);
        wire.extend_from_slice(&bytes[..n]);
        gone += client.on_sent(n);
    }
    assert_eq!(opened(&mut server, wire), Ok(plain));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// In place, as a client does, and away, as a server does.
    #[test]
    fn data_passes_whole_however_it_is_cut(
        lengths in prop::collection::vec(0..40_000_usize, 1..6),
        cuts in prop::collection::vec(1..20_000_usize, 1..40),
        records_per_key in 1..9_u64,
    ) {
        let (mut client, mut server) = pair(records_per_key);
        let all = data(lengths.iter().sum());
        let (mut wire, mut at) = (Vec::new(), 0);
        for len in lengths {
            client.seal([&all[at..at + len / 3], &all[at + len / 3..at + len]].into_iter(), len, &mut wire);
            at += len;
        }
        let (mut away, mut taken) = (Vec::new(), 0);
        for cut in cuts.iter().cycle() {
            let end = wire.len().min(taken + cut);
            away.extend(opened(&mut server, wire[taken..end].to_vec()).unwrap());
            taken = end;
            if taken == wire.len() {
                break;
            }
        }
        prop_assert!(away == all);

        // The other way, in place.
        let (mut client, mut server) = pair(records_per_key);
        let wire = sealed(&mut server, &all);
        let mut buffer = vec![0; all.len() + 50_000];
        let (mut end, mut taken) = (0, 0);
        for cut in cuts.iter().cycle() {
            let n = (wire.len() - taken).min(*cut);
            let held = client.held();
            buffer[end + held..end + held + n].copy_from_slice(&wire[taken..taken + n]);
            end += client.open(&mut buffer, end..end + held + n).unwrap();
            taken += n;
            if taken == wire.len() {
                break;
            }
        }
        prop_assert!(buffer[..end] == all[..]);
    }
}
