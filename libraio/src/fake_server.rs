//! A server for unit tests: a thread for each connection, files in memory, and a switch that makes it hold
//! its answers. It trusts its client and asserts what it relies on.

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use raio_transport::Status;
use raio_transport::handshake::Policy;
use raio_transport::message::{self, Limits, Message, Parsed, ResponseHeader};
use raio_transport::protocol::{Command, FileHandle, FileStatus, OPEN_CREATE};
use zerocopy::IntoBytes;

pub(crate) struct FakeServer {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    policy: Policy,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    files: HashMap<Vec<u8>, Arc<Mutex<Vec<u8>>>>,
    open: BTreeMap<u32, Arc<Mutex<Vec<u8>>>>,
    opened: u32,
    /// Reads and writes are not answered.
    holding: bool,
    /// Nothing is answered but pings.
    mute: bool,
    /// Nothing is done at all.
    frozen: bool,
    connections: Vec<TcpStream>,
}

impl FakeServer {
    pub(crate) fn start(policy: Policy) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared { policy, state: Mutex::default(), changed: Condvar::new() });
        let server = Self { address, shared: Arc::clone(&shared) };
        thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let shared = Arc::clone(&shared);
                shared.state.lock().unwrap().connections.push(stream.try_clone().unwrap());
                thread::spawn(move || {
                    Connection { stream, inbox: Vec::new(), shared, held: Vec::new() }.serve()
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
        for stream in self.shared.state.lock().unwrap().connections.drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

struct Connection {
    stream: TcpStream,
    inbox: Vec<u8>,
    shared: Arc<Shared>,
    /// Requests that are not answered for now: id, command, data.
    held: Vec<(u64, Vec<u8>, Vec<u8>)>,
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
            if let Parsed::Item((peer, welcome), taken) = self.shared.policy.welcome(&self.inbox).unwrap() {
                self.inbox.drain(..taken);
                self.stream.write_all(&welcome).ok()?;
                break peer;
            }
            self.fill()?;
        };
        let limits = peer.grant.limits();
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
                        .then(|| (request.id, body.to_vec(), self.inbox[taken..end].to_vec(), end))
                }
                Parsed::Item(Message::Ping(id), taken) => {
                    self.inbox.drain(..taken);
                    let mut pong = Vec::new();
                    message::encode_pong(id, 0, limits.crc, &mut pong);
                    self.stream.write_all(&pong).ok()?;
                    continue;
                }
                Parsed::Item(..) => return None,
                Parsed::Need(_) => None,
            };
            let mut out = Vec::new();
            if let Some((id, body, data, end)) = item {
                self.inbox.drain(..end);
                self.held.push((id, body, data));
                assert!(self.held.len() <= peer.grant.credits() as usize, "credits exceeded");
            } else {
                self.answer(limits, &mut out);
                self.stream.write_all(&out).ok()?;
                self.fill()?;
            }
        }
    }

    /// Answers all that need not be held.
    fn answer(&mut self, limits: Limits, out: &mut Vec<u8>) {
        let state = self.shared.state.lock().unwrap();
        let (holding, mute) = (state.holding, state.mute);
        drop(state);
        for (id, body, data) in std::mem::take(&mut self.held) {
            if mute {
                self.held.push((id, body, data));
                continue;
            }
            let command = Command::decode(&body).unwrap();
            if let Command::Cancel { id: target } = command {
                let status = match self.held.iter().position(|held| held.0 == target) {
                    Some(at) => {
                        self.held.remove(at);
                        let cancelled = Status::storage(libc::ECANCELED);
                        encode(target, Answer::failed(cancelled, "Cancelled."), limits, out);
                        Status::OK
                    }
                    None => Status::storage(libc::ENOENT),
                };
                encode(id, Answer { status, ..Answer::ok(0) }, limits, out);
            } else if holding && matches!(command, Command::Read { .. } | Command::Write { .. }) {
                self.held.push((id, body, data));
            } else {
                encode(id, self.execute(&command, &data), limits, out);
            }
        }
    }

    fn execute(&self, command: &Command<'_>, data: &[u8]) -> Answer {
        let mut state = self.shared.state.lock().unwrap();
        if let Command::Open { flags, path, .. } = *command {
            let file = match state.files.get(path) {
                Some(file) => Arc::clone(file),
                None if flags & OPEN_CREATE != 0 => Arc::clone(state.files.entry(path.to_vec()).or_default()),
                None => return Answer::failed(Status::storage(libc::ENOENT), "There is no such file."),
            };
            state.opened += 1;
            let handle = state.opened;
            state.open.insert(handle, file);
            return Answer::ok(handle.into());
        }
        let (Command::Close(FileHandle(handle))
        | Command::Stat(FileHandle(handle))
        | Command::Read { file: FileHandle(handle), .. }
        | Command::Write { file: FileHandle(handle), .. }
        | Command::Fsync { file: FileHandle(handle), .. }
        | Command::Discard { file: FileHandle(handle), .. }
        | Command::WriteZeroes { file: FileHandle(handle), .. }
        | Command::Allocate { file: FileHandle(handle), .. }) = *command
        else {
            unreachable!("open and cancel are handled above")
        };
        let Some(file) = state.open.get(&handle).cloned() else {
            return Answer::failed(Status::storage(libc::EBADF), "That file is not open.");
        };
        if let Command::Close(_) = command {
            state.open.remove(&handle);
            return Answer::ok(0);
        }
        drop(state);
        let mut file = file.lock().unwrap();
        match *command {
            Command::Stat(_) => {
                let status = FileStatus { size: (file.len() as u64).into(), ..FileStatus::default() };
                Answer { body: status.as_bytes().to_vec(), ..Answer::ok(0) }
            }
            Command::Read { offset, length, .. } => {
                let start = file.len().min(offset as usize);
                let end = file.len().min(start + length as usize);
                Answer { data: file[start..end].to_vec(), ..Answer::ok((end - start) as u64) }
            }
            Command::Write { offset, .. } => {
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
            Command::Fsync { .. } => Answer::ok(0),
            _ => Answer::failed(Status::storage(libc::EOPNOTSUPP), "Not here."),
        }
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

fn encode(id: u64, answer: Answer, limits: Limits, out: &mut Vec<u8>) {
    let data_crc = if limits.crc { message::data_crc(&answer.data) } else { 0 };
    let response = ResponseHeader {
        id,
        body_len: 0,
        data_len: answer.data.len() as u32,
        status: answer.status,
        credits: 1,
        result: answer.result,
        data_crc,
    };
    response.encode(&answer.body, limits.crc, out);
    out.extend_from_slice(&answer.data);
}
