//! `raio df`: the room of the file systems that a server exports.

use std::ffi::OsString;

use clap::{Args, ValueHint};
use serde::Serialize;

use crate::batch::Batch;
use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::output;
use crate::place::Sessions;

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// Paths on a server
    #[arg(required = true, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    paths: Vec<OsString>,
}

/// The file system that a path is on, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    path: String,
    size: u64,
    used: u64,
    /// Of the free bytes those that the server may use.
    available: u64,
    inodes: u64,
    inodes_free: u64,
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let sessions = Sessions::new(global);
    if !global.json {
        output::print("      size       used  available  path\n")?;
    }
    Batch::each(&options.paths, |path| {
        let location = Location::parse(path)?;
        let (session, path) = sessions.at(&location)?;
        let it = session.statfs(path);
        let it = it.map_err(|error| Failure::remote(format!("Cannot examine {location}"), &error))?;
        let bytes = |blocks: u64| blocks.saturating_mul(it.block_bytes.get());
        let report = Report {
            path: location.to_string(),
            size: bytes(it.blocks.get()),
            used: bytes(it.blocks.get().saturating_sub(it.blocks_free.get())),
            available: bytes(it.blocks_available.get()),
            inodes: it.files.get(),
            inodes_free: it.files_free.get(),
        };
        if global.json {
            return output::print_json(&report);
        }
        let size = |bytes| output::size(bytes, global.bytes);
        let (all, used, available) = (size(report.size), size(report.used), size(report.available));
        let path = output::visible(&location.to_bytes());
        output::print(&format!("{all:>10} {used:>10} {available:>10}  {path}\n"))
    })
}
