//! `raio discard`: gives a range of a file or device back to the storage.

use std::ffi::OsString;

use clap::{Args, ValueHint};
use raio::Operation;
use raio_transport::size;
use serde::Serialize;

use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::output;
use crate::place::{LocalFile, Place, RemoteFile};

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// A file or device. What is in the range is lost
    #[arg(value_name = "PATH", value_hint = ValueHint::AnyPath)]
    path: OsString,
    /// Begin at this byte
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    offset: u64,
    /// This number of bytes
    #[arg(long, value_name = "SIZE", value_parser = size::parse, required_unless_present = "all")]
    length: Option<u64>,
    /// All of it from the offset on
    #[arg(long, conflicts_with = "length")]
    all: bool,
}

/// The result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    path: String,
    offset: u64,
    bytes: u64,
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let location = Location::parse(&options.path)?;
    let range = |place: &dyn Place| {
        let size = place.facts()?.size.unwrap_or(0);
        let end = options.length.map_or(size, |length| options.offset.saturating_add(length));
        if options.offset >= end.min(size) {
            return Err(Failure::usage(format!(
                "{location} has {size} bytes, so there is nothing at {} to discard.",
                options.offset
            )));
        }
        Ok(options.offset..end.min(size))
    };
    let range = match &location {
        Location::Local(path) => {
            // It is not to be made.
            std::fs::metadata(path)
                .map_err(|error| Failure::io(format!("Cannot open {location}"), &error))?;
            let file = LocalFile::open_in_place(path, 0o600)?;
            let range = range(&file)?;
            file.zero(range.clone())?;
            range
        }
        Location::Remote { .. } => {
            let file = RemoteFile::open(global, &location, libc::O_RDWR, 0)?;
            let range = range(&file)?;
            let (offset, length) = (range.start, range.end - range.start);
            file.call("discard a range of", Operation::Discard { offset, length })?;
            range
        }
        Location::Stream | Location::Null => {
            return Err(Failure::usage(format!("{location} has nothing to discard. Name a file or device.")));
        }
    };
    let bytes = range.end - range.start;
    if global.json {
        output::print_json(&Report { path: location.to_string(), offset: range.start, bytes })?;
    }
    Ok(())
}
