//! TCP sockets whose records of TLS the kernel seals and opens (kTLS, Documentation/networking/tls.rst).
//! Neither rustix nor socket2 has these options and control messages.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::tuning::CONTROL_RECORD_BYTES;

/// The most that a control message of one byte takes, in words, for it must be aligned.
const CONTROL_WORDS: usize = 8;

/// Gives a connected socket the kernel's record layer, which does nothing before it has keys
/// ([`set_tls_keys`]). ENOENT: the kernel has none.
pub fn attach_tls(socket: impl AsFd) -> io::Result<()> {
    set(socket, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls")
}

/// Gives the record layer of a socket its keys, each as the kernel's `struct tls12_crypto_info_*` has it.
/// From then on what is sent is sealed, and what is received was opened.
pub fn set_tls_keys(socket: impl AsFd, sending: &[u8], receiving: &[u8]) -> io::Result<()> {
    set(&socket, libc::SOL_TLS, libc::TLS_TX, sending)?;
    set(&socket, libc::SOL_TLS, libc::TLS_RX, receiving)
}

fn set(socket: impl AsFd, level: libc::c_int, option: libc::c_int, value: &[u8]) -> io::Result<()> {
    let (fd, len) = (socket.as_fd().as_raw_fd(), value.len() as libc::socklen_t);
    // SAFETY: the kernel reads the `len` bytes of `value`.
    match unsafe { libc::setsockopt(fd, level, option, value.as_ptr().cast(), len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends a record that is no data, without waiting.
pub fn send_control_record(socket: impl AsFd, kind: u8, bytes: &[u8]) -> io::Result<()> {
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = [0_u64; CONTROL_WORDS];
    let mut message = message_of(&mut iov, &mut control);
    // SAFETY: `message` has the address and the length of `control`, which is aligned and has room for a
    // control message of one byte, and so for its header.
    let sent = unsafe {
        message.msg_controllen = libc::CMSG_SPACE(1) as _;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_TLS;
        (*header).cmsg_type = libc::TLS_SET_RECORD_TYPE;
        (*header).cmsg_len = libc::CMSG_LEN(1) as _;
        libc::CMSG_DATA(header).write(kind);
        // The kernel reads `bytes`, and changes nothing.
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const message, flags)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Receives the record that is no data for which a receive has failed with EIO. Returns its type and what is
/// in it, or the front of that.
pub fn receive_control_record(socket: impl AsFd) -> io::Result<(u8, Vec<u8>)> {
    let mut bytes = vec![0_u8; CONTROL_RECORD_BYTES];
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut control = [0_u64; CONTROL_WORDS];
    let mut message = message_of(&mut iov, &mut control);
    // SAFETY: the kernel writes what it has into `bytes` and `control`, no more than their lengths, which
    // `message` has.
    let n = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    bytes.truncate(n as usize);
    // SAFETY: the kernel has put whole control messages into `control`, and their length into `message`. One
    // of this type has a byte.
    let kind = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let is_kind = !header.is_null()
            && (*header).cmsg_level == libc::SOL_TLS
            && (*header).cmsg_type == libc::TLS_GET_RECORD_TYPE;
        is_kind.then(|| libc::CMSG_DATA(header).read())
    };
    Ok((kind.ok_or(io::ErrorKind::InvalidData)?, bytes))
}

/// With these bytes, and all this room for control messages.
fn message_of(iov: &mut libc::iovec, control: &mut [u64; CONTROL_WORDS]) -> libc::msghdr {
    // SAFETY: msghdr is plain data for which all zeros is valid: no name, no flags.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iov;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(control) as _;
    message
}
