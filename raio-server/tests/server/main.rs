//! The real raio_server, spoken to over TCP in its own protocol. Most tests run for each way to do file I/O:
//! over io_uring, with `--backend threads`, and with io_uring forbidden by a seccomp filter.

mod common;
mod exports;
mod files;
mod lifecycle;
mod log;
mod observing;
mod paths;
#[path = "../../../tests/random/mod.rs"]
mod random;
mod ranges;
mod reload;
mod sandbox;
mod startup;
