//! `raio top`: on a real terminal, which tmux has, and in pipes.

mod tool_site;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Operation, Options, Session};
use raio_e2e::{PATIENCE, Server, binary, carry_out};
use serde_json::Value;
use tempfile::TempDir;
use tool_site::assert_documented;

/// A server whose admin socket is in this directory.
fn serve(directory: &Path) -> Server {
    let admin = directory.join("admin");
    Server::start_with(&["fast=mem:16M,rw"], &["--workers", "1", "--admin", admin.to_str().expect("UTF-8")])
}

fn top(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(binary("raio"));
    command.arg("top").args(arguments).arg("--socket").arg(directory.join("admin"));
    command.stdin(Stdio::null()).output().expect("raio runs")
}

/// Sets a flag when it is dropped.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Reads from a server while something else is done.
fn while_reading<T>(server: &Server, act: impl FnOnce() -> T) -> T {
    let session = Session::connect(&server.url(), &Options::default()).expect("a session");
    let file = session.open("/fast", libc::O_RDWR, 0).expect("a file");
    let mut context = session.context(1).expect("a context");
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let buffers = Buffers::One(Buffer::Owned(vec![0; 4096].into()));
                let read = Operation::Read { offset: 0, buffers };
                if carry_out(&mut context, &file, read).is_err() {
                    break;
                }
            }
        });
        // Also if it panics: the scope waits for the thread.
        let _end = End(&is_over);
        act()
    })
}

#[test]
fn once_prints_what_was_done_in_an_interval_for_people_and_for_programs() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = serve(directory.path());
    while_reading(&server, || {
        for view in ["sessions", "exports", "workers", "disks", "slow"] {
            let out = top(directory.path(), &["--once", "--json", "--interval", "0.3", "--view", view]);
            let said = String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success() && said.is_empty(), "{view}: {said}");
            let object: Value = serde_json::from_slice(&out.stdout).expect("JSON");
            assert_documented("top", &object);
            assert!(object["reads_per_second"].as_f64() > Some(0.0), "{object}");
            assert!(object["read_p99_us"].as_f64() > Some(0.0), "{object}");
            let first = object["rows"].get(0);
            if ["sessions", "exports", "workers"].contains(&view) {
                let row = first.unwrap_or_else(|| panic!("a row: {object}"));
                assert!(row["requests_per_second"].as_f64() > Some(0.0), "{view}: {row}");
            }
        }
        let out = top(directory.path(), &["--once", "--view", "exports"]);
        let text = String::from_utf8(out.stdout).expect("UTF-8");
        assert!(text.starts_with("serving for ") && text.contains("\nfast "), "{text}");
    });
    let out = top(directory.path(), &[]);
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("Give --once"));
}

/// A terminal of 100 columns and 30 lines, in which a command runs.
struct Terminal {
    socket: PathBuf,
}

impl Terminal {
    /// None: there is no tmux.
    fn start(directory: &TempDir, command: &str) -> Option<Self> {
        let this = Self { socket: directory.path().join("tmux") };
        if Command::new("tmux").arg("-V").output().is_err() {
            eprintln!("SKIPPED: raio top on a terminal, for there is no tmux. Install it: scripts/need tmux");
            return None;
        }
        this.run(&["-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "30", command]);
        Some(this)
    }

    fn run(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("tmux");
        command.arg("-S").arg(&self.socket).args(arguments).env_remove("TMUX").env("TERM", "xterm-256color");
        let out = command.output().expect("tmux runs");
        assert!(out.status.success(), "tmux {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    fn press(&self, key: &str) {
        self.run(&["send-keys", key]);
    }

    /// What is on the screen, once this is there.
    fn wait_for(&self, is_there: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let screen = self.run(&["capture-pane", "-p"]);
            if is_there(&screen) {
                return screen;
            }
            assert!(Instant::now() < deadline, "the screen is still\n{screen}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = Command::new("tmux").arg("-S").arg(&self.socket).arg("kill-server").output();
    }
}

/// The command that runs it with its process id in a file, and shows then how it has left the terminal.
fn command(directory: &TempDir) -> String {
    format!(
        "sh -c 'cd {}; sh -c \"echo \\$\\$ >pid; exec {} top --interval 0.2 --socket admin\"; \
         echo exit=$?; stty -a; sleep 100'",
        directory.path().display(),
        binary("raio").display()
    )
}

#[test]
fn on_a_terminal_it_shows_tables_by_keys_and_finds_a_server_that_was_started_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = serve(directory.path());
    let Some(terminal) = Terminal::start(&directory, &command(&directory)) else { return };
    let is_reading = |screen: &str| {
        screen
            .lines()
            .any(|line| line.starts_with("read ") && line.contains("MiB/s") && !line.contains("p50        -"))
    };
    while_reading(&server, || {
        terminal.wait_for(|screen| is_reading(screen) && screen.contains("tcp x 2"));
        terminal.press("e");
        terminal.wait_for(|screen| screen.lines().any(|line| line.starts_with("fast ")));
        terminal.press("w");
        terminal.wait_for(|screen| screen.lines().any(|line| line.starts_with("worker ")));
        terminal.press("l");
        terminal.press("Space");
        terminal.wait_for(|screen| screen.contains("Paused") && screen.contains("space go on"));
        terminal.press("Space");
        terminal.run(&["resize-window", "-x", "50", "-y", "12"]);
        terminal.press("s");
        terminal.wait_for(|screen| screen.contains("session ") && !screen.contains("transports"));
        terminal.run(&["resize-window", "-x", "3", "-y", "2"]);
        terminal.run(&["resize-window", "-x", "100", "-y", "30"]);
        terminal.wait_for(is_reading);
    });
    drop(server);
    let screen = terminal.wait_for(|screen| screen.contains("No connection for "));
    assert!(screen.contains("serving for "), "the last numbers are still there:\n{screen}");
    let _server = serve(directory.path());
    terminal.wait_for(|screen| screen.contains("0 sessions") && !screen.contains("No connection"));
    terminal.press("q");
    let screen = terminal.wait_for(|screen| screen.contains("noflsh"));
    assert!(screen.contains("exit=0") && screen.contains(" icanon") && screen.contains(" echo "), "{screen}");
}

#[test]
fn a_signal_leaves_the_terminal_as_it_was() {
    for (signal, exit) in [("TERM", "exit=0"), ("INT", "exit=0")] {
        let directory = tempfile::tempdir().expect("a directory");
        let _server = serve(directory.path());
        let Some(terminal) = Terminal::start(&directory, &command(&directory)) else { return };
        terminal.wait_for(|screen| screen.contains("serving for "));
        let pid = std::fs::read_to_string(directory.path().join("pid")).expect("a file");
        let killed = Command::new("kill").args(["-s", signal, pid.trim()]).status().expect("kill runs");
        assert!(killed.success());
        let screen = terminal.wait_for(|screen| screen.contains("noflsh"));
        assert!(screen.contains(exit) && screen.contains(" icanon"), "{signal}:\n{screen}");
    }
}

#[test]
fn it_ends_with_its_terminal() {
    let directory = tempfile::tempdir().expect("a directory");
    let _server = serve(directory.path());
    let Some(terminal) = Terminal::start(&directory, &command(&directory)) else { return };
    terminal.wait_for(|screen| screen.contains("serving for "));
    let pid = std::fs::read_to_string(directory.path().join("pid")).expect("a file");
    drop(terminal);
    let status = PathBuf::from(format!("/proc/{}/status", pid.trim()));
    let runs = || std::fs::read_to_string(&status).is_ok_and(|text| !text.contains("State:\tZ"));
    let deadline = Instant::now() + PATIENCE;
    while runs() {
        assert!(Instant::now() < deadline, "it still runs");
        std::thread::sleep(Duration::from_millis(50));
    }
}
