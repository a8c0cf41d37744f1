//! `raio stat`: what is known of files.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;

use clap::{Args, ValueHint};
use jiff::Timestamp;
use serde::Serialize;

use crate::batch::Batch;
use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::output::{self, sort};
use crate::place::{RemoteFile, Sessions};

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// Files
    #[arg(required = true, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    paths: Vec<OsString>,
    /// Of symbolic links, show where they lead
    #[arg(short = 'L', long)]
    dereference: bool,
}

/// A file, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    path: String,
    #[serde(rename = "type")]
    sort: &'static str,
    size: u64,
    allocated_bytes: u64,
    /// Permissions, in octal.
    mode: String,
    links: u64,
    uid: u32,
    gid: u32,
    /// In nanoseconds since the epoch.
    accessed_ns: i128,
    modified_ns: i128,
    changed_ns: i128,
    io_bytes: u64,
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let sessions = Sessions::new(global);
    Batch::each(&options.paths, |path| {
        let location = Location::parse_directory(path)?;
        let report = examine(&sessions, &location, options.dereference)?;
        match global.json {
            true => output::print_json(&report),
            false => output::print(&report.text(global.bytes)),
        }
    })
}

fn examine(sessions: &Sessions<'_>, location: &Location, follows: bool) -> Result<Report, Failure> {
    let path = location.to_string();
    match location {
        Location::Local(local) => {
            let failed = |error| Failure::io(format!("Cannot examine {path}"), &error);
            let it = if follows { std::fs::metadata(local) } else { std::fs::symlink_metadata(local) };
            let it = it.map_err(failed)?;
            let ns = |seconds: i64, ns: i64| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
            Ok(Report {
                sort: sort(it.mode()),
                size: it.len(),
                allocated_bytes: it.blocks() * 512,
                mode: format!("{:04o}", it.mode() & 0o7777),
                links: it.nlink(),
                uid: it.uid(),
                gid: it.gid(),
                accessed_ns: ns(it.atime(), it.atime_nsec()),
                modified_ns: ns(it.mtime(), it.mtime_nsec()),
                changed_ns: ns(it.ctime(), it.ctime_nsec()),
                io_bytes: it.blksize(),
                path,
            })
        }
        _ => {
            let (session, remote) = sessions.at(location)?;
            let status = match follows {
                true => session.metadata(remote),
                false => session.symlink_metadata(remote),
            };
            let it = match status {
                // A server of before 0.3.
                Err(error) if error.errno() == libc::EOPNOTSUPP => {
                    let file = RemoteFile::open_in(session, remote, path.clone(), libc::O_RDONLY, 0)?;
                    file.status()?
                }
                it => it.map_err(|error| Failure::remote(format!("Cannot examine {path}"), &error))?,
            };
            let mode = it.mode.get();
            Ok(Report {
                path,
                sort: sort(mode),
                size: it.size.get(),
                allocated_bytes: it.blocks.get() * 512,
                mode: format!("{:04o}", mode & 0o7777),
                links: it.links.get().into(),
                uid: it.uid.get(),
                gid: it.gid.get(),
                accessed_ns: it.accessed_ns.get().into(),
                modified_ns: it.modified_ns.get().into(),
                changed_ns: it.changed_ns.get().into(),
                io_bytes: it.block_bytes.get().into(),
            })
        }
    }
}

impl Report {
    fn text(&self, is_exact: bool) -> String {
        let time = |ns: i128| match Timestamp::from_nanosecond(ns) {
            Ok(time) => time.to_string(),
            Err(_) => format!("{ns} ns"),
        };
        format!(
            "{}\n  {}, {} ({} allocated)\n  mode {}, owner {}, group {}, {} links\n  accessed {}\n  modified \
             {}\n  changed  {}\n",
            output::visible(self.path.as_bytes()),
            self.sort,
            output::size(self.size, is_exact),
            output::size(self.allocated_bytes, is_exact),
            self.mode,
            self.uid,
            self.gid,
            self.links,
            time(self.accessed_ns),
            time(self.modified_ns),
            time(self.changed_ns)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_file_is_described_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        std::fs::write(&path, [1; 1536]).unwrap();
        let global = Global::default();
        let sessions = Sessions::new(&global);
        let report = examine(&sessions, &Location::Local(path.clone()), false).unwrap();
        assert_eq!((report.sort, report.size, report.links), ("file", 1536, 1));
        let text = report.text(false);
        assert!(text.contains("file, 1.5 KiB (") && text.contains("modified 20"), "{text}");
        let link = directory.path().join("l");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let link = Location::Local(link);
        assert_eq!(examine(&sessions, &link, false).unwrap().sort, "symlink");
        assert_eq!(examine(&sessions, &link, true).unwrap().sort, "file");
        let missing = examine(&sessions, &"/no/such/file".parse().unwrap(), false).unwrap_err();
        assert_eq!(missing.kind(), crate::failure::Kind::NotFound);
    }
}
