//! The client's side of TCP.

/// A connection to a server.
pub struct Client;
