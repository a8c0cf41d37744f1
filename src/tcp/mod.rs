//! The TCP transport: messages and their data on one stream. A Unix socket is such a stream, too.

mod accept;
mod client;
mod server;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::ioctl_fionbio;
use rustix::net::sockopt;
use socket2::{Protocol, SockAddr, Socket, Type};

pub use accept::{Accepting, no_kernel_tls};
pub use client::{TcpClient, TcpDial};
pub use server::{Place, TcpServer};

use crate::address::Endpoint;
use crate::error::Error;
use crate::tuning::TCP_BACKLOG;

/// Listens at an endpoint, for [`crate::reactor::Op::Accept`]. Returns the non-blocking socket and where it
/// listens, with the actual port. The file of a Unix socket is made, with the permissions that the umask
/// leaves, in place of one at which no process listens any more.
pub fn listen(endpoint: impl Into<Endpoint>) -> Result<(OwnedFd, Endpoint), Error> {
    let endpoint = &endpoint.into();
    let open = || -> io::Result<(Socket, Option<Endpoint>)> {
        let (socket, at) = new_socket(endpoint)?;
        if let Endpoint::Ip(address) = endpoint {
            socket.set_reuse_address(true)?;
            if address.is_ipv6() {
                socket.set_only_v6(true)?;
            }
        }
        match (socket.bind(&at), endpoint) {
            (Err(error), Endpoint::Unix(path))
                if error.kind() == io::ErrorKind::AddrInUse && is_abandoned(endpoint) =>
            {
                std::fs::remove_file(path)?;
                socket.bind(&at)?;
            }
            (bound, _) => bound?,
        }
        socket.listen(TCP_BACKLOG)?;
        let bound = socket.local_addr()?.as_socket().map(Endpoint::Ip);
        Ok((socket, bound))
    };
    let (socket, bound) =
        open().map_err(|source| Error::io(format!("Cannot listen on {endpoint}"), source))?;
    Ok((socket.into(), bound.unwrap_or_else(|| endpoint.clone())))
}

/// Whether a Unix socket is there at which no process listens.
fn is_abandoned(endpoint: &Endpoint) -> bool {
    // Other files refuse connections, too.
    let Endpoint::Unix(path) = endpoint else { return false };
    if !std::fs::symlink_metadata(path).is_ok_and(|it| it.file_type().is_socket()) {
        return false;
    }
    let connected = new_socket(endpoint).and_then(|(socket, address)| socket.connect(&address));
    connected.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// A non-blocking stream socket to bind or connect to an endpoint, and its address for that.
fn new_socket(endpoint: &Endpoint) -> io::Result<(Socket, SockAddr)> {
    let address = endpoint.to_socket_address()?;
    let protocol = endpoint.ip().map(|_| Protocol::TCP);
    let socket = Socket::new(address.domain(), Type::STREAM, protocol)?;
    adopt(&socket, endpoint)?;
    Ok((socket, address))
}

/// Makes a stream socket as the transport needs it, before there is a connection: one that another process
/// has made for this endpoint, too.
pub fn adopt(socket: impl AsFd, endpoint: &Endpoint) -> io::Result<()> {
    ioctl_fionbio(&socket, true)?;
    // Connections within one machine have nothing to congest: the plainest congestion control, which every
    // kernel has and everybody may choose, does for them. Others cost time: BBR sets a timer for each packet.
    // It must be chosen before there is a connection.
    if endpoint.ip().is_some_and(|address| address.ip().is_loopback()) {
        // A kernel that does not let us does no harm.
        let _ = sockopt::set_tcp_congestion(&socket, "reno");
    }
    Ok(())
}

/// Whether the peer of a stream socket has reset or closed it, or this side has shut it down. Unlike a
/// receive it tells so although there is something to be received before the end.
pub fn has_ended(socket: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&socket, PollFlags::RDHUP)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}
