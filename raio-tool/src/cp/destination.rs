//! Where a copy goes: a file beside its destination that takes its place at the end, or the destination
//! itself.

use std::path::{Path, PathBuf};

use raio::Session;

use super::Options;
use crate::failure::{Failure, Kind};
use crate::global::Global;
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::place::{
    Facts, LocalFile, LocalPartial, PartialFile, Place, RemoteFile, RemotePartial, Sessions, Sort, Stream,
    beside, examine, facts_of,
};

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
    /// Opens it. Nothing that was there is changed yet.
    pub fn open(
        sessions: &Sessions<'_>,
        options: &Options,
        from: &Location,
        to: &Location,
        source: &Facts,
        interrupt: &Interrupt,
    ) -> Result<Self, Failure> {
        let mode = source.mode & 0o777;
        let tag = tag(sessions.global(), from, to);
        let in_place = |place, facts, journal| Self {
            target: Target::InPlace(place),
            facts,
            journal,
            is_zero: options.destination_is_zero,
        };
        Ok(match to {
            Location::Stream => in_place(Box::new(Stream::output(interrupt.clone())), None, None),
            Location::Null => in_place(Box::new(Stream::null()), None, None),
            Location::Local(path) => {
                // A link stays, and what it leads to is replaced.
                let path = &std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
                let facts = examine(path);
                if facts.is_none() && path.starts_with("/dev") && !path.starts_with("/dev/shm") {
                    let text = format!("There is no device {to}. Check its name; `lsblk` lists disks.");
                    return Err(Failure::of(Kind::NotFound, text));
                }
                let journal = Some(beside(path, &format!(".partial-{tag}.journal")));
                match facts.map(|facts| facts.sort) {
                    Some(Sort::Stream) => {
                        in_place(Box::new(Stream::open(path, interrupt.clone())?), None, None)
                    }
                    Some(Sort::Device) => {
                        let file = LocalFile::open_in_place(path, mode)?;
                        let facts = file.facts()?;
                        in_place(Box::new(file), Some(facts), Some(state_file(&tag)))
                    }
                    _ if options.inplace => {
                        let file = LocalFile::open_in_place(path, mode)?;
                        let facts = file.facts()?;
                        in_place(Box::new(file), Some(facts), journal)
                    }
                    _ => {
                        let target = Target::Partial(Box::new(LocalPartial::open(path, &tag, mode)?));
                        Self { target, facts, journal, is_zero: false }
                    }
                }
            }
            Location::Remote { .. } => {
                let (session, path) = sessions.at(to)?;
                let journal = Some(state_file(&tag));
                let found = found(&session, path);
                if options.inplace || found == Found::Other {
                    let flags = libc::O_RDWR | libc::O_CREAT;
                    let file = RemoteFile::open_in(session, path, to.to_string(), flags, mode)?;
                    let facts = file.facts()?;
                    return Ok(in_place(Box::new(file), Some(facts), journal));
                }
                let partial = RemotePartial::open(session, path, to.to_string(), &tag, mode)?;
                let target = Target::Partial(Box::new(partial));
                let facts = if let Found::File(facts) = found { Some(facts) } else { None };
                Self { target, facts, journal, is_zero: false }
            }
        })
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

/// What is at a path of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing, and there may be a file.
    Nothing,
    /// A regular file that can be replaced.
    File(Facts),
    /// Something that has to be opened: a device, an export itself, a link, which stays, and everything on
    /// servers of before 0.3.
    Other,
}

/// What is at a path of a server.
pub fn found(session: &Session, path: &Path) -> Found {
    // The root, and the name of the export.
    if path.components().count() <= 2 {
        return Found::Other;
    }
    match session.symlink_metadata(path).map(|status| facts_of(&status)) {
        Ok(facts) if facts.mode & libc::S_IFMT == libc::S_IFREG => Found::File(facts),
        Err(error) if error.errno() == libc::ENOENT => Found::Nothing,
        _ => Found::Other,
    }
}

/// A name for a copy, by which it finds its files again.
fn tag(global: &Global, from: &Location, to: &Location) -> String {
    let absolute = |location: &Location| match location {
        Location::Local(path) => Location::Local(std::path::absolute(path).unwrap_or_else(|_| path.clone())),
        other => other.clone(),
    };
    let url = global.url().unwrap_or_default();
    // Two machines may have sources of the same name.
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let subject = format!("{}\n{}\n{url}\n{host}", absolute(from), absolute(to));
    blake3::hash(subject.as_bytes()).to_hex()[..8].to_owned()
}

/// The journal of a copy to a device or a server.
fn state_file(tag: &str) -> PathBuf {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
    let directory = state.or_else(home).unwrap_or_else(std::env::temp_dir);
    directory.join("raio").join(format!("cp-{tag}.journal"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_finds_its_files_again_wherever_it_is_started() {
        let tag = |from: &str, to: &str, url| {
            let global = Global { url, ..Global::default() };
            tag(&global, &from.parse().unwrap(), &to.parse().unwrap())
        };
        let here = std::env::current_dir().unwrap();
        let absolute = here.join("f").display().to_string();
        assert_eq!(tag("f", ":/e/f", None), tag(&absolute, ":/e/f", None));
        let others =
            [tag("f", ":/e/g", None), tag("g", ":/e/f", None), tag("f", ":/e/f", Some("raio://h".into()))];
        assert!(!others.contains(&tag("f", ":/e/f", None)));
    }
}
