//! Copies a file: a transfer whose blocks are recorded in a journal, so that it can be resumed.
//! Verifying is a second transfer, which reads the destination and compares its blocks with the checksums of
//! what was read from the source.

mod destination;
mod journal;

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use raio_transport::message::data_crc;
use raio_transport::sync::lock;
use serde::Serialize;

use self::journal::{Journal, Subject};
use crate::failure::{Failure, Kind};
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::output;
use crate::place::{Facts, Place, Sessions, Sort, Stream, has_become_shorter, is_zero, open_source};
use crate::progress::Progress;
use crate::transfer::{self, Block, Settings, Verdict, Watcher};
use crate::tuning::WITHIN_SERVER_BYTES;

pub use self::destination::{Destination, can_keep_journals, state_file};

/// One file to be copied.
pub struct FileCopy<'a> {
    /// The source, and what it is.
    pub from: &'a dyn Place,
    pub facts: &'a Facts,
    /// What the user calls the source and the destination.
    pub source: &'a Location,
    pub to: &'a Location,
    /// How it is read and written.
    pub settings: Settings,
    /// A journal is kept, if the destination has a place for it.
    pub has_journal: bool,
    /// An interrupted copy is resumed.
    pub resumes: bool,
    /// It is the only file of its command: what there is to resume is told.
    pub is_alone: bool,
    /// The destination is read again, from the disk where that is possible.
    pub verifies: bool,
    /// Holes and zeros are left out where the destination reads as zeros.
    pub is_sparse: bool,
    /// Permissions and times are those of the source.
    pub preserves: bool,
    /// It is durable before it takes its name.
    pub is_durable: bool,
    /// For reading the destination again.
    pub sessions: &'a Sessions<'a>,
    /// Makes the progress of a transfer: what is done, and how many bytes there are.
    pub progress: &'a dyn Fn(&'static str, Option<u64>) -> Progress,
    /// Ctrl-C.
    pub interrupt: &'a Interrupt,
}

/// What a copy came to.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Copied {
    /// Of the source.
    pub bytes: u64,
    /// Read from the source by this run.
    pub copied_bytes: u64,
    /// Holes, and zeros that were not written.
    pub zero_bytes: u64,
    /// There already, and proven by checksums.
    pub resumed_bytes: u64,
    /// Read again and compared.
    pub verified_bytes: u64,
}

impl FileCopy<'_> {
    /// Copies it, and gives it its name.
    pub fn run(&self, destination: &mut Destination) -> Result<Copied, Failure> {
        let facts = self.facts;
        if let Some(copied) = self.copy_within_server(destination)? {
            return Ok(copied);
        }
        let subject = self.subject();
        let checksums = Checksums::new(facts.size, self.settings.block_bytes, self.verifies);
        let mut journal = None;
        let mut resumed_bytes = 0;
        if let (Some(subject), Some(path)) = (&subject, destination.journal()) {
            let found = if self.resumes { Journal::read(path, subject) } else { None };
            if self.resumes && self.is_alone && found.is_none() {
                output::say(&format!(
                    "raio: There is nothing to resume for {}: it is copied from the beginning.",
                    self.to
                ));
            }
            let proven = match found {
                Some(found) => self.prove(destination, found, subject)?,
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
            let begun = destination.begin(self.is_sparse);
            begun.map_err(|failure| self.left(failure, destination, journal.is_some()))?;
        }
        let watcher = Copying {
            // What an earlier run has left may be anything.
            is_fresh: resumed_bytes == 0 && destination.is_zero() && self.is_sparse,
            to: destination.place(),
            checksums,
            journal,
            zero_bytes: AtomicU64::new(0),
            progress: (self.progress)("copy", facts.size.map(|it| it - resumed_bytes)),
        };
        let skip = watcher.checksums.are_known();
        let has_journal = watcher.journal.is_some();
        let filled = self.fill(destination, &skip, &watcher);
        let (bytes, copied_bytes, verified_bytes) =
            filled.map_err(|failure| self.left(failure, destination, has_journal))?;
        let zero_bytes = watcher.zero_bytes.load(Ordering::Relaxed);
        let published = destination.publish(self.is_durable);
        published.map_err(|failure| self.left(failure, destination, has_journal))?;
        Ok(Copied { bytes, copied_bytes, zero_bytes, resumed_bytes, verified_bytes })
    }

    /// Copies the blocks that are not to be skipped, and does all that is needed before the copy gets its
    /// name. Returns how many bytes the copy has, how many of them were read now, and how many were verified.
    fn fill(
        &self,
        destination: &Destination,
        skip: &[bool],
        watcher: &Copying<'_>,
    ) -> Result<(u64, u64, u64), Failure> {
        let (place, range) = (destination.place(), Some(0)..self.facts.size);
        let moved = transfer::run(self.from, place, range, skip, &self.settings, watcher, self.interrupt);
        watcher.progress.finish();
        let moved = moved?;
        let end = self.facts.size.unwrap_or(moved);
        self.finish(destination, end)?;
        Ok((end, moved, if self.verifies { self.verify(destination, end, watcher)? } else { 0 }))
    }

    /// All was written, up to `end`: what is needed before the copy gets its name, but for verifying it.
    fn finish(&self, destination: &Destination, end: u64) -> Result<(), Failure> {
        destination.finish(end)?;
        if self.preserves {
            destination.place().preserve(self.facts)?;
        }
        if self.is_durable || self.verifies {
            destination.place().sync()?;
        }
        Ok(())
    }

    /// Server-side copy, if both files are on one server and no option needs the data here. Else None.
    fn copy_within_server(&self, destination: &mut Destination) -> Result<Option<Copied>, Failure> {
        let is_plain = !self.verifies && !self.resumes && self.settings.rate.is_none();
        let Some(bytes) = self.facts.size.filter(|_| is_plain) else { return Ok(None) };
        // Before anything is changed: whether the two are of one server.
        if destination.place().copy_within(self.from, 0..0, self.interrupt)?.is_none() {
            return Ok(None);
        }
        let begun = destination.begin(self.is_sparse);
        begun.map_err(|failure| self.left(failure, destination, false))?;
        let progress = (self.progress)("copy", Some(bytes));
        let copied = self.have_copied(destination, bytes, &progress);
        let copied = copied.and_then(|zero_bytes| {
            self.finish(destination, bytes)?;
            Ok(zero_bytes)
        });
        progress.finish();
        let zero_bytes = copied.map_err(|failure| self.left(failure, destination, false))?;
        let published = destination.publish(self.is_durable);
        published.map_err(|failure| self.left(failure, destination, false))?;
        let copied_bytes = bytes - zero_bytes;
        Ok(Some(Copied { bytes, copied_bytes, zero_bytes, ..Copied::default() }))
    }

    /// Server-side copy of the first `bytes` bytes, except for holes. Returns the number of bytes in holes.
    fn have_copied(
        &self,
        destination: &Destination,
        bytes: u64,
        progress: &Progress,
    ) -> Result<u64, Failure> {
        let to = destination.place();
        let (mut at, mut zero_bytes) = (0, 0);
        while at < bytes {
            let data = if self.is_sparse { self.from.next_data(at, bytes)? } else { Some(at..bytes) };
            let data = data.unwrap_or(bytes..bytes);
            if at < data.start {
                if !destination.is_zero() {
                    to.zero(at..data.start)?;
                }
                zero_bytes += data.start - at;
                at = data.start;
                continue;
            }
            let end = data.end.min(at + WITHIN_SERVER_BYTES);
            match to.copy_within(self.from, at..end, self.interrupt)? {
                None => {
                    let to = self.to;
                    let text = format!("The server of {to} does not support copying any more. Start again.");
                    return Err(Failure::new(text));
                }
                Some(0) => return Err(has_become_shorter(self.from, at)),
                Some(n) => at += n,
            }
            progress.show(at);
        }
        Ok(zero_bytes)
    }

    /// What the journal is of; None if there is to be none.
    fn subject(&self) -> Option<Subject> {
        let size = self.facts.size.filter(|_| self.has_journal)?;
        Some(Subject {
            version: 1,
            source: self.source.to_string(),
            size,
            modified_ns: self.facts.times_ns.1,
            identity: self.facts.identity,
            block_bytes: self.settings.block_bytes,
        })
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
        let count = known.iter().filter(|&&known| known).count();
        let proving = Proving {
            checksums: &checksums,
            proven: Mutex::new(Vec::new()),
            progress: (self.progress)("check", Some(count as u64 * subject.block_bytes)),
        };
        // A file that has become shorter has nothing behind its end.
        let end = destination.place().facts()?.size.map_or(subject.size, |size| size.min(subject.size));
        let settings = Settings { rate: None, skips_holes: false, ..self.settings.clone() };
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
        let lost = count - proven.len();
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
        match has_journal {
            true if self.is_alone => failure.with_advice("To continue, run the same command with --resume."),
            true => failure,
            false => {
                destination.abandon();
                failure
            }
        }
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
            progress: (self.progress)("verify", Some(end)),
        };
        let settings = Settings { rate: None, ..self.settings.clone() };
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
}

impl Watcher for Copying<'_> {
    fn read(&self, block: Block, data: &[u8]) -> Result<Verdict, Failure> {
        if self.journal.is_some() || self.checksums.is_kept {
            self.checksums.set(block.number, data_crc(data));
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

/// The watcher that checks the destination of an interrupted copy against its journal.
struct Proving<'a> {
    checksums: &'a Checksums,
    proven: Mutex<Vec<(Block, u32)>>,
    progress: Progress,
}

impl Watcher for Proving<'_> {
    fn read(&self, block: Block, data: &[u8]) -> Result<Verdict, Failure> {
        let crc = data_crc(data);
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
            Some(crc) => crc == data_crc(data),
            // A hole of the source.
            None => is_zero(data),
        };
        if is_right { Ok(Verdict::Skip) } else { Err(self.wrong(block.offset)) }
    }

    fn hole(&self, range: Range<u64>) -> Result<(), Failure> {
        let zeros = vec![0; self.checksums.block_bytes as usize];
        let crc = data_crc(&zeros);
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
        if rest > 0 && last.is_some_and(|it| it != data_crc(&zeros[..rest as usize])) {
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
    use crate::global::Global;
    use crate::place::{LocalFile, LocalPartial};
    use crate::progress::Style;

    #[test]
    fn a_copy_that_does_not_get_its_name_leaves_its_partial_file_only_if_it_can_be_resumed() {
        let directory = tempfile::tempdir().unwrap();
        // A file does not replace a directory.
        let (source, taken) = (directory.path().join("source"), directory.path().join("taken"));
        std::fs::write(&source, [7; 5000]).unwrap();
        std::fs::create_dir(&taken).unwrap();
        let from = LocalFile::open_in_place(&source, 0o600).unwrap();
        let global = Global::default();
        for has_journal in [false, true] {
            let partial = LocalPartial::open(&taken, "1", 0o600).unwrap();
            let journal = directory.path().join("journal");
            let copy = FileCopy {
                from: &from,
                facts: &from.facts().unwrap(),
                source: &Location::Local(source.clone()),
                to: &Location::Local(taken.clone()),
                settings: Settings::default(),
                has_journal,
                resumes: false,
                is_alone: true,
                verifies: false,
                is_sparse: true,
                preserves: false,
                is_durable: false,
                sessions: &Sessions::new(&global),
                progress: &|what, size| Progress::new(Style::Never, what, size),
                interrupt: &Interrupt::default(),
            };
            let failure = copy.run(&mut Destination::partial(Box::new(partial), None, Some(journal)));
            let failure = failure.unwrap_err().to_string();
            assert_eq!(failure.contains("--resume"), has_journal, "{failure}");
            assert_eq!(directory.path().join("taken.partial-1").exists(), has_journal, "{failure}");
        }
    }

    #[test]
    fn a_block_that_differs_from_what_was_copied_is_found_when_it_is_verified() {
        let checksums = Checksums::new(Some(25), 10, true);
        checksums.set(0, data_crc(&[7; 10]));
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
        checksums.set(0, data_crc(&[0; 10]));
        checksums.set(2, data_crc(&[0; 5]));
        let progress = || Progress::new(Style::Never, "verify", None);
        let verifying = |checksums| Verifying { checksums, name: "f".into(), progress: progress() };
        verifying(&checksums).hole(0..25).unwrap();
        checksums.set(2, data_crc(&[1; 5]));
        let wrong = verifying(&checksums).hole(0..25).unwrap_err();
        assert!(wrong.kind() == Kind::Unverified && wrong.to_string().contains("at 20"), "{wrong}");
        verifying(&checksums).hole(0..20).unwrap();
    }
}
