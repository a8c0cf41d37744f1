//! Checks that memory can be read before it is promised to a server.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, OwnedFd};

/// The most iovecs of one writev(2).
const IOV_MAX: usize = libc::UIO_MAXIOV as usize;

/// Finds out whether the memory of a batch of writes can be read, by having the kernel copy one byte of each
/// page: one system call for the batch.
///
/// The bytes go into a pipe. (Into a file, were it in memory, RLIMIT_FSIZE would bound them with SIGXFSZ;
/// process_vm_readv(2) takes ten times as long and is forbidden in many sandboxes.)
#[derive(Default)]
pub(super) struct ReadProbe {
    /// Its ends to read and to write. None before the first probe, or if there is none to be had: then
    /// nothing is probed.
    pipe: Option<Option<(OwnedFd, OwnedFd)>>,
    bytes: Vec<libc::iovec>,
    /// Where the bytes of each iocb end, by its place in the batch.
    ends: Vec<(usize, usize)>,
    /// Places of the iocbs whose memory cannot be read.
    unreadable: Vec<usize>,
}

// SAFETY: its addresses are only passed to the kernel, which checks them; any thread may do that.
unsafe impl Send for ReadProbe {}

/// A pipe of one page, the ends of which never wait.
fn small_pipe() -> Option<(OwnedFd, OwnedFd)> {
    use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
    let _ = fcntl_setpipe_size(&write, ReadProbe::PAGE);
    Some((read, write))
}

impl ReadProbe {
    const PAGE: usize = 4096;

    /// Begins a batch.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
        self.unreadable.clear();
    }

    /// Adds one byte of each page of this memory. (A null pointer is found out later, and is another error.)
    pub(super) fn add(&mut self, address: usize, len: usize) {
        let Some(end) = address.checked_add(len) else { return };
        let mut at = address;
        while at != 0 && at < end {
            self.bytes.push(libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(at), iov_len: 1 });
            at = (at / Self::PAGE + 1) * Self::PAGE;
        }
    }

    /// Checks memory of any length at once, for the iocb at this place in the batch: so that the list of
    /// bytes stays short.
    pub(super) fn check_long(&mut self, mut address: usize, mut len: usize, place: usize) {
        let kept = self.bytes.len();
        while len > 0 {
            let some = len.min(IOV_MAX * Self::PAGE - address % Self::PAGE);
            self.add(address, some);
            let readable = self.can_copy(kept, self.bytes.len());
            self.bytes.truncate(kept);
            if !readable {
                return self.unreadable.push(place);
            }
            let Some(next) = address.checked_add(some) else { return };
            (address, len) = (next, len - some);
        }
    }

    /// What was added since the last call is the memory of the iocb at this place in the batch.
    pub(super) fn end_iocb(&mut self, place: usize) {
        self.ends.push((self.bytes.len(), place));
    }

    /// Whether the memory of the iocb at this place turned out to be unreadable.
    pub(super) fn is_unreadable(&self, place: usize) -> bool {
        self.unreadable.contains(&place)
    }

    /// Has the kernel copy the bytes: all of them, and if that fails those of one iocb after the other.
    pub(super) fn check_bytes(&mut self) {
        if self.bytes.is_empty() || self.can_copy(0, self.bytes.len()) {
            return;
        }
        let mut start = 0;
        for at in 0..self.ends.len() {
            let (end, place) = self.ends[at];
            if !self.can_copy(start, end) {
                self.unreadable.push(place);
            }
            start = end;
        }
    }

    /// Whether the kernel can copy these bytes; also if that cannot be found out.
    fn can_copy(&mut self, start: usize, end: usize) -> bool {
        let Some((read, write)) = self.pipe.get_or_insert_with(small_pipe) else { return true };
        for some in self.bytes[start..end].chunks(IOV_MAX) {
            // Less than PIPE_BUF goes in whole or not at all.
            while let Err(error) = write_bytes(write, some) {
                match error {
                    libc::EFAULT => return false,
                    libc::EAGAIN if rustix::io::read(&*read, &mut [0; Self::PAGE]).is_ok() => {}
                    _ => return true,
                }
            }
        }
        true
    }
}

/// writev(2), or the errno of its failure. Not by libc's function: a sanitizer would take it for the
/// program's own use of that memory.
fn write_bytes(pipe: &OwnedFd, bytes: &[libc::iovec]) -> Result<(), c_int> {
    // SAFETY: the kernel reads through these pointers, and finds out by itself where it cannot.
    let written = unsafe { libc::syscall(libc::SYS_writev, pipe.as_raw_fd(), bytes.as_ptr(), bytes.len()) };
    if written >= 0 { Ok(()) } else { Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
}

#[cfg(test)]
mod tests {
    use std::ptr::null_mut;

    use super::*;

    #[test]
    fn the_iocb_with_unreadable_memory_is_named_and_no_other() {
        let good = vec![0u8; 3 * ReadProbe::PAGE];
        // SAFETY: a fresh mapping that nothing else uses.
        let bad = unsafe {
            libc::mmap(
                null_mut(),
                ReadProbe::PAGE,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(bad, libc::MAP_FAILED);
        let mut probe = ReadProbe::default();
        for _ in 0..2 {
            probe.clear();
            for (place, address, len) in
                [(0, good.as_ptr().addr(), good.len()), (1, bad.addr(), 10), (3, good.as_ptr().addr() + 1, 1)]
            {
                probe.add(address, len);
                probe.end_iocb(place);
            }
            probe.check_long(good.as_ptr().addr() + 1, 5000, 4);
            probe.check_long(bad.addr(), usize::MAX / 2, 5);
            probe.check_bytes();
            assert_eq!([4, 5].map(|place| probe.is_unreadable(place)), [false, true]);
            assert_eq!([0, 1, 2, 3].map(|place| probe.is_unreadable(place)), [false, true, false, false]);
        }
        // SAFETY: the mapping made above.
        unsafe { libc::munmap(bad, ReadProbe::PAGE) };
    }
}
