//! A session: one server, and the control connection that keeps the session alive there.
//!
//! Threads use the control connection one after the other. Contexts have connections of their own, which name
//! the same session. Nothing on the data path comes here. What a session opens and makes is beside those
//! types: [`Session::open`] in `file.rs`, [`Session::context`] in `context.rs`.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use raio_transport::address::{Address, Scheme};
use raio_transport::handshake::{ChannelOffer, Offer};
use raio_transport::memory::process;
use raio_transport::message::{FEATURE_CRC, FEATURE_PONG_TIME, SessionId};
use raio_transport::mux;
use raio_transport::protocol::{Command, FileHandle, FileStatus};
use raio_transport::transport::{ClientTransport, Reply};

use crate::control::{Control, PendingCloses};
use crate::error::{Error, protocol_error, session_stopped, timed_out};
use crate::{trace, tuning};
use raio_transport::sync::lock;

/// How to connect, and how a session's contexts behave. `Options::default()` suits most.
#[derive(Clone, Debug)]
pub struct Options {
    /// Outstanding requests per context (flow control); 0: as many as the server grants and `maxevents`
    /// allows.
    pub queue_depth: u32,
    /// Timeout for connecting and the handshake together. If the host name has several addresses, each
    /// attempt gets an equal share of the remaining time. DNS resolution is not included: it has the
    /// resolver's own timeout.
    pub connect_timeout: Duration,
    /// How long a call that waits for an answer may take (open, status, close, closing a context), if the
    /// server answers pings.
    pub call_timeout: Duration,
    /// Keepalive: a server that is silent this long with a request outstanding is considered dead. None:
    /// three times the keepalive interval that it grants.
    pub request_timeout: Option<Duration>,
    /// How long to busy-poll before sleeping, up to four times as long with many operations in flight. The
    /// busy-polling is adaptive: it stops where it does not pay.
    pub spin: Duration,
    /// Protect headers and data with CRC32C. Connecting fails if the server cannot.
    pub crc: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queue_depth: 0,
            connect_timeout: tuning::CONNECT_TIMEOUT,
            call_timeout: tuning::CALL_TIMEOUT,
            request_timeout: None,
            spin: tuning::SPIN,
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
    /// Why raio:// is TCP here: a message for people.
    why_tcp: Option<String>,
    /// Names the session on each of its connections.
    id: SessionId,
    /// The process that connected: see [`process`].
    process: u64,
    control: Mutex<ControlState>,
    /// `control` has come free, or the session was stopped.
    changed: Condvar,
    /// A context's connection has timed out: whether the server still is must be found out before it is
    /// waited for once more.
    suspect: AtomicBool,
    closes: PendingCloses,
}

/// Who has the control connection.
#[derive(Debug)]
enum ControlState {
    Idle(Control),
    /// In use by a thread, which returns it ([`ControlGuard`]).
    Busy,
    Stopped,
}

/// The control connection, while a thread uses it.
struct ControlGuard<'a> {
    shared: &'a Shared,
    /// None only while it is dropped.
    control: Option<Control>,
}

impl Drop for ControlGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        // Of a session that was stopped meanwhile the connection ends here.
        if !matches!(*state, ControlState::Stopped)
            && let Some(control) = self.control.take()
        {
            *state = ControlState::Idle(control);
        }
        drop(self.control.take());
        self.shared.changed.notify_all();
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
                format!(
                    "{url:?} names port 0, on which no server listens. Pass the port that raio_server \
                     printed."
                ),
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
        Err(last.unwrap_or_else(|| {
            Error::call(libc::ENOENT, format!("{url:?} resolves to no address. Check the host name."))
        }))
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
            control: Mutex::new(ControlState::Stopped),
            changed: Condvar::new(),
            suspect: AtomicBool::new(false),
            closes: PendingCloses::default(),
        };
        let (transport, why_tcp) = shared.reach(tuning::CONTROL_DEPTH, true, deadline)?;
        if why_tcp.is_some() {
            // The session's other connections need not find out once more.
            shared.scheme = Scheme::Tcp;
            shared.why_tcp = why_tcp;
        }
        *shared.lock() = ControlState::Idle(Control::new(transport));
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Why a session with `raio://` is over TCP rather than RDMA: a message for people. None if it is not, or
    /// was to be over TCP.
    pub fn why_tcp(&self) -> Option<&str> {
        self.shared.why_tcp.as_deref()
    }

    /// Ends the session: its control connection closes, and with it every open file on the server. Contexts
    /// that are left keep their connections until they are dropped. A call that another thread has under way
    /// fails at once, with ENOTCONN.
    pub fn stop(&self) {
        if self.shared.is_inherited() {
            return;
        }
        let mut state = self.shared.lock();
        if matches!(std::mem::replace(&mut *state, ControlState::Stopped), ControlState::Busy) {
            self.shared.changed.notify_all();
            // That thread closes the connection within STOP_CHECK_INTERVAL, unless it does not run.
            drop(self.shared.changed.wait_timeout(state, tuning::STOP_CHECK_INTERVAL * 10));
        }
    }
}

impl Session {
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Shared {
    /// Opens a connection of this session that may have `depth` requests outstanding, by `deadline`.
    pub(crate) fn connect(&self, depth: u32, deadline: Instant) -> Result<Box<dyn ClientTransport>, Error> {
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
            features: if self.options.crc { FEATURE_CRC } else { 0 }
                // Requests of the control connection are not traced.
                | if !control && trace::is_wanted() { FEATURE_PONG_TIME } else { 0 },
            queue_depth: depth,
            channel: control.then_some(ChannelOffer { number: 0, epoch: 1, linger: Duration::ZERO }),
            ..Offer::new(program_name())
        };
        let mux::Reached { mut transport, why_tcp, .. } =
            mux::connect(self.scheme, self.address, &offer, deadline)?;
        if let Some(timeout) = self.options.request_timeout {
            transport.set_request_timeout(timeout);
        }
        Ok((transport, why_tcp))
    }

    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    fn lock(&self) -> MutexGuard<'_, ControlState> {
        lock(&self.control)
    }

    /// Takes the control connection, if nobody has it.
    fn try_acquire(&self, state: &mut ControlState) -> Option<ControlGuard<'_>> {
        match std::mem::replace(state, ControlState::Busy) {
            ControlState::Idle(control) => Some(ControlGuard { shared: self, control: Some(control) }),
            other => {
                *state = other;
                None
            }
        }
    }

    /// Takes the control connection, or waits until another thread has given it back.
    fn acquire_by(&self, deadline: Instant) -> Result<ControlGuard<'_>, Error> {
        let mut state = self.lock();
        loop {
            if matches!(*state, ControlState::Stopped) {
                return Err(session_stopped());
            }
            if let Some(guard) = self.try_acquire(&mut state) {
                return Ok(guard);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(timed_out());
            }
            (state, _) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
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
                "The session belongs to the parent process. Open a session and its files in the child.",
            ));
        }
        Ok(())
    }

    /// Whether the session was not stopped.
    pub(crate) fn is_open(&self) -> bool {
        !matches!(*self.lock(), ControlState::Stopped)
    }

    /// A context's connection has timed out.
    pub(crate) fn suspect(&self) {
        self.suspect.store(true, Ordering::Relaxed);
    }

    /// Has the server execute a command, and waits for its answer.
    pub(crate) fn call(&self, command: &Command<'_>) -> Result<Reply, Error> {
        self.check_process()?;
        let deadline = Instant::now() + self.options.call_timeout;
        let mut guard = self.acquire_by(deadline)?;
        let Some(control) = &mut guard.control else { unreachable!("only dropping takes it") };
        if self.suspect.swap(false, Ordering::Relaxed) {
            control.ping_suspect();
        }
        let reply = control.call(command, deadline, &self.closes, &|| !self.is_open());
        drop(guard);
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
        self.closes.push(handle);
        self.send_closes();
    }

    /// Sends the closes that are due, unless another thread has the connection: that thread does it when it
    /// is done.
    fn send_closes(&self) {
        while !self.closes.is_empty() {
            let mut state = self.lock();
            if matches!(*state, ControlState::Stopped) {
                return self.closes.clear();
            }
            let Some(mut guard) = self.try_acquire(&mut state) else { return };
            drop(state);
            let Some(control) = &mut guard.control else { unreachable!("only dropping takes it") };
            if !control.send_closes(&self.closes) {
                return;
            }
        }
    }
}

/// What the server's log calls this program.
fn program_name() -> String {
    let name = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
    format!("{}[{}]", name.trim_end(), std::process::id())
}

#[cfg(test)]
mod tests {
    use raio_transport::handshake::Policy;
    use raio_transport::rdma;

    use super::*;
    use crate::fake_server::FakeServer;
    use crate::operation::Operation;
    use crate::tuning::SUSPECT_TIMEOUT;

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
        let other = connect(&server, SUSPECT_TIMEOUT * 30);
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
        assert!(began.elapsed() < SUSPECT_TIMEOUT * 10, "{:?}", began.elapsed());
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
