//! The one error type: a status (errno, where it arose, whether a retry may succeed) and a message.

use raio_transport::channel::Channel;
use raio_transport::error::Class;
use raio_transport::protocol::Opcode;
use raio_transport::transport::Reply;
use raio_transport::{Status, message};

/// A call or an operation that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The errno and its origin. Class `None` means that the call was invalid, or cannot be executed now.
    pub status: Status,
    /// The message, for people: what is wrong, and what to do about it.
    pub text: String,
    /// The operation may have been done nevertheless: its connection was lost, or its timeout has passed.
    pub is_unknown: bool,
    /// An fsync: writes that were acknowledged before it may be lost.
    pub is_lost: bool,
}

impl Error {
    pub(crate) fn new(status: Status, text: impl Into<String>) -> Self {
        Self { status, text: text.into(), is_unknown: false, is_lost: false }
    }

    /// A call that is invalid, or cannot be executed now.
    pub(crate) fn call(errno: i32, text: impl Into<String>) -> Self {
        Self::new(Status { errno, class: Class::None, retryable: false }, text)
    }

    /// A call on a connection that has ended.
    pub(crate) fn not_connected(why: &raio_transport::Error) -> Self {
        let text = format!("The connection has ended ({why}). Open a new session.");
        Self::new(Status::transport(libc::ENOTCONN), text)
    }

    /// The failure of a request. `failure` is why its channel was given up, if it was.
    pub(crate) fn from_reply(reply: &Reply, failure: Option<&raio_transport::Error>) -> Self {
        let status = reply.status;
        let mut text = message::text(&reply.body);
        if text.is_empty() {
            text = match failure {
                Some(failure) => failure.to_string(),
                None => std::io::Error::from_raw_os_error(status.errno).to_string(),
            };
        }
        Self { is_unknown: reply.is_unknown, ..Self::new(status, text) }
    }

    /// The errno, positive.
    pub fn errno(&self) -> i32 {
        self.status.errno
    }
}

/// A call on a session that was stopped.
pub(crate) fn session_stopped() -> Error {
    Error::new(Status::transport(libc::ENOTCONN), "The session was stopped. Open a new one.")
}

/// A call that waits for a session that is being resumed; `recovery` says how that stands.
pub(crate) fn reconnecting(recovery: Option<String>) -> Error {
    let lost = recovery.unwrap_or_else(|| "The connection to the server was lost.".into());
    let text = format!(
        "{lost} This call did not wait longer. Check that raio_server runs, or raise the call timeout."
    );
    Error::new(Status::transport(libc::ETIMEDOUT), text)
}

/// A request that cannot be divided, and is too large for the server, which was restarted meanwhile. It was
/// not executed.
pub(crate) fn oversized() -> Error {
    let text = "The server was restarted, and takes fewer bytes in a request now. Ask again for fewer.";
    Error::new(Status { retryable: true, ..Status::transport(libc::EMSGSIZE) }, text)
}

/// Why the server cannot be asked for this operation, if it cannot.
pub(crate) fn unsupported(opcode: Opcode, channel: &Channel) -> Option<Error> {
    opcode.operation().why_not_granted(channel.grant().features).map(not_supported)
}

/// What the server cannot be asked for.
pub(crate) fn not_supported(text: String) -> Error {
    Error::new(Status::protocol(libc::EOPNOTSUPP), text)
}

/// A call that the server, which answers pings, has not answered.
pub(crate) fn timed_out() -> Error {
    let text = "The server answers pings, but did not answer this call in time: its storage may hang. See \
                its log, or raise the call timeout.";
    Error::new(Status::transport(libc::ETIMEDOUT), text)
}

/// A response that is well-formed, but not one that the request can have.
pub(crate) fn protocol_error() -> Error {
    let text = "The server's response is invalid. Check that the versions of library and server match.";
    Error::new(Status::protocol(libc::EPROTO), text)
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}

/// Its kind is that of the errno, and it displays the message. What is in it ([`std::io::Error::get_ref`],
/// downcast) is the [`Error`], which has the errno and all else.
impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        Self::new(Self::from_raw_os_error(error.errno()).kind(), error)
    }
}

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
        Self::new(status, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn an_io_error_keeps_the_errno_and_the_message() {
        let error = Error { is_unknown: true, ..Error::new(Status::storage(libc::ENOSPC), "It is full.") };
        let converted = io::Error::from(error.clone());
        assert_eq!(
            (converted.kind(), converted.to_string()),
            (io::ErrorKind::StorageFull, error.text.clone())
        );
        let inner = converted.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
        assert_eq!(inner, Some(&error));
    }
}
