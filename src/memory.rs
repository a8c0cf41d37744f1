//! Memory that I/O may use: the library's own ([`Arena`], [`Slot`]) and the caller's ([`Region`],
//! [`Buffer`]).
//!
//! Buffers move. A [`Slot`] or [`Buffer`] is moved into the socket, the ring or the NIC and comes back with
//! the completion; nobody can touch it in between. A slot that is dropped goes back to its arena by itself,
//! from whichever thread.
//!
//! An arena is one mapping, cut into blocks of a power of two by a buddy allocator with deferred merging: an
//! allocation is a pop from a list in the common case. It belongs to one thread; its slots may travel.

mod atomic {
    pub use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
}
mod returned;

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use returned::Returned;

/// The smallest block of an arena, and the alignment of every slot: what O_DIRECT wants at most.
pub const BLOCK_BYTES: usize = 4096;
const BLOCK_SHIFT: u32 = BLOCK_BYTES.trailing_zeros();

/// An anonymous private mapping, zeroed, on huge pages if the system gives them freely. Unmapped when the
/// last slot is gone.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    /// Slots that were dropped and that the arena has not yet taken back.
    returned: Returned,
    /// Which ring has it as fixed buffers, and from which index: `ring << 32 | index + 1`; 0 if none.
    registered: AtomicU64,
}

// SAFETY: the mapping is plain memory that any thread may reach; who may touch which part of it when is
// decided by the ownership of the `Slot` that covers that part, and no two slots overlap (`Arena::take`).
unsafe impl Send for Mapping {}
// SAFETY: as above; shared access to `Mapping` itself reaches only `returned` and `registered`, which are
// thread-safe.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(len: usize, blocks: usize) -> io::Result<Self> {
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choosing touches no existing
        // memory.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        let base =
            NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let mapping = Self { base, len, returned: Returned::new(blocks), registered: AtomicU64::new(0) };
        // Huge pages spare TLB misses and pins; a child must not share pages that hardware or the kernel
        // writes to. Either may be rejected (no THP in this kernel), which costs nothing but speed.
        for advice in [Advice::LinuxHugepage, Advice::LinuxDontFork] {
            // SAFETY: the range is exactly our own mapping, and neither advice changes its contents in this
            // process.
            let _ = unsafe { rustix::mm::madvise(base.as_ptr().cast(), len, advice) };
        }
        Ok(mapping)
    }
}

impl Mapping {
    /// Its address and length, for registration.
    pub(crate) fn extent(&self) -> (usize, usize) {
        (self.base.as_ptr().expose_provenance(), self.len)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `base..base + len` is the mapping made in `new`, and no `Slot` is left, for each holds an
        // `Arc` of this.
        unsafe {
            let _ = rustix::mm::munmap(self.base.as_ptr().cast(), self.len);
        }
    }
}

/// A pool of registered memory, cut into slots. Owned by one thread.
#[derive(Debug)]
pub struct Arena {
    mapping: Arc<Mapping>,
    /// Free blocks by order (size = BLOCK_BYTES << order): block numbers. May hold buddies that are not
    /// merged.
    free: Vec<Vec<u32>>,
    free_bytes: usize,
    /// Blocks came back since the last merge.
    unmerged: bool,
}

/// The memory of an arena, to be registered. It stays mapped as long as this lives.
#[derive(Clone, Debug)]
pub struct ArenaMemory(Arc<Mapping>);

impl ArenaMemory {
    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        &self.0
    }
}

/// A piece of an arena, owned. Its memory is the owner's alone.
#[derive(Debug)]
pub struct Slot {
    mapping: Arc<Mapping>,
    block: u32,
    order: u8,
}

impl Arena {
    /// Maps an arena of at least `bytes` whose largest slot is `slot_bytes_max`, both rounded up to what the
    /// allocator needs.
    pub fn new(bytes: usize, slot_bytes_max: usize) -> io::Result<Self> {
        let order_max = order_of(slot_bytes_max);
        let top = BLOCK_BYTES << order_max;
        let len = bytes.max(top).next_multiple_of(top);
        let blocks =
            u32::try_from(len >> BLOCK_SHIFT).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let mapping = Arc::new(Mapping::new(len, blocks as usize)?);
        let mut free = vec![Vec::new(); usize::from(order_max) + 1];
        // Lowest addresses are popped first, so that a lightly used arena touches few pages.
        free[usize::from(order_max)] = (0..blocks).step_by(1 << order_max).rev().collect();
        Ok(Self { mapping, free, free_bytes: len, unmerged: false })
    }

    /// Its memory, for registration.
    pub fn memory(&self) -> ArenaMemory {
        ArenaMemory(Arc::clone(&self.mapping))
    }

    /// Its memory, which lives until the last slot is gone and the last of these.
    pub(crate) fn mapping(&self) -> Arc<Mapping> {
        Arc::clone(&self.mapping)
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.mapping.len
    }

    /// Never: an arena has at least one slot.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Bytes in slots now.
    pub fn used_bytes(&mut self) -> usize {
        self.take_back();
        self.mapping.len - self.free_bytes
    }

    /// Bytes in no slot, as far as the last allocation or [`Arena::used_bytes`] knew: what has been dropped
    /// since is not among them.
    pub fn free_bytes(&self) -> usize {
        self.free_bytes
    }

    /// The largest slot.
    pub fn slot_bytes_max(&self) -> usize {
        BLOCK_BYTES << (self.free.len() - 1)
    }

    /// A slot of at least `len` bytes, its contents left over from earlier use. None if there is no room now,
    /// or if `len` is more than [`Arena::slot_bytes_max`].
    pub fn alloc(&mut self, len: usize) -> Option<Slot> {
        let order = order_of(len);
        if usize::from(order) >= self.free.len() {
            return None;
        }
        self.take_back();
        let block = self.take(order).or_else(|| {
            if !self.unmerged || self.free_bytes < BLOCK_BYTES << order {
                return None;
            }
            self.merge();
            self.take(order)
        })?;
        self.free_bytes -= BLOCK_BYTES << order;
        Some(Slot { mapping: Arc::clone(&self.mapping), block, order })
    }

    fn take_back(&mut self) {
        for (block, order) in self.mapping.returned.take() {
            self.free[usize::from(order)].push(block);
            self.free_bytes += BLOCK_BYTES << order;
            self.unmerged = true;
        }
    }

    /// Takes a block of this order off the lists, splitting a larger one if need be.
    fn take(&mut self, order: u8) -> Option<u32> {
        let from = (usize::from(order)..self.free.len()).find(|&o| !self.free[o].is_empty())?;
        let block = self.free[from].pop()?;
        for o in (usize::from(order)..from).rev() {
            self.free[o].push(block + (1 << o));
        }
        Some(block)
    }

    /// Joins free buddies.
    fn merge(&mut self) {
        for order in 0..self.free.len() - 1 {
            let mut blocks = std::mem::take(&mut self.free[order]);
            blocks.sort_unstable_by(|a, b| b.cmp(a));
            let mut kept = Vec::with_capacity(blocks.len());
            while let Some(block) = blocks.pop() {
                let buddy = block + (1 << order);
                if block & (1 << order) == 0 && blocks.last() == Some(&buddy) {
                    blocks.pop();
                    self.free[order + 1].push(block);
                } else {
                    kept.push(block);
                }
            }
            kept.reverse();
            self.free[order] = kept;
        }
        self.unmerged = false;
    }

    /// The whole arena's memory in chunks of at most `chunk_bytes`, for registration. The pointers are for
    /// the kernel or the NIC only.
    pub(crate) fn chunks(&self, chunk_bytes: usize) -> Vec<libc::iovec> {
        (0..self.mapping.len)
            .step_by(chunk_bytes)
            .map(|at| libc::iovec {
                // SAFETY: `at` is less than `len`, so the pointer stays within the mapping.
                iov_base: unsafe { self.mapping.base.as_ptr().add(at) }.cast(),
                iov_len: chunk_bytes.min(self.mapping.len - at),
            })
            .collect()
    }

    /// Notes that ring `ring` has this arena as fixed buffers, in chunks of 1 GiB from index 0.
    pub(crate) fn set_registered(&self, ring: u32) {
        self.mapping.registered.store(u64::from(ring) << 32 | 1, Ordering::Relaxed);
    }
}

/// The order of the smallest block that holds `len` bytes.
fn order_of(len: usize) -> u8 {
    (len.max(1).div_ceil(BLOCK_BYTES)).next_power_of_two().trailing_zeros() as u8
}

impl Slot {
    /// Its size: at least what was asked for.
    pub fn len(&self) -> usize {
        BLOCK_BYTES << self.order
    }

    /// Never: a slot has at least one block.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the slot's range lies within the mapping, which `self.mapping` keeps alive and which is
        // initialised (zeroed by the kernel); no other slot overlaps it, so `&self` is the only way to reach
        // it.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len()) }
    }

    /// Its bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` excludes every other reference.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr(), self.len()) }
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        // SAFETY: `block` lies within the mapping (`Arena::take` gives no other).
        unsafe { self.mapping.base.as_ptr().add((self.block as usize) << BLOCK_SHIFT) }
    }

    /// Whether it is a piece of this memory.
    pub(crate) fn is_of(&self, mapping: &Arc<Mapping>) -> bool {
        Arc::ptr_eq(&self.mapping, mapping)
    }

    /// The index of the fixed buffer that it lies in, if ring `ring` has its arena registered.
    pub(crate) fn fixed_index(&self, ring: u32) -> Option<u16> {
        let registered = self.mapping.registered.load(Ordering::Relaxed);
        (registered != 0 && registered >> 32 == u64::from(ring))
            .then_some((((self.block as usize) << BLOCK_SHIFT) / FIXED_CHUNK_BYTES) as u16)
    }
}

/// io_uring takes fixed buffers of at most this size.
pub(crate) const FIXED_CHUNK_BYTES: usize = 1 << 30;

impl Drop for Slot {
    fn drop(&mut self) {
        self.mapping.returned.push(self.block, self.order);
    }
}

/// A number that a forked child does not share with its parent, at the cost of two loads: it lies in a page
/// that the kernel clears in the child. (A kernel that does not know MADV_WIPEONFORK leaves a child
/// undetected.)
pub fn process() -> u64 {
    static PAGE: AtomicPtr<AtomicU64> = AtomicPtr::new(std::ptr::null_mut());
    static LAST: AtomicU64 = AtomicU64::new(0);
    #[cold]
    fn map() -> *mut AtomicU64 {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choosing touches no existing
        // memory.
        let Ok(page) =
            (unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), BLOCK_BYTES, prot, flags) })
        else {
            // Not known to the kernel as a page to be cleared: forks go undetected.
            return Box::into_raw(Box::default());
        };
        // SAFETY: the range is exactly our own mapping, and the advice changes nothing in this process.
        let _ = unsafe { rustix::mm::madvise(page, BLOCK_BYTES, Advice::LinuxWipeOnFork) };
        page.cast()
    }
    let mut page = PAGE.load(Ordering::Acquire);
    if page.is_null() {
        page = map();
        // Whoever comes second leaks a page.
        if let Err(first) =
            PAGE.compare_exchange(std::ptr::null_mut(), page, Ordering::AcqRel, Ordering::Acquire)
        {
            page = first;
        }
    }
    // SAFETY: it points at zeroed or written memory of at least an `AtomicU64`, aligned, that is never
    // unmapped.
    let number = unsafe { &*page };
    match number.load(Ordering::Relaxed) {
        0 => {
            let new = LAST.fetch_add(1, Ordering::Relaxed) + 1;
            // Another thread may have been faster.
            number
                .compare_exchange(0, new, Ordering::Relaxed, Ordering::Relaxed)
                .map_or_else(|found| found, |_| new)
        }
        number => number,
    }
}

/// Memory of the caller's, registered for I/O. Cloning it shares the registration.
#[derive(Clone, Debug)]
pub struct Region(Arc<RegionInner>);

#[derive(Debug)]
struct RegionInner {
    address: usize,
    len: usize,
    /// Never another's.
    number: u64,
}

impl Region {
    /// Registers `[address, address + len)`. None if that is empty or wraps around.
    ///
    /// # Safety
    /// The memory must stay mapped, readable and writable until every buffer made from this region is gone
    /// ([`Region::in_use`]).
    pub unsafe fn new(address: *mut u8, len: usize) -> Option<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let address = address.expose_provenance();
        if address == 0 || len == 0 || address.checked_add(len - 1).is_none() {
            return None;
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Some(Self(Arc::new(RegionInner { address, len, number })))
    }

    /// The same region, in a form that does not count as its use.
    pub fn downgrade(&self) -> WeakRegion {
        WeakRegion(Arc::downgrade(&self.0))
    }

    /// Its address and length, for registration.
    pub(crate) fn extent(&self) -> (usize, usize) {
        (self.0.address, self.0.len)
    }

    /// Tells it from every other region.
    pub(crate) fn number(&self) -> u64 {
        self.0.number
    }

    /// Whether I/O in flight uses it.
    pub fn in_use(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// A buffer within it. None if it does not lie within.
    ///
    /// # Safety
    /// Until the buffer is gone nobody else may access its memory.
    pub unsafe fn buffer(&self, address: *mut u8, len: usize) -> Option<Buffer> {
        let offset = (address as usize).checked_sub(self.0.address)?;
        if offset > self.0.len || len > self.0.len - offset {
            return None;
        }
        // SAFETY: the caller vouches for the memory, and it lies within the region, which the clone keeps
        // registered.
        let mut raw = unsafe { RawBuffer::new(address, len) }?;
        raw.region = Some(self.clone());
        Some(Buffer::Raw(raw))
    }
}

/// A region, as long as there is one.
#[derive(Clone, Debug)]
pub struct WeakRegion(Weak<RegionInner>);

impl WeakRegion {
    /// The region, if it is still there.
    pub fn upgrade(&self) -> Option<Region> {
        self.0.upgrade().map(Region)
    }

    /// Whether it is this one.
    pub fn is(&self, region: &Region) -> bool {
        self.0.as_ptr() == Arc::as_ptr(&region.0)
    }
}

/// Memory of somebody else's, lent by a raw pointer for the time that this value lives.
#[derive(Debug)]
pub struct RawBuffer {
    address: NonNull<u8>,
    len: usize,
    region: Option<Region>,
}

// SAFETY: whoever made it (unsafe `RawBuffer::new`) promised that nobody else accesses the memory while it
// lives, so it may be reached from whichever thread owns it.
unsafe impl Send for RawBuffer {}

impl RawBuffer {
    /// Borrows `[address, address + len)`. None if the pointer is null.
    ///
    /// # Safety
    /// The memory must be initialised, mapped and, until the value is gone, accessed by nobody else. It must
    /// be writable if it is used for reading into.
    pub unsafe fn new(address: *mut u8, len: usize) -> Option<Self> {
        Some(Self { address: NonNull::new(address)?, len, region: None })
    }

    /// The region that it lies in, if it was made from one.
    pub(crate) fn region(&self) -> Option<&Region> {
        self.region.as_ref()
    }
}

/// The memory of one I/O of a client, owned while it is in flight.
#[derive(Debug)]
pub enum Buffer {
    /// Plain memory of the caller's.
    Owned(Box<[u8]>),
    /// A slot of an arena, and how many of its bytes are meant.
    Slot(Slot, usize),
    /// Memory behind a C pointer.
    Raw(RawBuffer),
    /// A part of a buffer that others use at the same time.
    Part(Box<Part>),
}

impl Buffer {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Owned(bytes) => bytes,
            Self::Slot(slot, len) => &slot.bytes()[..*len],
            // SAFETY: `RawBuffer::new`'s caller vouched for the memory for as long as it lives.
            Self::Raw(f) => unsafe { std::slice::from_raw_parts(f.address.as_ptr(), f.len) },
            // SAFETY: the part lies within a buffer that `whole` keeps, and no other part overlaps it
            // (`Divided::take`).
            Self::Part(f) => unsafe { std::slice::from_raw_parts(f.address.as_ptr(), f.len) },
        }
    }

    /// Its bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Owned(bytes) => bytes,
            Self::Slot(slot, len) => &mut slot.bytes_mut()[..*len],
            // SAFETY: as in `bytes`, and `&mut self` excludes every other access.
            Self::Raw(f) => unsafe { std::slice::from_raw_parts_mut(f.address.as_ptr(), f.len) },
            // SAFETY: as in `bytes`, and `&mut self` excludes every other access to the part.
            Self::Part(f) => unsafe { std::slice::from_raw_parts_mut(f.address.as_ptr(), f.len) },
        }
    }

    /// Its length.
    pub fn len(&self) -> usize {
        match self {
            Self::Owned(bytes) => bytes.len(),
            Self::Slot(_, len) => *len,
            Self::Raw(f) => f.len,
            Self::Part(f) => f.len,
        }
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What it is a part of; itself, if it is whole.
    pub(crate) fn origin(&self) -> &Self {
        match self {
            Self::Part(part) => part.whole.buffers.pieces()[part.piece].origin(),
            whole => whole,
        }
    }

    /// Where it begins.
    fn address(&mut self) -> NonNull<u8> {
        match self {
            Self::Owned(bytes) => NonNull::from(&mut **bytes).cast(),
            Self::Slot(slot, _) => NonNull::from(slot.bytes_mut()).cast(),
            Self::Raw(raw) => raw.address,
            Self::Part(part) => part.address,
        }
    }
}

/// The memory of one I/O, in one piece or several.
#[derive(Debug)]
pub enum Buffers {
    /// One piece.
    One(Buffer),
    /// Several, in order.
    Many(Vec<Buffer>),
}

impl Buffers {
    /// The pieces.
    pub fn pieces(&self) -> &[Buffer] {
        match self {
            Self::One(buffer) => std::slice::from_ref(buffer),
            Self::Many(buffers) => buffers,
        }
    }

    /// The pieces, to write.
    pub fn pieces_mut(&mut self) -> &mut [Buffer] {
        match self {
            Self::One(buffer) => std::slice::from_mut(buffer),
            Self::Many(buffers) => buffers,
        }
    }

    /// Length in all.
    pub fn len(&self) -> usize {
        match self {
            Self::One(buffer) => buffer.len(),
            Self::Many(buffers) => buffers.iter().map(Buffer::len).sum(),
        }
    }

    /// Whether they hold nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The parts of the pieces that make up `range`, in order.
    pub fn slices(&self, range: Range<usize>) -> impl Iterator<Item = &[u8]> {
        let mut at = 0;
        self.pieces().iter().filter_map(move |piece| {
            let part = overlap(at, piece.len(), &range);
            at += piece.len();
            (!part.is_empty()).then(|| &piece.bytes()[part])
        })
    }

    /// The parts of the pieces that make up `range`, in order, to write.
    pub fn slices_mut(&mut self, range: Range<usize>) -> impl Iterator<Item = &mut [u8]> {
        let mut at = 0;
        self.pieces_mut().iter_mut().filter_map(move |piece| {
            let part = overlap(at, piece.len(), &range);
            at += piece.len();
            (!part.is_empty()).then(|| &mut piece.bytes_mut()[part])
        })
    }

    /// Copies `data` to `offset`; as much as fits.
    pub fn write_at(&mut self, mut offset: usize, mut data: &[u8]) {
        for piece in self.pieces_mut() {
            let room = piece.bytes_mut().get_mut(offset..).unwrap_or_default();
            let (head, rest) = data.split_at(room.len().min(data.len()));
            room[..head.len()].copy_from_slice(head);
            if rest.is_empty() {
                return;
            }
            (data, offset) = (rest, offset.saturating_sub(piece.len()));
        }
    }
}

/// The part of a piece of `len` bytes that begins at `at` which falls into `range`, relative to the piece.
fn overlap(at: usize, len: usize, range: &Range<usize>) -> Range<usize> {
    let start = range.start.saturating_sub(at).min(len);
    let end = range.end.saturating_sub(at).min(len);
    start..end.max(start)
}

/// Buffers that several I/Os use at the same time, each a part of its own. Parts are taken from the front.
#[derive(Debug)]
pub struct Divided {
    whole: Arc<Whole>,
    /// Where the next part begins: a piece, and a byte of it.
    next: (usize, usize),
    /// Bytes that are in no part yet.
    left: usize,
}

/// Buffers whose bytes only their parts reach.
#[derive(Debug)]
struct Whole {
    buffers: Buffers,
    /// Where each of its pieces lies. Taken when the buffers were in their place, for they own the memory.
    pieces: Vec<(NonNull<u8>, usize)>,
}

/// A part of one piece of a [`Divided`].
#[derive(Debug)]
pub struct Part {
    whole: Arc<Whole>,
    /// Which of its pieces.
    piece: usize,
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: the bytes of a part are its owner's alone, as no two parts overlap (`Divided::take`). Of the shared
// `Whole` only addresses and lengths are read, by whichever thread, and its buffers can be dropped in any.
unsafe impl Send for Part {}
// SAFETY: as above; it reaches no byte but those that are in no part.
unsafe impl Send for Divided {}

impl Divided {
    /// Buffers of which no part has been taken.
    #[expect(clippy::arc_with_non_send_sync, reason = "`Part` and `Divided` say why they are")]
    pub fn new(buffers: Buffers) -> Self {
        let left = buffers.len();
        let mut whole = Arc::new(Whole { buffers, pieces: Vec::new() });
        if let Some(Whole { buffers, pieces }) = Arc::get_mut(&mut whole) {
            pieces.extend(buffers.pieces_mut().iter_mut().map(|piece| (piece.address(), piece.len())));
        }
        Self { whole, next: (0, 0), left }
    }

    /// Bytes that are in no part yet.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Takes the next part: `len` bytes, or as many as are left.
    pub fn take(&mut self, len: usize) -> Buffers {
        let mut wanted = len.min(self.left);
        self.left -= wanted;
        let mut parts = Vec::new();
        while wanted > 0 {
            let (piece, start) = self.next;
            let (address, piece_len) = self.whole.pieces[piece];
            let len = wanted.min(piece_len - start);
            self.next = if start + len == piece_len { (piece + 1, 0) } else { (piece, start + len) };
            if len == 0 {
                continue;
            }
            wanted -= len;
            // SAFETY: `start` is within the piece.
            let address = unsafe { address.add(start) };
            let part = Buffer::Part(Box::new(Part { whole: Arc::clone(&self.whole), piece, address, len }));
            if wanted == 0 && parts.is_empty() {
                return Buffers::One(part);
            }
            parts.push(part);
        }
        Buffers::Many(parts)
    }

    /// The buffers, once every part is gone.
    pub fn into_whole(self) -> Result<Buffers, Self> {
        let Self { whole, next, left } = self;
        Arc::try_unwrap(whole).map(|whole| whole.buffers).map_err(|whole| Self { whole, next, left })
    }
}

/// A part of a slot. The slot moves along.
#[derive(Debug)]
pub struct SlotRange {
    /// The slot.
    pub slot: Slot,
    /// Where the part begins.
    pub start: usize,
    /// How long it is.
    pub len: usize,
}

impl SlotRange {
    /// The part's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.slot.bytes()[self.start..self.start + self.len]
    }

    /// The same, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.slot.bytes_mut()[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_dropped_slot_can_be_allocated_again() {
        let mut arena = Arena::new(1 << 16, 1 << 16).unwrap();
        for _ in 0..100 {
            let slot = arena.alloc(1 << 16).unwrap();
            assert!(arena.alloc(1).is_none());
            drop(slot);
        }
        assert_eq!(arena.used_bytes(), 0);
    }

    #[test]
    fn small_blocks_merge_when_a_large_one_is_wanted() {
        let mut arena = Arena::new(1 << 20, 1 << 20).unwrap();
        let small: Vec<_> = std::iter::from_fn(|| arena.alloc(1)).collect();
        assert_eq!(small.len(), 256);
        drop(small);
        assert!(arena.alloc(1 << 20).is_some());
    }

    #[test]
    fn a_slot_outlives_its_arena() {
        let mut arena = Arena::new(1 << 16, 4096).unwrap();
        let mut slot = arena.alloc(10).unwrap();
        drop(arena);
        slot.bytes_mut().fill(7);
        assert!(slot.bytes().iter().all(|&b| b == 7));
    }

    #[test]
    fn slices_cover_exactly_the_range() {
        let piece = |n: usize| Buffer::Owned(vec![0; n].into());
        let mut buffers = Buffers::Many(vec![piece(3), piece(0), piece(4), piece(5)]);
        buffers.write_at(2, &[1, 2, 3, 4, 5, 6]);
        let all: Vec<u8> = buffers.slices(0..12).flatten().copied().collect();
        assert_eq!(all, [0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0]);
        let some: Vec<u8> = buffers.slices(2..8).flatten().copied().collect();
        assert_eq!(some, [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn parts_cover_their_buffers_once_and_give_them_back() {
        let mut arena = Arena::new(1 << 16, 4096).unwrap();
        let mut memory = vec![0; 7];
        // SAFETY: `memory` is used again only when the buffer is gone.
        let raw = unsafe { RawBuffer::new(memory.as_mut_ptr(), memory.len()) }.unwrap();
        let pieces = vec![
            Buffer::Owned(vec![0; 3].into()),
            Buffer::Owned(Box::default()),
            Buffer::Slot(arena.alloc(5).unwrap(), 5),
            Buffer::Raw(raw),
        ];
        let mut divided = Divided::new(Buffers::Many(pieces));
        let mut parts: Vec<_> = [2, 2, 6, 1, 9].map(|len| divided.take(len)).into();
        assert_eq!(parts.iter().map(Buffers::len).collect::<Vec<_>>(), [2, 2, 6, 1, 4]);
        assert_eq!((divided.left(), divided.take(1).len()), (0, 0));
        // A part can be divided once more.
        let mut again = Divided::new(parts.remove(2));
        parts.extend([again.take(4), again.take(4)]);
        assert!(parts.iter().flat_map(Buffers::pieces).all(|part| !matches!(part.origin(), Buffer::Part(_))));
        for (n, part) in parts.iter_mut().enumerate() {
            let bytes = vec![n as u8 + 1; part.len()];
            part.write_at(0, &bytes);
        }
        let mut divided = divided.into_whole().unwrap_err();
        assert_eq!(divided.take(1).len(), 0);
        drop((parts, again));
        let whole = divided.into_whole().unwrap();
        let all: Vec<u8> = whole.slices(0..15).flatten().copied().collect();
        assert_eq!(all, [1, 1, 2, 2, 5, 5, 5, 5, 6, 6, 3, 4, 4, 4, 4]);
        drop(whole);
        assert_eq!(memory, [6, 6, 3, 4, 4, 4, 4][..]);
    }

    proptest! {
        #[test]
        fn slots_never_overlap(ops in prop::collection::vec((any::<bool>(), 1usize..300_000), 1..200)) {
            let mut arena = Arena::new(4 << 20, 1 << 19).unwrap();
            let mut live: Vec<(Slot, u8)> = Vec::new();
            for (n, (free, len)) in ops.into_iter().enumerate() {
                if free && !live.is_empty() {
                    let (slot, tag) = live.swap_remove(len % live.len());
                    // One memcmp: a closure for each byte takes half a minute without optimisation.
                    prop_assert!(slot.bytes() == vec![tag; slot.len()]);
                } else if let Some(mut slot) = arena.alloc(len) {
                    prop_assert!(slot.len() >= len && slot.as_ptr().addr().is_multiple_of(BLOCK_BYTES));
                    slot.bytes_mut().fill(n as u8);
                    live.push((slot, n as u8));
                }
            }
            let held: usize = live.iter().map(|(slot, _)| slot.len()).sum();
            prop_assert_eq!(arena.used_bytes(), held);
            drop(live);
            prop_assert_eq!(arena.used_bytes(), 0);
            prop_assert!(arena.alloc(1 << 19).is_some());
        }
    }
}
