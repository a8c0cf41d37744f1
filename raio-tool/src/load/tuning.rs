//! Every constant that was chosen rather than given: its unit and why it has this value. None is on the path
//! that is measured, so none was chosen by a measurement.

use std::time::Duration;

/// Events of epoll taken with one system call. 12 KiB; as many sessions answer within one iteration at most.
pub const EVENTS_MAX: usize = 1024;

/// How often progress is reported, and sessions are checked for servers that do not answer.
pub const TICK: Duration = Duration::from_secs(1);

/// A session that has waited this long for an answer runs its own timers: it pings the server, or gives it
/// up. As long as the keepalive interval that servers grant.
pub const KEEPALIVE_CHECK_AFTER: Duration = Duration::from_secs(5);

/// How long answers may take after the end of the run: twice the timeout of a dead server.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Descriptors that are not sessions': standard streams, epoll, and what the resolver opens.
pub const DESCRIPTORS_OWN: usize = 32;

/// Bytes: the largest `--size` of an operation, as no server grants more.
pub const IO_BYTES_MAX: u64 = 256 << 20;

/// Operations: the largest `--depth`, because request ids have 16 bits for the index, and a credit is for
/// control messages.
pub const DEPTH_MAX: u32 = 65_534;

/// Sessions: the most of `--sessions`. More than any machine has memory for.
pub const SESSIONS_MAX: usize = 1 << 24;

/// Addresses of 127.0.0.0/8 that many sessions connect from. There are about 28,000 ephemeral ports
/// for each pair of addresses, so this number of addresses keeps the use of each low.
pub const LOOPBACK_SOURCES: u32 = 250;

/// Threads that open sessions, so that the rate does not hang on how far away the server is.
pub const OPENERS: usize = 4;

/// How long connecting, the handshake and the open may take, each.
pub const OPEN_TIMEOUT: Duration = Duration::from_secs(20);

/// How much longer than a session tries to go on the server is to keep it: the time to notice the loss, and
/// some more.
pub const LINGER_EXTRA: Duration = Duration::from_secs(30);

/// How often sessions are looked at that connect again.
pub const RECONNECT_TICK: Duration = Duration::from_millis(1);

/// Bytes of a write that fills the file: the default of raio_server's `--io-max`.
pub const FILL_BYTES: u64 = 1 << 20;
