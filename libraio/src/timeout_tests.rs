//! Timeouts of single operations, against a server that is slow, silent or away.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use raio_transport::handshake::Policy;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::fake_server::{FakeServer, collect, until};
use crate::test_buffers::{bytes_of, pattern};
use crate::{
    Buffer, Buffers, Completion, Context, File, Lock, Operation, Options, Scheme, Session, SubmitOptions,
};

const TIMEOUT: Duration = Duration::from_millis(60);

fn in_time() -> SubmitOptions {
    SubmitOptions { timeout: Some(TIMEOUT), ..SubmitOptions::default() }
}

fn start() -> (FakeServer, Session, File, Context) {
    let policy = Policy { queue_depth: 2, data_bytes_max: 64 << 10, ..Policy::default() };
    let server = FakeServer::start(policy);
    server.file("/e/data", pattern(1 << 20));
    let session = Session::connect_to(Scheme::Tcp, server.address, &Options::default()).unwrap();
    let file = session.open("/e/data", libc::O_RDWR, 0).unwrap();
    let context = session.context(8).unwrap();
    (server, session, file, context)
}

fn read(len: usize) -> Operation {
    Operation::Read { offset: 0, buffers: Buffers::One(Buffer::Owned(vec![0; len].into())) }
}

fn write(bytes: &[u8]) -> Operation {
    Operation::Write { offset: 0, buffers: Buffers::One(Buffer::Owned(bytes.into())) }
}

/// How it has failed, and whether it may have been done.
fn failure(completion: &Completion) -> (i32, bool) {
    let error = completion.result.as_ref().unwrap_err();
    (error.errno(), error.is_unknown)
}

/// The context does what it is asked, with all its credits.
fn assert_works(context: &mut Context, file: &File) {
    for n in 0..8 {
        context.submit(file, read(1000), n).unwrap();
    }
    context.flush();
    assert!(collect(context, 8).into_iter().all(|completion| completion.result == Ok(1000)));
    let stats = context.stats();
    assert_eq!((stats.in_flight, stats.submitted), (0, stats.completed));
}

#[test]
fn an_operation_that_is_over_in_time_does_not_hear_of_its_timeout() {
    let (_server, _session, file, mut context) = start();
    for n in 0..100 {
        context.submit_with(&file, read(1000), in_time(), n).unwrap();
        assert_eq!(collect(&mut context, 1)[0].result, Ok(1000));
    }
    std::thread::sleep(TIMEOUT);
    assert_works(&mut context, &file);
    assert_eq!(context.stats().failed, 0);
}

#[test]
fn an_operation_that_was_not_sent_in_time_was_not_done() {
    let (server, _session, file, mut context) = start();
    server.hold(true);
    for n in 0..2 {
        context.submit(&file, read(1000), n).unwrap();
    }
    context.submit_with(&file, write(b"late"), in_time(), 2).unwrap();
    context.submit_with(&file, Operation::ReadLent { offset: 0, length: 10 }, in_time(), 3).unwrap();
    let late = collect(&mut context, 2);
    assert_eq!([failure(&late[0]), failure(&late[1])], [(libc::ETIMEDOUT, false); 2]);
    assert_eq!(context.stats().in_flight, 2, "those without a timeout wait");
    server.hold(false);
    collect(&mut context, 2);
    assert_works(&mut context, &file);
    assert_eq!(server.writes(), 0);
}

#[test]
fn an_operation_that_the_server_cancels_was_not_done() {
    let (server, _session, file, mut context) = start();
    server.hold(true);
    context.submit_with(&file, write(b"late"), in_time(), 0).unwrap();
    context.submit_with(&file, read(1000), in_time(), 1).unwrap();
    context.flush();
    let begin = Instant::now();
    let late = collect(&mut context, 2);
    assert!(begin.elapsed() >= TIMEOUT);
    assert_eq!([failure(&late[0]), failure(&late[1])], [(libc::ETIMEDOUT, false); 2]);
    server.hold(false);
    assert_works(&mut context, &file);
    assert_eq!(server.writes(), 0);
}

#[test]
fn an_operation_that_the_server_does_not_answer_ends_and_its_buffers_come_back() {
    let (server, _session, file, mut context) = start();
    server.mute(true);
    context.submit_with(&file, write(b"written"), in_time(), 0).unwrap();
    context.submit_with(&file, read(1000), in_time(), 1).unwrap();
    context.flush();
    let mut late = collect(&mut context, 2);
    assert_eq!(failure(&late[0]), (libc::ETIMEDOUT, true), "it may be done yet");
    assert_eq!(failure(&late[1]), (libc::ETIMEDOUT, false));
    assert_eq!(context.stats().unknown, 1);
    assert_eq!(bytes_of(late.pop().unwrap()), [0; 1000], "nothing was read");
    let mut own = late.pop().unwrap().buffers.unwrap();
    own.write_at(0, b"changed");
    server.mute(false);
    assert_works(&mut context, &file);
    assert_eq!(&server.contents("/e/data")[..7], b"written", "as it was when it was submitted");
}

#[test]
fn a_lock_that_the_server_takes_late_is_one_that_may_be_lost() {
    for (late, is_lost) in [(Lock::Exclusive, true), (Lock::Unlock, false)] {
        let (server, _session, file, mut context) = start();
        if late == Lock::Unlock {
            context.submit(&file, Operation::Lock(Lock::Shared), 0).unwrap();
            assert_eq!(collect(&mut context, 1)[0].result, Ok(0));
        }
        server.mute(true);
        context.submit_with(&file, Operation::Lock(late), in_time(), 0).unwrap();
        context.flush();
        let completion = &collect(&mut context, 1)[0];
        assert_eq!(failure(completion), (libc::ETIMEDOUT, true));
        assert!(completion.result.as_ref().unwrap_err().text.contains("may have been done"));
        server.mute(false);
        assert_works(&mut context, &file);
        assert!(!context.has_abandoned());
        server.restart(0);
        context.submit(&file, read(1000), 0).unwrap();
        let result = collect(&mut context, 1).remove(0).result;
        assert_eq!(result.map_err(|error| error.errno()), if is_lost { Err(libc::ENOLCK) } else { Ok(1000) });
    }
}

#[test]
fn the_source_of_a_copy_that_is_late_is_in_use_until_the_server_has_answered() {
    let (server, session, file, mut context) = start();
    let source = session.open("/e/data", libc::O_RDONLY, 0).unwrap();
    server.mute(true);
    let copy = Operation::Copy { offset: 0, source: source.as_source(), source_offset: 0, length: 10 };
    context.submit_with(&file, copy, in_time(), 0).unwrap();
    context.flush();
    assert_eq!(failure(&collect(&mut context, 1)[0]), (libc::ETIMEDOUT, true));
    assert_eq!(source.begin_close(), None, "it may be read from yet");
    server.mute(false);
    assert_works(&mut context, &file);
    until("it is not closed", || {
        context.wait(0, 1, None).unwrap();
        server.open() <= 1
    });
}

#[test]
fn a_long_operation_ends_with_what_was_done_of_it_in_time() {
    let (server, _session, file, mut context) = start();
    for silent in [false, true] {
        server.hold(!silent);
        server.mute(silent);
        context.submit_with(&file, read(500_000), in_time(), 0).unwrap();
        context.submit_with(&file, write(&pattern(300_000)), in_time(), 1).unwrap();
        context.flush();
        let late = collect(&mut context, 2);
        assert_eq!(failure(&late[0]), (libc::ETIMEDOUT, false));
        // It was not sent: the parts of the first have the credits.
        assert_eq!(failure(&late[1]), (libc::ETIMEDOUT, false));
        server.hold(false);
        server.mute(false);
        assert_works(&mut context, &file);
    }
    server.mute(true);
    context.submit_with(&file, write(&pattern(300_000)), in_time(), 1).unwrap();
    context.flush();
    assert_eq!(failure(&collect(&mut context, 1)[0]), (libc::ETIMEDOUT, true));
    server.mute(false);
    assert_works(&mut context, &file);
}

#[test]
fn while_the_server_is_away_an_operation_ends_in_time() {
    let (server, _session, file, mut context) = start();
    server.mute(true);
    server.reject(Some(0));
    context.submit_with(&file, write(b"sent"), in_time(), 0).unwrap();
    context.submit_with(&file, read(1000), in_time(), 1).unwrap();
    context.submit_with(&file, write(b"not sent"), in_time(), 2).unwrap();
    context.flush();
    context.wait(1, 1, Some(Duration::from_millis(20))).unwrap();
    server.die();
    let late = collect(&mut context, 3);
    assert!(context.reconnecting().is_some());
    assert_eq!(failure(&late[0]).0, libc::ETIMEDOUT);
    assert_eq!([failure(&late[1]), failure(&late[2])], [(libc::ETIMEDOUT, false); 2]);
    server.mute(false);
    server.reject(None);
    assert_works(&mut context, &file);
    assert_ne!(&server.contents("/e/data")[..8], b"not sent");
}

#[test]
fn the_poll_descriptor_is_readable_when_a_timeout_has_passed() {
    let (server, _session, file, mut context) = start();
    server.mute(true);
    let fd = context.poll_fd().unwrap().try_clone_to_owned().unwrap();
    context.submit_with(&file, read(1000), in_time(), 0).unwrap();
    context.flush();
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut polls = 0;
    loop {
        context.wait(0, 8, None).unwrap();
        if let Some(completion) = context.next() {
            assert_eq!(failure(&completion), (libc::ETIMEDOUT, false));
            break;
        }
        context.sync_poller();
        let left = Timespec { tv_sec: 5, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)).unwrap(), 1);
        polls += 1;
        assert!(Instant::now() < deadline && polls < 20, "it is readable all the time");
    }
}

#[test]
fn a_cancel_while_others_time_out_is_answered() {
    let (server, _session, file, mut context) = start();
    server.hold(true);
    for round in 0..20 {
        let first = context.submit(&file, write(b"cancelled"), 0).unwrap();
        context.submit_with(&file, read(1000), in_time(), 1).unwrap();
        context.flush();
        std::thread::sleep(TIMEOUT + Duration::from_millis(round % 3));
        assert_eq!(context.cancel(first).unwrap().token, 0);
        assert_eq!(failure(&collect(&mut context, 1)[0]), (libc::ETIMEDOUT, false));
    }
    server.hold(false);
    assert_works(&mut context, &file);
    assert_eq!(server.writes(), 0);
}

#[test]
fn a_cancel_behind_one_that_hangs_ends_soon_and_the_connection_stays() {
    let (server, _session, file, mut context) = start();
    server.mute(true);
    context.submit_with(&file, read(1000), in_time(), 0).unwrap();
    let second = context.submit(&file, read(1000), 1).unwrap();
    context.flush();
    assert_eq!(failure(&collect(&mut context, 1)[0]), (libc::ETIMEDOUT, false));
    let begin = Instant::now();
    assert_eq!(context.cancel(second).unwrap_err().errno(), libc::EAGAIN);
    assert!(begin.elapsed() < Duration::from_secs(5));
    server.mute(false);
    let completion = &collect(&mut context, 1)[0];
    assert_eq!((completion.token, &completion.result), (1, &Ok(1000)));
    assert_works(&mut context, &file);
    assert_eq!(context.stats().reconnects, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn whatever_the_server_does_each_operation_ends_once(
        steps in prop::collection::vec((0..12_u8, any::<bool>(), 1..120_000_usize), 30..60),
    ) {
        let (server, _session, file, mut context) = start();
        server.fill("/e/data", 1);
        let (mut submitted, mut ended) = (Vec::new(), Vec::new());
        let end = |completion: Completion, ended: &mut Vec<u64>| {
            match (&completion.result, &completion.buffers) {
                (Err(error), _) => {
                    assert!([libc::ETIMEDOUT, libc::ECANCELED].contains(&error.errno()), "{error}");
                }
                (Ok(n), Some(buffers)) if completion.token.is_multiple_of(2) => {
                    let mut read = buffers.slices(0..*n as usize).flatten();
                    assert_eq!(read.find(|&&byte| byte != 1), None);
                }
                (Ok(_), _) => {}
            }
            ended.push(completion.token);
            if completion.is_lent {
                return completion.buffers;
            }
            None
        };
        for (step, has_timeout, len) in steps {
            let timeout = has_timeout.then(|| Duration::from_millis(len as u64 % 40));
            let options = SubmitOptions { timeout, ..SubmitOptions::default() };
            match step {
                0..=5 => {
                    // Writes have odd tokens.
                    let buffers = Buffers::One(Buffer::Owned(vec![u8::from(step > 3); len].into()));
                    let (token, operation) = match step {
                        0..=2 => (submitted.len() as u64 * 2, Operation::Read { offset: 0, buffers }),
                        3 => (submitted.len() as u64 * 2, Operation::ReadLent { offset: 0, length: len }),
                        _ => (submitted.len() as u64 * 2 + 1, Operation::Write { offset: 0, buffers }),
                    };
                    if let Ok(ticket) = context.submit_with(&file, operation, options, token) {
                        context.flush();
                        submitted.push((token, ticket));
                    }
                }
                6 => server.hold(has_timeout),
                7 => server.mute(has_timeout),
                8 if has_timeout => server.die(),
                9 => {
                    if let Some(&(_, ticket)) = submitted.get(len % submitted.len().max(1))
                        && !has_timeout
                    {
                        server.mute(false);
                        if let Ok(completion) = context.cancel(ticket) {
                            end(completion, &mut ended);
                        }
                    }
                }
                _ => {
                    context.wait(1, 8, Some(Duration::from_millis(len as u64 % 60))).unwrap();
                    while let Some(completion) = context.next() {
                        if let Some(lent) = end(completion, &mut ended) {
                            context.release(lent);
                        }
                    }
                }
            }
        }
        server.hold(false);
        server.mute(false);
        for completion in collect(&mut context, submitted.len() - ended.len()) {
            if let Some(lent) = end(completion, &mut ended) {
                context.release(lent);
            }
        }
        ended.sort_unstable();
        let mut expected: Vec<_> = submitted.iter().map(|(token, _)| *token).collect();
        expected.sort_unstable();
        prop_assert_eq!(ended, expected);
        assert_works(&mut context, &file);
        prop_assert!(!context.has_abandoned());
    }
}
