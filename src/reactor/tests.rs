//! What both engines promise. Each test runs over io_uring (where the kernel has it), restricted, with
//! spinning and without, and over epoll.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use rustix::net::sockopt;

use super::*;

const TOKEN: Token = Token { owner: 1, value: 7 };

fn both(test: impl Fn(Reactor)) {
    // A ring that spins looks at some sockets itself, one that does not leaves all to the kernel.
    for (epoll, spin) in [(false, Config::default().spin), (false, Duration::ZERO), (true, Duration::ZERO)] {
        let config = Config { epoll, spin, is_restricted: true, ..Config::default() };
        let reactor = Reactor::new(&config).unwrap();
        if !epoll && !reactor.has_ring() {
            eprintln!("SKIPPED over io_uring: {}", reactor.fallback_reason().unwrap());
            continue;
        }
        test(reactor);
    }
}

fn next(reactor: &mut Reactor) -> Event {
    let mut events = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(10);
    while events.is_empty() {
        assert!(Instant::now() < deadline, "no event came");
        reactor.run_once(Wait::Block, &mut events).unwrap();
    }
    assert_eq!(events.len(), 1, "{events:?}");
    events.pop().unwrap()
}

fn pair(reactor: &mut Reactor) -> (TcpStream, File) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    listener.set_nonblocking(true).unwrap();
    let listener = reactor.file(OwnedFd::from(listener));
    reactor.submit(TOKEN, Op::Accept { listener });
    let Payload::Fd(fd) = next(reactor).payload else { panic!("not accepted") };
    (client, reactor.file(fd))
}

fn slot(bytes: &[u8]) -> SlotRange {
    let mut slot = Arena::new(1 << 16, 1 << 16).unwrap().alloc(1 << 16).unwrap();
    slot.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
    SlotRange { slot, start: 0, len: bytes.len() }
}

#[test]
fn data_arrives_in_a_pool_buffer_and_in_a_slot() {
    both(|mut reactor| {
        let (mut client, socket) = pair(&mut reactor);
        reactor.submit(TOKEN, Op::Recv { socket: socket.clone(), len_max: 64 << 10 });
        client.write_all(b"hello").unwrap();
        let event = next(&mut reactor);
        assert_eq!(event.result, Ok(5));
        let Payload::Received(received) = event.payload else { panic!("{event:?}") };
        assert_eq!(&*received, b"hello");
        client.write_all(b"more than that").unwrap();
        reactor.submit(TOKEN, Op::Recv { socket: socket.clone(), len_max: 14 - 5 });
        let event = next(&mut reactor);
        let Payload::Received(received) = event.payload else { panic!("{event:?}") };
        assert_eq!(&*received, b"more than");
        reactor.submit(TOKEN, Op::Recv { socket: socket.clone(), len_max: 64 << 10 });
        assert_eq!(next(&mut reactor).result, Ok(5));
        client.write_all(b"world").unwrap();
        reactor.submit(TOKEN, Op::RecvInto { socket, target: slot(&[0; 5]) });
        let event = next(&mut reactor);
        let Payload::Slot(range) = event.payload else { panic!("{event:?}") };
        assert_eq!(&range.slot.bytes()[..5], b"world");
    });
}

#[test]
fn who_speaks_is_heard_while_sends_to_others_keep_ending() {
    const RECEIVED: Token = Token { owner: 1, value: 0 };
    both(|mut reactor| {
        let (mut quiet, socket) = pair(&mut reactor);
        let (_busy, other) = pair(&mut reactor);
        reactor.submit(RECEIVED, Op::Recv { socket, len_max: 64 << 10 });
        quiet.write_all(b"hello").unwrap();
        let mut events = Vec::new();
        for turn in 0.. {
            assert!(turn < 100, "it was not heard in {turn} iterations");
            let mut batch = Box::new(SendBatch::default());
            batch.push_bytes(|out| out.push(0));
            reactor.submit(TOKEN, Op::Send { socket: other.clone(), batch });
            reactor.run_once(Wait::Poll, &mut events).unwrap();
            if events.drain(..).any(|event| event.token == RECEIVED) {
                break;
            }
        }
    });
}

#[test]
fn a_timer_comes_although_every_turn_has_events() {
    const TIMER: Token = Token { owner: 1, value: 0 };
    both(|mut reactor| {
        let (_client, socket) = pair(&mut reactor);
        reactor.timer(Instant::now(), TIMER);
        let mut events = Vec::new();
        for turn in 0.. {
            assert!(turn < 100, "it did not come in {turn} iterations");
            let mut batch = Box::new(SendBatch::default());
            batch.push_bytes(|out| out.push(0));
            reactor.submit(TOKEN, Op::Send { socket: socket.clone(), batch });
            reactor.run_once(Wait::Poll, &mut events).unwrap();
            if events.drain(..).any(|event| event.token == TIMER) {
                break;
            }
        }
    });
}

#[test]
fn every_pool_buffer_comes_back() {
    both(|mut reactor| {
        let (mut client, socket) = pair(&mut reactor);
        for round in 0..200u8 {
            reactor.submit(TOKEN, Op::Recv { socket: socket.clone(), len_max: 64 << 10 });
            client.write_all(&[round; 3]).unwrap();
            let event = next(&mut reactor);
            let Payload::Received(received) = event.payload else { panic!("{event:?}") };
            assert_eq!(&*received, &[round; 3]);
        }
    });
}

#[test]
fn a_batch_is_sent_in_order_and_resumed_where_it_stopped() {
    both(|mut reactor| {
        let (client, socket) = pair(&mut reactor);
        let mut batch = Box::new(SendBatch::default());
        let mut expected = Vec::new();
        sockopt::set_socket_send_buffer_size(&socket, 64 << 10).unwrap();
        for n in 0..200u8 {
            batch.push_bytes(|out| out.extend_from_slice(&[n; 40]));
            batch.push_slot(slot(&[!n; 5000]));
            expected.extend_from_slice(&[n; 40]);
            expected.extend_from_slice(&[!n; 5000]);
        }
        let total = expected.len();
        let reader = std::thread::spawn(move || {
            let mut all = vec![0; total];
            std::thread::sleep(Duration::from_millis(20));
            std::io::Read::read_exact(&mut &client, &mut all).unwrap();
            all
        });
        let mut waits = 0;
        while !batch.is_empty() {
            let event = match reactor.send(TOKEN, socket.clone(), batch) {
                Some(event) => event,
                None => {
                    waits += 1;
                    next(&mut reactor)
                }
            };
            assert!(event.result.is_ok(), "{event:?}");
            let Payload::Batch(rest) = event.payload else { panic!("not a batch") };
            batch = rest;
        }
        assert!(reader.join().unwrap() == expected);
        assert!(waits > 0, "nothing had to wait for room");
    });
}

#[test]
fn the_end_of_a_stream_is_a_result_of_zero() {
    both(|mut reactor| {
        let (client, socket) = pair(&mut reactor);
        reactor.submit(TOKEN, Op::Recv { socket, len_max: 1 });
        drop(client);
        assert_eq!(next(&mut reactor).result, Ok(0));
    });
}

#[test]
fn a_cancelled_operation_ends_as_cancelled() {
    both(|mut reactor| {
        let (_client, socket) = pair(&mut reactor);
        let id = reactor.submit(TOKEN, Op::RecvInto { socket, target: slot(&[0; 8]) });
        reactor.run_once(Wait::Poll, &mut Vec::new()).unwrap();
        reactor.cancel(id);
        let event = next(&mut reactor);
        assert_eq!(event.result, Err(libc::ECANCELED));
        assert!(matches!(event.payload, Payload::Slot(_)));
        assert_eq!(reactor.in_flight(), 0);
    });
}

#[test]
fn timers_come_in_order_and_cancelled_ones_do_not() {
    both(|mut reactor| {
        let now = Instant::now();
        let token = |value| Token { owner: 0, value };
        reactor.timer(now + Duration::from_millis(20), token(2));
        reactor.timer(now + Duration::from_millis(5), token(1));
        let cancelled = reactor.timer(now + Duration::from_millis(10), token(9));
        reactor.cancel_timer(cancelled);
        // Both come at once if this thread was held up.
        let (mut events, mut came) = (Vec::new(), Vec::new());
        while came.len() < 2 {
            assert!(now.elapsed() < Duration::from_secs(10), "no event came");
            reactor.run_once(Wait::Block, &mut events).unwrap();
            came.extend(events.drain(..).map(|event| event.token.value));
        }
        assert_eq!(came, [1, 2]);
        assert!(now.elapsed() >= Duration::from_millis(20));
    });
}

#[test]
fn a_message_from_another_thread_wakes_a_sleeping_reactor() {
    both(|mut reactor| {
        let (sender, receiver) = mailbox(reactor.waker());
        let thread = std::thread::spawn(move || {
            for n in 0..1000 {
                sender.send(n);
                if n % 100 == 0 {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        });
        let mut expected = 0;
        let deadline = Instant::now() + Duration::from_secs(10);
        while expected < 1000 {
            assert!(Instant::now() < deadline, "a wake-up was lost after {expected}");
            reactor.run_once(Wait::Block, &mut Vec::new()).unwrap();
            while let Some(n) = receiver.take() {
                assert_eq!(n, expected);
                expected += 1;
            }
        }
        thread.join().unwrap();
    });
}

#[test]
fn a_watched_file_reports_its_change() {
    both(|mut reactor| {
        let directory = std::env::temp_dir().join(format!("raio-watch-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let mut watch = FileWatch::new(&mut reactor, TOKEN).unwrap();
        let number = watch.add(&directory).unwrap();
        std::fs::write(directory.join("file"), "x").unwrap();
        assert_eq!(next(&mut reactor).token, TOKEN);
        let changes = watch.read(&mut reactor);
        assert!(changes.contains(&(number, Some("file".into()))), "{changes:?}");
        std::fs::remove_dir_all(&directory).unwrap();
    });
}

#[test]
fn a_signal_is_an_event() {
    both(|mut reactor| {
        block_signals(&[libc::SIGUSR2]).unwrap();
        let mut signals = Signals::new(&mut reactor, &[libc::SIGUSR2], TOKEN).unwrap();
        // To this thread alone: the other tests' threads have not blocked it.
        // SAFETY: the thread is the calling one, which exists.
        assert_eq!(unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR2) }, 0);
        assert_eq!(next(&mut reactor).token, TOKEN);
        assert_eq!(signals.read(&mut reactor), [libc::SIGUSR2]);
    });
}

#[test]
fn files_are_read_and_written_through_the_ring_and_let_go() {
    let mut reactor = Reactor::new(&Config { is_restricted: true, ..Config::default() }).unwrap();
    if !reactor.has_ring() {
        eprintln!("SKIPPED: {}", reactor.fallback_reason().unwrap());
        return;
    }
    let mut arena = Arena::new(1 << 20, 1 << 16).unwrap();
    reactor.register_arena(&arena).unwrap();
    let path = std::env::temp_dir().join(format!("raio-ring-{}", std::process::id()));
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    let file = Arc::new(file);
    let mut source = arena.alloc(8192).unwrap();
    source.bytes_mut().fill(3);
    reactor.submit(
        TOKEN,
        Op::Write {
            file: file.clone(),
            source: SlotRange { slot: source, start: 10, len: 5000 },
            offset: 100,
            nowait: false,
        },
    );
    assert_eq!(next(&mut reactor).result, Ok(5000));
    let target = SlotRange { slot: arena.alloc(8192).unwrap(), start: 0, len: 8192 };
    reactor.submit(TOKEN, Op::Read { file: file.clone(), target, offset: 0, nowait: true });
    let event = next(&mut reactor);
    assert_eq!(event.result, Ok(5100));
    let Payload::Slot(range) = event.payload else { panic!("no slot") };
    assert!(range.slot.bytes()[..100].iter().all(|&b| b == 0));
    assert!(range.slot.bytes()[100..5100].iter().all(|&b| b == 3));
    let file = Arc::into_inner(file).expect("nobody else has it");
    assert_eq!(close(file.into()), Ok(()));
    drop(range);
    assert_eq!(arena.used_bytes(), 0);
}

#[test]
fn a_timer_comes_when_the_clock_is_set_and_not_before() {
    both(|mut reactor| {
        let start = Instant::now();
        reactor.clock().set(start);
        reactor.timer(start + Duration::from_secs(3600), TOKEN);
        let mut events = Vec::new();
        for (seconds, comes) in [(0, 0), (3599, 0), (3600, 1), (7200, 0)] {
            reactor.clock().set(start + Duration::from_secs(seconds));
            for _ in 0..2 * TIMERS_EVERY {
                reactor.run_once(Wait::Poll, &mut events).unwrap();
            }
            assert_eq!(events.drain(..).count(), comes, "after {seconds} s");
            assert_eq!(reactor.clock().now(), start + Duration::from_secs(seconds));
        }
    });
}

#[test]
#[cfg(feature = "test-peers")]
fn a_restricted_ring_rejects_what_no_reactor_asks_for_and_goes_to_another_thread() {
    let config = |is_restricted| Config { is_restricted, ..Config::default() };
    let answers = |is_restricted| {
        let ring = DisabledRing::new(&config(is_restricted));
        assert!(ring.unrestricted().is_none());
        let thread = std::thread::spawn(move || {
            let mut reactor = Reactor::with_ring(ring, &config(is_restricted)).unwrap();
            reactor.attempt_through_ring()
        });
        thread.join().unwrap()
    };
    let restricted = answers(true);
    if restricted.is_empty() {
        return eprintln!("SKIPPED: there is no io_uring here");
    }
    assert!(restricted.iter().all(|(_, errno)| *errno == libc::EACCES), "{restricted:?}");
    let free = answers(false);
    assert!(free.iter().all(|(_, errno)| *errno != libc::EACCES || free[0].1 == libc::EACCES), "{free:?}");
    assert!(free.contains(&("nop", 0)) && free.contains(&("register eventfd", 0)), "{free:?}");
}
