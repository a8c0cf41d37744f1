//! The backend for where io_uring is forbidden: a few threads that make blocking system calls.
//!
//! Operations wait in one queue, in order. Completions come back through a mailbox, which wakes the worker.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use raio_transport::protocol::FileStatus;
use raio_transport::reactor::{Event, Fallocate, OpId, OpenHow, Reactor, Receiver, Sender, mailbox};
use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;

use super::{Backend, Completion, Handle, Operation, Outcome, file_info};

/// Enough to keep a disk busy that serves several requests at a time.
const THREADS: usize = 16;

/// A pool of threads.
#[derive(Debug)]
pub struct Threads {
    queue: Arc<Queue>,
    cancelled: VecDeque<Completion>,
    ended: Receiver<Completion>,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: Mutex<Jobs>,
    ready: Condvar,
}

#[derive(Debug, Default)]
struct Jobs {
    waiting: VecDeque<(u64, Job)>,
    is_over: bool,
}

#[derive(Debug)]
enum Job {
    On(Arc<OwnedFd>, Operation),
    Close(OwnedFd),
}

impl Threads {
    /// Starts the threads. They end when this is dropped and what they are at is done.
    pub fn new(reactor: &Reactor) -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let (sender, ended) = mailbox(reactor.waker());
        let this = Self { queue: Arc::clone(&queue), cancelled: VecDeque::new(), ended };
        for _ in 0..THREADS {
            let (queue, sender) = (Arc::clone(&queue), sender.clone());
            std::thread::Builder::new().name("raio-io".into()).spawn(move || queue.work(&sender))?;
        }
        Ok(this)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.queue.lock().is_over = true;
        self.queue.ready.notify_all();
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, key: u64, job: Job) {
        self.lock().waiting.push_back((key, job));
        self.ready.notify_one();
    }

    fn work(&self, ended: &Sender<Completion>) {
        loop {
            let mut jobs = self.lock();
            let (key, job) = loop {
                if let Some(next) = jobs.waiting.pop_front() {
                    break next;
                }
                if jobs.is_over {
                    return;
                }
                jobs = self.ready.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            };
            drop(jobs);
            let (result, outcome) = job.run();
            let result = result.map_err(Errno::raw_os_error);
            ended.send(Completion { key, result, outcome });
        }
    }
}

impl Job {
    fn run(self) -> (Result<u32, Errno>, Outcome) {
        let (fd, operation) = match self {
            Self::On(fd, operation) => (fd, operation),
            Self::Close(fd) => {
                // Safe Rust has no close(2) that says how it went; only the ring's close can report a late write error.
                drop(fd);
                return (Ok(0), Outcome::None);
            }
        };
        let nothing = |result: Result<(), Errno>| (result.map(|()| 0), Outcome::None);
        match operation {
            Operation::Read { mut target, offset } => {
                let bytes = target.bytes_mut();
                let result = rustix::io::retry_on_intr(|| rustix::io::pread(&*fd, &mut *bytes, offset));
                (result.map(|n| n as u32), Outcome::Slot(target))
            }
            Operation::Write { source, offset } => {
                let bytes = source.bytes();
                let result = rustix::io::retry_on_intr(|| rustix::io::pwrite(&*fd, bytes, offset));
                (result.map(|n| n as u32), Outcome::Slot(source))
            }
            Operation::Fsync { data_only: true } => {
                nothing(rustix::io::retry_on_intr(|| rustix::fs::fdatasync(&*fd)))
            }
            Operation::Fsync { data_only: false } => {
                nothing(rustix::io::retry_on_intr(|| rustix::fs::fsync(&*fd)))
            }
            Operation::Fallocate { how, offset, length } => {
                let flags = match how {
                    Fallocate::PunchHole => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    Fallocate::ZeroRange => FallocateFlags::ZERO_RANGE,
                };
                nothing(rustix::io::retry_on_intr(|| rustix::fs::fallocate(&*fd, flags, offset, length)))
            }
            Operation::Stat => {
                let mask = StatxFlags::BASIC_STATS | StatxFlags::from_bits_retain(libc::STATX_DIOALIGN);
                match rustix::fs::statx(&*fd, c"", AtFlags::EMPTY_PATH, mask) {
                    Ok(stat) => (Ok(0), Outcome::Stat(Box::new(file_info!(stat)))),
                    Err(error) => (Err(error), Outcome::None),
                }
            }
            Operation::Open { path, how } => {
                let OpenHow { flags, mode, resolve } = *how;
                let (flags, mode) =
                    (OFlags::from_bits_retain(flags as u32), Mode::from_bits_retain(mode as u32));
                let resolve = ResolveFlags::from_bits_retain(resolve);
                match rustix::io::retry_on_intr(|| rustix::fs::openat2(&*fd, &*path, flags, mode, resolve)) {
                    Ok(fd) => (Ok(0), Outcome::Fd(fd)),
                    Err(error) => (Err(error), Outcome::None),
                }
            }
        }
    }
}

impl Backend for Threads {
    fn submit(
        &mut self,
        _reactor: &mut Reactor,
        key: u64,
        file: &Handle,
        operation: Operation,
    ) -> Option<OpId> {
        self.queue.push(key, Job::On(Arc::clone(&file.fd), operation));
        None
    }

    fn close(&mut self, _reactor: &mut Reactor, key: u64, fd: OwnedFd) {
        self.queue.push(key, Job::Close(fd));
    }

    fn cancel(&mut self, _reactor: &mut Reactor, key: u64, _id: Option<OpId>) {
        let mut jobs = self.queue.lock();
        let is_it = |(other, job): &(u64, Job)| *other == key && matches!(job, Job::On(..));
        let Some(at) = jobs.waiting.iter().position(is_it) else { return };
        let Some((_, job)) = jobs.waiting.remove(at) else { return };
        drop(jobs);
        let outcome = match job {
            Job::On(_, Operation::Read { target: range, .. } | Operation::Write { source: range, .. }) => {
                Outcome::Slot(range)
            }
            Job::On(..) | Job::Close(_) => Outcome::None,
        };
        self.cancelled.push_back(Completion { key, result: Err(libc::ECANCELED), outcome });
    }

    fn handle(&mut self, event: Event) {
        unreachable!("this backend submits nothing to the reactor, yet there is {event:?}");
    }

    fn next(&mut self) -> Option<Completion> {
        self.cancelled.pop_front().or_else(|| self.ended.take())
    }
}
