//! The numbers that this program was tuned with.

use std::time::Duration;

/// How long a server may take for a connection and the handshakes, for each of its addresses.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
