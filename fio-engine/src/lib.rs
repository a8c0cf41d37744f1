//! The shared object that fio loads: `engine.c`, which is the engine, and libraio, linked into one.
//!
//! rustc hides the C symbols of a cdylib, so fio cannot find `engine.c`'s `ioengine` by name; it finds
//! `get_ioengine` and asks that. Without fio's headers (`FIO_INCLUDE`, see `build.rs`) there is no engine,
//! and this library is empty.

#![cfg(fio_headers)]

use std::ffi::c_void;

// Nothing here calls it; engine.c does, through the C API.
use raio as _;

unsafe extern "C" {
    /// `engine.c`'s operations table, or NULL after printing why this fio cannot use it.
    fn raio_fio_ioengine() -> *mut c_void;
}

/// Gives fio's loader the table of the engine's operations: `*ops` becomes NULL if this is not the fio that
/// the engine was built for. fio calls it once for each job, in its main thread.
///
/// # Safety
///
/// `ops` must be valid for writing one pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn get_ioengine(ops: *mut *mut c_void) {
    // SAFETY: raio_fio_ioengine() takes nothing and reads only constants of fio and of engine.c; the caller
    // gave a writable `ops`.
    unsafe { *ops = raio_fio_ioengine() };
}
