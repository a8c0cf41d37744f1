//! The server's side of RDMA: all connections of one worker.
//!
//! This moves messages for [`MessageConnection`]s, which know the protocol. A request's data comes with it,
//! in the receive buffer that it arrived in, or is fetched by RDMA READ under a budget of its own; the data
//! of its response is placed by RDMA WRITE, with the response in its immediate data or behind it in the same
//! chain. A connection's chain is posted once an iteration.
//!
//! A connection whose answers pile up is not taken in from: its messages stay in their receive buffers, which
//! are not posted again, so what it holds here stays within its credits.
//!
//! One that has news is *hot*: its queue is polled each turn. Before the worker sleeps every hot one is
//! armed, polled once more, and from then on announces itself at its device's completion channel.

use std::any::Any;
use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use slab::Slab;

use super::cm::{EventChannel, Kind as CmKind};
use super::device::{Access, CompletionChannel, Device, Domain, Limits, Mr, devices};
use super::out_of_band::port_of;
use super::queue_pair::{Completion, Failure, Message as Received, QueuePair, Size, registrations};
use super::{HANDSHAKE_MESSAGES, MESSAGE_BYTES, RdmaIncoming, no_rdma, rejection, request};
use crate::error::{Error, Status, Violation};
use crate::handshake::{Policy, PushWindows};
use crate::memory::{Arena, Mapping, Slot, SlotRange};
use crate::message::{Link, QueuePairAddress, RemoteRegion};
use crate::reactor::{Event, File, LoopClock, Op, Payload, Reactor, TimerId, Token};
use crate::server::{DataSource, Due, MessageConnection, Outgoing, Phase, Taken};
use crate::transport::{
    self, ALIVE_FOR, CloseReason, ConnectionId, Handover, NotPushed, Push, QueuePairMemory, RequestKey,
    Response, ServerCounters, ServerEvent, ServerTransport, UpgradeRequest,
};
use crate::tuning::{
    CONTROL_MESSAGES, PROBE_EVERY, QUEUE_COMPLETIONS_MAX, SEND_RING_BYTES, WORK_REQUESTS_MIN,
};

/// What the server's operations in the reactor are about: the low bits of a token's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// rdma_cm has an event.
    Connecting = 0,
    /// The device with this index has completions.
    Completions = 1,
    /// Something has happened to the device with this index.
    Device = 2,
    /// A timer of the connection with this id.
    Timer = 3,
}

/// See the module documentation.
pub struct RdmaServer {
    owner: u8,
    policy: Arc<Policy>,
    arena: Arc<Mapping>,
    // Before the devices, which their queue pairs use.
    connections: Slab<Connection>,
    ports: Vec<Port>,
    channel: Arc<EventChannel>,
    channel_file: File,
    generation: u32,
    events: VecDeque<ServerEvent>,
    /// Streams whose queue pairs have ended.
    ended: VecDeque<Handover>,
    /// Connections whose queues are polled.
    hot: Vec<ConnectionId>,
    /// Connections with something to post since the last flush.
    dirty: Vec<ConnectionId>,
    /// Of connections that have ended.
    counters: ServerCounters,
    /// When rdma_cm was last asked for disconnects.
    asked: Instant,
    memory: QueuePairMemory,
}

/// A device as this worker uses it.
#[derive(Debug)]
struct Port {
    device: Device,
    limits: Limits,
    /// The server's policy within the device's limits.
    policy: Arc<Policy>,
    domain: Arc<Domain>,
    arena: Mr,
    channel: Arc<CompletionChannel>,
    channel_file: File,
    async_file: File,
}

/// A connection with what is the device's.
#[derive(Debug)]
struct Connection {
    qp: QueuePair,
    /// Data that came with a request is kept where it was received, with what is around it.
    messages: MessageConnection<(Received, Range<usize>)>,
    /// The stream that it began on, whose end is the end of this connection.
    companion: Option<ConnectionId>,
    /// Dropped after the queue pair. See [`ServerTransport::hold`].
    held: Option<Arc<dyn Any>>,
    /// So are these. See [`QueuePairMemory`].
    memory: Vec<Box<dyn Any>>,
    /// The client's address, for the log.
    peer: Option<IpAddr>,
    port: usize,
    /// When its device last showed that it is there, or was asked to.
    answered: Instant,
    timer: Option<(Instant, TimerId)>,
    is_hot: bool,
    is_dirty: bool,
    /// Received and not taken in.
    inbox: VecDeque<Received>,
    /// RDMA READs that wait for their turn: the requests' ids, and where the data goes.
    fetches: VecDeque<(u64, SlotRange)>,
    reads: usize,
    reads_max: usize,
    /// The response that is being chained; kept for its memory.
    header: Vec<u8>,
    counters: ServerCounters,
}

/// The connection with this id.
fn find(connections: &mut Slab<Connection>, id: ConnectionId) -> Option<&mut Connection> {
    connections.get_mut(id.index as usize).filter(|connection| connection.id() == id)
}

impl RdmaServer {
    /// See [`super::server`].
    pub fn new(
        reactor: &mut Reactor,
        owner: u8,
        policy: Arc<Policy>,
        arena: &Arena,
        memory: QueuePairMemory,
    ) -> Result<Self, Error> {
        let failed = |source| Error::io("Cannot watch for RDMA connections", source);
        let channel = EventChannel::new().map_err(failed)?;
        let channel_file = reactor.file(channel.owned_fd().map_err(failed)?);
        let mut this = Self {
            owner,
            policy,
            arena: arena.mapping(),
            connections: Slab::new(),
            ports: Vec::new(),
            channel,
            channel_file,
            generation: 0,
            events: VecDeque::new(),
            ended: VecDeque::new(),
            hot: Vec::new(),
            dirty: Vec::new(),
            counters: ServerCounters::default(),
            asked: reactor.clock().now(),
            memory,
        };
        this.watch(reactor, Kind::Connecting, 0);
        let mut last = None;
        for &device in devices().map_err(no_rdma)? {
            if let Err(error) = this.add_port(reactor, device) {
                tracing::warn!(
                    name: "rdma-device-unused",
                    device = device.name(),
                    "An RDMA device is not used: {error}."
                );
                last = Some(error);
            }
        }
        match last {
            Some(error) if this.ports.is_empty() => Err(error),
            _ => Ok(this),
        }
    }

    fn add_port(&mut self, reactor: &mut Reactor, device: Device) -> Result<(), Error> {
        let failed = |source| Error::io(format!("Cannot use the RDMA device {}", device.name()), source);
        let limits = device.limits().map_err(failed)?;
        let domain = Domain::new(device)?;
        let access = if limits.is_iwarp { Access::LocalWriteIwarp } else { Access::LocalWrite };
        let arena = Mr::of_mapping(&domain, &self.arena, access)?;
        let channel = CompletionChannel::new(device)?;
        let channel_file = reactor.file(channel.fd().try_clone_to_owned().map_err(failed)?);
        let async_file: OwnedFd = device.async_fd().map_err(failed)?;
        let async_file = reactor.file(async_file);
        let policy = within(&self.policy, &limits, &device);
        self.ports.push(Port { device, limits, policy, domain, arena, channel, channel_file, async_file });
        self.watch(reactor, Kind::Completions, self.ports.len() - 1);
        self.watch(reactor, Kind::Device, self.ports.len() - 1);
        Ok(())
    }

    /// Has the reactor tell when this file is readable.
    fn watch(&self, reactor: &mut Reactor, kind: Kind, index: usize) {
        let file = match kind {
            Kind::Connecting => &self.channel_file,
            Kind::Completions => &self.ports[index].channel_file,
            Kind::Device | Kind::Timer => &self.ports[index].async_file,
        };
        let token = Token { owner: self.owner, value: (index as u64) << 2 | kind as u64 };
        reactor.submit(token, Op::Readable { file: file.clone() });
    }

    /// Takes over a connection that a client asks for. The handshake is still to come. Fails, with the client
    /// rejected, if the device cannot have one more, or there is no memory for it.
    fn adopt(&mut self, reactor: &mut Reactor, incoming: RdmaIncoming) -> Result<ConnectionId, Error> {
        let RdmaIncoming { mut id, reads_out } = incoming;
        let peer = id.peer().map(|peer| peer.ip());
        let device = id.device();
        let Some(port) = self.ports.iter().position(|port| Some(port.device) == device) else {
            let text = "The server does not use the RDMA device that this came by.";
            id.reject(&rejection(libc::ENODEV, text));
            return Err(Error::Unsupported(text.into()));
        };
        let Port { limits, policy, domain, channel, .. } = &self.ports[port];
        let reads_max = reads_out.min(limits.reads_out);
        if reads_max == 0 {
            let text = "The client's device allows no RDMA READ, by which large writes are fetched. Use TCP.";
            id.reject(&rejection(libc::EOPNOTSUPP, text));
            return Err(Error::Unsupported(text.into()));
        }
        let credits = policy.queue_depth as usize + 1;
        let size = size_for(credits, policy.push.messages(), policy.inline_bytes_max, reads_max);
        // What the handshake takes; the rest is asked for when it has said how many credits there are.
        let memory = match (self.memory)(peer, size.send_bytes + messages_bytes(HANDSHAKE_MESSAGES, &size)) {
            Ok(memory) => memory,
            Err(text) => {
                id.reject(&rejection(libc::ENOMEM, &text));
                return Err(Error::Unsupported(text.trim_end_matches('.').into()));
            }
        };
        self.generation = self.generation.wrapping_add(1) & 0x3fff_ffff;
        let entry = self.connections.vacant_entry();
        let connection_id =
            ConnectionId { transport: self.owner, index: entry.key() as u32, generation: self.generation };
        let number = number_of(connection_id);
        id.set_tag(number);
        id.migrate(&self.channel)
            .map_err(|source| Error::io("Cannot take over an RDMA connection", source))?;
        // From here on the queue pair owns the identifier; if it cannot be made the client is rejected
        // without a reason.
        let mut qp = QueuePair::new(Some(id), domain, channel, number, limits, &size, true)?;
        qp.provide_receives(HANDSHAKE_MESSAGES)?;
        qp.arm().map_err(|source| Error::io("Cannot watch an RDMA connection", source))?;
        qp.id()
            .accept(&request(), reads_max)
            .map_err(|source| Error::io("Cannot accept an RDMA connection", source))?;
        let messages = MessageConnection::new(connection_id, policy, reactor.clock());
        let mut connection = Connection::new(qp, messages, port, &size, reads_max, reactor.clock());
        connection.peer = peer;
        connection.memory.push(memory);
        entry.insert(connection);
        self.set_timer(reactor, connection_id);
        Ok(connection_id)
    }

    /// Makes a queue pair for a client that has shaken hands over TCP and told where its own is.
    fn take_over_stream(
        &mut self,
        reactor: &mut Reactor,
        request: &UpgradeRequest,
    ) -> Result<(ConnectionId, QueuePairAddress), Error> {
        let unfit = |what: String| Err(Error::Unsupported(what));
        let UpgradeRequest { peer, theirs, local, remote, .. } = request;
        let (Some(local), Some(remote)) = (*local, *remote) else {
            return unfit("the connection has no IP addresses; use TCP".into());
        };
        let at = port_of(local)?;
        let (grant, gid) = (&peer.grant, Ipv6Addr::from(theirs.gid));
        if theirs.link != at.link || (at.link == Link::InfiniBand && theirs.gid[..8] != at.gid[..8]) {
            return Err(at.failed("the client's port is on another network; use TCP"));
        }
        // The kernel looks up the way to the client's GID, and waits for it: so it must be one that is known.
        if at.link == Link::Ethernet && gid.to_canonical() != remote {
            let text =
                format!("the client's GID {gid} is not its address {remote}, so the way is unknown; use TCP");
            return Err(at.failed(text));
        }
        let Some(port) = self.ports.iter().position(|port| port.device == at.device) else {
            return Err(at.failed("the server does not use this device; see its log"));
        };
        let Port { limits, policy, domain, channel, .. } = &self.ports[port];
        if grant.queue_depth > policy.queue_depth || grant.data_bytes_max > policy.data_bytes_max {
            return Err(at.failed(
                "the device allows less than what was granted; use TCP, or lower the server's limits",
            ));
        }
        let reads_max = theirs.reads.min(limits.reads_out.into()) as u8;
        if reads_max == 0 {
            return Err(at.failed(
                "the client's device allows no RDMA READ, by which large writes are fetched; use TCP",
            ));
        }
        let credits = grant.credits() as usize;
        let size = size_for(credits, grant.push.messages(), grant.inline_bytes_max, reads_max);
        let memory = (self.memory)(Some(remote), size.send_bytes + messages_bytes(size.receives, &size))
            .map_err(|text| at.failed(text.trim_end_matches('.')))?;
        self.generation = self.generation.wrapping_add(1) & 0x3fff_ffff;
        let entry = self.connections.vacant_entry();
        let id =
            ConnectionId { transport: self.owner, index: entry.key() as u32, generation: self.generation };
        let mut qp = QueuePair::new(None, domain, channel, number_of(id), limits, &size, true)
            .map_err(|error| at.failed(error))?;
        let ours = qp.address(&at, theirs.peer_psn, theirs.psn, 0);
        qp.init(&at, false)
            .map_err(|source| at.failed(format!("the port takes no queue pair ({source})")))?;
        qp.provide_receives(size.receives).map_err(|error| at.failed(error))?;
        qp.arm().map_err(|source| at.failed(format!("its completions cannot be watched ({source})")))?;
        qp.join(&at, &ours, theirs, reads_max).map_err(|source| {
            at.failed(format!(
                "it finds no way to the client's GID {gid} ({source}); see the client's network"
            ))
        })?;
        qp.set_send_bytes_max(MESSAGE_BYTES);
        let mut messages = MessageConnection::new(id, policy, reactor.clock());
        messages.open(peer, None, reactor.clock());
        let mut connection = Connection::new(qp, messages, port, &size, reads_max, reactor.clock());
        connection.peer = Some(remote);
        connection.memory.push(memory);
        connection.held = request.held.clone();
        connection.companion = Some(request.connection);
        entry.insert(connection);
        self.set_timer(reactor, id);
        Ok((id, ours))
    }

    fn get(&mut self, id: ConnectionId) -> Option<&mut Connection> {
        find(&mut self.connections, id)
    }

    /// The same, if it has not been reported as closed.
    fn get_alive(&mut self, id: ConnectionId) -> Option<&mut Connection> {
        self.get(id).filter(|connection| !connection.is_lingering())
    }

    fn heat(&mut self, id: ConnectionId) {
        if let Some(connection) = self.get(id)
            && !std::mem::replace(&mut connection.is_hot, true)
        {
            self.hot.push(id);
        }
    }

    fn mark_dirty(&mut self, id: ConnectionId) {
        if let Some(connection) = self.get(id)
            && !std::mem::replace(&mut connection.is_dirty, true)
        {
            self.dirty.push(id);
        }
    }

    /// The connection that a device, or a token, calls by this number.
    fn id_of(&self, number: u64) -> ConnectionId {
        ConnectionId { transport: self.owner, index: number as u32, generation: (number >> 32) as u32 }
    }

    /// Sees to it that a timer comes at the connection's next deadline, or before.
    fn set_timer(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        let token = Token { owner: self.owner, value: number_of(id) << 2 | Kind::Timer as u64 };
        let Some(connection) = self.get(id) else { return };
        let Some(at) = connection.deadline() else { return };
        match connection.timer {
            Some((set, _)) if set <= at => return,
            Some((_, timer)) => reactor.cancel_timer(timer),
            None => {}
        }
        connection.timer = Some((at, reactor.timer(at, token)));
    }

    fn timer(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        let Some(connection) = self.get(id) else { return };
        connection.timer = None;
        let is_read_from = !connection.messages.is_behind();
        match connection.messages.core.on_timer(reactor.clock(), is_read_from) {
            Due::Drop => return self.drop_connection(reactor, id),
            Due::Fail(violation) => return self.end(reactor, id, CloseReason::Violation(violation)),
            Due::Nothing => {}
        }
        if connection.probe_at().is_some_and(|at| at <= reactor.clock().now()) {
            connection.answered = reactor.clock().now();
            // What is outstanding is a probe as well.
            if connection.qp.is_idle() {
                connection.qp.probe();
            }
            self.post(reactor, id);
        }
        self.set_timer(reactor, id);
    }

    /// Takes in what rdma_cm has to say.
    fn connecting(&mut self, reactor: &mut Reactor) {
        while let Some(event) = self.channel.next() {
            let id = self.id_of(event.tag);
            match event.kind {
                CmKind::Disconnected | CmKind::Rejected | CmKind::DeviceRemoved => {
                    // What it sent before it went is taken in.
                    self.look(reactor, id, usize::MAX);
                    let Some(connection) = self.get(id) else { continue };
                    let reason = match event.kind {
                        CmKind::DeviceRemoved => CloseReason::Lost(libc::ENODEV),
                        _ => connection.messages.core.ended_by(Status::OK),
                    };
                    self.end(reactor, id, reason);
                    self.drop_connection(reactor, id);
                }
                _ => {}
            }
        }
    }

    /// Takes in up to `max` completions of a connection, and messages as far as its answers are taken.
    fn look(&mut self, reactor: &mut Reactor, id: ConnectionId, max: usize) {
        let mut failed: Option<Failure> = None;
        let Some(connection) = find(&mut self.connections, id) else { return };
        let mut any = false;
        for _ in 0..max {
            if !connection.qp.look() {
                break;
            }
            any = true;
            match connection.qp.next() {
                Some(Completion::Received(message)) => connection.inbox.push_back(message),
                // Nothing of this side's is exposed.
                Some(Completion::Placed { .. }) => {
                    return self.end(reactor, id, CloseReason::Violation(Violation::Field));
                }
                Some(Completion::Read(request, range)) => {
                    connection.reads -= 1;
                    if connection.is_lingering() {
                        continue;
                    }
                    self.events.push_back(connection.messages.fetched(request, range));
                }
                // The first says why; the others only follow.
                Some(Completion::Failed(failure)) => {
                    if failed.is_none_or(|first| first.is_flush() && !failure.is_flush()) {
                        failed = Some(failure);
                    }
                    if !failure.is_flush() {
                        break;
                    }
                }
                None => {}
            }
        }
        connection.note_progress(reactor.clock());
        any |= connection.messages.has_unsent() || !connection.fetches.is_empty();
        // What it sent before it failed counts.
        self.take_in_inbox(reactor, id);
        if any {
            self.mark_dirty(id);
        }
        if let Some(failure) = failed {
            self.failed(reactor, id, failure);
        } else if let Some(connection) = self.get(id)
            && connection.is_lingering()
            && !connection.messages.has_unsent()
            && connection.qp.is_idle()
        {
            self.drop_connection(reactor, id);
        }
    }

    /// A work request has failed: the queue pair is dead.
    fn failed(&mut self, reactor: &mut Reactor, id: ConnectionId, failure: Failure) {
        let Some(connection) = self.get(id) else { return };
        let reason = if failure.is_access() {
            CloseReason::Violation(Violation::Field)
        } else if failure.is_length() {
            CloseReason::Violation(Violation::Length)
        } else if failure.is_rnr() {
            CloseReason::Violation(Violation::Stalled)
        } else if failure.is_flush() {
            connection.messages.core.ended_by(Status::OK)
        } else {
            CloseReason::Lost(failure.errno())
        };
        let peer = connection.peer.map(tracing::field::display);
        tracing::debug!(peer, "An RDMA connection has failed: {}.", failure.text());
        self.report(reactor, id, reason);
        self.drop_connection(reactor, id);
    }

    fn take_in_inbox(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        loop {
            let Some(connection) = self.get_alive(id) else { return };
            if connection.messages.is_behind() {
                return;
            }
            let Some(message) = connection.inbox.pop_front() else { return };
            connection.answered = reactor.clock().now();
            let taken = if connection.messages.core.is_open() {
                self.take_in(reactor, id, message)
            } else {
                self.on_hello(reactor, id, message)
            };
            if let Err(violation) = taken {
                return self.end(reactor, id, CloseReason::Violation(violation));
            }
        }
    }

    fn on_hello(
        &mut self,
        reactor: &mut Reactor,
        id: ConnectionId,
        message: Received,
    ) -> Result<(), Violation> {
        let Some(connection) = find(&mut self.connections, id) else { return Ok(()) };
        let policy = &self.ports[connection.port].policy;
        let (peer, welcome) = MessageConnection::<()>::on_hello(policy, connection.qp.bytes(&message))?;
        connection.qp.give_back(message);
        let (credits, pushes) = (peer.grant.credits() as usize, peer.grant.push.messages());
        let size = size_for(credits, pushes, self.policy.inline_bytes_max, 0);
        let receives = size.receives;
        let further = messages_bytes(receives.saturating_sub(HANDSHAKE_MESSAGES), &size);
        let provided = (self.memory)(connection.peer, further).and_then(|memory| {
            connection.memory.push(memory);
            connection.qp.provide_receives(receives).map_err(|error| format!("{error}."))
        });
        if let Err(text) = provided {
            let peer = connection.peer.map(tracing::field::display);
            tracing::debug!(peer, "An RDMA connection is rejected. {text}");
            connection.messages.reject(&self.policy, libc::ENOMEM, &text);
            self.report(reactor, id, CloseReason::Rejected);
            self.linger(reactor, id);
            return Ok(());
        }
        connection.qp.set_send_bytes_max(MESSAGE_BYTES);
        connection.messages.open(&peer, Some(welcome), reactor.clock());
        self.events.push_back(ServerEvent::Opened(id, Box::new(peer)));
        self.mark_dirty(id);
        self.set_timer(reactor, id);
        Ok(())
    }

    /// Takes in a SEND: whole messages, one or more.
    fn take_in(
        &mut self,
        reactor: &mut Reactor,
        id: ConnectionId,
        received: Received,
    ) -> Result<(), Violation> {
        let mut start = 0;
        loop {
            let Some(connection) = find(&mut self.connections, id) else { return Ok(()) };
            let (messages, qp) = (&mut connection.messages, &mut connection.qp);
            match messages.on_message(&qp.bytes(&received)[start..], &mut self.events, reactor.clock())? {
                Taken::Bytes(len) => start += len,
                Taken::Data { len, id, range } => {
                    let range = range.start + start..range.end + start;
                    messages.keep_data(id, (qp.share(&received), range));
                    start += len;
                }
                Taken::Closed(reason) => {
                    self.end(reactor, id, reason);
                    return Ok(());
                }
            }
            if start == qp.bytes(&received).len() {
                qp.give_back(received);
                return Ok(());
            }
        }
    }

    /// Chains what a connection is to send, as far as there is room, and posts it.
    fn post(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        let Some(connection) = find(&mut self.connections, id) else { return };
        connection.is_dirty = false;
        let port = &self.ports[connection.port];
        connection.chain_fetches(&port.arena);
        connection.chain_unsent(port);
        if let Err(error) = connection.qp.post(true) {
            tracing::warn!(
                name: "rdma-work-rejected",
                peer = connection.peer.map(tracing::field::display),
                "An RDMA connection is closed, for its device rejects work: {error}."
            );
            self.report(reactor, id, CloseReason::Lost(error.raw_os_error().unwrap_or(libc::EIO)));
            return self.drop_connection(reactor, id);
        }
        connection.note_progress(reactor.clock());
        // Its completions will come soon.
        let is_waiting = !connection.qp.is_idle();
        if is_waiting {
            self.heat(id);
            self.set_timer(reactor, id);
        }
    }

    /// Ends a connection, saying goaway to a peer that broke the protocol.
    fn end(&mut self, reactor: &mut Reactor, id: ConnectionId, reason: CloseReason) {
        let policy = Arc::clone(&self.policy);
        let Some(connection) = self.get_alive(id) else { return };
        let has_last_words = connection.messages.say_violation(&policy, &reason);
        self.report(reactor, id, reason);
        if has_last_words {
            self.linger(reactor, id);
        } else {
            self.drop_connection(reactor, id);
        }
    }

    /// Tells the worker, once, and the stream that it began on.
    fn report(&mut self, reactor: &Reactor, id: ConnectionId, reason: CloseReason) {
        let (status, text) = match reason {
            CloseReason::Violation(violation) => {
                (Status::protocol(violation.errno()), format!("{violation}."))
            }
            _ => (Status::OK, String::new()),
        };
        self.report_as(reactor, id, reason, status, text);
    }

    /// The same, with what the client is told.
    fn report_as(
        &mut self,
        reactor: &Reactor,
        id: ConnectionId,
        reason: CloseReason,
        status: Status,
        text: String,
    ) {
        if let Some(connection) = find(&mut self.connections, id).filter(|found| !found.is_lingering()) {
            connection.messages.report_closed(reason.clone(), &mut self.events, reactor.clock());
            if let Some(partner) = connection.companion.take() {
                self.ended.push_back(Handover::Ended { partner, reason, status, text });
            }
        }
    }

    /// Lets what is to be sent reach the peer, for a while.
    fn linger(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        let Some(connection) = self.get(id) else { return };
        connection.fetches.clear();
        connection.inbox.clear();
        self.post(reactor, id);
        let Some(connection) = self.get(id) else { return };
        if let Some((_, timer)) = connection.timer.take() {
            reactor.cancel_timer(timer);
        }
        self.set_timer(reactor, id);
        self.heat(id);
    }

    /// Lets go of a connection that was reported. The device has let go of its memory when this returns.
    fn drop_connection(&mut self, reactor: &mut Reactor, id: ConnectionId) {
        if self.get(id).is_none() {
            return;
        }
        let connection = self.connections.remove(id.index as usize);
        if let Some((_, timer)) = connection.timer {
            reactor.cancel_timer(timer);
        }
        self.counters = plus(self.counters, connection.counted());
        connection.qp.disconnect();
        drop(connection);
    }
}

impl Drop for RdmaServer {
    fn drop(&mut self) {
        for (_, connection) in &mut self.connections {
            connection.qp.disconnect();
        }
        self.connections.clear();
    }
}

impl Connection {
    fn new(
        qp: QueuePair,
        messages: MessageConnection<(Received, Range<usize>)>,
        port: usize,
        size: &Size,
        reads_max: u8,
        clock: &LoopClock,
    ) -> Self {
        // The queue may be shorter than was asked for: half of it is for answers then.
        let answers = size.sends - usize::from(reads_max);
        let reads_max = usize::from(reads_max).min((qp.room() / 2).max(qp.room().saturating_sub(answers)));
        Self {
            qp,
            messages,
            companion: None,
            held: None,
            memory: Vec::new(),
            peer: None,
            port,
            answered: clock.now(),
            timer: None,
            is_hot: false,
            is_dirty: false,
            inbox: VecDeque::new(),
            fetches: VecDeque::new(),
            reads: 0,
            reads_max,
            header: Vec::new(),
            counters: ServerCounters::default(),
        }
    }

    fn id(&self) -> ConnectionId {
        self.messages.core.id
    }

    /// Whether it has been reported as closed.
    fn is_lingering(&self) -> bool {
        self.messages.core.phase() == Phase::Lingering
    }

    fn counted(&self) -> ServerCounters {
        ServerCounters {
            work_requests: self.qp.counters.work_requests,
            doorbells: self.qp.counters.doorbells,
            ..self.counters
        }
    }

    /// Notes since when what is posted has waited.
    fn note_progress(&mut self, clock: &LoopClock) {
        if self.messages.note_progress(self.qp.is_idle(), self.qp.ended(), clock) {
            self.answered = clock.now();
        }
    }

    fn chain_fetches(&mut self, arena: &Mr) {
        while self.reads < self.reads_max
            && self.qp.room() > 0
            && let Some((request, range)) = self.fetches.pop_front()
        {
            let Some(RemoteRegion::Out { address, key, .. }) = self.messages.region(request) else {
                continue;
            };
            self.reads += 1;
            self.counters.reads += 1;
            self.qp.read(request, range, arena, address, key);
        }
    }

    fn chain_unsent(&mut self, port: &Port) {
        // Answers leave the room that is for READs: what they hold of the arena stays within what the credits
        // make.
        while self.qp.room() >= 2 + self.reads_max - self.reads
            && self.qp.has_room_for(MESSAGE_BYTES)
            && let Some(outgoing) = self.messages.poll_send()
        {
            match outgoing {
                Outgoing::Message(bytes) => self.qp.send(std::iter::once(&bytes[..]), bytes.len()),
                Outgoing::Response(id, response) => self.chain_response(id, response, port),
            }
        }
    }

    /// Chains the data of a response and the response, with which the request ends. Of a plain read the
    /// response is in the immediate data: one work request says it all.
    fn chain_response(&mut self, id: u64, response: Response, port: &Port) {
        self.counters.responses += 1;
        let (header, region) = self.messages.finish(id, &response);
        let crc = self.messages.core.crc();
        if let (Some(range), RemoteRegion::In { address, key, .. }) = (response.data, region)
            && range.len > 0
        {
            self.counters.writes += 1;
            let is_plain = response.status.is_ok()
                && response.result == range.len as u64
                && response.body.is_empty()
                && !(crc || header.has_crc)
                && !port.limits.is_iwarp;
            let immediate = u32::try_from(id).ok().filter(|_| is_plain);
            self.qp.write(range, &port.arena, address, key, immediate);
            if immediate.is_some() {
                return;
            }
        }
        self.header.clear();
        header.encode(&response.body, crc, &mut self.header);
        self.qp.send(std::iter::once(&self.header[..]), self.header.len());
    }

    /// When the peer is to show that it is there: an idle connection does not notice that its peer is gone.
    fn probe_at(&self) -> Option<Instant> {
        self.messages.core.is_open().then(|| self.answered + PROBE_EVERY)
    }

    /// When something is due unless something else happens before.
    fn deadline(&self) -> Option<Instant> {
        self.messages.core.deadline().into_iter().chain(self.probe_at()).min()
    }
}

fn plus(one: ServerCounters, other: ServerCounters) -> ServerCounters {
    ServerCounters {
        responses: one.responses + other.responses,
        work_requests: one.work_requests + other.work_requests,
        doorbells: one.doorbells + other.doorbells,
        writes: one.writes + other.writes,
        reads: one.reads + other.reads,
        copied_bytes: one.copied_bytes + other.copied_bytes,
    }
}

/// The queue pair of a connection with this number of credits and this number of unsolicited messages.
fn size_for(credits: usize, pushes: usize, inline_bytes_max: u32, reads_max: u8) -> Size {
    Size {
        // A WRITE and a SEND for each response, and control messages. Pushes wait for room.
        sends: 2 * credits + CONTROL_MESSAGES + usize::from(reads_max),
        receives: credits + pushes + CONTROL_MESSAGES,
        receive_bytes: MESSAGE_BYTES + inline_bytes_max as usize,
        send_bytes: SEND_RING_BYTES,
    }
}

/// What so many receives take, and what the messages that come in them may cause as long as they are not
/// answered: their bodies are kept.
fn messages_bytes(count: usize, size: &Size) -> usize {
    let registered: usize = registrations(count, size.receive_bytes).map(|(_, bytes)| bytes).sum();
    registered + count * MESSAGE_BYTES
}

/// What the device allows of the server's policy. Says what it does not.
fn within(policy: &Arc<Policy>, limits: &Limits, device: &Device) -> Arc<Policy> {
    let mut within = Policy::clone(policy);
    // Receives, and for each credit a WRITE and a SEND: see `adopt`. The send queue may be shorter, for what
    // has no room waits.
    let depth_with = |pushes: usize| {
        let receives = limits.work_requests.saturating_sub(CONTROL_MESSAGES + 1 + pushes);
        let others = 2 * CONTROL_MESSAGES + usize::from(limits.reads_out) + 3 + pushes;
        let completions = limits.completions.saturating_sub(others) / 3;
        receives.min(completions).max(1) as u32
    };
    let mut depth = depth_with(within.push.messages());
    if depth < within.queue_depth {
        // Requests come first.
        within.push = PushWindows::NONE;
        depth = depth_with(0);
    }
    if depth < within.queue_depth {
        tracing::warn!(
            name: "rdma-queues-small",
            device = device.name(),
            "An RDMA device has queues for {depth} requests a connection: connections by it are granted \
             that, not {wanted}.",
            wanted = within.queue_depth
        );
        within.queue_depth = depth;
    }
    if limits.message_bytes < within.data_bytes_max {
        tracing::warn!(
            name: "rdma-messages-small",
            device = device.name(),
            "An RDMA device moves at most {bytes} bytes at a time: connections by it are granted that, not \
             {wanted}.",
            bytes = limits.message_bytes,
            wanted = within.data_bytes_max
        );
        within.data_bytes_max = limits.message_bytes;
    }
    debug_assert!(limits.work_requests >= WORK_REQUESTS_MIN);
    Arc::new(within)
}

fn number_of(id: ConnectionId) -> u64 {
    u64::from(id.generation) << 32 | u64::from(id.index)
}

impl ServerTransport for RdmaServer {
    fn owner(&self) -> u8 {
        self.owner
    }

    fn set_timeouts(&mut self, stall_timeout: Duration, linger: Duration) {
        let policies = self.ports.iter_mut().map(|port| &mut port.policy);
        for policy in policies.chain([&mut self.policy]) {
            let policy = Arc::make_mut(policy);
            (policy.stall_timeout, policy.linger) = (stall_timeout, linger);
        }
    }

    fn handle(&mut self, reactor: &mut Reactor, event: Event) {
        let index = event.token.value >> 2;
        if let Payload::Timer = event.payload {
            return self.timer(reactor, self.id_of(index));
        }
        let index = index as usize;
        match event.token.value & 3 {
            kind if kind == Kind::Connecting as u64 => {
                self.connecting(reactor);
                self.watch(reactor, Kind::Connecting, 0);
            }
            kind if kind == Kind::Completions as u64 => {
                let mut announced = Vec::new();
                self.ports[index].channel.take_events(|context| announced.push(self.id_of(context)));
                announced.into_iter().for_each(|id| self.heat(id));
                self.watch(reactor, Kind::Completions, index);
            }
            _ => {
                for what in self.ports[index].device.take_async_events() {
                    tracing::warn!(
                        name: "rdma-device-event",
                        device = self.ports[index].device.name(),
                        "An RDMA device says: {what}."
                    );
                }
                self.watch(reactor, Kind::Device, index);
            }
        }
    }

    fn poll_ready(&mut self, arm: bool) -> bool {
        // What a flush, or a close, has left behind.
        if !self.events.is_empty() || !self.dirty.is_empty() || !self.ended.is_empty() {
            return true;
        }
        let mut at = 0;
        while at < self.hot.len() {
            let id = self.hot[at];
            let Some(connection) = find(&mut self.connections, id) else {
                self.hot.swap_remove(at);
                continue;
            };
            if connection.qp.look() {
                return true;
            }
            if arm {
                // Whatever came before it was armed is seen by one more look; a device that cannot announce
                // is polled.
                if connection.qp.arm().is_err() || connection.qp.look() {
                    return true;
                }
                connection.is_hot = false;
                self.hot.swap_remove(at);
                continue;
            }
            at += 1;
        }
        false
    }

    fn process_ready(&mut self, reactor: &mut Reactor) {
        for at in (0..self.hot.len()).rev() {
            let Some(&id) = self.hot.get(at) else { continue };
            self.look(reactor, id, QUEUE_COMPLETIONS_MAX);
        }
    }

    fn next_event(&mut self) -> Option<ServerEvent> {
        self.events.pop_front()
    }

    fn fetch(&mut self, _reactor: &mut Reactor, request: RequestKey, mut slot: Slot, start: usize) {
        assert!(slot.is_of(&self.arena), "data is fetched into the arena that this server was made for");
        let Some(connection) = self.get_alive(request.connection) else { return };
        let fetched = match connection.messages.take_data(request.id) {
            None => return,
            Some(DataSource::Remote(_, len)) => {
                connection.fetches.push_back((request.id, SlotRange { slot, start, len }));
                return self.mark_dirty(request.connection);
            }
            Some(DataSource::None) => SlotRange { slot, start, len: 0 },
            Some(DataSource::Inline((message, range))) => {
                let len = range.len();
                let inline = &connection.qp.bytes(&message)[range];
                slot.bytes_mut()[start..start + len].copy_from_slice(inline);
                connection.counters.copied_bytes += len as u64;
                connection.qp.give_back(message);
                SlotRange { slot, start, len }
            }
        };
        let event = connection.messages.fetched(request.id, fetched);
        self.events.push_back(event);
        self.mark_dirty(request.connection);
    }

    fn respond(&mut self, _reactor: &mut Reactor, request: RequestKey, response: Response) {
        assert!(
            response.data.as_ref().is_none_or(|data| data.slot.is_of(&self.arena)),
            "the data of a response is in this server's arena"
        );
        let Some(connection) = self.get_alive(request.connection) else { return };
        if let Some((message, _)) = connection.messages.respond(request.id, response) {
            connection.qp.give_back(message);
        }
        self.mark_dirty(request.connection);
    }

    fn push(&mut self, _reactor: &mut Reactor, id: ConnectionId, push: Push<'_>) -> Result<(), NotPushed> {
        let connection = find(&mut self.connections, id).ok_or(NotPushed::Closed)?;
        connection.messages.push(push, &mut self.events)?;
        self.mark_dirty(id);
        Ok(())
    }

    fn flush(&mut self, reactor: &mut Reactor) {
        let mut dirty = std::mem::take(&mut self.dirty);
        for id in dirty.drain(..) {
            self.post(reactor, id);
            // There may be room for more answers now.
            self.take_in_inbox(reactor, id);
        }
        if self.dirty.is_empty() {
            self.dirty = dirty;
        }
    }

    fn close(&mut self, reactor: &mut Reactor, connection: ConnectionId, status: Status, text: &str) {
        let policy = Arc::clone(&self.policy);
        if let Some(found) = self.get_alive(connection) {
            found.messages.say_goaway(&policy, status, text);
            self.report_as(reactor, connection, CloseReason::Local, status, text.into());
            self.linger(reactor, connection);
        }
    }

    fn reject(&mut self, reactor: &mut Reactor, id: ConnectionId, errno: i32, text: &str) {
        let policy = Arc::clone(&self.policy);
        if let Some(connection) = self.get_alive(id) {
            connection.messages.reject(&policy, errno, text);
            self.report(reactor, id, CloseReason::Rejected);
            self.linger(reactor, id);
        }
    }

    fn close_stalled(&mut self, reactor: &mut Reactor, close: bool) {
        // What is posted carries its own time: no note is needed.
        if !close {
            return;
        }
        let timeout = self.policy.stall_timeout;
        let stalled: Vec<_> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.messages.is_stalled(timeout, reactor.clock()))
            .map(|(_, connection)| connection.id())
            .collect();
        for id in stalled {
            self.end(reactor, id, CloseReason::Evicted);
        }
    }

    fn is_alive(&mut self, reactor: &mut Reactor, connection: ConnectionId) -> bool {
        // Read anew: the worker may have been held up since the iteration began.
        let now = reactor.clock().read();
        if now - self.asked >= ALIVE_FOR {
            self.asked = now;
            self.connecting(reactor);
        }
        self.get_alive(connection).is_some()
    }

    fn unsent_bytes(&self, id: ConnectionId) -> usize {
        let connection = self.connections.get(id.index as usize).filter(|found| found.id() == id);
        connection.map_or(0, |connection| connection.messages.unsent_bytes() + connection.qp.held_bytes())
    }

    fn is_sending(&self) -> bool {
        self.connections
            .iter()
            .any(|(_, connection)| connection.messages.has_unsent() || !connection.qp.is_idle())
    }

    fn connections(&self) -> usize {
        self.connections.len()
    }

    fn accept(
        &mut self,
        reactor: &mut Reactor,
        incoming: transport::Accepted,
    ) -> Result<Result<ConnectionId, Error>, transport::Accepted> {
        match incoming {
            transport::Accepted::Other(other) => match transport::downcast(other) {
                Ok(incoming) => Ok(self.adopt(reactor, *incoming)),
                Err(other) => Err(transport::Accepted::Other(other)),
            },
            stream @ transport::Accepted::Stream(_) => Err(stream),
        }
    }

    fn hold(&mut self, id: ConnectionId, held: Arc<dyn Any>) {
        if let Some(connection) = self.get(id) {
            connection.held = Some(held);
        }
    }

    fn next_handover(&mut self) -> Option<Handover> {
        self.ended.pop_front()
    }

    fn take_over(
        &mut self,
        reactor: &mut Reactor,
        request: &UpgradeRequest,
    ) -> Result<(ConnectionId, QueuePairAddress), Error> {
        self.take_over_stream(reactor, request)
    }

    fn partner(&self, id: ConnectionId) -> Option<ConnectionId> {
        self.connections.get(id.index as usize).filter(|found| found.id() == id)?.companion
    }

    fn partner_ended(
        &mut self,
        reactor: &mut Reactor,
        id: ConnectionId,
        reason: CloseReason,
        _status: Status,
        _text: &str,
    ) {
        let Some(connection) = self.get(id) else { return };
        connection.companion = None;
        // What the client sent before it went is taken in.
        self.look(reactor, id, usize::MAX);
        let Some(connection) = self.get(id) else { return };
        let reason = match reason {
            CloseReason::Finished | CloseReason::Lost(0) => connection.messages.core.ended_by(Status::OK),
            other => other,
        };
        self.end(reactor, id, reason);
    }

    fn counters(&self) -> ServerCounters {
        self.connections.iter().fold(self.counters, |sum, (_, connection)| plus(sum, connection.counted()))
    }
}
