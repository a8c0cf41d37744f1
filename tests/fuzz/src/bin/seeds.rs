//! Writes the seed corpus: `seeds DIRECTORY`. One folder for each target, one file for each message that
//! there is, and for some conversations.

#![deny(unsafe_code)]

use std::error::Error;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use raio_fuzz::{Mode, PUBLIC_KEYS, peer, step, tls};
use raio_transport::Status;
use raio_transport::connecting::Connecting;
use raio_transport::handshake::{Offer, Policy, PushWindows};
use raio_transport::keys::SecretKey;
use raio_transport::message::{
    self, FEATURE_CRC, HandshakeOption, Hello, Link, MAGIC, OPTION_NAME, OPTION_REQUIRED, Parsed,
    QueuePairAddress, RemoteRegion, RequestHeader, ResponseHeader, SessionId, VERSION,
};
use raio_transport::protocol::path::{PathCommand, PathFields};
use raio_transport::protocol::{
    Command, Fields, FileHandle, Layout, OPEN_CREATE, OPEN_READ, OPEN_WRITE, OPERATIONS, Opcode,
};
use raio_transport::tcp::{Accepting, TcpDial};
use raio_transport::tls::{ClientTls, ServerTls};
use raio_transport::transport::AcceptedStream;

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
    for (name, steps) in conversations() {
        write("server", name, &[0, 1], &steps.concat())?;
    }
    for (name, steps) in losses() {
        // The window, whether it repeats what is unknown, checksums, and whether the server comes back.
        write("channel", name, &[0x20, 0x24, 0x32, 0x0a, 0x60], &steps)?;
    }
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
    let [key, other] = PUBLIC_KEYS;
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
        (4, &[&format!("# mine\nh:1 {key} # one\n[::1]:2\t{other} {key}\nother:2 {other}\n")]),
        (
            5,
            &[
                &format!(
                    "[client.a]\nkeys = [\"{key}\"]\nexports = {{ data = \"rw\", logs = \"ro\" }}\n\
                     rdma = \"clear\"\n[client.\"b c\"]\nkeys = [{{ key = \"{other}\", \
                     expires = 2999-06-30T12:00:00Z }}]\n"
                ),
                "[client.a]\nusers = [\"root\", 1000]\n[client.b]\ngroups = [50]\n[client.c]\n\
                 groups = [34, \"root\"]\nexports = { data = \"ro\" }\n",
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
    for (name, kind, bytes) in tls_inputs()? {
        write("tls", &name, &[kind], &bytes)?;
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
     devices = true\nmax-file-size = \"1G\"\ncross-mounts = true\niops = 9\n\
     bandwidth = \"1M\"\nburst = 0.5\n[export.\"b c\"]\n\
     path = \"/x,y\"\ngrow = true\n[export.m]\nmemory = \"1M\"\n[export.n]\n\
     null = 4096\n",
    "queue-depth = 4\nmax-sessions = 10\nspin-us = 0\nbackend = \"threads\"\n\
     listen = [\"tcp://127.0.0.1:0\"]\n",
];

/// One command of each operation, with every field and flag that it uses.
fn commands() -> Vec<(String, Vec<u8>)> {
    let path = b"/data/file";
    let identity = [9; 16];
    OPERATIONS
        .iter()
        .map(|operation| {
            let mut bytes = Vec::new();
            if let Layout::Path(PathFields { length, mode, time, other }) = operation.layout {
                let removes = operation.opcode == Opcode::SetXattr;
                Command::Path(PathCommand {
                    flags: if removes { 0 } else { operation.flags },
                    mode: if mode { 0o644 } else { 0 },
                    length: if length { 4096 } else { 0 },
                    modified_ns: if time { 1 } else { 0 },
                    other: if other { b"/data/other" } else { b"" },
                    ..PathCommand::new(operation.opcode, path)
                })
                .encode(&mut bytes);
            } else if let Layout::Fields(Fields { file, offset, length }) = operation.layout {
                bytes.extend_from_slice(&(operation.opcode as u16).to_le_bytes());
                bytes.extend_from_slice(&operation.flags.to_le_bytes());
                bytes.extend_from_slice(&u32::from(file).to_le_bytes());
                bytes.extend_from_slice(&(if offset { 8192u64 } else { 0 }).to_le_bytes());
                bytes.extend_from_slice(&(if length { 4096u64 } else { 0 }).to_le_bytes());
            } else {
                let command = match operation.opcode {
                    Opcode::Open => {
                        Command::Open { flags: OPEN_READ | OPEN_WRITE | OPEN_CREATE, mode: 0o644, path }
                    }
                    Opcode::Copy => Command::Copy {
                        source: FileHandle(1 << 20),
                        offset: 0,
                        length: 4096,
                        destination: FileHandle(1 << 20),
                        destination_offset: 8192,
                    },
                    Opcode::Outcome => Command::Outcome { ids: &[1.into(), 65_537.into(), 2.into()] },
                    _ => Command::Reopen { flags: OPEN_READ, file: FileHandle(1 << 20), identity, path },
                };
                command.encode(&mut bytes);
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
        let request =
            RequestHeader { id: id as u64, body_len: 0, data_len, region, has_crc: false, data_crc: 0 };
        let mut bytes = Vec::new();
        request.encode(&[verb; 24], false, &mut bytes);
        bytes.extend_from_slice(&data);
        all.push((format!("request-{name}"), bytes));
    }
    all.extend(control());
    all
}

/// Steps of an input of `server`, as it understands them.
mod steps {
    use super::{OPEN_CREATE, OPEN_WRITE, OPERATIONS, Opcode, step};

    // Indices in the target's tables of paths and lengths.
    pub const MEMORY: u8 = 1;
    pub const NULL: u8 = 4;
    pub const FILE: u8 = 6;
    pub const FIXED: u8 = 12;
    pub const PAGE: u8 = 5;

    pub type Steps = Vec<Vec<u8>>;

    pub fn connect(session: u8) -> Vec<u8> {
        vec![step::CONNECT, session]
    }

    /// The same with the first, or next, channel of the session.
    pub fn connect_channel(session: u8) -> Vec<u8> {
        connect(session | 8)
    }

    /// Another connection of a channel, the oldest first. See the target for its variants.
    pub fn resume(channel: u8, variant: u8) -> Vec<u8> {
        vec![step::RESUME, channel, variant, 0]
    }

    /// The broken one has gone before.
    pub const BROKEN: u8 = 1;
    /// The byte behind names a session that was given up. It stands before the last byte of [`resume`].
    pub const SUPERSEDES: u8 = 2;
    pub const BRIEF: u8 = 8;
    pub const ASKS_NOTHING: u8 = 2 << 6;
    pub const DOES_NOT_ASK: u8 = 3 << 6;

    pub fn run() -> Vec<u8> {
        vec![step::RUN, 5]
    }

    pub fn jobs() -> Vec<u8> {
        vec![step::RUN_JOBS]
    }

    pub fn open(client: u8, flags: u32, path: u8) -> Steps {
        vec![vec![step::REQUEST, client, 0, (flags >> 1) as u8, path], jobs(), run()]
    }

    /// On the session's first file, at its begin.
    pub fn on_file(client: u8, opcode: Opcode, length: u8) -> Vec<u8> {
        vec![step::REQUEST, client, opcode as u8 - 1, 0, 0, length]
    }

    /// A client that has opened a file.
    pub fn begin(path: u8) -> Steps {
        [vec![connect(0), run()], open(0, OPEN_WRITE | OPEN_CREATE, path)].concat()
    }

    /// Two of them.
    pub fn two(session: u8) -> Steps {
        [begin(MEMORY), vec![connect(session), run()], open(1, OPEN_WRITE, MEMORY)].concat()
    }

    /// A client with a channel that has opened a file.
    pub fn begin_channel(path: u8) -> Steps {
        [vec![connect_channel(0), run()], open(0, OPEN_WRITE | OPEN_CREATE, path)].concat()
    }

    /// Opens the session's first file again.
    pub fn reopen(client: u8) -> Steps {
        vec![vec![step::REQUEST, client, Opcode::Reopen as u8 - 1, 0], run(), jobs(), run()]
    }

    /// All that a client can do with its file.
    pub fn everything() -> Steps {
        let others = OPERATIONS.iter().map(|operation| operation.opcode);
        let others = others.filter(|opcode| !matches!(opcode, Opcode::Open | Opcode::Close));
        let all = others.chain([Opcode::Read, Opcode::Close]);
        all.flat_map(|opcode| [on_file(0, opcode, PAGE), run(), jobs(), run()]).collect()
    }
}

/// What one client does to a whole server, step by step.
fn conversations() -> Vec<(&'static str, steps::Steps)> {
    use steps::*;
    let mut all = Vec::new();
    for (name, path) in [("memory", MEMORY), ("null", NULL), ("file", FILE), ("fixed", FIXED)] {
        all.push((name, [begin(path), everything()].concat()));
    }
    all.push(("read-only", [vec![connect(0), run()], open(0, 0, MEMORY), everything()].concat()));
    for (name, path) in [("large-memory", MEMORY), ("large-null", NULL), ("large-file", FILE)] {
        let mut steps = begin(path);
        // 5000, 20,000 and 32,768 bytes.
        for length in [6, 9, 10] {
            for opcode in [Opcode::Write, Opcode::Read] {
                steps.extend([on_file(0, opcode, length), run(), jobs(), run()]);
            }
        }
        all.push((name, steps));
    }
    // The command's length differs from that of the data.
    for (name, opcode) in [("other-length-read", Opcode::Read), ("other-length-write", Opcode::Write)] {
        let odd = vec![step::REQUEST | step::ODD, 0, (opcode as u8 - 1) | 0x20, 0, 0, PAGE, 17, 0x20];
        all.push((name, [begin(MEMORY), vec![odd, run(), jobs(), run()]].concat()));
    }
    let write = on_file(0, Opcode::Write, PAGE);
    let cancel = vec![step::CANCEL, 0, 0];
    all.push(("cancel", [begin(FILE), vec![write.clone(), cancel.clone(), jobs(), run()]].concat()));
    all.push(("cancel-late", [begin(FILE), vec![write, vec![step::RUN_JOB, 0], cancel]].concat()));
    let half = vec![step::REQUEST, 0, (Opcode::Write as u8 - 1) | 0x40, 0, 0, PAGE, 100];
    let late = vec![half, vec![step::ADVANCE, 8], run(), vec![step::CONTINUE, 0], run(), jobs(), run()];
    all.push(("half-a-message", [begin(MEMORY), late].concat()));
    let odd = vec![vec![step::PING | step::ODD, 0], vec![step::SHUT_DOWN | step::ODD, 0], run()];
    all.push(("ends", [begin(NULL), odd].concat()));
    let ping = [vec![step::PING, 0], vec![7; 8], vec![step::RAW, 0, 40], vec![0xff; 40]].concat();
    all.push(("raw", [begin(NULL), vec![ping]].concat()));
    all.extend(conversations_of_two());
    all.extend(conversations_of_channels());
    all
}

/// What clients do whose connections break.
fn conversations_of_channels() -> Vec<(&'static str, steps::Steps)> {
    use steps::*;
    let write = || on_file(0, Opcode::Write, PAGE);
    let read = || on_file(0, Opcode::Read, PAGE);
    let then = || vec![run(), jobs(), run(), read(), run(), jobs(), run()];
    let leave = || vec![step::LEAVE, 0];
    let again = |variant| [vec![resume(0, variant)], then()].concat();
    let drain = vec![vec![step::DRAIN | step::ODD, 40], run(), vec![step::ADVANCE, 8], jobs(), run(), run()];
    let restarted =
        [vec![run(), resume(0, BROKEN)], then(), reopen(0), vec![write(), run(), jobs()]].concat();
    let other = [vec![connect_channel(1), run()], open(1, OPEN_WRITE, FILE)].concat();
    let given_up = vec![vec![step::RESUME, 1, SUPERSEDES, 0, 0], run(), jobs(), run()];
    let odd = |how: u8| vec![vec![step::RESUME | step::ODD, 0, 0, how], run(), run()];
    let second =
        [vec![connect_channel(0), run(), on_file(1, Opcode::Write, PAGE), leave(), run()], then()].concat();
    let cancel = vec![step::CANCEL, 0, 0];
    let deaf = [&[step::DEAFEN, 0][..], &write()].concat();
    let mut all = Vec::new();
    for (answered, broken, fenced, path) in [
        ("memory-answered", "memory-broken", "memory-fenced", MEMORY),
        ("file-answered", "file-broken", "file-fenced", FILE),
    ] {
        all.push((
            answered,
            [begin_channel(path), vec![write(), run(), jobs(), run()], again(BROKEN)].concat(),
        ));
        all.push((broken, [begin_channel(path), vec![write(), leave()], again(0)].concat()));
        all.push((fenced, [begin_channel(path), vec![write()], again(0), again(BROKEN)].concat()));
    }
    let (begun, ends) = (vec![step::BEGIN_JOB, 0], vec![step::BEGIN_JOB | step::ODD, 0]);
    let stuck =
        vec![write(), run(), begun, leave(), run(), resume(0, 0), run(), ends, run(), read(), jobs(), run()];
    all.push(("stuck", [begin_channel(FILE), stuck.clone(), stuck.clone()].concat()));
    let waits = [vec![connect_channel(1), run()], open(1, OPEN_WRITE, FILE)].concat();
    let overlaps = [&stuck[..5], &[write(), run(), jobs(), run(), read(), run(), jobs()]].concat();
    all.push(("held-back", [begin_channel(FILE), waits, overlaps].concat()));
    let unheard = vec![deaf, run(), jobs(), run(), leave()];
    all.push(("unheard", [begin_channel(FILE), unheard, again(0)].concat()));
    all.push(("asks-nothing", [begin_channel(FILE), vec![write()], again(BROKEN | ASKS_NOTHING)].concat()));
    all.push(("does-not-ask", [begin_channel(FILE), again(DOES_NOT_ASK), vec![read()]].concat()));
    all.push(("ask-and-cancel", [begin_channel(FILE), vec![write(), resume(0, 0), run(), cancel]].concat()));
    all.push(("two-channels", [begin_channel(FILE), second, again(BROKEN)].concat()));
    let expired = vec![leave(), run(), vec![step::ADVANCE, 11], run()];
    all.push(("expired", [begin_channel(FILE), expired, again(0), reopen(0), then()].concat()));
    let brief = vec![leave(), vec![step::ADVANCE, 6], run()];
    all.push(("brief", [begin_channel(MEMORY), again(BRIEF), brief, again(0), reopen(0)].concat()));
    all.push(("restarted", [begin_channel(FILE), vec![write()], drain, restarted].concat()));
    all.push(("given-up", [begin_channel(FILE), other, vec![write()], given_up].concat()));
    all.push((
        "stale",
        [begin_channel(FILE), odd(0), odd(1), odd(3), vec![write()], odd(5), odd(6)].concat(),
    ));
    all.push(("reopened", [begin_channel(MEMORY), reopen(0), then()].concat()));
    all
}

/// How a server loses what a channel has asked for.
fn losses() -> Vec<(&'static str, Vec<u8>)> {
    use peer::*;
    let ask = |opcode: Opcode| [SUBMIT, opcode as u8 - 1];
    let open = [&ask(Opcode::Open)[..], &[ANSWER]].concat();
    let two = [ask(Opcode::Write), ask(Opcode::Read)].concat();
    let then = [&[RECEIVE, RECEIVE, ANSWER_ALL][..], &two, &[ANSWER_ALL, RECEIVE]].concat();
    // The last byte is how it lies; zeros follow.
    let lie = |how: u8| [&two[..], &[BREAK, RECEIVE, ANSWER, RECEIVE, LIE, how, 7, 1, RECEIVE]].concat();
    let restart = |how: u8| [&two[..], &[RESTART, RECEIVE, ANSWER, ANSWER, ANSWER, LIE, how, 16, 3]].concat();
    let rejected = [&two[..], &[BREAK, RECEIVE, LIE, 0, 87, RECEIVE, ADVANCE, 3, RECEIVE]].concat();
    let all: Vec<u8> = OPERATIONS.iter().flat_map(|operation| ask(operation.opcode)).collect();
    let away = [&two[..], &[LISTEN, BREAK, RECEIVE, ADVANCE, 4, RECEIVE, LISTEN, ADVANCE, 4]].concat();
    [
        ("answered", two.clone()),
        ("lost", [&two[..], &[LOSE]].concat()),
        ("executed", [&two[..], &[EXECUTE]].concat()),
        ("half", [&two[..], &[HALF, 20]].concat()),
        ("half-read", [&two[..], &[ANSWER, HALF, 50]].concat()),
        ("broken", [&two[..], &[BREAK]].concat()),
        ("executed-twice", [&two[..], &[EXECUTE, RECEIVE, ANSWER, EXECUTE, RECEIVE, ANSWER]].concat()),
        ("restarted", [&two[..], &[EXECUTE, RESTART]].concat()),
        ("all", [&all[..], &[EXECUTE, RECEIVE, ANSWER_ALL], &all, &[RESTART]].concat()),
        ("away", away),
        ("away-for-long", [&two[..], &[LISTEN, BREAK, RECEIVE, ADVANCE, 7, RECEIVE]].concat()),
        ("rejected", rejected),
        ("cancelled", [&two[..], &[CANCEL, 0, BREAK]].concat()),
        ("lie-body", lie(0)),
        ("lie-length", lie(1)),
        ("lie-errno", lie(2)),
        ("lie-retryable", lie(10)),
        ("lie-result", lie(3)),
        ("lie-damaged", lie(5)),
        ("lie-header", lie(22)),
        ("lie-twice", lie(38)),
        ("reopened", restart(6)),
        ("reopened-body", restart(0)),
        ("reopened-errno", restart(2)),
        ("reopened-result", restart(3)),
    ]
    .map(|(name, steps)| (name, [&open[..], &steps, &then].concat()))
    .to_vec()
}

/// What two clients do.
fn conversations_of_two() -> Vec<(&'static str, steps::Steps)> {
    use steps::*;
    let write = || on_file(0, Opcode::Write, PAGE);
    let read = |client| on_file(client, Opcode::Read, PAGE);
    let large = [&[step::REQUEST | step::AT_ONCE][..], &on_file(0, Opcode::Read, 11)[1..]].concat();
    let share = vec![write(), read(1), jobs(), run(), read(1), jobs()];
    let leave = vec![vec![step::LEAVE, 0], jobs(), run(), read(0), jobs()];
    let deaf = vec![vec![step::DEAFEN, 0], read(0), read(0), jobs(), run(), vec![step::ADVANCE, 8], read(1)];
    let drain = vec![write(), vec![step::DRAIN | step::ODD, 40], run(), vec![step::ADVANCE, 4], run()];
    vec![
        ("session-of-two", [two(0), share.clone()].concat()),
        ("two-sessions", [two(1), share].concat()),
        ("leave", [two(1), vec![write()], leave.clone()].concat()),
        ("leave-waiting", [two(1), vec![large; 6], vec![run()], leave].concat()),
        ("deaf", [two(1), deaf].concat()),
        ("drain", [two(0), drain].concat()),
    ]
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
            has_crc: false,
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
    let receipt = |released, is_last| {
        encoded(&|out| message::encode_receipt(message::Receipt { released, is_last }, false, out))
    };
    let question = RequestHeader::of_command(0);
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
        ("one-way".into(), encoded(&|out| message::encode_one_way(b"\x00and an end", true, false, out))),
        ("one-way-released".into(), encoded(&|out| message::encode_one_way(b"\x04", false, false, out))),
        ("receipt".into(), receipt(1, false)),
        ("receipt-last".into(), receipt(0, true)),
        ("question".into(), encoded(&|out| question.encode(b"\x00what now", false, out))),
    ]
}

fn hellos() -> Vec<(String, Vec<u8>)> {
    let plain = Offer { session: SessionId([1; 16]), ..Offer::new("seed") };
    let Ok(Parsed::Item((fixed, _), _)) = message::parse_handshake::<Hello>(&plain.hello()) else {
        unreachable!("it was just encoded")
    };
    let option = |kind, flags, value| HandshakeOption { kind, flags, value };
    let unknown = [option(0x7fff, 0, &b"future"[..]), option(OPTION_NAME, 0, b"seed")];
    let push = PushWindows { to_server: 8, to_client: 8, requests: 4 };
    let required = [option(0x7fff, OPTION_REQUIRED, &b"future"[..])];
    vec![
        ("hello".into(), plain.hello()),
        ("hello-queue-pair".into(), Offer { queue_pair: true, ..plain.clone() }.hello()),
        ("hello-push".into(), Offer { push, ..plain.clone() }.hello()),
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

/// What a client sends first to begin TLS, and what a server answers.
fn flights() -> Result<[Vec<u8>; 2], Box<dyn Error>> {
    fn pair() -> std::io::Result<(UnixStream, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        Ok((ours, theirs))
    }
    let taken = |mut stream: &UnixStream| {
        let mut bytes = vec![0; 16 << 10];
        let n = stream.read(&mut bytes)?;
        bytes.truncate(n);
        Ok::<_, std::io::Error>(bytes)
    };
    let [client, server] = [SecretKey::generate(), SecretKey::generate()];
    let deadline = Instant::now() + Duration::from_secs(10);
    let (ours, theirs) = pair()?;
    let offer = Offer { tls: Some(ClientTls::new(&client, &[server.public()])), ..Offer::new("seed") };
    let mut dial = TcpDial::over(TcpStream::from(OwnedFd::from(theirs)), &offer, deadline);
    assert!(dial.step(Instant::now()).is_none(), "nobody has answered");
    let hello = taken(&ours)?;
    let (mut ours, theirs) = pair()?;
    let stream = AcceptedStream::new(OwnedFd::from(theirs));
    let tls = ServerTls::new(&server, |_| true);
    let mut accepting = Accepting::new(stream, &tls, Arc::new(Policy::default()), deadline)?;
    ours.write_all(&hello)?;
    assert!(accepting.step(Instant::now()).is_none(), "nobody has answered");
    let flight = taken(&ours)?;
    Ok([hello, flight])
}

/// What peers do to TLS: name, kind, and the rest of the input, which begins with how it is cut.
fn tls_inputs() -> Result<Vec<(String, u8, Vec<u8>)>, Box<dyn Error>> {
    let [hello, flight] = flights()?;
    let clear = Offer::new("seed").hello();
    let mut all = Vec::new();
    for (name, kind, bytes) in [
        ("hello", tls::BYTES_TO_SERVER, &hello[..]),
        ("clear", tls::BYTES_TO_SERVER, &clear),
        ("flight", tls::BYTES_TO_CLIENT, &flight),
        ("alert", tls::BYTES_TO_CLIENT, &[21, 3, 3, 0, 2, 2, 46]),
    ] {
        for cut in [0, 1] {
            all.push((format!("{name}-{cut}"), kind, [&[cut], bytes].concat()));
        }
    }
    // Changes of a flight, or of both: of what travels (0), or of what is sealed in it (1, and then the size
    // of the records).
    for (name, travelling, sealed) in [
        ("whole", &[0, 0][..], &[200, 0][..]),
        ("small", &[0, 0], &[0, 0]),
        ("byte", &[1, 0, 0, 70, 9, 1, 0, 0, 70, 9], &[200, 1, 0, 0, 70, 9]),
        ("short", &[1, 1, 0, 50, 4, 1, 1, 0, 50, 4], &[200, 1, 1, 0, 50, 4]),
        ("twice", &[0, 1, 3, 0, 6, 40], &[9, 1, 3, 0, 40, 60]),
        ("cut", &[0, 1, 4, 0, 90, 0], &[200, 1, 4, 0, 90, 0]),
        ("more", &[0, 1, 2, 0, 0, 2, 7, 7], &[9, 1, 2, 0, 0, 4, 1, 2, 3, 4]),
    ] {
        for kind in [tls::HANDSHAKE_TO_SERVER, tls::HANDSHAKE_TO_CLIENT] {
            all.push((format!("travelling-{name}"), kind, [&[0, 0], travelling].concat()));
            all.push((format!("sealed-{name}"), kind, [&[5, 1], sealed].concat()));
        }
    }
    for (name, records) in [
        ("data", &[0, 1, 2, 3, 4, 4][..]),
        ("empty", &[6, 1, 6, 6, 3]),
        ("padded", &[5, 200, 5, 0, 4]),
        ("updates", &[2, 7, 2, 8, 2, 7, 7, 4]),
        ("too-many-updates", &[7; 18]),
        ("alert", &[2, 9, 2, 2, 40]),
        ("end", &[4, 4, 4, 15]),
        ("data-after-the-end", &[2, 15, 2]),
        ("other-kind", &[2, 10, 1, 4, 4, 0, 0, 0]),
        ("in-the-clear", &[2, 11, 3, 5, b'h', b'e', b'l', b'l', b'o']),
        ("garbage", &[2, 12, 5, 23, 3, 3, 255, 255]),
        ("too-long", &[2, 13, 0]),
        ("zeros", &[2, 14, 9]),
        ("left-out", &[2, 0x82, 2]),
        ("exchanged", &[2, 0xa2, 2, 2]),
        ("repeated", &[2, 0xb2, 2]),
        ("repeated-update", &[2, 0xb7, 2]),
        ("changed", &[2, 0xc2, 0, 30, 2]),
        ("cut", &[2, 0xe2, 17, 2]),
    ] {
        for cut in [0, 1, 60] {
            let name = format!("{name}-{cut}");
            all.push((name.clone(), tls::RECORDS_TO_SERVER, [&[cut], records].concat()));
            all.push((name.clone(), tls::RECORDS_TO_CLIENT, [&[cut, 0], records].concat()));
            all.push((format!("welcome-{name}"), tls::RECORDS_TO_CLIENT, [&[cut, 1], records].concat()));
        }
    }
    Ok(all)
}
