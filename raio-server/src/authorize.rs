//! Whether a client may do what it asks of an open file: the one place that decides it, for the fast path and
//! for all other requests.
//!
//! In this order: the range exists, the file is open for the operation (which the protocol's table of
//! operations tells), the range keeps within the size limit, it is aligned, and the client may store as much.

use std::rc::Rc;
use std::sync::Arc;

use raio_transport::Status;
use raio_transport::protocol::{Command, FLAG_LOCK_EXCLUSIVE, FLAG_LOCK_SHARED, FileAccess, Opcode};
use raio_transport::transport::Response;
use rustix::fs::FlockOperation;

use crate::checksum::Checksum;
use crate::engine::Descriptor;
use crate::request::{
    Checksumming, Copying, Pieces, Range, RangeCommand, Read, Work, WorkerFile, Write, failure, success,
};
use crate::session::OpenFile;
use crate::stored::Full;
use crate::volume::SizeLimit;

/// A read of an open file, which may take a slot of `slot_bytes_max` at most. If it may not be done, or there
/// is nothing to do, the error is the response.
// Inlined: the fast path pays for what is due for a read only.
#[inline(always)]
pub fn read(open: &OpenFile, offset: u64, length: u32, slot_bytes_max: usize) -> Result<Read, Response> {
    let range = permitted_range(open, Opcode::Read, offset, length.into())?;
    match Read::new(range, open.alignment) {
        _ if length == 0 => Err(success(0)),
        Some(read) if read.slot_len() <= slot_bytes_max => Ok(read),
        _ => Err(cannot_be_widened(open)),
    }
}

/// The work that any other command on an open file means, or the response, as for [`read`].
///
/// # Panics
///
/// If the command is a read or a copy, or is not on an open file, or closes it.
pub fn work(command: &Command<'_>, file: Rc<WorkerFile>) -> Result<Work, Response> {
    let opcode = command.opcode();
    let in_pieces = |file: Rc<WorkerFile>, command, range| Work::InPieces(file, Pieces::new(command, range));
    let (work, length) = match *command {
        Command::Stat(_) => return Ok(Work::Stat(file, 0)),
        Command::Fsync { data_only, .. } => return Ok(Work::Fsync(file, data_only)),
        Command::Write { offset, length, .. } => {
            let range = permitted_range(&file.open, opcode, offset, length.into())?;
            check_size_limit(&file.open, range)?;
            check_alignment(&file.open, range)?;
            check_stored(&file.open, range)?;
            (Work::Write(file, Write::new(range)), range.length)
        }
        Command::Discard { offset, length, .. } => {
            let range = permitted_range(&file.open, opcode, offset, length)?;
            (in_pieces(file, RangeCommand::Discard, range), length)
        }
        Command::WriteZeroes { offset, length, .. } => {
            let range = permitted_range(&file.open, opcode, offset, length)?;
            check_size_limit(&file.open, range)?;
            check_stored(&file.open, range)?;
            (in_pieces(file, RangeCommand::WriteZeroes, range), length)
        }
        Command::Allocate { offset, length, keep_size, .. } => {
            let range = permitted_range(&file.open, opcode, offset, length)?;
            check_size_limit(&file.open, range)?;
            check_stored(&file.open, range)?;
            (in_pieces(file, RangeCommand::Allocate { keep_size }, range), length)
        }
        Command::Truncate { size, .. } => {
            let range = permitted_range(&file.open, opcode, 0, size)?;
            check_size_limit(&file.open, range)?;
            if let Some(stored) = &file.open.stored {
                stored.resize(size).map_err(too_much_stored)?;
            }
            return Ok(Work::Truncate(file, size));
        }
        Command::Extents { offset, length, .. } => {
            let range = permitted_range(&file.open, opcode, offset, length)?;
            if length == 0 {
                return Err(failure(Status::storage(libc::EINVAL), "The range is empty."));
            }
            return Ok(Work::Extents(file, range));
        }
        Command::Checksum { offset, length, checksum, .. } => {
            let range = permitted_range(&file.open, opcode, offset, length)?;
            check_descriptor(&file.open)?;
            let Some(checksum) = Checksum::new(checksum) else {
                let text = "Ask for one checksum: a CRC32C or a BLAKE3.";
                return Err(failure(Status::storage(libc::EINVAL), text));
            };
            let checksum = Checksumming::new(range, checksum);
            if length == 0 {
                return Err(checksum.answer());
            }
            return Ok(Work::Checksum(file, Box::new(checksum)));
        }
        Command::Lock { lock, .. } => {
            let operation = match lock {
                0 => FlockOperation::NonBlockingUnlock,
                FLAG_LOCK_SHARED => FlockOperation::NonBlockingLockShared,
                // As of fcntl(2), by which NFS does it.
                FLAG_LOCK_EXCLUSIVE if !file.open.access.write => return Err(not_open_for("writing")),
                FLAG_LOCK_EXCLUSIVE => FlockOperation::NonBlockingLockExclusive,
                _ => {
                    let text = "A lock is shared or exclusive.";
                    return Err(failure(Status::storage(libc::EINVAL), text));
                }
            };
            if !file.open.volume.properties().has_locks {
                let text = "Exports in memory (mem, null) have no locks.";
                return Err(failure(Status::storage(libc::EOPNOTSUPP), text));
            }
            check_descriptor(&file.open)?;
            return Ok(Work::Lock(file, operation));
        }
        Command::Read { .. }
        | Command::Copy { .. }
        | Command::Open { .. }
        | Command::Close(_)
        | Command::Cancel { .. }
        | Command::Outcome { .. }
        | Command::Reopen { .. }
        | Command::ListNext { .. }
        | Command::Path(_) => {
            unreachable!("{command:?} is no other work on an open file")
        }
    };
    // Checked like any other, and then there is nothing to do.
    if length == 0 { Err(success(0)) } else { Ok(work) }
}

/// The work that a copy means, or the response, as for [`read`].
pub fn copy(
    (source, offset): (Rc<WorkerFile>, u64),
    (destination, destination_offset): (Rc<WorkerFile>, u64),
    length: u64,
) -> Result<Work, Response> {
    let from = permitted_range(&source.open, Opcode::Copy, offset, length)?;
    let to = permitted_range(&destination.open, Opcode::Write, destination_offset, length)?;
    let overlaps = from.offset < to.end() && to.offset < from.end();
    if source.open.object == destination.open.object && overlaps {
        let text = "The ranges of the copy overlap.";
        return Err(failure(Status::storage(libc::EINVAL), text));
    }
    check_descriptor(&destination.open)?;
    let descriptor = Arc::clone(check_descriptor(&source.open)?);
    check_size_limit(&destination.open, to)?;
    check_stored(&destination.open, to)?;
    if length == 0 {
        return Err(success(0));
    }
    let copy = Copying::new((source, descriptor, from), (destination, destination_offset));
    Ok(Work::Copy(Box::new(copy)))
}

/// What is done within the server takes a descriptor.
fn check_descriptor(open: &OpenFile) -> Result<&Arc<Descriptor>, Response> {
    let text = "The server copies files and devices, and has checksums and locks of them; of this export it \
                has none (null).";
    open.volume.file_descriptor().ok_or_else(|| failure(Status::storage(libc::EOPNOTSUPP), text))
}

/// A range of a file that is open for the operation.
#[inline]
fn permitted_range(open: &OpenFile, opcode: Opcode, offset: u64, length: u64) -> Result<Range, Response> {
    let Some(range) = Range::new(offset, length) else { return Err(beyond_every_file()) };
    match opcode.operation().access {
        FileAccess::Read if !open.access.read => Err(not_open_for("reading")),
        FileAccess::Write if !open.access.write => Err(not_open_for("writing")),
        FileAccess::Any | FileAccess::Read | FileAccess::Write => Ok(range),
    }
}

#[cold]
fn beyond_every_file() -> Response {
    let text = "Offset and length lead beyond what a file can have (2^63 - 1 bytes).";
    failure(Status::storage(libc::EINVAL), text)
}

#[cold]
fn not_open_for(what: &str) -> Response {
    failure(Status::storage(libc::EBADF), &format!("The file is not open for {what}."))
}

/// Files do not grow beyond what the configuration allows.
fn check_size_limit(open: &OpenFile, range: Range) -> Result<(), Response> {
    let Some(SizeLimit { bytes, errno }) = open.size_limit.filter(|limit| range.end() > limit.bytes) else {
        return Ok(());
    };
    let text = if errno == libc::EFBIG {
        format!(
            "Files of this export cannot be larger than {bytes} bytes. Its operator can raise \
             `max-file-size`."
        )
    } else {
        format!("The export ends at {bytes} bytes and does not grow.")
    };
    Err(failure(Status::storage(errno), &text))
}

/// Clients store no more than `clients.toml` says. Counts what the request adds.
fn check_stored(open: &OpenFile, range: Range) -> Result<(), Response> {
    let Some(stored) = open.stored.as_ref().filter(|_| range.length > 0) else { return Ok(()) };
    stored.grow(range.end()).map_err(too_much_stored)
}

#[cold]
fn too_much_stored(full: Full) -> Response {
    failure(Status::storage(libc::EDQUOT), &full.to_string())
}

/// A write is not widened: that would mean to read, change and write back what another client may be writing.
fn check_alignment(open: &OpenFile, range: Range) -> Result<(), Response> {
    let align = open.alignment;
    if range.is_aligned(align.into()) {
        return Ok(());
    }
    let text = format!(
        "With O_DIRECT this file takes writes only at multiples of {align} bytes, of lengths that are \
         multiples of {align} bytes."
    );
    Err(failure(Status::storage(libc::EINVAL), &text))
}

#[cold]
fn cannot_be_widened(open: &OpenFile) -> Response {
    let text = format!(
        "With O_DIRECT this file wants multiples of {} bytes, and the range cannot be widened to that.",
        open.alignment
    );
    failure(Status::storage(libc::EINVAL), &text)
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;

    use raio_transport::protocol::FileHandle;

    use super::*;
    use crate::client::Client;
    use crate::engine::{Closing, Engine, Operation, Pending};
    use crate::session;
    use crate::volume::{Context, Properties, Volume};

    const HANDLE: FileHandle = FileHandle(1);
    const SIZE: u64 = 64 << 10;

    /// A file of a limited size.
    #[derive(Debug)]
    struct Limited {
        alignment: u32,
        errno: i32,
    }

    impl Volume for Limited {
        fn submit(&self, _: &mut Context<'_>, _: u64, _: &Weak<Client>, _: Operation) -> Option<Pending> {
            unreachable!("nothing is submitted here")
        }

        fn cancel(&self, _: &mut Context<'_>, _: u64, _: Pending) {}

        fn close(self: Arc<Self>, _: &mut dyn Engine, closing: Closing) {
            closing.complete(Ok(()));
        }

        fn properties(&self) -> Properties {
            let size_limit = Some(SizeLimit { bytes: SIZE, errno: self.errno });
            Properties { alignment: self.alignment, size_limit, ..Properties::default() }
        }
    }

    fn file(read: bool, write: bool, alignment: u32) -> Rc<WorkerFile> {
        let volume = Limited { alignment, errno: libc::EFBIG };
        let open = OpenFile::of_volume(volume, session::Access { read, write });
        Rc::new(WorkerFile::new(HANDLE, Arc::new(open)))
    }

    /// All commands that have a range.
    fn on_range(offset: u64, length: u32) -> [Command<'static>; 5] {
        let (file, long) = (HANDLE, length.into());
        [
            Command::Read { file, offset, length },
            Command::Write { file, offset, length },
            Command::Discard { file, offset, length: long },
            Command::WriteZeroes { file, offset, length: long },
            Command::Allocate { file, offset, length: long, keep_size: true },
        ]
    }

    /// As the worker does it.
    fn authorize(
        command: &Command<'_>,
        file: &Rc<WorkerFile>,
        slot_bytes_max: usize,
    ) -> Result<Work, Response> {
        let file = Rc::clone(file);
        match *command {
            Command::Read { offset, length, .. } => {
                read(&file.open, offset, length, slot_bytes_max).map(|read| Work::Read(file, read))
            }
            _ => work(command, file),
        }
    }

    /// The errno of each; 0 if it may be done.
    fn errnos(commands: &[Command<'_>], file: &Rc<WorkerFile>) -> Vec<i32> {
        let errno = |command| authorize(command, file, 1 << 20).map_or_else(|r| r.status.errno, |_| 0);
        commands.iter().map(errno).collect()
    }

    #[test]
    fn a_file_is_used_for_what_it_is_open_for() {
        let commands = on_range(0, 10);
        assert_eq!(errnos(&commands, &file(true, true, 1)), [0; 5]);
        assert_eq!(errnos(&commands, &file(false, true, 1)), [libc::EBADF, 0, 0, 0, 0]);
        let bad = libc::EBADF;
        assert_eq!(errnos(&commands, &file(true, false, 1)), [0, bad, bad, bad, bad]);
        let without_range = [Command::Stat(HANDLE), Command::Fsync { file: HANDLE, data_only: true }];
        assert_eq!(errnos(&without_range, &file(false, false, 1)), [0, 0]);
    }

    #[test]
    fn only_what_makes_a_file_longer_heeds_its_size_limit() {
        let big = libc::EFBIG;
        assert_eq!(errnos(&on_range(SIZE - 10, 10), &file(true, true, 1)), [0; 5]);
        assert_eq!(errnos(&on_range(SIZE - 10, 11), &file(true, true, 1)), [0, big, 0, big, big]);
        assert_eq!(errnos(&on_range(i64::MAX as u64, 1), &file(false, false, 1)), [libc::EINVAL; 5]);
    }

    #[test]
    fn direct_writes_are_aligned_and_direct_reads_are_widened_if_there_is_memory() {
        let file = file(true, true, 4096);
        assert_eq!(errnos(&on_range(4096, 8192), &file), [0; 5]);
        assert_eq!(errnos(&on_range(4096, 8191), &file), [0, libc::EINVAL, 0, 0, 0]);
        assert_eq!(errnos(&on_range(4095, 8192), &file), [0, libc::EINVAL, 0, 0, 0]);
        let read = Command::Read { file: HANDLE, offset: 4095, length: 2 };
        let work = authorize(&read, &file, 8192).unwrap();
        assert_eq!(work.slot_len(), 8192);
        assert_eq!(authorize(&read, &file, 4096).unwrap_err().status.errno, libc::EINVAL);
    }

    #[test]
    fn an_empty_range_is_checked_and_done() {
        for command in on_range(SIZE, 0) {
            let response = authorize(&command, &file(true, true, 4096), 0).unwrap_err();
            assert_eq!((response.status, response.result), (Status::OK, 0));
        }
        let response = authorize(&on_range(SIZE + 1, 0)[1], &file(true, true, 1), 0).unwrap_err();
        assert_eq!(response.status.errno, libc::EFBIG);
    }
}
