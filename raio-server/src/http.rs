//! A small server of HTTP/1.1, for operators and what watches the server: over TCP (`--http`), and over a
//! Unix socket that nobody but the operator may use ([`Access::Admin`]).
//!
//! It is one thread, which waits for all its sockets with poll(2), and whom no worker ever waits for. All that
//! a client can cause has a limit: connections, the bytes of a request, the time of each step. What the
//! requests mean is decided by a [`Site`].

mod connection;
mod request;
mod response;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use raio_transport::credentials::Credentials;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use crate::hand_over::is_trusted;
use crate::log;
use crate::tuning::http::{ACCEPT_RETRY, ADMIN_CONNECTIONS_MAX, CONNECTIONS_MAX, STREAMS_MAX};
use connection::{Connection, Over};
use request::{Head, is_our_name};
pub use response::{Answer, Later, Next, Parts, Response};

/// What a client may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// What everybody may know who reaches the server.
    Public,
    /// Who its clients are, and what they do: the client has the token.
    Private,
    /// Everything: the client is of a user who may stop the server, too.
    Admin,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Its method, in capitals.
    pub method: &'a str,
    /// What it is for, such as `/metrics`.
    pub path: &'a str,
    /// What comes after a `?` behind that.
    query: &'a str,
    /// What its client may have.
    pub access: Access,
    /// Of the user with this number, over the admin socket.
    user: Option<u32>,
    /// When it was read.
    pub now: Instant,
}

impl<'a> Request<'a> {
    /// Who asks, in words.
    pub fn user(&self) -> String {
        self.user.map_or_else(|| "an unknown user".to_owned(), |uid| format!("user {uid}"))
    }

    /// The value of a parameter, as it is written.
    pub fn parameter(&self, name: &str) -> Option<&'a str> {
        self.query.split('&').find_map(|pair| match pair.split_once('=') {
            Some((key, value)) if key == name => Some(value),
            _ => None,
        })
    }
}

/// What there is to ask for.
pub trait Site: Send {
    /// Decides what becomes of a request. It must not wait.
    fn answer(&self, request: &Request<'_>) -> Answer;
}

/// The secret by which a client may have [`Access::Private`] over TCP. Only its hash is kept, and hashes are
/// compared in constant time.
#[derive(Clone, Debug)]
pub struct Token(blake3::Hash);

impl Token {
    /// Of this text.
    pub fn new(text: &str) -> Self {
        Self(blake3::hash(text.as_bytes()))
    }

    fn is_in(&self, authorization: &str) -> bool {
        let Some((scheme, token)) = authorization.split_once(' ') else { return false };
        scheme.eq_ignore_ascii_case("bearer") && Self::new(token.trim_ascii_start()).0 == self.0
    }
}

/// Where the server listens, and to whom.
#[derive(Debug, Default)]
pub struct Sockets {
    /// Listening sockets of TCP.
    pub tcp: Vec<Arc<OwnedFd>>,
    /// The listening Unix socket.
    pub admin: Option<Arc<OwnedFd>>,
    /// Whose processes may connect to it.
    pub users: Vec<u32>,
    /// By which names clients know the server, beside its addresses.
    pub names: Vec<String>,
    /// Who has it may have what is private.
    pub token: Option<Token>,
}

/// Has the server look again whether what it waits for is there. For any thread.
#[derive(Clone, Debug)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// For one server.
    pub fn new() -> rustix::io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// See [`Waker`].
    pub fn wake(&self) {
        let _ = rustix::io::write(&*self.0, &1_u64.to_ne_bytes());
    }
}

/// The server, to other threads. It ends with the process.
#[derive(Clone, Debug)]
pub struct Handle {
    waker: Waker,
    is_closed: Arc<AtomicBool>,
}

impl Handle {
    /// No more connections are accepted: another process does so. Those that there are go on.
    pub fn stop_accepting(&self) {
        self.is_closed.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// Starts the thread.
pub fn start(sockets: Sockets, site: impl Site + 'static, waker: Waker) -> std::io::Result<Handle> {
    let handle = Handle { waker: waker.clone(), is_closed: Arc::default() };
    let mut server = Server::new(sockets, site, waker, Arc::clone(&handle.is_closed));
    let run = move || {
        loop {
            server.run_once();
        }
    };
    std::thread::Builder::new().name("raio-http".into()).spawn(run)?;
    Ok(handle)
}

struct Server<S> {
    sockets: Sockets,
    site: S,
    waker: Waker,
    is_closed: Arc<AtomicBool>,
    connections: Vec<Connection>,
    /// Nothing can be accepted before.
    accepts_from: Instant,
}

impl<S: Site> Server<S> {
    fn new(sockets: Sockets, site: S, waker: Waker, is_closed: Arc<AtomicBool>) -> Self {
        Self { sockets, site, waker, is_closed, connections: Vec::new(), accepts_from: Instant::now() }
    }

    /// Sleeps until there is something to do, and does it.
    fn run_once(&mut self) {
        let (is_woken, ready) = self.wait();
        let now = Instant::now();
        if is_woken {
            self.connections.iter_mut().for_each(|connection| connection.wake(now));
        }
        self.step(&ready, now);
        if self.is_closed.load(Ordering::Acquire) {
            self.sockets.tcp.clear();
            self.sockets.admin = None;
        } else if now >= self.accepts_from {
            self.accept(now);
        }
    }

    /// Returns whether the server was woken, and what has happened to each connection.
    fn wait(&self) -> (bool, Vec<PollFlags>) {
        let now = Instant::now();
        let listening = self.sockets.tcp.iter().chain(&self.sockets.admin);
        let is_accepting = now >= self.accepts_from;
        let mut fds = vec![PollFd::new(&*self.waker.0, PollFlags::IN)];
        fds.extend(self.connections.iter().map(Connection::poll_fd));
        if is_accepting {
            fds.extend(listening.map(|socket| PollFd::new(&**socket, PollFlags::IN)));
        }
        let due = self.connections.iter().map(Connection::due).min();
        let due = due.into_iter().chain((!is_accepting).then_some(self.accepts_from)).min();
        let timeout = due.map(|due| due.saturating_duration_since(now));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let polled = poll(&mut fds, timeout.as_ref());
        debug_assert!(matches!(polled, Ok(_) | Err(Errno::INTR | Errno::NOMEM)), "{polled:?}");
        let is_woken = !fds[0].revents().is_empty();
        if is_woken {
            let _ = rustix::io::read(self.waker.0.as_fd(), &mut [0; 8]);
        }
        let ready = fds[1..=self.connections.len()].iter().map(PollFd::revents).collect();
        (is_woken, ready)
    }

    /// Goes on with those connections to which something has happened, or that are due.
    fn step(&mut self, ready: &[PollFlags], now: Instant) {
        let (sockets, site) = (&self.sockets, &self.site);
        let mut streams = self.connections.iter().filter(|it| !it.is_admin && it.is_streaming()).count();
        let mut ready = ready.iter().copied();
        self.connections.retain_mut(|connection| {
            let ready = ready.next().unwrap_or(PollFlags::empty());
            if ready.is_empty() && now < connection.due() {
                return true;
            }
            let is_gone = ready.intersects(PollFlags::HUP | PollFlags::ERR);
            let (is_admin, user) = (connection.is_admin, connection.user);
            let answer = |head: &Head<'_>| match answer(sockets, site, head, is_admin, user, now) {
                Answer::Stream(..) if !is_admin && streams >= STREAMS_MAX => {
                    Answer::Now(Response::error(503, "Too many clients are sent events. Close one of them."))
                }
                Answer::Stream(content_type, parts) => {
                    streams += 1;
                    Answer::Stream(content_type, parts)
                }
                answer => answer,
            };
            match connection.step(now, is_gone, answer) {
                Ok(()) => true,
                Err(Over) => false,
            }
        });
    }

    /// Accepts a connection of each socket; there may be more: then poll(2) comes back at once.
    fn accept(&mut self, now: Instant) {
        let tcp = self.sockets.tcp.iter().map(|socket| (Arc::clone(socket), false));
        let admin = self.sockets.admin.iter().map(|socket| (Arc::clone(socket), true));
        for (socket, is_admin) in tcp.chain(admin).collect::<Vec<_>>() {
            match accept_with(&*socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(connection) => self.take(connection, is_admin, now),
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => {
                    if log::permit(None, "HTTP connections that cannot be accepted") {
                        tracing::warn!(
                            "Cannot accept a connection of HTTP: {errno}. Raise the limit on open files with \
                             `ulimit -n` or LimitNOFILE=."
                        );
                    }
                    self.accepts_from = now + ACCEPT_RETRY;
                }
            }
        }
    }

    fn take(&mut self, socket: OwnedFd, is_admin: bool, now: Instant) {
        if is_admin && let Err(why) = is_trusted(&socket, &self.sockets.users) {
            if log::permit(None, "connections to the admin socket that were rejected") {
                tracing::warn!(
                    "A connection to the admin socket was closed: {why}, and not of root or of this server's \
                     user."
                );
            }
            return;
        }
        let max = if is_admin { ADMIN_CONNECTIONS_MAX } else { CONNECTIONS_MAX };
        if self.connections.iter().filter(|it| it.is_admin == is_admin).count() >= max {
            let idle = self.connections.iter().enumerate();
            let idle = idle.filter(|(_, it)| it.is_admin == is_admin && !it.is_streaming());
            let Some((at, _)) = idle.min_by_key(|(_, it)| it.idle_since()) else { return };
            self.connections.remove(at);
        }
        let user = if is_admin { Credentials::of_peer(&socket).ok().map(|peer| peer.uid) } else { None };
        let connection = Connection::new(socket, is_admin, now).of_user(user);
        self.connections.push(connection);
    }
}

/// Decides what becomes of a request.
fn answer(
    sockets: &Sockets,
    site: &impl Site,
    head: &Head<'_>,
    is_admin: bool,
    user: Option<u32>,
    now: Instant,
) -> Answer {
    let Head { method, path, query, .. } = *head;
    if !is_admin && head.host.is_some_and(|host| !is_our_name(host, &sockets.names)) {
        return Answer::Now(Response::error(
            421,
            "This server does not have the name that the header Host says. Use its IP address, or name it \
             with --http-host.",
        ));
    }
    let has_token = || match (&sockets.token, head.authorization) {
        (Some(token), Some(authorization)) => token.is_in(authorization),
        _ => false,
    };
    let access = if is_admin {
        Access::Admin
    } else if has_token() {
        Access::Private
    } else {
        Access::Public
    };
    site.answer(&Request { method, path, query, access, user, now })
}
