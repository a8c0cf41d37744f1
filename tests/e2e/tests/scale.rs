//! Tens of thousands of sessions with one server, by raio load: each has a file open, all are served, every
//! byte is checked; what they cost the server, what becomes of one too many, and of all when the server is
//! killed.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use raio::{Options, Session};
use raio_e2e::{Server, TCP, await_no_connection, binary, is_at_rest, load_command};
use raio_transport::open_files;
use serde_json::Value;

const SESSIONS: usize = 32_768;
/// What a session may cost the server, beyond what it costs the kernel.
const SESSION_BYTES_MAX: u64 = 8 << 10;
const ROUNDS: u64 = 3;
/// There are more ports than one address has. Each of these has many sessions, so that none gets one of the
/// last that are kept for others.
const SOURCES: &str = "--source 127.0.0.1 --source 127.0.0.2 --source 127.0.0.3";
/// Descriptors of a server that are not sessions'.
const DESCRIPTORS_OWN: usize = 256;

/// As many as in all tests but the longest.
const SESSIONS_FEW: usize = 1000;

fn serve(directory: &Path, arguments: &[&str]) -> Server {
    serve_at(TCP, directory, arguments)
}

fn serve_at(listen: &str, directory: &Path, arguments: &[&str]) -> Server {
    let export = format!("d={},rw", directory.display());
    Server::start_with(&[&export], &[&["--listen", listen], arguments].concat())
}

fn load(server: &Server, arguments: &str) -> Command {
    let mut command = load_command();
    command.args([&server.url(), "/d/file", "--json"]).args(arguments.split_whitespace());
    command
}

fn run(server: &Server, arguments: &str) -> Output {
    load(server, arguments).output().expect("raio load runs")
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
}

/// Makes the file. Uses what a server uses on its first requests, too.
fn fill(server: &mut Server) {
    let output =
        run(server, "--fill --size 16M --pattern randrw --verify --sessions 64 --depth 8 --rounds 50");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // The server still has its sessions for a moment, and counts them.
    server.statistics_when(is_at_rest);
}

/// A raio load whose sessions are open, and wait.
struct Held {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
}

impl Held {
    fn start(server: &Server, arguments: &str) -> Self {
        let mut command = load(server, arguments);
        command.arg("--hold").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("raio load starts");
        let mut stderr = BufReader::new(child.stderr.take().expect("stderr is piped"));
        let mut line = String::new();
        while !line.contains("waiting for a line") {
            eprint!("{line}");
            line.clear();
            assert!(stderr.read_line(&mut line).expect("text") > 0, "raio load has ended");
        }
        Self { child, stderr }
    }

    fn begin(&mut self) {
        let mut stdin = self.child.stdin.take().expect("stdin is piped");
        stdin.write_all(b"\n").expect("raio load waits for it");
    }

    fn go_on(mut self) -> Output {
        self.begin();
        self.end()
    }

    fn end(mut self) -> Output {
        self.child.stderr = Some(self.stderr.into_inner());
        self.child.wait_with_output().expect("raio load ends")
    }
}

#[test]
fn thousands_of_sessions_cost_little_are_all_served_and_one_too_many_is_turned_away() {
    let limit = open_files::raise(2 * SESSIONS + DESCRIPTORS_OWN);
    let sessions = SESSIONS.min(limit.saturating_sub(DESCRIPTORS_OWN) / 2);
    if sessions < SESSIONS {
        eprintln!(
            "SKIPPED: {SESSIONS} sessions with a file each take {} open files, and a process here may have \
             only {limit}: {sessions} sessions instead. Raise the hard limit, `ulimit -Hn`.",
            2 * SESSIONS + DESCRIPTORS_OWN
        );
    }
    if sessions < 1000 {
        return eprintln!("SKIPPED altogether: fewer say nothing of what a session costs.");
    }
    let directory = tempfile::tempdir().expect("a directory");
    let mut server = serve(directory.path(), &["--max-sessions", &sessions.to_string()]);
    fill(&mut server);
    let at_rest = server.statistics_when(is_at_rest);
    let before = server.resident_bytes();

    let arguments = format!("--sessions {sessions} --rate 8192 --rounds {ROUNDS} --verify {SOURCES}");
    let held = Held::start(&server, &arguments);
    let statistics = server.statistics();
    assert_eq!(statistics["sessions"], sessions, "{statistics}");
    assert_eq!(statistics["open_files"], sessions, "{statistics}");
    let each = server.resident_bytes().saturating_sub(before) / sessions as u64;
    eprintln!("{each} bytes a session");
    assert!(each <= SESSION_BYTES_MAX, "{each} bytes of memory for each idle session");

    let late = run(&server, "--sessions 1 --source 127.0.0.1");
    let said = String::from_utf8_lossy(&late.stderr);
    assert_eq!(late.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("as many sessions as it takes ({sessions})")), "{said}");
    assert!(said.trim_end().ends_with("--max-sessions."), "{said}");
    let late = Session::connect(&server.url(), &Options::default()).expect_err("there are enough");
    assert_eq!(late.errno(), libc::EUSERS, "{late}");

    let output = held.go_on();
    let report = report(&output);
    assert!(output.status.success(), "{report}");
    let of_sessions = &report["sessions"];
    assert_eq!(of_sessions["opened"], sessions, "{report}");
    assert_eq!((&of_sessions["ios_min"], &of_sessions["ios_max"]), (&ROUNDS.into(), &ROUNDS.into()));
    assert_eq!(report["verified_bytes"], sessions as u64 * ROUNDS * 4096, "{report}");
    eprintln!("opened {} a second", of_sessions["opened_per_second"]);

    let statistics = server.statistics_when(is_at_rest);
    assert_eq!(statistics["closes"]["rejected"], 2, "{statistics}");
    let finished = |statistics: &Value| statistics["closes"]["finished"].as_u64().expect("it is counted");
    assert_eq!(finished(&statistics) - finished(&at_rest), sessions as u64, "{statistics}");
}

#[test]
fn a_session_that_can_be_resumed_costs_little_with_its_connection_and_without() {
    // Enough that what a server takes once does not count.
    let limit = open_files::raise(2 * 4 * SESSIONS_FEW + DESCRIPTORS_OWN);
    let sessions = (4 * SESSIONS_FEW).min(limit.saturating_sub(DESCRIPTORS_OWN) / 2);
    if sessions < SESSIONS_FEW {
        return eprintln!(
            "SKIPPED: {sessions} sessions, which is all that {limit} open files are enough for."
        );
    }
    let directory = tempfile::tempdir().expect("a directory");
    let mut server = serve(directory.path(), &[]);
    fill(&mut server);
    let before = server.resident_bytes();
    let each = |server: &Server| server.resident_bytes().saturating_sub(before) / sessions as u64;

    let mut held = Held::start(&server, &format!("--sessions {sessions} --reconnect 600 {SOURCES}"));
    assert_eq!(server.statistics()["sessions"], sessions);
    let idle = each(&server);
    held.child.kill().and_then(|()| held.child.wait()).expect("it is killed");
    let statistics = server.statistics_when(|now| now["channels"]["parked"] == sessions);
    assert_eq!(statistics["open_files"], sessions, "{statistics}");
    let parked = each(&server);
    eprintln!("{idle} bytes a session, {parked} when it is parked");
    assert!(idle <= SESSION_BYTES_MAX, "{idle} bytes of memory for each idle session");
    assert!(parked <= SESSION_BYTES_MAX, "{parked} bytes of memory for each parked session");
}

/// So many sessions whose server is killed, and started again: each goes on. Says how long that took.
fn come_back(sessions: usize) {
    let directory = tempfile::tempdir().expect("a directory");
    let state = tempfile::tempdir().expect("a directory");
    let (path, limit) = (state.path().display().to_string(), sessions.to_string());
    let arguments = ["--state", &path, "--max-sessions", &limit];
    let mut server = serve(directory.path(), &arguments);
    fill(&mut server);
    let load =
        format!("--sessions {sessions} --reconnect 120 --pattern randrw --rounds 2 --verify {SOURCES}");
    let mut held = Held::start(&server, &load);
    assert_eq!(server.statistics()["sessions"], sessions);

    server.kill();
    // What is sent before the kernel has closed a connection is of unknown outcome.
    await_no_connection(None, server.address().port());
    // All notice it before there is another server, and try in vain.
    held.begin();
    let started = Instant::now();
    let mut server = serve_at(&format!("tcp://{}", server.address()), directory.path(), &arguments);
    let ready = started.elapsed();
    let output = held.end();
    let took = started.elapsed().as_secs_f64();
    let said = String::from_utf8_lossy(&output.stderr);
    let report = report(&output);
    assert!(output.status.success(), "{report}\n{said}");
    assert_eq!((&report["errors"], &report["sessions"]["lost"]), (&0.into(), &0.into()), "{report}");
    assert_eq!(report["sessions"]["ios_min"], 2, "{report}");
    assert!(report["reconnects"].as_u64() >= Some(sessions as u64), "{report}");
    // Nothing was in flight when the connections ended.
    assert_eq!(report["unknown"], 0, "{report}");
    eprintln!(
        "{sessions} sessions had gone on {took:.2} s after the server was started anew, and {:.2} s after it \
         was ready; {} connections",
        took - ready.as_secs_f64(),
        report["reconnects"]
    );
    // They have left what they wrote.
    server.statistics_when(is_at_rest);
    let output = run(&server, "--pattern read --rounds 4096 --verify");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_thousand_sessions_go_on_when_their_server_is_killed_and_started_anew() {
    open_files::raise(2 * SESSIONS_FEW + DESCRIPTORS_OWN);
    come_back(SESSIONS_FEW);
}

#[test]
#[ignore = "long"]
fn as_many_sessions_as_there_can_be_go_on_when_their_server_is_killed_and_started_anew() {
    let limit = open_files::raise(2 * SESSIONS + DESCRIPTORS_OWN);
    come_back(SESSIONS.min(limit.saturating_sub(DESCRIPTORS_OWN) / 2));
}

#[test]
fn sessions_beyond_the_limit_are_counted_and_the_others_go_on() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut server = serve(directory.path(), &["--max-sessions", "100"]);
    fill(&mut server);
    let output = run(&server, "--sessions 103 --rounds 20 --depth 2 --verify --source 127.0.0.1");
    let report = report(&output);
    assert_eq!(output.status.code(), Some(1), "{report}");
    assert_eq!((&report["sessions"]["opened"], &report["sessions"]["rejected"]), (&100.into(), &3.into()));
    assert_eq!(report["verified_bytes"], 100 * 20 * 4096, "{report}");
    assert_eq!(report["errors"], 0, "{report}");
}

#[test]
fn sessions_that_die_all_at_once_leave_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut server = serve(directory.path(), &["--memory", "32M"]);
    fill(&mut server);
    let arguments = "--sessions 400 --depth 4 --pattern randrw --io-size 16k --verify --seconds 1000";
    let mut held = Held::start(&server, arguments);
    let stdin = held.child.stdin.as_mut().expect("stdin is piped");
    stdin.write_all(b"\n").expect("raio load waits for it");
    server.statistics_when(|statistics| statistics["requests"]["read"].as_u64() > Some(5000));
    held.child.kill().and_then(|()| held.child.wait()).expect("it is killed");
    server.statistics_when(is_at_rest);
    let output = run(&server, "--sessions 400 --rounds 2 --verify");
    assert!(output.status.success(), "{}", report(&output));
}

#[test]
fn a_wrong_byte_is_found_and_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut server = serve(directory.path(), &[]);
    fill(&mut server);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(directory.path().join("file"));
    let file = file.expect("raio load has made it");
    let mut byte = [0];
    file.read_exact_at(&mut byte, 1_234_567).expect("a byte");
    file.write_all_at(&[!byte[0]], 1_234_567).expect("another byte");
    // All of it, in order.
    let output = run(&server, "--pattern read --rounds 4096 --verify");
    let report = report(&output);
    assert_eq!(output.status.code(), Some(6), "{report}");
    assert_eq!(report["wrong"], 1, "{report}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("Byte 1234567 of the file is wrong"), "{said}");
}

#[test]
fn a_limit_on_open_files_is_raised_or_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut server = serve(directory.path(), &[]);
    fill(&mut server);
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 100 && exec \"$@\"", "sh"]).arg(binary("raio")).arg("load");
    command.args([&server.url(), "/d/file", "--json", "--sessions", "200", "--rounds", "1"]);
    let output = command.output().expect("sh runs");
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        // A privileged process may have more.
        assert_eq!(report(&output)["sessions"]["opened"], 200, "{said}");
    } else {
        assert_eq!(output.status.code(), Some(1), "{said}");
        for part in ["200 sessions take 232 open files", "only 100", "68 sessions", "ulimit -Hn 232"] {
            assert!(said.contains(part), "{said}");
        }
    }
}
