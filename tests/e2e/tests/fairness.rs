//! One client that wants everything, one that never reads its answers, and two that send a byte a second:
//! beside them, 64 small ones have their turns, every byte of theirs is right, and the server holds no more
//! memory than it was allowed.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Operation, Options, Session};
use raio_e2e::{Crowd, Hostile, PATIENCE, Raw, Server, numbers};
use raio_transport::handshake::Offer;
use raio_transport::protocol::{OPEN_READ, OPEN_WRITE};
use serde_json::Value;

/// Memory for data: half of `--memory`.
const MEMORY_BYTES: u64 = 64 << 20;
/// What one connection may have of it.
const SHARE_BYTES: u64 = MEMORY_BYTES / 8;
const CLIENTS: usize = 64;
/// What these servers are told.
const STALL_TIMEOUT: Duration = Duration::from_secs(1);
const MIB: u64 = 1 << 20;

/// For what the program has from the start, its stacks, and 4 MiB of receive buffers.
const BESIDES_MEMORY_BYTES: u64 = 10 << 20;

fn number(statistics: &Value, pointer: &str) -> u64 {
    let value = statistics.pointer(pointer).and_then(Value::as_u64);
    value.unwrap_or_else(|| panic!("{pointer} is not in {statistics}"))
}

fn start() -> (Server, tempfile::TempDir) {
    let (directory, export) = numbers();
    let memory = (2 * MEMORY_BYTES).to_string();
    let mut arguments = vec!["--workers", "1", "--memory", &memory, "--stall-timeout", "1"];
    arguments.extend(["--listen", "tcp://127.0.0.1:0"]); // the protocol on a stream, wherever these tests run
    (Server::start_with(&[&export], &arguments), directory)
}

/// That is a bound on the whole process, but for what it needs anyway.
fn holds_no_more_than_allowed(server: &Server, statistics: &Value) {
    let taken = server.taken_bytes();
    assert!(taken < MEMORY_BYTES + BESIDES_MEMORY_BYTES, "{taken} bytes are taken: {statistics}");
}

#[test]
fn small_clients_have_their_turns_beside_a_greedy_a_deaf_and_slow_ones() {
    /// So much goes to the greedy one while we look...
    const GREEDY_BYTES: u64 = 2 << 30;
    /// ... and for each of these, each small client has at least one answer. Round and round it would be one
    /// for one read of 1 MiB; but while the small ones do not get a processor to ask, the server has nothing
    /// else to do.
    const GREEDY_BYTES_PER_ANSWER: u64 = 16 * MIB;
    /// What the server may begin between two looks at who else wants something: one read of the greedy
    /// client's.
    const ITERATION_BYTES_MAX: u64 = MIB;

    let (mut server, _directory) = start();
    let url = server.url();
    let mut crowd = Crowd::connect(&url, "/d/numbers", CLIENTS).expect("64 clients");
    let mut strangers: Vec<_> = ["greedy", "deaf", "slow", "slow-request"]
        .iter()
        .map(|kind| Hostile::start(kind, &url, "/d/numbers"))
        .collect();

    let greedy_bytes = |statistics: &Value, answers: &[u64]| {
        number(statistics, "/read_bytes") - answers.iter().sum::<u64>() * 4096
    };
    let before = greedy_bytes(&server.statistics(), &crowd.answers());
    let deadline = Instant::now() + 4 * PATIENCE;
    let mut moved = 0;
    while moved < GREEDY_BYTES {
        // Some rounds between two looks at the statistics, for each look wakes the server.
        let mut looks = 0;
        crowd
            .run(|| {
                looks += 1;
                looks > 200
            })
            .expect("every small client has every byte right");
        let statistics = server.statistics();
        moved = greedy_bytes(&statistics, &crowd.answers()) - before;
        holds_no_more_than_allowed(&server, &statistics);
        assert!(Instant::now() < deadline, "the greedy client got {moved} bytes only: {statistics}");
    }

    let answers = crowd.answers();
    let (least, most) = (answers.iter().min().expect("64"), answers.iter().max().expect("64"));
    let due = moved / GREEDY_BYTES_PER_ANSWER;
    println!("{} MiB for the greedy client, {least} to {most} answers for each small one", moved / MIB);
    assert!(*least >= due, "a small client got {least} answers while the greedy one got {} MiB", moved / MIB);
    assert!(*most <= 2 * least, "one small client got {most} answers, another {least}");
    let statistics = server.statistics();
    let iteration_bytes = number(&statistics, "/iteration_bytes_max");
    assert!(iteration_bytes <= ITERATION_BYTES_MAX, "one turn began {iteration_bytes} bytes: {statistics}");
    assert!(strangers.iter_mut().all(Hostile::is_alive), "all this was while the others were there");
    assert_eq!(number(&statistics, "/errors"), 0);
}

#[test]
fn who_does_not_take_or_send_is_closed_only_when_others_wait_for_memory() {
    let (mut server, _directory) = start();
    let url = server.url();
    let mut crowd = Crowd::connect(&url, "/d/numbers", CLIENTS).expect("64 clients");
    let mut strangers: Vec<_> =
        ["deaf", "slow"].iter().map(|kind| Hostile::start(kind, &url, "/d/numbers")).collect();
    let mut idle = Raw::open(&url, "/d/numbers", OPEN_READ).expect("another client");
    const READS: u64 = 32;
    for id in 0..READS {
        idle.send_read(id, id * MIB, MIB as u32).expect("room for a request");
    }
    let statistics = server.statistics_when(|statistics| {
        number(statistics, "/in_flight/fetching") == 1
            && number(statistics, "/in_flight/executing") == 0
            && number(statistics, "/in_flight/need_slot") > 100
    });
    let held = number(&statistics, "/slot_bytes");
    assert!(held > MIB, "they hold something: {statistics}");
    assert!(held <= 2 * SHARE_BYTES + MIB, "the deaf have their share, the slow one its write: {statistics}");

    // Nobody waits for what they hold: five times the stall timeout is nothing to them.
    let until = Instant::now() + 5 * STALL_TIMEOUT;
    while Instant::now() < until {
        crowd.run(|| true).expect("the small clients do not notice");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(strangers.iter_mut().all(Hostile::is_alive));
    let closes = |statistics: &Value| -> u64 {
        let reasons = statistics["closes"].as_object().expect("reasons");
        reasons.values().filter_map(Value::as_u64).sum()
    };
    assert_eq!(closes(&server.statistics()), 0, "nobody was closed");
    let mut bytes = vec![0; MIB as usize];
    for _ in 0..READS {
        let (response, _) = idle.response().expect("all that was asked for");
        assert_eq!((response.status.errno, response.data_len), (0, MIB as u32));
        idle.stream.read_exact(&mut bytes).expect("its data");
        assert_eq!(bytes[..8], (response.id * MIB / 8).to_le_bytes());
    }
    drop(idle);

    // Now others do wait.
    let deaf_crowd = Hostile::start("deaf-crowd", &url, "/d/numbers");
    let deadline = Instant::now() + PATIENCE;
    while strangers.iter_mut().any(Hostile::is_alive) {
        crowd.run(|| true).expect("the small clients do not notice");
        let statistics = server.statistics();
        holds_no_more_than_allowed(&server, &statistics);
        assert!(Instant::now() < deadline, "somebody was not closed: {statistics}");
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(deaf_crowd);
    crowd.run(|| true).expect("the small clients do not notice");
    // A connection that ends at the end of an iteration takes its requests along in the next.
    let statistics = server.statistics_when(|statistics| {
        number(statistics, "/connections") == CLIENTS as u64
            && number(statistics, "/in_flight/need_slot") == 0
    });
    assert!(number(&statistics, "/closes/evicted") >= 2, "{statistics}");
    assert_eq!(number(&statistics, "/closes/stalled"), 0, "{statistics}");
    assert_eq!(number(&statistics, "/slot_bytes"), 0, "{statistics}");
}

#[test]
fn a_reader_keeps_half_of_its_throughput_beside_64_that_never_read_and_come_again() {
    /// A reader that is starved has one answer in seconds. The aim is a half; the rest is for a machine that
    /// is busy with other things.
    const SLACK: u64 = 2;
    const ROUND: Duration = Duration::from_millis(250);
    let (server, _directory) = start();
    let url = server.url();
    let mut reader = Crowd::connect(&url, "/d/numbers", 1).expect("a client");
    let mut median = |rounds: usize| {
        let mut rates: Vec<u64> = (0..rounds)
            .map(|_| {
                reader.forget();
                let until = Instant::now() + ROUND;
                reader.run(|| Instant::now() >= until).expect("every byte is right");
                reader.answers()[0]
            })
            .collect();
        rates.sort_unstable();
        rates[rates.len() / 2]
    };
    let before = median(5);
    let deaf_crowd = Hostile::start("deaf-crowd", &url, "/d/numbers");
    // Long enough for all of them to be closed and come again, twice.
    let beside = median(19);
    drop(deaf_crowd);
    let after = median(5);
    let alone = before.min(after);
    println!("{alone} answers in a round alone, {beside} beside those that never read");
    assert!(2 * SLACK * beside >= alone, "{alone} answers in {ROUND:?} alone, {beside} beside them");
}

/// A server all of whose memory but the reserve is given out, to clients that take their time.
fn start_without_memory() -> (Server, Vec<Hostile>, tempfile::TempDir) {
    let (directory, export) = numbers();
    // With so many sessions 4 MiB of it are for data.
    let mut arguments = vec!["--workers", "1", "--memory", "14M", "--max-sessions", "500"];
    arguments.extend(["--listen", "tcp://127.0.0.1:0", "--stall-timeout", "60"]); // they keep it
    let mut server = Server::start_with(&[&export], &arguments);
    let slow = (0..3).map(|_| Hostile::start("slow", &server.url(), "/d/numbers")).collect();
    server.statistics_when(|statistics| number(statistics, "/slot_bytes") == 3 * MIB);
    (server, slow, directory)
}

#[test]
fn while_a_write_waits_for_memory_neither_side_takes_the_other_for_dead() {
    /// More than the server's sign of life takes.
    const REQUEST_TIMEOUT: Duration = Duration::from_millis(3500);
    const KEEPALIVE: Duration = Duration::from_millis(200);
    let (mut server, slow, _directory) = start_without_memory();
    // Its pings lie behind what it writes, and are not read.
    let options = Options { request_timeout: Some(REQUEST_TIMEOUT), ..Options::default() };
    let session = Session::connect(&server.url(), &options).expect("a session");
    let file = session.open("/d/numbers", libc::O_RDWR, 0).expect("a file");
    let mut context = session.context(1).expect("a context");
    let buffers = Buffers::One(Buffer::Owned(vec![0; MIB as usize].into()));
    context.submit(&file, Operation::Write { offset: 0, buffers }, 0).expect("there is room");
    // So does what this one has promised to say.
    let offer = Offer { keepalive: KEEPALIVE, ..Offer::new("talkative") };
    let stream = TcpStream::connect(server.address()).expect("it listens");
    let mut raw = Raw::open_on(stream, &offer, "/d/numbers", OPEN_READ | OPEN_WRITE).expect("a client");
    raw.send_write_header(1, 0, MIB as u32).expect("room for a header");

    context.wait(1, 1, Some(REQUEST_TIMEOUT + Duration::from_secs(1))).expect("the server lives");
    assert!(context.next().is_none(), "there was memory");
    let statistics = server.statistics();
    assert_eq!(number(&statistics, "/in_flight/need_slot"), 2, "{statistics}");
    drop(slow);
    context.wait(1, 1, Some(PATIENCE)).expect("the server lives");
    assert_eq!(context.next().expect("it ends").result.expect("success"), MIB);
    // Whoever is read from must speak.
    server.statistics_when(|statistics| number(statistics, "/closes/silent") == 1);
}

#[test]
fn what_waits_for_memory_takes_little_more_of_it() {
    const WRITERS: u64 = 400;
    /// Each sends this much of what it is to write, at once.
    const SENT_BYTES: usize = 256 << 10;
    /// A receive of 8 KiB for each, and some for what else a connection is; and 4 MiB for those that receive
    /// more at a time.
    const GROWTH_MAX: u64 = WRITERS * (12 << 10) + 4 * MIB;

    let (mut server, _slow, _directory) = start_without_memory();
    let url = server.url();

    let mut writers: Vec<_> = (0..WRITERS)
        .map(|_| {
            let raw = Raw::open(&url, "/d/numbers", OPEN_READ | OPEN_WRITE).expect("another client");
            raw.stream.set_nonblocking(true).expect("a socket");
            raw
        })
        .collect();
    let before = server.taken_bytes();
    let bytes = vec![0; SENT_BYTES];
    for writer in &mut writers {
        writer.send_write_header(0, 0, MIB as u32).expect("room for a header");
        // As much as the kernel takes.
        assert!(matches!(writer.stream.write(&bytes), Ok(n) if n > 64 << 10));
    }
    let statistics =
        server.statistics_when(|statistics| number(statistics, "/in_flight/need_slot") == WRITERS);
    let grown = server.taken_bytes().saturating_sub(before);
    assert!(grown < GROWTH_MAX, "{grown} bytes more for {WRITERS} writers that wait: {statistics}");
    println!("{} KiB more for each writer that waits", (grown >> 10) / WRITERS);
}
