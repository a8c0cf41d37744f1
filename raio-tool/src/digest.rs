//! `raio checksum`: the checksums of files.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Mutex;

use clap::{Args, ValueEnum, ValueHint};
use raio::{Checksum, ChecksumAlgorithm};
use raio_transport::message::{CrcDigest, crc_digest};
use raio_transport::sync::lock;
use serde::Serialize;

use crate::failure::Failure;
use crate::global::Global;
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::output;
use crate::place::{Place, Sessions, Stream, open_source};
use crate::transfer::{self, Block, Settings, Verdict, Watcher};
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
    /// 32 bits, which find every accident and no forgery
    Crc32c,
    /// 256 bits, which find forgeries, too
    #[default]
    Blake3,
}

/// A result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report<'a> {
    path: String,
    algorithm: Algorithm,
    checksum: &'a str,
    bytes: u64,
}

/// Computes the checksum of blocks in their order.
struct Digesting(Mutex<Digest>);

enum Digest {
    Crc32c(Box<CrcDigest>),
    Blake3(Box<blake3::Hasher>),
}

impl Watcher for Digesting {
    fn read(&self, _: Block, data: &[u8]) -> Result<Verdict, Failure> {
        lock(&self.0).update(data);
        Ok(Verdict::Skip)
    }
}

impl Algorithm {
    fn digest(self) -> Digest {
        match self {
            Self::Crc32c => Digest::Crc32c(Box::new(crc_digest())),
            Self::Blake3 => Digest::Blake3(Box::default()),
        }
    }
}

impl Digest {
    fn update(&mut self, data: &[u8]) {
        match self {
            Self::Crc32c(digest) => digest.update(data),
            Self::Blake3(hasher) => drop(hasher.update(data)),
        }
    }

    fn letters(&self) -> String {
        match self {
            Self::Crc32c(digest) => format!("{:08x}", digest.finalize()),
            Self::Blake3(hasher) => hasher.finalize().to_hex().to_string(),
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
                        let mut digest = options.algorithm.digest();
                        digest.update(&bytes);
                        tell(global, options, &location, &digest.letters(), now.size)?;
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
    let algorithm = match options.algorithm {
        Algorithm::Crc32c => ChecksumAlgorithm::Crc32c,
        Algorithm::Blake3 => ChecksumAlgorithm::Blake3,
    };
    let (checksum, bytes) = match source.checksum(algorithm, interrupt)? {
        Some((Checksum::Crc32c(crc), bytes)) => (format!("{crc:08x}"), bytes),
        Some((Checksum::Blake3(hash), bytes)) => (blake3::Hash::from(hash).to_hex().to_string(), bytes),
        None => read(options.algorithm, source, interrupt)?,
    };
    tell(global, options, location, &checksum, bytes)
}

/// Reads a file, for its checksum in letters and its length.
fn read(algorithm: Algorithm, source: &dyn Place, interrupt: &Interrupt) -> Result<(String, u64), Failure> {
    let settings = Settings { is_ordered: true, ..Settings::default() };
    let size = source.facts()?.size;
    let digesting = Digesting(Mutex::new(algorithm.digest()));
    let null = Stream::null();
    let bytes = transfer::run(source, &null, Some(0)..size, &[], &settings, &digesting, interrupt)?;
    let checksum = lock(&digesting.0).letters();
    Ok((checksum, bytes))
}

fn tell(
    global: &Global,
    options: &Options,
    location: &Location,
    checksum: &str,
    bytes: u64,
) -> Result<(), Failure> {
    if global.json {
        let (path, algorithm) = (location.to_string(), options.algorithm);
        return output::print_json(&Report { path, algorithm, checksum, bytes });
    }
    output::print_bytes(&[checksum.as_bytes(), b"  ", &location.to_bytes(), b"\n"].concat())
}
