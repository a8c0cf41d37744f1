//! The connections of a worker: those in their handshake, and those that are open.

use std::collections::HashMap;
use std::ops::{Index, IndexMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use raio_transport::Violation;
use raio_transport::transport::{ConnectionId, RequestKey};
use slab::Slab;

use crate::activity::SessionCounters;
use crate::audit::Who;
use crate::channel::Outcomes;
use crate::client::Client;
use crate::limits::{AddressAccount, ConnectionPermit};
use crate::peer::PeerAddress;
use crate::sessions::{ConnectionName, Fence, Member};
use crate::stats::CountedClient;

/// What is known of a connection from the first.
#[derive(Debug)]
pub struct Arrival {
    /// Counts it, until it is gone. The transport has it, too, and for longer: until the socket is closed.
    pub permit: Arc<ConnectionPermit>,
    /// Where its client is, if that is known.
    pub peer: Option<PeerAddress>,
}

/// Whether the requests of a connection may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// They may.
    Settled,
    /// They may; and the first one shows that the client has heard that nothing is known of earlier ones.
    Told,
    /// Not yet: something that came before may still happen.
    Waiting,
    /// No more: it is closing, because its client did something wrong if that is told.
    Closing(Option<Violation>),
}

/// A connection that waits.
#[derive(Debug)]
pub struct Fencing {
    /// For what.
    pub fence: Fence,
    /// Its outcome request, if that has come.
    pub asked: Option<Asked>,
    /// The log has a line about it.
    pub is_logged: bool,
}

/// An outcome request that is not answered.
#[derive(Debug)]
pub struct Asked {
    /// Its name at the transport.
    pub key: RequestKey,
    /// What it asks for.
    pub ids: Box<[u32]>,
    /// When it came ...
    pub at: Instant,
    /// ... and the same, if its latency is measured.
    pub arrived: Option<Instant>,
}

impl Fencing {
    /// Of a connection that has not asked yet.
    pub fn new(fence: Fence) -> Self {
        Self { fence, asked: None, is_logged: false }
    }
}

/// A connection that has finished its handshake.
#[derive(Debug)]
pub struct Connection {
    /// The transport's name for it.
    pub id: ConnectionId,
    /// What was known before.
    pub arrival: Arrival,
    /// Its session's key.
    pub session: usize,
    /// What it is to its session and its channel.
    pub member: Member,
    /// What this worker counts for the session.
    pub counters: Arc<SessionCounters>,
    /// Whether its requests may run.
    pub standing: Standing,
    /// What it waits for.
    pub fencing: Option<Box<Fencing>>,
    /// How its recorded requests have ended, and those of the connections before it. None if it has no
    /// channel, or waits.
    pub outcomes: Option<Outcomes>,
    /// What has become of requests of the connections before it is known.
    pub knows_earlier: bool,
    /// Until then it is served as ever, also if the server ends: it has opened only just.
    pub grace_until: Instant,
    /// A request has come.
    pub has_asked: bool,
    /// How long its channel is kept when it has ended.
    pub linger: Duration,
    /// The most requests that it may have outstanding, one for control messages not counted.
    pub queue_depth: u32,
    /// The feature bits that it was granted.
    pub features: u64,
    /// It is counted in [`crate::placement`].
    pub has_data: bool,
    /// What the client calls itself.
    pub name: String,
    /// Who the client is, for the audit log if there is one.
    pub who: Option<Arc<Who>>,
    /// Counts what it does, for the client that has this key.
    pub counted: Option<Arc<CountedClient>>,
    /// What waits in lanes on its behalf is cancelled once this has gone.
    pub client: Arc<Client>,
}

impl Connection {
    /// Where its client is.
    pub fn peer(&self) -> Option<PeerAddress> {
        self.arrival.peer
    }

    /// What all workers count for its address.
    pub fn account(&self) -> &AddressAccount {
        self.arrival.permit.address()
    }
}

/// See the module documentation. A connection's key is its index here.
#[derive(Debug, Default)]
pub struct Connections {
    /// Those in their handshake, and those that were rejected at its end.
    arriving: HashMap<ConnectionId, Arrival>,
    open: Slab<Connection>,
    /// The keys of those that are open, by their transport and the index in its name for them.
    keys: Vec<Vec<Option<usize>>>,
}

impl Connections {
    /// A connection has arrived.
    pub fn arrive(&mut self, id: ConnectionId, arrival: Arrival) {
        self.arriving.insert(id, arrival);
    }

    /// What is known of a connection that has not opened.
    pub fn arriving(&self, id: ConnectionId) -> Option<&Arrival> {
        self.arriving.get(&id)
    }

    /// Takes out a connection that has not opened: it has ended, or opens now, or goes to another worker.
    pub fn take_arriving(&mut self, id: ConnectionId) -> Option<Arrival> {
        self.arriving.remove(&id)
    }

    /// The key that the next connection will have.
    pub fn next_key(&self) -> usize {
        self.open.vacant_key()
    }

    /// The key of the open connection with this name.
    pub fn named(&self, name: ConnectionName) -> Option<usize> {
        self.open.get(name.key).filter(|found| found.member.name == name).map(|_| name.key)
    }

    /// A connection has opened. Returns its key.
    pub fn open(&mut self, connection: Connection) -> usize {
        let id = connection.id;
        let key = self.open.insert(connection);
        *self.key_mut(id) = Some(key);
        key
    }

    fn key_mut(&mut self, id: ConnectionId) -> &mut Option<usize> {
        let (transport, index) = (usize::from(id.transport), id.index as usize);
        if self.keys.len() <= transport {
            self.keys.resize(transport + 1, Vec::new());
        }
        let keys = &mut self.keys[transport];
        if keys.len() <= index {
            keys.resize(index + 1, None);
        }
        &mut keys[index]
    }

    /// An open connection has moved to another transport, and got another name with that.
    pub fn on_moved(&mut self, from: ConnectionId, to: ConnectionId) {
        if let Some(key) = self.key(from) {
            *self.key_mut(from) = None;
            *self.key_mut(to) = Some(key);
            self.open[key].id = to;
        }
    }

    /// The key of an open connection.
    pub fn key(&self, id: ConnectionId) -> Option<usize> {
        let key = (*self.keys.get(usize::from(id.transport))?.get(id.index as usize)?)?;
        (self.open[key].id == id).then_some(key)
    }

    /// An open connection has ended.
    pub fn close(&mut self, key: usize) -> Connection {
        let connection = self.open.remove(key);
        *self.key_mut(connection.id) = None;
        connection
    }

    /// Those that are open.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Connection)> {
        self.open.iter()
    }

    /// How many there are, those in their handshake included.
    #[cfg(any(test, feature = "test-worker"))]
    pub fn len(&self) -> usize {
        self.arriving.len() + self.open.len()
    }

    /// Whether none is open.
    pub fn none_is_open(&self) -> bool {
        self.open.is_empty()
    }
}

impl Index<usize> for Connections {
    type Output = Connection;

    fn index(&self, key: usize) -> &Connection {
        &self.open[key]
    }
}

impl IndexMut<usize> for Connections {
    fn index_mut(&mut self, key: usize) -> &mut Connection {
        &mut self.open[key]
    }
}

#[cfg(test)]
mod tests {
    use raio_transport::handshake::Identity;
    use raio_transport::message::SessionId;

    use super::*;
    use crate::limits::{Caps, Limits, Room};
    use crate::session::Session;
    use crate::sessions::ChannelKey;

    fn id(index: u32, generation: u32) -> ConnectionId {
        ConnectionId { transport: 0, index, generation }
    }

    /// A connection that arrives. Its permit is the second reference to what is returned.
    fn arrive(connections: &mut Connections, id: ConnectionId) -> Arc<ConnectionPermit> {
        let room = Room { descriptors: 64, files: 16, bytes: 1 << 20, workers: 1 };
        let permit = Arc::new(Limits::new(room, Caps::default(), Caps::default()).connect(None).unwrap());
        connections.arrive(id, Arrival { permit: Arc::clone(&permit), peer: None });
        permit
    }

    fn member(serial: u64) -> Member {
        let room = Room { descriptors: 64, files: 16, bytes: 1 << 20, workers: 1 };
        let limits = Limits::new(room, Caps::default(), Caps::default());
        let session = Session::new(SessionId([1; 16]), Identity::Anonymous, None, limits);
        let name = ConnectionName { worker: 0, key: serial as usize, serial };
        Member { session: Arc::new(session), channel: ChannelKey::Unnumbered(name), name }
    }

    fn open(connections: &mut Connections, id: ConnectionId) -> usize {
        let arrival = connections.take_arriving(id).expect("it has arrived");
        let key = connections.next_key();
        connections.open(Connection {
            id,
            arrival,
            session: 0,
            member: member(key as u64),
            counters: Arc::default(),
            standing: Standing::Settled,
            fencing: None,
            outcomes: None,
            knows_earlier: true,
            grace_until: Instant::now(),
            has_asked: false,
            linger: Duration::ZERO,
            queue_depth: 128,
            features: 0,
            has_data: true,
            name: String::new(),
            who: None,
            counted: None,
            client: Client::new(None),
        })
    }

    #[test]
    fn a_connection_is_known_by_one_name_from_its_arrival_to_its_end() {
        let mut connections = Connections::default();
        let permit = arrive(&mut connections, id(5, 1));
        assert!(connections.arriving(id(5, 1)).is_some());
        assert_eq!(connections.key(id(5, 1)), None, "it has not opened");
        let key = open(&mut connections, id(5, 1));
        assert!(connections.arriving(id(5, 1)).is_none());
        assert_eq!(connections.key(id(5, 1)), Some(key));
        assert_eq!(connections[key].id, id(5, 1));
        assert_eq!(Arc::strong_count(&permit), 2);
        drop(connections.close(key));
        assert_eq!(Arc::strong_count(&permit), 1, "its permit is free");
        assert!(connections.none_is_open() && connections.key(id(5, 1)).is_none());
    }

    #[test]
    fn a_name_whose_index_is_used_again_means_nobody() {
        let mut connections = Connections::default();
        arrive(&mut connections, id(0, 1));
        let key = open(&mut connections, id(0, 1));
        connections.close(key);
        arrive(&mut connections, id(0, 2));
        let key = open(&mut connections, id(0, 2));
        assert_eq!((connections.key(id(0, 1)), connections.key(id(0, 2))), (None, Some(key)));
        assert_eq!(connections.key(id(17, 1)), None);
    }

    #[test]
    fn one_that_moves_to_another_transport_has_another_name_and_the_same_key() {
        let mut connections = Connections::default();
        arrive(&mut connections, id(5, 1));
        let key = open(&mut connections, id(5, 1));
        let moved = ConnectionId { transport: 1, index: 0, generation: 7 };
        connections.on_moved(id(5, 1), moved);
        assert_eq!((connections.key(id(5, 1)), connections.key(moved)), (None, Some(key)));
        assert_eq!(connections.close(key).id, moved);
        assert!(connections.key(moved).is_none());
    }

    #[test]
    fn one_that_never_opens_leaves_nothing_behind() {
        let mut connections = Connections::default();
        let permit = arrive(&mut connections, id(3, 1));
        assert!(connections.take_arriving(id(3, 2)).is_none());
        drop(connections.take_arriving(id(3, 1)));
        assert_eq!(Arc::strong_count(&permit), 1);
        assert!(connections.iter().next().is_none());
    }
}
