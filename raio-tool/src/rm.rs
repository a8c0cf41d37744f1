//! `raio rm`: removes files and directories of a server.

use std::ffi::OsString;
use std::path::Path;

use clap::{Args, ValueHint};
use raio::{DirEntry, Error, Session};

use crate::batch::Batch;
use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::place::Sessions;
use crate::walk::{Visitor, Walk};

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// Files and links of a server; with -r directories, too
    #[arg(required = true, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    paths: Vec<OsString>,
    /// Remove directories recursively
    #[arg(short, long)]
    recursive: bool,
    /// What does not exist is no failure
    #[arg(short, long)]
    force: bool,
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let sessions = Sessions::new(global);
    Batch::each(&options.paths, |path| {
        let location = Location::parse(path)?;
        let (session, path) = sessions.at(&location)?;
        Removal { session: &session, location: &location, path, options, batch: Batch::default() }.run()
    })
}

struct Removal<'a> {
    session: &'a Session,
    location: &'a Location,
    path: &'a Path,
    options: &'a Options,
    batch: Batch,
}

impl Removal<'_> {
    fn run(mut self) -> Result<(), Failure> {
        let status = match self.session.symlink_metadata(self.path) {
            Err(error) if self.options.force && error.errno() == libc::ENOENT => return Ok(()),
            status => status.map_err(|error| self.failed_at(Path::new(""), &error))?,
        };
        if status.mode.get() & libc::S_IFMT != libc::S_IFDIR {
            return self.removed(Path::new(""), self.session.remove_file(self.path));
        }
        if !self.options.recursive {
            let text = format!("{} is a directory. Use -r to remove it recursively.", self.location);
            return Err(Failure::new(text));
        }
        Walk { session: self.session, location: self.location, path: self.path }.run(&mut self)?;
        // If something is left, the directory is not empty, and why is known.
        std::mem::take(&mut self.batch).finish()?;
        self.removed(Path::new(""), self.session.remove_dir(self.path))
    }

    fn removed(&self, below: &Path, removed: Result<(), Error>) -> Result<(), Failure> {
        match removed {
            Err(error) if self.options.force && error.errno() == libc::ENOENT => Ok(()),
            removed => removed.map_err(|error| self.failed_at(below, &error)),
        }
    }

    fn failed_at(&self, below: &Path, error: &Error) -> Failure {
        Failure::remote(format!("Cannot remove {}", self.location.join(below)), error)
    }
}

impl Visitor for Removal<'_> {
    fn found(&mut self, below: &Path, entry: &DirEntry, _: usize) -> Result<bool, Failure> {
        if !entry.is_dir() {
            let removed = self.session.remove_file(self.path.join(below));
            let removed = self.removed(below, removed);
            self.batch.note(removed)?;
        }
        Ok(true)
    }

    fn left(&mut self, below: &Path, _: usize) -> Result<(), Failure> {
        let removed = self.removed(below, self.session.remove_dir(self.path.join(below)));
        self.batch.note(removed)
    }

    fn failed(&mut self, failure: Failure) -> Result<(), Failure> {
        self.batch.note(Err(failure))
    }
}
