//! A disk with a cache that a crash empties: a volume whose operations end when, and in the order in which,
//! the run says so.
//!
//! It knows what it was told to do, and so finds at once what no client could prove: a write that is done
//! after its client was told how it has ended, or twice.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, Weak};

use raio_transport::sync::lock;
use raio_transport::transport::SlotRange;

use crate::client::Client as Origin;
use crate::engine::completions::Completer;
use crate::engine::{Closing, Engine, Operation, Outcome, Pending};
use crate::file_identity::FileIdentity;
use crate::history::CrashImage;
use crate::history::cells::{CELL_BYTES, CellPlace, CellValue, INITIAL, decode_cell, encode_cell};
use crate::random::Random;
use crate::syscalls::FileInfo;
use crate::verifier::Verifier;
use crate::volume::{Context, Properties, SizeLimit, Volume};

/// How many files there are, each an export of its own.
pub const FILES: usize = 2;
/// How many cells each has.
pub const CELLS: u32 = 12;
/// The length of a file.
pub const FILE_BYTES: u64 = CELLS as u64 * CELL_BYTES as u64;

/// See the module documentation.
pub struct Disk {
    random: Random,
    cells: HashMap<CellPlace, Cell>,
    in_flight: Vec<InFlight>,
    next_id: u64,
    /// Of each file, in this boot.
    verifiers: [Arc<Verifier>; FILES],
    /// Their ends are known: nothing of them may be done any more.
    over: HashSet<CellValue>,
    /// How often each was done.
    done: HashMap<(CellPlace, CellValue), u32>,
    /// Clients repeat what may have been done.
    pub may_repeat: bool,
    /// Fsyncs may fail, and then drop what is not durable.
    pub may_fail: bool,
    /// A mistake that a run must notice: it says that it has synced, and has not.
    pub forgets_syncs: bool,
    /// Fsyncs that have failed, and crashes.
    pub losses: u64,
    /// Files whose fsync has failed in this step: perhaps no client hears of it.
    pub failed: Vec<u32>,
}

struct Cell {
    /// What was written to it, in order, since it was last known what is durable.
    versions: Vec<CellValue>,
    /// The newest that no crash takes.
    durable: usize,
    /// Those up to this one do not become durable any more: an fsync has failed.
    dropped: Option<usize>,
}

struct InFlight {
    id: u64,
    /// None if its server was killed.
    completer: Option<Completer>,
    origin: Weak<Origin>,
    file: u32,
    operation: Kind,
}

enum Kind {
    Read {
        target: SlotRange,
        cell: u32,
    },
    /// Of the cells that it writes (it may be fewer than it should) those that are left, last first.
    Write {
        source: Option<SlotRange>,
        first: u32,
        values: Vec<CellValue>,
        left: Vec<u32>,
    },
    /// What it makes durable: of each cell the version when it began.
    Fsync(Vec<usize>),
    Stat,
    Other,
}

/// What tells a file from others.
pub fn identity(file: usize) -> FileIdentity {
    [1 + file as u8; 16]
}

fn place(file: u32, cell: u32) -> CellPlace {
    CellPlace { file, cell }
}

impl Cell {
    fn newest(&self) -> CellValue {
        *self.versions.last().expect("the first one stays")
    }
}

impl Disk {
    /// Zeros.
    pub fn new(seed: u64) -> Self {
        let cell = || Cell { versions: vec![INITIAL], durable: 0, dropped: None };
        let places = (0..FILES as u32).flat_map(|file| (0..CELLS).map(move |cell| place(file, cell)));
        Self {
            random: Random::with_seed(seed),
            cells: places.map(|place| (place, cell())).collect(),
            in_flight: Vec::new(),
            next_id: 0,
            verifiers: std::array::from_fn(|_| Arc::default()),
            over: HashSet::new(),
            done: HashMap::new(),
            may_repeat: false,
            may_fail: false,
            forgets_syncs: false,
            losses: 0,
            failed: Vec::new(),
        }
    }

    /// That of a file.
    pub fn verifier(&self, file: usize) -> Arc<Verifier> {
        Arc::clone(&self.verifiers[file])
    }

    /// Nothing of this write may be done from now on.
    pub fn is_over(&mut self, value: CellValue) {
        self.over.insert(value);
    }

    /// Whether a crash would leave this, or what was written later.
    pub fn is_durable(&self, place: CellPlace, value: CellValue) -> bool {
        let cell = &self.cells[&place];
        let at = cell.versions.iter().position(|&version| version == value);
        at.is_some_and(|at| at <= cell.durable)
    }

    /// What is in a cell.
    pub fn value(&self, place: CellPlace) -> CellValue {
        self.cells[&place].newest()
    }

    /// One step of one operation. What happened, in words; None if there is nothing to do.
    pub fn step(&mut self) -> Option<String> {
        if self.in_flight.is_empty() {
            return None;
        }
        let at = self.random.index(self.in_flight.len());
        let op = &mut self.in_flight[at];
        let (id, file) = (op.id, op.file);
        if let Kind::Write { values, left, first, .. } = &mut op.operation
            && let Some(cell) = left.pop()
        {
            let value = values[(cell - *first) as usize];
            self.write(place(file, cell), value);
            return Some(format!("disk: {id} has written {value} to cell {cell} of file {file}"));
        }
        if op.completer.is_none() {
            self.in_flight.swap_remove(at);
            return Some(format!("disk: {id} is over, for nobody"));
        }
        let InFlight { completer, operation, .. } = self.in_flight.swap_remove(at);
        let (result, outcome) = self.end(file, operation);
        let text = format!("disk: {id} has ended with {result:?}");
        completer.expect("it has one").complete(result, outcome);
        Some(text)
    }

    fn write(&mut self, place: CellPlace, value: CellValue) {
        assert!(!self.over.contains(&value), "{value} is written to {place}, and its client knows its end");
        let done = self.done.entry((place, value)).or_default();
        *done += 1;
        assert!(*done == 1 || self.may_repeat, "{value} is written to {place} for the second time");
        self.cells.get_mut(&place).expect("a cell").versions.push(value);
    }

    fn end(&mut self, file: u32, operation: Kind) -> (Result<u32, i32>, Outcome) {
        match operation {
            Kind::Read { mut target, cell } => {
                let cells = (target.len / CELL_BYTES) as u64;
                // Now and then fewer than it should.
                let cells = if self.random.below(8) == 0 { 1 + self.random.below(cells) } else { cells };
                self.read(file, cell, &mut target.bytes_mut()[..cells as usize * CELL_BYTES]);
                (Ok(cells as u32 * CELL_BYTES as u32), Outcome::Slot(target))
            }
            Kind::Write { source, values, .. } => {
                let source = source.expect("its server lives");
                (Ok((values.len() * CELL_BYTES) as u32), Outcome::Slot(source))
            }
            Kind::Fsync(versions) => {
                if self.may_fail && self.random.below(6) == 0 {
                    self.losses += 1;
                    self.failed.push(file);
                    self.verifiers[file as usize].writes_were_lost();
                    for cell in 0..CELLS {
                        let cell = self.cells.get_mut(&place(file, cell)).expect("a cell");
                        cell.dropped = Some(cell.versions.len() - 1);
                    }
                    return (Err(libc::EIO), Outcome::None);
                }
                for (number, version) in versions.into_iter().enumerate() {
                    let cell = self.cells.get_mut(&place(file, number as u32)).expect("a cell");
                    if !self.forgets_syncs && cell.dropped.is_none_or(|dropped| version > dropped) {
                        cell.durable = cell.durable.max(version);
                    }
                }
                (Ok(0), Outcome::None)
            }
            Kind::Stat => (Ok(0), Outcome::Stat(Box::new(FileInfo::synthetic(FILE_BYTES)))),
            Kind::Other => (Err(libc::EOPNOTSUPP), Outcome::None),
        }
    }

    fn read(&self, file: u32, first: u32, bytes: &mut [u8]) {
        for (bytes, cell) in bytes.as_chunks_mut::<CELL_BYTES>().0.iter_mut().zip(first..) {
            let place = place(file, cell);
            *bytes = match self.value(place) {
                INITIAL => [0; CELL_BYTES],
                value => encode_cell(place, value),
            };
        }
    }

    /// The server was killed. What it has begun to write may still be written, until [`Disk::settle`].
    pub fn server_was_killed(&mut self) {
        self.in_flight.retain_mut(|op| {
            op.completer = None;
            match &mut op.operation {
                Kind::Write { source, .. } => {
                    *source = None;
                    true
                }
                _ => false,
            }
        });
    }

    /// What a killed server has begun has happened as far as it ever will.
    pub fn settle(&mut self) {
        for op in std::mem::take(&mut self.in_flight) {
            if let Kind::Write { first, values, left, .. } = op.operation {
                for cell in left {
                    if self.random.below(2) == 0 {
                        self.write(place(op.file, cell), values[(cell - first) as usize]);
                    }
                }
            }
        }
    }

    /// The machine has crashed: of each cell something is left that is not older than what is durable.
    pub fn crash(&mut self, mut tick: impl FnMut() -> u64) -> CrashImage {
        let begin = tick();
        self.settle();
        self.losses += 1;
        self.verifiers = std::array::from_fn(|_| Arc::default());
        let mut places: Vec<_> = self.cells.keys().copied().collect();
        places.sort_unstable();
        for &place in &places {
            let cell = self.cells.get_mut(&place).expect("a cell");
            let left = cell.versions.len() - cell.durable;
            let kept = cell.durable + self.random.index(left);
            cell.versions.truncate(kept + 1);
            (cell.durable, cell.dropped) = (kept, None);
        }
        let cells = places.into_iter().map(|place| (place, Some(self.value(place)))).collect();
        CrashImage { begin, end: tick(), cells }
    }
}

/// A file of the disk.
pub struct SimulatedFile {
    pub disk: Arc<Mutex<Disk>>,
    pub file: u32,
}

impl std::fmt::Debug for SimulatedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimulatedFile").field("file", &self.file).finish_non_exhaustive()
    }
}

fn cell_at(offset: u64, len: usize) -> u32 {
    assert!(offset.is_multiple_of(CELL_BYTES as u64) && len.is_multiple_of(CELL_BYTES) && len > 0);
    assert!(offset + len as u64 <= FILE_BYTES);
    (offset / CELL_BYTES as u64) as u32
}

impl Volume for SimulatedFile {
    fn submit(
        &self,
        context: &mut Context<'_>,
        key: u64,
        client: &Weak<Origin>,
        operation: Operation,
    ) -> Option<Pending> {
        let mut disk = lock(&self.disk);
        let operation = match operation {
            Operation::Read { target, offset } => {
                let cell = cell_at(offset, target.len);
                Kind::Read { target, cell }
            }
            Operation::Write { source, offset } => {
                let first = cell_at(offset, source.len);
                let decoded = source.bytes().as_chunks::<CELL_BYTES>().0.iter().zip(first..);
                let mut values: Vec<_> = decoded
                    .map(|(bytes, cell)| decode_cell(place(self.file, cell), bytes).expect("a cell's bytes"))
                    .collect();
                let end = first + values.len() as u32;
                for other in &disk.in_flight {
                    let Kind::Write { first: begin, values: theirs, .. } = &other.operation else { continue };
                    let overlaps = *begin < end && first < *begin + theirs.len() as u32;
                    // The rest of one that was begun before goes on.
                    let begins = source.start == 0;
                    assert!(
                        !overlaps || !begins || other.file != self.file || other.origin.strong_count() > 0,
                        "a write begins beside what a client that has gone has left behind ({})",
                        other.id
                    );
                }
                // Now and then fewer than it should.
                if disk.random.below(8) == 0 {
                    let done = 1 + disk.random.index(values.len());
                    values.truncate(done);
                }
                let mut left: Vec<_> = (first..first + values.len() as u32).collect();
                for at in (1..left.len()).rev() {
                    let other = disk.random.index(at + 1);
                    left.swap(at, other);
                }
                Kind::Write { source: Some(source), first, values, left }
            }
            Operation::Fsync { .. } => {
                let versions = (0..CELLS).map(|cell| disk.cells[&place(self.file, cell)].versions.len() - 1);
                Kind::Fsync(versions.collect())
            }
            Operation::Stat => Kind::Stat,
            _ => Kind::Other,
        };
        let id = disk.next_id;
        disk.next_id += 1;
        let completer = Some(context.engine.completions().completer(key));
        disk.in_flight.push(InFlight { id, completer, origin: client.clone(), file: self.file, operation });
        Some(Pending::Volume(id))
    }

    fn cancel(&self, _context: &mut Context<'_>, _key: u64, pending: Pending) {
        let Pending::Volume(id) = pending else { unreachable!("{pending:?} is not of this volume") };
        let mut disk = lock(&self.disk);
        let may = disk.random.below(2) == 0;
        let Some(at) = disk.in_flight.iter().position(|op| op.id == id) else { return };
        let is_untouched = match &disk.in_flight[at].operation {
            Kind::Write { values, left, .. } => left.len() == values.len(),
            _ => true,
        };
        if !may || !is_untouched {
            return;
        }
        let InFlight { completer, operation, .. } = disk.in_flight.swap_remove(at);
        let outcome = match operation {
            Kind::Read { target, .. } => Outcome::Slot(target),
            Kind::Write { source: Some(source), .. } => Outcome::Slot(source),
            _ => Outcome::None,
        };
        completer.expect("its server lives").complete(Err(libc::ECANCELED), outcome);
    }

    fn close(self: Arc<Self>, _engine: &mut dyn Engine, closing: Closing) {
        closing.complete(Ok(()));
    }

    fn try_read_cached(&self, _engine: &mut dyn Engine, bytes: &mut [u8], offset: u64) -> Option<()> {
        let mut disk = lock(&self.disk);
        if disk.random.below(2) == 0 {
            return None;
        }
        let first = cell_at(offset, bytes.len());
        disk.read(self.file, first, bytes);
        Some(())
    }

    fn properties(&self) -> Properties {
        let size_limit = Some(SizeLimit { bytes: FILE_BYTES, errno: libc::ENOSPC });
        Properties { size_limit, ..Properties::default() }
    }
}
