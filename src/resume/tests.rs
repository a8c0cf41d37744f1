use super::*;
use crate::protocol::{FLAG_BLAKE3, FLAG_LOCK_SHARED, OPEN_CREATE, OPEN_READ, OPEN_WRITE};

const WINDOW: Duration = Duration::from_secs(60);

fn encoded(command: Command<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    command.encode(&mut bytes);
    bytes
}

fn open(flags: u32) -> Vec<u8> {
    encoded(Command::Open { flags, mode: 0o644, path: b"/e/f" })
}

/// Commands that must not run twice, opens left out.
fn mutations() -> Vec<Vec<u8>> {
    let (file, offset) = (FileHandle(3), 4096);
    vec![
        encoded(Command::Write { file, offset, length: 512 }),
        encoded(Command::Discard { file, offset, length: 512 }),
        encoded(Command::WriteZeroes { file, offset, length: 512 }),
        encoded(Command::Allocate { file, offset, length: 512, keep_size: false }),
        encoded(Command::Copy {
            source: file,
            offset,
            length: 512,
            destination: FileHandle(4),
            destination_offset: 0,
        }),
    ]
}

/// Commands that may be sent again whatever became of them.
fn repeatable() -> Vec<Vec<u8>> {
    let file = FileHandle(3);
    vec![
        encoded(Command::Read { file, offset: 0, length: 512 }),
        encoded(Command::Stat(file)),
        encoded(Command::Fsync { file, data_only: true }),
        encoded(Command::Checksum { file, offset: 0, length: 512, checksum: FLAG_BLAKE3 }),
        encoded(Command::Lock { file, lock: FLAG_LOCK_SHARED }),
    ]
}

/// A channel that has just lost its connection, and when.
fn lost() -> (Machine, Instant) {
    let now = Instant::now();
    let mut machine = Machine::new(1, WINDOW, 7);
    machine.on_loss(now, true);
    (machine, now)
}

/// One that has welcomed.
fn resolving() -> (Machine, Instant) {
    let (mut machine, now) = lost();
    assert!(matches!(machine.step(now), Step::Dial(..)));
    machine.on_dialed();
    (machine, now)
}

#[test]
fn what_may_run_twice_is_sent_again() {
    for command in repeatable() {
        for was_sent in [false, true] {
            let fate = at_loss(&command, was_sent);
            assert_eq!(fate, Fate::Again);
            assert_eq!(at_gone(&command, fate, false), Fate::Again);
        }
    }
}

#[test]
fn what_must_not_run_twice_is_asked_for_unless_the_server_cannot_have_it() {
    for command in mutations().into_iter().chain([open(OPEN_READ)]) {
        assert_eq!(at_loss(&command, true), Fate::Ask);
        assert_eq!(at_loss(&command, false), Fate::Again);
    }
}

#[test]
fn the_servers_answer_decides() {
    assert_eq!(after_outcome(None), Fate::Again);
    let full = Status::storage(libc::ENOSPC);
    let end = End { status: full, result: 100, is_unknown: false };
    assert_eq!(after_outcome(Some((full, 100))), Fate::Over(end));
}

#[test]
fn without_an_answer_a_mutation_is_unknown_unless_it_may_be_redone() {
    for command in mutations() {
        assert_eq!(at_gone(&command, Fate::Ask, false), Fate::Over(End::UNKNOWN));
        assert_eq!(at_gone(&command, Fate::Ask, true), Fate::Again);
        // One that was never sent is no riddle.
        assert_eq!(at_gone(&command, Fate::Again, false), Fate::Again);
    }
}

#[test]
fn an_open_is_repeated_unless_that_would_destroy_or_contradict() {
    for redo in [false, true] {
        assert_eq!(at_gone(&open(OPEN_WRITE | OPEN_CREATE), Fate::Ask, redo), Fate::Again);
        for once in [OPEN_CREATE | OPEN_EXCLUSIVE, OPEN_TRUNCATE] {
            assert_eq!(at_gone(&open(OPEN_WRITE | once), Fate::Ask, redo), Fate::Over(End::UNKNOWN));
            assert_eq!(at_gone(&open(OPEN_WRITE | once), Fate::Again, redo), Fate::Again);
        }
    }
}

#[test]
fn a_close_is_repeated_and_a_cancel_ends_with_the_connection() {
    let close = encoded(Command::Close(FileHandle(1)));
    for was_sent in [false, true] {
        // The file might stay open. If it does not, the second close fails with EBADF.
        assert_eq!(at_loss(&close, was_sent), Fate::Again);
    }
    assert_eq!(at_gone(&close, Fate::Again, false), Fate::Again);
    let cancel = encoded(Command::Cancel { id: 7 });
    for was_sent in [false, true] {
        let Fate::Over(end) = at_loss(&cancel, was_sent) else { panic!("it goes with the connection") };
        assert_eq!((end.status.errno, end.is_unknown), (libc::EAGAIN, false));
    }
}

#[test]
fn a_channel_that_is_given_up_says_what_may_have_happened() {
    let status = Status::transport(libc::ETIMEDOUT);
    assert!(at_failure(Fate::Ask, status).is_unknown);
    assert!(!at_failure(Fate::Again, status).is_unknown);
    assert_eq!(at_failure(Fate::Over(End::SUCCESS), status), End::SUCCESS);
}

#[test]
fn a_file_that_is_another_one_is_stale() {
    assert_eq!(at_reopen_failure(Status::storage(libc::ENOENT)).status.errno, libc::ESTALE);
    assert_eq!(at_reopen_failure(Status::policy(libc::EROFS)).status.errno, libc::EROFS);
    for command in repeatable().into_iter().chain(mutations()) {
        assert_eq!(files_of(&command)[0], Some(FileHandle(3)));
    }
    assert_eq!(files_of(&open(OPEN_READ)), [None; 2]);
    assert_eq!(files_of(&mutations()[4]), [Some(FileHandle(3)), Some(FileHandle(4))]);
}

#[test]
fn the_first_attempt_comes_at_once_and_with_a_higher_epoch() {
    let (mut machine, now) = lost();
    assert_eq!(machine.step(now), Step::Dial(2, now + WINDOW));
    assert_eq!(machine.step(now), Step::Wait(now + WINDOW));
    machine.on_dialed();
    assert_eq!(machine.state(), State::Resolving);
    machine.on_resolved(false);
    assert_eq!((machine.state(), machine.step(now)), (State::Connected, Step::None));
}

#[test]
fn a_channel_that_is_gone_reopens_before_it_is_connected() {
    let (mut machine, now) = resolving();
    machine.on_resolved(true);
    assert_eq!(machine.state(), State::Reopening);
    assert!(matches!(machine.step(now), Step::Wait(_)));
    machine.on_reopened();
    assert_eq!(machine.state(), State::Connected);
}

#[test]
fn pauses_grow_up_to_five_seconds_and_the_epoch_rises_with_each_attempt() {
    let now = Instant::now();
    let mut machine = Machine::new(1, Duration::from_secs(100_000), 1);
    machine.on_loss(now, true);
    let (mut at, mut longest) = (now, Duration::ZERO);
    for attempt in 0..200 {
        assert!(matches!(machine.step(at), Step::Dial(epoch, _) if epoch == attempt + 2));
        machine.on_dial_failed(at, false);
        let State::Lost(next) = machine.state() else { panic!("it tries again") };
        let pause = next - at;
        let most = Duration::from_millis(100 << attempt.min(6)).min(PAUSE_MAX);
        assert!(pause <= most, "{attempt}: {pause:?}");
        longest = longest.max(pause);
        if pause > Duration::ZERO {
            assert_eq!(machine.step(at), Step::Wait(next));
        }
        at = next;
    }
    assert!(longest > PAUSE_MAX / 2, "they are spread over the whole: {longest:?}");
}

#[test]
fn clients_that_lose_a_server_together_do_not_return_together() {
    let pause = |seed| {
        let now = Instant::now();
        let mut machine = Machine::new(1, WINDOW, seed);
        machine.on_loss(now, true);
        machine.step(now);
        machine.on_dial_failed(now, false);
        let State::Lost(at) = machine.state() else { panic!("it tries again") };
        at - now
    };
    assert_ne!(pause(1), pause(2));
    assert_eq!(pause(1), pause(1));
}

#[test]
fn the_window_ends_every_state_that_is_not_connected() {
    let dialing = || {
        let (mut machine, now) = lost();
        machine.step(now);
        (machine, now)
    };
    let reopening = || {
        let (mut machine, now) = resolving();
        machine.on_resolved(true);
        (machine, now)
    };
    for (mut machine, now) in [lost(), dialing(), resolving(), reopening()] {
        let end = now + WINDOW;
        assert_eq!(machine.end(), Some(end));
        assert_eq!(machine.step(end), Step::GiveUp);
        assert_eq!((machine.state(), machine.step(end), machine.end()), (State::Failed, Step::None, None));
    }
}

#[test]
fn a_final_rejection_ends_it_and_others_are_tried_again() {
    let rejected = |errno| Error::Rejected { status: Status::policy(errno), text: String::new() };
    for (error, expected) in [
        (rejected(libc::ESTALE), true),
        (rejected(libc::EACCES), true),
        (rejected(libc::EPROTONOSUPPORT), true),
        (rejected(libc::EUSERS), false),
        (rejected(libc::ESHUTDOWN), false),
        (Error::io("connecting", std::io::Error::from_raw_os_error(libc::ECONNREFUSED)), false),
        (Error::Unsupported("no".into()), true),
    ] {
        assert_eq!(is_final(&error), expected, "{error}");
        let (mut machine, now) = lost();
        machine.step(now);
        machine.on_dial_failed(now, is_final(&error));
        assert_eq!(machine.state() == State::Failed, expected);
    }
}

#[test]
fn connections_that_break_before_they_are_of_use_do_not_renew_the_window() {
    let (mut machine, now) = resolving();
    let later = now + Duration::from_secs(1);
    machine.on_loss(later, false);
    assert_eq!(machine.end(), Some(now + WINDOW));
    let State::Lost(at) = machine.state() else { panic!("it tries again") };
    assert!(at <= later + PAUSE_FIRST);
    assert!(matches!(machine.step(at), Step::Dial(3, _)));
    machine.on_dialed();
    machine.on_resolved(false);
    // Connected, but nothing was answered.
    machine.on_loss(later, false);
    assert_eq!(machine.end(), Some(now + WINDOW));
    let State::Lost(at) = machine.state() else { panic!("it tries again") };
    machine.step(at);
    machine.on_dialed();
    machine.on_resolved(false);
    machine.on_loss(later, true);
    assert_eq!((machine.state(), machine.end()), (State::Lost(later), Some(later + WINDOW)));
}

#[test]
fn a_connection_was_of_use_that_answered_or_that_was_whole_for_a_while() {
    let machine = Machine::new(1, WINDOW, 0);
    let short = Machine::new(1, PAUSE_MAX / 10, 0);
    let (none, long) = (Duration::ZERO, PAUSE_MAX + Duration::from_nanos(1));
    for (has_answered, is_violation, good_for, expected) in [
        (true, false, none, true),
        (true, true, none, false),
        (false, false, none, false),
        (false, true, none, false),
        (false, false, PAUSE_MAX, false),
        (false, false, long, true),
        (true, true, long, true),
    ] {
        let was_useful = machine.was_useful(has_answered, is_violation, good_for);
        assert_eq!(was_useful, expected, "{has_answered} {is_violation} {good_for:?}");
    }
    assert!(short.was_useful(false, false, PAUSE_MAX / 9) && !short.was_useful(false, false, PAUSE_MAX / 10));
}

#[test]
fn what_comes_too_late_changes_nothing() {
    let (mut machine, now) = lost();
    machine.give_up();
    machine.on_loss(now, true);
    machine.on_dial_failed(now, false);
    machine.on_dialed();
    machine.on_resolved(false);
    machine.on_reopened();
    assert_eq!(machine.state(), State::Failed);
    let (mut machine, now) = lost();
    machine.on_loss(now + WINDOW / 2, true);
    assert_eq!(machine.end(), Some(now + WINDOW), "it was lost already");
}
