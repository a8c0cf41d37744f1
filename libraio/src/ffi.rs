//! The C API. `include/libraio.h` says what each function promises; nothing is decided here: pointers are
//! checked and turned into the types of the safe API, results into return values and errno.
//!
//! What C holds a pointer to (`raio_context_t`, `raio_mr_t`) is a [`handle::Handle`]: a few bytes that are
//! never unmapped, with a magic number that is cleared when its content is destroyed. A call on a destroyed
//! handle thus finds no magic number and fails with EINVAL.
//!
//! Threads: a context and what hangs on it (registrations, lent buffers) belong to one thread at a time, as
//! the header says. Descriptors are looked up in a table with a lock (`descriptor`).
//!
//! Each module uses only those above it:
//!
//! - `handle`, `errors`, `probe`, `eventfd`, `lent`: parts;
//! - `sync_contexts`, `descriptor`, `file_cache`: what descriptors stand for;
//! - `state`: what the handles hold;
//! - `abi`: structures and numbers of the header;
//! - `session`, `file`, `memory`, `context`, `submit`, `events`, `sync_io`, `prep`: the calls, by family.

#![allow(non_camel_case_types)]

mod abi;
mod context;
mod descriptor;
mod errors;
mod eventfd;
mod events;
mod file;
mod file_cache;
mod handle;
mod lent;
mod memory;
mod prep;
mod probe;
mod session;
mod state;
mod submit;
mod sync_contexts;
mod sync_io;

pub use abi::{
    raio_abi_version, raio_event, raio_iocb, raio_iocb_common, raio_options, raio_stat, raio_stats,
};
pub use context::{raio_destroy, raio_get_stats, raio_poll_fd, raio_setup};
pub use errors::raio_errmsg;
pub use events::{raio_cancel, raio_event_errmsg, raio_getevents, raio_release};
pub use file::{raio_close, raio_fstat, raio_open, raio_open_mode, raio_stat_fd};
pub use handle::Handle;
pub use memory::{raio_alloc, raio_crc32c, raio_dereg_mr, raio_free, raio_reg_mr};
pub use prep::{
    raio_prep_allocate, raio_prep_discard, raio_prep_fsync, raio_prep_pread, raio_prep_preadv,
    raio_prep_pwrite, raio_prep_pwritev, raio_prep_write_zeroes, raio_set_crc, raio_set_eventfd,
    raio_set_timeout,
};
pub use session::{raio_connect, raio_start, raio_stop};
pub use state::{ContextState, Registration, raio_context, raio_mr};
pub use submit::raio_submit;
pub use sync_io::{raio_pread, raio_pwrite};
