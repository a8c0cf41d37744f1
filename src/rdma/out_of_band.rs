//! Queue pairs that are connected over a TCP connection, without rdma_cm: which port such a one is on, and
//! how its packets are numbered.

use std::net::IpAddr;

use super::cm::{EventChannel, Id};
use super::device::{Device, PortAddress, devices};
use super::no_rdma;
use crate::error::Error;
use crate::message::Link;
use crate::random;

/// The port that `local`, an address of this machine's that a TCP connection uses, belongs to.
pub(super) fn port_of(local: IpAddr) -> Result<PortAddress, Error> {
    let devices = devices().map_err(no_rdma)?;
    let gid = match local {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    let found = devices.iter().find_map(|device| device.find_ethernet(gid)).or_else(|| infiniband(local));
    found.ok_or_else(|| {
        let ports = |device: &Device| {
            let ports: Vec<_> = device.ports().iter().map(|port| format!("port {}", port.number)).collect();
            format!("{} {}", device.name(), ports.join(", "))
        };
        let tried: Vec<_> = devices.iter().take(3).map(ports).collect();
        Error::Unsupported(format!(
            "no RDMA port that is up has the address {local} (looked for GID {gid} on {}{}). Use an address \
             that `raio_server --list-devices` shows",
            tried.join(", "),
            if devices.len() > 3 { " and others" } else { "" }
        ))
    })
}

/// The port whose IP over InfiniBand interface has the address: rdma_cm knows.
fn infiniband(local: IpAddr) -> Option<PortAddress> {
    let id = Id::new(&EventChannel::new().ok()?).ok()?;
    id.bind(local).ok()?;
    id.device()?.port_address(id.port(), 0, Link::InfiniBand)
}

impl PortAddress {
    /// Says of an error where it came about.
    pub fn failed(&self, error: impl std::fmt::Display) -> Error {
        let gid = std::net::Ipv6Addr::from(self.gid);
        Error::Unsupported(format!("{} port {}, GID {gid}: {error}", self.device.name(), self.port))
    }
}

/// Two random numbers of 24 bits, for the first packets of both sides.
pub(super) fn packet_numbers() -> (u32, u32) {
    let number = |[a, b, c]: [u8; 3]| u32::from_le_bytes([a, b, c, 0]);
    (number(random::bytes()), number(random::bytes()))
}
