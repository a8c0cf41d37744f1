//! In place of the RDMA transport in a build without the feature `rdma`: every function fails, with an error
//! that says why there is no RDMA.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use crate::connecting::{Awaited, Connecting};
use crate::error::Error;
use crate::handshake::{Grant, Offer, Policy};
use crate::memory::Arena;
use crate::message::QueuePairAddress;
use crate::rdma_devices::DeviceInfo;
use crate::reactor::Reactor;
use crate::transport::{
    ClientDial, ClientTransport, ConnectQueuePair, Listener, QueuePairMemory, ServerTransport,
};

const REASON: &str = "this program was built without RDMA";

/// Why there is no RDMA here, as the rest of an error message.
pub fn load() -> Option<String> {
    unavailable()
}

/// Why there is no RDMA here, as the rest of an error message.
pub fn unavailable() -> Option<String> {
    Some(REASON.into())
}

fn fail<T>() -> Result<T, Error> {
    let text = format!("There is no RDMA here: {REASON}. Use TCP, or build with the feature `rdma`.");
    Err(Error::Unsupported(text))
}

/// Fails.
pub fn devices() -> Result<Vec<DeviceInfo>, Error> {
    fail()
}

/// Fails.
pub fn listen(_: SocketAddr) -> Result<Box<dyn Listener>, Error> {
    fail()
}

/// Fails.
pub fn server(
    _: &mut Reactor,
    _: u8,
    _: Arc<Policy>,
    _: &Arena,
    _: QueuePairMemory,
) -> Result<Box<dyn ServerTransport>, Error> {
    fail()
}

/// Fails.
pub fn connect(
    _: SocketAddr,
    _: Option<IpAddr>,
    _: &Offer,
    _: Instant,
) -> Result<Box<dyn ClientTransport>, Error> {
    fail()
}

/// Fails at its first step.
pub fn dial(_: SocketAddr, _: Option<IpAddr>, _: &Offer, _: Instant) -> ClientDial {
    Box::new(NoDial)
}

/// A connection that cannot be made.
struct NoDial;

impl Connecting for NoDial {
    type Outcome = Result<Box<dyn ClientTransport>, Error>;

    fn step(&mut self, _: Instant) -> Option<Self::Outcome> {
        Some(fail())
    }

    fn awaited(&mut self) -> Vec<Awaited<'_>> {
        Vec::new()
    }

    fn step_by(&self) -> Instant {
        Instant::now()
    }
}

/// Fails.
pub fn upgrade(_: IpAddr, _: &Grant) -> Result<(QueuePairAddress, ConnectQueuePair), Error> {
    fail()
}
