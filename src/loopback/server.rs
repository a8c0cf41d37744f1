//! The server's side of the in-process transport: all connections of one worker.
//!
//! A request is in `unanswered` from its arrival until its response has been sent, so that is where credits
//! are counted. A connection whose peer has no room for its answers is not read from: what it holds here
//! stays within its credits.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use slab::Slab;

use super::link::End;
use crate::error::{Status, Violation};
use crate::handshake::{Peer, Policy};
use crate::memory::Slot;
use crate::message::{self, Limits, Message, Parsed, RemoteRegion};
use crate::reactor::{Event, File, Op, OpId, Payload, Reactor, TimerId, Token};
use crate::transport::{
    CloseReason, ConnectionId, Request, RequestKey, Response, ServerEvent, ServerTransport, SlotRange,
};

/// Receives posted beyond one for each credit: pings, pongs and a goaway.
const CONTROL_MESSAGES: usize = 8;
/// A connection's share of a turn, in messages.
const TURN_MESSAGES_MAX: usize = 64;

/// See the module documentation.
#[derive(Debug)]
pub struct Server {
    owner: u8,
    policy: Arc<Policy>,
    connections: Slab<Connection>,
    generation: u32,
    events: VecDeque<ServerEvent>,
    /// Connections with something to send since the last flush.
    answered: Vec<ConnectionId>,
}

#[derive(Debug)]
struct Connection {
    generation: u32,
    end: End,
    eventfd: File,
    looking: OpId,
    timer: Option<(Instant, TimerId)>,
    /// None until the handshake is over.
    open: Option<Open>,
    since: Instant,
    heard: Instant,
    unanswered: HashMap<u64, Unanswered>,
    unsent: VecDeque<Outgoing>,
    /// Since when the peer has had no room for what is unsent.
    blocked: Option<Instant>,
    /// Found while sending: the next look ends the connection.
    broken: Option<Violation>,
}

#[derive(Debug)]
struct Open {
    peer: Peer,
    limits: Limits,
}

#[derive(Debug)]
struct Unanswered {
    region: RemoteRegion,
    data_crc: u32,
    inline: Vec<u8>,
    answered: bool,
}

#[derive(Debug)]
enum Outgoing {
    Message(Vec<u8>),
    Response(u64, Response),
}

impl Outgoing {
    fn slot_bytes(&self) -> usize {
        match self {
            Self::Response(_, Response { data: Some(data), .. }) => data.slot.len(),
            _ => 0,
        }
    }
}

impl Server {
    /// A server without connections. Its tokens have this owner number.
    pub fn new(owner: u8, policy: Arc<Policy>) -> Self {
        Self {
            owner,
            policy,
            connections: Slab::new(),
            generation: 0,
            events: VecDeque::new(),
            answered: Vec::new(),
        }
    }

    /// Takes over one end of a link, whose other end a client has. The handshake is still to come.
    pub fn adopt(&mut self, reactor: &mut Reactor, end: End) -> ConnectionId {
        self.generation = self.generation.wrapping_add(1);
        let entry = self.connections.vacant_entry();
        let id = ConnectionId { index: entry.key() as u32, generation: self.generation };
        let eventfd = reactor.file(Arc::clone(end.eventfd()));
        let looking = reactor.submit(token(self.owner, id), Op::Readable { file: eventfd.clone() });
        let now = Instant::now();
        entry.insert(Connection {
            generation: id.generation,
            end,
            eventfd,
            looking,
            timer: None,
            open: None,
            since: now,
            heard: now,
            unanswered: HashMap::new(),
            unsent: VecDeque::new(),
            blocked: None,
            broken: None,
        });
        self.set_timer(reactor, id);
        id
    }

    fn get(&mut self, id: ConnectionId) -> Option<&mut Connection> {
        self.connections.get_mut(id.index as usize).filter(|c| c.generation == id.generation)
    }

    /// Sees to it that a timer comes at the connection's next deadline, or before.
    fn set_timer(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        let token = token(self.owner, id);
        let policy = Arc::clone(&self.policy);
        let Some(connection) = self.get(id) else { return };
        let Some((at, _)) = connection.deadline(&policy) else { return };
        match connection.timer {
            Some((set, _)) if set <= at => return,
            Some((_, timer)) => reactor.cancel_timer(timer),
            None => {}
        }
        connection.timer = Some((at, reactor.timer(at, token)));
    }

    /// Takes in what has arrived at a connection, and sends what waits for room.
    fn look(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        let Some(connection) = self.get(id) else { return };
        connection.end.look();
        // Asked before the inbox is looked into: what the client sent before it went is taken in.
        let gone = connection.end.has_lost_peer();
        connection.send();
        if let Some(violation) = connection.broken {
            return self.end(reactor, id, CloseReason::Violation(violation));
        }
        for _ in 0..TURN_MESSAGES_MAX {
            let Some(connection) = self.get(id) else { return };
            if !connection.unsent.is_empty() && !gone {
                // It will be looked at again when there is room.
                return self.set_timer(reactor, id);
            }
            let Some(message) = connection.end.receive() else {
                if gone {
                    let finished = connection.unanswered.is_empty() && connection.open.is_some();
                    let reason = if finished { CloseReason::Finished } else { CloseReason::Lost(0) };
                    self.end(reactor, id, reason);
                }
                return self.set_timer(reactor, id);
            };
            connection.heard = Instant::now();
            let taken = if connection.open.is_some() {
                self.take_in(reactor, id, message)
            } else {
                self.shake_hands(id, &message)
            };
            if let Err(violation) = taken {
                return self.end(reactor, id, CloseReason::Violation(violation));
            }
        }
        if let Some(connection) = self.get(id) {
            connection.end.look_again();
            self.set_timer(reactor, id);
        }
    }

    fn shake_hands(&mut self, id: ConnectionId, hello: &[u8]) -> Result<(), Violation> {
        let Parsed::Item((peer, welcome), taken) = self.policy.welcome(hello)? else {
            return Err(Violation::Length);
        };
        if taken != hello.len() {
            return Err(Violation::Length);
        }
        let Some(connection) = self.get(id) else { return Ok(()) };
        connection.end.set_receives(peer.grant.credits() as usize + CONTROL_MESSAGES);
        connection.unsent.push_back(Outgoing::Message(welcome));
        connection.open = Some(Open { peer: peer.clone(), limits: peer.grant.limits() });
        self.answered.push(id);
        self.events.push_back(ServerEvent::Opened(id, Box::new(peer)));
        Ok(())
    }

    fn take_in(
        &mut self,
        reactor: &mut Reactor,
        id: ConnectionId,
        message: Vec<u8>,
    ) -> Result<(), Violation> {
        let Some(connection) = self.get(id) else { return Ok(()) };
        let Some(open) = &connection.open else { return Ok(()) };
        let Parsed::Item(parsed, taken) = message::parse(&message, &open.limits)? else {
            return Err(Violation::Length);
        };
        let inline = &message[taken..];
        match parsed {
            Message::Request(request, body) => {
                let grant = &open.peer.grant;
                if inline.len() != request.data_len as usize || inline.len() > grant.inline_bytes_max as usize
                {
                    return Err(Violation::Length);
                }
                let fetched = matches!(request.region, RemoteRegion::Out { .. });
                if open.limits.crc && !fetched && request.data_crc != message::data_crc(inline) {
                    return Err(Violation::Checksum);
                }
                if connection.unanswered.len() >= grant.credits() as usize {
                    return Err(Violation::Credits);
                }
                if connection.unanswered.contains_key(&request.id) {
                    return Err(Violation::RequestId);
                }
                let unanswered = Unanswered {
                    region: request.region,
                    data_crc: request.data_crc,
                    inline: inline.to_vec(),
                    answered: false,
                };
                connection.unanswered.insert(request.id, unanswered);
                self.events.push_back(ServerEvent::Request(Request {
                    key: RequestKey { connection: id, id: request.id },
                    body: body.into(),
                    data_len: request.data_out_len(),
                    region_len: request.region_in_len(),
                }));
            }
            _ if !inline.is_empty() => return Err(Violation::Length),
            Message::Ping(ping) => {
                let mut pong = Vec::new();
                message::encode_pong(ping, open.limits.crc, &mut pong);
                connection.unsent.push_back(Outgoing::Message(pong));
                connection.send();
            }
            // This side never pings.
            Message::Pong(_) => return Err(Violation::RequestId),
            Message::Goaway(status, _) => {
                let finished = connection.unanswered.is_empty() && status.is_ok();
                let reason = if finished { CloseReason::Finished } else { CloseReason::Lost(status.errno) };
                self.end(reactor, id, reason);
            }
            Message::Response(..) => return Err(Violation::Kind(message::Kind::Response as u8)),
            Message::QueuePair(..) => return Err(Violation::Kind(message::Kind::QueuePair as u8)),
        }
        Ok(())
    }

    /// Ends a connection, saying goaway to a peer that broke the protocol.
    fn end(&mut self, reactor: &mut Reactor, id: ConnectionId, reason: CloseReason) {
        match reason {
            // Whoever it is does not speak raio, and would not understand.
            CloseReason::Violation(Violation::Magic) => {}
            CloseReason::Violation(violation) => {
                self.send_goaway(id, Status::protocol(violation.errno()), &format!("{violation}."));
            }
            _ => {}
        }
        if self.get(id).is_none() {
            return;
        }
        let connection = self.connections.remove(id.index as usize);
        reactor.cancel(connection.looking);
        if let Some((_, timer)) = connection.timer {
            reactor.cancel_timer(timer);
        }
        self.events.push_back(ServerEvent::Closed(id, reason));
    }

    fn send_goaway(&mut self, id: ConnectionId, status: Status, text: &str) {
        let rejection = self.policy.rejection(status.errno, text);
        let Some(connection) = self.get(id) else { return };
        let goaway = match &connection.open {
            None => rejection,
            Some(open) => {
                let mut goaway = Vec::new();
                message::encode_goaway(status, text, open.limits.crc, &mut goaway);
                goaway
            }
        };
        // If it has no room it will see that this side has gone.
        let _ = connection.end.send(goaway);
    }
}

impl Connection {
    /// Sends from the front of `unsent` as long as the peer has room.
    fn send(&mut self) {
        while !self.unsent.is_empty() && self.broken.is_none() {
            if !self.end.has_room() {
                self.blocked.get_or_insert_with(Instant::now);
                return;
            }
            self.blocked = None;
            let message = match self.unsent.pop_front() {
                Some(Outgoing::Message(message)) => Ok(message),
                Some(Outgoing::Response(id, response)) => self.place(id, &response),
                None => return,
            };
            match message {
                // There is room. If the peer has gone, the eventfd says so.
                Ok(message) => drop(self.end.send(message)),
                Err(violation) => {
                    self.broken = Some(violation);
                    self.end.look_again();
                }
            }
        }
    }

    /// Places the data of a response and makes its message, with which the request ends.
    fn place(&mut self, id: u64, response: &Response) -> Result<Vec<u8>, Violation> {
        let crc = self.open.as_ref().is_some_and(|open| open.limits.crc);
        let region = self.unanswered.remove(&id).map_or(RemoteRegion::None, |unanswered| unanswered.region);
        let data = response.data.as_ref().map_or(&[][..], |d| d.bytes());
        // Memory that the peer named and did not lay open is its fault.
        if !data.is_empty() && !self.end.place(region, data) && !self.end.has_lost_peer() {
            return Err(Violation::Field);
        }
        let header = message::Response {
            id,
            body_len: 0,
            data_len: data.len() as u32,
            status: response.status,
            credits: 1,
            result: response.result,
            data_crc: if crc { message::data_crc(data) } else { 0 },
        };
        let mut message = Vec::new();
        header.encode(&response.body, crc, &mut message);
        Ok(message)
    }

    /// When it is over with this connection unless something happens before, and how.
    fn deadline(&self, policy: &Policy) -> Option<(Instant, Violation)> {
        let Some(open) = &self.open else {
            return Some((self.since + policy.handshake_timeout, Violation::HandshakeTimeout));
        };
        // Three times, so that one late message is no death sentence.
        let promised = open.peer.keepalive * 3;
        (!promised.is_zero()).then(|| (self.heard + promised, Violation::Silent))
    }
}

fn token(owner: u8, id: ConnectionId) -> Token {
    Token { owner, value: u64::from(id.generation) << 32 | u64::from(id.index) }
}

impl ServerTransport for Server {
    fn owners(&self) -> [u8; 2] {
        [self.owner; 2]
    }

    fn handle(&mut self, reactor: &mut Reactor, event: Event) {
        let value = event.token.value;
        let id = ConnectionId { index: value as u32, generation: (value >> 32) as u32 };
        let policy = Arc::clone(&self.policy);
        let Some(connection) = self.get(id) else { return };
        if let Payload::Timer = event.payload {
            connection.timer = None;
            match connection.deadline(&policy) {
                Some((at, violation)) if at <= Instant::now() => {
                    self.end(reactor, id, CloseReason::Violation(violation));
                }
                _ => self.set_timer(reactor, id),
            }
            return;
        }
        let file = connection.eventfd.clone();
        self.look(reactor, id);
        let token = token(self.owner, id);
        if let Some(connection) = self.get(id) {
            connection.looking = reactor.submit(token, Op::Readable { file });
        }
    }

    fn next_event(&mut self) -> Option<ServerEvent> {
        while let Some(event) = self.events.pop_front() {
            // Requests of a connection that has ended since are void.
            let connection = match &event {
                ServerEvent::Request(request) => request.key.connection,
                ServerEvent::Fetched(key, _) => key.connection,
                ServerEvent::Opened(..) | ServerEvent::Closed(..) => return Some(event),
            };
            if self.get(connection).is_some() {
                return Some(event);
            }
        }
        None
    }

    fn fetch(&mut self, reactor: &mut Reactor, request: RequestKey, mut slot: Slot, start: usize) {
        let Some(connection) = self.get(request.connection) else { return };
        let crc = connection.open.as_ref().is_some_and(|open| open.limits.crc);
        let Some(asked) = connection.unanswered.get_mut(&request.id) else { return };
        let fetched = match asked.region {
            RemoteRegion::Out { len, .. } => {
                let target = &mut slot.bytes_mut()[start..start + len as usize];
                if !connection.end.fetch(asked.region, target) {
                    Err(Violation::Field)
                } else if crc && message::data_crc(target) != asked.data_crc {
                    Err(Violation::Checksum)
                } else {
                    Ok(target.len())
                }
            }
            _ => {
                let inline = std::mem::take(&mut asked.inline);
                slot.bytes_mut()[start..start + inline.len()].copy_from_slice(&inline);
                Ok(inline.len())
            }
        };
        match fetched {
            Ok(len) => {
                self.events.push_back(ServerEvent::Fetched(request, SlotRange { slot, start, len }));
            }
            // A peer that has gone has taken its memory along.
            Err(Violation::Field) if connection.end.has_lost_peer() => {
                self.end(reactor, request.connection, CloseReason::Lost(0));
            }
            Err(violation) => self.end(reactor, request.connection, CloseReason::Violation(violation)),
        }
    }

    fn respond(&mut self, _reactor: &mut Reactor, request: RequestKey, response: Response) {
        let Some(connection) = self.get(request.connection) else { return };
        let asked = connection.unanswered.get_mut(&request.id).expect("a request is answered once");
        assert!(!std::mem::replace(&mut asked.answered, true), "a request is answered once");
        let room = if let RemoteRegion::In { len, .. } = asked.region { len } else { 0 };
        assert!(
            response.data.as_ref().is_none_or(|data| data.len <= room as usize),
            "a response brings more data than its request has room for"
        );
        connection.unsent.push_back(Outgoing::Response(request.id, response));
        self.answered.push(request.connection);
    }

    fn flush(&mut self, reactor: &mut Reactor) {
        for id in std::mem::take(&mut self.answered) {
            if let Some(connection) = self.get(id) {
                connection.send();
                self.set_timer(reactor, id);
            }
        }
    }

    fn close(&mut self, reactor: &mut Reactor, connection: ConnectionId, status: Status, text: &str) {
        self.send_goaway(connection, status, text);
        self.end(reactor, connection, CloseReason::Local);
    }

    fn reject(&mut self, reactor: &mut Reactor, id: ConnectionId, errno: i32, text: &str) {
        let rejection = self.policy.rejection(errno, text);
        if let Some(connection) = self.get(id) {
            let _ = connection.end.send(rejection);
            self.end(reactor, id, CloseReason::Rejected);
        }
    }

    fn close_stalled(&mut self, reactor: &mut Reactor, close: bool) {
        let now = Instant::now();
        let stalled = |connection: &Connection| {
            connection.blocked.is_some_and(|since| since + self.policy.stall_timeout <= now)
        };
        let ids: Vec<_> = self
            .connections
            .iter()
            .filter(|(_, connection)| close && stalled(connection))
            .map(|(index, connection)| ConnectionId {
                index: index as u32,
                generation: connection.generation,
            })
            .collect();
        for id in ids {
            self.end(reactor, id, CloseReason::Evicted);
        }
    }

    fn unsent_bytes(&self, id: ConnectionId) -> usize {
        let connection = self.connections.get(id.index as usize).filter(|c| c.generation == id.generation);
        let unsent = connection.into_iter().flat_map(|connection| &connection.unsent);
        unsent.map(Outgoing::slot_bytes).sum()
    }

    fn is_sending(&self) -> bool {
        self.connections.iter().any(|(_, connection)| !connection.unsent.is_empty())
    }

    fn connections(&self) -> usize {
        self.connections.len()
    }
}
