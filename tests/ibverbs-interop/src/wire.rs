//! The bytes of docs/PROTOCOL.md, as this client needs them: written from that page, with nothing of raio's
//! own code.
//!
//! What a decoder here returns has been checked against the page: sizes, reserved bytes, and that errno and
//! class agree.

use std::io::Read;
use std::net::{IpAddr, TcpStream};

use crate::Result;

/// Header of a message; the body follows.
pub const HEADER: usize = 40;
/// The longest message without data.
pub const MESSAGE_MAX: usize = HEADER + 4224;

pub const REQUEST: u8 = 1;
pub const RESPONSE: u8 = 2;
pub const PING: u8 = 3;
pub const PONG: u8 = 4;
pub const GOAWAY: u8 = 5;
pub const QUEUE_PAIR: u8 = 6;

const MAGIC: [u8; 8] = *b"raio\r\n\x1a\n";
const HANDSHAKE: usize = 64;
const HANDSHAKE_MAX: usize = 4096;
const VERSION: u16 = 2;
const OPTION_NAME: u16 = 1;
const OPTION_TEXT: u16 = 2;
const OPTION_QUEUE_PAIR: u16 = 3;
const UNSUPPORTED: u16 = 2;

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

/// A sentence for a person, without its padding.
fn sentence(body: &[u8]) -> String {
    String::from_utf8_lossy(body).trim_end_matches('\0').to_owned()
}

/// CRC-32C, a bit at a time: it is needed for two short messages.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 * (crc & 1)))
    })
}

/// A hello that asks for `queue_depth` and offers to move to a queue pair.
pub fn hello(session: [u8; 16], queue_depth: u32) -> Vec<u8> {
    let mut options = Vec::new();
    for (kind, value) in [(OPTION_NAME, &b"ibverbs-interop"[..]), (OPTION_QUEUE_PAIR, b"")] {
        options.extend(kind.to_le_bytes());
        options.extend(0u16.to_le_bytes());
        options.extend((value.len() as u32).to_le_bytes());
        options.extend(value);
        pad(&mut options);
    }
    let mut hello = MAGIC.to_vec();
    hello.extend(VERSION.to_le_bytes()); // oldest and newest
    hello.extend(VERSION.to_le_bytes());
    hello.extend((options.len() as u32).to_le_bytes());
    hello.extend(0u64.to_le_bytes()); // no features
    hello.extend(session);
    hello.extend(0u64.to_le_bytes()); // no channel, and so no epoch
    hello.extend(queue_depth.to_le_bytes());
    hello.extend([0; 12]); // no keepalive promised, checksum, reserved
    hello.extend(options);
    let crc = crc32c(&hello);
    hello[56..60].copy_from_slice(&crc.to_le_bytes());
    hello
}

/// What the server grants.
pub struct Welcome {
    pub queue_depth: u32,
    pub data_bytes_max: u32,
    pub inline_bytes_max: u32,
    pub keepalive_ms: u32,
    /// It could move to a queue pair.
    pub upgrade: bool,
}

impl Welcome {
    /// Reads the answer to [`hello`].
    pub fn read(stream: &mut TcpStream) -> Result<Self> {
        let mut bytes = vec![0; HANDSHAKE];
        stream
            .read_exact(&mut bytes)
            .map_err(|error| format!("No welcome came: {error}. Is it a raio_server?"))?;
        if bytes[..8] != MAGIC {
            return Err("What answers there does not speak raio. Check the address.".into());
        }
        let options_len = u32_at(&bytes, 12) as usize;
        if !options_len.is_multiple_of(8) || options_len > HANDSHAKE_MAX - HANDSHAKE {
            return Err(violation(format!("a welcome with {options_len} bytes of options")));
        }
        bytes.resize(HANDSHAKE + options_len, 0);
        stream
            .read_exact(&mut bytes[HANDSHAKE..])
            .map_err(|error| format!("Half a welcome came: {error}."))?;
        let crc = u32_at(&bytes, 56);
        bytes[56..60].fill(0);
        if crc32c(&bytes) != crc || u32_at(&bytes, 60) != 0 {
            return Err(violation("a welcome with a wrong checksum or reserved bytes"));
        }

        let mut answers = Vec::new();
        let mut rest = &bytes[HANDSHAKE..];
        while !rest.is_empty() {
            let len = u32_at(rest, 4) as usize;
            let value = rest.get(8..8 + len).ok_or_else(|| violation("an option longer than the welcome"))?;
            answers.push((u16_at(rest, 0), u16_at(rest, 2), value));
            rest = &rest[(8 + len).next_multiple_of(8)..];
        }
        let errno = u16_at(&bytes, 10);
        if errno != 0 {
            let text = answers.iter().find(|answer| answer.0 == OPTION_TEXT).map(|answer| sentence(answer.2));
            return Err(format!("The server rejects (errno {errno}): {}", text.unwrap_or_default()).into());
        }
        let welcome = Self {
            queue_depth: u32_at(&bytes, 40),
            data_bytes_max: u32_at(&bytes, 44),
            inline_bytes_max: u32_at(&bytes, 48),
            keepalive_ms: u32_at(&bytes, 52),
            upgrade: matches!(answers[..], [_, (OPTION_QUEUE_PAIR, 0, b"")]),
        };
        match answers[..] {
            [(OPTION_NAME, 0, _), (OPTION_QUEUE_PAIR, 0 | UNSUPPORTED, b"")]
                if u16_at(&bytes, 8) == VERSION
                    && u64_at(&bytes, 16) == 0
                    && welcome.queue_depth > 0
                    && welcome.data_bytes_max >= 4096
                    && welcome.keepalive_ms > 0 =>
            {
                Ok(welcome)
            }
            _ => Err(violation("a welcome that does not fit the hello")),
        }
    }
}

/// A message without its data: on a queue pair a response brings none.
pub struct Message {
    pub kind: u8,
    pub flags: u8,
    pub data_len: u32,
    pub id: u64,
    pub middle: [u8; 8],
    pub tail: u64,
    pub body: Vec<u8>,
}

impl Message {
    /// One with a header only, or a body of a multiple of 8.
    pub fn new(kind: u8, id: u64, body: Vec<u8>) -> Self {
        Self { kind, flags: 0, data_len: 0, id, middle: [0; 8], tail: 0, body }
    }

    /// Header and body.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.kind, self.flags];
        bytes.extend((self.body.len() as u16).to_le_bytes());
        bytes.extend(self.data_len.to_le_bytes());
        bytes.extend(self.id.to_le_bytes());
        bytes.extend(self.middle);
        bytes.extend(self.tail.to_le_bytes());
        bytes.extend([0; 8]); // no checksums
        bytes.extend(&self.body);
        bytes
    }

    /// Takes the first message off `bytes`; `None` if it is not all there yet.
    pub fn take(bytes: &mut &[u8]) -> Result<Option<Self>> {
        if bytes.len() < HEADER {
            return Ok(None);
        }
        let len = HEADER + usize::from(u16_at(bytes, 2));
        if len > MESSAGE_MAX || !len.is_multiple_of(8) {
            return Err(violation(format!("a message of {len} bytes")));
        }
        if bytes.len() < len {
            return Ok(None);
        }
        let (this, rest) = bytes.split_at(len);
        *bytes = rest;
        let message = Self {
            kind: this[0],
            flags: this[1],
            data_len: u32_at(this, 4),
            id: u64_at(this, 8),
            middle: this[16..24].try_into().expect("eight bytes"),
            tail: u64_at(this, 24),
            body: this[HEADER..].to_vec(),
        };
        let ends = message.kind == GOAWAY || message.kind == RESPONSE;
        let header_only = message.kind == PING || message.kind == PONG;
        let bad = this[32..40] != [0; 8]
            || !(RESPONSE..=QUEUE_PAIR).contains(&message.kind)
            || message.flags > u8::from(ends)
            || message.kind != RESPONSE && (message.data_len != 0 || message.credits() != 0)
            || message.kind != RESPONSE && message.tail != 0
            || message.middle[3] != 0
            || message.middle[6..] != [0; 2]
            || message.middle[2] > 4
            || (message.errno() == 0) != (message.middle[2] == 0)
            || header_only && !(message.body.is_empty() && message.errno() == 0);
        if bad {
            Err(violation(format!("a message of kind {} that breaks the rules", this[0])))
        } else {
            Ok(Some(message))
        }
    }

    /// Of a response, a goaway or an answer about queue pairs.
    pub fn errno(&self) -> u16 {
        u16_at(&self.middle, 0)
    }

    /// Of a response.
    pub fn credits(&self) -> u16 {
        u16_at(&self.middle, 4)
    }

    /// Why something failed, with the server's sentence.
    pub fn failure(&self, what: &str) -> String {
        format!("{what} (errno {}, class {}): {}", self.errno(), self.middle[2], sentence(&self.body))
    }
}

/// What the error is called when the server breaks the protocol.
pub fn violation(what: impl std::fmt::Display) -> Box<dyn std::error::Error> {
    format!("The server sent {what}. That is no raio protocol; report it.").into()
}

/// One side's queue pair, in a message of kind [`QUEUE_PAIR`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueuePairAddress {
    pub gid: [u8; 16],
    pub qpn: u32,
    pub psn: u32,
    pub peer_psn: u32,
    /// In bytes.
    pub mtu: u32,
    pub lid: u16,
    pub reads: u16,
    pub link: u16,
}

/// The link of a [`QueuePairAddress`].
pub const ETHERNET: u16 = 2;

impl QueuePairAddress {
    pub fn encode(&self) -> Vec<u8> {
        let mut body = self.gid.to_vec();
        for field in [self.qpn, self.psn, self.peer_psn, self.mtu] {
            body.extend(field.to_le_bytes());
        }
        for field in [self.lid, self.reads, self.link, 0] {
            body.extend(field.to_le_bytes());
        }
        body
    }

    pub fn decode(body: &[u8]) -> Result<Self> {
        if body.len() != 40 {
            return Err(violation(format!("a queue pair of {} bytes", body.len())));
        }
        let address = Self {
            gid: body[..16].try_into().expect("16 bytes"),
            qpn: u32_at(body, 16),
            psn: u32_at(body, 20),
            peer_psn: u32_at(body, 24),
            mtu: u32_at(body, 28),
            lid: u16_at(body, 32),
            reads: u16_at(body, 34),
            link: u16_at(body, 36),
        };
        let mtus = [256, 512, 1024, 2048, 4096];
        let number_max = (1 << 24) - 1;
        if address.gid == [0; 16]
            || address.qpn.max(address.psn).max(address.peer_psn) > number_max
            || !mtus.contains(&address.mtu)
            || u16_at(body, 38) != 0
        {
            return Err(violation(format!("a queue pair that cannot be: {address:?}")));
        }
        Ok(address)
    }
}

/// The GID that RoCE gives an IP address.
pub fn gid_of(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The client's memory that a request is about.
#[derive(Clone, Copy)]
pub enum Region {
    None,
    /// The server places data there.
    Place {
        address: u64,
        key: u32,
        len: u32,
    },
    /// The server fetches data from there.
    Fetch {
        address: u64,
        key: u32,
        len: u32,
    },
}

/// A request: the header and the command. Inline data, `data_len` bytes, is for the caller to add.
pub fn request(id: u64, region: Region, data_len: u32, mut command: Vec<u8>) -> Vec<u8> {
    pad(&mut command);
    let mut message = Message::new(REQUEST, id, command);
    message.data_len = data_len;
    let (flags, address, key, len) = match region {
        Region::None => (0, 0, 0, 0),
        Region::Place { address, key, len } => (1, address, key, len),
        Region::Fetch { address, key, len } => (2, address, key, len),
    };
    message.flags = flags;
    message.middle = address.to_le_bytes();
    message.tail = u64::from(key) | u64::from(len) << 32;
    message.encode()
}

pub const CLOSE: u16 = 2;
pub const STAT: u16 = 3;
pub const READ: u16 = 4;
pub const WRITE: u16 = 5;
pub const FSYNC: u16 = 6;

pub const OPEN_READ: u32 = 1;
pub const OPEN_WRITE: u32 = 2;
pub const OPEN_CREATE: u32 = 4;
pub const OPEN_TRUNCATE: u32 = 16;

/// The command open.
pub fn open(path: &str, flags: u32) -> Vec<u8> {
    let mut command = vec![1, 0, 0, 0];
    command.extend(flags.to_le_bytes());
    command.extend((if flags & OPEN_CREATE != 0 { 0o644u32 } else { 0 }).to_le_bytes());
    command.extend((path.len() as u32).to_le_bytes());
    command.extend(path.as_bytes());
    command
}

/// Any other command.
pub fn command(opcode: u16, file: u32, offset: u64, len: u64) -> Vec<u8> {
    let mut command = opcode.to_le_bytes().to_vec();
    command.extend([0; 2]);
    command.extend(file.to_le_bytes());
    command.extend(offset.to_le_bytes());
    command.extend(len.to_le_bytes());
    command
}

/// The size in a file status.
pub fn size_in_status(body: &[u8]) -> Result<u64> {
    if body.len() != 112 {
        return Err(violation(format!("a file status of {} bytes", body.len())));
    }
    Ok(u64_at(body, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_in_the_protocols_page_comes_out() {
        let read =
            request(0, Region::Place { address: 0, key: 0, len: 4096 }, 0, command(READ, 1, 8192, 4096));
        let mut expected = vec![1, 1, 0x18, 0];
        expected.extend([0; 24]);
        expected.extend([0, 0x10, 0, 0]);
        expected.extend([0; 8]);
        expected.extend([4, 0, 0, 0, 1, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0]);
        assert_eq!(read, expected);
    }

    #[test]
    fn several_messages_in_one_send_are_taken_one_by_one() {
        let mut bytes = Message::new(PONG, 1, Vec::new()).encode();
        bytes.extend(Message::new(RESPONSE, 2, vec![b'x'; 88]).encode());
        let mut rest = &bytes[..];
        assert_eq!(Message::take(&mut rest).unwrap().unwrap().id, 1);
        let second = Message::take(&mut rest).unwrap().unwrap();
        assert_eq!((second.id, second.body.len(), rest.len()), (2, 88, 0));
        let mut half = &bytes[..HEADER - 1];
        assert!(Message::take(&mut half).unwrap().is_none());
    }

    #[test]
    fn the_checksum_is_the_castagnoli_one() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
