//! Servers that hand over to their successors: nobody is refused, sessions go on, and nobody else gets the
//! sockets. RAIO_TEST_RUNS says how often it happens beneath programs that come and go (5).

use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Context, Error, File, Keys, Operation, Options, Session};
use raio_e2e::{PATIENCE, Server, await_log, binary, carry_out, needs_root, number, pin};
use raio_transport::keys::SecretKey;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Gid, Signal, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use tempfile::TempDir;

const CONTENT: &[u8; 10] = b"0123456789";

/// Where servers follow one another: their exports, keys, logs, and the socket at which they meet.
struct Site {
    directory: TempDir,
    arguments: Vec<String>,
    is_writable: bool,
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.path("log")).unwrap_or_default());
        }
    }
}

impl Site {
    /// For servers with more arguments.
    fn new(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
        for name in ["old", "new"] {
            fs::create_dir(directory.path().join(name)).expect("a directory");
            fs::write(directory.path().join(name).join("file"), CONTENT).expect("a file");
            fs::write(directory.path().join(name).join(name), CONTENT).expect("a file");
        }
        Self { directory, arguments: arguments.iter().map(ToString::to_string).collect(), is_writable: true }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn place(&self) -> PathBuf {
        self.path("place")
    }

    /// A server, yet to be started, that listens there and exports a directory of the site's as `d`.
    fn command(&self, listen: &str, export: &str) -> Command {
        let log = fs::File::options().create(true).append(true).open(self.path("log")).expect("a log");
        let mut command = Command::new(binary("raio_server"));
        command.args(["--workers", "2", "--listen", listen, "--export"]);
        let access = if self.is_writable { "rw" } else { "ro" };
        command.arg(format!("d={},{access}", self.path(export).display()));
        command.arg("--state").arg(self.path("state")).arg("--hand-over").arg(self.place());
        if !rustix::process::geteuid().is_root() {
            command.arg("--sandbox=off");
        }
        command.args(&self.arguments).stderr(log);
        command
    }

    fn start(&self, listen: &str) -> Server {
        Server::spawn(self.command(listen, "old"))
    }

    /// Runs a server that does not start. Returns its error message, too.
    fn fails(&self, mut command: Command) -> (Output, String) {
        let output = command.arg("--clear").stderr(std::process::Stdio::piped()).output().expect("it runs");
        assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output, said)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).expect("there is a log")
    }

    fn log_until(&self, text: &str) {
        await_log(&self.path("log"), text);
    }

    /// Gives servers keys and one client, which trusts a server at this address. Returns how that connects.
    fn client_with_key(&self, server: impl FnOnce(&Self) -> Server) -> (Server, Options) {
        let (own, keys) = (self.path("client"), self.path("keys"));
        fs::create_dir(&own).expect("a directory");
        fs::create_dir(&keys).expect("a directory");
        let key = SecretKey::create(&own.join("key")).expect("a key").public();
        let entry = format!("[client.one]\nkeys = ['{key}']\nexports = {{ d = 'rw' }}\n");
        fs::write(keys.join("clients.toml"), entry).expect("a file");
        let server = server(self);
        let host = SecretKey::load(&keys.join("host.key")).expect("the server has made it").public();
        pin(&own, server.address(), host);
        (server, Options { keys: Keys::Directory(own), ..Options::default() })
    }
}

fn read(context: &mut Context, file: &File) -> Result<u64, Error> {
    let buffers = Buffers::One(Buffer::Owned(vec![0; 64].into()));
    carry_out(context, file, Operation::Read { offset: 0, buffers })?.result
}

fn write(context: &mut Context, file: &File) -> Result<u64, Error> {
    let buffers = Buffers::One(Buffer::Owned(CONTENT.to_vec().into()));
    carry_out(context, file, Operation::Write { offset: 0, buffers })?.result
}

/// All that a program does that reads a file.
fn visit(url: &str, options: &Options) -> Result<u64, Error> {
    let session = Session::connect(url, options)?;
    let file = session.open("/d/file", libc::O_RDONLY, 0)?;
    let count = read(&mut session.context(1)?, &file)?;
    file.close()?;
    Ok(count)
}

/// Hands over several times while programs come and go, and one stays.
fn nobody_notices(site: &Site, mut server: Server, options: &Options) {
    let url = server.url();
    let listen = server.listen_url();
    let times = number("RAIO_TEST_RUNS", 5);
    let (is_over, visits) = (AtomicBool::new(false), AtomicU32::new(0));
    let come_and_go = || {
        let mut longest = Duration::ZERO;
        while !is_over.load(Ordering::Relaxed) {
            let begun = Instant::now();
            assert_eq!(visit(&url, options).expect("it is served"), CONTENT.len() as u64);
            longest = longest.max(begun.elapsed());
            visits.fetch_add(1, Ordering::Relaxed);
        }
        longest
    };
    let session = Session::connect(&url, options).expect("a session");
    let flags = if site.is_writable { libc::O_RDWR } else { libc::O_RDONLY };
    let stay = || {
        let file = session.open("/d/file", flags, 0).expect("a file");
        let mut context = session.context(4).expect("a context");
        let mut longest = Duration::ZERO;
        while !is_over.load(Ordering::Relaxed) {
            let begun = Instant::now();
            let done = if site.is_writable { write(&mut context, &file) } else { read(&mut context, &file) };
            assert_eq!(done.expect("the session goes on"), CONTENT.len() as u64);
            longest = longest.max(begun.elapsed());
        }
        (longest, context.stats().reconnects)
    };
    std::thread::scope(|scope| {
        let programs: Vec<_> = (0..3).map(|_| scope.spawn(come_and_go)).collect();
        let stays = scope.spawn(stay);
        let _ends = EndsOnDrop(&is_over);
        for _ in 0..times {
            let before = visits.load(Ordering::Relaxed);
            let next = site.start(&listen);
            assert!(server.wait().success());
            server = next;
            let deadline = Instant::now() + PATIENCE;
            while visits.load(Ordering::Relaxed) < before + 8 && programs.iter().all(|it| !it.is_finished()) {
                assert!(Instant::now() < deadline, "nobody is served");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        is_over.store(true, Ordering::Relaxed);
        let longest = programs.into_iter().map(|program| program.join().expect("no errors")).max();
        let (pause, reconnects) = stays.join().expect("no errors");
        let count = visits.load(Ordering::Relaxed);
        eprintln!(
            "{listen}: {count} programs, each within {longest:?}; each operation of one within {pause:?}"
        );
        // It may not have written since the last one.
        assert!(reconnects + 1 >= times as u64, "{reconnects}");
    });
    let log = site.log();
    assert_eq!(log.matches("Took over 1 listening sockets from process").count(), times, "{log}");
    assert_eq!(log.matches("Handing over to process").count(), times, "{log}");
}

/// Also when a test fails.
struct EndsOnDrop<'a>(&'a AtomicBool);

impl Drop for EndsOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn programs_that_begin_during_a_hand_over_are_served() {
    let site = Site::new(&[]);
    let server = site.start("tcp://127.0.0.1:0");
    nobody_notices(&site, server, &Options::default());
}

#[test]
fn programs_that_begin_during_a_hand_over_of_what_is_only_read_are_served() {
    let mut site = Site::new(&[]);
    site.is_writable = false;
    let server = site.start("tcp://127.0.0.1:0");
    nobody_notices(&site, server, &Options::default());
}

#[test]
fn programs_that_begin_during_a_hand_over_of_a_unix_socket_are_served() {
    let site = Site::new(&[]);
    let listen = format!("unix://{}", site.path("socket").display());
    let server = site.start(&listen);
    let inode = fs::symlink_metadata(site.path("socket")).expect("it is there").ino();
    nobody_notices(&site, server, &Options::default());
    let now = fs::symlink_metadata(site.path("socket")).expect("it is there").ino();
    assert_eq!(now, inode, "nobody has made it anew");
}

#[test]
fn programs_with_keys_that_begin_during_a_hand_over_are_served_and_recorded() {
    let mut site = Site::new(&[]);
    let (keys, audit) = (site.path("keys"), site.path("audit"));
    let arguments =
        ["--keys".into(), keys.display().to_string(), "--audit".into(), audit.display().to_string()];
    site.arguments.extend(arguments);
    let (server, options) = site.client_with_key(|site| site.start("tcp://127.0.0.1:0"));
    nobody_notices(&site, server, &options);
    for line in fs::read_to_string(audit).expect("there is a log").lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|error| panic!("{error} in {line:?}"));
    }
}

#[test]
fn a_session_finds_the_files_of_an_export_that_has_moved() {
    let mut site = Site::new(&[]);
    site.arguments.extend(["--keys".into(), site.path("keys").display().to_string()]);
    let (mut server, options) = site.client_with_key(|site| site.start("tcp://127.0.0.1:0"));
    let session = Session::connect(&server.url(), &options).expect("a session");
    let errno = |path: &str| session.open(path, libc::O_RDONLY, 0).map_or_else(|error| error.errno(), |_| 0);
    assert_eq!((errno("/d/old"), errno("/d/new")), (0, libc::ENOENT));
    let next = Server::spawn(site.command("tcp://127.0.0.1:0", "new"));
    assert_eq!(next.url(), server.url());
    assert!(server.wait().success());
    assert_eq!((errno("/d/old"), errno("/d/new")), (libc::ENOENT, 0));
}

#[test]
fn a_successor_that_cannot_start_changes_nothing() {
    let site = Site::new(&[]);
    let mut server = site.start("tcp://127.0.0.1:0");
    let session = Session::connect(&server.url(), &Options::default()).expect("a session");
    let file = session.open("/d/file", libc::O_RDONLY, 0).expect("a file");
    let mut context = session.context(1).expect("a context");
    let (output, said) = site.fails(site.command("tcp://127.0.0.1:0", "missing"));
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("missing") && !said.contains("Took over"), "{said}");
    // An address that another process has.
    let other = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = format!("tcp://{}", other.local_addr().expect("a port"));
    let (output, said) = site.fails(site.command(&taken, "old"));
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Another process listens there"), "{said}");
    site.log_until("was given up, and this server goes on: it has gone away");
    assert_eq!(read(&mut context, &file).expect("it goes on"), CONTENT.len() as u64);
    assert_eq!(context.stats().reconnects, 0);
    assert!(server.statistics()["accepted"].as_u64() >= Some(2));
    let next = site.start("tcp://127.0.0.1:0");
    assert_eq!(next.url(), server.url(), "the next one is a successor all the same");
    assert!(server.wait().success());
}

#[test]
fn sockets_that_the_successor_does_not_have_are_closed_and_others_made() {
    let site = Site::new(&[]);
    let mut command = site.command("tcp://127.0.0.1:0", "old");
    command.args(["--listen", "tcp://127.0.0.2:0"]);
    let mut first = Server::spawn(command);
    let [kept, dropped] = &first.urls()[..] else { panic!("it listens on two") };
    let visits = |url: &str| visit(url, &Options::default());
    let port = first.address().port();
    let unix = format!("unix://{}", site.path("socket").display());
    let mut command = site.command("tcp://127.0.0.1:0", "old");
    command.args(["--listen", &unix]);
    let mut second = Server::spawn(command);
    assert!(first.wait().success());
    assert_eq!(&second.urls()[0], kept);
    assert!(visits(kept).is_ok() && visits(&second.urls()[1]).is_ok());
    let dropped = dropped.strip_prefix("raio+tcp://").expect("a URL");
    assert_eq!(TcpStream::connect(dropped).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    // The same port on more addresses is free when the one that has it has ended.
    let third = Server::spawn(site.command(&format!("tcp://0.0.0.0:{port}"), "old"));
    assert!(second.wait().success());
    assert!(visits(kept).is_ok());
    assert!(TcpStream::connect(("127.0.0.3", port)).is_ok());
    drop(third);
}

/// A connection to the socket at which servers meet.
fn connect(site: &Site) -> rustix::io::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(site.place())?)?;
    Ok(socket)
}

/// How many bytes come back for these, before the end of the connection or with it.
fn answer(socket: &OwnedFd, words: &[u8]) -> usize {
    let _ = rustix::net::send(socket, words, SendFlags::NOSIGNAL);
    rustix::net::recv(socket, &mut [0; 256], RecvFlags::empty()).map_or(0, |(n, _)| n)
}

const GIVE: &[u8] = b"raio hand-over 1 give 1";

#[test]
fn a_process_of_another_user_gets_no_sockets() {
    if !needs_root("becoming another user") {
        return;
    }
    let site = Site::new(&["--user", "nobody"]);
    for name in ["old", "state"] {
        fs::create_dir_all(site.path(name)).expect("a directory");
        std::os::unix::fs::chown(site.path(name), Some(65534), Some(65534)).expect("this is root");
    }
    let mut server = site.start("tcp://127.0.0.1:0");
    let as_user = |uid: u32| {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
                set_thread_groups(&[]).expect("this is root");
                set_thread_res_gid(gid, gid, gid).expect("this is root");
                set_thread_res_uid(uid, uid, uid).expect("this is root");
                connect(&site).map(|socket| answer(&socket, GIVE))
            });
            thread.join().expect("it does not panic")
        })
    };
    assert_eq!(as_user(1234), Err(rustix::io::Errno::ACCESS), "its permissions keep others out");
    fs::set_permissions(site.place(), fs::Permissions::from_mode(0o666)).expect("it is ours");
    assert_eq!(as_user(1234), Ok(0));
    site.log_until("was given nothing: it is of user 1234");
    assert!(as_user(65534).expect("it connects") > 0, "it is the server's own user");
    assert!(as_user(0).expect("it connects") > 0);
    let next = site.start("tcp://127.0.0.1:0");
    assert!(server.wait().success());
    drop(next);
}

#[test]
fn whatever_else_comes_to_the_meeting_place_hinders_nobody() {
    let site = Site::new(&[]);
    let mut server = site.start("tcp://127.0.0.1:0");
    let garbage: [&[u8]; 5] =
        [b"GET / HTTP/1.1", b"raio hand-over 2 give 1", b"raio hand-over 1 end", &[0; 4096], b""];
    for words in garbage {
        assert_eq!(answer(&connect(&site).expect("it listens"), words), 0, "{words:?}");
    }
    // One who asks twice gets one answer.
    let socket = connect(&site).expect("it listens");
    assert!(answer(&socket, GIVE) > 0);
    assert_eq!(answer(&socket, GIVE), 0);
    // One who says nothing is given up after a while; until then clients are served, and others wait.
    let silent = connect(&site).expect("it listens");
    assert_eq!(visit(&server.url(), &Options::default()).expect("it is served"), CONTENT.len() as u64);
    let next = site.start("tcp://127.0.0.1:0");
    assert_eq!(answer(&silent, b""), 0);
    assert!(server.wait().success());
    assert!(site.log().contains("nothing has come from it in time"), "{}", site.log());
    // The sockets are free once a server ends that nobody has asked to.
    let address = next.address();
    let mut next = next;
    next.signal(Signal::TERM);
    assert!(next.wait().success());
    assert!(TcpStream::connect(address).is_err());
    assert!(site.place().exists());
    site.start("tcp://127.0.0.1:0").kill();
    drop(site.start("tcp://127.0.0.1:0"));
}

#[test]
fn a_file_where_the_socket_should_be_is_an_error_and_stays() {
    let site = Site::new(&[]);
    fs::write(site.place(), "mine").expect("a file");
    for (is_check, code) in [(false, 1), (true, 2)] {
        let mut command = site.command("tcp://127.0.0.1:0", "old");
        if is_check {
            command.arg("--check");
        }
        let (output, said) = site.fails(command);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains("is no socket. Give another path, or remove it."), "{said}");
    }
    let mut text = String::new();
    fs::File::open(site.place()).and_then(|mut file| file.read_to_string(&mut text)).expect("it is there");
    assert_eq!(text, "mine");
}

#[test]
fn a_client_that_is_accepted_and_says_nothing_holds_up_no_hand_over_for_long() {
    let site = Site::new(&[]);
    let mut server = site.start("tcp://127.0.0.1:0");
    let silent = TcpStream::connect(server.address()).expect("it listens");
    server.statistics_when(|now| now["accepted"] == 1);
    let begun = Instant::now();
    let next = site.start("tcp://127.0.0.1:0");
    assert!(server.wait().success());
    assert!(begun.elapsed() < PATIENCE / 2, "{:?}", begun.elapsed());
    drop((silent, next));
}
