//! The client's half of the protocol, for every transport: what is outstanding, what is to be sent next, what
//! the server's messages mean, and when and how a connection ends.
//!
//! A [`Core`] does no I/O and does not read the clock: its transport moves bytes for it and tells the time.
//! A transport asks what to send ([`Core::unsent`], [`Core::front`]) and says how much of it has gone
//! ([`Core::on_sent`]); it hands in what has arrived ([`Core::on_bytes`] from a stream, [`Core::on_messages`]
//! where data is placed) and gets the replies; and where it would sleep it asks for how long
//! ([`Core::on_wait`]). When the connection ends, for whatever reason, [`Core::take_ending`] says what is
//! left to be done about it.
//!
//! The core owns the buffers of a request until the request is over: answered (or lost with the connection),
//! *and* its data sent. A server may answer before it has taken the data, with an error; then the reply waits
//! in `early`. The server is not trusted: whatever it sends is checked, and at most ends this connection.

mod outstanding;

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use rustix::event::Timespec;

use crate::error::{Class, Error, Status, Violation};
use crate::handshake::Grant;
use crate::keepalive::{Action, Keepalive};
use crate::memory::Buffers;
use crate::message::{
    self, Limits, Message, Parsed, QueuePairAddress, RemoteRegion, RequestHeader, ResponseHeader,
};
use crate::protocol::Opcode;
use crate::push::{NotPushed, OneWay, OneWayFlow, Unanswered};
use crate::trace::ClockSample;
use crate::transport::{
    Body, Bulk, ClientCore, ClientCounters, ClientEvent, Damaged, Lost, NotSent, Reply, RequestId,
    SendOptions, UsedIds,
};
use crate::tuning::{CLIENT_PONGS_MAX, CLIENT_SENT_HEAD_BYTES_MAX, DAMAGED_MAX, LARGE_BYTES};
use outstanding::{Outstanding, Sent};

/// A connection that has shaken hands. `L` is what the transport keeps with each request while the server may
/// reach its memory: nothing where the data travels with the messages.
#[derive(Debug)]
pub(crate) struct Core<L = ()> {
    grant: Grant,
    limits: Limits,
    outstanding: Outstanding<Pending<L>>,
    /// Outstanding requests that await at least [`LARGE_BYTES`], less those that await fewer.
    large: isize,
    /// Something has been outstanding since the clock was last looked at, and nothing was before.
    begins_to_owe: bool,

    /// Headers and commands of `queue`, in order, those already sent in front.
    head: Vec<u8>,
    /// Where in `head` the front of `queue` begins.
    head_at: usize,
    /// Messages not yet wholly sent.
    queue: VecDeque<Queued>,
    /// How many bytes of the front of `queue`, data included, have been sent.
    sent: usize,
    pongs_queued: usize,

    /// A response whose data is arriving.
    partial: Option<Held>,
    /// The reply to the request at the front of `queue`, whose data is not wholly sent.
    early: Option<Held>,
    /// Replies that have not yet been handed out.
    done: Vec<Reply>,
    upgrade: Upgrade,

    one_way: OneWayFlow,
    unanswered: Unanswered,
    /// Unsolicited messages of the server that have not yet been handed out.
    events: VecDeque<ClientEvent>,

    keepalive: Keepalive,
    failure: Option<Error>,
    /// How requests end that the failure takes with it.
    lost: Status,
    ending: Option<Ending>,
    /// What is outstanding at the end goes to `lost_requests`: [`ClientCore::keep_lost`].
    keeps_lost: bool,
    lost_requests: Vec<Lost>,
    /// Requests whose data has arrived damaged, to be sent again.
    damaged: Vec<Damaged>,
    /// The server has said that it has executed nothing that it has not answered.
    is_drained: bool,
    /// Some of them are the transport's to count.
    pub counters: ClientCounters,
}

/// An outstanding request.
#[derive(Debug)]
struct Pending<L> {
    tag: u64,
    bulk: Bulk,
    /// How many bytes its response may bring.
    region_len: u32,
    /// It is still in `queue`.
    queued: bool,
    /// How often its data has arrived damaged so far.
    damaged: u8,
    /// Its response must have checksums, though others have none.
    has_crc: bool,
    lease: L,
}

/// A message to be sent: so many bytes of `head`, then so many of the request's data.
#[derive(Debug)]
struct Queued {
    head_len: usize,
    data_len: usize,
    /// None for all that is no request.
    request: Option<RequestId>,
    pong: bool,
}

/// A response that waits for something, with what was sent of its request, whose slot may be used again.
#[derive(Debug)]
struct Held {
    partial: Partial,
    sent: Sent,
}

/// A response whose header has been taken in.
#[derive(Debug)]
struct Partial {
    reply: Reply,
    /// How much of its `data_len` is in place.
    placed: usize,
    has_crc: bool,
    /// The request was still in `queue`.
    queued: bool,
    /// See [`Pending::damaged`].
    damaged: u8,
    id: RequestId,
}

/// The move from a stream to a queue pair.
#[derive(Debug)]
enum Upgrade {
    /// The server must not tell where its queue pair is.
    None,
    /// It is to.
    Requested,
    Answered(Result<QueuePairAddress, Error>),
}

/// How the server gets the data of a request, or brings it.
#[derive(Debug)]
pub(crate) struct Exposed<L> {
    /// What it may reach by itself.
    pub region: RemoteRegion,
    /// Bytes that travel behind the command.
    pub data_len: usize,
    pub lease: L,
}

/// A whole message that is to be sent.
#[derive(Debug)]
pub(crate) struct Unsent<'a> {
    pub head: &'a [u8],
    /// The data that travels with it.
    pub data: Option<&'a Buffers>,
}

/// What was taken in of some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    pub taken: usize,
    /// There are pongs to be sent, before the rest is taken in.
    pub flush: bool,
}

/// What a caller does who would wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Come back: there is something to be received, or the deadline has come.
    Return,
    /// Send, and ask again.
    Flush,
    /// Sleep for at most this long, if anything limits it.
    Sleep(Option<Duration>),
}

/// A duration as poll(2) takes it.
pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: duration.subsec_nanos().into() }
}

/// What a transport has to do when its connection has ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ending {
    /// A GOAWAY to send, if it can be sent. On a stream it is behind the rest of a message of which a part
    /// has been sent; what was queued behind that is not sent any more.
    pub goaway: Option<Vec<u8>>,
    /// Neither side had anything outstanding.
    pub is_orderly: bool,
}

impl Partial {
    /// How much of its data is still to come.
    fn left(&self) -> usize {
        self.reply.data_len - self.placed
    }
}

impl<L> Core<L> {
    /// For a connection that was granted this at `now`.
    pub fn new(grant: Grant, now: Instant) -> Self {
        Self {
            grant,
            limits: grant.limits(),
            outstanding: Outstanding::new(&grant),
            large: 0,
            begins_to_owe: false,
            head: Vec::with_capacity(4096),
            head_at: 0,
            queue: VecDeque::with_capacity(grant.credits() as usize),
            sent: 0,
            pongs_queued: 0,
            partial: None,
            early: None,
            done: Vec::new(),
            upgrade: Upgrade::None,
            one_way: OneWayFlow::of_client(&grant.push),
            unanswered: Unanswered::new(&grant.push),
            events: VecDeque::new(),
            keepalive: Keepalive::new(&grant, now),
            failure: None,
            lost: Status::OK,
            ending: None,
            keeps_lost: false,
            lost_requests: Vec::new(),
            damaged: Vec::new(),
            is_drained: false,
            counters: ClientCounters::default(),
        }
    }

    pub fn has_failed(&self) -> bool {
        self.failure.is_some()
    }

    /// Whether there are requests to be sent again: [`ClientTransport::send_damaged_again`].
    ///
    /// [`ClientTransport::send_damaged_again`]: crate::transport::ClientTransport::send_damaged_again
    pub fn has_damaged(&self) -> bool {
        !self.damaged.is_empty()
    }

    /// Whether most of what is awaited is large.
    pub fn awaits_large(&self) -> bool {
        self.large > 0
    }

    /// Whether the server owes a sign of life.
    pub fn is_owed(&self) -> bool {
        !self.outstanding.is_empty() || self.partial.is_some() || self.early.is_some()
    }

    /// Whether nothing is unsent or unanswered.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && !self.is_owed()
    }

    // Requests
    // ------------------------------------------------------------------------------------------------------

    /// Whether a request with this command and `bulk_len` bytes of bulk data can be sent: the connection has
    /// not ended and there is a credit. Panics if it exceeds the grant.
    #[inline]
    pub fn may_send(&self, body: &[u8], bulk_len: usize, options: SendOptions) -> bool {
        assert!(
            bulk_len <= self.limits.data_bytes_max as usize && body.len() <= message::BODY_BYTES_MAX,
            "a request exceeds the grant"
        );
        self.failure.is_none() && self.outstanding.may_insert(options.control)
    }

    /// Queues a request that may be sent.
    // Each transport has one caller, and a call would copy the buffers' owner twice more.
    #[inline(always)]
    pub fn send(
        &mut self,
        tag: u64,
        body: &[u8],
        bulk: Bulk,
        options: SendOptions,
        exposed: Exposed<L>,
    ) -> Result<RequestId, NotSent> {
        let Exposed { region, data_len, lease } = exposed;
        let (has_crc, data_crc) =
            if self.limits.crc || options.has_crc { self.checksum(&bulk, options) } else { (false, 0) };
        let region_len = if let RemoteRegion::In { len, .. } = region { len } else { 0 };
        let was_idle = self.outstanding.is_empty();
        let pending = Pending { tag, bulk, region_len, queued: true, damaged: 0, has_crc, lease };
        let id = self.outstanding.insert(pending, options, body).map_err(|pending| NotSent(pending.bulk))?;
        self.begins_to_owe |= was_idle;
        self.large += largeness(region_len);
        let start = self.head.len();
        let request =
            RequestHeader { id: id.0, body_len: 0, data_len: data_len as u32, region, has_crc, data_crc };
        request.encode(body, self.limits.crc, &mut self.head);
        self.push(start, data_len, Some(id), false);
        Ok(id)
    }

    /// Whether a request has checksums though others have none, and that of its data.
    #[cold]
    fn checksum(&self, bulk: &Bulk, options: SendOptions) -> (bool, u32) {
        assert!(self.grant.request_crc(), "a request has checksums, and the server knows none");
        let data_crc = match bulk {
            // What the program has computed, when it made the data, finds more.
            Bulk::Out(buffers) if !options.has_crc => message::crc_of(buffers.slices(0..buffers.len())),
            _ => options.crc,
        };
        (!self.limits.crc, data_crc)
    }

    /// Ends a request that may be sent and cannot be, for want of something on this side.
    pub fn send_failed(
        &mut self,
        tag: u64,
        bulk: Bulk,
        lease: L,
        error: &Error,
    ) -> Result<RequestId, NotSent> {
        let pending = Pending { tag, bulk, region_len: 0, queued: false, damaged: 0, has_crc: false, lease };
        let id = self
            .outstanding
            .insert(pending, SendOptions::CONTROL, &[])
            .map_err(|pending| NotSent(pending.bulk))?;
        let Ok(Pending { bulk, .. }) = self.outstanding.finish(id, 1, |_| Ok(())) else {
            unreachable!("it was just put in, with the credit that comes back")
        };
        let text = format!("{error}.");
        let body = Body::from(message::clipped(&text).as_bytes());
        let status = Status::transport(error.errno());
        self.done.push(Reply {
            tag,
            status,
            is_unknown: false,
            result: 0,
            body,
            data_len: 0,
            data_crc: 0,
            bulk,
        });
        Ok(id)
    }

    /// What another connection needs to send a request again that is over on this one.
    #[cold]
    fn lost(id: RequestId, tag: u64, bulk: Bulk, was_sent: bool, sent: &Sent) -> Lost {
        let Sent { command, options } = sent.clone();
        Lost { tag, id, command, bulk, options, was_sent }
    }

    /// The buffers of a request, for a transport that keeps them elsewhere while the server may reach them.
    pub fn bulk_mut(&mut self, id: RequestId) -> Option<&mut Bulk> {
        self.outstanding.get_mut(id).map(|pending| &mut pending.bulk)
    }

    /// Takes back a request of which not one byte has been sent.
    pub fn dequeue(&mut self, request: RequestId) -> Option<(Bulk, L)> {
        let index = self.queue.iter().position(|queued| queued.request == Some(request))?;
        if index == 0 && self.sent > 0 {
            return None;
        }
        let start = self.head_at + self.queue.range(..index).map(|queued| queued.head_len).sum::<usize>();
        let queued = self.queue.remove(index)?;
        self.head.drain(start..start + queued.head_len);
        let pending = self.outstanding.finish(request, 1, |_| Ok(())).ok()?;
        self.large -= largeness(pending.region_len);
        Some((pending.bulk, pending.lease))
    }

    /// Keeps replies for [`Core::take_done`].
    pub fn hand_out_later(&mut self, mut replies: Vec<Reply>) {
        self.done.append(&mut replies);
    }

    /// Moves what is over and has not been handed out to `replies`.
    #[inline]
    pub fn take_done(&mut self, replies: &mut Vec<Reply>) {
        if !self.done.is_empty() {
            replies.append(&mut self.done);
        }
    }

    /// Says where this side's end of a queue pair is, and lets the server say where its end is.
    pub fn request_upgrade(&mut self, ours: &QueuePairAddress) {
        let start = self.head.len();
        message::encode_queue_pair(Ok(ours), self.limits.crc, &mut self.head);
        self.push(start, 0, None, false);
        self.upgrade = Upgrade::Requested;
    }

    /// What the server said to that, once.
    pub fn take_upgrade(&mut self) -> Option<Result<QueuePairAddress, Error>> {
        match std::mem::replace(&mut self.upgrade, Upgrade::None) {
            Upgrade::Answered(answer) => Some(answer),
            other => {
                self.upgrade = other;
                None
            }
        }
    }

    // Sending
    // ------------------------------------------------------------------------------------------------------

    /// Queues the message that `head` has from `start` on.
    fn push(&mut self, start: usize, data_len: usize, request: Option<RequestId>, pong: bool) {
        let head_len = self.head.len() - start;
        self.queue.push_back(Queued { head_len, data_len, request, pong });
    }

    pub fn has_unsent(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Bytes of messages that wait to be sent, without their data.
    #[cfg(test)]
    pub fn unsent_bytes(&self) -> usize {
        self.head.len()
    }

    /// To be called before something is sent: whether the time is to be passed to [`Core::on_owed`].
    pub fn begins_to_owe(&self) -> bool {
        self.begins_to_owe
    }

    /// The server owes something from now on.
    pub fn on_owed(&mut self, now: Instant) {
        self.begins_to_owe = false;
        self.keepalive.on_send(now);
    }

    /// Visits what is to be sent on a stream, in order, until there is no more or `push` takes no more.
    #[inline]
    pub fn unsent<'a>(&'a self, mut push: impl FnMut(&'a [u8]) -> bool) {
        // Headers of messages without data form one run.
        let mut run = self.head_at..self.head_at;
        let mut skip = self.sent;
        for queued in &self.queue {
            run.end += queued.head_len;
            if queued.data_len > 0 {
                run.start += skip.min(run.len());
                if !run.is_empty() && !push(&self.head[run.clone()]) {
                    return;
                }
                run.start = run.end;
                let from = skip.saturating_sub(queued.head_len);
                if !self.data_of(queued).slices(from..queued.data_len).all(&mut push) {
                    return;
                }
                skip = 0;
            }
        }
        run.start += skip.min(run.len());
        if !run.is_empty() {
            push(&self.head[run]);
        }
    }

    /// The message that is to be sent next where each is sent at once, as a whole.
    pub fn front(&self) -> Option<Unsent<'_>> {
        let queued = self.queue.front()?;
        let head = &self.head[self.head_at..self.head_at + queued.head_len];
        Some(Unsent { head, data: (queued.data_len > 0).then(|| self.data_of(queued)) })
    }

    /// The rest of a message of which a part has been sent.
    fn half_sent(&self) -> Vec<u8> {
        let Some(Unsent { head, data }) = self.front().filter(|_| self.sent > 0) else { return Vec::new() };
        let mut rest = head[self.sent.min(head.len())..].to_vec();
        if let Some(data) = data {
            let from = self.sent.saturating_sub(head.len());
            data.slices(from..data.len()).for_each(|slice| rest.extend_from_slice(slice));
        }
        rest
    }

    /// The data of a queued request: it is outstanding, or, at the front, already answered.
    fn data_of(&self, queued: &Queued) -> &Buffers {
        let bulk = match queued.request.and_then(|id| self.outstanding.get(id)) {
            Some(pending) => Some(&pending.bulk),
            None => {
                let arriving = self.partial.as_ref().filter(|held| held.partial.queued);
                arriving.or(self.early.as_ref()).map(|held| &held.partial.reply.bulk)
            }
        };
        match bulk {
            Some(Bulk::Out(buffers)) => buffers,
            _ => unreachable!("a queued message with data is a request that owns it"),
        }
    }

    /// `n` more bytes have been sent.
    #[inline]
    pub fn on_sent(&mut self, mut n: usize) {
        while let Some(front) = self.queue.front() {
            let left = front.head_len + front.data_len - self.sent;
            if n < left {
                self.sent += n;
                break;
            }
            n -= left;
            self.sent = 0;
            self.head_at += front.head_len;
            self.pongs_queued -= usize::from(front.pong);
            if let Some(id) = front.request {
                match self.outstanding.get_mut(id) {
                    Some(pending) => pending.queued = false,
                    None => match &mut self.partial {
                        Some(Held { partial, .. }) if partial.queued => partial.queued = false,
                        _ => {
                            let reply = self.early.take().and_then(|early| self.unless_again(early, true));
                            self.done.extend(reply);
                        }
                    },
                }
            }
            self.queue.pop_front();
        }
        if self.queue.is_empty() {
            self.head.clear();
            self.head_at = 0;
        } else if self.head_at >= CLIENT_SENT_HEAD_BYTES_MAX {
            self.head.drain(..self.head_at);
            self.head_at = 0;
        }
    }

    // Receiving
    // ------------------------------------------------------------------------------------------------------

    /// What was received has been taken in. `now` may be from before that; `taken_at` returns the time after
    /// it, which is asked for only if a pong brought the server's time.
    pub fn on_receive(&mut self, now: Instant, taken_at: impl FnOnce() -> Instant) {
        self.keepalive.on_receive(now, taken_at);
    }

    /// How much of the data of a response that has begun is still to come.
    pub fn data_left(&self) -> usize {
        self.partial.as_ref().map_or(0, |held| held.partial.left())
    }

    /// Where that goes: the request's buffers, and the range of them.
    pub fn data_room(&mut self) -> Option<(&mut Buffers, Range<usize>)> {
        let Held { partial, .. } = self.partial.as_mut()?;
        match &mut partial.reply.bulk {
            Bulk::In(buffers) => Some((buffers, partial.placed..partial.reply.data_len)),
            _ => None,
        }
    }

    /// `n` more bytes of it are in place.
    pub fn on_data(&mut self, n: usize) {
        if let Some(Held { partial, .. }) = &mut self.partial {
            partial.placed += n;
        }
    }

    /// Takes in what is complete at the front of a stream's bytes. A violation ends the connection.
    pub fn on_bytes(&mut self, bytes: &[u8], replies: &mut Vec<Reply>) -> Progress {
        let mut progress = Progress { taken: 0, flush: false };
        if let Err(violation) = self.parse(bytes, &mut progress, replies) {
            self.fail_violation(violation);
        }
        progress
    }

    fn parse(
        &mut self,
        bytes: &[u8],
        progress: &mut Progress,
        replies: &mut Vec<Reply>,
    ) -> Result<(), Violation> {
        while self.failure.is_none() && !self.must_flush(progress) {
            if let Some(Held { partial, .. }) = &mut self.partial {
                let room = partial.placed..partial.reply.data_len;
                let copied = place(&mut partial.reply.bulk, room, &bytes[progress.taken..]);
                partial.placed += copied;
                progress.taken += copied;
                self.counters.bounced_bytes += copied as u64;
                if partial.left() > 0 {
                    return Ok(());
                }
                self.finish_partial(replies);
            }
            let (message, taken) = match message::parse(&bytes[progress.taken..], &self.limits)? {
                Parsed::Need(_) => return Ok(()),
                Parsed::Item(message, taken) => (message, taken),
            };
            progress.taken += taken;
            if let Message::Response(response, body) = message {
                let mut pending = self.begin_response(&response)?;
                let room = 0..response.data_len as usize;
                let copied = place(&mut pending.bulk, room, &bytes[progress.taken..]);
                progress.taken += copied;
                self.counters.bounced_bytes += copied as u64;
                self.finish(pending, response, body, copied, replies);
            } else {
                progress.flush |= self.on_control(message)?;
            }
        }
        Ok(())
    }

    /// Whether no more pings can be taken in before pongs are sent.
    fn must_flush(&self, progress: &Progress) -> bool {
        progress.flush && self.pongs_queued == CLIENT_PONGS_MAX
    }

    /// Takes in what one receive brought where data is placed: whole messages, one or more. `reclaim` brings
    /// a request's buffers back from where the server reached them, with so many bytes of data in them, and
    /// says how many it had to copy. A violation ends the connection.
    pub fn on_messages(
        &mut self,
        bytes: &[u8],
        replies: &mut Vec<Reply>,
        mut reclaim: impl FnMut(&mut Bulk, &mut L, usize) -> usize,
    ) -> Progress {
        let mut progress = Progress { taken: 0, flush: false };
        while self.failure.is_none() && !self.must_flush(&progress) {
            // Data does not travel in responses: it has been placed.
            let taken = match message::parse(&bytes[progress.taken..], &self.limits) {
                Ok(Parsed::Item(Message::Response(response, body), taken)) => {
                    self.finish_placed(response, body, replies, &mut reclaim).map(|()| taken)
                }
                Ok(Parsed::Item(message, taken)) => self.on_control(message).map(|is_pong| {
                    progress.flush |= is_pong;
                    taken
                }),
                Ok(Parsed::Need(_)) => Err(Violation::Length),
                Err(violation) => Err(violation),
            };
            match taken {
                Ok(taken) => progress.taken += taken,
                Err(violation) => self.fail_violation(violation),
            }
            if progress.taken == bytes.len() {
                break;
            }
        }
        progress
    }

    /// The response to a request whose data has been placed, and that has no message of its own.
    pub fn on_placed(
        &mut self,
        response: ResponseHeader,
        replies: &mut Vec<Reply>,
        mut reclaim: impl FnMut(&mut Bulk, &mut L, usize) -> usize,
    ) {
        // It has no room for a checksum. That of a single request is missed below.
        let finished = match self.limits.crc {
            true => Err(Violation::Checksum),
            false => self.finish_placed(response, &[], replies, &mut reclaim),
        };
        if let Err(violation) = finished {
            self.fail_violation(violation);
        }
    }

    fn finish_placed(
        &mut self,
        response: ResponseHeader,
        body: &[u8],
        replies: &mut Vec<Reply>,
        reclaim: &mut impl FnMut(&mut Bulk, &mut L, usize) -> usize,
    ) -> Result<(), Violation> {
        let data_len = response.data_len as usize;
        if let Some(pending) = self.outstanding.get_mut(RequestId(response.id))
            && !pending.queued
        {
            let copied = reclaim(&mut pending.bulk, &mut pending.lease, data_len);
            self.counters.bounced_bytes += copied as u64;
        }
        let pending = self.begin_response(&response)?;
        self.finish(pending, response, body, data_len, replies);
        Ok(())
    }

    /// Takes in a message that is no response. Whether there is a pong to be sent.
    fn on_control(&mut self, message: Message<'_>) -> Result<bool, Violation> {
        match message {
            Message::Ping(id) => {
                if self.pongs_queued == CLIENT_PONGS_MAX {
                    return Err(Violation::Stalled);
                }
                self.pongs_queued += 1;
                let start = self.head.len();
                message::encode_pong(id, 0, self.limits.crc, &mut self.head);
                self.push(start, 0, None, true);
                return Ok(true);
            }
            Message::Pong(id, time_ns) if self.keepalive.permits_pong(id) => {
                self.keepalive.on_pong(id, time_ns);
            }
            Message::Pong(..) => return Err(Violation::RequestId),
            Message::Goaway(status, text) => self.on_goaway(status, message::text(text)),
            Message::QueuePair(what) if matches!(self.upgrade, Upgrade::Requested) => {
                let rejected = |(status, text)| Error::Rejected { status, text: message::text(text) };
                self.upgrade = Upgrade::Answered(what.map_err(rejected));
            }
            Message::QueuePair(..) => return Err(Violation::Kind(message::Kind::QueuePair as u8)),
            Message::OneWay(message, wants_receipt) => {
                if self.one_way.on_message(wants_receipt)? {
                    self.events.push_back(ClientEvent::OneWay(message.into()));
                }
            }
            Message::Receipt(receipt) => {
                let events = &mut self.events;
                let receipted = |tag| events.push_back(ClientEvent::Receipt(tag));
                if self.one_way.on_receipt(receipt, receipted)? {
                    self.events.push_back(ClientEvent::Refused);
                }
            }
            Message::Request(request, body) => {
                self.unanswered.on_request(&request)?;
                self.events.push_back(ClientEvent::Request(request.id, body.into()));
            }
            Message::Response(..) => unreachable!("the callers take responses"),
        }
        Ok(false)
    }

    /// A response's header has arrived: its request is no longer outstanding.
    #[inline]
    fn begin_response(&mut self, response: &ResponseHeader) -> Result<Pending<L>, Violation> {
        let id = RequestId(response.id);
        let (front, sent) = (self.queue.front(), self.sent);
        let pending = self.outstanding.finish(id, response.credits, |pending| {
            if response.data_len > pending.region_len {
                return Err(Violation::Length);
            }
            if response.has_crc != pending.has_crc {
                return Err(Violation::Checksum);
            }
            // The server may answer before it has the data, but not before it has the command.
            let has_command =
                || front.is_some_and(|front| front.request == Some(id) && sent >= front.head_len);
            if pending.queued && !has_command() { Err(Violation::RequestId) } else { Ok(()) }
        })?;
        self.large -= largeness(pending.region_len);
        Ok(pending)
    }

    /// So much of the data of a response that has just begun is in place. Most are complete at once.
    #[inline]
    fn finish(
        &mut self,
        pending: Pending<L>,
        response: ResponseHeader,
        body: &[u8],
        placed: usize,
        replies: &mut Vec<Reply>,
    ) {
        let data_len = response.data_len as usize;
        let is_over = placed == data_len
            && !pending.queued
            && !self.is_not_executed(response.status)
            && self.is_intact(&pending.bulk, data_len, response.has_crc, response.data_crc);
        let reply = Reply {
            tag: pending.tag,
            status: response.status,
            is_unknown: false,
            result: response.result,
            // Most have none.
            body: if body.is_empty() { Body::default() } else { Body::from(body) },
            data_len,
            data_crc: response.data_crc,
            bulk: pending.bulk,
        };
        if is_over {
            return replies.push(reply);
        }
        let id = RequestId(response.id);
        let Pending { queued, damaged, has_crc, .. } = pending;
        self.hold(Partial { reply, placed, has_crc, queued, damaged, id }, replies);
    }

    /// Keeps a response whose request has just ended, as long as it waits for something.
    #[cold]
    fn hold(&mut self, partial: Partial, replies: &mut Vec<Reply>) {
        let (sent, is_complete) = (self.outstanding.sent(partial.id).clone(), partial.left() == 0);
        self.partial = Some(Held { partial, sent });
        if is_complete {
            self.finish_partial(replies);
        }
    }

    /// All data of `partial` is in place.
    fn finish_partial(&mut self, replies: &mut Vec<Reply>) {
        let Some(held) = self.partial.take() else { return };
        let Partial { reply, has_crc, queued, .. } = &held.partial;
        let is_intact = self.is_intact(&reply.bulk, reply.data_len, *has_crc, reply.data_crc);
        if *queued {
            self.early = Some(held);
        } else {
            replies.extend(self.unless_again(held, is_intact));
        }
    }

    #[inline]
    fn is_intact(&self, bulk: &Bulk, data_len: usize, has_crc: bool, data_crc: u32) -> bool {
        !(self.limits.crc || has_crc)
            || data_crc
                == match bulk {
                    Bulk::In(buffers) => message::crc_of(buffers.slices(0..data_len)),
                    _ => 0,
                }
    }

    /// Whether the server has not executed a request, because it is shutting down, and another connection may
    /// send it again.
    #[inline]
    fn is_rejected(&self, status: Status) -> bool {
        status.is_shutdown() && self.keeps_lost
    }

    /// Whether the server has not executed a request, which is therefore not over.
    #[inline]
    fn is_not_executed(&self, status: Status) -> bool {
        !status.is_ok() && (status == Status::DAMAGED || self.is_rejected(status))
    }

    /// The reply, unless the request is to be sent again, by this connection or another one.
    fn unless_again(&mut self, held: Held, is_intact: bool) -> Option<Reply> {
        let Held { partial: Partial { mut reply, damaged, id, .. }, sent } = held;
        if self.is_rejected(reply.status) {
            self.lost_requests.push(Self::lost(id, reply.tag, reply.bulk, false, &sent));
            return None;
        }
        if is_intact && reply.status != Status::DAMAGED {
            return Some(reply);
        }
        self.counters.checksum_errors += 1;
        if damaged + 1 < DAMAGED_MAX {
            let lost = Self::lost(id, reply.tag, reply.bulk, false, &sent);
            self.damaged.push(Damaged { lost, times: damaged + 1 });
            return None;
        }
        let text = "The data arrived with another checksum than it was sent with, several times: the network \
                    or memory damages it, or the program changed it while it was being written.";
        reply.status = Status::DAMAGED;
        (reply.result, reply.data_len, reply.data_crc) = (0, 0, 0);
        reply.body = Body::from(message::clipped(text).as_bytes());
        Some(reply)
    }

    // The end
    // ------------------------------------------------------------------------------------------------------

    /// Ends the connection; `lost` is how requests end that it takes with it.
    pub fn fail(&mut self, error: Error, lost: Status) {
        if self.failure.is_some() {
            return;
        }
        let goaway = match &error {
            Error::Violation(violation) => {
                let mut goaway = self.half_sent();
                let status = Status::protocol(violation.errno());
                message::encode_goaway(status, &violation.to_string(), self.limits.crc, &mut goaway);
                Some(goaway)
            }
            _ => None,
        };
        self.ending = Some(Ending { goaway, is_orderly: self.is_idle() });
        self.failure = Some(error);
        self.lost = lost;
        self.queue.clear();
        self.head.clear();
        self.head_at = 0;
        self.sent = 0;
        self.pongs_queued = 0;
    }

    /// Ends it because the server broke the protocol, and is to hear so.
    pub fn fail_violation(&mut self, violation: Violation) {
        let lost = match violation.errno() {
            libc::ETIMEDOUT => Status::transport(libc::ETIMEDOUT),
            errno => Status::protocol(errno),
        };
        self.fail(violation.into(), lost);
    }

    /// Ends it because it was lost.
    pub fn fail_lost(&mut self, errno: i32, why: &str) {
        let text = format!("{why}. If the server still runs, its log says more");
        self.fail(Error::Closed { errno, text }, Status::transport(lost_errno(errno)));
    }

    fn on_goaway(&mut self, status: Status, text: String) {
        self.is_drained = status == Status::transport(libc::ESHUTDOWN);
        let lost = match status.class {
            Class::Protocol => Status::protocol(status.errno),
            _ => Status::transport(lost_errno(status.errno)),
        };
        let errno = if status.is_ok() { libc::ECONNRESET } else { status.errno };
        let text = if text.is_empty() { "the server ended it without giving a reason".into() } else { text };
        self.fail(Error::Closed { errno, text }, lost);
    }

    /// What the transport has to do about the end of the connection: once, if it has ended.
    pub fn take_ending(&mut self) -> Option<Ending> {
        self.ending.take()
    }

    /// Moves everything outstanding to `replies`, after a failure, each request once; or to what
    /// [`ClientCore::take_lost`] returns. `reclaim` brings a request's buffers back from where the server
    /// reached them: see [`Core::on_messages`].
    pub fn hand_out_lost(
        &mut self,
        replies: &mut Vec<Reply>,
        mut reclaim: impl FnMut(&mut Bulk, &mut L, usize) -> usize,
    ) {
        replies.append(&mut self.done);
        let early = self.early.take();
        replies.extend(early.and_then(|early| self.unless_again(early, true)));
        let mut lost = Vec::new();
        if let Some(Held { partial: Partial { reply, queued, id, .. }, sent }) = self.partial.take() {
            lost.push(Self::lost(id, reply.tag, reply.bulk, !queued, &sent));
        }
        lost.extend(self.damaged.drain(..).map(|damaged| damaged.lost));
        let is_drained = self.is_drained;
        for (id, mut pending, sent) in self.outstanding.drain() {
            reclaim(&mut pending.bulk, &mut pending.lease, 0);
            let Pending { tag, bulk, queued, .. } = pending;
            lost.push(Self::lost(id, tag, bulk, !queued && !is_drained, sent));
        }
        if self.keeps_lost {
            self.lost_requests.append(&mut lost);
        } else {
            let status = self.lost;
            replies.extend(lost.into_iter().map(|lost| lost.reply(status)));
        }
        self.large = 0;
    }

    // Keepalive
    // ------------------------------------------------------------------------------------------------------

    fn queue_ping(&mut self, now: Instant) {
        let id = self.keepalive.on_ping(now);
        let start = self.head.len();
        message::encode_ping(id, self.limits.crc, &mut self.head);
        self.push(start, 0, None, false);
    }

    /// What a silent server calls for now.
    fn action(&mut self, now: Instant) -> Action {
        if self.begins_to_owe {
            self.on_owed(now);
        }
        if self.failure.is_some() { Action::Wait } else { self.keepalive.action(now, self.is_owed()) }
    }

    /// Nothing was there to be received at `now`. Whether there is a ping to be sent, at the time that
    /// `sent_at` returns: the server has been silent for long. If it was for too long, the connection ends.
    pub fn on_silence(&mut self, now: Instant, sent_at: impl FnOnce() -> Instant) -> bool {
        match self.action(now) {
            Action::Wait => false,
            Action::Ping => {
                // The caller may have been held up since `now`, and the server is given up only some time
                // after the ping.
                self.queue_ping(sent_at());
                true
            }
            Action::TimedOut => {
                let silent = now.saturating_duration_since(self.last_rx()).as_secs_f64();
                self.fail_lost(libc::ETIMEDOUT, &format!("the server has been silent for {silent:.1} s"));
                false
            }
        }
    }

    /// What a caller does who would wait for the server until `deadline`.
    pub fn on_wait(&mut self, now: Instant, deadline: Option<Instant>) -> Wait {
        if self.failure.is_some() || !self.done.is_empty() || !self.events.is_empty() {
            return Wait::Return;
        }
        match self.action(now) {
            // What there is to be received comes first.
            Action::TimedOut => Wait::Return,
            Action::Ping => {
                self.queue_ping(now);
                Wait::Flush
            }
            Action::Wait if deadline.is_some_and(|deadline| now >= deadline) => Wait::Return,
            Action::Wait => {
                let until = deadline.into_iter().chain(self.keepalive.deadline(self.is_owed())).min();
                Wait::Sleep(until.map(|until| until.saturating_duration_since(now)))
            }
        }
    }
}

impl<L> Core<L> {
    /// Queues the message that `encode` appends, if it does. The flag says whether messages have checksums.
    fn queue(&mut self, encode: impl FnOnce(&mut Self, bool, &mut Vec<u8>)) {
        let mut head = std::mem::take(&mut self.head);
        let start = head.len();
        encode(self, self.limits.crc, &mut head);
        self.head = head;
        if self.head.len() > start {
            self.push(start, 0, None, false);
        }
    }
}

impl<L> ClientCore for Core<L> {
    fn grant(&self) -> &Grant {
        &self.grant
    }

    fn outstanding(&self) -> usize {
        self.outstanding.len()
            + usize::from(self.partial.is_some())
            + usize::from(self.early.is_some())
            + self.done.len()
            + self.lost_requests.len()
            + self.damaged.len()
    }

    fn credits(&self) -> usize {
        self.outstanding.credits()
    }

    fn failure(&self) -> Option<&Error> {
        self.failure.as_ref()
    }

    fn last_rx(&self) -> Instant {
        self.keepalive.last_rx()
    }

    fn owed_since(&self) -> Option<Instant> {
        (!self.begins_to_owe).then(|| self.keepalive.last_idle())
    }

    fn clock_sample(&self) -> Option<ClockSample> {
        self.keepalive.clock_sample()
    }

    fn counters(&self) -> ClientCounters {
        self.counters
    }

    fn request_timeout(&self) -> Duration {
        self.keepalive.request_timeout()
    }

    fn set_request_timeout(&mut self, timeout: Duration) {
        self.keepalive.set_request_timeout(timeout);
    }

    fn has_unanswered_recorded(&self) -> bool {
        let mut sent = self.outstanding.iter().filter(|(pending, _)| !pending.queued);
        sent.any(|(_, sent)| Opcode::is_recorded_on_wire(&sent.command))
    }

    fn find(&self, tag: u64) -> Option<RequestId> {
        self.outstanding.find(|pending| pending.tag == tag)
    }

    fn keep_lost(&mut self) {
        self.keeps_lost = true;
    }

    fn take_damaged(&mut self) -> Option<Damaged> {
        self.damaged.pop()
    }

    fn put_back_damaged(&mut self, damaged: Damaged) {
        self.damaged.push(damaged);
    }

    fn set_damaged(&mut self, id: RequestId, times: u8) {
        if let Some(pending) = self.outstanding.get_mut(id) {
            pending.damaged = times;
        }
    }

    fn take_lost(&mut self) -> Vec<Lost> {
        std::mem::take(&mut self.lost_requests)
    }

    fn set_used_ids(&mut self, used: &UsedIds) {
        self.outstanding.set_used_ids(used);
    }

    fn add_used_ids(&self, used: &mut UsedIds) {
        self.outstanding.add_used_ids(used);
    }

    fn ping(&mut self, now: Instant, timeout: Duration) {
        if self.failure.is_none() {
            self.queue_ping(now);
            self.keepalive.expect_by(now + timeout);
        }
    }

    fn send_one_way(&mut self, message: OneWay<'_>) -> Result<(), NotPushed> {
        if self.failure.is_some() {
            return Err(NotPushed::Closed);
        }
        let mut sent = Ok(());
        self.queue(|core, crc, out| sent = core.one_way.send(message, crc, out));
        sent
    }

    fn release(&mut self) {
        if self.failure.is_none() {
            self.queue(|core, crc, out| core.one_way.release(crc, out));
        }
    }

    fn refuse(&mut self) {
        if self.failure.is_none() {
            self.events.retain(|event| !matches!(event, ClientEvent::OneWay(_)));
            self.queue(|core, crc, out| core.one_way.refuse(crc, out));
        }
    }

    fn answer(&mut self, request: u64, status: Status, result: u64, body: &[u8]) {
        if self.failure.is_none() {
            self.queue(|core, crc, out| core.unanswered.answer(request, (status, result, body), crc, out));
        }
    }

    fn next_event(&mut self) -> Option<ClientEvent> {
        self.events.pop_front()
    }
}

/// The errno of requests that end because their connection ended for this reason: few errnos, so that a
/// caller can tell them from the file's.
fn lost_errno(errno: i32) -> i32 {
    match errno {
        libc::ETIMEDOUT | libc::EPIPE | libc::ENOTCONN => errno,
        _ => libc::ECONNRESET,
    }
}

/// Puts what these bytes have of a response's data in place, in this range of its buffers: so many.
#[inline]
fn place(bulk: &mut Bulk, room: Range<usize>, bytes: &[u8]) -> usize {
    let n = room.len().min(bytes.len());
    match bulk {
        Bulk::In(buffers) if n > 0 => {
            buffers.write_at(room.start, &bytes[..n]);
            n
        }
        _ => 0,
    }
}

/// What a request adds to [`Core::large`].
fn largeness(region_len: u32) -> isize {
    match region_len as usize {
        0 => 0,
        len if len < LARGE_BYTES => -1,
        _ => 1,
    }
}

#[cfg(test)]
mod tests;
