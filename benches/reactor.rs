//! What one iteration of the reactor takes, over io_uring and over epoll. No iteration sleeps.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use divan::Bencher;
use raio_transport::reactor::{Config, Event, File, Op, Reactor, Token, Wait};

const TOKEN: Token = Token { owner: 1, value: 7 };
/// Length of a request for a read: header and command.
const MESSAGE: [u8; 64] = [1; 64];

#[derive(Clone, Copy, Debug)]
enum Engine {
    Uring,
    Epoll,
}

fn main() {
    divan::main();
}

/// None, and a line that says so: the machine has no io_uring.
fn reactor(engine: Engine) -> Option<Reactor> {
    let epoll = matches!(engine, Engine::Epoll);
    let reactor = Reactor::new(&Config { epoll, ..Config::default() }).expect("a reactor");
    if !epoll && let Some(reason) = reactor.fallback_reason() {
        eprintln!("SKIPPED over io_uring: {reason}");
        return None;
    }
    Some(reactor)
}

/// Polls until something has ended, which is in the first iteration as a rule.
fn wait_for_one(reactor: &mut Reactor, events: &mut Vec<Event>) -> Event {
    loop {
        reactor.run_once(Wait::Poll, events).expect("an iteration");
        if let Some(event) = events.pop() {
            return event;
        }
    }
}

/// Per iteration: a receive is in flight, and nothing has come.
#[divan::bench(args = [Engine::Uring, Engine::Epoll], sample_size = 1000)]
fn empty(bencher: Bencher, engine: Engine) {
    let Some(mut reactor) = reactor(engine) else { return };
    let (_client, socket) = pair(&mut reactor);
    reactor.submit(TOKEN, Op::Recv { socket, len_max: 64 << 10 });
    let mut events = Vec::new();
    bencher.bench_local(|| {
        reactor.run_once(Wait::Poll, &mut events).expect("an iteration");
        assert!(events.is_empty(), "{events:?}");
    });
}

/// Per message: 64 bytes are written to one end of a socket pair and received from the other. The write(2) of
/// the sender is part of it.
#[divan::bench(args = [Engine::Uring, Engine::Epoll], sample_size = 1000)]
fn message(bencher: Bencher, engine: Engine) {
    let Some(mut reactor) = reactor(engine) else { return };
    let (mut client, socket) = pair(&mut reactor);
    let mut events = Vec::new();
    bencher.bench_local(|| {
        client.write_all(&MESSAGE).expect("a write");
        reactor.submit(TOKEN, Op::Recv { socket: socket.clone(), len_max: 64 << 10 });
        let event = wait_for_one(&mut reactor, &mut events);
        assert_eq!(event.result, Ok(MESSAGE.len() as u32));
    });
}

/// Per timer: it is set beside 1,000 that are not due, and comes in the next iteration.
#[divan::bench(args = [Engine::Uring, Engine::Epoll], sample_size = 1000)]
fn timer(bencher: Bencher, engine: Engine) {
    let Some(mut reactor) = reactor(engine) else { return };
    let in_a_day = reactor.clock().now() + Duration::from_secs(86_400);
    for value in 1000..2000 {
        reactor.timer(in_a_day, Token { value, ..TOKEN });
    }
    let mut events = Vec::new();
    bencher.bench_local(|| {
        reactor.timer(reactor.clock().now(), TOKEN);
        let event = wait_for_one(&mut reactor, &mut events);
        assert_eq!(event.token, TOKEN);
    });
}

fn pair(reactor: &mut Reactor) -> (UnixStream, File) {
    let (client, server) = UnixStream::pair().expect("a socket pair");
    server.set_nonblocking(true).expect("a socket that does not block");
    (client, reactor.file(OwnedFd::from(server)))
}
