//! What one session or one address may have: whoever takes all is rejected, with an error that says why, and
//! the next client is not.

use std::io::{self, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use raio::{Answer, Buffer, Buffers, Context, Operation, Options, PathOperation, Session, SubmitOptions};
use raio_e2e::{FuseCall, FuseFs, FuseOptions, Raw, Server, binary, raw_request};
use raio_transport::handshake::{Offer, Policy};
use raio_transport::message::{self, HANDSHAKE_BYTES, Parsed};
use raio_transport::protocol::{Command as Ask, OPEN_READ, OPEN_WRITE};
use rustix::net::{AddressFamily, SocketType};

const OPEN_FILES: usize = 700;

/// A server that may have so many open files and no more.
fn start(arguments: &str) -> Server {
    let server = binary("raio_server");
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!(
        "ulimit -n {OPEN_FILES} && exec {} --listen tcp://127.0.0.1:0 --export n=null:1M --export etc=/etc \
         {arguments}",
        server.display()
    ));
    Server::spawn(command)
}

/// A further connection of a session. The error is the server's.
fn connect(server: &Server, offer: &Offer) -> Result<TcpStream, String> {
    let failed = |error: io::Error| error.to_string();
    let mut stream = TcpStream::connect(server.address()).map_err(failed)?;
    // A rejected client may find the connection closed before it has said anything.
    let _ = stream.write_all(&offer.hello());
    let mut welcome = vec![0; HANDSHAKE_BYTES];
    stream.read_exact(&mut welcome).map_err(failed)?;
    loop {
        match offer.grant(&welcome).map_err(|error| error.to_string())? {
            Parsed::Need(n) => {
                let have = welcome.len();
                welcome.resize(n, 0);
                stream.read_exact(&mut welcome[have..]).map_err(failed)?;
            }
            Parsed::Item(..) => return Ok(stream),
        }
    }
}

/// Opens the file until the server rejects that. Returns how often it did not, and its error.
fn open_all(raw: &mut Raw, path: &str) -> (usize, i32, String) {
    for opened in 0..2 * OPEN_FILES {
        let ask = Ask::Open { flags: OPEN_READ, mode: 0, path: path.as_bytes() };
        raw.stream.write_all(&raw_request(1, &ask, 0)).expect("the connection goes on");
        let (response, body) = raw.response().expect("an answer");
        if !response.status.is_ok() {
            return (opened, response.status.errno, message::text(&body).to_owned());
        }
    }
    panic!("it may have any number of files");
}

fn rejected(server: &mut Server, what: &str) -> u64 {
    let statistics = server.statistics();
    statistics["rejected"][what].as_u64().unwrap_or_else(|| panic!("{what} is not in {statistics}"))
}

#[test]
fn a_session_that_takes_every_file_and_every_connection_is_rejected_and_the_next_session_is_not() {
    let mut server = start("--workers 2");
    let url = server.url();
    let mut greedy = Raw::open(&url, "/etc/passwd", OPEN_READ).expect("a client");
    let (opened, errno, text) = open_all(&mut greedy, "/etc/passwd");
    println!("{opened} files, then: {text}");
    assert_eq!(errno, libc::EMFILE, "{text}");
    assert!(opened > OPEN_FILES / 4, "only {opened} files: nobody else wanted any");
    assert_eq!(rejected(&mut server, "session_files"), 1);
    drop(Raw::open(&url, "/etc/passwd", OPEN_READ).expect("another session has its file"));

    let offer = Offer::new("greedy");
    let mut connections = Vec::new();
    let text = loop {
        match connect(&server, &offer) {
            Ok(stream) => connections.push(stream),
            Err(text) => break text,
        }
        assert!(connections.len() < OPEN_FILES, "it may have any number of connections");
    };
    println!("{} connections, then: {text}", connections.len());
    assert!(text.contains("this session's"), "{text}");
    assert!(rejected(&mut server, "session_connections") > 0);
    let others: Vec<_> = (0..3)
        .map(|_| Raw::open(&url, "/etc/passwd", OPEN_READ).expect("other sessions have their places"))
        .collect();

    drop((others, connections, greedy));
    server.statistics_when(raio_e2e::is_at_rest);
    drop(connect(&server, &offer).expect("there are places again"));
}

#[test]
fn caps_reject_only_who_exceeds_them() {
    let mut server = start(
        "--workers 2 --limits-per-session connections=3,files=5 --limits-per-address connections=8,files=7",
    );
    let url = server.url();
    let mut raw = Raw::open(&url, "/n", OPEN_READ).expect("a client");
    let (opened, errno, text) = open_all(&mut raw, "/n");
    assert_eq!((opened, errno), (4, libc::EMFILE));
    assert!(text.contains("files= of the server's --limits-per-session"), "{text}");

    let offer = Offer::new("many");
    let connections: Vec<_> = (0..3).map(|_| connect(&server, &offer).expect("it may have three")).collect();
    let text = connect(&server, &offer).expect_err("it may have three");
    assert!(text.contains("connections= of the server's --limits-per-session"), "{text}");

    server.statistics_when(|statistics| statistics["connections"] == 4);
    let others: Vec<_> =
        (0..4).map(|_| connect(&server, &Offer::new("other")).expect("the address may have eight")).collect();
    let text = connect(&server, &offer).expect_err("the address may have eight");
    assert!(text.contains("connections= of the server's --limits-per-address"), "{text}");

    drop((others, connections));
    server.statistics_when(|statistics| statistics["connections"] == 1);
    let mut other = Raw::open(&url, "/n", OPEN_READ).expect("the address may have seven files");
    let (opened, errno, text) = open_all(&mut other, "/n");
    assert_eq!((opened, errno), (1, libc::EMFILE));
    assert!(text.contains("files= of the server's --limits-per-address"), "{text}");
    drop(
        Raw::open_on(elsewhere(&server), &offer, "/n", OPEN_READ).expect("another address may have its own"),
    );
    for what in ["session_files", "session_connections", "address_connections", "address_files"] {
        assert_eq!(rejected(&mut server, what), 1, "{what}");
    }
    drop((other, raw));
    server.statistics_when(raio_e2e::is_at_rest);
    drop(connect(&server, &offer).expect("there are places again"));
}

#[test]
fn a_connection_that_was_rejected_and_stays_has_its_place_until_its_socket_is_closed() {
    const MAY_HAVE: usize = 4;
    let mut server = start(&format!("--workers 2 --limits-per-address connections={MAY_HAVE}"));
    let before = server.descriptors().len();
    let mut damaged = Offer::new("damaged").hello();
    *damaged.last_mut().expect("a hello has bytes") ^= 1;
    let mut clients = Vec::new();
    for _ in 0..10 * MAY_HAVE {
        let mut client = TcpStream::connect(server.address()).expect("the server listens");
        // It is told of the damage, or that there are too many of it.
        let _ = client.write_all(&damaged);
        let _ = client.read_to_end(&mut Vec::new());
        clients.push(client);
        // One more may be on its way out.
        let open = server.descriptors().len() - before;
        assert!(open <= MAY_HAVE + 1, "{open} sockets are open for an address that may have {MAY_HAVE}");
    }
    assert!(rejected(&mut server, "address_connections") > 0);
    let others = Raw::open_on(elsewhere(&server), &Offer::new("other"), "/n", OPEN_READ);
    drop(others.expect("another address has its own"));
    // The server closes them although the client does not.
    let deadline = Instant::now() + Duration::from_secs(20);
    while let Err(text) = connect(&server, &Offer::new("late")) {
        assert!(Instant::now() < deadline, "no place became free: {text}");
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(clients);
}

#[test]
fn an_address_that_takes_every_session_is_rejected_and_other_addresses_are_not() {
    const SESSIONS: usize = 20;
    let mut server = start(&format!("--workers 2 --max-sessions {SESSIONS}"));
    let begin_all = |server: &Server| -> Vec<_> {
        let begin = |_| connect(server, &Offer::new("greedy")).expect("nobody else wants any");
        (0..SESSIONS).map(begin).collect()
    };
    let greedy = begin_all(&server);
    let text = connect(&server, &Offer::new("greedy")).expect_err("it has them all");
    assert!(text.contains(&format!("({SESSIONS}), {SESSIONS} of them from this address")), "{text}");

    let begin = || Raw::open_on(elsewhere(&server), &Offer::new("other"), "/n", OPEN_READ);
    let mut others = vec![begin().expect("another address has none")];
    let text = loop {
        match begin() {
            Ok(other) => others.push(other),
            Err(error) => break error.to_string(),
        }
    };
    assert!(text.contains("of them from this address"), "{text}");
    assert!((2..SESSIONS).contains(&others.len()), "{} of what is left", others.len());

    drop((greedy, others));
    server.statistics_when(raio_e2e::is_at_rest);
    drop(begin_all(&server));
}

/// A connection from another address than all others.
fn elsewhere(server: &Server) -> TcpStream {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    rustix::net::bind(&socket, &SocketAddrV4::new([127, 0, 0, 9].into(), 0)).expect("all of 127/8 is here");
    rustix::net::connect(&socket, &server.address()).expect("the server listens");
    socket.into()
}

const WRITE_BYTES: u32 = 1 << 20;

/// Connections of one session that have begun to write, and do not go on: each has a request in flight with
/// its memory.
fn begin_writes(server: &Server, offer: &Offer, count: usize) -> Vec<Raw> {
    let begin = |_| {
        let stream = TcpStream::connect(server.address()).expect("the server listens");
        begin_write(Raw::open_on(stream, offer, "/m", OPEN_READ | OPEN_WRITE).expect("a client"))
    };
    (0..count).map(begin).collect()
}

fn begin_write(mut raw: Raw) -> Raw {
    raw.send_write_header(1, 0, WRITE_BYTES).expect("room for a header");
    raw
}

fn finish_write(raw: &mut Raw) {
    raw.stream.write_all(&[7; WRITE_BYTES as usize]).expect("the server takes it");
    let (response, body) = raw.response().expect("a response");
    assert!(response.status.is_ok(), "{}", message::text(&body));
}

fn is_served(raw: &mut Raw) {
    raw.send_read(2, 0, 4096).expect("room for a request");
    let (response, body) = raw.response().expect("a response");
    assert_eq!((response.status.errno, response.data_len), (0, 4096), "{}", message::text(&body));
    raw.stream.read_exact(&mut [0; 4096]).expect("its data");
}

fn in_flight(server: &mut Server, fetching: u64, need_slot: u64) -> serde_json::Value {
    server.statistics_when(|statistics| {
        let in_flight = &statistics["in_flight"];
        in_flight["fetching"] == fetching && in_flight["need_slot"] == need_slot
    })
}

/// Memory to write to and nothing else, and one worker.
fn start_with_memory(arguments: &str) -> Server {
    let mut command = Command::new(binary("raio_server"));
    command.args(["--listen", "tcp://127.0.0.1:0", "--export", "m=mem:1M,rw", "--workers", "1"]);
    command.args(["--stall-timeout", "60"]).args(arguments.split_whitespace());
    Server::spawn(command)
}

#[test]
fn a_request_too_many_of_a_session_or_an_address_fails_and_can_be_tried_again() {
    for who in ["session", "address"] {
        let mut server = start_with_memory(&format!("--limits-per-{who} requests=3"));
        let offer = Offer::new("many");
        let mut writers = begin_writes(&server, &offer, 3);
        in_flight(&mut server, 3, 0);

        // One more is answered, and what it brings is thrown away.
        let mut further = begin_writes(&server, &offer, 1).remove(0);
        let (response, body) = further.response().expect("a response");
        let status = response.status;
        assert!(status.errno == libc::EAGAIN && status.retryable, "{status:?}");
        let text = message::text(&body);
        assert!(text.contains(&format!("requests= of the server's --limits-per-{who}")), "{text}");
        further.stream.write_all(&[7; WRITE_BYTES as usize]).expect("the server takes it");
        let mut other = Raw::open_on(elsewhere(&server), &Offer::new("other"), "/m", OPEN_READ)
            .expect("another address, another session");
        is_served(&mut other);

        let mut last = writers.pop().expect("three");
        finish_write(&mut last);
        last = begin_write(last);
        in_flight(&mut server, 3, 0);
        finish_write(&mut last);
        // Now there is room for it.
        finish_write(&mut begin_write(further));
        assert_eq!(rejected(&mut server, &format!("{who}_requests")), 1);
        drop((writers, last, other));
        // What was in flight when its connection ended is not counted any more.
        server.statistics_when(raio_e2e::is_at_rest);
        drop(begin_writes(&server, &offer, 3));
    }
}

#[test]
fn a_request_whose_session_or_address_has_its_memory_waits_for_its_fellows_and_others_do_not() {
    for who in ["session", "address"] {
        let mut server = start_with_memory(&format!("--memory 64M --limits-per-{who} memory=3M"));
        let mut writers = begin_writes(&server, &Offer::new("many"), 5);
        let statistics = in_flight(&mut server, 3, 2);
        assert_eq!(statistics["slot_bytes"], 3 * WRITE_BYTES, "{statistics}");
        assert_eq!(statistics["waits"][format!("{who}_memory")], 2, "{statistics}");

        let mut other = Raw::open_on(elsewhere(&server), &Offer::new("other"), "/m", OPEN_READ | OPEN_WRITE)
            .expect("another client");
        is_served(&mut other);
        finish_write(&mut begin_write(other));
        writers.iter_mut().for_each(finish_write);
        let statistics = in_flight(&mut server, 0, 0);
        assert_eq!((&statistics["errors"], &statistics["closes"]["evicted"]), (&0.into(), &0.into()));
    }
}

#[test]
fn a_session_that_took_the_memory_gets_no_more_of_it_before_another_that_waits() {
    const GREEDY: usize = 14;
    let mut server = start_with_memory("--memory 32M");
    // Nobody else wants any, so there is no limit but the reserve.
    let mut writers = begin_writes(&server, &Offer::new("greedy"), GREEDY + 1);
    in_flight(&mut server, GREEDY as u64, 1);
    let mut other = begin_writes(&server, &Offer::new("other"), 1).remove(0);
    in_flight(&mut server, GREEDY as u64, 2);
    // A little there is for everybody.
    is_served(&mut Raw::open(&server.url(), "/m", OPEN_READ).expect("a third client"));

    // What comes free is the other's, who has come later.
    finish_write(&mut writers[0]);
    let statistics = in_flight(&mut server, GREEDY as u64, 1);
    assert_eq!(statistics["waits"]["session_memory"], 1, "{statistics}");
    finish_write(&mut other);
    finish_write(&mut writers[GREEDY]);
    assert_eq!(server.statistics()["errors"], 0);
}

/// Has clients send pings that they do not read the pongs of, until the server takes no more: it receives
/// whatever it has not yet stopped to.
fn ping_until_full(server: &mut Server, clients: &mut [Raw]) {
    let mut pings = Vec::new();
    (0..4096).for_each(|id| message::encode_ping(id, false, &mut pings));
    // How much each has sent: a ping of which the socket took a part goes on where that ended.
    let mut sent = vec![0; clients.len()];
    let mut last = u64::MAX;
    loop {
        for (raw, sent) in clients.iter_mut().zip(&mut sent) {
            raw.stream.set_nonblocking(true).expect("a socket");
            while let Ok(n) = raw.stream.write(&pings[*sent % pings.len()..]) {
                *sent += n;
            }
        }
        if is_quiet(server, &mut last) {
            return;
        }
    }
}

/// Whether the server has done little for a while, since this was last asked.
fn is_quiet(server: &mut Server, last: &mut u64) -> bool {
    std::thread::sleep(Duration::from_millis(50));
    let iterations = server.statistics()["iterations"].as_u64().expect("a number");
    iterations.wrapping_sub(std::mem::replace(last, iterations)) < 8
}

#[test]
fn a_connection_that_pings_and_never_reads_costs_little() {
    const CLIENTS: usize = 128;
    /// Its structs, pongs that are being sent and others behind them, and what was received behind those.
    /// What all may take together has a bound of its own, see the next test.
    const BYTES_MAX: u64 = (2 + 24 + 8) << 10;
    let mut server = start("--workers 2");
    let url = server.url();
    let mut clients: Vec<_> =
        (0..CLIENTS).map(|_| Raw::open(&url, "/n", OPEN_READ).expect("a client")).collect();
    let (first, rest) = clients.split_at_mut(CLIENTS / 2);
    ping_until_full(&mut server, first);
    let before = server.resident_bytes();
    ping_until_full(&mut server, rest);
    let each = server.resident_bytes().saturating_sub(before) / (CLIENTS / 2) as u64;
    println!("{} KiB for each connection that pings", each >> 10);
    assert!(each < BYTES_MAX, "{each} bytes for each connection");
}

#[test]
fn pings_and_opens_that_hang_take_no_more_memory_than_there_is_and_all_are_served_in_the_end() {
    const PINGERS: usize = 500;
    const OPENERS: usize = 100;
    const OPENS: u64 = 64;
    /// An eighth of it is for what messages take beyond what each connection has.
    const MEMORY_BYTES: u64 = 32 << 20;
    const CONNECTION_BYTES: u64 = 16 << 10;
    /// The allocator's, which varies by a MiB, and of the arena what small requests touch.
    const SLACK: u64 = 4 << 20;
    const GROWTH_MAX: u64 = (PINGERS + OPENERS) as u64 * CONNECTION_BYTES + MEMORY_BYTES / 8 + SLACK;

    let options = FuseOptions::default();
    let Some(fuse) = FuseFs::mount("opens that hang", options, &[("file", b"content")]) else { return };
    let mut command = Command::new(binary("raio_server"));
    command.args(["--workers", "1", "--listen", "tcp://127.0.0.1:0", "--export", "m=mem:1M,rw"]);
    command.args(["--export", &format!("hung={}", fuse.path().display())]);
    command.args(["--max-sessions", "700", "--memory", &MEMORY_BYTES.to_string(), "--log", "warn"]);
    let mut server = Server::spawn(command);
    let url = server.url();
    let client = || Raw::open(&url, "/m", OPEN_READ).expect("a client");
    drop(client());
    let before = server.resident_bytes();

    fuse.hang(FuseCall::Lookup);
    let path = format!("/hung/{}", "d/".repeat(2000));
    let ask = Ask::Open { flags: OPEN_READ, mode: 0, path: path.as_bytes() };
    std::thread::scope(|scope| {
        for mut raw in (0..OPENERS).map(|_| client()) {
            let ask = &ask;
            scope.spawn(move || {
                for id in 0..OPENS {
                    raw.stream.write_all(&raw_request(id, ask, 0)).expect("the server takes it in the end");
                }
                for _ in 0..OPENS {
                    let (response, body) = raw.response().expect("a response");
                    assert_eq!(response.status.errno, libc::ENOENT, "{}", message::text(&body));
                }
            });
        }
        let mut pingers: Vec<_> = (0..PINGERS).map(|_| client()).collect();
        ping_until_full(&mut server, &mut pingers);
        let mut last = u64::MAX;
        while !is_quiet(&mut server, &mut last) {}
        let statistics = server.statistics();
        let grown = server.resident_bytes().saturating_sub(before);
        println!("{} KiB for {PINGERS} that ping and {OPENERS} that open: {statistics}", grown >> 10);
        // Others have their turn while all these wait.
        is_served(&mut client());
        fuse.mend(FuseCall::Lookup);
        assert!(grown < GROWTH_MAX, "{grown} bytes, with {statistics}");
        assert!(statistics["waits"]["messages"].as_u64() > Some(0), "{statistics}");
        assert_eq!(statistics["connections"], PINGERS + OPENERS, "nobody is closed: {statistics}");
    });
}

#[test]
fn who_is_not_read_from_because_of_its_messages_is_shown_that_the_server_lives() {
    const CLIENTS: u64 = 12;
    const OPENS: u64 = 64;
    const PING: u64 = 1;
    let options = FuseOptions::default();
    let Some(fuse) = FuseFs::mount("opens that hang", options, &[("file", b"content")]) else { return };
    let mut server = start_with_memory(&format!("--memory 14M --export hung={}", fuse.path().display()));
    fuse.hang(FuseCall::Lookup);
    let path = format!("/hung/{}", "d/".repeat(2000));
    let ask = Ask::Open { flags: OPEN_READ, mode: 0, path: path.as_bytes() };
    let mut clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let mut raw = Raw::open(&server.url(), "/m", OPEN_READ).expect("a client");
            let mut bytes: Vec<_> = (2..2 + OPENS).flat_map(|id| raw_request(id, &ask, 0)).collect();
            message::encode_ping(PING, false, &mut bytes);
            raw.stream.write_all(&bytes).expect("the kernel takes it");
            raw
        })
        .collect();
    server.statistics_when(|statistics| statistics["waits"]["messages"].as_u64() > Some(0));
    // Nothing else happens that would have the server say something.
    let mut last = clients.pop().expect("a client");
    last.stream.set_read_timeout(Some(Policy::default().keepalive)).expect("a socket");
    let mut pong = Vec::new();
    message::encode_pong(message::UNASKED_PONG, 0, false, &mut pong);
    let mut said = vec![0; pong.len()];
    last.stream.read_exact(&mut said).expect("a sign of life");
    assert_eq!(said, pong, "its ping lies behind what is not read");
    drop((last, clients));
    fuse.mend(FuseCall::Lookup);
    server.statistics_when(raio_e2e::is_at_rest);
}

#[test]
fn a_program_that_opens_files_as_fast_as_it_can_and_waits_for_no_close_has_few_open() {
    const FILES: usize = 20_000;
    const DEPTH: usize = 32;
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("file"), [7; 4096]).expect("it can be written");
    // Those in flight, those whose closes are, and some that the pool has opened or is closing.
    let server = start(&format!("--limits-per-session files=200 --export d={}", directory.path().display()));
    let session = Session::connect(&server.url(), &Options::default()).expect("it is there");
    let mut context = session.context(2 * DEPTH).expect("a context");
    let (mut opened, mut read) = (0, 0);
    let open_next = |context: &mut Context, opened: &mut usize| {
        if *opened < FILES {
            let open = PathOperation::Open { path: "/d/file".into(), flags: libc::O_RDONLY, mode: 0 };
            context.submit_path(open, SubmitOptions::default(), 0).expect("there is room");
            *opened += 1;
        }
    };
    for _ in 0..DEPTH {
        open_next(&mut context, &mut opened);
    }
    while read < FILES {
        context.flush();
        context.wait(1, usize::MAX, None).expect("the server answers");
        while let Some(completion) = context.next() {
            let count = completion.result.expect("there are few open files");
            match completion.answer.map(|answer| *answer) {
                Some(Answer::File(file)) => {
                    let buffers = Buffers::One(Buffer::Owned(vec![0; 4096].into()));
                    context.submit(&file, Operation::Read { offset: 0, buffers }, 0).expect("there is room");
                    // Every other file is closed while the read is in flight, the others with the last share.
                    if opened % 2 == 0 {
                        context.submit(&file, Operation::Close, 1).expect("there is room");
                    }
                }
                _ if completion.token == 1 => {}
                _ => {
                    assert_eq!(count, 4096);
                    read += 1;
                    open_next(&mut context, &mut opened);
                }
            }
        }
    }
}
