//! `raio find`: the paths beneath directories of a server that meet conditions.

use std::ffi::OsString;
use std::io::{IsTerminal, stdout};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum, ValueHint};
use raio::DirEntry;
use raio_transport::size;
use serde::Serialize;

use crate::batch::Batch;
use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::output::{self, sort};
use crate::pattern::Pattern;
use crate::place::Sessions;
use crate::walk::{Visitor, Walk};

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// Directories of a server; a server's URL alone is the list of its exports
    #[arg(required = true, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    paths: Vec<OsString>,
    /// Whose name matches this pattern, with *, ? and [...]
    #[arg(long, value_name = "PATTERN", value_parser = Pattern::parse)]
    name: Option<Pattern>,
    /// Of this type
    #[arg(long = "type", value_enum, value_name = "TYPE")]
    sort: Option<Sort>,
    /// At least this long
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    min_size: Option<u64>,
    /// At most this long
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    max_size: Option<u64>,
    /// Changed within this time, such as 90s, 15m, 12h or 7d
    #[arg(long, value_name = "AGE", value_parser = age)]
    newer_than: Option<Duration>,
    /// Not changed for this time
    #[arg(long, value_name = "AGE", value_parser = age)]
    older_than: Option<Duration>,
    /// Look into this number of levels of directories
    #[arg(long, value_name = "NUMBER")]
    max_depth: Option<usize>,
    /// End each path with a zero byte, rather than with a line
    #[arg(short = '0', long, conflicts_with = "json")]
    print0: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Sort {
    /// A regular file
    #[value(alias = "f")]
    File,
    /// A directory
    #[value(alias = "d")]
    Directory,
    /// A symbolic link
    #[value(alias = "l")]
    Symlink,
}

impl Sort {
    fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Directory => "directory",
            Self::Symlink => "symlink",
        }
    }
}

/// A length of time with its unit.
fn age(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time. Write a number with s, m, h or d behind it, such as 7d.");
    let at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let seconds = match &text[at..] {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..at].parse().map_err(|_| wrong())?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(wrong)
}

/// A path, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    path: String,
    #[serde(rename = "type")]
    sort: &'static str,
    size: Option<u64>,
    modified_ns: Option<i64>,
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let sessions = Sessions::new(global);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    Batch::each(&options.paths, |path| {
        let location = Location::parse_directory(path)?;
        let (session, path) = sessions.at(&location)?;
        let now = now as i64;
        let mut finding = Finding { global, options, location: &location, now, batch: Batch::default() };
        Walk { session: &session, location: &location, path }.run(&mut finding)?;
        finding.batch.finish()
    })
}

struct Finding<'a> {
    global: &'a Global,
    options: &'a Options,
    location: &'a Location,
    /// In nanoseconds since the epoch.
    now: i64,
    batch: Batch,
}

impl Visitor for Finding<'_> {
    fn found(&mut self, below: &Path, entry: &DirEntry, depth: usize) -> Result<bool, Failure> {
        if matches(self.options, entry, self.now) {
            self.show(&self.location.join(below), entry)?;
        }
        Ok(self.options.max_depth.is_none_or(|max| depth < max))
    }

    fn failed(&mut self, failure: Failure) -> Result<(), Failure> {
        self.batch.note(Err(failure))
    }
}

impl Finding<'_> {
    fn show(&self, path: &Location, entry: &DirEntry) -> Result<(), Failure> {
        if self.global.json {
            return output::print_json(&Report {
                path: path.to_string(),
                sort: sort(entry.mode),
                size: entry.has_status.then_some(entry.size),
                modified_ns: entry.has_status.then_some(entry.modified_ns),
            });
        }
        let mut line = path.to_bytes();
        if !self.options.print0 && stdout().is_terminal() {
            line = output::visible(&line).into();
        }
        line.push(if self.options.print0 { 0 } else { b'\n' });
        output::print_bytes(&line)
    }
}

/// Whether an entry meets the conditions. What is not known of it meets none.
fn matches(options: &Options, entry: &DirEntry, now: i64) -> bool {
    let age_ns = i128::from(now) - i128::from(entry.modified_ns);
    let is_younger = |age: Duration| age_ns <= age.as_nanos() as i128;
    let asks_status = options.min_size.is_some()
        || options.max_size.is_some()
        || options.newer_than.is_some()
        || options.older_than.is_some();
    options.name.as_ref().is_none_or(|pattern| pattern.matches_name(&entry.name))
        && options.sort.is_none_or(|wanted| sort(entry.mode) == wanted.name())
        && (entry.has_status || !asks_status)
        && options.min_size.is_none_or(|size| entry.size >= size)
        && options.max_size.is_none_or(|size| entry.size <= size)
        && options.newer_than.is_none_or(is_younger)
        && options.older_than.is_none_or(|age| !is_younger(age))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_have_units() {
        assert_eq!(age("90s").unwrap(), Duration::from_secs(90));
        assert_eq!(age("7d").unwrap(), Duration::from_secs(7 * 86400));
        for text in ["", "7", "d", "7w", "-1d", "99999999999999999999d"] {
            assert!(age(text).is_err(), "{text}");
        }
    }
}
