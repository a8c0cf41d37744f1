//! A directory of the source whose likeness is made.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use raio_transport::sync::lock;

use crate::failure::Failure;
use crate::tree::TreeEntry;

/// A directory that is being worked on. Threads share it.
#[derive(Debug)]
pub struct Node {
    parent: Option<Arc<Node>>,
    path: PathBuf,
    source: TreeEntry,
    /// What the destination had there; None: nothing that is known.
    there: Option<TreeEntry>,
    /// The list of its entries, files and directories in it that are not done.
    awaited: AtomicUsize,
    /// It was not there before.
    is_made: AtomicBool,
    /// Something in it was created, replaced or removed.
    is_changed: AtomicBool,
    /// It could not be listed or created: it stays as it is.
    is_failed: AtomicBool,
    /// Its owner was given all permissions for the time being.
    is_unlocked: Mutex<bool>,
}

impl Node {
    /// The first one.
    pub fn root(source: TreeEntry, there: Option<TreeEntry>) -> Arc<Self> {
        Self::new(None, PathBuf::new(), source, there)
    }

    fn new(
        parent: Option<Arc<Self>>,
        path: PathBuf,
        source: TreeEntry,
        there: Option<TreeEntry>,
    ) -> Arc<Self> {
        Arc::new(Self {
            parent,
            path,
            source,
            there,
            awaited: AtomicUsize::new(1),
            is_made: AtomicBool::new(false),
            is_changed: AtomicBool::new(false),
            is_failed: AtomicBool::new(false),
            is_unlocked: Mutex::new(false),
        })
    }

    /// A directory in it, which has to be done before it is done itself.
    pub fn child(self: &Arc<Self>, path: PathBuf, source: TreeEntry, there: Option<TreeEntry>) -> Arc<Self> {
        self.awaits(1);
        if there.is_none() {
            self.has_changed();
        }
        Self::new(Some(Arc::clone(self)), path, source, there)
    }

    /// Beneath the root of both trees.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is like.
    pub fn source(&self) -> &TreeEntry {
        &self.source
    }

    /// The directory that it is in.
    pub fn parent(&self) -> Option<&Arc<Self>> {
        self.parent.as_ref()
    }

    /// Whether nothing is known to be at the destination.
    pub fn is_new(&self) -> bool {
        self.there.is_none()
    }

    /// Whether it is this directory, or in it.
    pub fn is_beneath(&self, entry: &TreeEntry) -> bool {
        self.source.inode == entry.inode || self.parent.as_ref().is_some_and(|it| it.is_beneath(entry))
    }

    /// Whether its owner lacks some of these permissions at the destination.
    pub fn there_lacks(&self, mode: u32) -> bool {
        self.there.as_ref().is_some_and(|there| there.mode & mode != mode)
    }

    /// Has `set` give its owner all permissions, once. Others that want it wait.
    pub fn unlock(&self, set: impl FnOnce(u32) -> Result<(), Failure>) -> Result<(), Failure> {
        let mut is_unlocked = lock(&self.is_unlocked);
        if let Some(there) = self.there.as_ref().filter(|_| !*is_unlocked) {
            set(there.permissions() | 0o700)?;
            *is_unlocked = true;
        }
        Ok(())
    }

    /// It was created, or found.
    pub fn was_made(&self, made: bool) {
        self.is_made.store(made, Ordering::Relaxed);
    }

    /// Its time is another one now.
    pub fn has_changed(&self) {
        self.is_changed.store(true, Ordering::Relaxed);
    }

    /// It stays as it is.
    pub fn has_failed(&self) {
        self.is_failed.store(true, Ordering::Relaxed);
    }

    /// More things in it are to be done.
    pub fn awaits(&self, count: usize) {
        self.awaited.fetch_add(count, Ordering::Relaxed);
    }

    /// One of them is done. Returns whether it was the last one.
    pub fn is_last(&self) -> bool {
        self.awaited.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// The permissions and the time that it gets in the end; None: it has them.
    pub fn attributes(&self, preserves: bool) -> Option<(u32, Option<i64>)> {
        let mode = self.source.permissions();
        if self.is_failed.load(Ordering::Relaxed) {
            return None;
        }
        if !preserves {
            // It was made with more than that, to be written to.
            let is_made = self.is_made.load(Ordering::Relaxed);
            return (is_made && mode & 0o700 != 0o700).then_some((mode, None));
        }
        let modified_ns = self.source.modified_ns;
        let is_right =
            self.there.as_ref().is_some_and(|it| it.permissions() == mode && it.modified_ns == modified_ns)
                && !self.is_changed.load(Ordering::Relaxed);
        (!is_right).then_some((mode, Some(modified_ns)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(inode: u64, modified_ns: i64) -> TreeEntry {
        TreeEntry { name: "d".into(), mode: libc::S_IFDIR | 0o755, size: 0, modified_ns, inode }
    }

    #[test]
    fn a_directory_is_done_after_all_that_is_in_it() {
        let root = Node::root(entry(1, 5), Some(entry(9, 5)));
        let child = root.child("a".into(), entry(2, 6), None);
        assert!(!root.is_last(), "its child is not done");
        assert!(child.is_last() && root.is_last());
        assert!(child.is_beneath(&entry(1, 0)) && !root.is_beneath(&entry(2, 0)));
    }

    #[test]
    fn attributes_are_set_only_where_they_differ_or_were_changed() {
        let same = Node::root(entry(1, 5), Some(entry(9, 5)));
        assert_eq!(same.attributes(true), None);
        same.has_changed();
        assert_eq!(same.attributes(true), Some((0o755, Some(5))));
        let new = Node::root(entry(1, 5), None);
        assert_eq!(new.attributes(true), Some((0o755, Some(5))));
        assert_eq!(new.attributes(false), None);
    }
}
