//! The functions that set up an iocb, exported for programs that cannot use those of the header, which are
//! inline. `tests/c/compile-no-inline.c` holds the two together.

use std::ffi::{c_char, c_int, c_longlong, c_uint, c_ulonglong, c_void};
use std::ptr::{null, null_mut};

use super::abi::*;
use super::state::{raio_dir, raio_mr};

/// An iocb without flags.
fn iocb(
    opcode: c_int,
    fd: c_int,
    buf: *mut c_void,
    nbytes: c_ulonglong,
    offset: i64,
    mr: *mut raio_mr,
) -> raio_iocb {
    raio_iocb {
        data: null_mut(),
        key: 0,
        raio_fildes: fd,
        raio_lio_opcode: opcode,
        crc: 0,
        c: raio_iocb_common { buf, nbytes, offset, mr, flags: 0, resfd: 0 },
    }
}

/// An iocb for a range of a file, with these flags, and no memory.
fn range(opcode: c_int, fd: c_int, offset: i64, nbytes: c_ulonglong, flags: c_uint) -> raio_iocb {
    let mut iocb = iocb(opcode, fd, null_mut(), nbytes, offset, null_mut());
    iocb.c.flags = flags;
    iocb
}

macro_rules! export {
    ($($name:ident($($argument:ident: $type:ty),*) => $iocb:expr;)*) => {$(
        /// See libraio.h.
        ///
        /// # Safety
        /// `iocb` may be written.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(iocb: *mut raio_iocb, $($argument: $type),*) {
            let prepared = $iocb;
            // SAFETY: the caller vouches for the memory.
            unsafe { iocb.write(prepared) }
        }
    )*};
}

export! {
    raio_prep_pread(fd: c_int, buf: *mut c_void, count: usize, offset: i64, mr: *mut raio_mr)
        => self::iocb(CMD_PREAD, fd, buf, count as c_ulonglong, offset, mr);
    raio_prep_pwrite(fd: c_int, buf: *mut c_void, count: usize, offset: i64, mr: *mut raio_mr)
        => self::iocb(CMD_PWRITE, fd, buf, count as c_ulonglong, offset, mr);
    raio_prep_preadv(fd: c_int, iov: *const libc::iovec, iovcnt: c_int, offset: i64, mr: *mut raio_mr)
        => self::iocb(CMD_PREADV, fd, iov.cast_mut().cast(), iovcnt as c_ulonglong, offset, mr);
    raio_prep_pwritev(fd: c_int, iov: *const libc::iovec, iovcnt: c_int, offset: i64, mr: *mut raio_mr)
        => self::iocb(CMD_PWRITEV, fd, iov.cast_mut().cast(), iovcnt as c_ulonglong, offset, mr);
    raio_prep_fsync(fd: c_int, data_only: c_int)
        => range(CMD_FSYNC, fd, 0, 0, if data_only != 0 { IOCB_DATASYNC } else { 0 });
    raio_prep_discard(fd: c_int, offset: i64, nbytes: c_ulonglong)
        => range(CMD_DISCARD, fd, offset, nbytes, 0);
    raio_prep_write_zeroes(fd: c_int, offset: i64, nbytes: c_ulonglong)
        => range(CMD_WRITE_ZEROES, fd, offset, nbytes, 0);
    raio_prep_allocate(fd: c_int, offset: i64, nbytes: c_ulonglong, keep_size: c_int)
        => range(CMD_ALLOCATE, fd, offset, nbytes, if keep_size != 0 { IOCB_KEEP_SIZE } else { 0 });
    raio_prep_close(fd: c_int) => range(CMD_CLOSE, fd, 0, 0, 0);
    raio_prep_ftruncate(fd: c_int, size: c_ulonglong) => range(CMD_FTRUNCATE, fd, 0, size, 0);
    raio_prep_flock(fd: c_int, operation: c_int) => range(CMD_FLOCK, fd, 0, operation as c_ulonglong, 0);
    raio_prep_stat_fd(fd: c_int, stat: *mut raio_stat)
        => self::iocb(CMD_STAT_FD, fd, stat.cast(), size_of::<raio_stat>() as c_ulonglong, 0, null_mut());
}

/// See libraio.h.
///
/// # Safety
/// `iocb` and `args` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_prep_copy_file_range(
    iocb: *mut raio_iocb,
    args: *mut raio_copy_args,
    fd_in: c_int,
    off_in: i64,
    fd_out: c_int,
    off_out: i64,
    len: c_ulonglong,
) {
    let prepared = raio_copy_args { fd: fd_in, reserved_0: 0, offset: off_in, reserved: [0; 2] };
    // SAFETY: the caller vouches for the memory.
    unsafe {
        args.write(prepared);
        iocb.write(self::iocb(CMD_COPY_FILE_RANGE, fd_out, args.cast(), len, off_out, null_mut()));
    }
}

/// See libraio.h.
///
/// # Safety
/// `iocb` and `checksum` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_prep_checksum(
    iocb: *mut raio_iocb,
    fd: c_int,
    r#type: c_uint,
    offset: i64,
    len: c_ulonglong,
    checksum: *mut raio_checksum,
) {
    let prepared = raio_checksum { type_: r#type, crc32c: 0, blake3: [0; 32] };
    // SAFETY: the caller vouches for the memory.
    unsafe {
        checksum.write(prepared);
        iocb.write(self::iocb(CMD_CHECKSUM, fd, checksum.cast(), len, offset, null_mut()));
    }
}

/// Arguments without anything but a path.
fn on(path: *const c_char) -> raio_path_args {
    raio_path_args {
        path,
        other: null(),
        buf: null_mut(),
        nbytes: 0,
        stat: null_mut(),
        stat_size: 0,
        modified_ns: 0,
        flags: 0,
        mode: 0,
        reserved: [0; 2],
    }
}

/// An operation that has a file's status written to `stat`, unless that is null.
fn with_stat(args: raio_path_args, stat: *mut raio_stat) -> raio_path_args {
    raio_path_args { stat, stat_size: size_of::<raio_stat>() as c_ulonglong, ..args }
}

/// An operation with memory of this size.
fn with_buf(args: raio_path_args, buf: *mut c_void, size: usize) -> raio_path_args {
    raio_path_args { buf, nbytes: size as c_ulonglong, ..args }
}

/// Those on paths: `args` is where their arguments go.
macro_rules! export_on_path {
    ($($name:ident($($argument:ident: $type:ty),*) => ($opcode:expr, $mr:expr, $args:expr);)*) => {$(
        /// See libraio.h.
        ///
        /// # Safety
        /// `iocb` and `args` may be written.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            iocb: *mut raio_iocb,
            fd: c_int,
            args: *mut raio_path_args,
            $($argument: $type),*
        ) {
            let prepared = $args;
            let size = size_of::<raio_path_args>() as c_ulonglong;
            // SAFETY: the caller vouches for the memory.
            unsafe {
                args.write(prepared);
                iocb.write(self::iocb($opcode, fd, args.cast(), size, 0, $mr));
            }
        }
    )*};
}

type Text = *const c_char;

export_on_path! {
    raio_prep_open(path: Text, flags: c_int, mode: libc::mode_t)
        => (CMD_OPEN, null_mut(), raio_path_args { flags: flags as c_uint, mode, ..on(path) });
    raio_prep_stat_path(path: Text, stat: *mut raio_stat, flags: c_uint)
        => (CMD_STAT_PATH, null_mut(), raio_path_args { flags, ..with_stat(on(path), stat) });
    raio_prep_get(path: Text, buf: *mut c_void, count: usize, stat: *mut raio_stat, mr: *mut raio_mr)
        => (CMD_GET, mr, with_stat(with_buf(on(path), buf, count), stat));
    raio_prep_put(
        path: Text, buf: *const c_void, count: usize, mode: libc::mode_t, flags: c_uint, mr: *mut raio_mr
    ) => (CMD_PUT, mr, with_buf(raio_path_args { mode, flags, ..on(path) }, buf.cast_mut(), count));
    raio_prep_mkdir(path: Text, mode: libc::mode_t)
        => (CMD_MKDIR, null_mut(), raio_path_args { mode, ..on(path) });
    raio_prep_rmdir(path: Text) => (CMD_RMDIR, null_mut(), on(path));
    raio_prep_unlink(path: Text) => (CMD_UNLINK, null_mut(), on(path));
    raio_prep_rename(from: Text, to: Text, flags: c_uint)
        => (CMD_RENAME, null_mut(), raio_path_args { other: to, flags, ..on(from) });
    raio_prep_link(original: Text, link: Text)
        => (CMD_LINK, null_mut(), raio_path_args { other: link, ..on(original) });
    raio_prep_symlink(target: Text, link: Text)
        => (CMD_SYMLINK, null_mut(), raio_path_args { other: target, ..on(link) });
    raio_prep_readlink(path: Text, buf: *mut c_char, size: usize)
        => (CMD_READLINK, null_mut(), with_buf(on(path), buf.cast(), size));
    raio_prep_truncate(path: Text, size: c_ulonglong)
        => (CMD_SET_ATTRIBUTES, null_mut(), raio_path_args { nbytes: size, flags: PATH_SIZE, ..on(path) });
    raio_prep_chmod(path: Text, mode: libc::mode_t)
        => (CMD_SET_ATTRIBUTES, null_mut(), raio_path_args { mode, flags: PATH_MODE, ..on(path) });
    raio_prep_utimens(path: Text, modified_ns: c_longlong, flags: c_uint)
        => (CMD_SET_ATTRIBUTES, null_mut(), raio_path_args {
            modified_ns, flags: flags | PATH_MTIME, ..on(path)
        });
    raio_prep_statfs_path(path: Text, buf: *mut raio_statfs)
        => (CMD_STATFS, null_mut(), with_buf(on(path), buf.cast(), size_of::<raio_statfs>()));
    raio_prep_getxattr(path: Text, name: Text, value: *mut c_void, size: usize)
        => (CMD_GETXATTR, null_mut(), with_buf(raio_path_args { other: name, ..on(path) }, value, size));
    raio_prep_setxattr(path: Text, name: Text, value: *const c_void, size: usize, flags: c_uint)
        => (CMD_SETXATTR, null_mut(), with_buf(
            raio_path_args { other: name, flags, ..on(path) }, value.cast_mut(), size
        ));
    raio_prep_listxattr(path: Text, list: *mut c_char, size: usize)
        => (CMD_LISTXATTR, null_mut(), with_buf(on(path), list.cast(), size));
    raio_prep_removexattr(path: Text, name: Text)
        => (CMD_REMOVEXATTR, null_mut(), raio_path_args { other: name, ..on(path) });
    raio_prep_opendir(path: Text, dir: *mut *mut raio_dir)
        => (CMD_OPENDIR, null_mut(), with_buf(on(path), dir.cast(), size_of::<*mut raio_dir>()));
    raio_prep_readdir(dir: *mut raio_dir)
        => (CMD_READDIR, null_mut(), with_buf(on(null()), dir.cast(), 0));
}

/// See libraio.h.
///
/// # Safety
/// `iocb` points at an iocb.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_set_eventfd(iocb: *mut raio_iocb, eventfd: c_int) {
    // SAFETY: the caller vouches for the iocb.
    let iocb = unsafe { &mut *iocb };
    iocb.c.flags |= IOCB_EVENTFD;
    iocb.c.resfd = eventfd as c_uint;
}

/// See libraio.h.
///
/// # Safety
/// `iocb` points at an iocb.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_set_timeout(iocb: *mut raio_iocb, timeout_ms: c_uint) {
    // SAFETY: the caller vouches for the iocb.
    let iocb = unsafe { &mut *iocb };
    iocb.c.flags &= (1 << IOCB_TIMEOUT_SHIFT) - 1;
    iocb.c.flags |= timeout_ms.min(IOCB_TIMEOUT_MAX) << IOCB_TIMEOUT_SHIFT;
}

/// See libraio.h.
///
/// # Safety
/// `iocb` points at an iocb.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_set_crc(iocb: *mut raio_iocb, crc: c_uint) {
    // SAFETY: the caller vouches for the iocb.
    let iocb = unsafe { &mut *iocb };
    iocb.c.flags |= IOCB_CRC;
    iocb.crc = crc;
}
