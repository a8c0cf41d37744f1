//! Commands on paths: one layout for all of them.
//!
//! A path is `/EXPORT/path/beneath/it`, as of an open.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{
    Direction, FLAG_EXCLUSIVE, FLAG_REMOVE, FLAG_SET_MODE, FLAG_SET_SIZE, FLAG_SET_TIME, Layout, Opcode,
    PATH_BYTES_MAX, encode_padded,
};
use crate::error::Violation;
use crate::message::{BODY_BYTES_MAX, padded};

/// The longest extended attribute's name, in bytes.
pub const XATTR_NAME_BYTES_MAX: usize = 255;
/// A path and the second name of its command have at most this many bytes together.
pub const NAMES_BYTES_MAX: usize = BODY_BYTES_MAX - FIXED_BYTES;

const FIXED_BYTES: usize = 32;

/// Which fields of [`PathCommand`] an operation uses, beside the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathFields {
    /// A length: of the data, or the size that a file is to have.
    pub length: bool,
    /// Permissions.
    pub mode: bool,
    /// A time.
    pub time: bool,
    /// A second name.
    pub other: bool,
}

impl PathFields {
    /// None of them.
    pub const NONE: Self = Self { length: false, mode: false, time: false, other: false };
    /// A length.
    pub const LENGTH: Self = Self { length: true, ..Self::NONE };
    /// A second name.
    pub const OTHER: Self = Self { other: true, ..Self::NONE };
}

/// An operation on a path. What it does not use ([`PathFields`]) is 0 or empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathCommand<'a> {
    /// Which operation; one whose layout is [`Layout::Path`].
    pub opcode: Opcode,
    /// Its flags: `FLAG_*`.
    pub flags: u16,
    /// The permissions of what is created, or is to have them; at most 07777.
    pub mode: u32,
    /// How many bytes of data there are, or may come; of set_attributes the size.
    pub length: u64,
    /// The modification time, in nanoseconds since the Epoch.
    pub modified_ns: i64,
    /// Bytes without a zero among them, 1 to [`PATH_BYTES_MAX`].
    pub path: &'a [u8],
    /// The new path of a rename or a link, the target of a symbolic link, or the name of an extended
    /// attribute. Bytes without a zero among them.
    pub other: &'a [u8],
}

/// The fixed part. The path follows, and behind it the second name; both together are padded with zeros to a
/// multiple of 8.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fixed {
    opcode: U16,
    flags: U16,
    mode: U32,
    length: U64,
    modified_ns: I64,
    path_len: U16,
    other_len: U16,
    reserved: U32,
}

const _: () = assert!(size_of::<Fixed>() == FIXED_BYTES);

impl<'a> PathCommand<'a> {
    /// An operation on this path that needs nothing else.
    pub fn new(opcode: Opcode, path: &'a [u8]) -> Self {
        Self { opcode, flags: 0, mode: 0, length: 0, modified_ns: 0, path, other: &[] }
    }

    /// Whether it has this flag.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// The data that it brings to the client, and to the server, in bytes.
    pub(super) fn data_lengths(&self) -> (u32, u32) {
        match self.opcode.operation().direction {
            Direction::None => (0, 0),
            Direction::ToClient => (self.length as u32, 0),
            Direction::ToServer => (0, self.length as u32),
        }
    }

    /// Appends it in wire form.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        debug_assert!(self.path.len() <= PATH_BYTES_MAX);
        debug_assert!(self.path.len() + self.other.len() <= NAMES_BYTES_MAX);
        let fixed = Fixed {
            opcode: U16::new(self.opcode as u16),
            flags: U16::new(self.flags),
            mode: U32::new(self.mode),
            length: U64::new(self.length),
            modified_ns: I64::new(self.modified_ns),
            path_len: U16::new(self.path.len() as u16),
            other_len: U16::new(self.other.len() as u16),
            reserved: U32::ZERO,
        };
        if self.other.is_empty() {
            return encode_padded(fixed.as_bytes(), self.path, out);
        }
        encode_padded(fixed.as_bytes(), &[self.path, self.other].concat(), out);
    }

    /// Reads the command of this operation.
    pub(super) fn decode(opcode: Opcode, body: &'a [u8]) -> Result<Self, Violation> {
        let (fixed, rest) = Fixed::ref_from_prefix(body).map_err(|_| Violation::Length)?;
        let (path_len, other_len) = (usize::from(fixed.path_len.get()), usize::from(fixed.other_len.get()));
        if path_len == 0 || path_len > PATH_BYTES_MAX || rest.len() != padded(path_len + other_len) {
            return Err(Violation::Length);
        }
        let (path, rest) = rest.split_at(path_len);
        let (other, padding) = rest.split_at(other_len);
        let this = Self {
            opcode,
            flags: fixed.flags.get(),
            mode: fixed.mode.get(),
            length: fixed.length.get(),
            modified_ns: fixed.modified_ns.get(),
            path,
            other,
        };
        if fixed.reserved.get() != 0 || padding.iter().any(|&byte| byte != 0) {
            return Err(Violation::Reserved);
        }
        this.check().map(|()| this)
    }

    /// Whether it has what its operation uses, and nothing else.
    fn check(&self) -> Result<(), Violation> {
        let operation = self.opcode.operation();
        let Layout::Path(fields) = operation.layout else { return Err(Violation::Field) };
        if self.flags & !operation.flags != 0
            || (self.mode != 0 && !fields.mode)
            || (self.length != 0 && !fields.length)
            || (self.modified_ns != 0 && !fields.time)
            || (!self.other.is_empty() && !fields.other)
        {
            return Err(Violation::Reserved);
        }
        // What a flag says is to be set.
        let sets = |flag: u16| operation.flags & flag == 0 || self.has(flag);
        if (self.mode != 0 && !sets(FLAG_SET_MODE))
            || (self.modified_ns != 0 && !sets(FLAG_SET_TIME))
            || (self.length != 0 && !sets(FLAG_SET_SIZE))
        {
            return Err(Violation::Reserved);
        }
        if operation.direction != Direction::None && self.length > u32::MAX.into()
            || (fields.other && self.other.is_empty())
            || (self.opcode == Opcode::SetXattr && self.other.len() > XATTR_NAME_BYTES_MAX)
        {
            return Err(Violation::Length);
        }
        let removes = self.opcode == Opcode::SetXattr && self.has(FLAG_REMOVE);
        if self.mode & !0o7777 != 0
            || (removes && (self.has(FLAG_EXCLUSIVE) || self.length != 0))
            || self.path.contains(&0)
            || self.other.contains(&0)
        {
            return Err(Violation::Field);
        }
        Ok(())
    }
}
