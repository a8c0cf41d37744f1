//! The door: connections come through it when clients must have keys. A thread of its own shakes hands with
//! them, for that costs more than a worker may spend on one, and gives those on that have shown a key which
//! is accepted.
//!
//! Only so many are in the door at a time, each for a few seconds. If it is full, the one that has been in it
//! longest goes, of the address that has most: who keeps it full keeps nobody else out.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Instant;

use anyhow::Context;
use raio_transport::connecting::{Awaited, Connecting};
use raio_transport::error::Error;
use raio_transport::handshake::{Identity, Policy};
use raio_transport::reactor;
use raio_transport::tcp::Accepting;
use raio_transport::tls::ServerTls;
use raio_transport::transport::AcceptedStream;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::keys::Keys;
use crate::limits::ConnectionPermit;
use crate::log::log_client;
use crate::tuning::door::{DEADLINE, IN_DOOR_MAX};

/// A connection that was accepted.
#[derive(Debug)]
pub struct Arrived {
    /// Its stream.
    pub stream: AcceptedStream,
    /// Where its client is, if that is an IP address.
    pub peer: Option<SocketAddr>,
    /// Counts it.
    pub permit: Arc<ConnectionPermit>,
}

/// A connection whose client has shown its key.
#[derive(Debug)]
pub struct Admitted {
    /// Its stream.
    pub stream: AcceptedStream,
    /// Where its client is, if that is an IP address.
    pub peer: Option<SocketAddr>,
    /// Counts it.
    pub permit: Arc<ConnectionPermit>,
}

/// The way in.
#[derive(Debug)]
pub struct Door {
    arrived: Option<Sender<Arrived>>,
    /// Wakes the thread.
    waker: Arc<OwnedFd>,
}

impl Door {
    /// Starts the thread, which gives those on that are admitted. It ends when this is dropped.
    pub fn start(
        keys: Arc<Keys>,
        policy: Arc<Policy>,
        admitted: reactor::Sender<Admitted>,
    ) -> anyhow::Result<Self> {
        let cannot = "Cannot start a thread for handshakes";
        let accepts = {
            let keys = Arc::clone(&keys);
            move |key: &_| keys.client(key).is_some()
        };
        let waker = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context(cannot)?);
        let (sender, arrived) = channel();
        let inside = Inside {
            tls: ServerTls::new(keys.host(), accepts),
            keys,
            policy,
            arrived,
            admitted,
            guests: Vec::new(),
        };
        let woken = Arc::clone(&waker);
        std::thread::Builder::new()
            .name("raio-door".into())
            .spawn(move || inside.run(&woken))
            .context(cannot)?;
        Ok(Self { arrived: Some(sender), waker })
    }

    /// Lets a connection in.
    pub fn let_in(&self, arrived: Arrived) {
        if let Some(sender) = &self.arrived
            && sender.send(arrived).is_err()
        {
            tracing::error!("The thread for handshakes has failed; see above. Start the server anew.");
        }
        self.wake();
    }

    fn wake(&self) {
        let _ = rustix::io::write(&*self.waker, &1_u64.to_ne_bytes());
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.arrived = None;
        self.wake();
    }
}

/// A connection in the door.
struct Guest {
    accepting: Accepting,
    peer: Option<SocketAddr>,
    permit: Arc<ConnectionPermit>,
}

impl Guest {
    fn address(&self) -> Option<IpAddr> {
        self.peer.map(|peer| peer.ip().to_canonical())
    }
}

/// What the thread has.
struct Inside {
    tls: ServerTls,
    keys: Arc<Keys>,
    policy: Arc<Policy>,
    arrived: Receiver<Arrived>,
    admitted: reactor::Sender<Admitted>,
    /// The oldest first.
    guests: Vec<Guest>,
}

impl Inside {
    fn run(mut self, waker: &OwnedFd) {
        // Which of them to step: those that have come, and those that can go on.
        let mut ready: Vec<bool> = Vec::new();
        loop {
            loop {
                match self.arrived.try_recv() {
                    Ok(arrived) => self.take_in(arrived, &mut ready),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            self.step(&ready);
            ready = self.wait(waker);
        }
    }

    fn take_in(&mut self, arrived: Arrived, ready: &mut Vec<bool>) {
        let Arrived { stream, peer, permit } = arrived;
        let deadline = Instant::now() + DEADLINE;
        match Accepting::new(stream, &self.tls, Arc::clone(&self.policy), deadline) {
            Ok(accepting) => {
                if self.guests.len() >= IN_DOOR_MAX {
                    let at = one_of_most(&self.guests.iter().map(Guest::address).collect::<Vec<_>>());
                    let guest = self.guests.remove(at);
                    ready.remove(at);
                    log_client!(
                        info,
                        guest.peer,
                        "handshakes that were given up",
                        "A client was rejected: too many connections are in their handshake."
                    );
                }
                self.guests.push(Guest { accepting, peer, permit });
                ready.push(true);
            }
            Err(error) => self.reject(peer, &error),
        }
    }

    /// Goes on with those that are ready, or whose time has come.
    fn step(&mut self, ready: &[bool]) {
        let now = Instant::now();
        let guests = std::mem::take(&mut self.guests);
        for (mut guest, &is_ready) in guests.into_iter().zip(ready) {
            let outcome =
                if is_ready || now >= guest.accepting.step_by() { guest.accepting.step(now) } else { None };
            match outcome {
                None => self.guests.push(guest),
                Some(Ok(stream)) => self.admit(stream, guest.peer, guest.permit),
                Some(Err(error)) => self.reject(guest.peer, &error),
            }
        }
    }

    fn admit(&self, stream: AcceptedStream, peer: Option<SocketAddr>, permit: Arc<ConnectionPermit>) {
        let client = match stream.identity() {
            Identity::Key(key) => self.keys.client(&key),
            Identity::Anonymous => None,
        };
        // It has been accepted a moment ago, but its key may have expired since.
        let Some(client) = client else { return };
        tracing::debug!(client = client.name, peer = peer.map(tracing::field::display), "A client is known.");
        let stream = if client.may_use_rdma { stream } else { stream.without_rdma() };
        self.admitted.send(Admitted { stream, peer, permit });
    }

    fn reject(&self, peer: Option<SocketAddr>, error: &Error) {
        let hint = match error.errno() {
            libc::EKEYREJECTED => " If it may connect, add the key to clients.toml, and send SIGHUP.",
            _ => "",
        };
        log_client!(info, peer, "clients that were rejected", "A client was rejected: {error}.{hint}");
    }

    /// Sleeps until there is something to do. Returns which guests can go on.
    fn wait(&mut self, waker: &OwnedFd) -> Vec<bool> {
        let now = Instant::now();
        let by = self.guests.iter().map(|guest| guest.accepting.step_by()).min();
        let timeout = by.map(|by| by.saturating_duration_since(now));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut fds = vec![PollFd::new(waker, PollFlags::IN)];
        for guest in &mut self.guests {
            // A stream has one descriptor.
            let Awaited { fd, input, output } = guest.accepting.awaited().remove(0);
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, input);
            flags.set(PollFlags::OUT, output);
            fds.push(PollFd::from_borrowed_fd(fd, flags));
        }
        let polled = poll(&mut fds, timeout.as_ref());
        debug_assert!(matches!(polled, Ok(_) | Err(Errno::INTR | Errno::NOMEM)), "{polled:?}");
        let mut count = [0; 8];
        let _ = rustix::io::read(waker.as_fd(), &mut count);
        fds[1..].iter().map(|fd| !fd.revents().is_empty()).collect()
    }
}

/// Of those with these addresses, the first of the address that has most.
fn one_of_most(addresses: &[Option<IpAddr>]) -> usize {
    let mut counts: HashMap<Option<IpAddr>, usize> = HashMap::new();
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
    fn who_has_most_in_the_door_makes_room() {
        let [one, two] = ["10.0.0.1", "10.0.0.2"].map(|address| Some(address.parse().unwrap()));
        assert_eq!(one_of_most(&[one, two, two, one, two]), 1);
        assert_eq!(one_of_most(&[two, one, None, one]), 1);
        assert_eq!(one_of_most(&[one, two]), 0);
    }
}
