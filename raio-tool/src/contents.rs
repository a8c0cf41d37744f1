//! Compares the contents of files of two trees.

use std::path::Path;
use std::sync::Mutex;

use raio::{Checksum, ChecksumAlgorithm};
use raio_transport::sync::lock;

use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::place::{Place, Stream};
use crate::transfer::{self, Block, Settings, Verdict, Watcher};
use crate::tree::Tree;
use crate::tuning::SMALL_FILE_BYTES;

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
    Ok(hash(&*one.source(path)?, interrupt)? == hash(&*other.source(path)?, interrupt)?)
}

/// Computes a hash of blocks in their order.
struct Hashing(Mutex<blake3::Hasher>);

impl Watcher for Hashing {
    fn read(&self, _: Block, data: &[u8]) -> Result<Verdict, Failure> {
        lock(&self.0).update(data);
        Ok(Verdict::Skip)
    }
}

/// The hash of a file, which its server computes if it can.
pub fn hash(of: &dyn Place, interrupt: &Interrupt) -> Result<blake3::Hash, Failure> {
    if let Some((Checksum::Blake3(hash), _)) = of.checksum(ChecksumAlgorithm::Blake3, interrupt)? {
        return Ok(hash.into());
    }
    let settings = Settings { is_ordered: true, ..Settings::default() };
    let (size, hashing) = (of.facts()?.size, Hashing(Mutex::default()));
    transfer::run(of, &Stream::null(), Some(0)..size, &[], &settings, &hashing, interrupt)?;
    Ok(lock(&hashing.0).finalize())
}
