//! Checksums of data, as the journal of a copy and `raio checksum` have them.

use crc_fast::CrcAlgorithm;

/// CRC32C of these bytes.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// CRC32C of bytes that come in pieces.
pub fn crc32c_digest() -> crc_fast::Digest {
    crc_fast::Digest::new(CrcAlgorithm::Crc32Iscsi)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_crc32c_whole_and_in_pieces() {
        // The check value of the catalogue of CRC algorithms.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let mut digest = crc32c_digest();
        digest.update(b"1234");
        digest.update(b"56789");
        assert_eq!(digest.finalize(), 0xe306_9283);
    }
}
