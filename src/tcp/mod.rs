//! The TCP transport: messages and their data on one stream.

mod client;

pub use client::Client;
