//! `raio admin`: what a running server does, and changes of it, by its admin socket.

pub mod client;
mod report;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueHint};

use crate::failure::Failure;
use crate::global::Global;
use crate::output;
use client::Admin;

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    #[command(flatten)]
    socket: Socket,
    #[command(subcommand)]
    command: Command,
}

/// Which server is meant.
#[derive(Args, Debug)]
pub struct Socket {
    /// The server's admin socket: what its option --admin says [default: $RAIO_ADMIN, else
    /// /run/raio/admin.sock]
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath, global = true)]
    socket: Option<PathBuf>,
}

impl Socket {
    /// Connects to the server.
    pub fn connect(&self) -> Result<Admin, Failure> {
        let path = self.socket.clone().or_else(|| std::env::var_os("RAIO_ADMIN").map(PathBuf::from));
        let path = path.filter(|path| !path.as_os_str().is_empty());
        Admin::connect(path.unwrap_or_else(|| DEFAULT.into()))
    }
}

/// Where the packages have the server's socket.
const DEFAULT: &str = "/run/raio/admin.sock";

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the sessions of clients, those that do most first
    Sessions(SessionOptions),
    /// Show the exports
    Exports,
    /// Show the server's workers
    Workers,
    /// Show the latest requests that have taken long, and where
    Slow,
    /// Show the server's statistics
    Stats,
    /// Record all requests for some seconds, for ui.perfetto.dev
    Trace(TraceOptions),
    /// Have the server read its configuration again
    Reload,
    /// Have the server complete the requests in flight, and end
    Drain,
    /// End a client's session
    Kill(KillOptions),
}

#[derive(Args, Debug)]
struct SessionOptions {
    /// How many sessions to show; without it all of them
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    top: Option<u32>,
}

#[derive(Args, Debug)]
struct TraceOptions {
    /// For how many seconds, at most 60
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Where the trace is written [default: standard output]
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    output: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct KillOptions {
    /// The session's id: see `raio admin sessions`
    #[arg(value_parser = session)]
    session: String,
}

/// What may be the id of a session.
fn session(text: &str) -> Result<String, String> {
    let is_hex = !text.is_empty() && text.len() <= 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let none = || format!("{text:?} is no id of a session. `raio admin sessions` shows them.");
    is_hex.then(|| text.to_ascii_lowercase()).ok_or_else(none)
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let mut admin = options.socket.connect()?;
    if let Some(timeout) = global.timeout {
        admin = admin.with_timeout(timeout);
    }
    match &options.command {
        Command::Sessions(SessionOptions { top }) => {
            let top = top.map_or_else(String::new, |top| format!("?top={top}"));
            report::list(global, &admin.get_text(&format!("/sessions{top}"))?, "sessions")
        }
        Command::Exports => report::list(global, &admin.get_text("/exports")?, "exports"),
        Command::Workers => report::list(global, &admin.get_text("/workers")?, "workers"),
        Command::Slow => report::list(global, &admin.get_text("/slow")?, "slow"),
        Command::Stats if global.json => {
            output::print(&format!("{}\n", admin.get_text("/stats")?.trim_end()))
        }
        Command::Stats => report::stats(global, admin.get("/stats")?),
        Command::Trace(TraceOptions { seconds, output }) => {
            let recording = Duration::from_secs(u64::from(*seconds));
            let timeout = global.timeout.unwrap_or(crate::tuning::admin::TIMEOUT);
            let trace =
                admin.with_timeout(timeout + recording).get_text(&format!("/trace?seconds={seconds}"))?;
            match output {
                Some(path) => std::fs::write(path, trace)
                    .map_err(|error| Failure::io(format!("Cannot write {}", path.display()), &error)),
                None => output::print(&trace),
            }
        }
        Command::Reload => report::reloaded(global, admin.post("/reload")?),
        Command::Drain => {
            let answer = admin.post("/drain")?;
            let text = "The server accepts nothing new, completes what is in flight, and ends.";
            report::done(global, &answer, text)
        }
        Command::Kill(KillOptions { session }) => {
            let answer = admin.post(&format!("/kill?session={session}"))?;
            report::done(global, &answer, &format!("Session {session} has ended."))
        }
    }
}
