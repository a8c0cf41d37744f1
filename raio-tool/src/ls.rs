//! `raio ls`: what is in directories of a server, and which exports it has.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};
use raio::{DirEntry, FileStatus, Session};
use serde::Serialize;

use crate::batch::Batch;
use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::output::{self, sort};
use crate::place::Sessions;
use crate::walk::Walk;

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// Directories and files of a server; a server's URL alone is the list of its exports [default:
    /// $RAIO_URL]
    #[arg(value_name = "PATH", value_hint = ValueHint::AnyPath)]
    paths: Vec<OsString>,
    /// Show type, permissions, size and time, too
    #[arg(short, long)]
    long: bool,
    /// Show what is in directories beneath, too
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Accepted, as names that begin with a dot are always shown
    #[arg(short, long)]
    all: bool,
}

/// An entry, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    path: String,
    name: String,
    #[serde(rename = "type")]
    sort: &'static str,
    /// Null if the server does not tell, as of exports that are files.
    size: Option<u64>,
    mode: Option<String>,
    modified_ns: Option<i64>,
    inode: u64,
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let default = [OsString::from(":/")];
    let paths = if options.paths.is_empty() { &default[..] } else { &options.paths };
    let sessions = Sessions::new(global);
    Batch::each(paths, |path| {
        let location = Location::parse_directory(path)?;
        let (session, path) = sessions.at(&location)?;
        let is_titled = paths.len() > 1 || options.recursive;
        list(global, options, &session, &location, path, is_titled)
    })
}

/// Lists one path, and with `--recursive` the directories beneath it.
fn list(
    global: &Global,
    options: &Options,
    session: &Session,
    location: &Location,
    path: &Path,
    is_titled: bool,
) -> Result<(), Failure> {
    let failed = |error| Failure::remote(format!("Cannot examine {location}"), &error);
    let status = session.metadata(path).map_err(failed)?;
    let walk = Walk { session, location, path };
    if status.mode.get() & libc::S_IFMT != libc::S_IFDIR {
        let entry = entry_of(path, &session.symlink_metadata(path).map_err(failed)?);
        return show(global, options, location, &entry, &location.to_bytes());
    }
    let mut rest = vec![PathBuf::new()];
    let mut batch = Batch::default();
    while let Some(below) = rest.pop() {
        let entries = match walk.entries(&below) {
            Ok(entries) => entries,
            Err(failure) => {
                batch.note(Err(failure))?;
                continue;
            }
        };
        let directory = location.join(&below);
        if is_titled && !global.json {
            output::print_bytes(&[output::visible(&directory.to_bytes()).as_bytes(), b":\n"].concat())?;
        }
        for entry in &entries {
            let path = directory.join(Path::new(&entry.name));
            show(global, options, &path, entry, entry.name.as_bytes())?;
        }
        if is_titled && !global.json && options.recursive {
            output::print("\n")?;
        }
        if options.recursive {
            let directories = entries.iter().rev().filter(|entry| entry.is_dir());
            rest.extend(directories.map(|entry| below.join(&entry.name)));
        }
    }
    batch.finish()
}

/// An entry for a path that is no directory.
fn entry_of(path: &Path, status: &FileStatus) -> DirEntry {
    DirEntry {
        name: path.file_name().unwrap_or_default().to_owned(),
        mode: status.mode.get(),
        size: status.size.get(),
        modified_ns: status.modified_ns.get(),
        inode: status.inode.get(),
        has_status: true,
    }
}

fn show(
    global: &Global,
    options: &Options,
    path: &Location,
    entry: &DirEntry,
    name: &[u8],
) -> Result<(), Failure> {
    if global.json {
        let known = entry.has_status;
        return output::print_json(&Report {
            path: path.to_string(),
            name: String::from_utf8_lossy(entry.name.as_bytes()).into_owned(),
            sort: sort(entry.mode),
            size: known.then_some(entry.size),
            mode: known.then(|| format!("{:04o}", entry.mode & 0o7777)),
            modified_ns: known.then_some(entry.modified_ns),
            inode: entry.inode,
        });
    }
    let name = output::visible(name);
    match options.long {
        true => output::print(&format!("{} {name}\n", details(global, entry))),
        false => output::print(&format!("{name}\n")),
    }
}

/// Type and permissions, size and time.
fn details(global: &Global, entry: &DirEntry) -> String {
    let letter = match sort(entry.mode) {
        "directory" => 'd',
        "symlink" => 'l',
        "block" => 'b',
        "character" => 'c',
        "fifo" => 'p',
        "socket" => 's',
        _ => '-',
    };
    if !entry.has_status {
        return format!("{letter}????????? {:>10} {:20}", "?", "?");
    }
    let mode: String = (0..9)
        .map(|at| if entry.mode >> (8 - at) & 1 == 1 { ['r', 'w', 'x'][at % 3] } else { '-' })
        .collect();
    let size = output::size(entry.size, global.bytes);
    format!("{letter}{mode} {size:>10} {}", output::second(entry.modified_ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_long_form_has_type_permissions_size_and_time() {
        let entry = DirEntry {
            name: "f".into(),
            mode: libc::S_IFREG | 0o751,
            size: 1536,
            modified_ns: 1_000_000_000_000_000_001,
            inode: 1,
            has_status: true,
        };
        let global = Global::default();
        assert_eq!(details(&global, &entry), "-rwxr-x--x    1.5 KiB 2001-09-09T01:46:40Z");
        let unknown = DirEntry { has_status: false, mode: libc::S_IFDIR, ..entry };
        assert!(details(&global, &unknown).starts_with("d????????? "));
    }
}
