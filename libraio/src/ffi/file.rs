//! Calls on files.

use std::ffi::{c_char, c_int};

use super::abi::{check_sized, fill_in, raio_stat};
use super::descriptor;
use super::errors::{int, invalid, named};

/// See libraio.h.
///
/// # Safety
/// `pathname` is null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_open(fd: c_int, pathname: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the caller's contract is the same.
    unsafe { raio_open_mode(fd, pathname, flags, 0o644) }
}

/// See libraio.h.
///
/// # Safety
/// `pathname` is null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_open_mode(
    fd: c_int,
    pathname: *const c_char,
    flags: c_int,
    mode: libc::mode_t,
) -> c_int {
    int(|| {
        let session = descriptor::session(fd)?;
        // SAFETY: the caller vouches for the string.
        let path = unsafe { named(pathname, "path") }?;
        descriptor::add_file(fd, session.open(path, flags, mode)?)
    })
}

/// See libraio.h.
///
/// # Safety
/// `buf` is null or points at a `struct stat64` that may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_fstat(fd: c_int, buf: *mut libc::stat64) -> c_int {
    int(|| {
        let (file, _) = descriptor::file(fd)?;
        if buf.is_null() {
            return Err(invalid("The stat buffer is NULL. Pass one."));
        }
        let status = file.status()?;
        // SAFETY: a `stat64` is integers, for which zero is a value.
        let mut stat: libc::stat64 = unsafe { std::mem::zeroed() };
        stat.st_dev = status.device.get();
        stat.st_ino = status.inode.get();
        stat.st_mode = status.mode.get();
        stat.st_nlink = status.links.get().into();
        stat.st_uid = status.uid.get();
        stat.st_gid = status.gid.get();
        stat.st_rdev = status.rdevice.get();
        stat.st_size = status.size.get() as i64;
        stat.st_blksize = status.block_bytes.get() as _;
        stat.st_blocks = status.blocks.get() as i64;
        let seconds = |ns: i64| (ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
        (stat.st_atime, stat.st_atime_nsec) = seconds(status.accessed_ns.get());
        (stat.st_mtime, stat.st_mtime_nsec) = seconds(status.modified_ns.get());
        (stat.st_ctime, stat.st_ctime_nsec) = seconds(status.changed_ns.get());
        // SAFETY: not null, and the caller vouches for the rest.
        unsafe { buf.write_unaligned(stat) };
        Ok(0)
    })
}

/// See libraio.h.
///
/// # Safety
/// `buf` is null or has room for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_stat_fd(fd: c_int, buf: *mut raio_stat, size: usize) -> c_int {
    int(|| {
        let (file, _) = descriptor::file(fd)?;
        check_sized(buf, size)?;
        let status = file.status()?;
        // SAFETY: just checked, and the caller vouches for `size` bytes.
        unsafe { fill_in(raio_stat::from(&status), buf, size) };
        Ok(0)
    })
}

/// See libraio.h.
#[unsafe(no_mangle)]
pub extern "C" fn raio_close(fd: c_int) -> c_int {
    int(|| descriptor::remove_file(fd)?.close().map(|()| 0))
}
