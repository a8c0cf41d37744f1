//! A vectored send: small bytes (headers), slots and pages of files, in order.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::pages::Pages;
use crate::transport::SlotRange;

/// The most pieces that one sendmsg(2) takes.
const IOV_MAX: usize = 1024;
/// The most bytes of one send. A reactor's other sockets have their turn before the next: a send of megabytes takes as long as hundreds of
/// small requests.
const SEND_BYTES_MAX: usize = 1 << 20;

/// What one connection is to send, in order. While the kernel has it, it is inside the reactor.
#[derive(Default)]
pub struct SendBatch {
    bytes: Vec<u8>,
    pieces: VecDeque<Piece>,
    /// How many of them are pages.
    pages: usize,
    /// What the kernel reads; rebuilt for each send.
    iov: Vec<libc::iovec>,
    msghdr: Option<libc::msghdr>,
}

#[derive(Debug)]
enum Piece {
    Bytes(Range<usize>),
    Slot(SlotRange),
    Pages(Pages),
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Self::Bytes(range) => range.len(),
            Self::Slot(range) => range.len,
            Self::Pages(pages) => pages.len(),
        }
    }
}

impl SendBatch {
    /// Appends what `write` appends to the vector.
    pub fn push_bytes(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.bytes.len();
        write(&mut self.bytes);
        let end = self.bytes.len();
        if start == end {
            return;
        }
        match self.pieces.back_mut() {
            Some(Piece::Bytes(range)) if range.end == start => range.end = end,
            _ => self.pieces.push_back(Piece::Bytes(start..end)),
        }
    }

    /// Appends a part of a slot. The slot comes free when it has been sent.
    pub fn push_slot(&mut self, range: SlotRange) {
        debug_assert!(range.start + range.len <= range.slot.len());
        if range.len > 0 {
            self.pieces.push_back(Piece::Slot(range));
        }
    }

    /// Appends pages of a file.
    pub fn push_pages(&mut self, pages: Pages) {
        if !pages.is_empty() {
            self.pages += 1;
            self.pieces.push_back(Piece::Pages(pages));
        }
    }

    /// Whether there are pages in it, so that only [`SendBatch::send`] can send it.
    pub(super) fn has_pages(&self) -> bool {
        self.pages > 0
    }

    /// Whether everything has been sent.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Sends at once what a socket takes without blocking, at most its share of a turn. Gives how many bytes that was, and is left with the rest.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>) -> Result<u32, i32> {
        let mut sent = 0;
        while sent < SEND_BYTES_MAX {
            let followed = self.pieces.len() > 1;
            let result = match self.pieces.front_mut() {
                None => break,
                Some(Piece::Pages(pages)) => match pages.send(socket, SEND_BYTES_MAX - sent, followed) {
                    Ok(n) => {
                        let is_all = pages.is_empty();
                        if is_all {
                            self.forget_front();
                        }
                        Ok((n, is_all))
                    }
                    Err(error) => Err(error.raw_os_error()),
                },
                Some(_) => self.send_memory(socket, SEND_BYTES_MAX - sent),
            };
            match result {
                Ok((n, is_all)) => {
                    sent += n;
                    if !is_all {
                        break;
                    }
                }
                Err(errno) if sent == 0 => return Err(errno),
                // It comes again with the next.
                Err(_) => break,
            }
        }
        Ok(sent as u32)
    }

    /// Sends what comes before the next pages. Gives how much was sent, and whether that is all that it tried.
    fn send_memory(&mut self, socket: BorrowedFd<'_>, len_max: usize) -> Result<(usize, bool), i32> {
        let mut flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        if self.has_pages() {
            // The header of an answer goes with its data.
            flags |= libc::MSG_MORE;
        }
        let (msghdr, len) = self.gather(len_max);
        // SAFETY: the header points into this batch, which is borrowed for the length of this call.
        let n = unsafe { libc::sendmsg(socket.as_raw_fd(), msghdr, flags) };
        let n =
            usize::try_from(n).map_err(|_| io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))?;
        self.advance(n);
        Ok((n, n == len))
    }

    /// Forgets the first `n` bytes, of memory: they have been sent.
    pub(super) fn advance(&mut self, mut n: usize) {
        while n > 0 {
            let Some(piece) = self.pieces.front_mut() else { break };
            let taken = n.min(piece.len());
            n -= taken;
            match piece {
                _ if taken == piece.len() => self.forget_front(),
                Piece::Bytes(range) => range.start += taken,
                Piece::Slot(range) => {
                    range.start += taken;
                    range.len -= taken;
                }
                Piece::Pages(_) => unreachable!("pages count for themselves"),
            }
        }
    }

    /// The first piece has been sent.
    fn forget_front(&mut self) {
        if let Some(Piece::Pages(_)) = self.pieces.pop_front() {
            self.pages -= 1;
        }
        if self.pieces.is_empty() {
            self.bytes.clear();
        }
    }

    /// The message header for the kernel, of a batch without pages. It points into this batch, which must not move or change until the
    /// kernel is done.
    pub(super) fn msghdr(&mut self) -> *const libc::msghdr {
        self.gather(SEND_BYTES_MAX).0
    }

    /// The same for what comes before the next pages, and how much that is.
    fn gather(&mut self, len_max: usize) -> (*const libc::msghdr, usize) {
        self.iov.clear();
        let mut left = len_max;
        for piece in self.pieces.iter().take(IOV_MAX) {
            let bytes = match piece {
                Piece::Bytes(range) => &self.bytes[range.clone()],
                Piece::Slot(range) => &range.slot.bytes()[range.start..range.start + range.len],
                Piece::Pages(_) => break,
            };
            let len = bytes.len().min(left);
            self.iov.push(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: len });
            left -= len;
            if left == 0 {
                break;
            }
        }
        // SAFETY: msghdr is plain data for which all zeros is valid: no name, no control data, no flags.
        let mut msghdr: libc::msghdr = unsafe { std::mem::zeroed() };
        msghdr.msg_iov = self.iov.as_mut_ptr();
        msghdr.msg_iovlen = self.iov.len() as _;
        (self.msghdr.insert(msghdr), len_max - left)
    }
}

impl std::fmt::Debug for SendBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendBatch").field("pieces", &self.pieces).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Arena;

    #[test]
    fn a_send_takes_no_more_than_its_share_of_a_turn() {
        let mut arena = Arena::new(8 << 20, 2 << 20).unwrap();
        let mut batch = SendBatch::default();
        let mut left = 0;
        for len in [2 << 20, 1000, 1200 << 10, 1] {
            batch.push_bytes(|out| out.extend_from_slice(&[0; 40]));
            batch.push_slot(SlotRange { slot: arena.alloc(len).unwrap(), start: 0, len });
            left += 40 + len;
        }
        while !batch.is_empty() {
            batch.msghdr();
            let taken: usize = batch.iov.iter().map(|piece| piece.iov_len).sum();
            assert_eq!(taken, left.min(SEND_BYTES_MAX));
            batch.advance(taken);
            left -= taken;
        }
        assert_eq!(left, 0);
    }
}
