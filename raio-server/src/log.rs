//! What the server says: the log on standard error, and statistics on standard output.
//!
//! Each has a bounded queue and a thread that writes, so that no other thread ever waits for whoever reads,
//! or does not. What finds no room in the queue, or cannot be written (a full device, a closed pipe), is lost
//! and counted. Until there are threads ([`start`]), a line is written at once, as far as that can be done
//! without waiting.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{LazyLock, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::peer::Origin;
use crate::rate_limit::RateLimit;
use crate::tuning::log::{FLUSH_TIMEOUT, LINE_BYTES_MAX, QUEUE_LINES, RATE_LIMIT_PERIOD, RATE_LIMIT_WINDOW};
use raio_transport::sync::lock;

/// What a pipe takes as a whole.
const PIPE_BUF: usize = libc::PIPE_BUF;

static LOG: OnceLock<SyncSender<Message>> = OnceLock::new();
static STATISTICS: OnceLock<SyncSender<Message>> = OnceLock::new();
static SET_LEVEL: OnceLock<Box<dyn Fn(LevelFilter) + Send + Sync>> = OnceLock::new();
static LOST: AtomicU64 = AtomicU64::new(0);
static RATE_LIMIT: LazyLock<Mutex<RateLimit>> = LazyLock::new(Mutex::default);

enum Message {
    Line(Vec<u8>),
    /// Everything before it has been written.
    Flush(SyncSender<()>),
}

/// Starts the threads that write. Once, after signals have been blocked, and with what threads inherit.
pub fn start() -> io::Result<()> {
    let thread = |name: &str, write: fn(Receiver<Message>)| {
        let (sender, receiver) = sync_channel(QUEUE_LINES);
        std::thread::Builder::new().name(name.into()).spawn(move || write(receiver)).map(|_| sender)
    };
    let _ = LOG.set(thread("raio-log", write_log)?);
    let _ = STATISTICS.set(thread("raio-stdout", write_statistics)?);
    Ok(())
}

/// Has panics logged: the standard library's hook would wait for standard error.
pub fn catch_panics() {
    std::panic::set_hook(Box::new(|info| tracing::error!("{}", info.to_string().replace('\n', " "))));
}

/// Has events logged up to this level.
pub fn init(level: LevelFilter) {
    let (filter, handle) = tracing_subscriber::reload::Layer::new(level);
    let _ = SET_LEVEL.set(Box::new(move |level| drop(handle.reload(level))));
    tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        .with_writer(|| LogWriter)
        .with_ansi(false)
        .with_target(false)
        .finish()
        .with(filter)
        .init();
}

/// From now on events are logged up to this level.
pub fn set_level(level: LevelFilter) {
    if let Some(set) = SET_LEVEL.get() {
        set(level);
    }
}

/// Puts a line for the operator on standard error, whatever the log level.
pub fn say(text: &str) {
    push_log(format!("raio_server: {text}\n").as_bytes());
}

/// Puts a line on standard output.
pub fn print(text: &str) {
    let line = Message::Line(format!("{text}\n").into_bytes());
    if STATISTICS.get().is_some_and(|queue| queue.try_send(line).is_err()) {
        tracing::warn!("Nobody reads standard output, so a line for it is lost.");
    }
}

fn rate_limit() -> MutexGuard<'static, RateLimit> {
    lock(&RATE_LIMIT)
}

/// Whether a line of this kind, about this peer, may be logged now. If not it is counted, and the number is
/// logged later.
pub fn permit(peer: Option<Origin>, kind: &'static str) -> bool {
    rate_limit().permit(peer, kind, Instant::now())
}

/// Logs a line about a client, whose socket address may be known, unless there were too many of the kind
/// about its address.
macro_rules! log_client {
    (@ $level:ident, $client:expr, $address:expr, $kind:expr, $($line:tt)*) => {
        if $crate::log::permit($address, $kind) {
            tracing::$level!(client = $client.map(tracing::field::display), $($line)*);
        }
    };
    // Of some no more than the origin is known.
    ($level:ident, origin $origin:expr, $kind:expr, $($line:tt)*) => {
        $crate::log::log_client!(@ $level, $origin, $origin, $kind, $($line)*)
    };
    ($level:ident, $peer:expr, $kind:expr, $($line:tt)*) => {
        $crate::log::log_client!(@ $level, $peer, $peer.map(|peer| peer.origin()), $kind, $($line)*)
    };
}

pub(crate) use log_client;

/// Logs how many lines were not permitted in the windows that are over by then.
fn report_suppressed(now: Instant) {
    let suppressed = rate_limit().end_windows(now);
    for ((peer, kind), count) in suppressed {
        tracing::warn!(client = peer.map(tracing::field::display), "{count} more lines like these: {kind}.");
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
    for queue in [&STATISTICS, &LOG].into_iter().filter_map(OnceLock::get) {
        let (sender, done) = sync_channel(1);
        while queue.try_send(Message::Flush(sender.clone())).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(sender);
        let _ = done.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}

/// An event is written to it by one call.
struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        push_log(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn push_log(bytes: &[u8]) {
    let line = sanitized(&String::from_utf8_lossy(bytes)).into_bytes();
    let is_taken = match LOG.get() {
        Some(queue) => queue.try_send(Message::Line(line)).is_ok(),
        None => write_at_once(io::stderr(), &line),
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

/// One line in which nothing steers a terminal or looks like another line, whatever names of clients and
/// files it quotes.
fn sanitized(text: &str) -> String {
    let mut line = String::with_capacity(text.len() + 1);
    for char in text.strip_suffix('\n').unwrap_or(text).chars() {
        // Beside the control characters: line and paragraph separators, and what turns the direction of text.
        let is_odd = matches!(
            char,
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
        );
        if char.is_control() || is_odd {
            line.extend(char.escape_default());
        } else {
            line.push(char);
        }
        if line.len() > LINE_BYTES_MAX {
            line.push_str("...");
            break;
        }
    }
    line.push('\n');
    line
}

fn write_log(lines: Receiver<Message>) {
    let stderr = io::stderr();
    let mut told = 0;
    loop {
        let next = if rate_limit().is_empty() {
            lines.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            lines.recv_timeout(RATE_LIMIT_PERIOD)
        };
        report_suppressed(Instant::now());
        let line = match next {
            Ok(Message::Line(line)) => line,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
            Ok(Message::Flush(done)) => {
                let _ = done.send(());
                continue;
            }
        };
        if write_all(&stderr, &line).is_err() {
            LOST.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let lost = lost();
        if lost > told {
            let report = format!(
                "raio_server: {} lines of the log were lost, for standard error did not take them.\n",
                lost - told
            );
            if write_all(&stderr, report.as_bytes()).is_ok() {
                told = lost;
            }
        }
    }
}

fn write_statistics(lines: Receiver<Message>) {
    let stdout = io::stdout();
    for message in lines {
        match message {
            Message::Line(line) => {
                if let Err(error) = write_all(&stdout, &line) {
                    tracing::warn!("Cannot write to standard output: {error}.");
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
    fn a_pipe_that_is_full_holds_up_nobody() {
        let (reader, writer) = io::pipe().unwrap();
        let line = vec![b'x'; LINE_BYTES_MAX + 9];
        let taken = (0..100).take_while(|_| write_at_once(&writer, &line)).count();
        assert!((1..100).contains(&taken), "{taken} lines");
        drop(reader);
        assert!(!write_at_once(&writer, b"x\n"), "a closed one takes nothing");
    }

    #[test]
    fn nothing_in_a_line_steers_a_terminal_or_makes_another_line() {
        assert_eq!(sanitized("plain, ä and 語\n"), "plain, ä and 語\n");
        assert_eq!(sanitized("a\nb\r\u{1b}[2J\u{9b}\u{202e}c\t"), "a\\nb\\r\\u{1b}[2J\\u{9b}\\u{202e}c\\t\n");
        assert!(sanitized(&"x".repeat(100_000)).len() < LINE_BYTES_MAX + 10);
    }
}
