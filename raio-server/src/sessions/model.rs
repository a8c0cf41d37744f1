//! A model of clients whose connections break, checked exhaustively. It calls the functions that a worker and
//! a client call, [`Sessions`] and [`raio_transport::resume`], and has everything around them happen in every
//! order: what the network delivers late, what a worker hears late from another one, what a disk finishes
//! late.
//!
//! A session has two channels, each of which writes to a block of its own, one write after another.
//! Connections break, the session may be given up for another one that writes to the same blocks, a channel
//! may expire, and the server may be killed. What must hold is in [`Wrong`]. Each [`Guard`] of the server,
//! and each rule that a client keeps, is then switched off, and something that must hold does not.
//!
//! To keep it small, what commutes with everything else happens at once, and states that differ only in names
//! are one:
//!
//! - A client reacts at once: it takes in what the server sends, connects again, sends what is to be sent.
//!   That it does so late is the same as that the server receives it late, and that an answer is lost is the
//!   same as that the connection has broken before the server gave it.
//! - A write on its way begins when it is received: one that waits at the server is dropped when its
//!   connection ends, as one is that has not arrived.
//! - All connections are on different workers: mail that is read at once is what happens within one worker.
//! - Epochs and ids count back from the latest of their channel ([`World::key`]), the two channels of the
//!   first session may be swapped, and what has ended and is not named any more is forgotten.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::OnceLock;

use raio_transport::error::Status;
use raio_transport::handshake::{ChannelOffer, Offer, Policy};
use raio_transport::message::Parsed;
use raio_transport::protocol::{Command, FileHandle};
use raio_transport::resume::{self, Fate, Machine, State, Step};
use raio_transport::transport::IdHistory;
use stateright::{Checker, Expectation, HasDiscoveries, Model, Path, Property};

use super::*;
use crate::limits::{Caps, Room};

/// Bytes of a write.
const LENGTH: u32 = 4096;
const LINGER: Duration = Duration::from_secs(90);
const WINDOW: Duration = Duration::from_secs(3600);

/// What is checked: what may happen, and which rules are kept.
#[derive(Clone, Copy, Debug)]
struct Rules {
    /// Channels of the first session.
    channels: usize,
    /// Writes of each, one after another.
    writes: u8,
    /// How often connections break, at most.
    breaks: u8,
    /// The first session may be given up for another one.
    takes_over: bool,
    /// Channels without a connection may expire.
    expires: bool,
    /// How often the server is killed, at most.
    kills: u8,
    /// The guard of the server that is off.
    off: Option<Guard>,
    /// A client asks what became of a write before it sends it again.
    asks: bool,
    /// It does not use an id again.
    counts: bool,
    /// It raises its epoch before it connects.
    raises: bool,
    /// A server is started when the I/O of the one before has ended.
    has_barrier: bool,
}

/// All rules are kept, and nothing happens.
const CALM: Rules = Rules {
    channels: 1,
    writes: 2,
    breaks: 0,
    takes_over: false,
    expires: false,
    kills: 0,
    off: None,
    asks: true,
    counts: true,
    raises: true,
    has_barrier: true,
};

/// What must not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Wrong {
    /// A write lands after it, or a newer one of its channel, has ended for its program; or after the session
    /// was connected that its own was given up for.
    Late,
    /// A write lands twice.
    Twice,
    /// A write is acknowledged that has not landed.
    Lost,
    /// What became of a write is unknown, though the server has neither been killed nor given the channel up.
    Unknown,
    /// The server ends or rejects a connection that its client has not given up.
    Usurped,
    /// Nothing more is sure to happen, and a client has not written all.
    Stuck,
}

impl Wrong {
    const ALL: [(Self, &str); 6] = [
        (Self::Late, "no write lands after a newer one has ended"),
        (Self::Twice, "no write lands twice"),
        (Self::Lost, "what is acknowledged has landed"),
        (Self::Unknown, "on a living server that keeps its channel nothing is unknown"),
        (Self::Usurped, "no connection is closed that its client has not given up"),
        (Self::Stuck, "every client comes to an end"),
    ];
}

/// These are reached.
const WRITTEN: &str = "all is written over all breaks";
const TAKEN_OVER: &str = "another session writes, of a client that had given one up amid a write";
const UNKNOWN: &str = "something is unknown";

#[derive(Clone, Copy, Debug)]
enum ToServer {
    Hello,
    /// What became of the write with this id?
    Outcome(Option<u32>),
    Reopen,
    Write(Write),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Write {
    id: u32,
    /// Which one of its channel, from 0.
    number: u8,
}

/// What became of the write that was asked for, if one was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    NotAsked,
    Never,
    Done,
    /// The channel is not known any more.
    Gone,
}

/// A connection, with both of its ends and what is on its way to the server.
#[derive(Clone, Debug)]
struct Connection {
    /// No other one of its channel has it.
    serial: u64,
    epoch: u64,
    /// It supersedes the first session.
    supersedes: bool,
    /// A client waits for the answer before it sends more.
    wire: Option<ToServer>,
    /// The client has not given it up.
    is_open: bool,
    server: ServerEnd,
    executing: Option<Write>,
    /// Mail to its worker: that it is to be closed, that it may be settled.
    fence: bool,
    settle: bool,
}

/// What a worker has of a connection.
#[derive(Clone, Debug)]
enum ServerEnd {
    /// No hello has come.
    Arriving,
    Waiting {
        member: Member,
        fence: Fence,
        /// The outcome that it was asked for.
        asked: Option<Option<u32>>,
    },
    Settled {
        member: Member,
        outcomes: Outcomes,
        /// Its client was told that nothing is known, and may not have heard it.
        is_told: bool,
    },
    /// It is over, and has left a write behind.
    Ended { member: Member },
}

/// A client's channel.
#[derive(Clone, Debug)]
struct Client {
    machine: Machine,
    ids: IdHistory,
    /// The latest id of a write.
    id: u32,
    dials: u64,
    /// In the order in which they were made.
    connections: Vec<Connection>,
    /// Its next write is this one.
    next: u8,
    /// That write was sent; and its fate, since the connection has broken.
    sent: Option<Option<Fate>>,
    /// The server has lost its files.
    must_reopen: bool,
    /// It has been connected: nothing is superseded any more.
    has_begun: bool,
    /// Writes that have landed, by bit.
    landed: u8,
    /// Writes that a server has left behind which was killed.
    left: Vec<Write>,
    has_given_up: bool,
    /// A write of it is unknown.
    has_unknown: bool,
}

/// The state of everything.
#[derive(Clone)]
struct World {
    rules: Rules,
    sessions: Sessions,
    is_alive: bool,
    clients: Vec<Client>,
    breaks: u8,
    kills: u8,
    has_expired: bool,
    wrong: Option<Wrong>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// A client's connection breaks. What is on its way may arrive all the same, or has not been sent as a
    /// whole.
    Break {
        client: usize,
        was_sent: bool,
    },
    /// The first session's client gives it up, and begins another one.
    TakeOver,
    /// A worker receives the next message of a connection.
    Receive(usize, u64),
    /// A worker sees that a client has given up a connection.
    Notice(usize, u64),
    /// A worker reads that a connection is to be closed.
    Fence(usize, u64),
    /// A worker reads that a connection may be settled.
    Settle(usize, u64),
    /// A write lands.
    Land(usize, u64),
    /// One that a killed server has left behind does.
    LandLeft(usize),
    /// Channels without a connection have been kept for long enough.
    Expire,
    Kill,
    Start,
}

/// A time that all takes place at: what depends on time is an action here.
fn beginning() -> Instant {
    static NOW: OnceLock<Instant> = OnceLock::new();
    *NOW.get_or_init(Instant::now)
}

/// The command of a write.
fn command() -> &'static [u8] {
    static COMMAND: OnceLock<Vec<u8>> = OnceLock::new();
    COMMAND.get_or_init(|| {
        let mut bytes = Vec::new();
        Command::Write { file: FileHandle(1 << 20), offset: 0, length: LENGTH }.encode(&mut bytes);
        bytes
    })
}

fn fresh_sessions(rules: &Rules) -> Sessions {
    static LIMITS: OnceLock<Arc<Limits>> = OnceLock::new();
    let room = Room { descriptors: 1000, files: 10, bytes: 1 << 30, workers: 2 };
    let limits = LIMITS.get_or_init(|| Limits::new(room, Caps::default(), Caps::default()));
    let sessions = Sessions::new(9, Arc::clone(limits));
    lock(&sessions.table).guards = Guards { off: rules.off };
    sessions
}

impl Client {
    /// Not connected yet.
    fn new() -> Self {
        let mut machine = Machine::new(0, WINDOW, 1);
        machine.on_loss(beginning(), true);
        Self {
            machine,
            ids: IdHistory::default(),
            id: 0,
            dials: 0,
            connections: Vec::new(),
            next: 0,
            sent: None,
            must_reopen: false,
            has_begun: false,
            landed: 0,
            left: Vec::new(),
            has_given_up: false,
            has_unknown: false,
        }
    }

    fn position(&self, serial: u64) -> Option<usize> {
        self.connections.iter().position(|connection| connection.serial == serial)
    }

    /// The one that it has not given up.
    fn open(&mut self) -> Option<&mut Connection> {
        self.connections.last_mut().filter(|last| last.is_open)
    }

    /// Whether there is nothing to do for it.
    fn is_done(&self, rules: &Rules) -> bool {
        self.has_given_up || (self.machine.state() == State::Connected && self.next == rules.writes)
    }

    /// The id that is being asked for, or that of no write.
    fn asked(&self) -> Option<u32> {
        (self.sent == Some(Some(Fate::Ask))).then_some(self.id)
    }
}

// The clients
// --------------------------------------------------------------------------------------------------------

impl World {
    fn new(rules: Rules) -> Self {
        let mut this = Self {
            rules,
            sessions: fresh_sessions(&rules),
            is_alive: true,
            clients: Vec::new(),
            breaks: 0,
            kills: 0,
            has_expired: false,
            wrong: None,
        };
        for client in 0..rules.channels {
            this.clients.push(Client::new());
            this.go_on(client);
            this.receive(client, 0);
        }
        this
    }

    /// Whether it is of the session that supersedes the first one.
    fn is_other(&self, client: usize) -> bool {
        client >= self.rules.channels
    }

    /// A client does what it can: see [`raio_transport::channel::Channel`].
    fn go_on(&mut self, at: usize) {
        let rules = self.rules;
        let is_other = self.is_other(at);
        let client = &mut self.clients[at];
        match client.machine.step(beginning() + WINDOW / 2) {
            Step::Dial(epoch, _) => {
                client.connections.push(Connection {
                    serial: client.dials,
                    epoch: if rules.raises { epoch } else { 1 },
                    supersedes: is_other && !client.has_begun,
                    wire: Some(ToServer::Hello),
                    is_open: true,
                    server: ServerEnd::Arriving,
                    executing: None,
                    fence: false,
                    settle: false,
                });
                client.dials += 1;
            }
            Step::None | Step::Wait(_) => {}
            Step::GiveUp => panic!("the window is not over"),
        }
        let must_send = match client.sent {
            None => client.next < rules.writes,
            Some(fate) => fate == Some(Fate::Again),
        };
        client.has_begun |= client.machine.state() == State::Connected;
        if client.machine.state() == State::Connected && must_send {
            if rules.counts {
                client.ids.on_recorded();
            }
            client.id = client.ids.id(0).0 as u32;
            client.sent = Some(None);
            let write = Write { id: client.id, number: client.next };
            let connection = client.open().expect("it is connected");
            assert!(connection.wire.is_none() && connection.executing.is_none());
            connection.wire = Some(ToServer::Write(write));
        }
    }

    /// A client's connection breaks, or is given up by it.
    fn break_off(&mut self, at: usize, was_sent: bool) {
        let rules = self.rules;
        let client = &mut self.clients[at];
        let Some(connection) = client.open() else { return };
        connection.is_open = false;
        if !was_sent {
            connection.wire = None;
        }
        if matches!(connection.server, ServerEnd::Arriving) && connection.wire.is_none() {
            client.connections.pop();
        }
        match client.machine.state() {
            State::Dialing => client.machine.on_dial_failed(beginning(), false),
            _ => client.machine.on_loss(beginning(), true),
        }
        if client.sent == Some(None) {
            if rules.counts {
                client.ids.on_over();
            }
            client.sent = Some(Some(match resume::at_loss(command(), was_sent) {
                Fate::Ask if !rules.asks => Fate::Again,
                Fate::Over(_) => panic!("a write does not end so"),
                fate => fate,
            }));
        }
    }

    /// A client is welcomed by its latest connection.
    fn welcomed(&mut self, at: usize, begins_with_outcome: bool) {
        let client = &mut self.clients[at];
        client.machine.on_dialed();
        let asked = client.asked();
        if begins_with_outcome {
            client.open().expect("it was welcomed by it").wire = Some(ToServer::Outcome(asked));
        } else {
            client.machine.on_resolved(false);
            self.go_on(at);
        }
    }

    /// A client learns what became of its write.
    fn answered(&mut self, at: usize, answer: Answer) {
        let client = &mut self.clients[at];
        if let Some(Some(fate)) = client.sent {
            let fate = match answer {
                Answer::NotAsked => fate,
                Answer::Done => resume::after_outcome(Some((Status::OK, LENGTH.into()))),
                Answer::Never => resume::after_outcome(None),
                Answer::Gone => resume::at_gone(command(), fate, false),
            };
            match fate {
                Fate::Over(end) => self.ended(at, end.is_unknown),
                fate => client.sent = Some(Some(fate)),
            }
        }
        let client = &mut self.clients[at];
        client.must_reopen |= answer == Answer::Gone;
        client.machine.on_resolved(client.must_reopen);
        if client.must_reopen {
            client.open().expect("it was answered by it").wire = Some(ToServer::Reopen);
        } else {
            self.go_on(at);
        }
    }

    /// A client's files are open again.
    fn reopened(&mut self, at: usize) {
        let client = &mut self.clients[at];
        client.must_reopen = false;
        client.machine.on_reopened();
        self.go_on(at);
    }

    /// A client's write is over for its program.
    fn ended(&mut self, at: usize, is_unknown: bool) {
        let has_cause = self.has_expired || self.kills > 0;
        let client = &mut self.clients[at];
        client.sent = None;
        client.has_unknown |= is_unknown;
        let has_landed = client.landed & 1 << client.next != 0;
        client.next += 1;
        if is_unknown && !has_cause {
            self.is_wrong(Wrong::Unknown);
        } else if !is_unknown && !has_landed {
            self.is_wrong(Wrong::Lost);
        }
    }

    fn take_over(&mut self) {
        for at in 0..self.clients.len() {
            if let Some(connection) = self.clients[at].open() {
                connection.is_open = false;
            }
            self.clients[at].has_given_up = true;
        }
        let client = Client { next: self.rules.writes - 1, ..Client::new() };
        self.clients.push(client);
        self.go_on(self.rules.channels);
    }

    fn is_wrong(&mut self, wrong: Wrong) {
        self.wrong.get_or_insert(wrong);
    }
}

// The server
// --------------------------------------------------------------------------------------------------------

impl World {
    fn now(&self) -> Instant {
        if self.has_expired { beginning() + 2 * LINGER } else { beginning() }
    }

    fn id_of(is_other: bool) -> SessionId {
        SessionId([1 + u8::from(is_other); 16])
    }

    fn hello(&mut self, at: usize, serial: u64) {
        let is_other = self.is_other(at);
        let Some(index) = self.clients[at].position(serial) else { return };
        let Connection { epoch, supersedes, .. } = self.clients[at].connections[index];
        let number = if is_other { 0 } else { at as u32 };
        let offer = Offer {
            session: Self::id_of(is_other),
            channel: Some(ChannelOffer { number, epoch, linger: LINGER }),
            supersedes: if supersedes { vec![Self::id_of(false)] } else { Vec::new() },
            ..Offer::new("model")
        };
        let Ok(Parsed::Item((peer, _), _)) = Policy::default().welcome(&offer.hello()) else {
            panic!("the hello is understood")
        };
        let name = ConnectionName { worker: at, key: 0, serial };
        let now = self.now();
        let (joined, effects) = self.sessions.join(&peer, &None, name, now);
        let connection = &mut self.clients[at].connections[index];
        let is_open = connection.is_open;
        match joined {
            Ok(Joined { member, outcomes, fence, .. }) => {
                connection.server = match (fence, outcomes) {
                    (Some(fence), _) => ServerEnd::Waiting { member, fence, asked: None },
                    (None, Some(outcomes)) => ServerEnd::Settled { member, outcomes, is_told: false },
                    (None, None) => panic!("it has nothing to wait for, and must wait"),
                };
                if is_open {
                    self.welcomed(at, peer.begins_with_outcome());
                }
            }
            Err(_) => {
                self.clients[at].connections.remove(index);
                if is_open {
                    self.clients[at].machine.on_dial_failed(now, true);
                    self.is_wrong(Wrong::Usurped);
                }
            }
        }
        self.carry_out(effects);
    }

    fn receive(&mut self, at: usize, serial: u64) {
        let client = &mut self.clients[at];
        let Some(index) = client.position(serial) else { return };
        let connection = &mut client.connections[index];
        match (connection.wire.take(), &mut connection.server) {
            (Some(ToServer::Hello), _) => self.hello(at, serial),
            (Some(ToServer::Outcome(id)), ServerEnd::Waiting { asked, .. }) => {
                *asked = Some(id);
                self.settle(at, serial);
            }
            (Some(message), ServerEnd::Settled { member, is_told, .. }) => {
                if std::mem::take(is_told) {
                    self.sessions.heard(member);
                }
                match message {
                    ToServer::Write(write) => connection.executing = Some(write),
                    ToServer::Reopen if connection.is_open => self.reopened(at),
                    _ => {}
                }
            }
            (message, end) => panic!("{message:?} comes to {end:?}"),
        }
    }

    /// As a worker does: see `Worker::settle_if_possible`.
    fn settle(&mut self, at: usize, serial: u64) {
        let client = &mut self.clients[at];
        let Some(index) = client.position(serial) else { return };
        let connection = &mut client.connections[index];
        let ServerEnd::Waiting { member, fence, asked: Some(asked) } = &mut connection.server else { return };
        let Ok(outcomes) = self.sessions.settle(member, fence) else { return };
        let answer = match *asked {
            _ if !fence.is_known => Answer::Gone,
            None => Answer::NotAsked,
            Some(id) => match outcomes.of(id).answer() {
                Ok(Some((Status::OK, _))) => Answer::Done,
                Ok(None) => Answer::Never,
                other => panic!("{other:?}"),
            },
        };
        let is_told = answer == Answer::Gone;
        connection.server = ServerEnd::Settled { member: member.clone(), outcomes, is_told };
        if connection.is_open {
            self.answered(at, answer);
        }
    }

    /// As `Worker::closed`: what executes is left behind.
    fn end(&mut self, at: usize, serial: u64) {
        let client = &mut self.clients[at];
        let Some(index) = client.position(serial) else { return };
        let connection = &mut client.connections[index];
        (connection.wire, connection.fence, connection.settle) = (None, false, false);
        let executing = usize::from(connection.executing.is_some());
        let (member, fence, outcomes) = match std::mem::replace(&mut connection.server, ServerEnd::Arriving) {
            ServerEnd::Waiting { member, fence, .. } => (member, Some(fence), None),
            ServerEnd::Settled { member, outcomes, .. } => (member, None, Some(outcomes)),
            other => panic!("{other:?} has ended, or not begun"),
        };
        if connection.is_open {
            connection.is_open = false;
            self.is_wrong(Wrong::Usurped);
        }
        let remains = Remains { outcomes, fence, executing, linger: LINGER };
        let effects = self.sessions.ended(&member, remains, self.now());
        let connections = &mut self.clients[at].connections;
        if executing > 0 {
            connections[index].server = ServerEnd::Ended { member };
        } else {
            connections.remove(index);
        }
        self.carry_out(effects);
    }

    /// As `Worker::carry_out`.
    fn carry_out(&mut self, effects: Effects) {
        let mut named = |name: ConnectionName, act: fn(&mut Connection)| {
            let client = &mut self.clients[name.worker];
            if let Some(index) = client.position(name.serial) {
                let connection = &mut client.connections[index];
                if !matches!(connection.server, ServerEnd::Ended { .. }) {
                    act(connection);
                }
            }
        };
        for name in effects.close {
            named(name, |connection| connection.fence = true);
        }
        for name in effects.wake {
            named(name, |connection| connection.settle = true);
        }
    }

    fn land(&mut self, at: usize, serial: u64) {
        let client = &mut self.clients[at];
        let Some(index) = client.position(serial) else { return };
        let Some(write) = client.connections[index].executing.take() else { return };
        self.landed(at, write);
        let connections = &mut self.clients[at].connections;
        let connection = &mut connections[index];
        match &mut connection.server {
            ServerEnd::Settled { outcomes, .. } => {
                outcomes.record(write.id, Status::OK, LENGTH.into());
                if connection.is_open {
                    if self.rules.counts {
                        self.clients[at].ids.on_over();
                    }
                    self.ended(at, false);
                    self.go_on(at);
                }
            }
            ServerEnd::Ended { member } => {
                let member = member.clone();
                connections.remove(index);
                let ended = Some((write.id, Status::OK, LENGTH.into()));
                if !self.counts_orphan(&member) {
                    assert_eq!(self.rules.off, Some(Guard::Keep), "a channel is forgotten that has orphans");
                    return;
                }
                let effects = self.sessions.orphan_ended(&member, ended, self.now());
                self.carry_out(effects);
            }
            other => panic!("{other:?} executes"),
        }
    }

    /// Whether the channel of a connection that has ended knows of its orphans.
    fn counts_orphan(&self, member: &Member) -> bool {
        let table = lock(&self.sessions.table);
        let of = table.by_id.get(&member.session.id);
        let place = of.and_then(|of| of.channels.get(&member.channel));
        place.is_some_and(|place| place.channel.waits_for().1 > 0)
    }

    fn landed(&mut self, at: usize, write: Write) {
        let other = self.clients.get(self.rules.channels).filter(|_| !self.is_other(at));
        let is_late = self.clients[at].next > write.number
            || other.is_some_and(|other| other.machine.state() == State::Connected);
        let landed = &mut self.clients[at].landed;
        let is_again = *landed & 1 << write.number != 0;
        *landed |= 1 << write.number;
        if is_late {
            self.is_wrong(Wrong::Late);
        } else if is_again {
            self.is_wrong(Wrong::Twice);
        }
    }

    /// What the kernel has goes on without the process.
    fn kill(&mut self) {
        self.is_alive = false;
        for at in 0..self.clients.len() {
            self.break_off(at, true);
            let client = &mut self.clients[at];
            client.left.extend(client.connections.iter().filter_map(|connection| connection.executing));
            client.connections.clear();
        }
    }

    fn start(&mut self) {
        self.is_alive = true;
        self.sessions = fresh_sessions(&self.rules);
        for at in 0..self.clients.len() {
            if !self.clients[at].has_given_up {
                self.go_on(at);
            }
        }
    }
}

// States
// --------------------------------------------------------------------------------------------------------

impl World {
    /// What tells a client's channel from others. Epochs, serials and ids count back from the latest.
    fn client_key(&self, at: usize, hasher: &mut impl Hasher) {
        let client = &self.clients[at];
        let Client { machine, id: latest, dials, connections, next, sent, landed, left, .. } = client;
        let serial = |serial: u64| dials - serial;
        let epoch = |epoch: u64| machine.epoch() - epoch;
        let write = |write: &Write| (write.id == *latest, write.number);
        let fate = |fate: &Option<Fate>| match fate {
            None => 0,
            Some(Fate::Again) => 1,
            Some(Fate::Ask) => 2,
            Some(Fate::Over(_)) => panic!("it is over"),
        };
        std::mem::discriminant(&machine.state()).hash(hasher);
        (next, sent.as_ref().map(fate), landed, client.must_reopen, client.has_begun).hash(hasher);
        (client.has_given_up, client.has_unknown).hash(hasher);
        left.iter().map(write).collect::<Vec<_>>().hash(hasher);
        for Connection { wire, is_open, server, executing, fence: is_fenced, settle, .. } in connections {
            let wire = match wire {
                None => (0, None),
                Some(ToServer::Hello) => (1, None),
                Some(ToServer::Outcome(None)) => (2, None),
                Some(ToServer::Outcome(Some(id))) => (3, Some((id == latest, 0))),
                Some(ToServer::Write(sent)) => (4, Some(write(sent))),
                Some(ToServer::Reopen) => (5, None),
            };
            (wire, is_open, executing.as_ref().map(write), is_fenced, settle).hash(hasher);
            match server {
                ServerEnd::Arriving => 0.hash(hasher),
                ServerEnd::Waiting { fence, asked, .. } => {
                    let asked = asked.map(|asked| asked.map(|id| id == *latest));
                    (1, fence.is_known, fence.superseded.len(), asked).hash(hasher);
                }
                ServerEnd::Settled { outcomes, is_told, .. } => {
                    let is_done = matches!(outcomes.of(*latest).answer(), Ok(Some(_)));
                    (2, is_done, is_told).hash(hasher);
                }
                ServerEnd::Ended { .. } => 3.hash(hasher),
            }
        }
        for connection in connections {
            let Connection { serial: name, epoch: its, supersedes, .. } = connection;
            // A first connection has nothing to ask about.
            let is_first = matches!(connection.wire, Some(ToServer::Hello)) && *its == 1;
            (serial(*name), epoch(*its), supersedes, is_first).hash(hasher);
        }
        let table = lock(&self.sessions.table);
        let is_other = self.is_other(at);
        let number = if is_other { 0 } else { at as u32 };
        let of = table.by_id.get(&Self::id_of(is_other));
        let place = of.and_then(|of| of.channels.get(&ChannelKey::Numbered(number)));
        let key = place.map(|place| {
            let (last, is_known, live, older, until, orphans, is_recorded) =
                place.channel.key(*latest, |name: ConnectionName| serial(name.serial));
            (epoch(last), is_known, live, older, until, orphans, is_recorded)
        });
        key.hash(hasher);
    }

    fn key(&self) -> u64 {
        let key = |at: usize| {
            let mut hasher = DefaultHasher::new();
            self.client_key(at, &mut hasher);
            hasher.finish()
        };
        let mut keys: Vec<_> = (0..self.clients.len()).map(key).collect();
        keys[..self.rules.channels].sort_unstable();
        let mut hasher = DefaultHasher::new();
        keys.hash(&mut hasher);
        (self.is_alive, self.breaks, self.kills, self.has_expired, self.wrong).hash(&mut hasher);
        let table = lock(&self.sessions.table);
        for id in [false, true].map(Self::id_of) {
            let of = table.by_id.get(&id);
            of.map(|of| (of.is_superseded, of.connections, of.waiters.len())).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// What will happen sooner or later, and what may.
    fn actions(&self, sure: &mut Vec<Action>, possible: Option<&mut Vec<Action>>) {
        for (at, client) in self.clients.iter().enumerate() {
            for connection in &client.connections {
                let serial = connection.serial;
                if connection.wire.is_some() && self.is_alive {
                    sure.push(Action::Receive(at, serial));
                }
                if connection.executing.is_some() {
                    sure.push(Action::Land(at, serial));
                }
                if connection.fence {
                    sure.push(Action::Fence(at, serial));
                }
                if connection.settle {
                    sure.push(Action::Settle(at, serial));
                }
            }
            if !client.left.is_empty() {
                sure.push(Action::LandLeft(at));
            }
        }
        let is_left = self.clients.iter().any(|client| !client.left.is_empty());
        if !self.is_alive && (!is_left || !self.rules.has_barrier) {
            sure.push(Action::Start);
        }
        let Some(possible) = possible else { return };
        for (at, client) in self.clients.iter().enumerate() {
            for connection in &client.connections {
                let Connection { serial, wire, is_open, ref server, .. } = *connection;
                let has_joined = matches!(server, ServerEnd::Waiting { .. } | ServerEnd::Settled { .. });
                if !is_open && has_joined && !connection.fence {
                    possible.push(Action::Notice(at, serial));
                }
                let may_break = self.breaks < self.rules.breaks
                    && (!self.is_other(at) || client.machine.state() == State::Connected);
                if is_open && may_break && !client.is_done(&self.rules) {
                    possible.push(Action::Break { client: at, was_sent: true });
                    if matches!(wire, Some(ToServer::Write(_))) {
                        possible.push(Action::Break { client: at, was_sent: false });
                    }
                }
            }
        }
        let has_sent = self.clients.iter().any(|client| client.sent.is_some());
        if self.rules.takes_over && self.is_alive && self.clients.len() == self.rules.channels && has_sent {
            possible.push(Action::TakeOver);
        }
        if self.rules.expires && !self.has_expired && self.is_alive && self.breaks > 0 {
            possible.push(Action::Expire);
        }
        if self.is_alive && self.kills < self.rules.kills {
            possible.push(Action::Kill);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Break { client, was_sent } => {
                self.breaks += 1;
                self.break_off(client, was_sent);
                self.go_on(client);
            }
            Action::TakeOver => self.take_over(),
            Action::Receive(client, serial) => self.receive(client, serial),
            Action::Notice(client, serial) | Action::Fence(client, serial) => self.end(client, serial),
            Action::Settle(client, serial) => {
                if let Some(index) = self.clients[client].position(serial) {
                    self.clients[client].connections[index].settle = false;
                    self.settle(client, serial);
                }
            }
            Action::Land(client, serial) => self.land(client, serial),
            Action::LandLeft(client) => {
                let write = self.clients[client].left.remove(0);
                self.landed(client, write);
            }
            Action::Expire => {
                self.has_expired = true;
                let effects = self.sessions.expire(self.now());
                self.carry_out(effects);
            }
            Action::Kill => {
                self.kills += 1;
                self.kill();
            }
            Action::Start => self.start(),
        }
    }
}

impl Hash for World {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").field("clients", &self.clients).field("wrong", &self.wrong).finish()
    }
}

impl Model for Rules {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(*self)]
    }

    fn actions(&self, state: &World, actions: &mut Vec<Action>) {
        // What follows something wrong does not matter.
        if state.wrong.is_none() {
            let mut possible = Vec::new();
            state.actions(actions, Some(&mut possible));
            actions.append(&mut possible);
        }
    }

    fn next_state(&self, before: &World, action: Action) -> Option<World> {
        let mut state = before.clone();
        state.act(action);
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let [late, twice, lost, unknown, usurped, stuck] = Wrong::ALL.map(|(_, name)| name);
        vec![
            Property::always(late, |_, state: &World| state.wrong != Some(Wrong::Late)),
            Property::always(twice, |_, state: &World| state.wrong != Some(Wrong::Twice)),
            Property::always(lost, |_, state: &World| state.wrong != Some(Wrong::Lost)),
            Property::always(unknown, |_, state: &World| state.wrong != Some(Wrong::Unknown)),
            Property::always(usurped, |_, state: &World| state.wrong != Some(Wrong::Usurped)),
            // No action can be repeated for ever, so it is enough to look at where nothing more is sure to
            // happen.
            Property::always(stuck, |rules: &Self, state: &World| {
                let mut sure = Vec::new();
                state.actions(&mut sure, None);
                !sure.is_empty()
                    || state.wrong.is_some()
                    || state.clients.iter().all(|client| client.is_done(rules))
            }),
            Property::sometimes(WRITTEN, |rules: &Self, state: &World| {
                (state.breaks, state.kills) == (rules.breaks, rules.kills)
                    && state.clients.iter().all(|client| client.next == rules.writes && !client.has_unknown)
            }),
            Property::sometimes(TAKEN_OVER, |rules: &Self, state: &World| {
                state.clients.get(rules.channels).is_some_and(|other| other.next == rules.writes)
            }),
            Property::sometimes(UNKNOWN, |_, state: &World| {
                state.clients.iter().any(|client| client.has_unknown)
            }),
        ]
    }
}

/// Checks that nothing is wrong, and that all of these are reached.
fn holds(rules: Rules, reached: &[&str]) {
    let checker = rules.checker().spawn_bfs().join();
    println!("{} states", checker.unique_state_count());
    for property in rules.properties() {
        let path = checker.discovery(property.name).map(Path::into_actions);
        match (property.expectation, path) {
            (Expectation::Sometimes, None) => {
                assert!(!reached.contains(&property.name), "never: {}", property.name);
            }
            (Expectation::Sometimes, Some(_)) | (_, None) => {}
            (_, Some(path)) => panic!("not so: {}, after {path:?}", property.name),
        }
    }
}

/// Checks that one of these does not hold, and nothing else before.
fn fails(rules: Rules, names: &[&str]) {
    let checker = rules.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let properties = rules.properties().into_iter();
    let failures: Vec<_> = properties
        .filter(|property| property.expectation == Expectation::Always)
        .filter_map(|property| Some((property.name, checker.discovery(property.name)?.into_actions())))
        .collect();
    println!("{} states: {failures:?}", checker.unique_state_count());
    assert!(!failures.is_empty(), "nothing goes wrong without it");
    assert!(failures.iter().all(|(name, _)| names.contains(name)), "something else goes wrong: {failures:?}");
}

/// Checks that states which are taken for one can become the same: looks at all that have other epochs,
/// serials and ids, or swapped channels.
fn has_sound_keys(rules: Rules) {
    let exact = |state: &World| {
        let of = |client: &Client| {
            let connections = client.connections.iter();
            let names: Vec<_> = connections.map(|connection| (connection.serial, connection.epoch)).collect();
            (client.machine.epoch(), client.dials, client.id, client.next, names)
        };
        (state.key(), state.clients.iter().map(of).collect::<Vec<_>>())
    };
    let mut seen = HashSet::new();
    let mut next = HashMap::<u64, BTreeSet<u64>>::new();
    let mut todo = rules.init_states();
    while let Some(state) = todo.pop() {
        if !seen.insert(exact(&state)) {
            continue;
        }
        let mut actions = Vec::new();
        Model::actions(&rules, &state, &mut actions);
        let after: Vec<_> =
            actions.into_iter().filter_map(|action| rules.next_state(&state, action)).collect();
        let keys: BTreeSet<_> = after.iter().map(World::key).collect();
        assert_eq!(*next.entry(state.key()).or_insert_with(|| keys.clone()), keys, "after {state:?}");
        todo.extend(after);
    }
    println!("{} of {} states are the same as others", seen.len() - next.len(), seen.len());
    assert!(seen.len() > next.len());
}

#[test]
fn states_that_are_taken_for_one_become_the_same() {
    has_sound_keys(Rules { breaks: 1, ..WHOLE });
    has_sound_keys(Rules { expires: true, kills: 1, takes_over: true, ..ONE });
}

/// The whole: two channels, two writes, two breaks, mail between workers, and another session.
const WHOLE: Rules = Rules { channels: 2, breaks: 2, takes_over: true, ..CALM };

#[test]
fn whatever_breaks_nothing_lands_late_or_twice_or_is_lost() {
    holds(WHOLE, &[WRITTEN, TAKEN_OVER]);
}

#[test]
fn the_same_if_channels_expire() {
    holds(Rules { expires: true, takes_over: false, ..WHOLE }, &[WRITTEN, UNKNOWN]);
}

#[test]
fn the_same_if_the_server_is_killed() {
    holds(Rules { kills: 1, takes_over: false, ..WHOLE }, &[WRITTEN, UNKNOWN]);
}

#[test]
fn the_same_if_all_of_that_happens_to_one_channel() {
    holds(Rules { kills: 2, expires: true, channels: 1, ..WHOLE }, &[WRITTEN, TAKEN_OVER, UNKNOWN]);
}

/// One channel, whose connections break twice.
const ONE: Rules = Rules { breaks: 2, ..CALM };
const SUPERSEDED: Rules = Rules { takes_over: true, ..ONE };

/// Tests that a guard of the server, or a rule of the client, is needed.
macro_rules! needed {
    ($($name:ident: $rules:expr => $wrong:expr;)*) => {
        $(#[test]
        fn $name() {
            fails($rules, &$wrong.map(name));
        })*
    };
}

fn name(wrong: Wrong) -> &'static str {
    Wrong::ALL.into_iter().find_map(|(other, name)| (other == wrong).then_some(name)).expect("it has a name")
}

needed! {
    it_is_needed_that_an_older_epoch_does_not_join:
        Rules { off: Some(Guard::Epoch), ..ONE } => [Wrong::Usurped];
    it_is_needed_that_a_connection_that_was_replaced_is_closed:
        Rules { off: Some(Guard::Fence), ..ONE } => [Wrong::Stuck];
    it_is_needed_that_the_next_connection_waits_for_the_mail_to_other_workers:
        Rules { off: Some(Guard::Connections), ..ONE } => [Wrong::Twice, Wrong::Late];
    it_is_needed_that_it_waits_for_what_executes:
        Rules { off: Some(Guard::Orphans), ..ONE } => [Wrong::Twice, Wrong::Late];
    it_is_needed_that_what_was_recorded_is_handed_over:
        Rules { off: Some(Guard::Outcomes), ..ONE } => [Wrong::Twice];
    it_is_needed_that_a_channel_is_kept_while_something_executes:
        Rules { off: Some(Guard::Keep), expires: true, ..ONE } => [Wrong::Late];
    it_is_needed_that_a_channel_that_was_forgotten_is_not_known:
        Rules { off: Some(Guard::Known), expires: true, ..ONE } => [Wrong::Twice];
    it_is_needed_that_it_is_not_known_until_the_client_has_heard_it:
        Rules { off: Some(Guard::Heard), expires: true, ..ONE } => [Wrong::Twice];
    it_is_needed_that_superseded_sessions_are_waited_for:
        Rules { off: Some(Guard::Supersede), ..SUPERSEDED } => [Wrong::Late];
    it_is_needed_that_nobody_joins_a_session_that_was_given_up:
        Rules { off: Some(Guard::GivenUp), ..SUPERSEDED } => [Wrong::Stuck];
    it_is_needed_that_who_waits_for_a_session_is_told_of_its_end:
        Rules { off: Some(Guard::Wake), ..SUPERSEDED } => [Wrong::Stuck];
    it_is_needed_that_a_client_asks:
        Rules { asks: false, ..ONE } => [Wrong::Twice];
    it_is_needed_that_a_client_uses_no_id_again:
        Rules { counts: false, ..ONE } => [Wrong::Lost];
    it_is_needed_that_a_client_raises_its_epoch:
        Rules { raises: false, ..ONE } => [Wrong::Usurped];
    it_is_needed_that_a_server_starts_when_the_io_of_the_one_before_has_ended:
        Rules { has_barrier: false, kills: 1, ..CALM } => [Wrong::Late];
}
