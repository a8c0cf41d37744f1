use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::time::Duration;

use super::*;
use crate::error::{Class, Status};
use crate::handshake::{ChannelOffer, Grant, Peer, Policy};
use crate::message::{self, Link, Parsed, QueuePairAddress};

/// How long the real clock may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the dial may, on a clock that stands still.
const TIME: Duration = Duration::from_secs(8);

const OURS: QueuePairAddress = QueuePairAddress {
    gid: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1],
    qpn: 77,
    psn: 1,
    peer_psn: 2,
    mtu: 1024,
    lid: 0,
    reads: 1,
    link: Link::Ethernet,
};
const THEIRS: QueuePairAddress = QueuePairAddress { qpn: 78, psn: 2, peer_psn: 1, reads: 0, ..OURS };

/// Stands for [`rdma::upgrade`] where there is no RDMA. Its queue pair "answers" once the stream that goes
/// along has received something; if that has ended, it fails.
fn queue_pair(_: IpAddr, _: &Grant) -> Result<(QueuePairAddress, ConnectQueuePair), Error> {
    Ok((
        OURS,
        Box::new(|theirs, stream, now, deadline| {
            assert_eq!(*theirs, THEIRS);
            Ok(Box::new(FakeProof {
                since: stream.last_rx(),
                stream: Some(stream),
                until: now + (deadline - now) / 4,
            }))
        }),
    ))
}

struct FakeProof {
    stream: Option<Box<dyn ClientTransport>>,
    since: Instant,
    until: Instant,
}

impl Connecting for FakeProof {
    type Outcome = Result<Box<dyn ClientTransport>, Error>;

    fn step(&mut self, now: Instant) -> Option<Self::Outcome> {
        let stream = self.stream.as_mut()?;
        stream.receive(&mut Vec::new());
        if stream.failure().is_some() || now >= self.until {
            return Some(Err(Error::Unsupported("the queue pair is silent".into())));
        }
        if stream.last_rx() == self.since {
            return None;
        }
        self.stream.take().map(Ok)
    }

    fn awaited(&mut self) -> Vec<Awaited<'_>> {
        self.stream.iter_mut().map(|stream| Awaited::input(stream.poll_fd().0)).collect()
    }

    fn step_by(&self) -> Instant {
        self.until
    }
}

/// A dial at a time that does not pass by itself, and its server by hand.
struct Test {
    now: Instant,
    dial: Dial,
    listener: TcpListener,
    /// The dial's descriptor, once it has one.
    fd: Option<i32>,
}

fn offer() -> Offer {
    let channel = ChannelOffer { number: 1, epoch: 5, linger: Duration::from_secs(10) };
    Offer { channel: Some(channel), ..Offer::new("test") }
}

impl Test {
    fn new(scheme: Scheme) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let now = Instant::now();
        let dial = Dial::begin(scheme, listener.local_addr().unwrap(), &offer(), now, now + TIME);
        assert!(dial.poll_fd().is_none() && dial.step_by() <= now, "it is to be stepped");
        Self { now, dial, listener, fd: None }
    }

    /// One that is to move to a queue pair.
    fn moving() -> (Self, TcpStream) {
        let mut test = Self::new(Scheme::Any);
        test.dial.make_queue_pair = queue_pair;
        let offer = Offer { queue_pair: true, ..offer() };
        test.dial.state = State::Stream(TcpDial::new(test.dial.endpoint.clone(), &offer, test.dial.deadline));
        test.step_none();
        let (stream, peer) = test.greet(true);
        assert!(peer.grant.queue_pair);
        assert_eq!(peer.channel.unwrap().epoch, 5);
        test.wait();
        test.step_none();
        (test, stream)
    }

    fn step(&mut self) -> Option<Result<Reached, Error>> {
        let outcome = self.dial.step(self.now);
        if outcome.is_none() {
            let fd = self.dial.poll_fd().expect("it waits for something").as_raw_fd();
            assert_eq!(*self.fd.get_or_insert(fd), fd, "it stays the same");
        }
        outcome
    }

    fn step_none(&mut self) {
        let outcome = self.step();
        assert!(outcome.is_none(), "it is over: {:?}", outcome.map(|outcome| outcome.map(|_| ())));
    }

    fn is_readable(&self, until: Instant) -> bool {
        let epoll = epoll::create(CreateFlags::CLOEXEC).unwrap();
        // As a foreign event loop has it: in an instance of its own.
        epoll::add(&epoll, self.dial.poll_fd().unwrap(), EventData::new_u64(0), EventFlags::IN).unwrap();
        let left = until.saturating_duration_since(Instant::now());
        let timeout = rustix::event::Timespec::try_from(left).unwrap();
        let mut fds = [rustix::event::PollFd::new(&epoll, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&timeout)).unwrap() > 0
    }

    fn wait(&self) {
        assert!(self.is_readable(Instant::now() + PATIENCE), "nothing comes");
    }

    /// The server's end of the next connection.
    fn accept(&self) -> TcpStream {
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Steps the dial until its hello has come, and welcomes it.
    fn greet(&mut self, queue_pair: bool) -> (TcpStream, Box<Peer>) {
        let mut stream = self.accept();
        stream.set_nonblocking(true).unwrap();
        let policy = Policy { queue_pair, ..Policy::default() };
        let (mut hello, until) = (Vec::new(), Instant::now() + PATIENCE);
        loop {
            assert!(Instant::now() < until, "no hello comes");
            let mut bytes = [0; 4096];
            if let Ok(n) = stream.read(&mut bytes) {
                hello.extend_from_slice(&bytes[..n]);
            }
            match policy.welcome(&hello).unwrap() {
                Parsed::Item((peer, welcome), _) => {
                    stream.set_nonblocking(false).unwrap();
                    stream.write_all(&welcome).unwrap();
                    return (stream, Box::new(peer));
                }
                Parsed::Need(_) => self.step_none(),
            }
        }
    }

    /// What the dial ends with, without the clock going on.
    fn outcome(&mut self) -> Result<Reached, Error> {
        loop {
            self.wait();
            if let Some(outcome) = self.step() {
                return outcome;
            }
        }
    }

    /// The dial goes on with a second connection, which it is not asked to move, and says this of it.
    fn falls_back(&mut self, why: &str) {
        self.step_none();
        let (_stream, peer) = self.greet(false);
        assert!(!peer.grant.queue_pair);
        assert_eq!(peer.channel.unwrap().epoch, 6, "a server takes no epoch twice");
        assert_eq!(self.dial.epoch(), Some(6));
        let reached = self.outcome().unwrap();
        assert_eq!(reached.why_tcp.as_deref(), Some(why));
        assert!(reached.transport.failure().is_none());
    }
}

fn read_queue_pair(stream: &mut TcpStream) {
    let mut bytes = Vec::new();
    message::encode_queue_pair(Ok(&OURS), false, &mut bytes);
    let mut got = vec![0; bytes.len()];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(got, bytes);
}

fn answer(answer: Result<&QueuePairAddress, (Status, &str)>) -> Vec<u8> {
    let mut bytes = Vec::new();
    message::encode_queue_pair(answer, false, &mut bytes);
    bytes
}

fn rejection() -> Vec<u8> {
    let status = Status { errno: libc::ENODEV, class: Class::Transport, retryable: false };
    answer(Err((status, "it has no such device.")))
}

fn sign_of_life() -> Vec<u8> {
    let mut bytes = Vec::new();
    message::encode_ping(7, false, &mut bytes);
    bytes
}

#[test]
fn a_dial_over_tcp_needs_a_descriptor_and_no_time() {
    let mut test = Test::new(Scheme::Tcp);
    test.step_none();
    let (stream, _) = test.greet(false);
    let reached = test.outcome().unwrap();
    assert_eq!((reached.why_tcp, test.dial.epoch()), (None, Some(5)));
    let port = stream.peer_addr().unwrap().port();
    assert_eq!(reached.transport.local_port(), Some(port));
    assert!(test.dial.step(test.now).is_none(), "it is over");
}

#[test]
fn the_descriptor_is_readable_only_when_there_is_something_to_do() {
    let mut test = Test::new(Scheme::Tcp);
    test.step_none();
    let mut stream = test.accept();
    while test.is_readable(Instant::now()) {
        test.step_none();
    }
    stream.write_all(b"r").unwrap();
    test.wait();
    test.step_none();
    assert!(!test.is_readable(Instant::now()), "what came was taken in");
}

#[test]
fn without_rdma_it_is_over_tcp_and_says_why() {
    if rdma::unavailable().is_none() {
        return;
    }
    let mut test = Test::new(Scheme::Any);
    test.step_none();
    let (_stream, peer) = test.greet(true);
    assert!(!peer.grant.queue_pair, "it is not asked for");
    let why = test.outcome().unwrap().why_tcp.unwrap();
    assert!(why.starts_with("Connected over TCP, not RDMA: there is no RDMA here ("), "{why}");
    let mut test = Test::new(Scheme::Rdma);
    let error = test.step().expect("it fails at once").map(|_| ()).unwrap_err();
    assert_eq!(error.errno(), libc::EPROTONOSUPPORT);
}

#[test]
fn a_server_without_rdma_leaves_it_on_tcp() {
    let mut test = Test::new(Scheme::Any);
    let offer = Offer { queue_pair: true, ..offer() };
    test.dial.state = State::Stream(TcpDial::new(test.dial.endpoint.clone(), &offer, test.dial.deadline));
    test.step_none();
    let (_stream, _) = test.greet(false);
    let reached = test.outcome().unwrap();
    assert_eq!(test.dial.epoch(), Some(5));
    assert!(reached.why_tcp.unwrap().contains("the server has no RDMA"));
}

#[test]
fn it_moves_when_the_answer_comes_byte_by_byte_and_the_queue_pair_is_proven() {
    let (mut test, mut stream) = Test::moving();
    read_queue_pair(&mut stream);
    assert_eq!(test.dial.step_by(), test.now + TIME / 2, "half of the time is for the exchange");
    for byte in answer(Ok(&THEIRS)) {
        test.step_none();
        stream.write_all(&[byte]).unwrap();
        test.wait();
    }
    test.step_none();
    assert_eq!(test.dial.step_by(), test.now + TIME / 4, "and a quarter of what is left for the proof");
    stream.write_all(&sign_of_life()).unwrap();
    let reached = test.outcome().unwrap();
    assert_eq!((reached.why_tcp, test.dial.epoch()), (None, Some(5)));
}

#[test]
fn a_server_that_makes_no_queue_pair_keeps_the_connection() {
    let (mut test, mut stream) = Test::moving();
    read_queue_pair(&mut stream);
    for byte in rejection() {
        test.step_none();
        stream.write_all(&[byte]).unwrap();
        test.wait();
    }
    let reached = test.step().expect("it is over").unwrap();
    assert_eq!(test.dial.epoch(), Some(5));
    let why = reached.why_tcp.unwrap();
    assert_eq!(why, "Connected over TCP, not RDMA: the server says: it has no such device.");
    assert!(reached.transport.failure().is_none());
    drop(reached.transport);
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0, "it was the same connection");
}

#[test]
fn a_server_that_says_nothing_of_its_queue_pair_has_half_the_time() {
    for said in [0, 1, answer(Ok(&THEIRS)).len() - 1] {
        let (mut test, mut stream) = Test::moving();
        if said > 0 {
            stream.write_all(&answer(Ok(&THEIRS))[..said]).unwrap();
            test.wait();
            test.step_none();
        }
        test.now += TIME / 2 - Duration::from_nanos(1);
        test.step_none();
        test.now += Duration::from_nanos(1);
        test.falls_back(
            "Connected over TCP, not RDMA: the connection has ended: the connection has ended: the server \
             made no queue pair in time. If the server still runs, its log says more.",
        );
    }
}

#[test]
fn a_server_that_goes_away_while_it_moves_is_connected_to_anew() {
    for (at, said) in [(0, 0), (1, 1), (2, answer(Ok(&THEIRS)).len())] {
        let (mut test, mut stream) = Test::moving();
        read_queue_pair(&mut stream);
        if said > 0 {
            stream.write_all(&answer(Ok(&THEIRS))[..said]).unwrap();
            test.wait();
            test.step_none();
        }
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
        drop(stream);
        test.wait();
        test.step_none();
        let (_stream, peer) = test.greet(false);
        assert_eq!(peer.channel.unwrap().epoch, 6);
        let why = test.outcome().unwrap().why_tcp.unwrap();
        let is_proof = why.contains("the queue pair is silent");
        assert_eq!(is_proof, at == 2, "{why}");
    }
}

#[test]
fn a_queue_pair_that_is_not_proven_in_time_leaves_time_to_connect_anew() {
    let (mut test, mut stream) = Test::moving();
    stream.write_all(&answer(Ok(&THEIRS))).unwrap();
    test.wait();
    test.step_none();
    test.now = test.dial.step_by();
    test.falls_back("Connected over TCP, not RDMA: the queue pair is silent.");
}

#[test]
fn a_server_that_is_gone_for_good_ends_the_dial_while_it_connects_anew() {
    let (mut test, stream) = Test::moving();
    test.now = test.dial.step_by();
    test.listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let outcome = match test.step() {
        Some(outcome) => outcome,
        None => test.outcome(),
    };
    assert_eq!(outcome.map(|_| ()).unwrap_err().errno(), libc::ECONNREFUSED);
    assert_eq!(test.dial.epoch(), Some(6), "it may have been offered");
    drop(stream);
}

#[test]
fn a_deadline_ends_it_in_the_second_connection_too() {
    let (mut test, _stream) = Test::moving();
    test.now += TIME / 2;
    test.step_none();
    let _second = test.accept();
    while test.is_readable(Instant::now()) {
        test.step_none();
    }
    assert_eq!(test.dial.step_by(), test.dial.deadline);
    test.now = test.dial.deadline;
    let error = test.step().expect("the time is over").map(|_| ()).unwrap_err();
    assert_eq!(error.errno(), libc::ETIMEDOUT);
}

#[test]
fn a_dial_may_be_given_up_wherever_it_is() {
    let (mut test, mut stream) = Test::moving();
    stream.write_all(&answer(Ok(&THEIRS))).unwrap();
    test.wait();
    test.step_none();
    read_queue_pair(&mut stream);
    drop(test.dial);
    // A reset or an end: nothing of it is left open.
    assert!(matches!(stream.read(&mut [0; 16]), Ok(0) | Err(_)));
}

#[test]
fn a_dial_goes_from_thread_to_thread() {
    fn is_send<T: Send>(_: &T) {}
    is_send(&Mutex::new(Dial::begin(
        Scheme::Any,
        std::net::SocketAddr::from(([127, 0, 0, 1], 1)),
        &offer(),
        Instant::now(),
        Instant::now(),
    )));
}

#[test]
fn a_wait_for_a_dial_is_one_call() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let client = std::thread::spawn(move || {
        connect(Scheme::Tcp, address, &offer(), Instant::now() + PATIENCE).map(|reached| reached.why_tcp)
    });
    let (mut stream, _) = listener.accept().unwrap();
    let mut hello = vec![0; offer().hello().len()];
    stream.read_exact(&mut hello).unwrap();
    let Ok(Parsed::Item((_, welcome), _)) = Policy::default().welcome(&hello) else { panic!("no hello") };
    for byte in welcome {
        stream.write_all(&[byte]).unwrap();
    }
    assert_eq!(client.join().unwrap().unwrap(), None);
}

#[test]
fn a_server_that_is_reached_with_a_key_is_not_reached_by_rdma_cm() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let tls = crate::tls::ClientTls::new(&crate::keys::SecretKey::generate(), &[]);
    let offer = Offer { tls: Some(tls), ..Offer::new("test") };
    let now = Instant::now();
    let mut dial = Dial::begin(Scheme::Rdma, address, &offer, now, now + TIME);
    let Some(Err(error)) = dial.step(now) else { panic!("it goes on") };
    assert_eq!(error.errno(), libc::EPROTONOSUPPORT);
    assert!(error.to_string().contains("Use raio:// or raio+tcp://"), "{error}");
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}
