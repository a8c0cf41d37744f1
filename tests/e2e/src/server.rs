//! A `raio_server` process.

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use raio_transport::address::Address;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// How long anything that should happen at once may take on a slow machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A running server. Killed when dropped.
pub struct Server {
    child: Child,
    stdout: BufReader<ChildStdout>,
    /// "tcp" or "rdma", and where.
    listens: Vec<Address>,
}

/// Whether these statistics say that nobody is connected and nothing is held.
pub fn is_at_rest(statistics: &Value) -> bool {
    let zero = |pointer: &str| {
        let value = statistics.pointer(pointer).and_then(Value::as_u64);
        value.unwrap_or_else(|| panic!("{pointer} is not in {statistics}")) == 0
    };
    [
        "/connections",
        "/sessions",
        "/open_files",
        "/slot_bytes",
        "/in_flight/need_slot",
        "/in_flight/fetching",
        "/in_flight/executing",
    ]
    .into_iter()
    .all(zero)
}

/// Whether the thread with this folder below /proc waits for something that no signal ends, such as a disk.
fn is_uninterruptible(task: &Path) -> bool {
    let stat = std::fs::read_to_string(task.join("stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))
}

/// Processor time that a process or thread has used, from its `stat` below /proc.
pub fn cpu_time(stat: &str) -> Duration {
    let stat = std::fs::read_to_string(stat).expect("it runs");
    let after_name = stat.rsplit_once(')').expect("a name in brackets").1;
    let ticks: u64 =
        after_name.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * 10)
}

/// Waits until neither end of a TCP connection to port `to`, from port `from` or from any, is established. A
/// socket that was closed may be open for a while: a child that another test starts has it until its exec.
pub fn await_no_connection(from: Option<u16>, to: u16) {
    let is =
        |address: &str, port: Option<u16>| port.is_none_or(|port| address.ends_with(&format!(":{port:04X}")));
    let is_left = || {
        let all = std::fs::read_to_string("/proc/net/tcp").expect("it is there");
        // Columns: number, local and remote address, state.
        all.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|line| {
            let (one, other) = (line[1], line[2]);
            let is_it = is(one, from) && is(other, Some(to)) || is(one, Some(to)) && is(other, from);
            is_it && line[3] == "01"
        })
    };
    let deadline = Instant::now() + PATIENCE;
    while is_left() {
        assert!(Instant::now() < deadline, "a connection to port {to} is left");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until a log contains this text. Returns all that it contains.
pub fn await_log(path: &Path, text: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let log = std::fs::read_to_string(path).expect("a log");
        if log.contains(text) {
            return log;
        }
        assert!(Instant::now() < deadline, "{text:?} is not in the log:\n{log}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until a server's log says where it serves metrics. Returns that as HOST:PORT.
pub fn await_http(log: &Path) -> String {
    let log = await_log(log, "status page are at http://");
    let address = log.split("http://").nth(1).and_then(|rest| rest.split('/').next());
    address.expect("an address").to_owned()
}

/// A program that this workspace builds, found beside the test that asks.
pub fn binary(name: &str) -> PathBuf {
    let mut path = std::env::current_exe().expect("a test knows its own path");
    path.pop();
    if path.ends_with("deps") {
        path.pop();
    }
    path.push(name);
    assert!(
        path.exists(),
        "{} is not built. Run `cargo build --workspace` first, or scripts/test.",
        path.display()
    );
    path
}

/// `raio load`, without its arguments.
pub fn load_command() -> Command {
    let mut command = Command::new(binary("raio"));
    command.arg("load");
    command
}

/// A copy of a program, to be run. Another process writes it: a child that another test starts has every
/// descriptor of this one until its exec, and nothing runs that somebody has open for writing.
pub fn copy_program(from: &Path, to: &Path) {
    let status = Command::new("cp").args([from, to]).status().expect("cp runs");
    assert!(status.success(), "cp {} {}: {status}", from.display(), to.display());
}

/// The URL of a client for a server that listens there.
fn client_url(listens: &Address) -> String {
    match listens {
        Address::Host { .. } => format!("raio+{listens}"),
        Address::Unix(path) => format!("raio+unix:///?socket={}", path.display()),
    }
}

impl Server {
    /// Starts one on a port of its own choosing (or on `RAIO_TEST_LISTEN`, such as rdma://10.77.0.1:0), with
    /// these exports (as `--export` takes them).
    pub fn start(exports: &[&str]) -> Self {
        Self::start_with(exports, &[])
    }

    /// The same, with more arguments.
    pub fn start_with(exports: &[&str], arguments: &[&str]) -> Self {
        let mut command = Command::new(binary("raio_server"));
        if !arguments.contains(&"--listen") {
            let listen = std::env::var("RAIO_TEST_LISTEN");
            command.args(["--listen", listen.as_deref().unwrap_or("tcp://127.0.0.1:0")]);
        }
        for export in exports {
            command.args(["--export", export]);
        }
        command.args(arguments);
        if !rustix::process::geteuid().is_root() && !arguments.iter().any(|it| it.starts_with("--sandbox")) {
            eprintln!("SKIPPED: the sandbox, because only root could look into the server then");
            command.arg("--sandbox=off");
        }
        Self::spawn(command)
    }

    /// Starts a server by a command that ends up being one.
    pub fn spawn(mut command: Command) -> Self {
        // A worker that waits for a disk ends the server, in builds with debug assertions.
        command.env("RAIO_TEST_WORKER_FILTER", "1");
        // Some listen on the addresses of virtual networks.
        if !command.get_args().any(|argument| argument == "--keys") {
            command.arg("--clear");
        }
        let mut child = command.stdout(Stdio::piped()).spawn().expect("raio_server starts");
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("raio_server says when it is ready");
        let listens: Vec<Address> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        assert!(!listens.is_empty(), "raio_server said {line:?} instead of being ready");
        Self { child, stdout, listens }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        let (host, port) = self.listens[0].host().expect("it listens on an address");
        SocketAddr::new(host.parse().expect("an IP address"), port)
    }

    /// Where it listens, as `--listen` takes it.
    pub fn listen_url(&self) -> String {
        self.listens[0].to_string()
    }

    /// Where it listens, for clients.
    pub fn url(&self) -> String {
        client_url(&self.listens[0])
    }

    /// Every place where it listens, for clients.
    pub fn urls(&self) -> Vec<String> {
        self.listens.iter().map(client_url).collect()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("raio_server is there to be signalled");
    }

    /// Stops it (SIGCONT has it go on), and waits until it has: a thread that runs goes on for a little
    /// while.
    pub fn hold_up(&self) {
        self.signal(Signal::STOP);
        let is_stopped = || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("raio_server runs");
            tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok()).all(
                |stat| {
                    let (_, after_name) = stat.rsplit_once(") ").expect("a name in brackets");
                    after_name.starts_with('T')
                },
            )
        };
        let deadline = Instant::now() + PATIENCE;
        while !is_stopped() {
            assert!(Instant::now() < deadline, "raio_server does not stop");
        }
    }

    /// Its statistics.
    pub fn statistics(&mut self) -> Value {
        self.signal(Signal::USR1);
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("raio_server prints its statistics");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error} in {line:?}"))
    }

    /// Its statistics, once `settled` says so of them.
    pub fn statistics_when(&mut self, settled: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let statistics = self.statistics();
            if settled(&statistics) {
                return statistics;
            }
            assert!(Instant::now() < deadline, "still not settled: {statistics}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its open descriptors: what each is.
    pub fn descriptors(&self) -> Vec<String> {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("raio_server runs");
        let mut all: Vec<String> = entries
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .map(|target| target.to_string_lossy().into_owned())
            .collect();
        all.sort();
        all
    }

    /// Its resident memory in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("raio_server runs");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS is there");
        let kib: u64 = line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).expect("a number");
        kib << 10
    }

    /// Memory that it has taken, in bytes: the anonymous memory that it has written to, and its arenas whole,
    /// written to or not. For those become resident as they are first used, a huge page of 2 MiB at a time,
    /// and which part is used when is left to chance. So is which parts of the program and its libraries are
    /// resident; those are not counted.
    pub fn taken_bytes(&self) -> u64 {
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", self.pid())).expect("raio_server runs");
        let (mut sum, mut whole, mut written) = (0, 0, 0);
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let name = words.next();
            let mut bytes = || words.next().and_then(|kib| kib.parse::<u64>().ok()).expect("a number") << 10;
            match name {
                Some("Size:") => whole = bytes(),
                Some("Anonymous:" | "Swap:") => written += bytes(),
                // The last line of each mapping. Only arenas are advised to be of huge pages.
                Some("VmFlags:") => {
                    sum += if words.any(|flag| flag == "hg") { whole } else { written };
                    written = 0;
                }
                _ => {}
            }
        }
        sum
    }

    /// Processor time it has used.
    pub fn cpu_time(&self) -> Duration {
        cpu_time(&format!("/proc/{}/stat", self.pid()))
    }

    /// How many threads it has, by name.
    pub fn threads(&self) -> HashSet<String> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("raio_server runs");
        tasks
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .map(|name| name.trim().to_owned())
            .collect()
    }

    /// Workers that wait in the kernel for something else than work (a disk, a file system, a lock) whenever
    /// one looks for some milliseconds: by name, and where.
    pub fn blocked_workers(&self) -> Vec<String> {
        /// Where a worker sleeps, and where it waits for a processor ("0", or nothing if the kernel does not
        /// say).
        const SLEEPS: [&str; 4] = ["io_cqring_wait", "ep_poll", "futex", "0"];
        let blocked_at = |task: &Path| {
            let read = |name| std::fs::read_to_string(task.join(name)).unwrap_or_default();
            let place = read("wchan");
            // Not every wait for a disk is said to be one, such as that for a FUSE server.
            let is_elsewhere = !place.is_empty() && !SLEEPS.iter().any(|sleep| place.starts_with(sleep));
            (is_elsewhere || is_uninterruptible(task)).then_some(place)
        };
        self.tasks()
            .filter_map(|task| {
                let name = std::fs::read_to_string(task.join("comm")).ok()?.trim().to_owned();
                let number = name.strip_prefix("raio-")?;
                number.bytes().all(|b| b.is_ascii_digit()).then_some(())?;
                let mut places = (0..10).map(|_| {
                    std::thread::sleep(Duration::from_millis(1));
                    blocked_at(&task)
                });
                // It may be somewhere for a moment, for a page fault.
                let place = places.try_fold(String::new(), |_, place| place)?;
                Some(format!("{name} in {place}"))
            })
            .collect()
    }

    /// Waits until one of its threads waits for a disk, or the like: what was handed to the kernel, or to the
    /// pool, is then being executed.
    pub fn wait_for_blocked_thread(&self) {
        let deadline = Instant::now() + PATIENCE;
        // A thread may wait for a moment, for a page fault.
        let stays = |task: PathBuf| {
            (0..10).all(|_| {
                std::thread::sleep(Duration::from_millis(1));
                is_uninterruptible(&task)
            })
        };
        while !self.tasks().any(stays) {
            assert!(Instant::now() < deadline, "no thread of raio_server waits for a disk");
        }
    }

    /// The folders of its threads, with those that the kernel made for it.
    fn tasks(&self) -> impl Iterator<Item = PathBuf> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("raio_server runs");
        tasks.filter_map(|task| Some(task.ok()?.path()))
    }

    /// Waits for it to end by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("raio_server can be waited for") {
                return status;
            }
            assert!(Instant::now() < deadline, "raio_server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills it, as `kill -9` does.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !std::thread::panicking()
            && let Ok(Some(status)) = self.child.try_wait()
        {
            // Nobody may have noticed that it died under the test.
            assert!(
                status.code().is_some() || status.to_string().contains("signal: 9"),
                "raio_server ended: {status}"
            );
        }
        self.kill();
    }
}
