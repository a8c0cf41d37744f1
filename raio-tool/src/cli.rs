//! The command line: every command with its options. The manual pages and the completions are made from it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::global::Global;
use crate::{key, load};

/// Copies, examines and measures files that raio servers export.
#[derive(Debug, Parser)]
#[command(name = "raio", version, max_term_width = 100, after_long_help = include_str!("help/raio.txt"))]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Load a server with many sessions, and verify the data
    #[command(after_long_help = include_str!("help/load.txt"))]
    Load(load::Options),
    /// Make this client's key, and trust the keys of servers
    #[command(after_long_help = include_str!("help/key.txt"))]
    Key(key::Options),
    /// Print the completions of a shell
    Completions(CompletionOptions),
    /// Write the manual pages
    #[command(hide = true)]
    Man(ManualOptions),
}

/// What the command line of `raio completions` says.
#[derive(Args, Debug)]
pub struct CompletionOptions {
    /// The shell
    pub shell: Shell,
}

/// What the command line of `raio man` says.
#[derive(Args, Debug)]
pub struct ManualOptions {
    /// Where the pages are written
    pub directory: PathBuf,
}
