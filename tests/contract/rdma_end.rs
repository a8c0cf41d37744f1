//! One end of an RDMA connection by hand. A build without RDMA has none.

use std::net::{IpAddr, SocketAddr};

use raio_transport::error::Error;
use raio_transport::loopback::Access;
use raio_transport::message::{QueuePairAddress, RemoteRegion};
use raio_transport::transport::Incoming;

/// It says and exposes what it is told to.
pub trait End: Send {
    /// Joins it with another, if it was made by [`unjoined`].
    fn join(&mut self, ours: &QueuePairAddress, theirs: &QueuePairAddress) -> Result<(), Error>;
    fn set_receives(&mut self, receives: usize) -> Result<(), Error>;
    /// Sends a whole message. False if the other side does not take it (any more).
    fn send(&mut self, message: &[u8]) -> bool;
    fn receive(&mut self) -> Option<Vec<u8>>;
    fn has_lost_peer(&mut self) -> bool;
    /// Exposes so many bytes. Returns their address and key.
    fn expose(&mut self, access: Access, len: usize) -> Result<(u64, u32), Error>;
    /// Writes data to the peer's memory. False if the peer does not allow it, or is gone.
    fn place(&mut self, region: RemoteRegion, data: &[u8]) -> bool;
    /// Reads `len` bytes of the peer's memory. None if the peer does not allow it, or is gone.
    fn fetch(&mut self, address: u64, key: u32, len: usize) -> Option<Vec<u8>>;
}

pub use made::*;

#[cfg(feature = "rdma")]
mod made {
    use raio_transport::rdma::{Allow, RdmaEnd};

    use super::*;

    /// Asks the listener there for a connection, saying this, or what a client says.
    pub fn connect(to: SocketAddr, from: Option<IpAddr>, data: Option<&[u8]>) -> Result<Box<dyn End>, Error> {
        Ok(Box::new(RdmaEnd::connect(to, from, data)?))
    }

    /// Agrees to a connection that was asked for.
    pub fn accept(incoming: Box<dyn Incoming>) -> Result<Box<dyn End>, Error> {
        Ok(Box::new(RdmaEnd::accept(incoming)?))
    }

    /// An end on the port that has the address `local`, and what to tell the other side.
    pub fn unjoined(local: IpAddr) -> Result<(Box<dyn End>, QueuePairAddress), Error> {
        let (end, ours) = RdmaEnd::unjoined(local)?;
        Ok((Box::new(end), ours))
    }

    impl End for RdmaEnd {
        fn join(&mut self, ours: &QueuePairAddress, theirs: &QueuePairAddress) -> Result<(), Error> {
            self.join(ours, theirs)
        }

        fn set_receives(&mut self, receives: usize) -> Result<(), Error> {
            self.set_receives(receives)
        }

        fn send(&mut self, message: &[u8]) -> bool {
            self.send(message)
        }

        fn receive(&mut self) -> Option<Vec<u8>> {
            self.receive()
        }

        fn has_lost_peer(&mut self) -> bool {
            self.has_lost_peer()
        }

        fn expose(&mut self, access: Access, len: usize) -> Result<(u64, u32), Error> {
            let allow = if access == Access::Read { Allow::Read } else { Allow::Write };
            self.expose(allow, len)
        }

        fn place(&mut self, region: RemoteRegion, data: &[u8]) -> bool {
            self.place(region, data)
        }

        fn fetch(&mut self, address: u64, key: u32, len: usize) -> Option<Vec<u8>> {
            self.fetch(address, key, len)
        }
    }
}

#[cfg(not(feature = "rdma"))]
mod made {
    use super::*;

    fn fail<T>() -> Result<T, Error> {
        Err(Error::Unsupported("no test over RDMA runs without it".into()))
    }

    pub fn connect(_: SocketAddr, _: Option<IpAddr>, _: Option<&[u8]>) -> Result<Box<dyn End>, Error> {
        fail()
    }

    pub fn accept(_: Box<dyn Incoming>) -> Result<Box<dyn End>, Error> {
        fail()
    }

    pub fn unjoined(_: IpAddr) -> Result<(Box<dyn End>, QueuePairAddress), Error> {
        fail()
    }
}
