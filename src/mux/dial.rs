//! Which transport a client connects by, and the way there.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use crate::address::{Endpoint, Scheme};
use crate::connecting::{Awaited, Connecting, finish, sleep};
use crate::error::Error;
use crate::handshake::{Grant, Offer};
use crate::memory::process;
use crate::message::QueuePairAddress;
use crate::rdma;
use crate::tcp::{TcpClient, TcpDial};
use crate::transport::{ClientDial, ClientTransport, ConnectQueuePair};

/// Why a server whose key is to be proven is not reached by rdma_cm.
const RDMA_IS_CLEAR: &str = "RDMA by rdma_cm is neither encrypted nor authenticated, and this server is one \
    that is reached with a key. Use raio:// or raio+tcp://.";

/// A client that has connected.
pub struct Reached {
    /// Its connection.
    pub transport: Box<dyn ClientTransport>,
    /// An error message that says why it is over TCP, if it might have been over RDMA.
    pub why_tcp: Option<String>,
}

/// Connects to the server at `endpoint`, over the transports that `scheme` allows, and shakes hands, by
/// `deadline`. Waits for it; a [`Dial`] does not.
pub fn connect(
    scheme: Scheme,
    endpoint: impl Into<Endpoint>,
    offer: &Offer,
    deadline: Instant,
) -> Result<Reached, Error> {
    let mut dial = Dial::begin(scheme, endpoint, offer, Instant::now(), deadline);
    loop {
        if let Some(outcome) = dial.step(Instant::now()) {
            return outcome;
        }
        let awaited: Vec<_> = dial.poll_fd().into_iter().map(Awaited::input).collect();
        let _ = sleep(&awaited, dial.step_by());
    }
}

/// Moves a connection that has shaken hands over TCP, and asked for nothing yet, to a queue pair, by
/// `deadline`. Fails with the TCP connection if that can be used as it is, and with why. Waits for it; a
/// [`Dial`] does not.
#[expect(clippy::type_complexity, reason = "the connection that is left of it")]
pub fn upgrade(
    stream: TcpClient,
    deadline: Instant,
) -> Result<Box<dyn ClientTransport>, (Option<Box<TcpClient>>, Error)> {
    finish(&mut Upgrade::new(Box::new(stream), deadline))
}

/// A client's connection that is being made, over the transports that a scheme allows. Nothing here blocks:
/// [`Dial::step`] does what can be done now. A program steps it at first, and then whenever the descriptor
/// ([`Dial::poll_fd`]) is readable or the time has come ([`Dial::step_by`]), until it is over. Dropping it
/// gives the connection up.
///
/// It belongs to one thread at a time. One thing may take long: the first dial of a process that may use RDMA
/// loads RDMA's libraries and opens the devices. See `src/rdma/client/connect.rs` for what is waited for
/// otherwise.
pub struct Dial {
    endpoint: Endpoint,
    /// With the epoch of the connection that is tried now.
    offer: Offer,
    deadline: Instant,
    /// When the next step is due at the latest before there is anything to wait for.
    begun: Instant,
    why_tcp: Option<String>,
    make_queue_pair: MakeQueuePair,
    state: State,
    /// An epoll instance that stands for whatever is waited for. None before the first step.
    epoll: Option<OwnedFd>,
    /// The process that began it: see [`process`].
    process: u64,
}

enum State {
    Unopened(Scheme),
    Rdma(ClientDial),
    /// A TCP connection that stays one.
    Tcp(TcpDial),
    /// One that is to move to a queue pair.
    Stream(TcpDial),
    Moving(Upgrade),
    Over,
}

impl Dial {
    /// Connects to the server at `endpoint`, over the transports that `scheme` allows, and shakes hands, by
    /// `deadline`. A Unix socket is one whatever the scheme. Nothing is done before the first step, which is
    /// due now.
    pub fn begin(
        scheme: Scheme,
        endpoint: impl Into<Endpoint>,
        offer: &Offer,
        now: Instant,
        deadline: Instant,
    ) -> Self {
        Self {
            endpoint: endpoint.into(),
            offer: offer.clone(),
            deadline,
            begun: now,
            why_tcp: None,
            make_queue_pair: rdma::upgrade,
            state: State::Unopened(scheme),
            epoll: None,
            process: process(),
        }
    }

    /// Goes on as far as that is possible at `now`. Some once it is over: the connection, or why there is
    /// none. It returns None after that.
    pub fn step(&mut self, now: Instant) -> Option<Result<Reached, Error>> {
        self.unwatch();
        let outcome = match self.go_on(now) {
            Ok(None) => self.watch().err().map(Err),
            outcome => outcome.transpose(),
        };
        if outcome.is_some() {
            self.state = State::Over;
        }
        outcome
    }

    /// The descriptor that is readable when a step can go on: the same for the whole dial, whatever it waits
    /// for. An event loop must forget it before the dial is dropped, which closes it. None before the first
    /// step.
    pub fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.epoll.as_ref().map(AsFd::as_fd)
    }

    /// When the next step is due even if the descriptor is not readable by then. It may change with each
    /// step.
    pub fn step_by(&self) -> Instant {
        match &self.state {
            State::Unopened(_) | State::Over => self.begun,
            State::Rdma(dial) => dial.step_by(),
            State::Tcp(dial) | State::Stream(dial) => dial.step_by(),
            State::Moving(upgrade) => upgrade.step_by(),
        }
    }

    /// The highest epoch that the dial may have offered the server so far, if its connection belongs to a
    /// channel. The next dial must offer a higher one, also after a failure. A dial that has tried in vain to
    /// move to a queue pair connects anew, with an epoch one above that of its offer.
    pub fn epoch(&self) -> Option<u64> {
        self.offer.channel.map(|channel| channel.epoch)
    }

    fn go_on(&mut self, now: Instant) -> Result<Option<Reached>, Error> {
        loop {
            let transport = match &mut self.state {
                &mut State::Unopened(scheme) => {
                    self.state = self.first(scheme)?;
                    continue;
                }
                State::Rdma(dial) => dial.step(now).transpose()?,
                State::Tcp(dial) => dial.step(now).transpose()?.map(|stream| Box::new(stream) as _),
                State::Stream(dial) => match dial.step(now).transpose()? {
                    None => None,
                    Some(stream) if stream.grant().queue_pair => {
                        self.state = State::Moving(Upgrade {
                            make_queue_pair: self.make_queue_pair,
                            ..Upgrade::new(Box::new(stream), self.deadline)
                        });
                        continue;
                    }
                    Some(stream) => {
                        self.stays(&"the server has no RDMA, or will not use it; see its log");
                        Some(Box::new(stream) as _)
                    }
                },
                State::Moving(upgrade) => match upgrade.step(now) {
                    None => None,
                    Some(Ok(transport)) => Some(transport),
                    Some(Err((stream, error))) => {
                        match &error {
                            Error::Rejected { text, .. } => {
                                self.stays(&format_args!("the server says: {}", text.trim_end_matches('.')))
                            }
                            error => self.stays(error),
                        }
                        match stream {
                            Some(stream) => Some(stream as _),
                            None => {
                                self.state = self.anew();
                                continue;
                            }
                        }
                    }
                },
                State::Over => None,
            };
            let Some(transport) = transport else { return Ok(None) };
            let why_tcp = self.why_tcp.take();
            if let Some(why) = &why_tcp {
                tracing::info!(name: "staying-on-tcp", "{why}");
            }
            return Ok(Some(Reached { transport, why_tcp }));
        }
    }

    /// What to begin with.
    fn first(&mut self, scheme: Scheme) -> Result<State, Error> {
        match (scheme, &self.endpoint) {
            (Scheme::Rdma, _) if self.offer.tls.is_some() => Err(Error::Unsupported(RDMA_IS_CLEAR.into())),
            (Scheme::Rdma, &Endpoint::Ip(address)) => {
                Ok(State::Rdma(rdma::dial(address, None, &self.offer, self.deadline)))
            }
            (Scheme::Any, Endpoint::Ip(_)) => Ok(self.any()),
            _ => Ok(self.tcp()),
        }
    }

    fn any(&mut self) -> State {
        match rdma::unavailable() {
            Some(reason) => {
                self.stays(&format_args!("there is no RDMA here ({reason})"));
                self.tcp()
            }
            None => {
                let offer = Offer { queue_pair: true, ..self.offer.clone() };
                State::Stream(TcpDial::new(self.endpoint.clone(), &offer, self.deadline))
            }
        }
    }

    fn tcp(&self) -> State {
        State::Tcp(TcpDial::new(self.endpoint.clone(), &self.offer, self.deadline))
    }

    /// After a connection that could neither move nor stay: the server knows its epoch.
    fn anew(&mut self) -> State {
        if let Some(channel) = &mut self.offer.channel {
            channel.epoch = channel.epoch.saturating_add(1);
        }
        self.tcp()
    }

    /// Notes why it is over TCP.
    fn stays(&mut self, why: &dyn std::fmt::Display) {
        self.why_tcp = Some(format!("Connected over TCP, not RDMA: {why}."));
    }

    // What is waited for
    // ----------------------------------------------------------------------------------------------------

    fn awaited(&mut self) -> Vec<Awaited<'_>> {
        match &mut self.state {
            State::Rdma(dial) => dial.awaited(),
            State::Tcp(dial) | State::Stream(dial) => dial.awaited(),
            State::Moving(upgrade) => upgrade.awaited(),
            State::Unopened(_) | State::Over => Vec::new(),
        }
    }

    /// Takes out of the epoll instance what [`Dial::watch`] has put in. Before each step, for a descriptor
    /// that is closed with another process having a copy of it could not be taken out any more.
    fn unwatch(&mut self) {
        let Some(epoll) = self.epoll.take() else { return };
        for awaited in self.awaited() {
            let _ = epoll::delete(&epoll, awaited.fd);
        }
        self.epoll = Some(epoll);
    }

    fn watch(&mut self) -> Result<(), Error> {
        let failed = |source| Error::io("Cannot watch a connection that is being made", source);
        let epoll = match self.epoll.take() {
            Some(epoll) => epoll,
            None => epoll::create(CreateFlags::CLOEXEC).map_err(failed)?,
        };
        for awaited in self.awaited() {
            let mut flags = EventFlags::empty();
            flags.set(EventFlags::IN, awaited.input);
            flags.set(EventFlags::OUT, awaited.output);
            epoll::add(&epoll, awaited.fd, EventData::new_u64(0), flags).map_err(failed)?;
        }
        self.epoll = Some(epoll);
        Ok(())
    }
}

impl Drop for Dial {
    fn drop(&mut self) {
        if self.process == process() {
            return self.unwatch();
        }
        // A forked child's copy: what the epoll instance watches is its parent's, and so are the device's
        // objects.
        if matches!(self.state, State::Rdma(_) | State::Moving(_)) {
            std::mem::forget(std::mem::replace(&mut self.state, State::Over));
        }
    }
}

/// [`rdma::upgrade`]; tests have a queue pair of their own.
type MakeQueuePair = fn(IpAddr, &Grant) -> Result<(QueuePairAddress, ConnectQueuePair), Error>;

/// A connection over TCP that moves to a queue pair.
struct Upgrade {
    deadline: Instant,
    make_queue_pair: MakeQueuePair,
    state: UpgradeState,
}

enum UpgradeState {
    /// It has shaken hands, and no queue pair yet.
    Stream(Box<TcpClient>),
    /// The server has been told where this side's end is.
    Exchanging {
        stream: Box<TcpClient>,
        connect: ConnectQueuePair,
        until: Instant,
    },
    Proving(ClientDial),
    Over,
}

impl Upgrade {
    fn new(stream: Box<TcpClient>, deadline: Instant) -> Self {
        Self { deadline, make_queue_pair: rdma::upgrade, state: UpgradeState::Stream(stream) }
    }
}

impl Connecting for Upgrade {
    /// If the TCP connection can be used as it is the error has it.
    type Outcome = Result<Box<dyn ClientTransport>, (Option<Box<TcpClient>>, Error)>;

    fn step(&mut self, now: Instant) -> Option<Self::Outcome> {
        loop {
            self.state = match std::mem::replace(&mut self.state, UpgradeState::Over) {
                UpgradeState::Stream(mut stream) => {
                    let local = stream.local_ip();
                    let grant = stream.grant().on_queue_pair();
                    let made = local.and_then(|local| (self.make_queue_pair)(local, &grant));
                    let (ours, connect) = match made {
                        Ok(made) => made,
                        Err(error) => return Some(Err((Some(stream), error))),
                    };
                    stream.send_queue_pair(&ours);
                    // If it takes longer there must be time left to connect anew.
                    let until = now + self.deadline.saturating_duration_since(now) / 2;
                    UpgradeState::Exchanging { stream, connect, until }
                }
                UpgradeState::Exchanging { mut stream, connect, until } => {
                    match stream.take_queue_pair(now, until) {
                        None => {
                            self.state = UpgradeState::Exchanging { stream, connect, until };
                            return None;
                        }
                        Some(Ok(theirs)) => match connect(&theirs, stream, now, self.deadline) {
                            Ok(dial) => UpgradeState::Proving(dial),
                            Err(error) => return Some(Err((None, error))),
                        },
                        Some(Err(error)) => {
                            let is_left = stream.failure().is_none();
                            return Some(Err((is_left.then_some(stream), error)));
                        }
                    }
                }
                UpgradeState::Proving(mut dial) => match dial.step(now) {
                    None => {
                        self.state = UpgradeState::Proving(dial);
                        return None;
                    }
                    Some(outcome) => return Some(outcome.map_err(|error| (None, error))),
                },
                UpgradeState::Over => return None,
            }
        }
    }

    fn awaited(&mut self) -> Vec<Awaited<'_>> {
        match &mut self.state {
            UpgradeState::Exchanging { stream, .. } => {
                let (fd, has_unsent) = stream.poll_fd();
                vec![Awaited { fd, input: true, output: has_unsent }]
            }
            UpgradeState::Proving(dial) => dial.awaited(),
            UpgradeState::Stream(_) | UpgradeState::Over => Vec::new(),
        }
    }

    fn step_by(&self) -> Instant {
        match &self.state {
            UpgradeState::Exchanging { until, .. } => *until,
            UpgradeState::Proving(dial) => dial.step_by(),
            UpgradeState::Stream(_) | UpgradeState::Over => self.deadline,
        }
    }
}

#[cfg(test)]
mod tests;
