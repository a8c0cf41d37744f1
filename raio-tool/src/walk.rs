//! Walks through the directories of a server, one call at a time, in the order of names.

use std::path::{Path, PathBuf};

use raio::{DirEntry, Session};

use crate::failure::Failure;
use crate::location::Location;

/// A directory of a server, and what is beneath it.
pub struct Walk<'a> {
    /// A session with its server.
    pub session: &'a Session,
    /// What the user calls the directory.
    pub location: &'a Location,
    /// Its path on the server.
    pub path: &'a Path,
}

/// What is told of a walk.
pub trait Visitor {
    /// Something is there. `below` is its path beneath the directory, and `depth` the number of names in it.
    /// Returns whether to look into it, if it is a directory.
    fn found(&mut self, below: &Path, entry: &DirEntry, depth: usize) -> Result<bool, Failure>;
    /// All in a directory was found.
    fn left(&mut self, _below: &Path, _depth: usize) -> Result<(), Failure> {
        Ok(())
    }
    /// A directory could not be read.
    fn failed(&mut self, failure: Failure) -> Result<(), Failure>;
}

impl Walk<'_> {
    /// Tells of everything beneath the directory. It fails if the directory itself cannot be read.
    pub fn run(&self, visitor: &mut dyn Visitor) -> Result<(), Failure> {
        let entries = self.entries(Path::new(""))?;
        self.visit(Path::new(""), entries, 1, visitor)
    }

    /// The entries of a directory beneath this one, by name.
    pub fn entries(&self, below: &Path) -> Result<Vec<DirEntry>, Failure> {
        let path = match below.as_os_str().is_empty() {
            true => self.path.to_owned(),
            false => self.path.join(below),
        };
        let listed = self.session.read_dir(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let mut entries = listed
            .map_err(|error| Failure::remote(format!("Cannot list {}", self.location.join(below)), &error))?;
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn visit(
        &self,
        directory: &Path,
        entries: Vec<DirEntry>,
        depth: usize,
        visitor: &mut dyn Visitor,
    ) -> Result<(), Failure> {
        for entry in entries {
            let below: PathBuf = directory.join(&entry.name);
            if !visitor.found(&below, &entry, depth)? || !entry.is_dir() {
                continue;
            }
            match self.entries(&below) {
                Ok(entries) => self.visit(&below, entries, depth + 1, visitor)?,
                Err(failure) if failure.is_final() => return Err(failure),
                Err(failure) => visitor.failed(failure)?,
            }
            visitor.left(&below, depth)?;
        }
        Ok(())
    }
}
