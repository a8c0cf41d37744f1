//! Calls that end an iocb: collecting its event, cancelling it, and giving back what was lent for it.

use std::ffi::{c_char, c_int, c_long, c_ulong};
use std::os::unix::ffi::OsStrExt;
use std::ptr::null_mut;
use std::time::Duration;

use raio_transport::memory::{Buffer, Buffers};

use super::abi::{
    CMD_OPENDIR, CMD_READDIR, CMD_STAT_FD, RES2_LOST, RES2_RETRYABLE, RES2_UNKNOWN, fill_in, raio_checksum,
    raio_event, raio_iocb, raio_path_args, raio_stat, raio_statfs,
};
use super::descriptor;
use super::errors::{FailureTexts, fail, int, invalid, long, run, set_message};
use super::lent::LentBuffers;
use super::names::{copy_all, joined};
use super::state::{new_dir, raio_context, raio_dir, return_dir, state, stopped};
use super::submit::dir_of;
use crate::error::Error;
use crate::operation::{Answer, Completion};

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `events` is null or has room for `nr`; `timeout` is null or
/// may be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_getevents(
    ctx: *mut raio_context,
    min_nr: c_long,
    nr: c_long,
    events: *mut raio_event,
    timeout: *mut libc::timespec,
) -> c_long {
    long(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        let (Ok(min), Ok(max)) = (usize::try_from(min_nr), usize::try_from(nr)) else {
            return Err(invalid("min_nr or nr is negative. Pass 0 or more."));
        };
        if min > max || (events.is_null() && max > 0) {
            return Err(invalid("min_nr exceeds nr, or the events are NULL. Pass a buffer for nr events."));
        }
        let timeout = if timeout.is_null() {
            None
        } else {
            // SAFETY: not null, and the caller vouches for the rest.
            let timeout = unsafe { timeout.read_unaligned() };
            match (u64::try_from(timeout.tv_sec), u32::try_from(timeout.tv_nsec)) {
                (Ok(s), Ok(ns)) if ns < 1_000_000_000 => Some(Duration::new(s, ns)),
                _ => {
                    return Err(invalid(
                        "The timeout is negative, or its tv_nsec is 1,000,000,000 or more. Pass a valid \
                         timespec.",
                    ));
                }
            }
        };
        let context = state.context.as_mut().ok_or_else(stopped)?;
        if max == 0 {
            return Ok(0);
        }
        state.failures.clear();
        context.wait(min, max, timeout)?;
        let mut n = 0;
        while n < max {
            let Some(completion) = context.next() else { break };
            if let Err(error) = &completion.result {
                set_message(&error.text);
            }
            // SAFETY: there is room for `nr` events.
            unsafe {
                events.add(n).write(event(
                    completion,
                    state.session,
                    &mut state.lent,
                    &mut state.vectors,
                    &mut state.failures,
                ));
            }
            n += 1;
        }
        if n == 0
            && let Some(text) = context.reconnecting()
        {
            set_message(&text);
        }
        context.sync_poller();
        Ok(n as c_long)
    })
}

/// Hands over what an operation has found out or made. Returns the `res` of its event. `count` is its bytes.
///
/// # Safety
/// The iocb's memory is as the header demands.
#[cold]
unsafe fn deliver(iocb: &raio_iocb, answer: Answer, count: u64, session: c_int) -> Result<u64, Error> {
    let (buf, nbytes) = (iocb.c.buf, iocb.c.nbytes as usize);
    // SAFETY: the caller vouches for the iocb's memory, which `submit` has looked at.
    let args = || unsafe { buf.cast::<raio_path_args>().read_unaligned() };
    let copied = |bytes: &[u8]| {
        let args = args();
        // SAFETY: it was checked when the iocb was submitted, and is the library's until now.
        unsafe { copy_all(bytes, args.buf, args.nbytes as usize) }.map(|len| len as u64)
    };
    match answer {
        Answer::File(file) => descriptor::add_file_apart(session, file).map(|fd| fd as u64),
        Answer::Status(status) => {
            let (to, size) = match iocb.raio_lio_opcode {
                CMD_STAT_FD => (buf.cast(), nbytes),
                _ => (args().stat, args().stat_size as usize),
            };
            if !to.is_null() {
                // SAFETY: it was checked when the iocb was submitted, and is the library's until now.
                unsafe { fill_in(raio_stat::from(&status), to, size) };
            }
            Ok(count)
        }
        Answer::Link(target) => {
            let (target, args) = (target.as_os_str().as_bytes(), args());
            let len = target.len().min(args.nbytes as usize);
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(target.as_ptr(), args.buf.cast::<u8>(), len) };
            Ok(len as u64)
        }
        Answer::FileSystem(status) => {
            let args = args();
            // SAFETY: as above.
            unsafe { fill_in(raio_statfs::from(&status), args.buf.cast(), args.nbytes as usize) };
            Ok(count)
        }
        Answer::Xattr(value) => copied(&value),
        Answer::XattrNames(names) => copied(&joined(&names)),
        Answer::Entries(entries) => {
            let (count, to) = (entries.buffered() as u64, args().buf);
            match iocb.raio_lio_opcode {
                // SAFETY: as above.
                CMD_OPENDIR => unsafe { to.cast::<*mut raio_dir>().write_unaligned(new_dir(entries)) },
                // SAFETY: the program vouches for using the directory in one thread at a time.
                _ => unsafe { return_dir(dir_of(iocb), Some(entries)) },
            }
            Ok(count)
        }
        Answer::Checksum(checksum) => {
            let to = buf.cast::<raio_checksum>();
            // SAFETY: it was read when the iocb was submitted, and is the library's until now.
            unsafe { to.write_unaligned(to.read_unaligned().with(checksum)) };
            Ok(count)
        }
        // There are no iocbs for these.
        Answer::Extents { .. } => Ok(count),
    }
}

/// An operation has failed: a directory whose entries it had has none any more.
///
/// # Safety
/// The iocb's memory is as the header demands.
#[cold]
unsafe fn give_up(iocb: &raio_iocb) {
    if iocb.raio_lio_opcode == CMD_READDIR {
        // SAFETY: the caller vouches for the iocb's memory, which `submit` has looked at, and the program for
        // using the directory in one thread at a time.
        unsafe { return_dir(dir_of(iocb), None) };
    }
}

/// The event of a completion. The iocb is the caller's again.
fn event(
    completion: Completion,
    session: c_int,
    lent: &mut LentBuffers,
    vectors: &mut Vec<Vec<Buffer>>,
    failures: &mut FailureTexts,
) -> raio_event {
    let obj = std::ptr::with_exposed_provenance_mut::<raio_iocb>(completion.token as usize);
    let mut handle = 0;
    match completion.buffers {
        Some(mut buffers) if completion.is_lent => {
            let address =
                buffers.pieces_mut().first_mut().map_or(null_mut(), |piece| piece.bytes_mut().as_mut_ptr());
            handle = lent.add(buffers);
            // SAFETY: the token is the address of an iocb, which is the library's until its event is
            // collected: now.
            unsafe { (*obj).c.buf = address.cast() };
        }
        Some(Buffers::Many(mut pieces)) => {
            pieces.clear();
            vectors.push(pieces);
        }
        _ => {}
    }
    if let Some(crc) = completion.crc {
        // SAFETY: as above.
        unsafe { (*obj).crc = crc };
    }
    let mut result = completion.result;
    if let Some(answer) = completion.answer {
        // SAFETY: as above.
        result = result.and_then(|count| unsafe { deliver(&*obj, *answer, count, session) });
    } else if result.is_err() {
        // SAFETY: as above.
        unsafe { give_up(&*obj) };
    }
    let (res, res2) = match &result {
        Ok(n) => (*n as c_ulong, 0),
        Err(error) => {
            failures.add(obj.addr(), &error.text);
            let retryable = if error.status.retryable { RES2_RETRYABLE } else { 0 };
            let unknown = if error.is_unknown { RES2_UNKNOWN } else { 0 };
            let lost = if error.is_lost { RES2_LOST } else { 0 };
            let res2 = error.status.class as c_ulong | retryable | unknown | lost;
            (-c_long::from(error.errno()) as c_ulong, res2)
        }
    };
    // SAFETY: as above.
    let data = unsafe { (*obj).data };
    raio_event { data, obj, handle, res, res2 }
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `events` is null or points at `nr` events.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_release(ctx: *mut raio_context, nr: c_long, events: *mut raio_event) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        let count =
            usize::try_from(nr).map_err(|_| invalid("The number of events is negative. Pass 0 or more."))?;
        if events.is_null() && count > 0 {
            return Err(invalid("The events are NULL. Pass those from raio_getevents()."));
        }
        let mut unknown = 0;
        for n in 0..count {
            // SAFETY: the caller vouches for `nr` events.
            let handle = unsafe { (*events.add(n)).handle };
            match state.lent.take(handle) {
                Some(buffers) => {
                    if let Some(context) = &mut state.context {
                        context.release(buffers);
                    }
                }
                None => unknown += usize::from(handle != 0),
            }
        }
        if unknown > 0 {
            return Err(invalid(format!(
                "{unknown} of the events have handles that are not lent out. Release each event once."
            )));
        }
        Ok(0)
    })
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `iocb` is null or points at one; `evt` is null or may be
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_cancel(
    ctx: *mut raio_context,
    iocb: *mut raio_iocb,
    evt: *mut raio_event,
) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        if iocb.is_null() || evt.is_null() {
            return Err(invalid("The iocb or the event buffer is NULL. Pass both."));
        }
        let context = state.context.as_mut().ok_or_else(stopped)?;
        // SAFETY: not null, and the caller vouches for the rest.
        let key = unsafe { (*iocb).key };
        let ticket = context.ticket(key, iocb.expose_provenance() as u64).ok_or_else(|| {
            invalid("The iocb is not in flight in this context. Pass one that was submitted to it.")
        })?;
        let completion = context.cancel(ticket)?;
        // It may have failed before, and been submitted again.
        state.failures.supersede(iocb.addr());
        // SAFETY: not null, and the caller vouches for the rest.
        unsafe {
            let (session, lent) = (state.session, &mut state.lent);
            evt.write(event(completion, session, lent, &mut state.vectors, &mut state.failures));
        }
        Ok(0)
    })
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `event` is null or points at one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_event_errmsg(
    ctx: *mut raio_context,
    event: *const raio_event,
) -> *const c_char {
    run(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        if event.is_null() {
            return Err(invalid(
                "The event is NULL. Pass one from the latest raio_getevents() or \
                                raio_cancel().",
            ));
        }
        // SAFETY: not null, and the caller vouches for the rest.
        let (obj, res) = unsafe { ((*event).obj.addr(), (*event).res as c_long) };
        if res >= 0 {
            return Ok(c"".as_ptr());
        }
        let text = state.failures.find(obj).ok_or_else(|| {
            invalid(
                "The event is not from the context's latest raio_getevents() or raio_cancel(). Ask \
                     before the next call.",
            )
        })?;
        Ok(text.as_ptr())
    })
    .unwrap_or_else(|errno| fail(errno, c"".as_ptr()))
}
