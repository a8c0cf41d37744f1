//! Records that the kernel seals and opens (kTLS): what it is told, and what is left to do here.
//!
//! The kernel has the key of each direction, and no way to make the next one: kernels before 6.14 cannot take
//! another key at all. So a connection ends when a key has been used for as many records as it may be, or
//! when the peer changes its own, and the session goes on over the next one.

use rustls::ConnectionTrafficSecrets;
use zeroize::Zeroizing;

use super::records::{ALERT, CLOSE_NOTIFY, DATA_BYTES_MAX, HANDSHAKE, KEY_UPDATE, KEY_UPDATE_REQUESTED};
use crate::error::Violation;

/// Version and cipher in front of each key: TLS_1_3_VERSION, TLS_CIPHER_AES_GCM_128 and
/// TLS_CIPHER_CHACHA20_POLY1305 of the kernel's `linux/tls.h`.
const TLS13: u16 = 0x0304;
const AES_128_GCM: u16 = 51;
const CHACHA20_POLY1305: u16 = 54;

/// The longest of the kernel's structures.
const CRYPTO_INFO_BYTES_MAX: usize = 56;
/// AES-GCM's nonces begin with the salt, which is apart from the rest there.
const SALT_BYTES: usize = 4;

/// What the kernel needs to know of one direction: `struct tls12_crypto_info_aes_gcm_128`, or
/// `tls12_crypto_info_chacha20_poly1305`. It is overwritten when it is dropped.
pub(crate) struct CryptoInfo(Zeroizing<Vec<u8>>);

impl CryptoInfo {
    /// For the records from this number on.
    pub fn new((record, secrets): (u64, ConnectionTrafficSecrets)) -> Self {
        match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => {
                let (salt, iv) = iv.as_ref().split_at(SALT_BYTES);
                Self::of(AES_128_GCM, &[iv, key.as_ref(), salt], record)
            }
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                Self::of(CHACHA20_POLY1305, &[iv.as_ref(), key.as_ref()], record)
            }
            _ => unreachable!("no other suite is offered or accepted"),
        }
    }

    /// Keys of zeros, of each cipher that a connection may have: to try whether the kernel takes it.
    pub fn samples() -> [(&'static str, Self); 2] {
        [
            ("AES-128-GCM", Self::of(AES_128_GCM, &[&[0; 8], &[0; 16], &[0; 4]], 0)),
            ("ChaCha20-Poly1305", Self::of(CHACHA20_POLY1305, &[&[0; 12], &[0; 32]], 0)),
        ]
    }

    fn of(cipher: u16, parts: &[&[u8]], record: u64) -> Self {
        // As long as it becomes, so that no copy is left behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(CRYPTO_INFO_BYTES_MAX));
        bytes.extend_from_slice(&TLS13.to_ne_bytes());
        bytes.extend_from_slice(&cipher.to_ne_bytes());
        for part in parts {
            bytes.extend_from_slice(part);
        }
        bytes.extend_from_slice(&record.to_be_bytes());
        Self(bytes)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// What a handshake leaves for the kernel.
pub(crate) struct KernelKeys {
    pub sending: CryptoInfo,
    pub receiving: CryptoInfo,
    /// Of the connection from then on.
    pub records: KernelRecords,
}

/// The record that says that nothing more comes: its type, and what is in it.
pub(crate) const END: (u8, &[u8]) = (ALERT, &CLOSE_NOTIFY);

/// What a record that is no data asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ControlRecord {
    /// Nothing more comes: the stream's end is next.
    End,
    /// The peer has changed its key. What it sends from now on cannot be opened.
    KeyUpdate,
}

/// A connection's record layer, as far as it is not the kernel's.
#[derive(Debug)]
pub(crate) struct KernelRecords {
    records_per_key: u64,
    /// As many records as the kernel makes of what was sent, or more.
    sent: u64,
    /// The peer has said that nothing more comes.
    has_ended: bool,
    /// The peer has changed its key, or a record was damaged or forged.
    is_unreadable: bool,
}

impl KernelRecords {
    pub fn new(records_per_key: u64) -> Self {
        Self { records_per_key, sent: 0, has_ended: false, is_unreadable: false }
    }

    /// A send of `n` bytes has ended. The kernel ends a record with it, and each that is full before.
    /// One that it ends early for lack of memory is not seen here: [`TLS_RECORDS_PER_KEY`] leaves room for
    /// twice as many.
    ///
    /// [`TLS_RECORDS_PER_KEY`]: crate::tuning::TLS_RECORDS_PER_KEY
    pub fn on_sent(&mut self, n: usize) {
        if n > 0 {
            self.sent += 1 + (n / DATA_BYTES_MAX) as u64;
        }
    }

    /// Whether the key has been used for as many records as it may be.
    pub fn is_used_up(&self) -> bool {
        self.sent >= self.records_per_key
    }

    /// Whether the peer has said that nothing more comes.
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Whether what comes cannot be opened any more.
    pub fn is_unreadable(&self) -> bool {
        self.is_unreadable
    }

    /// A record cannot be opened, and neither can those behind it.
    pub fn on_bad_record(&mut self) {
        self.is_unreadable = true;
    }

    /// A record of this type has come, with this inside.
    pub fn on_control(&mut self, kind: u8, message: &[u8]) -> Result<ControlRecord, Violation> {
        match (kind, message) {
            (HANDSHAKE, message) if message == KEY_UPDATE || message == KEY_UPDATE_REQUESTED => {
                self.is_unreadable = true;
                Ok(ControlRecord::KeyUpdate)
            }
            (ALERT, [_, 0]) => {
                self.has_ended = true;
                Ok(ControlRecord::End)
            }
            (ALERT, &[_, description]) => Err(Violation::Alert(description)),
            _ => Err(Violation::Record),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use rustls::crypto::cipher::{AeadKey, Iv};

    use super::*;

    /// Where the kernel's structure has a member.
    macro_rules! member {
        ($info:expr, $structure:ident, $member:ident, $len:expr) => {
            &$info[offset_of!(libc::$structure, $member)..][..$len]
        };
    }

    #[test]
    fn secrets_are_laid_out_as_the_kernel_has_them() {
        let key: [u8; 32] = std::array::from_fn(|at| at as u8);
        let iv: [u8; 12] = std::array::from_fn(|at| 100 + at as u8);
        let number = 0x0102_0304_0506_0708_u64;

        let chacha = ConnectionTrafficSecrets::Chacha20Poly1305 { key: AeadKey::from(key), iv: Iv::from(iv) };
        let info = CryptoInfo::new((number, chacha));
        let info = info.bytes();
        assert_eq!(info.len(), size_of::<libc::tls12_crypto_info_chacha20_poly1305>());
        assert_eq!(info[..2], libc::TLS_1_3_VERSION.to_ne_bytes());
        assert_eq!(info[2..4], libc::TLS_CIPHER_CHACHA20_POLY1305.to_ne_bytes());
        assert_eq!(member!(info, tls12_crypto_info_chacha20_poly1305, iv, 12), iv);
        assert_eq!(member!(info, tls12_crypto_info_chacha20_poly1305, key, 32), key);
        assert_eq!(member!(info, tls12_crypto_info_chacha20_poly1305, rec_seq, 8), number.to_be_bytes());

        let [(_, aes), (_, chacha)] = CryptoInfo::samples();
        assert_eq!(aes.bytes().len(), size_of::<libc::tls12_crypto_info_aes_gcm_128>());
        assert_eq!(chacha.bytes().len(), info.len());
        let (iv, key, salt) = ([1; 8], [2; 16], [3; 4]);
        let info = CryptoInfo::of(AES_128_GCM, &[&iv, &key, &salt], number);
        let info = info.bytes();
        assert_eq!(info[2..4], libc::TLS_CIPHER_AES_GCM_128.to_ne_bytes());
        assert_eq!(member!(info, tls12_crypto_info_aes_gcm_128, iv, 8), iv);
        assert_eq!(member!(info, tls12_crypto_info_aes_gcm_128, key, 16), key);
        assert_eq!(member!(info, tls12_crypto_info_aes_gcm_128, salt, 4), salt);
        assert_eq!(member!(info, tls12_crypto_info_aes_gcm_128, rec_seq, 8), number.to_be_bytes());
    }

    #[test]
    fn what_was_sent_counts_as_no_fewer_records_than_the_kernel_makes_of_it() {
        let mut records = KernelRecords::new(8);
        for (n, sent) in [(0, 0), (1, 1), (DATA_BYTES_MAX - 1, 2), (DATA_BYTES_MAX + 1, 4), (50_000, 8)] {
            assert!(!records.is_used_up());
            records.on_sent(n);
            assert_eq!(records.sent, sent);
        }
        assert!(records.is_used_up());
    }

    #[test]
    fn records_that_are_no_data_end_the_stream_or_the_connection() {
        let mut records = KernelRecords::new(8);
        assert_eq!(records.on_control(ALERT, &[1, 0]), Ok(ControlRecord::End));
        assert!(records.has_ended() && !records.is_unreadable());
        for update in [KEY_UPDATE, KEY_UPDATE_REQUESTED] {
            let mut records = KernelRecords::new(8);
            assert_eq!(records.on_control(HANDSHAKE, &update), Ok(ControlRecord::KeyUpdate));
            assert!(records.is_unreadable());
        }
        let mut records = KernelRecords::new(8);
        assert_eq!(records.on_control(ALERT, &[2, 80]), Err(Violation::Alert(80)));
        let others = [(ALERT, &[1][..]), (HANDSHAKE, &[4, 0, 0, 0]), (HANDSHAKE, &[]), (20, &[1]), (99, &[])];
        for (kind, message) in others {
            assert_eq!(records.on_control(kind, message), Err(Violation::Record));
        }
    }
}
