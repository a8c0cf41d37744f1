//! Making a range of a file read as zeros, give its storage back or have some reserved, by blocking system
//! calls: for a thread of the pool.

use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, FileType, OFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};
use rustix::thread::{CapabilitySet, capabilities};

use crate::syscalls::{FileInfo, stat, without_direct};
use crate::tuning::files::PIECE_BYTES;

const PUNCH_HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

/// Gives storage back; the range reads as zeros then. Returns how much of it is done. EOPNOTSUPP if it takes
/// writing.
pub fn discard(fd: impl AsFd, offset: u64, length: u64) -> Result<u64, Errno> {
    let piece = length.min(PIECE_BYTES);
    match retry_on_intr(|| fallocate(&fd, PUNCH_HOLE, offset, piece)) {
        Err(errno) if is_unsupported(errno) => return Err(Errno::OPNOTSUPP),
        result => result?,
    }
    // Beyond a file's end there is nothing to give back.
    if piece < length && offset + piece >= stat(&fd)?.status.size.get() { Ok(length) } else { Ok(piece) }
}

/// Makes a range read as zeros: by the file system's or device's own means, else by writing. Returns how much
/// of it is done. A file that ends within the range becomes as long as what is done: nothing is allocated
/// beyond its end, where nobody would see it, and nothing is ever cut off, for it may be what another has
/// appended meanwhile.
pub fn write_zeroes(fd: impl AsFd, offset: u64, length: u64) -> Result<u64, Errno> {
    let piece = length.min(PIECE_BYTES);
    let info = stat(&fd)?;
    if is_device(&info) {
        return zero_device(fd, offset, piece).map(|()| piece);
    }
    let (size, end) = (info.status.size.get(), offset + length);
    if end > size {
        check_room(&fd, end - size.max(offset))?;
    }
    match retry_on_intr(|| fallocate(&fd, FallocateFlags::ZERO_RANGE, offset, piece)) {
        Err(errno) if is_unsupported(errno) => {}
        result => return result.map(|()| piece),
    }
    let within = (offset + piece).min(size).saturating_sub(offset);
    if within > 0 && retry_on_intr(|| fallocate(&fd, PUNCH_HOLE, offset, within)).is_err() {
        write(&fd, offset, within)?;
    }
    if within == piece {
        return Ok(piece);
    }
    // What lies beyond the end reads as zeros once the file is longer.
    write(&fd, end - 1, 1).map(|()| length)
}

/// Reserves storage; no byte that is there changes. Returns how much of it is done. A file that ends within
/// the range or before becomes as long as what is done, but not with `keep_size`. EOPNOTSUPP if the storage
/// cannot.
pub fn allocate(fd: impl AsFd, offset: u64, length: u64, keep_size: bool) -> Result<u64, Errno> {
    let piece = length.min(PIECE_BYTES);
    if piece < length {
        let info = stat(&fd)?;
        // All that the file has may lie in the range.
        let reserved = info.status.blocks.get() * 512;
        if !is_device(&info) {
            check_room(&fd, length.saturating_sub(reserved))?;
        }
    }
    let mode = if keep_size { FallocateFlags::KEEP_SIZE } else { FallocateFlags::empty() };
    match retry_on_intr(|| fallocate(&fd, mode, offset, piece)) {
        Err(errno) if is_unsupported(errno) => Err(Errno::OPNOTSUPP),
        result => result.map(|()| piece),
    }
}

/// Fails if the file system has no room for this many more bytes, before others find none.
fn check_room(fd: impl AsFd, bytes: u64) -> Result<(), Errno> {
    let fs = rustix::fs::fstatvfs(fd)?;
    let may_use_reserve =
        capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_RESOURCE));
    let free = if may_use_reserve { fs.f_bfree } else { fs.f_bavail };
    // Some do not know their size.
    if fs.f_blocks > 0 && bytes.div_ceil(fs.f_frsize.max(1)) > free { Err(Errno::NOSPC) } else { Ok(()) }
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
    let buffered = without_direct(&fd, OFlags::WRONLY)?;
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

/// Whether fallocate(2) failed because it cannot do this here (EINVAL: not at this alignment), rather than
/// because it went wrong.
fn is_unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::NODEV)
}
