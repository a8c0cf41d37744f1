//! The TCP transport: messages and their data on one stream.

mod accept;
mod client;
mod server;

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

pub use accept::Accepting;
pub use client::{TcpClient, TcpDial};
pub use server::{Place, TcpServer};

use crate::error::Error;
use crate::tuning::TCP_BACKLOG;

/// Listens on an address, for [`crate::reactor::Op::Accept`]. Returns the non-blocking socket and its address
/// with the actual port.
pub fn listen(address: SocketAddr) -> Result<(OwnedFd, SocketAddr), Error> {
    let open = || -> std::io::Result<(Socket, Option<SocketAddr>)> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_nonblocking(true)?;
        spare_congestion_control(&socket, address);
        socket.bind(&SockAddr::from(address))?;
        socket.listen(TCP_BACKLOG)?;
        let bound = socket.local_addr()?.as_socket();
        Ok((socket, bound))
    };
    let (socket, bound) =
        open().map_err(|source| Error::io(format!("Cannot listen on {address}"), source))?;
    Ok((socket.into(), bound.unwrap_or(address)))
}

/// Whether the peer of a stream socket has reset or closed it, or this side has shut it down. Unlike a
/// receive it tells so although there is something to be received before the end.
pub fn has_ended(socket: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&socket, PollFlags::RDHUP)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// Takes the plainest congestion control, which every kernel has and everybody may choose, for connections
/// within one machine, where there is nothing to congest. Others cost time: BBR sets a timer for each packet.
/// Only before the connection is made.
fn spare_congestion_control(socket: &Socket, address: SocketAddr) {
    if address.ip().is_loopback() {
        // A kernel that does not let us does no harm.
        let _ = sockopt::set_tcp_congestion(socket, "reno");
    }
}
