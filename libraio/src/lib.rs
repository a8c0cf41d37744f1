//! libraio: remote asynchronous I/O, in the manner of libaio.
//!
//! A [`Session`] is one server with its open [`File`]s. A [`Context`] is one connection of it with a queue of
//! operations, and belongs to one thread at a time: submit operations, flush, wait, collect completions.
//! Buffers are owned by the context while their operation is in flight and come back in its [`Completion`].
//!
//! The library starts no threads, installs no signal handlers and prints nothing. Programs in C use the same
//! through `include/libraio.h`, which [`ffi`] implements.

#![deny(unsafe_code)]

mod context;
mod error;
#[cfg(test)]
mod fake_server;
#[allow(unsafe_code)]
pub mod ffi;
mod file;
mod poller;
mod session;
#[cfg(test)]
mod tests;

pub use context::{Completion, Context, MAXEVENTS_MAX, Operation, Rejected, Stats, Ticket};
pub use error::Error;
pub use file::File;
pub use raio_transport::address::Scheme;
pub use raio_transport::memory::{Arena, Buffer, Buffers, Region, Slot};
pub use raio_transport::protocol::FileStatus;
pub use raio_transport::{Class, Status};
pub use session::{Options, Session};
