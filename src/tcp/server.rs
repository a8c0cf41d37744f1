//! The server's side of TCP: all connections of one worker.
//!
//! A connection has at most one receive and one send in the ring. What arrives comes in a buffer of the
//! reactor's, chosen when it arrives, so that idle connections hold no memory; the rest of a large write is
//! received straight into its slot. Answers gather in a batch, and leave in one send when the turn is
//! flushed.
//!
//! Nothing is read from a connection while a request's data waits for a slot, or while it does not take its
//! answers: TCP's own window then stops the peer. A peer that makes no progress on a message or on answers
//! for which there is memory is closed when others wait for that, and only then.

mod watch;

use std::any::Any;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::net::{Shutdown, getpeername, getsockname, shutdown, sockopt};

use crate::error::{Status, Violation};
use crate::handshake::{Grant, Peer, Policy};
use crate::memory::{Arena, Slot};
use crate::message::{self, HEADER_BYTES, Limits, Message, Parsed, QueuePairAddress};
use crate::reactor::{
    Event, File, Op, Payload, Reactor, Received, SendBatch, TimerId, Token, bound_tcp_retries,
};
use crate::transport::{
    ALIVE_FOR, CloseReason, ConnectionId, Request, RequestKey, Response, ServerEvent, ServerTransport,
    SlotRange, UpgradeRequest,
};
use watch::Watched;

/// Data that is still to come is received straight into its slot if it is at least this long; below, it comes
/// with what follows it, which saves a receive and costs a short copy.
const DIRECT_BYTES_MIN: usize = 32 << 10;
/// A connection whose unsent answers hold more than this is not read from.
const UNSENT_BYTES_MAX: usize = 1 << 20;
/// Progress that a peer must make within the stall timeout on a message it has begun, or on its answers...
const PROGRESS_BYTES_MIN: u64 = 4096;
/// ... and what part it is, at least, of the memory that they hold: one that trickles gives it back within so
/// many timeouts.
const PROGRESS_PART: u64 = 8;
/// How long a closed connection is kept for its peer to read the goaway.
const LINGER: Duration = Duration::from_secs(1);
/// A receive brings at most so much: what has come must be kept if it has to wait for a slot.
const NARROW_BYTES: u32 = 8 << 10;
/// So much for a connection whose receives come full...
const WIDE_BYTES: u32 = 64 << 10;
/// ... until so many in a row have not...
const WIDE_FOR: u8 = 8;
/// ... if it is one of so many. What waits so has a bound: 4 MiB, and the narrow ones of all connections.
const WIDE_MAX: usize = 64;
/// Heap that each connection may cause in any case: what it has received, some small messages and one long
/// one.
const HEAP_BASE: usize = 14 << 10;
/// ... and of that, messages that need not ask for more.
const HEAP_MESSAGES: usize = 2 << 10;
/// Once half of what all may cause together is used, a connection may cause this part of what is left.
const HEAP_PART: usize = 8;
/// What a request takes until it is answered, here and in the server, without its body.
const REQUEST_HEAP: usize = 512;
/// Bodies beyond this length count by themselves: the server keeps what they say.
const BODY_COUNTED_MIN: u16 = 128;
/// What a response without data, or a pong, takes until it is sent: its bytes, in a vector that doubles.
const SMALL_RESPONSE_HEAP: usize = 2 * HEADER_BYTES;
/// Finished batches kept for reuse.
const SPARE_BATCHES: usize = 64;

/// All connections of one worker.
#[expect(clippy::vec_box, reason = "batches move between here and the ring in their boxes")]
pub struct Server {
    owner: u8,
    policy: Arc<Policy>,
    entries: Vec<Entry>,
    free: Vec<u32>,
    events: VecDeque<ServerEvent>,
    exchanges: VecDeque<UpgradeRequest>,
    place: Place,
    passed: VecDeque<Passed>,
    /// Connections with answers since the last flush.
    dirty: Vec<u32>,
    /// Boxed because the kernel points at a batch while it sends it.
    spare: Vec<Box<SendBatch>>,
    sending: usize,
    /// Sends have ended at once, so there may be memory for somebody who waits for it.
    has_sent: bool,
    /// Connections that are wide.
    wide: usize,
    /// Connections to which something was sent, in the order in which they are looked at.
    watched: VecDeque<Watched>,
    /// So many of them have not been looked at in this round.
    looks_left: usize,
    /// Heap that connections cause beyond [`HEAP_BASE`] each, and how much it may be.
    heap_bytes: usize,
    heap_max: usize,
    /// Connections that are not read from until they, or others, cause less; and some that are again.
    gated: Vec<u32>,
    /// `heap_bytes` when all these were last looked at.
    gated_at: usize,
    /// How often a connection was not read from any more.
    gatings: u64,
}

/// Decides, when the hello of a connection has come, to whom it is passed on; None: it stays.
pub type Place = Box<dyn FnMut(&Peer) -> Option<usize>>;

/// A connection that is passed on, before anything has been said to its client.
#[derive(Debug)]
pub struct Passed {
    /// Which it was.
    pub connection: ConnectionId,
    /// As [`Place`] said.
    pub to: usize,
    /// Its socket.
    pub stream: Arc<OwnedFd>,
    /// All that was received: its hello, and what came behind it. For [`Server::adopt_passed`].
    pub hello: Vec<u8>,
}

/// Whether a connection moves to a queue pair.
enum UpgradeState {
    /// It does not.
    None,
    /// Its first message may ask for it.
    Offered(Box<Peer>),
    /// It has asked. Nothing but signs of life may come.
    Requested,
    /// It has moved: the same.
    Upgraded,
}

struct Entry {
    generation: u32,
    connection: Option<Box<Connection>>,
}

/// What a connection's ring operations and timers are, in the low bits of their tokens.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Receive = 0,
    Send = 1,
    /// Handshake deadline, end of lingering.
    Deadline = 2,
    /// The peer promised to send something.
    Keepalive = 3,
}

#[derive(PartialEq, Eq)]
enum State {
    /// Waits for the hello; its bytes so far.
    Handshake(Vec<u8>),
    Open,
    /// Over; sends what is left (the goaway), then reads to the end of the stream for a while.
    Lingering,
    /// Over; waits for its operations in the ring to end.
    Dead,
}

/// Where in the stream of messages a connection is.
enum Receiving {
    /// Between messages, or within one.
    Messages,
    /// A request with data was reported; the worker has not yet given it a slot.
    AwaitingFetch { id: u64, len: usize, crc: u32 },
    /// Data comes into a slot. While a direct receive is in flight, the ring has the slot.
    Data { id: u64, slot: Option<Slot>, start: usize, len: usize, filled: usize, crc: u32 },
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
#[derive(Default)]
enum Unread {
    #[default]
    None,
    /// In a buffer of the reactor's; at most for the length of a turn.
    Held(Received, usize),
    /// Copied out of it, since the turn ended.
    Copied(Vec<u8>, usize),
}

impl Unread {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::None => &[],
            Self::Held(received, at) => &received[*at..],
            Self::Copied(bytes, at) => &bytes[*at..],
        }
    }

    fn advance(&mut self, n: usize) {
        match self {
            Self::None => {}
            Self::Held(_, at) | Self::Copied(_, at) => *at += n,
        }
        if self.bytes().is_empty() {
            *self = Self::None;
        }
    }
}

struct Connection {
    id: ConnectionId,
    socket: File,
    /// Dropped after the socket. See [`Server::hold`].
    held: Option<Arc<dyn Any>>,
    state: State,
    grant: Option<Grant>,
    /// It was passed on to here, and stays.
    is_placed: bool,
    upgrade: UpgradeState,
    receiving: Receiving,
    unread: Unread,
    /// The front of a message whose rest has not arrived.
    partial: Vec<u8>,
    /// Requests not yet answered, oldest first: id, the most data of the response, and the heap of a long
    /// body.
    unanswered: VecDeque<(u64, u32, u16)>,
    /// The sum of the last.
    bodies_heap: usize,
    /// Heap of `out`, and of the batch before it.
    out_heap: usize,
    sent_heap: usize,
    /// Its part of [`Server::heap_bytes`].
    heap_charged: usize,
    /// It causes too much, and is not read from; it is in [`Server::gated`].
    is_gated: bool,
    is_in_gated: bool,
    /// Answers that no send has taken up, the bytes of their slots, and how many they are.
    out: Option<Box<SendBatch>>,
    out_bytes: usize,
    out_responses: usize,
    /// What was filled into the last batch: about as much will be into the next.
    filled_before: usize,
    /// What the last send left over: goes before `out`.
    rest: Option<Box<SendBatch>>,
    /// Bytes of the slots in all unsent answers: in `out`, in `rest`, and in the ring.
    unsent_bytes: usize,
    receive_in_flight: bool,
    /// Its receives are [`WIDE_BYTES`] long, for so many more that are short.
    wide_for: u8,
    send_in_flight: bool,
    /// It is on the list of those to which something was sent.
    is_watched: bool,
    /// How many came with the last receive.
    pings: usize,
    /// See [`ServerTransport::flush_early`].
    has_left_early: bool,
    is_dirty: bool,
    deadline: Option<TimerId>,
    keepalive: Option<(TimerId, Duration)>,
    /// Something came since the keepalive timer was set.
    heard: bool,
    /// When it was last asked whether it is alive, and was.
    seen_alive: Option<Instant>,
    progress: Progress,
    /// At the last stall check: `progress`, and whether the data of a message was being received, and a send
    /// was in flight.
    checked: (Progress, bool, bool),
}

fn stop_timers(reactor: &mut Reactor, connection: &mut Connection) {
    for timer in [connection.deadline.take(), connection.keepalive.take().map(|(timer, _)| timer)]
        .into_iter()
        .flatten()
    {
        reactor.cancel_timer(timer);
    }
}

/// Why a connection has ended by itself.
fn lost(errno: i32) -> CloseReason {
    match errno {
        // The kernel has given the peer up; the last answer may have been a router's.
        libc::ETIMEDOUT | libc::EHOSTUNREACH | libc::ENETUNREACH => CloseReason::Unreachable,
        errno => CloseReason::Lost(errno),
    }
}

/// How many bytes a peer must move within the stall timeout if it holds so much memory.
fn progress_due(held_bytes: usize) -> u64 {
    PROGRESS_BYTES_MIN.max(held_bytes as u64 / PROGRESS_PART)
}

/// What a peer does not do.
#[derive(Clone, Copy)]
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

impl Connection {
    fn is_idle_in_ring(&self) -> bool {
        !self.receive_in_flight && !self.send_in_flight
    }

    /// Whether the peer owes the rest of a message.
    fn owes_input(&self) -> bool {
        match self.receiving {
            Receiving::Messages => !self.partial.is_empty(),
            Receiving::AwaitingFetch { .. } => false,
            Receiving::Data { .. } | Receiving::Discard { .. } => true,
        }
    }

    /// On what it has made no progress since the last stall check, though it holds memory for that. What was
    /// begun after that has had less than the stall timeout.
    fn stalled(&self) -> Option<Stalled> {
        let (Progress { messages_in, bytes_in, batches_out, bytes_out }, was_receiving, was_sending) =
            self.checked;
        let now = self.progress;
        if self.state != State::Open {
            None
        } else if was_sending
            && self.send_in_flight
            && self.unsent_bytes > 0
            && now.batches_out == batches_out
            && now.bytes_out - bytes_out < progress_due(self.unsent_bytes)
        {
            Some(Stalled::Output)
        } else if was_receiving
            && self.receiving.slot_len() > 0
            && self.receive_in_flight
            && now.messages_in == messages_in
            && now.bytes_in - bytes_in < progress_due(self.receiving.slot_len())
        {
            Some(Stalled::Input)
        } else {
            None
        }
    }

    /// Heap that its messages cause.
    fn messages_heap(&self) -> usize {
        self.unanswered.len() * REQUEST_HEAP + self.bodies_heap + self.out_heap + self.sent_heap
    }

    /// ... and all else that it causes beyond what every connection does.
    fn heap_excess(&self) -> usize {
        let unread = if let Unread::Copied(bytes, _) = &self.unread { bytes.len() } else { 0 };
        (self.messages_heap() + unread).saturating_sub(HEAP_BASE)
    }

    /// Whether there is something that no send has taken up.
    fn has_unsent(&self) -> bool {
        self.out.is_some() || self.rest.is_some()
    }

    /// An answer has been appended to `out`, with so much more memory.
    fn count_response(&mut self, slot_len: usize) {
        self.unsent_bytes += slot_len;
        self.out_bytes += slot_len;
        self.out_responses += 1;
    }

    fn limits(&self) -> Limits {
        self.grant.map_or(Limits { crc: false, data_bytes_max: 0 }, |grant| grant.limits())
    }

    #[expect(clippy::vec_box, reason = "as in `Server`")]
    fn out(&mut self, spare: &mut Vec<Box<SendBatch>>) -> &mut SendBatch {
        self.out.get_or_insert_with(|| spare.pop().unwrap_or_default())
    }
}

impl Server {
    /// A transport with no connections. Events on its operations carry `owner`.
    pub fn new(owner: u8, policy: Arc<Policy>) -> Self {
        Self {
            owner,
            policy,
            entries: Vec::new(),
            free: Vec::new(),
            events: VecDeque::new(),
            exchanges: VecDeque::new(),
            place: Box::new(|_| None),
            passed: VecDeque::new(),
            dirty: Vec::new(),
            spare: Vec::new(),
            sending: 0,
            has_sent: false,
            wide: 0,
            watched: VecDeque::new(),
            looks_left: 0,
            heap_bytes: 0,
            heap_max: usize::MAX,
            gated: Vec::new(),
            gated_at: 0,
            gatings: 0,
        }
    }

    /// From now on all connections together may cause `bytes` of heap: what they have received and said, and
    /// what is not yet sent to them. That is without the first 16 KiB for each, their structs among them. A
    /// connection that causes too much is not read from until it causes less. Requests count as half a KiB
    /// and their body.
    pub fn set_heap_max(&mut self, bytes: usize) {
        self.heap_max = bytes;
    }

    /// From now on `place` decides who has which connection.
    pub fn set_place(&mut self, place: Place) {
        self.place = place;
    }

    /// The next connection that is to be passed on.
    pub fn next_passed(&mut self) -> Option<Passed> {
        self.passed.pop_front()
    }

    /// Takes over a connection that another server has passed on.
    pub fn adopt_passed(
        &mut self,
        reactor: &mut Reactor,
        stream: Arc<OwnedFd>,
        hello: Vec<u8>,
    ) -> ConnectionId {
        let mut connection = self.make_connection(reactor, stream);
        let id = connection.id;
        connection.is_placed = true;
        self.handshake(reactor, &mut connection, hello);
        self.receive(reactor, &mut connection);
        self.put(reactor, connection);
        id
    }

    /// Takes over an accepted, non-blocking stream socket, and reads its handshake. Returns the name of the
    /// connection in later events.
    pub fn adopt(&mut self, reactor: &mut Reactor, stream: OwnedFd) -> ConnectionId {
        let mut connection = self.make_connection(reactor, Arc::new(stream));
        let id = connection.id;
        self.receive(reactor, &mut connection);
        self.put(reactor, connection);
        id
    }

    /// Keeps this, for its owner, until the connection's socket is closed, which may be a while after the
    /// connection is reported as closed.
    pub fn hold(&mut self, id: ConnectionId, held: Arc<dyn Any>) {
        if let Some(connection) = self.entry(id).and_then(|entry| entry.connection.as_mut()) {
            connection.held = Some(held);
        }
    }

    /// What is kept for its owner.
    pub fn held(&self, id: ConnectionId) -> Option<Arc<dyn Any>> {
        self.connection(id)?.held.clone()
    }

    /// Heap that connections cause now, of what [`Server::set_heap_max`] bounds, and how often one was not
    /// read from because of that.
    pub fn heap(&self) -> (usize, u64) {
        (self.heap_bytes, self.gatings)
    }

    /// Whether there are connections that are not read from because of that.
    pub fn has_gated(&self) -> bool {
        !self.gated.is_empty()
    }

    /// Lets their clients know that the server is alive, as [`ServerTransport::show_life`] does.
    pub fn show_life_to_gated(&mut self, reactor: &mut Reactor) {
        // From the end, for one that has ended is taken out.
        for at in (0..self.gated.len()).rev() {
            let index = self.gated[at];
            if let Some(connection) = &self.entries[index as usize].connection {
                self.show_life(reactor, connection.id);
            }
        }
    }

    fn make_connection(&mut self, reactor: &mut Reactor, stream: Arc<OwnedFd>) -> Box<Connection> {
        // Neither matters to a socket that is no TCP socket (a test's socket pair).
        let _ = sockopt::set_tcp_nodelay(&stream, true);
        // An idle peer whose host has died is found by the kernel: the protocol does not ask idle clients to
        // speak.
        if sockopt::set_socket_keepalive(&stream, true).is_ok() {
            let _ = sockopt::set_tcp_keepidle(&stream, Duration::from_secs(60));
            let _ = sockopt::set_tcp_keepintvl(&stream, Duration::from_secs(10));
            let _ = sockopt::set_tcp_keepcnt(&stream, 6);
        }
        // So that one to which something was sent is found soon even if it took nothing for long before. Not
        // less, for a peer that has taken its window back is given up by the kernel after twice that.
        bound_tcp_retries(&stream, self.policy.unreachable_timeout / 2);
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry { generation: 0, connection: None });
            self.entries.len() as u32 - 1
        });
        let id = ConnectionId { index, generation: self.entries[index as usize].generation };
        let socket = reactor.file(stream);
        let deadline = Instant::now() + self.policy.handshake_timeout;
        let timer = reactor.timer(deadline, self.token(id, Kind::Deadline));
        Box::new(Connection {
            id,
            socket,
            held: None,
            state: State::Handshake(Vec::new()),
            grant: None,
            is_placed: false,
            upgrade: UpgradeState::None,
            receiving: Receiving::Messages,
            unread: Unread::None,
            partial: Vec::new(),
            unanswered: VecDeque::new(),
            bodies_heap: 0,
            out_heap: 0,
            sent_heap: 0,
            heap_charged: 0,
            is_gated: false,
            is_in_gated: false,
            out: None,
            rest: None,
            unsent_bytes: 0,
            out_bytes: 0,
            out_responses: 0,
            filled_before: 0,
            receive_in_flight: false,
            wide_for: 0,
            send_in_flight: false,
            is_watched: false,
            pings: 0,
            has_left_early: false,
            is_dirty: false,
            deadline: Some(timer),
            keepalive: None,
            heard: true,
            seen_alive: None,
            progress: Progress::default(),
            checked: Default::default(),
        })
    }

    /// The next client that wants to move to a queue pair.
    pub fn next_upgrade(&mut self) -> Option<UpgradeRequest> {
        while let Some(exchange) = self.exchanges.pop_front() {
            // It may have ended since, for what it said next.
            if self.connection(exchange.connection).is_some_and(|connection| connection.state == State::Open)
            {
                return Some(exchange);
            }
        }
        None
    }

    /// Answers it: the connection moves to this queue pair, and from now on carries nothing but signs of life
    /// and its end; or it stays, for this reason.
    pub fn answer_upgrade(
        &mut self,
        reactor: &mut Reactor,
        id: ConnectionId,
        answer: Result<&QueuePairAddress, (Status, &str)>,
    ) {
        let Some(mut connection) = self.take(id) else { return };
        if matches!((&connection.upgrade, &connection.state), (UpgradeState::Requested, State::Open)) {
            connection.upgrade = if answer.is_ok() { UpgradeState::Upgraded } else { UpgradeState::None };
            if answer.is_ok()
                && let Some((timer, _)) = connection.keepalive.take()
            {
                // What it has promised to say it now says elsewhere.
                reactor.cancel_timer(timer);
            }
            let crc = connection.limits().crc;
            connection.out(&mut self.spare).push_bytes(|out| message::encode_queue_pair(answer, crc, out));
            self.mark_dirty(&mut connection);
        }
        self.put(reactor, connection);
    }

    fn token(&self, id: ConnectionId, kind: Kind) -> Token {
        Token {
            owner: self.owner,
            value: u64::from(id.generation) << 32 | u64::from(id.index) << 2 | kind as u64,
        }
    }

    fn connection(&self, id: ConnectionId) -> Option<&Connection> {
        let entry = self.entries.get(id.index as usize)?;
        if entry.generation == id.generation { entry.connection.as_deref() } else { None }
    }

    /// Takes a connection out of its place, so that it can be changed together with the rest. [`Server::put`]
    /// it back.
    fn take(&mut self, id: ConnectionId) -> Option<Box<Connection>> {
        self.entry(id)?.connection.take()
    }

    fn entry(&mut self, id: ConnectionId) -> Option<&mut Entry> {
        self.entries.get_mut(id.index as usize).filter(|entry| entry.generation == id.generation)
    }

    /// Puts a connection back, or ends it if nothing keeps it.
    fn put(&mut self, reactor: &mut Reactor, mut connection: Box<Connection>) {
        let index = connection.id.index;
        let excess = connection.heap_excess();
        if excess != connection.heap_charged {
            self.heap_bytes = self.heap_bytes + excess - connection.heap_charged;
            connection.heap_charged = excess;
        }
        let entry = &mut self.entries[index as usize];
        if connection.state == State::Dead && connection.is_idle_in_ring() {
            stop_timers(reactor, &mut connection);
            self.heap_bytes -= excess;
            if connection.is_in_gated {
                self.gated.retain(|&other| other != index);
            }
            self.wide -= usize::from(connection.wide_for > 0);
            entry.generation = entry.generation.wrapping_add(1);
            self.free.push(index);
        } else {
            entry.connection = Some(connection);
        }
    }

    /// Whether a connection causes so much heap, while all cause much, that no more is taken in from it.
    fn is_over_heap(&self, connection: &Connection) -> bool {
        if !self.is_short_of_heap() {
            return false;
        }
        let free = self.heap_max.saturating_sub(self.heap_bytes);
        connection.messages_heap() > HEAP_MESSAGES && connection.heap_excess() + HEAP_BASE > free / HEAP_PART
    }

    /// Does not read from a connection for now.
    fn gate(&mut self, connection: &mut Connection) {
        connection.is_gated = true;
        self.gatings += 1;
        self.gated_at = usize::MAX;
        if !std::mem::replace(&mut connection.is_in_gated, true) {
            self.gated.push(connection.id.index);
        }
    }

    fn is_short_of_heap(&self) -> bool {
        self.heap_bytes > self.heap_max / 2
    }

    /// Looks again at the connections that are not read from: others have come to cause less since.
    fn open_gates(&mut self, reactor: &mut Reactor) {
        self.gated_at = self.heap_bytes;
        for index in std::mem::take(&mut self.gated) {
            let Some(mut connection) = self.entries[index as usize].connection.take() else { continue };
            connection.is_in_gated = false;
            if connection.is_gated {
                self.receive(reactor, &mut connection);
            }
            if connection.is_gated && !std::mem::replace(&mut connection.is_in_gated, true) {
                self.gated.push(index);
            }
            self.put(reactor, connection);
        }
    }

    /// Starts the receive that the connection's state asks for, if any.
    fn receive(&mut self, reactor: &mut Reactor, connection: &mut Connection) {
        if connection.receive_in_flight || connection.state == State::Dead {
            return;
        }
        if connection.state == State::Open {
            let queue_depth = self.policy.queue_depth as usize;
            let is_behind = connection.out_bytes > UNSENT_BYTES_MAX || connection.out_responses > queue_depth;
            // A send that took only a part has made no room yet: what it left is sent before anything else is
            // read.
            if is_behind && (connection.send_in_flight || connection.rest.is_some()) {
                return;
            }
            if connection.is_gated && !self.is_over_heap(connection) {
                connection.is_gated = false;
                self.read(reactor, connection);
            }
            // The data of a request waits for a slot.
            match connection.unread {
                Unread::None => {}
                // If that is not given in this turn, flush makes a copy.
                Unread::Held(..) => return self.mark_dirty(connection),
                Unread::Copied(..) => return,
            }
        }
        let socket = connection.socket.clone();
        let op = match &mut connection.receiving {
            Receiving::AwaitingFetch { .. } => return,
            Receiving::Data { slot, start, len, filled, .. } if *len - *filled >= DIRECT_BYTES_MIN => {
                let Some(slot) = slot.take() else { return };
                Op::RecvInto {
                    socket,
                    target: SlotRange { slot, start: *start + *filled, len: *len - *filled },
                }
            }
            _ => {
                Op::Recv { socket, len_max: if connection.wide_for > 0 { WIDE_BYTES } else { NARROW_BYTES } }
            }
        };
        connection.receive_in_flight = true;
        reactor.submit(self.token(connection.id, Kind::Receive), op);
    }

    /// Looks at the unread bytes, as far as the connection's state lets it.
    fn read(&mut self, reactor: &mut Reactor, connection: &mut Connection) {
        let mut unread = std::mem::take(&mut connection.unread);
        while connection.state == State::Open {
            let bytes = unread.bytes();
            if bytes.is_empty() {
                break;
            }
            if matches!(connection.receiving, Receiving::Messages) && self.is_over_heap(connection) {
                self.gate(connection);
                break;
            }
            let taken = match &mut connection.receiving {
                Receiving::AwaitingFetch { .. } => break,
                Receiving::Discard { left } => {
                    let n = bytes.len().min(*left);
                    *left -= n;
                    if *left == 0 {
                        connection.receiving = Receiving::Messages;
                    }
                    n
                }
                Receiving::Data { slot: Some(slot), start, len, filled, .. } => {
                    let n = bytes.len().min(*len - *filled);
                    let at = *start + *filled;
                    slot.bytes_mut()[at..at + n].copy_from_slice(&bytes[..n]);
                    *filled += n;
                    self.finish_data(reactor, connection);
                    n
                }
                Receiving::Data { slot: None, .. } => {
                    unreachable!("the ring has the slot, so nothing else is received")
                }
                Receiving::Messages => match self.read_message(connection, bytes) {
                    Ok(n) => n,
                    Err(violation) => {
                        self.fail(reactor, connection, violation);
                        break;
                    }
                },
            };
            unread.advance(taken);
        }
        if connection.state == State::Open {
            connection.unread = unread;
        }
    }

    /// Ends the data of a request if it is complete.
    fn finish_data(&mut self, reactor: &mut Reactor, connection: &mut Connection) {
        let Receiving::Data { id, slot, start, len, filled, crc } = &mut connection.receiving else { return };
        if filled < len {
            return;
        }
        let Some(slot) = slot.take() else { return };
        let range = SlotRange { slot, start: *start, len: *len };
        let key = RequestKey { connection: connection.id, id: *id };
        let crc = *crc;
        connection.receiving = Receiving::Messages;
        connection.progress.messages_in += 1;
        if connection.limits().crc && message::data_crc(range.bytes()) != crc {
            return self.fail(reactor, connection, Violation::Checksum);
        }
        self.events.push_back(ServerEvent::Fetched(key, range));
    }

    /// Takes in one message, or a part of one. Gives how many of `bytes` that took.
    fn read_message(&mut self, connection: &mut Connection, bytes: &[u8]) -> Result<usize, Violation> {
        let limits = connection.limits();
        if connection.partial.is_empty() {
            return match message::parse(bytes, &limits)? {
                Parsed::Item(message, len) => {
                    self.take_message(connection, message)?;
                    Ok(len)
                }
                Parsed::Need(_) => {
                    connection.partial.extend_from_slice(bytes);
                    Ok(bytes.len())
                }
            };
        }
        let mut partial = std::mem::take(&mut connection.partial);
        let mut taken = 0;
        loop {
            match message::parse(&partial, &limits)? {
                Parsed::Item(message, _) => {
                    self.take_message(connection, message)?;
                    return Ok(taken);
                }
                Parsed::Need(n) => {
                    let more = (n - partial.len()).min(bytes.len() - taken);
                    if more == 0 {
                        connection.partial = partial;
                        return Ok(taken);
                    }
                    partial.extend_from_slice(&bytes[taken..taken + more]);
                    taken += more;
                }
            }
        }
    }

    fn take_message(&mut self, connection: &mut Connection, message: Message<'_>) -> Result<(), Violation> {
        let upgrade = match connection.upgrade {
            UpgradeState::Offered(_) => std::mem::replace(&mut connection.upgrade, UpgradeState::None),
            _ => UpgradeState::None,
        };
        match message {
            Message::QueuePair(theirs) => {
                let UpgradeState::Offered(peer) = upgrade else {
                    return Err(Violation::Kind(message::Kind::QueuePair as u8));
                };
                let theirs = theirs.map_err(|_| Violation::Field)?;
                connection.upgrade = UpgradeState::Requested;
                let ip = |address: rustix::net::SocketAddrAny| {
                    std::net::SocketAddr::try_from(address).ok().map(|address| address.ip().to_canonical())
                };
                self.exchanges.push_back(UpgradeRequest {
                    connection: connection.id,
                    peer: *peer,
                    theirs,
                    local: getsockname(&connection.socket).ok().and_then(ip),
                    remote: getpeername(&connection.socket).ok().flatten().and_then(ip),
                });
            }
            Message::Request(..)
                if matches!(connection.upgrade, UpgradeState::Requested | UpgradeState::Upgraded) =>
            {
                return Err(Violation::Kind(message::Kind::Request as u8));
            }
            Message::Request(request, body) => {
                let credits = connection.grant.map_or(0, |grant| grant.credits()) as usize;
                if connection.unanswered.len() >= credits {
                    return Err(Violation::Credits);
                }
                if connection.unanswered.iter().any(|&(id, ..)| id == request.id) {
                    return Err(Violation::RequestId);
                }
                if matches!(request.region, message::RemoteRegion::Out { .. }) {
                    // On a stream data follows the request: there is nothing to fetch from.
                    return Err(Violation::Field);
                }
                let body_heap = if request.body_len < BODY_COUNTED_MIN { 0 } else { request.body_len };
                connection.bodies_heap += usize::from(body_heap);
                connection.unanswered.push_back((request.id, request.region_in_len(), body_heap));
                if request.data_len > 0 {
                    connection.receiving = Receiving::AwaitingFetch {
                        id: request.id,
                        len: request.data_len as usize,
                        crc: request.data_crc,
                    };
                } else {
                    connection.progress.messages_in += 1;
                }
                self.events.push_back(ServerEvent::Request(Request {
                    key: RequestKey { connection: connection.id, id: request.id },
                    body: body.into(),
                    data_len: request.data_len,
                    region_len: request.region_in_len(),
                }));
            }
            Message::Ping(id) => {
                // A peer that asks without ever reading is stopped as one that does not take its answers.
                let crc = connection.limits().crc;
                connection.out_responses += 1;
                connection.out_heap += SMALL_RESPONSE_HEAP;
                connection.pings += 1;
                connection.out(&mut self.spare).push_bytes(|out| message::encode_pong(id, crc, out));
                self.mark_dirty(connection);
            }
            Message::Pong(_) => {}
            Message::Goaway(..) => {
                let reason = if connection.unanswered.is_empty() {
                    CloseReason::Finished
                } else {
                    CloseReason::Lost(0)
                };
                self.end(connection, reason);
            }
            Message::Response(..) => return Err(Violation::Kind(message::Kind::Response as u8)),
        }
        Ok(())
    }

    fn mark_dirty(&mut self, connection: &mut Connection) {
        if !connection.is_dirty {
            connection.is_dirty = true;
            self.dirty.push(connection.id.index);
        }
    }

    /// Ends a connection whose peer broke the protocol, and tells the peer.
    fn fail(&mut self, reactor: &mut Reactor, connection: &mut Connection, violation: Violation) {
        let status = Status { retryable: false, ..Status::protocol(violation.errno()) };
        self.send_goaway(
            reactor,
            connection,
            status,
            &format!("{violation}."),
            CloseReason::Violation(violation),
        );
    }

    fn send_goaway(
        &mut self,
        reactor: &mut Reactor,
        connection: &mut Connection,
        status: Status,
        text: &str,
        reason: CloseReason,
    ) {
        let crc = connection.limits().crc;
        match connection.state {
            // Whoever it is does not speak raio, and would not understand.
            State::Handshake(_) if reason == CloseReason::Violation(Violation::Magic) => {
                return self.end(connection, reason);
            }
            State::Handshake(_) => {
                let rejection = self.policy.rejection(status.errno, text);
                connection.out(&mut self.spare).push_bytes(|out| out.extend_from_slice(&rejection));
            }
            State::Open => {
                connection
                    .out(&mut self.spare)
                    .push_bytes(|out| message::encode_goaway(status, text, crc, out));
            }
            State::Lingering | State::Dead => return,
        }
        connection.state = State::Lingering;
        connection.unread = Unread::None;
        connection.receiving = Receiving::Messages;
        connection.unanswered.clear();
        connection.bodies_heap = 0;
        self.events.push_back(ServerEvent::Closed(connection.id, reason));
        stop_timers(reactor, connection);
        connection.deadline =
            Some(reactor.timer(Instant::now() + LINGER, self.token(connection.id, Kind::Deadline)));
        self.mark_dirty(connection);
    }

    /// Ends a connection at once.
    fn end(&mut self, connection: &mut Connection, reason: CloseReason) {
        if connection.state == State::Dead {
            return;
        }
        if connection.state != State::Lingering {
            self.events.push_back(ServerEvent::Closed(connection.id, reason));
        }
        connection.state = State::Dead;
        connection.unread = Unread::None;
        connection.out = None;
        connection.rest = None;
        // Makes its operations in the ring end.
        let _ = shutdown(&connection.socket, Shutdown::Both);
    }

    fn received(&mut self, reactor: &mut Reactor, connection: &mut Connection, event: Event) {
        connection.receive_in_flight = false;
        let n = match event.result {
            // All buffers are in use: they come back within this turn, so ask again.
            Err(libc::ENOBUFS | libc::EINTR | libc::EAGAIN) => {
                if let (Payload::Slot(range), Receiving::Data { slot, .. }) =
                    (event.payload, &mut connection.receiving)
                {
                    *slot = Some(range.slot);
                }
                return;
            }
            Err(errno) => return self.end(connection, lost(errno)),
            Ok(0) => {
                let finished = connection.unanswered.is_empty() && !connection.owes_input();
                let reason = if finished { CloseReason::Finished } else { CloseReason::Lost(0) };
                return self.end(connection, reason);
            }
            Ok(n) => n as usize,
        };
        connection.progress.bytes_in += n as u64;
        match (event.payload, &mut connection.state) {
            (_, State::Lingering | State::Dead) => {}
            (Payload::Slot(range), State::Open) => {
                if let Receiving::Data { slot, filled, .. } = &mut connection.receiving {
                    *filled += n;
                    *slot = Some(range.slot);
                    self.finish_data(reactor, connection);
                }
            }
            (Payload::Received(received), State::Open) => {
                connection.unread = Unread::Held(received, 0);
                connection.pings = 0;
                self.read(reactor, connection);
                // Pings are no reason to receive more at a time: their pongs would have to be kept.
                if n >= NARROW_BYTES as usize && 2 * connection.pings * HEADER_BYTES < n {
                    if connection.wide_for > 0 || (self.wide < WIDE_MAX && !self.is_short_of_heap()) {
                        self.wide += usize::from(connection.wide_for == 0);
                        connection.wide_for = WIDE_FOR;
                    }
                } else if connection.wide_for > 0 {
                    connection.wide_for -= 1;
                    self.wide -= usize::from(connection.wide_for == 0);
                }
            }
            (Payload::Received(received), State::Handshake(hello)) => {
                hello.extend_from_slice(&received);
                let hello = std::mem::take(hello);
                self.handshake(reactor, connection, hello);
            }
            _ => unreachable!("a receive gives back a slot or a buffer"),
        }
    }

    fn handshake(&mut self, reactor: &mut Reactor, connection: &mut Connection, hello: Vec<u8>) {
        match self.policy.welcome(&hello) {
            Ok(Parsed::Need(n)) if hello.len() < n.min(message::HANDSHAKE_BYTES_MAX) => {
                connection.state = State::Handshake(hello);
            }
            Ok(Parsed::Need(_)) => self.fail(reactor, connection, Violation::HandshakeTooLong),
            Err(violation) => self.fail(reactor, connection, violation),
            Ok(Parsed::Item((peer, welcome), taken)) => {
                if !connection.is_placed
                    && let Some(to) = (self.place)(&peer)
                {
                    return self.pass_on(connection, to, hello);
                }
                stop_timers(reactor, connection);
                connection.state = State::Open;
                connection.grant = Some(peer.grant);
                if peer.grant.queue_pair {
                    connection.upgrade = UpgradeState::Offered(Box::new(peer.clone()));
                }
                connection.out(&mut self.spare).push_bytes(|out| out.extend_from_slice(&welcome));
                self.mark_dirty(connection);
                if !peer.keepalive.is_zero() {
                    // Three times, so that one late message is no death sentence.
                    let period = peer.keepalive * 3;
                    let timer =
                        reactor.timer(Instant::now() + period, self.token(connection.id, Kind::Keepalive));
                    connection.keepalive = Some((timer, period));
                }
                self.events.push_back(ServerEvent::Opened(connection.id, Box::new(peer)));
                if taken < hello.len() {
                    connection.unread = Unread::Copied(hello, taken);
                    self.read(reactor, connection);
                }
            }
        }
    }

    /// Takes the socket from a connection that has nothing in the ring.
    fn pass_on(&mut self, connection: &mut Connection, to: usize, hello: Vec<u8>) {
        self.passed.push_back(Passed {
            connection: connection.id,
            to,
            stream: connection.socket.descriptor(),
            hello,
        });
        connection.state = State::Dead;
    }

    fn sent(&mut self, connection: &mut Connection, event: Event) {
        connection.send_in_flight = false;
        self.sending -= 1;
        let Payload::Batch(batch) = event.payload else { unreachable!("a send gives back its batch") };
        match event.result {
            Ok(n) => connection.progress.bytes_out += u64::from(n),
            Err(libc::EINTR | libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => {}
            Err(errno) => self.end(connection, lost(errno)),
        }
        if connection.state == State::Dead {
            return;
        }
        if batch.is_empty() {
            connection.progress.batches_out += 1;
            connection.unsent_bytes = connection.out_bytes;
            connection.sent_heap = 0;
            if self.spare.len() < SPARE_BATCHES {
                self.spare.push(batch);
            }
            if connection.out.is_some() {
                self.mark_dirty(connection);
            } else if connection.state == State::Lingering {
                let _ = shutdown(&connection.socket, Shutdown::Write);
            }
        } else {
            connection.rest = Some(batch);
            self.mark_dirty(connection);
        }
    }

    fn deadline(&mut self, reactor: &mut Reactor, connection: &mut Connection) {
        connection.deadline = None;
        match connection.state {
            State::Handshake(_) => self.fail(reactor, connection, Violation::HandshakeTimeout),
            State::Lingering => self.end(connection, CloseReason::Local),
            State::Dead | State::Open => {}
        }
    }

    /// Closes a connection whose memory others wait for.
    fn evict(&mut self, reactor: &mut Reactor, connection: &mut Connection, stalled: Stalled) {
        match stalled {
            Stalled::Output => {
                // A goaway would wait behind what it does not take, and so would the end of the stream, for
                // minutes, with all that the kernel holds for it.
                let _ = sockopt::set_socket_linger(&connection.socket, Some(Duration::ZERO));
                self.end(connection, CloseReason::Evicted);
            }
            Stalled::Input => {
                let text = "The server needed the memory that this connection held: it had begun to send data and did not go on \
                            with them while other clients waited. Connect again, and send messages without a pause.";
                let status = Status { retryable: true, ..Status::policy(libc::ENOBUFS) };
                self.send_goaway(reactor, connection, status, text, CloseReason::Evicted);
            }
        }
    }

    fn keepalive(&mut self, reactor: &mut Reactor, connection: &mut Connection) {
        let Some((_, period)) = connection.keepalive.take() else { return };
        if connection.state != State::Open {
            return;
        }
        // Of a peer that is not read from, for want of memory or because it takes no answers, nothing can be
        // heard.
        let is_read_from = connection.receive_in_flight;
        if is_read_from && !connection.heard {
            return self.fail(reactor, connection, Violation::Silent);
        }
        connection.heard = !is_read_from;
        let timer = reactor.timer(Instant::now() + period, self.token(connection.id, Kind::Keepalive));
        connection.keepalive = Some((timer, period));
    }

    /// Whether its peer has neither reset nor closed the connection; if it has, the connection ends. It is
    /// asked at most every [`ALIVE_FOR`].
    fn is_there(&mut self, connection: &mut Connection) -> bool {
        if connection.state != State::Open {
            return false;
        }
        let now = Instant::now();
        if connection.seen_alive.is_some_and(|then| now - then < ALIVE_FOR) {
            return true;
        }
        let has_ended = super::has_ended(&connection.socket);
        if has_ended {
            let errno = sockopt::socket_error(&connection.socket).ok().and_then(Result::err);
            self.end(connection, lost(errno.map_or(0, |errno| errno.raw_os_error())));
        } else {
            connection.seen_alive = Some(now);
        }
        !has_ended
    }

    /// The connection's socket, as long as it is open.
    pub fn socket(&self, id: ConnectionId) -> Option<Weak<OwnedFd>> {
        Some(self.connection(id)?.socket.downgrade())
    }

    /// Appends an answer whose data `fill` brings. None: nothing has been done.
    fn fill_response(
        &mut self,
        connection: &mut Connection,
        id: u64,
        len: usize,
        arena: &mut Arena,
        fill: &mut dyn FnMut(&mut [u8]) -> bool,
    ) -> Option<()> {
        if connection.state != State::Open {
            return None;
        }
        let position = connection.unanswered.iter().position(|&(other, ..)| other == id)?;
        let crc = connection.limits().crc;
        let mut response = message::Response::of_data(id, len as u32);
        let expected = connection.filled_before;
        let slot_len =
            connection.out(&mut self.spare).push_filled(HEADER_BYTES + len, expected, arena, |bytes| {
                let (header, data) = bytes.split_at_mut(HEADER_BYTES);
                if !fill(data) {
                    return false;
                }
                if crc {
                    response.data_crc = message::data_crc(data);
                }
                header.copy_from_slice(&response.encode_bare(crc));
                true
            });
        let Some(slot_len) = slot_len else {
            // An empty batch is nothing to send.
            self.spare.extend(connection.out.take_if(|batch| batch.is_empty()));
            return None;
        };
        connection.unanswered.remove(position);
        connection.count_response(slot_len);
        self.mark_dirty(connection);
        Some(())
    }

    /// Starts the send that is due, if none is in flight.
    fn send(&mut self, reactor: &mut Reactor, connection: &mut Connection) {
        if connection.send_in_flight || connection.state == State::Dead {
            return;
        }
        let batch = connection.rest.take().or_else(|| {
            connection.out_bytes = 0;
            connection.out_responses = 0;
            connection.sent_heap = std::mem::take(&mut connection.out_heap);
            let out = connection.out.take();
            connection.filled_before = out.as_ref().map_or(0, |out| out.filled());
            out
        });
        if let Some(batch) = batch {
            connection.send_in_flight = true;
            self.sending += 1;
            if !connection.is_watched {
                self.watch(reactor, connection);
            }
            let token = self.token(connection.id, Kind::Send);
            if let Some(event) = reactor.send(token, connection.socket.clone(), batch) {
                self.has_sent = true;
                self.sent(connection, event);
                // There may be room for more answers now.
                self.receive(reactor, connection);
            }
        }
    }
}

impl ServerTransport for Server {
    fn owners(&self) -> [u8; 2] {
        [self.owner; 2]
    }

    fn handle(&mut self, reactor: &mut Reactor, event: Event) {
        let value = event.token.value;
        let id = ConnectionId { index: (value as u32) >> 2, generation: (value >> 32) as u32 };
        let Some(mut connection) = self.take(id) else {
            debug_assert!(matches!(event.payload, Payload::Timer), "an operation outlived its connection");
            if value == watch::LOOK {
                self.look_at_watched(reactor);
            }
            return;
        };
        match value & 3 {
            kind if kind == Kind::Receive as u64 => {
                connection.heard = true;
                self.received(reactor, &mut connection, event);
            }
            kind if kind == Kind::Send as u64 => self.sent(&mut connection, event),
            kind if kind == Kind::Deadline as u64 => self.deadline(reactor, &mut connection),
            _ => self.keepalive(reactor, &mut connection),
        }
        self.receive(reactor, &mut connection);
        self.put(reactor, connection);
    }

    fn poll_ready(&mut self, _arm: bool) -> bool {
        // What a flush has left behind.
        self.has_sent || !self.events.is_empty() || !self.dirty.is_empty() || !self.passed.is_empty()
    }

    fn process_ready(&mut self, _reactor: &mut Reactor) {
        self.has_sent = false;
    }

    fn next_event(&mut self) -> Option<ServerEvent> {
        self.events.pop_front()
    }

    fn fetch(&mut self, reactor: &mut Reactor, request: RequestKey, slot: Slot, start: usize) {
        let Some(mut connection) = self.take(request.connection) else { return };
        if let Receiving::AwaitingFetch { id, len, crc } = connection.receiving
            && id == request.id
        {
            assert!(slot.len() >= start && slot.len() - start >= len, "the slot has room for the data");
            connection.receiving = Receiving::Data { id, slot: Some(slot), start, len, filled: 0, crc };
            self.read(reactor, &mut connection);
            self.receive(reactor, &mut connection);
        }
        self.put(reactor, connection);
    }

    fn respond(&mut self, reactor: &mut Reactor, request: RequestKey, response: Response) {
        let Some(mut connection) = self.take(request.connection) else { return };
        let position = connection.unanswered.iter().position(|&(id, ..)| id == request.id);
        if let (State::Open, Some((_, region_len, body_heap))) =
            (&connection.state, position.and_then(|at| connection.unanswered.remove(at)))
        {
            connection.bodies_heap -= usize::from(body_heap);
            connection.out_heap += SMALL_RESPONSE_HEAP + 2 * response.body.len();
            let crc = connection.limits().crc;
            let data_len = response.data.as_ref().map_or(0, |range| range.len);
            assert!(
                data_len <= region_len as usize,
                "a response brings no more data than the request has room for"
            );
            let data_crc = match &response.data {
                Some(range) if crc && data_len > 0 => message::data_crc(range.bytes()),
                _ => 0,
            };
            let header = message::Response {
                id: request.id,
                body_len: 0,
                data_len: data_len as u32,
                status: response.status,
                credits: 1,
                result: response.result,
                data_crc,
            };
            let batch = connection.out(&mut self.spare);
            batch.push_bytes(|out| header.encode(&response.body, crc, out));
            let slot_len = response.data.as_ref().map_or(0, |range| range.slot.len());
            if let Some(range) = response.data {
                batch.push_slot(range);
            }
            connection.count_response(slot_len);
            self.mark_dirty(&mut connection);
            if let Receiving::AwaitingFetch { id, len, .. } = connection.receiving
                && id == request.id
            {
                connection.receiving = Receiving::Discard { left: len };
                connection.progress.messages_in += 1;
                self.read(reactor, &mut connection);
                self.receive(reactor, &mut connection);
            }
        }
        self.put(reactor, connection);
    }

    fn respond_filled(
        &mut self,
        request: RequestKey,
        len: usize,
        arena: &mut Arena,
        fill: &mut dyn FnMut(&mut [u8]) -> bool,
    ) -> bool {
        let Some(mut connection) = self.take(request.connection) else { return false };
        let is_done = self.fill_response(&mut connection, request.id, len, arena, fill).is_some();
        self.entries[request.connection.index as usize].connection = Some(connection);
        is_done
    }

    fn flush(&mut self, reactor: &mut Reactor) {
        let mut dirty = std::mem::take(&mut self.dirty);
        for index in dirty.drain(..) {
            let Some(mut connection) = self.entries[index as usize].connection.take() else { continue };
            connection.is_dirty = false;
            // A turn is over: the reactor's buffers go back, for others may need them.
            if let Unread::Held(received, at) = &connection.unread {
                connection.unread = Unread::Copied(received[*at..].to_vec(), 0);
            }
            if !std::mem::take(&mut connection.has_left_early) {
                self.send(reactor, &mut connection);
            } else if connection.has_unsent() {
                self.mark_dirty(&mut connection);
            }
            if connection.is_gated {
                self.receive(reactor, &mut connection);
            }
            self.put(reactor, connection);
        }
        if self.dirty.is_empty() {
            self.dirty = dirty;
        }
        if !self.gated.is_empty() && self.heap_bytes < self.gated_at {
            self.open_gates(reactor);
        }
    }

    fn flush_early(&mut self, reactor: &mut Reactor) {
        for at in 0..self.dirty.len() {
            let index = self.dirty[at] as usize;
            let Some(mut connection) = self.entries[index].connection.take() else { continue };
            if connection.has_unsent() && !connection.send_in_flight && !connection.has_left_early {
                connection.has_left_early = true;
                self.send(reactor, &mut connection);
            }
            self.entries[index].connection = Some(connection);
        }
    }

    fn close(&mut self, reactor: &mut Reactor, connection: ConnectionId, status: Status, text: &str) {
        let Some(mut connection) = self.take(connection) else { return };
        self.send_goaway(reactor, &mut connection, status, text, CloseReason::Local);
        self.put(reactor, connection);
    }

    fn reject(&mut self, reactor: &mut Reactor, connection: ConnectionId, errno: i32, text: &str) {
        let Some(mut connection) = self.take(connection) else { return };
        if connection.state == State::Open {
            // The welcome, and what it said at once.
            connection.out = None;
            connection.state = State::Handshake(Vec::new());
            let status = Status::policy(errno);
            self.send_goaway(reactor, &mut connection, status, text, CloseReason::Rejected);
        }
        self.put(reactor, connection);
    }

    fn close_stalled(&mut self, reactor: &mut Reactor, close: bool) {
        for index in 0..self.entries.len() {
            let Some(mut connection) = self.entries[index].connection.take() else { continue };
            if let Some(stalled) = connection.stalled().filter(|_| close) {
                self.evict(reactor, &mut connection, stalled);
            }
            connection.checked =
                (connection.progress, connection.receiving.slot_len() > 0, connection.send_in_flight);
            self.put(reactor, connection);
        }
    }

    fn is_alive(&mut self, reactor: &mut Reactor, connection: ConnectionId) -> bool {
        let Some(mut connection) = self.take(connection) else { return false };
        let is_there = self.is_there(&mut connection);
        self.put(reactor, connection);
        is_there
    }

    fn show_life(&mut self, reactor: &mut Reactor, connection: ConnectionId) {
        let Some(mut connection) = self.take(connection) else { return };
        let is_read_from =
            !matches!(connection.receiving, Receiving::AwaitingFetch { .. }) && !connection.is_gated;
        // Nor is it heard that such a connection has ended.
        if !is_read_from
            && self.is_there(&mut connection)
            && !connection.has_unsent()
            && !connection.send_in_flight
        {
            let crc = connection.limits().crc;
            connection
                .out(&mut self.spare)
                .push_bytes(|out| message::encode_pong(message::UNASKED_PONG, crc, out));
            self.mark_dirty(&mut connection);
        }
        self.put(reactor, connection);
    }

    fn unsent_bytes(&self, connection: ConnectionId) -> usize {
        self.connection(connection).map_or(0, |connection| connection.unsent_bytes)
    }

    fn is_sending(&self) -> bool {
        self.sending > 0 || !self.dirty.is_empty()
    }

    fn connections(&self) -> usize {
        self.entries.len() - self.free.len()
    }
}
