//! The bytes of a command, a result or a one-way message.

/// A short run of bytes: in place up to 32, in a box beyond, so that the requests that matter allocate
/// nothing.
#[derive(Clone, Debug)]
pub enum Body {
    /// Up to 32 bytes.
    Short([u8; 32], u8),
    /// More.
    Long(Box<[u8]>),
}

impl From<&[u8]> for Body {
    fn from(bytes: &[u8]) -> Self {
        if bytes.len() <= 32 {
            let mut short = [0; 32];
            short[..bytes.len()].copy_from_slice(bytes);
            Self::Short(short, bytes.len() as u8)
        } else {
            Self::Long(bytes.into())
        }
    }
}

impl Default for Body {
    /// None.
    #[inline]
    fn default() -> Self {
        Self::Short([0; 32], 0)
    }
}

impl std::ops::Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Short(bytes, len) => &bytes[..usize::from(*len)],
            Self::Long(bytes) => bytes,
        }
    }
}
