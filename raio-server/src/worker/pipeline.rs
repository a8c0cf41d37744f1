//! Moves requests along, from their arrival to their answer: see [`crate::request`] for the states.

use std::any::Any;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use raio_transport::memory::Slot;
use raio_transport::protocol::{Direction, Opcode};
use raio_transport::trace::Phase;
use raio_transport::transport::{RequestKey, Response, ServerTransport, SlotRange};
use raio_transport::{Status, mux};

use super::admission::{Demand, StallCheck};
use super::command::EXPORT_CHANGED;
use super::connections::Connections;
use super::requests::Cancel;
use super::throttled::Waiting;
use super::{SlowEnd, TIMER, Worker};
use crate::activity::SessionCounters;
use crate::client::Client;
use crate::engine::{self, Completion, Lane, Operation, Outcome};
use crate::names::PathEnd;
use crate::open::{OpenResult, Opening};
use crate::request::{
    Copying, Request, State, Step, Work, WorkerFile, cancelled, failure, shutting_down, success,
};
use crate::tenure::Use;
use crate::timeline::Stage;
use crate::tuning::statistics::MEASURED_MAX;
use crate::volume::Context;

impl Worker {
    /// Begins a request. Returns its key.
    pub(super) fn begin(&mut self, connection: usize, key: RequestKey, opcode: Opcode, work: Work) -> usize {
        // If there is no other export its requests may have all.
        let export = if self.shared.exports.are_several() { work.hanging_export() } else { None };
        let arrived = self.arrived(opcode);
        let is_limited = work.flow().is_some();
        let now = self.reactor.clock().now();
        let request = self.requests.begin(connection, (key, opcode, arrived), now, work, export);
        self.connections[connection].counters.begun();
        if !is_limited || !self.throttle(request) {
            self.proceed(request);
        }
        request
    }

    /// Has a request execute, unless it waits for memory, or for what others have left behind.
    fn proceed(&mut self, request: usize) {
        if self.is_held_back(&self.requests[request].work) {
            self.hold(request, None);
        } else {
            self.demand(request);
        }
    }

    /// Has a request wait if it goes beyond a rate. Whether it does.
    #[cold]
    fn throttle(&mut self, request: usize) -> bool {
        let now = self.reactor.clock().now();
        let (Waiting { whose, .. }, until) = loop {
            let work = &self.requests[request].work;
            let Some(flow) = work.flow() else { return false };
            match self.throttled.wait(flow, request, work.data_len(), now) {
                Some(waits) => break waits,
                None if self.requests[request].work.charged() => {}
                None => return false,
            }
        };
        // It may have executed: the next piece waits.
        self.requests.enter(request, Stage::Throttled, now);
        self.counters.throttled(whose, self.requests[request].work.export());
        self.promise_life_sign();
        self.await_throttled(until);
        self.trace(self.requests[request].key, Phase::Point, "throttled", 0);
        true
    }

    /// Sets a timer for requests that wait because of a rate.
    fn await_throttled(&mut self, at: Instant) {
        if self.throttled_until.is_none_or(|earliest| at < earliest) {
            self.throttled_until = Some(at);
            self.reactor.timer(at, TIMER);
        }
    }

    /// Begins those of the requests that wait because of a rate whose time has come.
    #[inline]
    pub(super) fn begin_throttled(&mut self) {
        if !self.throttled.is_empty() {
            self.begin_due();
        }
    }

    #[cold]
    fn begin_due(&mut self) {
        let now = self.reactor.clock().now();
        if self.throttled_until.take_if(|at| *at <= now).is_none() {
            return;
        }
        let (begun, next) = self.throttled.begin(now);
        for Waiting { request, since, .. } in begun {
            self.is_busy = true;
            self.counters.throttled_time(self.requests[request].work.export(), now - since);
            // A copy may have to wait for the rate of the other file, too.
            if !self.requests[request].work.charged() || !self.throttle(request) {
                self.proceed(request);
            }
        }
        if let Some(at) = next {
            self.await_throttled(at);
        }
    }

    /// The server shuts down, and does not carry out what still waits because of a rate.
    #[cold]
    pub(super) fn reject_throttled(&mut self) {
        for key in self.throttled.take_all() {
            let request = &self.requests[key];
            if let Some(response) = request.work.partly_done() {
                self.answer(key, response);
                continue;
            }
            let (name, opcode, arrived) = (request.key, request.opcode, request.arrived);
            if let Some(connection) = request.connection {
                self.connections[connection].counters.ended();
                if self.counts_requests {
                    self.uncount_request(connection, &request.work);
                }
            }
            self.end_request(key);
            self.respond(name, opcode, arrived, shutting_down());
        }
    }

    /// Goes on with a request that counts for its rates piece by piece.
    fn next_piece(&mut self, key: usize) {
        // A server that stops does not wait for what can go on at the next one.
        if self.drain.is_some() {
            let response = self.requests[key].work.partly_done().unwrap_or_else(shutting_down);
            return self.answer(key, response);
        }
        if self.requests[key].work.flow().is_none() || !self.throttle(key) {
            let operation = self.requests[key].work.first(None);
            self.submit(key, operation, false);
        }
    }

    /// Takes out a request that is held back, or waits because of a rate. False if it is neither.
    pub(super) fn take_waiting(&mut self, request: usize) -> bool {
        let flow = self.requests[request].work.flow();
        flow.is_some_and(|flow| self.throttled.take(flow, request)) || self.take_held(request)
    }

    /// Has a request execute, or get or wait for the memory that it needs.
    pub(super) fn demand(&mut self, request: usize) {
        let Request { connection, key, work, export, .. } = &self.requests[request];
        let Some(connection) = *connection else { return };
        let (key, demand) = (*key, Demand { connection, bytes: work.slot_len(), export: *export });
        if demand.bytes == 0 {
            return self.execute(request, None);
        }
        let unsent = &unsent_bytes(&self.transport, &self.connections);
        if let Some(slot) = self.admission.admit(&demand, &mut self.arena, unsent) {
            self.admitted(request, slot);
        } else {
            self.counters.slot_waits.add(1);
            self.admission.wait(request, demand);
            // Before it may have waited for something else.
            let now = self.reactor.clock().now();
            self.requests[request].timeline.enter(Stage::NeedSlot, now);
            self.promise_life_sign();
            self.trace(key, Phase::Point, "need_slot", 0);
        }
    }

    /// The time, if a request that has come is measured.
    pub(super) fn arrived(&mut self, opcode: Opcode) -> Option<Instant> {
        self.latencies.measures(opcode).then(|| self.reactor.clock().now())
    }

    /// Takes out a request that is over, and what it has on the accounts.
    pub(super) fn end_request(&mut self, key: usize) {
        let request = &self.requests[key];
        if request.state == State::Fetching {
            self.admission.set_fetching(request.export, false);
        }
        self.admission.release(request.connection, request.export, request.slot_bytes);
        self.requests.end(key);
    }

    /// Gives memory to requests that wait for it.
    pub(super) fn admit(&mut self) {
        loop {
            let unsent = &unsent_bytes(&self.transport, &self.connections);
            let Some((request, slot)) = self.admission.next(&mut self.arena, unsent) else { return };
            self.is_busy = true;
            self.admitted(request, slot);
        }
    }

    /// Somebody waits: [`Worker::show_life`] is due twice in the time after which a client that hears nothing
    /// would ask.
    pub(super) fn promise_life_sign(&mut self) {
        if !self.admission.has_life_sign()
            && let Some(at) =
                self.admission.arm_life_sign(self.reactor.clock().now(), self.shared.policy.keepalive / 2)
        {
            self.reactor.timer(at, TIMER);
        }
    }

    /// Shows clients whose requests, or messages, wait for memory that the server lives: it may not get to
    /// their pings.
    pub(super) fn show_life(&mut self) {
        if !self.admission.has_life_sign() || !self.admission.take_life_sign(self.reactor.clock().now()) {
            return;
        }
        let held = self.held.iter().map(|&(request, _)| request).chain(self.throttled.requests());
        let held = held.filter_map(|request| self.requests[request].connection);
        for connection in self.admission.waiting().chain(held) {
            self.transport.show_life(&mut self.reactor, self.connections[connection].id);
        }
        self.transport.show_life_to_gated(&mut self.reactor);
        let is_any_held = !self.held.is_empty() || !self.throttled.is_empty();
        if self.admission.waiting().next().is_some() || is_any_held {
            self.promise_life_sign();
        }
    }

    /// Closes connections that hold memory and make no progress, if others have been waiting for it for the
    /// stall timeout.
    pub(super) fn evict_stalled(&mut self) {
        let timeout = self.settings.stall_timeout;
        if self.admission.may_be_stalled()
            && let Some(StallCheck { close, next }) =
                self.admission.check_stalled(self.reactor.clock().read(), timeout)
        {
            self.transport.close_stalled(&mut self.reactor, close);
            self.reactor.timer(next, TIMER);
        }
    }

    fn admitted(&mut self, key: usize, slot: Slot) {
        let request = &mut self.requests[key];
        request.slot_bytes = slot.len();
        let (name, is_sent_data) = (request.key, request.work.is_sent_data());
        if is_sent_data {
            self.enter(key, Stage::Fetching);
            self.transport.fetch(&mut self.reactor, name, slot, 0);
        } else {
            self.execute(key, Some(slot));
        }
    }

    pub(super) fn fetched(&mut self, name: RequestKey, range: SlotRange) {
        let Some(connection) = self.connections.key(name.connection) else { return };
        let Some(key) = self.requests.by_id(connection, name.id) else { return };
        if self.requests[key].is_cancelled {
            self.answer(key, cancelled());
        } else {
            self.execute(key, Some(range.slot));
        }
    }

    /// The data of a request is not what its client has sent.
    #[cold]
    pub(super) fn damaged(&mut self, name: RequestKey) {
        self.counters.checksum_errors.add(1);
        let Some(connection) = self.connections.key(name.connection) else { return };
        let Some(key) = self.requests.by_id(connection, name.id) else { return };
        let text = "The data arrived with another checksum than it was sent with.";
        let is_cancelled = self.requests[key].is_cancelled;
        self.answer(key, if is_cancelled { cancelled() } else { failure(Status::DAMAGED, text) });
    }

    /// Whether the client of a request that is to be started, or to go on, is still there. If not, the
    /// request ends with its connection.
    fn has_client(&mut self, key: usize) -> bool {
        let request = &self.requests[key];
        request.connection.is_some() && self.transport.is_alive(&mut self.reactor, request.key.connection)
    }

    pub(super) fn execute(&mut self, key: usize, slot: Option<Slot>) {
        // A close has begun already.
        if !matches!(self.requests[key].work, Work::Close) && !self.has_client(key) {
            return;
        }
        // There may be orphans that were none when it began to wait.
        let work = &self.requests[key].work;
        if self.is_held_back(work) {
            return self.hold(key, slot);
        }
        self.enter(key, Stage::Executing);
        match (self.requests[key].work.direct_file().cloned(), slot) {
            (Some(file), Some(slot)) => {
                if let Some(slot) = self.device_queues.admit(&file, key, slot) {
                    self.begin_direct(&file, key, slot);
                }
            }
            (_, slot) => self.begin_execution(key, slot),
        }
    }

    fn begin_direct(&mut self, file: &WorkerFile, key: usize, slot: Slot) {
        self.begin_execution(key, Some(slot));
        if self.device_queues.should_submit(file) {
            self.reactor.submit_now();
        }
    }

    /// On whose behalf a request runs. Nobody's, if its connection has ended.
    pub(super) fn client(&self, key: usize) -> Weak<Client> {
        let connection = self.requests[key].connection;
        connection.map_or_else(Weak::new, |connection| Arc::downgrade(&self.connections[connection].client))
    }

    fn begin_execution(&mut self, key: usize, slot: Option<Slot>) {
        let work = &self.requests[key].work;
        match work {
            // Its completion comes when the last user of the file has gone.
            Work::Close => {}
            Work::Open(opening) => {
                let opening = Arc::clone(opening);
                self.begin_open(key, opening);
            }
            Work::Path(task) => {
                let task = Arc::clone(task);
                self.begin_path(key, task, slot);
            }
            Work::ListNext(listing, next) => {
                let (listing, is_odd) = (Arc::clone(listing), next.is_odd);
                self.begin_list_next(key, listing, is_odd, slot);
            }
            Work::ListExports(_) => self.list_exports(key, slot),
            work => {
                let operation = work.first(slot);
                self.submit(key, operation, false);
            }
        }
    }

    fn begin_open(&mut self, key: usize, opening: Arc<Opening>) {
        let lanes = opening.at.export.lanes();
        let lane = if opening.waits_for_lease { lanes.lease } else { lanes.control };
        let use_of_export = Use::of(opening.at.export.tenure());
        self.call(key, lane, move || -> OpenResult {
            let export = &opening.at.export;
            let result = if export.tenure().is_over() { Err(export.is_over()) } else { opening.open(export) };
            drop(use_of_export);
            result
        });
    }

    /// Has a thread of the pool make a call for a request, which ends with what that returns.
    pub(super) fn call<T: Any + Send>(
        &mut self,
        key: usize,
        lane: Lane,
        call: impl FnOnce() -> T + Send + 'static,
    ) {
        let client = self.client(key);
        let call = move || -> Box<dyn Any + Send> { Box::new(call()) };
        self.requests[key].operation = Some(self.engine.call(key as u64, &client, lane, Box::new(call)));
    }

    /// Has the volume of a request's file begin an operation.
    fn submit(&mut self, key: usize, operation: Operation, blocking: bool) {
        let client = self.client(key);
        let request = &mut self.requests[key];
        let Some(file) = request.work.file() else { unreachable!("{request:?} is on no file") };
        let volume = &*file.open.volume;
        let context = &mut Context { reactor: &mut self.reactor, engine: &mut *self.engine };
        request.operation = if blocking {
            volume.submit_blocking(context, key as u64, &client, operation)
        } else {
            volume.submit(context, key as u64, &client, operation)
        };
    }

    /// Asks for the operation of a request to end early.
    pub(super) fn cancel_operation(&mut self, key: usize) {
        let request = &self.requests[key];
        let Some(pending) = request.operation else { return };
        let key = key as u64;
        match request.work.file() {
            Some(file) => {
                let context = &mut Context { reactor: &mut self.reactor, engine: &mut *self.engine };
                file.open.volume.cancel(context, key, pending);
            }
            None => self.engine.cancel(&mut self.reactor, key, pending),
        }
    }

    /// Has an open wait for the holder of a lease, in a lane where it holds up its kind alone. False if it
    /// did that already, or nobody wants it any more.
    pub(super) fn wait_for_lease(&mut self, key: usize, room: Option<SlotRange>) -> bool {
        if self.requests[key].is_cancelled || !self.has_client(key) {
            return false;
        }
        match &mut self.requests[key].work {
            Work::Open(opening) if !opening.waits_for_lease => Arc::make_mut(opening).waits_for_lease = true,
            Work::Path(task) if !task.waits_for_lease => Arc::make_mut(task).waits_for_lease = true,
            _ => return false,
        }
        self.begin_execution(key, room.map(|room| room.slot));
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
        if let Outcome::Returned(returned) = completion.outcome {
            return match returned.downcast::<OpenResult>() {
                Ok(result) => self.open_ended(key, *result),
                Err(returned) => match returned.downcast::<PathEnd>() {
                    Ok(end) => self.path_ended(key, *end),
                    Err(_) => unreachable!("only opens and operations on paths make calls"),
                },
            };
        }
        if request.is_cancelled || request.connection.is_none() {
            request.work.stop();
        }
        match request.work.completed(completion) {
            Step::Done(response) => self.ended(key, response),
            Step::Again(_) | Step::Piece if !self.has_client(key) => {
                let response = self.requests[key].work.abandoned();
                self.ended(key, response);
            }
            Step::Again(_) | Step::Piece | Step::Blocking(_) if self.requests[key].is_revoked => {
                let response = self.requests[key].work.abandoned();
                self.ended(key, response);
            }
            Step::Piece => self.next_piece(key),
            Step::Again(operation) => self.submit(key, operation, false),
            Step::Blocking(operation) => self.submit(key, operation, true),
        }
    }

    /// The last operation of a request has ended.
    fn ended(&mut self, key: usize, response: Response) {
        if let Some(file) = self.requests[key].work.direct_file() {
            self.device_queues.ended(file);
        }
        self.answer(key, response);
    }

    /// Gives devices that have reported what was held back for them.
    pub(super) fn feed_devices(&mut self) {
        while let Some(file) = self.device_queues.next_reported() {
            while let Some(key) = self.device_queues.due(&file) {
                if !self.has_client(key) {
                    drop(self.device_queues.take_back(&file, key));
                    self.answer(key, cancelled());
                } else if let Some((key, slot)) = self.device_queues.begin_next(&file) {
                    self.begin_direct(&file, key, slot);
                }
            }
        }
    }

    /// Takes back a request that is held back from its device. Returns its memory; None if it is not.
    pub(super) fn take_back(&self, key: usize) -> Option<Slot> {
        self.device_queues.take_back(self.requests[key].work.direct_file()?, key)
    }

    fn enter(&mut self, key: usize, stage: Stage) {
        let before = self.requests.enter(key, stage, self.reactor.clock().now());
        if self.tracer.is_on() {
            self.trace(self.requests[key].key, Phase::Point, stage.name(), 0);
        }
        if before == State::Fetching || stage == Stage::Fetching {
            self.admission.set_fetching(self.requests[key].export, stage == Stage::Fetching);
        }
    }

    /// Ends a request that was begun. If its connection has gone, the answer goes nowhere.
    pub(super) fn answer(&mut self, key: usize, response: Response) {
        let request = &mut self.requests[key];
        let (name, opcode, arrived) = (request.key, request.opcode, request.arrived);
        let cancel_request = request.cancel_request.take();
        let is_stale = request.is_revoked && response.status.errno == libc::ECANCELED;
        let response = if is_stale && cancel_request.is_none() {
            failure(Status::storage(libc::ESTALE), EXPORT_CHANGED)
        } else {
            response
        };
        let request = &self.requests[key];
        let Some(connection) = request.connection else { return self.orphan_ended(key, &response) };
        if self.counts_requests {
            self.uncount_request(connection, &request.work);
        }
        if request.work.is_recorded() {
            let is_cancelled = request.is_cancelled;
            self.record_outcome(connection, name.id, is_cancelled, &response);
        }
        self.note_if_slow(key, SlowEnd::Answered(response.status.errno), None);
        let request = &self.requests[key];
        self.count_work(Some(connection), opcode, &request.work, response.status, response.result);
        let counters = &self.connections[connection].counters;
        counters.ended();
        if response.status.is_ok() {
            count_bytes(counters, &request.work, response.result);
        }
        let export = request.work.export();
        self.end_request(key);
        let was_cancelled = response.status.errno == libc::ECANCELED;
        self.respond_on((Some(connection), export), name, opcode, arrived, response);
        if let Some(cancel_request) = cancel_request {
            let (cancel_request, arrived) = *cancel_request;
            let response = if was_cancelled {
                success(0)
            } else {
                failure(
                    Status::storage(libc::EALREADY),
                    "It was too late to cancel the request: it has run to its end.",
                )
            };
            self.respond(cancel_request, Opcode::Cancel, arrived, response);
        }
    }

    /// A request is over, or its connection is.
    #[cold]
    pub(super) fn uncount_request(&self, connection: usize, work: &Work) {
        // A close is no burden: it ends one.
        if !matches!(work, Work::Close) {
            let connection = &self.connections[connection];
            self.sessions[connection.session].session.end_request(connection.account());
        }
    }

    /// Answers a request that was not begun, and that no export has counted.
    pub(super) fn respond(
        &mut self,
        name: RequestKey,
        opcode: Opcode,
        arrived: Option<Instant>,
        response: Response,
    ) {
        self.count_for_export(opcode, None, Direction::None, response.status, 0);
        let connection = self.connections.key(name.connection);
        self.respond_on((connection, None), name, opcode, arrived, response);
    }

    /// Answers a request that was counted: of a connection if that is open, on an export if it is on one.
    pub(super) fn respond_on(
        &mut self,
        (connection, export): (Option<usize>, Option<usize>),
        name: RequestKey,
        opcode: Opcode,
        arrived: Option<Instant>,
        response: Response,
    ) {
        self.count_response(opcode, response.status);
        if let Some(arrived) = arrived {
            let now = self.reactor.clock().now();
            self.latencies.answered((opcode, export), arrived, now, &self.counters);
            if let Some(connection) = connection {
                self.measured(connection, now - arrived);
            }
        }
        if let Some(connection) = connection {
            self.connections[connection].counters.answered(response.status.is_ok());
        }
        self.trace(name, Phase::End, opcode.operation().name, response.result);
        self.transport.respond(&mut self.reactor, name, response);
    }

    /// A request was answered whose latency is measured: this long after the iteration that took it in has
    /// begun. If that is this one it is known at its end.
    pub(super) fn measured(&mut self, connection: usize, took: Duration) {
        let counters = &self.connections[connection].counters;
        if !took.is_zero() {
            counters.took(took);
        } else if self.measured.len() < MEASURED_MAX {
            self.measured.push(Arc::clone(counters));
        }
    }

    /// Counts a response, of the fast path or any other.
    pub(super) fn count_response(&self, opcode: Opcode, status: Status) {
        self.counters.answered.add(1);
        if !status.is_ok() {
            self.counters.errors.add(1);
            self.counters.failed(opcode, status.errno);
        }
    }

    /// Counts a request that was carried out, and if it has succeeded the bytes that it has moved: for its
    /// export, and for the client of its connection if that is still there.
    pub(super) fn count_work(
        &self,
        connection: Option<usize>,
        opcode: Opcode,
        work: &Work,
        status: Status,
        bytes: u64,
    ) {
        if let Work::Copy(copy) = work {
            return self.count_copy(connection, copy, status, bytes);
        }
        let direction = work.direction();
        self.count_for_export(opcode, work.export(), direction, status, bytes);
        if let Some(connection) = connection {
            self.count_for_client(connection, direction, status, bytes);
        }
        if let Some(audited) = work.file().and_then(|file| file.open.audited.as_deref())
            && status.is_ok()
        {
            match direction {
                Direction::ToClient => audited.on_read(bytes),
                Direction::ToServer => audited.on_written(bytes),
                Direction::None => {}
            }
        }
    }

    /// The same of a copy: a read of one file, and a write of the other.
    fn count_copy(&self, connection: Option<usize>, copy: &Copying, status: Status, bytes: u64) {
        let (source, destination) = (copy.source(), copy.destination());
        self.count_for_export(Opcode::Copy, Some(source.export), Direction::ToClient, status, bytes);
        self.count_for_export(Opcode::Copy, Some(destination.export), Direction::ToServer, status, bytes);
        if let Some(connection) = connection {
            self.count_for_client(connection, Direction::ToClient, status, bytes);
            self.count_bytes_written(connection, status, bytes);
        }
        if status.is_ok() {
            source.audited.iter().for_each(|audited| audited.on_read(bytes));
            destination.audited.iter().for_each(|audited| audited.on_written(bytes));
        }
    }

    /// Counts a request for the client of its connection.
    #[inline]
    pub(super) fn count_for_client(
        &self,
        connection: usize,
        direction: Direction,
        status: Status,
        bytes: u64,
    ) {
        let Some(client) = &self.connections[connection].counted else { return };
        let client = client.worker(self.index);
        client.requests.add(1);
        match direction {
            Direction::ToClient if status.is_ok() => client.read_bytes.add(bytes),
            Direction::ToServer if status.is_ok() => client.written_bytes.add(bytes),
            _ => {}
        }
    }

    /// Counts what a copy has written besides.
    fn count_bytes_written(&self, connection: usize, status: Status, bytes: u64) {
        if let Some(client) = &self.connections[connection].counted
            && status.is_ok()
        {
            client.worker(self.index).written_bytes.add(bytes);
        }
    }

    /// Counts a request for its export alone.
    pub(super) fn count_for_export(
        &self,
        opcode: Opcode,
        export: Option<usize>,
        direction: Direction,
        status: Status,
        bytes: u64,
    ) {
        let export = self.counters.export(export);
        export.request(opcode);
        match direction {
            _ if !status.is_ok() => export.errors.add(1),
            Direction::ToClient => {
                self.counters.read_bytes.add(bytes);
                export.read_bytes.add(bytes);
            }
            Direction::ToServer => {
                self.counters.written_bytes.add(bytes);
                export.written_bytes.add(bytes);
            }
            Direction::None => {}
        }
    }

    /// Cancels a request as far as that goes.
    pub(super) fn cancel(&mut self, connection: usize, key: usize) {
        match self.requests.cancel(key) {
            _ if self.take_waiting(key) => {
                let response = self.requests[key].work.abandoned();
                self.answer(key, response);
            }
            Cancel::NotBegun => {
                self.admission.cancel(connection, key);
                self.answer(key, cancelled());
            }
            Cancel::WhenFetched => {}
            Cancel::Executing if self.take_back(key).is_some() => self.answer(key, cancelled()),
            Cancel::Executing => self.cancel_operation(key),
        }
    }

    /// Has this worker leave the exports that are over: it closes what it has open of them, and ends the
    /// requests on them as far as that goes.
    #[cold]
    pub(super) fn leave_exports(&mut self) {
        self.sessions.forget_closed();
        self.cached.end_iteration();
        for key in self.requests.revoked() {
            self.requests.revoke(key);
            let Some(connection) = self.requests[key].connection else { continue };
            if self.requests[key].state == State::Fetching {
                // Its data comes when its client sends it. Until then the file is not kept open for it.
                let session = self.connections[connection].session;
                let handle = self.requests[key].work.file().map(|file| file.handle);
                let successor = handle.and_then(|handle| self.sessions.file(session, handle));
                self.requests.give_up_file(key, successor);
            }
            self.cancel(connection, key);
        }
    }
}

/// Counts for a session what a request of it has moved.
fn count_bytes(counters: &SessionCounters, work: &Work, bytes: u64) {
    let is_copy = matches!(work, Work::Copy(_));
    if is_copy || work.direction() == Direction::ToClient {
        counters.read(bytes);
    }
    if is_copy || work.direction() == Direction::ToServer {
        counters.written(bytes);
    }
}

/// How many bytes the unsent responses of a connection hold.
pub(super) fn unsent_bytes<'a>(
    transport: &'a mux::Mux,
    connections: &'a Connections,
) -> impl Fn(usize) -> usize + Copy + 'a {
    |connection| transport.unsent_bytes(connections[connection].id)
}
