//! A server whose kernel encrypts and decrypts (`raio_server --ktls`), in its sandbox: data that goes both
//! ways, sessions that go on when a key is used up, and kernels that cannot do that.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use raio::{Buffer, Buffers, Context, File, Keys, Operation, Options, Session};
use raio_e2e::{Server, binary, carry_out, is_at_rest, load_command, no_kernel_tls, pin};
use raio_transport::keys::SecretKey;
use tempfile::TempDir;

const PIECE: usize = 256 << 10;
const FEWER_RECORDS: &str = "RAIO_TEST_RECORDS_PER_KEY";

/// A server with its log, and a client that it knows and that trusts it.
struct Site {
    directory: TempDir,
    server: Server,
}

impl Site {
    /// With a limit on the records that the server sends with one key.
    fn new(records_per_key: Option<u64>) -> Self {
        let directory = prepared();
        let path = |name: &str| directory.path().join(name);
        let mut command = server_command(&directory);
        command.args(["--listen", "tcp://127.0.0.1:0"]);
        command.stderr(fs::File::create(path("log")).expect("a file"));
        command.envs(records_per_key.map(|records| (FEWER_RECORDS, records.to_string())));
        let server = Server::spawn(command);
        let host_key = SecretKey::load(&path("keys/host.key")).expect("the server has made it").public();
        pin(&path("client"), server.address(), host_key);
        Self { directory, server }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn connect(&self) -> Session {
        let keys = Keys::Directory(self.path("client"));
        Session::connect(&self.server.url(), &Options { keys, ..Options::default() }).expect("a session")
    }

    /// How many connections have ended since a key was used up.
    fn used_up(&mut self) -> u64 {
        self.server.statistics()["closes"]["key_used_up"].as_u64().expect("a number")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).expect("a log")
    }
}

/// A directory with data to export, and keys.
fn prepared() -> TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    for name in ["data", "keys", "client"] {
        fs::create_dir(directory.path().join(name)).expect("a directory");
    }
    let key = SecretKey::create(&directory.path().join("client/key")).expect("a key").public();
    let clients = format!("[client.one]\nkeys = ['{key}']\nexports = {{ data = 'rw' }}\n");
    fs::write(directory.path().join("keys/clients.toml"), clients).expect("a file");
    directory
}

fn server_command(directory: &TempDir) -> Command {
    let path = |name: &str| directory.path().join(name).to_str().expect("UTF-8").to_owned();
    let mut command = Command::new(binary("raio_server"));
    command.args(["--ktls", "--keys", &path("keys"), "--export", &format!("data={},rw", path("data"))]);
    command
}

/// Bytes that differ by piece and by position.
fn piece(number: u64) -> Vec<u8> {
    (0..PIECE as u64).map(|at| (at.wrapping_mul(31) ^ (at >> 8) ^ number.wrapping_mul(97)) as u8).collect()
}

fn write(context: &mut Context, file: &File, number: u64) {
    let buffers = Buffers::One(Buffer::Owned(piece(number).into()));
    let operation = Operation::Write { offset: number * PIECE as u64, buffers };
    let done = carry_out(context, file, operation).expect("the session goes on").result;
    assert_eq!(done.expect("it is written"), PIECE as u64);
}

fn read(context: &mut Context, file: &File, number: u64) {
    let buffers = Buffers::One(Buffer::Owned(vec![0; PIECE].into()));
    let operation = Operation::Read { offset: number * PIECE as u64, buffers };
    let done = carry_out(context, file, operation).expect("the session goes on");
    assert_eq!(done.result.expect("it is read"), PIECE as u64);
    let bytes = done.buffers.expect("they come back");
    assert!(bytes.slices(0..PIECE).flatten().copied().eq(piece(number)), "piece {number} came over wrong");
}

/// Writes pieces of a file, reads each back, and compares what is in the file. Returns how often the client
/// had to connect again.
fn write_and_read(site: &Site, pieces: u64) -> u64 {
    let session = site.connect();
    let file = session.open("/data/file", libc::O_RDWR | libc::O_CREAT, 0o644).expect("a file");
    let mut context = session.context(4).expect("a context");
    for number in 0..pieces {
        write(&mut context, &file, number);
    }
    let synced = carry_out(&mut context, &file, Operation::Fsync { data_only: false });
    synced.expect("the session goes on").result.expect("it is durable");
    for number in 0..pieces {
        read(&mut context, &file, number);
    }
    let stored = fs::read(site.path("data/file")).expect("the file");
    assert!(stored == (0..pieces).flat_map(piece).collect::<Vec<_>>(), "the file has other bytes");
    let stats = context.stats();
    assert_eq!((stats.unknown, stats.lost), (0, 0));
    stats.reconnects
}

#[test]
fn a_file_is_written_and_read_over_tls_of_the_kernels() {
    if no_kernel_tls("a server with --ktls") {
        return;
    }
    let mut site = Site::new(None);
    assert_eq!(write_and_read(&site, 8), 0);
    assert_eq!(site.used_up(), 0);
    site.server.statistics_when(is_at_rest);
    let log = site.log();
    assert!(!log.contains("The sandbox is off"), "{log}");
}

#[test]
fn a_session_goes_on_when_the_server_has_used_a_key_up() {
    if no_kernel_tls("a server with --ktls") {
        return;
    }
    // Two reads, and what a connection begins with.
    let mut site = Site::new(Some(48));
    let reconnects = write_and_read(&site, 8);
    assert!(reconnects >= 2, "{reconnects}");
    let used_up = site.used_up();
    assert!(used_up >= reconnects, "{used_up} of {reconnects}");
    let log = site.log();
    assert!(log.contains("used for as many records as they may be"), "{log}");
}

/// raio load, whose client changes its key after this number of records.
fn load(site: &Site, records_per_key: u64) -> Output {
    let mut command = load_command();
    command.args([&site.server.url(), "/data/load", "--keys", site.path("client").to_str().expect("UTF-8")]);
    command.args([
        "--sessions",
        "2",
        "--depth",
        "4",
        "--io-size",
        "64k",
        "--size",
        "1m",
        "--pattern",
        "randrw",
    ]);
    command.args(["--rounds", "70", "--fill", "--verify", "--reconnect", "30", "--json"]);
    command.env(FEWER_RECORDS, records_per_key.to_string()).stdin(Stdio::null());
    command.output().expect("raio load runs")
}

#[test]
fn a_session_goes_on_when_its_client_changes_its_key() {
    if no_kernel_tls("a server with --ktls") {
        return;
    }
    let mut site = Site::new(None);
    // More than the longest write takes, which must come over one connection.
    let done = load(&site, 100);
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(0), "{said}");
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).expect("a report");
    let reconnects = report["reconnects"].as_u64().expect("a number");
    assert!(reconnects >= 1, "{report}");
    assert!(site.used_up() >= reconnects);
    let log = site.log();
    assert!(log.contains("used for as many records as they may be"), "{log}");
}

#[test]
fn a_kernel_that_cannot_do_it_keeps_the_server_from_starting() {
    if !no_kernel_tls("a server with --ktls") {
        eprintln!("SKIPPED: a kernel without TLS, for this one has it");
        return;
    }
    let directory = prepared();
    for (arguments, code) in [(&["--listen", "tcp://127.0.0.1:0"][..], 1), (&["--check"], 2)] {
        let done = server_command(&directory).args(arguments).output().expect("raio_server runs");
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(code), "{said}");
        assert!(said.contains("modprobe tls") && said.contains("CONFIG_TLS"), "{said}");
    }
}
