//! The program: options, privileges, signals, exit codes.
//!
//! Exit codes: 0 told to stop and everything was answered, 1 could not start or go on, 2 the command line or
//! configuration makes no sense, 128 + signal told to stop a second time.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use raio_transport::reactor::block_signals;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use tracing::level_filters::LevelFilter;

use crate::config::{self, Config, LogLevel, Options};
use crate::log;
use crate::server::{self, Server, describe};

/// Runs `raio_server` with this process's arguments, until it is told to stop. In the process's first and
/// only thread: signals are blocked for all threads that it starts.
pub fn main() -> ExitCode {
    // Beyond a limit on file sizes a write is to fail, not to end the server.
    let signals: Vec<_> = server::HANDLED_SIGNALS.into_iter().chain([libc::SIGXFSZ]).collect();
    let options = match Options::try_parse() {
        Ok(options) => Ok(options),
        Err(error) => Err(config::advice(&error).unwrap_or_else(|| error.exit())),
    };
    let privileges = drop_fsetid();
    if let Err(error) = block_signals(&signals).and_then(|()| log::start()) {
        let _ = writeln!(std::io::stderr(), "raio_server: Cannot block signals or start a thread: {error}.");
        return ExitCode::FAILURE;
    }
    let code = match options {
        Ok(options) => run(options, privileges),
        Err(advice) => {
            log::say(&format!("{advice} See raio_server --help."));
            ExitCode::from(2)
        }
    };
    log::flush();
    code
}

fn run(options: Options, privileges: anyhow::Result<()>) -> ExitCode {
    let failed = |error: &anyhow::Error, code| {
        log::say(&describe(error));
        ExitCode::from(code)
    };
    if options.list_devices {
        return list_devices();
    }
    let is_check = options.check;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let config = match options.check(cores) {
        Ok(config) => config,
        Err(error) => return failed(&error, 2),
    };
    if is_check {
        return server::check(&config).map_or_else(|error| failed(&error, 2), |()| ExitCode::SUCCESS);
    }
    log::init(match config.log {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    });
    serve(&config, privileges).unwrap_or_else(|error| failed(&error, 1))
}

/// Shows the RDMA devices, for people.
fn list_devices() -> ExitCode {
    let devices = match raio_transport::rdma::devices() {
        Ok(devices) => devices,
        Err(error) => {
            log::say(&error.to_string());
            return ExitCode::FAILURE;
        }
    };
    let mut text = String::new();
    for device in devices {
        for port in &device.ports {
            text += &format!(
                "{} port {}: {}, {}, MTU {}\n",
                device.name, port.number, port.state, port.link, port.mtu
            );
            for gid in &port.gids {
                text += &format!("    GID {}: {} ({})\n", gid.index, gid.address, gid.kind);
            }
            if let Some(problem) = port.problem() {
                text += &format!("    Not usable: {problem}\n");
            }
        }
    }
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Drops CAP_FSETID. A write by a client must clear the set-user-ID and set-group-ID bits of a file, as a
/// write by an ordinary user does; the kernel does not clear them for a thread with this capability. To be
/// called before the first thread starts: capabilities belong to threads, and new threads inherit them.
fn drop_fsetid() -> anyhow::Result<()> {
    let mut sets = match capabilities(None) {
        // A sandbox may forbid to ask. Then an ordinary user has none.
        Err(_) if !rustix::process::geteuid().is_root() => return Ok(()),
        sets => sets?,
    };
    let has_it = [sets.effective, sets.permitted].iter().any(|set| set.contains(CapabilitySet::FSETID));
    if has_it {
        for set in [&mut sets.effective, &mut sets.permitted, &mut sets.inheritable] {
            set.remove(CapabilitySet::FSETID);
        }
        set_capabilities(None, sets)?;
    }
    Ok(())
}

fn serve(config: &Config, privileges: anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    privileges.context(
        "Cannot give up CAP_FSETID, with which writes would keep set-user-ID bits. Run the server as an \
         ordinary user, or allow \
         capset(2) in the seccomp profile",
    )?;
    if rustix::process::geteuid().is_root() {
        tracing::warn!(
            "The server runs as root, so clients can do with the exports what root can. Run it as a user of \
             its own that may \
             access nothing but the exports."
        );
    }
    let Some(server) = Server::start(config)? else { return Ok(ExitCode::SUCCESS) };
    // The messages of the start come before this line, which scripts wait for.
    log::flush();
    log::print(&format!("raio_server: ready on {}", server.urls()));
    server.run()
}
