//! `raio://`: a connection begins over TCP, and moves to a queue pair if both sides can.
//!
//! The TCP connection of one that has moved stays, carrying nothing: its end, which the kernel tells at once
//! when a process dies, is the end of the connection, and the other way round. What this looks like on the
//! wire is in docs/PROTOCOL.md, part 3.

use std::any::Any;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Instant;

use crate::error::{Class, Error, Status};
use crate::handshake::{Offer, Policy};
use crate::memory::{Arena, Slot};
use crate::reactor::{Event, Reactor};
use crate::transport::{
    ClientTransport, CloseReason, ConnectionId, QueuePairMemory, RequestKey, Response, ServerEvent,
    ServerTransport,
};
use crate::{message, rdma, tcp};

/// A client that has connected.
#[derive(Debug)]
pub enum Reached {
    /// By a queue pair.
    Rdma(Box<rdma::Client>),
    /// Over TCP, and, if it might have been otherwise, a sentence that says why not.
    Tcp(Box<tcp::Client>, Option<String>),
}

/// Connects to the server at `address` and shakes hands, by `deadline`.
pub fn connect(address: SocketAddr, offer: &Offer, deadline: Instant) -> Result<Reached, Error> {
    let over_tcp = |stream, why: &dyn std::fmt::Display| {
        let why = format!("Connected over TCP, not RDMA: {why}.");
        tracing::info!("{why}");
        Reached::Tcp(stream, Some(why))
    };
    let plain = || Ok::<_, Error>(Box::new(tcp::Client::connect(address, offer, deadline)?));
    if let Some(reason) = rdma::unavailable() {
        return Ok(over_tcp(plain()?, &format_args!("there is no RDMA here ({reason})")));
    }
    let stream = tcp::Client::connect(address, &Offer { queue_pair: true, ..offer.clone() }, deadline)?;
    if !stream.grant().queue_pair {
        return Ok(over_tcp(Box::new(stream), &"the server has no RDMA, or will not use it; see its log"));
    }
    let (stream, error) = match upgrade(stream, deadline) {
        Ok(client) => return Ok(Reached::Rdma(Box::new(client))),
        Err(failed) => failed,
    };
    let stream = match stream {
        Some(stream) => stream,
        None => plain()?,
    };
    Ok(match &error {
        Error::Rejected { text, .. } => {
            over_tcp(stream, &format_args!("the server says: {}", text.trim_end_matches('.')))
        }
        error => over_tcp(stream, error),
    })
}

/// Moves a connection that has shaken hands over TCP, and asked for nothing yet, to a queue pair, by
/// `deadline`. Fails with the TCP connection if that can be used as it is, and with why.
pub fn upgrade(
    mut stream: tcp::Client,
    deadline: Instant,
) -> Result<rdma::Client, (Option<Box<tcp::Client>>, Error)> {
    let made = stream.local_address().and_then(|local| rdma::Upgrade::new(local.ip(), stream.grant()));
    let made = match made {
        Ok(made) => made,
        Err(error) => return Err((Some(Box::new(stream)), error)),
    };
    // If it takes longer there must be time left to connect anew.
    let now = Instant::now();
    let half = now + deadline.saturating_duration_since(now) / 2;
    match stream.exchange_queue_pairs(made.address(), half) {
        Ok(theirs) => made.connect(&theirs, Box::new(stream), deadline).map_err(|error| (None, error)),
        Err(error) if stream.failure().is_some() => Err((None, error)),
        Err(error) => Err((Some(Box::new(stream)), error)),
    }
}

/// All connections of one worker: over TCP, by RDMA, and those that move from one to the other, which nobody
/// else need know of: their ids stay the same.
pub struct Server {
    tcp: tcp::Server,
    rdma: Option<rdma::Server>,
    /// By a TCP connection's index: the queue pair that it has moved to.
    moved: Vec<Option<Moved>>,
    /// How many of them.
    moved_count: usize,
    /// By a queue pair's index: where in `moved` it is.
    streams: Vec<Option<Moved>>,
    /// Those whose TCP connection has ended.
    ended: VecDeque<(ConnectionId, CloseReason)>,
    /// Those whose queue pair has closed.
    closed: VecDeque<(ConnectionId, CloseReason)>,
}

#[derive(Clone, Copy)]
struct Moved {
    stream: ConnectionId,
    queue_pair: ConnectionId,
}

/// A connection as its own transport knows it.
enum Place {
    Tcp(ConnectionId),
    Rdma(ConnectionId),
}

fn outside_tcp(id: ConnectionId) -> ConnectionId {
    ConnectionId { index: id.index << 1, ..id }
}

fn at(table: &[Option<Moved>], id: ConnectionId) -> Option<Moved> {
    *table.get(id.index as usize)?
}

fn set(table: &mut Vec<Option<Moved>>, id: ConnectionId, moved: Moved) {
    let index = id.index as usize;
    if table.len() <= index {
        table.resize(index + 1, None);
    }
    table[index] = Some(moved);
}

impl Server {
    /// A server without connections. With `rdma`, TCP connections may move to queue pairs. The tokens of
    /// TCP's operations have the owner number `owner`; `rdma` was made with another.
    pub fn new(owner: u8, policy: &Policy, rdma: Option<rdma::Server>) -> Self {
        let policy = Policy { queue_pair: rdma.is_some(), ..policy.clone() };
        Self {
            tcp: tcp::Server::new(owner, Arc::new(policy)),
            rdma,
            moved: Vec::new(),
            moved_count: 0,
            streams: Vec::new(),
            ended: VecDeque::new(),
            closed: VecDeque::new(),
        }
    }

    /// See [`tcp::Server::adopt`].
    pub fn adopt_tcp(&mut self, reactor: &mut Reactor, stream: OwnedFd) -> ConnectionId {
        outside_tcp(self.tcp.adopt(reactor, stream))
    }

    /// See [`tcp::Server::set_place`].
    pub fn set_place(&mut self, place: tcp::Place) {
        self.tcp.set_place(place);
    }

    /// See [`tcp::Server::set_heap_max`].
    pub fn set_heap_max(&mut self, bytes: usize) {
        self.tcp.set_heap_max(bytes);
    }

    /// See [`rdma::Server::set_memory`].
    pub fn set_queue_pair_memory(&mut self, memory: QueuePairMemory) {
        if let Some(rdma) = &mut self.rdma {
            rdma.set_memory(memory);
        }
    }

    /// See [`tcp::Server::heap`].
    pub fn heap(&self) -> (usize, u64) {
        self.tcp.heap()
    }

    /// See [`tcp::Server::has_gated`].
    pub fn has_gated(&self) -> bool {
        self.tcp.has_gated()
    }

    /// See [`tcp::Server::show_life_to_gated`].
    pub fn show_life_to_gated(&mut self, reactor: &mut Reactor) {
        self.tcp.show_life_to_gated(reactor);
    }

    /// See [`tcp::Server::next_passed`].
    pub fn next_passed(&mut self) -> Option<tcp::Passed> {
        let passed = self.tcp.next_passed()?;
        Some(tcp::Passed { connection: outside_tcp(passed.connection), ..passed })
    }

    /// See [`tcp::Server::adopt_passed`].
    pub fn adopt_passed(
        &mut self,
        reactor: &mut Reactor,
        stream: Arc<OwnedFd>,
        hello: Vec<u8>,
    ) -> ConnectionId {
        outside_tcp(self.tcp.adopt_passed(reactor, stream, hello))
    }

    /// See [`rdma::Server::adopt`].
    pub fn adopt_rdma(
        &mut self,
        reactor: &mut Reactor,
        incoming: rdma::Incoming,
    ) -> Result<ConnectionId, Error> {
        match &mut self.rdma {
            Some(rdma) => rdma.adopt(reactor, incoming).map(|id| self.outside_rdma(id)),
            None => Err(Error::Unsupported("This server was made without RDMA. Use TCP.".into())),
        }
    }

    /// Keeps this, for its owner, as long as the connection takes anything of the system: a while longer than
    /// until it is reported as closed.
    pub fn hold(&mut self, connection: ConnectionId, held: Arc<dyn Any>) {
        match (self.place(connection), &mut self.rdma) {
            (Place::Tcp(id), _) => self.tcp.hold(id, held),
            (Place::Rdma(id), Some(rdma)) => rdma.hold(id, held),
            (Place::Rdma(_), None) => unreachable!("it has no such connections"),
        }
    }

    /// Whether a connection began by rdma_cm, and not over TCP.
    pub fn is_by_rdma_cm(connection: ConnectionId) -> bool {
        connection.index & 1 == 1
    }

    /// The socket of a connection that began over TCP, as long as it is open.
    pub fn socket(&self, connection: ConnectionId) -> Option<Weak<OwnedFd>> {
        let stream = ConnectionId { index: connection.index >> 1, ..connection };
        if Self::is_by_rdma_cm(connection) { None } else { self.tcp.socket(stream) }
    }

    /// What the RDMA transport has counted.
    pub fn rdma_counters(&self) -> rdma::Counters {
        self.rdma.as_ref().map(rdma::Server::counters).unwrap_or_default()
    }

    fn place(&self, id: ConnectionId) -> Place {
        let inside = ConnectionId { index: id.index >> 1, ..id };
        if Self::is_by_rdma_cm(id) {
            return Place::Rdma(inside);
        }
        match at(&self.moved, inside) {
            Some(moved) if moved.stream == inside => Place::Rdma(moved.queue_pair),
            _ => Place::Tcp(inside),
        }
    }

    fn at_place(&mut self, id: ConnectionId) -> (ConnectionId, &mut dyn ServerTransport) {
        match (self.place(id), &mut self.rdma) {
            (Place::Tcp(id), _) => (id, &mut self.tcp),
            (Place::Rdma(id), Some(rdma)) => (id, rdma),
            (Place::Rdma(_), None) => unreachable!("it has no such connections"),
        }
    }

    /// The same, only to be looked at.
    fn seen_at_place(&self, id: ConnectionId) -> (ConnectionId, &dyn ServerTransport) {
        match (self.place(id), &self.rdma) {
            (Place::Tcp(id), _) => (id, &self.tcp),
            (Place::Rdma(id), Some(rdma)) => (id, rdma),
            (Place::Rdma(_), None) => unreachable!("it has no such connections"),
        }
    }

    fn outside_rdma(&self, id: ConnectionId) -> ConnectionId {
        match at(&self.streams, id) {
            Some(moved) if moved.queue_pair == id => outside_tcp(moved.stream),
            _ => ConnectionId { index: id.index << 1 | 1, ..id },
        }
    }

    /// Moves those that have asked for it, and ends what is left of those that have ended.
    fn move_on(&mut self, reactor: &mut Reactor) {
        while let Some(exchange) = self.tcp.next_upgrade() {
            let Some(rdma) = &mut self.rdma else { unreachable!("it was not offered") };
            let stream = exchange.connection;
            match rdma.pair_up(reactor, &exchange) {
                Ok((queue_pair, ours)) => {
                    let moved = Moved { stream, queue_pair };
                    set(&mut self.moved, stream, moved);
                    self.moved_count += 1;
                    if let Some(held) = self.tcp.held(stream) {
                        rdma.hold(queue_pair, held);
                    }
                    set(&mut self.streams, queue_pair, moved);
                    self.tcp.answer_upgrade(reactor, stream, Ok((queue_pair, &ours)));
                }
                Err(error) => {
                    let client = exchange.remote.map(tracing::field::display);
                    tracing::debug!(client, name = exchange.peer.name, "A client stays on TCP: {error}.");
                    let status = Status { errno: error.errno(), class: Class::Transport, retryable: false };
                    self.tcp.answer_upgrade(reactor, stream, Err((status, &format!("{error}."))));
                }
            }
        }
        while let Some((queue_pair, reason)) = self.ended.pop_front() {
            if let Some(rdma) = &mut self.rdma {
                rdma.stream_ended(reactor, queue_pair, reason);
            }
        }
        while let Some((stream, reason)) = self.closed.pop_front() {
            let (status, text) = match reason {
                CloseReason::Violation(violation) => {
                    (Status::protocol(violation.errno()), format!("{violation}."))
                }
                _ => (Status::OK, String::new()),
            };
            self.tcp.close(reactor, stream, status, &text);
        }
    }

    /// What an event of TCP's says to others.
    fn heard_of_tcp(&mut self, event: ServerEvent) -> Option<ServerEvent> {
        Some(match event {
            ServerEvent::Opened(id, peer) => ServerEvent::Opened(outside_tcp(id), peer),
            ServerEvent::Request(mut request) => {
                request.key.connection = outside_tcp(request.key.connection);
                ServerEvent::Request(request)
            }
            ServerEvent::Fetched(key, range) => {
                ServerEvent::Fetched(RequestKey { connection: outside_tcp(key.connection), ..key }, range)
            }
            ServerEvent::Closed(id, reason) => {
                if let Some(moved) = at(&self.moved, id)
                    && moved.stream == id
                {
                    self.moved[id.index as usize] = None;
                    self.moved_count -= 1;
                    self.ended.push_back((moved.queue_pair, reason));
                    return None;
                }
                ServerEvent::Closed(outside_tcp(id), reason)
            }
        })
    }

    fn heard_of_rdma(&mut self, event: ServerEvent) -> ServerEvent {
        match event {
            ServerEvent::Opened(id, peer) => ServerEvent::Opened(self.outside_rdma(id), peer),
            ServerEvent::Request(mut request) => {
                request.key.connection = self.outside_rdma(request.key.connection);
                ServerEvent::Request(request)
            }
            ServerEvent::Fetched(key, range) => {
                let connection = self.outside_rdma(key.connection);
                ServerEvent::Fetched(RequestKey { connection, ..key }, range)
            }
            ServerEvent::Closed(id, reason) => {
                let outside = self.outside_rdma(id);
                if let Some(moved) = at(&self.streams, id)
                    && moved.queue_pair == id
                {
                    self.streams[id.index as usize] = None;
                    self.closed.push_back((moved.stream, reason.clone()));
                }
                ServerEvent::Closed(outside, reason)
            }
        }
    }
}

impl ServerTransport for Server {
    fn owners(&self) -> [u8; 2] {
        let [tcp, _] = self.tcp.owners();
        [tcp, self.rdma.as_ref().map_or(tcp, |rdma| rdma.owners()[0])]
    }

    fn handle(&mut self, reactor: &mut Reactor, event: Event) {
        match &mut self.rdma {
            Some(rdma) if rdma.owners().contains(&event.token.owner) => rdma.handle(reactor, event),
            _ => self.tcp.handle(reactor, event),
        }
    }

    fn poll_ready(&mut self, arm: bool) -> bool {
        // What a flush has left behind.
        !self.ended.is_empty()
            || !self.closed.is_empty()
            || self.tcp.poll_ready(arm)
            || self.rdma.as_mut().is_some_and(|rdma| rdma.poll_ready(arm))
    }

    fn process_ready(&mut self, reactor: &mut Reactor) {
        self.tcp.process_ready(reactor);
        if let Some(rdma) = &mut self.rdma {
            rdma.process_ready(reactor);
        }
    }

    fn next_event(&mut self) -> Option<ServerEvent> {
        // RDMA's first: what has moved closes there before its place is taken by another TCP connection.
        if let Some(event) = self.rdma.as_mut().and_then(ServerTransport::next_event) {
            return Some(self.heard_of_rdma(event));
        }
        while let Some(event) = self.tcp.next_event() {
            let event = self.heard_of_tcp(event);
            if event.is_some() {
                return event;
            }
        }
        None
    }

    fn fetch(&mut self, reactor: &mut Reactor, request: RequestKey, slot: Slot, start: usize) {
        let (connection, transport) = self.at_place(request.connection);
        transport.fetch(reactor, RequestKey { connection, ..request }, slot, start);
    }

    fn respond(&mut self, reactor: &mut Reactor, request: RequestKey, response: Response) {
        let (connection, transport) = self.at_place(request.connection);
        transport.respond(reactor, RequestKey { connection, ..request }, response);
    }

    fn respond_filled(
        &mut self,
        request: RequestKey,
        len: usize,
        arena: &mut Arena,
        fill: &mut dyn FnMut(&mut [u8]) -> bool,
    ) -> bool {
        let (connection, transport) = self.at_place(request.connection);
        transport.respond_filled(RequestKey { connection, ..request }, len, arena, fill)
    }

    fn flush_early(&mut self, reactor: &mut Reactor) {
        self.tcp.flush_early(reactor);
    }

    fn flush(&mut self, reactor: &mut Reactor) {
        self.move_on(reactor);
        self.tcp.flush(reactor);
        if let Some(rdma) = &mut self.rdma {
            rdma.flush(reactor);
        }
    }

    fn close(&mut self, reactor: &mut Reactor, connection: ConnectionId, status: Status, text: &str) {
        let (id, transport) = self.at_place(connection);
        transport.close(reactor, id, status, text);
        // The TCP connection of one that has moved says the same.
        let stream = ConnectionId { index: connection.index >> 1, ..connection };
        if connection.index & 1 == 0 && at(&self.moved, stream).is_some_and(|moved| moved.stream == stream) {
            self.tcp.close(reactor, stream, status, message::clipped(text));
        }
    }

    fn reject(&mut self, reactor: &mut Reactor, connection: ConnectionId, errno: i32, text: &str) {
        let (id, transport) = self.at_place(connection);
        transport.reject(reactor, id, errno, text);
    }

    fn close_stalled(&mut self, reactor: &mut Reactor, close: bool) {
        self.tcp.close_stalled(reactor, close);
        if let Some(rdma) = &mut self.rdma {
            rdma.close_stalled(reactor, close);
        }
    }

    fn is_alive(&mut self, reactor: &mut Reactor, connection: ConnectionId) -> bool {
        let (id, transport) = self.at_place(connection);
        if !transport.is_alive(reactor, id) {
            return false;
        }
        // The TCP connection of one that has moved tells when the other process ends.
        let stream = ConnectionId { index: connection.index >> 1, ..connection };
        let has_moved =
            connection.index & 1 == 0 && at(&self.moved, stream).is_some_and(|moved| moved.stream == stream);
        !has_moved || self.tcp.is_alive(reactor, stream)
    }

    fn show_life(&mut self, reactor: &mut Reactor, connection: ConnectionId) {
        let (id, transport) = self.at_place(connection);
        transport.show_life(reactor, id);
    }

    fn unsent_bytes(&self, connection: ConnectionId) -> usize {
        let (id, transport) = self.seen_at_place(connection);
        transport.unsent_bytes(id)
    }

    fn is_sending(&self) -> bool {
        self.tcp.is_sending() || self.rdma.as_ref().is_some_and(ServerTransport::is_sending)
    }

    fn connections(&self) -> usize {
        // Those that have moved count once.
        let streams = self.tcp.connections().saturating_sub(self.moved_count);
        streams + self.rdma.as_ref().map_or(0, ServerTransport::connections)
    }
}
