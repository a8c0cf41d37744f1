//! How results look: data and results on standard output, sizes and times for people or exact, colours on
//! terminals.

use std::io::{self, Write};
use std::process::exit;

use crate::failure::Failure;

/// What a failed write to standard output is for this program. A reader that has gone away has all that it
/// wants: that is no failure, and nothing is said of it.
pub fn stdout_failed(error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::BrokenPipe {
        exit(0);
    }
    Failure::io("Cannot write to standard output", error)
}

/// Writes to standard output.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    let printed = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    printed.map_err(|error| stdout_failed(&error))
}
