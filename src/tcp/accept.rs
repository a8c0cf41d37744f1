//! A server's side of the handshake of TLS: what comes before a worker gets the connection.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use crate::connecting::{Awaited, Connecting};
use crate::error::{Error, Status};
use crate::handshake::Policy;
use crate::reactor::{attach_tls, set_tls_keys};
use crate::tls::kernel::{CryptoInfo, KernelKeys};
use crate::tls::{Handshake, ServerTls};
use crate::transport::AcceptedStream;
use crate::tuning::{TLS_READ_ON_FOR as READ_ON_FOR, TLS_RECEIVE_BYTES as RECEIVE_BYTES};

/// What a client without TLS hears.
const NO_KEY: &str = "This server takes only clients that have keys. Make one with `raio key new`, and have \
    the server's administrator add it.";

/// The first byte of a TLS connection: the type of a record that is not sealed.
const TLS: u8 = 22;

/// A connection that a server has accepted, and whose client has still to show who it is. It costs a few
/// hundred microseconds of a processor: not in a worker's thread.
#[derive(Debug)]
pub struct Accepting {
    stream: Arc<OwnedFd>,
    /// Says no to those who do not begin with TLS.
    policy: Arc<Policy>,
    state: State,
    deadline: Instant,
    /// The kernel is to seal and open records.
    is_in_kernel: bool,
}

#[derive(Debug)]
enum State {
    /// Nothing has come.
    Begun(Box<Handshake>),
    ShakingHands(Box<Handshake>),
    /// The client has been told why it is not wanted. What it still sends is read, for a reset would keep it
    /// from reading that.
    Ending(Error),
    Over,
}

impl Accepting {
    /// Over a stream of which nothing is known, by `deadline`.
    pub fn new(
        stream: AcceptedStream,
        tls: &ServerTls,
        policy: Arc<Policy>,
        deadline: Instant,
    ) -> Result<Self, Error> {
        if tls.is_in_kernel() {
            // The kernel does it only for a connection that its client has not closed. What one sends that
            // does so behind the handshake is served, too.
            attach_tls(&stream.socket).map_err(not_taken)?;
        }
        let state = State::Begun(Box::new(Handshake::server(tls)?));
        Ok(Self { stream: stream.socket, policy, state, deadline, is_in_kernel: tls.is_in_kernel() })
    }

    fn go_on(&mut self, now: Instant) -> Result<Option<AcceptedStream>, Error> {
        let mut buffer = [0; RECEIVE_BYTES];
        loop {
            if let State::ShakingHands(handshake) = &mut self.state {
                send_unsent(&self.stream, handshake)?;
            }
            let len = match &self.state {
                // What is behind the handshake stays in the socket, for the kernel begins with a record.
                State::Begun(handshake) | State::ShakingHands(handshake) if self.is_in_kernel => {
                    handshake.wanted().min(RECEIVE_BYTES)
                }
                _ => RECEIVE_BYTES,
            };
            let received = match recv(&self.stream, &mut buffer[..len], RecvFlags::empty()) {
                Ok((n @ 1.., _)) => &buffer[..n],
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) if now < self.deadline => return Ok(None),
                ended => {
                    let errno = match ended {
                        Ok(_) => Errno::CONNRESET,
                        Err(Errno::AGAIN) => Errno::TIMEDOUT,
                        Err(errno) => errno,
                    };
                    return Err(match std::mem::replace(&mut self.state, State::Over) {
                        State::Ending(error) => error,
                        _ => Error::io("The TLS handshake failed", errno),
                    });
                }
            };
            self.state = match std::mem::replace(&mut self.state, State::Over) {
                State::Begun(_) if received[0] != TLS => {
                    let rejection = self.policy.rejection(libc::ENOKEY, NO_KEY);
                    let _ = send(&self.stream, &rejection, SendFlags::NOSIGNAL);
                    let status = Status::policy(libc::ENOKEY);
                    self.end(now, Error::Rejected { status, text: "The client has not begun TLS".into() })
                }
                State::Begun(mut handshake) | State::ShakingHands(mut handshake) => {
                    match handshake.advance(received) {
                        Ok(false) => State::ShakingHands(handshake),
                        Ok(true) => {
                            let stream = Arc::clone(&self.stream);
                            if self.is_in_kernel {
                                return hand_to_kernel(stream, *handshake).map(Some);
                            }
                            let (records, received) = handshake.into_records()?;
                            return Ok(Some(AcceptedStream::secured(stream, records, received)));
                        }
                        Err(error) => {
                            // The alert, if the socket takes it.
                            let _ = send_unsent(&self.stream, &mut handshake);
                            self.end(now, error)
                        }
                    }
                }
                ending => ending,
            };
        }
    }

    fn end(&mut self, now: Instant, error: Error) -> State {
        let _ = shutdown(&self.stream, Shutdown::Write);
        self.deadline = self.deadline.min(now + READ_ON_FOR);
        State::Ending(error)
    }
}

impl Connecting for Accepting {
    type Outcome = Result<AcceptedStream, Error>;

    fn step(&mut self, now: Instant) -> Option<Self::Outcome> {
        self.go_on(now).transpose()
    }

    fn awaited(&mut self) -> Vec<Awaited<'_>> {
        let output = matches!(&self.state, State::ShakingHands(handshake) if !handshake.unsent().is_empty());
        vec![Awaited { fd: self.stream.as_fd(), input: true, output }]
    }

    fn step_by(&self) -> Instant {
        self.deadline
    }
}

/// Has the kernel seal and open what follows on the handshake.
fn hand_to_kernel(stream: Arc<OwnedFd>, handshake: Handshake) -> Result<AcceptedStream, Error> {
    let (peer, KernelKeys { sending, receiving, records }) = handshake.into_kernel_keys()?;
    set_tls_keys(&stream, sending.bytes(), receiving.bytes()).map_err(not_taken)?;
    Ok(AcceptedStream::secured_by_kernel(stream, peer, records))
}

fn not_taken(error: std::io::Error) -> Error {
    Error::io("The kernel does not take the records of TLS", error)
}

/// Why the kernel cannot seal and open the records of TLS 1.3, and what to do about it; None: it can. It is
/// tried, over loopback: the kernel loads what it needs for that if this process has CAP_NET_ADMIN.
pub fn no_kernel_tls() -> Option<String> {
    let try_over = |info: &CryptoInfo| -> Result<(), String> {
        let pair = || {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let client = TcpStream::connect(listener.local_addr()?)?;
            Ok((client, listener.accept()?.0))
        };
        let (_client, server) = pair().map_err(|error: std::io::Error| {
            format!("it cannot be tried over the loopback device ({error}). Set that up: `ip link set lo up`")
        })?;
        attach_tls(&server).map_err(|error| {
            format!(
                "it has no module `tls` ({error}). Load it with `modprobe tls`, and at each boot by a line \
                 `tls` in a file of /etc/modules-load.d. A kernel that was built without CONFIG_TLS has none"
            )
        })?;
        set_tls_keys(&server, info.bytes(), info.bytes())
            .map_err(|error| format!("its module `tls` does not take these keys ({error})"))
    };
    CryptoInfo::samples()
        .iter()
        .find_map(|(name, info)| try_over(info).err().map(|why| format!("TLS 1.3 with {name}: {why}")))
}

/// Sends what the handshake has to send, as far as the socket takes it.
fn send_unsent(stream: &OwnedFd, handshake: &mut Handshake) -> Result<(), Error> {
    while !handshake.unsent().is_empty() {
        match send(stream, handshake.unsent(), SendFlags::NOSIGNAL) {
            Ok(n) => handshake.on_sent(n),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break,
            Err(errno) => return Err(Error::io("The TLS handshake failed", errno)),
        }
    }
    Ok(())
}
