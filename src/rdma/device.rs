//! Devices, and what belongs to one: protection domains, memory registrations, completion channels.
//!
//! librdmacm opens each device once for the process and keeps it open; a [`Device`] is that one. Everything
//! else here ends with its last reference, in the order that the library wants.

use std::ffi::c_void;
use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use super::verbs::{self, Verbs, ibv_context, verbs};
use crate::error::Error;
use crate::memory::{Mapping, Region};
use crate::message::Link;
use crate::rdma_devices::{Gid, Port};

/// An open device. There are few, and they stay.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Device {
    context: NonNull<ibv_context>,
    verbs: &'static Verbs,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

impl PartialEq for Verbs {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for Verbs {}

// SAFETY: libibverbs allows any thread to use a context.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// What a device can do, as far as this transport asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Work requests in a queue.
    pub work_requests: usize,
    /// Completions in a queue.
    pub completions: usize,
    /// RDMA READs that a queue pair may have outstanding as the one who asks, and as the one who answers.
    pub reads_out: u8,
    pub reads_in: u8,
    /// The longest message.
    pub message_bytes: u32,
    /// It speaks iWARP, where memory that an RDMA READ fills must be writable from afar.
    pub is_iwarp: bool,
    /// It has memory windows of type 2B: see [`Window`].
    pub has_windows: bool,
}

/// A port that a queue pair can be on, and the GID that its packets come from.
#[derive(Clone, Copy, Debug)]
pub(super) struct PortAddress {
    pub device: Device,
    pub port: u8,
    pub gid_index: u8,
    pub gid: [u8; 16],
    pub link: Link,
    /// On InfiniBand.
    pub lid: u16,
    /// The most bytes of a packet.
    pub mtu: u32,
}

/// Loads the libraries and the drivers of all devices, and opens none. The error is why there is no device,
/// as the rest of an error message.
pub(super) fn load() -> Result<(), &'static str> {
    let verbs = verbs()?;
    let mut count = 0;
    // SAFETY: `count` may be written.
    let list = unsafe { (verbs.ibv_get_device_list)(&mut count) };
    if list.is_null() {
        return Err("there is no RDMA device, or its kernel modules (rdma_ucm, ib_uverbs) are not loaded");
    }
    // SAFETY: the list is the library's, and none of its devices is used.
    unsafe { (verbs.ibv_free_device_list)(list) };
    if count > 0 { Ok(()) } else { Err("there is no RDMA device") }
}

/// Every device, or why there is none, as the rest of an error message.
pub(super) fn devices() -> Result<&'static [Device], &'static str> {
    static DEVICES: OnceLock<(u32, Result<Vec<Device>, String>)> = OnceLock::new();
    let (process, devices) = DEVICES.get_or_init(|| (std::process::id(), find()));
    if *process != std::process::id() && devices.is_ok() {
        // The kernel rejects the parent's open devices to a child, and librdmacm has no others.
        return Err(
            "this process was forked from one that has used RDMA already; fork first, or use threads",
        );
    }
    devices.as_deref().map_err(String::as_str)
}

fn find() -> Result<Vec<Device>, String> {
    let verbs = verbs()?;
    let mut count = 0;
    // SAFETY: `count` may be written. The list is never freed, so that the devices stay open.
    let list = unsafe { (verbs.rdma_get_devices)(&mut count) };
    if list.is_null() {
        let error = io::Error::last_os_error();
        return Err(match error.raw_os_error() {
            Some(libc::ENODEV | libc::ENOSYS | libc::ENOENT) | None => {
                "there is no RDMA device, or its kernel modules (rdma_ucm, ib_uverbs) are not loaded".into()
            }
            _ => format!("the RDMA devices cannot be opened ({error})"),
        });
    }
    // SAFETY: the list has `count` entries.
    let contexts = unsafe { std::slice::from_raw_parts(list, count as usize) };
    let devices: Vec<_> = contexts
        .iter()
        .filter_map(|&context| Some(Device { context: NonNull::new(context)?, verbs }))
        .collect();
    if devices.is_empty() {
        return Err("there is no RDMA device".into());
    }
    Ok(devices)
}

impl Device {
    /// The device of this context.
    ///
    /// # Safety
    /// `context` is null or one of librdmacm's.
    pub unsafe fn of(context: *mut ibv_context, verbs: &'static Verbs) -> Option<Self> {
        Some(Self { context: NonNull::new(context)?, verbs })
    }

    pub fn name(&self) -> String {
        // SAFETY: the context is open, and so has a device, whose name is a C string that stays.
        unsafe { verbs::text((self.verbs.ibv_get_device_name)((*self.context.as_ptr()).device)) }
    }

    pub fn limits(&self) -> io::Result<Limits> {
        let mut attr = verbs::ibv_device_attr::default();
        // SAFETY: the context is open and `attr` may be written.
        verbs::check(unsafe { (self.verbs.ibv_query_device)(self.context.as_ptr(), &mut attr) })?;
        let message_bytes =
            (1..=attr.phys_port_cnt).filter_map(|port| Some(self.port_attr(port).ok()?.max_msg_sz)).min();
        // SAFETY: as above.
        let transport = unsafe { (*(*self.context.as_ptr()).device).transport_type };
        let reads = |n: i32| n.clamp(0, 128) as u8;
        Ok(Limits {
            work_requests: attr.max_qp_wr.max(1) as usize,
            completions: attr.max_cqe.max(1) as usize,
            reads_out: reads(attr.max_qp_init_rd_atom),
            reads_in: reads(attr.max_qp_rd_atom),
            message_bytes: message_bytes.unwrap_or(1 << 20).max(1 << 16),
            is_iwarp: transport == verbs::IBV_TRANSPORT_IWARP,
            has_windows: transport != verbs::IBV_TRANSPORT_IWARP
                && attr.device_cap_flags & verbs::IBV_DEVICE_MEM_WINDOW_TYPE_2B != 0,
        })
    }

    fn port_attr(&self, port: u8) -> io::Result<verbs::ibv_port_attr> {
        let mut attr = verbs::ibv_port_attr::default();
        // SAFETY: the context is open and `attr` may be written.
        verbs::check(unsafe { (self.verbs.ibv_query_port)(self.context.as_ptr(), port, &mut attr) })?;
        Ok(attr)
    }

    /// What `raio_server --list-devices` says of it.
    pub fn ports(&self) -> Vec<Port> {
        let mut attr = verbs::ibv_device_attr::default();
        // SAFETY: the context is open and `attr` may be written.
        if verbs::check(unsafe { (self.verbs.ibv_query_device)(self.context.as_ptr(), &mut attr) }).is_err() {
            return Vec::new();
        }
        (1..=attr.phys_port_cnt).map(|number| self.port(number)).collect()
    }

    fn port(&self, number: u8) -> Port {
        let attr = self.port_attr(number).unwrap_or_default();
        let is_ethernet = u32::from(attr.link_layer) == verbs::IBV_LINK_LAYER_ETHERNET;
        let gids = (0..attr.gid_tbl_len.max(0) as u32).filter_map(|index| self.gid(number, index)).collect();
        let state = match attr.state {
            verbs::IBV_PORT_ACTIVE => "active",
            verbs::IBV_PORT_DOWN => "down",
            verbs::IBV_PORT_INIT => "initialising",
            verbs::IBV_PORT_ARMED => "armed",
            _ => "unknown",
        };
        Port {
            number,
            state,
            link: if is_ethernet { "Ethernet" } else { "InfiniBand" },
            mtu: 128 << attr.active_mtu.min(5),
            gids,
        }
    }

    fn gid(&self, port: u8, index: u32) -> Option<Gid> {
        let mut entry = verbs::ibv_gid_entry::default();
        // SAFETY: the context is open, and `entry` may be written as far as its size says.
        let result = unsafe {
            (self.verbs._ibv_query_gid_ex)(
                self.context.as_ptr(),
                port.into(),
                index,
                &mut entry,
                0,
                size_of::<verbs::ibv_gid_entry>(),
            )
        };
        verbs::check(result).ok()?;
        // SAFETY: both variants of the union are sixteen plain bytes.
        let raw = unsafe { entry.gid.raw };
        let kind = match entry.gid_type {
            verbs::IBV_GID_TYPE_ROCE_V1 => "RoCE v1",
            verbs::IBV_GID_TYPE_ROCE_V2 => "RoCE v2",
            _ => "IB",
        };
        (raw != [0; 16]).then_some(Gid { index, address: raw.into(), kind })
    }

    /// How many ports it has.
    fn port_count(&self) -> u8 {
        let mut attr = verbs::ibv_device_attr::default();
        // SAFETY: the context is open and `attr` may be written.
        let queried =
            verbs::check(unsafe { (self.verbs.ibv_query_device)(self.context.as_ptr(), &mut attr) });
        if queried.is_ok() { attr.phys_port_cnt } else { 0 }
    }

    /// The Ethernet port that has the address, if it is up. RoCE v2, which can be routed, rather than v1.
    pub fn find_ethernet(&self, address: Ipv6Addr) -> Option<PortAddress> {
        (1..=self.port_count()).find_map(|port| {
            let attr = self.port_attr(port).ok()?;
            let mut found = None;
            for index in 0..attr.gid_tbl_len.clamp(0, 256) as u32 {
                match self.gid(port, index) {
                    Some(gid) if gid.address == address && gid.kind == "RoCE v2" => {
                        found = Some(index);
                        break;
                    }
                    Some(gid) if gid.address == address && gid.kind == "RoCE v1" => {
                        found = found.or(Some(index));
                    }
                    _ => {}
                }
            }
            self.port_address(port, found?, Link::Ethernet)
        })
    }

    /// A port by one of its GIDs, if it is up, and of this kind of network.
    pub fn port_address(&self, port: u8, gid_index: u32, link: Link) -> Option<PortAddress> {
        let attr = self.port_attr(port).ok()?;
        let layer = match link {
            Link::Ethernet => verbs::IBV_LINK_LAYER_ETHERNET,
            Link::InfiniBand => verbs::IBV_LINK_LAYER_INFINIBAND,
        };
        if attr.state != verbs::IBV_PORT_ACTIVE || u32::from(attr.link_layer) != layer {
            return None;
        }
        Some(PortAddress {
            device: *self,
            port,
            gid_index: u8::try_from(gid_index).ok()?,
            gid: self.gid(port, gid_index)?.address.octets(),
            link,
            lid: if link == Link::InfiniBand { attr.lid } else { 0 },
            mtu: 128 << attr.active_mtu.clamp(1, 5),
        })
    }

    /// The descriptor that is readable when something has happened to the device.
    pub fn async_fd(&self) -> io::Result<OwnedFd> {
        // SAFETY: the context is open, and so is its descriptor.
        let fd = unsafe { BorrowedFd::borrow_raw((*self.context.as_ptr()).async_fd) };
        rustix::io::ioctl_fionbio(fd, true)?;
        fd.try_clone_to_owned()
    }

    /// What has happened to the device since the last call, as texts. A queue pair that it happened to is
    /// moved to its error state, so that whoever has it hears of it.
    pub fn take_async_events(&self) -> Vec<String> {
        let mut texts = Vec::new();
        loop {
            let mut event = verbs::ibv_async_event::default();
            // SAFETY: the context is open, its descriptor does not block, and `event` may be written.
            if unsafe { (self.verbs.ibv_get_async_event)(self.context.as_ptr(), &mut event) } != 0 {
                return texts;
            }
            // SAFETY: the library gives static strings.
            let what = unsafe { verbs::text((self.verbs.ibv_event_type_str)(event.event_type)) };
            match event.event_type {
                verbs::IBV_EVENT_QP_FATAL | verbs::IBV_EVENT_QP_REQ_ERR | verbs::IBV_EVENT_QP_ACCESS_ERR => {
                    let mut attr =
                        verbs::ibv_qp_attr { qp_state: verbs::IBV_QPS_ERR, ..verbs::ibv_qp_attr::default() };
                    // SAFETY: this event is about a queue pair, which cannot be destroyed before the event is
                    // acknowledged below.
                    unsafe {
                        (self.verbs.ibv_modify_qp)(event.element.qp, &mut attr, verbs::IBV_QP_STATE as i32)
                    };
                    texts.push(what);
                }
                // Ordinary: the first message came before the handshake of rdma_cm had ended.
                verbs::IBV_EVENT_COMM_EST
                | verbs::IBV_EVENT_QP_LAST_WQE_REACHED
                | verbs::IBV_EVENT_GID_CHANGE
                | verbs::IBV_EVENT_PORT_ACTIVE => {}
                _ => texts.push(what),
            }
            // SAFETY: it is the event just got, acknowledged once.
            unsafe { (self.verbs.ibv_ack_async_event)(&mut event) };
        }
    }

    pub fn context(&self) -> *mut ibv_context {
        self.context.as_ptr()
    }
}

/// A protection domain: what is registered in it is for its queue pairs alone.
#[derive(Debug)]
pub(super) struct Domain {
    raw: NonNull<verbs::ibv_pd>,
    pub device: Device,
    verbs: &'static Verbs,
}

// SAFETY: libibverbs allows any thread to use a protection domain.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    pub fn new(device: Device) -> Result<Arc<Self>, Error> {
        // SAFETY: the context is open.
        let raw =
            verbs::not_null(unsafe { (device.verbs.ibv_alloc_pd)(device.context()) }).map_err(|source| {
                Error::io(format!("The RDMA device {} gives no protection domain", device.name()), source)
            })?;
        Ok(Arc::new(Self { raw, device, verbs: device.verbs }))
    }

    pub fn raw(&self) -> *mut verbs::ibv_pd {
        self.raw.as_ptr()
    }

    pub fn verbs(&self) -> &'static Verbs {
        self.verbs
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: whatever is in it holds a reference to it, so it is empty.
        unsafe { (self.verbs.ibv_dealloc_pd)(self.raw.as_ptr()) };
    }
}

/// Who may do what to registered memory, besides this side's device reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Nobody anything more.
    Local,
    /// This side's device may write to it: receives, and RDMA READs by this side.
    LocalWrite,
    /// The same where an RDMA READ's memory must be writable from afar (iWARP).
    LocalWriteIwarp,
    /// This side's device may write to it, and the peer may do what windows allow that are bound to parts of
    /// it.
    LocalWriteWindows,
    /// The peer may read it.
    RemoteRead,
    /// The peer may write to it.
    RemoteWrite,
}

/// Registered memory.
#[derive(Debug)]
pub(super) struct Mr {
    raw: NonNull<verbs::ibv_mr>,
    domain: Arc<Domain>,
    /// What is registered, if it is ours: it outlives the registration.
    mapping: Option<Arc<Mapping>>,
}

// SAFETY: libibverbs allows any thread to end a registration, and the keys are plain numbers.
unsafe impl Send for Mr {}
// SAFETY: as above.
unsafe impl Sync for Mr {}

impl Mr {
    /// Registers a whole mapping.
    pub fn of_mapping(domain: &Arc<Domain>, mapping: &Arc<Mapping>, access: Access) -> Result<Self, Error> {
        let (address, len) = mapping.extent();
        Self::register(domain, address, len, access, Some(Arc::clone(mapping)))
    }

    /// Registers a region of the caller's. Its pages stay pinned until the registration ends; the device
    /// touches them on behalf of buffers of the region that are in flight, and no others.
    pub fn of_region(domain: &Arc<Domain>, region: &Region, access: Access) -> Result<Self, Error> {
        let (address, len) = region.extent();
        Self::register(domain, address, len, access, None)
    }

    fn register(
        domain: &Arc<Domain>,
        address: usize,
        len: usize,
        access: Access,
        mapping: Option<Arc<Mapping>>,
    ) -> Result<Self, Error> {
        let flags = match access {
            Access::Local => 0,
            Access::LocalWrite => verbs::IBV_ACCESS_LOCAL_WRITE,
            Access::LocalWriteIwarp | Access::RemoteWrite => {
                verbs::IBV_ACCESS_LOCAL_WRITE | verbs::IBV_ACCESS_REMOTE_WRITE
            }
            Access::LocalWriteWindows => verbs::IBV_ACCESS_LOCAL_WRITE | verbs::IBV_ACCESS_MW_BIND,
            Access::RemoteRead => verbs::IBV_ACCESS_REMOTE_READ,
        };
        let pointer = std::ptr::with_exposed_provenance_mut::<c_void>(address);
        // SAFETY: registering pins pages and touches nothing. What the device later does in them is decided
        // by the work requests and the keys given out, for memory that is owned by the one who posts or lends
        // it.
        let raw = unsafe { (domain.verbs.ibv_reg_mr)(domain.raw(), pointer, len, flags as i32) };
        let raw = verbs::not_null(raw).map_err(|source| cannot_register(domain.device, len, source))?;
        Ok(Self { raw, domain: Arc::clone(domain), mapping })
    }

    /// Has the memory stay for ever.
    pub fn leak(&self) {
        std::mem::forget(self.mapping.clone());
    }

    pub fn raw(&self) -> *mut verbs::ibv_mr {
        self.raw.as_ptr()
    }

    pub fn lkey(&self) -> u32 {
        // SAFETY: the registration is alive.
        unsafe { self.raw.as_ref() }.lkey
    }

    pub fn rkey(&self) -> u32 {
        // SAFETY: the registration is alive.
        unsafe { self.raw.as_ref() }.rkey
    }
}

impl Drop for Mr {
    fn drop(&mut self) {
        // SAFETY: it is deregistered once; work requests that name it have ended, or their queue pair has
        // been destroyed before.
        unsafe { (self.domain.verbs.ibv_dereg_mr)(self.raw.as_ptr()) };
    }
}

/// A memory window of type 2B: bound to a part of a registration, by a work request, it has a key by which
/// the peer of that queue pair reaches this part alone, until another work request invalidates it. It has
/// another key each time.
#[derive(Debug)]
pub(super) struct Window {
    raw: NonNull<verbs::ibv_mw>,
    /// What it is bound to, which is not deregistered before.
    pub bound: Option<Arc<Mr>>,
    /// Last, for the window is in it.
    _domain: Arc<Domain>,
}

impl Window {
    pub fn new(domain: &Arc<Domain>) -> Result<Self, Error> {
        // SAFETY: the domain is alive.
        let raw = unsafe { verbs::alloc_window(domain.raw()) }.map_err(|source| {
            let device = domain.device.name();
            Error::io(
                format!("The RDMA device {device} gives no more memory windows; lower the queue depth"),
                source,
            )
        })?;
        Ok(Self { raw, bound: None, _domain: Arc::clone(domain) })
    }

    pub fn raw(&self) -> *mut verbs::ibv_mw {
        self.raw.as_ptr()
    }

    /// The key that it has, or had last.
    pub fn key(&self) -> u32 {
        // SAFETY: the window is alive.
        unsafe { self.raw.as_ref() }.rkey
    }

    /// The key that it will have when it is bound next: the low byte is the owner's to choose.
    pub fn next_key(&self) -> u32 {
        let key = self.key();
        (key & !0xff) | (key.wrapping_add(1) & 0xff)
    }

    /// What binds it has been posted: the library leaves it to its user to note the key.
    pub fn note_bound(&mut self) {
        let key = self.next_key();
        // SAFETY: the window is alive, and nobody else has it.
        unsafe { self.raw.as_mut() }.rkey = key;
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: it is ended once. Work requests that name it have ended, or their queue pair is about to be
        // destroyed: then they fail.
        if let Err(error) = unsafe { verbs::dealloc_window(self.raw.as_ptr()) } {
            tracing::error!(
                name: "rdma-window-kept",
                "An RDMA device does not let go of a memory window: {error}."
            );
        }
    }
}

fn cannot_register(device: Device, len: usize, source: io::Error) -> Error {
    let size =
        if len < 1 << 20 { format!("{} KiB", len.div_ceil(1 << 10)) } else { format!("{} MiB", len >> 20) };
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    match (source.raw_os_error(), limit) {
        (Some(libc::ENOMEM | libc::EAGAIN), Some(limit)) => Error::io(
            format!(
                "Cannot lock {size} for RDMA: the memlock limit is {} KiB. Raise it with `ulimit -l`, or set \
                 LimitMEMLOCK= in the unit",
                limit >> 10
            ),
            source,
        ),
        _ => Error::io(format!("Cannot register {size} with the RDMA device {}", device.name()), source),
    }
}

/// Where completion queues announce completions.
#[derive(Debug)]
pub(super) struct CompletionChannel {
    raw: NonNull<verbs::ibv_comp_channel>,
    verbs: &'static Verbs,
}

// SAFETY: libibverbs allows any thread to use a completion channel.
unsafe impl Send for CompletionChannel {}
// SAFETY: as above.
unsafe impl Sync for CompletionChannel {}

impl CompletionChannel {
    pub fn new(device: Device) -> Result<Arc<Self>, Error> {
        let failed = |source| {
            Error::io(
                format!("The RDMA device {} gives no completion channel; raise `ulimit -n`", device.name()),
                source,
            )
        };
        // SAFETY: the context is open.
        let raw = unsafe { (device.verbs.ibv_create_comp_channel)(device.context()) };
        let this = Self { raw: verbs::not_null(raw).map_err(failed)?, verbs: device.verbs };
        rustix::io::ioctl_fionbio(this.fd(), true).map_err(|errno| failed(errno.into()))?;
        Ok(Arc::new(this))
    }

    pub fn raw(&self) -> *mut verbs::ibv_comp_channel {
        self.raw.as_ptr()
    }

    /// Readable when an armed queue has had a completion.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is alive, and its descriptor with it.
        unsafe { BorrowedFd::borrow_raw(self.raw.as_ref().fd as RawFd) }
    }

    /// The contexts of the queues that have announced completions since the last call.
    pub fn take_events(&self, mut each: impl FnMut(u64)) {
        loop {
            let (mut cq, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
            // SAFETY: the channel is alive and does not block, and both may be written.
            if unsafe { (self.verbs.ibv_get_cq_event)(self.raw(), &mut cq, &mut context) } != 0 {
                return;
            }
            // SAFETY: the queue is alive: it cannot be destroyed before its events are acknowledged, and this
            // one is here, once.
            unsafe { (self.verbs.ibv_ack_cq_events)(cq, 1) };
            each(context.expose_provenance() as u64);
        }
    }
}

impl Drop for CompletionChannel {
    fn drop(&mut self) {
        // SAFETY: the queues that announce here hold references to it, so there are none.
        unsafe { (self.verbs.ibv_destroy_comp_channel)(self.raw.as_ptr()) };
    }
}
