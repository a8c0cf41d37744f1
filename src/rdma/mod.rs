//! The RDMA transport: messages over reliable queue pairs, data placed and fetched by the server with RDMA
//! WRITE and READ.
//!
//! [`Listener`] hears of connections in one thread, [`RdmaServer::adopt`] takes each over in a worker's;
//! [`RdmaClient`] is the other end. The client lays its memory open to the server for a request's length and
//! direction; the server never gives out a key. What is posted, by whom and in which order is in
//! docs/PROTOCOL.md.
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
mod server;
#[allow(unsafe_code)]
mod verbs;

use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub use client::{RdmaClient, Upgrade};
#[cfg(feature = "test-peers")]
pub use end::{Allow, RdmaEnd};
pub use server::RdmaServer;

use crate::error::Error;
use crate::message::{BODY_BYTES_MAX, HEADER_BYTES};
use crate::tuning::CONTROL_MESSAGES;
use private_data::{parse_rejection, rejection, request};

/// Receives posted before the handshake has said how many credits there are.
const HANDSHAKE_MESSAGES: usize = 2;
/// The longest message without data.
const MESSAGE_BYTES: usize = HEADER_BYTES + BODY_BYTES_MAX;

/// A device, for people to look at.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Its ports.
    pub ports: Vec<Port>,
}

/// A port of a device.
#[derive(Clone, Debug)]
pub struct Port {
    /// From 1.
    pub number: u8,
    /// "active", or why not.
    pub state: &'static str,
    /// "InfiniBand" or "Ethernet".
    pub link: &'static str,
    /// Bytes in a packet.
    pub mtu: u32,
    /// Its addresses.
    pub gids: Vec<Gid>,
}

/// An address of a port.
#[derive(Clone, Debug)]
pub struct Gid {
    /// Its place in the port's table.
    pub index: u32,
    /// In the form of an IPv6 address.
    pub address: Ipv6Addr,
    /// "IB", "RoCE v1" or "RoCE v2".
    pub kind: &'static str,
}

impl Port {
    /// Why it cannot be used, and what to do about it. None if it can.
    pub fn problem(&self) -> Option<String> {
        if self.state != "active" {
            Some(format!("The port is {}. Bring up its link (`ip link`, or the subnet manager).", self.state))
        } else if self.gids.is_empty() {
            Some("The port has no GID. Give its network interface an address.".into())
        } else {
            None
        }
    }
}

/// Why there is no RDMA here, as the rest of an error message; None if there is.
pub fn unavailable() -> Option<String> {
    device::devices().err().map(str::to_owned)
}

/// Every device.
pub fn devices() -> Result<Vec<DeviceInfo>, Error> {
    let devices = device::devices().map_err(no_rdma)?;
    Ok(devices.iter().map(|device| DeviceInfo { name: device.name(), ports: device.ports() }).collect())
}

fn no_rdma(reason: &str) -> Error {
    Error::Unsupported(format!(
        "There is no RDMA here: {reason}. Use TCP, or see `raio_server --list-devices`."
    ))
}

/// Listens for connections. It belongs to one thread; what it accepts may go to others.
#[derive(Debug)]
pub struct Listener {
    // Before the channel.
    _id: cm::Id,
    channel: Arc<cm::EventChannel>,
    address: SocketAddr,
}

/// A connection that a client asks for. Dropping it rejects the client without a reason.
#[derive(Debug)]
pub struct RdmaIncoming {
    id: cm::Id,
    reads_out: u8,
}

impl RdmaIncoming {
    /// The client's address.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.id.peer()
    }

    /// Rejects the client, with an errno and an error message for it.
    pub fn reject(self, errno: i32, text: &str) {
        self.id.reject(&rejection(errno, text));
    }
}

impl Listener {
    /// Listens on an address of an RDMA device's network interface, or on all.
    pub fn bind(address: SocketAddr) -> Result<Self, Error> {
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

    /// Where it listens, with the actual port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Readable when [`Listener::accept`] may have something.
    pub fn fd(&self) -> Result<OwnedFd, Error> {
        self.channel.owned_fd().map_err(|source| Error::io("Cannot watch for RDMA connections", source))
    }

    /// The next connection, for [`RdmaServer::adopt`]. None if there is none now. Peers that do not speak
    /// raio, or no version of it that this side does, are rejected with the reason.
    pub fn accept(&self) -> Option<RdmaIncoming> {
        while let Some(event) = self.channel.next() {
            let Some(id) = event.incoming else { continue };
            match private_data::check_request(&event.private_data) {
                Ok(()) => return Some(RdmaIncoming { id, reads_out: event.reads_out }),
                Err((errno, text)) => {
                    let client = id.peer().map(tracing::field::display);
                    tracing::debug!(client, "An RDMA connection is rejected: {text}");
                    id.reject(&rejection(errno, &text));
                }
            }
        }
        None
    }
}
