//! How a connection over TCP is made: the socket connects, the hello goes out, the welcome comes in, each as
//! far as the kernel takes or has it.

use std::io::{self, IoSlice, Read};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};

use super::super::spare_congestion_control;
use super::{STAGING_BYTES, TcpClient, abort_on_close, send};
use crate::client::Core;
use crate::connecting::{Awaited, Connecting};
use crate::error::Error;
use crate::handshake::{Grant, Offer};
use crate::memory::process;
use crate::message::Parsed;
use crate::records::Records;

/// A connection over TCP that is being made.
#[derive(Debug)]
pub struct TcpDial {
    offer: Offer,
    deadline: Instant,
    state: State,
}

#[derive(Debug)]
enum State {
    /// There is no socket yet.
    Unopened(SocketAddr),
    Connecting(TcpStream, SocketAddr),
    Connected(TcpStream),
    ShakingHands(Handshake),
    Over,
}

/// A handshake over a stream.
#[derive(Debug)]
struct Handshake {
    stream: TcpStream,
    records: Records,
    hello: Vec<u8>,
    /// How much of the hello has been sent.
    sent: usize,
    staging: Box<[u8]>,
    /// How much of `staging` was received, opened.
    end: usize,
}

impl TcpDial {
    /// Connects to the server at `address` and shakes hands, by `deadline`. The first step begins.
    pub fn new(address: SocketAddr, offer: &Offer, deadline: Instant) -> Self {
        Self { offer: offer.clone(), deadline, state: State::Unopened(address) }
    }

    /// Shakes hands over a stream that is connected, by `deadline`.
    pub fn over(stream: TcpStream, offer: &Offer, deadline: Instant) -> Self {
        Self { offer: offer.clone(), deadline, state: State::Connected(stream) }
    }

    fn go_on(&mut self, now: Instant) -> Result<Option<TcpClient>, Error> {
        loop {
            self.state = match std::mem::replace(&mut self.state, State::Over) {
                State::Unopened(address) => {
                    State::Connecting(open(address).map_err(cannot_connect(address))?, address)
                }
                State::Connecting(stream, address) => {
                    let is_connected = is_connected(&stream).map_err(cannot_connect(address))?;
                    if is_connected {
                        State::Connected(stream)
                    } else if now >= self.deadline {
                        return Err(cannot_connect(address)(io::ErrorKind::TimedOut.into()));
                    } else {
                        self.state = State::Connecting(stream, address);
                        return Ok(None);
                    }
                }
                State::Connected(stream) => {
                    let handshake = Handshake::new(stream, &self.offer);
                    State::ShakingHands(
                        handshake.map_err(|source| Error::io("Cannot set up the socket", source))?,
                    )
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
            State::ShakingHands(handshake) => vec![handshake.awaited()],
            State::Unopened(_) | State::Connected(_) | State::Over => Vec::new(),
        }
    }

    fn step_by(&self) -> Instant {
        self.deadline
    }
}

/// A socket that has begun to connect.
fn open(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    spare_congestion_control(&socket, address);
    abort_on_close(&socket, true)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket.into()),
    }
}

/// Whether a socket that has begun to connect is connected.
fn is_connected(stream: &TcpStream) -> io::Result<bool> {
    let mut fds = [PollFd::new(stream, PollFlags::OUT)];
    match rustix::event::poll(&mut fds, Some(&Timespec::default())) {
        Ok(0) | Err(Errno::INTR) => Ok(false),
        // If the socket has failed it says why.
        Ok(_) => stream.take_error()?.map_or(Ok(true), Err),
        Err(errno) => Err(errno.into()),
    }
}

/// Says of an error that it is why there is no connection.
fn cannot_connect(address: SocketAddr) -> impl Fn(io::Error) -> Error {
    move |source| {
        Error::io(
            format!(
                "Cannot connect to {address}; check that raio_server listens there and that no firewall \
                 is in between"
            ),
            source,
        )
    }
}

fn handshake_failed(source: io::Error) -> Error {
    Error::io("The handshake with the server failed; check that a raio_server listens on that port", source)
}

impl Handshake {
    fn new(stream: TcpStream, offer: &Offer) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        abort_on_close(&stream, true)?;
        // Does not matter to a socket that is no TCP socket (a test's socket pair).
        let _ = stream.set_nodelay(true);
        Ok(Self {
            stream,
            records: Records::Clear,
            hello: offer.hello(),
            sent: 0,
            staging: vec![0; STAGING_BYTES].into_boxed_slice(),
            end: 0,
        })
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
            let moved = if self.sent < self.hello.len() { self.send_some() } else { self.receive_some()? };
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
        let n = send(&self.stream, self.records.seal(&[IoSlice::new(&self.hello[self.sent..])]))?;
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
