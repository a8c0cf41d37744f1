//! How results look: data and results on standard output, sizes and times for people or exact, colours on
//! terminals.

use std::io::{self, IsTerminal, Write};
use std::process::exit;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

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
    print_bytes(text.as_bytes())
}

/// Writes bytes that need not be UTF-8, such as those of a path.
pub fn print_bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    let printed = stdout.write_all(bytes).and_then(|()| stdout.flush());
    printed.map_err(|error| stdout_failed(&error))
}

/// Writes a line to standard error. If it is closed, nothing can be said. Control characters of names do not
/// get to a terminal.
pub fn say(text: &str) {
    let lines: Vec<String> = text.split('\n').map(|line| visible(line.as_bytes())).collect();
    let _ = io::stderr().lock().write_all(format!("{}\n", lines.join("\n")).as_bytes());
}

/// Writes one object as a line of JSON.
pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(value)
        .map_err(|error| Failure::new(format!("Cannot write the result as JSON: {error}.")))?;
    print(&format!("{text}\n"))
}

/// A name or path for people: what is not UTF-8, and control characters, which a terminal would obey, are
/// written as \\xHH.
pub fn visible(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() {
                let mut utf8 = [0; 4];
                c.encode_utf8(&mut utf8).bytes().for_each(|byte| text += &format!("\\x{byte:02x}"));
            } else {
                text.push(c);
            }
        }
        chunk.invalid().iter().for_each(|byte| text += &format!("\\x{byte:02x}"));
    }
    text
}

/// What sort of file it is, by its `st_mode`.
pub fn sort(mode: u32) -> &'static str {
    match mode & libc::S_IFMT {
        libc::S_IFREG => "file",
        libc::S_IFDIR => "directory",
        libc::S_IFLNK => "symlink",
        libc::S_IFBLK => "block",
        libc::S_IFCHR => "character",
        libc::S_IFIFO => "fifo",
        _ => "socket",
    }
}

/// The second of a time in nanoseconds since the epoch, in UTC.
pub fn second(ns: i64) -> String {
    match Timestamp::from_second(ns.div_euclid(1_000_000_000)) {
        Ok(time) => time.to_string(),
        Err(_) => format!("{ns} ns"),
    }
}

/// A number of bytes for people, such as 1.5 GiB; exact with `is_exact`.
pub fn size(bytes: u64, is_exact: bool) -> String {
    if is_exact {
        return bytes.to_string();
    }
    let mut unit = 0;
    let mut value = bytes as f64;
    // What would be rounded to 1024 is 1 of the next unit.
    while value >= 1023.95 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/// How many in a second.
pub fn per_second(count: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}

/// A colour of the terminal.
#[derive(Clone, Copy, Debug)]
pub enum Colour {
    Red = 31,
    Green = 32,
    Yellow = 33,
}

/// The text in this colour if standard output is a terminal that has colours, and NO_COLOR is not set.
pub fn coloured(text: &str, colour: Colour) -> String {
    if has_colours() { format!("\x1b[{}m{text}\x1b[0m", colour as u8) } else { text.to_owned() }
}

/// Whether standard output is a terminal that has colours, and NO_COLOR is not set.
pub fn has_colours() -> bool {
    let is_off = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let is_dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    !is_off && !is_dumb && io::stdout().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_one_decimal_and_the_unit_that_keeps_them_short() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (5 << 30, "5.0 GiB"),
            (u64::MAX, "16384.0 PiB"),
        ] {
            assert_eq!(size(bytes, false), text);
            assert_eq!(size(bytes, true), bytes.to_string());
        }
    }

    #[test]
    fn names_cannot_command_a_terminal() {
        assert_eq!(visible(b"a\x1b[2J\n\xff\xc2\x9b"), "a\\x1b[2J\\x0a\\xff\\xc2\\x9b");
        assert_eq!(visible("grün".as_bytes()), "grün");
    }

    #[test]
    fn where_no_time_has_passed_there_is_no_rate() {
        assert_eq!(per_second(3, Duration::from_secs(2)), 1.5);
        assert_eq!(per_second(3, Duration::ZERO), 0.0);
    }
}
