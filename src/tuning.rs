//! The message layer's constants that were chosen and not derived: each with its unit, its reason, and the
//! measurement that chose it (rows of docs/PERFORMANCE.md), or that none did. What the protocol or the kernel
//! sets is where it is used.

use std::time::Duration;

// The client's half, on every transport
// ----------------------------------------------------------------------------------------------------------

/// How long a client has received nothing before it looks, ahead of the first request of a batch, whether its
/// connection has ended: one system call, which a program that keeps busy does not make. A server needs more
/// time to be restarted. Not measured.
pub(crate) const CLIENT_IDLE_CHECK_AFTER: Duration = Duration::from_millis(1);

/// A request for at least this many bytes of data is large: that data is read straight into place, while less
/// is read ahead in one call with what follows, and copied. Not measured by itself: to copy 16 KiB costs
/// about as much as another system call.
pub(crate) const LARGE_BYTES: usize = 16 << 10;
/// Bytes of sent headers after which they are dropped from the front of those that wait, if these never
/// drain. Large, so that few bytes are moved for many sent. Not measured: a queue that drains never comes
/// here.
pub(crate) const CLIENT_SENT_HEAD_BYTES_MAX: usize = 64 << 10;
/// How often the data of a request may arrive damaged: it ends with EILSEQ then. Chance damages it once; what
/// damages it three times in a row is not chance, and would do so for ever. Not measured.
pub(crate) const DAMAGED_MAX: u8 = 3;
/// Pongs that wait to be sent. A server that pings on without taking them is stalled: one that lives has few
/// pings on their way. Not measured: a limit, not a speed.
pub(crate) const CLIENT_PONGS_MAX: usize = 64;
/// Pongs with the server's time of which the one that came soonest counts. Few, so that one from long ago is
/// forgotten: clocks drift. Not measured.
pub(crate) const CLOCK_SAMPLES: usize = 8;

// The client over TCP
// ----------------------------------------------------------------------------------------------------------

/// Bytes for what arrives: a burst of 32 responses with 4 KiB each fits, and it stays within a core's own
/// cache. Not measured.
pub(crate) const TCP_STAGING_BYTES: usize = 192 << 10;
/// Data that is sealed at a time, to be sent by TLS. More costs memory while a peer does not take it, less
/// costs system calls. Not measured.
pub(crate) const SEAL_BYTES_MAX: usize = 256 << 10;
/// The same while heap is short: a record.
pub(crate) const SEAL_BYTES_WHEN_SHORT: usize = 16 << 10;
/// Received at a time in a TLS handshake: more than a flight of it has.
pub(crate) const TLS_RECEIVE_BYTES: usize = 4 << 10;
/// How long a client that has been told why it is not wanted is read from: more than a round trip.
pub(crate) const TLS_READ_ON_FOR: Duration = Duration::from_secs(1);
/// Of a record that is no data, where the kernel opens records: more than an alert and a KeyUpdate have.
pub(crate) const CONTROL_RECORD_BYTES: usize = 16;
/// TLS records that a key seals before the next one takes its place: half of what rustls allows AES-GCM, of
/// which 2^24.5 are safe (RFC 8446, section 5.5).
pub(crate) const TLS_RECORDS_PER_KEY: u64 = 1 << 23;
/// Bytes read ahead while most of what is awaited is large: enough for headers, little to copy.
/// Not measured: 25 headers of 40 bytes fit.
pub(crate) const TCP_READ_AHEAD_BYTES: usize = 1 << 10;
/// Data of which at least this many bytes are still to come is read straight into the caller's buffers: all
/// that is large, less what was read ahead. Not measured, as [`LARGE_BYTES`].
pub(crate) const TCP_DIRECT_BYTES: usize = LARGE_BYTES / 2;
/// Pieces of memory in one system call, of the 1,024 that the kernel takes: 32 writes with their headers. Not
/// measured: the array is made for each send, and more requests take a second one.
pub(crate) const TCP_CLIENT_SLICES_MAX: usize = 64;
/// Reads in one call, so that a server that sends without end does not keep its client from coming back. Not
/// measured: 12 MiB, far more than arrives while they are taken in.
pub(crate) const TCP_CLIENT_READS_MAX: usize = 64;

// The client over RDMA
// ----------------------------------------------------------------------------------------------------------

/// The queue depth, in requests, of a client that leaves it to the server: a queue pair is made before the
/// server has granted anything. Not measured: beyond the default of a server, 128, so that this decides.
pub(crate) const RDMA_DEPTH_DEFAULT: u32 = 1024;
/// The least bytes of room for requests that are being sent: a few inline writes. Not
/// measured.
pub(crate) const RDMA_SEND_BYTES_MIN: usize = 64 << 10;
/// The most bytes of room for requests that are being sent: what does not fit waits in the queue. Not
/// measured: 16 of the largest inline writes.
pub(crate) const RDMA_SEND_BYTES_MAX: usize = 256 << 10;
/// The most bytes of data that are sent inline, and so copied, whatever the server would take. Not measured:
/// a server grants 13 KiB, so that a receive holds four writes of 4 KiB (4 KiB write, depth 32, in the
/// virtual machine: 13,055 IOPS with two, 13,712 with four).
pub(crate) const RDMA_INLINE_BYTES_MAX: usize = 16 << 10;
/// The least bytes that are registered at a time for bounce slots: a registration is a system call. Not
/// measured: the largest operation of a server with the default `--io-max` fits.
pub(crate) const RDMA_BOUNCE_BYTES_MIN: usize = 1 << 20;
/// While a client polls without ever waiting, it looks at its descriptors this often: a system call each,
/// against how late the end of a connection is noticed. Not measured: one call in 2 ms is far below 1 % of a
/// core.
pub(crate) const RDMA_DESCRIPTORS_EVERY: Duration = Duration::from_millis(2);
/// While there is no room to send, it is looked for this often: what makes room is not announced. Not
/// measured: a queue pair has room for all requests that there are credits for.
pub(crate) const RDMA_ROOM_EVERY: Duration = Duration::from_millis(1);
/// How long the first try to connect takes, doubled for each further one: rdma_cm itself sends a lost
/// datagram again only after four seconds. Not measured: far above the round trips of any network.
pub(crate) const RDMA_CONNECT_TIME: Duration = Duration::from_millis(1500);
/// The server may take this part of the time that is left to answer over a queue pair that was just made. One
/// second, whatever time was left, was too little for a server on a machine with a load of 15; and there must
/// be enough left to connect anew.
pub(crate) const RDMA_PROOF_PART: u32 = 4;
/// When the TCP connection of a queue pair has ended, what is still on its way by the queue pair may take
/// this long: it may say why. Not measured: many round trips of a local network.
pub(crate) const RDMA_COMPANION_GRACE: Duration = Duration::from_millis(100);
/// How long a GOAWAY by RDMA may take before the queue pair is destroyed all the same. Not measured: many
/// round trips of a local network.
pub(crate) const RDMA_GOAWAY_TIME: Duration = Duration::from_millis(100);
/// How long a region that is unregistered waits for its windows to be invalidated before the connection is
/// ended instead. Not measured: the device itself gives the server up before, after [`ACK_RETRIES`].
pub(crate) const RDMA_INVALIDATE_TIME: Duration = Duration::from_secs(3);

// The server's half, on every transport
// ----------------------------------------------------------------------------------------------------------

/// How long a closed connection is kept for its peer to read the goaway: a round trip to anywhere, and a
/// retransmission. Not measured.
pub(crate) const LINGER: Duration = Duration::from_secs(1);
/// A peer that keeps silent for so many of the intervals in which it promised to say something has failed.
/// More than one, so that one late message is no death sentence. Not measured: as many as a client allows its
/// server.
pub(crate) const KEEPALIVES_MISSED_MAX: u8 = 3;
/// Messages beyond one for each credit that a connection whose messages come whole has room for: pings,
/// pongs and a goaway. Not measured: each side has one ping on its way.
pub(crate) const CONTROL_MESSAGES: usize = 8;

/// Bytes of a request's data that are still to come, from which on they are received straight into their
/// slot; fewer come with what follows them, which saves a receive and costs a short copy. Not measured by
/// itself.
pub(crate) const DIRECT_BYTES_MIN: usize = 32 << 10;
/// Bytes: a connection whose unsent answers hold more than this is not read from. As much as one send takes
/// ([`SEND_BYTES_MAX`]). Not measured.
pub(crate) const UNSENT_BYTES_MAX: usize = 1 << 20;
/// Bytes that a peer must move within the stall timeout on a message it has begun, or on its answers...
/// Not measured: 2 KiB/s with the default, less than any network that is of use.
pub(crate) const PROGRESS_BYTES_MIN: u64 = 4096;
/// ... and what part it is, at least, of the memory that they hold: one that trickles gives it back within so
/// many timeouts. Not measured.
pub(crate) const PROGRESS_PART: u64 = 8;
/// Bytes of a receive at most: what has come must be kept if it has to wait for a slot.
/// 128 requests of 64 bytes fit. Not measured.
pub(crate) const SMALL_RECEIVE_BYTES: u32 = 8 << 10;
/// Bytes of a receive for a connection whose receives come full: 15 writes of 4 KiB, or a thousand requests.
/// Not measured by itself...
pub(crate) const LARGE_RECEIVE_BYTES: u32 = 64 << 10;
/// ... until so many in a row have not, so that one short one does not end it...
pub(crate) const LARGE_RECEIVE_FOR: u8 = 8;
/// ... if it is one of so many of a worker's. What waits so has a bound: 4 MiB, and the small ones of all
/// connections. Not measured.
pub(crate) const LARGE_RECEIVES_MAX: usize = 64;
/// Bytes of heap that each connection may cause in any case: what it has received, some small messages and
/// one long one. With the structs of a connection it is the 16 KiB that the server charges for it.
pub(crate) const HEAP_BASE: usize = 14 << 10;
/// ... and of that, messages that need not ask for more. Not measured: three requests.
pub(crate) const HEAP_MESSAGES: usize = 2 << 10;
/// Once half of what all may cause together is used, a connection may cause this part of what is left. Not
/// measured: dynamic thresholds, as for the arena.
pub(crate) const HEAP_PART: usize = 8;
/// Bytes of heap that a request takes until it is answered, here and in the server, without its body. Rounded
/// up from the sizes of the structs.
pub(crate) const REQUEST_HEAP: usize = 512;
/// Bytes: longer bodies count by themselves, for the server keeps what they say. Only opens have such.
pub(crate) const BODY_COUNTED_MIN: u16 = 128;
/// Bytes of heap that a response without data, or a pong, takes until it is sent: its own 40, in a vector
/// that doubles.
pub(crate) const SMALL_RESPONSE_HEAP: usize = 2 * 40;
/// Finished batches that a worker keeps for reuse. Not measured: as many connections may send in an iteration
/// without an allocation.
pub(crate) const SPARE_BATCHES: usize = 64;
/// ... unless one keeps more heap than this: it has been sealed into. Not measured.
pub(crate) const SPARE_BATCH_BYTES: usize = 16 << 10;

/// A connection that was alive a moment ago is not asked again: less than it takes another client to write
/// and have it acknowledged. Not measured: one poll(2) in so long is 1 % of a core at most.
pub const ALIVE_FOR: Duration = Duration::from_micros(100);

// The server over RDMA
// ----------------------------------------------------------------------------------------------------------

/// A connection's share of an iteration, in completions, so that it has an end. Not measured.
pub(crate) const QUEUE_COMPLETIONS_MAX: usize = 64;
/// Bytes for messages that are being sent, for each connection of a server; most have 40. Not measured: 1,600
/// of them.
pub(crate) const SEND_RING_BYTES: usize = 64 << 10;
/// How long nothing may show that a peer is there before it is probed: an idle connection does not notice
/// that its peer is gone. Not measured: well below the 60 s of TCP's keepalive, and one packet.
pub(crate) const PROBE_EVERY: Duration = Duration::from_secs(10);
/// Work requests that a queue pair must hold to be of use. Not measured: no device has so few.
pub(crate) const WORK_REQUESTS_MIN: usize = 16;
/// Bytes of a message up to which it is copied into its work request, where the device can: the device then
/// need not fetch it. Not measured: five responses of 40 bytes, and what common devices take.
pub(crate) const QUEUE_INLINE_BYTES: u32 = 220;
/// Completions taken from a queue at a time. Not measured: 32 of 48 bytes lie on the stack.
pub(crate) const QUEUE_POLL: usize = 32;
/// Bytes of data within a chain after which there is a completion: its slots come free early, and progress
/// shows. Not measured: as much as an iteration of a worker gives out.
pub(crate) const SIGNAL_BYTES: usize = 256 << 10;
/// Bytes up to which memory is registered in one piece. Not measured: registration is not on the data path.
pub(crate) const SPLIT_BYTES_MIN: usize = 256 << 10;
/// When a peer without a receive is asked again, as verbs counts it: 12 is 0.64 ms. Not measured: receives
/// are posted beforehand, so it happens to peers that break the protocol.
pub(crate) const RNR_TIMER: u8 = 12;
/// How often it is asked again before it is given up.
pub(crate) const RNR_RETRIES: u8 = 3;
/// Routers that a packet may pass: the usual TTL of IP.
pub(crate) const HOPS: u8 = 64;
/// How long the device waits for an acknowledgement before it sends again, as verbs counts it: 4.096 us <<
/// 16, that is 268 ms. rdma_cm's own choice would take minutes. With 134 ms, Soft-RoCE on the emulated
/// processors of a busy machine gives up connections whose peers live.
pub(crate) const ACK_TIMEOUT: u8 = 16;
/// How often the device sends again: with these six a connection whose wire is cut ends after about two
/// seconds. Seven are for ever with Soft-RoCE.
pub(crate) const ACK_RETRIES: u8 = 6;
/// How long one try of rdma_cm to find the way to an address takes. Not measured: the kernel asks the network
/// for it, and the try is repeated.
pub(crate) const RDMA_RESOLVE_TIME: Duration = Duration::from_millis(500);
/// Connections by RDMA that may wait to be accepted. Not measured: the main thread accepts at once.
pub(crate) const RDMA_BACKLOG: i32 = 1024;

// The server over TCP
// ----------------------------------------------------------------------------------------------------------

/// Connections that may wait to be accepted; the kernel cuts it to net.core.somaxconn, whose default this is.
pub(crate) const TCP_BACKLOG: i32 = 4096;
/// How long a client waits before it tries again to connect to a Unix socket whose backlog is full. Not
/// measured: by then a server that lives has accepted some.
pub(crate) const UNIX_BACKLOG_RETRY: Duration = Duration::from_millis(5);
/// How often within the timeout for unreachable peers the kernel is asked about a connection. Not measured:
/// one call each 5 s, for connections with something unacknowledged.
pub(crate) const WATCH_CHECKS: u8 = 6;
/// How often the kernel must have tried since the peer was last heard. The last of them may have been a
/// moment ago, the others have not been answered. Not measured: docs/ARCHITECTURE.md has the argument.
pub(crate) const WATCH_ATTEMPTS: u32 = 3;
/// About how many connections the kernel is asked in one iteration at most: 64 system calls, some 50 us.
pub(crate) const WATCH_AT_ONCE: usize = 64;

// The reactor, and what is sent at once
// ----------------------------------------------------------------------------------------------------------

/// The most bytes of one send. A reactor's other sockets have their turn before the next: a send of megabytes
/// takes as long as hundreds of small requests. 1 MiB read, depth 32: 2,783 operations a second with 256 KiB,
/// 3,434 with this.
pub(crate) const SEND_BYTES_MAX: usize = 1 << 20;
/// Bytes that a slot has at most which is filled with several answers, unless one alone needs more: 32 reads
/// of 4 KiB. 4 KiB read, depth 32: 524,342 operations a second before such a slot was used, 537,170 with it.
pub(crate) const FILLED_BYTES_MAX: usize = 128 << 10;
/// A reactor that busy-polls reads this number of sockets by itself: that takes a system call each, and
/// spares the ring's detour by a poll, a wake-up and a call to take both in. 4 KiB read, depth 1, with reads
/// and sends done at once: 63,095 operations a second before, 74,023 after. The number is not measured.
pub(crate) const WATCHED_MAX: usize = 4;
/// After so many polls without success the ring has the socket again: about 1 ms. Not measured.
pub(crate) const WATCHED_POLLS_MAX: u32 = 4096;
/// How often in an iteration the ring's own work is done again, so that it has an end. Not measured.
pub(crate) const POSTS_MAX: usize = 64;
/// How long a dropped ring waits for its operations to end before their memory is leaked. Not measured: only
/// a file system or device that hangs takes longer than a moment.
pub(crate) const RING_DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// Events of epoll taken with one system call: 3 KiB. Not measured: more come with the next.
pub(crate) const EPOLL_EVENTS_MAX: usize = 256;
/// The most by which busy-polling is extended for requests at a device. Measured with 10 (500 us): 4 KiB
/// read, depth 32, O_DIRECT: 63,854 operations a second before, 77,408 with it and the limit on dispatch.
pub(crate) const SPIN_MULTIPLIER_MAX: usize = 10;
/// While every iteration has events, timers are looked at in one of so many: asking for the time costs about
/// 70 instructions. A timer is late by that many iterations at most.
pub(crate) const TIMERS_EVERY: u8 = 16;

// Keys
// ----------------------------------------------------------------------------------------------------------

/// The longest file of trusted servers that is read: some 10,000 of them. It is read each time that a session
/// begins.
pub(crate) const SERVERS_FILE_BYTES_MAX: u64 = 1 << 20;

// Busy-polling
// ----------------------------------------------------------------------------------------------------------

/// Between two polls lies at most this long, unless the thread was preempted. Four jobs on one core, null,
/// depth 32: 693,314 operations a second with 1 ms, 874,123 with this.
pub(crate) const PREEMPTED_AFTER: Duration = Duration::from_micros(250);
/// A preempted thread does not poll for this many times as long as it was away. 4 KiB read by RDMA, depth 1,
/// in the virtual machine: 2,961 operations a second with 100 ms, 3,495 with this.
pub(crate) const PREEMPTED_PAUSE: u32 = 10;
