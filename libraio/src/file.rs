//! An open file of a session.
//!
//! Closing waits for nothing: I/O that is in flight when the file is closed runs to its end, and the server
//! is told only then. For that each context that uses a file keeps a count of its own of what it has in
//! flight on it, a plain store on the data path; whoever closes looks at all counts, and the context that
//! brings the last one to zero looks whether the file was closed meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use raio_transport::protocol::{FileHandle, FileStatus};

use crate::error::Error;
use crate::session::Shared;

/// An open file. Usable from every context of its session, and from any thread; dropping it closes it.
#[derive(Debug)]
pub struct File {
    inner: Arc<Inner>,
}

/// What contexts share with the file.
#[derive(Debug)]
pub(crate) struct Inner {
    session: Arc<Shared>,
    handle: FileHandle,
    /// Differs from that of every other file of this process.
    number: u64,
    /// What each context has in flight.
    in_flight: Mutex<Vec<Arc<AtomicUsize>>>,
    /// No new I/O; the server is to be told once nothing is in flight.
    closing: AtomicBool,
    /// The server has been told.
    closed: AtomicBool,
}

impl File {
    pub(crate) fn new(session: Arc<Shared>, handle: FileHandle) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        Self {
            inner: Arc::new(Inner {
                session,
                handle,
                number: NUMBER.fetch_add(1, Ordering::Relaxed),
                in_flight: Mutex::new(Vec::new()),
                closing: AtomicBool::new(false),
                closed: AtomicBool::new(false),
            }),
        }
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// Asks the server for the file's present status. Blocks for a round trip.
    pub fn status(&self) -> Result<FileStatus, Error> {
        if self.inner.is_closing() {
            return Err(Error::call(libc::EBADF, "The file has been closed. Open it again."));
        }
        self.inner.session.status(self.inner.handle)
    }

    /// Closes it. New operations on it are rejected from now on; those in flight run to their end. Blocks for
    /// a round trip, unless something is in flight. Closing twice does nothing.
    pub fn close(&self) -> Result<(), Error> {
        self.inner.session.check_process()?;
        if self.inner.closing.swap(true, Ordering::SeqCst) || !self.inner.take_last() {
            return Ok(());
        }
        self.inner.session.close(self.inner.handle)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        if !self.inner.session.is_inherited() && !self.inner.closing.swap(true, Ordering::SeqCst) {
            self.inner.ended();
        }
    }
}

impl Inner {
    pub(crate) fn handle(&self) -> FileHandle {
        self.handle
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn session(&self) -> &Arc<Shared> {
        &self.session
    }

    pub(crate) fn is_closing(&self) -> bool {
        // Pairs with the store of a count in `Use::remove`: at least one of the two threads sees what the
        // other wrote.
        self.closing.load(Ordering::SeqCst)
    }

    /// Whether nothing is in flight, and the server is not yet told: the caller must tell it.
    fn take_last(&self) -> bool {
        let counts = self.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().all(|count| count.load(Ordering::SeqCst) == 0)
            && !self.closed.swap(true, Ordering::SeqCst)
    }

    /// Tells the server that the file is closed, if nothing is in flight.
    fn ended(&self) {
        if self.take_last() {
            self.session.close_later(self.handle);
        }
    }
}

/// A file in a context that uses it.
#[derive(Debug)]
pub(crate) struct Use {
    file: Arc<Inner>,
    /// Written by the context alone.
    in_flight: Arc<AtomicUsize>,
}

impl Use {
    pub(crate) fn new(file: Arc<Inner>) -> Self {
        let in_flight = Arc::new(AtomicUsize::new(0));
        file.in_flight.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&in_flight));
        Self { file, in_flight }
    }

    pub(crate) fn file(&self) -> &Inner {
        &self.file
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.in_flight.load(Ordering::Relaxed) == 0
    }

    /// Notes that one more operation is in flight.
    pub(crate) fn add(&self) {
        self.in_flight.store(self.in_flight.load(Ordering::Relaxed) + 1, Ordering::Release);
    }

    /// Notes that one has come to its end.
    pub(crate) fn remove(&self) {
        let left = self.in_flight.load(Ordering::Relaxed) - 1;
        if left > 0 {
            self.in_flight.store(left, Ordering::Release);
        } else {
            self.in_flight.store(0, Ordering::SeqCst);
            if self.file.is_closing() {
                self.file.ended();
            }
        }
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        if self.file.session.is_inherited() {
            return;
        }
        self.in_flight.store(0, Ordering::SeqCst);
        let mut counts = self.file.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        counts.retain(|count| !Arc::ptr_eq(count, &self.in_flight));
        drop(counts);
        if self.file.is_closing() {
            self.file.ended();
        }
    }
}
