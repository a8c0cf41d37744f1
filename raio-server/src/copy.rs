//! Copying a range of one file to another within the server, by blocking system calls: for a thread of the
//! pool.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::OFlags;
use rustix::io::{Errno, retry_on_intr};

use crate::syscalls::without_direct;
use crate::tuning::ranges::{BUFFER_BYTES, PIECE_BYTES};

/// Copies up to a piece of a range: by the file system's own means, which may share the storage, else by
/// reading and writing. The ranges do not overlap. Returns how many bytes; 0 at the end of the source. An
/// error means that nothing was copied.
pub fn copy(
    source: impl AsFd,
    offset: u64,
    destination: impl AsFd,
    destination_offset: u64,
    length: u64,
) -> Result<usize, Errno> {
    let length = length.min(PIECE_BYTES) as usize;
    let (reads, writes) =
        (without_direct(&source, OFlags::RDONLY)?, without_direct(&destination, OFlags::WRONLY)?);
    let source = reads.as_ref().map_or(source.as_fd(), AsFd::as_fd);
    let destination = writes.as_ref().map_or(destination.as_fd(), AsFd::as_fd);
    let copied = retry_on_intr(|| {
        let (mut from, mut to) = (offset, destination_offset);
        rustix::fs::copy_file_range(source, Some(&mut from), destination, Some(&mut to), length)
    });
    match copied {
        // The end of the source, or a file of which the kernel does not know that it has data.
        Ok(0) => {}
        Err(errno) if is_unsupported(errno) => {}
        result => return result,
    }
    read_and_write(source, offset, destination, destination_offset, length)
}

/// Whether copy_file_range(2) failed because it cannot do this here: the file systems differ, or one of the
/// files is a device.
fn is_unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS)
}

fn read_and_write(
    source: BorrowedFd<'_>,
    offset: u64,
    destination: BorrowedFd<'_>,
    destination_offset: u64,
    length: usize,
) -> Result<usize, Errno> {
    let mut buffer = vec![0; length.min(BUFFER_BYTES)];
    let mut done = 0;
    while done < length {
        let room = buffer.len().min(length - done);
        let result = retry_on_intr(|| rustix::io::pread(source, &mut buffer[..room], offset + done as u64))
            .and_then(|n| write_all(destination, &buffer[..n], destination_offset + done as u64));
        match result {
            Ok(0) => break,
            Ok(n) => done += n,
            // The request that copies the rest from there on returns the error.
            Err(_) if done > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

/// Writes all bytes. Returns fewer if a part of them failed that is not the first.
fn write_all(fd: BorrowedFd<'_>, bytes: &[u8], offset: u64) -> Result<usize, Errno> {
    let mut done = 0;
    while done < bytes.len() {
        match retry_on_intr(|| rustix::io::pwrite(fd, &bytes[done..], offset + done as u64)) {
            Ok(0) if done == 0 => return Err(Errno::IO),
            Err(errno) if done == 0 => return Err(errno),
            Ok(0) | Err(_) => break,
            Ok(n) => done += n,
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tuning::ranges::PIECE_BYTES;

    fn file(bytes: &[u8]) -> std::fs::File {
        let file = tempfile::tempfile().unwrap();
        rustix::io::pwrite(&file, bytes, 0).unwrap();
        file
    }

    fn contents(file: impl AsFd) -> Vec<u8> {
        let mut bytes = vec![0; 100];
        let n = rustix::io::pread(file, &mut bytes[..], 0).unwrap();
        bytes.truncate(n);
        bytes
    }

    #[test]
    fn a_range_is_copied_up_to_the_end_of_the_source() {
        let (source, destination) = (file(b"0123456789"), file(b"abc"));
        assert_eq!(copy(&source, 2, &destination, 1, 4), Ok(4));
        assert_eq!(contents(&destination), b"a2345");
        assert_eq!(copy(&source, 8, &destination, 5, u64::MAX), Ok(2));
        assert_eq!(contents(&destination), b"a234589");
        assert_eq!(copy(&source, 10, &destination, 0, 4), Ok(0));
        assert_eq!(copy(&source, 0, &source, 10, 3), Ok(3));
        assert_eq!(contents(&source), b"0123456789012");
    }

    #[test]
    fn what_the_kernel_cannot_copy_is_read_and_written() {
        let (source, destination) = (file(b"0123456789"), file(b"abc"));
        let (from, to) = (source.as_fd(), destination.as_fd());
        assert_eq!(read_and_write(from, 7, to, 5, 100), Ok(3));
        assert_eq!(contents(&destination), b"abc\x00\x00789");
        // A memfd is on another file system than the other file, or of another kind.
        let memory = rustix::fs::memfd_create("copy", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert_eq!(copy(&source, 0, &memory, 0, 10), Ok(10));
        assert_eq!(contents(&memory), b"0123456789");
    }

    #[test]
    fn one_call_copies_a_piece_at_most_and_an_error_means_that_nothing_was_copied() {
        let (source, destination) = (file(b""), file(b""));
        rustix::fs::ftruncate(&source, PIECE_BYTES + 1).unwrap();
        let copied = copy(&source, 0, &destination, 0, PIECE_BYTES + 1).unwrap() as u64;
        assert!((1..=PIECE_BYTES).contains(&copied), "{copied}");
        let read_only = rustix::fs::open(
            crate::syscalls::proc_path(&destination),
            OFlags::RDONLY | OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        );
        assert_eq!(copy(&source, 0, read_only.unwrap(), 0, 10), Err(Errno::BADF));
    }
}
