//! Why an operation on a client's path is rejected, and how its path is shown.

use std::fmt;

use raio_transport::Status;

/// A rejection: the status, and the error message for the client.
#[derive(Debug)]
pub struct Rejection {
    /// The status.
    pub status: Status,
    /// The error message: what is wrong, and the remedy.
    pub text: String,
}

impl Rejection {
    /// Something (a verb) cannot be done to a path of an export. `hint` may be empty.
    pub fn of_path(what: &str, path: &[u8], errno: i32, hint: &str) -> Self {
        let error = std::io::Error::from_raw_os_error(errno);
        let space = if hint.is_empty() { "" } else { " " };
        let text = format!("Cannot {what} {} on the server: {error}.{space}{hint}", EscapedPath(path));
        Self { status: Status::storage(errno), text }
    }
}

/// A client's path for a message: cut short, and escaped so that it cannot harm a terminal.
pub struct EscapedPath<'a>(pub &'a [u8]);

impl fmt::Display for EscapedPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const BYTES_MAX: usize = 100;
        let cut = &self.0[..self.0.len().min(BYTES_MAX)];
        write!(f, "{:?}{}", String::from_utf8_lossy(cut), if self.0.len() > BYTES_MAX { "..." } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn a_path_is_escaped_and_cut_short() {
        assert_eq!(EscapedPath(b"/a\x1b[2J").to_string(), "\"/a\\u{1b}[2J\"");
        assert_eq!(EscapedPath(&[b'x'; 200]).to_string(), format!("\"{}\"...", "x".repeat(100)));
    }
}
