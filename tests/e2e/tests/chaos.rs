//! Clients work on the same cells while cables are pulled, connections are cut, processes are stopped and
//! killed, and the file system freezes and fills up. Whatever they saw must be what disks can do, and
//! whatever they synced must be there after a crash of the machine.
//!
//! `RAIO_TEST_SEED` replays the faults in the same order; when each of them comes, and what it meets, is left
//! to the machine. `RAIO_TEST_CHAOS_SECONDS` has them come slowly, for that long (`scripts/soak`), and
//! `RAIO_TEST_CHAOS_KEYS` over TLS.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};
use std::time::{Duration, Instant};

use raio_e2e::{
    CELL_BYTES, Cable, CellPlace, CellRead, CellWrite, CrashImage, Direction, End, Ending, FILE_CELLS, FILES,
    FOREVER, Fault, Frozen, History, LogLine, LoopDevice, Mounted, Outcome, PATIENCE, Proxy, Random, Server,
    Treatment, Violation, binary, decode_cell, monotonic_ns, pin, seed,
};
use raio_transport::keys::{PublicKey, SecretKey};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, ioctl_ficlone, seek};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

const CLIENTS: usize = 3;
const PORT: u16 = 7240;
/// File systems, and images for them that are small, so that they are soon full.
const FILE_SYSTEMS: [(&str, u64); 2] = [("ext4", 96 << 20), ("xfs", 300 << 20)];
/// Sparse, with room for what images of crashes do not share with the one that they are of.
const OUTER_BYTES: u64 = 1 << 30;

/// What can go wrong. Most of it for a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Cut(Ending),
    Stall,
    Delay,
    Flip(Direction, u64),
    Refuse,
    /// `ss -K`: both ends of each connection in this host's kernel are gone.
    KillSockets(End),
    PullCable,
    StopServer,
    StopClient(usize),
    KillClient(usize),
    KillServer,
    RestartServer,
    Freeze,
    FillDisk,
    CrashMachine,
}

impl Trouble {
    fn random(random: &mut Random) -> Self {
        let ending = [Ending::Fin, Ending::Reset, Ending::Silence][random.index(3)];
        let direction = [Direction::Up, Direction::Down][random.index(2)];
        let end = [End::A, End::B][random.index(2)];
        let (bit, client) = (random.below(1 << 16), random.index(CLIENTS));
        let all = [
            Self::Cut(ending),
            Self::Stall,
            Self::Delay,
            Self::Flip(direction, bit),
            Self::Refuse,
            Self::KillSockets(end),
            Self::PullCable,
            Self::StopServer,
            Self::StopClient(client),
            Self::KillClient(client),
            Self::KillServer,
            Self::RestartServer,
            Self::Freeze,
            Self::FillDisk,
            Self::CrashMachine,
        ];
        all[random.index(all.len())]
    }
}

/// A client process.
struct Worker {
    child: Child,
    /// It works until this is closed.
    stdin: Option<ChildStdin>,
    log: PathBuf,
    number: u32,
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Worker {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it is not waited for");
    }

    /// How many bytes it has logged.
    fn logged(&self) -> u64 {
        std::fs::metadata(&self.log).map_or(0, |metadata| metadata.len())
    }

    /// Whether something has succeeded that it logged behind this.
    fn has_succeeded_since(&self, logged: u64) -> bool {
        let mut tail = vec![0; (self.logged() - logged) as usize];
        File::open(&self.log).and_then(|log| log.read_exact_at(&mut tail, logged)).expect("a log");
        String::from_utf8_lossy(&tail).lines().any(|line| line.ends_with(" ok"))
    }
}

/// Everything that there is. What is dropped first is above.
struct Chaos {
    /// First, because a process whose write waits for the file system does not end.
    frozen: Option<Frozen>,
    clients: Vec<Worker>,
    logs: Vec<PathBuf>,
    server: Server,
    proxy: Proxy,
    /// What is to be undone, and when.
    troubles: Vec<(Instant, Trouble)>,
    images: Vec<CrashImage>,
    /// When the server was told to stop or killed, and when the next one was ready.
    stops: Vec<std::ops::Range<u64>>,
    /// The numbers of clients that were.
    killed: Vec<u32>,
    random: Random,
    begin: Instant,
    /// What happened, for people.
    story: String,
    file_system: &'static str,
    image_bytes: u64,
    files: Mounted,
    /// Has the image of `files`, and can clone it in one step.
    outer: Mounted,
    cable: Cable,
    directory: tempfile::TempDir,
}

/// What a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Honesty {
    Honest,
    /// It says that it has synced, and does not.
    SyncsNothing,
}

fn start_server(cable: &Cable, files: &Path, log: &Path, random: &mut Random, honesty: Honesty) -> Server {
    let mut backend = ["uring", "threads"][random.index(2)];
    let mut command = match honesty {
        Honesty::Honest => cable.command(End::A, binary("raio_server")),
        Honesty::SyncsNothing => {
            backend = "threads";
            let mut command = cable.command(End::A, binary("sandboxed"));
            let calls =
                [(libc::SYS_fsync, 0), (libc::SYS_fdatasync, 0), (libc::SYS_io_uring_setup, libc::ENOSYS)];
            command.arg(calls.map(|(call, errno)| format!("{call}={errno}")).join(","));
            command.arg(binary("raio_server"));
            command
        }
    };
    command.args(["--listen", &format!("tcp://{}:{PORT}", cable.address(End::A)), "--workers", "2"]);
    // Longer than the clients' window, so that it says what became of what they sent.
    command.args(["--linger", "660"]);
    let state = log.with_file_name("state");
    command.args(["--backend", backend, "--state"]).arg(state);
    command.args(["--export", &format!("d={},rw", files.display())]);
    let keys = log.with_file_name("keys");
    if keys.exists() {
        command.arg("--keys").arg(keys);
    }
    let log = OpenOptions::new().append(true).create(true).open(log).expect("a log");
    command.stderr(log);
    Server::spawn(command)
}

/// Keys for a server and its clients in a directory, as `keys` and `client`. Returns the server's.
fn make_keys(directory: &Path) -> PublicKey {
    let [keys, client] = ["keys", "client"].map(|name| directory.join(name));
    for path in [&keys, &client] {
        std::fs::create_dir(path).expect("a directory");
    }
    let key = SecretKey::create(&client.join("key")).expect("a key").public();
    let entry = format!("[client.cells]\nkeys = ['{key}']\nexports = {{ d = 'rw' }}\n");
    std::fs::write(keys.join("clients.toml"), entry).expect("a file");
    SecretKey::create(&keys.join("host.key")).expect("a key").public()
}

impl Chaos {
    fn new(mut random: Random, honesty: Honesty, has_keys: bool) -> Option<Self> {
        let cable = Cable::new("chaos")?;
        let directory = tempfile::tempdir().expect("a directory");
        let host_key = has_keys.then(|| make_keys(directory.path()));
        let outer = LoopDevice::new(OUTER_BYTES).mount("xfs");
        let image = outer.path().join("image");
        let (file_system, image_bytes) = FILE_SYSTEMS[random.index(FILE_SYSTEMS.len())];
        File::create(&image).and_then(|file| file.set_len(image_bytes)).expect("an image");
        let files = LoopDevice::over(&image).mount(file_system);
        for n in 0..FILES {
            let file = File::create(files.path().join(n.to_string())).expect("a file");
            file.set_len(u64::from(FILE_CELLS) * CELL_BYTES as u64).expect("a sparse file");
            file.sync_all().expect("a file system");
        }
        File::open(files.path()).and_then(|directory| directory.sync_all()).expect("a file system");
        let server =
            start_server(&cable, files.path(), &directory.path().join("server"), &mut random, honesty);
        let here: Ipv4Addr = cable.address(End::B).parse().expect("an address");
        let proxy = cable.on(End::B, || Proxy::start_on(here, server.address()));
        if let Some(key) = host_key {
            for address in [server.address(), proxy.address()] {
                pin(&directory.path().join("client"), address, key);
            }
        }
        let mut this = Self {
            frozen: None,
            clients: Vec::new(),
            logs: Vec::new(),
            server,
            proxy,
            troubles: Vec::new(),
            images: Vec::new(),
            stops: Vec::new(),
            killed: Vec::new(),
            random,
            begin: Instant::now(),
            story: format!("on {file_system}\n"),
            file_system,
            image_bytes,
            files,
            outer,
            cable,
            directory,
        };
        for place in 0..CLIENTS {
            let client = this.start_client(place);
            this.clients.push(client);
        }
        Some(this)
    }

    /// One client of three is connected directly, the others by way of the proxy, with checksums.
    fn start_client(&mut self, place: usize) -> Worker {
        let number = self.logs.len() as u32 + 1;
        let log = self.directory.path().join(format!("client{number}"));
        self.logs.push(log.clone());
        let mut command = self.cable.command(End::B, binary("cells"));
        let url = if place == 0 { self.server.url() } else { self.proxy.url() };
        command.arg(url).arg(&log).args([number.to_string(), self.random.below(1 << 32).to_string()]);
        if place > 0 {
            command.arg("crc");
        }
        let keys = self.directory.path().join("client");
        if keys.exists() {
            command.env("RAIO_KEYS", keys);
        }
        let mut child = command.stdin(Stdio::piped()).spawn().expect("a client");
        Worker { stdin: child.stdin.take(), child, log, number }
    }

    fn tell(&mut self, what: impl std::fmt::Display) {
        let at = self.begin.elapsed();
        self.story += &format!("{at:>8.3?} {} {what}\n", monotonic_ns());
    }

    /// Has it happen, for so long if it is of that kind.
    fn begin(&mut self, trouble: Trouble, length: Duration) {
        self.undo_where(|other| *other == trouble);
        self.tell(format_args!("{trouble:?} for {length:?}"));
        let mut is_for_a_time = true;
        match trouble {
            Trouble::Stall => self.proxy.stall(true),
            Trouble::Delay => self.proxy.treat(Treatment { delay: length / 20, ..Treatment::default() }),
            Trouble::Refuse => self.proxy.refuse(true),
            Trouble::PullCable => self.cable.pull(),
            Trouble::StopServer => self.server.signal(Signal::STOP),
            Trouble::StopClient(n) => self.clients[n].signal(Signal::STOP),
            Trouble::Freeze => {
                self.undo_where(|other| *other == Trouble::Freeze);
                self.frozen = Some(self.files.freeze());
            }
            Trouble::FillDisk => {
                self.thaw();
                self.fill();
            }
            _ => is_for_a_time = false,
        }
        if is_for_a_time {
            self.troubles.push((Instant::now() + length, trouble));
            return;
        }
        match trouble {
            Trouble::Cut(ending) => self.proxy.end_all(ending),
            Trouble::Flip(direction, bit) => self.proxy.flip(direction, bit),
            Trouble::KillSockets(end) => {
                let other = if end == End::A { End::B } else { End::A };
                let mut ss = self.cable.command(end, "ss");
                ss.args(["-K", "dst", self.cable.address(other)]);
                assert!(ss.output().expect("ss runs").status.success());
            }
            Trouble::KillClient(n) => {
                self.troubles.retain(|(_, other)| *other != Trouble::StopClient(n));
                self.killed.push(self.clients[n].number);
                self.clients[n].child.kill().expect("it is not waited for");
                self.clients[n] = self.start_client(n);
            }
            Trouble::KillServer => {
                self.troubles.retain(|(_, other)| *other != Trouble::StopServer);
                // What it has in the kernel goes on once the file system does.
                let begin = monotonic_ns();
                self.server.signal(Signal::KILL);
                self.thaw();
                self.server.kill();
                self.start_server();
                self.stops.push(begin..monotonic_ns());
            }
            Trouble::RestartServer => {
                self.thaw();
                self.undo_where(|other| *other == Trouble::StopServer);
                let begin = monotonic_ns();
                self.server.signal(Signal::TERM);
                self.server.wait();
                self.start_server();
                self.stops.push(begin..monotonic_ns());
            }
            Trouble::CrashMachine => self.crash(),
            _ => unreachable!("it lasts for a time"),
        }
    }

    fn start_server(&mut self) {
        let log = self.directory.path().join("server");
        self.server = start_server(&self.cable, self.files.path(), &log, &mut self.random, Honesty::Honest);
    }

    fn undo_where(&mut self, matches: impl Fn(&Trouble) -> bool) {
        let mut undone = Vec::new();
        self.troubles.retain(|(_, trouble)| {
            let is_over = matches(trouble);
            undone.extend(is_over.then_some(*trouble));
            !is_over
        });
        for trouble in undone {
            self.tell(format_args!("end of {trouble:?}"));
            match trouble {
                Trouble::Stall => self.proxy.stall(false),
                Trouble::Delay => self.proxy.treat(Treatment::default()),
                Trouble::Refuse => self.proxy.refuse(false),
                Trouble::PullCable => self.cable.plug(),
                Trouble::StopServer => self.server.signal(Signal::CONT),
                Trouble::StopClient(n) => self.clients[n].signal(Signal::CONT),
                Trouble::Freeze => self.frozen = None,
                Trouble::FillDisk => {
                    self.thaw();
                    std::fs::remove_file(self.filler()).expect("it was filled");
                }
                _ => unreachable!("it does not last"),
            }
        }
    }

    fn thaw(&mut self) {
        self.undo_where(|trouble| *trouble == Trouble::Freeze);
    }

    fn filler(&self) -> PathBuf {
        self.files.path().join("filler")
    }

    /// Takes all the space that is left.
    fn fill(&self) {
        let file = File::create(self.filler()).expect("a file");
        let (mut length, mut at) = (self.image_bytes, 0);
        while length >= 4096 {
            match fallocate(&file, FallocateFlags::empty(), at, length) {
                Ok(()) => at += length,
                Err(Errno::NOSPC) => length /= 2,
                Err(error) => panic!("fallocate: {error}"),
            }
        }
    }

    /// What is on the disk if the machine stops now.
    fn crash(&mut self) {
        let path = self.outer.path().join("crashed");
        let image = File::open(self.outer.path().join("image")).expect("the image");
        let clone = File::create(&path).expect("a file");
        let begin = monotonic_ns();
        ioctl_ficlone(&clone, &image).expect("xfs clones");
        let end = monotonic_ns();
        let files = LoopDevice::over(&path).mount_again(self.file_system);
        let cells = read_files(files.path());
        let written = cells.values().flatten().count();
        self.tell(format_args!("image {} has {written} cells", self.images.len()));
        self.images.push(CrashImage { begin, end, cells });
        drop(files);
        std::fs::remove_file(path).expect("a file");
    }

    /// Undoes what is due, until then.
    fn go_on_until(&mut self, then: Instant) {
        loop {
            let now = Instant::now();
            let due: Vec<_> =
                self.troubles.iter().filter(|(end, _)| *end <= now).map(|(_, what)| *what).collect();
            self.undo_where(|trouble| due.contains(trouble));
            let ends = self.troubles.iter().map(|(end, _)| *end);
            let next = ends.chain([then]).min().expect("one at least");
            if now >= then {
                return;
            }
            std::thread::sleep(next.saturating_duration_since(now));
        }
    }

    /// Once nothing is wrong any more, every client gets on, and comes to an end.
    fn finish(&mut self) {
        self.undo_where(|_| true);
        self.tell("nothing is wrong any more");
        let logged: Vec<u64> = self.clients.iter().map(Worker::logged).collect();
        let deadline = Instant::now() + PATIENCE;
        while !self.clients.iter().zip(&logged).all(|(client, &logged)| client.has_succeeded_since(logged)) {
            assert!(Instant::now() < deadline, "a client does not get on");
            std::thread::sleep(Duration::from_millis(20));
        }
        for client in &mut self.clients {
            client.stdin = None;
        }
        for client in &mut self.clients {
            let deadline = Instant::now() + PATIENCE;
            while client.child.try_wait().expect("a client").is_none() {
                assert!(Instant::now() < deadline, "a client does not end");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        self.crash();
        self.server.signal(Signal::TERM);
        self.server.wait();
    }

    /// Keeps the logs, and says what happened.
    fn keep(&mut self) {
        self.directory.disable_cleanup(true);
        let story = self.directory.path().join("story");
        std::fs::write(&story, &self.story).expect("a file");
        eprintln!("{}The logs are in {}.", self.story, self.directory.path().display());
    }

    /// What clients are promised that go on by themselves: no outcome is unknown but of what they sent to a
    /// server that was stopped, or of what was in flight when they were killed; and no write is said to be
    /// lost, for none is.
    fn check_promises(&mut self, history: &History) {
        // When writes of each client were answered.
        let mut answered = HashMap::<u32, Vec<u64>>::new();
        for write in history.writes().filter(|write| write.outcome == Outcome::Ok) {
            answered.entry(write.value.client).or_default().push(write.end);
        }
        answered.values_mut().for_each(|times| times.sort_unstable());
        let is_excused = |write: &&CellWrite| {
            let client = write.value.client;
            if write.end == FOREVER {
                return self.killed.contains(&client);
            }
            // It may have been sent before the client looked whether its connection has ended.
            let times = answered.get(&client).map_or(&[][..], |times| times);
            let before = times.partition_point(|&time| time < write.begin).checked_sub(1);
            let last = before.map_or(0, |at| times[at]);
            self.stops.iter().any(|stop| last < stop.end && stop.start < write.end)
        };
        let unknown: Vec<_> = history
            .writes()
            .filter(|write| write.outcome == Outcome::Unknown && !is_excused(write))
            .collect();
        if !unknown.is_empty() || !history.notes().is_empty() {
            self.keep();
            panic!("{} cells, such as {:?}; {:?}", unknown.len(), unknown.first(), history.notes());
        }
    }

    /// What the clients logged, and what is there in the end, as one more log.
    fn logs(&self) -> Vec<String> {
        let read = |log| std::fs::read_to_string(log).expect("a log");
        let mut logs: Vec<String> = self.logs.iter().map(read).collect();
        let begin = monotonic_ns();
        let cells = read_files(self.files.path());
        let end = monotonic_ns();
        let lines = cells.into_iter().map(|(place, value)| match value {
            Some(value) => LogLine::Read(CellRead { place, value, begin, end }),
            None => LogLine::Broken { place, hex: "at-the-end".into(), begin, end },
        });
        logs.push(lines.map(|line| format!("{line}\n")).collect());
        logs
    }
}

fn history(logs: &[String]) -> History {
    let mut history = History::default();
    for (n, log) in logs.iter().enumerate() {
        history.add_log(log).unwrap_or_else(|error| panic!("log {}: {error}", n + 1));
    }
    history
}

/// Changes one line: a read of a cell gets a value that another had overwritten before.
fn corrupt(logs: &mut [String], random: &mut Random) -> CellPlace {
    let parsed = || logs.iter().flat_map(|log| log.lines()).filter_map(LogLine::parse);
    let mut writes = HashMap::<CellPlace, Vec<CellWrite>>::new();
    for line in parsed() {
        if let LogLine::Write(write) = line
            && write.outcome == Outcome::Ok
        {
            writes.entry(write.place).or_default().push(write);
        }
    }
    // Of reads behind two writes that were done one after the other: the values of the two.
    let could_be = |read: &CellRead| {
        let writes = writes.get(&read.place)?;
        let new = writes.iter().find(|write| write.value == read.value && write.end < read.begin)?;
        let old = writes.iter().find(|write| write.end < new.begin)?;
        Some(CellRead { value: old.value, ..*read })
    };
    let pairs = parsed().filter_map(|line| match line {
        LogLine::Read(read) => Some((read, could_be(&read)?)),
        _ => None,
    });
    // A part of them is enough to choose from.
    let pairs: Vec<_> = pairs.take(1000).collect();
    let (read, wrong) = pairs[random.index(pairs.len())];
    let (from, to) = (format!("{}\n", LogLine::Read(read)), format!("{}\n", LogLine::Read(wrong)));
    let log = logs.iter_mut().find(|log| log.contains(&from)).expect("it was in one");
    *log = log.replacen(&from, &to, 1);
    read.place
}

/// The cells of the files in this directory that are not in a hole.
fn read_files(directory: &Path) -> HashMap<CellPlace, Option<raio_e2e::CellValue>> {
    let mut all = HashMap::new();
    for number in 0..FILES {
        let file = File::open(directory.join(number.to_string())).expect("a file");
        let mut at = 0;
        while let Ok(data) = seek(&file, SeekFrom::Data(at)) {
            let hole = seek(&file, SeekFrom::Hole(data)).expect("data ends somewhere");
            let mut bytes = vec![0; (hole - data) as usize];
            file.read_exact_at(&mut bytes, data).expect("data");
            let (cells, _) = bytes.as_chunks::<CELL_BYTES>();
            for (cell, bytes) in (data / CELL_BYTES as u64..).zip(cells) {
                let place = CellPlace { file: number, cell: cell as u32 };
                all.insert(place, decode_cell(place, bytes));
            }
            at = hole;
        }
    }
    all
}

/// How the troubles come.
struct Pace {
    duration: Duration,
    /// Milliseconds from one to the next.
    pause: std::ops::Range<u64>,
    /// How many milliseconds one lasts at most.
    length_max: u64,
    /// What has them come so, of the environment.
    variable: String,
}

impl Pace {
    fn quick(seconds: u64) -> Self {
        Self {
            duration: Duration::from_secs(seconds),
            pause: 100..1200,
            length_max: 1500,
            variable: String::new(),
        }
    }

    fn slow(seconds: u64) -> Self {
        let variable = format!(" RAIO_TEST_CHAOS_SECONDS={seconds}");
        Self { duration: Duration::from_secs(seconds), pause: 1000..20_000, length_max: 30_000, variable }
    }
}

#[test]
fn what_clients_see_in_chaos_is_what_disks_can_do_and_what_they_synced_is_there_after_a_crash() {
    match std::env::var("RAIO_TEST_CHAOS_SECONDS") {
        Ok(seconds) => {
            let pace = Pace::slow(seconds.parse().expect("RAIO_TEST_CHAOS_SECONDS is a number"));
            chaos(seed(), &pace, std::env::var_os("RAIO_TEST_CHAOS_KEYS").is_some());
        }
        Err(_) => chaos(seed(), &Pace::quick(30), false),
    }
}

/// The other half of a minute, beside the first one. What it prints is replayed by the test above.
#[test]
fn in_another_chaos_at_the_same_time_it_is_no_different() {
    chaos(seed().wrapping_add(1 << 31), &Pace::quick(30), false);
}

#[test]
#[ignore = "long"]
fn what_clients_see_in_slow_chaos_is_what_disks_can_do_and_what_they_synced_is_there_after_a_crash() {
    chaos(seed(), &Pace::slow(600), false);
}

#[test]
#[ignore = "long"]
fn over_tls_it_is_no_different() {
    chaos(seed(), &Pace::slow(300), true);
}

fn chaos(seed: u64, pace: &Pace, has_keys: bool) {
    // Seen of a test that passes, too.
    let _ = writeln!(
        std::io::stderr(),
        "chaos for {:?}, replay with RAIO_TEST_SEED={seed}{}{} cargo test -p raio-e2e --test chaos \
         what_clients_see",
        pace.duration,
        pace.variable,
        if has_keys { " RAIO_TEST_CHAOS_KEYS=1" } else { "" },
    );
    let mut random = Random::with_seed(seed);
    let Some(mut chaos) = Chaos::new(Random::with_seed(random.below(u64::MAX)), Honesty::Honest, has_keys)
    else {
        return;
    };
    let end = Instant::now() + pace.duration;
    let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        while Instant::now() < end {
            let pause = pace.pause.start + random.below(pace.pause.end - pace.pause.start);
            let (trouble, length) = (Trouble::random(&mut random), random.below(pace.length_max));
            chaos.go_on_until(Instant::now() + Duration::from_millis(pause));
            chaos.begin(trouble, Duration::from_millis(length));
        }
        chaos.crash();
        chaos.finish();
    }));
    if let Err(panic) = run {
        chaos.keep();
        std::panic::resume_unwind(panic);
    }
    let mut logs = chaos.logs();
    let history = history(&logs);
    let mut violations: Vec<_> = history.check().into_iter().map(|found| (None, found)).collect();
    let lost = history.check_images(&chaos.images);
    violations.extend(lost.into_iter().map(|(image, found)| (Some(image), found)));
    let counts = history.counts();
    let _ = writeln!(
        std::io::stderr(),
        "{counts:?}, {} images of crashes, {:?}",
        chaos.images.len(),
        chaos.begin.elapsed()
    );
    if let Some((image, first)) = violations.first() {
        chaos.keep();
        for (image, violation) in violations.iter().take(20) {
            eprintln!("{violation} {}", image.map_or(String::new(), |image| format!("(image {image})")));
        }
        let times = image.map(|image| (chaos.images[image].begin, chaos.images[image].end));
        eprintln!("All of the first one's cell, {times:?}:\n{}", history.of_cell(first.place));
        panic!("{} violations", violations.len());
    }
    assert!(counts.reads > 1000 && counts.writes > 1000 && counts.syncs > 10, "hardly anything was done");
    chaos.check_promises(&history);
    let place = corrupt(&mut logs, &mut random);
    let found = self::history(&logs).check();
    assert!(!found.is_empty() && found.iter().all(|violation| violation.place == place), "{found:?}");
    let _ = writeln!(std::io::stderr(), "after {:?}", chaos.begin.elapsed());
}

#[test]
fn without_chaos_nothing_fails_and_a_server_that_syncs_nothing_is_found() {
    for honesty in [Honesty::Honest, Honesty::SyncsNothing] {
        let Some(mut chaos) = Chaos::new(Random::new(), honesty, false) else { return };
        std::thread::sleep(Duration::from_secs(1));
        chaos.crash();
        chaos.finish();
        let history = history(&chaos.logs());
        assert_eq!(history.check(), []);
        let counts = history.counts();
        assert_eq!((counts.failed, counts.unknown, counts.failed_syncs), (0, 0, 0));
        let found = history.check_images(&chaos.images);
        match honesty {
            Honesty::Honest => assert_eq!(found, []),
            Honesty::SyncsNothing => {
                let is_lost = |violation: &Violation| matches!(violation.fault, Fault::Lost { .. });
                assert!(found.iter().any(|(_, violation)| is_lost(violation)), "{found:?}");
            }
        }
    }
}

/// With this trouble only, again and again, nothing fails, and no outcome is unknown.
fn nothing_fails_with(troubles: &[Trouble]) {
    let Some(mut chaos) = Chaos::new(Random::new(), Honesty::Honest, false) else { return };
    for (n, trouble) in (0..).zip(troubles.iter().cycle().take(12)) {
        chaos.go_on_until(Instant::now() + Duration::from_millis(300 + n * 37));
        chaos.begin(*trouble, Duration::from_millis(200));
    }
    chaos.finish();
    let history = history(&chaos.logs());
    assert_eq!(history.check(), []);
    let counts = history.counts();
    if (counts.failed, counts.unknown, counts.failed_syncs) != (0, 0, 0) || !history.notes().is_empty() {
        chaos.keep();
        panic!("{counts:?} {:?}", history.notes());
    }
    assert!(counts.writes > 1000, "{counts:?}");
}

#[test]
fn nothing_fails_and_no_outcome_is_unknown_because_connections_break_to_a_server_that_lives() {
    nothing_fails_with(&[
        Trouble::Cut(Ending::Reset),
        Trouble::KillSockets(End::A),
        Trouble::Cut(Ending::Fin),
        Trouble::PullCable,
        Trouble::Cut(Ending::Silence),
        Trouble::KillSockets(End::B),
        Trouble::Flip(Direction::Up, 12_345),
        Trouble::Refuse,
        Trouble::Flip(Direction::Down, 12_345),
        Trouble::StopServer,
    ]);
}

#[test]
fn nothing_fails_and_no_outcome_is_unknown_because_the_server_is_restarted() {
    nothing_fails_with(&[Trouble::RestartServer]);
}
