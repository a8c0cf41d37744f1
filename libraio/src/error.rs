//! The one error type: a status (errno, where it arose, whether a retry may succeed) and a message.

use raio_transport::error::Class;
use raio_transport::{Status, message};

/// A call or an operation that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The errno and its origin. Class `None` means that the call was invalid, or cannot be executed now.
    pub status: Status,
    /// The message, for people: what is wrong, and what to do about it.
    pub text: String,
}

impl Error {
    /// A call that is invalid, or cannot be executed now.
    pub(crate) fn call(errno: i32, text: impl Into<String>) -> Self {
        Self { status: Status { errno, class: Class::None, retryable: false }, text: text.into() }
    }

    /// A call on a connection that has ended.
    pub(crate) fn not_connected(why: &raio_transport::Error) -> Self {
        Self {
            status: Status::transport(libc::ENOTCONN),
            text: format!("The connection has ended ({why}). Open a new session."),
        }
    }

    /// The failure of a request, from the body of its response.
    pub(crate) fn from_reply(status: Status, body: &[u8]) -> Self {
        let mut text = message::text(body);
        if text.is_empty() {
            text = std::io::Error::from_raw_os_error(status.errno).to_string();
        }
        Self { status, text }
    }

    /// The errno, positive.
    pub fn errno(&self) -> i32 {
        self.status.errno
    }
}

/// A call on a session that was stopped.
pub(crate) fn session_stopped() -> Error {
    Error {
        status: Status::transport(libc::ENOTCONN),
        text: "The session was stopped. Open a new one.".into(),
    }
}

/// A call that the server, which answers pings, has not answered.
pub(crate) fn timed_out() -> Error {
    Error {
        status: Status::transport(libc::ETIMEDOUT),
        text: "The server answers pings, but did not answer this call in time: its storage may hang. See \
               its log, or raise the call timeout."
            .into(),
    }
}

/// A response that is well-formed, but not one that the request can have.
pub(crate) fn protocol_error() -> Error {
    Error {
        status: Status::protocol(libc::EPROTO),
        text: "The server's response is invalid. Check that the versions of library and server match.".into(),
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}

impl From<raio_transport::Error> for Error {
    fn from(error: raio_transport::Error) -> Self {
        use raio_transport::Error as E;
        let errno = error.errno();
        let status = match &error {
            E::Address(_) | E::Unsupported(_) => Status { errno, class: Class::None, retryable: false },
            E::Io { .. } | E::Closed { .. } => Status::transport(errno),
            E::Rejected { status, .. } => *status,
            E::Violation(_) => Status::protocol(errno),
        };
        Self { status, text: error.to_string() }
    }
}
