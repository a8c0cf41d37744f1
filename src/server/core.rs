//! What a server does with a connection on every transport: phases, credits, ids, limits, deadlines.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::InFlight;
use crate::error::{Status, Violation};
use crate::handshake::{Peer, Policy};
use crate::message::{self, Kind, Limits, Message};
use crate::push::{NotPushed, OneWayFlow, ServerRequests};
use crate::reactor::LoopClock;
use crate::trace::Clock;
use crate::transport::{CloseReason, ConnectionId, Push, RequestKey, ServerEvent, SlotRange};
use crate::tuning::{KEEPALIVES_MISSED_MAX, LINGER};

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The hello has not come, or not all of it.
    Handshake,
    /// Requests may come.
    Open,
    /// Over, and reported as closed: its goaway or rejection is on the way.
    Lingering,
    /// Over: nothing is sent or received any more.
    Dead,
}

/// What is due with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// Nothing: ask again at [`ConnectionCore::deadline`].
    Nothing,
    /// The peer has not done in time what it must: the connection fails.
    Fail(Violation),
    /// It has lingered for long enough.
    Drop,
}

/// What a message that is no request calls for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Control {
    /// Answer with a pong of this id: [`ConnectionCore::encode_pong`].
    Pong(u64),
    /// A pong, which this side has not asked for.
    Ignore,
    /// The peer has closed the connection.
    Closed(CloseReason),
}

/// One connection, as the protocol sees it. `R` is what a transport keeps of a request in flight.
#[derive(Debug)]
pub(crate) struct ConnectionCore<R> {
    pub id: ConnectionId,
    phase: Phase,
    limits: Limits,
    /// What the times in pongs are read from.
    clock: Clock,
    /// Its pongs have them.
    pong_time: bool,
    /// It is of a channel, which ends with the peer's goaway.
    has_channel: bool,
    /// The most requests in flight.
    credits: usize,
    pub in_flight: InFlight<R>,
    one_way: OneWayFlow,
    requests: ServerRequests,
    /// The most messages that it may have to take in: [`crate::handshake::Grant::messages_max`].
    messages_max: usize,
    /// How often the peer promised to send something; zero: it did not.
    keepalive: Duration,
    /// Something has come since the last such interval began.
    is_heard: bool,
    /// So many such intervals in a row have passed in silence.
    missed: u8,
    deadline: Option<Instant>,
}

impl<R> ConnectionCore<R> {
    /// A connection whose handshake is still to come.
    pub fn new(id: ConnectionId, policy: &Policy, clock: &LoopClock) -> Self {
        Self {
            id,
            phase: Phase::Handshake,
            limits: Limits { crc: false, request_crc: false, data_bytes_max: 0, pong_time: false },
            clock: policy.clock,
            pong_time: false,
            has_channel: false,
            credits: 0,
            in_flight: InFlight::default(),
            one_way: OneWayFlow::default(),
            requests: ServerRequests::default(),
            messages_max: 0,
            keepalive: Duration::ZERO,
            is_heard: false,
            missed: 0,
            deadline: Some(clock.read() + policy.handshake_timeout),
        }
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    pub fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// What the peer may send.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    pub fn crc(&self) -> bool {
        self.limits.crc
    }

    /// The event that the data of a request has arrived, of which the client has sent this checksum if any.
    pub fn fetched(&self, id: u64, range: SlotRange, sent: Option<u32>) -> ServerEvent {
        let key = RequestKey { connection: self.id, id };
        if sent.is_some_and(|sent| sent != message::data_crc(range.bytes())) {
            ServerEvent::Damaged(key, range)
        } else {
            ServerEvent::Fetched(key, range)
        }
    }

    /// The most requests in flight.
    pub fn credits(&self) -> usize {
        self.credits
    }

    /// The handshake is over: this is granted.
    pub fn open(&mut self, peer: &Peer, clock: &LoopClock) {
        self.phase = Phase::Open;
        self.limits = Limits { pong_time: false, ..peer.grant.limits() };
        self.pong_time = peer.grant.pong_time();
        self.has_channel = peer.channel.is_some();
        self.credits = peer.grant.credits() as usize;
        self.one_way = OneWayFlow::of_server(&peer.grant.push);
        self.requests = ServerRequests::new(&peer.grant.push);
        self.messages_max = peer.grant.messages_max();
        self.keepalive = peer.keepalive;
        self.is_heard = true;
        self.deadline = (!peer.keepalive.is_zero()).then(|| clock.now() + peer.keepalive);
    }

    /// The peer is not expected to say anything any more, as it has promised: it does so elsewhere.
    pub fn release_keepalive(&mut self) {
        self.keepalive = Duration::ZERO;
        self.deadline = None;
    }

    /// Something has come from the peer.
    pub fn on_receive(&mut self) {
        self.is_heard = true;
    }

    /// Takes in a request with no more than what was granted, and an id of its own.
    pub fn admit(&mut self, id: u64, request: R) -> Result<(), Violation> {
        if self.in_flight.len() >= self.credits {
            return Err(Violation::Credits);
        }
        if self.in_flight.contains(id) {
            return Err(Violation::RequestId);
        }
        self.in_flight.insert(id, request);
        Ok(())
    }

    /// The most messages that either side has sent and the other has not taken in.
    pub fn messages_max(&self) -> usize {
        self.messages_max
    }

    /// How many one-way messages of the peer's the program has not released.
    pub fn one_way_held(&self) -> usize {
        self.one_way.held()
    }

    /// Appends an unsolicited message to `out`, if there is something to say. `events` are those that wait to
    /// be handed out.
    pub fn push(
        &mut self,
        push: Push<'_>,
        events: &mut VecDeque<ServerEvent>,
        out: &mut Vec<u8>,
    ) -> Result<(), NotPushed> {
        if !self.is_open() {
            return Err(NotPushed::Closed);
        }
        let crc = self.limits.crc;
        match push {
            Push::OneWay(message) => self.one_way.send(message, crc, out)?,
            Push::Release => self.one_way.release(crc, out),
            Push::Refuse => {
                let id = self.id;
                events.retain(|event| !matches!(event, ServerEvent::OneWay(from, _) if *from == id));
                self.one_way.refuse(crc, out);
            }
            Push::Request(tag, body) => self.requests.send(tag, body, crc, out)?,
        }
        Ok(())
    }

    /// Takes in a one-way message, a receipt, or the answer to a request of this side's. Returns false if it
    /// is none of them.
    pub fn on_push(
        &mut self,
        message: &Message<'_>,
        events: &mut VecDeque<ServerEvent>,
    ) -> Result<bool, Violation> {
        let id = self.id;
        match message {
            Message::OneWay(message, wants_receipt) => {
                if self.one_way.on_message(*wants_receipt)? {
                    events.push_back(ServerEvent::OneWay(id, (*message).into()));
                }
            }
            Message::Receipt(receipt) => {
                let receipted = |tag| events.push_back(ServerEvent::Receipt(id, tag));
                if self.one_way.on_receipt(*receipt, receipted)? {
                    events.push_back(ServerEvent::Refused(id));
                }
            }
            Message::Response(response, body) => {
                let answer = self.requests.on_response(response, body)?;
                events.push_back(ServerEvent::Answered(id, answer));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What a message that is neither a request nor [`ConnectionCore::on_push`]'s calls for.
    pub fn on_control(&self, message: &Message<'_>) -> Result<Control, Violation> {
        match message {
            Message::Ping(id) => Ok(Control::Pong(*id)),
            Message::Pong(..) => Ok(Control::Ignore),
            Message::Goaway(status, _) if self.is_open() && self.has_channel && status.is_ok() => {
                Ok(Control::Closed(CloseReason::Goaway))
            }
            Message::Goaway(status, _) => Ok(Control::Closed(self.ended_by(*status))),
            Message::Request(..) => Err(Violation::Kind(Kind::Request as u8)),
            Message::QueuePair(..) => Err(Violation::Kind(Kind::QueuePair as u8)),
            Message::Response(..) | Message::OneWay(..) | Message::Receipt(_) => {
                unreachable!("the callers take these in")
            }
        }
    }

    /// Appends the answer to a ping that is being taken in. The clock is read: the time must lie between the
    /// ping's arrival and the pong's departure.
    pub fn encode_pong(&self, id: u64, clock: &LoopClock, out: &mut Vec<u8>) {
        let time_ns = if self.pong_time { self.clock.realtime_ns(clock.read()) } else { 0 };
        message::encode_pong(id, time_ns, self.limits.crc, out);
    }

    /// Why it has ended when its peer says so with this status.
    pub fn ended_by(&self, status: Status) -> CloseReason {
        let is_finished = self.is_open() && self.in_flight.is_empty() && status.is_ok();
        if is_finished { CloseReason::Finished } else { CloseReason::Lost(status.errno) }
    }

    /// When something is due: [`ConnectionCore::on_timer`].
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// What is due. A peer is not heard while it is not read from.
    pub fn on_timer(&mut self, clock: &LoopClock, is_read_from: bool) -> Due {
        let now = clock.now();
        if self.deadline.is_none_or(|at| now < at) {
            return Due::Nothing;
        }
        self.deadline = None;
        match self.phase {
            Phase::Handshake => Due::Fail(Violation::HandshakeTimeout),
            Phase::Lingering => Due::Drop,
            Phase::Dead => Due::Nothing,
            Phase::Open => {
                let is_silent = is_read_from && !std::mem::take(&mut self.is_heard);
                self.missed = if is_silent { self.missed + 1 } else { 0 };
                if self.missed >= KEEPALIVES_MISSED_MAX {
                    return Due::Fail(Violation::Silent);
                }
                self.deadline = Some(now + self.keepalive);
                Due::Nothing
            }
        }
    }

    /// The last words to the peer: a goaway, or a rejection in the place of the welcome. None for one that
    /// does not speak raio, and would not understand, and for one that has had them.
    pub fn last_words(&self, policy: &Policy, status: Status, text: &str) -> Option<Vec<u8>> {
        match self.phase {
            Phase::Handshake => Some(policy.rejection(status.errno, text)),
            Phase::Open => {
                let mut goaway = Vec::new();
                message::encode_goaway(status, text, self.limits.crc, &mut goaway);
                Some(goaway)
            }
            Phase::Lingering | Phase::Dead => None,
        }
    }

    /// It is over, once what is on the way to its peer has had a while to get there: responses that wait to
    /// be sent still go to the memory that their requests name.
    pub fn linger(&mut self, clock: &LoopClock) {
        self.phase = Phase::Lingering;
        self.deadline = Some(clock.read() + LINGER);
    }

    /// It is over.
    pub fn die(&mut self) {
        self.phase = Phase::Dead;
        self.deadline = None;
    }
}

/// What a peer is told that broke the protocol. A violation in the first bytes is no raio: nothing is said.
pub(super) fn words_for(violation: Violation) -> Option<(Status, String)> {
    let status = Status { retryable: false, ..Status::protocol(violation.errno()) };
    (violation != Violation::Magic).then(|| (status, format!("{violation}.")))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::handshake::{ChannelOffer, Offer};
    use crate::message::Parsed;

    /// A client that was granted this queue depth.
    pub(crate) fn peer(queue_depth: u32) -> Peer {
        let hello = Offer { queue_depth, ..Offer::new("test") }.hello();
        let Ok(Parsed::Item((peer, _), _)) = Policy::default().welcome(&hello) else { panic!("no welcome") };
        peer
    }

    const ID: ConnectionId = ConnectionId { transport: 0, index: 0, generation: 0 };

    struct Run {
        start: Instant,
        core: ConnectionCore<()>,
    }

    impl Run {
        fn new() -> Self {
            let start = Instant::now();
            Self { start, core: ConnectionCore::new(ID, &Policy::default(), &LoopClock::at(start)) }
        }

        fn open(keepalive: Duration) -> Self {
            let mut run = Self::new();
            let clock = run.clock(0);
            run.core.open(&Peer { keepalive, ..peer(2) }, &clock);
            run
        }

        fn clock(&self, ms: u64) -> LoopClock {
            LoopClock::at(self.start + Duration::from_millis(ms))
        }

        fn at(&mut self, ms: u64, is_read_from: bool) -> Due {
            let clock = self.clock(ms);
            self.core.on_timer(&clock, is_read_from)
        }
    }

    #[test]
    fn a_handshake_has_a_deadline() {
        let mut run = Run::new();
        assert_eq!(run.at(4999, true), Due::Nothing);
        assert_eq!(run.at(5000, true), Due::Fail(Violation::HandshakeTimeout));
    }

    #[test]
    fn a_peer_that_promised_nothing_may_be_silent() {
        assert_eq!(Run::open(Duration::ZERO).core.deadline(), None);
    }

    #[test]
    fn a_peer_that_breaks_its_promise_three_times_fails() {
        let mut run = Run::open(Duration::from_millis(100));
        for ms in [100, 200, 300] {
            assert_eq!(run.at(ms, true), Due::Nothing);
        }
        assert_eq!(run.at(400, true), Due::Fail(Violation::Silent));
    }

    #[test]
    fn a_peer_that_says_anything_is_given_the_whole_time_again() {
        let mut run = Run::open(Duration::from_millis(100));
        for ms in (100..1500).step_by(100) {
            if ms % 300 == 0 {
                run.core.on_receive();
            }
            assert_eq!(run.at(ms, true), Due::Nothing, "at {ms} ms");
        }
    }

    #[test]
    fn a_peer_that_is_not_read_from_is_not_silent() {
        let mut run = Run::open(Duration::from_millis(100));
        for ms in (100..1500).step_by(100) {
            assert_eq!(run.at(ms, false), Due::Nothing);
        }
        // Nor is it the moment after.
        assert_eq!(run.at(1500, true), Due::Nothing);
    }

    #[test]
    fn requests_beyond_the_credits_and_ids_in_flight_are_violations() {
        let mut run = Run::open(Duration::ZERO);
        // A queue depth of 2, and one for control messages.
        for id in [5, 6, 7] {
            assert_eq!(run.core.admit(id, ()), Ok(()));
        }
        assert_eq!(run.core.admit(8, ()), Err(Violation::Credits));
        run.core.in_flight.remove(5);
        assert_eq!(run.core.admit(6, ()), Err(Violation::RequestId));
        assert_eq!(run.core.admit(5, ()), Ok(()));
    }

    #[test]
    fn a_connection_has_finished_only_if_nothing_is_in_flight_and_all_is_well() {
        let mut run = Run::open(Duration::ZERO);
        assert_eq!(run.core.ended_by(Status::OK), CloseReason::Finished);
        assert_eq!(run.core.ended_by(Status::protocol(libc::EPROTO)), CloseReason::Lost(libc::EPROTO));
        run.core.admit(1, ()).unwrap();
        assert_eq!(run.core.ended_by(Status::OK), CloseReason::Lost(0));
        assert_eq!(Run::new().core.ended_by(Status::OK), CloseReason::Lost(0), "no handshake");
    }

    #[test]
    fn a_goaway_without_an_error_ends_a_channel_whatever_is_in_flight() {
        let mut run = Run::new();
        let clock = run.clock(0);
        let channel = ChannelOffer { number: 1, epoch: 1, linger: Duration::ZERO };
        run.core.open(&Peer { channel: Some(channel), ..peer(2) }, &clock);
        run.core.admit(1, ()).unwrap();
        let goaway = |status| Message::Goaway(status, &[]);
        assert_eq!(run.core.on_control(&goaway(Status::OK)), Ok(Control::Closed(CloseReason::Goaway)));
        let lost = Ok(Control::Closed(CloseReason::Lost(libc::EPROTO)));
        assert_eq!(run.core.on_control(&goaway(Status::protocol(libc::EPROTO))), lost);
        let run = Run::open(Duration::ZERO);
        let finished = Ok(Control::Closed(CloseReason::Finished));
        assert_eq!(run.core.on_control(&goaway(Status::OK)), finished, "it has no channel");
    }

    #[test]
    fn a_connection_lingers_for_a_while_and_says_its_last_words_once() {
        let mut run = Run::open(Duration::from_millis(100));
        let policy = Policy::default();
        assert!(run.core.last_words(&policy, Status::OK, "").is_some());
        let clock = run.clock(1000);
        run.core.linger(&clock);
        assert!(run.core.last_words(&policy, Status::OK, "").is_none());
        assert_eq!(run.at(1999, true), Due::Nothing);
        assert_eq!(run.at(2000, true), Due::Drop);
    }

    #[test]
    fn messages_that_are_not_for_a_server_are_violations() {
        let run = Run::open(Duration::ZERO);
        assert_eq!(run.core.on_control(&Message::Ping(9)), Ok(Control::Pong(9)));
        let response = message::ResponseHeader::of_data(1, 0);
        let mut run = run;
        let taken = run.core.on_push(&Message::Response(response, &[]), &mut VecDeque::new());
        assert_eq!(taken, Err(Violation::Kind(2)));
    }
}
