//! The whole server: a worker with its commands, sessions and exports, and several clients whose messages,
//! resets and pauses the input chooses, on a clock that the input turns.
//!
//! `server_session` has one hostile stream below the commands; here most messages are well-formed, and what
//! matters is what they do together. All of it runs in this thread. The worker's blocking operations run when
//! the input says so and in the order that it says, so an input always does the same.
//!
//! Each answer belongs to one request of its connection. A read gives bytes that the file may have by the
//! writes before and beside it: never one of another file, or of what a slot was used for before. Who keeps
//! the protocol is not closed, and is answered in the end. When all clients have gone nothing of them is
//! left, and the next client is served.
//!
//! Clients may have channels: what they do not get answered on one connection they ask for on the next. What
//! the server says then is what has become of it: what was answered is known, what "was not executed" never
//! is, and nothing of an earlier connection happens any more.

#![no_main]

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use raio_fuzz::{Input, handshake_len, mend_handshake, mend_messages, step};
use raio_server::{InUse, TestWorker};
use raio_transport::Status;
use raio_transport::handshake::{ChannelOffer, Offer};
use raio_transport::message::{
    self, FEATURE_CRC, Limits, Message, Parsed, RemoteRegion, RequestHeader, ResponseHeader, SessionId,
    Welcome, data_crc, parse, parse_handshake,
};
use raio_transport::protocol::path::PathCommand;
use raio_transport::protocol::{
    Command, Direction, FLAG_EXCLUSIVE, FLAG_REMOVE, FLAG_SET_MODE, FLAG_SET_SIZE, FLAG_SET_TIME, FileHandle,
    FileStatus, Layout, OPEN_CREATE, OPEN_EXCLUSIVE, OPEN_READ, OPEN_TRUNCATE, OPEN_WRITE,
    OPERATION_FEATURES, OPERATIONS, Opcode, Operation, RequestOutcome,
};
use zerocopy::little_endian::U32;

/// An operation on a path. What it changes lies apart from the files that the model knows.
fn path_command<'a>(operation: &'static Operation, kind: u8, input: &mut Input<'_>) -> PathCommand<'a> {
    const CHANGED: [&[u8]; 6] = [b"/dir/n", b"/dir/n/x", b"/dir/n/y", b"/dir/n/x/", b"/dir/n/..", b"/ro/n"];
    const LOOKED_AT: [&[u8]; 8] =
        [b"/", b"/dir", b"/dir/n", b"/dir/n/x", b"/dir/a", b"/ro/a", b"/mem", b"/one"];
    let Layout::Path(fields) = operation.layout else { unreachable!("it is on a path") };
    let changed = |input: &mut Input<'_>| CHANGED[input.index(CHANGED.len())];
    let path = if operation.is_recorded { changed(input) } else { LOOKED_AT[input.index(LOOKED_AT.len())] };
    let flags = operation.flags & u16::from(input.byte());
    let has = |flag: u16| operation.flags & flag == 0 || flags & flag != 0;
    let removes = operation.opcode == Opcode::SetXattr && flags & FLAG_REMOVE != 0;
    let length = u64::from(input.byte()) * 40;
    PathCommand {
        flags: if removes { flags & !FLAG_EXCLUSIVE } else { flags },
        mode: if fields.mode && has(FLAG_SET_MODE) { 0o755 } else { 0 },
        length: if fields.length && has(FLAG_SET_SIZE) && !removes { length } else { 0 },
        modified_ns: if fields.time && has(FLAG_SET_TIME) { i64::from(kind) } else { 0 },
        other: match operation.opcode {
            _ if !fields.other => b"",
            Opcode::Rename | Opcode::Link => changed(input),
            Opcode::Symlink => b"x",
            _ => b"user.a",
        },
        ..PathCommand::new(operation.opcode, path)
    }
}

const CONNECTIONS_MAX: usize = 4;
const SESSIONS_MAX: usize = 6;
/// The most that the server keeps a channel for.
const LINGER: Duration = Duration::from_secs(20);
/// The most ids in one outcome request of a client that keeps the protocol.
const ASKED_MAX: usize = 16;
const STEPS_MAX: usize = 400;
/// No file is larger.
const FILE_BYTES: usize = 32 << 10;
/// What slots are full of before they are used.
const STALE: u8 = 0xee;
/// How long the server may take until nothing of its clients is left, in steps of [`END_STEP`].
const END_STEPS: usize = 200;
const END_STEP: Duration = Duration::from_millis(500);

thread_local! {
    /// Made once: what an input leaves behind, the next one finds.
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

fuzz_target!(|input: &[u8]| {
    WORLD.with_borrow_mut(|world| world.get_or_insert_with(World::new).run(&mut Input(input)));
});

// What files may hold
// ----------------------------------------------------------------------------------------------------------

/// Which file it is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Identity {
    /// Device and inode.
    Inode(u64, u64),
    /// An export that is no file.
    Export(Vec<u8>),
}

struct FileModel {
    identity: Identity,
    /// Which values each byte may have: bit N for the values that are N modulo 64.
    possible: Vec<u64>,
    /// It is at least so large.
    size_min: usize,
}

struct PendingWrite {
    /// Of the client.
    session: usize,
    file: usize,
    start: usize,
    /// The bits of its bytes.
    bits: Vec<u64>,
    /// Others that overlap were under way at the same time, so it may have come before them.
    is_disputed: bool,
}

struct PendingRead {
    file: usize,
    start: usize,
    /// Which values each byte may have.
    possible: Vec<u64>,
    size_min: usize,
}

/// What the files may hold, by what was asked and answered so far.
#[derive(Default)]
struct Model {
    files: Vec<FileModel>,
    /// By the request's number. What was never answered stays: it may be carried out at any time.
    writes: HashMap<u64, PendingWrite>,
    reads: HashMap<u64, PendingRead>,
    /// Opens that may make a file empty. Which one shows when they are answered.
    truncations: usize,
    /// A file was written to that is not known: contents are not checked any more.
    is_loose: bool,
}

fn bit(value: u8) -> u64 {
    1 << (value & 63)
}

/// What a write puts there: values that are the file's own, and no stale one's.
fn content(file: usize, serial: u64, offset: u64, len: usize) -> Vec<u8> {
    const FIRST: [u8; 7] = [1, 9, 17, 25, 33, 47, 55];
    let value = |at: u64| FIRST[file % FIRST.len()] + ((serial * 3 + at / 16) % 8) as u8;
    (0..len as u64).map(|at| value(offset.wrapping_add(at))).collect()
}

/// The part of a range that is within every file.
fn clipped(offset: u64, len: u64) -> (usize, usize) {
    let end = offset.saturating_add(len).min(FILE_BYTES as u64) as usize;
    let start = (offset.min(FILE_BYTES as u64) as usize).min(end);
    (start, end - start)
}

/// The common part of two ranges: where it begins in each of them, and its length.
fn overlap(a: usize, a_len: usize, b: usize, b_len: usize) -> Option<(usize, usize, usize)> {
    let (start, end) = (a.max(b), (a + a_len).min(b + b_len));
    (start < end).then(|| (start - a, start - b, end - start))
}

fn add_bits(to: &mut [u64], bits: &[u64]) {
    to.iter_mut().zip(bits).for_each(|(to, bits)| *to |= bits);
}

impl Model {
    fn file(&mut self, identity: Identity, size: usize) -> usize {
        if let Some(at) = self.files.iter().position(|file| file.identity == identity) {
            return at;
        }
        let size_min = if matches!(identity, Identity::Export(_)) { size } else { 0 };
        self.files.push(FileModel { identity, possible: vec![bit(0); FILE_BYTES], size_min });
        self.files.len() - 1
    }

    /// Whether nothing that is written to it stays.
    fn is_null(&self, file: usize) -> bool {
        self.files[file].identity == Identity::Export(b"null".to_vec())
    }

    /// Bytes with these bits are to be written there.
    fn begin_write(&mut self, number: u64, session: usize, file: usize, start: usize, bits: Vec<u64>) {
        if self.is_null(file) {
            return;
        }
        let mut is_disputed = self.truncations > 0;
        for other in self.writes.values_mut().filter(|other| other.file == file) {
            if overlap(start, bits.len(), other.start, other.bits.len()).is_some() {
                is_disputed = true;
                other.is_disputed = true;
            }
        }
        for read in self.reads.values_mut().filter(|read| read.file == file) {
            if let Some((at, of, len)) = overlap(read.start, read.possible.len(), start, bits.len()) {
                add_bits(&mut read.possible[at..at + len], &bits[of..of + len]);
            }
        }
        self.writes.insert(number, PendingWrite { session, file, start, bits, is_disputed });
    }

    /// The first `done` bytes have been written; others may have been.
    fn end_write(&mut self, number: u64, done: usize, grows: bool) {
        let Some(PendingWrite { file, start, bits, is_disputed, .. }) = self.writes.remove(&number) else {
            return;
        };
        let file = &mut self.files[file];
        for (at, &bits) in bits.iter().enumerate() {
            let possible = &mut file.possible[start + at];
            *possible = if at < done && !is_disputed { bits } else { *possible | bits };
        }
        if grows && done > 0 && !is_disputed {
            file.size_min = file.size_min.max(start + done.min(bits.len()));
        }
    }

    /// The write was not executed, and never will be.
    fn forget_write(&mut self, number: u64) {
        self.writes.remove(&number);
    }

    /// Nothing that these have asked for is carried out any more. It may have been.
    fn end_writes_of(&mut self, is_theirs: impl Fn(usize) -> bool) {
        let theirs: Vec<u64> = self
            .writes
            .iter()
            .filter(|(_, write)| is_theirs(write.session))
            .map(|(&number, _)| number)
            .collect();
        theirs.into_iter().for_each(|number| self.end_write(number, 0, false));
    }

    fn begin_read(&mut self, number: u64, file: usize, start: usize, len: usize) {
        let mut possible = self.files[file].possible[start..start + len].to_vec();
        for write in self.writes.values().filter(|write| write.file == file) {
            if let Some((at, of, len)) = overlap(start, len, write.start, write.bits.len()) {
                add_bits(&mut possible[at..at + len], &write.bits[of..of + len]);
            }
        }
        let size_min = self.files[file].size_min;
        self.reads.insert(number, PendingRead { file, start, possible, size_min });
    }

    /// A read of `wanted` bytes has brought these.
    fn end_read(&mut self, number: u64, data: &[u8], wanted: usize, may_be_short: bool) {
        let Some(PendingRead { file, start, possible, size_min }) = self.reads.remove(&number) else {
            return;
        };
        if self.is_loose {
            return;
        }
        let name = &self.files[file].identity;
        for (at, (&byte, &possible)) in data.iter().zip(&possible).enumerate() {
            assert!(
                possible & bit(byte) != 0,
                "byte {} of {name:?} is {byte:#x}, and may be {possible:#x}",
                start + at
            );
        }
        assert!(
            may_be_short || data.len() == wanted || start + data.len() >= size_min,
            "a read of {wanted} bytes at {start} of {name:?} has brought {}, and it has {size_min}",
            data.len()
        );
    }

    /// Any file may become empty from now on; or the one that has may be any.
    fn truncate(&mut self) {
        for file in self.files.iter_mut().filter(|file| matches!(file.identity, Identity::Inode(..))) {
            file.possible.iter_mut().for_each(|possible| *possible |= bit(0));
            file.size_min = 0;
        }
        let names: Vec<_> =
            self.files.iter().map(|file| matches!(file.identity, Identity::Inode(..))).collect();
        for read in self.reads.values_mut().filter(|read| names[read.file]) {
            read.possible.iter_mut().for_each(|possible| *possible |= bit(0));
            read.size_min = 0;
        }
        self.writes.values_mut().filter(|write| names[write.file]).for_each(|write| write.is_disputed = true);
    }
}

// Clients
// ----------------------------------------------------------------------------------------------------------

/// What was asked for.
#[derive(Debug)]
enum Asked {
    Open {
        path: Vec<u8>,
        flags: u32,
    },
    Reopen {
        path: Vec<u8>,
        flags: u32,
        handle: FileHandle,
    },
    Close(FileHandle),
    Outcome(Vec<u32>),
    /// An operation that was not granted.
    NotGranted,
    Read {
        found: Found,
        length: u32,
    },
    Write {
        found: Found,
        grows: bool,
    },
    /// What may bring this number of bytes that the model does not know.
    Brings(u32),
    Other,
    /// What a broken client says.
    Broken,
}

#[derive(Debug)]
struct Outstanding {
    id: u64,
    number: u64,
    asked: Asked,
    is_cancelled: bool,
}

/// A request whose end the server records.
#[derive(Debug)]
struct Recorded {
    id: u32,
    number: u64,
    /// Of the connection that it was sent on.
    epoch: u64,
    grows: bool,
    /// How it was answered.
    answer: Option<(Status, u64)>,
}

/// A channel, as its client knows it.
struct Channel {
    session: usize,
    number: u32,
    /// The highest that was offered.
    epoch: u64,
    /// A damaged hello may have offered a higher one.
    is_epoch_known: bool,
    /// For how long it is kept.
    linger: Duration,
    /// How long it has been without a connection that is whole.
    lost_for: Duration,
    /// The server may not know it.
    may_be_gone: bool,
    /// The last request of each slot that was sent completely.
    slots: BTreeMap<u32, Recorded>,
    /// The next request's id has this.
    generation: u16,
}

/// A file that a session has opened.
struct Opened {
    handle: FileHandle,
    path: Vec<u8>,
    flags: u32,
    identity: [u8; 16],
}

/// Whether a client must ask what became of earlier requests before it may ask for anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MustAsk {
    No,
    Yes,
    /// It has, by the request with this id.
    Asked(u64),
}

struct Client {
    stream: UnixStream,
    session: usize,
    /// The index of its channel, and its epoch.
    channel: Option<(usize, u64)>,
    /// Sessions that it has superseded.
    supersedes: Vec<usize>,
    must_ask: MustAsk,
    /// How many requests of earlier connections it asks about when it has had its welcome; None: not at all.
    asks: Option<usize>,
    /// Nothing can have made its epoch obsolete.
    is_fresh: bool,
    /// Ids of requests that are not answered.
    ids: Vec<u64>,
    queue_depth: u32,
    features: u64,
    /// What it may send: it has had its welcome.
    limits: Option<Limits>,
    credits: usize,
    next_id: u64,
    /// Encoded and not yet sent.
    unsent: Vec<u8>,
    /// It keeps so many bytes of that back.
    kept_back: usize,
    /// Sent, of a message that is not yet complete.
    sent: Vec<u8>,
    received: Vec<u8>,
    /// The request that it is sending has been answered: it failed whatever its data.
    early: Option<u64>,
    /// The file that it writes to by the request that it is sending.
    half: Option<Found>,
    /// Requests that are complete, oldest first.
    outstanding: Vec<Outstanding>,
    /// It takes what is sent to it.
    reads: bool,
    has_keepalive: bool,
    /// The server has no reason to close it.
    is_good: bool,
    /// It was told that nothing is known of its channel.
    was_told: bool,
    /// It has ended the conversation, or broken the protocol: not all it asked for need be answered.
    has_ended: bool,
    /// What it has sent cannot be read from here on.
    is_garbled: bool,
}

impl Client {
    fn crc(&self) -> bool {
        self.limits.is_some_and(|limits| limits.crc)
    }

    /// It stops at a place where the server waits for more, or keeps the server waiting.
    fn is_slow(&self) -> bool {
        self.limits.is_none() || !self.reads || !self.unsent.is_empty() || !self.sent.is_empty()
    }

    /// Whether it has sent a part of this request.
    fn is_sending(&self, id: u64) -> bool {
        let begun = self.limits.and_then(|limits| parse(&self.sent, &limits).ok());
        matches!(begun, Some(Parsed::Item(Message::Request(header, _), _)) if header.id == id)
    }

    /// A file is being opened: handles that nobody was given may stand for something when its requests get
    /// there. Returns whether it writes by one.
    fn may_find_more(&mut self) -> bool {
        let mut writes = false;
        if self.half == Some(Found::Nothing) {
            self.half = Some(Found::Unknown);
        }
        for Outstanding { asked, .. } in &mut self.outstanding {
            if let Asked::Read { found: found @ Found::Nothing, .. }
            | Asked::Write { found: found @ Found::Nothing, .. } = asked
            {
                *found = Found::Unknown;
                writes |= matches!(asked, Asked::Write { .. });
            }
        }
        writes
    }

    /// Whether a request of it makes no sense, comes too early, or has an id that it must not have.
    fn breaks_rules(&self, header: &RequestHeader, body: &[u8]) -> bool {
        let Some(command) = sensible(header, body) else { return true };
        let is_recorded = command.opcode().operation().is_recorded;
        self.outstanding.iter().any(|other| other.id == header.id)
            || self.is_too_early(header.id, &command)
            || (is_recorded && !self.has_slot(header.id))
    }

    fn breaks(&mut self) {
        (self.is_good, self.has_ended) = (false, true);
    }

    /// The server has no reason to close it, and has let it in.
    fn is_whole(&self) -> bool {
        self.limits.is_some() && self.is_good
    }

    /// Whether it may not send this command yet.
    fn is_too_early(&self, id: u64, command: &Command<'_>) -> bool {
        match (self.must_ask, command) {
            (MustAsk::No, _) | (_, Command::Cancel { .. }) => false,
            (MustAsk::Asked(asked), Command::Outcome { .. }) => id != asked,
            (MustAsk::Yes | MustAsk::Asked(_), _) => true,
        }
    }

    /// Whether a recorded request of it may have this id.
    fn has_slot(&self, id: u64) -> bool {
        self.channel.is_none() || (id <= u64::from(u32::MAX) && id & 0xffff <= u64::from(self.queue_depth))
    }
}

/// The command of a request, if it makes sense, and agrees with the request's header.
fn sensible<'a>(header: &RequestHeader, body: &'a [u8]) -> Option<Command<'a>> {
    let agrees = |command: &Command<'_>| {
        command.read_length() == header.region_in_len()
            && command.write_length() == header.data_out_len()
            && !matches!(header.region, RemoteRegion::Out { .. })
    };
    Command::decode(body).ok().filter(agrees)
}

/// What a handle stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// A file, open for reading, for writing, or for both: `OPEN_*`.
    File(usize, u32),
    /// Nothing: nobody was given it.
    Nothing,
    /// It cannot be told.
    Unknown,
}

impl Found {
    /// Whether the file may be open for this.
    fn may(self, access: u32) -> bool {
        match self {
            Self::File(_, flags) => flags & access != 0,
            Self::Nothing => false,
            Self::Unknown => true,
        }
    }
}

/// A session, as its clients know it.
struct Session {
    id: SessionId,
    /// Which file each handle is of, and what for.
    files: HashMap<u32, (usize, u32)>,
    /// Opens that are not answered.
    opens: usize,
    /// An answer to one was never seen, or the server may have ended the session in between.
    is_unsure: bool,
    /// What it has opened, on any server.
    opened: Vec<Opened>,
    /// Which server it was last connected to.
    server: u64,
    is_superseded: bool,
}

impl Session {
    fn new(id: SessionId, server: u64) -> Self {
        let (files, opened) = (HashMap::new(), Vec::new());
        Self { id, files, opens: 0, is_unsure: false, opened, server, is_superseded: false }
    }

    fn file(&self, handle: FileHandle) -> Found {
        match self.files.get(&handle.0) {
            _ if self.opens > 0 || self.is_unsure => Found::Unknown,
            Some(&(file, flags)) => Found::File(file, flags),
            None => Found::Nothing,
        }
    }

    /// One of its handles.
    fn handle(&self, input: &mut Input<'_>) -> FileHandle {
        let mut all: Vec<_> = self.files.keys().copied().collect();
        all.sort_unstable();
        match usize::from(input.byte()) {
            255 => FileHandle(input.u64() as u32),
            at => FileHandle(all.get(at % all.len().max(1)).copied().unwrap_or(1 << 20)),
        }
    }
}

struct World {
    directory: PathBuf,
    server: TestWorker,
    sessions: Vec<Session>,
    /// The latest session of each number that inputs have for one.
    current: [Option<usize>; 4],
    channels: Vec<Channel>,
    clients: Vec<Client>,
    model: Model,
    /// How often the server was started again.
    restarts: u64,
    /// Numbers the requests of all clients.
    numbers: u64,
    is_draining: bool,
    /// The last response that has come.
    last: Option<ResponseHeader>,
    buffer: Box<[u8]>,
}

/// What a server says became of a request, beside how it was answered.
fn check_outcome(said: Option<(Status, u64)>, answered: Option<(Status, u64)>, id: u32) {
    match (said, answered) {
        (None, Some((status, _))) => assert!(!status.is_ok(), "{id:#x} was answered, and is not known"),
        (Some((said, result)), Some((status, answered))) => {
            assert_eq!((said.errno, said.class, result), (status.errno, status.class, answered), "{id:#x}");
        }
        (_, None) => {}
    }
}

/// Which file a path is of, by its status; and what the server tells it by.
fn identity_of(path: &[u8], body: &[u8]) -> (Identity, [u8; 16]) {
    let status = FileStatus::decode(body).expect("a status");
    let name = path.split(|&byte| byte == b'/').find(|name| !name.is_empty());
    match name.expect("the path of an export") {
        // What is behind these is no file of the server's.
        name @ (b"mem" | b"null") => (Identity::Export(name.to_vec()), status.identity),
        _ => (Identity::Inode(status.device.get(), status.inode.get()), status.identity),
    }
}

impl World {
    fn new() -> Self {
        let directory = std::env::temp_dir().join(format!("raio-fuzz-{}", std::process::id()));
        fs::create_dir_all(directory.join("tree")).expect("a directory for temporary files");
        let (tree, one) = (directory.join("tree"), directory.join("one"));
        fs::write(&one, vec![0; FILE_BYTES / 2]).unwrap();
        let configuration = format!(
            "io-max = 65536\nqueue-depth = 6\nmax-sessions = {SESSIONS_MAX}\nlinger = {}\n\
             memory = \"2M\"\nstall-timeout = 1\n\
             [export.mem]\nmemory = {FILE_BYTES}\naccess = \"rw\"\n[export.null]\nnull = {FILE_BYTES}\n\
             [export.dir]\npath = {tree:?}\naccess = \"rw\"\nmax-file-size = {FILE_BYTES}\n\
             [export.ro]\npath = {tree:?}\n[export.one]\npath = {one:?}\naccess = \"rw\"\n",
            LINGER.as_secs()
        );
        let file = directory.join("raio_server.toml");
        fs::write(&file, configuration).unwrap();
        let server = TestWorker::new(&["--config", file.to_str().unwrap()], 24).expect("a worker");
        let mut world = Self {
            directory,
            server,
            sessions: Vec::new(),
            current: [None; 4],
            channels: Vec::new(),
            clients: Vec::new(),
            model: Model::default(),
            restarts: 0,
            numbers: 0,
            is_draining: false,
            last: None,
            buffer: vec![0; FILE_BYTES].into(),
        };
        world.reset_files();
        world
    }

    /// Makes the files as they were.
    fn reset_files(&mut self) {
        let tree = self.directory.join("tree");
        for entry in fs::read_dir(&tree).unwrap() {
            let path = entry.unwrap().path();
            let is_directory = fs::symlink_metadata(&path).unwrap().is_dir();
            if is_directory { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
        }
        fs::write(tree.join("a"), vec![0; 8192]).unwrap();
        fs::write(self.directory.join("one"), vec![0; FILE_BYTES / 2]).unwrap();
    }

    fn run(&mut self, input: &mut Input<'_>) {
        self.server.fill_arena(STALE);
        let completes = input.byte() & 1 != 0;
        for _ in 0..STEPS_MAX {
            if input.0.is_empty() {
                break;
            }
            self.doubt();
            let what = input.byte();
            self.step(what & step::KIND, what & step::ODD != 0, input);
            if what & step::AT_ONCE == 0 {
                self.run_once();
            }
        }
        self.end(completes);
    }

    /// One thing that happens. A variant of most of them breaks the rules.
    fn step(&mut self, what: u8, is_odd: bool, input: &mut Input<'_>) {
        match what {
            step::CONNECT => return self.connect(is_odd, input),
            step::RESUME => return self.resume(is_odd, input),
            step::ADVANCE => {
                let by = [0, 1, 50, 99, 300, 1000, 1100, 2000, 5000, 5100, 16_000, 60_000][input.index(12)];
                return self.advance(Duration::from_millis(by));
            }
            step::RUN_JOB => {
                self.server.run_job(input.byte().into());
                return;
            }
            step::BEGIN_JOB if is_odd => {
                self.server.end_job(input.byte().into());
                return;
            }
            step::BEGIN_JOB => {
                self.server.begin_job(input.byte().into());
                return;
            }
            step::RUN_JOBS => return self.run_jobs(),
            step::RUN => return (0..input.index(8)).for_each(|_| self.run_once()),
            step::DRAIN if is_odd && !self.is_draining => {
                self.is_draining = true;
                self.clients.iter_mut().for_each(|client| client.is_good = false);
                self.server.drain(Duration::from_millis(input.byte().into()) * 50);
                return;
            }
            _ => {}
        }
        if self.clients.is_empty() {
            return;
        }
        let at = input.index(self.clients.len());
        let client = &mut self.clients[at];
        match what {
            step::LEAVE => {
                // A reset, with what it has not taken.
                self.remove(at);
                return;
            }
            step::DEAFEN => client.reads = !client.reads,
            step::CONTINUE => client.kept_back = 0,
            step::SHUT_DOWN if is_odd => {
                let _ = client.stream.shutdown(Shutdown::Write);
                client.breaks();
            }
            step::PING if client.limits.is_some() => {
                let mut bytes = Vec::new();
                if is_odd {
                    message::encode_goaway(Status::OK, "Bye.", client.crc(), &mut bytes);
                } else {
                    message::encode_ping(input.u64(), client.crc(), &mut bytes);
                }
                client.unsent.extend(bytes);
            }
            step::RAW if client.limits.is_some() => {
                let len = input.index(200);
                let mut bytes = input.bytes(len);
                if client.crc() && !is_odd {
                    mend_messages(&mut bytes);
                }
                client.unsent.extend(bytes);
            }
            step::CANCEL if !client.outstanding.is_empty() => {
                let id = client.outstanding[input.index(client.outstanding.len())].id;
                self.ask(at, &Command::Cancel { id }, &[], is_odd);
            }
            step::REQUEST..=step::KIND if client.limits.is_some() => self.request(at, is_odd, input),
            _ => {}
        }
        self.send(at);
    }

    fn connect(&mut self, is_odd: bool, input: &mut Input<'_>) {
        if self.clients.len() == CONNECTIONS_MAX {
            return;
        }
        let variant = input.byte();
        let session = self.session(usize::from(variant & 3));
        let channel = (variant & 8 != 0).then(|| {
            let number = self.channels.iter().filter(|channel| channel.session == session).count() as u32;
            self.channels.push(Channel {
                session,
                number,
                epoch: 0,
                is_epoch_known: true,
                linger: LINGER,
                lost_for: Duration::ZERO,
                may_be_gone: true,
                slots: BTreeMap::new(),
                generation: 0,
            });
            (self.channels.len() - 1, 1)
        });
        let offer = Offer {
            features: if variant & 4 != 0 { FEATURE_CRC } else { 0 } | OPERATION_FEATURES,
            session: self.sessions[session].id,
            channel: channel.map(|(at, epoch)| self.channel_offer(at, epoch)),
            keepalive: if variant & 16 != 0 { Duration::from_secs(1) } else { Duration::ZERO },
            queue_depth: if variant & 32 != 0 { 2 } else { 0 },
            ..Offer::new("fuzz")
        };
        let hello = offer.hello();
        if !is_odd {
            return self.join(session, channel, &offer, hello, 0, true);
        }
        self.join_oddly(session, channel, &offer, hello, variant >> 6, input);
    }

    /// With a hello that comes in parts, or is damaged.
    fn join_oddly(
        &mut self,
        session: usize,
        channel: Option<(usize, u64)>,
        offer: &Offer,
        mut hello: Vec<u8>,
        how: u8,
        input: &mut Input<'_>,
    ) {
        match how {
            0 => {
                let kept_back = input.index(hello.len() + 1);
                return self.join(session, channel, offer, hello, kept_back, true);
            }
            1 => hello = input.bytes(200),
            _ => {
                let at = input.index(hello.len());
                hello[at] ^= input.byte();
            }
        }
        mend_handshake(&mut hello);
        // What is behind it would be read as messages.
        hello.truncate(handshake_len(&hello));
        if how != 1 && channel.is_none() {
            return self.join(session, None, offer, hello, 0, false);
        }
        // It may name whatever session and channel.
        (0..self.sessions.len()).for_each(|at| self.give_up(at));
        self.channels.iter_mut().for_each(|channel| channel.is_epoch_known = false);
        self.join(session, None, offer, hello, 0, false);
        // Before anybody else says hello.
        (0..5).for_each(|_| self.run_once());
    }

    fn channel_offer(&self, at: usize, epoch: u64) -> ChannelOffer {
        let Channel { number, linger, .. } = self.channels[at];
        ChannelOffer { number, epoch, linger }
    }

    /// A client takes the place of a connection of one of the channels, broken or not.
    fn resume(&mut self, is_odd: bool, input: &mut Input<'_>) {
        if self.channels.is_empty() {
            return self.connect(is_odd, input);
        }
        let at = input.index(self.channels.len());
        let (variant, how) = (input.byte(), input.byte());
        if variant & 1 != 0
            && let Some(before) =
                self.clients.iter().position(|client| client.channel.is_some_and(|of| of.0 == at))
        {
            // It was broken before.
            self.remove(before);
        }
        if self.clients.len() == CONNECTIONS_MAX {
            return;
        }
        let session = self.channels[at].session;
        let known = self.channels[at].epoch;
        if known == u64::MAX {
            // There are no epochs left.
            return;
        }
        let epoch = match how & 7 {
            _ if !is_odd => known + 1,
            0 => known,
            1 => known.saturating_sub(1),
            2 => input.u64(),
            3 => known.saturating_add(1 + input.u64() % 1000),
            _ => known + 1,
        };
        if epoch == 0 || known > u64::MAX - 2000 {
            return;
        }
        let supersedes = if variant & 2 != 0 { vec![input.index(self.sessions.len())] } else { Vec::new() };
        let mut ids: Vec<_> = supersedes.iter().map(|&at: &usize| self.sessions[at].id).collect();
        if variant & 4 != 0 {
            ids.extend([self.sessions[session].id, SessionId([0xdd; 16])]);
        }
        let channel = ChannelOffer {
            linger: if variant & 8 != 0 { Duration::from_secs(1) } else { LINGER },
            ..self.channel_offer(at, epoch)
        };
        let offer = Offer {
            features: if variant & 16 != 0 { FEATURE_CRC } else { OPERATION_FEATURES },
            session: self.sessions[session].id,
            channel: Some(channel),
            supersedes: ids,
            queue_depth: if variant & 32 != 0 { 2 } else { 0 },
            ..Offer::new("fuzz")
        };
        let hello = offer.hello();
        let given_up: Vec<_> = supersedes.iter().copied().filter(|&of| of != session).collect();
        for &of in &given_up {
            self.give_up(of);
            self.sessions[of].is_superseded = true;
        }
        if is_odd && how & 7 > 4 {
            return self.join_oddly(session, Some((at, epoch)), &offer, hello, how >> 6, input);
        }
        let clients = self.clients.len();
        self.join(session, Some((at, epoch)), &offer, hello, 0, true);
        if self.clients.len() == clients {
            return;
        }
        let is_known = |of: &usize| {
            // Who has not had a welcome may join after this one.
            let all = self.clients[..clients].iter();
            all.filter(|client| client.session == *of).all(|client| client.limits.is_some())
        };
        let supersedes = given_up.into_iter().filter(is_known).collect();
        let client = &mut self.clients[clients];
        client.supersedes = supersedes;
        client.asks = match variant >> 6 {
            0 => Some(ASKED_MAX),
            1 => Some(1),
            2 => Some(0),
            _ => None,
        };
    }

    /// The server may end this session, or take one of its connections for obsolete.
    fn give_up(&mut self, session: usize) {
        for client in self.clients.iter_mut().filter(|client| client.session == session) {
            client.breaks();
            client.is_fresh = false;
        }
        for channel in self.channels.iter_mut().filter(|channel| channel.session == session) {
            channel.may_be_gone = true;
        }
    }

    /// The session that has this number: a new one if the server may have ended the last.
    fn session(&mut self, number: usize) -> usize {
        if let Some(at) = self.current[number]
            && self.is_kept(at)
        {
            return at;
        }
        let mut id = [number as u8 + 1; 16];
        id[8..].copy_from_slice(&self.numbers.to_le_bytes());
        self.numbers += 1;
        self.sessions.push(Session::new(SessionId(id), self.restarts));
        self.current[number] = Some(self.sessions.len() - 1);
        self.sessions.len() - 1
    }

    /// Whether the server has a reason to keep a session.
    fn is_kept(&self, session: usize) -> bool {
        self.clients.iter().any(|client| client.session == session && client.is_whole())
            || self.channels.iter().any(|channel| channel.session == session && !channel.may_be_gone)
    }

    /// Where the server may have ended a session, its handles may stand for other files since.
    fn doubt(&mut self) {
        for at in 0..self.sessions.len() {
            let session = &self.sessions[at];
            if !session.is_unsure && (session.opens > 0 || !session.files.is_empty()) && !self.is_kept(at) {
                self.sessions[at].is_unsure = true;
            }
        }
    }

    /// A client connects, and says this. `may_talk`: it can go on when it has had its welcome.
    fn join(
        &mut self,
        session: usize,
        channel: Option<(usize, u64)>,
        offer: &Offer,
        hello: Vec<u8>,
        kept_back: usize,
        may_talk: bool,
    ) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        if self.server.connect(OwnedFd::from(theirs)).is_err() {
            return;
        }
        if self.sessions[session].server != self.restarts {
            // The server knows nothing of it.
            let of = &mut self.sessions[session];
            (of.server, of.opens, of.is_unsure) = (self.restarts, 0, false);
            of.files.clear();
        }
        let waiting = self.clients.iter().filter(|client| client.limits.is_none()).count();
        if self.server.in_use().sessions[1] + waiting + 1 >= SESSIONS_MAX {
            // One that nobody is connected to may make room.
            self.forget_channels(|_| true);
        }
        let (mut is_fresh, mut may_talk) = (false, may_talk);
        if let Some((at, epoch)) = channel {
            let channel = &mut self.channels[at];
            is_fresh =
                channel.is_epoch_known && epoch > channel.epoch && !self.sessions[session].is_superseded;
            // The server may not have had the whole hello of the one that has a higher one.
            may_talk &= epoch >= channel.epoch;
            if epoch <= channel.epoch {
                // To a server that was started again it may be the first.
                channel.slots.clear();
            }
            channel.epoch = channel.epoch.max(epoch);
            channel.linger = offer.channel.map_or(LINGER, |offered| offered.linger).min(channel.linger);
            for before in &mut self.clients {
                match before.channel {
                    Some((other, known)) if other == at && known < epoch => {
                        // The server closes it.
                        before.breaks();
                        before.is_fresh = false;
                    }
                    // Whose hello comes first is in time.
                    Some((other, known)) if other == at && known == epoch => before.is_fresh = false,
                    _ => {}
                }
            }
        }
        let must_ask = offer.channel.is_some_and(|channel| channel.epoch > 1) || !offer.supersedes.is_empty();
        self.clients.push(Client {
            stream: ours,
            session,
            channel,
            supersedes: Vec::new(),
            must_ask: if must_ask { MustAsk::Yes } else { MustAsk::No },
            asks: None,
            is_fresh,
            was_told: false,
            ids: Vec::new(),
            queue_depth: 0,
            features: 0,
            limits: None,
            credits: 0,
            next_id: 1,
            unsent: hello,
            kept_back,
            sent: Vec::new(),
            received: Vec::new(),
            early: None,
            half: None,
            outstanding: Vec::new(),
            reads: true,
            has_keepalive: !offer.keepalive.is_zero(),
            is_good: false,
            has_ended: !may_talk,
            is_garbled: false,
        });
        self.send(self.clients.len() - 1);
    }

    /// The server may have forgotten the channels without a connection for which this is true.
    fn forget_channels(&mut self, is_over: impl Fn(&Channel) -> bool) {
        for (at, channel) in self.channels.iter_mut().enumerate() {
            let is_whole = |client: &Client| client.is_whole() && client.channel.is_some_and(|of| of.0 == at);
            if is_over(channel) && !self.clients.iter().any(is_whole) {
                channel.may_be_gone = true;
            }
        }
    }

    /// A request of whichever operation.
    fn request(&mut self, at: usize, is_odd: bool, input: &mut Input<'_>) {
        const LENGTHS: [u64; 12] = [0, 1, 16, 100, 512, 4096, 5000, 8192, 16_384, 20_000, 32_768, 65_536];
        let kind = input.byte();
        if self.clients[at].must_ask != MustAsk::No && !is_odd {
            // Nothing else yet.
            return self.ask_for_outcomes(at, usize::from(kind & 15));
        }
        let operation = match usize::from(kind & 0x1f) {
            31 => &OPERATIONS[31 + input.index(OPERATIONS.len() - 31)],
            at => &OPERATIONS[at],
        };
        let session = &self.sessions[self.clients[at].session];
        let mut body = Vec::new();
        let mut length = 0;
        let mut data = Vec::new();
        if operation.opcode == Opcode::Open {
            let flags = u32::from(input.byte()) << 1 & 0x1ff | OPEN_READ;
            let flags = if is_odd { input.u64() as u32 & 0x1ff } else { flags };
            let (path, mode): (Vec<u8>, _) = match input.index(16) {
                0 => {
                    let len = input.index(40);
                    (input.bytes(len), input.u64() as u32)
                }
                at => {
                    let paths: [&[u8]; 15] = [
                        b"/mem",
                        b"/mem",
                        b"/mem",
                        b"/null",
                        b"/null",
                        b"/dir/a",
                        b"/dir/a",
                        b"/dir//./b",
                        b"/dir/b",
                        b"/ro/a",
                        b"/ro/b",
                        b"/one",
                        b"/one",
                        b"/dir/../one",
                        b"/dir/b/c",
                    ];
                    (paths[at - 1].to_vec(), 0o644)
                }
            };
            Command::Open { flags, mode, path: &path }.encode(&mut body);
        } else if let Layout::Path(_) = operation.layout {
            let command = path_command(operation, kind, input);
            length = if operation.direction == Direction::None { 0 } else { command.length };
            if operation.direction == Direction::ToServer {
                data = vec![kind; length as usize];
            }
            Command::Path(command).encode(&mut body);
        } else if let Layout::Fields(fields) = operation.layout {
            // The size of a file is no business of the model: one that is not open keeps it.
            let is_truncate = operation.opcode == Opcode::Truncate;
            let file = if is_truncate { FileHandle(input.byte().into()) } else { session.handle(input) };
            let offset = match input.byte() {
                255 => input.u64(),
                at => u64::from(at) * 300,
            };
            length = match input.index(13) {
                12 => input.u64() & if operation.direction == Direction::None { u64::MAX } else { 0x1ffff },
                at => LENGTHS[at],
            };
            if operation.direction == Direction::ToServer {
                length = length.min(FILE_BYTES as u64 + 1);
                let known = if let Found::File(known, _) = session.file(file) { known } else { 0 };
                data = content(known, self.numbers, offset, length as usize);
            }
            body.extend((operation.opcode as u16).to_le_bytes());
            let flags = match operation.opcode {
                // One of them, or it fails at once.
                Opcode::Checksum | Opcode::Lock => 1 << (kind >> 7),
                _ => operation.flags * u16::from(kind >> 7),
            };
            body.extend(flags.to_le_bytes());
            body.extend((if fields.file { file.0 } else { 0 }).to_le_bytes());
            body.extend((if fields.offset { offset } else { 0 }).to_le_bytes());
            body.extend((if fields.length { length } else { 0 }).to_le_bytes());
        } else if operation.opcode == Opcode::Copy {
            // To a file that is not open, or the model would have to know what the source holds.
            let (source, destination) = (session.handle(input), FileHandle(input.byte().into()));
            let (offset, destination_offset) = (input.byte().into(), input.byte().into());
            Command::Copy { source, offset, length: 100, destination, destination_offset }.encode(&mut body);
        } else if operation.opcode == Opcode::Outcome {
            let ids = [u32::from(input.byte()), input.u64() as u32].map(Into::into);
            match kind >> 6 {
                3 => Command::Outcome { ids: &self.to_ask(at, ASKED_MAX) }.encode(&mut body),
                few => Command::Outcome { ids: &ids[..usize::from(few).min(2)] }.encode(&mut body),
            }
        } else if let (false, Some(opened)) = (session.opened.is_empty(), session.opened.get(input.index(16)))
        {
            let &Opened { handle: file, flags, identity, ref path } = opened;
            let flags = flags & !(OPEN_CREATE | OPEN_EXCLUSIVE | OPEN_TRUNCATE);
            Command::Reopen { flags, file, identity, path }.encode(&mut body);
        } else {
            let file = session.handle(input);
            let identity = [input.byte(); 16];
            Command::Reopen { flags: OPEN_READ, file, identity, path: b"/dir/a" }.encode(&mut body);
        }
        let room = if operation.direction == Direction::ToClient { length as u32 } else { 0 };
        if is_odd && kind & 0x20 != 0 {
            // Fields that do not fit together.
            let at = input.index(body.len());
            body[at] ^= input.byte();
        }
        let id = self.fresh_id(at) - u64::from(is_odd && kind & 0x40 != 0);
        if !self.push(at, id, &body, room, &data, is_odd) {
            return;
        }
        let client = &mut self.clients[at];
        if kind & 0x40 != 0 && !is_odd {
            let all = client.unsent.len();
            client.kept_back = client.kept_back.max(input.index(256).min(all));
        }
    }

    /// The ids of requests of earlier connections of a client's channel, so many at most.
    fn to_ask(&self, at: usize, most: usize) -> Vec<U32> {
        let Some((channel, epoch)) = self.clients[at].channel else { return Vec::new() };
        let earlier = self.channels[channel].slots.values().filter(|recorded| recorded.epoch < epoch);
        earlier.map(|recorded| U32::new(recorded.id)).take(most).collect()
    }

    /// A client asks what became of earlier requests, if it has not done so.
    fn ask_for_outcomes(&mut self, at: usize, most: usize) {
        if self.clients[at].must_ask == MustAsk::Yes {
            let ids = self.to_ask(at, most);
            self.ask(at, &Command::Outcome { ids: &ids }, &[], false);
        }
    }

    /// An id for the next request of a client: with a channel, a slot that is free and a generation that it
    /// has not had.
    fn fresh_id(&mut self, at: usize) -> u64 {
        let client = &self.clients[at];
        let Some((channel, _)) = client.channel else { return client.next_id };
        let is_free = |slot: &u64| client.ids.iter().all(|id| id & 0xffff != *slot);
        let slot = (0..=u64::from(client.queue_depth)).find(is_free).unwrap_or(client.next_id & 0xffff);
        let channel = &mut self.channels[channel];
        channel.generation = channel.generation.wrapping_add(1).max(1);
        u64::from(channel.generation) << 16 | slot
    }

    fn ask(&mut self, at: usize, command: &Command<'_>, data: &[u8], is_odd: bool) -> bool {
        let mut body = Vec::new();
        command.encode(&mut body);
        let id = self.fresh_id(at);
        self.push(at, id, &body, command.read_length(), data, is_odd)
    }

    /// Puts a request behind what is to be sent. Without a credit only a broken client does so.
    fn push(&mut self, at: usize, id: u64, body: &[u8], room: u32, data: &[u8], is_broken: bool) -> bool {
        let client = &mut self.clients[at];
        if (client.credits == 0 && !is_broken) || client.unsent.len() > 256 << 10 {
            return false;
        }
        if client.credits == 0 {
            client.breaks();
        }
        client.credits = client.credits.saturating_sub(1);
        client.next_id += 1;
        client.ids.push(id);
        if client.must_ask == MustAsk::Yes && body.starts_with(&(Opcode::Outcome as u16).to_le_bytes()) {
            client.must_ask = MustAsk::Asked(id);
        }
        let region = match room {
            0 => RemoteRegion::None,
            len => RemoteRegion::In { address: 0, key: 0, len },
        };
        let crc = client.crc();
        let data_crc = if crc { data_crc(data) } else { 0 };
        let header =
            RequestHeader { id, body_len: 0, data_len: data.len() as u32, region, has_crc: false, data_crc };
        header.encode(body, crc, &mut client.unsent);
        client.unsent.extend_from_slice(data);
        true
    }

    /// Sends what a client does not keep back, and notes which requests are complete with that.
    fn send(&mut self, at: usize) {
        let client = &mut self.clients[at];
        client.kept_back = client.kept_back.min(client.unsent.len());
        let mut done = 0;
        let ready = client.unsent.len() - client.kept_back;
        while done < ready {
            match client.stream.write(&client.unsent[done..ready]) {
                Ok(n) => done += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // It is closed, which a read will tell.
                Err(_) => {
                    client.unsent.clear();
                    client.kept_back = 0;
                    return;
                }
            }
        }
        let sent: Vec<_> = client.unsent.drain(..done).collect();
        if client.limits.is_some() {
            client.sent.extend(sent);
            self.note_sent(at);
        }
    }

    fn note_sent(&mut self, at: usize) {
        while let Some(limits) = self.clients[at].limits
            && !self.clients[at].is_garbled
        {
            let sent = std::mem::take(&mut self.clients[at].sent);
            let taken = match parse(&sent, &limits) {
                Err(_) => {
                    self.clients[at].breaks();
                    self.clients[at].is_garbled = true;
                    return;
                }
                Ok(Parsed::Need(_)) => 0,
                Ok(Parsed::Item(Message::Request(header, body), taken)) => {
                    match sent.get(taken..taken + header.data_len as usize) {
                        Some(data) => {
                            self.begin(at, &header, body, data);
                            taken + data.len()
                        }
                        None => {
                            self.begin_half(at, &header, body);
                            0
                        }
                    }
                }
                Ok(Parsed::Item(Message::Ping(_), taken)) => taken,
                Ok(Parsed::Item(_, taken)) => {
                    self.clients[at].breaks();
                    if let Some((channel, _)) = self.clients[at].channel {
                        // A goaway ends it.
                        self.channels[channel].may_be_gone = true;
                    }
                    taken
                }
            };
            self.clients[at].sent = sent[taken..].to_vec();
            if taken == 0 {
                return;
            }
        }
    }

    /// A client has sent a request without all of its data: the server looks at it already.
    fn begin_half(&mut self, at: usize, header: &RequestHeader, body: &[u8]) {
        let client = &mut self.clients[at];
        if client.breaks_rules(header, body) {
            client.breaks();
        }
        if let Some(Command::Write { file, .. }) = sensible(header, body) {
            client.half.get_or_insert(self.sessions[client.session].file(file));
        }
    }

    /// A client has sent a request.
    fn begin(&mut self, at: usize, header: &RequestHeader, body: &[u8], data: &[u8]) {
        self.numbers += 1;
        let number = self.numbers;
        let client = &mut self.clients[at];
        if let Some(id) = client.early.take() {
            assert_eq!(id, header.id);
            client.half = None;
            return;
        }
        if client.breaks_rules(header, body) || (client.crc() && header.data_crc != data_crc(data)) {
            client.breaks();
        }
        let asked = match sensible(header, body) {
            Some(command) => {
                let is_recorded = command.opcode().operation().is_recorded;
                let asked = self.asked(at, number, command, data);
                if is_recorded && !matches!(asked, Asked::NotGranted) {
                    self.note_recorded(at, header.id, number, &asked);
                }
                asked
            }
            None => Asked::Broken,
        };
        self.clients[at].outstanding.push(Outstanding { id: header.id, number, asked, is_cancelled: false });
    }

    /// A client has sent a request whose end the server records.
    fn note_recorded(&mut self, at: usize, id: u64, number: u64, asked: &Asked) {
        let client = &self.clients[at];
        let Some((channel, epoch)) = client.channel.filter(|_| client.has_slot(id)) else { return };
        let (id, slot) = (id as u32, id as u32 & 0xffff);
        let slots = &mut self.channels[channel].slots;
        if slots.get(&slot).is_none_or(|before| before.epoch <= epoch) {
            let grows = matches!(asked, Asked::Write { grows: true, .. });
            slots.insert(slot, Recorded { id, number, epoch, grows, answer: None });
        }
    }

    /// A client has sent this command.
    fn asked(&mut self, at: usize, number: u64, command: Command<'_>, data: &[u8]) -> Asked {
        let (client, model) = (&mut self.clients[at], &mut self.model);
        if !command.opcode().operation().is_granted(client.features) {
            return Asked::NotGranted;
        }
        let of = client.session;
        let session = &mut self.sessions[client.session];
        let half = client.half.take();
        let mut write = |file: FileHandle, start, bits, grows| {
            let found = half.filter(|_| !session.is_unsure).unwrap_or_else(|| session.file(file));
            match found {
                Found::File(file, _) => model.begin_write(number, of, file, start, bits),
                Found::Unknown => model.is_loose = true,
                Found::Nothing => {}
            }
            Asked::Write { found, grows }
        };
        match command {
            Command::Open { path, flags, .. } => {
                session.opens += 1;
                for other in self.clients.iter_mut().filter(|other| other.session == of) {
                    model.is_loose |= other.may_find_more();
                }
                if flags & OPEN_TRUNCATE != 0 {
                    model.truncations += 1;
                    model.truncate();
                }
                Asked::Open { path: path.to_vec(), flags }
            }
            Command::Close(file) => Asked::Close(file),
            Command::Read { file, offset, length } => {
                let (start, len) = clipped(offset, length.into());
                let found = session.file(file);
                if let Found::File(file, _) = found {
                    model.begin_read(number, file, start, len);
                }
                Asked::Read { found, length }
            }
            Command::Write { file, offset, length } => {
                let (start, len) = clipped(offset, length.into());
                write(file, start, data[..len].iter().copied().map(bit).collect(), true)
            }
            Command::Discard { file, offset, length } | Command::WriteZeroes { file, offset, length } => {
                let (start, len) = clipped(offset, length);
                write(file, start, vec![bit(0); len], false)
            }
            Command::Cancel { id } => {
                let of = client.outstanding.iter_mut().find(|other| other.id == id);
                of.into_iter().for_each(|of| of.is_cancelled = true);
                Asked::Other
            }
            Command::Reopen { path, flags, file: handle, .. } => {
                session.opens += 1;
                for other in self.clients.iter_mut().filter(|other| other.session == of) {
                    model.is_loose |= other.may_find_more();
                }
                Asked::Reopen { path: path.to_vec(), flags, handle }
            }
            Command::Outcome { ids } => Asked::Outcome(ids.iter().map(|id| id.get()).collect()),
            Command::Path(_) | Command::ListNext { .. } => Asked::Brings(command.read_length()),
            Command::Stat(_)
            | Command::Fsync { .. }
            | Command::Allocate { .. }
            | Command::Truncate { .. }
            | Command::Extents { .. }
            | Command::Copy { .. }
            | Command::Checksum { .. }
            | Command::Lock { .. } => Asked::Other,
        }
    }

    fn run_once(&mut self) {
        self.server.run_once().expect("the worker goes on");
        if self.is_draining && self.server.drained().is_some() {
            // The process ends, and another one begins.
            while !self.clients.is_empty() {
                self.remove(0);
            }
            self.current = [None; 4];
            self.server.restart().expect("another worker");
            // All that the last one had begun is over.
            self.model.end_writes_of(|_| true);
            self.restarts += 1;
            self.channels.iter_mut().for_each(|channel| channel.may_be_gone = true);
            self.server.fill_arena(STALE);
            self.is_draining = false;
        }
        let mut at = 0;
        while at < self.clients.len() {
            self.send(at);
            if !self.clients[at].reads || self.receive(at) {
                at += 1;
            } else {
                assert!(!self.clients[at].is_good, "a client that keeps the protocol was closed");
                self.remove(at);
            }
        }
    }

    fn run_jobs(&mut self) {
        while self.server.run_job(0) {}
    }

    fn advance(&mut self, by: Duration) {
        if by >= Duration::from_millis(50) {
            // The server need not wait for these for ever.
            for client in &mut self.clients {
                client.is_good &= !client.is_slow() && !client.has_keepalive;
            }
        }
        self.pass(by);
        self.server.advance(by);
    }

    /// Channels without a connection that is whole may expire.
    fn pass(&mut self, by: Duration) {
        const SLACK: Duration = Duration::from_millis(200);
        for (at, channel) in self.channels.iter_mut().enumerate() {
            let is_whole = |client: &Client| client.is_whole() && client.channel.is_some_and(|of| of.0 == at);
            channel.lost_for =
                if self.clients.iter().any(is_whole) { Duration::ZERO } else { channel.lost_for + by };
            channel.may_be_gone |= channel.lost_for + SLACK >= channel.linger;
        }
    }

    fn remove(&mut self, at: usize) {
        let client = self.clients.swap_remove(at);
        let session = &mut self.sessions[client.session];
        let is_open = |asked: &Asked| matches!(asked, Asked::Open { .. } | Asked::Reopen { .. });
        let opens = client.outstanding.iter().filter(|other| is_open(&other.asked));
        if opens.count() > 0 {
            session.is_unsure = true;
        }
        self.doubt();
    }

    /// Takes what has come for a client. Returns false if the server has closed the connection.
    fn receive(&mut self, at: usize) -> bool {
        let mut is_open = true;
        loop {
            match self.clients[at].stream.read(&mut self.buffer) {
                Ok(n @ 1..) => self.clients[at].received.extend_from_slice(&self.buffer[..n]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                _ => {
                    is_open = false;
                    break;
                }
            }
        }
        let received = std::mem::take(&mut self.clients[at].received);
        if self.clients[at].limits.is_none() && self.clients[at].has_ended {
            // With this one there is no conversation.
            return is_open;
        }
        let mut left = &received[..];
        if self.clients[at].limits.is_none() && !left.is_empty() {
            let welcome = parse_handshake::<Welcome>(left).expect("the server keeps the protocol");
            if let Parsed::Item((welcome, _), taken) = welcome {
                left = &left[taken..];
                self.welcome(at, &welcome);
            }
        }
        if let Some(limits) = self.clients[at].limits {
            while let Parsed::Item(message, taken) =
                parse(left, &limits).expect("the server keeps the protocol")
            {
                let mut taken = taken;
                match message {
                    Message::Response(header, body) => {
                        let Some(data) = left.get(taken..taken + header.data_len as usize) else { break };
                        taken += data.len();
                        self.answered(at, &header, body, data);
                    }
                    Message::Pong(..) => {}
                    Message::Goaway(status, text) => {
                        let text = message::text(text);
                        let is_good = self.clients[at].is_good;
                        assert!(
                            !is_good,
                            "a client that keeps the protocol was sent away: {status:?}, {text}"
                        );
                        self.clients[at].has_ended = true;
                    }
                    other => panic!("a server does not say {other:?}"),
                }
                left = &left[taken..];
            }
        }
        self.clients[at].received = left.to_vec();
        is_open
    }

    fn welcome(&mut self, at: usize, welcome: &Welcome) {
        let client = &mut self.clients[at];
        if welcome.errno.get() != 0 || client.has_ended {
            let is_stale = i32::from(welcome.errno.get()) == libc::ESTALE;
            assert!(!(is_stale && client.is_fresh), "an epoch that nobody has had is stale");
            client.has_ended = true;
            return;
        }
        client.limits = Some(Limits {
            crc: welcome.features.get() & FEATURE_CRC != 0,
            request_crc: false,
            data_bytes_max: welcome.data_bytes_max.get(),
            // Not asked for.
            pong_time: false,
        });
        client.features = welcome.features.get();
        client.queue_depth = welcome.queue_depth.get();
        client.credits = welcome.queue_depth.get() as usize + 1;
        client.is_good = !self.is_draining;
        let (is_good, must_ask, asks) = (client.is_good, client.must_ask, client.asks.take());
        if let Some((channel, epoch)) = client.channel {
            let is_newer = |other: &Client| {
                other.is_whole() && other.channel.is_some_and(|of| of.0 == channel && of.1 >= epoch)
            };
            let before = &self.clients[..at];
            assert!(
                !before.iter().chain(&self.clients[at + 1..]).any(is_newer),
                "epoch {epoch} has joined, and there is a newer one"
            );
            let channel = &mut self.channels[channel];
            channel.lost_for = Duration::ZERO;
            channel.may_be_gone &= !(is_good && must_ask == MustAsk::No);
        }
        if let Some(most) = asks {
            self.ask_for_outcomes(at, most);
            self.send(at);
        }
    }

    /// The answer to an outcome request for these ids has come.
    fn told(&mut self, at: usize, header: &ResponseHeader, body: &[u8], ids: &[u32]) {
        let client = &mut self.clients[at];
        let errno = header.status.errno;
        if client.must_ask == MustAsk::Asked(header.id) {
            client.must_ask = if matches!(errno, 0 | libc::ESTALE) { MustAsk::No } else { MustAsk::Yes };
        }
        assert!(matches!(errno, 0 | libc::ESTALE | libc::ECANCELED | libc::ESHUTDOWN), "{header:?}");
        if !matches!(errno, 0 | libc::ESTALE) {
            return;
        }
        let (is_whole, superseded) = (client.is_whole(), client.supersedes.clone());
        client.was_told |= errno != 0;
        let of = client.channel;
        if let Some((channel, epoch)) = of {
            let channel = &mut self.channels[channel];
            if errno == 0 {
                let outcomes = RequestOutcome::decode(body).expect("outcomes");
                assert_eq!((outcomes.len(), header.result), (ids.len(), ids.len() as u64));
                for (outcome, &id) in outcomes.iter().zip(ids) {
                    assert_eq!(outcome.id(), id, "in the same order");
                    let answer = outcome.answer().expect("it makes sense");
                    let recorded = channel.slots.get_mut(&(id & 0xffff));
                    let Some(recorded) = recorded.filter(|other| other.id == id && other.epoch < epoch)
                    else {
                        continue;
                    };
                    check_outcome(answer, recorded.answer, id);
                    match answer {
                        None => self.model.forget_write(recorded.number),
                        Some((status, result)) => {
                            let done = if status.is_ok() { result as usize } else { 0 };
                            self.model.end_write(recorded.number, done, recorded.grows);
                            recorded.answer = answer;
                        }
                    }
                }
                channel.may_be_gone &= !is_whole;
            } else {
                assert!(channel.may_be_gone, "the server does not know a channel that it is to keep");
            }
            // What it was not asked about may have been done, and will not be later.
            for recorded in channel.slots.values().filter(|recorded| recorded.epoch < epoch) {
                self.model.end_write(recorded.number, 0, false);
            }
            if errno != 0 {
                channel.slots.retain(|_, recorded| recorded.epoch >= epoch);
            }
        }
        self.model.end_writes_of(|session| superseded.contains(&session));
        self.doubt();
    }

    fn answered(&mut self, at: usize, header: &ResponseHeader, body: &[u8], data: &[u8]) {
        let client = &mut self.clients[at];
        let of = client.outstanding.iter().position(|other| other.id == header.id);
        if of.is_none() && !header.status.is_ok() && client.early.is_none() && client.is_sending(header.id) {
            client.early = Some(header.id);
            client.credits += usize::from(header.credits);
            client.ids.retain(|&id| id != header.id);
            return;
        }
        let of = of.expect("each answer belongs to a request that was not answered");
        let Outstanding { number, asked, is_cancelled, .. } = client.outstanding.remove(of);
        client.credits += usize::from(header.credits);
        assert_eq!(header.data_crc, if client.crc() && !data.is_empty() { data_crc(data) } else { 0 });
        let is_ok = header.status.is_ok();
        let result = header.result;
        assert!(is_ok || result == 0, "what has failed has no result");
        let brings_data = matches!(asked, Asked::Read { .. } | Asked::Brings(_));
        assert!(data.is_empty() || (is_ok && brings_data), "nobody asked for data");
        client.ids.retain(|&id| id != header.id);
        if let Some((channel, epoch)) = client.channel {
            let channel = &mut self.channels[channel];
            let recorded = channel.slots.get_mut(&(header.id as u32 & 0xffff));
            if let Some(recorded) = recorded.filter(|other| other.number == number) {
                recorded.answer = Some((header.status, result));
            }
            // What it sends once it was told shows that it has heard that.
            let is_sign = matches!(asked, Asked::Open { .. } | Asked::Read { .. } | Asked::Write { .. });
            if client.was_told && is_sign && client.is_whole() && epoch == channel.epoch {
                channel.may_be_gone = false;
            }
        }
        let session = &mut self.sessions[client.session];
        match asked {
            Asked::Outcome(ids) => self.told(at, header, body, &ids),
            Asked::Reopen { path, flags, handle } => {
                session.opens -= 1;
                if is_ok {
                    assert_eq!(
                        result,
                        u64::from(handle.0),
                        "it is open under the handle that it was to have"
                    );
                    let file = self.model.file(identity_of(&path, body).0, FILE_BYTES);
                    session.files.insert(handle.0, (file, flags));
                }
            }
            Asked::NotGranted => {
                let is_rejected = header.status == Status::protocol(libc::EOPNOTSUPP);
                assert!(is_rejected || self.is_draining, "{header:?}");
            }
            Asked::Open { path, flags } => {
                session.opens -= 1;
                if flags & OPEN_TRUNCATE != 0 {
                    self.model.truncate();
                    self.model.truncations -= 1;
                }
                if is_ok {
                    let (name, identity) = identity_of(&path, body);
                    let file = self.model.file(name, FILE_BYTES);
                    let handle = FileHandle(result as u32);
                    session.files.insert(handle.0, (file, flags));
                    if session.opened.len() < 16 {
                        session.opened.push(Opened { handle, path, flags, identity });
                    }
                }
            }
            Asked::Close(handle) if is_ok => _ = session.files.remove(&handle.0),
            Asked::Read { found, length } => {
                assert!(!is_ok || found.may(OPEN_READ), "the file is not open for that: {found:?}");
                assert!(result == data.len() as u64 && data.len() <= length as usize);
                if is_ok {
                    self.model.end_read(number, data, length as usize, is_cancelled);
                } else {
                    self.model.reads.remove(&number);
                }
            }
            Asked::Write { found, grows } => {
                assert!(!is_ok || found.may(OPEN_WRITE), "the file is not open for that: {found:?}");
                self.model.end_write(number, if is_ok { result as usize } else { 0 }, grows);
            }
            Asked::Broken => assert!(!is_ok, "what makes no sense has succeeded"),
            Asked::Brings(most) => assert!(data.len() <= most as usize),
            Asked::Close(_) | Asked::Other => {}
        }
        self.last = Some(*header);
    }

    /// Lets the server do all that it can do without more from its clients.
    fn settle(&mut self) {
        for turn in 0..50 {
            self.run_jobs();
            self.run_once();
            self.server.advance(Duration::from_millis(1));
            let is_idle = |client: &Client| client.unsent.is_empty() && client.outstanding.is_empty();
            if turn >= 5 && self.clients.iter().all(is_idle) {
                break;
            }
        }
    }

    /// All clients go, and the server is as it was.
    fn end(&mut self, completes: bool) {
        // What was begun is completed, or never will be.
        let mut at = 0;
        while at < self.clients.len() {
            let client = &mut self.clients[at];
            client.reads = true;
            if client.kept_back > 0 && !completes {
                self.remove(at);
                continue;
            }
            client.kept_back = 0;
            at += 1;
        }
        let has_clients = !self.clients.is_empty();
        if has_clients {
            self.settle();
        }
        // Of these nobody knows whether more comes, and they may have memory that others wait for.
        while let Some(at) =
            self.clients.iter().position(|client| client.has_ended || !client.sent.is_empty())
        {
            self.remove(at);
        }
        if has_clients {
            self.settle();
        }
        if !self.is_draining {
            for client in self.clients.iter().filter(|client| client.limits.is_some()) {
                assert!(client.unsent.is_empty(), "the server takes no more");
                assert!(client.outstanding.is_empty(), "not answered: {:?}", client.outstanding);
            }
        }
        while !self.clients.is_empty() {
            self.remove(0);
        }
        self.leave_nothing();
        self.channels.clear();
        self.visit();
        self.reset_files();
        self.model = Model::default();
        self.sessions.clear();
        self.current = [None; 4];
    }

    /// Waits until nothing of any client is left.
    fn leave_nothing(&mut self) {
        for _ in 0..END_STEPS {
            self.run_jobs();
            self.run_once();
            if !self.is_draining && self.server.in_use() == InUse::default() {
                break;
            }
            self.server.advance(END_STEP);
        }
        assert!(!self.is_draining, "a server that was told to stop goes on");
        assert_eq!(self.server.in_use(), InUse::default(), "something is left");
    }

    /// A client that does nothing wrong is served. It leaves the memory as it was.
    fn visit(&mut self) {
        let session = self.session(0);
        let offer = Offer { session: self.sessions[session].id, ..Offer::new("fuzz") };
        self.join(session, None, &offer, offer.hello(), 0, true);
        for _ in 0..10 {
            self.run_once();
        }
        let mut ask = |command: Command<'_>, data: &[u8]| {
            self.last = None;
            assert!(self.ask(0, &command, data, false), "a credit is left");
            self.send(0);
            for _ in 0..100 {
                if self.last.is_some() {
                    break;
                }
                self.run_once();
                self.run_jobs();
            }
            let answer = self.last.expect("the next client is served");
            assert!(answer.status.is_ok(), "the next client: {command:?}: {:?}", answer.status);
            answer.result
        };
        let flags = OPEN_READ | OPEN_WRITE | OPEN_CREATE;
        let file = FileHandle(ask(Command::Open { flags, mode: 0, path: b"/mem" }, &[]) as u32);
        let length = FILE_BYTES as u32;
        assert_eq!(ask(Command::Write { file, offset: 0, length }, &[0; FILE_BYTES]), u64::from(length));
        assert_eq!(ask(Command::Read { file, offset: 0, length }, &[]), u64::from(length));
        ask(Command::Close(file), &[]);
        self.remove(0);
        self.leave_nothing();
    }
}
