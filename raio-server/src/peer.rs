//! Where clients are: what the log calls them, and by what they share.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// The other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerAddress {
    /// At this address.
    Ip(SocketAddr),
    /// On this machine, over a Unix socket: a process of the user with this number.
    User(u32),
}

/// What clients have in common that share limits and memory: the IP address that they connect from or, over a
/// Unix socket, their user's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// An IP address, never an IPv4 address in the form of an IPv6 address.
    Ip(IpAddr),
    /// A user of this machine.
    User(u32),
}

impl PeerAddress {
    /// With whom it shares.
    pub fn origin(self) -> Origin {
        match self {
            Self::Ip(address) => Origin::from(address.ip()),
            Self::User(uid) => Origin::User(uid),
        }
    }

    /// In words, for people: `10.0.0.1:5555`, `user 1000`.
    pub fn shown(self) -> String {
        match self {
            Self::Ip(address) => address.to_string(),
            Self::User(uid) => format!("user {uid}"),
        }
    }

    /// Its port; 0 if it has none.
    pub fn port(self) -> u16 {
        match self {
            Self::Ip(address) => address.port(),
            Self::User(_) => 0,
        }
    }
}

impl From<SocketAddr> for PeerAddress {
    fn from(address: SocketAddr) -> Self {
        Self::Ip(address)
    }
}

impl From<IpAddr> for Origin {
    fn from(address: IpAddr) -> Self {
        Self::Ip(address.to_canonical())
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::User(_) => self.origin().fmt(f),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::User(uid) => write!(f, "uid:{uid}"),
        }
    }
}
