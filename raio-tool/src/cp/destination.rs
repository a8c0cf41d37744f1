//! Opens where a copy goes: a file beside its destination that takes its place at the end, or the destination
//! itself.

use std::path::Path;

use raio::Session;

use super::Options;
use crate::copy::{Destination, state_file};
use crate::failure::{Failure, Kind};
use crate::global::Global;
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::place::{
    Facts, LocalFile, LocalPartial, Place, RemoteFile, RemotePartial, Sessions, Sort, Stream, beside,
    examine, facts_of,
};

/// Opens where a copy goes. Nothing that was there is changed yet.
pub fn open(
    sessions: &Sessions<'_>,
    options: &Options,
    from: &Location,
    to: &Location,
    source: &Facts,
    interrupt: &Interrupt,
) -> Result<Destination, Failure> {
    let mode = source.mode & 0o777;
    let tag = tag(sessions.global(), from, to);
    let in_place =
        |place, facts, journal| Destination::in_place(place, facts, journal, options.destination_is_zero);
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
                Some(Sort::Stream) => in_place(Box::new(Stream::open(path, interrupt.clone())?), None, None),
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
                    let partial = LocalPartial::open(path, &tag, mode)?;
                    Destination::partial(Box::new(partial), facts, journal)
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
            let facts = if let Found::File(facts) = found { Some(facts) } else { None };
            Destination::partial(Box::new(partial), facts, journal)
        }
    })
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
