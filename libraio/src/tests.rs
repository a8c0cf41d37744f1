use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use raio_transport::handshake::Policy;
use raio_transport::protocol::{Fields, FileHandle, Layout, OPERATION_FEATURES, OPERATIONS, Opcode};

use crate::fake_server::{FakeServer, until, with_crc};
use crate::test_buffers::{bytes, pattern, room};
use crate::{
    Answer, Buffer, Buffers, Checksum, ChecksumAlgorithm, Completion, Context, Crc, File, Lock, Operation,
    Options, Scheme, Session,
};

fn policy() -> Policy {
    Policy { queue_depth: 8, data_bytes_max: 64 << 10, ..Policy::default() }
}

fn connect(server: &FakeServer, options: &Options) -> Session {
    Session::connect_to(Scheme::Tcp, server.address, options).unwrap()
}

fn collect(context: &mut Context, n: usize) -> Vec<Completion> {
    let mut all = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(10);
    while all.len() < n {
        assert!(Instant::now() < deadline);
        context.wait(1, usize::MAX, Some(Duration::from_secs(1))).unwrap();
        all.extend(std::iter::from_fn(|| context.next()));
    }
    assert_eq!(all.len(), n);
    all
}

fn start() -> (FakeServer, Session, File) {
    let server = FakeServer::start(policy());
    server.file("/e/data", pattern(1 << 20));
    let session = connect(&server, &Options::default());
    let file = session.open("/e/data", libc::O_RDWR, 0).unwrap();
    (server, session, file)
}

fn read(offset: u64, len: usize) -> Operation {
    Operation::Read { offset, buffers: room(len) }
}

#[test]
fn files_are_opened_looked_at_and_closed() {
    let (server, session, file) = start();
    assert_eq!(file.status().unwrap().size.get(), 1 << 20);
    let error = session.open("/e/none", libc::O_RDONLY, 0).unwrap_err();
    assert_eq!((error.errno(), error.text.as_str()), (libc::ENOENT, "There is no such file."));
    let other = session.open("/e/new", libc::O_RDWR | libc::O_CREAT, 0o600).unwrap();
    assert_eq!(server.open(), 2);
    other.close().unwrap();
    assert_eq!(other.status().unwrap_err().errno(), libc::EBADF);
    assert_eq!(server.open(), 1);
    drop(file);
    // Dropping waits for nobody; the next call comes after it.
    session.open("/e/new", libc::O_RDWR, 0).unwrap().close().unwrap();
    assert_eq!(server.open(), 0);
}

#[test]
fn more_operations_than_credits_are_done_in_order_of_submission() {
    for crc in [Crc::Off, Crc::On] {
        let (server, _, _) = start();
        let session = connect(&server, &Options { crc, ..Options::default() });
        let file = session.open("/e/data", libc::O_RDONLY, 0).unwrap();
        let mut context = session.context(100).unwrap();
        assert_eq!(context.stats().queue_depth, 8);
        for n in 0..100 {
            context.submit(&file, read(n * 1000, 1000), n).unwrap();
        }
        let rejected = context.submit(&file, read(0, 10), 100).unwrap_err();
        assert_eq!(rejected.error.errno(), libc::EAGAIN);
        context.flush();
        for (n, completion) in collect(&mut context, 100).into_iter().enumerate() {
            assert_eq!((completion.token, completion.result), (n as u64, Ok(1000)));
            assert_eq!(bytes(&completion.buffers.unwrap()), pattern(1 << 20)[n * 1000..][..1000]);
        }
        let stats = context.stats();
        assert_eq!((stats.submitted, stats.completed, stats.bytes_read), (100, 100, 100_000));
        assert_eq!(stats.in_flight, 0);
    }
}

#[test]
fn what_is_written_can_be_read_and_a_read_at_the_end_is_short() {
    let (server, session, file) = start();
    let mut context = session.context(4).unwrap();
    let data = Buffers::Many(vec![Buffer::Owned(vec![1; 10].into()), Buffer::Owned(vec![2; 20].into())]);
    context.submit(&file, Operation::Write { offset: (1 << 20) - 5, buffers: data }, 1).unwrap();
    assert_eq!(collect(&mut context, 1)[0].result, Ok(30));
    context.submit(&file, Operation::Fsync { data_only: true }, 2).unwrap();
    assert_eq!(collect(&mut context, 1)[0].result, Ok(0));
    context.submit(&file, Operation::WriteZeroes { offset: 0, length: 100 }, 3).unwrap();
    assert_eq!(collect(&mut context, 1)[0].result, Ok(0));
    context.submit(&file, read((1 << 20) - 5, 4096), 4).unwrap();
    let completion = collect(&mut context, 1).remove(0);
    assert_eq!(completion.result, Ok(30));
    let got = bytes(&completion.buffers.unwrap());
    assert_eq!((&got[..10], &got[10..30], &got[30..32]), (&[1; 10][..], &[2; 20][..], &[0; 2][..]));
    assert_eq!(server.contents("/e/data")[..100], [0; 100]);
    context.submit(&file, Operation::Discard { offset: 0, length: 1 }, 5).unwrap();
    let error = collect(&mut context, 1).remove(0).result.unwrap_err();
    assert_eq!((error.errno(), error.text.as_str()), (libc::EOPNOTSUPP, "Not here."));
}

#[test]
fn operations_that_make_no_sense_come_back_with_their_buffers() {
    let (server, session, file) = start();
    let mut context = session.context(4).unwrap();
    let other = connect(&server, &Options::default());
    let foreign = other.open("/e/data", libc::O_RDONLY, 0).unwrap();
    for (file, operation, errno) in [
        (&file, read(i64::MAX as u64 - (64 << 10), (64 << 10) + 1), libc::EINVAL),
        (&file, read(1 << 63, 1), libc::EINVAL),
        (&file, Operation::ReadLent { offset: 0, length: usize::MAX }, libc::EINVAL),
        (&file, Operation::ReadLent { offset: 0, length: (1 << 30) + 1 }, libc::EINVAL),
        (&file, Operation::Discard { offset: i64::MAX as u64, length: 1 }, libc::EINVAL),
        (&file, Operation::WriteZeroes { offset: 1, length: u64::MAX }, libc::EINVAL),
        (&file, Operation::Allocate { offset: 1, length: u64::MAX, keep_size: true }, libc::EINVAL),
        (&foreign, read(0, 1), libc::EBADF),
        (&file, copy(&foreign, 0, 1), libc::EBADF),
        (&file, copy(&file, 1 << 63, 1), libc::EINVAL),
        (&file, copy(&file, 1, i64::MAX as u64), libc::EINVAL),
    ] {
        let rejected = context.submit(file, operation, 0).unwrap_err();
        assert_eq!(rejected.error.errno(), errno, "{rejected:?}");
        assert!(rejected.error.text.ends_with('.'), "{rejected:?}");
    }
    assert_eq!(context.stats().submitted, 0);
    for maxevents in [0, 65_537] {
        assert_eq!(session.context(maxevents).unwrap_err().errno(), libc::EINVAL);
    }
}

fn copy(source: &File, source_offset: u64, length: u64) -> Operation {
    Operation::Copy { offset: 0, source: source.as_source(), source_offset, length }
}

#[test]
fn copies_and_checksums_are_made_by_the_server_and_say_how_many_bytes() {
    let server = FakeServer::start(policy());
    server.file("/e/data", pattern(4096));
    server.file("/e/other", vec![0; 10]);
    let session = connect(&server, &Options::default());
    let source = session.open("/e/data", libc::O_RDWR, 0).unwrap();
    let file = session.open("/e/other", libc::O_RDWR, 0).unwrap();
    let mut context = session.context(8).unwrap();
    let mut run = |file: &File, operation| {
        context.submit(file, operation, 0).unwrap();
        let completion = collect(&mut context, 1).remove(0);
        (completion.result, completion.answer.map(|answer| *answer))
    };
    let copy =
        Operation::Copy { offset: 5, source: source.as_source(), source_offset: 4000, length: 1 << 40 };
    assert!(matches!(run(&file, copy), (Ok(96), None)));
    assert_eq!(server.contents("/e/other")[5..], pattern(4096)[4000..]);
    for (algorithm, len) in [(ChecksumAlgorithm::Crc32c, 100), (ChecksumAlgorithm::Blake3, 4096)] {
        let operation = Operation::Checksum { offset: 0, length: len, algorithm };
        let (count, Some(Answer::Checksum(checksum))) = run(&source, operation) else {
            panic!("no checksum")
        };
        assert_eq!(count, Ok(len));
        let crc = raio_transport::message::data_crc(&pattern(4096)[..len as usize]);
        match checksum {
            Checksum::Crc32c(found) => assert_eq!((found, algorithm), (crc, ChecksumAlgorithm::Crc32c)),
            Checksum::Blake3(found) => assert_eq!(found, [crc as u8; 32]),
        }
    }
    // A source that is closed while it is copied is closed behind that.
    context.submit(&file, self::copy(&source, 0, 1), 0).unwrap();
    source.close().unwrap();
    let completion = collect(&mut context, 1).remove(0);
    assert_eq!(completion.result, Ok(1));
    let again = context.submit(&file, self::copy(&source, 0, 1), 0).unwrap_err();
    assert_eq!(again.error.errno(), libc::EBADF);
}

#[test]
fn what_the_server_does_not_know_fails_here_and_is_not_sent() {
    let server = FakeServer::start(policy());
    server.file("/e/data", pattern(4096));
    server.forget(OPERATION_FEATURES);
    let session = connect(&server, &Options::default());
    let file = session.open("/e/data", libc::O_RDWR, 0).unwrap();
    let mut context = session.context(8).unwrap();
    let (offset, length) = (0, 4096);
    let all = [
        (Operation::Discard { offset, length }, "discard"),
        (Operation::WriteZeroes { offset, length }, "write_zeroes"),
        (Operation::Allocate { offset, length, keep_size: true }, "allocate"),
        (Operation::Truncate { size: 0 }, "truncate"),
        (Operation::Extents { offset, length }, "extents"),
        (Operation::Copy { offset, source: file.as_source(), source_offset: offset, length }, "copy"),
        (Operation::Checksum { offset, length, algorithm: ChecksumAlgorithm::Blake3 }, "checksum"),
        (Operation::Lock(Lock::Shared), "lock"),
    ];
    let mut names: Vec<_> = all.iter().map(|(_, name)| *name).collect();
    for (operation, name) in all {
        context.submit(&file, operation, 0).unwrap();
        let error = collect(&mut context, 1).remove(0).result.unwrap_err();
        assert_eq!(error.errno(), libc::EOPNOTSUPP);
        assert!(error.text.contains(&format!("does not know {name}:")), "{error}");
        let groups = ["\"space\"", "\"names\"", "\"server_side\""];
        assert!(groups.iter().any(|group| error.text.contains(group)), "{error}");
    }
    context.submit(&file, read(0, 4096), 0).unwrap();
    assert_eq!(collect(&mut context, 1).remove(0).result, Ok(4096), "the connection is as it was");
    // Each on a file that can be missing was tried.
    names.sort_unstable();
    let mut optional: Vec<_> = OPERATIONS
        .iter()
        .filter(|operation| !operation.is_granted(0))
        .filter(|operation| {
            let is_on_file = matches!(operation.layout, Layout::Fields(Fields { file: true, .. }));
            is_on_file || operation.opcode == Opcode::Copy
        })
        .map(|operation| operation.name)
        .collect();
    optional.sort_unstable();
    assert_eq!(names, optional);
}

#[test]
fn a_file_that_is_closed_while_in_use_is_closed_when_its_io_has_ended() {
    let (server, session, file) = start();
    let mut context = session.context(4).unwrap();
    let mut other = session.context(4).unwrap();
    server.hold(true);
    context.submit(&file, read(0, 10), 1).unwrap();
    context.flush();
    other.submit(&file, read(0, 10), 2).unwrap();
    other.flush();
    file.close().unwrap();
    assert_eq!(context.submit(&file, read(0, 10), 3).unwrap_err().error.errno(), libc::EBADF);
    assert_eq!(server.open(), 1);
    server.hold(false);
    assert_eq!(collect(&mut context, 1)[0].result, Ok(10));
    assert_eq!(server.open(), 1);
    assert_eq!(collect(&mut other, 1)[0].result, Ok(10));
    until("the file is not closed", || server.open() == 0);
}

#[test]
fn lent_buffers_are_bounded_and_reads_that_want_more_wait_alone() {
    let (_server, session, file) = start();
    let mut context = session.context(3).unwrap();
    for n in 0..3 {
        context.submit(&file, Operation::ReadLent { offset: n * 20_000, length: 20_000 }, n).unwrap();
    }
    let mut lent = collect(&mut context, 3);
    let data = pattern(1 << 20);
    for (n, completion) in lent.iter().enumerate() {
        assert!(completion.is_lent);
        assert_eq!(bytes(completion.buffers.as_ref().unwrap()), data[n * 20_000..][..20_000]);
    }
    context.submit(&file, Operation::ReadLent { offset: 1, length: 60_000 }, 3).unwrap();
    assert_eq!(context.wait(1, 1, Some(Duration::from_millis(30))).unwrap(), 0);
    context.submit(&file, read(0, 10), 4).unwrap();
    assert_eq!(collect(&mut context, 1)[0].token, 4);
    context.release(lent.pop().unwrap().buffers.unwrap());
    let completion = collect(&mut context, 1).remove(0);
    let last = completion.buffers.unwrap();
    assert_eq!(bytes(&last), data[1..][..60_000]);
    context.release(last);
    // At the end of the file nothing is read, but it is lent all the same; all that was lent is there again.
    context.release(lent.pop().unwrap().buffers.unwrap());
    for n in 0..2 {
        context.submit(&file, Operation::ReadLent { offset: 2 << 20, length: 10 }, n).unwrap();
    }
    assert!(
        collect(&mut context, 2).iter().all(|completion| completion.is_lent && completion.result == Ok(0))
    );
}

#[test]
fn a_read_that_fails_makes_room_for_one_that_waits_for_a_lent_buffer() {
    let (_server, session, file) = start();
    // A handle that the server does not know.
    let gone = File::new(Arc::clone(file.inner().session()), FileHandle(999), 0, false);
    let mut context = session.context(2).unwrap();
    let lent = Operation::ReadLent { offset: 0, length: 10 };
    context.submit(&file, lent, 0).unwrap();
    let kept = collect(&mut context, 1).remove(0);
    assert!(kept.is_lent);
    context.submit(&gone, Operation::ReadLent { offset: 0, length: 10 }, 1).unwrap();
    context.submit(&file, Operation::ReadLent { offset: 0, length: 10 }, 2).unwrap();
    let ended = collect(&mut context, 2);
    assert_eq!(ended[0].result.as_ref().unwrap_err().errno(), libc::EBADF);
    assert_eq!((ended[1].token, ended[1].result.clone()), (2, Ok(10)));
}

#[test]
fn an_operation_can_be_cancelled_wherever_it_is() {
    let (server, session, file) = start();
    let options = Options { queue_depth: 1, ..Options::default() };
    let narrow = connect(&server, &options);
    let narrow_file = narrow.open("/e/data", libc::O_RDONLY, 0).unwrap();
    let mut context = narrow.context(4).unwrap();
    let eventfd = Arc::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap());
    let ticks = || {
        let mut count = [0; 8];
        rustix::io::read(&*eventfd, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    };
    server.hold(true);
    let sent = context.submit(&narrow_file, read(0, 10), 1).unwrap();
    let waiting = context.submit(&narrow_file, read(0, 10), 2).unwrap();
    let last = context.submit(&narrow_file, read(0, 10), 3).unwrap();
    for ticket in [sent, waiting, last] {
        context.notify(ticket, Arc::clone(&eventfd));
    }
    // Waits for a credit.
    let completion = context.cancel(waiting).unwrap();
    assert_eq!((completion.token, completion.result.unwrap_err().errno()), (2, libc::ECANCELED));
    assert_eq!(completion.buffers.unwrap().len(), 10);
    assert_eq!(context.cancel(waiting).unwrap_err().errno(), libc::EINVAL);
    // Not yet flushed; then the last has the credit.
    assert_eq!(context.cancel(sent).unwrap().token, 1);
    context.flush();
    // On the server.
    let completion = context.cancel(last).unwrap();
    assert_eq!((completion.token, completion.result.unwrap_err().errno()), (3, libc::ECANCELED));
    assert_eq!(context.stats().in_flight, 0);
    assert_eq!(ticks(), 0);
    server.hold(false);
    // Too late.
    let done = context.submit(&narrow_file, read(0, 10), 4).unwrap();
    context.notify(done, Arc::clone(&eventfd));
    context.flush();
    context.wait(1, 1, None).unwrap();
    assert_eq!(context.cancel(done).unwrap_err().errno(), libc::EAGAIN);
    assert_eq!(collect(&mut context, 1)[0].result, Ok(10));
    assert_eq!(ticks(), 1);
    drop((session, file));
}

#[test]
fn a_server_that_vanishes_ends_everything_once_if_nobody_is_to_connect_again() {
    let server = FakeServer::start(policy());
    server.file("/e/data", pattern(1 << 20));
    let session = connect(&server, &Options { reconnect: Duration::ZERO, ..Options::default() });
    let file = session.open("/e/data", libc::O_RDWR, 0).unwrap();
    let mut context = session.context(30).unwrap();
    server.hold(true);
    for n in 0..29 {
        context.submit(&file, read(0, 10), n).unwrap();
    }
    context.submit(&file, Operation::ReadLent { offset: 0, length: 10 }, 29).unwrap();
    context.flush();
    server.die();
    let mut tokens: Vec<_> = collect(&mut context, 30)
        .into_iter()
        .map(|completion| {
            let error = completion.result.unwrap_err();
            assert!([libc::ECONNRESET, libc::ENOTCONN, libc::EPIPE].contains(&error.errno()), "{error:?}");
            assert_eq!(error.status.class, crate::Class::Transport);
            assert!(!error.text.is_empty());
            completion.token
        })
        .collect();
    tokens.sort_unstable();
    assert_eq!(tokens, (0..30).collect::<Vec<_>>());
    assert_eq!(context.wait(0, 1, None).unwrap_err().errno(), libc::ENOTCONN);
    assert_eq!(context.submit(&file, read(0, 1), 0).unwrap_err().error.errno(), libc::ENOTCONN);
    assert!(file.status().is_err());
    assert_eq!(file.status().unwrap_err().errno(), libc::ENOTCONN);
    assert!(file.close().is_err());
    context.close();
}

#[test]
fn a_context_waits_no_longer_than_there_is_something_to_wait_for() {
    let (_server, session, file) = start();
    let mut context = session.context(4).unwrap();
    assert_eq!(context.wait(4, 4, None), Ok(0));
    for n in 0..2 {
        context.submit(&file, read(0, 10), n).unwrap();
    }
    assert_eq!(context.wait(4, 4, None), Ok(2));
    assert_eq!(collect(&mut context, 2).len(), 2);
}

#[test]
fn the_poll_descriptor_tells_when_to_call() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let readable = |context: &mut Context, ms: i64| {
        let fd = context.poll_fd().unwrap();
        let timeout = Timespec { tv_sec: 0, tv_nsec: ms * 1_000_000 };
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() == 1
    };
    let server = FakeServer::start(Policy { keepalive: Duration::from_millis(300), ..policy() });
    server.file("/e/data", pattern(1 << 20));
    let session = connect(&server, &Options::default());
    let file = session.open("/e/data", libc::O_RDWR, 0).unwrap();
    let mut context = session.context(4).unwrap();
    assert!(!readable(&mut context, 20));
    server.hold(true);
    context.submit(&file, read(0, 10), 0).unwrap();
    context.submit(&file, read(0, 10), 1).unwrap();
    context.flush();
    assert!(!readable(&mut context, 20));
    // In time to ping a silent server.
    assert!(readable(&mut context, 500));
    assert_eq!(context.wait(0, 4, None), Ok(0));
    assert!(!readable(&mut context, 20) || context.wait(0, 4, None) == Ok(0));
    server.hold(false);
    assert!(readable(&mut context, 900));
    while context.wait(0, 4, None).unwrap() < 2 {}
    assert!(context.next().is_some());
    context.sync_poller();
    assert!(readable(&mut context, 0), "one is left");
    assert!(context.next().is_some());
    context.sync_poller();
    assert!(!readable(&mut context, 20));
}

#[test]
fn close_waits_for_writes_that_are_queued() {
    let (server, session, file) = start();
    let mut context = session.context(64).unwrap();
    for n in 0..64u64 {
        let buffers = Buffers::One(Buffer::Owned(vec![n as u8 + 1; 1000].into()));
        context.submit(&file, Operation::Write { offset: n * 1000, buffers }, n).unwrap();
    }
    context.close();
    let contents = server.contents("/e/data");
    assert!((0..64).all(|n| contents[n * 1000..][..1000] == [n as u8 + 1; 1000]));
}

#[test]
fn a_session_says_why_it_is_not_over_rdma_if_it_might_have_been() {
    // Loopback belongs to no device, and this server has none.
    let server = FakeServer::start(policy());
    let options = Options::default();
    let session = Session::connect_to(Scheme::Any, server.address, &options).unwrap();
    let why = session.why_tcp().expect("there is a reason");
    assert!(why.starts_with("Connected over TCP, not RDMA: ") && why.ends_with('.'), "{why}");
    session.context(4).unwrap();
    assert_eq!(Session::connect_to(Scheme::Tcp, server.address, &options).unwrap().why_tcp(), None);
}

#[test]
fn a_server_that_answers_nothing_at_all_is_given_up() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let options = Options { connect_timeout: Duration::from_millis(100), ..Options::default() };
    let error = Session::connect_to(Scheme::Any, address, &options).unwrap_err();
    assert_eq!(error.errno(), libc::ETIMEDOUT);
    let error = Session::connect_to(Scheme::Rdma, address, &options).unwrap_err();
    assert_eq!(error.errno(), libc::EPROTONOSUPPORT);
}

#[test]
fn no_call_waits_for_ever_for_a_server_that_only_answers_pings() {
    // A ping in each call, and a second until a server that is held up counts as gone.
    let server = FakeServer::start(Policy { keepalive: Duration::from_millis(250), ..policy() });
    server.file("/e/data", pattern(4096));
    let limit = Duration::from_millis(300);
    let session = connect(&server, &Options { call_timeout: limit, ..Options::default() });
    let file = session.open("/e/data", libc::O_RDWR, 0).unwrap();
    let other = session.open("/e/data", libc::O_RDWR, 0).unwrap();
    let mut context = session.context(4).unwrap();
    server.mute(true);
    context.submit(&file, read(0, 10), 1).unwrap();
    context.flush();
    let times_out = |call: &dyn Fn() -> Option<i32>| {
        let began = Instant::now();
        assert_eq!(call(), Some(libc::ETIMEDOUT));
        assert!((limit..limit * 10).contains(&began.elapsed()), "{:?}", began.elapsed());
    };
    let open = || session.open("/e/data", libc::O_RDWR, 0).err().map(|error| error.errno());
    // Of two at the same time none waits for both.
    std::thread::scope(|scope| {
        let first = scope.spawn(|| times_out(&open));
        let began = Instant::now();
        times_out(&open);
        first.join().unwrap();
        assert!(began.elapsed() < limit * 10);
    });
    times_out(&|| file.status().err().map(|error| error.errno()));
    times_out(&|| other.close().err().map(|error| error.errno()));
    let began = Instant::now();
    context.close();
    assert!((limit..limit * 10).contains(&began.elapsed()), "{:?}", began.elapsed());
    // The session goes on, and what was opened for nobody is closed.
    server.mute(false);
    assert_eq!(file.status().unwrap().size.get(), 4096);
    until("more than one file is open", || {
        file.status().unwrap();
        server.open() <= 1
    });
}

#[test]
fn stop_ends_the_calls_of_other_threads_at_once() {
    let (server, session, file) = start();
    server.mute(true);
    let began = Instant::now();
    std::thread::scope(|scope| {
        // One waits for the server, the other for the connection.
        let calls = [0, 1].map(|_| scope.spawn(|| file.status().unwrap_err().errno()));
        std::thread::sleep(Duration::from_millis(100));
        session.stop();
        for call in calls {
            assert_eq!(call.join().unwrap(), libc::ENOTCONN);
        }
    });
    assert!(began.elapsed() < Options::default().call_timeout / 10, "{:?}", began.elapsed());
}

#[test]
fn one_operation_may_have_checksums_in_a_session_without() {
    for crc in [Crc::Off, Crc::On] {
        let (server, _, _) = start();
        let session = connect(&server, &Options { crc, ..Options::default() });
        let file = session.open("/e/data", libc::O_RDWR, 0).unwrap();
        let mut context = session.context(8).unwrap();
        let before = server.contents("/e/data");
        let data = vec![0x5a; 5000];
        let buffers = || Buffers::One(Buffer::Owned(data.clone().into()));
        let good = raio_transport::message::data_crc(&data);
        let write = || Operation::Write { offset: 0, buffers: buffers() };
        context.submit_with(&file, write(), with_crc(Some(good ^ 1)), 0).unwrap();
        let error = collect(&mut context, 1).remove(0).result.unwrap_err();
        assert_eq!((error.errno(), error.is_unknown), (libc::EILSEQ, false), "{error}");
        assert!(server.contents("/e/data") == before, "nothing was written");
        assert_eq!(context.stats().checksum_errors, 3);
        for said in [Some(good), None] {
            context.submit_with(&file, write(), with_crc(said), 0).unwrap();
            assert_eq!(collect(&mut context, 1).remove(0).result, Ok(5000));
            assert!(server.contents("/e/data")[..5000] == data);
        }
        context.submit_with(&file, read(0, 5000), with_crc(None), 0).unwrap();
        let was_read = collect(&mut context, 1).remove(0);
        assert_eq!((was_read.result, was_read.crc), (Ok(5000), Some(good)));
        context.submit_with(&file, Operation::Fsync { data_only: false }, with_crc(None), 0).unwrap();
        let synced = collect(&mut context, 1).remove(0);
        assert_eq!((synced.result, synced.crc), (Ok(0), None));
        assert_eq!((context.stats().reconnects, context.stats().checksum_errors), (0, 3));
    }
}

#[test]
fn addresses_of_this_host_are_known() {
    for local in ["127.0.0.1:1", "127.1.2.3:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
        assert!(crate::session::is_this_host(&local.parse::<SocketAddr>().unwrap().into()), "{local}");
    }
    for other in ["192.0.2.1:1", "[2001:db8::1]:1"] {
        assert!(!crate::session::is_this_host(&other.parse::<SocketAddr>().unwrap().into()), "{other}");
    }
}
