//! The constants that were chosen rather than given: each with its unit, its reason, and the measurement that
//! chose it (rows of docs/PERFORMANCE.md), or that none did.

/// Defaults and bounds of options.
pub mod options {
    /// Requests of `--queue-depth`. 4 KiB read: beyond depth 128 no client gains anything (depth 128: 655,916
    /// operations a second, depth 256: 631,198).
    pub const QUEUE_DEPTH_DEFAULT: u32 = 128;
    /// Bytes of `--io-max`. A read of 1 MiB moves fewer bytes a second than eight of 128 KiB; larger
    /// requests would only hold more memory.
    pub const IO_BYTES_DEFAULT: u64 = 1 << 20;
    /// ... and its least: a block.
    pub const IO_BYTES_MIN: u64 = 4 << 10;
    /// ... and its most. Not measured: a response holds that much memory until it is taken.
    pub const IO_BYTES_MAX: u64 = 256 << 20;
    /// Bytes that `--memory` is by default made of: buffers for data. Not measured: 1,000 requests of 128
    /// KiB, and little on any machine of today ...
    pub const ARENAS_BYTES_DEFAULT: u64 = 128 << 20;
    /// ... what messages take beside it ...
    pub const HEAP_BYTES_DEFAULT: u64 = 32 << 20;
    /// ... but for each worker at least this: its 64 large receives ...
    pub const HEAP_BYTES_DEFAULT_PER_WORKER: u64 = 4 << 20;
    /// ... and this number of sessions with a connection and a file. Not measured: tests/e2e/tests/scale.rs
    /// opens as many.
    pub const SESSIONS_DEFAULT: usize = 32_768;
    /// Microseconds of `--spin-us`: a round trip over a local network and a read of the page cache. 4 KiB
    /// read, depth 1, without it: a fifth of the operations.
    pub const SPIN_US_DEFAULT: u64 = 50;
    /// ... and its most: a second is for ever.
    pub const SPIN_US_MAX: u64 = 1_000_000;
    /// Workers at most. Not measured: more cores than any machine has for one program.
    pub const WORKERS_MAX: usize = 1024;
    /// Seconds of `--stall-timeout`. Not measured: a client that lives moves 4 KiB in it over any network,
    /// and others wait no longer than a person would.
    pub const STALL_TIMEOUT_DEFAULT: u64 = 2;
    /// ... and its most: a day.
    pub const STALL_TIMEOUT_MAX: u64 = 86_400;
    /// Seconds of `--linger`: as long as a client tries to connect again (60 s), and 30 s because the server
    /// may have noticed before it that the connection has broken. Not measured.
    pub const LINGER_DEFAULT: u64 = 90;
    /// ... and its most: a day.
    pub const LINGER_MAX: u64 = 86_400;
    /// Sessions of `--max-sessions` at most: more than a process can have open files.
    pub const SESSIONS_MAX: usize = 1 << 24;
}

/// Shares of a worker's arena, which nobody's need exceeds: dynamic thresholds shrink them as it fills.
pub mod memory {
    /// A connection's quota is one part in so many of the arena. Not measured: eight connections may fill an
    /// arena, and one alone has enough for the bandwidth-delay product of its network.
    pub const QUOTA_PART: usize = 8;
    /// One part in so many is in reserve for small requests of connections that hold little. Not measured:
    /// tests/e2e/tests/fairness.rs shows that it suffices.
    pub const RESERVE_PART: usize = 8;
    /// While others wait, and half of the arena is in use, a session or an address may have one part in so
    /// many. Not measured: four sessions may fill an arena, however many connections each has.
    pub const GROUP_PART: usize = 4;
    /// Bytes that a connection may hold whatever the others hold and wait for, as long as there are any. As
    /// much as an iteration gives out, so that nobody who asks for little waits for another's large requests.
    pub const SMALL_BYTES: usize = 256 << 10;
    /// ... but not more than one part in so many of what is free: the more hold something, the less each
    /// gets, and some is left for the next. Not measured.
    pub const SMALL_PART: usize = 16;
    /// Bytes that an iteration gives out: they are worked on while they are in the core's own cache, and a
    /// request for little does not wait behind many for much. A request for more has an iteration for itself.
    /// 128 KiB read, depth 32: 33,658 operations a second with it, 27,676 without a bound.
    pub const ITERATION_BYTES_MAX: usize = 256 << 10;
}

/// Reads that the page cache answers on arrival.
pub mod fast_path {
    /// Bytes of the largest. 16 KiB read, depth 32: 267,277 operations a second against 256,745; beyond, to
    /// have several reads copied into one batch costs what it saves.
    pub const BYTES_MAX: u32 = 16 << 10;
    /// After each so many bytes of an iteration the connections of which nothing has left in it may send what
    /// they have, so that a busy-polling client works on that while the others are read. 4 KiB read, depth
    /// 32: 637,000 operations a second against 592,000.
    pub const FLUSH_BYTES: usize = 32 << 10;
}

/// O_DIRECT requests at a device that coalesces completions: see [`crate::device_queue`].
pub mod device {
    /// Requests that end together from which on a device is taken to coalesce completions: fewer may have
    /// ended together by chance. Not measured by itself.
    pub const TOGETHER_MIN: usize = 8;
    /// So many requests go to the kernel with one system call: the device starts on the first while the
    /// kernel takes in the others. 4 KiB read, depth 32, O_DIRECT: 77,408 operations a second against
    /// 63,854, with the limit on dispatch.
    pub const SUBMIT_BATCH: usize = 2;
}

/// How a worker ends.
pub mod drain {
    use std::time::Duration;

    /// After it was told to stop, a worker takes new requests for this time: those that were on their way. A
    /// hundred round trips of a slow local network. Not measured. A connection whose first request comes
    /// later has this time from then on: libraio does not repeat what it asks first to begin a context ...
    pub const GRACE: Duration = Duration::from_millis(100);
    /// ... and for its first request this time from its hello, for clients on machines that are busy.
    pub const GRACE_OF_SILENT: Duration = Duration::from_secs(1);
    /// From then on connections without requests are closed once nothing arrives any more, or after so long.
    /// Not measured: a client that goes on sending is told with an error from then on.
    pub const QUIESCE_TIMEOUT: Duration = Duration::from_secs(1);
    /// How long a drained worker waits for the hosts of its peers to have their goaways (over RDMA for the
    /// peers to read them and close), and for the hellos of connections that were accepted: longer than a
    /// connection lingers for that. Not measured.
    pub const GOAWAY_TIMEOUT: Duration = Duration::from_millis(1500);
    /// How often it asks whether they have: about as often as a local network can have changed that. Not
    /// measured.
    pub const DELIVERY_CHECK: Duration = Duration::from_millis(10);
}

/// An export's lanes in the pool of threads: [`crate::engine::Lanes`]. Several, so that flushes that hang
/// stop neither its opens nor its reads, and leases not the opens of other files. In jobs at a time; not
/// measured: tests/e2e/tests/blocking.rs shows that what hangs in one holds up no other.
pub mod lanes {
    /// Opens and questions about files.
    pub const CONTROL_WIDTH: usize = 8;
    /// Opens that wait for the holder of a lease, which takes up to the kernel's lease-break-time (45 s).
    pub const LEASE_WIDTH: usize = 4;
    /// Flushes, and changes of files' allocation.
    pub const FLUSH_WIDTH: usize = 8;
    /// Copies and checksums: as many as keep a disk busy, and no more, for they take a processor each.
    pub const RANGE_WIDTH: usize = 4;
    /// Reads and writes: enough to keep a disk busy that serves several requests at a time.
    pub const DATA_WIDTH: usize = 16;
    /// Writes to the page cache that are handed over together at most, so that one of them is found soon when
    /// it is cancelled. That an iteration's writes are one batch is measured (to hand over each by itself
    /// costs more than to do it), the number is not.
    pub const WRITE_BATCH: usize = 64;
}

/// Reads of the page cache, by workers.
pub mod cached_reads {
    use std::time::Duration;

    /// A read of memory that takes so long has waited, most likely for what was swapped out: a thousand times
    /// what it takes else. After two of them ...
    pub const WAITED: Duration = Duration::from_millis(1);
    /// ... the lane reads for so many times as long as the second took: that is one per cent of a worker's
    /// time for such reads. Not measured.
    pub const PAUSE: u32 = 100;
    /// So many requests of an export at most are with its disk because of workers, and those of one read
    /// more: half of the fewest that a disk takes (`nr_requests`: 32), beyond which whoever asks waits.
    pub const MISSES_MAX: usize = 16;
    /// Bytes of one of them: a longer read is several. The kernel's default for readahead.
    pub const MISS_BYTES: usize = 128 << 10;
    /// Of a file with more holes the extents behind them are not loaded when it is opened: each takes a
    /// system call of a few microseconds, and an open is not to take longer than half a second. Not measured.
    pub const HOLES_MAX: usize = 100_000;
}

/// Opening files, and changing their allocation.
pub mod files {
    /// How often a lookup is tried again when the kernel cannot tell whether a rename led it out of the
    /// export. A client that renames without end can make lookups fail, and nothing else. Not measured.
    pub const LOOKUP_RETRIES_MAX: u32 = 32;
    /// How often a file may vanish and appear between its lookup and its creation, or be a symbolic link to
    /// one that is not there: as many links as the kernel follows. Not measured.
    pub const CREATIONS_MAX: u32 = 40;
    /// Bytes. The alignment for O_DIRECT where nobody says what it is: enough for every disk.
    pub const DIRECT_ALIGN_DEFAULT: u32 = 4096;
    /// Bytes that one call discards, zeroes or allocates at most, so that others of its lane have their turns
    /// and it can be cancelled: 64 ms of a disk that writes 1 GB/s. Not measured.
    pub const PIECE_BYTES: u64 = 64 << 20;
}

/// Copies and checksums within the server. None is measured.
pub mod ranges {
    /// Bytes that one call copies, or takes into a checksum, at most, so that others of its lane have their
    /// turns and it can be cancelled: 8 ms of a disk that reads 1 GB/s. A file system that shares storage
    /// does such a piece in some tens of microseconds.
    pub const PIECE_BYTES: u64 = 8 << 20;
    /// What is read at once, in bytes: it stays in a processor's cache until it is used.
    pub const BUFFER_BYTES: usize = 256 << 10;
}

/// The pool of threads.
pub mod pool {
    use std::time::Duration;

    /// A thread without work ends after this long. Not measured: it costs some tens of KiB while it waits.
    pub const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
    /// After a thread could not be started the next try comes this much later. Not measured: jobs wait for
    /// the threads that there are meanwhile.
    pub const START_RETRY: Duration = Duration::from_millis(100);
    /// A lane whose turn it is, and for which no thread could be started for this long, rejects the jobs that
    /// wait in it: as long as others' retries go on before anybody looks into it. Not measured.
    pub const START_TIMEOUT: Duration = Duration::from_secs(5);
}

/// Channels, and the connections that take the place of broken ones. None is measured.
pub mod channels {
    use std::time::Duration;

    /// Bytes that a channel without a connection takes, what it has recorded not counted: rounded up from its
    /// structs and its part of a session's.
    pub const PARKED_BYTES: usize = 1 << 10;
    /// The memory for connections and files, divided by this, is for such channels: half of the connections
    /// may break at the same time.
    pub const PARKED_PART: usize = 4;
    /// A connection that waits for so long until nothing of those before it can happen is worth a line in the
    /// log.
    pub const FENCE_LOGGED_AFTER: Duration = Duration::from_secs(5);
    /// A look at all connections that wait costs a worker time: not more often than this.
    pub const FENCES_CHECKED_EVERY: Duration = Duration::from_secs(1);
    /// Sessions that an administrator has ended, and whose clients are told so when they connect again. Each
    /// hello is compared with all of them.
    pub const KILLED_MAX: usize = 256;
}

/// Requests that take long: [`crate::worker::SlowRequest`].
pub mod slow {
    /// Milliseconds: longer than any disk that works, and than what a client would wait for without a word.
    pub const DEFAULT_MS: u64 = 100;
    /// The latest of them that a worker keeps, 200 bytes each.
    pub const KEPT: usize = 64;
}

/// What sessions, connections and files take, and what is in reserve: [`crate::limits`].
pub mod limits {
    /// Permits beyond the ordinary ones, for those who have few; descriptors must be left for them. Not
    /// measured: an operator with a handful of programs gets in when all ordinary places are taken.
    pub const RESERVE: usize = 64;
    /// So many of them for sessions, whatever address they come from.
    pub const SESSION_RESERVE: usize = RESERVE / 2;
    /// Bytes that a connection may take of the memory that is for connections: its structs, 2 KiB with its
    /// session's, and the heap that its messages may cause in any case
    /// ([`raio_transport::tcp::TcpServer::set_heap_max`]). tests/e2e/tests/scale.rs holds idle sessions to
    /// less.
    pub const CONNECTION_BYTES: usize = 16 << 10;
    /// Bytes that an open file takes, rounded up from its structs ...
    pub const FILE_BYTES: usize = 512;
    /// ... and that each worker takes which has used it.
    pub const FILE_BYTES_PER_WORKER: usize = 256;
    /// One part in so many of the memory for permits is not for queue pairs of an address that has more than
    /// is left. Not measured.
    pub const QUEUE_PAIR_RESERVE_PART: usize = 8;
}

/// Changes while the server runs: [`crate::reload`]. None is measured.
pub mod reload {
    use std::time::Duration;

    /// How many exports with other names there may be in the life of a server beside those of its start.
    /// Each worker has 16 bytes for each of them, and more once there is the export.
    pub const PLACES_FREE: usize = 1024;
    /// How long a change waits until all is closed that clients had open of an export which has gone, before
    /// it says that something is still open.
    pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);
    /// How often it looks.
    pub const CLOSE_CHECK: Duration = Duration::from_millis(2);
}

/// Rates of clients and exports: [`crate::throttle`]. None is measured.
pub mod throttle {
    use std::time::Duration;

    /// For how long an unused rate may be caught up with, if the configuration does not say: a twentieth of a
    /// second, so that the first second is within a tenth of the rate ...
    pub const BURST_DEFAULT: Duration = Duration::from_millis(50);
    /// ... and its least: workers wake up late by some milliseconds, which must be caught up with ...
    pub const BURST_MIN: Duration = Duration::from_millis(10);
    /// ... and its most.
    pub const BURST_MAX: Duration = Duration::from_secs(3600);
    /// Operations a second at most: less than 100 ns for each cannot be told exactly in nanoseconds.
    pub const IOPS_MAX: u64 = 10_000_000;
    /// Bytes a second at least: a request of `--io-max` (1 MiB) takes a quarter of a minute then.
    pub const BANDWIDTH_MIN: u64 = 64 << 10;
    /// The largest weight.
    pub const WEIGHT_MAX: u32 = 10_000;
    /// A request that must wait is not looked at before: so often a worker wakes up for it at most.
    pub const RETRY_AFTER: Duration = Duration::from_millis(1);
    /// A client may be ahead of others on the same export by its share of what the export does in this time:
    /// half a per cent of a second, and more than it takes the others' workers to wake up.
    pub const LEAD: Duration = Duration::from_millis(5);
    /// A client that was to ask again, and is late by this time, does not count as waiting any more.
    pub const FORGOTTEN_AFTER: Duration = Duration::from_millis(20);
}

/// What is stored beneath a directory: [`crate::stored`]. None is measured.
pub mod stored {
    use std::time::Duration;

    /// How often it is counted anew at most, for what others than clients have changed ...
    pub const COUNTED_EVERY: Duration = Duration::from_secs(600);
    /// ... and counting never takes more than this part of the time (1 / 100).
    pub const COUNTING_PART: u32 = 100;
    /// How many directories deep: each takes a descriptor while what is beneath it is counted.
    pub const DEPTH_MAX: usize = 128;
}

/// Files that the kernel has in memory: [`crate::cached`]. None is measured.
pub mod cached_files {
    /// Mounts that a worker knows. Exports are on fewer, as a rule.
    pub const MOUNTS_MAX: usize = 64;
    /// The largest file that a worker closes itself, in blocks of 512 bytes: 1 MiB. It may be the last to
    /// have it, and then frees these blocks.
    pub const CLOSED_BLOCKS_MAX: u64 = 2048;
    /// Extents that an inode holds itself: those of ext4. XFS has more.
    pub const INODE_EXTENTS: u64 = 4;
    /// The most that is read of a file at once, in bytes.
    pub const BYTES_MAX: u64 = 16 << 10;
    /// What a status counts for as a part of what an iteration does: it takes as long as a read of this many
    /// bytes.
    pub const STATUS_BYTES: usize = 4 << 10;
    /// The same of an open.
    pub const OPEN_BYTES: usize = 16 << 10;
}

/// Listings: [`crate::listing`].
pub mod listings {
    /// Of a session. A client lists a directory by one at a time.
    pub const SESSION_MAX: usize = 16;
    /// What is read of a directory at a time. Not measured.
    pub const BUFFER_BYTES: usize = 32 << 10;
    /// The least room of a page: the longest entry, and something to spare.
    pub const PAGE_BYTES_MIN: u32 = 512;
}

/// The log and the statistics. None is measured: the log is on no path of a request.
pub mod log {
    use std::time::Duration;

    /// Lines that wait to be written, at most: 2 MiB if all are as long as they may be.
    pub const QUEUE_LINES: usize = 512;
    /// Bytes. Longer lines are cut: few paths are that long.
    pub const LINE_BYTES_MAX: usize = 4096;
    /// What is queued when the server ends is waited for so long: a terminal takes it, a full pipe does not.
    pub const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);
    /// How often it is seen whether the rate limit has something to report: an idle thread wakes up for it.
    pub const RATE_LIMIT_PERIOD: Duration = Duration::from_secs(1);
    /// The while in which the rate limit counts lines.
    pub const RATE_LIMIT_WINDOW: Duration = Duration::from_secs(10);
    /// Lines of a kind about an address in a window: enough to see what happens, and that it goes on.
    pub const RATE_LIMIT_LINES: u32 = 10;
    /// Addresses and kinds that are told apart at a time; the others share: a bound on its memory.
    pub const RATE_LIMIT_KEYS: usize = 1024;
}

/// The audit log. None is measured: a record takes its thread about a microsecond.
pub mod audit {
    use std::time::Duration;

    /// Records that wait to be written: a crowd that comes back after a restart, and the files that it opens.
    pub const QUEUE_RECORDS: usize = 8 << 10;
    /// Lines are written together up to this size.
    pub const BATCH_BYTES: usize = 64 << 10;
    /// After a write has failed (most often: the disk is full) the next comes this much later.
    pub const RETRY: Duration = Duration::from_millis(200);
    /// How long the end of the process waits for what is queued.
    pub const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
}

/// Handshakes of clients that must have keys. None is measured.
pub mod acceptor {
    use std::time::Duration;

    /// A handshake takes two round trips, and a millisecond.
    pub const DEADLINE: Duration = Duration::from_secs(5);
    /// Connections in their handshake.
    pub const HANDSHAKES_MAX: usize = 256;
}

/// The main thread. None is measured: it is on no path of a request.
pub mod main_thread {
    use std::time::Duration;

    /// Whether a key has expired is looked at this often, at least: the clock may be set.
    pub const EXPIRY_CHECK: Duration = Duration::from_secs(60);
    /// After an accept failed (most often: no descriptors are left) the next comes this much later.
    pub const ACCEPT_RETRY: Duration = Duration::from_millis(100);
    /// How long an address that is taken is waited for: a server that is replaced needs some time to end ...
    pub const BIND_TIMEOUT: Duration = Duration::from_secs(2);
    /// ... and how often it is tried.
    pub const BIND_RETRY: Duration = Duration::from_millis(20);
    /// A worker that takes none of the connections that wait for it for this long is stuck: others get them.
    /// tests/e2e/tests/placement.rs.
    pub const STUCK_AFTER: Duration = Duration::from_millis(100);
    /// When the server is told to stop, requests in flight have this time to finish: less than the service
    /// manager waits before it kills (90 s).
    pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
    /// Before that, connections that were accepted have this time for their TLS handshakes. A client needs
    /// two round trips; one that says nothing delays the end by this time.
    pub const ENTRY_TIMEOUT: Duration = Duration::from_secs(1);
    /// How much longer than the workers the main thread waits: for them to notice the deadline.
    pub const DRAIN_SLACK: Duration = Duration::from_secs(1);
    /// Descriptors for listeners, rings, exports and devices, and for the reserve of [`super::limits`];
    /// generous.
    pub const DESCRIPTORS_OWN: usize = 256;
}

/// The hand-over to a successor ([`crate::hand_over`]). None is measured: no client waits for any of it.
pub mod hand_over {
    use std::time::Duration;

    /// Successors that may wait for another one.
    pub const BACKLOG: i32 = 8;
    /// How often a successor tries that finds no room there.
    pub const CONNECT_RETRY: Duration = Duration::from_millis(20);
    /// How long a successor waits for each answer: it may have to wait for another one that says nothing.
    pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
    /// Who has connected to a running server asks for its sockets at once ...
    pub const ASK_TIMEOUT: Duration = Duration::from_secs(2);
    /// ... and has it end when exports are open and keys are read, which a slow file system may delay.
    pub const END_TIMEOUT: Duration = Duration::from_secs(30);
    /// Bytes of a message: as many URLs as there may be, of Unix sockets with the longest paths.
    pub const MESSAGE_BYTES_MAX: usize = 128 << 10;
}

/// What is recorded of requests.
pub mod statistics {
    /// Sampling interval, in reads or writes: the latency of one in 16 is measured. Reading the clock twice
    /// costs 150 instructions, 3 % of a 4 KiB read at depth 1.
    pub const MEASURED_EVERY: u32 = 16;
    /// Requests of an iteration whose latency counts for their sessions: those that it takes in and answers.
    /// As many as one that reads 256 KiB in small pieces; beyond that the statistics alone have them.
    pub const MEASURED_MAX: usize = 64;
    /// Publishing interval of the gauges of a busy worker, in iterations; it also publishes them before it
    /// sleeps. Publishing costs 100 instructions, and gauges need not be exact to the microsecond.
    pub const PUBLISHED_EVERY: u32 = 16;
    /// Clients that are shown with what they have done: those with most requests. Not measured: as many as a
    /// person may want to see.
    pub const CLIENTS_SHOWN: usize = 100;
    /// Records of a worker's trace, of 40 bytes each: about 20,000 requests. Not measured.
    pub const TRACE_RECORDS: usize = 1 << 16;
    /// How long the end of the process waits for the trace to be written, for a file system may hang. Not
    /// measured.
    pub const TRACE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);
}

/// The state directory. None is measured: it is read when the server starts, and written when writes are
/// lost.
pub mod state {
    use std::time::Duration;

    /// Bytes of a file of it, at most: a server with some thousand exports.
    pub const FILE_BYTES_MAX: u64 = 4 << 20;
    /// Files of a kind, at most: more servers and exports than any machine has.
    pub const FILES_MAX: usize = 10_000;
    /// How often a server that waits for another one looks whether that has ended ...
    pub const CLAIM_RETRY: Duration = Duration::from_millis(20);
    /// ... and after how long it says for what it waits.
    pub const CLAIM_SAY_AFTER: Duration = Duration::from_secs(1);
}

/// What does not go on: [`crate::stalled`]. None is measured: they are for people.
pub mod stalled {
    use std::time::Duration;

    /// A worker that has not finished an iteration for this time: a thousand times as long as it takes.
    pub const WORKER_AFTER: Duration = Duration::from_secs(1);
    /// A lane whose oldest job has not ended: longer than a disk that retries a sector.
    pub const LANE_AFTER: Duration = Duration::from_secs(5);
    /// The same where opens wait for the holder of a lease: the kernel takes it away after 45 s.
    pub const LEASE_AFTER: Duration = Duration::from_secs(50);
    /// Requests that have waited for memory, at each look.
    pub const SLOTS_AFTER: Duration = Duration::from_secs(5);
}

/// What administrators ask for: [`crate::control`].
pub mod control {
    use std::time::Duration;

    /// Sessions that are listed under one lock: some 25 µs.
    pub const SESSIONS_AT_A_TIME: usize = 256;
    /// How long a worker has to answer: a thousand of its iterations.
    pub const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);
    /// How soon it is looked again whether a worker that was woken has gone on. Most have by the first time.
    pub const LOOK_INTERVAL: Duration = Duration::from_millis(2);
    /// Records of a trace that are written as one part of it: 1 MB.
    pub const TRACE_PART: usize = 8192;
    /// The longest that a trace lasts, in seconds: later records are over earlier ones long before.
    pub const TRACE_SECONDS_MAX: u64 = 60;
}

/// The HTTP server ([`crate::http`]). None is measured: it is on no path of a request of raio.
pub mod http {
    use std::time::Duration;

    /// Connections over TCP at a time: a few scrapers and browsers. One more takes the place of the one that
    /// has waited longest ...
    pub const CONNECTIONS_MAX: usize = 64;
    /// ... and over the admin socket, whom the others cannot keep out.
    pub const ADMIN_CONNECTIONS_MAX: usize = 16;
    /// Of those over TCP, the ones that are sent events, which stay for long.
    pub const STREAMS_MAX: usize = 16;
    /// Bytes of a request, with its headers: what other servers take, too.
    pub const HEAD_BYTES_MAX: usize = 8 << 10;
    /// A request has come completely in this time after its first byte ...
    pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
    /// ... or the next one in this after a response: longer than scrapers usually wait, a minute.
    pub const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
    /// A client takes something of a response within this.
    pub const SEND_TIMEOUT: Duration = Duration::from_secs(10);
    /// After the last response a client has this time to close the connection. With data unread the kernel
    /// would reset it, and the client might not see the response.
    pub const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
    /// Characters of the token, at least: nobody guesses 16 over a network.
    pub const TOKEN_BYTES_MIN: usize = 16;
    /// Bytes that are read of its file.
    pub const TOKEN_FILE_BYTES_MAX: u64 = 4096;
    /// How often the main thread shows that it goes on ...
    pub const BEAT: Duration = Duration::from_secs(1);
    /// ... and after how long without that it is said to be stuck.
    pub const BEAT_TIMEOUT: Duration = Duration::from_secs(10);
    /// How often events are sent.
    pub const EVENT_INTERVAL: Duration = Duration::from_secs(1);
    /// When to try again if no connection can be accepted, for there are no descriptors left.
    pub const ACCEPT_RETRY: Duration = Duration::from_millis(100);
}
