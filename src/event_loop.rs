//! An event loop with its transport, for a program that embeds the message layer: one call, one iteration.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use raio_transport::{Status, event_loop::EventLoop, handshake::Policy, reactor::Wait, tcp};
//! # use raio_transport::transport::{Body, Response, SendOptions, ServerEvent};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut server = EventLoop::new(tcp::TcpServer::new(0, Arc::new(Policy::default())))?;
//! server.listen(tcp::listen("127.0.0.1:0".parse::<std::net::SocketAddr>()?)?.0);
//! loop {
//!     server.run_once(Wait::Block)?;
//!     while let Some(event) = server.next_event() {
//!         if let ServerEvent::Request(request) = event {
//!             let body = Body::from(&b"Hello."[..]);
//!             server.respond(request.key, Response { status: Status::OK, result: 0, body, data: None });
//!         }
//!     }
//! }
//! # }
//! ```

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use crate::error::{Error, Status};
use crate::memory::{Arena, Slot};
use crate::reactor::{Config, Event, File, Op, OpId, Payload, Reactor, TimerId, Token, Wait, Waker};
use crate::transport::{
    Accepted, AcceptedStream, ConnectionId, NotPushed, Push, RequestKey, Response, ServerEvent,
    ServerTransport,
};

/// The owner number of the listeners' operations.
const LISTENERS: u8 = 0xfe;

/// A reactor and a server's transport, or a set of them. See the module documentation.
pub struct EventLoop<T> {
    reactor: Reactor,
    transport: T,
    listeners: Vec<File>,
    events: Vec<Event>,
    others: VecDeque<Event>,
    /// The caller has not yet taken all events of the last iteration.
    has_more: bool,
}

impl<T: ServerTransport> EventLoop<T> {
    /// An event loop of this thread, with the default configuration.
    pub fn new(transport: T) -> io::Result<Self> {
        Ok(Self::with(Reactor::new(&Config::default())?, transport))
    }

    /// The same with a reactor of the caller's, which the transport may have been made with.
    pub fn with(reactor: Reactor, transport: T) -> Self {
        Self {
            reactor,
            transport,
            listeners: Vec::new(),
            events: Vec::new(),
            others: VecDeque::new(),
            has_more: false,
        }
    }

    /// Accepts all connections at this listening, non-blocking socket: see [`crate::tcp::listen`].
    pub fn listen(&mut self, listener: OwnedFd) {
        let listener = self.reactor.file(listener);
        self.listeners.push(listener);
        self.accept(self.listeners.len() - 1);
    }

    fn accept(&mut self, at: usize) {
        let token = Token { owner: LISTENERS, value: at as u64 };
        self.reactor.submit(token, Op::Accept { listener: self.listeners[at].clone() });
    }

    /// Takes over a connection that somebody else has accepted; its handshake is still to come.
    pub fn adopt(&mut self, incoming: Accepted) -> Result<ConnectionId, Error> {
        let kind = || Error::Unsupported("The connection is not of this server's transport.".into());
        self.transport.accept(&mut self.reactor, incoming).unwrap_or_else(|_| Err(kind()))
    }

    /// Runs one iteration: sends all responses that were given since the last one, submits what was asked
    /// for, waits as `wait` says until something has happened, and takes that in. Then take
    /// [`EventLoop::next_event`] until there is none; while there is one, this does not wait. Returns whether
    /// anything happened.
    pub fn run_once(&mut self, wait: Wait) -> io::Result<bool> {
        self.transport.flush(&mut self.reactor);
        let wait = if self.has_more { Wait::Poll } else { wait };
        self.has_more = true;
        let mut happened = self.transport.run_once(&mut self.reactor, wait, &mut self.events)?;
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            if event.token.owner != LISTENERS {
                self.others.push_back(event);
                continue;
            }
            // What cannot be accepted, for want of descriptors say, is tried again by its peer.
            self.accept(event.token.value as usize);
            if let Payload::Fd(stream) = event.payload {
                happened = true;
                let _ = self.adopt(Accepted::Stream(AcceptedStream::new(stream)));
            }
        }
        self.events = events;
        Ok(happened)
    }

    /// The next thing that has happened to a connection.
    pub fn next_event(&mut self) -> Option<ServerEvent> {
        let event = self.transport.next_event();
        self.has_more = event.is_some();
        event
    }

    /// The next event of an operation or timer that is the caller's: [`EventLoop::submit`].
    pub fn next_other(&mut self) -> Option<Event> {
        self.others.pop_front()
    }

    /// Has the data of a request brought into `slot[start..]`: [`ServerTransport::fetch`].
    pub fn fetch(&mut self, request: RequestKey, slot: Slot, start: usize) {
        self.transport.fetch(&mut self.reactor, request, slot, start);
    }

    /// Answers a request: [`ServerTransport::respond`].
    pub fn respond(&mut self, request: RequestKey, response: Response) {
        self.transport.respond(&mut self.reactor, request, response);
    }

    /// Sends an unsolicited message: [`ServerTransport::push`].
    pub fn push(&mut self, connection: ConnectionId, push: Push<'_>) -> Result<(), NotPushed> {
        self.transport.push(&mut self.reactor, connection, push)
    }

    /// Is done with a one-way message: [`ServerTransport::release`].
    pub fn release(&mut self, connection: ConnectionId) {
        self.transport.release(&mut self.reactor, connection);
    }

    /// Rejects a client that has just been reported as opened: [`ServerTransport::reject`].
    pub fn reject(&mut self, connection: ConnectionId, errno: i32, text: &str) {
        self.transport.reject(&mut self.reactor, connection, errno, text);
    }

    /// Ends a connection: [`ServerTransport::close`].
    pub fn close(&mut self, connection: ConnectionId, status: Status, text: &str) {
        self.transport.close(&mut self.reactor, connection, status, text);
    }

    /// Connections now, those in their handshake among them.
    pub fn connections(&self) -> usize {
        self.transport.connections()
    }

    /// Registers an arena with the ring: [`Reactor::register_arena`].
    pub fn register_arena(&mut self, arena: &Arena) -> io::Result<()> {
        self.reactor.register_arena(arena)
    }

    /// Ends a wait from another thread.
    pub fn waker(&self) -> Waker {
        self.reactor.waker()
    }

    /// Takes a file for [`EventLoop::submit`].
    pub fn file(&mut self, fd: impl Into<Arc<OwnedFd>>) -> File {
        self.reactor.file(fd)
    }

    /// Begins an operation of the caller's own, whose end is an [`EventLoop::next_other`].
    ///
    /// # Panics
    /// If the token's owner is the transport's, or 254, which is for listeners.
    pub fn submit(&mut self, token: Token, op: Op) -> OpId {
        self.assert_others(token);
        self.reactor.submit(token, op)
    }

    /// Sets a timer of the caller's own.
    ///
    /// # Panics
    /// As [`EventLoop::submit`].
    pub fn timer(&mut self, at: Instant, token: Token) -> TimerId {
        self.assert_others(token);
        self.reactor.timer(at, token)
    }

    fn assert_others(&self, token: Token) {
        let bit = 1u64.checked_shl(token.owner.into()).unwrap_or_default();
        let is_others = self.transport.owners() & bit == 0 && token.owner != LISTENERS;
        assert!(is_others, "the owner number {} is in use", token.owner);
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use super::*;
    use crate::handshake::{Offer, Policy};
    use crate::tcp;
    use crate::transport::{Body, Bulk, ClientTransport};

    const PATIENCE: Duration = Duration::from_secs(30);

    fn server() -> (EventLoop<tcp::TcpServer>, SocketAddr) {
        let mut server = EventLoop::new(tcp::TcpServer::new(0, Arc::new(Policy::default()))).unwrap();
        let (listener, address) = tcp::listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        server.listen(listener);
        (server, address.ip().unwrap())
    }

    /// A client that sends so many requests, and waits for the answers to all.
    fn client(address: SocketAddr, count: u64) -> std::thread::JoinHandle<usize> {
        std::thread::spawn(move || {
            let deadline = Instant::now() + PATIENCE;
            let mut client = tcp::TcpClient::connect(address, &Offer::new("test"), deadline).unwrap();
            for tag in 0..count {
                client.send(tag, b"command.", Bulk::None, crate::transport::SendOptions::PLAIN).unwrap();
            }
            client.flush();
            let mut replies = Vec::new();
            while replies.len() < count as usize && Instant::now() < deadline {
                client.wait(Some(deadline)).unwrap();
                client.receive(&mut replies);
            }
            replies.len()
        })
    }

    fn respond(server: &mut EventLoop<tcp::TcpServer>, request: RequestKey) {
        let response = Response { status: Status::OK, result: 0, body: Body::default(), data: None };
        server.respond(request, response);
    }

    /// Serves until the last connection has gone; takes at most so many events in an iteration.
    fn serve(server: &mut EventLoop<tcp::TcpServer>, events_max: usize) {
        let mut is_closed = false;
        while !is_closed {
            server.run_once(Wait::Block).unwrap();
            for _ in 0..events_max {
                match server.next_event() {
                    Some(ServerEvent::Request(request)) => respond(server, request.key),
                    Some(ServerEvent::Closed(..)) => is_closed = true,
                    Some(_) => {}
                    None => break,
                }
            }
        }
    }

    #[test]
    fn whoever_only_runs_it_and_answers_serves() {
        let (mut server, address) = server();
        let client = client(address, 100);
        serve(&mut server, usize::MAX);
        assert_eq!(client.join().unwrap(), 100);
    }

    #[test]
    fn events_that_were_not_taken_are_not_lost_and_not_waited_behind() {
        let (mut server, address) = server();
        let client = client(address, 100);
        serve(&mut server, 1);
        assert_eq!(client.join().unwrap(), 100);
    }

    #[test]
    fn timers_of_the_callers_are_others() {
        let (mut server, _) = server();
        let token = Token { owner: 7, value: 3 };
        server.timer(Instant::now(), token);
        while server.run_once(Wait::Block).is_ok() {
            if let Some(event) = server.next_other() {
                assert_eq!(event.token, token);
                return;
            }
        }
    }
}
