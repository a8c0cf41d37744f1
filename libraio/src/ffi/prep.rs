//! The functions that set up an iocb, exported for programs that cannot use those of the header, which are
//! inline. `tests/c/compile-no-inline.c` holds the two together.

use std::ffi::{c_int, c_uint, c_ulonglong, c_void};
use std::ptr::null_mut;

use super::abi::*;
use super::state::raio_mr;

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
