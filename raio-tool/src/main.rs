//! raio: the tool for files that raio servers export. [`cli`] has its commands, and docs/man its manual.
//!
//! Exit codes: see [`failure::Kind`].

#![deny(unsafe_code)]

mod admin;
mod batch;
mod bench;
mod cat;
mod cli;
mod cmp;
mod contents;
mod copy;
mod cp;
mod df;
mod digest;
mod discard;
mod doctor;
mod du;
mod failure;
mod find;
mod global;
mod info;
mod interrupt;
mod key;
mod ln;
mod load;
mod location;
mod ls;
mod manual;
mod mirror;
mod mkdir;
mod mv;
mod output;
mod pattern;
mod ping;
mod place;
mod progress;
mod queue;
mod rate;
mod rm;
mod stat;
mod sync;
mod target;
mod transfer;
mod tree;
mod truncate;
mod tuning;
mod walk;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use failure::Failure;
use interrupt::Interrupt;

fn main() -> ExitCode {
    let cli = Cli::parse();
    run(cli).unwrap_or_else(|failure| {
        output::say(&format!("raio: {failure}"));
        failure.exit_code()
    })
}

fn run(cli: Cli) -> Result<ExitCode, Failure> {
    let global = &cli.global;
    // A copy leaves its work in order.
    let is_graceful = matches!(cli.command, Command::Cp(_) | Command::Sync(_));
    let interrupt =
        Interrupt::install(is_graceful).map_err(|error| Failure::io("Cannot handle Ctrl-C", &error))?;
    let interrupt = &interrupt;
    let done = |()| ExitCode::SUCCESS;
    match cli.command {
        Command::Cp(options) => cp::run(global, &options, interrupt).map(done),
        Command::Sync(options) => sync::run(global, &options, interrupt).map(done),
        Command::Cat(options) => cat::run(global, &options, interrupt).map(done),
        Command::Stat(options) => stat::run(global, &options).map(done),
        Command::Checksum(options) => digest::run(global, &options, interrupt).map(done),
        Command::Cmp(options) => cmp::run(global, &options, interrupt).map(done),
        Command::Ls(options) => ls::run(global, &options).map(done),
        Command::Find(options) => find::run(global, &options).map(done),
        Command::Du(options) => du::run(global, &options).map(done),
        Command::Df(options) => df::run(global, &options).map(done),
        Command::Rm(options) => rm::run(global, &options).map(done),
        Command::Mkdir(options) => mkdir::run(global, &options).map(done),
        Command::Mv(options) => mv::run(global, &options).map(done),
        Command::Ln(options) => ln::run(global, &options).map(done),
        Command::Truncate(options) => truncate::run(global, &options).map(done),
        Command::Discard(options) => discard::run(global, &options).map(done),
        Command::Info(options) => info::run(global, &options).map(done),
        Command::Ping(options) => ping::run(global, &options).map(done),
        Command::Bench(options) => bench::run(global, &options).map(done),
        Command::Doctor(options) => doctor::run(global, &options).map(done),
        Command::Load(options) => load::run(global, options),
        Command::Key(options) => key::run(global, &options).map(done),
        Command::Admin(options) => admin::run(global, &options).map(done),
        Command::Completions(options) => manual::complete(&options).map(done),
        Command::Man(options) => manual::write(&options).map(done),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn global_options_may_be_given_before_and_after_the_command() {
        for line in ["raio key new --keys /k", "raio key --keys /k show", "raio --keys /k key trust raio://h"]
        {
            assert_eq!(parse(line).unwrap().global.keys, Some("/k".into()), "{line}");
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
            "raio key show --timeout 0",
            &format!("raio key trust raio://h --yes --key {key}"),
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
