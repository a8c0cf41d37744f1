//! A number of bytes in the configuration.

use std::str::FromStr;

use raio_transport::size;
use serde::Deserialize;

/// A number of bytes: `4096`, `64k`, `1M`, `2G`, `1T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "SizeText")]
pub struct Size(pub u64);

#[derive(Deserialize)]
#[serde(untagged, expecting = "A size is a number of bytes such as 4096, or text such as \"64k\" or \"1G\".")]
enum SizeText {
    Number(u64),
    Text(String),
}

impl TryFrom<SizeText> for Size {
    type Error = String;

    fn try_from(text: SizeText) -> Result<Self, String> {
        match text {
            SizeText::Number(bytes) => Ok(Self(bytes)),
            SizeText::Text(text) => text.parse(),
        }
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        size::parse(text).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_numbers_with_a_unit() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("64k", 64 << 10), ("1M", 1 << 20), ("2g", 2 << 30), ("1T", 1 << 40)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "k", "-1", "1.5M", "+1", "1kB", "0x10", "9999999T", "18446744073709551616", "ä"] {
            assert!(text.parse::<Size>().unwrap_err().ends_with('.'), "{text}");
        }
    }
}
