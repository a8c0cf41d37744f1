//! `raio rm`: removes files and directories of a server.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};
use raio::{Context, DirEntry, Error, PathOperation, Session, SubmitOptions};

use crate::batch::Batch;
use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::place::{Sessions, remote};
use crate::tuning::REQUESTS_IN_FLIGHT;
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
        Removal::new(&session, &location, path, options).run()
    })
}

struct Removal<'a> {
    session: &'a Session,
    location: &'a Location,
    path: &'a Path,
    options: &'a Options,
    batch: Batch,
    /// Sends many requests without waiting for each answer. None before the first one.
    context: Option<Context>,
    /// Paths of the requests in flight, by token.
    in_flight: HashMap<u64, PathBuf>,
    tokens: u64,
}

impl<'a> Removal<'a> {
    fn new(session: &'a Session, location: &'a Location, path: &'a Path, options: &'a Options) -> Self {
        let (batch, in_flight) = (Batch::default(), HashMap::new());
        Self { session, location, path, options, batch, context: None, in_flight, tokens: 0 }
    }

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
        self.wait_for_all()?;
        // If something is left, the directory is not empty, and why is known.
        std::mem::take(&mut self.batch).finish()?;
        self.removed(Path::new(""), self.session.remove_dir(self.path))
    }

    /// Submits a request for something in the directory. Waits only while too many are in flight.
    fn begin(&mut self, below: &Path, operation: fn(PathBuf) -> PathOperation) -> Result<(), Failure> {
        while self.in_flight.len() >= REQUESTS_IN_FLIGHT {
            self.wait()?;
        }
        self.tokens += 1;
        let (token, operation) = (self.tokens, operation(self.path.join(below)));
        let context = match &mut self.context {
            Some(context) => Ok(context),
            none => self.session.context(REQUESTS_IN_FLIGHT).map(|context| none.insert(context)),
        };
        let submitted = context.and_then(|context| {
            let submitted = context.submit_path(operation, SubmitOptions::default(), token);
            submitted.map(drop).map_err(|rejected| rejected.error)
        });
        submitted.map_err(|error| self.failed_at(below, &error))?;
        self.in_flight.insert(token, below.to_owned());
        Ok(())
    }

    /// Waits for completions.
    fn wait(&mut self) -> Result<(), Failure> {
        let Some(context) = &mut self.context else { return Ok(()) };
        let waited = remote::wait(context, None);
        let ended: Vec<_> = std::iter::from_fn(|| context.next()).collect();
        waited.map_err(|error| self.failed_at(Path::new(""), &error))?;
        for completion in ended {
            let Some(below) = self.in_flight.remove(&completion.token) else { continue };
            let removed = self.removed(&below, completion.result.map(drop));
            self.batch.note(removed)?;
        }
        Ok(())
    }

    fn wait_for_all(&mut self) -> Result<(), Failure> {
        while !self.in_flight.is_empty() {
            self.wait()?;
        }
        Ok(())
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
            self.begin(below, |path| PathOperation::Unlink { path })?;
        }
        Ok(true)
    }

    fn left(&mut self, below: &Path, _: usize) -> Result<(), Failure> {
        // It has to be empty.
        self.wait_for_all()?;
        self.begin(below, |path| PathOperation::Rmdir { path })
    }

    fn failed(&mut self, failure: Failure) -> Result<(), Failure> {
        self.batch.note(Err(failure))
    }
}
