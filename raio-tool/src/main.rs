//! raio: what a client's user does now and then. So far keys: `raio key`.
//!
//! Exit codes: 0 done, 1 not done, 2 the command line makes no sense.

#![deny(unsafe_code)]

mod failure;
mod own_key;
mod trust;
mod tuning;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use raio_transport::key_directory::KeyDirectory;

use failure::Failure;

/// Keys for connections to raio servers.
#[derive(Debug, Parser)]
#[command(name = "raio", version, after_help = "See raio(1) for more.")]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// This client's key, and the keys of the servers that it trusts
    Key(KeyOptions),
}

#[derive(Args, Debug)]
struct KeyOptions {
    /// Where the keys are [default: $RAIO_KEYS, else $XDG_CONFIG_HOME/raio, else ~/.config/raio]
    #[arg(long, value_name = "DIRECTORY", global = true)]
    keys: Option<PathBuf>,
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Make this client's key, and print its public key
    New,
    /// Print the public key of this client's key
    Show,
    /// Connect to a server, show its key, and trust it from now on
    Trust(trust::Options),
}

fn main() -> ExitCode {
    let Command::Key(options) = Options::parse().command;
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("raio: {failure}");
            failure.exit_code()
        }
    }
}

fn run(options: KeyOptions) -> Result<(), Failure> {
    let directory = options.keys.map(KeyDirectory::new).or_else(KeyDirectory::from_environment);
    let directory = directory.ok_or_else(|| {
        Failure::usage("There is neither $RAIO_KEYS nor $HOME. Say where the keys are with --keys DIRECTORY.")
    })?;
    match options.command {
        KeyCommand::New => own_key::make(&directory),
        KeyCommand::Show => own_key::show(&directory),
        KeyCommand::Trust(options) => trust::run(&directory, &options),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, clap::Error> {
        Options::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_directory_may_be_given_before_and_after_what_is_to_be_done() {
        for line in ["raio key new --keys /k", "raio key --keys /k show", "raio key trust raio://h --keys /k"]
        {
            let Command::Key(options) = parse(line).unwrap().command;
            assert_eq!(options.keys, Some("/k".into()), "{line}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let key = "ed25519:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
        assert!(parse(&format!("raio key trust raio://h --key {key} --replace")).is_ok());
        for line in [
            "raio",
            "raio key",
            "raio key old",
            "raio key new x",
            "raio key trust",
            "raio key trust raio://h --key AAAA",
            &format!("raio key trust raio://h --yes --key {key}"),
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
