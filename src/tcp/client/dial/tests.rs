use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use socket2::{Domain, Type};

use super::*;
use crate::connecting::sleep;
use crate::handshake::Policy;
use crate::message::{self, SessionId};
use crate::transport::ClientTransport;

/// How long the real clock may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the dial may, on a clock that stands still.
const TIME: Duration = Duration::from_secs(3);

/// A dial at a time that does not pass by itself, and the server's end of its stream.
struct Test {
    now: Instant,
    dial: TcpDial,
    peer: TcpStream,
}

fn offer() -> Offer {
    Offer { session: SessionId([7; 16]), ..Offer::new("test") }
}

fn welcome() -> Vec<u8> {
    let Ok(Parsed::Item((_, welcome), _)) = Policy::default().welcome(&offer().hello()) else {
        panic!("half a hello")
    };
    welcome
}

/// Waits until what a dial waits for has come about.
fn wait(dial: &mut TcpDial) {
    let until = Instant::now() + PATIENCE;
    let awaited = dial.awaited();
    assert_eq!(awaited.len(), 1);
    let _ = sleep(&awaited, until);
    assert!(Instant::now() < until, "nothing comes");
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

impl Test {
    /// One whose hello has gone out.
    fn greeted() -> Self {
        let (listener, address) = listener();
        let now = Instant::now();
        let mut dial = TcpDial::new(address, &offer(), now + TIME);
        assert!(dial.awaited().is_empty(), "nothing happens before the first step");
        assert!(dial.step(now).is_none());
        let (peer, _) = listener.accept().unwrap();
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        while !matches!(dial.state, State::ShakingHands(_)) || dial.awaited()[0].output {
            wait(&mut dial);
            assert!(dial.step(now).is_none());
        }
        Self { now, dial, peer }
    }

    fn read_hello(&mut self) {
        let mut hello = vec![0; offer().hello().len()];
        self.peer.read_exact(&mut hello).unwrap();
        assert_eq!(hello, offer().hello());
    }

    fn step(&mut self) -> Option<Result<TcpClient, Error>> {
        self.dial.step(self.now)
    }

    /// What the dial ends with, once that can be known.
    fn outcome(&mut self) -> Result<TcpClient, Error> {
        loop {
            wait(&mut self.dial);
            if let Some(outcome) = self.step() {
                return outcome;
            }
        }
    }

    /// Ends the peer's side with a reset.
    fn reset(&mut self) {
        abort_on_close(&self.peer, true).unwrap();
        rustix::net::connect_unspec(&self.peer).unwrap();
    }
}

#[test]
fn a_welcome_may_come_byte_by_byte() {
    let mut test = Test::greeted();
    test.read_hello();
    let welcome = welcome();
    for (at, byte) in welcome.iter().enumerate() {
        assert!(test.step().is_none(), "before byte {at}");
        test.peer.write_all(&[*byte]).unwrap();
        wait(&mut test.dial);
    }
    let client = test.step().expect("that was the last").unwrap();
    assert_eq!(client.grant().queue_depth, Policy::default().queue_depth);
    assert!(test.step().is_none() && test.dial.awaited().is_empty(), "it is over");
}

#[test]
fn what_came_behind_the_welcome_is_taken_in() {
    let mut test = Test::greeted();
    test.read_hello();
    let mut bytes = welcome();
    message::encode_ping(9, false, &mut bytes);
    test.peer.write_all(&bytes).unwrap();
    let mut client = test.outcome().unwrap();
    client.receive(&mut Vec::new());
    let mut pong = [0; 40];
    test.peer.read_exact(&mut pong).unwrap();
    assert_eq!((pong[0], pong[8]), (4, 9));
}

#[test]
fn a_hello_goes_out_as_far_as_the_socket_takes_it() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut filled = 0;
    while let Ok(n) = (&ours).write(&[0; 4096]) {
        filled += n;
    }
    let now = Instant::now();
    let mut dial = TcpDial::over(ours, &offer(), now + TIME);
    assert!(dial.step(now).is_none());
    assert!(dial.awaited()[0].output && !dial.awaited()[0].input);
    theirs.read_exact(&mut vec![0; filled]).unwrap();
    wait(&mut dial);
    assert!(dial.step(now).is_none());
    assert!(dial.awaited()[0].input && !dial.awaited()[0].output);
    let mut hello = vec![0; offer().hello().len()];
    theirs.read_exact(&mut hello).unwrap();
    assert_eq!(hello, offer().hello());
    // A part of it that went out is not sent again.
    let State::ShakingHands(handshake) = &mut dial.state else { panic!("the handshake goes on") };
    handshake.sent -= 10;
    assert!(dial.step(now).is_none());
    let mut rest = [0; 10];
    theirs.read_exact(&mut rest).unwrap();
    assert_eq!(rest, hello[hello.len() - 10..]);
    theirs.write_all(&welcome()).unwrap();
    wait(&mut dial);
    dial.step(now).expect("it is over").unwrap();
}

#[test]
fn nobody_there_is_refused() {
    let (listener, address) = listener();
    drop(listener);
    let now = Instant::now();
    let mut dial = TcpDial::new(address, &offer(), now + TIME);
    let error = loop {
        match dial.step(now) {
            Some(outcome) => break outcome.unwrap_err(),
            None => wait(&mut dial),
        }
    };
    assert_eq!(error.errno(), libc::ECONNREFUSED);
    assert!(error.to_string().contains("check that raio_server listens there"), "{error}");
}

#[test]
fn a_server_that_does_not_take_the_connection_has_until_the_deadline() {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    // Once its backlog is full the kernel drops what comes.
    let now = Instant::now();
    let mut dials: Vec<_> = (0..4).map(|_| TcpDial::new(address, &offer(), now + TIME)).collect();
    for dial in &mut dials {
        assert!(dial.step(now).is_none());
    }
    let mut dial = dials.pop().unwrap();
    assert!(matches!(dial.state, State::Connecting(..)));
    assert_eq!(dial.step_by(), now + TIME);
    assert!(dial.step(now + TIME - Duration::from_nanos(1)).is_none());
    let error = dial.step(now + TIME).expect("the time is over").unwrap_err();
    assert_eq!(error.errno(), libc::ETIMEDOUT);
    assert!(error.to_string().starts_with(&format!("Cannot connect to {address}; ")), "{error}");
}

#[test]
fn a_server_that_says_nothing_or_half_of_it_has_until_the_deadline() {
    for said in [0, 1, welcome().len() - 1] {
        let mut test = Test::greeted();
        if said > 0 {
            test.peer.write_all(&welcome()[..said]).unwrap();
            wait(&mut test.dial);
            assert!(test.step().is_none());
        }
        assert_eq!(test.dial.step_by(), test.now + TIME);
        test.now += TIME - Duration::from_nanos(1);
        assert!(test.step().is_none());
        test.now += Duration::from_nanos(1);
        let error = test.step().expect("the time is over").unwrap_err();
        assert_eq!(error.errno(), libc::ETIMEDOUT);
        assert!(error.to_string().starts_with("The handshake with the server failed; "), "{error}");
    }
}

#[test]
fn what_has_come_by_the_deadline_counts() {
    let mut test = Test::greeted();
    test.peer.write_all(&welcome()).unwrap();
    wait(&mut test.dial);
    test.now += 2 * TIME;
    test.step().expect("it is there").unwrap();
}

#[test]
fn a_server_that_goes_away_ends_it_at_once() {
    type Go = fn(&mut Test);
    let goes: [Go; 2] = [Test::reset, |test| test.peer.shutdown(std::net::Shutdown::Write).unwrap()];
    for go in goes {
        for said in [0, 1, welcome().len() - 1] {
            let mut test = Test::greeted();
            test.read_hello();
            if said > 0 {
                test.peer.write_all(&welcome()[..said]).unwrap();
                wait(&mut test.dial);
                assert!(test.step().is_none());
            }
            go(&mut test);
            let error = test.outcome().unwrap_err();
            assert_eq!(error.errno(), libc::ECONNRESET, "{error}");
            assert!(error.to_string().starts_with("The handshake with the server failed; "), "{error}");
        }
    }
}

#[test]
fn a_server_that_resets_before_the_hello_ends_it() {
    let (listener, address) = listener();
    let now = Instant::now();
    let mut dial = TcpDial::new(address, &offer(), now + TIME);
    dial.state = State::Connecting(open(&address.into()).unwrap(), address.into());
    let (peer, _) = listener.accept().unwrap();
    abort_on_close(&peer, true).unwrap();
    drop(peer);
    wait(&mut dial);
    let error = dial.step(now).expect("it is over").unwrap_err();
    assert_eq!(error.errno(), libc::ECONNRESET, "{error}");
}

#[test]
fn a_server_that_speaks_something_else_or_rejects_is_told_apart() {
    let mut test = Test::greeted();
    test.peer.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n").unwrap();
    assert!(matches!(test.outcome(), Err(Error::Violation(crate::Violation::Magic))));
    let mut test = Test::greeted();
    let rejection = Policy::default().rejection(libc::EUSERS, "All seats are taken.");
    test.peer.write_all(&rejection).unwrap();
    let error = test.outcome().unwrap_err();
    assert_eq!(error.errno(), libc::EUSERS);
    assert!(error.to_string().contains("All seats are taken."), "{error}");
}

#[test]
fn a_dial_that_is_given_up_resets_its_connection() {
    let mut test = Test::greeted();
    test.read_hello();
    let Test { dial, mut peer, .. } = test;
    drop(dial);
    assert_eq!(peer.read(&mut [0; 16]).unwrap_err().raw_os_error(), Some(libc::ECONNRESET));
}

#[test]
fn a_unix_socket_with_a_full_backlog_is_tried_again_until_there_is_room() {
    let directory = std::env::temp_dir().join(format!("raio-dial-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("socket");
    let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    listener.bind(&socket2::SockAddr::unix(&path).unwrap()).unwrap();
    listener.listen(0).unwrap();
    let (begun, offer) = (Instant::now(), offer());
    let first = open(&Endpoint::Unix(path.clone())).unwrap();
    let mut dial = TcpDial::new(Endpoint::Unix(path.clone()), &offer, begun + TIME);
    let now = Instant::now();
    assert!(dial.step(now).is_none() && dial.awaited().is_empty());
    assert_eq!(dial.step_by(), now + BACKLOG_RETRY);
    // Not before.
    listener.accept().unwrap();
    assert!(dial.step(now).is_none() && dial.awaited().is_empty());
    assert!(dial.step(now + BACKLOG_RETRY).is_none());
    assert_eq!(dial.step_by(), begun + TIME);
    assert_eq!(dial.awaited().len(), 1);
    drop(first);
    // One that never comes to its turn is given up.
    let mut late = TcpDial::new(Endpoint::Unix(path.clone()), &offer, begun + TIME);
    let error = loop {
        match late.step(late.step_by().max(now)) {
            None => {}
            Some(outcome) => break outcome.unwrap_err(),
        }
    };
    assert_eq!(error.errno(), libc::EAGAIN);
    // And one without a server at once.
    drop(listener);
    let error = TcpDial::new(Endpoint::Unix(path), &offer, begun + TIME).step(now).unwrap().unwrap_err();
    assert_eq!(error.errno(), libc::ECONNREFUSED);
    assert!(error.to_string().contains("check that raio_server listens there"), "{error}");
    std::fs::remove_dir_all(directory).unwrap();
}
