//! Checksums of ranges of files. Reading is by blocking system calls: for a thread of the pool.

use std::fmt;
use std::os::fd::AsFd;

use raio_transport::message::{CrcDigest, crc_digest};
use raio_transport::protocol::{FLAG_BLAKE3, FLAG_CRC32C};
use rustix::fs::OFlags;
use rustix::io::{Errno, retry_on_intr};

use crate::syscalls::without_direct;
use crate::tuning::ranges::{BUFFER_BYTES, PIECE_BYTES};

/// A checksum of what has been read so far.
#[derive(Clone)]
pub enum Checksum {
    /// CRC32C (Castagnoli).
    Crc32c(Box<CrcDigest>),
    /// BLAKE3.
    Blake3(Box<blake3::Hasher>),
}

impl Checksum {
    /// Of nothing, by the flag of the protocol. None: there is no such checksum.
    pub fn new(flag: u16) -> Option<Self> {
        match flag {
            FLAG_CRC32C => Some(Self::Crc32c(Box::new(crc_digest()))),
            FLAG_BLAKE3 => Some(Self::Blake3(Box::default())),
            _ => None,
        }
    }

    /// Reads up to a piece of a range, and takes it in. Returns how many bytes; fewer than a piece, and than
    /// the length, at the end of the file.
    pub fn read(&mut self, fd: impl AsFd, offset: u64, length: u64) -> Result<usize, Errno> {
        let length = length.min(PIECE_BYTES) as usize;
        let buffered = without_direct(&fd, OFlags::RDONLY)?;
        let fd = buffered.as_ref().map_or(fd.as_fd(), AsFd::as_fd);
        let mut buffer = vec![0; length.min(BUFFER_BYTES)];
        let mut done = 0;
        while done < length {
            let room = buffer.len().min(length - done);
            match retry_on_intr(|| rustix::io::pread(fd, &mut buffer[..room], offset + done as u64))? {
                0 => break,
                n => {
                    self.update(&buffer[..n]);
                    done += n;
                }
            }
        }
        Ok(done)
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Crc32c(digest) => digest.update(bytes),
            Self::Blake3(hasher) => {
                hasher.update(bytes);
            }
        }
    }

    /// As the protocol has it, padded to a multiple of 8 bytes.
    pub fn to_wire(&self) -> Vec<u8> {
        match self {
            Self::Crc32c(digest) => digest.finalize().to_le_bytes().to_vec(),
            Self::Blake3(hasher) => hasher.finalize().as_bytes().to_vec(),
        }
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Crc32c(_) => "Crc32c",
            Self::Blake3(_) => "Blake3",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_goes_on_from_piece_to_piece() {
        let bytes: Vec<u8> = (0..2 * PIECE_BYTES + 1000).map(|n| (n % 251) as u8).collect();
        let file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut &file, &bytes).unwrap();
        for flag in [FLAG_CRC32C, FLAG_BLAKE3] {
            let mut checksum = Checksum::new(flag).unwrap();
            let mut done = 0;
            loop {
                let n = checksum.read(&file, 7 + done as u64, u64::MAX).unwrap();
                done += n;
                if (n as u64) < PIECE_BYTES {
                    break;
                }
            }
            assert_eq!(done, bytes.len() - 7);
            let mut whole = Checksum::new(flag).unwrap();
            whole.update(&bytes[7..]);
            assert_eq!(checksum.to_wire(), whole.to_wire());
        }
    }

    #[test]
    fn checksums_are_those_of_their_names() {
        let mut crc = Checksum::new(FLAG_CRC32C).unwrap();
        crc.update(b"123456789");
        // The check value of the catalogue of CRC algorithms.
        assert_eq!(crc.to_wire(), [0x83, 0x92, 0x06, 0xe3, 0, 0, 0, 0]);
        let blake3 = Checksum::new(FLAG_BLAKE3).unwrap();
        assert_eq!(blake3.to_wire()[..4], [0xaf, 0x13, 0x49, 0xb9], "of no bytes");
        for flag in [0, FLAG_CRC32C | FLAG_BLAKE3, 4] {
            assert!(Checksum::new(flag).is_none());
        }
    }
}
