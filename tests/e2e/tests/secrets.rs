//! Where secret keys are, and where they are not: in the memory of servers and clients, in core dumps, in the
//! log, arguments and the environment.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use base64ct::{Base64, Encoding};
use raio_e2e::{Server, binary, is_at_rest, pin};
use raio_transport::keys::SecretKey;
use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process};
use tempfile::TempDir;

/// What must not be found of a key.
struct Secret {
    seed: [u8; 32],
    /// The lower half of the seed's hash, which signs. Its first byte and its last one, which differ between
    /// its forms, are left out.
    scalar: [u8; 30],
    /// The upper half, from which the numbers of signatures are made.
    prefix: [u8; 32],
    /// The key as its file has it.
    base64: String,
}

/// How often each part of a secret was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Found {
    seed: usize,
    scalar: usize,
    prefix: usize,
    base64: usize,
}

impl Secret {
    /// That of a key file.
    fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).expect("a key");
        let base64 = text.lines().nth(1).expect("PEM has three lines").to_owned();
        let der = Base64::decode_vec(&base64).expect("base64");
        let seed: [u8; 32] = der[der.len() - 32..].try_into().expect("32 bytes");
        let hash = ring::digest::digest(&ring::digest::SHA512, &seed);
        let hash = hash.as_ref();
        Self {
            seed,
            scalar: hash[1..31].try_into().expect("30 bytes"),
            prefix: hash[32..].try_into().expect("32 bytes"),
            base64,
        }
    }

    /// What is in the memory of a process that can be written to. The rest is its files'.
    fn find_in(&self, process: u32) -> Found {
        let maps = fs::read_to_string(format!("/proc/{process}/maps")).expect("it runs");
        let memory = File::open(format!("/proc/{process}/mem")).expect("it may be looked into");
        let mut found = Found::default();
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let (Some(range), Some(rights)) = (words.next(), words.next()) else { panic!("{line}") };
            if !rights.starts_with("rw") {
                continue;
            }
            let (begin, end) = range.split_once('-').expect("a range");
            let [begin, end] =
                [begin, end].map(|address| u64::from_str_radix(address, 16).expect("hexadecimal"));
            self.find_between(&memory, begin, end, &mut found);
        }
        found
    }

    fn find_between(&self, memory: &File, begin: u64, end: u64, found: &mut Found) {
        const PIECE: usize = 64 << 10;
        static ZEROS: [u8; PIECE] = [0; PIECE];
        // Something may lie across the end of a piece.
        const OVERLAP: usize = 128;
        let mut bytes = vec![0; OVERLAP + PIECE];
        for at in (begin..end).step_by(PIECE) {
            let len = PIECE.min((end - at) as usize);
            bytes.copy_within(PIECE.., 0);
            // Some of what is mapped is a device's, or has been unmapped since.
            let piece = &mut bytes[OVERLAP..OVERLAP + len];
            if memory.read_exact_at(piece, at).is_err() || *piece == ZEROS[..len] {
                bytes.fill(0);
                continue;
            }
            let parts = [
                (&self.seed[..], &mut found.seed),
                (&self.scalar, &mut found.scalar),
                (&self.prefix, &mut found.prefix),
                (self.base64.as_bytes(), &mut found.base64),
            ];
            for (part, count) in parts {
                // What ends in the overlap was found in the piece before.
                *count += places(&bytes[..OVERLAP + len], part)
                    .filter(|place| place + part.len() > OVERLAP)
                    .count();
            }
        }
    }

    /// Checks that a text has nothing of it.
    fn is_not_in(&self, what: &str, text: &[u8]) {
        let base64 = Base64::encode_string(&self.seed);
        let hex: String = self.seed.iter().map(|byte| format!("{byte:02x}")).collect();
        let numbers = format!("{:?}", self.seed);
        let numbers = numbers.trim_matches(['[', ']']);
        // The last characters depend on what stands in front or behind.
        for part in [&self.base64[24..], &base64[..40], &hex, numbers, "PRIVATE KEY"] {
            assert!(places(text, part.as_bytes()).next().is_none(), "{what} has a secret");
        }
        assert!(places(text, &self.seed).next().is_none(), "{what} has a secret");
    }

    /// The same of what everybody may see of a process.
    fn is_not_shown_by(&self, what: &str, process: u32) {
        for name in ["cmdline", "environ", "comm", "status"] {
            let shown = fs::read(format!("/proc/{process}/{name}")).expect("it runs");
            self.is_not_in(&format!("{name} of {what}"), &shown);
        }
    }
}

/// Where these bytes are.
fn places(bytes: &[u8], part: &[u8]) -> impl Iterator<Item = usize> {
    let first = part[0];
    let candidates = bytes.iter().enumerate().filter(move |&(_, &byte)| byte == first);
    candidates.map(|(at, _)| at).filter(move |&at| bytes[at..].starts_with(part))
}

/// A server's files, and those of a client that it knows.
struct Site {
    directory: TempDir,
}

impl Site {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        for name in ["server", "client", "data"] {
            fs::create_dir(directory.path().join(name)).expect("a directory");
        }
        let this = Self { directory };
        let client = SecretKey::create(&this.client_key()).expect("a key").public();
        SecretKey::create(&this.server_key()).expect("a key");
        let clients = format!("[client.one]\nkeys = ['{client}']\nexports = {{ data = 'ro' }}\n");
        fs::write(this.path("server/clients.toml"), clients).expect("a file");
        fs::write(this.path("data/file"), "0123456789").expect("a file");
        this
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn client_key(&self) -> std::path::PathBuf {
        self.path("client/key")
    }

    fn server_key(&self) -> std::path::PathBuf {
        self.path("server/host.key")
    }

    /// The arguments of its server.
    fn arguments(&self) -> Vec<String> {
        let export = format!("data={}", self.path("data").display());
        let keys = self.path("server").display().to_string();
        let all = ["--listen", "tcp://127.0.0.1:0", "--memory", "32M", "--workers", "1", "--keys", &keys];
        [&all[..], &["--export", &export]].concat().into_iter().map(str::to_owned).collect()
    }

    fn client(&self, server: &Server) -> Client {
        let host_key = SecretKey::load(&self.server_key()).expect("it is there").public();
        pin(&self.path("client"), server.address(), host_key);
        let mut child = Command::new(binary("keyed"))
            .args([&server.url(), "/data/file"])
            .env("RAIO_KEYS", self.path("client"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(self.path("client-log")).expect("a file"))
            .spawn()
            .expect("keyed starts");
        let stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        Client { child, stdout }
    }
}

/// A client in a process of its own. Killed when dropped.
struct Client {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Client {
    fn says(&mut self, what: &str) {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("it speaks");
        assert_eq!(line.trim_end(), what);
    }

    fn go_on(&mut self) {
        self.child.stdin.as_mut().expect("stdin is piped").write_all(b"\n").expect("it listens");
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn secrets_are_in_memory_where_they_are_used_and_nowhere_else() {
    let site = Site::new();
    let log = site.path("log");
    let mut command = Command::new(binary("raio_server"));
    command.args(site.arguments()).args(["--sandbox=off", "--log", "trace"]);
    command.stderr(File::create(&log).expect("a file"));
    let mut server = Server::spawn(command);
    let mut client = site.client(&server);
    let [host, own] = [site.server_key(), site.client_key()].map(|path| Secret::read(&path));
    client.says("connected");
    let process = client.child.id();
    let during = [host.find_in(server.pid()), own.find_in(process)];
    host.is_not_shown_by("the server", server.pid());
    own.is_not_shown_by("the client", process);
    client.go_on();
    client.says("over");
    server.statistics_when(is_at_rest);
    let after = [host.find_in(server.pid()), own.find_in(process)];
    eprintln!("during the session: server {:?}, client {:?}", during[0], during[1]);
    eprintln!("after it: server {:?}, client {:?}", after[0], after[1]);
    // docs/SECURITY.md says what remains. What is there is found.
    assert!(during[0].seed > 0 && during.iter().all(|found| found.scalar > 0 && found.prefix > 0));
    for found in [during[1], after[1]] {
        assert_eq!(found.seed, 0, "a client has not overwritten its key");
    }
    for found in during.into_iter().chain(after) {
        assert_eq!(found.base64, 0, "what was read of a key file has not been overwritten");
    }

    for log in [&log, &site.path("client-log")] {
        let text = fs::read(log).expect("a log");
        host.is_not_in("the log", &text);
        own.is_not_in("the log", &text);
    }
    assert!(fs::metadata(&log).expect("a log").len() > 1000, "it is a log");
}

/// How a server ends that gets SIGABRT while dumps are allowed as far as they can be: whether the kernel says
/// that there is a dump.
fn dumps(site: &Site, arguments: &[&str]) -> bool {
    let directory = site.path("cores");
    fs::create_dir_all(&directory).expect("a directory");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -c unlimited; exec \"$0\" \"$@\""]).arg(binary("raio_server"));
    command.args(site.arguments()).args(arguments).current_dir(directory);
    let mut server =
        command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("raio_server starts");
    let mut line = String::new();
    BufReader::new(server.stdout.take().expect("stdout is piped")).read_line(&mut line).expect("it speaks");
    assert!(line.contains("ready"), "{line}");
    kill_process(Pid::from_child(&server), Signal::ABORT).expect("it is there");
    let status = server.wait().expect("it ends");
    assert_eq!(status.signal(), Some(libc::SIGABRT));
    status.core_dumped()
}

#[test]
fn a_server_in_its_sandbox_leaves_no_core_dump() {
    if getrlimit(Resource::Core).maximum.is_some() && !raio_e2e::needs_root("allowing core dumps") {
        return;
    }
    let site = Site::new();
    if !dumps(&site, &["--sandbox=off"]) {
        eprintln!("SKIPPED: a server that leaves no core dump, because none can be made here");
        return;
    }
    let cores = site.path("cores");
    let dumped = |name: &OsStr| name.to_string_lossy().starts_with("core");
    for core in fs::read_dir(&cores).expect("a directory").map(|core| core.expect("a file")) {
        assert!(dumped(&core.file_name()), "{core:?}");
        fs::remove_file(core.path()).expect("it is ours");
    }
    assert!(!dumps(&site, &[]), "it can be dumped");
    assert_eq!(fs::read_dir(&cores).expect("a directory").count(), 0);
}

#[test]
fn a_server_in_its_sandbox_cannot_be_looked_into_by_its_own_user() {
    if !raio_e2e::needs_root("becoming another user") {
        return;
    }
    // `nobody`
    let as_user = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let maps = |process: &str| {
        let path = format!("/proc/{process}/maps");
        let output = Command::new("setpriv").args(as_user).args(["cat", &path]).output();
        output.expect("setpriv runs").stdout
    };
    assert!(!maps("self").is_empty(), "it can look into itself");
    let server = Server::start_with(&["n=null:1M"], &["--user", "nobody"]);
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("it runs");
    assert!(status.contains("Uid:\t65534\t65534\t65534\t65534"), "{status}");
    assert!(maps(&server.pid().to_string()).is_empty());
}
