//! Contents of files: their checksums, and whether they are the same.

use std::path::Path;
use std::sync::Mutex;

use raio::{Checksum, ChecksumAlgorithm};
use raio_transport::message::{CrcDigest, crc_digest};
use raio_transport::sync::lock;

use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::place::{Place, Stream};
use crate::transfer::{self, Block, Settings, Verdict, Watcher};
use crate::tree::Tree;
use crate::tuning::SMALL_FILE_BYTES;

/// The checksum of a file and its size. Its server computes it if it can; else the file is read.
pub fn checksum(
    of: &dyn Place,
    algorithm: ChecksumAlgorithm,
    interrupt: &Interrupt,
) -> Result<(Checksum, u64), Failure> {
    if let Some(computed) = of.checksum(algorithm, interrupt)? {
        return Ok(computed);
    }
    let settings = Settings { is_ordered: true, ..Settings::default() };
    let (size, digesting) = (of.facts()?.size, Digesting(Mutex::new(Digest::new(algorithm))));
    let bytes = transfer::run(of, &Stream::null(), Some(0)..size, &[], &settings, &digesting, interrupt)?;
    let checksum = lock(&digesting.0).checksum();
    Ok((checksum, bytes))
}

/// The checksum of these bytes.
pub fn checksum_of(bytes: &[u8], algorithm: ChecksumAlgorithm) -> Checksum {
    let mut digest = Digest::new(algorithm);
    digest.update(bytes);
    digest.checksum()
}

/// Whether two files have the same hash. Both are read, or hashed by their servers, at the same time.
pub fn have_same_hash(one: &dyn Place, other: &dyn Place, interrupt: &Interrupt) -> Result<bool, Failure> {
    let hash = |of| checksum(of, ChecksumAlgorithm::Blake3, interrupt);
    let (a, b) = std::thread::scope(|scope| {
        let a = scope.spawn(|| hash(one));
        let b = hash(other);
        (a.join(), b)
    });
    let a = a.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    Ok(a == b?)
}

/// Whether two files of the same size have the same bytes.
pub fn same_contents(
    one: &mut dyn Tree,
    other: &mut dyn Tree,
    path: &Path,
    interrupt: &Interrupt,
) -> Result<bool, Failure> {
    let ((a, of_a), (b, of_b)) = (one.read(path, SMALL_FILE_BYTES)?, other.read(path, SMALL_FILE_BYTES)?);
    if a != b || of_a.size != of_b.size {
        return Ok(false);
    }
    if of_a.size == a.len() as u64 {
        return Ok(true);
    }
    have_same_hash(&*one.source(path)?, &*other.source(path)?, interrupt)
}

/// A checksum of what has been read so far.
enum Digest {
    Crc32c(Box<CrcDigest>),
    Blake3(Box<blake3::Hasher>),
}

impl Digest {
    fn new(algorithm: ChecksumAlgorithm) -> Self {
        match algorithm {
            ChecksumAlgorithm::Crc32c => Self::Crc32c(Box::new(crc_digest())),
            ChecksumAlgorithm::Blake3 => Self::Blake3(Box::default()),
        }
    }

    fn update(&mut self, data: &[u8]) {
        match self {
            Self::Crc32c(digest) => digest.update(data),
            Self::Blake3(hasher) => drop(hasher.update(data)),
        }
    }

    fn checksum(&self) -> Checksum {
        match self {
            Self::Crc32c(digest) => Checksum::Crc32c(digest.finalize() as u32),
            Self::Blake3(hasher) => Checksum::Blake3(hasher.finalize().into()),
        }
    }
}

/// Computes the checksum of blocks in their order.
struct Digesting(Mutex<Digest>);

impl Watcher for Digesting {
    fn read(&self, _: Block, data: &[u8]) -> Result<Verdict, Failure> {
        lock(&self.0).update(data);
        Ok(Verdict::Skip)
    }
}
