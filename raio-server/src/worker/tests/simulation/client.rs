//! Clients: each a process with a session, two channels of it, and requests on both.
//!
//! A client does what libraio does about a session that was given up, a channel that is left with requests
//! unanswered, and verifiers of files. What it learns it logs for the history, and checks at once as far as
//! that can be.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use raio_transport::channel::{Abandoned, Beginning, Channel, OpenFiles, Reopenable, Settings};
use raio_transport::handshake::{ChannelOffer, Offer};
use raio_transport::memory::{Buffer, Buffers};
use raio_transport::message::SessionId;
use raio_transport::protocol::{Command, FileHandle, FileStatus, OPEN_READ, OPEN_WRITE};
use raio_transport::sync::lock;
use raio_transport::transport::{Bulk, Reply, SendOptions, UsedIds};

use super::disk::{CELLS, FILES};
use super::{Env, clock, network, server};
use crate::history::cells::{CELL_BYTES, CellPlace, CellValue, decode_cell, encode_cell};
use crate::history::{CellRead, CellWrite, CrashImage, FOREVER, FileSync, LogLine, Outcome};

/// How many requests a channel has in flight.
const DEPTH: usize = 4;
/// How long a client tries to continue.
const WINDOW: Duration = Duration::from_secs(60);
/// A server is given up that is silent for three keepalive intervals; and how late a client may look.
const NOTICE: Duration = Duration::from_secs(15 + 10);
/// No verifier is this.
const NEVER: u64 = u64::MAX;

/// What a run's clients are like.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    pub redo: bool,
    /// Channels are kept for too short a time to come back.
    pub short_linger: bool,
    pub window: Duration,
    pub cancels: bool,
    pub abandons: bool,
}

impl Default for Habits {
    fn default() -> Self {
        Self { redo: false, short_linger: false, window: WINDOW, cancels: false, abandons: false }
    }
}

/// See the module documentation.
pub struct Client {
    pub number: u32,
    habits: Habits,
    session: SessionId,
    /// Sessions that it had before, of which something may still happen.
    given_up: Vec<SessionId>,
    /// Writes of theirs that may still happen.
    unresolved: Vec<CellValue>,
    files: Arc<OpenFiles>,
    handles: [Option<FileHandle>; FILES],
    /// Opened, and not known whether every channel can use it.
    opened: [Option<Opened>; FILES],
    slots: [Slot; 2],
    next_channel: u32,
    sequence: u32,
    /// The session has begun.
    has_begun: bool,
    /// It was given up.
    has_failed: bool,
    /// Of each file, the verifier of acknowledged writes that no fsync has followed, 0 if there are none.
    unstable: [u64; FILES],
    /// And these writes.
    acknowledged: [Vec<Acknowledged>; FILES],
}

type Acknowledged = (CellPlace, CellValue);

/// A file that the server has opened, before the client uses it.
#[derive(Clone, Copy, Debug)]
struct Opened {
    handle: FileHandle,
    /// [`OpenFiles::reopenings`], before the open was sent.
    reopenings: u64,
    /// Who opens files again knows of it.
    is_listed: bool,
}

/// A channel's place.
struct Slot {
    number: u32,
    phase: Phase,
    in_flight: BTreeMap<u64, Op>,
    next_tag: u64,
    log: String,
    /// What the channel has left behind that was here, once it has.
    abandoned: Arc<Mutex<Option<Abandoned>>>,
    earlier: Option<Abandoned>,
    /// Writes of earlier channels that may still happen.
    unresolved: Vec<CellValue>,
    /// Of each file, as far as it is known here.
    verifiers: [u64; FILES],
    connections: u64,
}

enum Phase {
    None,
    Beginning(Box<Beginning>),
    Up(Box<Channel>),
}

struct Op {
    what: What,
    begin: u64,
    /// The machine has crashed since it began.
    spans: bool,
    /// The file's verifier when it was last sent.
    verifier: u64,
    is_cancelled: bool,
    /// Where its buffer lies.
    address: usize,
}

#[derive(Debug)]
enum What {
    /// With [`OpenFiles::reopenings`] as it is before.
    Open(usize, u64),
    /// Of a file that was opened, and is not used yet.
    Stat(usize, Opened),
    Read {
        place: CellPlace,
        count: u32,
    },
    Write {
        place: CellPlace,
        count: u32,
        value: CellValue,
    },
    Fsync {
        file: usize,
        taken: u64,
        covers: Vec<Acknowledged>,
    },
    Cancel,
}

fn both(one: u64, other: u64) -> u64 {
    match (one, other) {
        (0, other) => other,
        (one, 0) => one,
        (one, other) if one == other => one,
        _ => NEVER,
    }
}

fn cells_of(place: CellPlace, count: u32) -> impl Iterator<Item = CellPlace> {
    (place.cell..place.cell + count).map(move |cell| CellPlace { cell, ..place })
}

fn buffer(bulk: &Bulk) -> Option<&[u8]> {
    match bulk {
        Bulk::In(Buffers::One(Buffer::Owned(bytes))) | Bulk::Out(Buffers::One(Buffer::Owned(bytes))) => {
            Some(bytes)
        }
        _ => None,
    }
}

impl Slot {
    fn new(number: u32) -> Self {
        Self {
            number,
            phase: Phase::None,
            in_flight: BTreeMap::new(),
            next_tag: 0,
            log: String::new(),
            abandoned: Arc::default(),
            earlier: None,
            unresolved: Vec::new(),
            verifiers: [0; FILES],
            connections: 0,
        }
    }

    fn say(&mut self, line: LogLine) {
        let _ = writeln!(self.log, "{line}");
    }

    /// Nothing of what is unknown happens any more.
    fn fence(&mut self, env: &mut Env) {
        let at = env.tick();
        self.say(LogLine::Fence(at));
        for value in self.unresolved.drain(..) {
            lock(&env.disk).is_over(value);
        }
    }
}

impl Client {
    pub fn new(number: u32, habits: Habits, env: &mut Env) -> Self {
        Self {
            number,
            habits,
            session: env.session_id(),
            given_up: Vec::new(),
            unresolved: Vec::new(),
            files: Arc::default(),
            handles: [None; FILES],
            opened: [None; FILES],
            slots: [Slot::new(1), Slot::new(2)],
            next_channel: 3,
            sequence: 0,
            has_begun: false,
            has_failed: false,
            unstable: [0; FILES],
            acknowledged: Default::default(),
        }
    }

    /// Whether nothing is outstanding, and nothing is to be begun for a while.
    pub fn is_idle(&self) -> bool {
        self.slots.iter().all(|slot| slot.in_flight.is_empty())
    }

    /// Whether it can send requests on all channels.
    pub fn is_up(&self) -> bool {
        self.handles.iter().all(Option::is_some)
            && self.slots.iter().all(|slot| matches!(&slot.phase, Phase::Up(up) if up.is_connected()))
    }

    /// What it has logged.
    pub fn logs(&mut self) -> Vec<String> {
        self.slots.iter_mut().map(|slot| std::mem::take(&mut slot.log)).collect()
    }

    /// Does something. It begins nothing if it `is_ending`.
    pub fn act(&mut self, at: usize, env: &mut Env, is_ending: bool) {
        match &mut self.slots[at].phase {
            Phase::None => self.begin(at, env),
            Phase::Beginning(_) => self.go_on(at, env),
            Phase::Up(_) if is_ending || self.has_failed || env.random.below(2) == 0 => self.collect(at, env),
            Phase::Up(_) => self.submit_some(at, env),
        }
    }

    /// Looks for what has arrived on all channels.
    pub fn look(&mut self, env: &mut Env) {
        for at in 0..self.slots.len() {
            match &self.slots[at].phase {
                Phase::None => {}
                Phase::Beginning(_) => self.go_on(at, env),
                Phase::Up(_) => self.collect(at, env),
            }
        }
    }

    // Channels
    // ------------------------------------------------------------------------------------------------------

    fn begin(&mut self, at: usize, env: &mut Env) {
        if self.has_failed {
            return self.begin_anew(env);
        }
        if at > 0 && !self.has_begun {
            return;
        }
        let supersedes = if at == 0 && !self.has_begun { self.given_up.clone() } else { Vec::new() };
        let slot = &mut self.slots[at];
        let (epoch, used) = match &slot.earlier {
            Some(earlier) => (earlier.epoch + 1, earlier.used.clone()),
            None => (1, UsedIds::default()),
        };
        let linger =
            if self.habits.short_linger { Duration::from_secs(1) } else { self.habits.window + NOTICE };
        let offer = Offer {
            session: self.session,
            supersedes,
            queue_depth: DEPTH as u32,
            channel: Some(ChannelOffer { number: slot.number, epoch, linger }),
            ..Offer::new("simulated")
        };
        let settings = Settings {
            divides: false,
            window: self.habits.window,
            redo: self.habits.redo,
            connect_timeout: Duration::from_secs(5),
            request_timeout: None,
        };
        let dialer = network::dialer(&env.network, self.number);
        let deadline = clock() + Duration::from_secs(30);
        let files = Arc::clone(&self.files);
        let seed = env.random.below(u64::MAX);
        let beginning =
            Beginning::new(dialer, offer, used.clone(), settings, files, deadline).with_clock(clock, seed);
        slot.earlier = Some(Abandoned { number: slot.number, epoch, used });
        slot.phase = Phase::Beginning(Box::new(beginning));
        env.say(format!("client {}: channel {} begins, epoch {epoch}", self.number, slot.number));
        self.go_on(at, env);
    }

    fn go_on(&mut self, at: usize, env: &mut Env) {
        let slot = &mut self.slots[at];
        let Phase::Beginning(beginning) = &mut slot.phase else { return };
        let mut channel = match beginning.step() {
            None => return,
            Some(Err(error)) => {
                env.say(format!("client {}: channel {}: {error}", self.number, slot.number));
                slot.phase = Phase::None;
                return;
            }
            Some(Ok(channel)) => channel,
        };
        env.say(format!("client {}: channel {} is up", self.number, slot.number));
        slot.abandoned = Arc::default();
        let abandoned = Arc::clone(&slot.abandoned);
        channel.on_abandoned(move |left| *lock(&abandoned) = Some(left));
        slot.connections = channel.connections();
        for (file, handle) in self.handles.iter().enumerate() {
            if let Some(verifier) = handle.and_then(|handle| channel.verifier(handle)) {
                slot.verifiers[file] = verifier;
            }
        }
        slot.phase = Phase::Up(Box::new(channel));
        slot.fence(env);
        if at == 0 && !self.has_begun {
            self.has_begun = true;
            self.given_up.clear();
            for value in self.unresolved.drain(..) {
                lock(&env.disk).is_over(value);
            }
            self.slots.iter_mut().for_each(|slot| slot.fence(env));
        }
    }

    /// The session was given up, and nothing is outstanding: another one begins.
    fn begin_anew(&mut self, env: &mut Env) {
        if !self.is_idle() {
            return;
        }
        self.given_up.push(self.session);
        assert!(self.given_up.len() <= 8, "sessions are given up for no reason");
        self.session = env.session_id();
        self.files = Arc::default();
        self.handles = [None; FILES];
        self.opened = [None; FILES];
        (self.has_begun, self.has_failed) = (false, false);
        for (slot, number) in self.slots.iter_mut().zip(1..) {
            self.unresolved.append(&mut slot.unresolved);
            slot.number = number;
            slot.phase = Phase::None;
            slot.earlier = None;
        }
        self.next_channel = 3;
        env.say(format!("client {}: another session begins", self.number));
    }

    /// Leaves a channel, whatever is outstanding, and begins another in its place.
    fn abandon(&mut self, at: usize, env: &mut Env) {
        let slot = &mut self.slots[at];
        slot.phase = Phase::None;
        slot.earlier = lock(&slot.abandoned).take();
        env.say(format!("client {}: leaves channel {}, {:?}", self.number, slot.number, slot.earlier));
        let is_known = slot.earlier.is_none();
        if is_known {
            slot.number = self.next_channel;
            self.next_channel += 1;
        }
        for op in std::mem::take(&mut slot.in_flight).into_values() {
            match op.what {
                // What was not sent is not done.
                What::Write { value, .. } if is_known => lock(&env.disk).is_over(value),
                What::Write { value, .. } => slot.unresolved.push(value),
                What::Fsync { file, taken, covers } => {
                    self.unstable[file] = both(self.unstable[file], taken);
                    self.acknowledged[file].extend(covers);
                }
                What::Open(..) | What::Stat(..) => self.has_failed = true,
                What::Read { .. } | What::Cancel => {}
            }
        }
    }

    // Requests
    // ------------------------------------------------------------------------------------------------------

    fn submit_some(&mut self, at: usize, env: &mut Env) {
        let is_up = self.is_up();
        let slot = &mut self.slots[at];
        let Phase::Up(channel) = &mut slot.phase else { return };
        let is_open = self.handles.iter().all(Option::is_some);
        // A GOAWAY of the only channel that a server knows would end the session, and close its files.
        let may_leave = channel.has_unanswered_recorded() || (is_up && env.starts == 1);
        if self.habits.abandons && is_open && may_leave && env.random.below(40) == 0 {
            return self.abandon(at, env);
        }
        if self.habits.cancels && env.random.below(10) == 0 {
            let is_open = |(_, op): &(&u64, &Op)| matches!(op.what, What::Open(..) | What::Stat(..));
            let all = slot.in_flight.iter().filter(|op| !is_open(op));
            let all: Vec<u64> = all.map(|(&tag, _)| tag).collect();
            let Some(&tag) = all.get(env.random.index(all.len().max(1))) else { return };
            let answer = slot.next_tag;
            if channel.cancel(tag, answer) {
                slot.next_tag += 1;
                slot.in_flight.get_mut(&tag).expect("it is in flight").is_cancelled = true;
                let op = Op::new(What::Cancel, env);
                slot.in_flight.insert(answer, op);
            }
            return;
        }
        if !channel.is_connected() || channel.credits() == 0 || slot.in_flight.len() >= DEPTH {
            return;
        }
        if !is_open {
            if at == 0 && slot.in_flight.is_empty() {
                for file in (0..FILES).filter(|&file| self.handles[file].is_none()).collect::<Vec<_>>() {
                    self.open(file, env);
                }
            }
            return;
        }
        let file = env.random.index(FILES);
        let count = 1 + env.random.below(4) as u32;
        let cell = env.random.below(u64::from(CELLS - count + 1)) as u32;
        let place = CellPlace { file: file as u32, cell };
        let what = match env.random.below(100) {
            0..50 => {
                self.sequence += 1;
                let value = CellValue { client: self.number, sequence: self.sequence };
                What::Write { place, count, value }
            }
            50..85 => What::Read { place, count },
            _ => {
                let taken = std::mem::take(&mut self.unstable[file]);
                What::Fsync { file, taken, covers: std::mem::take(&mut self.acknowledged[file]) }
            }
        };
        self.submit(at, what, env);
        if env.random.below(4) > 0
            && let Phase::Up(channel) = &mut self.slots[at].phase
        {
            channel.flush();
        }
    }

    /// Asks for all cells of a file.
    pub fn read_all(&mut self, file: u32, env: &mut Env) {
        self.submit(0, What::Read { place: CellPlace { file, cell: 0 }, count: CELLS }, env);
        if let Phase::Up(channel) = &mut self.slots[0].phase {
            channel.flush();
        }
    }

    /// Opens a file, or asks for the status of one that was opened.
    fn open(&mut self, file: usize, env: &mut Env) {
        let slot = &mut self.slots[0];
        let Phase::Up(channel) = &mut slot.phase else { return };
        let path = format!("/{}", server::name(file as u32));
        let mut body = Vec::new();
        let what = match self.opened[file].take() {
            Some(opened) => {
                Command::Stat(opened.handle).encode(&mut body);
                What::Stat(file, opened)
            }
            None => {
                let flags = OPEN_READ | OPEN_WRITE;
                Command::Open { flags, mode: 0, path: path.as_bytes() }.encode(&mut body);
                What::Open(file, self.files.reopenings())
            }
        };
        if channel.send(slot.next_tag, &body, Bulk::None, SendOptions::PLAIN).is_err() {
            if let What::Stat(file, opened) = what {
                self.opened[file] = Some(opened);
            }
            return;
        }
        channel.flush();
        slot.in_flight.insert(slot.next_tag, Op::new(what, env));
        slot.next_tag += 1;
    }

    /// The status of a file has come that was opened.
    fn on_status(&mut self, file: usize, opened: Opened, status: &FileStatus) {
        if !opened.is_listed {
            let path = format!("/{}", server::name(file as u32)).into_bytes().into();
            let (flags, identity) = (OPEN_READ | OPEN_WRITE, status.identity);
            self.files.insert(opened.handle, Reopenable { flags, path, identity });
            if self.files.reopenings() != opened.reopenings {
                // The other channel may be connected to a server that was started since: a call by this one
                // finds out, and has it opened there.
                self.opened[file] = Some(Opened { is_listed: true, ..opened });
                return;
            }
        }
        self.handles[file] = Some(opened.handle);
        self.slots.iter_mut().for_each(|slot| slot.verifiers[file] = status.verifier.get());
    }

    fn submit(&mut self, at: usize, what: What, env: &mut Env) {
        let slot = &mut self.slots[at];
        let Phase::Up(channel) = &mut slot.phase else { return };
        let tag = slot.next_tag;
        slot.next_tag += 1;
        let mut op = Op::new(what, env);
        let one = |bytes: Vec<u8>| Buffers::One(Buffer::Owned(bytes.into()));
        let handle = |file: usize| self.handles[file].expect("it is open");
        let (command, bulk, file) = match &op.what {
            &What::Read { place, count } => {
                let length = count * CELL_BYTES as u32;
                let file = handle(place.file as usize);
                let bulk = Bulk::In(one(vec![0; length as usize]));
                (Command::Read { file, offset: place.offset(), length }, bulk, place.file as usize)
            }
            &What::Write { place, count, value } => {
                for place in cells_of(place, count) {
                    slot.log.push_str(&format!(
                        "{}\n",
                        LogLine::Begin { place, count: 1, value, begin: op.begin }
                    ));
                }
                let length = count * CELL_BYTES as u32;
                let file = handle(place.file as usize);
                let bytes = cells_of(place, count).flat_map(|place| encode_cell(place, value)).collect();
                (
                    Command::Write { file, offset: place.offset(), length },
                    Bulk::Out(one(bytes)),
                    place.file as usize,
                )
            }
            What::Fsync { file, .. } => {
                (Command::Fsync { file: handle(*file), data_only: false }, Bulk::None, *file)
            }
            What::Open(..) | What::Stat(..) | What::Cancel => unreachable!("others send these"),
        };
        op.address = buffer(&bulk).map_or(0, |bytes| bytes.as_ptr() as usize);
        op.verifier = slot.verifiers[file];
        let mut body = Vec::new();
        command.encode(&mut body);
        let is_sent = channel.send(tag, &body, bulk, SendOptions::PLAIN).is_ok();
        let what = match &op.what {
            // A verifier differs from run to run.
            What::Fsync { file, covers, .. } => format!("Fsync of file {file}, {} cells", covers.len()),
            what => format!("{what:?}"),
        };
        env.say(format!("client {}: {tag} on channel {}: {what} {is_sent}", self.number, slot.number));
        if is_sent {
            slot.in_flight.insert(tag, op);
            return;
        }
        // The connection has just ended.
        match op.what {
            What::Write { place, count, value } => {
                for place in cells_of(place, count) {
                    let (begin, end, outcome) = (op.begin, env.tick(), Outcome::Failed);
                    slot.say(LogLine::Write(CellWrite { place, value, begin, end, outcome }));
                }
                lock(&env.disk).is_over(value);
            }
            What::Fsync { file, taken, covers } => {
                self.unstable[file] = both(self.unstable[file], taken);
                self.acknowledged[file].extend(covers);
            }
            What::Read { .. } | What::Open(..) | What::Stat(..) | What::Cancel => {}
        }
    }

    /// Takes in what has arrived.
    fn collect(&mut self, at: usize, env: &mut Env) {
        let mut replies = Vec::new();
        let slot = &mut self.slots[at];
        let Phase::Up(channel) = &mut slot.phase else { return };
        channel.receive(&mut replies);
        let is_failed = channel.failure().is_some();
        if let Some(error) = channel.failure() {
            env.say(format!("client {}: channel {} was given up: {error}", self.number, slot.number));
        }
        for reply in replies {
            self.end(at, reply, is_failed, env);
        }
        let slot = &mut self.slots[at];
        let Phase::Up(channel) = &mut slot.phase else { return };
        if channel.connections() != slot.connections {
            slot.connections = channel.connections();
            env.reconnects += 1;
            for (file, handle) in self.handles.iter().enumerate() {
                if let Some(verifier) = handle.and_then(|handle| channel.verifier(handle)) {
                    slot.verifiers[file] = verifier;
                }
            }
            // What is still in flight is sent to this server.
            for op in slot.in_flight.values_mut() {
                if let What::Write { place, .. } = op.what {
                    op.verifier = slot.verifiers[place.file as usize];
                }
            }
            env.say(format!("client {}: channel {} goes on", self.number, slot.number));
        }
        if is_failed {
            assert!(slot.in_flight.is_empty(), "a channel that was given up has not ended what it had");
            slot.phase = Phase::None;
            self.has_failed = true;
        }
        if self.has_failed && self.slots[at].in_flight.is_empty() {
            self.slots[at].phase = Phase::None;
            self.begin_anew(env);
        }
    }

    /// A request is over.
    fn end(&mut self, at: usize, reply: Reply, is_failed: bool, env: &mut Env) {
        let slot = &mut self.slots[at];
        let Some(op) = slot.in_flight.remove(&reply.tag) else {
            panic!("client {}: {} has ended twice: {reply:?}", self.number, reply.tag)
        };
        let now = env.tick();
        env.ended += 1;
        let Reply { status, result, is_unknown, .. } = reply;
        let errno = status.errno;
        env.say(format!(
            "client {}: {} on channel {} has ended: errno {errno}, {}, unknown: {is_unknown}",
            self.number,
            reply.tag,
            slot.number,
            // A verifier differs from run to run.
            if matches!(op.what, What::Fsync { .. }) { 0 } else { result }
        ));
        let at_address = buffer(&reply.bulk).map_or(0, |bytes| bytes.as_ptr() as usize);
        assert_eq!(at_address, op.address, "its own buffer comes back");
        if is_unknown {
            env.unknown += 1;
            assert!(
                is_failed || env.starts > 1 || env.may_forget,
                "an outcome is unknown, and the server has not been started again"
            );
        } else if !status.is_ok() {
            let is_told = matches!(op.what, What::Cancel)
                || (op.is_cancelled && errno == libc::ECANCELED)
                || (matches!(op.what, What::Fsync { .. }) && errno == libc::EIO)
                || (matches!(op.what, What::Stat(_, opened) if !opened.is_listed)
                    && (env.starts > 1 || env.may_forget));
            assert!(is_told || is_failed, "{:?} has failed with errno {errno}", op.what);
        }
        match op.what {
            What::Cancel => {}
            What::Open(file, reopenings) if status.is_ok() => {
                let opened = Opened { handle: FileHandle(result as u32), reopenings, is_listed: false };
                match FileStatus::decode(&reply.body) {
                    Ok(status) => self.on_status(file, opened, &status),
                    // Its answer was lost, and the outcome has told how it had ended: a stat tells the rest.
                    Err(_) => self.opened[file] = Some(opened),
                }
            }
            What::Stat(file, opened) if status.is_ok() => {
                self.on_status(file, opened, &FileStatus::decode(&reply.body).expect("a status"));
            }
            What::Open(..) | What::Stat(..) => self.has_failed = true,
            What::Read { place, count } => {
                if !status.is_ok() {
                    return;
                }
                assert!(result <= u64::from(count) * CELL_BYTES as u64 && result == reply.data_len as u64);
                let bytes = &buffer(&reply.bulk).expect("its buffer")[..result as usize];
                for (place, cell) in cells_of(place, count).zip(bytes.as_chunks::<CELL_BYTES>().0) {
                    let value = decode_cell(place, cell);
                    let value = value.unwrap_or_else(|| panic!("{place} is torn, or belongs elsewhere"));
                    if !op.spans {
                        slot.say(LogLine::Read(CellRead { place, value, begin: op.begin, end: now }));
                    }
                }
            }
            What::Write { place, count, value } => {
                let sent = buffer(&reply.bulk).expect("its buffer");
                let was: Vec<u8> =
                    cells_of(place, count).flat_map(|place| encode_cell(place, value)).collect();
                assert_eq!(sent, was, "what is to be written was changed");
                let done = if status.is_ok() { result } else { 0 };
                for (place, end) in cells_of(place, count).zip((1..).map(|n: u64| n * CELL_BYTES as u64)) {
                    let (outcome, until) = if is_unknown {
                        (Outcome::Unknown, if is_failed { FOREVER } else { now })
                    } else if end <= done {
                        self.acknowledged[place.file as usize].push((place, value));
                        (Outcome::Ok, now)
                    } else {
                        (Outcome::Failed, now)
                    };
                    if op.spans {
                        // Of the crash nobody knows whether it came before or after.
                        if slot.log.contains(&format!("begin {} {} 1 {value} ", place.file, place.cell)) {
                            let (outcome, begin) = (Outcome::Unknown, op.begin);
                            slot.say(LogLine::Write(CellWrite { place, value, begin, end: until, outcome }));
                        }
                    } else {
                        slot.say(LogLine::Write(CellWrite {
                            place,
                            value,
                            begin: op.begin,
                            end: until,
                            outcome,
                        }));
                    }
                }
                if status.is_ok() {
                    let unstable = &mut self.unstable[place.file as usize];
                    *unstable = both(*unstable, op.verifier);
                }
                if is_unknown && is_failed {
                    slot.unresolved.push(value);
                } else {
                    lock(&env.disk).is_over(value);
                }
            }
            What::Fsync { file, taken, covers } => {
                let outcome = if status.is_ok() {
                    slot.verifiers[file] = result;
                    let disk = lock(&env.disk);
                    if taken == 0 || taken == result {
                        for (place, value) in covers {
                            assert!(
                                disk.is_durable(place, value),
                                "client {}: {value} in {place} is not durable after an fsync",
                                self.number
                            );
                        }
                    } else {
                        env.lost += 1;
                        // It may be another client's loss, which this one learns of only now.
                        assert!(disk.losses > 0, "an fsync says that writes are lost, and none can be");
                    }
                    Some(Outcome::Ok)
                } else {
                    self.unstable[file] = both(self.unstable[file], taken);
                    self.acknowledged[file].extend(covers);
                    // If it has failed the disk has logged that.
                    None
                };
                if let Some(outcome) = outcome.filter(|_| !op.spans) {
                    let file = file as u32;
                    slot.say(LogLine::Fsync(FileSync { file, begin: op.begin, end: now, outcome }));
                }
            }
        }
    }

    /// The machine has crashed: the history begins anew with what it has left.
    pub fn begin_era(&mut self, image: &CrashImage) {
        for slot in &mut self.slots {
            for op in slot.in_flight.values_mut() {
                op.spans = true;
                let What::Write { place, count, value } = op.what else { continue };
                op.begin = image.end + 1;
                for place in cells_of(place, count) {
                    if image.cells.get(&place) != Some(&Some(value)) {
                        let begin = LogLine::Begin { place, count: 1, value, begin: op.begin };
                        let _ = writeln!(slot.log, "{begin}");
                    }
                }
            }
        }
    }
}

impl Op {
    fn new(what: What, env: &mut Env) -> Self {
        let begin = env.tick();
        Self { what, begin, spans: false, verifier: 0, is_cancelled: false, address: 0 }
    }
}
