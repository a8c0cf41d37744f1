//! `raio sync`: makes a directory like another one, by copying what differs.

use std::ffi::OsString;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use clap::{Args, ValueHint};
use serde::Serialize;

use crate::copy::can_keep_journals;
use crate::failure::Failure;
use crate::global::Global;
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::mirror::{Comparison, Counts, Mirror, Plan};
use crate::output;
use crate::pattern::Pattern;
use crate::progress::{Progress, Style};
use crate::transfer::Settings;
use crate::tuning::TREE_THREADS;

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// The source directory
    #[arg(value_name = "SOURCE", value_hint = ValueHint::DirPath)]
    from: OsString,
    /// The destination directory; it is created if it does not exist
    #[arg(value_name = "DESTINATION", value_hint = ValueHint::DirPath)]
    to: OsString,
    /// Delete extraneous files from the destination: those that do not exist in the source
    #[arg(long)]
    delete: bool,
    /// Show what would be done, and change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Compare the contents of files of the same size, rather than their times
    #[arg(long)]
    checksum: bool,
    /// Exclude files that match this pattern: they are neither copied nor removed
    #[arg(long, value_name = "PATTERN", value_parser = Pattern::parse)]
    exclude: Vec<Pattern>,
    /// Copy the targets of symbolic links, rather than the links
    #[arg(short = 'L', long)]
    dereference: bool,
    /// Flush each file to stable storage (fsync) before it is renamed into place
    #[arg(long)]
    fsync: bool,
    /// Stop at the first error, rather than continue with the other files
    #[arg(long)]
    fail_fast: bool,
    /// Threads, each with connections of its own
    #[arg(long, value_name = "NUMBER", default_value_t = TREE_THREADS)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=64))]
    connections: u16,
    /// How progress is shown, on standard error
    #[arg(long, value_enum, default_value_t, value_name = "STYLE")]
    progress: Style,
}

/// What it came to, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report<'a> {
    source: String,
    destination: String,
    #[serde(flatten)]
    counts: &'a Counts,
    seconds: f64,
}

pub fn run(global: &Global, options: &Options, interrupt: &Interrupt) -> Result<(), Failure> {
    let started = Instant::now();
    let (from, to) = (Location::parse(&options.from)?, Location::parse(&options.to)?);
    let plan = Plan {
        comparison: if options.checksum { Comparison::Contents } else { Comparison::SizeAndTime },
        deletes: options.delete,
        is_dry: options.dry_run,
        preserves: true,
        follows: options.dereference,
        is_durable: options.fsync,
        resumes: can_keep_journals(),
        verifies: false,
        fails_fast: options.fail_fast,
        exclude: options.exclude.clone(),
        threads: options.connections.into(),
        settings: Settings { skips_holes: true, ..Settings::default() },
    };
    let style = if options.dry_run { Style::Never } else { options.progress };
    let progress = Arc::new(Progress::new(style, "sync", None));
    let counts = Counts::default();
    let mirror = Mirror {
        global,
        plan: &plan,
        from: &from,
        to: &to,
        is_to_followed: true,
        progress: &progress,
        interrupt,
    };
    let ended = mirror.run(&counts);
    let was_begun = counts.directories.load(Ordering::Relaxed) > 0;
    match was_begun {
        true if global.json => output::print_json(&Report {
            source: from.to_string(),
            destination: to.to_string(),
            counts: &counts,
            seconds: started.elapsed().as_secs_f64(),
        })?,
        true => output::print(&counts.text(global.bytes))?,
        false => {}
    }
    ended
}
