//! Connecting: rdma_cm's identifiers and events.
//!
//! An [`Id`] is to RDMA what a socket is to TCP: it listens, or it is one connection and has its queue pair.
//! It belongs to one event channel at a time and keeps that alive. Each event is copied out of the library
//! and acknowledged at once, so that nothing ever waits for an acknowledgement.

use socket2::SockAddr;
use std::ffi::c_void;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::tuning::{ACK_RETRIES, ACK_TIMEOUT, RDMA_BACKLOG, RNR_RETRIES};

use super::device::{Device, Domain, devices};
use super::verbs::{self, Verbs, check, not_null, rdma_cm_id, verbs};

/// Where events of identifiers arrive.
#[derive(Debug)]
pub(super) struct EventChannel {
    raw: NonNull<verbs::rdma_event_channel>,
    verbs: &'static Verbs,
}

// SAFETY: librdmacm allows any thread to use an event channel.
unsafe impl Send for EventChannel {}
// SAFETY: as above.
unsafe impl Sync for EventChannel {}

/// What happened to an identifier.
#[derive(Debug)]
pub(super) struct Event {
    pub kind: Kind,
    /// What [`Id::set_tag`] said; for a request, of the listening one.
    pub tag: u64,
    /// 0, or why it failed.
    pub status: i32,
    /// What the peer sent along.
    pub private_data: Vec<u8>,
    /// RDMA READs that this side may have outstanding, at most.
    pub reads_out: u8,
    /// A connection that is asked for.
    pub incoming: Option<Id>,
}

/// The kinds of events that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Resolved,
    Request,
    Established,
    /// The peer, or the network, says no.
    Rejected,
    Disconnected,
    DeviceRemoved,
    Other,
}

impl Event {
    /// Whether the address or the route is resolved, or why not.
    pub fn resolved(&self) -> io::Result<()> {
        match self.kind {
            Kind::Resolved => Ok(()),
            _ => Err(io::Error::from_raw_os_error(match self.status.abs() {
                0 => libc::EHOSTUNREACH,
                errno => errno,
            })),
        }
    }
}

impl EventChannel {
    pub fn new() -> io::Result<Arc<Self>> {
        // Which also finds the libraries.
        devices().map_err(|reason| io::Error::new(io::ErrorKind::Unsupported, reason))?;
        let verbs = verbs().map_err(|reason| io::Error::new(io::ErrorKind::Unsupported, reason))?;
        // SAFETY: it takes nothing.
        let this = Self { raw: not_null(unsafe { (verbs.rdma_create_event_channel)() })?, verbs };
        rustix::io::ioctl_fionbio(this.fd(), true)?;
        Ok(Arc::new(this))
    }

    /// Readable when an event has come.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is alive, and its descriptor with it.
        unsafe { BorrowedFd::borrow_raw(self.raw.as_ref().fd) }
    }

    /// The same, to keep.
    pub fn owned_fd(&self) -> io::Result<OwnedFd> {
        self.fd().try_clone_to_owned()
    }

    /// The next event. None if there is none now.
    pub fn next(self: &Arc<Self>) -> Option<Event> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the channel is alive and does not block, and `raw` may be written.
        if unsafe { (self.verbs.rdma_get_cm_event)(self.raw.as_ptr(), &mut raw) } != 0 {
            return None;
        }
        // SAFETY: the event is the library's until it is acknowledged below.
        let event = unsafe { &*raw };
        let kind = match event.event {
            verbs::RDMA_CM_EVENT_ADDR_RESOLVED | verbs::RDMA_CM_EVENT_ROUTE_RESOLVED => Kind::Resolved,
            verbs::RDMA_CM_EVENT_CONNECT_REQUEST => Kind::Request,
            verbs::RDMA_CM_EVENT_ESTABLISHED => Kind::Established,
            verbs::RDMA_CM_EVENT_ADDR_ERROR
            | verbs::RDMA_CM_EVENT_ROUTE_ERROR
            | verbs::RDMA_CM_EVENT_CONNECT_ERROR
            | verbs::RDMA_CM_EVENT_UNREACHABLE
            | verbs::RDMA_CM_EVENT_REJECTED => Kind::Rejected,
            verbs::RDMA_CM_EVENT_DISCONNECTED => Kind::Disconnected,
            verbs::RDMA_CM_EVENT_DEVICE_REMOVAL => Kind::DeviceRemoved,
            _ => Kind::Other,
        };
        let (mut private_data, mut reads_out) = (Vec::new(), 0);
        if matches!(
            event.event,
            verbs::RDMA_CM_EVENT_CONNECT_REQUEST
                | verbs::RDMA_CM_EVENT_ESTABLISHED
                | verbs::RDMA_CM_EVENT_REJECTED
        ) {
            // SAFETY: these events of connected services have this member of the union.
            let conn = unsafe { event.param.conn };
            reads_out = conn.initiator_depth;
            if !conn.private_data.is_null() {
                // SAFETY: the library vouches for so many bytes until the event is acknowledged.
                let bytes = unsafe {
                    std::slice::from_raw_parts(conn.private_data.cast::<u8>(), conn.private_data_len.into())
                };
                private_data = bytes.to_vec();
            }
        }
        // SAFETY: the identifier of an event is alive until the event is acknowledged.
        let tag = unsafe { (*event.id).context }.expose_provenance() as u64;
        let incoming = (kind == Kind::Request)
            .then(|| NonNull::new(event.id))
            .flatten()
            // A new identifier, which is nobody else's.
            .map(|raw| Id { raw, channel: Arc::clone(self), verbs: self.verbs });
        let status = event.status;
        // SAFETY: it is the event just got, acknowledged once; nothing of it is used afterwards.
        unsafe { (self.verbs.rdma_ack_cm_event)(raw) };
        Some(Event { kind, tag, status, private_data, reads_out, incoming })
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: identifiers hold references to their channel, so there are none.
        unsafe { (self.verbs.rdma_destroy_event_channel)(self.raw.as_ptr()) };
    }
}

/// A listening or connecting identifier, or a connection.
#[derive(Debug)]
pub(super) struct Id {
    raw: NonNull<rdma_cm_id>,
    channel: Arc<EventChannel>,
    verbs: &'static Verbs,
}

// SAFETY: librdmacm allows any thread to use an identifier; whoever owns this value is the only one who does.
unsafe impl Send for Id {}

/// librdmacm takes addresses by mutable pointers, which it does not write through.
fn raw_address(address: &SockAddr) -> *mut verbs::sockaddr {
    address.as_ptr().cast_mut().cast()
}

impl Id {
    pub fn new(channel: &Arc<EventChannel>) -> io::Result<Self> {
        let verbs = channel.verbs;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the channel is alive and `raw` may be written.
        check(unsafe {
            (verbs.rdma_create_id)(channel.raw.as_ptr(), &mut raw, std::ptr::null_mut(), verbs::RDMA_PS_TCP)
        })?;
        Ok(Self { raw: not_null(raw)?, channel: Arc::clone(channel), verbs })
    }

    /// Listens. Returns the address with the actual port.
    pub fn listen(&self, address: SocketAddr) -> io::Result<SocketAddr> {
        let raw = SockAddr::from(address);
        // SAFETY: the identifier is alive and the address is one.
        check(unsafe { (self.verbs.rdma_bind_addr)(self.raw.as_ptr(), raw_address(&raw)) })?;
        // SAFETY: the identifier is alive.
        check(unsafe { (self.verbs.rdma_listen)(self.raw.as_ptr(), RDMA_BACKLOG) })?;
        Ok(SocketAddr::new(address.ip(), self.local_port().unwrap_or_default()))
    }

    /// The address of the other side.
    pub fn peer(&self) -> Option<SocketAddr> {
        // SAFETY: the identifier is alive.
        let address = unsafe { self.raw.as_ref().route.addr.__bindgen_anon_2 };
        // SAFETY: every member of the union is plain bytes, which librdmacm has zeroed or filled; each is
        // read as what the family says.
        unsafe {
            match i32::from(address.dst_addr.sa_family) {
                libc::AF_INET => {
                    let address = address.dst_sin;
                    let ip = Ipv4Addr::from(address.sin_addr.s_addr.to_ne_bytes());
                    Some(SocketAddr::new(ip.into(), u16::from_be(address.sin_port)))
                }
                libc::AF_INET6 => {
                    let address = address.dst_sin6;
                    let ip = Ipv6Addr::from(address.sin6_addr.__in6_u.__u6_addr8);
                    Some(SocketAddr::new(ip.into(), u16::from_be(address.sin6_port)))
                }
                _ => None,
            }
        }
    }

    /// The port of this side, which the other side knows, too. None before it has one. In the host's order.
    pub fn local_port(&self) -> Option<u16> {
        // SAFETY: the identifier is alive.
        let port = u16::from_be(unsafe { (self.verbs.rdma_get_src_port)(self.raw.as_ptr()) });
        (port != 0).then_some(port)
    }

    /// Takes an address of this machine, which tells the device and the port that it belongs to.
    pub fn bind(&self, address: IpAddr) -> io::Result<()> {
        let raw = SockAddr::from(SocketAddr::new(address, 0));
        // SAFETY: the identifier is alive and the address is one.
        check(unsafe { (self.verbs.rdma_bind_addr)(self.raw.as_ptr(), raw_address(&raw)) })
    }

    /// The port of [`Id::device`] that the connection goes through.
    pub fn port(&self) -> u8 {
        // SAFETY: the identifier is alive.
        unsafe { self.raw.as_ref() }.port_num
    }

    /// Begins to look for the device with the way to an address, from `source` if that is given, within `ms`
    /// milliseconds: [`Event::resolved`].
    pub fn resolve_address(
        &self,
        source: Option<SocketAddr>,
        address: SocketAddr,
        ms: i32,
    ) -> io::Result<()> {
        let source = source.map(SockAddr::from);
        let raw_source = source.as_ref().map_or(std::ptr::null_mut(), raw_address);
        let raw = SockAddr::from(address);
        // SAFETY: the identifier is alive; the addresses are, or one is null.
        check(unsafe { (self.verbs.rdma_resolve_addr)(self.raw.as_ptr(), raw_source, raw_address(&raw), ms) })
    }

    /// Begins to look for the route, once the address is resolved.
    pub fn resolve_route(&self, ms: i32) -> io::Result<()> {
        self.set_ack_timeout();
        // SAFETY: the identifier is alive.
        check(unsafe { (self.verbs.rdma_resolve_route)(self.raw.as_ptr(), ms) })
    }

    fn set_ack_timeout(&self) {
        let mut timeout = ACK_TIMEOUT;
        // SAFETY: the identifier is alive and the option is a byte. An old kernel has no such option, and its
        // own value then.
        unsafe {
            (self.verbs.rdma_set_option)(
                self.raw.as_ptr(),
                verbs::RDMA_OPTION_ID as i32,
                verbs::RDMA_OPTION_ID_ACK_TIMEOUT as i32,
                (&raw mut timeout).cast(),
                1,
            );
        }
    }

    /// The device that the connection goes through.
    pub fn device(&self) -> Option<Device> {
        // SAFETY: the identifier is alive, and its context is null or librdmacm's.
        unsafe { Device::of(self.raw.as_ref().verbs, self.verbs) }
    }

    /// Has the events of this identifier carry `tag`.
    pub fn set_tag(&mut self, tag: u64) {
        // SAFETY: the identifier is alive and this value its only owner; the library does not look at this
        // field.
        unsafe { self.raw.as_mut() }.context = std::ptr::without_provenance_mut(tag as usize);
    }

    /// Has its events arrive at another channel.
    pub fn migrate(&mut self, channel: &Arc<EventChannel>) -> io::Result<()> {
        // SAFETY: both are alive, and no event of this identifier is unacknowledged.
        check(unsafe { (self.verbs.rdma_migrate_id)(self.raw.as_ptr(), channel.raw.as_ptr()) })?;
        self.channel = Arc::clone(channel);
        Ok(())
    }

    /// Makes its queue pair. `attr` says how many work requests it really has afterwards.
    pub fn create_qp(
        &self,
        domain: &Domain,
        attr: &mut verbs::ibv_qp_init_attr,
    ) -> io::Result<NonNull<verbs::ibv_qp>> {
        // SAFETY: all are alive; the queues in `attr` are the caller's.
        check(unsafe { (self.verbs.rdma_create_qp)(self.raw.as_ptr(), domain.raw(), attr) })?;
        // SAFETY: the identifier is alive.
        not_null(unsafe { self.raw.as_ref() }.qp)
    }

    /// Forgets its queue pair, which the caller has destroyed.
    pub fn forget_qp(&mut self) {
        // SAFETY: the identifier is alive and this value its only owner.
        unsafe { self.raw.as_mut() }.qp = std::ptr::null_mut();
    }

    /// Asks for a connection; an event says how that went.
    pub fn connect(&self, private_data: &[u8], reads_in: u8) -> io::Result<()> {
        let mut param = verbs::rdma_conn_param {
            private_data: private_data.as_ptr().cast(),
            private_data_len: private_data.len() as u8,
            responder_resources: reads_in,
            initiator_depth: 0,
            retry_count: ACK_RETRIES,
            rnr_retry_count: RNR_RETRIES,
            ..Default::default()
        };
        // SAFETY: the identifier is alive, and the private data for the length of the call.
        check(unsafe { (self.verbs.rdma_connect)(self.raw.as_ptr(), &mut param) })
    }

    /// Agrees to a connection that was asked for; an event says when it is there.
    pub fn accept(&self, private_data: &[u8], reads_out: u8) -> io::Result<()> {
        self.set_ack_timeout();
        let mut param = verbs::rdma_conn_param {
            private_data: private_data.as_ptr().cast(),
            private_data_len: private_data.len() as u8,
            responder_resources: 0,
            initiator_depth: reads_out,
            rnr_retry_count: RNR_RETRIES,
            ..Default::default()
        };
        // SAFETY: as in `connect`.
        check(unsafe { (self.verbs.rdma_accept)(self.raw.as_ptr(), &mut param) })
    }

    /// Turns down a connection that was asked for.
    pub fn reject(&self, private_data: &[u8]) {
        // SAFETY: as in `connect`. If it fails the peer has given up already.
        unsafe {
            (self.verbs.rdma_reject)(
                self.raw.as_ptr(),
                private_data.as_ptr().cast::<c_void>(),
                private_data.len() as u8,
            );
        }
    }

    /// Ends a connection: its queue pair goes to its error state, and the peer is told.
    pub fn disconnect(&self) {
        // SAFETY: the identifier is alive. If it fails the connection has ended already.
        unsafe { (self.verbs.rdma_disconnect)(self.raw.as_ptr()) };
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        // SAFETY: it is destroyed once, its queue pair before it, and none of its events is unacknowledged.
        unsafe { (self.verbs.rdma_destroy_id)(self.raw.as_ptr()) };
    }
}
