//! The two ends of a transfer: an open file, device or stream, of this machine or of a server.
//!
//! A [`Place`] is opened once. Each lane of a transfer, which is a thread, has a [`Lane`] of each end: on a
//! server that is a connection with requests in flight, on this machine it is calls that are done at once.
//! Directories are [`crate::tree`]'s.

mod local;
pub mod remote;

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use raio::{Checksum, ChecksumAlgorithm};

use crate::failure::{Failure, Kind};
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::tuning::STOP_CHECK_INTERVAL;

pub use self::local::{
    LocalFile, LocalPartial, Stream, beside, examine, is_zero, set_len, timespec, to_ns, write_sparsely,
};
pub use self::remote::{RemoteFile, RemotePartial, Sessions, connect, facts_of};

/// What sort of thing it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// A regular file.
    File,
    /// A block device: it has a size, and cannot be truncated or replaced.
    Device,
    /// Bytes in order, such as a pipe.
    Stream,
}

impl Sort {
    /// From `st_mode`.
    pub fn of_mode(mode: u32) -> Self {
        match mode & libc::S_IFMT {
            libc::S_IFBLK => Self::Device,
            libc::S_IFREG => Self::File,
            _ => Self::Stream,
        }
    }
}

/// What is known of a file without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// What it is.
    pub sort: Sort,
    /// In bytes; None if only its end will tell.
    pub size: Option<u64>,
    /// Type and permissions, as `st_mode`.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Last access and last change of the contents, in nanoseconds since the epoch.
    pub times_ns: (i64, i64),
    /// Device and inode number.
    pub identity: (u64, u64),
}

impl Facts {
    /// Whether both are of the same file. Numbers of inodes of two machines (not `is_local`) may be the same
    /// by chance; with the same size and time, what is lost by not copying is nothing.
    pub fn is_same_file(&self, other: &Self, is_local: bool) -> bool {
        let is_same = self.sort != Sort::Stream && self.sort == other.sort && self.identity == other.identity;
        is_same && (is_local || self.size == other.size && self.times_ns.1 == other.times_ns.1)
    }
}

/// A read or write. Its token comes back with its end.
#[derive(Debug)]
pub struct Io {
    /// Chosen by the caller.
    pub token: usize,
    /// Where in the file, in bytes. A stream is where it is.
    pub offset: u64,
    /// As many bytes as it has are read or written.
    pub data: Vec<u8>,
}

/// The end of a read or write.
#[derive(Debug)]
pub struct Done {
    /// As given.
    pub token: usize,
    /// The memory.
    pub data: Vec<u8>,
    /// How many bytes; fewer at the end of a file.
    pub result: Result<usize, Failure>,
}

/// One thread's way to a place.
pub trait Lane {
    /// Starts a read.
    fn read(&mut self, io: Io) -> Result<(), Failure>;
    /// Starts a write.
    fn write(&mut self, io: Io) -> Result<(), Failure>;
    /// The next one that has ended, in any order. Does not wait.
    fn next(&mut self) -> Result<Option<Done>, Failure>;
    /// Waits until one may have ended, or for this long. Not at all where they end at once.
    fn wait(&mut self, _timeout: Duration) -> Result<(), Failure> {
        Ok(())
    }
    /// What poll(2) finds readable when one may have ended. None: they end at once.
    fn poll_fd(&mut self) -> Result<Option<BorrowedFd<'_>>, Failure> {
        Ok(None)
    }
}

/// An open file, device or stream. Any thread may use it.
pub trait Place: Send + Sync {
    /// As the user calls it.
    fn name(&self) -> &str;
    /// What it is now.
    fn facts(&self) -> Result<Facts, Failure>;
    /// A way to it for the calling thread, with at most `depth` reads and writes in flight.
    fn lane(&self, depth: usize) -> Result<Box<dyn Lane>, Failure>;
    /// The next range at or behind `from` that may have data; None if only zeros follow. `size` is that of
    /// the file.
    fn next_data(&self, from: u64, size: u64) -> Result<Option<Range<u64>>, Failure> {
        Ok((from < size).then_some(from..size))
    }
    /// The checksum of all bytes, and how many there are, if somebody else can read them for it: the server
    /// that has the file.
    fn checksum(
        &self,
        _algorithm: ChecksumAlgorithm,
        _interrupt: &Interrupt,
    ) -> Result<Option<(Checksum, u64)>, Failure> {
        Ok(None)
    }
    /// This as a file on a server, for server-side copies; else None.
    fn as_remote(&self) -> Option<&RemoteFile> {
        None
    }
    /// Server-side copy of a range of the source to the same offset of this one, so that the data does not
    /// come here. Returns how many bytes it has copied, 0 at the end of the source. None: they are not of one
    /// session with a server that does this.
    fn copy_within(
        &self,
        _source: &dyn Place,
        _range: Range<u64>,
        _interrupt: &Interrupt,
    ) -> Result<Option<u64>, Failure> {
        Ok(None)
    }
    /// Makes a regular file this long.
    fn set_size(&self, size: u64) -> Result<(), Failure>;
    /// Makes a range read as zeros, without storage where that is possible.
    fn zero(&self, range: Range<u64>) -> Result<(), Failure>;
    /// Makes what was written durable.
    fn sync(&self) -> Result<(), Failure>;
    /// Gives it the permissions, the times, and if that is allowed the owner of another file; on a server
    /// the permissions and the modification time.
    fn preserve(&self, facts: &Facts) -> Result<(), Failure>;
}

/// All bytes of a file of this size.
pub fn read_whole(source: &dyn Place, size: u64) -> Result<Vec<u8>, Failure> {
    if size == 0 {
        return Ok(Vec::new());
    }
    let mut lane = source.lane(1)?;
    lane.read(Io { token: 0, offset: 0, data: vec![0; size as usize] })?;
    loop {
        let Some(done) = lane.next()? else {
            lane.wait(STOP_CHECK_INTERVAL)?;
            continue;
        };
        let length = done.result?;
        if length < done.data.len() {
            return Err(has_become_shorter(source, length as u64));
        }
        return Ok(done.data);
    }
}

/// The source has changed while it was read.
pub fn has_become_shorter(source: &dyn Place, end: u64) -> Failure {
    let name = source.name();
    Failure::new(format!("{name} has become shorter while it was read: it ends at {end}. Start again."))
}

/// The owner's permission to write. A partial file has it until it takes its destination's place: a copy that
/// goes on opens it again.
pub const OWNER_WRITES: u32 = 0o200;

/// Opens or creates a partial file. One that the user may not write to is removed and created again: a killed
/// run had set its final permissions already.
pub fn open_partial<F, E>(
    open: impl Fn() -> Result<F, E>,
    is_denied: impl Fn(&E) -> bool,
    remove: impl FnOnce() -> bool,
) -> Result<F, E> {
    match open() {
        Err(error) if is_denied(&error) && remove() => open(),
        opened => opened,
    }
}

/// A file that is written beside its destination, and takes its place when it is whole.
pub trait PartialFile: Send {
    /// The file.
    fn place(&self) -> &dyn Place;
    /// Whether zeros need not be written, because that is what it has.
    fn set_skips_zeros(&mut self, _skips: bool) {}
    /// Where it is; `to` is its destination.
    fn location(&self, to: &Location) -> Location;
    /// Has it take its destination's place. With `durable` that survives a power failure.
    fn publish(&mut self, durable: bool) -> Result<(), Failure>;
    /// Removes it.
    fn remove(&self);
}

/// Opens what is to be read. With `direct` its bytes come from the disk rather than a page cache, where that
/// is possible.
pub fn open_source(
    sessions: &Sessions<'_>,
    location: &Location,
    direct: bool,
    interrupt: &Interrupt,
) -> Result<Box<dyn Place>, Failure> {
    Ok(match location {
        Location::Stream => Box::new(Stream::input(interrupt.clone())),
        Location::Null => {
            return Err(Failure::usage("null: is only a destination. Read /dev/zero, or an empty file."));
        }
        Location::Local(path) => local::open_source(path, direct, interrupt)?,
        Location::Remote { .. } => {
            let (session, path) = sessions.at(location)?;
            let open =
                |flags| RemoteFile::open_in(Arc::clone(&session), path, location.to_string(), flags, 0);
            match open(libc::O_RDONLY | if direct { libc::O_DIRECT } else { 0 }) {
                Err(failure) if direct && failure.kind() == Kind::Other => Box::new(open(libc::O_RDONLY)?),
                opened => Box::new(opened?),
            }
        }
    })
}
