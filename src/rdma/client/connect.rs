//! How a connection by RDMA is made: by rdma_cm, or out of band, over a TCP connection that has shaken hands.
//!
//! What takes a round trip is announced by a descriptor: rdma_cm's event channel has the results of looking
//! for the way and of connecting, the completion channel the messages of the handshake. All other calls
//! return without waiting for the peer or the network, but none of them can be made non-blocking:
//!
//! - The driver makes and destroys queue pairs, and pins the pages of their queues. How many depends on the
//!   queue depth ([`size_for`]).
//! - An identifier is destroyed once its events are acknowledged. Each is acknowledged when it is taken.
//! - The first use of RDMA in a process loads the libraries and opens the devices, which reads files: once.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::cm::{Event, EventChannel, Id, Kind};
use super::super::device::{CompletionChannel, Domain, PortAddress, devices};
use super::super::out_of_band::{packet_numbers, port_of};
use super::super::queue_pair::{Completion, QueuePair, Size};
use super::super::resolution::Resolution;
use super::super::{CONTROL_MESSAGES, HANDSHAKE_MESSAGES, MESSAGE_BYTES, no_rdma, parse_rejection, request};
use super::RdmaClient;
use crate::connecting::{Awaited, Connecting};
use crate::error::{Class, Error, Status, Violation};
use crate::handshake::{Grant, Offer};
use crate::message::{Parsed, QueuePairAddress};
use crate::transport::{ClientCore, ClientTransport};
use crate::tuning::{
    RDMA_CONNECT_TIME, RDMA_DEPTH_DEFAULT, RDMA_INLINE_BYTES_MAX, RDMA_PROOF_PART, RDMA_SEND_BYTES_MAX,
    RDMA_SEND_BYTES_MIN,
};

/// A queue pair and what belongs to it.
#[derive(Debug)]
pub(super) struct Parts {
    pub qp: QueuePair,
    pub domain: Arc<Domain>,
    pub channel: Arc<CompletionChannel>,
    /// rdma_cm's, if that makes the connection.
    pub events: Option<Arc<EventChannel>>,
    /// See `registration`.
    pub has_windows: bool,
}

/// A connection by rdma_cm that is being made.
#[derive(Debug)]
pub struct RdmaDial {
    address: SocketAddr,
    source: Option<SocketAddr>,
    offer: Offer,
    deadline: Instant,
    /// How long the present try may take.
    time: Duration,
    began: Instant,
    state: State,
}

#[derive(Debug)]
enum State {
    /// A try begins. A lost datagram is sent again by rdma_cm only after four seconds; so there are several.
    Try,
    Resolving(Resolution, Arc<EventChannel>),
    /// Its queue pair is there, and what the device allows of the offer.
    Connecting(Parts, Offer),
    ShakingHands(Parts, Offer),
    Over,
}

impl RdmaDial {
    /// Connects to the server at `address`, from `source` if that is given, and shakes hands, by `deadline`.
    /// The first step begins.
    pub fn new(address: SocketAddr, source: Option<IpAddr>, offer: &Offer, deadline: Instant) -> Self {
        Self {
            address,
            source: source.map(|ip| SocketAddr::new(ip, 0)),
            offer: offer.clone(),
            deadline,
            time: RDMA_CONNECT_TIME,
            began: deadline,
            state: State::Try,
        }
    }

    /// When the present try is over.
    fn until(&self) -> Instant {
        self.deadline.min(self.began + self.time)
    }

    fn go_on(&mut self, now: Instant) -> Result<Option<RdmaClient>, Error> {
        loop {
            self.state = match std::mem::replace(&mut self.state, State::Over) {
                State::ShakingHands(mut parts, offer) => {
                    let Some(grant) = shake_hands(&mut parts, &offer, self.deadline, now)? else {
                        self.state = State::ShakingHands(parts, offer);
                        return Ok(None);
                    };
                    parts.qp.provide_receives(grant.messages_max() + CONTROL_MESSAGES)?;
                    return RdmaClient::assemble(parts, grant, None, now).map(Some);
                }
                State::Over => return Ok(None),
                state => match self.establish(state, now) {
                    Ok((state, true)) => state,
                    Ok((state, false)) => {
                        self.state = state;
                        return Ok(None);
                    }
                    Err(error)
                        if error.errno() == libc::ETIMEDOUT && now < self.deadline && now > self.began =>
                    {
                        self.time *= 2;
                        State::Try
                    }
                    Err(error) => return Err(error),
                },
            }
        }
    }

    /// Goes on as far as rdma_cm makes the connection: by one state. Whether it can go on from there now.
    fn establish(&mut self, state: State, now: Instant) -> Result<(State, bool), Error> {
        let failed = cannot_connect(self.address);
        match state {
            State::Try => {
                devices().map_err(no_rdma)?;
                self.began = now;
                let events = EventChannel::new().map_err(failed)?;
                let resolution = Resolution::new(&events, self.source, self.address, self.until());
                Ok((State::Resolving(resolution, events), true))
            }
            State::Resolving(mut resolution, events) => match resolution.step(now) {
                None => Ok((State::Resolving(resolution, events), false)),
                Some(Ok(id)) => {
                    let (parts, offer) = self.request(id, events)?;
                    Ok((State::Connecting(parts, offer), true))
                }
                Some(Err(source)) => Err(Error::io(
                    format!(
                        "No RDMA device of this machine has a way to {}; check that its interface is up and \
                         has an address of that network, see `raio_server --list-devices`",
                        self.address
                    ),
                    source,
                )),
            },
            State::Connecting(mut parts, offer) => match parts.next_event() {
                Some(event) if event.kind == Kind::Established => {
                    send_hello(&mut parts.qp, &offer)?;
                    Ok((State::ShakingHands(parts, offer), true))
                }
                Some(event) => Err(match parse_rejection(&event.private_data) {
                    Some((errno, text)) => {
                        let status = Status { errno, class: Class::Policy, retryable: false };
                        Error::Rejected { status, text }
                    }
                    // rdma_cm has InfiniBand's reasons here rather than errnos.
                    None => failed(std::io::Error::from_raw_os_error(match event.status {
                        // -1 is librdmacm's own: the connection went while it was being made.
                        status if status < -1 => -status,
                        _ => libc::ECONNREFUSED,
                    })),
                }),
                None if now >= self.until() => {
                    Err(failed(std::io::Error::from_raw_os_error(libc::ETIMEDOUT)))
                }
                None => Ok((State::Connecting(parts, offer), false)),
            },
            other => Ok((other, false)),
        }
    }

    /// Makes the queue pair of an identifier that has found the way, and asks for the connection.
    fn request(&self, id: Id, events: Arc<EventChannel>) -> Result<(Parts, Offer), Error> {
        let failed = cannot_connect(self.address);
        let Some(device) = id.device() else {
            return Err(failed(std::io::Error::from_raw_os_error(libc::ENODEV)));
        };
        let limits = device.limits().map_err(failed)?;
        let pushes = self.offer.push.messages();
        let others = 2 * CONTROL_MESSAGES + 1 + pushes;
        let depth_max = limits.work_requests.min(limits.completions).saturating_sub(others);
        let wanted = if self.offer.queue_depth == 0 { RDMA_DEPTH_DEFAULT } else { self.offer.queue_depth };
        let offer = Offer { queue_depth: wanted.min(depth_max.max(1) as u32), ..self.offer.clone() };
        let credits = offer.queue_depth as usize + 1;
        let domain = Domain::new(device)?;
        let channel = CompletionChannel::new(device)?;
        let size = size_for(credits, pushes, limits.has_windows);
        let mut qp = QueuePair::new(Some(id), &domain, &channel, 0, &limits, &size, false)?;
        qp.provide_receives(HANDSHAKE_MESSAGES)?;
        qp.id().connect(&request(), limits.reads_in).map_err(failed)?;
        let has_windows = limits.has_windows;
        Ok((Parts { qp, domain, channel, events: Some(events), has_windows }, offer))
    }
}

impl Connecting for RdmaDial {
    type Outcome = Result<Box<dyn ClientTransport>, Error>;

    fn step(&mut self, now: Instant) -> Option<Self::Outcome> {
        Some(self.go_on(now).transpose()?.map(|client| Box::new(client) as _))
    }

    fn awaited(&mut self) -> Vec<Awaited<'_>> {
        match &mut self.state {
            State::Try | State::Over => Vec::new(),
            State::Resolving(resolution, _) => resolution.awaited(),
            State::Connecting(parts, _) => parts.event_fd().into_iter().collect(),
            State::ShakingHands(parts, _) => {
                let completions = Awaited::input(parts.channel.fd());
                parts.event_fd().into_iter().chain([completions]).collect()
            }
        }
    }

    fn step_by(&self) -> Instant {
        match &self.state {
            State::Resolving(resolution, _) => resolution.step_by(),
            State::Connecting(..) => self.until(),
            State::Try | State::ShakingHands(..) | State::Over => self.deadline,
        }
    }
}

impl Parts {
    fn next_event(&self) -> Option<Event> {
        self.events.as_ref().and_then(EventChannel::next)
    }

    fn event_fd(&self) -> Option<Awaited<'_>> {
        self.events.as_ref().map(|events| Awaited::input(events.fd()))
    }
}

/// A queue pair for a connection that has shaken hands over TCP, and asked for nothing yet, before it is
/// connected with the server's.
#[derive(Debug)]
pub struct Upgrade {
    at: PortAddress,
    parts: Parts,
    ours: QueuePairAddress,
    grant: Grant,
}

impl Upgrade {
    /// Makes the queue pair, ready to receive, on the port that has the TCP connection's address `local`.
    pub fn new(local: IpAddr, grant: &Grant) -> Result<Self, Error> {
        let at = port_of(local)?;
        let (parts, ours) = unconnected(&at, grant).map_err(|error| at.failed(error))?;
        Ok(Self { at, parts, ours, grant: *grant })
    }

    /// Where it is, for the server.
    pub fn address(&self) -> &QueuePairAddress {
        &self.ours
    }

    /// Connects it with the server's, and sees whether that answers over it, from `now` on for a part of the
    /// time until `deadline`, so that there is time left to connect anew. The TCP connection goes along: it
    /// carries nothing more, and each ends with the other.
    pub fn connect(
        self,
        theirs: &QueuePairAddress,
        mut stream: Box<dyn ClientTransport>,
        now: Instant,
        deadline: Instant,
    ) -> Result<Proof, Error> {
        let Self { at, parts, ours, grant } = self;
        let mirrored = (theirs.psn, theirs.peer_psn, theirs.link) == (ours.peer_psn, ours.psn, ours.link);
        if !mirrored || theirs.reads != 0 {
            stream.abort(Violation::Field);
            return Err(Violation::Field.into());
        }
        parts.qp.join(&at, &ours, theirs, 0).map_err(|source| {
            at.failed(Error::io("the queue pair cannot be connected with the server's", source))
        })?;
        let mut client =
            RdmaClient::assemble(parts, grant, Some(stream), now).map_err(|error| at.failed(error))?;
        let time = deadline.saturating_duration_since(now) / RDMA_PROOF_PART;
        client.core.ping(now, time);
        client.flush();
        Ok(Proof { at, client: Some(client), until: now + time })
    }
}

/// A queue pair that has been connected with the server's, which is to answer over it.
#[derive(Debug)]
pub struct Proof {
    at: PortAddress,
    /// None once it is over.
    client: Option<RdmaClient>,
    until: Instant,
}

impl Drop for Proof {
    fn drop(&mut self) {
        if let Some(client) = &mut self.client {
            // So that it does not wait until its goaway has been acknowledged.
            client.core.fail_lost(libc::ECANCELED, "it was given up before the server had answered");
        }
    }
}

impl Connecting for Proof {
    type Outcome = Result<Box<dyn ClientTransport>, Error>;

    fn step(&mut self, now: Instant) -> Option<Self::Outcome> {
        let is_proven = self.client.as_mut()?.has_answered(now, self.until)?;
        let client = self.client.take()?;
        Some(if is_proven {
            Ok(Box::new(client))
        } else {
            Err(self.at.failed(Error::Unsupported(NO_ANSWER.into())))
        })
    }

    fn awaited(&mut self) -> Vec<Awaited<'_>> {
        self.client.as_mut().map_or_else(Vec::new, RdmaClient::awaited)
    }

    fn step_by(&self) -> Instant {
        self.until
    }
}

const NO_ANSWER: &str = "the server does not answer over the queue pair; see whether its packets \
                         (RoCE v2: UDP port 4791) come through";

/// A queue pair for what was granted, ready to receive, and its address.
fn unconnected(at: &PortAddress, grant: &Grant) -> Result<(Parts, QueuePairAddress), Error> {
    let unfit =
        |what: String| Err(Error::Unsupported(format!("the device {what}; ask for less, or use TCP")));
    let limits =
        at.device.limits().map_err(|source| Error::io("the device does not tell its limits", source))?;
    let credits = grant.credits() as usize;
    let pushes = grant.push.messages();
    let size = size_for(credits, pushes, limits.has_windows);
    if credits + pushes + 2 * CONTROL_MESSAGES > limits.work_requests.min(limits.completions) {
        return unfit(format!("has no queues for the {credits} requests that the server granted"));
    }
    if grant.data_bytes_max > limits.message_bytes {
        return unfit(format!("does not move {} bytes at a time", grant.data_bytes_max));
    }
    if limits.reads_in == 0 {
        return unfit("allows no RDMA READ".into());
    }
    let domain = Domain::new(at.device)?;
    let channel = CompletionChannel::new(at.device)?;
    let mut qp = QueuePair::new(None, &domain, &channel, 0, &limits, &size, false)?;
    qp.init(at, true).map_err(|source| Error::io("the port takes no queue pair", source))?;
    qp.provide_receives(size.receives)?;
    let (psn, peer_psn) = packet_numbers();
    let ours = qp.address(at, psn, peer_psn, limits.reads_in.into());
    Ok((Parts { qp, domain, channel, events: None, has_windows: limits.has_windows }, ours))
}

/// The queue pair of a connection with this number of credits and this number of unsolicited messages. The
/// send queue may be shorter: work requests without room wait.
fn size_for(credits: usize, pushes: usize, has_windows: bool) -> Size {
    // Each request has a SEND at most, and its window is bound and invalidated.
    let sends = if has_windows { 3 } else { 1 };
    Size {
        sends: sends * credits + 2 * CONTROL_MESSAGES,
        receives: credits + pushes + CONTROL_MESSAGES,
        receive_bytes: MESSAGE_BYTES,
        send_bytes: (credits * (MESSAGE_BYTES + RDMA_INLINE_BYTES_MAX))
            .clamp(RDMA_SEND_BYTES_MIN, RDMA_SEND_BYTES_MAX),
    }
}

/// Says of an error that it is why there is no connection.
fn cannot_connect(address: SocketAddr) -> impl Fn(std::io::Error) -> Error + Copy {
    move |source| {
        Error::io(
            format!(
                "Cannot connect to {address} by RDMA; check that raio_server listens there with \
                 --listen rdma://"
            ),
            source,
        )
    }
}

fn send_hello(qp: &mut QueuePair, offer: &Offer) -> Result<(), Error> {
    let hello = offer.hello();
    qp.send(std::iter::once(&hello[..]), hello.len());
    qp.post(true).map_err(|source| Error::io("The RDMA device rejects work", source))
}

/// Takes in the welcome, if it is there: what was granted.
fn shake_hands(
    parts: &mut Parts,
    offer: &Offer,
    deadline: Instant,
    now: Instant,
) -> Result<Option<Grant>, Error> {
    let closed = |errno, text: &str| Error::Closed {
        errno,
        text: format!("{text}. Check that it is a raio_server, and its log"),
    };
    parts.channel.take_events(|_| {});
    loop {
        let qp = &mut parts.qp;
        // Before it is looked at: what completes afterwards is announced.
        qp.arm().map_err(|source| Error::io("Cannot watch an RDMA connection", source))?;
        qp.look_at_sends();
        while qp.look() {
            match qp.next() {
                Some(Completion::Received(message)) => {
                    let welcome = qp.bytes(&message).to_vec();
                    qp.give_back(message);
                    return match offer.grant(&welcome)? {
                        Parsed::Item(grant, taken) if taken == welcome.len() => Ok(Some(grant)),
                        Parsed::Item(..) | Parsed::Need(_) => Err(Violation::Length.into()),
                    };
                }
                Some(Completion::Failed(failure)) => {
                    let text = format!("the connection failed during the handshake: {}", failure.text());
                    return Err(closed(failure.errno(), &text));
                }
                _ => {}
            }
        }
        if now >= deadline {
            return Err(closed(libc::ETIMEDOUT, "the server did not finish the handshake in time"));
        }
        let Some(event) = parts.next_event() else { return Ok(None) };
        // Rejected: it went after it had accepted, and before it knew that this side knew.
        if matches!(event.kind, Kind::Disconnected | Kind::Rejected | Kind::DeviceRemoved) && !parts.qp.look()
        {
            return Err(closed(libc::ECONNRESET, "the server went away during the handshake"));
        }
    }
}
