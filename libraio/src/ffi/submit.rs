//! `raio_submit`: iocbs become operations of a context.

use std::ffi::{c_long, c_uint, c_void};
use std::time::Duration;

use raio_transport::memory::{Buffer, Buffers, RawBuffer};

use super::abi::*;
use super::errors::{invalid, long};
use super::handle::Handle;
use super::probe::ReadProbe;
use super::state::{ContextState, raio_context, raio_mr, state, stopped};
use crate::error::Error;
use crate::operation::Operation;

/// No object of a program is larger, and no offset.
const BYTES_MAX: u64 = isize::MAX as u64;

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `ios` is null or points at `nr` pointers, each null or of an
/// iocb whose memory is as the header demands.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_submit(ctx: *mut raio_context, nr: c_long, ios: *mut *mut raio_iocb) -> c_long {
    long(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        if nr < 0 {
            return Err(invalid("The number of iocbs is negative. Pass 0 or more."));
        }
        if nr == 0 {
            return Ok(0);
        }
        if ios.is_null() {
            return Err(invalid("The array of iocbs is NULL. Pass one."));
        }
        if let Some(context) = &state.context {
            let count = usize::try_from(nr).unwrap_or(0).min(context.room());
            // SAFETY: the caller vouches for `nr` pointers and what they point at.
            unsafe { probe_writes(&mut state.probe, ctx, ios, count, context.io_bytes_max() as u64) };
        }
        state.eventfds.batch += 1;
        let mut taken = 0;
        let mut rejected = None;
        while taken < nr {
            // SAFETY: the caller vouches for `nr` pointers and what they point at.
            let submitted = unsafe { submit(ctx, state, *ios.add(taken as usize), taken as usize) };
            if let Err(error) = submitted {
                rejected = Some(error);
                break;
            }
            taken += 1;
        }
        if taken > 0 {
            if let Some(context) = &mut state.context {
                context.flush();
            }
            return Ok(taken);
        }
        rejected.map_or(Ok(0), Err)
    })
}

/// Submits one iocb, the one at this place in its batch.
///
/// # Safety
/// `iocb` is null or points at an iocb whose memory is as the header demands.
unsafe fn submit(
    ctx: *mut raio_context,
    state: &mut ContextState,
    iocb: *mut raio_iocb,
    place: usize,
) -> Result<(), Error> {
    let context = state.context.as_mut().ok_or_else(stopped)?;
    if iocb.is_null() || !iocb.is_aligned() {
        return Err(invalid("An iocb is NULL or misaligned. Pass iocbs prepared by raio_prep_*()."));
    }
    if context.is_full() {
        return Err(context.not_now(
            "The context is full. Collect events first, or pass a larger maxevents to raio_setup().",
        ));
    }
    // SAFETY: not null, aligned, and the caller vouches that it is an iocb that nobody changes meanwhile.
    let io = unsafe { &mut *iocb };
    // SAFETY: the caller vouches for the iocb's memory.
    let operation = unsafe { operation(ctx, &mut state.vectors, io) }?;
    let file = state.files.get(io.raio_fildes, state.session)?;
    let eventfd = if io.c.flags & IOCB_EVENTFD != 0 { Some(state.eventfds.hold(io.c.resfd)?) } else { None };
    let token = iocb.expose_provenance() as u64;
    let submitted = if state.probe.is_unreadable(place) {
        context.submit_failed(file, operation, token, unreadable())
    } else if io.c.flags & IOCB_CRC != 0 {
        context.submit_with_crc(file, operation, Some(io.crc), token)
    } else {
        context.submit(file, operation, token)
    };
    let ticket = submitted.map_err(|rejected| rejected.error)?;
    io.key = ticket.index();
    if let Some(eventfd) = eventfd {
        context.notify(ticket, eventfd);
    }
    let timeout_ms = io.c.flags >> IOCB_TIMEOUT_SHIFT;
    if timeout_ms != 0 {
        context.set_timeout(ticket, Duration::from_millis(timeout_ms.into()));
    }
    Ok(())
}

fn unreadable() -> Error {
    Error::call(
        libc::EFAULT,
        "The memory to write from cannot be read. Pass memory that is mapped for reading.",
    )
}

/// What an iocb asks for.
///
/// # Safety
/// The iocb's memory is as the header demands.
unsafe fn operation(
    ctx: *mut raio_context,
    vectors: &mut Vec<Vec<Buffer>>,
    io: &raio_iocb,
) -> Result<Operation, Error> {
    let c = &io.c;
    const TIMEOUT: c_uint = IOCB_TIMEOUT_MAX << IOCB_TIMEOUT_SHIFT;
    if c.flags & !(IOCB_EVENTFD | IOCB_DATASYNC | IOCB_KEEP_SIZE | IOCB_CRC | TIMEOUT) != 0
        || (c.flags & IOCB_DATASYNC != 0 && io.raio_lio_opcode != CMD_FSYNC)
        || (c.flags & IOCB_KEEP_SIZE != 0 && io.raio_lio_opcode != CMD_ALLOCATE)
    {
        return Err(invalid(format!(
            "The iocb has flags ({:#x}) that its operation does not take. Clear them.",
            c.flags
        )));
    }
    let offset = u64::try_from(c.offset).map_err(|_| {
        invalid("The iocb's offset is negative. Pass one counted from the start of the file.")
    })?;
    Ok(match io.raio_lio_opcode {
        CMD_PREAD if c.buf.is_null() => Operation::ReadLent { offset, length: c.nbytes as usize },
        CMD_PREAD | CMD_PWRITE => {
            // SAFETY: the caller vouches for the memory: it is the library's until the event is collected.
            let buffer = unsafe { buffer(ctx, c.mr, c.buf, c.nbytes) }?;
            let buffers = Buffers::One(buffer);
            if io.raio_lio_opcode == CMD_PREAD {
                Operation::Read { offset, buffers }
            } else {
                Operation::Write { offset, buffers }
            }
        }
        CMD_PREADV | CMD_PWRITEV => {
            if c.nbytes > IOV_MAX || (c.buf.is_null() && c.nbytes > 0) {
                return Err(invalid(
                    "The iovecs are NULL or more than 1,024. Pass an array, or split the operation.",
                ));
            }
            let iovecs = (0..c.nbytes as usize).map(|n| {
                // SAFETY: the caller vouches for `nbytes` iovecs.
                unsafe { c.buf.cast::<libc::iovec>().add(n).read_unaligned() }
            });
            let total = iovecs.clone().fold(0, |total: u64, iov| total.saturating_add(iov.iov_len as u64));
            if total > BYTES_MAX {
                return Err(too_long(total));
            }
            let mut pieces = vectors.pop().unwrap_or_default();
            for iov in iovecs.filter(|iov| iov.iov_len > 0) {
                // SAFETY: the caller vouches for the memory behind each.
                pieces.push(unsafe { buffer(ctx, c.mr, iov.iov_base, iov.iov_len as u64) }?);
            }
            let buffers = Buffers::Many(pieces);
            if io.raio_lio_opcode == CMD_PREADV {
                Operation::Read { offset, buffers }
            } else {
                Operation::Write { offset, buffers }
            }
        }
        CMD_FSYNC => Operation::Fsync { data_only: c.flags & IOCB_DATASYNC != 0 },
        CMD_DISCARD => Operation::Discard { offset, length: c.nbytes },
        CMD_WRITE_ZEROES => Operation::WriteZeroes { offset, length: c.nbytes },
        CMD_ALLOCATE => {
            Operation::Allocate { offset, length: c.nbytes, keep_size: c.flags & IOCB_KEEP_SIZE != 0 }
        }
        other => {
            return Err(invalid(format!("Operation {other} is unknown. Use one of enum raio_iocb_cmd.")));
        }
    })
}

fn too_long(len: u64) -> Error {
    invalid(format!(
        "The iocb has {len} bytes, more than a program's memory can be. Pass the length of its buffer."
    ))
}

/// Memory of the caller's, checked against the registration that it is said to lie in.
///
/// # Safety
/// `[address, address + len)` is memory that nobody else accesses until the buffer is gone, or is null.
unsafe fn buffer(
    ctx: *mut raio_context,
    mr: *mut raio_mr,
    address: *mut c_void,
    len: u64,
) -> Result<Buffer, Error> {
    if len > BYTES_MAX || (address.addr() as u64).checked_add(len).is_none() {
        return Err(too_long(len));
    }
    let (address, len) = (address.cast::<u8>(), len as usize);
    if mr.is_null() {
        // SAFETY: the caller vouches for the memory.
        return match unsafe { RawBuffer::new(address, len) } {
            Some(raw) => Ok(Buffer::Raw(raw)),
            None if len == 0 => Ok(Buffer::Owned(Box::default())),
            None => Err(invalid("The buffer is NULL. Pass one.")),
        };
    }
    // SAFETY: the pointer is one of raio_reg_mr() or readable memory; registrations of this context are this
    // thread's.
    let registration = unsafe { Handle::get(mr) }.filter(|registration| registration.context == ctx);
    let registration = registration.ok_or_else(|| {
        invalid("The iocb's mr is not a registration of this context. Pass one that is, or NULL.")
    })?;
    // SAFETY: the caller vouches for the memory.
    unsafe { registration.region.buffer(address, len) }
        .ok_or_else(|| invalid("The buffer lies outside its mr. Register all of it, or pass NULL as mr."))
}

/// Checks that the memory of a batch's writes can be read.
///
/// # Safety
/// As [`raio_submit`]'s.
unsafe fn probe_writes(
    probe: &mut ReadProbe,
    ctx: *mut raio_context,
    ios: *mut *mut raio_iocb,
    count: usize,
    most: u64,
) {
    probe.clear();
    for n in 0..count {
        // SAFETY: the caller vouches for the pointers.
        let iocb = unsafe { *ios.add(n) };
        if iocb.is_null() || !iocb.is_aligned() {
            return probe.check_bytes();
        }
        // SAFETY: the caller vouches for the iocb.
        let (opcode, c) = unsafe { ((*iocb).raio_lio_opcode, &(*iocb).c) };
        if !matches!(opcode, CMD_PWRITE | CMD_PWRITEV) {
            continue;
        }
        // Memory of raio_alloc() is ours, and stays while it is used.
        // SAFETY: the pointer is one of raio_reg_mr() or readable memory.
        let is_ours = unsafe { Handle::get(c.mr) }.is_some_and(|mr| mr.context == ctx && mr.is_allocated);
        match opcode {
            CMD_PWRITE if !is_ours && c.nbytes <= most => probe.add(c.buf.addr(), c.nbytes as usize),
            CMD_PWRITE if !is_ours => probe.check_long(c.buf.addr(), c.nbytes as usize, n),
            CMD_PWRITEV if !is_ours && c.nbytes <= IOV_MAX && !c.buf.is_null() => {
                let place = n;
                for n in 0..c.nbytes as usize {
                    // SAFETY: the caller vouches for `nbytes` iovecs.
                    let iov = unsafe { c.buf.cast::<libc::iovec>().add(n).read_unaligned() };
                    if iov.iov_len as u64 <= most {
                        probe.add(iov.iov_base.addr(), iov.iov_len);
                    } else {
                        probe.check_long(iov.iov_base.addr(), iov.iov_len, place);
                    }
                }
            }
            _ => continue,
        }
        probe.end_iocb(n);
    }
    probe.check_bytes();
}
