//! The client's side of RDMA: one connection, used by one thread at a time.
//!
//! While a request is in flight its buffers are exposed to the server, for its direction only: memory that
//! was registered as it is, other memory through a bounce slot, which is counted. Small writes travel in
//! their request. The buffers come back with the reply, when the server's access to them is being
//! invalidated, if the device has memory windows; when the connection ends without one, the queue pair is
//! destroyed first, so that nothing lands in them afterwards.
//!
//! Nothing here starts a thread. [`ClientTransport::receive`] polls the completion queue in memory;
//! [`ClientTransport::wait`] arms it, polls once more, and sleeps on a descriptor that stands for the
//! completion channel, rdma_cm's events and the device's.
//!
//! What messages mean is the [`Core`]'s business, making the connection that of `connect`. Memory that the
//! server may reach is in `registration`, by which windows in `windows`, what is slept on in `descriptors`.

mod connect;
mod descriptors;
mod registration;
mod windows;

use std::os::fd::BorrowedFd;
use std::time::Instant;

pub use connect::{RdmaDial, Upgrade};

use super::MESSAGE_BYTES;
use super::cm::Kind;
use super::queue_pair::{Completion, Failure, QueuePair, WindowId};
use crate::client::{Core, Exposed, Wait};
use crate::connecting::Awaited;
use crate::error::{Error, Status, Violation};
use crate::handshake::Grant;
use crate::memory::{ArenaMemory, Region, Slot, process};
use crate::message::{self, RemoteRegion, ResponseHeader};
use crate::transport::{Bulk, ClientCore, ClientTransport, NotSent, Reply, RequestId, SendOptions};
use crate::tuning::{
    CLIENT_IDLE_CHECK_AFTER, RDMA_COMPANION_GRACE, RDMA_DESCRIPTORS_EVERY, RDMA_GOAWAY_TIME,
    RDMA_INLINE_BYTES_MAX, RDMA_INVALIDATE_TIME, RDMA_ROOM_EVERY,
};
use connect::Parts;
use descriptors::Descriptors;
use registration::{Key, Registration};
use windows::{Windows, await_invalidated};

/// A connection to a server over RDMA.
#[derive(Debug)]
pub struct RdmaClient {
    /// None once the connection has ended. First, so that it is destroyed before the memory that it uses.
    qp: Option<QueuePair>,
    core: Core<Lease>,
    registration: Registration,
    windows: Windows,
    descriptors: Descriptors,
    companion: Option<Companion>,
    /// rdma_cm's, if that has made the connection.
    local_port: Option<u16>,
    inline_bytes_max: usize,
    /// The message that is being taken in; kept for its memory.
    message: Vec<u8>,
    /// The process that connected: see [`process`].
    process: u64,
}

/// What belongs to a request while the server may reach its data.
#[derive(Debug, Default)]
struct Lease {
    /// What the server really reaches, if it is not the request's own memory.
    bounce: Option<Slot>,
    /// By what it reaches it, if the device has windows.
    window: Option<WindowId>,
}

/// The connection over which a queue pair was exchanged: it carries nothing more, and each ends with the
/// other.
struct Companion {
    transport: Box<dyn ClientTransport>,
    /// When that was found to have ended.
    ended: Option<Instant>,
}

impl std::fmt::Debug for Companion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Companion").field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl Companion {
    /// Why it has ended, and how requests end with it; once what is on its way by the queue pair has had its
    /// time, for that may say more.
    fn failure(&mut self, now: Instant) -> Option<(Error, Status)> {
        if self.transport.failure().is_none() {
            self.transport.receive(&mut Vec::new());
        }
        let failure = self.transport.failure()?;
        let ended = *self.ended.get_or_insert(now);
        if now.saturating_duration_since(ended) < RDMA_COMPANION_GRACE {
            return None;
        }
        let (errno, text) = match failure {
            Error::Closed { errno, text } => (*errno, text.clone()),
            other => (other.errno(), other.to_string()),
        };
        let lost = match failure {
            Error::Violation(violation) => Status::protocol(violation.errno()),
            _ => Status::transport(libc::ECONNRESET),
        };
        Some((Error::Closed { errno, text }, lost))
    }
}

impl RdmaClient {
    /// A client of a connection that was granted this at `now`.
    fn assemble(
        parts: Parts,
        grant: Grant,
        mut companion: Option<Box<dyn ClientTransport>>,
        now: Instant,
    ) -> Result<Self, Error> {
        let Parts { mut qp, domain, channel, events, has_windows } = parts;
        qp.set_send_bytes_max(MESSAGE_BYTES + grant.inline_bytes_max as usize);
        let companion_fd = companion.as_mut().map(|companion| companion.poll_fd().0);
        let local_port = events.is_some().then(|| qp.id().local_port()).flatten();
        let descriptors = Descriptors::new(&domain, channel, events, companion_fd, now)
            .map_err(|source| Error::io("Cannot watch an RDMA connection", source))?;
        Ok(Self {
            qp: Some(qp),
            core: Core::new(grant, now),
            registration: Registration::new(domain, grant.data_bytes_max as usize, has_windows),
            windows: Windows::default(),
            descriptors,
            companion: companion.map(|transport| Companion { transport, ended: None }),
            local_port,
            inline_bytes_max: (grant.inline_bytes_max as usize).min(RDMA_INLINE_BYTES_MAX),
            message: Vec::with_capacity(MESSAGE_BYTES),
            process: process(),
        })
    }

    /// Whether the server has answered over the queue pair by `until`. None if that is not known yet: then
    /// [`RdmaClient::awaited`] tell when there is more to know.
    fn has_answered(&mut self, now: Instant, until: Instant) -> Option<bool> {
        loop {
            self.check_descriptors(now);
            self.receive(&mut Vec::new());
            if self.core.has_failed() {
                return Some(false);
            }
            if self.core.counters.receives > 0 {
                return Some(true);
            }
            if now >= until {
                self.core.fail_lost(libc::ETIMEDOUT, "the server has not answered in time");
                self.receive(&mut Vec::new());
                return Some(false);
            }
            let qp = self.qp.as_mut()?;
            if let Err(error) = self.descriptors.arm(qp) {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                self.core.fail_lost(errno, "the RDMA device does not announce completions");
            } else if !qp.look() {
                return None;
            }
        }
    }

    /// What a connection is polled by that is to prove itself. Not [`ClientTransport::poll_fd`], after which
    /// each call would take care that its descriptor is up to date.
    fn awaited(&mut self) -> Vec<Awaited<'_>> {
        let completions = self.descriptors.completions();
        let companion = self.companion.as_mut().map(|companion| companion.transport.poll_fd().0);
        companion.into_iter().chain([completions]).map(Awaited::input).collect()
    }

    // Receiving
    // ----------------------------------------------------------------------------------------------------

    /// Takes in what has completed. Whether anything had.
    fn take_completions(&mut self, now: Instant, replies: &mut Vec<Reply>) -> bool {
        let mut arrived = false;
        while !self.core.has_failed()
            && let Some(qp) = &mut self.qp
            && qp.look()
        {
            arrived = true;
            match qp.next() {
                Some(Completion::Received(message)) => {
                    // Copied, for the queue pair may be needed for an answer.
                    let mut bytes = std::mem::take(&mut self.message);
                    bytes.clear();
                    bytes.extend_from_slice(qp.bytes(&message));
                    qp.give_back(message);
                    self.take_in(&bytes, replies);
                    self.message = bytes;
                }
                Some(Completion::Placed { immediate, len, receive }) => {
                    qp.give_back(receive);
                    let response = ResponseHeader::of_data(immediate.into(), len);
                    self.core.on_placed(response, replies, reclaiming(&mut self.windows));
                }
                Some(Completion::Failed(failure)) => self.fail_work(failure, now),
                Some(Completion::Read(..)) | None => {}
            }
        }
        if arrived {
            self.core.on_receive(now, Instant::now);
            self.core.counters.receives += 1;
            if let Some(qp) = &mut self.qp
                && let Err(error) = qp.post_receives()
            {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                self.core.fail_lost(errno, "the RDMA device rejects receives");
            }
            if self.windows.has_over() {
                self.send_queue();
            }
        }
        arrived
    }

    /// Takes in a SEND: whole messages, one or more.
    fn take_in(&mut self, messages: &[u8], replies: &mut Vec<Reply>) {
        let mut taken = 0;
        loop {
            let reclaim = reclaiming(&mut self.windows);
            let progress = self.core.on_messages(&messages[taken..], replies, reclaim);
            taken += progress.taken;
            if progress.flush {
                self.send_queue();
            }
            if !progress.flush || taken == messages.len() || self.core.has_failed() {
                return;
            }
        }
    }

    /// Hears what the descriptors have to say: rdma_cm, the device, the TCP connection.
    fn check_descriptors(&mut self, now: Instant) {
        self.descriptors.take(now);
        if let Some((error, lost)) = self.companion.as_mut().and_then(|companion| companion.failure(now)) {
            self.core.fail(error, lost);
        }
        while let Some(event) = self.descriptors.next_event() {
            match event.kind {
                Kind::Disconnected | Kind::Rejected => {
                    // What came before is taken in first: it may say why.
                    let mut replies = Vec::new();
                    self.take_completions(now, &mut replies);
                    self.core.hand_out_later(replies);
                    self.core.fail_lost(libc::ECONNRESET, "the server closed it");
                }
                Kind::DeviceRemoved => self.core.fail_lost(libc::ENODEV, "its RDMA device was removed"),
                _ => {}
            }
        }
    }

    // Sending
    // ------------------------------------------------------------------------------------------------------

    /// Whether something waits for room in the queue pair.
    fn awaits_room(&self) -> bool {
        self.core.has_unsent() || self.windows.has_over()
    }

    /// Chains what is to be done about windows, and from the front of the queue, as far as there is room, and
    /// posts.
    fn send_queue(&mut self) {
        if !self.awaits_room() || self.core.has_failed() {
            return;
        }
        let Some(qp) = &mut self.qp else { return };
        if qp.is_half_full() {
            qp.look_at_sends();
        }
        let invalidates = self.windows.invalidate(qp);
        let may_send = self.windows.bind(qp);
        let mut sent = false;
        while may_send && let Some(unsent) = self.core.front() {
            let data_len = unsent.data.map_or(0, |buffers| buffers.len());
            let len = unsent.head.len() + data_len;
            if qp.room() == 0 || !qp.has_room_for(len) {
                break;
            }
            let slices = unsent.data.into_iter().flat_map(|buffers| buffers.slices(0..data_len));
            qp.send(std::iter::once(unsent.head).chain(slices), len);
            self.core.counters.bounced_bytes += data_len as u64;
            self.core.on_sent(len);
            sent = true;
        }
        self.core.counters.sends += u64::from(sent);
        if qp.has_chain() {
            // A registration comes free with the completion of what has invalidated its windows.
            let signal = invalidates || qp.is_half_full();
            if let Err(error) = qp.post(signal) {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                self.core.fail_lost(errno, "the RDMA device rejects work");
            }
        }
    }

    /// Lays a request's memory open, or has its data travel in the message.
    fn expose(&mut self, bulk: &Bulk) -> Result<Exposed<Lease>, Error> {
        let in_message = |data_len| Exposed { region: RemoteRegion::None, data_len, lease: Lease::default() };
        let (buffers, is_in) = match bulk {
            Bulk::None => return Ok(in_message(0)),
            Bulk::Out(buffers) if buffers.len() <= self.inline_bytes_max => {
                return Ok(in_message(buffers.len()));
            }
            Bulk::In(buffers) => (buffers, true),
            Bulk::Out(buffers) => (buffers, false),
        };
        let reached = self.registration.expose(buffers, is_in)?;
        if !is_in && reached.bounce.is_some() {
            self.core.counters.bounced_bytes += buffers.len() as u64;
        }
        let (address, len) = (reached.address, buffers.len() as u32);
        let (window, key) = match (reached.key, &mut self.qp) {
            (Key::OfAll(key), _) => (None, key),
            (Key::OfWindow(mr), Some(qp)) => {
                let (window, key) = self.windows.open(qp, mr, address, buffers.len(), is_in)?;
                (Some(window), key)
            }
            (Key::OfWindow(_), None) => unreachable!("nothing is sent by a connection that has ended"),
        };
        let region = match is_in {
            true => RemoteRegion::In { address, key, len },
            false => RemoteRegion::Out { address, key, len },
        };
        Ok(Exposed { region, data_len: 0, lease: Lease { bounce: reached.bounce, window } })
    }

    // The end
    // ------------------------------------------------------------------------------------------------------

    /// A work request has failed: the queue pair is dead. The reason may lie with the sends.
    fn fail_work(&mut self, failure: Failure, now: Instant) {
        let mut first = failure;
        if let Some(qp) = &mut self.qp {
            qp.look_at_sends();
            while let Some(completion) = qp.next() {
                if let Completion::Failed(failure) = completion
                    && first.is_flush()
                {
                    first = failure;
                }
            }
        }
        if first.is_flush() {
            self.check_descriptors(now);
            return self.core.fail_lost(libc::ECONNRESET, "the server closed it");
        }
        if first.is_length() {
            return self.core.fail_violation(Violation::Length);
        }
        let device = self.registration.device_name();
        self.core.fail_lost(first.errno(), &format!("the RDMA device {device} says: {}", first.text()));
    }

    /// Does what is left to be done when the connection has just ended.
    fn end(&mut self) {
        if let Some(goaway) = self.core.take_ending().and_then(|ending| ending.goaway) {
            self.send_and_wait(&goaway);
        }
    }

    /// From now on the server reaches nothing.
    fn end_queue_pair(&mut self) {
        if let Some(qp) = self.qp.take() {
            qp.disconnect();
        }
        self.windows.clear();
    }

    /// Tells the server that this is the end, and sees to it that it has heard.
    fn send_and_wait(&mut self, goaway: &[u8]) {
        let Some(qp) = &mut self.qp else { return };
        let deadline = Instant::now() + RDMA_GOAWAY_TIME;
        if !sends_until(qp, deadline, |qp| qp.room() > 0 && qp.has_room_for(goaway.len())) {
            return;
        }
        qp.send(std::iter::once(goaway), goaway.len());
        if qp.post(true).is_ok() {
            sends_until(qp, deadline, QueuePair::is_idle);
        }
    }
}

/// Polls for completions of sends until the condition is true. Returns false if the deadline passes or the
/// queue pair fails before.
fn sends_until(qp: &mut QueuePair, deadline: Instant, condition: impl Fn(&QueuePair) -> bool) -> bool {
    loop {
        qp.look_at_sends();
        if condition(qp) {
            return true;
        }
        if Instant::now() >= deadline || matches!(qp.next(), Some(Completion::Failed(_))) {
            return false;
        }
        std::thread::yield_now();
    }
}

/// Takes back what the server could reach of a request that is answered: see [`reclaim`].
fn reclaiming(windows: &mut Windows) -> impl FnMut(&mut Bulk, &mut Lease, usize) -> usize {
    move |bulk, lease, data_len| {
        if let Some(window) = lease.window.take() {
            windows.close(window);
        }
        reclaim(bulk, lease, data_len)
    }
}

/// Copies data that the server has brought from a request's bounce slot to its buffers. Returns how much.
fn reclaim(bulk: &mut Bulk, lease: &mut Lease, data_len: usize) -> usize {
    match (bulk, &mut lease.bounce) {
        (Bulk::In(buffers), Some(slot)) if data_len <= buffers.len() => {
            buffers.write_at(0, &slot.bytes()[..data_len]);
            data_len
        }
        _ => 0,
    }
}

impl ClientTransport for RdmaClient {
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
        if !self.core.may_send(body, bulk.len(), options) {
            return Err(NotSent(bulk));
        }
        match self.expose(&bulk) {
            Ok(exposed) => self.core.send(tag, body, bulk, options, exposed),
            // It was taken, so it ends as a request does.
            Err(error) => self.core.send_failed(tag, bulk, Lease::default(), &error),
        }
    }

    fn dequeue(&mut self, request: RequestId) -> Option<Bulk> {
        let (bulk, lease) = self.core.dequeue(request)?;
        if let (Some(window), Some(qp)) = (lease.window, &mut self.qp) {
            self.windows.take_back(qp, window);
        }
        Some(bulk)
    }

    fn flush(&mut self) {
        if self.core.begins_to_owe() {
            let now = Instant::now();
            if now.saturating_duration_since(self.core.last_rx()) >= CLIENT_IDLE_CHECK_AFTER {
                // What is sent by a connection that has ended has an unknown outcome for no reason.
                self.check_descriptors(now);
            }
            self.core.on_owed(now);
        }
        self.send_queue();
    }

    fn receive(&mut self, replies: &mut Vec<Reply>) -> bool {
        let now = Instant::now();
        let before = replies.len();
        self.core.take_done(replies);
        let mut arrived = self.take_completions(now, replies);
        self.send_queue();
        while self.descriptors.is_watched()
            && !self.core.has_failed()
            && (arrived || !self.descriptors.is_armed())
        {
            // It must be armed, with nothing left behind.
            self.check_descriptors(now);
            let Some(qp) = self.qp.as_ref() else { break };
            // If it cannot be armed the next call tries again.
            let _ = self.descriptors.arm(qp);
            if !self.take_completions(now, replies) {
                break;
            }
            arrived = true;
        }
        if !arrived {
            if self.descriptors.taken_before(now, RDMA_DESCRIPTORS_EVERY) {
                self.check_descriptors(now);
            }
            if self.core.on_silence(now, Instant::now) {
                self.send_queue();
            }
        }
        if self.core.has_damaged() {
            self.send_damaged_again();
        }
        self.core.take_done(replies);
        if self.core.has_failed() {
            self.end();
            // The queue pair goes first: nothing lands in memory that its owner has back.
            self.end_queue_pair();
            self.companion = None;
            self.core.hand_out_lost(replies, reclaim);
        }
        arrived || replies.len() > before
    }

    fn wait(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        self.send_queue();
        loop {
            let timeout = match self.core.on_wait(Instant::now(), deadline) {
                Wait::Return => return Ok(()),
                Wait::Flush => {
                    self.send_queue();
                    continue;
                }
                // What would make room is not announced.
                Wait::Sleep(timeout) if self.awaits_room() => {
                    Some(timeout.map_or(RDMA_ROOM_EVERY, |timeout| timeout.min(RDMA_ROOM_EVERY)))
                }
                Wait::Sleep(timeout) => timeout,
            };
            let Some(qp) = &mut self.qp else { return Ok(()) };
            self.descriptors
                .arm(qp)
                .map_err(|source| Error::io("Cannot watch an RDMA connection", source))?;
            if qp.look() {
                return Ok(());
            }
            match self.descriptors.sleep(timeout) {
                Ok(true) => {
                    self.check_descriptors(Instant::now());
                    return Ok(());
                }
                Ok(false) if self.awaits_room() => {
                    if let Some(qp) = &mut self.qp {
                        qp.look_at_sends();
                    }
                    self.send_queue();
                }
                Ok(false) => {}
                Err(errno) => return Err(Error::io("Waiting for the server was interrupted", errno)),
            }
        }
    }

    fn poll_fd(&mut self) -> (BorrowedFd<'_>, bool) {
        if let Some(qp) = &mut self.qp {
            self.descriptors.watch(qp);
        }
        (self.descriptors.fd(), false)
    }

    fn register_region(&mut self, region: &Region) -> Result<(), Error> {
        self.registration.add_region(region)
    }

    fn unregister_region(&mut self, region: &Region) {
        let Some(mr) = self.registration.remove_region(region) else { return };
        self.send_queue();
        let Some(qp) = &mut self.qp else { return };
        let now = Instant::now();
        if !self.core.has_failed() && await_invalidated(qp, &mr, now + RDMA_INVALIDATE_TIME) {
            return;
        }
        // The server must not reach it when this returns.
        let mut replies = Vec::new();
        self.take_completions(now, &mut replies);
        self.core.hand_out_later(replies);
        self.core.fail_lost(libc::ETIMEDOUT, "the server's RDMA device does not answer");
        self.end();
        self.end_queue_pair();
    }

    fn register_arena(&mut self, arena: &ArenaMemory) -> Result<(), Error> {
        self.registration.add_arena(arena)
    }

    fn send_goaway(&mut self) {
        if self.core.has_failed() {
            return;
        }
        self.send_queue();
        let mut goaway = Vec::new();
        message::encode_goaway(Status::OK, "", self.core.grant().crc(), &mut goaway);
        self.send_and_wait(&goaway);
    }

    fn abort(&mut self, violation: Violation) {
        self.core.fail_violation(violation);
        self.end();
    }

    fn local_port(&self) -> Option<u16> {
        match &self.companion {
            Some(companion) => companion.transport.local_port(),
            None => self.local_port,
        }
    }
}

impl Drop for RdmaClient {
    fn drop(&mut self) {
        if self.process != process() {
            // A forked child's copy: the device's objects are its parent's, and so is the memory that it
            // cannot reach.
            std::mem::forget((self.qp.take(), self.companion.take()));
            self.windows.forget();
            self.registration.forget();
            self.descriptors.forget();
            return;
        }
        // What is unsent or unanswered is given up: it is not sent any more, and the server sees a client
        // that is lost.
        if !self.core.has_failed() && !self.core.is_owed() && self.core.grant().linger.is_zero() {
            self.send_goaway();
        }
        // Before the memory that it uses.
        self.end_queue_pair();
    }
}
