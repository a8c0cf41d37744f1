//! Moves requests along, from their arrival to their answer: see [`crate::request`] for the states.

use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Instant;

use raio_transport::Status;
use raio_transport::memory::Slot;
use raio_transport::transport::{RequestKey, Response, ServerTransport, SlotRange};

use super::connection::Connection;
use super::{TIMER, Worker};
use crate::client::Client;
use crate::engine::{self, Completion, Outcome};
use crate::limits::Who;
use crate::request::{Request, State, Step, Work, WorkerFile, failure, success};

pub(super) enum Grant {
    Slot(Slot),
    /// The connection has as much as it may have now.
    OverQuota,
    /// The requests on this export have.
    OverExport(usize),
    /// There is no memory for this size now, though the connection holds none.
    NoRoom,
    /// Its session or its address has as much as it may have now.
    OverLimit(Who),
    /// Enough for this turn.
    NextIteration,
}

/// As long as there is memory a connection may hold so much, whatever the others hold and wait for.
const SMALL_BYTES: usize = 256 << 10;
/// ... but not more than this part of what is free: the more hold something, the less each gets, and some is
/// left for the next.
const SMALL_PART: usize = 16;

/// Memory that a turn gives out: so much is worked on while it is in the core's own cache, and a request for
/// little does not wait behind many for much. One request for more has a turn for itself.
pub(super) const ITERATION_BYTES_MAX: usize = 256 << 10;
/// A device that reports late gets so many with one system call.
const TOGETHER: usize = 2;

impl Worker {
    /// Takes a request on. Gives its key.
    pub(super) fn begin(&mut self, connection: usize, key: RequestKey, work: Work) -> usize {
        let (needs, export) = (work.slot_len(), self.export_of(&work));
        let request = self.requests.insert(Request {
            key,
            connection: Some(connection),
            state: State::NeedSlot,
            work,
            slot_bytes: 0,
            export,
            is_cancelled: false,
            cancel_request: None,
            operation: None,
        });
        self.in_state[State::NeedSlot as usize] += 1;
        self.connections[connection].requests.push_back(request);
        if needs == 0 {
            self.execute(request, None);
        } else if let Some(slot) = self.slot_at_once(connection, request, needs) {
            self.granted(request, slot);
        } else {
            self.counters.slot_waits.add(1);
            self.connections[connection].waiting.push_back(request);
            self.waits(connection);
        }
        request
    }

    fn slot_at_once(&mut self, connection: usize, request: usize, bytes: usize) -> Option<Slot> {
        if self.connections[connection].is_waiting {
            return None;
        }
        match self.grant(connection, request, bytes) {
            Grant::Slot(slot) => Some(slot),
            Grant::OverQuota | Grant::OverExport(_) | Grant::NoRoom | Grant::NextIteration => None,
            Grant::OverLimit(who) => {
                self.is_limited(connection, who);
                None
            }
        }
    }

    /// Why a connection may not have so much more memory now.
    pub(super) fn withheld(&mut self, connection: usize, bytes: usize) -> Option<Grant> {
        let Connection { id, slot_bytes, .. } = self.connections[connection];
        let held = slot_bytes + self.transport.unsent_bytes(id);
        if self.has_memory_caps
            && let Some(who) = self.over_cap(connection, bytes)
        {
            return Some(Grant::OverLimit(who));
        }
        // A little is for everybody.
        if held + bytes > SMALL_BYTES.min(self.arena.free_bytes() / SMALL_PART)
            && let Some(withheld) = self.withheld_beyond_a_little(connection, held, bytes)
        {
            return Some(withheld);
        }
        if self.iteration_bytes > 0 && self.iteration_bytes + bytes > ITERATION_BYTES_MAX {
            self.is_busy = true;
            return Some(Grant::NextIteration);
        }
        None
    }

    /// Beyond a little some memory is kept in reserve, the quota shrinks once half of the memory is out, and
    /// whoever has waited longest with nothing at all goes before everybody else.
    #[inline(never)]
    fn withheld_beyond_a_little(&mut self, connection: usize, held: usize, bytes: usize) -> Option<Grant> {
        if 2 * self.arena.free_bytes() < self.arena.len()
            && let Some(who) = self.over_share(connection, bytes)
        {
            return Some(Grant::OverLimit(who));
        }
        if self.is_within_quota(connection, held, bytes) {
            None
        } else if held > 0 {
            Some(Grant::OverQuota)
        } else {
            Some(Grant::NoRoom)
        }
    }

    fn is_within_quota(&self, connection: usize, held: usize, bytes: usize) -> bool {
        let (all, free) = (self.arena.len(), self.arena.free_bytes());
        if self.starved.is_some_and(|starved| starved != connection) || free < bytes + self.reserve_bytes {
            return false;
        }
        let quota = if 2 * free >= all {
            self.share_bytes
        } else {
            self.share_bytes * (2 * free / 4096) / (all / 4096)
        };
        held == 0 || held + bytes <= quota
    }

    fn grant(&mut self, connection: usize, request: usize, bytes: usize) -> Grant {
        // First of all: whoever waits for a file system holds up nobody.
        if let Some(export) = self.requests[request].export
            && self.is_over_export(export, bytes)
        {
            return Grant::OverExport(export);
        }
        if let Some(withheld) = self.withheld(connection, bytes) {
            return withheld;
        }
        let Some(slot) = self.arena.alloc(bytes) else { return Grant::NoRoom };
        if self.starved == Some(connection) {
            self.starved = None;
        }
        self.iteration_bytes += bytes;
        Grant::Slot(slot)
    }

    /// Gives memory to requests that wait for it. Connections take turns, and each has a FIFO. Only small
    /// ones overtake the connection that has waited longest with nothing: else a large request would never
    /// have its turn.
    pub(super) fn grant_slots(&mut self) {
        self.iteration_bytes = 0;
        self.is_noted = false;
        self.show_life();
        if self.round_robin.is_empty() {
            return;
        }
        // What was dropped since is free.
        self.arena.used_bytes();
        let mut passed_over = 0;
        while passed_over < self.round_robin.len() {
            let Some(key) = self.round_robin.pop_front() else { return };
            let Some(&request) = self.connections[key].waiting.front() else {
                self.waits_no_more(key);
                self.not_starved(key);
                continue;
            };
            let bytes = self.requests[request].work.slot_len();
            match self.grant(key, request, bytes) {
                Grant::Slot(slot) => {
                    self.is_busy = true;
                    passed_over = 0;
                    self.round_robin.push_back(key);
                    self.connections[key].waiting.pop_front();
                    self.granted(request, slot);
                }
                Grant::OverQuota => {
                    passed_over += 1;
                    self.round_robin.push_back(key);
                    self.not_starved(key);
                }
                Grant::OverExport(export) => {
                    passed_over += 1;
                    self.round_robin.push_back(key);
                    self.not_starved(key);
                    self.is_short |= self.is_fetching(export);
                }
                Grant::OverLimit(who) => {
                    passed_over += 1;
                    self.round_robin.push_back(key);
                    self.not_starved(key);
                    self.is_limited(key, who);
                }
                Grant::NoRoom => {
                    passed_over += 1;
                    self.round_robin.push_back(key);
                    self.starved.get_or_insert(key);
                    self.is_short = true;
                }
                Grant::NextIteration => return self.round_robin.push_front(key),
            }
        }
    }

    /// Somebody waits: [`Worker::show_life`] is due twice in the time after which a client that hears nothing
    /// would ask.
    pub(super) fn promise_life_sign(&mut self) {
        let reactor = &mut self.reactor;
        let period = self.shared.policy.keepalive / 2;
        self.life_sign.get_or_insert_with(|| {
            let at = Instant::now() + period;
            reactor.timer(at, TIMER);
            at
        });
    }

    /// Shows clients whose requests, or messages, wait for memory that the server lives: it may not get to
    /// their pings.
    fn show_life(&mut self) {
        if self.life_sign.take_if(|at| *at <= Instant::now()).is_none() {
            return;
        }
        for &connection in &self.round_robin {
            self.transport.show_life(&mut self.reactor, self.connections[connection].id);
        }
        self.transport.show_life_to_gated(&mut self.reactor);
        if !self.round_robin.is_empty() {
            self.promise_life_sign();
        }
    }

    /// This connection does not wait with nothing any more.
    pub(super) fn not_starved(&mut self, connection: usize) {
        self.starved.take_if(|starved| *starved == connection);
    }

    /// Closes connections that hold memory and make no progress, if others have been waiting for it for the
    /// stall timeout.
    pub(super) fn evict_stalled(&mut self) {
        let now = match self.stall_check {
            None if !self.is_short => return,
            None => Instant::now(),
            Some(at) => {
                let now = Instant::now();
                if now < at {
                    return;
                }
                now
            }
        };
        if !std::mem::take(&mut self.is_short) {
            self.stall_check = None;
            return;
        }
        self.transport.close_stalled(&mut self.reactor, self.stall_check.is_some());
        let at = now + self.shared.policy.stall_timeout;
        self.reactor.timer(at, TIMER);
        self.stall_check = Some(at);
    }

    fn granted(&mut self, key: usize, slot: Slot) {
        let request = &mut self.requests[key];
        request.slot_bytes = slot.len();
        let (name, is_write) = (request.key, matches!(request.work, Work::Write(..)));
        if let Some(connection) = request.connection {
            let Connection { slot_bytes, share, .. } = &mut self.connections[connection];
            *slot_bytes += slot.len();
            if share.begins_to_hold() {
                self.holding.push(connection);
            }
        }
        self.export_holds(key);
        if is_write {
            self.enter(key, State::Fetching);
            self.transport.fetch(&mut self.reactor, name, slot, 0);
        } else {
            self.execute(key, Some(slot));
        }
    }

    pub(super) fn fetched(&mut self, name: RequestKey, range: SlotRange) {
        let Some(connection) = self.connection(name.connection) else { return };
        let Some(key) = self.request_by_id(connection, name.id) else { return };
        if self.requests[key].is_cancelled {
            self.answer(key, cancelled());
        } else {
            self.execute(key, Some(range.slot));
        }
    }

    /// Whether the client of a request that is to be started, or to go on, is still there. If not, the
    /// request ends with its connection.
    fn has_client(&mut self, key: usize) -> bool {
        let request = &self.requests[key];
        request.connection.is_some() && self.transport.is_alive(&mut self.reactor, request.key.connection)
    }

    fn execute(&mut self, key: usize, slot: Option<Slot>) {
        // A close has begun already.
        if !matches!(self.requests[key].work, Work::Close) && !self.has_client(key) {
            return;
        }
        self.enter(key, State::Executing);
        match (self.requests[key].work.direct_file().cloned(), slot) {
            (Some(file), Some(slot)) => {
                let admitted = file.device_queue.borrow_mut().admit(key, slot);
                if let Some(slot) = admitted {
                    self.begin_direct(&file, key, slot);
                }
            }
            (_, slot) => self.begin_execution(key, slot),
        }
    }

    fn begin_direct(&mut self, file: &WorkerFile, key: usize, slot: Slot) {
        self.at_devices += 1;
        self.begin_execution(key, Some(slot));
        // The device starts on the first while the kernel takes in the others.
        if self.at_devices.is_multiple_of(TOGETHER) && file.device_queue.borrow().coalesces_completions() {
            self.reactor.submit_now();
        }
    }

    /// On whose behalf a request runs. Nobody's, if its connection has ended.
    fn client(&self, key: usize) -> Weak<Client> {
        let connection = self.requests[key].connection;
        connection.map_or_else(Weak::new, |connection| Arc::downgrade(&self.connections[connection].client))
    }

    fn begin_execution(&mut self, key: usize, slot: Option<Slot>) {
        let client = self.client(key);
        let request = &mut self.requests[key];
        let fd = match &request.work {
            // Its completion comes when the last user of the file has gone.
            Work::Close => return,
            Work::Open(opening) => {
                let (shared, opening) = (Arc::clone(&self.shared), Arc::clone(opening));
                let lanes = shared.exports.all()[opening.export].lanes();
                let lane = if opening.waits_for_lease { lanes.lease } else { lanes.control };
                let call = move || {
                    let opened = opening.open(&shared.exports.all()[opening.export]);
                    Outcome::Opened(opened.map(Box::new))
                };
                request.operation = Some(self.engine.call(key as u64, &client, lane, Box::new(call)));
                return;
            }
            work => work.file().and_then(|file| file.open.fd()),
        };
        match fd {
            Some(fd) => {
                let operation = request.work.first(slot);
                request.operation = self.engine.submit(&mut self.reactor, key as u64, &client, fd, operation);
            }
            None => {
                let size = request.work.file().and_then(|file| file.open.fixed_size()).unwrap_or(0);
                let response = request.work.on_null(size, slot);
                self.answer(key, response);
            }
        }
    }

    /// Has an open wait for the holder of a lease, in a lane where it holds up its kind alone. False if it
    /// did that already, or nobody wants it any more.
    pub(super) fn wait_for_lease(&mut self, key: usize) -> bool {
        if self.requests[key].is_cancelled || !self.has_client(key) {
            return false;
        }
        match &mut self.requests[key].work {
            Work::Open(opening) if !opening.waits_for_lease => Arc::make_mut(opening).waits_for_lease = true,
            _ => return false,
        }
        self.begin_execution(key, None);
        true
    }

    pub(super) fn completed(&mut self, completion: Completion) {
        if completion.key == engine::DETACHED {
            self.closing -= 1;
            return;
        }
        let key = completion.key as usize;
        let request = &mut self.requests[key];
        debug_assert_eq!(request.state, State::Executing);
        if let Outcome::Opened(result) = completion.outcome {
            return self.open_ended(key, result);
        }
        if request.is_cancelled || request.connection.is_none() {
            request.work.stop();
        }
        match request.work.completed(completion) {
            Step::Done(response) => self.ended(key, response),
            Step::Again(_) if !self.has_client(key) => self.ended(key, cancelled()),
            Step::Again(operation) => {
                let client = self.client(key);
                let request = &mut self.requests[key];
                let fd = request.work.submitted_fd();
                request.operation = self.engine.submit(&mut self.reactor, key as u64, &client, fd, operation);
            }
            Step::Blocking(operation) => {
                let client = self.client(key);
                let request = &mut self.requests[key];
                let fd = request.work.submitted_fd();
                request.operation = Some(self.engine.submit_blocking(key as u64, &client, fd, operation));
            }
        }
    }

    /// The last operation of a request has ended.
    fn ended(&mut self, key: usize, response: Response) {
        if let Some(file) = self.requests[key].work.direct_file() {
            self.at_devices -= 1;
            if file.device_queue.borrow_mut().ended() {
                self.reported.push(Rc::clone(file));
            }
        }
        self.answer(key, response);
    }

    /// Gives devices that have reported what was held back for them.
    pub(super) fn feed_devices(&mut self) {
        while let Some(file) = self.reported.pop() {
            file.device_queue.borrow_mut().on_batch_complete();
            loop {
                let due = file.device_queue.borrow().due();
                let Some(key) = due else { break };
                if !self.has_client(key) {
                    drop(self.take_back(key));
                    self.answer(key, cancelled());
                    continue;
                }
                let next = file.device_queue.borrow_mut().next();
                let Some((_, slot)) = next else { break };
                self.begin_direct(&file, key, slot);
            }
        }
    }

    /// Takes back a request that is held back from its device. Gives its memory; None if it is not.
    pub(super) fn take_back(&self, key: usize) -> Option<Slot> {
        let file = self.requests[key].work.direct_file()?;
        file.device_queue.borrow_mut().take_back(key)
    }

    /// A connection's request that is not yet answered, by the client's id.
    pub(super) fn request_by_id(&self, connection: usize, id: u64) -> Option<usize> {
        self.connections[connection].requests.iter().copied().find(|&key| self.requests[key].key.id == id)
    }

    /// The largest slot.
    pub(super) fn slot_bytes_max(&self) -> usize {
        self.arena.slot_bytes_max()
    }

    fn enter(&mut self, key: usize, state: State) {
        let before = std::mem::replace(&mut self.requests[key].state, state);
        self.in_state[before as usize] -= 1;
        self.in_state[state as usize] += 1;
        if before == State::Fetching || state == State::Fetching {
            self.export_fetches(key, state == State::Fetching);
        }
    }

    /// Ends a request that was begun. If its connection has gone, the answer goes nowhere.
    pub(super) fn answer(&mut self, key: usize, response: Response) {
        let request = self.remove_request(key);
        let Some(connection) = request.connection else { return };
        let entry = &mut self.connections[connection];
        let at = entry.requests.iter().position(|&other| other == key);
        at.and_then(|at| entry.requests.remove(at));
        entry.slot_bytes -= request.slot_bytes;
        if self.counts_requests {
            self.uncount_request(connection, &request.work);
        }
        if response.status.is_ok() {
            match request.work {
                Work::Read(..) => self.counters.read_bytes.add(response.result),
                Work::Write(..) => self.counters.written_bytes.add(response.result),
                _ => {}
            }
        }
        let was_cancelled = response.status.errno == libc::ECANCELED;
        self.respond(request.key, response);
        if let Some(cancel_request) = request.cancel_request {
            let response = if was_cancelled {
                success(0)
            } else {
                failure(
                    Status::storage(libc::EALREADY),
                    "It was too late to cancel the request: it has run to its end.",
                )
            };
            self.respond(cancel_request, response);
        }
    }

    /// A request is over, or its connection is.
    #[cold]
    pub(super) fn uncount_request(&self, connection: usize, work: &Work) {
        // A close is no burden: it ends one.
        if !matches!(work, Work::Close) {
            let Connection { session, share, .. } = &self.connections[connection];
            self.sessions[*session].session.end_request(&share.account);
        }
    }

    /// Answers a request that was not begun, or is over.
    pub(super) fn respond(&mut self, name: RequestKey, response: Response) {
        self.counters.answered.add(1);
        if !response.status.is_ok() {
            self.counters.errors.add(1);
        }
        self.transport.respond(&mut self.reactor, name, response);
    }

    /// Cancels a request as far as that goes.
    pub(super) fn cancel(&mut self, connection: usize, key: usize) {
        self.requests[key].is_cancelled = true;
        let request = &self.requests[key];
        match request.state {
            State::NeedSlot => {
                self.connections[connection].waiting.retain(|&other| other != key);
                self.answer(key, cancelled());
            }
            // When its data has come.
            State::Fetching => {}
            State::Executing if self.take_back(key).is_some() => self.answer(key, cancelled()),
            State::Executing => {
                if let Some(operation) = request.operation {
                    self.engine.cancel(&mut self.reactor, key as u64, operation);
                }
            }
        }
    }
}

fn cancelled() -> Response {
    failure(Status::storage(libc::ECANCELED), "The request was cancelled.")
}
