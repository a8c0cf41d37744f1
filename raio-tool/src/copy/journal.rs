//! The journal of a copy: which blocks are at the destination, and their checksums. By it an interrupted copy
//! goes on, after it has compared what is there with the checksums. What the journal says alone proves
//! nothing: after a power failure blocks may be missing that it has.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use raio_transport::message::data_crc;
use raio_transport::sync::lock;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// Bytes of a record: the block's number, its checksum, and the checksum of these two.
const RECORD_BYTES: usize = 16;

/// What a journal is of. Another source, or one that was changed, makes it useless.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// Of this format: 1.
    pub version: u32,
    /// As the user calls the source.
    pub source: String,
    /// In bytes.
    pub size: u64,
    /// Last change of its contents, in nanoseconds since the epoch.
    pub modified_ns: i64,
    /// Its device and inode number.
    pub identity: (u64, u64),
    /// Bytes of a block.
    pub block_bytes: u64,
}

/// A journal that is written.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: Mutex<File>,
}

impl Journal {
    /// Begins a new one with these blocks, in the place of any that is there, which stays until the new one
    /// is whole. Only one program has it at a time.
    pub fn create(path: &Path, subject: &Subject, blocks: &[(u64, u32)]) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| {
            Failure::io(format!("Cannot write the journal {}", path.display()), &error)
        };
        let mut bytes = serde_json::to_vec(subject).map_err(|error| failed(error.into()))?;
        bytes.push(b'\n');
        bytes.extend(blocks.iter().flat_map(|&(number, crc)| encode(number, crc)));
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        let busy = |_| {
            Failure::new(format!(
                "Another raio cp does the same: it has the journal {}. Wait until it has ended, or stop it.",
                path.display()
            ))
        };
        if let Ok(old) = File::open(path) {
            flock(&old, FlockOperation::NonBlockingLockExclusive).map_err(busy)?;
        }
        let new = path.with_extension("new");
        let mut options = OpenOptions::new();
        let mut file =
            options.write(true).create(true).truncate(true).mode(0o600).open(&new).map_err(failed)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(busy)?;
        file.write_all(&bytes).map_err(failed)?;
        std::fs::rename(&new, path).map_err(failed)?;
        Ok(Self { path: path.to_owned(), file: Mutex::new(file) })
    }

    /// The blocks of an earlier copy of the same, with their checksums, in the order in which they were
    /// copied. None if there is no journal, or it is of something else.
    pub fn read(path: &Path, subject: &Subject) -> Option<Vec<(u64, u32)>> {
        let mut bytes = Vec::new();
        File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)).ok()?;
        let end = bytes.iter().position(|&byte| byte == b'\n')?;
        let found: Subject = serde_json::from_slice(&bytes[..end]).ok()?;
        // The last record may have been cut off.
        (found == *subject).then(|| bytes[end + 1..].chunks_exact(RECORD_BYTES).filter_map(decode).collect())
    }

    /// A block is at the destination.
    pub fn add(&self, number: u64, crc: u32) -> Result<(), Failure> {
        let mut file = lock(&self.file);
        file.write_all(&encode(number, crc))
            .map_err(|error| Failure::io(format!("Cannot write the journal {}", self.path.display()), &error))
    }
}

fn encode(number: u64, crc: u32) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    record[..8].copy_from_slice(&number.to_le_bytes());
    record[8..12].copy_from_slice(&crc.to_le_bytes());
    let check = data_crc(&record[..12]);
    record[12..].copy_from_slice(&check.to_le_bytes());
    record
}

fn decode(record: &[u8]) -> Option<(u64, u32)> {
    let number = u64::from_le_bytes(record.get(..8)?.try_into().ok()?);
    let crc = u32::from_le_bytes(record.get(8..12)?.try_into().ok()?);
    let check = u32::from_le_bytes(record.get(12..16)?.try_into().ok()?);
    (check == data_crc(&record[..12])).then_some((number, crc))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject() -> Subject {
        Subject {
            version: 1,
            source: ":/e/f".into(),
            size: 10,
            modified_ns: 5,
            identity: (1, 2),
            block_bytes: 3,
        }
    }

    #[test]
    fn what_was_noted_is_found_again_up_to_a_record_that_was_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        assert_eq!(Journal::read(&path, &subject()), None);
        let journal = Journal::create(&path, &subject(), &[(2, 77)]).unwrap();
        for (number, crc) in [(0, 5), (u64::MAX, u32::MAX)] {
            journal.add(number, crc).unwrap();
        }
        let all = vec![(2, 77), (0, 5), (u64::MAX, u32::MAX)];
        assert_eq!(Journal::read(&path, &subject()), Some(all.clone()));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.truncate(bytes.len() - 1);
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(Journal::read(&path, &subject()), Some(all[..2].to_vec()));
        let at = bytes.len() - RECORD_BYTES;
        bytes[at] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(Journal::read(&path, &subject()).unwrap().len(), 1, "a damaged record counts for nothing");
    }

    #[test]
    fn a_journal_has_one_writer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let first = Journal::create(&path, &subject(), &[]).unwrap();
        let second = Journal::create(&path, &subject(), &[]).unwrap_err();
        assert!(second.to_string().contains("Another raio cp"), "{second}");
        drop(first);
        Journal::create(&path, &subject(), &[]).unwrap();
    }

    #[test]
    fn a_journal_of_something_else_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        Journal::create(&path, &subject(), &[(0, 1)]).unwrap();
        assert_eq!(Journal::read(&path, &Subject { modified_ns: 6, ..subject() }), None);
        assert_eq!(Journal::read(&path, &Subject { block_bytes: 4, ..subject() }), None);
        std::fs::write(&path, "no journal").unwrap();
        assert_eq!(Journal::read(&path, &subject()), None);
    }
}
