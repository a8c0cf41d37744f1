//! `raio://`: a connection begins over TCP, and moves to a queue pair if both sides can.
//!
//! The TCP connection of one that has moved stays, carrying nothing: its end, which the kernel tells at once
//! when a process dies, is the end of the connection, and the other way round. What this looks like on the
//! wire is in docs/PROTOCOL.md, part 3.

use std::any::Any;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::error::{Class, Error, Status};
use crate::memory::{Arena, Slot};
use crate::message;
use crate::reactor::{Event, Reactor};
use crate::transport::{
    Accepted, ConnectionId, Handover, NotPushed, Passed, Push, RequestKey, Response, ServerCounters,
    ServerEvent, ServerTransport, UpgradeRequest,
};

mod dial;

pub use dial::{Dial, Reached, connect, upgrade};

/// All connections of one worker, over a list of transports. A connection's id names its transport. One that
/// moves from one transport to another has a half in each from then on, and the id of the half that it has
/// moved to.
pub struct Mux {
    transports: Vec<(u8, Box<dyn ServerTransport>)>,
    /// The owner numbers of all, a bit for each.
    owners: u64,
    /// Connections that have moved, each after what its new transport had to report before: the connection
    /// that had its name's index until then may have closed.
    pending: VecDeque<ServerEvent>,
}

impl Mux {
    /// Connections over any of these transports, which have different owner numbers.
    pub fn new(transports: Vec<Box<dyn ServerTransport>>) -> Self {
        let owners = transports.iter().fold(0, |owners, transport| owners | transport.owners());
        let transports = transports.into_iter().map(|transport| (transport.owner(), transport)).collect();
        Self { transports, owners, pending: VecDeque::new() }
    }

    /// Takes over a connection that was accepted; its handshake is still to come.
    pub fn adopt(&mut self, reactor: &mut Reactor, mut incoming: Accepted) -> Result<ConnectionId, Error> {
        for (_, transport) in &mut self.transports {
            match transport.accept(reactor, incoming) {
                Ok(accepted) => return accepted,
                Err(of_another_kind) => incoming = of_another_kind,
            }
        }
        Err(Error::Unsupported("This server was made without the connection's transport. Use TCP.".into()))
    }

    fn find(&self, id: ConnectionId) -> &dyn ServerTransport {
        let found = self.transports.iter().find(|(owner, _)| *owner == id.transport);
        &*found.expect("a connection's transport is one of these").1
    }

    fn find_mut(&mut self, id: ConnectionId) -> &mut dyn ServerTransport {
        let found = self.transports.iter_mut().find(|(owner, _)| *owner == id.transport);
        &mut *found.expect("a connection's transport is one of these").1
    }

    fn all(&self) -> impl Iterator<Item = &dyn ServerTransport> {
        self.transports.iter().map(|(_, transport)| &**transport)
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut Box<dyn ServerTransport>> {
        self.transports.iter_mut().map(|(_, transport)| transport)
    }

    /// Does what the transports have to say to one another.
    fn hand_over(&mut self, reactor: &mut Reactor) {
        loop {
            let handover = self.all_mut().find_map(|transport| transport.next_handover());
            match handover {
                None => return,
                Some(handover) => self.hand(reactor, handover),
            }
        }
    }

    #[cold]
    fn next_pending(&mut self) -> Option<ServerEvent> {
        // What there was of it before it moved comes first.
        if let Some(&ServerEvent::Moved(from, _)) = self.pending.front()
            && let Some(event) = self.find_mut(from).next_event()
        {
            return Some(event);
        }
        self.pending.pop_front()
    }

    #[cold]
    fn hand(&mut self, reactor: &mut Reactor, handover: Handover) {
        match handover {
            Handover::Upgrade(request) => self.upgrade(reactor, &request),
            Handover::Ended { partner, reason, status, text } => {
                let text = message::clipped(&text);
                self.find_mut(partner).partner_ended(reactor, partner, reason, status, text);
            }
        }
    }

    /// Moves a connection to the first other transport that takes it, or says why it stays.
    fn upgrade(&mut self, reactor: &mut Reactor, request: &UpgradeRequest) {
        let from = request.connection;
        let mut taken = Err(Error::Unsupported("the server has no other transport; use TCP".into()));
        for (owner, transport) in &mut self.transports {
            if *owner != from.transport && taken.is_err() {
                self.pending.extend(std::iter::from_fn(|| transport.next_event()));
                taken = transport.take_over(reactor, request);
            }
        }
        match taken {
            Ok((to, ours)) => {
                self.find_mut(from).answer_upgrade(reactor, from, Ok((to, &ours)));
                self.pending.push_back(ServerEvent::Moved(from, to));
            }
            Err(error) => {
                let peer = request.remote.map(tracing::field::display);
                tracing::debug!(peer, name = request.peer.name, "A client stays on TCP: {error}.");
                let status = Status { errno: error.errno(), class: Class::Transport, retryable: false };
                let answer = Err((status, &*format!("{error}.")));
                self.find_mut(from).answer_upgrade(reactor, from, answer);
            }
        }
    }
}

impl ServerTransport for Mux {
    fn owner(&self) -> u8 {
        self.transports.first().map_or(0, |(owner, _)| *owner)
    }

    fn owners(&self) -> u64 {
        self.owners
    }

    fn set_timeouts(&mut self, stall_timeout: Duration, linger: Duration) {
        for (_, transport) in &mut self.transports {
            transport.set_timeouts(stall_timeout, linger);
        }
    }

    fn handle(&mut self, reactor: &mut Reactor, event: Event) {
        let owner = event.token.owner;
        if let Some((_, transport)) = self.transports.iter_mut().find(|(other, _)| *other == owner) {
            transport.handle(reactor, event);
        }
    }

    fn poll_ready(&mut self, arm: bool) -> bool {
        // What a flush has left behind.
        !self.pending.is_empty() || self.all_mut().any(|transport| transport.poll_ready(arm))
    }

    fn process_ready(&mut self, reactor: &mut Reactor) {
        self.all_mut().for_each(|transport| transport.process_ready(reactor));
    }

    fn next_event(&mut self) -> Option<ServerEvent> {
        if self.pending.is_empty() {
            self.all_mut().find_map(|transport| transport.next_event())
        } else {
            self.next_pending()
        }
    }

    fn fetch(&mut self, reactor: &mut Reactor, request: RequestKey, slot: Slot, start: usize) {
        self.find_mut(request.connection).fetch(reactor, request, slot, start);
    }

    fn respond(&mut self, reactor: &mut Reactor, request: RequestKey, response: Response) {
        self.find_mut(request.connection).respond(reactor, request, response);
    }

    fn respond_filled(
        &mut self,
        request: RequestKey,
        len: usize,
        arena: &mut Arena,
        fill: &mut dyn FnMut(&mut [u8]) -> bool,
    ) -> bool {
        self.find_mut(request.connection).respond_filled(request, len, arena, fill)
    }

    fn push(
        &mut self,
        reactor: &mut Reactor,
        connection: ConnectionId,
        push: Push<'_>,
    ) -> Result<(), NotPushed> {
        self.find_mut(connection).push(reactor, connection, push)
    }

    fn flush_early(&mut self, reactor: &mut Reactor) {
        self.all_mut().for_each(|transport| transport.flush_early(reactor));
    }

    fn flush(&mut self, reactor: &mut Reactor) {
        self.hand_over(reactor);
        self.all_mut().for_each(|transport| transport.flush(reactor));
    }

    fn close(&mut self, reactor: &mut Reactor, connection: ConnectionId, status: Status, text: &str) {
        self.find_mut(connection).close(reactor, connection, status, text);
    }

    fn reject(&mut self, reactor: &mut Reactor, connection: ConnectionId, errno: i32, text: &str) {
        self.find_mut(connection).reject(reactor, connection, errno, text);
    }

    fn close_stalled(&mut self, reactor: &mut Reactor, close: bool) {
        self.all_mut().for_each(|transport| transport.close_stalled(reactor, close));
    }

    fn is_alive(&mut self, reactor: &mut Reactor, connection: ConnectionId) -> bool {
        let transport = self.find_mut(connection);
        if !transport.is_alive(reactor, connection) {
            return false;
        }
        // The stream of one that has moved tells when the other process ends.
        match transport.partner(connection) {
            Some(partner) => self.find_mut(partner).is_alive(reactor, partner),
            None => true,
        }
    }

    fn show_life(&mut self, reactor: &mut Reactor, connection: ConnectionId) {
        self.find_mut(connection).show_life(reactor, connection);
    }

    fn unsent_bytes(&self, connection: ConnectionId) -> usize {
        self.find(connection).unsent_bytes(connection)
    }

    fn is_sending(&self) -> bool {
        self.all().any(ServerTransport::is_sending)
    }

    fn connections(&self) -> usize {
        self.all().map(ServerTransport::connections).sum()
    }

    fn is_delivered(&self) -> bool {
        self.all().all(ServerTransport::is_delivered)
    }

    fn hold(&mut self, connection: ConnectionId, held: Arc<dyn Any>) {
        self.find_mut(connection).hold(connection, held);
    }

    fn next_passed(&mut self) -> Option<Passed> {
        self.all_mut().find_map(|transport| transport.next_passed())
    }

    fn socket(&self, connection: ConnectionId) -> Option<Weak<OwnedFd>> {
        self.find(connection).socket(connection)
    }

    fn heap(&self) -> (usize, u64) {
        self.all().map(ServerTransport::heap).fold((0, 0), |(a, b), (c, d)| (a + c, b + d))
    }

    fn has_gated(&self) -> bool {
        self.all().any(ServerTransport::has_gated)
    }

    fn show_life_to_gated(&mut self, reactor: &mut Reactor) {
        self.all_mut().for_each(|transport| transport.show_life_to_gated(reactor));
    }

    fn counters(&self) -> ServerCounters {
        let mut counters = self.all().map(ServerTransport::counters);
        counters.find(|counters| *counters != ServerCounters::default()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Link, QueuePairAddress};
    use crate::server::peer;
    use crate::transport::CloseReason;

    const STREAMS: u8 = 0;
    const QUEUE_PAIRS: u8 = 1;

    fn id(transport: u8, generation: u32) -> ConnectionId {
        ConnectionId { transport, index: 0, generation }
    }

    /// A transport that reports and hands over what it is told to, and takes over whoever asks.
    #[derive(Default)]
    struct Fake {
        owner: u8,
        events: VecDeque<ServerEvent>,
        handovers: VecDeque<Handover>,
        takes_over_as: Option<ConnectionId>,
    }

    impl ServerTransport for Fake {
        fn owner(&self) -> u8 {
            self.owner
        }

        fn set_timeouts(&mut self, _stall_timeout: Duration, _linger: Duration) {}

        fn handle(&mut self, _: &mut Reactor, _: Event) {}

        fn next_event(&mut self) -> Option<ServerEvent> {
            self.events.pop_front()
        }

        fn fetch(&mut self, _: &mut Reactor, _: RequestKey, _: Slot, _: usize) {}

        fn respond(&mut self, _: &mut Reactor, _: RequestKey, _: Response) {}

        fn push(&mut self, _: &mut Reactor, _: ConnectionId, _: Push<'_>) -> Result<(), NotPushed> {
            Err(NotPushed::Refused)
        }

        fn flush(&mut self, _: &mut Reactor) {}

        fn close(&mut self, _: &mut Reactor, _: ConnectionId, _: Status, _: &str) {}

        fn reject(&mut self, _: &mut Reactor, _: ConnectionId, _: i32, _: &str) {}

        fn close_stalled(&mut self, _: &mut Reactor, _: bool) {}

        fn unsent_bytes(&self, _: ConnectionId) -> usize {
            0
        }

        fn is_sending(&self) -> bool {
            false
        }

        fn connections(&self) -> usize {
            0
        }

        fn next_handover(&mut self) -> Option<Handover> {
            self.handovers.pop_front()
        }

        fn take_over(
            &mut self,
            _: &mut Reactor,
            request: &UpgradeRequest,
        ) -> Result<(ConnectionId, QueuePairAddress), Error> {
            let to = self.takes_over_as.ok_or(Error::Unsupported("it takes none".into()))?;
            Ok((to, request.theirs))
        }
    }

    #[test]
    fn a_connection_that_has_closed_is_reported_before_another_moves_to_its_index() {
        let theirs = QueuePairAddress {
            gid: [0; 16],
            qpn: 1,
            psn: 1,
            peer_psn: 1,
            mtu: 1024,
            lid: 0,
            reads: 1,
            link: Link::Ethernet,
        };
        let request = UpgradeRequest {
            connection: id(STREAMS, 7),
            peer: peer(2),
            theirs,
            held: None,
            local: None,
            remote: None,
        };
        let streams = Fake {
            owner: STREAMS,
            events: [ServerEvent::Closed(id(STREAMS, 6), CloseReason::Finished)].into(),
            handovers: [Handover::Upgrade(Box::new(request))].into(),
            ..Fake::default()
        };
        let queue_pairs = Fake {
            owner: QUEUE_PAIRS,
            events: [ServerEvent::Closed(id(QUEUE_PAIRS, 1), CloseReason::Lost(0))].into(),
            takes_over_as: Some(id(QUEUE_PAIRS, 2)),
            ..Fake::default()
        };
        let mut reactor = Reactor::new(&crate::reactor::Config::default()).unwrap();
        let mut mux = Mux::new(vec![Box::new(streams), Box::new(queue_pairs)]);
        mux.flush(&mut reactor);
        assert!(mux.poll_ready(true), "there is something to report");
        assert!(
            matches!(mux.next_event(), Some(ServerEvent::Closed(closed, _)) if closed == id(QUEUE_PAIRS, 1))
        );
        assert!(matches!(mux.next_event(), Some(ServerEvent::Closed(closed, _)) if closed == id(STREAMS, 6)));
        let moved = mux.next_event();
        assert!(
            matches!(moved, Some(ServerEvent::Moved(from, to))
                if from == id(STREAMS, 7) && to == id(QUEUE_PAIRS, 2)),
            "{moved:?}"
        );
        assert!(mux.next_event().is_none() && !mux.poll_ready(true));
    }
}
