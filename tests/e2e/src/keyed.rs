//! A server of one file in this process, for clients with keys: TLS and TCP are the real ones, and it knows
//! just enough commands for a session to begin, to work, and to go on.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use raio_transport::connecting::Connecting;
use raio_transport::event_loop::EventLoop;
use raio_transport::handshake::{Identity, Policy};
use raio_transport::keys::{PublicKey, SecretKey};
use raio_transport::memory::{Arena, SlotRange};
use raio_transport::protocol::{Command, FileStatus, OPERATION_FEATURES};
use raio_transport::reactor::{Wait, Waker};
use raio_transport::tcp::{Accepting, TcpServer};
use raio_transport::tls::ServerTls;
use raio_transport::transport::{Accepted, AcceptedStream, Body, Request, Response, ServerEvent};
use raio_transport::{Error, Status};
use zerocopy::IntoBytes;

use crate::PATIENCE;

const FILE_BYTES: u64 = 64 << 10;

/// A server with a key, or one without, which serves in the clear. Its connections end when it is dropped.
pub struct KeyedServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    policy: Arc<Policy>,
    is_over: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// Who has begun a session, or a connection of one.
    clients: Vec<Identity>,
    /// Why others have not.
    refused: Vec<String>,
    streams: Vec<TcpStream>,
}

impl KeyedServer {
    /// One that has this key, and takes clients that have one of those.
    pub fn start(key: &SecretKey, clients: &[PublicKey]) -> Self {
        Self::start_at((Ipv4Addr::LOCALHOST, 0).into(), Some((key, clients)))
    }

    /// One at this address; None: in the clear.
    pub fn start_at(address: SocketAddr, keys: Option<(&SecretKey, &[PublicKey])>) -> Self {
        let listener = bind(address);
        listener.set_nonblocking(true).expect("a socket");
        let address = listener.local_addr().expect("a socket");
        let tls = keys.map(|(key, clients)| {
            let clients = clients.to_vec();
            ServerTls::new(key, move |client| clients.contains(client))
        });
        let policy =
            Policy { features: Policy::default().features | OPERATION_FEATURES, ..Policy::default() };
        let policy = Arc::new(policy);
        let shared = Arc::new(Shared { policy, is_over: AtomicBool::new(false), seen: Mutex::default() });
        let (sender, receiver) = channel();
        let (send_waker, wakers) = channel();
        let worker = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || work(&shared, &receiver, &send_waker)
        });
        let waker: Waker = wakers.recv().expect("it runs");
        let acceptor = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept_all(&shared, &listener, tls.as_ref(), &sender, &waker)
        });
        Self { address, shared, threads: vec![acceptor, worker] }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it listens, for a client by TCP.
    pub fn url(&self) -> String {
        format!("raio+tcp://{}", self.address)
    }

    /// Who has come so far, a connection each.
    pub fn clients(&self) -> Vec<Identity> {
        self.shared.seen.lock().unwrap().clients.clone()
    }

    /// Waits until it has refused somebody, and returns why.
    pub fn refusal(&self) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(why) = self.shared.seen.lock().unwrap().refused.pop() {
                return why;
            }
            assert!(Instant::now() < deadline, "nobody is refused");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Breaks all connections.
    pub fn cut(&self) {
        for stream in self.shared.seen.lock().unwrap().streams.drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for KeyedServer {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.cut();
    }
}

/// Listens at an address. An earlier listener there may live on for a moment after it was closed: in a child
/// process that another test has forked, until that runs its program.
fn bind(address: SocketAddr) -> TcpListener {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match TcpListener::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            bound => return bound.expect("the port is free"),
        }
    }
}

fn accept_all(
    shared: &Shared,
    listener: &TcpListener,
    tls: Option<&ServerTls>,
    sender: &Sender<AcceptedStream>,
    waker: &Waker,
) {
    while !shared.is_over.load(Ordering::Relaxed) {
        let Ok((stream, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        };
        stream.set_nonblocking(true).expect("a socket");
        shared.seen.lock().unwrap().streams.push(stream.try_clone().expect("a descriptor"));
        let accepted = match tls {
            Some(tls) => shake_hands(shared, stream, tls),
            None => Ok(AcceptedStream::new(OwnedFd::from(stream))),
        };
        match accepted {
            Ok(stream) => sender.send(stream).expect("the worker runs"),
            Err(error) => shared.seen.lock().unwrap().refused.push(error.to_string()),
        }
        waker.wake();
    }
    waker.wake();
}

fn shake_hands(shared: &Shared, stream: TcpStream, tls: &ServerTls) -> Result<AcceptedStream, Error> {
    let deadline = Instant::now() + PATIENCE;
    let mut accepting = Accepting::new(
        AcceptedStream::new(OwnedFd::from(stream)),
        tls,
        Arc::clone(&shared.policy),
        deadline,
    )?;
    loop {
        if let Some(outcome) = accepting.step(Instant::now()) {
            return outcome;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn work(shared: &Shared, receiver: &Receiver<AcceptedStream>, waker: &Sender<Waker>) {
    let server = TcpServer::new(0, Arc::clone(&shared.policy));
    let mut server = EventLoop::new(server).expect("an event loop");
    let mut arena = Arena::new(1 << 20, FILE_BYTES as usize).expect("memory");
    waker.send(server.waker()).expect("it waits for that");
    while !shared.is_over.load(Ordering::Relaxed) {
        for stream in receiver.try_iter() {
            server.adopt(Accepted::Stream(stream)).expect("it is a stream");
        }
        server.run_once(Wait::Block).expect("it runs");
        while let Some(event) = server.next_event() {
            match event {
                ServerEvent::Opened(_, peer) => shared.seen.lock().unwrap().clients.push(peer.identity),
                ServerEvent::Request(request) => {
                    let response = answer(&request, &mut arena);
                    server.respond(request.key, response);
                }
                _ => {}
            }
        }
    }
}

/// Answers a command on the one file, whatever it is called. Channels of connections that have broken are
/// not known any more.
fn answer(request: &Request, arena: &mut Arena) -> Response {
    let mut response = Response { status: Status::OK, result: 0, body: Body::default(), data: None };
    match Command::decode(&request.body) {
        Ok(Command::Open { .. } | Command::Reopen { .. } | Command::Stat(_)) => {
            let status = FileStatus { size: FILE_BYTES.into(), identity: [7; 16], ..FileStatus::default() };
            response.result = 1;
            response.body = Body::from(status.as_bytes());
        }
        Ok(Command::Read { offset, length, .. }) => {
            let length = FILE_BYTES.saturating_sub(offset).min(length.into()) as usize;
            response.result = length as u64;
            response.data = arena.alloc(length).map(|slot| SlotRange { slot, start: 0, len: length });
        }
        Ok(Command::Fsync { .. } | Command::Close(_)) => {}
        Ok(Command::Outcome { .. }) => response.status = Status::storage(libc::ESTALE),
        other => panic!("{other:?}"),
    }
    response
}
