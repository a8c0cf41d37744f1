//! The audit log: what is in it, and what happens when it cannot be written.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Context, Error, File, Keys, Operation, Options, PutOptions, Session};
use raio_e2e::{
    Client, Ending, FuseCall, FuseFs, FuseOptions, LoopDevice, PATIENCE, Proxy, Server, carry_out,
    needs_root, pin,
};
use raio_transport::keys::{PublicKey, SecretKey};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

/// A server of one client, with an audit log.
struct Site {
    directory: TempDir,
    key: PublicKey,
    server: Server,
}

impl Site {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        for name in ["data", "keys", "client", "log"] {
            fs::create_dir(at(name)).expect("a directory");
        }
        fs::write(at("data/file"), b"0123456789").expect("a file");
        let key = SecretKey::create(&at("client/key")).expect("a key").public();
        let entry = format!("[client.one]\nkeys = ['{key}']\nexports = {{ data = 'rw', none = 'ro' }}\n");
        fs::write(at("keys/clients.toml"), entry).expect("a file");
        let export = format!("data={},rw", at("data").display());
        let [keys, log] = ["keys", "log/audit"].map(|name| at(name).display().to_string());
        let arguments = ["--listen", "tcp://127.0.0.1:0", "--keys", &keys, "--audit", &log];
        let server = Server::start_with(&[&export, "none=null:1M"], &arguments);
        Self { directory, key, server }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Connects with the keys in this directory.
    fn connect(&self, keys: &Path) -> Result<Session, Error> {
        let host = SecretKey::load(&self.path("keys/host.key")).expect("the server has made it").public();
        pin(keys, self.server.address(), host);
        let options = Options { keys: Keys::Directory(keys.to_owned()), ..Options::default() };
        Session::connect(&self.server.url(), &options)
    }
}

/// The records of a log. The last may be written in part, on a disk that is full.
fn records(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let written = text.rfind('\n').map_or("", |end| &text[..end]);
    written.lines().map(|line| serde_json::from_str(line).expect("a line is a JSON object")).collect()
}

/// The same, once it has a record like this.
fn records_when(path: &Path, is_there: impl Fn(&Value) -> bool) -> Vec<Value> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let records = records(path);
        if records.iter().any(&is_there) {
            return records;
        }
        assert!(Instant::now() < deadline, "{records:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn work(context: &mut Context, file: &File, operation: Operation) {
    let completion = carry_out(context, file, operation).expect("it is begun");
    assert!(completion.result.is_ok(), "{:?}", completion.result);
}

fn bytes(len: usize) -> Buffers {
    Buffers::One(Buffer::Owned(vec![b'x'; len].into()))
}

#[test]
fn who_connects_opens_and_leaves_is_recorded_and_how_much_was_moved() {
    let site = Site::new();
    let session = site.connect(&site.path("client")).expect("a session");
    let file = session.open("/data/file", libc::O_RDWR, 0).expect("a file");
    assert!(session.open("/data/missing", libc::O_RDONLY, 0).is_err());
    assert!(session.open("/none", libc::O_RDWR, 0).is_err());
    let ready = session.open("/none", libc::O_RDONLY, 0).expect("a file");
    let mut context = session.context(4).expect("a context");
    work(&mut context, &file, Operation::Write { offset: 0, buffers: bytes(7) });
    work(&mut context, &file, Operation::Read { offset: 0, buffers: bytes(4) });
    work(&mut context, &file, Operation::Read { offset: 4, buffers: bytes(2) });
    file.close().expect("it is closed");
    drop((file, ready, context, session));
    let log = site.path("log/audit");
    let records = records_when(&log, |record| record["event"] == "end");
    let of = |event: &str| records.iter().filter(|it| it["event"] == event).collect::<Vec<_>>();
    let opens: Vec<_> = of("open")
        .iter()
        .map(|it| {
            (it["path"].as_str().unwrap(), it["access"].as_str().unwrap(), it["errno"].as_i64().unwrap())
        })
        .collect();
    let expected = [
        ("/data/file", "rw", 0),
        ("/data/missing", "r", libc::ENOENT.into()),
        ("/none", "rw", libc::EROFS.into()),
        ("/none", "r", 0),
    ];
    assert_eq!(opens, expected);
    let closed = of("close");
    let closed: Vec<_> =
        closed.iter().map(|it| (&it["path"], &it["read_bytes"], &it["written_bytes"])).collect();
    assert_eq!(closed.len(), 2);
    assert_eq!(closed[0], (&"/data/file".into(), &6.into(), &7.into()));
    assert_eq!((of("connect").len(), of("disconnect").len(), of("end").len()), (2, 2, 1));
    let hashed = of("connect")[0]["session"].clone();
    assert_eq!(hashed.as_str().map(str::len), Some(8));
    for record in &records {
        assert_eq!(record["client"], "one", "{record}");
        assert_eq!(record["key"].as_str(), Some(site.key.to_string().as_str()), "{record}");
        assert_eq!(record["session"], hashed, "{record}");
        assert!(record["time"].as_str().is_some_and(|time| time.ends_with('Z')), "{record}");
    }
    let is_there = |it: &&&Value| it["address"].as_str().is_some_and(|it| it.starts_with("127.0.0.1:"));
    assert_eq!(records.iter().filter(|it| is_there(&it)).count(), records.len() - 1, "all but the end");
}

/// The open ends while its client has no connection, and belongs to the next one.
#[test]
fn an_open_whose_connection_breaks_is_recorded_with_all_that_is_done_to_the_file() {
    let options = FuseOptions::default();
    let Some(fuse) = FuseFs::mount("an open that takes long", options, &[("file", b"0123456789")]) else {
        return;
    };
    let client = Client::new();
    let logs = tempfile::tempdir().expect("a directory");
    let log = logs.path().join("audit");
    let arguments = ["--audit", log.to_str().expect("UTF-8")];
    let entry = client.entry("one", "exports = { data = 'rw' }");
    let mut site = raio_e2e::Site::open_to_users(&entry, fuse.path(), &arguments, None);
    let proxy = Proxy::start(site.server.address());
    pin(client.keys.path(), proxy.address(), site.host_key());
    let options = Options { keys: Keys::Directory(client.keys.path().to_owned()), ..Options::default() };
    let session = Session::connect(&proxy.url(), &options).expect("a session");
    fuse.hang(FuseCall::Open);
    let file = std::thread::scope(|scope| {
        let opening = scope.spawn(|| session.open("/data/file", libc::O_RDWR, 0));
        fuse.wait_for_hanging(FuseCall::Open, 1);
        proxy.end_all(Ending::Reset);
        site.server.statistics_when(|statistics| statistics["channels"]["orphaned_requests"] == 1);
        fuse.mend(FuseCall::Open);
        opening.join().expect("it has not failed").expect("a file")
    });
    let mut context = session.context(4).expect("a context");
    work(&mut context, &file, Operation::Write { offset: 0, buffers: bytes(7) });
    file.close().expect("it is closed");
    drop((file, context, session));
    let records = records_when(&log, |record| record["event"] == "end");
    let of = |event: &str| records.iter().filter(|it| it["event"] == event).collect::<Vec<_>>();
    let [open, close] = ["open", "close"].map(of);
    assert_eq!((open.len(), close.len()), (1, 1), "{records:?}");
    assert_eq!((&open[0]["path"], &open[0]["errno"]), (&"/data/file".into(), &0.into()));
    assert_eq!((&close[0]["path"], &close[0]["written_bytes"]), (&"/data/file".into(), &7.into()));
}

#[test]
fn who_is_not_let_in_is_recorded() {
    let site = Site::new();
    let stranger = tempfile::tempdir().expect("a directory");
    SecretKey::create(&stranger.path().join("key")).expect("a key");
    assert!(site.connect(stranger.path()).is_err());
    let log = site.path("log/audit");
    let records = records_when(&log, |record| record["event"] == "reject");
    assert_eq!(records.len(), 1);
    assert_eq!(records[0]["errno"], libc::EKEYREJECTED);
    assert!(records[0]["address"].as_str().is_some_and(|it| it.starts_with("127.0.0.1:")), "{}", records[0]);
}

#[test]
fn a_log_that_was_moved_away_is_begun_anew_at_sighup() {
    let mut site = Site::new();
    let [log, moved] = ["log/audit", "log/audit.1"].map(|name| site.path(name));
    drop(site.connect(&site.path("client")).expect("a session"));
    records_when(&log, |record| record["event"] == "end");
    fs::rename(&log, &moved).expect("it is ours");
    site.server.signal(Signal::HUP);
    let deadline = Instant::now() + PATIENCE;
    while !log.exists() {
        assert!(Instant::now() < deadline, "it is not begun anew");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(site.connect(&site.path("client")).expect("a session"));
    records_when(&log, |record| record["event"] == "end");
    assert_eq!(records(&moved).iter().filter(|it| it["event"] == "end").count(), 1);
    let counts = site.server.statistics()["audit"].clone();
    assert_eq!(counts["lost"], 0);
    assert_eq!(counts["written"], records(&log).len() + records(&moved).len());
}

/// A server without keys whose log is on a disk of this size that is full.
fn with_full_disk(when_full: &str) -> (Server, raio_e2e::Mounted) {
    let disk = LoopDevice::new(16 << 20).mount("ext4");
    fs::write(disk.path().join("data"), b"0123456789").expect("a file");
    let export = format!("data={}", disk.path().join("data").display());
    let log = disk.path().join("audit").display().to_string();
    let full = format!("--audit-full={when_full}");
    let server = Server::start_with(&[&export], &["--listen", "tcp://127.0.0.1:0", "--audit", &log, &full]);
    let filler = fs::File::create(disk.path().join("filler")).expect("a file");
    let mut chunk = vec![0_u8; 1 << 20];
    while !chunk.is_empty() {
        match std::io::Write::write(&mut &filler, &chunk) {
            Ok(n @ 1..) => chunk.truncate(chunk.len().min(n.next_power_of_two())),
            _ => chunk.truncate(chunk.len() / 2),
        }
    }
    (server, disk)
}

/// Opens and closes the file so often. Returns how many opens there were until one took too long.
fn open_often(session: &Session, count: usize) -> usize {
    (0..count)
        .take_while(|_| session.open("/data", libc::O_RDONLY, 0).is_ok_and(|file| file.close().is_ok()))
        .count()
}

#[test]
fn records_that_a_full_disk_does_not_take_are_counted_and_nobody_waits() {
    if !needs_root("a disk of its own") {
        return;
    }
    let (mut server, disk) = with_full_disk("lose");
    let session = Session::connect(&server.url(), &Options::default()).expect("a session");
    assert_eq!(open_often(&session, 6_000), 6_000);
    let lost = server.statistics()["audit"]["lost"].as_u64().expect("a number");
    assert!(lost > 0, "12,000 records fitted");
    fs::remove_file(disk.path().join("filler")).expect("it is ours");
    let records = records_when(&disk.path().join("audit"), |record| {
        record["event"] == "lost" && record["records"].as_u64() >= Some(lost)
    });
    assert_eq!(records.iter().filter(|it| it["event"] == "lost").count(), 1);
    assert_eq!(open_often(&session, 1), 1);
}

#[test]
fn opens_wait_for_a_log_that_must_have_them() {
    if !needs_root("a disk of its own") {
        return;
    }
    let (mut server, disk) = with_full_disk("wait");
    let patient = Options { call_timeout: Duration::from_secs(2), ..Options::default() };
    let session = Session::connect(&server.url(), &patient).expect("a session");
    let opens = open_often(&session, 6_000);
    assert!((1000..6_000).contains(&opens), "{opens} opens");
    let statistics = server.statistics();
    assert_eq!(statistics["audit"]["lost"], 0);
    assert!(statistics["waits"]["audit"].as_u64() > Some(0));
    // Others are served meanwhile, but for opens.
    let other = Session::connect(&server.url(), &Options::default()).expect("a session");
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| open_often(&other, 1));
        std::thread::sleep(Duration::from_millis(200));
        assert!(!waits.is_finished(), "it does not wait");
        fs::remove_file(disk.path().join("filler")).expect("it is ours");
        assert_eq!(waits.join().expect("it does not panic"), 1);
    });
    let log = disk.path().join("audit");
    records_when(&log, |record| record["event"] == "close");
    assert!(records(&log).iter().all(|it| it["event"] != "lost"));
}

#[test]
fn what_is_done_to_names_is_recorded_and_how_it_ended() {
    let site = Site::new();
    let session = site.connect(&site.path("client")).expect("a session");
    session.put("/data/new", b"12345", &PutOptions::default()).expect("there is room");
    assert_eq!(session.get("/data/new", 100).expect("a file").0.len(), 5);
    // By the worker, and by a thread.
    assert_eq!(session.get("/data/new", 3).expect("a file").0.len(), 3);
    assert!(session.get("/data/missing", 100).is_err());
    session.rename("/data/new", "/data/renamed").expect("it is there");
    assert!(session.rename("/data/new", "/data/renamed").is_err());
    assert!(session.put("/none/x", b"", &PutOptions::default()).is_err());
    session.symlink("../target", "/data/link").expect("it is new");
    session.remove_file("/data/link").expect("it is there");
    assert_eq!(session.read_dir("/data").expect("a list").count(), 2);
    session.metadata("/data/renamed").expect("it is there");
    drop(session);
    let records = records_when(&site.path("log/audit"), |record| record["event"] == "end");
    let operations: Vec<_> = records
        .iter()
        .filter(|record| record["event"] == "operation")
        .map(|it| {
            let text = |key: &str| it[key].as_str().map(str::to_owned);
            let number = |key: &str| it[key].as_i64();
            (text("operation").unwrap(), text("path").unwrap(), text("to"), number("bytes"), number("errno"))
        })
        .collect();
    let of = |operation: &str, path: &str, to: Option<&str>, bytes: Option<i64>, errno: i32| {
        (operation.to_owned(), path.to_owned(), to.map(str::to_owned), bytes, Some(i64::from(errno)))
    };
    let expected = [
        of("put", "/data/new", None, Some(5), 0),
        of("get", "/data/new", None, Some(5), 0),
        of("get", "/data/new", None, Some(3), 0),
        of("get", "/data/missing", None, None, libc::ENOENT),
        of("rename", "/data/new", Some("/data/renamed"), None, 0),
        of("rename", "/data/new", Some("/data/renamed"), None, libc::ENOENT),
        of("put", "/none/x", None, None, libc::EROFS),
        of("symlink", "/data/link", Some("../target"), None, 0),
        of("unlink", "/data/link", None, None, 0),
        of("list", "/data", None, None, 0),
    ];
    assert_eq!(operations, expected);
    assert!(records.iter().all(|record| record["client"] == "one"));
}
