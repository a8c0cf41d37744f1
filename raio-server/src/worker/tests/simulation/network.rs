//! The network between clients and the server: both ends of each connection are sockets, and what is sent
//! arrives when the run says so, if at all.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use raio_transport::Error;
use raio_transport::channel::{Dialer, Dialing};
use raio_transport::connecting::Connecting;
use raio_transport::handshake::Offer;
use raio_transport::mux::Reached;
use raio_transport::sync::lock;
use raio_transport::tcp::TcpDial;

use super::clock;

/// See the module documentation.
#[derive(Default)]
pub struct Network {
    pub links: Vec<Link>,
    next_id: u64,
    /// Nobody listens.
    pub is_down: bool,
}

/// A connection. Its ends are those of the sockets that client and server do not have.
pub struct Link {
    pub id: u64,
    /// Whose it is.
    pub client: u32,
    ends: [Option<UnixStream>; 2],
    /// The server has not accepted it.
    is_new: bool,
    /// What each end has sent.
    sent: [VecDeque<u8>; 2],
    /// It will send no more.
    has_ended: [bool; 2],
    /// Nothing gets through.
    pub is_silent: bool,
}

/// The ends of a [`Link`].
pub const CLIENT: usize = 0;
pub const SERVER: usize = 1;

fn pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    for end in [&ours, &theirs] {
        end.set_nonblocking(true).expect("it can be set up");
    }
    (ours, theirs)
}

impl Network {
    /// A client connects. None if that is refused.
    fn dial(&mut self, client: u32) -> Option<UnixStream> {
        if self.is_down {
            return None;
        }
        let (ours, theirs) = pair();
        self.links.push(Link {
            id: self.next_id,
            client,
            ends: [Some(ours), None],
            is_new: true,
            sent: Default::default(),
            has_ended: [false; 2],
            is_silent: false,
        });
        self.next_id += 1;
        Some(theirs)
    }

    /// Drops those that neither side has any more.
    pub fn forget_dead(&mut self) {
        self.links.retain(|link| link.ends.iter().any(Option::is_some));
    }

    /// A process has ended that had this end of all connections, or of one client's. What it has sent may
    /// still arrive.
    pub fn kill(&mut self, end: usize, client: Option<u32>) {
        for link in &mut self.links {
            if client.is_none_or(|client| link.client == client) {
                link.take_in(end);
                link.ends[end] = None;
                link.has_ended[end] = true;
                if end == SERVER && link.is_new {
                    link.is_new = false;
                }
            }
        }
    }
}

impl Link {
    /// The socket for the server, if it has not accepted the connection.
    pub fn accept(&mut self) -> Option<OwnedFd> {
        if self.is_silent || !std::mem::take(&mut self.is_new) {
            return None;
        }
        let (ours, theirs) = pair();
        self.ends[SERVER] = Some(ours);
        Some(theirs.into())
    }

    /// Takes from a socket what its owner has sent.
    fn take_in(&mut self, end: usize) {
        let Some(stream) = &mut self.ends[end] else { return };
        let mut bytes = [0; 8192];
        while !self.has_ended[end] {
            match stream.read(&mut bytes) {
                Ok(n @ 1..) => self.sent[end].extend(&bytes[..n]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Ok(0) | Err(_) => self.has_ended[end] = true,
            }
        }
    }

    /// Whether this end has sent something, or has ended, and the other has not been told.
    pub fn can_deliver(&mut self, from: usize) -> bool {
        self.take_in(from);
        !self.is_new
            && !self.is_silent
            && (self.has_ended[from] || !self.sent[from].is_empty())
            && self.ends[1 - from].is_some()
    }

    /// Up to `max` bytes arrive at the other end, and the end of the stream behind the last one. Returns what
    /// happened, for the log.
    pub fn deliver(&mut self, from: usize, max: usize) -> String {
        self.take_in(from);
        let to = 1 - from;
        let mut delivered = 0;
        while delivered < max && !self.sent[from].is_empty() {
            let Some(stream) = &mut self.ends[to] else { break };
            let (bytes, _) = self.sent[from].as_slices();
            match stream.write(&bytes[..bytes.len().min(max - delivered)]) {
                Ok(n) => {
                    self.sent[from].drain(..n);
                    delivered += n;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.end(to);
                    self.has_ended[to] = true;
                }
            }
        }
        let ends = self.sent[from].is_empty() && self.has_ended[from] && delivered < max;
        if ends {
            self.end(to);
        }
        let id = self.id;
        format!("link {id}: {delivered} bytes from {from}{}", if ends { " and the end" } else { "" })
    }

    /// The owner of this end's other socket sees that the connection has ended, and gets nothing more.
    pub fn end(&mut self, end: usize) {
        self.take_in(end);
        self.ends[end] = None;
        self.has_ended[end] = true;
        if end == SERVER {
            self.is_new = false;
        }
        self.sent[1 - end].clear();
    }
}

/// A connection of a client that is being made.
struct SimulatedDial {
    /// None if nobody listens.
    dial: Option<TcpDial>,
    deadline: Instant,
    epoch: Option<u64>,
}

impl Dialing for SimulatedDial {
    fn step(&mut self, now: Instant) -> Option<Result<Reached, Error>> {
        let Some(dial) = &mut self.dial else {
            let refused = std::io::Error::from_raw_os_error(libc::ECONNREFUSED);
            return Some(Err(Error::io("Cannot connect", refused)));
        };
        let reached = dial.step(now)?.map(|mut client| {
            client.set_clock(clock);
            Reached { transport: Box::new(client), why_tcp: None }
        });
        Some(reached)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn step_by(&self) -> Instant {
        self.deadline
    }

    fn epoch(&self) -> Option<u64> {
        self.epoch
    }
}

/// How this client connects.
pub fn dialer(network: &Arc<Mutex<Network>>, client: u32) -> Dialer {
    let network = Arc::clone(network);
    Box::new(move |offer: &Offer, _, deadline| {
        let stream = lock(&network).dial(client);
        let dial =
            stream.map(|stream| TcpDial::over(TcpStream::from(OwnedFd::from(stream)), offer, deadline));
        Box::new(SimulatedDial { dial, deadline, epoch: offer.channel.map(|channel| channel.epoch) })
    })
}
