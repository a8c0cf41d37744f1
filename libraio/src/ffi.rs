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
//! - `session`, `file`, `memory`, `context`, `submit`, `prep`; `names` and `sync_io` with what `submit` has;
//!   `events` with what `names` has: the calls, by family.

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
mod names;
mod prep;
mod probe;
mod session;
mod state;
mod submit;
mod sync_contexts;
mod sync_io;

pub use abi::{
    raio_abi_version, raio_dirent, raio_event, raio_extent, raio_iocb, raio_iocb_common, raio_options,
    raio_path_args, raio_stat, raio_statfs, raio_stats,
};
pub use context::{raio_destroy, raio_get_stats, raio_poll_fd, raio_setup};
pub use errors::raio_errmsg;
pub use events::{raio_cancel, raio_event_errmsg, raio_getevents, raio_release};
pub use file::{raio_close, raio_fstat, raio_open, raio_open_mode, raio_stat_fd};
pub use handle::Handle;
pub use memory::{raio_alloc, raio_crc32c, raio_dereg_mr, raio_free, raio_reg_mr};
pub use names::{
    raio_chmod, raio_closedir, raio_get, raio_getxattr, raio_link, raio_listxattr, raio_lstat_path,
    raio_mkdir, raio_opendir, raio_put, raio_readdir, raio_readlink, raio_removexattr, raio_rename,
    raio_rmdir, raio_setxattr, raio_stat_path, raio_statfs_path, raio_symlink, raio_truncate, raio_unlink,
    raio_utimens,
};
pub use prep::{
    raio_prep_allocate, raio_prep_checksum, raio_prep_chmod, raio_prep_close, raio_prep_copy_file_range,
    raio_prep_discard, raio_prep_flock, raio_prep_fsync, raio_prep_ftruncate, raio_prep_get,
    raio_prep_getxattr, raio_prep_link, raio_prep_listxattr, raio_prep_mkdir, raio_prep_open,
    raio_prep_opendir, raio_prep_pread, raio_prep_preadv, raio_prep_put, raio_prep_pwrite, raio_prep_pwritev,
    raio_prep_readdir, raio_prep_readlink, raio_prep_removexattr, raio_prep_rename, raio_prep_rmdir,
    raio_prep_setxattr, raio_prep_stat_fd, raio_prep_stat_path, raio_prep_statfs_path, raio_prep_symlink,
    raio_prep_truncate, raio_prep_unlink, raio_prep_utimens, raio_prep_write_zeroes, raio_set_crc,
    raio_set_eventfd, raio_set_timeout,
};
pub use session::{raio_connect, raio_start, raio_stop};
pub use state::{ContextState, Directory, Registration, raio_context, raio_dir, raio_mr};
pub use submit::raio_submit;
pub use sync_io::{
    raio_checksum_range, raio_copy_file_range, raio_extents, raio_flock, raio_fsync, raio_ftruncate,
    raio_pread, raio_pwrite,
};
