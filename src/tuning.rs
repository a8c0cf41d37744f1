//! The message layer's constants that were chosen and not derived, each with its unit and why it is what it
//! is. Where a measurement chose it, that is said; docs/PERFORMANCE.md has what did not pay. Limits that the
//! protocol sets are with the protocol.

use std::time::Duration;

// The client's half, on every transport
// ----------------------------------------------------------------------------------------------------------

/// A request for at least this many bytes of data is large: that data is read straight into place, while less
/// is read ahead in one call with what follows, and copied.
pub(crate) const LARGE_BYTES: usize = 16 << 10;
/// Bytes of sent headers after which they are dropped from the front of those that wait, if these never
/// drain. Large, so that few bytes are moved for many sent.
pub(crate) const CLIENT_SENT_HEAD_BYTES_MAX: usize = 64 << 10;
/// Pongs that wait to be sent. A server that pings on without taking them is stalled: one that lives has few
/// pings on their way.
pub(crate) const CLIENT_PONGS_MAX: usize = 64;

// The client over TCP
// ----------------------------------------------------------------------------------------------------------

/// Bytes for what arrives: a burst of 32 responses with 4 KiB each fits, and it stays within a core's own
/// cache.
pub(crate) const TCP_STAGING_BYTES: usize = 192 << 10;
/// Bytes read ahead while most of what is awaited is large: enough for headers, little to copy.
pub(crate) const TCP_READ_AHEAD_BYTES: usize = 1 << 10;
/// Data of which at least this many bytes are still to come is read straight into the caller's buffers: all
/// that is large, less what was read ahead.
pub(crate) const TCP_DIRECT_BYTES: usize = LARGE_BYTES / 2;
/// Pieces of memory in one system call, of the 1,024 that the kernel takes: 32 writes with their headers.
pub(crate) const TCP_CLIENT_SLICES_MAX: usize = 64;
/// Reads in one call, so that a server that sends without end does not keep its client from coming back.
pub(crate) const TCP_CLIENT_READS_MAX: usize = 64;

// The client over RDMA
// ----------------------------------------------------------------------------------------------------------

/// The queue depth, in requests, of a client that leaves it to the server: a queue pair is made before the
/// server has granted anything.
pub(crate) const RDMA_DEPTH_DEFAULT: u32 = 1024;
/// The least bytes of room for requests that are being sent: a few inline writes.
pub(crate) const RDMA_SEND_BYTES_MIN: usize = 64 << 10;
/// The most bytes of room for requests that are being sent: what does not fit waits in the queue.
pub(crate) const RDMA_SEND_BYTES_MAX: usize = 256 << 10;
/// The most bytes of data that are sent inline, and so copied, whatever the server would take.
pub(crate) const RDMA_INLINE_BYTES_MAX: usize = 16 << 10;
/// The least bytes that are registered at a time for bounce slots: a registration is a system call.
pub(crate) const RDMA_BOUNCE_BYTES_MIN: usize = 1 << 20;
/// While a client polls without ever waiting, it looks at its descriptors this often: a system call each,
/// against how late the end of a connection is noticed.
pub(crate) const RDMA_DESCRIPTORS_EVERY: Duration = Duration::from_millis(2);
/// While there is no room to send, it is looked for this often: what makes room is not announced.
pub(crate) const RDMA_ROOM_EVERY: Duration = Duration::from_millis(1);
/// How long the first try to connect takes, doubled for each further one: rdma_cm itself sends a lost
/// datagram again only after four seconds.
pub(crate) const RDMA_CONNECT_TIME: Duration = Duration::from_millis(1500);
/// The server may take this part of the time that is left to answer over a queue pair that was just made. One
/// second, whatever time was left, was too little for a server on a machine with a load of 15; and there must
/// be enough left to connect anew.
pub(crate) const RDMA_PROOF_PART: u32 = 4;
/// When the TCP connection of a queue pair has ended, what is still on its way by the queue pair may take
/// this long: it may say why.
pub(crate) const RDMA_COMPANION_GRACE: Duration = Duration::from_millis(100);
/// How long a GOAWAY by RDMA may take before the queue pair is destroyed all the same.
pub(crate) const RDMA_GOAWAY_TIME: Duration = Duration::from_millis(100);

// The server's half, on every transport
// ----------------------------------------------------------------------------------------------------------

/// How long a closed connection is kept for its peer to read the goaway: a round trip to anywhere, and a
/// retransmission.
pub(crate) const LINGER: Duration = Duration::from_secs(1);
/// A peer that keeps silent for so many of the intervals in which it promised to say something has failed.
/// More than one, so that one late message is no death sentence.
pub(crate) const KEEPALIVES_MISSED_MAX: u8 = 3;
/// Messages beyond one for each credit that a connection whose messages come whole has room for: pings,
/// pongs and a goaway.
pub(crate) const CONTROL_MESSAGES: usize = 8;

/// Bytes of a request's data that are still to come, from which on they are received straight into their
/// slot; fewer come with what follows them, which saves a receive and costs a short copy.
pub(crate) const DIRECT_BYTES_MIN: usize = 32 << 10;
/// Bytes: a connection whose unsent answers hold more than this is not read from.
pub(crate) const UNSENT_BYTES_MAX: usize = 1 << 20;
/// Bytes that a peer must move within the stall timeout on a message it has begun, or on its answers...
pub(crate) const PROGRESS_BYTES_MIN: u64 = 4096;
/// ... and what part it is, at least, of the memory that they hold: one that trickles gives it back within so
/// many timeouts.
pub(crate) const PROGRESS_PART: u64 = 8;
/// Bytes of a receive at most: what has come must be kept if it has to wait for a slot.
pub(crate) const SMALL_RECEIVE_BYTES: u32 = 8 << 10;
/// Bytes of a receive for a connection whose receives come full...
pub(crate) const LARGE_RECEIVE_BYTES: u32 = 64 << 10;
/// ... until so many in a row have not...
pub(crate) const LARGE_RECEIVE_FOR: u8 = 8;
/// ... if it is one of so many of a worker's. What waits so has a bound: 4 MiB, and the small ones of all
/// connections.
pub(crate) const LARGE_RECEIVES_MAX: usize = 64;
/// Bytes of heap that each connection may cause in any case: what it has received, some small messages and
/// one long one.
pub(crate) const HEAP_BASE: usize = 14 << 10;
/// ... and of that, messages that need not ask for more.
pub(crate) const HEAP_MESSAGES: usize = 2 << 10;
/// Once half of what all may cause together is used, a connection may cause this part of what is left.
pub(crate) const HEAP_PART: usize = 8;
/// Bytes of heap that a request takes until it is answered, here and in the server, without its body.
pub(crate) const REQUEST_HEAP: usize = 512;
/// Bytes: longer bodies count by themselves, for the server keeps what they say.
pub(crate) const BODY_COUNTED_MIN: u16 = 128;
/// Bytes of heap that a response without data, or a pong, takes until it is sent: its own 40, in a vector
/// that doubles.
pub(crate) const SMALL_RESPONSE_HEAP: usize = 2 * 40;
/// Finished batches that a worker keeps for reuse.
pub(crate) const SPARE_BATCHES: usize = 64;

// The server over RDMA
// ----------------------------------------------------------------------------------------------------------

/// A connection's share of an iteration, in completions.
pub(crate) const QUEUE_COMPLETIONS_MAX: usize = 64;
/// Bytes for messages that are being sent, for each connection of a server; most have 40.
pub(crate) const SEND_RING_BYTES: usize = 64 << 10;
/// How long nothing may show that a peer is there before it is probed: an idle connection does not notice
/// that its peer is gone.
pub(crate) const PROBE_EVERY: Duration = Duration::from_secs(10);
/// Work requests that a queue pair must hold to be of use.
pub(crate) const WORK_REQUESTS_MIN: usize = 16;
