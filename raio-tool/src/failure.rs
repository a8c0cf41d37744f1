//! Why something was not done, and the exit code that says so.

use std::fmt;
use std::io;
use std::process::ExitCode;

use raio_transport::Class;

/// What kind of failure it is. Scripts tell them apart by the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// None of the others.
    Other = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// A file, an export or a device does not exist.
    NotFound = 3,
    /// Permissions, a read-only export or keys forbid it.
    Refused = 4,
    /// The server does not answer, or says that a retry may succeed.
    Unreachable = 5,
    /// Data differs, or a checksum does not match.
    Unverified = 6,
    /// Stopped by Ctrl-C.
    Interrupted = 130,
}

/// Why something was not done: its kind, and a message for people that says what to do about it.
#[derive(Clone, Debug)]
pub struct Failure {
    kind: Kind,
    text: String,
    is_final: bool,
}

impl Failure {
    /// A failure of this kind.
    pub fn of(kind: Kind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into(), is_final: kind == Kind::Interrupted }
    }

    /// It could not be done.
    pub fn new(text: impl Into<String>) -> Self {
        Self::of(Kind::Other, text)
    }

    /// The command line makes no sense.
    pub fn usage(text: impl Into<String>) -> Self {
        Self::of(Kind::Usage, text)
    }

    /// A call on something local has failed. `context` is the first half of the sentence, such as "Cannot
    /// open x".
    pub fn io(context: impl fmt::Display, error: &io::Error) -> Self {
        let kind = error.raw_os_error().map_or(Kind::Other, kind_of_errno);
        let is_final = error.raw_os_error() == Some(libc::EROFS);
        Self { is_final, ..Self::of(kind, format!("{context}: {error}.")) }
    }

    /// A call on something of a server has failed.
    pub fn remote(context: impl fmt::Display, error: &raio::Error) -> Self {
        let kind = match (kind_of_errno(error.errno()), error.status.class) {
            (kind @ Kind::Refused, _) => kind,
            (_, Class::Transport) => Kind::Unreachable,
            _ if error.status.retryable => Kind::Unreachable,
            (kind, _) => kind,
        };
        let is_final = error.status.class == Class::Transport || error.errno() == libc::EROFS;
        Self { is_final, ..Self::of(kind, format!("{context}: {}.", error.text.trim_end_matches('.'))) }
    }

    /// Whether the same would become of everything that is done next: the server is gone, the file system is
    /// read-only, or Ctrl-C was pressed.
    pub fn is_final(&self) -> bool {
        self.is_final
    }

    /// The same failure, but not final: what is done next may succeed.
    pub fn of_one(self) -> Self {
        Self { is_final: false, ..self }
    }

    /// The same failure, with this behind its message.
    pub fn with_advice(self, advice: &str) -> Self {
        Self { text: format!("{} {advice}", self.text), ..self }
    }

    /// What kind it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What the program exits with.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.kind as u8)
    }
}

/// The kind of failure that an errno of a file stands for.
fn kind_of_errno(errno: i32) -> Kind {
    match errno {
        libc::ENOENT | libc::ENOTDIR | libc::ENXIO | libc::ENODEV => Kind::NotFound,
        libc::EACCES | libc::EPERM | libc::EROFS | libc::ENOKEY | libc::EKEYREJECTED | libc::EUSERS => {
            Kind::Refused
        }
        _ => Kind::Other,
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<raio_transport::Error> for Failure {
    fn from(error: raio_transport::Error) -> Self {
        let kind = match &error {
            raio_transport::Error::Address(_) => Kind::Usage,
            other if kind_of_errno(other.errno()) == Kind::Refused => Kind::Refused,
            raio_transport::Error::Io { .. } | raio_transport::Error::Closed { .. } => Kind::Unreachable,
            _ => Kind::Other,
        };
        Self::of(kind, sentence(&error))
    }
}

/// An error of the transport, with a full stop.
pub fn sentence(error: &raio_transport::Error) -> String {
    format!("{}.", error.to_string().trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use raio_transport::Status;

    use super::*;

    fn remote(status: Status) -> Kind {
        let error = raio::Error { status, text: "No.".into(), is_unknown: false, is_lost: false };
        Failure::remote("Cannot open :/e/f", &error).kind()
    }

    #[test]
    fn the_exit_code_tells_what_a_script_would_do_about_it() {
        assert_eq!(remote(Status::storage(libc::ENOENT)), Kind::NotFound);
        assert_eq!(remote(Status::policy(libc::EROFS)), Kind::Refused);
        assert_eq!(remote(Status::transport(libc::ECONNREFUSED)), Kind::Unreachable);
        // A host that is not found is no file that is not found.
        assert_eq!(remote(Status::transport(libc::ENOENT)), Kind::Unreachable);
        assert_eq!(remote(Status::storage(libc::EBUSY)), Kind::Unreachable);
        assert_eq!(remote(Status::storage(libc::EIO)), Kind::Other);
        let lost = raio::Error {
            status: Status::transport(libc::EPIPE),
            text: "Lost.".into(),
            is_unknown: true,
            is_lost: false,
        };
        assert!(Failure::remote("Cannot read", &lost).is_final() && !Failure::new("One file.").is_final());
        let missing = Failure::io("Cannot open x", &io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(missing.kind(), Kind::NotFound);
        assert!(missing.to_string().starts_with("Cannot open x: "), "{missing}");
    }
}
