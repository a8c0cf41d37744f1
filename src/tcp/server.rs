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

use crate::error::{Error, Status};
use crate::handshake::{Peer, Policy};
use crate::memory::{Arena, Slot};
use crate::message::QueuePairAddress;
use crate::reactor::{
    Event, File, LoopClock, Op, Payload, Reactor, Received, TcpInfo, TimerId, Token, bound_tcp_retries,
    receive_control_record, send_control_record,
};
use crate::server::{Close, Receive, StreamConnection, StreamShared};
use crate::tls::kernel::END;
use crate::transport::{
    Accepted, AcceptedStream, CloseReason, ConnectionId, Handover, NotPushed, Passed, Push, RequestKey,
    Response, ServerEvent, ServerTransport, UpgradeRequest,
};
use watch::{Verdict, Watch};

/// All connections of one worker.
pub struct TcpServer {
    owner: u8,
    entries: Vec<Entry>,
    free: Vec<u32>,
    shared: StreamShared,
    passed: VecDeque<Passed>,
    sending: usize,
    /// Sends have ended at once, so there may be memory for somebody who waits for it.
    has_sent: bool,
    watch: Watch,
}

/// Decides, when the hello of a connection has come, to whom it is passed on; None: it stays.
pub type Place = Box<dyn FnMut(&Peer) -> Option<usize>>;

struct Entry {
    generation: u32,
    connection: Option<Box<Connection>>,
}

/// A connection with what is the system's.
struct Connection {
    stream: StreamConnection<Received>,
    socket: File,
    /// Dropped after the socket. See [`ServerTransport::hold`].
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
    fn is_there(&mut self, shared: &mut StreamShared, clock: &LoopClock) -> bool {
        if !self.stream.is_open() {
            return false;
        }
        let now = clock.read();
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

    fn received(&mut self, event: Event, shared: &mut StreamShared, clock: &LoopClock) {
        let stream = &mut self.stream;
        match (event.result, event.payload) {
            (Ok(n @ 1..), Payload::Received(received)) => {
                debug_assert_eq!(n as usize, received.len());
                stream.on_bytes(received, shared, clock);
            }
            (Ok(n @ 1..), Payload::Slot(range)) => stream.on_data(n as usize, range, shared),
            (Ok(0), _) => stream.on_end(shared),
            (Ok(_), _) => unreachable!("a receive gives back a slot or a buffer"),
            // All buffers are in use: they come back within this iteration, so ask again.
            (Err(libc::ENOBUFS | libc::EINTR | libc::EAGAIN), Payload::Slot(range)) => {
                stream.on_nothing(Some(range));
            }
            (Err(libc::ENOBUFS | libc::EINTR | libc::EAGAIN), _) => stream.on_nothing(None),
            (Err(errno), payload) if stream.is_sealed_by_kernel() => {
                self.not_received(errno, payload, shared, clock);
            }
            (Err(errno), _) => stream.on_receive_failed(shared, lost(errno)),
        }
    }

    /// A receive has failed of a connection whose records the kernel opens.
    #[cold]
    fn not_received(&mut self, errno: i32, payload: Payload, shared: &mut StreamShared, clock: &LoopClock) {
        let stream = &mut self.stream;
        let errno_of = |error: std::io::Error| error.raw_os_error().unwrap_or(libc::EIO);
        let target = if let Payload::Slot(range) = payload { Some(range) } else { None };
        match errno {
            // What comes next is no data.
            libc::EIO => match receive_control_record(&self.socket) {
                Ok((kind, message)) => stream.on_control_record((kind, &message), target, shared, clock),
                Err(error) => stream.on_receive_failed(shared, lost(errno_of(error))),
            },
            // A tag, a length or a version that is wrong.
            libc::EBADMSG | libc::EMSGSIZE | libc::EINVAL => stream.on_bad_record(shared, clock),
            errno => stream.on_receive_failed(shared, lost(errno)),
        }
    }

    fn sent(&mut self, event: Event, shared: &mut StreamShared, clock: &LoopClock) {
        let Payload::Batch(batch) = event.payload else { unreachable!("a send gives back its batch") };
        match event.result {
            Ok(n) => self.stream.on_sent(n as usize, batch, shared, clock),
            Err(libc::EINTR | libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => {
                self.stream.on_sent(0, batch, shared, clock);
            }
            Err(errno) => self.stream.on_send_failed(lost(errno), shared),
        }
    }

    /// Starts the receive that it is to have, if any.
    fn receive(&mut self, shared: &mut StreamShared, reactor: &mut Reactor) {
        if let Some(receive) = self.stream.poll_receive(shared, reactor.clock()) {
            self.submit(receive, reactor);
        }
    }

    fn submit(&self, receive: Receive, reactor: &mut Reactor) {
        let socket = self.socket.clone();
        let op = match receive {
            Receive::Any(len_max) => Op::Recv { socket, len_max },
            Receive::Into(target) => Op::RecvInto { socket, target },
        };
        reactor.submit(token(self.stream.id(), Kind::Receive), op);
    }

    /// Charges for its heap. Returns whether something else follows from what has happened to it:
    /// [`TcpServer::attend`].
    fn settle(&mut self, shared: &mut StreamShared) -> bool {
        self.stream.settle_heap(shared);
        self.stream.needs_attention()
    }

    fn close(&self, how: &Close) {
        match how {
            Close::Write => {
                if self.stream.is_sealed_by_kernel() {
                    // A peer that takes nothing does without. What the kernel has sealed and TCP has no room
                    // for is cut off, which is at most one record.
                    let _ = send_control_record(&self.socket, END.0, END.1);
                }
                let _ = shutdown(&self.socket, Shutdown::Write);
            }
            Close::Reset => {
                // The kernel drops what it has of it, rather than try to deliver that.
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

impl TcpServer {
    /// A transport with no connections. Events on its operations carry `owner`.
    pub fn new(owner: u8, policy: Arc<Policy>) -> Self {
        Self {
            owner,
            entries: Vec::new(),
            free: Vec::new(),
            watch: Watch::new(owner, policy.unreachable_timeout),
            shared: StreamShared::new(policy),
            passed: VecDeque::new(),
            sending: 0,
            has_sent: false,
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

    /// Takes over a connection, and reads its handshake. Returns its name in later events.
    pub fn adopt(&mut self, reactor: &mut Reactor, mut stream: AcceptedStream) -> ConnectionId {
        let (received, is_passed) = (std::mem::take(&mut stream.received), stream.is_passed);
        let id = self.insert(reactor, stream);
        self.with(reactor, id, |connection, shared, reactor| {
            if is_passed {
                connection.stream.on_hello(received, shared, reactor.clock());
            } else if !received.is_empty() {
                connection.stream.on_early(received, shared, reactor.clock());
            }
        });
        id
    }

    fn insert(&mut self, reactor: &mut Reactor, stream: AcceptedStream) -> ConnectionId {
        let socket = &stream.socket;
        // None of this matters to a Unix socket.
        let _ = sockopt::set_tcp_nodelay(socket, true);
        // An idle peer whose host has died is found by the kernel: the protocol does not ask idle clients to
        // speak.
        if sockopt::set_socket_keepalive(socket, true).is_ok() {
            let _ = sockopt::set_tcp_keepidle(socket, Duration::from_secs(60));
            let _ = sockopt::set_tcp_keepintvl(socket, Duration::from_secs(10));
            let _ = sockopt::set_tcp_keepcnt(socket, 6);
        }
        // So that one to which something was sent is found soon even if it took nothing for long before. Not
        // less, for a peer that has taken its window back is given up by the kernel after twice that.
        bound_tcp_retries(socket, self.shared.policy.unreachable_timeout / 2);
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry { generation: 0, connection: None });
            self.entries.len() as u32 - 1
        });
        let entry = &mut self.entries[index as usize];
        let id = ConnectionId { transport: self.owner, index, generation: entry.generation };
        entry.connection = Some(Box::new(Connection {
            socket: reactor.file(Arc::clone(socket)),
            stream: StreamConnection::new(
                id,
                &self.shared.policy,
                stream.records,
                stream.identity,
                stream.is_passed,
                stream.may_move,
                reactor.clock(),
            ),
            held: None,
            timer: None,
            is_watched: false,
        }));
        id
    }

    /// The next client that wants to move to a queue pair.
    fn next_upgrade(&mut self) -> Option<UpgradeRequest> {
        while let Some((id, peer, theirs)) = self.shared.upgrades.pop_front() {
            let Some(connection) = self.connection(id) else { continue };
            // It may have ended since, for what it said next.
            if connection.stream.is_upgrade_requested() {
                let ip = |address: rustix::net::SocketAddrAny| {
                    std::net::SocketAddr::try_from(address).ok().map(|address| address.ip().to_canonical())
                };
                return Some(UpgradeRequest {
                    connection: id,
                    peer: Peer { grant: peer.grant.on_queue_pair(), ..*peer },
                    theirs,
                    held: connection.held.clone(),
                    local: getsockname(&connection.socket).ok().and_then(ip),
                    remote: getpeername(&connection.socket).ok().flatten().and_then(ip),
                });
            }
        }
        None
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
            connection.receive(&mut self.shared, reactor);
            if connection.settle(&mut self.shared) {
                self.attend(reactor, id);
            }
        }
    }

    /// Starts the send of the connection there that is due, if none is in flight.
    fn send(&mut self, reactor: &mut Reactor, index: u32) {
        let Some(connection) = self.entries[index as usize].connection.as_deref_mut() else { return };
        let Some(batch) = connection.stream.poll_send(&mut self.shared) else { return };
        let id = connection.stream.id();
        if !std::mem::replace(&mut connection.is_watched, true) {
            self.watch.add(reactor, id);
        }
        match reactor.send(token(id, Kind::Send), connection.socket.clone(), batch) {
            None => self.sending += 1,
            Some(event) => {
                self.has_sent = true;
                connection.sent(event, &mut self.shared, reactor.clock());
            }
        }
        // There may be room for more answers now.
        connection.receive(&mut self.shared, reactor);
    }

    /// Does what seldom follows from a change: sets the timer, closes, and lets go of what is over.
    #[cold]
    fn attend(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        let Some(connection) = entry(&mut self.entries, id) else { return };
        match connection.stream.poll_close() {
            Some(Close::PassOn(to, hello)) => {
                let stream = connection.stream.pass_on(connection.socket.descriptor(), hello);
                self.passed.push_back(Passed { connection: id, to, stream });
            }
            Some(how) => connection.close(&how),
            None => {}
        }
        let deadline = connection.stream.deadline();
        if deadline != connection.timer.map(|(at, _)| at) {
            if let Some((_, timer)) = connection.timer.take() {
                reactor.cancel_timer(timer);
            }
            connection.timer = deadline.map(|at| (at, reactor.timer(at, token(id, Kind::Timer))));
        }
        if connection.stream.is_over() {
            connection.stream.on_gone(&mut self.shared);
            let entry = &mut self.entries[id.index as usize];
            entry.connection = None;
            entry.generation = entry.generation.wrapping_add(1);
            self.free.push(id.index);
        }
    }

    /// Asks the kernel about the connections to which something was sent: it may try in vain.
    fn check_watched(&mut self, reactor: &mut Reactor) {
        let (entries, shared) = (&mut self.entries, &mut self.shared);
        let mut ended = Vec::new();
        self.watch.check(reactor, |id, judge| {
            let Some(connection) = entry(entries, id) else { return false };
            let verdict = match TcpInfo::of(&connection.socket) {
                Ok(info) if connection.stream.is_open() => judge(&info),
                _ => Verdict::Settled,
            };
            // A send that waits for room may go on without a new one.
            let stays =
                verdict == Verdict::Wait || (verdict == Verdict::Settled && connection.stream.is_sending());
            connection.is_watched = stays;
            if verdict == Verdict::Unreachable {
                connection.stream.end_unreachable(shared);
                ended.push(id);
            }
            stays
        });
        for id in ended {
            self.with(reactor, id, |_, _, _| {});
        }
    }

    fn all(&self) -> Vec<ConnectionId> {
        self.entries.iter().filter_map(|entry| Some(entry.connection.as_ref()?.stream.id())).collect()
    }
}

fn token(id: ConnectionId, kind: Kind) -> Token {
    let value = u64::from(id.generation) << 32 | u64::from(id.index) << 2 | kind as u64;
    Token { owner: id.transport, value }
}

impl ServerTransport for TcpServer {
    fn owner(&self) -> u8 {
        self.owner
    }

    fn set_timeouts(&mut self, stall_timeout: Duration, linger: Duration) {
        let policy = Arc::make_mut(&mut self.shared.policy);
        (policy.stall_timeout, policy.linger) = (stall_timeout, linger);
    }

    fn handle(&mut self, reactor: &mut Reactor, event: Event) {
        let value = event.token.value;
        let id = ConnectionId {
            transport: self.owner,
            index: (value as u32) >> 2,
            generation: (value >> 32) as u32,
        };
        let kind = value & 3;
        if kind == Kind::Watch as u64 {
            return self.check_watched(reactor);
        }
        self.sending -= usize::from(kind == Kind::Send as u64);
        let Some(connection) = entry(&mut self.entries, id) else {
            debug_assert!(matches!(event.payload, Payload::Timer), "an operation outlived its connection");
            return;
        };
        if kind == Kind::Receive as u64 {
            connection.received(event, &mut self.shared, reactor.clock());
        } else if kind == Kind::Send as u64 {
            connection.sent(event, &mut self.shared, reactor.clock());
        } else {
            // It may be one that was cancelled when it had come already.
            connection.timer.take_if(|(at, _)| *at <= reactor.clock().now());
            connection.stream.on_timer(&mut self.shared, reactor.clock());
        }
        connection.receive(&mut self.shared, reactor);
        if connection.settle(&mut self.shared) {
            self.attend(reactor, id);
        }
    }

    fn poll_ready(&mut self, _arm: bool) -> bool {
        // What a flush has left behind.
        self.has_sent
            || !self.shared.events.is_empty()
            || !self.shared.dirty.is_empty()
            || !self.passed.is_empty()
            || !self.shared.ended.is_empty()
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
            connection.receive(&mut self.shared, reactor);
        }
        if connection.settle(&mut self.shared) {
            self.attend(reactor, id);
        }
    }

    fn push(&mut self, _reactor: &mut Reactor, id: ConnectionId, push: Push<'_>) -> Result<(), NotPushed> {
        let connection = entry(&mut self.entries, id).ok_or(NotPushed::Closed)?;
        let pushed = connection.stream.push(push, &mut self.shared);
        connection.stream.settle_heap(&mut self.shared);
        pushed
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
            if connection.stream.begin_flush(&mut self.shared) {
                self.send(reactor, index);
            }
            let Some(connection) = self.entries[index as usize].connection.as_deref_mut() else { continue };
            if connection.stream.is_gated() {
                connection.receive(&mut self.shared, reactor);
            }
            if connection.settle(&mut self.shared) {
                let id = connection.stream.id();
                self.attend(reactor, id);
            }
        }
        if self.shared.dirty.is_empty() {
            self.shared.dirty = dirty;
        }
        for index in self.shared.take_gated() {
            let Some(connection) = self.entries[index as usize].connection.as_deref_mut() else { continue };
            if let Some(receive) = connection.stream.reopen_gate(&mut self.shared, reactor.clock()) {
                connection.submit(receive, reactor);
            }
            if connection.settle(&mut self.shared) {
                let id = connection.stream.id();
                self.attend(reactor, id);
            }
        }
    }

    fn flush_early(&mut self, reactor: &mut Reactor) {
        for at in 0..self.shared.dirty.len() {
            let index = self.shared.dirty[at];
            let connection = self.entries[index as usize].connection.as_deref_mut();
            if connection.is_some_and(|connection| connection.stream.begin_early_flush()) {
                self.send(reactor, index);
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
        let is_there = found.is_there(&mut self.shared, reactor.clock());
        if !is_there && found.settle(&mut self.shared) {
            self.attend(reactor, connection);
        }
        is_there
    }

    fn show_life(&mut self, reactor: &mut Reactor, connection: ConnectionId) {
        let Some(found) = entry(&mut self.entries, connection) else { return };
        // Nor is it heard that such a connection has ended.
        if found.stream.is_unread() && found.is_there(&mut self.shared, reactor.clock()) {
            found.stream.show_life(&mut self.shared);
        }
        if found.settle(&mut self.shared) {
            self.attend(reactor, connection);
        }
    }

    fn unsent_bytes(&self, connection: ConnectionId) -> usize {
        self.connection(connection).map_or(0, |connection| connection.stream.unsent_bytes())
    }

    fn is_sending(&self) -> bool {
        self.sending > 0 || !self.shared.dirty.is_empty()
    }

    fn connections(&self) -> usize {
        // Those that have moved count where they are now.
        self.entries.len() - self.free.len() - self.shared.upgraded
    }

    fn is_delivered(&self) -> bool {
        // What a peer sends from then on is answered with a reset. It can read the goaway all the same.
        let has_arrived = |connection: &Connection| {
            // What is sent over a Unix socket has arrived.
            let is_acked = || match TcpInfo::of(&connection.socket) {
                Ok(info) => info.unacked == 0 && info.unsent_bytes == 0,
                Err(_) => true,
            };
            connection.stream.has_said_all() && is_acked()
        };
        let mut all = self.entries.iter().filter_map(|entry| entry.connection.as_deref());
        all.all(|connection| connection.stream.upgraded_to().is_some() || has_arrived(connection))
    }

    fn accept(
        &mut self,
        reactor: &mut Reactor,
        incoming: Accepted,
    ) -> Result<Result<ConnectionId, Error>, Accepted> {
        match incoming {
            Accepted::Stream(stream) => Ok(Ok(self.adopt(reactor, stream))),
            incoming @ Accepted::Other(_) => Err(incoming),
        }
    }

    fn hold(&mut self, id: ConnectionId, held: Arc<dyn Any>) {
        if let Some(connection) = entry(&mut self.entries, id) {
            connection.held = Some(held);
        }
    }

    fn next_passed(&mut self) -> Option<Passed> {
        self.passed.pop_front()
    }

    fn socket(&self, id: ConnectionId) -> Option<Weak<OwnedFd>> {
        Some(self.connection(id)?.socket.downgrade())
    }

    fn next_handover(&mut self) -> Option<Handover> {
        // Asked in every iteration, and rarely for something.
        if self.shared.ended.is_empty() && self.shared.upgrades.is_empty() {
            return None;
        }
        match self.shared.ended.pop_front() {
            Some((partner, reason)) => {
                Some(Handover::Ended { partner, reason, status: Status::OK, text: String::new() })
            }
            None => self.next_upgrade().map(|request| Handover::Upgrade(Box::new(request))),
        }
    }

    fn answer_upgrade(
        &mut self,
        reactor: &mut Reactor,
        id: ConnectionId,
        answer: Result<(ConnectionId, &QueuePairAddress), (Status, &str)>,
    ) {
        self.with(reactor, id, |connection, shared, _| {
            connection.stream.answer_upgrade(answer, shared);
        });
    }

    fn partner_ended(
        &mut self,
        reactor: &mut Reactor,
        id: ConnectionId,
        _reason: CloseReason,
        status: Status,
        text: &str,
    ) {
        self.with(reactor, id, |connection, shared, reactor| {
            connection.stream.partner_ended(status, text, shared, reactor.clock());
        });
    }

    fn heap(&self) -> (usize, u64) {
        self.shared.heap()
    }

    fn has_gated(&self) -> bool {
        !self.shared.gated.is_empty()
    }

    fn show_life_to_gated(&mut self, reactor: &mut Reactor) {
        // From the end, for one that has ended is taken out.
        for at in (0..self.shared.gated.len()).rev() {
            let index = self.shared.gated[at];
            if let Some(id) = self.id_at(index) {
                self.show_life(reactor, id);
            }
        }
    }
}
