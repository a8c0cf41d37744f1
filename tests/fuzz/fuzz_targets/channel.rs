//! A hostile server against a channel that goes on: what it answers to requests, outcomes and reopens, when
//! it breaks off, and when it is started again, on a clock that the input turns.
//!
//! However it lies, each request ends once, with its own buffers, and the channel is connected or given up
//! when its window is over. As long as it has not lied nothing runs twice, what has failed was not executed
//! unless that is said, and nothing comes before the answer to an outcome.

#![no_main]

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use raio_fuzz::{Input, mend_handshake, mend_messages, peer};
use raio_transport::channel::{Beginning, Channel, Dialer, Dialing, OpenFiles, Reopenable, Settings};
use raio_transport::connecting::Connecting;
use raio_transport::handshake::{ChannelOffer, Grant, Offer, Policy};
use raio_transport::memory::{Buffer, Buffers};
use raio_transport::message::{
    self, FEATURE_CRC, FEATURE_REQUEST_CRC, HEADER_BYTES, Message, Parsed, RequestHeader, ResponseHeader,
    SessionId, data_crc, parse,
};
use raio_transport::mux::Reached;
use raio_transport::protocol::path::PathCommand;
use raio_transport::protocol::{
    Command, FLAG_SET_TIME, FileHandle, FileStatus, OPEN_CREATE, OPEN_READ, OPEN_WRITE, OPERATION_FEATURES,
    OPERATIONS, Opcode, RequestOutcome,
};
use raio_transport::tcp::TcpDial;
use raio_transport::transport::{Bulk, Reply, SendOptions, UsedIds};
use raio_transport::{Error, Status};
use zerocopy::IntoBytes;

const STEPS_MAX: usize = 300;
const DEPTH: u32 = 4;
/// Each request has an offset of its own, by which the server tells it.
const STRIDE: u64 = 1 << 16;
/// A server that keeps the protocol has answered everything after this number of iterations.
const TURNS: usize = 400;

thread_local! {
    static CLOCK: Cell<Option<Instant>> = const { Cell::new(None) };
}

fn clock() -> Instant {
    CLOCK.get().expect("an input has set it")
}

fn advance(by: Duration) {
    CLOCK.set(Some(clock() + by));
}

fuzz_target!(|input: &[u8]| {
    CLOCK.set(Some(CLOCK.get().unwrap_or_else(Instant::now)));
    run(&mut Input(input));
});

// The server
// ----------------------------------------------------------------------------------------------------------

/// Connections that have not been accepted; None: the server does not listen.
type Backlog = Arc<Mutex<Option<Vec<UnixStream>>>>;

struct SomeDial {
    dial: Option<TcpDial>,
    deadline: Instant,
    epoch: Option<u64>,
}

impl Dialing for SomeDial {
    fn step(&mut self, now: Instant) -> Option<Result<Reached, Error>> {
        let Some(dial) = &mut self.dial else {
            let refused = std::io::Error::from_raw_os_error(libc::ECONNREFUSED);
            return Some(Err(Error::io("Cannot connect", refused)));
        };
        Some(dial.step(now)?.map(|mut client| {
            client.set_clock(clock);
            Reached { transport: Box::new(client), why_tcp: None }
        }))
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn step_by(&self) -> Instant {
        self.deadline
    }

    fn epoch(&self) -> Option<u64> {
        self.epoch
    }
}

fn dialer(backlog: &Backlog) -> Dialer {
    let backlog = Arc::clone(backlog);
    Box::new(move |offer: &Offer, _, deadline| {
        let dial = backlog.lock().unwrap().as_mut().map(|backlog| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            theirs.set_nonblocking(true).unwrap();
            backlog.push(theirs);
            TcpDial::over(TcpStream::from(OwnedFd::from(ours)), offer, deadline)
        });
        Box::new(SomeDial { dial, deadline, epoch: offer.channel.map(|channel| channel.epoch) })
    })
}

struct Connection {
    stream: UnixStream,
    inbox: Vec<u8>,
    grant: Option<Grant>,
    /// It has not answered the outcome that comes first.
    is_waiting: bool,
    /// It has said that it does not know the channel.
    was_told: bool,
    /// It has not kept the protocol on this connection.
    has_lied: bool,
}

struct Server {
    backlog: Backlog,
    policy: Policy,
    session: SessionId,
    connection: Option<Connection>,
    epoch: u64,
    /// It knows of all requests of the channel that have been executed.
    is_known: bool,
    done: BTreeMap<u32, RequestOutcome>,
    /// How often each request was executed, by its offset.
    executed: HashMap<u64, u32>,
    handles: u32,
    restarts: u8,
    has_lied: bool,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Answered,
    /// The connection breaks before it is executed ...
    Lost,
    /// ... or before the answer comes ...
    Unanswered,
    /// ... or in the middle of it.
    HalfAnswered(u8),
    /// Another answer comes.
    Lie,
}

impl Server {
    fn is_at(&self) -> bool {
        self.connection.is_some()
    }

    /// Takes in what has arrived. A newer connection replaces the one before.
    fn receive(&mut self) {
        let newer = self.backlog.lock().unwrap().as_mut().and_then(|backlog| {
            let newest = backlog.pop();
            backlog.clear();
            newest
        });
        if let Some(stream) = newer {
            self.connection = Some(Connection {
                stream,
                inbox: Vec::new(),
                grant: None,
                is_waiting: false,
                was_told: false,
                has_lied: false,
            });
        }
        let Some(connection) = &mut self.connection else { return };
        let mut bytes = [0; 4096];
        loop {
            match connection.stream.read(&mut bytes) {
                Ok(n @ 1..) => connection.inbox.extend_from_slice(&bytes[..n]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // The client has gone, with what it has sent.
                _ => return self.connection = None,
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        if let Some(connection) = &mut self.connection
            && connection.stream.write(bytes).is_ok_and(|n| n < bytes.len())
        {
            // More than the socket takes is as good as broken off.
            self.connection = None;
        }
    }

    /// Does one thing that was asked for. Whether there was one.
    fn serve(&mut self, how: How, input: &mut Input<'_>) -> bool {
        self.receive();
        let Some(connection) = &mut self.connection else { return false };
        let Some(grant) = connection.grant else { return self.welcome(how, input) };
        match parse(&connection.inbox, &grant.limits()).expect("a client keeps the protocol") {
            Parsed::Need(_) => false,
            Parsed::Item(Message::Request(header, body), taken) => {
                let all = taken + header.data_len as usize;
                if connection.inbox.len() < all {
                    return false;
                }
                let body = body.to_vec();
                connection.inbox.drain(..all);
                self.request(&header, &body, how, input);
                true
            }
            Parsed::Item(Message::Ping(id), taken) => {
                connection.inbox.drain(..taken);
                let mut bytes = Vec::new();
                message::encode_pong(id, 0, grant.crc(), &mut bytes);
                self.send(&bytes);
                true
            }
            Parsed::Item(Message::Goaway(..), taken) => {
                connection.inbox.drain(..taken);
                true
            }
            Parsed::Item(other, _) => panic!("a client does not say {other:?}"),
        }
    }

    fn welcome(&mut self, how: How, input: &mut Input<'_>) -> bool {
        let Some(connection) = &mut self.connection else { return false };
        let welcome = self.policy.welcome(&connection.inbox).expect("a client keeps the protocol");
        let Parsed::Item((peer, mut welcome), taken) = welcome else { return false };
        connection.inbox.drain(..taken);
        let channel = peer.channel.expect("it has a channel");
        assert_eq!(peer.session, self.session);
        assert!(channel.epoch > self.epoch, "epoch {} after {}", channel.epoch, self.epoch);
        self.epoch = channel.epoch;
        connection.grant = Some(peer.grant);
        connection.is_waiting = channel.epoch > 1;
        self.is_known |= channel.epoch == 1;
        match how {
            How::Answered => self.send(&welcome),
            How::Lost | How::Unanswered => self.connection = None,
            How::HalfAnswered(at) => {
                let len = usize::from(at) % welcome.len();
                self.send(&welcome[..len]);
                self.connection = None;
            }
            How::Lie => {
                self.lies();
                if input.byte() & 1 == 0 {
                    welcome = self.policy.rejection(i32::from(input.byte()), "No.");
                } else {
                    let at = input.index(welcome.len());
                    welcome[at] ^= input.byte();
                    mend_handshake(&mut welcome);
                }
                self.send(&welcome);
            }
        }
        true
    }

    fn lies(&mut self) {
        self.has_lied = true;
        if let Some(connection) = &mut self.connection {
            connection.has_lied = true;
        }
    }

    fn request(&mut self, header: &RequestHeader, body: &[u8], how: How, input: &mut Input<'_>) {
        let &RequestHeader { id, has_crc, .. } = header;
        let command = Command::decode(body).expect("a client keeps the protocol");
        let opcode = command.opcode();
        let Some(connection) = &mut self.connection else { return };
        let is_outcome = opcode == Opcode::Outcome;
        if !connection.has_lied {
            assert!(
                !connection.is_waiting || is_outcome || opcode == Opcode::Cancel,
                "{command:?} comes before the answer to an outcome"
            );
        }
        if how == How::Lost {
            return self.connection = None;
        }
        if connection.was_told && opcode != Opcode::Cancel {
            self.is_known = true;
        }
        let is_recorded = opcode.operation().is_recorded;
        let slot = (id & 0xffff) as u32;
        if is_recorded && !connection.has_lied {
            assert!(id <= u64::from(u32::MAX) && slot <= DEPTH, "{id:#x} names no slot");
            let before = self.done.get(&slot).map(RequestOutcome::id);
            assert!(before != Some(id as u32) || self.has_lied, "{id:#x} has been used");
        }
        let (status, result, answer, data) = self.execute(&command, header.region_in_len());
        if is_recorded {
            self.done.insert(slot, RequestOutcome::done(id as u32, status, result));
        }
        let Some(connection) = &mut self.connection else { return };
        if is_outcome && how != How::Unanswered {
            connection.is_waiting = false;
            connection.was_told |= status.errno == libc::ESTALE;
        }
        let crc = connection.grant.is_some_and(|grant| grant.crc());
        let header = ResponseHeader {
            id,
            body_len: 0,
            data_len: data.len() as u32,
            status,
            credits: 1,
            result,
            has_crc,
            data_crc: if (crc || has_crc) && !data.is_empty() { data_crc(&data) } else { 0 },
        };
        let mut bytes = Vec::new();
        match how {
            How::Answered => {
                header.encode(&answer, crc, &mut bytes);
                bytes.extend(data);
                self.send(&bytes);
            }
            How::Lost | How::Unanswered => self.connection = None,
            How::HalfAnswered(at) => {
                header.encode(&answer, crc, &mut bytes);
                bytes.extend(data);
                self.send(&bytes[..usize::from(at) % bytes.len()]);
                self.connection = None;
            }
            How::Lie => {
                self.lies();
                self.lie(header, answer, data, crc, input);
            }
        }
    }

    fn lie(
        &mut self,
        mut header: ResponseHeader,
        mut answer: Vec<u8>,
        data: Vec<u8>,
        crc: bool,
        input: &mut Input<'_>,
    ) {
        let how = input.byte();
        match how & 7 {
            0 if !answer.is_empty() => {
                let at = input.index(answer.len());
                answer[at] ^= input.byte();
            }
            1 => {
                let len = input.index(answer.len() + 17) / 8 * 8;
                answer.resize(len, input.byte());
            }
            2 => {
                let status = [Status::storage, Status::protocol, Status::policy, Status::transport];
                header.status = status[input.index(4)](1 + i32::from(input.byte()));
                header.status.retryable = how & 8 != 0;
                answer.clear();
            }
            3 => header.result = u64::from(input.byte()) << input.index(64),
            4 => {
                let len = input.index(400);
                answer = input.bytes(len / 8 * 8);
            }
            5 => header.status = Status::DAMAGED,
            _ => {}
        }
        let mut bytes = Vec::new();
        header.encode(&answer, crc, &mut bytes);
        bytes.extend(data);
        if how & 16 != 0 {
            let at = input.index(HEADER_BYTES);
            bytes[at] ^= input.byte();
            if crc {
                mend_messages(&mut bytes);
            }
        }
        if how & 32 != 0 {
            bytes.extend(bytes.clone());
        }
        self.send(&bytes);
    }

    fn execute(&mut self, command: &Command<'_>, region: u32) -> (Status, u64, Vec<u8>, Vec<u8>) {
        let nothing = |result| (Status::OK, result, Vec::new(), Vec::new());
        match *command {
            Command::Open { .. } => {
                self.handles += 1;
                (Status::OK, u64::from(1 << 20 | self.handles), self.status(), Vec::new())
            }
            Command::Reopen { file, .. } => (Status::OK, file.0.into(), self.status(), Vec::new()),
            Command::Stat(_) => (Status::OK, 0, self.status(), Vec::new()),
            Command::Read { offset, .. } => {
                (Status::OK, region.into(), Vec::new(), vec![(offset / STRIDE) as u8; region as usize])
            }
            Command::Write { offset, length, .. } => {
                *self.executed.entry(offset).or_default() += 1;
                nothing(length.into())
            }
            Command::Discard { offset, .. }
            | Command::WriteZeroes { offset, .. }
            | Command::Allocate { offset, .. } => {
                *self.executed.entry(offset).or_default() += 1;
                nothing(0)
            }
            // Their times say which they are.
            Command::Path(PathCommand { opcode, modified_ns, length, .. }) => match opcode {
                Opcode::StatPath => (Status::OK, 0, self.status(), Vec::new()),
                Opcode::Get => (Status::OK, region.into(), self.status(), vec![0; region as usize]),
                _ => {
                    *self.executed.entry(modified_ns as u64).or_default() += 1;
                    nothing(if opcode == Opcode::Put { length } else { 0 })
                }
            },
            Command::Copy { destination_offset, length, .. } => {
                *self.executed.entry(destination_offset).or_default() += 1;
                nothing(length)
            }
            Command::Truncate { .. }
            | Command::Extents { .. }
            | Command::Checksum { .. }
            | Command::Lock { .. }
            | Command::ListNext { .. } => nothing(0),
            Command::Fsync { .. } => nothing(77),
            Command::Close(_) => nothing(0),
            Command::Cancel { .. } => (Status::storage(libc::ENOENT), 0, Vec::new(), Vec::new()),
            Command::Outcome { .. } if !self.is_known => {
                (Status::policy(libc::ESTALE), 0, Vec::new(), Vec::new())
            }
            Command::Outcome { ids } => {
                let of = |id: u32| self.done.get(&(id & 0xffff)).filter(|done| done.id() == id).copied();
                let all: Vec<_> =
                    ids.iter().map(|id| of(id.get()).unwrap_or(RequestOutcome::never(id.get()))).collect();
                (Status::OK, all.len() as u64, all.as_bytes().to_vec(), Vec::new())
            }
        }
    }

    fn status(&self) -> Vec<u8> {
        let mut status = FileStatus { identity: [9; 16], ..FileStatus::default() };
        status.verifier = 5.into();
        status.as_bytes().to_vec()
    }

    fn restart(&mut self) {
        self.connection = None;
        self.restarts = self.restarts.wrapping_add(1);
        self.policy.server = [self.restarts; 16];
        self.is_known = false;
        self.done.clear();
        if let Some(backlog) = self.backlog.lock().unwrap().as_mut() {
            backlog.clear();
        }
    }
}

// The client
// ----------------------------------------------------------------------------------------------------------

struct Asked {
    opcode: Opcode,
    offset: u64,
    buffer: Option<(usize, usize)>,
}

fn buffer(bulk: &Bulk) -> Option<(usize, usize)> {
    match bulk {
        Bulk::In(Buffers::One(Buffer::Owned(bytes))) | Bulk::Out(Buffers::One(Buffer::Owned(bytes))) => {
            Some((bytes.as_ptr() as usize, bytes.len()))
        }
        _ => None,
    }
}

struct World {
    channel: Channel,
    server: Server,
    files: Arc<OpenFiles>,
    handles: VecDeque<FileHandle>,
    asked: BTreeMap<u64, Asked>,
    next: u64,
    settings: Settings,
}

fn run(input: &mut Input<'_>) {
    let mode = input.byte();
    let settings = Settings {
        window: [60, 60, 3, 0].map(Duration::from_secs)[usize::from(mode & 3)],
        redo: mode & 4 != 0,
        divides: mode & 8 != 0,
        connect_timeout: Duration::from_secs(5),
        request_timeout: None,
    };
    let session = SessionId([3; 16]);
    let offer = Offer {
        session,
        queue_depth: DEPTH,
        features: OPERATION_FEATURES
            | if mode & 16 != 0 { FEATURE_CRC } else { 0 }
            | if mode & 64 != 0 { FEATURE_REQUEST_CRC } else { 0 },
        channel: Some(ChannelOffer { number: 1, epoch: 1, linger: Duration::from_secs(90) }),
        ..Offer::new("fuzz")
    };
    let policy = Policy {
        server: [0; 16],
        features: FEATURE_CRC | FEATURE_REQUEST_CRC | OPERATION_FEATURES,
        queue_depth: DEPTH,
        ..Policy::default()
    };
    let backlog = Backlog::new(Mutex::new(Some(Vec::new())));
    let mut server = Server {
        backlog: Arc::clone(&backlog),
        policy,
        session,
        connection: None,
        epoch: 0,
        is_known: false,
        done: BTreeMap::new(),
        executed: HashMap::new(),
        handles: 0,
        restarts: 0,
        has_lied: false,
    };
    let files = Arc::<OpenFiles>::default();
    let deadline = clock() + Duration::from_secs(5);
    let used = UsedIds::default();
    let mut beginning = Beginning::new(dialer(&backlog), offer, used, settings, Arc::clone(&files), deadline)
        .with_clock(clock, 1);
    let channel = loop {
        match beginning.step() {
            Some(begun) => break begun.expect("the server is honest so far"),
            None => _ = server.serve(How::Answered, input),
        }
    };
    let (handles, asked) = (VecDeque::new(), BTreeMap::new());
    let mut world = World { channel, server, files, handles, asked, next: 1, settings };
    for _ in 0..STEPS_MAX {
        if input.0.is_empty() {
            break;
        }
        world.step(input);
    }
    world.end(mode & 32 != 0, input);
}

impl World {
    fn step(&mut self, input: &mut Input<'_>) {
        let what = input.byte();
        match what & 0x0f {
            peer::SUBMIT | 15 => self.submit(input),
            peer::RECEIVE => self.receive(),
            peer::ANSWER => _ = self.server.serve(How::Answered, input),
            peer::ANSWER_ALL => {
                for _ in 0..20 {
                    self.turn();
                }
            }
            peer::LOSE => _ = self.server.serve(How::Lost, input),
            peer::EXECUTE => _ = self.server.serve(How::Unanswered, input),
            peer::HALF => {
                let at = input.byte();
                self.server.serve(How::HalfAnswered(at), input);
            }
            peer::LIE => _ = self.server.serve(How::Lie, input),
            peer::RAW => {
                let len = input.index(120);
                let mut bytes = input.bytes(len);
                mend_messages(&mut bytes);
                if self.server.is_at() {
                    self.server.lies();
                    self.server.send(&bytes);
                }
            }
            peer::BREAK => self.server.connection = None,
            peer::ADVANCE => {
                let by = [1, 50, 100, 1000, 3000, 6000, 16_000, 70_000][input.index(8)];
                advance(Duration::from_millis(by));
            }
            peer::RESTART => self.server.restart(),
            peer::LISTEN => {
                let mut backlog = self.server.backlog.lock().unwrap();
                *backlog = if backlog.is_some() { None } else { Some(Vec::new()) };
            }
            peer::CANCEL => {
                if let Some(&tag) = self.asked.keys().nth(input.index(self.asked.len())) {
                    let answer = self.next;
                    if self.channel.cancel(tag, answer) {
                        self.next += 1;
                        self.asked.insert(answer, Asked { opcode: Opcode::Cancel, offset: 0, buffer: None });
                    }
                }
            }
            _ => {
                if let Some(&tag) = self.asked.keys().nth(input.index(self.asked.len()))
                    && let Some(bulk) = self.channel.dequeue(tag)
                {
                    let asked = self.asked.remove(&tag).expect("it was asked for");
                    assert_eq!(buffer(&bulk), asked.buffer, "its own buffer comes back");
                }
            }
        }
        if what & peer::AT_ONCE == 0 {
            self.receive();
        }
    }

    /// The server answers what there is, and the client takes that in.
    fn turn(&mut self) {
        while self.server.serve(How::Answered, &mut Input(&[])) {}
        self.receive();
    }

    fn submit(&mut self, input: &mut Input<'_>) {
        let kind = input.byte();
        let opcode = OPERATIONS[usize::from(kind & 0x0f) % OPERATIONS.len()].opcode;
        let tag = self.next;
        let offset = tag * STRIDE;
        let file = self.handles.front().copied().unwrap_or(FileHandle(1 << 20));
        let length = 16 * (1 + u32::from(kind >> 4));
        let bytes = || Buffers::One(Buffer::Owned(vec![0xaa; length as usize].into()));
        let long = u64::from(length);
        let (command, bulk) = match opcode {
            Opcode::Open => {
                let flags = OPEN_READ | OPEN_WRITE | OPEN_CREATE | (u32::from(kind >> 4) << 3 & 0x18);
                (Command::Open { flags, mode: 0o600, path: b"/e/f" }, Bulk::None)
            }
            Opcode::Close => {
                self.handles.pop_front();
                self.files.remove(file);
                (Command::Close(file), Bulk::None)
            }
            Opcode::Stat => (Command::Stat(file), Bulk::None),
            Opcode::Read => (Command::Read { file, offset, length }, Bulk::In(bytes())),
            Opcode::Fsync => (Command::Fsync { file, data_only: false }, Bulk::None),
            Opcode::Discard => (Command::Discard { file, offset, length: long }, Bulk::None),
            Opcode::WriteZeroes => (Command::WriteZeroes { file, offset, length: long }, Bulk::None),
            Opcode::Allocate => {
                (Command::Allocate { file, offset, length: long, keep_size: true }, Bulk::None)
            }
            Opcode::StatPath => (Command::Path(PathCommand::new(opcode, b"/e/f")), Bulk::None),
            Opcode::Get => {
                let get = PathCommand { length: long, ..PathCommand::new(opcode, b"/e/f") };
                (Command::Path(get), Bulk::In(bytes()))
            }
            Opcode::Put => {
                let (flags, modified_ns) = (FLAG_SET_TIME, offset as i64);
                let put =
                    PathCommand { flags, modified_ns, length: long, ..PathCommand::new(opcode, b"/e/f") };
                (Command::Path(put), Bulk::Out(bytes()))
            }
            _ => (Command::Write { file, offset, length }, Bulk::Out(bytes())),
        };
        let mut body = Vec::new();
        command.encode(&mut body);
        let asked = Asked { opcode: command.opcode(), offset, buffer: buffer(&bulk) };
        let data = if matches!(bulk, Bulk::Out(_)) { vec![0xaa; length as usize] } else { Vec::new() };
        let wants_crc = self.channel.grant().request_crc() && kind & 0x20 != 0;
        let options = SendOptions::with_crc(wants_crc.then(|| data_crc(&data)));
        if self.channel.send(tag, &body, bulk, options).is_ok() {
            self.next += 1;
            self.asked.insert(tag, asked);
            self.channel.flush();
        }
    }

    fn receive(&mut self) {
        let mut replies = Vec::new();
        self.channel.receive(&mut replies);
        for lost in self.channel.take_oversized() {
            let asked = self.asked.remove(&lost.tag).expect("it was asked for, and has not ended");
            assert_eq!(buffer(&lost.bulk), asked.buffer, "its own buffer comes back");
        }
        for reply in replies {
            self.ended(&reply);
        }
        assert!(self.channel.failure().is_none() || self.asked.is_empty(), "not ended: {}", self.asked.len());
    }

    fn ended(&mut self, reply: &Reply) {
        let asked = self.asked.remove(&reply.tag).expect("it was asked for, and has not ended");
        assert_eq!(buffer(&reply.bulk), asked.buffer, "its own buffer comes back");
        let room = if matches!(reply.bulk, Bulk::In(_)) { asked.buffer.map_or(0, |(_, len)| len) } else { 0 };
        assert!(reply.data_len <= room);
        let is_ok = reply.status.is_ok();
        if asked.opcode == Opcode::Open && is_ok {
            // As libraio does; one whose answer was lost would be asked for.
            if let (Ok(status), Ok(handle)) = (FileStatus::decode(&reply.body), reply.result.try_into()) {
                let (flags, path) = (OPEN_READ | OPEN_WRITE, b"/e/f"[..].into());
                self.files.insert(FileHandle(handle), Reopenable { flags, path, identity: status.identity });
                self.handles.push_back(FileHandle(handle));
            }
        }
        if self.server.has_lied {
            return;
        }
        if asked.opcode == Opcode::Read && is_ok {
            let Bulk::In(Buffers::One(Buffer::Owned(bytes))) = &reply.bulk else { panic!("no buffer") };
            assert!(reply.data_len == room && bytes.iter().all(|&byte| byte == reply.tag as u8));
        }
        let is_change = asked.opcode.operation().is_recorded && asked.opcode != Opcode::Open;
        let executed = self.server.executed.get(&asked.offset).copied().unwrap_or(0);
        if is_change && is_ok {
            assert!(executed > 0, "what was not executed has succeeded");
        }
        if is_change && !self.settings.redo {
            assert!(executed <= 1, "it was executed {executed} times");
        }
        if is_change && !is_ok && !reply.is_unknown && self.server.restarts == 0 {
            assert_eq!(executed, 0, "{:?} has failed ({:?}), and was executed", asked.opcode, reply.status);
        }
        if reply.is_unknown {
            let may = self.server.restarts > 0 || self.channel.failure().is_some();
            assert!(may, "the outcome is unknown, and the server is there");
        }
    }

    /// It comes to an end: the server is honest again, or is never seen again.
    fn end(mut self, is_back: bool, input: &mut Input<'_>) {
        if is_back {
            self.server.backlog.lock().unwrap().get_or_insert_default();
            for _ in 0..TURNS {
                self.turn();
                let is_done = self.asked.is_empty() && self.channel.is_connected();
                if is_done || self.channel.failure().is_some() {
                    break;
                }
                advance(Duration::from_millis(200));
            }
            let is_whole = self.channel.is_connected() || self.channel.failure().is_some();
            assert!(is_whole, "it has not come back, and is not given up: {:?}", self.channel);
            if !self.server.has_lied {
                assert!(self.asked.is_empty(), "{} requests have not ended", self.asked.len());
            }
        }
        *self.server.backlog.lock().unwrap() = None;
        self.server.connection = None;
        let _ = input;
        for _ in 0..1000 {
            if self.channel.failure().is_some() {
                break;
            }
            self.receive();
            advance(Duration::from_millis(500));
        }
        assert!(self.channel.failure().is_some(), "a channel without a server is not given up");
        assert!(self.asked.is_empty(), "{} requests have not ended", self.asked.len());
    }
}
