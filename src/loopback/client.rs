//! The client's side of the in-process transport.
//!
//! While a request is in flight its buffers are in the link, where the server reaches them; they come back
//! with the reply.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::link::{Access, LoopbackEnd, Rejected};
use crate::client::{Core, Exposed, Wait, timespec};
use crate::connecting::{Awaited, Connecting, finish};
use crate::error::{Error, Violation};
use crate::handshake::{Grant, Offer};
use crate::message::{Parsed, RemoteRegion};
use crate::transport::{Bulk, ClientCore, ClientTransport, NotSent, Reply, RequestId, SendOptions};

/// Receives posted beyond one for each credit: the server's pings, pongs and its goaway.
const CONTROL_MESSAGES: usize = 8;

/// A connection to a [`super::LoopbackServer`].
#[derive(Debug)]
pub struct LoopbackClient {
    /// None once the connection has ended.
    end: Option<LoopbackEnd>,
    /// Polled in place of the end's when that has gone.
    eventfd: Arc<OwnedFd>,
    core: Core<Option<Lease>>,
}

/// What is in the link, for the server to reach, under which key.
#[derive(Clone, Copy, Debug)]
struct Lease {
    access: Access,
    key: u32,
}

/// A connection to a [`super::LoopbackServer`] that is being made.
#[derive(Debug)]
pub struct LoopbackDial {
    /// None once it is over.
    end: Option<LoopbackEnd>,
    /// To be sent first.
    hello: Option<Vec<u8>>,
    offer: Offer,
    deadline: Instant,
}

impl LoopbackDial {
    /// Shakes hands with the server at the other end of the link, by `deadline`. The first step begins.
    pub fn new(end: LoopbackEnd, offer: &Offer, deadline: Instant) -> Self {
        Self { end: Some(end), hello: Some(offer.hello()), offer: offer.clone(), deadline }
    }

    fn go_on(&mut self, now: Instant) -> Result<Option<LoopbackClient>, Error> {
        let closed = |errno, text: &str| Error::Closed {
            errno,
            text: format!("{text}. Check that the other end of the link is a loopback::LoopbackServer's"),
        };
        let Some(end) = &self.end else { return Ok(None) };
        if let Some(hello) = self.hello.take() {
            end.send(hello)
                .map_err(|_| closed(libc::ECONNRESET, "the server went away before the handshake"))?;
        }
        end.look();
        // Asked before the inbox is looked into: what the server sent before it went is taken in.
        let gone = end.has_lost_peer();
        if let Some(welcome) = end.receive() {
            return match self.offer.grant(&welcome)? {
                Parsed::Item(grant, taken) if taken == welcome.len() => {
                    Ok(self.end.take().map(|end| LoopbackClient::new(end, grant, now)))
                }
                Parsed::Item(..) | Parsed::Need(_) => Err(Violation::Length.into()),
            };
        }
        if gone {
            return Err(closed(libc::ECONNRESET, "the server went away during the handshake"));
        }
        if now >= self.deadline {
            return Err(closed(libc::ETIMEDOUT, "the server did not finish the handshake in time"));
        }
        Ok(None)
    }
}

impl Connecting for LoopbackDial {
    type Outcome = Result<LoopbackClient, Error>;

    fn step(&mut self, now: Instant) -> Option<Self::Outcome> {
        self.go_on(now).transpose()
    }

    fn awaited(&mut self) -> Vec<Awaited<'_>> {
        self.end.iter().map(|end| Awaited::input(end.eventfd().as_fd())).collect()
    }

    fn step_by(&self) -> Instant {
        self.deadline
    }
}

impl LoopbackClient {
    /// Shakes hands with the server at the other end of the link, by `deadline`. Waits for it;
    /// [`LoopbackDial`] does not.
    pub fn from_end(end: LoopbackEnd, offer: &Offer, deadline: Instant) -> Result<Self, Error> {
        finish(&mut LoopbackDial::new(end, offer, deadline))
    }

    /// The client of a connection that was granted this at `now`.
    fn new(end: LoopbackEnd, grant: Grant, now: Instant) -> Self {
        end.set_receives(grant.messages_max() + CONTROL_MESSAGES);
        Self { eventfd: Arc::clone(end.eventfd()), end: Some(end), core: Core::new(grant, now) }
    }

    /// Sends what is queued, as far as the other end takes it.
    fn send_queue(&mut self) {
        let Some(end) = &self.end else { return };
        self.core.counters.sends += u64::from(self.core.has_unsent());
        while let Some(unsent) = self.core.front() {
            let mut message = unsent.head.to_vec();
            if let Some(buffers) = unsent.data {
                buffers.slices(0..buffers.len()).for_each(|slice| message.extend_from_slice(slice));
            }
            let len = message.len();
            match end.send(message) {
                Ok(()) => self.core.on_sent(len),
                // If it has gone the next `receive` finds out.
                Err(Rejected::Full(_) | Rejected::Gone) => return,
            }
        }
    }

    /// Takes in one message.
    fn take_in(&mut self, message: &[u8], replies: &mut Vec<Reply>) {
        let mut taken = 0;
        loop {
            let end = self.end.as_ref();
            let progress = self.core.on_messages(&message[taken..], replies, |bulk, lease, _| {
                reclaim(end, bulk, lease);
                0
            });
            taken += progress.taken;
            if !progress.flush {
                return;
            }
            self.send_queue();
            if taken == message.len() {
                return;
            }
        }
    }

    /// Does what is left to be done when the connection has just ended.
    fn end(&mut self) {
        let goaway = self.core.take_ending().and_then(|ending| ending.goaway);
        if let (Some(goaway), Some(end)) = (goaway, &self.end) {
            let _ = end.send(goaway);
        }
    }
}

/// Brings a request's buffers back from the link, if they are there.
fn reclaim(end: Option<&LoopbackEnd>, bulk: &mut Bulk, lease: &mut Option<Lease>) {
    if let (Some(Lease { access, key }), Some(end)) = (lease.take(), end)
        && let Some(buffers) = end.withdraw(key)
    {
        *bulk = match access {
            Access::Write => Bulk::In(buffers),
            Access::Read => Bulk::Out(buffers),
        };
    }
}

/// Whether it became readable in time.
fn poll(fd: BorrowedFd<'_>, timeout: Option<Duration>) -> Result<bool, rustix::io::Errno> {
    let timeout = timeout.map(timespec);
    Ok(rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], timeout.as_ref())? > 0)
}

impl ClientTransport for LoopbackClient {
    fn core(&self) -> &dyn ClientCore {
        &self.core
    }

    fn core_mut(&mut self) -> &mut dyn ClientCore {
        &mut self.core
    }

    fn send(
        &mut self,
        tag: u64,
        body: &[u8],
        bulk: Bulk,
        options: SendOptions,
    ) -> Result<RequestId, NotSent> {
        let Some(end) = self.end.as_ref().filter(|_| self.core.may_send(body, bulk.len(), options)) else {
            return Err(NotSent(bulk));
        };
        let inline_bytes_max = self.core.grant().inline_bytes_max as usize;
        let exposed = match &bulk {
            Bulk::None => Exposed { region: RemoteRegion::None, data_len: 0, lease: None },
            Bulk::In(buffers) => {
                let (key, len) = (end.reserve_key(), buffers.len() as u32);
                let region = RemoteRegion::In { address: 0, key, len };
                Exposed { region, data_len: 0, lease: Some(Lease { access: Access::Write, key }) }
            }
            Bulk::Out(buffers) if buffers.len() <= inline_bytes_max => {
                Exposed { region: RemoteRegion::None, data_len: buffers.len(), lease: None }
            }
            Bulk::Out(buffers) => {
                let (key, len) = (end.reserve_key(), buffers.len() as u32);
                let region = RemoteRegion::Out { address: 0, key, len };
                Exposed { region, data_len: 0, lease: Some(Lease { access: Access::Read, key }) }
            }
        };
        let lease = exposed.lease;
        let id = self.core.send(tag, body, bulk, options, exposed)?;
        if let (Some(Lease { access, key }), Some(bulk)) = (lease, self.core.bulk_mut(id))
            && let Bulk::In(buffers) | Bulk::Out(buffers) = std::mem::replace(bulk, Bulk::None)
        {
            end.lay_open_as(key, access, buffers);
        }
        Ok(id)
    }

    fn dequeue(&mut self, request: RequestId) -> Option<Bulk> {
        let (mut bulk, mut lease) = self.core.dequeue(request)?;
        reclaim(self.end.as_ref(), &mut bulk, &mut lease);
        Some(bulk)
    }

    fn flush(&mut self) {
        if self.core.begins_to_owe() {
            self.core.on_owed(Instant::now());
        }
        self.send_queue();
    }

    fn receive(&mut self, replies: &mut Vec<Reply>) -> bool {
        let now = Instant::now();
        let before = replies.len();
        let mut arrived = false;
        if let Some(end) = &self.end {
            end.look();
            self.send_queue();
        }
        while !self.core.has_failed()
            && let Some(end) = &self.end
        {
            // Asked before the inbox is looked into: what the server sent before it went is taken in.
            let gone = end.has_lost_peer();
            if let Some(message) = end.receive() {
                arrived = true;
                self.take_in(&message, replies);
            } else if gone {
                self.core.fail_lost(libc::ECONNRESET, "the server closed it");
            } else {
                break;
            }
        }
        self.core.counters.receives += u64::from(arrived);
        if self.core.has_damaged() {
            self.send_damaged_again();
        }
        if arrived {
            self.core.on_receive(now, Instant::now);
        } else if self.core.on_silence(now, Instant::now) {
            self.send_queue();
        }
        if self.core.has_failed() {
            self.end();
            let end = self.end.take();
            self.core.hand_out_lost(replies, |bulk, lease, _| {
                reclaim(end.as_ref(), bulk, lease);
                0
            });
        }
        arrived || replies.len() > before
    }

    fn wait(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        self.send_queue();
        loop {
            match self.core.on_wait(Instant::now(), deadline) {
                Wait::Return => return Ok(()),
                Wait::Flush => self.send_queue(),
                Wait::Sleep(timeout) => match poll(self.eventfd.as_fd(), timeout) {
                    Ok(true) => return Ok(()),
                    Ok(false) => {}
                    Err(errno) => return Err(Error::io("Waiting for the server was interrupted", errno)),
                },
            }
        }
    }

    fn poll_fd(&mut self) -> (BorrowedFd<'_>, bool) {
        (self.eventfd.as_fd(), false)
    }

    fn abort(&mut self, violation: Violation) {
        self.core.fail_violation(violation);
        self.end();
    }
}
