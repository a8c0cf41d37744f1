//! A client of a server's admin socket (`raio_server --admin PATH`): HTTP/1.1 over a Unix socket, one request
//! a connection.
//!
//! The server is the operator's own, but what it sends is bounded all the same: in time, and in bytes.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::failure::{Failure, Kind};
use crate::tuning::admin::{ANSWER_BYTES_MAX, HEAD_BYTES_MAX, TIMEOUT};

/// A server that is reached by its admin socket.
#[derive(Debug)]
pub struct Admin {
    path: PathBuf,
    timeout: Duration,
    /// For the next request.
    stream: Option<UnixStream>,
}

/// How a body is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Length {
    /// By its length.
    Exact(u64),
    /// In chunks, each with its length.
    Chunked,
    /// By the end of the connection.
    ToEnd,
}

/// The head of an answer.
#[derive(Debug)]
struct Head {
    status: u16,
    length: Length,
}

/// Reads until a time at most.
#[derive(Debug)]
struct Timed {
    stream: UnixStream,
    deadline: Instant,
}

impl Read for Timed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(into)
    }
}

impl Admin {
    /// Connects to the socket at this path.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, Failure> {
        let path = path.as_ref().to_owned();
        let stream = Some(open(&path)?);
        Ok(Self { path, timeout: TIMEOUT, stream })
    }

    /// The same, with another time that each request may take.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// What is at a path of the server, as in docs/man/raio_server.8.
    pub fn get(&mut self, path: &str) -> Result<Value, Failure> {
        self.get_text(path).and_then(|text| parse(&text))
    }

    /// The same as the server has written it.
    pub fn get_text(&mut self, path: &str) -> Result<String, Failure> {
        self.ask("GET", path)
    }

    /// Has the server do something. Returns what it answers.
    pub fn post(&mut self, path: &str) -> Result<Value, Failure> {
        self.ask("POST", path).and_then(|text| parse(&text))
    }

    fn ask(&mut self, method: &str, path: &str) -> Result<String, Failure> {
        let stream = match self.stream.take() {
            Some(stream) => stream,
            None => open(&self.path)?,
        };
        let (status, body) =
            exchange(stream, method, path, self.timeout).map_err(|error| self.failed(&error))?;
        let body = String::from_utf8(body).map_err(|_| self.failed(&malformed("text that is not UTF-8")))?;
        if (200..300).contains(&status) { Ok(body) } else { Err(rejected(status, &body)) }
    }

    fn failed(&self, error: &io::Error) -> Failure {
        let path = self.path.display();
        match error.kind() {
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Failure::of(
                Kind::Unreachable,
                format!(
                    "The server at {path} has not answered within {:?}. Look whether it runs (`systemctl \
                     status raio_server`), and at its log.",
                    self.timeout
                ),
            ),
            ErrorKind::InvalidData => Failure::new(format!(
                "What is at {path} does not speak as raio_server does: {error}. Name the socket of --admin."
            )),
            _ => Failure::of(
                Kind::Unreachable,
                format!(
                    "The server at {path} has broken off: {error}. It may have ended, or not let this user \
                     in: be root, or the server's user."
                ),
            ),
        }
    }
}

/// Connects, or says what to do.
fn open(path: &Path) -> Result<UnixStream, Failure> {
    UnixStream::connect(path).map_err(|error| {
        let shown = path.display();
        match error.kind() {
            ErrorKind::NotFound => Failure::of(
                Kind::NotFound,
                format!(
                    "There is no admin socket {shown}. Start raio_server with --admin PATH, and name the \
                     same PATH here with --socket or in RAIO_ADMIN."
                ),
            ),
            ErrorKind::ConnectionRefused => Failure::of(
                Kind::Unreachable,
                format!("No server listens at {shown}: the one that made it has ended. Start raio_server."),
            ),
            ErrorKind::PermissionDenied => Failure::of(
                Kind::Refused,
                format!("This user may not use the admin socket {shown}. Be root, or the server's user."),
            ),
            _ => Failure::io(format!("Cannot connect to the admin socket {shown}"), &error),
        }
    })
}

/// Sends a request and receives its answer: the status and the body.
fn exchange(
    mut stream: UnixStream,
    method: &str,
    path: &str,
    timeout: Duration,
) -> io::Result<(u16, Vec<u8>)> {
    stream.set_write_timeout(Some(timeout))?;
    let length = if method == "POST" { "Content-Length: 0\r\n" } else { "" };
    let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut from = BufReader::new(Timed { stream, deadline: Instant::now() + timeout });
    let head = read_head(&mut from)?;
    let body = read_body(&mut from, head.length)?;
    Ok((head.status, body))
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("it has sent {what}"))
}

/// Reads a line without its end; at most so many bytes, which are taken from what is left.
fn read_line(from: &mut impl BufRead, left: &mut usize) -> io::Result<String> {
    let mut line = Vec::new();
    from.by_ref().take(*left as u64 + 1).read_until(b'\n', &mut line)?;
    if line.len() > *left {
        return Err(malformed("a head that is too long"));
    }
    *left -= line.len();
    if line.pop() != Some(b'\n') {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    line.pop_if(|last| *last == b'\r');
    String::from_utf8(line).map_err(|_| malformed("a head that is not UTF-8"))
}

fn read_head(from: &mut impl BufRead) -> io::Result<Head> {
    let mut left = HEAD_BYTES_MAX;
    let first = read_line(from, &mut left)?;
    let status = first.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok());
    let status = status.ok_or_else(|| malformed("no status of HTTP"))?;
    let mut length = Length::ToEnd;
    loop {
        let line = read_line(from, &mut left)?;
        if line.is_empty() {
            return Ok(Head { status, length });
        }
        let (name, value) = line.split_once(':').ok_or_else(|| malformed("a header without a colon"))?;
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            let bytes = value.parse().map_err(|_| malformed("a length that is no number"))?;
            length = Length::Exact(bytes);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            if !value.eq_ignore_ascii_case("chunked") {
                return Err(malformed("an unknown transfer encoding"));
            }
            length = Length::Chunked;
        }
    }
}

fn read_body(from: &mut impl BufRead, length: Length) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    match length {
        Length::Exact(bytes) => read_exactly(from, bytes, &mut body)?,
        Length::ToEnd => {
            from.by_ref().take(ANSWER_BYTES_MAX + 1).read_to_end(&mut body)?;
            check_size(body.len() as u64)?;
        }
        Length::Chunked => loop {
            let mut left = HEAD_BYTES_MAX;
            let line = read_line(from, &mut left)?;
            let digits = line.split(';').next().unwrap_or_default().trim();
            let bytes = u64::from_str_radix(digits, 16).map_err(|_| malformed("a chunk without a length"))?;
            if bytes == 0 {
                // Trailers say nothing that matters here.
                while !read_line(from, &mut left)?.is_empty() {}
                break;
            }
            read_exactly(from, bytes, &mut body)?;
            if !read_line(from, &mut left)?.is_empty() {
                return Err(malformed("a chunk that is longer than it says"));
            }
        },
    }
    Ok(body)
}

/// Appends as many bytes as were announced.
fn read_exactly(from: &mut impl BufRead, bytes: u64, body: &mut Vec<u8>) -> io::Result<()> {
    check_size((body.len() as u64).saturating_add(bytes))?;
    let read = from.by_ref().take(bytes).read_to_end(body)?;
    if read as u64 == bytes { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

fn check_size(bytes: u64) -> io::Result<()> {
    if bytes > ANSWER_BYTES_MAX { Err(malformed("an answer that is too long")) } else { Ok(()) }
}

fn parse(text: &str) -> Result<Value, Failure> {
    serde_json::from_str(text)
        .map_err(|error| Failure::new(format!("The server's answer is no JSON ({error}).")))
}

/// What a status other than a success means. The server says what to do.
fn rejected(status: u16, body: &str) -> Failure {
    let kind = match status {
        401 | 403 => Kind::Refused,
        404 => Kind::NotFound,
        408 | 429 | 503 | 504 => Kind::Unreachable,
        _ => Kind::Other,
    };
    let error = serde_json::from_str::<Value>(body).ok();
    let text = error.as_ref().and_then(|error| error.get("error")?.as_str());
    Failure::of(kind, text.map_or_else(|| format!("The server has answered with {status}."), str::to_owned))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    use super::*;

    /// A server that sends this to whoever connects, and returns what it was asked.
    fn serve(answer: &'static [u8]) -> (tempfile::TempDir, PathBuf, JoinHandle<String>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("admin");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                asked.push(byte[0]);
            }
            // The client may have seen enough.
            let _ = stream.write_all(answer);
            String::from_utf8(asked).unwrap()
        });
        (directory, path, thread)
    }

    fn get(answer: &'static [u8]) -> Result<Value, Failure> {
        let (_directory, path, thread) = serve(answer);
        let got = Admin::connect(&path)?.with_timeout(Duration::from_secs(5)).get("/stats?x=1");
        let asked = thread.join().unwrap();
        assert!(asked.starts_with("GET /stats?x=1 HTTP/1.1\r\nHost: localhost\r\n"), "{asked}");
        got
    }

    #[test]
    fn an_answer_is_read_however_its_length_is_told() {
        for answer in [
            &b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\ncontent-length: 7\r\n\r\n{\"a\":1}"[..],
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{\"a\r\n4;x=y\r\n\":1}\r\n0\r\n\r\n",
            b"HTTP/1.0 200 OK\r\n\r\n{\"a\":1}",
        ] {
            assert_eq!(get(answer).unwrap()["a"], 1);
        }
    }

    #[test]
    fn what_the_server_rejects_is_its_own_sentence_and_the_exit_code_tells_the_kind() {
        let answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 17\r\n\r\n{\"error\":\"None.\"}";
        let failure = get(answer).unwrap_err();
        assert_eq!((failure.kind(), failure.to_string().as_str()), (Kind::NotFound, "None."));
        for (answer, kind) in [
            (&b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"[..], Kind::Refused),
            (b"HTTP/1.1 503 Unavailable\r\nContent-Length: 0\r\n\r\n", Kind::Unreachable),
            (b"HTTP/1.1 409 Conflict\r\nContent-Length: 0\r\n\r\n", Kind::Other),
        ] {
            assert_eq!(get(answer).unwrap_err().kind(), kind);
        }
    }

    #[test]
    fn what_is_no_answer_is_a_failure_and_takes_no_more_than_it_may() {
        for (answer, needle) in [
            (&b"SSH-2.0-OpenSSH\r\n"[..], "no status of HTTP"),
            (b"", "broken off"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "broken off"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n{}", "too long"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n{}", "transfer encoding"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", "without a length"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}}\r\n", "longer than it says"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{]", "no JSON"),
        ] {
            let failure = get(answer).unwrap_err().to_string();
            assert!(failure.contains(needle), "{failure}");
        }
        let endless = Box::leak(vec![b'x'; HEAD_BYTES_MAX + 100].into_boxed_slice());
        assert!(get(endless).unwrap_err().to_string().contains("too long"));
    }

    #[test]
    fn a_server_that_does_not_answer_is_waited_for_no_longer_than_the_timeout() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("admin");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut admin = Admin::connect(&path).unwrap().with_timeout(Duration::from_millis(20));
        let failure = admin.post("/drain").unwrap_err();
        assert_eq!(failure.kind(), Kind::Unreachable);
        assert!(failure.to_string().contains("has not answered within 20ms"), "{failure}");
    }

    #[test]
    fn where_no_server_is_the_message_says_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("admin");
        let failure = Admin::connect(&path).unwrap_err();
        assert_eq!(failure.kind(), Kind::NotFound);
        assert!(failure.to_string().contains("--admin PATH"), "{failure}");
        drop(UnixListener::bind(&path).unwrap());
        let failure = Admin::connect(&path).unwrap_err();
        assert_eq!(failure.kind(), Kind::Unreachable);
        assert!(failure.to_string().contains("has ended"), "{failure}");
    }
}
