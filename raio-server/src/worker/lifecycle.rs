//! How connections and sessions begin and end at a worker.

use std::net::SocketAddr;

use raio_transport::Violation;
use raio_transport::error::Status;
use raio_transport::handshake::Peer;
use raio_transport::message::SessionId;
use raio_transport::protocol::FileHandle;
use raio_transport::trace::Phase;
use raio_transport::transport::{CloseReason, ConnectionId, ServerTransport};

use tracing::field::display;

use super::connections::Connection;
use super::{Mail, Worker};
use crate::client::Client;
use crate::engine::{self, Closing};
use crate::limits::Excess;
use crate::log::log_client;
use crate::request::State;

impl Worker {
    pub(super) fn opened(&mut self, id: ConnectionId, peer: Peer) {
        let Some(arrival) = self.connections.arriving(id) else { return };
        let address = arrival.peer;
        tracing::debug!(client = address.map(display), name = peer.name, "A client has connected.");
        if !peer.is_control() && id.transport == super::RDMA {
            // It stays where it was accepted. The others were counted when their place was claimed, even if
            // they have ended since.
            self.shared.placement.add(self.index);
        }
        let account = arrival.permit.address();
        let session = match self.sessions.join(&self.shared.sessions, peer.session, &peer.identity, account) {
            Ok(session) => session,
            Err(Excess { text, .. }) => return self.reject(id, address, &peer, &text),
        };
        match self.sessions.attach(session, account) {
            Ok(true) => {
                log_client!(info, address, "sessions that began", name = peer.name, "A session has begun.");
            }
            Ok(false) => {}
            Err(Excess { text, .. }) => {
                self.counters.rejected_connections.add(1);
                self.leave_if_unused(session);
                return self.reject(id, address, &peer, &text);
            }
        }
        let Some(arrival) = self.connections.take_arriving(id) else { return };
        let key = self.connections.open(Connection {
            id,
            arrival,
            session,
            violation: None,
            has_data: !peer.is_control(),
            name: peer.name,
            client: Client::new(self.transport.socket(id)),
        });
        self.admission.open(key, session, address.map(|address| address.ip().to_canonical()));
    }

    /// Rejects a client in its handshake: it has, or there are, as many as there may be.
    fn reject(&mut self, id: ConnectionId, address: Option<SocketAddr>, peer: &Peer, text: &str) {
        if !peer.is_control() {
            self.shared.placement.release(self.index);
        }
        log_client!(
            info,
            address,
            "clients that were rejected",
            name = peer.name,
            "A client was rejected. {text}"
        );
        self.transport.reject(&mut self.reactor, id, libc::EUSERS, text);
    }

    pub(super) fn closed(&mut self, id: ConnectionId, reason: &CloseReason) {
        let Some(key) = self.connections.key(id) else {
            let peer = self.connections.take_arriving(id).and_then(|arrival| arrival.peer);
            self.counters.close_reason(reason);
            if let CloseReason::Violation(violation) = reason {
                log_client!(warn, peer, violation.name(), "A client's handshake failed: {violation}.");
            }
            return;
        };
        while let Some(request) = self.requests.oldest(key) {
            if self.tracer.is_on() {
                let (name, opcode) = (self.requests[request].key, self.requests[request].opcode);
                self.trace(name, Phase::Point, "lost", 0);
                self.trace(name, Phase::End, opcode.operation().name, 0);
            }
            if self.counts_requests {
                self.uncount_request(key, &self.requests[request].work);
            }
            if self.requests[request].state == State::Executing && self.take_back(request).is_none() {
                // The kernel may have its memory: it runs to its end, which is near if it has not begun.
                self.requests.detach(request);
                self.cancel_operation(request);
            } else {
                self.end_request(request);
            }
        }
        self.admission.close(key);
        let connection = self.connections.close(key);
        let peer = connection.peer();
        if connection.has_data {
            self.shared.placement.release(self.index);
        }
        let violation = connection.violation.or(match reason {
            CloseReason::Violation(violation) => Some(*violation),
            _ => None,
        });
        match violation {
            Some(violation) => {
                self.counters.close(violation.name());
                log_client!(
                    warn,
                    peer,
                    violation.name(),
                    name = connection.name,
                    "A client broke the protocol and was closed: {violation}."
                );
            }
            None => {
                self.counters.close_reason(reason);
                let policy = &self.shared.policy;
                match reason {
                    CloseReason::Unreachable => log_client!(
                        warn,
                        peer,
                        "clients that became unreachable",
                        name = connection.name,
                        "A client's connection was closed: for {:?} nothing has come from its host, \
                         although TCP tried again and again. The host, or the network to it, has failed.",
                        policy.unreachable_timeout
                    ),
                    CloseReason::Evicted => log_client!(
                        warn,
                        peer,
                        "connections closed for memory",
                        name = connection.name,
                        "A client's connection was closed: for {:?} it took no responses, or did not go on \
                         with a message, while others waited for the memory that it held. Raise --memory if \
                         such clients are welcome.",
                        policy.stall_timeout
                    ),
                    _ => {}
                }
            }
        }
        let client = peer.map(display);
        tracing::debug!(
            client,
            name = connection.name,
            reason = reason.name(),
            "A client's connection has ended."
        );
        self.sessions.detach(connection.session);
        if self.leave_if_unused(connection.session) {
            log_client!(info, peer, "sessions that ended", name = connection.name, "A session has ended.");
        }
    }

    /// Leaves a session that has no connections here any more. Whether it has none.
    fn leave_if_unused(&mut self, session: usize) -> bool {
        let Some(closed) = self.sessions.leave_if_unused(&self.shared.sessions, session) else {
            return false;
        };
        for (file, permit) in closed {
            let completer = self.engine.completions().completer(engine::DETACHED);
            file.volume.close(Closing::new(completer, permit));
            self.closing += 1;
        }
        true
    }

    /// Ends a connection whose client broke raio's protocol.
    pub(super) fn violate(&mut self, connection: usize, violation: Violation) {
        let Connection { id, violation: noted, .. } = &mut self.connections[connection];
        *noted = Some(violation);
        let status = Status::protocol(violation.errno());
        self.transport.close(&mut self.reactor, *id, status, &format!("{violation}."));
    }

    /// Makes the other workers drop their views of a file that was closed.
    pub(super) fn tell_others(&self, session: SessionId, handle: FileHandle) {
        for (index, senders) in self.shared.workers.get().into_iter().flatten().enumerate() {
            if index != self.index {
                senders.mailbox.send(Mail::Forget { session, handle });
            }
        }
    }
}
