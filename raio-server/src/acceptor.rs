//! TLS handshakes of accepted connections, where clients must have keys. They are done in a thread of their
//! own, because one costs more than a worker may spend on a connection. Connections whose client has proven
//! an accepted key go on to a worker.
//!
//! The number of handshakes in progress and the time of each are limited. If there are too many, the oldest
//! one of the address that has most is closed, so a client that begins many does not keep others out.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Instant;

use anyhow::Context;
use raio_transport::connecting::Connecting;
use raio_transport::error::Error;
use raio_transport::handshake::{Identity, Policy};
use raio_transport::keys::PublicKey;
use raio_transport::reactor;
use raio_transport::tcp::Accepting;
use raio_transport::tls::ServerTls;
use raio_transport::transport::AcceptedStream;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::audit::{Audit, Who};
use crate::keys::Keys;
use crate::limits::ConnectionPermit;
use crate::log::log_client;
use crate::peer::{Origin, PeerAddress};
use crate::tuning::acceptor::{DEADLINE, HANDSHAKES_MAX};

/// What becomes of the connections that were accepted.
#[derive(Debug)]
pub enum Handshaken {
    /// The client of this one has proven an accepted key.
    Secured(Connection),
    /// There are no more: the acceptor was told to finish.
    Finished,
}

/// An accepted connection, before and after its handshake.
#[derive(Debug)]
pub struct Connection {
    /// Its stream.
    pub stream: AcceptedStream,
    /// Where its client is, if that is known.
    pub peer: Option<PeerAddress>,
    /// Counts it.
    pub permit: Arc<ConnectionPermit>,
}

/// The thread for handshakes.
#[derive(Debug)]
pub struct TlsAcceptor {
    /// None: it is to end.
    accepted: Option<Sender<Connection>>,
    /// Wakes the thread.
    waker: Arc<OwnedFd>,
}

impl TlsAcceptor {
    /// Starts the thread, which sends connections to `secured` once their client has proven an accepted key.
    /// The kernel seals and opens their records if it is to (`is_in_kernel`). It ends when it was told to
    /// finish, or this is dropped, and no handshake is in progress.
    pub fn start(
        keys: Arc<Keys>,
        is_in_kernel: bool,
        policy: Arc<Policy>,
        audit: Option<Arc<Audit>>,
        secured: reactor::Sender<Handshaken>,
    ) -> anyhow::Result<Self> {
        let cannot = "Cannot start a thread for handshakes";
        let accepts = {
            let keys = Arc::clone(&keys);
            move |key: &PublicKey| keys.client(&Identity::Key(*key)).is_some()
        };
        let waker = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context(cannot)?);
        let (sender, accepted) = channel();
        let tls = ServerTls::new(keys.host(), accepts);
        let handshakes = Handshakes {
            tls: if is_in_kernel { tls.in_kernel() } else { tls },
            keys,
            policy,
            audit,
            accepted,
            secured,
            pending: Vec::new(),
            is_finishing: false,
        };
        let woken = Arc::clone(&waker);
        std::thread::Builder::new()
            .name("raio-tls".into())
            .spawn(move || handshakes.run(&woken))
            .context(cannot)?;
        Ok(Self { accepted: Some(sender), waker })
    }

    /// Begins the handshake of a connection.
    pub fn begin(&self, connection: Connection) {
        if let Some(sender) = &self.accepted
            && sender.send(connection).is_err()
        {
            tracing::error!(
                name: "handshakes-failed",
                "The thread for handshakes has failed; see above. Start the server anew."
            );
        }
        self.wake();
    }

    /// No more connections come: when those that have come have shaken hands, or not in time, that is said
    /// with [`Handshaken::Finished`].
    pub fn finish(&mut self) {
        self.accepted = None;
        self.wake();
    }

    fn wake(&self) {
        let _ = rustix::io::write(&*self.waker, &1_u64.to_ne_bytes());
    }
}

impl Drop for TlsAcceptor {
    fn drop(&mut self) {
        self.finish();
    }
}

/// A connection in its handshake.
struct Pending {
    accepting: Accepting,
    peer: Option<PeerAddress>,
    permit: Arc<ConnectionPermit>,
}

impl Pending {
    fn address(&self) -> Option<Origin> {
        self.peer.map(PeerAddress::origin)
    }
}

/// What the thread has.
struct Handshakes {
    tls: ServerTls,
    keys: Arc<Keys>,
    policy: Arc<Policy>,
    audit: Option<Arc<Audit>>,
    accepted: Receiver<Connection>,
    secured: reactor::Sender<Handshaken>,
    /// The oldest first.
    pending: Vec<Pending>,
    /// No more come.
    is_finishing: bool,
}

impl Handshakes {
    fn run(mut self, waker: &OwnedFd) {
        // Which of them to step: those that have come, and those that can go on.
        let mut ready: Vec<bool> = Vec::new();
        loop {
            while !self.is_finishing {
                match self.accepted.try_recv() {
                    Ok(connection) => self.begin(connection, &mut ready),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => self.is_finishing = true,
                }
            }
            self.step(&ready);
            if self.is_finishing && self.pending.is_empty() {
                return self.secured.send(Handshaken::Finished);
            }
            ready = self.wait(waker);
        }
    }

    fn begin(&mut self, connection: Connection, ready: &mut Vec<bool>) {
        let Connection { stream, peer, permit } = connection;
        let deadline = Instant::now() + DEADLINE;
        match Accepting::new(stream, &self.tls, Arc::clone(&self.policy), deadline) {
            Ok(accepting) => {
                if self.pending.len() >= HANDSHAKES_MAX {
                    let addresses: Vec<_> = self.pending.iter().map(Pending::address).collect();
                    let at = oldest_of_address_with_most(&addresses);
                    let evicted = self.pending.remove(at);
                    ready.remove(at);
                    let text = "Too many connections are in their handshake.";
                    log_client!(
                        info,
                        evicted.peer,
                        "handshake-evicted",
                        "A client was rejected, to make room for a newer one. {text}"
                    );
                    if let Some(audit) = &self.audit {
                        audit.rejected(Who::default().at(evicted.peer), libc::EUSERS, text);
                    }
                }
                self.pending.push(Pending { accepting, peer, permit });
                ready.push(true);
            }
            Err(error) => self.reject(peer, &error),
        }
    }

    /// Goes on with those that are ready, or whose time has come.
    fn step(&mut self, ready: &[bool]) {
        let now = Instant::now();
        for (mut pending, &is_ready) in std::mem::take(&mut self.pending).into_iter().zip(ready) {
            let is_due = is_ready || now >= pending.accepting.step_by();
            match is_due.then(|| pending.accepting.step(now)).flatten() {
                None => self.pending.push(pending),
                Some(Ok(stream)) => self.pass_on(stream, pending.peer, pending.permit),
                Some(Err(error)) => self.reject(pending.peer, &error),
            }
        }
    }

    fn pass_on(&self, stream: AcceptedStream, peer: Option<PeerAddress>, permit: Arc<ConnectionPermit>) {
        let client = self.keys.client(stream.identity());
        // It has been accepted a moment ago, but its key may have expired since.
        let Some(client) = client else { return };
        tracing::debug!(client = client.name, peer = peer.map(tracing::field::display), "A client is known.");
        let stream = if client.may_use_rdma { stream } else { stream.without_rdma() };
        self.secured.send(Handshaken::Secured(Connection { stream, peer, permit }));
    }

    fn reject(&self, peer: Option<PeerAddress>, error: &Error) {
        let hint = match error.errno() {
            libc::EKEYREJECTED => " If it may connect, add the key to clients.toml, and send SIGHUP.",
            _ => "",
        };
        log_client!(info, peer, "handshake-rejected", "A client was rejected: {error}.{hint}");
        if let Some(audit) = &self.audit {
            audit.rejected(Who::default().at(peer), error.errno(), error.to_string());
        }
    }

    /// Sleeps until there is something to do. Returns which handshakes can go on.
    fn wait(&mut self, waker: &OwnedFd) -> Vec<bool> {
        let now = Instant::now();
        let by = self.pending.iter().map(|pending| pending.accepting.step_by()).min();
        let timeout = by.map(|by| by.saturating_duration_since(now));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut fds = vec![PollFd::new(waker, PollFlags::IN)];
        // A stream has one descriptor.
        fds.extend(self.pending.iter_mut().map(|pending| pending.accepting.awaited().remove(0).poll_fd()));
        let polled = poll(&mut fds, timeout.as_ref());
        debug_assert!(matches!(polled, Ok(_) | Err(Errno::INTR | Errno::NOMEM)), "{polled:?}");
        let mut count = [0; 8];
        let _ = rustix::io::read(waker.as_fd(), &mut count);
        fds[1..].iter().map(|fd| !fd.revents().is_empty()).collect()
    }
}

/// Of connections with these addresses, oldest first: the first one of the address that has most.
fn oldest_of_address_with_most(addresses: &[Option<Origin>]) -> usize {
    let mut counts: HashMap<Option<Origin>, usize> = HashMap::new();
    for &address in addresses {
        *counts.entry(address).or_default() += 1;
    }
    let most = counts.values().copied().max().unwrap_or(0);
    addresses.iter().position(|address| counts[address] == most).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_with_most_handshakes_loses_its_oldest() {
        let [one, two] = [1, 2].map(|uid| Some(Origin::User(uid)));
        assert_eq!(oldest_of_address_with_most(&[one, two, two, one, two]), 1);
        assert_eq!(oldest_of_address_with_most(&[two, one, None, one]), 1);
        assert_eq!(oldest_of_address_with_most(&[one, two]), 0);
    }
}
