//! `raio cp -r`: copies directories.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde::Serialize;

use super::Options;
use crate::failure::Failure;
use crate::global::Global;
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::mirror::{Comparison, Counts, Mirror, Plan};
use crate::output;
use crate::progress::Progress;
use crate::transfer::Settings;
use crate::tuning::TREE_THREADS;

/// What a copy of a directory came to, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report<'a> {
    source: String,
    destination: String,
    #[serde(flatten)]
    counts: &'a Counts,
    seconds: f64,
    bytes_per_second: f64,
}

/// Copies a directory with all that is in it. `is_named`: the user has named the destination itself, which
/// may be a link to a directory.
pub fn copy(
    global: &Global,
    options: &Options,
    from: &Location,
    to: &Location,
    is_named: bool,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    for (is_set, option) in [
        (options.inplace, "--inplace"),
        (options.destination_is_zero, "--destination-is-zero"),
        (options.no_sparse, "--no-sparse"),
    ] {
        if is_set {
            return Err(Failure::usage(format!(
                "{option} is for single files, and {from} is a directory. Leave it out, or copy files one by \
                 one."
            )));
        }
    }
    let started = Instant::now();
    let rate = options.bwlimit.filter(|&rate| rate > 0);
    let plan = Plan {
        // What is complete has the time of its source.
        comparison: if options.resume { Comparison::SizeAndTime } else { Comparison::None },
        deletes: false,
        is_dry: false,
        preserves: options.preserve || options.resume,
        follows: options.dereference,
        is_durable: options.fsync,
        resumes: options.resume,
        verifies: options.verify,
        fails_fast: options.fail_fast,
        exclude: options.exclude.clone(),
        // A rate is one thread's.
        threads: if rate.is_some() { 1 } else { options.connections.unwrap_or(TREE_THREADS).into() },
        settings: Settings {
            block_bytes: options.block_size,
            depth: options.depth.into(),
            skips_holes: true,
            rate,
            ..Settings::default()
        },
    };
    let progress = Arc::new(Progress::new(options.progress, "copy", None));
    let counts = Counts::default();
    let ended =
        Mirror { global, plan: &plan, from, to, is_to_followed: is_named, progress: &progress, interrupt }
            .run(&counts);
    if global.json && counts.directories.load(Ordering::Relaxed) > 0 {
        let elapsed = started.elapsed();
        output::print_json(&Report {
            source: from.to_string(),
            destination: to.to_string(),
            counts: &counts,
            seconds: elapsed.as_secs_f64(),
            bytes_per_second: output::per_second(counts.copied_bytes.load(Ordering::Relaxed), elapsed),
        })?;
    }
    ended
}
