//! `raio du`: the sizes of what is beneath directories of a server, summed up.

use std::ffi::OsString;
use std::path::Path;

use clap::{Args, ValueHint};
use raio::DirEntry;
use serde::Serialize;

use crate::batch::Batch;
use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::output;
use crate::place::Sessions;
use crate::walk::{Visitor, Walk};

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// Directories of a server
    #[arg(required = true, value_name = "PATH", value_hint = ValueHint::DirPath)]
    paths: Vec<OsString>,
    /// Show directories down to this number of levels beneath; 0: only the sums
    #[arg(short = 'd', long, value_name = "NUMBER")]
    max_depth: Option<usize>,
}

/// A directory, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    path: String,
    /// Of the files, as they are long.
    size: u64,
    /// How many things are beneath, of any type.
    entries: u64,
}

/// What is in a directory and beneath it.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    size: u64,
    entries: u64,
}

impl Sum {
    fn add(&mut self, other: Self) {
        self.size += other.size;
        self.entries += other.entries;
    }
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let sessions = Sessions::new(global);
    Batch::each(&options.paths, |path| {
        let location = Location::parse_directory(path)?;
        let (session, path) = sessions.at(&location)?;
        let max_depth = options.max_depth.unwrap_or(usize::MAX);
        let mut summing = Summing {
            global,
            max_depth,
            location: &location,
            sums: vec![Sum::default()],
            batch: Batch::default(),
        };
        Walk { session: &session, location: &location, path }.run(&mut summing)?;
        let all = summing.sums.pop().unwrap_or_default();
        summing.show(&location, all)?;
        summing.batch.finish()
    })
}

struct Summing<'a> {
    global: &'a Global,
    max_depth: usize,
    location: &'a Location,
    /// Of the directories on the way to where the walk is.
    sums: Vec<Sum>,
    batch: Batch,
}

impl Visitor for Summing<'_> {
    fn found(&mut self, _: &Path, entry: &DirEntry, _: usize) -> Result<bool, Failure> {
        let size = if entry.is_file() { entry.size } else { 0 };
        if let Some(sum) = self.sums.last_mut() {
            sum.add(Sum { size, entries: 1 });
        }
        if entry.is_dir() {
            self.sums.push(Sum::default());
        }
        Ok(true)
    }

    fn left(&mut self, below: &Path, depth: usize) -> Result<(), Failure> {
        let sum = self.sums.pop().unwrap_or_default();
        if let Some(above) = self.sums.last_mut() {
            above.add(sum);
        }
        if depth <= self.max_depth { self.show(&self.location.join(below), sum) } else { Ok(()) }
    }

    fn failed(&mut self, failure: Failure) -> Result<(), Failure> {
        self.batch.note(Err(failure))
    }
}

impl Summing<'_> {
    fn show(&self, location: &Location, sum: Sum) -> Result<(), Failure> {
        if self.global.json {
            let (size, entries) = (sum.size, sum.entries);
            return output::print_json(&Report { path: location.to_string(), size, entries });
        }
        let size = output::size(sum.size, self.global.bytes);
        output::print(&format!("{size:>10}  {}\n", output::visible(&location.to_bytes())))
    }
}
