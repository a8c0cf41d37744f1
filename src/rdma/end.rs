//! One end of a connection by hand, for tests: it says and exposes what it is told to.
//!
//! An [`RdmaEnd`] is to RDMA what a connected socket is to TCP. It follows none of the protocol's rules, so
//! that tests can see what the other side makes of that. Calls block, but not for ever.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cm::{Event, EventChannel, Id, Kind};
use super::device::{Access, CompletionChannel, Device, Domain, Mr, PortAddress};
use super::out_of_band::{packet_numbers, port_of};
use super::queue_pair::{Completion, Message, QueuePair, Size};
use super::resolution::Resolution;
use super::{HANDSHAKE_MESSAGES, MESSAGE_BYTES, RdmaIncoming, no_rdma, parse_rejection, request};
use crate::connecting::{Awaited, finish, sleep};
use crate::error::{Class, Error, Status};
use crate::memory::{Arena, Slot, SlotRange};
use crate::message::{self, QueuePairAddress, RemoteRegion};
use crate::transport::{Incoming, downcast};

/// Receives that may be posted.
const RECEIVES_MAX: usize = 1100;
/// The longest message that it takes, and that it sends.
const MESSAGE_BYTES_MAX: usize = MESSAGE_BYTES + (64 << 10);
/// How long a work request may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a peer may do to memory that is exposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allow {
    /// Read it.
    Read,
    /// Write to it.
    Write,
}

#[derive(Debug)]
enum Arrived {
    Message(Message),
    /// Data with a response in its immediate data.
    Placed {
        immediate: u32,
        len: u32,
        receive: Message,
    },
}

/// See the module documentation.
#[derive(Debug)]
pub struct RdmaEnd {
    qp: QueuePair,
    domain: Arc<Domain>,
    _channel: Arc<CompletionChannel>,
    /// rdma_cm's, if that makes the connection; else the port.
    made_by: Result<Arc<EventChannel>, PortAddress>,
    /// What is exposed, for ever.
    open: Vec<(Slot, Mr)>,
    inbox: VecDeque<Arrived>,
    /// What a READ has brought.
    fetched: Option<SlotRange>,
    has_failed: bool,
}

/// The next event, once it is there.
fn wait(events: &Arc<EventChannel>, deadline: Instant) -> std::io::Result<Event> {
    loop {
        match events.next() {
            Some(event) => return Ok(event),
            None if Instant::now() >= deadline => return Err(std::io::ErrorKind::TimedOut.into()),
            None => drop(sleep(&[Awaited::input(events.fd())], deadline)),
        }
    }
}

impl RdmaEnd {
    /// Asks the listener at `address` for a connection, saying `private_data`, or what a client says.
    pub fn connect(
        address: SocketAddr,
        source: Option<IpAddr>,
        private_data: Option<&[u8]>,
    ) -> Result<Self, Error> {
        super::device::devices().map_err(no_rdma)?;
        let failed = |source| Error::io(format!("Cannot connect to {address} by RDMA"), source);
        let deadline = Instant::now() + PATIENCE;
        let events = EventChannel::new().map_err(failed)?;
        let source = source.map(|ip| SocketAddr::new(ip, 0));
        let id = finish(&mut Resolution::new(&events, source, address, deadline)).map_err(failed)?;
        let end = Self::new(id, &events)?;
        let reads = end.domain.device.limits().map_err(failed)?.reads_in;
        end.qp.id().connect(private_data.unwrap_or(&request()), reads).map_err(failed)?;
        let event = wait(&events, deadline).map_err(failed)?;
        if event.kind == Kind::Established {
            return Ok(end);
        }
        Err(match parse_rejection(&event.private_data) {
            Some((errno, text)) => {
                Error::Rejected { status: Status { errno, class: Class::Policy, retryable: false }, text }
            }
            None => failed(std::io::Error::from_raw_os_error(libc::ECONNREFUSED)),
        })
    }

    /// Agrees to a connection that was asked for.
    pub fn accept(incoming: Box<dyn Incoming>) -> Result<Self, Error> {
        let failed = |source| Error::io("Cannot accept an RDMA connection", source);
        let incoming = downcast(incoming).map_err(|_| no_rdma("it is asked for in another way"))?;
        let RdmaIncoming { mut id, reads_out } = *incoming;
        let events = EventChannel::new().map_err(failed)?;
        id.migrate(&events).map_err(failed)?;
        let end = Self::new(id, &events)?;
        end.qp.id().accept(&request(), reads_out).map_err(failed)?;
        Ok(end)
    }

    /// An end that is to be joined with another by hand, on the port that has the address `local`; and what
    /// to tell the other side.
    pub fn unjoined(local: IpAddr) -> Result<(Self, QueuePairAddress), Error> {
        let at = port_of(local)?;
        let mut end = Self::unconnected(None, at.device, Err(at))?;
        let failed = |source| Error::io("Cannot make a queue pair", source);
        end.qp.init(&at, true).map_err(failed)?;
        end.qp.provide_receives(HANDSHAKE_MESSAGES)?;
        let (psn, peer_psn) = packet_numbers();
        let reads = at.device.limits().map_err(failed)?.reads_in;
        let ours = end.qp.address(&at, psn, peer_psn, reads.into());
        Ok((end, ours))
    }

    /// Joins it with the other end.
    pub fn join(&mut self, ours: &QueuePairAddress, theirs: &QueuePairAddress) -> Result<(), Error> {
        let Err(at) = &self.made_by else { return Err(no_rdma("rdma_cm has made this connection")) };
        let joined = self.qp.join(at, ours, theirs, theirs.reads.min(16) as u8);
        joined.map_err(|source| Error::io("Cannot join two queue pairs", source))
    }

    fn new(id: Id, events: &Arc<EventChannel>) -> Result<Self, Error> {
        let device = id.device().ok_or_else(|| no_rdma("the address belongs to no device"))?;
        let mut end = Self::unconnected(Some(id), device, Ok(Arc::clone(events)))?;
        end.qp.provide_receives(HANDSHAKE_MESSAGES)?;
        Ok(end)
    }

    fn unconnected(
        id: Option<Id>,
        device: Device,
        made_by: Result<Arc<EventChannel>, PortAddress>,
    ) -> Result<Self, Error> {
        let limits = device.limits().map_err(|source| Error::io("Cannot use the RDMA device", source))?;
        let domain = Domain::new(device)?;
        let channel = CompletionChannel::new(device)?;
        let size = Size {
            sends: 64,
            receives: RECEIVES_MAX,
            receive_bytes: MESSAGE_BYTES_MAX,
            send_bytes: 2 * MESSAGE_BYTES_MAX,
        };
        let qp = QueuePair::new(id, &domain, &channel, 0, &limits, &size, true)?;
        Ok(Self {
            qp,
            domain,
            _channel: channel,
            made_by,
            open: Vec::new(),
            inbox: VecDeque::new(),
            fetched: None,
            has_failed: false,
        })
    }

    /// Posts so many receives in all.
    pub fn set_receives(&mut self, receives: usize) -> Result<(), Error> {
        self.qp.provide_receives(receives)
    }

    fn look(&mut self) {
        while self.qp.look() {
            match self.qp.next() {
                Some(Completion::Received(message)) => self.inbox.push_back(Arrived::Message(message)),
                Some(Completion::Placed { immediate, len, receive }) => {
                    self.inbox.push_back(Arrived::Placed { immediate, len, receive });
                }
                Some(Completion::Failed(_)) => self.has_failed = true,
                Some(Completion::Read(_, range)) => self.fetched = Some(range),
                None => {}
            }
            if self.has_failed {
                return;
            }
        }
        while let Some(event) = self.made_by.as_ref().ok().and_then(EventChannel::next) {
            if matches!(event.kind, Kind::Disconnected | Kind::DeviceRemoved | Kind::Rejected) {
                // What came before it counts.
                while self.qp.look() {
                    match self.qp.next() {
                        Some(Completion::Received(message)) => {
                            self.inbox.push_back(Arrived::Message(message))
                        }
                        Some(Completion::Placed { immediate, len, receive }) => {
                            self.inbox.push_back(Arrived::Placed { immediate, len, receive });
                        }
                        _ => {}
                    }
                }
                self.has_failed = true;
            }
        }
    }

    /// Posts what is chained, and waits until it has ended. Whether it went well.
    fn complete(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        if self.has_failed || self.qp.post(true).is_err() {
            return false;
        }
        while !self.qp.is_idle() && !self.has_failed && Instant::now() < deadline {
            self.look();
            std::thread::yield_now();
        }
        self.qp.is_idle() && !self.has_failed
    }

    /// Sends a whole message. False if the other side does not take it (any more).
    pub fn send(&mut self, message: &[u8]) -> bool {
        self.look();
        assert!(
            self.qp.has_room_for(message.len()),
            "a message for this end has at most {MESSAGE_BYTES_MAX} bytes"
        );
        self.qp.send(std::iter::once(message), message.len());
        self.complete()
    }

    /// What came next: messages, one or more. Its receive is posted again. Of data with immediate data it is
    /// the response that a message would have had.
    pub fn receive(&mut self) -> Option<Vec<u8>> {
        self.look();
        let bytes = match self.inbox.pop_front()? {
            Arrived::Message(message) => {
                let bytes = self.qp.bytes(&message).to_vec();
                self.qp.give_back(message);
                bytes
            }
            Arrived::Placed { immediate, len, receive } => {
                self.qp.give_back(receive);
                let mut bytes = Vec::new();
                message::ResponseHeader::of_data(immediate.into(), len).encode(&[], false, &mut bytes);
                bytes
            }
        };
        let _ = self.qp.post_receives();
        Some(bytes)
    }

    /// Whether nothing more will come.
    pub fn has_lost_peer(&mut self) -> bool {
        self.look();
        self.has_failed && self.inbox.is_empty()
    }

    fn memory(&self, len: usize, access: Access) -> Result<(Slot, Mr), Error> {
        let no_memory = |source| Error::io("There is no memory to expose", source);
        let mut arena = Arena::new(len, len).map_err(no_memory)?;
        let slot = arena.alloc(len).ok_or_else(|| no_memory(std::io::ErrorKind::OutOfMemory.into()))?;
        let mr = Mr::of_mapping(&self.domain, &arena.mapping(), access)?;
        Ok((slot, mr))
    }

    /// Lays `len` bytes open, rounded up to whole pages. Gives their address and key.
    pub fn expose(&mut self, allow: Allow, len: usize) -> Result<(u64, u32), Error> {
        let access = if allow == Allow::Read { Access::RemoteRead } else { Access::RemoteWrite };
        let (slot, mr) = self.memory(len, access)?;
        let found = (slot.bytes().as_ptr().expose_provenance() as u64, mr.rkey());
        self.open.push((slot, mr));
        Ok(found)
    }

    /// Writes data to the peer's memory. False if the peer does not allow it, or is gone.
    pub fn place(&mut self, region: RemoteRegion, data: &[u8]) -> bool {
        let RemoteRegion::In { address, key, .. } = region else { return data.is_empty() };
        if data.is_empty() {
            return true;
        }
        let Ok((mut slot, mr)) = self.memory(data.len(), Access::Local) else { return false };
        slot.bytes_mut()[..data.len()].copy_from_slice(data);
        self.qp.write(SlotRange { slot, start: 0, len: data.len() }, &mr, address, key, None);
        self.complete()
    }

    /// Reads `len` bytes of the peer's memory. None if the peer does not allow it, or is gone.
    pub fn fetch(&mut self, address: u64, key: u32, len: usize) -> Option<Vec<u8>> {
        let (slot, mr) = self.memory(len, Access::LocalWrite).ok()?;
        self.fetched = None;
        self.qp.read(0, SlotRange { slot, start: 0, len }, &mr, address, key);
        let is_complete = self.complete();
        self.fetched.take().filter(|_| is_complete).map(|range| range.bytes().to_vec())
    }
}

impl Drop for RdmaEnd {
    fn drop(&mut self) {
        self.qp.disconnect();
    }
}
