//! A read or write of more bytes than a request may carry: it is sent as several requests, its parts.
//!
//! A [`Split`] says which part is next, and what the whole has come to. It ends as preadv(2) and pwritev(2)
//! would: with the bytes that were done without a gap from its start, or with why the first one was not. What
//! lies behind a part that was short or has failed does not count, and is not sent if it was not yet. Each
//! part is a request of its own, with a credit and with what becomes of it when the connection breaks.

use raio_transport::memory::{Buffers, Divided};
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
    /// Parts that were not executed, to be sent again in parts of their own, and where they begin.
    again: Vec<(u64, Divided)>,
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

/// A part that is to be sent.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) at: u64,
    pub(crate) length: u64,
    pub(crate) command: Command<'static>,
    pub(crate) bulk: Bulk,
}

impl Split {
    /// Nothing of it has been sent.
    pub(crate) fn new(is_read: bool, file: FileHandle, offset: u64, buffers: Buffers) -> Self {
        let length = buffers.len() as u64;
        Self {
            is_read,
            file,
            offset,
            length,
            memory: Divided::new(buffers),
            again: Vec::new(),
            in_flight: 0,
            end: length,
            failure: None,
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

    /// Whether a part is to be sent.
    pub(crate) fn has_next(&self) -> bool {
        self.unsent() < self.end || self.again.iter().any(|(at, _)| *at < self.end)
    }

    /// The next part, of at most `most` bytes. It is in flight from now on.
    pub(crate) fn next(&mut self, most: usize) -> Option<Part> {
        let end = self.end;
        self.again.retain(|(at, _)| *at < end);
        let most = if most > PART_ALIGN { most - most % PART_ALIGN } else { most };
        let unsent = self.unsent();
        let (at, buffers) = match self.again.last_mut() {
            Some((at, memory)) => {
                let (from, buffers) = (*at, memory.take(most));
                *at += buffers.len() as u64;
                if memory.left() == 0 {
                    self.again.pop();
                }
                (from, buffers)
            }
            None if unsent < end => (unsent, self.memory.take(most)),
            None => return None,
        };
        self.in_flight += 1;
        let (file, offset, length) = (self.file, self.offset + at, buffers.len() as u32);
        let (command, bulk) = match self.is_read {
            true => (Command::Read { file, offset, length }, Bulk::In(buffers)),
            false => (Command::Write { file, offset, length }, Bulk::Out(buffers)),
        };
        Some(Part { at, length: length.into(), command, bulk })
    }

    /// The part that begins at `at` was not executed, and is to be sent again.
    pub(crate) fn put_back(&mut self, at: u64, bulk: Bulk) {
        self.in_flight -= 1;
        match (self.stopped.clone(), bulk) {
            (Some(stopped), _) => self.cut(at, Some(stopped)),
            (None, Bulk::In(buffers) | Bulk::Out(buffers)) => self.again.push((at, Divided::new(buffers))),
            (None, Bulk::None) => unreachable!("a part has buffers"),
        }
    }

    /// The part of `length` bytes that begins at `at` is over. Its buffers must be gone.
    pub(crate) fn part_over(&mut self, at: u64, length: u64, result: Result<u64, Error>) {
        self.in_flight -= 1;
        match result {
            Ok(done) => {
                self.has_effect |= done > 0;
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
        let first = again.iter().map(|(at, _)| *at).chain([self.unsent()]).min();
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

    /// How the whole has ended, with its buffers. It must be over.
    pub(crate) fn finish(self) -> (Result<u64, Error>, Bulk) {
        let Self { is_read, memory, again, end, failure, unknown, .. } = self;
        drop(again);
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
        (result, bulk)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;
    use raio_transport::Status;
    use raio_transport::memory::Buffer;

    use super::*;

    const FILE: FileHandle = FileHandle(1);

    fn split(length: usize) -> Split {
        let cut = length / 3;
        let pieces = [cut, length - cut].map(|len| Buffer::Owned(vec![0; len].into()));
        Split::new(false, FILE, 1000, Buffers::Many(pieces.into()))
    }

    fn failure(errno: i32) -> Error {
        Error::new(Status::storage(errno), "A failure.")
    }

    fn take(split: &mut Split, most: usize) -> (u64, u64) {
        let Part { at, length, command, bulk } = split.next(most).unwrap();
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
            split.part_over(at, length, Ok(length));
        }
        assert!(split.is_over() && split.has_effect());
        let (result, bulk) = split.finish();
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
            split.part_over(parts[2].0, 8192, Ok(8192));
            split.part_over(parts[1].0, 8192, result);
            assert!(!split.has_next() && !split.is_over());
            split.part_over(parts[0].0, 8192, Ok(8192));
            assert!(split.is_over());
            assert_eq!(split.finish().0, expected);
        }
    }

    #[test]
    fn a_failure_at_the_start_is_the_whole_s_even_if_what_is_behind_was_done() {
        let mut split = split(16_384);
        take(&mut split, 8192);
        take(&mut split, 8192);
        split.part_over(8192, 8192, Err(failure(libc::EIO)));
        split.part_over(0, 8192, Err(failure(libc::ENOSPC)));
        assert_eq!(split.finish().0, Err(failure(libc::ENOSPC)));
    }

    #[test]
    fn a_part_of_which_it_is_not_known_what_became_of_it_makes_the_whole_unknown() {
        let mut split = split(16_384);
        take(&mut split, 8192);
        take(&mut split, 8192);
        let unknown = Error { is_unknown: true, ..failure(libc::ECONNRESET) };
        split.part_over(8192, 8192, Err(unknown.clone()));
        split.part_over(0, 8192, Ok(8192));
        assert_eq!(split.finish().0, Err(unknown));
    }

    #[test]
    fn a_part_that_is_too_large_is_sent_in_parts_of_its_own() {
        let mut split = split(40_000);
        let Part { at, bulk, .. } = split.next(16_384).unwrap();
        split.put_back(at, bulk);
        let mut sizes = Vec::new();
        while split.has_next() {
            let (at, length) = take(&mut split, 4096);
            sizes.push((at, length));
            split.part_over(at, length, Ok(length));
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
        split.put_back(at, bulk);
        let Part { at, bulk, .. } = split.next(4096).unwrap();
        split.stop(&failure(libc::ECANCELED));
        assert!(!split.has_next() && !split.is_over());
        split.put_back(at, bulk);
        assert!(!split.has_next() && !split.is_over());
        split.part_over(0, 8192, Ok(8192));
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
                        split.put_back(at, bulk);
                        continue;
                    }
                    drop(bulk);
                    let result = match done.saturating_sub(at).min(length) {
                        0 => Err(failure(libc::ENOSPC)),
                        n => Ok(n),
                    };
                    split.part_over(at, length, result);
                } else if split.has_next() {
                    in_flight.push_back(split.next(most).unwrap());
                }
            }
            let (result, bulk) = split.finish();
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
