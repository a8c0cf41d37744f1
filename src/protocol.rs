//! raio's own commands, on top of the message layer: open, read, write, ... [`OPERATIONS`] lists them.
//!
//! A command is the body of a request. What is done to an open file has one layout of 24 bytes, so that such
//! a request is 64 bytes in all; what is done to a path has another ([`path`]), and open, outcome, reopen and
//! copy have layouts of their own. Data to be written is the request's bulk data, data read is the
//! response's; the response's result is the byte count, or the file handle of an open.

mod entries;
pub mod path;

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Class, Status, Violation};
use crate::message::{ERRNO_MAX, OPERATION_FEATURES_MASK, padded};

pub use entries::{DirectoryEntry, Extent, FileSystemStatus, entries, push_entry};
use path::{PathCommand, PathFields};

/// What a command asks for. [`OPERATIONS`] says what each means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
#[expect(missing_docs, reason = "`OPERATIONS` documents them")]
pub enum Opcode {
    Open = 1,
    Close = 2,
    Stat = 3,
    Read = 4,
    Write = 5,
    Fsync = 6,
    Discard = 7,
    WriteZeroes = 8,
    Cancel = 9,
    Allocate = 10,
    Outcome = 11,
    Reopen = 12,
    StatPath = 13,
    Get = 14,
    Put = 15,
    List = 16,
    ListNext = 17,
    Mkdir = 18,
    Rmdir = 19,
    Unlink = 20,
    Rename = 21,
    Link = 22,
    Symlink = 23,
    Readlink = 24,
    SetAttributes = 25,
    Truncate = 26,
    Statfs = 27,
    Extents = 28,
    GetXattr = 29,
    ListXattr = 30,
    SetXattr = 31,
    Copy = 32,
    Checksum = 33,
    Lock = 34,
}

impl Opcode {
    /// The row of [`OPERATIONS`] for it.
    #[inline]
    pub fn operation(self) -> &'static Operation {
        &OPERATIONS[self as usize - 1]
    }

    /// Whether this encoded command is one whose end the server records ([`Operation::is_recorded`]).
    #[inline]
    pub fn is_recorded_on_wire(command: &[u8]) -> bool {
        const RECORDED: u64 = {
            let (mut bits, mut index) = (0, 0);
            while index < OPERATIONS.len() {
                if OPERATIONS[index].is_recorded {
                    bits |= 1 << OPERATIONS[index].opcode as u16;
                }
                index += 1;
            }
            bits
        };
        matches!(*command, [opcode @ 0..64, 0, ..] if RECORDED >> opcode & 1 != 0)
    }

    #[inline]
    fn from_wire(value: u16) -> Option<Self> {
        let index = usize::from(value).checked_sub(1)?;
        OPERATIONS.get(index).map(|operation| operation.opcode)
    }
}

/// One operation of the protocol: what decoding, permission checks, statistics, fuzz seeds and documents know
/// of it.
#[derive(Debug)]
pub struct Operation {
    /// Its number on the wire.
    pub opcode: Opcode,
    /// Its name in statistics, logs and documents.
    pub name: &'static str,
    /// The layout of its command, and which of that layout's fields it uses; all others are 0.
    pub layout: Layout,
    /// The flag bits that it knows.
    pub flags: u16,
    /// Which way its bulk data goes. `length` is then the length of that data, and has 32 bits.
    pub direction: Direction,
    /// What the file must be open for; of a copy the source.
    pub access: FileAccess,
    /// Whether it is about sessions, files and requests, or about a file's data.
    pub class: OperationClass,
    /// Which operations a server that knows it knows as well.
    pub group: OperationGroup,
    /// Whether the server keeps how it has ended, for [`Opcode::Outcome`]: it must not run twice.
    pub is_recorded: bool,
}

impl Operation {
    /// Whether a server that has granted these feature bits knows it.
    pub fn is_granted(&self, features: u64) -> bool {
        self.group.feature() & !features == 0
    }

    /// Why a server cannot be asked for it that has granted these feature bits: a message for people. None if
    /// it can.
    pub fn why_not_granted(&self, features: u64) -> Option<String> {
        let (name, group) = (self.name, self.group.name());
        (!self.is_granted(features)).then(|| {
            format!(
                "The server does not know {name}: it is without the operations of the group {group:?}. Use a \
                 newer raio_server."
            )
        })
    }
}

/// Operations that came into the protocol together: a server knows all of a group, or none. The handshake
/// says which ([`OperationGroup::feature`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperationGroup {
    /// What every server of this version knows.
    Basic,
    /// What changes a file's storage rather than its contents.
    Space,
    /// Directories, names and attributes, and whole small files by their paths.
    Names,
    /// Copies and checksums, whose data does not come to the client, and locks.
    ServerSide,
}

impl OperationGroup {
    /// Its name in messages and documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Basic => "basic",
            Self::Space => "space",
            Self::Names => "names",
            Self::ServerSide => "server_side",
        }
    }

    /// Its feature bit in the handshake; 0 if no server is without it.
    pub const fn feature(self) -> u64 {
        match self {
            Self::Basic => 0,
            Self::Space => 1 << 32,
            Self::Names => 1 << 33,
            Self::ServerSide => 1 << 34,
        }
    }
}

/// The feature bits of all groups: what a client of this version asks for, and a server has.
pub const OPERATION_FEATURES: u64 = {
    let (mut bits, mut index) = (0, 0);
    while index < OPERATIONS.len() {
        bits |= OPERATIONS[index].group.feature();
        index += 1;
    }
    assert!(bits & !OPERATION_FEATURES_MASK == 0, "the others are the message layer's");
    bits
};

/// How a command is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// 24 bytes.
    Fields(Fields),
    /// 32 bytes, a path, and perhaps a second name.
    Path(PathFields),
    /// A layout of its own.
    Own,
}

/// Fields of the 24-byte command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fields {
    /// The handle of an open file.
    pub file: bool,
    /// An offset in the file, in bytes; for cancel the id of a request.
    pub offset: bool,
    /// A length in bytes.
    pub length: bool,
}

/// Which way an operation's bulk data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// There is none.
    None,
    /// The response brings it.
    ToClient,
    /// The request brings it.
    ToServer,
}

/// What a file must be open for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileAccess {
    /// Anything, or there is no file.
    Any,
    /// Reading.
    Read,
    /// Writing.
    Write,
}

/// What an operation is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperationClass {
    /// Sessions, files and requests.
    Control,
    /// A file's data.
    Data,
}

const FILE: Fields = Fields { file: true, offset: false, length: false };
const ID: Fields = Fields { file: false, offset: true, length: false };
const RANGE: Fields = Fields { file: true, offset: true, length: true };
const SIZE: Fields = Fields { file: true, offset: false, length: true };
const LISTING: Fields = Fields { file: false, offset: true, length: true };

/// An operation on a session, a file or a request.
const fn control(opcode: Opcode, name: &'static str, layout: Layout) -> Operation {
    let (direction, access, class) = (Direction::None, FileAccess::Any, OperationClass::Control);
    let group = OperationGroup::Basic;
    Operation { opcode, name, layout, flags: 0, direction, access, class, group, is_recorded: false }
}

/// An operation on a range of a file. One that needs a file open for writing changes it.
const fn on_range(opcode: Opcode, name: &'static str, access: FileAccess) -> Operation {
    let (direction, class) = (Direction::None, OperationClass::Data);
    let (layout, group) = (Layout::Fields(RANGE), OperationGroup::Basic);
    let is_recorded = matches!(access, FileAccess::Write);
    Operation { opcode, name, layout, flags: 0, direction, access, class, group, is_recorded }
}

/// An operation on the storage of a range of a file.
const fn on_space(opcode: Opcode, name: &'static str) -> Operation {
    Operation { group: OperationGroup::Space, ..on_range(opcode, name, FileAccess::Write) }
}

/// An operation that finds something out about a path.
const fn on_path(opcode: Opcode, name: &'static str, fields: PathFields) -> Operation {
    let group = OperationGroup::Names;
    Operation { group, ..control(opcode, name, Layout::Path(fields)) }
}

/// An operation that changes a file or directory by its path.
const fn change(opcode: Opcode, name: &'static str, fields: PathFields) -> Operation {
    Operation { is_recorded: true, ..on_path(opcode, name, fields) }
}

/// Every operation, in the order of its opcodes, which begin with 1. docs/PROTOCOL.md has the same table for
/// people; a test compares the two.
///
/// - **open**: opens a file by its path. Result: its handle; body: [`FileStatus`].
/// - **close**: closes a handle.
/// - **stat**: body of the response: [`FileStatus`].
/// - **read**: reads `length` bytes at `offset`. Result: how many; fewer at end of file, or if a later part
///   failed.
/// - **write**: writes the request's data at `offset`. Result: how many; fewer if a later part failed.
/// - **fsync**: makes durable what was written; with [`FLAG_DATA_ONLY`] without metadata that reading does
///   not need.
/// - **discard**: deallocates the range, which reads as zeros afterwards.
/// - **write_zeroes**: makes the range read as zeros.
/// - **cancel**: cancels the request whose id is in `offset`. Succeeds once that request has been answered as
///   cancelled; EALREADY if it is too late, ENOENT if it is not outstanding.
/// - **allocate**: reserves storage for the range and changes no byte. A shorter file grows to the range's
///   end, except with [`FLAG_KEEP_SIZE`].
/// - **outcome**: says what became of requests of the channel's previous connections: a [`RequestOutcome`]
///   for each id in the body of the response. It is answered only when none of them can still happen.
/// - **reopen**: opens a file that a previous server had open, under the same handle, if it is still the same
///   file. Result and body: as of an open.
/// - **stat_path**: the status of a file by its path. Body: [`FileStatus`], without identity and verifier.
/// - **get**: brings the first `length` bytes of a file, which is opened for that and closed. Result: how
///   many; body: [`FileStatus`], as of stat_path.
/// - **put**: creates a file with the request's data, which takes the place of what is at the path at once
///   and whole. Result: the bytes written.
/// - **list**: begins to list a directory; `/` lists the exports. The data are [`DirectoryEntry`]s, the
///   result names the listing for list_next, or is 0 if this was all of it.
/// - **list_next**: the next entries of a listing (`offset` is its name), or again those of the last answer;
///   or ends it. Result: as of list.
/// - **mkdir**, **rmdir**, **unlink**, **rename**, **link**, **symlink**: as the system calls.
/// - **readlink**: the target of a symbolic link: the body, which is padded; the result is its length.
/// - **set_attributes**: permissions, size and time of change of a file or directory.
/// - **truncate**: sets the size of an open file to `length`.
/// - **statfs**: the file system of a path. Body: [`FileSystemStatus`].
/// - **extents**: which parts of a range of an open file have data. Body: [`Extent`]s; result: the offset up
///   to which they are complete.
/// - **get_xattr**, **list_xattr**, **set_xattr**: extended attributes of the `user.` class. The value is the
///   data, the result its length; names end with a zero byte each.
/// - **copy**: copies a range of an open file to another one, or to another place of the same. Result: how
///   many bytes; fewer at the end of the source, or if it was cancelled, or a later part failed.
/// - **checksum**: the checksum of a range. Body: 4 bytes of a CRC32C, or 32 of a BLAKE3. Result: how many
///   bytes it is of; fewer at the end of the file.
/// - **lock**: flock(2) of the open file, which never waits: EAGAIN if another one has a lock that conflicts.
pub const OPERATIONS: [Operation; 34] = [
    Operation { is_recorded: true, ..control(Opcode::Open, "open", Layout::Own) },
    control(Opcode::Close, "close", Layout::Fields(FILE)),
    control(Opcode::Stat, "stat", Layout::Fields(FILE)),
    Operation { direction: Direction::ToClient, ..on_range(Opcode::Read, "read", FileAccess::Read) },
    Operation { direction: Direction::ToServer, ..on_range(Opcode::Write, "write", FileAccess::Write) },
    Operation {
        layout: Layout::Fields(FILE),
        flags: FLAG_DATA_ONLY,
        ..on_range(Opcode::Fsync, "fsync", FileAccess::Any)
    },
    on_space(Opcode::Discard, "discard"),
    on_space(Opcode::WriteZeroes, "write_zeroes"),
    control(Opcode::Cancel, "cancel", Layout::Fields(ID)),
    Operation { flags: FLAG_KEEP_SIZE, ..on_space(Opcode::Allocate, "allocate") },
    control(Opcode::Outcome, "outcome", Layout::Own),
    control(Opcode::Reopen, "reopen", Layout::Own),
    Operation { flags: FLAG_NOFOLLOW, ..on_path(Opcode::StatPath, "stat_path", PathFields::NONE) },
    Operation {
        flags: FLAG_NOFOLLOW,
        direction: Direction::ToClient,
        class: OperationClass::Data,
        ..on_path(Opcode::Get, "get", PathFields::LENGTH)
    },
    Operation {
        flags: FLAG_EXCLUSIVE | FLAG_FSYNC | FLAG_SET_TIME,
        direction: Direction::ToServer,
        class: OperationClass::Data,
        ..change(Opcode::Put, "put", PathFields { mode: true, time: true, ..PathFields::LENGTH })
    },
    Operation { direction: Direction::ToClient, ..on_path(Opcode::List, "list", PathFields::LENGTH) },
    Operation {
        flags: FLAG_ODD_PAGE,
        direction: Direction::ToClient,
        group: OperationGroup::Names,
        ..control(Opcode::ListNext, "list_next", Layout::Fields(LISTING))
    },
    change(Opcode::Mkdir, "mkdir", PathFields { mode: true, ..PathFields::NONE }),
    change(Opcode::Rmdir, "rmdir", PathFields::NONE),
    change(Opcode::Unlink, "unlink", PathFields::NONE),
    Operation { flags: FLAG_NO_REPLACE, ..change(Opcode::Rename, "rename", PathFields::OTHER) },
    change(Opcode::Link, "link", PathFields::OTHER),
    change(Opcode::Symlink, "symlink", PathFields::OTHER),
    on_path(Opcode::Readlink, "readlink", PathFields::NONE),
    Operation {
        flags: FLAG_NOFOLLOW | FLAG_SET_MODE | FLAG_SET_TIME | FLAG_SET_SIZE,
        ..change(
            Opcode::SetAttributes,
            "set_attributes",
            PathFields { mode: true, time: true, ..PathFields::LENGTH },
        )
    },
    Operation {
        layout: Layout::Fields(SIZE),
        group: OperationGroup::Names,
        ..on_range(Opcode::Truncate, "truncate", FileAccess::Write)
    },
    on_path(Opcode::Statfs, "statfs", PathFields::NONE),
    Operation { group: OperationGroup::Names, ..on_range(Opcode::Extents, "extents", FileAccess::Any) },
    Operation {
        direction: Direction::ToClient,
        flags: FLAG_NOFOLLOW,
        ..on_path(Opcode::GetXattr, "get_xattr", PathFields { length: true, ..PathFields::OTHER })
    },
    Operation {
        direction: Direction::ToClient,
        flags: FLAG_NOFOLLOW,
        ..on_path(Opcode::ListXattr, "list_xattr", PathFields::LENGTH)
    },
    Operation {
        direction: Direction::ToServer,
        flags: FLAG_NOFOLLOW | FLAG_EXCLUSIVE | FLAG_REMOVE,
        ..change(Opcode::SetXattr, "set_xattr", PathFields { length: true, ..PathFields::OTHER })
    },
    Operation {
        layout: Layout::Own,
        group: OperationGroup::ServerSide,
        is_recorded: true,
        ..on_range(Opcode::Copy, "copy", FileAccess::Read)
    },
    Operation {
        flags: FLAG_CRC32C | FLAG_BLAKE3,
        group: OperationGroup::ServerSide,
        ..on_range(Opcode::Checksum, "checksum", FileAccess::Read)
    },
    Operation {
        flags: FLAG_LOCK_SHARED | FLAG_LOCK_EXCLUSIVE,
        group: OperationGroup::ServerSide,
        ..control(Opcode::Lock, "lock", Layout::Fields(FILE))
    },
];

const _: () = {
    let mut index = 0;
    while index < OPERATIONS.len() {
        assert!(OPERATIONS[index].opcode as usize == index + 1, "the table is in the order of the opcodes");
        index += 1;
    }
};

/// Flag of [`Opcode::Fsync`]: fdatasync.
pub const FLAG_DATA_ONLY: u16 = 1 << 0;
/// Flag of [`Opcode::Allocate`]: the file's size stays.
pub const FLAG_KEEP_SIZE: u16 = 1 << 0;

/// Flag of operations on a path: a symbolic link at its end is not followed.
pub const FLAG_NOFOLLOW: u16 = 1 << 0;
/// Flag of [`Opcode::Put`] and [`Opcode::SetXattr`]: fails with EEXIST if there is something already.
pub const FLAG_EXCLUSIVE: u16 = 1 << 1;
/// Flag of [`Opcode::Put`]: the file and its name are durable when it is answered.
pub const FLAG_FSYNC: u16 = 1 << 2;
/// Flag of [`Opcode::Rename`]: fails with EEXIST if there is something already.
pub const FLAG_NO_REPLACE: u16 = 1 << 1;
/// Flag of [`Opcode::SetXattr`]: removes it.
pub const FLAG_REMOVE: u16 = 1 << 2;
/// Flag of [`Opcode::Put`] and [`Opcode::SetAttributes`]: sets the modification time.
pub const FLAG_SET_TIME: u16 = 1 << 3;
/// Flag of [`Opcode::SetAttributes`]: sets the permissions.
pub const FLAG_SET_MODE: u16 = 1 << 4;
/// Flag of [`Opcode::SetAttributes`]: sets the size.
pub const FLAG_SET_SIZE: u16 = 1 << 5;
/// Flag of [`Opcode::ListNext`]: which page is asked for. That of the first list_next of a listing is 1, and
/// each following page has the other value than the one before; a page that is asked for again has the same.
pub const FLAG_ODD_PAGE: u16 = 1 << 0;
/// Flag of [`Opcode::Checksum`]: a CRC32C (Castagnoli). One of the checksums must be asked for.
pub const FLAG_CRC32C: u16 = 1 << 0;
/// Flag of [`Opcode::Checksum`]: BLAKE3, 256 bits.
pub const FLAG_BLAKE3: u16 = 1 << 1;
/// Flag of [`Opcode::Lock`]: a lock that others may share. Without this flag and the next one the lock is
/// released.
pub const FLAG_LOCK_SHARED: u16 = 1 << 0;
/// Flag of [`Opcode::Lock`]: a lock that nobody else has.
pub const FLAG_LOCK_EXCLUSIVE: u16 = 1 << 1;

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
/// What a file that was opened once must not be opened with again.
const OPEN_ONCE_FLAGS: u32 = OPEN_CREATE | OPEN_EXCLUSIVE | OPEN_TRUNCATE;

/// The longest path, in bytes.
pub const PATH_BYTES_MAX: usize = 4_096;
/// The most ids in one [`Opcode::Outcome`].
pub const OUTCOMES_MAX: usize = 256;

/// Names an open file within a session. An index that the server reuses, and a generation that it does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileHandle(pub u32);

/// The command of all that have no layout of their own.
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

/// The fixed part of an outcome. The ids follow, 32 bits each, padded with zeros to a multiple of 8.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct OutcomeCommand {
    opcode: U16,
    count: U16,
    reserved: U32,
}

/// The fixed part of a reopen. The path follows, padded with zeros to a multiple of 8.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ReopenCommand {
    opcode: U16,
    reserved: U16,
    flags: U32,
    file: U32,
    path_len: U32,
    identity: [u8; 16],
}

/// A copy.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct CopyCommand {
    opcode: U16,
    reserved: U16,
    source: U32,
    offset: U64,
    length: U64,
    destination: U32,
    reserved_too: U32,
    destination_offset: U64,
}

/// What became of one request: an element of the response to [`Opcode::Outcome`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RequestOutcome {
    id: U32,
    errno: U16,
    class: u8,
    state: u8,
    result: U64,
}

const STATE_NEVER: u8 = 0;
const STATE_DONE: u8 = 1;

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
    /// The same as long as it is the same file, and different for any other; zeros if the server cannot tell.
    pub identity: [u8; 16],
    /// Changes when acknowledged writes that were not followed by an fsync may have been lost.
    pub verifier: U64,
}

const _: () = assert!(size_of::<IoCommand>() == 24);
const _: () = assert!(size_of::<OpenCommand>() == 16);
const _: () = assert!(size_of::<CopyCommand>() == 40);
const _: () = assert!(size_of::<OutcomeCommand>() == 8 && size_of::<ReopenCommand>() == 32);
const _: () = assert!(size_of::<RequestOutcome>() == 16);
const _: () = assert!(size_of::<FileStatus>() == 112);

/// A command, checked. Offsets and lengths are in bytes, and `file` is the handle of an open file.
/// [`OPERATIONS`] says what each does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "`OPERATIONS` documents them")]
pub enum Command<'a> {
    Open {
        /// `OPEN_*` bits.
        flags: u32,
        /// Permissions of a file that is created.
        mode: u32,
        /// Bytes without a zero among them.
        path: &'a [u8],
    },
    Close(FileHandle),
    Stat(FileHandle),
    Read {
        file: FileHandle,
        offset: u64,
        length: u32,
    },
    Write {
        file: FileHandle,
        offset: u64,
        length: u32,
    },
    Fsync {
        file: FileHandle,
        /// As fdatasync(2).
        data_only: bool,
    },
    Discard {
        file: FileHandle,
        offset: u64,
        length: u64,
    },
    WriteZeroes {
        file: FileHandle,
        offset: u64,
        length: u64,
    },
    Cancel {
        /// The id of the request to cancel.
        id: u64,
    },
    Allocate {
        file: FileHandle,
        offset: u64,
        length: u64,
        /// The file's size does not change.
        keep_size: bool,
    },
    Outcome {
        /// Ids of requests, at most [`OUTCOMES_MAX`].
        ids: &'a [U32],
    },
    Reopen {
        /// `OPEN_*` bits, without those that create or truncate.
        flags: u32,
        /// What it was open under.
        file: FileHandle,
        /// [`FileStatus::identity`].
        identity: [u8; 16],
        /// Bytes without a zero among them.
        path: &'a [u8],
    },
    ListNext {
        /// The result of the list, or the list_next before.
        listing: u64,
        /// Which page: [`FLAG_ODD_PAGE`].
        is_odd: bool,
        /// How many bytes of entries; 0 ends the listing.
        length: u32,
    },
    Truncate {
        file: FileHandle,
        /// The new size.
        size: u64,
    },
    Extents {
        file: FileHandle,
        offset: u64,
        length: u64,
    },
    Copy {
        /// From where.
        source: FileHandle,
        offset: u64,
        length: u64,
        /// Where to.
        destination: FileHandle,
        destination_offset: u64,
    },
    Checksum {
        file: FileHandle,
        offset: u64,
        length: u64,
        /// [`FLAG_CRC32C`] or [`FLAG_BLAKE3`]; other combinations are the client's error.
        checksum: u16,
    },
    Lock {
        file: FileHandle,
        /// [`FLAG_LOCK_SHARED`], [`FLAG_LOCK_EXCLUSIVE`] or 0; both are the client's error.
        lock: u16,
    },
    /// All operations on paths.
    Path(PathCommand<'a>),
}

/// What the fields of the 24-byte command hold.
struct Parts {
    opcode: Opcode,
    flags: u16,
    file: FileHandle,
    offset: u64,
    length: u64,
}

impl<'a> Command<'a> {
    /// Its fields, if it has no layout of its own.
    #[inline]
    fn parts(&self) -> Parts {
        let parts = |opcode, file, offset, length| Parts { opcode, flags: 0, file, offset, length };
        let flag = |is_set, flag| if is_set { flag } else { 0 };
        match *self {
            Self::Open { .. } => parts(Opcode::Open, FileHandle(0), 0, 0),
            Self::Close(file) => parts(Opcode::Close, file, 0, 0),
            Self::Stat(file) => parts(Opcode::Stat, file, 0, 0),
            Self::Read { file, offset, length } => parts(Opcode::Read, file, offset, length.into()),
            Self::Write { file, offset, length } => parts(Opcode::Write, file, offset, length.into()),
            Self::Fsync { file, data_only } => {
                Parts { flags: flag(data_only, FLAG_DATA_ONLY), ..parts(Opcode::Fsync, file, 0, 0) }
            }
            Self::Discard { file, offset, length } => parts(Opcode::Discard, file, offset, length),
            Self::WriteZeroes { file, offset, length } => parts(Opcode::WriteZeroes, file, offset, length),
            Self::Cancel { id } => parts(Opcode::Cancel, FileHandle(0), id, 0),
            Self::Allocate { file, offset, length, keep_size } => {
                let parts = parts(Opcode::Allocate, file, offset, length);
                Parts { flags: flag(keep_size, FLAG_KEEP_SIZE), ..parts }
            }
            Self::Outcome { .. } => parts(Opcode::Outcome, FileHandle(0), 0, 0),
            Self::Reopen { file, .. } => parts(Opcode::Reopen, file, 0, 0),
            Self::ListNext { listing, is_odd, length } => Parts {
                flags: flag(is_odd, FLAG_ODD_PAGE),
                ..parts(Opcode::ListNext, FileHandle(0), listing, length.into())
            },
            Self::Truncate { file, size } => parts(Opcode::Truncate, file, 0, size),
            Self::Extents { file, offset, length } => parts(Opcode::Extents, file, offset, length),
            Self::Copy { source, offset, length, .. } => parts(Opcode::Copy, source, offset, length),
            Self::Checksum { file, offset, length, checksum } => {
                Parts { flags: checksum, ..parts(Opcode::Checksum, file, offset, length) }
            }
            Self::Lock { file, lock } => Parts { flags: lock, ..parts(Opcode::Lock, file, 0, 0) },
            Self::Path(command) => parts(command.opcode, FileHandle(0), 0, 0),
        }
    }

    /// The command with these fields, which are known to be what its operation uses.
    // Inlined, so that a read does not go through memory.
    #[inline(always)]
    fn from_parts(Parts { opcode, flags, file, offset, length }: Parts) -> Result<Self, Violation> {
        let data_len = || u32::try_from(length).map_err(|_| Violation::Length);
        Ok(match opcode {
            Opcode::Close => Self::Close(file),
            Opcode::Stat => Self::Stat(file),
            Opcode::Read => Self::Read { file, offset, length: data_len()? },
            Opcode::Write => Self::Write { file, offset, length: data_len()? },
            Opcode::Fsync => Self::Fsync { file, data_only: flags & FLAG_DATA_ONLY != 0 },
            Opcode::Discard => Self::Discard { file, offset, length },
            Opcode::WriteZeroes => Self::WriteZeroes { file, offset, length },
            Opcode::Cancel => Self::Cancel { id: offset },
            Opcode::Allocate => {
                Self::Allocate { file, offset, length, keep_size: flags & FLAG_KEEP_SIZE != 0 }
            }
            Opcode::ListNext => {
                Self::ListNext { listing: offset, is_odd: flags & FLAG_ODD_PAGE != 0, length: data_len()? }
            }
            Opcode::Truncate => Self::Truncate { file, size: length },
            Opcode::Extents => Self::Extents { file, offset, length },
            Opcode::Checksum => Self::Checksum { file, offset, length, checksum: flags },
            Opcode::Lock => Self::Lock { file, lock: flags },
            // They have another layout.
            _ => return Err(Violation::Field),
        })
    }

    /// Appends the command in wire form.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match *self {
            Self::Open { flags, mode, path } => {
                debug_assert!(path.len() <= PATH_BYTES_MAX);
                let open = OpenCommand {
                    opcode: U16::new(Opcode::Open as u16),
                    reserved: U16::ZERO,
                    flags: U32::new(flags),
                    mode: U32::new(mode),
                    path_len: U32::new(path.len() as u32),
                };
                return encode_padded(open.as_bytes(), path, out);
            }
            Self::Outcome { ids } => {
                debug_assert!(ids.len() <= OUTCOMES_MAX);
                let outcome = OutcomeCommand {
                    opcode: U16::new(Opcode::Outcome as u16),
                    count: U16::new(ids.len() as u16),
                    reserved: U32::ZERO,
                };
                return encode_padded(outcome.as_bytes(), ids.as_bytes(), out);
            }
            Self::Reopen { flags, file, identity, path } => {
                debug_assert!(path.len() <= PATH_BYTES_MAX);
                let reopen = ReopenCommand {
                    opcode: U16::new(Opcode::Reopen as u16),
                    reserved: U16::ZERO,
                    flags: U32::new(flags),
                    file: U32::new(file.0),
                    path_len: U32::new(path.len() as u32),
                    identity,
                };
                return encode_padded(reopen.as_bytes(), path, out);
            }
            Self::Copy { source, offset, length, destination, destination_offset } => {
                let copy = CopyCommand {
                    opcode: U16::new(Opcode::Copy as u16),
                    reserved: U16::ZERO,
                    source: U32::new(source.0),
                    offset: U64::new(offset),
                    length: U64::new(length),
                    destination: U32::new(destination.0),
                    reserved_too: U32::ZERO,
                    destination_offset: U64::new(destination_offset),
                };
                return out.extend_from_slice(copy.as_bytes());
            }
            Self::Path(command) => return command.encode(out),
            _ => {}
        }
        let Parts { opcode, flags, file, offset, length } = self.parts();
        let command = IoCommand {
            opcode: U16::new(opcode as u16),
            flags: U16::new(flags),
            file: U32::new(file.0),
            offset: U64::new(offset),
            length: U64::new(length),
        };
        out.extend_from_slice(command.as_bytes());
    }

    /// Reads a command. Whether its length agrees with the request's data and region is for the caller to
    /// check: see [`Command::data_lengths`].
    // As above.
    #[inline(always)]
    pub fn decode(body: &'a [u8]) -> Result<Self, Violation> {
        let (opcode, _) = U16::ref_from_prefix(body).map_err(|_| Violation::Length)?;
        let opcode = Opcode::from_wire(opcode.get()).ok_or(Violation::Field)?;
        let operation = opcode.operation();
        let Layout::Fields(fields) = &operation.layout else { return Self::decode_other(opcode, body) };
        let command = IoCommand::ref_from_bytes(body).map_err(|_| Violation::Length)?;
        let file = FileHandle(command.file.get());
        let (flags, offset, length) = (command.flags.get(), command.offset.get(), command.length.get());
        if flags & !operation.flags != 0
            || (file.0 != 0 && !fields.file)
            || (offset != 0 && !fields.offset)
            || (length != 0 && !fields.length)
        {
            return Err(Violation::Reserved);
        }
        Self::from_parts(Parts { opcode, flags, file, offset, length })
    }

    /// Reads a command that has more than fields.
    #[cold]
    fn decode_other(opcode: Opcode, body: &'a [u8]) -> Result<Self, Violation> {
        match opcode {
            Opcode::Open => Self::decode_open(body),
            Opcode::Outcome => Self::decode_outcome(body),
            Opcode::Reopen => Self::decode_reopen(body),
            Opcode::Copy => Self::decode_copy(body),
            _ => PathCommand::decode(opcode, body).map(Self::Path),
        }
    }

    fn decode_open(body: &'a [u8]) -> Result<Self, Violation> {
        let (open, rest) = OpenCommand::ref_from_prefix(body).map_err(|_| Violation::Length)?;
        let path = decode_path(open.path_len, rest)?;
        let flags = open.flags.get();
        if open.reserved.get() != 0 || flags & !OPEN_FLAGS != 0 {
            return Err(Violation::Reserved);
        }
        if open.mode.get() & !0o7777 != 0 || flags & (OPEN_READ | OPEN_WRITE) == 0 {
            return Err(Violation::Field);
        }
        Ok(Self::Open { flags, mode: open.mode.get(), path })
    }

    fn decode_outcome(body: &'a [u8]) -> Result<Self, Violation> {
        let (outcome, rest) = OutcomeCommand::ref_from_prefix(body).map_err(|_| Violation::Length)?;
        let len = usize::from(outcome.count.get()) * size_of::<U32>();
        if len > OUTCOMES_MAX * size_of::<U32>() {
            return Err(Violation::Length);
        }
        if outcome.reserved.get() != 0 {
            return Err(Violation::Reserved);
        }
        let ids = <[U32]>::ref_from_bytes(decode_padded(len, rest)?).map_err(|_| Violation::Length)?;
        Ok(Self::Outcome { ids })
    }

    fn decode_reopen(body: &'a [u8]) -> Result<Self, Violation> {
        let (reopen, rest) = ReopenCommand::ref_from_prefix(body).map_err(|_| Violation::Length)?;
        let path = decode_path(reopen.path_len, rest)?;
        let flags = reopen.flags.get();
        if reopen.reserved.get() != 0 || flags & !(OPEN_FLAGS & !OPEN_ONCE_FLAGS) != 0 {
            return Err(Violation::Reserved);
        }
        if flags & (OPEN_READ | OPEN_WRITE) == 0 {
            return Err(Violation::Field);
        }
        Ok(Self::Reopen { flags, file: FileHandle(reopen.file.get()), identity: reopen.identity, path })
    }

    fn decode_copy(body: &'a [u8]) -> Result<Self, Violation> {
        let copy = CopyCommand::ref_from_bytes(body).map_err(|_| Violation::Length)?;
        if copy.reserved.get() != 0 || copy.reserved_too.get() != 0 {
            return Err(Violation::Reserved);
        }
        Ok(Self::Copy {
            source: FileHandle(copy.source.get()),
            offset: copy.offset.get(),
            length: copy.length.get(),
            destination: FileHandle(copy.destination.get()),
            destination_offset: copy.destination_offset.get(),
        })
    }

    /// How many bytes of data the response brings at most, which is the length of the request's inward
    /// region; and how many the request brings, which is that of its inline data or outward region.
    #[inline]
    pub fn data_lengths(&self) -> (u32, u32) {
        match *self {
            Self::Read { length, .. } | Self::ListNext { length, .. } => (length, 0),
            Self::Write { length, .. } => (0, length),
            Self::Path(command) => command.data_lengths(),
            _ => (0, 0),
        }
    }

    /// The first of [`Command::data_lengths`].
    #[inline]
    pub fn read_length(&self) -> u32 {
        self.data_lengths().0
    }

    /// The second of [`Command::data_lengths`].
    #[inline]
    pub fn write_length(&self) -> u32 {
        self.data_lengths().1
    }

    /// Its opcode.
    #[inline]
    pub fn opcode(&self) -> Opcode {
        self.parts().opcode
    }
}

/// Appends the fixed part of a command and what follows it, padded with zeros to a multiple of 8.
fn encode_padded(fixed: &[u8], rest: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(fixed);
    out.extend_from_slice(rest);
    out.resize(start + padded(out.len() - start), 0);
}

/// The first `len` bytes of what is padded with zeros to a multiple of 8.
fn decode_padded(len: usize, bytes: &[u8]) -> Result<&[u8], Violation> {
    if bytes.len() != padded(len) {
        return Err(Violation::Length);
    }
    let (bytes, padding) = bytes.split_at(len);
    if padding.iter().any(|&byte| byte != 0) { Err(Violation::Reserved) } else { Ok(bytes) }
}

fn decode_path(len: U32, bytes: &[u8]) -> Result<&[u8], Violation> {
    let len = len.get() as usize;
    if len == 0 || len > PATH_BYTES_MAX {
        return Err(Violation::Length);
    }
    let path = decode_padded(len, bytes)?;
    if path.contains(&0) { Err(Violation::Field) } else { Ok(path) }
}

impl RequestOutcome {
    /// A request that was not executed, and never will be.
    pub fn never(id: u32) -> Self {
        Self { id: U32::new(id), errno: U16::ZERO, class: 0, state: STATE_NEVER, result: U64::ZERO }
    }

    /// A request that was executed, and answered with this status and result.
    pub fn done(id: u32, status: Status, result: u64) -> Self {
        Self {
            id: U32::new(id),
            errno: U16::new(status.errno as u16),
            class: status.class as u8,
            state: STATE_DONE,
            result: U64::new(result),
        }
    }

    /// Of which request it is.
    pub fn id(&self) -> u32 {
        self.id.get()
    }

    /// How it was answered; None if it was never executed. The status is not retryable.
    pub fn answer(&self) -> Result<Option<(Status, u64)>, Violation> {
        let errno = i32::from(self.errno.get());
        let class = Class::from_wire(self.class).ok_or(Violation::Field)?;
        if (errno == 0) != (class == Class::None) || errno > ERRNO_MAX {
            return Err(Violation::Field);
        }
        match self.state {
            STATE_NEVER if errno == 0 && self.result.get() == 0 => Ok(None),
            STATE_DONE => Ok(Some((Status { errno, class, retryable: false }, self.result.get()))),
            _ => Err(Violation::Field),
        }
    }

    /// The outcomes in the body of a response.
    pub fn decode(body: &[u8]) -> Result<&[Self], Violation> {
        <[Self]>::ref_from_bytes(body).map_err(|_| Violation::Length)
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
