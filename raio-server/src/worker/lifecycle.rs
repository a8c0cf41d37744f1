//! How connections and sessions begin and end at a worker.

use std::sync::Arc;
use std::time::Duration;

use raio_transport::Violation;
use raio_transport::error::Status;
use raio_transport::handshake::{Identity, Peer};
use raio_transport::message::SessionId;
use raio_transport::protocol::FileHandle;
use raio_transport::trace::Phase;
use raio_transport::transport::{CloseReason, ConnectionId, ServerTransport};

use tracing::field::display;

use super::connections::{Connection, Fencing, Standing};
use super::fence::{KILLED, Orphan};
use super::{Mail, Medium, Quirk, SlowEnd, TIMER, Worker};
use crate::audit::{Event, Who};
use crate::client::Client;
use crate::keys::Rights;
use crate::limits::Excess;
use crate::log::log_client;
use crate::peer::PeerAddress;
use crate::request::{Request, State};
use crate::sessions::{ConnectionName, Joined, NotJoined, Remains};
use crate::tuning::drain::GRACE_OF_SILENT;

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
        let rights = self.shared.rights(&peer.identity);
        if rights == Rights::None {
            let text = match peer.identity {
                Identity::User(_) => {
                    "This user is no client of the server's. If it may connect, add it to clients.toml."
                }
                _ => "This client's key is not accepted any more.",
            };
            return self.reject(id, address, &peer, libc::EKEYREJECTED, text);
        }
        let account = arrival.permit.address().clone();
        self.joined += 1;
        let name =
            ConnectionName { worker: self.index, key: self.connections.next_key(), serial: self.joined };
        let now = self.reactor.clock().now();
        let (joined, effects) = self.shared.sessions.join(&peer, &account, name, now);
        let superseded = effects.superseded;
        if superseded > 0 {
            log_client!(
                info,
                address,
                "sessions that were given up",
                name = peer.name,
                "A client has given up {superseded} sessions for another one, which begins when they are \
                 over."
            );
        }
        self.carry_out(effects);
        let Joined { member, is_new, outcomes, fence } = match joined {
            Ok(joined) => joined,
            Err(NotJoined::Excess(Excess { text, .. })) => {
                return self.reject(id, address, &peer, libc::EUSERS, &text);
            }
            Err(NotJoined::Stale(text)) => return self.reject(id, address, &peer, libc::ESTALE, &text),
            Err(NotJoined::Killed) => return self.reject(id, address, &peer, libc::ECONNABORTED, KILLED),
        };
        member.session.assign(rights.limits());
        member.session.activity.came(address, now);
        let counted = rights.limits().map(|(client, _)| {
            let begin = || self.shared.clients.begin_session(client);
            Arc::clone(member.session.count_with(begin).client())
        });
        let session = match self.sessions.attach(&member.session, &account) {
            Ok(session) => session,
            Err(Excess { who, text }) => {
                self.counters.rejected_connections[who as usize].add(1);
                // Nobody comes back to a session that has not begun.
                let linger = if is_new { Duration::ZERO } else { peer.grant.linger };
                let remains = Remains { outcomes, fence, executing: 0, linger };
                let effects = self.shared.sessions.ended(&member, remains, now);
                self.carry_out(effects);
                return self.reject(id, address, &peer, libc::EUSERS, &text);
            }
        };
        if is_new {
            log_client!(info, address, "sessions that began", name = peer.name, "A session has begun.");
        }
        let Some(arrival) = self.connections.take_arriving(id) else { return };
        let who = self.shared.audit.as_ref().map(|audit| {
            let who = Arc::new(self.who(&peer, address));
            audit.record(&who, Event::Connect);
            who
        });
        let counters = Arc::clone(&self.sessions[session].counters);
        counters.connected(medium(id, address));
        let key = self.connections.open(Connection {
            id,
            arrival,
            session,
            member,
            counters,
            standing: if fence.is_some() { Standing::Waiting } else { Standing::Settled },
            fencing: fence.map(|fence| Box::new(Fencing::new(fence))),
            outcomes,
            knows_earlier: true,
            grace_until: now + GRACE_OF_SILENT,
            has_asked: false,
            linger: peer.grant.linger,
            queue_depth: peer.grant.queue_depth,
            features: peer.grant.features,
            has_data: !peer.is_control(),
            name: peer.name,
            who,
            counted,
            client: Client::new(self.transport.socket(id)),
        });
        if let Some(drain) = &mut self.drain {
            // It hears of the end, too.
            drain.goaway_deadline = None;
            self.reactor.timer(now + GRACE_OF_SILENT, TIMER);
        }
        self.admission.open(key, session, address.map(PeerAddress::origin));
        if let Some((client, bytes)) = self.sessions[session].session.client_memory() {
            self.admission.limit_client(key, client, bytes);
        }
    }

    /// A connection has moved to another transport.
    pub(super) fn moved(&mut self, from: ConnectionId, to: ConnectionId) {
        self.connections.on_moved(from, to);
        if let Some(connection) = self.connections.key(to).map(|key| &self.connections[key]) {
            connection.counters.disconnected(medium(from, connection.peer()));
            connection.counters.connected(medium(to, connection.peer()));
        }
    }

    /// Who the client is to the audit log.
    fn who(&self, peer: &Peer, address: Option<PeerAddress>) -> Who {
        let who = Who::new(self.shared.keys.as_deref(), &peer.identity);
        who.at(address).with_session(&peer.name, peer.session)
    }

    /// Rejects a client in its handshake: there are as many as there may be, or a newer connection has come.
    fn reject(
        &mut self,
        id: ConnectionId,
        address: Option<PeerAddress>,
        peer: &Peer,
        errno: i32,
        text: &str,
    ) {
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
        if let Some(audit) = &self.shared.audit {
            audit.rejected(self.who(peer, address), errno, text);
        }
        self.transport.reject(&mut self.reactor, id, errno, text);
    }

    pub(super) fn closed(&mut self, id: ConnectionId, reason: &CloseReason) {
        let Some(key) = self.connections.key(id) else {
            let peer = self.connections.take_arriving(id).and_then(|arrival| arrival.peer);
            self.counters.close_reason(reason);
            if let CloseReason::Violation(violation) = reason {
                log_client!(warn, peer, violation.name(), "A client's handshake failed: {violation}.");
                if let Some(audit) = &self.shared.audit {
                    audit.rejected(Who::default().at(peer), violation.errno(), format!("{violation}."));
                }
            }
            return;
        };
        let mut executing = 0;
        while let Some(request) = self.requests.oldest(key) {
            if self.tracer.is_on() {
                let (name, opcode) = (self.requests[request].key, self.requests[request].opcode);
                self.trace(name, Phase::Point, "lost", 0);
                self.trace(name, Phase::End, opcode.operation().name, 0);
            }
            if self.counts_requests {
                self.uncount_request(key, &self.requests[request].work);
            }
            self.note_if_slow(request, SlowEnd::Lost, None);
            self.connections[key].counters.ended();
            if self.requests[request].state == State::Executing && self.take_back(request).is_none() {
                // The kernel may have its memory: it runs to its end, which is near if it has not begun.
                self.requests.detach(request);
                if self.requests[request].work.is_recorded() && !self.has_quirk(Quirk::ForgetsOrphans) {
                    executing += 1;
                    let Connection { member, arrival, .. } = &self.connections[key];
                    let account = arrival.permit.address().clone();
                    let member = member.clone();
                    let changes = self.requests[request].work.changes();
                    let guarded =
                        changes.map(|(object, range)| self.shared.orphan_guard.enter(object, range));
                    self.orphans.insert(request, Orphan { member, account, guarded });
                }
                self.cancel_operation(request);
            } else {
                self.take_waiting(request);
                // A copy that waits for a rate between two pieces has ended, and the client asks how.
                if let Some(answer) = self.requests[request].work.partly_done() {
                    let id = self.requests[request].key.id;
                    self.record_outcome(key, id, false, &answer);
                    let Request { opcode, work, .. } = &self.requests[request];
                    self.count_work(Some(key), *opcode, work, answer.status, answer.result);
                }
                self.end_request(request);
            }
        }
        self.admission.close(key);
        let mut connection = self.connections.close(key);
        let peer = connection.peer();
        connection.counters.disconnected(medium(connection.id, peer));
        if let (Some(audit), Some(who)) = (&self.shared.audit, &connection.who) {
            audit.record(who, Event::Disconnect { reason: reason.name() });
        }
        if connection.has_data {
            self.shared.placement.release(self.index);
        }
        let violation = match (connection.standing, reason) {
            (Standing::Closing(Some(noted)), _) => Some(noted),
            (_, CloseReason::Violation(violation)) => Some(*violation),
            _ => None,
        };
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
                        self.settings.stall_timeout
                    ),
                    CloseReason::KeyUsedUp => log_client!(
                        info,
                        peer,
                        "connections closed for their keys",
                        name = connection.name,
                        "A client's connection was closed: its keys have been used for as many records as \
                         they may be, and the kernel, which seals them (--ktls), cannot change them. The \
                         client goes on over another one."
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
        let remains = Remains {
            outcomes: connection.outcomes.take(),
            fence: connection.fencing.take().map(|fencing| fencing.fence),
            executing,
            linger: if *reason == CloseReason::Goaway { Duration::ZERO } else { connection.linger },
        };
        let now = self.reactor.clock().now();
        let effects = self.shared.sessions.ended(&connection.member, remains, now);
        let (ended, is_kept) = (effects.ended.len(), effects.is_kept);
        self.carry_out(effects);
        // A server that stops keeps nothing.
        if is_kept && self.drain.is_none() {
            log_client!(
                info,
                peer,
                "connections that were lost",
                name = connection.name,
                reason = reason.name(),
                "A client's connection was lost. Its channel is kept for {:?}.",
                connection.linger
            );
        }
        if ended > 0 {
            log_client!(info, peer, "sessions that ended", name = connection.name, "A session has ended.");
        }
    }

    /// Ends a connection whose client broke raio's protocol.
    pub(super) fn violate(&mut self, connection: usize, violation: Violation) {
        let Connection { id, standing, .. } = &mut self.connections[connection];
        *standing = Standing::Closing(Some(violation));
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

/// How a connection with this name reaches the server.
fn medium(id: ConnectionId, peer: Option<PeerAddress>) -> Medium {
    match peer {
        _ if id.transport == super::RDMA => Medium::Rdma,
        Some(PeerAddress::User(_)) => Medium::Unix,
        _ => Medium::Tcp,
    }
}
