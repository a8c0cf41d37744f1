//! The numbers that this program was tuned with: units, and why each has this value.

use std::time::Duration;

/// How long a server may take for a connection and the handshakes, for each of its addresses.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes: alignment of direct reads. That of every block device there is, and of a page.
pub const DIRECT_ALIGN: usize = 4096;

/// Bytes: runs of zeros of this length are not written to a new file. Four pages save little storage less,
/// and more would find fewer holes.
pub const ZERO_RUN_BYTES: usize = 16 << 10;

/// Bytes of a file's name that are kept in the name of a file beside it. File systems take 255, with what is
/// added.
pub const NAME_PART_BYTES: usize = 200;

/// How soon Ctrl-C is noticed by a thread that waits.
pub const STOP_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Bytes of a read or write of a transfer: the default of raio_server's `--io-max`.
pub const BLOCK_BYTES: u64 = 1 << 20;

/// Reads and writes that a lane of a transfer has in flight.
pub const DEPTH: usize = 8;

/// Bytes from which on a transfer has several lanes. Less is done before another connection is made.
pub const LANES_FROM_BYTES: u64 = 64 << 20;

/// The most lanes by default.
pub const LANES: usize = 4;

/// Bytes from which on a copy has a journal. Less is copied again in no time.
pub const JOURNAL_FROM_BYTES: u64 = 16 << 20;

/// Bytes up to which a file is read and written by one request (get and put): the default of raio_server's
/// `--io-max`.
pub const SMALL_FILE_BYTES: u64 = BLOCK_BYTES;

/// Requests for small files, links, directories and attributes that a thread of a copy of a tree has in
/// flight, and requests that a removal of a tree has: with 8 threads, 256 cost one round trip. A higher value
/// means more files to redo after an interruption.
pub const REQUESTS_IN_FLIGHT: usize = 32;

/// Bytes of small files in flight from which on a thread starts no other one.
pub const SMALL_BYTES_IN_FLIGHT: u64 = 8 << 20;

/// What a server copies from one of its files to another in one request: the progress is shown between two.
/// Not measured.
pub const WITHIN_SERVER_BYTES: u64 = 64 << 20;

/// Threads of a copy of a tree: directories that are listed, and large files that are copied, at a time.
pub const TREE_THREADS: u16 = 8;

/// Files of a directory that a thread takes at a time. Fewer would have threads wait for the queue, and more
/// would leave some idle at the end.
pub const FILES_PER_ITEM: usize = 16;

/// Of questions to a server's admin socket.
pub mod admin {
    use std::time::Duration;

    /// How long an answer may take. A server answers within some milliseconds, or its thread for that hangs.
    pub const TIMEOUT: Duration = Duration::from_secs(10);
    /// Bytes of an answer's head.
    pub const HEAD_BYTES_MAX: usize = 16 << 10;
    /// Bytes of an answer. A trace of 65,536 records has 10 MB, and each worker has one; 100,000 sessions
    /// take 50 MB.
    pub const ANSWER_BYTES_MAX: u64 = 1 << 30;
}
