//! The message layer of raio: requests, responses and bulk data between a client and a server.
//!
//! A client sends a small opaque *command*, perhaps with bulk data; the server answers with a status, a
//! result and perhaps bulk data. What a command means is not this layer's business: [`protocol`] holds raio's
//! own commands (open, read, write, ...), and other programs bring theirs (see `examples/`).
//!
//! ```text
//!   your client                                                     your server
//!       |  ClientTransport::send/flush           ServerEvent::Request  ^
//!       v                                                              |
//!  {tcp,rdma,loopback}::Client  -- message framing, credits -->  {tcp,rdma,loopback}::Server
//!       ^                                                              |  over one Reactor a thread
//!       |  ClientTransport::receive              ServerTransport::respond
//! ```
//!
//! Dependencies point one way: [`message`], [`protocol`], [`error`] and [`address`] know nothing of the rest;
//! [`memory`] and [`reactor`] stand on those; the transports on the two role traits of [`transport`].

#![deny(unsafe_code)]
// What only RDMA, or only a test's peer, uses stays in a build without it.
#![cfg_attr(not(all(feature = "rdma", feature = "test-peers")), allow(dead_code))]

pub mod address;
mod body;
pub mod busy_poll;
pub mod channel;
mod client;
pub mod connecting;
#[allow(unsafe_code)]
pub mod credentials;
#[allow(unsafe_code)]
pub mod environment;
pub mod error;
pub mod event_loop;
#[allow(unsafe_code)]
pub mod file_handles;
pub mod handshake;
mod keepalive;
pub mod key_directory;
pub mod keys;
#[cfg(feature = "test-peers")]
pub mod loopback;
#[allow(unsafe_code)]
pub mod memory;
pub mod message;
pub mod mux;
pub mod open_files;
pub mod protocol;
pub mod push;
pub mod random;
#[cfg_attr(not(feature = "rdma"), path = "rdma/stub.rs")]
pub mod rdma;
pub mod rdma_devices;
#[allow(unsafe_code)]
pub mod reactor;
mod records;
pub mod resume;
mod server;
pub mod size;
pub mod sync;
pub mod tcp;
pub mod tls;
pub mod trace;
pub mod transport;
mod tuning;

pub use error::{Class, Error, Status, Violation};
