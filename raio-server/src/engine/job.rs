//! What runs in lanes: operations by blocking system calls.

use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};

use raio_transport::protocol::FileStatus;
use raio_transport::reactor::{self, Sender};
use rustix::fs::{AtFlags, FileType, SeekFrom, StatxFlags};
use rustix::io::{Errno, retry_on_intr};

use super::{Call, Completion, DETACHED, Descriptor, FileInfo, Operation, Outcome};
use crate::client::{Client, OnBehalf};
use crate::limits::FilePermit;
use crate::{clear, pool};

/// One or several operations that a thread carries out one after another. Their completions come together.
#[derive(Debug)]
pub struct Job {
    to: Option<Sender<Completion>>,
    tasks: Vec<Task>,
}

/// One operation.
pub(super) struct Task {
    key: u64,
    /// None: it runs whoever is there.
    on_behalf: Option<OnBehalf>,
    what: What,
}

enum What {
    On(Arc<Descriptor>, Operation),
    Call(Call),
    Close(OwnedFd, Option<Arc<FilePermit>>),
}

impl Task {
    /// An operation on a file.
    pub fn on(key: u64, client: &Weak<Client>, file: &Arc<Descriptor>, operation: Operation) -> Self {
        Self { key, on_behalf: Some(OnBehalf::of(client)), what: What::On(Arc::clone(file), operation) }
    }

    /// A call.
    pub fn call(key: u64, client: &Weak<Client>, call: Call) -> Self {
        Self { key, on_behalf: Some(OnBehalf::of(client)), what: What::Call(call) }
    }

    /// Carries it out. If it panics, which the log says, it alone has failed: its request ends, and the
    /// thread goes on.
    fn run(self) -> Completion {
        let key = self.key;
        let failed = |_| Completion { key, result: Err(libc::EIO), outcome: Outcome::None };
        catch_unwind(AssertUnwindSafe(|| self.carry_out())).unwrap_or_else(failed)
    }

    fn carry_out(self) -> Completion {
        if self.on_behalf.as_ref().is_some_and(OnBehalf::is_over) {
            return self.cancelled();
        }
        let (result, outcome) = match self.what {
            What::On(file, operation) => operation.run(&file),
            What::Call(call) => (Ok(0), call()),
            What::Close(fd, place) => {
                let closed = reactor::close(fd).map(|()| 0);
                drop(place);
                (closed, Outcome::None)
            }
        };
        Completion { key: self.key, result, outcome }
    }

    /// What comes of one that has been cancelled before it began.
    pub fn cancelled(self) -> Completion {
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
        Self { to: Some(to), tasks }
    }

    /// close(2), after which the file's place is free, and whom to tell how it went.
    pub(super) fn close(
        fd: OwnedFd,
        place: Option<Arc<FilePermit>>,
        report: Option<(Sender<Completion>, u64)>,
    ) -> Self {
        let (to, key) = report.map_or((None, DETACHED), |(to, key)| (Some(to), key));
        Self { to, tasks: vec![Task { key, on_behalf: None, what: What::Close(fd, place) }] }
    }

    /// Takes out an operation.
    pub(super) fn take(&mut self, key: u64) -> Option<Task> {
        take(&mut self.tasks, key)
    }
}

/// Takes an operation out, by its key, if it can be cancelled.
pub(super) fn take(tasks: &mut Vec<Task>, key: u64) -> Option<Task> {
    let at = tasks.iter().position(|task| task.key == key && !matches!(task.what, What::Close(..)))?;
    let task = tasks.remove(at);
    // One that stays may stay for long.
    tasks.shrink_to(2 * tasks.len());
    Some(task)
}

impl pool::Job for Job {
    fn run(self) {
        let completions = self.tasks.into_iter().map(Task::run);
        match self.to {
            // The worker hears of them once all have ended.
            Some(to) => to.send_all(completions),
            None => completions.for_each(drop),
        }
    }

    fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    fn reject(self) -> Option<Self> {
        if self.tasks.iter().any(|task| matches!(task.what, What::Close(..))) {
            return Some(self);
        }
        let rejected = self.tasks.into_iter().map(|task| task.unbegun(libc::EAGAIN));
        if let Some(to) = self.to {
            to.send_all(rejected);
        }
        None
    }
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
                (result.map(|n| n as u32), Outcome::Slot(source))
            }
            Self::Fsync { data_only: true } => nothing(retry_on_intr(|| rustix::fs::fdatasync(fd))),
            Self::Fsync { data_only: false } => nothing(retry_on_intr(|| rustix::fs::fsync(fd))),
            Self::Discard { offset, length } => cleared(clear::discard(fd, offset, length)),
            Self::WriteZeroes { offset, length } => cleared(clear::write_zeroes(fd, offset, length)),
            Self::Allocate { offset, length, keep_size } => {
                cleared(clear::allocate(fd, offset, length, keep_size))
            }
            Self::Stat => status(stat(fd)),
        };
        (result.map_err(Errno::raw_os_error), outcome)
    }
}

/// The status of an open file, with a block device's capacity as its size.
pub fn stat(fd: impl AsFd) -> Result<FileInfo, Errno> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::from_bits_retain(libc::STATX_DIOALIGN);
    let stat = rustix::fs::statx(&fd, c"", AtFlags::EMPTY_PATH, mask)?;
    let is_device = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::BlockDevice;
    let size = if is_device { rustix::fs::seek(&fd, SeekFrom::End(0))? } else { stat.stx_size };
    let ns = |seconds: i64, ns: u32| seconds.saturating_mul(1_000_000_000).saturating_add(ns.into()).into();
    let device = |major, minor| libc::makedev(major, minor).into();
    let knows_align = stat.stx_mask & libc::STATX_DIOALIGN != 0 && stat.stx_dio_offset_align > 0;
    Ok(FileInfo {
        status: FileStatus {
            size: size.into(),
            blocks: stat.stx_blocks.into(),
            inode: stat.stx_ino.into(),
            device: device(stat.stx_dev_major, stat.stx_dev_minor),
            rdevice: device(stat.stx_rdev_major, stat.stx_rdev_minor),
            accessed_ns: ns(stat.stx_atime.tv_sec, stat.stx_atime.tv_nsec),
            modified_ns: ns(stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            changed_ns: ns(stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
            mode: u32::from(stat.stx_mode).into(),
            links: stat.stx_nlink.into(),
            uid: stat.stx_uid.into(),
            gid: stat.stx_gid.into(),
            block_bytes: stat.stx_blksize.into(),
            direct_align: 1.into(),
        },
        direct_align: knows_align.then_some(stat.stx_dio_offset_align),
    })
}
