//! One directory of a tree that is made like another one.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Comparison, Deed, Hand, Item, Node, count};
use crate::failure::{Failure, Kind};
use crate::tree::{TreeEntry, partial_path};
use crate::tuning::FILES_PER_ITEM;

impl Hand<'_> {
    /// Both sides of a directory, listed at the same time.
    fn list(&mut self, node: &Node) -> Result<(Vec<TreeEntry>, Vec<TreeEntry>), Failure> {
        let compares = self.run.plan.comparison != Comparison::None || self.run.plan.deletes;
        if !compares || node.is_new() {
            return Ok((self.source.entries(node.path())?, Vec::new()));
        }
        if node.there_lacks(0o500) {
            self.unlock(node)?;
        }
        let (source, destination) = (&mut self.source, &mut self.destination);
        std::thread::scope(|scope| {
            let there = scope.spawn(|| destination.entries(node.path()));
            let here = source.entries(node.path())?;
            let there = there.join().map_err(|_| Failure::new("A thread that lists has panicked."))??;
            Ok((here, there))
        })
    }

    /// Does what a directory itself needs, and adds what is in it to the queue.
    pub(super) fn directory(&mut self, node: &Arc<Node>) -> Result<(), Failure> {
        let run = self.run;
        if node.parent().is_none() {
            count(&run.counts.directories);
            self.create_root(node)?;
        }
        let (here, there) = self.list(node)?;
        let mut there = there.into_iter().peekable();
        let (mut directories, mut files) = (Vec::new(), Vec::new());
        let mut extra = Vec::new();
        for entry in here {
            while let Some(other) = there.next_if(|other| other.name < entry.name) {
                extra.push(other);
            }
            let other = there.next_if(|other| other.name == entry.name);
            let path = node.path().join(&entry.name);
            if run.is_excluded(&path) {
                continue;
            }
            let entry = match self.resolved(node, &path, entry) {
                Ok(entry) => entry,
                Err(failure) => {
                    run.note(Err(failure))?;
                    continue;
                }
            };
            if entry.is_dir() {
                let cleared = self.clear_for_dir(node, &path, other.as_ref());
                if run.note(cleared)? {
                    let other = other.filter(TreeEntry::is_dir);
                    directories.push(node.child(path, entry, other));
                }
            } else {
                files.push((entry, other));
            }
        }
        extra.extend(there);
        if run.plan.deletes && !extra.is_empty() {
            // Partial files of interrupted copies. Large ones are kept, to be resumed.
            let partials: HashMap<_, _> = files
                .iter()
                .map(|(entry, _)| (partial_path(&run.access[1], &node.path().join(&entry.name)), entry.size))
                .collect();
            for other in extra {
                let path = node.path().join(&other.name);
                let of_size = partials.get(&path);
                if run.is_excluded(&path) || of_size.is_some_and(|&size| run.plan.has_journal(size)) {
                    continue;
                }
                let removed = self.unlock(node).and_then(|()| match of_size {
                    // The copy creates it again, over any connection: this must be done before.
                    Some(_) => self.remove(&path, &other).map(drop),
                    None => self.delete(node, path, &other),
                });
                run.note(removed)?;
            }
        }
        let mut items = Vec::new();
        while !files.is_empty() {
            let group = files.split_off(files.len().saturating_sub(FILES_PER_ITEM));
            node.awaits(group.len());
            items.push(Item::Files(Arc::clone(node), group));
        }
        // Files first: the queue gives back the newest, and directories make more of it.
        let mut new = Vec::new();
        for node in directories {
            count(&run.counts.directories);
            match node.is_new() && run.begins(Deed::Mkdir, node.path(), None)? {
                true => new.push(node),
                false => items.push(Item::Directory(node)),
            }
        }
        run.queue.add(items);
        for node in new {
            self.make_room()?;
            self.begin_dir(node);
        }
        Ok(())
    }

    /// An entry of the source; with `follows`, the target of a link.
    fn resolved(&mut self, node: &Node, path: &Path, entry: TreeEntry) -> Result<TreeEntry, Failure> {
        if !entry.is_link() || !self.run.plan.follows {
            return Ok(entry);
        }
        let leads_to = self.source.entry(path, true)?.ok_or_else(|| {
            let location = self.source.location(path);
            Failure::of(Kind::NotFound, format!("{location} is a dangling symbolic link. Remove it."))
        })?;
        if leads_to.is_dir() && node.is_beneath(&leads_to) {
            let location = self.source.location(path);
            return Err(Failure::new(format!("{location} is a symbolic link to a directory above it.")));
        }
        Ok(TreeEntry { name: entry.name, ..leads_to })
    }

    /// Makes way for a directory.
    fn clear_for_dir(&mut self, node: &Node, path: &Path, other: Option<&TreeEntry>) -> Result<(), Failure> {
        match other {
            Some(other) if other.is_dir() => Ok(()),
            Some(other) => {
                self.unlock(node)?;
                self.remove(path, other).map(drop)
            }
            None => self.unlock(node),
        }
    }

    /// Something in a directory is about to be changed: its owner gets the permissions to do so, until it is
    /// done.
    pub(super) fn unlock(&mut self, node: &Node) -> Result<(), Failure> {
        node.has_changed();
        if !node.there_lacks(0o700) || !self.run.plan.preserves || self.run.plan.is_dry {
            return Ok(());
        }
        node.unlock(|mode| self.destination.set(node.path(), Some(mode), None))
    }

    fn create_root(&mut self, node: &Node) -> Result<(), Failure> {
        let run = self.run;
        if !node.is_new() || !run.begins(Deed::Mkdir, node.path(), None)? {
            return Ok(());
        }
        // It can be written to until everything is in it.
        let made = self.destination.create_dir(node.path(), node.source().permissions() | 0o700)?;
        node.was_made(made);
        Ok(())
    }

    /// Removes something that is in a directory, or begins to.
    fn delete(&mut self, node: &Arc<Node>, path: PathBuf, entry: &TreeEntry) -> Result<(), Failure> {
        let run = self.run;
        if entry.is_dir() {
            return self.remove(&path, entry).map(drop);
        }
        count(&run.counts.deleted);
        if run.begins(Deed::Delete, &path, None)? {
            self.make_room()?;
            self.begin_remove(node, path);
        }
        Ok(())
    }

    /// Removes something from the destination, with what is in it, but nothing that is excluded. Returns
    /// whether it is gone.
    pub(super) fn remove(&mut self, path: &Path, entry: &TreeEntry) -> Result<bool, Failure> {
        let run = self.run;
        if entry.is_dir() {
            if entry.mode & 0o700 != 0o700 && !run.plan.is_dry {
                self.destination.set(path, Some(entry.permissions() | 0o700), None)?;
            }
            let mut is_empty = true;
            for entry in self.destination.entries(path)? {
                let path: PathBuf = path.join(&entry.name);
                is_empty &= !run.is_excluded(&path) && self.remove(&path, &entry)?;
            }
            if !is_empty {
                return Ok(false);
            }
        }
        count(&run.counts.deleted);
        if run.begins(Deed::Delete, path, None)? {
            match entry.is_dir() {
                true => self.destination.remove_dir(path)?,
                false => self.destination.remove_file(path)?,
            }
        }
        Ok(true)
    }
}
