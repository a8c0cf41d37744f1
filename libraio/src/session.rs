//! A session: one server, and the control connection that keeps the session alive there.
//!
//! Threads use the control connection one after the other. Contexts have connections of their own, which name
//! the same session. Nothing on the data path comes here. What a session opens and makes is beside those
//! types: [`Session::open`] in `file.rs`, [`Session::context`] in `context.rs`.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use raio_transport::address::{Address, Endpoint, Scheme};
use raio_transport::channel::{Abandoned, Channel, Dialer, OpenFiles, Settings};
use raio_transport::handshake::{ChannelOffer, Offer, SUPERSEDED_MAX};
use raio_transport::key_directory::KeyDirectory;
use raio_transport::memory::process;
use raio_transport::message::{
    FEATURE_CRC, FEATURE_CRC_STREAM, FEATURE_PONG_TIME, FEATURE_REQUEST_CRC, SessionId,
};
use raio_transport::mux;
use raio_transport::protocol::{Command, FileHandle, FileStatus, OPERATION_FEATURES};
use raio_transport::tls::ClientTls;
use raio_transport::transport::{Bulk, Reply, UsedIds};

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
    /// Whether headers and data have checksums (CRC32C) on their way.
    pub crc: Crc,
    /// How long a session whose connection was lost tries to go on; zero: it ends with its connection.
    pub reconnect: Duration,
    /// After a restart of the server, do again what may have been done ([`Error::is_unknown`]), rather than
    /// to let it fail. For a program that alone writes to its files: it would overwrite what another client
    /// has written meanwhile.
    pub redo: bool,
    /// Where this client's key is, and the keys of the servers that it trusts.
    pub keys: Keys,
}

/// Where a client's key is (in a file `key`), and the keys of the servers that it trusts (in `servers`).
/// `raio key` makes both. A server that is in `servers` is reached by TLS alone, and only if it has proven to
/// have one of its keys there. All others are reached in the clear.
///
/// A server is looked up by the host and port of the URL, and then by the address that this led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Keys {
    /// In the directory `$RAIO_KEYS`, which must exist if that variable is set, else in
    /// `$XDG_CONFIG_HOME/raio`, else in `$HOME/.config/raio`. A set-user-ID program does not use its
    /// environment, so it has no keys.
    #[default]
    Auto,
    /// In this directory, which must exist.
    Directory(PathBuf),
    /// Nowhere: every server is reached in the clear.
    Off,
}

impl Keys {
    /// How this server is connected to. None: in the clear, as always over a Unix socket.
    fn tls(&self, server: Option<(&str, u16)>) -> Result<Option<ClientTls>, Error> {
        let Some((host, port)) = server else { return Ok(None) };
        let directory = match self {
            Self::Auto => KeyDirectory::from_environment(),
            Self::Directory(path) => Some(KeyDirectory::new(path)),
            Self::Off => None,
        };
        Ok(directory.map_or(Ok(None), |directory| directory.tls(host, port))?)
    }
}

/// Whether the headers and the data of a session have checksums (CRC32C) on their way. Single operations can
/// have them in any case: [`crate::SubmitOptions::crc`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Crc {
    /// They have them over TCP to another host, if the server knows them. RDMA and TLS have better ones of
    /// their own, and within a host there is no network.
    #[default]
    Auto,
    /// They have them. Connecting fails if the server does not know them.
    On,
    /// They do not.
    Off,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queue_depth: 0,
            connect_timeout: tuning::CONNECT_TIMEOUT,
            call_timeout: tuning::CALL_TIMEOUT,
            request_timeout: None,
            spin: tuning::SPIN,
            crc: Crc::Auto,
            reconnect: tuning::RECONNECT_WINDOW,
            redo: false,
            keys: Keys::Auto,
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
    endpoint: Endpoint,
    options: Options,
    /// How each connection is secured; None: it is not.
    tls: Option<ClientTls>,
    /// Feature bits for checksums.
    crc_features: u64,
    /// Why raio:// is TCP here: a message for people.
    why_tcp: Option<String>,
    /// Names the session on each of its connections.
    id: SessionId,
    /// The process that connected: see [`process`].
    process: u64,
    control: Mutex<ControlState>,
    /// `control` has come free, or the session was stopped.
    changed: Condvar,
    /// A context has lost its connection: whether the server still answers this one must be found out before
    /// it is waited for once more.
    suspect: AtomicBool,
    closes: PendingCloses,
    files: Arc<OpenFiles>,
    /// The number of the last channel. The control connection's is 0.
    channels: AtomicU32,
    /// Channels that were given up while something was under way by them that must not be overtaken: the next
    /// context takes their place.
    abandoned: Mutex<Vec<Abandoned>>,
}

/// The feature bits that a session asks for to have the checksums that it is to have.
fn crc_features(crc: Crc, scheme: Scheme, endpoint: &Endpoint, has_tls: bool) -> u64 {
    let has_better = scheme == Scheme::Rdma || has_tls;
    FEATURE_REQUEST_CRC
        | match crc {
            Crc::On => FEATURE_CRC,
            Crc::Auto if !has_better && !is_this_host(endpoint) => FEATURE_CRC | FEATURE_CRC_STREAM,
            Crc::Auto | Crc::Off => 0,
        }
}

/// Whether this is on this host: then the kernel would send to an address from itself. Nothing is sent.
pub(crate) fn is_this_host(endpoint: &Endpoint) -> bool {
    let Some(address) = endpoint.ip() else { return true };
    if address.ip().to_canonical().is_loopback() {
        return true;
    }
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let local = UdpSocket::bind(any).and_then(|socket| {
        socket.connect(address)?;
        socket.local_addr()
    });
    local.is_ok_and(|local| local.ip() == address.ip())
}

/// Sessions of this process that were given up while something was under way in them: the next session with
/// the same server has them ended first.
static GIVEN_UP: Mutex<Vec<(Endpoint, SessionId)>> = Mutex::new(Vec::new());

/// The lock, unless it was held when this process was forked.
fn given_up() -> Option<MutexGuard<'static, Vec<(Endpoint, SessionId)>>> {
    for _ in 0..tuning::LOCK_ATTEMPTS {
        match GIVEN_UP.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => std::thread::yield_now(),
        }
    }
    None
}

/// Who has the control connection.
#[derive(Debug)]
enum ControlState {
    Idle(Box<Control>),
    /// In use by a thread, which returns it ([`ControlGuard`]).
    Busy,
    Stopped,
}

/// The control connection, while a thread uses it.
struct ControlGuard<'a> {
    shared: &'a Shared,
    /// None only while it is dropped.
    control: Option<Box<Control>>,
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
        drop(state);
        if let Some(control) = self.control.take() {
            self.shared.end_control(control);
        }
        self.shared.changed.notify_all();
    }
}

impl Session {
    /// Opens a session with the server at `raio://HOST[:PORT]`, `raio+tcp://HOST[:PORT]`,
    /// `raio+rdma://HOST[:PORT]` or, on this machine, `raio+unix:///?socket=PATH`. The first of them connects
    /// over TCP and moves to RDMA if both sides can; if not, [`Session::why_tcp`] says why. Each address of
    /// the host is tried in turn.
    pub fn connect(url: &str, options: &Options) -> Result<Self, Error> {
        let address: Address = url.parse()?;
        if address.host().is_some_and(|(_, port)| port == 0) {
            return Err(Error::call(
                libc::EINVAL,
                format!(
                    "{url:?} names port 0, on which no server listens. Pass the port that raio_server \
                     printed."
                ),
            ));
        }
        let tls = options.keys.tls(address.host())?;
        let deadline = Instant::now() + options.connect_timeout;
        let mut last = None;
        let all = address.resolve()?;
        for (n, found) in all.iter().enumerate() {
            let now = Instant::now();
            let share = deadline.saturating_duration_since(now) / (all.len() - n) as u32;
            match Self::connect_by(address.scheme(), found.clone(), options, tls.clone(), now + share) {
                Ok(session) => return Ok(session),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| {
            Error::call(libc::ENOENT, format!("{url:?} resolves to no address. Check the host name."))
        }))
    }

    /// Opens a session with the server at this endpoint. By its address its keys are looked up, too
    /// ([`Keys`]).
    pub fn connect_to(
        scheme: Scheme,
        endpoint: impl Into<Endpoint>,
        options: &Options,
    ) -> Result<Self, Error> {
        Self::connect_by(scheme, endpoint.into(), options, None, Instant::now() + options.connect_timeout)
    }

    fn connect_by(
        scheme: Scheme,
        endpoint: Endpoint,
        options: &Options,
        tls: Option<ClientTls>,
        deadline: Instant,
    ) -> Result<Self, Error> {
        let tls = match tls {
            None => {
                let address = endpoint.ip().map(|address| (address.ip().to_string(), address.port()));
                options.keys.tls(address.as_ref().map(|(ip, port)| (ip.as_str(), *port)))?
            }
            by_name => by_name,
        };
        let mut shared = Shared {
            scheme,
            crc_features: crc_features(options.crc, scheme, &endpoint, tls.is_some()),
            endpoint,
            options: options.clone(),
            tls,
            why_tcp: None,
            id: SessionId::random(),
            process: process(),
            control: Mutex::new(ControlState::Stopped),
            changed: Condvar::new(),
            suspect: AtomicBool::new(false),
            closes: PendingCloses::default(),
            files: Arc::default(),
            channels: AtomicU32::new(0),
            abandoned: Mutex::default(),
        };
        let channel = shared.reach_anew(deadline)?;
        if let Some(why_tcp) = channel.why_tcp() {
            // The session's other connections need not find out once more.
            shared.scheme = Scheme::Tcp;
            shared.why_tcp = Some(why_tcp.to_owned());
        }
        *shared.lock() = ControlState::Idle(Box::new(Control::new(channel)));
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Why a session with `raio://` is over TCP rather than RDMA: a message for people. None if it is not, or
    /// was to be over TCP.
    pub fn why_tcp(&self) -> Option<&str> {
        self.shared.why_tcp.as_deref()
    }

    /// What bounds a call that waits for an answer: [`Options::call_timeout`].
    pub(crate) fn call_timeout(&self) -> Duration {
        self.shared.options.call_timeout
    }

    /// Ends the session: its control connection closes, and with it every open file on the server. Contexts
    /// that are left keep their connections until they are dropped. A call that another thread has under way
    /// fails at once, with ENOTCONN.
    pub fn stop(&self) {
        if self.shared.is_inherited() {
            return;
        }
        let mut state = self.shared.lock();
        match std::mem::replace(&mut *state, ControlState::Stopped) {
            ControlState::Busy => {
                self.shared.changed.notify_all();
                // That thread closes the connection within STOP_CHECK_INTERVAL, unless it does not run.
                drop(self.shared.changed.wait_timeout(state, tuning::STOP_CHECK_INTERVAL * 10));
            }
            ControlState::Idle(control) => {
                drop(state);
                self.shared.end_control(control);
            }
            ControlState::Stopped => {}
        }
        if !lock(&self.shared.abandoned).is_empty() {
            self.shared.give_up();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.is_inherited() {
            return;
        }
        let control = std::mem::replace(&mut *self.lock(), ControlState::Stopped);
        if let ControlState::Idle(control) = control {
            self.end_control(control);
        }
        if !lock(&self.abandoned).is_empty() {
            self.give_up();
        }
    }
}

impl Session {
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Shared {
    /// Makes a channel of this session that may have `depth` requests outstanding, by `deadline`.
    pub(crate) fn connect(this: &Arc<Self>, depth: u32, deadline: Instant) -> Result<Channel, Error> {
        let earlier = lock(&this.abandoned).pop().unwrap_or_else(|| Abandoned {
            number: this.channels.fetch_add(1, Ordering::Relaxed) + 1,
            epoch: 0,
            used: UsedIds::default(),
        });
        let again = Abandoned { used: earlier.used.clone(), ..earlier };
        match this.reach(depth, earlier, Vec::new(), deadline) {
            Ok(mut channel) => {
                let session = Arc::clone(this);
                channel.on_abandoned(move |abandoned| session.abandon(abandoned));
                Ok(channel)
            }
            Err(error) => {
                if again.epoch > 0 {
                    // A dial may offer two.
                    lock(&this.abandoned).push(Abandoned { epoch: again.epoch + 2, ..again });
                }
                Err(error)
            }
        }
    }

    /// Makes the control channel of a new session. Sessions of this process with this server that were given
    /// up are ended before, as many with each connection as it can name.
    fn reach_anew(&self, deadline: Instant) -> Result<Channel, Error> {
        let is_here = |given_up: &(Endpoint, SessionId)| given_up.0 == self.endpoint;
        let mut epoch = 0;
        loop {
            let superseded: Vec<_> = given_up().map_or_else(Vec::new, |mut all| {
                all.extract_if(.., |given_up| is_here(given_up))
                    .map(|(_, id)| id)
                    .take(SUPERSEDED_MAX)
                    .collect()
            });
            let put_back = superseded.clone();
            let first = Abandoned { number: 0, epoch, used: UsedIds::default() };
            let channel =
                self.reach(tuning::CONTROL_DEPTH, first, superseded, deadline).inspect_err(|_| {
                    if let Some(mut all) = given_up() {
                        all.extend(put_back.into_iter().map(|id| (self.endpoint.clone(), id)));
                    }
                })?;
            if !given_up().is_some_and(|all| all.iter().any(is_here)) {
                return Ok(channel);
            }
            // A dial may offer two.
            epoch += 2;
        }
    }

    /// Makes a channel in the place of an earlier one, which may be none yet.
    fn reach(
        &self,
        depth: u32,
        earlier: Abandoned,
        supersedes: Vec<SessionId>,
        deadline: Instant,
    ) -> Result<Channel, Error> {
        let Abandoned { number, epoch, used } = earlier;
        let is_control = number == 0;
        let options = &self.options;
        let linger = match options.reconnect {
            Duration::ZERO => Duration::ZERO,
            window => {
                let notice = options.request_timeout.unwrap_or(tuning::REQUEST_TIMEOUT);
                window + notice + tuning::LINGER_EXTRA
            }
        };
        let offer = Offer {
            session: self.id,
            supersedes,
            features: OPERATION_FEATURES
                | self.crc_features
                // Requests of the control connection are not traced.
                | if !is_control && trace::is_wanted() { FEATURE_PONG_TIME } else { 0 },
            requires_crc: options.crc == Crc::On,
            queue_depth: depth,
            channel: Some(ChannelOffer { number, epoch: epoch + 1, linger }),
            tls: self.tls.clone(),
            ..Offer::new(program_name())
        };
        let settings = Settings {
            divides: true,
            window: options.reconnect,
            redo: options.redo,
            connect_timeout: options.connect_timeout,
            request_timeout: options.request_timeout,
        };
        // Names are looked up only when a session begins: that may take long.
        let (scheme, endpoint) = (self.scheme, self.endpoint.clone());
        let dialer: Dialer = Box::new(move |offer, now, deadline| {
            Box::new(mux::Dial::begin(scheme, endpoint.clone(), offer, now, deadline))
        });
        let files = Arc::clone(&self.files);
        Ok(Channel::connect(dialer, offer, used, settings, files, deadline)?)
    }

    /// A channel was given up with something under way.
    fn abandon(&self, abandoned: Abandoned) {
        lock(&self.abandoned).push(abandoned);
        if !self.is_open() {
            self.give_up();
        }
    }

    /// The session was stopped with something under way.
    fn give_up(&self) {
        if let Some(mut all) = given_up()
            && !all.iter().any(|(endpoint, id)| *endpoint == self.endpoint && *id == self.id)
        {
            all.push((self.endpoint.clone(), self.id));
        }
    }

    fn end_control(&self, mut control: Box<Control>) {
        control.settle();
        let is_owed = control.is_owed();
        drop(control);
        if is_owed {
            self.give_up();
        }
    }

    /// The session's open files.
    pub(crate) fn files(&self) -> &OpenFiles {
        &self.files
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

    /// A context has lost its connection.
    pub(crate) fn suspect(&self) {
        self.suspect.store(true, Ordering::Relaxed);
    }

    /// Has the server execute a command, and waits for its answer.
    pub(crate) fn call(&self, command: &Command<'_>) -> Result<Reply, Error> {
        self.call_with(command, Bulk::None)
    }

    /// The same for a command with data, or with room for what the answer brings.
    pub(crate) fn call_with(&self, command: &Command<'_>, bulk: Bulk) -> Result<Reply, Error> {
        self.call_sized(|_| Ok((*command, bulk)))
    }

    /// The same for a command that depends on the most bytes of one request, which it is made with.
    pub(crate) fn call_sized<'a>(
        &self,
        make: impl FnOnce(usize) -> Result<(Command<'a>, Bulk), Error>,
    ) -> Result<Reply, Error> {
        self.check_process()?;
        let deadline = Instant::now() + self.options.call_timeout;
        let mut guard = self.acquire_by(deadline)?;
        let Some(control) = &mut guard.control else { unreachable!("only dropping takes it") };
        if self.suspect.swap(false, Ordering::Relaxed) {
            control.ping_suspect();
        }
        let reply = make(control.data_bytes_max()).and_then(|(command, bulk)| {
            control.call(&command, bulk, deadline, &self.closes, &|| !self.is_open())
        });
        drop(guard);
        self.send_closes();
        reply
    }

    /// The present status of an open file.
    pub(crate) fn status(&self, handle: FileHandle) -> Result<FileStatus, Error> {
        status_of(&self.call(&Command::Stat(handle))?)
    }

    /// Closes a file.
    pub(crate) fn close(&self, handle: FileHandle) -> Result<(), Error> {
        self.call(&Command::Close(handle)).map(drop)
    }

    /// Closes a file, or ends a listing, without waiting for anything, nor telling of a failure: the server
    /// closes it with the session at the latest.
    pub(crate) fn close_later(&self, close: Command<'static>) {
        self.closes.push(close);
        self.send_closes();
    }

    /// Closes that nobody waits for, and that are not sent yet.
    #[inline]
    pub(crate) fn pending_closes(&self) -> &PendingCloses {
        &self.closes
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

/// The status in a reply.
pub(crate) fn status_of(reply: &Reply) -> Result<FileStatus, Error> {
    let status = FileStatus::decode(&reply.body).map_err(|_| protocol_error())?;
    // Sizes are signed for every caller.
    if status.size.get() > i64::MAX as u64 || status.blocks.get() > i64::MAX as u64 {
        return Err(protocol_error());
    }
    Ok(status)
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
    use crate::fake_server::{FakeServer, until};
    use crate::operation::Operation;
    use crate::tuning::SUSPECT_TIMEOUT;

    fn connect(server: &FakeServer, request_timeout: Duration) -> Session {
        let options = Options {
            request_timeout: Some(request_timeout),
            reconnect: Duration::ZERO,
            ..Options::default()
        };
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
    fn a_close_is_sent_after_a_call_that_comes_to_nothing() {
        let server = FakeServer::start(Policy::default());
        server.file("/e/data", vec![0; 10]);
        let session = Session::connect_to(Scheme::Tcp, server.address, &Options::default()).unwrap();
        let file = session.open("/e/data", libc::O_RDWR, 0).unwrap();
        let result = session.shared.call_sized(|_| {
            // As another thread does it meanwhile.
            drop(file);
            Err(session_stopped())
        });
        assert!(result.is_err());
        until("the file is not closed", || server.open() == 0);
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
