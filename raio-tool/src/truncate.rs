//! `raio truncate`: makes files of a server shorter or longer.

use std::ffi::OsString;

use clap::{Args, ValueHint};
use raio::Attributes;
use raio_transport::size;

use crate::batch::Batch;
use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::place::Sessions;

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// Regular files of a server
    #[arg(required = true, value_name = "PATH", value_hint = ValueHint::FilePath)]
    paths: Vec<OsString>,
    /// How long they become. What is behind is lost; what is new reads as zeros
    #[arg(short, long, value_name = "SIZE", value_parser = size::parse)]
    size: u64,
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let sessions = Sessions::new(global);
    Batch::each(&options.paths, |path| {
        let location = Location::parse(path)?;
        let (session, path) = sessions.at(&location)?;
        let attributes = Attributes { size: Some(options.size), ..Attributes::default() };
        session
            .set_attributes(path, &attributes)
            .map_err(|error| Failure::remote(format!("Cannot set the size of {location}"), &error))
    })
}
