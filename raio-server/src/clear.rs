//! Making a range of a file read as zeros, or give its storage back, by blocking system calls: for a thread of the pool.

use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, FileType, OFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};

use crate::backend::{FileInfo, stat};
use crate::open::reopen;

const PUNCH_HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO_RANGE: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

/// At most this much is done by a call, so that others of its lane have their turns and it can be cancelled.
const PIECE_BYTES: u64 = 64 << 20;

/// Gives storage back; the range reads as zeros then. Returns how much of it is done. EOPNOTSUPP if it takes writing.
pub fn discard(fd: impl AsFd, offset: u64, length: u64) -> Result<u64, Errno> {
    let piece = length.min(PIECE_BYTES);
    match retry_on_intr(|| fallocate(&fd, PUNCH_HOLE, offset, piece)) {
        Err(errno) if is_unsupported(errno) => return Err(Errno::OPNOTSUPP),
        result => result?,
    }
    // Beyond a file's end there is nothing to give back.
    if piece < length && offset + piece >= stat(&fd)?.status.size.get() { Ok(length) } else { Ok(piece) }
}

/// Makes a range read as zeros: by the file system's or device's own means, else by writing. Returns how much of it is done. A file that
/// ends within the range becomes longer only when all is done; until then there may be storage beyond its end, for [`trim`].
pub fn write_zeroes(fd: impl AsFd, offset: u64, length: u64) -> Result<u64, Errno> {
    let piece = length.min(PIECE_BYTES);
    let info = stat(&fd)?;
    if is_device(&info) {
        return zero_device(fd, offset, piece).map(|()| piece);
    }
    let (size, end) = (info.status.size.get(), offset + length);
    if piece < length && end > size {
        check_room(&fd, end - size.max(offset), end)?;
    }
    let done = match retry_on_intr(|| fallocate(&fd, ZERO_RANGE, offset, piece)) {
        Err(errno) if is_unsupported(errno) => {
            // What lies beyond the end reads as zeros once the file is longer.
            let within = (offset + piece).min(size).saturating_sub(offset);
            if within > 0 && retry_on_intr(|| fallocate(&fd, PUNCH_HOLE, offset, within)).is_err() {
                write(&fd, offset, within)?;
            }
            if within < piece { length } else { piece }
        }
        result => result.map(|()| piece)?,
    };
    if done == length && end > size && end > stat(&fd)?.status.size.get() {
        // Not by ftruncate(2), which would cut off what another has appended meanwhile.
        let extend = FallocateFlags::ZERO_RANGE;
        match retry_on_intr(|| fallocate(&fd, extend, end - 1, 1)) {
            Err(errno) if is_unsupported(errno) => write(&fd, end - 1, 1)?,
            result => result?,
        }
    }
    Ok(done)
}

/// Fails at once if a file cannot become so much longer, rather than when it has taken all the space that others have.
fn check_room(fd: impl AsFd, bytes: u64, end: u64) -> Result<(), Errno> {
    match retry_on_intr(|| fallocate(&fd, ZERO_RANGE, end - 1, 1)) {
        // Nothing will be allocated.
        Err(errno) if is_unsupported(errno) => return Ok(()),
        result => result?,
    }
    let free = rustix::fs::fstatvfs(&fd)?;
    if bytes / free.f_frsize.max(1) > free.f_bfree { Err(Errno::NOSPC) } else { Ok(()) }
}

/// Gives back the storage that was allocated beyond a file's end, and returns the file's status.
pub fn trim(fd: impl AsFd) -> Result<FileInfo, Errno> {
    let info = stat(&fd)?;
    if !is_device(&info) {
        // It tells nobody anything if this fails: the storage stays allocated.
        let _ = retry_on_intr(|| rustix::fs::ftruncate(&fd, info.status.size.get()));
    }
    Ok(info)
}

/// Devices zero whole sectors; what is left at the ends is written.
fn zero_device(fd: impl AsFd, offset: u64, length: u64) -> Result<(), Errno> {
    let sector = rustix::fs::ioctl_blksszget(&fd)?.max(1).into();
    let end = offset + length;
    let (first, last) = (offset.next_multiple_of(sector), end - end % sector);
    if first >= last {
        return write(fd, offset, length);
    }
    match retry_on_intr(|| fallocate(&fd, FallocateFlags::ZERO_RANGE, first, last - first)) {
        Err(errno) if is_unsupported(errno) => write(fd, offset, length),
        Err(errno) => Err(errno),
        Ok(()) => {
            write(&fd, offset, first - offset)?;
            write(fd, last, end - last)
        }
    }
}

/// Writes zeros. With O_DIRECT it could not at any offset, so then it does so through the page cache.
fn write(fd: impl AsFd, mut offset: u64, mut length: u64) -> Result<(), Errno> {
    if length == 0 {
        return Ok(());
    }
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    let durability = flags.intersection(OFlags::SYNC | OFlags::DSYNC);
    let buffered =
        if flags.contains(OFlags::DIRECT) { Some(reopen(&fd, OFlags::WRONLY | durability)?) } else { None };
    let fd = buffered.as_ref().map_or(fd.as_fd(), AsFd::as_fd);
    while length > 0 {
        let bytes = &ZEROS[..ZEROS.len().min(usize::try_from(length).unwrap_or(usize::MAX))];
        let n = retry_on_intr(|| rustix::io::pwrite(fd, bytes, offset))? as u64;
        if n == 0 {
            return Err(Errno::IO);
        }
        offset += n;
        length -= n;
    }
    Ok(())
}

fn is_device(info: &FileInfo) -> bool {
    FileType::from_raw_mode(info.status.mode.get()) == FileType::BlockDevice
}

/// Whether fallocate(2) failed because it cannot do this here (EINVAL: not at this alignment), rather than because it went wrong.
fn is_unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::NODEV)
}
