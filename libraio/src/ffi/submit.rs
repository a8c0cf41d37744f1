//! `raio_submit`: iocbs become operations of a context.

use std::ffi::{c_int, c_long, c_uint, c_void};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use raio_transport::memory::{Buffer, Buffers, RawBuffer};

use super::abi::*;
use super::descriptor;
use super::errors::{checked_offset, invalid, long, named};
use super::eventfd::Eventfds;
use super::handle::Handle;
use super::probe::ReadProbe;
use super::state::{
    ContextState, Directory, idle_dir, raio_context, raio_dir, raio_mr, return_dir, state, stopped,
};
use crate::context::Context;
use crate::error::Error;
use crate::file::CopySource;
use crate::names::{Attributes, PutOptions};
use crate::operation::{Operation, OperationCrc, PathOperation, SubmitOptions, Ticket};

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
    if is_on_path(io.raio_lio_opcode) {
        // SAFETY: the caller's contract is the same.
        return unsafe { submit_on_path(ctx, state, io, place) };
    }
    let source = |fd| state.files.get(fd, state.session).map(|file| file.as_source());
    // SAFETY: the caller vouches for the iocb's memory.
    let operation = unsafe { operation(ctx, &mut state.vectors, io, source) }?;
    let file = state.files.get(io.raio_fildes, state.session)?;
    let held = hold_eventfd(io, &mut state.eventfds)?;
    let token = iocb.expose_provenance() as u64;
    let submitted = if state.probe.is_unreadable(place) {
        context.submit_failed(file, operation, token, unreadable())
    } else if io.c.flags & IOCB_CRC != 0 {
        context.submit_with_crc(file, operation, Some(io.crc), token)
    } else {
        context.submit(file, operation, token)
    };
    finish(context, io, submitted.map_err(|rejected| rejected.error)?, held);
    if io.raio_lio_opcode == CMD_CLOSE {
        // Its descriptor ends now.
        drop(descriptor::remove_file(io.raio_fildes));
    }
    Ok(())
}

/// The same for one with a `struct raio_path_args`.
///
/// # Safety
/// As [`submit`].
#[cold]
unsafe fn submit_on_path(
    ctx: *mut raio_context,
    state: &mut ContextState,
    io: &mut raio_iocb,
    place: usize,
) -> Result<(), Error> {
    let context = state.context.as_mut().ok_or_else(stopped)?;
    check_session(io.raio_fildes, state.session)?;
    let held = hold_eventfd(io, &mut state.eventfds)?;
    // SAFETY: the caller's contract is the same.
    let operation = unsafe { path_operation(ctx, io) }?;
    let has_crc = io.c.flags & IOCB_CRC != 0;
    let crc = if has_crc { OperationCrc::Given(io.crc) } else { OperationCrc::AsSession };
    let options = SubmitOptions { crc, timeout: None };
    let failure = state.probe.is_unreadable(place).then(unreadable);
    let token = std::ptr::from_mut(io).expose_provenance() as u64;
    let submitted = context.submit_path_failing(operation, options, failure, token);
    let submitted = submitted.map_err(|rejected| {
        if let PathOperation::ListNext { entries } = rejected.operation {
            // SAFETY: they were taken from there.
            unsafe { return_dir(dir_of(io), Some(entries)) };
        }
        rejected.error
    });
    finish(context, io, submitted?, held);
    Ok(())
}

fn hold_eventfd(io: &raio_iocb, eventfds: &mut Eventfds) -> Result<Option<Arc<OwnedFd>>, Error> {
    if io.c.flags & IOCB_EVENTFD != 0 { eventfds.hold(io.c.resfd).map(Some) } else { Ok(None) }
}

/// An iocb was submitted.
fn finish(context: &mut Context, io: &mut raio_iocb, ticket: Ticket, eventfd: Option<Arc<OwnedFd>>) {
    io.key = ticket.index();
    if let Some(eventfd) = eventfd {
        context.notify(ticket, eventfd);
    }
    let timeout_ms = io.c.flags >> IOCB_TIMEOUT_SHIFT;
    if timeout_ms != 0 {
        context.set_timeout(ticket, Duration::from_millis(timeout_ms.into()));
    }
}

/// Whether an iocb with this opcode has a `struct raio_path_args`.
pub(super) fn is_on_path(opcode: c_int) -> bool {
    opcode == CMD_OPEN || (CMD_STAT_PATH..=CMD_READDIR).contains(&opcode)
}

/// Whether a descriptor is of this session, or of a file of it.
fn check_session(fd: c_int, session: c_int) -> Result<(), Error> {
    // Its contexts end before the session does.
    if fd == session || descriptor::session_of(fd)?.1 == session {
        return Ok(());
    }
    Err(Error::call(
        libc::EBADF,
        format!("Descriptor {fd} is of another session. Submit it to a context of that session."),
    ))
}

/// The directory that an iocb of the kind `CMD_READDIR` reads.
///
/// # Safety
/// The iocb has arguments.
pub(super) unsafe fn dir_of(io: &raio_iocb) -> *mut raio_dir {
    // SAFETY: the caller vouches for them.
    unsafe { io.c.buf.cast::<raio_path_args>().read_unaligned() }.buf.cast()
}

/// What an iocb with a path asks for. The entries of a directory are taken for that.
///
/// # Safety
/// The iocb's memory is as the header demands.
unsafe fn path_operation(ctx: *mut raio_context, io: &raio_iocb) -> Result<PathOperation, Error> {
    let c = &io.c;
    if c.buf.is_null() || c.nbytes != size_of::<raio_path_args>() as u64 {
        return Err(invalid("The iocb has no struct raio_path_args. Prepare it with raio_prep_*()."));
    }
    // SAFETY: not null, and the caller vouches for one.
    let args = unsafe { c.buf.cast::<raio_path_args>().read_unaligned() };
    let known = match io.raio_lio_opcode {
        CMD_OPEN => c_uint::MAX,
        CMD_STAT_PATH => PATH_NOFOLLOW,
        CMD_PUT => PATH_EXCL | PATH_FSYNC | PATH_MTIME,
        CMD_RENAME | CMD_SETXATTR => PATH_EXCL,
        CMD_SET_ATTRIBUTES => PATH_NOFOLLOW | PATH_MTIME | PATH_MODE | PATH_SIZE,
        _ => 0,
    };
    if c.flags & !(IOCB_EVENTFD | IOCB_CRC | IOCB_TIMEOUT) != 0
        || c.offset != 0
        || args.flags & !known != 0
        || args.reserved != [0; 2]
    {
        return Err(invalid(
            "The iocb or its arguments have flags that the operation does not take. Clear them.",
        ));
    }
    // SAFETY: the caller vouches for the strings.
    let named = |name, what| unsafe { named(name, what) }.map(PathBuf::from);
    if io.raio_lio_opcode == CMD_READDIR {
        // SAFETY: the iocb has arguments, and the caller vouches for the pointer in them, and for being the
        // only one to use the directory.
        let directory = unsafe { idle_dir(dir_of(io)) }?;
        if !matches!(directory, Directory::Idle(_)) {
            let text = "An iocb on the directory has failed. Close it, and list the directory again.";
            return Err(invalid(text));
        }
        let Directory::Idle(entries) = std::mem::replace(directory, Directory::InFlight) else {
            unreachable!("just looked at")
        };
        return Ok(PathOperation::ListNext { entries });
    }
    let (path, has) = (named(args.path, "path")?, |flag| args.flags & flag != 0);
    let other = || named(args.other, "other path");
    // SAFETY: the caller vouches for the memory: it is the library's until the event is collected.
    let buffers = || unsafe { buffer(ctx, c.mr, args.buf, args.nbytes) }.map(Buffers::One);
    let xattr = || named(args.other, "attribute").map(PathBuf::into_os_string);
    Ok(match io.raio_lio_opcode {
        CMD_OPEN => PathOperation::Open { path, flags: args.flags as c_int, mode: args.mode },
        CMD_STAT_PATH => {
            check_sized(args.stat, args.stat_size as usize)?;
            PathOperation::Stat { path, nofollow: has(PATH_NOFOLLOW) }
        }
        CMD_GET => {
            if !args.stat.is_null() {
                check_sized(args.stat, args.stat_size as usize)?;
            }
            PathOperation::Get { path, buffers: buffers()? }
        }
        CMD_PUT => {
            let options = put_options(args.mode, args.flags, args.modified_ns);
            PathOperation::Put { path, buffers: buffers()?, options }
        }
        CMD_MKDIR => PathOperation::Mkdir { path, mode: args.mode },
        CMD_RMDIR => PathOperation::Rmdir { path },
        CMD_UNLINK => PathOperation::Unlink { path },
        CMD_RENAME => PathOperation::Rename { from: path, to: other()?, no_replace: has(PATH_EXCL) },
        CMD_LINK => PathOperation::Link { original: path, link: other()? },
        CMD_SYMLINK => PathOperation::Symlink { target: other()?, link: path },
        CMD_READLINK => {
            if args.buf.is_null() || args.nbytes == 0 {
                return Err(invalid("The buffer for the link is NULL or empty. Pass one."));
            }
            PathOperation::Readlink { path }
        }
        CMD_SET_ATTRIBUTES => {
            let attributes = Attributes {
                mode: has(PATH_MODE).then_some(args.mode),
                size: has(PATH_SIZE).then_some(args.nbytes),
                modified_ns: has(PATH_MTIME).then_some(args.modified_ns),
                nofollow: has(PATH_NOFOLLOW),
            };
            PathOperation::SetAttributes { path, attributes }
        }
        CMD_STATFS => {
            check_sized(args.buf.cast::<raio_statfs>(), args.nbytes as usize)?;
            PathOperation::Statfs { path }
        }
        CMD_GETXATTR => {
            check_room(args.buf, args.nbytes as usize)?;
            PathOperation::GetXattr { path, name: xattr()? }
        }
        CMD_SETXATTR => {
            PathOperation::SetXattr { path, name: xattr()?, buffers: buffers()?, exclusive: has(PATH_EXCL) }
        }
        CMD_LISTXATTR => {
            check_room(args.buf, args.nbytes as usize)?;
            PathOperation::ListXattr { path }
        }
        CMD_REMOVEXATTR => PathOperation::RemoveXattr { path, name: xattr()? },
        _ => {
            if args.buf.is_null() || args.nbytes != size_of::<*mut raio_dir>() as u64 {
                return Err(invalid("The pointer to the directory is NULL. Pass where one is to go."));
            }
            PathOperation::List { path }
        }
    })
}

/// Fails if there is no buffer of this size.
pub(super) fn check_room(to: *mut c_void, size: usize) -> Result<(), Error> {
    match to.is_null() && size > 0 {
        true => Err(invalid("The buffer is NULL. Pass one, or 0 as its size.")),
        false => Ok(()),
    }
}

/// How a file is put, by the arguments of a call.
pub(super) fn put_options(mode: c_uint, flags: c_uint, modified_ns: i64) -> PutOptions {
    PutOptions {
        mode,
        modified_ns: (flags & PATH_MTIME != 0).then_some(modified_ns),
        exclusive: flags & PATH_EXCL != 0,
        fsync: flags & PATH_FSYNC != 0,
    }
}

/// Why a write fails whose memory was probed in vain.
pub(super) fn unreadable() -> Error {
    Error::call(
        libc::EFAULT,
        "The memory to write from cannot be read. Pass memory that is mapped for reading.",
    )
}

/// The operation of an iocb. `source` looks up the source of a copy.
///
/// # Safety
/// The iocb's memory is as the header demands.
unsafe fn operation(
    ctx: *mut raio_context,
    vectors: &mut Vec<Vec<Buffer>>,
    io: &raio_iocb,
    source: impl FnOnce(c_int) -> Result<CopySource, Error>,
) -> Result<Operation, Error> {
    let c = &io.c;
    if c.flags & !(IOCB_EVENTFD | IOCB_DATASYNC | IOCB_KEEP_SIZE | IOCB_CRC | IOCB_TIMEOUT) != 0
        || (c.flags & IOCB_DATASYNC != 0 && io.raio_lio_opcode != CMD_FSYNC)
        || (c.flags & IOCB_KEEP_SIZE != 0 && io.raio_lio_opcode != CMD_ALLOCATE)
    {
        return Err(invalid(format!(
            "The iocb has flags ({:#x}) that its operation does not take. Clear them.",
            c.flags
        )));
    }
    let offset = checked_offset(c.offset)?;
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
        CMD_CLOSE if c.buf.is_null() && c.nbytes == 0 => Operation::Close,
        CMD_CLOSE => return Err(invalid("A close has neither a buffer nor a length. Leave them 0.")),
        CMD_STAT_FD => {
            check_sized(c.buf.cast::<raio_stat>(), c.nbytes as usize)?;
            Operation::Stat
        }
        CMD_FTRUNCATE => Operation::Truncate { size: c.nbytes },
        CMD_COPY_FILE_RANGE | CMD_CHECKSUM if c.buf.is_null() => {
            return Err(invalid("The iocb has no arguments. Prepare it with raio_prep_*()."));
        }
        CMD_COPY_FILE_RANGE => {
            // SAFETY: not null, and the caller vouches for its arguments.
            let args = unsafe { c.buf.cast::<raio_copy_args>().read_unaligned() };
            if args.reserved_0 != 0 || args.reserved != [0; 2] {
                return Err(invalid("Reserved fields of the arguments are not 0. Clear them."));
            }
            let source_offset = u64::try_from(args.offset).map_err(|_| {
                invalid("The offset in the source is negative. Pass one counted from the start of the file.")
            })?;
            Operation::Copy { offset, source: source(args.fd)?, source_offset, length: c.nbytes }
        }
        CMD_CHECKSUM => {
            // SAFETY: as above.
            let algorithm = unsafe { c.buf.cast::<raio_checksum>().read_unaligned() }.algorithm()?;
            Operation::Checksum { offset, length: c.nbytes, algorithm }
        }
        CMD_FLOCK => {
            let operation = c_int::try_from(c.nbytes).unwrap_or(c_int::MAX);
            Operation::Lock(lock_of(operation)?)
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
    invalid(format!("{len} bytes are more than a program's memory can be. Pass the length of the buffer."))
}

/// Memory of the caller's, checked against the registration that it is said to lie in.
///
/// # Safety
/// `[address, address + len)` is memory that nothing else accesses until the buffer is gone, or is null.
unsafe fn buffer(
    ctx: *mut raio_context,
    mr: *mut raio_mr,
    address: *mut c_void,
    len: u64,
) -> Result<Buffer, Error> {
    if mr.is_null() {
        // SAFETY: the caller's contract is the same.
        return unsafe { unregistered(address, len) };
    }
    check_length(address, len)?;
    // SAFETY: the pointer is one of raio_reg_mr() or readable memory; registrations of this context are this
    // thread's.
    let registration = unsafe { Handle::get(mr) }.filter(|registration| registration.context == ctx);
    let registration = registration.ok_or_else(|| {
        invalid("The iocb's mr is not a registration of this context. Pass one that is, or NULL.")
    })?;
    // SAFETY: the caller vouches for the memory.
    unsafe { registration.region.buffer(address.cast(), len as usize) }
        .ok_or_else(|| invalid("The buffer lies outside its mr. Register all of it, or pass NULL as mr."))
}

/// Memory of the caller's that is in no registration.
///
/// # Safety
/// As [`buffer`].
pub(super) unsafe fn unregistered(address: *mut c_void, len: u64) -> Result<Buffer, Error> {
    check_length(address, len)?;
    // SAFETY: the caller vouches for the memory.
    match unsafe { RawBuffer::new(address.cast(), len as usize) } {
        Some(raw) => Ok(Buffer::Raw(raw)),
        None if len == 0 => Ok(Buffer::Owned(Box::default())),
        None => Err(invalid("The buffer is NULL. Pass one.")),
    }
}

#[inline]
fn check_length(address: *mut c_void, len: u64) -> Result<(), Error> {
    match len > BYTES_MAX || (address.addr() as u64).checked_add(len).is_none() {
        true => Err(too_long(len)),
        false => Ok(()),
    }
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
        if !matches!(opcode, CMD_PWRITE | CMD_PWRITEV | CMD_PUT | CMD_SETXATTR) {
            continue;
        }
        // Memory of raio_alloc() is ours, and stays while it is used.
        // SAFETY: the pointer is one of raio_reg_mr() or readable memory.
        let is_ours = unsafe { Handle::get(c.mr) }.is_some_and(|mr| mr.context == ctx && mr.is_allocated);
        match opcode {
            CMD_PWRITE if !is_ours && c.nbytes <= most => probe.add(c.buf.addr(), c.nbytes as usize),
            CMD_PWRITE if !is_ours => probe.check_long(c.buf.addr(), c.nbytes as usize, n),
            CMD_PUT | CMD_SETXATTR
                if !is_ours && !c.buf.is_null() && c.nbytes == size_of::<raio_path_args>() as u64 =>
            {
                // SAFETY: the caller vouches for the arguments.
                let args = unsafe { c.buf.cast::<raio_path_args>().read_unaligned() };
                if args.nbytes <= most {
                    probe.add(args.buf.addr(), args.nbytes as usize);
                }
            }
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
