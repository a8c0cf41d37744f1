//! What runs in lanes: operations by blocking system calls.

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};

use raio_transport::reactor::{self, Sender};
use rustix::io::{Errno, retry_on_intr};

use super::{Call, Closing, Completion, Descriptor, Operation, Outcome};
use crate::client::{Client, OnBehalf};
use crate::syscalls::{FileInfo, extents, stat};
use crate::tenure::Use;
use crate::verifier::Verifier;
use crate::{clear, copy, pool};

/// What a thread does in one go.
#[derive(Debug)]
pub enum Job {
    /// Operations, one after another. Their completions come together.
    Operations(Sender<Completion>, Vec<Task>),
    /// close(2), the verifier that changes if it says that writes were lost, and whom to tell.
    Close(OwnedFd, Arc<Verifier>, Option<Closing>, Use),
    /// close(2) of what was only looked up, or read.
    CloseRead(OwnedFd, Use),
}

/// One operation.
pub struct Task {
    key: u64,
    on_behalf: OnBehalf,
    what: What,
}

enum What {
    On(Arc<Descriptor>, Operation),
    Call(Call),
}

impl Task {
    /// An operation on a file.
    pub(super) fn on(key: u64, client: &Weak<Client>, file: &Arc<Descriptor>, operation: Operation) -> Self {
        Self { key, on_behalf: OnBehalf::of(client), what: What::On(Arc::clone(file), operation) }
    }

    /// A call.
    pub(super) fn call(key: u64, client: &Weak<Client>, call: Call) -> Self {
        Self { key, on_behalf: OnBehalf::of(client), what: What::Call(call) }
    }

    /// Carries it out. If it panics, which the log says, it alone has failed: its request ends, and the
    /// thread goes on.
    fn run(self) -> Completion {
        let key = self.key;
        let failed = |_| Completion { key, result: Err(libc::EIO), outcome: Outcome::None };
        catch_unwind(AssertUnwindSafe(|| self.carry_out())).unwrap_or_else(failed)
    }

    fn carry_out(self) -> Completion {
        if self.on_behalf.is_over() {
            return self.cancelled();
        }
        let (result, outcome) = match self.what {
            What::On(file, operation) => operation.run(&file),
            What::Call(call) => (Ok(0), Outcome::Returned(call())),
        };
        Completion { key: self.key, result, outcome }
    }

    /// What comes of one that has been cancelled before it began.
    pub(super) fn cancelled(self) -> Completion {
        self.unbegun(libc::ECANCELED)
    }

    /// What comes of one that has not begun and will not, because of this errno.
    fn unbegun(self, errno: i32) -> Completion {
        let outcome = match self.what {
            What::On(_, Operation::Read { target: range, .. } | Operation::Write { source: range, .. }) => {
                Outcome::Slot(range)
            }
            _ => Outcome::None,
        };
        Completion { key: self.key, result: Err(errno), outcome }
    }
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Task").field("key", &self.key).finish_non_exhaustive()
    }
}

impl Job {
    /// Operations whose completions go to a worker.
    pub(super) fn new(to: Sender<Completion>, tasks: Vec<Task>) -> Self {
        Self::Operations(to, tasks)
    }

    /// Takes out an operation.
    pub(super) fn take(&mut self, key: u64) -> Option<Task> {
        match self {
            Self::Operations(_, tasks) => take(tasks, key),
            Self::Close(..) | Self::CloseRead(..) => None,
        }
    }
}

/// Takes an operation out, by its key.
pub(super) fn take(tasks: &mut Vec<Task>, key: u64) -> Option<Task> {
    let at = tasks.iter().position(|task| task.key == key)?;
    let task = tasks.remove(at);
    // One that stays may stay for long.
    tasks.shrink_to(2 * tasks.len());
    Some(task)
}

impl pool::Job for Job {
    fn run(self) {
        match self {
            // The worker is woken once, when all have ended.
            Self::Operations(to, tasks) => to.send_all(tasks.into_iter().map(Task::run)),
            Self::Close(fd, verifier, closing, use_of_export) => {
                let closed = reactor::close(fd);
                if closed.is_err_and(loses_writes) {
                    verifier.writes_were_lost();
                }
                drop(use_of_export);
                if let Some(closing) = closing {
                    closing.complete(closed);
                }
            }
            Self::CloseRead(fd, use_of_export) => {
                let _ = reactor::close(fd);
                drop(use_of_export);
            }
        }
    }

    #[cfg(any(test, feature = "test-worker"))]
    fn begin(&mut self) {
        let Self::Operations(_, tasks) = self else { return };
        for task in tasks.iter_mut().filter(|task| !task.on_behalf.is_over()) {
            task.on_behalf = OnBehalf::uncancellable();
        }
    }

    fn is_empty(&self) -> bool {
        matches!(self, Self::Operations(_, tasks) if tasks.is_empty())
    }

    fn reject(self) -> Option<Self> {
        match self {
            Self::Operations(to, tasks) => {
                to.send_all(tasks.into_iter().map(|task| task.unbegun(libc::EAGAIN)));
                None
            }
            Self::Close(..) | Self::CloseRead(..) => Some(self),
        }
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take() {
            let lane = self.lanes().control;
            let verifier = Arc::clone(&self.verifier);
            let use_of_export = Use::of(&self.lanes().tenure);
            lane.submit(lane.ticket(), Job::Close(fd, verifier, self.closing.take(), use_of_export));
        }
    }
}

/// Whether an fsync, or a close, that ends with this errno may have lost what was written before: it has been
/// attempted.
fn loses_writes(errno: i32) -> bool {
    !matches!(
        errno,
        libc::EINVAL | libc::EBADF | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINTR | libc::EAGAIN
    )
}

/// Whether a write that does not return before it is on the disk, and ends with this errno, says that the
/// disk fails or is full.
pub(super) fn is_failed_write(errno: i32) -> bool {
    matches!(errno, libc::EIO | libc::ENOSPC)
}

impl Operation {
    fn run(self, fd: &Descriptor) -> (Result<u32, i32>, Outcome) {
        let nothing = |result: Result<(), Errno>| (result.map(|()| 0), Outcome::None);
        let status = |result: Result<FileInfo, Errno>| match result {
            Ok(info) => (Ok(0), Outcome::Stat(Box::new(info))),
            Err(errno) => (Err(errno), Outcome::None),
        };
        let cleared = |result: Result<u64, Errno>| match result {
            Ok(done) => (Ok(0), Outcome::Cleared(done)),
            Err(errno) => (Err(errno), Outcome::None),
        };
        let (result, outcome) = match self {
            Self::Read { mut target, offset } => {
                let bytes = target.bytes_mut();
                let result = retry_on_intr(|| rustix::io::pread(fd, &mut *bytes, offset));
                (result.map(|n| n as u32), Outcome::Slot(target))
            }
            Self::Write { source, offset } => {
                let bytes = source.bytes();
                let result = retry_on_intr(|| rustix::io::pwrite(fd, bytes, offset));
                if !fd.is_write_back && result.is_err_and(|errno| is_failed_write(errno.raw_os_error())) {
                    fd.verifier.writes_were_lost();
                }
                (result.map(|n| n as u32), Outcome::Slot(source))
            }
            Self::Fsync { data_only } => {
                let fsync = if data_only { rustix::fs::fdatasync } else { rustix::fs::fsync };
                let result = retry_on_intr(|| fsync(fd));
                // At once: the kernel tells of lost writes once, and a process that opens the file from now
                // on, or a server that is started after this one was killed, gets success.
                if result.is_err_and(|errno| loses_writes(errno.raw_os_error())) {
                    fd.verifier.writes_were_lost();
                }
                nothing(result)
            }
            Self::Discard { offset, length } => cleared(clear::discard(fd, offset, length)),
            Self::WriteZeroes { offset, length } => cleared(clear::write_zeroes(fd, offset, length)),
            Self::Allocate { offset, length, keep_size } => {
                cleared(clear::allocate(fd, offset, length, keep_size))
            }
            Self::Stat => status(stat(fd)),
            Self::Truncate { size } => nothing(retry_on_intr(|| rustix::fs::ftruncate(fd, size))),
            Self::Extents { offset, length } => match extents(fd, offset, length) {
                Ok((extents, end)) => (Ok(0), Outcome::Extents(extents, end)),
                Err(errno) => (Err(errno), Outcome::None),
            },
            Self::Copy { source, source_offset, offset, length } => {
                let result = copy::copy(&*source, source_offset, fd, offset, length);
                if !fd.is_write_back && result.is_err_and(|errno| is_failed_write(errno.raw_os_error())) {
                    fd.verifier.writes_were_lost();
                }
                (result.map(|n| n as u32), Outcome::None)
            }
            Self::Checksum { mut checksum, offset, length } => match checksum.read(fd, offset, length) {
                Ok(n) => (Ok(n as u32), Outcome::Checksum(checksum)),
                Err(errno) => (Err(errno), Outcome::None),
            },
            Self::Lock(operation) => match retry_on_intr(|| rustix::fs::flock(fd, operation)) {
                Ok(()) => (Ok(0), Outcome::Locked(true)),
                Err(Errno::WOULDBLOCK) => (Ok(0), Outcome::Locked(false)),
                Err(errno) => (Err(errno), Outcome::None),
            },
        };
        (result.map_err(Errno::raw_os_error), outcome)
    }
}
