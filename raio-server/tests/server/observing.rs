//! What an operator can see of requests: the trace, the log at `trace`, and the statistics of latencies, of
//! the fast path and of exports.

use std::time::{Duration, Instant};

use raio_transport::handshake::{ChannelOffer, Offer};
use raio_transport::message::SessionId;
use raio_transport::protocol::{Command, OPEN_READ};
use raio_transport::transport::ClientTransport;
use rustix::process::Signal;
use zerocopy::little_endian::U32;

use crate::common::{Client, NEW, Server, TIMEOUT, Variant};

/// Writes and reads back a little.
fn work(server: &Server) -> u16 {
    let mut client = server.client();
    let file = client.open("/d/f", NEW).unwrap();
    client.write(file, 0, &[1; 5000]).unwrap();
    client.read(file, 0, 5000).unwrap();
    client.transport.local_port().expect("it is on TCP")
}

/// What a file has once it says so, for it is written behind the server's back.
fn read_until(path: &std::path::Path, text: &str) -> String {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let content = std::fs::read_to_string(path).unwrap();
        if content.contains(text) {
            return content;
        }
        assert!(Instant::now() < deadline, "{text} is not in {content}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_trace_has_each_request_at_sigusr2_and_at_the_end() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("trace.json");
    let mut server = Server::start(Variant::Uring, &["--workers", "1", "--trace", path.to_str().unwrap()]);
    let port = work(&server);
    server.signal(Signal::USR2);
    let written = format!("\"name\":\"write\",\"cat\":\"request\",\"ph\":\"e\",\"id\":\"{port}-");
    let first = read_until(&path, &written);
    for (name, phase) in
        [("open", "b"), ("open", "e"), ("write", "b"), ("fetching", "n"), ("executing", "n"), ("read", "e")]
    {
        let event = format!("\"name\":\"{name}\",\"cat\":\"request\",\"ph\":\"{phase}\",\"id\":\"{port}-");
        assert!(first.contains(&event), "{event} is not in {first}");
    }
    assert!(first.contains("\"args\":{\"bytes\":5000}"), "{first}");
    assert!(!server.log().contains("is ignored"));
    assert!(first.contains("\"clock_offset_us\":0.000,\"clock_error_us\":0.000,\"dropped\":0}"), "{first}");

    let second_port = work(&server);
    server.signal(Signal::TERM);
    assert_eq!(server.wait().code(), Some(0));
    let both = std::fs::read_to_string(&path).unwrap();
    assert!(both.starts_with(first.trim_end_matches("\n]}\n")), "what was written before is still there");
    let ended = |port| both.matches(&format!("\"ph\":\"e\",\"id\":\"{port}-")).count();
    assert_eq!((ended(port), ended(second_port)), (3, 3), "each once: {both}");
    assert!(both.trim_end().ends_with("]}"), "{both}");
}

#[test]
fn a_trace_does_not_overwrite_a_file() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("precious");
    std::fs::write(&path, "precious").unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_raio_server"))
        .args(["--listen", "tcp://127.0.0.1:0", "--export", "n=null:1M", "--trace", path.to_str().unwrap()])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("Name a file that does not exist yet"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_trace_that_cannot_be_created_keeps_the_server_from_starting_and_says_why() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_raio_server"))
        .args(["--listen", "tcp://127.0.0.1:0", "--export", "n=null:1M", "--trace", "/nowhere/trace"])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("Cannot create /nowhere/trace for --trace."), "{error}");
    assert!(error.contains("in a directory that raio_server may write to"), "{error}");
    assert!(error.contains("No such file or directory"), "{error}");
}

#[test]
fn the_log_has_each_request_at_trace_and_none_at_debug() {
    for (level, has_requests) in [("trace", true), ("debug", false)] {
        let server = Server::start(Variant::Uring, &["--log", level]);
        work(&server);
        let log = server.log_until("A client's connection has ended.");
        for line in
            ["Begin of a request: write.", "Point of a request: executing.", "End of a request: read."]
        {
            let found = log.lines().find(|logged| logged.contains(line));
            assert_eq!(found.is_some(), has_requests, "{line}\n{log}");
            assert!(found.is_none_or(|line| line.contains("peer=127.0.0.1:")), "{log}");
        }
    }
}

#[test]
fn the_statistics_tell_latencies_the_fast_path_and_exports_apart() {
    let mut server = Server::start(Variant::Uring, &["--workers", "1", "--export", "n=null:1M"]);
    let mut client = server.client();
    let file = client.open("/d/f", NEW).unwrap();
    client.write(file, 0, &[1; 4096]).unwrap();
    for _ in 0..100 {
        client.read(file, 0, 4096).unwrap();
    }
    let null = client.open("/n", OPEN_READ).unwrap();
    client.read(null, 0, 1000).unwrap();
    // Latencies are counted after the answers, at the end of an iteration.
    let stats = server.stats_until("counted", |stats| {
        stats.get("answered") == 104
            && stats.0.contains("\"latency_us\":{\"open\":{\"count\":2,")
            && stats.0.contains("\"write\":{\"count\":1,")
    });
    let after = |name: &str| {
        let at = stats.0.find(name).unwrap_or_else(|| panic!("{name} is not in {}", stats.0));
        let number: String =
            stats.0[at + name.len()..].chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
        number.parse::<f64>().unwrap()
    };
    assert_eq!(after("\"latency_us\":{\"open\":{\"count\":"), 2.0, "{}", stats.0);
    assert_eq!(after("\"write\":{\"count\":"), 1.0, "{}", stats.0);
    let reads = after("\"read\":{\"count\":");
    assert!((1.0..=101.0).contains(&reads), "some of them: {}", stats.0);
    let of_writes = stats.0.split_once("\"write\":{\"count\":1,\"p50\":").unwrap().1;
    let p50: f64 = of_writes.split(',').next().unwrap().parse().unwrap();
    assert!(p50 >= 1.0 && p50 < TIMEOUT.as_micros() as f64, "{}", stats.0);
    // What the page cache has, or is in memory.
    assert!(stats.get("fast_path") > 50, "{}", stats.0);
    assert!(stats.0.contains(
        "\"exports\":{\"d\":{\"requests\":102,\"errors\":0,\"read_bytes\":409600,\"written_bytes\":4096,"
    ));
    assert!(stats.0.contains("\"n\":{\"requests\":"), "{}", stats.0);
    assert!(stats.0.contains("\"read_bytes\":1000,\"written_bytes\":0,"), "{}", stats.0);
}

#[test]
fn what_becomes_of_lost_connections_is_logged_and_counted() {
    let mut server = Server::start(Variant::Uring, &["--workers", "1"]);
    let address = server.address;
    let connect = |session: u8, epoch: u64, linger: Duration, supersedes: &[u8]| {
        let id = |session| SessionId([session; 16]);
        let supersedes = supersedes.iter().map(|&session| id(session)).collect();
        let channel = Some(ChannelOffer { number: 1, epoch, linger });
        Client::connect(
            address,
            &Offer { session: id(session), channel, supersedes, ..Offer::new("observed") },
        )
    };
    let ask = |client: &mut Client| client.do_it(&Command::Outcome { ids: &[U32::new(7), U32::new(8)] });
    let a_while = Duration::from_secs(60);

    drop(connect(1, 1, a_while, &[]));
    server.log_until("INFO A client's connection was lost. Its channel is kept for 60s.");
    let mut second = connect(1, 2, a_while, &[]);
    assert_eq!(ask(&mut second), Ok(2));
    let log = server.log_until("ms after its connection was lost, and has asked what became of 2 requests.");
    assert!(log.contains("INFO A client has come back "), "{log}");
    let mut third = connect(1, 3, a_while, &[]);
    assert_eq!(ask(&mut third), Ok(2));
    server.log_until(
        "INFO A client has come back before the end of its last connection was seen, and has asked",
    );

    let soon = Duration::from_millis(50);
    let mut unknown = connect(2, 5, soon, &[]);
    assert_eq!(ask(&mut unknown), Err(libc::ESTALE));
    server.log_until(
        "INFO A client has come back to a channel that is not known, and has asked what became of 2",
    );
    drop(unknown);
    server.log_until(
        "INFO 1 channels are forgotten, and 1 sessions have ended: their clients did not come back",
    );

    let mut last = connect(3, 1, a_while, &[1]);
    assert_eq!(ask(&mut last), Ok(2));
    let log = server.log_until("INFO A client has given up 1 sessions for another one, which begins when");
    let is_lost = |line: &&str| line.contains(" name=observed session=") && line.contains(" reason=finished");
    assert_eq!(log.lines().filter(is_lost).count(), 2, "{log}");

    let stats = server.stats();
    let count = |name| stats.get(name);
    for (name, expected) in [
        ("broken", 2),
        ("resumed", 2),
        ("not_known", 1),
        ("superseded", 1),
        ("fenced", 2),
        ("expired", 1),
        ("parked", 0),
    ] {
        assert_eq!(count(name), expected, "{name}: {}", stats.0);
    }
}
