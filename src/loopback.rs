//! The in-process transport, for tests.
//!
//! It moves whole messages and places data, as RDMA does and a stream does not: a [`Client`] lays its buffers
//! open under a key, the [`Server`] copies into or out of them ([`End::place`], [`End::fetch`]) and then
//! answers. A write of more than the grant's `inline_bytes_max` is fetched, a smaller one travels in its
//! request. Messages are framed and checked as everywhere. So whatever passes over `pair` and over TCP fits
//! both kinds of transport.
//!
//! An [`End`] is to it what a connected socket is to TCP: give one to [`Client::from_end`], the other to
//! [`Server::adopt`] - or keep one, and misbehave by hand.

mod client;
mod link;
mod server;

pub use client::Client;
pub use link::{Access, End, Rejected};
pub use server::Server;
