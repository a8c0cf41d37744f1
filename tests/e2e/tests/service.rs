//! Servers that a service manager has started: what it is told, and the sockets that it passes.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Context, Error, File, Operation, Options, Session};
use raio_e2e::{HeldThread, PATIENCE, Server, binary, carry_out};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const CONTENT: &[u8; 10] = b"0123456789";

/// A manager that hears what its service says.
struct Manager {
    socket: UnixDatagram,
    directory: TempDir,
}

impl Drop for Manager {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.path("log")).unwrap_or_default());
        }
    }
}

impl Manager {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = UnixDatagram::bind(directory.path().join("notify")).expect("a socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        fs::create_dir(directory.path().join("data")).expect("a directory");
        fs::write(directory.path().join("data/file"), CONTENT).expect("a file");
        Self { socket, directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Its service, yet to be started: a server that exports its directory `data` as `d`.
    fn command(&self) -> Command {
        let mut command = Command::new(binary("raio_server"));
        self.arguments(&mut command);
        command
    }

    fn arguments(&self, command: &mut Command) {
        command.env("NOTIFY_SOCKET", self.path("notify")).args(["--workers", "2"]);
        command.arg("--export").arg(format!("d={},rw", self.path("data").display()));
        command.arg("--state").arg(self.path("state"));
        if !rustix::process::geteuid().is_root() {
            command.arg("--sandbox=off");
        }
    }

    /// The same, with these listening sockets from descriptor 3 on, and its log in a file. The process stays
    /// the same when it becomes the server.
    fn command_with_sockets(&self, sockets: Vec<OwnedFd>) -> Command {
        let count = sockets.len();
        let mut sockets = sockets.into_iter();
        let script = format!(
            "exec 3<&0 4<&2 </dev/null 2>>\"$0\"; LISTEN_PID=$$ LISTEN_FDS={count} LISTEN_FDNAMES=one:two \
             exec \"$@\""
        );
        let mut command = Command::new("bash");
        command.arg("-c").arg(script).arg(self.path("log")).arg(binary("raio_server"));
        self.arguments(&mut command);
        command.stdin(Stdio::from(sockets.next().expect("a socket")));
        command.stderr(sockets.next().map_or_else(Stdio::null, Stdio::from));
        assert_eq!(sockets.len(), 0, "there is no place for more");
        command
    }

    /// The next message that contains this.
    fn hear_of(&self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut buffer = [0; 4096];
            let count = self.socket.recv(&mut buffer).expect("the service says something");
            let heard = String::from_utf8(buffer[..count].to_vec()).expect("UTF-8");
            if heard.contains(text) {
                return heard;
            }
            assert!(Instant::now() < deadline, "nothing of {text:?}");
        }
    }
}

/// Runs a server that does not start. Returns its error message.
fn refused(mut command: Command) -> String {
    let output = command.stdout(Stdio::piped()).output().expect("it runs");
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_manager_hears_how_its_service_is() {
    const WATCHDOG: Duration = Duration::from_millis(400);
    let manager = Manager::new();
    let mut command = manager.command();
    let file = manager.path("raio.toml");
    fs::write(&file, "linger = 60\n").expect("a file");
    command.args(["--listen", "tcp://127.0.0.1:0"]).arg("--config").arg(file);
    command.env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string());
    let mut server = Server::spawn(command);
    manager.hear_of("READY=1");
    TcpStream::connect(server.address()).expect("it accepts");
    let status = manager.hear_of("STATUS=");
    let expected = format!("STATUS=Serving 1 export on {}; 0 sessions\n", server.listen_url());
    assert!(status.starts_with(&expected), "{status}");
    let begun = Instant::now();
    for _ in 0..3 {
        manager.hear_of("WATCHDOG=1");
    }
    assert!(begun.elapsed() >= WATCHDOG / 2, "it comes at half of the time");

    let session = Session::connect(&server.url(), &Options::default()).expect("a session");
    manager.hear_of("; 1 session\n");
    server.signal(Signal::HUP);
    manager.hear_of("RELOADING=1\nMONOTONIC_USEC=");
    manager.hear_of("READY=1");

    let held = HeldThread::new(server.pid(), "raio-1");
    // Something that it has to do.
    let waiting: Vec<_> = (0..4).map(|_| TcpStream::connect(server.address()).expect("a socket")).collect();
    manager.hear_of("worker 1 has been stuck for ");
    manager.hear_of("WATCHDOG=1");
    drop(held);
    manager.hear_of("; 1 session\n");
    drop((waiting, session));
    server.signal(Signal::TERM);
    manager.hear_of("STOPPING=1");
    assert!(server.wait().success());
}

#[test]
fn a_service_that_waits_for_another_server_asks_for_more_time() {
    let (first, second) = (Manager::new(), Manager::new());
    let mut before = first.command();
    before.args(["--listen", "tcp://127.0.0.1:0"]);
    let mut before = Server::spawn(before);
    let mut command = first.command();
    command.args(["--clear", "--listen", "tcp://127.0.0.1:0"]).env("NOTIFY_SOCKET", second.path("notify"));
    let mut after = command.stdout(Stdio::null()).spawn().expect("it starts");
    let text = second.hear_of("EXTEND_TIMEOUT_USEC=");
    assert!(text.starts_with("STATUS=Waiting: export d ("), "{text}");
    before.signal(Signal::TERM);
    assert!(before.wait().success());
    second.hear_of("READY=1");
    end(&mut after);
}

/// Stops a server.
fn end(server: &mut Child) {
    kill_process(Pid::from_child(server), Signal::TERM).expect("it runs");
    assert!(server.wait().expect("it ends").success());
}

fn write(context: &mut Context, file: &File, offset: u64, bytes: &[u8]) -> Result<u64, Error> {
    let buffers = Buffers::One(Buffer::Owned(bytes.into()));
    carry_out(context, file, Operation::Write { offset, buffers })?.result
}

/// All that a program does that reads a file.
fn visit(url: &str) -> Result<u64, Error> {
    let session = Session::connect(url, &Options::default())?;
    let file = session.open("/d/file", libc::O_RDONLY, 0)?;
    let buffers = Buffers::One(Buffer::Owned(vec![0; 64].into()));
    let mut context = session.context(1)?;
    let count = carry_out(&mut context, &file, Operation::Read { offset: 0, buffers })?.result?;
    file.close()?;
    Ok(count)
}

/// Sets it however this is left.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_restart_refuses_nobody_and_loses_nothing_if_the_manager_holds_the_sockets() {
    let manager = Manager::new();
    let tcp = TcpListener::bind("127.0.0.1:0").expect("a socket");
    let unix = UnixListener::bind(manager.path("socket")).expect("a socket");
    let start = || {
        let sockets = vec![tcp.try_clone().expect("a copy").into(), unix.try_clone().expect("a copy").into()];
        Server::spawn(manager.command_with_sockets(sockets))
    };
    let address = tcp.local_addr().expect("an address");
    let mut server = start();
    assert_eq!(server.address(), address);
    let urls = server.urls();
    assert_eq!(urls.len(), 2, "{urls:?}");
    let (is_over, visits) = (AtomicBool::new(false), AtomicU32::new(0));
    // Each write is another cell, so that none can hide another one's loss.
    let stay = || {
        let session = Session::connect(&urls[0], &Options::default()).expect("a session");
        let file = session.open("/d/cells", libc::O_RDWR | libc::O_CREAT, 0o644).expect("a file");
        let mut context = session.context(4).expect("a context");
        let mut count: u64 = 0;
        while !is_over.load(Ordering::Relaxed) {
            let cell = write(&mut context, &file, count * 8, &count.to_ne_bytes());
            assert_eq!(cell.expect("the session goes on"), 8);
            count += 1;
        }
        (count, context.stats().reconnects)
    };
    let come_and_go = |url: &str| {
        while !is_over.load(Ordering::Relaxed) {
            assert_eq!(visit(url).expect("it is served"), CONTENT.len() as u64);
            visits.fetch_add(1, Ordering::Relaxed);
        }
    };
    let connect = || {
        while !is_over.load(Ordering::Relaxed) {
            TcpStream::connect(address).expect("nobody is refused");
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    let (cells, reconnects) = std::thread::scope(|scope| {
        let over = Over(&is_over);
        let stays = scope.spawn(stay);
        let programs: Vec<_> = urls.iter().map(|url| scope.spawn(|| come_and_go(url))).collect();
        scope.spawn(connect);
        let await_visits = || {
            let (before, deadline) = (visits.load(Ordering::Relaxed), Instant::now() + PATIENCE);
            while visits.load(Ordering::Relaxed) < before + 6 && !stays.is_finished() {
                assert!(Instant::now() < deadline, "nobody is served");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        for _ in 0..3 {
            await_visits();
            server.signal(Signal::TERM);
            assert!(server.wait().success());
            server = start();
        }
        await_visits();
        drop(over);
        programs.into_iter().for_each(|program| program.join().expect("no errors"));
        stays.join().expect("no errors")
    });
    assert!(reconnects >= 2, "{reconnects}");
    let stored = fs::read(manager.path("data/cells")).expect("a file");
    let expected: Vec<u8> = (0..cells).flat_map(u64::to_ne_bytes).collect();
    assert!(stored == expected, "{} bytes instead of {}", stored.len(), expected.len());
}

#[test]
fn a_server_that_is_killed_is_reached_at_the_same_socket_by_its_sessions() {
    let manager = Manager::new();
    let tcp = TcpListener::bind("127.0.0.1:0").expect("a socket");
    let start = || Server::spawn(manager.command_with_sockets(vec![tcp.try_clone().expect("a copy").into()]));
    let mut server = start();
    let session = Session::connect(&server.url(), &Options::default()).expect("a session");
    let file = session.open("/d/cells", libc::O_RDWR | libc::O_CREAT, 0o644).expect("a file");
    let mut context = session.context(4).expect("a context");
    assert_eq!(write(&mut context, &file, 0, CONTENT).expect("it is written"), CONTENT.len() as u64);
    server.kill();
    TcpStream::connect(tcp.local_addr().expect("an address")).expect("it waits");
    let _server = start();
    assert_eq!(write(&mut context, &file, 10, CONTENT).expect("the session goes on"), CONTENT.len() as u64);
    assert_eq!(fs::read(manager.path("data/cells")).expect("a file"), [*CONTENT; 2].concat());
}

#[test]
fn sockets_that_do_not_fit_the_configuration_are_refused() {
    let manager = Manager::new();
    let log = || fs::read_to_string(manager.path("log")).expect("a log");
    let bound = |address: &str| vec![TcpListener::bind(address).expect("a socket").into()];
    let mut command = manager.command_with_sockets(bound("127.0.0.1:0"));
    command.args(["--listen", "tcp://127.0.0.2:0"]);
    refused(command);
    assert!(log().contains("which no --listen names for itself"), "{}", log());
    // What listens for other machines needs keys, whoever has made the socket.
    refused(manager.command_with_sockets(bound("0.0.0.0:0")));
    assert!(log().contains("other machines reach this address"), "{}", log());
    let datagrams = UnixDatagram::unbound().expect("a socket");
    refused(manager.command_with_sockets(vec![datagrams.into()]));
    assert!(log().contains("passes \"one\", which is no listening stream socket"), "{}", log());
}

#[test]
fn a_server_that_systemd_starts_at_the_first_connect_serves_it() {
    let program = "systemd-socket-activate";
    if Command::new(program).arg("--version").output().is_err() {
        eprintln!("SKIPPED: there is no {program}");
        return;
    }
    let manager = Manager::new();
    let socket = manager.path("socket");
    let mut command = Command::new(program);
    // It passes on the variables that it is told to, and no others.
    command.arg("--listen").arg(&socket).arg("--setenv=NOTIFY_SOCKET").arg(binary("raio_server"));
    manager.arguments(&mut command);
    let mut server = command.stdout(Stdio::null()).spawn().expect("it starts");
    let deadline = Instant::now() + PATIENCE;
    while !socket.exists() {
        assert!(Instant::now() < deadline, "{program} does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    let count = visit(&format!("raio+unix:///?socket={}", socket.display())).expect("it is served");
    assert_eq!(count, CONTENT.len() as u64);
    manager.hear_of("READY=1");
    end(&mut server);
}
