//! A queue pair beside a TCP connection, by the crate `ibverbs`: found, exchanged, and a channel of messages
//! over it.
//!
//! What the crate (0.9.2) shows of a work completion is all that this needs: status, opcode, `wr_id`, the
//! length, and the immediate data as it lies in memory, which is in network order. So both ways to answer a
//! read can be understood: a SEND with the response, or an RDMA WRITE WITH IMMEDIATE, which takes a receive,
//! leaves nothing in it, and ends it with the opcode RECV_RDMA_WITH_IMM, the request's id as immediate data,
//! and the number of bytes placed as length.
//!
//! What it does not show or do shapes the rest:
//! - The kind of a port's link is hidden, but RoCE shows in the kind of its GIDs: there is no InfiniBand
//!   here.
//! - The port's MTU is hidden. 1,024 is announced, which every RoCE port with an Ethernet MTU of 1,500 or
//!   more has.
//! - Its first packet sequence number is always 0, so this side asks for 0 both ways.
//! - A queue pair goes to RTS in one call, and receives can be posted only then: the server must not speak
//!   first. It does not: the client's ping comes before everything.
//! - Registered memory is the crate's own, and always open to remote reads, writes and atomics, more than the
//!   protocol asks for.
//! - Only port 1 of a device, only SENDs, each signalled and none inline, and no completion channel: waiting
//!   is polling, with a nap.
//!
//! Memory: each SEND has a slot until its completion, each receive one until its message is taken out. The
//! queue pair goes before them.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use ibverbs::{
    CompletionQueue, Context, Gid, MemoryRegion, PreparedQueuePair, ProtectionDomain, QueuePair,
    QueuePairEndpoint, ibv_qp_type, ibv_wc, ibv_wc_opcode,
};
use ibverbs_sys::{IBV_GID_TYPE_ROCE_V1, IBV_GID_TYPE_ROCE_V2, ibv_gid};

use crate::Result;
use crate::wire::{
    ETHERNET, GOAWAY, MESSAGE_MAX, Message, PING, PONG, QUEUE_PAIR, QueuePairAddress, gid_of, violation,
};

/// RDMA READs that this side answers at a time.
const READS: u8 = 4;
/// 4.096 us << 14: 67 ms until a packet is sent again.
const TIMEOUT: u8 = 14;
const MTU: u32 = 1024;
/// In the `wr_id` of a SEND; the rest is its slot.
const SEND: u64 = 1 << 32;

/// The device of the TCP connection's local address, and the address's index in its table of GIDs.
pub fn device_of(stream: &TcpStream) -> Result<(Context, u32)> {
    let address = stream.local_addr()?.ip();
    let gid = gid_of(address);
    let devices = ibverbs::devices()
        .map_err(|error| format!("There is no RDMA here: {error}. Run this in scripts/rdma-vm."))?;
    let mut tried = Vec::new();
    let mut found: Option<(Context, u32, u32)> = None;
    for device in &devices {
        let name = device.name().unwrap_or_default().to_string_lossy().into_owned();
        let context = match device.open() {
            Ok(context) => context,
            Err(error) => {
                tried.push(format!("{name}: {error}"));
                continue;
            }
        };
        let best = context
            .gid_table()
            .iter()
            .filter(|entry| entry.port_num == 1 && octets(entry.gid) == gid)
            .filter(|entry| [IBV_GID_TYPE_ROCE_V1, IBV_GID_TYPE_ROCE_V2].contains(&entry.gid_type))
            .max_by_key(|entry| entry.gid_type)
            .map(|entry| (entry.gid_index, entry.gid_type));
        match best {
            Some((index, kind)) if found.as_ref().is_none_or(|found| kind > found.2) => {
                found = Some((context, index, kind));
            }
            _ => tried.push(format!("{name}: another address's")),
        }
    }
    let (context, index, _) = found.ok_or_else(|| {
        format!(
            "No RoCE device has a GID of {address} ({}). Connect by an RDMA device's address.",
            tried.join(", ")
        )
    })?;
    // the crate takes an index for a place in the list of the entries that are valid
    if context.gid_table().get(index as usize).is_none_or(|entry| entry.gid_index != index) {
        return Err(format!(
            "The GID {index} of {address} lies behind a gap, which the crate ibverbs does not allow."
        )
        .into());
    }
    Ok((context, index))
}

fn octets(gid: Gid) -> [u8; 16] {
    (u128::from(gid.subnet_prefix()) << 64 | u128::from(gid.interface_id())).to_be_bytes()
}

/// What came from the server.
pub enum Event {
    Message(Message),
    /// The data of this request was placed, so many bytes, and that was the answer.
    Placed {
        id: u32,
        len: u32,
    },
}

/// What was counted on a [`Channel`].
#[derive(Default)]
pub struct Counts {
    /// Receives that a SEND took.
    pub sends_received: u64,
    /// Messages in them.
    pub messages_received: u64,
    /// Receives that an RDMA WRITE WITH IMMEDIATE took.
    pub immediates: u64,
}

/// A queue pair in RTS, its memory for messages, and the TCP connection that it came from.
pub struct Channel<'res> {
    queue_pair: QueuePair<'res>,
    completions: &'res CompletionQueue<'res>,
    receives: MemoryRegion<u8>,
    sends: MemoryRegion<u8>,
    /// Length of a slot of `sends`.
    send_len: usize,
    free: Vec<usize>,
    events: VecDeque<Event>,
    stream: TcpStream,
    /// Of the TCP connection: what is not yet a message.
    stream_bytes: Vec<u8>,
    keepalive: Duration,
    pub counts: Counts,
}

impl<'res> Channel<'res> {
    /// Exchanges queue pairs over `stream`, just after the welcome, and proves the path with a ping.
    ///
    /// `receives` are posted, and as many SENDs of up to `send_len` bytes may be under way.
    pub fn open(
        mut stream: TcpStream,
        domain: &'res ProtectionDomain<'res>,
        completions: &'res CompletionQueue<'res>,
        gid_index: u32,
        receives: usize,
        send_len: usize,
        keepalive: Duration,
    ) -> Result<Self> {
        // The MTU is chosen before the server's is known. Ports with less are rejected in `exchange`.
        let prepared = domain
            .create_qp(completions, completions, ibv_qp_type::IBV_QPT_RC)
            .allow_remote_rw()
            .set_gid_index(gid_index)
            .set_path_mtu(MTU.ilog2() - 7)
            .set_timeout(TIMEOUT)
            .set_retry_count(7)
            .set_rnr_retry(3)
            .set_min_rnr_timer(12)
            .set_max_rd_atomic(0)
            .set_max_dest_rd_atomic(READS)
            .set_rq_psn(0)
            .set_max_send_wr(receives as u32)
            .set_max_recv_wr(receives as u32)
            .build()
            .map_err(|error| format!("ibv_create_qp: {error}. Look at the limits of ibv_devinfo -v."))?;
        let theirs = exchange(&mut stream, &prepared)?;
        let gid = Gid::from(ibv_gid { raw: theirs.gid });
        let queue_pair = prepared
            .handshake(QueuePairEndpoint { num: theirs.qpn, lid: theirs.lid, gid: Some(gid) })
            .map_err(|error| format!("ibv_modify_qp towards {theirs:?}: {error}. Report it."))?;
        stream.set_nonblocking(true)?;

        let allocate = |len| {
            domain
                .allocate::<u8>(len)
                .map_err(|error| format!("ibv_reg_mr of {len} bytes: {error}. Raise ulimit -l."))
        };
        let mut channel = Self {
            queue_pair,
            completions,
            receives: allocate(receives * MESSAGE_MAX)?,
            sends: allocate(receives * send_len)?,
            send_len,
            free: (0..receives).collect(),
            events: VecDeque::new(),
            stream,
            stream_bytes: Vec::new(),
            keepalive,
            counts: Counts::default(),
        };
        for slot in 0..receives {
            channel.receive(slot)?;
        }
        channel.send(&Message::new(PING, 1, Vec::new()).encode())?;
        match channel.wait()? {
            Event::Message(Message { kind: PONG, id: 1, .. }) => Ok(channel),
            _ => Err(violation("something before the first pong")),
        }
    }

    fn receive(&mut self, slot: usize) -> Result<()> {
        let place = slot * MESSAGE_MAX..(slot + 1) * MESSAGE_MAX;
        // SAFETY: nobody looks into the slot until its completion, and `receives` is dropped after the queue
        // pair.
        unsafe { self.queue_pair.post_receive(&mut self.receives, place, slot as u64) }
            .map_err(|error| format!("ibv_post_recv: {error}. Report it.").into())
    }

    /// The longest SEND: messages, one behind the other.
    pub fn send_bytes_max(&self) -> usize {
        self.send_len
    }

    /// Sends one message, or several in one SEND, waiting for a slot if need be.
    pub fn send(&mut self, message: &[u8]) -> Result<()> {
        let slot = loop {
            match self.free.pop() {
                Some(slot) => break slot,
                None => self.poll()?,
            };
        };
        let place = slot * self.send_len..slot * self.send_len + message.len();
        self.sends[place.clone()].copy_from_slice(message);
        // SAFETY: the slot is not free until its completion, and `sends` is dropped after the queue pair.
        unsafe { self.queue_pair.post_send(&mut self.sends, place, SEND | slot as u64) }
            .map_err(|error| format!("ibv_post_send: {error}. Report it.").into())
    }

    /// The next thing from the server: a message that is neither ping nor goaway, or data placed.
    pub fn wait(&mut self) -> Result<Event> {
        let mut heard = Instant::now();
        let mut pinged = false;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            if self.poll()? {
                heard = Instant::now();
                continue;
            }
            self.look_at_stream()?;
            let silence = heard.elapsed();
            if silence > self.keepalive * 3 {
                return Err(format!("Nothing came on the queue pair for {silence:?}. Is the link up?").into());
            }
            if silence > self.keepalive && !pinged {
                pinged = true;
                self.send(&Message::new(PING, 0, Vec::new()).encode())?;
            }
            thread::sleep(Duration::from_micros(100));
        }
    }

    /// Takes completions; whether there were any.
    fn poll(&mut self) -> Result<bool> {
        let mut completions = [ibv_wc::default(); 16];
        let completions = self.completions.poll(&mut completions)?;
        for completion in completions.iter() {
            if let Some((status, vendor)) = completion.error() {
                // the server may have said more over TCP
                thread::sleep(Duration::from_millis(100));
                self.look_at_stream()?;
                return Err(format!(
                    "A work request failed with status {status} (vendor {vendor}, see ibv_wc_status in \
                     verbs.h). See the server's log."
                )
                .into());
            }
            if completion.wr_id() & SEND != 0 {
                self.free.push((completion.wr_id() & !SEND) as usize);
                continue;
            }
            let slot = completion.wr_id() as usize;
            match (completion.opcode(), completion.imm_data()) {
                (ibv_wc_opcode::IBV_WC_RECV, None) => {
                    let place = slot * MESSAGE_MAX;
                    let mut rest = &self.receives[place..place + completion.len()];
                    let mut pings = Vec::new();
                    self.counts.sends_received += 1;
                    while !rest.is_empty() {
                        let message = Message::take(&mut rest)?
                            .ok_or_else(|| violation("a SEND that ends within a message"))?;
                        self.counts.messages_received += 1;
                        match message.kind {
                            PING => pings.push(message.id),
                            PONG if message.id == 0 => {}
                            GOAWAY => return Err(message.failure("The server says goaway").into()),
                            _ => self.events.push_back(Event::Message(message)),
                        }
                    }
                    for id in pings {
                        self.send(&Message::new(PONG, id, Vec::new()).encode())?;
                    }
                }
                (ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM, Some(immediate)) => {
                    self.counts.immediates += 1;
                    let len = completion.len() as u32;
                    self.events.push_back(Event::Placed { id: u32::from_be(immediate), len });
                }
                (opcode, immediate) => {
                    return Err(violation(format!(
                        "what ends with opcode {opcode} and immediate data {immediate:?}"
                    )));
                }
            }
            self.receive(slot)?;
        }
        Ok(!completions.is_empty())
    }

    /// The TCP connection carries pings, pongs and goaway. Its end is the end of the connection.
    fn look_at_stream(&mut self) -> Result<()> {
        let mut bytes = [0; 4096];
        let count = match self.stream.read(&mut bytes) {
            Ok(0) => return Err("The server closed the TCP connection. See its log.".into()),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => {
                return Err(format!("The TCP connection failed: {error}. See the server's log.").into());
            }
        };
        self.stream_bytes.extend(&bytes[..count]);
        let mut rest = &self.stream_bytes[..];
        while let Some(message) = Message::take(&mut rest)? {
            match message.kind {
                PING => self.stream.write_all(&Message::new(PONG, message.id, Vec::new()).encode())?,
                PONG => {}
                GOAWAY => return Err(message.failure("The server says goaway over TCP").into()),
                kind => {
                    return Err(violation(format!("a message of kind {kind} over TCP after the upgrade")));
                }
            }
        }
        self.stream_bytes = rest.to_vec();
        Ok(())
    }

    /// Says goaway, and waits until that has arrived.
    pub fn close(mut self) -> Result<Counts> {
        let slots = self.sends.len() / self.send_len;
        self.send(&Message::new(GOAWAY, 0, Vec::new()).encode())?;
        while self.free.len() < slots {
            self.poll()?;
        }
        Ok(self.counts)
    }
}

/// Tells the server of our queue pair, and learns of its.
fn exchange(stream: &mut TcpStream, prepared: &PreparedQueuePair<'_>) -> Result<QueuePairAddress> {
    let ours = prepared.endpoint();
    let ours = QueuePairAddress {
        gid: octets(ours.gid.ok_or("The queue pair has no GID. Report it.")?),
        qpn: ours.num,
        psn: 0,
        peer_psn: 0,
        mtu: MTU,
        lid: 0,
        reads: READS.into(),
        link: ETHERNET,
    };
    stream.write_all(&Message::new(QUEUE_PAIR, 0, ours.encode()).encode())?;
    let mut bytes = vec![0; MESSAGE_MAX];
    let mut count = 0;
    let answer = loop {
        match stream.read(&mut bytes[count..])? {
            0 => {
                return Err(
                    "The server closed the connection rather than answer with a queue pair. See its log."
                        .into(),
                );
            }
            more => count += more,
        }
        let mut rest = &bytes[..count];
        if let Some(answer) = Message::take(&mut rest)? {
            break if rest.is_empty() {
                answer
            } else {
                return Err(violation("more than the answer about queue pairs"));
            };
        }
    };
    if answer.kind != QUEUE_PAIR || answer.id != 0 {
        return Err(violation(format!("a message of kind {} instead of a queue pair", answer.kind)));
    }
    if answer.errno() != 0 {
        return Err(answer.failure("The server has no queue pair for this").into());
    }
    let theirs = QueuePairAddress::decode(&answer.body)?;
    if theirs.psn != ours.peer_psn
        || theirs.peer_psn != ours.psn
        || theirs.link != ours.link
        || theirs.reads != 0
    {
        return Err(violation(format!("a queue pair that does not fit ours: {theirs:?}")));
    }
    if theirs.mtu < MTU {
        return Err(format!(
            "The server's port has an MTU of {}, and this client {MTU}. Raise that.",
            theirs.mtu
        )
        .into());
    }
    Ok(theirs)
}
