//! What the server says: the log, on standard error or to journald, and statistics on standard output.
//!
//! Each has a bounded queue and a thread that writes, so that no other thread ever waits for whoever reads,
//! or does not. What finds no room in the queue, or cannot be written (a full device, a closed pipe), is lost
//! and counted. Until there are threads ([`start`]), a line is written at once, as far as that can be done
//! without waiting.
//!
//! A message of level info and above has an id, the `name:` of its event, and docs/MESSAGES.md explains it.

mod entry;

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{LazyLock, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use serde::Deserialize;
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use self::entry::{Entry, Look, PLAIN};
use crate::journald;
use crate::peer::Origin;
use crate::rate_limit::RateLimit;
use crate::tuning::log::{FLUSH_TIMEOUT, QUEUE_LINES, RATE_LIMIT_PERIOD, RATE_LIMIT_WINDOW};
use raio_transport::sync::lock;

/// What a pipe takes as a whole.
const PIPE_BUF: usize = libc::PIPE_BUF;

static LOG: OnceLock<SyncSender<Message<Entry>>> = OnceLock::new();
static STATISTICS: OnceLock<SyncSender<Message<Vec<u8>>>> = OnceLock::new();
static SINK: OnceLock<Sink> = OnceLock::new();
/// Where the log goes until the configuration is known.
static EARLY_SINK: LazyLock<Sink> = LazyLock::new(|| Sink::new(LogFormat::Auto, None));
static LEVEL: AtomicU8 = AtomicU8::new(LogLevel::Info as u8);
static LOST: AtomicU64 = AtomicU64::new(0);
static RATE_LIMIT: LazyLock<Mutex<RateLimit>> = LazyLock::new(Mutex::default);

/// How much to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// What went wrong.
    Error,
    /// And what looks wrong.
    Warn,
    /// And what an operator may like to know.
    Info,
    /// And each connection and session.
    Debug,
    /// And each request.
    Trace,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// To journald if standard error goes to the journal, else for people.
    #[default]
    Auto,
    /// Lines for people.
    Human,
    /// A JSON object a line.
    Json,
    /// To journald, with all fields.
    Journald,
}

enum Message<Line> {
    Line(Line),
    /// Everything before it has been written.
    Flush(SyncSender<()>),
}

/// Where the log goes, and how.
#[derive(Debug)]
struct Sink {
    /// If a send fails, standard error has to do.
    journal: Option<OwnedFd>,
    format: Format,
}

/// What standard error gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Human(Look),
    /// For whoever takes each line into the journal: systemd, if standard error is connected to it.
    Prefixed,
    Json,
}

impl Sink {
    /// In this format, with a socket of journald's if there is one.
    fn new(format: LogFormat, journal: Option<OwnedFd>) -> Self {
        let (is_journal, stderr) = (is_journal(io::stderr()), io::stderr());
        let format = match format {
            LogFormat::Json => Format::Json,
            LogFormat::Journald => Format::Prefixed,
            LogFormat::Auto if is_journal => Format::Prefixed,
            LogFormat::Auto | LogFormat::Human => Format::Human(Look {
                is_short: stderr.is_terminal(),
                has_colour: stderr.is_terminal() && wants_colour(),
            }),
        };
        Self { journal, format }
    }

    /// Opens it. If that fails it is one without a socket.
    fn open(format: LogFormat, path: &Path) -> (Self, io::Result<()>) {
        let wants_journal = match format {
            LogFormat::Journald => true,
            LogFormat::Auto => is_journal(io::stderr()),
            LogFormat::Human | LogFormat::Json => false,
        };
        let (journal, outcome) = match wants_journal.then(|| journald::open(path)) {
            Some(Ok(socket)) => (Some(socket), Ok(())),
            Some(Err(error)) => (None, Err(error)),
            None => (None, Ok(())),
        };
        (Self::new(format, journal), outcome)
    }

    fn line(&self, entry: &Entry) -> String {
        match self.format {
            Format::Human(look) => entry.human(look),
            Format::Prefixed => entry.prefixed(),
            Format::Json => entry.json(),
        }
    }

    /// Sends to journald, if that is where the log goes. Returns whether it has taken the entry.
    fn send(&self, entry: &Entry, flags: SendFlags) -> bool {
        let send = |socket| loop {
            match send(socket, &entry.journald(), flags | SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                outcome => break outcome.is_ok(),
            }
        };
        self.journal.as_ref().is_some_and(send)
    }

    /// Writes it, however long that takes.
    fn write(&self, entry: &Entry) -> Result<(), Errno> {
        if self.send(entry, SendFlags::empty()) {
            return Ok(());
        }
        write_all(io::stderr(), self.line(entry).as_bytes())
    }

    /// Writes it, as far as that can be done without waiting. Returns whether that is all of it.
    fn write_at_once(&self, entry: &Entry) -> bool {
        self.send(entry, SendFlags::DONTWAIT) || write_at_once(io::stderr(), self.line(entry).as_bytes())
    }
}

/// Whether systemd has connected this to the journal, as sd-daemon(3) says how to tell.
fn is_journal(fd: impl AsFd) -> bool {
    let named = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    rustix::fs::fstat(fd).is_ok_and(|stat| named == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// As https://no-color.org says.
fn wants_colour() -> bool {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    !is_set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|terminal| terminal != "dumb")
}

/// Takes in what is logged with tracing's macros.
struct Log;

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= level()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(level())
    }

    fn event(&self, event: &Event<'_>) {
        push(Entry::of(event));
    }

    // Nothing has spans.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn level() -> LevelFilter {
    const LEVELS: [LevelFilter; 5] =
        [LevelFilter::ERROR, LevelFilter::WARN, LevelFilter::INFO, LevelFilter::DEBUG, LevelFilter::TRACE];
    LEVELS[usize::from(LEVEL.load(Ordering::Relaxed))]
}

/// Has events logged up to this level, from now on.
pub fn set_level(level: LogLevel) {
    LEVEL.store(level as u8, Ordering::Relaxed);
    // Each place that logs has kept whether it does.
    tracing_core::callsite::rebuild_interest_cache();
}

/// Starts the threads that write. Once, after signals have been blocked, and with what threads inherit.
pub fn start() -> io::Result<()> {
    let _ = LOG.set(start_thread("raio-log", write_log)?);
    let _ = STATISTICS.set(start_thread("raio-stdout", write_statistics)?);
    Ok(())
}

fn start_thread<Line: Send + 'static>(
    name: &str,
    write: fn(Receiver<Message<Line>>),
) -> io::Result<SyncSender<Message<Line>>> {
    let (sender, receiver) = sync_channel(QUEUE_LINES);
    std::thread::Builder::new().name(name.into()).spawn(move || write(receiver))?;
    Ok(sender)
}

/// Has events and panics logged: the standard library's hook would wait for standard error. First of all.
pub fn install() {
    // It fails if there is one already, as there may be in programs that test the server.
    let _ = tracing::subscriber::set_global_default(Log);
    std::panic::set_hook(Box::new(|info| {
        tracing::error!(
            name: "panic",
            "{what}. This is a bug: report it with the log.",
            what = info.to_string().replace('\n', " ")
        );
    }));
}

/// Has events logged up to this level, in this format. Once the configuration is known, and before the
/// sandbox closes.
pub fn init(level: LogLevel, format: LogFormat) {
    set_level(level);
    let (sink, outcome) = Sink::open(format, Path::new(journald::SOCKET));
    let _ = SINK.set(sink);
    if let Err(error) = outcome {
        tracing::warn!(
            name: "journald-unreachable",
            "Cannot reach journald at {socket}: {error}. The log goes to standard error instead.",
            socket = journald::SOCKET
        );
    }
}

/// Puts a line for the operator into the log, whatever its level.
pub fn say(text: &str) {
    tracing::error!(name: "failed", target: PLAIN, "{text}");
}

/// Puts a line on standard output.
pub fn print(text: &str) {
    let line = Message::Line(format!("{text}\n").into_bytes());
    if STATISTICS.get().is_some_and(|queue| queue.try_send(line).is_err()) {
        tracing::warn!(
            name: "stdout-full",
            "Nobody reads standard output, so a line for it is lost. Read it, or redirect it to a file."
        );
    }
}

fn rate_limit() -> MutexGuard<'static, RateLimit> {
    lock(&RATE_LIMIT)
}

/// Whether a message with this id, about this peer, may be logged now. If not it is counted, and the number
/// is logged later.
pub fn permit(peer: Option<Origin>, id: &'static str) -> bool {
    rate_limit().permit(peer, id, Instant::now())
}

/// Logs a message about a client, whose socket address may be known, unless there were too many with this id
/// about its address.
macro_rules! log_client {
    (@ $level:ident, $peer:expr, $origin:expr, $id:literal, $($line:tt)*) => {
        if $crate::log::permit($origin, $id) {
            tracing::$level!(name: $id, peer = $peer.map(tracing::field::display), $($line)*);
        }
    };
    // Of some no more than the origin is known.
    ($level:ident, origin $origin:expr, $id:literal, $($line:tt)*) => {
        $crate::log::log_client!(@ $level, $origin, $origin, $id, $($line)*)
    };
    ($level:ident, $peer:expr, $id:literal, $($line:tt)*) => {
        $crate::log::log_client!(@ $level, $peer, $peer.map(|peer| peer.origin()), $id, $($line)*)
    };
}

pub(crate) use log_client;

/// Logs how many lines were not permitted in the windows that are over by then.
fn report_suppressed(now: Instant) {
    let suppressed = rate_limit().end_windows(now);
    for ((peer, id), count) in suppressed {
        let peer = peer.map(tracing::field::display);
        tracing::warn!(
            name: "lines-left-out",
            peer,
            of = id,
            "{count} more lines of the same kind were left out."
        );
    }
}

/// Lines of the log that were lost so far.
pub fn lost() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// Waits until what is queued has been written, for a short while at most. For the end of the process.
pub fn flush() {
    let now = Instant::now();
    report_suppressed(now + RATE_LIMIT_WINDOW);
    let deadline = now + FLUSH_TIMEOUT;
    flush_queue(&STATISTICS, deadline);
    flush_queue(&LOG, deadline);
}

fn flush_queue<Line>(queue: &OnceLock<SyncSender<Message<Line>>>, deadline: Instant) {
    let Some(queue) = queue.get() else { return };
    let (sender, done) = sync_channel(1);
    while queue.try_send(Message::Flush(sender.clone())).is_err() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(sender);
    let _ = done.recv_timeout(deadline.saturating_duration_since(Instant::now()));
}

fn sink() -> &'static Sink {
    SINK.get().unwrap_or_else(|| &EARLY_SINK)
}

fn push(entry: Entry) {
    let is_taken = match LOG.get() {
        Some(queue) => queue.try_send(Message::Line(entry)).is_ok(),
        None => sink().write_at_once(&entry),
    };
    if !is_taken {
        LOST.fetch_add(1, Ordering::Relaxed);
    }
}

/// Writes a line, as far as that can be done without waiting. Returns whether that is all of it.
fn write_at_once(to: impl AsFd, line: &[u8]) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    // A pipe that has room has it for this much at least.
    line.chunks(PIPE_BUF).all(|piece| {
        let mut fds = [PollFd::new(&to, PollFlags::OUT)];
        poll(&mut fds, Some(&now)) == Ok(1) && rustix::io::write(&to, piece) == Ok(piece.len())
    })
}

fn write_log(lines: Receiver<Message<Entry>>) {
    let mut told = 0;
    loop {
        let next = if rate_limit().is_empty() {
            lines.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            lines.recv_timeout(RATE_LIMIT_PERIOD)
        };
        report_suppressed(Instant::now());
        let entry = match next {
            Ok(Message::Line(entry)) => entry,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
            Ok(Message::Flush(done)) => {
                let _ = done.send(());
                continue;
            }
        };
        if sink().write(&entry).is_err() {
            LOST.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let lost = lost();
        if lost > told {
            let count = lost - told;
            let report = Entry::plain(
                Level::WARN,
                "log-lines-lost",
                &format!("{count} lines of the log were lost, because its reader was too slow."),
            );
            if sink().write(&report).is_ok() {
                told = lost;
            }
        }
    }
}

fn write_statistics(lines: Receiver<Message<Vec<u8>>>) {
    let stdout = io::stdout();
    for message in lines {
        match message {
            Message::Line(line) => {
                if let Err(error) = write_all(&stdout, &line) {
                    tracing::warn!(name: "stdout-failed", "Cannot write to standard output: {error}.");
                }
            }
            Message::Flush(done) => {
                let _ = done.send(());
            }
        }
    }
}

/// Past the standard library's buffers and locks.
fn write_all(to: impl AsFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::INTR) => {}
            // Whoever started the server has made it non-blocking.
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::new(&to, PollFlags::OUT)], None);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_level_changes_also_where_something_was_logged_before() {
        let is_logged = || tracing::enabled!(Level::DEBUG);
        tracing::subscriber::with_default(Log, || {
            assert!(!is_logged());
            set_level(LogLevel::Debug);
            assert!(is_logged());
            set_level(LogLevel::Info);
            assert!(!is_logged());
        });
    }

    #[test]
    fn a_log_without_journald_goes_to_standard_error_with_priorities() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let entry = Entry::plain(Level::WARN, "failed", "so");
        let (sink, outcome) = Sink::open(LogFormat::Journald, &path);
        assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!sink.send(&entry, SendFlags::DONTWAIT));
        assert_eq!(sink.line(&entry), "<4>so\n");

        let journald = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        let (sink, outcome) = Sink::open(LogFormat::Journald, &path);
        outcome.unwrap();
        assert!(sink.send(&entry, SendFlags::DONTWAIT));
        let mut datagram = [0; 256];
        let n = journald.recv(&mut datagram).unwrap();
        assert!(datagram[..n].starts_with(b"PRIORITY=4\nSYSLOG_IDENTIFIER=raio_server\nMESSAGE=so\n"));
        // It hangs, and its socket is full: nobody waits.
        let sent = (0..100_000).take_while(|_| sink.send(&entry, SendFlags::DONTWAIT)).count();
        assert!(sent < 100_000);
        drop(journald);
        assert!(!sink.send(&entry, SendFlags::DONTWAIT));
    }

    #[test]
    fn a_pipe_that_is_full_holds_up_nobody() {
        let (reader, writer) = io::pipe().unwrap();
        let line = vec![b'x'; 4105];
        let taken = (0..100).take_while(|_| write_at_once(&writer, &line)).count();
        assert!((1..100).contains(&taken), "{taken} lines");
        drop(reader);
        assert!(!write_at_once(&writer, b"x\n"), "a closed one takes nothing");
    }
}
