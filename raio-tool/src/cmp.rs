//! `raio cmp`: whether two files or directories are the same.

mod trees;

use std::ffi::OsString;
use std::sync::mpsc::{self, Receiver, SyncSender};

use clap::{Args, ValueHint};
use serde::Serialize;

use crate::contents::have_same_hash;
use crate::failure::{Failure, Kind};
use crate::global::Global;
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::output;
use crate::place::{Place, Sessions, Sort, Stream, open_source};
use crate::transfer::{self, Block, Settings, Verdict, Watcher};
use crate::tuning::DEPTH;

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// One file
    #[arg(value_name = "PATH", value_hint = ValueHint::AnyPath)]
    one: OsString,
    /// The other file
    #[arg(value_name = "OTHER", value_hint = ValueHint::AnyPath)]
    other: OsString,
    /// Compare directories, with all that is in them
    #[arg(short, long)]
    recursive: bool,
}

/// The result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    same: bool,
    /// The first byte that differs, from 0; if one file ends there, where.
    differs_at: Option<u64>,
    /// How many bytes were the same before.
    bytes: u64,
}

/// A piece of a file, or why there is none.
type Piece = Result<Vec<u8>, Failure>;

/// Passes the blocks of a file on, in their order.
struct Passing(SyncSender<Piece>);

impl Watcher for Passing {
    fn read(&self, _: Block, data: &[u8]) -> Result<Verdict, Failure> {
        // The other side has stopped when the first difference was found.
        self.0.send(Ok(data.to_vec())).map_err(|_| Failure::new("Stopped."))?;
        Ok(Verdict::Skip)
    }
}

pub fn run(global: &Global, options: &Options, interrupt: &Interrupt) -> Result<(), Failure> {
    let (one, other) = (Location::parse(&options.one)?, Location::parse(&options.other)?);
    if one == Location::Stream && other == Location::Stream {
        return Err(Failure::usage("Both files are standard input. Name two."));
    }
    if options.recursive {
        return trees::compare(global, &one, &other, interrupt);
    }
    let sessions = Sessions::new(global);
    let open = |location| open_source(&sessions, location, false, interrupt);
    let places = (open(&one)?, open(&other)?);
    let are_remote = [&one, &other].iter().any(|it| matches!(it, Location::Remote { .. }));
    if are_remote && let Some(bytes) = same_by_hashes(&*places.0, &*places.1, interrupt)? {
        return match global.json {
            true => output::print_json(&Report { same: true, differs_at: None, bytes }),
            false => Ok(()),
        };
    }
    let found = std::thread::scope(|scope| {
        let ((a, sent_a), (b, sent_b)) = (mpsc::sync_channel(DEPTH), mpsc::sync_channel(DEPTH));
        let (from_a, from_b) = (&*places.0, &*places.1);
        scope.spawn(move || send(from_a, a, interrupt));
        scope.spawn(move || send(from_b, b, interrupt));
        let found = first_difference(&sent_a, &sent_b);
        // What is not taken any more stops the threads.
        drop((sent_a, sent_b));
        found
    });
    let (differs_at, bytes) = found?;
    if global.json {
        output::print_json(&Report { same: differs_at.is_none(), differs_at, bytes })?;
    }
    match differs_at {
        None => Ok(()),
        Some(at) => {
            Err(Failure::of(Kind::Unverified, format!("{one} and {other} differ at byte {at} (from 0).")))
        }
    }
}

/// The size of two files that are the same by their hashes, which servers compute. None: they differ, and
/// reading them tells where.
fn same_by_hashes(one: &dyn Place, other: &dyn Place, interrupt: &Interrupt) -> Result<Option<u64>, Failure> {
    let (of_one, of_other) = (one.facts()?, other.facts()?);
    let is_stream = [of_one.sort, of_other.sort].contains(&Sort::Stream);
    let Some(size) = of_one.size.filter(|_| !is_stream && of_one.size == of_other.size) else {
        return Ok(None);
    };
    Ok(have_same_hash(one, other, interrupt)?.then_some(size))
}

fn send(from: &dyn Place, to: SyncSender<Piece>, interrupt: &Interrupt) {
    let settings = Settings { is_ordered: true, ..Settings::default() };
    let (null, passing) = (Stream::null(), Passing(to));
    let sent = from.facts().and_then(|facts| {
        transfer::run(from, &null, Some(0)..facts.size, &[], &settings, &passing, interrupt)
    });
    if let Err(failure) = sent {
        let _ = passing.0.send(Err(failure));
    }
}

/// Where two sequences of pieces differ first, and how many bytes are the same before.
fn first_difference(one: &Receiver<Piece>, other: &Receiver<Piece>) -> Result<(Option<u64>, u64), Failure> {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let (mut at_a, mut at_b) = (0, 0);
    let mut same = 0;
    loop {
        // Pieces may be of different lengths.
        if at_a == a.len() {
            (a, at_a) = (one.recv().unwrap_or(Ok(Vec::new()))?, 0);
        }
        if at_b == b.len() {
            (b, at_b) = (other.recv().unwrap_or(Ok(Vec::new()))?, 0);
        }
        let (left, right) = (&a[at_a..], &b[at_b..]);
        match (left.is_empty(), right.is_empty()) {
            (true, true) => return Ok((None, same)),
            (false, false) => {}
            _ => return Ok((Some(same), same)),
        }
        let length = left.len().min(right.len());
        if left[..length] != right[..length] {
            let equal = left.iter().zip(right).take_while(|(a, b)| a == b).count();
            same += equal as u64;
            return Ok((Some(same), same));
        }
        same += length as u64;
        at_a += length;
        at_b += length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn difference(one: &[&[u8]], other: &[&[u8]]) -> Option<u64> {
        let [a, b] = [one, other].map(|pieces| {
            let (sender, receiver) = mpsc::sync_channel(9);
            pieces.iter().for_each(|piece| sender.send(Ok(piece.to_vec())).unwrap());
            receiver
        });
        first_difference(&a, &b).unwrap().0
    }

    #[test]
    fn the_first_difference_is_found_however_the_bytes_are_cut() {
        assert_eq!(difference(&[b"abc", b"def"], &[b"ab", b"cdef"]), None);
        assert_eq!(difference(&[b"abc", b"dXf"], &[b"ab", b"cdef"]), Some(4));
        assert_eq!(difference(&[b"abc"], &[b"ab"]), Some(2));
        assert_eq!(difference(&[], &[b"a"]), Some(0));
        assert_eq!(difference(&[], &[]), None);
    }
}
