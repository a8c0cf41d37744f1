//! A connection whose messages come whole, with their data or with where it is: over queue pairs, and within
//! the process.
//!
//! A request is in flight from its arrival until its response is made, so that is where credits are counted.
//! A connection whose answers pile up is not taken in from: what it holds here stays within its credits.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::core::words_for;
use super::{ConnectionCore, Control};
use crate::error::{Status, Violation};
use crate::handshake::{Peer, Policy};
use crate::message::{self, HANDSHAKE_BYTES_MAX, Message, Parsed, RemoteRegion};
use crate::reactor::LoopClock;
use crate::transport::{
    CloseReason, ConnectionId, NotPushed, Push, Request, RequestKey, Response, ServerEvent, SlotRange,
};
use crate::tuning::CONTROL_MESSAGES;

/// What is to be sent.
#[derive(Debug)]
pub(crate) enum Outgoing {
    /// A message that is no response.
    Message(Vec<u8>),
    /// The response to the request with this id.
    Response(u64, Response),
}

impl Outgoing {
    fn slot_bytes(&self) -> usize {
        match self {
            Self::Response(_, Response { data: Some(data), .. }) => data.slot.len(),
            _ => 0,
        }
    }
}

/// A request in flight.
#[derive(Debug)]
pub(crate) struct MessageRequest<I> {
    region: RemoteRegion,
    has_crc: bool,
    data_crc: u32,
    /// The data that came with it, as the transport keeps it.
    inline: Option<I>,
    is_answered: bool,
}

/// What became of a message that was taken in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It had so many bytes.
    Bytes(usize),
    /// The same, of a request with data: `range` is where that is, to be kept with
    /// [`MessageConnection::keep_data`].
    Data { len: usize, id: u64, range: Range<usize> },
    /// It ends the connection.
    Closed(CloseReason),
}

/// Where the data of a request is.
#[derive(Debug)]
pub(crate) enum DataSource<I> {
    /// In the peer's memory.
    Remote(RemoteRegion, usize),
    /// It came with the request.
    Inline(I),
    /// There is none, or it has been taken.
    None,
}

/// One connection. `I` is how a transport keeps data that came with a request.
#[derive(Debug)]
pub(crate) struct MessageConnection<I> {
    pub core: ConnectionCore<MessageRequest<I>>,
    /// The most data that may come with a request.
    inline_bytes_max: usize,
    unsent: VecDeque<Outgoing>,
    /// Bytes of the slots in it.
    unsent_bytes: usize,
    /// Since when what is on the way to the peer has made no progress, and how much had been done then.
    stalled: Option<(Instant, u64)>,
}

impl<I> MessageConnection<I> {
    /// A connection whose handshake is still to come.
    pub fn new(id: ConnectionId, policy: &Policy, clock: &LoopClock) -> Self {
        Self {
            core: ConnectionCore::new(id, policy, clock),
            inline_bytes_max: 0,
            unsent: VecDeque::new(),
            unsent_bytes: 0,
            stalled: None,
        }
    }

    /// Takes in a hello: who it is, and the welcome to send with [`MessageConnection::open`].
    pub fn on_hello(policy: &Policy, hello: &[u8]) -> Result<(Peer, Vec<u8>), Violation> {
        if hello.len() > HANDSHAKE_BYTES_MAX {
            return Err(Violation::HandshakeTooLong);
        }
        match policy.welcome(hello)? {
            Parsed::Item(item, taken) if taken == hello.len() => Ok(item),
            _ => Err(Violation::Length),
        }
    }

    /// The handshake is over.
    pub fn open(&mut self, peer: &Peer, welcome: Option<Vec<u8>>, clock: &LoopClock) {
        self.core.open(peer, clock);
        self.inline_bytes_max = peer.grant.inline_bytes_max as usize;
        self.core.in_flight.reserve(self.core.credits());
        self.unsent.extend(welcome.map(Outgoing::Message));
    }

    /// Takes in the message at the front of `bytes`.
    pub fn on_message(
        &mut self,
        bytes: &[u8],
        events: &mut VecDeque<ServerEvent>,
        clock: &LoopClock,
    ) -> Result<Taken, Violation> {
        self.core.on_receive();
        let Parsed::Item(parsed, taken) = message::parse(bytes, self.core.limits())? else {
            return Err(Violation::Length);
        };
        let Message::Request(request, body) = parsed else {
            if self.core.on_push(&parsed, events)? {
                return Ok(Taken::Bytes(taken));
            }
            return match self.core.on_control(&parsed)? {
                Control::Pong(id) => {
                    let mut pong = Vec::new();
                    self.core.encode_pong(id, clock, &mut pong);
                    self.unsent.push_back(Outgoing::Message(pong));
                    Ok(Taken::Bytes(taken))
                }
                // This side never pings.
                Control::Ignore => Err(Violation::RequestId),
                Control::Closed(reason) => Ok(Taken::Closed(reason)),
            };
        };
        let data_len = request.data_len as usize;
        if bytes.len() - taken < data_len {
            return Err(Violation::Length);
        }
        if data_len > self.inline_bytes_max {
            return Err(Violation::Length);
        }
        self.core.admit(
            request.id,
            MessageRequest {
                region: request.region,
                has_crc: request.has_crc,
                data_crc: request.data_crc,
                inline: None,
                is_answered: false,
            },
        )?;
        events.push_back(ServerEvent::Request(Request {
            key: RequestKey { connection: self.core.id, id: request.id },
            body: body.into(),
            data_len: request.data_out_len(),
            region_len: request.region_in_len(),
        }));
        let len = taken + data_len;
        Ok(if data_len == 0 {
            Taken::Bytes(len)
        } else {
            Taken::Data { len, id: request.id, range: taken..len }
        })
    }

    /// Keeps the data that has come with a request until somebody wants it.
    pub fn keep_data(&mut self, id: u64, data: I) {
        if let Some(asked) = self.core.in_flight.get_mut(id) {
            asked.inline = Some(data);
        }
    }

    /// Where the data of a request is that is to be brought into a slot.
    pub fn take_data(&mut self, id: u64) -> Option<DataSource<I>> {
        let asked = self.core.in_flight.get_mut(id)?;
        Some(match asked.region {
            RemoteRegion::Out { len, .. } if len > 0 => DataSource::Remote(asked.region, len as usize),
            _ => asked.inline.take().map_or(DataSource::None, DataSource::Inline),
        })
    }

    /// Where in the peer's memory the data of a request is.
    pub fn region(&self, id: u64) -> Option<RemoteRegion> {
        Some(self.core.in_flight.get(id)?.region)
    }

    /// The event that the data of a request has been brought into a slot.
    pub fn fetched(&self, id: u64, range: SlotRange) -> ServerEvent {
        let asked = self.core.in_flight.get(id).filter(|asked| self.core.crc() || asked.has_crc);
        let sent = asked.map(|asked| asked.data_crc);
        self.core.fetched(id, range, sent)
    }

    /// Answers a request. Returns the data that came with it, if it was not fetched.
    ///
    /// # Panics
    /// If it was answered before, or the response brings more data than the request has room for.
    pub fn respond(&mut self, id: u64, response: Response) -> Option<I> {
        let asked = self.core.in_flight.get_mut(id).expect("a request is answered once");
        assert!(!std::mem::replace(&mut asked.is_answered, true), "a request is answered once");
        let room = if let RemoteRegion::In { len, .. } = asked.region { len } else { 0 };
        assert!(
            response.data.as_ref().is_none_or(|data| data.len <= room as usize),
            "a response brings no more data than its request has room for"
        );
        let inline = asked.inline.take();
        let outgoing = Outgoing::Response(id, response);
        self.unsent_bytes += outgoing.slot_bytes();
        self.unsent.push_back(outgoing);
        inline
    }

    /// Sends an unsolicited message.
    pub fn push(&mut self, push: Push<'_>, events: &mut VecDeque<ServerEvent>) -> Result<(), NotPushed> {
        let mut message = Vec::new();
        self.core.push(push, events, &mut message)?;
        if !message.is_empty() {
            self.unsent.push_back(Outgoing::Message(message));
        }
        Ok(())
    }

    /// The next thing to send.
    pub fn poll_send(&mut self) -> Option<Outgoing> {
        let outgoing = self.unsent.pop_front()?;
        self.unsent_bytes -= outgoing.slot_bytes();
        Some(outgoing)
    }

    /// Ends a request: its response's header, and where in the peer's memory the response's data goes.
    pub fn finish(&mut self, id: u64, response: &Response) -> (message::ResponseHeader, RemoteRegion) {
        let asked = self.core.in_flight.remove(id);
        let (region, has_crc) =
            asked.map_or((RemoteRegion::None, false), |asked| (asked.region, asked.has_crc));
        let data = match (&response.data, region) {
            (Some(range), RemoteRegion::In { .. }) => range.bytes(),
            _ => &[],
        };
        let header = message::ResponseHeader {
            id,
            body_len: 0,
            data_len: data.len() as u32,
            status: response.status,
            credits: 1,
            result: response.result,
            has_crc,
            data_crc: if has_crc || self.core.crc() { message::data_crc(data) } else { 0 },
        };
        (header, region)
    }

    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Whether so much is unsent that nothing more is taken in.
    pub fn is_behind(&self) -> bool {
        self.unsent.len() > self.core.messages_max() + CONTROL_MESSAGES
    }

    /// Bytes of the slots in what is unsent.
    pub fn unsent_bytes(&self) -> usize {
        self.unsent_bytes
    }

    /// Notes whether what is on the way to the peer makes progress: `done` counts what has arrived. Returns
    /// whether some of what was waited for has.
    pub fn note_progress(&mut self, is_idle: bool, done: u64, clock: &LoopClock) -> bool {
        let has_progressed = self.stalled.is_some_and(|(_, then)| then != done);
        if is_idle {
            self.stalled = None;
        } else if self.stalled.is_none() || has_progressed {
            self.stalled = Some((clock.read(), done));
        }
        has_progressed
    }

    /// Whether the peer has made no progress for so long.
    pub fn is_stalled(&self, timeout: Duration, clock: &LoopClock) -> bool {
        self.core.is_open() && self.stalled.is_some_and(|(since, _)| since + timeout <= clock.now())
    }

    /// Rejects a client in the place of its welcome, and forgets what it was to be told.
    pub fn reject(&mut self, policy: &Policy, errno: i32, text: &str) {
        self.unsent.clear();
        self.unsent_bytes = 0;
        self.unsent.push_back(Outgoing::Message(policy.rejection(errno, text)));
    }

    /// Says to the peer that it is over, and why, if it would understand.
    pub fn say_goaway(&mut self, policy: &Policy, status: Status, text: &str) {
        self.unsent.extend(self.core.last_words(policy, status, text).map(Outgoing::Message));
    }

    /// The same to a peer that broke the protocol, if it did. Whether there is something to be said.
    pub fn say_violation(&mut self, policy: &Policy, reason: &CloseReason) -> bool {
        let words = match reason {
            CloseReason::Violation(violation) => words_for(*violation),
            _ => None,
        };
        if let Some((status, text)) = &words {
            self.say_goaway(policy, *status, text);
        }
        words.is_some()
    }

    /// It is over: reports it, once, and takes back what of its requests was not reported yet.
    pub fn report_closed(
        &mut self,
        reason: CloseReason,
        events: &mut VecDeque<ServerEvent>,
        clock: &LoopClock,
    ) {
        let id = self.core.id;
        self.core.linger(clock);
        events.retain(|event| match event {
            ServerEvent::Request(request) => request.key.connection != id,
            ServerEvent::Fetched(key, _) | ServerEvent::Damaged(key, _) => key.connection != id,
            ServerEvent::OneWay(connection, _)
            | ServerEvent::Receipt(connection, _)
            | ServerEvent::Refused(connection)
            | ServerEvent::Answered(connection, _) => *connection != id,
            ServerEvent::Opened(..) | ServerEvent::Moved(..) | ServerEvent::Closed(..) => true,
        });
        events.push_back(ServerEvent::Closed(id, reason));
    }
}

#[cfg(test)]
mod tests {
    use super::super::core::tests::peer;
    use super::*;
    use crate::memory::{Arena, SlotRange};
    use crate::transport::Body;

    const ID: ConnectionId = ConnectionId { transport: 0, index: 0, generation: 0 };

    struct Run {
        start: Instant,
        connection: MessageConnection<Range<usize>>,
        events: VecDeque<ServerEvent>,
    }

    impl Run {
        fn open() -> Self {
            let start = Instant::now();
            let clock = LoopClock::at(start);
            let mut connection = MessageConnection::new(ID, &Policy::default(), &clock);
            connection.open(&peer(2), None, &clock);
            Self { start, connection, events: VecDeque::new() }
        }

        fn clock(&self, ms: u64) -> LoopClock {
            LoopClock::at(self.start + Duration::from_millis(ms))
        }

        fn take(&mut self, bytes: &[u8]) -> Result<Taken, Violation> {
            let clock = self.clock(0);
            let taken = self.connection.on_message(bytes, &mut self.events, &clock)?;
            if let Taken::Data { id, range, .. } = &taken {
                self.connection.keep_data(*id, range.clone());
            }
            Ok(taken)
        }

        fn request(&mut self, id: u64, region: RemoteRegion, data: &[u8]) -> Result<Taken, Violation> {
            self.take(&encode(id, region, data))
        }
    }

    fn encode(id: u64, region: RemoteRegion, data: &[u8]) -> Vec<u8> {
        let request = message::RequestHeader {
            id,
            body_len: 0,
            data_len: data.len() as u32,
            region,
            has_crc: false,
            data_crc: 0,
        };
        let mut bytes = Vec::new();
        request.encode(b"command.", false, &mut bytes);
        bytes.extend_from_slice(data);
        bytes
    }

    fn response(data: Option<SlotRange>) -> Response {
        Response { status: Status::OK, result: 0, body: Body::default(), data }
    }

    #[test]
    fn a_hello_must_come_whole_and_alone() {
        let policy = Policy::default();
        let hello = crate::handshake::Offer::new("test").hello();
        assert!(MessageConnection::<()>::on_hello(&policy, &hello).is_ok());
        let half = MessageConnection::<()>::on_hello(&policy, &hello[..40]);
        assert_eq!(half.err(), Some(Violation::Length));
        let more = MessageConnection::<()>::on_hello(&policy, &[&hello[..], &[0]].concat());
        assert_eq!(more.err(), Some(Violation::Length));
        let long = MessageConnection::<()>::on_hello(&policy, &[0; HANDSHAKE_BYTES_MAX + 1]);
        assert_eq!(long.err(), Some(Violation::HandshakeTooLong));
    }

    #[test]
    fn a_request_with_its_data_is_one_message_and_the_next_begins_behind_it() {
        let mut run = Run::open();
        let mut bytes = encode(1, RemoteRegion::None, b"some data");
        let len = bytes.len();
        bytes.extend(encode(2, RemoteRegion::None, b""));
        assert_eq!(run.take(&bytes), Ok(Taken::Data { len, id: 1, range: len - 9..len }));
        let Some(ServerEvent::Request(request)) = run.events.pop_front() else { panic!() };
        assert_eq!((request.key.id, request.data_len), (1, 9));
        let Some(DataSource::Inline(range)) = run.connection.take_data(1) else { panic!() };
        assert_eq!(&bytes[range], b"some data");
        assert!(matches!(run.connection.take_data(1), Some(DataSource::None)), "it is taken once");
        assert!(run.connection.take_data(2).is_none());
    }

    #[test]
    fn data_that_is_cut_short_is_a_violation() {
        let mut run = Run::open();
        let bytes = encode(1, RemoteRegion::None, b"some data");
        assert_eq!(run.take(&bytes[..bytes.len() - 1]), Err(Violation::Length));
        assert!(run.events.is_empty());
    }

    #[test]
    fn a_credit_is_free_again_when_the_response_is_made_and_not_before() {
        let mut run = Run::open();
        for id in 1..=3 {
            run.request(id, RemoteRegion::None, b"").unwrap();
        }
        assert_eq!(run.request(4, RemoteRegion::None, b""), Err(Violation::Credits));
        run.connection.respond(1, response(None));
        assert_eq!(run.request(4, RemoteRegion::None, b""), Err(Violation::Credits));
        let Some(Outgoing::Response(1, made)) = run.connection.poll_send() else { panic!() };
        run.connection.finish(1, &made);
        assert!(run.request(4, RemoteRegion::None, b"").is_ok());
    }

    #[test]
    fn bytes_of_unsent_responses_are_counted_as_they_come_and_go() {
        let mut run = Run::open();
        let mut arena = Arena::new(1 << 20, 64 << 10).unwrap();
        let region = RemoteRegion::In { address: 0, key: 0, len: 4096 };
        for id in 1..=2 {
            run.request(id, region, b"").unwrap();
            let slot = arena.alloc(4096).unwrap();
            run.connection.respond(id, response(Some(SlotRange { slot, start: 0, len: 100 })));
        }
        assert_eq!(run.connection.unsent_bytes(), 8192);
        let Some(Outgoing::Response(id, made)) = run.connection.poll_send() else { panic!() };
        assert_eq!(run.connection.unsent_bytes(), 4096);
        let (header, to) = run.connection.finish(id, &made);
        assert_eq!((header.data_len, to), (100, region));
    }

    #[test]
    fn a_ping_is_answered_and_a_pong_is_a_violation() {
        let mut run = Run::open();
        let mut bytes = Vec::new();
        message::encode_ping(8, false, &mut bytes);
        assert_eq!(run.take(&bytes), Ok(Taken::Bytes(bytes.len())));
        assert!(matches!(run.connection.poll_send(), Some(Outgoing::Message(_))));
        bytes.clear();
        message::encode_pong(8, 0, false, &mut bytes);
        assert_eq!(run.take(&bytes), Err(Violation::RequestId));
    }

    #[test]
    fn a_peer_stalls_if_nothing_is_done_for_the_timeout() {
        let mut run = Run::open();
        let timeout = Duration::from_millis(500);
        for (ms, done) in [(0, 1), (400, 2), (800, 2)] {
            let clock = run.clock(ms);
            run.connection.note_progress(false, done, &clock);
            assert!(!run.connection.is_stalled(timeout, &clock));
        }
        assert!(run.connection.is_stalled(timeout, &run.clock(900)));
        let clock = run.clock(900);
        run.connection.note_progress(true, 2, &clock);
        assert!(!run.connection.is_stalled(timeout, &run.clock(9000)));
    }

    #[test]
    fn what_was_not_yet_reported_of_a_closed_connection_is_not() {
        let mut run = Run::open();
        run.request(1, RemoteRegion::None, b"").unwrap();
        let clock = run.clock(0);
        run.connection.report_closed(CloseReason::Local, &mut run.events, &clock);
        assert!(matches!(run.events.pop_front(), Some(ServerEvent::Closed(ID, CloseReason::Local))));
        assert!(run.events.is_empty() && !run.connection.core.is_open());
    }

    #[test]
    fn responses_that_wait_when_a_connection_ends_still_know_where_their_data_goes() {
        let mut run = Run::open();
        let mut arena = Arena::new(1 << 20, 64 << 10).unwrap();
        let region = RemoteRegion::In { address: 0, key: 0, len: 4096 };
        run.request(1, region, b"").unwrap();
        let slot = arena.alloc(4096).unwrap();
        run.connection.respond(1, response(Some(SlotRange { slot, start: 0, len: 100 })));
        let clock = run.clock(0);
        run.connection.say_goaway(&Policy::default(), Status::OK, "");
        run.connection.report_closed(CloseReason::Local, &mut run.events, &clock);
        let Some(Outgoing::Response(1, made)) = run.connection.poll_send() else { panic!() };
        let (header, to) = run.connection.finish(1, &made);
        assert_eq!((header.data_len, to), (100, region));
        assert!(matches!(run.connection.poll_send(), Some(Outgoing::Message(_))), "the goaway comes last");
    }

    #[test]
    fn a_peer_that_broke_the_protocol_is_told_unless_it_speaks_another() {
        let mut run = Run::open();
        let policy = Policy::default();
        assert!(!run.connection.say_violation(&policy, &CloseReason::Violation(Violation::Magic)));
        assert!(!run.connection.say_violation(&policy, &CloseReason::Local));
        assert!(run.connection.say_violation(&policy, &CloseReason::Violation(Violation::Credits)));
        assert!(run.connection.has_unsent());
    }
}
