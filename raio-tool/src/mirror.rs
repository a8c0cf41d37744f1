//! Makes a tree like another one: what `cp -r` and `sync` have in common.
//!
//! Threads share a queue of directories and groups of files. Each has its own connections to both trees, with
//! many requests for small files, directories and attributes in flight (a [`Hand`]). A directory is listed,
//! on both sides if they are compared, and its entries are merged by name: so no more is in memory than the
//! directories that are being worked on. Permissions and times of a directory are set when everything in it
//! was done.

mod directory;
mod file;
mod hand;
mod node;
mod plan;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use raio_transport::sync::lock;

use self::hand::Hand;
use self::node::Node;
use self::plan::count;
use crate::failure::{Failure, Kind};
use crate::global::Global;
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::output;
use crate::place::Sessions;
use crate::progress::Progress;
use crate::queue::Queue;
use crate::tree::{self, Access, Tree, TreeEntry};

pub use self::plan::{Action, Comparison, Counts, Deed, Plan};

/// A tree that is made like another one.
pub struct Mirror<'a> {
    /// Options of all commands.
    pub global: &'a Global,
    /// What is to be done.
    pub plan: &'a Plan,
    /// The source.
    pub from: &'a Location,
    /// The destination.
    pub to: &'a Location,
    /// The destination may be a link to a directory, as the user has named it.
    pub is_to_followed: bool,
    /// How far it is.
    pub progress: &'a Arc<Progress>,
    /// Ctrl-C.
    pub interrupt: &'a Interrupt,
}

/// The source and the destination.
type BothTrees = (Box<dyn Tree>, Box<dyn Tree>);

/// What threads share.
struct Run<'a> {
    mirror: &'a Mirror<'a>,
    /// To the source and to the destination.
    access: [Access; 2],
    plan: &'a Plan,
    counts: &'a Counts,
    queue: Queue<Item>,
    /// A copy is not what was copied.
    is_unverified: AtomicBool,
    /// Why all was stopped.
    end: Mutex<Option<Failure>>,
}

/// What a thread does next.
enum Item {
    Directory(Arc<Node>),
    /// Files of a directory, and what the destination has in their places.
    Files(Arc<Node>, Vec<(TreeEntry, Option<TreeEntry>)>),
    /// A file that is too large to be read and written as a whole.
    Large(Arc<Node>, TreeEntry),
}

impl Mirror<'_> {
    /// Does it. Failures of single files are said and counted, and the others go on.
    pub fn run(&self, counts: &Counts) -> Result<(), Failure> {
        self.check_apart()?;
        let access = self.access();
        let (mut source, mut destination) = self.open(&access)?;
        let root = Path::new("");
        let from = source.entry(root, true)?.ok_or_else(|| {
            Failure::of(Kind::NotFound, format!("Cannot open {}: it does not exist.", self.from))
        })?;
        let to = destination.entry(root, self.is_to_followed)?;
        if !from.is_dir() || to.as_ref().is_some_and(|to| !to.is_dir()) {
            let wrong = if from.is_dir() { self.to } else { self.from };
            return Err(Failure::usage(format!(
                "{wrong} is not a directory. Name one, or copy with raio cp."
            )));
        }
        if to.as_ref().is_some_and(|to| to.inode == from.inode && to.modified_ns == from.modified_ns) {
            return Err(Failure::usage(format!("{} and {} are the same directory.", self.from, self.to)));
        }
        let run = Run {
            mirror: self,
            access,
            plan: self.plan,
            counts,
            queue: Queue::new(Item::Directory(Node::root(from, to))),
            is_unverified: AtomicBool::new(false),
            end: Mutex::new(None),
        };
        std::thread::scope(|scope| {
            for _ in 1..self.plan.threads {
                scope.spawn(|| run.thread(None));
            }
            run.thread(Some((source, destination)));
        });
        self.progress.finish();
        let end = lock(&run.end).take();
        let failed = counts.failed.load(Ordering::Relaxed);
        match end {
            Some(failure) => Err(failure),
            None if failed > 0 => {
                let is_unverified = run.is_unverified.load(Ordering::Relaxed);
                let kind = if is_unverified { Kind::Unverified } else { Kind::Other };
                Err(Failure::of(kind, format!("{failed} of {} have failed.", self.from)))
            }
            None => Ok(()),
        }
    }

    /// Refuses trees of which one is in the other: such a copy would have no end.
    fn check_apart(&self) -> Result<(), Failure> {
        let resolved = |path: &Path| {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
            let there = path.ancestors().find_map(|above| Some((std::fs::canonicalize(above).ok()?, above)));
            there.map_or_else(
                || path.clone(),
                |(real, above)| {
                    path.strip_prefix(above).map_or_else(|_| path.clone(), |rest| real.join(rest))
                },
            )
        };
        let (from, to) = match (self.from, self.to) {
            (Location::Local(from), Location::Local(to)) => (resolved(from), resolved(to)),
            (Location::Remote { path: from, .. }, Location::Remote { path: to, .. })
                if Sessions::new(self.global).is_same_server(self.from, self.to)? =>
            {
                (from.clone(), to.clone())
            }
            _ => return Ok(()),
        };
        if to.starts_with(&from) || from.starts_with(&to) {
            let text =
                format!("Of {} and {} one is in the other. Name another directory.", self.from, self.to);
            return Err(Failure::usage(text));
        }
        Ok(())
    }

    /// How source and destination are used. The names of partial files are the same whenever this is done
    /// again.
    fn access(&self) -> [Access; 2] {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let subject = [&*self.from.to_bytes(), b"\n", &*self.to.to_bytes(), b"\n", host.as_bytes()].concat();
        let tag = blake3::hash(&subject).to_hex()[..16].to_owned();
        let source = Access { follows: self.plan.follows, is_root_followed: true, tag };
        let is_root_followed = self.is_to_followed;
        [source.clone(), Access { follows: false, is_root_followed, ..source }]
    }

    /// A thread's way to both trees.
    fn open(&self, [source, destination]: &[Access; 2]) -> Result<BothTrees, Failure> {
        Ok((tree::open(self.global, self.from, source)?, tree::open(self.global, self.to, destination)?))
    }
}

impl Run<'_> {
    fn thread(&self, trees: Option<BothTrees>) {
        let mirror = self.mirror;
        let opened = trees.map_or_else(|| mirror.open(&self.access), Ok);
        let ended = opened.and_then(|(source, destination)| Hand::new(self, source, destination).work());
        if let Err(failure) = ended {
            self.stop(failure);
        }
    }

    /// Ends all, because of this.
    fn stop(&self, failure: Failure) {
        lock(&self.end).get_or_insert(failure);
        self.queue.stop();
    }

    /// Takes note of how something has ended. Returns whether it was done.
    fn note(&self, ended: Result<(), Failure>) -> Result<bool, Failure> {
        match ended {
            Ok(()) => Ok(true),
            Err(failure) if failure.is_final() || self.plan.fails_fast => Err(failure),
            Err(failure) => {
                count(&self.counts.failed);
                self.is_unverified.fetch_or(failure.kind() == Kind::Unverified, Ordering::Relaxed);
                output::say(&format!("raio: {failure}"));
                Ok(false)
            }
        }
    }

    /// Something is about to be done: a dry run tells of it. Returns whether to do it.
    fn begins(&self, action: Deed, path: &Path, bytes: Option<u64>) -> Result<bool, Failure> {
        if self.plan.is_dry {
            // The directories themselves.
            let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
            if self.mirror.global.json {
                output::print_json(&Action { action, path: path.to_string_lossy().into_owned(), bytes })?;
            } else {
                let word = format!("{action:?}").to_lowercase();
                let path = output::visible(path.as_os_str().as_encoded_bytes());
                output::print(&format!("{word:6} {path}\n"))?;
            }
        }
        Ok(!self.plan.is_dry)
    }

    fn is_excluded(&self, path: &Path) -> bool {
        self.plan.exclude.iter().any(|pattern| pattern.matches(path))
    }
}
