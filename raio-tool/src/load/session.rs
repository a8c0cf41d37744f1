//! A session as this program has it: one connection, over TCP, with one open file. And how many of them are
//! opened.
//!
//! Each is opened by calls that block, as a program would; a few threads do it at a time, so that the rate
//! does not hang on how far away the server is.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::Scope;
use std::time::{Duration, Instant};

use raio_transport::address::Endpoint;
use raio_transport::channel::{self, Channel, Dialer, OpenFiles, Reopenable, Settings};
use raio_transport::handshake::{ChannelOffer, Offer};
use raio_transport::memory::{Buffer, Buffers};
use raio_transport::message::{self, SessionId};
use raio_transport::protocol::{Command, FileHandle, FileStatus, OPEN_CREATE, OPEN_READ, OPEN_WRITE};
use raio_transport::transport::{Bulk, ClientTransport, Reply, SendOptions, UsedIds};
use raio_transport::{Error, tcp};
use socket2::{Domain, Protocol, Socket, Type};

use super::content;
use super::options::Plan;
use super::tuning::{FILL_BYTES, LINGER_EXTRA, OPENERS};

/// An open session.
pub struct Session {
    /// Its connection.
    pub client: Channel,
    /// Its file.
    pub file: FileHandle,
    /// How long a call may take.
    timeout: Duration,
}

impl Session {
    /// Opens the n-th session of the plan, and its file. Also returns the file's status.
    fn open(plan: &Plan, n: usize, flags: u32) -> Result<(Self, FileStatus), Error> {
        let linger = match plan.reconnect {
            Duration::ZERO => Duration::ZERO,
            window => window + LINGER_EXTRA,
        };
        let offer = Offer {
            session: SessionId::random(),
            channel: (!linger.is_zero()).then_some(ChannelOffer { number: 1, epoch: 1, linger }),
            queue_depth: plan.depth,
            tls: plan.tls.clone(),
            ..Offer::new(format!("raio load[{}]", std::process::id()))
        };
        let source = plan.sources.get(n % plan.sources.len().max(1)).copied();
        let server = plan.server.clone();
        let timeout = plan.open_timeout;
        let dialer: Dialer = Box::new(move |offer, _, deadline| {
            let (hello, server) = (offer.clone(), server.clone());
            channel::waiting(offer, move || {
                let client = match &server {
                    &Endpoint::Ip(address) => {
                        tcp::TcpClient::from_stream(connect(address, source, timeout)?, &hello, deadline)?
                    }
                    unix => tcp::TcpClient::connect(unix.clone(), &hello, deadline)?,
                };
                Ok(Box::new(client) as Box<dyn ClientTransport>)
            })
        });
        let settings = Settings {
            divides: false,
            window: plan.reconnect,
            redo: false,
            connect_timeout: timeout,
            request_timeout: None,
        };
        let files = Arc::<OpenFiles>::default();
        let deadline = Instant::now() + timeout;
        let client =
            Channel::connect(dialer, offer, UsedIds::default(), settings, Arc::clone(&files), deadline)?;
        let mut this = Self { client, file: FileHandle(0), timeout };
        let open = Command::Open { flags, mode: 0o644, path: plan.path.as_bytes() };
        let reply = this.call(&open, Bulk::None)?;
        let status = FileStatus::decode(&reply.body)?;
        this.file = FileHandle(reply.result as u32);
        let path = plan.path.as_bytes().into();
        files.insert(this.file, Reopenable { flags, path, identity: status.identity });
        Ok((this, status))
    }

    /// Opens the plan's first session. Fills the file if that is planned. Also returns the file's size.
    pub fn open_first(plan: &Plan) -> Result<(Self, u64), Error> {
        let fill = if plan.fill { OPEN_WRITE | OPEN_CREATE } else { 0 };
        let (mut this, status) = Self::open(plan, 0, open_flags(plan) | fill)?;
        let mut size = status.size.get();
        if plan.fill {
            let wanted = plan.size.unwrap_or(size);
            this.fill(wanted)?;
            size = size.max(wanted);
        }
        Ok((this, size))
    }

    /// Writes the file's first `size` bytes.
    fn fill(&mut self, size: u64) -> Result<(), Error> {
        let piece = u64::from(self.client.grant().data_bytes_max).min(FILL_BYTES);
        let mut offset = 0;
        while offset < size {
            let length = piece.min(size - offset) as u32;
            let mut bytes = vec![0; length as usize];
            content::fill(offset, &mut bytes);
            let data = Bulk::Out(Buffers::One(Buffer::Owned(bytes.into())));
            self.call(&Command::Write { file: self.file, offset, length }, data)?;
            offset += u64::from(length);
        }
        Ok(())
    }

    /// Sends a command and waits for its answer.
    fn call(&mut self, command: &Command<'_>, bulk: Bulk) -> Result<Reply, Error> {
        let mut body = Vec::new();
        command.encode(&mut body);
        let timeout = self.timeout;
        let lost = |client: &Channel| match client.failure() {
            Some(Error::Closed { errno, text }) => Error::Closed { errno: *errno, text: text.clone() },
            Some(error) => Error::Closed { errno: error.errno(), text: error.to_string() },
            None => {
                let text = format!("the server did not answer in {} s; see its log", timeout.as_secs_f64());
                Error::Closed { errno: libc::ETIMEDOUT, text }
            }
        };
        if self.client.send(0, &body, bulk, SendOptions::CONTROL).is_err() {
            return Err(lost(&self.client));
        }
        self.client.flush();
        let mut replies = Vec::new();
        let deadline = Instant::now() + timeout;
        loop {
            self.client.receive(&mut replies);
            if let Some(reply) = replies.pop() {
                if reply.status.is_ok() {
                    return Ok(reply);
                }
                if self.client.failure().is_some() {
                    return Err(lost(&self.client));
                }
                let errno = std::io::Error::from_raw_os_error(reply.status.errno);
                return Err(Error::io(message::text(&reply.body).trim_end_matches('.'), errno));
            }
            if self.client.failure().is_some() || Instant::now() >= deadline {
                return Err(lost(&self.client));
            }
            match self.client.wait(Some(deadline)) {
                Err(error) if error.errno() != libc::EINTR => return Err(error),
                _ => {}
            }
        }
    }
}

fn open_flags(plan: &Plan) -> u32 {
    let (reads, writes) = plan.pattern.directions();
    (if reads { OPEN_READ } else { 0 }) | (if writes { OPEN_WRITE } else { 0 })
}

fn connect(server: SocketAddr, source: Option<IpAddr>, timeout: Duration) -> Result<Socket, Error> {
    let context = || match source {
        Some(source) => format!("Cannot connect to {server} from {source}"),
        None => format!("Cannot connect to {server}"),
    };
    let connect = || {
        let socket = Socket::new(Domain::for_address(server), Type::STREAM, Some(Protocol::TCP))?;
        if let Some(source) = source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        socket.connect_timeout(&server.into(), timeout)?;
        Ok(socket)
    };
    connect().map_err(|error: std::io::Error| {
        let remedy = match error.raw_os_error() {
            Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL) => {
                "; if its ports are used up give more addresses with --source, each must be one of this \
                 machine's"
            }
            Some(libc::EMFILE | libc::ENFILE) => "; raise the limit on open files with `ulimit -n`",
            _ => "; check that raio_server listens there, and that no firewall is in between",
        };
        Error::io(context() + remedy, error)
    })
}

/// Opens all of the plan's sessions but the first in threads of `scope`, at the plan's rate. Each comes,
/// opened or not, by the receiver; one that failed for any other reason than that the server rejected it is
/// the last that is tried.
pub fn open_all<'scope>(
    scope: &'scope Scope<'scope, '_>,
    plan: &'scope Plan,
    next: &'scope AtomicUsize,
    is_over: &'scope AtomicBool,
) -> Receiver<Result<Session, Error>> {
    let (sender, receiver) = mpsc::channel();
    let started = Instant::now();
    for _ in 0..OPENERS.min(plan.sessions) {
        let sender = sender.clone();
        scope.spawn(move || open_some(plan, next, is_over, started, &sender));
    }
    receiver
}

fn open_some(
    plan: &Plan,
    next: &AtomicUsize,
    is_over: &AtomicBool,
    started: Instant,
    sender: &Sender<Result<Session, Error>>,
) {
    while !is_over.load(Ordering::Relaxed) {
        let n = next.fetch_add(1, Ordering::Relaxed);
        if n >= plan.sessions {
            return;
        }
        if plan.rate > 0 {
            let due = started + Duration::from_secs_f64(n as f64 / f64::from(plan.rate));
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        let opened = Session::open(plan, n, open_flags(plan));
        if matches!(&opened, Err(error) if !matches!(error, Error::Rejected { .. })) {
            is_over.store(true, Ordering::Relaxed);
        }
        if sender.send(opened.map(|(session, _)| session)).is_err() {
            return;
        }
    }
}
