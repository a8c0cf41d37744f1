//! How operations on descriptors are carried out: by io_uring, or by threads. Volumes
//! ([`crate::volume`]) that have a descriptor are served by their worker's engine.
//!
//! An operation owns its slot and a share in its file; the slot comes back in the [`Completion`] that ends
//! it: one for each operation. An engine belongs to one worker, which lends it the reactor. Nothing here
//! makes the worker's thread wait for a disk or a file system: what may wait runs in a lane of the [`pool`],
//! see [`Job`].

pub mod completions;
mod descriptor;
mod job;
mod misses;
mod threads;
mod uring;

use std::any::Any;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use raio_transport::protocol::Extent;
use raio_transport::reactor::{Event, OpId, Reactor};
use raio_transport::transport::SlotRange;
use rustix::fs::FlockOperation;

use crate::checksum::Checksum;
use crate::client::Client;
use crate::pool::{self, Pool, Ticket};
use crate::syscalls::FileInfo;
use crate::tenure::{Tenure, Use};
use crate::tuning::lanes::{CONTROL_WIDTH, DATA_WIDTH, FLUSH_WIDTH, LEASE_WIDTH, RANGE_WIDTH};

pub use completions::{Closing, CompletionQueue};
pub use descriptor::{Descriptor, KEEPS_STATUS, cached_reads, closes_at_once};
pub use job::Job;
use misses::{Miss, Misses};
pub use threads::Threads;
pub use uring::Uring;

/// The owner number of an engine's tokens; far from those of the transports.
pub const OWNER: u8 = 0x80;

/// The key of operations whose end interests nobody.
pub const DETACHED: u64 = u64::MAX;

/// A lane of the process's pool.
pub type Lane = pool::Lane<Job>;

/// An export's shares of the pool. Several, so that flushes that hang stop neither its opens nor its reads,
/// and leases not the opens of other files.
#[derive(Clone, Debug)]
pub struct Lanes {
    /// For open, stat, lock and close.
    pub control: Lane,
    /// For opens that wait for the holder of a lease.
    pub lease: Lane,
    /// For fsync, discard, write zeroes, allocate, truncate and extents.
    pub flush: Lane,
    /// For copies and checksums.
    pub ranges: Lane,
    /// For reads and writes.
    pub data: Lane,
    /// Reads that need no lane and yet the disk.
    misses: Arc<Misses>,
    /// Of the export.
    pub tenure: Arc<Tenure>,
}

impl Lanes {
    /// New ones.
    pub fn new(pool: &'static Pool<Job>) -> Self {
        Self {
            control: pool.lane(CONTROL_WIDTH),
            lease: pool.lane(LEASE_WIDTH),
            flush: pool.lane(FLUSH_WIDTH),
            ranges: pool.lane(RANGE_WIDTH),
            data: pool.lane(DATA_WIDTH),
            misses: Arc::default(),
            tenure: Arc::default(),
        }
    }

    /// The same, of the export that takes the place of one that is over.
    pub fn with_new_tenure(&self) -> Self {
        Self { tenure: Arc::default(), ..self.clone() }
    }

    /// Has the pool close what was only looked up, or read.
    pub fn close_read(&self, fd: OwnedFd) {
        let job = Job::CloseRead(fd, Use::of(&self.tenure));
        self.control.submit(self.control.ticket(), job);
    }
}

/// An operation on an open file.
#[derive(Debug)]
pub enum Operation {
    /// pread(2) into a slot.
    Read {
        /// Where to.
        target: SlotRange,
        /// Offset in the file.
        offset: u64,
    },
    /// pwrite(2) from a slot.
    Write {
        /// From where.
        source: SlotRange,
        /// Offset in the file.
        offset: u64,
    },
    /// fsync(2) or fdatasync(2).
    Fsync {
        /// fdatasync.
        data_only: bool,
    },
    /// [`crate::clear::discard`].
    Discard {
        /// Offset in the file.
        offset: u64,
        /// Length.
        length: u64,
    },
    /// [`crate::clear::write_zeroes`].
    WriteZeroes {
        /// Offset in the file.
        offset: u64,
        /// Length.
        length: u64,
    },
    /// [`crate::clear::allocate`].
    Allocate {
        /// Offset in the file.
        offset: u64,
        /// Length.
        length: u64,
        /// The file's size stays.
        keep_size: bool,
    },
    /// statx(2), and the size of a block device.
    Stat,
    /// ftruncate(2).
    Truncate {
        /// The new size.
        size: u64,
    },
    /// Where the data of a range lies: lseek(2) with SEEK_DATA and SEEK_HOLE.
    Extents {
        /// Offset in the file.
        offset: u64,
        /// Length.
        length: u64,
    },
    /// [`crate::copy::copy`] from another file.
    Copy {
        /// That one.
        source: Arc<Descriptor>,
        /// Offset in it.
        source_offset: u64,
        /// Offset in this file.
        offset: u64,
        /// Length.
        length: u64,
    },
    /// [`Checksum::read`].
    Checksum {
        /// Of what was read before.
        checksum: Checksum,
        /// Offset in the file.
        offset: u64,
        /// Length.
        length: u64,
    },
    /// flock(2), which does not wait.
    Lock(FlockOperation),
}

/// What an ended operation gives back.
#[derive(Debug)]
pub enum Outcome {
    /// Nothing.
    None,
    /// The slot of a read or write, as it was passed.
    Slot(SlotRange),
    /// The same, of one that would have had to wait: it is to be submitted with [`Engine::submit_blocking`].
    WouldBlock(SlotRange),
    /// How many bytes, from its start, a discard, write zeroes or allocate has done.
    Cleared(u64),
    /// What a [`Call`] returned.
    Returned(Box<dyn Any + Send>),
    /// The status that was asked for.
    Stat(Box<FileInfo>),
    /// The parts of a range that have data, and up to where they are known.
    Extents(Vec<Extent>, u64),
    /// A checksum that has taken in more.
    Checksum(Checksum),
    /// Whether there was no lock that conflicts.
    Locked(bool),
}

/// The end of an operation.
#[derive(Debug)]
pub struct Completion {
    /// From [`Engine::submit`].
    pub key: u64,
    /// What the system call returned: a count, or the errno. EAGAIN: there is no thread for it.
    pub result: Result<u32, i32>,
    /// What comes back.
    pub outcome: Outcome,
}

/// Where an operation is, for cancelling it.
#[derive(Clone, Copy, Debug)]
pub enum Pending {
    /// In the reactor.
    Ring(OpId),
    /// In a lane, in the job with this ticket.
    Lane(Lane, Ticket),
    /// With a volume that needs no engine, under this number of its own.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "every volume of this version is the engine's or ends at once")
    )]
    Volume(u64),
}

/// What runs in a lane and is no operation on an open file. What it returns is the [`Outcome::Returned`].
pub type Call = Box<dyn FnOnce() -> Box<dyn Any + Send> + Send>;

/// Carries out operations on files.
pub trait Engine {
    /// Begins an operation. What has to wait before it begins is cancelled if `client` has gone by then. Its
    /// completion comes from a later [`Engine::next`]. What is returned is for [`Engine::cancel`]; None if
    /// it has ended.
    fn submit(
        &mut self,
        reactor: &mut Reactor,
        key: u64,
        client: &Weak<Client>,
        file: &Arc<Descriptor>,
        operation: Operation,
    ) -> Option<Pending>;

    /// The same for what may have to wait: in a lane of the file's export.
    fn submit_blocking(
        &mut self,
        key: u64,
        client: &Weak<Client>,
        file: &Arc<Descriptor>,
        operation: Operation,
    ) -> Pending;

    /// Makes a call in a lane. Its completion has the outcome that it returns.
    fn call(&mut self, key: u64, client: &Weak<Client>, lane: Lane, call: Call) -> Pending;

    /// Fills `bytes` from the page cache. None if that has not all of it, or it cannot be known:
    /// [`Engine::submit`] does more.
    fn try_read_cached(&mut self, file: &Descriptor, bytes: &mut [u8], offset: u64) -> Option<()> {
        let _ = (file, bytes, offset);
        None
    }

    /// An open file that owns this descriptor has been closed: close(2) is called, and `closing` completed,
    /// once its last user has gone.
    fn close(&mut self, file: Arc<Descriptor>, closing: Closing);

    /// Where operations end, those that are not the engine's among them.
    fn completions(&mut self) -> &mut CompletionQueue;

    /// Asks for an operation to end early. Best effort: it ends with ECANCELED, or as it would have.
    fn cancel(&mut self, reactor: &mut Reactor, key: u64, pending: Pending);

    /// Hands over what was gathered in this iteration. Whether there was anything.
    fn flush(&mut self) -> bool;

    /// Takes in what happened on the ring to an operation whose token has the owner [`OWNER`].
    fn handle(&mut self, event: Event);

    /// The next operation that has ended.
    fn next(&mut self) -> Option<Completion> {
        self.completions().next()
    }
}

#[cfg(test)]
mod tests;
