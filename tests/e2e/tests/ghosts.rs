//! Requests of clients that are gone do not start, and none of them ends after a newer one: no ghost writes.
//!
//! RAIO_TEST_RUNS says how often each case is tried in which a client ends and others write (3).

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use raio::Options;
use raio_e2e::{
    Cable, End, FuseCall, FuseFs, FuseOptions, LETTER_BYTES, LETTERS, LISTEN, Letters, LoopDevice, Mounted,
    PATIENCE, Raw, Server, Silenced, await_no_connection, binary, is_at_rest, needs_root, needs_wire,
};
use raio_transport::protocol::{OPEN_CREATE, OPEN_READ, OPEN_WRITE};
use rustix::net::sockopt;
use rustix::process::{Pid, Signal, kill_process};

const BLOCK: u64 = 4096;
/// Writes of one client, at once.
const WRITES: u64 = 100;
/// So many the server may have begun: as many as an export has threads for, which wait for one another in the
/// kernel.
const BEGUN_MAX: u64 = 16;
const READ_WRITE: u32 = OPEN_READ | OPEN_WRITE;

/// Sends writes of blocks full of one letter, all at once.
fn send_writes(client: &mut Raw, blocks: std::ops::Range<u64>, letter: u8) {
    for n in blocks {
        client.send_write_header(n, n * BLOCK, BLOCK as u32).expect("the kernel takes it");
        client.stream.write_all(&[letter; BLOCK as usize]).expect("the kernel takes it");
    }
}

/// Ends the connection as a client does that gives up: by a reset. It has reached the server's kernel then.
fn reset(client: Raw) {
    let [from, to] = [client.stream.local_addr(), client.stream.peer_addr()];
    sockopt::set_socket_linger(&client.stream, Some(Duration::ZERO)).expect("a TCP socket");
    drop(client);
    await_no_connection(Some(from.expect("it is connected").port()), to.expect("it is connected").port());
}

#[test]
fn what_a_client_sent_before_it_gave_up_does_not_land_after_the_server_was_held_up() {
    for backend in ["uring", "threads"] {
        let directory = tempfile::tempdir().expect("a directory");
        let export = format!("d={},rw", directory.path().display());
        let mut server = Server::start_with(&[&export], &["--backend", backend, "--workers", "2"]);
        for round in 0..8 {
            let name = format!("file{round}");
            let path = format!("/d/{name}");
            let open = || Raw::open(&server.url(), &path, READ_WRITE | OPEN_CREATE).expect("a file");
            // Whichever worker has the one or the other.
            let (mut old, mut new) = if round % 2 == 0 {
                let old = open();
                (old, open())
            } else {
                let new = open();
                (open(), new)
            };
            server.hold_up();
            // The first blocks are written by both, the others by the one that gives up alone.
            send_writes(&mut old, 0..16, b'o');
            reset(old);
            send_writes(&mut new, 0..8, b'N');
            server.signal(Signal::CONT);
            for _ in 0..8 {
                assert!(new.response().expect("an answer").0.status.is_ok());
            }
            server.statistics_when(|now| now["connections"] == 1);
            let content = std::fs::read(directory.path().join(&name)).expect("a file");
            assert_eq!(content.len() as u64, 8 * BLOCK, "{backend}, round {round}");
            assert!(content.iter().all(|&byte| byte == b'N'), "{backend}, round {round}");
        }
        server.statistics_when(is_at_rest);
    }
}

#[test]
fn what_waits_behind_a_stuck_write_does_not_start_after_its_client_has_gone() {
    let content = vec![b'.'; WRITES as usize * BLOCK as usize];
    for backend in ["uring", "threads"] {
        // With the second the server does not see the end of the connection before the file system goes on.
        for is_held_up in [false, true] {
            let files: [(&str, &[u8]); 1] = [("file", &content)];
            let Some(fuse) = FuseFs::mount("a stuck write", FuseOptions::default(), &files) else { return };
            let export = format!("d={},rw", fuse.path().display());
            let mut server = Server::start_with(&[&export], &["--backend", backend]);
            let mut client = Raw::open(&server.url(), "/d/file", READ_WRITE).expect("a file");
            fuse.hang(FuseCall::Write);
            send_writes(&mut client, 0..WRITES, b'o');
            fuse.wait_for_hanging(FuseCall::Write, 1);
            server.statistics_when(|now| now["requests"]["write"] == WRITES);
            if is_held_up {
                server.signal(Signal::STOP);
            }
            reset(client);
            if !is_held_up {
                server.statistics_when(|now| now["connections"] == 0);
            }
            fuse.mend(FuseCall::Write);
            if is_held_up {
                server.signal(Signal::CONT);
            }
            server.statistics_when(is_at_rest);
            let case = format!("{backend}, held up: {is_held_up}");
            assert!(fuse.calls(FuseCall::Write) <= BEGUN_MAX, "{case}");
            let content = std::fs::read(fuse.file("file")).expect("a file");
            let written = content.chunks(BLOCK as usize).filter(|block| block[0] == b'o').count();
            assert!(written as u64 <= BEGUN_MAX, "{case}: {written}");
        }
    }
}

/// In which a message arrives that TCP, or a device, tries to deliver again after the wire was cut for about
/// as long.
const RETRANSMITTED_AFTER: Duration = Duration::from_millis(700);

/// What the old client's host and that of the server have between them.
enum Wire {
    Cable(Cable),
    /// The one of scripts/rdma-vm. Both ends are on one host.
    Rdma {
        _wire: MutexGuard<'static, ()>,
    },
}

impl Wire {
    /// The wires of this machine, and the schemes of URLs over it.
    fn all(what: &str) -> Option<(Self, &'static [&'static str])> {
        if let Some(wire) = needs_wire(what) {
            return Some((Self::Rdma { _wire: wire }, &["raio+rdma", "raio"]));
        }
        Some((Self::Cable(Cable::new(what)?), &["raio+tcp"]))
    }

    /// A program at this end.
    fn command(&self, end: End, program: &str) -> Command {
        match self {
            Self::Cable(cable) => cable.command(end, binary(program)),
            Self::Rdma { .. } => Command::new(binary(program)),
        }
    }

    /// Does something at this end.
    fn on<T: Send>(&self, end: End, act: impl FnOnce() -> T + Send) -> T {
        match self {
            Self::Cable(cable) => cable.on(end, act),
            Self::Rdma { .. } => act(),
        }
    }

    /// Does something while the wire is cut.
    fn while_cut<T>(&self, act: impl FnOnce() -> T) -> T {
        match self {
            Self::Cable(cable) => {
                cable.pull();
                let done = act();
                cable.plug();
                done
            }
            Self::Rdma { .. } => {
                let _cut = Silenced::new();
                act()
            }
        }
    }
}

/// A server with a directory, and a file system that can be frozen.
struct Place {
    server: Server,
    /// For those who come by the wire, and for those on the server's host.
    far: String,
    near: String,
    fast: tempfile::TempDir,
    slow: Mounted,
}

impl Place {
    fn new(wire: &Wire, scheme: &str) -> Self {
        let fast = tempfile::tempdir().expect("a directory");
        let slow = LoopDevice::new(32 << 20).mount("ext4");
        let mut command = wire.command(End::A, "raio_server");
        let listens = match wire {
            Wire::Cable(cable) => vec![format!("tcp://{}:0", cable.address(End::A))],
            Wire::Rdma { .. } => vec![LISTEN.into(), "tcp://10.77.0.1:0".into(), "tcp://127.0.0.1:0".into()],
        };
        for listen in &listens {
            command.args(["--listen", listen]);
        }
        command.arg("--export").arg(format!("fast={},rw", fast.path().display()));
        command.arg("--export").arg(format!("slow={},rw", slow.path().display()));
        command.args(["--workers", "2", "--memory", "128M"]);
        let server = Server::spawn(command);
        let urls = server.urls();
        let far = match scheme {
            "raio" => urls[1].replace("raio+tcp", "raio"),
            _ => urls[0].clone(),
        };
        Self { far, near: urls[urls.len() - 1].clone(), server, fast, slow }
    }

    fn fast(&self) -> PathBuf {
        self.fast.path().join("file")
    }

    fn slow(&self) -> PathBuf {
        self.slow.path().join("file")
    }
}

fn options() -> Options {
    Options {
        request_timeout: Some(Duration::from_secs(1)),
        // Emulated devices that have lost packets take their time.
        connect_timeout: PATIENCE,
        ..Options::default()
    }
}

const PATHS: [&str; 2] = ["/fast/file", "/slow/file"];
const FAST: usize = 0;
const SLOW: usize = 1;

/// A client process that writes to one file.
struct Writer {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<std::process::ChildStdout>,
}

impl Writer {
    fn start(wire: &Wire, url: &str, path: &str) -> Self {
        let mut command = wire.command(End::B, "writer");
        command.args([url, path, "o"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("a client");
        let (stdin, stdout) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let mut this = Self { child, stdin, stdout: BufReader::new(stdout) };
        this.says("open");
        this
    }

    fn says(&mut self, word: &str) {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("it says something");
        assert_eq!(line.trim(), word);
    }

    fn begin(&mut self) {
        writeln!(self.stdin, "write").expect("it listens");
        self.says("begun");
    }

    /// Stops it, has something happen, and kills it then.
    fn stop_and_kill(&mut self, meanwhile: impl FnOnce()) {
        kill_process(Pid::from_child(&self.child), Signal::STOP).expect("it runs");
        meanwhile();
        self.kill();
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The letters that each block of a file has.
fn letters(path: &Path) -> String {
    let bytes = std::fs::read(path).expect("the file");
    let letter = |block: &[u8]| match block.iter().all(|byte| *byte == block[0]) {
        true => char::from(block[0]),
        false => '?',
    };
    bytes.chunks(LETTER_BYTES).map(letter).collect()
}

fn all(letter: char) -> String {
    std::iter::repeat_n(letter, LETTERS).collect()
}

/// How a client ends with writes under way.
#[derive(Clone, Copy, Debug)]
enum Ending {
    /// Its session is stopped, and the program goes on.
    GivenUp,
    /// The process is stopped (SIGSTOP), and killed later.
    StoppedAndKilled,
}

const ENDINGS: [Ending; 2] = [Ending::GivenUp, Ending::StoppedAndKilled];

/// Tries each way in which a client may end, often, at a place of its own for each scheme.
fn for_each_ending(what: &str, case: impl Fn(&Wire, &mut Place, Ending, &str) + Sync) {
    let runs = raio_e2e::number("RAIO_TEST_RUNS", 3);
    if !needs_root(what) {
        return;
    }
    let Some((wire, schemes)) = Wire::all(what) else { return };
    for scheme in schemes {
        let mut place = Place::new(&wire, scheme);
        for run in 0..runs {
            for ending in ENDINGS {
                let why = format!("{scheme}, {ending:?}, run {run}");
                wire.on(End::B, || case(&wire, &mut place, ending, &why));
            }
        }
    }
}

/// Writes of a client that has ended hang in a file system that is frozen. What others write there is written
/// later, and what they write elsewhere at once; a new session of the same program begins when the old one's
/// writes are over.
fn while_a_file_system_is_frozen(wire: &Wire, place: &mut Place, ending: Ending, why: &str) {
    let far = place.far.clone();
    let connect = || Letters::connect(&far, &PATHS, &options()).expect("a session");
    let mut new = connect();
    new.write(FAST, b'.');
    new.write(SLOW, b'.');
    let before = place.server.statistics()["connections"].as_u64().expect("a count");
    let is_executing = |now: &serde_json::Value| now["in_flight"]["executing"].as_u64() > Some(0);
    let frozen = match ending {
        Ending::GivenUp => {
            let mut old = connect();
            let frozen = place.slow.freeze();
            old.begin(SLOW, b'o').expect("there is room");
            old.write(FAST, b'o');
            place.server.statistics_when(is_executing);
            drop(old);
            frozen
        }
        Ending::StoppedAndKilled => {
            let mut old = Writer::start(wire, &place.far, PATHS[SLOW]);
            let frozen = place.slow.freeze();
            old.begin();
            place.server.statistics_when(is_executing);
            old.stop_and_kill(|| new.write(FAST, b'n'));
            frozen
        }
    };
    place.server.statistics_when(|now| now["connections"] == before);
    assert_ne!(place.server.statistics()["channels"]["orphaned_requests"], 0, "{why}: nothing hangs");
    new.write(FAST, b'N');
    new.begin(SLOW, b'N').expect("there is room");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            drop(frozen);
        });
        if let Ending::GivenUp = ending {
            let mut newest = connect();
            assert_eq!(place.server.statistics()["channels"]["orphaned_requests"], 0, "{why}: not fenced");
            new.outcomes(LETTERS).into_iter().for_each(|written| _ = written.expect("it is written"));
            assert_eq!(letters(&place.slow()), all('N'), "{why}");
            newest.write(SLOW, b'M');
        } else {
            new.outcomes(LETTERS).into_iter().for_each(|written| _ = written.expect("it is written"));
            new.sync(SLOW);
        }
    });
    place.server.statistics_when(|now| now["channels"]["orphaned_requests"] == 0);
    let last = if let Ending::GivenUp = ending { 'M' } else { 'N' };
    assert_eq!((letters(&place.fast()), letters(&place.slow())), (all('N'), all(last)), "{why}");
}

/// What a client has sent into a wire that is cut, and gives up, does not come when the wire is mended, after
/// what others have written meanwhile; nor when it comes back in a new session.
fn while_the_wire_is_cut(wire: &Wire, place: &mut Place, ending: Ending, why: &str) {
    let connect = |url: &str| Letters::connect(url, &PATHS, &options()).expect("a session");
    let mut new = wire.on(End::A, || connect(&place.near));
    new.write(FAST, b'.');
    let write_new = |new: &mut Letters| {
        new.write(FAST, b'N');
        assert_eq!(letters(&place.fast()), all('N'), "{why}");
    };
    match ending {
        Ending::GivenUp => {
            let mut old = connect(&place.far);
            wire.while_cut(|| {
                old.begin(FAST, b'o').expect("there is room");
                drop(old);
                write_new(&mut new);
            });
        }
        Ending::StoppedAndKilled => {
            let mut old = Writer::start(wire, &place.far, PATHS[FAST]);
            wire.while_cut(|| {
                old.begin();
                old.stop_and_kill(|| new.write(FAST, b'n'));
                write_new(&mut new);
            });
        }
    }
    let mended = Instant::now();
    let mut newest = connect(&place.far);
    newest.write(SLOW, b'M');
    std::thread::sleep(RETRANSMITTED_AFTER.saturating_sub(mended.elapsed()));
    assert_eq!((letters(&place.fast()), letters(&place.slow())), (all('N'), all('M')), "{why}");
}

const FREEZE: &str = "a frozen file system and clients that end";
const CUT: &str = "a cut wire and clients that end";

#[test]
fn no_old_block_lands_after_a_new_one_when_a_file_system_was_frozen() {
    for_each_ending(FREEZE, while_a_file_system_is_frozen);
}

#[test]
fn no_old_block_lands_after_a_new_one_when_the_wire_was_cut() {
    for_each_ending(CUT, while_the_wire_is_cut);
}
