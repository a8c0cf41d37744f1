//! Starts servers, and speaks to them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use raio_transport::handshake::Offer;
use raio_transport::memory::{Buffer, Buffers};
use raio_transport::protocol::{
    Command, FileHandle, FileStatus, OPEN_CREATE, OPEN_READ, OPEN_WRITE, OPERATION_FEATURES,
};
use raio_transport::transport::{Bulk, ClientTransport, Reply, RequestId, SendOptions};
use raio_transport::{message, tcp};
use tempfile::TempDir;

/// Nothing here takes nearly so long; if it does, it hangs.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// To open a file for reading and writing.
pub const RW: u32 = OPEN_READ | OPEN_WRITE;
/// The same for one that may not be there yet.
pub const NEW: u32 = RW | OPEN_CREATE;

/// Waits until it is so. `what` says what is not, if that takes too long.
pub fn until(what: impl Fn() -> String, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !is_so() {
        assert!(Instant::now() < deadline, "{}", what());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How the server does file I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    Uring,
    Threads,
    /// A seccomp filter answers io_uring_setup with EPERM.
    Forbidden,
}

/// Runs a test for each of them.
pub fn each(test: impl Fn(Variant)) {
    for variant in [Variant::Uring, Variant::Threads, Variant::Forbidden] {
        eprintln!("{variant:?}");
        test(variant);
    }
}

const EXEC_VARIABLE: &str = "RAIO_TEST_EXEC_WITHOUT";
const CALL_VARIABLE: &str = "RAIO_TEST_FORBIDDEN_CALL";
const ERRNO_VARIABLE: &str = "RAIO_TEST_FORBIDDEN_ERRNO";

/// Not a test of anything: run by [`Server::start`] in a process of its own, it forbids a system call to
/// itself and becomes the server.
#[test]
fn becomes_a_server_without_a_system_call_if_asked() {
    let Ok(arguments) = std::env::var(EXEC_VARIABLE) else { return };
    let number = |name: &str| std::env::var(name).unwrap().parse::<i64>().unwrap();
    let filter = seccompiler::SeccompFilter::new(
        [(number(CALL_VARIABLE), vec![])].into_iter().collect(),
        seccompiler::SeccompAction::Allow,
        seccompiler::SeccompAction::Errno(number(ERRNO_VARIABLE) as u32),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
    panic!("{}", Process::new(env!("CARGO_BIN_EXE_raio_server")).args(arguments.split('\n')).exec());
}

/// A server, yet to be started, to whom a seccomp filter answers this system call with this errno.
pub fn without(call: libc::c_long, errno: i32, arguments: &[&str]) -> Process {
    let mut process = Process::new(std::env::current_exe().unwrap());
    process.args(["--exact", "common::becomes_a_server_without_a_system_call_if_asked", "--nocapture"]);
    process.env(EXEC_VARIABLE, arguments.join("\n"));
    process.env(CALL_VARIABLE, call.to_string()).env(ERRNO_VARIABLE, errno.to_string());
    process
}

/// A server, killed if it is dropped while it runs.
pub struct Server {
    pub child: Child,
    pub address: SocketAddr,
    pub ready: String,
    stdout: Receiver<String>,
    /// Lines that nobody has asked for.
    pub others: Vec<String>,
    log: PathBuf,
    pub directory: TempDir,
}

impl Server {
    /// Starts a server with `directory` (a new one) exported as `d,rw`, and with these arguments besides.
    pub fn start(variant: Variant, arguments: &[&str]) -> Self {
        // Not in /tmp, which may be a tmpfs and then knows neither O_DIRECT nor all of fallocate.
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let export = format!("d={},rw", directory.path().display());
        let mut all = vec!["--listen", "tcp://127.0.0.1:0", "--export", &export];
        if variant == Variant::Threads {
            all.extend(["--backend", "threads"]);
        }
        all.extend(arguments);
        if !rustix::process::geteuid().is_root() && !arguments.iter().any(|it| it.starts_with("--sandbox")) {
            eprintln!("SKIPPED: the sandbox, because only root could look into the server then");
            all.push("--sandbox=off");
        }
        let process = if variant == Variant::Forbidden {
            without(libc::SYS_io_uring_setup, libc::EPERM, &all)
        } else {
            let mut process = Process::new(env!("CARGO_BIN_EXE_raio_server"));
            process.args(&all);
            process
        };
        Self::spawn(process, directory)
    }

    pub fn spawn(mut process: impl std::borrow::BorrowMut<Process>, directory: TempDir) -> Self {
        let process = process.borrow_mut();
        let log = directory.path().with_extension("log");
        process.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(&log).unwrap());
        // A worker that waits for a disk ends the server.
        process.env("RAIO_TEST_WORKER_FILTER", "1");
        // AddressSanitizer looks for leaks by system calls that the sandbox denies.
        process.env("ASAN_OPTIONS", "detect_leaks=0");
        let mut child = process.spawn().unwrap();
        let (sender, stdout) = channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let mut server = Self {
            child,
            address: ([0, 0, 0, 0], 0).into(),
            ready: String::new(),
            stdout,
            others: Vec::new(),
            log,
            directory,
        };
        server.ready = server.line("raio_server: ready on ");
        let mut words = server.ready.rsplit(' ');
        server.address = words.find_map(|word| word.strip_prefix("tcp://")).unwrap().parse().unwrap();
        server
    }

    /// The next line on its standard output that begins like this.
    pub fn line(&mut self, begin: &str) -> String {
        loop {
            match self.stdout.recv_timeout(TIMEOUT) {
                Ok(line) if line.starts_with(begin) => return line,
                Ok(line) => self.others.push(line),
                Err(error) => panic!(
                    "the server said nothing that begins with {begin:?} ({error}); its log:\n{}",
                    self.log()
                ),
            }
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until the log says so, for it is written behind the server's back.
    pub fn log_until(&self, text: &str) -> String {
        until(|| format!("{text:?} is not in the log:\n{}", self.log()), || self.log().contains(text));
        self.log()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub fn stats(&mut self) -> Stats {
        self.signal(rustix::process::Signal::USR1);
        Stats(self.line("{"))
    }

    /// Asks for the statistics until they are so.
    pub fn stats_until(&mut self, what: &str, is_so: impl Fn(&Stats) -> bool) -> Stats {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let stats = self.stats();
            if is_so(&stats) {
                return stats;
            }
            assert!(Instant::now() < deadline, "{what}: still {}", stats.0);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Descriptors that the server has open.
    pub fn fds(&self) -> usize {
        Path::new("/proc").join(self.child.id().to_string()).join("fd").read_dir().unwrap().count()
    }

    /// Waits until it has so many: closing goes through the backend, behind the statistics' back.
    pub fn fds_until(&self, expected: usize) {
        until(|| format!("{} descriptors, once {expected}", self.fds()), || self.fds() == expected);
    }

    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the server does not end; its log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn client(&self) -> Client {
        Client::connect(self.address, &Offer::new("test"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("The server's log:\n{}", self.log());
        }
        let _ = std::fs::remove_file(&self.log);
    }
}

/// One line of statistics.
pub struct Stats(pub String);

impl Stats {
    /// The number with this name; names are unique but for `close`, which is a request.
    pub fn get(&self, name: &str) -> u64 {
        let key = format!("\"{name}\":");
        let at = self.0.find(&key).unwrap_or_else(|| panic!("{name} is not in {}", self.0)) + key.len();
        let digits: String = self.0[at..].chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or_else(|_| panic!("{name} is no number in {}", self.0))
    }

    /// Whether nothing is connected, open, or in flight.
    pub fn is_idle(&self) -> bool {
        ["connections", "sessions", "open_files", "need_slot", "fetching", "executing", "slot_bytes"]
            .iter()
            .all(|name| self.get(name) == 0)
    }
}

/// A client that has one connection.
pub struct Client {
    pub transport: tcp::TcpClient,
    tag: u64,
    replies: HashMap<u64, Reply>,
}

pub fn buffers(bytes: &[u8]) -> Buffers {
    Buffers::One(Buffer::Owned(bytes.into()))
}

pub fn data(reply: &Reply) -> Vec<u8> {
    let Bulk::In(buffers) = &reply.bulk else { panic!("{reply:?} has no room for data") };
    buffers.slices(0..reply.data_len).flatten().copied().collect()
}

fn outcome(reply: &Reply) -> Result<u64, i32> {
    if reply.status.is_ok() {
        return Ok(reply.result);
    }
    let text = message::text(&reply.body);
    assert!(text.is_empty() || text.ends_with('.'), "not an error message: {text:?}");
    Err(reply.status.errno)
}

impl Client {
    /// A client that also asks for the operations of all groups.
    pub fn connect(address: SocketAddr, offer: &Offer) -> Self {
        Self::connect_as(address, &Offer { features: offer.features | OPERATION_FEATURES, ..offer.clone() })
    }

    /// One that asks for what it offers alone.
    pub fn connect_as(address: SocketAddr, offer: &Offer) -> Self {
        let transport = tcp::TcpClient::connect(address, offer, Instant::now() + TIMEOUT).unwrap();
        Self { transport, tag: 0, replies: HashMap::new() }
    }

    /// Sends a command. Returns its tag, and its id for a cancel.
    pub fn send(&mut self, command: &Command<'_>, bulk: Bulk) -> (u64, RequestId) {
        let mut body = Vec::new();
        command.encode(&mut body);
        self.tag += 1;
        let id = self.transport.send(self.tag, &body, bulk, SendOptions::PLAIN).unwrap();
        self.transport.flush();
        (self.tag, id)
    }

    /// Waits for the end of a request, however that is.
    pub fn wait(&mut self, tag: u64) -> Reply {
        let deadline = Instant::now() + TIMEOUT;
        let mut replies = Vec::new();
        loop {
            self.transport.flush();
            self.transport.receive(&mut replies);
            for reply in replies.drain(..) {
                assert!(self.replies.insert(reply.tag, reply).is_none(), "a request ended twice");
            }
            if let Some(reply) = self.replies.remove(&tag) {
                return reply;
            }
            assert!(Instant::now() < deadline, "no answer came");
            self.transport.wait(Some(deadline)).unwrap();
        }
    }

    pub fn call(&mut self, command: &Command<'_>, bulk: Bulk) -> Reply {
        let (tag, _) = self.send(command, bulk);
        self.wait(tag)
    }

    pub fn do_it(&mut self, command: &Command<'_>) -> Result<u64, i32> {
        outcome(&self.call(command, Bulk::None))
    }

    pub fn open_as(&mut self, path: &str, flags: u32, mode: u32) -> Result<(FileHandle, FileStatus), i32> {
        let reply = self.call(&Command::Open { flags, mode, path: path.as_bytes() }, Bulk::None);
        let handle = FileHandle(u32::try_from(outcome(&reply)?).unwrap());
        Ok((handle, FileStatus::decode(&reply.body).unwrap()))
    }

    pub fn open(&mut self, path: &str, flags: u32) -> Result<FileHandle, i32> {
        self.open_as(path, flags, 0o644).map(|(handle, _)| handle)
    }

    pub fn send_read(&mut self, file: FileHandle, offset: u64, len: usize) -> u64 {
        let bulk = if len == 0 { Bulk::None } else { Bulk::In(buffers(&vec![0xee; len])) };
        self.send(&Command::Read { file, offset, length: len as u32 }, bulk).0
    }

    pub fn read(&mut self, file: FileHandle, offset: u64, len: usize) -> Result<Vec<u8>, i32> {
        let tag = self.send_read(file, offset, len);
        let reply = self.wait(tag);
        let n = outcome(&reply)?;
        if len == 0 {
            return Ok(Vec::new());
        }
        assert_eq!(n, reply.data_len as u64);
        Ok(data(&reply))
    }

    pub fn send_write(&mut self, file: FileHandle, offset: u64, bytes: &[u8]) -> u64 {
        let bulk = if bytes.is_empty() { Bulk::None } else { Bulk::Out(buffers(bytes)) };
        self.send(&Command::Write { file, offset, length: bytes.len() as u32 }, bulk).0
    }

    pub fn write(&mut self, file: FileHandle, offset: u64, bytes: &[u8]) -> Result<u64, i32> {
        let tag = self.send_write(file, offset, bytes);
        outcome(&self.wait(tag))
    }

    pub fn status(&mut self, file: FileHandle) -> Result<FileStatus, i32> {
        let reply = self.call(&Command::Stat(file), Bulk::None);
        outcome(&reply)?;
        Ok(FileStatus::decode(&reply.body).unwrap())
    }

    /// Returns the verifier, which is the file's.
    pub fn fsync(&mut self, file: FileHandle, data_only: bool) -> Result<u64, i32> {
        let verifier = self.do_it(&Command::Fsync { file, data_only })?;
        assert_eq!(self.status(file)?.verifier.get(), verifier);
        Ok(verifier)
    }

    pub fn close(&mut self, file: FileHandle) -> Result<u64, i32> {
        self.do_it(&Command::Close(file))
    }
}
