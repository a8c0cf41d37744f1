//! `raio checksum`: the checksums of files.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};
use raio::{Checksum, ChecksumAlgorithm};
use serde::Serialize;

use crate::contents::{self, checksum_of};
use crate::failure::Failure;
use crate::global::Global;
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::output;
use crate::place::{Place, Sessions, open_source};
use crate::tree::{self, Access};
use crate::tuning::SMALL_FILE_BYTES;

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// Files
    #[arg(required = true, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    paths: Vec<OsString>,
    /// Of directories, those of all files that are in them
    #[arg(short, long)]
    recursive: bool,
    /// Which checksum
    #[arg(long, value_enum, default_value_t, value_name = "NAME")]
    algorithm: Algorithm,
}

/// A checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Algorithm {
    /// 32 bits: detects accidental corruption, not tampering
    Crc32c,
    /// 256 bits, which find forgeries, too
    #[default]
    Blake3,
}

/// A result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    path: String,
    algorithm: Algorithm,
    checksum: String,
    bytes: u64,
}

impl From<Algorithm> for ChecksumAlgorithm {
    fn from(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Crc32c => Self::Crc32c,
            Algorithm::Blake3 => Self::Blake3,
        }
    }
}

pub fn run(global: &Global, options: &Options, interrupt: &Interrupt) -> Result<(), Failure> {
    let sessions = Sessions::new(global);
    for path in &options.paths {
        let location = Location::parse(path)?;
        if options.recursive && sessions.is_directory(&location)? {
            every(global, options, &location, interrupt)?;
        } else {
            let source = open_source(&sessions, &location, false, interrupt)?;
            show(global, options, &location, &*source, interrupt)?;
        }
    }
    Ok(())
}

/// The files in a directory and beneath, in the order of names.
fn every(
    global: &Global,
    options: &Options,
    location: &Location,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let access = Access { follows: false, is_root_followed: true, tag: String::new() };
    let mut tree = tree::open(global, location, &access)?;
    let mut rest = vec![PathBuf::new()];
    while let Some(directory) = rest.pop() {
        let mut directories = Vec::new();
        for entry in tree.entries(&directory)? {
            let path = directory.join(&entry.name);
            if entry.is_dir() {
                directories.push(path);
            } else if entry.is_file() {
                interrupt.check()?;
                let location = location.join(&path);
                if entry.size <= SMALL_FILE_BYTES {
                    let (bytes, now) = tree.read(&path, SMALL_FILE_BYTES)?;
                    if now.size == bytes.len() as u64 {
                        let checksum = checksum_of(&bytes, options.algorithm.into());
                        tell(global, options, &location, checksum, now.size)?;
                        continue;
                    }
                }
                show(global, options, &location, &*tree.source(&path)?, interrupt)?;
            }
        }
        rest.extend(directories.into_iter().rev());
    }
    Ok(())
}

/// Computes the checksum of one file, and prints it.
fn show(
    global: &Global,
    options: &Options,
    location: &Location,
    source: &dyn Place,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let (checksum, bytes) = contents::checksum(source, options.algorithm.into(), interrupt)?;
    tell(global, options, location, checksum, bytes)
}

fn tell(
    global: &Global,
    options: &Options,
    location: &Location,
    checksum: Checksum,
    bytes: u64,
) -> Result<(), Failure> {
    let checksum = hex(checksum);
    if global.json {
        let (path, algorithm) = (location.to_string(), options.algorithm);
        return output::print_json(&Report { path, algorithm, checksum, bytes });
    }
    output::print_bytes(&[checksum.as_bytes(), b"  ", &location.to_bytes(), b"\n"].concat())
}

fn hex(checksum: Checksum) -> String {
    match checksum {
        Checksum::Crc32c(crc) => format!("{crc:08x}"),
        Checksum::Blake3(hash) => blake3::Hash::from(hash).to_hex().to_string(),
    }
}
