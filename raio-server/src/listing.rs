//! Listings: directories that clients read page by page.
//!
//! A listing has its directory open, and remembers where its last page began: a client that has not got that
//! page, because its connection broke, asks for the same one again. What it holds does not depend on how many
//! entries there are.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use raio_transport::protocol::{DirectoryEntry, push_entry};
use raio_transport::sync::lock;
use rustix::fs::{AtFlags, FileType, RawDir, RawMode, SeekFrom, StatxFlags};
use rustix::io::Errno;

use crate::engine::Lanes;
use crate::syscalls::nanoseconds;
use crate::tenure::Use;
use crate::throttle::Flow;
use crate::tuning::listings::BUFFER_BYTES;
use crate::unfinished::{is_of_another_server, is_unfinished_put};

/// See the module documentation. Shared by all workers.
#[derive(Debug)]
pub struct Listing {
    /// What its client names it by: random.
    pub id: u64,
    /// The place of its export among all.
    pub export: usize,
    /// Of the export.
    pub lanes: Lanes,
    /// What its client has of the export, if that is limited.
    pub flow: Option<Arc<Flow>>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    directory: Directory,
    /// What servers that were killed have left of puts is removed from it, by the server with this number.
    removes_for: Option<u64>,
    /// Where the last page began, and whether it is an odd one.
    began: u64,
    is_odd: bool,
    /// Where the next one begins.
    next: u64,
}

/// The directory of a listing. The pool closes it, since close(2) may wait.
#[derive(Debug)]
struct Directory {
    fd: Option<OwnedFd>,
    lanes: Lanes,
    _use: Use,
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.fd {
            Some(fd) => fd.as_fd(),
            None => unreachable!("only `drop` takes it"),
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take() {
            self.lanes.close_read(fd);
        }
    }
}

/// A page of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Its length in bytes.
    pub len: usize,
    /// Whether it is the last one.
    pub is_last: bool,
}

impl Listing {
    /// A listing of a directory, which is open for reading. The lanes are those of its export.
    pub fn new(id: u64, export: usize, flow: Option<Arc<Flow>>, lanes: Lanes, directory: OwnedFd) -> Self {
        let use_of_export = Use::of(&lanes.tenure);
        let directory = Directory { fd: Some(directory), lanes: lanes.clone(), _use: use_of_export };
        let state = State { directory, removes_for: None, began: 0, is_odd: false, next: 0 };
        Self { id, export, lanes, flow, state: Mutex::new(state) }
    }

    /// The same, which removes what other servers than the one with this number have left of puts.
    pub fn removing_for(mut self, server: Option<u64>) -> Self {
        self.state.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).removes_for = server;
        self
    }

    /// Fills `to` with entries: those of the next page, if that is odd as `is_odd` says, else those of the
    /// last one again. Takes system calls for each entry: not for a worker's thread.
    pub fn fill(&self, is_odd: bool, to: &mut [u8]) -> Result<Page, Errno> {
        let state = &mut *lock(&self.state);
        if is_odd != state.is_odd {
            (state.began, state.is_odd) = (state.next, is_odd);
        }
        let (page, next) = state.fill(to)?;
        state.next = next;
        Ok(page)
    }
}

impl State {
    /// The page, and where the one behind it begins.
    fn fill(&self, to: &mut [u8]) -> Result<(Page, u64), Errno> {
        let directory = self.directory.as_fd();
        rustix::fs::seek(directory, SeekFrom::Start(self.began))?;
        let mut buffer = vec![MaybeUninit::uninit(); BUFFER_BYTES];
        let mut all = RawDir::new(directory, &mut buffer);
        let (mut len, mut next) = (0, self.began);
        while let Some(entry) = all.next() {
            let entry = entry?;
            let name = entry.file_name();
            let behind = entry.next_entry_cookie();
            let bytes = name.to_bytes();
            if matches!(bytes, b"." | b"..") || is_unfinished_put(bytes) {
                if self.removes_for.is_some_and(|server| is_of_another_server(bytes, server)) {
                    let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
                }
                next = behind;
                continue;
            }
            let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
            let wanted =
                StatxFlags::TYPE | StatxFlags::MODE | StatxFlags::SIZE | StatxFlags::MTIME | StatxFlags::INO;
            let entry = match rustix::fs::statx(directory, name, flags, wanted) {
                Ok(stat) => DirectoryEntry {
                    name: bytes,
                    mode: stat.stx_mode.into(),
                    size: stat.stx_size,
                    modified_ns: nanoseconds(stat.stx_mtime),
                    inode: stat.stx_ino,
                    has_status: true,
                },
                // It has just been removed.
                Err(Errno::NOENT) => {
                    next = behind;
                    continue;
                }
                Err(_) => of_type(bytes, entry.file_type().as_raw_mode(), entry.ino()),
            };
            match push_entry(&entry, &mut to[len..]) {
                Some(added) => (len, next) = (len + added, behind),
                None => return Ok((Page { len, is_last: false }, next)),
            }
        }
        Ok((Page { len, is_last: true }, next))
    }
}

/// An entry of which no more than the type is known.
fn of_type(name: &[u8], mode: RawMode, inode: u64) -> DirectoryEntry<'_> {
    DirectoryEntry { name, mode, size: 0, modified_ns: 0, inode, has_status: false }
}

/// Removes what other servers than the one with this number have left of puts in a directory. Whether
/// there was anything.
pub fn remove_unfinished(directory: OwnedFd, server: u64) -> Result<bool, Errno> {
    let listed = directory.as_fd();
    let mut buffer = vec![MaybeUninit::uninit(); BUFFER_BYTES];
    let mut all = RawDir::new(listed, &mut buffer);
    let mut has_removed = false;
    while let Some(entry) = all.next() {
        let entry = entry?;
        let name = entry.file_name();
        if is_of_another_server(name.to_bytes(), server) {
            has_removed |= rustix::fs::unlinkat(listed, name, AtFlags::empty()).is_ok();
        }
    }
    Ok(has_removed)
}

/// Fills `to` with entries for these exports: their names and types, and sizes where they are known. Returns
/// their length; None if there is no room for all.
pub fn fill_with_exports<'a>(
    exports: impl Iterator<Item = (&'a str, FileType, Option<u64>)>,
    to: &mut [u8],
) -> Option<usize> {
    let mut len = 0;
    for (name, kind, size) in exports {
        let entry =
            DirectoryEntry { size: size.unwrap_or(0), ..of_type(name.as_bytes(), kind.as_raw_mode(), 0) };
        len += push_entry(&entry, &mut to[len..])?;
    }
    Some(len)
}

/// The listings of a session, oldest first.
#[derive(Debug)]
pub struct Listings<P>(Vec<(Arc<Listing>, P)>);

impl<P> Default for Listings<P> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<P> Listings<P> {
    /// Enters a listing, and what comes with it. Returns what it takes the place of, if there are as many as
    /// there may be: the oldest one.
    pub fn insert(&mut self, listing: Arc<Listing>, permit: P, max: usize) -> Option<(Arc<Listing>, P)> {
        self.0.push((listing, permit));
        (self.0.len() > max).then(|| self.0.remove(0))
    }

    /// The listing with this name.
    pub fn get(&self, id: u64) -> Option<Arc<Listing>> {
        self.0.iter().find(|(listing, _)| listing.id == id).map(|(listing, _)| Arc::clone(listing))
    }

    /// Takes it out.
    pub fn remove(&mut self, id: u64) -> Option<(Arc<Listing>, P)> {
        let at = self.0.iter().position(|(listing, _)| listing.id == id)?;
        Some(self.0.remove(at))
    }

    /// Takes those out that are so.
    pub fn take_if(&mut self, is_so: impl Fn(&Listing) -> bool) -> Vec<(Arc<Listing>, P)> {
        self.0.extract_if(.., |(listing, _)| is_so(listing)).collect()
    }

    /// Takes all out.
    pub fn take(&mut self) -> Vec<(Arc<Listing>, P)> {
        std::mem::take(&mut self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use raio_transport::protocol::entries;
    use rustix::fs::{Mode, OFlags};

    use super::*;
    use crate::engine::Lanes;
    use crate::pool::Pool;
    use crate::unfinished::unfinished_put;

    fn listing(path: &std::path::Path) -> Listing {
        let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let lanes = Lanes::new(Pool::start().unwrap());
        Listing::new(1, 0, None, lanes, fd)
    }

    fn names(bytes: &[u8]) -> Vec<Vec<u8>> {
        entries(bytes).map(|entry| entry.unwrap().name.to_vec()).collect()
    }

    #[test]
    fn pages_have_each_entry_once_and_can_be_had_again() {
        let directory = tempfile::tempdir().unwrap();
        let expected: BTreeSet<_> = (0..1000).map(|n| format!("file{n}").into_bytes()).collect();
        for name in &expected {
            std::fs::write(directory.path().join(std::str::from_utf8(name).unwrap()), "data").unwrap();
        }
        let listing = listing(directory.path());
        let mut seen = Vec::new();
        let (mut is_odd, mut page) = (false, [0; 512]);
        loop {
            let Page { len, is_last } = listing.fill(is_odd, &mut page).unwrap();
            let first = page[..len].to_vec();
            assert!(entries(&first).all(|entry| entry.unwrap().size == 4));
            assert_eq!(listing.fill(is_odd, &mut page).unwrap(), Page { len, is_last });
            assert_eq!(names(&page[..len]), names(&first));
            seen.extend(names(&first));
            is_odd = !is_odd;
            if is_last {
                break;
            }
            assert!(len > 0, "a page has at least one entry");
        }
        assert_eq!((seen.len(), seen.into_iter().collect::<BTreeSet<_>>()), (1000, expected));
    }

    #[test]
    fn unfinished_files_are_not_listed_and_those_of_other_servers_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = |server| directory.path().join(String::from_utf8(unfinished_put(server, 1)).unwrap());
        for server in [1, 2] {
            std::fs::write(path(server), "").unwrap();
        }
        std::fs::write(directory.path().join("file"), "").unwrap();
        let mut page = [0; 512];
        for server in [None, Some(1)] {
            let listing = listing(directory.path()).removing_for(server);
            let Page { len, .. } = listing.fill(false, &mut page).unwrap();
            assert_eq!(names(&page[..len]), [b"file"]);
            assert_eq!(path(2).exists(), server.is_none());
        }
        assert!(path(1).exists());
        let fd = rustix::fs::open(directory.path(), OFlags::RDONLY, Mode::empty()).unwrap();
        assert_eq!((remove_unfinished(fd, 2), path(1).exists()), (Ok(true), false));
    }

    #[test]
    fn a_session_has_a_limited_number_of_listings() {
        let mut listings = Listings::default();
        let directory = tempfile::tempdir().unwrap();
        let new = |id| Arc::new(Listing { id, ..listing(directory.path()) });
        assert!(listings.insert(new(1), (), 2).is_none() && listings.insert(new(2), (), 2).is_none());
        assert_eq!(listings.insert(new(3), (), 2).unwrap().0.id, 1);
        assert!(listings.get(1).is_none() && listings.get(3).is_some());
        assert!(listings.remove(2).is_some() && listings.remove(2).is_none());
        assert_eq!(listings.take().len(), 1);
    }
}
