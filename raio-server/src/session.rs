//! A client's session: the files that it has open.
//!
//! A session's files are usable from all of its connections, on whichever worker they landed. The table here
//! is shared and locked, and so for the control path only: open, close, and a worker's first use of a handle.
//! Data path: each worker has its own view of a file ([`crate::worker`]'s cache), and sees by
//! [`OpenFile::is_closed`] that another worker closed it.
//!
//! [`crate::sessions`] knows all sessions, and when one ends: then its files close.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::activity::Activity;
use crate::audit::Audited;
use crate::engine::{Closing, Engine};
use crate::file_identity::FileIdentity;
use crate::handles::Handles;
use crate::limits::{Account, AddressAccount, Caps, Excess, FilePermit, Limits, Who};
use crate::listing::{Listing, Listings};
use raio_transport::handshake::Identity;
use raio_transport::message::SessionId;
use raio_transport::protocol::{FileHandle, FileStatus, OPEN_READ, OPEN_WRITE};
use rustix::fs::FileType;

use crate::peer::Origin;
use crate::stats::CountedSession;
use crate::stored::LimitedFile;
use crate::tenure::Tenure;
use crate::throttle::Flow;
use crate::tuning::listings::SESSION_MAX;
use crate::verifier::FileVerifier;
use crate::volume::{Properties, Revoked, SizeLimit, Volume};
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

    /// In letters.
    pub fn name(self) -> &'static str {
        match (self.read, self.write) {
            (true, true) => "rw",
            (true, false) => "r",
            (false, true) => "w",
            (false, false) => "",
        }
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
    /// What its changes change.
    pub object: ObjectKey,
    /// What tells it from all other files; zeros if that is not known.
    pub identity: FileIdentity,
    /// Changes when acknowledged writes may have been lost.
    pub verifier: FileVerifier,
    /// What it is to the audit log, if there is one.
    pub audited: Option<Arc<Audited>>,
    /// What its client has of the export, if that is limited.
    pub flow: Option<Arc<Flow>>,
    /// What it may grow to, if the bytes that its client stores are limited.
    pub stored: Option<LimitedFile>,
    /// That of its export.
    tenure: Arc<Tenure>,
    closed: AtomicBool,
}

impl OpenFile {
    /// A volume that has just been opened, of the export that has this place among all.
    pub fn new(
        volume: Arc<dyn Volume>,
        access: Access,
        export: usize,
        identity: FileIdentity,
        verifier: FileVerifier,
    ) -> Self {
        let Properties { alignment, size_limit, may_hang, .. } = volume.properties();
        // If it is no file, all who open it share the volume.
        let object = ObjectKey(u64::MAX - 1, Arc::as_ptr(&volume).cast::<()>() as u64);
        Self {
            access,
            alignment,
            size_limit,
            export,
            hanging_export: may_hang.then_some(export),
            volume,
            object,
            identity,
            verifier,
            audited: None,
            flow: None,
            stored: None,
            tenure: Arc::default(),
            closed: AtomicBool::new(false),
        }
    }

    /// The same, of an export that has this tenure.
    pub fn in_tenure(self, tenure: &Arc<Tenure>) -> Self {
        Self { tenure: Arc::clone(tenure), ..self }
    }

    /// Whether its export is served no more as it was when the file was opened.
    pub fn is_revoked(&self) -> bool {
        self.tenure.is_over()
    }

    /// What has its handle from then on.
    fn successor(&self) -> Self {
        let verifier = self.verifier.clone();
        Self::new(Arc::new(Revoked), self.access, self.export, self.identity, verifier)
    }

    /// The same, whose changes change this.
    pub fn of_object(self, object: ObjectKey) -> Self {
        Self { object, ..self }
    }

    /// A volume of the first export, of which no more is known.
    #[cfg(test)]
    pub fn of_volume(volume: impl Volume + 'static, access: Access) -> Self {
        Self::new(Arc::new(volume), access, 0, FileIdentity::default(), FileVerifier::default())
    }

    /// Whether its reads and writes go straight to a device.
    pub fn is_direct(&self) -> bool {
        self.alignment > 1
    }

    /// Whether it is this file, opened for the same.
    pub fn is_same(&self, identity: FileIdentity, access: Access) -> bool {
        self.identity == identity && self.access == access
    }

    /// Its handle has been closed: see [`Volume::close`].
    pub fn close_volume(self: Arc<Self>, engine: &mut dyn Engine, closing: Closing) {
        let volume = Arc::clone(&self.volume);
        drop(self);
        volume.close(engine, closing);
    }

    /// Whether its handle has been closed.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

/// What a change of an open file changes: the same for all opens of a file, and of another volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectKey(pub u64, pub u64);

impl ObjectKey {
    /// What stands for the names and the attributes of all files of an export.
    pub fn names_of(export: usize) -> Self {
        Self(u64::MAX - 2, export as u64)
    }

    /// Of a file or a device with this status.
    pub fn of(status: &FileStatus) -> Self {
        if FileType::from_raw_mode(status.mode.get()) == FileType::BlockDevice {
            Self(u64::MAX, status.rdevice.get())
        } else {
            Self(status.device.get(), status.inode.get())
        }
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
    /// What it does.
    pub activity: Activity,
    /// Why it is to end: an [`EndReason`].
    end_reason: AtomicU8,
    /// Its client counts it.
    counted: OnceLock<CountedSession>,
    files: Mutex<Handles<ClosedFile>>,
    /// Directories that it lists. Each counts as an open file.
    listings: Mutex<Listings<FilePermit>>,
    /// What it has, on all workers.
    account: Account,
    /// Of the address that its first connection was from: counts it.
    address: AddressAccount,
    limits: Arc<Limits>,
}

/// Why the server ends a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EndReason {
    /// It does not, or its client has given it up.
    None,
    /// Its client may do less than when it began.
    Revoked,
    /// An administrator has asked for it.
    Killed,
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
    /// A session of a client, which its address counts: see [`Limits::begin_session`].
    pub fn new(id: SessionId, identity: Identity, address: AddressAccount, limits: Arc<Limits>) -> Self {
        let (files, listings, account) = (Mutex::default(), Mutex::default(), Account::default());
        let (activity, end_reason) = (Activity::default(), AtomicU8::new(EndReason::None as u8));
        let counted = OnceLock::new();
        Self { id, identity, activity, end_reason, counted, files, listings, account, address, limits }
    }

    /// Has its client count it, unless it does. Returns that.
    pub fn count_with(&self, begin: impl FnOnce() -> CountedSession) -> &CountedSession {
        self.counted.get_or_init(begin)
    }

    /// It is to end.
    pub fn end_because(&self, reason: EndReason) {
        self.end_reason.store(reason as u8, Ordering::Relaxed);
    }

    /// Why it is to end.
    pub fn end_reason(&self) -> EndReason {
        let reason = self.end_reason.load(Ordering::Relaxed);
        [EndReason::Revoked, EndReason::Killed]
            .into_iter()
            .find(|&one| one as u8 == reason)
            .unwrap_or(EndReason::None)
    }

    /// The same, whose files have handles that begin with this generation.
    pub fn with_first_generation(self, first_generation: u32) -> Self {
        Self { files: Mutex::new(Handles::new(first_generation)), ..self }
    }

    /// The address that its first connection was from.
    pub fn address(&self) -> Option<Origin> {
        self.address.as_ref().and_then(|account| account.address())
    }

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

    /// Notes its client: the name, and the limits of all its sessions together. See [`Limits::assign`].
    pub fn assign(&self, client: Option<(&str, Caps)>) {
        self.limits.assign(&self.account, client);
    }

    /// Its client, and the bytes that the requests of that may hold at a worker, if they are limited.
    pub fn client_memory(&self) -> Option<(&str, usize)> {
        self.limits.client_memory(&self.account)
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

    /// Counts its open files by their export's place among all.
    pub fn count_files(&self, by_export: &mut [u64]) {
        for (file, _) in lock(&self.files).files() {
            if let Some(count) = by_export.get_mut(file.export) {
                *count += 1;
            }
        }
    }

    /// How many files it has open.
    pub fn open_files(&self) -> usize {
        lock(&self.files).len()
    }

    /// Takes the handle from a file.
    pub fn close(&self, handle: FileHandle) -> Option<ClosedFile> {
        let mut files = lock(&self.files);
        let closed = files.remove(handle)?;
        self.forget(&closed.0);
        Some(closed)
    }

    /// Enters a listing, on behalf of a connection from an address. The oldest one goes if there are as many
    /// as there may be. The error says why it cannot go on.
    pub fn begin_listing(&self, listing: &Arc<Listing>, address: &AddressAccount) -> Result<(), Excess> {
        let permit = self.limits.open(&self.account, address)?;
        let dropped = lock(&self.listings).insert(Arc::clone(listing), permit, SESSION_MAX);
        if dropped.is_some() {
            self.limits.close(&self.account);
        }
        Ok(())
    }

    /// The listing with this name.
    pub fn listing(&self, id: u64) -> Option<Arc<Listing>> {
        lock(&self.listings).get(id)
    }

    /// A listing is over.
    pub fn end_listing(&self, id: u64) {
        let ended = lock(&self.listings).remove(id);
        if ended.is_some() {
            self.limits.close(&self.account);
        }
    }

    /// Closes what it has open of exports that are over. Returns the files: each is closed with its last
    /// user. Their handles stay, and what is asked of them fails.
    pub fn revoke_files(&self) -> Vec<Arc<OpenFile>> {
        let over = lock(&self.listings).take_if(|listing| listing.lanes.tenure.is_over());
        over.iter().for_each(|_| self.limits.close(&self.account));
        let mut revoked = Vec::new();
        for (file, _) in lock(&self.files).iter_mut().filter(|(file, _)| file.is_revoked()) {
            let successor = Arc::new(file.successor());
            let file = std::mem::replace(file, successor);
            file.closed.store(true, Ordering::Release);
            revoked.push(file);
        }
        revoked
    }

    /// The session has ended. Returns the files that it had.
    pub fn end(&self) -> Vec<ClosedFile> {
        self.limits.end_session(&self.address);
        let listings = lock(&self.listings).take();
        listings.iter().for_each(|_| self.limits.close(&self.account));
        let files = std::mem::take(&mut *lock(&self.files));
        files.into_files().inspect(|(file, _)| self.forget(file)).collect()
    }

    fn forget(&self, file: &OpenFile) {
        file.closed.store(true, Ordering::Release);
        self.limits.close(&self.account);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::Room;
    use crate::tuning::limits::RESERVE;
    use crate::volume::Null;

    fn session(files: usize) -> Session {
        let room = Room { descriptors: 1000, files, bytes: 1 << 30, workers: 1 };
        let limits = Limits::new(room, Caps::default(), Caps::default());
        limits.begin_session(0, 1, &None).unwrap();
        Session::new(SessionId([1; 16]), Identity::Anonymous, None, limits)
    }

    fn null() -> Arc<OpenFile> {
        Arc::new(OpenFile::of_volume(Null::new(1), Access { read: true, write: true }))
    }

    #[test]
    fn a_handle_does_not_outlive_its_close() {
        let session = session(10);
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
        let session = session(10);
        let known = |n: u8, write| {
            let file = OpenFile::of_volume(Null::new(1), Access { read: true, write });
            Arc::new(OpenFile { identity: [n; 16], ..file })
        };
        let handle = FileHandle(7 << 20 | 12_345);
        let first = session.reopen(handle, known(1, true), &None).unwrap();
        let again = session.reopen(handle, known(1, true), &None).unwrap();
        assert!(Arc::ptr_eq(&first, &again) && Arc::ptr_eq(&first, &session.get(handle).unwrap()));
        assert_eq!(session.limits.files(), 1);
        for other in [known(2, true), known(1, false)] {
            let error = session.reopen(handle, other, &None).unwrap_err();
            assert!(matches!(error, NotReopened::Taken));
        }
        assert!(session.close(handle).is_some() && first.is_closed());
        assert_eq!(session.limits.files(), 0);
        let handles = |n| FileHandle(1 << 20 | n);
        let open = (0..).take_while(|&n| session.reopen(handles(n), known(3, true), &None).is_ok()).count();
        assert!((10..10 + RESERVE).contains(&open), "{open}");
        let error = session.reopen(handles(open as u32), known(3, true), &None).unwrap_err();
        assert!(matches!(error, NotReopened::Excess(_)));
    }
}
