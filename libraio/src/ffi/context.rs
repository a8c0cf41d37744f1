//! Calls that make, end, watch and measure a context.

use std::ffi::{c_int, c_ulonglong};
use std::os::fd::AsRawFd;
use std::panic::catch_unwind;
use std::ptr::null_mut;
use std::sync::Once;

use raio_transport::memory::process;

use super::abi::raio_stats;
use super::descriptor;
use super::errors::{FailureTexts, int, invalid};
use super::eventfd::Eventfds;
use super::file_cache::FileCache;
use super::handle::Handle;
use super::lent::LentBuffers;
use super::memory::ALLOCATIONS;
use super::probe::ReadProbe;
use super::state::{CONTEXTS, ContextState, LIVE, MRS, no_context, raio_context, state, stopped};
use crate::context::Context;
use crate::operation::Stats;
use crate::trace;
use raio_transport::sync::lock;

/// See libraio.h.
///
/// # Safety
/// `ctxp` is null or may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_setup(fd: c_int, maxevents: c_int, ctxp: *mut *mut raio_context) -> c_int {
    int(|| {
        if ctxp.is_null() {
            return Err(invalid("The context pointer is NULL. Pass one."));
        }
        // SAFETY: not null, and the caller vouches for the rest.
        let before = unsafe { ctxp.read_unaligned() };
        // It may be anything: only a pointer that was given out is looked through.
        if lock(&LIVE).contains(&before.addr()) {
            // SAFETY: it is one of our handles, and `process` never changes in a context.
            if unsafe { state(before) }.is_ok() {
                return Err(invalid(
                    "The context pointer holds a context that was not destroyed. Destroy it first, or pass \
                     another pointer.",
                ));
            }
        }
        // SAFETY: as above.
        unsafe { ctxp.write(null_mut()) };
        let (session, session_fd) = descriptor::session_of(fd)?;
        let context = session.context(usize::try_from(maxevents).unwrap_or(0))?;
        let ctx = Handle::create(
            &CONTEXTS,
            Box::new(ContextState {
                context: Some(context),
                stats: Stats::default(),
                session: session_fd,
                files: FileCache::default(),
                lent: LentBuffers::default(),
                mrs: Vec::new(),
                vectors: Vec::new(),
                process: process(),
                probe: ReadProbe::default(),
                eventfds: Eventfds::default(),
                failures: FailureTexts::default(),
            }),
        );
        if let Err(error) = descriptor::add_context(session_fd, ctx.addr()) {
            // The session was stopped meanwhile.
            // SAFETY: nobody else has the pointer yet.
            drop(unsafe { Handle::destroy(&CONTEXTS, ctx) });
            return Err(error);
        }
        lock(&LIVE).insert(ctx.addr());
        write_trace_at_exit();
        // SAFETY: as above.
        unsafe { ctxp.write(ctx) };
        Ok(0)
    })
}

/// Has the trace of contexts that are not destroyed written when the process exits, if there is one.
fn write_trace_at_exit() {
    extern "C" fn write() {
        let _ = catch_unwind(trace::write_all);
    }
    static REGISTERED: Once = Once::new();
    if trace::is_on() {
        REGISTERED.call_once(|| {
            // SAFETY: the function takes nothing and does not unwind. It is called before the library is
            // unloaded, for atexit(3) in a shared object is of that object.
            unsafe { libc::atexit(write) };
        });
    }
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_destroy(ctx: *mut raio_context) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        unsafe { state(ctx) }?;
        // SAFETY: as above.
        let mut state = unsafe { Handle::destroy(&CONTEXTS, ctx) }.ok_or_else(no_context)?;
        lock(&LIVE).remove(&ctx.addr());
        descriptor::remove_context(state.session, ctx.addr());
        if let Some(context) = state.context.take() {
            context.close();
        }
        let mut allocations = lock(&ALLOCATIONS);
        for &mr in &state.mrs {
            // SAFETY: `mrs` has pointers of our own handles, and what they hold for this context is this
            // thread's.
            if unsafe { Handle::get(mr) }.is_some_and(|registration| registration.context == ctx) {
                // SAFETY: as above.
                let registration = unsafe { Handle::destroy(&MRS, mr) };
                if registration.is_some_and(|registration| registration.is_allocated) {
                    allocations.values_mut().filter(|a| a.mr == mr.addr()).for_each(|a| a.mr = 0);
                }
            }
        }
        Ok(0)
    })
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_poll_fd(ctx: *mut raio_context) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        let context = state.context.as_mut().ok_or_else(stopped)?;
        context.poll_fd().map(|fd| fd.as_raw_fd())
    })
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `stats` is null or has room for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_get_stats(
    ctx: *mut raio_context,
    stats: *mut raio_stats,
    size: usize,
) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        if stats.is_null() || size < size_of::<c_ulonglong>() {
            return Err(invalid("The statistics buffer is NULL or too small. Pass a struct raio_stats."));
        }
        let size = size.min(size_of::<raio_stats>());
        let s = state.context.as_ref().map_or(state.stats, Context::stats);
        let filled = raio_stats {
            size: size as c_ulonglong,
            submitted: s.submitted,
            completed: s.completed,
            failed: s.failed,
            bytes_read: s.bytes_read,
            bytes_written: s.bytes_written,
            bounced_bytes: s.bounced_bytes,
            sends: s.sends,
            receives: s.receives,
            sleeps: s.sleeps,
            reconnects: s.reconnects,
            in_flight: s.in_flight,
            queue_depth: s.queue_depth,
            io_bytes_max: s.io_bytes_max,
            resent: s.resent,
            unknown: s.unknown,
            lost: s.lost,
            checksum_errors: s.checksum_errors,
            crc: s.has_crc.into(),
        };
        // SAFETY: `size` bytes are within `filled`, and the caller vouches for as many at `stats`.
        unsafe { std::ptr::copy_nonoverlapping((&raw const filled).cast::<u8>(), stats.cast::<u8>(), size) };
        Ok(0)
    })
}
