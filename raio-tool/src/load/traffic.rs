//! Reads and writes on open sessions, all of them in one thread.
//!
//! Sessions that have room for another request stand in a line. The first one sends one and goes to the end
//! of it: so they take turns, whatever their number, and however few requests may be in flight in all. One
//! epoll tells which have answers.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use raio_transport::channel::Watch;
use raio_transport::memory::{Buffer, Buffers};
use raio_transport::message;
use raio_transport::protocol::Command;
use raio_transport::random::SplitMix64;
use raio_transport::transport::{Bulk, Reply, SendOptions};
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use slab::Slab;

use super::content;
use super::options::{Plan, Until};
use super::session::Session;
use super::tuning::{DRAIN_TIMEOUT, EVENTS_MAX, KEEPALIVE_CHECK_AFTER, RECONNECT_TICK, TICK};

/// What reads, or writes, came to.
#[derive(Debug)]
pub struct Tally {
    /// How long they took, in nanoseconds; those that succeeded.
    pub latency_ns: Histogram<u64>,
    /// How many succeeded.
    pub ios: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Tally {
    fn new() -> Self {
        let latency_ns = Histogram::new(3).expect("three digits are a precision that it has");
        Self { latency_ns, ios: 0, bytes: 0 }
    }

    fn add(&mut self, bytes: u64, latency: Duration) {
        self.ios += 1;
        self.bytes += bytes;
        // It grows as it must.
        let _ = self.latency_ns.record(latency.as_nanos() as u64);
    }
}

/// What all came to.
#[derive(Debug)]
pub struct Outcome {
    /// From the first request to the last answer.
    pub elapsed: Duration,
    /// Reads that brought what they should, and writes.
    pub reads: Tally,
    /// See there.
    pub writes: Tally,
    /// Reads and writes that failed.
    pub errors: u64,
    /// Reads that brought something else than they should.
    pub wrong: u64,
    /// Writes that may have been done, and failed with their connection. Not among the errors.
    pub unknown: u64,
    /// Connections that took the place of a lost one.
    pub reconnects: u64,
    /// Sessions that ended by themselves.
    pub lost: usize,
    /// The fewest and most reads and writes of an active session.
    pub ios_per_session: (u64, u64),
    /// What was first seen of each of these, as an error message.
    pub first_error: Option<String>,
    /// Of wrong data.
    pub first_wrong: Option<String>,
}

struct Place {
    /// None: it was lost.
    session: Option<Session>,
    in_flight: u32,
    /// How many more it has to send.
    left: u64,
    done: u64,
    /// The next block of a sequential pattern.
    next_block: u64,
    is_in_line: bool,
    is_dirty: bool,
    /// Epoll watches whether it can be written to.
    is_blocked: bool,
    /// The connection that epoll watches.
    connection: u64,
    /// It connects again.
    is_recovering: bool,
    asked: Instant,
}

struct Issued {
    place: u32,
    offset: u64,
    is_read: bool,
    at: Instant,
}

/// See the module documentation.
pub struct Traffic<'a> {
    plan: &'a Plan,
    blocks: u64,
    places: Vec<Place>,
    epoll: OwnedFd,
    line: VecDeque<u32>,
    dirty: Vec<u32>,
    /// Sessions that connect again.
    recovering: Vec<u32>,
    issued: Slab<Issued>,
    buffers: Vec<Box<[u8]>>,
    replies: Vec<Reply>,
    command: Vec<u8>,
    random: SplitMix64,
    outcome: Outcome,
}

impl<'a> Traffic<'a> {
    /// With these sessions, of which as many as planned have work. The file has `size` bytes.
    pub fn new(plan: &'a Plan, sessions: Vec<Session>, size: u64) -> io::Result<Self> {
        let blocks = size / u64::from(plan.io_bytes);
        let count = sessions.len();
        let active = plan.active.min(count);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let now = Instant::now();
        let mut places = Vec::with_capacity(count);
        for (n, mut session) in sessions.into_iter().enumerate() {
            let mut connection = 0;
            if let Watch::Connected(fd, _, number) = session.client.watch() {
                epoll::add(&epoll, fd, EventData::new_u64(n as u64), EventFlags::IN)?;
                connection = number;
            }
            places.push(Place {
                session: Some(session),
                in_flight: 0,
                left: 0,
                done: 0,
                // Sequential ones begin at different places.
                next_block: (u128::from(blocks) * n as u128 / count as u128) as u64,
                is_in_line: false,
                is_dirty: false,
                is_blocked: false,
                connection,
                is_recovering: false,
                asked: now,
            });
        }
        let mut this = Self {
            plan,
            blocks,
            places,
            epoll,
            line: VecDeque::new(),
            dirty: Vec::new(),
            recovering: Vec::new(),
            issued: Slab::new(),
            buffers: Vec::new(),
            replies: Vec::new(),
            command: Vec::new(),
            random: SplitMix64::new(plan.seed),
            outcome: Outcome {
                elapsed: Duration::ZERO,
                reads: Tally::new(),
                writes: Tally::new(),
                errors: 0,
                wrong: 0,
                unknown: 0,
                reconnects: 0,
                lost: 0,
                ios_per_session: (0, 0),
                first_error: None,
                first_wrong: None,
            },
        };
        for n in 0..active {
            // Spread evenly over all of them.
            let place = (n as u64 * count as u64 / active as u64) as u32;
            this.places[place as usize].left = match plan.until {
                Until::Elapsed(_) => u64::MAX,
                Until::Rounds(rounds) => rounds,
            };
            this.stand_in_line(place);
        }
        Ok(this)
    }

    /// Runs the load. `tell` is told once a second how far it is.
    pub fn run(mut self, mut tell: impl FnMut(&Outcome, Duration)) -> io::Result<(Outcome, Vec<Session>)> {
        let active: Vec<u32> = self.line.iter().copied().collect();
        let started = Instant::now();
        let end = match self.plan.until {
            Until::Elapsed(time) => Some(started + time),
            Until::Rounds(_) => None,
        };
        let mut tick = started + TICK;
        let mut events = Vec::with_capacity(EVENTS_MAX);
        loop {
            let now = Instant::now();
            let is_ending = end.is_some_and(|end| now >= end);
            if !is_ending {
                self.issue();
            }
            self.flush()?;
            let has_more = !self.line.is_empty() || !self.recovering.is_empty();
            if self.issued.is_empty() && (is_ending || !has_more) {
                break;
            }
            if end.is_some_and(|end| now >= end + DRAIN_TIMEOUT) {
                let text = || format!("{} requests were not answered", self.issued.len());
                self.outcome.first_error.get_or_insert_with(text);
                self.outcome.errors += self.issued.len() as u64;
                break;
            }
            if now >= tick {
                tick += TICK;
                tell(&self.outcome, now - started);
                self.run_timers(now);
            }
            self.recover()?;
            let mut until = if is_ending { tick } else { end.map_or(tick, |end| end.min(tick)) };
            if !self.recovering.is_empty() {
                until = until.min(now + RECONNECT_TICK);
            }
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                self.receive(event.data.u64() as u32);
            }
        }
        self.outcome.elapsed = started.elapsed();
        let done = || active.iter().map(|&place| self.places[place as usize].done);
        self.outcome.ios_per_session = (done().min().unwrap_or(0), done().max().unwrap_or(0));
        let sessions: Vec<_> = self.places.into_iter().filter_map(|place| place.session).collect();
        let reconnects = sessions.iter().map(|session| session.client.resume_counters().reconnects);
        self.outcome.reconnects = reconnects.sum();
        Ok((self.outcome, sessions))
    }

    fn stand_in_line(&mut self, place: u32) {
        let entry = &mut self.places[place as usize];
        if !entry.is_in_line && entry.left > 0 && entry.in_flight < self.plan.depth && entry.session.is_some()
        {
            entry.is_in_line = true;
            self.line.push_back(place);
        }
    }

    /// Sends requests as long as there may be more in flight.
    fn issue(&mut self) {
        while self.issued.len() < self.plan.in_flight_max
            && let Some(place) = self.line.pop_front()
        {
            self.places[place as usize].is_in_line = false;
            // A session that takes nothing is queued again when it has received something or reconnected.
            if self.issue_one(place) {
                self.stand_in_line(place);
            }
        }
    }

    /// Whether the session has taken it.
    fn issue_one(&mut self, n: u32) -> bool {
        let length = self.plan.io_bytes;
        let (reads, writes) = self.plan.pattern.directions();
        let is_read = reads && (!writes || self.random.next_u64() & 1 == 0);
        let block = if self.plan.pattern.is_random() {
            ((u128::from(self.random.next_u64()) * u128::from(self.blocks)) >> 64) as u64
        } else {
            let next = &mut self.places[n as usize].next_block;
            let block = *next;
            *next = (block + 1) % self.blocks;
            block
        };
        let offset = block * u64::from(length);
        let mut buffer = self.buffers.pop().unwrap_or_else(|| vec![0; length as usize].into());
        if !is_read {
            content::fill(offset, &mut buffer);
        } else if self.plan.verify {
            // So that what never came is not taken for what came before.
            buffer.fill(0xa5);
        }
        let place = &mut self.places[n as usize];
        let Some(session) = &mut place.session else {
            self.buffers.push(buffer);
            return false;
        };
        let buffers = Buffers::One(Buffer::Owned(buffer));
        let file = session.file;
        let (command, bulk) = if is_read {
            (Command::Read { file, offset, length }, Bulk::In(buffers))
        } else {
            (Command::Write { file, offset, length }, Bulk::Out(buffers))
        };
        self.command.clear();
        command.encode(&mut self.command);
        let at = Instant::now();
        let tag = self.issued.insert(Issued { place: n, offset, is_read, at });
        // It has a credit for each that it may have in flight. If it takes none it has failed, or connects
        // again.
        if session.client.send(tag as u64, &self.command, bulk, SendOptions::PLAIN).is_err() {
            self.issued.remove(tag);
            if self.plan.reconnect.is_zero() {
                place.left = 0;
            } else if !place.is_recovering {
                place.is_recovering = true;
                self.recovering.push(n);
            }
            return false;
        }
        place.left -= 1;
        place.in_flight += 1;
        place.asked = at;
        if !place.is_dirty {
            place.is_dirty = true;
            self.dirty.push(n);
        }
        true
    }

    fn flush(&mut self) -> io::Result<()> {
        for n in self.dirty.drain(..) {
            let place = &mut self.places[n as usize];
            place.is_dirty = false;
            if let Some(mut session) = place.session.take() {
                session.client.flush();
                let watched = watch(&self.epoll, n, &mut session, place);
                place.session = Some(session);
                watched?;
            }
        }
        Ok(())
    }

    /// Goes on with the sessions that connect again.
    fn recover(&mut self) -> io::Result<()> {
        for n in std::mem::take(&mut self.recovering) {
            self.places[n as usize].is_recovering = false;
            self.receive(n);
        }
        self.flush()
    }

    /// Takes in what a session has been answered.
    fn receive(&mut self, n: u32) {
        let place = &mut self.places[n as usize];
        let Some(session) = &mut place.session else { return };
        let mut replies = std::mem::take(&mut self.replies);
        session.client.receive(&mut replies);
        let failure = session.client.failure().map(ToString::to_string);
        let is_connected = session.client.is_connected();
        if failure.is_none() && !is_connected && !place.is_recovering {
            place.is_recovering = true;
            self.recovering.push(n);
        }
        // Another connection is to be watched, too.
        let is_other = is_connected && session.client.connections() != place.connection;
        if failure.is_none() && (place.is_blocked || is_other) && !place.is_dirty {
            place.is_dirty = true;
            self.dirty.push(n);
        }
        for reply in replies.drain(..) {
            self.take_in(reply);
        }
        self.replies = replies;
        if let Some(failure) = failure {
            self.places[n as usize].session = None;
            self.outcome.lost += 1;
            self.outcome.first_error.get_or_insert(failure);
        }
        self.stand_in_line(n);
    }

    fn take_in(&mut self, reply: Reply) {
        let issued = self.issued.remove(reply.tag as usize);
        let length = u64::from(self.plan.io_bytes);
        let place = &mut self.places[issued.place as usize];
        place.in_flight -= 1;
        place.done += 1;
        let (Bulk::In(buffers) | Bulk::Out(buffers)) = reply.bulk else { return };
        let Buffers::One(Buffer::Owned(buffer)) = buffers else { return };
        let what = if issued.is_read { "read" } else { "write" };
        if reply.is_unknown {
            self.outcome.unknown += 1;
        } else if !reply.status.is_ok() {
            self.outcome.errors += 1;
            self.outcome.first_error.get_or_insert_with(|| {
                let errno = io::Error::from_raw_os_error(reply.status.errno);
                format!("A {what} at {} failed: {errno}. {}", issued.offset, message::text(&reply.body))
            });
        } else if reply.result != length || (issued.is_read && reply.data_len as u64 != length) {
            self.outcome.errors += 1;
            self.outcome.first_error.get_or_insert_with(|| {
                format!("A {what} at {} did {} bytes of {length}", issued.offset, reply.result)
            });
        } else if let Some(at) = Some(issued.is_read && self.plan.verify)
            .filter(|&check| check)
            .and_then(|_| content::check(issued.offset, &buffer).err())
        {
            self.outcome.wrong += 1;
            self.outcome.first_wrong.get_or_insert_with(|| {
                format!(
                    "Byte {at} of the file is wrong, in the {length} bytes that were read at {}. Was the \
                     file written by --fill, and \
                     by nobody else since?",
                    issued.offset
                )
            });
        } else {
            let tally = if issued.is_read { &mut self.outcome.reads } else { &mut self.outcome.writes };
            tally.add(length, issued.at.elapsed());
        }
        self.buffers.push(buffer);
    }

    /// Runs the timers of sessions that have waited for long: they ping the server, or give it up.
    fn run_timers(&mut self, now: Instant) {
        for n in 0..self.places.len() {
            let place = &self.places[n];
            if place.in_flight > 0 && now.saturating_duration_since(place.asked) >= KEEPALIVE_CHECK_AFTER {
                self.receive(n as u32);
            }
        }
    }
}

/// Has epoll watch the session's connection, and whether it can be written to exactly when it has something
/// to write.
fn watch(epoll: &OwnedFd, n: u32, session: &mut Session, place: &mut Place) -> io::Result<()> {
    // Of a connection that has ended the descriptor is closed, and epoll has forgotten it.
    let Watch::Connected(fd, writes, connection) = session.client.watch() else { return Ok(()) };
    let mut flags = EventFlags::IN;
    flags.set(EventFlags::OUT, writes);
    if connection != place.connection {
        epoll::add(epoll, fd, EventData::new_u64(n.into()), flags)?;
    } else if writes != place.is_blocked {
        epoll::modify(epoll, fd, EventData::new_u64(n.into()), flags)?;
    }
    (place.connection, place.is_blocked) = (connection, writes);
    Ok(())
}
