//! Errors: what went wrong, whose fault it was, and which errno says so.
//!
//! Three kinds, never mixed. A [`Status`] is the result of one request, and travels on the wire. A
//! [`Violation`] is a peer that broke the protocol: it ends that connection and nothing else. An [`Error`] is
//! a call of ours that failed.

use std::io;

/// Where a failure arose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Class {
    /// No failure.
    None = 0,
    /// The connection failed; what became of the request is unknown.
    Transport = 1,
    /// A peer broke the protocol.
    Protocol = 2,
    /// The file or device failed the operation.
    Storage = 3,
    /// The server's configuration forbids it.
    Policy = 4,
}

impl Class {
    /// The class with this wire value.
    pub fn from_wire(value: u8) -> Option<Self> {
        Some(match value {
            0 => Self::None,
            1 => Self::Transport,
            2 => Self::Protocol,
            3 => Self::Storage,
            4 => Self::Policy,
            _ => return None,
        })
    }
}

/// The result of one request: success, or an errno with its class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// 0 for success, else a Linux errno (positive).
    pub errno: i32,
    /// Where the failure arose.
    pub class: Class,
    /// Whether the same request may succeed later.
    pub retryable: bool,
}

impl Status {
    /// Success.
    pub const OK: Self = Self { errno: 0, class: Class::None, retryable: false };

    /// The data of a request has arrived with another checksum than it was sent with. Nothing was done.
    pub const DAMAGED: Self = Self { errno: libc::EILSEQ, class: Class::Transport, retryable: true };

    /// Whether a server says that it has not executed a request because it is shutting down: another
    /// connection may send it again.
    #[inline]
    pub fn is_shutdown(self) -> bool {
        self.errno == libc::ESHUTDOWN && self.class == Class::Transport
    }

    /// A failure of the file or device.
    pub fn storage(errno: i32) -> Self {
        let retryable =
            matches!(errno, libc::EAGAIN | libc::EINTR | libc::ENOMEM | libc::ENOBUFS | libc::EBUSY);
        Self { errno, class: Class::Storage, retryable }
    }

    /// Something the server's configuration forbids.
    pub fn policy(errno: i32) -> Self {
        Self { errno, class: Class::Policy, retryable: false }
    }

    /// A request that makes no sense.
    pub fn protocol(errno: i32) -> Self {
        Self { errno, class: Class::Protocol, retryable: false }
    }

    /// A connection that failed under the request.
    pub fn transport(errno: i32) -> Self {
        Self { errno, class: Class::Transport, retryable: true }
    }

    /// Whether this is success.
    pub fn is_ok(&self) -> bool {
        self.errno == 0
    }
}

/// How a peer broke the protocol. The connection it came by is closed, and the reason counted under
/// [`Violation::name`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Violation {
    /// The first bytes are not raio's magic.
    #[error("the first bytes are not raio's: the peer speaks another protocol")]
    Magic,
    /// No protocol version in common.
    #[error("no protocol version in common: the peer speaks {min} to {max}, this side {ours}")]
    Version {
        /// The peer's oldest.
        min: u16,
        /// The peer's newest.
        max: u16,
        /// The one that this side speaks.
        ours: u16,
    },
    /// The handshake did not finish in time.
    #[error("the handshake did not finish in time")]
    HandshakeTimeout,
    /// A handshake longer than allowed.
    #[error("the handshake is longer than allowed")]
    HandshakeTooLong,
    /// An option that the peer requires is not supported.
    #[error("the peer requires option {0}, which this side does not support")]
    RequiredOption(u16),
    /// A checksum did not match.
    #[error("a checksum did not match")]
    Checksum,
    /// A message kind that is unknown, or not for this side.
    #[error("message kind {0} is unknown here")]
    Kind(u8),
    /// Reserved bits or bytes that are not zero.
    #[error("reserved bits are not zero")]
    Reserved,
    /// A length beyond what was granted, or that contradicts another field.
    #[error("a length is out of bounds")]
    Length,
    /// More requests outstanding than were granted.
    #[error("more requests are outstanding than were granted")]
    Credits,
    /// A response to a request that is not outstanding, or a request id already in use.
    #[error("a message names a request that is not outstanding, or one that already is")]
    RequestId,
    /// A field value that has no meaning.
    #[error("a field has a value without meaning")]
    Field,
    /// The peer was silent for longer than the keepalive allows.
    #[error("the peer was silent for longer than the keepalive allows")]
    Silent,
    /// A TLS record that is damaged, forged, repeated, out of order, or of a kind that does not belong there.
    #[error("a TLS record is damaged or forged, or does not belong there")]
    Record,
    /// The peer has ended the connection with a TLS alert.
    #[error("the peer has sent TLS alert {0}")]
    Alert(u8),
    /// The peer did not take its answers, or did not finish a message it had begun.
    #[error("the peer made no progress on a message for too long")]
    Stalled,
}

impl Violation {
    /// A short name for counters.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Magic => "magic",
            Self::Version { .. } => "version",
            Self::HandshakeTimeout => "handshake_timeout",
            Self::HandshakeTooLong => "handshake_too_long",
            Self::RequiredOption(_) => "required_option",
            Self::Checksum => "checksum",
            Self::Kind(_) => "kind",
            Self::Reserved => "reserved",
            Self::Length => "length",
            Self::Credits => "credits",
            Self::RequestId => "request_id",
            Self::Field => "field",
            Self::Silent => "silent",
            Self::Stalled => "stalled",
            Self::Record => "record",
            Self::Alert(_) => "alert",
        }
    }

    /// The errno of requests that die with the connection.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Version { .. } | Self::RequiredOption(_) => libc::EPROTONOSUPPORT,
            Self::HandshakeTimeout | Self::Silent | Self::Stalled => libc::ETIMEDOUT,
            _ => libc::EPROTO,
        }
    }
}

/// A call that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An address that cannot be parsed.
    #[error("{0}")]
    Address(String),
    /// The operating system rejected something; the text says what was being done and what may help.
    #[error("{context}: {source}")]
    Io {
        /// What was being done.
        context: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The server rejected the handshake.
    #[error("the server rejected the session: {text}")]
    Rejected {
        /// The server's errno.
        status: Status,
        /// The server's sentence.
        text: String,
    },
    /// The peer broke the protocol.
    #[error("{0}")]
    Violation(#[from] Violation),
    /// The connection ended.
    #[error("the connection has ended: {text}")]
    Closed {
        /// The errno that requests in flight completed with.
        errno: i32,
        /// Why.
        text: String,
    },
    /// Not built in, or not to be had on this machine.
    #[error("{0}")]
    Unsupported(String),
}

impl Error {
    /// Wraps an I/O error with what was being done.
    pub fn io(context: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io { context: context.into(), source: source.into() }
    }

    /// The errno for C callers. The only place where errors become numbers.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Address(_) => libc::EINVAL,
            Self::Io { source, .. } => source.raw_os_error().unwrap_or(match source.kind() {
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => libc::ETIMEDOUT,
                io::ErrorKind::UnexpectedEof => libc::ECONNRESET,
                io::ErrorKind::NotFound => libc::ENOENT,
                _ => libc::EIO,
            }),
            Self::Rejected { status, .. } => status.errno,
            Self::Violation(violation) => violation.errno(),
            Self::Closed { errno, .. } => *errno,
            Self::Unsupported(_) => libc::EPROTONOSUPPORT,
        }
    }
}
