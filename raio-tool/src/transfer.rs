//! A transfer: blocks of one place are read, looked at, and written to another, or to none.
//!
//! A few lanes share the list of blocks. Each is a thread with a way to both ends ([`crate::place::Lane`])
//! and a few blocks in hand, which it reads and writes as they come. In order there is one lane, and what was
//! read too early waits.

mod blocks;

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use raio_transport::sync::lock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::blocks::Blocks;
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::place::{Done, Io, Lane, Place, has_become_shorter};
use crate::rate::RateLimiter;
use crate::tuning::{BLOCK_BYTES, DEPTH, LANES, LANES_FROM_BYTES, STOP_CHECK_INTERVAL};

pub use self::blocks::Block;

/// What becomes of a block that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is written.
    Write,
    /// The destination has it already.
    Skip,
}

/// Looks at the blocks of a transfer. Its methods are called by all lanes.
pub trait Watcher: Sync {
    /// A block was read.
    fn read(&self, block: Block, data: &[u8]) -> Result<Verdict, Failure>;
    /// A block is at the destination.
    fn written(&self, _: Block) -> Result<(), Failure> {
        Ok(())
    }
    /// A range of the source has no data.
    fn hole(&self, _: Range<u64>) -> Result<(), Failure> {
        Ok(())
    }
    /// About ten times a second: how much was done.
    fn tick(&self, _: u64) {}
}

/// How blocks go.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Reads and writes that a lane has in flight.
    pub depth: usize,
    /// Lanes; None: as many as suit the size.
    pub lanes: Option<usize>,
    /// Blocks are looked at and written in order.
    pub is_ordered: bool,
    /// Ranges without data are left out.
    pub skips_holes: bool,
    /// Bytes per second; None: as many as possible.
    pub rate: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            block_bytes: BLOCK_BYTES,
            depth: DEPTH,
            lanes: None,
            is_ordered: false,
            skips_holes: false,
            rate: None,
        }
    }
}

impl Settings {
    /// How many lanes a transfer of this size has.
    pub fn lanes_for(&self, bytes: Option<u64>) -> usize {
        let blocks = bytes.map_or(1, |bytes| bytes.div_ceil(self.block_bytes));
        let wanted = match (self.is_ordered, bytes) {
            (true, _) | (_, None) => 1,
            (_, Some(bytes)) => self.lanes.unwrap_or_else(|| {
                let cores = std::thread::available_parallelism().map_or(1, usize::from);
                if bytes < LANES_FROM_BYTES { 1 } else { LANES.min(cores) }
            }),
        };
        wanted.min(usize::try_from(blocks).unwrap_or(usize::MAX)).max(1)
    }
}

/// A transfer that goes on.
struct Transfer<'a> {
    from: &'a dyn Place,
    to: &'a dyn Place,
    settings: &'a Settings,
    watcher: &'a dyn Watcher,
    interrupt: &'a Interrupt,
    blocks: Mutex<Blocks<'a>>,
    bytes: AtomicU64,
    /// A lane has failed: the others stop.
    is_over: AtomicBool,
    limiter: RateLimiter,
}

/// Moves a range of `from` to the same place of `to` (in a stream, to where it is). Of a source whose size is
/// not known, the range's end is where it ends. Blocks whose bit is set in `skip` are left out. Returns how
/// many bytes were read.
pub fn run(
    from: &dyn Place,
    to: &dyn Place,
    range: Range<Option<u64>>,
    skip: &[bool],
    settings: &Settings,
    watcher: &dyn Watcher,
    interrupt: &Interrupt,
) -> Result<u64, Failure> {
    let start = range.start.unwrap_or(0);
    let lanes = settings.lanes_for(range.end.map(|end| end.saturating_sub(start)));
    let holes = settings.skips_holes && !settings.is_ordered;
    let this = Transfer {
        from,
        to,
        settings,
        watcher,
        interrupt,
        blocks: Mutex::new(Blocks::new(from, start, range.end, settings.block_bytes, skip, holes)),
        bytes: AtomicU64::new(0),
        is_over: AtomicBool::new(false),
        limiter: RateLimiter::new(settings.rate),
    };
    let mut result = Ok(());
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        for _ in 0..lanes {
            let (this, sender) = (&this, sender.clone());
            scope.spawn(move || {
                let ended = this.lane();
                if ended.is_err() {
                    this.is_over.store(true, Ordering::Relaxed);
                }
                let _ = sender.send(ended);
            });
        }
        drop(sender);
        loop {
            match receiver.recv_timeout(STOP_CHECK_INTERVAL) {
                Ok(ended) if result.is_ok() => result = ended,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => watcher.tick(this.bytes.load(Ordering::Relaxed)),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
    });
    let bytes = this.bytes.load(Ordering::Relaxed);
    watcher.tick(bytes);
    result.map(|()| bytes)
}

/// What a lane has in hand.
struct Hand {
    reader: Box<dyn Lane>,
    writer: Box<dyn Lane>,
    /// The blocks, by their tokens.
    blocks: Vec<Block>,
    free: Vec<usize>,
    /// Memory of blocks that are done.
    spare: Vec<Vec<u8>>,
    reading: usize,
    writing: usize,
    /// Of a transfer in order: the number of the next block, and what was read too early.
    turn: u64,
    early: BTreeMap<u64, (usize, Vec<u8>)>,
}

impl Transfer<'_> {
    fn lane(&self) -> Result<(), Failure> {
        let depth = self.settings.depth;
        let mut hand = Hand {
            reader: self.from.lane(depth)?,
            writer: self.to.lane(depth)?,
            blocks: vec![Block::default(); depth],
            free: (0..depth).rev().collect(),
            spare: Vec::new(),
            reading: 0,
            writing: 0,
            turn: 0,
            early: BTreeMap::new(),
        };
        let mut has_more = true;
        loop {
            self.interrupt.check()?;
            if self.is_over.load(Ordering::Relaxed) {
                return Ok(());
            }
            let pause = self.limiter.until_due().min(STOP_CHECK_INTERVAL);
            if has_more && pause.is_zero() {
                has_more = self.begin(&mut hand)?;
            }
            let interval = if has_more && !pause.is_zero() { pause } else { STOP_CHECK_INTERVAL };
            let mut is_idle = true;
            while let Some(done) = hand.reader.next()? {
                is_idle = false;
                self.was_read(&mut hand, done)?;
            }
            while let Some(done) = hand.writer.next()? {
                is_idle = false;
                self.was_written(&mut hand, done)?;
            }
            match (hand.reading, hand.writing) {
                (0, 0) if !has_more => return Ok(()),
                _ if !is_idle => {}
                (0, 0) => std::thread::sleep(pause),
                (_, 0) => hand.reader.wait(interval)?,
                (0, _) => hand.writer.wait(interval)?,
                _ => wait_for_either(hand.reader.poll_fd()?, hand.writer.poll_fd()?, interval)?,
            }
        }
    }

    /// Begins to read blocks. Returns whether there are more.
    fn begin(&self, hand: &mut Hand) -> Result<bool, Failure> {
        while let Some(&token) = hand.free.last() {
            let (block, holes) = {
                let mut blocks = lock(&self.blocks);
                (blocks.next()?, blocks.take_holes())
            };
            for hole in holes {
                self.watcher.hole(hole)?;
            }
            let Some(block) = block else { return Ok(false) };
            self.limiter.charge(block.length);
            hand.free.pop();
            let length = block.length as usize;
            let mut data = hand.spare.pop().unwrap_or_default();
            data.resize(length, 0);
            hand.blocks[token] = block;
            hand.reading += 1;
            hand.reader.read(Io { token, offset: block.offset, data })?;
            // What was read at once is written while it is in the processor's cache.
            if hand.reader.poll_fd()?.is_none() || self.settings.rate.is_some() {
                break;
            }
        }
        Ok(true)
    }

    fn was_read(&self, hand: &mut Hand, done: Done) -> Result<(), Failure> {
        let Done { token, mut data, result } = done;
        let length = result?;
        hand.reading -= 1;
        self.bytes.fetch_add(length as u64, Ordering::Relaxed);
        let block = &mut hand.blocks[token];
        if length < data.len() {
            let mut blocks = lock(&self.blocks);
            if blocks.is_bounded() {
                return Err(has_become_shorter(self.from, block.offset + length as u64));
            }
            blocks.end();
            data.truncate(length);
            block.length = length as u64;
        }
        if !self.settings.is_ordered {
            return self.give(hand, token, data);
        }
        hand.early.insert(block.number, (token, data));
        while let Some((token, data)) = hand.early.remove(&hand.turn) {
            hand.turn += 1;
            self.give(hand, token, data)?;
        }
        Ok(())
    }

    /// Has a block looked at, and begins to write it.
    fn give(&self, hand: &mut Hand, token: usize, data: Vec<u8>) -> Result<(), Failure> {
        let block = hand.blocks[token];
        if data.is_empty() {
            // The end of a stream.
            hand.free.push(token);
            return Ok(());
        }
        if self.watcher.read(block, &data)? == Verdict::Skip {
            self.watcher.written(block)?;
            hand.free.push(token);
            hand.spare.push(data);
            return Ok(());
        }
        hand.writing += 1;
        hand.writer.write(Io { token, offset: block.offset, data })
    }

    fn was_written(&self, hand: &mut Hand, done: Done) -> Result<(), Failure> {
        let Done { token, mut data, result } = done;
        let length = result?;
        let block = hand.blocks[token];
        if length == 0 && !data.is_empty() {
            return Err(Failure::new(format!(
                "{} takes no more bytes at {}. Make room there, or copy less.",
                self.to.name(),
                block.offset + block.length - data.len() as u64
            )));
        }
        if length < data.len() {
            // The rest says why.
            data.drain(..length);
            let offset = block.offset + block.length - data.len() as u64;
            return hand.writer.write(Io { token, offset, data });
        }
        hand.writing -= 1;
        self.watcher.written(block)?;
        hand.free.push(token);
        hand.spare.push(data);
        Ok(())
    }
}

/// Waits until either may have something (see [`Lane::poll_fd`]), or for this long.
pub fn wait_for_either(
    one: Option<BorrowedFd<'_>>,
    other: Option<BorrowedFd<'_>>,
    interval: Duration,
) -> Result<(), Failure> {
    let fds: Vec<BorrowedFd<'_>> = one.into_iter().chain(other).collect();
    let mut fds: Vec<_> = fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    let interval = Timespec { tv_sec: 0, tv_nsec: interval.subsec_nanos().into() };
    match poll(&mut fds, Some(&interval)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(Failure::io("Cannot wait for the servers", &error.into())),
    }
}

/// Looks at nothing.
pub struct Unwatched;

impl Watcher for Unwatched {
    fn read(&self, _: Block, _: &[u8]) -> Result<Verdict, Failure> {
        Ok(Verdict::Write)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Instant;

    use super::*;
    use crate::place::{LocalFile, Stream};

    /// Notes the blocks that it sees.
    #[derive(Default)]
    struct Noted(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Watcher for Noted {
        fn read(&self, block: Block, data: &[u8]) -> Result<Verdict, Failure> {
            self.0.lock().unwrap().push((block.offset, data.to_vec()));
            Ok(Verdict::Write)
        }
    }

    fn file(path: &Path, bytes: &[u8]) -> LocalFile {
        std::fs::write(path, bytes).unwrap();
        LocalFile::open_in_place(path, 0o600).unwrap()
    }

    fn settings(block_bytes: u64) -> Settings {
        Settings { block_bytes, depth: 3, ..Settings::default() }
    }

    #[test]
    fn every_byte_of_the_range_arrives_at_its_place_whatever_the_lanes() {
        let directory = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..10_007u32).map(|n| (n * 7 % 253) as u8).collect();
        let from = file(&directory.path().join("from"), &bytes);
        for lanes in [1, 3] {
            let path = directory.path().join(format!("to{lanes}"));
            let to = file(&path, &[]);
            let settings = Settings { lanes: Some(lanes), ..settings(1000) };
            let range = Some(100)..Some(10_007);
            let moved = run(&from, &to, range, &[], &settings, &Unwatched, &Interrupt::default()).unwrap();
            assert_eq!(moved, 9_907);
            assert_eq!(std::fs::read(&path).unwrap()[100..], bytes[100..]);
        }
    }

    #[test]
    fn blocks_that_are_skipped_are_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let from = file(&directory.path().join("from"), &[5; 100]);
        let noted = Noted::default();
        let (range, skip) = (Some(0)..Some(100), [true, false, true]);
        run(&from, &Stream::null(), range, &skip, &settings(30), &noted, &Interrupt::default()).unwrap();
        let noted = noted.0.into_inner().unwrap();
        assert_eq!(noted, [(30, vec![5; 30]), (90, vec![5; 10])]);
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error_and_a_stream_just_ends() {
        let directory = tempfile::tempdir().unwrap();
        let from = file(&directory.path().join("from"), &[5; 100]);
        let (null, unwatched, interrupt) = (Stream::null(), Unwatched, Interrupt::default());
        let shorter =
            run(&from, &null, Some(0)..Some(200), &[], &settings(30), &unwatched, &interrupt).unwrap_err();
        assert!(shorter.to_string().contains("shorter"), "{shorter}");
        let all = run(&from, &null, Some(0)..None, &[], &settings(30), &unwatched, &interrupt).unwrap();
        assert_eq!(all, 100);
    }

    #[test]
    fn a_rate_takes_its_time() {
        let directory = tempfile::tempdir().unwrap();
        let from = file(&directory.path().join("from"), &[5; 4000]);
        let settings = Settings { rate: Some(20_000), ..settings(1000) };
        let started = Instant::now();
        let range = Some(0)..Some(4000);
        run(&from, &Stream::null(), range, &[], &settings, &Unwatched, &Interrupt::default()).unwrap();
        // The last block may begin after three of 50 ms each.
        assert!(started.elapsed() >= Duration::from_millis(150), "{:?}", started.elapsed());
    }
}
