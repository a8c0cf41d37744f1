//! What the answers to operations on directories and file systems bring.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::Violation;
use crate::message::padded;

/// The longest name in a directory, in bytes.
const NAME_BYTES_MAX: usize = 255;

/// An entry of a directory, as it was when the directory was read. That of a symbolic
/// link has the status of the link itself, not that of its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectoryEntry<'a> {
    /// Its name: 1 to 255 bytes, no zero byte and no `/`. Names need not be UTF-8.
    pub name: &'a [u8],
    /// Type and permissions, as `st_mode`; the type alone if `has_status` is false.
    pub mode: u32,
    /// Length in bytes; of a block device 0.
    pub size: u64,
    /// Last change of the contents, in nanoseconds since the Epoch.
    pub modified_ns: i64,
    /// Inode number.
    pub inode: u64,
    /// Whether size, time and permissions are known.
    pub has_status: bool,
}

/// The fixed part of an entry. The name follows, padded with zeros to a multiple of 8.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fixed {
    size: U64,
    modified_ns: I64,
    inode: U64,
    mode: U32,
    name_len: U16,
    flags: U16,
}

const _: () = assert!(size_of::<Fixed>() == 32);

/// Flag of an entry: nothing is known of it but its type.
const FLAG_NO_STATUS: u16 = 1 << 0;

impl DirectoryEntry<'_> {
    /// Its length in wire form.
    pub fn wire_len(&self) -> usize {
        padded(size_of::<Fixed>() + self.name.len())
    }
}

/// Writes an entry in wire form to the front of `to`. Returns its length there; None if there is no room.
pub fn push_entry(entry: &DirectoryEntry<'_>, to: &mut [u8]) -> Option<usize> {
    let len = entry.wire_len();
    let to = to.get_mut(..len)?;
    let fixed = Fixed {
        size: U64::new(entry.size),
        modified_ns: I64::new(entry.modified_ns),
        inode: U64::new(entry.inode),
        mode: U32::new(entry.mode),
        name_len: U16::new(entry.name.len() as u16),
        flags: U16::new(if entry.has_status { 0 } else { FLAG_NO_STATUS }),
    };
    let (front, name) = to.split_at_mut(size_of::<Fixed>());
    front.copy_from_slice(fixed.as_bytes());
    let (name, padding) = name.split_at_mut(entry.name.len());
    name.copy_from_slice(entry.name);
    padding.fill(0);
    Some(len)
}

/// The entries in the data of an answer, each checked as it is reached. The first error ends them.
pub fn entries(mut bytes: &[u8]) -> impl Iterator<Item = Result<DirectoryEntry<'_>, Violation>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let entry = decode(bytes);
        bytes = entry.as_ref().map_or(&[], |(_, rest)| rest);
        Some(entry.map(|(entry, _)| entry))
    })
}

fn decode(bytes: &[u8]) -> Result<(DirectoryEntry<'_>, &[u8]), Violation> {
    let (fixed, rest) = Fixed::ref_from_prefix(bytes).map_err(|_| Violation::Length)?;
    let name_len = usize::from(fixed.name_len.get());
    let padded_len = padded(size_of::<Fixed>() + name_len) - size_of::<Fixed>();
    if name_len == 0 || name_len > NAME_BYTES_MAX || rest.len() < padded_len {
        return Err(Violation::Length);
    }
    let (padded_name, rest) = rest.split_at(padded_len);
    let (name, padding) = padded_name.split_at(name_len);
    let flags = fixed.flags.get();
    if flags & !FLAG_NO_STATUS != 0 || padding.iter().any(|&byte| byte != 0) {
        return Err(Violation::Reserved);
    }
    // A client may use it as a path of its own.
    if name.iter().any(|byte| matches!(byte, 0 | b'/')) || matches!(name, b"." | b"..") {
        return Err(Violation::Field);
    }
    let entry = DirectoryEntry {
        name,
        mode: fixed.mode.get(),
        size: fixed.size.get(),
        modified_ns: fixed.modified_ns.get(),
        inode: fixed.inode.get(),
        has_status: flags & FLAG_NO_STATUS == 0,
    };
    Ok((entry, rest))
}

/// The room of a file system.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct FileSystemStatus {
    /// The unit of the numbers of blocks, in bytes.
    pub block_bytes: U64,
    /// Blocks in all.
    pub blocks: U64,
    /// Free blocks.
    pub blocks_free: U64,
    /// Free blocks that the server may use.
    pub blocks_available: U64,
    /// Inodes in all; 0 if the file system does not count them.
    pub files: U64,
    /// Free inodes.
    pub files_free: U64,
    /// The longest name, in bytes.
    pub name_bytes_max: U64,
}

impl FileSystemStatus {
    /// Reads it from the body of a response.
    pub fn decode(body: &[u8]) -> Result<Self, Violation> {
        Self::read_from_bytes(body).map_err(|_| Violation::Length)
    }
}

/// A part of a file that has data. What lies between such parts reads as zeros, and takes no storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub offset: U64,
    /// How long it is.
    pub length: U64,
}

const _: () = assert!(size_of::<FileSystemStatus>() == 56 && size_of::<Extent>() == 16);

impl Extent {
    /// The most of them in one answer.
    pub const COUNT_MAX: usize = 256;

    /// Reads them from the body of a response: in order, none empty, none touching the next.
    pub fn decode(body: &[u8]) -> Result<&[Self], Violation> {
        let extents = <[Self]>::ref_from_bytes(body).map_err(|_| Violation::Length)?;
        let mut end = None;
        for Self { offset, length } in extents {
            let next = offset.get().checked_add(length.get()).filter(|&next| next <= i64::MAX as u64);
            let next = next.filter(|_| length.get() > 0 && end.is_none_or(|end| end < offset.get()));
            end = Some(next.ok_or(Violation::Field)?);
        }
        Ok(extents)
    }
}
