use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::message::{Limits, Message, Parsed};

const LIMITS: Limits = Limits { crc: false, request_crc: false, data_bytes_max: 1 << 20, pong_time: false };

fn windows(n: u16) -> PushWindows {
    PushWindows { to_server: n, to_client: n, requests: n }
}

/// What is on the way from one end to the other.
#[derive(Default)]
struct Wire(VecDeque<Vec<u8>>);

impl Wire {
    fn put(&mut self, bytes: Vec<u8>) {
        self.0.extend((!bytes.is_empty()).then_some(bytes));
    }

    fn take<T>(&mut self, look: impl FnOnce(Message<'_>) -> T) -> Option<T> {
        let bytes = self.0.pop_front()?;
        let Ok(Parsed::Item(message, len)) = message::parse(&bytes, &LIMITS) else { panic!("{bytes:x?}") };
        assert_eq!(len, bytes.len(), "a message comes alone");
        Some(look(message))
    }
}

fn send(end: &mut OneWayFlow, wire: &mut Wire, tag: u64, wants_receipt: bool) -> Result<(), NotPushed> {
    let mut bytes = Vec::new();
    let message = &tag.to_le_bytes()[..];
    let sent = end.send(OneWay { message, tag, wants_receipt }, false, &mut bytes);
    wire.put(bytes);
    sent
}

fn release(end: &mut OneWayFlow, wire: &mut Wire) {
    let mut bytes = Vec::new();
    end.release(false, &mut bytes);
    wire.put(bytes);
}

#[test]
fn a_message_is_taken_as_long_as_no_more_than_the_window_are_unreleased() {
    let mut wire = Wire::default();
    let mut end = OneWayFlow::of_client(&windows(2));
    assert_eq!(send(&mut end, &mut wire, 0, false), Ok(()));
    assert_eq!(send(&mut end, &mut wire, 1, false), Ok(()));
    assert_eq!((send(&mut end, &mut wire, 2, false), end.room()), (Err(NotPushed::Full), 0));
    assert_eq!(end.on_receipt(Receipt { released: 1, is_last: false }, |_| {}), Ok(false));
    assert_eq!(send(&mut end, &mut wire, 2, false), Ok(()));
    assert_eq!(wire.0.len(), 3);
}

#[test]
fn without_a_window_nothing_is_sent_or_taken() {
    let mut end = OneWayFlow::of_server(&PushWindows::NONE);
    assert_eq!(send(&mut end, &mut Wire::default(), 0, true), Err(NotPushed::Refused));
    assert_eq!(end.on_message(false), Err(Violation::Kind(7)));
    let receipt = Receipt { released: 0, is_last: false };
    assert_eq!(end.on_receipt(receipt, |_| {}), Err(Violation::Kind(8)));
    let mut out = Vec::new();
    end.refuse(false, &mut out);
    assert!(out.is_empty(), "a peer without a window has no use for it");
}

#[test]
fn receipts_come_after_half_of_the_window_or_at_once_if_one_is_wanted() {
    let mut end = OneWayFlow::of_server(&windows(6));
    let mut receipts = |wants_receipt: bool| {
        let mut wire = Wire::default();
        assert_eq!(end.on_message(wants_receipt), Ok(true));
        release(&mut end, &mut wire);
        wire.take(|message| match message {
            Message::Receipt(receipt) => receipt.released,
            other => panic!("{other:?}"),
        })
    };
    let seen: Vec<_> = [false, false, false, false, true, false].map(&mut receipts).into();
    assert_eq!(seen, [None, None, Some(3), None, Some(5), None]);
}

#[test]
fn a_receipt_that_says_nothing_new_or_too_much_is_a_violation() {
    let mut end = OneWayFlow::of_client(&windows(4));
    let mut wire = Wire::default();
    for tag in 0..3 {
        send(&mut end, &mut wire, tag, true).unwrap();
    }
    let receipt = |released| Receipt { released, is_last: false };
    let mut tags = Vec::new();
    assert_eq!(end.on_receipt(receipt(2), |tag| tags.push(tag)), Ok(false));
    for released in [0, 1, 2, 4, u64::MAX] {
        assert_eq!(end.on_receipt(receipt(released), |_| {}), Err(Violation::Credits), "{released}");
    }
    assert_eq!(end.on_receipt(receipt(3), |tag| tags.push(tag)), Ok(false));
    assert_eq!(tags, [0, 1, 2]);
}

#[test]
fn a_side_that_refuses_drops_messages_under_way_and_receives_no_more() {
    let (mut client, mut server) = (OneWayFlow::of_client(&windows(4)), OneWayFlow::of_server(&windows(4)));
    let (mut up, mut down) = (Wire::default(), Wire::default());
    for tag in 0..3 {
        send(&mut client, &mut up, tag, true).unwrap();
    }
    assert_eq!(server.on_message(true), Ok(true));
    release(&mut server, &mut down);
    let mut refusal = Vec::new();
    server.refuse(false, &mut refusal);
    server.refuse(false, &mut refusal);
    down.put(refusal);
    assert_eq!(server.on_message(true), Ok(false), "it was under way");
    let mut tags = Vec::new();
    let mut take = |client: &mut OneWayFlow| {
        down.take(|message| match message {
            Message::Receipt(receipt) => client.on_receipt(receipt, |tag| tags.push(tag)),
            other => panic!("{other:?}"),
        })
    };
    assert_eq!(take(&mut client), Some(Ok(false)));
    assert_eq!(take(&mut client), Some(Ok(true)));
    assert_eq!(take(&mut client), None, "it is said once");
    assert_eq!(tags, [0], "the others have no receipt");
    assert_eq!(send(&mut client, &mut up, 9, false), Err(NotPushed::Refused));
}

#[test]
fn a_client_answers_each_request_of_its_server_once_and_takes_no_more_than_it_offered() {
    let windows = windows(2);
    let (mut requests, mut unanswered) = (ServerRequests::new(&windows), Unanswered::new(&windows));
    let (mut down, mut up) = (Wire::default(), Wire::default());
    let send_request = |requests: &mut ServerRequests, down: &mut Wire, tag| {
        let mut bytes = Vec::new();
        let sent = requests.send(tag, b"question", false, &mut bytes);
        down.put(bytes);
        sent
    };
    assert_eq!(send_request(&mut requests, &mut down, 70), Ok(()));
    assert_eq!(send_request(&mut requests, &mut down, 71), Ok(()));
    assert_eq!(send_request(&mut requests, &mut down, 72), Err(NotPushed::Full));
    let take = |unanswered: &mut Unanswered, down: &mut Wire| {
        down.take(|message| match message {
            Message::Request(request, b"question") => unanswered.on_request(&request).map(|()| request),
            other => panic!("{other:?}"),
        })
        .unwrap()
    };
    let first = take(&mut unanswered, &mut down).unwrap();
    assert_eq!(unanswered.on_request(&first), Err(Violation::RequestId));
    let second = take(&mut unanswered, &mut down).unwrap();
    let third = RequestHeader { id: 99, ..first };
    assert_eq!(unanswered.on_request(&third), Err(Violation::Credits));
    let mut bytes = Vec::new();
    unanswered.answer(second.id, (Status::policy(libc::EPERM), 7, b"no"), false, &mut bytes);
    up.put(bytes);
    let answers = |requests: &mut ServerRequests, up: &mut Wire| {
        up.take(|message| match message {
            Message::Response(response, body) => {
                let again = response;
                let answer = requests.on_response(&response, body);
                assert_eq!(requests.on_response(&again, body).err(), Some(Violation::RequestId));
                answer
            }
            other => panic!("{other:?}"),
        })
        .unwrap()
        .unwrap()
    };
    let answer = answers(&mut requests, &mut up);
    assert_eq!((answer.tag, answer.status, answer.result), (71, Status::policy(libc::EPERM), 7));
    assert_eq!(&*answer.body, b"no\0\0\0\0\0\0");
    assert_eq!(send_request(&mut requests, &mut down, 72), Ok(()), "an answer makes room");
    assert!(take(&mut unanswered, &mut down).is_ok());
}

#[test]
fn a_request_of_a_server_with_data_is_a_violation() {
    let request = RequestHeader::of_command(1);
    let region = RemoteRegion::In { address: 1, key: 1, len: 1 };
    for request in [RequestHeader { data_len: 1, ..request }, RequestHeader { region, ..request }] {
        assert_eq!(Unanswered::new(&windows(1)).on_request(&request), Err(Violation::Field));
    }
    let response = ResponseHeader::of_data(0, 0);
    for response in [ResponseHeader { data_len: 1, ..response }, ResponseHeader { credits: 0, ..response }] {
        let mut requests = ServerRequests::new(&windows(1));
        requests.send(5, b"", false, &mut Vec::new()).unwrap();
        assert_eq!(requests.on_response(&response, &[]).err(), Some(Violation::Field));
    }
}

/// Something that one end does.
#[derive(Clone, Copy, Debug)]
enum Step {
    Send(bool),
    Deliver,
    Release,
    Refuse,
}

fn any_step() -> impl Strategy<Value = (bool, Step)> {
    let step = prop_oneof![
        8 => any::<bool>().prop_map(Step::Send),
        8 => Just(Step::Deliver),
        8 => Just(Step::Release),
        1 => Just(Step::Refuse),
    ];
    (any::<bool>(), step)
}

/// One end, and what it knows without looking into [`OneWayFlow`].
struct End {
    one_way: OneWayFlow,
    outgoing: Wire,
    sent: u64,
    /// Tags that want a receipt and have none.
    wanted: VecDeque<u64>,
    /// Delivered and not released.
    held: VecDeque<u64>,
    received: u64,
    released: u64,
    refuses: bool,
    is_refused: bool,
}

impl End {
    fn new(one_way: OneWayFlow) -> Self {
        Self {
            one_way,
            outgoing: Wire::default(),
            sent: 0,
            wanted: VecDeque::new(),
            held: VecDeque::new(),
            received: 0,
            released: 0,
            refuses: false,
            is_refused: false,
        }
    }

    fn deliver(&mut self, from: &mut Wire) {
        let _ = from.take(|message| match message {
            Message::OneWay(message, wants_receipt) => {
                let tag = u64::from_le_bytes(message.try_into().unwrap());
                assert_eq!(tag, self.received, "in order, each once");
                self.received += 1;
                let is_wanted = self.one_way.on_message(wants_receipt).expect("within the window");
                assert_eq!(is_wanted, !self.refuses);
                self.held.extend(is_wanted.then_some(tag));
            }
            Message::Receipt(receipt) => {
                let wanted = &mut self.wanted;
                let is_last = self.one_way.on_receipt(receipt, |tag| {
                    assert_eq!(wanted.pop_front(), Some(tag), "in order, each once");
                    assert!(tag < receipt.released);
                });
                self.is_refused = is_last.expect("no more than was sent");
                assert!(self.wanted.front().is_none_or(|tag| *tag >= receipt.released), "all that it covers");
            }
            other => panic!("{other:?}"),
        });
    }

    fn step(&mut self, step: Step, window: usize, incoming: &mut Wire) {
        match step {
            Step::Send(wants_receipt) => {
                let sent = send(&mut self.one_way, &mut self.outgoing, self.sent, wants_receipt);
                match sent {
                    Ok(()) => {
                        self.wanted.extend(wants_receipt.then_some(self.sent));
                        self.sent += 1;
                    }
                    Err(NotPushed::Full) => assert!(!self.is_refused && self.one_way.room() == 0),
                    Err(why) => assert!((self.is_refused || window == 0) && why == NotPushed::Refused),
                }
            }
            Step::Deliver => self.deliver(incoming),
            Step::Release => {
                if self.held.pop_front().is_some() {
                    self.released += 1;
                    release(&mut self.one_way, &mut self.outgoing);
                }
            }
            Step::Refuse => {
                self.refuses |= window > 0;
                self.held.clear();
                let mut bytes = Vec::new();
                self.one_way.refuse(false, &mut bytes);
                self.outgoing.put(bytes);
            }
        }
        assert!(self.held.len() <= window);
        assert!(self.refuses || self.one_way.held() == self.held.len());
    }
}

proptest! {
    #[test]
    fn whatever_two_ends_do_nothing_is_lost_doubled_or_beyond_the_window(
        window in 0u16..5,
        steps in prop::collection::vec(any_step(), 1..200),
    ) {
        let windows = windows(window);
        let mut client = End::new(OneWayFlow::of_client(&windows));
        let mut server = End::new(OneWayFlow::of_server(&windows));
        for (of_client, step) in steps {
            let (one, other) =
                if of_client { (&mut client, &mut server) } else { (&mut server, &mut client) };
            one.step(step, window.into(), &mut other.outgoing);
            prop_assert!(one.sent - other.released <= u64::from(window) || other.refuses);
        }
        // In the end all that was sent arrives, and is released: there is room for another message each.
        for _ in 0..1000 {
            for of_client in [true, false] {
                let (one, other) =
                    if of_client { (&mut client, &mut server) } else { (&mut server, &mut client) };
                one.step(Step::Deliver, window.into(), &mut other.outgoing);
                one.step(Step::Release, window.into(), &mut other.outgoing);
            }
        }
        for (one, other) in [(&client, &server), (&server, &client)] {
            prop_assert!(one.outgoing.0.is_empty());
            prop_assert!(other.refuses || one.wanted.is_empty(), "receipts are missing");
            prop_assert!(other.refuses || window == 0 || one.one_way.room() > 0);
            prop_assert_eq!(one.is_refused, other.refuses);
        }
    }
}
