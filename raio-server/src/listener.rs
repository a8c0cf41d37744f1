//! Accepts connections, and nothing more: the worker reads the handshake, so a slow client never holds up
//! accept.

use std::net::SocketAddr;
use std::time::Instant;

use anyhow::bail;
use raio_transport::address::Scheme;
use raio_transport::reactor::{Event, File, Op, OpId, Payload, Reactor, Token};
use raio_transport::transport::AcceptedStream;
use raio_transport::{rdma, tcp, transport};
use rustix::net::getpeername;

use crate::log;
use crate::tuning::main_thread::{ACCEPT_RETRY, BIND_RETRY, BIND_TIMEOUT};
use crate::worker::RawConnection;

/// All listening sockets.
#[derive(Debug)]
pub struct Listener {
    owner: u8,
    sockets: Vec<Socket>,
}

#[derive(Debug)]
struct Socket {
    /// Its place on the command line.
    position: usize,
    file: File,
    address: SocketAddr,
    /// None: it is a TCP socket.
    rdma: Option<Box<dyn transport::Listener>>,
    accept: Option<OpId>,
}

impl Listener {
    /// Listens nowhere yet. Events on its operations will carry `owner`.
    pub fn new(owner: u8) -> Self {
        Self { owner, sockets: Vec::new() }
    }

    /// Listens on those of the addresses that have this scheme.
    pub fn bind(
        &mut self,
        reactor: &mut Reactor,
        addresses: &[(Scheme, SocketAddr)],
        wanted: Scheme,
    ) -> anyhow::Result<()> {
        let wanted = addresses.iter().enumerate().filter(|(_, (scheme, _))| *scheme == wanted);
        for (position, &(scheme, address)) in wanted {
            let (fd, address, rdma) = if scheme == Scheme::Rdma {
                let listener = when_free(|| rdma::listen(address))?;
                (listener.fd()?, listener.address(), Some(listener))
            } else {
                let (socket, address) = when_free(|| tcp::listen(address))?;
                (socket, address, None)
            };
            let file = reactor.file(fd);
            self.sockets.push(Socket { position, file, address, rdma, accept: None });
        }
        self.sockets.sort_by_key(|socket| socket.position);
        Ok(())
    }

    /// Starts accepting.
    pub fn start(&mut self, reactor: &mut Reactor) {
        for index in 0..self.sockets.len() {
            self.accept(reactor, index);
        }
    }

    /// Where it listens, with the actual ports, as URLs.
    pub fn urls(&self) -> String {
        let url = |socket: &Socket| {
            let scheme = if socket.rdma.is_some() { "rdma" } else { "tcp" };
            format!("{scheme}://{}", socket.address)
        };
        self.sockets.iter().map(url).collect::<Vec<_>>().join(" ")
    }

    /// Handles the end of an accept, and accepts the next. Returns a connection if there is one.
    pub fn handle(&mut self, reactor: &mut Reactor, event: Event) -> Option<RawConnection> {
        let index = event.token.value as usize;
        let socket = self.sockets.get_mut(index)?;
        socket.accept = None;
        if let (Ok(_), Some(listener)) = (event.result, &socket.rdma) {
            // There may be more: then it is readable again at once.
            let incoming = listener.accept();
            self.accept(reactor, index);
            return incoming.map(RawConnection::Rdma);
        }
        match (event.result, event.payload) {
            (Ok(_), Payload::Fd(fd)) => {
                self.accept(reactor, index);
                let peer = getpeername(&fd).ok().flatten();
                let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
                Some(RawConnection::Tcp(AcceptedStream::new(fd), peer))
            }
            (Ok(_), _) | (Err(libc::ECONNABORTED | libc::EINTR | libc::EAGAIN), _) => {
                self.accept(reactor, index);
                None
            }
            (Err(errno), _) => {
                if log::permit(None, "connections that cannot be accepted") {
                    let error = std::io::Error::from_raw_os_error(errno);
                    let hint = match errno {
                        libc::EMFILE | libc::ENFILE => {
                            " Raise the limit on open files with `ulimit -n` or LimitNOFILE=."
                        }
                        _ => "",
                    };
                    tracing::warn!("Cannot accept a connection on {}: {error}.{hint}", socket.address);
                }
                reactor.timer(Instant::now() + ACCEPT_RETRY, event.token);
                None
            }
        }
    }

    /// Stops listening. What has not been accepted is rejected by the kernel.
    pub fn stop(&mut self, reactor: &mut Reactor) {
        for socket in self.sockets.drain(..) {
            if let Some(accept) = socket.accept {
                reactor.cancel(accept);
            }
        }
    }

    fn accept(&mut self, reactor: &mut Reactor, index: usize) {
        let socket = &mut self.sockets[index];
        let token = Token { owner: self.owner, value: index as u64 };
        let listener = socket.file.clone();
        let op =
            if socket.rdma.is_some() { Op::Readable { file: listener } } else { Op::Accept { listener } };
        socket.accept = Some(reactor.submit(token, op));
    }
}

/// Binds; again for a while if the address is taken, for a server that was killed keeps it until its last
/// operation has ended.
fn when_free<T>(bind: impl Fn() -> Result<T, raio_transport::Error>) -> anyhow::Result<T> {
    let deadline = Instant::now() + BIND_TIMEOUT;
    loop {
        let (errno, error) = match bind() {
            Ok(bound) => return Ok(bound),
            Err(error) => (error.errno(), error),
        };
        let remedy = match errno {
            libc::EADDRINUSE if Instant::now() < deadline => {
                std::thread::sleep(BIND_RETRY);
                continue;
            }
            libc::EADDRINUSE => {
                "Another process listens there. Stop it, or choose another port with --listen"
            }
            libc::EADDRNOTAVAIL => "Give an address of this machine with --listen",
            libc::EACCES => "Choose a port above 1023 with --listen, or give the server CAP_NET_BIND_SERVICE",
            _ => return Err(error.into()),
        };
        bail!("{error}. {remedy}.");
    }
}
