//! The requests of a worker that are not yet answered: which there are, where each is, and whose it is.

use std::collections::VecDeque;
use std::ops::{Index, IndexMut};
use std::rc::Rc;
use std::time::Instant;

use raio_transport::protocol::Opcode;
use raio_transport::transport::RequestKey;

use crate::request::{Request, State, Work, WorkerFile};
use crate::timeline::{Stage, Timeline};

/// See the module documentation. A request's key is its index here, which is also its key at the engine.
#[derive(Debug, Default)]
pub struct Requests {
    /// A request stays in its place until it has ended, for it is too large to be moved (a slab would).
    all: Vec<Option<Request>>,
    /// The places that are free.
    free: Vec<usize>,
    /// How many are in each state.
    in_state: [usize; 3],
    /// Those of each connection, by its key, oldest first. Most are answered in order, so looking for one
    /// from the front is short.
    of_connections: Vec<VecDeque<usize>>,
}

/// What is to be done about a request that is to be cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancel {
    /// It waits for memory, and is over.
    NotBegun,
    /// It is over when its data has come.
    WhenFetched,
    /// Its device queue holds it back, or its volume has it: they are to be asked.
    Executing,
}

impl Requests {
    /// A request of a connection has come.
    #[inline]
    pub fn begin(
        &mut self,
        connection: usize,
        (key, opcode, arrived): (RequestKey, Opcode, Option<Instant>),
        now: Instant,
        work: Work,
        export: Option<usize>,
    ) -> usize {
        let request = self.free.pop().unwrap_or_else(|| {
            self.all.push(None);
            self.all.len() - 1
        });
        let place @ None = &mut self.all[request] else { unreachable!("a free place has no request") };
        *place = Some(Request {
            key,
            connection: Some(connection),
            opcode,
            arrived,
            timeline: Timeline::new(now),
            state: State::NeedSlot,
            work,
            slot_bytes: 0,
            export,
            is_cancelled: false,
            is_revoked: false,
            cancel_request: None,
            operation: None,
        });
        self.in_state[State::NeedSlot as usize] += 1;
        if self.of_connections.len() <= connection {
            self.of_connections.resize_with(connection + 1, VecDeque::new);
        }
        self.of_connections[connection].push_back(request);
        request
    }

    /// A request enters a stage, and the state of that. Returns the state that it leaves.
    pub fn enter(&mut self, request: usize, stage: Stage, now: Instant) -> State {
        let state = State::from(stage);
        let request = &mut self[request];
        request.timeline.enter(stage, now);
        let before = std::mem::replace(&mut request.state, state);
        self.in_state[before as usize] -= 1;
        self.in_state[state as usize] += 1;
        before
    }

    /// A request is over.
    pub fn end(&mut self, request: usize) {
        let Request { state, connection, .. } = self[request];
        self.all[request] = None;
        self.free.push(request);
        self.in_state[state as usize] -= 1;
        if let Some(connection) = connection {
            self.forget(connection, request);
        }
    }

    fn forget(&mut self, connection: usize, request: usize) {
        // Usually the first: requests mostly end in order, and a closing connection ends the oldest first.
        let siblings = &mut self.of_connections[connection];
        let at = siblings.iter().position(|&other| other == request);
        at.and_then(|at| siblings.remove(at));
    }

    /// The connection of a request has ended. The engine still has the request, whose answer is for nobody.
    pub fn detach(&mut self, request: usize) {
        if let Some(connection) = self[request].connection.take() {
            self.forget(connection, request);
        }
    }

    /// The oldest request of a connection.
    pub fn oldest(&self, connection: usize) -> Option<usize> {
        self.of(connection).next()
    }

    /// A connection's requests, oldest first.
    pub fn of(&self, connection: usize) -> impl DoubleEndedIterator<Item = usize> + '_ {
        self.of_connections.get(connection).into_iter().flatten().copied()
    }

    /// A connection's request by the client's id. Looks at the newest first: over TCP that is the one whose
    /// data arrives.
    pub fn by_id(&self, connection: usize, id: u64) -> Option<usize> {
        self.of(connection).rfind(|&request| self[request].key.id == id)
    }

    /// A request is to be cancelled: it is not begun, and nothing more is begun for it.
    pub fn cancel(&mut self, request: usize) -> Cancel {
        let request = &mut self[request];
        request.is_cancelled = true;
        match request.state {
            State::NeedSlot => Cancel::NotBegun,
            State::Fetching => Cancel::WhenFetched,
            State::Executing => Cancel::Executing,
        }
    }

    /// All of them, with their keys.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Request)> {
        self.all.iter().enumerate().filter_map(|(key, request)| Some((key, request.as_ref()?)))
    }

    /// The export of a request is over.
    pub fn revoke(&mut self, request: usize) {
        self[request].is_revoked = true;
    }

    /// A write whose data is still to come has this in the place of its file.
    pub fn give_up_file(&mut self, request: usize, successor: Option<Rc<WorkerFile>>) {
        if let (Work::Write(file, _), Some(successor)) = (&mut self[request].work, successor) {
            *file = successor;
        }
    }

    /// Those that are of exports which are over, oldest first for each connection.
    pub fn revoked(&self) -> Vec<usize> {
        let is_revoked = |request: &Request| !request.is_revoked && request.work.is_revoked();
        let all = self.all.iter().enumerate();
        all.filter(|(_, request)| request.as_ref().is_some_and(is_revoked)).map(|(key, _)| key).collect()
    }

    /// How many are in a state.
    pub fn in_state(&self, state: State) -> usize {
        self.in_state[state as usize]
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.all.len() == self.free.len()
    }

    /// How many there are.
    #[cfg(any(test, feature = "test-worker"))]
    pub fn len(&self) -> usize {
        self.all.len() - self.free.len()
    }
}

impl Index<usize> for Requests {
    type Output = Request;

    fn index(&self, request: usize) -> &Request {
        self.all[request].as_ref().expect("a request is looked for by the key that it has")
    }
}

impl IndexMut<usize> for Requests {
    fn index_mut(&mut self, request: usize) -> &mut Request {
        self.all[request].as_mut().expect("a request is looked for by the key that it has")
    }
}

#[cfg(test)]
mod tests {
    use raio_transport::transport::ConnectionId;

    use super::*;

    fn key(id: u64) -> RequestKey {
        RequestKey { connection: ConnectionId { transport: 0, index: 0, generation: 0 }, id }
    }

    fn begin(requests: &mut Requests, connection: usize, id: u64) -> usize {
        requests.begin(connection, (key(id), Opcode::Close, None), Instant::now(), Work::Close, None)
    }

    fn in_states(requests: &Requests) -> [usize; 3] {
        [State::NeedSlot, State::Fetching, State::Executing].map(|state| requests.in_state(state))
    }

    #[test]
    fn each_is_counted_in_the_state_that_it_is_in() {
        let mut requests = Requests::default();
        let [write, read, other] = [1, 2, 3].map(|id| begin(&mut requests, 0, id));
        assert_eq!(in_states(&requests), [3, 0, 0]);
        assert_eq!(requests.enter(write, Stage::Fetching, Instant::now()), State::NeedSlot);
        assert_eq!(requests.enter(read, Stage::Executing, Instant::now()), State::NeedSlot);
        assert_eq!(in_states(&requests), [1, 1, 1]);
        assert_eq!(requests.enter(write, Stage::Executing, Instant::now()), State::Fetching);
        for request in [write, read, other] {
            requests.end(request);
        }
        assert_eq!(in_states(&requests), [0; 3]);
        assert!(requests.is_empty());
    }

    #[test]
    fn a_clients_id_finds_its_own_request_alone() {
        let mut requests = Requests::default();
        let first = begin(&mut requests, 0, 7);
        let others = begin(&mut requests, 3, 7);
        assert_eq!((requests.by_id(0, 7), requests.by_id(3, 7)), (Some(first), Some(others)));
        assert_eq!((requests.by_id(0, 8), requests.by_id(1, 7), requests.by_id(9, 7)), (None, None, None));
        requests.end(first);
        assert_eq!((requests.by_id(0, 7), requests.by_id(3, 7)), (None, Some(others)));
    }

    #[test]
    fn a_connections_requests_are_in_the_order_in_which_they_came() {
        let mut requests = Requests::default();
        let all: Vec<_> = (0..5).map(|id| begin(&mut requests, 2, id)).collect();
        requests.end(all[0]);
        requests.end(all[3]);
        assert_eq!(requests.of(2).collect::<Vec<_>>(), [all[1], all[2], all[4]]);
        assert_eq!(requests.oldest(2), Some(all[1]));
        assert_eq!(requests.oldest(0), None);
    }

    #[test]
    fn a_request_outlives_its_connection_and_is_none_of_the_next() {
        let mut requests = Requests::default();
        let request = begin(&mut requests, 0, 1);
        requests.enter(request, Stage::Executing, Instant::now());
        requests.detach(request);
        assert_eq!(requests.oldest(0), None);
        let next = begin(&mut requests, 0, 1);
        assert_eq!(requests.by_id(0, 1), Some(next));
        requests.end(request);
        assert_eq!(requests.of(0).collect::<Vec<_>>(), [next]);
    }

    #[test]
    fn how_a_request_is_cancelled_depends_on_where_it_is() {
        let mut requests = Requests::default();
        let request = begin(&mut requests, 0, 1);
        assert!(!requests[request].is_cancelled);
        assert_eq!(requests.cancel(request), Cancel::NotBegun);
        assert!(requests[request].is_cancelled);
        requests.enter(request, Stage::Fetching, Instant::now());
        assert_eq!(requests.cancel(request), Cancel::WhenFetched);
        requests.enter(request, Stage::Executing, Instant::now());
        assert_eq!(requests.cancel(request), Cancel::Executing);
    }
}
