//! A connection over a stream of bytes: messages out of what is received, with their data behind them.
//!
//! Nothing is received while a request's data waits for a slot, while the peer does not take its answers, or
//! while the connection's messages cause too much heap (backpressure): the stream's own flow control then
//! stops the peer. One that makes no progress on a message or on answers for which there is memory can be
//! found stalled.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut, Range};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use super::core::words_for;
use super::outbox::{Outbox, SpareBatches};
use super::{ConnectionCore, Control, Due, Phase};
use crate::error::{Status, Violation};
use crate::handshake::{Identity, Peer, Policy};
use crate::memory::{Arena, Slot, SlotRange};
use crate::message::{
    self, BODY_BYTES_MAX, HEADER_BYTES, Kind, Message, Parsed, QueuePairAddress, RemoteRegion,
};
use crate::reactor::{LoopClock, SendBatch};
use crate::records::Records;
use crate::tls::kernel::ControlRecord;
use crate::transport::{
    ALIVE_FOR, AcceptedStream, CloseReason, ConnectionId, NotPushed, Push, Request, RequestKey, Response,
    ServerEvent,
};
use crate::tuning::{
    BODY_COUNTED_MIN, DIRECT_BYTES_MIN, HEAP_BASE, HEAP_MESSAGES, HEAP_PART, LARGE_RECEIVE_BYTES,
    LARGE_RECEIVE_FOR, LARGE_RECEIVES_MAX, PROGRESS_BYTES_MIN, PROGRESS_PART, REQUEST_HEAP, SEAL_BYTES_MAX,
    SEAL_BYTES_WHEN_SHORT, SMALL_RECEIVE_BYTES, UNSENT_BYTES_MAX,
};

/// Decides, when the hello of a connection has come, to whom it is passed on; None: it stays.
pub(crate) type Route = Box<dyn FnMut(&Peer) -> Option<usize>>;

/// What all connections of a worker have in common.
pub(crate) struct StreamShared {
    pub policy: Arc<Policy>,
    pub route: Route,
    pub events: VecDeque<ServerEvent>,
    /// Clients that want to move to a queue pair.
    pub upgrades: VecDeque<(ConnectionId, Box<Peer>, QueuePairAddress)>,
    /// Where connections had moved to that have ended here.
    pub ended: VecDeque<(ConnectionId, CloseReason)>,
    /// How many have moved.
    pub upgraded: usize,
    /// Connections with something to send since the last flush.
    pub dirty: Vec<u32>,
    pub spare: SpareBatches,
    /// The message that is being made; kept for its memory.
    pushed: Vec<u8>,
    /// Connections whose receives are large.
    large_receives: usize,
    /// Heap that connections cause beyond [`HEAP_BASE`] each, and how much it may be.
    heap_bytes: usize,
    heap_max: usize,
    /// Connections that are not read from until they, or others, cause less; and some that are again.
    pub gated: Vec<u32>,
    /// `heap_bytes` when all these were last looked at.
    gated_at: usize,
    /// How often a connection was not read from any more.
    gatings: u64,
}

impl StreamShared {
    pub fn new(policy: Arc<Policy>) -> Self {
        Self {
            policy,
            route: Box::new(|_| None),
            events: VecDeque::new(),
            upgrades: VecDeque::new(),
            ended: VecDeque::new(),
            upgraded: 0,
            dirty: Vec::new(),
            spare: SpareBatches::default(),
            pushed: Vec::new(),
            large_receives: 0,
            heap_bytes: 0,
            heap_max: usize::MAX,
            gated: Vec::new(),
            gated_at: 0,
            gatings: 0,
        }
    }

    pub fn set_heap_max(&mut self, bytes: usize) {
        self.heap_max = bytes;
    }

    /// Heap that connections cause beyond [`HEAP_BASE`] each, and how often one was gated for that.
    pub fn heap(&self) -> (usize, u64) {
        (self.heap_bytes, self.gatings)
    }

    /// The gated connections, if others have come to cause less heap since this was last asked: see
    /// [`StreamConnection::reopen_gate`].
    pub fn take_gated(&mut self) -> Vec<u32> {
        if self.gated.is_empty() || self.heap_bytes >= self.gated_at {
            return Vec::new();
        }
        self.gated_at = self.heap_bytes;
        std::mem::take(&mut self.gated)
    }

    fn is_short_of_heap(&self) -> bool {
        self.heap_bytes > self.heap_max / 2
    }
}

/// A receive that is to be started.
#[derive(Debug)]
pub(crate) enum Receive {
    /// Into any buffer, at most so many bytes: [`StreamConnection::on_bytes`].
    Any(u32),
    /// Into this: [`StreamConnection::on_data`].
    Into(SlotRange),
}

/// What is to be done with the stream, besides what is received and sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Close {
    /// Nothing more is sent.
    Write,
    /// It is over.
    Both,
    /// The same, and what the kernel has of it is dropped.
    Reset,
    /// Another server's from now on, with all that was received.
    PassOn(usize, Vec<u8>),
}

/// Whether a connection moves to a queue pair.
enum UpgradeState {
    /// It does not.
    None,
    /// Its first message may ask for it.
    Offered(Box<Peer>),
    /// It has asked. Nothing but signs of life may come.
    Requested,
    /// It has moved there, unless that has ended: the same.
    Upgraded(Option<ConnectionId>),
}

/// A request in flight.
#[derive(Debug)]
pub(crate) struct StreamRequest {
    /// The most data of its response.
    region_len: u32,
    /// The heap of a long body.
    body_heap: u16,
    /// It has checksums, though others have none.
    has_crc: bool,
}

/// Where in the stream of messages a connection is.
enum Receiving {
    /// Between messages, or within one.
    Messages,
    /// A request with data was reported; the worker has not yet given it a slot.
    AwaitingFetch { id: u64, len: usize, crc: Option<u32> },
    /// Data comes into a slot. While a direct receive is in flight, that has the slot.
    Data { id: u64, slot: Option<Slot>, start: usize, len: usize, filled: usize, crc: Option<u32> },
    /// A request was answered without its data.
    Discard { left: usize },
}

impl Receiving {
    /// How much data the message being received holds a slot for.
    fn slot_len(&self) -> usize {
        if let Self::Data { len, .. } = self { *len } else { 0 }
    }
}

/// Bytes received and not yet looked at.
enum Unread<B> {
    None,
    /// In this range of a buffer of the reactor's; at most for the length of an iteration.
    Borrowed(B, Range<usize>),
    /// Copied out of it, since the iteration ended.
    Owned(Vec<u8>, usize),
}

impl<B: Deref<Target = [u8]>> Unread<B> {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::None => &[],
            Self::Borrowed(received, range) => &received[range.clone()],
            Self::Owned(bytes, at) => &bytes[*at..],
        }
    }

    fn advance(&mut self, n: usize) {
        match self {
            Self::None => {}
            Self::Borrowed(_, range) => range.start += n,
            Self::Owned(_, at) => *at += n,
        }
        if self.bytes().is_empty() {
            *self = Self::None;
        }
    }
}

/// What a peer does not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stalled {
    /// Take its responses.
    Output,
    /// Send the rest of a message.
    Input,
}

/// What the stall check compares.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Progress {
    messages_in: u64,
    bytes_in: u64,
    batches_out: u64,
    bytes_out: u64,
}

/// At a stall check: how far the connection had come, and whether data was being received into a slot, and a
/// send was in flight.
#[derive(Clone, Copy, Default)]
struct Checkpoint {
    progress: Progress,
    was_receiving: bool,
    was_sending: bool,
}

/// How many bytes a peer must move within the stall timeout if it holds so much memory.
fn progress_due(held_bytes: usize) -> u64 {
    PROGRESS_BYTES_MIN.max(held_bytes as u64 / PROGRESS_PART)
}

/// One connection. `B` is a buffer of received bytes.
pub(crate) struct StreamConnection<B> {
    core: ConnectionCore<StreamRequest>,
    records: Records,
    /// Who the peer is.
    identity: Identity,
    /// What has come of the hello.
    hello: Vec<u8>,
    /// It was passed on to here, and stays.
    is_placed: bool,
    /// It may become a queue pair, if the server makes such.
    may_move: bool,
    upgrade: UpgradeState,
    receiving: Receiving,
    unread: Unread<B>,
    /// The front of a message whose rest has not arrived.
    partial: Vec<u8>,
    outbox: Outbox,
    /// The sum of the long bodies of the requests in flight.
    bodies_heap: usize,
    /// Its part of [`StreamShared::heap_bytes`].
    heap_charged: usize,
    /// It causes too much, and is not read from; it is in [`StreamShared::gated`].
    is_gated: bool,
    is_in_gated: bool,
    receive_in_flight: bool,
    /// Its receives are [`LARGE_RECEIVE_BYTES`] long, for so many more that are short.
    large_for: u8,
    /// How many pings came with the last receive.
    pings: usize,
    /// What it was answered has left before the flush.
    has_left_early: bool,
    /// It is in [`StreamShared::dirty`].
    is_dirty: bool,
    /// When it was last asked whether it is alive, and was.
    seen_alive: Option<Instant>,
    progress: Progress,
    checked: Checkpoint,
    close: Option<Close>,
    /// It has a new deadline, something to close, or has ended: see [`StreamConnection::needs_attention`].
    needs_attention: bool,
}

impl<B: DerefMut<Target = [u8]>> StreamConnection<B> {
    /// A connection whose handshake is still to come. One that `is_placed` is not passed on.
    pub fn new(
        id: ConnectionId,
        policy: &Policy,
        records: Records,
        identity: Identity,
        is_placed: bool,
        may_move: bool,
        clock: &LoopClock,
    ) -> Self {
        Self {
            core: ConnectionCore::new(id, policy, clock),
            records,
            identity,
            hello: Vec::new(),
            is_placed,
            may_move,
            upgrade: UpgradeState::None,
            receiving: Receiving::Messages,
            unread: Unread::None,
            partial: Vec::new(),
            outbox: Outbox::default(),
            bodies_heap: 0,
            heap_charged: 0,
            is_gated: false,
            is_in_gated: false,
            receive_in_flight: false,
            large_for: 0,
            pings: 0,
            has_left_early: false,
            is_dirty: false,
            seen_alive: None,
            progress: Progress::default(),
            checked: Checkpoint::default(),
            close: None,
            needs_attention: true,
        }
    }

    pub fn id(&self) -> ConnectionId {
        self.core.id
    }

    pub fn is_open(&self) -> bool {
        self.core.is_open()
    }

    pub fn is_sending(&self) -> bool {
        self.outbox.is_sending()
    }

    /// What the one needs that it is passed on to, with its hello.
    pub fn pass_on(&mut self, socket: Arc<OwnedFd>, hello: Vec<u8>) -> AcceptedStream {
        AcceptedStream {
            socket,
            records: std::mem::replace(&mut self.records, Records::Clear),
            identity: self.identity.clone(),
            received: hello,
            is_passed: true,
            may_move: self.may_move,
        }
    }

    /// Whether it has ended, and nothing that was started for it is still under way.
    pub fn is_over(&self) -> bool {
        self.core.phase() == Phase::Dead && !self.receive_in_flight && !self.outbox.is_sending()
    }

    // Received
    // ----------------------------------------------------------------------------------------------------

    /// The receive that is to be started, if any. [`StreamConnection::on_bytes`] or another `on_` follows.
    pub fn poll_receive(&mut self, shared: &mut StreamShared, clock: &LoopClock) -> Option<Receive> {
        if self.receive_in_flight || self.core.phase() == Phase::Dead || self.records.is_unreadable() {
            return None;
        }
        if self.core.is_open() {
            // What the last send left is sent before anything else is read.
            if self.outbox.is_behind(UNSENT_BYTES_MAX, shared.policy.queue_depth as usize) {
                return None;
            }
            if self.is_gated && !self.is_over_heap(shared) {
                self.is_gated = false;
                self.read(shared, clock);
            }
            // The data of a request waits for a slot.
            match self.unread {
                Unread::None => {}
                // If that is not given in this iteration, flush makes a copy.
                Unread::Borrowed(..) => {
                    self.mark_dirty(shared);
                    return None;
                }
                Unread::Owned(..) => return None,
            }
            if self.core.phase() == Phase::Dead {
                return None;
            }
        }
        let receive = match &mut self.receiving {
            Receiving::AwaitingFetch { .. } => return None,
            Receiving::Data { slot, start, len, filled, .. }
                if self.records.is_received_directly() && *len - *filled >= DIRECT_BYTES_MIN =>
            {
                let slot = slot.take()?;
                Receive::Into(SlotRange { slot, start: *start + *filled, len: *len - *filled })
            }
            _ => Receive::Any(if self.large_for > 0 { LARGE_RECEIVE_BYTES } else { SMALL_RECEIVE_BYTES }),
        };
        self.receive_in_flight = true;
        Some(receive)
    }

    /// A receive has brought nothing, for a reason that will pass. It gives back the slot it was for.
    pub fn on_nothing(&mut self, target: Option<SlotRange>) {
        self.receive_in_flight = false;
        if let (Some(range), Receiving::Data { slot, .. }) = (target, &mut self.receiving) {
            *slot = Some(range.slot);
        }
    }

    /// The stream has ended.
    pub fn on_end(&mut self, shared: &mut StreamShared) {
        self.receive_in_flight = false;
        let owes_input = match self.receiving {
            Receiving::Messages => !self.partial.is_empty() || self.records.heap() > 0,
            Receiving::AwaitingFetch { .. } => false,
            Receiving::Data { .. } | Receiving::Discard { .. } => true,
        };
        let is_finished = self.core.in_flight.is_empty() && !owes_input;
        self.end(shared, if is_finished { CloseReason::Finished } else { CloseReason::Lost(0) });
    }

    /// A receive has failed.
    pub fn on_receive_failed(&mut self, shared: &mut StreamShared, reason: CloseReason) {
        self.receive_in_flight = false;
        self.end(shared, reason);
    }

    /// Whether the kernel seals what is sent, and opens what is received.
    pub fn is_sealed_by_kernel(&self) -> bool {
        self.records.is_in_kernel()
    }

    /// A receive has failed, since the kernel has a record of this type that is no data, with this inside.
    /// It gives back the slot it was for.
    #[cold]
    pub fn on_control_record(
        &mut self,
        (kind, message): (u8, &[u8]),
        target: Option<SlotRange>,
        shared: &mut StreamShared,
        clock: &LoopClock,
    ) {
        self.on_nothing(target);
        self.core.on_receive();
        match self.records.on_control(kind, message) {
            // The end of the stream is received next.
            Ok(ControlRecord::End) => {}
            Ok(ControlRecord::KeyUpdate) => self.end_with_key(shared, clock),
            Err(violation) => self.fail(shared, clock, violation),
        }
    }

    /// A receive has failed, since the kernel cannot open what has come.
    #[cold]
    pub fn on_bad_record(&mut self, shared: &mut StreamShared, clock: &LoopClock) {
        self.receive_in_flight = false;
        self.records.on_bad_record();
        self.fail(shared, clock, Violation::Record);
    }

    /// `n` bytes have been received into the slot of a message's data.
    pub fn on_data(&mut self, n: usize, range: SlotRange, shared: &mut StreamShared) {
        self.receive_in_flight = false;
        self.core.on_receive();
        self.progress.bytes_in += n as u64;
        if self.core.is_open()
            && let Receiving::Data { slot, filled, .. } = &mut self.receiving
        {
            *filled += n;
            *slot = Some(range.slot);
            self.finish_data(shared);
        }
    }

    /// These bytes have been received.
    pub fn on_bytes(&mut self, mut bytes: B, shared: &mut StreamShared, clock: &LoopClock) {
        self.receive_in_flight = false;
        self.core.on_receive();
        let n = bytes.len();
        self.progress.bytes_in += n as u64;
        let (first, range) = match self.records.open_away(&mut bytes) {
            Ok(opened) => opened,
            Err(violation) => return self.fail(shared, clock, violation),
        };
        match self.core.phase() {
            Phase::Open => {
                self.pings = 0;
                if !first.is_empty() {
                    self.unread = Unread::Owned(first, 0);
                    self.read(shared, clock);
                }
                // The first part may have to wait.
                if let Unread::Owned(waiting, _) = &mut self.unread {
                    waiting.extend_from_slice(&bytes[range]);
                } else if !range.is_empty() {
                    self.unread = Unread::Borrowed(bytes, range);
                    self.read(shared, clock);
                }
                self.choose_receive_size(n, shared);
            }
            Phase::Handshake => {
                self.hello.extend_from_slice(&first);
                self.hello.extend_from_slice(&bytes[range]);
                let hello = std::mem::take(&mut self.hello);
                self.on_hello(hello, shared, clock);
            }
            Phase::Lingering | Phase::Dead => {}
        }
    }

    /// These bytes were received with the record layer's handshake.
    pub fn on_early(&mut self, mut bytes: Vec<u8>, shared: &mut StreamShared, clock: &LoopClock) {
        match self.records.open_away(&mut bytes) {
            Ok((_, range)) => self.on_hello(bytes[range].to_vec(), shared, clock),
            Err(violation) => self.fail(shared, clock, violation),
        }
    }

    /// Large receives for a connection whose receives come full, for as long as they do.
    fn choose_receive_size(&mut self, received: usize, shared: &mut StreamShared) {
        // Pings are no reason to receive more at a time: their pongs would have to be kept.
        if received >= SMALL_RECEIVE_BYTES as usize && 2 * self.pings * HEADER_BYTES < received {
            if self.large_for > 0
                || (shared.large_receives < LARGE_RECEIVES_MAX && !shared.is_short_of_heap())
            {
                shared.large_receives += usize::from(self.large_for == 0);
                self.large_for = LARGE_RECEIVE_FOR;
            }
        } else if self.large_for > 0 {
            self.large_for -= 1;
            shared.large_receives -= usize::from(self.large_for == 0);
        }
    }

    /// All that has come so far: the hello, and perhaps what is behind it.
    pub fn on_hello(&mut self, hello: Vec<u8>, shared: &mut StreamShared, clock: &LoopClock) {
        match shared.policy.welcome_on(&hello, shared.policy.queue_pair && self.may_move) {
            Ok(Parsed::Need(n)) if hello.len() < n.min(message::HANDSHAKE_BYTES_MAX) => self.hello = hello,
            Ok(Parsed::Need(_)) => self.fail(shared, clock, Violation::HandshakeTooLong),
            Err(violation) => self.fail(shared, clock, violation),
            Ok(Parsed::Item((peer, welcome), taken)) => {
                let peer = peer.known_as(&self.identity);
                if !self.is_placed
                    && let Some(to) = (shared.route)(&peer)
                {
                    self.core.die();
                    self.close = Some(Close::PassOn(to, hello));
                    self.needs_attention = true;
                    return;
                }
                self.core.open(&peer, clock);
                self.needs_attention = true;
                if peer.grant.queue_pair {
                    self.upgrade = UpgradeState::Offered(Box::new(peer.clone()));
                }
                self.outbox.push_bytes(&mut shared.spare, |out| out.extend_from_slice(&welcome));
                self.mark_dirty(shared);
                shared.events.push_back(ServerEvent::Opened(self.core.id, Box::new(peer)));
                if taken < hello.len() {
                    self.unread = Unread::Owned(hello, taken);
                    self.read(shared, clock);
                }
            }
        }
    }

    /// Looks at the unread bytes, as far as the connection's state lets it.
    fn read(&mut self, shared: &mut StreamShared, clock: &LoopClock) {
        let mut unread = std::mem::replace(&mut self.unread, Unread::None);
        while self.core.is_open() {
            let bytes = unread.bytes();
            if bytes.is_empty() {
                break;
            }
            if matches!(self.receiving, Receiving::Messages) && self.is_over_heap(shared) {
                self.gate(shared);
                break;
            }
            let taken = match &mut self.receiving {
                Receiving::AwaitingFetch { .. } => break,
                Receiving::Discard { left } => {
                    let n = bytes.len().min(*left);
                    *left -= n;
                    if *left == 0 {
                        self.receiving = Receiving::Messages;
                    }
                    n
                }
                Receiving::Data { slot: Some(slot), start, len, filled, .. } => {
                    let n = bytes.len().min(*len - *filled);
                    let at = *start + *filled;
                    slot.bytes_mut()[at..at + n].copy_from_slice(&bytes[..n]);
                    *filled += n;
                    self.finish_data(shared);
                    n
                }
                Receiving::Data { slot: None, .. } => {
                    unreachable!("a receive has the slot, so nothing else is received")
                }
                Receiving::Messages => match self.read_message(bytes, shared, clock) {
                    Ok(n) => n,
                    Err(violation) => {
                        self.fail(shared, clock, violation);
                        break;
                    }
                },
            };
            unread.advance(taken);
        }
        if self.core.is_open() {
            self.unread = unread;
        }
    }

    /// Ends the data of a request if it is complete.
    fn finish_data(&mut self, shared: &mut StreamShared) {
        let Receiving::Data { id, slot, start, len, filled, crc } = &mut self.receiving else { return };
        if filled < len {
            return;
        }
        let Some(slot) = slot.take() else { return };
        let range = SlotRange { slot, start: *start, len: *len };
        let event = self.core.fetched(*id, range, *crc);
        self.receiving = Receiving::Messages;
        self.progress.messages_in += 1;
        shared.events.push_back(event);
    }

    /// Takes in one message, or a part of one. Returns how many of `bytes` that took.
    fn read_message(
        &mut self,
        bytes: &[u8],
        shared: &mut StreamShared,
        clock: &LoopClock,
    ) -> Result<usize, Violation> {
        if self.partial.is_empty() {
            return match message::parse(bytes, self.core.limits())? {
                Parsed::Item(message, len) => {
                    self.on_message(message, shared, clock)?;
                    Ok(len)
                }
                Parsed::Need(_) => {
                    self.partial.extend_from_slice(bytes);
                    Ok(bytes.len())
                }
            };
        }
        let mut partial = std::mem::take(&mut self.partial);
        let mut taken = 0;
        loop {
            match message::parse(&partial, self.core.limits())? {
                Parsed::Item(message, _) => {
                    self.on_message(message, shared, clock)?;
                    return Ok(taken);
                }
                Parsed::Need(n) => {
                    let more = (n - partial.len()).min(bytes.len() - taken);
                    if more == 0 {
                        self.partial = partial;
                        return Ok(taken);
                    }
                    partial.extend_from_slice(&bytes[taken..taken + more]);
                    taken += more;
                }
            }
        }
    }

    fn on_message(
        &mut self,
        message: Message<'_>,
        shared: &mut StreamShared,
        clock: &LoopClock,
    ) -> Result<(), Violation> {
        if let Message::Request(request, body) = message {
            return self.on_request(&request, body, shared);
        }
        if matches!(message, Message::OneWay(..) | Message::Receipt(_) | Message::Response(..)) {
            self.stays_a_stream(message.kind())?;
            self.progress.messages_in += 1;
            return self.core.on_push(&message, &mut shared.events).map(|_| ());
        }
        self.on_control(message, shared, clock)
    }

    /// A message has come that only a connection is sent that does not move to a queue pair.
    fn stays_a_stream(&mut self, kind: Kind) -> Result<(), Violation> {
        match self.upgrade {
            UpgradeState::None => {}
            // It stays.
            UpgradeState::Offered(_) => self.upgrade = UpgradeState::None,
            UpgradeState::Requested | UpgradeState::Upgraded(_) => return Err(Violation::Kind(kind as u8)),
        }
        Ok(())
    }

    #[cold]
    fn on_control(
        &mut self,
        message: Message<'_>,
        shared: &mut StreamShared,
        clock: &LoopClock,
    ) -> Result<(), Violation> {
        let offered = match &self.upgrade {
            UpgradeState::Offered(_) => std::mem::replace(&mut self.upgrade, UpgradeState::None),
            _ => UpgradeState::None,
        };
        match (message, offered) {
            (Message::QueuePair(theirs), UpgradeState::Offered(peer)) => {
                let theirs = theirs.map_err(|_| Violation::Field)?;
                self.upgrade = UpgradeState::Requested;
                shared.upgrades.push_back((self.core.id, peer, theirs));
                Ok(())
            }
            (message, _) => {
                match self.core.on_control(&message)? {
                    Control::Pong(id) => {
                        self.pings += 1;
                        self.outbox.push_pong(&mut shared.spare, |out| self.core.encode_pong(id, clock, out));
                        self.mark_dirty(shared);
                    }
                    Control::Ignore => {}
                    Control::Closed(reason) => self.end(shared, reason),
                }
                Ok(())
            }
        }
    }

    fn on_request(
        &mut self,
        request: &message::RequestHeader,
        body: &[u8],
        shared: &mut StreamShared,
    ) -> Result<(), Violation> {
        self.stays_a_stream(Kind::Request)?;
        let region_len = request.region_in_len();
        let body_heap = if request.body_len < BODY_COUNTED_MIN { 0 } else { request.body_len };
        self.core.admit(request.id, StreamRequest { region_len, body_heap, has_crc: request.has_crc })?;
        if matches!(request.region, RemoteRegion::Out { .. }) {
            // On a stream data follows the request: there is nothing to fetch from.
            return Err(Violation::Field);
        }
        self.bodies_heap += usize::from(body_heap);
        if request.data_len > 0 {
            self.receiving = Receiving::AwaitingFetch {
                id: request.id,
                len: request.data_len as usize,
                crc: (self.core.crc() || request.has_crc).then_some(request.data_crc),
            };
        } else {
            self.progress.messages_in += 1;
        }
        shared.events.push_back(ServerEvent::Request(Request {
            key: RequestKey { connection: self.core.id, id: request.id },
            body: body.into(),
            data_len: request.data_len,
            region_len,
        }));
        Ok(())
    }

    /// The data of a request is to come into this slot.
    pub fn fetch(&mut self, id: u64, slot: Slot, start: usize, shared: &mut StreamShared, clock: &LoopClock) {
        if let Receiving::AwaitingFetch { id: awaited, len, crc } = self.receiving
            && id == awaited
        {
            assert!(slot.len() >= start && slot.len() - start >= len, "the slot has room for the data");
            self.receiving = Receiving::Data { id, slot: Some(slot), start, len, filled: 0, crc };
            self.read(shared, clock);
        }
    }

    // Sent
    // ----------------------------------------------------------------------------------------------------

    /// Answers a request. Returns whether that was one whose data was still to come: it is discarded.
    ///
    /// # Panics
    /// If the response brings more data than the request has room for.
    pub fn respond(
        &mut self,
        id: u64,
        response: Response,
        shared: &mut StreamShared,
        clock: &LoopClock,
    ) -> bool {
        if !self.core.is_open() {
            return false;
        }
        let Some(StreamRequest { region_len, body_heap, has_crc }) = self.core.in_flight.remove(id) else {
            return false;
        };
        self.bodies_heap -= usize::from(body_heap);
        assert!(
            response.data.as_ref().is_none_or(|range| range.len <= region_len as usize),
            "a response brings no more data than the request has room for"
        );
        self.outbox.push_response(&mut shared.spare, id, response, self.core.crc(), has_crc);
        self.mark_dirty(shared);
        if let Receiving::AwaitingFetch { id: awaited, len, .. } = self.receiving
            && id == awaited
        {
            self.receiving = Receiving::Discard { left: len };
            self.progress.messages_in += 1;
            self.read(shared, clock);
            return true;
        }
        false
    }

    /// Answers a request with data that `fill` brings. Returns whether it has: if not, nothing has been done.
    pub fn respond_filled(
        &mut self,
        id: u64,
        len: usize,
        arena: &mut Arena,
        fill: &mut dyn FnMut(&mut [u8]) -> bool,
        shared: &mut StreamShared,
    ) -> bool {
        if !self.core.is_open() {
            return false;
        }
        let Some(position) = self.core.in_flight.position(id) else { return false };
        let crc = self.core.crc();
        let has_crc = self.core.in_flight.at(position).has_crc;
        let response =
            message::ResponseHeader { has_crc, ..message::ResponseHeader::of_data(id, len as u32) };
        let filled = self.outbox.push_filled(&mut shared.spare, HEADER_BYTES + len, arena, |bytes| {
            let (header, data) = bytes.split_at_mut(HEADER_BYTES);
            if !fill(data) {
                return false;
            }
            header.copy_from_slice(&response.encode_bare(data, crc));
            true
        });
        if filled.is_none() {
            return false;
        }
        self.core.in_flight.remove_at(position);
        self.mark_dirty(shared);
        true
    }

    /// Sends an unsolicited message.
    pub fn push(&mut self, push: Push<'_>, shared: &mut StreamShared) -> Result<(), NotPushed> {
        shared.pushed.clear();
        self.core.push(push, &mut shared.events, &mut shared.pushed)?;
        if !shared.pushed.is_empty() {
            self.outbox.push_unsolicited(&mut shared.spare, &shared.pushed);
            self.mark_dirty(shared);
        }
        Ok(())
    }

    /// Answers a client that wants to move to a queue pair: it moves to this connection, whose end there this
    /// is, and from now on carries nothing but signs of life and its end; or it stays, for this reason.
    pub fn answer_upgrade(
        &mut self,
        answer: Result<(ConnectionId, &QueuePairAddress), (Status, &str)>,
        shared: &mut StreamShared,
    ) -> bool {
        if !self.is_upgrade_requested() {
            return false;
        }
        self.upgrade = match answer {
            Ok((to, _)) => {
                // What it has promised to say it now says elsewhere.
                self.core.release_keepalive();
                self.needs_attention = true;
                shared.upgraded += 1;
                UpgradeState::Upgraded(Some(to))
            }
            Err(_) => UpgradeState::None,
        };
        let (crc, answer) = (self.core.crc(), answer.map(|(_, address)| address));
        self.outbox.push_bytes(&mut shared.spare, |out| message::encode_queue_pair(answer, crc, out));
        self.mark_dirty(shared);
        true
    }

    /// Whether it has asked to move and waits for the answer. It may have ended since, for what it said next.
    pub fn is_upgrade_requested(&self) -> bool {
        self.core.is_open() && matches!(self.upgrade, UpgradeState::Requested)
    }

    /// The connection that it has moved to.
    pub fn upgraded_to(&self) -> Option<ConnectionId> {
        if let UpgradeState::Upgraded(to) = self.upgrade { to } else { None }
    }

    /// The connection that it has moved to has ended: this one says so, and ends without being reported.
    pub fn partner_ended(
        &mut self,
        status: Status,
        text: &str,
        shared: &mut StreamShared,
        clock: &LoopClock,
    ) {
        // From now on it counts by itself.
        shared.upgraded -= usize::from(matches!(self.upgrade, UpgradeState::Upgraded(Some(_))));
        self.upgrade = UpgradeState::Upgraded(None);
        self.close(status, text, CloseReason::Local, shared, clock);
    }

    /// Reports that it has ended, to the connection that it has moved to if it has.
    fn report(&mut self, reason: CloseReason, shared: &mut StreamShared) {
        match self.upgrade {
            UpgradeState::Upgraded(to) => shared.ended.extend(to.map(|to| (to, reason))),
            _ => shared.events.push_back(ServerEvent::Closed(self.core.id, reason)),
        }
    }

    /// Lets the client know that the server lives, if it cannot tell: it is not read from, and nothing is on
    /// the way to it.
    pub fn show_life(&mut self, shared: &mut StreamShared) {
        if self.core.is_open() && !self.outbox.has_unsent() && !self.outbox.is_sending() {
            let crc = self.core.crc();
            let pong = |out: &mut Vec<u8>| message::encode_pong(message::UNASKED_PONG, 0, crc, out);
            self.outbox.push_bytes(&mut shared.spare, pong);
            self.mark_dirty(shared);
        }
    }

    /// Whether nothing is received from it for now: pings are not heard, and neither is its end.
    pub fn is_unread(&self) -> bool {
        self.is_gated || matches!(self.receiving, Receiving::AwaitingFetch { .. })
    }

    /// An iteration is over: the reactor's buffers go back, for others may need them. Returns whether what is
    /// to be sent leaves now: not if something left early, for one large send costs less than two.
    pub fn begin_flush(&mut self, shared: &mut StreamShared) -> bool {
        self.is_dirty = false;
        if let Unread::Borrowed(received, range) = &self.unread {
            self.unread = Unread::Owned(received[range.clone()].to_vec(), 0);
        }
        if !std::mem::take(&mut self.has_left_early) {
            return true;
        }
        if self.outbox.has_unsent() {
            self.mark_dirty(shared);
        }
        false
    }

    /// The same in the middle of an iteration. Returns whether there is something to be sent.
    pub fn begin_early_flush(&mut self) -> bool {
        let leaves = self.outbox.has_unsent() && !self.outbox.is_sending() && !self.has_left_early;
        self.has_left_early |= leaves;
        leaves
    }

    /// The batch that is to be sent, if any. [`StreamConnection::on_sent`] follows, or
    /// [`StreamConnection::on_send_failed`].
    pub fn poll_send(&mut self, shared: &mut StreamShared) -> Option<Box<SendBatch>> {
        let phase = self.core.phase();
        if phase == Phase::Dead {
            return None;
        }
        let seal_max = if shared.is_short_of_heap() { SEAL_BYTES_WHEN_SHORT } else { SEAL_BYTES_MAX };
        self.outbox.poll_send(&mut shared.spare, &mut self.records, seal_max, phase == Phase::Lingering)
    }

    /// A send has ended: `n` bytes were sent, the batch is what is left.
    pub fn on_sent(&mut self, n: usize, batch: Box<SendBatch>, shared: &mut StreamShared, clock: &LoopClock) {
        self.progress.bytes_out += n as u64;
        let is_used_up = self.records.on_batch_sent(n);
        if self.core.phase() == Phase::Dead {
            self.outbox.on_send_failed();
        } else if !self.outbox.on_sent(&mut shared.spare, batch) {
            self.mark_dirty(shared);
        } else {
            self.progress.batches_out += 1;
            if self.outbox.has_next() {
                self.mark_dirty(shared);
            } else if self.core.phase() == Phase::Lingering {
                self.close = Some(Close::Write);
                self.needs_attention = true;
            }
        }
        if is_used_up {
            self.end_with_key(shared, clock);
        }
    }

    /// A send has failed.
    pub fn on_send_failed(&mut self, reason: CloseReason, shared: &mut StreamShared) {
        self.outbox.on_send_failed();
        self.end(shared, reason);
    }

    /// It was closed, and everything that its peer was to hear has been handed to the kernel.
    pub fn has_said_all(&self) -> bool {
        self.core.phase() == Phase::Lingering && !self.outbox.has_unsent() && !self.outbox.is_sending()
    }

    /// Bytes of the slots that its unsent answers hold.
    pub fn unsent_bytes(&self) -> usize {
        self.outbox.unsent_bytes()
    }

    fn mark_dirty(&mut self, shared: &mut StreamShared) {
        if !self.is_dirty {
            self.is_dirty = true;
            shared.dirty.push(self.core.id.index);
        }
    }

    // Heap
    // ----------------------------------------------------------------------------------------------------

    /// Heap that its messages cause.
    fn messages_heap(&self) -> usize {
        // How long those are that the program has is not kept.
        let one_way = self.core.one_way_held() * (REQUEST_HEAP + BODY_BYTES_MAX);
        self.core.in_flight.len() * REQUEST_HEAP + self.bodies_heap + one_way + self.outbox.heap()
    }

    /// ... and all else that it causes beyond what every connection does.
    fn heap_excess(&self) -> usize {
        let unread = if let Unread::Owned(bytes, _) = &self.unread { bytes.len() } else { 0 };
        (self.messages_heap() + unread + self.records.heap()).saturating_sub(HEAP_BASE)
    }

    /// Charges the worker's account with what it causes now. After everything that may change that.
    pub fn settle_heap(&mut self, shared: &mut StreamShared) {
        let excess = self.heap_excess();
        if excess != self.heap_charged {
            shared.heap_bytes = shared.heap_bytes + excess - self.heap_charged;
            self.heap_charged = excess;
        }
    }

    /// Whether it causes so much heap, while all cause much, that no more is taken in from it.
    fn is_over_heap(&self, shared: &StreamShared) -> bool {
        if !shared.is_short_of_heap() {
            return false;
        }
        let free = shared.heap_max.saturating_sub(shared.heap_bytes);
        self.messages_heap() > HEAP_MESSAGES && self.heap_excess() + HEAP_BASE > free / HEAP_PART
    }

    /// Does not read from it for now.
    fn gate(&mut self, shared: &mut StreamShared) {
        self.is_gated = true;
        shared.gatings += 1;
        shared.gated_at = usize::MAX;
        self.list_as_gated(shared);
    }

    fn list_as_gated(&mut self, shared: &mut StreamShared) {
        if !std::mem::replace(&mut self.is_in_gated, true) {
            shared.gated.push(self.core.id.index);
        }
    }

    pub fn is_gated(&self) -> bool {
        self.is_gated
    }

    /// Others have come to cause less heap: the receive that is to be started now, if any.
    pub fn reopen_gate(&mut self, shared: &mut StreamShared, clock: &LoopClock) -> Option<Receive> {
        self.is_in_gated = false;
        let receive = if self.is_gated { self.poll_receive(shared, clock) } else { None };
        if self.is_gated {
            self.list_as_gated(shared);
        }
        receive
    }

    // Life and end
    // ----------------------------------------------------------------------------------------------------

    /// Whether there is something for [`StreamConnection::deadline`], [`StreamConnection::poll_close`] or
    /// [`StreamConnection::is_over`] to say. So an ordinary message costs one question.
    pub fn needs_attention(&mut self) -> bool {
        let needs = self.needs_attention;
        self.needs_attention = self.core.phase() == Phase::Dead;
        needs
    }

    /// When [`StreamConnection::on_timer`] is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.core.deadline()
    }

    /// The deadline may have come.
    pub fn on_timer(&mut self, shared: &mut StreamShared, clock: &LoopClock) {
        self.needs_attention = true;
        match self.core.on_timer(clock, self.receive_in_flight) {
            Due::Nothing => {}
            Due::Fail(violation) => self.fail(shared, clock, violation),
            Due::Drop => self.end(shared, CloseReason::Local),
        }
    }

    /// What is to be done with the stream, once.
    pub fn poll_close(&mut self) -> Option<Close> {
        self.close.take()
    }

    /// Whether its peer is to be asked whether it is there, as of `now`: it was not a moment ago.
    pub fn is_alive_at(&self, now: Instant) -> bool {
        self.seen_alive.is_some_and(|then| now - then < ALIVE_FOR)
    }

    /// Its peer was there.
    pub fn on_alive(&mut self, now: Instant) {
        self.seen_alive = Some(now);
    }

    /// Ends a connection whose peer broke the protocol, and tells the peer.
    fn fail(&mut self, shared: &mut StreamShared, clock: &LoopClock, violation: Violation) {
        let reason = CloseReason::Violation(violation);
        match words_for(violation) {
            Some((status, text)) => self.close(status, &text, reason, shared, clock),
            None => self.end(shared, reason),
        }
    }

    /// Ends it: with a goaway, or with a rejection if its handshake is not over.
    pub fn close(
        &mut self,
        status: Status,
        text: &str,
        reason: CloseReason,
        shared: &mut StreamShared,
        clock: &LoopClock,
    ) {
        let Some(words) = self.core.last_words(&shared.policy, status, text) else { return };
        self.say_last(&words, reason, shared, clock);
    }

    /// Ends it, if it has not: one of its keys has sealed as much as it may, and the kernel has no other. The
    /// peer goes on over another connection.
    #[cold]
    fn end_with_key(&mut self, shared: &mut StreamShared, clock: &LoopClock) {
        let text = "The keys of this connection have been used for as many records as they may be, and the \
            server's kernel cannot change them. Connect again.";
        let status = Status::transport(libc::ECONNRESET);
        self.close(status, text, CloseReason::KeyUsedUp, shared, clock);
    }

    /// Rejects a client whose welcome has not been sent.
    pub fn reject(&mut self, errno: i32, text: &str, shared: &mut StreamShared, clock: &LoopClock) {
        if self.core.is_open() {
            // The welcome, and what it said at once.
            self.outbox.discard_next();
            let rejection = shared.policy.rejection(errno, text);
            self.say_last(&rejection, CloseReason::Rejected, shared, clock);
        }
    }

    fn say_last(&mut self, words: &[u8], reason: CloseReason, shared: &mut StreamShared, clock: &LoopClock) {
        self.outbox.push_bytes(&mut shared.spare, |out| out.extend_from_slice(words));
        self.unread = Unread::None;
        self.receiving = Receiving::Messages;
        self.bodies_heap = 0;
        self.core.linger(clock);
        self.core.in_flight.clear();
        self.needs_attention = true;
        self.report(reason, shared);
        self.mark_dirty(shared);
    }

    /// Ends it at once.
    pub fn end(&mut self, shared: &mut StreamShared, reason: CloseReason) {
        match self.core.phase() {
            Phase::Dead => return,
            Phase::Lingering => {}
            Phase::Handshake | Phase::Open => self.report(reason, shared),
        }
        self.core.die();
        self.unread = Unread::None;
        self.outbox.discard();
        self.close = Some(Close::Both);
        self.needs_attention = true;
    }

    /// The peer cannot be reached: the kernel need not keep what it has for it.
    pub fn end_unreachable(&mut self, shared: &mut StreamShared) {
        self.reset(shared, CloseReason::Unreachable);
    }

    fn reset(&mut self, shared: &mut StreamShared, reason: CloseReason) {
        if self.core.phase() != Phase::Dead {
            self.end(shared, reason);
            self.close = Some(Close::Reset);
        }
    }

    /// It is over and gone: it is in none of the lists.
    pub fn on_gone(&mut self, shared: &mut StreamShared) {
        shared.heap_bytes -= self.heap_charged;
        if self.is_in_gated {
            shared.gated.retain(|&other| other != self.core.id.index);
        }
        shared.large_receives -= usize::from(self.large_for > 0);
        shared.upgraded -= usize::from(matches!(self.upgrade, UpgradeState::Upgraded(Some(_))));
    }

    /// On what it has made no progress since the last stall check, though it holds memory for that. What was
    /// begun after that has had less than the stall timeout.
    fn stalled(&self) -> Option<Stalled> {
        let Checkpoint { progress: then, was_receiving, was_sending } = self.checked;
        let now = self.progress;
        if !self.core.is_open() {
            None
        } else if was_sending
            && self.outbox.is_sending()
            && self.outbox.unsent_bytes() > 0
            && now.batches_out == then.batches_out
            && now.bytes_out - then.bytes_out < progress_due(self.outbox.unsent_bytes())
        {
            Some(Stalled::Output)
        } else if was_receiving
            && self.receiving.slot_len() > 0
            && self.receive_in_flight
            && now.messages_in == then.messages_in
            && now.bytes_in - then.bytes_in < progress_due(self.receiving.slot_len())
        {
            Some(Stalled::Input)
        } else {
            None
        }
    }

    /// Notes how far it has come. With `close`, ends it if it has made no progress since the last time on
    /// what it holds memory for.
    pub fn check_progress(&mut self, close: bool, shared: &mut StreamShared, clock: &LoopClock) {
        match self.stalled().filter(|_| close) {
            None => {}
            // A goaway would wait behind what it does not take, and so would the end of the stream, for
            // minutes, with all that the kernel holds for it.
            Some(Stalled::Output) => self.reset(shared, CloseReason::Evicted),
            Some(Stalled::Input) => {
                let text = "The server needed the memory that this connection held: it had begun to send \
                    data and did not go on while other clients waited. Connect again, and send messages \
                    without a pause.";
                let status = Status { retryable: true, ..Status::policy(libc::ENOBUFS) };
                self.close(status, text, CloseReason::Evicted, shared, clock);
            }
        }
        self.checked = Checkpoint {
            progress: self.progress,
            was_receiving: self.receiving.slot_len() > 0,
            was_sending: self.outbox.is_sending(),
        };
    }
}

#[cfg(test)]
mod tests;
