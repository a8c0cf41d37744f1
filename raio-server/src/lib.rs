//! What raio_server is made of. The program is [`main`]; its modules are here for programs that test them,
//! and promise nothing to others.
//!
//! ```text
//!   main thread: listener, signals --- raw connections ---> workers, one for each core:
//!                                                           transports -> command -> request -> engine
//! ```

#![deny(unsafe_code)]

mod acceptor;
mod audit;
mod authorize;
mod cached;
mod channel;
mod checksum;
mod claim;
mod clear;
mod client;
pub mod config;
mod copy;
mod device_queue;
mod engine;
mod export;
pub mod export_spec;
mod file_identity;
mod hand_over;
mod handles;
mod hidden;
#[cfg(test)]
#[path = "../../tests/history/mod.rs"]
mod history;
pub mod keys;
mod limits;
mod listener;
mod listing;
mod log;
mod lookup;
mod machine;
#[cfg(test)]
mod manual;
mod names;
mod open;
mod orphan_guard;
mod path;
mod peer;
mod placement;
mod pool;
mod privileges;
mod probe;
mod program;
#[cfg(test)]
#[path = "../../tests/random/mod.rs"]
mod random;
mod rate_limit;
mod rejection;
mod request;
mod root;
mod sandbox;
mod server;
mod service;
mod session;
mod sessions;
mod size;
mod state_directory;
mod stats;
mod stored;
mod subtree;
mod syscalls;
mod throttle;
mod trace;
mod tuning;
mod unfinished;
mod verifier;
mod volume;
mod worker;

pub use program::main;
#[cfg(feature = "test-worker")]
pub use worker::admission::{Admission, Demand};
#[cfg(any(test, feature = "test-worker"))]
pub use worker::driven::{InUse, TestWorker};
