//! A read or write of more bytes than a request may carry: it is sent as several requests, its parts.
//!
//! A [`Split`] says which part is next, and what the whole has come to. It ends as preadv(2) and pwritev(2)
//! would: with the bytes that were done without a gap from its start, or with why the first one was not. What
//! lies behind a part that was short or has failed does not count, and is not sent if it was not yet. Each
//! part is a request of its own, with a credit and with what becomes of it when the connection breaks.
//!
//! If the whole has a checksum each part has one. Those of a write are computed at once, before the first
//! part is sent, and must make that of the whole: so nothing is sent of data that is not what the program has
//! made its checksum of, and the server finds out if a part changes later. Those of a read, as the server
//! says them, make that of the whole.

use std::collections::VecDeque;

use raio_transport::Status;
use raio_transport::memory::{Buffers, Divided};
use raio_transport::message::{combined_crc, crc_of};
use raio_transport::protocol::{Command, FileHandle};
use raio_transport::transport::Bulk;

use crate::error::Error;

/// Parts begin and end at multiples of this, from the start of the whole: O_DIRECT needs that.
const PART_ALIGN: usize = 4096;

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Split {
    is_read: bool,
    file: FileHandle,
    offset: u64,
    length: u64,
    /// From its front the parts are taken.
    memory: Divided,
    /// With a checksum of the whole.
    crcs: Option<Crcs>,
    /// Parts that were not executed, to be sent again, perhaps in parts of their own.
    again: Vec<Again>,
    /// Parts that were sent and are not over.
    in_flight: usize,
    /// No byte from here on counts.
    end: u64,
    /// Why, unless something was short.
    failure: Option<Error>,
    /// A part may have been executed.
    unknown: Option<Error>,
    has_effect: bool,
    /// No more is to be sent, for this reason.
    stopped: Option<Error>,
    /// It is in its context's queue.
    pub(crate) is_queued: bool,
}

/// The checksums of a split operation's parts.
#[derive(Debug)]
enum Crcs {
    /// Of a write: of the parts that have not been taken, and the length of each but the last.
    Unsent(VecDeque<u32>, usize),
    /// Of a read: where a part begins, the length of what was read, and its checksum.
    Read(Vec<(u64, u64, u32)>),
}

/// A part that is to be sent again.
#[derive(Debug)]
struct Again {
    at: u64,
    buffers: Buffers,
    crc: Option<u32>,
}

/// A part that is to be sent.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) at: u64,
    pub(crate) length: u64,
    /// For [`raio_transport::transport::SendOptions`].
    pub(crate) crc: Option<u32>,
    pub(crate) command: Command<'static>,
    pub(crate) bulk: Bulk,
}

impl Split {
    /// Nothing of it has been sent. `crc` is that of a write's data, if it has one; of a read any number.
    /// Parts are expected to have at most `most` bytes.
    pub(crate) fn new(
        is_read: bool,
        file: FileHandle,
        offset: u64,
        buffers: Buffers,
        crc: Option<u32>,
        most: usize,
    ) -> Self {
        let length = buffers.len() as u64;
        let most = aligned(most);
        let crcs = match crc {
            None => Ok(None),
            Some(_) if is_read => Ok(Some(Crcs::Read(Vec::new()))),
            Some(crc) => part_crcs(&buffers, most, crc).map(|crcs| Some(Crcs::Unsent(crcs.into(), most))),
        };
        let (end, failure) = if crcs.is_ok() { (length, None) } else { (0, Some(damaged())) };
        Self {
            is_read,
            file,
            offset,
            length,
            memory: Divided::new(buffers),
            crcs: crcs.unwrap_or_default(),
            again: Vec::new(),
            in_flight: 0,
            end,
            failure,
            unknown: None,
            has_effect: false,
            stopped: None,
            is_queued: false,
        }
    }

    /// Where the part begins that has not been sent at all.
    fn unsent(&self) -> u64 {
        self.length - self.memory.left() as u64
    }

    /// Whether it has failed because the data is not what it was when its checksum was computed.
    pub(crate) fn is_damaged(&self) -> bool {
        self.failure.as_ref().is_some_and(|failure| failure.status == Status::DAMAGED)
    }

    /// Whether a part is to be sent.
    pub(crate) fn has_next(&self) -> bool {
        self.unsent() < self.end || self.again.iter().any(|again| again.at < self.end)
    }

    /// The next part, of at most `most` bytes. It is in flight from now on. None also if the data of a write
    /// has changed: then it has failed.
    pub(crate) fn next(&mut self, most: usize) -> Option<Part> {
        let end = self.end;
        self.again.retain(|again| again.at < end);
        let Again { at, buffers, crc } = match self.again.pop() {
            Some(again) => again,
            None if self.unsent() < end => self.take(most),
            None => return None,
        };
        let most = aligned(most);
        if buffers.len() > most {
            // The server takes less than it did.
            self.divide(at, buffers, crc, most);
            return self.next(most);
        }
        self.in_flight += 1;
        let (file, offset, length) = (self.file, self.offset + at, buffers.len() as u32);
        let (command, bulk) = match self.is_read {
            true => (Command::Read { file, offset, length }, Bulk::In(buffers)),
            false => (Command::Write { file, offset, length }, Bulk::Out(buffers)),
        };
        Some(Part { at, length: length.into(), crc, command, bulk })
    }

    /// The next part that has not been sent at all.
    fn take(&mut self, most: usize) -> Again {
        let at = self.unsent();
        let (length, crc) = match &mut self.crcs {
            None => (aligned(most), None),
            Some(Crcs::Read(_)) => (aligned(most), Some(0)),
            Some(Crcs::Unsent(crcs, length)) => (*length, crcs.pop_front()),
        };
        Again { at, buffers: self.memory.take(length), crc }
    }

    /// A part that is too large becomes several.
    fn divide(&mut self, at: u64, buffers: Buffers, crc: Option<u32>, most: usize) {
        let crcs = match crc.filter(|_| !self.is_read) {
            None => Vec::new(),
            Some(crc) => match part_crcs(&buffers, most, crc) {
                Ok(crcs) => crcs,
                Err(Damaged) => return self.cut(at, Some(damaged())),
            },
        };
        let mut crcs = crcs.into_iter();
        let mut memory = Divided::new(buffers);
        let (mut at, mut parts) = (at, Vec::new());
        while memory.left() > 0 {
            let buffers = memory.take(most);
            let length = buffers.len() as u64;
            parts.push(Again { at, buffers, crc: crcs.next().or(crc) });
            at += length;
        }
        // The first is taken first.
        self.again.extend(parts.into_iter().rev());
    }

    /// The part that begins at `at` was not executed, and is to be sent again.
    pub(crate) fn put_back(&mut self, at: u64, bulk: Bulk, crc: Option<u32>) {
        self.in_flight -= 1;
        match (self.stopped.clone(), bulk) {
            (Some(stopped), _) => self.cut(at, Some(stopped)),
            (None, Bulk::In(buffers) | Bulk::Out(buffers)) => self.again.push(Again { at, buffers, crc }),
            (None, Bulk::None) => unreachable!("a part has buffers"),
        }
    }

    /// The part of `length` bytes that begins at `at` is over. Its buffers must be gone. `crc` is that of
    /// what was read.
    pub(crate) fn part_over(&mut self, at: u64, length: u64, result: Result<u64, Error>, crc: u32) {
        self.in_flight -= 1;
        match result {
            Ok(done) => {
                self.has_effect |= done > 0;
                if let Some(Crcs::Read(parts)) = &mut self.crcs {
                    parts.push((at, done, crc));
                }
                if done < length {
                    self.cut(at + done, None);
                }
            }
            Err(error) => {
                if error.is_unknown && self.unknown.is_none() {
                    self.unknown = Some(error.clone());
                }
                self.cut(at, Some(error));
            }
        }
    }

    /// What has not been sent is not to be sent: it has failed.
    pub(crate) fn stop(&mut self, failure: &Error) {
        let again = std::mem::take(&mut self.again);
        let first = again.iter().map(|again| again.at).chain([self.unsent()]).min();
        if let Some(first) = first {
            self.cut(first, Some(failure.clone()));
        }
        self.stopped = Some(failure.clone());
    }

    fn cut(&mut self, at: u64, failure: Option<Error>) {
        if at < self.end {
            (self.end, self.failure) = (at, failure);
        }
    }

    /// Whether all is over.
    pub(crate) fn is_over(&self) -> bool {
        self.in_flight == 0 && !self.has_next()
    }

    /// Whether bytes of the file have changed, or may have.
    pub(crate) fn has_effect(&self) -> bool {
        !self.is_read && (self.has_effect || self.unknown.is_some())
    }

    /// How the whole has ended, with its buffers, and with the checksum of what was read. It must be over.
    pub(crate) fn finish(self) -> (Result<u64, Error>, Bulk, u32) {
        let Self { is_read, memory, again, end, failure, unknown, crcs, .. } = self;
        drop(again);
        let crc = match crcs {
            Some(Crcs::Read(mut parts)) => {
                // Where one ends early the next ones do not count.
                parts.retain(|(at, ..)| *at < end);
                parts.sort_unstable_by_key(|(at, ..)| *at);
                parts.iter().fold(0, |all, &(_, length, crc)| combined_crc(all, crc, length))
            }
            Some(Crcs::Unsent(..)) | None => 0,
        };
        let result = match (unknown, failure) {
            (Some(unknown), _) => Err(unknown),
            (None, Some(failure)) if end == 0 => Err(failure),
            (None, _) => Ok(end),
        };
        let bulk = match memory.into_whole() {
            Ok(buffers) if is_read => Bulk::In(buffers),
            Ok(buffers) => Bulk::Out(buffers),
            Err(_) => unreachable!("every part is over, and its buffers are gone"),
        };
        (result, bulk, crc)
    }
}

/// The length of a part that may have `most` bytes.
fn aligned(most: usize) -> usize {
    if most > PART_ALIGN { most - most % PART_ALIGN } else { most }
}

/// The data is not what its checksum was computed of.
struct Damaged;

/// The checksums of the parts of `length` bytes that buffers consist of, if together they are `whole`.
fn part_crcs(buffers: &Buffers, length: usize, whole: u32) -> Result<Vec<u32>, Damaged> {
    let (mut crcs, mut all) = (Vec::new(), 0);
    for at in (0..buffers.len()).step_by(length) {
        let range = at..buffers.len().min(at + length);
        let crc = crc_of(buffers.slices(range.clone()));
        all = combined_crc(all, crc, range.len() as u64);
        crcs.push(crc);
    }
    if all == whole { Ok(crcs) } else { Err(Damaged) }
}

fn damaged() -> Error {
    Error::new(
        Status::DAMAGED,
        "The data is not what its checksum was computed of: memory is damaged, or the program has changed \
         it, or has computed the checksum of something else. What was not sent before is not sent.",
    )
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;
    use raio_transport::Status;
    use raio_transport::memory::Buffer;

    use super::*;
    use crate::test_buffers::{bytes, pattern};

    const FILE: FileHandle = FileHandle(1);

    fn split(length: usize) -> Split {
        let cut = length / 3;
        let pieces = [cut, length - cut].map(|len| Buffer::Owned(vec![0; len].into()));
        Split::new(false, FILE, 1000, Buffers::Many(pieces.into()), None, 1 << 20)
    }

    /// A write of these bytes, in pieces, of which the program says this checksum.
    fn checked(bytes: &[u8], crc: u32, most: usize) -> Split {
        let (first, second) = bytes.split_at(bytes.len() / 3);
        let pieces = [first, second].map(|piece| Buffer::Owned(piece.into()));
        Split::new(false, FILE, 0, Buffers::Many(pieces.into()), Some(crc), most)
    }

    fn bytes_of(bulk: &Bulk) -> Vec<u8> {
        let (Bulk::In(buffers) | Bulk::Out(buffers)) = bulk else { panic!("no buffers") };
        bytes(buffers)
    }

    /// Sends all that is to be sent, each with its right checksum. Which parts.
    fn send_checked(split: &mut Split, most: usize) -> Vec<(u64, u64)> {
        let mut parts = Vec::new();
        while let Some(Part { at, length, crc, bulk, .. }) = split.next(most) {
            assert_eq!(crc, Some(crc_of([&bytes_of(&bulk)[..]].into_iter())), "at {at}");
            drop(bulk);
            split.part_over(at, length, Ok(length), 0);
            parts.push((at, length));
        }
        parts
    }

    #[test]
    fn each_part_of_a_write_with_a_checksum_has_its_own() {
        let bytes = pattern(40_000);
        let crc = crc_of([&bytes[..]].into_iter());
        let mut split = checked(&bytes, crc, 10_000);
        assert!(!split.is_damaged());
        // More than was expected does not make them longer.
        let parts = send_checked(&mut split, 20_000);
        assert_eq!(parts, [(0, 8192), (8192, 8192), (16_384, 8192), (24_576, 8192), (32_768, 7232)]);
        assert_eq!(split.finish().0, Ok(40_000));
    }

    #[test]
    fn of_data_that_is_not_what_its_checksum_says_nothing_is_sent() {
        let bytes = pattern(40_000);
        let crc = crc_of([&bytes[..]].into_iter());
        let mut split = checked(&bytes, crc ^ 1, 8192);
        assert!(split.is_damaged() && split.is_over() && split.next(8192).is_none());
        let (result, bulk, _) = split.finish();
        assert_eq!(result.unwrap_err().status, Status::DAMAGED);
        assert_eq!(bytes_of(&bulk), bytes, "the buffers come back");
    }

    #[test]
    fn a_part_with_a_checksum_that_is_too_large_is_divided_and_compared_once_more() {
        let bytes = pattern(20_000);
        let crc = crc_of([&bytes[..]].into_iter());
        for is_changed in [false, true] {
            let mut split = checked(&bytes, crc, 16_384);
            let Part { at, crc, mut bulk, .. } = split.next(16_384).unwrap();
            if is_changed && let Bulk::Out(buffers) = &mut bulk {
                buffers.write_at(9000, &[0xa5]);
            }
            split.put_back(at, bulk, crc);
            let parts = send_checked(&mut split, 4096);
            let (result, ..) = split.finish();
            if is_changed {
                assert_eq!((parts, result.unwrap_err().status), (Vec::new(), Status::DAMAGED));
            } else {
                let expected = [(0, 4096), (4096, 4096), (8192, 4096), (12_288, 4096), (16_384, 3616)];
                assert_eq!((&parts[..], result), (&expected[..], Ok(20_000)));
            }
        }
    }

    #[test]
    fn the_checksum_of_a_read_is_that_of_the_bytes_that_count() {
        let bytes = pattern(30_000);
        for (done, order) in [(30_000, false), (30_000, true), (20_000, true), (16_384, false), (0, false)] {
            let buffers = Buffers::One(Buffer::Owned(vec![0; 30_000].into()));
            let mut split = Split::new(true, FILE, 0, buffers, Some(0), 8192);
            let mut parts: Vec<_> = std::iter::from_fn(|| split.next(8192)).collect();
            if order {
                parts.reverse();
            }
            for Part { at, length, crc, bulk, .. } in parts {
                assert_eq!(crc, Some(0));
                drop(bulk);
                let end = (at + length).min(done.max(at));
                let read = &bytes[at as usize..end as usize];
                split.part_over(at, length, Ok(end - at), crc_of([read].into_iter()));
            }
            let (result, _, crc) = split.finish();
            assert_eq!(result, Ok(done));
            assert_eq!(crc, crc_of([&bytes[..done as usize]].into_iter()));
        }
    }

    fn failure(errno: i32) -> Error {
        Error::new(Status::storage(errno), "A failure.")
    }

    fn take(split: &mut Split, most: usize) -> (u64, u64) {
        let Part { at, length, command, bulk, .. } = split.next(most).unwrap();
        assert_eq!(command, Command::Write { file: FILE, offset: 1000 + at, length: length as u32 });
        assert!(matches!(bulk, Bulk::Out(buffers) if buffers.len() as u64 == length));
        (at, length)
    }

    #[test]
    fn parts_cover_the_whole_and_its_result_is_their_sum() {
        let mut split = split(20_000);
        let parts: Vec<_> = (0..3).map(|_| take(&mut split, 10_000)).collect();
        assert_eq!(parts, [(0, 8192), (8192, 8192), (16_384, 3616)]);
        assert!(!split.has_next() && split.next(10_000).is_none());
        for &(at, length) in parts.iter().rev() {
            assert!(!split.is_over());
            split.part_over(at, length, Ok(length), 0);
        }
        assert!(split.is_over() && split.has_effect());
        let (result, bulk, _) = split.finish();
        assert_eq!(result, Ok(20_000));
        assert!(matches!(bulk, Bulk::Out(Buffers::Many(pieces)) if pieces.len() == 2));
    }

    #[test]
    fn bytes_behind_a_gap_do_not_count_and_are_not_sent_any_more() {
        for (result, expected) in
            [(Ok(4096 + 7), Ok(4096 + 8192 + 7)), (Ok(0), Ok(8192)), (Err(failure(libc::ENOSPC)), Ok(8192))]
        {
            let mut split = split(100_000);
            let parts: Vec<_> = (0..3).map(|_| take(&mut split, 8192)).collect();
            split.part_over(parts[2].0, 8192, Ok(8192), 0);
            split.part_over(parts[1].0, 8192, result, 0);
            assert!(!split.has_next() && !split.is_over());
            split.part_over(parts[0].0, 8192, Ok(8192), 0);
            assert!(split.is_over());
            assert_eq!(split.finish().0, expected);
        }
    }

    #[test]
    fn a_failure_at_the_start_is_the_whole_s_even_if_what_is_behind_was_done() {
        let mut split = split(16_384);
        take(&mut split, 8192);
        take(&mut split, 8192);
        split.part_over(8192, 8192, Err(failure(libc::EIO)), 0);
        split.part_over(0, 8192, Err(failure(libc::ENOSPC)), 0);
        assert_eq!(split.finish().0, Err(failure(libc::ENOSPC)));
    }

    #[test]
    fn a_part_of_which_it_is_not_known_what_became_of_it_makes_the_whole_unknown() {
        let mut split = split(16_384);
        take(&mut split, 8192);
        take(&mut split, 8192);
        let unknown = Error { is_unknown: true, ..failure(libc::ECONNRESET) };
        split.part_over(8192, 8192, Err(unknown.clone()), 0);
        split.part_over(0, 8192, Ok(8192), 0);
        assert_eq!(split.finish().0, Err(unknown));
    }

    #[test]
    fn a_part_that_is_too_large_is_sent_in_parts_of_its_own() {
        let mut split = split(40_000);
        let Part { at, bulk, .. } = split.next(16_384).unwrap();
        split.put_back(at, bulk, None);
        let mut sizes = Vec::new();
        while split.has_next() {
            let (at, length) = take(&mut split, 4096);
            sizes.push((at, length));
            split.part_over(at, length, Ok(length), 0);
        }
        assert_eq!(sizes[..5], [(0, 4096), (4096, 4096), (8192, 4096), (12_288, 4096), (16_384, 4096)]);
        assert!(split.is_over());
        assert_eq!(split.finish().0, Ok(40_000));
    }

    #[test]
    fn what_is_stopped_has_done_what_was_sent_before() {
        let mut split = split(40_000);
        take(&mut split, 8192);
        let Part { at, bulk, .. } = split.next(8192).unwrap();
        split.put_back(at, bulk, None);
        let Part { at, bulk, .. } = split.next(4096).unwrap();
        split.stop(&failure(libc::ECANCELED));
        assert!(!split.has_next() && !split.is_over());
        split.put_back(at, bulk, None);
        assert!(!split.has_next() && !split.is_over());
        split.part_over(0, 8192, Ok(8192), 0);
        assert!(split.is_over());
        assert_eq!(split.finish().0, Ok(8192));
    }

    proptest! {
        #[test]
        fn whatever_becomes_of_the_parts_the_result_is_what_one_request_would_have(
            length in 1_usize..100_000,
            steps in prop::collection::vec((0..8_u8, 4096_usize..20_000, any::<bool>()), 1..200),
            done in 0_u64..120_000,
        ) {
            // The file takes `done` bytes from the start, and then no more.
            let mut split = split(length);
            let mut in_flight = VecDeque::new();
            let mut put_back = 0;
            let mut steps = steps.into_iter().cycle();
            while !split.is_over() {
                let (kind, most, front) = steps.next().unwrap();
                if kind < 4 && split.has_next() {
                    in_flight.push_back(split.next(most).unwrap());
                } else if let Some(part) = if front { in_flight.pop_front() } else { in_flight.pop_back() } {
                    let Part { at, length, bulk, .. } = part;
                    if kind == 7 && put_back < 30 {
                        put_back += 1;
                        split.put_back(at, bulk, None);
                        continue;
                    }
                    drop(bulk);
                    let result = match done.saturating_sub(at).min(length) {
                        0 => Err(failure(libc::ENOSPC)),
                        n => Ok(n),
                    };
                    split.part_over(at, length, result, 0);
                } else if split.has_next() {
                    in_flight.push_back(split.next(most).unwrap());
                }
            }
            let (result, bulk, _) = split.finish();
            let expected = match done.min(length as u64) {
                0 => Err(failure(libc::ENOSPC)),
                n => Ok(n),
            };
            prop_assert_eq!(result, expected);
            let Bulk::Out(buffers) = bulk else { panic!() };
            prop_assert_eq!(buffers.len(), length);
        }
    }
}
