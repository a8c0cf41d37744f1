//! The record layer: between the messages of a connection and the bytes of its stream. It seals what is sent
//! and opens what was received.
//!
//! There is no encryption yet: [`Records::Clear`] is the only layer, and its bytes are those of the messages.
//! TLS 1.3 is to be another variant, whose missing arms the compiler then lists. What this place is made for:
//!
//! - The layer has a handshake of its own, of several steps, before the hello, which travels inside. A client
//!   does it in `TcpClient::from_stream`, by the same deadline. A server's connection is made with its layer
//!   (`StreamConnection::new`): the handshake costs more than an iteration of a worker may take, so it is
//!   over before the worker gets the connection. A worker that passes it on will have to pass the layer, too.
//! - A record has a header before its data and a tag behind it, and at most 16 KiB in between. So sealing
//!   copies, into memory of the layer: what is to be sent is sealed as late as possible, once, in records as
//!   large as they can be. What a send leaves over is sealed already.
//! - Opening needs no more room than the record has: it is done where that was received.
//! - Records may carry no message (a change of keys, an alert). They open to nothing; what they ask for is
//!   sealed in front of the next messages.
//! - Data moves straight between the stream and its place only if [`Records::is_clear`]: also where the
//!   kernel seals and opens (kTLS).
//! - The layer knows who the peer is: [`Records::identity`].

use std::io::IoSlice;
use std::ops::Range;

use crate::error::Violation;
use crate::handshake::Identity;
use crate::reactor::SendBatch;

/// The layer of one connection.
#[derive(Debug)]
pub(crate) enum Records {
    /// The messages' bytes as they are.
    Clear,
}

impl Records {
    /// Who the peer is, as the layer's handshake has shown.
    pub fn identity(&self) -> Identity {
        match self {
            Self::Clear => Identity::Anonymous,
        }
    }

    /// Whether the bytes of the stream are those of the messages.
    #[inline]
    pub fn is_clear(&self) -> bool {
        match self {
            Self::Clear => true,
        }
    }

    /// What to send for the front of `plain`. The caller passes that again until [`Records::on_sent`] has
    /// said that it has gone.
    #[inline]
    pub fn seal<'a>(&'a mut self, plain: &'a [IoSlice<'a>]) -> &'a [IoSlice<'a>] {
        match self {
            Self::Clear => plain,
        }
    }

    /// `n` of those bytes have been sent. Returns how much of the plaintext that was.
    #[inline]
    pub fn on_sent(&mut self, n: usize) -> usize {
        match self {
            Self::Clear => n,
        }
    }

    /// The same for a server's batch, which is sent to its end: what a send leaves over is not sealed again.
    #[inline]
    pub fn seal_batch(&mut self, plain: Box<SendBatch>) -> Box<SendBatch> {
        match self {
            Self::Clear => plain,
        }
    }

    /// Opens what was received, in place: what lies in this range of `buffer`. Returns with how many bytes of
    /// messages that begins now. Behind them is the front of a record that has not come whole
    /// ([`Records::held`]): the next call is for that and what comes behind it.
    #[inline]
    pub fn open(&mut self, buffer: &mut [u8], received: Range<usize>) -> Result<usize, Violation> {
        match self {
            Self::Clear => {
                debug_assert!(received.end <= buffer.len());
                Ok(received.len())
            }
        }
    }

    /// How many bytes of a record that has not come whole lie behind what was opened last.
    #[inline]
    pub fn held(&self) -> usize {
        match self {
            Self::Clear => 0,
        }
    }
}
