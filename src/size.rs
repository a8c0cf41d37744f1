//! Sizes as people write them.

/// A number of bytes, or one with k, M, G or T behind it; at most what an offset can be. The error is a
/// sentence.
pub fn parse(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last().map(u8::to_ascii_lowercase) {
        Some(b'k') => (&text[..text.len() - 1], 10),
        Some(b'm') => (&text[..text.len() - 1], 20),
        Some(b'g') => (&text[..text.len() - 1], 30),
        Some(b't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse::<u64>().ok()).flatten();
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|&bytes| i64::try_from(bytes).is_ok())
        .ok_or_else(|| {
            format!("{text:?} is not a size. Write a number of bytes, or one with k, M, G or T behind it.")
        })
}
