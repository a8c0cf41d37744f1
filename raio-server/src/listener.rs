//! Accepts connections, and nothing more: the worker reads the handshake, so a slow client never holds up
//! accept.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use anyhow::{Context, bail};
use raio_transport::address::{Address, Endpoint, Scheme};
use raio_transport::credentials::Credentials;
use raio_transport::reactor::{Event, File, Op, OpId, Payload, Reactor, Token};
use raio_transport::transport::AcceptedStream;
use raio_transport::{rdma, tcp, transport};
use rustix::net::getpeername;

use crate::log::{self, log_client};
use crate::peer::PeerAddress;
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
    endpoint: Endpoint,
    /// None: it is a stream socket.
    rdma: Option<Box<dyn transport::Listener>>,
    accept: Option<OpId>,
}

impl Listener {
    /// Listens nowhere yet. Events on its operations will carry `owner`.
    pub fn new(owner: u8) -> Self {
        Self { owner, sockets: Vec::new() }
    }

    /// Listens on those of the endpoints that are stream sockets. With `for_all` every user may connect to
    /// the Unix sockets among them, else those whom the umask leaves.
    pub fn bind_streams(
        &mut self,
        reactor: &mut Reactor,
        endpoints: &[(Scheme, Endpoint)],
        for_all: bool,
    ) -> anyhow::Result<()> {
        for (position, (scheme, endpoint)) in endpoints.iter().enumerate() {
            if *scheme == Scheme::Rdma {
                continue;
            }
            let (socket, endpoint) = when_free(|| tcp::listen(endpoint.clone()))?;
            if let (Endpoint::Unix(path), true) = (&endpoint, for_all) {
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))
                    .with_context(|| format!("Cannot let all users connect to {}", path.display()))?;
            }
            self.push(reactor, position, socket, endpoint, None);
        }
        Ok(())
    }

    /// Listens on those that rdma_cm listens on.
    pub fn bind_rdma(
        &mut self,
        reactor: &mut Reactor,
        endpoints: &[(Scheme, Endpoint)],
    ) -> anyhow::Result<()> {
        for (position, endpoint) in endpoints.iter().enumerate() {
            let &(Scheme::Rdma, Endpoint::Ip(address)) = endpoint else { continue };
            let listener = when_free(|| rdma::listen(address))?;
            self.push(reactor, position, listener.fd()?, listener.address().into(), Some(listener));
        }
        Ok(())
    }

    fn push(
        &mut self,
        reactor: &mut Reactor,
        position: usize,
        fd: OwnedFd,
        endpoint: Endpoint,
        rdma: Option<Box<dyn transport::Listener>>,
    ) {
        self.sockets.push(Socket { position, file: reactor.file(fd), endpoint, rdma, accept: None });
        self.sockets.sort_by_key(|socket| socket.position);
    }

    /// Starts accepting.
    pub fn start(&mut self, reactor: &mut Reactor) {
        for index in 0..self.sockets.len() {
            self.accept(reactor, index);
        }
    }

    /// Where it listens, with the actual ports, as URLs.
    pub fn urls(&self) -> String {
        let url = |socket: &Socket| match &socket.endpoint {
            Endpoint::Unix(path) => Address::Unix(path.clone()).to_string(),
            Endpoint::Ip(address) if socket.rdma.is_some() => format!("rdma://{address}"),
            Endpoint::Ip(address) => format!("tcp://{address}"),
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
                let is_unix = socket.endpoint.ip().is_none();
                self.accept(reactor, index);
                if is_unix {
                    return of_user(fd);
                }
                let peer = getpeername(&fd).ok().flatten();
                let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
                Some(RawConnection::Tcp(AcceptedStream::new(fd), peer.map(PeerAddress::Ip)))
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
                    tracing::warn!("Cannot accept a connection on {}: {error}.{hint}", socket.endpoint);
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

/// A connection over a Unix socket. None: the kernel does not say whose it is.
fn of_user(fd: OwnedFd) -> Option<RawConnection> {
    match Credentials::of_peer(&fd) {
        Ok(user) => {
            let peer = PeerAddress::User(user.uid);
            Some(RawConnection::Tcp(AcceptedStream::new(fd).of_user(user), Some(peer)))
        }
        Err(error) => {
            log_client!(
                warn,
                None::<PeerAddress>,
                "connections of unknown users",
                "A connection was closed: the kernel does not say whose it is: {error}."
            );
            None
        }
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
            libc::EACCES => {
                "Choose a port above 1023 with --listen, or give the server CAP_NET_BIND_SERVICE; the \
                 directory of a Unix socket must let it make files"
            }
            libc::ENOENT => "The directory of a Unix socket must be there",
            _ => return Err(error.into()),
        };
        bail!("{error}. {remedy}.");
    }
}
