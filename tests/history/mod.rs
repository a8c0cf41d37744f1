//! The history of the cells of a run, and whether it is one that a disk can have.
//!
//! Each client logs a line for each cell of each operation (see [`LogLine`]). Each cell must behave as a
//! linearizable register, the content after a crash must be at least what was synced before it, and no cell
//! may be torn.
//!
//! All values that are written differ. So it is known which write a read has its value from, and
//! linearizability can be decided in linear time after sorting (Gibbons and Korach, "Testing Shared
//! Memories", 1997): the write of a value and the reads of it form a cluster, which must lie in one piece in
//! any order of operations. If the first of them to end has ended (`first_end`) before the last one to begin
//! has begun (`last_begin`) of another cluster, the whole cluster is before the other. A history is
//! linearizable if no two clusters are each before the other, and no read has ended before its write has
//! begun. Their paper says the same by zones between the two times: no two forward zones overlap, and no
//! backward zone lies within a forward one.

// Each test program that has this module uses a part of it.
#![allow(dead_code)]

pub mod cells;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;

use cells::{CellPlace, CellValue, INITIAL};

/// The end of what may still happen.
pub const FOREVER: u64 = u64::MAX;

/// A note that a client's session was given up, followed by the reason.
pub const SESSION_GIVEN_UP: &str = "session given up:";
/// A note that an fsync said that writes may be lost.
pub const WRITES_LOST: &str = "writes may be lost";

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Ok,
    /// It was not done, and will not be.
    Failed,
    /// It was done, or not, or will be.
    Unknown,
}

/// A line of a client's log. Times are in nanoseconds, of one clock for all logs, and greater than 0.
///
/// ```text
/// begin FILE CELL COUNT VALUE BEGIN        a write of cells begins
/// write FILE CELL VALUE BEGIN END OUTCOME  of each of its cells: its end (- if unknown)
/// read FILE CELL VALUE BEGIN END           of each cell of a read that succeeded
/// broken FILE CELL HEX BEGIN END           of a cell that was read and is torn, or belongs elsewhere
/// fsync FILE BEGIN END OUTCOME
/// fence TIME                               nothing of this client that is unknown happens later
/// note TEXT                                for people, and for what a test wants to count
/// ```
///
/// A write that has no line but its first is one of unknown outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogLine {
    /// A write begins.
    Begin {
        /// Its first cell.
        place: CellPlace,
        /// How many cells.
        count: u32,
        /// What it writes into each.
        value: CellValue,
        /// When it was submitted.
        begin: u64,
    },
    /// A cell of a write has ended.
    Write(CellWrite),
    /// A cell was read.
    Read(CellRead),
    /// A cell was read that is none.
    Broken {
        /// Where.
        place: CellPlace,
        /// Its bytes.
        hex: String,
        /// When the read was submitted.
        begin: u64,
        /// When it had ended.
        end: u64,
    },
    /// An fsync has ended.
    Fsync(FileSync),
    /// The client's operations of unknown outcome are over.
    Fence(u64),
    /// Anything.
    Note(String),
}

/// A cell of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CellWrite {
    /// Where.
    pub place: CellPlace,
    /// What.
    pub value: CellValue,
    /// When it was submitted.
    pub begin: u64,
    /// When it had ended, or [`FOREVER`].
    pub end: u64,
    /// How.
    pub outcome: Outcome,
}

/// A cell of a read that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CellRead {
    /// Where.
    pub place: CellPlace,
    /// What was there.
    pub value: CellValue,
    /// When it was submitted.
    pub begin: u64,
    /// When it had ended.
    pub end: u64,
}

/// An fsync of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSync {
    /// Which file.
    pub file: u32,
    /// When it was submitted.
    pub begin: u64,
    /// When it had ended.
    pub end: u64,
    /// How. After one that failed, what was written before it may be gone.
    pub outcome: Outcome,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        })
    }
}

impl fmt::Display for LogLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Begin { place: CellPlace { file, cell }, count, value, begin } => {
                write!(f, "begin {file} {cell} {count} {value} {begin}")
            }
            Self::Write(CellWrite { place: CellPlace { file, cell }, value, begin, end, outcome }) => {
                write!(f, "write {file} {cell} {value} {begin} ")?;
                if *end == FOREVER { write!(f, "- {outcome}") } else { write!(f, "{end} {outcome}") }
            }
            Self::Read(CellRead { place: CellPlace { file, cell }, value, begin, end }) => {
                write!(f, "read {file} {cell} {value} {begin} {end}")
            }
            Self::Broken { place: CellPlace { file, cell }, hex, begin, end } => {
                write!(f, "broken {file} {cell} {hex} {begin} {end}")
            }
            Self::Fsync(FileSync { file, begin, end, outcome }) => {
                write!(f, "fsync {file} {begin} {end} {outcome}")
            }
            Self::Fence(time) => write!(f, "fence {time}"),
            Self::Note(text) => write!(f, "note {text}"),
        }
    }
}

fn time(word: &str) -> Option<u64> {
    word.parse().ok().filter(|&time| time > 0)
}

fn outcome(word: &str) -> Option<Outcome> {
    match word {
        "ok" => Some(Outcome::Ok),
        "failed" => Some(Outcome::Failed),
        "unknown" => Some(Outcome::Unknown),
        _ => None,
    }
}

impl LogLine {
    /// What a line of a log says, if it says something.
    pub fn parse(line: &str) -> Option<Self> {
        if let Some(text) = line.strip_prefix("note ") {
            return Some(Self::Note(text.into()));
        }
        let words: Vec<&str> = line.split(' ').collect();
        let place =
            |file: &str, cell: &str| Some(CellPlace { file: file.parse().ok()?, cell: cell.parse().ok()? });
        let line = match words[..] {
            ["begin", file, cell, count, value, begin] => Self::Begin {
                place: place(file, cell)?,
                count: count.parse().ok()?,
                value: value.parse().ok()?,
                begin: time(begin)?,
            },
            ["write", file, cell, value, begin, end, how] => Self::Write(CellWrite {
                place: place(file, cell)?,
                value: value.parse().ok()?,
                begin: time(begin)?,
                end: if end == "-" { FOREVER } else { time(end)? },
                outcome: outcome(how)?,
            }),
            ["read", file, cell, value, begin, end] => Self::Read(CellRead {
                place: place(file, cell)?,
                value: value.parse().ok()?,
                begin: time(begin)?,
                end: time(end)?,
            }),
            ["broken", file, cell, hex, begin, end] => Self::Broken {
                place: place(file, cell)?,
                hex: hex.into(),
                begin: time(begin)?,
                end: time(end)?,
            },
            ["fsync", file, begin, end, how] => Self::Fsync(FileSync {
                file: file.parse().ok()?,
                begin: time(begin)?,
                end: time(end)?,
                outcome: outcome(how)?,
            }),
            ["fence", at] => Self::Fence(time(at)?),
            _ => return None,
        };
        Some(line)
    }
}

/// What the files of a machine had in them that has crashed.
#[derive(Clone, Debug, Default)]
pub struct CrashImage {
    /// When the crash was about to come: what had ended before must be there if it was synced.
    pub begin: u64,
    /// When it was over: what began later cannot be there.
    pub end: u64,
    /// What the cells have; none for a broken one. Those that are not named have the initial value.
    pub cells: HashMap<CellPlace, Option<CellValue>>,
}

/// Something that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A cell is torn, or belongs elsewhere: what was read.
    Broken(String),
    /// A value was read that nobody wrote.
    Unwritten(CellValue),
    /// A value was read whose write had failed, and so was not done.
    NotDone(CellValue),
    /// Two writes of the same value.
    Twice(CellValue),
    /// A value was read before its write began.
    Early(CellValue),
    /// Each of these values was there before the other. The smaller is named first.
    Disorder(CellValue, CellValue),
    /// After a crash there is an old value, although a newer one was synced.
    Lost {
        /// What is there.
        found: CellValue,
        /// What was synced.
        synced: CellValue,
    },
}

/// Something that cannot be, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Where.
    pub place: CellPlace,
    /// What.
    pub fault: Fault,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.place)?;
        match &self.fault {
            Fault::Broken(hex) => write!(f, "it is torn, or belongs elsewhere: {hex}"),
            Fault::Unwritten(value) => write!(f, "{value} was read, and nobody wrote it"),
            Fault::NotDone(value) => write!(f, "{value} was read, and its write had failed"),
            Fault::Twice(value) => write!(f, "{value} was written twice"),
            Fault::Early(value) => write!(f, "{value} was read before its write began"),
            Fault::Disorder(a, b) => write!(f, "{a} was there before {b}, and {b} before {a}"),
            Fault::Lost { found, synced } => {
                write!(f, "after a crash {found} was there, although {synced} had been synced")
            }
        }
    }
}

/// The write of a value to a cell, and the reads of it.
#[derive(Clone, Copy, Debug)]
struct Cluster {
    value: CellValue,
    /// When the first of them had ended.
    first_end: u64,
    /// When the last of them began.
    last_begin: u64,
    /// When the write began.
    written: u64,
    is_failed: bool,
    /// Nobody can have seen it, so it need not have happened.
    is_moot: bool,
}

impl Cluster {
    const INITIAL: Self =
        Self { value: INITIAL, first_end: 0, last_begin: 0, written: 0, is_failed: false, is_moot: false };

    fn of(write: &CellWrite) -> Self {
        Self {
            value: write.value,
            first_end: write.end,
            last_begin: write.begin,
            written: write.begin,
            is_failed: write.outcome == Outcome::Failed,
            is_moot: write.outcome != Outcome::Ok,
        }
    }

    fn add(&mut self, read: &CellRead) {
        self.first_end = self.first_end.min(read.end);
        self.last_begin = self.last_begin.max(read.begin);
        self.is_moot = false;
    }

    /// Whether it was there before the other, in any order that keeps to the times.
    fn is_before(&self, other: &Self) -> bool {
        self.first_end < other.last_begin
    }
}

fn disorder(a: &Cluster, b: &Cluster) -> Fault {
    Fault::Disorder(a.value.min(b.value), a.value.max(b.value))
}

/// What happened to one cell.
#[derive(Debug, Default)]
struct CellHistory {
    writes: Vec<CellWrite>,
    reads: Vec<CellRead>,
    broken: Vec<String>,
}

impl CellHistory {
    /// By value; also what is wrong with single values.
    fn clusters(&self) -> (HashMap<CellValue, Cluster>, Vec<Fault>) {
        let mut faults: Vec<_> = self.broken.iter().cloned().map(Fault::Broken).collect();
        let mut clusters = HashMap::from([(INITIAL, Cluster::INITIAL)]);
        for write in &self.writes {
            if clusters.insert(write.value, Cluster::of(write)).is_some() {
                faults.push(Fault::Twice(write.value));
            }
        }
        for read in &self.reads {
            match clusters.get_mut(&read.value) {
                None => faults.push(Fault::Unwritten(read.value)),
                Some(cluster) if cluster.is_failed => faults.push(Fault::NotDone(read.value)),
                Some(cluster) if read.end < cluster.written => faults.push(Fault::Early(read.value)),
                Some(cluster) => cluster.add(read),
            }
        }
        (clusters, faults)
    }

    fn check(&self) -> Vec<Fault> {
        let (clusters, mut faults) = self.clusters();
        let (mut forward, backward): (Vec<_>, Vec<_>) = clusters
            .into_values()
            .filter(|cluster| !cluster.is_moot)
            .partition(|cluster| cluster.first_end < cluster.last_begin);
        forward.sort_by_key(|cluster| cluster.first_end);
        for pair in forward.windows(2) {
            // The first is before the second, by the order of their first ends.
            if pair[1].is_before(&pair[0]) {
                faults.push(disorder(&pair[0], &pair[1]));
            }
        }
        // Where forward zones overlap there is a fault already; where they do not, their ends are in order,
        // too.
        for inner in &backward {
            let later = forward.partition_point(|cluster| cluster.is_before(inner));
            if let Some(outer) = later.checked_sub(1).map(|at| forward[at])
                && inner.is_before(&outer)
            {
                faults.push(disorder(&outer, inner));
            }
        }
        faults
    }
}

/// What happened to the cells of a run.
#[derive(Debug, Default)]
pub struct History {
    cells: BTreeMap<CellPlace, CellHistory>,
    syncs: HashMap<u32, Vec<FileSync>>,
    notes: Vec<String>,
}

/// What a history has, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HistoryCounts {
    /// Cells of reads.
    pub reads: u64,
    /// Cells of writes that were done.
    pub writes: u64,
    /// Cells of writes that failed.
    pub failed: u64,
    /// Cells of writes of unknown outcome.
    pub unknown: u64,
    /// Fsyncs that succeeded.
    pub syncs: u64,
    /// Fsyncs that did not.
    pub failed_syncs: u64,
}

impl History {
    /// That of these logs: one for each client, whole.
    pub fn of_files(logs: &[impl AsRef<Path>]) -> Result<Self, String> {
        let mut history = Self::default();
        for path in logs {
            let path = path.as_ref();
            let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
            history.add_log(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        }
        Ok(history)
    }

    /// Adds what a client logged. It may have been killed while it wrote the last line.
    pub fn add_log(&mut self, text: &str) -> Result<(), String> {
        // Cells of writes that have begun and not ended, and of those that ended with an unknown outcome.
        let mut begun = HashMap::<(CellPlace, CellValue), CellWrite>::new();
        let mut unknown = Vec::<CellWrite>::new();
        for (number, line) in text.split_inclusive('\n').enumerate() {
            let Some(line) = line.strip_suffix('\n') else { break };
            let wrong = |what: &str| format!("line {}: {what}: {line:?}", number + 1);
            match LogLine::parse(line).ok_or_else(|| wrong("it cannot be read"))? {
                LogLine::Begin { place, count, value, begin } => {
                    for cell in place.cell..place.cell + count {
                        let place = CellPlace { cell, ..place };
                        let write =
                            CellWrite { place, value, begin, end: FOREVER, outcome: Outcome::Unknown };
                        if begun.insert((place, value), write).is_some() {
                            return Err(wrong("it began before"));
                        }
                    }
                }
                LogLine::Write(write) => {
                    let first = begun.remove(&(write.place, write.value));
                    if first.is_none_or(|first| first.begin != write.begin) {
                        return Err(wrong("no such write has begun"));
                    }
                    if write.end < write.begin || (write.end == FOREVER && write.outcome != Outcome::Unknown)
                    {
                        return Err(wrong("it ends at no time that it can"));
                    }
                    if write.end == FOREVER {
                        unknown.push(write);
                    } else {
                        self.cell(write.place).writes.push(write);
                    }
                }
                LogLine::Read(read) => {
                    if read.end < read.begin {
                        return Err(wrong("it ends before it begins"));
                    }
                    self.cell(read.place).reads.push(read);
                }
                LogLine::Broken { place, .. } => self.cell(place).broken.push(line.to_owned()),
                LogLine::Fsync(sync) => self.syncs.entry(sync.file).or_default().push(sync),
                LogLine::Note(text) => self.notes.push(text),
                LogLine::Fence(time) => {
                    for write in unknown.drain(..).chain(begun.drain().map(|(_, write)| write)) {
                        self.cell(write.place).writes.push(CellWrite { end: time, ..write });
                    }
                }
            }
        }
        for write in unknown.into_iter().chain(begun.into_values()) {
            self.cell(write.place).writes.push(write);
        }
        Ok(())
    }

    fn cell(&mut self, place: CellPlace) -> &mut CellHistory {
        self.cells.entry(place).or_default()
    }

    /// In numbers.
    pub fn counts(&self) -> HistoryCounts {
        let mut counts = HistoryCounts::default();
        for cell in self.cells.values() {
            counts.reads += cell.reads.len() as u64;
            for write in &cell.writes {
                match write.outcome {
                    Outcome::Ok => counts.writes += 1,
                    Outcome::Failed => counts.failed += 1,
                    Outcome::Unknown => counts.unknown += 1,
                }
            }
        }
        for sync in self.syncs.values().flatten() {
            *(if sync.outcome == Outcome::Ok { &mut counts.syncs } else { &mut counts.failed_syncs }) += 1;
        }
        counts
    }

    /// The cells of writes. Those of unknown outcome that have an end have happened by then or not at all.
    pub fn writes(&self) -> impl Iterator<Item = &CellWrite> {
        self.cells.values().flat_map(|cell| &cell.writes)
    }

    /// What the clients noted.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What cannot be of cells that are linearizable registers.
    pub fn check(&self) -> Vec<Violation> {
        let faults = self.cells.iter().map(|(&place, cell)| (place, cell.check()));
        faults
            .flat_map(|(place, faults)| faults.into_iter().map(move |fault| Violation { place, fault }))
            .collect()
    }

    /// What cannot be after crashes of the machine, each by itself. Also which image it is in, by its index.
    pub fn check_images(&self, images: &[CrashImage]) -> Vec<(usize, Violation)> {
        let mut violations = Vec::new();
        for (n, image) in images.iter().enumerate() {
            for (&place, found) in &image.cells {
                let fault = match found {
                    None => Fault::Broken("after a crash".into()),
                    Some(value) if *value != INITIAL && !self.cells.contains_key(&place) => {
                        Fault::Unwritten(*value)
                    }
                    Some(_) => continue,
                };
                violations.push((n, Violation { place, fault }));
            }
        }
        for (&place, cell) in &self.cells {
            let (clusters, _) = cell.clusters();
            let syncs = self.syncs.get(&place.file).map_or(&[][..], |syncs| syncs);
            for (n, image) in images.iter().enumerate() {
                if let Some(found) = image.cells.get(&place).copied().unwrap_or(Some(INITIAL))
                    && let Some(fault) = crash_fault(&clusters, syncs, found, image)
                {
                    violations.push((n, Violation { place, fault }));
                }
            }
        }
        violations
    }

    /// The operations of a cell, in the order in which they began, for people.
    pub fn of_cell(&self, place: CellPlace) -> String {
        let Some(cell) = self.cells.get(&place) else { return String::new() };
        let writes = cell.writes.iter().map(|write| (write.begin, LogLine::Write(*write)));
        let reads = cell.reads.iter().map(|read| (read.begin, LogLine::Read(*read)));
        let syncs = self.syncs.get(&place.file).into_iter().flatten();
        let syncs = syncs.map(|sync| (sync.begin, LogLine::Fsync(*sync)));
        let mut all: Vec<_> = writes.chain(reads).chain(syncs).collect();
        all.sort_by_key(|&(begin, _)| begin);
        all.iter().map(|(_, line)| format!("{line}\n")).collect()
    }
}

/// What had ended before this time, on a file with these fsyncs, was durable by the time `by`. 0: nothing.
fn synced_until(syncs: &[FileSync], by: u64) -> u64 {
    let good = syncs.iter().filter(|sync| sync.outcome == Outcome::Ok && sync.end < by);
    good.map(|sync| sync.begin).max().unwrap_or(0)
}

/// What is wrong with `found` in a cell after a crash.
fn crash_fault(
    clusters: &HashMap<CellValue, Cluster>,
    syncs: &[FileSync],
    found: CellValue,
    image: &CrashImage,
) -> Option<Fault> {
    let Some(old) = clusters.get(&found) else { return Some(Fault::Unwritten(found)) };
    if old.is_failed {
        return Some(Fault::NotDone(found));
    }
    if image.end < old.written {
        return Some(Fault::Early(found));
    }
    // A failed fsync may have dropped what was not synced before, for good: later ones know nothing of it.
    let may_be_dropped = |new: &Cluster| {
        let mut failed = syncs.iter().filter(|sync| sync.outcome == Outcome::Failed);
        failed.any(|failed| new.written < failed.end && new.first_end >= synced_until(syncs, failed.begin))
    };
    let synced = synced_until(syncs, image.begin);
    let newer = clusters.values().find(|new| {
        new.value != found
            && !new.is_moot
            && old.is_before(new)
            && new.first_end < synced
            && !may_be_dropped(new)
    })?;
    Some(Fault::Lost { found, synced: newer.value })
}
