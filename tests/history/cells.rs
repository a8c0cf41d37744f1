//! Cells: the unit of what the chaos clients write. Each says who wrote it, when, and where it belongs, so
//! that whatever is read can be judged.

use std::fmt;
use std::str::FromStr;

use raio_transport::message::data_crc;

/// The length of a cell.
pub const CELL_BYTES: usize = 64;
/// How many files the cells of a run are in: `0`, `1` and so on of a directory.
pub const FILES: u32 = 2;
/// How many cells each of them has, most of them in a hole.
pub const FILE_CELLS: u32 = 1 << 20;
/// Where the checksum begins, which covers what is before it.
const CRC_AT: usize = CELL_BYTES - 4;
/// Where the filling begins.
const FILLING_AT: usize = 16;

/// What a write puts into each of its cells. No two writes of a run have the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CellValue {
    /// The process that wrote it; from 1 on.
    pub client: u32,
    /// Which of its writes.
    pub sequence: u32,
}

/// What is in a cell that nobody has written to.
pub const INITIAL: CellValue = CellValue { client: 0, sequence: 0 };

impl fmt::Display for CellValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.client, self.sequence)
    }
}

impl FromStr for CellValue {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('.').and_then(|(client, sequence)| {
            Some(Self { client: client.parse().ok()?, sequence: sequence.parse().ok()? })
        });
        parsed.ok_or_else(|| format!("{text:?} is no value of a cell"))
    }
}

/// Where a cell is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CellPlace {
    /// Which of the run's files.
    pub file: u32,
    /// Which cell of the file.
    pub cell: u32,
}

impl CellPlace {
    /// The byte of the file at which it begins.
    pub fn offset(self) -> u64 {
        u64::from(self.cell) * CELL_BYTES as u64
    }
}

impl fmt::Display for CellPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cell {} of file {}", self.cell, self.file)
    }
}

/// The bytes of a cell.
pub fn encode_cell(place: CellPlace, value: CellValue) -> [u8; CELL_BYTES] {
    let mut bytes = [0; CELL_BYTES];
    for (field, word) in [value.client, value.sequence, place.file, place.cell].into_iter().enumerate() {
        bytes[field * 4..][..4].copy_from_slice(&word.to_le_bytes());
    }
    // Differs from write to write, so that half of one and half of another never fit together.
    bytes[FILLING_AT..CRC_AT].fill(value.sequence as u8 ^ value.client as u8);
    let crc = data_crc(&bytes[..CRC_AT]);
    bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// What is in a cell; none if it is torn, or belongs elsewhere.
pub fn decode_cell(place: CellPlace, bytes: &[u8; CELL_BYTES]) -> Option<CellValue> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Some(INITIAL);
    }
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let value = CellValue { client: word(0), sequence: word(4) };
    (value != INITIAL && encode_cell(place, value) == *bytes).then_some(value)
}

/// The time that logs have: the kernel's monotonic clock, which is one for all processes, in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
