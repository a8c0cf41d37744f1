//! Operations as futures, for any executor.
//!
//! libraio has no threads and no executor. An [`AsyncContext`] has a descriptor that is readable when there
//! is something to do; the program waits for that with its executor, and calls [`AsyncContext::run_once`],
//! which wakes the futures of the operations that are over:
//!
//! ```text
//! // tokio. (This constructor is deprecated since 1.54, as descriptors might change. This one does not.)
//! let readiness = tokio::io::unix::AsyncFd::with_interest(context.clone(), Interest::READABLE)?;
//! loop {
//!     let mut ready = readiness.readable().await?;
//!     if context.run_once()? == Progress::Drained {
//!         ready.clear_ready();
//!     }
//! }
//!
//! // async-io, smol
//! let readiness = async_io::Async::new(context.clone())?;
//! loop {
//!     readiness.readable().await?;
//!     context.run_once()?;
//! }
//!
//! // A loop of one's own: add context.as_fd() to poll(2) or epoll(7), and call context.run_once().
//! ```
//!
//! `examples/tokio.rs` is a whole program.

use std::collections::HashMap;
use std::future::Future;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::Duration;

use raio_transport::memory::Buffers;
use raio_transport::protocol::FileStatus;
use raio_transport::sync::lock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::context::Context;
use crate::error::{Error, protocol_error};
use crate::file::File;
use crate::names::{DirEntry, PutOptions};
use crate::operation::{
    Answer, Completion, Operation, PathOperation, Rejected, RejectedPath, SubmitOptions, Ticket,
};

/// A context whose operations are futures. Its clones are the same context, which tasks and threads may
/// share: a lock is held for as long as an operation is submitted, or what has arrived is taken in.
///
/// A future that is dropped before it is ready forgets its operation, which runs to its end: the context owns
/// its buffers until then. A future that is not polled is not submitted. Operations that do not fit in the
/// context wait for others to end.
#[derive(Clone, Debug)]
pub struct AsyncContext {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Of the context's poll descriptor, a duplicate.
    fd: OwnedFd,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    context: Context,
    operations: HashMap<u64, Pending>,
    /// The token of the next operation.
    next: u64,
    /// Of futures whose operations did not fit.
    waiting: Vec<Waker>,
}

#[derive(Debug)]
enum Pending {
    InFlight(Waker),
    Over(Completion),
    /// Its future was dropped.
    Forgotten,
}

/// What [`AsyncContext::run_once`] has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The descriptor is not readable any more. An executor that remembers readiness, such as tokio, is to
    /// forget it.
    Drained,
    /// The descriptor is still readable: call again, after others have had their turn.
    More,
}

impl AsyncContext {
    /// Makes futures of the operations of this context, in which nothing may be in flight. Fails with EINVAL
    /// if something is, and as [`Context::poll_fd`].
    pub fn new(mut context: Context) -> Result<Self, Error> {
        let stats = context.stats();
        if stats.in_flight > 0 || context.wait(0, 1, Some(Duration::ZERO))? > 0 {
            let text = "Operations are in flight in the context. Collect their completions first.";
            return Err(Error::call(libc::EINVAL, text));
        }
        let fd = context.poll_fd()?.try_clone_to_owned().map_err(|error| {
            let errno = error.raw_os_error().unwrap_or(libc::EMFILE);
            Error::call(errno, format!("Cannot duplicate the poll descriptor ({error}). Close some files."))
        })?;
        let inner = Inner { context, operations: HashMap::new(), next: 0, waiting: Vec::new() };
        Ok(Self { shared: Arc::new(Shared { fd, inner: Mutex::new(inner) }) })
    }

    /// Takes in what has arrived, and wakes the futures that are ready by it. Never blocks. To be called when
    /// the descriptor is readable: no future becomes ready otherwise.
    ///
    /// Fails with ENOTCONN once the connection has ended for good, and every operation with it. Operations
    /// that are submitted after that fail at once.
    pub fn run_once(&self) -> Result<Progress, Error> {
        let mut inner = lock(&self.shared.inner);
        let waited = inner.context.wait(0, usize::MAX, Some(Duration::ZERO));
        let mut wakers = Vec::new();
        while let Some(completion) = inner.context.next() {
            if let Some(waker) = inner.complete(completion) {
                wakers.push(waker);
            }
        }
        inner.context.sync_poller();
        wakers.append(&mut inner.waiting);
        drop(inner);
        wakers.into_iter().for_each(Waker::wake);
        waited?;
        let mut readable = [PollFd::new(&self.shared.fd, PollFlags::IN)];
        match poll(&mut readable, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(0) => Ok(Progress::Drained),
            _ => Ok(Progress::More),
        }
    }

    /// Reads into `buffers`. Returns how many bytes, and the buffers.
    pub async fn read(&self, file: &File, offset: u64, buffers: Buffers) -> (Result<u64, Error>, Buffers) {
        self.transfer(file, Operation::Read { offset, buffers }).await
    }

    /// Writes from `buffers`. Returns how many bytes, and the buffers.
    pub async fn write(&self, file: &File, offset: u64, buffers: Buffers) -> (Result<u64, Error>, Buffers) {
        self.transfer(file, Operation::Write { offset, buffers }).await
    }

    async fn transfer(&self, file: &File, operation: Operation) -> (Result<u64, Error>, Buffers) {
        let (result, buffers) = match self.submit(file, operation, SubmitOptions::default()).await {
            Ok(completion) => (completion.result, completion.buffers),
            Err(rejected) => match rejected.operation {
                Operation::Read { buffers, .. } | Operation::Write { buffers, .. } => {
                    (Err(rejected.error), Some(buffers))
                }
                _ => unreachable!("it is a read or a write"),
            },
        };
        match buffers {
            Some(buffers) => (result, buffers),
            None => unreachable!("they come back with the completion"),
        }
    }

    /// Makes what was written and completed durable.
    pub async fn fsync(&self, file: &File, data_only: bool) -> Result<(), Error> {
        match self.submit(file, Operation::Fsync { data_only }, SubmitOptions::default()).await {
            Ok(completion) => completion.result.map(drop),
            Err(rejected) => Err(rejected.error),
        }
    }

    /// Opens a file: see [`crate::Session::open`].
    pub async fn open(&self, path: impl Into<PathBuf>, flags: i32, mode: u32) -> Result<File, Error> {
        match self.answer(PathOperation::Open { path: path.into(), flags, mode }).await? {
            Answer::File(file) => Ok(file),
            _ => Err(protocol_error()),
        }
    }

    /// The status of a path: see [`crate::Session::metadata`].
    pub async fn metadata(&self, path: impl Into<PathBuf>) -> Result<FileStatus, Error> {
        match self.answer(PathOperation::Stat { path: path.into(), nofollow: false }).await? {
            Answer::Status(status) => Ok(status),
            _ => Err(protocol_error()),
        }
    }

    /// All entries of a directory: see [`crate::Session::read_dir`].
    pub async fn read_dir(&self, path: impl Into<PathBuf>) -> Result<Vec<DirEntry>, Error> {
        let mut operation = PathOperation::List { path: path.into() };
        loop {
            match self.answer(operation).await? {
                Answer::Entries(entries) if entries.is_complete() => return entries.collect(),
                Answer::Entries(entries) => operation = PathOperation::ListNext { entries },
                _ => return Err(protocol_error()),
            }
        }
    }

    async fn answer(&self, operation: PathOperation) -> Result<Answer, Error> {
        let completion = self.submit_path(operation, SubmitOptions::default()).await;
        let completion = completion.map_err(|rejected| rejected.error)?;
        completion.result?;
        completion.answer.map(|answer| *answer).ok_or_else(protocol_error)
    }

    /// Reads a file from its start into `buffers`: see [`PathOperation::Get`]. Returns how many bytes with
    /// the file's status, and the buffers.
    pub async fn get(
        &self,
        path: impl Into<PathBuf>,
        buffers: Buffers,
    ) -> (Result<(u64, FileStatus), Error>, Option<Buffers>) {
        let get = PathOperation::Get { path: path.into(), buffers };
        match self.submit_path(get, SubmitOptions::default()).await {
            Ok(Completion { result, buffers, answer, .. }) => {
                let with_status = result.and_then(|count| match answer.as_deref() {
                    Some(Answer::Status(status)) => Ok((count, *status)),
                    _ => Err(protocol_error()),
                });
                (with_status, buffers)
            }
            Err(rejected) => match rejected.operation {
                PathOperation::Get { buffers, .. } => (Err(rejected.error), Some(buffers)),
                _ => (Err(rejected.error), None),
            },
        }
    }

    /// Creates or replaces a file: see [`crate::Session::put`].
    pub async fn put(
        &self,
        path: impl Into<PathBuf>,
        buffers: Buffers,
        options: PutOptions,
    ) -> Result<(), Error> {
        let put = PathOperation::Put { path: path.into(), buffers, options };
        match self.submit_path(put, SubmitOptions::default()).await {
            Ok(completion) => completion.result.map(drop),
            Err(rejected) => Err(rejected.error),
        }
    }

    /// Closes a file: see [`Operation::Close`].
    pub async fn close(&self, file: &File) -> Result<(), Error> {
        match self.submit(file, Operation::Close, SubmitOptions::default()).await {
            Ok(completion) => completion.result.map(drop),
            Err(rejected) => Err(rejected.error),
        }
    }

    /// Any operation on a path, as [`AsyncContext::submit`].
    pub fn submit_path(&self, operation: PathOperation, options: SubmitOptions) -> AsyncPathOperation<'_> {
        AsyncOperation { context: self, state: State::New(Box::new((operation, options))) }
    }

    /// Any operation, with its completion, whose `token` means nothing. A lent buffer is to be given back by
    /// [`AsyncContext::release`].
    pub fn submit<'a>(
        &'a self,
        file: &'a File,
        operation: Operation,
        options: SubmitOptions,
    ) -> AsyncOperation<'a> {
        AsyncOperation { context: self, state: State::New(Box::new((OnFile(file, operation), options))) }
    }

    /// Operations that are in flight or not collected.
    #[cfg(test)]
    pub(crate) fn operations_left(&self) -> usize {
        lock(&self.shared.inner).operations.len()
    }

    /// Returns a buffer that the context lent.
    pub fn release(&self, buffers: Buffers) {
        lock(&self.shared.inner).context.release(buffers);
    }
}

impl AsFd for AsyncContext {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.fd.as_fd()
    }
}

impl AsRawFd for AsyncContext {
    fn as_raw_fd(&self) -> RawFd {
        self.shared.fd.as_raw_fd()
    }
}

impl Inner {
    /// Keeps a completion for its future. Returns how that is woken.
    fn complete(&mut self, completion: Completion) -> Option<Waker> {
        let token = completion.token;
        let pending = self.operations.get_mut(&token)?;
        match std::mem::replace(pending, Pending::Forgotten) {
            Pending::InFlight(waker) => {
                *pending = Pending::Over(completion);
                Some(waker)
            }
            Pending::Over(_) | Pending::Forgotten => {
                self.operations.remove(&token);
                self.drop_completion(completion);
                None
            }
        }
    }

    /// Its future was dropped.
    fn drop_completion(&mut self, completion: Completion) {
        if let (true, Some(buffers)) = (completion.is_lent, completion.buffers) {
            self.context.release(buffers);
        }
    }
}

/// An operation of an [`AsyncContext`]: it is submitted when it is polled first, and ready with its
/// completion, or at once if it was rejected.
#[derive(Debug)]
pub struct AsyncOperation<'a, W = OnFile<'a>> {
    context: &'a AsyncContext,
    state: State<W>,
}

/// An operation on a path of an [`AsyncContext`].
pub type AsyncPathOperation<'a> = AsyncOperation<'a, PathOperation>;

/// An operation on a file.
#[derive(Debug)]
pub struct OnFile<'a>(&'a File, Operation);

/// What can be submitted to a context.
pub trait Work {
    /// How it comes back if it is not taken.
    type Rejected;

    /// Submits it.
    fn submit(
        self,
        context: &mut Context,
        options: SubmitOptions,
        token: u64,
    ) -> Result<Ticket, Self::Rejected>;
}

impl Work for OnFile<'_> {
    type Rejected = Box<Rejected>;

    fn submit(
        self,
        context: &mut Context,
        options: SubmitOptions,
        token: u64,
    ) -> Result<Ticket, Self::Rejected> {
        context.submit_with(self.0, self.1, options, token)
    }
}

impl Work for PathOperation {
    type Rejected = Box<RejectedPath>;

    fn submit(
        self,
        context: &mut Context,
        options: SubmitOptions,
        token: u64,
    ) -> Result<Ticket, Self::Rejected> {
        context.submit_path(self, options, token)
    }
}

#[derive(Debug)]
enum State<W> {
    New(Box<(W, SubmitOptions)>),
    /// With this token.
    Submitted(u64),
    Over,
}

impl<W> Unpin for AsyncOperation<'_, W> {}

impl<W: Work> Future for AsyncOperation<'_, W> {
    type Output = Result<Completion, W::Rejected>;

    fn poll(mut self: Pin<&mut Self>, task: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let mut guard = lock(&this.context.shared.inner);
        let inner = &mut *guard;
        match std::mem::replace(&mut this.state, State::Over) {
            State::New(new) if inner.context.is_full() && inner.context.failure().is_none() => {
                this.state = State::New(new);
                inner.waiting.push(task.waker().clone());
                Poll::Pending
            }
            State::New(new) => {
                let (work, options) = *new;
                let token = inner.next;
                match work.submit(&mut inner.context, options, token) {
                    Ok(_) => {
                        inner.next += 1;
                        inner.operations.insert(token, Pending::InFlight(task.waker().clone()));
                        this.state = State::Submitted(token);
                        inner.context.flush();
                        Poll::Pending
                    }
                    Err(rejected) => Poll::Ready(Err(rejected)),
                }
            }
            State::Submitted(token) => match inner.operations.remove(&token) {
                Some(Pending::Over(completion)) => Poll::Ready(Ok(completion)),
                before => {
                    inner.operations.insert(token, Pending::InFlight(task.waker().clone()));
                    this.state = State::Submitted(token);
                    // To drop a waker may drop a task, and with it another future of this context.
                    drop(guard);
                    drop(before);
                    Poll::Pending
                }
            },
            State::Over => panic!("an operation that was ready was polled again"),
        }
    }
}

impl<W> Drop for AsyncOperation<'_, W> {
    fn drop(&mut self) {
        let State::Submitted(token) = self.state else { return };
        let mut inner = lock(&self.context.shared.inner);
        match inner.operations.insert(token, Pending::Forgotten) {
            Some(Pending::Over(completion)) => {
                inner.operations.remove(&token);
                inner.drop_completion(completion);
            }
            before => {
                drop(inner);
                drop(before);
            }
        }
    }
}
