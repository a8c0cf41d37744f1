//! What `raio_context_t`, `raio_mr_t` and `raio_dir_t` stand for, and how a context is found by its pointer.

use std::collections::{HashSet, VecDeque};
use std::ffi::c_int;
use std::sync::{LazyLock, Mutex};

use raio_transport::memory::{Buffer, Region, process};

use super::errors::{FailureTexts, invalid};
use super::eventfd::Eventfds;
use super::file_cache::FileCache;
use super::handle::Handle;
use super::lent::LentBuffers;
use super::probe::ReadProbe;
use crate::context::Context;
use crate::error::Error;
use crate::names::ReadDir;
use crate::operation::Stats;

/// Destroyed contexts: see [`Handle::create`].
pub(super) static CONTEXTS: Mutex<VecDeque<usize>> = Mutex::new(VecDeque::new());
/// Destroyed registrations.
pub(super) static MRS: Mutex<VecDeque<usize>> = Mutex::new(VecDeque::new());

/// Closed directories.
pub(super) static DIRS: Mutex<VecDeque<usize>> = Mutex::new(VecDeque::new());

/// `struct raio_mr`
pub type raio_mr = Handle<Registration>;

/// The content of a `raio_mr_t`.
pub struct Registration {
    pub(super) context: *mut raio_context,
    pub(super) region: Region,
    /// It is memory of raio_alloc().
    pub(super) is_allocated: bool,
}

/// `struct raio_dir`
pub type raio_dir = Handle<Directory>;

/// The content of a `raio_dir_t`.
pub enum Directory {
    /// No iocb has its entries.
    Idle(ReadDir),
    /// An iocb has them.
    InFlight,
    /// An iocb that had them has failed.
    Failed,
}

// A handle's magic number tells the types apart by their size.
const _: () = {
    let (directory, registration) = (size_of::<Directory>(), size_of::<Registration>());
    assert!(directory != registration && directory != size_of::<Box<ContextState>>());
};

/// A directory for the program.
pub(super) fn new_dir(entries: ReadDir) -> *mut raio_dir {
    Handle::create(&DIRS, Directory::Idle(entries))
}

/// The directory of this pointer, which no iocb has.
///
/// # Safety
/// As [`Handle::get`].
pub(super) unsafe fn idle_dir<'a>(dir: *mut raio_dir) -> Result<&'a mut Directory, Error> {
    // SAFETY: the caller's contract is the same.
    let directory = unsafe { Handle::get(dir) }.ok_or_else(no_directory)?;
    match directory {
        Directory::InFlight => {
            Err(Error::call(libc::EBUSY, "An iocb reads the directory. Collect its event first."))
        }
        Directory::Idle(_) | Directory::Failed => Ok(directory),
    }
}

pub(super) fn no_directory() -> Error {
    invalid("Not an open directory. Pass one from raio_opendir().")
}

/// An iocb that had a directory has ended, with these entries unless it has failed. The program may have
/// closed the directory meanwhile.
///
/// # Safety
/// As [`Handle::get`].
pub(super) unsafe fn return_dir(dir: *mut raio_dir, entries: Option<ReadDir>) {
    // SAFETY: the caller's contract is the same.
    let directory = unsafe { Handle::get(dir) };
    if let Some(directory) = directory.filter(|directory| matches!(directory, Directory::InFlight)) {
        *directory = entries.map_or(Directory::Failed, Directory::Idle);
    }
}

/// `struct raio_context`
pub type raio_context = Handle<Box<ContextState>>;

/// The content of a `raio_context_t`.
pub struct ContextState {
    /// None once the session was stopped.
    pub(super) context: Option<Context>,
    /// The counters at that time.
    pub(super) stats: Stats,
    /// Its session's descriptor.
    pub(super) session: c_int,
    pub(super) files: FileCache,
    pub(super) lent: LentBuffers,
    /// Its registrations, and perhaps some that have ended.
    pub(super) mrs: Vec<*mut raio_mr>,
    /// Emptied, for the next vectored operations.
    pub(super) vectors: Vec<Vec<Buffer>>,
    /// The process that made it: see [`process`].
    pub(super) process: u64,
    pub(super) probe: ReadProbe,
    pub(super) eventfds: Eventfds,
    pub(super) failures: FailureTexts,
}

/// The context of this pointer, if it is one of this process.
///
/// # Safety
/// As [`Handle::get`].
pub(super) unsafe fn state<'a>(ctx: *mut raio_context) -> Result<&'a mut ContextState, Error> {
    // SAFETY: the caller's contract is the same.
    let state = unsafe { Handle::get(ctx) }.map(|state| &mut **state).ok_or_else(no_context)?;
    if state.process == process() { Ok(state) } else { Err(inherited()) }
}

/// Contexts that were given out and not destroyed.
pub(super) static LIVE: LazyLock<Mutex<HashSet<usize>>> = LazyLock::new(Mutex::default);

pub(super) fn no_context() -> Error {
    invalid("Not a context, or a destroyed one. Pass one from raio_setup().")
}

fn inherited() -> Error {
    invalid("The context belongs to the parent process. Open a session and create a context in the child.")
}

pub(super) fn stopped() -> Error {
    let status = raio_transport::Status::transport(libc::ENOTCONN);
    Error::new(status, "The context's session was stopped. Destroy the context.")
}
