//! What the server says, and that nobody who does not listen holds it up.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command as Process, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use raio_transport::handshake::Offer;
use raio_transport::protocol::{OPEN_READ, OPEN_WRITE};
use raio_transport::transport::ClientTransport;
use rustix::fs::Mode;
use rustix::process::{Pid, Signal, kill_process};

use crate::common::{Client, Server, TIMEOUT, Variant};

/// A server whose outputs may not work, so that its address must be known.
struct Mute {
    child: Child,
    address: SocketAddr,
}

impl Mute {
    fn start(stdout: impl Into<Stdio>, stderr: impl Into<Stdio>, arguments: &[&str]) -> Self {
        let address = TcpListener::bind("127.0.0.9:0").unwrap().local_addr().unwrap();
        let url = format!("tcp://{address}");
        let mut process = Process::new(env!("CARGO_BIN_EXE_raio_server"));
        process.args(["--listen", &url, "--workers", "1", "--export", "n=null:1M"]).args(arguments);
        // As in `Server::spawn`.
        process.env("ASAN_OPTIONS", "detect_leaks=0");
        let child = process.stdin(Stdio::null()).stdout(stdout).stderr(stderr).spawn().unwrap();
        let this = Self { child, address };
        let deadline = Instant::now() + TIMEOUT;
        while TcpStream::connect(address).is_err() {
            assert!(Instant::now() < deadline, "it does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        this
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Gives it something to say, and sees that it serves.
    fn is_used(&self) {
        for _ in 0..20 {
            let mut stranger = TcpStream::connect(self.address).unwrap();
            stranger.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
            self.signal(Signal::USR1);
            self.signal(Signal::HUP);
        }
        let mut client = Client::connect(self.address, &Offer::new("log"));
        let file = client.open("/n", OPEN_READ).unwrap();
        assert_eq!(client.read(file, 0, 4096).unwrap(), [0; 4096]);
    }

    fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Mute {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A pipe in which nothing has room, and the end to read from.
fn full_pipe() -> (std::io::PipeReader, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    let writer = OwnedFd::from(writer);
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    rustix::fs::fcntl_setfl(&writer, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&writer, &[b'\n'; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&writer, flags).unwrap();
    (reader, writer)
}

fn full_device() -> Stdio {
    OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

#[test]
fn outputs_that_nobody_reads_or_that_are_full_or_closed_hold_up_nothing() {
    let (_unread_out, out) = full_pipe();
    let (_unread_err, err) = full_pipe();
    let closed = || Stdio::from(std::io::pipe().unwrap().1);
    for (what, stdout, stderr) in [
        ("unread", out.into(), err.into()),
        ("full", full_device(), full_device()),
        ("closed", closed(), closed()),
    ] {
        let mut server = Mute::start(stdout, stderr, &[]);
        server.is_used();
        assert_eq!(server.stop().code(), Some(0), "{what}");
    }
    let mut wrong = Process::new(env!("CARGO_BIN_EXE_raio_server"));
    let status = wrong.args(["--export", "a=null:1M", "--workers", "0"]).stderr(full_device()).status();
    assert_eq!(status.unwrap().code(), Some(2));
}

#[test]
fn lines_that_were_lost_are_counted_and_reported_once_they_can_be() {
    let (mut unread, stderr) = full_pipe();
    let (stdout, stdin) = std::io::pipe().unwrap();
    let mut server = Mute::start(stdin, stderr, &["--log", "debug"]);
    for _ in 0..700 {
        drop(Client::connect(server.address, &Offer::new("log")));
    }
    let mut stdout = std::io::BufRead::lines(std::io::BufReader::new(stdout)).map_while(Result::ok);
    let deadline = Instant::now() + TIMEOUT;
    let lost = loop {
        server.signal(Signal::USR1);
        let stats = crate::common::Stats(stdout.find(|line| line.starts_with('{')).unwrap());
        if stats.get("log_lines_lost") > 0 && stats.is_idle() {
            break stats.get("log_lines_lost");
        }
        assert!(Instant::now() < deadline, "nothing is lost: {}", stats.0);
    };
    let mut text = String::new();
    let report = format!("raio_server: {lost} lines of the log were lost");
    let mut bytes = [0; 4096];
    while !text.contains(&report) {
        let n = unread.read(&mut bytes).unwrap();
        text.push_str(std::str::from_utf8(&bytes[..n]).unwrap());
    }
    let rest = std::thread::spawn(move || std::io::read_to_string(unread).unwrap());
    assert_eq!(server.stop().code(), Some(0));
    assert!(rest.join().unwrap().contains("Told to stop"), "what was queued at the end is written");
}

#[test]
fn lines_about_clients_have_their_address_and_nothing_that_steers_a_terminal() {
    let server =
        Server::start(Variant::Uring, &["--log", "debug", "--export", "n=null:1M", "--export", "e=/"]);
    let evil = "evil\n2026 WARN \u{1b}[2Jforged\u{202e}";
    let mut client = Client::connect(server.address, &Offer::new(evil));
    let port = client.transport.local_port().unwrap();
    client.open("/n", OPEN_READ).unwrap();
    assert_eq!(client.open("/d/a\nforged \u{1b}]0;title\u{7}", OPEN_READ), Err(libc::ENOENT));
    assert_eq!(client.open("/e/a\nforged", OPEN_WRITE), Err(libc::EROFS));
    drop(client);
    TcpStream::connect(server.address).unwrap().write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    server.log_until("A session has ended");
    let log = server.log_until("handshake failed");
    assert!(log.chars().all(|c| c == '\n' || !c.is_control()) && !log.contains('\u{202e}'), "{log:?}");
    assert!(log.lines().all(|line| line.starts_with("20")), "a forged line: {log}");
    let client = format!("peer=127.0.0.1:{port}");
    for (level, text) in [
        ("INFO", "A session has begun"),
        ("DEBUG", "A client opens"),
        ("DEBUG", "An open has failed"),
        ("INFO", "An open was rejected"),
        ("INFO", "A session has ended"),
    ] {
        let is_it = |line: &&str| line.contains(text) && line.contains(level) && line.contains(&client);
        assert_eq!(
            log.lines().filter(is_it).count(),
            if text == "A client opens" { 3 } else { 1 },
            "{text}: {log}"
        );
    }
    let failed = log.lines().find(|line| line.contains("handshake failed")).unwrap();
    assert!(failed.contains("peer=127.0.0.1:"), "{failed}");
}

/// What is no client of raio's, from this address.
fn stranger(from: [u8; 4], to: SocketAddr) {
    use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
    let stream = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&stream, &SocketAddr::from((from, 0))).unwrap();
    connect(&stream, &to).unwrap();
    let mut stream = TcpStream::from(stream);
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let _ = stream.read_to_end(&mut Vec::new());
}

#[test]
fn a_flood_of_bad_clients_hides_no_others_and_is_counted() {
    let mut server = Server::start(Variant::Uring, &["--workers", "1"]);
    (0..300).for_each(|_| stranger([127, 0, 0, 1], server.address));
    stranger([127, 0, 0, 2], server.address);
    server.log_until("peer=127.0.0.2:");
    server.signal(Signal::TERM);
    assert_eq!(server.wait().code(), Some(0));
    let log = server.log();
    let lines = log.lines().filter(|line| line.contains("peer=127.0.0.1:")).count();
    assert!((10..100).contains(&lines), "{lines} of 300: {log}");
    assert!(log.contains("peer=127.0.0.1") && log.contains(&format!("{} more lines", 300 - lines)), "{log}");
}

#[test]
fn json_has_an_object_a_line_with_the_id_and_what_it_is_about() {
    let mut server =
        Server::start(Variant::Uring, &["--log-format", "json", "--export", "e=/", "--workers", "1"]);
    let evil = "evil\",\"level\":\"error\"";
    let mut client = Client::connect(server.address, &Offer::new(evil));
    assert_eq!(client.open("/e/a\u{202e}\n{\"forged\":1}", OPEN_WRITE), Err(libc::EROFS));
    let peer = format!("127.0.0.1:{}", client.transport.local_port().unwrap());
    drop(client);
    server.log_until("session-ended");
    server.signal(Signal::TERM);
    assert_eq!(server.wait().code(), Some(0));
    let log = server.log();
    assert!(log.is_ascii(), "{log:?}");
    let objects: Vec<serde_json::Value> =
        log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect();
    let with = |id: &str| objects.iter().find(|object| object["id"] == id).unwrap_or_else(|| panic!("{log}"));
    for object in &objects {
        let level = object["level"].as_str().unwrap();
        assert!(["warn", "info"].contains(&level) && object["id"].is_string(), "{object}");
        assert!(object["time"].as_str().unwrap().parse::<jiff::Timestamp>().is_ok(), "{object}");
    }
    let began = with("session-began");
    assert_eq!((&began["message"], &began["name"]), (&"A session has begun.".into(), &evil.into()));
    for id in ["session-began", "open-rejected", "session-ended"] {
        assert_eq!(with(id)["peer"], peer[..], "{log}");
    }
    assert_eq!(began["session"], with("session-ended")["session"]);
    with("stopping");
}

#[test]
fn journald_gets_all_fields_and_standard_error_what_it_does_not_take() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: a journald of one's own needs root");
        return;
    }
    let run = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let socket = run.path().join("systemd/journal/socket");
    std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
    // Its path may be longer than the name of a socket: it is bound from where it is.
    let directory =
        rustix::fs::open(socket.parent().unwrap(), rustix::fs::OFlags::PATH, Mode::empty()).unwrap();
    let short = format!("/proc/self/fd/{}/socket", directory.as_raw_fd());
    let journald = UnixDatagram::bind(short).unwrap();
    journald.set_read_timeout(Some(TIMEOUT)).unwrap();

    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // systemd tells by this what standard error is connected to.
    let stderr = std::fs::File::create(directory.path().with_extension("log")).unwrap().metadata().unwrap();
    let mut process = Process::new("unshare");
    process.args(["--mount", "sh", "-c", "mount --bind \"$0\" /run && exec \"$@\""]).arg(run.path());
    process.arg(env!("CARGO_BIN_EXE_raio_server"));
    process.args(["--listen", "tcp://127.0.0.1:0", "--export", "n=null:1M"]);
    process.env("JOURNAL_STREAM", format!("{}:{}", stderr.dev(), stderr.ino()));
    let mut server = Server::spawn(process, directory);

    let name = "my fio";
    let client = Client::connect(server.address, &Offer::new(name));
    let mut datagram = [0; 8192];
    let began = loop {
        let n = journald.recv(&mut datagram).unwrap();
        let text = String::from_utf8_lossy(&datagram[..n]).into_owned();
        assert!(text.contains("\nSYSLOG_IDENTIFIER=raio_server\nMESSAGE="), "{text}");
        if text.contains("\nRAIO_ID=session-began\n") {
            break text;
        }
    };
    let peer = format!("127.0.0.1:{}", client.transport.local_port().unwrap());
    assert!(began.starts_with("PRIORITY=6\n"), "{began:?}");
    assert!(
        began.contains(&format!("\nMESSAGE=A session has begun. peer={peer} name=\"my fio\" ")),
        "{began:?}"
    );
    assert!(began.contains(&format!("\nRAIO_PEER={peer}\n")), "{began:?}");
    assert!(began.contains("\nRAIO_NAME=my fio\n"), "{began:?}");
    assert!(began.contains("\nMESSAGE_ID=") && began.contains("\nRAIO_SESSION="), "{began:?}");
    assert_eq!(server.log(), "");

    drop(journald);
    drop(client);
    let log = server.log_until("session-ended");
    assert!(log.starts_with(&format!("<6>A session has ended. peer={peer} ")), "{log}");
    server.signal(Signal::TERM);
    assert_eq!(server.wait().code(), Some(0));
}
