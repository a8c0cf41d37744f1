//! How a connection over TCP is made: the socket connects, TLS shakes hands if it is used, the hello goes
//! out, the welcome comes in, each as far as the kernel takes or has it.

use std::io::{self, IoSlice, Read};
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use socket2::Socket;

use super::super::new_socket;
use super::{STAGING_BYTES, TcpClient, abort_on_close, send};
use crate::address::Endpoint;
use crate::client::Core;
use crate::connecting::{Awaited, Connecting};
use crate::error::{Error, Violation};
use crate::handshake::{Grant, Offer};
use crate::memory::process;
use crate::message::Parsed;
use crate::records::Records;
use crate::tls::{self, ClientTls};
use crate::tuning::{TLS_RECEIVE_BYTES as SECURING_BYTES, UNIX_BACKLOG_RETRY as BACKLOG_RETRY};

/// A connection over TCP that is being made.
#[derive(Debug)]
pub struct TcpDial {
    offer: Offer,
    deadline: Instant,
    state: State,
}

#[derive(Debug)]
enum State {
    /// There is no socket, until the server may have room for one.
    Unopened(Endpoint, Option<Instant>),
    Connecting(Socket, Endpoint),
    Connected(Socket),
    Securing(Securing),
    ShakingHands(Handshake),
    Over,
}

/// The handshake of TLS.
#[derive(Debug)]
struct Securing {
    stream: Socket,
    handshake: tls::Handshake,
}

/// A handshake over a stream.
#[derive(Debug)]
struct Handshake {
    stream: Socket,
    records: Records,
    hello: Vec<u8>,
    /// How much of the hello has been sent.
    sent: usize,
    staging: Box<[u8]>,
    /// How much of `staging` was received, opened.
    end: usize,
}

impl TcpDial {
    /// Connects to the server at `endpoint` and shakes hands, by `deadline`. The first step begins.
    pub fn new(endpoint: impl Into<Endpoint>, offer: &Offer, deadline: Instant) -> Self {
        Self { offer: offer.clone(), deadline, state: State::Unopened(endpoint.into(), None) }
    }

    /// Shakes hands over a stream socket that is connected, by `deadline`.
    pub fn over(stream: impl Into<Socket>, offer: &Offer, deadline: Instant) -> Self {
        Self { offer: offer.clone(), deadline, state: State::Connected(stream.into()) }
    }

    fn go_on(&mut self, now: Instant) -> Result<Option<TcpClient>, Error> {
        loop {
            self.state = match std::mem::replace(&mut self.state, State::Over) {
                State::Unopened(endpoint, at) if at.is_some_and(|at| now < at) => {
                    self.state = State::Unopened(endpoint, at);
                    return Ok(None);
                }
                State::Unopened(endpoint, _) => match open(&endpoint) {
                    Ok(socket) => State::Connecting(socket, endpoint),
                    // The queue of a Unix socket is full. Nothing tells when that is over.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        if now >= self.deadline {
                            return Err(cannot_connect(&endpoint, error));
                        }
                        State::Unopened(endpoint, Some((now + BACKLOG_RETRY).min(self.deadline)))
                    }
                    Err(error) => return Err(cannot_connect(&endpoint, error)),
                },
                State::Connecting(socket, endpoint) => match is_connected(&socket) {
                    Ok(true) => State::Connected(socket),
                    Ok(false) if now >= self.deadline => {
                        return Err(cannot_connect(&endpoint, io::ErrorKind::TimedOut.into()));
                    }
                    Ok(false) => {
                        self.state = State::Connecting(socket, endpoint);
                        return Ok(None);
                    }
                    Err(error) => return Err(cannot_connect(&endpoint, error)),
                },
                State::Connected(stream) => {
                    set_up(&stream).map_err(|source| Error::io("Cannot set up the socket", source))?;
                    match &self.offer.tls {
                        Some(tls) => State::Securing(Securing::new(stream, tls)?),
                        None => {
                            State::ShakingHands(Handshake::new(stream, Records::Clear, &[], &self.offer)?)
                        }
                    }
                }
                State::Securing(mut securing) => {
                    if securing.go_on()? {
                        let (records, received) = securing.handshake.into_records()?;
                        let records = Records::Tls(Box::new(records));
                        State::ShakingHands(Handshake::new(securing.stream, records, &received, &self.offer)?)
                    } else if now >= self.deadline {
                        return Err(handshake_failed(Errno::TIMEDOUT.into()));
                    } else {
                        self.state = State::Securing(securing);
                        return Ok(None);
                    }
                }
                State::ShakingHands(mut handshake) => {
                    if let Some((grant, unparsed)) = handshake.go_on(&self.offer)? {
                        return Ok(Some(handshake.into_client(grant, unparsed, now)));
                    }
                    if now >= self.deadline {
                        return Err(handshake_failed(Errno::TIMEDOUT.into()));
                    }
                    self.state = State::ShakingHands(handshake);
                    return Ok(None);
                }
                State::Over => return Ok(None),
            }
        }
    }
}

impl Connecting for TcpDial {
    type Outcome = Result<TcpClient, Error>;

    fn step(&mut self, now: Instant) -> Option<Self::Outcome> {
        self.go_on(now).transpose()
    }

    fn awaited(&mut self) -> Vec<Awaited<'_>> {
        match &self.state {
            State::Connecting(stream, _) => vec![Awaited::output(stream.as_fd())],
            State::Securing(securing) => vec![securing.awaited()],
            State::ShakingHands(handshake) => vec![handshake.awaited()],
            State::Unopened(..) | State::Connected(_) | State::Over => Vec::new(),
        }
    }

    fn step_by(&self) -> Instant {
        match self.state {
            State::Unopened(_, Some(at)) => at,
            _ => self.deadline,
        }
    }
}

/// A socket that has begun to connect.
fn open(endpoint: &Endpoint) -> io::Result<Socket> {
    let (socket, address) = new_socket(endpoint)?;
    abort_on_close(&socket, true)?;
    match socket.connect(&address) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

/// Whether a socket that has begun to connect is connected.
fn is_connected(stream: &Socket) -> io::Result<bool> {
    let mut fds = [PollFd::new(stream, PollFlags::OUT)];
    match rustix::event::poll(&mut fds, Some(&Timespec::default())) {
        Ok(0) | Err(Errno::INTR) => Ok(false),
        // If the socket has failed it says why.
        Ok(_) => stream.take_error()?.map_or(Ok(true), Err),
        Err(errno) => Err(errno.into()),
    }
}

/// Says of an error that it is why there is no connection.
fn cannot_connect(endpoint: &Endpoint, source: io::Error) -> Error {
    let check = match (endpoint, source.raw_os_error()) {
        (Endpoint::Ip(_), _) => "check that raio_server listens there and that no firewall is in between",
        (Endpoint::Unix(_), Some(libc::EACCES)) => "this user needs write permission for that socket",
        (Endpoint::Unix(_), _) => "check that raio_server listens there",
    };
    Error::io(format!("Cannot connect to {endpoint}; {check}"), source)
}

fn handshake_failed(source: io::Error) -> Error {
    Error::io("The handshake with the server failed; check that a raio_server listens on that port", source)
}

fn set_up(stream: &Socket) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    abort_on_close(stream, true)?;
    // Does not matter to a Unix socket.
    let _ = stream.set_tcp_nodelay(true);
    Ok(())
}

impl Securing {
    fn new(stream: Socket, tls: &ClientTls) -> Result<Self, Error> {
        let mut handshake = tls::Handshake::client(tls)?;
        handshake.advance(&[])?;
        Ok(Self { stream, handshake })
    }

    fn awaited(&self) -> Awaited<'_> {
        let fd = self.stream.as_fd();
        Awaited { fd, input: true, output: !self.handshake.unsent().is_empty() }
    }

    /// Sends and takes in what it can. Whether the handshake is over: what it still has to send goes out with
    /// the hello.
    fn go_on(&mut self) -> Result<bool, Error> {
        let mut buffer = [0; SECURING_BYTES];
        loop {
            self.send().map_err(handshake_failed)?;
            let n = match (&self.stream).read(&mut buffer) {
                Ok(0) => return Err(handshake_failed(Errno::CONNRESET.into())),
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(handshake_failed(error)),
            };
            match self.handshake.advance(&buffer[..n]) {
                Ok(false) => {}
                Ok(true) => return Ok(true),
                Err(error) => {
                    // An alert says why, if the socket takes it. It is not to be reset before it is read.
                    let _ = self.send();
                    let _ = abort_on_close(&self.stream, false);
                    return Err(error);
                }
            }
        }
    }

    fn send(&mut self) -> io::Result<()> {
        while !self.handshake.unsent().is_empty() {
            match send(&self.stream, &[IoSlice::new(self.handshake.unsent())]) {
                Ok(n) => self.handshake.on_sent(n),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Handshake {
    /// Over a stream that has received this with the handshake of its record layer.
    fn new(stream: Socket, records: Records, received: &[u8], offer: &Offer) -> Result<Self, Error> {
        let mut records = records;
        let mut staging = vec![0; STAGING_BYTES].into_boxed_slice();
        staging[..received.len()].copy_from_slice(received);
        let end = records.open(&mut staging, 0..received.len())?;
        Ok(Self { stream, records, hello: offer.hello(), sent: 0, staging, end })
    }

    /// What the socket must be ready for before it goes on.
    fn awaited(&self) -> Awaited<'_> {
        let fd = self.stream.as_fd();
        if self.sent < self.hello.len() { Awaited::output(fd) } else { Awaited::input(fd) }
    }

    /// Sends the hello, takes in the welcome. Once that is there, what was granted, and where in `staging`
    /// lies what came behind it.
    fn go_on(&mut self, offer: &Offer) -> Result<Option<(Grant, Range<usize>)>, Error> {
        loop {
            let moved = if self.sent < self.hello.len() {
                self.send_some()
            } else {
                match self.receive_some() {
                    // It has looked at this client's key after the client was done.
                    Err(Error::Violation(Violation::Alert(tls::CERTIFICATE_UNKNOWN))) => {
                        return Err(tls::not_known_there());
                    }
                    moved => moved?,
                }
            };
            match moved {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(handshake_failed(error)),
            }
            if self.end > 0
                && let Parsed::Item(grant, taken) = offer.grant(&self.staging[..self.end])?
            {
                return Ok(Some((grant, taken..self.end)));
            }
        }
    }

    fn send_some(&mut self) -> io::Result<()> {
        let n = send(&self.stream, &self.records.seal(&[IoSlice::new(&self.hello[self.sent..])]))?;
        self.sent += self.records.on_sent(n);
        Ok(())
    }

    /// Reads once. A server that sends more than a handshake may be long has been found out by then.
    fn receive_some(&mut self) -> Result<io::Result<()>, Error> {
        let held = self.records.held();
        let n = match (&self.stream).read(&mut self.staging[self.end + held..]) {
            Ok(0) => return Ok(Err(Errno::CONNRESET.into())),
            Ok(n) => n,
            Err(error) => return Ok(Err(error)),
        };
        self.end += self.records.open(&mut self.staging, self.end..self.end + held + n)?;
        Ok(Ok(()))
    }

    /// The client of a connection that was granted this at `now`.
    fn into_client(self, grant: Grant, unparsed: Range<usize>, now: Instant) -> TcpClient {
        let Self { stream, records, staging, .. } = self;
        TcpClient {
            stream,
            records,
            core: Core::new(grant, now),
            blocked: false,
            held_back: false,
            sent_goaway: false,
            send_error: None,
            staging,
            unparsed,
            process: process(),
            clock: Instant::now,
        }
    }
}

#[cfg(test)]
mod tests;
