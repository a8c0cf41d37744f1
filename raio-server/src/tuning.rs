//! The constants that were chosen rather than given: each with its unit, its reason, and the measurement that
//! chose it (rows of docs/PERFORMANCE.md), or that none did.

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
    /// So many requests go to the kernel with one system call: the device starts on the first while the kernel
    /// takes in the others. 4 KiB read, depth 32, O_DIRECT: 77,408 operations a second against 63,854, with
    /// the limit on dispatch.
    pub const SUBMIT_BATCH: usize = 2;
}

/// How a worker ends.
pub mod drain {
    use std::time::Duration;

    /// After it was told to stop, a worker takes new requests for so long: those that were on their way. A
    /// hundred round trips of a slow local network.
    pub const GRACE: Duration = Duration::from_millis(100);
    /// From then on connections without requests are closed once nothing arrives any more, or after so long.
    pub const QUIESCE_TIMEOUT: Duration = Duration::from_secs(1);
    /// How long a drained worker waits for its peers to read their goaway and close.
    pub const GOAWAY_TIMEOUT: Duration = Duration::from_millis(1500);
}
