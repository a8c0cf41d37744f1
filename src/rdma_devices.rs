//! What is known of the RDMA devices of a machine, for people to look at.

use std::net::Ipv6Addr;

/// A device, for people to look at.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Its ports.
    pub ports: Vec<Port>,
    /// Whether a client with it lets a server reach the buffers of requests alone, by memory windows.
    pub has_windows: bool,
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
