//! The server's side of the in-process transport: all connections of one worker.
//!
//! This moves messages for [`MessageConnection`]s, which know the protocol. A connection whose peer has no
//! room for its answers is not read from.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use slab::Slab;

use super::link::LoopbackEnd;
use crate::error::{Status, Violation};
use crate::handshake::Policy;
use crate::memory::{Slot, SlotRange};
use crate::reactor::{Event, File, LoopClock, Op, OpId, Payload, Reactor, TimerId, Token};
use crate::server::{DataSource, Due, MessageConnection, Outgoing, Taken};
use crate::transport::{
    CloseReason, ConnectionId, NotPushed, Push, RequestKey, Response, ServerEvent, ServerTransport,
};
use crate::tuning::CONTROL_MESSAGES;

/// A connection's share of an iteration, in messages.
const MESSAGES_MAX: usize = 64;

/// See the module documentation.
#[derive(Debug)]
pub struct LoopbackServer {
    owner: u8,
    policy: Arc<Policy>,
    connections: Slab<Connection>,
    generation: u32,
    events: VecDeque<ServerEvent>,
    /// Connections with something to send since the last flush.
    dirty: Vec<ConnectionId>,
}

#[derive(Debug)]
struct Connection {
    /// Data that came with a request is kept as a copy.
    messages: MessageConnection<Vec<u8>>,
    end: LoopbackEnd,
    eventfd: File,
    readable: OpId,
    timer: Option<(Instant, TimerId)>,
    /// Found while sending: the next receive ends the connection.
    broken: Option<Violation>,
}

impl LoopbackServer {
    /// A server without connections. Its tokens have this owner number.
    pub fn new(owner: u8, policy: Arc<Policy>) -> Self {
        Self {
            owner,
            policy,
            connections: Slab::new(),
            generation: 0,
            events: VecDeque::new(),
            dirty: Vec::new(),
        }
    }

    /// Takes over one end of a link, whose other end a client has. The handshake is still to come.
    pub fn adopt(&mut self, reactor: &mut Reactor, end: LoopbackEnd) -> ConnectionId {
        self.generation = self.generation.wrapping_add(1);
        let entry = self.connections.vacant_entry();
        let id =
            ConnectionId { transport: self.owner, index: entry.key() as u32, generation: self.generation };
        let eventfd = reactor.file(Arc::clone(end.eventfd()));
        let readable = reactor.submit(token(self.owner, id), Op::Readable { file: eventfd.clone() });
        entry.insert(Connection {
            messages: MessageConnection::new(id, &self.policy, reactor.clock()),
            end,
            eventfd,
            readable,
            timer: None,
            broken: None,
        });
        self.set_timer(reactor, id);
        id
    }

    fn get(&mut self, id: ConnectionId) -> Option<&mut Connection> {
        self.connections.get_mut(id.index as usize).filter(|c| c.messages.core.id == id)
    }

    /// Sees to it that a timer comes at the connection's next deadline, or before.
    fn set_timer(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        let token = token(self.owner, id);
        let Some(connection) = self.get(id) else { return };
        let Some(at) = connection.messages.core.deadline() else { return };
        match connection.timer {
            Some((set, _)) if set <= at => return,
            Some((_, timer)) => reactor.cancel_timer(timer),
            None => {}
        }
        connection.timer = Some((at, reactor.timer(at, token)));
    }

    /// Takes in what has arrived at a connection, and sends what waits for room.
    fn poll(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        let Some(connection) = self.get(id) else { return };
        connection.end.look();
        // Asked before the inbox is looked into: what the client sent before it went is taken in.
        let is_gone = connection.end.has_lost_peer();
        connection.send(reactor.clock());
        if let Some(violation) = connection.broken {
            return self.end(reactor, id, CloseReason::Violation(violation));
        }
        for _ in 0..MESSAGES_MAX {
            let Some(connection) = self.get(id) else { return };
            if connection.messages.has_unsent() && !is_gone {
                // It will be looked at again when there is room.
                return self.set_timer(reactor, id);
            }
            let Some(message) = connection.end.receive() else {
                if is_gone {
                    let reason = connection.messages.core.ended_by(Status::OK);
                    self.end(reactor, id, reason);
                }
                return self.set_timer(reactor, id);
            };
            match self.take_in(reactor, id, &message) {
                Ok(None) => {}
                Ok(Some(reason)) => return self.end(reactor, id, reason),
                Err(violation) => return self.end(reactor, id, CloseReason::Violation(violation)),
            }
        }
        if let Some(connection) = self.get(id) {
            connection.end.look_again();
            self.set_timer(reactor, id);
        }
    }

    /// Takes in a message; if that ends the connection, how.
    fn take_in(
        &mut self,
        reactor: &Reactor,
        id: ConnectionId,
        message: &[u8],
    ) -> Result<Option<CloseReason>, Violation> {
        let Some(connection) =
            self.connections.get_mut(id.index as usize).filter(|c| c.messages.core.id == id)
        else {
            return Ok(None);
        };
        if !connection.messages.core.is_open() {
            let (peer, welcome) = MessageConnection::<Vec<u8>>::on_hello(&self.policy, message)?;
            connection.end.set_receives(peer.grant.messages_max() + CONTROL_MESSAGES);
            connection.messages.open(&peer, Some(welcome), reactor.clock());
            self.dirty.push(id);
            self.events.push_back(ServerEvent::Opened(id, Box::new(peer)));
            return Ok(None);
        }
        let len = match connection.messages.on_message(message, &mut self.events, reactor.clock())? {
            Taken::Closed(reason) => return Ok(Some(reason)),
            Taken::Bytes(len) => len,
            Taken::Data { len, id, range } => {
                connection.messages.keep_data(id, message[range].to_vec());
                len
            }
        };
        if len < message.len() {
            // A message comes alone.
            return Err(Violation::Length);
        }
        connection.send(reactor.clock());
        Ok(None)
    }

    /// Ends a connection, saying goaway to a peer that broke the protocol.
    fn end(&mut self, reactor: &mut Reactor, id: ConnectionId, reason: CloseReason) {
        let policy = Arc::clone(&self.policy);
        let Some(connection) = self.get(id) else { return };
        if connection.messages.say_violation(&policy, &reason) {
            connection.send_last();
        }
        let mut connection = self.connections.remove(id.index as usize);
        reactor.cancel(connection.readable);
        if let Some((_, timer)) = connection.timer {
            reactor.cancel_timer(timer);
        }
        connection.messages.report_closed(reason, &mut self.events, reactor.clock());
    }
}

impl Connection {
    /// Sends as long as the peer has room.
    fn send(&mut self, clock: &LoopClock) {
        while self.messages.has_unsent() && self.broken.is_none() {
            let has_room = self.end.has_room();
            self.messages.note_progress(has_room, 0, clock);
            if !has_room {
                return;
            }
            let message = match self.messages.poll_send() {
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

    /// Sends the last message. If there is no room for it the peer will see that this side has gone.
    fn send_last(&mut self) {
        let mut last = None;
        while let Some(outgoing) = self.messages.poll_send() {
            last = Some(outgoing);
        }
        if let Some(Outgoing::Message(message)) = last {
            let _ = self.end.send(message);
        }
    }

    /// Places the data of a response and makes its message, with which the request ends.
    fn place(&mut self, id: u64, response: &Response) -> Result<Vec<u8>, Violation> {
        let (header, region) = self.messages.finish(id, response);
        let data = response.data.as_ref().map_or(&[][..], |d| d.bytes());
        // Memory that the peer named and did not expose is its fault.
        if !data.is_empty() && !self.end.place(region, data) && !self.end.has_lost_peer() {
            return Err(Violation::Field);
        }
        let mut message = Vec::new();
        header.encode(&response.body, self.messages.core.crc(), &mut message);
        Ok(message)
    }
}

fn token(owner: u8, id: ConnectionId) -> Token {
    Token { owner, value: u64::from(id.generation) << 32 | u64::from(id.index) }
}

impl ServerTransport for LoopbackServer {
    fn owner(&self) -> u8 {
        self.owner
    }

    fn set_timeouts(&mut self, stall_timeout: Duration, linger: Duration) {
        let policy = Arc::make_mut(&mut self.policy);
        (policy.stall_timeout, policy.linger) = (stall_timeout, linger);
    }

    fn handle(&mut self, reactor: &mut Reactor, event: Event) {
        let value = event.token.value;
        let id =
            ConnectionId { transport: self.owner, index: value as u32, generation: (value >> 32) as u32 };
        let Some(connection) = self.get(id) else { return };
        if let Payload::Timer = event.payload {
            connection.timer = None;
            // It is always read from: there is no other way to hear that its peer has gone.
            match connection.messages.core.on_timer(reactor.clock(), true) {
                Due::Fail(violation) => self.end(reactor, id, CloseReason::Violation(violation)),
                Due::Nothing | Due::Drop => self.set_timer(reactor, id),
            }
            return;
        }
        let file = connection.eventfd.clone();
        self.poll(reactor, id);
        let token = token(self.owner, id);
        if let Some(connection) = self.get(id) {
            connection.readable = reactor.submit(token, Op::Readable { file });
        }
    }

    fn next_event(&mut self) -> Option<ServerEvent> {
        self.events.pop_front()
    }

    fn fetch(&mut self, reactor: &mut Reactor, request: RequestKey, mut slot: Slot, start: usize) {
        let Some(connection) = self.get(request.connection) else { return };
        let fetched = match connection.messages.take_data(request.id) {
            None => return,
            Some(DataSource::Remote(region, len)) => {
                let target = &mut slot.bytes_mut()[start..start + len];
                if connection.end.fetch(region, target) { Ok(len) } else { Err(Violation::Field) }
            }
            Some(DataSource::Inline(data)) => {
                slot.bytes_mut()[start..start + data.len()].copy_from_slice(&data);
                Ok(data.len())
            }
            Some(DataSource::None) => Ok(0),
        };
        match fetched {
            Ok(len) => {
                let event = connection.messages.fetched(request.id, SlotRange { slot, start, len });
                self.events.push_back(event);
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
        connection.messages.respond(request.id, response);
        self.dirty.push(request.connection);
    }

    fn push(&mut self, _reactor: &mut Reactor, id: ConnectionId, push: Push<'_>) -> Result<(), NotPushed> {
        let found = self.connections.get_mut(id.index as usize).filter(|c| c.messages.core.id == id);
        found.ok_or(NotPushed::Closed)?.messages.push(push, &mut self.events)?;
        self.dirty.push(id);
        Ok(())
    }

    fn flush(&mut self, reactor: &mut Reactor) {
        for id in std::mem::take(&mut self.dirty) {
            if let Some(connection) = self.get(id) {
                connection.send(reactor.clock());
                self.set_timer(reactor, id);
            }
        }
    }

    fn close(&mut self, reactor: &mut Reactor, connection: ConnectionId, status: Status, text: &str) {
        let policy = Arc::clone(&self.policy);
        if let Some(found) = self.get(connection) {
            found.messages.say_goaway(&policy, status, text);
            found.send_last();
            self.end(reactor, connection, CloseReason::Local);
        }
    }

    fn reject(&mut self, reactor: &mut Reactor, id: ConnectionId, errno: i32, text: &str) {
        let policy = Arc::clone(&self.policy);
        if let Some(connection) = self.get(id) {
            connection.messages.reject(&policy, errno, text);
            connection.send_last();
            self.end(reactor, id, CloseReason::Rejected);
        }
    }

    fn close_stalled(&mut self, reactor: &mut Reactor, close: bool) {
        let is_stalled = |connection: &Connection| {
            connection.messages.is_stalled(self.policy.stall_timeout, reactor.clock())
        };
        let stalled: Vec<_> = self
            .connections
            .iter()
            .filter(|(_, connection)| close && is_stalled(connection))
            .map(|(_, connection)| connection.messages.core.id)
            .collect();
        for id in stalled {
            self.end(reactor, id, CloseReason::Evicted);
        }
    }

    fn unsent_bytes(&self, id: ConnectionId) -> usize {
        let connection = self.connections.get(id.index as usize).filter(|c| c.messages.core.id == id);
        connection.map_or(0, |connection| connection.messages.unsent_bytes())
    }

    fn is_sending(&self) -> bool {
        self.connections.iter().any(|(_, connection)| connection.messages.has_unsent())
    }

    fn connections(&self) -> usize {
        self.connections.len()
    }
}
