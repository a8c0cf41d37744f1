//! Connections, their sessions and their open files, as one worker has them.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use raio_transport::error::Status;
use raio_transport::handshake::Peer;
use raio_transport::message::SessionId;
use raio_transport::protocol::FileHandle;
use raio_transport::transport::{CloseReason, ConnectionId, ServerTransport};
use raio_transport::{Violation, mux};

use tracing::field::display;

use super::{Mail, Worker};
use crate::client::Client;
use crate::engine::{self, Closing};
use crate::limits::{AddressAccount, Excess};
use crate::log;
use crate::request::{State, WorkerFile};
use crate::session::{Session, index_of};

/// Logs a line about a client, unless there were too many of the kind about its address.
macro_rules! log_client {
    ($level:ident, $peer:expr, $kind:expr, $($line:tt)*) => {
        if log::permit($peer.map(|peer| peer.ip()), $kind) {
            tracing::$level!(client = $peer.map(display), $($line)*);
        }
    };
}

pub(super) use log_client;

/// A connection that has finished its handshake.
pub(super) struct Connection {
    pub(super) id: ConnectionId,
    pub(super) session: usize,
    /// Its requests that are not yet answered, oldest first. Most are answered in order, so looking for one
    /// from the front is short.
    pub(super) requests: VecDeque<usize>,
    /// What all workers count for its address.
    pub(super) account: AddressAccount,
    /// What it did wrong: it is closing.
    pub(super) violation: Option<Violation>,
    /// It is counted in [`crate::placement`].
    pub(super) has_data: bool,
    pub(super) name: String,
    /// Where it is.
    pub(super) peer: Option<SocketAddr>,
    /// What waits in lanes on its behalf is cancelled once this has gone.
    pub(super) client: Arc<Client>,
}

/// A session that has connections here.
pub(super) struct LocalSession {
    pub(super) session: Arc<Session>,
    pub(super) connections: usize,
    /// This worker's view of the files, by the index in their handles.
    pub(super) files: Vec<Option<Rc<WorkerFile>>>,
}

impl Worker {
    pub(super) fn connection(&self, id: ConnectionId) -> Option<usize> {
        let key = (*self.by_transport.get(id.index as usize)?)?;
        (self.connections[key].id == id).then_some(key)
    }

    pub(super) fn opened(&mut self, id: ConnectionId, peer: Peer) {
        let address = self.peers.get(&id).copied();
        tracing::debug!(client = address.map(display), name = peer.name, "A client has connected.");
        if !peer.control && mux::Server::is_by_rdma_cm(id) {
            // It stays where it was accepted. The others were counted when their place was claimed, even if
            // they have ended since.
            self.shared.placement.add(self.index);
        }
        let account = self.permits.get(&id).and_then(|permit| permit.address().clone());
        let session = match self.sessions_by_id.get(&peer.session) {
            Some(&key) => key,
            None => {
                let session = match self.shared.sessions.join(peer.session, &account) {
                    Ok(session) => session,
                    Err(Excess { text, .. }) => return self.reject(id, address, &peer, &text),
                };
                let key = self.sessions.insert(LocalSession { session, connections: 0, files: Vec::new() });
                self.sessions_by_id.insert(peer.session, key);
                key
            }
        };
        if let Err(Excess { text, .. }) = self.sessions[session].session.attach(&account) {
            self.counters.rejected_connections.add(1);
            if self.sessions[session].connections == 0 {
                self.end_session(session);
            }
            return self.reject(id, address, &peer, &text);
        }
        if self.sessions[session].connections == 0 {
            log_client!(info, address, "sessions that began", name = peer.name, "A session has begun.");
        }
        self.sessions[session].connections += 1;
        let key = self.connections.insert(Connection {
            id,
            session,
            requests: VecDeque::new(),
            account,
            violation: None,
            has_data: !peer.control,
            name: peer.name,
            peer: address,
            client: Client::new(self.transport.socket(id)),
        });
        self.admission.open(key, session, address.map(|address| address.ip().to_canonical()));
        let by_index = &mut self.by_transport;
        let index = id.index as usize;
        if by_index.len() <= index {
            by_index.resize(index + 1, None);
        }
        by_index[index] = Some(key);
    }

    /// Rejects a client in its handshake: it has, or there are, as many as there may be.
    fn reject(&mut self, id: ConnectionId, address: Option<SocketAddr>, peer: &Peer, text: &str) {
        if !peer.control {
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
        self.permits.remove(&id);
        let peer = self.peers.remove(&id);
        let Some(key) = self.connection(id) else {
            self.counters.close_reason(reason);
            if let CloseReason::Violation(violation) = reason {
                log_client!(warn, peer, violation.name(), "A client's handshake failed: {violation}.");
            }
            return;
        };
        self.by_transport[id.index as usize] = None;
        if self.counts_requests {
            for &request in &self.connections[key].requests {
                self.uncount_request(key, &self.requests[request].work);
            }
        }
        let connection = self.connections.remove(key);
        if connection.has_data {
            self.shared.placement.release(self.index);
        }
        for &request in &connection.requests {
            if self.requests[request].state == State::Executing && self.take_back(request).is_none() {
                // The kernel may have its memory: it runs to its end, which is near if it has not begun.
                self.requests[request].connection = None;
                self.cancel_operation(request);
            } else {
                self.remove_request(request);
            }
        }
        self.admission.close(key);
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
                        "A client's connection was closed: for {:?} or longer nothing has come from its host, although TCP tried \
                         again and again. The host, or the network to it, has failed.",
                        policy.unreachable_timeout
                    ),
                    CloseReason::Evicted => log_client!(
                        warn,
                        peer,
                        "connections closed for memory",
                        name = connection.name,
                        "A client's connection was closed: for {:?} it took no responses, or did not go on with a message, while \
                         others waited for the memory that it held. Raise --memory if such clients are welcome.",
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
        if self.leave(connection.session) {
            log_client!(info, peer, "sessions that ended", name = connection.name, "A session has ended.");
        }
    }

    /// A connection of this session has gone. Whether it was the last that this worker had.
    fn leave(&mut self, key: usize) -> bool {
        let local = &mut self.sessions[key];
        local.session.detach();
        local.connections -= 1;
        let is_last = local.connections == 0;
        if is_last {
            self.end_session(key);
        }
        is_last
    }

    /// The last connection of this session here has gone.
    fn end_session(&mut self, key: usize) {
        let LocalSession { session, files, .. } = self.sessions.remove(key);
        self.sessions_by_id.remove(&session.id);
        drop(files);
        for (file, permit) in self.shared.sessions.leave(&session) {
            let completer = self.engine.completions().completer(engine::DETACHED);
            file.volume.close(Closing::new(completer, permit));
            self.closing += 1;
        }
    }

    /// Ends a connection whose client broke raio's protocol.
    pub(super) fn violate(&mut self, connection: usize, violation: Violation) {
        let Connection { id, violation: noted, .. } = &mut self.connections[connection];
        *noted = Some(violation);
        let status = Status::protocol(violation.errno());
        self.transport.close(&mut self.reactor, *id, status, &format!("{violation}."));
    }

    // Files
    // ------------------------------------------------------------------------------------------------------------

    /// The file with this handle in the session of this connection.
    pub(super) fn file(&mut self, connection: usize, handle: FileHandle) -> Option<Rc<WorkerFile>> {
        let session = self.connections[connection].session;
        let local = &self.sessions[session];
        if let Some(Some(file)) = local.files.get(index_of(handle))
            && file.handle == handle
            && !file.open.is_closed()
        {
            return Some(Rc::clone(file));
        }
        let open = local.session.get(handle)?;
        Some(self.remember(session, WorkerFile::new(handle, open)))
    }

    /// Keeps this worker's view of a file.
    pub(super) fn remember(&mut self, session: usize, file: WorkerFile) -> Rc<WorkerFile> {
        let files = &mut self.sessions[session].files;
        let index = index_of(file.handle);
        if files.len() <= index {
            files.resize(index + 1, None);
        }
        let file = Rc::new(file);
        files[index] = Some(Rc::clone(&file));
        file
    }

    /// Drops this worker's view of a file that was closed.
    pub(super) fn forget(&mut self, session: usize, handle: FileHandle) {
        if let Some(file) = self.sessions[session].files.get_mut(index_of(handle))
            && file.as_ref().is_some_and(|file| file.handle == handle)
        {
            *file = None;
        }
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
