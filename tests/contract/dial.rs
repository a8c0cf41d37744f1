//! Connections that are made without waiting: by a program that polls a descriptor, and on a clock of its
//! own. What TCP alone shows is in the unit tests of `src/tcp/client/dial.rs` and `src/mux/dial.rs`.

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use raio_transport::Error;
use raio_transport::address::Scheme;
use raio_transport::connecting::Connecting;
use raio_transport::handshake::{Offer, Policy};
use raio_transport::loopback::{LoopbackDial, LoopbackEnd};
use raio_transport::memory::{Arena, Buffer, Buffers, Region};
use raio_transport::message::Parsed;
use raio_transport::mux::{Dial, Reached};
use raio_transport::rdma;
use raio_transport::transport::{Bulk, ClientTransport, Incoming, Listener};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::harness::{
    Client, Op, PATIENCE, Transport, bytes_of, command, has_rdma, pattern, rdma_listener, rdma_source,
    serve_plain, tcp_pair_by_rdma,
};
use crate::rdma_end::{self, End};

/// How long a dial may take, on a clock that stands still.
const TIME: Duration = Duration::from_secs(60);

/// Steps a dial until it is over, by its descriptor alone.
fn by_its_descriptor(dial: &mut Dial, mut between: impl FnMut()) -> Result<Reached, Error> {
    loop {
        if let Some(outcome) = dial.step(Instant::now()) {
            return outcome;
        }
        between();
        let mut fds = [PollFd::from_borrowed_fd(dial.poll_fd().unwrap(), PollFlags::IN)];
        let timeout = Timespec::try_from(PATIENCE).unwrap();
        assert_eq!(poll(&mut fds, Some(&timeout)), Ok(1), "the descriptor does not tell");
    }
}

fn dial(scheme: Scheme, address: SocketAddr) -> Dial {
    let now = Instant::now();
    Dial::begin(scheme, address, &Offer::new("dial"), now, now + TIME)
}

#[test]
fn a_dial_by_rdma_waits_for_its_descriptor_alone() {
    if !has_rdma() {
        return;
    }
    let server = serve_plain(Transport::Rdma);
    for _ in 0..3 {
        let reached = by_its_descriptor(&mut dial(Scheme::Rdma, server.rdma_address()), || {}).unwrap();
        assert_eq!(reached.why_tcp, None);
        Client::over(reached.transport).works();
    }
    server.until_empty(0);
}

#[test]
fn a_dial_that_moves_to_rdma_waits_for_its_descriptor_alone() {
    if !has_rdma() {
        return;
    }
    let server = serve_plain(Transport::RdmaAfterTcp);
    let (_, at) = tcp_pair_by_rdma();
    let listener = TcpListener::bind((at.local_addr().unwrap().ip(), 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    for _ in 0..3 {
        let mut dial = dial(Scheme::Any, listener.local_addr().unwrap());
        let reached = by_its_descriptor(&mut dial, || {
            if let Ok((stream, _)) = listener.accept() {
                stream.set_nonblocking(true).unwrap();
                server.serve(stream);
            }
        });
        let reached = reached.unwrap();
        assert_eq!(reached.why_tcp, None);
        Client::over(reached.transport).works();
    }
    server.until_empty(0);
}

// Peers by rdma_cm that leave it in the middle
// ------------------------------------------------------------------------------------------------------

/// A dial by rdma_cm at a time that does not pass by itself.
struct Halfway {
    now: Instant,
    dial: Box<dyn Connecting<Outcome = Result<Box<dyn ClientTransport>, Error>>>,
    listener: Box<dyn Listener>,
}

impl Halfway {
    fn new() -> Self {
        let listener = rdma_listener();
        let now = Instant::now();
        let dial = rdma::dial(listener.address(), rdma_source(), &Offer::new("half"), now + TIME);
        Self { now, dial, listener }
    }

    fn step(&mut self) -> Option<Error> {
        self.dial.step(self.now).map(|outcome| outcome.map(|_| ()).expect_err("there is no welcome"))
    }

    /// Steps until the server's end has what is looked for.
    fn until<T>(&mut self, mut look: impl FnMut(&dyn Listener) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look(&*self.listener) {
                return found;
            }
            assert!(Instant::now() < until, "the dial does not go on");
            let error = self.step();
            assert!(error.is_none(), "it is over: {error:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn asked(&mut self) -> Box<dyn Incoming> {
        self.until(|listener| listener.accept())
    }

    /// The server's end of one that has sent its hello.
    fn greeted(&mut self) -> Box<dyn End> {
        let incoming = self.asked();
        let mut end = rdma_end::accept(incoming).unwrap();
        let hello = self.until(|_| end.receive());
        assert!(matches!(Policy::default().welcome(&hello), Ok(Parsed::Item(..))));
        end
    }

    /// Why it ends.
    fn error(&mut self) -> Error {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(error) = self.step() {
                return error;
            }
            assert!(Instant::now() < until, "it does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn a_server_by_rdma_that_does_not_answer_is_asked_again_until_the_deadline() {
    if !has_rdma() {
        return;
    }
    let mut half = Halfway::new();
    let began = half.now;
    let first = half.asked();
    let second_at = half.dial.step_by();
    assert!(second_at > began && second_at < began + TIME / 10, "rdma_cm itself would take longer");
    half.now = second_at;
    let second = half.asked();
    let third_at = half.dial.step_by();
    assert_eq!(third_at - second_at, 2 * (second_at - began), "it is given twice the time");
    half.now = began + TIME;
    let error = half.error();
    assert_eq!(error.errno(), libc::ETIMEDOUT);
    assert!(error.to_string().starts_with("Cannot connect to "), "{error}");
    drop((first, second));
}

#[test]
fn a_server_by_rdma_that_turns_away_or_goes_is_told_apart() {
    if !has_rdma() {
        return;
    }
    let mut half = Halfway::new();
    half.asked().reject(libc::EUSERS, "All seats are taken.");
    let error = half.error();
    assert_eq!(error.errno(), libc::EUSERS);
    assert!(error.to_string().contains("All seats are taken."), "{error}");
    let mut half = Halfway::new();
    drop(half.asked());
    let error = half.error();
    assert_ne!(error.errno(), libc::ETIMEDOUT, "{error}");
    let mut half = Halfway::new();
    drop(half.greeted());
    let error = half.error();
    assert!(error.to_string().contains("during the handshake"), "{error}");
}

#[test]
fn a_server_by_rdma_that_says_nothing_has_until_the_deadline() {
    if !has_rdma() {
        return;
    }
    let mut half = Halfway::new();
    let _end = half.greeted();
    assert_eq!(half.dial.step_by(), half.now + TIME);
    half.now += TIME - Duration::from_nanos(1);
    assert!(half.step().is_none());
    half.now += Duration::from_nanos(1);
    let error = half.step().expect("the time is over");
    assert_eq!(error.errno(), libc::ETIMEDOUT);
    assert!(error.to_string().contains("did not finish the handshake in time"), "{error}");
}

#[test]
fn a_dial_by_rdma_may_be_given_up_wherever_it_is() {
    if !has_rdma() {
        return;
    }
    let mut half = Halfway::new();
    half.step();
    drop(half);
    let mut half = Halfway::new();
    let incoming = half.asked();
    drop(half);
    drop(incoming);
    let mut half = Halfway::new();
    let mut end = half.greeted();
    drop(half);
    let until = Instant::now() + PATIENCE;
    while !end.has_lost_peer() {
        assert!(Instant::now() < until, "its peer is not told");
    }
}

// In-process
// ------------------------------------------------------------------------------------------------------

#[test]
fn a_dial_in_process_has_until_the_deadline_and_ends_with_its_peer() {
    let now = Instant::now();
    let offer = Offer::new("dial");
    let (ours, theirs) = LoopbackEnd::pair().unwrap();
    let mut dial = LoopbackDial::new(ours, &offer, now + TIME);
    assert!(dial.step(now + TIME - Duration::from_nanos(1)).is_none());
    assert_eq!(theirs.receive(), Some(offer.hello()));
    assert_eq!(dial.step(now + TIME).expect("the time is over").unwrap_err().errno(), libc::ETIMEDOUT);

    let (ours, theirs) = LoopbackEnd::pair().unwrap();
    let mut dial = LoopbackDial::new(ours, &offer, now + TIME);
    assert!(dial.step(now).is_none());
    let Ok(Parsed::Item((_, welcome), _)) = Policy::default().welcome(&offer.hello()) else { panic!() };
    theirs.send(welcome).unwrap();
    drop(theirs);
    // What was sent before the end counts.
    dial.step(now).expect("the welcome is there").unwrap();

    let (ours, theirs) = LoopbackEnd::pair().unwrap();
    let mut dial = LoopbackDial::new(ours, &offer, now + TIME);
    assert!(dial.step(now).is_none());
    drop(theirs);
    assert_eq!(dial.step(now).expect("nobody is there").unwrap_err().errno(), libc::ECONNRESET);
}

// Connecting again
// ------------------------------------------------------------------------------------------------------

/// Memory of a program's: an arena with room for two slots, and a region.
struct Memory {
    arena: Arena,
    region: Region,
    bytes: Box<[u8]>,
}

/// Bytes of each request.
const LEN: usize = 256 << 10;

impl Memory {
    fn new() -> Self {
        let arena = Arena::new(2 * LEN, LEN).unwrap();
        let mut bytes = vec![0; 2 * LEN].into_boxed_slice();
        // SAFETY: the tests drop their buffers before this value.
        let region = unsafe { Region::new(bytes.as_mut_ptr(), bytes.len()) }.unwrap();
        Self { arena, region, bytes }
    }

    /// Room for data in all of it, of which nothing is in use.
    fn rooms(&mut self) -> [Bulk; 4] {
        assert!(!self.region.in_use(), "a buffer is left");
        let mut slot = || Buffer::Slot(self.arena.alloc(LEN).expect("it came back"), LEN);
        let slots = [slot(), slot()];
        let parts = self.bytes.chunks_exact_mut(LEN).map(|part| {
            // SAFETY: there is no other buffer of the region, and nobody looks at its memory meanwhile.
            unsafe { self.region.buffer(part.as_mut_ptr(), LEN) }.expect("it lies within")
        });
        let buffers: Vec<_> =
            slots.into_iter().chain(parts).map(|buffer| Bulk::In(Buffers::One(buffer))).collect();
        buffers.try_into().expect("two and two")
    }
}

contract! {
    fn memory_of_a_lost_connection_serves_the_next_one(transport) {
        let server = serve_plain(transport);
        let mut memory = Memory::new();
        for round in 1..=3 {
            let mut client = server.client();
            client.transport.register_arena(&memory.arena.memory()).unwrap();
            client.transport.register_region(&memory.region).unwrap();
            for (tag, room) in (0..).zip(memory.rooms()) {
                client.send(tag, &command(Op::Get, tag), room);
            }
            for _ in 0..4 {
                let reply = client.next();
                assert!(reply.status.is_ok() && bytes_of(&reply.bulk) == pattern(reply.tag, LEN));
            }
            if matches!(transport, Transport::Rdma | Transport::RdmaAfterTcp) {
                assert_eq!(client.transport.counters().bounced_bytes, 0, "it is registered");
            }
            // The connection breaks with requests outstanding.
            for (tag, room) in (0..).zip(memory.rooms()) {
                client.send(tag, &command(Op::Hold, 0), room);
            }
            client.transport.flush();
            server.until("the requests", |seen| (seen.requests == 9 * round - 1).then_some(()));
            client.send(4, &command(Op::Close, 0), Bulk::None);
            client.transport.flush();
            let replies = client.until_failed();
            assert_eq!(replies.iter().map(|reply| reply.bulk.len_in()).sum::<usize>(), 4 * LEN);
            // The old connection goes first: nobody reaches the memory any more when the next one has it.
            drop(client);
            drop(replies);
        }
        server.until_empty(0);
    }
}
