//! A server for unit tests: a thread for each connection, files in memory, and a switch that makes it hold
//! its answers. It knows channels, can be cut off at any request, and restarted. It trusts its client and
//! asserts what it relies on.

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use raio_transport::Status;
use raio_transport::handshake::{Grant, Policy};
use raio_transport::message::{self, Limits, Message, Parsed, RequestHeader, ResponseHeader, SessionId};
use raio_transport::protocol::path::PathCommand;
use raio_transport::protocol::{
    Command, DirectoryEntry, Extent, FLAG_CRC32C, FLAG_EXCLUSIVE, FileHandle, FileStatus, FileSystemStatus,
    OPEN_CREATE, OPERATION_FEATURES, Opcode, RequestOutcome, push_entry,
};
use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

use crate::{Completion, Context, OperationCrc, SubmitOptions};

pub(crate) struct FakeServer {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    policy: Mutex<Policy>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    files: HashMap<Vec<u8>, Arc<Mutex<Vec<u8>>>>,
    open: BTreeMap<u32, Arc<Mutex<Vec<u8>>>>,
    opened: u32,
    /// The page that was asked for last of each listing, and how many have begun.
    listings: BTreeMap<u64, u64>,
    listed: u64,
    channels: HashMap<([u8; 16], u32), Channel>,
    /// Sessions that clients have given up.
    superseded: Vec<SessionId>,
    /// Channels that their clients have ended.
    goaways: usize,
    /// After how many requests all connections are cut, and whether the last one is executed before.
    cut: Option<(usize, bool)>,
    /// Writes executed.
    writes: usize,
    /// Where files cannot have more bytes; 0: nowhere.
    full_at: u64,
    verifier: u64,
    /// How often it was restarted.
    restarts: u8,
    /// How often each file was replaced by another one.
    replaced: HashMap<Vec<u8>, u8>,
    /// It opens again whatever is at the path.
    trusts: bool,
    /// Feature bits that it does not have any more.
    forgotten: u64,
    /// Nobody is welcomed; with this errno, or with none.
    rejecting: Option<i32>,
    is_shutting_down: bool,
    /// Reads and writes are not answered.
    holding: bool,
    /// Nothing is answered but pings.
    mute: bool,
    /// Nothing is done at all.
    frozen: bool,
    connections: Vec<TcpStream>,
}

/// What is kept of a channel.
#[derive(Default)]
struct Channel {
    epoch: u64,
    /// Its client has heard that nothing is known of earlier requests, or has none.
    is_known: bool,
    /// How the last recorded request of each slot has ended.
    done: HashMap<u16, RequestOutcome>,
}

impl State {
    fn execute(&mut self, command: &Command<'_>, data: &[u8]) -> Answer {
        if let Command::Open { flags, path, .. } = *command {
            let file = match self.files.get(path) {
                Some(file) => Arc::clone(file),
                None if flags & OPEN_CREATE != 0 => Arc::clone(self.files.entry(path.to_vec()).or_default()),
                None => return Answer::failed(Status::storage(libc::ENOENT), "There is no such file."),
            };
            self.opened += 1;
            let handle = self.opened;
            let status = self.status(path, file.lock().unwrap().len());
            self.open.insert(handle, file);
            return Answer { body: status.as_bytes().to_vec(), ..Answer::ok(handle.into()) };
        }
        if let Command::Reopen { file: FileHandle(handle), identity, path, .. } = *command {
            if self.is_shutting_down {
                return Answer::failed(Status::transport(libc::ESHUTDOWN), "The server is shutting down.");
            }
            let Some(file) = self.files.get(path).cloned() else {
                return Answer::failed(Status::storage(libc::ENOENT), "There is no such file.");
            };
            let status = self.status(path, file.lock().unwrap().len());
            if status.identity != identity && !self.trusts {
                return Answer::failed(Status::storage(libc::ESTALE), "It is another file.");
            }
            self.open.insert(handle, file);
            return Answer { body: status.as_bytes().to_vec(), ..Answer::ok(handle.into()) };
        }
        if let Command::ListNext { listing, is_odd, length } = *command {
            if length > 0 {
                return self.page(listing, is_odd);
            }
            self.listings.remove(&listing);
            return Answer::ok(0);
        }
        if let Command::Path(command) = command {
            return self.execute_path(command, data);
        }
        if let Command::Copy { source, offset, length, destination, destination_offset } = *command {
            let files = [source, destination].map(|FileHandle(handle)| self.open.get(&handle).cloned());
            let [Some(source), Some(destination)] = files else {
                return Answer::failed(Status::storage(libc::EBADF), "That file is not open.");
            };
            let source = source.lock().unwrap().clone();
            let start = source.len().min(offset as usize);
            let copied = &source[start..source.len().min(start + length as usize)];
            let mut destination = destination.lock().unwrap();
            let end = destination_offset as usize + copied.len();
            let len = destination.len().max(end);
            destination.resize(len, 0);
            destination[destination_offset as usize..end].copy_from_slice(copied);
            return Answer::ok(copied.len() as u64);
        }
        let (Command::Close(FileHandle(handle))
        | Command::Stat(FileHandle(handle))
        | Command::Read { file: FileHandle(handle), .. }
        | Command::Write { file: FileHandle(handle), .. }
        | Command::Fsync { file: FileHandle(handle), .. }
        | Command::Discard { file: FileHandle(handle), .. }
        | Command::WriteZeroes { file: FileHandle(handle), .. }
        | Command::Allocate { file: FileHandle(handle), .. }
        | Command::Truncate { file: FileHandle(handle), .. }
        | Command::Extents { file: FileHandle(handle), .. }
        | Command::Checksum { file: FileHandle(handle), .. }
        | Command::Lock { file: FileHandle(handle), .. }) = *command
        else {
            unreachable!("open and cancel are handled above")
        };
        let Some(file) = self.open.get(&handle).cloned() else {
            return Answer::failed(Status::storage(libc::EBADF), "That file is not open.");
        };
        if let Command::Close(_) = command {
            self.open.remove(&handle);
            return Answer::ok(0);
        }
        self.writes += usize::from(matches!(command, Command::Write { .. }));
        let (verifier, full_at) = (self.verifier, self.full_at);
        let path = self.path_of(&file);
        let status = self.status(&path, file.lock().unwrap().len());
        let mut file = file.lock().unwrap();
        match *command {
            Command::Stat(_) => Answer { body: status.as_bytes().to_vec(), ..Answer::ok(0) },
            Command::Read { offset, length, .. } => {
                let start = file.len().min(offset as usize);
                let end = file.len().min(start + length as usize);
                Answer { data: file[start..end].to_vec(), ..Answer::ok((end - start) as u64) }
            }
            Command::Write { offset, .. } => {
                let room = if full_at == 0 { u64::MAX } else { full_at.saturating_sub(offset) };
                let data = &data[..data.len().min(room as usize)];
                if data.is_empty() && room == 0 {
                    return Answer::failed(Status::storage(libc::ENOSPC), "It is full.");
                }
                let end = offset as usize + data.len();
                if file.len() < end {
                    file.resize(end, 0);
                }
                file[offset as usize..end].copy_from_slice(data);
                Answer::ok(data.len() as u64)
            }
            Command::WriteZeroes { offset, length, .. } => {
                file[offset as usize..(offset + length) as usize].fill(0);
                Answer::ok(0)
            }
            Command::Fsync { .. } => Answer::ok(verifier),
            Command::Truncate { size, .. } => {
                file.resize(size as usize, 0);
                Answer::ok(0)
            }
            // All of it is data.
            Command::Extents { offset, length, .. } => {
                let end = (offset + length).min(file.len() as u64);
                let extent = Extent { offset: offset.into(), length: (end - offset).into() };
                Answer { body: extent.as_bytes().to_vec(), ..Answer::ok(offset + length) }
            }
            // BLAKE3 is not checked here: any 32 bytes do.
            Command::Checksum { offset, length, checksum, .. } => {
                let start = file.len().min(offset as usize);
                let bytes = &file[start..file.len().min(start + length as usize)];
                let crc = u64::from(message::data_crc(bytes));
                let body = match checksum {
                    FLAG_CRC32C => crc.to_le_bytes().to_vec(),
                    _ => vec![crc as u8; 32],
                };
                Answer { body, ..Answer::ok(bytes.len() as u64) }
            }
            Command::Lock { .. } => Answer::ok(0),
            _ => Answer::failed(Status::storage(libc::EOPNOTSUPP), "Not here."),
        }
    }

    /// A page of a listing, the next one unless that is the one that was asked for last.
    fn page(&mut self, listing: u64, is_odd: bool) -> Answer {
        let Some(page) = self.listings.get_mut(&listing) else {
            return Answer::failed(Status::storage(libc::ESTALE), "There is no such listing.");
        };
        *page += u64::from(*page == 0 || (*page % 2 == 1) == is_odd);
        let name = page.to_string();
        let (name, mode) = (name.as_bytes(), libc::S_IFREG);
        let entry = DirectoryEntry { name, mode, size: 0, modified_ns: 0, inode: *page, has_status: true };
        let mut data = vec![0; entry.wire_len()];
        push_entry(&entry, &mut data).unwrap();
        let result = if *page == 10 { 0 } else { listing };
        Answer { data, ..Answer::ok(result) }
    }

    fn execute_path(&mut self, command: &PathCommand<'_>, data: &[u8]) -> Answer {
        let PathCommand { path, other, .. } = *command;
        let missing = || Answer::failed(Status::storage(libc::ENOENT), "There is no such file.");
        let found = self.files.get(path).cloned();
        let status_of = |file: &Arc<Mutex<Vec<u8>>>| FileStatus {
            size: (file.lock().unwrap().len() as u64).into(),
            mode: libc::S_IFREG.into(),
            ..FileStatus::default()
        };
        match (command.opcode, found) {
            (Opcode::StatPath, Some(file)) => {
                Answer { body: status_of(&file).as_bytes().to_vec(), ..Answer::ok(0) }
            }
            (Opcode::Get, Some(file)) => {
                let body = status_of(&file).as_bytes().to_vec();
                let file = file.lock().unwrap();
                let data = file[..file.len().min(command.length as usize)].to_vec();
                Answer { body, result: data.len() as u64, data, ..Answer::ok(0) }
            }
            (Opcode::Put, Some(_)) if command.has(FLAG_EXCLUSIVE) => {
                Answer::failed(Status::storage(libc::EEXIST), "There is one already.")
            }
            (Opcode::Put, _) => {
                self.files.insert(path.to_vec(), Arc::new(Mutex::new(data.to_vec())));
                Answer::ok(data.len() as u64)
            }
            (Opcode::Unlink, Some(_)) => {
                self.files.remove(path);
                Answer::ok(0)
            }
            (Opcode::Rename, Some(file)) => {
                self.files.remove(path);
                self.files.insert(other.to_vec(), file);
                Answer::ok(0)
            }
            // What is in the file is where it leads.
            (Opcode::Readlink, Some(file)) => {
                let mut body = file.lock().unwrap().clone();
                let len = body.len();
                body.resize(message::padded(len), 0);
                Answer { body, ..Answer::ok(len as u64) }
            }
            (Opcode::Statfs, _) => {
                let status = FileSystemStatus { blocks: 1000.into(), ..FileSystemStatus::default() };
                Answer { body: status.as_bytes().to_vec(), ..Answer::ok(0) }
            }
            // Its attributes are one with its contents, and one whose name is its path.
            (Opcode::GetXattr, Some(file)) => {
                let data = file.lock().unwrap().clone();
                Answer { result: data.len() as u64, data, ..Answer::ok(0) }
            }
            (Opcode::ListXattr, Some(_)) => {
                let data = [b"user.contents\0", path, b"\0"].concat();
                Answer { result: data.len() as u64, data, ..Answer::ok(0) }
            }
            (Opcode::SetXattr, Some(file)) => {
                *file.lock().unwrap() = data.to_vec();
                Answer::ok(0)
            }
            // Every directory has ten pages with an entry each.
            (Opcode::List, None) => {
                self.listed += 1;
                self.listings.insert(self.listed, 0);
                self.page(self.listed, true)
            }
            (Opcode::Link | Opcode::Symlink | Opcode::Mkdir | Opcode::Rmdir, _) => {
                Answer::failed(Status::storage(libc::EPERM), "Not here.")
            }
            _ => missing(),
        }
    }

    fn cut_all(&mut self) {
        for stream in self.connections.drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    fn status(&self, path: &[u8], size: usize) -> FileStatus {
        let mut identity = [self.replaced.get(path).copied().unwrap_or(0); 16];
        let len = path.len().min(15);
        identity[..len].copy_from_slice(&path[..len]);
        let verifier = self.verifier.into();
        FileStatus { size: (size as u64).into(), identity, verifier, ..FileStatus::default() }
    }

    fn path_of(&self, file: &Arc<Mutex<Vec<u8>>>) -> Vec<u8> {
        let found = self.files.iter().find(|(_, other)| Arc::ptr_eq(file, other));
        found.map(|(path, _)| path.clone()).unwrap_or_default()
    }
}

impl FakeServer {
    pub(crate) fn start(policy: Policy) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let policy = Policy { features: policy.features | OPERATION_FEATURES, ..policy };
        let shared =
            Arc::new(Shared { policy: Mutex::new(policy), state: Mutex::default(), changed: Condvar::new() });
        let server = Self { address, shared: Arc::clone(&shared) };
        thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let shared = Arc::clone(&shared);
                shared.state.lock().unwrap().connections.push(stream.try_clone().unwrap());
                thread::spawn(move || {
                    let (inbox, held) = (Vec::new(), Vec::new());
                    let (channel, epoch, is_gone, must_ask) = (None, 0, false, false);
                    Connection { stream, inbox, shared, held, channel, epoch, is_gone, must_ask }.serve()
                });
            }
        });
        server
    }

    pub(crate) fn file(&self, path: &str, contents: Vec<u8>) {
        let file = Arc::new(Mutex::new(contents));
        self.shared.state.lock().unwrap().files.insert(path.into(), file);
    }

    pub(crate) fn contents(&self, path: &str) -> Vec<u8> {
        self.shared.state.lock().unwrap().files[path.as_bytes()].lock().unwrap().clone()
    }

    /// What there is at a path.
    pub(crate) fn find(&self, path: &str) -> Option<Vec<u8>> {
        let found = self.shared.state.lock().unwrap().files.get(path.as_bytes()).cloned();
        found.map(|file| file.lock().unwrap().clone())
    }

    /// Each byte of a file becomes this.
    pub(crate) fn fill(&self, path: &str, byte: u8) {
        self.shared.state.lock().unwrap().files[path.as_bytes()].lock().unwrap().fill(byte);
    }

    /// Listings that have begun, and were not ended.
    pub(crate) fn listings(&self) -> usize {
        self.shared.state.lock().unwrap().listings.len()
    }

    /// Open files.
    pub(crate) fn open(&self) -> usize {
        self.shared.state.lock().unwrap().open.len()
    }

    pub(crate) fn hold(&self, holding: bool) {
        self.shared.state.lock().unwrap().holding = holding;
        self.shared.changed.notify_all();
    }

    pub(crate) fn mute(&self, mute: bool) {
        self.shared.state.lock().unwrap().mute = mute;
    }

    /// Falls silent for good.
    pub(crate) fn freeze(&self) {
        self.shared.state.lock().unwrap().frozen = true;
    }

    /// Cuts every connection.
    pub(crate) fn die(&self) {
        self.shared.state.lock().unwrap().cut_all();
    }

    /// Cuts every connection at the n-th request from now on, which is executed before that or is not.
    pub(crate) fn cut_at(&self, n: usize, executed: bool) {
        self.shared.state.lock().unwrap().cut = Some((n, executed));
    }

    /// Whether it has not done so yet.
    pub(crate) fn is_to_cut(&self) -> bool {
        self.shared.state.lock().unwrap().cut.is_some()
    }

    /// Forgets what a process that is started anew does not know, and perhaps what it has not made durable.
    pub(crate) fn restart(&self, verifier: u64) {
        let mut state = self.shared.state.lock().unwrap();
        state.cut_all();
        state.channels.clear();
        state.open.clear();
        state.listings.clear();
        state.verifier = verifier;
        state.restarts += 1;
    }

    /// Lets files have another verifier, as after an fsync that has failed.
    pub(crate) fn replace_verifier(&self, verifier: u64) {
        self.shared.state.lock().unwrap().verifier = verifier;
    }

    /// Forgets the sessions and their files, as after their linger time.
    pub(crate) fn end_sessions(&self) {
        let mut state = self.shared.state.lock().unwrap();
        state.cut_all();
        state.channels.clear();
        state.open.clear();
        state.listings.clear();
    }

    /// Has no such feature bits from now on, as an older server.
    pub(crate) fn forget(&self, features: u64) {
        self.shared.state.lock().unwrap().forgotten = features;
    }

    /// What it grants from now on.
    pub(crate) fn set_io_max(&self, bytes: u32) {
        self.shared.policy.lock().unwrap().data_bytes_max = bytes;
    }

    /// Files cannot have more bytes than this.
    pub(crate) fn fill_up(&self, full_at: u64) {
        self.shared.state.lock().unwrap().full_at = full_at;
    }

    /// A file is another one from now on.
    pub(crate) fn replace(&self, path: &str) {
        *self.shared.state.lock().unwrap().replaced.entry(path.into()).or_default() += 1;
    }

    /// Opens again whatever is at the path of a file, as a server that does not look.
    pub(crate) fn trust(&self) {
        self.shared.state.lock().unwrap().trusts = true;
    }

    /// Opens nothing again, as a server does that was told to stop.
    pub(crate) fn shut_down(&self, is_shutting_down: bool) {
        self.shared.state.lock().unwrap().is_shutting_down = is_shutting_down;
    }

    /// Turns everybody away with this errno; with 0 without a word.
    pub(crate) fn reject(&self, errno: Option<i32>) {
        self.shared.state.lock().unwrap().rejecting = errno;
    }

    /// Writes executed.
    pub(crate) fn writes(&self) -> usize {
        self.shared.state.lock().unwrap().writes
    }

    pub(crate) fn goaways(&self) -> usize {
        self.shared.state.lock().unwrap().goaways
    }

    pub(crate) fn superseded(&self) -> usize {
        self.shared.state.lock().unwrap().superseded.len()
    }

    /// The numbers and epochs of the channels.
    pub(crate) fn channels(&self) -> Vec<(u32, u64)> {
        let state = self.shared.state.lock().unwrap();
        let mut all: Vec<_> = state.channels.iter().map(|((_, n), channel)| (*n, channel.epoch)).collect();
        all.sort_unstable();
        all
    }
}

/// Checksums of an operation's own; of a write's data this one, or what it is now.
pub(crate) fn with_crc(crc: Option<u32>) -> SubmitOptions {
    let crc = crc.map_or(OperationCrc::Computed, OperationCrc::Given);
    SubmitOptions { crc, ..SubmitOptions::default() }
}

/// Waits until it is so. `what` says what is not, if that takes too long.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Collects `n` completions, in the order of their tokens.
pub(crate) fn collect(context: &mut Context, n: usize) -> Vec<Completion> {
    let mut all = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(20);
    while all.len() < n {
        assert!(Instant::now() < deadline, "{} of {n}", all.len());
        context.wait(1, usize::MAX, Some(Duration::from_secs(1))).unwrap();
        all.extend(std::iter::from_fn(|| context.next()));
    }
    all.sort_by_key(|completion| completion.token);
    all
}

struct Connection {
    stream: TcpStream,
    inbox: Vec<u8>,
    shared: Arc<Shared>,
    /// Requests that are not answered for now: id, command, data.
    held: Vec<(RequestHeader, Vec<u8>, Vec<u8>)>,
    channel: Option<([u8; 16], u32)>,
    /// The channel's, for this connection.
    epoch: u64,
    /// The channel was not known.
    is_gone: bool,
    /// The first command must be an outcome.
    must_ask: bool,
}

impl Connection {
    fn fill(&mut self) -> Option<()> {
        let mut bytes = [0; 65536];
        match self.stream.read(&mut bytes) {
            Ok(0) => None,
            Ok(n) => {
                self.inbox.extend_from_slice(&bytes[..n]);
                Some(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Some(()),
            Err(_) => None,
        }
    }

    fn serve(mut self) -> Option<()> {
        let peer = loop {
            let shared = &self.shared;
            let state = shared.state.lock().unwrap();
            let mut policy = shared.policy.lock().unwrap().clone();
            policy.features &= !state.forgotten;
            policy.server[0] ^= state.restarts;
            drop(state);
            if let Parsed::Item((peer, welcome), taken) = policy.welcome(&self.inbox).unwrap() {
                self.inbox.drain(..taken);
                let mut state = self.shared.state.lock().unwrap();
                let mut rejected = state.rejecting;
                if let Some(offered) = peer.channel {
                    let is_known = state.channels.contains_key(&(peer.session.0, offered.number));
                    let channel = state.channels.entry((peer.session.0, offered.number)).or_default();
                    channel.is_known |= offered.epoch == 1;
                    self.is_gone = !channel.is_known;
                    if channel.epoch >= offered.epoch {
                        rejected = Some(libc::ESTALE);
                    } else if rejected.is_none() {
                        channel.epoch = offered.epoch;
                    } else if !is_known {
                        state.channels.remove(&(peer.session.0, offered.number));
                    }
                }
                if let Some(errno) = rejected {
                    drop(state);
                    if errno != 0 {
                        let _ = self.stream.write_all(&policy.rejection(errno, "Not now."));
                    }
                    let _ = self.stream.shutdown(std::net::Shutdown::Both);
                    return None;
                }
                state.superseded.extend(&peer.supersedes);
                drop(state);
                self.stream.write_all(&welcome).ok()?;
                break peer;
            }
            self.fill()?;
        };
        let limits = peer.grant.limits();
        self.channel = peer.channel.map(|channel| (peer.session.0, channel.number));
        self.epoch = peer.channel.map_or(0, |channel| channel.epoch);
        self.must_ask = peer.begins_with_outcome();
        // So that held requests are looked at again.
        self.stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
        loop {
            if self.shared.state.lock().unwrap().frozen {
                thread::sleep(Duration::from_millis(5));
                continue;
            }
            let item = match message::parse(&self.inbox, &limits).unwrap() {
                Parsed::Item(Message::Request(request, body), taken) => {
                    let end = taken + request.data_len as usize;
                    (self.inbox.len() >= end)
                        .then(|| (request, body.to_vec(), self.inbox[taken..end].to_vec(), end))
                }
                Parsed::Item(Message::Ping(id), taken) => {
                    self.inbox.drain(..taken);
                    let mut pong = Vec::new();
                    message::encode_pong(id, 0, limits.crc, &mut pong);
                    self.stream.write_all(&pong).ok()?;
                    continue;
                }
                Parsed::Item(Message::Goaway(status, _), _) => {
                    let mut state = self.shared.state.lock().unwrap();
                    if status.is_ok()
                        && let Some(channel) = self.channel
                    {
                        state.channels.remove(&channel);
                        state.goaways += 1;
                    }
                    return None;
                }
                Parsed::Item(..) => return None,
                Parsed::Need(_) => None,
            };
            let mut out = Vec::new();
            if let Some((request, body, data, end)) = item {
                self.inbox.drain(..end);
                self.held.push((request, body, data));
                assert!(self.held.len() <= peer.grant.credits() as usize, "credits exceeded");
            } else {
                self.answer(&peer.grant, &mut out);
                self.stream.write_all(&out).ok()?;
                self.fill()?;
            }
        }
    }

    /// Answers all that need not be held.
    fn answer(&mut self, grant: &Grant, out: &mut Vec<u8>) {
        let (limits, features) = (grant.limits(), grant.features);
        let state = self.shared.state.lock().unwrap();
        let (holding, mute) = (state.holding, state.mute);
        drop(state);
        for (request, body, data) in std::mem::take(&mut self.held) {
            if mute {
                self.held.push((request, body, data));
                continue;
            }
            let command = Command::decode(&body).unwrap();
            assert!(command.opcode().operation().is_granted(features), "{command:?} was not granted");
            if let Command::Cancel { id: target } = command {
                let status = match self.held.iter().position(|held| held.0.id == target) {
                    Some(at) => {
                        let (target, ..) = self.held.remove(at);
                        let cancelled = Status::storage(libc::ECANCELED);
                        encode(&target, Answer::failed(cancelled, "Cancelled."), limits, out);
                        Status::OK
                    }
                    None => Status::storage(libc::ENOENT),
                };
                encode(&request, Answer { status, ..Answer::ok(0) }, limits, out);
            } else if holding
                && matches!(command, Command::Read { .. } | Command::Write { .. } | Command::Path(_))
            {
                self.held.push((request, body, data));
            } else if let Command::Outcome { ids } = command {
                if !std::mem::replace(&mut self.must_ask, false)
                    && let Some(channel) = self.channel
                    && let Some(channel) = self.shared.state.lock().unwrap().channels.get_mut(&channel)
                {
                    (channel.is_known, self.is_gone) = (true, false);
                }
                encode(&request, self.outcomes(ids), limits, out);
            } else {
                assert!(!self.must_ask, "{command:?} before an outcome");
                let mut state = self.shared.state.lock().unwrap();
                let is_last = match &mut state.cut {
                    Some((0, executed)) => Some(*executed),
                    Some((n, _)) => {
                        *n -= 1;
                        None
                    }
                    None => None,
                };
                // Under the lock with what comes before and after: a connection that takes this one's place
                // finds what was executed, and nothing is executed once it has.
                let channel = self.channel.expect("each connection of libraio has a channel");
                if state.channels.get(&channel).is_none_or(|channel| channel.epoch != self.epoch) {
                    return;
                }
                if let Some(channel) = state.channels.get_mut(&channel) {
                    channel.is_known = true;
                }
                let id = request.id;
                let has_crc = request.has_crc || limits.crc;
                let is_damaged = has_crc && !data.is_empty() && request.data_crc != message::data_crc(&data);
                let answer = (is_last != Some(false)).then(|| match is_damaged {
                    true => Answer::failed(Status::DAMAGED, "It arrived damaged."),
                    false => state.execute(&command, &data),
                });
                if let Some(answer) = &answer
                    && command.opcode().operation().is_recorded
                {
                    let outcome = RequestOutcome::done(id as u32, answer.status, answer.result);
                    let channel = state.channels.entry(channel).or_default();
                    let before = channel.done.insert(id as u16, outcome);
                    assert!(before.is_none_or(|before| u64::from(before.id()) != id), "an id was used again");
                }
                if is_last.is_some() {
                    state.cut = None;
                    state.cut_all();
                    return;
                }
                drop(state);
                if let Some(answer) = answer {
                    encode(&request, answer, limits, out);
                }
            }
        }
    }

    fn outcomes(&self, ids: &[U32]) -> Answer {
        if self.is_gone {
            return Answer::failed(Status::storage(libc::ESTALE), "There is no such channel.");
        }
        let state = self.shared.state.lock().unwrap();
        let channel = self.channel.and_then(|channel| state.channels.get(&channel));
        let of = |id: u32| {
            let done = channel.and_then(|channel| channel.done.get(&(id as u16)));
            done.filter(|done| done.id() == id).copied().unwrap_or_else(|| RequestOutcome::never(id))
        };
        let body = ids.iter().flat_map(|id| of(id.get()).as_bytes().to_vec()).collect();
        Answer { body, ..Answer::ok(ids.len() as u64) }
    }
}

struct Answer {
    status: Status,
    result: u64,
    body: Vec<u8>,
    data: Vec<u8>,
}

impl Answer {
    fn ok(result: u64) -> Self {
        Self { status: Status::OK, result, body: Vec::new(), data: Vec::new() }
    }

    fn failed(status: Status, text: &str) -> Self {
        Self { status, result: 0, body: text.into(), data: Vec::new() }
    }
}

fn encode(request: &RequestHeader, answer: Answer, limits: Limits, out: &mut Vec<u8>) {
    let has_crc = request.has_crc;
    let data_crc = if limits.crc || has_crc { message::data_crc(&answer.data) } else { 0 };
    let response = ResponseHeader {
        id: request.id,
        body_len: 0,
        data_len: answer.data.len() as u32,
        status: answer.status,
        credits: 1,
        result: answer.result,
        has_crc,
        data_crc,
    };
    response.encode(&answer.body, limits.crc, out);
    out.extend_from_slice(&answer.data);
}
