//! A session: one server, its open files, and the connection by which it opens and closes them.
//!
//! The control connection carries what blocks its caller for a round trip (open, stat, close), one call at a time behind a
//! mutex, and keeps the session alive on the server. Contexts have connections of their own, which name the same
//! session. Nothing on the data path comes here.

use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use raio_transport::address::{Address, Scheme};
use raio_transport::handshake::Offer;
use raio_transport::message::{FEATURE_CRC, SessionId};
use raio_transport::protocol::{self, Command, FileHandle, FileStatus};
use raio_transport::transport::{Bulk, ClientTransport, NotSent, Reply};
use raio_transport::{any, rdma, tcp};

use crate::context::Context;
use crate::error::Error;
use crate::file::File;

/// Requests on the control connection: one that is waited for, and closes that nobody waits for.
const CONTROL_DEPTH: u32 = 8;

/// How to connect, and how a session's contexts behave. `Options::default()` suits most.
#[derive(Clone, Debug)]
pub struct Options {
    /// Requests on the wire per context; 0: as many as the server grants and the context's size allows.
    pub queue_depth: u32,
    /// For connecting and the handshake, for each address of the server.
    pub connect_timeout: Duration,
    /// The server is taken for dead if it is silent this long while asked something; None: three times the keepalive interval that
    /// it grants.
    pub request_timeout: Option<Duration>,
    /// How long to wait actively before sleeping, up to four times as long with many operations in flight. The library does less by
    /// itself where that does not pay.
    pub spin: Duration,
    /// Protect headers and data with CRC32C. Connecting fails if the server cannot.
    pub crc: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queue_depth: 0,
            connect_timeout: Duration::from_secs(5),
            request_timeout: None,
            spin: Duration::from_micros(50),
            crc: false,
        }
    }
}

/// A session with a server. It may be shared by threads; dropping it ends it once its files and contexts are gone.
///
/// ```no_run
/// # fn main() -> Result<(), raio::Error> {
/// let session = raio::Session::connect("raio://127.0.0.1", &raio::Options::default())?;
/// let file = session.open("/scratch/notes", libc::O_RDWR | libc::O_CREAT, 0o644)?;
/// println!("{} bytes", file.status()?.size);
/// file.close()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Session {
    shared: Arc<Shared>,
}

/// What a session's files and contexts have of it.
#[derive(Debug)]
pub(crate) struct Shared {
    /// How the server is reached. Any becomes TCP if the first connection stays on it.
    scheme: Scheme,
    /// Where the server was reached.
    address: SocketAddr,
    options: Options,
    /// Why raio:// is TCP here, as a sentence.
    why_tcp: Option<String>,
    /// Names the session on each of its connections.
    id: SessionId,
    /// None once the session was stopped.
    control: Mutex<Option<Control>>,
    /// Files to be closed by whoever next has `control`: ending an operation must not wait for another thread's round trip.
    closes: Mutex<Vec<FileHandle>>,
}

struct Control {
    transport: Box<dyn ClientTransport>,
    replies: Vec<Reply>,
    body: Vec<u8>,
    tag: u64,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("tag", &self.tag).finish_non_exhaustive()
    }
}

impl Session {
    /// Opens a session with the server at `raio://HOST[:PORT]`, `raio+tcp://HOST[:PORT]` or
    /// `raio+rdma://HOST[:PORT]`. The first of them connects over TCP and moves to RDMA if both sides can; if not,
    /// [`Session::why_tcp`] says why. Each address of the host is tried in turn.
    pub fn connect(url: &str, options: &Options) -> Result<Self, Error> {
        let address: Address = url.parse()?;
        if address.port == 0 {
            return Err(Error::call(
                libc::EINVAL,
                format!("{url:?} names port 0, which no server has. Give the port that raio_server printed."),
            ));
        }
        let mut last = None;
        for found in address.resolve()? {
            match Self::connect_to(address.scheme, found, options) {
                Ok(session) => return Ok(session),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| Error::call(libc::ENOENT, format!("{url:?} has no address."))))
    }

    /// Opens a session with the server at this address.
    pub fn connect_to(scheme: Scheme, address: SocketAddr, options: &Options) -> Result<Self, Error> {
        let mut shared = Shared {
            scheme,
            address,
            options: options.clone(),
            why_tcp: None,
            id: SessionId::random(),
            control: Mutex::new(None),
            closes: Mutex::default(),
        };
        let (transport, why_tcp) = shared.reach(CONTROL_DEPTH)?;
        if why_tcp.is_some() {
            // The session's other connections need not find out once more.
            shared.scheme = Scheme::Tcp;
            shared.why_tcp = why_tcp;
        }
        *shared.control() = Some(Control { transport, replies: Vec::new(), body: Vec::new(), tag: 0 });
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Why a session with `raio://` is over TCP rather than RDMA, as a sentence. None if it is not, or was to be over TCP.
    pub fn why_tcp(&self) -> Option<&str> {
        self.shared.why_tcp.as_deref()
    }

    /// Opens a file of the server. `path` reads /EXPORT/path/beneath/it; `flags` are those of open(2): O_RDONLY, O_WRONLY, O_RDWR,
    /// O_CREAT, O_EXCL, O_TRUNC, O_DIRECT, O_SYNC, O_DSYNC, O_NOFOLLOW; O_CLOEXEC, O_LARGEFILE, O_NOCTTY and O_NONBLOCK mean
    /// nothing here; others are EINVAL. `mode` has the permissions of a file that O_CREAT creates. Blocks for a round trip.
    pub fn open(&self, path: impl AsRef<Path>, flags: i32, mode: u32) -> Result<File, Error> {
        let path = path.as_ref().as_os_str().as_bytes();
        let flags = open_flags(flags)?;
        if path.is_empty() {
            return Err(Error::call(libc::ENOENT, "The path is empty. Give one like /EXPORT/file."));
        }
        // PATH_MAX counts C's terminating zero.
        if path.len() >= protocol::PATH_BYTES_MAX {
            return Err(Error::call(
                libc::ENAMETOOLONG,
                format!("The path has {} bytes; give one of at most 4,095.", path.len()),
            ));
        }
        if path.contains(&0) {
            return Err(Error::call(libc::EINVAL, "The path has a zero byte in it. Give one without."));
        }
        let reply = self.shared.call(&Command::Open { flags, mode: mode & 0o7777, path })?;
        let handle = u32::try_from(reply.result).map_err(|_| protocol_error())?;
        Ok(File::new(Arc::clone(&self.shared), FileHandle(handle)))
    }

    /// Makes a context for at most `maxevents` operations in flight (1 to 65,536). It opens a connection of its own.
    pub fn context(&self, maxevents: usize) -> Result<Context, Error> {
        Context::new(Arc::clone(&self.shared), maxevents)
    }

    /// Ends the session: its control connection closes, and with it every open file on the server. Contexts that are left keep their
    /// connections until they are dropped.
    pub fn stop(&self) {
        self.shared.control().take();
    }
}

impl Shared {
    /// Opens a connection of this session that may have `depth` requests outstanding.
    pub(crate) fn dial(&self, depth: u32) -> Result<Box<dyn ClientTransport>, Error> {
        self.reach(depth).map(|(transport, _)| transport)
    }

    /// The same; also why it is over TCP if it could have been otherwise.
    fn reach(&self, depth: u32) -> Result<(Box<dyn ClientTransport>, Option<String>), Error> {
        let offer = Offer {
            session: self.id,
            features: if self.options.crc { FEATURE_CRC } else { 0 },
            queue_depth: depth,
            ..Offer::new(program_name())
        };
        let deadline = Instant::now() + self.options.connect_timeout;
        let reached = match self.scheme {
            Scheme::Any => any::connect(self.address, &offer, deadline)?,
            Scheme::Rdma => {
                any::Reached::Rdma(Box::new(rdma::Client::connect(self.address, None, &offer, deadline)?))
            }
            Scheme::Tcp => {
                any::Reached::Tcp(Box::new(tcp::Client::connect(self.address, &offer, deadline)?), None)
            }
        };
        let timeout = self.options.request_timeout;
        Ok(match reached {
            any::Reached::Rdma(mut client) => {
                timeout.into_iter().for_each(|timeout| client.set_request_timeout(timeout));
                (client, None)
            }
            any::Reached::Tcp(mut client, why) => {
                timeout.into_iter().for_each(|timeout| client.set_request_timeout(timeout));
                (client, why)
            }
        })
    }

    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    fn control(&self) -> MutexGuard<'_, Option<Control>> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the session was not stopped.
    pub(crate) fn is_open(&self) -> bool {
        self.control().is_some()
    }

    /// Has the server execute a command, and waits for its answer.
    fn call(&self, command: &Command<'_>) -> Result<Reply, Error> {
        let reply = self.control().as_mut().ok_or_else(stopped)?.call(command);
        self.send_closes();
        reply
    }

    /// The present status of an open file.
    pub(crate) fn status(&self, handle: FileHandle) -> Result<FileStatus, Error> {
        let reply = self.call(&Command::Stat(handle))?;
        FileStatus::decode(&reply.body).map_err(|_| protocol_error())
    }

    /// Closes a file.
    pub(crate) fn close(&self, handle: FileHandle) -> Result<(), Error> {
        self.call(&Command::Close(handle)).map(drop)
    }

    /// Closes a file without waiting for anything, nor telling of a failure: the server closes it with the session at the latest.
    pub(crate) fn close_later(&self, handle: FileHandle) {
        self.closes().push(handle);
        self.send_closes();
    }

    fn closes(&self) -> MutexGuard<'_, Vec<FileHandle>> {
        self.closes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends the closes that are due, unless another thread has the connection: that thread does it when it is done.
    fn send_closes(&self) {
        while !self.closes().is_empty() {
            let Ok(mut control) = self.control.try_lock() else { return };
            let Some(control) = control.as_mut() else { return self.closes().clear() };
            if !control.send_closes(&mut self.closes()) {
                return;
            }
        }
    }
}

impl Control {
    /// Sends a command. Gives its tag; None if the connection has ended.
    fn send(&mut self, command: &Command<'_>) -> Option<u64> {
        self.tag += 1;
        self.body.clear();
        command.encode(&mut self.body);
        while let Err(NotSent(_)) = self.transport.send(self.tag, &self.body, Bulk::None, false) {
            // Closes that nobody waited for have used up the credits.
            self.receive();
            if self.transport.failure().is_some() {
                return None;
            }
            if self.transport.credits() == 0 {
                let _ = self.transport.wait(None);
            }
        }
        self.transport.flush();
        Some(self.tag)
    }

    /// Sends closes as far as there are credits. Whether all are sent; the rest goes with a later call.
    fn send_closes(&mut self, closes: &mut Vec<FileHandle>) -> bool {
        self.receive();
        while let Some(&handle) = closes.last() {
            self.tag += 1;
            self.body.clear();
            Command::Close(handle).encode(&mut self.body);
            if self.transport.send(self.tag, &self.body, Bulk::None, false).is_err() {
                break;
            }
            closes.pop();
        }
        self.transport.flush();
        closes.is_empty()
    }

    /// Takes in replies, and forgets those of before.
    fn receive(&mut self) {
        self.replies.clear();
        self.transport.receive(&mut self.replies);
    }

    fn call(&mut self, command: &Command<'_>) -> Result<Reply, Error> {
        if let Some(failure) = self.transport.failure() {
            return Err(Error::not_connected(failure));
        }
        let Some(tag) = self.send(command) else {
            return Err(self.transport.failure().map_or_else(stopped, Error::not_connected));
        };
        loop {
            self.receive();
            if let Some(at) = self.replies.iter().position(|reply| reply.tag == tag) {
                let reply = self.replies.swap_remove(at);
                return match self.transport.failure() {
                    _ if reply.status.is_ok() => Ok(reply),
                    Some(failure) if reply.body.is_empty() => {
                        Err(Error { status: reply.status, text: failure.to_string() })
                    }
                    _ => Err(Error::from_reply(reply.status, &reply.body)),
                };
            }
            if let Some(failure) = self.transport.failure() {
                return Err(Error::not_connected(failure));
            }
            // A signal is the caller's business, but not a reason to give up half way. The transport ends a wait for a dead server.
            match self.transport.wait(None) {
                Err(error) if error.errno() != libc::EINTR => return Err(error.into()),
                _ => {}
            }
        }
    }
}

fn stopped() -> Error {
    Error {
        status: raio_transport::Status::transport(libc::ENOTCONN),
        text: "The session was stopped. Make a new one.".into(),
    }
}

/// A response that is well-formed but says nothing that makes sense.
pub(crate) fn protocol_error() -> Error {
    Error {
        status: raio_transport::Status::protocol(libc::EPROTO),
        text: "The server's answer makes no sense. Check that library and server are of matching versions."
            .into(),
    }
}

/// open(2)'s flags as the wire has them.
fn open_flags(flags: i32) -> Result<u32, Error> {
    // libc's O_LARGEFILE is 0 where file offsets have 64 bits anyway, but the kernel's value is what a program may pass.
    const LARGEFILE: i32 = 0o100_000;
    let mut wire = match flags & libc::O_ACCMODE {
        libc::O_RDONLY => protocol::OPEN_READ,
        libc::O_WRONLY => protocol::OPEN_WRITE,
        libc::O_RDWR => protocol::OPEN_READ | protocol::OPEN_WRITE,
        _ => {
            return Err(Error::call(
                libc::EINVAL,
                "The access mode is none. Use O_RDONLY, O_WRONLY or O_RDWR.",
            ));
        }
    };
    let mut left = flags
        & !(libc::O_ACCMODE
            | libc::O_CLOEXEC
            | libc::O_LARGEFILE
            | LARGEFILE
            | libc::O_NOCTTY
            | libc::O_NONBLOCK);
    for (flag, bit) in [
        (libc::O_CREAT, protocol::OPEN_CREATE),
        (libc::O_EXCL, protocol::OPEN_EXCLUSIVE),
        (libc::O_TRUNC, protocol::OPEN_TRUNCATE),
        (libc::O_DIRECT, protocol::OPEN_DIRECT),
        // O_SYNC has the bit of O_DSYNC in it, so it comes first.
        (libc::O_SYNC, protocol::OPEN_SYNC),
        (libc::O_DSYNC, protocol::OPEN_DSYNC),
        (libc::O_NOFOLLOW, protocol::OPEN_NOFOLLOW),
    ] {
        if left & flag == flag {
            wire |= bit;
            left &= !flag;
        }
    }
    if left != 0 {
        return Err(Error::call(
            libc::EINVAL,
            format!("Flags {left:#o} of open(2) have no meaning for a remote file. Leave them out."),
        ));
    }
    Ok(wire)
}

/// What the server's log calls this program.
fn program_name() -> String {
    let name = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
    format!("{}[{}]", name.trim_end(), std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_flags_are_translated_or_refused() {
        for (flags, wire) in [
            (libc::O_RDONLY, protocol::OPEN_READ),
            (libc::O_WRONLY | libc::O_CLOEXEC | 0o100_000, protocol::OPEN_WRITE),
            (libc::O_RDWR | libc::O_SYNC, protocol::OPEN_READ | protocol::OPEN_WRITE | protocol::OPEN_SYNC),
            (libc::O_RDONLY | libc::O_DSYNC, protocol::OPEN_READ | protocol::OPEN_DSYNC),
            (libc::O_RDONLY | libc::O_DIRECT | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY, 0x121),
        ] {
            assert_eq!(open_flags(flags), Ok(wire), "{flags:#o}");
        }
        for flags in [
            libc::O_APPEND,
            libc::O_DIRECTORY,
            libc::O_PATH,
            libc::O_TMPFILE,
            libc::O_ASYNC,
            libc::O_NOATIME,
            libc::O_ACCMODE,
            1 << 30,
            -1,
        ] {
            assert_eq!(open_flags(flags).unwrap_err().errno(), libc::EINVAL, "{flags:#o}");
        }
    }

    #[test]
    fn urls_that_make_no_sense_are_refused_before_anything_is_sent() {
        let options = Options::default();
        for (url, errno) in [
            ("", libc::EINVAL),
            ("raio://127.0.0.1:0", libc::EINVAL),
            ("http://127.0.0.1:7240", libc::EINVAL),
        ] {
            let error = Session::connect(url, &options).unwrap_err();
            assert_eq!(error.errno(), errno, "{url}");
            assert!(error.text.ends_with('.'), "{error}");
        }
        if let Some(reason) = rdma::unavailable() {
            let error = Session::connect("raio+rdma://127.0.0.1:7240", &options).unwrap_err();
            assert_eq!(error.errno(), libc::EPROTONOSUPPORT);
            assert!(error.text.contains(&reason), "{error}");
        }
    }
}
