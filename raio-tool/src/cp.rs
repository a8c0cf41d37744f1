//! `raio cp`: copies files between this machine and servers.
//!
//! A copy ([`crate::copy`]) goes beside the destination, and is renamed at the end. A small file goes to a
//! server by one request (put).

mod destination;
mod trees;

use std::ffi::OsString;
use std::time::Instant;

use clap::{Args, ValueHint};
use raio::{Attributes, PutOptions};
use raio_transport::size;
use serde::Serialize;

use self::destination::{Found, found};
use crate::batch::Batch;
use crate::copy::{Copied, Destination, FileCopy};
use crate::failure::Failure;
use crate::global::Global;
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::output;
use crate::pattern::Pattern;
use crate::place::{Facts, Place, Sessions, Sort, open_source, read_whole};
use crate::progress::{Progress, Style};
use crate::transfer::Settings;
use crate::tuning::{DEPTH, JOURNAL_FROM_BYTES, SMALL_FILE_BYTES};

// Headings of the help.
const DIRECTORIES: &str = "Options for directories";
const SAFETY: &str = "Options for safety";
const ZEROS: &str = "Options for zeros and holes";
const SPEED: &str = "Options for speed";

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// Files to copy, and at last where to: a file, or a directory
    #[arg(required = true, num_args = 2.., value_name = "PATH", value_hint = ValueHint::AnyPath)]
    paths: Vec<OsString>,
    /// Copy directories recursively
    #[arg(short, long)]
    recursive: bool,
    /// With -r, copy the targets of symbolic links, rather than the links
    #[arg(short = 'L', long, requires = "recursive", help_heading = DIRECTORIES)]
    dereference: bool,
    /// With -r, leave out what matches this pattern
    #[arg(long, value_name = "PATTERN", value_parser = Pattern::parse, requires = "recursive")]
    #[arg(help_heading = DIRECTORIES)]
    exclude: Vec<Pattern>,
    /// With -r, stop at the first error, rather than continue with the other files
    #[arg(long, requires = "recursive", help_heading = DIRECTORIES)]
    fail_fast: bool,
    /// Resume an interrupted copy. Blocks already at the destination are verified by checksum first. With
    /// -r, files of the same size and modification time are skipped, and --preserve is implied
    #[arg(long, help_heading = SAFETY)]
    resume: bool,
    /// Read the destination again, from the disk where that is possible, and compare
    #[arg(long, help_heading = SAFETY)]
    verify: bool,
    /// Flush the copy to stable storage (fsync) before it is renamed into place
    #[arg(long, help_heading = SAFETY)]
    fsync: bool,
    /// Give the copy the permissions, the times and, as root, the owner of the source; to a server and with
    /// -r, permissions and the modification time
    #[arg(long, help_heading = SAFETY)]
    preserve: bool,
    /// Write to the destination itself, rather than to a file beside it
    #[arg(long, help_heading = SAFETY)]
    inplace: bool,
    /// The destination reads as zeros: write none
    #[arg(long, help_heading = ZEROS)]
    destination_is_zero: bool,
    /// Write zeros and holes as they are
    #[arg(long, conflicts_with = "destination_is_zero", help_heading = ZEROS)]
    no_sparse: bool,
    /// At most this number of bytes per second
    #[arg(long, value_name = "SIZE", value_parser = size::parse, help_heading = SPEED)]
    bwlimit: Option<u64>,
    /// Connections to each server; with -r, threads, each with connections of its own [default: 1 for small
    /// files, up to 4 for large ones, 8 with -r]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=64))]
    #[arg(help_heading = SPEED)]
    connections: Option<u16>,
    /// Reads and writes in flight on each connection
    #[arg(long, value_name = "NUMBER", default_value_t = DEPTH as u16)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = SPEED)]
    depth: u16,
    /// Length of each read and write, a multiple of 4k
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = block_size, help_heading = SPEED)]
    block_size: u64,
    /// How progress is shown, on standard error
    #[arg(long, value_enum, default_value_t, value_name = "STYLE")]
    progress: Style,
}

fn block_size(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text)?;
    if bytes == 0 || bytes % 4096 != 0 || bytes > 64 << 20 {
        return Err(format!("{text} is no block size. Write a multiple of 4k, at most 64M."));
    }
    Ok(bytes)
}

/// What a copy came to, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    source: String,
    destination: String,
    #[serde(flatten)]
    copied: Copied,
    seconds: f64,
    bytes_per_second: f64,
}

pub fn run(global: &Global, options: &Options, interrupt: &Interrupt) -> Result<(), Failure> {
    let mut locations = options.paths.iter().map(Location::parse).collect::<Result<Vec<_>, _>>()?;
    let to = locations.pop().ok_or_else(|| Failure::usage("There is no destination."))?;
    let named = to.clone();
    let sessions = Sessions::new(global);
    let is_directory = sessions.is_directory(&to)?;
    let mut batch = Batch::default();
    for from in &locations {
        let to = to.for_source(from, is_directory, locations.len() > 1)?;
        if options.recursive && sessions.is_directory(from)? {
            if options.resume && is_directory && locations.len() == 1 && !stays_directory(&named) {
                return Err(Failure::usage(format!(
                    "{named} is a directory, perhaps what was copied before. With --resume write {named}/ to \
                     copy into it, or `raio sync {from} {named}` if it is the copy."
                )));
            }
            let copied = trees::copy(global, options, from, &to, !is_directory, interrupt);
            if options.fail_fast {
                copied?
            } else {
                batch.note(copied)?
            }
            continue;
        }
        let copied = Copy { sessions: &sessions, options, interrupt, from, to: &to }.run();
        let report = match copied {
            Err(failure) if options.recursive && !options.fail_fast => {
                batch.note(Err(failure))?;
                continue;
            }
            copied => copied?,
        };
        match to {
            _ if !global.json => {}
            // The data is on standard output.
            Location::Stream => output::say(&serde_json::json!(report).to_string()),
            _ => output::print_json(&report)?,
        }
    }
    batch.finish()
}

/// Whether it is a directory also before it is copied to for the first time.
fn stays_directory(to: &Location) -> bool {
    let is_there = match to {
        Location::Local(path) => path.file_name().is_none(),
        // An export.
        Location::Remote { path, .. } => path.components().count() <= 2,
        Location::Stream | Location::Null => false,
    };
    is_there || to.to_bytes().ends_with(b"/")
}

/// One file to be copied.
struct Copy<'a> {
    sessions: &'a Sessions<'a>,
    options: &'a Options,
    interrupt: &'a Interrupt,
    from: &'a Location,
    to: &'a Location,
}

impl Copy<'_> {
    fn run(&self) -> Result<Report, Failure> {
        let started = Instant::now();
        let source = open_source(self.sessions, self.from, false, self.interrupt)?;
        let facts = source.facts()?;
        if let Some(report) = self.put(&*source, &facts, started)? {
            return Ok(report);
        }
        let mut destination =
            destination::open(self.sessions, self.options, self.from, self.to, &facts, self.interrupt)?;
        self.check(&*source, &facts, &destination)?;
        let (is_stream, options) = (facts.sort == Sort::Stream, self.options);
        let copied = FileCopy {
            from: &*source,
            facts: &facts,
            source: self.from,
            to: self.to,
            settings: self.settings(!is_stream),
            has_journal: facts.size.is_some_and(|size| size >= JOURNAL_FROM_BYTES || options.resume),
            resumes: options.resume,
            is_alone: true,
            verifies: options.verify,
            is_sparse: !options.no_sparse,
            preserves: options.preserve,
            is_durable: options.fsync,
            sessions: self.sessions,
            progress: &|what, size| Progress::new(options.progress, what, size),
            interrupt: self.interrupt,
        }
        .run(&mut destination)?;
        Ok(self.report(copied, started))
    }

    fn report(&self, copied: Copied, started: Instant) -> Report {
        let elapsed = started.elapsed();
        Report {
            source: self.from.to_string(),
            destination: self.to.to_string(),
            copied,
            seconds: elapsed.as_secs_f64(),
            bytes_per_second: output::per_second(copied.copied_bytes, elapsed),
        }
    }

    /// Copies a small file to a server by one request, if that is what it takes.
    fn put(&self, source: &dyn Place, facts: &Facts, started: Instant) -> Result<Option<Report>, Failure> {
        let options = self.options;
        let is_plain = !(options.verify || options.resume || options.inplace || options.destination_is_zero);
        let is_small = |&size: &u64| size <= SMALL_FILE_BYTES && options.bwlimit.is_none() && is_plain;
        let Some(size) = facts.size.filter(is_small) else { return Ok(None) };
        if !matches!(self.to, Location::Remote { .. }) {
            return Ok(None);
        }
        let (session, path) = self.sessions.at(self.to)?;
        match found(&session, path) {
            Found::Other => return Ok(None),
            Found::File(there) => self.check_same_file(facts, &there)?,
            Found::Nothing => {}
        }
        let bytes = read_whole(source, size)?;
        let put = PutOptions {
            mode: facts.mode & 0o777,
            modified_ns: options.preserve.then_some(facts.times_ns.1),
            exclusive: false,
            fsync: options.fsync,
        };
        let done = session.put(path, &bytes, &put).and_then(|()| match options.preserve {
            // The umask of the server applies to a put.
            true => {
                let attributes = Attributes { mode: Some(put.mode), ..Attributes::default() };
                session.set_attributes(path, &attributes)
            }
            false => Ok(()),
        });
        match done {
            Err(error) if error.errno() == libc::EFBIG => return Ok(None),
            done => done.map_err(|error| Failure::remote(format!("Cannot write {}", self.to), &error))?,
        }
        let copied = Copied { bytes: size, copied_bytes: size, ..Copied::default() };
        Ok(Some(self.report(copied, started)))
    }

    /// Refuses a copy of a file to itself.
    fn check_same_file(&self, from: &Facts, to: &Facts) -> Result<(), Failure> {
        let is_local = matches!((self.from, self.to), (Location::Local(_), Location::Local(_)));
        if to.is_same_file(from, is_local) {
            return Err(Failure::usage(format!("{} and {} are the same file.", self.from, self.to)));
        }
        Ok(())
    }

    /// Refuses what would destroy something, or cannot be done, before anything is written.
    fn check(&self, source: &dyn Place, facts: &Facts, destination: &Destination) -> Result<(), Failure> {
        let to = destination.facts();
        if let Some(to) = &to {
            self.check_same_file(facts, to)?;
        }
        let is_stream = to.is_none_or(|to| to.sort == Sort::Stream) && destination.is_in_place();
        for (is_set, option) in [
            (self.options.verify, "--verify"),
            (self.options.resume, "--resume"),
            (self.options.fsync, "--fsync"),
            (self.options.preserve, "--preserve"),
        ] {
            if is_set && is_stream {
                return Err(Failure::usage(format!(
                    "{option} needs a file or device, and {} is none.",
                    self.to
                )));
            }
        }
        if self.options.resume && facts.size.is_none() {
            let name = source.name();
            return Err(Failure::usage(format!("--resume needs a source with a size, and {name} has none.")));
        }
        match (to.filter(|to| to.sort == Sort::Device).and_then(|to| to.size), facts.size) {
            (Some(room), Some(size)) if room < size => Err(Failure::new(format!(
                "{} has {room} bytes, and {} has {size}. Copy to a larger device.",
                self.to, self.from
            ))),
            _ => Ok(()),
        }
    }

    fn settings(&self, skips_holes: bool) -> Settings {
        Settings {
            block_bytes: self.options.block_size,
            depth: self.options.depth.into(),
            lanes: match self.to {
                // Nothing is done with the data that another thread could do meanwhile.
                Location::Null => Some(self.options.connections.unwrap_or(1).into()),
                _ => self.options.connections.map(usize::from),
            },
            // What goes to a stream has no place of its own.
            is_ordered: matches!(self.to, Location::Stream),
            // What goes nowhere is read for its own sake.
            skips_holes: skips_holes && !self.options.no_sparse && !matches!(self.to, Location::Null),
            rate: self.options.bwlimit.filter(|&rate| rate > 0),
        }
    }
}
