//! `raio mv`: renames files and directories within an export.

use std::ffi::OsString;

use clap::{Args, ValueHint};

use crate::batch::Batch;
use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::place::Sessions;

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// What to rename, and at last its new name, or a directory to move it into
    #[arg(required = true, num_args = 2.., value_name = "PATH", value_hint = ValueHint::AnyPath)]
    paths: Vec<OsString>,
    /// Replace nothing: fail if the new name is taken
    #[arg(short, long)]
    no_replace: bool,
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let sessions = Sessions::new(global);
    let mut locations = options.paths.iter().map(Location::parse).collect::<Result<Vec<_>, _>>()?;
    let to = locations.pop().ok_or_else(|| Failure::usage("There is no new name."))?;
    let is_directory = sessions.is_directory(&to)?;
    Batch::each(&locations, |from| {
        sessions.check_same_server(from, &to, "Copy with `raio cp -r`, and remove the original.")?;
        let to = to.for_source(from, is_directory, locations.len() > 1)?;
        let ((session, old), (_, new)) = (sessions.at(from)?, sessions.at(&to)?);
        let moved = match options.no_replace {
            true => session.rename_no_replace(old, new),
            false => session.rename(old, new),
        };
        moved.map_err(|error| Failure::remote(format!("Cannot rename {from} to {to}"), &error))
    })
}
