//! A connection's queue pair with all the memory that its device may touch.
//!
//! What is posted is owned here until its completion: the slots whose data is written or read, the messages
//! that are sent, the buffers that receives fill. Work requests are gathered in a chain and posted together
//! ([`QueuePair::post`]): one doorbell, and only the last of them (and each RDMA READ, and now and then one
//! behind much data) asks for a completion. Completions of a queue come in order, so one ends all work
//! requests before it. Messages that follow one another in a chain travel in one SEND, as far as the peer's
//! receives have room. When a queue pair is dropped the device lets go of its memory first (it is destroyed,
//! which waits for that), then the memory comes free; should the device not let go, the memory is leaked.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use super::cm::Id;
use super::device::{Access, CompletionChannel, Domain, Limits, Mr, PortAddress, Window};
use super::verbs::{self, Verbs, check, ibv_sge, ibv_wc, not_null};
use crate::error::Error;
use crate::memory::{Arena, Slot, SlotRange};
use crate::message::{Link, QueuePairAddress};
use crate::tuning::{
    ACK_RETRIES, ACK_TIMEOUT, HOPS, QUEUE_INLINE_BYTES, QUEUE_POLL, RNR_RETRIES, RNR_TIMER, SIGNAL_BYTES,
    SPLIT_BYTES_MIN,
};

/// Tells a receive's `wr_id` from the others, which are sequence numbers.
const RECEIVE: u64 = 1 << 63;

/// How a queue pair is made.
pub(super) struct Size {
    /// Work requests that may be outstanding, not counting receives.
    pub sends: usize,
    /// Receives that may be posted.
    pub receives: usize,
    /// The longest message that may come.
    pub receive_bytes: usize,
    /// Room for messages that are being sent.
    pub send_bytes: usize,
}

/// What a SEND of the peer's has brought: a message or several. Its buffer comes back with
/// [`QueuePair::give_back`].
#[derive(Debug)]
pub(super) struct Message {
    index: u32,
    len: u32,
}

/// What a completion says.
#[derive(Debug)]
pub(super) enum Completion {
    Received(Message),
    /// An RDMA WRITE of so many bytes has come, with this immediate data. It has used up a receive, with
    /// nothing in its buffer.
    Placed {
        immediate: u32,
        len: u32,
        receive: Message,
    },
    /// An RDMA READ has filled the range.
    Read(u64, SlotRange),
    /// A work request failed, and with it the queue pair.
    Failed(Failure),
}

/// Why a work request failed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failure {
    pub status: verbs::ibv_wc_status,
    pub vendor: u32,
    pub is_receive: bool,
}

/// What was posted.
pub(super) struct Counters {
    /// Work requests, receives not counted.
    pub work_requests: u64,
    /// Chains of them.
    pub doorbells: u64,
}

/// A work request in the chain, or posted.
#[derive(Debug)]
struct Outstanding {
    /// The slot that it uses.
    range: Option<SlotRange>,
    /// It is an RDMA READ, of this name.
    read: Option<u64>,
    /// What a window was bound to that it invalidates.
    _mr: Option<Arc<Mr>>,
    /// Where the ring's tail is when it has ended.
    ring_end: u64,
}

/// What a window is bound to, so that the peer reaches it.
#[derive(Debug)]
pub(super) struct Binding {
    pub window: WindowId,
    pub mr: Arc<Mr>,
    pub address: u64,
    pub len: usize,
    /// Whether the peer may write to it; else it may read it.
    pub is_written: bool,
}

/// Names a window of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WindowId(u32);

/// Registered memory from which messages are sent, in order. Positions only grow.
#[derive(Debug)]
struct Ring {
    memory: Slot,
    mr: Mr,
    head: u64,
    tail: u64,
}

impl Ring {
    fn len(&self) -> u64 {
        self.memory.len() as u64
    }

    /// Where `len` bytes in one piece can go.
    fn place(&self, len: usize) -> Option<u64> {
        let at = self.head % self.len();
        let start = if at + len as u64 > self.len() { self.head + self.len() - at } else { self.head };
        (start + len as u64 - self.tail <= self.len()).then_some(start)
    }
}

/// Receive buffers that were registered together.
#[derive(Debug)]
struct Receives {
    memory: Slot,
    mr: Mr,
    first: u32,
}

/// See the module documentation.
pub(super) struct QueuePair {
    qp: NonNull<verbs::ibv_qp>,
    cq: NonNull<verbs::ibv_cq>,
    /// For sends, if they are not announced.
    send_cq: Option<NonNull<verbs::ibv_cq>>,
    /// None if it is connected by hand: see [`QueuePair::init`].
    id: Option<Id>,
    verbs: &'static Verbs,

    ring: Ring,
    receives: Vec<Receives>,
    receive_bytes: usize,
    /// Who holds each receive buffer: 0, the device; else so many holders of its message.
    holders: Vec<u32>,
    receives_max: usize,
    /// Receives to be posted.
    given_back: Vec<u32>,

    chain: Vec<verbs::ibv_send_wr>,
    chain_sges: Vec<ibv_sge>,
    /// Windows that the chain binds.
    chain_bound: Vec<WindowId>,
    /// Made when they are first needed.
    windows: Vec<Window>,
    /// Those that are not bound, or no longer when the chain has been executed.
    free_windows: Vec<WindowId>,
    /// In the chain, or posted and not known to have ended.
    outstanding: VecDeque<Outstanding>,
    /// The sequence number of the front of `outstanding`.
    front: u64,
    sends_max: usize,
    /// The longest SEND that messages are put together for.
    send_bytes_max: usize,
    inline_bytes: usize,
    /// Bytes of the slots in `outstanding` that are written from.
    held_bytes: usize,
    /// Bytes written by the chain since it last asked for a completion.
    unsignalled_bytes: usize,

    polled: VecDeque<Completion>,
    _channel: Arc<CompletionChannel>,
    domain: Arc<Domain>,
    pub counters: Counters,
}

// SAFETY: libibverbs allows any thread to use these objects, and whoever owns this value is the only one who
// does.
unsafe impl Send for QueuePair {}

impl std::fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueuePair").field("outstanding", &self.outstanding.len()).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Counters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} work requests, {} doorbells", self.work_requests, self.doorbells)
    }
}

/// A slot of its own mapping.
fn whole(bytes: usize) -> io::Result<(Arena, Slot)> {
    let mut arena = Arena::new(bytes, bytes)?;
    let slot = arena.alloc(bytes).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
    Ok((arena, slot))
}

fn register(domain: &Arc<Domain>, bytes: usize, access: Access) -> Result<(Slot, Mr), Error> {
    let (arena, slot) = whole(bytes).map_err(|source| {
        Error::io("There is no memory for the messages of a connection; free some", source)
    })?;
    let mr = Mr::of_mapping(domain, &arena.mapping(), access)?;
    Ok((slot, mr))
}

/// Which of so many receives are registered together: how many, and the bytes that take. A mapping's length
/// is a power of two, so several fill theirs better than one.
pub(super) fn registrations(mut count: usize, receive_bytes: usize) -> impl Iterator<Item = (usize, usize)> {
    std::iter::from_fn(move || {
        let bytes = (count * receive_bytes).next_power_of_two();
        let is_split = count > 1 && bytes > SPLIT_BYTES_MIN && count * receive_bytes < bytes / 4 * 3;
        let (n, bytes) = if is_split { (bytes / 2 / receive_bytes, bytes / 2) } else { (count, bytes) };
        count -= n;
        (n > 0).then_some((n, bytes))
    })
}

impl QueuePair {
    /// Makes the queue pair of a connection that is about to be: rdma_cm's `id`, or without one to be
    /// connected by hand. Completions are announced at `channel` with `context`; those of sends only if
    /// `announce_sends`.
    pub fn new(
        id: Option<Id>,
        domain: &Arc<Domain>,
        channel: &Arc<CompletionChannel>,
        context: u64,
        limits: &Limits,
        size: &Size,
        announce_sends: bool,
    ) -> Result<Self, Error> {
        let verbs = domain.verbs();
        let failed = |what: &str, source: io::Error| {
            Error::io(
                format!(
                    "The RDMA device {} gives no {what} for a connection; lower the queue depth",
                    domain.device.name()
                ),
                source,
            )
        };
        let (ring_memory, ring_mr) = register(domain, size.send_bytes, Access::Local)?;
        let sends_max = size.sends.min(limits.work_requests).min(limits.completions);
        let receives_max = size.receives.min(limits.work_requests);
        let create_cq = |entries: usize, channel: *mut verbs::ibv_comp_channel| {
            let context = std::ptr::without_provenance_mut::<c_void>(context as usize);
            // SAFETY: the device is open, and the channel null or alive and kept so below.
            let cq = unsafe {
                (verbs.ibv_create_cq)(
                    domain.device.context(),
                    entries.min(limits.completions) as i32,
                    context,
                    channel,
                    0,
                )
            };
            not_null(cq).map_err(|source| failed("completion queue", source))
        };
        let destroy_cq = |cq: NonNull<verbs::ibv_cq>| {
            // SAFETY: no queue pair uses it.
            unsafe { (verbs.ibv_destroy_cq)(cq.as_ptr()) };
        };
        let (cq, send_cq) = if announce_sends {
            (create_cq(sends_max + receives_max, channel.raw())?, None)
        } else {
            let cq = create_cq(receives_max, channel.raw())?;
            match create_cq(sends_max, std::ptr::null_mut()) {
                Ok(send_cq) => (cq, Some(send_cq)),
                Err(error) => {
                    destroy_cq(cq);
                    return Err(error);
                }
            }
        };
        let attr = |inline| verbs::ibv_qp_init_attr {
            send_cq: send_cq.unwrap_or(cq).as_ptr(),
            recv_cq: cq.as_ptr(),
            cap: verbs::ibv_qp_cap {
                max_send_wr: sends_max as u32,
                max_recv_wr: receives_max as u32,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: inline,
            },
            qp_type: verbs::IBV_QPT_RC,
            ..Default::default()
        };
        // A device that inlines less, or nothing, says EINVAL.
        let create_qp = |made: &mut verbs::ibv_qp_init_attr| match &id {
            Some(id) => id.create_qp(domain, made),
            // SAFETY: the domain is alive, and the queues are until the queue pair has been destroyed.
            None => not_null(unsafe { (verbs.ibv_create_qp)(domain.raw(), made) }),
        };
        let mut made = attr(QUEUE_INLINE_BYTES);
        let qp = create_qp(&mut made).or_else(|_| {
            made = attr(0);
            create_qp(&mut made)
        });
        let qp = match qp {
            Ok(qp) => qp,
            Err(source) => {
                destroy_cq(cq);
                send_cq.into_iter().for_each(destroy_cq);
                return Err(failed("queue pair", source));
            }
        };
        Ok(Self {
            qp,
            cq,
            send_cq,
            id,
            verbs,
            ring: Ring { memory: ring_memory, mr: ring_mr, head: 0, tail: 0 },
            receives: Vec::new(),
            receive_bytes: size.receive_bytes.next_multiple_of(64),
            holders: Vec::new(),
            receives_max,
            given_back: Vec::new(),
            chain: Vec::with_capacity(sends_max),
            chain_sges: Vec::with_capacity(sends_max),
            chain_bound: Vec::new(),
            windows: Vec::new(),
            free_windows: Vec::new(),
            outstanding: VecDeque::with_capacity(sends_max),
            front: 0,
            sends_max,
            send_bytes_max: 0,
            inline_bytes: made.cap.max_inline_data as usize,
            held_bytes: 0,
            unsignalled_bytes: 0,
            polled: VecDeque::with_capacity(QUEUE_POLL),
            _channel: Arc::clone(channel),
            domain: Arc::clone(domain),
            counters: Counters { work_requests: 0, doorbells: 0 },
        })
    }

    /// The connection, which rdma_cm makes.
    pub fn id(&self) -> &Id {
        self.id.as_ref().expect("it is connected by rdma_cm")
    }

    /// Ends the connection: nothing more is sent or received.
    pub fn disconnect(&self) {
        match &self.id {
            Some(id) => id.disconnect(),
            None => {
                let attr = verbs::ibv_qp_attr { qp_state: verbs::IBV_QPS_ERR, ..Default::default() };
                // If that fails the device is gone.
                let _ = self.modify(attr, verbs::IBV_QP_STATE);
            }
        }
    }

    // Connecting by hand
    // -------------------------------------------------------------------------------------------

    fn modify(&self, mut attr: verbs::ibv_qp_attr, mask: u32) -> io::Result<()> {
        // SAFETY: the queue pair is alive, and `attr` for the length of the call.
        check(unsafe { (self.verbs.ibv_modify_qp)(self.qp.as_ptr(), &mut attr, mask as i32) })
    }

    /// Puts it on a port: receives may be posted from now on. `is_open`: the peer may reach memory that it is
    /// given the keys of.
    pub fn init(&self, at: &PortAddress, is_open: bool) -> io::Result<()> {
        let remote = verbs::IBV_ACCESS_REMOTE_READ | verbs::IBV_ACCESS_REMOTE_WRITE;
        let attr = verbs::ibv_qp_attr {
            qp_state: verbs::IBV_QPS_INIT,
            port_num: at.port,
            qp_access_flags: verbs::IBV_ACCESS_LOCAL_WRITE | if is_open { remote } else { 0 },
            ..Default::default()
        };
        let mask =
            verbs::IBV_QP_STATE | verbs::IBV_QP_PKEY_INDEX | verbs::IBV_QP_PORT | verbs::IBV_QP_ACCESS_FLAGS;
        self.modify(attr, mask)
    }

    /// What the peer must know of it.
    pub fn address(&self, at: &PortAddress, psn: u32, peer_psn: u32, reads: u16) -> QueuePairAddress {
        QueuePairAddress {
            gid: at.gid,
            // SAFETY: the queue pair is alive.
            qpn: unsafe { self.qp.as_ref() }.qp_num,
            psn,
            peer_psn,
            mtu: at.mtu,
            lid: at.lid,
            reads,
            link: at.link,
        }
    }

    /// Connects it with the peer's, which is on the same kind of link, once both sides know both addresses.
    /// `reads_out`: RDMA READs that this side may have outstanding.
    pub fn join(
        &self,
        at: &PortAddress,
        ours: &QueuePairAddress,
        theirs: &QueuePairAddress,
        reads_out: u8,
    ) -> io::Result<()> {
        let is_ethernet = ours.link == Link::Ethernet;
        let attr = verbs::ibv_qp_attr {
            qp_state: verbs::IBV_QPS_RTR,
            // The library's numbers: 256 is 1, 4096 is 5.
            path_mtu: ours.mtu.min(theirs.mtu).ilog2() - 7,
            dest_qp_num: theirs.qpn,
            rq_psn: theirs.psn,
            max_dest_rd_atomic: ours.reads.min(255) as u8,
            min_rnr_timer: RNR_TIMER,
            ah_attr: verbs::ibv_ah_attr {
                grh: verbs::ibv_global_route {
                    dgid: verbs::ibv_gid { raw: theirs.gid },
                    sgid_index: at.gid_index,
                    hop_limit: HOPS,
                    ..Default::default()
                },
                dlid: theirs.lid,
                is_global: u8::from(is_ethernet),
                port_num: at.port,
                ..Default::default()
            },
            ..Default::default()
        };
        let mask = verbs::IBV_QP_STATE
            | verbs::IBV_QP_AV
            | verbs::IBV_QP_PATH_MTU
            | verbs::IBV_QP_DEST_QPN
            | verbs::IBV_QP_RQ_PSN
            | verbs::IBV_QP_MAX_DEST_RD_ATOMIC
            | verbs::IBV_QP_MIN_RNR_TIMER;
        self.modify(attr, mask)?;
        let attr = verbs::ibv_qp_attr {
            qp_state: verbs::IBV_QPS_RTS,
            timeout: ACK_TIMEOUT,
            retry_cnt: ACK_RETRIES,
            rnr_retry: RNR_RETRIES,
            sq_psn: ours.psn,
            max_rd_atomic: reads_out,
            ..Default::default()
        };
        let mask = verbs::IBV_QP_STATE
            | verbs::IBV_QP_TIMEOUT
            | verbs::IBV_QP_RETRY_CNT
            | verbs::IBV_QP_RNR_RETRY
            | verbs::IBV_QP_SQ_PSN
            | verbs::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(attr, mask)
    }

    // Receiving
    // ----------------------------------------------------------------------------------------------------

    /// Sees to it that `count` receive buffers are there, and posts the new ones.
    pub fn provide_receives(&mut self, count: usize) -> Result<(), Error> {
        let have = self.holders.len();
        let count = count.min(self.receives_max);
        if count > have {
            for (new, bytes) in registrations(count - have, self.receive_bytes) {
                let (memory, mr) = register(&self.domain, bytes, Access::LocalWrite)?;
                let first = self.holders.len();
                self.receives.push(Receives { memory, mr, first: first as u32 });
                self.holders.resize(first + new, 0);
                self.given_back.extend(first as u32..(first + new) as u32);
            }
        }
        self.post_receives().map_err(|source| Error::io("Cannot post receives", source))
    }

    /// Which registration the buffer belongs to, and where it is in it.
    fn buffer(&self, index: u32) -> (&Receives, usize) {
        let receives = self.receives.iter().rev().find(|receives| receives.first <= index);
        let receives = receives.expect("a receive buffer was provided");
        (receives, (index - receives.first) as usize * self.receive_bytes)
    }

    /// The bytes of a message.
    pub fn bytes(&self, message: &Message) -> &[u8] {
        assert!(
            self.holders[message.index as usize] > 0,
            "a message is looked at before its buffer is given back"
        );
        let (receives, at) = self.buffer(message.index);
        &receives.memory.bytes()[at..at + message.len as usize]
    }

    /// One more holder of a message.
    pub fn share(&mut self, message: &Message) -> Message {
        self.holders[message.index as usize] += 1;
        Message { index: message.index, len: message.len }
    }

    /// Gives back the buffer of a message: once its last holder has, the next [`QueuePair::post_receives`]
    /// posts it.
    pub fn give_back(&mut self, message: Message) {
        let holders = &mut self.holders[message.index as usize];
        *holders -= 1;
        if *holders == 0 {
            self.given_back.push(message.index);
        }
    }

    /// Posts the receive buffers that were given back.
    pub fn post_receives(&mut self) -> io::Result<()> {
        let mut wrs = [verbs::ibv_recv_wr::default(); QUEUE_POLL];
        let mut sges = [ibv_sge::default(); QUEUE_POLL];
        while !self.given_back.is_empty() {
            let n = self.given_back.len().min(QUEUE_POLL);
            for at in 0..n {
                let index = self.given_back[self.given_back.len() - 1 - at];
                let (receives, offset) = self.buffer(index);
                sges[at] = ibv_sge {
                    addr: receives.memory.as_ptr().expose_provenance() as u64 + offset as u64,
                    length: self.receive_bytes as u32,
                    lkey: receives.mr.lkey(),
                };
                wrs[at] = verbs::ibv_recv_wr {
                    wr_id: RECEIVE | u64::from(index),
                    next: std::ptr::null_mut(),
                    sg_list: &mut sges[at],
                    num_sge: 1,
                };
            }
            for at in 0..n - 1 {
                wrs[at].next = &mut wrs[at + 1];
            }
            self.given_back.truncate(self.given_back.len() - n);
            // SAFETY: the chain is whole, and the buffers belong to `self.receives`, which nobody reads while
            // they have no `holders`.
            unsafe { verbs::post_recv(self.qp.as_ptr(), wrs.as_mut_ptr()) }?;
        }
        Ok(())
    }

    // Sending
    // ------------------------------------------------------------------------------------------------------

    /// Work requests that may be chained now.
    pub fn room(&self) -> usize {
        self.sends_max - self.outstanding.len()
    }

    /// Whether a message of so many bytes can be chained now.
    pub fn has_room_for(&self, len: usize) -> bool {
        self.ring.place(len).is_some()
    }

    /// Bytes of the slots that are being written from.
    pub fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    /// Whether nothing is chained or posted.
    pub fn is_idle(&self) -> bool {
        self.outstanding.is_empty()
    }

    /// How many work requests have ended.
    pub fn ended(&self) -> u64 {
        self.front
    }

    fn chain_up(&mut self, sge: ibv_sge, opcode: verbs::ibv_wr_opcode, flags: u32, remote: (u64, u32)) {
        assert!(self.room() > 0, "the send queue has room");
        self.chain_sges.push(sge);
        let mut wr = verbs::ibv_send_wr {
            wr_id: self.front + self.outstanding.len() as u64,
            num_sge: i32::from(sge.length > 0),
            opcode,
            send_flags: flags,
            ..Default::default()
        };
        wr.wr.rdma = verbs::ibv_send_wr__bindgen_ty_2__bindgen_ty_1 { remote_addr: remote.0, rkey: remote.1 };
        self.chain.push(wr);
    }

    /// Notes what the work request that was chained last uses.
    fn note(&mut self, range: Option<SlotRange>, read: Option<u64>, mr: Option<Arc<Mr>>) {
        self.outstanding.push_back(Outstanding { range, read, _mr: mr, ring_end: self.ring.head });
    }

    /// From now on messages are put together into SENDs of at most so many bytes: what the peer's receives
    /// have room for.
    pub fn set_send_bytes_max(&mut self, bytes: usize) {
        self.send_bytes_max = bytes;
    }

    /// Chains the message that `parts` make up, of `len` bytes, for which there is room: behind the one that
    /// was chained last, if that may be.
    pub fn send<'a>(&mut self, parts: impl Iterator<Item = &'a [u8]>, len: usize) {
        let start = self.ring.place(len).expect("there is room for the message");
        let mut at = (start % self.ring.len()) as usize;
        let address = self.ring.memory.as_ptr().expose_provenance() as u64 + at as u64;
        let end = at + len;
        for part in parts {
            self.ring.memory.bytes_mut()[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        assert_eq!(at, end, "a message has the length that was said");
        let follows = start == self.ring.head && !start.is_multiple_of(self.ring.len());
        self.ring.head = start + len as u64;
        if let (Some(last), Some(sge)) = (self.chain.last_mut(), self.chain_sges.last_mut())
            && last.opcode == verbs::IBV_WR_SEND
            && follows
            && sge.length as usize + len <= self.send_bytes_max
        {
            sge.length += len as u32;
            if sge.length as usize > self.inline_bytes {
                last.send_flags &= !verbs::IBV_SEND_INLINE;
            }
            self.outstanding.back_mut().expect("it is in the chain").ring_end = self.ring.head;
            return;
        }
        let inline = if len <= self.inline_bytes { verbs::IBV_SEND_INLINE } else { 0 };
        let flags = inline | self.signal_if_much();
        let sge = ibv_sge { addr: address, length: len as u32, lkey: self.ring.mr.lkey() };
        self.chain_up(sge, verbs::IBV_WR_SEND, flags, (0, 0));
        self.note(None, None, None);
    }

    /// Chains an RDMA WRITE of the range to the peer's memory, perhaps with immediate data, which the peer
    /// hears. `mr` has the range's arena.
    pub fn write(&mut self, range: SlotRange, mr: &Mr, address: u64, key: u32, immediate: Option<u32>) {
        let sge = sge_of(&range, mr);
        self.held_bytes += range.slot.len();
        self.unsignalled_bytes += range.len;
        match immediate {
            None => self.chain_up(sge, verbs::IBV_WR_RDMA_WRITE, 0, (address, key)),
            Some(immediate) => {
                let flags = self.signal_if_much();
                self.chain_up(sge, verbs::IBV_WR_RDMA_WRITE_WITH_IMM, flags, (address, key));
                if let Some(wr) = self.chain.last_mut() {
                    wr.__bindgen_anon_1.imm_data = immediate.to_be();
                }
            }
        }
        self.note(Some(range), None, None);
    }

    /// Chains an RDMA WRITE of nothing, for which the peer needs no memory: it ends well if the peer's device
    /// is there.
    pub fn probe(&mut self) {
        self.chain_up(ibv_sge::default(), verbs::IBV_WR_RDMA_WRITE, 0, (0, 0));
        self.note(None, None, None);
    }

    /// The flag that asks for a completion, if much was written since the last.
    fn signal_if_much(&mut self) -> u32 {
        if self.unsignalled_bytes < SIGNAL_BYTES {
            return 0;
        }
        self.unsignalled_bytes = 0;
        verbs::IBV_SEND_SIGNALED
    }

    /// Chains an RDMA READ of the peer's memory into the range: [`Completion::Read`] follows with this name.
    pub fn read(&mut self, name: u64, range: SlotRange, mr: &Mr, address: u64, key: u32) {
        let sge = sge_of(&range, mr);
        self.chain_up(sge, verbs::IBV_WR_RDMA_READ, verbs::IBV_SEND_SIGNALED, (address, key));
        self.note(Some(range), Some(name), None);
    }

    /// A window that is not bound, and the key that it will have. It comes back by
    /// [`QueuePair::invalidate`], or [`QueuePair::put_back`] if it has not been bound.
    pub fn take_window(&mut self) -> Result<(WindowId, u32), Error> {
        let id = match self.free_windows.pop() {
            Some(id) => id,
            None => {
                self.windows.push(Window::new(&self.domain)?);
                WindowId(self.windows.len() as u32 - 1)
            }
        };
        Ok((id, self.windows[id.0 as usize].next_key()))
    }

    /// See [`QueuePair::take_window`].
    pub fn put_back(&mut self, window: WindowId) {
        self.free_windows.push(window);
    }

    /// Chains what binds a window: work requests behind it may give its key away.
    pub fn bind(&mut self, binding: Binding) {
        let Binding { window: id, mr, address, len, is_written } = binding;
        self.chain_up(ibv_sge::default(), verbs::IBV_WR_BIND_MW, 0, (0, 0));
        let window = &mut self.windows[id.0 as usize];
        let access = if is_written { verbs::IBV_ACCESS_REMOTE_WRITE } else { verbs::IBV_ACCESS_REMOTE_READ };
        if let Some(wr) = self.chain.last_mut() {
            wr.__bindgen_anon_2.bind_mw = verbs::ibv_send_wr__bindgen_ty_4__bindgen_ty_1 {
                mw: window.raw(),
                rkey: window.next_key(),
                bind_info: verbs::ibv_mw_bind_info {
                    mr: mr.raw(),
                    addr: address,
                    length: len as u64,
                    mw_access_flags: access,
                },
            };
        }
        window.bound = Some(mr);
        self.chain_bound.push(id);
        self.note(None, None, None);
    }

    /// Chains what takes the key of a window back that has been posted as bound. It may be bound anew behind
    /// that: work requests of a queue pair on windows are executed in order.
    pub fn invalidate(&mut self, id: WindowId) {
        let window = &mut self.windows[id.0 as usize];
        let (key, mr) = (window.key(), window.bound.take());
        self.chain_up(ibv_sge::default(), verbs::IBV_WR_LOCAL_INV, 0, (0, 0));
        if let Some(wr) = self.chain.last_mut() {
            wr.__bindgen_anon_1.invalidate_rkey = key;
        }
        // It is not deregistered before that has ended.
        self.note(None, None, mr);
        self.free_windows.push(id);
    }

    /// Whether anything is chained and not posted.
    pub fn has_chain(&self) -> bool {
        !self.chain.is_empty()
    }

    /// Posts the chain, and the receive buffers that were given back. `signal` asks for a completion of the
    /// last: without one, what the chain holds comes free with a later one. On failure the queue pair is of
    /// no more use: drop it.
    pub fn post(&mut self, signal: bool) -> io::Result<()> {
        if !self.given_back.is_empty() {
            self.post_receives()?;
        }
        let n = self.chain.len();
        if n == 0 {
            return Ok(());
        }
        for at in 0..n {
            self.chain[at].sg_list = &mut self.chain_sges[at];
            self.chain[at].next = if at + 1 < n { &raw mut self.chain[at + 1] } else { std::ptr::null_mut() };
        }
        if signal {
            self.chain[n - 1].send_flags |= verbs::IBV_SEND_SIGNALED;
        }
        self.unsignalled_bytes = 0;
        self.counters.work_requests += n as u64;
        self.counters.doorbells += 1;
        // SAFETY: the chain is whole; what it names is registered and owned by `self.outstanding`,
        // `self.windows` and `self.ring` until the completion, or the destruction of the queue pair.
        let posted = unsafe { verbs::post_send(self.qp.as_ptr(), self.chain.as_mut_ptr()) };
        self.chain.clear();
        self.chain_sges.clear();
        for id in self.chain_bound.drain(..) {
            self.windows[id.0 as usize].note_bound();
        }
        posted
    }

    /// Whether a completion should be asked for, for what is outstanding holds much of the queue or of the
    /// ring.
    pub fn is_half_full(&self) -> bool {
        self.outstanding.len() * 2 > self.sends_max || (self.ring.head - self.ring.tail) * 2 > self.ring.len()
    }

    // Completions
    // --------------------------------------------------------------------------------------------------

    /// Whether there is a completion. Those found are kept for [`QueuePair::next`], but for those of WRITEs
    /// and SENDs, which only make room.
    pub fn look(&mut self) -> bool {
        !self.polled.is_empty() || self.poll(self.cq)
    }

    /// Takes in the completions of sends that are not announced.
    pub fn look_at_sends(&mut self) {
        if let Some(send_cq) = self.send_cq {
            self.poll(send_cq);
        }
    }

    fn poll(&mut self, cq: NonNull<verbs::ibv_cq>) -> bool {
        let mut wcs = [ibv_wc::default(); QUEUE_POLL];
        // SAFETY: the queue is alive.
        let n = match unsafe { verbs::poll_cq(cq.as_ptr(), &mut wcs) } {
            Ok(n) => n,
            Err(_) => {
                // The queue has overrun, or the device is gone.
                let failure = Failure { status: verbs::IBV_WC_FATAL_ERR, vendor: 0, is_receive: false };
                self.polled.push_back(Completion::Failed(failure));
                return true;
            }
        };
        for wc in &wcs[..n] {
            let is_receive = wc.wr_id & RECEIVE != 0;
            if wc.status != verbs::IBV_WC_SUCCESS {
                let failure = Failure { status: wc.status, vendor: wc.vendor_err, is_receive };
                self.polled.push_back(Completion::Failed(failure));
            } else if is_receive {
                let message = Message { index: wc.wr_id as u32, len: wc.byte_len };
                self.holders[message.index as usize] = 1;
                if wc.opcode == verbs::IBV_WC_RECV_RDMA_WITH_IMM {
                    // SAFETY: this opcode comes with immediate data.
                    let immediate = u32::from_be(unsafe { wc.__bindgen_anon_1.imm_data });
                    self.polled.push_back(Completion::Placed {
                        immediate,
                        len: wc.byte_len,
                        receive: message,
                    });
                } else {
                    self.polled.push_back(Completion::Received(message));
                }
            } else {
                self.end_up_to(wc.wr_id);
            }
        }
        n > 0
    }

    /// Everything up to this sequence number has ended.
    fn end_up_to(&mut self, sequence: u64) {
        while self.front <= sequence
            && let Some(ended) = self.outstanding.pop_front()
        {
            self.front += 1;
            self.ring.tail = ended.ring_end;
            match (ended.read, ended.range) {
                (Some(name), Some(range)) => self.polled.push_back(Completion::Read(name, range)),
                (_, Some(range)) => self.held_bytes -= range.slot.len(),
                (_, None) => {}
            }
        }
    }

    /// Whether a failure is among the completions that were found.
    pub fn has_failed(&self) -> bool {
        self.polled.iter().any(|completion| matches!(completion, Completion::Failed(_)))
    }

    /// The next of the completions that were found.
    pub fn next(&mut self) -> Option<Completion> {
        self.polled.pop_front()
    }

    /// Has the next completion announced.
    pub fn arm(&self) -> io::Result<()> {
        // SAFETY: the queue is alive.
        unsafe { verbs::req_notify_cq(self.cq.as_ptr()) }
    }
}

fn sge_of(range: &SlotRange, mr: &Mr) -> ibv_sge {
    let bytes = range.bytes();
    ibv_sge { addr: bytes.as_ptr().expose_provenance() as u64, length: range.len as u32, lkey: mr.lkey() }
}

impl Failure {
    /// What happened, in the library's words.
    pub fn text(&self) -> String {
        // SAFETY: the library gives static strings.
        let text = verbs::verbs().map(|verbs| unsafe { verbs::text((verbs.ibv_wc_status_str)(self.status)) });
        let text = text.unwrap_or_default();
        let vendor =
            if self.vendor == 0 { String::new() } else { format!(", vendor code {:#x}", self.vendor) };
        format!("{text}{vendor}")
    }

    /// It only says that something else failed before.
    pub fn is_flush(&self) -> bool {
        self.status == verbs::IBV_WC_WR_FLUSH_ERR
    }

    /// The peer named memory that it had not exposed.
    pub fn is_access(&self) -> bool {
        !self.is_receive
            && matches!(
                self.status,
                verbs::IBV_WC_REM_ACCESS_ERR | verbs::IBV_WC_REM_INV_REQ_ERR | verbs::IBV_WC_REM_OP_ERR
            )
    }

    /// The peer sent more than a receive holds. Soft-RoCE says so in other words.
    pub fn is_length(&self) -> bool {
        self.is_receive
            && matches!(
                self.status,
                verbs::IBV_WC_LOC_LEN_ERR | verbs::IBV_WC_LOC_QP_OP_ERR | verbs::IBV_WC_REM_INV_REQ_ERR
            )
    }

    /// The peer has no receive posted.
    pub fn is_rnr(&self) -> bool {
        self.status == verbs::IBV_WC_RNR_RETRY_EXC_ERR
    }

    /// The errno that says it best.
    pub fn errno(&self) -> i32 {
        match self.status {
            verbs::IBV_WC_RETRY_EXC_ERR | verbs::IBV_WC_RESP_TIMEOUT_ERR => libc::ETIMEDOUT,
            verbs::IBV_WC_WR_FLUSH_ERR => libc::ECONNRESET,
            verbs::IBV_WC_RNR_RETRY_EXC_ERR => libc::ENOBUFS,
            verbs::IBV_WC_REM_ACCESS_ERR | verbs::IBV_WC_LOC_LEN_ERR => libc::EPROTO,
            verbs::IBV_WC_FATAL_ERR => libc::ENODEV,
            _ => libc::EIO,
        }
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // Bound windows would keep it, and the registrations that they are bound to.
        self.windows.clear();
        // SAFETY: the queue pair and its queues are destroyed once, here, in this order.
        let destroyed = check(unsafe { (self.verbs.ibv_destroy_qp)(self.qp.as_ptr()) });
        if let Err(error) = destroyed {
            tracing::error!(
                name: "rdma-queue-pair-kept",
                "An RDMA device does not let go of a queue pair ({error}); its memory is leaked."
            );
            std::mem::forget(std::mem::take(&mut self.outstanding));
            self.ring.mr.leak();
            self.receives.iter().for_each(|receives| receives.mr.leak());
            return;
        }
        if let Some(id) = &mut self.id {
            id.forget_qp();
        }
        for cq in self.send_cq.into_iter().chain([self.cq]) {
            // SAFETY: as above; every event of theirs was acknowledged when it was got.
            unsafe { (self.verbs.ibv_destroy_cq)(cq.as_ptr()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_receives_are_registered_and_little_else() {
        for each in [40, 4264, 17_576, 70_000] {
            for count in 0..600 {
                let (mut receives, mut bytes) = (0, 0);
                for (n, len) in registrations(count, each) {
                    assert!(n > 0 && n * each <= len && len.is_power_of_two(), "{n} of {each} in {len}");
                    receives += n;
                    bytes += len;
                }
                assert_eq!(receives, count);
                let least = count * each;
                assert!(
                    bytes < SPLIT_BYTES_MIN + each || bytes <= least / 2 * 3,
                    "{bytes} for {count} of {each}"
                );
            }
        }
    }
}
