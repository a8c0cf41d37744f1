//! A hostile client: its whole stream, from the first byte, against a server that runs in this thread.
//!
//! After each input the connection has ended, once, nothing of it is left, and the server serves the next.

#![no_main]

use std::cell::RefCell;
use std::collections::HashSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use raio_fuzz::{Mode, handshake_len, mend_handshake, mend_messages};
use raio_transport::Status;
use raio_transport::handshake::{Offer, Policy};
use raio_transport::memory::Arena;
use raio_transport::message::FEATURE_CRC;
use raio_transport::reactor::{Config, Event, Reactor, Wait};
use raio_transport::tcp;
use raio_transport::transport::{
    Body, Request, RequestKey, Response, ServerEvent, ServerTransport, SlotRange,
};

const DATA_BYTES_MAX: u32 = 64 << 10;
const ARENA_BYTES: usize = 4 << 20;

thread_local! {
    /// Made once: what an input leaves behind, the next one finds.
    static SERVER: RefCell<Server> = RefCell::new(Server::new());
}

fuzz_target!(|input: &[u8]| {
    let Some((&mode, bytes)) = input.split_first() else { return };
    SERVER.with_borrow_mut(|server| server.session(Mode(mode), bytes));
});

struct Server {
    reactor: Reactor,
    transport: tcp::Server,
    arena: Arena,
    events: Vec<Event>,
    opened: usize,
    closed: usize,
    /// Requests not yet answered, and how many there may be.
    unanswered: HashSet<RequestKey>,
    credits: usize,
    held: Vec<RequestKey>,
}

impl Server {
    fn new() -> Self {
        let config = Config {
            epoll: true,
            spin: Duration::ZERO,
            received_count: 4,
            received_bytes: 4096,
            ..Config::default()
        };
        let policy =
            Policy { queue_depth: 8, data_bytes_max: DATA_BYTES_MAX, queue_pair: true, ..Policy::default() };
        Self {
            reactor: Reactor::new(&config).unwrap(),
            transport: tcp::Server::new(1, Arc::new(policy)),
            arena: Arena::new(ARENA_BYTES, DATA_BYTES_MAX as usize).unwrap(),
            events: Vec::new(),
            opened: 0,
            closed: 0,
            unanswered: HashSet::new(),
            credits: 0,
            held: Vec::new(),
        }
    }

    fn session(&mut self, mode: Mode, bytes: &[u8]) {
        let mut bytes = bytes.to_vec();
        let crc = mode.has(Mode::CRC);
        let begins = if mode.has(Mode::HANDSHAKE) {
            if !mode.has(Mode::RAW) {
                mend_handshake(&mut bytes);
            }
            handshake_len(&bytes)
        } else {
            let features = if crc { FEATURE_CRC } else { 0 };
            let hello = Offer { features, session: [1; 16], queue_pair: true, ..Offer::new("fuzz") }.hello();
            let begins = hello.len();
            bytes.splice(0..0, hello);
            begins
        };
        if crc && !mode.has(Mode::RAW) {
            mend_messages(&mut bytes[begins..]);
        }

        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        (self.opened, self.closed) = (0, 0);
        self.transport.adopt(&mut self.reactor, theirs.into());
        for mut piece in mode.pieces(&bytes) {
            while !piece.is_empty() && self.closed == 0 {
                match ours.write(piece) {
                    Ok(n) => piece = &piece[n..],
                    // It does not read on while a request's data waits.
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => self.release(),
                    Err(_) => break,
                }
                self.turn();
                // What it answers is of no interest, but must be taken.
                while matches!(ours.read(&mut [0; 4096]), Ok(n) if n > 0) {
                    self.turn();
                }
            }
        }
        drop(ours);
        for _ in 0..1000 {
            if self.transport.connections() == 0 && self.closed > 0 {
                break;
            }
            self.release();
            self.turn();
        }
        assert_eq!((self.transport.connections(), self.closed), (0, 1), "the connection has not ended, once");
        assert!(self.opened <= 1 && self.unanswered.is_empty());
        assert_eq!((self.reactor.in_flight(), self.arena.used_bytes()), (0, 0), "something is left");
    }

    fn turn(&mut self) {
        self.transport.run_once(&mut self.reactor, Wait::Poll, &mut self.events).unwrap();
        while let Some(exchange) = self.transport.next_exchange() {
            // It moves, or stays, as the client's own number says.
            let answer = if exchange.theirs.qpn & 1 == 0 {
                Ok(&exchange.theirs)
            } else {
                Err((Status::transport(19), "There is no device."))
            };
            self.transport.answer_exchange(&mut self.reactor, exchange.connection, answer);
        }
        while let Some(event) = self.transport.next_event() {
            match event {
                ServerEvent::Opened(_, peer) => {
                    self.opened += 1;
                    self.credits = peer.grant.credits() as usize;
                }
                ServerEvent::Closed(..) => {
                    self.closed += 1;
                    self.unanswered.clear();
                    self.held.clear();
                }
                ServerEvent::Request(request) => {
                    assert!(self.opened == 1 && self.closed == 0);
                    assert!(self.unanswered.insert(request.key), "a request comes once");
                    assert!(self.unanswered.len() <= self.credits, "credits are exceeded");
                    assert!(request.data_len <= DATA_BYTES_MAX && request.region_len <= DATA_BYTES_MAX);
                    self.request(&request);
                }
                ServerEvent::Fetched(key, range) => {
                    assert!(range.start + range.len <= range.slot.len());
                    self.answer(key, Status::OK, None);
                }
            }
        }
        self.transport.flush(&mut self.reactor);
    }

    /// The first byte of the command says what becomes of it.
    fn request(&mut self, request: &Request) {
        match request.body.first().copied().unwrap_or(0) % 8 {
            0 => self.answer(request.key, Status::policy(1), None),
            1 => self.held.push(request.key),
            2 => {
                self.release();
                self.answer(request.key, Status::OK, None);
            }
            3 => {
                let connection = request.key.connection;
                self.transport.close(&mut self.reactor, connection, Status::policy(1), "Go away.");
            }
            _ if request.data_len > 0 => {
                let slot = self.arena.alloc(request.data_len as usize).expect("credits bound what is needed");
                self.transport.fetch(&mut self.reactor, request.key, slot, 0);
            }
            _ if request.region_len > 0 => {
                let len = request.region_len as usize;
                match self.arena.alloc(len) {
                    Some(slot) => {
                        self.answer(request.key, Status::OK, Some(SlotRange { slot, start: 0, len }));
                    }
                    None => self.answer(request.key, Status::storage(12), None),
                }
            }
            _ => self.answer(request.key, Status::OK, None),
        }
    }

    /// Answers what was held.
    fn release(&mut self) {
        for key in std::mem::take(&mut self.held) {
            self.answer(key, Status::OK, None);
        }
    }

    fn answer(&mut self, key: RequestKey, status: Status, data: Option<SlotRange>) {
        self.unanswered.remove(&key);
        let response = Response { status, result: 0, body: Body::from(&[][..]), data };
        self.transport.respond(&mut self.reactor, key, response);
    }
}
