//! What rdma_cm's messages carry in private data: magic, then versions or an errno, then perhaps an error
//! message.
//!
//! It stands alone and uses nothing of a device, so that the fuzzer can compile it.

use crate::message::{self, MAGIC, VERSION};

/// Magic, versions or an errno, and zeros.
const PRIVATE_BYTES: usize = 16;
/// InfiniBand's rejections have room for 148 bytes.
const REJECTION_TEXT_BYTES: usize = 128;

/// The private data with which a client asks for a connection.
pub fn request() -> [u8; PRIVATE_BYTES] {
    let mut bytes = [0; PRIVATE_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
    bytes[10..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes
}

/// Whether a client that asked for a connection with this speaks raio, in a version that this side does. If
/// not, the errno and the error message of the rejection.
pub fn check_request(private: &[u8]) -> Result<(), (i32, String)> {
    if private.len() < PRIVATE_BYTES || private[..8] != MAGIC {
        return Err((libc::EPROTO, "The peer does not speak raio.".to_owned()));
    }
    let version = |at: usize| u16::from_le_bytes([private[at], private[at + 1]]);
    let (min, max) = (version(8), version(10));
    if (min..=max).contains(&VERSION) {
        return Ok(());
    }
    let violation = crate::Violation::Version { min, max, ours: VERSION };
    Err((violation.errno(), format!("{violation}.")))
}

/// The private data with which a server turns a client away.
pub fn rejection(errno: i32, text: &str) -> Vec<u8> {
    let mut end = text.len().min(REJECTION_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&(errno as u16).to_le_bytes());
    bytes.resize(PRIVATE_BYTES, 0);
    bytes.extend_from_slice(&text.as_bytes()[..end]);
    bytes
}

/// What a server said when it turned this client away.
pub fn parse_rejection(private: &[u8]) -> Option<(i32, String)> {
    if private.len() < PRIVATE_BYTES || private[..8] != MAGIC {
        return None;
    }
    let errno = i32::from(u16::from_le_bytes([private[8], private[9]]));
    (1..=message::ERRNO_MAX).contains(&errno).then(|| (errno, message::text(&private[PRIVATE_BYTES..])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rejection_carries_its_reason() {
        let long = "ä".repeat(200);
        for text in ["No.", &long] {
            let bytes = rejection(libc::EPROTO, text);
            assert!(bytes.len() <= 148);
            let (errno, said) = parse_rejection(&bytes).unwrap();
            assert_eq!(errno, libc::EPROTO);
            assert!(text.starts_with(&said) && !said.is_empty());
        }
        assert_eq!(parse_rejection(b"somebody else's words"), None);
        assert_eq!(parse_rejection(&[]), None);
    }
}
