//! What the fuzz targets share: mending checksums, which no mutation would ever get right, and the reading of
//! an input.

#![deny(unsafe_code)]

use raio_transport::message::{HANDSHAKE_BYTES, HEADER_BYTES};

/// Where a header has its checksum, and a handshake its own.
const HEADER_CRC_AT: usize = HEADER_BYTES - 4;
const HANDSHAKE_CRC_AT: usize = HANDSHAKE_BYTES - 8;
/// Where they have the length of what follows.
const BODY_LEN_AT: usize = 2;
const DATA_LEN_AT: usize = 4;
const OPTIONS_LEN_AT: usize = 12;

/// What is left of an input. Zeros follow it.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        byte
    }

    /// A number below `len`; 0 if that is 0.
    pub fn index(&mut self, len: usize) -> usize {
        usize::from(self.byte()) % len.max(1)
    }

    /// The next eight bytes, as a number.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// The next bytes: `len`, or as many as are left.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes.to_vec()
    }
}

/// Puts the right checksum into the handshake message at the front, if it is whole.
pub fn mend_handshake(bytes: &mut [u8]) {
    let Some(len) = bytes.get(OPTIONS_LEN_AT..OPTIONS_LEN_AT + 4) else { return };
    let len = u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as usize;
    if let Some(message) = bytes.get_mut(..HANDSHAKE_BYTES.saturating_add(len)) {
        message[HANDSHAKE_CRC_AT..HANDSHAKE_CRC_AT + 4].fill(0);
        let crc = crc32c::crc32c(message);
        message[HANDSHAKE_CRC_AT..HANDSHAKE_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// The length of the handshake message at the front, as it says itself; at most what there is.
pub fn handshake_len(bytes: &[u8]) -> usize {
    let len = bytes
        .get(OPTIONS_LEN_AT..OPTIONS_LEN_AT + 4)
        .map_or(0, |len| u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as usize);
    HANDSHAKE_BYTES.saturating_add(len).min(bytes.len())
}

/// Puts the right checksums into the headers of the messages that follow one another in `bytes`.
pub fn mend_messages(mut bytes: &mut [u8]) {
    while bytes.len() >= HEADER_BYTES {
        let body_len = usize::from(u16::from_le_bytes([bytes[BODY_LEN_AT], bytes[BODY_LEN_AT + 1]]));
        let data_len = u32::from_le_bytes([
            bytes[DATA_LEN_AT],
            bytes[DATA_LEN_AT + 1],
            bytes[DATA_LEN_AT + 2],
            bytes[DATA_LEN_AT + 3],
        ]) as usize;
        let Some(body) = bytes.get(HEADER_BYTES..HEADER_BYTES + body_len) else { return };
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..HEADER_CRC_AT]), body);
        bytes[HEADER_CRC_AT..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
        let next = (HEADER_BYTES + body_len).saturating_add(data_len).min(bytes.len());
        bytes = &mut bytes[next..];
    }
}

/// How an input is to be used: its first byte, bit by bit.
#[derive(Clone, Copy, Debug)]
pub struct Mode(pub u8);

impl Mode {
    /// Ask for checksums, and mend those of the messages.
    pub const CRC: u8 = 1 << 0;
    /// The input begins with a handshake of its own, to be mended; without, a good one comes before it.
    pub const HANDSHAKE: u8 = 1 << 1;
    /// In pieces of odd lengths.
    pub const PIECES: u8 = 1 << 2;
    /// Leave the checksums as they are.
    pub const RAW: u8 = 1 << 3;

    /// Whether a bit is set.
    pub fn has(self, bit: u8) -> bool {
        self.0 & bit != 0
    }

    /// The input cut as the mode wants it.
    pub fn pieces<'a>(self, bytes: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        let step = if self.has(Self::PIECES) { usize::from(self.0 >> 4) * 7 + 1 } else { bytes.len().max(1) };
        bytes.chunks(step)
    }
}

/// Keys that inputs of the target `configuration` can name.
pub const PUBLIC_KEYS: [&str; 2] = [
    "ed25519:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo",
    "ed25519:PUAXw+hDiVqStwqnTRt+vJyYLM8uxJaMwM1V8Sr0Zgw",
];

/// What happens in an input of the target `server`: the low five bits of a step. Numbers that have no name
/// are requests.
pub mod step {
    /// A client connects.
    pub const CONNECT: u8 = 0;
    /// A client takes the place of a connection of its channel, whether that is broken or not.
    pub const RESUME: u8 = 1;
    /// Time passes.
    pub const ADVANCE: u8 = 2;
    /// A blocking operation runs.
    pub const RUN_JOB: u8 = 3;
    /// One begins, which nobody can stop from then on; if the step is [`ODD`] one ends that was begun.
    pub const BEGIN_JOB: u8 = 4;
    /// All of them run.
    pub const RUN_JOBS: u8 = 5;
    /// The worker runs some iterations.
    pub const RUN: u8 = 6;
    /// The server is told to stop, if the step is [`ODD`].
    pub const DRAIN: u8 = 7;
    /// A client goes, without a word.
    pub const LEAVE: u8 = 8;
    /// A client takes no more of what is sent to it, or again.
    pub const DEAFEN: u8 = 9;
    /// A client sends what it has kept back.
    pub const CONTINUE: u8 = 10;
    /// A client ends its half of the connection, if the step is [`ODD`].
    pub const SHUT_DOWN: u8 = 11;
    /// A client sends a ping; a goaway if the step is [`ODD`].
    pub const PING: u8 = 12;
    /// A client sends bytes of the input.
    pub const RAW: u8 = 13;
    /// A client cancels one of its requests.
    pub const CANCEL: u8 = 14;
    /// A client asks for something.
    pub const REQUEST: u8 = 15;
    /// The mask of all these.
    pub const KIND: u8 = 0x1f;
    /// A variant, which may break the rules.
    pub const ODD: u8 = 0x20;
    /// The worker does not run after it.
    pub const AT_ONCE: u8 = 0x80;
}

/// What happens in an input of the target `channel`: the low four bits of a step. Numbers that have no name
/// take a request back.
pub mod peer {
    /// The client asks for something.
    pub const SUBMIT: u8 = 0;
    /// The client takes in what has come.
    pub const RECEIVE: u8 = 1;
    /// The server does the next thing that it was asked for, and answers.
    pub const ANSWER: u8 = 2;
    /// It does all of them.
    pub const ANSWER_ALL: u8 = 3;
    /// It breaks off instead.
    pub const LOSE: u8 = 4;
    /// It does it, and breaks off instead of answering.
    pub const EXECUTE: u8 = 5;
    /// It does it, and breaks off in the middle of the answer.
    pub const HALF: u8 = 6;
    /// It does it, and gives another answer.
    pub const LIE: u8 = 7;
    /// It sends bytes of the input.
    pub const RAW: u8 = 8;
    /// The connection breaks.
    pub const BREAK: u8 = 9;
    /// Time passes.
    pub const ADVANCE: u8 = 10;
    /// The server is started again, and knows nothing.
    pub const RESTART: u8 = 11;
    /// Nobody listens any more, or somebody does again.
    pub const LISTEN: u8 = 12;
    /// The client cancels one of its requests.
    pub const CANCEL: u8 = 13;
    /// The client looks for nothing after the step.
    pub const AT_ONCE: u8 = 0x80;
}

/// What is done to the tested side in an input of the target `tls`: its first byte.
pub mod tls {
    /// A server gets bytes, and no handshake.
    pub const BYTES_TO_SERVER: u8 = 0;
    /// A client does.
    pub const BYTES_TO_CLIENT: u8 = 1;
    /// A client's part of the handshake is changed.
    pub const HANDSHAKE_TO_SERVER: u8 = 2;
    /// A server's part is.
    pub const HANDSHAKE_TO_CLIENT: u8 = 3;
    /// After the handshake a client does with its records what it should not.
    pub const RECORDS_TO_SERVER: u8 = 4;
    /// A server does.
    pub const RECORDS_TO_CLIENT: u8 = 5;
}
