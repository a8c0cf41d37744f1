//! Sessions: clients by their uuid, and the files that each has open.
//!
//! A session's files are usable from all of its connections, on whichever worker they landed. The tables here
//! are shared and locked, and so for the control path only: open, close, and a worker's first use of a
//! handle. Data path: each worker has its own view of a file ([`crate::worker`]'s cache), and sees by
//! [`OpenFile::is_closed`] that another worker closed it.
//!
//! A session lives as long as it has connections. When the last one goes its files close.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::file_identity::FileIdentity;
use crate::handles::Handles;
use crate::limits::{Account, AddressAccount, Excess, FilePermit, Limits, QueuePairPermit, Who};
use raio_transport::handshake::Identity;
use raio_transport::message::SessionId;
use raio_transport::protocol::{FileHandle, OPEN_READ, OPEN_WRITE};

use crate::verifier::FileVerifier;
use crate::volume::{Properties, SizeLimit, Volume};
use raio_transport::sync::lock;

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Reading.
    pub read: bool,
    /// Writing.
    pub write: bool,
}

impl Access {
    /// By the `OPEN_*` flags.
    pub fn from_flags(flags: u32) -> Self {
        Self { read: flags & OPEN_READ != 0, write: flags & OPEN_WRITE != 0 }
    }
}

/// An open file of a session, shared by all workers.
#[derive(Debug)]
pub struct OpenFile {
    /// What its I/O is done on.
    pub volume: Arc<dyn Volume>,
    /// What it may be used for.
    pub access: Access,
    /// [`Volume::alignment`]: offsets and lengths of I/O are multiples of it.
    pub alignment: u32,
    /// [`Volume::size_limit`].
    pub size_limit: Option<SizeLimit>,
    /// The place of the export that it is of among all.
    pub export: usize,
    /// The same, if requests on it may hang: they have a share of the memory together.
    pub hanging_export: Option<usize>,
    /// What tells it from all other files; zeros if that is not known.
    pub identity: FileIdentity,
    /// Changes when acknowledged writes may have been lost.
    pub verifier: FileVerifier,
    closed: AtomicBool,
}

impl OpenFile {
    /// A volume that has just been opened, of the export that has this place among all.
    pub fn new(volume: Arc<dyn Volume>, access: Access, export: usize) -> Self {
        let Properties { alignment, size_limit, may_hang } = volume.properties();
        Self {
            access,
            alignment,
            size_limit,
            export,
            hanging_export: may_hang.then_some(export),
            volume,
            identity: FileIdentity::default(),
            verifier: FileVerifier::default(),
            closed: AtomicBool::new(false),
        }
    }

    /// The same, of which this is known.
    pub fn known_as(self, identity: FileIdentity, verifier: FileVerifier) -> Self {
        Self { identity, verifier, ..self }
    }

    /// Whether its reads and writes go straight to a device.
    pub fn is_direct(&self) -> bool {
        self.alignment > 1
    }

    /// Whether it is this file, opened for the same.
    pub fn is_same(&self, identity: FileIdentity, access: Access) -> bool {
        self.identity == identity && self.access == access
    }

    /// Whether its handle has been closed.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

/// A file that has lost its handle: its volume is to be closed.
pub type ClosedFile = (Arc<OpenFile>, FilePermit);

/// One client's session.
#[derive(Debug)]
pub struct Session {
    /// Its uuid.
    pub id: SessionId,
    /// Whose it is: that of the connection that began it. What it may open depends on this.
    pub identity: Identity,
    files: Mutex<Handles<ClosedFile>>,
    /// What it has, on all workers.
    account: Account,
    /// Of the address that its first connection was from: counts it.
    address: AddressAccount,
    limits: Arc<Limits>,
}

/// Why a file is not reopened.
#[derive(Debug)]
pub enum NotReopened {
    /// Another file has the handle.
    Taken,
    /// There are as many open files as there may be.
    Excess(Excess),
}

impl Session {
    /// Enters a file under a new handle, on behalf of a connection from an address. The error says why it
    /// gets none.
    pub fn insert(&self, file: Arc<OpenFile>, address: &AddressAccount) -> Result<FileHandle, Excess> {
        let mut files = lock(&self.files);
        if files.is_full() {
            let open = files.len();
            let text =
                format!("The session has {open} files open, and there are no more handles. Close some.");
            return Err(Excess { who: Who::Session, text });
        }
        let permit = self.limits.open(&self.account, address)?;
        Ok(files.insert((file, permit)))
    }

    /// Enters a file under this handle, which an earlier server gave it, on behalf of a connection from an
    /// address. Returns the file that has the handle: the same one may have had it before.
    pub fn reopen(
        &self,
        handle: FileHandle,
        file: Arc<OpenFile>,
        address: &AddressAccount,
    ) -> Result<Arc<OpenFile>, NotReopened> {
        let mut files = lock(&self.files);
        if let Some((open, _)) = files.get(handle)
            && open.is_same(file.identity, file.access)
        {
            return Ok(Arc::clone(open));
        }
        if files.is_taken(handle) {
            return Err(NotReopened::Taken);
        }
        let permit = self.limits.open(&self.account, address).map_err(NotReopened::Excess)?;
        files.put(handle, (Arc::clone(&file), permit));
        Ok(file)
    }

    /// Whether the index of a handle is one of about as many as files have been open at a time.
    pub fn is_near(&self, index: usize) -> bool {
        lock(&self.files).is_near(index)
    }

    /// A connection of it has opened. The error says why it may not.
    pub fn attach(&self, address: &AddressAccount) -> Result<(), Excess> {
        self.limits.join(&self.account, address)
    }

    /// One that was attached has closed.
    pub fn detach(&self) {
        self.limits.leave(&self.account);
    }

    /// A request has come by a connection from an address: see [`Limits::begin_request`].
    pub fn begin_request(&self, address: &AddressAccount) -> Result<(), Excess> {
        self.limits.begin_request(&self.account, address)
    }

    /// One that was begun is over.
    pub fn end_request(&self, address: &AddressAccount) {
        self.limits.end_request(&self.account, address);
    }

    /// The file with this handle.
    pub fn get(&self, handle: FileHandle) -> Option<Arc<OpenFile>> {
        lock(&self.files).get(handle).map(|(file, _)| Arc::clone(file))
    }

    /// Takes the handle from a file.
    pub fn close(&self, handle: FileHandle) -> Option<ClosedFile> {
        let mut files = lock(&self.files);
        let closed = files.remove(handle)?;
        self.forget(&closed.0);
        Some(closed)
    }

    fn close_all(&self) -> Vec<ClosedFile> {
        let files = std::mem::take(&mut *lock(&self.files));
        files.into_files().inspect(|(file, _)| self.forget(file)).collect()
    }

    fn forget(&self, file: &OpenFile) {
        file.closed.store(true, Ordering::Release);
        self.limits.close(&self.account);
    }
}

/// All sessions of the server.
#[derive(Debug)]
pub struct Sessions {
    by_id: Mutex<HashMap<SessionId, Joined>>,
    sessions_max: usize,
    limits: Arc<Limits>,
    /// See [`Handles::new`].
    first_generation: u32,
}

#[derive(Debug)]
struct Joined {
    session: Arc<Session>,
    /// How many workers have connections of it.
    workers: usize,
}

impl Sessions {
    /// See [`Limits::queue_pair`].
    pub fn queue_pair(&self, address: Option<IpAddr>, bytes: usize) -> Result<QueuePairPermit, String> {
        self.limits.queue_pair(address, bytes)
    }

    /// None yet. There may be `sessions_max` at a time, and a few for addresses that have few, with what
    /// `limits` allows them.
    pub fn new(sessions_max: usize, limits: Arc<Limits>) -> Self {
        Self { by_id: Mutex::default(), sessions_max, limits, first_generation: 1 }
    }

    /// The same, whose files have handles that begin with this generation.
    pub fn with_first_generation(self, first_generation: u32) -> Self {
        Self { first_generation, ..self }
    }

    /// A worker has got its first connection of this session, of this client, from an address. The error says
    /// why there may not be one more.
    pub fn join(
        &self,
        id: SessionId,
        identity: &Identity,
        address: &AddressAccount,
    ) -> Result<Arc<Session>, Excess> {
        let mut by_id = lock(&self.by_id);
        let used = by_id.len();
        let joined = match by_id.entry(id) {
            Entry::Occupied(joined) => joined.into_mut(),
            Entry::Vacant(vacant) => {
                self.limits.begin_session(used, self.sessions_max, address)?;
                let session = Session {
                    id,
                    identity: identity.clone(),
                    files: Mutex::new(Handles::new(self.first_generation)),
                    account: Account::default(),
                    address: address.clone(),
                    limits: Arc::clone(&self.limits),
                };
                vacant.insert(Joined { session: Arc::new(session), workers: 0 })
            }
        };
        joined.workers += 1;
        Ok(Arc::clone(&joined.session))
    }

    /// A worker's last connection of this session has gone. Returns the files to be closed if no worker has
    /// any more.
    pub fn leave(&self, session: &Session) -> Vec<ClosedFile> {
        let mut by_id = lock(&self.by_id);
        let Some(joined) = by_id.get_mut(&session.id) else { return Vec::new() };
        joined.workers -= 1;
        if joined.workers > 0 {
            return Vec::new();
        }
        by_id.remove(&session.id);
        self.limits.end_session(&session.address);
        drop(by_id);
        session.close_all()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        lock(&self.by_id).len()
    }

    /// Whether their requests are counted.
    pub fn count_requests(&self) -> bool {
        self.limits.counts_requests()
    }

    /// Open files of all of them.
    pub fn open_files(&self) -> usize {
        self.limits.files()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{Caps, Room};
    use crate::tuning::limits::RESERVE;
    use crate::volume::Null;

    fn sessions(sessions_max: usize, files_max: usize) -> Sessions {
        Sessions::new(sessions_max, limits(files_max))
    }

    fn limits(files: usize) -> Arc<Limits> {
        let room = Room { descriptors: 1000, files, bytes: 1 << 30, workers: 1 };
        Limits::new(room, Caps::default(), Caps::default())
    }

    /// A client's first connection of the session with this number.
    fn join(sessions: &Sessions, number: u8) -> Result<Arc<Session>, Excess> {
        sessions.join(SessionId([number; 16]), &Identity::Anonymous, &None)
    }

    fn null() -> Arc<OpenFile> {
        Arc::new(OpenFile::new(Arc::new(Null::new(1)), Access { read: true, write: true }, 0))
    }

    #[test]
    fn a_handle_does_not_outlive_its_close() {
        let sessions = sessions(9, 10);
        let session = join(&sessions, 1).unwrap();
        let first = session.insert(null(), &None).unwrap();
        assert_ne!(first.0, 0);
        assert!(session.get(first).is_some());
        let (file, _permit) = session.close(first).unwrap();
        assert!(file.is_closed());
        assert!(session.close(first).is_none());
        let second = session.insert(null(), &None).unwrap();
        assert!(session.get(first).is_none());
        assert!(session.get(second).is_some());
    }

    #[test]
    fn a_file_is_reopened_once_and_counts_as_an_open_one() {
        let sessions = sessions(9, 10);
        let session = join(&sessions, 1).unwrap();
        let known = |n: u8, write| {
            let file = OpenFile::new(Arc::new(Null::new(1)), Access { read: true, write }, 0);
            Arc::new(file.known_as([n; 16], FileVerifier::default()))
        };
        let handle = FileHandle(7 << 20 | 12_345);
        let first = session.reopen(handle, known(1, true), &None).unwrap();
        let again = session.reopen(handle, known(1, true), &None).unwrap();
        assert!(Arc::ptr_eq(&first, &again) && Arc::ptr_eq(&first, &session.get(handle).unwrap()));
        assert_eq!(sessions.open_files(), 1);
        for other in [known(2, true), known(1, false)] {
            let error = session.reopen(handle, other, &None).unwrap_err();
            assert!(matches!(error, NotReopened::Taken));
        }
        assert!(session.close(handle).is_some() && first.is_closed());
        assert_eq!(sessions.open_files(), 0);
        let handles = |n| FileHandle(1 << 20 | n);
        let open = (0..).take_while(|&n| session.reopen(handles(n), known(3, true), &None).is_ok()).count();
        assert!((10..10 + RESERVE).contains(&open), "{open}");
        let error = session.reopen(handles(open as u32), known(3, true), &None).unwrap_err();
        assert!(matches!(error, NotReopened::Excess(_)));
    }

    #[test]
    fn a_session_ends_with_its_last_connection_and_closes_its_files() {
        let sessions = sessions(9, 10);
        let session = join(&sessions, 1).unwrap();
        assert!(Arc::ptr_eq(&session, &join(&sessions, 1).unwrap()));
        let file = null();
        let handle = session.insert(Arc::clone(&file), &None).unwrap();
        assert!(sessions.leave(&session).is_empty());
        assert!(!file.is_closed());
        assert_eq!((sessions.len(), sessions.open_files()), (1, 1));
        assert_eq!(sessions.leave(&session).len(), 1);
        assert!(file.is_closed() && session.get(handle).is_none());
        assert_eq!((sessions.len(), sessions.open_files()), (0, 0));
    }

    #[test]
    fn sessions_do_not_see_each_others_files() {
        let sessions = sessions(9, 10);
        let handle = join(&sessions, 1).unwrap().insert(null(), &None).unwrap();
        assert!(join(&sessions, 2).unwrap().get(handle).is_none());
    }

    #[test]
    fn one_session_too_many_is_not_let_in_but_those_that_are_may_have_more_connections() {
        let sessions = sessions(1, 9);
        let session = join(&sessions, 1).unwrap();
        assert!(join(&sessions, 2).is_err());
        assert!(join(&sessions, 1).is_ok());
        sessions.leave(&session);
        assert!(join(&sessions, 2).is_err());
        sessions.leave(&session);
        assert!(join(&sessions, 2).is_ok());
    }

    #[test]
    fn sessions_cannot_have_more_files_than_they_may_together() {
        let sessions = sessions(9, 2);
        let (session, other) = (join(&sessions, 1).unwrap(), join(&sessions, 2).unwrap());
        let first = session.insert(null(), &None).unwrap();
        while session.insert(null(), &None).is_ok() {}
        let theirs = (0..).take_while(|_| other.insert(null(), &None).is_ok()).count();
        assert!(theirs > 0 && sessions.open_files() < 2 + RESERVE);
        while join(&sessions, 3).is_ok_and(|third| third.insert(null(), &None).is_ok()) {}
        session.close(first).unwrap();
        assert!(join(&sessions, 4).unwrap().insert(null(), &None).is_ok());
    }
}
