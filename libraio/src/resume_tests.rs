//! What a program sees of a connection that breaks, and of a server that is restarted.

use std::time::{Duration, Instant};

use raio_transport::handshake::{Policy, SUPERSEDED_MAX};
use raio_transport::message::FEATURE_REQUEST_CRC;
use raio_transport::protocol::OPERATION_FEATURES;

use crate::fake_server::{self, FakeServer, until, with_crc};
use crate::{Buffer, Buffers, Completion, Context, Crc, File, Lock, Operation, Options, Scheme, Session};

const PATH: &str = "/e/data";
const BLOCK: usize = 512;

fn start(options: &Options) -> (FakeServer, Session, File, Context) {
    let server = FakeServer::start(Policy { queue_depth: 8, ..Policy::default() });
    server.file(PATH, vec![0; 8 * BLOCK]);
    let session = Session::connect_to(Scheme::Tcp, server.address, options).unwrap();
    let file = session.open(PATH, libc::O_RDWR, 0).unwrap();
    let context = session.context(16).unwrap();
    (server, session, file, context)
}

fn write(block: u64, byte: u8) -> Operation {
    let buffers = Buffers::One(Buffer::Owned(vec![byte; BLOCK].into()));
    Operation::Write { offset: block * BLOCK as u64, buffers }
}

fn read(block: u64) -> Operation {
    let buffers = Buffers::One(Buffer::Owned(vec![0; BLOCK].into()));
    Operation::Read { offset: block * BLOCK as u64, buffers }
}

const FSYNC: Operation = Operation::Fsync { data_only: true };

/// Collects `n` completions, whose tokens are 0 to `n` - 1, in their order.
fn collect(context: &mut Context, n: usize) -> Vec<Completion> {
    let all = fake_server::collect(context, n);
    assert_eq!(
        all.iter().map(|completion| completion.token).collect::<Vec<_>>(),
        (0..n as u64).collect::<Vec<_>>()
    );
    all
}

fn one(context: &mut Context, file: &File, operation: Operation) -> Result<u64, crate::Error> {
    context.submit(file, operation, 0).unwrap();
    collect(context, 1).remove(0).result
}

#[test]
fn wherever_a_connection_is_cut_every_operation_succeeds_and_runs_once() {
    for n in 0..8 {
        for executed in [false, true] {
            let (server, _session, file, mut context) = start(&Options::default());
            server.cut_at(n, executed);
            for block in 0..6 {
                context.submit(&file, write(block, block as u8 + 1), block).unwrap();
            }
            context.submit(&file, FSYNC, 6).unwrap();
            context.submit(&file, read(7), 7).unwrap();
            for completion in collect(&mut context, 8) {
                completion.result.unwrap();
            }
            assert_eq!(server.writes(), 6, "cut at {n}, executed: {executed}");
            for block in 0..6 {
                assert_eq!(server.contents(PATH)[block * BLOCK..][..BLOCK], [block as u8 + 1; BLOCK]);
            }
            let stats = context.stats();
            assert_eq!((stats.reconnects, stats.unknown, stats.failed), (1, 0, 0));
        }
    }
}

/// The server that has opened the file may end before its answer is read, and the context be connected to the
/// next one, which is not told of the file. The simulation has found this.
#[test]
fn who_opens_a_file_learns_of_a_context_that_begins_meanwhile() {
    let server = FakeServer::start(Policy::default());
    server.file(PATH, vec![0; BLOCK]);
    let session = Session::connect_to(Scheme::Tcp, server.address, &Options::default()).unwrap();
    for _ in 0..2 {
        let before = session.shared().files().reopenings();
        let _context = session.context(16).unwrap();
        assert_ne!(session.shared().files().reopenings(), before);
        // And the other way round with files that are open.
        let _file = session.open(PATH, libc::O_RDWR, 0).unwrap();
    }
}

#[test]
fn a_session_goes_on_after_many_cuts() {
    let (server, _session, file, mut context) = start(&Options::default());
    for round in 0..30 {
        server.cut_at(round % 5, round % 2 == 0);
        for block in 0..8 {
            context.submit(&file, write(block, round as u8), block).unwrap();
        }
        for completion in collect(&mut context, 8) {
            assert_eq!(completion.result, Ok(BLOCK as u64));
        }
        assert_eq!(server.contents(PATH), [round as u8; 8 * BLOCK]);
    }
    assert_eq!(server.writes(), 240);
    assert_eq!(context.stats().reconnects, 30);
}

#[test]
fn a_program_that_only_polls_a_descriptor_sees_nothing_of_it() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let (server, _session, file, mut context) = start(&Options::default());
    context.poll_fd().unwrap();
    for round in 0..5 {
        server.cut_at(1, round % 2 == 0);
        for block in 0..4 {
            context.submit(&file, write(block, round), block).unwrap();
        }
        context.flush();
        let mut done = 0;
        while done < 4 {
            let fd = context.poll_fd().unwrap();
            let timeout = Timespec { tv_sec: 10, tv_nsec: 0 };
            assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)), Ok(1));
            context.wait(0, usize::MAX, None).unwrap();
            while let Some(completion) = context.next() {
                assert_eq!(completion.result, Ok(BLOCK as u64));
                done += 1;
            }
            context.sync_poller();
        }
    }
    assert_eq!(server.writes(), 20);
}

#[test]
fn after_a_restart_files_are_open_again_and_only_what_was_under_way_is_unknown() {
    for executed in [false, true] {
        let (server, _session, file, mut context) = start(&Options::default());
        one(&mut context, &file, write(0, 1)).unwrap();
        server.cut_at(0, executed);
        // It is restarted before the client is back.
        server.reject(Some(libc::EUSERS));
        context.submit(&file, write(1, 2), 0).unwrap();
        context.submit(&file, read(0), 1).unwrap();
        context.flush();
        assert_eq!(context.wait(2, 2, Some(Duration::from_millis(50))), Ok(0));
        server.restart(0);
        server.reject(None);
        let mut all = collect(&mut context, 2);
        assert_eq!(all.remove(1).result, Ok(BLOCK as u64), "a read is sent again");
        let error = all.remove(0).result.unwrap_err();
        assert_eq!((error.errno(), error.is_unknown), (libc::ECONNRESET, true), "{error}");
        assert!(error.text.contains("The server was restarted while this was executing: it may"), "{error}");
        assert_eq!(one(&mut context, &file, write(2, 3)), Ok(BLOCK as u64));
        assert_eq!(server.writes(), 2 + usize::from(executed), "it is not done again");
        assert_eq!((context.stats().unknown, server.open()), (1, 1));
    }
}

#[test]
fn a_server_that_has_forgotten_the_session_is_not_said_to_have_been_restarted() {
    let (server, _session, file, mut context) = start(&Options::default());
    server.hold(true);
    context.submit(&file, write(0, 1), 0).unwrap();
    context.flush();
    server.end_sessions();
    server.hold(false);
    let error = collect(&mut context, 1).remove(0).result.unwrap_err();
    assert_eq!((error.errno(), error.is_unknown), (libc::ECONNRESET, true), "{error}");
    assert!(error.text.contains("the server has forgotten it: it may have been done"), "{error}");
    assert_eq!(one(&mut context, &file, write(0, 2)), Ok(BLOCK as u64));
}

#[test]
fn a_context_that_is_made_after_a_restart_has_the_files_that_were_open_before() {
    let (server, session, file, _context) = start(&Options::default());
    server.restart(1);
    // Neither the session nor the other context has looked since.
    let mut context = session.context(16).unwrap();
    one(&mut context, &file, write(0, 1)).unwrap();
    assert_eq!(server.contents(PATH)[..BLOCK], [1; BLOCK]);
}

#[test]
fn a_program_that_alone_writes_may_have_it_done_again() {
    let (server, _session, file, mut context) = start(&Options { redo: true, ..Options::default() });
    server.cut_at(0, true);
    server.reject(Some(0));
    context.submit(&file, write(1, 2), 0).unwrap();
    context.flush();
    assert_eq!(context.wait(1, 1, Some(Duration::from_millis(50))), Ok(0));
    server.restart(0);
    server.reject(None);
    assert_eq!(collect(&mut context, 1).remove(0).result, Ok(BLOCK as u64));
    assert_eq!(server.writes(), 2);
}

#[test]
fn what_an_older_server_does_not_know_ends_and_the_rest_goes_on() {
    for redo in [false, true] {
        let (server, _session, file, mut context) = start(&Options { redo, ..Options::default() });
        let discard = Operation::Discard { offset: 0, length: BLOCK as u64 };
        // One discard executes at the cut. The others wait for a connection.
        server.cut_at(0, true);
        server.reject(Some(libc::EUSERS));
        context.submit(&file, discard, 0).unwrap();
        context.flush();
        while server.is_to_cut() || context.wait(1, 1, Some(Duration::from_millis(50))) != Ok(0) {}
        for token in 1..12 {
            let operation =
                if token % 2 == 1 { Operation::Discard { offset: 0, length: BLOCK as u64 } } else { read(0) };
            context.submit(&file, operation, token).unwrap();
        }
        server.restart(0);
        server.forget(OPERATION_FEATURES);
        server.reject(None);
        for completion in collect(&mut context, 12) {
            match (completion.token, completion.result) {
                (0, Err(error)) => {
                    assert_eq!((error.errno(), error.is_unknown), (libc::ECONNRESET, true), "{error}");
                }
                (token, Err(error)) => {
                    assert_eq!((token % 2, error.errno()), (1, libc::EOPNOTSUPP), "{error}");
                    assert!(error.text.contains("discard"), "{error}");
                    assert!(!error.is_unknown);
                }
                (token, result) => assert_eq!((token % 2, result), (0, Ok(BLOCK as u64))),
            }
        }
        assert_eq!(context.stats().reconnects, 1, "nothing was sent that has the server close");
    }
}

#[test]
fn an_older_server_fails_operations_with_checksums_of_their_own_and_no_others() {
    let options = Options { crc: Crc::Off, redo: true, ..Options::default() };
    let (server, _session, file, mut context) = start(&options);
    // One is in flight at the restart, and one waits for the connection.
    server.hold(true);
    context.submit_with(&file, read(0), with_crc(None), 0).unwrap();
    context.flush();
    server.reject(Some(libc::EUSERS));
    server.restart(0);
    server.forget(FEATURE_REQUEST_CRC);
    assert_eq!(context.wait(1, 1, Some(Duration::from_millis(50))), Ok(0));
    context.submit_with(&file, read(0), with_crc(None), 1).unwrap();
    context.submit(&file, read(0), 2).unwrap();
    server.hold(false);
    server.reject(None);
    let completions = collect(&mut context, 3);
    context.submit_with(&file, read(0), with_crc(None), 0).unwrap();
    for completion in completions.into_iter().chain(collect(&mut context, 1)) {
        match (completion.token, completion.result) {
            (2, result) => assert_eq!(result, Ok(BLOCK as u64)),
            (token, result) => {
                let error = result.unwrap_err();
                assert_eq!(error.errno(), libc::EOPNOTSUPP, "{token}: {error}");
                assert!(error.text.contains("CRC32C"), "{error}");
            }
        }
    }
    assert_eq!(context.stats().reconnects, 1, "nothing was sent that has the server close");
}

#[test]
fn a_file_that_is_another_one_after_a_restart_is_stale() {
    let (server, session, file, mut context) = start(&Options::default());
    server.file("/e/other", vec![7; BLOCK]);
    let other = session.open("/e/other", libc::O_RDWR, 0).unwrap();
    one(&mut context, &other, read(0)).unwrap();
    server.replace(PATH);
    server.restart(0);
    for _ in 0..2 {
        let error = one(&mut context, &file, read(0)).unwrap_err();
        assert_eq!((error.errno(), error.is_unknown), (libc::ESTALE, false), "{error}");
    }
    assert_eq!(one(&mut context, &other, read(0)), Ok(BLOCK as u64));
    let again = session.open(PATH, libc::O_RDWR, 0).unwrap();
    assert_eq!(one(&mut context, &again, read(0)), Ok(BLOCK as u64));
}

#[test]
fn a_file_that_had_a_lock_is_not_opened_again_after_a_restart() {
    let (server, session, file, mut context) = start(&Options::default());
    server.file("/e/other", vec![7; BLOCK]);
    let other = session.open("/e/other", libc::O_RDWR, 0).unwrap();
    for (file, lock) in [(&file, Lock::Exclusive), (&other, Lock::Shared), (&other, Lock::Unlock)] {
        assert_eq!(one(&mut context, file, Operation::Lock(lock)), Ok(0));
    }
    server.cut_at(0, true);
    assert_eq!(one(&mut context, &file, write(0, 1)), Ok(BLOCK as u64), "the session is still there");
    server.restart(0);
    for _ in 0..2 {
        let error = one(&mut context, &file, read(0)).unwrap_err();
        assert_eq!((error.errno(), error.is_unknown), (libc::ENOLCK, false), "{error}");
        assert!(error.text.contains("lock"), "{error}");
    }
    let copy = Operation::Copy { offset: 0, source: file.as_source(), source_offset: 0, length: 1 };
    assert_eq!(one(&mut context, &other, copy).unwrap_err().errno(), libc::ENOLCK, "from it neither");
    assert_eq!(one(&mut context, &other, read(0)), Ok(BLOCK as u64), "its lock was given up before");
    file.close().unwrap();
    let again = session.open(PATH, libc::O_RDWR, 0).unwrap();
    assert_eq!(one(&mut context, &again, Operation::Lock(Lock::Exclusive)), Ok(0));
    assert_eq!(one(&mut context, &again, read(0)), Ok(BLOCK as u64));
}

#[test]
fn a_server_that_opens_another_file_in_its_place_is_given_up() {
    let options = Options { reconnect: Duration::from_millis(300), ..Options::default() };
    let (server, _session, file, mut context) = start(&options);
    one(&mut context, &file, read(0)).unwrap();
    server.trust();
    server.replace(PATH);
    server.restart(0);
    let error = one(&mut context, &file, read(0)).unwrap_err();
    assert_eq!((error.errno(), error.is_unknown), (libc::ETIMEDOUT, false), "{error}");
}

#[test]
fn a_server_that_shuts_down_while_files_are_opened_again_has_said_nothing_of_them() {
    let options = Options { connect_timeout: Duration::from_millis(300), ..Options::default() };
    let (server, session, file, mut context) = start(&options);
    server.restart(0);
    server.shut_down(true);
    assert!(session.context(1).is_err(), "a context that begins cannot be used");
    context.submit(&file, read(0), 0).unwrap();
    assert_eq!(context.wait(1, 1, Some(Duration::from_millis(100))), Ok(0));
    server.restart(1);
    server.shut_down(false);
    assert_eq!(collect(&mut context, 1).remove(0).result, Ok(BLOCK as u64));
    let mut new = session.context(1).unwrap();
    for context in [&mut context, &mut new] {
        assert_eq!(one(context, &file, write(0, 7)), Ok(BLOCK as u64));
    }
}

#[test]
fn an_fsync_after_lost_writes_fails_once() {
    let (server, session, file, mut context) = start(&Options::default());
    server.restart(5);
    // The file has this verifier from its opening on.
    let file = {
        drop(file);
        session.open(PATH, libc::O_RDWR, 0).unwrap()
    };
    // Each restart is found out by what may be sent again.
    one(&mut context, &file, read(0)).unwrap();
    one(&mut context, &file, write(0, 1)).unwrap();
    one(&mut context, &file, FSYNC).unwrap();
    server.restart(6);
    one(&mut context, &file, FSYNC).unwrap();
    let mut other = session.context(4).unwrap();
    one(&mut other, &file, write(1, 1)).unwrap();
    drop(other);
    server.restart(7);
    let error = one(&mut context, &file, FSYNC).unwrap_err();
    assert_eq!((error.errno(), error.is_lost, error.is_unknown), (libc::EIO, true, false), "{error}");
    one(&mut context, &file, FSYNC).unwrap();
    assert_eq!(context.stats().lost, 1);
    // Nothing was lost of what is durable when it is acknowledged.
    let synced = session.open(PATH, libc::O_RDWR | libc::O_DSYNC, 0).unwrap();
    one(&mut context, &synced, read(0)).unwrap();
    one(&mut context, &synced, write(0, 1)).unwrap();
    server.restart(8);
    one(&mut context, &synced, FSYNC).unwrap();
}

#[test]
fn a_cut_does_not_bring_back_what_was_known_of_a_file_before_an_fsync_had_failed() {
    let (server, _session, file, mut context) = start(&Options::default());
    server.restart(6);
    one(&mut context, &file, read(0)).unwrap();
    one(&mut context, &file, write(0, 1)).unwrap();
    server.replace_verifier(7);
    assert!(one(&mut context, &file, FSYNC).unwrap_err().is_lost);
    server.cut_at(0, true);
    one(&mut context, &file, read(0)).unwrap();
    one(&mut context, &file, write(0, 1)).unwrap();
    one(&mut context, &file, FSYNC).unwrap();
    assert_eq!(context.stats().reconnects, 2);
}

#[test]
fn a_server_that_stays_away_is_given_up_when_the_window_is_over() {
    let window = Duration::from_millis(300);
    let (server, _session, file, mut context) = start(&Options { reconnect: window, ..Options::default() });
    server.hold(true);
    context.submit(&file, write(0, 1), 0).unwrap();
    context.submit(&file, read(0), 1).unwrap();
    context.flush();
    server.reject(Some(0));
    let began = Instant::now();
    server.die();
    let all = collect(&mut context, 2);
    assert!((window..window * 20).contains(&began.elapsed()), "{:?}", began.elapsed());
    for (completion, is_unknown) in all.into_iter().zip([true, false]) {
        let error = completion.result.unwrap_err();
        assert_eq!((error.errno(), error.is_unknown), (libc::ETIMEDOUT, is_unknown), "{error}");
    }
    assert_eq!(context.submit(&file, read(0), 0).unwrap_err().error.errno(), libc::ENOTCONN);
    assert_eq!(context.wait(0, 1, None).unwrap_err().errno(), libc::ENOTCONN);
}

#[test]
fn a_context_of_a_session_that_the_server_has_ended_opens_its_files_again() {
    for flags in [libc::O_RDWR, libc::O_WRONLY] {
        let server = FakeServer::start(Policy::default());
        server.file(PATH, vec![0; BLOCK]);
        let session = Session::connect_to(Scheme::Tcp, server.address, &Options::default()).unwrap();
        let file = session.open(PATH, flags, 0).unwrap();
        server.end_sessions();
        let mut context = session.context(1).unwrap();
        assert_eq!(one(&mut context, &file, write(0, 1)), Ok(BLOCK as u64));
        assert_eq!(context.stats().reconnects, 0);
    }
}

#[test]
fn a_rejection_for_good_ends_it_at_once() {
    let (server, _session, file, mut context) = start(&Options::default());
    server.hold(true);
    context.submit(&file, write(0, 1), 0).unwrap();
    context.flush();
    server.reject(Some(libc::EACCES));
    server.die();
    let began = Instant::now();
    let error = collect(&mut context, 1).remove(0).result.unwrap_err();
    assert_eq!((error.errno(), error.is_unknown), (libc::ECONNRESET, true), "{error}");
    assert!(error.text.contains("Not now"), "{error}");
    assert!(began.elapsed() < Options::default().reconnect / 4);
}

#[test]
fn calls_that_block_go_on_over_a_broken_connection() {
    for executed in [false, true] {
        for n in 0..3 {
            let (server, session, file, _context) = start(&Options::default());
            server.cut_at(n, executed);
            let created = session.open("/e/new", libc::O_RDWR | libc::O_CREAT | libc::O_EXCL, 0o600).unwrap();
            assert_eq!(created.status().unwrap().size.get(), 0);
            created.close().unwrap();
            assert_eq!(file.status().unwrap().size.get(), 8 * BLOCK as u64);
            // A restart, too.
            server.restart(0);
            assert_eq!(file.status().unwrap().size.get(), 8 * BLOCK as u64);
            file.close().unwrap();
        }
    }
}

#[test]
fn a_file_that_is_closed_after_a_restart_is_closed() {
    let (server, session, file, _context) = start(&Options::default());
    let other = session.open(PATH, libc::O_RDWR, 0).unwrap();
    server.restart(2);
    file.close().unwrap();
    other.status().unwrap();
    other.close().unwrap();
}

#[test]
fn the_end_of_a_context_or_session_does_not_wait_for_the_window() {
    let (server, session, file, mut context) = start(&Options::default());
    server.hold(true);
    context.submit(&file, write(0, 1), 0).unwrap();
    context.flush();
    server.reject(Some(0));
    server.die();
    assert_eq!(context.wait(1, 1, Some(Duration::from_millis(20))), Ok(0));
    let began = Instant::now();
    std::thread::scope(|scope| {
        let call = scope.spawn(|| file.status().unwrap_err().errno());
        std::thread::sleep(Duration::from_millis(50));
        context.close();
        session.stop();
        assert_eq!(call.join().unwrap(), libc::ENOTCONN);
    });
    assert!(began.elapsed() < Options::default().reconnect / 4, "{:?}", began.elapsed());
}

#[test]
fn a_clean_end_ends_the_channel_and_any_other_leaves_it() {
    let (server, session, file, mut context) = start(&Options::default());
    let gone = |n: usize| until("a connection does not end", || server.goaways() >= n);
    one(&mut context, &file, write(0, 1)).unwrap();
    drop(context);
    gone(1);
    let mut context = session.context(1).unwrap();
    server.hold(true);
    context.submit(&file, write(0, 2), 0).unwrap();
    context.flush();
    drop(context);
    server.hold(false);
    // The next context takes the place of the one that was given up, after what that had under way.
    assert_eq!(server.channels(), [(0, 1), (2, 1)]);
    let mut context = session.context(1).unwrap();
    assert_eq!(server.channels(), [(0, 1), (2, 2)]);
    one(&mut context, &file, write(0, 3)).unwrap();
    drop((context, file, session));
    gone(3);
    assert_eq!(server.channels(), []);
}

#[test]
fn a_session_that_was_stopped_with_a_write_under_way_is_ended_before_the_next_begins() {
    let (server, session, file, mut context) = start(&Options::default());
    server.hold(true);
    context.submit(&file, write(0, 1), 0).unwrap();
    context.flush();
    session.stop();
    drop(context);
    server.hold(false);
    let next = Session::connect_to(Scheme::Tcp, server.address, &Options::default()).unwrap();
    assert_eq!(server.superseded(), 1);
    drop(next);
    Session::connect_to(Scheme::Tcp, server.address, &Options::default()).unwrap();
    assert_eq!(server.superseded(), 1, "once is enough");
}

#[test]
fn a_write_that_ended_as_unknown_is_over_before_the_next_context_or_session_begins() {
    let window = Duration::from_millis(50);
    for reconnect in [Duration::ZERO, window] {
        let options = Options { reconnect, ..Options::default() };
        let (server, session, file, mut context) = start(&options);
        server.hold(true);
        context.submit(&file, write(0, 1), 0).unwrap();
        context.flush();
        server.reject(Some(0));
        server.die();
        let error = collect(&mut context, 1).remove(0).result.unwrap_err();
        assert!(error.is_unknown, "{error}");
        drop((context, file));
        server.reject(None);
        server.hold(false);
        if reconnect.is_zero() {
            // Its control connection is lost as well.
            drop(session);
            Session::connect_to(Scheme::Tcp, server.address, &options).unwrap();
            assert_eq!(server.superseded(), 1);
        } else {
            let epoch_of = |number| server.channels().iter().find(|channel| channel.0 == number).unwrap().1;
            let before = epoch_of(1);
            let _context = session.context(1).unwrap();
            assert!(epoch_of(1) > before, "it takes the place of the one before");
        }
    }
}

#[test]
fn however_many_sessions_were_given_up_the_next_one_has_all_of_them_ended() {
    let options = Options { reconnect: Duration::ZERO, ..Options::default() };
    let server = FakeServer::start(Policy::default());
    server.file(PATH, vec![0; BLOCK]);
    let given_up = 2 * SUPERSEDED_MAX + 1;
    let sessions: Vec<_> = (0..given_up)
        .map(|_| {
            let session = Session::connect_to(Scheme::Tcp, server.address, &options).unwrap();
            let file = session.open(PATH, libc::O_RDWR, 0).unwrap();
            let context = session.context(1).unwrap();
            (session, file, context)
        })
        .collect();
    server.hold(true);
    for (session, file, mut context) in sessions {
        context.submit(&file, write(0, 1), 0).unwrap();
        context.flush();
        session.stop();
    }
    server.hold(false);
    Session::connect_to(Scheme::Tcp, server.address, &options).unwrap();
    assert_eq!(server.superseded(), given_up);
}

#[test]
fn what_waits_for_a_connection_can_be_cancelled() {
    let (server, _session, file, mut context) = start(&Options::default());
    server.hold(true);
    let sent = context.submit(&file, write(0, 1), 0).unwrap();
    let harmless = context.submit(&file, read(0), 1).unwrap();
    context.flush();
    server.reject(Some(0));
    server.die();
    assert_eq!(context.wait(1, 1, Some(Duration::from_millis(20))), Ok(0));
    let queued = context.submit(&file, write(1, 1), 2).unwrap();
    for ticket in [queued, harmless] {
        assert_eq!(context.cancel(ticket).unwrap().result.unwrap_err().errno(), libc::ECANCELED);
    }
    let error = context.cancel(sent).unwrap_err();
    assert_eq!(error.errno(), libc::EAGAIN, "it may have been executed");
    assert!(
        error.text.contains("Too late to cancel") && error.text.contains("is being made again"),
        "{error}"
    );
    server.hold(false);
    server.reject(None);
    assert_eq!(collect(&mut context, 1).remove(0).result, Ok(BLOCK as u64));
}

#[test]
fn a_context_says_what_it_waits_for_as_long_as_it_has_no_connection() {
    let (server, _session, file, mut context) = start(&Options::default());
    assert_eq!(context.reconnecting(), None);
    server.reject(Some(libc::EUSERS));
    server.die();
    context.submit(&file, read(0), 0).unwrap();
    let begin = Instant::now();
    let said = loop {
        assert_eq!(context.wait(1, 1, Some(Duration::from_millis(20))), Ok(0));
        match context.reconnecting() {
            Some(said) if said.contains("rejected") => break said,
            _ => assert!(begin.elapsed() < Duration::from_secs(10), "it does not say that it is rejected"),
        }
    };
    assert!(said.starts_with("The connection to the server was lost 0."), "{said}");
    assert!(said.contains(" s ago, and is being made again: the server rejected the session"), "{said}");
    server.reject(None);
    assert_eq!(collect(&mut context, 1).remove(0).result, Ok(BLOCK as u64));
    assert_eq!(context.reconnecting(), None);
}
