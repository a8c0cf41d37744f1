//! A hostile client: its whole stream, from the first byte, against a server that runs in this thread.
//!
//! After each input the connection has ended, once, nothing of it is left, and the server serves the next.
//! What it fetched is what the client sent, and what the client gets is what the server put there for it:
//! never a byte of what a slot was used for before.

#![no_main]

use std::cell::RefCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use raio_fuzz::{Mode, handshake_len, mend_handshake, mend_messages};
use raio_transport::Status;
use raio_transport::handshake::{Offer, Policy, PushWindows};
use raio_transport::memory::{Arena, Slot};
use raio_transport::message::{
    FEATURE_CRC, Limits, Message, Parsed, SessionId, Welcome, parse, parse_handshake,
};
use raio_transport::reactor::{Config, Event, Reactor, Wait};
use raio_transport::tcp;
use raio_transport::transport::{
    AcceptedStream, Body, ConnectionId, Handover, OneWay, Push, Request, RequestKey, Response, ServerEvent,
    ServerTransport, SlotRange,
};

const DATA_BYTES_MAX: u32 = 64 << 10;
const ARENA_BYTES: usize = 4 << 20;
/// The unsolicited messages that may be under way.
const WINDOWS: PushWindows = PushWindows { to_server: WINDOW, to_client: WINDOW, requests: 4 };
const WINDOW: u16 = 8;
/// What slots are full of before they are used.
const STALE: u8 = 0xee;

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
    transport: tcp::TcpServer,
    arena: Arena,
    events: Vec<Event>,
    opened: usize,
    closed: usize,
    /// Requests not yet answered, and how many there may be.
    unanswered: HashSet<RequestKey>,
    credits: usize,
    held: Vec<RequestKey>,
    /// What the client sends after its handshake, from the next request on.
    sent: Vec<u8>,
    limits: Limits,
    /// The data of requests that are being fetched.
    to_fetch: HashMap<RequestKey, Vec<u8>>,
    /// The data that answers brought, by the request's id.
    brought: HashMap<u64, Vec<Vec<u8>>>,
    /// Answers with data, ever.
    answers: u64,
    /// One-way messages and questions sent, ever: their tags.
    pushes: u64,
    /// One-way messages of the client's that are not released.
    kept: u16,
    /// This side takes no more, or the client.
    refuses: bool,
    is_refused: bool,
    /// One-way messages that the client has not released.
    unreceipted: VecDeque<u64>,
    /// Questions that it has not answered.
    asked: HashSet<u64>,
}

/// The data of an answer, different for each.
fn fill(answer: u64, bytes: &mut [u8]) {
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = (answer as u8).wrapping_mul(37) ^ at as u8 ^ (at >> 8) as u8;
    }
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
        let policy = Policy {
            queue_depth: 8,
            data_bytes_max: DATA_BYTES_MAX,
            queue_pair: true,
            push: WINDOWS,
            ..Policy::default()
        };
        Self {
            reactor: Reactor::new(&config).unwrap(),
            transport: tcp::TcpServer::new(1, Arc::new(policy)),
            arena: Arena::new(ARENA_BYTES, DATA_BYTES_MAX as usize).unwrap(),
            events: Vec::new(),
            opened: 0,
            closed: 0,
            unanswered: HashSet::new(),
            credits: 0,
            held: Vec::new(),
            sent: Vec::new(),
            limits: Limits { crc: false, request_crc: false, data_bytes_max: 0, pong_time: false },
            to_fetch: HashMap::new(),
            brought: HashMap::new(),
            answers: 0,
            pushes: 0,
            kept: 0,
            refuses: false,
            is_refused: false,
            unreceipted: VecDeque::new(),
            asked: HashSet::new(),
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
            let hello = Offer {
                features,
                session: SessionId([1; 16]),
                queue_pair: true,
                push: WINDOWS,
                ..Offer::new("fuzz")
            }
            .hello();
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
        (self.kept, self.refuses, self.is_refused) = (0, false, false);
        self.unreceipted.clear();
        self.asked.clear();
        self.sent = bytes[begins..].to_vec();
        self.to_fetch.clear();
        self.brought.clear();
        let mut received = Vec::new();
        self.transport.adopt(&mut self.reactor, AcceptedStream::new(OwnedFd::from(theirs)));
        for mut piece in mode.pieces(&bytes) {
            while !piece.is_empty() && self.closed == 0 {
                match ours.write(piece) {
                    Ok(n) => piece = &piece[n..],
                    // It does not read on while a request's data waits.
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => self.release(),
                    Err(_) => break,
                }
                self.run_once();
                take(&mut ours, &mut received, || self.run_once());
            }
        }
        // It ends with what was sent; what is answered until then is looked at, too.
        ours.shutdown(Shutdown::Write).unwrap();
        for _ in 0..10 {
            self.release();
            self.run_once();
            take(&mut ours, &mut received, || self.run_once());
        }
        drop(ours);
        for _ in 0..1000 {
            if self.transport.connections() == 0 && self.closed > 0 {
                break;
            }
            self.release();
            self.run_once();
        }
        assert_eq!((self.transport.connections(), self.closed), (0, 1), "the connection has not ended, once");
        assert!(self.opened <= 1 && self.unanswered.is_empty());
        assert_eq!((self.reactor.in_flight(), self.arena.used_bytes()), (0, 0), "something is left");
        self.check(&received);
    }

    /// Whether each answer brought what was put there for it. The last may be cut short.
    fn check(&mut self, mut received: &[u8]) {
        let Ok(Parsed::Item(_, taken)) = parse_handshake::<Welcome>(received) else { return };
        received = &received[taken..];
        while let Parsed::Item(message, taken) =
            parse(received, &self.limits).expect("the server keeps the protocol")
        {
            received = &received[taken..];
            let Message::Response(response, _) = message else { continue };
            let Some((data, rest)) = received.split_at_checked(response.data_len as usize) else { return };
            received = rest;
            if !data.is_empty() {
                let brought =
                    self.brought.get_mut(&response.id).expect("an answer with data for this request");
                let at =
                    brought.iter().position(|brought| brought == data).expect("the bytes of this answer");
                brought.swap_remove(at);
            }
        }
    }

    /// What the next request that arrives brings, as the client sent it.
    fn next_sent(&mut self, key: RequestKey) -> Vec<u8> {
        loop {
            let Ok(Parsed::Item(message, taken)) = parse(&self.sent, &self.limits) else {
                panic!("a request has arrived that was never sent");
            };
            let request = if let Message::Request(request, _) = message { Some(request) } else { None };
            self.sent.drain(..taken);
            if let Some(request) = request {
                assert_eq!(request.id, key.id, "requests arrive in order");
                let data = (request.data_len as usize).min(self.sent.len());
                return self.sent.drain(..data).collect();
            }
        }
    }

    /// A slot without a byte of what it was used for before.
    fn slot(&mut self, bytes: usize) -> Option<Slot> {
        let mut slot = self.arena.alloc(bytes)?;
        slot.bytes_mut().fill(STALE);
        Some(slot)
    }

    fn on_closed(&mut self) {
        self.closed += 1;
        self.unanswered.clear();
        self.held.clear();
    }

    fn run_once(&mut self) {
        self.transport.run_once(&mut self.reactor, Wait::Poll, &mut self.events).unwrap();
        while let Some(handover) = self.transport.next_handover() {
            match handover {
                Handover::Upgrade(request) => {
                    // It moves, or stays, as the client's own number says.
                    let to = ConnectionId { transport: 2, index: 0, generation: 0 };
                    let answer = if request.theirs.qpn & 1 == 0 {
                        Ok((to, &request.theirs))
                    } else {
                        Err((Status::transport(19), "There is no device."))
                    };
                    self.transport.answer_upgrade(&mut self.reactor, request.connection, answer);
                }
                Handover::Ended { .. } => self.on_closed(),
            }
        }
        while let Some(event) = self.transport.next_event() {
            match event {
                ServerEvent::Opened(_, peer) => {
                    self.opened += 1;
                    self.credits = peer.grant.credits() as usize;
                    self.limits = peer.grant.limits();
                }
                ServerEvent::Moved(..) => unreachable!("there is one transport"),
                ServerEvent::Closed(..) => self.on_closed(),
                ServerEvent::Request(request) => {
                    assert!(self.opened == 1 && self.closed == 0);
                    assert!(self.unanswered.insert(request.key), "a request comes once");
                    assert!(self.unanswered.len() <= self.credits, "credits are exceeded");
                    assert!(request.data_len <= DATA_BYTES_MAX && request.region_len <= DATA_BYTES_MAX);
                    let sent = self.next_sent(request.key);
                    self.request(&request, sent);
                }
                ServerEvent::Fetched(key, range) => {
                    let sent = self.to_fetch.remove(&key).expect("it was to be fetched");
                    assert!(range.bytes() == sent, "what arrived is not what was sent");
                    let (before, after) =
                        (&range.slot.bytes()[..range.start], &range.slot.bytes()[range.start + range.len..]);
                    assert!(
                        before.iter().chain(after).all(|&byte| byte == STALE),
                        "it wrote beside the data"
                    );
                    self.answer(key, Status::OK, None);
                }
                ServerEvent::Damaged(key, range) => {
                    let sent = self.to_fetch.remove(&key).expect("it was to be fetched");
                    assert!(range.bytes() == sent, "what arrived is not what was sent");
                    assert!(self.limits.crc, "nobody has asked for checksums");
                    self.answer(key, Status::DAMAGED, None);
                }
                ServerEvent::OneWay(connection, message) => self.one_way(connection, &message),
                ServerEvent::Receipt(_, tag) => {
                    assert_eq!(self.unreceipted.pop_front(), Some(tag), "receipts come in order");
                }
                ServerEvent::Refused(_) => {
                    assert!(!std::mem::replace(&mut self.is_refused, true), "it refuses once");
                    self.unreceipted.clear();
                }
                ServerEvent::Answered(_, answer) => {
                    assert!(self.asked.remove(&answer.tag), "a question is answered once");
                }
            }
        }
        self.transport.flush(&mut self.reactor);
    }

    /// The first byte of a one-way message says what becomes of it.
    fn one_way(&mut self, connection: ConnectionId, message: &[u8]) {
        self.kept += 1;
        assert!(!self.refuses && self.kept <= WINDOW, "more than the window");
        let tag = self.pushes;
        let push = match message.first().copied().unwrap_or(0) % 6 {
            0 => Push::OneWay(OneWay { message, tag, wants_receipt: true }),
            1 => Push::Request(tag, message),
            2 => Push::Refuse,
            3 => return,
            _ => Push::Release,
        };
        if self.transport.push(&mut self.reactor, connection, push).is_err() {
            return;
        }
        self.pushes += 1;
        match push {
            Push::OneWay(_) => {
                assert!(!self.is_refused);
                self.unreceipted.push_back(tag);
            }
            Push::Request(..) => drop(self.asked.insert(tag)),
            Push::Refuse => self.refuses = true,
            Push::Release => self.kept -= 1,
        }
    }

    /// The first byte of the command says what becomes of it.
    fn request(&mut self, request: &Request, sent: Vec<u8>) {
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
                let len = request.data_len as usize;
                let start = (request.key.id as usize % 9).min(DATA_BYTES_MAX as usize - len);
                let slot = self.slot(len + start).expect("credits bound what is needed");
                self.to_fetch.insert(request.key, sent);
                self.transport.fetch(&mut self.reactor, request.key, slot, start);
            }
            verb if request.region_len > 0 => {
                let len = request.region_len as usize;
                self.answers += 1;
                let answer = self.answers;
                let mut data = vec![0; len];
                fill(answer, &mut data);
                let brought = self.brought.entry(request.key.id).or_default();
                brought.push(data);
                let mut put = |bytes: &mut [u8]| {
                    fill(answer, bytes);
                    true
                };
                if verb == 5 && self.transport.respond_filled(request.key, len, &mut self.arena, &mut put) {
                    self.unanswered.remove(&request.key);
                    return;
                }
                let start = answer as usize % 9;
                match self.slot(len + start) {
                    Some(slot) => {
                        let mut range = SlotRange { slot, start, len };
                        fill(answer, range.bytes_mut());
                        self.answer(request.key, Status::OK, Some(range));
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

/// Receives what is there, and lets the server go on meanwhile.
fn take(stream: &mut UnixStream, received: &mut Vec<u8>, mut turn: impl FnMut()) {
    let mut bytes = [0; 4096];
    while let Ok(n @ 1..) = stream.read(&mut bytes) {
        received.extend_from_slice(&bytes[..n]);
        turn();
    }
}
