//! Writes the seed corpus: `seeds DIRECTORY`. One folder for each target, one file for each message that
//! there is, and for some conversations.

#![deny(unsafe_code)]

use std::error::Error;
use std::fs;
use std::path::Path;

use raio_fuzz::Mode;
use raio_transport::Status;
use raio_transport::handshake::{Offer, Policy};
use raio_transport::message::{
    self, FEATURE_CRC, HandshakeOption, Hello, Link, MAGIC, OPTION_NAME, OPTION_REQUIRED, Parsed,
    QueuePairAddress, RemoteRegion, RequestHeader, ResponseHeader, SessionId, VERSION,
};
use raio_transport::protocol::{Command, Fields, OPEN_CREATE, OPEN_READ, OPEN_WRITE, OPERATIONS, Opcode};

fn main() -> Result<(), Box<dyn Error>> {
    let directory = std::env::args().nth(1).ok_or("usage: seeds DIRECTORY")?;
    let directory = Path::new(&directory);
    let mut count = 0;
    let mut write = |target: &str, name: &str, modes: &[u8], bytes: &[u8]| -> std::io::Result<()> {
        let directory = directory.join(target);
        fs::create_dir_all(&directory)?;
        for mode in modes {
            fs::write(directory.join(format!("{name}-{mode:02x}")), [&[*mode], bytes].concat())?;
            count += 1;
        }
        Ok(())
    };
    let (plain, crc, pieces) = (0, Mode::CRC, Mode::PIECES | 3 << 4);
    let own = Mode::HANDSHAKE;

    for (name, command) in commands() {
        write("messages", &name, &[plain, Mode::CRC | Mode::RAW], &command)?;
    }
    for (name, bytes) in requests() {
        write("messages", &name, &[plain, crc], &bytes)?;
        write("server_session", &name, &[plain, crc, pieces], &bytes)?;
    }
    for (name, bytes) in responses() {
        write("messages", &name, &[plain, crc], &bytes)?;
        write("client_session", &name, &[plain, crc, pieces], &bytes)?;
    }
    // A server that tells the truth, then one that lies in one way after a while.
    for lie in [0, 1, 2, 4, 8] {
        write(
            "library",
            &format!("lie-{lie}"),
            &[plain],
            &[&[0; 31][..], &[lie, 5, 3, 2, 200, 9, 40, 65], &[0; 64]].concat(),
        )?;
    }
    let all: Vec<u8> = requests().into_iter().flat_map(|(_, bytes)| bytes).collect();
    write("server_session", "conversation", &[plain, crc, pieces], &all)?;
    let all: Vec<u8> = responses().into_iter().flat_map(|(_, bytes)| bytes).collect();
    write("client_session", "conversation", &[plain, crc, pieces], &all)?;
    for (name, hello) in hellos() {
        write("messages", &name, &[own], &hello)?;
        let then: Vec<u8> = hello.iter().copied().chain(requests().remove(0).1).collect();
        write("server_session", &name, &[own, own | pieces], &then)?;
    }
    for (name, welcome) in welcomes() {
        write("messages", &name, &[own], &welcome)?;
        let then: Vec<u8> = welcome.iter().copied().chain(responses().remove(0).1).collect();
        write("client_session", &name, &[own, own | crc], &then)?;
    }
    for (kind, texts) in [
        (
            0,
            &[
                "raio://host",
                "raio+tcp://127.0.0.1:1/",
                "tcp://[::1]:0",
                "rdma://[fe80::1]",
                "raio+rdma://a.b:65535",
            ][..],
        ),
        (1, &["a=/x,rw,direct", "a=/x y,ro", "n=null:1G", "m=mem:64k,rw", "a=/x:rw"]),
        (2, CONFIGURATIONS),
        (
            3,
            &[
                "--export\nn=null:1M\n--workers\n2\n--memory\n64M\n--io-max=1M\n--backend\nthreads",
                "--export=m=mem:1M,rw\n--queue-depth=4\n--spin-us\n0\n--max-sessions\n10\n--log\ndebug",
            ],
        ),
    ] {
        for (n, text) in texts.iter().enumerate() {
            write("configuration", &format!("text-{n}"), &[kind], text.as_bytes())?;
        }
    }
    for (name, bytes) in private_data() {
        write("messages", name, &[plain], &bytes)?;
    }
    println!("{count} seeds in {}", directory.display());
    Ok(())
}

/// What rdma_cm's messages carry: a request, and a rejection.
fn private_data() -> [(&'static str, Vec<u8>); 2] {
    let begin = |first: u16, second: u16| {
        let numbers = [first, second, 0, 0].into_iter().flat_map(u16::to_le_bytes);
        MAGIC.into_iter().chain(numbers).collect::<Vec<_>>()
    };
    [
        ("private-request", begin(VERSION, VERSION)),
        ("private-rejection", [&begin(71, 0)[..], "Versions 2 to 3 are spoken here, ä.".as_bytes()].concat()),
    ]
}

const CONFIGURATIONS: &[&str] = &[
    "export = [\"a=/srv,rw\", \"n=null:1M\"]\nworkers = 2\nmemory = \"64M\"\n\
     io-max = 65536\nlog = \"warn\"\n",
    "[export.a]\npath = \"/srv\"\naccess = \"rw\"\ndirect = true\nmountpoint = true\n\
     devices = true\nmax-file-size = \"1G\"\ncross-mounts = true\n[export.\"b c\"]\n\
     path = \"/x,y\"\ngrow = true\n[export.m]\nmemory = \"1M\"\n[export.n]\n\
     null = 4096\n",
    "queue-depth = 4\nmax-sessions = 10\nspin-us = 0\nbackend = \"threads\"\n\
     listen = [\"tcp://127.0.0.1:0\"]\n",
];

/// One command of each operation, with every field and flag that it uses.
fn commands() -> Vec<(String, Vec<u8>)> {
    let open =
        Command::Open { flags: OPEN_READ | OPEN_WRITE | OPEN_CREATE, mode: 0o644, path: b"/data/file" };
    OPERATIONS
        .iter()
        .map(|operation| {
            let mut bytes = Vec::new();
            if operation.opcode == Opcode::Open {
                open.encode(&mut bytes);
            } else {
                let Fields { file, offset, length } = operation.fields;
                bytes.extend_from_slice(&(operation.opcode as u16).to_le_bytes());
                bytes.extend_from_slice(&operation.flags.to_le_bytes());
                bytes.extend_from_slice(&u32::from(file).to_le_bytes());
                bytes.extend_from_slice(&(if offset { 8192u64 } else { 0 }).to_le_bytes());
                bytes.extend_from_slice(&(if length { 4096u64 } else { 0 }).to_le_bytes());
            }
            (format!("command-{}", operation.name), bytes)
        })
        .collect()
}

/// Requests as `server_session` understands them, then control messages.
fn requests() -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for (id, (name, verb, data_len, region)) in [
        ("get", 4, 0, RemoteRegion::In { address: 0, key: 0, len: 5000 }),
        ("put", 4, 300, RemoteRegion::None),
        ("put-large", 4, 40_000, RemoteRegion::None),
        ("rejected", 0, 300, RemoteRegion::None),
        ("held", 1, 0, RemoteRegion::None),
        ("held-with-data", 1, 20, RemoteRegion::None),
        ("released", 2, 0, RemoteRegion::None),
        ("closed", 3, 10, RemoteRegion::None),
        ("fetched", 4, 0, RemoteRegion::Out { address: 4096, key: 7, len: 5000 }),
    ]
    .into_iter()
    .enumerate()
    {
        let data = vec![b'd'; data_len as usize];
        let request = RequestHeader { id: id as u64, body_len: 0, data_len, region, data_crc: 0 };
        let mut bytes = Vec::new();
        request.encode(&[verb; 24], false, &mut bytes);
        bytes.extend_from_slice(&data);
        all.push((format!("request-{name}"), bytes));
    }
    all.extend(control());
    all
}

/// Responses to what `client_session` sends.
fn responses() -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for (id, (name, data_len, status, body)) in [
        ("small", 64, Status::OK, &b""[..]),
        ("whole", 4096, Status::OK, b""),
        ("write", 0, Status::OK, b""),
        ("short", 3000, Status::OK, b"with a body"),
        ("failed", 0, Status::storage(5), b"It broke. Mend it."),
        ("empty", 0, Status::transport(104), b""),
    ]
    .into_iter()
    .enumerate()
    {
        let response = ResponseHeader {
            id: id as u64,
            body_len: 0,
            data_len,
            status,
            credits: 1,
            result: data_len.into(),
            data_crc: 0,
        };
        let mut bytes = Vec::new();
        response.encode(body, false, &mut bytes);
        bytes.extend(std::iter::repeat_n(b'd', data_len as usize));
        all.push((format!("response-{name}"), bytes));
    }
    all.extend(control());
    all
}

fn control() -> Vec<(String, Vec<u8>)> {
    let encoded = |encode: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = Vec::new();
        encode(&mut bytes);
        bytes
    };
    let queue_pair = QueuePairAddress {
        gid: [1; 16],
        qpn: 17,
        psn: 1,
        peer_psn: 2,
        mtu: 1024,
        lid: 0,
        reads: 16,
        link: Link::Ethernet,
    };
    vec![
        ("ping".into(), encoded(&|out| message::encode_ping(9, false, out))),
        ("pong".into(), encoded(&|out| message::encode_pong(1, 0, false, out))),
        ("pong-time".into(), encoded(&|out| message::encode_pong(1, 1 << 60, false, out))),
        ("queue-pair".into(), encoded(&|out| message::encode_queue_pair(Ok(&queue_pair), false, out))),
        (
            "no-queue-pair".into(),
            encoded(&|out| {
                message::encode_queue_pair(Err((Status::transport(19), "No device.")), false, out);
            }),
        ),
        ("goaway".into(), encoded(&|out| message::encode_goaway(Status::protocol(71), "Bye.", false, out))),
    ]
}

fn hellos() -> Vec<(String, Vec<u8>)> {
    let plain = Offer { session: SessionId([1; 16]), ..Offer::new("seed") };
    let Ok(Parsed::Item((fixed, _), _)) = message::parse_handshake::<Hello>(&plain.hello()) else {
        unreachable!("it was just encoded")
    };
    let option = |kind, flags, value| HandshakeOption { kind, flags, value };
    let unknown = [option(0x7fff, 0, &b"future"[..]), option(OPTION_NAME, 0, b"seed")];
    let required = [option(0x7fff, OPTION_REQUIRED, &b"future"[..])];
    vec![
        ("hello".into(), plain.hello()),
        ("hello-queue-pair".into(), Offer { queue_pair: true, ..plain.clone() }.hello()),
        ("hello-crc".into(), Offer { features: FEATURE_CRC, queue_depth: 4, ..plain }.hello()),
        ("hello-unknown-option".into(), message::encode_handshake(fixed, &unknown)),
        ("hello-required-option".into(), message::encode_handshake(fixed, &required)),
    ]
}

fn welcomes() -> Vec<(String, Vec<u8>)> {
    let policy = Policy { server: [2; 16], queue_pair: true, ..Policy::default() };
    let welcome = |features, queue_pair| {
        let offer = Offer { features, queue_pair, session: SessionId([1; 16]), ..Offer::new("seed") };
        let Ok(Parsed::Item((_, welcome), _)) = policy.welcome(&offer.hello()) else {
            unreachable!("it was just encoded")
        };
        welcome
    };
    vec![
        ("welcome".into(), welcome(0, false)),
        ("welcome-queue-pair".into(), welcome(0, true)),
        ("welcome-crc".into(), welcome(FEATURE_CRC, false)),
        ("rejection".into(), policy.rejection(87, "All seats are taken.")),
    ]
}
