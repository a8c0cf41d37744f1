//! An open file of a session.
//!
//! Closing waits for nothing: I/O that is in flight when the file is closed runs to its end, and the server
//! is told only then. Therefore each context that uses a file has a [`FileRef`] with its own count of the
//! operations in flight, which costs the data path a plain store. The closing thread reads all counts. The
//! context that brings the last count to zero checks whether the file was closed meanwhile.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use raio_transport::channel::Reopenable;
use raio_transport::protocol::{self, Command, FileHandle, FileStatus};

use crate::error::{Error, protocol_error};
use crate::names::path_bytes;
use crate::open_flags::open_flags;
use crate::session::{Session, Shared};
use raio_transport::sync::lock;

/// An open file. Usable from every context of its session, and from any thread; dropping it closes it.
#[derive(Debug)]
pub struct File {
    inner: Arc<Inner>,
}

/// A file that another one is copied from: [`crate::Operation::Copy`]. It does not keep the file open.
#[derive(Clone, Debug)]
pub struct CopySource(Arc<Inner>);

impl CopySource {
    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.0
    }
}

/// What contexts share with the file.
#[derive(Debug)]
pub(crate) struct Inner {
    session: Arc<Shared>,
    handle: FileHandle,
    /// Differs from that of every other file of this process.
    number: u64,
    /// Its verifier when it was opened.
    verifier: u64,
    /// Its writes are durable when they are acknowledged.
    is_synced: bool,
    /// What each context has of it.
    uses: Mutex<Vec<Arc<Use>>>,
    /// What contexts that are gone have left of [`Use::unstable`].
    unstable: AtomicU64,
    /// No new I/O; the server is to be told once nothing is in flight.
    closing: AtomicBool,
    /// The server has been told.
    closed: AtomicBool,
}

impl Session {
    /// Opens a file of the server. `path` reads /EXPORT/path/beneath/it; `flags` are those of open(2):
    /// O_RDONLY, O_WRONLY, O_RDWR, O_CREAT, O_EXCL, O_TRUNC, O_DIRECT, O_SYNC, O_DSYNC, O_NOFOLLOW;
    /// O_CLOEXEC, O_LARGEFILE, O_NOCTTY and O_NONBLOCK are accepted and ignored; others are EINVAL. `mode`
    /// has the permissions of a file that O_CREAT creates. Blocks for a round trip.
    pub fn open(&self, path: impl AsRef<Path>, flags: i32, mode: u32) -> Result<File, Error> {
        let flags = open_flags(flags)?;
        let path = path_bytes(path.as_ref())?;
        let reopenings = self.shared().files().reopenings();
        let reply = self.shared().call(&Command::Open { flags, mode: mode & 0o7777, path })?;
        let handle = FileHandle(u32::try_from(reply.result).map_err(|_| protocol_error())?);
        let status = match reply.body.is_empty() {
            false => FileStatus::decode(&reply.body).map_err(|_| protocol_error())?,
            // It was opened by a request whose connection has broken: its outcome is all that there is.
            true => self.shared().status(handle)?,
        };
        let opened = Reopenable { flags, path: path.into(), identity: status.identity };
        self.shared().files().insert(handle, opened);
        if self.shared().files().reopenings() != reopenings {
            // Others may be connected to a server that has been started since it was opened.
            self.shared().status(handle)?;
        }
        let is_synced = flags & (protocol::OPEN_SYNC | protocol::OPEN_DSYNC) != 0;
        Ok(File::new(Arc::clone(self.shared()), handle, status.verifier.get(), is_synced))
    }
}

impl File {
    pub(crate) fn new(session: Arc<Shared>, handle: FileHandle, verifier: u64, is_synced: bool) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        Self {
            inner: Arc::new(Inner {
                session,
                handle,
                number: NUMBER.fetch_add(1, Ordering::Relaxed),
                verifier,
                is_synced,
                uses: Mutex::new(Vec::new()),
                unstable: AtomicU64::new(0),
                closing: AtomicBool::new(false),
                closed: AtomicBool::new(false),
            }),
        }
    }

    /// The same, as it was made without its verifier. Nothing has used it yet.
    pub(crate) fn with_verifier(mut self, verifier: u64) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.verifier = verifier;
        }
        self
    }

    /// No new operations from now on. Returns its handle if the caller must tell the server that it is
    /// closed: not if operations are in flight, nor if it was closed before.
    pub(crate) fn begin_close(&self) -> Option<FileHandle> {
        let begins = !self.inner.closing.swap(true, Ordering::SeqCst) && self.inner.begin_close();
        begins.then_some(self.inner.handle)
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// Returns this file as the source of a [`crate::Operation::Copy`].
    pub fn as_source(&self) -> CopySource {
        CopySource(Arc::clone(&self.inner))
    }

    /// Asks the server for the file's present status. Blocks for a round trip.
    pub fn status(&self) -> Result<FileStatus, Error> {
        if self.inner.is_closing() {
            return Err(Error::call(libc::EBADF, "The file is closed. Open it again."));
        }
        self.inner.session.status(self.inner.handle)
    }

    /// Closes it. New operations on it are rejected from now on; those in flight run to their end. Blocks for
    /// a round trip, unless something is in flight. Closing twice does nothing.
    pub fn close(&self) -> Result<(), Error> {
        self.inner.session.check_process()?;
        self.begin_close().map_or(Ok(()), |handle| self.inner.session.close(handle))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        if !self.inner.session.is_inherited() && !self.inner.closing.swap(true, Ordering::SeqCst) {
            self.inner.close_if_idle();
        }
    }
}

impl Inner {
    pub(crate) fn handle(&self) -> FileHandle {
        self.handle
    }

    pub(crate) fn session(&self) -> &Arc<Shared> {
        &self.session
    }

    pub(crate) fn is_closing(&self) -> bool {
        // Pairs with the store of a count in `FileRef::operation_completed`: at least one of the two threads
        // sees what the other wrote.
        self.closing.load(Ordering::SeqCst)
    }

    /// Whether nothing is in flight, and the server is not yet told: the caller must tell it.
    fn begin_close(&self) -> bool {
        let uses = lock(&self.uses);
        let begins = uses.iter().all(|one| one.in_flight.load(Ordering::SeqCst) == 0)
            && !self.closed.swap(true, Ordering::SeqCst);
        if begins {
            // It is not opened again any more.
            self.session.files().remove(self.handle);
        }
        begins
    }

    /// Tells the server that the file is closed, if nothing is in flight.
    fn close_if_idle(&self) {
        if self.begin_close() {
            self.session.close_later(Command::Close(self.handle));
        }
    }
}

/// What a context has of a file, as others see it.
#[derive(Debug, Default)]
struct Use {
    /// Operations. Written by the context alone.
    in_flight: AtomicUsize,
    /// The verifier that the file had at the first acknowledged write that no fsync has followed; 0: there is
    /// none. [`CONFLICT`]: writes were acknowledged under several.
    unstable: AtomicU64,
}

/// No verifier is this.
const CONFLICT: u64 = u64::MAX;

/// What stands for two values of [`Use::unstable`] together.
fn both(one: u64, other: u64) -> u64 {
    match (one, other) {
        (0, some) | (some, 0) => some,
        (one, other) if one == other => one,
        _ => CONFLICT,
    }
}

/// A file in a context that uses it.
#[derive(Debug)]
struct FileRef {
    file: Arc<Inner>,
    shared: Arc<Use>,
    /// The file's verifier as this context's server has it.
    verifier: u64,
}

impl FileRef {
    fn new(file: Arc<Inner>, verifier: u64) -> Self {
        let shared = Arc::new(Use::default());
        lock(&file.uses).push(Arc::clone(&shared));
        // Of a file whose writes are durable at once nothing is to be noted.
        let verifier = if file.is_synced { 0 } else { verifier };
        Self { file, shared, verifier }
    }

    fn is_idle(&self) -> bool {
        self.shared.in_flight.load(Ordering::Relaxed) == 0
    }

    fn operation_started(&self) {
        let in_flight = &self.shared.in_flight;
        in_flight.store(in_flight.load(Ordering::Relaxed) + 1, Ordering::Release);
    }

    fn operation_completed(&self) {
        let in_flight = &self.shared.in_flight;
        let left = in_flight.load(Ordering::Relaxed) - 1;
        if left > 0 {
            in_flight.store(left, Ordering::Release);
        } else {
            in_flight.store(0, Ordering::SeqCst);
            if self.file.is_closing() {
                self.file.close_if_idle();
            }
        }
    }
}

impl Drop for FileRef {
    fn drop(&mut self) {
        if self.file.session.is_inherited() {
            return;
        }
        self.shared.in_flight.store(0, Ordering::SeqCst);
        let mut uses = lock(&self.file.uses);
        uses.retain(|one| !Arc::ptr_eq(one, &self.shared));
        // The next fsync of another context is for what this one has written, too.
        let left = self.shared.unstable.load(Ordering::Acquire);
        if left != 0
            && let Some(other) = uses.first()
        {
            let _ = other
                .unstable
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |value| Some(both(left, value)));
        } else if left != 0 {
            let _ = self
                .file
                .unstable
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |value| Some(both(left, value)));
        }
        drop(uses);
        if self.file.is_closing() {
            self.file.close_if_idle();
        }
    }
}

/// The files that a context has used, by a small index.
#[derive(Debug, Default)]
pub(crate) struct FileRefs {
    refs: Vec<Option<FileRef>>,
    by_number: HashMap<u64, u32>,
    /// The number and the index of the file used last.
    last: Option<(u64, u32)>,
}

impl FileRefs {
    /// The index of this file. It stays the same while an operation is in flight on it.
    ///
    /// `verifier` is that of the file on the context's server, if it was opened again there.
    #[inline]
    pub(crate) fn index_of(&mut self, file: &Arc<Inner>, verifier: impl FnOnce() -> Option<u64>) -> u32 {
        let number = file.number;
        if let Some((last, index)) = self.last
            && last == number
        {
            return index;
        }
        let index = match self.by_number.get(&number) {
            Some(&index) => index,
            None => self.insert(file, verifier().unwrap_or(file.verifier)),
        };
        self.last = Some((number, index));
        index
    }

    fn insert(&mut self, file: &Arc<Inner>, verifier: u64) -> u32 {
        // Time to forget closed files.
        for entry in &mut self.refs {
            if let Some(closed) = entry.take_if(|entry| entry.file.is_closing() && entry.is_idle()) {
                self.by_number.remove(&closed.file.number);
            }
        }
        let new = Some(FileRef::new(Arc::clone(file), verifier));
        let index = match self.refs.iter().position(Option::is_none) {
            Some(index) => {
                self.refs[index] = new;
                index as u32
            }
            None => {
                self.refs.push(new);
                self.refs.len() as u32 - 1
            }
        };
        self.by_number.insert(file.number, index);
        index
    }

    /// What has this index; none if it is beyond all, as that of operations without a file.
    #[inline(always)]
    fn get(&self, index: u32) -> Option<&FileRef> {
        self.refs.get(index as usize)?.as_ref()
    }

    pub(crate) fn operation_started(&self, index: u32) {
        if let Some(file) = self.get(index) {
            file.operation_started();
        }
    }

    /// The file's verifier as far as it is known now.
    #[inline]
    pub(crate) fn verifier(&self, index: u32) -> u64 {
        self.get(index).map_or(0, |file| file.verifier)
    }

    /// A write, or the like, was acknowledged: an fsync is to find out whether it was lost. The file had this
    /// verifier when the write was sent. By the acknowledgement an fsync may have found another one, which
    /// the write was lost before.
    #[inline]
    pub(crate) fn written(&self, index: u32, verifier: u64) {
        if let Some(file) = self.get(index) {
            let unstable = &file.shared.unstable;
            let before = unstable.load(Ordering::Acquire);
            if before != verifier {
                unstable.store(both(before, verifier), Ordering::Release);
            }
        }
    }

    /// What an fsync that is submitted now is to make durable, of all contexts: the verifier that it must
    /// find, 0 if there is none.
    pub(crate) fn take_unstable(&self, index: u32) -> u64 {
        let Some(file) = self.get(index) else { return 0 };
        let uses = lock(&file.file.uses);
        let left = file.file.unstable.swap(0, Ordering::AcqRel);
        uses.iter().fold(left, |taken, one| both(taken, one.unstable.swap(0, Ordering::AcqRel)))
    }

    /// The fsync has made nothing durable.
    pub(crate) fn put_back_unstable(&self, index: u32, taken: u64) {
        if let Some(file) = self.get(index)
            && taken != 0
        {
            let merged = |value| Some(both(taken, value));
            let _ = file.shared.unstable.fetch_update(Ordering::AcqRel, Ordering::Acquire, merged);
        }
    }

    /// The verifier that an fsync has found; whether everything is there that had the verifier `taken`.
    pub(crate) fn synced(&mut self, index: u32, taken: u64, found: u64) -> bool {
        if let Some(file) = &mut self.refs[index as usize]
            && !file.file.is_synced
        {
            file.verifier = found;
        }
        taken == 0 || taken == found
    }

    /// The files have been opened again, with these verifiers.
    pub(crate) fn set_verifiers(&mut self, verifier: impl Fn(FileHandle) -> Option<u64>) {
        for file in self.refs.iter_mut().flatten() {
            if let Some(verifier) = verifier(file.file.handle)
                && !file.file.is_synced
            {
                file.verifier = verifier;
            }
        }
    }

    /// The handle of a file.
    pub(crate) fn handle(&self, index: u32) -> Option<FileHandle> {
        self.get(index).map(|file| file.file.handle)
    }

    pub(crate) fn operation_completed(&self, index: u32) {
        if let Some(file) = self.get(index) {
            file.operation_completed();
        }
    }
}

#[cfg(test)]
mod tests {
    use raio_transport::address::Scheme;
    use raio_transport::handshake::Policy;

    use super::*;
    use crate::fake_server::FakeServer;
    use crate::session::Options;

    #[test]
    fn a_write_that_is_acknowledged_late_was_sent_under_the_verifier_of_that_time() {
        let server = FakeServer::start(Policy::default());
        server.file("/e/data", vec![0; 10]);
        let session = Session::connect_to(Scheme::Tcp, server.address, &Options::default()).unwrap();
        let file = session.open("/e/data", libc::O_RDWR, 0).unwrap();
        let mut refs = FileRefs::default();
        let index = refs.index_of(file.inner(), || Some(5));
        let sent_under = refs.verifier(index);
        // What was not durable is lost now, and an fsync of the same context hears of it first.
        assert!(refs.synced(index, 0, 6));
        refs.written(index, sent_under);
        let taken = refs.take_unstable(index);
        assert!(!refs.synced(index, taken, 6), "the next fsync says that it is lost");
        // Two of different times cannot both be there.
        refs.written(index, 6);
        refs.written(index, sent_under);
        let taken = refs.take_unstable(index);
        assert!(!refs.synced(index, taken, 6) && !refs.synced(index, taken, 5));
        refs.written(index, 6);
        let taken = refs.take_unstable(index);
        assert!(refs.synced(index, taken, 6));
    }

    #[test]
    fn a_file_keeps_its_index_and_closed_files_make_room() {
        let server = FakeServer::start(Policy::default());
        server.file("/e/data", vec![0; 10]);
        let session = Session::connect_to(Scheme::Tcp, server.address, &Options::default()).unwrap();
        let open = || session.open("/e/data", libc::O_RDONLY, 0).unwrap();
        let mut refs = FileRefs::default();
        let (first, second) = (open(), open());
        assert_eq!([&first, &second, &first].map(|file| refs.index_of(file.inner(), || None)), [0, 1, 0]);
        refs.operation_started(0);
        first.close().unwrap();
        second.close().unwrap();
        assert_eq!(server.open(), 1, "an operation is in flight on the first");
        let third = open();
        assert_eq!(refs.index_of(third.inner(), || None), 1);
        refs.operation_completed(0);
        assert_eq!(refs.index_of(open().inner(), || None), 0);
        // Its close was sent without waiting for it; the next call comes after it.
        third.status().unwrap();
        assert_eq!(server.open(), 1);
    }
}
