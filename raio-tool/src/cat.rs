//! `raio cat`: a file to standard output.

use std::ffi::OsString;

use clap::{Args, ValueHint};
use raio_transport::size;

use crate::failure::Failure;
use crate::global::Global;
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::place::{Sessions, Stream, open_source};
use crate::transfer::{self, Settings, Unwatched};

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// Files
    #[arg(required = true, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    paths: Vec<OsString>,
    /// Begin at this byte
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    offset: u64,
    /// This number of bytes at most [default: up to the end]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    length: Option<u64>,
}

pub fn run(global: &Global, options: &Options, interrupt: &Interrupt) -> Result<(), Failure> {
    let settings = Settings { is_ordered: true, ..Settings::default() };
    let stdout = Stream::output(interrupt.clone());
    let sessions = Sessions::new(global);
    for path in &options.paths {
        let location = Location::parse(path)?;
        let source = open_source(&sessions, &location, false, interrupt)?;
        let Some(size) = source.facts()?.size else {
            if options.offset != 0 || options.length.is_some() {
                let text = format!("{location} is a stream: it has no --offset and no --length.");
                return Err(Failure::usage(text));
            }
            transfer::run(&*source, &stdout, Some(0)..None, &[], &settings, &Unwatched, interrupt)?;
            continue;
        };
        let start = options.offset.min(size);
        let end = options.length.map_or(size, |length| start.saturating_add(length).min(size));
        transfer::run(&*source, &stdout, Some(start)..Some(end), &[], &settings, &Unwatched, interrupt)?;
    }
    Ok(())
}
