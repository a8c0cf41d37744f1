//! The server's side of TCP: all connections of one worker.
//!
//! This moves bytes for [`StreamConnection`]s, which know the protocol. A connection has at most one receive
//! and one send in the ring. What arrives comes in a buffer of the reactor's, chosen when it arrives, so that
//! idle connections hold no memory; the rest of a large write is received straight into its slot. Answers
//! gather in a batch, and leave in one send when the iteration is flushed.

mod watch;

use std::any::Any;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::net::{Shutdown, getpeername, getsockname, shutdown, sockopt};

use crate::error::Status;
use crate::handshake::{Peer, Policy};
use crate::memory::{Arena, Slot};
use crate::message::QueuePairAddress;
use crate::reactor::{Event, File, Op, Payload, Reactor, Received, TimerId, Token, bound_tcp_retries};
use crate::server::{Close, Receive, StreamConnection, StreamShared};
use crate::transport::{
    CloseReason, ConnectionId, RequestKey, Response, ServerEvent, ServerTransport, UpgradeRequest,
};
use watch::Watched;

/// All connections of one worker.
pub struct Server {
    owner: u8,
    entries: Vec<Entry>,
    free: Vec<u32>,
    shared: StreamShared,
    passed: VecDeque<Passed>,
    sending: usize,
    /// Sends have ended at once, so there may be memory for somebody who waits for it.
    has_sent: bool,
    /// Connections to which something was sent, in the order in which they are looked at.
    watched: VecDeque<Watched>,
    /// So many of them have not been looked at in this round.
    looks_left: usize,
}

/// Decides, when the hello of a connection has come, to whom it is passed on; None: it stays.
pub type Place = Box<dyn FnMut(&Peer) -> Option<usize>>;

/// A connection that is passed on, before anything has been said to its client.
#[derive(Debug)]
pub struct Passed {
    /// Which it was.
    pub connection: ConnectionId,
    /// As [`Place`] said.
    pub to: usize,
    /// Its socket.
    pub stream: Arc<OwnedFd>,
    /// All that was received: its hello, and what came behind it. For [`Server::adopt_passed`].
    pub hello: Vec<u8>,
}

struct Entry {
    generation: u32,
    connection: Option<Box<Connection>>,
}

/// A connection with what is the system's.
struct Connection {
    stream: StreamConnection<Received>,
    socket: File,
    /// Dropped after the socket. See [`Server::hold`].
    held: Option<Arc<dyn Any>>,
    timer: Option<(Instant, TimerId)>,
    /// It is on the list of those to which something was sent.
    is_watched: bool,
}

/// What a connection's ring operations and timers are, in the low bits of their tokens.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Receive = 0,
    Send = 1,
    Timer = 2,
    /// Not of a connection: see [`watch`].
    Watch = 3,
}

/// Why a connection has ended by itself.
fn lost(errno: i32) -> CloseReason {
    match errno {
        // The kernel has given the peer up; the last answer may have been a router's.
        libc::ETIMEDOUT | libc::EHOSTUNREACH | libc::ENETUNREACH => CloseReason::Unreachable,
        errno => CloseReason::Lost(errno),
    }
}

impl Connection {
    /// Whether its peer has neither reset nor closed it; if it has, the connection ends. The clock is read
    /// anew: the worker may have been held up since the iteration began.
    fn is_there(&mut self, shared: &mut StreamShared) -> bool {
        if !self.stream.is_open() {
            return false;
        }
        let now = Instant::now();
        if self.stream.is_alive_at(now) {
            return true;
        }
        let has_ended = super::has_ended(&self.socket);
        if has_ended {
            let errno = sockopt::socket_error(&self.socket).ok().and_then(Result::err);
            self.stream.end(shared, lost(errno.map_or(0, |errno| errno.raw_os_error())));
        } else {
            self.stream.on_alive(now);
        }
        !has_ended
    }

    /// The kernel drops what it has of a connection when that closes, rather than try to deliver it.
    fn close(&self, how: &Close) {
        match how {
            Close::Write => drop(shutdown(&self.socket, Shutdown::Write)),
            Close::Reset => {
                let _ = sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO));
                let _ = shutdown(&self.socket, Shutdown::Both);
            }
            // Makes its operations in the ring end.
            Close::Both => drop(shutdown(&self.socket, Shutdown::Both)),
            Close::PassOn(..) => {}
        }
    }
}

fn entry(entries: &mut [Entry], id: ConnectionId) -> Option<&mut Connection> {
    let entry = entries.get_mut(id.index as usize).filter(|entry| entry.generation == id.generation)?;
    entry.connection.as_deref_mut()
}

impl Server {
    /// A transport with no connections. Events on its operations carry `owner`.
    pub fn new(owner: u8, policy: Arc<Policy>) -> Self {
        Self {
            owner,
            entries: Vec::new(),
            free: Vec::new(),
            shared: StreamShared::new(policy),
            passed: VecDeque::new(),
            sending: 0,
            has_sent: false,
            watched: VecDeque::new(),
            looks_left: 0,
        }
    }

    /// From now on all connections together may cause `bytes` of heap: what they have received and said, and
    /// what is not yet sent to them. That is without the first 16 KiB for each, their structs among them. A
    /// connection that causes too much is not read from until it causes less. Requests count as half a KiB
    /// and their body.
    pub fn set_heap_max(&mut self, bytes: usize) {
        self.shared.set_heap_max(bytes);
    }

    /// From now on `place` decides who has which connection.
    pub fn set_place(&mut self, place: Place) {
        self.shared.route = place;
    }

    /// The next connection that is to be passed on.
    pub fn next_passed(&mut self) -> Option<Passed> {
        self.passed.pop_front()
    }

    /// Takes over a connection that another server has passed on.
    pub fn adopt_passed(
        &mut self,
        reactor: &mut Reactor,
        stream: Arc<OwnedFd>,
        hello: Vec<u8>,
    ) -> ConnectionId {
        let id = self.insert(reactor, stream, true);
        self.with(reactor, id, |connection, shared, reactor| {
            connection.stream.on_hello(hello, shared, reactor.clock());
        });
        id
    }

    /// Takes over an accepted, non-blocking stream socket, and reads its handshake. Returns the name of the
    /// connection in later events.
    pub fn adopt(&mut self, reactor: &mut Reactor, stream: OwnedFd) -> ConnectionId {
        let id = self.insert(reactor, Arc::new(stream), false);
        self.with(reactor, id, |_, _, _| {});
        id
    }

    fn insert(&mut self, reactor: &mut Reactor, stream: Arc<OwnedFd>, is_placed: bool) -> ConnectionId {
        // Neither matters to a socket that is no TCP socket (a test's socket pair).
        let _ = sockopt::set_tcp_nodelay(&stream, true);
        // An idle peer whose host has died is found by the kernel: the protocol does not ask idle clients to
        // speak.
        if sockopt::set_socket_keepalive(&stream, true).is_ok() {
            let _ = sockopt::set_tcp_keepidle(&stream, Duration::from_secs(60));
            let _ = sockopt::set_tcp_keepintvl(&stream, Duration::from_secs(10));
            let _ = sockopt::set_tcp_keepcnt(&stream, 6);
        }
        // So that one to which something was sent is found soon even if it took nothing for long before. Not
        // less, for a peer that has taken its window back is given up by the kernel after twice that.
        bound_tcp_retries(&stream, self.shared.policy.unreachable_timeout / 2);
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry { generation: 0, connection: None });
            self.entries.len() as u32 - 1
        });
        let entry = &mut self.entries[index as usize];
        let id = ConnectionId { index, generation: entry.generation };
        entry.connection = Some(Box::new(Connection {
            stream: StreamConnection::new(id, &self.shared.policy, is_placed, reactor.clock()),
            socket: reactor.file(stream),
            held: None,
            timer: None,
            is_watched: false,
        }));
        id
    }

    /// Keeps this, for its owner, until the connection's socket is closed, which may be a while after the
    /// connection is reported as closed.
    pub fn hold(&mut self, id: ConnectionId, held: Arc<dyn Any>) {
        if let Some(connection) = entry(&mut self.entries, id) {
            connection.held = Some(held);
        }
    }

    /// What is kept for its owner.
    pub fn held(&self, id: ConnectionId) -> Option<Arc<dyn Any>> {
        self.connection(id)?.held.clone()
    }

    /// Heap that connections cause now, of what [`Server::set_heap_max`] bounds, and how often one was not
    /// read from because of that.
    pub fn heap(&self) -> (usize, u64) {
        self.shared.heap()
    }

    /// Whether there are connections that are not read from because of that.
    pub fn has_gated(&self) -> bool {
        !self.shared.gated.is_empty()
    }

    /// Lets their clients know that the server is alive, as [`ServerTransport::show_life`] does.
    pub fn show_life_to_gated(&mut self, reactor: &mut Reactor) {
        // From the end, for one that has ended is taken out.
        for at in (0..self.shared.gated.len()).rev() {
            let index = self.shared.gated[at];
            if let Some(id) = self.id_at(index) {
                self.show_life(reactor, id);
            }
        }
    }

    /// The socket of a connection, as long as it is open.
    pub fn socket(&self, id: ConnectionId) -> Option<Weak<OwnedFd>> {
        Some(self.connection(id)?.socket.downgrade())
    }

    /// The next client that wants to move to a queue pair.
    pub fn next_upgrade(&mut self) -> Option<UpgradeRequest> {
        while let Some((id, peer, theirs)) = self.shared.upgrades.pop_front() {
            let Some(connection) = self.connection(id) else { continue };
            // It may have ended since, for what it said next.
            if connection.stream.is_upgrade_requested() {
                let ip = |address: rustix::net::SocketAddrAny| {
                    std::net::SocketAddr::try_from(address).ok().map(|address| address.ip().to_canonical())
                };
                return Some(UpgradeRequest {
                    connection: id,
                    peer: *peer,
                    theirs,
                    local: getsockname(&connection.socket).ok().and_then(ip),
                    remote: getpeername(&connection.socket).ok().flatten().and_then(ip),
                });
            }
        }
        None
    }

    /// Answers it: the connection moves to this one, by a queue pair with this address, and from now on
    /// carries nothing but signs of life and its end; or it stays, for this reason.
    pub fn answer_upgrade(
        &mut self,
        reactor: &mut Reactor,
        id: ConnectionId,
        answer: Result<(ConnectionId, &QueuePairAddress), (Status, &str)>,
    ) {
        self.with(reactor, id, |connection, shared, _| {
            connection.stream.answer_upgrade(answer, shared);
        });
    }

    fn connection(&self, id: ConnectionId) -> Option<&Connection> {
        let entry = self.entries.get(id.index as usize)?;
        if entry.generation == id.generation { entry.connection.as_deref() } else { None }
    }

    /// The connection that is there now.
    fn id_at(&self, index: u32) -> Option<ConnectionId> {
        Some(self.entries[index as usize].connection.as_ref()?.stream.id())
    }

    /// Does something with a connection, and then what follows from it.
    fn with(
        &mut self,
        reactor: &mut Reactor,
        id: ConnectionId,
        change: impl FnOnce(&mut Connection, &mut StreamShared, &mut Reactor),
    ) {
        if let Some(connection) = entry(&mut self.entries, id) {
            change(connection, &mut self.shared, reactor);
            self.receive(reactor, id);
            self.settle(reactor, id);
        }
    }

    /// Starts the receive that a connection is to have, if any.
    fn receive(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        if let Some(connection) = entry(&mut self.entries, id)
            && let Some(receive) = connection.stream.poll_receive(&mut self.shared, reactor.clock())
        {
            submit(reactor, self.owner, connection, receive);
        }
    }

    /// Starts the send that is due, if none is in flight.
    fn send(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        let Some(connection) = entry(&mut self.entries, id) else { return };
        let Some(batch) = connection.stream.poll_send() else { return };
        self.sending += 1;
        if !std::mem::replace(&mut connection.is_watched, true) {
            self.watch(reactor, id);
        }
        let Some(connection) = entry(&mut self.entries, id) else { return };
        let token = token(self.owner, id, Kind::Send);
        if let Some(event) = reactor.send(token, connection.socket.clone(), batch) {
            self.has_sent = true;
            self.sent(id, event);
            // There may be room for more answers now.
            self.receive(reactor, id);
        }
    }

    fn sent(&mut self, id: ConnectionId, event: Event) {
        self.sending -= 1;
        let Payload::Batch(batch) = event.payload else { unreachable!("a send gives back its batch") };
        let Some(connection) = entry(&mut self.entries, id) else { return };
        match event.result {
            Ok(n) => connection.stream.on_sent(n as usize, batch, &mut self.shared),
            Err(libc::EINTR | libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => {
                connection.stream.on_sent(0, batch, &mut self.shared);
            }
            Err(errno) => connection.stream.on_send_failed(lost(errno), &mut self.shared),
        }
    }

    fn received(&mut self, reactor: &Reactor, id: ConnectionId, event: Event) {
        let Some(Connection { stream, .. }) = entry(&mut self.entries, id) else { return };
        let (shared, clock) = (&mut self.shared, reactor.clock());
        match (event.result, event.payload) {
            // All buffers are in use: they come back within this iteration, so ask again.
            (Err(libc::ENOBUFS | libc::EINTR | libc::EAGAIN), Payload::Slot(range)) => {
                stream.on_nothing(Some(range));
            }
            (Err(libc::ENOBUFS | libc::EINTR | libc::EAGAIN), _) => stream.on_nothing(None),
            (Err(errno), _) => stream.on_receive_failed(shared, lost(errno)),
            (Ok(0), _) => stream.on_end(shared),
            (Ok(n), Payload::Slot(range)) => stream.on_data(n as usize, range, shared, clock),
            (Ok(_), Payload::Received(received)) => stream.on_bytes(received, shared, clock),
            _ => unreachable!("a receive gives back a slot or a buffer"),
        }
    }

    /// Does what follows from a change: charges for heap, sets the timer, closes, and lets go of what is over.
    fn settle(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        if let Some(connection) = entry(&mut self.entries, id) {
            connection.stream.settle_heap(&mut self.shared);
            if connection.stream.needs_attention() {
                self.attend(reactor, id);
            }
        }
    }

    #[cold]
    fn attend(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        let Some(connection) = entry(&mut self.entries, id) else { return };
        match connection.stream.poll_close() {
            Some(Close::PassOn(to, hello)) => {
                let stream = connection.socket.descriptor();
                self.passed.push_back(Passed { connection: id, to, stream, hello });
            }
            Some(how) => connection.close(&how),
            None => {}
        }
        let deadline = connection.stream.deadline();
        if deadline != connection.timer.map(|(at, _)| at) {
            if let Some((_, timer)) = connection.timer.take() {
                reactor.cancel_timer(timer);
            }
            connection.timer = deadline.map(|at| (at, reactor.timer(at, token(self.owner, id, Kind::Timer))));
        }
        if connection.stream.is_over() {
            connection.stream.on_gone(&mut self.shared);
            let entry = &mut self.entries[id.index as usize];
            entry.connection = None;
            entry.generation = entry.generation.wrapping_add(1);
            self.free.push(id.index);
        }
    }

    fn all(&self) -> Vec<ConnectionId> {
        self.entries.iter().filter_map(|entry| Some(entry.connection.as_ref()?.stream.id())).collect()
    }
}

fn token(owner: u8, id: ConnectionId, kind: Kind) -> Token {
    Token { owner, value: u64::from(id.generation) << 32 | u64::from(id.index) << 2 | kind as u64 }
}

fn submit(reactor: &mut Reactor, owner: u8, connection: &Connection, receive: Receive) {
    let socket = connection.socket.clone();
    let op = match receive {
        Receive::Any(len_max) => Op::Recv { socket, len_max },
        Receive::Into(target) => Op::RecvInto { socket, target },
    };
    reactor.submit(token(owner, connection.stream.id(), Kind::Receive), op);
}

impl ServerTransport for Server {
    fn owners(&self) -> [u8; 2] {
        [self.owner; 2]
    }

    fn handle(&mut self, reactor: &mut Reactor, event: Event) {
        let value = event.token.value;
        let id = ConnectionId { index: (value as u32) >> 2, generation: (value >> 32) as u32 };
        match value & 3 {
            kind if kind == Kind::Receive as u64 => self.received(reactor, id, event),
            kind if kind == Kind::Send as u64 => self.sent(id, event),
            kind if kind == Kind::Timer as u64 => {
                if let Some(connection) = entry(&mut self.entries, id) {
                    connection.timer = None;
                    connection.stream.on_timer(&mut self.shared, reactor.clock());
                }
            }
            _ => return self.look_at_watched(reactor),
        }
        self.receive(reactor, id);
        self.settle(reactor, id);
    }

    fn poll_ready(&mut self, _arm: bool) -> bool {
        // What a flush has left behind.
        self.has_sent
            || !self.shared.events.is_empty()
            || !self.shared.dirty.is_empty()
            || !self.passed.is_empty()
    }

    fn process_ready(&mut self, _reactor: &mut Reactor) {
        self.has_sent = false;
    }

    fn next_event(&mut self) -> Option<ServerEvent> {
        self.shared.events.pop_front()
    }

    fn fetch(&mut self, reactor: &mut Reactor, request: RequestKey, slot: Slot, start: usize) {
        self.with(reactor, request.connection, |connection, shared, reactor| {
            connection.stream.fetch(request.id, slot, start, shared, reactor.clock());
        });
    }

    fn respond(&mut self, reactor: &mut Reactor, request: RequestKey, response: Response) {
        let id = request.connection;
        let Some(connection) = entry(&mut self.entries, id) else { return };
        if connection.stream.respond(request.id, response, &mut self.shared, reactor.clock()) {
            self.receive(reactor, id);
        }
        self.settle(reactor, id);
    }

    fn respond_filled(
        &mut self,
        request: RequestKey,
        len: usize,
        arena: &mut Arena,
        fill: &mut dyn FnMut(&mut [u8]) -> bool,
    ) -> bool {
        entry(&mut self.entries, request.connection).is_some_and(|connection| {
            connection.stream.respond_filled(request.id, len, arena, fill, &mut self.shared)
        })
    }

    fn flush(&mut self, reactor: &mut Reactor) {
        let mut dirty = std::mem::take(&mut self.shared.dirty);
        for index in dirty.drain(..) {
            let Some(connection) = self.entries[index as usize].connection.as_deref_mut() else { continue };
            let id = connection.stream.id();
            if connection.stream.begin_flush(&mut self.shared) {
                self.send(reactor, id);
            }
            if entry(&mut self.entries, id).is_some_and(|connection| connection.stream.is_gated()) {
                self.receive(reactor, id);
            }
            self.settle(reactor, id);
        }
        if self.shared.dirty.is_empty() {
            self.shared.dirty = dirty;
        }
        for index in self.shared.take_gated() {
            let Some(connection) = self.entries[index as usize].connection.as_deref_mut() else { continue };
            let id = connection.stream.id();
            if let Some(receive) = connection.stream.reopen_gate(&mut self.shared, reactor.clock()) {
                submit(reactor, self.owner, connection, receive);
            }
            self.settle(reactor, id);
        }
    }

    fn flush_early(&mut self, reactor: &mut Reactor) {
        for at in 0..self.shared.dirty.len() {
            let index = self.shared.dirty[at] as usize;
            let Some(connection) = self.entries[index].connection.as_deref_mut() else { continue };
            let id = connection.stream.id();
            if connection.stream.begin_early_flush() {
                self.send(reactor, id);
            }
        }
    }

    fn close(&mut self, reactor: &mut Reactor, connection: ConnectionId, status: Status, text: &str) {
        self.with(reactor, connection, |connection, shared, reactor| {
            connection.stream.close(status, text, CloseReason::Local, shared, reactor.clock());
        });
    }

    fn reject(&mut self, reactor: &mut Reactor, connection: ConnectionId, errno: i32, text: &str) {
        self.with(reactor, connection, |connection, shared, reactor| {
            connection.stream.reject(errno, text, shared, reactor.clock());
        });
    }

    fn close_stalled(&mut self, reactor: &mut Reactor, close: bool) {
        for id in self.all() {
            self.with(reactor, id, |connection, shared, reactor| {
                connection.stream.check_progress(close, shared, reactor.clock());
            });
        }
    }

    fn is_alive(&mut self, reactor: &mut Reactor, connection: ConnectionId) -> bool {
        let Some(found) = entry(&mut self.entries, connection) else { return false };
        let is_there = found.is_there(&mut self.shared);
        if !is_there {
            self.settle(reactor, connection);
        }
        is_there
    }

    fn show_life(&mut self, reactor: &mut Reactor, connection: ConnectionId) {
        let Some(found) = entry(&mut self.entries, connection) else { return };
        // Nor is it heard that such a connection has ended.
        if found.stream.is_unread() && found.is_there(&mut self.shared) {
            found.stream.show_life(&mut self.shared);
        }
        self.settle(reactor, connection);
    }

    fn unsent_bytes(&self, connection: ConnectionId) -> usize {
        self.connection(connection).map_or(0, |connection| connection.stream.unsent_bytes())
    }

    fn is_sending(&self) -> bool {
        self.sending > 0 || !self.shared.dirty.is_empty()
    }

    fn connections(&self) -> usize {
        self.entries.len() - self.free.len()
    }
}
