//! A server that is run by calls, and clients of any kind.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use super::*;
use crate::tuning::http::HEAD_BYTES_MAX;

/// A site for tests.
#[derive(Default)]
struct Pages {
    /// What `/later` waits for.
    later: Arc<Mutex<Option<String>>>,
    /// Parts that `/stream` has been asked for.
    parts: Arc<AtomicUsize>,
}

struct WhenThere(Arc<Mutex<Option<String>>>);

impl Later for WhenThere {
    fn poll(&mut self, now: Instant) -> Next<Response> {
        match self.0.lock().unwrap().take() {
            Some(text) => Next::Ready(Response::new(200, "text/plain", text)),
            None => Next::At(now + Duration::from_secs(60)),
        }
    }
}

/// Counts down, then ends.
struct Countdown(usize, Arc<AtomicUsize>);

impl Parts for Countdown {
    fn poll(&mut self, _: Instant) -> Next<Option<String>> {
        self.1.fetch_add(1, Ordering::Relaxed);
        let text = self.0.checked_sub(1).map(|left| format!("{left}\n{}", "-".repeat(5000)));
        self.0 = self.0.saturating_sub(1);
        Next::Ready(text)
    }
}

struct Never;

impl Parts for Never {
    fn poll(&mut self, now: Instant) -> Next<Option<String>> {
        Next::At(now + Duration::from_secs(60))
    }
}

impl Site for Pages {
    fn answer(&self, request: &Request<'_>) -> Answer {
        match request.path {
            "/who" => Answer::Now(Response::new(200, "text/plain", format!("{:?}", request.access))),
            "/later" => Answer::Later(Box::new(WhenThere(Arc::clone(&self.later)))),
            "/stream" => {
                let count = request.parameter("n").and_then(|n| n.parse().ok()).unwrap_or(3);
                Answer::Stream("text/plain", Box::new(Countdown(count, Arc::clone(&self.parts))))
            }
            "/never" => Answer::Stream("text/plain", Box::new(Never)),
            "/large" => Answer::Now(Response::new(200, "text/plain", "x".repeat(20 << 20))),
            _ => Answer::Now(Response::error(404, "There is no \"page\".")),
        }
    }
}

struct Fixture {
    server: Server<Pages>,
    port: u16,
    directory: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let admin = UnixListener::bind(directory.path().join("admin")).unwrap();
        tcp.set_nonblocking(true).unwrap();
        admin.set_nonblocking(true).unwrap();
        let port = tcp.local_addr().unwrap().port();
        let sockets = Sockets {
            tcp: vec![Arc::new(tcp.into())],
            admin: Some(Arc::new(admin.into())),
            users: vec![rustix::process::geteuid().as_raw()],
            names: vec!["store.example".to_owned()],
            token: Some(Token::new("sesame")),
        };
        let server = Server::new(sockets, Pages::default(), Waker::new().unwrap(), Arc::default());
        Self { server, port, directory }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// Runs the server until a client has read this, or the end of the connection. Returns what it has read.
    fn read(&mut self, stream: &mut (impl Read + AsFd), until: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut text = Vec::new();
        let mut bytes = vec![0; 1 << 16];
        loop {
            self.server.waker.wake();
            self.server.run_once();
            loop {
                match stream.read(&mut bytes) {
                    Ok(0) => return String::from_utf8(text).unwrap(),
                    Ok(len) => text.extend_from_slice(&bytes[..len]),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                    Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&text)),
                }
            }
            if !until.is_empty() && String::from_utf8_lossy(&text).contains(until) {
                return String::from_utf8(text).unwrap();
            }
            assert!(Instant::now() < deadline, "{:?}", String::from_utf8_lossy(&text));
        }
    }

    /// What a client is sent for this, until the connection ends.
    fn exchange(&mut self, request: &str) -> String {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        self.read(&mut stream, "")
    }

    fn get(&mut self, path: &str, headers: &str) -> String {
        self.exchange(&format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n"
        ))
    }

    /// Runs the server for iterations that have something to do.
    fn run(&mut self, iterations: usize) {
        for _ in 0..iterations {
            self.server.waker.wake();
            self.server.run_once();
        }
    }
}

#[test]
fn a_request_is_answered_and_the_connection_takes_the_next_one() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.connect();
    for _ in 0..2 {
        stream.write_all(b"GET /who HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let response = fixture.read(&mut stream, "Public");
        assert!(response.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"), "{response}");
        assert!(response.ends_with("Content-Length: 6\r\n\r\nPublic"), "{response}");
        assert!(!response.contains("Connection: close"));
    }
    let response = fixture.get("/x", "");
    assert!(response.starts_with("HTTP/1.1 404 Not Found\r\n") && response.contains("Connection: close\r\n"));
    assert!(response.ends_with("\r\n\r\n{\"error\":\"There is no \\\"page\\\".\"}\n"), "{response}");
}

#[test]
fn pipelined_requests_are_answered_in_order_and_a_half_closed_client_hears_all() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.connect();
    let one = "GET /who HTTP/1.1\r\nHost: localhost\r\n\r\n";
    stream.write_all(format!("{one}{one}GET /x HTTP/1.0\r\n\r\n{one}").as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let responses = fixture.read(&mut stream, "");
    let statuses: Vec<_> = responses.split("HTTP/1.1 ").skip(1).map(|response| &response[..3]).collect();
    assert_eq!(statuses, ["200", "200", "404"], "nothing follows the last one that a client wants");
}

#[test]
fn who_may_have_what_is_told_by_the_token_and_the_socket() {
    let mut fixture = Fixture::new();
    for (header, access) in [
        ("", "Public"),
        ("Authorization: Bearer sesame\r\n", "Private"),
        ("Authorization: bearer  sesame\r\n", "Private"),
        ("Authorization: Bearer sesam\r\n", "Public"),
        ("Authorization: Bearer\r\n", "Public"),
        ("Authorization: Basic sesame\r\n", "Public"),
    ] {
        let response = fixture.get("/who", header);
        assert!(response.ends_with(&format!("\r\n\r\n{access}")), "{header}: {response}");
    }
    let mut admin = UnixStream::connect(fixture.directory.path().join("admin")).unwrap();
    admin.set_nonblocking(true).unwrap();
    admin.write_all(b"GET /who HTTP/1.1\r\nHost: whoever\r\nConnection: close\r\n\r\n").unwrap();
    assert!(fixture.read(&mut admin, "").ends_with("\r\n\r\nAdmin"));
    // Of another user than those that may.
    fixture.server.sockets.users = vec![4_000_000];
    let mut admin = UnixStream::connect(fixture.directory.path().join("admin")).unwrap();
    admin.set_nonblocking(true).unwrap();
    assert_eq!(fixture.read(&mut admin, ""), "");
}

#[test]
fn a_page_of_somebody_else_cannot_make_a_browser_ask() {
    let mut fixture = Fixture::new();
    let mut status = |host: &str| {
        let request = format!("GET /who HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        fixture.exchange(&request)[9..12].to_owned()
    };
    assert_eq!([status("store.example:7241"), status("[::1]")], ["200", "200"]);
    assert_eq!([status("evil.example"), status("")], ["421", "421"]);
}

#[test]
fn what_is_no_request_is_told_so_and_closed() {
    let mut fixture = Fixture::new();
    let long = format!("GET / HTTP/1.1\r\nA: {}", "a".repeat(HEAD_BYTES_MAX));
    for (request, status) in [
        ("\x16\x03\x01\x02\0\x01", "400"),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nA: \0\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\n\r\n", "400"),
        ("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", "413"),
        (&long, "431"),
    ] {
        let response = fixture.exchange(request);
        assert!(response.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {response}");
        assert!(response.contains("\r\n\r\n{\"error\":"), "{response}");
    }
}

#[test]
fn who_says_nothing_or_takes_nothing_is_closed_in_time() {
    let began = Instant::now();
    let after = |seconds| began + Duration::from_secs(seconds);
    let answer = |_: &Head<'_>| Answer::Now(Response::new(200, "text/plain", "x".repeat(1 << 20)));
    let step = |connection: &mut Connection, seconds| connection.step(after(seconds), false, answer).is_ok();
    let (mut client, socket) = UnixStream::pair().unwrap();
    let mut connection = Connection::new(socket.into(), true, began);
    // A byte now and then does not help.
    for second in 0..10 {
        client.write_all(b"G").unwrap();
        assert!(step(&mut connection, second));
    }
    assert!(!step(&mut connection, 10));
    let (mut client, socket) = UnixStream::pair().unwrap();
    let mut connection = Connection::new(socket.into(), true, began);
    client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    assert!(step(&mut connection, 0) && connection.unsent_bytes() > 0);
    assert!(step(&mut connection, 9) && !step(&mut connection, 10));
}

#[test]
fn a_response_that_comes_later_is_sent_when_it_is_there() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.connect();
    stream.write_all(b"GET /later HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    fixture.run(3);
    assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    *fixture.server.site.later.lock().unwrap() = Some("here".to_owned());
    assert!(fixture.read(&mut stream, "here").starts_with("HTTP/1.1 200 "));
    // Nobody waits for it any more.
    stream.write_all(b"GET /later HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    fixture.run(2);
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    drop(stream);
    fixture.run(2);
    assert!(fixture.server.connections.is_empty());
}

#[test]
fn a_stream_comes_in_chunks_and_to_an_old_client_as_it_is() {
    let mut fixture = Fixture::new();
    let response = fixture.get("/stream", "");
    assert!(response.contains("Transfer-Encoding: chunked\r\n"), "{response}");
    let dashes = "-".repeat(5000);
    let chunk = |at: usize| format!("138a\r\n{at}\n{dashes}\r\n");
    assert!(response.ends_with(&format!("\r\n\r\n{}{}{}0\r\n\r\n", chunk(2), chunk(1), chunk(0))));
    let response = fixture.exchange("GET /stream?n=1 HTTP/1.0\r\n\r\n");
    assert!(response.ends_with(&format!("\r\n\r\n0\n{dashes}")) && !response.contains("chunked"));
}

#[test]
fn who_does_not_read_gets_fewer_parts_and_delays_nobody() {
    let mut fixture = Fixture::new();
    let mut slow = fixture.connect();
    slow.write_all(b"GET /stream?n=1000000 HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut large = fixture.connect();
    large.write_all(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let asked = |fixture: &Fixture| fixture.server.site.parts.load(Ordering::Relaxed);
    // Until its socket is full.
    let mut before = usize::MAX;
    while before != asked(&fixture) {
        before = asked(&fixture);
        fixture.run(10);
    }
    assert!(fixture.get("/who", "").ends_with("Public"));
    assert_eq!(asked(&fixture), before);
    let held: usize = fixture.server.connections.iter().map(Connection::unsent_bytes).sum();
    assert!(held < (20 << 20) + 10_000, "one part, and the large response");
}

#[test]
fn the_number_of_connections_and_of_streams_is_limited() {
    let mut fixture = Fixture::new();
    let mut streams = Vec::new();
    for _ in 0..STREAMS_MAX {
        let mut stream = fixture.connect();
        stream.write_all(b"GET /never HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        fixture.read(&mut stream, "chunked");
        streams.push(stream);
    }
    assert!(fixture.get("/never", "").starts_with("HTTP/1.1 503 "));
    let idle: Vec<_> = (0..CONNECTIONS_MAX + 10).map(|_| fixture.connect()).collect();
    fixture.run(2 * idle.len());
    assert_eq!(fixture.server.connections.len(), CONNECTIONS_MAX);
    assert!(fixture.get("/who", "").ends_with("Public"), "the newest has room");
    let mut admin = UnixStream::connect(fixture.directory.path().join("admin")).unwrap();
    admin.set_nonblocking(true).unwrap();
    admin.write_all(b"GET /who HTTP/1.0\r\n\r\n").unwrap();
    assert!(fixture.read(&mut admin, "").ends_with("Admin"));
    drop(streams);
    fixture.run(10);
    assert_eq!(fixture.server.connections.iter().filter(|it| it.is_streaming()).count(), 0);
}

#[test]
fn a_server_that_is_told_to_stop_accepting_goes_on_with_its_connections() {
    let mut fixture = Fixture::new();
    let mut stream = fixture.connect();
    stream.write_all(b"GET /who HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    fixture.read(&mut stream, "Public");
    fixture.server.is_closed.store(true, Ordering::Relaxed);
    fixture.run(1);
    assert!(TcpStream::connect(("127.0.0.1", fixture.port)).is_err());
    stream.write_all(b"GET /who HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    fixture.read(&mut stream, "Public");
}
