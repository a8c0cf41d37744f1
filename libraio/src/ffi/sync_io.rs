//! What is done to a file by its descriptor alone, each waited for.

use std::ffi::{c_int, c_ulonglong, c_void};
use std::time::{Duration, Instant};

use raio_transport::memory::Buffers;

use super::abi::{lock_of, raio_checksum, raio_extent};
use super::descriptor;
use super::errors::{checked_offset, int, invalid, longlong, ssize};
use super::submit::{unreadable, unregistered};
use crate::error::{Error, protocol_error};
use crate::operation::{Answer, Completion, Operation};

/// A year: nobody waits for longer.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// See libraio.h.
///
/// # Safety
/// `buf` is null or points at `count` bytes that may be written, and that nothing else accesses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_pread(fd: c_int, buf: *mut c_void, count: usize, offset: i64) -> isize {
    // SAFETY: the caller's contract is the same.
    ssize(|| unsafe { transfer(fd, buf, count, offset, false) })
}

/// See libraio.h.
///
/// # Safety
/// `buf` is null or points at `count` bytes, and nothing changes them meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_pwrite(fd: c_int, buf: *const c_void, count: usize, offset: i64) -> isize {
    // SAFETY: the caller's contract is the same, and a write does not change the memory.
    ssize(|| unsafe { transfer(fd, buf.cast_mut(), count, offset, true) })
}

/// See libraio.h.
#[unsafe(no_mangle)]
pub extern "C" fn raio_fsync(fd: c_int, data_only: c_int) -> c_int {
    int(|| on_file(fd, Operation::Fsync { data_only: data_only != 0 }).map(|_| 0))
}

/// See libraio.h.
#[unsafe(no_mangle)]
pub extern "C" fn raio_ftruncate(fd: c_int, size: c_ulonglong) -> c_int {
    int(|| on_file(fd, Operation::Truncate { size }).map(|_| 0))
}

/// See libraio.h.
///
/// # Safety
/// `extents` is null or has room for `nr`; `end` is null or may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_extents(
    fd: c_int,
    offset: i64,
    length: c_ulonglong,
    extents: *mut raio_extent,
    nr: c_int,
    end: *mut c_ulonglong,
) -> c_int {
    int(|| {
        let count = usize::try_from(nr).unwrap_or(0);
        if extents.is_null() || end.is_null() || count == 0 {
            return Err(invalid(
                "The extents or the end are NULL, or nr is not positive. Pass room for some.",
            ));
        }
        let offset = checked_offset(offset)?;
        let answer = on_file(fd, Operation::Extents { offset, length })?.answer;
        let Some(Answer::Extents { extents: found, end: found_end }) = answer.map(|answer| *answer) else {
            return Err(protocol_error());
        };
        // Those that there is no room for are asked for again.
        let complete_to = found.get(count).map_or(found_end, |&(offset, _)| offset);
        let found = &found[..found.len().min(count)];
        for (n, &(offset, length)) in found.iter().enumerate() {
            // SAFETY: `n` is below `nr`, and the caller vouches for as many.
            unsafe { extents.add(n).write(raio_extent { offset, length }) };
        }
        // SAFETY: not null, and the caller vouches for the rest.
        unsafe { end.write(complete_to) };
        Ok(found.len() as c_int)
    })
}

/// See libraio.h.
#[unsafe(no_mangle)]
pub extern "C" fn raio_copy_file_range(
    fd_in: c_int,
    off_in: i64,
    fd_out: c_int,
    off_out: i64,
    len: c_ulonglong,
) -> i64 {
    longlong(|| {
        let (source_offset, offset) = (checked_offset(off_in)?, checked_offset(off_out)?);
        let source = descriptor::file(fd_in)?.0.as_source();
        on_range(fd_out, Operation::Copy { offset, source, source_offset, length: len })?.result
    })
}

/// See libraio.h.
///
/// # Safety
/// `checksum` is null or may be read and written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_checksum_range(
    fd: c_int,
    offset: i64,
    len: c_ulonglong,
    checksum: *mut raio_checksum,
) -> i64 {
    longlong(|| {
        if checksum.is_null() {
            return Err(invalid("The checksum is NULL. Pass room for one, with its type."));
        }
        // SAFETY: not null, and the caller vouches for the rest.
        let asked = unsafe { checksum.read() };
        let (offset, algorithm) = (checked_offset(offset)?, asked.algorithm()?);
        let completion = on_range(fd, Operation::Checksum { offset, length: len, algorithm })?;
        let Some(Answer::Checksum(found)) = completion.answer.map(|answer| *answer) else {
            return Err(protocol_error());
        };
        // SAFETY: as above.
        unsafe { checksum.write(asked.with(found)) };
        completion.result
    })
}

/// See libraio.h.
#[unsafe(no_mangle)]
pub extern "C" fn raio_flock(fd: c_int, operation: c_int) -> c_int {
    int(|| on_file(fd, Operation::Lock(lock_of(operation)?)).map(|_| 0))
}

/// Does an operation without memory, and waits for the end of it.
fn on_file(fd: c_int, operation: Operation) -> Result<Completion, Error> {
    let (file, contexts) = descriptor::file_to_use(fd)?;
    let deadline = Instant::now() + contexts.session().call_timeout();
    contexts.lend(deadline)?.run_whole(&file, operation, deadline)
}

/// The same for one that may take as long as the storage does.
fn on_range(fd: c_int, operation: Operation) -> Result<Completion, Error> {
    let (file, contexts) = descriptor::file_to_use(fd)?;
    let now = Instant::now();
    contexts.lend(now + contexts.session().call_timeout())?.run_whole(&file, operation, now + FOR_EVER)
}

/// Reads or writes, and waits for the end of it.
///
/// # Safety
/// `buf` is null or points at `count` bytes that nothing else accesses meanwhile.
unsafe fn transfer(
    fd: c_int,
    buf: *mut c_void,
    count: usize,
    offset: i64,
    is_write: bool,
) -> Result<isize, Error> {
    let (file, contexts) = descriptor::file_to_use(fd)?;
    let offset = checked_offset(offset)?;
    // SAFETY: the caller vouches for the memory, and it is not used any more when `run` returns.
    let buffer = unsafe { unregistered(buf, count as u64) }?;
    let deadline = Instant::now() + contexts.session().call_timeout();
    let mut context = contexts.lend(deadline)?;
    let buffers = Buffers::One(buffer);
    let operation = if is_write {
        if !context.is_readable(buf.addr(), count) {
            return Err(unreadable());
        }
        Operation::Write { offset, buffers }
    } else {
        Operation::Read { offset, buffers }
    };
    Ok(context.run(&file, operation, deadline)? as isize)
}
