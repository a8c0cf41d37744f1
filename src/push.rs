//! Unsolicited messages: one-way messages, either way, and requests of the server to its client. The same on
//! both ends and over every transport.
//!
//! Neither side sends more of these than was granted in the handshake ([`PushWindows`]), so each queue here
//! has a bound, and a side that does not take them stops nothing else on the connection. A one-way message
//! counts until the program of the other side has released it. What it has released it says in receipts,
//! which count: one stands for all before it. They go out when half of the window has been released, and for
//! a message whose sender wants one at once.
//!
//! Nothing here does I/O.

use std::collections::VecDeque;
use std::fmt;

use crate::body::Body;
use crate::error::{Status, Violation};
use crate::handshake::PushWindows;
use crate::message::{self, BODY_BYTES_MAX, Kind, Receipt, RemoteRegion, RequestHeader, ResponseHeader};

/// A one-way message, as it is given to a connection.
#[derive(Clone, Copy, Debug)]
pub struct OneWay<'a> {
    /// At most [`BODY_BYTES_MAX`] bytes.
    pub message: &'a [u8],
    /// The caller's: its receipt has it, if one is wanted.
    pub tag: u64,
    /// The caller wants to know when the other side's program has released it.
    pub wants_receipt: bool,
}

/// Why something was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotPushed {
    /// As much is under way as was granted. Try again after a receipt, or an answer.
    Full,
    /// None was granted, or the other side takes no more.
    Refused,
    /// The connection has ended, or there is none now.
    Closed,
}

impl fmt::Display for NotPushed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "as many one-way messages or requests are under way as were granted",
            Self::Refused => "the peer takes no one-way messages or requests",
            Self::Closed => "the connection has ended",
        })
    }
}

impl std::error::Error for NotPushed {}

/// Of what was not granted nothing is known.
fn granted(max: usize, kind: Kind) -> Result<(), Violation> {
    if max == 0 { Err(Violation::Kind(kind as u8)) } else { Ok(()) }
}

/// The one-way messages of one end of a connection, both ways.
#[derive(Debug, Default)]
pub(crate) struct OneWayFlow {
    /// The most that are sent and not released.
    out_max: usize,
    /// Those: the callers' tags, of those that want a receipt.
    sent: VecDeque<Option<u64>>,
    /// How many the peer has released before these.
    released_by_peer: u64,
    /// The peer takes no more.
    is_refused: bool,

    /// The most that are received and whose release the peer has not been told of.
    in_max: usize,
    received: u64,
    released: u64,
    /// What the latest receipt said.
    told: u64,
    /// The latest message that wants a receipt.
    wanted: u64,
    /// This side takes no more.
    refuses: bool,
}

impl OneWayFlow {
    /// Of the client's end.
    pub fn of_client(windows: &PushWindows) -> Self {
        Self { out_max: windows.to_server.into(), in_max: windows.to_client.into(), ..Self::default() }
    }

    /// Of the server's end.
    pub fn of_server(windows: &PushWindows) -> Self {
        Self { out_max: windows.to_client.into(), in_max: windows.to_server.into(), ..Self::default() }
    }

    /// How many more can be sent now.
    pub fn room(&self) -> usize {
        if self.is_refused { 0 } else { self.out_max - self.sent.len() }
    }

    /// How many were received and not released.
    pub fn held(&self) -> usize {
        (self.received - self.released) as usize
    }

    /// Appends a message to `out`.
    ///
    /// # Panics
    /// If it is too long.
    pub fn send(&mut self, push: OneWay<'_>, crc: bool, out: &mut Vec<u8>) -> Result<(), NotPushed> {
        assert!(push.message.len() <= BODY_BYTES_MAX, "a one-way message is too long");
        if self.is_refused || self.out_max == 0 {
            return Err(NotPushed::Refused);
        }
        if self.room() == 0 {
            return Err(NotPushed::Full);
        }
        self.sent.push_back(push.wants_receipt.then_some(push.tag));
        message::encode_one_way(push.message, push.wants_receipt, crc, out);
        Ok(())
    }

    /// The peer has released messages: `receipted` gets the tags of those that wanted a receipt. Returns
    /// whether it takes no more from now on.
    pub fn on_receipt(
        &mut self,
        receipt: Receipt,
        mut receipted: impl FnMut(u64),
    ) -> Result<bool, Violation> {
        granted(self.out_max, Kind::Receipt)?;
        let released = receipt.released.checked_sub(self.released_by_peer).ok_or(Violation::Credits)?;
        // One that says nothing new would have no bound.
        let is_news = released > 0 || receipt.is_last;
        if self.is_refused || !is_news || released > self.sent.len() as u64 {
            return Err(Violation::Credits);
        }
        self.released_by_peer = receipt.released;
        self.sent.drain(..released as usize).flatten().for_each(&mut receipted);
        self.is_refused = receipt.is_last;
        if self.is_refused {
            self.sent.clear();
        }
        Ok(self.is_refused)
    }

    /// A message has come. Returns whether the program gets it; if it does it releases it once.
    pub fn on_message(&mut self, wants_receipt: bool) -> Result<bool, Violation> {
        granted(self.in_max, Kind::OneWay)?;
        if self.received - self.told >= self.in_max as u64 {
            return Err(Violation::Credits);
        }
        self.received += 1;
        if wants_receipt {
            self.wanted = self.received;
        }
        Ok(!self.refuses)
    }

    /// The program is done with the oldest that it has got and not released. Appends a receipt to `out` if
    /// one is due.
    ///
    /// # Panics
    /// If there is none.
    pub fn release(&mut self, crc: bool, out: &mut Vec<u8>) {
        if self.refuses {
            return;
        }
        assert!(self.released < self.received, "a one-way message is released once");
        self.released += 1;
        let half = (self.in_max as u64 / 2).max(1);
        if self.released <= self.wanted || self.released - self.told >= half {
            self.told = self.released;
            self.tell(crc, out);
        }
    }

    /// The program takes no more, for the life of the connection.
    pub fn refuse(&mut self, crc: bool, out: &mut Vec<u8>) {
        if self.in_max > 0 && !std::mem::replace(&mut self.refuses, true) {
            // The peer's window does not open any more: what is under way is within it.
            self.tell(crc, out);
        }
    }

    fn tell(&self, crc: bool, out: &mut Vec<u8>) {
        let receipt = Receipt { released: self.released, is_last: self.refuses };
        message::encode_receipt(receipt, crc, out);
    }
}

/// The requests of a server that its client has not answered, on the server's side.
#[derive(Debug, Default)]
pub(crate) struct ServerRequests {
    max: usize,
    /// Their ids and the caller's tags. There are few.
    outstanding: Vec<(u64, u64)>,
    next: u64,
}

/// A client's answer to a request of its server's.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The caller's, from the request.
    pub tag: u64,
    /// How it went.
    pub status: Status,
    /// What the request's meaning says.
    pub result: u64,
    /// The same, padded to a multiple of 8 bytes.
    pub body: Body,
}

impl ServerRequests {
    pub fn new(windows: &PushWindows) -> Self {
        Self { max: windows.requests.into(), ..Self::default() }
    }

    /// Appends a request to `out`.
    ///
    /// # Panics
    /// If it is too long.
    pub fn send(&mut self, tag: u64, body: &[u8], crc: bool, out: &mut Vec<u8>) -> Result<(), NotPushed> {
        assert!(body.len() <= BODY_BYTES_MAX, "a request is too long");
        if self.max == 0 {
            return Err(NotPushed::Refused);
        }
        if self.outstanding.len() == self.max {
            return Err(NotPushed::Full);
        }
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        self.outstanding.push((id, tag));
        RequestHeader::of_command(id).encode(body, crc, out);
        Ok(())
    }

    /// The client has answered.
    pub fn on_response(&mut self, response: &ResponseHeader, body: &[u8]) -> Result<Answer, Violation> {
        granted(self.max, Kind::Response)?;
        let at =
            self.outstanding.iter().position(|(id, _)| *id == response.id).ok_or(Violation::RequestId)?;
        if response.data_len != 0 || response.credits != 1 || response.has_crc {
            return Err(Violation::Field);
        }
        let (_, tag) = self.outstanding.swap_remove(at);
        Ok(Answer { tag, status: response.status, result: response.result, body: body.into() })
    }
}

/// The requests of its server that a client has not answered, on the client's side.
#[derive(Debug, Default)]
pub(crate) struct Unanswered {
    max: usize,
    ids: Vec<u64>,
}

impl Unanswered {
    pub fn new(windows: &PushWindows) -> Self {
        Self { max: windows.requests.into(), ids: Vec::new() }
    }

    /// A request has come.
    pub fn on_request(&mut self, request: &RequestHeader) -> Result<(), Violation> {
        granted(self.max, Kind::Request)?;
        if self.ids.len() == self.max {
            return Err(Violation::Credits);
        }
        if self.ids.contains(&request.id) {
            return Err(Violation::RequestId);
        }
        if request.data_len != 0 || request.region != RemoteRegion::None || request.has_crc {
            return Err(Violation::Field);
        }
        self.ids.push(request.id);
        Ok(())
    }

    /// Appends the answer to `out`.
    ///
    /// # Panics
    /// If the request is not there, or was answered before, or the answer is too long.
    pub fn answer(&mut self, id: u64, answer: (Status, u64, &[u8]), crc: bool, out: &mut Vec<u8>) {
        let (status, result, body) = answer;
        assert!(body.len() <= BODY_BYTES_MAX, "an answer is too long");
        let at = self.ids.iter().position(|other| *other == id).expect("a request is answered once");
        self.ids.swap_remove(at);
        let response = ResponseHeader { status, result, ..ResponseHeader::of_data(id, 0) };
        response.encode(body, crc, out);
    }
}

#[cfg(test)]
mod tests;
