//! The process-wide table behind the C API's descriptors: sessions and files by number.
//!
//! Numbers begin beyond what the kernel gives out and are not reused until they wrap around, so that a
//! descriptor used after its end is EBADF rather than somebody else's. Blocking calls are made with the table
//! unlocked, on what was looked up. Contexts remember what they looked up for as long as [`epoch`] stays the
//! same: closing anything changes it.

#![deny(unsafe_code)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use raio_transport::memory::process;

use super::sync_contexts::SyncContexts;
use crate::error::Error;
use crate::file::File;
use crate::session::Session;
use raio_transport::sync::lock;

/// The first descriptor. The kernel's end at 1,048,576 (fs.nr_open) unless an administrator raises that.
const FIRST: i32 = 1 << 24;

static EPOCH: AtomicU64 = AtomicU64::new(0);
static TABLE: Mutex<Option<Table>> = Mutex::new(None);

#[derive(Debug)]
pub(super) struct Table {
    /// The process that it is of: see [`process`].
    process: u64,
    /// What a child has inherited is its parent's: it is neither used nor dropped.
    inherited: Vec<HashMap<i32, Entry>>,
    entries: HashMap<i32, Entry>,
    next: i32,
}

#[derive(Debug)]
enum Entry {
    Session(SessionEntry),
    /// And its session's descriptor.
    File(Arc<File>, i32),
}

#[derive(Debug)]
struct SessionEntry {
    session: Arc<Session>,
    /// The file that the session's descriptor stands for.
    first: First,
    /// Addresses of its contexts.
    contexts: Vec<usize>,
    /// Those of calls that wait for their I/O.
    sync: Arc<SyncContexts>,
}

#[derive(Debug)]
enum First {
    NotYet,
    Open(Arc<File>),
    /// It was closed, or there is to be none.
    None,
}

/// Changes whenever a descriptor ends, or comes to stand for another file.
pub(super) fn epoch() -> u64 {
    EPOCH.load(Ordering::Acquire)
}

fn table() -> MutexGuard<'static, Option<Table>> {
    lock(&TABLE)
}

fn with<T>(body: impl FnOnce(&mut Table) -> T) -> T {
    let mut table = table();
    let table = table.get_or_insert_with(|| Table {
        process: process(),
        inherited: Vec::new(),
        entries: HashMap::new(),
        next: FIRST,
    });
    if table.process != process() {
        // A child. Numbers are not used again.
        let entries = std::mem::take(&mut table.entries);
        table.inherited.push(entries);
        table.process = process();
        EPOCH.fetch_add(1, Ordering::AcqRel);
    }
    body(table)
}

impl Table {
    fn insert(&mut self, entry: Entry) -> i32 {
        while self.entries.contains_key(&self.next) {
            self.next = self.next.checked_add(1).unwrap_or(FIRST);
        }
        let fd = self.next;
        self.next = fd.checked_add(1).unwrap_or(FIRST);
        self.entries.insert(fd, entry);
        fd
    }

    fn session(&mut self, fd: i32) -> Result<&mut SessionEntry, Error> {
        match self.entries.get_mut(&fd) {
            Some(Entry::Session(entry)) => Ok(entry),
            _ => Err(no_session(fd)),
        }
    }

    fn file(&self, fd: i32) -> Result<(Arc<File>, i32), Error> {
        match self.entries.get(&fd) {
            Some(Entry::File(file, session)) => Ok((Arc::clone(file), *session)),
            Some(Entry::Session(SessionEntry { first: First::Open(file), .. })) => Ok((Arc::clone(file), fd)),
            _ => Err(no_file(fd)),
        }
    }
}

fn no_session(fd: i32) -> Error {
    Error::call(
        libc::EBADF,
        format!(
            "Descriptor {fd} is not a session of this process. Pass one from raio_start() or \
             raio_connect(); a forked child opens its own."
        ),
    )
}

fn no_file(fd: i32) -> Error {
    Error::call(
        libc::EBADF,
        format!("Descriptor {fd} is not an open file of this process. Pass one from raio_open()."),
    )
}

/// Whether the first file of a session gets a descriptor of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FirstFile {
    IsTheSession,
    HasItsOwn,
}

/// A descriptor for a session.
pub(super) fn add_session(session: Session, first_file: FirstFile) -> i32 {
    let first = match first_file {
        FirstFile::IsTheSession => First::NotYet,
        FirstFile::HasItsOwn => First::None,
    };
    let session = Arc::new(session);
    let sync = Arc::new(SyncContexts::new(Arc::clone(&session)));
    let entry = SessionEntry { session, first, contexts: Vec::new(), sync };
    with(|table| table.insert(Entry::Session(entry)))
}

/// A descriptor for a file of the session `fd`: 0, which means `fd` itself, for the first, unless that is to
/// have its own.
pub(super) fn add_file(fd: i32, file: File) -> Result<i32, Error> {
    let file = Arc::new(file);
    with(|table| {
        let entry = table.session(fd)?;
        if matches!(entry.first, First::NotYet) {
            entry.first = First::Open(file);
            return Ok(0);
        }
        Ok(table.insert(Entry::File(file, fd)))
    })
}

/// A descriptor > 0 of its own for a file of the session `fd`.
pub(super) fn add_file_apart(fd: i32, file: File) -> Result<i32, Error> {
    with(|table| table.session(fd).map(drop).map(|()| table.insert(Entry::File(Arc::new(file), fd))))
}

/// The session `fd`.
pub(super) fn session(fd: i32) -> Result<Arc<Session>, Error> {
    with(|table| table.session(fd).map(|entry| Arc::clone(&entry.session)))
}

/// The session `fd`, or that of the file `fd`, and its descriptor.
pub(super) fn session_of(fd: i32) -> Result<(Arc<Session>, i32), Error> {
    with(|table| {
        let fd = match table.entries.get(&fd) {
            Some(Entry::File(_, session)) => *session,
            _ => fd,
        };
        table.session(fd).map(|entry| (Arc::clone(&entry.session), fd))
    })
}

/// The file that `fd` stands for, and its session's descriptor.
pub(super) fn file(fd: i32) -> Result<(Arc<File>, i32), Error> {
    with(|table| table.file(fd))
}

/// The file that `fd` stands for, and its session's contexts for calls that wait.
pub(super) fn file_to_use(fd: i32) -> Result<(Arc<File>, Arc<SyncContexts>), Error> {
    with(|table| {
        let (file, session) = table.file(fd)?;
        Ok((file, Arc::clone(&table.session(session)?.sync)))
    })
}

/// Takes the file that `fd` stands for out of the table.
pub(super) fn remove_file(fd: i32) -> Result<Arc<File>, Error> {
    let file = with(|table| match table.entries.get_mut(&fd) {
        Some(Entry::Session(entry)) => match std::mem::replace(&mut entry.first, First::None) {
            First::Open(file) => Ok(file),
            other => {
                entry.first = other;
                Err(no_file(fd))
            }
        },
        Some(Entry::File(..)) => match table.entries.remove(&fd) {
            Some(Entry::File(file, _)) => Ok(file),
            _ => Err(no_file(fd)),
        },
        None => Err(no_file(fd)),
    });
    EPOCH.fetch_add(1, Ordering::AcqRel);
    file
}

/// Takes a session and its files out of the table. Returns the session, to be stopped, and the addresses of
/// its contexts.
pub(super) fn remove_session(fd: i32) -> Result<(Arc<Session>, Vec<usize>), Error> {
    let mut files = Vec::new();
    let removed = with(|table| {
        table.session(fd)?;
        let Some(Entry::Session(entry)) = table.entries.remove(&fd) else { return Err(no_session(fd)) };
        files.extend(
            table.entries.extract_if(|_, entry| matches!(entry, Entry::File(_, session) if *session == fd)),
        );
        Ok((entry.session, entry.contexts, entry.first, entry.sync))
    });
    EPOCH.fetch_add(1, Ordering::AcqRel);
    let (session, contexts, first, sync) = removed?;
    sync.stop();
    // The server closes the files with the session: nobody needs to tell it of each.
    session.stop();
    drop((files, first));
    Ok((session, contexts))
}

/// Notes a context of the session `fd`.
pub(super) fn add_context(fd: i32, address: usize) -> Result<(), Error> {
    with(|table| table.session(fd).map(|entry| entry.contexts.push(address)))
}

/// Forgets a context of the session `fd`.
pub(super) fn remove_context(fd: i32, address: usize) {
    with(|table| {
        if let Ok(entry) = table.session(fd) {
            entry.contexts.retain(|&context| context != address);
        }
    });
}
