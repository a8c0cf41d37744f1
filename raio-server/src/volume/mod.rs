//! What an open file does its I/O on: the third seam, beside the two roles of a transport.
//!
//! ```text
//!   session: OpenFile --owns--> dyn Volume
//!     RegularFile, BlockDevice, Memory   their descriptor is served by the worker's engine
//!     Null                               ends every operation as it is submitted
//!     Revoked                            the same, with ESTALE: the export has gone
//!     (an image elsewhere)               keeps a Completer, and uses it from a thread of its own
//!     (a filter)                         wraps another volume
//! ```
//!
//! An operation owns its slot, which comes back in the one [`Completion`](crate::engine::Completion) that
//! ends it. A volume is shared by all workers; each lends it what is its own ([`Context`]) for the length of
//! a call. No call waits for a disk, a file system or a network.

mod device;
mod file;
mod memory;
mod null;
mod revoked;
mod served;

use std::fmt::Debug;
use std::sync::{Arc, Weak};

use raio_transport::reactor::Reactor;

use crate::client::Client;
use crate::engine::{Closing, Descriptor, Engine, Operation, Pending};
use crate::syscalls::FileInfo;

pub use device::BlockDevice;
pub use file::RegularFile;
pub use memory::Memory;
pub use null::Null;
pub use revoked::Revoked;

/// What a worker lends a volume.
pub struct Context<'a> {
    /// The worker's event loop.
    pub reactor: &'a mut Reactor,
    /// Serves descriptors, and has the queue that all operations end in: [`Engine::completions`].
    pub engine: &'a mut dyn Engine,
}

/// A size that clients may not go beyond.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SizeLimit {
    /// The size.
    pub bytes: u64,
    /// The errno for writes beyond it.
    pub errno: i32,
}

/// Properties of a volume. They do not change while it is open.
#[derive(Clone, Copy, Debug)]
pub struct Properties {
    /// Alignment in bytes of offsets and lengths of reads and writes. If it is above 1, they bypass the page
    /// cache, and go through a device queue ([`crate::device_queue`]).
    pub alignment: u32,
    /// The size in bytes up to which clients may extend it; None for no limit.
    pub size_limit: Option<SizeLimit>,
    /// Its operations may never complete. If so, requests on its export are limited to a quota of the memory.
    pub may_hang: bool,
    /// Each open of it can have a lock of its own.
    pub has_locks: bool,
}

impl Default for Properties {
    fn default() -> Self {
        Self { alignment: 1, size_limit: None, may_hang: true, has_locks: true }
    }
}

/// What an open file does its I/O on.
pub trait Volume: Debug + Send + Sync {
    /// Begins an operation, which ends with one completion in [`Engine::completions`] that has this key: at
    /// once, or from another thread by a `Completer`. What has to wait before it begins is cancelled if
    /// `client` has gone by then. Returns what [`Volume::cancel`] needs; None if it has ended.
    fn submit(
        &self,
        context: &mut Context<'_>,
        key: u64,
        client: &Weak<Client>,
        operation: Operation,
    ) -> Option<Pending>;

    /// Begins anew what has come back as [`Outcome::WouldBlock`](crate::engine::Outcome::WouldBlock).
    fn submit_blocking(
        &self,
        context: &mut Context<'_>,
        key: u64,
        client: &Weak<Client>,
        operation: Operation,
    ) -> Option<Pending> {
        self.submit(context, key, client, operation)
    }

    /// Asks for an operation to end early. Best effort: it ends with ECANCELED, or as it would have.
    fn cancel(&self, context: &mut Context<'_>, key: u64, pending: Pending);

    /// An open file that owns this volume has been closed. Operations may be in flight: what is to be given
    /// back is given back behind them, and `closing` completed then.
    fn close(self: Arc<Self>, engine: &mut dyn Engine, closing: Closing);

    /// Fills `bytes` if that takes no waiting, for the fast path. None if it has not: [`Volume::submit`] does
    /// more.
    fn try_read_cached(&self, engine: &mut dyn Engine, bytes: &mut [u8], offset: u64) -> Option<()> {
        let _ = (engine, bytes, offset);
        None
    }

    /// Its status, if that takes no waiting. None: [`Volume::submit`] does more.
    fn try_stat(&self) -> Option<FileInfo> {
        None
    }

    /// Its descriptor, if it has one. Without one it is not copied, and has no checksums and no locks.
    fn file_descriptor(&self) -> Option<&Arc<Descriptor>> {
        None
    }

    /// Its properties.
    fn properties(&self) -> Properties {
        Properties::default()
    }
}
