//! How many bytes the files beneath a directory of an export have together, where `clients.toml` limits that.
//!
//! What counts is the size of a file, holes and all, for only that is known before a write is carried out. A
//! thread adds up the sizes of all files when the server has started, and now and then from then on, which
//! finds what others have changed. In between each request that makes a file longer is counted before it
//! begins, and each open that empties one.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use anyhow::Context;
use raio_transport::sync::lock;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::tuning::stored::{COUNTED_EVERY, COUNTING_PART, DEPTH_MAX};

/// What tells a file from others: its device and its inode.
pub type FileKey = (u64, u64);

fn file_key(stat: &Stat) -> FileKey {
    (stat.st_dev, stat.st_ino)
}

/// A directory whose bytes are counted. Shared by all workers.
#[derive(Debug)]
pub struct Stored {
    bytes: AtomicU64,
    /// They have been added up. Nothing is limited before.
    is_counted: AtomicBool,
    /// How long each file is that clients have open to change it.
    sizes: Mutex<HashMap<FileKey, Weak<AtomicU64>>>,
    next_count: Mutex<Instant>,
}

impl Stored {
    fn new() -> Self {
        Self {
            bytes: AtomicU64::new(0),
            is_counted: AtomicBool::new(false),
            sizes: Mutex::default(),
            next_count: Mutex::new(Instant::now()),
        }
    }

    /// Something had this number of bytes, and has that one now.
    pub fn change(&self, from: u64, to: u64) {
        let changed = |bytes: u64| Some(bytes.saturating_add(to).saturating_sub(from));
        let _ = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, changed);
    }

    /// Counts that a file is about to have `now` bytes in the place of `before`, if that keeps within the
    /// limit.
    pub fn replace(&self, bytes_max: u64, before: u64, now: u64) -> Result<(), Full> {
        self.change(before, now);
        let bytes = self.bytes.load(Ordering::Relaxed);
        if now > before && bytes > bytes_max && self.is_counted.load(Ordering::Relaxed) {
            self.change(now, before);
            return Err(Full { bytes_max, bytes: bytes.saturating_sub(now - before) });
        }
        Ok(())
    }

    /// A file that clients may have open has this size now, and was counted.
    pub fn is_now(&self, file: FileKey, size: u64) {
        if let Some(known) = lock(&self.sizes).get(&file).and_then(Weak::upgrade) {
            known.store(size, Ordering::Relaxed);
        }
    }

    /// A client has opened a file to change it, which may make it longer until all have this many bytes. It
    /// had `before` bytes, and has `now`, because the open has emptied it.
    pub fn opened(self: &Arc<Self>, bytes_max: u64, stat: FileKey, before: u64, now: u64) -> LimitedFile {
        let mut sizes = lock(&self.sizes);
        let size = match sizes.get(&stat).and_then(Weak::upgrade) {
            Some(size) => {
                self.change(size.swap(now, Ordering::Relaxed), now);
                size
            }
            None => {
                self.change(before, now);
                let size = Arc::new(AtomicU64::new(now));
                sizes.insert(stat, Arc::downgrade(&size));
                size
            }
        };
        LimitedFile { stored: Arc::clone(self), bytes_max, key: stat, size }
    }

    /// Adds up the sizes of all files beneath the directory, where it is that. Returns how many files there
    /// are.
    fn count(&self, directory: OwnedFd) -> Result<u64, Errno> {
        let mut count = Count { device: rustix::fs::fstat(&directory)?.st_dev, ..Count::default() };
        count.walk(directory, |key, size| self.is_now(key, size))?;
        self.bytes.store(count.bytes, Ordering::Relaxed);
        self.is_counted.store(true, Ordering::Relaxed);
        Ok(count.files)
    }
}

/// The files beneath a directory, as far as it has been walked.
#[derive(Debug, Default)]
struct Count {
    /// What is mounted beneath is not counted.
    device: u64,
    files: u64,
    bytes: u64,
    /// Files with several names.
    linked: HashSet<FileKey>,
}

impl Count {
    fn walk(&mut self, directory: OwnedFd, mut found: impl FnMut(FileKey, u64)) -> Result<(), Errno> {
        let mut open = vec![Dir::new(directory)?];
        loop {
            let depth = open.len();
            let Some(directory) = open.last_mut() else { return Ok(()) };
            let Some(entry) = directory.read() else {
                open.pop();
                continue;
            };
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let at = directory.fd()?;
            let Ok(stat) = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            match FileType::from_raw_mode(stat.st_mode) {
                _ if stat.st_dev != self.device => {}
                FileType::RegularFile if stat.st_nlink == 1 || self.linked.insert(file_key(&stat)) => {
                    self.files += 1;
                    self.bytes = self.bytes.saturating_add(stat.st_size as u64);
                    found(file_key(&stat), stat.st_size as u64);
                }
                // One that has gone, or may not be read, has nothing that could be counted.
                FileType::Directory if depth < DEPTH_MAX => {
                    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    if let Ok(next) = rustix::fs::openat(at.as_fd(), name, flags, Mode::empty()) {
                        open.push(Dir::new(next)?);
                    }
                }
                _ => {}
            }
        }
    }
}

/// A file that a client has open to change it, where its bytes are limited.
#[derive(Debug)]
pub struct LimitedFile {
    stored: Arc<Stored>,
    bytes_max: u64,
    key: FileKey,
    size: Arc<AtomicU64>,
}

/// There may not be more bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// What there may be.
    pub bytes_max: u64,
    /// What there is.
    pub bytes: u64,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bytes_max, bytes } = self;
        write!(
            f,
            "The files that this client may change have {bytes} bytes, of {bytes_max} that they may have \
             together. Empty or remove some; the server's operator can raise `stored` in clients.toml."
        )
    }
}

impl LimitedFile {
    /// Counts a request after which the file ends at `end`, whether it was longer or shorter.
    pub fn resize(&self, end: u64) -> Result<(), Full> {
        self.grow(end)?;
        let before = self.size.fetch_min(end, Ordering::Relaxed);
        self.stored.change(before.max(end), end);
        Ok(())
    }

    /// Counts a request after which the file ends at `end`, or later if it does already.
    pub fn grow(&self, end: u64) -> Result<(), Full> {
        let mut size = self.size.load(Ordering::Relaxed);
        while end > size {
            self.stored.replace(self.bytes_max, size, end)?;
            match self.size.compare_exchange(size, end, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(other) => {
                    self.stored.change(end, size);
                    size = other;
                }
            }
        }
        Ok(())
    }
}

impl Drop for LimitedFile {
    fn drop(&mut self) {
        let mut sizes = lock(&self.stored.sizes);
        if Arc::strong_count(&self.size) == 1 {
            sizes.remove(&self.key);
        }
    }
}

/// Which directory of which export: its place among all, and a path relative to it (empty: all of it).
pub type Place = (usize, String);

/// All directories whose bytes are counted.
#[derive(Debug, Default)]
pub struct StoredDirectories {
    all: Mutex<HashMap<Place, Arc<Stored>>>,
    /// There is another one.
    is_new: Condvar,
}

impl StoredDirectories {
    /// The directory in this place. One that was not known is counted soon.
    pub fn get(&self, place: Place) -> Arc<Stored> {
        let mut all = lock(&self.all);
        let stored = all.entry(place).or_insert_with(|| {
            self.is_new.notify_one();
            Arc::new(Stored::new())
        });
        Arc::clone(stored)
    }

    /// From now on these are counted, and no others.
    pub fn set(&self, places: Vec<Place>) {
        lock(&self.all).retain(|place, _| places.contains(place));
        for place in places {
            self.get(place);
        }
    }

    /// Starts the thread that counts. `open` opens the directory in a place, for listing; `name` says what it
    /// is called in the log.
    pub fn start(
        self: &Arc<Self>,
        open: impl Fn(&Place) -> anyhow::Result<OwnedFd> + Send + 'static,
        name: impl Fn(&Place) -> String + Send + 'static,
    ) -> std::io::Result<()> {
        let this = Arc::clone(self);
        let run = move || {
            loop {
                let (place, stored) = this.next();
                let began = Instant::now();
                let counted =
                    open(&place).and_then(|directory| stored.count(directory).context("it cannot be listed"));
                let took = began.elapsed();
                *lock(&stored.next_count) = Instant::now() + COUNTED_EVERY.max(took * COUNTING_PART);
                match counted {
                    Ok(files) => tracing::info!(
                        name: "stored-counted",
                        "{place}: {files} files have {bytes} bytes, counted in {took:.1?}.",
                        place = name(&place),
                        bytes = stored.bytes.load(Ordering::Relaxed)
                    ),
                    Err(error) => tracing::warn!(
                        name: "stored-not-counted",
                        "{place}: what is stored there cannot be counted, and so not be limited: {error:#}.",
                        place = name(&place)
                    ),
                }
            }
        };
        std::thread::Builder::new().name("raio-count".into()).spawn(run).map(drop)
    }

    /// Waits until a directory is to be counted.
    fn next(&self) -> (Place, Arc<Stored>) {
        let mut all = lock(&self.all);
        loop {
            let at = |stored: &Stored| *lock(&stored.next_count);
            let next = all.iter().min_by_key(|(_, stored)| at(stored));
            let wait = match next {
                Some((place, stored)) => {
                    let wait = at(stored).saturating_duration_since(Instant::now());
                    if wait.is_zero() {
                        return (place.clone(), Arc::clone(stored));
                    }
                    wait
                }
                None => Duration::MAX,
            };
            let waited = self.is_new.wait_timeout(all, wait.min(COUNTED_EVERY));
            all = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const FILE: FileKey = (1, 2);

    fn counted(bytes: u64) -> Arc<Stored> {
        let stored = Stored::new();
        stored.bytes.store(bytes, Ordering::Relaxed);
        stored.is_counted.store(true, Ordering::Relaxed);
        Arc::new(stored)
    }

    fn bytes(stored: &Stored) -> u64 {
        stored.bytes.load(Ordering::Relaxed)
    }

    fn open(path: &Path) -> OwnedFd {
        std::fs::File::open(path).unwrap().into()
    }

    #[test]
    fn files_grow_until_all_have_what_they_may() {
        let stored = counted(100);
        let file = stored.opened(1000, FILE, 50, 50);
        for end in [50, 10, 60, 60, 500] {
            file.grow(end).unwrap();
        }
        assert_eq!(bytes(&stored), 550);
        assert_eq!(file.grow(951), Err(Full { bytes_max: 1000, bytes: 550 }));
        file.grow(950).unwrap();
        // Another open of the same file knows how long it is, and another file has nothing left.
        stored.opened(1000, FILE, 950, 950).grow(950).unwrap();
        let other = stored.opened(1000, (1, 3), 0, 0);
        assert!(other.grow(1).is_err());
        // Another client may have more.
        stored.opened(1001, (1, 3), 0, 0).grow(1).unwrap();
        assert_eq!(bytes(&stored), 1001);
    }

    #[test]
    fn an_open_that_empties_a_file_gives_its_bytes_back() {
        let stored = counted(100);
        drop(stored.opened(100, FILE, 60, 0));
        assert_eq!(bytes(&stored), 40);
        let file = stored.opened(100, FILE, 0, 0);
        file.grow(60).unwrap();
        // The size of an open file is known better than the lookup tells it.
        let again = stored.opened(100, FILE, 0, 0);
        assert_eq!(bytes(&stored), 40);
        again.grow(60).unwrap();
        drop((file, again));
        assert!(lock(&stored.sizes).is_empty());
    }

    #[test]
    fn nothing_is_limited_before_it_was_counted() {
        let directory = tempfile::tempdir().unwrap();
        let stored = Arc::new(Stored::new());
        let file = stored.opened(10, FILE, 0, 0);
        file.grow(100).unwrap();
        file.grow(i64::MAX as u64).unwrap();
        assert_eq!(stored.count(open(directory.path())), Ok(0));
        assert!(stored.opened(10, (1, 3), 0, 0).grow(11).is_err());
        stored.opened(10, (1, 3), 0, 0).grow(10).unwrap();
    }

    #[test]
    fn all_files_beneath_a_directory_are_counted_once_each() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::create_dir_all(path("a/b/c")).unwrap();
        for (name, size) in [("x", 10), ("a/x", 100), ("a/b/c/x", 1000)] {
            std::fs::write(path(name), vec![0; size]).unwrap();
        }
        std::fs::hard_link(path("x"), path("a/linked")).unwrap();
        std::os::unix::fs::symlink(path("a"), path("a/b/link")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", path("a/passwd")).unwrap();
        let stored = Arc::new(Stored::new());
        assert_eq!(stored.count(open(directory.path())), Ok(3));
        assert_eq!(bytes(&stored), 1110);
        // What a request was to add, and did not, is corrected by the next count.
        let stat = rustix::fs::stat(path("x")).unwrap();
        let file = stored.opened(5000, file_key(&stat), 10, 10);
        file.grow(3000).unwrap();
        assert_eq!(bytes(&stored), 4100);
        std::fs::remove_file(path("a/b/c/x")).unwrap();
        assert_eq!(stored.count(open(directory.path())), Ok(2));
        assert_eq!(bytes(&stored), 110);
        file.grow(4900).unwrap();
        assert!(file.grow(4901).is_err());
    }

    #[test]
    fn threads_that_write_at_the_same_time_do_not_exceed_the_limit_together() {
        let stored = counted(0);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let stored = &stored;
                scope.spawn(move || {
                    let shared = stored.opened(100_000, FILE, 0, 0);
                    let own = stored.opened(100_000, (2, thread), 0, 0);
                    for n in 0..30_000u64 {
                        let _ = shared.grow(n);
                        let _ = own.grow(n);
                        assert!(bytes(stored) <= 100_000 + 4 * 30_000);
                    }
                });
            }
        });
        assert!((90_000..=100_000).contains(&bytes(&stored)), "{}", bytes(&stored));
    }
}
