//! `raio mkdir`: creates directories on a server.

use std::ffi::OsString;
use std::path::Path;

use clap::{Args, ValueHint};
use raio::{Attributes, Session};

use crate::batch::Batch;
use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::place::Sessions;

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// Directories to create on a server
    #[arg(required = true, value_name = "PATH", value_hint = ValueHint::DirPath)]
    paths: Vec<OsString>,
    /// Create those above, too, and take those that are there
    #[arg(short, long)]
    parents: bool,
    /// Permissions of the new directory, in octal [default: 777, less the server's umask]
    #[arg(short, long, value_name = "MODE", value_parser = mode)]
    mode: Option<u32>,
}

/// Permissions in octal.
fn mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|&mode| mode <= 0o777)
        .ok_or_else(|| format!("{text:?} are no permissions. Write three octal digits, such as 755."))
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let sessions = Sessions::new(global);
    Batch::each(&options.paths, |path| {
        let location = Location::parse(path)?;
        let (session, path) = sessions.at(&location)?;
        create(&session, path, options.mode, options.parents)
            .map_err(|error| Failure::remote(format!("Cannot create {location}"), &error))
    })
}

/// With `parents` those above, too, but for the mode.
fn create(session: &Session, path: &Path, mode: Option<u32>, parents: bool) -> Result<(), raio::Error> {
    match session.create_dir(path, mode.unwrap_or(0o777)) {
        Err(error) if parents && error.errno() == libc::EEXIST => {
            let is_directory = session.metadata(path)?.mode.get() & libc::S_IFMT == libc::S_IFDIR;
            return if is_directory { Ok(()) } else { Err(error) };
        }
        Err(error) if parents && error.errno() == libc::ENOENT => {
            // An export is not created, so its own path ends this.
            let Some(above) = path.parent().filter(|above| above.components().count() > 2) else {
                return Err(error);
            };
            create(session, above, None, true)?;
            return create(session, path, mode, true);
        }
        created => created?,
    }
    match mode {
        // The umask is not for those who say what they want.
        Some(mode) => session.set_attributes(path, &Attributes { mode: Some(mode), ..Attributes::default() }),
        None => Ok(()),
    }
}
