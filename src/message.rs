//! Framing: what every message carries, whatever it means.
//!
//! Every message is a 40-byte [`Header`], a body of `body_len` bytes (a multiple of 8), and on a stream
//! `data_len` bytes of bulk data. All integers are little-endian, reserved bits are zero and checked. A
//! message can be parsed with no knowledge of what is outstanding. The handshake ([`Hello`], [`Welcome`])
//! comes before the first message and has layouts of its own, which never change. docs/PROTOCOL.md shows
//! every byte.
//!
//! Nothing here does I/O or allocates in proportion to what a peer says.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Class, Status, Violation};

/// The first bytes of each side of a connection.
pub const MAGIC: [u8; 8] = *b"raio\r\n\x1a\n";
/// The protocol version that this code speaks.
pub const VERSION: u16 = 2;

/// Length of [`Header`].
pub const HEADER_BYTES: usize = 40;
/// The longest body: the fixed part of an open and a path of PATH_MAX, rounded up.
pub const BODY_BYTES_MAX: usize = 4_224;
/// The longest handshake, options included.
pub const HANDSHAKE_BYTES_MAX: usize = 4_096;
/// Length of the fixed part of [`Hello`] and [`Welcome`].
pub const HANDSHAKE_BYTES: usize = 64;

/// Feature bit: CRC32C over headers, bodies and data.
pub const FEATURE_CRC: u64 = 1 << 0;
/// Feature bit: the server's pongs have its time, for the trace of a client (see [`crate::trace`]).
pub const FEATURE_PONG_TIME: u64 = 1 << 1;
/// Feature bit: a request may have checksums, and has its response have them, on a connection whose messages
/// have none ([`RequestHeader::has_crc`]).
pub const FEATURE_REQUEST_CRC: u64 = 1 << 2;
/// Feature bit: [`FEATURE_CRC`] is for a stream alone. A connection that moves to a queue pair has no
/// checksums there: the network has its own.
pub const FEATURE_CRC_STREAM: u64 = 1 << 3;
/// The feature bits that are not about messages, but about what they carry: each stands for a group of
/// operations ([`crate::protocol::OperationGroup`]).
pub const OPERATION_FEATURES_MASK: u64 = 0xffff_ffff << 32;

/// Rounds a body length up to what the wire wants.
pub const fn padded(len: usize) -> usize {
    len.next_multiple_of(8)
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Client to server: a command. Server to client, if the client consents: a question without data.
    Request = 1,
    /// The other way: the answer to it.
    Response = 2,
    /// Either way: answer with a pong of the same id.
    Ping = 3,
    /// Either way: the answer to a ping.
    Pong = 4,
    /// Either way: this connection ends now; the status and the text in the body say why.
    Goaway = 5,
    /// Either way, over a stream: the sender's end of a queue pair that the connection is to move to.
    QueuePair = 6,
    /// Either way: a message that is not answered.
    OneWay = 7,
    /// Either way: how many one-way messages the sender has released.
    Receipt = 8,
}

/// The header of every message. Which of the fields in the middle mean something depends on the kind:
/// [`RequestHeader`] and [`ResponseHeader`] are the typed views.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    kind: u8,
    flags: u8,
    body_len: U16,
    data_len: U32,
    id: U64,
    /// Request: address of the client's region. Response: errno u16, class u8, 0 u8, credits u16, 0 u16.
    middle: [u8; 8],
    /// Request: region key u32, region length u32. Response: result u64. Pong: time u64. One-way message: its
    /// length without padding u32, 0 u32.
    tail: [u8; 8],
    data_crc: U32,
    header_crc: U32,
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

const FLAG_REGION_IN: u8 = 1 << 0;
const FLAG_REGION_OUT: u8 = 1 << 1;
const FLAG_RETRYABLE: u8 = 1 << 0;
/// Of a one-way message: its sender wants to know at once when it is released.
const FLAG_WANTS_RECEIPT: u8 = 1 << 0;
/// Of a receipt: its sender takes no more one-way messages.
const FLAG_LAST: u8 = 1 << 0;
/// Of a request or a response: it has checksums, though its connection has none.
const FLAG_CRC: u8 = 1 << 7;

/// The client memory that a request exposes to the server, and which way data flows. On a stream there is
/// no address: `In` then says how much data the response may bring, and `Out` does not occur (data follows
/// the request).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemoteRegion {
    /// None.
    None,
    /// The server may place up to `len` bytes.
    In {
        /// Address in the client's memory; 0 on a stream.
        address: u64,
        /// The remote key; 0 on a stream.
        key: u32,
        /// How many bytes.
        len: u32,
    },
    /// The server may fetch `len` bytes.
    Out {
        /// Address in the client's memory.
        address: u64,
        /// The remote key.
        key: u32,
        /// How many bytes.
        len: u32,
    },
}

/// The header of a request, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// Chosen by the client, unique among its outstanding requests on this connection.
    pub id: u64,
    /// Length of the command.
    pub body_len: u16,
    /// Bytes of data that follow inline.
    pub data_len: u32,
    /// The client's memory.
    pub region: RemoteRegion,
    /// It has checksums, and its response is to have them, on a connection without
    /// ([`FEATURE_REQUEST_CRC`]).
    pub has_crc: bool,
    /// CRC32C of the data, with checksums.
    pub data_crc: u32,
}

/// The header of a response, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponseHeader {
    /// Of the request.
    pub id: u64,
    /// Length of the body.
    pub body_len: u16,
    /// Bytes of bulk data: on a stream they follow, otherwise they have been placed.
    pub data_len: u32,
    /// How it went.
    pub status: Status,
    /// Credits given back: how many more requests the client may send.
    pub credits: u16,
    /// The command's result: a count, a handle.
    pub result: u64,
    /// It has checksums, as its request had them, on a connection without.
    pub has_crc: bool,
    /// CRC32C of the data, with checksums.
    pub data_crc: u32,
}

/// What a receipt says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// How many one-way messages its sender has released since the connection began.
    pub released: u64,
    /// Its sender takes no more: those under way are dropped, and the peer may send no others.
    pub is_last: bool,
}

/// One message, its body still in the buffer it was parsed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// A command.
    Request(RequestHeader, &'a [u8]),
    /// An answer.
    Response(ResponseHeader, &'a [u8]),
    /// A question whether the peer is there.
    Ping(u64),
    /// The answer to it, and the sender's time ([`encode_pong`]).
    Pong(u64, u64),
    /// The end of the connection, and why.
    Goaway(Status, &'a [u8]),
    /// Where the sender's queue pair is; or from a server that makes none why not, with an error message.
    QueuePair(Result<QueuePairAddress, (Status, &'a [u8])>),
    /// A message that is not answered, without padding, and whether its sender wants a receipt at once.
    OneWay(&'a [u8], bool),
    /// How many of the peer's one-way messages have been released.
    Receipt(Receipt),
}

impl Message<'_> {
    /// What it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Request(..) => Kind::Request,
            Self::Response(..) => Kind::Response,
            Self::Ping(_) => Kind::Ping,
            Self::Pong(..) => Kind::Pong,
            Self::Goaway(..) => Kind::Goaway,
            Self::QueuePair(_) => Kind::QueuePair,
            Self::OneWay(..) => Kind::OneWay,
            Self::Receipt(_) => Kind::Receipt,
        }
    }
}

/// What a port's network is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Link {
    /// InfiniBand: packets are routed by `lid`.
    InfiniBand = 1,
    /// Ethernet (RoCE): packets are routed by `gid`.
    Ethernet = 2,
}

/// One end of a queue pair, as it is told to the other. Every field is within its bounds if it was parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePairAddress {
    /// The port's GID.
    pub gid: [u8; 16],
    /// The queue pair's number, 24 bits.
    pub qpn: u32,
    /// The number of the first packet that this end sends, 24 bits.
    pub psn: u32,
    /// The number of the first packet that the other end sends.
    pub peer_psn: u32,
    /// The most bytes of a packet: 256, 512, 1024, 2048 or 4096.
    pub mtu: u32,
    /// The port's LID on InfiniBand, else 0.
    pub lid: u16,
    /// RDMA READs that this end answers at a time.
    pub reads: u16,
    /// The port's network.
    pub link: Link,
}

/// The body of [`Kind::QueuePair`].
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct QueuePairBody {
    gid: [u8; 16],
    qpn: U32,
    psn: U32,
    peer_psn: U32,
    mtu: U32,
    lid: U16,
    reads: U16,
    link: U16,
    reserved: U16,
}

const _: () = assert!(size_of::<QueuePairBody>() == 40);

impl QueuePairAddress {
    fn encode(&self) -> QueuePairBody {
        QueuePairBody {
            gid: self.gid,
            qpn: U32::new(self.qpn),
            psn: U32::new(self.psn),
            peer_psn: U32::new(self.peer_psn),
            mtu: U32::new(self.mtu),
            lid: U16::new(self.lid),
            reads: U16::new(self.reads),
            link: U16::new(self.link as u16),
            reserved: U16::ZERO,
        }
    }

    fn decode(body: &[u8]) -> Result<Self, Violation> {
        let body = QueuePairBody::ref_from_bytes(body).map_err(|_| Violation::Length)?;
        if body.reserved.get() != 0 {
            return Err(Violation::Reserved);
        }
        let link = match body.link.get() {
            1 => Link::InfiniBand,
            2 => Link::Ethernet,
            _ => return Err(Violation::Field),
        };
        let this = Self {
            gid: body.gid,
            qpn: body.qpn.get(),
            psn: body.psn.get(),
            peer_psn: body.peer_psn.get(),
            mtu: body.mtu.get(),
            lid: body.lid.get(),
            reads: body.reads.get(),
            link,
        };
        // 0 and 1 are InfiniBand's own queue pairs; GIDs that begin with ff are of groups, and so are LIDs
        // from c000.
        let good_lid = match link {
            Link::InfiniBand => (1..0xc000).contains(&this.lid),
            Link::Ethernet => this.lid == 0,
        };
        let good = (2..1 << 24).contains(&this.qpn)
            && this.psn < 1 << 24
            && this.peer_psn < 1 << 24
            && matches!(this.mtu, 256 | 512 | 1024 | 2048 | 4096)
            && this.gid != [0; 16]
            && this.gid[0] != 0xff
            && good_lid;
        if good { Ok(this) } else { Err(Violation::Field) }
    }
}

/// What [`parse`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed<T> {
    /// Not enough bytes yet: at least this many in all are needed.
    Need(usize),
    /// One item, and how many bytes it took. Bulk data is not among them.
    Item(T, usize),
}

/// What a peer may send: follows from what was granted.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Whether all messages have checksums.
    pub crc: bool,
    /// If not, whether requests may.
    pub request_crc: bool,
    /// The most data that one message may bring or ask for.
    pub data_bytes_max: u32,
    /// Whether its pongs may have a time.
    pub pong_time: bool,
}

impl Header {
    fn new(kind: Kind, id: u64, body_len: usize, data_len: u32) -> Self {
        debug_assert!(body_len <= BODY_BYTES_MAX && body_len.is_multiple_of(8));
        Self {
            kind: kind as u8,
            flags: 0,
            body_len: U16::new(body_len as u16),
            data_len: U32::new(data_len),
            id: U64::new(id),
            middle: [0; 8],
            tail: [0; 8],
            data_crc: U32::ZERO,
            header_crc: U32::ZERO,
        }
    }

    fn set_status(&mut self, status: Status) {
        self.middle[..2].copy_from_slice(&(status.errno as u16).to_le_bytes());
        self.middle[2] = status.class as u8;
        self.flags = if status.retryable { FLAG_RETRYABLE } else { 0 };
    }

    /// Whether it has checksums though its connection has none.
    fn has_own_crc(&self) -> bool {
        self.flags & FLAG_CRC != 0
    }

    /// Checks the checksum of a header and its body, and that only data has one of its own.
    #[cold]
    fn check_crc(&self, body: &[u8], limits: &Limits) -> Result<(), Violation> {
        let is_fetched = self.kind == Kind::Request as u8 && self.flags & FLAG_REGION_OUT != 0;
        let has_data = self.data_len.get() > 0 || is_fetched;
        if self.header_crc.get() != self.crc(body) || (!has_data && self.data_crc.get() != 0) {
            return Err(Violation::Checksum);
        }
        // The flag of a message of another kind is rejected with all its other flags.
        let may_have_own = limits.request_crc && !limits.crc;
        if self.has_own_crc() && !may_have_own { Err(Violation::Reserved) } else { Ok(()) }
    }

    /// What [`Header::set_status`] has set; `flags` are those of the message.
    fn status(&self, flags: u8) -> Result<Status, Violation> {
        let errno = i32::from(u16::from_le_bytes([self.middle[0], self.middle[1]]));
        let class = Class::from_wire(self.middle[2]).ok_or(Violation::Field)?;
        if (errno == 0) != (class == Class::None) || errno > ERRNO_MAX {
            return Err(Violation::Field);
        }
        if flags & !FLAG_RETRYABLE != 0 || self.middle[3] != 0 || self.middle[6..] != [0, 0] {
            return Err(Violation::Reserved);
        }
        let retryable = flags & FLAG_RETRYABLE != 0;
        if retryable && errno == 0 {
            return Err(Violation::Field);
        }
        Ok(Status { errno, class, retryable })
    }

    fn crc(&self, body: &[u8]) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c(&self.as_bytes()[..HEADER_BYTES - 4]), body)
    }

    /// Adds the checksums of a message without a body and with this data.
    #[cold]
    fn seal(&mut self, data: &[u8]) {
        self.data_crc = U32::new(data_crc(data));
        self.header_crc = U32::new(self.crc(&[]));
    }

    /// Appends the header and the body, padded, to `out`.
    fn finish(mut self, body: &[u8], crc: bool, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(self.as_bytes());
        out.extend_from_slice(body);
        out.resize(start + HEADER_BYTES + padded(body.len()), 0);
        if crc {
            let sum = self.crc(&out[start + HEADER_BYTES..]);
            self.header_crc = U32::new(sum);
            out[start + HEADER_BYTES - 4..start + HEADER_BYTES].copy_from_slice(&sum.to_le_bytes());
        }
    }
}

impl RequestHeader {
    /// A request with this id that has neither data nor a region, and no checksum of its own.
    pub fn of_command(id: u64) -> Self {
        Self { id, body_len: 0, data_len: 0, region: RemoteRegion::None, has_crc: false, data_crc: 0 }
    }

    /// Appends a request to `out`. `self.body_len` is ignored: the body says it. `crc`: all messages of the
    /// connection have checksums.
    pub fn encode(&self, body: &[u8], crc: bool, out: &mut Vec<u8>) {
        let mut header = Header::new(Kind::Request, self.id, padded(body.len()), self.data_len);
        let (flags, address, key, len) = match self.region {
            RemoteRegion::None => (0, 0, 0, 0),
            RemoteRegion::In { address, key, len } => (FLAG_REGION_IN, address, key, len),
            RemoteRegion::Out { address, key, len } => (FLAG_REGION_OUT, address, key, len),
        };
        header.flags = flags;
        if self.has_crc {
            header.flags |= FLAG_CRC;
        }
        header.middle = address.to_le_bytes();
        header.tail[..4].copy_from_slice(&key.to_le_bytes());
        header.tail[4..].copy_from_slice(&len.to_le_bytes());
        header.data_crc = U32::new(self.data_crc);
        header.finish(body, crc || self.has_crc, out);
    }

    fn decode(header: &Header, limits: &Limits) -> Result<Self, Violation> {
        let address = u64::from_le_bytes(header.middle);
        let [k0, k1, k2, k3, l0, l1, l2, l3] = header.tail;
        let (key, len) = (u32::from_le_bytes([k0, k1, k2, k3]), u32::from_le_bytes([l0, l1, l2, l3]));
        let region = match header.flags & !FLAG_CRC {
            0 if address == 0 && key == 0 && len == 0 => RemoteRegion::None,
            0 => return Err(Violation::Reserved),
            FLAG_REGION_IN => RemoteRegion::In { address, key, len },
            FLAG_REGION_OUT => RemoteRegion::Out { address, key, len },
            _ => return Err(Violation::Reserved),
        };
        let data_len = header.data_len.get();
        if len > limits.data_bytes_max
            || data_len > limits.data_bytes_max
            || (data_len > 0 && matches!(region, RemoteRegion::Out { .. }))
        {
            return Err(Violation::Length);
        }
        Ok(Self {
            id: header.id.get(),
            body_len: header.body_len.get(),
            data_len,
            region,
            has_crc: header.has_own_crc(),
            data_crc: header.data_crc.get(),
        })
    }

    /// How many bytes of data the response may bring.
    pub fn region_in_len(&self) -> u32 {
        match self.region {
            RemoteRegion::In { len, .. } => len,
            _ => 0,
        }
    }

    /// How many bytes of data the server is to take: inline or to be fetched.
    pub fn data_out_len(&self) -> u32 {
        match self.region {
            RemoteRegion::Out { len, .. } => len,
            _ => self.data_len,
        }
    }
}

impl ResponseHeader {
    /// The response to a read that has brought so many bytes; also what immediate data stands for.
    pub(crate) fn of_data(id: u64, len: u32) -> Self {
        Self {
            id,
            body_len: 0,
            data_len: len,
            status: Status::OK,
            credits: 1,
            result: len.into(),
            has_crc: false,
            data_crc: 0,
        }
    }

    /// Appends a response to `out`. `self.body_len` is ignored: the body says it. `crc`: all messages of the
    /// connection have checksums.
    pub fn encode(&self, body: &[u8], crc: bool, out: &mut Vec<u8>) {
        self.header(padded(body.len())).finish(body, crc || self.has_crc, out);
    }

    /// The header of a response with this data and without a body, in wire form.
    pub(crate) fn encode_bare(&self, data: &[u8], crc: bool) -> [u8; HEADER_BYTES] {
        let mut header = self.header(0);
        if crc || self.has_crc {
            header.seal(data);
        }
        zerocopy::transmute!(header)
    }

    fn header(&self, body_len: usize) -> Header {
        let mut header = Header::new(Kind::Response, self.id, body_len, self.data_len);
        header.set_status(self.status);
        if self.has_crc {
            header.flags |= FLAG_CRC;
        }
        header.middle[4..6].copy_from_slice(&self.credits.to_le_bytes());
        header.tail = self.result.to_le_bytes();
        header.data_crc = U32::new(self.data_crc);
        header
    }

    fn decode(header: &Header, limits: &Limits) -> Result<Self, Violation> {
        if header.data_len.get() > limits.data_bytes_max {
            return Err(Violation::Length);
        }
        Ok(Self {
            id: header.id.get(),
            body_len: header.body_len.get(),
            data_len: header.data_len.get(),
            status: header.status(header.flags & !FLAG_CRC)?,
            credits: u16::from_le_bytes([header.middle[4], header.middle[5]]),
            result: u64::from_le_bytes(header.tail),
            has_crc: header.has_own_crc(),
            data_crc: header.data_crc.get(),
        })
    }
}

/// Appends a ping to `out`.
pub fn encode_ping(id: u64, crc: bool, out: &mut Vec<u8>) {
    Header::new(Kind::Ping, id, 0, 0).finish(&[], crc, out);
}

/// The id of a pong that answers no ping: a sign of life of a server that does not get to the client's pings.
pub const UNASKED_PONG: u64 = 0;

/// Appends a pong to `out`. `time_ns`: the sender's time in nanoseconds since the Epoch, or 0.
pub fn encode_pong(id: u64, time_ns: u64, crc: bool, out: &mut Vec<u8>) {
    let mut header = Header::new(Kind::Pong, id, 0, 0);
    header.tail = time_ns.to_le_bytes();
    header.finish(&[], crc, out);
}

/// Appends a goaway to `out`: the status and an error message (cut to 256 bytes).
pub fn encode_goaway(status: Status, text: &str, crc: bool, out: &mut Vec<u8>) {
    let text = clipped(text);
    let mut header = Header::new(Kind::Goaway, 0, padded(text.len()), 0);
    header.set_status(status);
    header.finish(text.as_bytes(), crc, out);
}

/// Appends where a queue pair is, or why there is none: the status and an error message (cut to 256 bytes).
pub fn encode_queue_pair(what: Result<&QueuePairAddress, (Status, &str)>, crc: bool, out: &mut Vec<u8>) {
    let (status, body) = match what {
        Ok(address) => (Status::OK, address.encode().as_bytes().to_vec()),
        Err((status, text)) => (Status { retryable: false, ..status }, clipped(text).as_bytes().to_vec()),
    };
    let mut header = Header::new(Kind::QueuePair, 0, padded(body.len()), 0);
    header.set_status(status);
    header.finish(&body, crc, out);
}

/// Appends a one-way message of at most [`BODY_BYTES_MAX`] bytes to `out`.
pub fn encode_one_way(message: &[u8], wants_receipt: bool, crc: bool, out: &mut Vec<u8>) {
    let mut header = Header::new(Kind::OneWay, 0, padded(message.len()), 0);
    header.flags = if wants_receipt { FLAG_WANTS_RECEIPT } else { 0 };
    header.tail[..4].copy_from_slice(&(message.len() as u32).to_le_bytes());
    header.finish(message, crc, out);
}

/// Appends a receipt to `out`.
pub fn encode_receipt(receipt: Receipt, crc: bool, out: &mut Vec<u8>) {
    let mut header = Header::new(Kind::Receipt, receipt.released, 0, 0);
    header.flags = if receipt.is_last { FLAG_LAST } else { 0 };
    header.finish(&[], crc, out);
}

/// The sentence, cut to the 256 bytes that the wire allows one.
pub fn clipped(text: &str) -> &str {
    let mut end = text.len().min(256);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// A peer's text (an error message in a padded body, a name), fit for a terminal and a log: at most 256
/// bytes, on one line, and a `?` in the place of each control character.
pub fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
    let text = String::from_utf8_lossy(&bytes[..end]);
    clipped(&text).chars().map(|c| if is_printable(c) { c } else { '?' }).collect()
}

/// Whether a character may stand in a line of text: no control character, line break or change of direction.
fn is_printable(c: char) -> bool {
    !c.is_control() && !matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Parses the message at the front of `bytes`.
pub fn parse<'a>(bytes: &'a [u8], limits: &Limits) -> Result<Parsed<Message<'a>>, Violation> {
    let Ok((header, rest)) = Header::ref_from_prefix(bytes) else {
        return Ok(Parsed::Need(HEADER_BYTES));
    };
    let kind = match header.kind {
        1 => Kind::Request,
        2 => Kind::Response,
        3 => Kind::Ping,
        4 => Kind::Pong,
        5 => Kind::Goaway,
        6 => Kind::QueuePair,
        7 => Kind::OneWay,
        8 => Kind::Receipt,
        other => return Err(Violation::Kind(other)),
    };
    let body_len = usize::from(header.body_len.get());
    if body_len > BODY_BYTES_MAX || !body_len.is_multiple_of(8) {
        return Err(Violation::Length);
    }
    if rest.len() < body_len {
        return Ok(Parsed::Need(HEADER_BYTES + body_len));
    }
    let body = &rest[..body_len];
    if limits.crc || header.has_own_crc() {
        header.check_crc(body, limits)?;
    } else if header.header_crc.get() | header.data_crc.get() != 0 {
        return Err(Violation::Reserved);
    }
    let message = match kind {
        Kind::Request => Message::Request(RequestHeader::decode(header, limits)?, body),
        Kind::Response => Message::Response(ResponseHeader::decode(header, limits)?, body),
        Kind::OneWay => decode_one_way(header, body)?,
        Kind::Ping | Kind::Pong | Kind::Goaway | Kind::QueuePair | Kind::Receipt => {
            let has_tail = kind == Kind::Pong && limits.pong_time;
            if header.data_len.get() != 0
                || header.data_crc.get() != 0
                || (header.tail != [0; 8] && !has_tail)
            {
                return Err(Violation::Reserved);
            }
            if matches!(kind, Kind::Goaway | Kind::QueuePair) {
                let status = header.status(header.flags)?;
                if header.middle[4..6] != [0, 0] || header.id.get() != 0 {
                    return Err(Violation::Reserved);
                }
                match kind {
                    Kind::Goaway => Message::Goaway(status, body),
                    _ if header.flags != 0 => return Err(Violation::Reserved),
                    _ if status.is_ok() => Message::QueuePair(Ok(QueuePairAddress::decode(body)?)),
                    _ => Message::QueuePair(Err((status, body))),
                }
            } else if header.middle != [0; 8] || body_len != 0 {
                return Err(Violation::Reserved);
            } else if kind == Kind::Receipt && header.flags & !FLAG_LAST == 0 {
                Message::Receipt(Receipt { released: header.id.get(), is_last: header.flags != 0 })
            } else if header.flags != 0 {
                return Err(Violation::Reserved);
            } else if kind == Kind::Ping {
                Message::Ping(header.id.get())
            } else {
                Message::Pong(header.id.get(), u64::from_le_bytes(header.tail))
            }
        }
    };
    Ok(Parsed::Item(message, HEADER_BYTES + body_len))
}

fn decode_one_way<'a>(header: &Header, body: &'a [u8]) -> Result<Message<'a>, Violation> {
    let [l0, l1, l2, l3, reserved @ ..] = header.tail;
    let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if len > body.len() || padded(len) != body.len() {
        return Err(Violation::Length);
    }
    let (message, padding) = body.split_at(len);
    let others = header.data_len.get() != 0 || header.data_crc.get() != 0 || header.id.get() != 0;
    if others
        || header.middle != [0; 8]
        || reserved != [0; 4]
        || header.flags & !FLAG_WANTS_RECEIPT != 0
        || padding.iter().any(|&byte| byte != 0)
    {
        return Err(Violation::Reserved);
    }
    Ok(Message::OneWay(message, header.flags != 0))
}

/// CRC32C of data that comes in pieces: [`crc_digest`].
pub use crc_fast::Digest as CrcDigest;

/// CRC32C of bulk data.
pub fn data_crc(data: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, data) as u32
}

/// CRC32C of two runs of bytes together, of which these are the CRCs; the second has `len` bytes.
pub fn combined_crc(first: u32, second: u32, len: u64) -> u32 {
    let algorithm = crc_fast::CrcAlgorithm::Crc32Iscsi;
    crc_fast::checksum_combine(algorithm, first.into(), second.into(), len) as u32
}

/// CRC32C of data that comes in pieces, of none yet.
pub fn crc_digest() -> CrcDigest {
    CrcDigest::new(crc_fast::CrcAlgorithm::Crc32Iscsi)
}

/// CRC32C of bulk data that lies in pieces.
pub fn crc_of<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> u32 {
    let mut digest = crc_digest();
    pieces.for_each(|piece| digest.update(piece));
    digest.finalize() as u32
}

/// The largest errno there is in Linux: what lies above would look like an address.
pub const ERRNO_MAX: i32 = 4_095;

/// Names a session. Whoever knows it can join the session, so it is a secret: it has no text form, and Debug
/// leaves it out.
#[derive(Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(transparent)]
pub struct SessionId(pub [u8; 16]);

impl std::fmt::Debug for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SessionId(secret)")
    }
}

/// The client's half of the handshake: fixed part. Options follow, see [`HandshakeOption`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// Oldest version the client speaks.
    pub version_min: U16,
    /// Newest version the client speaks.
    pub version_max: U16,
    /// Length of the options.
    pub options_len: U32,
    /// Feature bits that the client would like.
    pub features: U64,
    /// The session that this connection belongs to: random, secret, chosen by the client for its first
    /// connection.
    pub session: SessionId,
    /// Which connection of its channel ([`OPTION_CHANNEL`]) this is: grows with each attempt to connect.
    pub epoch: U64,
    /// Requests that the client would like to have outstanding; 0 for what the server grants.
    pub queue_depth: U32,
    /// The client will send something at least this often, in ms; 0: it promises nothing.
    pub keepalive_ms: U32,
    /// CRC32C of the whole handshake message, this field taken as zero.
    pub crc: U32,
    /// 0.
    pub reserved: U32,
}

/// The server's half of the handshake: fixed part. Options follow: one answer for each that the client sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Welcome {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// The version chosen; 0 with a rejection.
    pub version: U16,
    /// 0, or the errno of a rejection.
    pub errno: U16,
    /// Length of the options.
    pub options_len: U32,
    /// Feature bits granted: a subset of those asked for.
    pub features: U64,
    /// The server's incarnation: random, new with each start of the server.
    pub server: [u8; 16],
    /// How many requests may be outstanding on this connection, one for control messages not counted.
    pub queue_depth: U32,
    /// The most data of one request.
    pub data_bytes_max: U32,
    /// Writes up to this many bytes may travel inline where the transport could fetch them.
    pub inline_bytes_max: U32,
    /// How long either side may be silent while it owes an answer to a ping, in ms.
    pub keepalive_ms: U32,
    /// CRC32C of the whole handshake message, this field taken as zero.
    pub crc: U32,
    /// 0.
    pub reserved: U32,
}

const _: () = assert!(size_of::<Hello>() == HANDSHAKE_BYTES && size_of::<Welcome>() == HANDSHAKE_BYTES);

/// The header of one option of the handshake. Its value follows, padded with zeros to a multiple of 8.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// What it is.
    pub kind: U16,
    /// [`OPTION_REQUIRED`] from the client, [`OPTION_UNSUPPORTED`] from the server; all other bits 0.
    pub flags: U16,
    /// Length of the value, padding not counted.
    pub len: U32,
}

/// Flag of a client's option: without it the client will not go on.
pub const OPTION_REQUIRED: u16 = 1 << 0;
/// Flag of a server's answer: it does not know this option.
pub const OPTION_UNSUPPORTED: u16 = 1 << 1;
/// Option: a name for logs (UTF-8). The server answers with its own.
pub const OPTION_NAME: u16 = 1;
/// Option: an error message that says why the server rejected (UTF-8).
pub const OPTION_TEXT: u16 = 2;
/// Option without a value: the connection could move from this stream to a queue pair.
pub const OPTION_QUEUE_PAIR: u16 = 3;
/// Option: the channel that this connection belongs to ([`ChannelOption`]).
pub const OPTION_CHANNEL: u16 = 4;
/// Option: sessions that the client had, and has given up ([`SessionId`]s).
pub const OPTION_SUPERSEDE: u16 = 5;
/// Option: how many unsolicited messages either side may send ([`PushOption`]).
pub const OPTION_PUSH: u16 = 6;

/// The value of [`OPTION_PUSH`]: what the client asks for, or what the server grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PushOption {
    /// One-way messages to the server that it has not released.
    pub to_server: U16,
    /// One-way messages to the client that it has not released.
    pub to_client: U16,
    /// Requests of the server that the client has not answered.
    pub requests: U16,
    /// 0.
    pub reserved: U16,
}

/// The value of [`OPTION_CHANNEL`], of both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChannelOption {
    /// Which channel of the session: 0 for the one that carries control commands alone.
    pub number: U32,
    /// How long the server keeps the channel when its connection has broken, in ms: what the client asks for,
    /// or what the server grants.
    pub linger_ms: U32,
}

/// One option of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandshakeOption<'a> {
    /// `OPTION_*`.
    pub kind: u16,
    /// Flag bits.
    pub flags: u16,
    /// Its value.
    pub value: &'a [u8],
}

/// The fixed half of a handshake message, either one.
pub trait Handshake: FromBytes + IntoBytes + Immutable + KnownLayout + Unaligned + Copy {
    /// Its magic.
    fn magic(&self) -> &[u8; 8];
    /// The length of its options.
    fn options_len(&self) -> usize;
    /// Sets the length of the options and the checksum.
    fn seal(&mut self, options_len: usize, crc: u32);
    /// The checksum, and the reserved field that must be zero.
    fn crc_reserved(&self) -> (u32, u32);
}

macro_rules! impl_handshake {
    ($type:ty) => {
        impl Handshake for $type {
            fn magic(&self) -> &[u8; 8] {
                &self.magic
            }
            fn options_len(&self) -> usize {
                self.options_len.get() as usize
            }
            fn seal(&mut self, options_len: usize, crc: u32) {
                self.options_len = U32::new(options_len as u32);
                self.crc = U32::new(crc);
            }
            fn crc_reserved(&self) -> (u32, u32) {
                (self.crc.get(), self.reserved.get())
            }
        }
    };
}
impl_handshake!(Hello);
impl_handshake!(Welcome);

/// A handshake message in wire form: the fixed part sealed, the options behind it.
pub fn encode_handshake<T: Handshake>(mut fixed: T, options: &[HandshakeOption<'_>]) -> Vec<u8> {
    let mut tail = Vec::new();
    for option in options {
        let header = OptionHeader {
            kind: U16::new(option.kind),
            flags: U16::new(option.flags),
            len: U32::new(option.value.len() as u32),
        };
        tail.extend_from_slice(header.as_bytes());
        tail.extend_from_slice(option.value);
        tail.resize(padded(tail.len()), 0);
    }
    fixed.seal(tail.len(), 0);
    let crc = crc32c::crc32c_append(crc32c::crc32c(fixed.as_bytes()), &tail);
    fixed.seal(tail.len(), crc);
    let mut out = fixed.as_bytes().to_vec();
    out.append(&mut tail);
    out
}

/// Parses a handshake message at the front of `bytes`: the fixed part, and where its options are. Says
/// [`Violation::Magic`] as soon as the first byte is wrong.
pub fn parse_handshake<T: Handshake>(bytes: &[u8]) -> Result<Parsed<(T, &[u8])>, Violation> {
    let known = bytes.len().min(MAGIC.len());
    if bytes[..known] != MAGIC[..known] {
        return Err(Violation::Magic);
    }
    let Ok((fixed, rest)) = T::read_from_prefix(bytes) else {
        return Ok(Parsed::Need(HANDSHAKE_BYTES));
    };
    let len = fixed.options_len();
    if len > HANDSHAKE_BYTES_MAX - HANDSHAKE_BYTES {
        return Err(Violation::HandshakeTooLong);
    }
    if !len.is_multiple_of(8) {
        return Err(Violation::Length);
    }
    if rest.len() < len {
        return Ok(Parsed::Need(HANDSHAKE_BYTES + len));
    }
    let options = &rest[..len];
    let (crc, reserved) = fixed.crc_reserved();
    let mut unsealed = fixed;
    unsealed.seal(len, 0);
    if crc != crc32c::crc32c_append(crc32c::crc32c(unsealed.as_bytes()), options) {
        return Err(Violation::Checksum);
    }
    if reserved != 0 {
        return Err(Violation::Reserved);
    }
    Ok(Parsed::Item((fixed, options), HANDSHAKE_BYTES + len))
}

/// The options of a handshake, each checked as it is reached.
pub fn parse_options(mut bytes: &[u8]) -> impl Iterator<Item = Result<HandshakeOption<'_>, Violation>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let mut next = || {
            let (header, rest) = OptionHeader::ref_from_prefix(bytes).map_err(|_| Violation::Length)?;
            let len = header.len.get() as usize;
            if len > rest.len() || padded(len) > rest.len() {
                return Err(Violation::Length);
            }
            let (kind, flags) = (header.kind.get(), header.flags.get());
            if rest[len..padded(len)].iter().any(|&b| b != 0)
                || flags & !(OPTION_REQUIRED | OPTION_UNSUPPORTED) != 0
            {
                return Err(Violation::Reserved);
            }
            bytes = &rest[padded(len)..];
            Ok(HandshakeOption { kind, flags, value: &rest[..len] })
        };
        let item = next();
        if item.is_err() {
            bytes = &[];
        }
        Some(item)
    })
}

#[cfg(test)]
pub(crate) mod tests;
