//! What the kernel knows about a TCP connection, and how long it may wait between two tries. Neither rustix
//! nor socket2 has these options.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

/// Since Linux 6.15. In milliseconds, from 1,000 to 120,000.
const TCP_RTO_MAX_MS: libc::c_int = 44;
const RTO_MAX_MS: std::ops::RangeInclusive<u128> = 1_000..=120_000;

/// A part of the kernel's `struct tcp_info`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// Window probes since the last ACK.
    pub probes: u8,
    /// Segments that were sent and are not acknowledged.
    pub unacked: u32,
    /// Segments that were ever sent again.
    pub retransmitted: u32,
    /// Segments that ever came from the peer.
    pub segments_in: u32,
    /// Bytes in the socket that have never been sent.
    pub unsent_bytes: u32,
}

impl TcpInfo {
    /// Of this socket. An error if it is no TCP socket.
    pub fn of(socket: impl AsFd) -> io::Result<Self> {
        // The front of the structure, as Linux 4.6 and later have it; libc's ends before.
        let mut bytes = [0_u8; 148];
        let mut len = bytes.len() as libc::socklen_t;
        let fd = socket.as_fd().as_raw_fd();
        // SAFETY: the kernel writes at most `len` bytes, which `bytes` has, and then says there how many they
        // were.
        let result = unsafe {
            libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, bytes.as_mut_ptr().cast(), &raw mut len)
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Ok(Self {
            probes: bytes[3],
            unacked: word(24),
            retransmitted: word(100),
            segments_in: word(140),
            unsent_bytes: word(144),
        })
    }
}

/// Bounds the time between two tries to reach the peer (retransmissions, window probes), which doubles with
/// each: by default up to two minutes. Does nothing before Linux 6.15, and on a socket that is no TCP socket.
pub fn bound_tcp_retries(socket: impl AsFd, max: Duration) {
    let ms = max.as_millis().clamp(*RTO_MAX_MS.start(), *RTO_MAX_MS.end()) as libc::c_int;
    let fd = socket.as_fd().as_raw_fd();
    let len = size_of_val(&ms) as libc::socklen_t;
    // SAFETY: the kernel reads the `len` bytes of `ms`.
    unsafe { libc::setsockopt(fd, libc::IPPROTO_TCP, TCP_RTO_MAX_MS, (&raw const ms).cast(), len) };
}
