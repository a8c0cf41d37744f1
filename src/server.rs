//! The server's side of a connection, as every transport has it: the protocol without the I/O.
//!
//! ```text
//!   TcpServer                    RdmaServer, LoopbackServer    move bytes; know sockets, queue pairs
//!        |                              |                      and the reactor
//!   StreamConnection             MessageConnection             messages out of a stream of bytes, or
//!        |                              |                      whole; what to send next
//!        +-------- ConnectionCore ------+                      phases, credits, ids, limits, deadlines
//! ```
//!
//! Nothing here makes a system call or asks for the time: a transport passes in what has happened and its
//! clock, and asks what is to be done next. So all of it is tested with a clock of the test's own.

mod core;
mod in_flight;
#[cfg(any(feature = "rdma", feature = "test-peers"))]
mod message;
mod outbox;
mod stream;

#[cfg(test)]
pub(crate) use core::tests::peer;
pub(crate) use core::{ConnectionCore, Control, Due, Phase};
pub(crate) use in_flight::InFlight;
#[cfg(any(feature = "rdma", feature = "test-peers"))]
pub(crate) use message::{DataSource, MessageConnection, Outgoing, Taken};
pub(crate) use stream::{Close, Receive, StreamConnection, StreamShared};
