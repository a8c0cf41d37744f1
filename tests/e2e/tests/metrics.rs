//! What a server tells over HTTP: metrics that count what was done, to whom it tells what, and how it is.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Operation, Options, Session};
use raio_e2e::{PATIENCE, Server, await_http, binary};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// A server that serves HTTP, over TCP and at its admin socket.
struct Observed {
    server: Server,
    http: String,
    directory: TempDir,
}

impl Observed {
    /// A server with these arguments, a directory `d` and memory `m` among its exports.
    fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("d")).expect("a directory");
        fs::write(path("d/file"), vec![7; 100_000]).expect("a file");
        fs::write(path("token"), format!("{TOKEN}\n")).expect("a file");
        fs::set_permissions(path("token"), fs::Permissions::from_mode(0o600)).expect("it is ours");
        let mut command = Command::new(binary("raio_server"));
        if !arguments.contains(&"--listen") {
            command.args(["--listen", "tcp://127.0.0.1:0"]);
        }
        command
            .args(["--export", "m=mem:1M,rw", "--export"])
            .arg(format!("d={},rw", path("d").display()))
            .arg("--state")
            .arg(path("state"))
            .args(["--http", "127.0.0.1:0", "--http-host", "store.example", "--http-token"])
            .arg(path("token"))
            .arg("--admin")
            .arg(path("admin"))
            .args(arguments)
            .stderr(Stdio::from(File::create(path("log")).expect("a log")));
        if !rustix::process::geteuid().is_root() {
            command.arg("--sandbox=off");
        }
        let server = Server::spawn(command);
        let http = await_http(&path("log"));
        Self { server, http, directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn connect(&self) -> Session {
        Session::connect(&self.server.url(), &Options::default()).expect("a session")
    }

    fn over_tcp(&self) -> Connection<TcpStream> {
        Connection(BufReader::new(TcpStream::connect(&self.http).expect("it listens")))
    }

    fn over_admin_socket(&self) -> Connection<UnixStream> {
        Connection(BufReader::new(UnixStream::connect(self.path("admin")).expect("it listens")))
    }

    fn get(&self, path: &str) -> Response {
        self.over_tcp().get(path, "localhost", "")
    }

    fn metrics(&self) -> Metrics {
        let response = self.get("/metrics");
        assert_eq!(response.status, 200);
        assert!(response.head.contains("content-type: text/plain; version=0.0.4"), "{}", response.head);
        Metrics::parse(&response.body)
    }

    fn stats(&self) -> Value {
        serde_json::from_str(&self.get("/stats").body).expect("JSON")
    }
}

struct Response {
    status: u16,
    /// In small letters.
    head: String,
    body: String,
}

/// A connection of HTTP that is kept.
struct Connection<S>(BufReader<S>);

impl<S: Read + Write> Connection<S> {
    fn request(&mut self, method: &str, path: &str, host: &str, headers: &str) {
        let request = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n");
        self.0.get_mut().write_all(request.as_bytes()).expect("the server takes it");
    }

    fn head(&mut self) -> (u16, String) {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(self.0.read_line(&mut head).expect("a line") > 0, "the end after {head:?}");
        }
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).expect("a status");
        (status, head.to_ascii_lowercase())
    }

    fn get(&mut self, path: &str, host: &str, headers: &str) -> Response {
        self.request("GET", path, host, headers);
        self.response()
    }

    fn response(&mut self) -> Response {
        let (status, head) = self.head();
        let len = head.split("content-length: ").nth(1).and_then(|rest| rest.split('\r').next());
        let mut body = vec![0; len.and_then(|len| len.parse().ok()).expect("a length")];
        self.0.read_exact(&mut body).expect("a body");
        Response { status, head, body: String::from_utf8(body).expect("text") }
    }
}

/// Samples by name and labels, as they are written.
struct Metrics(HashMap<String, f64>);

impl Metrics {
    fn parse(text: &str) -> Self {
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        Self(
            samples
                .map(|line| {
                    let (name, value) = line.rsplit_once(' ').expect("a sample");
                    (name.to_owned(), value.parse().expect("a number"))
                })
                .collect(),
        )
    }

    fn get(&self, name: &str) -> f64 {
        *self.0.get(name).unwrap_or_else(|| panic!("{name} is not there"))
    }
}

/// Reads or writes `bytes` bytes at a time, `times` times.
fn work(session: &Session, path: &str, is_write: bool, times: usize, bytes: usize) {
    let file = session.open(path, libc::O_RDWR, 0).expect("a file");
    let mut context = session.context(1).expect("a context");
    for _ in 0..times {
        let buffers = Buffers::One(Buffer::Owned(vec![7; bytes].into()));
        let operation = if is_write {
            Operation::Write { offset: 0, buffers }
        } else {
            Operation::Read { offset: 0, buffers }
        };
        context.submit(&file, operation, 0).expect("there is room");
        context.wait(1, 1, Some(PATIENCE)).expect("the server lives");
        context.next().expect("it ends in time").result.expect("success");
    }
}

/// Has promtool check the metrics, as far as that is there.
fn check(metrics: &str) {
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut promtool = match promtool {
        Ok(promtool) => promtool,
        Err(error) => return eprintln!("SKIPPED: promtool (Debian package prometheus): {error}"),
    };
    promtool.stdin.take().expect("it is piped").write_all(metrics.as_bytes()).expect("it reads");
    let output = promtool.wait_with_output().expect("it ends");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
}

#[test]
fn metrics_count_what_was_done() {
    let observed = Observed::start(&["--max-sessions", "321"]);
    let session = observed.connect();
    work(&session, "/m", true, 40, 4096);
    work(&session, "/d/file", false, 50, 1000);
    let error = session.open("/d/none", libc::O_RDONLY, 0).expect_err("it is not there");
    assert_eq!(error.errno(), libc::ENOENT);
    let response = observed.get("/metrics");
    check(&response.body);
    let metrics = Metrics::parse(&response.body);
    for (name, value) in [
        ("raio_requests_total{op=\"write\",export=\"m\"}", 40.0),
        ("raio_requests_total{op=\"read\",export=\"m\"}", 0.0),
        ("raio_requests_total{op=\"read\",export=\"d\"}", 50.0),
        ("raio_requests_total{op=\"open\",export=\"d\"}", 2.0),
        ("raio_written_bytes_total{export=\"m\"}", 40.0 * 4096.0),
        ("raio_written_bytes_total{export=\"d\"}", 0.0),
        ("raio_read_bytes_total{export=\"d\"}", 50_000.0),
        ("raio_request_errors_total{op=\"open\",errno=\"ENOENT\"}", 1.0),
        ("raio_sessions", 1.0),
        ("raio_sessions_max", 321.0),
        ("raio_config_generation", 1.0),
        ("raio_config_last_reload_success", 1.0),
        ("raio_connection_closes_total{reason=\"stalled\"}", 0.0),
        ("raio_worker_stuck{worker=\"0\"}", 0.0),
        ("raio_lane_jobs{export=\"d\",lane=\"open\",state=\"waiting\"}", 0.0),
        ("raio_lane_oldest_seconds{export=\"m\",lane=\"data\"}", 0.0),
    ] {
        assert_eq!(metrics.get(name), value, "{name}");
    }
    // One write in 16 is measured, by each worker.
    let measured = metrics.get("raio_request_seconds_count{op=\"write\",export=\"m\"}");
    assert!((2.0..=3.0).contains(&measured), "{measured}");
    assert_eq!(metrics.get("raio_request_seconds_bucket{op=\"write\",export=\"m\",le=\"+Inf\"}"), measured);
    assert!(metrics.get("raio_request_seconds_sum{op=\"write\",export=\"m\"}") > 0.0);
    let busy = metrics.get("raio_worker_seconds_total{worker=\"0\",mode=\"busy\"}");
    let idle = metrics.get("raio_worker_seconds_total{worker=\"0\",mode=\"idle\"}");
    assert!(busy > 0.0 && idle > 0.0, "{busy} {idle}");
    let uptime = observed.stats()["uptime_seconds"].as_u64().expect("a number") as f64;
    assert!(busy + idle <= uptime + 10.0, "{busy} + {idle} in {uptime} s");

    // What the statistics say is the same, by a signal or by HTTP.
    let mut observed = observed;
    let (by_http, by_signal) = (observed.stats(), observed.server.statistics());
    for pointer in ["/exports/m", "/requests", "/phase", "/config_generation", "/clients", "/closes"] {
        assert_eq!(by_http.pointer(pointer), by_signal.pointer(pointer), "{pointer}");
    }
    assert_eq!(by_http["exports"]["m"]["latency_us"]["write"]["count"].as_f64(), Some(measured));
    assert!(by_http["per_worker"][0]["idle_us"].as_u64() > Some(0));
    for disk in by_http["disks"].as_array().expect("disks") {
        assert_eq!(disk["exports"], serde_json::json!(["d"]));
    }
}

#[test]
fn a_scrape_does_not_grow_with_sessions() {
    let observed = Observed::start(&[]);
    let first = observed.connect();
    work(&first, "/m", true, 1, 4096);
    let names = |metrics: &Metrics| {
        let mut names: Vec<_> = metrics.0.keys().cloned().collect();
        names.sort();
        names
    };
    // The close is the last of what it does, and counts when it is answered.
    let closes = "raio_request_seconds_count{op=\"close\",export=\"\"}";
    let deadline = Instant::now() + PATIENCE;
    while !observed.metrics().0.contains_key(closes) {
        assert!(Instant::now() < deadline, "there is no close");
        std::thread::sleep(Duration::from_millis(10));
    }
    let before = observed.metrics();
    let sessions: Vec<_> = (0..200).map(|_| observed.connect()).collect();
    let after = observed.metrics();
    assert_eq!((before.get("raio_sessions"), after.get("raio_sessions")), (1.0, 201.0));
    assert_eq!(names(&before), names(&after));
    drop(sessions);
}

#[test]
fn clients_are_counted_by_their_names() {
    let directory = tempfile::tempdir().expect("a directory");
    let keys = directory.path().join("keys");
    fs::create_dir(&keys).expect("a directory");
    let me = rustix::process::geteuid().as_raw();
    let clients = format!("[client.\"the one\"]\nusers = [{me}]\nexports = {{ d = 'rw', m = 'rw' }}\n");
    fs::write(keys.join("clients.toml"), clients).expect("a file");
    let listen = format!("unix://{}", directory.path().join("socket").display());
    let observed = Observed::start(&["--listen", &listen, "--keys", keys.to_str().expect("text")]);
    let session = observed.connect();
    work(&session, "/m", true, 3, 4096);
    work(&session, "/d/file", false, 5, 1000);
    let expected = serde_json::json!({ "sessions": 1, "read_bytes": 5000, "written_bytes": 3 * 4096 });
    let stats = observed.stats();
    let mut client = stats["clients"]["the one"].clone();
    let requests = client.as_object_mut().and_then(|client| client.remove("requests"));
    assert_eq!(client, expected, "{stats}");
    let metrics = observed.metrics();
    // Opens and closes count, too, and the last close may have come in between.
    let requests = requests.and_then(|it| it.as_f64()).expect("a number");
    let later = metrics.get("raio_client_requests_total{client=\"the one\"}");
    assert!(10.0 <= requests && requests <= later && later < 20.0, "{requests} {later}");
    assert_eq!(metrics.get("raio_client_written_bytes_total{client=\"the one\"}"), 3.0 * 4096.0);
    drop(session);
    let deadline = Instant::now() + PATIENCE;
    while observed.stats()["clients"]["the one"]["sessions"] != 0 {
        assert!(Instant::now() < deadline, "its session stays");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn who_may_ask_for_what_is_told_by_name_token_and_socket() {
    let observed = Observed::start(&[]);
    let mut connection = observed.over_tcp();
    for (host, status) in [("store.example:80", 200), ("127.0.0.1", 200), ("evil.example", 421)] {
        assert_eq!(connection.get("/healthz", host, "").status, status, "{host}");
    }
    let page = connection.get("/", "localhost", "");
    assert!(page.status == 200 && page.head.contains("content-security-policy: default-src 'none'"));
    assert_eq!(connection.get("/none", "localhost", "").status, 404);
    connection.request("DELETE", "/metrics", "localhost", "");
    let response = connection.response();
    assert!(response.status == 405 && response.head.contains("allow: get"), "{}", response.head);
    assert!(response.body.starts_with("{\"error\":\""), "{}", response.body);
    assert_eq!(observed.over_admin_socket().get("/metrics", "anything", "").status, 200);

    let mut events = observed.over_tcp();
    events.request("GET", "/events", "localhost", "");
    assert!(events.head().1.contains("content-type: text/event-stream"));
    let mut line = String::new();
    for _ in 0..2 {
        while !line.starts_with("data: ") {
            line.clear();
            events.0.read_line(&mut line).expect("a line");
        }
        let event: Value = serde_json::from_str(&line["data: ".len()..]).expect("JSON");
        assert_eq!(event["phase"], "serving");
        line.clear();
    }
}

#[test]
fn a_server_that_drains_is_healthy_and_not_ready() {
    let mut observed = Observed::start(&[]);
    let mut connection = observed.over_tcp();
    let mut get = |path: &str| connection.get(path, "localhost", "");
    assert_eq!((get("/healthz").body.as_str(), get("/readyz").body.as_str()), ("ok\n", "ok\n"));
    // Its handshake is waited for.
    let _silent = TcpStream::connect(observed.server.address()).expect("it listens");
    observed.server.signal(Signal::TERM);
    let deadline = Instant::now() + PATIENCE;
    let reason = loop {
        let response = get("/readyz");
        if response.status == 503 {
            break response.body;
        }
        assert!(Instant::now() < deadline, "it stays ready");
    };
    assert!(reason.contains("completes the requests in flight"), "{reason}");
    assert_eq!(get("/healthz").status, 200);
    assert!(observed.server.wait().success());
}

#[test]
fn a_successor_serves_at_the_same_sockets() {
    let directory = tempfile::tempdir().expect("a directory");
    let place = directory.path().join("place").display().to_string();
    let state = directory.path().join("state").display().to_string();
    let admin = directory.path().join("admin").display().to_string();
    let start = |log: &str, port: &str| {
        let log = directory.path().join(log);
        let http = format!("127.0.0.1:{port}");
        let mut command = Command::new(binary("raio_server"));
        command
            .args(["--listen", "tcp://127.0.0.1:0", "--export", "m=mem:1M,rw", "--hand-over", &place])
            .args(["--state", &state, "--http", &http, "--admin", &admin])
            .stderr(Stdio::from(File::create(&log).expect("a log")));
        if !rustix::process::geteuid().is_root() {
            command.arg("--sandbox=off");
        }
        let server = Server::spawn(command);
        let http = await_http(&log);
        (server, http.strip_prefix("127.0.0.1:").expect("a port").to_owned())
    };
    let (mut old, port) = start("old", "0");
    let (new, same) = start("new", &port);
    assert_eq!(port, same);
    assert!(old.wait().success());
    let tcp = TcpStream::connect(format!("127.0.0.1:{port}")).expect("it listens");
    assert_eq!(Connection(BufReader::new(tcp)).get("/readyz", "localhost", "").status, 200);
    let unix = UnixStream::connect(&admin).expect("it listens");
    assert_eq!(Connection(BufReader::new(unix)).get("/readyz", "localhost", "").status, 200);
    drop(new);
}
