//! Accepts connections, and nothing more: the worker reads the handshake, so a slow client never holds up
//! accept.

use std::io::Read;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use raio_transport::address::{Address, Endpoint, Scheme};
use raio_transport::credentials::Credentials;
use raio_transport::reactor::{Event, File, Op, OpId, Payload, Reactor, Token};
use raio_transport::transport::AcceptedStream;
use raio_transport::{rdma, tcp, transport};
use rustix::fs::Mode;
use rustix::net::{getpeername, getsockname};

use crate::config::Config;
use crate::hand_over::{self, GivenSocket, Offered};
use crate::http;
use crate::log::{self, log_client};
use crate::peer::PeerAddress;
use crate::tuning::http::{TOKEN_BYTES_MIN, TOKEN_FILE_BYTES_MAX};
use crate::tuning::main_thread::{ACCEPT_RETRY, BIND_RETRY, BIND_TIMEOUT};
use crate::worker::RawConnection;

/// All listening sockets.
#[derive(Debug)]
pub struct Listener {
    owner: u8,
    sockets: Vec<Socket>,
    is_stopping: bool,
}

#[derive(Debug)]
struct Socket {
    /// Its place on the command line.
    position: usize,
    file: File,
    /// What it was bound for: a URL of `--listen`, its address looked up.
    url: String,
    endpoint: Endpoint,
    /// None: it is a stream socket.
    rdma: Option<Box<dyn transport::Listener>>,
    accept: Option<OpId>,
}

impl Listener {
    /// Listens nowhere yet. Events on its operations will carry `owner`.
    pub fn new(owner: u8) -> Self {
        Self { owner, sockets: Vec::new(), is_stopping: false }
    }

    /// Listens on those of the endpoints that are stream sockets, and that it does not listen on yet. With
    /// `for_all` every user may connect to the Unix sockets among them, else those whom the umask leaves.
    pub fn bind_streams(
        &mut self,
        reactor: &mut Reactor,
        endpoints: &[(Scheme, Endpoint)],
        for_all: bool,
    ) -> anyhow::Result<()> {
        self.bind_free(reactor, endpoints, for_all, &[])
    }

    /// Listens on those of the endpoints for which a socket was given, and on the others. Returns how many
    /// were given. Those are left out whose port another socket has that was given: they are free when the
    /// server that has given it has ended.
    pub fn take_over(
        &mut self,
        reactor: &mut Reactor,
        endpoints: &[(Scheme, Endpoint)],
        for_all: bool,
        given: Vec<GivenSocket>,
    ) -> anyhow::Result<usize> {
        let before = self.sockets.len();
        let left = self.adopt(reactor, endpoints, for_all, given)?;
        let count = self.sockets.len() - before;
        let taken: Vec<_> = left.iter().filter_map(GivenSocket::endpoint).collect();
        self.bind_free(reactor, endpoints, for_all, &taken)?;
        Ok(count)
    }

    /// Listens on those of the endpoints for which the service manager has passed a socket.
    pub fn use_passed(
        &mut self,
        reactor: &mut Reactor,
        endpoints: &[(Scheme, Endpoint)],
        passed: Vec<GivenSocket>,
    ) -> anyhow::Result<()> {
        let left = self.adopt(reactor, endpoints, false, passed)?;
        if let Some(left) = left.first() {
            bail!(
                "The service manager passes a socket that listens on {0}, which no --listen names for \
                 itself. Add --listen {0}, or take the address out of the .socket unit. Without any --listen \
                 the server listens on what is passed.",
                left.url
            );
        }
        Ok(())
    }

    /// Listens on those of the endpoints for which a socket was given. Returns what is left of them.
    fn adopt(
        &mut self,
        reactor: &mut Reactor,
        endpoints: &[(Scheme, Endpoint)],
        for_all: bool,
        mut given: Vec<GivenSocket>,
    ) -> anyhow::Result<Vec<GivenSocket>> {
        // By where they listen, and then by what they were bound for: that of port 0 has another one.
        let is_there = |given: &GivenSocket, wanted: &Endpoint| given.endpoint().as_ref() == Some(wanted);
        let is_for = |given: &GivenSocket, wanted: &Endpoint| given.url == hand_over::url(wanted);
        for is_it in [is_there, is_for] {
            for (position, (scheme, endpoint)) in endpoints.iter().enumerate() {
                if *scheme == Scheme::Rdma || self.is_bound(position) {
                    continue;
                }
                let Some(at) = given.iter().position(|given| is_it(given, endpoint)) else { continue };
                let given = given.swap_remove(at);
                let Some(actual) = given.listens_at(endpoint) else { continue };
                let_all_connect(&actual, for_all)?;
                self.push(reactor, position, given.socket, hand_over::url(endpoint), actual, None);
            }
        }
        Ok(given)
    }

    /// The same, but for those whose port one of these has.
    fn bind_free(
        &mut self,
        reactor: &mut Reactor,
        endpoints: &[(Scheme, Endpoint)],
        for_all: bool,
        taken: &[Endpoint],
    ) -> anyhow::Result<()> {
        let port =
            |endpoint: &Endpoint| endpoint.ip().map(|address| address.port()).filter(|&port| port != 0);
        for (position, (scheme, endpoint)) in endpoints.iter().enumerate() {
            let is_taken =
                port(endpoint).is_some() && taken.iter().any(|other| port(other) == port(endpoint));
            if *scheme == Scheme::Rdma || self.is_bound(position) || is_taken {
                continue;
            }
            let url = hand_over::url(endpoint);
            let (socket, endpoint) = when_free("--listen", || tcp::listen(endpoint.clone()))?;
            let_all_connect(&endpoint, for_all)?;
            self.push(reactor, position, socket, url, endpoint, None);
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
            let listener = when_free("--listen", || rdma::listen(address))?;
            let (fd, endpoint) = (listener.fd()?, listener.address().into());
            self.push(reactor, position, fd, String::new(), endpoint, Some(listener));
        }
        Ok(())
    }

    fn push(
        &mut self,
        reactor: &mut Reactor,
        position: usize,
        fd: OwnedFd,
        url: String,
        endpoint: Endpoint,
        rdma: Option<Box<dyn transport::Listener>>,
    ) {
        self.sockets.push(Socket { position, file: reactor.file(fd), url, endpoint, rdma, accept: None });
        self.sockets.sort_by_key(|socket| socket.position);
    }

    /// Starts accepting.
    pub fn start(&mut self, reactor: &mut Reactor) {
        for index in 0..self.sockets.len() {
            self.accept(reactor, index);
        }
    }

    fn is_bound(&self, position: usize) -> bool {
        self.sockets.iter().any(|socket| socket.position == position)
    }

    /// The sockets that another process can have: rdma_cm's belong to this one.
    pub fn offered(&self) -> Vec<Offered> {
        let streams = self.sockets.iter().filter(|socket| socket.rdma.is_none());
        streams.map(|it| Offered { url: it.url.clone(), socket: it.file.descriptor() }).collect()
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
        let accepted = self.accepted(reactor, event);
        self.close_if_stopped();
        accepted
    }

    fn close_if_stopped(&mut self) {
        if self.is_stopping && self.sockets.iter().all(|socket| socket.accept.is_none()) {
            self.sockets.clear();
        }
    }

    fn accepted(&mut self, reactor: &mut Reactor, event: Event) -> Option<RawConnection> {
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
            (Err(_), _) if self.is_stopping => None,
            (Err(errno), _) => {
                if log::permit(None, "accept-failed") {
                    let error = std::io::Error::from_raw_os_error(errno);
                    let hint = match errno {
                        libc::EMFILE | libc::ENFILE => {
                            " Raise the limit on open files with `ulimit -n` or LimitNOFILE=."
                        }
                        _ => "",
                    };
                    tracing::warn!(
                        name: "accept-failed",
                        "Cannot accept a connection on {endpoint}: {error}.{hint}",
                        endpoint = socket.endpoint
                    );
                }
                reactor.timer(Instant::now() + ACCEPT_RETRY, event.token);
                None
            }
        }
    }

    /// Stops listening. What has been accepted meanwhile is still to be handled: [`Listener::has_stopped`].
    /// What has not been is rejected by the kernel, unless another process has the socket, too.
    pub fn stop(&mut self, reactor: &mut Reactor) {
        self.is_stopping = true;
        for accept in self.sockets.iter().filter_map(|socket| socket.accept) {
            reactor.cancel(accept);
        }
        self.close_if_stopped();
    }

    /// Whether it was told to stop, and accepts nothing more.
    pub fn has_stopped(&self) -> bool {
        self.is_stopping && self.sockets.is_empty()
    }

    fn accept(&mut self, reactor: &mut Reactor, index: usize) {
        if self.is_stopping {
            return;
        }
        let socket = &mut self.sockets[index];
        let token = Token { owner: self.owner, value: index as u64 };
        let listener = socket.file.clone();
        let op =
            if socket.rdma.is_some() { Op::Readable { file: listener } } else { Op::Accept { listener } };
        socket.accept = Some(reactor.submit(token, op));
    }
}

/// With `for_all`, lets every user connect to a Unix socket.
fn let_all_connect(endpoint: &Endpoint, for_all: bool) -> anyhow::Result<()> {
    let (Endpoint::Unix(path), true) = (endpoint, for_all) else { return Ok(()) };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))
        .with_context(|| format!("Cannot let all users connect to {}", path.display()))
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
                "user-unknown",
                "A connection was closed: the kernel does not say whose it is: {error}."
            );
            None
        }
    }
}

/// The sockets on which HTTP is served. Those that were given are taken where they are the right ones. It may
/// take root to bind them, and to read the token; the admin socket belongs to `owner`, if that is not who
/// binds it.
pub fn bind_http(
    config: &Config,
    users: Vec<u32>,
    owner: Option<u32>,
    mut given: Vec<GivenSocket>,
) -> anyhow::Result<http::Sockets> {
    let mut sockets = http::Sockets { users, names: config.http_names.clone(), ..http::Sockets::default() };
    let mut take = |wanted: &Endpoint| {
        let at = given.iter().position(|given| given.listens_at(wanted).is_some())?;
        Some(Arc::new(given.swap_remove(at).socket))
    };
    for &address in &config.http {
        let socket = match take(&address.into()) {
            Some(socket) => socket,
            None => Arc::new(when_free("--http", || tcp::listen(address))?.0),
        };
        if let Ok(Some(address)) = getsockname(&*socket).map(|found| SocketAddr::try_from(found).ok()) {
            tracing::info!(name: "http-ready", "Metrics and the status page are at http://{address}/.");
        }
        sockets.tcp.push(socket);
    }
    if let Some(path) = &config.admin {
        let endpoint = Endpoint::Unix(path.clone());
        let socket = match take(&endpoint) {
            Some(socket) => socket,
            None => {
                let before = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
                let bound = when_free("--admin", || tcp::listen(endpoint.clone()));
                rustix::process::umask(before);
                let socket = bound?.0;
                // The unit denies the call to a server that has its user from the start.
                if owner.is_some() {
                    std::os::unix::fs::chown(path, owner, None)
                        .with_context(|| format!("Cannot give {} to the server's user", path.display()))?;
                }
                Arc::new(socket)
            }
        };
        sockets.admin = Some(socket);
    }
    sockets.token = config.http_token.as_deref().map(read_token).transpose()?;
    Ok(sockets)
}

/// What another process can have of them.
pub fn http_offered(config: &Config, sockets: &http::Sockets) -> Vec<Offered> {
    let url = |address: &SocketAddr| format!("{}{address}", hand_over::HTTP);
    let tcp = config.http.iter().zip(&sockets.tcp);
    let tcp = tcp.map(|(address, socket)| Offered { url: url(address), socket: Arc::clone(socket) });
    let admin = config.admin.iter().zip(&sockets.admin).map(|(path, socket)| Offered {
        url: format!("{}{}", hand_over::ADMIN, path.display()),
        socket: Arc::clone(socket),
    });
    tcp.chain(admin).collect()
}

/// The secret in this file.
pub fn read_token(path: &Path) -> anyhow::Result<http::Token> {
    let cannot = || format!("--http-token {}", path.display());
    let mut text = String::new();
    let mut file = std::fs::File::open(path).with_context(cannot)?;
    let mode = file.metadata().with_context(cannot)?.permissions().mode();
    ensure!(mode & 0o007 == 0, "{}: everybody may read it. Run `chmod o= {}`.", cannot(), path.display());
    file.by_ref().take(TOKEN_FILE_BYTES_MAX).read_to_string(&mut text).with_context(cannot)?;
    let token = text.trim();
    ensure!(
        token.len() >= TOKEN_BYTES_MIN && token.bytes().all(|byte| byte.is_ascii_graphic()),
        "{}: a token has {TOKEN_BYTES_MIN} or more letters, digits and signs, and no spaces. Make one with \
         `openssl rand -hex 32`.",
        cannot()
    );
    Ok(http::Token::new(token))
}

/// Binds what an option asks for; again for a while if the address is taken, for a server that was killed
/// keeps it until its last operation has ended.
fn when_free<T>(option: &str, bind: impl Fn() -> Result<T, raio_transport::Error>) -> anyhow::Result<T> {
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
                format!("Another process listens there. Stop it, or choose another place with {option}")
            }
            libc::EADDRNOTAVAIL => format!("Give an address of this machine with {option}"),
            libc::EACCES => format!(
                "Choose a port above 1023 with {option}, or give the server CAP_NET_BIND_SERVICE; the \
                 directory of a Unix socket must let it make files"
            ),
            libc::ENOENT => "The directory of a Unix socket must be there".to_owned(),
            _ => return Err(error.into()),
        };
        bail!("{error}. {remedy}.");
    }
}
