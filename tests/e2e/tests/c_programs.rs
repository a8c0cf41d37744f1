//! The C programs of tests/c: the header, programs written for R-AIO, misuse, I/O, a server that dies. Each
//! runs as a user would build it, and again under AddressSanitizer and UndefinedBehaviorSanitizer; one client
//! runs under valgrind.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

use raio_e2e::{FuseFs, FuseOptions, Server, binary, copy_program, is_at_rest, needs_root};

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Where the programs are, built once for all tests of this file.
fn programs() -> &'static Path {
    static PROGRAMS: OnceLock<PathBuf> = OnceLock::new();
    PROGRAMS.get_or_init(|| make("tests/c", "c-tests", "LIBDIR", &[]))
}

/// Runs make in a directory of the repository, to build programs in a directory beside libraio.so.
/// `library_variable` is the make variable for the directory of the library. Returns the directory of the
/// programs.
fn make(folder: &str, out: &str, library_variable: &str, programs: &[&str]) -> PathBuf {
    let library = binary("libraio.so");
    let directory = library.parent().expect("a file is in a directory");
    let out = directory.join(out);
    let make = Command::new("make")
        .args(["-s", "-C", &format!("{REPOSITORY}/{folder}")])
        .args(programs.iter().map(|name| format!("{}/{name}", out.display())))
        .arg(format!("O={}", out.display()))
        .arg(format!("{library_variable}={}", directory.display()))
        .output()
        .expect("make runs");
    assert!(make.status.success(), "{folder} does not build:\n{}", String::from_utf8_lossy(&make.stderr));
    out
}

/// A server with the exports that tests/c/check.h names, over files of its own.
struct Exports {
    server: Server,
    directory: tempfile::TempDir,
}

fn serve() -> Exports {
    serve_with(&[])
}

fn serve_with(arguments: &[&str]) -> Exports {
    let directory = tempfile::tempdir().expect("a directory");
    let (writable, readable) = (directory.path().join("rw"), directory.path().join("ro"));
    std::fs::create_dir(&writable).and_then(|()| std::fs::create_dir(&readable)).expect("two directories");
    let data: Vec<u8> = (0..(1usize << 20) + 1234).map(|i| (i * 7 + i / 251) as u8).collect();
    std::fs::write(readable.join("data.bin"), data).expect("data.bin");
    std::fs::write(readable.join("empty"), "").expect("empty");
    let exports = [
        &format!("rw={},rw", writable.display()),
        &format!("ro={}", readable.display()),
        "mem=mem:64M,rw",
        "null=null:1G,rw",
    ];
    let server = Server::start_with(&exports, arguments);
    Exports { server, directory }
}

impl Exports {
    /// Another server, in the place of this one, which has ended. It listens there.
    fn start_again(self, listen: &str) -> Self {
        let export = format!("rw={},rw", self.directory.path().join("rw").display());
        let server = Server::start_with(&[&export], &["--listen", listen]);
        Self { server, ..self }
    }
}

fn command(program: &Path, server: Option<&Server>) -> Command {
    let mut command = Command::new(program);
    command.env("ASAN_OPTIONS", "detect_leaks=1:abort_on_error=0").env("UBSAN_OPTIONS", "print_stacktrace=1");
    if let Some(server) = server {
        let address = server.address();
        command.arg(address.ip().to_string()).arg(address.port().to_string());
    }
    command
}

fn passes(mut command: Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn program_passes(name: &str) {
    let exports = serve();
    for build in ["plain", "sanitized"] {
        passes(command(&programs().join(build).join(name), Some(&exports.server)));
    }
}

#[test]
fn the_header_compiles_as_c99_c11_and_cxx17_and_its_layout_is_pinned() {
    for name in ["compile-c99", "compile-c11", "compile-cxx17", "compile-no-inline", "layout"] {
        passes(command(&programs().join("plain").join(name), None));
    }
}

#[test]
fn it_makes_no_difference_to_a_program_how_much_a_request_may_carry() {
    let exports = serve_with(&["--io-max", "64K"]);
    for build in ["plain", "sanitized"] {
        passes(command(&programs().join(build).join("io"), Some(&exports.server)));
    }
}

#[test]
fn the_library_can_be_loaded_at_run_time() {
    passes(command(&programs().join("plain/dlopen"), None));
}

#[test]
fn a_program_that_takes_the_session_for_the_file_works() {
    program_passes("r-aio-1-session-is-a-file");
}

#[test]
fn a_program_that_reads_into_its_own_memory_and_into_lent_memory_works() {
    program_passes("r-aio-2-two-models-of-memory");
}

#[test]
fn a_program_that_submits_too_much_and_ends_untidily_works() {
    program_passes("r-aio-3-batches-and-endings");
}

#[test]
fn a_program_that_sets_up_its_context_before_it_opens_works() {
    program_passes("r-aio-4-setup-before-open");
}

#[test]
fn a_program_that_names_files_by_host_port_and_path_works() {
    program_passes("r-aio-5-old-file-names");
}

#[test]
fn an_eventfd_ticks_once_for_each_completion() {
    program_passes("eventfd");
}

#[test]
fn a_program_written_for_libaio_finds_what_it_relies_on() {
    for build in ["plain", "sanitized"] {
        let mut exports = serve();
        let mut command = command(&programs().join(build).join("libaio"), Some(&exports.server));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("libaio starts");
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let mut said = String::new();
        while !said.ends_with("stopped\n") {
            assert!(stdout.read_line(&mut said).expect("libaio prints") > 0, "{build}:\n{said}");
        }
        // It has stopped its session, and a child of it that has all its descriptors lives.
        exports.server.statistics_when(is_at_rest);
        drop(child.stdin.take());
        std::io::Read::read_to_string(&mut stdout, &mut said).expect("libaio ends");
        assert!(child.wait().expect("libaio ends").success(), "{build}:\n{said}");
    }
}

#[test]
fn every_kind_of_io_does_what_the_header_says() {
    program_passes("io");
    let exports = serve();
    passes(command(&programs().join("static/io"), Some(&exports.server)));
}

#[test]
fn programs_that_do_one_thing_at_a_time_and_bindings_have_simple_calls() {
    program_passes("simple");
}

#[test]
fn names_directories_and_small_files_are_there_as_calls_and_as_iocbs() {
    program_passes("names");
}

#[test]
fn copies_checksums_and_locks_are_there_as_calls_and_as_iocbs() {
    program_passes("ranges");
}

#[test]
fn the_same_over_a_unix_socket() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("socket").display().to_string();
    let listen = format!("unix://{socket}");
    let exports = serve_with(&["--listen", "tcp://127.0.0.1:0", "--listen", &listen]);
    for build in ["plain", "sanitized"] {
        let mut command = command(&programs().join(build).join("io"), None);
        command.args([&socket, "0"]);
        passes(command);
    }
    drop(exports);
}

#[test]
fn misuse_is_an_error_and_never_a_crash() {
    program_passes("misuse");
}

#[test]
fn when_the_server_is_killed_every_iocb_completes_once_with_an_error() {
    for build in ["plain", "sanitized"] {
        let mut exports = serve();
        let mut command = command(&programs().join(build).join("server_death"), Some(&exports.server));
        let mut child = command.stdout(Stdio::piped()).spawn().expect("server_death starts");
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let mut said = String::new();
        stdout.read_line(&mut said).expect("server_death says when it is ready");
        assert_eq!(said.trim(), "ready");
        exports.server.kill();
        said.clear();
        std::io::Read::read_to_string(&mut stdout, &mut said).expect("server_death ends");
        assert!(child.wait().expect("server_death ends").success(), "{build}:\n{said}");
    }
}

#[test]
fn while_the_server_is_away_a_program_is_told_so_and_its_trace_shows_for_how_long() {
    for build in ["plain", "sanitized"] {
        let mut exports = serve_with(&["--linger", "0"]);
        let listen = exports.server.listen_url();
        let directory = tempfile::tempdir().expect("a directory");
        let trace = directory.path().join("trace.json");
        let mut command = command(&programs().join(build).join("reconnect"), Some(&exports.server));
        command.env("RAIO_TRACE", &trace).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("reconnect starts");
        let mut stdin = child.stdin.take().expect("stdin is piped");
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let mut said = String::new();
        let mut says = |word: &str| {
            said.clear();
            stdout.read_line(&mut said).expect("it says how far it is");
            assert_eq!(said.trim(), word, "{build}");
        };
        says("ready");
        exports.server.kill();
        let killed = Instant::now();
        writeln!(stdin).expect("it listens");
        says("away");
        let away = killed.elapsed();
        exports = exports.start_again(&listen);
        writeln!(stdin).expect("it listens");
        let mut said = String::new();
        std::io::Read::read_to_string(&mut stdout, &mut said).expect("it ends");
        assert!(child.wait().expect("it ends").success(), "{build}:\n{said}");
        drop(exports);

        let (text, trace) = read_trace(&trace);
        let events = trace["traceEvents"].as_array().expect("events");
        let at = |phase: &str| {
            let mut found =
                events.iter().filter(|event| event["name"] == "reconnect" && event["ph"] == phase);
            let event = found.next().unwrap_or_else(|| panic!("{build}: {phase} is not in {text}"));
            assert!(found.next().is_none(), "{build}: {text}");
            (event["id"].clone(), event["ts"].as_f64().expect("a time"))
        };
        let ((id, begin), (other, end)) = (at("b"), at("e"));
        assert_eq!(id, other);
        assert!(end - begin >= away.as_micros() as f64 / 2.0, "{build}: {begin} to {end}, away for {away:?}");
        // Those before and those after have the ports of two connections.
        let writes = events.iter().filter(|event| event["name"] == "write" && event["ph"] == "b");
        let ports: std::collections::HashSet<_> = writes
            .map(|event| event["id"].as_str().expect("an id").split_once('-').expect("two").0)
            .collect();
        assert_eq!(ports.len(), 2, "{build}: {text}");
    }
}

/// The examples, as libraio/examples/Makefile builds them, built once for all tests of this file.
fn examples() -> &'static Path {
    static EXAMPLES: OnceLock<PathBuf> = OnceLock::new();
    EXAMPLES.get_or_init(|| {
        make("libraio/examples", "c-examples", "RAIO", &["raio_cp", "raio_cat", "raio_epoll"])
    })
}

#[test]
fn a_byte_that_cannot_be_read_is_a_failure_of_every_example_and_not_the_end_of_the_file() {
    let content: Vec<u8> = (0..1_000_000u32).map(|i| (i * 7 + i / 251) as u8).collect();
    // The second is in no page cache when it goes bad.
    let files = [("good", &content[..]), ("bad", &content[..])];
    let Some(fuse) = FuseFs::mount("a bad sector", FuseOptions::default(), &files) else { return };
    let (programs, scratch) = (examples(), tempfile::tempdir().expect("a directory"));
    let copy = scratch.path().join("copy");
    let server = Server::start(&[&format!("e={}", fuse.path().display())]);
    let run = |name: &str, file: &str| {
        let mut command = Command::new(programs.join(name));
        command.arg(format!("raio+tcp://{}/e/{file}", server.address()));
        if name == "raio_cp" {
            command.arg(&copy);
        }
        command.output().expect("the example runs")
    };
    // In the middle of a block of theirs, so that the read of it is short.
    let bad = 400_000;
    for is_good in [true, false] {
        if !is_good {
            fuse.fail_reads_at(bad, libc::EIO);
        }
        for name in ["raio_cp", "raio_cat", "raio_epoll"] {
            let output = run(name, if is_good { "good" } else { "bad" });
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.success(), is_good, "{name}: {said}");
            assert!(is_good || said.contains("Input/output error"), "{name}: {said}");
            if name == "raio_cat" {
                assert!(content.starts_with(&output.stdout), "it writes what is not in the file");
                assert!(!is_good || output.stdout.len() == content.len(), "{}", output.stdout.len());
            }
        }
    }
}

/// What `raio-transport`'s `trace` module promises of a file, and what it is for: each request in its steps.
#[test]
fn a_trace_has_each_request_from_its_submission_to_its_collection() {
    let directory = tempfile::tempdir().expect("a directory");
    for build in ["plain", "sanitized"] {
        let exports = serve();
        let program = programs().join(build).join("r-aio-3-batches-and-endings");
        let traced = |file: &str| {
            let mut command = command(&program, Some(&exports.server));
            command.env("RAIO_TRACE", directory.path().join(file));
            command
        };
        passes(traced(&format!("{build}-%p.json")));
        let file = std::fs::read_dir(directory.path())
            .expect("the directory")
            .map(|entry| entry.expect("an entry").path())
            .find(|path| path.to_string_lossy().contains(build))
            .expect("a trace");
        let name = file.file_name().expect("a name").to_string_lossy().into_owned();
        assert!(!name.contains('%'), "{name}");
        let (text, trace) = read_trace(&file);
        let known = &trace["otherData"];
        assert!(known["clock_offset_us"].is_number() && known["clock_error_us"].is_number(), "{known}");
        let mut steps = BTreeMap::<String, Vec<(f64, String)>>::new();
        for event in trace["traceEvents"].as_array().expect("events") {
            if event["cat"] == "request" {
                let id = event["id"].as_str().expect("an id");
                let (port, request) = id.split_once('-').expect("a connection and a request");
                assert!(
                    port.parse::<u16>().expect("a port") > 1023 && u32::from_str_radix(request, 16).is_ok()
                );
                let phase = event["ph"].as_str().expect("a phase");
                let step = if phase == "n" { &event["name"] } else { &event["ph"] };
                let time = event["ts"].as_f64().expect("a time");
                steps.entry(id.to_owned()).or_default().push((time, step.as_str().expect("text").to_owned()));
            }
        }
        assert!(!steps.is_empty(), "{text}");
        for (id, steps) in steps {
            assert!(steps.is_sorted_by_key(|(time, _)| *time), "{id}: {steps:?}");
            let names: Vec<&str> = steps.iter().map(|(_, step)| step.as_str()).collect();
            assert!(["b", "sent", "answered", "e"].starts_with(&names), "{id}: {names:?}");
        }
        // A trace is never overwritten.
        let output = traced(&name).output().expect("the program runs");
        assert!(!output.status.success());
        assert!(std::fs::read_to_string(&file).expect("the trace") == text);
    }
}

/// A trace: its text, and what that means.
fn read_trace(file: &Path) -> (String, serde_json::Value) {
    let text = std::fs::read_to_string(file).expect("the trace");
    let trace = serde_json::from_str(&text).expect("JSON");
    (text, trace)
}

/// Where each request begins and ends in a trace, in microseconds of the server's clock.
fn spans(file: &Path) -> (BTreeMap<String, (f64, f64)>, f64) {
    let (_, trace) = read_trace(file);
    let known = |name: &str| trace["otherData"][name].as_f64().expect("a number");
    let mut spans = BTreeMap::<String, (f64, f64)>::new();
    for event in trace["traceEvents"].as_array().expect("events") {
        if event["cat"] == "request" {
            let time = event["ts"].as_f64().expect("a time") + known("clock_offset_us");
            let span = spans.entry(event["id"].as_str().expect("an id").to_owned()).or_default();
            match event["ph"].as_str() {
                Some("b") => span.0 = time,
                Some("e") => span.1 = time,
                _ => {}
            }
        }
    }
    (spans, known("clock_error_us"))
}

#[test]
fn the_traces_of_both_sides_have_each_request_of_the_client() {
    let directory = tempfile::tempdir().expect("a directory");
    let (of_client, of_server) = (directory.path().join("client.json"), directory.path().join("server.json"));
    let mut server =
        Server::start_with(&["rw=mem:64M,rw"], &["--trace", of_server.to_str().expect("plain text")]);
    let content = directory.path().join("content");
    std::fs::write(&content, vec![7; 8 << 20]).expect("a file to be copied");
    let mut copy = Command::new(examples().join("raio_cp"));
    copy.env("RAIO_TRACE", &of_client);
    copy.arg(&content).arg(format!("raio+tcp://{}/rw", server.address()));
    passes(copy);
    server.signal(rustix::process::Signal::TERM);
    assert!(server.wait().success());
    let ((client, error), (served, _)) = (spans(&of_client), spans(&of_server));
    assert!(client.len() > 10, "{client:?}");
    // Times are doubles: they are exact to a quarter of a microsecond.
    let error = error + 1.0;
    for (id, (begin, end)) in client {
        let (from, to) = served.get(&id).unwrap_or_else(|| panic!("{id} is not in the server's trace"));
        assert!(
            begin - error <= *from && from <= to && *to <= end + error,
            "{id}: {begin} {from} {to} {end}"
        );
    }
}

/// A program that runs with rights its user has not creates no file for him.
#[test]
fn a_setuid_program_ignores_raio_trace() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    const OTHER_USER: u32 = 65_534;
    if !needs_root("a setuid program") {
        return;
    }
    let exports = serve();
    let directory = tempfile::tempdir().expect("a directory");
    let program = directory.path().join("io");
    copy_program(&programs().join("static/io"), &program);
    let permit = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("its permissions");
    };
    permit(directory.path(), 0o777);
    for (mode, is_traced) in [(0o755, true), (0o4755, false)] {
        permit(&program, mode);
        let traces = directory.path().join(format!("{mode:o}"));
        std::fs::create_dir(&traces).expect("a directory");
        permit(&traces, 0o777);
        let mut command = command(&program, Some(&exports.server));
        // It forks, so there is a file for each process.
        command.env("RAIO_TRACE", traces.join("%p")).uid(OTHER_USER);
        passes(command);
        let mut files = std::fs::read_dir(&traces).expect("the directory").map(|file| file.expect("a file"));
        let first = files.next().map(|file| file.metadata().expect("its status").permissions().mode());
        assert_eq!(first.map(|mode| mode & 0o7777), is_traced.then_some(0o600), "{mode:o}");
    }
}

#[test]
fn clients_are_clean_under_valgrind() {
    for program in ["plain/r-aio-2-two-models-of-memory", "plain/names"] {
        is_clean_under_valgrind(program);
    }
}

fn is_clean_under_valgrind(program: &str) {
    let exports = serve();
    let mut command = Command::new("valgrind");
    command
        .args([
            "--quiet",
            "--error-exitcode=9",
            "--leak-check=full",
            "--errors-for-leak-kinds=definite,indirect",
        ])
        .arg(programs().join(program))
        .env("CHECK_SECONDS", "600");
    let address = exports.server.address();
    command.arg(address.ip().to_string()).arg(address.port().to_string());
    passes(command);
}
