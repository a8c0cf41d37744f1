//! What is to be done to make a tree like another one, and what was done.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::output;
use crate::pattern::Pattern;
use crate::transfer::Settings;
use crate::tuning::JOURNAL_FROM_BYTES;

/// By what files are told to be the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// Not at all: every file is copied.
    None,
    /// By size and modification time.
    SizeAndTime,
    /// By all their bytes.
    Contents,
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// By what files are told to be the same.
    pub comparison: Comparison,
    /// What the source does not have is removed from the destination.
    pub deletes: bool,
    /// What would be done is told, and nothing is changed.
    pub is_dry: bool,
    /// Permissions and times are those of the source.
    pub preserves: bool,
    /// Symbolic links of the source lead to what they are links to.
    pub follows: bool,
    /// Files are durable before they take their names.
    pub is_durable: bool,
    /// Large files keep journals, and go on where an earlier copy was interrupted.
    pub resumes: bool,
    /// Each file that is copied is read again and compared.
    pub verifies: bool,
    /// The first failure is the end.
    pub fails_fast: bool,
    /// What is left alone on both sides.
    pub exclude: Vec<Pattern>,
    /// Threads, each with sessions of its own.
    pub threads: usize,
    /// How large files are read and written.
    pub settings: Settings,
}

impl Plan {
    /// Whether the copy of a file of this size has a journal.
    pub fn has_journal(&self, size: u64) -> bool {
        self.resumes && size >= JOURNAL_FROM_BYTES
    }
}

/// What is done at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Deed {
    /// A file is written.
    Copy,
    /// A directory is created.
    Mkdir,
    /// A symbolic link is created.
    Link,
    /// Permissions or time are set.
    Set,
    /// Something is removed.
    Delete,
}

/// Something that is done at the destination, as `--json` prints it.
#[derive(Debug, Serialize)]
pub struct Action {
    /// What it is.
    pub action: Deed,
    /// Beneath the destination.
    pub path: String,
    /// Of the file that is copied.
    pub bytes: Option<u64>,
}

/// How much was done, as `--json` prints it.
#[derive(Debug, Default, Serialize)]
pub struct Counts {
    /// Of the source, which were looked at.
    pub directories: AtomicU64,
    /// Regular files of the source.
    pub files: AtomicU64,
    /// Files that were copied.
    pub copied: AtomicU64,
    /// Their bytes.
    pub copied_bytes: AtomicU64,
    /// Files and links that the destination had already.
    pub unchanged: AtomicU64,
    /// Symbolic links that were created.
    pub links: AtomicU64,
    /// Removed from the destination.
    pub deleted: AtomicU64,
    /// What could not be done.
    pub failed: AtomicU64,
}

/// One more.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What is shown at the end.
impl Counts {
    /// For people.
    pub fn text(&self, is_exact: bool) -> String {
        let number = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        format!(
            "{} files, {} copied ({}), {} unchanged, {} links, {} directories, {} deleted, {} failed\n",
            number(&self.files),
            number(&self.copied),
            output::size(number(&self.copied_bytes), is_exact),
            number(&self.unchanged),
            number(&self.links),
            number(&self.directories),
            number(&self.deleted),
            number(&self.failed)
        )
    }
}
