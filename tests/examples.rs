//! The examples run, and say what they are there to say.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// `cargo run` for an example, built as this test was: its path says how
/// (`TARGET_DIR[/TRIPLE]/PROFILE/deps/NAME`).
fn example(name: &str, arguments: &[&str]) -> Command {
    let me = std::env::current_exe().unwrap();
    let mut directory = me.parent().and_then(Path::parent).and_then(Path::parent).unwrap();
    let mut command = Command::new(env!("CARGO"));
    // What Cargo tells a test of its package: build scripts that depend on it (ring's) would be run again,
    // here and by the next Cargo without it, and all that is built on them.
    let of_test = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_NAME", "CARGO_PRIMARY_PACKAGE", "OUT_DIR"];
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| of_test.iter().any(|prefix| name.starts_with(prefix))) {
            command.env_remove(name);
        }
    }
    command.args(["run", "--quiet", "--offline", "--manifest-path"]);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let last = directory.file_name().unwrap_or_default().to_string_lossy();
    if last.starts_with(std::env::consts::ARCH) && last.contains("linux") {
        command.args(["--target", &last]);
        directory = directory.parent().unwrap();
    }
    command.arg("--target-dir").arg(directory);
    command.args(["--example", name, "--"]).args(arguments);
    command
}

/// What a command says, unless it does not end: then it is killed, and the test fails.
fn output_in_time(mut command: Command) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{command:?} has not ended within 120 s");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().unwrap()
}

fn output(name: &str, arguments: &[&str]) -> String {
    let output = output_in_time(example(name, arguments));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn hello_is_answered() {
    let said = output("hello", &[]);
    for line in [
        "server: \"hello\" is here",
        "server: it says \"Hello, server!\"",
        "client: the server says \"Hello, client!\"",
    ] {
        assert!(said.lines().any(|said| said == line), "{line:?} is missing in {said:?}");
    }
}

#[test]
fn hello_mt_greets_every_client_on_every_worker() {
    let said = output("hello_mt", &["3", "6", "500"]);
    for n in 0..3 {
        assert!(said.contains(&format!("worker {n}: 1000 greetings of 2 clients\n")), "{said}");
    }
    assert!(said.contains(" greetings a second\n"), "{said}");
}

#[test]
fn echo_returns_what_was_sent_between_two_processes() {
    let mut server = example("echo", &["server", "127.0.0.1:0"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim().strip_prefix("listening on ").expect("it says where it listens").to_owned();
    let jobs = [
        ("0", "50", "4"),
        ("1", "50", "4"),
        ("4096", "2000", "128"),
        ("65536", "500", "64"),
        ("1048576", "100", "16"),
    ];
    let said = jobs.map(|(bytes, count, depth)| {
        output_in_time(example("echo", &["client", &address, bytes, count, depth]))
    });
    let too_much = output_in_time(example("echo", &["client", &address, "1048577"]));
    // `cargo run` has become the example.
    server.kill().unwrap();
    server.wait().unwrap();
    for (output, (bytes, count, depth)) in said.iter().zip(jobs) {
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            text.starts_with(&format!("{count} echoes of {bytes} bytes, {depth} at a time: ")),
            "{output:?}"
        );
    }
    assert!(!too_much.status.success());
    assert!(String::from_utf8_lossy(&too_much.stderr).contains("at most 1048576 bytes"), "{too_much:?}");
}

#[test]
fn both_ways_finds_the_number_that_its_client_thinks_of() {
    for number in ["0", "617", "999"] {
        let said = output("both_ways", &[number]);
        let found = format!("client: it is {number}");
        assert!(said.lines().any(|line| line == found), "{said}");
        assert!(said.contains("server: it says \"Thank you!\"\n"), "{said}");
        assert!(said.ends_with("client: the server has taken the thanks\n"), "{said}");
    }
}
