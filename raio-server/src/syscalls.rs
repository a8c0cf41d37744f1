//! System calls on files that more than one module makes. All of them may wait for a file system: not for a
//! worker's thread.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use raio_transport::protocol::{Extent, FileStatus};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, SeekFrom, Statx, StatxFlags, StatxTimestamp,
};
use rustix::io::{Errno, retry_on_intr};
use rustix::path::Arg;

use crate::tuning::files::LOOKUP_RETRIES_MAX;

/// A file's status, and what more statx(2) knows.
#[derive(Clone, Copy, Debug)]
pub struct FileInfo {
    /// As clients see it.
    pub status: FileStatus,
    /// What O_DIRECT wants offsets and lengths to be multiples of, if the file system says so.
    pub direct_align: Option<u32>,
    /// The mount that it is on; None if the kernel does not tell that from others.
    pub mount: Option<Mount>,
}

impl FileInfo {
    /// Of what is no file of the server's, and has this size.
    pub fn synthetic(size: u64) -> Self {
        let mut info = Self { status: Default::default(), direct_align: None, mount: None };
        info.status.size = size.into();
        info.status.mode = (libc::S_IFREG | 0o666).into();
        info.status.links = 1.into();
        info.status.block_bytes = 4096.into();
        info
    }
}

/// A mount, as the kernel tells it from all others: by a number that is never used again, or on kernels
/// before 6.8 by one that is, and the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mount {
    number: u64,
    device: (u32, u32),
}

/// `STATX_MNT_ID_UNIQUE` (Linux 6.8): the id of a mount that no later one gets. Older kernels ignore the bit.
pub const UNIQUE_MOUNT: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// The status of what is open with O_PATH; a block device has the size 0. Does not wait on file systems that
/// keep it in memory.
pub fn stat_cached(fd: impl AsFd) -> Result<FileInfo, Errno> {
    let mask = StatxFlags::BASIC_STATS | UNIQUE_MOUNT;
    let stat = rustix::fs::statx(&fd, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, mask)?;
    Ok(info_of(&stat))
}

/// The status of what is open with O_PATH; a block device has the size 0.
pub fn stat_node(fd: impl AsFd) -> Result<FileInfo, Errno> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::from_bits_retain(libc::STATX_DIOALIGN) | UNIQUE_MOUNT;
    Ok(info_of(&rustix::fs::statx(&fd, c"", AtFlags::EMPTY_PATH, mask)?))
}

/// A time of a file in nanoseconds since the Epoch.
pub fn nanoseconds(time: StatxTimestamp) -> i64 {
    time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec.into())
}

fn info_of(stat: &Statx) -> FileInfo {
    let ns = |time: StatxTimestamp| nanoseconds(time).into();
    let device = |major, minor| libc::makedev(major, minor).into();
    // Where there is no disk the device's number is used again, too.
    let knows_mount = stat.stx_mask & UNIQUE_MOUNT.bits() != 0 || stat.stx_dev_major != 0;
    let mount = Mount { number: stat.stx_mnt_id, device: (stat.stx_dev_major, stat.stx_dev_minor) };
    let knows_align = stat.stx_mask & libc::STATX_DIOALIGN != 0 && stat.stx_dio_offset_align > 0;
    FileInfo {
        status: FileStatus {
            size: stat.stx_size.into(),
            blocks: stat.stx_blocks.into(),
            inode: stat.stx_ino.into(),
            device: device(stat.stx_dev_major, stat.stx_dev_minor),
            rdevice: device(stat.stx_rdev_major, stat.stx_rdev_minor),
            accessed_ns: ns(stat.stx_atime),
            modified_ns: ns(stat.stx_mtime),
            changed_ns: ns(stat.stx_ctime),
            mode: u32::from(stat.stx_mode).into(),
            links: stat.stx_nlink.into(),
            uid: stat.stx_uid.into(),
            gid: stat.stx_gid.into(),
            block_bytes: stat.stx_blksize.into(),
            direct_align: 1.into(),
            ..FileStatus::default()
        },
        direct_align: knows_align.then_some(stat.stx_dio_offset_align),
        mount: knows_mount.then_some(mount),
    }
}

/// The status of an open file, with a block device's capacity as its size.
pub fn stat(fd: impl AsFd) -> Result<FileInfo, Errno> {
    let mut info = stat_node(&fd)?;
    if FileType::from_raw_mode(info.status.mode.get()) == FileType::BlockDevice {
        info.status.size = rustix::fs::seek(&fd, SeekFrom::End(0))?.into();
    }
    Ok(info)
}

/// The parts of a range of a file that have data, and up to where they are known: the end of the range, or
/// the last one of as many as an answer has.
pub fn extents(fd: impl AsFd, offset: u64, length: u64) -> Result<(Vec<Extent>, u64), Errno> {
    let (mut extents, end) = (Vec::new(), offset + length);
    let mut at = offset;
    while at < end {
        let data = match rustix::fs::seek(&fd, SeekFrom::Data(at)) {
            Ok(data) if data < end => data,
            // There is no more data, or none in the range.
            Ok(_) | Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno),
        };
        let hole = rustix::fs::seek(&fd, SeekFrom::Hole(data))?.min(end);
        extents.push(Extent { offset: data.into(), length: (hole - data).into() });
        at = hole;
        if extents.len() == Extent::COUNT_MAX {
            return Ok((extents, at));
        }
    }
    Ok((extents, end))
}

/// openat2(2), tried again when a rename came in between.
pub fn openat2(
    base: BorrowedFd<'_>,
    path: impl Arg + Copy,
    flags: OFlags,
    mode: Mode,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC;
    let mut retries = LOOKUP_RETRIES_MAX;
    loop {
        match retry_on_intr(|| rustix::fs::openat2(base, path, flags, mode, resolve)) {
            Err(Errno::AGAIN) if retries > 0 => retries -= 1,
            result => return result,
        }
    }
}

/// A path by which system calls that take no descriptor reach what one refers to.
pub fn proc_path(fd: impl AsFd) -> CString {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    CString::new(path).unwrap_or_default()
}

/// What a descriptor with O_DIRECT refers to, open without it: for what reads or writes at any offset. None
/// if the descriptor is without it already.
pub fn without_direct(fd: impl AsFd, access: OFlags) -> Result<Option<OwnedFd>, Errno> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    if !flags.contains(OFlags::DIRECT) {
        return Ok(None);
    }
    let durability = flags.intersection(OFlags::SYNC | OFlags::DSYNC);
    reopen(fd, access | durability).map(Some)
}

/// Opens what a descriptor refers to once more, with other flags.
pub fn reopen(fd: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = proc_path(fd);
    retry_on_intr(|| rustix::fs::openat(CWD, &*path, flags | OFlags::CLOEXEC, Mode::empty()))
}
