//! Operations and their completions, as a program has them.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use raio_transport::memory::Buffers;
use raio_transport::protocol::{
    FLAG_BLAKE3, FLAG_CRC32C, FLAG_LOCK_EXCLUSIVE, FLAG_LOCK_SHARED, FileStatus, FileSystemStatus,
};

use crate::error::Error;
use crate::file::{CopySource, File};
use crate::names::{Attributes, PutOptions, ReadDir};

/// What is to be done to a file, with the memory for it.
#[derive(Debug)]
pub enum Operation {
    /// Read into `buffers`.
    Read {
        /// Where in the file.
        offset: u64,
        /// As many bytes as these hold, any number; fewer at the end of the file, or if what is behind
        /// failed.
        buffers: Buffers,
    },
    /// Read into a buffer that the context lends; give it back with [`crate::Context::release`].
    ReadLent {
        /// Where in the file.
        offset: u64,
        /// How many bytes, at most 1 GiB.
        length: usize,
    },
    /// Write from `buffers`.
    Write {
        /// Where in the file.
        offset: u64,
        /// All their bytes; fewer if what is behind failed.
        buffers: Buffers,
    },
    /// Make what was written and completed durable.
    Fsync {
        /// fdatasync(2).
        data_only: bool,
    },
    /// Give the range back to the storage; it reads as zeros where the storage says so.
    Discard {
        /// Where in the file.
        offset: u64,
        /// How many bytes; in one request, whatever [`crate::Context::io_bytes_max`].
        length: u64,
    },
    /// Make the range read as zeros.
    WriteZeroes {
        /// Where in the file.
        offset: u64,
        /// How many bytes; in one request, whatever [`crate::Context::io_bytes_max`].
        length: u64,
    },
    /// Reserve storage for the range. No byte changes; a file that ends before becomes longer, with zeros.
    Allocate {
        /// Where in the file.
        offset: u64,
        /// How many bytes; in one request, whatever [`crate::Context::io_bytes_max`].
        length: u64,
        /// The file's size stays.
        keep_size: bool,
    },
    /// Set the file's size.
    Truncate {
        /// In bytes. What is added reads as zeros.
        size: u64,
    },
    /// Ask for the file's status: [`Answer::Status`].
    Stat,
    /// Ask which parts of the range have data: [`Answer::Extents`].
    Extents {
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        length: u64,
    },
    /// Copy a range of another file to this one, within the server: the data does not come here. File systems
    /// that can share the extents (reflink) do. It is not atomic: of what others change meanwhile it copies
    /// the old or the new bytes.
    ///
    /// [`Completion::result`] is the bytes copied; fewer at the end of the source, or if it was cancelled or
    /// a later part failed: a copy of the rest tells which (0 at the end of the source).
    Copy {
        /// Where in this file.
        offset: u64,
        /// From which file: of the same session, and open for reading. If it is this one the ranges must not
        /// overlap.
        source: CopySource,
        /// Where in that file.
        source_offset: u64,
        /// How many bytes; in one request, whatever [`crate::Context::io_bytes_max`].
        length: u64,
    },
    /// Ask for the checksum of a range, which the server reads: [`Answer::Checksum`].
    /// [`Completion::result`] is the number of bytes covered; fewer at the end of the file.
    Checksum {
        /// Where in the file.
        offset: u64,
        /// How many bytes; in one request, whatever [`crate::Context::io_bytes_max`].
        length: u64,
        /// Which.
        algorithm: ChecksumAlgorithm,
    },
    /// Take, convert or release an advisory lock on the file, as flock(2): EAGAIN if another open file has
    /// one that conflicts, of any client or of a program on the server's host. The server never waits for it.
    /// A lock does not restrict reads or writes. It is released when the file is closed, or the session ends.
    /// Converting it releases it first, so it may be lost if that fails.
    ///
    /// If the session ends on the server, because that was restarted or not reached for too long, so does the
    /// lock. All operations on the file fail with ENOLCK from then on.
    Lock(Lock),
    /// Close the file. New operations on it are rejected from now on. If others are in flight on it, this one
    /// ends at once, and the server is told when they have ended, as [`File::close`] does. One that is
    /// cancelled, or times out, ends earlier than the server is told.
    Close,
}

/// A checksum: [`Operation::Checksum`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChecksumAlgorithm {
    /// CRC32C (Castagnoli), 32 bits: detects accidental corruption, not tampering.
    Crc32c,
    /// BLAKE3, 256 bits: detects tampering, too.
    Blake3,
}

impl ChecksumAlgorithm {
    pub(crate) fn flag(self) -> u16 {
        match self {
            Self::Crc32c => FLAG_CRC32C,
            Self::Blake3 => FLAG_BLAKE3,
        }
    }
}

/// The checksum of a range: [`Answer::Checksum`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Checksum {
    /// As [`ChecksumAlgorithm::Crc32c`].
    Crc32c(u32),
    /// As [`ChecksumAlgorithm::Blake3`].
    Blake3([u8; 32]),
}

/// A lock: [`Operation::Lock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lock {
    /// Others may have a shared lock, too.
    Shared,
    /// No other open file has a lock. The file must be open for writing.
    Exclusive,
    /// Release the lock.
    Unlock,
}

impl Lock {
    pub(crate) fn flag(self) -> u16 {
        match self {
            Self::Shared => FLAG_LOCK_SHARED,
            Self::Exclusive => FLAG_LOCK_EXCLUSIVE,
            Self::Unlock => 0,
        }
    }
}

/// What is to be done to a path, with the memory for it. A path reads /EXPORT/path/beneath/it.
#[derive(Debug)]
pub enum PathOperation {
    /// Open a file: [`Answer::File`].
    Open {
        /// Its path.
        path: PathBuf,
        /// As those of [`crate::Session::open`].
        flags: i32,
        /// The permissions of a file that is created.
        mode: u32,
    },
    /// Ask for the status of a path: [`Answer::Status`].
    Stat {
        /// The path of the file or directory.
        path: PathBuf,
        /// Of a symbolic link its own.
        nofollow: bool,
    },
    /// Read a file from its start, and ask for its status ([`Answer::Status`]), in one request. If the status
    /// has a larger size than `buffers`, there is more.
    Get {
        /// Its path.
        path: PathBuf,
        /// As many bytes as these hold, at most [`crate::Context::io_bytes_max`]: the rest is not used.
        buffers: Buffers,
    },
    /// Create or replace a file: see [`crate::Session::put`].
    Put {
        /// Its path.
        path: PathBuf,
        /// All that it is to hold, at most [`crate::Context::io_bytes_max`] bytes (EFBIG).
        buffers: Buffers,
        /// How.
        options: PutOptions,
    },
    /// Create a directory.
    Mkdir {
        /// Its path.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Remove an empty directory.
    Rmdir {
        /// Its path.
        path: PathBuf,
    },
    /// Remove a file, or what else is no directory.
    Unlink {
        /// Its path.
        path: PathBuf,
    },
    /// Rename a file or directory within its export.
    Rename {
        /// What there is.
        from: PathBuf,
        /// What it is to be.
        to: PathBuf,
        /// Fail with EEXIST if there is something already.
        no_replace: bool,
    },
    /// Give a file another name in its export.
    Link {
        /// The name that it has.
        original: PathBuf,
        /// The new one.
        link: PathBuf,
    },
    /// Create a symbolic link.
    Symlink {
        /// The path that it contains, stored unchanged.
        target: PathBuf,
        /// The new link.
        link: PathBuf,
    },
    /// Ask for the target of a symbolic link: [`Answer::Link`].
    Readlink {
        /// Its path.
        path: PathBuf,
    },
    /// Set attributes.
    SetAttributes {
        /// The path of the file or directory.
        path: PathBuf,
        /// Which.
        attributes: Attributes,
    },
    /// Ask for the space and inodes of a path's file system: [`Answer::FileSystem`].
    Statfs {
        /// Its path.
        path: PathBuf,
    },
    /// Ask for the value of an extended attribute: [`Answer::Xattr`].
    GetXattr {
        /// The path of the file or directory.
        path: PathBuf,
        /// The attribute, which begins with `user.`.
        name: OsString,
    },
    /// Set an extended attribute.
    SetXattr {
        /// The path of the file or directory.
        path: PathBuf,
        /// The attribute, which begins with `user.`.
        name: OsString,
        /// Its value, at most 64 KiB (E2BIG).
        buffers: Buffers,
        /// Fail with EEXIST if there is one with the name.
        exclusive: bool,
    },
    /// Ask for the names of the extended attributes that begin with `user.`: [`Answer::XattrNames`].
    ListXattr {
        /// The path of the file or directory.
        path: PathBuf,
    },
    /// Remove an extended attribute.
    RemoveXattr {
        /// The path of the file or directory.
        path: PathBuf,
        /// The attribute.
        name: OsString,
    },
    /// Begin to list a directory: [`Answer::Entries`], with the first of them.
    List {
        /// Its path; `/` lists the exports.
        path: PathBuf,
    },
    /// Ask for more entries: [`Answer::Entries`]. If it fails the list is over, and begun anew by another
    /// [`PathOperation::List`].
    ListNext {
        /// What there is of the list. It need not have been read.
        entries: ReadDir,
    },
}

/// The result of an operation, beside its byte count.
#[derive(Debug)]
pub enum Answer {
    /// The status of a file. Of one that was asked for by its path identity and verifier are zero.
    Status(FileStatus),
    /// An open file.
    File(File),
    /// The target of a symbolic link.
    Link(PathBuf),
    /// Space and inodes of a file system.
    FileSystem(FileSystemStatus),
    /// The value of an extended attribute.
    Xattr(Vec<u8>),
    /// The names of extended attributes.
    XattrNames(Vec<OsString>),
    /// The entries of a directory: [`ReadDir::buffered`] of them, and those that [`PathOperation::ListNext`]
    /// asks for.
    Entries(ReadDir),
    /// The parts of a range that have data.
    Extents {
        /// Where each begins, and how long it is, in bytes and in order.
        extents: Vec<(u64, u64)>,
        /// Up to where they are all. Ask for the rest from there on.
        end: u64,
    },
    /// The checksum of a range.
    Checksum(Checksum),
}

/// Options of one operation: see [`crate::Context::submit_with`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SubmitOptions {
    /// Checksums of its own.
    pub crc: OperationCrc,
    /// It ends with ETIMEDOUT when it is not over after this time. If it was sent, the server is asked to
    /// cancel it first. If the server cannot, or does not answer within 50 ms, the operation ends
    /// nevertheless, with its buffers. Of a write, a lock, and the like, [`crate::Error::is_unknown`] says
    /// then that it may have been done, or may yet be. Over RDMA, where the server may still reach the
    /// buffers, it ends when the server answers; and if that was too late to be cancelled, as if there were
    /// no timeout. One that is longer than a request ends with the bytes that were done without a gap, if
    /// there are any.
    ///
    /// The library has no threads: it looks at timeouts within [`crate::Context::wait`] and
    /// [`crate::Context::cancel`]. The poll descriptor becomes readable in time.
    pub timeout: Option<Duration>,
}

/// Whether an operation has checksums (CRC32C) of its requests, responses and data also in a session without
/// ([`crate::Crc`]). The server compares before it writes. A read brings the server's ([`Completion::crc`]),
/// which has been compared with what is in the buffers. Data that is damaged three times fails with EILSEQ,
/// and nothing is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OperationCrc {
    /// As the session has it.
    #[default]
    AsSession,
    /// It has; that of a write's data is computed now, from the buffers.
    Computed,
    /// It has, and this is that of a write's data, as it was when the program made it. A write that is longer
    /// than a request ([`crate::Context::io_bytes_max`]) is read through at submission once, for the
    /// checksums of its parts; if together they are not this one nothing is sent.
    Given(u32),
}

/// An operation that was not taken, with its buffers.
#[derive(Debug)]
pub struct Rejected {
    /// As it was submitted.
    pub operation: Operation,
    /// Why: EAGAIN (the context is full), EBADF (not an open file of this session), EINVAL, ENOTCONN.
    pub error: Error,
}

/// An operation on a path that was not taken, with its buffers.
#[derive(Debug)]
pub struct RejectedPath {
    /// As it was submitted.
    pub operation: PathOperation,
    /// Why: as of [`Rejected`]; or what is wrong with the path (ENOENT, ENAMETOOLONG), or EFBIG.
    pub error: Error,
}

/// Names an operation until its completion is collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl Ticket {
    /// A number below the context's `maxevents`, unique among its operations.
    pub fn index(&self) -> u32 {
        self.index
    }
}

/// The end of an operation.
#[derive(Debug)]
pub struct Completion {
    /// As given to [`crate::Context::submit`].
    pub token: u64,
    /// How many bytes were read or written (of a file or of a get or put), copied, or read for a checksum, 0
    /// for the other operations; or why it failed. Of fewer than asked, the same operation on the rest tells
    /// why: 0 bytes (a read at the end of the file), or the failure.
    pub result: Result<u64, Error>,
    /// The operation's buffers. Those of a read that the context lent are there only if it succeeded.
    pub buffers: Option<Buffers>,
    /// `buffers` is lent: give it to [`crate::Context::release`].
    pub is_lent: bool,
    /// CRC32C of the bytes that were read, which are in `buffers` as the server has sent them: of a read that
    /// was submitted with [`SubmitOptions::crc`].
    pub crc: Option<u32>,
    /// Of an operation that asks for something, or opens a file, and that has succeeded.
    pub answer: Option<Box<Answer>>,
}

/// The counters of a context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Operations taken.
    pub submitted: u64,
    /// Operations that have ended, failures among them.
    pub completed: u64,
    /// Operations that failed.
    pub failed: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Bytes copied within the library on their way to or from the caller's memory.
    pub bounced_bytes: u64,
    /// System calls that sent.
    pub sends: u64,
    /// System calls that received something.
    pub receives: u64,
    /// Times that a wait went to sleep.
    pub sleeps: u64,
    /// Connections that took the place of a broken one.
    pub reconnects: u64,
    /// Requests that were sent again.
    pub resent: u64,
    /// Operations that failed with their connection, and may have been done: [`Error::is_unknown`].
    pub unknown: u64,
    /// Fsyncs that failed because writes may be lost: [`Error::is_lost`].
    pub lost: u64,
    /// Operations taken and not ended, now.
    pub in_flight: u64,
    /// Requests on the wire that the server granted.
    pub queue_depth: u64,
    /// The largest request: longer reads and writes are sent in parts.
    pub io_bytes_max: u64,
    /// Requests whose data has arrived damaged, each time: they were sent again, twice at most. Also writes
    /// that were not sent at all, because their data was not what its checksum says.
    pub checksum_errors: u64,
    /// Whether all of the connection's messages have checksums: [`crate::Crc`].
    pub has_crc: bool,
}
