//! Whether a client is still there, for threads other than its worker's.

use std::os::fd::OwnedFd;
#[cfg(any(test, feature = "test-worker"))]
use std::sync::LazyLock;
use std::sync::{Arc, Weak};
use std::time::Instant;

use raio_transport::tcp;
use raio_transport::transport::ALIVE_FOR;

/// The client of one connection. It ends when its worker learns of the connection's end, however long that
/// worker is held up.
#[derive(Debug)]
pub struct Client {
    /// The connection's socket, if it has one, as long as it is open.
    socket: Option<Weak<OwnedFd>>,
}

/// On whose behalf an operation runs in a lane, and since when it waits.
#[derive(Clone, Debug)]
pub struct OnBehalf {
    client: Weak<Client>,
    since: Instant,
}

impl Client {
    /// Of a connection with this socket.
    pub fn new(socket: Option<Weak<OwnedFd>>) -> Arc<Self> {
        Arc::new(Self { socket })
    }
}

impl OnBehalf {
    /// Of this client, from now on.
    pub fn of(client: &Weak<Client>) -> Self {
        Self { client: client.clone(), since: Instant::now() }
    }

    /// For a client that never disconnects: a test has begun the operation, so it can no longer be cancelled.
    #[cfg(any(test, feature = "test-worker"))]
    pub fn uncancellable() -> Self {
        static STAYS: LazyLock<Arc<Client>> = LazyLock::new(|| Client::new(None));
        Self::of(&Arc::downgrade(&STAYS))
    }

    /// Whether the client has given up what it asked for: its connection has ended. The socket is asked only
    /// if the operation had to wait.
    pub fn is_over(&self) -> bool {
        let Some(client) = self.client.upgrade() else { return true };
        if self.since.elapsed() < ALIVE_FOR {
            return false;
        }
        let Some(socket) = &client.socket else { return false };
        socket.upgrade().is_none_or(|socket| tcp::has_ended(&*socket))
    }
}
