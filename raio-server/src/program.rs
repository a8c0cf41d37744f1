//! The program: options, privileges, signals, exit codes.
//!
//! Exit codes: 0 told to stop and everything was answered, 1 could not start or go on, 2 the command line or
//! configuration makes no sense, 128 + signal told to stop a second time.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use raio_transport::reactor::block_signals;
use std::sync::Arc;

use crate::config::{self, Config, Options};
use crate::hand_over::GivenSocket;
use crate::server::{self, Server, describe};
use crate::service::Service;
use crate::{log, privileges};

/// Runs `raio_server` with this process's arguments, until it is told to stop. In the process's first and
/// only thread: signals are blocked for all threads that it starts.
pub fn main() -> ExitCode {
    // Beyond a limit on file sizes a write is to fail, not to end the server.
    let signals: Vec<_> = server::HANDLED_SIGNALS.into_iter().chain([libc::SIGXFSZ]).collect();
    let options = match Options::try_parse() {
        Ok(options) => Ok(options),
        Err(error) => Err(config::advice(&error).unwrap_or_else(|| error.exit())),
    };
    log::catch_panics();
    let privileges = privileges::drop_fsetid();
    if let Err(error) = block_signals(&signals) {
        log::say(&format!("Cannot block signals: {error}."));
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
    let service = match Service::find() {
        Ok(service) => service,
        Err(error) => return failed(&error, 2),
    };
    let passed = service.sockets().iter().filter_map(GivenSocket::endpoint).collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let config = match options.with_passed(passed).check(cores) {
        Ok(config) => config,
        Err(error) => return failed(&error, 2),
    };
    if is_check {
        return server::check(&config).map_or_else(|error| failed(&error, 2), |()| ExitCode::SUCCESS);
    }
    log::init(config.log.filter());
    serve(config, service, privileges).unwrap_or_else(|error| failed(&error, 1))
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
            text += &format!("    Memory windows: {}\n", if device.has_windows { "yes" } else { "no" });
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

fn serve(config: Config, service: Service, privileges: anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    privileges.context(
        "Cannot give up CAP_FSETID, with which writes would keep set-user-ID bits. Run the server as an \
         ordinary user, or allow \
         capset(2) in the seccomp profile",
    )?;
    let Some(server) = Server::start(Arc::new(config), service)? else { return Ok(ExitCode::SUCCESS) };
    // The messages of the start come before this line, which scripts wait for.
    log::flush();
    log::print(&format!("raio_server: ready on {}", server.urls()));
    server.run()
}
