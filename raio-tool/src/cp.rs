//! `raio cp`: copies files between this machine and servers.
//!
//! A copy is a transfer whose blocks are noted in a journal. It goes beside the destination, and is renamed
//! at the end. A small file goes to a server by one request (put). `--verify` is a second transfer, which
//! reads the destination and compares its blocks with the checksums of what was read from the source.

mod destination;
mod journal;
mod trees;

use std::ffi::OsString;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::{Args, ValueHint};
use raio::{Attributes, PutOptions};
use raio_transport::size;
use raio_transport::sync::lock;
use serde::Serialize;

use self::destination::{Destination, Found, found};
use self::journal::{Journal, Subject};
use crate::batch::Batch;
use crate::checksum::crc32c;
use crate::failure::{Failure, Kind};
use crate::global::Global;
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::output;
use crate::pattern::Pattern;
use crate::place::{Facts, Place, Sessions, Sort, Stream, is_zero, open_source, read_whole};
use crate::progress::{Progress, Style};
use crate::transfer::{self, Block, Settings, Verdict, Watcher};
use crate::tuning::{DEPTH, JOURNAL_FROM_BYTES, SMALL_FILE_BYTES};

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// Files to copy, and at last where to: a file, or a directory
    #[arg(required = true, num_args = 2.., value_name = "PATH", value_hint = ValueHint::AnyPath)]
    paths: Vec<OsString>,
    /// Copy directories recursively
    #[arg(short, long)]
    recursive: bool,
    /// With -r, copy the targets of symbolic links, rather than the links
    #[arg(short = 'L', long, requires = "recursive")]
    dereference: bool,
    /// With -r, leave out what matches this pattern
    #[arg(long, value_name = "PATTERN", value_parser = Pattern::parse, requires = "recursive")]
    exclude: Vec<Pattern>,
    /// With -r, stop at the first error, rather than continue with the other files
    #[arg(long, requires = "recursive")]
    fail_fast: bool,
    /// Resume an interrupted copy. Blocks already at the destination are verified by checksum first
    #[arg(long)]
    resume: bool,
    /// Read the destination again, from the disk where that is possible, and compare
    #[arg(long)]
    verify: bool,
    /// Flush the copy to stable storage (fsync) before it is renamed into place
    #[arg(long)]
    fsync: bool,
    /// Give the copy the permissions, the times and, as root, the owner of the source; to a server and with
    /// -r, permissions and the modification time
    #[arg(long)]
    preserve: bool,
    /// Write to the destination itself, rather than to a file beside it
    #[arg(long)]
    inplace: bool,
    /// The destination reads as zeros: write none
    #[arg(long)]
    destination_is_zero: bool,
    /// Write zeros and holes as they are
    #[arg(long, conflicts_with = "destination_is_zero")]
    no_sparse: bool,
    /// At most this number of bytes per second
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    bwlimit: Option<u64>,
    /// Connections to each server; with -r, files worked on at a time [default: 1 for small files, up to 4
    /// for large ones, 8 with -r]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=64))]
    connections: Option<u16>,
    /// Reads and writes in flight on each connection
    #[arg(long, value_name = "NUMBER", default_value_t = DEPTH as u16)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    depth: u16,
    /// Length of each read and write, a multiple of 4k
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = block_size)]
    block_size: u64,
    /// How progress is shown, on standard error
    #[arg(long, value_enum, default_value_t, value_name = "STYLE")]
    progress: Style,
}

fn block_size(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text)?;
    if bytes == 0 || bytes % 4096 != 0 || bytes > 64 << 20 {
        return Err(format!("{text} is no block size. Write a multiple of 4k, at most 64M."));
    }
    Ok(bytes)
}

/// What a copy came to, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    source: String,
    destination: String,
    /// Of the source.
    bytes: u64,
    /// Read from the source by this run.
    copied_bytes: u64,
    /// Of those, zeros that were not written.
    zero_bytes: u64,
    /// There already, and proven by checksums.
    resumed_bytes: u64,
    /// Read again and compared.
    verified_bytes: u64,
    seconds: f64,
    bytes_per_second: f64,
}

pub fn run(global: &Global, options: &Options, interrupt: &Interrupt) -> Result<(), Failure> {
    let mut locations = options.paths.iter().map(Location::parse).collect::<Result<Vec<_>, _>>()?;
    let to = locations.pop().ok_or_else(|| Failure::usage("There is no destination."))?;
    let sessions = Sessions::new(global);
    let is_directory = sessions.is_directory(&to)?;
    let mut batch = Batch::default();
    for from in &locations {
        let to = to.for_source(from, is_directory, locations.len() > 1)?;
        if options.recursive && sessions.is_directory(from)? {
            let copied = trees::copy(global, options, from, &to, !is_directory, interrupt);
            if options.fail_fast {
                copied?
            } else {
                batch.note(copied)?
            }
            continue;
        }
        let copied = Copy { sessions: &sessions, options, interrupt, from, to: &to }.run();
        let report = match copied {
            Err(failure) if options.recursive && !options.fail_fast => {
                batch.note(Err(failure))?;
                continue;
            }
            copied => copied?,
        };
        match to {
            _ if !global.json => {}
            // The data is on standard output.
            Location::Stream => output::say(&serde_json::json!(report).to_string()),
            _ => output::print_json(&report)?,
        }
    }
    batch.finish()
}

/// One file to be copied.
struct Copy<'a> {
    sessions: &'a Sessions<'a>,
    options: &'a Options,
    interrupt: &'a Interrupt,
    from: &'a Location,
    to: &'a Location,
}

impl Copy<'_> {
    fn run(&self) -> Result<Report, Failure> {
        let started = Instant::now();
        let source = open_source(self.sessions, self.from, false, self.interrupt)?;
        let facts = source.facts()?;
        if let Some(report) = self.put(&*source, &facts, started)? {
            return Ok(report);
        }
        let mut destination =
            Destination::open(self.sessions, self.options, self.from, self.to, &facts, self.interrupt)?;
        self.check(&*source, &facts, &destination)?;
        let subject = self.subject(&facts);
        let checksums = Checksums::new(facts.size, self.options.block_size, self.options.verify);
        let mut journal = None;
        let mut resumed_bytes = 0;
        if let (Some(subject), Some(path)) = (&subject, destination.journal()) {
            let found = if self.options.resume { Journal::read(path, subject) } else { None };
            if self.options.resume && found.is_none() {
                output::say(&format!(
                    "raio: There is nothing to resume for {}: it is copied from its start.",
                    self.to
                ));
            }
            let proven = match found {
                Some(found) => self.prove(&destination, found, subject)?,
                None => Vec::new(),
            };
            for (block, crc) in &proven {
                checksums.set(block.number, *crc);
                resumed_bytes += block.length;
            }
            let blocks: Vec<_> = proven.iter().map(|(block, crc)| (block.number, *crc)).collect();
            journal = Some(Journal::create(path, subject, &blocks)?);
        }
        if resumed_bytes == 0 {
            destination.begin(!self.options.no_sparse)?;
        }
        let watcher = Copying {
            // What an earlier run has left may be anything.
            is_fresh: resumed_bytes == 0 && destination.is_zero() && !self.options.no_sparse,
            to: destination.place(),
            checksums,
            needs_checksums: journal.is_some() || self.options.verify,
            journal,
            zero_bytes: AtomicU64::new(0),
            progress: Progress::new(self.options.progress, "copy", facts.size.map(|it| it - resumed_bytes)),
        };
        let skip = watcher.checksums.are_known();
        let moved = transfer::run(
            &*source,
            destination.place(),
            Some(0)..facts.size,
            &skip,
            &self.settings(facts.sort != Sort::Stream),
            &watcher,
            self.interrupt,
        );
        watcher.progress.finish();
        let moved = moved.map_err(|failure| self.left(failure, &destination, watcher.journal.is_some()))?;
        let end = facts.size.unwrap_or(moved);
        destination.finish(end)?;
        if self.options.preserve {
            destination.place().preserve(&facts)?;
        }
        if self.options.fsync || self.options.verify {
            destination.place().sync()?;
        }
        let verified_bytes = match self.options.verify {
            true => self
                .verify(&destination, end, &watcher)
                .map_err(|failure| self.left(failure, &destination, watcher.journal.is_some()))?,
            false => 0,
        };
        let zero_bytes = watcher.zero_bytes.load(Ordering::Relaxed);
        destination.publish(self.options.fsync)?;
        let elapsed = started.elapsed();
        Ok(Report {
            source: self.from.to_string(),
            destination: self.to.to_string(),
            bytes: end,
            copied_bytes: moved,
            zero_bytes,
            resumed_bytes,
            verified_bytes,
            seconds: elapsed.as_secs_f64(),
            bytes_per_second: output::per_second(moved, elapsed),
        })
    }

    /// Copies a small file to a server by one request, if that is what it takes.
    fn put(&self, source: &dyn Place, facts: &Facts, started: Instant) -> Result<Option<Report>, Failure> {
        let options = self.options;
        let is_plain = !(options.verify || options.resume || options.inplace || options.destination_is_zero);
        let is_small = |&size: &u64| size <= SMALL_FILE_BYTES && options.bwlimit.is_none() && is_plain;
        let Some(size) = facts.size.filter(is_small) else { return Ok(None) };
        if !matches!(self.to, Location::Remote { .. }) {
            return Ok(None);
        }
        let (session, path) = self.sessions.at(self.to)?;
        match found(&session, path) {
            Found::Other => return Ok(None),
            Found::File(there) => self.check_same_file(facts, &there)?,
            Found::Nothing => {}
        }
        let bytes = read_whole(source, size)?;
        let put = PutOptions {
            mode: facts.mode & 0o777,
            modified_ns: options.preserve.then_some(facts.times_ns.1),
            exclusive: false,
            fsync: options.fsync,
        };
        let done = session.put(path, &bytes, &put).and_then(|()| match options.preserve {
            // The umask of the server applies to a put.
            true => {
                let attributes = Attributes { mode: Some(put.mode), ..Attributes::default() };
                session.set_attributes(path, &attributes)
            }
            false => Ok(()),
        });
        match done {
            Err(error) if error.errno() == libc::EFBIG => return Ok(None),
            done => done.map_err(|error| Failure::remote(format!("Cannot write {}", self.to), &error))?,
        }
        let elapsed = started.elapsed();
        Ok(Some(Report {
            source: self.from.to_string(),
            destination: self.to.to_string(),
            bytes: size,
            copied_bytes: size,
            zero_bytes: 0,
            resumed_bytes: 0,
            verified_bytes: 0,
            seconds: elapsed.as_secs_f64(),
            bytes_per_second: output::per_second(size, elapsed),
        }))
    }

    /// Refuses a copy of a file to itself.
    fn check_same_file(&self, from: &Facts, to: &Facts) -> Result<(), Failure> {
        let is_local = matches!((self.from, self.to), (Location::Local(_), Location::Local(_)));
        if to.is_same_file(from, is_local) {
            return Err(Failure::usage(format!("{} and {} are the same file.", self.from, self.to)));
        }
        Ok(())
    }

    /// Refuses what would destroy something, or cannot be done, before anything is written.
    fn check(&self, source: &dyn Place, facts: &Facts, destination: &Destination) -> Result<(), Failure> {
        let to = destination.facts();
        if let Some(to) = &to {
            self.check_same_file(facts, to)?;
        }
        let is_stream = to.is_none_or(|to| to.sort == Sort::Stream) && destination.is_in_place();
        for (is_set, option) in [
            (self.options.verify, "--verify"),
            (self.options.resume, "--resume"),
            (self.options.fsync, "--fsync"),
            (self.options.preserve, "--preserve"),
        ] {
            if is_set && is_stream {
                return Err(Failure::usage(format!(
                    "{option} needs a file or device, and {} is none.",
                    self.to
                )));
            }
        }
        if self.options.resume && facts.size.is_none() {
            let name = source.name();
            return Err(Failure::usage(format!("--resume needs a source with a size, and {name} has none.")));
        }
        match (to.filter(|to| to.sort == Sort::Device).and_then(|to| to.size), facts.size) {
            (Some(room), Some(size)) if room < size => Err(Failure::new(format!(
                "{} has {room} bytes, and {} has {size}. Copy to a larger device.",
                self.to, self.from
            ))),
            _ => Ok(()),
        }
    }

    /// What the journal is of; None if there is to be none.
    fn subject(&self, facts: &Facts) -> Option<Subject> {
        let size = facts.size.filter(|&size| size >= JOURNAL_FROM_BYTES || self.options.resume)?;
        Some(Subject {
            version: 1,
            source: self.from.to_string(),
            size,
            modified_ns: facts.times_ns.1,
            identity: facts.identity,
            block_bytes: self.options.block_size,
        })
    }

    fn settings(&self, skips_holes: bool) -> Settings {
        Settings {
            block_bytes: self.options.block_size,
            depth: self.options.depth.into(),
            lanes: match self.to {
                // Nothing is done with the data that another thread could do meanwhile.
                Location::Null => Some(self.options.connections.unwrap_or(1).into()),
                _ => self.options.connections.map(usize::from),
            },
            // What goes to a stream has no place of its own.
            is_ordered: matches!(self.to, Location::Stream),
            // What goes nowhere is read for its own sake.
            skips_holes: skips_holes && !self.options.no_sparse && !matches!(self.to, Location::Null),
            rate: self.options.bwlimit.filter(|&rate| rate > 0),
        }
    }

    /// The blocks of the journal that the destination really has.
    fn prove(
        &self,
        destination: &Destination,
        found: Vec<(u64, u32)>,
        subject: &Subject,
    ) -> Result<Vec<(Block, u32)>, Failure> {
        let checksums = Checksums::new(Some(subject.size), subject.block_bytes, true);
        for (number, crc) in found {
            checksums.set(number, crc);
        }
        let known = checksums.are_known();
        let skip: Vec<bool> = known.iter().map(|known| !known).collect();
        let bytes: u64 = known.iter().filter(|&&known| known).count() as u64 * subject.block_bytes;
        let proving = Proving {
            checksums: &checksums,
            proven: Mutex::new(Vec::new()),
            progress: Progress::new(self.options.progress, "check", Some(bytes)),
        };
        // A file that has become shorter has nothing behind its end.
        let end = destination.place().facts()?.size.map_or(subject.size, |size| size.min(subject.size));
        let settings = Settings { rate: None, ..self.settings(false) };
        let range = Some(0)..Some(end);
        let read = transfer::run(
            destination.place(),
            &Stream::null(),
            range,
            &skip,
            &settings,
            &proving,
            self.interrupt,
        );
        proving.progress.finish();
        read?;
        let mut proven = lock(&proving.proven).clone();
        proven.retain(|(block, _)| {
            block.offset + block.length == subject.size || block.length == subject.block_bytes
        });
        let lost = known.iter().filter(|&&known| known).count() - proven.len();
        if lost > 0 {
            output::say(&format!(
                "raio: {lost} blocks of {} are not what was written: they are copied again.",
                self.to
            ));
        }
        Ok(proven)
    }

    /// What is said, and left, when a copy has failed.
    fn left(&self, failure: Failure, destination: &Destination, has_journal: bool) -> Failure {
        if has_journal {
            return failure.with_advice("The same command with --resume goes on.");
        }
        destination.abandon();
        failure
    }

    /// Reads the destination again. Returns how many bytes were compared.
    fn verify(&self, destination: &Destination, end: u64, copied: &Copying<'_>) -> Result<u64, Failure> {
        let again = open_source(self.sessions, &destination.location(self.to), true, self.interrupt)?;
        let size = again.facts()?.size;
        let is_as_long = match destination.facts().map(|facts| facts.sort) {
            Some(Sort::Device) => size >= Some(end),
            _ => size.unwrap_or(0) == end,
        };
        if !is_as_long {
            return Err(Failure::of(
                Kind::Unverified,
                format!("{} has {size:?} bytes, and {end} were copied. Copy it again.", self.to),
            ));
        }
        let verifying = Verifying {
            checksums: &copied.checksums,
            name: self.to.to_string(),
            progress: Progress::new(self.options.progress, "verify", Some(end)),
        };
        let settings = Settings { rate: None, ..self.settings(true) };
        let range: Range<Option<u64>> = Some(0)..Some(end);
        let read = transfer::run(&*again, &Stream::null(), range, &[], &settings, &verifying, self.interrupt);
        verifying.progress.finish();
        read.map(|_| end)
    }
}

/// The checksums of the blocks of a file, as far as they are known. A stream's are not bounded.
struct Checksums {
    blocks: Mutex<Vec<Option<u32>>>,
    block_bytes: u64,
    is_kept: bool,
}

impl Checksums {
    fn new(size: Option<u64>, block_bytes: u64, is_kept: bool) -> Self {
        let count = size.map_or(0, |size| size.div_ceil(block_bytes));
        Self { blocks: Mutex::new(vec![None; count as usize]), block_bytes, is_kept }
    }

    fn set(&self, number: u64, crc: u32) {
        let mut blocks = lock(&self.blocks);
        let at = number as usize;
        // A record of a journal may say anything.
        if at >= blocks.len() {
            if !self.is_kept || number > (1 << 40) / self.block_bytes {
                return;
            }
            blocks.resize(at + 1, None);
        }
        blocks[at] = Some(crc);
    }

    fn get(&self, number: u64) -> Option<u32> {
        lock(&self.blocks).get(number as usize).copied().flatten()
    }

    fn are_known(&self) -> Vec<bool> {
        lock(&self.blocks).iter().map(Option::is_some).collect()
    }
}

/// The watcher of a copy.
struct Copying<'a> {
    /// Zeros need not be written.
    is_fresh: bool,
    to: &'a dyn Place,
    checksums: Checksums,
    journal: Option<Journal>,
    zero_bytes: AtomicU64,
    progress: Progress,
    needs_checksums: bool,
}

impl Watcher for Copying<'_> {
    fn read(&self, block: Block, data: &[u8]) -> Result<Verdict, Failure> {
        if self.needs_checksums {
            self.checksums.set(block.number, crc32c(data));
        }
        if self.is_fresh && is_zero(data) {
            self.zero_bytes.fetch_add(block.length, Ordering::Relaxed);
            return Ok(Verdict::Skip);
        }
        Ok(Verdict::Write)
    }

    fn written(&self, block: Block) -> Result<(), Failure> {
        match (&self.journal, self.checksums.get(block.number)) {
            (Some(journal), Some(crc)) => journal.add(block.number, crc),
            _ => Ok(()),
        }
    }

    fn hole(&self, range: Range<u64>) -> Result<(), Failure> {
        self.zero_bytes.fetch_add(range.end - range.start, Ordering::Relaxed);
        if self.is_fresh { Ok(()) } else { self.to.zero(range) }
    }

    fn tick(&self, bytes: u64) {
        self.progress.show(bytes);
    }
}

/// The watcher of a destination of which an interrupted copy is to go on.
struct Proving<'a> {
    checksums: &'a Checksums,
    proven: Mutex<Vec<(Block, u32)>>,
    progress: Progress,
}

impl Watcher for Proving<'_> {
    fn read(&self, block: Block, data: &[u8]) -> Result<Verdict, Failure> {
        let crc = crc32c(data);
        if self.checksums.get(block.number) == Some(crc) {
            lock(&self.proven).push((block, crc));
        }
        Ok(Verdict::Skip)
    }

    fn tick(&self, bytes: u64) {
        self.progress.show(bytes);
    }
}

/// The watcher of a destination that is verified.
struct Verifying<'a> {
    checksums: &'a Checksums,
    name: String,
    progress: Progress,
}

impl Verifying<'_> {
    fn wrong(&self, offset: u64) -> Failure {
        Failure::of(
            Kind::Unverified,
            format!(
                "{} is not what was copied: the block at {offset} differs. Copy it again, and examine the \
                 disk.",
                self.name
            ),
        )
    }
}

impl Watcher for Verifying<'_> {
    fn read(&self, block: Block, data: &[u8]) -> Result<Verdict, Failure> {
        let is_right = match self.checksums.get(block.number) {
            Some(crc) => crc == crc32c(data),
            // A hole of the source.
            None => is_zero(data),
        };
        if is_right { Ok(Verdict::Skip) } else { Err(self.wrong(block.offset)) }
    }

    fn hole(&self, range: Range<u64>) -> Result<(), Failure> {
        let zeros = vec![0; self.checksums.block_bytes as usize];
        let crc = crc32c(&zeros);
        // A hole ends with a block, or with the file.
        let whole = (range.end - range.start) / self.checksums.block_bytes;
        let first = range.start / self.checksums.block_bytes;
        for number in first..first + whole {
            if self.checksums.get(number).is_some_and(|it| it != crc) {
                return Err(self.wrong(number * self.checksums.block_bytes));
            }
        }
        let rest = (range.end - range.start) % self.checksums.block_bytes;
        let last = self.checksums.get(first + whole);
        if rest > 0 && last.is_some_and(|it| it != crc32c(&zeros[..rest as usize])) {
            return Err(self.wrong(range.end - rest));
        }
        Ok(())
    }

    fn tick(&self, bytes: u64) {
        self.progress.show(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_differs_from_what_was_copied_is_found_when_it_is_verified() {
        let checksums = Checksums::new(Some(25), 10, true);
        checksums.set(0, crc32c(&[7; 10]));
        let progress = Progress::new(Style::Never, "verify", None);
        let verifying = Verifying { checksums: &checksums, name: "f".into(), progress };
        let block = |number| Block { number, offset: number * 10, length: 10 };
        assert_eq!(verifying.read(block(0), &[7; 10]).unwrap(), Verdict::Skip);
        assert_eq!(verifying.read(block(1), &[0; 10]).unwrap(), Verdict::Skip, "a hole");
        for (number, data) in [(0, [8; 10]), (1, [7; 10])] {
            let wrong = verifying.read(block(number), &data).unwrap_err();
            assert_eq!(wrong.kind(), Kind::Unverified, "{wrong}");
        }
    }

    #[test]
    fn a_hole_of_the_destination_is_right_where_zeros_were_copied_alone() {
        let checksums = Checksums::new(Some(25), 10, true);
        checksums.set(0, crc32c(&[0; 10]));
        checksums.set(2, crc32c(&[0; 5]));
        let progress = || Progress::new(Style::Never, "verify", None);
        let verifying = |checksums| Verifying { checksums, name: "f".into(), progress: progress() };
        verifying(&checksums).hole(0..25).unwrap();
        checksums.set(2, crc32c(&[1; 5]));
        let wrong = verifying(&checksums).hole(0..25).unwrap_err();
        assert!(wrong.kind() == Kind::Unverified && wrong.to_string().contains("at 20"), "{wrong}");
        verifying(&checksums).hole(0..20).unwrap();
    }
}
