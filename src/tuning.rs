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
