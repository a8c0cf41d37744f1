//! The record layer: between the messages of a connection and the bytes of its stream. In the clear, these
//! are the same. With TLS 1.3 it seals what is sent, and opens what was received.
//!
//! - TLS has a handshake of its own, of several steps, before the hello, which travels inside. A client does
//!   it in its dial, by the same deadline. A server's connection is made with its layer: the handshake costs
//!   more than an iteration of a worker may take, so it is over before the worker gets the connection.
//! - A record has a header before its data and a tag behind it, and at most 16 KiB in between. So sealing
//!   copies, into memory of the layer: what is to be sent is sealed as late as possible, once, in records as
//!   large as they can be. What a send leaves over is sealed already.
//! - Opening needs no more room than the record has: it is done where that was received.
//! - Records may carry no message (a change of keys, an alert). They open to nothing; what they ask for is
//!   sealed in front of the next messages.
//! - Data moves straight between the stream and its place only if [`Records::is_clear`].
//! - Where the kernel seals and opens, the stream is in the clear to this program. It has to look after
//!   records that are no data, which the kernel does not understand, and to end the connection when its key
//!   is used up.

use std::io::IoSlice;
use std::ops::{Deref, Range};

use crate::error::Violation;
use crate::reactor::SendBatch;
use crate::tls::kernel::{ControlRecord, KernelRecords};
use crate::tls::records::TlsRecords;
use crate::tuning::SEAL_BYTES_MAX;

/// The layer of one connection.
#[derive(Debug)]
pub(crate) enum Records {
    /// The messages' bytes as they are.
    Clear,
    /// Sealed.
    Tls(Box<TlsRecords>),
    /// Sealed by the kernel; of a server.
    Kernel(KernelRecords),
}

/// What is to be sent.
pub(crate) enum Sealed<'a> {
    Clear(&'a [IoSlice<'a>]),
    Tls([IoSlice<'a>; 1]),
}

impl<'a> Deref for Sealed<'a> {
    type Target = [IoSlice<'a>];

    #[inline]
    fn deref(&self) -> &[IoSlice<'a>] {
        match self {
            Self::Clear(slices) => slices,
            Self::Tls(slice) => slice,
        }
    }
}

impl Records {
    /// Whether the bytes of the stream are those of the messages.
    #[inline]
    pub fn is_clear(&self) -> bool {
        !matches!(self, Self::Tls(_))
    }

    // Of a client
    // ----------------------------------------------------------------------------------------------------

    /// What to send for the front of `plain`. The caller passes that again until [`Records::on_sent`] has
    /// said that it has gone.
    #[inline]
    pub fn seal<'a>(&'a mut self, plain: &'a [IoSlice<'a>]) -> Sealed<'a> {
        match self {
            Self::Clear | Self::Kernel(_) => Sealed::Clear(plain),
            Self::Tls(records) => Sealed::Tls([IoSlice::new(records.unsent(plain, SEAL_BYTES_MAX))]),
        }
    }

    /// `n` of those bytes have been sent. Returns how much of the plaintext has gone.
    #[inline]
    pub fn on_sent(&mut self, n: usize) -> usize {
        match self {
            Self::Clear | Self::Kernel(_) => n,
            Self::Tls(records) => records.on_sent(n),
        }
    }

    /// What to send at the end: these last words behind what has been sealed, and that nothing more comes.
    pub fn seal_last<'a>(&'a mut self, words: &'a [IoSlice<'a>]) -> Sealed<'a> {
        match self {
            Self::Clear | Self::Kernel(_) => Sealed::Clear(words),
            Self::Tls(records) => Sealed::Tls([IoSlice::new(records.last(words))]),
        }
    }

    /// Opens what was received, in place: what lies in this range of `buffer`. Returns with how many bytes of
    /// messages that begins now. Behind them is the front of a record that has not come whole
    /// ([`Records::held`]): the next call is for that and what comes behind it.
    #[inline]
    pub fn open(&mut self, buffer: &mut [u8], received: Range<usize>) -> Result<usize, Violation> {
        match self {
            Self::Clear | Self::Kernel(_) => {
                debug_assert!(received.end <= buffer.len());
                Ok(received.len())
            }
            Self::Tls(records) => records.open(buffer, received),
        }
    }

    /// How many bytes of a record that has not come whole lie behind what was opened last.
    #[inline]
    pub fn held(&self) -> usize {
        match self {
            Self::Clear | Self::Kernel(_) => 0,
            Self::Tls(records) => records.held(),
        }
    }

    // Of a server
    // ----------------------------------------------------------------------------------------------------

    /// Moves the front of a batch, `bytes_max` of it at most, sealed into another that is sent to its end:
    /// what a send leaves over is not sealed again. With `is_last` nothing is sent after the end of `plain`.
    /// Not in the clear.
    pub fn seal_batch(
        &mut self,
        plain: &mut SendBatch,
        sealed: &mut SendBatch,
        bytes_max: usize,
        is_last: bool,
    ) {
        let Self::Tls(records) = self else { return };
        let len = plain.len().min(bytes_max);
        sealed.push_bytes(|out| {
            records.seal(plain.slices(), len, out);
            if is_last && len == plain.len() {
                records.seal_end(out);
            }
        });
        plain.advance(len);
    }

    /// Opens what was received into a buffer that the next receive does not have. The data comes in two
    /// parts: of a record whose front had come before, and in this range of `bytes`.
    #[inline]
    pub fn open_away(&mut self, bytes: &mut [u8]) -> Result<(Vec<u8>, Range<usize>), Violation> {
        match self {
            Self::Kernel(records) if records.has_ended() => Err(Violation::Record),
            Self::Clear | Self::Kernel(_) => Ok((Vec::new(), 0..bytes.len())),
            Self::Tls(records) => records.open_away(bytes),
        }
    }

    /// Heap of the front of a record that has not come whole; 0: none has come.
    #[inline]
    pub fn heap(&self) -> usize {
        match self {
            Self::Clear | Self::Kernel(_) => 0,
            Self::Tls(records) => records.heap(),
        }
    }

    // Of a server whose kernel seals
    // ----------------------------------------------------------------------------------------------------

    /// Whether the kernel seals and opens.
    #[inline]
    pub fn is_in_kernel(&self) -> bool {
        matches!(self, Self::Kernel(_))
    }

    /// A send of `n` bytes has ended. Returns whether its key is used up.
    #[inline]
    pub fn on_batch_sent(&mut self, n: usize) -> bool {
        let Self::Kernel(records) = self else { return false };
        records.on_sent(n);
        records.is_used_up()
    }

    /// Whether data may be received straight into its place.
    #[inline]
    pub fn is_received_directly(&self) -> bool {
        match self {
            Self::Clear => true,
            Self::Tls(_) => false,
            // What comes behind the end is looked for in what is received ([`Records::open_away`]).
            Self::Kernel(records) => !records.has_ended(),
        }
    }

    /// Whether nothing more can be received.
    #[inline]
    pub fn is_unreadable(&self) -> bool {
        matches!(self, Self::Kernel(records) if records.is_unreadable())
    }

    /// The kernel cannot open what has come.
    pub fn on_bad_record(&mut self) {
        if let Self::Kernel(records) = self {
            records.on_bad_record();
        }
    }

    /// A record that is no data has come.
    pub fn on_control(&mut self, kind: u8, message: &[u8]) -> Result<ControlRecord, Violation> {
        match self {
            Self::Kernel(records) => records.on_control(kind, message),
            Self::Clear | Self::Tls(_) => Err(Violation::Record),
        }
    }
}
