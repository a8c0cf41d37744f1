//! Reads and writes by descriptor alone, each waited for.

use std::ffi::{c_int, c_void};
use std::time::Instant;

use raio_transport::memory::{Buffer, Buffers, RawBuffer};

use super::descriptor;
use super::errors::{fail, invalid, run};
use crate::error::Error;
use crate::operation::Operation;

/// See libraio.h.
///
/// # Safety
/// `buf` is null or points at `count` bytes that may be written, and that nobody else accesses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_pread(fd: c_int, buf: *mut c_void, count: usize, offset: i64) -> isize {
    // SAFETY: the caller's contract is the same.
    ssize(|| unsafe { transfer(fd, buf, count, offset, false) })
}

/// See libraio.h.
///
/// # Safety
/// `buf` is null or points at `count` bytes, and nobody changes them meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_pwrite(fd: c_int, buf: *const c_void, count: usize, offset: i64) -> isize {
    // SAFETY: the caller's contract is the same, and a write does not change the memory.
    ssize(|| unsafe { transfer(fd, buf.cast_mut(), count, offset, true) })
}

fn ssize(body: impl FnOnce() -> Result<isize, Error>) -> isize {
    run(body).unwrap_or_else(|errno| fail(errno, -1))
}

/// Reads or writes, and waits for the end of it.
///
/// # Safety
/// `buf` is null or points at `count` bytes that nobody else accesses meanwhile.
unsafe fn transfer(
    fd: c_int,
    buf: *mut c_void,
    count: usize,
    offset: i64,
    is_write: bool,
) -> Result<isize, Error> {
    let (file, contexts) = descriptor::file_to_use(fd)?;
    let offset = u64::try_from(offset)
        .map_err(|_| invalid("The offset is negative. Pass one counted from the start of the file."))?;
    if count > isize::MAX as usize || buf.addr().checked_add(count).is_none() {
        return Err(invalid(format!(
            "{count} bytes are more than a program's memory can be. Pass the length of the buffer."
        )));
    }
    // SAFETY: the caller vouches for the memory, and it is not used any more when `run` returns.
    let buffer = match unsafe { RawBuffer::new(buf.cast(), count) } {
        Some(raw) => Buffer::Raw(raw),
        None if count == 0 => Buffer::Owned(Box::default()),
        None => return Err(invalid("The buffer is NULL. Pass one.")),
    };
    let deadline = Instant::now() + contexts.session().call_timeout();
    let mut context = contexts.lend(deadline)?;
    let buffers = Buffers::One(buffer);
    let operation = if is_write {
        if !context.is_readable(buf.addr(), count) {
            return Err(Error::call(
                libc::EFAULT,
                "The memory to write from cannot be read. Pass memory that is mapped for reading.",
            ));
        }
        Operation::Write { offset, buffers }
    } else {
        Operation::Read { offset, buffers }
    };
    Ok(context.run(&file, operation, deadline)? as isize)
}
