//! A worker: one thread that owns a reactor, an arena, the connections that were placed on it, and their requests.
//!
//! Nothing here is shared but what [`Shared`] holds, and that is for the control path. A turn hears from everyone, moves each
//! request along as far as it goes, then sends all answers at once. What commands mean is in [`crate::command`].

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context;
use raio_transport::handshake::{Peer, Policy};
use raio_transport::memory::{Arena, Slot};
use raio_transport::protocol::FileHandle;
use raio_transport::reactor::{self, Event, Reactor, Receiver, Sender, Token, Wait};
use raio_transport::transport::{
    CloseReason, ConnectionId, RequestKey, Response, ServerEvent, ServerTransport, SlotRange,
};
use raio_transport::{Status, Violation, rdma, tcp};
use slab::Slab;

use crate::backend::{self, Backend, Completion, Handle, Threads, Uring};
use crate::config::BackendKind;
use crate::export::Exports;
use crate::request::{Request, State, Step, Work, WorkerFile, failure, success};
use crate::session::{OpenFile, Session, Sessions, index_of};
use crate::stats::Counters;
use crate::throttle::Throttle;

/// The owner number of the worker's own timers.
const TIMER: Token = Token { owner: 0xff, value: 0 };
/// After it was told to stop, a worker takes new requests for so long: those that were on their way.
const GRACE: Duration = Duration::from_millis(100);
/// How long a drained worker waits for its peers to read their goodbye and close.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(1500);
/// A connection may have this part of the arena.
const SHARE: usize = 8;

/// What all workers share.
#[derive(Debug)]
pub struct Shared {
    /// What clients may open.
    pub exports: Exports,
    /// Who they are, and what they have open.
    pub sessions: Sessions,
    /// What each connection is granted.
    pub policy: Arc<Policy>,
    /// Every worker's mailbox, once all have started.
    pub mailboxes: OnceLock<Vec<Sender<Mail>>>,
    /// What the configuration asks for.
    pub backend: BackendKind,
    /// Each worker's arena.
    pub arena_bytes: usize,
    /// How long an idle worker spins.
    pub spin: Duration,
    /// Connections may come by RDMA.
    pub rdma: bool,
}

/// A connection that was accepted, and nothing more.
#[derive(Debug)]
pub enum RawConnection {
    /// A stream socket.
    Tcp(OwnedFd),
    /// One that a client asks for.
    Rdma(rdma::Incoming),
}

/// What other threads tell a worker.
#[derive(Debug)]
pub enum Mail {
    /// Serve this connection: it was accepted, and nothing has been read from it.
    Connection(RawConnection),
    /// A handle was closed by another worker.
    Forget {
        /// Whose.
        session: [u8; 16],
        /// Which.
        handle: FileHandle,
    },
    /// Finish what is in flight, by then, and end.
    Drain(Instant),
}

/// Every transport of a worker. Owner numbers of tokens tell them apart.
struct Transports {
    tcp: tcp::Server,
    rdma: Option<rdma::Server>,
}

impl Transports {
    const TCP: u8 = 0;
    const RDMA: u8 = 1;
    const COUNT: usize = 2;

    /// The owner numbers of those that there are.
    fn owners(&self) -> std::ops::Range<u8> {
        Self::TCP..if self.rdma.is_some() { Self::RDMA + 1 } else { Self::RDMA }
    }

    fn get(&mut self, owner: u8) -> &mut dyn ServerTransport {
        match (owner, &mut self.rdma) {
            (Self::TCP, _) => &mut self.tcp,
            (Self::RDMA, Some(rdma)) => rdma,
            _ => unreachable!("no transport has the owner number {owner}"),
        }
    }

    fn connections(&mut self) -> usize {
        self.owners().map(|owner| self.get(owner).connections()).sum()
    }
}

/// A connection that has finished its handshake.
pub(crate) struct Connection {
    transport: u8,
    id: ConnectionId,
    pub(crate) session: usize,
    /// Its requests that are not yet answered, by the client's ids.
    pub(crate) requests: HashMap<u64, usize>,
    /// Those of them that wait for memory, oldest first.
    waiting: VecDeque<usize>,
    /// It is in `Worker::turns`.
    is_waiting: bool,
    /// Bytes in the slots of its requests. Its unsent answers have more: `ServerTransport::unsent_bytes`.
    slot_bytes: usize,
    /// What it did wrong: it is closing.
    violation: Option<Violation>,
    name: String,
}

/// A session that has connections here.
pub(crate) struct LocalSession {
    pub(crate) session: Arc<Session>,
    connections: usize,
    /// This worker's view of the files, by the index in their handles.
    files: Vec<Option<Rc<WorkerFile>>>,
}

/// A worker that was told to stop.
struct Drain {
    refuse_at: Instant,
    deadline: Instant,
    goodbye_deadline: Option<Instant>,
}

enum Grant {
    Slot(Slot),
    /// The connection has its share already.
    OverShare,
    /// Nobody can have a slot of this size now.
    NoRoom,
}

/// See the module documentation.
pub struct Worker {
    pub(crate) shared: Arc<Shared>,
    pub(crate) counters: Arc<Counters>,
    /// Its place among the workers.
    index: usize,
    mail: Receiver<Mail>,
    pub(crate) reactor: Reactor,
    arena: Arena,
    transports: Transports,
    pub(crate) backend: Box<dyn Backend>,
    /// The exports' directories.
    directories: Vec<Option<Handle>>,
    pub(crate) connections: Slab<Connection>,
    /// Connections by transport and its index for them.
    by_transport: [Vec<Option<usize>>; Transports::COUNT],
    pub(crate) sessions: Slab<LocalSession>,
    sessions_by_id: HashMap<[u8; 16], usize>,
    pub(crate) requests: Slab<Request>,
    /// How many requests are in each state.
    in_state: [usize; 3],
    /// Connections with requests that wait for memory take turns.
    turns: VecDeque<usize>,
    /// The first of them waits until there is room.
    is_out_of_room: bool,
    /// What a connection may have of the arena.
    share_bytes: usize,
    events: Vec<Event>,
    /// The last turn did something, which may have consequences that no event announces.
    is_busy: bool,
    drain: Option<Drain>,
    warnings: Throttle,
}

/// What the server learns of a worker's start.
#[derive(Debug)]
pub struct Started {
    /// Where to reach it.
    pub mailbox: Sender<Mail>,
    /// Why it has no io_uring.
    pub fallback: Option<String>,
    /// Why its arena could not be registered with the ring.
    pub unregistered: Option<std::io::Error>,
}

impl Worker {
    /// Makes a worker, in its own thread. `cpu` is where it is to stay.
    pub fn new(
        index: usize,
        shared: Arc<Shared>,
        counters: Arc<Counters>,
        cpu: Option<usize>,
    ) -> anyhow::Result<(Self, Started)> {
        let mut reactor = Reactor::new(&reactor::Config { spin: shared.spin, ..reactor::Config::default() })
            .context("Cannot make an event loop")?;
        let io_bytes_max = shared.policy.data_bytes_max as usize;
        // Twice the largest request, for a direct read takes up to a block more on each side.
        let arena = Arena::new(shared.arena_bytes, 2 * io_bytes_max).with_context(|| {
            format!(
                "Cannot map {} MiB of memory for a worker. Give a smaller --memory",
                shared.arena_bytes >> 20
            )
        })?;
        let unregistered = reactor.register_arena(&arena).err();
        let backend: Box<dyn Backend> = if shared.backend == BackendKind::Uring && reactor.has_ring() {
            Box::new(Uring::default())
        } else {
            Box::new(Threads::new(&reactor).context("Cannot start the threads of --backend threads")?)
        };
        // Only now, so that those threads are not pinned too.
        if let Some(cpu) = cpu {
            let mut set = rustix::thread::CpuSet::new();
            set.set(cpu);
            let _ = rustix::thread::sched_setaffinity(None, &set);
        }
        let directories = shared.exports.all().iter().map(|export| {
            let directory = export.directory()?;
            Some(Handle::new(&mut reactor, Arc::clone(directory)))
        });
        let directories = directories.collect();
        let rdma = if shared.rdma {
            Some(rdma::Server::new(&mut reactor, Transports::RDMA, Arc::clone(&shared.policy), &arena)?)
        } else {
            None
        };
        let (mailbox, mail) = reactor::mailbox(reactor.waker());
        let fallback = reactor.fallback_reason().map(str::to_owned);
        let started = Started { mailbox, fallback, unregistered };
        counters.arena_bytes.set(arena.len() as u64);
        let worker = Self {
            transports: Transports {
                tcp: tcp::Server::new(Transports::TCP, Arc::clone(&shared.policy)),
                rdma,
            },
            share_bytes: (2 * io_bytes_max).max(arena.len() / SHARE),
            shared,
            counters,
            index,
            mail,
            reactor,
            arena,
            backend,
            directories,
            connections: Slab::new(),
            by_transport: Default::default(),
            sessions: Slab::new(),
            sessions_by_id: HashMap::new(),
            requests: Slab::new(),
            in_state: [0; 3],
            turns: VecDeque::new(),
            is_out_of_room: false,
            events: Vec::new(),
            is_busy: false,
            drain: None,
            warnings: Throttle::new(),
        };
        Ok((worker, started))
    }

    /// Works until it is told to stop. Gives whether everything in flight was answered by then.
    pub fn run(&mut self) -> anyhow::Result<bool> {
        loop {
            self.turn()?;
            if let Some(outcome) = self.drained() {
                return Ok(outcome);
            }
        }
    }

    /// One turn of the loop.
    fn turn(&mut self) -> anyhow::Result<()> {
        self.hear()?;
        self.take_mail();
        self.take_completions();
        self.grant_slots();
        self.take_requests();
        self.send_answers();
        self.publish();
        Ok(())
    }

    /// Submits what the last turn asked for, and hears what has ended. Sleeps here if there is nothing to do.
    fn hear(&mut self) -> anyhow::Result<()> {
        let wait = if self.is_busy { Wait::Poll } else { Wait::Block };
        let mut events = std::mem::take(&mut self.events);
        let mut news = false;
        let rdma = &mut self.transports.rdma;
        let mut look = |arm| {
            news = rdma.as_mut().is_some_and(|rdma| rdma.has_news(arm));
            news
        };
        self.reactor.turn_looking(wait, &mut events, &mut look).context("The event loop failed")?;
        self.is_busy = news || !events.is_empty();
        for event in events.drain(..) {
            match event.token.owner {
                backend::OWNER => self.backend.handle(event),
                owner if owner == TIMER.owner => {}
                owner => self.transports.get(owner).handle(&mut self.reactor, event),
            }
        }
        self.events = events;
        if let Some(rdma) = &mut self.transports.rdma {
            rdma.take_news(&mut self.reactor);
        }
        Ok(())
    }

    fn take_mail(&mut self) {
        while let Some(mail) = self.mail.take() {
            self.is_busy = true;
            match mail {
                Mail::Connection(connection) => {
                    self.counters.adopted.add(1);
                    if self.drain.is_none() {
                        self.adopt(connection);
                    }
                }
                Mail::Forget { session, handle } => {
                    if let Some(&session) = self.sessions_by_id.get(&session) {
                        self.forget(session, handle);
                    }
                }
                Mail::Drain(deadline) => {
                    let refuse_at = Instant::now() + GRACE;
                    self.reactor.timer(refuse_at, TIMER);
                    self.reactor.timer(deadline, TIMER);
                    self.drain = Some(Drain { refuse_at, deadline, goodbye_deadline: None });
                }
            }
        }
    }

    fn take_completions(&mut self) {
        while let Some(completion) = self.backend.next() {
            self.is_busy = true;
            self.completed(completion);
        }
    }

    fn take_requests(&mut self) {
        for owner in self.transports.owners() {
            while let Some(event) = self.transports.get(owner).next_event() {
                self.is_busy = true;
                match event {
                    ServerEvent::Opened(id, peer) => self.opened(owner, id, peer),
                    ServerEvent::Request(request) => {
                        if let Some(connection) = self.connection(owner, request.key.connection)
                            && self.connections[connection].violation.is_none()
                        {
                            self.command(connection, &request);
                        }
                    }
                    ServerEvent::Fetched(key, range) => self.fetched(owner, key, range),
                    ServerEvent::Closed(id, reason) => self.closed(owner, id, &reason),
                }
            }
        }
    }

    fn send_answers(&mut self) {
        for owner in self.transports.owners() {
            self.transports.get(owner).flush(&mut self.reactor);
        }
    }

    fn publish(&mut self) {
        let counters = &self.counters;
        counters.connections.set(self.transports.connections() as u64);
        counters.need_slot.set(self.in_state[State::NeedSlot as usize] as u64);
        counters.fetching.set(self.in_state[State::Fetching as usize] as u64);
        counters.executing.set(self.in_state[State::Executing as usize] as u64);
        counters.slot_bytes.set(self.arena.used_bytes() as u64);
        counters.sleeps.set(self.reactor.sleeps());
        counters.turns.add(1);
    }

    // Connections and sessions ---------------------------------------------------------------------------------------

    fn connection(&self, owner: u8, id: ConnectionId) -> Option<usize> {
        let key = (*self.by_transport[usize::from(owner)].get(id.index as usize)?)?;
        (self.connections[key].id == id).then_some(key)
    }

    fn adopt(&mut self, connection: RawConnection) {
        match (connection, &mut self.transports.rdma) {
            (RawConnection::Tcp(stream), _) => {
                self.transports.tcp.adopt(&mut self.reactor, stream);
            }
            (RawConnection::Rdma(incoming), Some(rdma)) => {
                if let Err(error) = rdma.adopt(&mut self.reactor, incoming)
                    && let Some(suppressed) = self.warnings.pass()
                {
                    tracing::warn!(suppressed, "A client was turned away: {error}.");
                }
            }
            (RawConnection::Rdma(_), None) => unreachable!("none is listened for without the transport"),
        }
    }

    fn opened(&mut self, owner: u8, id: ConnectionId, peer: Peer) {
        tracing::debug!(name = peer.name, "A client has connected.");
        let session = match self.sessions_by_id.get(&peer.session) {
            Some(&key) => key,
            None => {
                let session = self.shared.sessions.join(peer.session);
                let key = self.sessions.insert(LocalSession { session, connections: 0, files: Vec::new() });
                self.sessions_by_id.insert(peer.session, key);
                key
            }
        };
        self.sessions[session].connections += 1;
        let key = self.connections.insert(Connection {
            transport: owner,
            id,
            session,
            requests: HashMap::new(),
            waiting: VecDeque::new(),
            is_waiting: false,
            slot_bytes: 0,
            violation: None,
            name: peer.name,
        });
        let by_index = &mut self.by_transport[usize::from(owner)];
        let index = id.index as usize;
        if by_index.len() <= index {
            by_index.resize(index + 1, None);
        }
        by_index[index] = Some(key);
    }

    fn closed(&mut self, owner: u8, id: ConnectionId, reason: &CloseReason) {
        let Some(key) = self.connection(owner, id) else {
            self.counters.close_reason(reason);
            if let (CloseReason::Violation(violation), Some(suppressed)) = (reason, self.warnings.pass()) {
                tracing::warn!(suppressed, "A client's handshake failed: {violation}.");
            }
            return;
        };
        self.by_transport[usize::from(owner)][id.index as usize] = None;
        let connection = self.connections.remove(key);
        if connection.is_waiting {
            self.turns.retain(|&other| other != key);
        }
        for &request in connection.requests.values() {
            if self.requests[request].state == State::Executing {
                // The kernel has its memory: it runs to its end.
                self.requests[request].connection = None;
            } else {
                let request = self.requests.remove(request);
                self.in_state[request.state as usize] -= 1;
            }
        }
        let violation = connection.violation.or(match reason {
            CloseReason::Violation(violation) => Some(*violation),
            _ => None,
        });
        match violation {
            Some(violation) => {
                self.counters.close(violation.name());
                if let Some(suppressed) = self.warnings.pass() {
                    tracing::warn!(
                        name = connection.name,
                        suppressed,
                        "A client broke the protocol and was closed: {violation}."
                    );
                }
            }
            None => self.counters.close_reason(reason),
        }
        tracing::debug!(name = connection.name, reason = reason.name(), "A client's connection has ended.");
        self.leave(connection.session);
    }

    /// A connection of this session has gone.
    fn leave(&mut self, key: usize) {
        let local = &mut self.sessions[key];
        local.connections -= 1;
        if local.connections > 0 {
            return;
        }
        let LocalSession { session, files, .. } = self.sessions.remove(key);
        self.sessions_by_id.remove(&session.id);
        drop(files);
        for file in self.shared.sessions.leave(&session) {
            self.retire(backend::NOBODY, file);
        }
    }

    /// Ends a connection whose client broke raio's protocol.
    pub(crate) fn violate(&mut self, connection: usize, violation: Violation) {
        let Connection { transport, id, violation: noted, .. } = &mut self.connections[connection];
        *noted = Some(violation);
        let status = Status::protocol(violation.errno());
        self.transports.get(*transport).close(&mut self.reactor, *id, status, &format!("{violation}."));
    }

    // Files ------------------------------------------------------------------------------------------------------------

    /// The file with this handle in the session of this connection.
    pub(crate) fn file(&mut self, connection: usize, handle: FileHandle) -> Option<Rc<WorkerFile>> {
        let session = self.connections[connection].session;
        let local = &self.sessions[session];
        if let Some(Some(file)) = local.files.get(index_of(handle))
            && file.handle == handle
            && !file.open.is_closed()
        {
            return Some(Rc::clone(file));
        }
        let open = local.session.get(handle)?;
        let backend = open.fd().map(|fd| Handle::new(&mut self.reactor, Arc::clone(fd)));
        Some(self.remember(session, WorkerFile { handle, open, backend }))
    }

    /// Keeps this worker's view of a file.
    pub(crate) fn remember(&mut self, session: usize, file: WorkerFile) -> Rc<WorkerFile> {
        let files = &mut self.sessions[session].files;
        let index = index_of(file.handle);
        if files.len() <= index {
            files.resize(index + 1, None);
        }
        let file = Rc::new(file);
        files[index] = Some(Rc::clone(&file));
        file
    }

    /// Drops this worker's view of a file that was closed.
    pub(crate) fn forget(&mut self, session: usize, handle: FileHandle) {
        if let Some(file) = self.sessions[session].files.get_mut(index_of(handle))
            && file.as_ref().is_some_and(|file| file.handle == handle)
        {
            *file = None;
        }
    }

    /// Makes the other workers drop their views of a file that was closed.
    pub(crate) fn tell_others(&self, session: [u8; 16], handle: FileHandle) {
        for (index, mailbox) in self.shared.mailboxes.get().into_iter().flatten().enumerate() {
            if index != self.index {
                mailbox.send(Mail::Forget { session, handle });
            }
        }
    }

    /// Closes a file if nobody uses it any more. Whether there will be a completion.
    pub(crate) fn retire(&mut self, key: u64, file: Arc<OpenFile>) -> bool {
        let Some(fd) = file.into_last_fd() else { return false };
        self.backend.close(&mut self.reactor, key, fd);
        true
    }

    // Requests ---------------------------------------------------------------------------------------------------------

    /// Takes a request on. Gives its key.
    pub(crate) fn begin(&mut self, connection: usize, key: RequestKey, work: Work) -> usize {
        let needs = work.slot_len();
        let request = self.requests.insert(Request {
            transport: self.connections[connection].transport,
            key,
            connection: Some(connection),
            state: State::NeedSlot,
            work,
            slot_bytes: 0,
            is_cancelled: false,
            canceller: None,
            operation: None,
        });
        self.in_state[State::NeedSlot as usize] += 1;
        self.connections[connection].requests.insert(key.id, request);
        if needs == 0 {
            self.execute(request, None);
        } else if let Some(slot) = self.slot_at_once(connection, needs) {
            self.granted(request, slot);
        } else {
            self.counters.slot_waits.add(1);
            let connection_key = connection;
            let connection = &mut self.connections[connection];
            connection.waiting.push_back(request);
            if !connection.is_waiting {
                connection.is_waiting = true;
                self.turns.push_back(connection_key);
            }
        }
        request
    }

    fn slot_at_once(&mut self, connection: usize, bytes: usize) -> Option<Slot> {
        if self.is_out_of_room || self.connections[connection].is_waiting {
            return None;
        }
        match self.grant(connection, bytes) {
            Grant::Slot(slot) => Some(slot),
            Grant::OverShare | Grant::NoRoom => None,
        }
    }

    fn grant(&mut self, connection: usize, bytes: usize) -> Grant {
        let Connection { transport, id, slot_bytes, .. } = self.connections[connection];
        let held = slot_bytes + self.transports.get(transport).unsent_bytes(id);
        if held > 0 && held + bytes > self.share_bytes {
            return Grant::OverShare;
        }
        self.arena.alloc(bytes).map_or(Grant::NoRoom, Grant::Slot)
    }

    /// Gives memory to requests that wait for it. Connections take turns, and each has a FIFO. None overtakes another connection's
    /// request that waits for room: a large one would never have its turn.
    fn grant_slots(&mut self) {
        self.is_out_of_room = false;
        let mut over_share = 0;
        while over_share < self.turns.len() {
            let Some(key) = self.turns.pop_front() else { return };
            let connection = &mut self.connections[key];
            let Some(&request) = connection.waiting.front() else {
                connection.is_waiting = false;
                continue;
            };
            let bytes = self.requests[request].work.slot_len();
            match self.grant(key, bytes) {
                Grant::Slot(slot) => {
                    self.is_busy = true;
                    over_share = 0;
                    self.turns.push_back(key);
                    self.connections[key].waiting.pop_front();
                    self.granted(request, slot);
                }
                Grant::OverShare => {
                    over_share += 1;
                    self.turns.push_back(key);
                }
                Grant::NoRoom => {
                    self.turns.push_front(key);
                    self.is_out_of_room = true;
                    return;
                }
            }
        }
    }

    fn granted(&mut self, key: usize, slot: Slot) {
        let request = &mut self.requests[key];
        request.slot_bytes = slot.len();
        if let Some(connection) = request.connection {
            self.connections[connection].slot_bytes += slot.len();
        }
        if matches!(request.work, Work::Write(..)) {
            let (owner, name) = (request.transport, request.key);
            self.enter(key, State::Fetching);
            self.transports.get(owner).fetch(&mut self.reactor, name, slot, 0);
        } else {
            self.execute(key, Some(slot));
        }
    }

    fn fetched(&mut self, owner: u8, name: RequestKey, range: SlotRange) {
        let Some(connection) = self.connection(owner, name.connection) else { return };
        let Some(&key) = self.connections[connection].requests.get(&name.id) else { return };
        if self.requests[key].is_cancelled {
            self.answer(key, cancelled());
        } else {
            self.execute(key, Some(range.slot));
        }
    }

    fn execute(&mut self, key: usize, slot: Option<Slot>) {
        self.enter(key, State::Executing);
        let request = &mut self.requests[key];
        let handle = match &request.work {
            Work::Close => return,
            Work::Open(opening) => self.directories[opening.export].as_ref(),
            work => work.file().and_then(|file| file.backend.as_ref()),
        };
        match handle {
            Some(handle) => {
                let operation = request.work.first(slot);
                request.operation = self.backend.submit(&mut self.reactor, key as u64, handle, operation);
            }
            None => {
                let size = request.work.file().and_then(|file| file.open.fixed_size()).unwrap_or(0);
                let response = request.work.on_null(size, slot);
                self.answer(key, response);
            }
        }
    }

    fn completed(&mut self, completion: Completion) {
        if completion.key == backend::NOBODY {
            return;
        }
        let key = completion.key as usize;
        let request = &mut self.requests[key];
        debug_assert_eq!(request.state, State::Executing);
        if let Work::Open(_) = request.work {
            return self.open_proceeds(key, completion);
        }
        match request.work.completed(completion) {
            Step::Done(response) => self.answer(key, response),
            Step::Again(operation) => {
                let Some(handle) = request.work.file().and_then(|file| file.backend.as_ref()) else {
                    unreachable!("it has been submitted before")
                };
                request.operation = self.backend.submit(&mut self.reactor, key as u64, handle, operation);
            }
        }
    }

    /// The largest slot.
    pub(crate) fn slot_bytes_max(&self) -> usize {
        self.arena.slot_bytes_max()
    }

    /// The directory of an export, for an open.
    pub(crate) fn directory(&self, export: usize) -> Option<&Handle> {
        self.directories[export].as_ref()
    }

    fn enter(&mut self, key: usize, state: State) {
        let request = &mut self.requests[key];
        self.in_state[request.state as usize] -= 1;
        request.state = state;
        self.in_state[state as usize] += 1;
    }

    /// Ends a request that was begun. If its connection has gone, the answer goes nowhere.
    pub(crate) fn answer(&mut self, key: usize, response: Response) {
        let request = self.requests.remove(key);
        self.in_state[request.state as usize] -= 1;
        let Some(connection) = request.connection else { return };
        let entry = &mut self.connections[connection];
        entry.requests.remove(&request.key.id);
        entry.slot_bytes -= request.slot_bytes;
        if response.status.is_ok() {
            match request.work {
                Work::Read(..) => self.counters.read_bytes.add(response.result),
                Work::Write(..) => self.counters.written_bytes.add(response.result),
                _ => {}
            }
        }
        let was_cancelled = response.status.errno == libc::ECANCELED;
        self.respond(connection, request.key, response);
        if let Some(canceller) = request.canceller {
            let response = if was_cancelled {
                success(0)
            } else {
                failure(
                    Status::storage(libc::EALREADY),
                    "It was too late to cancel the request: it has run to its end.",
                )
            };
            self.respond(connection, canceller, response);
        }
    }

    /// Answers a request that was not begun, or is over.
    pub(crate) fn respond(&mut self, connection: usize, name: RequestKey, response: Response) {
        self.counters.answered.add(1);
        if !response.status.is_ok() {
            self.counters.errors.add(1);
        }
        let owner = self.connections[connection].transport;
        self.transports.get(owner).respond(&mut self.reactor, name, response);
    }

    /// Cancels a request as far as that goes.
    pub(crate) fn cancel(&mut self, connection: usize, key: usize) {
        let request = &mut self.requests[key];
        request.is_cancelled = true;
        match request.state {
            State::NeedSlot => {
                self.connections[connection].waiting.retain(|&other| other != key);
                self.answer(key, cancelled());
            }
            // When its data has come.
            State::Fetching => {}
            State::Executing => self.backend.cancel(&mut self.reactor, key as u64, request.operation),
        }
    }

    // The end ----------------------------------------------------------------------------------------------------------

    /// Whether new requests are refused.
    pub(crate) fn is_refusing(&self) -> bool {
        self.drain.as_ref().is_some_and(|drain| Instant::now() >= drain.refuse_at)
    }

    /// Whether the worker was told to stop and is done; if so, whether everything was answered.
    fn drained(&mut self) -> Option<bool> {
        let drain = self.drain.as_mut()?;
        let now = Instant::now();
        if now < drain.refuse_at {
            return None;
        }
        if now >= drain.deadline {
            return Some(self.connections.is_empty() && self.requests.is_empty());
        }
        if self.connections.is_empty() {
            if self.transports.connections() == 0 {
                return Some(true);
            }
            let goodbye_deadline = *drain.goodbye_deadline.get_or_insert_with(|| {
                self.reactor.timer(now + GOODBYE_TIMEOUT, TIMER);
                now + GOODBYE_TIMEOUT
            });
            return (now >= goodbye_deadline).then_some(true);
        }
        for (_, connection) in &mut self.connections {
            let transport = self.transports.get(connection.transport);
            if connection.requests.is_empty() && transport.unsent_bytes(connection.id) == 0 {
                self.is_busy = true;
                let status = Status::transport(libc::ESHUTDOWN);
                transport.close(
                    &mut self.reactor,
                    connection.id,
                    status,
                    "The server is shutting down. Connect again later.",
                );
            }
        }
        None
    }
}

fn cancelled() -> Response {
    failure(Status::storage(libc::ECANCELED), "The request was cancelled.")
}
