//! The audit log (`--audit`): who has connected, what each has opened, and how that ended. One JSON object a
//! line, appended to a file, or sent to journald.
//!
//! A thread writes it, so no worker waits for a disk. Workers send it records through a bounded queue. If the
//! queue is full, records are lost, and the next one that is not says how many. With `--audit-full=wait` the
//! second half of the queue is kept for what cannot wait, and opens wait while there are more: what is opened
//! is in the log, or will be, unless the server is killed.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use jiff::Timestamp;
use raio_transport::handshake::Identity;
use raio_transport::keys::{PublicKey, fingerprint};
use raio_transport::message::SessionId;
use raio_transport::sync::lock;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketType, connect, send, socket};
use serde::{Serialize, Serializer};

use crate::config::{AuditTarget, WhenFull};
use crate::keys::Keys;
use crate::peer::PeerAddress;
use crate::tuning::audit::{BATCH_BYTES, FLUSH_TIMEOUT, QUEUE_RECORDS, RETRY};

const JOURNALD: &str = "/run/systemd/journal/socket";

/// Who does something.
#[derive(Debug, Default, Serialize)]
pub struct Who {
    /// The client's name in `clients.toml`.
    #[serde(skip_serializing_if = "Option::is_none")]
    client: Option<String>,
    /// Its key.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_text")]
    key: Option<PublicKey>,
    /// Its user's number, over a Unix socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<u32>,
    /// Where its connection is from.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_text")]
    address: Option<PeerAddress>,
    /// What it calls itself.
    #[serde(skip_serializing_if = "String::is_empty")]
    name: String,
    /// The front of the hash of its session's id, which is a secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<String>,
}

fn as_text<T: ToString, S: Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => serializer.serialize_str(&value.to_string()),
        None => serializer.serialize_none(),
    }
}

impl Who {
    /// A client of this identity, as far as the keys know it.
    pub fn new(keys: Option<&Keys>, identity: &Identity) -> Self {
        let client = keys.and_then(|keys| keys.client(identity)).map(|client| client.name.clone());
        let (key, user) = match identity {
            Identity::Anonymous => (None, None),
            Identity::Key(key) => (Some(*key), None),
            Identity::User(user) => (None, Some(user.uid)),
        };
        Self { client, key, user, ..Self::default() }
    }

    /// The same, from there.
    pub fn at(self, address: Option<PeerAddress>) -> Self {
        Self { address, ..self }
    }

    /// The same, by the name that it gives itself, with this session.
    pub fn with_session(self, name: &str, session: SessionId) -> Self {
        Self { name: name.to_owned(), session: Some(fingerprint(&session.0)), ..self }
    }
}

/// What is done.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// A connection was accepted, and its client belongs to a session.
    Connect,
    /// A connection was rejected.
    Reject {
        /// Why, as an errno.
        errno: i32,
        /// Why, in words.
        reason: String,
    },
    /// A file was opened; or not, if there is an errno.
    Open {
        /// Its path, with the export in front.
        path: String,
        /// r, w or rw.
        access: &'static str,
        /// 0, or why not.
        errno: i32,
    },
    /// A file was closed, by its client or because its session has ended.
    Close {
        /// As in the open.
        path: String,
        /// What was read from it since.
        read_bytes: u64,
        /// What was written to it.
        written_bytes: u64,
    },
    /// Something was done to a path: a name, or a whole small file.
    Operation {
        /// What: get, put, list, mkdir, rename, ...
        operation: &'static str,
        /// Its path, with the export in front.
        path: String,
        /// The new path of a rename or a link, or the target of a symbolic link.
        #[serde(skip_serializing_if = "Option::is_none")]
        to: Option<String>,
        /// Of a get or a put: the bytes of the file that were brought.
        #[serde(skip_serializing_if = "Option::is_none")]
        bytes: Option<u64>,
        /// 0, or why not.
        errno: i32,
    },
    /// A connection has ended.
    Disconnect {
        /// How.
        reason: &'static str,
    },
    /// An administrator ends a session.
    Kill {
        /// Which.
        by: String,
    },
    /// A session has ended: its files are closed.
    End,
    /// Records are missing here.
    Lost {
        /// How many.
        records: u64,
    },
}

#[derive(Debug, Serialize)]
struct Record {
    #[serde(serialize_with = "time_as_text")]
    time: Timestamp,
    #[serde(flatten)]
    event: Event,
    #[serde(flatten)]
    who: Option<Arc<Who>>,
}

fn time_as_text<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{time:.6}"))
}

#[derive(Debug)]
enum Message {
    Record(Record),
    /// The file is to be opened anew, at its path.
    Reopen,
    /// Everything before it has been written.
    Flush(SyncSender<()>),
}

fn as_text_path(path: &[u8]) -> String {
    match std::str::from_utf8(path) {
        Ok(text) => text.to_owned(),
        Err(_) => path.escape_ascii().to_string(),
    }
}

/// What an open file, or an operation on a path, is to the log.
#[derive(Debug)]
pub struct Audited {
    who: Arc<Who>,
    path: String,
    /// What else an operation names.
    to: Option<String>,
    access: &'static str,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

impl Audited {
    /// A file that this client opens at this path, for r, w or rw.
    pub fn new(who: &Arc<Who>, path: &[u8], access: &'static str) -> Arc<Self> {
        Self::operation(who, path, &[], access)
    }

    /// An operation on a path, by its name, and what else it names, if anything.
    pub fn operation(who: &Arc<Who>, path: &[u8], other: &[u8], name: &'static str) -> Arc<Self> {
        let (path, to) = (as_text_path(path), (!other.is_empty()).then(|| as_text_path(other)));
        let (read_bytes, written_bytes) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Self { who: Arc::clone(who), path, to, access: name, read_bytes, written_bytes })
    }

    /// Adds to what was read.
    pub fn on_read(&self, bytes: u64) {
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds to what was written.
    pub fn on_written(&self, bytes: u64) {
        self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// See the module documentation.
#[derive(Debug)]
pub struct Audit {
    sender: SyncSender<Message>,
    when_full: WhenFull,
    counts: Arc<Counts>,
    /// What the thread will have that is not started yet.
    unstarted: Mutex<Option<(Writer, Receiver<Message>)>>,
}

#[derive(Debug, Default)]
struct Counts {
    /// Records in the queue.
    queued: AtomicUsize,
    /// Records that it had no room for, and that the log does not tell of yet.
    untold: AtomicU64,
    /// The same from the beginning.
    lost: AtomicU64,
    /// Records that were written.
    written: AtomicU64,
    /// Opens wait.
    is_awaited: AtomicBool,
}

impl Audit {
    /// Opens the file, or reaches journald. [`Audit::start`] is to follow.
    pub fn open(target: &AuditTarget, when_full: WhenFull) -> anyhow::Result<Self> {
        let out = Out::open(target)?;
        let (sender, receiver) = sync_channel(QUEUE_RECORDS);
        let counts = Arc::new(Counts::default());
        let writer = Writer { out, counts: Arc::clone(&counts), has_failed: false };
        Ok(Self { sender, when_full, counts, unstarted: Mutex::new(Some((writer, receiver))) })
    }

    /// Starts the thread that writes. It calls `wake` when opens that wait may go on.
    pub fn start(&self, wake: impl Fn() + Send + 'static) -> anyhow::Result<()> {
        let Some((writer, receiver)) = lock(&self.unstarted).take() else { return Ok(()) };
        std::thread::Builder::new()
            .name("raio-audit".into())
            .spawn(move || writer.run(&receiver, &wake))
            .context("Cannot start a thread for --audit. Raise the limit on processes with `ulimit -u`")?;
        Ok(())
    }

    /// Records what a client does. Never waits.
    pub fn record(&self, who: &Arc<Who>, event: Event) {
        let record = Record { time: Timestamp::now(), event, who: Some(Arc::clone(who)) };
        self.counts.queued.fetch_add(1, Ordering::Relaxed);
        if self.sender.try_send(Message::Record(record)).is_err() {
            self.counts.queued.fetch_sub(1, Ordering::Relaxed);
            self.counts.untold.fetch_add(1, Ordering::Relaxed);
            self.counts.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Records that a connection was rejected.
    pub fn rejected(&self, who: Who, errno: i32, reason: impl Into<String>) {
        self.record(&Arc::new(who), Event::Reject { errno, reason: reason.into() });
    }

    /// Whether opens wait now. They are to be tried again when the thread wakes the workers.
    pub fn holds_back_opens(&self) -> bool {
        if self.when_full == WhenFull::Lose || !self.is_half_full() {
            return false;
        }
        self.counts.is_awaited.store(true, Ordering::SeqCst);
        // It may have been emptied just before.
        self.is_half_full()
    }

    fn is_half_full(&self) -> bool {
        self.counts.queued.load(Ordering::SeqCst) >= QUEUE_RECORDS / 2
    }

    /// Records that a file was opened, or why not.
    pub fn opened(&self, file: &Audited, errno: i32) {
        self.record(&file.who, Event::Open { path: file.path.clone(), access: file.access, errno });
    }

    /// Records that an operation on a path has ended, and how. `bytes` is what it has brought of a file.
    pub fn operated(&self, what: &Audited, bytes: Option<u64>, errno: i32) {
        let (path, to) = (what.path.clone(), what.to.clone());
        self.record(&what.who, Event::Operation { operation: what.access, path, to, bytes, errno });
    }

    /// Records that a file was closed.
    pub fn closed(&self, file: &Audited) {
        let [read_bytes, written_bytes] =
            [&file.read_bytes, &file.written_bytes].map(|bytes| bytes.load(Ordering::Relaxed));
        self.record(&file.who, Event::Close { path: file.path.clone(), read_bytes, written_bytes });
    }

    /// Has the file opened anew, after it was moved away.
    pub fn reopen(&self) {
        let _ = self.sender.try_send(Message::Reopen);
    }

    /// Records that were written, and that were lost.
    pub fn counts(&self) -> [u64; 2] {
        [&self.counts.written, &self.counts.lost].map(|count| count.load(Ordering::Relaxed))
    }

    /// Waits until what is queued has been written, for a while at most. For the end of the process.
    pub fn flush(&self) {
        let deadline = Instant::now() + FLUSH_TIMEOUT;
        let (sender, done) = sync_channel(1);
        while self.sender.try_send(Message::Flush(sender.clone())).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(sender);
        if done.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_err() {
            tracing::warn!("The audit log is incomplete: it cannot be written in {FLUSH_TIMEOUT:?}.");
        }
    }
}

// Writing
// --------------------------------------------------------------------------------------------------------

#[derive(Debug)]
enum Out {
    File {
        path: PathBuf,
        /// Where the path leads, for the file to be opened anew.
        directory: OwnedFd,
        name: OsString,
        file: OwnedFd,
    },
    Journald(OwnedFd),
}

impl Out {
    fn open(target: &AuditTarget) -> anyhow::Result<Self> {
        let path = match target {
            AuditTarget::File(path) => path,
            AuditTarget::Journald => {
                let connected = || {
                    let socket = socket(AddressFamily::UNIX, SocketType::DGRAM, None)?;
                    connect(&socket, &SocketAddrUnix::new(JOURNALD)?)?;
                    Ok(socket)
                };
                let socket =
                    connected().map_err(|errno: Errno| io::Error::from(errno)).with_context(|| {
                        format!("Cannot reach journald at {JOURNALD}. Name a file with --audit instead")
                    })?;
                return Ok(Self::Journald(socket));
            }
        };
        let cannot = || {
            format!(
                "Cannot open {} for --audit. Name a file in a directory that raio_server may write to",
                path.display()
            )
        };
        let Some(name) = path.file_name() else { bail!("{}: it names no file.", cannot()) };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, parent.unwrap_or(Path::new(".")), flags, Mode::empty())
            .map_err(io::Error::from)
            .with_context(cannot)?;
        let file = open_file(&directory, name).map_err(io::Error::from).with_context(cannot)?;
        Ok(Self::File { path: path.clone(), directory, name: name.to_owned(), file })
    }

    fn reopen(&mut self) {
        let Self::File { path, directory, name, file } = self else { return };
        match open_file(&*directory, name) {
            Ok(new) => *file = new,
            Err(errno) => tracing::error!(
                "Cannot open {} anew: {}. The audit log goes on in the file that was open.",
                path.display(),
                io::Error::from(errno)
            ),
        }
    }

    /// Writes the front of the lines. Returns how many bytes that was.
    fn write(&self, lines: &[u8]) -> Result<usize, Errno> {
        match self {
            Self::File { file, .. } => rustix::io::write(file, lines),
            Self::Journald(socket) => {
                let end = lines.iter().position(|&byte| byte == b'\n').map_or(lines.len(), |at| at + 1);
                let line = lines[..end].trim_ascii_end();
                let message = [b"PRIORITY=5\nSYSLOG_IDENTIFIER=raio_server\nMESSAGE=", line, b"\n"].concat();
                send(socket, &message, SendFlags::NOSIGNAL)?;
                Ok(end)
            }
        }
    }
}

fn open_file(directory: impl AsFd, name: &std::ffi::OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NOCTTY | OFlags::CLOEXEC;
    openat(directory, name, flags, Mode::RUSR | Mode::WUSR)
}

impl Audit {
    /// The directory of the file, for the sandbox; None: it goes to journald, or writes already.
    pub fn directory(&self) -> Option<OwnedFd> {
        match &*lock(&self.unstarted) {
            Some((Writer { out: Out::File { directory, .. }, .. }, _)) => {
                rustix::io::fcntl_dupfd_cloexec(directory, 0).ok()
            }
            _ => None,
        }
    }
}

/// What the thread has.
#[derive(Debug)]
struct Writer {
    out: Out,
    counts: Arc<Counts>,
    /// The last write has failed, and the log of the server has a line about it.
    has_failed: bool,
}

impl Writer {
    fn run(mut self, receiver: &Receiver<Message>, wake: &dyn Fn()) {
        let mut lines = Vec::new();
        while let Ok(first) = receiver.recv() {
            let mut next = Some(first);
            while let Some(message) = next {
                match message {
                    Message::Record(record) => self.take(&record, &mut lines, wake),
                    Message::Reopen => {
                        self.write_all(&mut lines);
                        self.out.reopen();
                    }
                    Message::Flush(done) => {
                        self.write_all(&mut lines);
                        let _ = done.send(());
                    }
                }
                next = if lines.len() < BATCH_BYTES { receiver.try_recv().ok() } else { None };
            }
            self.write_all(&mut lines);
        }
    }

    /// Takes in a record, and what was lost before it.
    fn take(&self, record: &Record, lines: &mut Vec<u8>, wake: &dyn Fn()) {
        let before = self.counts.queued.fetch_sub(1, Ordering::SeqCst);
        if before == QUEUE_RECORDS / 2 && self.counts.is_awaited.swap(false, Ordering::SeqCst) {
            wake();
        }
        let lost = self.counts.untold.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let lost = Record { time: record.time, event: Event::Lost { records: lost }, who: None };
            self.put(&lost, lines);
        }
        self.put(record, lines);
    }

    fn put(&self, record: &Record, lines: &mut Vec<u8>) {
        let begin = lines.len();
        if let Err(error) = serde_json::to_writer(&mut *lines, record) {
            debug_assert!(false, "{error}");
            lines.truncate(begin);
            return;
        }
        lines.push(b'\n');
        self.counts.written.fetch_add(1, Ordering::Relaxed);
    }

    /// Writes everything, however long that takes: nothing is lost here.
    fn write_all(&mut self, lines: &mut Vec<u8>) {
        let mut rest = &lines[..];
        while !rest.is_empty() {
            match self.out.write(rest) {
                Ok(n @ 1..) => {
                    rest = &rest[n..];
                    if std::mem::take(&mut self.has_failed) {
                        tracing::info!("The audit log is written again.");
                    }
                }
                Err(Errno::INTR) => {}
                failed => {
                    let error = failed.map_or_else(io::Error::from, |_| io::ErrorKind::WriteZero.into());
                    if !std::mem::replace(&mut self.has_failed, true) {
                        tracing::error!(
                            "Cannot write to the audit log: {error}. Trying again until it works."
                        );
                    }
                    std::thread::sleep(RETRY);
                }
            }
        }
        lines.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    fn who() -> Arc<Who> {
        let who = Who::new(None, &Identity::Anonymous).at(Some(PeerAddress::User(7)));
        Arc::new(who.with_session("fio \"[1]\"\n", SessionId([1; 16])))
    }

    fn lines(path: &Path) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn what_is_recorded_is_appended_in_order_a_line_each() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit");
        std::fs::write(&path, "{}\n").unwrap();
        let audit = Audit::open(&AuditTarget::File(path.clone()), WhenFull::Lose).unwrap();
        audit.start(|| {}).unwrap();
        let who = who();
        audit.record(&who, Event::Connect);
        let opened = "/data/a\u{1b}[2J\nb";
        let file = Audited::new(&who, opened.as_bytes(), "rw");
        audit.opened(&file, 0);
        file.on_read(3);
        file.on_written(5);
        audit.opened(&Audited::new(&who, b"/data/x", "r"), libc::ENOENT);
        audit.closed(&file);
        audit.record(&who, Event::End);
        audit.flush();
        let lines = lines(&path);
        let events: Vec<_> = lines[1..].iter().map(|line| line["event"].as_str().unwrap()).collect();
        assert_eq!(events, ["connect", "open", "open", "close", "end"]);
        assert_eq!(lines[2]["path"], "/data/a\u{1b}[2J\nb");
        assert_eq!((lines[2]["errno"].as_i64(), lines[3]["errno"].as_i64()), (Some(0), Some(2)));
        assert_eq!((&lines[4]["read_bytes"], &lines[4]["written_bytes"]), (&3.into(), &5.into()));
        for line in &lines[1..] {
            assert_eq!((&line["address"], &line["name"]), (&"uid:7".into(), &"fio \"[1]\"\n".into()));
            assert_eq!(line["session"].as_str().map(str::len), Some(8));
        }
        assert_eq!(audit.counts(), [5, 0]);
    }

    #[test]
    fn what_the_queue_has_no_room_for_is_counted_where_it_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit");
        let audit = Audit::open(&AuditTarget::File(path.clone()), WhenFull::Lose).unwrap();
        let who = who();
        for _ in 0..QUEUE_RECORDS + 7 {
            audit.record(&who, Event::Connect);
        }
        assert!(!audit.holds_back_opens());
        assert_eq!(audit.counts(), [0, 7]);
        audit.start(|| {}).unwrap();
        audit.flush();
        audit.record(&who, Event::End);
        audit.flush();
        let lines = lines(&path);
        let lost: Vec<_> = lines.iter().filter(|line| line["event"] == "lost").collect();
        assert_eq!(lost.len(), 1);
        assert_eq!(lost[0]["records"], 7);
        assert_eq!(lines.len(), QUEUE_RECORDS + 2);
        assert_eq!(lines.last().unwrap()["event"], "end");
    }

    #[test]
    fn opens_wait_while_the_queue_is_half_full_and_are_woken() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit");
        let audit = Audit::open(&AuditTarget::File(path), WhenFull::Wait).unwrap();
        let who = who();
        for _ in 0..QUEUE_RECORDS / 2 {
            assert!(!audit.holds_back_opens());
            audit.record(&who, Event::Connect);
        }
        assert!(audit.holds_back_opens());
        let (sender, woken) = sync_channel(1);
        audit.start(move || sender.send(()).unwrap()).unwrap();
        woken.recv_timeout(Duration::from_secs(10)).unwrap();
        audit.flush();
        assert!(!audit.holds_back_opens());
    }

    #[test]
    fn a_file_that_was_moved_away_is_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let [path, moved] = ["audit", "audit.1"].map(|name| directory.path().join(name));
        let audit = Audit::open(&AuditTarget::File(path.clone()), WhenFull::Lose).unwrap();
        audit.start(|| {}).unwrap();
        audit.record(&who(), Event::Connect);
        audit.flush();
        std::fs::rename(&path, &moved).unwrap();
        audit.record(&who(), Event::Connect);
        audit.reopen();
        audit.record(&who(), Event::End);
        audit.flush();
        assert_eq!((lines(&moved).len(), lines(&path).len()), (2, 1));
    }

    #[test]
    fn journald_gets_a_message_for_each_record() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let out = Out::Journald(ours.into());
        let lines = b"{\"a\":1}\n{\"b\":2}\n";
        let first = out.write(lines).unwrap();
        assert_eq!(out.write(&lines[first..]).unwrap(), lines.len() - first);
        let mut message = [0; 100];
        for expected in ["{\"a\":1}", "{\"b\":2}"] {
            let n = theirs.recv(&mut message).unwrap();
            let text = std::str::from_utf8(&message[..n]).unwrap();
            let expected = format!("PRIORITY=5\nSYSLOG_IDENTIFIER=raio_server\nMESSAGE={expected}\n");
            assert_eq!(text, expected);
        }
    }
}
