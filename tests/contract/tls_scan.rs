//! What a server offers to those who ask for other TLS than its own: a scanner, which sends hellos made by
//! hand, and reads what the server chooses or refuses.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::harness::{PATIENCE, tcp_pair};
use crate::tls_peer::{accept, server_tls};

const AES_128_GCM: u16 = 0x1301;
const CHACHA20: u16 = 0x1303;
const X25519: u16 = 29;
const ED25519: u16 = 0x0807;
const RAW_PUBLIC_KEY: u8 = 2;
const TLS_1_3: u16 = 0x0304;

/// The random of a ServerHello that asks for another hello (RFC 8446, section 4.1.3).
const RETRY: [u8; 8] = [0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11];

/// A ClientHello.
struct Hello {
    versions: Vec<u16>,
    suites: Vec<u16>,
    groups: Vec<u16>,
    /// Whether it has a share of X25519.
    has_share: bool,
    signatures: Vec<u16>,
    certificate_types: Vec<u8>,
    alpn: &'static [u8],
    /// It resumes a session, and has early data.
    resumes: bool,
}

impl Default for Hello {
    fn default() -> Self {
        Self {
            versions: vec![TLS_1_3],
            suites: vec![AES_128_GCM],
            groups: vec![X25519],
            has_share: true,
            signatures: vec![ED25519],
            certificate_types: vec![RAW_PUBLIC_KEY],
            alpn: b"raio/2",
            resumes: false,
        }
    }
}

/// What the server says first.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// A ServerHello with this suite; with `retry` a HelloRetryRequest.
    Hello {
        suite: u16,
        retry: bool,
        /// It has resumed a session.
        resumed: bool,
        /// It has ended the connection all the same, without an answer from the client.
        ended: bool,
    },
    Alert(u8),
    /// It has closed the connection.
    Nothing,
}

/// A vector of TLS: its length, in `length_bytes` bytes, and its content.
fn vector(length_bytes: usize, content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u32).to_be_bytes();
    [&length[4 - length_bytes..], content].concat()
}

fn numbers(all: &[u16]) -> Vec<u8> {
    all.iter().flat_map(|number| number.to_be_bytes()).collect()
}

fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &vector(2, content)].concat()
}

impl Hello {
    fn encode(&self) -> Vec<u8> {
        let share = [&X25519.to_be_bytes()[..], &vector(2, &[9; 32])].concat();
        let shares = if self.has_share { share } else { Vec::new() };
        let mut extensions = [
            extension(43, &vector(1, &numbers(&self.versions))),
            extension(10, &vector(2, &numbers(&self.groups))),
            extension(13, &vector(2, &numbers(&self.signatures))),
            extension(51, &vector(2, &shares)),
            extension(16, &vector(2, &vector(1, self.alpn))),
        ]
        .concat();
        if !self.certificate_types.is_empty() {
            for kind in [19, 20] {
                extensions.extend(extension(kind, &vector(1, &self.certificate_types)));
            }
        }
        if self.resumes {
            extensions.extend(extension(45, &vector(1, &[1])));
            extensions.extend(extension(42, &[]));
            let identity = [vector(2, &[7; 32]), vec![0; 4]].concat();
            let binders = vector(2, &vector(1, &[8; 32]));
            extensions.extend(extension(41, &[vector(2, &identity), binders].concat()));
        }
        let body = [
            &[3, 3][..],
            &[5; 32],
            &vector(1, &[6; 32]),
            &vector(2, &numbers(&self.suites)),
            &vector(1, &[0]),
            &vector(2, &extensions),
        ]
        .concat();
        let message = [&[1][..], &vector(3, &body)].concat();
        [&[22, 3, 1][..], &vector(2, &message)].concat()
    }

    /// What a server answers to it.
    fn ask(&self) -> Answer {
        let (mut ours, theirs) = tcp_pair();
        ours.set_nonblocking(false).unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let server = std::thread::spawn(move || accept(theirs, &server_tls()).map(drop));
        ours.write_all(&self.encode()).unwrap();
        let mut record = [0; 5];
        let answer = match ours.read_exact(&mut record) {
            Err(_) => Answer::Nothing,
            Ok(()) => {
                let mut content = vec![0; usize::from(u16::from_be_bytes([record[3], record[4]]))];
                ours.read_exact(&mut content).unwrap();
                match (record[0], content[0]) {
                    (21, _) => Answer::Alert(content[1]),
                    (22, 2) => server_hello(&content[4..], ends(&mut ours)),
                    other => panic!("a record and a message of types {other:?}"),
                }
            }
        };
        drop(ours);
        assert!(server.join().unwrap().is_err());
        answer
    }
}

/// Whether a server says something more, and closes the connection, while the client waits.
fn ends(server: &mut TcpStream) -> bool {
    server.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    server.read_to_end(&mut Vec::new()).is_ok()
}

fn server_hello(body: &[u8], ended: bool) -> Answer {
    let after_id = 35 + usize::from(body[34]);
    let suite = u16::from_be_bytes([body[after_id], body[after_id + 1]]);
    let mut extensions = &body[after_id + 5..];
    let mut resumed = false;
    while let [one, two, three, four, rest @ ..] = extensions {
        resumed |= u16::from_be_bytes([*one, *two]) == 41;
        extensions = &rest[usize::from(u16::from_be_bytes([*three, *four]))..];
    }
    Answer::Hello { suite, retry: body[2..10] == RETRY, resumed, ended }
}

fn is_refused(hello: &Hello) -> bool {
    // handshake_failure, illegal_parameter, protocol_version, unsupported_certificate,
    // no_application_protocol
    matches!(hello.ask(), Answer::Alert(40 | 47 | 70 | 43 | 120) | Answer::Hello { ended: true, .. })
}

#[test]
fn two_suites_of_tls_1_3_are_offered_and_no_others() {
    let accepts = |&suite: &u16| {
        let answer = Hello { suites: vec![suite], ..Hello::default() }.ask();
        match answer {
            Answer::Hello { suite: chosen, retry: false, .. } => chosen == suite,
            Answer::Alert(40) => false,
            other => panic!("{suite:#x}: {other:?}"),
        }
    };
    // Those of TLS 1.3, and some of TLS 1.2 and before.
    let all =
        [0x1301, 0x1302, 0x1303, 0x1304, 0x1305, 0xc02b, 0xc02f, 0xcca9, 0xc009, 0x009c, 0x002f, 0x0005];
    assert_eq!(all.iter().copied().filter(accepts).collect::<Vec<_>>(), [AES_128_GCM, CHACHA20]);
}

#[test]
fn one_group_is_offered_and_no_other() {
    let accepts = |&group: &u16| {
        let answer = Hello { groups: vec![group], has_share: false, ..Hello::default() }.ask();
        match answer {
            Answer::Hello { retry: true, .. } => true,
            Answer::Alert(40) => false,
            other => panic!("{group}: {other:?}"),
        }
    };
    // secp256r1, secp384r1, secp521r1, x25519, x448, ffdhe2048 to 8192, X25519MLKEM768
    let all = [23, 24, 25, 29, 30, 256, 257, 258, 259, 260, 0x11ec];
    assert_eq!(all.iter().copied().filter(accepts).collect::<Vec<_>>(), [X25519]);
}

#[test]
fn older_versions_other_certificates_and_other_protocols_are_refused() {
    assert!(!is_refused(&Hello::default()), "else nothing is shown here");
    for version in [0x0300, 0x0301, 0x0302, 0x0303] {
        let old = Hello { versions: vec![version], suites: vec![0xc02b, 0xc02f, 0x009c], ..Hello::default() };
        assert!(is_refused(&old), "{version:#x}");
    }
    let mixed = Hello { versions: vec![0x0303, TLS_1_3], ..Hello::default() };
    assert!(matches!(mixed.ask(), Answer::Hello { suite: AES_128_GCM, .. }));
    assert!(is_refused(&Hello { certificate_types: vec![], ..Hello::default() }), "X.509 is meant");
    assert!(is_refused(&Hello { certificate_types: vec![0], ..Hello::default() }), "X.509");
    for signature in [0x0401, 0x0403, 0x0503, 0x0603, 0x0804, 0x0805, 0x0806, 0x0808, 0x0201] {
        assert!(is_refused(&Hello { signatures: vec![signature], ..Hello::default() }), "{signature:#x}");
    }
    for alpn in [&b"h2"[..], b"http/1.1", b"raio/1", b"raio/3"] {
        assert!(is_refused(&Hello { alpn, ..Hello::default() }), "{alpn:?}");
    }
}

#[test]
fn no_session_is_resumed_and_no_early_data_taken() {
    let answer = Hello { resumes: true, ..Hello::default() }.ask();
    assert_eq!(answer, Answer::Hello { suite: AES_128_GCM, retry: false, resumed: false, ended: false });
}
