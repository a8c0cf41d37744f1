//! A connection of the HTTP server: one request at a time, and its response.

use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::request::{Fault, Head, parse};
use super::response::{Answer, Later, Next, Parts, Response, head};
use crate::tuning::http::{HEAD_BYTES_MAX, IDLE_TIMEOUT, LINGER_TIMEOUT, REQUEST_TIMEOUT, SEND_TIMEOUT};

/// See the module documentation.
pub struct Connection {
    socket: OwnedFd,
    /// It came by the admin socket.
    pub is_admin: bool,
    /// Of this user, if so.
    pub user: Option<u32>,
    input: Vec<u8>,
    /// The client sends nothing more.
    is_eof: bool,
    output: Vec<u8>,
    sent: usize,
    state: State,
    /// When this state, or what is sent, last went on.
    since: Instant,
    /// When to step it again, at the latest.
    due: Instant,
    /// A request has been answered.
    is_known: bool,
    /// No further request is taken.
    is_last: bool,
}

enum State {
    /// A request is to come.
    Reading,
    /// The response is to come.
    Waiting(Box<dyn Later>),
    /// Parts of it are to come; in chunks if this is so.
    Streaming(Box<dyn Parts>, bool),
    /// The client is to close the connection.
    Lingering,
}

/// The connection is over.
#[derive(Debug)]
pub struct Over;

impl Connection {
    /// A connection that has just been accepted.
    pub fn new(socket: OwnedFd, is_admin: bool, now: Instant) -> Self {
        Self {
            socket,
            is_admin,
            user: None,
            input: Vec::new(),
            is_eof: false,
            output: Vec::new(),
            sent: 0,
            state: State::Reading,
            since: now,
            due: now,
            is_known: false,
            is_last: false,
        }
    }

    /// The same, of the user with this number, if that is known.
    pub fn of_user(self, user: Option<u32>) -> Self {
        Self { user, ..self }
    }

    /// What to wait for.
    pub fn poll_fd(&self) -> PollFd<'_> {
        let mut flags = PollFlags::empty();
        if !self.is_eof && self.input.len() < HEAD_BYTES_MAX {
            flags |= PollFlags::IN;
        }
        if !self.output.is_empty() {
            flags |= PollFlags::OUT;
        }
        PollFd::new(&self.socket, flags)
    }

    /// When to step it at the latest.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Something that it waits for may have come.
    pub fn wake(&mut self, now: Instant) {
        if matches!(self.state, State::Waiting(_) | State::Streaming(..)) {
            self.due = now;
        }
    }

    /// Whether its response has no end.
    pub fn is_streaming(&self) -> bool {
        matches!(self.state, State::Streaming(..))
    }

    /// Since when nothing has happened.
    pub fn idle_since(&self) -> Instant {
        self.since
    }

    /// What it holds of responses.
    #[cfg(test)]
    pub fn unsent_bytes(&self) -> usize {
        self.output.len()
    }

    /// Goes on as far as that goes. Nobody takes responses any more if the client is gone; `answer` is asked
    /// for what becomes of a request.
    pub fn step(
        &mut self,
        now: Instant,
        is_gone: bool,
        mut answer: impl FnMut(&Head<'_>) -> Answer,
    ) -> Result<(), Over> {
        self.receive(now)?;
        self.send(now)?;
        if !self.output.is_empty() {
            return self.wait_until(self.since + SEND_TIMEOUT, now);
        }
        match &mut self.state {
            State::Reading if self.is_last => self.linger(now),
            State::Reading => self.next_request(now, &mut answer),
            State::Waiting(_) | State::Streaming(..) if is_gone => Err(Over),
            State::Waiting(later) => match later.poll(now) {
                Next::Ready(response) => self.respond(&response, now),
                Next::At(at) => self.ask_again(at),
            },
            // Who cannot take a part has gone.
            State::Streaming(..) if self.is_eof => Err(Over),
            State::Streaming(parts, is_chunked) => match parts.poll(now) {
                Next::Ready(part) => {
                    let is_chunked = *is_chunked;
                    self.stream(part, is_chunked, now)
                }
                Next::At(at) => self.ask_again(at),
            },
            State::Lingering if self.is_eof => Err(Over),
            State::Lingering => {
                self.input.clear();
                self.wait_until(self.since + LINGER_TIMEOUT, now)
            }
        }
    }

    /// Nothing can be done before this time; then it is over.
    fn wait_until(&mut self, deadline: Instant, now: Instant) -> Result<(), Over> {
        self.due = deadline;
        if now < deadline { Ok(()) } else { Err(Over) }
    }

    fn ask_again(&mut self, at: Instant) -> Result<(), Over> {
        self.due = at;
        Ok(())
    }

    fn receive(&mut self, now: Instant) -> Result<(), Over> {
        let mut bytes = [0; HEAD_BYTES_MAX];
        while !self.is_eof && self.input.len() < HEAD_BYTES_MAX {
            let room = &mut bytes[..HEAD_BYTES_MAX - self.input.len()];
            match recv(&self.socket, room, RecvFlags::DONTWAIT) {
                Ok((0, _)) => self.is_eof = true,
                Ok((len, _)) => {
                    if self.input.is_empty() && matches!(self.state, State::Reading) {
                        self.since = now;
                    }
                    self.input.extend_from_slice(&bytes[..len]);
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Over),
            }
        }
        Ok(())
    }

    fn send(&mut self, now: Instant) -> Result<(), Over> {
        while self.sent < self.output.len() {
            match send(&self.socket, &self.output[self.sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(len) => {
                    self.sent += len;
                    self.since = now;
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(_) => return Err(Over),
            }
        }
        // The memory of a large response is not kept.
        (self.output, self.sent) = (Vec::new(), 0);
        Ok(())
    }

    fn next_request(
        &mut self,
        now: Instant,
        answer: &mut impl FnMut(&Head<'_>) -> Answer,
    ) -> Result<(), Over> {
        let (answer, is_old, len) = match parse(&self.input) {
            Ok(Some((head, len))) => {
                self.is_last = head.is_last;
                (answer(&head), head.is_old, len)
            }
            Ok(None) if self.is_eof => return Err(Over),
            Ok(None) => {
                let is_idle = self.is_known && self.input.is_empty();
                let timeout = if is_idle { IDLE_TIMEOUT } else { REQUEST_TIMEOUT };
                return self.wait_until(self.since + timeout, now);
            }
            Err(Fault { status, text }) => {
                // Where the next request would begin is not known.
                self.is_last = true;
                (Answer::Now(Response::error(status, text)), true, self.input.len())
            }
        };
        self.input.drain(..len);
        self.is_known = true;
        match answer {
            Answer::Now(response) => self.respond(&response, now),
            Answer::Later(later) => {
                self.state = State::Waiting(later);
                self.ask_again(now)
            }
            Answer::Stream(content_type, parts) => {
                let encoding = [("Transfer-Encoding", "chunked")];
                let headers = if is_old { &[][..] } else { &encoding };
                self.output = head(200, content_type, headers, self.is_last).into_bytes();
                self.output.extend_from_slice(b"\r\n");
                self.state = State::Streaming(parts, !is_old);
                self.go_on(now)
            }
        }
    }

    fn respond(&mut self, response: &Response, now: Instant) -> Result<(), Over> {
        self.output = response.to_bytes(self.is_last);
        self.state = State::Reading;
        self.go_on(now)
    }

    fn stream(&mut self, part: Option<String>, is_chunked: bool, now: Instant) -> Result<(), Over> {
        match part {
            Some(part) if part.is_empty() => {}
            Some(part) if is_chunked => self.output = format!("{:x}\r\n{part}\r\n", part.len()).into_bytes(),
            Some(part) => self.output = part.into_bytes(),
            None => {
                if is_chunked {
                    self.output = b"0\r\n\r\n".to_vec();
                }
                self.state = State::Reading;
            }
        }
        self.go_on(now)
    }

    /// Sends what there is. What comes after that is for the next step, so that others have their turn.
    fn go_on(&mut self, now: Instant) -> Result<(), Over> {
        self.since = now;
        self.send(now)?;
        self.due = if self.output.is_empty() { now } else { now + SEND_TIMEOUT };
        Ok(())
    }

    fn linger(&mut self, now: Instant) -> Result<(), Over> {
        self.input.clear();
        let _ = shutdown(&self.socket, Shutdown::Write);
        (self.state, self.since, self.due) = (State::Lingering, now, now + LINGER_TIMEOUT);
        if self.is_eof { Err(Over) } else { Ok(()) }
    }
}
