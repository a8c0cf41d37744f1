//! One file or link of a tree that is made like another one.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Comparison, Deed, Hand, Node, count};
use crate::contents::same_contents;
use crate::copy::{Destination, FileCopy, state_file};
use crate::failure::Failure;
use crate::place::Sort;
use crate::progress::{Progress, Style};
use crate::tree::{TreeEntry, partial_tag};
use crate::tuning::SMALL_FILE_BYTES;

impl Hand<'_> {
    /// Does what a file or link needs, or begins it. `there` is what the destination has. Returns whether it
    /// is done.
    pub(super) fn file(
        &mut self,
        node: &Arc<Node>,
        entry: &TreeEntry,
        there: Option<&TreeEntry>,
    ) -> Result<bool, Failure> {
        let run = self.run;
        let path = node.path().join(&entry.name);
        if !entry.is_file() && !entry.is_link() {
            let location = self.source.location(&path);
            return Err(Failure::new(format!(
                "{location} is neither a file nor a directory nor a link. --exclude leaves it out."
            )));
        }
        if entry.is_file() {
            count(&run.counts.files);
        }
        if let Some(there) = there.filter(|there| there.mode & libc::S_IFMT == entry.mode & libc::S_IFMT)
            && self.is_same(&path, entry, there)?
        {
            count(&run.counts.unchanged);
            return self.set_file(node, path, entry, there);
        }
        self.unlock(node)?;
        if let Some(there) = there.filter(|there| there.is_dir()) {
            if !run.plan.deletes {
                let location = self.destination.location(&path);
                return Err(Failure::new(format!(
                    "{location} is a directory, and a file in the source. raio sync --delete removes it."
                )));
            }
            self.remove(&path, there)?;
        }
        if entry.is_link() {
            count(&run.counts.links);
            let begins = run.begins(Deed::Link, &path, None)?;
            if begins {
                self.begin_link(node, path, entry);
            }
            return Ok(!begins);
        }
        if !run.begins(Deed::Copy, &path, Some(entry.size))? {
            self.was_copied(entry.size);
            return Ok(true);
        }
        // What is verified takes its name later.
        match entry.size <= SMALL_FILE_BYTES && !run.plan.verifies {
            true => self.begin_file(node, path, entry),
            false => self.queue_large(Arc::clone(node), entry.clone()),
        }
        Ok(false)
    }

    /// Whether the destination has it already.
    fn is_same(&mut self, path: &Path, entry: &TreeEntry, there: &TreeEntry) -> Result<bool, Failure> {
        let has_time = entry.size == there.size && entry.modified_ns == there.modified_ns;
        match self.run.plan.comparison {
            Comparison::None => Ok(false),
            Comparison::SizeAndTime => Ok(has_time),
            Comparison::Contents if entry.is_link() => {
                Ok(self.source.read_link(path)? == self.destination.read_link(path)?)
            }
            Comparison::Contents if entry.size != there.size => Ok(false),
            Comparison::Contents => {
                let interrupt = self.run.mirror.interrupt;
                let is_same = same_contents(&mut *self.source, &mut *self.destination, path, interrupt)?;
                Ok(is_same)
            }
        }
    }

    /// Begins to set what differs of a file with the right contents. Returns whether it is done.
    fn set_file(
        &mut self,
        node: &Arc<Node>,
        path: PathBuf,
        entry: &TreeEntry,
        there: &TreeEntry,
    ) -> Result<bool, Failure> {
        let run = self.run;
        if entry.is_link() || !run.plan.preserves {
            return Ok(true);
        }
        let mode = Some(entry.permissions()).filter(|&mode| mode != there.permissions());
        let modified_ns = Some(entry.modified_ns).filter(|&time| time != there.modified_ns);
        if mode.is_none() && modified_ns.is_none() || !run.begins(Deed::Set, &path, None)? {
            return Ok(true);
        }
        self.begin_attributes(Some(node), path, mode, modified_ns);
        Ok(false)
    }

    /// Copies a file in blocks. Returns how many bytes it has.
    pub(super) fn copy_large(&mut self, path: &Path) -> Result<u64, Failure> {
        let run = self.run;
        let source = self.source.source(path)?;
        let facts = source.facts()?;
        if facts.sort != Sort::File {
            let location = self.source.location(path);
            return Err(Failure::new(format!("{location} is no file any more. Start again.")));
        }
        let partial = self.destination.begin(path, facts.mode & 0o777)?;
        let size = facts.size.unwrap_or(0);
        let has_journal = run.plan.has_journal(size);
        let journal = has_journal.then(|| state_file(&partial_tag(&run.access[1], path)));
        let done = run.counts.copied_bytes.load(Ordering::Relaxed);
        let copied = FileCopy {
            from: &*source,
            facts: &facts,
            source: &self.source.location(path),
            to: &self.destination.location(path),
            settings: run.plan.settings.clone(),
            has_journal,
            resumes: run.plan.resumes,
            is_alone: false,
            verifies: run.plan.verifies,
            is_sparse: true,
            preserves: false,
            is_durable: run.plan.is_durable,
            sessions: &self.sessions,
            progress: &|what, _| match what {
                "copy" => Progress::of_part(run.mirror.progress, done),
                _ => Progress::new(Style::Never, what, None),
            },
            interrupt: run.mirror.interrupt,
        }
        .run(&mut Destination::partial(partial, None, journal))?;
        if run.plan.preserves {
            self.destination.set(path, Some(facts.mode & 0o777), Some(facts.times_ns.1))?;
        }
        Ok(copied.bytes)
    }
}
