//! Why something was not done, and what the exit code says of it.

use std::fmt;
use std::process::ExitCode;

/// Why something was not done: a message for people.
#[derive(Debug)]
pub struct Failure {
    text: String,
    is_usage: bool,
}

impl Failure {
    /// It could not be done.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), is_usage: false }
    }

    /// The command line makes no sense.
    pub fn usage(text: impl Into<String>) -> Self {
        Self { text: text.into(), is_usage: true }
    }

    /// What the program exits with.
    pub fn exit_code(&self) -> ExitCode {
        if self.is_usage { ExitCode::from(2) } else { ExitCode::FAILURE }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<raio_transport::Error> for Failure {
    fn from(error: raio_transport::Error) -> Self {
        Self::new(sentence(&error))
    }
}

/// An error of the transport, with a full stop.
pub fn sentence(error: &raio_transport::Error) -> String {
    format!("{}.", error.to_string().trim_end_matches('.'))
}
