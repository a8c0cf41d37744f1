//! The RDMA transport: messages over reliable queue pairs, data placed and fetched by the server with RDMA
//! WRITE and READ.
//!
//! What [`listen`] returns hears of connections in one thread, a [`server`] takes each over in a worker's;
//! [`connect`] makes the other end. The client lays its memory open to the server for a request's length and
//! direction, as far as its device can keep to that (docs/SECURITY.md); the server never gives out a key.
//! What is posted, by whom and in which order is in docs/PROTOCOL.md.
//!
//! The libraries are loaded at run time: on a machine without them, or without a device, [`unavailable`] says
//! why. `unsafe` lives in `verbs`, `device`, `cm` and `queue_pair`, which own everything that the device may
//! touch; the rest is safe code on top.

mod client;
#[allow(unsafe_code)]
mod cm;
#[allow(unsafe_code)]
mod device;
#[cfg(feature = "test-peers")]
mod end;
mod out_of_band;
mod private_data;
#[allow(unsafe_code)]
mod queue_pair;
mod resolution;
mod server;
#[allow(unsafe_code)]
mod verbs;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

#[cfg(feature = "test-peers")]
pub use end::{Allow, RdmaEnd};

use crate::connecting::finish;
use crate::error::Error;
use crate::handshake::{Grant, Offer, Policy};
use crate::memory::Arena;
use crate::message::{BODY_BYTES_MAX, HEADER_BYTES, QueuePairAddress};
use crate::rdma_devices::DeviceInfo;
use crate::reactor::Reactor;
use crate::transport::{
    ClientDial, ClientTransport, ConnectQueuePair, Incoming, Listener, QueuePairMemory, ServerTransport,
};
use crate::tuning::CONTROL_MESSAGES;
use client::{RdmaDial, Upgrade};
use private_data::{parse_rejection, rejection, request};
use server::RdmaServer;

/// Receives posted before the handshake has said how many credits there are.
const HANDSHAKE_MESSAGES: usize = 2;
/// The longest message without data.
const MESSAGE_BYTES: usize = HEADER_BYTES + BODY_BYTES_MAX;

/// Loads what a process needs for RDMA, without opening a device: the kernel takes no commands through one
/// that was opened before the process changed its user, its capabilities or its Landlock domain. Returns why
/// there is no RDMA here, as the rest of an error message.
pub fn load() -> Option<String> {
    device::load().err().map(str::to_owned)
}

/// Why there is no RDMA here, as the rest of an error message; None if there is. Opens all devices.
pub fn unavailable() -> Option<String> {
    device::devices().err().map(str::to_owned)
}

/// Every device.
pub fn devices() -> Result<Vec<DeviceInfo>, Error> {
    let devices = device::devices().map_err(no_rdma)?;
    let info = |device: &device::Device| DeviceInfo {
        name: device.name(),
        ports: device.ports(),
        has_windows: device.limits().is_ok_and(|limits| limits.has_windows),
    };
    Ok(devices.iter().map(info).collect())
}

/// Listens on an address of an RDMA device's network interface, or on all. It belongs to one thread; what it
/// accepts may go to others.
pub fn listen(address: SocketAddr) -> Result<Box<dyn Listener>, Error> {
    Ok(Box::new(RdmaListener::bind(address)?))
}

/// A server without connections, for requests whose data is in slots of `arena`. Its tokens have this owner
/// number. The arena is registered with every device that can be used; fails if there is none. `memory`
/// decides who has memory for a queue pair.
pub fn server(
    reactor: &mut Reactor,
    owner: u8,
    policy: Arc<Policy>,
    arena: &Arena,
    memory: QueuePairMemory,
) -> Result<Box<dyn ServerTransport>, Error> {
    Ok(Box::new(RdmaServer::new(reactor, owner, policy, arena, memory)?))
}

/// Connects to the server at `address`, from `source` if that is given, and shakes hands, by `deadline`.
/// Waits for it; [`dial`] does not.
pub fn connect(
    address: SocketAddr,
    source: Option<IpAddr>,
    offer: &Offer,
    deadline: Instant,
) -> Result<Box<dyn ClientTransport>, Error> {
    finish(&mut *dial(address, source, offer, deadline))
}

/// A connection to the server at `address`, from `source` if that is given, which is to be made and have
/// shaken hands by `deadline`.
pub fn dial(address: SocketAddr, source: Option<IpAddr>, offer: &Offer, deadline: Instant) -> ClientDial {
    Box::new(RdmaDial::new(address, source, offer, deadline))
}

/// Makes a queue pair, ready to receive, for a connection that has shaken hands over TCP and asked for
/// nothing yet: on the port that has the TCP connection's address `local`. Returns where it is, for the
/// server, and what connects it.
pub fn upgrade(local: IpAddr, grant: &Grant) -> Result<(QueuePairAddress, ConnectQueuePair), Error> {
    let made = Upgrade::new(local, grant)?;
    let ours = *made.address();
    Ok((
        ours,
        Box::new(move |theirs, stream, now, deadline| {
            Ok(Box::new(made.connect(theirs, stream, now, deadline)?))
        }),
    ))
}

fn no_rdma(reason: &str) -> Error {
    Error::Unsupported(format!(
        "There is no RDMA here: {reason}. Use TCP, or see `raio_server --list-devices`."
    ))
}

/// See [`listen`].
#[derive(Debug)]
struct RdmaListener {
    // Before the channel.
    _id: cm::Id,
    channel: Arc<cm::EventChannel>,
    address: SocketAddr,
}

/// A connection that a client asks for, for an [`RdmaServer`].
#[derive(Debug)]
struct RdmaIncoming {
    id: cm::Id,
    reads_out: u8,
}

impl Incoming for RdmaIncoming {
    fn peer(&self) -> Option<SocketAddr> {
        self.id.peer()
    }

    fn reject(self: Box<Self>, errno: i32, text: &str) {
        self.id.reject(&rejection(errno, text));
    }
}

impl RdmaListener {
    fn bind(address: SocketAddr) -> Result<Self, Error> {
        device::devices().map_err(no_rdma)?;
        let failed = |source: std::io::Error| {
            let hint = match source.raw_os_error() {
                Some(libc::EADDRNOTAVAIL | libc::ENODEV) => {
                    "; give an address of an RDMA device's interface, see `raio_server --list-devices`"
                }
                _ => "",
            };
            Error::io(format!("Cannot listen on {address} for RDMA{hint}"), source)
        };
        let channel = cm::EventChannel::new().map_err(failed)?;
        let id = cm::Id::new(&channel).map_err(failed)?;
        let address = id.listen(address).map_err(failed)?;
        Ok(Self { _id: id, channel, address })
    }
}

impl Listener for RdmaListener {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn fd(&self) -> Result<OwnedFd, Error> {
        self.channel.owned_fd().map_err(|source| Error::io("Cannot watch for RDMA connections", source))
    }

    /// Peers that do not speak raio, or no version of it that this side does, are rejected with the reason.
    fn accept(&self) -> Option<Box<dyn Incoming>> {
        while let Some(event) = self.channel.next() {
            let Some(id) = event.incoming else { continue };
            match private_data::check_request(&event.private_data) {
                Ok(()) => return Some(Box::new(RdmaIncoming { id, reads_out: event.reads_out })),
                Err((errno, text)) => {
                    let peer = id.peer().map(tracing::field::display);
                    tracing::debug!(peer, "An RDMA connection is rejected: {text}");
                    id.reject(&rejection(errno, &text));
                }
            }
        }
        None
    }
}
