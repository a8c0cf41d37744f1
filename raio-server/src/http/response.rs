//! What is sent back.

use std::borrow::Cow;
use std::fmt::Write;
use std::time::Instant;

/// An answer that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The status of HTTP.
    pub status: u16,
    /// The media type of the body.
    pub content_type: &'static str,
    /// Further headers.
    pub headers: Vec<(&'static str, &'static str)>,
    /// The body.
    pub body: Cow<'static, str>,
}

impl Response {
    /// With this body.
    pub fn new(status: u16, content_type: &'static str, body: impl Into<Cow<'static, str>>) -> Self {
        Self { status, content_type, headers: Vec::new(), body: body.into() }
    }

    /// JSON.
    pub fn json(status: u16, body: String) -> Self {
        Self::new(status, "application/json", body)
    }

    /// `{"error":text}`: the text says what to do.
    pub fn error(status: u16, text: &str) -> Self {
        Self::json(status, format!("{}\n", serde_json::json!({ "error": text })))
    }

    /// With one more header.
    pub fn with(mut self, name: &'static str, value: &'static str) -> Self {
        self.headers.push((name, value));
        self
    }

    /// The bytes to send.
    pub(super) fn to_bytes(&self, is_last: bool) -> Vec<u8> {
        let mut bytes = head(self.status, self.content_type, &self.headers, is_last);
        let _ = write!(bytes, "Content-Length: {}\r\n\r\n{}", self.body.len(), self.body);
        bytes.into_bytes()
    }
}

/// What becomes of a request.
pub enum Answer {
    /// This is the response.
    Now(Response),
    /// The response comes later.
    Later(Box<dyn Later>),
    /// A body of this media type, which comes in parts.
    Stream(&'static str, Box<dyn Parts>),
}

/// What is asked again for something.
#[derive(Debug)]
pub enum Next<T> {
    /// It is there.
    Ready(T),
    /// Ask again then, or when the server is woken ([`super::Waker`]).
    At(Instant),
}

/// A response that comes later.
pub trait Later: Send {
    /// Asks for it.
    fn poll(&mut self, now: Instant) -> Next<Response>;
}

/// The parts of a stream.
pub trait Parts: Send {
    /// Asks for the next part; there is none after None. It is not asked while the last part is unsent, so a
    /// client that is slow gets fewer.
    fn poll(&mut self, now: Instant) -> Next<Option<String>>;
}

/// The status line and the headers, without the empty line.
pub(super) fn head(
    status: u16,
    content_type: &str,
    headers: &[(&'static str, &'static str)],
    is_last: bool,
) -> String {
    let mut head = format!(
        "HTTP/1.1 {status} {}\r\nContent-Type: {content_type}\r\nCache-Control: no-store\r\n\
         X-Content-Type-Options: nosniff\r\n",
        reason(status)
    );
    for (name, value) in headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    if is_last {
        head.push_str("Connection: close\r\n");
    }
    head
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        202 => "Accepted",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        413 => "Content Too Large",
        421 => "Misdirected Request",
        422 => "Unprocessable Content",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        _ => "Unknown",
    }
}
