//! How a running server hands its listening sockets over to its successor: another process, that is started
//! for an upgrade or for exports elsewhere, which this process cannot open any more.
//!
//! Both meet at a Unix socket (`--hand-over PATH`) of kind SOCK_SEQPACKET. Each line below is one message,
//! behind the words of [`HEADING`]. The successor asks, the running server answers.
//!
//! | message | means |
//! |---|---|
//! | `give PID` | the successor is this process, and wants the listening sockets |
//! | `pid PID`, and a URL on each further line | the running server is this process; with descriptors |
//! | `end` | the successor is ready to listen: stop accepting, complete the requests in flight, and end |
//! | `ending` | nothing more is accepted. The end of the connection is that of the process |
//!
//! The descriptors are the socket at PATH, and one for each URL: that of `--listen`, with its address looked
//! up, `http://ADDRESS` for `--http`, and `admin://PATH` for `--admin`.
//!
//! If the successor goes away before `end` nothing has happened. Each side checks which user the other one
//! is. The running server does not wait for messages: it reads what has arrived, and closes the connection of
//! a successor that sends nothing in time, or anything else. It serves one at a time; others wait in the
//! backlog.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use raio_transport::address::{Address, Endpoint};
use raio_transport::credentials::Credentials;
use raio_transport::reactor::{Event, File, Op, OpId, Payload, Reactor, TimerId, Token};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname,
    listen, recv, recvmsg, sendmsg, socket_with, sockopt,
};

use crate::config::HANDED_OVER_MAX;
use crate::log::log_client;
use crate::peer::{Origin, PeerAddress};
use crate::tuning::hand_over::{
    ANSWER_TIMEOUT, ASK_TIMEOUT, BACKLOG, CONNECT_RETRY, END_TIMEOUT, MESSAGE_BYTES_MAX,
};
use crate::tuning::main_thread::{ACCEPT_RETRY, BIND_TIMEOUT};

/// What each message begins with: the protocol, and its version.
const HEADING: &str = "raio hand-over 1 ";
/// What the URLs of sockets begin with on which HTTP is served: over TCP, and to the operator.
pub const HTTP: &str = "http://";
pub const ADMIN: &str = "admin://";
const END: &str = "end";
const ENDING: &str = "ending";

// The messages
// -------------------------------------------------------------------------------------------------------

/// What a successor asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// The listening sockets, for the process with this id.
    Give(u32),
    /// That the server ends.
    End,
}

impl Asked {
    fn print(self) -> String {
        match self {
            Self::Give(pid) => format!("{HEADING}give {pid}"),
            Self::End => format!("{HEADING}{END}"),
        }
    }

    fn parse(message: &[u8]) -> Option<Self> {
        match words(message)? {
            END => Some(Self::End),
            other => Some(Self::Give(number(other.strip_prefix("give ")?)?)),
        }
    }
}

/// What a running server says of the descriptors that it sends.
#[derive(Debug, PartialEq, Eq)]
struct Given {
    pid: u32,
    urls: Vec<String>,
}

impl Given {
    fn print(&self) -> String {
        let lines = self.urls.iter().map(|url| format!("\n{url}"));
        format!("{HEADING}pid {}{}", self.pid, lines.collect::<String>())
    }

    fn parse(message: &[u8]) -> Option<Self> {
        let mut lines = words(message)?.split('\n');
        let pid = number(lines.next()?.strip_prefix("pid ")?)?;
        let urls: Vec<_> = lines.map(str::to_owned).collect();
        (urls.len() <= HANDED_OVER_MAX).then_some(Self { pid, urls })
    }
}

/// What follows the heading.
fn words(message: &[u8]) -> Option<&str> {
    std::str::from_utf8(message).ok()?.strip_prefix(HEADING)
}

fn number(text: &str) -> Option<u32> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if is_number { text.parse().ok() } else { None }
}

// The start
// -------------------------------------------------------------------------------------------------------

/// What a server that starts finds where servers hand over.
#[derive(Debug)]
pub struct Meeting {
    /// Where its own successor will connect: bound now, or given by the running server.
    pub place: MeetingPlace,
    /// The running server. None: there is none.
    pub predecessor: Option<Predecessor>,
}

/// Where servers hand over.
#[derive(Debug)]
pub struct MeetingPlace {
    path: PathBuf,
    socket: OwnedFd,
    users: Vec<u32>,
}

/// What is at a path where servers hand over, or will be.
enum Found {
    /// A server.
    Server(OwnedFd),
    /// A socket at which none listens.
    Abandoned,
    Nothing,
}

/// Fails if something is at the path that is no socket.
pub fn check_path(path: &Path) -> anyhow::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => bail!(
            "--hand-over: {} is there already, and is no socket. Give another path, or remove it.",
            path.display()
        ),
        _ => Ok(()),
    }
}

impl Meeting {
    /// Connects to the server that listens at the path and takes its listening sockets, or begins to listen
    /// there. `users` are those that may run the other server. To be called while there is one thread, for
    /// the umask.
    pub fn begin(path: &Path, users: Vec<u32>) -> anyhow::Result<Self> {
        check_path(path)?;
        let deadline = Instant::now() + BIND_TIMEOUT;
        loop {
            match find(path)? {
                Found::Server(socket) => match Predecessor::ask(path, socket, &users)? {
                    Some((predecessor, place)) => {
                        let place = MeetingPlace { path: path.to_owned(), socket: place, users };
                        return Ok(Self { place, predecessor: Some(predecessor) });
                    }
                    // It has just ended: its sockets stay until its last operation has ended.
                    None if Instant::now() < deadline => std::thread::sleep(CONNECT_RETRY),
                    None => bail!(
                        "The server that runs, at {}, does not hand over: it closes the connection; its log \
                         says why.",
                        path.display()
                    ),
                },
                Found::Abandoned => {
                    std::fs::remove_file(path)
                        .with_context(|| format!("Cannot replace the old socket {}", path.display()))?;
                    break;
                }
                Found::Nothing => break,
            }
        }
        let socket = listen_at(path).with_context(|| {
            format!(
                "Cannot listen at {} for a successor, as --hand-over asks. Its directory must be there and \
                 let the server make files",
                path.display()
            )
        })?;
        Ok(Self { place: MeetingPlace { path: path.to_owned(), socket, users }, predecessor: None })
    }
}

fn new_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

fn find(path: &Path) -> anyhow::Result<Found> {
    let cannot = || format!("Cannot connect to the server that runs, at {}", path.display());
    let address = SocketAddrUnix::new(path).context("The path of --hand-over is longer than 107 bytes")?;
    let socket = new_socket().with_context(cannot)?;
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    loop {
        return match connect(&socket, &address) {
            Ok(()) => Ok(Found::Server(socket)),
            Err(Errno::NOENT) => Ok(Found::Nothing),
            Err(Errno::CONNREFUSED) => Ok(Found::Abandoned),
            Err(Errno::PROTOTYPE) => {
                bail!(
                    "--hand-over: another kind of socket is at {}, such as one of --listen. Give a path \
                     that nothing else uses.",
                    path.display()
                )
            }
            // Its backlog is full, or a signal has come.
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(CONNECT_RETRY);
                continue;
            }
            Err(errno) => Err(errno).with_context(cannot),
        };
    }
}

fn listen_at(path: &Path) -> rustix::io::Result<OwnedFd> {
    let socket = new_socket()?;
    let address = SocketAddrUnix::new(path)?;
    let before = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let bound = bind(&socket, &address);
    rustix::process::umask(before);
    bound?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Whether the other end of a Unix socket belongs to one of these users.
pub fn is_trusted(socket: impl AsFd, users: &[u32]) -> Result<(), String> {
    match Credentials::of_peer(socket) {
        Ok(peer) if users.contains(&peer.uid) => Ok(()),
        Ok(peer) => Err(format!("it is of user {}", peer.uid)),
        Err(error) => Err(format!("the kernel does not say whose it is: {error}")),
    }
}

// The successor
// -------------------------------------------------------------------------------------------------------

/// A running server, to its successor.
#[derive(Debug)]
pub struct Predecessor {
    socket: Arc<OwnedFd>,
    /// Where it is reached, for messages.
    path: PathBuf,
    /// Its process.
    pub pid: u32,
    sockets: Vec<GivenSocket>,
}

/// A listening socket that was given.
#[derive(Debug)]
pub struct GivenSocket {
    /// What it was bound for: a URL of `--listen`, its address looked up.
    pub url: String,
    /// The socket.
    pub socket: OwnedFd,
}

impl Predecessor {
    /// Has a server give its sockets. Returns that at which servers meet, too. None: the server closes the
    /// connection.
    fn ask(path: &Path, socket: OwnedFd, users: &[u32]) -> anyhow::Result<Option<(Self, OwnedFd)>> {
        if let Err(why) = is_trusted(&socket, users) {
            bail!(
                "--hand-over: no sockets are taken from the process that listens at {}: {why}, and not of \
                 root or of this server's user.",
                path.display()
            );
        }
        let cannot = || format!("The server that runs, at {}, does not hand over", path.display());
        match send(&socket, &Asked::Give(std::process::id()).print()) {
            Err(Errno::PIPE | Errno::CONNRESET) => return Ok(None),
            sent => sent.with_context(cannot)?,
        }
        let answer = receive(&socket, ANSWER_TIMEOUT).with_context(cannot)?;
        let Some((message, mut descriptors)) = answer else { return Ok(None) };
        let given = Given::parse(&message).with_context(|| format!("{}: it is another program", cannot()))?;
        ensure!(
            descriptors.len() == given.urls.len() + 1,
            "{}: it gives {} descriptors for {} sockets.",
            cannot(),
            descriptors.len(),
            given.urls.len() + 1
        );
        let place = descriptors.remove(0);
        ensure!(is_place(&place, path), "{}: it gives another socket than that one.", cannot());
        let sockets = given.urls.into_iter().zip(descriptors);
        let sockets = sockets.map(|(url, socket)| GivenSocket { url, socket }).collect();
        let this = Self { socket: Arc::new(socket), path: path.to_owned(), pid: given.pid, sockets };
        Ok(Some((this, place)))
    }

    /// What was given: once.
    pub fn take_sockets(&mut self) -> Vec<GivenSocket> {
        std::mem::take(&mut self.sockets)
    }

    /// Those of them that are for HTTP ([`Offered::url`]), once.
    pub fn take_http_sockets(&mut self) -> Vec<GivenSocket> {
        let is_http = |it: &mut GivenSocket| it.url.starts_with(HTTP) || it.url.starts_with(ADMIN);
        self.sockets.extract_if(.., is_http).collect()
    }

    /// Has it end. When this comes back it accepts nothing more.
    pub fn end(&self) -> anyhow::Result<()> {
        let cannot = || {
            format!(
                "The server that runs (process {}, at {}) does not end; its log says why. This one does not \
                 start, so that no two serve",
                self.pid,
                self.path.display()
            )
        };
        send(&self.socket, &Asked::End.print()).with_context(cannot)?;
        let answer = receive(&self.socket, ANSWER_TIMEOUT).with_context(cannot)?;
        ensure!(answer.is_some_and(|(message, _)| words(&message) == Some(ENDING)), "{}.", cannot());
        Ok(())
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        !matches!(recv(&self.socket, &mut [0; 1], RecvFlags::DONTWAIT), Err(Errno::AGAIN | Errno::INTR))
    }

    /// Readable when it has ended.
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.socket)
    }
}

impl GivenSocket {
    /// Where it listens, if it is a stream socket that does.
    pub fn endpoint(&self) -> Option<Endpoint> {
        let is_stream = sockopt::socket_type(&self.socket) == Ok(SocketType::STREAM);
        let is_listening = sockopt::socket_acceptconn(&self.socket) == Ok(true);
        let address = getsockname(&self.socket).ok().filter(|_| is_stream && is_listening)?;
        if let Ok(address) = SocketAddr::try_from(address.clone()) {
            return Some(Endpoint::Ip(address));
        }
        let path = SocketAddrUnix::try_from(address).ok()?;
        let path = std::ffi::OsStr::from_bytes(path.path_bytes()?);
        Some(Endpoint::Unix(path.into()))
    }

    /// Where it listens, if that is what a server with this `--listen` wants: any port does for 0, and the
    /// file of a Unix socket must still be there.
    pub fn listens_at(&self, wanted: &Endpoint) -> Option<Endpoint> {
        let found = self.endpoint()?;
        let is_it = match (&found, wanted) {
            (Endpoint::Ip(found), Endpoint::Ip(wanted)) => {
                found.ip() == wanted.ip() && (wanted.port() == 0 || wanted.port() == found.port())
            }
            (Endpoint::Unix(found), Endpoint::Unix(wanted)) => {
                found == wanted && std::fs::symlink_metadata(found).is_ok_and(|it| it.file_type().is_socket())
            }
            _ => false,
        };
        is_it.then_some(found)
    }
}

/// A URL of `--listen` for stream sockets, its address looked up.
pub fn url(endpoint: &Endpoint) -> String {
    match endpoint {
        Endpoint::Ip(address) => format!("tcp://{address}"),
        Endpoint::Unix(path) => Address::Unix(path.clone()).to_string(),
    }
}

/// Whether this is the socket at which servers meet at a path.
fn is_place(socket: &OwnedFd, path: &Path) -> bool {
    let is_one = sockopt::socket_type(socket) == Ok(SocketType::SEQPACKET)
        && sockopt::socket_acceptconn(socket) == Ok(true);
    let address = getsockname(socket).ok().and_then(|address| SocketAddrUnix::try_from(address).ok());
    let at = address.as_ref().and_then(|address| address.path_bytes());
    is_one && at == Some(path.as_os_str().as_bytes())
}

/// Sends a message without descriptors. It does not wait: the socket of a conversation has room.
fn send(socket: impl AsFd, text: &str) -> rustix::io::Result<()> {
    send_with(socket, text, &[])
}

fn send_with(socket: impl AsFd, text: &str, descriptors: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(HANDED_OVER_MAX + 1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::MSGSIZE);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(text.as_bytes())], &mut control, flags).map(drop)
}

/// Waits for a message, and takes it with its descriptors. None: the connection has ended.
fn receive(socket: &OwnedFd, timeout: Duration) -> anyhow::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let deadline = Instant::now() + timeout;
    let mut bytes = vec![0; MESSAGE_BYTES_MAX];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(HANDED_OVER_MAX + 1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Ok(received) => {
                let descriptors = control.drain().filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                    _ => None,
                });
                let descriptors: Vec<_> = descriptors.flatten().collect();
                let is_cut = received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
                ensure!(!is_cut, "its message is too long, or the limit on open files too low");
                bytes.truncate(received.bytes);
                return Ok((received.bytes > 0).then_some((bytes, descriptors)));
            }
            Err(Errno::CONNRESET) => return Ok(None),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "it has not answered within {timeout:?}");
        let left = Timespec::try_from(left).ok();
        let _ = poll(&mut [PollFd::new(socket, PollFlags::IN)], left.as_ref());
    }
}

// The running server
// -------------------------------------------------------------------------------------------------------

/// A listening socket that can be given.
#[derive(Clone, Debug)]
pub struct Offered {
    /// What it was bound for.
    pub url: String,
    /// The socket.
    pub socket: Arc<OwnedFd>,
}

/// How a running server hands over: part of its event loop.
#[derive(Debug)]
pub struct HandOver {
    owner: u8,
    path: PathBuf,
    users: Vec<u32>,
    /// None: the server ends.
    place: Option<File>,
    accept: Option<OpId>,
    conversation: Option<Conversation>,
    /// Of the latest conversation: late events of earlier ones mean nothing.
    serial: u64,
}

/// A successor that has connected.
#[derive(Debug)]
struct Conversation {
    socket: Arc<OwnedFd>,
    /// The same, to be polled. None: nothing more is to come.
    polled: Option<File>,
    timer: TimerId,
    /// The successor, once it has been given the sockets.
    pid: Option<u32>,
}

const ACCEPT: u64 = 0;
const READABLE: u64 = 1;
const LATE: u64 = 2;
/// Kinds of events; the serial number of the conversation is above.
const KINDS: u64 = 4;

impl HandOver {
    /// Events on its operations will carry `owner`.
    pub fn new(reactor: &mut Reactor, owner: u8, place: MeetingPlace) -> Self {
        let MeetingPlace { path, socket, users } = place;
        let place = Some(reactor.file(socket));
        Self { owner, path, users, place, accept: None, conversation: None, serial: 0 }
    }

    /// Waits for a successor.
    pub fn start(&mut self, reactor: &mut Reactor) {
        if let Some(place) = &self.place {
            self.accept = Some(reactor.submit(self.token(ACCEPT), Op::Accept { listener: place.clone() }));
        }
    }

    /// Handles an event. `sockets` are those that can be given. Returns the successor's process if the server
    /// is to end.
    pub fn handle(
        &mut self,
        reactor: &mut Reactor,
        event: Event,
        sockets: impl FnOnce() -> Vec<Offered>,
    ) -> Option<u32> {
        let (serial, kind) = (event.token.value / KINDS, event.token.value % KINDS);
        if kind == ACCEPT {
            self.accept = None;
            match (event.result, event.payload) {
                _ if self.place.is_none() => {}
                (Ok(_), Payload::Fd(socket)) => self.begin(reactor, socket),
                // The time has come to try again.
                (Ok(_), _) => self.start(reactor),
                (Err(_), _) => {
                    reactor.timer(Instant::now() + ACCEPT_RETRY, self.token(ACCEPT));
                }
            }
            return None;
        }
        if serial != self.serial {
            return None;
        }
        if kind == LATE {
            self.give_up(reactor, "nothing has come from it in time");
            return None;
        }
        match self.go_on(reactor, sockets) {
            Ok(successor) => successor,
            Err(why) => {
                self.give_up(reactor, &why);
                None
            }
        }
    }

    fn token(&self, kind: u64) -> Token {
        Token { owner: self.owner, value: self.serial * KINDS + kind }
    }

    fn begin(&mut self, reactor: &mut Reactor, socket: OwnedFd) {
        if let Err(why) = is_trusted(&socket, &self.users) {
            let origin = Credentials::of_peer(&socket).ok().map(|peer| Origin::User(peer.uid));
            log_client!(
                warn,
                origin origin,
                "processes that are no successor",
                "A process that connected to {} was given nothing: {why}, and not of root or of this \
                 server's user.",
                self.path.display()
            );
            return self.start(reactor);
        }
        self.serial += 1;
        let socket = Arc::new(socket);
        let polled = reactor.file(Arc::clone(&socket));
        reactor.submit(self.token(READABLE), Op::Readable { file: polled.clone() });
        let timer = reactor.timer(Instant::now() + ASK_TIMEOUT, self.token(LATE));
        self.conversation = Some(Conversation { socket, polled: Some(polled), timer, pid: None });
    }

    /// Reads a message, and answers it. The error says why the successor is given up.
    fn go_on(
        &mut self,
        reactor: &mut Reactor,
        sockets: impl FnOnce() -> Vec<Offered>,
    ) -> Result<Option<u32>, String> {
        let (readable, late) = (self.token(READABLE), self.token(LATE));
        let (Some(conversation), Some(place)) = (&mut self.conversation, &self.place) else {
            return Ok(None);
        };
        let Some(polled) = conversation.polled.clone() else { return Ok(None) };
        let mut bytes = [0; 64];
        let asked = match recv(&conversation.socket, &mut bytes, RecvFlags::DONTWAIT | RecvFlags::TRUNC) {
            Err(Errno::AGAIN | Errno::INTR) => {
                reactor.submit(readable, Op::Readable { file: polled });
                return Ok(None);
            }
            Ok((0, _)) | Err(Errno::CONNRESET) => return Err("it has gone away".into()),
            Ok((_, n)) => bytes.get(..n).and_then(Asked::parse),
            Err(errno) => return Err(format!("it cannot be heard: {errno}")),
        };
        match (asked, conversation.pid) {
            (Some(Asked::Give(pid)), None) => {
                let offered = sockets();
                let urls = offered.iter().map(|offered| offered.url.clone()).collect();
                let text = Given { pid: std::process::id(), urls }.print();
                let mut descriptors = vec![place.as_fd()];
                descriptors.extend(offered.iter().map(|offered| offered.socket.as_fd()));
                send_with(&conversation.socket, &text, &descriptors)
                    .map_err(|errno| format!("it cannot be given the sockets: {errno}"))?;
                conversation.pid = Some(pid);
                reactor.cancel_timer(conversation.timer);
                conversation.timer = reactor.timer(Instant::now() + END_TIMEOUT, late);
                reactor.submit(readable, Op::Readable { file: polled });
                Ok(None)
            }
            (Some(Asked::End), Some(pid)) => {
                reactor.cancel_timer(conversation.timer);
                conversation.polled = None;
                Ok(Some(pid))
            }
            _ => Err("it does not speak this version's protocol".into()),
        }
    }

    /// Ends the conversation, and waits for another successor.
    fn give_up(&mut self, reactor: &mut Reactor, why: &str) {
        let Some(conversation) = self.conversation.take() else { return };
        reactor.cancel_timer(conversation.timer);
        // What still waits for the socket comes to its end.
        let _ = rustix::net::shutdown(&conversation.socket, rustix::net::Shutdown::Both);
        let process = conversation.pid.map_or(String::new(), |pid| format!(", process {pid},"));
        log_client!(
            warn,
            None::<PeerAddress>,
            "successors that were given up",
            "A successor{process} was given up, and this server goes on: {why}."
        );
        self.serial += 1;
        self.start(reactor);
    }

    /// The server accepts nothing more: tells the successor that has asked for it. The connection ends when
    /// this is dropped.
    pub fn confirm(&mut self) {
        if let Some(Conversation { socket, polled: None, .. }) = &self.conversation {
            // If it has gone, it does not serve. The server has begun to end.
            let _ = send(socket, &format!("{HEADING}{ENDING}"));
        }
    }

    /// The server ends: there are no successors any more but the one that has asked for that.
    pub fn stop(&mut self, reactor: &mut Reactor) {
        self.place = None;
        if let Some(accept) = self.accept {
            reactor.cancel(accept);
        }
        if self.conversation.as_ref().is_some_and(|it| it.polled.is_some()) {
            self.conversation = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use raio_transport::reactor::{Config, Wait};
    use raio_transport::tcp;

    use super::*;

    const USER: fn() -> Vec<u32> = || vec![rustix::process::geteuid().as_raw()];

    #[test]
    fn messages_are_read_as_they_were_written() {
        for asked in [Asked::Give(0), Asked::Give(u32::MAX), Asked::End] {
            assert_eq!(Asked::parse(asked.print().as_bytes()), Some(asked));
        }
        for urls in [&[][..], &["tcp://127.0.0.1:0"], &["unix:///a%20b", "tcp://[::1]:7240"]] {
            let given = Given { pid: 7, urls: urls.iter().map(|&url| url.to_owned()).collect() };
            assert_eq!(Given::parse(given.print().as_bytes()), Some(given));
        }
    }

    #[test]
    fn anything_else_is_no_message() {
        for text in [
            "",
            "give 1",
            "raio hand-over 2 give 1",
            "raio hand-over 1 give",
            "raio hand-over 1 give +1",
            "raio hand-over 1 give 4294967296",
            "raio hand-over 1 give 1\n",
            "raio hand-over 1 ending",
            "raio hand-over 1 end ",
        ] {
            assert_eq!(Asked::parse(text.as_bytes()), None, "{text:?}");
        }
        assert_eq!(Asked::parse(b"raio hand-over 1 give \xff"), None);
        for text in ["", "raio hand-over 1 pid", "raio hand-over 1 pid x\na", "raio hand-over 2 pid 1\na"] {
            assert_eq!(Given::parse(text.as_bytes()), None, "{text:?}");
        }
        let many = vec!["u".to_owned(); HANDED_OVER_MAX + 1];
        assert_eq!(Given::parse(Given { pid: 1, urls: many }.print().as_bytes()), None);
    }

    #[test]
    fn what_is_no_socket_is_left_alone_and_an_abandoned_socket_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("place");
        std::fs::write(&path, "mine").unwrap();
        let error = Meeting::begin(&path, USER()).unwrap_err().to_string();
        assert!(error.contains("is no socket"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("elsewhere", &path).unwrap();
        assert!(Meeting::begin(&path, USER()).is_err());
        std::fs::remove_file(&path).unwrap();
        let first = Meeting::begin(&path, USER()).unwrap();
        assert!(first.predecessor.is_none());
        let mode = std::os::unix::fs::MetadataExt::mode(&path.metadata().unwrap());
        assert_eq!(mode & 0o777, 0o600);
        drop(first);
        assert!(Meeting::begin(&path, USER()).unwrap().predecessor.is_none());
    }

    #[test]
    fn a_socket_of_another_kind_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("place");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let error = Meeting::begin(&path, USER()).unwrap_err().to_string();
        assert!(error.contains("another kind of socket"), "{error}");
    }

    /// A server that offers one socket, in a thread of its own, until it is told to end.
    fn serve(path: &Path) -> std::thread::JoinHandle<u32> {
        let Meeting { place, predecessor } = Meeting::begin(path, USER()).unwrap();
        assert!(predecessor.is_none());
        std::thread::spawn(move || {
            let mut reactor = Reactor::new(&Config { epoll: true, ..Config::default() }).unwrap();
            let local: SocketAddr = "127.0.0.1:0".parse().unwrap();
            let (socket, _) = tcp::listen(local).unwrap();
            let socket = Arc::new(socket);
            let mut hand_over = HandOver::new(&mut reactor, 0, place);
            hand_over.start(&mut reactor);
            let mut events = Vec::new();
            loop {
                reactor.run_once(Wait::Block, &mut events).unwrap();
                for event in events.drain(..) {
                    let offered =
                        || vec![Offered { url: "tcp://127.0.0.1:0".into(), socket: Arc::clone(&socket) }];
                    if let Some(pid) = hand_over.handle(&mut reactor, event, offered) {
                        hand_over.stop(&mut reactor);
                        hand_over.confirm();
                        return pid;
                    }
                }
            }
        })
    }

    #[test]
    fn sockets_pass_to_the_successor_which_the_next_one_finds_at_the_same_place() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("place");
        let server = serve(&path);
        // Others that connect change nothing: one that goes away, one that talks of something else.
        for words in ["", "GET / HTTP/1.1"] {
            let Found::Server(socket) = find(&path).unwrap() else { panic!("it listens") };
            if !words.is_empty() {
                send(&socket, words).unwrap();
                assert!(receive(&socket, ANSWER_TIMEOUT).unwrap().is_none());
            }
        }
        // Nor does a successor that cannot start.
        drop(Meeting::begin(&path, USER()).unwrap());
        let Meeting { place, predecessor } = Meeting::begin(&path, USER()).unwrap();
        let mut predecessor = predecessor.expect("it listens");
        let given = predecessor.take_sockets();
        assert_eq!(given.len(), 1);
        let wanted = |text: &str| Endpoint::Ip(text.parse().unwrap());
        let found = given[0].listens_at(&wanted("127.0.0.1:0")).expect("any port will do");
        assert_eq!(given[0].listens_at(&found), Some(found.clone()));
        assert_eq!(given[0].listens_at(&wanted("127.0.0.2:0")), None);
        assert_eq!(given[0].listens_at(&Endpoint::Unix(path.clone())), None);
        assert!(!predecessor.has_ended());
        predecessor.end().unwrap();
        assert_eq!(server.join().unwrap(), std::process::id());
        assert!(predecessor.has_ended());
        std::net::TcpStream::connect(found.ip().unwrap()).expect("it is still listened on");
        // The successor's socket takes connections, although nothing accepts them yet.
        assert!(matches!(find(&path).unwrap(), Found::Server(_)));
        drop(place);
        assert!(matches!(find(&path).unwrap(), Found::Abandoned));
    }

    #[test]
    fn users_are_known_by_the_kernel() {
        let (one, _other) = UnixStream::pair().unwrap();
        let mut others = USER();
        others[0] += 1;
        assert!(is_trusted(&one, &USER()).is_ok());
        assert!(is_trusted(&one, &others).unwrap_err().contains("is of user"));
    }
}
