//! Every constant that was chosen rather than given: its unit, why it has this value, and the measurement
//! that chose it, where one did (docs/PERFORMANCE.md has the tables).

use std::time::Duration;

/// Operations: the most in one context. Bounds its table of operations, 200 bytes each, at 13 MB. The server
/// grants far fewer requests; the rest waits in the context. Not measured: a limit.
pub const MAXEVENTS_MAX: usize = 65_536;

/// Bytes: the least that is mapped at a time for lent buffers. One of the largest operations of a server with
/// the default `--io-max` fits. Not measured.
pub(crate) const LENT_BYTES_MIN: usize = 1 << 20;

/// Bytes: the longest read into a lent buffer. The memory of lent buffers is the library's, and stays mapped
/// as long as the context. Not measured: a limit.
pub(crate) const LENT_BYTES_MAX: u64 = 1 << 30;

/// Completions that a program may collect without having waited before it yields the core. A program for
/// which there is always an answer would keep it for a tick of the scheduler, 4 ms, while the answers of
/// others lie there. Measured with four fio jobs on one core, null, depth 32: p99 from 3,981 to 326 µs.
pub(crate) const BURST_MAX: u32 = 32;

/// How long a server has to answer that it has cancelled an operation whose timeout has passed, before the
/// operation ends without an answer. A round trip within a continent fits; what a program notices is that an
/// operation on a server that hangs ends later than it asked for by this time. Not measured.
pub(crate) const CANCEL_GRACE: Duration = Duration::from_millis(50);

/// Credits of a context for each of them that it spends on cancel requests for operations that have timed
/// out. Not measured.
pub(crate) const CANCELS_SHARE: usize = 4;

/// Operations in flight for which a wait may poll for once more its time, because a server answers many of
/// them together. Measured at depth 128 and 256, 4 KiB reads: IOPS × 1.03 and × 1.06.
pub(crate) const SPIN_EACH: usize = 32;

/// Times: the most by which polling before sleep is extended (see [`SPIN_EACH`]): 4 × 50 µs. More did not
/// pay: both sides polling for 500 µs brought × 1.02 at the price of a core.
pub(crate) const SPIN_MULTIPLIER_MAX: usize = 4;

/// Polls of the transport before a wait reads the clock and yields. Measured at depth 1, 4 KiB reads,
/// together with one poll fewer on the way of a request: IOPS × 1.06.
pub(crate) const POLLS_PER_YIELD: usize = 8;

/// Requests outstanding on a control connection: one that is waited for, and closes that nobody waits for.
/// Not measured; it is not on the data path.
pub(crate) const CONTROL_DEPTH: u32 = 8;

/// How soon a server must answer a ping if it has let another connection of the session time out. Far above
/// the round trips of any network, far below the 15 s that the first timeout took. Not measured.
pub(crate) const SUSPECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How soon a call that waits for the server notices that another thread has stopped the session. A wake-up
/// of each waiting thread 20 times a second costs nothing that shows. Not measured.
pub(crate) const STOP_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// Default of `connect_timeout`: two retransmissions of a SYN (1 s, 3 s) fit. Not measured.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Default of `reconnect`: a server's restart, and what a network takes to find another way. Not measured.
pub(crate) const RECONNECT_WINDOW: Duration = Duration::from_secs(60);

/// How much longer than a client may need to notice the loss of its connection and to give up a server keeps
/// its channel. Not measured.
pub(crate) const LINGER_EXTRA: Duration = Duration::from_secs(15);

/// What a client waits for a silent server unless it is told otherwise: three times the default keepalive.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// How long the end of a context waits for a session that is being resumed. Far above what that takes while
/// the server is there, far below the window. Not measured.
pub(crate) const RESUME_GRACE: Duration = Duration::from_secs(1);

/// Default of `call_timeout`: what a disk may need to spin up, or a server's file system to commit its
/// journal. Not measured.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Connections of a session for calls that wait for their I/O (`raio_pread`): as many calls run at the same
/// time, others wait for their turn. Few, as each takes a connection of the server's limit. Not measured.
pub(crate) const SYNC_CONTEXTS_MAX: usize = 8;

/// Requests outstanding on each of them: parts of a long read or write, so that the server works while data
/// is on its way. Not measured.
pub(crate) const SYNC_DEPTH: usize = 4;

/// Default of `spin`: how long a wait polls before it sleeps. As long as a round trip over a local network
/// and a read of the page cache take; the busy-polling itself adapts (`raio_transport::busy_poll`). Measured
/// at depth 1: without it IOPS are a fifth.
pub(crate) const SPIN: Duration = Duration::from_micros(50);

/// Times that a lock is tried that is held for some instructions, before it is taken for one that was held
/// when the process was forked. Not measured.
pub(crate) const LOCK_ATTEMPTS: usize = 10_000;

/// Destroyed handles that are kept before the oldest is reused, 16 to 64 bytes each: a stale pointer to a
/// context finds an empty handle for as many calls of raio_setup(). Not measured.
pub(crate) const HANDLE_QUARANTINE: usize = 1024;

/// Bytes of the message of a thread (`raio_errmsg`), with the zero at its end. The longest message of the
/// library has 300, and one of a server's at most 256. Not measured.
pub(crate) const MESSAGE_BYTES: usize = 1024;

/// Pings with which a new context that is traced compares the clocks: the first ones may find the server
/// asleep, and the one that is answered soonest counts. Not measured.
pub(crate) const CLOCK_PINGS: usize = 8;

/// Records in the trace of a context (`RAIO_TRACE`), 40 bytes each: the last 16,384 operations, 2.6 MB. A
/// viewer still opens the file of a few such contexts at once. Not measured.
pub(crate) const TRACE_RECORDS: usize = 65_536;

/// Bytes of the first page of a listing: a few hundred entries, as most directories have no more. Not
/// measured.
pub(crate) const FIRST_PAGE_BYTES: usize = 32 << 10;

/// Bytes of each further page. Not measured.
pub(crate) const PAGE_BYTES: usize = 256 << 10;

/// The longest value of an extended attribute, and the longest list of their names: Linux has no longer ones.
pub(crate) const XATTR_BYTES_MAX: usize = 64 << 10;
