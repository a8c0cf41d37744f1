//! The content of the file that is read and written: every 64-bit word is a function of where it is.
//!
//! So each read can be checked by itself, writes leave the file as it was, and any number of programs may use
//! the file at once.

/// Offsets and lengths are multiples of this.
pub const WORD_BYTES: usize = 8;

/// The word with this number. No two are the same.
fn word(number: u64) -> u64 {
    // An odd factor and this shift can both be undone.
    let mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 32)
}

/// Writes what is at `offset`.
pub fn fill(offset: u64, bytes: &mut [u8]) {
    for (bytes, number) in bytes.chunks_exact_mut(WORD_BYTES).zip(offset / WORD_BYTES as u64..) {
        bytes.copy_from_slice(&word(number).to_le_bytes());
    }
}

/// Whether this is what is at `offset`. If not, where the first wrong byte is.
pub fn check(offset: u64, bytes: &[u8]) -> Result<(), u64> {
    for (found, number) in bytes.chunks_exact(WORD_BYTES).zip(offset / WORD_BYTES as u64..) {
        let right = word(number).to_le_bytes();
        if found != right {
            let at = found.iter().zip(right).take_while(|(found, right)| **found == *right).count();
            return Err(number * WORD_BYTES as u64 + at as u64);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_is_read_wherever_the_read_begins() {
        let mut whole = vec![0; 4096];
        fill(1 << 40, &mut whole);
        for from in (0..4096).step_by(WORD_BYTES) {
            assert_eq!(check((1 << 40) + from, &whole[from as usize..]), Ok(()));
        }
    }

    #[test]
    fn every_wrong_byte_is_found_and_named() {
        let mut bytes = vec![0; 512];
        for at in 0..512 {
            fill(4096, &mut bytes);
            bytes[at] ^= 1;
            assert_eq!(check(4096, &bytes), Err(4096 + at as u64));
        }
    }

    #[test]
    fn another_place_s_content_is_wrong_from_its_first_word_on() {
        let mut bytes = vec![0; 512];
        fill(512, &mut bytes);
        assert!(check(0, &bytes).is_err_and(|at| at < 8));
        assert!(check(1 << 32, &bytes).is_err_and(|at| at < (1 << 32) + 8));
    }
}
