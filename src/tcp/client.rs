//! The client's side of TCP: one connection, used by one thread at a time.
//!
//! Nothing here starts a thread or needs io_uring. What is sent goes out in as few system calls as the kernel
//! allows: the headers and commands of a batch lie one after another in `head`, the data of writes is sent
//! straight from the caller's buffers. What arrives is read into `staging` and parsed there; when much of a
//! response's data is still to come it is read straight into the caller's buffers, with the bytes behind it
//! going to `staging` in the same call.
//!
//! The connection owns the buffers of a request until the request is over: answered (or lost with the
//! connection), *and* its data sent. A server may answer before it has taken the data, with an error; then
//! the reply waits in `early`.
//!
//! The server is not trusted: whatever it sends is checked, and at most ends this connection.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{SendAncillaryBuffer, SendFlags};

use crate::error::{Class, Error, Status, Violation};
use crate::handshake::{Grant, Offer};
use crate::keepalive::{Action, Keepalive};
use crate::memory::process;
use crate::message::{self, DataCrc, Limits, Message, Parsed, QueuePairAddress, RemoteRegion};
use crate::transport::{Body, Bulk, ClientCounters, ClientTransport, NotSent, Outstanding, Reply, RequestId};

/// Room for what arrives: a burst of 32 responses with 4 KiB each fits, and it stays within a core's own
/// cache.
const STAGING_BYTES: usize = 192 << 10;
/// A request for at least this much data is large.
const LARGE_BYTES: usize = 16 << 10;
/// How much is read ahead while most of what is awaited is large: enough for headers, little to copy.
const READ_AHEAD_BYTES: usize = 1 << 10;
/// Data of which at least this much is still to come is read straight into the caller's buffers: all that is
/// large, less what was read ahead.
const DIRECT_BYTES: usize = LARGE_BYTES / 2;
/// Pieces of memory in one system call; the kernel takes up to 1,024.
const SLICES_MAX: usize = 64;
/// Sent headers are dropped from the front of `head` in runs of this length, if it never drains.
const HEAD_SENT_BYTES_MAX: usize = 64 << 10;
/// Reads in one call, so that a server that sends without end does not keep its client from coming back.
const READS_MAX: usize = 64;
/// Pongs that wait to be sent. A peer that pings on without reading them is stalled.
const PONGS_MAX: usize = 64;

/// A connection to a server over TCP.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    grant: Grant,
    limits: Limits,
    outstanding: Outstanding<Pending>,
    /// Outstanding requests that await at least [`LARGE_BYTES`], less those that await fewer.
    large: isize,

    /// Headers and commands of `queue`, in order, those already sent in front.
    head: Vec<u8>,
    /// Where in `head` the front of `queue` begins.
    head_at: usize,
    /// Messages not yet wholly sent.
    queue: VecDeque<Queued>,
    /// How many bytes of the front of `queue`, data included, have been sent.
    sent: usize,
    /// The socket took no more at the last try.
    blocked: bool,
    /// Sending failed. The connection ends once everything that arrived before has been taken in: it may say
    /// why.
    send_error: Option<io::Error>,
    pongs_queued: usize,

    staging: Box<[u8]>,
    /// The part of `staging` that has not been parsed.
    unparsed: std::ops::Range<usize>,
    /// A response whose data is arriving.
    partial: Option<Partial>,
    /// The reply to the request at the front of `queue`, whose data is not wholly sent.
    early: Option<Reply>,
    /// Replies that [`ClientTransport::receive`] has not yet handed out.
    done: Vec<Reply>,
    upgrade: Upgrade,

    keepalive: Keepalive,
    /// The process that connected: see [`process`].
    process: u64,

    failure: Option<Error>,
    /// How requests end that the failure takes with it.
    lost: Status,
    counters: ClientCounters,
}

/// Whether the server is to tell where its queue pair is.
#[derive(Debug)]
enum Upgrade {
    /// It must not.
    None,
    Requested,
    Answered(Result<QueuePairAddress, Error>),
}

#[derive(Debug)]
struct Pending {
    tag: u64,
    bulk: Bulk,
    /// It is still in `queue`.
    queued: bool,
}

/// A message to be sent: so many bytes of `head`, then so many of the request's data.
#[derive(Debug)]
struct Queued {
    head_len: usize,
    data_len: usize,
    /// None for pings and pongs.
    request: Option<RequestId>,
    pong: bool,
}

/// A response whose header has been taken in, but not all of its data.
#[derive(Debug)]
struct Partial {
    reply: Reply,
    /// How much of its `data_len` is in place.
    placed: usize,
    data_crc: u32,
    /// The request was still in `queue`.
    queued: bool,
}

impl Client {
    /// Connects to the server at `address` and shakes hands, by `deadline`.
    pub fn connect(address: SocketAddr, offer: &Offer, deadline: Instant) -> Result<Self, Error> {
        let failed = |source| {
            Error::io(
                format!(
                    "Cannot connect to {address}; check that raio_server listens there and that no firewall \
                     is in between"
                ),
                source,
            )
        };
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(address),
            socket2::Type::STREAM,
            Some(socket2::Protocol::TCP),
        )
        .map_err(failed)?;
        super::spare_congestion_control(&socket, address);
        abort_on_close(&socket, true).map_err(failed)?;
        // A zero timeout would be rejected rather than expire.
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        socket.connect_timeout(&address.into(), left).map_err(failed)?;
        Self::from_stream(socket.into(), offer, deadline)
    }

    /// Shakes hands over a stream that is connected, by `deadline`.
    pub fn from_stream(stream: TcpStream, offer: &Offer, deadline: Instant) -> Result<Self, Error> {
        stream.set_nonblocking(true).map_err(|source| Error::io("Cannot set up the socket", source))?;
        abort_on_close(&stream, true).map_err(|source| Error::io("Cannot set up the socket", source))?;
        // Does not matter to a socket that is no TCP socket (a test's socket pair).
        let _ = stream.set_nodelay(true);
        let mut staging = vec![0; STAGING_BYTES].into_boxed_slice();
        let (grant, unparsed) = shake_hands(&stream, offer, deadline, &mut staging)?;
        Ok(Self {
            stream,
            grant,
            limits: grant.limits(),
            outstanding: Outstanding::new(&grant),
            large: 0,
            head: Vec::with_capacity(4096),
            head_at: 0,
            queue: VecDeque::with_capacity(grant.credits() as usize),
            sent: 0,
            blocked: false,
            send_error: None,
            pongs_queued: 0,
            staging,
            unparsed,
            partial: None,
            early: None,
            done: Vec::new(),
            upgrade: Upgrade::None,
            keepalive: Keepalive::new(&grant, Instant::now()),
            process: process(),
            failure: None,
            lost: Status::OK,
            counters: ClientCounters::default(),
        })
    }

    /// How long the server may be silent while something is outstanding before the connection ends with
    /// ETIMEDOUT. It is pinged in between, so a server that lives but works long on a request is not silent.
    /// Default: three times the keepalive granted.
    pub fn set_request_timeout(&mut self, timeout: Duration) {
        self.keepalive.set_request_timeout(timeout);
    }

    /// Its own address.
    pub fn local_address(&self) -> Result<SocketAddr, Error> {
        let address = self.stream.local_addr();
        address.map_err(|source| Error::io("Cannot find out the connection's address", source))
    }

    /// Tells the server where this side's end of a queue pair is, and waits until `deadline` to be told where
    /// the server's is. Nothing may have been asked yet, and [`Grant::queue_pair`] must be granted. If the
    /// server makes no queue pair, or none in time, this fails; in the first case the connection goes on as
    /// it is ([`ClientTransport::failure`] is None).
    pub fn exchange_queue_pairs(
        &mut self,
        ours: &QueuePairAddress,
        deadline: Instant,
    ) -> Result<QueuePairAddress, Error> {
        let start = self.head.len();
        message::encode_queue_pair(Ok(ours), self.limits.crc, &mut self.head);
        let head_len = self.head.len() - start;
        self.queue.push_back(Queued { head_len, data_len: 0, request: None, pong: false });
        self.upgrade = Upgrade::Requested;
        self.flush();
        let mut none = Vec::new();
        loop {
            self.receive(&mut none);
            if let Upgrade::Answered(answer) = std::mem::replace(&mut self.upgrade, Upgrade::Requested) {
                self.upgrade = Upgrade::None;
                return answer;
            }
            if self.failure.is_none() && Instant::now() >= deadline {
                self.fail_lost(libc::ETIMEDOUT, "the server made no queue pair in time");
            }
            if let Some(failure) = &self.failure {
                return Err(Error::Closed { errno: failure.errno(), text: failure.to_string() });
            }
            match self.wait(Some(deadline)) {
                Err(error) if error.errno() != libc::EINTR => return Err(error),
                _ => {}
            }
        }
    }

    /// Ends the connection. `receive` then hands out what was outstanding.
    fn fail(&mut self, error: Error, lost: Status) {
        if self.failure.is_some() {
            return;
        }
        if let (Error::Violation(violation), true) = (&error, self.queue.is_empty()) {
            // Tell the server what it did wrong, if the socket takes it.
            self.head.clear();
            let status = Status::protocol(violation.errno());
            message::encode_goaway(status, &violation.to_string(), self.limits.crc, &mut self.head);
            let _ = send(&self.stream, &[IoSlice::new(&self.head)]);
        }
        self.close();
        self.failure = Some(error);
        self.lost = lost;
        self.queue.clear();
        self.head.clear();
        self.blocked = false;
        self.unparsed = 0..0;
    }

    /// Ends the connection for every process that has its socket. What is unsent or unanswered does not go on
    /// being sent: the server gets a reset.
    fn close(&self) {
        if self.queue.is_empty() && !self.is_owed() {
            let _ = abort_on_close(&self.stream, false);
        } else {
            // Dissolving the association resets it, also while a forked child keeps the socket open. Only TCP
            // knows that.
            let _ = rustix::net::connect_unspec(&self.stream);
        }
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn fail_violation(&mut self, violation: Violation) {
        let lost = match violation.errno() {
            libc::ETIMEDOUT => Status::transport(libc::ETIMEDOUT),
            errno => Status::protocol(errno),
        };
        self.fail(violation.into(), lost);
    }

    fn fail_lost(&mut self, errno: i32, why: &str) {
        let text = format!("{why}. If the server still runs, its log says more; connect anew");
        self.fail(Error::Closed { errno, text }, lost(errno));
    }

    /// Moves everything outstanding to `replies`, after a failure.
    fn hand_out_lost(&mut self, replies: &mut Vec<Reply>) {
        let lost = self.lost;
        let reply =
            |tag, bulk| Reply { tag, status: lost, result: 0, body: Body::from(&[][..]), data_len: 0, bulk };
        replies.extend(self.early.take());
        replies.extend(self.partial.take().map(|partial| reply(partial.reply.tag, partial.reply.bulk)));
        replies.extend(self.outstanding.drain().map(|pending| reply(pending.tag, pending.bulk)));
        self.large = 0;
    }

    // Sending
    // ------------------------------------------------------------------------------------------------------

    /// Sends once from the front of the queue. Whether all that was tried went out.
    fn send_some(&mut self) -> io::Result<bool> {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let mut count = 0;
        let mut total = 0;
        let mut push = |slice| {
            if count == SLICES_MAX {
                return false;
            }
            slices[count] = IoSlice::new(slice);
            count += 1;
            total += slice.len();
            true
        };
        // Headers of messages without data form one run.
        let mut run = self.head_at..self.head_at;
        let mut skip = self.sent;
        let mut room = true;
        for queued in &self.queue {
            run.end += queued.head_len;
            if queued.data_len > 0 {
                run.start += skip.min(run.len());
                room = run.is_empty() || push(&self.head[run.clone()]);
                run.start = run.end;
                let from = skip.saturating_sub(queued.head_len);
                let bulk = self.bulk_of(queued);
                room = room && bulk.slices(from..queued.data_len).all(&mut push);
                skip = 0;
            }
            if !room {
                break;
            }
        }
        run.start += skip.min(run.len());
        if room && !run.is_empty() {
            push(&self.head[run]);
        }
        let sent = send(&self.stream, &slices[..count]);
        self.counters.sends += 1;
        let n = sent?;
        let all = n == total;
        self.advance(n);
        Ok(all)
    }

    /// The data of a queued request: it is outstanding, or, at the front, already answered.
    fn bulk_of(&self, queued: &Queued) -> &crate::memory::Buffers {
        let bulk = match queued.request.and_then(|id| self.outstanding.get(id)) {
            Some(pending) => Some(&pending.bulk),
            None => self.early.as_ref().map(|reply| &reply.bulk),
        };
        match bulk {
            Some(Bulk::Out(buffers)) => buffers,
            _ => unreachable!("a queued message with data is a request that owns it"),
        }
    }

    /// Notes that `n` more bytes have been sent.
    fn advance(&mut self, mut n: usize) {
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
                        Some(partial) if partial.queued => partial.queued = false,
                        _ => self.done.extend(self.early.take()),
                    },
                }
            }
            self.queue.pop_front();
        }
        if self.queue.is_empty() {
            self.head.clear();
            self.head_at = 0;
        } else if self.head_at >= HEAD_SENT_BYTES_MAX {
            self.head.drain(..self.head_at);
            self.head_at = 0;
        }
    }

    fn queue_ping(&mut self, now: Instant) {
        let id = self.keepalive.on_ping(now);
        let start = self.head.len();
        message::encode_ping(id, self.limits.crc, &mut self.head);
        let head_len = self.head.len() - start;
        self.queue.push_back(Queued { head_len, data_len: 0, request: None, pong: false });
    }

    // Receiving
    // ----------------------------------------------------------------------------------------------------

    /// Reads once. How many bytes, and whether there may be more.
    fn read(&mut self) -> io::Result<(usize, bool)> {
        // What is left is less than one message without its data: cheap to move.
        self.staging.copy_within(self.unparsed.clone(), 0);
        self.unparsed = 0..self.unparsed.len();
        let end = self.unparsed.end;
        let left = self.partial.as_ref().map_or(0, |partial| partial.reply.data_len - partial.placed);
        let limit = if left >= DIRECT_BYTES {
            READ_AHEAD_BYTES
        } else if self.large > 0 {
            end + left + READ_AHEAD_BYTES
        } else {
            STAGING_BYTES
        };
        let staging = &mut self.staging[end..limit];
        let (n, tried) = match &mut self.partial {
            Some(partial) if left >= DIRECT_BYTES => {
                let range = partial.placed..partial.reply.data_len;
                let Bulk::In(buffers) = &mut partial.reply.bulk else {
                    unreachable!("only a request with room for it is given data")
                };
                let mut slices: [IoSliceMut<'_>; SLICES_MAX] =
                    std::array::from_fn(|_| IoSliceMut::new(&mut []));
                let mut count = 0;
                let mut direct = 0;
                for slice in buffers.slices_mut(range.clone()).take(SLICES_MAX - 1) {
                    direct += slice.len();
                    slices[count] = IoSliceMut::new(slice);
                    count += 1;
                }
                let mut tried = direct;
                if direct == range.len() {
                    tried += staging.len();
                    slices[count] = IoSliceMut::new(staging);
                    count += 1;
                }
                let n = (&self.stream).read_vectored(&mut slices[..count])?;
                partial.placed += n.min(direct);
                self.unparsed.end += n.saturating_sub(direct);
                (n, tried)
            }
            _ => {
                let tried = staging.len();
                let n = (&self.stream).read(staging)?;
                self.unparsed.end += n;
                (n, tried)
            }
        };
        Ok((n, n == tried))
    }

    /// Takes in everything in `staging` that is complete.
    fn parse(&mut self, replies: &mut Vec<Reply>) -> Result<(), Violation> {
        loop {
            if let Some(partial) = &mut self.partial {
                let left = partial.reply.data_len - partial.placed;
                let n = left.min(self.unparsed.len());
                if n > 0
                    && let Bulk::In(buffers) = &mut partial.reply.bulk
                {
                    let data = &self.staging[self.unparsed.start..self.unparsed.start + n];
                    buffers.write_at(partial.placed, data);
                    partial.placed += n;
                    self.unparsed.start += n;
                    self.counters.bounced_bytes += n as u64;
                }
                if n < left {
                    return Ok(());
                }
                self.finish_partial(replies)?;
            }
            let unparsed = &self.staging[self.unparsed.clone()];
            let (message, taken) = match message::parse(unparsed, &self.limits)? {
                Parsed::Need(_) => return Ok(()),
                Parsed::Item(message, taken) => (message, taken),
            };
            self.unparsed.start += taken;
            match message {
                Message::Response(response, body) => {
                    let body = Body::from(body);
                    self.begin_response(response, body)?;
                }
                Message::Ping(id) => {
                    if self.pongs_queued == PONGS_MAX {
                        return Err(Violation::Stalled);
                    }
                    self.pongs_queued += 1;
                    let start = self.head.len();
                    message::encode_pong(id, self.limits.crc, &mut self.head);
                    let head_len = self.head.len() - start;
                    self.queue.push_back(Queued { head_len, data_len: 0, request: None, pong: true });
                    self.flush();
                }
                Message::Pong(id) if self.keepalive.permits_pong(id) => {}
                Message::Pong(_) => return Err(Violation::RequestId),
                Message::Goaway(status, text) => {
                    let text = message::text(text);
                    self.end_with_goaway(status, text);
                    return Ok(());
                }
                Message::QueuePair(what) if matches!(self.upgrade, Upgrade::Requested) => {
                    let rejected = |(status, text)| Error::Rejected { status, text: message::text(text) };
                    self.upgrade = Upgrade::Answered(what.map_err(rejected));
                }
                Message::QueuePair(..) => return Err(Violation::Kind(message::Kind::QueuePair as u8)),
                Message::Request(..) => return Err(Violation::Kind(message::Kind::Request as u8)),
            }
        }
    }

    /// A response's header has arrived: its request is no longer outstanding, its data goes to `partial`.
    fn begin_response(&mut self, response: message::Response, body: Body) -> Result<(), Violation> {
        let id = RequestId(response.id);
        let pending = self.outstanding.get(id).ok_or(Violation::RequestId)?;
        let data_len = response.data_len as usize;
        if data_len > pending.bulk.len_in() {
            return Err(Violation::Length);
        }
        if pending.queued {
            // The server may answer before it has the data, but not before it has the command.
            let front = self.queue.front();
            if !front.is_some_and(|front| front.request == Some(id) && self.sent >= front.head_len) {
                return Err(Violation::RequestId);
            }
        }
        let pending = self.outstanding.finish(id, response.credits)?;
        self.large -= largeness(&pending.bulk);
        self.partial = Some(Partial {
            reply: Reply {
                tag: pending.tag,
                status: response.status,
                result: response.result,
                body,
                data_len,
                bulk: pending.bulk,
            },
            placed: 0,
            data_crc: response.data_crc,
            queued: pending.queued,
        });
        Ok(())
    }

    /// All data of `partial` is in place.
    fn finish_partial(&mut self, replies: &mut Vec<Reply>) -> Result<(), Violation> {
        let Some(partial) = &self.partial else { return Ok(()) };
        if self.limits.crc && partial.data_crc != data_crc(&partial.reply.bulk, partial.reply.data_len, true)
        {
            return Err(Violation::Checksum);
        }
        if let Some(partial) = self.partial.take() {
            if partial.queued {
                self.early = Some(partial.reply);
            } else {
                replies.push(partial.reply);
            }
        }
        Ok(())
    }

    fn end_with_goaway(&mut self, status: Status, text: String) {
        let lost = match (status.class, status.errno) {
            (Class::Protocol, errno) => Status::protocol(errno),
            (_, errno) => lost(errno),
        };
        let errno = if status.is_ok() { libc::ECONNRESET } else { status.errno };
        let text = if text.is_empty() { "the server ended it without giving a reason".into() } else { text };
        self.fail(Error::Closed { errno, text }, lost);
    }

    // Keepalive
    // ------------------------------------------------------------------------------------------------------

    /// Whether the server owes a sign of life.
    fn is_owed(&self) -> bool {
        !self.outstanding.is_empty() || self.partial.is_some() || self.early.is_some()
    }

    /// Pings a server that has been silent for long. Whether it has been silent for too long; if so, and
    /// nothing can be read from the socket, it is given up.
    fn has_timed_out(&mut self, now: Instant) -> bool {
        if self.failure.is_some() {
            return false;
        }
        let verdict = self.keepalive.action(now, self.is_owed());
        if verdict == Action::Ping {
            self.queue_ping(now);
            self.flush();
        }
        verdict == Action::TimedOut
    }
}

impl ClientTransport for Client {
    fn grant(&self) -> &Grant {
        &self.grant
    }

    fn send(&mut self, tag: u64, body: &[u8], bulk: Bulk, control: bool) -> Result<RequestId, NotSent> {
        if self.failure.is_some() || self.send_error.is_some() {
            return Err(NotSent(bulk));
        }
        let (data_len, len_in) = (bulk.len_out(), bulk.len_in());
        assert!(
            data_len.max(len_in) <= self.limits.data_bytes_max as usize
                && body.len() <= message::BODY_BYTES_MAX,
            "a request exceeds the grant"
        );
        let data_crc = if self.limits.crc { data_crc(&bulk, data_len, false) } else { 0 };
        let region = match &bulk {
            Bulk::In(_) => RemoteRegion::In { address: 0, key: 0, len: len_in as u32 },
            _ => RemoteRegion::None,
        };
        let largeness = largeness(&bulk);
        let was_idle = self.outstanding.is_empty();
        let id = self
            .outstanding
            .insert(Pending { tag, bulk, queued: true }, control)
            .map_err(|pending| NotSent(pending.bulk))?;
        if was_idle {
            self.keepalive.on_send(Instant::now());
        }
        self.large += largeness;
        let start = self.head.len();
        let request = message::Request { id: id.0, body_len: 0, data_len: data_len as u32, region, data_crc };
        request.encode(body, self.limits.crc, &mut self.head);
        let head_len = self.head.len() - start;
        self.queue.push_back(Queued { head_len, data_len, request: Some(id), pong: false });
        Ok(id)
    }

    fn dequeue(&mut self, request: RequestId) -> Option<Bulk> {
        let index = self.queue.iter().position(|queued| queued.request == Some(request))?;
        if index == 0 && self.sent > 0 {
            return None;
        }
        let start = self.head_at + self.queue.range(..index).map(|queued| queued.head_len).sum::<usize>();
        let queued = self.queue.remove(index)?;
        self.head.drain(start..start + queued.head_len);
        let pending = self.outstanding.finish(request, 1).ok()?;
        self.large -= largeness(&pending.bulk);
        Some(pending.bulk)
    }

    fn flush(&mut self) {
        self.blocked = false;
        while !self.queue.is_empty() && self.send_error.is_none() {
            match self.send_some() {
                Ok(true) => {}
                Ok(false) => {
                    self.blocked = true;
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked = true;
                    return;
                }
                Err(error) => self.send_error = Some(error),
            }
        }
    }

    fn receive(&mut self, replies: &mut Vec<Reply>) -> bool {
        let before = replies.len();
        let mut arrived = false;
        if self.blocked {
            self.flush();
        }
        replies.append(&mut self.done);
        let mut more = true;
        let mut reads = 0;
        while self.failure.is_none() {
            // First of all what came along with the handshake.
            if let Err(violation) = self.parse(replies) {
                self.fail_violation(violation);
            }
            if !more || self.failure.is_some() {
                break;
            }
            match self.read() {
                Ok((0, _)) => self.fail_lost(libc::ECONNRESET, "the server closed it"),
                Ok((_, again)) => {
                    self.counters.receives += 1;
                    self.keepalive.on_receive(Instant::now());
                    arrived = true;
                    reads += 1;
                    more = again && reads < READS_MAX;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if let Some(error) = self.send_error.take() {
                        self.fail_lost(error.raw_os_error().unwrap_or(libc::EPIPE), &error.to_string());
                    }
                    break;
                }
                Err(error) => {
                    let errno = error.raw_os_error().unwrap_or(libc::ECONNRESET);
                    let hint = match errno {
                        libc::ECONNRESET => {
                            ": a server does this to a client that takes no responses while others wait for memory"
                        }
                        _ => "",
                    };
                    self.fail_lost(errno, &format!("{error}{hint}"));
                }
            }
        }
        if !arrived && self.has_timed_out(Instant::now()) {
            let heard = self.keepalive.last_rx().elapsed().as_secs_f64();
            self.fail_lost(libc::ETIMEDOUT, &format!("the server has been silent for {heard:.1} s"));
        }
        replies.append(&mut self.done);
        if self.failure.is_some() {
            self.hand_out_lost(replies);
        }
        arrived || replies.len() > before
    }

    fn wait(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        if !self.queue.is_empty() {
            self.flush();
        }
        loop {
            let now = Instant::now();
            if self.has_timed_out(now)
                || self.failure.is_some()
                || self.send_error.is_some()
                || !self.done.is_empty()
                || deadline.is_some_and(|deadline| now >= deadline)
            {
                return Ok(());
            }
            let until = deadline.into_iter().chain(self.keepalive.deadline(self.is_owed())).min();
            let timeout = until.map(|until| {
                let left = until.saturating_duration_since(now);
                Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
            });
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, self.blocked);
            let mut fds = [PollFd::new(&self.stream, flags)];
            let ready = rustix::event::poll(&mut fds, timeout.as_ref());
            let events = fds[0].revents();
            match ready {
                Ok(0) => {}
                Ok(_) => {
                    if events.contains(PollFlags::OUT) {
                        self.flush();
                    }
                    return Ok(());
                }
                Err(errno) => return Err(Error::io("Waiting for the server was interrupted", errno)),
            }
        }
    }

    fn poll_fd(&mut self) -> (BorrowedFd<'_>, bool) {
        (self.stream.as_fd(), !self.queue.is_empty())
    }

    fn outstanding(&self) -> usize {
        self.outstanding.len()
            + usize::from(self.partial.is_some())
            + usize::from(self.early.is_some())
            + self.done.len()
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

impl Drop for Client {
    fn drop(&mut self) {
        // A forked child that drops its copy leaves the connection to its parent.
        if self.failure.is_none() && self.process == process() {
            self.close();
        }
    }
}

/// Whether the end of the last descriptor resets the connection, as it must unless both sides know that they
/// are done: otherwise the kernel would go on sending what its program has given up, after kill -9 too.
fn abort_on_close(socket: impl AsFd, aborts: bool) -> io::Result<()> {
    Ok(rustix::net::sockopt::set_socket_linger(socket, aborts.then_some(Duration::ZERO))?)
}

/// What a request adds to [`Client::large`].
fn largeness(bulk: &Bulk) -> isize {
    match bulk.len_in() {
        0 => 0,
        len if len < LARGE_BYTES => -1,
        _ => 1,
    }
}

/// How requests end whose connection ended for this reason: few errnos, so that a caller can tell them from
/// the file's.
fn lost(errno: i32) -> Status {
    Status::transport(match errno {
        libc::ETIMEDOUT | libc::EPIPE | libc::ENOTCONN => errno,
        _ => libc::ECONNRESET,
    })
}

/// Sends; a stream that is closed gives EPIPE and no signal.
fn send(stream: &TcpStream, slices: &[IoSlice<'_>]) -> io::Result<usize> {
    Ok(rustix::net::sendmsg(stream, slices, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?)
}

/// CRC32C of the first `len` bytes.
fn data_crc(bulk: &Bulk, len: usize, inward: bool) -> u32 {
    let mut crc = DataCrc::default();
    match bulk {
        Bulk::In(buffers) if inward => buffers.slices(0..len).for_each(|slice| crc.update(slice)),
        Bulk::Out(buffers) if !inward => buffers.slices(0..len).for_each(|slice| crc.update(slice)),
        _ => {}
    }
    crc.finish()
}

/// Sends the hello, waits for the welcome. What came behind the welcome stays in `staging`, at the range
/// returned.
fn shake_hands(
    stream: &TcpStream,
    offer: &Offer,
    deadline: Instant,
    staging: &mut [u8],
) -> Result<(Grant, std::ops::Range<usize>), Error> {
    let wrong = |source: io::Error| {
        Error::io(
            "The handshake with the server failed; check that a raio_server listens on that port",
            source,
        )
    };
    let hello = offer.hello();
    let mut sent = 0;
    let mut end = 0;
    loop {
        let flags = if sent < hello.len() { PollFlags::OUT } else { PollFlags::IN };
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match rustix::event::poll(&mut [PollFd::new(stream, flags)], Some(&timeout)) {
            Ok(0) => return Err(wrong(rustix::io::Errno::TIMEDOUT.into())),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(wrong(errno.into())),
        }
        let step = if sent < hello.len() {
            send(stream, &[IoSlice::new(&hello[sent..])]).map(|n| sent += n)
        } else {
            // One that sends more than a handshake may be long has been found out by `grant`.
            let mut stream = stream;
            match stream.read(&mut staging[end..]) {
                Ok(0) => Err(rustix::io::Errno::CONNRESET.into()),
                other => other.map(|n| end += n),
            }
        };
        match step {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(error) => return Err(wrong(error)),
        }
        if end > 0
            && let Parsed::Item(grant, taken) = offer.grant(&staging[..end])?
        {
            return Ok((grant, taken..end));
        }
    }
}

#[cfg(test)]
mod tests;
