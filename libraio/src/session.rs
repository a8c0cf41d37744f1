//! A session: one server, its open files, and the connection by which it opens and closes them.
//!
//! The control connection carries what blocks its caller for a round trip (open, stat, close), one call at a
//! time behind a mutex, and keeps the session alive on the server. Contexts have connections of their own,
//! which name the same session. Nothing on the data path comes here.

use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use raio_transport::address::{Address, Scheme};
use raio_transport::handshake::Offer;
use raio_transport::memory::process;
use raio_transport::message::{FEATURE_CRC, SessionId};
use raio_transport::protocol::{self, Command, FileHandle, FileStatus};
use raio_transport::transport::{Bulk, ClientTransport, NotSent, Reply};
use raio_transport::{mux, rdma, tcp};

use crate::context::Context;
use crate::error::Error;
use crate::file::File;

/// Requests on the control connection: one that is waited for, and closes that nobody waits for.
const CONTROL_DEPTH: u32 = 8;

/// How soon a server must answer a ping if it has let another connection of the session time out.
const SUSPECT_TIME: Duration = Duration::from_secs(2);

/// How soon a call that waits for the server notices that another thread has stopped the session.
const STOP_TIME: Duration = Duration::from_millis(50);

/// How to connect, and how a session's contexts behave. `Options::default()` suits most.
#[derive(Clone, Debug)]
pub struct Options {
    /// Requests on the wire per context; 0: as many as the server grants and the context's size allows.
    pub queue_depth: u32,
    /// For connecting and the handshake, in total: if the server has several addresses, each gets its share
    /// of what is left. (How long the lookup of a name takes is up to the resolver's configuration.)
    pub connect_timeout: Duration,
    /// How long a call that waits for an answer may take (open, status, close, closing a context), if the
    /// server answers pings.
    pub call_timeout: Duration,
    /// The server is taken for dead if it is silent this long while asked something; None: three times the
    /// keepalive interval that it grants.
    pub request_timeout: Option<Duration>,
    /// How long to wait actively before sleeping, up to four times as long with many operations in flight.
    /// The library does less by itself where that does not pay.
    pub spin: Duration,
    /// Protect headers and data with CRC32C. Connecting fails if the server cannot.
    pub crc: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queue_depth: 0,
            connect_timeout: Duration::from_secs(5),
            call_timeout: Duration::from_secs(30),
            request_timeout: None,
            spin: Duration::from_micros(50),
            crc: false,
        }
    }
}

/// A session with a server. It may be shared by threads; dropping it ends it once its files and contexts are
/// gone.
///
/// A forked child does not have the sessions of its parent, nor their files and contexts: there each call on
/// them fails, with EBADF or, on a context, EINVAL, and neither a call nor a drop disturbs the parent.
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
    /// The process that connected: see [`process`].
    process: u64,
    control: Mutex<Seat>,
    /// `control` has come free, or the session was stopped.
    changed: Condvar,
    /// A context's connection has timed out: whether the server still is must be found out before it is
    /// waited for once more.
    suspect: AtomicBool,
    /// Files to be closed by whoever next has `control`: ending an operation must not wait for another
    /// thread's round trip.
    closes: Mutex<Vec<FileHandle>>,
}

/// Who has the control connection.
#[derive(Debug)]
enum Seat {
    Free(Control),
    /// A thread, which gives it back ([`Taken`]).
    Taken,
    Stopped,
}

/// The control connection, while a thread has it.
struct Taken<'a> {
    shared: &'a Shared,
    /// None only while it is dropped.
    control: Option<Control>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut seat = self.shared.seat();
        // Of a session that was stopped meanwhile the connection ends here.
        if !matches!(*seat, Seat::Stopped)
            && let Some(control) = self.control.take()
        {
            *seat = Seat::Free(control);
        }
        drop(self.control.take());
        self.shared.changed.notify_all();
    }
}

struct Control {
    transport: Box<dyn ClientTransport>,
    replies: Vec<Reply>,
    body: Vec<u8>,
    tag: u64,
    /// Opens that nobody waits for any more. What they open is closed.
    given_up: Vec<u64>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("tag", &self.tag).finish_non_exhaustive()
    }
}

impl Session {
    /// Opens a session with the server at `raio://HOST[:PORT]`, `raio+tcp://HOST[:PORT]` or
    /// `raio+rdma://HOST[:PORT]`. The first of them connects over TCP and moves to RDMA if both sides can; if
    /// not, [`Session::why_tcp`] says why. Each address of the host is tried in turn.
    pub fn connect(url: &str, options: &Options) -> Result<Self, Error> {
        let address: Address = url.parse()?;
        if address.port == 0 {
            return Err(Error::call(
                libc::EINVAL,
                format!("{url:?} names port 0, which no server has. Give the port that raio_server printed."),
            ));
        }
        let deadline = Instant::now() + options.connect_timeout;
        let mut last = None;
        let all = address.resolve()?;
        for (n, &found) in all.iter().enumerate() {
            let now = Instant::now();
            let share = deadline.saturating_duration_since(now) / (all.len() - n) as u32;
            match Self::connect_by(address.scheme, found, options, now + share) {
                Ok(session) => return Ok(session),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| Error::call(libc::ENOENT, format!("{url:?} has no address."))))
    }

    /// Opens a session with the server at this address.
    pub fn connect_to(scheme: Scheme, address: SocketAddr, options: &Options) -> Result<Self, Error> {
        Self::connect_by(scheme, address, options, Instant::now() + options.connect_timeout)
    }

    fn connect_by(
        scheme: Scheme,
        address: SocketAddr,
        options: &Options,
        deadline: Instant,
    ) -> Result<Self, Error> {
        let mut shared = Shared {
            scheme,
            address,
            options: options.clone(),
            why_tcp: None,
            id: SessionId::random(),
            process: process(),
            control: Mutex::new(Seat::Stopped),
            changed: Condvar::new(),
            suspect: AtomicBool::new(false),
            closes: Mutex::default(),
        };
        let (transport, why_tcp) = shared.reach(CONTROL_DEPTH, true, deadline)?;
        if why_tcp.is_some() {
            // The session's other connections need not find out once more.
            shared.scheme = Scheme::Tcp;
            shared.why_tcp = why_tcp;
        }
        let control =
            Control { transport, replies: Vec::new(), body: Vec::new(), tag: 0, given_up: Vec::new() };
        *shared.seat() = Seat::Free(control);
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Why a session with `raio://` is over TCP rather than RDMA, as a sentence. None if it is not, or was to
    /// be over TCP.
    pub fn why_tcp(&self) -> Option<&str> {
        self.shared.why_tcp.as_deref()
    }

    /// Opens a file of the server. `path` reads /EXPORT/path/beneath/it; `flags` are those of open(2):
    /// O_RDONLY, O_WRONLY, O_RDWR, O_CREAT, O_EXCL, O_TRUNC, O_DIRECT, O_SYNC, O_DSYNC, O_NOFOLLOW;
    /// O_CLOEXEC, O_LARGEFILE, O_NOCTTY and O_NONBLOCK mean nothing here; others are EINVAL. `mode` has the
    /// permissions of a file that O_CREAT creates. Blocks for a round trip.
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

    /// Makes a context for at most `maxevents` operations in flight (1 to 65,536). It opens a connection of
    /// its own.
    pub fn context(&self, maxevents: usize) -> Result<Context, Error> {
        Context::new(Arc::clone(&self.shared), maxevents)
    }

    /// Ends the session: its control connection closes, and with it every open file on the server. Contexts
    /// that are left keep their connections until they are dropped. A call that another thread has under way
    /// fails at once, with ENOTCONN.
    pub fn stop(&self) {
        if self.shared.is_inherited() {
            return;
        }
        let mut seat = self.shared.seat();
        if matches!(std::mem::replace(&mut *seat, Seat::Stopped), Seat::Taken) {
            self.shared.changed.notify_all();
            // That thread closes the connection within STOP_TIME, unless it does not run.
            drop(self.shared.changed.wait_timeout(seat, STOP_TIME * 10));
        }
    }
}

impl Shared {
    /// Opens a connection of this session that may have `depth` requests outstanding.
    pub(crate) fn dial(&self, depth: u32) -> Result<Box<dyn ClientTransport>, Error> {
        let deadline = Instant::now() + self.options.connect_timeout;
        self.reach(depth, false, deadline).map(|(transport, _)| transport)
    }

    /// The same; also why it is over TCP if it could have been otherwise.
    fn reach(
        &self,
        depth: u32,
        control: bool,
        deadline: Instant,
    ) -> Result<(Box<dyn ClientTransport>, Option<String>), Error> {
        let offer = Offer {
            session: self.id,
            features: if self.options.crc { FEATURE_CRC } else { 0 },
            queue_depth: depth,
            control,
            ..Offer::new(program_name())
        };
        let reached = match self.scheme {
            Scheme::Any => mux::connect(self.address, &offer, deadline)?,
            Scheme::Rdma => {
                mux::Reached::Rdma(Box::new(rdma::Client::connect(self.address, None, &offer, deadline)?))
            }
            Scheme::Tcp => {
                mux::Reached::Tcp(Box::new(tcp::Client::connect(self.address, &offer, deadline)?), None)
            }
        };
        let timeout = self.options.request_timeout;
        Ok(match reached {
            mux::Reached::Rdma(mut client) => {
                timeout.into_iter().for_each(|timeout| client.set_request_timeout(timeout));
                (client, None)
            }
            mux::Reached::Tcp(mut client, why) => {
                timeout.into_iter().for_each(|timeout| client.set_request_timeout(timeout));
                (client, why)
            }
        })
    }

    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    fn seat(&self) -> MutexGuard<'_, Seat> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the control connection, if nobody has it.
    fn take(&self, seat: &mut Seat) -> Option<Taken<'_>> {
        match std::mem::replace(seat, Seat::Taken) {
            Seat::Free(control) => Some(Taken { shared: self, control: Some(control) }),
            other => {
                *seat = other;
                None
            }
        }
    }

    /// Takes the control connection, or waits until another thread has given it back.
    fn take_by(&self, deadline: Instant) -> Result<Taken<'_>, Error> {
        let mut seat = self.seat();
        loop {
            if matches!(*seat, Seat::Stopped) {
                return Err(stopped());
            }
            if let Some(taken) = self.take(&mut seat) {
                return Ok(taken);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(timed_out());
            }
            (seat, _) = self.changed.wait_timeout(seat, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether this is a forked child, and the session its parent's: it may not be used, nor may its locks
    /// be, which another thread of the parent may have had.
    pub(crate) fn is_inherited(&self) -> bool {
        self.process != process()
    }

    pub(crate) fn check_process(&self) -> Result<(), Error> {
        if self.is_inherited() {
            return Err(Error::call(
                libc::EBADF,
                "The session is one of the parent process. A child makes its own, and opens files in it.",
            ));
        }
        Ok(())
    }

    /// Whether the session was not stopped.
    pub(crate) fn is_open(&self) -> bool {
        !matches!(*self.seat(), Seat::Stopped)
    }

    /// A context's connection has timed out.
    pub(crate) fn suspect(&self) {
        self.suspect.store(true, Ordering::Relaxed);
    }

    /// Has the server execute a command, and waits for its answer.
    fn call(&self, command: &Command<'_>) -> Result<Reply, Error> {
        self.check_process()?;
        let deadline = Instant::now() + self.options.call_timeout;
        let mut taken = self.take_by(deadline)?;
        let Some(control) = &mut taken.control else { unreachable!("only dropping takes it") };
        if self.suspect.swap(false, Ordering::Relaxed) {
            control.transport.ping(SUSPECT_TIME);
        }
        let reply = control.call(command, deadline, self);
        drop(taken);
        self.send_closes();
        reply
    }

    /// The present status of an open file.
    pub(crate) fn status(&self, handle: FileHandle) -> Result<FileStatus, Error> {
        let reply = self.call(&Command::Stat(handle))?;
        let status = FileStatus::decode(&reply.body).map_err(|_| protocol_error())?;
        // Sizes are signed for every caller.
        if status.size.get() > i64::MAX as u64 || status.blocks.get() > i64::MAX as u64 {
            return Err(protocol_error());
        }
        Ok(status)
    }

    /// Closes a file.
    pub(crate) fn close(&self, handle: FileHandle) -> Result<(), Error> {
        self.call(&Command::Close(handle)).map(drop)
    }

    /// Closes a file without waiting for anything, nor telling of a failure: the server closes it with the
    /// session at the latest.
    pub(crate) fn close_later(&self, handle: FileHandle) {
        self.closes().push(handle);
        self.send_closes();
    }

    fn closes(&self) -> MutexGuard<'_, Vec<FileHandle>> {
        self.closes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends the closes that are due, unless another thread has the connection: that thread does it when it
    /// is done.
    fn send_closes(&self) {
        while !self.closes().is_empty() {
            let mut seat = self.seat();
            if matches!(*seat, Seat::Stopped) {
                return self.closes().clear();
            }
            let Some(mut taken) = self.take(&mut seat) else { return };
            drop(seat);
            let Some(control) = &mut taken.control else { unreachable!("only dropping takes it") };
            control.receive(&self.closes);
            if !control.send_closes(&mut self.closes()) {
                return;
            }
        }
    }
}

impl Control {
    /// Sends a command. Returns its tag; None if the connection has ended, or the deadline passes without a
    /// credit.
    fn send(&mut self, command: &Command<'_>, deadline: Instant, session: &Shared) -> Option<u64> {
        self.tag += 1;
        self.body.clear();
        command.encode(&mut self.body);
        while let Err(NotSent(_)) = self.transport.send(self.tag, &self.body, Bulk::None, false) {
            // Closes that nobody waited for have used up the credits.
            self.receive(&session.closes);
            if self.transport.failure().is_some() || !session.is_open() || Instant::now() >= deadline {
                return None;
            }
            if self.transport.credits() == 0 {
                let _ = self.transport.wait(Some(deadline.min(Instant::now() + STOP_TIME)));
            }
        }
        self.transport.flush();
        Some(self.tag)
    }

    /// Sends closes as far as there are credits. Whether all are sent; the rest goes with a later call.
    fn send_closes(&mut self, closes: &mut Vec<FileHandle>) -> bool {
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

    /// Takes in replies, and forgets those of before. What an open that was given up has opened goes to
    /// `closes`.
    fn receive(&mut self, closes: &Mutex<Vec<FileHandle>>) {
        self.replies.clear();
        self.transport.receive(&mut self.replies);
        if self.given_up.is_empty() {
            return;
        }
        for reply in &self.replies {
            if let Some(at) = self.given_up.iter().position(|&tag| tag == reply.tag) {
                self.given_up.swap_remove(at);
                if let (true, Ok(handle)) = (reply.status.is_ok(), u32::try_from(reply.result)) {
                    closes.lock().unwrap_or_else(PoisonError::into_inner).push(FileHandle(handle));
                }
            }
        }
    }

    fn call(&mut self, command: &Command<'_>, deadline: Instant, session: &Shared) -> Result<Reply, Error> {
        if let Some(failure) = self.transport.failure() {
            return Err(Error::not_connected(failure));
        }
        let Some(tag) = self.send(command, deadline, session) else {
            let other = || if session.is_open() { timed_out() } else { stopped() };
            return Err(self.transport.failure().map_or_else(other, Error::not_connected));
        };
        loop {
            self.receive(&session.closes);
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
            if !session.is_open() {
                return Err(stopped());
            }
            if Instant::now() >= deadline {
                if matches!(command, Command::Open { .. }) {
                    self.given_up.push(tag);
                }
                return Err(timed_out());
            }
            // A signal is the caller's business, but not a reason to give up half way. The transport ends a
            // wait for a dead server.
            match self.transport.wait(Some(deadline.min(Instant::now() + STOP_TIME))) {
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

/// The server answers pings, but not this.
fn timed_out() -> Error {
    Error {
        status: raio_transport::Status::transport(libc::ETIMEDOUT),
        text: "The server is there, but has not done this in time: its storage may hang. See its log, or allow a longer call timeout."
            .into(),
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
    // libc's O_LARGEFILE is 0 where file offsets have 64 bits anyway, but the kernel's value is what a
    // program may pass.
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
    if left & libc::O_APPEND != 0 {
        return Err(Error::call(
            libc::EINVAL,
            "O_APPEND is not supported: each write names its offset. raio_fstat() tells where the file ends.",
        ));
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
    use raio_transport::handshake::Policy;

    use super::*;
    use crate::context::Operation;
    use crate::fake_server::FakeServer;

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

    fn connect(server: &FakeServer, request_timeout: Duration) -> Session {
        let options = Options { request_timeout: Some(request_timeout), ..Options::default() };
        Session::connect_to(Scheme::Tcp, server.address, &options).unwrap()
    }

    #[test]
    fn after_a_timeout_the_other_calls_of_the_session_do_not_wait_as_long_again() {
        let server = FakeServer::start(Policy::default());
        server.file("/e/data", vec![0; 4096]);
        let session = connect(&server, Duration::from_millis(300));
        let file = session.open("/e/data", libc::O_RDWR, 0).unwrap();
        let mut context = session.context(1).unwrap();
        let other = connect(&server, SUSPECT_TIME * 30);
        let other_file = other.open("/e/data", libc::O_RDWR, 0).unwrap();
        server.freeze();
        context.submit(&file, Operation::Fsync { data_only: false }, 0).unwrap();
        while context.wait(1, 1, None).unwrap() == 0 {}
        assert_eq!(context.next().unwrap().result.unwrap_err().errno(), libc::ETIMEDOUT);
        assert!(session.shared.suspect.load(Ordering::Relaxed), "the timeout is known to the session");
        // What a session does that knows, with a timeout that would show.
        other.shared.suspect();
        let began = Instant::now();
        assert_eq!(other_file.close().unwrap_err().errno(), libc::ETIMEDOUT);
        assert!(began.elapsed() < SUSPECT_TIME * 10, "{:?}", began.elapsed());
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
