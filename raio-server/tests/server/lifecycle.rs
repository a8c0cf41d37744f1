//! Connections and the server itself: how they end, and that nothing is left behind.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use raio_transport::Error;
use raio_transport::handshake::Offer;
use raio_transport::message::{self, RemoteRegion};
use raio_transport::protocol::{Command, FileHandle, FileStatus, OPEN_READ};
use raio_transport::transport::{Bulk, ClientTransport};
use rustix::process::Signal;

use crate::common::{Client, NEW, RW, Server, TIMEOUT, Variant, buffers, each};
use crate::random::Random;

#[test]
fn sigterm_answers_what_is_in_flight_and_exits_with_0() {
    each(|variant| {
        let mut server = Server::start(variant, &[]);
        let block = vec![5; 256 << 10];
        let (written, rejected) = (AtomicU64::new(0), AtomicU64::new(0));
        let all_sent = Barrier::new(5);
        std::thread::scope(|scope| {
            for i in 0..4 {
                let mut client = server.client();
                let (block, written, rejected, all_sent) = (&block, &written, &rejected, &all_sent);
                scope.spawn(move || {
                    let file = client.open(&format!("/d/f{i}"), NEW).unwrap();
                    let tags: Vec<_> = (0..64).map(|i| client.send_write(file, i << 18, block)).collect();
                    all_sent.wait();
                    for tag in tags {
                        let status = client.wait(tag).status;
                        let told = client.transport.failure().map(Error::errno);
                        match status.errno {
                            0 => written.fetch_add(1, Ordering::Relaxed),
                            // It came too late, and was told so.
                            libc::ESHUTDOWN if status.retryable => rejected.fetch_add(1, Ordering::Relaxed),
                            // It had not even come: a busy machine had its client wait for longer than the
                            // server waits for what is on its way.
                            libc::ECONNRESET if status.retryable && told == Some(libc::ESHUTDOWN) => {
                                rejected.fetch_add(1, Ordering::Relaxed)
                            }
                            _ => panic!("{status:?}, {:?}", client.transport.failure()),
                        };
                    }
                });
            }
            all_sent.wait();
            server.signal(Signal::TERM);
        });
        let (written, rejected) = (written.into_inner(), rejected.into_inner());
        eprintln!("{written} written, {rejected} rejected");
        assert!(written >= 4);
        let status = server.wait();
        assert_eq!(status.code(), Some(0), "{status}\n{}", server.log());
        let on_disk: u64 =
            (0..4).map(|i| std::fs::metadata(server.path(&format!("f{i}"))).unwrap().len()).sum();
        assert!(on_disk >= written << 18, "{written} writes were answered, yet there are {on_disk} bytes");
    });
}

/// Waits until the connection of a client has ended because its server shuts down.
fn hears_that_the_server_shuts_down(client: &mut Client) {
    let deadline = Instant::now() + TIMEOUT;
    let mut replies = Vec::new();
    while client.transport.failure().is_none() {
        assert!(Instant::now() < deadline);
        client.transport.wait(Some(deadline)).unwrap();
        client.transport.receive(&mut replies);
    }
    let text = client.transport.failure().unwrap().to_string();
    assert!(text.contains("shutting down"), "{text}");
}

#[test]
fn sigint_stops_an_idle_server_too_and_closes_its_clients() {
    each(|variant| {
        let mut server = Server::start(variant, &[]);
        let mut client = server.client();
        let file = client.open("/d/f", NEW).unwrap();
        server.signal(Signal::INT);
        let started = Instant::now();
        hears_that_the_server_shuts_down(&mut client);
        drop(client);
        assert_eq!(server.wait().code(), Some(0));
        assert!(started.elapsed() < Duration::from_secs(5));
        assert!(TcpStream::connect(server.address).is_err(), "nobody listens any more");
        let _ = file;
    });
}

/// Passes on what comes over either of them, until both have ended.
fn relay(one: &TcpStream, other: &TcpStream) {
    let pass = |mut from: &TcpStream, mut to: &TcpStream| {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Write);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| pass(one, other));
        pass(other, one);
    });
}

#[test]
fn a_client_that_was_accepted_before_the_end_begins_a_session_and_has_its_first_requests_answered() {
    each(|variant| {
        let mut server = Server::start(variant, &[]);
        let between = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = between.local_addr().unwrap();
        let onward = TcpStream::connect(server.address).unwrap();
        server.stats_until("connected", |stats| stats.get("connections") == 1);
        server.signal(Signal::TERM);
        server.log_until("Told to stop");
        // Longer than requests are taken from clients that had a session.
        std::thread::sleep(Duration::from_millis(300));
        std::thread::scope(|scope| {
            scope.spawn(|| relay(&between.accept().unwrap().0, &onward));
            let mut client = Client::connect(address, &Offer::new("late"));
            client.open("/d/f", NEW).unwrap();
            hears_that_the_server_shuts_down(&mut client);
            drop(client);
        });
        assert_eq!(server.wait().code(), Some(0));
    });
}

#[test]
fn signals_that_mean_nothing_to_it_do_not_end_the_server() {
    let mut server = Server::start(Variant::Uring, &[]);
    server.signal(Signal::HUP);
    server.signal(Signal::USR2);
    server.stats();
    server.signal(Signal::TERM);
    assert_eq!(server.wait().code(), Some(0));
    let log = server.log();
    assert!(log.contains("SIGHUP is ignored") && log.contains("SIGUSR2 is ignored"), "{log}");
}

#[test]
fn a_write_that_never_arrives_holds_up_the_end_for_so_long_and_no_longer() {
    let mut server = Server::start(Variant::Uring, &[]);
    let offer = Offer::new("half");
    let mut whole = Client::connect(server.address, &offer);
    let file = whole.open("/d/f", NEW).unwrap();
    let mut half = TcpStream::connect(server.address).unwrap();
    half.write_all(&offer.hello()).unwrap();
    half.read_exact(&mut [0; 64]).unwrap();
    let mut body = Vec::new();
    Command::Write { file, offset: 0, length: 1000 }.encode(&mut body);
    let request = message::RequestHeader {
        id: 1,
        body_len: 0,
        data_len: 1000,
        region: RemoteRegion::None,
        has_crc: false,
        data_crc: 0,
    };
    let mut bytes = Vec::new();
    request.encode(&body, false, &mut bytes);
    half.write_all(&bytes).unwrap();
    half.write_all(&[1; 10]).unwrap();
    server.stats_until("half a write", |stats| stats.get("fetching") == 1);
    server.signal(Signal::TERM);
    let started = Instant::now();
    assert_eq!(server.wait().code(), Some(1), "not everything was answered");
    assert!(
        (Duration::from_secs(9)..Duration::from_secs(18)).contains(&started.elapsed()),
        "{:?}",
        started.elapsed()
    );
    assert!(server.log().contains("did not finish"), "{}", server.log());
}

#[test]
fn a_second_signal_ends_the_server_at_once() {
    let mut server = Server::start(Variant::Uring, &[]);
    // Half a handshake keeps it from being done at once.
    let mut half = TcpStream::connect(server.address).unwrap();
    half.write_all(&raio_transport::message::MAGIC).unwrap();
    server.stats_until("connected", |stats| stats.get("connections") == 1);
    server.signal(Signal::TERM);
    server.log_until("Told to stop");
    server.signal(Signal::INT);
    let started = Instant::now();
    assert_eq!(server.wait().code(), Some(128 + libc::SIGINT));
    // Well before it would give up waiting.
    assert!(started.elapsed() < Duration::from_secs(7), "{:?}", started.elapsed());
}

#[test]
fn a_client_that_dies_at_full_depth_leaves_nothing_behind() {
    each(|variant| {
        let mut server =
            Server::start(variant, &["--memory", "16M", "--io-max", "256k", "--export", "m=mem:64M,rw"]);
        server.stats_until("idle", |stats| stats.is_idle());
        let fds = server.fds();
        for round in 0..20 {
            let mut client = server.client();
            let files: Vec<_> = (0..10).map(|i| client.open(&format!("/d/f{i}"), NEW).unwrap()).collect();
            let memory = client.open("/m", RW).unwrap();
            for i in 0..120u64 {
                let file = if i % 3 == 0 { memory } else { files[i as usize % 10] };
                if (i + round) % 2 == 0 {
                    client.send_read(file, i << 18, 256 << 10);
                } else {
                    client.send_write(file, i << 18, &vec![1; 256 << 10]);
                }
            }
            // Its socket closes with requests unsent, unanswered, and answers unread.
            drop(client);
        }
        let stats = server.stats_until("everything is gone", |stats| stats.is_idle());
        assert!(stats.get("lost") > 0, "{}", stats.0);
        server.fds_until(fds);
    });
}

#[test]
fn many_connections_come_and_go_and_the_server_is_where_it_began() {
    each(|variant| {
        let mut server = Server::start(variant, &[]);
        std::fs::write(server.path("f"), b"x").unwrap();
        let fds = server.fds();
        for i in 0..200 {
            let mut client = server.client();
            let file = client.open("/d/f", OPEN_READ).unwrap();
            assert_eq!(client.read(file, 0, 1).unwrap(), b"x");
            if i % 2 == 0 {
                assert_eq!(client.close(file), Ok(0));
            }
        }
        let stats = server.stats_until("idle", |stats| stats.is_idle());
        assert_eq!((stats.get("accepted"), stats.get("finished")), (200, 200), "{}", stats.0);
        assert_eq!(stats.get("open"), 200);
        server.fds_until(fds);
    });
}

#[test]
fn a_client_that_takes_no_answers_does_not_hold_up_others() {
    each(|variant| {
        let mut server =
            Server::start(variant, &["--workers", "1", "--memory", "32M", "--export", "m=mem:64M"]);
        let mut greedy = server.client();
        let file = greedy.open("/m", OPEN_READ).unwrap();
        for _ in 0..128 {
            greedy.send_read(file, 0, 1 << 20);
        }
        let mut modest = server.client();
        let file = modest.open("/m", OPEN_READ).unwrap();
        let started = Instant::now();
        for i in 0..100 {
            assert_eq!(modest.read(file, i * 4096, 4096).unwrap().len(), 4096);
            assert_eq!(modest.read(file, i * 4096, 1 << 20).unwrap().len(), 1 << 20);
        }
        assert!(started.elapsed() < 3 * TIMEOUT, "{:?}", started.elapsed());
        let stats = server.stats();
        assert!(stats.get("slot_waits") >= 100 && stats.get("slot_bytes") <= 16 << 20, "{}", stats.0);
        // And the greedy one has lost nothing.
        for tag in 2..130 {
            assert_eq!(greedy.wait(tag).data_len, 1 << 20);
        }
    });
}

#[test]
fn strangers_are_turned_away_and_counted_and_others_go_on() {
    let mut server = Server::start(Variant::Uring, &[]);
    let mut client = server.client();
    let file = client.open("/d/f", NEW).unwrap();
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: example\r\n\r\n                                        "[..],
        &[0; 64],
        &[0xff; 4096],
    ] {
        let mut stranger = TcpStream::connect(server.address).unwrap();
        stranger.set_read_timeout(Some(TIMEOUT)).unwrap();
        stranger.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        // Either the end of the stream or a reset.
        let _ = stranger.read_to_end(&mut answer);
        assert_eq!(client.do_it(&Command::Stat(file)), Ok(0));
    }
    server.stats_until("rejected", |stats| stats.get("magic") == 3 && stats.get("connections") == 1);
    server.log_until("handshake failed");
}

#[test]
fn well_formed_nonsense_harms_nobody() {
    each(|variant| {
        let mut random = Random::new();
        let mut server = Server::start(
            variant,
            &["--memory", "8M", "--io-max", "64k", "--export", "m=mem:1M,rw", "--export", "n=null:1M"],
        );
        let mut good = server.client();
        let good_file = good.open("/d/good", NEW).unwrap();
        good.write(good_file, 0, b"good").unwrap();
        let paths = ["/d/f", "/d/g", "/m", "/n", "/d", "/d/../x", "/d/f/x", "/x", "/d/./f", "//d//f//"];
        let offer = Offer::new("hostile");
        for _ in 0..5 {
            // Two connections of one session, mostly on two workers.
            let mut bad = [(); 2].map(|()| Client::connect(server.address, &offer));
            let mut files = vec![FileHandle(0), FileHandle(u32::MAX), good_file];
            let mut in_flight: [Vec<u64>; 2] = Default::default();
            for _ in 0..400 {
                let who = random.below(2) as usize;
                let client = &mut bad[who];
                if in_flight[who].len() > 60 {
                    for tag in in_flight[who].drain(..) {
                        let reply = client.wait(tag);
                        assert!(client.transport.failure().is_none(), "{:?}", client.transport.failure());
                        if reply.status.is_ok()
                            && reply.body.len() == size_of::<FileStatus>()
                            && reply.result > 0
                        {
                            files.push(FileHandle(reply.result as u32));
                        }
                    }
                }
                let file = files[random.below(files.len() as u64) as usize];
                let edge = [0, 1, 511, 4096, 65_535, 65_536, 1 << 20, 1 << 63, u64::MAX - 1]
                    [random.below(9) as usize];
                let offset = edge.wrapping_add(random.below(3)).wrapping_sub(1);
                let len = 1 + random.below(64 << 10) as usize;
                let length = len as u32;
                let (command, bulk) = match random.below(9) {
                    0 => {
                        let path = paths[random.below(paths.len() as u64) as usize].as_bytes();
                        let flags = 1 + random.below(511) as u32;
                        let flags = if flags & RW == 0 { flags | OPEN_READ } else { flags };
                        (Command::Open { flags, mode: random.below(0o10000) as u32, path }, Bulk::None)
                    }
                    1 if random.below(4) == 0 => (Command::Close(file), Bulk::None),
                    1 | 2 => (Command::Stat(file), Bulk::None),
                    3 => (Command::Read { file, offset, length }, Bulk::In(buffers(&vec![0; len]))),
                    4 => (Command::Write { file, offset, length }, Bulk::Out(buffers(&vec![1; len]))),
                    5 => (Command::Fsync { file, data_only: random.below(2) == 0 }, Bulk::None),
                    6 => (
                        Command::Discard { file, offset, length: random.below(u64::MAX) >> random.below(64) },
                        Bulk::None,
                    ),
                    // Not beyond the end of what is written, which would make huge files.
                    7 => (
                        Command::WriteZeroes {
                            file,
                            offset: offset % (1 << 20),
                            length: random.below(1 << 20),
                        },
                        Bulk::None,
                    ),
                    _ => (Command::Cancel { id: random.below(64) | random.below(8) << 32 }, Bulk::None),
                };
                in_flight[who].push(client.send(&command, bulk).0);
            }
            assert_eq!(good.read(good_file, 0, 10).unwrap(), b"good");
        }
        good.close(good_file).unwrap();
        drop(good);
        let stats = server.stats_until("everything is gone", |stats| stats.is_idle());
        for name in ["errors", "read_bytes", "written_bytes", "close", "cancel"] {
            assert!(stats.get(name) > 0, "{name} in {}", stats.0);
        }
    });
}

#[test]
fn the_statistics_count_what_was_done() {
    each(|variant| {
        let mut server = Server::start(variant, &["--workers", "2"]);
        let mut client = server.client();
        let file = client.open("/d/f", NEW).unwrap();
        client.write(file, 0, &[1; 5000]).unwrap();
        client.read(file, 0, 10_000).unwrap();
        client.read(file, 0, 1000).unwrap();
        assert_eq!(client.open("/d/none", OPEN_READ), Err(libc::ENOENT));
        let reply = client.call(&Command::Cancel { id: 999 }, Bulk::None);
        assert_eq!(reply.status.errno, libc::ENOENT);
        let expected = [
            ("answered", 6),
            ("workers", 2),
            ("accepted", 1),
            ("connections", 1),
            ("sessions", 1),
            ("open_files", 1),
            ("open", 2),
            ("write", 1),
            ("read", 2),
            ("cancel", 1),
            ("errors", 2),
            ("read_bytes", 6000),
            ("written_bytes", 5000),
            ("slot_bytes", 0),
        ];
        // A worker publishes some of them once it may sleep.
        let stats = server
            .stats_until("counted", |stats| expected.iter().all(|&(name, value)| stats.get(name) == value));
        let backend =
            if variant == Variant::Uring { "\"backend\":\"uring\"" } else { "\"backend\":\"threads\"" };
        assert!(stats.0.contains(backend), "{}", stats.0);
    });
}

#[test]
fn an_idle_server_sleeps() {
    each(|variant| {
        let mut server = Server::start(variant, &[]);
        let mut client = server.client();
        client.open("/d/f", NEW).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let before = server.stats();
        std::thread::sleep(Duration::from_millis(500));
        let after = server.stats();
        let iterations = after.get("iterations") - before.get("iterations");
        assert!(iterations < 20, "{iterations} iterations with nothing to do");
        client.send(&Command::Read { file: FileHandle(0), offset: 0, length: 8 }, Bulk::In(buffers(&[0; 8])));
    });
}
