//! Operations that are longer than a request may be, as a program sees them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use raio_transport::handshake::Policy;

use crate::fake_server::{FakeServer, collect, with_crc};
use crate::test_buffers::{bytes_of, pattern};
use crate::{Buffer, Buffers, Completion, Context, Crc, File, Operation, Options, Scheme, Session};

const PATH: &str = "/e/data";
const IO_MAX: usize = 8192;
const LONG: usize = 10 * IO_MAX + 1234;
const DEPTH: u32 = 4;

fn start(options: &Options) -> (FakeServer, Session, File, Context) {
    let policy = Policy { queue_depth: DEPTH, data_bytes_max: IO_MAX as u32, ..Policy::default() };
    let server = FakeServer::start(policy);
    server.file(PATH, Vec::new());
    let session = Session::connect_to(Scheme::Tcp, server.address, options).unwrap();
    let file = session.open(PATH, libc::O_RDWR, 0).unwrap();
    let context = session.context(16).unwrap();
    (server, session, file, context)
}

/// Buffers with these bytes, in pieces of these lengths, the last as long as need be.
fn pieces(mut bytes: &[u8], lengths: &[usize]) -> Buffers {
    let mut all = Vec::new();
    for &len in lengths {
        let (now, later) = bytes.split_at(len.min(bytes.len()));
        all.push(Buffer::Owned(now.into()));
        bytes = later;
    }
    if lengths.is_empty() {
        return Buffers::One(Buffer::Owned(bytes.into()));
    }
    all.push(Buffer::Owned(bytes.into()));
    Buffers::Many(all)
}

fn write(offset: u64, bytes: &[u8]) -> Operation {
    Operation::Write { offset, buffers: pieces(bytes, &[]) }
}

fn read(offset: u64, len: usize) -> Operation {
    Operation::Read { offset, buffers: pieces(&vec![0; len], &[]) }
}

/// Until the server has cut the connections, which it does not let the client make again.
fn wait_for_cut(server: &FakeServer, context: &mut Context) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while server.is_to_cut() {
        assert!(Instant::now() < deadline);
        assert_eq!(context.wait(1, 1, Some(Duration::from_millis(5))), Ok(0));
    }
}

fn one(context: &mut Context, file: &File, operation: Operation) -> Completion {
    context.submit(file, operation, 0).unwrap();
    collect(context, 1).remove(0)
}

#[test]
fn an_operation_of_any_length_is_one_completion() {
    for lengths in [&[][..], &[1, 0, 5], &[IO_MAX], &[IO_MAX - 1, IO_MAX, 2], &[3; 1000]] {
        for crc in [Crc::Off, Crc::On] {
            let (server, _session, file, mut context) = start(&Options { crc, ..Options::default() });
            let data = pattern(LONG);
            let operation = Operation::Write { offset: 5, buffers: pieces(&data, lengths) };
            let written = one(&mut context, &file, operation);
            assert_eq!(written.result, Ok(LONG as u64));
            assert_eq!(bytes_of(written), data, "the buffers come back");
            assert_eq!(server.contents(PATH)[5..], data);
            assert_eq!(server.writes(), 11);
            let buffers = pieces(&vec![0; LONG], lengths);
            let was_read = one(&mut context, &file, Operation::Read { offset: 5, buffers });
            assert_eq!(was_read.result, Ok(LONG as u64));
            assert_eq!(bytes_of(was_read), data);
            let lent = one(&mut context, &file, Operation::ReadLent { offset: 5, length: LONG });
            assert!(lent.is_lent && lent.result == Ok(LONG as u64));
            assert!(bytes_of(lent) == data);
            let stats = context.stats();
            assert_eq!((stats.submitted, stats.completed, stats.failed, stats.in_flight), (3, 3, 0, 0));
            assert_eq!((stats.bytes_written, stats.bytes_read), (LONG as u64, 2 * LONG as u64));
        }
    }
}

#[test]
fn a_read_is_short_exactly_at_the_end_of_the_file() {
    let (server, session, _file, mut context) = start(&Options::default());
    for boundary in [0, 1, 4096, IO_MAX, 5 * IO_MAX] {
        for end in boundary.saturating_sub(1)..boundary + 2 {
            server.file("/e/short", pattern(end));
            let short = session.open("/e/short", libc::O_RDWR, 0).unwrap();
            let was_read = one(&mut context, &short, read(0, LONG));
            assert_eq!(was_read.result, Ok(end as u64));
            assert_eq!(bytes_of(was_read)[..end], pattern(end));
        }
    }
}

#[test]
fn a_write_that_fails_in_the_middle_has_done_what_is_before() {
    for full_at in [1, 4096, IO_MAX, IO_MAX + 1, 9 * IO_MAX + 7] {
        let (server, _session, file, mut context) = start(&Options::default());
        server.fill_up(full_at as u64);
        assert_eq!(one(&mut context, &file, write(0, &pattern(LONG))).result, Ok(full_at as u64));
        assert_eq!(server.contents(PATH), pattern(full_at));
        let error = one(&mut context, &file, write(full_at as u64, &pattern(LONG))).result.unwrap_err();
        assert_eq!((error.errno(), error.text.as_str()), (libc::ENOSPC, "It is full."));
        let stats = context.stats();
        assert_eq!((stats.failed, stats.bytes_written), (1, full_at as u64));
    }
}

#[test]
fn what_lies_behind_the_end_is_not_asked_for() {
    let (server, _session, file, mut context) = start(&Options::default());
    server.fill_up(100);
    assert_eq!(one(&mut context, &file, write(0, &pattern(1000 * IO_MAX))).result, Ok(100));
    assert!(server.writes() <= DEPTH as usize, "{}", server.writes());
}

#[test]
fn others_are_served_while_a_long_operation_is_under_way() {
    let (_server, _session, file, mut context) = start(&Options::default());
    context.submit(&file, write(0, &pattern(1000 * IO_MAX)), 0).unwrap();
    context.flush();
    for n in 1..8 {
        context.submit(&file, read(0, 10), n).unwrap();
    }
    context.flush();
    let mut tokens = Vec::new();
    while tokens.len() < 7 {
        context.wait(1, usize::MAX, None).unwrap();
        tokens.extend(std::iter::from_fn(|| context.next()).map(|completion| completion.token));
    }
    assert_eq!(tokens, [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(collect(&mut context, 1)[0].result, Ok(1000 * IO_MAX as u64));
}

#[test]
fn a_long_operation_can_be_cancelled_as_long_as_nothing_is_done() {
    let (server, _session, file, mut context) = start(&Options::default());
    server.hold(true);
    let eventfd = Arc::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap());
    let ticks = || {
        let mut count = [0; 8];
        rustix::io::read(&*eventfd, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    };
    for flushed in [false, true] {
        let ticket = context.submit(&file, write(0, &pattern(LONG)), 7).unwrap();
        context.notify(ticket, Arc::clone(&eventfd));
        if flushed {
            context.flush();
        }
        let cancelled = context.cancel(ticket).unwrap();
        assert_eq!((cancelled.token, cancelled.result.clone().unwrap_err().errno()), (7, libc::ECANCELED));
        assert_eq!(bytes_of(cancelled), pattern(LONG));
        assert_eq!((context.stats().in_flight, ticks()), (0, 0));
        assert_eq!(context.cancel(ticket).unwrap_err().errno(), libc::EINVAL);
    }
    // One that has begun ends with what it has done, in the normal way.
    server.hold(false);
    let ticket = context.submit(&file, write(0, &pattern(1000 * IO_MAX)), 8).unwrap();
    context.notify(ticket, Arc::clone(&eventfd));
    context.flush();
    while server.writes() < 2 {
        context.wait(0, 1, None).unwrap();
    }
    server.hold(true);
    assert_eq!(context.cancel(ticket).unwrap_err().errno(), libc::EAGAIN);
    server.hold(false);
    let done = collect(&mut context, 1).remove(0);
    let n = done.result.unwrap() as usize;
    assert!((IO_MAX..1000 * IO_MAX).contains(&n) && n.is_multiple_of(4096), "{n}");
    assert_eq!(server.contents(PATH)[..n], pattern(n));
    assert_eq!(ticks(), 1);
}

#[test]
fn wherever_a_connection_is_cut_a_long_operation_is_done_once() {
    for n in 0..12 {
        for executed in [false, true] {
            let (server, _session, file, mut context) = start(&Options::default());
            server.cut_at(n, executed);
            assert_eq!(one(&mut context, &file, write(0, &pattern(LONG))).result, Ok(LONG as u64));
            assert_eq!(server.contents(PATH), pattern(LONG));
            assert_eq!(server.writes(), 11, "cut at {n}, executed: {executed}");
            server.cut_at(n, executed);
            let was_read = one(&mut context, &file, read(0, LONG));
            assert_eq!(was_read.result, Ok(LONG as u64));
            assert_eq!(bytes_of(was_read), pattern(LONG));
        }
    }
}

#[test]
fn after_a_restart_in_the_middle_a_long_write_is_unknown_or_done_again() {
    for redo in [false, true] {
        let (server, _session, file, mut context) = start(&Options { redo, ..Options::default() });
        server.cut_at(6, true);
        server.reject(Some(libc::EUSERS));
        context.submit(&file, write(0, &pattern(LONG)), 0).unwrap();
        wait_for_cut(&server, &mut context);
        server.restart(0);
        server.reject(None);
        let result = collect(&mut context, 1).remove(0).result;
        if redo {
            assert_eq!(result, Ok(LONG as u64));
            assert_eq!(server.contents(PATH), pattern(LONG));
        } else {
            let error = result.unwrap_err();
            assert_eq!((error.errno(), error.is_unknown), (libc::ECONNRESET, true), "{error}");
            assert_eq!(context.stats().unknown, 1);
        }
    }
}

#[test]
fn an_fsync_after_a_restart_in_the_middle_says_that_the_first_part_may_be_lost() {
    let (server, session, file, _) = start(&Options::default());
    drop(file);
    server.restart(5);
    let file = session.open(PATH, libc::O_RDWR, 0).unwrap();
    let mut context = session.context(4).unwrap();
    server.cut_at(7, false);
    server.reject(Some(libc::EUSERS));
    let long = pattern(LONG);
    context.submit(&file, write(0, &long), 0).unwrap();
    wait_for_cut(&server, &mut context);
    server.restart(6);
    server.reject(None);
    let _ = collect(&mut context, 1);
    let error = one(&mut context, &file, Operation::Fsync { data_only: true }).result.unwrap_err();
    assert_eq!((error.errno(), error.is_lost), (libc::EIO, true));
}

#[test]
fn a_server_that_takes_less_after_a_restart_gets_smaller_parts() {
    let cases = [4096, 5000, 2 * IO_MAX as u32].map(|io_max| [(io_max, false), (io_max, true)]);
    for (io_max, has_crc) in cases.into_iter().flatten() {
        let submit = |context: &mut Context, file: &File, operation, token| {
            let ticket = match has_crc {
                true => context.submit_with(file, operation, with_crc(None), token),
                false => context.submit(file, operation, token),
            };
            ticket.unwrap()
        };
        let (server, session, file, mut context) = start(&Options { redo: true, ..Options::default() });
        // Sent, waiting for a credit, waiting for a lent buffer; whole and in parts.
        server.hold(true);
        for n in 0..3 {
            submit(&mut context, &file, write(n * LONG as u64, &pattern(LONG)), n);
        }
        for n in 3..10 {
            let offset = n * LONG as u64;
            submit(&mut context, &file, write(offset, &pattern(IO_MAX)), n);
        }
        submit(&mut context, &file, read(9 * LONG as u64, 10), 10);
        context.flush();
        server.reject(Some(libc::EUSERS));
        server.restart(0);
        assert_eq!(context.wait(1, 1, Some(Duration::from_millis(50))), Ok(0));
        server.set_io_max(io_max);
        server.hold(false);
        server.reject(None);
        for completion in collect(&mut context, 11).into_iter().take(10) {
            let len = if completion.token < 3 { LONG } else { IO_MAX };
            assert_eq!(completion.result, Ok(len as u64), "{}", completion.token);
            let offset = completion.token as usize * LONG;
            assert_eq!(server.contents(PATH)[offset..][..len], pattern(len));
        }
        assert_eq!(context.io_bytes_max(), io_max as usize);
        let lent = one(&mut context, &file, Operation::ReadLent { offset: 0, length: LONG });
        assert_eq!(bytes_of(lent), pattern(LONG));
        assert!(session.open(PATH, libc::O_RDWR, 0).is_ok());
    }
}

#[test]
fn a_long_operation_ends_with_its_session() {
    let options = Options { reconnect: Duration::ZERO, ..Options::default() };
    let (server, session, file, mut context) = start(&options);
    server.hold(true);
    context.submit(&file, write(0, &pattern(LONG)), 0).unwrap();
    context.submit(&file, read(0, LONG), 1).unwrap();
    context.flush();
    server.die();
    for (completion, is_unknown) in collect(&mut context, 2).into_iter().zip([true, false]) {
        let error = completion.result.unwrap_err();
        assert_eq!((error.is_unknown, error.status.class), (is_unknown, crate::Class::Transport), "{error}");
        assert_eq!(completion.buffers.unwrap().len(), LONG);
    }
    assert_eq!(context.stats().unknown, 1);
    drop((session, context));
    // Dropped in the middle of it; and a context that is closed waits for all of it.
    let (server, _session, file, mut context) = start(&Options::default());
    server.hold(true);
    context.submit(&file, write(0, &pattern(LONG)), 0).unwrap();
    context.flush();
    drop(context);
    server.hold(false);
    let (server, _session, file, mut context) = start(&Options::default());
    context.submit(&file, write(0, &pattern(LONG)), 0).unwrap();
    context.close();
    assert_eq!(server.contents(PATH), pattern(LONG));
}

#[test]
fn a_long_write_with_a_checksum_is_compared_before_it_is_sent_and_a_read_brings_one() {
    for features in [Crc::Off, Crc::On] {
        let (server, _session, file, mut context) = start(&Options { crc: features, ..Options::default() });
        let data = pattern(LONG);
        let crc = raio_transport::message::data_crc(&data);
        for (said, expected) in
            [(Some(crc ^ 1), Err(libc::EILSEQ)), (Some(crc), Ok(LONG as u64)), (None, Ok(LONG as u64))]
        {
            context.submit_with(&file, write(0, &data), with_crc(said), 0).unwrap();
            let written = collect(&mut context, 1).remove(0);
            assert_eq!(
                written.result.as_ref().map_err(|error| error.errno()),
                expected.as_ref().map_err(|&errno| errno)
            );
            assert_eq!(written.crc, None);
            assert!(server.contents(PATH) == if expected.is_ok() { &data[..] } else { &[] });
        }
        assert_eq!(context.stats().checksum_errors, 1);
        let buffers = pieces(&vec![0; LONG + 100], &[1, 5000]);
        for operation in
            [Operation::Read { offset: 0, buffers }, Operation::ReadLent { offset: 0, length: LONG }]
        {
            context.submit_with(&file, operation, with_crc(None), 0).unwrap();
            let was_read = collect(&mut context, 1).remove(0);
            assert_eq!((was_read.result.clone(), was_read.crc), (Ok(LONG as u64), Some(crc)));
            assert!(bytes_of(was_read)[..LONG] == data);
        }
        let was_read = one(&mut context, &file, read(0, 100));
        assert_eq!(was_read.crc, None, "it was not asked for");
    }
}
