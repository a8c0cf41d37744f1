//! Registered memory: the caller's (`raio_reg_mr`) and the library's (`raio_alloc`).

use std::collections::HashMap;
use std::ffi::{c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::{LazyLock, Mutex};

use raio_transport::memory::{Region, process};
use raio_transport::message;

use super::errors::{fail, int, invalid, run};
use super::handle::Handle;
use super::state::{ContextState, MRS, Registration, raio_context, raio_mr, state};
use crate::error::Error;
use raio_transport::sync::lock;

/// Memory of raio_alloc(), by its address.
pub(super) struct Allocation {
    len: usize,
    /// The address of its registration; 0 once its context is gone.
    pub(super) mr: usize,
    /// The process that it is mapped in: a child does not inherit it.
    process: u64,
}

pub(super) static ALLOCATIONS: LazyLock<Mutex<HashMap<usize, Allocation>>> = LazyLock::new(Mutex::default);

/// Registers memory on a context.
fn register(
    ctx: *mut raio_context,
    state: &mut ContextState,
    region: Region,
    is_allocated: bool,
) -> Result<*mut raio_mr, Error> {
    if let Some(context) = &mut state.context {
        context.register(&region)?;
    }
    let mr = Handle::create(&MRS, Registration { context: ctx, region, is_allocated });
    state.mrs.push(mr);
    Ok(mr)
}

/// Ends a registration on the context that it is of.
fn unregister(state: &mut ContextState, registration: &Registration) {
    if let Some(context) = &mut state.context {
        context.unregister(&registration.region);
    }
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `mr` is null or may be written; the memory stays mapped while
/// it is registered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_reg_mr(
    ctx: *mut raio_context,
    buf: *mut c_void,
    len: usize,
    mr: *mut *mut raio_mr,
) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        if mr.is_null() {
            return Err(invalid("The registration pointer is NULL. Pass one."));
        }
        // SAFETY: the caller vouches that the memory stays mapped until raio_dereg_mr() or raio_destroy().
        let region = unsafe { Region::new(buf.cast(), len) }.ok_or_else(|| {
            invalid(
                "The memory cannot be registered: it is NULL, empty, or wraps around. Pass mapped memory.",
            )
        })?;
        let registered = register(ctx, state, region, false)?;
        // SAFETY: not null, and the caller vouches for the rest.
        unsafe { mr.write(registered) };
        Ok(0)
    })
}

/// See libraio.h.
///
/// # Safety
/// `ctx` and `mr` are null or point at readable memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_dereg_mr(ctx: *mut raio_context, mr: *mut raio_mr) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointers, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        // SAFETY: as above; a registration of this context is this thread's.
        let registration = unsafe { Handle::get(mr) }
            .filter(|registration| registration.context == ctx && !registration.is_allocated)
            .ok_or_else(|| {
                invalid(
                    "Not a registration of this context from raio_reg_mr(). (raio_free() ends that of \
                         raio_alloc().)",
                )
            })?;
        if registration.region.in_use() {
            return Err(busy());
        }
        unregister(state, registration);
        state.mrs.retain(|&other| other != mr);
        // SAFETY: as above.
        drop(unsafe { Handle::destroy(&MRS, mr) });
        Ok(0)
    })
}

fn busy() -> Error {
    Error::call(libc::EBUSY, "I/O in flight uses the memory. Collect its events first.")
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `mr` is null or may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_alloc(
    ctx: *mut raio_context,
    len: usize,
    mr: *mut *mut raio_mr,
) -> *mut c_void {
    run(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        if len == 0 {
            return Err(invalid("The length is 0. Pass at least 1."));
        }
        let (memory, mapped) = map(len)?;
        // SAFETY: the mapping stays until raio_free(), which rejects while the region is in use.
        let Some(region) = (unsafe { Region::new(memory.cast(), len) }) else {
            unreachable!("a mapping is neither null nor empty, and does not wrap around")
        };
        let registered = match register(ctx, state, region, true) {
            Ok(registered) => registered,
            Err(error) => {
                // SAFETY: exactly the mapping just made, which nobody knows.
                unsafe { libc::munmap(memory, mapped) };
                return Err(error);
            }
        };
        lock(&ALLOCATIONS).insert(
            memory.addr(),
            Allocation { len: mapped, mr: registered.expose_provenance(), process: process() },
        );
        if !mr.is_null() {
            // SAFETY: not null, and the caller vouches for the rest.
            unsafe { mr.write(registered) };
        }
        Ok(memory)
    })
    .unwrap_or_else(|errno| fail(errno, null_mut()))
}

/// Maps at least `len` zeroed bytes, on huge pages if some are set aside. Returns the address and the length
/// mapped.
fn map(len: usize) -> Result<(*mut c_void, usize), Error> {
    const HUGE: usize = 2 << 20;
    let failed = || {
        Error::call(libc::ENOMEM, format!("Cannot allocate {len} bytes. Ask for less, or free some memory."))
    };
    let plain = (len.checked_next_multiple_of(4096).ok_or_else(failed)?, 0);
    let huge = len.checked_next_multiple_of(HUGE).filter(|_| len >= HUGE).map(|len| (len, libc::MAP_HUGETLB));
    for (mapped, flags) in huge.into_iter().chain([plain]) {
        if mapped > isize::MAX as usize {
            return Err(failed());
        }
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choosing touches no existing
        // memory.
        let memory = unsafe {
            libc::mmap(
                null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags,
                -1,
                0,
            )
        };
        if memory != libc::MAP_FAILED {
            // A child must not share pages that hardware may write to. Huge pages, if not had above, are a
            // favour. Faulting the pages in now keeps the first I/O on each buffer from paying for it, up to
            // 100 ms for 32 MiB in a virtual machine.
            for advice in [libc::MADV_DONTFORK, libc::MADV_HUGEPAGE, libc::MADV_POPULATE_WRITE] {
                // SAFETY: the range is exactly our own mapping, and no advice changes its contents in this
                // process.
                unsafe { libc::madvise(memory, mapped, advice) };
            }
            return Ok((memory, mapped));
        }
    }
    Err(failed())
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `buf` is not used any more, and no raw I/O without `mr` is in
/// flight on it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_free(ctx: *mut raio_context, buf: *mut c_void) -> c_int {
    int(|| {
        let mut allocations = lock(&ALLOCATIONS);
        let mapped_here = allocations.get(&buf.addr()).filter(|allocation| allocation.process == process());
        let allocation = mapped_here.ok_or_else(|| {
            invalid("The memory is not from raio_alloc(), or was freed. Pass what raio_alloc() returned.")
        })?;
        let mr = std::ptr::with_exposed_provenance_mut::<raio_mr>(allocation.mr);
        // SAFETY: null or one of our handles; only `Region::in_use`, which is atomic, is looked at.
        if unsafe { Handle::get(mr) }.is_some_and(|registration| registration.region.in_use()) {
            return Err(busy());
        }
        // SAFETY: the caller vouches for the pointer. The context may be gone, or another: then its list of
        // registrations keeps one that has ended, and its device the pages, which does no harm.
        if let Ok(state) = unsafe { state(ctx) } {
            // SAFETY: null or one of our handles, and nothing in flight uses it.
            if let Some(registration) = unsafe { Handle::get(mr) } {
                unregister(state, registration);
            }
            state.mrs.retain(|&other| other != mr);
        }
        // SAFETY: null or one of our handles, and nothing in flight uses it.
        drop(unsafe { Handle::destroy(&MRS, mr) });
        let len = allocation.len;
        allocations.remove(&buf.addr());
        // SAFETY: exactly the mapping made by `map`, taken out of the table once; the caller vouches that it
        // is not used any more.
        unsafe { libc::munmap(buf, len) };
        Ok(0)
    })
}

/// See libraio.h.
///
/// # Safety
/// `buf` points at `len` bytes that may be read, or `len` is 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_crc32c(crc: c_uint, buf: *const c_void, len: usize) -> c_uint {
    if buf.is_null() || len == 0 {
        return crc;
    }
    // SAFETY: not null, and the caller vouches for the rest.
    let bytes = unsafe { std::slice::from_raw_parts(buf.cast::<u8>(), len) };
    message::combined_crc(crc, message::data_crc(bytes), len as u64)
}
