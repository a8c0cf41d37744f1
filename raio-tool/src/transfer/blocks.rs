//! The blocks of a transfer that are still to be read. Their borders are multiples of the block size from the
//! start of the range on, so that a block has the same number and bytes whenever the transfer is done again.

use std::ops::Range;

use crate::failure::Failure;
use crate::place::Place;

/// A part of the range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// From 0, at the start of the range.
    pub number: u64,
    /// Where in the file.
    pub offset: u64,
    /// In bytes; less than others have at the end of the range.
    pub length: u64,
}

/// What is left to be read.
pub struct Blocks<'a> {
    from: &'a dyn Place,
    start: u64,
    /// None: where the file ends.
    end: Option<u64>,
    block_bytes: u64,
    /// Blocks that are left out.
    skip: &'a [bool],
    /// Look for ranges without data.
    finds_holes: bool,
    /// The next block.
    next: u64,
    /// Up to here there is data.
    data_end: u64,
    /// Ranges without data that are still to be taken.
    holes: Vec<Range<u64>>,
    has_ended: bool,
}

impl<'a> Blocks<'a> {
    /// All blocks from `start` to `end`.
    pub fn new(
        from: &'a dyn Place,
        start: u64,
        end: Option<u64>,
        block_bytes: u64,
        skip: &'a [bool],
        finds_holes: bool,
    ) -> Self {
        Self {
            from,
            start,
            end,
            block_bytes,
            skip,
            finds_holes,
            next: 0,
            data_end: 0,
            holes: Vec::new(),
            has_ended: false,
        }
    }

    /// Whether the end is known, so that there must be bytes up to there.
    pub fn is_bounded(&self) -> bool {
        self.end.is_some()
    }

    /// The file has ended.
    pub fn end(&mut self) {
        self.has_ended = true;
    }

    /// Ranges without data that were found.
    pub fn take_holes(&mut self) -> Vec<Range<u64>> {
        std::mem::take(&mut self.holes)
    }

    /// The next block that is to be read.
    pub fn next(&mut self) -> Result<Option<Block>, Failure> {
        loop {
            let offset = self.start + self.next * self.block_bytes;
            if self.has_ended || self.end.is_some_and(|end| offset >= end) {
                return Ok(None);
            }
            if self.finds_holes
                && let Some(end) = self.end
                && offset >= self.data_end
            {
                let data = self.from.next_data(offset, end)?;
                let (begin, data_end) = data.map_or((end, end), |data| (data.start, data.end));
                self.data_end = data_end;
                // Whole blocks: what is at the border of a hole is read.
                let holes = if begin == end {
                    (end - self.start).div_ceil(self.block_bytes)
                } else {
                    (begin - self.start) / self.block_bytes
                };
                if holes > self.next {
                    self.holes.push(offset..(self.start + holes * self.block_bytes).min(end));
                    self.next = holes;
                    continue;
                }
            }
            let number = self.next;
            self.next += 1;
            if usize::try_from(number).is_ok_and(|n| self.skip.get(n) == Some(&true)) {
                continue;
            }
            let length = self.end.map_or(self.block_bytes, |end| self.block_bytes.min(end - offset));
            return Ok(Some(Block { number, offset, length }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::place::{Facts, Lane};

    /// A file with data in these ranges.
    struct Sparse(Vec<Range<u64>>);

    impl Place for Sparse {
        fn name(&self) -> &str {
            "sparse"
        }
        fn next_data(&self, from: u64, _: u64) -> Result<Option<Range<u64>>, Failure> {
            Ok(self.0.iter().find(|range| range.end > from).map(|it| it.start.max(from)..it.end))
        }
        fn facts(&self) -> Result<Facts, Failure> {
            unreachable!("blocks do not ask for it")
        }
        fn lane(&self, _: usize) -> Result<Box<dyn Lane>, Failure> {
            unreachable!("blocks do not read")
        }
        fn set_size(&self, _: u64) -> Result<(), Failure> {
            unreachable!("blocks change nothing")
        }
        fn zero(&self, _: Range<u64>) -> Result<(), Failure> {
            unreachable!("blocks change nothing")
        }
        fn sync(&self) -> Result<(), Failure> {
            unreachable!("blocks change nothing")
        }
        fn preserve(&self, _: &Facts) -> Result<(), Failure> {
            unreachable!("blocks change nothing")
        }
    }

    /// The numbers of the blocks that are read, and the begin and end of each hole.
    fn all(data: &[(u64, u64)], end: u64, skip: &[bool]) -> (Vec<u64>, Vec<(u64, u64)>) {
        let file = Sparse(data.iter().map(|&(begin, end)| begin..end).collect());
        let mut blocks = Blocks::new(&file, 0, Some(end), 10, skip, true);
        let mut numbers = Vec::new();
        let mut holes = Vec::new();
        loop {
            let block = blocks.next().unwrap();
            holes.extend(blocks.take_holes().into_iter().map(|hole| (hole.start, hole.end)));
            let Some(block) = block else { return (numbers, holes) };
            assert_eq!(block.offset, block.number * 10);
            numbers.push(block.number);
        }
    }

    #[test]
    fn blocks_with_any_data_are_read_and_the_others_are_holes() {
        let data = [(5, 6), (29, 41), (90, 95)];
        assert_eq!(all(&data, 100, &[]), (vec![0, 2, 3, 4, 9], vec![(10, 20), (50, 90)]));
        let skip = [true, false, true];
        assert_eq!(all(&data, 100, &skip), (vec![3, 4, 9], vec![(10, 20), (50, 90)]));
        assert_eq!(all(&[(5, 6), (94, 95)], 95, &[]), (vec![0, 9], vec![(10, 90)]));
        assert_eq!(all(&[], 95, &[]), (vec![], vec![(0, 95)]));
        assert_eq!(all(&[(0, 100)], 100, &[]).1, vec![]);
    }
}
