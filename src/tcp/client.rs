//! The client's side of TCP: one connection, used by one thread at a time.
//!
//! Nothing here starts a thread or needs io_uring. What is sent goes out in as few system calls as the kernel
//! allows: the headers and commands of a batch lie one after another in `head`, the data of writes is sent
//! straight from the caller's buffers. What arrives is read into `staging` and parsed there; when much of a
//! response's data is still to come it is read straight into the caller's buffers, with the bytes behind it
//! going to `staging` in the same call.
//!
//! What the bytes mean is the [`Core`]'s business, making the connection that of `dial`.

mod dial;

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::net::{IpAddr, Shutdown};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use socket2::Socket;

pub use dial::TcpDial;

use crate::address::Endpoint;
use crate::client::{Core, Exposed, Wait, timespec};
use crate::connecting::finish;
use crate::error::{Error, Status, Violation};
use crate::handshake::Offer;
use crate::memory::process;
use crate::message::{self, QueuePairAddress, RemoteRegion};
use crate::records::Records;
use crate::transport::{Bulk, ClientCore, ClientTransport, NotSent, Reply, RequestId, SendOptions};
use crate::tuning::{
    CLIENT_IDLE_CHECK_AFTER as IDLE_CHECK_AFTER, TCP_CLIENT_READS_MAX as READS_MAX,
    TCP_CLIENT_SLICES_MAX as SLICES_MAX, TCP_DIRECT_BYTES as DIRECT_BYTES,
    TCP_READ_AHEAD_BYTES as READ_AHEAD_BYTES, TCP_STAGING_BYTES as STAGING_BYTES,
};

/// What may be behind a reset.
const RESET_HINT: &str =
    ": a server does this to a client that takes no responses while others wait for memory";

/// A connection to a server over TCP.
#[derive(Debug)]
pub struct TcpClient {
    stream: Socket,
    records: Records,
    core: Core,
    /// The socket took no more at the last try.
    blocked: bool,
    /// Something had arrived before the first of what is queued could be sent: that is taken in first, as it
    /// may be the end of the connection.
    held_back: bool,
    /// Nothing that is unanswered matters to anybody.
    sent_goaway: bool,
    /// Sending failed. The connection ends once everything that arrived before has been taken in: it may say
    /// why.
    send_error: Option<io::Error>,
    staging: Box<[u8]>,
    /// The part of `staging` that has not been parsed.
    unparsed: std::ops::Range<usize>,
    /// The process that connected: see [`process`].
    process: u64,
    /// What tells it the time.
    clock: fn() -> Instant,
}

impl TcpClient {
    /// Connects to the server at `endpoint` and shakes hands, by `deadline`. Waits for it; [`TcpDial`] does
    /// not.
    pub fn connect(endpoint: impl Into<Endpoint>, offer: &Offer, deadline: Instant) -> Result<Self, Error> {
        finish(&mut TcpDial::new(endpoint, offer, deadline))
    }

    /// Shakes hands over a stream socket that is connected, by `deadline`. Waits for it.
    pub fn from_stream(stream: impl Into<Socket>, offer: &Offer, deadline: Instant) -> Result<Self, Error> {
        finish(&mut TcpDial::over(stream, offer, deadline))
    }

    /// Has this tell it the time: a virtual clock, for tests.
    #[cfg(any(test, feature = "test-peers"))]
    pub fn set_clock(&mut self, clock: fn() -> Instant) {
        self.clock = clock;
    }

    /// Its own IP address.
    pub fn local_ip(&self) -> Result<IpAddr, Error> {
        let address = self.stream.local_addr();
        let address = address.and_then(|address| address.as_socket().ok_or(Errno::AFNOSUPPORT.into()));
        match address {
            Ok(address) => Ok(address.ip()),
            Err(source) => Err(Error::io("Cannot find out the connection's address", source)),
        }
    }

    /// Tells the server where this side's end of a queue pair is, and lets it tell where the server's is:
    /// [`TcpClient::take_queue_pair`]. Nothing may have been asked yet, and [`Grant::queue_pair`] must be
    /// granted.
    ///
    /// [`Grant::queue_pair`]: crate::handshake::Grant::queue_pair
    pub fn send_queue_pair(&mut self, ours: &QueuePairAddress) {
        self.core.request_upgrade(ours);
        self.flush();
    }

    /// Where the server's end of the queue pair is, once the server has told. If it makes no queue pair, or
    /// none until `deadline`, this fails; in the first case the connection goes on as it is
    /// ([`ClientTransport::failure`] is None).
    pub fn take_queue_pair(
        &mut self,
        now: Instant,
        deadline: Instant,
    ) -> Option<Result<QueuePairAddress, Error>> {
        self.receive(&mut Vec::new());
        if let Some(answer) = self.core.take_upgrade() {
            return Some(answer);
        }
        if !self.core.has_failed() && now >= deadline {
            self.core.fail_lost(libc::ETIMEDOUT, "the server made no queue pair in time");
            self.end();
        }
        let failure = self.core.failure()?;
        Some(Err(Error::Closed { errno: failure.errno(), text: failure.to_string() }))
    }

    /// Does what is left to be done when the connection has just ended.
    fn end(&mut self) {
        let Some(ending) = self.core.take_ending() else { return };
        // Tell the server what it did wrong.
        self.close(ending.goaway.as_deref().unwrap_or_default(), ending.is_orderly);
        self.blocked = false;
        self.unparsed = 0..0;
    }

    /// Ends the connection for every process that has its socket, with these words if the socket takes them.
    /// If it does not end in good order, what is unsent or unanswered does not go on being sent: the server
    /// gets a reset.
    fn close(&mut self, words: &[u8], is_orderly: bool) {
        if !words.is_empty() || is_orderly && !self.records.is_clear() {
            let _ = send(&self.stream, &self.records.seal_last(&[IoSlice::new(words)]));
        }
        if is_orderly {
            let _ = abort_on_close(&self.stream, false);
        } else {
            // Dissolving the association resets it, also while a forked child keeps the socket open. Only TCP
            // knows that. What a Unix socket has in it stays there, but its peer sees the end before that.
            let _ = rustix::net::connect_unspec(&self.stream);
        }
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    // Sending
    // ------------------------------------------------------------------------------------------------------

    /// Sends what is queued, as far as the socket takes it.
    fn send_queue(&mut self) {
        self.blocked = false;
        while self.core.has_unsent() && self.send_error.is_none() && !self.held_back {
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

    /// Sends once from the front of the queue. Whether all that was tried went out.
    fn send_some(&mut self) -> io::Result<bool> {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let mut count = 0;
        self.core.unsent(|slice| {
            if count == SLICES_MAX {
                return false;
            }
            slices[count] = IoSlice::new(slice);
            count += 1;
            true
        });
        let sealed = self.records.seal(&slices[..count]);
        let tried: usize = sealed.iter().map(|slice| slice.len()).sum();
        let sent = send(&self.stream, &sealed);
        self.core.counters.sends += 1;
        let sent = sent?;
        self.core.on_sent(self.records.on_sent(sent));
        Ok(sent == tried)
    }

    // Receiving
    // ----------------------------------------------------------------------------------------------------

    /// Reads once. How many bytes, and whether there may be more.
    fn read(&mut self) -> io::Result<(usize, bool)> {
        // What is left is less than one message without its data, and less than a record: cheap to move.
        let held = self.records.held();
        self.staging.copy_within(self.unparsed.start..self.unparsed.end + held, 0);
        self.unparsed = 0..self.unparsed.len();
        let end = self.unparsed.end + held;
        let left = self.core.data_left();
        let is_direct = left >= DIRECT_BYTES && self.records.is_clear();
        let limit = if is_direct {
            READ_AHEAD_BYTES
        } else if self.core.awaits_large() {
            (end + left + READ_AHEAD_BYTES).min(STAGING_BYTES)
        } else {
            STAGING_BYTES
        };
        let staging = &mut self.staging[end..limit];
        let (n, tried, staged) = match self.core.data_room() {
            Some((buffers, range)) if is_direct => {
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
                self.core.on_data(n.min(direct));
                (n, tried, n.saturating_sub(direct))
            }
            _ => {
                let tried = staging.len();
                let n = (&self.stream).read(staging)?;
                (n, tried, n)
            }
        };
        match self.records.open(&mut self.staging, self.unparsed.end..end + staged) {
            Ok(opened) => self.unparsed.end += opened,
            Err(violation) => self.core.fail_violation(violation),
        }
        Ok((n, n == tried))
    }

    /// Takes in everything in `staging` that is complete.
    fn parse(&mut self, replies: &mut Vec<Reply>) {
        loop {
            let progress = self.core.on_bytes(&self.staging[self.unparsed.clone()], replies);
            self.unparsed.start += progress.taken;
            if !progress.flush {
                return;
            }
            self.send_queue();
        }
    }
}

impl ClientTransport for TcpClient {
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
        let len = bulk.len();
        if self.send_error.is_some() || !self.core.may_send(body, len, options) {
            return Err(NotSent(bulk));
        }
        let (region, data_len) = match &bulk {
            Bulk::None => (RemoteRegion::None, 0),
            Bulk::In(_) => (RemoteRegion::In { address: 0, key: 0, len: len as u32 }, 0),
            Bulk::Out(_) => (RemoteRegion::None, len),
        };
        self.core.send(tag, body, bulk, options, Exposed { region, data_len, lease: () })
    }

    fn dequeue(&mut self, request: RequestId) -> Option<Bulk> {
        self.core.dequeue(request).map(|(bulk, ())| bulk)
    }

    fn detach(&mut self, tag: u64) -> Option<Bulk> {
        let request = self.core.find(tag)?;
        self.core.bulk_mut(request).map(Bulk::detach)
    }

    fn flush(&mut self) {
        if self.core.begins_to_owe() {
            let now = (self.clock)();
            // What is sent by a connection that has ended has an unknown outcome for no reason.
            let is_idle = now >= self.core.last_rx() + IDLE_CHECK_AFTER;
            self.held_back = is_idle && has_arrived(&self.stream);
            self.core.on_owed(now);
        }
        self.send_queue();
    }

    fn receive(&mut self, replies: &mut Vec<Reply>) -> bool {
        let now = (self.clock)();
        let before = replies.len();
        let mut arrived = false;
        if self.blocked {
            self.send_queue();
        }
        self.core.take_done(replies);
        if !self.unparsed.is_empty() {
            // What came along with the handshake, or what has not been complete yet.
            self.parse(replies);
        }
        let mut reads = 0;
        while !self.core.has_failed() {
            match self.read() {
                Ok((0, _)) => self.core.fail_lost(libc::ECONNRESET, "the server closed it"),
                Ok((_, more)) => {
                    self.core.counters.receives += 1;
                    arrived = true;
                    reads += 1;
                    self.parse(replies);
                    if !more || reads == READS_MAX {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if let Some(error) = self.send_error.take() {
                        self.core.fail_lost(error.raw_os_error().unwrap_or(libc::EPIPE), &error.to_string());
                    }
                    break;
                }
                Err(error) => {
                    let errno = error.raw_os_error().unwrap_or(libc::ECONNRESET);
                    let hint = match errno {
                        libc::ECONNRESET => RESET_HINT,
                        _ => "",
                    };
                    self.core.fail_lost(errno, &format!("{error}{hint}"));
                }
            }
        }
        if self.held_back {
            self.held_back = false;
            self.send_queue();
        }
        if self.core.has_damaged() {
            self.send_damaged_again();
        }
        if arrived {
            self.core.on_receive(now, self.clock);
        } else if self.core.on_silence(now, self.clock) {
            self.send_queue();
        }
        self.core.take_done(replies);
        if self.core.has_failed() {
            self.end();
            self.core.hand_out_lost(replies, |_, (), _| 0);
        }
        arrived || replies.len() > before
    }

    fn wait(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        if self.core.has_unsent() {
            self.send_queue();
        }
        while self.send_error.is_none() {
            let timeout = match self.core.on_wait((self.clock)(), deadline) {
                Wait::Return => return Ok(()),
                Wait::Flush => {
                    self.send_queue();
                    continue;
                }
                Wait::Sleep(timeout) => timeout.map(timespec),
            };
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, self.blocked);
            let mut fds = [PollFd::new(&self.stream, flags)];
            let ready = rustix::event::poll(&mut fds, timeout.as_ref());
            let events = fds[0].revents();
            match ready {
                Ok(0) => {}
                Ok(_) => {
                    if events.contains(PollFlags::OUT) {
                        self.send_queue();
                    }
                    return Ok(());
                }
                Err(errno) => return Err(Error::io("Waiting for the server was interrupted", errno)),
            }
        }
        Ok(())
    }

    fn poll_fd(&mut self) -> (BorrowedFd<'_>, bool) {
        (self.stream.as_fd(), self.core.has_unsent())
    }

    fn abort(&mut self, violation: Violation) {
        self.core.fail_violation(violation);
        self.end();
    }

    fn send_goaway(&mut self) {
        if self.core.has_failed() || self.core.has_unsent() {
            return;
        }
        let mut goaway = Vec::new();
        message::encode_goaway(Status::OK, "", self.core.grant().crc(), &mut goaway);
        let sent = send(&self.stream, &self.records.seal(&[IoSlice::new(&goaway)]));
        self.sent_goaway = sent.is_ok_and(|n| self.records.on_sent(n) == goaway.len());
    }

    fn local_port(&self) -> Option<u16> {
        Some(self.stream.local_addr().ok()?.as_socket()?.port())
    }
}

impl Drop for TcpClient {
    fn drop(&mut self) {
        // A forked child that drops its copy leaves the connection to its parent.
        if !self.core.has_failed() && self.process == process() {
            self.close(&[], self.core.is_idle() || self.sent_goaway);
        }
    }
}

/// Whether the end of the last descriptor resets the connection, as it must unless both sides know that they
/// are done: otherwise the kernel would go on sending what its program has given up, after kill -9 too.
fn abort_on_close(socket: impl AsFd, aborts: bool) -> io::Result<()> {
    Ok(rustix::net::sockopt::set_socket_linger(socket, aborts.then_some(Duration::ZERO))?)
}

/// Whether there is something to be received, or the stream has ended.
fn has_arrived(stream: &Socket) -> bool {
    let received = rustix::net::recv(stream, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT);
    !matches!(received, Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR))
}

/// Sends; a stream that is closed gives EPIPE and no signal.
fn send(stream: &Socket, slices: &[IoSlice<'_>]) -> io::Result<usize> {
    Ok(rustix::net::sendmsg(stream, slices, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?)
}

#[cfg(test)]
mod tests;
