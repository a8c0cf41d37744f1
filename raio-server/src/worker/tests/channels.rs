//! Connections that take the place of others, on two workers that take turns with their clients.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::mpsc;

use raio_transport::channel::{Beginning, Dialer, Dialing, OpenFiles, Reopenable, Settings};
use raio_transport::handshake::ChannelOffer;
use raio_transport::memory::{Buffer, Buffers};
use raio_transport::message::{self, FEATURE_CRC};
use raio_transport::mux::Reached;
use raio_transport::protocol::path::{PathCommand, PathFields};
use raio_transport::protocol::{
    Direction, FileStatus, Layout, OPERATIONS, Opcode, Operation, RequestOutcome,
};
use raio_transport::transport::UsedIds;
use zerocopy::little_endian::U32;

use super::volumes::{Image, Tell};
use super::*;
use crate::engine::Lanes;
use crate::export::Export;

const SIZE: u64 = (FILE_BLOCKS * BLOCK) as u64;
const LINGER: Duration = Duration::from_secs(90);
/// Iterations in which something would have happened that must not.
const A_WHILE: usize = 50;

/// Two workers of one server, whose only export is an image that holds everything until it is released.
pub(super) struct Pair {
    pub(super) workers: [Worker; 2],
    image: mpsc::Sender<Tell>,
}

pub(super) struct Member {
    pub(super) client: TcpClient,
    /// Its end of the connection, to break it.
    stream: UnixStream,
    replies: Vec<Reply>,
}

pub(super) fn pair(can_cancel: bool) -> Pair {
    let options = Options::parse_from(["raio_server", "--export", "unused=null:1", "--memory", "128M"]);
    let config = options.check(2).expect("the options make sense");
    let (volume, image) = Image::new(can_cancel);
    let lanes = Lanes::new(Pool::start().unwrap());
    let exports = Exports::of(vec![Arc::new(Export::of_volume("v", volume, SIZE, lanes))]);
    let shared = Shared::new(&config, exports, Sessions::new(16, no_limits())).expect("there is no trace");
    let shared = Arc::new(shared);
    let start = |index| {
        let counters = Arc::new(Counters::new(1, 1));
        Worker::new(index, Arc::clone(&shared), counters, None).expect("a worker starts")
    };
    let [(first, to_first), (second, to_second)] = [0, 1].map(start);
    shared.workers.set(vec![to_first.senders, to_second.senders]).expect("nobody has");
    Pair { workers: [first, second], image }
}

/// Of a session's control channel: its connection stays at the worker that has accepted it.
pub(super) fn offer(number: u8, epoch: u64) -> Offer {
    let channel = Some(ChannelOffer { number: 0, epoch, linger: LINGER });
    let (session, features) = (SessionId([number; 16]), OPERATION_FEATURES);
    Offer { session, channel, features, ..Offer::new("test") }
}

impl Pair {
    pub(super) fn run(&mut self) {
        self.workers.iter_mut().for_each(run_once);
    }

    /// A client connects to this worker.
    pub(super) fn try_connect(&mut self, at: usize, offer: &Offer) -> Result<Member, raio_transport::Error> {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let stream = ours.try_clone().expect("a descriptor");
        theirs.set_nonblocking(true).expect("it can be set up");
        let permit = no_limits().connect(None).expect("a permit");
        self.workers[at]
            .adopt(RawConnection::Tcp(AcceptedStream::new(OwnedFd::from(theirs)), None), Arc::new(permit));
        let deadline = Instant::now() + Duration::from_secs(60);
        let offer = offer.clone();
        let connecting = std::thread::spawn(move || {
            TcpClient::from_stream(TcpStream::from(OwnedFd::from(ours)), &offer, deadline)
        });
        while !connecting.is_finished() {
            self.run();
            std::thread::sleep(Duration::from_millis(1));
        }
        let client = connecting.join().expect("it does not panic")?;
        Ok(Member { client, stream, replies: Vec::new() })
    }

    pub(super) fn connect(&mut self, at: usize, offer: &Offer) -> Member {
        self.try_connect(at, offer).expect("the worker grants a connection")
    }

    /// Runs iterations until it is as it should be.
    pub(super) fn until(&mut self, what: &str, is_so: impl Fn(&[Worker; 2]) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !is_so(&self.workers) {
            assert!(Instant::now() < deadline, "{what}: not within 30 s");
            self.run();
        }
    }

    /// The next reply of a client. None if the connection ends first.
    pub(super) fn reply(&mut self, member: &mut Member) -> Option<Reply> {
        let deadline = Instant::now() + Duration::from_secs(30);
        while member.replies.is_empty() && member.client.failure().is_none() {
            assert!(Instant::now() < deadline, "no reply within 30 s");
            self.run();
            member.client.receive(&mut member.replies);
        }
        // What was outstanding at the end is handed out, too.
        let reply = (!member.replies.is_empty()).then(|| member.replies.remove(0));
        reply.filter(|_| member.client.failure().is_none())
    }

    /// Runs for a while, in which no reply comes to this client.
    fn waits(&mut self, member: &mut Member) {
        for _ in 0..A_WHILE {
            self.run();
            member.client.receive(&mut member.replies);
        }
        assert!(member.replies.is_empty() && member.client.failure().is_none(), "{:?}", member.replies);
    }

    pub(super) fn open(&mut self, member: &mut Member) -> (u32, FileHandle) {
        let id = member.send(&Command::Open { flags: OPEN_READ | OPEN_WRITE, mode: 0, path: b"/v" });
        let reply = self.reply(member).expect("an answer");
        assert_eq!(reply.status, Status::OK);
        (id, FileHandle(reply.result as u32))
    }

    /// What became of these requests.
    fn outcomes(&mut self, member: &mut Member, ids: &[u32]) -> Result<Vec<Option<(i32, u64)>>, i32> {
        member.ask(ids);
        self.told(member)
    }

    /// The answer to an outcome.
    fn told(&mut self, member: &mut Member) -> Result<Vec<Option<(i32, u64)>>, i32> {
        let reply = self.reply(member).expect("an answer");
        if !reply.status.is_ok() {
            return Err(reply.status.errno);
        }
        let all = RequestOutcome::decode(&reply.body).expect("outcomes");
        assert_eq!(all.len() as u64, reply.result);
        let answer = |outcome: &RequestOutcome| {
            let answer = outcome.answer().expect("it makes sense");
            answer.map(|(status, result)| (status.errno, result))
        };
        Ok(all.iter().map(answer).collect())
    }

    pub(super) fn release(&self) {
        self.image.send(Tell::Release).expect("its thread lives");
    }

    fn counts(&self) -> crate::stats::ChannelCounts {
        self.workers[0].shared.sessions.channel_counts()
    }
}

impl Member {
    /// Its connection breaks before it can send a GOAWAY.
    fn break_off(self) {
        self.stream.shutdown(std::net::Shutdown::Both).expect("it is connected");
    }

    /// Sends a command without data. Returns its id.
    pub(super) fn send(&mut self, command: &Command<'_>) -> u32 {
        let mut body = Vec::new();
        command.encode(&mut body);
        let id = self.client.send(0, &body, Bulk::None, SendOptions::CONTROL).expect("a credit is left");
        self.client.flush();
        id.0 as u32
    }

    /// Sends a block. Returns the request's id.
    pub(super) fn write(&mut self, file: FileHandle, at: usize) -> u32 {
        self.write_as(file, at, block(at + 1))
    }

    fn write_as(&mut self, file: FileHandle, at: usize, bytes: Vec<u8>) -> u32 {
        let mut body = Vec::new();
        Command::Write { file, offset: (at * BLOCK) as u64, length: BLOCK as u32 }.encode(&mut body);
        let buffer = Buffers::One(Buffer::Owned(bytes.into()));
        let id = self.client.send(0, &body, Bulk::Out(buffer), SendOptions::PLAIN).expect("a credit is left");
        self.client.flush();
        id.0 as u32
    }

    pub(super) fn read(&mut self, file: FileHandle, at: usize) {
        let mut body = Vec::new();
        Command::Read { file, offset: (at * BLOCK) as u64, length: BLOCK as u32 }.encode(&mut body);
        let buffer = Buffers::One(Buffer::Owned(vec![0; BLOCK].into()));
        self.client.send(0, &body, Bulk::In(buffer), SendOptions::PLAIN).expect("a credit is left");
        self.client.flush();
    }

    pub(super) fn ask(&mut self, ids: &[u32]) -> u32 {
        let ids: Vec<_> = ids.iter().map(|&id| U32::new(id)).collect();
        self.send(&Command::Outcome { ids: &ids })
    }
}

pub(super) fn executing(workers: &[Worker; 2]) -> usize {
    workers.iter().map(|worker| worker.requests.in_state(State::Executing)).sum()
}

#[test]
fn a_connection_waits_for_the_requests_of_the_one_before_it_on_whichever_worker() {
    for (is_broken, to) in [(true, 0), (true, 1), (false, 0), (false, 1)] {
        let mut pair = pair(false);
        let mut old = pair.connect(0, &offer(1, 1));
        let (opened, file) = pair.open(&mut old);
        assert_eq!(opened & 0xffff, 0, "the write has the same slot");
        let written = old.write(file, 7);
        pair.until("the image has it", |workers| executing(workers) == 1);
        let mut kept = Some(old);
        if is_broken {
            kept = None;
        }
        let mut new = pair.connect(to, &offer(1, 2));
        new.ask(&[opened, written, 0x7_0001]);
        pair.waits(&mut new);
        assert_eq!(pair.counts().orphans, 1);
        if let Some(old) = &mut kept {
            assert!(pair.reply(old).is_none(), "it is closed");
        }

        // Nothing else waits.
        let mut other = pair.connect(to, &offer(2, 1));
        pair.open(&mut other);

        pair.release();
        let expected = [None, Some((0, BLOCK as u64)), None];
        assert_eq!(pair.told(&mut new).unwrap(), expected, "broken: {is_broken}, to worker {to}");
        new.send(&Command::Stat(file));
        assert!(pair.reply(&mut new).is_some(), "its requests run");
        new.write(file, 7);
        assert_eq!(pair.reply(&mut new).unwrap().status, Status::OK, "by the handle of the old one");
        let counts = pair.counts();
        assert_eq!((counts.orphans, counts.resumed, counts.fenced), (0, 1, u64::from(!is_broken)));
    }
}

#[test]
fn what_was_cancelled_because_its_connection_broke_was_not_executed() {
    let mut pair = pair(true);
    let mut old = pair.connect(0, &offer(1, 1));
    let (_, file) = pair.open(&mut old);
    let written = old.write(file, 7);
    pair.until("the image has it", |workers| executing(workers) == 1);
    drop(old);
    let mut new = pair.connect(1, &offer(1, 2));
    assert_eq!(pair.outcomes(&mut new, &[written]), Ok(vec![None]));
}

#[test]
fn an_open_whose_answer_was_lost_has_a_handle_for_the_next_connection() {
    let mut pair = pair(true);
    pair.release();
    let mut old = pair.connect(0, &offer(1, 1));
    let (opened, file) = pair.open(&mut old);
    old.break_off();
    let mut new = pair.connect(1, &offer(1, 2));
    assert_eq!(pair.outcomes(&mut new, &[opened]), Ok(vec![Some((0, file.0.into()))]));
    new.write(file, 0);
    assert_eq!(pair.reply(&mut new).unwrap().status, Status::OK);
}

#[test]
fn what_was_answered_is_known_however_often_the_client_comes_back() {
    let mut pair = pair(true);
    pair.release();
    let mut old = pair.connect(0, &offer(1, 1));
    let (_, file) = pair.open(&mut old);
    let written = old.write(file, 7);
    assert_eq!(pair.reply(&mut old).unwrap().status, Status::OK);
    old.break_off();
    for epoch in 2..6 {
        let mut new = pair.connect(epoch as usize % 2, &offer(1, epoch));
        let expected = Ok(vec![Some((0, BLOCK as u64))]);
        assert_eq!(pair.outcomes(&mut new, &[written]), expected);
        assert_eq!(pair.outcomes(&mut new, &[written]), expected, "it may ask again");
        new.break_off();
    }
}

#[test]
fn what_was_answered_is_known_if_there_was_nothing_to_do() {
    let mut pair = pair(true);
    let mut old = pair.connect(0, &offer(1, 1));
    let (_, file) = pair.open(&mut old);
    let ids = [
        old.send(&Command::Write { file, offset: 0, length: 0 }),
        old.send(&Command::WriteZeroes { file, offset: 0, length: 0 }),
        old.send(&Command::Discard { file, offset: SIZE, length: 0 }),
    ];
    for _ in ids {
        assert_eq!(pair.reply(&mut old).unwrap().status, Status::OK);
    }
    old.break_off();
    let mut new = pair.connect(1, &offer(1, 2));
    assert_eq!(pair.outcomes(&mut new, &ids), Ok(vec![Some((0, 0)); ids.len()]));
}

#[test]
fn an_epoch_that_is_not_higher_is_rejected() {
    let mut pair = pair(true);
    let _new = pair.connect(0, &offer(1, 5));
    for epoch in [1, 5] {
        let error = pair.try_connect(1, &offer(1, epoch)).err().expect("it is rejected");
        let raio_transport::Error::Rejected { status, text } = error else { panic!("{error}") };
        assert_eq!(status.errno, libc::ESTALE);
        assert!(text.contains("epoch 5"), "{text}");
    }
    assert_eq!(pair.counts().stale, 2);
}

/// Has a connection already.
struct Dialed(Option<TcpClient>, u64);

impl Dialing for Dialed {
    fn step(&mut self, _: Instant) -> Option<Result<Reached, raio_transport::Error>> {
        self.0.take().map(|client| Ok(Reached { transport: Box::new(client), why_tcp: None }))
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn step_by(&self) -> Instant {
        Instant::now()
    }

    fn epoch(&self) -> Option<u64> {
        Some(self.1)
    }
}

/// A program makes a context whose first connection has this epoch, and reads from a file that it has open.
fn begins_with_files(
    pair: &mut Pair,
    number: u8,
    epoch: u64,
    file: FileHandle,
    identity: [u8; 16],
) -> Status {
    let offer = offer(number, epoch);
    let mut dialed = Some(pair.connect(0, &offer).client);
    let dialer: Dialer = Box::new(move |_, _, _| Box::new(Dialed(dialed.take(), epoch)));
    let files = Arc::new(OpenFiles::default());
    files.insert(file, Reopenable { flags: OPEN_READ, path: b"/v"[..].into(), identity });
    let settings = Settings {
        divides: false,
        window: LINGER,
        redo: false,
        connect_timeout: LINGER,
        request_timeout: None,
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut beginning = Beginning::new(dialer, offer, UsedIds::default(), settings, files, deadline);
    let mut channel = loop {
        pair.run();
        if let Some(begun) = beginning.step() {
            break begun.expect("the server knows the client");
        }
    };
    let mut body = Vec::new();
    Command::Read { file, offset: 0, length: 0 }.encode(&mut body);
    channel.send(0, &body, Bulk::None, SendOptions::PLAIN).expect("a credit is left");
    channel.flush();
    let mut replies = Vec::new();
    while replies.is_empty() {
        assert!(Instant::now() < deadline, "no reply within 30 s");
        pair.run();
        channel.receive(&mut replies);
    }
    replies[0].status
}

#[test]
fn a_channel_begins_with_the_files_of_a_session_that_had_ended_whichever_attempt_succeeds() {
    let mut pair = pair(true);
    pair.release();
    let mut earlier = pair.connect(0, &offer(1, 1));
    earlier.send(&Command::Open { flags: OPEN_READ, mode: 0, path: b"/v" });
    let opened = pair.reply(&mut earlier).expect("an answer");
    let (file, identity) =
        (FileHandle(opened.result as u32), FileStatus::decode(&opened.body).expect("a status").identity);
    // The session has ended: others have no such file.
    assert_eq!(begins_with_files(&mut pair, 2, 1, file, identity), Status::OK);
    assert_eq!(begins_with_files(&mut pair, 3, 2, file, identity), Status::OK);
    // An attempt to connect that failed has made the channel known.
    pair.connect(0, &offer(4, 1)).break_off();
    assert_eq!(begins_with_files(&mut pair, 4, 2, file, identity), Status::OK);
}

#[test]
fn of_a_channel_that_is_not_known_nothing_is_told() {
    let mut pair = pair(true);
    let mut new = pair.connect(0, &offer(1, 2));
    assert_eq!(pair.outcomes(&mut new, &[1, 2]), Err(libc::ESTALE));
    pair.open(&mut new);
}

#[test]
fn a_client_that_has_not_heard_that_its_channel_is_not_known_is_told_again() {
    let mut pair = pair(true);
    pair.release();
    for epoch in 2..5 {
        let mut new = pair.connect(epoch as usize % 2, &offer(1, epoch));
        assert_eq!(pair.outcomes(&mut new, &[1]), Err(libc::ESTALE), "the last answer may have been lost");
        new.break_off();
    }
    let mut new = pair.connect(0, &offer(1, 5));
    assert_eq!(pair.outcomes(&mut new, &[1]), Err(libc::ESTALE));
    let (opened, file) = pair.open(&mut new);
    new.break_off();
    let mut new = pair.connect(1, &offer(1, 6));
    assert_eq!(pair.outcomes(&mut new, &[opened]), Ok(vec![Some((0, file.0.into()))]));
}

#[test]
fn a_client_that_asks_again_has_heard_that_its_channel_is_not_known() {
    let mut pair = pair(true);
    pair.release();
    let mut new = pair.connect(0, &offer(1, 5));
    assert_eq!(pair.outcomes(&mut new, &[1]), Err(libc::ESTALE));
    assert_eq!(pair.outcomes(&mut new, &[]), Ok(vec![]));
    new.break_off();
    let mut new = pair.connect(1, &offer(1, 6));
    assert_eq!(pair.outcomes(&mut new, &[1]), Ok(vec![None]), "it was sent after that, and has not come");
}

#[test]
fn nothing_runs_before_the_outcome_is_answered() {
    let mut pair = pair(false);
    let mut old = pair.connect(0, &offer(1, 1));
    let (_, file) = pair.open(&mut old);
    let written = old.write(file, 7);
    pair.until("the image has it", |workers| executing(workers) == 1);
    let mut epoch = 1;
    for is_asked in [false, true] {
        for command in [Command::Stat(file), Command::Close(file), Command::Outcome { ids: &[] }] {
            if !is_asked && command.opcode() == Opcode::Outcome {
                continue;
            }
            epoch += 1;
            let mut new = pair.connect(1, &offer(1, epoch));
            if is_asked {
                new.ask(&[]);
            }
            new.send(&command);
            assert!(pair.reply(&mut new).is_none(), "{command:?} does not close it");
        }
    }
    let mut new = pair.connect(1, &offer(1, epoch + 1));
    let asked = new.ask(&[written]);
    new.send(&Command::Cancel { id: asked.into() });
    let [outcome, cancel] = [0, 1].map(|_| pair.reply(&mut new).unwrap().status.errno);
    assert_eq!((outcome, cancel), (libc::ECANCELED, 0));
    let timers = pair.workers[1].reactor.timers();
    for _ in 0..50 {
        let asked = new.ask(&[written]);
        new.send(&Command::Cancel { id: asked.into() });
        (0..2).for_each(|_| _ = pair.reply(&mut new).unwrap());
    }
    assert!(pair.workers[1].reactor.timers() <= timers, "who asks again and again gets no more timers");
    new.ask(&[written]);
    pair.waits(&mut new);
    pair.release();
    assert_eq!(pair.told(&mut new), Ok(vec![Some((0, BLOCK as u64))]));
}

#[test]
fn a_session_that_was_given_up_is_over_before_the_next_one_begins() {
    let mut pair = pair(false);
    let mut old = pair.connect(0, &offer(1, 1));
    let (_, file) = pair.open(&mut old);
    old.write(file, 7);
    pair.until("the image has it", |workers| executing(workers) == 1);
    let gone = SessionId([9; 16]);
    let mut new = pair.connect(1, &Offer { supersedes: vec![SessionId([1; 16]), gone], ..offer(2, 1) });
    new.ask(&[]);
    pair.waits(&mut new);
    assert!(pair.reply(&mut old).is_none(), "it is closed");
    assert!(pair.try_connect(0, &offer(1, 2)).is_err(), "and nobody joins its session");
    pair.release();
    assert_eq!(pair.told(&mut new), Ok(vec![]));
    assert_eq!(pair.workers[0].shared.sessions.len(), 1);
    pair.open(&mut new);
}

#[test]
fn a_recorded_request_names_a_slot_if_its_connection_has_a_channel() {
    let mut pair = pair(true);
    let mut member = pair.connect(0, &Offer { queue_depth: 1, ..offer(1, 1) });
    pair.open(&mut member);
    let connection = &mut pair.workers[0].connections[0];
    assert!(connection.outcomes.is_some());
    assert_eq!(connection.queue_depth, 1);
    assert!(pair.workers[0].has_slot(0, 0x5_0001) && !pair.workers[0].has_slot(0, 0x5_0002));
    assert!(!pair.workers[0].has_slot(0, 1 << 32));
}

/// A client writes a block and goes, while the image has it.
fn left_behind(at: usize) -> Pair {
    let mut pair = pair(false);
    let mut old = pair.connect(0, &offer(1, 1));
    let (_, file) = pair.open(&mut old);
    old.write_as(file, at, vec![b'o'; BLOCK]);
    pair.until("the image has it", |workers| executing(workers) == 1);
    drop(old);
    pair.until("it has gone", |workers| workers[0].connections.none_is_open());
    pair
}

#[test]
fn a_change_waits_for_what_a_client_that_has_gone_has_left_behind() {
    for to in [0, 1] {
        let mut pair = left_behind(7);
        let (mut new, mut other) = (pair.connect(to, &offer(2, 1)), pair.connect(to, &offer(3, 1)));
        let [file, of_other] = [pair.open(&mut new).1, pair.open(&mut other).1];
        new.write_as(file, 7, vec![b'N'; BLOCK]);
        pair.waits(&mut new);
        assert_eq!(pair.workers[to].held.len(), 1);
        other.write(of_other, 8);
        other.read(of_other, 7);
        pair.until("what does not overlap, and reads, go on", |workers| executing(workers) == 3);
        pair.release();
        assert_eq!(pair.reply(&mut new).unwrap().status, Status::OK);
        new.read(file, 7);
        let reply = pair.reply(&mut new).unwrap();
        let Bulk::In(Buffers::One(Buffer::Owned(bytes))) = &reply.bulk else { panic!("it had a buffer") };
        assert!(bytes.iter().all(|&byte| byte == b'N'), "the old bytes came later, to worker {to}");
        assert_eq!(pair.workers[0].shared.orphan_guard.len(), 0);
    }
}

#[test]
fn a_request_that_is_held_back_can_be_cancelled_and_ends_with_its_connection() {
    let mut pair = left_behind(7);
    let mut new = pair.connect(1, &offer(2, 1));
    let (_, file) = pair.open(&mut new);
    let discard = Command::Discard { file, offset: 0, length: SIZE };
    let id = new.send(&discard);
    pair.waits(&mut new);
    new.send(&Command::Cancel { id: id.into() });
    let [cancelled, cancel] = [0, 1].map(|_| pair.reply(&mut new).unwrap().status.errno);
    assert_eq!((cancelled, cancel), (libc::ECANCELED, 0));
    new.send(&discard);
    pair.until("it is held", |workers| workers[1].held.len() == 1);
    drop(new);
    pair.until("nothing is left", |workers| workers[1].requests.is_empty());
    assert!(pair.workers[1].held.is_empty());
    pair.release();
    pair.until("nothing is left behind", |workers| executing(workers) == 0);
}

#[test]
fn operations_of_a_group_that_was_not_granted_are_answered_and_never_executed() {
    let mut pair = pair(true);
    pair.release();
    let mut old = pair.connect(0, &Offer { features: FEATURE_CRC, ..offer(1, 1) });
    let (_, FileHandle(file)) = pair.open(&mut old);
    let grouped: Vec<_> = OPERATIONS.iter().filter(|operation| !operation.is_granted(0)).collect();
    assert!(!grouped.is_empty());
    let send = |member: &mut Member, operation: &Operation| {
        let data = || Buffers::One(Buffer::Owned(vec![0; 512].into()));
        let bulk = match operation.direction {
            Direction::None => Bulk::None,
            Direction::ToClient => Bulk::In(data()),
            Direction::ToServer => Bulk::Out(data()),
        };
        let has_data = operation.direction != Direction::None;
        let length = if has_data { 512 } else { SIZE };
        let mut body = Vec::new();
        match operation.layout {
            Layout::Path(PathFields { length, other, .. }) => Command::Path(PathCommand {
                length: if length && has_data { 512 } else { 0 },
                other: if other { b"/v" } else { b"" },
                ..PathCommand::new(operation.opcode, b"/v")
            })
            .encode(&mut body),
            Layout::Own => {
                let (source, destination) = (FileHandle(file), FileHandle(file));
                Command::Copy { source, offset: 0, length, destination, destination_offset: SIZE }
                    .encode(&mut body);
            }
            Layout::Fields(fields) => {
                body.resize(24, 0);
                body[..2].copy_from_slice(&(operation.opcode as u16).to_le_bytes());
                if operation.opcode != Opcode::ListNext {
                    body[4..8].copy_from_slice(&file.to_le_bytes());
                }
                if fields.length {
                    body[16..].copy_from_slice(&length.to_le_bytes());
                }
            }
        }
        let id = member
            .client
            .send(operation.opcode as u64, &body, bulk, SendOptions::PLAIN)
            .expect("a credit is left");
        member.client.flush();
        id.0 as u32
    };
    let mut ids = Vec::new();
    for operation in &grouped {
        ids.push(send(&mut old, operation));
        let reply = pair.reply(&mut old).expect("the connection goes on");
        assert_eq!((reply.tag, reply.status), (operation.opcode as u64, Status::protocol(libc::EOPNOTSUPP)));
        let text = message::text(&reply.body);
        assert!(text.contains(operation.name) && text.contains(operation.group.name()), "{text}");
    }
    assert_eq!(pair.workers[0].requests.len(), 0);
    old.break_off();
    let mut new = pair.connect(1, &offer(1, 2));
    assert_eq!(pair.outcomes(&mut new, &ids), Ok(vec![None; ids.len()]));
    // This connection was granted them. What the image has nothing for is the storage's failure.
    for operation in &grouped {
        send(&mut new, operation);
        let status = pair.reply(&mut new).expect("an answer").status;
        let is_known = [libc::EOPNOTSUPP, libc::ESTALE].map(Status::storage).contains(&status);
        assert!(status.is_ok() || is_known, "{}: {status:?}", operation.name);
    }
}
