//! The eventfds of iocbs in flight.

use std::ffi::{c_int, c_long, c_uint};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use super::errors::invalid;
use crate::error::Error;

/// The eventfds of iocbs in flight, each held open under a number of the library's: what has the program's
/// number when the iocb ends may be something else.
#[derive(Default)]
pub(super) struct Eventfds {
    /// One for each of the program's numbers. The iocbs hold them.
    held: Vec<HeldEventfd>,
    /// Counts the batches submitted: within one, a number is looked at once.
    pub(super) batch: u64,
}

struct HeldEventfd {
    number: c_int,
    eventfd: Weak<OwnedFd>,
    /// The batch in which it was last seen to have this number.
    batch: u64,
}

impl Eventfds {
    /// The eventfd that has this number now.
    pub(super) fn hold(&mut self, number: c_uint) -> Result<Arc<OwnedFd>, Error> {
        let fd = c_int::try_from(number).map_err(|_| {
            invalid("The iocb's eventfd is negative. Pass one from eventfd(2) to raio_set_eventfd().")
        })?;
        if let Some(held) = self.held.iter_mut().find(|held| held.number == fd)
            && let Some(eventfd) = held.eventfd.upgrade()
            && (held.batch == self.batch || is_same_file(fd, eventfd.as_raw_fd()))
        {
            held.batch = self.batch;
            return Ok(eventfd);
        }
        let eventfd = Arc::new(duplicate_eventfd(fd)?);
        self.held.retain(|held| held.number != fd && held.eventfd.strong_count() > 0);
        self.held.push(HeldEventfd { number: fd, eventfd: Arc::downgrade(&eventfd), batch: self.batch });
        Ok(eventfd)
    }
}

/// Whether two descriptors of this process are of one open file. False also where kcmp(2) is not there, or
/// forbidden.
fn is_same_file(one: c_int, other: c_int) -> bool {
    const KCMP_FILE: c_int = 0;
    let me = std::process::id();
    // SAFETY: kcmp(2) takes numbers alone; one that is not open is an error.
    unsafe { libc::syscall(libc::SYS_kcmp, me, me, KCMP_FILE, c_long::from(one), c_long::from(other)) == 0 }
}

fn duplicate_eventfd(fd: c_int) -> Result<OwnedFd, Error> {
    // SAFETY: not negative; a number that is not open is an error of fcntl(2), and nothing is kept of the
    // borrow.
    let eventfd =
        rustix::io::fcntl_dupfd_cloexec(unsafe { BorrowedFd::borrow_raw(fd) }, 0).map_err(|errno| {
            let text = format!(
                "The iocb's eventfd {fd} cannot be used ({errno}). Pass an open one from eventfd(2)."
            );
            Error::call(errno.raw_os_error(), text)
        })?;
    if is_eventfd(&eventfd) {
        Ok(eventfd)
    } else {
        Err(invalid(format!("The iocb's eventfd {fd} is another kind of file. Pass one from eventfd(2).")))
    }
}

fn is_eventfd(fd: &OwnedFd) -> bool {
    match rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new()) {
        Ok(target) => target.as_bytes() == b"anon_inode:[eventfd]",
        // Without /proc: it has no file type, as little else does, and nothing else of that kind takes eight
        // bytes.
        Err(_) => rustix::fs::fstat(fd).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == 0),
    }
}
