//! The handshake: what a client offers, what a server grants. The same for every transport; each carries the
//! bytes its way.
//!
//! The client speaks first. The server answers with a grant, or a rejection with an error message, and every
//! option that it does not know with "unsupported": an old peer and a new one always find out what they have
//! in common.

use std::cell::OnceCell;
use std::sync::Arc;
use std::time::Duration;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::credentials::Credentials;
use crate::error::{Class, Error, Status, Violation};
use crate::keys::{PublicKey, bind_id};
use crate::message::{
    self, ChannelOption, FEATURE_CRC, FEATURE_CRC_STREAM, FEATURE_PONG_TIME, FEATURE_REQUEST_CRC,
    HandshakeOption, Hello, Limits, MAGIC, OPERATION_FEATURES_MASK, OPTION_CHANNEL, OPTION_NAME, OPTION_PUSH,
    OPTION_QUEUE_PAIR, OPTION_REQUIRED, OPTION_SUPERSEDE, OPTION_TEXT, OPTION_UNSUPPORTED, Parsed,
    PushOption, SessionId, VERSION, Welcome,
};
use crate::random;
use crate::tls::ClientTls;
use crate::trace::Clock;

/// The most sessions that one hello supersedes.
pub const SUPERSEDED_MAX: usize = 8;

/// The shortest and the longest keepalive interval that a client takes from a server.
const KEEPALIVE_MIN: Duration = Duration::from_millis(100);
const KEEPALIVE_MAX: Duration = Duration::from_secs(60);

impl SessionId {
    /// A new session's.
    pub fn random() -> Self {
        Self(random::bytes())
    }
}

/// The channel of a session that a connection belongs to. A broken connection's place in it is taken by the
/// next one, which has a higher epoch; nothing that came by an older one happens from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelOffer {
    /// Which of the session's: 0 for the one that carries control commands alone.
    pub number: u32,
    /// 1 for the first connection; higher with each attempt to connect, whether it succeeds or not.
    pub epoch: u64,
    /// How long the server is to keep the channel when its connection has broken.
    pub linger: Duration,
}

/// How many unsolicited messages each side may send: see [`crate::push`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PushWindows {
    /// One-way messages to the server that it has not released.
    pub to_server: u16,
    /// One-way messages to the client that it has not released.
    pub to_client: u16,
    /// Requests of the server that the client has not answered.
    pub requests: u16,
}

impl PushWindows {
    /// None of it.
    pub const NONE: Self = Self { to_server: 0, to_client: 0, requests: 0 };

    /// The most messages that this makes for either side to take in. Each one-way message of the other
    /// direction may have a receipt.
    pub fn messages(&self) -> usize {
        usize::from(self.to_server) + usize::from(self.to_client) + usize::from(self.requests)
    }

    /// What both allow.
    fn min(self, other: Self) -> Self {
        Self {
            to_server: self.to_server.min(other.to_server),
            to_client: self.to_client.min(other.to_client),
            requests: self.requests.min(other.requests),
        }
    }
}

impl PushOption {
    fn new(windows: PushWindows) -> Self {
        let PushWindows { to_server, to_client, requests } = windows;
        let reserved = U16::ZERO;
        Self { to_server: to_server.into(), to_client: to_client.into(), requests: requests.into(), reserved }
    }

    fn decode(value: &[u8]) -> Result<PushWindows, Violation> {
        let this = Self::read_from_bytes(value).map_err(|_| Violation::Length)?;
        if this.reserved.get() != 0 {
            return Err(Violation::Reserved);
        }
        let (to_server, to_client) = (this.to_server.get(), this.to_client.get());
        Ok(PushWindows { to_server, to_client, requests: this.requests.get() })
    }
}

/// What a client offers.
#[derive(Clone, Debug)]
pub struct Offer {
    /// The session; [`SessionId::random`] for a new one.
    pub session: SessionId,
    /// The channel of the session; None for a connection that cannot be resumed.
    pub channel: Option<ChannelOffer>,
    /// Sessions of the same client that it has given up, at most [`SUPERSEDED_MAX`]: the server ends them
    /// before a request of this connection runs.
    pub supersedes: Vec<SessionId>,
    /// Feature bits that the client asks for.
    pub features: u64,
    /// Connecting fails if the server does not grant [`FEATURE_CRC`].
    pub requires_crc: bool,
    /// Requests it would like to have outstanding; 0 for what the server grants.
    pub queue_depth: u32,
    /// It promises to send something this often; zero: no promise.
    pub keepalive: Duration,
    /// A name for the server's log, at most 256 bytes.
    pub name: String,
    /// It could move from this stream to a queue pair.
    pub queue_pair: bool,
    /// The unsolicited messages that it would send, and that it takes. It also connects to servers that grant
    /// none.
    pub push: PushWindows,
    /// How the connection is secured; None: it is not. Only over TCP.
    pub tls: Option<ClientTls>,
}

/// What a server is ready to grant.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The server's incarnation.
    pub server: [u8; 16],
    /// Feature bits it has.
    pub features: u64,
    /// The most outstanding requests on a connection (1 to 65,534).
    pub queue_depth: u32,
    /// The most data of a request.
    pub data_bytes_max: u32,
    /// The largest inline write on a transport that could fetch it.
    pub inline_bytes_max: u32,
    /// How long a peer may be silent while it owes an answer.
    pub keepalive: Duration,
    /// A peer that has not finished its handshake by then is closed.
    pub handshake_timeout: Duration,
    /// While others wait for memory, a peer that makes no progress for so long on a message it has begun, or
    /// on taking its responses, is closed: [`crate::transport::ServerTransport::close_stalled`].
    pub stall_timeout: Duration,
    /// On TCP, a peer from which nothing comes for so long, while something that was sent to it is
    /// outstanding and is sent again in vain, is taken to be unreachable.
    pub unreachable_timeout: Duration,
    /// The longest that a channel whose connection has broken is kept.
    pub linger: Duration,
    /// The server's name.
    pub name: String,
    /// Clients of this transport, a stream, may move to queue pairs.
    pub queue_pair: bool,
    /// The most unsolicited messages, on a connection whose client offers them.
    pub push: PushWindows,
    /// What the times in pongs are read from.
    pub clock: Clock,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            server: random::bytes(),
            features: FEATURE_CRC | FEATURE_PONG_TIME | FEATURE_REQUEST_CRC | FEATURE_CRC_STREAM,
            queue_depth: 128,
            data_bytes_max: 1 << 20,
            // With the room for any message, an RDMA receive so holds four writes of 4 KiB.
            inline_bytes_max: 13 << 10,
            keepalive: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(2),
            unreachable_timeout: Duration::from_secs(30),
            linger: Duration::from_secs(90),
            name: "raio".into(),
            queue_pair: false,
            push: PushWindows::NONE,
            clock: Clock::new(),
        }
    }
}

/// What was granted: the same on both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The protocol version.
    pub version: u16,
    /// Feature bits.
    pub features: u64,
    /// The server's incarnation.
    pub server: [u8; 16],
    /// The most outstanding requests, one for control messages not counted.
    pub queue_depth: u32,
    /// The most data of a request.
    pub data_bytes_max: u32,
    /// The largest inline write on a transport that could fetch it.
    pub inline_bytes_max: u32,
    /// How long a peer may be silent while it owes an answer.
    pub keepalive: Duration,
    /// The connection may move from this stream to a queue pair.
    pub queue_pair: bool,
    /// How long the channel is kept when the connection has broken; zero without a channel.
    pub linger: Duration,
    /// How many unsolicited messages may be sent.
    pub push: PushWindows,
}

impl Grant {
    /// Credits that the connection starts with: the queue depth, and one for control messages.
    pub fn credits(&self) -> u32 {
        self.queue_depth + 1
    }

    /// The most messages that the peer has sent, be it the client or the server, and that have not been taken
    /// in. Control messages are not among them.
    pub fn messages_max(&self) -> usize {
        self.credits() as usize + self.push.messages()
    }

    /// Whether all messages have checksums.
    pub fn crc(&self) -> bool {
        self.features & FEATURE_CRC != 0
    }

    /// Whether a request can have checksums: of its own, or because all messages have.
    pub fn request_crc(&self) -> bool {
        self.features & (FEATURE_CRC | FEATURE_REQUEST_CRC) != 0
    }

    /// The same after the move from a stream to a queue pair.
    pub fn on_queue_pair(mut self) -> Self {
        if self.features & FEATURE_CRC_STREAM != 0 {
            self.features &= !FEATURE_CRC;
        }
        self
    }

    /// Whether the server's pongs have its time.
    pub fn pong_time(&self) -> bool {
        self.features & FEATURE_PONG_TIME != 0
    }

    /// What the server may send under this grant. The pongs of a client have no time.
    pub fn limits(&self) -> Limits {
        Limits {
            crc: self.crc(),
            request_crc: self.features & FEATURE_REQUEST_CRC != 0,
            data_bytes_max: self.data_bytes_max,
            pong_time: self.pong_time(),
        }
    }
}

/// Who a client is, as far as its connection has proven it. What it may do depends on this, and not on what
/// it calls itself ([`Peer::name`]) or where it seems to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// It has proven nothing: anybody who reaches the server.
    Anonymous,
    /// It has this key.
    Key(PublicKey),
    /// It is a process of this machine.
    User(Arc<Credentials>),
}

/// A client as the server knows it after its hello.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its session.
    pub session: SessionId,
    /// Its channel of the session, if it has one.
    pub channel: Option<ChannelOffer>,
    /// Sessions that it had, and has given up.
    pub supersedes: Vec<SessionId>,
    /// Who it is, as far as that is proven: not by the hello, but by what carries it.
    pub identity: Identity,
    /// Its name for the log; from the peer, so not to be trusted.
    pub name: String,
    /// It promised to send something this often; zero: no promise.
    pub keepalive: Duration,
    /// What it was granted.
    pub grant: Grant,
}

impl ChannelOption {
    fn new(channel: &ChannelOffer) -> Self {
        Self {
            number: U32::new(channel.number),
            linger_ms: U32::new(channel.linger.as_millis().try_into().unwrap_or(u32::MAX)),
        }
    }
}

impl Peer {
    /// The same, known for who it is. Sessions are those of a key or of a user: of another one's it can name
    /// none.
    pub(crate) fn known_as(mut self, identity: &Identity) -> Self {
        let bind = |id: &mut SessionId| match identity {
            Identity::Anonymous => {}
            Identity::Key(key) => id.0 = bind_id(key.as_bytes(), &id.0),
            Identity::User(user) => id.0 = bind_id(&user.uid.to_ne_bytes(), &id.0),
        };
        bind(&mut self.session);
        self.supersedes.iter_mut().for_each(bind);
        Self { identity: identity.clone(), ..self }
    }

    /// Whether its connection carries control commands alone: the server need not distribute it among its
    /// threads.
    pub fn is_control(&self) -> bool {
        self.channel.is_some_and(|channel| channel.number == 0)
    }

    /// Whether there may be requests of earlier connections that must be over before one of this connection
    /// runs. Its first command is then an outcome, whose answer says that they are.
    pub fn begins_with_outcome(&self) -> bool {
        self.channel.is_some_and(|channel| channel.epoch > 1) || !self.supersedes.is_empty()
    }
}

impl Policy {
    /// Reads a client's hello at the front of `bytes`. Returns the client and the welcome to send, and the
    /// number of bytes read; or the violation, for which [`Policy::rejection`] makes the answer.
    pub fn welcome(&self, bytes: &[u8]) -> Result<Parsed<(Peer, Vec<u8>)>, Violation> {
        self.welcome_on(bytes, self.queue_pair)
    }

    /// The same for a stream that may become a queue pair, or may not.
    pub(crate) fn welcome_on(
        &self,
        bytes: &[u8],
        has_queue_pairs: bool,
    ) -> Result<Parsed<(Peer, Vec<u8>)>, Violation> {
        let (hello, options, taken) = match message::parse_handshake::<Hello>(bytes)? {
            Parsed::Need(n) => return Ok(Parsed::Need(n)),
            Parsed::Item((hello, options), taken) => (hello, options, taken),
        };
        let (min, max) = (hello.version_min.get(), hello.version_max.get());
        if min > max {
            return Err(Violation::Field);
        }
        if !(min..=max).contains(&VERSION) {
            return Err(Violation::Version { min, max, ours: VERSION });
        }
        let mut name = None;
        let mut queue_pair = false;
        let mut channel = None;
        let mut supersedes = None;
        let mut push = None;
        let channel_granted = OnceCell::new();
        let push_granted = OnceCell::new();
        let mut answers = Vec::new();
        for option in message::parse_options(options) {
            let option = option?;
            if option.kind == OPTION_NAME {
                let text = message::text(option.value);
                if name.replace(text).is_some() {
                    // Each answer is longer than the question: many would not fit into a welcome.
                    return Err(Violation::Field);
                }
                answers.push(HandshakeOption { kind: OPTION_NAME, flags: 0, value: self.name.as_bytes() });
            } else if option.kind == OPTION_QUEUE_PAIR && has_queue_pairs {
                if !option.value.is_empty() || std::mem::replace(&mut queue_pair, true) {
                    return Err(Violation::Field);
                }
                answers.push(HandshakeOption { kind: OPTION_QUEUE_PAIR, flags: 0, value: &[] });
            } else if option.kind == OPTION_CHANNEL {
                let value = ChannelOption::read_from_bytes(option.value).map_err(|_| Violation::Length)?;
                let epoch = hello.epoch.get();
                if epoch == 0 {
                    return Err(Violation::Field);
                }
                let linger = Duration::from_millis(value.linger_ms.get().into()).min(self.linger);
                let offered = ChannelOffer { number: value.number.get(), epoch, linger };
                if channel.replace(offered).is_some() {
                    return Err(Violation::Field);
                }
                let granted = channel_granted.get_or_init(|| ChannelOption::new(&offered));
                let value = granted.as_bytes();
                answers.push(HandshakeOption { kind: OPTION_CHANNEL, flags: 0, value });
            } else if option.kind == OPTION_SUPERSEDE {
                let ids = <[SessionId]>::ref_from_bytes(option.value).map_err(|_| Violation::Length)?;
                if !(1..=SUPERSEDED_MAX).contains(&ids.len()) || supersedes.replace(ids.to_vec()).is_some() {
                    return Err(Violation::Field);
                }
                answers.push(HandshakeOption { kind: OPTION_SUPERSEDE, flags: 0, value: &[] });
            } else if option.kind == OPTION_PUSH {
                let granted = PushOption::decode(option.value)?.min(self.push);
                if push.replace(granted).is_some() {
                    return Err(Violation::Field);
                }
                let value = push_granted.get_or_init(|| PushOption::new(granted)).as_bytes();
                answers.push(HandshakeOption { kind: OPTION_PUSH, flags: 0, value });
            } else if option.flags & OPTION_REQUIRED != 0 {
                return Err(Violation::RequiredOption(option.kind));
            } else {
                answers.push(HandshakeOption { kind: option.kind, flags: OPTION_UNSUPPORTED, value: &[] });
            }
        }
        let wanted = hello.queue_depth.get();
        let grant = Grant {
            version: VERSION,
            features: self.features & hello.features.get(),
            server: self.server,
            queue_depth: if wanted == 0 { self.queue_depth } else { wanted.min(self.queue_depth) },
            data_bytes_max: self.data_bytes_max,
            inline_bytes_max: self.inline_bytes_max,
            keepalive: self.keepalive,
            queue_pair,
            linger: channel.map_or(Duration::ZERO, |channel| channel.linger),
            push: push.unwrap_or_default(),
        };
        let welcome = Welcome {
            magic: MAGIC,
            version: U16::new(VERSION),
            errno: U16::ZERO,
            options_len: U32::ZERO,
            features: U64::new(grant.features),
            server: self.server,
            queue_depth: U32::new(grant.queue_depth),
            data_bytes_max: U32::new(grant.data_bytes_max),
            inline_bytes_max: U32::new(grant.inline_bytes_max),
            keepalive_ms: U32::new(grant.keepalive.as_millis() as u32),
            crc: U32::ZERO,
            reserved: U32::ZERO,
        };
        let peer = Peer {
            session: hello.session,
            channel,
            supersedes: supersedes.unwrap_or_default(),
            identity: Identity::Anonymous,
            name: name.unwrap_or_default(),
            keepalive: Duration::from_millis(hello.keepalive_ms.get().into()),
            grant,
        };
        Ok(Parsed::Item((peer, message::encode_handshake(welcome, &answers)), taken))
    }

    /// The answer to a client that is rejected.
    pub fn rejection(&self, errno: i32, text: &str) -> Vec<u8> {
        let welcome = Welcome {
            magic: MAGIC,
            version: U16::ZERO,
            errno: U16::new(errno as u16),
            options_len: U32::ZERO,
            features: U64::ZERO,
            server: self.server,
            queue_depth: U32::ZERO,
            data_bytes_max: U32::ZERO,
            inline_bytes_max: U32::ZERO,
            keepalive_ms: U32::ZERO,
            crc: U32::ZERO,
            reserved: U32::ZERO,
        };
        let text = message::clipped(text).as_bytes();
        message::encode_handshake(welcome, &[HandshakeOption { kind: OPTION_TEXT, flags: 0, value: text }])
    }
}

impl Offer {
    /// An offer for a new session that asks for nothing in particular.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            session: SessionId::random(),
            channel: None,
            supersedes: Vec::new(),
            features: 0,
            requires_crc: false,
            queue_depth: 0,
            keepalive: Duration::ZERO,
            name: name.into(),
            queue_pair: false,
            push: PushWindows::NONE,
            tls: None,
        }
    }

    /// The hello to send.
    pub fn hello(&self) -> Vec<u8> {
        let hello = Hello {
            magic: MAGIC,
            version_min: U16::new(VERSION),
            version_max: U16::new(VERSION),
            options_len: U32::ZERO,
            features: U64::new(self.features),
            session: self.session,
            epoch: U64::new(self.channel.map_or(0, |channel| channel.epoch)),
            queue_depth: U32::new(self.queue_depth),
            keepalive_ms: U32::new(self.keepalive.as_millis() as u32),
            crc: U32::ZERO,
            reserved: U32::ZERO,
        };
        let name = message::clipped(&self.name).as_bytes();
        let mut options = vec![HandshakeOption { kind: OPTION_NAME, flags: 0, value: name }];
        if self.queue_pair {
            options.push(HandshakeOption { kind: OPTION_QUEUE_PAIR, flags: 0, value: &[] });
        }
        // A server without channels could not keep what these promise.
        let flags = OPTION_REQUIRED;
        let channel = self.channel.as_ref().map(ChannelOption::new);
        if let Some(channel) = &channel {
            options.push(HandshakeOption { kind: OPTION_CHANNEL, flags, value: channel.as_bytes() });
        }
        if !self.supersedes.is_empty() {
            let value = self.supersedes.as_bytes();
            options.push(HandshakeOption { kind: OPTION_SUPERSEDE, flags, value });
        }
        let push = PushOption::new(self.push);
        if self.push != PushWindows::NONE {
            options.push(HandshakeOption { kind: OPTION_PUSH, flags: 0, value: push.as_bytes() });
        }
        message::encode_handshake(hello, &options)
    }

    /// Reads the server's welcome at the front of `bytes`: the grant, or why there is none.
    pub fn grant(&self, bytes: &[u8]) -> Result<Parsed<Grant>, Error> {
        let (welcome, options, taken) = match message::parse_handshake::<Welcome>(bytes)? {
            Parsed::Need(n) => return Ok(Parsed::Need(n)),
            Parsed::Item((welcome, options), taken) => (welcome, options, taken),
        };
        let mut text = String::new();
        let mut queue_pair = false;
        let mut linger = Duration::ZERO;
        let mut push = PushWindows::NONE;
        for option in message::parse_options(options) {
            let option = option?;
            if option.kind == OPTION_TEXT {
                text = message::text(option.value);
            }
            queue_pair |= option.kind == OPTION_QUEUE_PAIR && option.flags & OPTION_UNSUPPORTED == 0;
            if option.kind == OPTION_CHANNEL {
                let value = ChannelOption::read_from_bytes(option.value).map_err(|_| Violation::Length)?;
                if self.channel.is_some_and(|channel| channel.number != value.number.get()) {
                    return Err(Violation::Field.into());
                }
                linger = Duration::from_millis(value.linger_ms.get().into());
            }
            if option.kind == OPTION_PUSH && option.flags & OPTION_UNSUPPORTED == 0 {
                push = PushOption::decode(option.value)?;
            }
        }
        let errno = i32::from(welcome.errno.get());
        if errno > message::ERRNO_MAX {
            return Err(Violation::Field.into());
        }
        if errno != 0 {
            let status = Status { errno, class: Class::Policy, retryable: false };
            return Err(Error::Rejected { status, text });
        }
        let features = welcome.features.get();
        let grant = Grant {
            version: welcome.version.get(),
            // Operations that were not asked for mean nothing to this side.
            features: features & self.features,
            server: welcome.server,
            queue_depth: welcome.queue_depth.get(),
            data_bytes_max: welcome.data_bytes_max.get(),
            inline_bytes_max: welcome.inline_bytes_max.get(),
            keepalive: Duration::from_millis(welcome.keepalive_ms.get().into())
                .clamp(KEEPALIVE_MIN, KEEPALIVE_MAX),
            queue_pair,
            linger,
            push,
        };
        let depth_max = if self.queue_depth == 0 { u32::from(u16::MAX) - 1 } else { self.queue_depth };
        if grant.version != VERSION
            // They change what is said.
            || features & !OPERATION_FEATURES_MASK & !self.features != 0
            || grant.queue_pair && !self.queue_pair
            || grant.linger > self.channel.map_or(Duration::ZERO, |channel| channel.linger)
            || push != push.min(self.push)
            || grant.queue_depth == 0
            || grant.queue_depth > depth_max
            || grant.data_bytes_max < 4096
            || welcome.keepalive_ms.get() == 0
        {
            return Err(Violation::Field.into());
        }
        if self.requires_crc && !grant.crc() {
            return Err(Error::Unsupported(
                "The server does not offer checksums (CRC32C). Connect without them, or allow them on the \
                 server."
                    .into(),
            ));
        }
        Ok(Parsed::Item(grant, taken))
    }
}

#[cfg(test)]
mod tests;
