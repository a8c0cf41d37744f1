//! The checkers of histories find what they are for, and nothing else.

use std::collections::HashMap;

use proptest::prelude::*;
use raio_e2e::{
    CELL_BYTES, CellPlace, CellRead, CellValue, CellWrite, CrashImage, FOREVER, Fault, History,
    HistoryCounts, INITIAL, LogLine, Outcome, Violation, decode_cell, encode_cell,
};

const PLACE: CellPlace = CellPlace { file: 0, cell: 5 };

fn value(sequence: u32) -> CellValue {
    if sequence == 0 { INITIAL } else { CellValue { client: 1, sequence } }
}

/// A history by a log in short: `w 7 10 20` writes value 1.7 from 10 to 20, with `failed` or `unknown` behind
/// it if it did not succeed; `r 7 30 40` reads it, `s 50 60` syncs; other lines are as in a log.
fn history(short: &str) -> History {
    let mut log = String::new();
    for line in short.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let words: Vec<_> = line.split(' ').collect();
        let mut say = |line: String| {
            log += &line;
            log += "\n";
        };
        match words[..] {
            ["w", n, begin, end, ref how @ ..] => {
                let how = how.first().copied().unwrap_or("ok");
                say(format!("begin 0 5 1 1.{n} {begin}"));
                say(format!("write 0 5 1.{n} {begin} {end} {how}"));
            }
            ["w", n, begin] => say(format!("begin 0 5 1 1.{n} {begin}")),
            ["r", n, begin, end] => {
                say(format!("read 0 5 {} {begin} {end}", value(n.parse().unwrap())));
            }
            ["s", begin, end, ref how @ ..] => {
                say(format!("fsync 0 {begin} {end} {}", how.first().copied().unwrap_or("ok")));
            }
            _ => say(line.to_owned()),
        }
    }
    let mut history = History::default();
    history.add_log(&log).unwrap();
    history
}

fn faults(short: &str) -> Vec<Fault> {
    history(short).check().into_iter().map(|violation| violation.fault).collect()
}

#[test]
fn histories_that_a_register_can_have_are_accepted() {
    for good in [
        "",
        "r 0 1 2",
        "w 1 1 2
         r 1 3 4
         r 1 3 5",
        // What overlaps may be in any order, and an operation that ends as another begins overlaps it.
        "w 1 1 10
         w 2 2 9
         r 1 12 13",
        "w 1 1 10
         w 2 2 9
         r 2 12 13",
        "w 1 1 10
         w 2 10 20
         r 2 5 12
         r 1 10 11",
        // A write of unknown outcome happens late, early or never.
        "w 1 1 2
         w 2 3 - unknown
         r 1 50 51
         r 2 60 61",
        "w 2 3
         w 1 5 6
         r 1 50 51",
        "w 2 3
         fence 4
         w 1 5 6
         r 1 50 51",
        // A failed one never.
        "w 1 1 2
         w 2 3 4 failed
         r 1 5 6",
    ] {
        assert_eq!(faults(good), [], "{good}");
    }
}

#[test]
fn each_kind_of_violation_is_found() {
    let disorder = |a, b| Fault::Disorder(value(a), value(b));
    for (what, bad, fault) in [
        ("a value that nobody wrote", "r 3 1 2", Fault::Unwritten(value(3))),
        ("a write that failed", "w 1 1 2 failed\nr 1 3 4", Fault::NotDone(value(1))),
        ("a write done twice", "w 1 1 2\nbegin 0 5 1 1.1 3", Fault::Twice(value(1))),
        ("a read before the write", "w 1 5 6\nr 1 1 2", Fault::Early(value(1))),
        ("an old value", "w 1 1 2\nw 2 3 4\nr 1 5 6", disorder(1, 2)),
        ("the initial value late", "w 1 1 2\nr 0 5 6", disorder(0, 1)),
        ("a value that comes back", "w 1 1 9\nw 2 2 9\nr 1 10 11\nr 2 12 13\nr 1 14 15", disorder(1, 2)),
        (
            "values that take turns",
            "w 1 1 90\nw 2 2 90\nr 1 10 11\nr 2 12 13\nr 1 14 15\nr 2 16 17",
            disorder(1, 2),
        ),
        (
            "an unknown write that is seen and gone again",
            "w 1 1\nw 2 2 3\nr 1 4 5\nw 3 6 7\nr 1 8 9",
            disorder(1, 3),
        ),
        (
            "a ghost: a write that lands after it was given up",
            "w 1 1 2 unknown\nw 2 3 4\nr 1 5 6",
            disorder(1, 2),
        ),
        ("a ghost: a write that lands after its fence", "w 1 1\nfence 2\nw 2 3 4\nr 1 5 6", disorder(1, 2)),
        ("a torn cell", "w 1 1 2\nbroken 0 5 00ff 3 4", Fault::Broken("broken 0 5 00ff 3 4".into())),
    ] {
        assert_eq!(faults(bad), [fault], "{what}");
    }
}

#[test]
fn lines_that_cannot_be_are_errors_and_one_that_was_cut_off_is_none() {
    for bad in [
        "nonsense",
        "write 0 5 1.1 1 2 ok",
        "begin 0 5 1 1.1 1\nbegin 0 5 1 1.1 2",
        "begin 0 5 1 1.1 1\nwrite 0 5 1.1 2 3 ok",
        "begin 0 5 1 1.1 4\nwrite 0 5 1.1 4 3 ok",
        "begin 0 5 1 1.1 4\nwrite 0 5 1.1 4 - ok",
        "begin 0 5 1 1.1 4\nwrite 0 5 1.1 4 3 unknown",
        "read 0 5 1.1 2 1",
        "read 0 5 0.0 0 1",
        "fsync 0 1 2 maybe",
        "",
    ] {
        assert!(History::default().add_log(&format!("{bad}\n")).is_err(), "{bad}");
    }
    let mut history = History::default();
    history.add_log("begin 0 5 2 1.1 1\nwrite 0 5 1.1 1 2 ok\nwrite 0 6 1.1 1 2").unwrap();
    let counts = HistoryCounts { writes: 1, unknown: 1, ..HistoryCounts::default() };
    assert_eq!(history.counts(), counts);
}

/// What is wrong if this value is found after a crash between 100 and 110.
fn after_crash(short: &str, found: u32) -> Option<Fault> {
    let cells = if found == 0 { HashMap::new() } else { HashMap::from([(PLACE, Some(value(found)))]) };
    let image = CrashImage { begin: 100, end: 110, cells };
    let violations = history(short).check_images(&[image]);
    assert!(violations.len() <= 1, "{violations:?}");
    violations.into_iter().next().map(|(_, violation)| violation.fault)
}

#[test]
fn after_a_crash_there_is_what_was_synced_or_something_newer() {
    let lost = |found, synced| Some(Fault::Lost { found: value(found), synced: value(synced) });
    let synced = "w 1 1 2\nw 2 3 4\ns 5 6\nw 3 7 8\nw 4 9";

    for (found, is_lost) in [(0, true), (1, true), (2, false), (3, false), (4, false)] {
        let fault = after_crash(synced, found);
        assert_eq!(matches!(fault, Some(Fault::Lost { .. })), is_lost, "{found}: {fault:?}");
    }
    assert_eq!(after_crash(synced, 1), lost(1, 2));
    // Not synced: a write that had not ended when the fsync began, and an fsync that had not ended.
    for not_synced in
        ["w 1 1 2\nw 2 3 5\ns 5 6", "w 1 1 2\nw 2 3 4\ns 5 100", "w 1 1 2\nw 2 3 4\ns 5 6 unknown"]
    {
        assert_eq!(after_crash(not_synced, 1), None, "{not_synced}");
    }
    // A write of unknown outcome counts if it was seen before.
    assert_eq!(after_crash("w 1 1\nfence 2\ns 5 6", 0), None);
    assert_eq!(after_crash("w 1 1\nr 1 2 3\ns 5 6", 0), lost(0, 1));
    // Writes at the same time: whichever.
    assert_eq!(after_crash("w 1 1 4\nw 2 1 4\ns 5 6", 1), None);
}

#[test]
fn what_a_failed_fsync_dropped_is_not_missed_and_what_was_synced_before_is() {
    assert_eq!(after_crash("w 1 1 2\ns 3 4 failed\ns 5 6", 0), None);
    let fault = after_crash("w 1 1 2\ns 3 4\ns 5 6 failed\ns 7 8", 0);
    assert!(matches!(fault, Some(Fault::Lost { .. })), "{fault:?}");
    let fault = after_crash("s 1 2 failed\nw 1 3 4\ns 5 6", 0);
    assert!(matches!(fault, Some(Fault::Lost { .. })), "{fault:?}");
}

#[test]
fn after_a_crash_there_is_nothing_that_was_not_written() {
    assert_eq!(after_crash("w 1 1 2 failed", 1), Some(Fault::NotDone(value(1))));
    assert_eq!(after_crash("w 1 111 112", 1), Some(Fault::Early(value(1))));
    assert_eq!(after_crash("w 1 1 2", 7), Some(Fault::Unwritten(value(7))));
    let other = CellPlace { cell: 6, ..PLACE };
    for (found, fault) in
        [(Some(value(1)), Fault::Unwritten(value(1))), (None, Fault::Broken("after a crash".into()))]
    {
        let image = CrashImage { begin: 100, end: 110, cells: HashMap::from([(other, found)]) };
        let violations = history("w 1 1 2").check_images(&[image]);
        assert_eq!(violations, [(0, Violation { place: other, fault })]);
    }
}

/// An operation on a cell: of a write of that value, or a read.
#[derive(Clone, Debug)]
struct Step {
    is_write: bool,
    value: u32,
    begin: u64,
    end: u64,
    outcome: Outcome,
}

/// Whether some order of the operations is that of a register. It tries all of them.
fn is_linearizable(steps: &[Step], content: u32) -> bool {
    if !steps.iter().any(|step| step.outcome == Outcome::Ok) {
        return true; // the others need not happen
    }
    (0..steps.len()).any(|next| {
        let step = &steps[next];
        let may_be_next = steps.iter().all(|other| step.begin <= other.end);
        if !may_be_next || (!step.is_write && step.value != content) {
            return false;
        }
        let mut rest = steps.to_vec();
        rest.remove(next);
        // One of unknown outcome may also be left out.
        (step.outcome == Outcome::Unknown && is_linearizable(&rest, content))
            || is_linearizable(&rest, if step.is_write { step.value } else { content })
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let times = || (1u64..24, 0u64..8);
    let write = (times(), 0..4u8).prop_map(|((begin, length), how)| (begin, begin + length, how));
    let writes = prop::collection::vec(write, 0..4);
    let reads = prop::collection::vec((times(), 0..4u32), 0..5);
    (writes, reads).prop_map(|(writes, reads)| {
        let count = writes.len() as u32;
        let mut steps: Vec<_> = (1..)
            .zip(writes)
            .map(|(value, (begin, end, how))| match how {
                0 => Step { is_write: true, value, begin, end: FOREVER, outcome: Outcome::Unknown },
                1 => Step { is_write: true, value, begin, end, outcome: Outcome::Unknown },
                _ => Step { is_write: true, value, begin, end, outcome: Outcome::Ok },
            })
            .collect();
        steps.extend(reads.into_iter().map(|((begin, length), value)| Step {
            is_write: false,
            value: value % (count + 1),
            begin,
            end: begin + length,
            outcome: Outcome::Ok,
        }));
        steps
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn the_checker_agrees_with_one_that_tries_every_order(steps in steps()) {
        // In logs of one operation each, so that each fence is for one write.
        let mut history = History::default();
        for step in &steps {
            let (value, begin, end) = (value(step.value), step.begin, step.end);
            let first = LogLine::Begin { place: PLACE, count: 1, value, begin };
            let log = match (step.is_write, step.outcome) {
                (false, _) => format!("{}\n", LogLine::Read(CellRead { place: PLACE, value, begin, end })),
                (true, Outcome::Unknown) if end == FOREVER => format!("{first}\n"),
                (true, Outcome::Unknown) => format!("{first}\n{}\n", LogLine::Fence(end)),
                (true, outcome) => {
                    let last = LogLine::Write(CellWrite { place: PLACE, value, begin, end, outcome });
                    format!("{first}\n{last}\n")
                }
            };
            history.add_log(&log).unwrap();
        }
        let violations = history.check();
        prop_assert_eq!(violations.is_empty(), is_linearizable(&steps, 0), "{:?}", violations);
    }
}

#[test]
fn a_cell_with_any_bit_flipped_or_at_another_place_is_broken() {
    let place = CellPlace { file: 1, cell: 77 };
    let value = CellValue { client: 3, sequence: 0x1_0203 };
    let bytes = encode_cell(place, value);
    assert_eq!(decode_cell(place, &bytes), Some(value));
    assert_eq!(decode_cell(CellPlace { file: 0, ..place }, &bytes), None);
    assert_eq!(decode_cell(CellPlace { cell: 78, ..place }, &bytes), None);
    for bit in 0..CELL_BYTES * 8 {
        let mut flipped = bytes;
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(decode_cell(place, &flipped), None, "bit {bit}");
    }
    assert_eq!(decode_cell(place, &[0; CELL_BYTES]), Some(INITIAL));
}
