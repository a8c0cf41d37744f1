//! The records after the handshake (RFC 8446, sections 4.6.3 and 5): sealed and opened in place.

use std::fmt;
use std::io::IoSlice;
use std::ops::Range;

use ring::aead::{AES_128_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ConnectionTrafficSecrets, Error as TlsError, ExtractedSecrets};

use crate::error::Violation;
use crate::keys::PublicKey;

/// Type, version and length of a record, in front of it.
pub(super) const HEADER_BYTES: usize = 5;

/// The tag behind its data.
const TAG_BYTES: usize = 16;

/// The most data of a record, ...
pub(super) const DATA_BYTES_MAX: usize = 16 << 10;

/// ... and the most of what is behind its header.
const SEALED_BYTES_MAX: usize = DATA_BYTES_MAX + 256;

/// Content types (RFC 8446, section 5.1). The header of an encrypted record always has that of data.
pub(super) const ALERT: u8 = 21;
pub(super) const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;

/// A message that announces other keys, without and with the request to do the same.
pub(super) const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];
pub(super) const KEY_UPDATE_REQUESTED: [u8; 5] = [24, 0, 0, 1, 1];

/// The alert that nothing more comes: a warning of description 0.
pub(super) const CLOSE_NOTIFY: [u8; 2] = [1, 0];

/// So many key updates may come without data in between: each costs more than it is long.
const KEY_UPDATES_MAX: u32 = 16;

/// How long the record at the front of `bytes` is, with its header; None if that has not come whole.
pub(super) fn record_len(bytes: &[u8]) -> Result<Option<usize>, Violation> {
    let &[_, _, _, high, low, ..] = bytes else { return Ok(None) };
    let len = usize::from(u16::from_be_bytes([high, low]));
    if len > SEALED_BYTES_MAX {
        return Err(Violation::Record);
    }
    let whole = HEADER_BYTES + len;
    Ok((bytes.len() >= whole).then_some(whole))
}

/// Makes the keys that follow on those in use.
pub(super) enum Rekey {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Rekey {
    fn sending(&mut self) -> Result<Key, TlsError> {
        let next = match self {
            Self::Client(connection) => connection.update_tx_secret(),
            Self::Server(connection) => connection.update_tx_secret(),
        };
        next.map(Key::new)
    }

    fn receiving(&mut self) -> Result<Key, TlsError> {
        let next = match self {
            Self::Client(connection) => connection.update_rx_secret(),
            Self::Server(connection) => connection.update_rx_secret(),
        };
        next.map(Key::new)
    }
}

/// The key of one direction.
struct Key {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    /// How many records it has sealed or opened.
    records: u64,
}

impl Key {
    fn new((records, secrets): (u64, ConnectionTrafficSecrets)) -> Self {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => unreachable!("no other suite is offered or accepted"),
        };
        let key = UnboundKey::new(algorithm, key.as_ref()).expect("it has the algorithm's length");
        let iv = iv.as_ref().try_into().expect("it has a nonce's length");
        Self { key: LessSafeKey::new(key), iv, records }
    }

    /// That of the next record.
    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, of_number) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.records.to_be_bytes()) {
            *byte ^= of_number;
        }
        self.records += 1;
        Nonce::assume_unique_for_key(nonce)
    }

    /// Appends a record of this type, with the data that `write` appends, `len` bytes.
    fn seal(&mut self, kind: u8, len: usize, out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
        let sealed = (len + 1 + TAG_BYTES) as u16;
        let [high, low] = sealed.to_be_bytes();
        let header = [DATA, 3, 3, high, low];
        out.reserve(HEADER_BYTES + usize::from(sealed));
        out.extend_from_slice(&header);
        let start = out.len();
        write(out);
        debug_assert_eq!(out.len(), start + len);
        out.push(kind);
        let nonce = self.nonce();
        let tag = self.key.seal_in_place_separate_tag(nonce, Aad::from(header), &mut out[start..]);
        out.extend_from_slice(tag.expect("a record is not too long to be sealed").as_ref());
    }

    /// Opens a record, which is behind `gap` bytes of `bytes`, to the front of them. Returns its type, and
    /// how long its data is.
    fn open(&mut self, bytes: &mut [u8], gap: usize) -> Result<(u8, usize), Violation> {
        let header: [u8; HEADER_BYTES] = bytes[gap..gap + HEADER_BYTES].try_into().expect("it is whole");
        if header[0] != DATA {
            return Err(Violation::Record);
        }
        let nonce = self.nonce();
        let opened = self.key.open_within(nonce, Aad::from(header), bytes, gap + HEADER_BYTES..);
        let opened = opened.map_err(|_| Violation::Record)?;
        // Zeros behind the type are padding.
        let end = opened.iter().rposition(|&byte| byte != 0).ok_or(Violation::Record)?;
        if end > DATA_BYTES_MAX {
            return Err(Violation::Record);
        }
        Ok((opened[end], end))
    }
}

/// The record layer of a connection.
pub(crate) struct TlsRecords {
    peer: PublicKey,
    rekey: Rekey,
    sending: Key,
    receiving: Key,
    /// Other keys after this many records.
    records_per_key: u64,
    /// The peer has asked for other keys.
    owes_update: bool,
    /// Key updates since data came.
    updates: u32,
    /// The peer has said that nothing more comes.
    has_ended: bool,
    /// How much of a record that has not come whole lies behind what was opened last.
    held: usize,
    /// What is sealed, how much of that has been sent, and how much plaintext it is.
    sealed: Vec<u8>,
    sent: usize,
    plain: usize,
    /// The front of a record, where what is received does not stay.
    front: Vec<u8>,
}

impl TlsRecords {
    /// After a handshake that has left `unsent` to be sent in front of all else.
    pub(super) fn new(
        peer: PublicKey,
        secrets: ExtractedSecrets,
        rekey: Rekey,
        records_per_key: u64,
        unsent: Vec<u8>,
    ) -> Self {
        Self {
            peer,
            rekey,
            sending: Key::new(secrets.tx),
            receiving: Key::new(secrets.rx),
            records_per_key,
            owes_update: false,
            updates: 0,
            has_ended: false,
            held: 0,
            sealed: unsent,
            sent: 0,
            plain: 0,
            front: Vec::new(),
        }
    }

    /// Whose key the peer has proven to have.
    pub fn peer(&self) -> PublicKey {
        self.peer
    }

    // Sealing
    // ----------------------------------------------------------------------------------------------------

    /// Appends the records of this data to `out`, as few as can be.
    pub fn seal<'a>(&mut self, data: impl Iterator<Item = &'a [u8]>, len: usize, out: &mut Vec<u8>) {
        let records = len.div_ceil(DATA_BYTES_MAX);
        out.reserve(len + records * (HEADER_BYTES + 1 + TAG_BYTES));
        let mut data = data;
        let mut slice: &[u8] = &[];
        let mut left = len;
        while left > 0 {
            self.update_key_if_due(out);
            let record = left.min(DATA_BYTES_MAX);
            self.sending.seal(DATA, record, out, |out| {
                let mut wanted = record;
                while wanted > 0 {
                    if slice.is_empty() {
                        slice = data.next().expect("it is as long as was said");
                        continue;
                    }
                    let n = slice.len().min(wanted);
                    out.extend_from_slice(&slice[..n]);
                    slice = &slice[n..];
                    wanted -= n;
                }
            });
            left -= record;
        }
    }

    /// Appends that nothing more comes.
    pub fn seal_end(&mut self, out: &mut Vec<u8>) {
        self.sending.seal(ALERT, CLOSE_NOTIFY.len(), out, |out| out.extend_from_slice(&CLOSE_NOTIFY));
    }

    fn update_key_if_due(&mut self, out: &mut Vec<u8>) {
        if self.owes_update || self.sending.records >= self.records_per_key {
            self.owes_update = false;
            self.sending.seal(HANDSHAKE, KEY_UPDATE.len(), out, |out| out.extend_from_slice(&KEY_UPDATE));
            self.sending = self.rekey.sending().expect("a key that was made once can be made again");
        }
    }

    /// What to send for the front of `plain`, which is passed again until [`TlsRecords::on_sent`] says that
    /// it has gone; and at most `bytes_max` of it at a time.
    pub fn unsent(&mut self, plain: &[IoSlice<'_>], bytes_max: usize) -> &[u8] {
        if self.plain == 0 {
            let len = plain.iter().map(|slice| slice.len()).sum::<usize>().min(bytes_max);
            // Behind what the handshake has left, perhaps.
            let mut sealed = std::mem::take(&mut self.sealed);
            self.seal(plain.iter().map(|slice| &**slice), len, &mut sealed);
            self.sealed = sealed;
            self.plain = len;
        }
        &self.sealed[self.sent..]
    }

    /// `n` bytes of that have been sent. Returns how much of the plaintext has gone.
    pub fn on_sent(&mut self, n: usize) -> usize {
        self.sent += n;
        if self.sent < self.sealed.len() {
            return 0;
        }
        self.sealed.clear();
        self.sent = 0;
        std::mem::take(&mut self.plain)
    }

    /// What to send at the end: what is sealed, these words, and that nothing more comes.
    pub fn last(&mut self, words: &[IoSlice<'_>]) -> &[u8] {
        let mut sealed = std::mem::take(&mut self.sealed);
        let len = words.iter().map(|slice| slice.len()).sum();
        self.seal(words.iter().map(|slice| &**slice), len, &mut sealed);
        self.seal_end(&mut sealed);
        self.sealed = sealed;
        &self.sealed[self.sent..]
    }

    // Opening
    // ----------------------------------------------------------------------------------------------------

    /// See [`crate::records::Records::open`].
    pub fn open(&mut self, buffer: &mut [u8], received: Range<usize>) -> Result<usize, Violation> {
        let (mut to, mut from) = (received.start, received.start);
        while let Some(len) = record_len(&buffer[from..received.end])? {
            if len < HEADER_BYTES + 1 + TAG_BYTES || self.has_ended {
                return Err(Violation::Record);
            }
            let (kind, opened) = self.receiving.open(&mut buffer[to..from + len], from - to)?;
            from += len;
            match kind {
                DATA => {
                    self.updates = 0;
                    to += opened;
                }
                HANDSHAKE => self.on_handshake(&buffer[to..to + opened])?,
                ALERT => self.on_alert(&buffer[to..to + opened])?,
                _ => return Err(Violation::Record),
            }
        }
        self.held = received.end - from;
        buffer.copy_within(from..received.end, to);
        Ok(to - received.start)
    }

    /// How much of a record that has not come whole lies behind what was opened last.
    pub fn held(&self) -> usize {
        self.held
    }

    fn on_handshake(&mut self, message: &[u8]) -> Result<(), Violation> {
        self.updates += 1;
        let is_update = message == KEY_UPDATE || message == KEY_UPDATE_REQUESTED;
        if !is_update || self.updates > KEY_UPDATES_MAX {
            return Err(Violation::Record);
        }
        self.receiving = self.rekey.receiving().map_err(|_| Violation::Record)?;
        self.owes_update |= message == KEY_UPDATE_REQUESTED;
        Ok(())
    }

    fn on_alert(&mut self, alert: &[u8]) -> Result<(), Violation> {
        match *alert {
            // The stream's end comes next.
            [_, 0] => self.has_ended = true,
            [_, description] => return Err(Violation::Alert(description)),
            _ => return Err(Violation::Record),
        }
        Ok(())
    }

    /// Opens what was received into a buffer that the next receive does not have. First comes the data of the
    /// record whose front had come before, then that of the others: what lies in this range of `bytes`.
    pub fn open_away(&mut self, bytes: &mut [u8]) -> Result<(Vec<u8>, Range<usize>), Violation> {
        let mut first = std::mem::take(&mut self.front);
        let mut taken = 0;
        if !first.is_empty() {
            // No more than one record: the others stay where they are.
            while record_len(&first)?.is_none() {
                let wanted = match first.get(3..HEADER_BYTES) {
                    Some(&[high, low]) => HEADER_BYTES + usize::from(u16::from_be_bytes([high, low])),
                    _ => HEADER_BYTES,
                };
                let more = (wanted - first.len()).min(bytes.len() - taken);
                if more == 0 {
                    self.front = first;
                    return Ok((Vec::new(), 0..0));
                }
                first.extend_from_slice(&bytes[taken..taken + more]);
                taken += more;
            }
            let len = first.len();
            let opened = self.open(&mut first, 0..len)?;
            first.truncate(opened);
        }
        let end = bytes.len();
        let opened = self.open(bytes, taken..end)?;
        let rest = taken + opened;
        self.front.extend_from_slice(&bytes[rest..rest + self.held]);
        self.held = 0;
        Ok((first, taken..rest))
    }

    /// Heap of the front of a record.
    pub fn heap(&self) -> usize {
        self.front.len()
    }
}

#[cfg(test)]
impl TlsRecords {
    /// Asks the peer for other keys.
    pub(super) fn request_update(&mut self, out: &mut Vec<u8>) {
        self.seal_as(HANDSHAKE, &KEY_UPDATE_REQUESTED, out);
        self.sending = self.rekey.sending().unwrap();
    }

    /// Appends a record with this behind its data.
    pub(super) fn seal_as(&mut self, kind: u8, data: &[u8], out: &mut Vec<u8>) {
        self.sending.seal(kind, data.len(), out, |out| out.extend_from_slice(data));
    }

    /// How many records the key in use has sealed.
    pub(super) fn sealed_by_key(&self) -> u64 {
        self.sending.records
    }
}

impl fmt::Debug for TlsRecords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsRecords").field("peer", &self.peer).finish_non_exhaustive()
    }
}
