//! The command line: every command with its options. The manual pages and the completions are made from it.

use std::fmt::Write;
use std::path::PathBuf;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;

use crate::global::Global;
use crate::{
    admin, bench, cat, cmp, cp, df, digest, discard, doctor, du, find, info, key, ln, load, ls, mkdir, mv,
};
use crate::{ping, rm, stat, sync, top, truncate};

/// Copies, examines and measures files that raio servers export.
#[derive(Debug, Parser)]
#[command(name = "raio", version, max_term_width = 100)]
#[command(after_long_help = flowing(include_str!("help/raio.txt")))]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Copy files between this machine and servers
    #[command(after_long_help = flowing(include_str!("help/cp.txt")))]
    Cp(cp::Options),
    /// Make a directory like another one, by copying what differs
    #[command(after_long_help = flowing(include_str!("help/sync.txt")))]
    Sync(sync::Options),
    /// Write files to standard output
    #[command(after_long_help = flowing(include_str!("help/cat.txt")))]
    Cat(cat::Options),
    /// Show what is known of files
    #[command(after_long_help = flowing(include_str!("help/stat.txt")))]
    Stat(stat::Options),
    /// List directories of a server, or its exports
    #[command(after_long_help = flowing(include_str!("help/ls.txt")))]
    Ls(ls::Options),
    /// Search directories on a server recursively
    #[command(after_long_help = flowing(include_str!("help/find.txt")))]
    Find(find::Options),
    /// Show the total sizes of directory trees on a server
    #[command(after_long_help = flowing(include_str!("help/du.txt")))]
    Du(du::Options),
    /// Show the free space of file systems on a server
    #[command(after_long_help = flowing(include_str!("help/df.txt")))]
    Df(df::Options),
    /// Remove files and directories of a server
    #[command(after_long_help = flowing(include_str!("help/rm.txt")))]
    Rm(rm::Options),
    /// Create directories on a server
    #[command(after_long_help = flowing(include_str!("help/mkdir.txt")))]
    Mkdir(mkdir::Options),
    /// Rename files and directories within an export
    #[command(after_long_help = flowing(include_str!("help/mv.txt")))]
    Mv(mv::Options),
    /// Give a file of a server another name, or create a symbolic link
    #[command(after_long_help = flowing(include_str!("help/ln.txt")))]
    Ln(ln::Options),
    /// Make files of a server shorter or longer
    #[command(after_long_help = flowing(include_str!("help/truncate.txt")))]
    Truncate(truncate::Options),
    /// Compute the checksums of files
    #[command(after_long_help = flowing(include_str!("help/checksum.txt")))]
    Checksum(digest::Options),
    /// Compare two files, or two directories
    #[command(after_long_help = flowing(include_str!("help/cmp.txt")))]
    Cmp(cmp::Options),
    /// Discard (deallocate) a range of a file or device
    #[command(after_long_help = flowing(include_str!("help/discard.txt")))]
    Discard(discard::Options),
    /// Show what a server grants, and by which transport it is reached
    #[command(after_long_help = flowing(include_str!("help/info.txt")))]
    Info(info::Options),
    /// Measure how soon a server answers
    #[command(after_long_help = flowing(include_str!("help/ping.txt")))]
    Ping(ping::Options),
    /// Measure reads and writes by size and depth
    #[command(after_long_help = flowing(include_str!("help/bench.txt")))]
    Bench(bench::Options),
    /// Check this machine for problems with raio's features and performance
    #[command(after_long_help = flowing(include_str!("help/doctor.txt")))]
    Doctor(doctor::Options),
    /// Load a server with many sessions, and verify the data
    #[command(after_long_help = flowing(include_str!("help/load.txt")))]
    Load(load::Options),
    /// Make this client's key, and trust the keys of servers
    #[command(after_long_help = flowing(include_str!("help/key.txt")))]
    Key(key::Options),
    /// Show and change what a running server does
    #[command(after_long_help = flowing(include_str!("help/admin.txt")))]
    Admin(admin::Options),
    /// Show live what a running server does
    #[command(after_long_help = flowing(include_str!("help/top.txt")))]
    Top(top::Options),
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

/// The commands under headings, as the help of `raio` shows them.
const GROUPS: [(&str, &[&str]); 6] = [
    ("Copy", &["cp", "sync", "cat"]),
    (
        "Files and directories of a server",
        &["ls", "find", "stat", "du", "df", "mkdir", "mv", "ln", "rm", "truncate", "discard"],
    ),
    ("Compare", &["checksum", "cmp"]),
    ("Servers", &["info", "ping", "bench", "load", "doctor"]),
    ("Administration of a server on this machine", &["top", "admin"]),
    ("This client", &["key", "completions"]),
];

/// What the process's arguments say. Ends the process if they are wrong, or ask for help.
pub fn parse() -> Cli {
    let mut command = grouped(Cli::command());
    let matches = command.get_matches_mut();
    Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut command).exit())
}

/// The command with [`GROUPS`] in its help: clap has one heading for all commands.
fn grouped(command: clap::Command) -> clap::Command {
    let width = command.get_subcommands().map(|one| one.get_name().len()).max().unwrap_or(0);
    let header = *command.get_styles().get_header();
    let literal = *command.get_styles().get_literal();
    let mut text = String::new();
    for (heading, names) in GROUPS {
        let _ = writeln!(text, "{header}{heading}:{header:#}");
        for name in names {
            let about = command.find_subcommand(name).and_then(clap::Command::get_about);
            let about = about.map(ToString::to_string).unwrap_or_default();
            let _ = writeln!(text, "  {literal}{name}{literal:#}{:1$}  {about}", "", width - name.len());
        }
        text.push('\n');
    }
    let template = format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{text}{header}Options of all \
         commands:{header:#}\n{{options}}{{after-help}}"
    );
    command.help_template(template)
}

/// A text with one line for each paragraph, so that it is wrapped as the terminal is wide. Headings, which
/// end with a colon, and indented lines stay lines.
fn flowing(text: &str) -> String {
    let mut out = String::new();
    let mut before = "";
    for line in text.lines() {
        let is_first = before.is_empty();
        let goes_on = !is_first && !line.is_empty() && !line.starts_with(' ') && !before.starts_with(' ');
        let is_below_heading =
            before.ends_with(':') && out.ends_with(&format!("\n\n{before}")) || out == before;
        if !out.is_empty() {
            out.push(if goes_on && !is_below_heading { ' ' } else { '\n' });
        }
        out.push_str(line);
        before = line;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_a_heading_in_the_help() {
        let tool = Cli::command();
        let all = tool.get_subcommands().filter(|one| !one.is_hide_set()).map(clap::Command::get_name);
        let mut all: Vec<&str> = all.collect();
        let mut grouped: Vec<&str> = GROUPS.iter().flat_map(|(_, names)| names.iter().copied()).collect();
        all.sort_unstable();
        grouped.sort_unstable();
        assert_eq!(all, grouped, "on the left are the commands, on the right those of GROUPS");
    }

    #[test]
    fn paragraphs_are_lines_and_headings_and_displays_stay() {
        let text = "Title:\none\ntwo:\nthree\n\n  a\n  b\n\nNext:\nfour\nfive\n";
        assert_eq!(flowing(text), "Title:\none two: three\n\n  a\n  b\n\nNext:\nfour five");
    }
}
