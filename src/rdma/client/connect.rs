//! How a connection by RDMA is made: by rdma_cm, or out of band, over a TCP connection that has shaken hands.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};

use super::super::cm::{EventChannel, Id, Kind};
use super::super::device::{CompletionChannel, Domain, PortAddress, devices};
use super::super::out_of_band::{packet_numbers, port_of};
use super::super::queue_pair::{Completion, QueuePair, Size};
use super::super::{CONTROL_MESSAGES, HANDSHAKE_MESSAGES, MESSAGE_BYTES, no_rdma, parse_rejection, request};
use super::RdmaClient;
use crate::client::timespec;
use crate::error::{Class, Error, Status, Violation};
use crate::handshake::{Grant, Offer};
use crate::message::{Parsed, QueuePairAddress};
use crate::transport::ClientTransport;
use crate::tuning::{
    RDMA_CONNECT_TIME, RDMA_DEPTH_DEFAULT, RDMA_DESCRIPTORS_EVERY, RDMA_INLINE_BYTES_MAX, RDMA_PROOF_PART,
    RDMA_SEND_BYTES_MAX, RDMA_SEND_BYTES_MIN,
};

/// A queue pair and what belongs to it.
#[derive(Debug)]
pub(super) struct Parts {
    pub qp: QueuePair,
    pub domain: Arc<Domain>,
    pub channel: Arc<CompletionChannel>,
    /// rdma_cm's, if that makes the connection.
    pub events: Option<Arc<EventChannel>>,
}

/// Connects to the server at `address`, from `source` if that is given, and shakes hands, by `deadline`.
pub(super) fn connect(
    address: SocketAddr,
    source: Option<IpAddr>,
    offer: &Offer,
    deadline: Instant,
) -> Result<(Parts, Grant), Error> {
    devices().map_err(no_rdma)?;
    // A lost datagram is sent again by rdma_cm only after four seconds.
    let mut time = RDMA_CONNECT_TIME;
    let (mut parts, events, offer) = loop {
        let until = deadline.min(Instant::now() + time);
        match establish(address, source, offer, until) {
            Err(error) if error.errno() == libc::ETIMEDOUT && Instant::now() < deadline => time *= 2,
            outcome => break outcome?,
        }
    };
    let grant = shake_hands(&mut parts, &events, &offer, deadline)?;
    parts.qp.provide_receives(grant.credits() as usize + CONTROL_MESSAGES)?;
    Ok((parts, grant))
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

    /// Connects it with the server's, and waits until that has answered over it: for a part of the time until
    /// `deadline`, so that there is time left to connect anew. The TCP connection goes along: it carries
    /// nothing more, and each ends with the other.
    pub fn connect(
        self,
        theirs: &QueuePairAddress,
        mut stream: Box<dyn ClientTransport>,
        deadline: Instant,
    ) -> Result<RdmaClient, Error> {
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
            RdmaClient::assemble(parts, grant, Some(stream)).map_err(|error| at.failed(error))?;
        let asked = Instant::now();
        let time = deadline.saturating_duration_since(asked) / RDMA_PROOF_PART;
        client.ping(time);
        while client.last_rx() < asked {
            client.receive(&mut Vec::new());
            if client.failure().is_some() {
                return Err(at.failed(Error::Unsupported(NO_ANSWER.into())));
            }
            if client.last_rx() < asked {
                let _ = client.wait(Some(asked + time + RDMA_DESCRIPTORS_EVERY));
            }
        }
        Ok(client)
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
    let size = size_for(credits);
    if size.sends.max(size.receives) > limits.work_requests.min(limits.completions) {
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
    qp.provide_receives(credits + CONTROL_MESSAGES)?;
    let (psn, peer_psn) = packet_numbers();
    let ours = qp.address(at, psn, peer_psn, limits.reads_in.into());
    Ok((Parts { qp, domain, channel, events: None }, ours))
}

/// A connection as far as rdma_cm makes it.
fn establish(
    address: SocketAddr,
    source: Option<IpAddr>,
    offer: &Offer,
    deadline: Instant,
) -> Result<(Parts, Arc<EventChannel>, Offer), Error> {
    let failed = cannot_connect(address);
    let events = EventChannel::new().map_err(failed)?;
    let source = source.map(|ip| SocketAddr::new(ip, 0));
    let id = Id::resolve(&events, source, address, deadline).map_err(|source| {
        Error::io(
            format!(
                "No RDMA device of this machine has a way to {address}; check that its interface is up and \
                 has an address of that network, see `raio_server --list-devices`"
            ),
            source,
        )
    })?;
    let Some(device) = id.device() else {
        return Err(failed(std::io::Error::from_raw_os_error(libc::ENODEV)));
    };
    let limits = device.limits().map_err(failed)?;
    let depth_max = limits.work_requests.min(limits.completions).saturating_sub(2 * CONTROL_MESSAGES + 1);
    let wanted = if offer.queue_depth == 0 { RDMA_DEPTH_DEFAULT } else { offer.queue_depth };
    let offer = Offer { queue_depth: wanted.min(depth_max.max(1) as u32), ..offer.clone() };
    let credits = offer.queue_depth as usize + 1;
    let domain = Domain::new(device)?;
    let channel = CompletionChannel::new(device)?;
    let size = size_for(credits);
    let mut qp = QueuePair::new(Some(id), &domain, &channel, 0, &limits, &size, false)?;
    qp.provide_receives(HANDSHAKE_MESSAGES)?;
    qp.id().connect(&request(), limits.reads_in).map_err(failed)?;
    let event = events.wait(deadline).map_err(failed)?;
    if event.kind != Kind::Established {
        return Err(match parse_rejection(&event.private_data) {
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
        });
    }
    let parts = Parts { qp, domain, channel, events: Some(Arc::clone(&events)) };
    Ok((parts, events, offer))
}

/// The queue pair of a connection with so many credits.
fn size_for(credits: usize) -> Size {
    Size {
        sends: credits + 2 * CONTROL_MESSAGES,
        receives: credits + CONTROL_MESSAGES,
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

/// Sends the hello and waits for the welcome.
fn shake_hands(
    parts: &mut Parts,
    events: &Arc<EventChannel>,
    offer: &Offer,
    deadline: Instant,
) -> Result<Grant, Error> {
    let Parts { qp, channel, .. } = parts;
    let closed = |errno, text: &str| Error::Closed {
        errno,
        text: format!("{text}. Check that it is a raio_server, and its log"),
    };
    let hello = offer.hello();
    qp.send(std::iter::once(&hello[..]), hello.len());
    qp.post(true).map_err(|source| Error::io("The RDMA device rejects work", source))?;
    loop {
        qp.arm().map_err(|source| Error::io("Cannot watch an RDMA connection", source))?;
        qp.look_at_sends();
        while qp.look() {
            match qp.next() {
                Some(Completion::Received(message)) => {
                    let welcome = qp.bytes(&message).to_vec();
                    qp.give_back(message);
                    return match offer.grant(&welcome)? {
                        Parsed::Item(grant, taken) if taken == welcome.len() => Ok(grant),
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
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(closed(libc::ETIMEDOUT, "the server did not finish the handshake in time"));
        }
        while let Some(event) = events.next() {
            // Rejected: it went after it had accepted, and before it knew that this side knew.
            if matches!(event.kind, Kind::Disconnected | Kind::Rejected | Kind::DeviceRemoved) && !qp.look() {
                return Err(closed(libc::ECONNRESET, "the server went away during the handshake"));
            }
        }
        let timeout = timespec(left);
        let mut fds = [
            PollFd::from_borrowed_fd(channel.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(events.fd(), PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => channel.take_events(|_| {}),
            Err(errno) => return Err(Error::io("Cannot wait for the server", errno)),
        }
    }
}
