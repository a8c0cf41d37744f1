//! Operations tried by plain system calls, without blocking: what the epoll engine is made of, and what
//! spares the ring engine its detours where an operation will most likely end at once.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;

use rustix::net::{self, RecvFlags, SocketFlags};

use super::received::Pool;
use super::{Event, File, Op, Payload, SendBatch, Token};

/// Tries an operation without blocking.
pub(super) fn attempt(op: &mut Op, pool: &Rc<Pool>) -> Result<(u32, Payload), i32> {
    let errno = |error: rustix::io::Errno| error.raw_os_error();
    match op {
        Op::Accept { listener } => {
            let fd =
                net::accept_with(&*listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).map_err(errno)?;
            Ok((0, Payload::Fd(fd)))
        }
        Op::Recv { socket, len_max } => {
            let fd = socket.as_raw_fd();
            let received = pool.fill(|address, len| {
                let len = len.min(*len_max as usize);
                // SAFETY: `address` and at least `len` are a free buffer of the pool's, which only this call
                // has.
                let n = unsafe { libc::recv(fd, address.cast(), len, libc::MSG_DONTWAIT) };
                if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
            });
            match received {
                None => Err(libc::ENOBUFS),
                Some(Ok(received)) => Ok((received.len() as u32, Payload::Received(received))),
                Some(Err(error)) => Err(error.raw_os_error().unwrap_or(libc::EIO)),
            }
        }
        Op::RecvInto { socket, target } => {
            let bytes = target.bytes_mut();
            let (n, _) = net::recv(&*socket, bytes, RecvFlags::DONTWAIT).map_err(errno)?;
            Ok((n as u32, Payload::None))
        }
        Op::Send { socket, batch } => send(socket, batch).map(|n| (n, Payload::None)),
        Op::Readable { file } => {
            let mut fds =
                [rustix::event::PollFd::from_borrowed_fd(file.as_fd(), rustix::event::PollFlags::IN)];
            let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            match rustix::event::poll(&mut fds, Some(&zero)).map_err(errno)? {
                0 => Err(libc::EAGAIN),
                _ => Ok((1, Payload::None)),
            }
        }
        _ => unreachable!("`submit` rejects file operations"),
    }
}

/// Tries to send a batch without blocking.
pub(super) fn send(socket: &File, batch: &mut SendBatch) -> Result<u32, i32> {
    // SAFETY: the header points into `batch`, which is borrowed for the length of this call.
    let n =
        unsafe { libc::sendmsg(socket.as_raw_fd(), batch.msghdr(), libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    if n < 0 { Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)) } else { Ok(n as u32) }
}

/// The end of an operation that was tried.
pub(super) fn ended(token: Token, op: Op, outcome: Result<(u32, Payload), i32>) -> Event {
    let (result, new) = match outcome {
        Ok((count, payload)) => (Ok(count), payload),
        Err(errno) => (Err(errno), Payload::None),
    };
    let payload = match op {
        Op::RecvInto { target, .. } => Payload::Slot(target),
        Op::Send { mut batch, .. } => {
            batch.advance(result.unwrap_or(0) as usize);
            Payload::Batch(batch)
        }
        _ => new,
    };
    Event { token, result, payload }
}
