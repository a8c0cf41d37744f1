//! raio's own commands, on top of the message layer: open, read, write, ...
//!
//! A command is the body of a request. All but an open have one layout of 24 bytes, so that a request is 64
//! bytes in all. Data to be written is the request's bulk data, data read is the response's; the response's
//! result is the byte count, or the file handle of an open.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::Violation;

/// What a command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Opcode {
    /// Open a file by its path. Result: its handle. Body of the response: [`FileStatus`].
    Open = 1,
    /// Close a handle.
    Close = 2,
    /// Ask for the file's status. Body of the response: [`FileStatus`].
    Stat = 3,
    /// Read `length` bytes at `offset` into the request's region. Result: how many; fewer at end of file, or
    /// if what is behind failed.
    Read = 4,
    /// Write the request's data at `offset`. Result: how many; fewer if what is behind failed.
    Write = 5,
    /// Make what was written durable; [`FLAG_DATA_ONLY`] without metadata that reading does not need.
    Fsync = 6,
    /// Deallocate `length` bytes at `offset`; they read as zeros.
    Discard = 7,
    /// Make `length` bytes at `offset` read as zeros.
    WriteZeroes = 8,
    /// Cancel the request whose id is in `offset`. Succeeds once that request has been answered as cancelled;
    /// EALREADY if it is too late, ENOENT if it is not outstanding.
    Cancel = 9,
    /// Reserve storage for `length` bytes at `offset`, and no byte changes. A file that ends before is longer
    /// then, but for [`FLAG_KEEP_SIZE`].
    Allocate = 10,
}

impl Opcode {
    /// Every opcode, in wire order.
    pub const ALL: [Self; 10] = [
        Self::Open,
        Self::Close,
        Self::Stat,
        Self::Read,
        Self::Write,
        Self::Fsync,
        Self::Discard,
        Self::WriteZeroes,
        Self::Cancel,
        Self::Allocate,
    ];

    fn from_wire(value: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|&opcode| opcode as u16 == value)
    }
}

/// Flag of [`Opcode::Fsync`]: fdatasync.
pub const FLAG_DATA_ONLY: u16 = 1 << 0;
/// Flag of [`Opcode::Allocate`]: the file's size stays.
pub const FLAG_KEEP_SIZE: u16 = 1 << 0;

/// Read permission wanted.
pub const OPEN_READ: u32 = 1 << 0;
/// Write permission wanted.
pub const OPEN_WRITE: u32 = 1 << 1;
/// Create it if it is not there.
pub const OPEN_CREATE: u32 = 1 << 2;
/// Fail if it is there.
pub const OPEN_EXCLUSIVE: u32 = 1 << 3;
/// Cut it to length 0.
pub const OPEN_TRUNCATE: u32 = 1 << 4;
/// O_DIRECT.
pub const OPEN_DIRECT: u32 = 1 << 5;
/// O_SYNC.
pub const OPEN_SYNC: u32 = 1 << 6;
/// O_DSYNC.
pub const OPEN_DSYNC: u32 = 1 << 7;
/// O_NOFOLLOW: the last component must not be a symbolic link.
pub const OPEN_NOFOLLOW: u32 = 1 << 8;
const OPEN_FLAGS: u32 = (1 << 9) - 1;

/// The longest path, in bytes.
pub const PATH_BYTES_MAX: usize = 4_096;

/// Names an open file within a session. An index that the server reuses, and a generation that it does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileHandle(pub u32);

/// The command of everything but an open.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct IoCommand {
    opcode: U16,
    flags: U16,
    file: U32,
    offset: U64,
    length: U64,
}

/// The fixed part of an open. The path follows, padded with zeros to a multiple of 8.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct OpenCommand {
    opcode: U16,
    reserved: U16,
    flags: U32,
    mode: U32,
    path_len: U32,
}

/// The status of a file. Times are in nanoseconds since the epoch.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct FileStatus {
    /// Length in bytes; of a block device its capacity.
    pub size: U64,
    /// 512-byte blocks allocated.
    pub blocks: U64,
    /// Inode number.
    pub inode: U64,
    /// Device that holds the file, as makedev(3) has it.
    pub device: U64,
    /// For a device file: the device it is.
    pub rdevice: U64,
    /// Last access.
    pub accessed_ns: I64,
    /// Last change of the contents.
    pub modified_ns: I64,
    /// Last change of the status.
    pub changed_ns: I64,
    /// Type and permissions, as `st_mode`.
    pub mode: U32,
    /// Hard links.
    pub links: U32,
    /// Owner.
    pub uid: U32,
    /// Group.
    pub gid: U32,
    /// Preferred I/O size.
    pub block_bytes: U32,
    /// Offsets and lengths of direct writes must be multiples of this; 1 if the file is not open with
    /// [`OPEN_DIRECT`].
    pub direct_align: U32,
}

const _: () = assert!(size_of::<IoCommand>() == 24);
const _: () = assert!(size_of::<OpenCommand>() == 16);
const _: () = assert!(size_of::<FileStatus>() == 88);

/// A command, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command<'a> {
    /// See [`Opcode::Open`].
    Open {
        /// `OPEN_*` bits.
        flags: u32,
        /// Permissions of a file that is created.
        mode: u32,
        /// Bytes without a zero among them.
        path: &'a [u8],
    },
    /// See [`Opcode::Close`].
    Close(FileHandle),
    /// See [`Opcode::Stat`].
    Stat(FileHandle),
    /// See [`Opcode::Read`].
    Read {
        /// Which file.
        file: FileHandle,
        /// Where.
        offset: u64,
        /// How much.
        length: u32,
    },
    /// See [`Opcode::Write`].
    Write {
        /// Which file.
        file: FileHandle,
        /// Where.
        offset: u64,
        /// How much.
        length: u32,
    },
    /// See [`Opcode::Fsync`].
    Fsync {
        /// Which file.
        file: FileHandle,
        /// fdatasync.
        data_only: bool,
    },
    /// See [`Opcode::Discard`].
    Discard {
        /// Which file.
        file: FileHandle,
        /// Where.
        offset: u64,
        /// How much.
        length: u64,
    },
    /// See [`Opcode::WriteZeroes`].
    WriteZeroes {
        /// Which file.
        file: FileHandle,
        /// Where.
        offset: u64,
        /// How much.
        length: u64,
    },
    /// See [`Opcode::Cancel`].
    Cancel {
        /// The id of the request to cancel.
        id: u64,
    },
    /// See [`Opcode::Allocate`].
    Allocate {
        /// Which file.
        file: FileHandle,
        /// Where.
        offset: u64,
        /// How much.
        length: u64,
        /// The file's size stays.
        keep_size: bool,
    },
}

impl<'a> Command<'a> {
    /// Appends the command in wire form.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let io = |opcode: Opcode, flags, file: FileHandle, offset, length| IoCommand {
            opcode: U16::new(opcode as u16),
            flags: U16::new(flags),
            file: U32::new(file.0),
            offset: U64::new(offset),
            length: U64::new(length),
        };
        let command = match *self {
            Self::Open { flags, mode, path } => {
                debug_assert!(path.len() <= PATH_BYTES_MAX);
                let start = out.len();
                let open = OpenCommand {
                    opcode: U16::new(Opcode::Open as u16),
                    reserved: U16::ZERO,
                    flags: U32::new(flags),
                    mode: U32::new(mode),
                    path_len: U32::new(path.len() as u32),
                };
                out.extend_from_slice(open.as_bytes());
                out.extend_from_slice(path);
                out.resize(start + crate::message::padded(out.len() - start), 0);
                return;
            }
            Self::Close(file) => io(Opcode::Close, 0, file, 0, 0),
            Self::Stat(file) => io(Opcode::Stat, 0, file, 0, 0),
            Self::Read { file, offset, length } => io(Opcode::Read, 0, file, offset, length.into()),
            Self::Write { file, offset, length } => io(Opcode::Write, 0, file, offset, length.into()),
            Self::Fsync { file, data_only } => {
                io(Opcode::Fsync, if data_only { FLAG_DATA_ONLY } else { 0 }, file, 0, 0)
            }
            Self::Discard { file, offset, length } => io(Opcode::Discard, 0, file, offset, length),
            Self::WriteZeroes { file, offset, length } => io(Opcode::WriteZeroes, 0, file, offset, length),
            Self::Cancel { id } => io(Opcode::Cancel, 0, FileHandle(0), id, 0),
            Self::Allocate { file, offset, length, keep_size } => {
                io(Opcode::Allocate, if keep_size { FLAG_KEEP_SIZE } else { 0 }, file, offset, length)
            }
        };
        out.extend_from_slice(command.as_bytes());
    }

    /// Reads a command. Whether its length agrees with the request's data and region is for the caller to
    /// check: see [`Command::read_length`] and [`Command::write_length`].
    pub fn decode(body: &'a [u8]) -> Result<Self, Violation> {
        let (opcode, _) = U16::ref_from_prefix(body).map_err(|_| Violation::Length)?;
        let opcode = Opcode::from_wire(opcode.get()).ok_or(Violation::Field)?;
        if opcode == Opcode::Open {
            return Self::decode_open(body);
        }
        let io = IoCommand::ref_from_bytes(body).map_err(|_| Violation::Length)?;
        let file = FileHandle(io.file.get());
        let (flags, offset, length) = (io.flags.get(), io.offset.get(), io.length.get());
        let short = || u32::try_from(length).map_err(|_| Violation::Length);
        let unused = match opcode {
            Opcode::Open | Opcode::Read | Opcode::Write | Opcode::Discard | Opcode::WriteZeroes => flags != 0,
            Opcode::Close | Opcode::Stat => flags != 0 || offset != 0 || length != 0,
            Opcode::Fsync => flags & !FLAG_DATA_ONLY != 0 || offset != 0 || length != 0,
            Opcode::Cancel => flags != 0 || file.0 != 0 || length != 0,
            Opcode::Allocate => flags & !FLAG_KEEP_SIZE != 0,
        };
        if unused {
            return Err(Violation::Reserved);
        }
        Ok(match opcode {
            Opcode::Open => unreachable!("handled above"),
            Opcode::Close => Self::Close(file),
            Opcode::Stat => Self::Stat(file),
            Opcode::Read => Self::Read { file, offset, length: short()? },
            Opcode::Write => Self::Write { file, offset, length: short()? },
            Opcode::Fsync => Self::Fsync { file, data_only: flags & FLAG_DATA_ONLY != 0 },
            Opcode::Discard => Self::Discard { file, offset, length },
            Opcode::WriteZeroes => Self::WriteZeroes { file, offset, length },
            Opcode::Cancel => Self::Cancel { id: offset },
            Opcode::Allocate => {
                Self::Allocate { file, offset, length, keep_size: flags & FLAG_KEEP_SIZE != 0 }
            }
        })
    }

    fn decode_open(body: &'a [u8]) -> Result<Self, Violation> {
        let (open, rest) = OpenCommand::ref_from_prefix(body).map_err(|_| Violation::Length)?;
        let len = open.path_len.get() as usize;
        if len == 0 || len > PATH_BYTES_MAX || rest.len() != crate::message::padded(len) {
            return Err(Violation::Length);
        }
        let (path, padding) = rest.split_at(len);
        if open.reserved.get() != 0 || padding.iter().any(|&b| b != 0) || open.flags.get() & !OPEN_FLAGS != 0
        {
            return Err(Violation::Reserved);
        }
        if path.contains(&0)
            || open.mode.get() & !0o7777 != 0
            || open.flags.get() & (OPEN_READ | OPEN_WRITE) == 0
        {
            return Err(Violation::Field);
        }
        Ok(Self::Open { flags: open.flags.get(), mode: open.mode.get(), path })
    }

    /// How many bytes of data the response brings at most: the request's inward region must have this length.
    pub fn read_length(&self) -> u32 {
        match *self {
            Self::Read { length, .. } => length,
            _ => 0,
        }
    }

    /// How many bytes of data the request brings: its inline data or outward region must have this length.
    pub fn write_length(&self) -> u32 {
        match *self {
            Self::Write { length, .. } => length,
            _ => 0,
        }
    }

    /// What it is.
    pub fn opcode(&self) -> Opcode {
        match self {
            Self::Open { .. } => Opcode::Open,
            Self::Close(_) => Opcode::Close,
            Self::Stat(_) => Opcode::Stat,
            Self::Read { .. } => Opcode::Read,
            Self::Write { .. } => Opcode::Write,
            Self::Fsync { .. } => Opcode::Fsync,
            Self::Discard { .. } => Opcode::Discard,
            Self::WriteZeroes { .. } => Opcode::WriteZeroes,
            Self::Cancel { .. } => Opcode::Cancel,
            Self::Allocate { .. } => Opcode::Allocate,
        }
    }
}

impl FileStatus {
    /// Reads a status from the body of a response.
    pub fn decode(body: &[u8]) -> Result<Self, Violation> {
        Self::read_from_bytes(body).map_err(|_| Violation::Length)
    }
}

#[cfg(test)]
mod tests;
