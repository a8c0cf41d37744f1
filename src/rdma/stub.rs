//! What stands in for the RDMA transport in a build without the feature `rdma`: the same names, of which no
//! value can be made.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, Status, Violation};
use crate::handshake::{Grant, Offer, Policy};
use crate::memory::{Arena, Slot};
use crate::message::{QueuePairAddress, RemoteRegion};
use crate::reactor::{Event, Reactor};
use crate::transport::{
    Bulk, ClientCounters, ClientTransport, ConnectionId, NotSent, QueuePairMemory, Reply, RequestId,
    RequestKey, Response, ServerEvent, ServerTransport,
};

const REASON: &str = "this program was built without RDMA";

/// Why there is no RDMA here, as the rest of an error message.
pub fn unavailable() -> Option<String> {
    Some(REASON.into())
}

fn absent() -> Error {
    Error::Unsupported(format!("There is no RDMA here: {REASON}. Use TCP, or build with the feature `rdma`."))
}

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

impl Port {
    /// Why it cannot be used.
    pub fn problem(&self) -> Option<String> {
        None
    }
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

/// Fails.
pub fn devices() -> Result<Vec<DeviceInfo>, Error> {
    Err(absent())
}

/// Nothing.
#[derive(Debug)]
pub struct RdmaIncoming(Infallible);

impl RdmaIncoming {
    /// The client's address.
    pub fn peer(&self) -> Option<SocketAddr> {
        match self.0 {}
    }

    /// Nothing.
    pub fn reject(self, _errno: i32, _text: &str) {
        match self.0 {}
    }
}

/// Nothing.
#[derive(Debug)]
pub struct Listener(Infallible);

impl Listener {
    /// Fails.
    pub fn bind(_address: SocketAddr) -> Result<Self, Error> {
        Err(absent())
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        match self.0 {}
    }

    /// Readable when [`Listener::accept`] may have something.
    pub fn fd(&self) -> Result<OwnedFd, Error> {
        match self.0 {}
    }

    /// The next connection.
    pub fn accept(&self) -> Option<RdmaIncoming> {
        match self.0 {}
    }
}

/// What a peer may do to memory that is exposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allow {
    /// Read it.
    Read,
    /// Write to it.
    Write,
}

/// Nothing.
#[derive(Debug)]
pub struct RdmaEnd(Infallible);

impl RdmaEnd {
    /// Fails.
    pub fn connect(_: SocketAddr, _: Option<IpAddr>, _: Option<&[u8]>) -> Result<Self, Error> {
        Err(absent())
    }

    /// Agrees to a connection.
    pub fn accept(incoming: RdmaIncoming) -> Result<Self, Error> {
        match incoming.0 {}
    }

    /// Fails.
    pub fn unjoined(_: IpAddr) -> Result<(Self, QueuePairAddress), Error> {
        Err(absent())
    }

    /// Joins it with another.
    pub fn join(&mut self, _: &QueuePairAddress, _: &QueuePairAddress) -> Result<(), Error> {
        match self.0 {}
    }

    /// Posts receives.
    pub fn set_receives(&mut self, _: usize) -> Result<(), Error> {
        match self.0 {}
    }

    /// Sends a message.
    pub fn send(&mut self, _: &[u8]) -> bool {
        match self.0 {}
    }

    /// The next message.
    pub fn receive(&mut self) -> Option<Vec<u8>> {
        match self.0 {}
    }

    /// Whether nothing more will come.
    pub fn has_lost_peer(&mut self) -> bool {
        match self.0 {}
    }

    /// Lays memory open.
    pub fn expose(&mut self, _: Allow, _: usize) -> Result<(u64, u32), Error> {
        match self.0 {}
    }

    /// Writes to the peer's memory.
    pub fn place(&mut self, _: RemoteRegion, _: &[u8]) -> bool {
        match self.0 {}
    }
}

/// Nothing.
#[derive(Debug)]
pub struct RdmaServer(Infallible);

impl RdmaServer {
    /// Fails.
    pub fn new(_: &mut Reactor, _: u8, _: Arc<Policy>, _: &Arena) -> Result<Self, Error> {
        Err(absent())
    }

    /// Takes over a connection.
    pub fn adopt(&mut self, _: &mut Reactor, _: RdmaIncoming) -> Result<ConnectionId, Error> {
        match self.0 {}
    }

    /// Has this decide who has memory.
    pub fn set_memory(&mut self, _: QueuePairMemory) {
        match self.0 {}
    }
}

impl ServerTransport for RdmaServer {
    fn owner(&self) -> u8 {
        match self.0 {}
    }
    fn handle(&mut self, _: &mut Reactor, _: Event) {
        match self.0 {}
    }
    fn next_event(&mut self) -> Option<ServerEvent> {
        match self.0 {}
    }
    fn fetch(&mut self, _: &mut Reactor, _: RequestKey, _: Slot, _: usize) {
        match self.0 {}
    }
    fn respond(&mut self, _: &mut Reactor, _: RequestKey, _: Response) {
        match self.0 {}
    }
    fn flush(&mut self, _: &mut Reactor) {
        match self.0 {}
    }
    fn close(&mut self, _: &mut Reactor, _: ConnectionId, _: Status, _: &str) {
        match self.0 {}
    }
    fn reject(&mut self, _: &mut Reactor, _: ConnectionId, _: i32, _: &str) {
        match self.0 {}
    }
    fn close_stalled(&mut self, _: &mut Reactor, _: bool) {
        match self.0 {}
    }
    fn unsent_bytes(&self, _: ConnectionId) -> usize {
        match self.0 {}
    }
    fn is_sending(&self) -> bool {
        match self.0 {}
    }
    fn connections(&self) -> usize {
        match self.0 {}
    }
}

/// Nothing.
#[derive(Debug)]
pub struct Upgrade(Infallible);

impl Upgrade {
    /// Fails.
    pub fn new(_: IpAddr, _: &Grant) -> Result<Self, Error> {
        Err(absent())
    }

    /// Where it is.
    pub fn address(&self) -> &QueuePairAddress {
        match self.0 {}
    }

    /// Connects it.
    pub fn connect(
        self,
        _: &QueuePairAddress,
        _: Box<dyn ClientTransport>,
        _: Instant,
    ) -> Result<RdmaClient, Error> {
        match self.0 {}
    }
}

/// Nothing.
#[derive(Debug)]
pub struct RdmaClient(Infallible);

impl RdmaClient {
    /// Fails.
    pub fn connect(_: SocketAddr, _: Option<IpAddr>, _: &Offer, _: Instant) -> Result<Self, Error> {
        Err(absent())
    }

    /// How long the server may be silent.
    pub fn set_request_timeout(&mut self, _: Duration) {
        match self.0 {}
    }
}

impl ClientTransport for RdmaClient {
    fn grant(&self) -> &Grant {
        match self.0 {}
    }
    fn send(&mut self, _: u64, _: &[u8], _: Bulk, _: bool) -> Result<RequestId, NotSent> {
        match self.0 {}
    }
    fn dequeue(&mut self, _: RequestId) -> Option<Bulk> {
        match self.0 {}
    }
    fn flush(&mut self) {
        match self.0 {}
    }
    fn receive(&mut self, _: &mut Vec<Reply>) -> bool {
        match self.0 {}
    }
    fn wait(&mut self, _: Option<Instant>) -> Result<(), Error> {
        match self.0 {}
    }
    fn poll_fd(&mut self) -> (BorrowedFd<'_>, bool) {
        match self.0 {}
    }
    fn outstanding(&self) -> usize {
        match self.0 {}
    }
    fn credits(&self) -> usize {
        match self.0 {}
    }
    fn failure(&self) -> Option<&Error> {
        match self.0 {}
    }
    fn ping(&mut self, _: Duration) {
        match self.0 {}
    }
    fn last_rx(&self) -> Instant {
        match self.0 {}
    }
    fn abort(&mut self, _: Violation) {
        match self.0 {}
    }
    fn counters(&self) -> ClientCounters {
        match self.0 {}
    }
}
