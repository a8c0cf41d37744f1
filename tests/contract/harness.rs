//! A server for the tests, and a client that is easy to drive.
//!
//! The server has one thread for each worker. Its commands are 16 bytes, an [`Op`] and an argument, and
//! whatever follows: nothing in it knows a file.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use raio_transport::credentials::Credentials;
use raio_transport::error::{Error, Status};
use raio_transport::handshake::{Offer, Peer, Policy, PushWindows};
use raio_transport::memory::{Arena, Buffer, Buffers};
use raio_transport::message;
use raio_transport::reactor::{self, Reactor, Sender, Token, Wait, mailbox};
use raio_transport::tls::{ClientTls, ServerTls};
use raio_transport::transport::{
    self, Accepted, AcceptedStream, Body, Bulk, ClientEvent, ClientTransport, CloseReason, ConnectionId,
    Incoming, Listener, OneWay, Push, Reply, Request, RequestKey, Response, SendOptions, ServerCounters,
    ServerEvent, ServerTransport, SlotRange,
};
use raio_transport::{loopback, mux, rdma, tcp};

use crate::tls_peer::{self, unsealed};

/// The unsolicited messages that a server grants.
pub const PUSH: PushWindows = PushWindows { to_server: 64, to_client: 64, requests: 16 };

/// Nothing in these tests takes so long unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What the suite runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Loopback,
    TcpUring,
    /// The same, but the thread spins before it sleeps, as it does unless told otherwise: it then receives
    /// and sends without the ring.
    TcpSpinning,
    TcpEpoll,
    /// TLS over TCP, and io_uring.
    Tls,
    /// The same, where the server's kernel seals and opens.
    KernelTls,
    /// A Unix socket, and io_uring.
    Unix,
    Rdma,
    /// A TCP connection that moves to a queue pair after the handshake.
    RdmaAfterTcp,
}

impl Transport {
    /// Those that are a TCP stream and nothing else.
    pub const TCP: [Self; 3] = [Self::TcpUring, Self::TcpSpinning, Self::TcpEpoll];

    /// Whether it is a stream from beginning to end.
    pub fn is_stream(self) -> bool {
        Self::TCP.contains(&self) || self.has_tls() || self == Self::Unix
    }

    /// Whether it is a stream that is sealed.
    pub fn has_tls(self) -> bool {
        matches!(self, Self::Tls | Self::KernelTls)
    }

    /// What a server of it has.
    fn server_tls(self) -> ServerTls {
        if self == Self::KernelTls { tls_peer::kernel_server_tls() } else { tls_peer::server_tls() }
    }

    /// What a client of it has.
    pub fn client_tls(self) -> ClientTls {
        // The kernel does not change keys.
        if self == Self::KernelTls { tls_peer::lasting_client_tls() } else { tls_peer::client_tls() }
    }

    /// Both ends of a stream: a client's, and a server's.
    pub fn stream_pair(self) -> (TcpStream, TcpStream) {
        match self {
            Self::RdmaAfterTcp => tcp_pair_by_rdma(),
            Self::Unix => unix_pair(),
            _ => tcp_pair(),
        }
    }

    pub fn is_rdma(self) -> bool {
        matches!(self, Self::Rdma | Self::RdmaAfterTcp)
    }
}

/// Says so if it has not.
pub fn has_rdma() -> bool {
    let reason = match rdma::unavailable() {
        None if rdma_addresses().is_empty() => "no device has an IPv4 address".into(),
        None => return true,
        Some(reason) => reason,
    };
    eprintln!("SKIPPED over RDMA, which is not to be had here: {reason}");
    false
}

/// The IPv4 addresses of the RDMA devices: the first to serve, the last to connect from.
fn rdma_addresses() -> Vec<Ipv4Addr> {
    let devices = rdma::devices().unwrap_or_default();
    let ports = devices.iter().flat_map(|device| &device.ports).filter(|port| port.problem().is_none());
    ports.flat_map(|port| &port.gids).filter_map(|gid| gid.address.to_ipv4_mapped()).collect()
}

/// Where to connect from: the other end of the wire, if there are two.
pub fn rdma_source() -> Option<IpAddr> {
    rdma_addresses().last().map(|&address| address.into())
}

/// A listener for RDMA connections.
pub fn rdma_listener() -> Box<dyn Listener> {
    rdma::listen(SocketAddr::new(rdma_addresses()[0].into(), 0)).unwrap()
}

/// Says so if it has not.
pub fn has_io_uring() -> bool {
    let reactor = Reactor::new(&reactor::Config::default()).unwrap();
    if let Some(reason) = reactor.fallback_reason() {
        eprintln!("SKIPPED over io_uring, which is not to be had here: {reason}");
    }
    reactor.has_ring()
}

/// Says so if it has not; panics instead if RAIO_TEST_NEEDS_KTLS is set.
pub fn has_kernel_tls() -> bool {
    static MISSING: LazyLock<Option<String>> = LazyLock::new(tcp::no_kernel_tls);
    let Some(why) = &*MISSING else { return has_io_uring() };
    assert!(std::env::var_os("RAIO_TEST_NEEDS_KTLS").is_none(), "there is no TLS of the kernel's: {why}");
    eprintln!("SKIPPED with TLS of the kernel's, which is not to be had here: {why}");
    false
}

/// What the server does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Op {
    /// The body comes back.
    Echo = 1,
    /// Takes the data, and says how many of its bytes agree with [`pattern`] of the argument.
    Put,
    /// Gives as much data as there is room for: [`pattern`] of the argument.
    Get,
    /// Fails with EACCES, and leaves the data where it is.
    Refuse,
    /// Is not answered before a release comes by the same connection.
    Hold,
    /// Answers what is held by its connection, newest first, and then itself.
    Release,
    /// Closes its connection, with an error message.
    Close,
    /// From now on one-way messages stay unreleased; its argument releases so many, and then does so.
    Keep,
    /// Takes no more one-way messages.
    RefuseOneWay,
    /// Sends one-way messages that want a receipt until their number is the argument, or the window is full.
    SendOneWay,
    /// Sends requests to the client likewise. The result of both is how many were sent.
    RequestClient,
}

/// A command.
pub fn command(op: Op, argument: u64) -> [u8; 16] {
    let mut body = [0; 16];
    body[..8].copy_from_slice(&(op as u64).to_le_bytes());
    body[8..].copy_from_slice(&argument.to_le_bytes());
    body
}

/// The server's n-th one-way message, or question.
pub fn unsolicited(n: u64) -> Vec<u8> {
    pattern(n, 8 + (n as usize * 37) % 700)
}

/// Data that differs by seed and by position.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (at.wrapping_mul(31) ^ (at >> 8) ^ seed.wrapping_mul(97)) as u8).collect()
}

/// One end of a connection, handed to the server.
enum Wire {
    Stream(AcceptedStream),
    Loopback(loopback::LoopbackEnd),
    Rdma(Box<dyn Incoming>),
}

const STALL_CHECK: Token = Token { owner: 9, value: 0 };

enum Mail {
    Adopt(Wire),
    Stop,
}

/// A client of this name is rejected.
pub const UNWELCOME: &str = "unwelcome";

/// The name of clients that only show that others are served: what the server has seen of them is not
/// recorded.
pub const BYSTANDER: &str = "bystander";

/// What the server has seen (of all but bystanders), and what it holds.
#[derive(Debug, Default)]
pub struct Seen {
    pub opened: Vec<(ConnectionId, Peer)>,
    pub closed: Vec<(ConnectionId, CloseReason)>,
    pub requests: u64,
    /// The most requests of one connection that were unanswered at a time.
    pub unanswered_max: usize,
    /// The most bytes of one connection's answers that it had not taken.
    pub unsent_bytes_max: usize,
    /// Bytes of the arena in use at the end of the last turn, and the most at the end of any.
    pub arena_bytes: usize,
    pub arena_bytes_max: usize,
    /// Requests whose data waits for memory.
    pub waiting: usize,
    pub connections: usize,
    /// What the RDMA transport has counted.
    pub rdma: ServerCounters,
    /// One-way messages, in order.
    pub one_ways: Vec<(ConnectionId, Vec<u8>)>,
    /// Tags that have receipts, in order.
    pub receipts: Vec<u64>,
    /// How many clients have refused one-way messages.
    pub refused: u64,
    /// Answers to questions, in order.
    pub answers: Vec<transport::Answer>,
}

impl Seen {
    /// The names of the reasons for which connections were closed.
    pub fn reasons(&self) -> Vec<&'static str> {
        self.closed.iter().map(|(_, reason)| reason.name()).collect()
    }
}

struct Worker {
    sender: Sender<Mail>,
    thread: Option<JoinHandle<()>>,
    seen: Arc<(Mutex<Seen>, Condvar)>,
}

/// A running server. Dropping it stops it, and fails the test if one of its threads has panicked.
pub struct Server {
    pub transport: Transport,
    workers: Vec<Worker>,
    next: AtomicUsize,
    rdma: Option<RdmaAcceptor>,
}

/// A thread that hands what is asked for to the workers in turn.
struct RdmaAcceptor {
    address: SocketAddr,
    /// Where the clients were that it has accepted.
    clients: Arc<Mutex<Vec<SocketAddr>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// How a server is made.
pub struct Setup {
    pub policy: Policy,
    pub workers: usize,
    pub arena_bytes: usize,
    /// With the event loop of this transport; None: of its own.
    pub event_loop: Option<Transport>,
}

impl Default for Setup {
    fn default() -> Self {
        let policy = Policy { queue_depth: 16, data_bytes_max: 256 << 10, push: PUSH, ..Policy::default() };
        Self { policy, workers: 1, arena_bytes: 16 << 20, event_loop: None }
    }
}

/// A server with one worker and this policy.
pub fn serve(transport: Transport, policy: Policy) -> Server {
    Server::start(transport, Setup { policy, ..Setup::default() })
}

/// A server of no particular kind.
pub fn serve_plain(transport: Transport) -> Server {
    Server::start(transport, Setup::default())
}

impl Server {
    pub fn start(transport: Transport, setup: Setup) -> Self {
        let policy = Arc::new(setup.policy);
        let workers = (0..setup.workers)
            .map(|_| {
                let (policy, arena_bytes) = (Arc::clone(&policy), setup.arena_bytes);
                let event_loop = setup.event_loop.unwrap_or(transport);
                // Where a test sets it others always wait for memory.
                let is_default = policy.stall_timeout == Policy::default().stall_timeout;
                let stall_timeout = Some(policy.stall_timeout).filter(|_| !is_default);
                let seen = Arc::new((Mutex::new(Seen::default()), Condvar::new()));
                let seen_by_worker = Arc::clone(&seen);
                let (started, starting) = std::sync::mpsc::channel();
                let thread = std::thread::spawn(move || {
                    let mut config =
                        reactor::Config { epoll: event_loop == Transport::TcpEpoll, ..Default::default() };
                    if event_loop != Transport::TcpSpinning {
                        config.spin = Duration::ZERO;
                    }
                    let mut reactor = Reactor::new(&config).unwrap();
                    let (sender, receiver) = mailbox(reactor.waker());
                    started.send(sender).unwrap();
                    // Room for what the handler puts before the data.
                    let arena = Arena::new(arena_bytes, 2 * policy.data_bytes_max as usize).unwrap();
                    let _ = reactor.register_arena(&arena);
                    let wires = match transport {
                        Transport::Loopback => Wires::Loopback(loopback::LoopbackServer::new(1, policy)),
                        Transport::Rdma => {
                            let memory = Box::new(|_, _| Ok(Box::new(()) as _));
                            Wires::Rdma(rdma::server(&mut reactor, 1, policy, &arena, memory).unwrap())
                        }
                        Transport::RdmaAfterTcp => {
                            let ours = Arc::clone(&policy);
                            let memory = Box::new(|_, _| Ok(Box::new(()) as _));
                            let rdma = rdma::server(&mut reactor, 2, ours, &arena, memory);
                            let policy = Policy { queue_pair: true, ..Policy::clone(&policy) };
                            let tcp = Box::new(tcp::TcpServer::new(1, Arc::new(policy)));
                            let transports: Vec<Box<dyn ServerTransport>> = vec![tcp, rdma.unwrap()];
                            Wires::Any(Box::new(mux::Mux::new(transports)))
                        }
                        _ => Wires::Tcp(Box::new(tcp::TcpServer::new(1, policy))),
                    };
                    let mut handler = Handler::new(wires, arena, seen_by_worker);
                    handler.stall_timeout = stall_timeout;
                    handler.run(&mut reactor, &receiver);
                });
                let sender = starting.recv().expect("the worker starts");
                Worker { sender, thread: Some(thread), seen }
            })
            .collect::<Vec<_>>();
        let rdma = (transport == Transport::Rdma).then(|| {
            let listener = rdma_listener();
            let (address, stop) = (listener.address(), Arc::new(AtomicBool::new(false)));
            let stopped = Arc::clone(&stop);
            let clients: Arc<Mutex<Vec<SocketAddr>>> = Arc::default();
            let seen = Arc::clone(&clients);
            let senders: Vec<_> = workers.iter().map(|worker: &Worker| worker.sender.clone()).collect();
            let thread = std::thread::spawn(move || {
                let mut next = 0;
                while !stopped.load(Ordering::Relaxed) {
                    while let Some(incoming) = listener.accept() {
                        seen.lock().unwrap().extend(incoming.peer());
                        senders[next % senders.len()].send(Mail::Adopt(Wire::Rdma(incoming)));
                        next += 1;
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            RdmaAcceptor { address, clients, stop, thread: Some(thread) }
        });
        Self { transport, workers, next: AtomicUsize::new(0), rdma }
    }

    /// Where the server listens for RDMA connections.
    pub fn rdma_address(&self) -> SocketAddr {
        self.rdma.as_ref().expect("it serves RDMA").address
    }

    /// Where the clients were that have come by rdma_cm.
    pub fn rdma_clients(&self) -> Vec<SocketAddr> {
        self.rdma.as_ref().expect("it serves RDMA").clients.lock().unwrap().clone()
    }

    fn adopt(&self, wire: Wire) {
        let next = self.next.fetch_add(1, Ordering::Relaxed) % self.workers.len();
        self.workers[next].sender.send(Mail::Adopt(wire));
    }

    /// A stream to the server.
    pub fn stream(&self) -> TcpStream {
        let (client, server) = self.transport.stream_pair();
        self.serve(server);
        if self.transport.has_tls() { unsealed(client, tls_peer::client()) } else { client }
    }

    /// Gives the server its end of a stream, non-blocking.
    pub fn serve(&self, stream: TcpStream) {
        if self.transport.has_tls() {
            return self.shake_hands(stream, self.transport.server_tls());
        }
        let mut stream = AcceptedStream::new(OwnedFd::from(stream));
        if self.transport == Transport::Unix {
            let user = Credentials::of_peer(stream.socket()).unwrap();
            stream = stream.of_user(user);
        }
        self.adopt(Wire::Stream(stream));
    }

    /// The same, once a client has shown its key.
    pub fn shake_hands(&self, stream: TcpStream, tls: ServerTls) {
        let next = self.next.fetch_add(1, Ordering::Relaxed) % self.workers.len();
        let sender = self.workers[next].sender.clone();
        std::thread::spawn(move || {
            if let Ok(stream) = tls_peer::accept(stream, &tls) {
                sender.send(Mail::Adopt(Wire::Stream(stream)));
            }
        });
    }

    /// A stream to the server with small buffers, those from the server smallest, so that little is on its
    /// way.
    pub fn narrow_stream(&self) -> TcpStream {
        let (client, server) = tcp_pair();
        for (from, to, bytes) in [(&client, &server, 64 << 10), (&server, &client, 4 << 10)] {
            socket2::SockRef::from(from).set_send_buffer_size(bytes).unwrap();
            socket2::SockRef::from(to).set_recv_buffer_size(bytes).unwrap();
        }
        self.adopt(Wire::Stream(AcceptedStream::new(OwnedFd::from(server))));
        client
    }

    /// A link to the server.
    pub fn link(&self) -> loopback::LoopbackEnd {
        let (client, server) = loopback::LoopbackEnd::pair().unwrap();
        self.adopt(Wire::Loopback(server));
        client
    }

    /// A client that has shaken hands.
    pub fn connect(&self, offer: &Offer) -> Result<Client, Error> {
        let deadline = Instant::now() + PATIENCE;
        let transport: Box<dyn ClientTransport> = match self.transport {
            Transport::Loopback => {
                Box::new(loopback::LoopbackClient::from_end(self.link(), offer, deadline)?)
            }
            Transport::Rdma => rdma::connect(self.rdma_address(), rdma_source(), offer, deadline)?,
            Transport::RdmaAfterTcp => {
                let offer = Offer { queue_pair: true, ..offer.clone() };
                let stream = tcp::TcpClient::from_stream(self.stream(), &offer, deadline)?;
                mux::upgrade(stream, deadline).map_err(|(_, error)| error)?
            }
            Transport::Tls | Transport::KernelTls => {
                let (client, server) = tcp_pair();
                self.serve(server);
                let offer = Offer { tls: Some(self.transport.client_tls()), ..offer.clone() };
                Box::new(tcp::TcpClient::from_stream(client, &offer, deadline)?)
            }
            _ => Box::new(tcp::TcpClient::from_stream(self.stream(), offer, deadline)?),
        };
        Ok(Client { transport, replies: Vec::new() })
    }

    /// A client of no particular kind.
    pub fn client(&self) -> Client {
        self.connect(&Offer::new("test")).unwrap()
    }

    /// Waits until what the first worker has seen is as wanted, and gives what was looked for.
    pub fn until<T>(&self, what: &str, mut look: impl FnMut(&Seen) -> Option<T>) -> T {
        let (seen, changed) = &*self.workers[0].seen;
        let deadline = Instant::now() + PATIENCE;
        let mut seen = seen.lock().unwrap();
        loop {
            if let Some(found) = look(&seen) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{:?}: waited in vain for {what}: {seen:?}", self.transport);
            (seen, _) = changed.wait_timeout(seen, left).unwrap();
        }
    }

    /// Waits until the n-th connection (from 0) to end has ended, and says why it did.
    pub fn closed(&self, n: usize) -> CloseReason {
        self.until(&format!("close {n}"), |seen| seen.closed.get(n).map(|(_, reason)| reason.clone()))
    }

    /// Waits until no slot is in use and so many connections are left.
    pub fn until_empty(&self, connections: usize) {
        self.until("everything to be given back", |seen| {
            (seen.arena_bytes == 0 && seen.connections == connections).then_some(())
        });
    }

    /// A client that stands by.
    pub fn bystander(&self) -> Client {
        self.connect(&Offer::new(BYSTANDER)).unwrap()
    }

    /// Somebody else is still served.
    pub fn serves_others(&self) {
        self.bystander().works();
    }

    /// A look at every worker's.
    pub fn each_seen(&self, mut look: impl FnMut(&Seen)) {
        self.workers.iter().for_each(|worker| look(&worker.seen.0.lock().unwrap()));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(rdma) = &mut self.rdma {
            rdma.stop.store(true, Ordering::Relaxed);
            rdma.thread.take().map(JoinHandle::join);
        }
        for worker in &mut self.workers {
            worker.sender.send(Mail::Stop);
            let joined = worker.thread.take().map(JoinHandle::join);
            if !std::thread::panicking() {
                assert!(matches!(joined, Some(Ok(()))), "a worker panicked");
            }
        }
    }
}

/// Two connected TCP sockets, the second non-blocking.
pub fn tcp_pair() -> (TcpStream, TcpStream) {
    tcp_pair_at(Ipv4Addr::LOCALHOST)
}

/// The same, between addresses of RDMA devices.
pub fn tcp_pair_by_rdma() -> (TcpStream, TcpStream) {
    tcp_pair_at(rdma_addresses()[0])
}

/// The two ends of a Unix socket: no test asks them what only TCP knows.
fn unix_pair() -> (TcpStream, TcpStream) {
    let (client, server) = UnixStream::pair().unwrap();
    server.set_nonblocking(true).unwrap();
    (OwnedFd::from(client).into(), OwnedFd::from(server).into())
}

fn tcp_pair_at(address: Ipv4Addr) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    client.set_nodelay(true).unwrap();
    server.set_nonblocking(true).unwrap();
    (client, server)
}

// The server's thread
// ---------------------------------------------------------------------------------------------

enum Wires {
    Tcp(Box<tcp::TcpServer>),
    Loopback(loopback::LoopbackServer),
    Rdma(Box<dyn ServerTransport>),
    Any(Box<mux::Mux>),
}

impl Wires {
    fn transport(&mut self) -> &mut dyn ServerTransport {
        match self {
            Self::Tcp(server) => &mut **server,
            Self::Loopback(server) => server,
            Self::Rdma(server) => &mut **server,
            Self::Any(server) => &mut **server,
        }
    }

    fn adopt(&mut self, reactor: &mut Reactor, wire: Wire) {
        match (self, wire) {
            (Self::Tcp(server), Wire::Stream(stream)) => drop(server.adopt(reactor, stream)),
            (Self::Any(server), Wire::Stream(stream)) => {
                server.adopt(reactor, Accepted::Stream(stream)).unwrap();
            }
            (Self::Loopback(server), Wire::Loopback(end)) => drop(server.adopt(reactor, end)),
            (Self::Rdma(server), Wire::Rdma(incoming)) => {
                let adopted = server.accept(reactor, Accepted::Other(incoming));
                if let Err(error) = adopted.expect("it is of this kind") {
                    eprintln!("a connection was not taken over: {error}");
                }
            }
            _ => unreachable!("a server gets what it takes"),
        }
    }
}

struct Handler {
    wires: Wires,
    arena: Arena,
    seen: Arc<(Mutex<Seen>, Condvar)>,
    open: HashMap<ConnectionId, Open>,
    held: HashMap<ConnectionId, Vec<RequestKey>>,
    /// Connections without progress are closed this often; never if None.
    stall_timeout: Option<Duration>,
    /// Requests whose slot is not to be had now.
    waiting: VecDeque<Request>,
    /// Requests whose data has been asked for: the argument of each.
    fetching: HashMap<RequestKey, u64>,
}

struct Open {
    /// One-way messages are not released.
    keeps: bool,
    kept: usize,
    unanswered: Vec<u64>,
    /// How many that may be.
    credits: usize,
    is_bystander: bool,
}

impl Handler {
    fn new(wires: Wires, arena: Arena, seen: Arc<(Mutex<Seen>, Condvar)>) -> Self {
        Self {
            wires,
            arena,
            seen,
            open: HashMap::new(),
            held: HashMap::new(),
            stall_timeout: None,
            waiting: VecDeque::new(),
            fetching: HashMap::new(),
        }
    }

    fn run(&mut self, reactor: &mut Reactor, mail: &reactor::Receiver<Mail>) {
        let mut events = Vec::new();
        let mut wait = Wait::Block;
        let mut stall_check = self.stall_timeout.map(|timeout| Instant::now() + timeout);
        if let Some(at) = stall_check {
            reactor.timer(at, STALL_CHECK);
        }
        loop {
            let happened = self.wires.transport().run_once(reactor, wait, &mut events).unwrap();
            while let Some(mail) = mail.take() {
                match mail {
                    Mail::Adopt(wire) => self.wires.adopt(reactor, wire),
                    Mail::Stop => return,
                }
            }
            events.clear();
            if let (Some(at), Some(timeout)) = (stall_check, self.stall_timeout)
                && Instant::now() >= at
            {
                self.wires.transport().close_stalled(reactor, true);
                let next = Instant::now() + timeout;
                reactor.timer(next, STALL_CHECK);
                stall_check = Some(next);
            }
            let waiting = self.waiting.len();
            for request in std::mem::take(&mut self.waiting) {
                self.begin(reactor, request);
            }
            // Where answers leave with the flush their slots are free again at once.
            wait = if self.waiting.len() < waiting || happened { Wait::Poll } else { Wait::Block };
            while let Some(event) = self.wires.transport().next_event() {
                self.take_in(reactor, event);
            }
            self.wires.transport().flush(reactor);
            self.publish();
        }
    }

    fn publish(&mut self) {
        let (seen, changed) = &*self.seen;
        let mut seen = seen.lock().unwrap();
        let transport = self.wires.transport();
        for &connection in self.open.keys() {
            seen.unsent_bytes_max = seen.unsent_bytes_max.max(transport.unsent_bytes(connection));
        }
        seen.connections = transport.connections();
        match &self.wires {
            Wires::Rdma(server) => seen.rdma = server.counters(),
            Wires::Any(server) => seen.rdma = server.counters(),
            Wires::Tcp(_) | Wires::Loopback(_) => {}
        }
        seen.arena_bytes = self.arena.used_bytes();
        seen.arena_bytes_max = seen.arena_bytes_max.max(seen.arena_bytes);
        seen.waiting = self.waiting.len();
        changed.notify_all();
    }

    fn take_in(&mut self, reactor: &mut Reactor, event: ServerEvent) {
        match event {
            ServerEvent::Opened(id, peer) if peer.name == UNWELCOME => {
                self.wires.transport().reject(reactor, id, libc::EUSERS, "All seats are taken.");
            }
            ServerEvent::Opened(id, peer) => {
                let is_bystander = peer.name == BYSTANDER;
                let credits = peer.grant.credits() as usize;
                let open = Open { keeps: false, kept: 0, unanswered: Vec::new(), credits, is_bystander };
                assert!(self.open.insert(id, open).is_none(), "a connection opens once");
                if !is_bystander {
                    self.seen.0.lock().unwrap().opened.push((id, *peer));
                }
            }
            ServerEvent::Moved(from, to) => {
                let open = self.open.remove(&from).expect("an open connection moves");
                assert!(open.unanswered.is_empty(), "it moves before its first request");
                assert!(self.open.insert(to, open).is_none(), "it gets an id of its own");
            }
            ServerEvent::Closed(id, reason) => {
                let open = self.open.remove(&id);
                self.held.remove(&id);
                self.waiting.retain(|request| request.key.connection != id);
                self.fetching.retain(|key, _| key.connection != id);
                if open.is_none_or(|open| !open.is_bystander) {
                    self.seen.0.lock().unwrap().closed.push((id, reason));
                }
            }
            ServerEvent::Request(request) => {
                let open =
                    self.open.get_mut(&request.key.connection).expect("requests come by open connections");
                assert!(!open.unanswered.contains(&request.key.id), "a request comes once");
                open.unanswered.push(request.key.id);
                assert!(
                    open.unanswered.len() <= open.credits,
                    "the transport let a client exceed its credits"
                );
                if !open.is_bystander {
                    let mut seen = self.seen.0.lock().unwrap();
                    seen.requests += 1;
                    seen.unanswered_max = seen.unanswered_max.max(open.unanswered.len());
                }
                self.begin(reactor, request);
            }
            ServerEvent::Fetched(key, range) => {
                let seed = self.fetching.remove(&key).expect("it was asked for");
                let data = range.bytes();
                let same = data.iter().zip(pattern(seed, range.len)).filter(|(a, b)| **a == *b).count();
                self.answer(reactor, key, Status::OK, same as u64, &[], None);
            }
            ServerEvent::Damaged(key, _) => {
                self.fetching.remove(&key).expect("it was asked for");
                self.answer(reactor, key, Status::DAMAGED, 0, &[], None);
            }
            ServerEvent::OneWay(id, message) => {
                let open = self.open.get_mut(&id).expect("one-way messages come by open connections");
                if open.keeps {
                    open.kept += 1;
                } else {
                    self.wires.transport().release(reactor, id);
                }
                self.seen.0.lock().unwrap().one_ways.push((id, message.to_vec()));
            }
            ServerEvent::Receipt(id, tag) => {
                assert!(self.open.contains_key(&id));
                self.seen.0.lock().unwrap().receipts.push(tag);
            }
            ServerEvent::Refused(id) => {
                assert!(self.open.contains_key(&id));
                self.seen.0.lock().unwrap().refused += 1;
            }
            ServerEvent::Answered(id, answer) => {
                assert!(self.open.contains_key(&id));
                self.seen.0.lock().unwrap().answers.push(answer);
            }
        }
    }

    fn begin(&mut self, reactor: &mut Reactor, request: Request) {
        let word = |at: usize| {
            let bytes = request.body.get(at..at + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().unwrap()))
        };
        let argument = word(8).unwrap_or(0);
        let key = request.key;
        match word(0).unwrap_or(Op::Echo as u64) {
            op if op == Op::Put as u64 => {
                let Some(slot) = self.arena.alloc(request.data_len as usize + 13) else {
                    return self.waiting.push_back(request);
                };
                self.fetching.insert(key, argument);
                if request.data_len == 0 {
                    // There is nothing to fetch.
                    self.fetching.remove(&key);
                    return self.answer(reactor, key, Status::OK, 0, &[], None);
                }
                self.wires.transport().fetch(reactor, key, slot, 13);
            }
            op if op == Op::Get as u64 => {
                let len = request.region_len as usize;
                let Some(mut slot) = self.arena.alloc(len + 5) else {
                    return self.waiting.push_back(request);
                };
                slot.bytes_mut()[5..5 + len].copy_from_slice(&pattern(argument, len));
                let data = SlotRange { slot, start: 5, len };
                self.answer(reactor, key, Status::OK, len as u64, &[], Some(data));
            }
            op if op == Op::Refuse as u64 => {
                let sentence = b"This is not for you; ask somebody else.";
                self.answer(reactor, key, Status::policy(libc::EACCES), 0, sentence, None);
            }
            op if op == Op::Hold as u64 => self.held.entry(key.connection).or_default().push(key),
            op if op == Op::Release as u64 => {
                for (n, held) in self.held.remove(&key.connection).into_iter().flatten().rev().enumerate() {
                    self.answer(reactor, held, Status::OK, n as u64, &[], None);
                }
                self.answer(reactor, key, Status::OK, 0, &[], None);
            }
            op if op == Op::Close as u64 => {
                let text = "The server has had enough. Come back tomorrow.";
                self.wires.transport().close(reactor, key.connection, Status::policy(libc::EPERM), text);
            }
            op if op == Op::Keep as u64 => {
                let open = self.open.get_mut(&key.connection).expect("it has asked");
                let released = open.kept.min(argument as usize);
                open.kept -= released;
                open.keeps = true;
                for _ in 0..released {
                    self.wires.transport().release(reactor, key.connection);
                }
                self.answer(reactor, key, Status::OK, released as u64, &[], None);
            }
            op if op == Op::RefuseOneWay as u64 => {
                self.wires.transport().push(reactor, key.connection, Push::Refuse).unwrap();
                self.answer(reactor, key, Status::OK, 0, &[], None);
            }
            op if op == Op::SendOneWay as u64 => {
                let sent = (0..argument).take_while(|&tag| {
                    let message = OneWay { message: &unsolicited(tag), tag, wants_receipt: true };
                    self.wires.transport().send_one_way(reactor, key.connection, message).is_ok()
                });
                let sent = sent.count() as u64;
                self.answer(reactor, key, Status::OK, sent, &[], None);
            }
            op if op == Op::RequestClient as u64 => {
                let asked = (0..argument).take_while(|&tag| {
                    let question = Push::Request(tag, &unsolicited(tag));
                    self.wires.transport().push(reactor, key.connection, question).is_ok()
                });
                let asked = asked.count() as u64;
                self.answer(reactor, key, Status::OK, asked, &[], None);
            }
            _ => self.answer(reactor, key, Status::OK, request.body.len() as u64, &request.body, None),
        }
    }

    fn answer(
        &mut self,
        reactor: &mut Reactor,
        key: RequestKey,
        status: Status,
        result: u64,
        body: &[u8],
        data: Option<SlotRange>,
    ) {
        if let Some(open) = self.open.get_mut(&key.connection) {
            open.unanswered.retain(|&id| id != key.id);
        }
        // Every other of those that could be filled in place is, if the transport does that.
        if let Some(range) = &data
            && goes_the_short_way(key)
            && (status, result, body) == (Status::OK, range.len as u64, &[])
        {
            let mut fill = |bytes: &mut [u8]| {
                bytes.copy_from_slice(range.bytes());
                true
            };
            if self.wires.transport().respond_filled(key, range.len, &mut self.arena, &mut fill) {
                return self.send_early(reactor, key);
            }
        }
        let response = Response { status, result, body: Body::from(body), data };
        self.wires.transport().respond(reactor, key, response);
        self.send_early(reactor, key);
    }

    /// After some answers all so far leave before the end of the turn, if the transport does that.
    fn send_early(&mut self, reactor: &mut Reactor, key: RequestKey) {
        if (key.id ^ key.id >> 17) & 1 == 0 {
            self.wires.transport().flush_early(reactor);
        }
    }
}

/// Every other request is served without a slot of its own, if the transport does that.
fn goes_the_short_way(key: RequestKey) -> bool {
    (key.id ^ key.id >> 16) & 1 == 0
}

// The client
// ------------------------------------------------------------------------------------------------------

/// A client transport that is easy to drive.
pub struct Client {
    pub transport: Box<dyn ClientTransport>,
    replies: Vec<Reply>,
}

impl Client {
    pub fn over(transport: Box<dyn ClientTransport>) -> Self {
        Self { transport, replies: Vec::new() }
    }

    /// Sends a request, which must be taken.
    pub fn send(&mut self, tag: u64, body: &[u8], bulk: Bulk) {
        self.transport.send(tag, body, bulk, SendOptions::PLAIN).expect("there is a credit");
    }

    /// The same, of a request that has checksums in any case.
    pub fn send_with_crc(&mut self, tag: u64, body: &[u8], bulk: Bulk) {
        let crc = match &bulk {
            Bulk::Out(_) => message::data_crc(&bytes_of(&bulk)),
            _ => 0,
        };
        let options = SendOptions::with_crc(Some(crc));
        self.transport.send(tag, body, bulk, options).expect("there is a credit");
    }

    /// Flushes, and gives the next reply.
    pub fn next(&mut self) -> Reply {
        self.transport.flush();
        let deadline = Instant::now() + PATIENCE;
        while self.replies.is_empty() {
            assert!(Instant::now() < deadline, "no reply came; failure: {:?}", self.transport.failure());
            self.transport.receive(&mut self.replies);
            if self.replies.is_empty() {
                assert!(self.transport.failure().is_none(), "no reply, but {:?}", self.transport.failure());
                self.transport.wait(Some(deadline)).unwrap();
            }
        }
        self.replies.remove(0)
    }

    /// Flushes, and returns the next unsolicited message of the server, or receipt.
    pub fn next_event(&mut self) -> ClientEvent {
        self.transport.flush();
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(event) = self.transport.next_event() {
                return event;
            }
            assert!(Instant::now() < deadline, "no event came; failure: {:?}", self.transport.failure());
            self.transport.wait(Some(deadline)).unwrap();
            self.transport.receive(&mut self.replies);
            self.transport.flush();
        }
    }

    /// Sends a one-way message, which must be taken.
    pub fn push(&mut self, tag: u64, message: &[u8], wants_receipt: bool) {
        self.transport.send_one_way(OneWay { message, tag, wants_receipt }).expect("there is room");
    }

    /// One request and its reply.
    pub fn call(&mut self, body: &[u8], bulk: Bulk) -> Reply {
        self.send(u64::MAX, body, bulk);
        let reply = self.next();
        assert_eq!(reply.tag, u64::MAX);
        reply
    }

    /// Receives until the connection has ended, and gives all replies that came until then.
    pub fn until_failed(&mut self) -> Vec<Reply> {
        let deadline = Instant::now() + PATIENCE;
        while self.transport.failure().is_none() {
            assert!(Instant::now() < deadline, "the connection does not end");
            self.transport.wait(Some(Instant::now() + Duration::from_millis(100))).unwrap();
            self.transport.receive(&mut self.replies);
        }
        self.transport.receive(&mut self.replies);
        assert_eq!(self.transport.outstanding(), 0);
        std::mem::take(&mut self.replies)
    }

    /// Gets `len` bytes and checks each.
    pub fn get(&mut self, seed: u64, len: usize) {
        let reply = self.call(&command(Op::Get, seed), room(len));
        assert!(reply.status.is_ok(), "{reply:?}");
        assert_eq!((reply.result, reply.data_len), (len as u64, len));
        assert!(bytes_of(&reply.bulk) == pattern(seed, len), "data of {len} bytes came over wrong");
    }

    /// Puts `len` bytes; the server checks each.
    pub fn put(&mut self, seed: u64, len: usize) {
        let reply = self.call(&command(Op::Put, seed), data(pattern(seed, len)));
        assert!(reply.status.is_ok(), "{reply:?}");
        assert_eq!(reply.result, len as u64, "data of {len} bytes arrived wrong");
        assert!(bytes_of(&reply.bulk) == pattern(seed, len), "the buffers came back changed");
    }

    /// It is served.
    pub fn works(&mut self) {
        let reply = self.call(&command(Op::Echo, 7), Bulk::None);
        assert_eq!((reply.status, &*reply.body), (Status::OK, &command(Op::Echo, 7)[..]));
        self.put(3, 20_000);
        self.get(4, 20_000);
    }
}

/// Room for data.
pub fn room(len: usize) -> Bulk {
    Bulk::In(Buffers::One(Buffer::Owned(vec![0; len].into())))
}

/// Data to be sent.
pub fn data(bytes: Vec<u8>) -> Bulk {
    Bulk::Out(Buffers::One(Buffer::Owned(bytes.into())))
}

/// The bytes of a bulk's buffers.
pub fn bytes_of(bulk: &Bulk) -> Vec<u8> {
    match bulk {
        Bulk::None => Vec::new(),
        Bulk::In(buffers) | Bulk::Out(buffers) => {
            buffers.slices(0..buffers.len()).flatten().copied().collect()
        }
    }
}
