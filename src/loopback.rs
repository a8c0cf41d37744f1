//! The in-process transport, for tests.
//!
//! It moves whole messages and places data, as RDMA does and a stream does not: a [`LoopbackClient`] exposes
//! its buffers under a key, the [`LoopbackServer`] copies into or out of them ([`LoopbackEnd::place`],
//! [`LoopbackEnd::fetch`]) and then answers. A write of more than the grant's `inline_bytes_max` is fetched,
//! a smaller one travels in its request. Messages are framed and checked as everywhere. So whatever passes
//! over `loopback` and over TCP fits both kinds of transport.
//!
//! A [`LoopbackEnd`] is to it what a connected socket is to TCP: give one to [`LoopbackClient::from_end`],
//! the other to [`LoopbackServer::adopt`] - or keep one, and misbehave by hand.

mod client;
mod link;
mod server;

pub use client::{LoopbackClient, LoopbackDial};
pub use link::{Access, LoopbackEnd, Rejected};
pub use server::LoopbackServer;
