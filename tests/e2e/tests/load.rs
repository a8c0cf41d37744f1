//! raio load with `--reconnect`, over servers that are started again, and one that is not.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use raio_e2e::{Server, TCP, load_command};
use rustix::process::Signal;
use serde_json::Value;

const SESSIONS: u64 = 4;

fn serve(directory: &Path, listen: &str) -> Server {
    let export = format!("d={},rw", directory.join("files").display());
    let state = directory.join("state").display().to_string();
    Server::start_with(&[&export], &["--listen", listen, "--state", &state])
}

fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(directory.path().join("files")).expect("a directory");
    directory
}

/// A raio load that has begun to read and write, with several requests of each session in flight.
fn begin(server: &mut Server, arguments: &str) -> Child {
    let mut command = load_command();
    command.args([&server.url(), "/d/file", "--json", "--fill", "--size", "8M", "--pattern", "randrw"]);
    command.args(["--verify", "--depth", "8", "--sessions", &SESSIONS.to_string()]);
    command.args(arguments.split_whitespace()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("raio load starts");
    server.statistics_when(|statistics| statistics["requests"]["read"].as_u64().is_some_and(|n| n > 1_000));
    child
}

/// What it reports, its exit status, and its error messages.
fn end(child: Child) -> (Value, Option<i32>, String) {
    let output = child.wait_with_output().expect("raio load ends");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {text}"));
    (report, output.status.code(), text)
}

#[test]
fn a_load_goes_on_when_its_server_is_stopped_and_started_again() {
    let directory = directory();
    let mut server = serve(directory.path(), TCP);
    let listen = server.listen_url();
    let load = begin(&mut server, "--reconnect 30 --seconds 3");
    for _ in 0..2 {
        server.signal(Signal::TERM);
        assert!(server.wait().success());
        server = serve(directory.path(), &listen);
        // Each of them is back.
        server.statistics_when(|statistics| {
            statistics["sessions"] == SESSIONS
                && statistics["requests"]["read"].as_u64().is_some_and(|n| n > 1_000)
        });
    }
    let (report, status, text) = end(load);
    assert_eq!(status, Some(0), "{text}");
    assert_eq!((&report["reconnects"], &report["unknown"]), (&(2 * SESSIONS).into(), &0.into()), "{report}");
}

#[test]
fn a_load_whose_server_stays_away_ends_when_the_window_is_over() {
    let directory = directory();
    let mut server = serve(directory.path(), TCP);
    let load = begin(&mut server, "--reconnect 1 --seconds 60");
    server.signal(Signal::KILL);
    drop(server);
    let killed = Instant::now();
    let (report, status, text) = end(load);
    let took = killed.elapsed();
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("away for longer than the reconnect window of 1 s"), "{text}");
    assert_eq!(report["sessions"]["lost"], SESSIONS, "{report}");
    assert!((Duration::from_millis(900)..Duration::from_secs(20)).contains(&took), "{took:?}");
}
