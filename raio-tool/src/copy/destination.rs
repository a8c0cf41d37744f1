//! Where a copy goes: a file beside its destination that takes its place at the end, or the destination
//! itself.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use crate::failure::Failure;
use crate::location::Location;
use crate::place::{Facts, PartialFile, Place, Sort};

/// Where a copy goes.
pub struct Destination {
    target: Target,
    /// What was there before.
    facts: Option<Facts>,
    journal: Option<PathBuf>,
    /// It reads as zeros wherever nothing is written.
    is_zero: bool,
}

enum Target {
    Partial(Box<dyn PartialFile>),
    InPlace(Box<dyn Place>),
}

impl Destination {
    /// A file beside the destination. `facts`: those of the existing destination, if there is one.
    pub fn partial(partial: Box<dyn PartialFile>, facts: Option<Facts>, journal: Option<PathBuf>) -> Self {
        Self { target: Target::Partial(partial), facts, journal, is_zero: false }
    }

    /// The destination itself.
    pub fn in_place(
        place: Box<dyn Place>,
        facts: Option<Facts>,
        journal: Option<PathBuf>,
        is_zero: bool,
    ) -> Self {
        Self { target: Target::InPlace(place), facts, journal, is_zero }
    }

    /// What is written to.
    pub fn place(&self) -> &dyn Place {
        match &self.target {
            Target::Partial(partial) => partial.place(),
            Target::InPlace(place) => &**place,
        }
    }

    /// What was at the destination before.
    pub fn facts(&self) -> Option<Facts> {
        self.facts
    }

    /// Whether it is written to itself.
    pub fn is_in_place(&self) -> bool {
        matches!(self.target, Target::InPlace(_))
    }

    /// Where the journal of the copy is; None if it cannot go on.
    pub fn journal(&self) -> Option<&Path> {
        self.journal.as_deref()
    }

    /// Whether zeros need not be written.
    pub fn is_zero(&self) -> bool {
        self.is_zero
    }

    /// The copy begins at its start: what was there goes away. With `skips_zeros` zeros need not be written
    /// from then on.
    pub fn begin(&mut self, skips_zeros: bool) -> Result<(), Failure> {
        match &mut self.target {
            Target::Partial(partial) => {
                partial.place().set_size(0)?;
                partial.set_skips_zeros(skips_zeros);
                self.is_zero = true;
            }
            Target::InPlace(place) if self.facts.is_some_and(|facts| facts.sort == Sort::File) => {
                place.set_size(0)?;
                self.is_zero = true;
            }
            Target::InPlace(_) => {}
        }
        Ok(())
    }

    /// All was written: `end` bytes.
    pub fn finish(&self, end: u64) -> Result<(), Failure> {
        match (&self.target, self.facts) {
            (Target::Partial(partial), _) => partial.place().set_size(end),
            (Target::InPlace(place), Some(facts)) if facts.sort == Sort::File => place.set_size(end),
            _ => Ok(()),
        }
    }

    /// Has it take its name. The journal has no use any more.
    pub fn publish(&mut self, durable: bool) -> Result<(), Failure> {
        if let Target::Partial(partial) = &mut self.target {
            partial.publish(durable)?;
        }
        if let Some(journal) = &self.journal {
            let _ = std::fs::remove_file(journal);
        }
        Ok(())
    }

    /// Removes what was written, if it has no name yet.
    pub fn abandon(&self) {
        if let Target::Partial(partial) = &self.target {
            partial.remove();
        }
    }

    /// Where what was written can be read, before it has taken the name `to`.
    pub fn location(&self, to: &Location) -> Location {
        match &self.target {
            Target::Partial(partial) => partial.location(to),
            Target::InPlace(_) => to.clone(),
        }
    }
}

/// Whether journals can be written to where [`state_file`] says. Creates nothing: a dry run asks, too.
pub fn can_keep_journals() -> bool {
    can_hold_files(&state_directory())
}

/// Whether files can be written to a directory, once it has been created if it does not exist.
fn can_hold_files(directory: &Path) -> bool {
    let there = directory.ancestors().find(|path| path.symlink_metadata().is_ok());
    there.is_some_and(|path| path.is_dir() && access(path, Access::WRITE_OK | Access::EXEC_OK).is_ok())
}

/// Where the journal of a copy to a device or a server is. Its tag tells copies apart.
pub fn state_file(tag: &str) -> PathBuf {
    state_directory().join(format!("cp-{tag}.journal"))
}

fn state_directory() -> PathBuf {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
    let directory = state.or_else(home).unwrap_or_else(std::env::temp_dir);
    directory.join("raio")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whether_a_directory_can_hold_files_is_found_without_creating_it() {
        let directory = tempfile::tempdir().unwrap();
        let new = directory.path().join("a/b");
        assert!(can_hold_files(directory.path()) && can_hold_files(&new));
        assert!(!directory.path().join("a").exists());
        std::fs::write(directory.path().join("a"), "").unwrap();
        assert!(!can_hold_files(&new), "a file is no directory");
    }
}
