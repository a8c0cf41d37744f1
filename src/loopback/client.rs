//! The client's side of the in-process transport.
//!
//! While a request is in flight its buffers are in the link, where the server reaches them; they come back
//! with the reply.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::link::{Access, End, Rejected};
use crate::error::{Class, Error, Status, Violation};
use crate::handshake::{Grant, Offer};
use crate::keepalive::{Action, Keepalive};
use crate::memory::Buffers;
use crate::message::{self, DataCrc, Limits, Message, Parsed, RemoteRegion};
use crate::transport::{Body, Bulk, ClientCounters, ClientTransport, NotSent, Outstanding, Reply, RequestId};

/// Receives posted beyond one for each credit: the server's pings, pongs and its goaway.
const CONTROL_MESSAGES: usize = 8;

/// A connection to a [`super::Server`].
#[derive(Debug)]
pub struct Client {
    /// None once the connection has ended.
    end: Option<End>,
    /// Polled in place of the end's when that has gone.
    eventfd: Arc<OwnedFd>,
    grant: Grant,
    limits: Limits,
    outstanding: Outstanding<Pending>,
    /// What [`ClientTransport::flush`] is to send.
    queue: VecDeque<(Option<RequestId>, Vec<u8>)>,
    keepalive: Keepalive,
    failure: Option<Error>,
    /// How requests end that the failure takes with it.
    lost: Status,
    counters: ClientCounters,
}

#[derive(Debug)]
struct Pending {
    tag: u64,
    bulk: Held,
}

/// Where the buffers of a request are.
#[derive(Debug)]
enum Held {
    /// Here: there are none, or they travel in the request.
    Here(Bulk),
    /// In the link, for the server to place data in.
    In(u32),
    /// In the link, for the server to fetch from.
    Out(u32),
}

impl Client {
    /// Shakes hands with the server at the other end of the link, by `deadline`.
    pub fn from_end(end: End, offer: &Offer, deadline: Instant) -> Result<Self, Error> {
        let closed = |errno, text: &str| Error::Closed {
            errno,
            text: format!("{text}. Check that the other end of the link is a loopback::Server's"),
        };
        end.send(offer.hello())
            .map_err(|_| closed(libc::ECONNRESET, "the server went away before the handshake"))?;
        let grant = loop {
            end.look();
            if let Some(welcome) = end.receive() {
                match offer.grant(&welcome)? {
                    Parsed::Item(grant, taken) if taken == welcome.len() => break grant,
                    Parsed::Item(..) | Parsed::Need(_) => return Err(Violation::Length.into()),
                }
            }
            if end.has_lost_peer() {
                return Err(closed(libc::ECONNRESET, "the server went away during the handshake"));
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(closed(libc::ETIMEDOUT, "the server did not finish the handshake in time"));
            }
            match poll(end.eventfd().as_fd(), Some(deadline - now)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Error::io("Cannot wait for the server", errno)),
            }
        };
        end.set_receives(grant.credits() as usize + CONTROL_MESSAGES);
        Ok(Self {
            eventfd: Arc::clone(end.eventfd()),
            end: Some(end),
            grant,
            limits: grant.limits(),
            outstanding: Outstanding::new(&grant),
            queue: VecDeque::new(),
            keepalive: Keepalive::new(&grant, Instant::now()),
            failure: None,
            lost: Status::OK,
            counters: ClientCounters::default(),
        })
    }

    /// How long the server may be silent while something is outstanding before the connection ends with
    /// ETIMEDOUT. It is pinged in between. Default: three times the keepalive granted.
    pub fn set_request_timeout(&mut self, timeout: Duration) {
        self.keepalive.set_request_timeout(timeout);
    }

    fn fail(&mut self, error: Error, lost: Status) {
        if self.failure.is_some() {
            return;
        }
        if let (Error::Violation(violation), Some(end)) = (&error, &self.end) {
            let mut goaway = Vec::new();
            let status = Status::protocol(violation.errno());
            message::encode_goaway(status, &violation.to_string(), self.limits.crc, &mut goaway);
            let _ = end.send(goaway);
        }
        self.failure = Some(error);
        self.lost = lost;
        self.queue.clear();
    }

    fn fail_violation(&mut self, violation: Violation) {
        let lost = match violation.errno() {
            libc::ETIMEDOUT => Status::transport(libc::ETIMEDOUT),
            errno => Status::protocol(errno),
        };
        self.fail(violation.into(), lost);
    }

    fn fail_lost(&mut self, errno: i32, why: &str) {
        let text = format!("{why}. Connect anew");
        self.fail(Error::Closed { errno, text }, Status::transport(errno));
    }

    /// Moves everything outstanding to `replies`, after a failure, and lets go of the link.
    fn hand_out_lost(&mut self, replies: &mut Vec<Reply>) {
        let Some(end) = self.end.take() else { return };
        for pending in self.outstanding.drain() {
            replies.push(Reply {
                tag: pending.tag,
                status: self.lost,
                result: 0,
                body: Body::from(&[][..]),
                data_len: 0,
                bulk: taken_back(&end, pending.bulk),
            });
        }
    }

    /// Takes in one message.
    fn take_in(&mut self, message: &[u8], replies: &mut Vec<Reply>) -> Result<(), Violation> {
        let Parsed::Item(parsed, taken) = message::parse(message, &self.limits)? else {
            return Err(Violation::Length);
        };
        // Data does not travel in responses: it has been placed.
        if taken != message.len() {
            return Err(Violation::Length);
        }
        match parsed {
            Message::Response(response, body) => replies.push(self.finish(&response, body)?),
            Message::Ping(id) => {
                let mut pong = Vec::new();
                message::encode_pong(id, self.limits.crc, &mut pong);
                self.queue.push_back((None, pong));
                self.flush();
                if self.queue.len() > self.grant.credits() as usize + CONTROL_MESSAGES {
                    return Err(Violation::Stalled);
                }
            }
            Message::Pong(id) if self.keepalive.permits_pong(id) => {}
            Message::Pong(_) => return Err(Violation::RequestId),
            Message::Goaway(status, text) => {
                let text = message::text(text);
                let lost = match status.class {
                    Class::Protocol => status,
                    _ => Status::transport(libc::ECONNRESET),
                };
                let errno = if status.is_ok() { libc::ECONNRESET } else { status.errno };
                self.fail(Error::Closed { errno, text }, lost);
            }
            Message::Request(..) => return Err(Violation::Kind(message::Kind::Request as u8)),
            Message::QueuePair(..) => return Err(Violation::Kind(message::Kind::QueuePair as u8)),
        }
        Ok(())
    }

    fn finish(&mut self, response: &message::Response, body: &[u8]) -> Result<Reply, Violation> {
        let id = RequestId(response.id);
        if self.queue.iter().any(|(queued, _)| *queued == Some(id)) {
            return Err(Violation::RequestId);
        }
        let pending = self.outstanding.get(id).ok_or(Violation::RequestId)?;
        let key = if let Held::In(key) = pending.bulk { Some(key) } else { None };
        let data_len = response.data_len as usize;
        let mut placed = None;
        // Checks come before the request ends, so that a violation finds it outstanding and ends it with the
        // others.
        if let (Some(key), Some(end)) = (key, &self.end) {
            let buffers = end.withdraw(key).ok_or(Violation::RequestId)?;
            let wrong = if data_len > buffers.len() {
                Some(Violation::Length)
            } else if self.limits.crc && crc_of(&buffers, data_len) != response.data_crc {
                Some(Violation::Checksum)
            } else {
                None
            };
            if let Some(violation) = wrong {
                if let Some(pending) = self.outstanding.get_mut(id) {
                    pending.bulk = Held::Here(Bulk::In(buffers));
                }
                return Err(violation);
            }
            placed = Some(Bulk::In(buffers));
        } else if data_len > 0 || response.data_crc != 0 {
            return Err(Violation::Length);
        }
        let pending = match self.outstanding.finish(id, response.credits) {
            Ok(pending) => pending,
            Err(violation) => {
                if let (Some(bulk), Some(pending)) = (placed, self.outstanding.get_mut(id)) {
                    pending.bulk = Held::Here(bulk);
                }
                return Err(violation);
            }
        };
        let bulk = match (placed, &self.end) {
            (Some(bulk), _) => bulk,
            (None, Some(end)) => taken_back(end, pending.bulk),
            (None, None) => Bulk::None,
        };
        Ok(Reply {
            tag: pending.tag,
            status: response.status,
            result: response.result,
            body: Body::from(body),
            data_len,
            bulk,
        })
    }

    /// Pings a server that has been silent for long. Whether it has been silent for too long; if so, and
    /// nothing has arrived, it is given up.
    fn has_timed_out(&mut self, now: Instant) -> bool {
        if self.failure.is_some() {
            return false;
        }
        let verdict = self.keepalive.action(now, !self.outstanding.is_empty());
        if verdict == Action::Ping {
            self.queue_ping(now);
            self.flush();
        }
        verdict == Action::TimedOut
    }

    fn queue_ping(&mut self, now: Instant) {
        let id = self.keepalive.on_ping(now);
        let mut ping = Vec::new();
        message::encode_ping(id, self.limits.crc, &mut ping);
        self.queue.push_back((None, ping));
    }
}

/// The buffers of a request that is over.
fn taken_back(end: &End, held: Held) -> Bulk {
    match held {
        Held::Here(bulk) => bulk,
        Held::In(key) => end.withdraw(key).map_or(Bulk::None, Bulk::In),
        Held::Out(key) => end.withdraw(key).map_or(Bulk::None, Bulk::Out),
    }
}

fn crc_of(buffers: &Buffers, len: usize) -> u32 {
    let mut crc = DataCrc::default();
    buffers.slices(0..len).for_each(|slice| crc.update(slice));
    crc.finish()
}

/// Whether it became readable in time.
fn poll(fd: BorrowedFd<'_>, timeout: Option<Duration>) -> Result<bool, rustix::io::Errno> {
    let timeout =
        timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: i64::from(t.subsec_nanos()) });
    Ok(rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], timeout.as_ref())? > 0)
}

impl ClientTransport for Client {
    fn grant(&self) -> &Grant {
        &self.grant
    }

    fn send(&mut self, tag: u64, body: &[u8], bulk: Bulk, control: bool) -> Result<RequestId, NotSent> {
        let Some(end) = self.end.as_ref().filter(|_| self.failure.is_none()) else {
            return Err(NotSent(bulk));
        };
        assert!(
            bulk.len_out().max(bulk.len_in()) <= self.limits.data_bytes_max as usize
                && body.len() <= message::BODY_BYTES_MAX,
            "a request exceeds the grant"
        );
        if self.outstanding.is_empty() {
            self.keepalive.on_send(Instant::now());
        }
        let id = match self.outstanding.insert(Pending { tag, bulk: Held::Here(bulk) }, control) {
            Ok(id) => id,
            Err(Pending { bulk: Held::Here(bulk), .. }) => return Err(NotSent(bulk)),
            Err(_) => unreachable!("it was put in as Here"),
        };
        let Some(pending) = self.outstanding.get_mut(id) else { unreachable!("it was just put in") };
        let mut request =
            message::Request { id: id.0, body_len: 0, data_len: 0, region: RemoteRegion::None, data_crc: 0 };
        let mut inline = Vec::new();
        let Held::Here(bulk) = std::mem::replace(&mut pending.bulk, Held::Here(Bulk::None)) else {
            unreachable!("it was put in as Here")
        };
        pending.bulk = match bulk {
            Bulk::None => Held::Here(Bulk::None),
            Bulk::In(buffers) => {
                let len = buffers.len() as u32;
                let key = end.lay_open(Access::Write, buffers);
                request.region = RemoteRegion::In { address: 0, key, len };
                Held::In(key)
            }
            Bulk::Out(buffers) => {
                let len = buffers.len();
                if self.limits.crc {
                    request.data_crc = crc_of(&buffers, len);
                }
                if len <= self.grant.inline_bytes_max as usize {
                    buffers.slices(0..len).for_each(|slice| inline.extend_from_slice(slice));
                    request.data_len = len as u32;
                    Held::Here(Bulk::Out(buffers))
                } else {
                    let key = end.lay_open(Access::Read, buffers);
                    request.region = RemoteRegion::Out { address: 0, key, len: len as u32 };
                    Held::Out(key)
                }
            }
        };
        let mut message = Vec::new();
        request.encode(body, self.limits.crc, &mut message);
        message.append(&mut inline);
        self.queue.push_back((Some(id), message));
        Ok(id)
    }

    fn dequeue(&mut self, request: RequestId) -> Option<Bulk> {
        let at = self.queue.iter().position(|(id, _)| *id == Some(request))?;
        self.queue.remove(at);
        let pending = self.outstanding.finish(request, 1).ok()?;
        Some(taken_back(self.end.as_ref()?, pending.bulk))
    }

    fn flush(&mut self) {
        let Some(end) = &self.end else { return };
        self.counters.sends += u64::from(!self.queue.is_empty());
        while let Some((id, message)) = self.queue.pop_front() {
            match end.send(message) {
                Ok(()) => {}
                Err(Rejected::Full(message)) => {
                    self.queue.push_front((id, message));
                    return;
                }
                // The next `receive` finds out.
                Err(Rejected::Gone) => self.queue.clear(),
            }
        }
    }

    fn receive(&mut self, replies: &mut Vec<Reply>) -> bool {
        let before = replies.len();
        let mut arrived = false;
        if let Some(end) = &self.end {
            end.look();
            if !self.queue.is_empty() {
                self.flush();
            }
        }
        while self.failure.is_none()
            && let Some(end) = &self.end
        {
            // Asked before the inbox is looked into: what the server sent before it went is taken in.
            let gone = end.has_lost_peer();
            if let Some(message) = end.receive() {
                arrived = true;
                self.keepalive.on_receive(Instant::now());
                if let Err(violation) = self.take_in(&message, replies) {
                    self.fail_violation(violation);
                }
            } else if gone {
                self.fail_lost(libc::ECONNRESET, "the server closed it");
            } else {
                break;
            }
        }
        self.counters.receives += u64::from(arrived);
        if !arrived && self.has_timed_out(Instant::now()) {
            self.fail_lost(libc::ETIMEDOUT, "the server has been silent for too long");
        }
        if self.failure.is_some() {
            self.hand_out_lost(replies);
        }
        arrived || replies.len() > before
    }

    fn wait(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        self.flush();
        loop {
            let now = Instant::now();
            if self.has_timed_out(now)
                || self.failure.is_some()
                || deadline.is_some_and(|deadline| now >= deadline)
            {
                return Ok(());
            }
            let until =
                deadline.into_iter().chain(self.keepalive.deadline(!self.outstanding.is_empty())).min();
            let left = until.map(|until| until.saturating_duration_since(now));
            match poll(self.eventfd.as_fd(), left) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(errno) => return Err(Error::io("Waiting for the server was interrupted", errno)),
            }
        }
    }

    fn poll_fd(&mut self) -> (BorrowedFd<'_>, bool) {
        (self.eventfd.as_fd(), false)
    }

    fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    fn credits(&self) -> usize {
        self.outstanding.credits()
    }

    fn failure(&self) -> Option<&Error> {
        self.failure.as_ref()
    }

    fn ping(&mut self, timeout: Duration) {
        if self.failure.is_none() {
            let now = Instant::now();
            self.queue_ping(now);
            self.keepalive.expect_by(now + timeout);
            self.flush();
        }
    }

    fn last_rx(&self) -> Instant {
        self.keepalive.last_rx()
    }

    fn abort(&mut self, violation: Violation) {
        self.fail_violation(violation);
    }

    fn counters(&self) -> ClientCounters {
        self.counters
    }
}
