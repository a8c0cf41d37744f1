//! The client's side of RDMA: one connection, used by one thread at a time.
//!
//! While a request is in flight its buffers are laid open to the server, for its direction only: memory that
//! was registered as it is, other memory through a bounce slot, which is counted. Small writes travel in
//! their request. The buffers come back with the reply; when the connection ends without one, the queue pair
//! is destroyed first, so that nothing lands in them afterwards.
//!
//! Nothing here starts a thread. [`ClientTransport::receive`] polls the completion queue in memory;
//! [`ClientTransport::wait`] arms it, polls once more, and sleeps on a descriptor that stands for the
//! completion channel, rdma_cm's events and the device's.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};

use super::cm::{EventChannel, Id, Kind};
use super::device::{Access, CompletionChannel, Domain, Mr, PortAddress};
use super::out_of_band::{packet_numbers, port_of};
use super::queue_pair::{Completion, Failure, QueuePair, Size};
use super::{CONTROL_MESSAGES, HANDSHAKE_MESSAGES, MESSAGE_BYTES, no_rdma, parse_rejection, request};
use crate::client::outstanding::Outstanding;
use crate::error::{Class, Error, Status, Violation};
use crate::handshake::{Grant, Offer};
use crate::keepalive::{Action, Keepalive};
use crate::memory::{Arena, Buffer, Buffers, Mapping, Region, Slot, process};
use crate::message::{self, DataCrc, Limits, Message, Parsed, QueuePairAddress, RemoteRegion};
use crate::tcp;
use crate::transport::{Body, Bulk, ClientCounters, ClientTransport, NotSent, Reply, RequestId};
use crate::tuning::*;

/// A connection to a server over RDMA.
#[derive(Debug)]
pub struct Client {
    /// None once the connection has ended. First, so that it is destroyed before the memory that it uses.
    qp: Option<QueuePair>,
    outstanding: Outstanding<Pending>,
    regions: HashMap<u64, Keys>,
    arenas: Vec<(Arc<Mapping>, Keys)>,
    bounce: Vec<(Arena, Keys)>,
    domain: Arc<Domain>,
    channel: Arc<CompletionChannel>,
    /// rdma_cm's, if that has made the connection.
    events: Option<Arc<EventChannel>>,
    /// The TCP connection, if the queue pair was exchanged over one: it carries nothing more, and each ends
    /// with the other.
    stream: Option<tcp::Client>,
    /// When that ended.
    stream_ended: Option<Instant>,
    _async_fd: OwnedFd,
    /// Of the completion channel, `events` or `stream`, its device and `nudge`.
    epoll: OwnedFd,
    /// Raised when a program is about to poll and there is something already.
    nudge: OwnedFd,
    is_nudged: bool,
    /// A completion will be announced.
    is_armed: bool,
    /// A program polls the descriptor by itself.
    is_watched: bool,
    /// When the descriptors were last looked at.
    looked: Instant,
    keepalive: Keepalive,
    /// The process that connected: see [`process`].
    process: u64,

    grant: Grant,
    limits: Limits,
    inline_bytes_max: usize,
    /// Headers and commands of `queue`, in order.
    head: Vec<u8>,
    queue: VecDeque<Queued>,
    /// The message that is being taken in; kept for its memory.
    message: Vec<u8>,
    /// Replies that [`ClientTransport::receive`] has not yet handed out.
    done: Vec<Reply>,

    failure: Option<Error>,
    /// How requests end that the failure takes with it.
    lost: Status,
    counters: ClientCounters,
}

/// The keys of memory, by the direction that they allow.
#[derive(Debug)]
struct Keys {
    /// For the server to write. None for memory that cannot be written to at all.
    write: Option<Mr>,
    /// For the server to read.
    read: Mr,
}

#[derive(Debug)]
struct Pending {
    tag: u64,
    bulk: Bulk,
    /// What the server really reaches, where that is not `bulk`.
    bounce: Option<Slot>,
}

/// A message to be sent: so many bytes of `head`, then perhaps the request's data.
#[derive(Debug)]
struct Queued {
    head_len: usize,
    /// None for pings and pongs.
    request: Option<RequestId>,
    is_inline: bool,
}

impl Keys {
    fn of_mapping(domain: &Arc<Domain>, mapping: &Arc<Mapping>) -> Result<Self, Error> {
        Ok(Self {
            write: Some(Mr::of_mapping(domain, mapping, Access::RemoteWrite)?),
            read: Mr::of_mapping(domain, mapping, Access::RemoteRead)?,
        })
    }
}

impl Keys {
    /// The key for one direction.
    fn key(&self, is_in: bool) -> Option<u32> {
        if is_in { self.write.as_ref().map(Mr::rkey) } else { Some(self.read.rkey()) }
    }
}

impl Client {
    /// Connects to the server at `address`, from `source` if that is given, and shakes hands, by `deadline`.
    pub fn connect(
        address: SocketAddr,
        source: Option<IpAddr>,
        offer: &Offer,
        deadline: Instant,
    ) -> Result<Self, Error> {
        super::device::devices().map_err(no_rdma)?;
        // A lost datagram is sent again by rdma_cm only after four seconds.
        let mut patience = RDMA_CONNECT_TIME;
        let (mut qp, offer, domain, channel, events) = loop {
            let until = deadline.min(Instant::now() + patience);
            match Self::establish(address, source, offer, until) {
                Err(error) if error.errno() == libc::ETIMEDOUT && Instant::now() < deadline => patience *= 2,
                outcome => break outcome?,
            }
        };
        let grant = shake_hands(&mut qp, &channel, &events, &offer, deadline)?;
        qp.provide_receives(grant.credits() as usize + CONTROL_MESSAGES)?;
        Self::assemble(qp, grant, domain, channel, Some(events), None)
    }

    /// Moves a connection that has shaken hands over TCP, and asked for nothing yet, to a queue pair, by
    /// `deadline`. Fails with the TCP connection if it can be used as it is, and with why.
    pub fn upgrade(
        mut stream: tcp::Client,
        deadline: Instant,
    ) -> Result<Self, (Option<Box<tcp::Client>>, Error)> {
        let made = stream.local_address().and_then(|local| {
            let at = port_of(local.ip())?;
            Ok((at, Self::make_by_hand(&at, stream.grant()).map_err(|error| at.failed(error))?))
        });
        let (at, (qp, ours, domain, channel)) = match made {
            Ok(made) => made,
            Err(error) => return Err((Some(Box::new(stream)), error)),
        };
        // If it takes longer there must be time left to connect anew.
        let half = Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2;
        let theirs = match stream.exchange_queue_pairs(&ours, half) {
            Ok(theirs) => theirs,
            Err(error) if stream.failure().is_some() => return Err((None, error)),
            Err(error) => return Err((Some(Box::new(stream)), error)),
        };
        let mirrored = (theirs.psn, theirs.peer_psn, theirs.link) == (ours.peer_psn, ours.psn, ours.link);
        if !mirrored || theirs.reads != 0 {
            stream.abort(Violation::Field);
            return Err((None, Violation::Field.into()));
        }
        let lost = |error: Error| (None, at.failed(error));
        qp.join(&at, &ours, &theirs, 0).map_err(|source| {
            lost(Error::io("the queue pair cannot be connected with the server's", source))
        })?;
        let grant = *stream.grant();
        let mut this = Self::assemble(qp, grant, domain, channel, None, Some(stream)).map_err(lost)?;
        let asked = Instant::now();
        let until = asked + deadline.saturating_duration_since(asked) / RDMA_PROOF_PART;
        this.ping(until.saturating_duration_since(asked));
        while this.last_rx() < asked {
            this.receive(&mut Vec::new());
            if this.failure.is_some() {
                let text = "the server does not answer over the queue pair; see whether its packets (RoCE v2: UDP port 4791) come through";
                return Err(lost(Error::Unsupported(text.into())));
            }
            if this.last_rx() < asked {
                let _ = this.wait(Some(until + RDMA_DESCRIPTORS_EVERY));
            }
        }
        Ok(this)
    }

    /// A queue pair for what was granted, ready to receive, and its address.
    fn make_by_hand(
        at: &PortAddress,
        grant: &Grant,
    ) -> Result<(QueuePair, QueuePairAddress, Arc<Domain>, Arc<CompletionChannel>), Error> {
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
        Ok((qp, ours, domain, channel))
    }

    /// A client of a connection that is there.
    fn assemble(
        mut qp: QueuePair,
        grant: Grant,
        domain: Arc<Domain>,
        channel: Arc<CompletionChannel>,
        events: Option<Arc<EventChannel>>,
        mut stream: Option<tcp::Client>,
    ) -> Result<Self, Error> {
        let failed = |source| Error::io("Cannot watch an RDMA connection", source);
        qp.set_send_bytes_max(MESSAGE_BYTES + grant.inline_bytes_max as usize);
        let async_fd = domain.device.async_fd().map_err(failed)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
        let nudge = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| failed(errno.into()))?;
        let companions =
            events.iter().map(|events| events.fd()).chain(stream.iter_mut().map(|stream| stream.poll_fd().0));
        for fd in [channel.fd(), async_fd.as_fd(), nudge.as_fd()].into_iter().chain(companions) {
            epoll::add(&epoll, fd, EventData::new_u64(0), EventFlags::IN)
                .map_err(|errno| failed(errno.into()))?;
        }
        Ok(Self {
            qp: Some(qp),
            outstanding: Outstanding::new(&grant),
            regions: HashMap::new(),
            arenas: Vec::new(),
            bounce: Vec::new(),
            domain,
            channel,
            events,
            stream,
            stream_ended: None,
            _async_fd: async_fd,
            epoll,
            nudge,
            is_nudged: false,
            is_armed: false,
            is_watched: false,
            looked: Instant::now(),
            keepalive: Keepalive::new(&grant, Instant::now()),
            process: process(),
            grant,
            limits: grant.limits(),
            inline_bytes_max: (grant.inline_bytes_max as usize).min(RDMA_INLINE_BYTES_MAX),
            head: Vec::with_capacity(4096),
            queue: VecDeque::with_capacity(grant.credits() as usize),
            message: Vec::with_capacity(MESSAGE_BYTES),
            done: Vec::new(),
            failure: None,
            lost: Status::OK,
            counters: ClientCounters::default(),
        })
    }

    /// A connection as far as rdma_cm makes it.
    #[expect(clippy::type_complexity, reason = "the parts of a client")]
    fn establish(
        address: SocketAddr,
        source: Option<IpAddr>,
        offer: &Offer,
        deadline: Instant,
    ) -> Result<(QueuePair, Offer, Arc<Domain>, Arc<CompletionChannel>, Arc<EventChannel>), Error> {
        let failed = cannot_connect(address);
        let events = EventChannel::new().map_err(failed)?;
        let source = source.map(|ip| SocketAddr::new(ip, 0));
        let id = Id::resolve(&events, source, address, deadline).map_err(|source| {
            Error::io(
                format!(
                    "No RDMA device of this machine has a way to {address}; check that its interface is up and has an address of that \
                     network, see `raio_server --list-devices`"
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
        Ok((qp, offer, domain, channel, events))
    }

    /// How long the server may be silent while something is outstanding before the connection ends with
    /// ETIMEDOUT. It is pinged in between. Default: three times the keepalive granted.
    pub fn set_request_timeout(&mut self, timeout: Duration) {
        self.keepalive.set_request_timeout(timeout);
    }

    fn fail(&mut self, error: Error, lost: Status) {
        if self.failure.is_some() {
            return;
        }
        if let Error::Violation(violation) = &error {
            self.send_goaway(Status::protocol(violation.errno()), &violation.to_string());
        }
        self.failure = Some(error);
        self.lost = lost;
        self.queue.clear();
        self.head.clear();
    }

    /// Tells the server that this is the end, and sees to it that it has heard.
    fn send_goaway(&mut self, status: Status, text: &str) {
        let crc = self.limits.crc;
        let Some(qp) = &mut self.qp else { return };
        let mut goaway = Vec::new();
        message::encode_goaway(status, text, crc, &mut goaway);
        qp.look_at_sends();
        if qp.room() == 0 || !qp.has_room_for(goaway.len()) {
            return;
        }
        qp.send(std::iter::once(&goaway[..]), goaway.len());
        if qp.post(true).is_err() {
            return;
        }
        let deadline = Instant::now() + RDMA_GOAWAY_TIME;
        while !qp.is_idle() && Instant::now() < deadline {
            qp.look_at_sends();
            if let Some(Completion::Failed(_)) = qp.next() {
                return;
            }
            std::thread::yield_now();
        }
    }

    fn fail_violation(&mut self, violation: Violation) {
        let lost = match violation.errno() {
            libc::ETIMEDOUT => Status::transport(libc::ETIMEDOUT),
            errno => Status::protocol(errno),
        };
        self.fail(violation.into(), lost);
    }

    fn fail_lost(&mut self, errno: i32, why: &str) {
        let text = format!("{why}. If the server still runs, its log says more; connect anew");
        self.fail(Error::Closed { errno, text }, Status::transport(errno));
    }

    /// A work request has failed: the queue pair is dead. The reason may lie with the sends.
    fn fail_work(&mut self, failure: Failure) {
        let mut first = failure;
        if let Some(qp) = &mut self.qp {
            qp.look_at_sends();
            while let Some(completion) = qp.next() {
                if let Completion::Failed(failure) = completion
                    && first.is_flush()
                {
                    first = failure;
                }
            }
        }
        if first.is_flush() {
            self.look_at_descriptors();
            return self.fail_lost(libc::ECONNRESET, "the server closed it");
        }
        if first.is_length() {
            return self.fail_violation(Violation::Length);
        }
        let device = self.domain.device.name();
        self.fail_lost(first.errno(), &format!("the RDMA device {device} says: {}", first.text()));
    }

    /// Moves everything outstanding to `replies`, after a failure. The queue pair goes first: nothing lands
    /// in memory that its owner has back.
    fn hand_out_lost(&mut self, replies: &mut Vec<Reply>) {
        if let Some(qp) = self.qp.take() {
            qp.disconnect();
        }
        self.stream = None;
        replies.append(&mut self.done);
        for pending in self.outstanding.drain() {
            replies.push(Reply {
                tag: pending.tag,
                status: self.lost,
                result: 0,
                body: Body::from(&[][..]),
                data_len: 0,
                bulk: pending.bulk,
            });
        }
    }

    // Receiving
    // ----------------------------------------------------------------------------------------------------

    /// Takes in what has completed. Whether anything had.
    fn take_completions(&mut self, replies: &mut Vec<Reply>) -> bool {
        let mut arrived = false;
        while self.failure.is_none()
            && let Some(qp) = &mut self.qp
            && qp.look()
        {
            arrived = true;
            match qp.next() {
                Some(Completion::Received(message)) => {
                    // Copied, for the queue pair may be needed for an answer.
                    let mut bytes = std::mem::take(&mut self.message);
                    bytes.clear();
                    bytes.extend_from_slice(qp.bytes(&message));
                    qp.give_back(message);
                    if let Err(violation) = self.take_in(&bytes, replies) {
                        self.fail_violation(violation);
                    }
                    self.message = bytes;
                }
                Some(Completion::Placed { immediate, len, receive }) => {
                    qp.give_back(receive);
                    if let Err(violation) = self.take_in_placed(immediate, len, replies) {
                        self.fail_violation(violation);
                    }
                }
                Some(Completion::Failed(failure)) => self.fail_work(failure),
                Some(Completion::Read(..)) | None => {}
            }
        }
        if arrived {
            self.keepalive.on_receive(Instant::now());
            self.counters.receives += 1;
            if let Some(qp) = &mut self.qp
                && let Err(error) = qp.post_receives()
            {
                self.fail_lost(error.raw_os_error().unwrap_or(libc::EIO), "the RDMA device rejects receives");
            }
        }
        arrived
    }

    /// Takes in a SEND: whole messages, one or more.
    fn take_in(&mut self, mut messages: &[u8], replies: &mut Vec<Reply>) -> Result<(), Violation> {
        loop {
            let Parsed::Item(message, taken) = message::parse(messages, &self.limits)? else {
                return Err(Violation::Length);
            };
            self.take_in_message(message, replies)?;
            // Data does not travel in responses: it has been placed.
            messages = &messages[taken..];
            if messages.is_empty() || self.failure.is_some() {
                return Ok(());
            }
        }
    }

    /// Takes in the response to a read that has filled so many bytes.
    fn take_in_placed(&mut self, id: u32, len: u32, replies: &mut Vec<Reply>) -> Result<(), Violation> {
        if self.limits.crc {
            return Err(Violation::Checksum);
        }
        replies.push(self.finish(&message::Response::of_data(id.into(), len), &[])?);
        Ok(())
    }

    fn take_in_message(&mut self, message: Message<'_>, replies: &mut Vec<Reply>) -> Result<(), Violation> {
        match message {
            Message::Response(response, body) => replies.push(self.finish(&response, body)?),
            Message::Ping(id) => {
                if self.queue.len() > self.grant.credits() as usize + CONTROL_MESSAGES {
                    return Err(Violation::Stalled);
                }
                let start = self.head.len();
                message::encode_pong(id, self.limits.crc, &mut self.head);
                let head_len = self.head.len() - start;
                self.queue.push_back(Queued { head_len, request: None, is_inline: false });
                self.flush();
            }
            Message::Pong(id) if self.keepalive.permits_pong(id) => {}
            Message::Pong(_) => return Err(Violation::RequestId),
            Message::Goaway(status, text) => {
                let text = message::text(text);
                let lost = match status.class {
                    Class::Protocol => status,
                    _ => Status::transport(libc::ECONNRESET),
                };
                let errno = if status.is_ok() { libc::ECONNRESET } else { status.errno };
                self.fail(Error::Closed { errno, text }, lost);
            }
            Message::Request(..) => return Err(Violation::Kind(message::Kind::Request as u8)),
            Message::QueuePair(..) => return Err(Violation::Kind(message::Kind::QueuePair as u8)),
        }
        Ok(())
    }

    fn finish(&mut self, response: &message::Response, body: &[u8]) -> Result<Reply, Violation> {
        let id = RequestId(response.id);
        if self.queue.iter().any(|queued| queued.request == Some(id)) {
            return Err(Violation::RequestId);
        }
        let pending = self.outstanding.get_mut(id).ok_or(Violation::RequestId)?;
        let data_len = response.data_len as usize;
        // Checks come before the request ends, so that a violation finds it outstanding and ends it with the
        // others.
        if data_len > pending.bulk.len_in() {
            return Err(Violation::Length);
        }
        if let Bulk::In(buffers) = &mut pending.bulk {
            if let Some(slot) = &pending.bounce {
                buffers.write_at(0, &slot.bytes()[..data_len]);
                self.counters.bounced_bytes += data_len as u64;
            }
            if self.limits.crc && crc_of(buffers, data_len) != response.data_crc {
                return Err(Violation::Checksum);
            }
        } else if response.data_crc != 0 {
            return Err(Violation::Length);
        }
        let pending = self.outstanding.finish(id, response.credits)?;
        Ok(Reply {
            tag: pending.tag,
            status: response.status,
            result: response.result,
            body: Body::from(body),
            data_len,
            bulk: pending.bulk,
        })
    }

    /// Hears what rdma_cm and the device have to say, and empties the completion channel.
    fn look_at_descriptors(&mut self) {
        self.looked = Instant::now();
        let is_armed = &mut self.is_armed;
        self.channel.take_events(|_| *is_armed = false);
        if std::mem::take(&mut self.is_nudged) {
            let _ = rustix::io::read(&self.nudge, &mut [0; 8]);
        }
        for what in self.domain.device.take_async_events() {
            tracing::warn!("The RDMA device {} says: {what}.", self.domain.device.name());
        }
        self.look_at_stream();
        while let Some(event) = self.events.as_ref().and_then(EventChannel::next) {
            match event.kind {
                Kind::Disconnected | Kind::Rejected => {
                    // What came before is taken in first: it may say why.
                    let mut replies = Vec::new();
                    self.take_completions(&mut replies);
                    self.done.append(&mut replies);
                    self.fail_lost(libc::ECONNRESET, "the server closed it");
                }
                Kind::DeviceRemoved => self.fail_lost(libc::ENODEV, "its RDMA device was removed"),
                _ => {}
            }
        }
    }

    /// Sees whether the TCP connection still is, and ends with it, after what is on its way by the queue
    /// pair: that may say more.
    fn look_at_stream(&mut self) {
        let Some(stream) = &mut self.stream else { return };
        if stream.failure().is_none() {
            stream.receive(&mut Vec::new());
        }
        let Some(failure) = stream.failure() else { return };
        if self.stream_ended.get_or_insert_with(Instant::now).elapsed() < RDMA_COMPANION_GRACE {
            return;
        }
        let (errno, text) = match failure {
            Error::Closed { errno, text } => (*errno, text.clone()),
            other => (other.errno(), other.to_string()),
        };
        let lost = if let Error::Violation(violation) = failure {
            Status::protocol(violation.errno())
        } else {
            Status::transport(libc::ECONNRESET)
        };
        self.fail(Error::Closed { errno, text }, lost);
    }

    // Sending
    // ------------------------------------------------------------------------------------------------------

    /// The address and key of memory for the server, if it can reach this by itself.
    fn reachable(&self, buffers: &Buffers, is_in: bool) -> Option<(u64, u32)> {
        let [buffer] = buffers.pieces() else { return None };
        let keys = match buffer {
            Buffer::Raw(raw) => self.regions.get(&raw.region()?.number())?,
            Buffer::Slot(slot, _) => &self.arenas.iter().find(|(mapping, _)| slot.is_of(mapping))?.1,
            Buffer::Owned(_) => return None,
        };
        let key = keys.key(is_in)?;
        Some((buffer.bytes().as_ptr().expose_provenance() as u64, key))
    }

    /// A slot for data whose memory is not registered, with the address and key for the server.
    fn bounce(&mut self, len: usize, is_in: bool) -> Result<(Slot, u64, u32), Error> {
        let found = self.bounce.iter_mut().rev().find_map(|(arena, keys)| Some((arena.alloc(len)?, keys)));
        let (slot, keys) = match found {
            Some((slot, keys)) => (slot, keys),
            None => {
                let mapped: usize = self.bounce.iter().map(|(arena, _)| arena.len()).sum();
                let bytes = mapped.max(RDMA_BOUNCE_BYTES_MIN);
                let no_memory = |source| {
                    Error::io("There is no memory for data that is not registered; free some", source)
                };
                let mut arena = Arena::new(bytes, self.grant.data_bytes_max as usize).map_err(no_memory)?;
                let slot =
                    arena.alloc(len).ok_or_else(|| no_memory(std::io::ErrorKind::OutOfMemory.into()))?;
                let keys = Keys::of_mapping(&self.domain, &arena.mapping())?;
                self.bounce.push((arena, keys));
                let Some((_, keys)) = self.bounce.last_mut() else { unreachable!("it was just pushed") };
                (slot, keys)
            }
        };
        let Some(key) = keys.key(is_in) else { unreachable!("our own memory can be written to") };
        let address = slot.bytes().as_ptr().expose_provenance() as u64;
        Ok((slot, address, key))
    }

    /// Lays a request's memory open: what the request says of it, whether its data is to be inline, and the
    /// bounce slot if one is needed.
    fn lay_open(&mut self, bulk: &Bulk) -> Result<(RemoteRegion, bool, Option<Slot>), Error> {
        match bulk {
            Bulk::None => Ok((RemoteRegion::None, false, None)),
            Bulk::Out(buffers) if buffers.len() <= self.inline_bytes_max => {
                Ok((RemoteRegion::None, true, None))
            }
            Bulk::In(buffers) | Bulk::Out(buffers) => {
                let is_in = matches!(bulk, Bulk::In(_));
                let len = buffers.len();
                let (slot, address, key) = match self.reachable(buffers, is_in) {
                    _ if len == 0 => (None, 0, 0),
                    Some((address, key)) => (None, address, key),
                    None => {
                        let (mut slot, address, key) = self.bounce(len, is_in)?;
                        if !is_in {
                            let mut rest = slot.bytes_mut();
                            for part in buffers.slices(0..len) {
                                let (now, later) = rest.split_at_mut(part.len());
                                now.copy_from_slice(part);
                                rest = later;
                            }
                            self.counters.bounced_bytes += len as u64;
                        }
                        (Some(slot), address, key)
                    }
                };
                let len = len as u32;
                let region = if is_in {
                    RemoteRegion::In { address, key, len }
                } else {
                    RemoteRegion::Out { address, key, len }
                };
                Ok((region, false, slot))
            }
        }
    }

    /// Chains from the front of the queue as far as there is room, and posts.
    fn send_queue(&mut self) {
        let Some(qp) = &mut self.qp else { return };
        if qp.is_half_full() {
            qp.look_at_sends();
        }
        let mut taken = 0;
        while let Some(queued) = self.queue.front() {
            let head = &self.head[taken..taken + queued.head_len];
            let pending = queued.request.filter(|_| queued.is_inline).and_then(|id| self.outstanding.get(id));
            let data = match pending {
                Some(Pending { bulk: Bulk::Out(buffers), .. }) => Some(buffers),
                _ => None,
            };
            let data_len = data.map_or(0, Buffers::len);
            let len = head.len() + data_len;
            if qp.room() == 0 || !qp.has_room_for(len) {
                break;
            }
            let slices = data.into_iter().flat_map(|buffers| buffers.slices(0..data_len));
            qp.send(std::iter::once(head).chain(slices), len);
            self.counters.bounced_bytes += data_len as u64;
            taken += queued.head_len;
            self.queue.pop_front();
        }
        if taken > 0 {
            self.head.drain(..taken);
            self.counters.sends += 1;
            let signal = qp.is_half_full();
            if let Err(error) = qp.post(signal) {
                self.fail_lost(error.raw_os_error().unwrap_or(libc::EIO), "the RDMA device rejects work");
            }
        }
    }

    fn queue_ping(&mut self, now: Instant) {
        let id = self.keepalive.on_ping(now);
        let start = self.head.len();
        message::encode_ping(id, self.limits.crc, &mut self.head);
        let head_len = self.head.len() - start;
        self.queue.push_back(Queued { head_len, request: None, is_inline: false });
    }

    // Keepalive
    // ------------------------------------------------------------------------------------------------------

    /// Pings a server that has been silent for long. Whether it has been silent for too long; if so, and
    /// nothing has arrived, it is given up.
    fn has_timed_out(&mut self, now: Instant) -> bool {
        if self.failure.is_some() {
            return false;
        }
        let verdict = self.keepalive.action(now, !self.outstanding.is_empty());
        if verdict == Action::Ping {
            self.queue_ping(now);
            self.flush();
        }
        verdict == Action::TimedOut
    }
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
                "Cannot connect to {address} by RDMA; check that raio_server listens there with --listen rdma://"
            ),
            source,
        )
    }
}

/// Sends the hello and waits for the welcome.
fn shake_hands(
    qp: &mut QueuePair,
    channel: &Arc<CompletionChannel>,
    events: &Arc<EventChannel>,
    offer: &Offer,
    deadline: Instant,
) -> Result<Grant, Error> {
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

fn crc_of(buffers: &Buffers, len: usize) -> u32 {
    let mut crc = DataCrc::default();
    buffers.slices(0..len).for_each(|slice| crc.update(slice));
    crc.finish()
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: duration.subsec_nanos().into() }
}

impl ClientTransport for Client {
    fn grant(&self) -> &Grant {
        &self.grant
    }

    fn send(&mut self, tag: u64, body: &[u8], bulk: Bulk, control: bool) -> Result<RequestId, NotSent> {
        if self.failure.is_some() {
            return Err(NotSent(bulk));
        }
        assert!(
            bulk.len_out().max(bulk.len_in()) <= self.limits.data_bytes_max as usize
                && body.len() <= message::BODY_BYTES_MAX,
            "a request exceeds the grant"
        );
        if self.outstanding.is_empty() {
            self.keepalive.on_send(Instant::now());
        }
        let id = match self.outstanding.insert(Pending { tag, bulk: Bulk::None, bounce: None }, control) {
            Ok(id) => id,
            Err(_) => return Err(NotSent(bulk)),
        };
        let (region, is_inline, bounce) = match self.lay_open(&bulk) {
            Ok(open) => open,
            Err(error) => {
                // It was taken, so it ends as a request does.
                let _ = self.outstanding.finish(id, 1);
                let status = Status::transport(error.errno());
                let text = format!("{error}.");
                let body = Body::from(message::clipped(&text).as_bytes());
                self.done.push(Reply { tag, status, result: 0, body, data_len: 0, bulk });
                return Ok(id);
            }
        };
        let data_len = if is_inline { bulk.len_out() } else { 0 };
        let data_crc = match &bulk {
            Bulk::Out(buffers) if self.limits.crc => crc_of(buffers, buffers.len()),
            _ => 0,
        };
        let request = message::Request { id: id.0, body_len: 0, data_len: data_len as u32, region, data_crc };
        let start = self.head.len();
        request.encode(body, self.limits.crc, &mut self.head);
        let head_len = self.head.len() - start;
        self.queue.push_back(Queued { head_len, request: Some(id), is_inline });
        let Some(pending) = self.outstanding.get_mut(id) else { unreachable!("it was just put in") };
        pending.bulk = bulk;
        pending.bounce = bounce;
        Ok(id)
    }

    fn dequeue(&mut self, request: RequestId) -> Option<Bulk> {
        let at = self.queue.iter().position(|queued| queued.request == Some(request))?;
        let start: usize = self.queue.iter().take(at).map(|queued| queued.head_len).sum();
        let queued = self.queue.remove(at)?;
        self.head.drain(start..start + queued.head_len);
        self.outstanding.finish(request, 1).ok().map(|pending| pending.bulk)
    }

    fn flush(&mut self) {
        if !self.queue.is_empty() {
            self.send_queue();
        }
    }

    fn receive(&mut self, replies: &mut Vec<Reply>) -> bool {
        let before = replies.len();
        replies.append(&mut self.done);
        let mut arrived = self.take_completions(replies);
        if !self.queue.is_empty() {
            self.flush();
        }
        while self.is_watched && self.failure.is_none() && (arrived || !self.is_armed) {
            // It must be armed, with nothing left behind.
            self.look_at_descriptors();
            let Some(qp) = self.qp.as_ref() else { break };
            if !self.is_armed {
                self.is_armed = qp.arm().is_ok();
            }
            if !self.take_completions(replies) {
                break;
            }
            arrived = true;
        }
        if !arrived {
            let now = Instant::now();
            if now - self.looked >= RDMA_DESCRIPTORS_EVERY {
                self.look_at_descriptors();
            }
            if self.has_timed_out(now) {
                self.fail_lost(libc::ETIMEDOUT, "the server has been silent for too long");
            }
        }
        replies.append(&mut self.done);
        if self.failure.is_some() {
            self.hand_out_lost(replies);
        }
        arrived || replies.len() > before
    }

    fn wait(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        self.flush();
        loop {
            let now = Instant::now();
            if self.has_timed_out(now)
                || self.failure.is_some()
                || !self.done.is_empty()
                || deadline.is_some_and(|deadline| now >= deadline)
            {
                return Ok(());
            }
            let Some(qp) = &mut self.qp else { return Ok(()) };
            if !self.is_armed {
                qp.arm().map_err(|source| Error::io("Cannot watch an RDMA connection", source))?;
                self.is_armed = true;
            }
            if qp.look() {
                return Ok(());
            }
            let until =
                deadline.into_iter().chain(self.keepalive.deadline(!self.outstanding.is_empty())).min();
            let mut left = until.map(|until| until.saturating_duration_since(now));
            if !self.queue.is_empty() {
                // What would make room is not announced.
                left = Some(left.map_or(RDMA_ROOM_EVERY, |left| left.min(RDMA_ROOM_EVERY)));
            }
            let timeout = left.map(timespec);
            let mut fds = [PollFd::from_borrowed_fd(self.epoll.as_fd(), PollFlags::IN)];
            match rustix::event::poll(&mut fds, timeout.as_ref()) {
                Ok(0) if self.queue.is_empty() => {}
                Ok(0) => {
                    if let Some(qp) = &mut self.qp {
                        qp.look_at_sends();
                    }
                    self.flush();
                }
                Ok(_) => {
                    self.look_at_descriptors();
                    return Ok(());
                }
                Err(errno) => return Err(Error::io("Waiting for the server was interrupted", errno)),
            }
        }
    }

    fn poll_fd(&mut self) -> (BorrowedFd<'_>, bool) {
        if !std::mem::replace(&mut self.is_watched, true)
            && let Some(qp) = &mut self.qp
        {
            self.is_armed = qp.arm().is_ok();
            if qp.look() {
                self.is_nudged = rustix::io::write(&self.nudge, &1u64.to_ne_bytes()).is_ok();
            }
        }
        (self.epoll.as_fd(), false)
    }

    fn register_region(&mut self, region: &Region) -> Result<(), Error> {
        let write = match Mr::of_region(&self.domain, region, Access::RemoteWrite) {
            Ok(write) => Some(write),
            // It is mapped for reading: good for writes to a file.
            Err(error) if error.errno() == libc::EFAULT => None,
            Err(error) => return Err(error),
        };
        let keys = Keys { write, read: Mr::of_region(&self.domain, region, Access::RemoteRead)? };
        self.regions.insert(region.number(), keys);
        Ok(())
    }

    fn unregister_region(&mut self, region: &Region) {
        self.regions.remove(&region.number());
    }

    fn register_arena(&mut self, arena: &Arena) -> Result<(), Error> {
        let mapping = arena.mapping();
        let keys = Keys::of_mapping(&self.domain, &mapping)?;
        self.arenas.push((mapping, keys));
        Ok(())
    }

    fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    fn credits(&self) -> usize {
        self.outstanding.credits()
    }

    fn failure(&self) -> Option<&Error> {
        self.failure.as_ref()
    }

    fn ping(&mut self, timeout: Duration) {
        if self.failure.is_none() {
            let now = Instant::now();
            self.queue_ping(now);
            self.keepalive.expect_by(now + timeout);
            self.flush();
        }
    }

    fn last_rx(&self) -> Instant {
        self.keepalive.last_rx()
    }

    fn abort(&mut self, violation: Violation) {
        self.fail_violation(violation);
    }

    fn local_port(&self) -> Option<u16> {
        self.stream.as_ref()?.local_port()
    }

    fn counters(&self) -> ClientCounters {
        self.counters
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if self.process != process() {
            // A forked child's copy: the device's objects are its parent's, and so is the memory that it
            // cannot reach.
            std::mem::forget((self.qp.take(), self.stream.take(), self.events.take()));
            std::mem::forget((std::mem::take(&mut self.regions), std::mem::take(&mut self.arenas)));
            std::mem::forget((
                std::mem::take(&mut self.bounce),
                Arc::clone(&self.domain),
                Arc::clone(&self.channel),
            ));
            return;
        }
        // What is unsent or unanswered is given up: it is not sent any more, and the server sees a client
        // that is lost.
        if self.failure.is_none() && self.outstanding.is_empty() {
            self.flush();
            self.send_goaway(Status::OK, "");
        }
        // Before the memory that it uses.
        if let Some(qp) = self.qp.take() {
            qp.disconnect();
        }
    }
}
