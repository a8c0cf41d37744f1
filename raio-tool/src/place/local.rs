//! Files, devices and streams of this machine, by plain system calls.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{
    Advice, FallocateFlags, FlockOperation, Mode, SeekFrom, Timestamps, fadvise, fallocate, fchmod, fchown,
    flock, futimens, seek,
};

use super::{Done, Facts, Io, Lane, OWNER_WRITES, PartialFile, Place, Sort, open_partial};
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::output::stdout_failed;
use crate::tuning::{BLOCK_BYTES, DIRECT_ALIGN, NAME_PART_BYTES, STOP_CHECK_INTERVAL, ZERO_RUN_BYTES};

/// A regular file or a block device.
#[derive(Debug)]
pub struct LocalFile {
    file: Arc<File>,
    name: String,
    /// Reads go past the page cache.
    is_direct: bool,
    /// Runs of zeros need not be written: the file has nothing there.
    skips_zeros: bool,
}

/// Opens what is to be read.
pub fn open_source(path: &Path, direct: bool, interrupt: &Interrupt) -> Result<Box<dyn Place>, Failure> {
    let failed = |error: io::Error| Failure::io(format!("Cannot open {}", path.display()), &error);
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_dir() {
        return Err(Failure::usage(format!(
            "{} is a directory. Name a file in it, or copy with -r.",
            path.display()
        )));
    }
    // Files of /proc have no size, and contents nevertheless.
    if Sort::of_mode(metadata.mode()) == Sort::Stream || metadata.is_file() && metadata.len() == 0 {
        let name = path.display().to_string();
        return Ok(Box::new(Stream {
            end: StreamEnd::File(Arc::new(file)),
            name,
            interrupt: interrupt.clone(),
        }));
    }
    let mut this = LocalFile::new(file, path);
    if direct {
        // What was not written to the disk could not be dropped from the cache.
        let _ = this.file.sync_data();
        let _ = fadvise(&*this.file, 0, None, Advice::DontNeed);
        if let Ok(file) = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path) {
            this.file = Arc::new(file);
            this.is_direct = true;
        }
    }
    Ok(Box::new(this))
}

/// A time in nanoseconds since the epoch.
pub fn to_ns(seconds: i64, ns: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(ns)
}

/// Converts nanoseconds since the epoch.
pub fn timespec(ns: i64) -> rustix::fs::Timespec {
    rustix::fs::Timespec { tv_sec: ns.div_euclid(1_000_000_000), tv_nsec: ns.rem_euclid(1_000_000_000) }
}

/// What is known of a file by its status.
fn facts_of(metadata: &Metadata) -> Facts {
    Facts {
        sort: Sort::of_mode(metadata.mode()),
        size: Some(metadata.len()),
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        times_ns: (
            to_ns(metadata.atime(), metadata.atime_nsec()),
            to_ns(metadata.mtime(), metadata.mtime_nsec()),
        ),
        identity: (metadata.dev(), metadata.ino()),
    }
}

/// What is there. None if nothing is, or it cannot be examined. The size of a device is not known.
pub fn examine(path: &Path) -> Option<Facts> {
    std::fs::metadata(path).ok().map(|metadata| facts_of(&metadata))
}

impl LocalFile {
    fn new(file: File, path: &Path) -> Self {
        let name = path.display().to_string();
        Self { file: Arc::new(file), name, is_direct: false, skips_zeros: false }
    }

    /// Opens a file to be written in place; it is made if it does not exist. What it had stays.
    pub fn open_in_place(path: &Path, mode: u32) -> Result<Self, Failure> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(mode);
        let file = options
            .open(path)
            .map_err(|error| Failure::io(format!("Cannot open {} to write to it", path.display()), &error))?;
        Ok(Self::new(file, path))
    }

    /// A file that is open. `name` is what the user calls it.
    pub fn from_file(file: File, name: String) -> Self {
        Self { file: Arc::new(file), name, is_direct: false, skips_zeros: false }
    }

    /// Whether zeros need not be written, because that is what it has.
    pub fn set_skips_zeros(&mut self, skips: bool) {
        self.skips_zeros = skips;
    }

    /// Has a call work on the file itself.
    pub fn with_file<T>(&self, call: impl FnOnce(&File) -> T) -> T {
        call(&self.file)
    }

    /// Removes the owner's write permission from a complete partial file, unless `mode` has it.
    pub fn end_writing(&self, mode: u32) -> io::Result<()> {
        if mode & OWNER_WRITES != 0 {
            return Ok(());
        }
        let now = self.file.metadata()?.mode();
        Ok(fchmod(&*self.file, Mode::from_raw_mode(now & !OWNER_WRITES & 0o7777))?)
    }

    fn failed(&self, what: &str, error: &io::Error) -> Failure {
        Failure::io(format!("Cannot {what} {}", self.name), error)
    }
}

impl Place for LocalFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn facts(&self) -> Result<Facts, Failure> {
        let metadata = self.file.metadata().map_err(|error| self.failed("examine", &error))?;
        let facts = facts_of(&metadata);
        if facts.sort != Sort::Device {
            return Ok(facts);
        }
        let size = seek(&*self.file, SeekFrom::End(0));
        let size = size.map_err(|error| self.failed("measure", &error.into()))?;
        Ok(Facts { size: Some(size), ..facts })
    }

    fn lane(&self, _: usize) -> Result<Box<dyn Lane>, Failure> {
        Ok(Box::new(LocalLane {
            file: Arc::clone(&self.file),
            name: self.name.clone(),
            bounce: self.is_direct.then(Vec::new),
            skips_zeros: self.skips_zeros,
            done: VecDeque::new(),
        }))
    }

    fn next_data(&self, from: u64, size: u64) -> Result<Option<Range<u64>>, Failure> {
        if from >= size {
            return Ok(None);
        }
        let begin = match seek(&*self.file, SeekFrom::Data(from)) {
            Ok(begin) => begin,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            // A file system without holes.
            Err(_) => return Ok(Some(from..size)),
        };
        let end = seek(&*self.file, SeekFrom::Hole(begin)).unwrap_or(size);
        Ok((begin < size).then_some(begin..end.min(size)))
    }

    fn set_size(&self, size: u64) -> Result<(), Failure> {
        set_len(&self.file, size).map_err(|error| self.failed("set the size of", &error))
    }

    fn zero(&self, range: Range<u64>) -> Result<(), Failure> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let length = range.end - range.start;
        let zeroed = fallocate(&*self.file, punch, range.start, length).or_else(|_| {
            let keep = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
            fallocate(&*self.file, keep, range.start, length)
        });
        if zeroed.is_ok() {
            return Ok(());
        }
        let zeros = vec![0; BLOCK_BYTES as usize];
        let mut at = range.start;
        while at < range.end {
            let piece = (range.end - at).min(zeros.len() as u64);
            self.file
                .write_all_at(&zeros[..piece as usize], at)
                .map_err(|error| self.failed("write zeros to", &error))?;
            at += piece;
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), Failure> {
        self.file.sync_all().map_err(|error| self.failed("make durable", &error))
    }

    fn preserve(&self, facts: &Facts) -> Result<(), Failure> {
        let failed = |error: rustix::io::Errno| self.failed("preserve attributes of", &error.into());
        // Only root may give files away.
        let (uid, gid) = facts.owner;
        if rustix::process::geteuid().is_root() {
            let owner = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
            fchown(&*self.file, Some(owner.0), Some(owner.1)).map_err(failed)?;
        }
        fchmod(&*self.file, Mode::from_raw_mode(facts.mode & 0o7777)).map_err(failed)?;
        let (accessed, modified) = facts.times_ns;
        let times = Timestamps { last_access: timespec(accessed), last_modification: timespec(modified) };
        futimens(&*self.file, &times).map_err(failed)
    }
}

/// The path of a file beside another one, with this at the end of its name. A name that would become too long
/// loses what is at the end of its own part.
pub fn beside(path: &Path, end: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().as_bytes();
    let mut beside = name[..name.len().min(NAME_PART_BYTES)].to_vec();
    beside.extend_from_slice(end.as_bytes());
    path.with_file_name(OsStr::from_bytes(&beside))
}

/// A file of this machine that is written beside its destination.
#[derive(Debug)]
pub struct LocalPartial {
    file: LocalFile,
    path: PathBuf,
    destination: PathBuf,
    /// The permissions that it is to have, less the umask. Its owner may write to it until it is published.
    mode: u32,
    is_published: bool,
}

impl LocalPartial {
    /// Makes it, or opens the one that is there. Its name says what it is a copy of (`tag`), so that the same
    /// copy finds it again. Only one program writes to it at a time.
    pub fn open(destination: &Path, tag: &str, mode: u32) -> Result<Self, Failure> {
        let path = beside(destination, &format!(".partial-{tag}"));
        let failed = |error: io::Error| {
            let failure = Failure::io(format!("Cannot create {}", path.display()), &error);
            Failure::of(failure.kind(), format!("{failure} --inplace writes to the destination itself."))
        };
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let options = options.mode(mode | OWNER_WRITES).custom_flags(libc::O_NOFOLLOW);
        let open = || options.open(&path);
        let is_denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
        let opened = open_partial(open, is_denied, || std::fs::remove_file(&path).is_ok());
        let file = opened.map_err(failed)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Failure::new(format!(
                "Another raio cp writes to {}. Wait until it has ended, or stop it.",
                path.display()
            ))
        })?;
        Ok(Self {
            file: LocalFile::new(file, &path),
            path,
            destination: destination.to_owned(),
            mode,
            is_published: false,
        })
    }
}

impl PartialFile for LocalPartial {
    fn place(&self) -> &dyn Place {
        &self.file
    }

    fn set_skips_zeros(&mut self, skips: bool) {
        self.file.skips_zeros = skips;
    }

    fn location(&self, _: &Location) -> Location {
        Location::Local(self.path.clone())
    }

    fn publish(&mut self, durable: bool) -> Result<(), Failure> {
        let failed = |error: io::Error| {
            let (from, to) = (self.path.display(), self.destination.display());
            Failure::io(format!("Cannot rename {from} to {to}"), &error)
        };
        self.file.end_writing(self.mode).map_err(failed)?;
        std::fs::rename(&self.path, &self.destination).map_err(failed)?;
        self.is_published = true;
        if durable {
            let parent = self.destination.parent().filter(|parent| !parent.as_os_str().is_empty());
            File::open(parent.unwrap_or(Path::new("."))).and_then(|it| it.sync_all()).map_err(failed)?;
        }
        Ok(())
    }

    fn remove(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Drop for LocalPartial {
    fn drop(&mut self) {
        // Nothing was written: it is of no use.
        if !self.is_published && self.file.file.metadata().is_ok_and(|it| it.len() == 0) {
            self.remove();
        }
    }
}

/// Calls on a file, done at once.
struct LocalLane {
    file: Arc<File>,
    name: String,
    /// Memory for direct reads, which must begin at a multiple of [`DIRECT_ALIGN`].
    bounce: Option<Vec<u8>>,
    skips_zeros: bool,
    done: VecDeque<Done>,
}

impl LocalLane {
    /// Fills `data` from `offset` on. Returns how many bytes there were.
    fn read_at(&mut self, data: &mut [u8], offset: u64) -> io::Result<usize> {
        let Some(bounce) = &mut self.bounce else { return read_full(&self.file, data, offset) };
        let wanted = data.len().next_multiple_of(DIRECT_ALIGN);
        if bounce.len() < wanted + DIRECT_ALIGN {
            *bounce = vec![0; wanted + DIRECT_ALIGN];
        }
        let begin = bounce.as_ptr().align_offset(DIRECT_ALIGN);
        let aligned = &mut bounce[begin..begin + wanted];
        let length = read_full(&self.file, aligned, offset)?.min(data.len());
        data[..length].copy_from_slice(&aligned[..length]);
        Ok(length)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        match self.skips_zeros {
            true => write_sparsely(&self.file, data, offset)?,
            false => self.file.write_all_at(data, offset)?,
        }
        Ok(data.len())
    }
}

/// Sets the size of a file if it differs. ext4 treats a truncation to size 0 as a replacement of the file,
/// even if the file was empty: closing it then starts the writeback of all that was written.
pub fn set_len(file: &File, size: u64) -> io::Result<()> {
    if file.metadata()?.len() == size { Ok(()) } else { file.set_len(size) }
}

/// Writes bytes to a file that reads as zeros there, but no long runs of zeros, and none at the end.
pub fn write_sparsely(file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    // Neighbouring pieces that have data are one write.
    let mut begin = 0;
    while begin < data.len() {
        let pieces = data[begin..].chunks(ZERO_RUN_BYTES);
        let zeros: usize = pieces.take_while(|piece| is_zero(piece)).map(<[u8]>::len).sum();
        begin += zeros;
        let pieces = data[begin..].chunks(ZERO_RUN_BYTES);
        let bytes: usize = pieces.take_while(|piece| !is_zero(piece)).map(<[u8]>::len).sum();
        file.write_all_at(&data[begin..begin + bytes], offset + begin as u64)?;
        begin += bytes;
    }
    Ok(())
}

/// Reads until the memory is full, or the file ends. Direct reads end at a length that is not aligned only at
/// the end of the file.
fn read_full(file: &File, data: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < data.len() {
        match file.read_at(&mut data[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Whether there is nothing but zeros.
pub fn is_zero(bytes: &[u8]) -> bool {
    // As each byte is compared with the next one, memcmp(3) does it.
    bytes.first().is_none_or(|&first| first == 0 && bytes[1..] == bytes[..bytes.len() - 1])
}

impl Lane for LocalLane {
    fn read(&mut self, io: Io) -> Result<(), Failure> {
        let Io { token, offset, mut data } = io;
        let result = self.read_at(&mut data, offset);
        let result =
            result.map_err(|error| Failure::io(format!("Cannot read {} at {offset}", self.name), &error));
        self.done.push_back(Done { token, data, result });
        Ok(())
    }

    fn write(&mut self, io: Io) -> Result<(), Failure> {
        let Io { token, offset, data } = io;
        let result = self.write_at(&data, offset);
        let result =
            result.map_err(|error| Failure::io(format!("Cannot write to {} at {offset}", self.name), &error));
        self.done.push_back(Done { token, data, result });
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Done>, Failure> {
        Ok(self.done.pop_front())
    }
}

/// Standard input or output, a pipe, a terminal, or nothing (`null:`): bytes in order.
#[derive(Debug)]
pub struct Stream {
    end: StreamEnd,
    name: String,
    interrupt: Interrupt,
}

#[derive(Clone, Debug)]
enum StreamEnd {
    Input,
    Output,
    File(Arc<File>),
    Null,
}

impl Stream {
    /// Standard input.
    pub fn input(interrupt: Interrupt) -> Self {
        Self { end: StreamEnd::Input, name: "standard input".into(), interrupt }
    }

    /// Standard output.
    pub fn output(interrupt: Interrupt) -> Self {
        Self { end: StreamEnd::Output, name: "standard output".into(), interrupt }
    }

    /// What is written there is thrown away.
    pub fn null() -> Self {
        Self { end: StreamEnd::Null, name: "null:".into(), interrupt: Interrupt::default() }
    }

    /// A pipe, a terminal and the like, to be written to.
    pub fn open(path: &Path, interrupt: Interrupt) -> Result<Self, Failure> {
        let file = OpenOptions::new().write(true).open(path);
        let file = file.map_err(|error| Failure::io(format!("Cannot open {}", path.display()), &error))?;
        Ok(Self { end: StreamEnd::File(Arc::new(file)), name: path.display().to_string(), interrupt })
    }

    fn unsupported(&self, what: &str) -> Failure {
        Failure::usage(format!("{} is a stream, and cannot {what}. Copy to a file.", self.name))
    }
}

impl Place for Stream {
    fn name(&self) -> &str {
        &self.name
    }

    fn facts(&self) -> Result<Facts, Failure> {
        let facts = Facts {
            sort: Sort::Stream,
            size: None,
            mode: 0o644,
            owner: (0, 0),
            times_ns: (0, 0),
            identity: (0, 0),
        };
        if let StreamEnd::File(file) = &self.end
            && let Ok(metadata) = file.metadata()
        {
            return Ok(Facts { sort: Sort::Stream, size: None, ..facts_of(&metadata) });
        }
        Ok(facts)
    }

    fn lane(&self, _: usize) -> Result<Box<dyn Lane>, Failure> {
        Ok(Box::new(StreamLane {
            end: self.end.clone(),
            name: self.name.clone(),
            interrupt: self.interrupt.clone(),
            done: VecDeque::new(),
        }))
    }

    fn set_size(&self, _: u64) -> Result<(), Failure> {
        Ok(())
    }

    fn zero(&self, _: Range<u64>) -> Result<(), Failure> {
        Ok(())
    }

    fn sync(&self) -> Result<(), Failure> {
        Err(self.unsupported("be made durable"))
    }

    fn preserve(&self, _: &Facts) -> Result<(), Failure> {
        Err(self.unsupported("have attributes"))
    }
}

/// Reads and writes on a stream, in order, done at once.
struct StreamLane {
    end: StreamEnd,
    name: String,
    interrupt: Interrupt,
    done: VecDeque<Done>,
}

impl StreamLane {
    /// Waits until a read or write would not wait, so that Ctrl-C is heard.
    fn ready(&self, fd: BorrowedFd<'_>, events: PollFlags) -> Result<(), Failure> {
        let interval = Timespec { tv_sec: 0, tv_nsec: STOP_CHECK_INTERVAL.subsec_nanos().into() };
        loop {
            self.interrupt.check()?;
            match poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&interval)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                // Files and some devices cannot be polled, and do not wait.
                _ => return Ok(()),
            }
        }
    }

    fn read_some(&self, data: &mut [u8]) -> Result<usize, Failure> {
        let stdin = io::stdin();
        let fd = match &self.end {
            StreamEnd::Input => stdin.as_fd(),
            StreamEnd::File(file) => file.as_fd(),
            StreamEnd::Output | StreamEnd::Null => return Ok(0),
        };
        self.ready(fd, PollFlags::IN)?;
        let length = match &self.end {
            StreamEnd::File(file) => (&**file).read(&mut *data),
            _ => rustix::io::read(fd, &mut *data).map_err(io::Error::from),
        };
        match length {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => self.read_some(data),
            length => length.map_err(|error| Failure::io(format!("Cannot read {}", self.name), &error)),
        }
    }

    fn write_all(&self, mut data: &[u8]) -> Result<(), Failure> {
        while !data.is_empty() {
            let stdout = io::stdout();
            let written = match &self.end {
                StreamEnd::Null | StreamEnd::Input => return Ok(()),
                StreamEnd::Output => {
                    self.ready(stdout.as_fd(), PollFlags::OUT)?;
                    rustix::io::write(stdout.as_fd(), data).map_err(io::Error::from)
                }
                StreamEnd::File(file) => {
                    self.ready(file.as_fd(), PollFlags::OUT)?;
                    (&**file).write(data)
                }
            };
            match written {
                Ok(written) => data = &data[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(self.end, StreamEnd::Output) => return Err(stdout_failed(&error)),
                Err(error) => return Err(Failure::io(format!("Cannot write to {}", self.name), &error)),
            }
        }
        Ok(())
    }
}

impl Lane for StreamLane {
    fn read(&mut self, io: Io) -> Result<(), Failure> {
        let Io { token, mut data, .. } = io;
        let mut filled = 0;
        while filled < data.len() {
            match self.read_some(&mut data[filled..])? {
                0 => break,
                length => filled += length,
            }
        }
        self.done.push_back(Done { token, data, result: Ok(filled) });
        Ok(())
    }

    fn write(&mut self, io: Io) -> Result<(), Failure> {
        let Io { token, data, .. } = io;
        self.write_all(&data)?;
        let result = Ok(data.len());
        self.done.push_back(Done { token, data, result });
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Done>, Failure> {
        Ok(self.done.pop_front())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lane: &mut dyn Lane, offset: u64, length: usize) -> Vec<u8> {
        lane.read(Io { token: 7, offset, data: vec![0xee; length] }).unwrap();
        let done = lane.next().unwrap().unwrap();
        assert_eq!(done.token, 7);
        let length = done.result.unwrap();
        done.data[..length].to_vec()
    }

    #[test]
    fn zeros_are_found_at_every_place() {
        let mut bytes = vec![0; 100];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for at in 0..100 {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
            bytes[at] = 0;
        }
    }

    #[test]
    fn a_file_that_has_its_size_is_not_truncated() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        let long_ago = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1);
        for size in [0, 1000] {
            let file = LocalFile::open_in_place(&path, 0o644).unwrap();
            file.set_size(size).unwrap();
            file.file.set_modified(long_ago).unwrap();
            file.set_size(size).unwrap();
            let metadata = path.metadata().unwrap();
            // A truncation sets the time whatever the size was.
            assert_eq!((metadata.len(), metadata.modified().unwrap()), (size, long_ago));
        }
    }

    #[test]
    fn runs_of_zeros_are_not_written_and_everything_else_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        let mut file = LocalFile::open_in_place(&path, 0o644).unwrap();
        file.skips_zeros = true;
        let length = 5 * ZERO_RUN_BYTES + 3;
        file.set_size(length as u64).unwrap();
        let mut data = vec![0; length];
        data[2 * ZERO_RUN_BYTES + 1] = 7;
        data[length - 1] = 9;
        let mut lane = file.lane(1).unwrap();
        lane.write(Io { token: 0, offset: 0, data: data.clone() }).unwrap();
        assert_eq!(lane.next().unwrap().unwrap().result.unwrap(), length);
        assert_eq!(std::fs::read(&path).unwrap(), data);
        let blocks = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(blocks <= 2 * ZERO_RUN_BYTES as u64, "{blocks} bytes of storage");
    }

    #[test]
    fn a_direct_read_brings_the_same_bytes_up_to_the_end() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("f");
        let bytes: Vec<u8> = (0..100_001u32).map(|n| (n % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = open_source(&path, true, &Interrupt::default()).unwrap();
        let mut lane = file.lane(1).unwrap();
        assert_eq!(read(&mut *lane, 4096, 8192), bytes[4096..][..8192]);
        assert_eq!(read(&mut *lane, 98_304, 65_536), bytes[98_304..]);
    }

    #[test]
    fn holes_are_left_out_of_the_ranges_with_data() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("f");
        let file = LocalFile::open_in_place(&path, 0o644).unwrap();
        file.set_size(4 << 20).unwrap();
        file.file.write_all_at(b"x", 2 << 20).unwrap();
        let range = file.next_data(0, 4 << 20).unwrap().unwrap();
        assert!(range.contains(&(2 << 20)) && range.start > 0 && range.end < 4 << 20, "{range:?}");
        assert_eq!(file.next_data(3 << 20, 4 << 20).unwrap(), None);
    }

    #[test]
    fn a_name_beside_another_is_never_too_long() {
        assert_eq!(beside(Path::new("d/f"), ".x"), Path::new("d/f.x"));
        assert_eq!(beside(Path::new("f"), ".x"), Path::new("f.x"));
        let long = beside(&Path::new("d").join("n".repeat(255)), ".partial-12345678.journal");
        assert!(long.file_name().unwrap().len() <= 255 && long.to_str().unwrap().ends_with(".journal"));
    }

    #[test]
    fn a_partial_file_has_one_writer_and_takes_the_place_of_its_destination() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        std::fs::write(&path, "old").unwrap();
        let mut partial = LocalPartial::open(&path, "1234", 0o600).unwrap();
        let second = LocalPartial::open(&path, "1234", 0o600).unwrap_err();
        assert!(second.to_string().contains("Another raio cp"), "{second}");
        partial.file.file.write_all_at(b"new", 0).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        partial.publish(true).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
