//! `raio key`: this client's key, and the keys of the servers that it trusts.

mod own;
mod trust;

use clap::{Args, Subcommand};

use crate::failure::Failure;
use crate::global::Global;

#[derive(Args, Debug)]
pub struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make this client's key, and print its public key
    New,
    /// Print the public key of this client's key
    Show,
    /// Connect to a server, show its key, and trust it from now on
    Trust(trust::Options),
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let directory = global.key_directory().ok_or_else(|| {
        Failure::usage("There is neither $RAIO_KEYS nor $HOME. Say where the keys are with --keys DIRECTORY.")
    })?;
    match &options.command {
        Command::New => own::make(&directory),
        Command::Show => own::show(&directory),
        Command::Trust(options) => trust::run(&directory, options),
    }
}
