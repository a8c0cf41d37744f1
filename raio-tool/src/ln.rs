//! `raio ln`: gives a file another name, or creates a symbolic link, on a server.

use std::ffi::OsString;

use clap::{Args, ValueHint};

use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::place::Sessions;

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// A file of the server; with -s any text, which the link has as it is
    #[arg(value_name = "TARGET", value_hint = ValueHint::AnyPath)]
    target: OsString,
    /// The new name, or a directory for it
    #[arg(value_name = "LINK", value_hint = ValueHint::AnyPath)]
    link: OsString,
    /// Create a symbolic link. The server follows it if it stays in the export
    #[arg(short, long)]
    symbolic: bool,
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let sessions = Sessions::new(global);
    let link = Location::parse(&options.link)?;
    let is_directory = sessions.is_directory(&link)?;
    if options.symbolic {
        let named = Location::Local(options.target.clone().into());
        let link = link.for_source(&named, is_directory, false)?;
        let (session, path) = sessions.at(&link)?;
        return session
            .symlink(&options.target, path)
            .map_err(|error| Failure::remote(format!("Cannot create the link {link}"), &error));
    }
    let original = Location::parse(&options.target)?;
    sessions.check_same_server(&original, &link, "Copy with `raio cp`.")?;
    let link = link.for_source(&original, is_directory, false)?;
    let ((session, old), (_, new)) = (sessions.at(&original)?, sessions.at(&link)?);
    session
        .hard_link(old, new)
        .map_err(|error| Failure::remote(format!("Cannot link {original} as {link}"), &error))
}
