use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::handshake::Offer;
use crate::message::Link;
use crate::tls::kernel::KernelRecords;
use crate::transport::Body;

const ID: ConnectionId = ConnectionId { transport: 0, index: 3, generation: 1 };

/// A connection, its worker, and a client that is a vector of bytes.
struct Run {
    start: Instant,
    ms: u64,
    shared: StreamShared,
    connection: StreamConnection<Vec<u8>>,
    arena: Arena,
}

impl Run {
    fn new() -> Self {
        Self::with(Policy { queue_pair: true, ..Policy::default() })
    }

    fn with(policy: Policy) -> Self {
        let start = Instant::now();
        let shared = StreamShared::new(Arc::new(policy));
        let connection = StreamConnection::new(
            ID,
            &shared.policy,
            Records::Clear,
            Identity::Anonymous,
            false,
            true,
            &LoopClock::at(start),
        );
        let arena = Arena::new(4 << 20, 1 << 20).unwrap();
        Self { start, ms: 0, shared, connection, arena }
    }

    fn open() -> Self {
        Self::open_with(&Offer { queue_depth: 4, ..Offer::new("test") })
    }

    fn open_with(offer: &Offer) -> Self {
        let mut run = Self::new();
        run.send(&offer.hello());
        assert!(matches!(run.event(), Some(ServerEvent::Opened(ID, _))));
        run.flush();
        run
    }

    /// One whose records the kernel seals, with a limit on the records of each key.
    fn open_in_kernel(records_per_key: u64) -> Self {
        let mut run = Self::new();
        run.connection.records = Records::Kernel(KernelRecords::new(records_per_key));
        run.send(&Offer { queue_depth: 4, ..Offer::new("test") }.hello());
        assert!(matches!(run.event(), Some(ServerEvent::Opened(ID, _))));
        run.flush();
        run
    }

    /// A receive ends with a record that is no data, of this type and with this inside.
    fn control_record(&mut self, kind: u8, message: &[u8]) {
        let target = match self.receive().expect("it is read from") {
            Receive::Any(_) => None,
            Receive::Into(range) => Some(range),
        };
        let clock = self.clock();
        self.connection.on_control_record((kind, message), target, &mut self.shared, &clock);
    }

    fn clock(&self) -> LoopClock {
        LoopClock::at(self.start + Duration::from_millis(self.ms))
    }

    fn receive(&mut self) -> Option<Receive> {
        let clock = self.clock();
        self.connection.poll_receive(&mut self.shared, &clock)
    }

    /// The client sends this, and it is received as it is to be.
    fn send(&mut self, mut bytes: &[u8]) {
        let clock = self.clock();
        while !bytes.is_empty() {
            match self.receive().expect("it is read from") {
                Receive::Any(max) => {
                    let (now, later) = bytes.split_at(bytes.len().min(max as usize));
                    self.connection.on_bytes(now.to_vec(), &mut self.shared, &clock);
                    bytes = later;
                }
                Receive::Into(mut range) => {
                    let n = range.len.min(bytes.len());
                    range.bytes_mut()[..n].copy_from_slice(&bytes[..n]);
                    bytes = &bytes[n..];
                    self.connection.on_data(n, range, &mut self.shared);
                }
            }
            self.connection.settle_heap(&mut self.shared);
        }
    }

    fn event(&mut self) -> Option<ServerEvent> {
        self.shared.events.pop_front()
    }

    fn closed(&mut self) -> Option<CloseReason> {
        match self.event() {
            Some(ServerEvent::Closed(ID, reason)) => Some(reason),
            _ => None,
        }
    }

    fn request(&mut self) -> Request {
        match self.event() {
            Some(ServerEvent::Request(request)) => request,
            other => panic!("a request was to come, not {other:?}"),
        }
    }

    fn fetch(&mut self, request: &Request) {
        let slot = self.arena.alloc(request.data_len as usize).unwrap();
        let clock = self.clock();
        self.connection.fetch(request.key.id, slot, 0, &mut self.shared, &clock);
    }

    fn respond(&mut self, id: u64, data_len: usize) -> bool {
        let data = (data_len > 0).then(|| {
            let slot = self.arena.alloc(data_len).unwrap();
            SlotRange { slot, start: 0, len: data_len }
        });
        let response = Response { status: Status::OK, result: 0, body: Body::default(), data };
        let clock = self.clock();
        let is_discarding = self.connection.respond(id, response, &mut self.shared, &clock);
        self.connection.settle_heap(&mut self.shared);
        is_discarding
    }

    /// What is sent if the client takes it all.
    fn flush(&mut self) -> Vec<u8> {
        let mut sent = Vec::new();
        while !self.shared.dirty.is_empty() {
            self.shared.dirty.clear();
            if self.connection.begin_flush(&mut self.shared)
                && let Some(mut batch) = self.connection.poll_send(&mut self.shared)
            {
                let bytes = batch.take_all();
                let clock = self.clock();
                self.connection.on_sent(bytes.len(), batch, &mut self.shared, &clock);
                sent.extend(bytes);
            }
        }
        self.connection.settle_heap(&mut self.shared);
        sent
    }

    fn timer(&mut self, ms: u64) {
        self.ms = ms;
        let clock = self.clock();
        self.connection.on_timer(&mut self.shared, &clock);
    }

    fn check_progress(&mut self, close: bool) {
        let clock = self.clock();
        self.connection.check_progress(close, &mut self.shared, &clock);
    }

    fn close(&mut self) -> Option<Close> {
        self.connection.poll_close()
    }
}

fn request(id: u64, region_len: u32, data: &[u8]) -> Vec<u8> {
    let region = match region_len {
        0 => RemoteRegion::None,
        len => RemoteRegion::In { address: 0, key: 0, len },
    };
    let header = message::RequestHeader {
        id,
        body_len: 0,
        data_len: data.len() as u32,
        region,
        has_crc: false,
        data_crc: 0,
    };
    let mut bytes = Vec::new();
    header.encode(b"command.", false, &mut bytes);
    bytes.extend_from_slice(data);
    bytes
}

/// The kinds of the messages that the server has sent.
fn kinds(mut bytes: &[u8]) -> Vec<u8> {
    let limits =
        message::Limits { crc: false, request_crc: false, data_bytes_max: 1 << 20, pong_time: false };
    let mut kinds = Vec::new();
    while let Ok(Parsed::Item(message, len)) = message::parse(bytes, &limits) {
        kinds.push(bytes[0]);
        let data_len = if let Message::Response(response, _) = message { response.data_len } else { 0 };
        bytes = &bytes[len + data_len as usize..];
    }
    assert!(bytes.is_empty(), "whole messages are sent");
    kinds
}

#[test]
fn a_hello_may_come_byte_by_byte() {
    let mut run = Run::new();
    for byte in Offer::new("test").hello() {
        assert!(run.event().is_none());
        run.send(&[byte]);
    }
    assert!(matches!(run.event(), Some(ServerEvent::Opened(ID, _))));
    assert_eq!(run.flush()[..8], message::MAGIC);
}

#[test]
fn what_comes_behind_a_hello_is_taken_in_at_once() {
    let mut run = Run::new();
    run.send(&[Offer::new("test").hello(), request(1, 0, b"")].concat());
    assert!(matches!(run.event(), Some(ServerEvent::Opened(..))));
    assert_eq!(run.request().key.id, 1);
}

#[test]
fn one_that_does_not_speak_raio_is_told_nothing() {
    let mut run = Run::new();
    run.send(&[b'x'; 64]);
    assert_eq!(run.closed(), Some(CloseReason::Violation(Violation::Magic)));
    assert_eq!((run.close(), run.flush().len()), (Some(Close::Both), 0));
    assert!(run.connection.is_over());
}

#[test]
fn a_handshake_that_takes_too_long_ends_with_a_rejection_and_a_time_to_read_it() {
    let mut run = Run::new();
    run.send(&message::MAGIC);
    let deadline = run.connection.deadline().unwrap();
    assert_eq!(deadline - run.start, run.shared.policy.handshake_timeout);
    run.timer(5000);
    assert_eq!(run.closed(), Some(CloseReason::Violation(Violation::HandshakeTimeout)));
    assert!(!run.flush().is_empty());
    assert_eq!(run.close(), Some(Close::Write));
    assert!(matches!(run.receive(), Some(Receive::Any(_))), "what it sends is read, and dropped");
    run.timer(5999);
    assert_eq!(run.close(), None);
    run.timer(6000);
    assert_eq!(run.close(), Some(Close::Both));
    assert!(!run.connection.is_over(), "the receive is in flight");
    run.connection.on_end(&mut run.shared);
    assert!(run.connection.is_over() && run.event().is_none(), "it is closed once");
}

#[test]
fn a_connection_that_is_for_another_is_passed_on_with_all_that_came() {
    let mut run = Run::new();
    run.shared.route = Box::new(|peer| (!peer.is_control()).then_some(5));
    let bytes = [Offer::new("test").hello(), request(1, 0, b"")].concat();
    run.send(&bytes);
    assert_eq!(run.close(), Some(Close::PassOn(5, bytes.clone())));
    assert!(run.connection.is_over() && run.event().is_none() && run.flush().is_empty());

    // There it stays, whatever the route.
    let mut there = Run::new();
    there.shared.route = Box::new(|_| Some(9));
    let clock = there.clock();
    there.connection = StreamConnection::new(
        ID,
        &there.shared.policy,
        Records::Clear,
        Identity::Anonymous,
        true,
        true,
        &clock,
    );
    there.connection.on_hello(bytes, &mut there.shared, &clock);
    assert!(matches!(there.event(), Some(ServerEvent::Opened(..))));
    assert_eq!(there.request().key.id, 1);
}

#[test]
fn nothing_is_received_while_data_waits_for_a_slot() {
    let mut run = Run::open();
    let bytes = request(1, 0, &[7; 3000]);
    run.send(&bytes[..1000]);
    let asked = run.request();
    assert!(run.receive().is_none());
    run.fetch(&asked);
    run.send(&bytes[1000..]);
    let Some(ServerEvent::Fetched(key, range)) = run.event() else { panic!() };
    assert_eq!((key.id, range.bytes()), (1, &[7; 3000][..]));
}

#[test]
fn what_is_left_of_large_data_is_received_straight_into_its_slot() {
    let mut run = Run::open();
    let bytes = request(1, 0, &[7; 100_000]);
    run.send(&bytes[..1000]);
    let asked = run.request();
    run.fetch(&asked);
    let Some(Receive::Into(range)) = run.receive() else { panic!("it is received into the slot") };
    assert_eq!(range.start, 1000 - (bytes.len() - 100_000));
    run.connection.on_nothing(Some(range));
    run.send(&bytes[1000..]);
    assert!(matches!(run.event(), Some(ServerEvent::Fetched(_, range)) if range.bytes() == [7; 100_000]));
}

#[test]
fn data_of_a_request_that_is_answered_without_it_is_passed_over() {
    let mut run = Run::open();
    let bytes = [request(1, 0, &[7; 100]), request(2, 0, b"")].concat();
    run.send(&bytes[..60]);
    run.request();
    assert!(run.respond(1, 0), "its data is still to come");
    run.send(&bytes[60..]);
    assert_eq!(run.request().key.id, 2);
    assert!(!run.respond(2, 0));
    assert_eq!(kinds(&run.flush()), [2, 2]);
}

#[test]
fn an_id_in_flight_ends_the_connection_with_a_goaway() {
    let mut run = Run::open();
    run.send(&[request(1, 0, b""), request(1, 0, b"")].concat());
    run.request();
    assert_eq!(run.closed(), Some(CloseReason::Violation(Violation::RequestId)));
    assert_eq!(kinds(&run.flush()), [5]);
    assert!(!run.respond(1, 0) && run.flush().is_empty(), "its requests are void");
}

#[test]
fn requests_beyond_the_credits_end_the_connection() {
    let mut run = Run::open();
    run.send(&(1..=6).flat_map(|id| request(id, 0, b"")).collect::<Vec<_>>());
    for id in 1..=5 {
        assert_eq!(run.request().key.id, id);
    }
    assert_eq!(run.closed(), Some(CloseReason::Violation(Violation::Credits)));
}

#[test]
fn an_end_between_messages_with_nothing_in_flight_is_in_good_order() {
    for (sent, answered, reason) in
        [(0, 0, CloseReason::Finished), (1, 0, CloseReason::Lost(0)), (1, 1, CloseReason::Finished)]
    {
        let mut run = Run::open();
        (1..=sent).for_each(|id| run.send(&request(id, 0, b"")));
        (1..=answered).for_each(|id| assert!(!run.respond(id, 0)));
        run.shared.events.clear();
        run.connection.on_end(&mut run.shared);
        assert_eq!(run.closed(), Some(reason));
    }
    let mut run = Run::open();
    run.send(&request(1, 0, b"")[..20]);
    run.connection.on_end(&mut run.shared);
    assert_eq!(run.closed(), Some(CloseReason::Lost(0)), "it owes the rest of a message");
}

#[test]
fn a_peer_that_does_not_take_its_answers_is_not_read_from() {
    let mut run = Run::open();
    run.send(&[request(1, 1 << 20, b""), request(2, 1 << 20, b""), request(3, 1 << 20, b"")].concat());
    run.respond(1, 1 << 20);
    run.shared.dirty.clear();
    assert!(run.connection.begin_flush(&mut run.shared));
    let sending = run.connection.poll_send(&mut run.shared).unwrap();
    run.respond(2, 1 << 20);
    assert!(run.receive().is_some(), "1 MiB is not too much");
    run.connection.on_nothing(None);
    run.respond(3, 1 << 20);
    assert_eq!(run.connection.unsent_bytes(), 3 << 20);
    assert!(run.receive().is_none());
    let clock = run.clock();
    run.connection.on_sent(0, sending, &mut run.shared, &clock);
    assert!(run.receive().is_none(), "a part has made no room");
    run.flush();
    assert_eq!(run.connection.unsent_bytes(), 0);
    assert!(run.receive().is_some());
}

#[test]
fn what_waits_for_the_next_send_is_bounded_although_nothing_is_being_sent() {
    let mut run = Run::open();
    run.send(&[request(1, 1 << 20, b""), request(2, 1 << 20, b"")].concat());
    run.respond(1, 1 << 20);
    assert!(run.receive().is_some(), "1 MiB is not too much");
    run.connection.on_nothing(None);
    run.respond(2, 1 << 20);
    assert!(run.receive().is_none());
    run.shared.dirty.clear();
    assert!(run.connection.begin_flush(&mut run.shared));
    let _sending = run.connection.poll_send(&mut run.shared).unwrap();
    assert!(run.receive().is_some(), "there is room behind it");
}

#[test]
fn a_peer_that_takes_nothing_between_two_checks_is_reset() {
    let mut run = Run::open();
    run.send(&request(1, 1 << 20, b""));
    run.request();
    run.respond(1, 1 << 20);
    let mut sending = run.connection.poll_send(&mut run.shared).unwrap();
    run.check_progress(true);
    assert_eq!(run.close(), None, "it has had no time");
    // A trickle is no progress: an eighth of what it holds is.
    let clock = run.clock();
    run.connection.on_sent((1 << 17) - 1, sending, &mut run.shared, &clock);
    sending = run.connection.poll_send(&mut run.shared).unwrap();
    run.check_progress(false);
    let clock = run.clock();
    run.connection.on_sent(1 << 17, sending, &mut run.shared, &clock);
    sending = run.connection.poll_send(&mut run.shared).unwrap();
    run.check_progress(true);
    assert_eq!(run.close(), None);
    run.check_progress(true);
    assert_eq!(run.close(), Some(Close::Reset));
    assert_eq!(run.closed(), Some(CloseReason::Evicted));
    run.connection.on_send_failed(CloseReason::Lost(libc::EPIPE), &mut run.shared);
    drop(sending);
    assert!(run.event().is_none());
}

#[test]
fn a_peer_that_does_not_go_on_with_its_data_is_told_so() {
    let mut run = Run::open();
    run.send(&request(1, 0, &[7; 100_000])[..1000]);
    let asked = run.request();
    run.fetch(&asked);
    assert!(run.receive().is_some());
    run.check_progress(true);
    run.check_progress(true);
    assert_eq!(run.closed(), Some(CloseReason::Evicted));
    assert_eq!(kinds(&run.flush()), [5]);
}

#[test]
fn one_that_causes_too_much_heap_is_not_read_from_until_others_cause_less() {
    let mut run = Run::open_with(&Offer { queue_depth: 100, ..Offer::new("test") });
    run.shared.set_heap_max(64 << 10);
    for id in 1..=70 {
        run.send(&request(id, 0, b""));
    }
    assert!(run.shared.heap().0 > 0);
    // Others cause the most of it.
    run.shared.heap_bytes += 40 << 10;
    run.send(&request(71, 0, b""));
    assert!(run.connection.is_gated() && run.receive().is_none());
    assert_eq!((run.shared.gated.len(), run.shared.heap().1), (1, 1));
    run.shared.take_gated();
    let clock = run.clock();
    assert!(run.connection.reopen_gate(&mut run.shared, &clock).is_none(), "nothing has changed");
    run.shared.heap_bytes -= 40 << 10;
    assert_eq!(run.shared.take_gated(), [ID.index]);
    assert!(matches!(run.connection.reopen_gate(&mut run.shared, &clock), Some(Receive::Any(_))));
    assert_eq!(run.shared.events.len(), 71);
    assert!(run.shared.gated.is_empty());
}

#[test]
fn receives_are_large_while_they_come_full() {
    let mut run = Run::open_with(&Offer { queue_depth: 100, ..Offer::new("test") });
    let len = request(1, 0, b"").len() as u64;
    let count = u64::from(SMALL_RECEIVE_BYTES) / len;
    let sent: Vec<_> = (1..=count + 1).flat_map(|id| request(id, 0, b"")).collect();
    // Its credits do not suffice for that many, so they are answered.
    run.send(&sent[..len as usize * 80]);
    (1..=80).for_each(|id| assert!(!run.respond(id, 0)));
    assert!(matches!(run.receive(), Some(Receive::Any(SMALL_RECEIVE_BYTES))));
    run.connection.on_nothing(None);
    run.connection.choose_receive_size(SMALL_RECEIVE_BYTES as usize, &mut run.shared);
    for _ in 0..LARGE_RECEIVE_FOR {
        assert!(matches!(run.receive(), Some(Receive::Any(LARGE_RECEIVE_BYTES))));
        run.connection.on_nothing(None);
        run.connection.choose_receive_size(100, &mut run.shared);
    }
    assert!(matches!(run.receive(), Some(Receive::Any(SMALL_RECEIVE_BYTES))));
}

#[test]
fn what_is_answered_after_an_early_flush_waits_for_the_next() {
    let mut run = Run::open();
    run.send(&[request(1, 0, b""), request(2, 0, b"")].concat());
    run.respond(1, 0);
    assert!(run.connection.begin_early_flush());
    let mut batch = run.connection.poll_send(&mut run.shared).unwrap();
    let sent = batch.take_all().len();
    let clock = run.clock();
    run.connection.on_sent(sent, batch, &mut run.shared, &clock);
    run.respond(2, 0);
    run.shared.dirty.clear();
    assert!(!run.connection.begin_flush(&mut run.shared));
    assert_eq!(run.shared.dirty, [ID.index]);
    assert_eq!(kinds(&run.flush()), [2]);
}

#[test]
fn a_peer_that_keeps_silent_against_its_promise_is_closed() {
    let mut run = Run::open_with(&Offer { keepalive: Duration::from_millis(100), ..Offer::new("test") });
    assert!(run.receive().is_some());
    for ms in [100, 200, 300] {
        run.timer(ms);
    }
    assert!(run.event().is_none());
    run.timer(400);
    assert_eq!(run.closed(), Some(CloseReason::Violation(Violation::Silent)));
    assert_eq!(kinds(&run.flush()), [5]);
}

#[test]
fn a_client_is_shown_that_the_server_lives_if_nothing_else_is_on_the_way() {
    let mut run = Run::open();
    run.send(&request(1, 0, &[7; 100])[..50]);
    assert!(run.connection.is_unread());
    run.connection.show_life(&mut run.shared);
    run.connection.show_life(&mut run.shared);
    assert_eq!(kinds(&run.flush()), [4]);
}

#[test]
fn a_rejected_client_gets_that_and_no_welcome() {
    let mut run = Run::new();
    run.send(&Offer::new("test").hello());
    run.event();
    let clock = run.clock();
    run.connection.reject(libc::EUSERS, "It is full.", &mut run.shared, &clock);
    assert_eq!(run.closed(), Some(CloseReason::Rejected));
    let told = Offer::new("test").grant(&run.flush());
    assert!(matches!(told, Err(crate::Error::Rejected { status, .. }) if status.errno == libc::EUSERS));
}

#[test]
fn a_connection_that_has_moved_carries_nothing_but_signs_of_life() {
    let offer = Offer { queue_pair: true, ..Offer::new("test") };
    let address = QueuePairAddress {
        gid: [1; 16],
        qpn: 2,
        psn: 2,
        peer_psn: 3,
        mtu: 1024,
        lid: 0,
        reads: 16,
        link: Link::Ethernet,
    };
    let to = ConnectionId { transport: 1, index: 8, generation: 8 };
    for is_answered in [false, true] {
        let mut run = Run::open_with(&offer);
        let mut bytes = Vec::new();
        message::encode_queue_pair(Ok(&address), false, &mut bytes);
        run.send(&bytes);
        let (id, _, theirs) = run.shared.upgrades.pop_front().unwrap();
        assert_eq!((id, theirs), (ID, address));
        assert!(run.connection.is_upgrade_requested());
        if is_answered {
            assert!(run.connection.answer_upgrade(Ok((to, &address)), &mut run.shared));
            assert_eq!(run.connection.upgraded_to(), Some(to));
            assert_eq!(kinds(&run.flush()), [6]);
        }
        bytes.clear();
        message::encode_ping(1, false, &mut bytes);
        run.send(&bytes);
        assert_eq!(kinds(&run.flush()), [4]);
        run.send(&request(1, 0, b""));
        let violation = CloseReason::Violation(Violation::Kind(Kind::Request as u8));
        if is_answered {
            assert_eq!(run.shared.ended.pop_front(), Some((to, violation)), "the other half is told");
            assert!(run.event().is_none());
        } else {
            assert_eq!(run.closed(), Some(violation));
        }
    }
}

#[test]
fn a_connection_whose_other_half_has_ended_says_so_and_is_not_reported() {
    let mut run = Run::open_with(&Offer { queue_pair: true, ..Offer::new("test") });
    run.connection.upgrade = UpgradeState::Upgraded(Some(ID));
    run.shared.upgraded = 1;
    let clock = run.clock();
    run.connection.partner_ended(Status::OK, "", &mut run.shared, &clock);
    assert_eq!(run.shared.upgraded, 0, "it counts by itself until it is gone");
    assert_eq!(kinds(&run.flush()), [5]);
    assert!(run.event().is_none() && run.shared.ended.is_empty());
}

#[test]
fn only_the_first_message_may_ask_to_move() {
    let mut run = Run::open_with(&Offer { queue_pair: true, ..Offer::new("test") });
    run.send(&request(1, 0, b""));
    run.request();
    let mut bytes = Vec::new();
    message::encode_queue_pair(Err((Status::policy(libc::EPERM), "")), false, &mut bytes);
    run.send(&bytes);
    assert_eq!(run.closed(), Some(CloseReason::Violation(Violation::Kind(Kind::QueuePair as u8))));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever the pieces in which they come: requests arrive once, in order, with their data.
    #[test]
    fn the_pieces_in_which_messages_come_do_not_matter(
        lens in prop::collection::vec(prop_oneof![Just(0), 1..200usize, 30_000..80_000usize], 1..8),
        cuts in prop::collection::vec(1..3000usize, 1..40),
    ) {
        let mut run = Run::open_with(&Offer { queue_depth: 16, ..Offer::new("test") });
        let data = |n: usize| vec![n as u8 + 1; lens[n]];
        let sent: Vec<_> = (0..lens.len()).flat_map(|n| request(n as u64, 0, &data(n))).collect();
        let mut rest = &sent[..];
        let (mut requests, mut cuts) = (0, cuts.into_iter().cycle());
        while !rest.is_empty() {
            // As much as is received before a slot is waited for.
            let n = match run.receive() {
                Some(Receive::Any(max)) => rest.len().min(cuts.next().unwrap()).min(max as usize),
                Some(Receive::Into(range)) => {
                    let n = rest.len().min(cuts.next().unwrap()).min(range.len);
                    run.connection.on_nothing(Some(range));
                    n
                }
                None => 0,
            };
            if n > 0 {
                run.connection.on_nothing(None);
                run.send(&rest[..n]);
                rest = &rest[n..];
            }
            while let Some(event) = run.event() {
                match event {
                    ServerEvent::Request(asked) => {
                        prop_assert_eq!(asked.key.id, requests);
                        requests += 1;
                        if asked.data_len > 0 {
                            run.fetch(&asked);
                        }
                    }
                    ServerEvent::Fetched(key, range) => {
                        prop_assert_eq!(range.bytes(), &data(key.id as usize)[..]);
                    }
                    other => prop_assert!(false, "{:?}", other),
                }
            }
        }
        prop_assert_eq!(requests, lens.len() as u64);
    }
}

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const CLOSE_NOTIFY: [u8; 2] = [1, 0];
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];

/// Whether what was sent has a goaway with this in its text.
fn has_goaway(sent: &[u8], part: &str) -> bool {
    String::from_utf8_lossy(sent).contains(part)
}

#[test]
fn a_connection_whose_key_the_kernel_has_used_up_ends_behind_its_answers() {
    // The welcome is the first record.
    let mut run = Run::open_in_kernel(3);
    for id in 1..3 {
        run.send(&request(id, 0, &[]));
        let request = run.request();
        assert!(!run.respond(request.key.id, 0));
        let sent = run.flush();
        assert_eq!(has_goaway(&sent, "Connect again."), id == 2);
    }
    assert_eq!(run.closed(), Some(CloseReason::KeyUsedUp));
    assert_eq!(run.close(), Some(Close::Write));
    // Others may have any number of records.
    let mut run = Run::open();
    for id in 1..20 {
        run.send(&request(id, 0, &[]));
        let request = run.request();
        run.respond(request.key.id, 0);
        run.flush();
    }
    assert!(run.connection.is_open());
}

#[test]
fn a_key_update_ends_a_connection_whose_records_the_kernel_opens() {
    let mut run = Run::open_in_kernel(u64::MAX);
    run.control_record(HANDSHAKE, &KEY_UPDATE);
    assert_eq!(run.closed(), Some(CloseReason::KeyUsedUp));
    // What comes now cannot be opened.
    assert!(run.receive().is_none());
    assert!(has_goaway(&run.flush(), "Connect again."));
    assert_eq!(run.close(), Some(Close::Write));
    run.timer(2000);
    assert_eq!(run.close(), Some(Close::Both));
    assert!(run.connection.is_over());
}

#[test]
fn a_close_notify_that_the_kernel_has_received_is_followed_by_the_end_and_by_nothing_else() {
    let mut run = Run::open_in_kernel(u64::MAX);
    run.control_record(ALERT, &CLOSE_NOTIFY);
    assert!(run.connection.is_open() && matches!(run.receive(), Some(Receive::Any(_))));
    run.connection.on_end(&mut run.shared);
    assert_eq!(run.closed(), Some(CloseReason::Finished));

    let mut run = Run::open_in_kernel(u64::MAX);
    run.control_record(ALERT, &CLOSE_NOTIFY);
    run.send(&request(1, 0, &[]));
    assert_eq!(run.closed(), Some(CloseReason::Violation(Violation::Record)));

    // In the middle of data, which then is received where it is looked at.
    let mut run = Run::open_in_kernel(u64::MAX);
    let whole = request(1, 0, &[7; 200_000]);
    run.send(&whole[..100]);
    let awaited = run.request();
    run.fetch(&awaited);
    run.control_record(ALERT, &CLOSE_NOTIFY);
    assert!(matches!(run.receive(), Some(Receive::Any(_))));
    run.connection.on_end(&mut run.shared);
    assert_eq!(run.closed(), Some(CloseReason::Lost(0)));
}

#[test]
fn alerts_and_records_that_the_kernel_cannot_open_end_a_connection() {
    let mut run = Run::open_in_kernel(u64::MAX);
    run.control_record(ALERT, &[2, 80]);
    assert_eq!(run.closed(), Some(CloseReason::Violation(Violation::Alert(80))));
    let mut run = Run::open_in_kernel(u64::MAX);
    assert!(run.receive().is_some());
    let clock = run.clock();
    run.connection.on_bad_record(&mut run.shared, &clock);
    assert_eq!(run.closed(), Some(CloseReason::Violation(Violation::Record)));
    assert!(run.receive().is_none());
}
