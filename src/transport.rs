//! The two role traits, and what both sides of every transport share.
//!
//! The roles are "send this command and tell me the answer" and "fetch this request's data, answer that
//! request": TCP need not imitate RDMA, and RDMA need not imitate a stream. A server's transport carries many
//! connections on its worker's reactor; a client's is one connection and needs no reactor.

use std::any::Any;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use std::{fmt, io};

pub use crate::body::Body;
use crate::connecting::Connecting;
use crate::credentials::Credentials;
use crate::error::{Error, Status, Violation};
use crate::handshake::{Grant, Identity, Peer};
use crate::keys::PublicKey;
pub use crate::memory::SlotRange;
use crate::memory::{Arena, ArenaMemory, Buffer, Buffers, Region, Slot};
use crate::message::QueuePairAddress;
use crate::protocol::Opcode;
pub use crate::push::{Answer, NotPushed, OneWay};
use crate::reactor::{Event, Reactor, Wait};
use crate::records::Records;
use crate::tls::kernel::KernelRecords;
use crate::tls::records::TlsRecords;
use crate::trace::ClockSample;
pub use crate::tuning::ALIVE_FOR;

/// A connection of a server: its transport, an index there that is reused and a generation that is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId {
    /// The owner number of its transport: [`ServerTransport::owner`].
    pub transport: u8,
    /// Index.
    pub index: u32,
    /// Generation.
    pub generation: u32,
}

/// A request as the server knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestKey {
    /// The connection that it came by.
    pub connection: ConnectionId,
    /// The client's id for it.
    pub id: u64,
}

/// A request that has arrived. Its data, if it brings any, has not: see [`ServerTransport::fetch`].
#[derive(Clone, Debug)]
pub struct Request {
    /// Which.
    pub key: RequestKey,
    /// The command.
    pub body: Body,
    /// How many bytes of data it brings.
    pub data_len: u32,
    /// How many bytes of data its response may bring.
    pub region_len: u32,
}

/// The answer to a request.
#[derive(Debug)]
pub struct Response {
    /// How it went.
    pub status: Status,
    /// The command's result.
    pub result: u64,
    /// A body: for a failure an error message (see [`crate::message::clipped`]), else what the command says.
    pub body: Body,
    /// Bulk data: `slot[start..start + len]`; at most the request's `region_len`.
    pub data: Option<SlotRange>,
}

/// What a server's transport tells its worker.
#[derive(Debug)]
pub enum ServerEvent {
    /// A client has finished its part of the handshake. Its welcome goes out with the next
    /// [`ServerTransport::flush`]; until then it can be rejected: [`ServerTransport::reject`].
    Opened(ConnectionId, Box<Peer>),
    /// A connection has moved to another transport, before its first request: what had the first id has the
    /// second from now on.
    Moved(ConnectionId, ConnectionId),
    /// A request has arrived. Answer it once: with [`ServerTransport::respond`], perhaps after
    /// [`ServerTransport::fetch`].
    Request(Request),
    /// The data of a request has arrived in the slot given to [`ServerTransport::fetch`]; the first field is
    /// that slot.
    Fetched(RequestKey, SlotRange),
    /// The same, but the data is not what the client has computed a checksum of. Answer the request with
    /// [`Status::DAMAGED`], and do nothing else of it: the client sends it again.
    Damaged(RequestKey, SlotRange),
    /// A one-way message has come. [`ServerTransport::release`] it once, when the program is done with it:
    /// until then the client's window is smaller.
    OneWay(ConnectionId, Body),
    /// The client has released the one-way message with this tag, which wanted a receipt, and all before it.
    Receipt(ConnectionId, u64),
    /// The client takes no more one-way messages, and has dropped those that it had not released.
    Refused(ConnectionId),
    /// The client has answered a request of this server's.
    Answered(ConnectionId, Answer),
    /// A connection has ended, perhaps one that was never reported as opened. Its requests are void, as is
    /// what it was sent and has not released or answered. No further event names it; slots that the transport
    /// holds for it come free when the kernel or the NIC has let go of them.
    Closed(ConnectionId, CloseReason),
}

/// An unsolicited message of a server, or what it does with those of its client: see [`crate::push`].
#[derive(Clone, Copy, Debug)]
pub enum Push<'a> {
    /// A one-way message.
    OneWay(OneWay<'a>),
    /// The oldest one-way message that was reported and not released is released.
    Release,
    /// No one-way message of the client's is reported from now on, for the life of the connection.
    Refuse,
    /// A request, with the caller's tag and a command of at most [`crate::message::BODY_BYTES_MAX`] bytes.
    Request(u64, &'a [u8]),
}

/// What has come from a server unsolicited.
#[derive(Clone, Debug)]
pub enum ClientEvent {
    /// A one-way message has come. [`ClientTransport::release`] it once, when the program is done with it:
    /// until then the server's window is smaller.
    OneWay(Body),
    /// The server has released the one-way message with this tag, which wanted a receipt, and all before it.
    Receipt(u64),
    /// The server takes no more one-way messages, and has dropped those that it had not released.
    Refused,
    /// The server asks: [`ClientTransport::answer`] it once. The number names the request in that.
    Request(u64, Body),
}

/// A client that wants its connection to move to a queue pair.
#[derive(Debug)]
pub struct UpgradeRequest {
    /// The connection. It waits for the answer.
    pub connection: ConnectionId,
    /// Who it is, and what it was granted.
    pub peer: Peer,
    /// Where its queue pair is.
    pub theirs: QueuePairAddress,
    /// What is kept for its owner: [`ServerTransport::hold`].
    pub held: Option<Arc<dyn Any>>,
    /// The addresses of both ends of the connection, if they are IP addresses.
    pub local: Option<IpAddr>,
    /// The client's.
    pub remote: Option<IpAddr>,
}

/// Listens for connections of a transport whose connections are no stream sockets.
pub trait Listener: fmt::Debug + Send {
    /// Where it listens, with the actual port.
    fn address(&self) -> SocketAddr;

    /// Readable when [`Listener::accept`] may have something.
    fn fd(&self) -> Result<OwnedFd, Error>;

    /// The next connection. None if there is none now.
    fn accept(&self) -> Option<Box<dyn Incoming>>;
}

/// A connection that a client asks for. Dropping it rejects the client without a reason.
pub trait Incoming: Any + fmt::Debug + Send {
    /// The client's address, if it is known.
    fn peer(&self) -> Option<SocketAddr>;

    /// Rejects the client, with an errno and an error message for it.
    fn reject(self: Box<Self>, errno: i32, text: &str);
}

/// The connection as its transport knows it, or as it was if it is not of that kind.
pub(crate) fn downcast<T: Incoming>(incoming: Box<dyn Incoming>) -> Result<Box<T>, Box<dyn Incoming>> {
    if (&*incoming as &dyn Any).is::<T>() {
        let incoming: Box<dyn Any> = incoming;
        Ok(incoming.downcast().expect("it was asked for its type"))
    } else {
        Err(incoming)
    }
}

/// A client's connection that is being made, whatever transport it is of.
pub type ClientDial = Box<dyn Connecting<Outcome = Result<Box<dyn ClientTransport>, Error>>>;

/// Connects a queue pair with the server's, which is at this address, and sees whether that answers over it:
/// from now on, for a part of the time until the deadline. The stream goes along: it carries nothing more,
/// and each ends with the other.
pub type ConnectQueuePair = Box<
    dyn FnOnce(&QueuePairAddress, Box<dyn ClientTransport>, Instant, Instant) -> Result<ClientDial, Error>
        + Send,
>;

/// A connection that was accepted, for the transport that it is of.
#[derive(Debug)]
pub enum Accepted {
    /// A stream.
    Stream(AcceptedStream),
    /// What the listener of another transport has given.
    Other(Box<dyn Incoming>),
}

/// A stream that was accepted, with what is known of it.
#[derive(Debug)]
pub struct AcceptedStream {
    pub(crate) socket: Arc<OwnedFd>,
    pub(crate) records: Records,
    pub(crate) identity: Identity,
    /// What has been received: as it came, sealed or not, or opened if another server has passed it on.
    pub(crate) received: Vec<u8>,
    pub(crate) is_passed: bool,
    /// It may become a queue pair, if the server makes such.
    pub(crate) may_move: bool,
}

impl AcceptedStream {
    /// A non-blocking stream socket, of which nothing is known.
    pub fn new(socket: impl Into<Arc<OwnedFd>>) -> Self {
        Self {
            socket: socket.into(),
            records: Records::Clear,
            identity: Identity::Anonymous,
            received: Vec::new(),
            is_passed: false,
            may_move: true,
        }
    }

    /// One whose client has shown to have this key, in the handshake of this layer, behind which something
    /// may have been received.
    pub(crate) fn secured(socket: Arc<OwnedFd>, records: TlsRecords, received: Vec<u8>) -> Self {
        let identity = Identity::Key(records.peer());
        Self { records: Records::Tls(Box::new(records)), identity, received, ..Self::new(socket) }
    }

    /// The same, where the kernel seals and opens.
    pub(crate) fn secured_by_kernel(socket: Arc<OwnedFd>, peer: PublicKey, records: KernelRecords) -> Self {
        let identity = Identity::Key(peer);
        Self { records: Records::Kernel(records), identity, ..Self::new(socket) }
    }

    /// One whose client is a process of this machine, run by this user.
    pub fn of_user(self, user: Credentials) -> Self {
        Self { identity: Identity::User(Arc::new(user)), ..self }
    }

    /// The same as one that never becomes a queue pair: what goes over that is not sealed.
    pub fn without_rdma(self) -> Self {
        Self { may_move: false, ..self }
    }

    /// Its socket.
    pub fn socket(&self) -> &Arc<OwnedFd> {
        &self.socket
    }

    /// Who the client is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }
}

/// A connection that is passed on to another server, before anything has been said to its client.
#[derive(Debug)]
pub struct Passed {
    /// Which it was.
    pub connection: ConnectionId,
    /// To which server, as was decided when its hello had come.
    pub to: usize,
    /// For [`Accepted::Stream`].
    pub stream: AcceptedStream,
}

/// What a transport has to say to another about a connection that moves from the one to the other, or has
/// moved: then each has a half of it, its partner the other.
#[derive(Debug)]
pub enum Handover {
    /// A connection asks to move. Ask the others to [`ServerTransport::take_over`], then
    /// [`ServerTransport::answer_upgrade`].
    Upgrade(Box<UpgradeRequest>),
    /// One half has ended: [`ServerTransport::partner_ended`] for the other.
    Ended {
        /// The other half.
        partner: ConnectionId,
        /// How.
        reason: CloseReason,
        /// What the client was told.
        status: Status,
        /// The same, in words.
        text: String,
    },
}

/// What a server's transport has counted, if it counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServerCounters {
    /// Responses posted.
    pub responses: u64,
    /// Work requests posted, receives not counted.
    pub work_requests: u64,
    /// Doorbells: chains of work requests posted.
    pub doorbells: u64,
    /// RDMA WRITEs among the work requests.
    pub writes: u64,
    /// RDMA READs among them.
    pub reads: u64,
    /// Bytes of data copied: what came inline.
    pub copied_bytes: u64,
}

/// Why a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The peer closed it in good order, with nothing outstanding.
    Finished,
    /// The peer has said that it is the end of its channel.
    Goaway,
    /// The peer went away with requests outstanding, or the network failed (errno; 0: end of stream).
    Lost(i32),
    /// The peer broke the protocol.
    Violation(Violation),
    /// This side closed it.
    Local,
    /// This side turned it away: [`ServerTransport::reject`].
    Rejected,
    /// Others waited for the memory that it held without progress: [`ServerTransport::close_stalled`].
    Evicted,
    /// The peer's host does not answer any more: it or the network to it has failed (ETIMEDOUT).
    Unreachable,
    /// A key has been used for as many records as it may be, and the kernel, which seals them, cannot change
    /// it. The peer goes on over another connection.
    KeyUsedUp,
}

impl CloseReason {
    /// A short name for counters.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Goaway => "goaway",
            Self::Lost(_) => "lost",
            Self::Violation(violation) => violation.name(),
            Self::Local => "local",
            Self::Rejected => "rejected",
            Self::Evicted => "evicted",
            Self::Unreachable => "unreachable",
            Self::KeyUsedUp => "key_used_up",
        }
    }
}

/// Asked before a connection from this address, if it is known, takes so many bytes for its queue pair and
/// what its messages may cause. Returns what is dropped once they are free again, or an error message for the
/// client that says why it may not have them.
pub type QueuePairMemory = Box<dyn FnMut(Option<IpAddr>, usize) -> Result<Box<dyn Any>, String>>;

/// The server's side of a transport: all connections of one worker. The worker lends its reactor to each
/// call.
pub trait ServerTransport {
    /// Runs one iteration of the event loop: submits what was asked for, waits as `wait` says unless the
    /// transport has news that no event of the reactor tells of, and takes in all that concerns the
    /// transport. What is left in `events`, which must be empty before, are the other events. Returns whether
    /// anything happened. Then take [`ServerTransport::next_event`] until there is none, and
    /// [`ServerTransport::flush`].
    fn run_once(&mut self, reactor: &mut Reactor, wait: Wait, events: &mut Vec<Event>) -> io::Result<bool> {
        debug_assert!(events.is_empty(), "events of the last iteration were not taken");
        let mut poll_ready = false;
        reactor.poll_with(wait, events, &mut |arm| {
            poll_ready = self.poll_ready(arm);
            poll_ready
        })?;
        let happened = poll_ready || !events.is_empty();
        let owners = self.owners();
        let is_ours = |owner: u8| 1u64.checked_shl(owner.into()).is_some_and(|bit| owners & bit != 0);
        // Empty in every other iteration at depth 1; `extract_if` costs 50 instructions even then.
        if !events.is_empty() {
            for event in events.extract_if(.., |event| is_ours(event.token.owner)) {
                self.handle(reactor, event);
            }
        }
        self.process_ready(reactor);
        Ok(happened)
    }

    /// The owner number in the tokens of this transport's operations: their events are for
    /// [`ServerTransport::handle`], and its connections' ids name it by that. Below 64.
    fn owner(&self) -> u8;

    /// The owner numbers of all that this is made of, a bit for each.
    fn owners(&self) -> u64 {
        1 << self.owner()
    }

    /// From now on connections that make no progress are closed after another time, and channels of clients
    /// that connect are kept for another one: see [`crate::handshake::Policy`].
    fn set_timeouts(&mut self, stall_timeout: Duration, linger: Duration);

    /// Takes in what happened on the ring to an operation of this transport's (its [`crate::reactor::Token`]
    /// has this transport's owner number).
    fn handle(&mut self, reactor: &mut Reactor, event: Event);

    /// Looks for news that no event of the reactor tells of: completions in memory, or what the last flush
    /// has left to do or made possible. With `arm` the worker is about to sleep: news from now on comes as an
    /// event. Whether there is any now: [`ServerTransport::process_ready`] takes it in.
    fn poll_ready(&mut self, arm: bool) -> bool {
        let _ = arm;
        false
    }

    /// Takes in the news that [`ServerTransport::poll_ready`] looks for. Called once a turn, after the
    /// events.
    fn process_ready(&mut self, reactor: &mut Reactor) {
        let _ = reactor;
    }

    /// The next thing that the worker must know.
    fn next_event(&mut self) -> Option<ServerEvent>;

    /// Brings the data of a request into `slot[start..]`: [`ServerEvent::Fetched`] follows, or the connection
    /// closes. `slot` must have room for the request's `data_len`. A request that is answered without a fetch
    /// has its data discarded.
    fn fetch(&mut self, reactor: &mut Reactor, request: RequestKey, slot: Slot, start: usize);

    /// Answers a request, and gives its credit back. What is passed here is sent by the next
    /// [`ServerTransport::flush`]. Answering a request of a connection that has closed does nothing.
    fn respond(&mut self, reactor: &mut Reactor, request: RequestKey, response: Response);

    /// Answers a request with `len` bytes of data that are at hand: `fill` puts them where they leave
    /// together with the connection's other answers, in memory of `arena`'s. Whether it has done so. If not
    /// (this transport does not do it, there is no memory, `fill` says no) nothing has happened, and the
    /// request is still to be answered.
    fn respond_filled(
        &mut self,
        request: RequestKey,
        len: usize,
        arena: &mut Arena,
        fill: &mut dyn FnMut(&mut [u8]) -> bool,
    ) -> bool {
        let _ = (request, len, arena, fill);
        false
    }

    /// Sends an unsolicited message with the next [`ServerTransport::flush`]. They arrive in the order of
    /// these calls, and of the answers among them.
    ///
    /// # Panics
    /// If it is too long, or nothing is to be released.
    fn push(
        &mut self,
        reactor: &mut Reactor,
        connection: ConnectionId,
        push: Push<'_>,
    ) -> Result<(), NotPushed>;

    /// Sends a one-way message.
    fn send_one_way(
        &mut self,
        reactor: &mut Reactor,
        connection: ConnectionId,
        message: OneWay<'_>,
    ) -> Result<(), NotPushed> {
        self.push(reactor, connection, Push::OneWay(message))
    }

    /// Is done with the oldest one-way message of a connection that was reported and not released.
    fn release(&mut self, reactor: &mut Reactor, connection: ConnectionId) {
        // One whose connection has ended is released with that.
        let _ = self.push(reactor, connection, Push::Release);
    }

    /// Starts sending what was answered since the last call, a batch for each connection.
    fn flush(&mut self, reactor: &mut Reactor);

    /// The same in the middle of a turn, so that a client that looks for it works on that while the worker
    /// goes on. What such a connection is answered afterwards is passed over by the next flush, to leave with
    /// whatever leaves next, for one large send costs less than two. Where there is nothing to gain it does
    /// nothing.
    fn flush_early(&mut self, reactor: &mut Reactor) {
        let _ = reactor;
    }

    /// Ends a connection: sends a goaway with this status and sentence if it can. [`ServerEvent::Closed`]
    /// follows.
    fn close(&mut self, reactor: &mut Reactor, connection: ConnectionId, status: Status, text: &str);

    /// Turns a client away: it gets a rejection with this errno and sentence in the place of its welcome.
    /// Only between [`ServerEvent::Opened`] and the next [`ServerTransport::flush`]. [`ServerEvent::Closed`]
    /// follows.
    fn reject(&mut self, reactor: &mut Reactor, connection: ConnectionId, errno: i32, text: &str);

    /// Under memory pressure: notes how far each connection has come with what it holds memory for (responses
    /// that its peer does not take, a message that it does not finish). With `close`, connections without
    /// progress since the previous call are closed: [`CloseReason::Evicted`]. Calls are
    /// [`crate::handshake::Policy::stall_timeout`] apart.
    fn close_stalled(&mut self, reactor: &mut Reactor, close: bool);

    /// Whether the connection still exists, as of [`ALIVE_FOR`] ago; asked before a request is started. A
    /// peer that has reset or closed it has given its requests up, and may have others write in the same
    /// place meanwhile: its bytes can lie in the kernel, and its requests wait, for as long as the worker was
    /// held up. If it has ended, [`ServerEvent::Closed`] follows.
    fn is_alive(&mut self, reactor: &mut Reactor, connection: ConnectionId) -> bool {
        let _ = (reactor, connection);
        true
    }

    /// Lets the client know that the server is alive, if it cannot tell: its pings lie behind data, or
    /// requests, that wait for memory. If the client has gone, [`ServerEvent::Closed`] follows. To be called
    /// often enough for [`crate::handshake::Policy::keepalive`] as long as a request of the connection waits.
    fn show_life(&mut self, reactor: &mut Reactor, connection: ConnectionId) {
        let _ = (reactor, connection);
    }

    /// Bytes of the slots that the connection's unsent answers hold: its peer has not taken them yet.
    fn unsent_bytes(&self, connection: ConnectionId) -> usize;

    /// Whether anything waits to be sent: answers not yet taken by their peers.
    fn is_sending(&self) -> bool;

    /// Connections now, those in their handshake among them.
    fn connections(&self) -> usize;

    /// Whether no connection needs the process any more: each has been closed, and its peer's host has all
    /// that was sent, the goaway last. The peer need not have read it. Takes a system call for each.
    fn is_delivered(&self) -> bool {
        self.connections() == 0
    }

    // Connections that come, stay with their owner, and go elsewhere
    // ----------------------------------------------------------------------------------------------------

    /// Takes over a connection that was accepted; its handshake is still to come. Returns it if it is not of
    /// this transport's kind, else the connection's id, or why there is none.
    fn accept(
        &mut self,
        reactor: &mut Reactor,
        incoming: Accepted,
    ) -> Result<Result<ConnectionId, Error>, Accepted> {
        let _ = reactor;
        Err(incoming)
    }

    /// Keeps this, for its owner, as long as the connection takes anything of the system: a while longer than
    /// until it is reported as closed.
    fn hold(&mut self, connection: ConnectionId, held: Arc<dyn Any>) {
        let _ = (connection, held);
    }

    /// The next connection that is to be passed on to another server.
    fn next_passed(&mut self) -> Option<Passed> {
        None
    }

    /// A connection's socket, if it has one, as long as that is open.
    fn socket(&self, connection: ConnectionId) -> Option<Weak<OwnedFd>> {
        let _ = connection;
        None
    }

    /// The next thing that this transport has to say to another.
    fn next_handover(&mut self) -> Option<Handover> {
        None
    }

    /// Takes over a connection that asks to move, with all that it was granted. Returns its new id, and what
    /// its client must be told; requests may come from then on. Fails, with nothing changed, if it cannot.
    fn take_over(
        &mut self,
        reactor: &mut Reactor,
        request: &UpgradeRequest,
    ) -> Result<(ConnectionId, QueuePairAddress), Error> {
        let _ = (reactor, request);
        Err(Error::Unsupported("no connection can move to this transport".into()))
    }

    /// Answers a connection of this transport's that asked to move: it moves there, and from now on carries
    /// nothing but signs of life and its end; or it stays, for this reason.
    fn answer_upgrade(
        &mut self,
        reactor: &mut Reactor,
        connection: ConnectionId,
        answer: Result<(ConnectionId, &QueuePairAddress), (Status, &str)>,
    ) {
        let _ = (reactor, connection, answer);
    }

    /// For a connection that this transport has taken over: its half in the transport that it came from.
    fn partner(&self, connection: ConnectionId) -> Option<ConnectionId> {
        let _ = connection;
        None
    }

    /// The other half of a connection has ended, and with it this one.
    fn partner_ended(
        &mut self,
        reactor: &mut Reactor,
        connection: ConnectionId,
        reason: CloseReason,
        status: Status,
        text: &str,
    ) {
        let _ = (reactor, connection, reason, status, text);
    }

    // Accounts
    // ----------------------------------------------------------------------------------------------------

    /// Heap that the connections' messages cause now, of what there may be, and how often one was not read
    /// from because of that (backpressure).
    fn heap(&self) -> (usize, u64) {
        (0, 0)
    }

    /// Whether there are connections that are not read from because of that.
    fn has_gated(&self) -> bool {
        false
    }

    /// Lets their clients know that the server is alive, as [`ServerTransport::show_life`] does.
    fn show_life_to_gated(&mut self, reactor: &mut Reactor) {
        let _ = reactor;
    }

    /// What was counted, over all connections.
    fn counters(&self) -> ServerCounters {
        ServerCounters::default()
    }
}

/// What a request carries besides its command.
#[derive(Debug)]
pub enum Bulk {
    /// Nothing.
    None,
    /// Room for the data that the response brings.
    In(Buffers),
    /// Data for the server.
    Out(Buffers),
}

impl Bulk {
    /// Bytes in all, in whichever direction.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::In(buffers) | Self::Out(buffers) => buffers.len(),
        }
    }

    /// Takes the buffers. In their place are others, with the same data if it is for the server.
    pub fn detach(&mut self) -> Self {
        let owned = |bytes: Vec<u8>| Buffers::One(Buffer::Owned(bytes.into()));
        let others = match self {
            Self::None => Self::None,
            Self::In(buffers) => Self::In(owned(vec![0; buffers.len()])),
            Self::Out(buffers) => {
                Self::Out(owned(buffers.slices(0..buffers.len()).collect::<Vec<_>>().concat()))
            }
        };
        std::mem::replace(self, others)
    }

    /// Bytes that the response may bring.
    pub fn len_in(&self) -> usize {
        if let Self::In(buffers) = self { buffers.len() } else { 0 }
    }

    /// Bytes for the server.
    pub fn len_out(&self) -> usize {
        if let Self::Out(buffers) = self { buffers.len() } else { 0 }
    }
}

/// A request that is over: answered, or lost with its connection.
#[derive(Debug)]
pub struct Reply {
    /// The caller's, from [`ClientTransport::send`].
    pub tag: u64,
    /// How it went.
    pub status: Status,
    /// It has failed with its connection, and may have been executed nevertheless.
    pub is_unknown: bool,
    /// The command's result.
    pub result: u64,
    /// The body of the response: for a failure a padded sentence ([`crate::message::text`]). Empty if the
    /// request was lost with the connection: [`ClientTransport::failure`] says why.
    pub body: Body,
    /// How many bytes were placed in `bulk`.
    pub data_len: usize,
    /// CRC32C of these bytes, which they have been compared with; 0 if the response had no checksums.
    pub data_crc: u32,
    /// The caller's buffers.
    pub bulk: Bulk,
}

/// What a client's transport has counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClientCounters {
    /// System calls that sent (RDMA: doorbells).
    pub sends: u64,
    /// System calls that received something (RDMA: polls that found something).
    pub receives: u64,
    /// Bytes copied on the way to or from the caller's memory.
    pub bounced_bytes: u64,
    /// Requests whose data has arrived damaged, each time.
    pub checksum_errors: u64,
}

/// How a request is to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendOptions {
    /// It may use the credit that is kept for control requests.
    pub control: bool,
    /// It and its response have checksums, also on a connection without: see [`Grant::request_crc`].
    pub has_crc: bool,
    /// If so, the CRC32C of the data that it carries; 0 if it carries none.
    pub crc: u32,
}

impl SendOptions {
    /// Of a request that does not carry data, or not for long.
    pub const CONTROL: Self = Self { control: true, has_crc: false, crc: 0 };
    /// Of any other request.
    pub const PLAIN: Self = Self { control: false, has_crc: false, crc: 0 };

    /// Of a request that is to have checksums if `crc` is one: of the data that it carries.
    pub fn with_crc(crc: Option<u32>) -> Self {
        Self { control: false, has_crc: crc.is_some(), crc: crc.unwrap_or(0) }
    }

    /// Why a request cannot be sent so over a connection with this grant, for people.
    pub fn why_not_granted(&self, grant: &Grant) -> Option<String> {
        let text = "The server does not know checksums (CRC32C) of single requests. Update it, or connect \
                    with checksums.";
        (self.has_crc && !grant.request_crc()).then(|| text.into())
    }

    /// What [`SendOptions::with_crc`] was given.
    pub fn given_crc(&self) -> Option<u32> {
        self.has_crc.then_some(self.crc)
    }
}

/// Why [`ClientTransport::send`] did not take a request. The caller has its buffers back.
#[derive(Debug)]
pub struct NotSent(pub Bulk);

/// A request that was outstanding when its connection ended, and that another connection may send again.
#[derive(Debug)]
pub struct Lost {
    /// The caller's, from [`ClientTransport::send`].
    pub tag: u64,
    /// What it was called on the wire.
    pub id: RequestId,
    /// Its command.
    pub command: KeptCommand,
    /// The caller's buffers.
    pub bulk: Bulk,
    /// How it was sent.
    pub options: SendOptions,
    /// The whole of it was sent, and the server has not said that it was not executed. A server never runs a
    /// request that it has not received completely.
    pub was_sent: bool,
}

/// A request whose data has arrived damaged, and that has not been executed for that: a read's at the client,
/// a write's at the server.
#[derive(Debug)]
pub struct Damaged {
    /// What is to be sent again.
    pub lost: Lost,
    /// How often that has happened to it.
    pub times: u8,
}

impl Lost {
    /// It ends with this status, which is a failure.
    pub fn reply(self, status: Status) -> Reply {
        let is_unknown = self.was_sent && Opcode::is_recorded_on_wire(&self.command);
        let body = Body::default();
        Reply {
            tag: self.tag,
            status,
            is_unknown,
            result: 0,
            body,
            data_len: 0,
            data_crc: 0,
            bulk: self.bulk,
        }
    }
}

/// The encoded command of an outstanding request: in place if it has 24 bytes, so that the requests that
/// matter allocate nothing.
#[derive(Clone, Debug)]
pub enum KeptCommand {
    /// Of 24 bytes.
    Short([u8; 24]),
    /// Of any other length.
    Long(Box<[u8]>),
}

impl From<&[u8]> for KeptCommand {
    #[inline]
    fn from(bytes: &[u8]) -> Self {
        match bytes.try_into() {
            Ok(bytes) => Self::Short(bytes),
            Err(_) => Self::Long(bytes.into()),
        }
    }
}

impl std::ops::Deref for KeptCommand {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Short(bytes) => bytes,
            Self::Long(bytes) => bytes,
        }
    }
}

/// What a slot of a channel remembers from one connection to the next. A request's id is its slot and the
/// slot's generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IdHistory {
    /// Of the next request.
    pub generation: u16,
    /// The generation of the slot's last recorded request, by which the server knows that. The next recorded
    /// request may not have it.
    pub recorded: Option<u16>,
}

impl IdHistory {
    /// The id of the request in this slot.
    #[inline]
    pub fn id(self, index: u32) -> RequestId {
        RequestId(u64::from(self.generation) << 16 | u64::from(index))
    }

    /// The next request is recorded.
    #[inline]
    pub fn on_recorded(&mut self) {
        if self.recorded == Some(self.generation) {
            self.on_over();
        }
        self.recorded = Some(self.generation);
    }

    /// A request is over: the next one has another generation.
    #[inline]
    pub fn on_over(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }
}

/// The ids that a channel has used, for its next connection.
#[derive(Clone, Debug, Default)]
pub struct UsedIds(pub(crate) Vec<IdHistory>);

/// What a client's connection knows of itself, whatever moves its bytes.
pub trait ClientCore {
    /// What the server granted.
    fn grant(&self) -> &Grant;

    /// Requests that are not over, or whose replies have not been handed out.
    fn outstanding(&self) -> usize;

    /// Credits left for ordinary requests.
    fn credits(&self) -> usize;

    /// Why the connection ended, if it has.
    fn failure(&self) -> Option<&Error>;

    /// When something was last received.
    fn last_rx(&self) -> Instant;

    /// Since when something is outstanding, if something is. None if that is so since the clock was last
    /// looked at.
    fn owed_since(&self) -> Option<Instant>;

    /// How the server's clock stands to this side's: of the latest pongs with the server's time the one that
    /// came soonest. None before one has come, and if [`FEATURE_PONG_TIME`] was not granted.
    ///
    /// [`FEATURE_PONG_TIME`]: crate::message::FEATURE_PONG_TIME
    fn clock_sample(&self) -> Option<ClockSample>;

    /// What was counted.
    fn counters(&self) -> ClientCounters;

    /// How long the server may be silent while something is outstanding.
    fn request_timeout(&self) -> Duration;

    /// Sets the request timeout, from now on.
    fn set_request_timeout(&mut self, timeout: Duration);

    /// Whether a request was sent and not answered that must not run twice.
    fn has_unanswered_recorded(&self) -> bool;

    /// The id of the outstanding request with this tag.
    fn find(&self, tag: u64) -> Option<RequestId>;

    /// Keeps what is outstanding when the connection ends for [`ClientCore::take_lost`], rather than to have
    /// [`ClientTransport::receive`] return it as over; and what a server has not executed because it is
    /// shutting down.
    fn keep_lost(&mut self);

    /// What was outstanding when the connection ended: after the [`ClientTransport::receive`] that has found
    /// that out.
    fn take_lost(&mut self) -> Vec<Lost>;

    /// Takes out a request whose data has arrived damaged, and that is to be sent again.
    fn take_damaged(&mut self) -> Option<Damaged>;

    /// Puts it back: there was no credit.
    fn put_back_damaged(&mut self, damaged: Damaged);

    /// The data of this request, which has been sent again, has arrived damaged so often before.
    fn set_damaged(&mut self, id: RequestId, times: u8);

    /// Goes on with the ids of the channel's earlier connections. For a connection that has sent nothing.
    fn set_used_ids(&mut self, used: &UsedIds);

    /// Adds those that this connection has used.
    fn add_used_ids(&self, used: &mut UsedIds);

    /// Queues a ping at `now`; something must be received within `timeout`.
    fn ping(&mut self, now: Instant, timeout: Duration);

    /// See [`ClientTransport::send_one_way`].
    fn send_one_way(&mut self, message: OneWay<'_>) -> Result<(), NotPushed>;

    /// See [`ClientTransport::release`].
    fn release(&mut self);

    /// See [`ClientTransport::refuse`].
    fn refuse(&mut self);

    /// See [`ClientTransport::answer`].
    fn answer(&mut self, request: u64, status: Status, result: u64, body: &[u8]);

    /// See [`ClientTransport::next_event`].
    fn next_event(&mut self) -> Option<ClientEvent>;
}

/// The client's side of a transport: one connection, in one thread at a time. Nothing here blocks but
/// [`ClientTransport::wait`].
pub trait ClientTransport: Send {
    /// The part that is the same over every transport.
    fn core(&self) -> &dyn ClientCore;

    /// The same, to be changed.
    fn core_mut(&mut self) -> &mut dyn ClientCore;

    /// Queues a request; [`ClientTransport::flush`] sends it. Fails when no credit is left or the connection
    /// has ended. The data of `bulk` must not exceed the grant, and neither may `options`.
    fn send(&mut self, tag: u64, body: &[u8], bulk: Bulk, options: SendOptions)
    -> Result<RequestId, NotSent>;

    /// Sends requests again whose data has arrived damaged, as far as there are credits. A transport does so
    /// as it receives.
    #[cold]
    fn send_damaged_again(&mut self) {
        while let Some(Damaged { lost, times }) = self.core_mut().take_damaged() {
            let Lost { tag, id, command, bulk, options, was_sent } = lost;
            match self.send(tag, &command, bulk, options) {
                Ok(id) => self.core_mut().set_damaged(id, times),
                Err(NotSent(bulk)) => {
                    let lost = Lost { tag, id, command, bulk, options, was_sent };
                    self.core_mut().put_back_damaged(Damaged { lost, times });
                    break;
                }
            }
        }
        self.flush();
    }

    /// Takes back a request of which no byte has been sent. Returns its buffers.
    fn dequeue(&mut self, request: RequestId) -> Option<Bulk>;

    /// Takes away the buffers of the request with this tag, which goes on with others: with a copy of what it
    /// writes, and with room for what it reads. None if they are in use, by the network or by a response that
    /// is being received.
    fn detach(&mut self, tag: u64) -> Option<Bulk> {
        let _ = tag;
        None
    }

    /// Sends what is queued, as far as the peer takes it.
    fn flush(&mut self);

    /// Takes in what has arrived, and appends what is over to `replies`. Returns whether anything arrived.
    /// When the connection ends, every outstanding request is over, each once; [`ClientTransport::failure`]
    /// says why.
    fn receive(&mut self, replies: &mut Vec<Reply>) -> bool;

    /// Sleeps until there may be something to receive, what is queued can be sent, or `deadline` has come. A
    /// signal ends it early with an error whose errno is EINTR.
    fn wait(&mut self, deadline: Option<Instant>) -> Result<(), Error>;

    /// The kernel object to poll, and whether also for writing. From now on [`ClientTransport::receive`]
    /// leaves it such that it is readable when there is more.
    fn poll_fd(&mut self) -> (BorrowedFd<'_>, bool);

    /// Lets the network reach a region of the caller's, so that data need not be copied on its way from or to
    /// it. Where the kernel moves the data there is nothing to be done.
    fn register_region(&mut self, region: &Region) -> Result<(), Error> {
        let _ = region;
        Ok(())
    }

    /// Undoes it. No buffer of the region may be in flight.
    fn unregister_region(&mut self, region: &Region) {
        let _ = region;
    }

    /// The same for an arena whose slots are read into. It stays registered until the connection is dropped.
    fn register_arena(&mut self, arena: &ArenaMemory) -> Result<(), Error> {
        let _ = arena;
        Ok(())
    }

    /// The local port of the connection, by which the server knows it, too (see [`crate::trace`]). None where
    /// it has no such port, or that is not known.
    fn local_port(&self) -> Option<u16> {
        None
    }

    /// Ends the connection now: all that is outstanding is over with this status at the next
    /// [`ClientTransport::receive`].
    fn abort(&mut self, violation: Violation);

    /// Tells the server, if that is possible, that the client has left the connection's channel for good, so
    /// that it need not keep it. Nothing may be unanswered of which the client would ask what became of it.
    /// The connection is to be dropped next. One that is dropped without this leaves its channel to be
    /// resumed.
    fn send_goaway(&mut self) {}

    /// What the server granted.
    fn grant(&self) -> &Grant {
        self.core().grant()
    }

    /// Requests outstanding, sent or queued.
    fn outstanding(&self) -> usize {
        self.core().outstanding()
    }

    /// Credits left for ordinary requests.
    fn credits(&self) -> usize {
        self.core().credits()
    }

    /// Why the connection ended, if it has.
    fn failure(&self) -> Option<&Error> {
        self.core().failure()
    }

    /// When the server was last heard.
    fn last_rx(&self) -> Instant {
        self.core().last_rx()
    }

    /// How the server's clock stands to this side's: see [`ClientCore::clock_sample`].
    fn clock_sample(&self) -> Option<ClockSample> {
        self.core().clock_sample()
    }

    /// What was counted.
    fn counters(&self) -> ClientCounters {
        self.core().counters()
    }

    /// How long the server may be silent while something is outstanding before the connection ends with
    /// ETIMEDOUT. It is pinged in between, so a server that lives but works long on a request is not silent.
    /// Default: three times the keepalive granted.
    fn request_timeout(&self) -> Duration {
        self.core().request_timeout()
    }

    /// Sets the request timeout, from now on.
    fn set_request_timeout(&mut self, timeout: Duration) {
        self.core_mut().set_request_timeout(timeout);
    }

    /// Queues a one-way message; [`ClientTransport::flush`] sends it.
    ///
    /// # Panics
    /// If it is too long.
    fn send_one_way(&mut self, message: OneWay<'_>) -> Result<(), NotPushed> {
        self.core_mut().send_one_way(message)
    }

    /// Is done with the oldest one-way message that was handed out and not released. A receipt, if one is
    /// due, leaves with the next [`ClientTransport::flush`].
    ///
    /// # Panics
    /// If there is none.
    fn release(&mut self) {
        self.core_mut().release();
    }

    /// Takes no more one-way messages, for the life of the connection: those under way are dropped.
    fn refuse(&mut self) {
        self.core_mut().refuse();
    }

    /// Answers a request of the server's, with a status, a result and a body of at most
    /// [`crate::message::BODY_BYTES_MAX`] bytes; [`ClientTransport::flush`] sends it.
    ///
    /// # Panics
    /// If it was answered before, or the body is too long.
    fn answer(&mut self, request: u64, status: Status, result: u64, body: &[u8]) {
        self.core_mut().answer(request, status, result, body);
    }

    /// The next unsolicited message of the server, or receipt, after [`ClientTransport::receive`]. Take
    /// it until there is none. What had come before the connection ended can be taken afterwards.
    fn next_event(&mut self) -> Option<ClientEvent> {
        self.core_mut().next_event()
    }

    /// Asks the server whether it is there. Any sign of life within `timeout` is an answer; silence ends the
    /// connection when [`ClientTransport::receive`] or [`ClientTransport::wait`] is next called after it.
    fn ping(&mut self, timeout: Duration) {
        self.core_mut().ping(Instant::now(), timeout);
        self.flush();
    }
}

/// An outstanding request as the client's transport knows it; also its id on the wire. It has 32 bits, for
/// RDMA's immediate data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(pub u64);

impl RequestId {
    /// Its slot among the outstanding requests.
    #[inline]
    pub(crate) fn slot(self) -> usize {
        usize::from(self.0 as u16)
    }
}
