//! libraio: remote asynchronous I/O, in the manner of libaio.
//!
//! A [`Session`] is one server with its open [`File`]s. A [`Context`] is one connection of it with a queue of
//! operations, and belongs to one thread at a time: submit operations, flush, wait, collect completions.
//! Buffers are owned by the context while their operation is in flight and come back in its [`Completion`].
//!
//! The library starts no threads, installs no signal handlers and prints nothing. Programs in C use the same
//! through `include/libraio.h`, which [`ffi`] implements.
//!
//! # Layers
//!
//! A module uses only modules of a lower layer:
//!
//! | layer | modules | what |
//! |---|---|---|
//! | 7 | `ffi` | the C API; the only module with unsafe code |
//! | 7 | `async_context` | operations as futures |
//! | 6 | `context` | a connection and its queue of operations: the data path |
//! | 5 | `operation`, `open_options` | what is to be done, and how it ends; how a file is opened |
//! | 4 | `file` | an open file, and what each context has in flight on it |
//! | 3 | `names` | directories, attributes, and whole small files |
//! | 2 | `session` | a server, and whose turn it is on the control connection |
//! | 1 | `control`, `lent_pool`, `poller`, `open_flags`, `split`, `trace` | use no other part |
//! | 0 | `error`, `tuning` | |

#![deny(unsafe_code)]

mod async_context;
#[cfg(test)]
mod async_tests;
mod context;
mod control;
mod error;
#[cfg(test)]
mod fake_server;
#[allow(unsafe_code)]
pub mod ffi;
mod file;
mod lent_pool;
mod names;
mod open_flags;
mod open_options;
mod operation;
#[cfg(test)]
mod path_tests;
mod poller;
#[cfg(test)]
mod resume_tests;
mod session;
mod split;
#[cfg(test)]
mod split_tests;
#[cfg(test)]
mod test_buffers;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod timeout_tests;
mod trace;
mod tuning;

pub use async_context::{AsyncContext, AsyncOperation, AsyncPathOperation, OnFile, Progress};
pub use context::Context;
pub use error::Error;
pub use file::{CopySource, File};
pub use names::{Attributes, DirEntry, PutOptions, ReadDir};
pub use open_options::OpenOptions;
pub use operation::{
    Answer, Checksum, ChecksumAlgorithm, Completion, Lock, Operation, OperationCrc, PathOperation, Rejected,
    RejectedPath, Stats, SubmitOptions, Ticket,
};
pub use raio_transport::address::Scheme;
pub use raio_transport::memory::{Arena, Buffer, Buffers, Region, Slot};
pub use raio_transport::protocol::{FileStatus, FileSystemStatus};
pub use raio_transport::{Class, Status};
pub use session::{Crc, Keys, Options, Session};
pub use tuning::MAXEVENTS_MAX;
