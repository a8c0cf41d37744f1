//! A server that is asked about itself: a URL, or that of RAIO_URL.

use std::time::{Duration, Instant};

use raio_transport::address::{Address, Scheme};
use raio_transport::handshake::Offer;
use raio_transport::protocol::OPERATION_FEATURES;
use raio_transport::tcp::TcpClient;
use raio_transport::transport::ClientTransport;

use crate::failure::Failure;
use crate::global::Global;
use crate::tuning::CONNECT_TIMEOUT;

/// A connection of its own over TCP or a Unix socket, without libraio, to see what a server grants and how
/// soon it answers.
pub struct Probe {
    client: TcpClient,
    /// How long connecting and the handshakes took.
    pub connected_in: Duration,
    /// With TLS.
    pub is_encrypted: bool,
}

impl Probe {
    /// Connects.
    pub fn connect(global: &Global, url: &str) -> Result<Self, Failure> {
        let address: Address = url.parse()?;
        if address.scheme() == Scheme::Rdma {
            return Err(Failure::usage(format!(
                "{url} asks for RDMA alone, and this asks the server over TCP. Write raio://HOST[:PORT]."
            )));
        }
        let timeout = global.timeout.unwrap_or(CONNECT_TIMEOUT);
        let mut last = None;
        for endpoint in address.resolve()? {
            let tls = global.tls(&address, &endpoint)?;
            let is_encrypted = tls.is_some();
            let features = Offer::new("").features | OPERATION_FEATURES;
            let offer = Offer { tls, features, ..Offer::new(format!("raio[{}]", std::process::id())) };
            let started = Instant::now();
            match TcpClient::connect(endpoint, &offer, started + timeout) {
                Ok(client) => return Ok(Self { client, connected_in: started.elapsed(), is_encrypted }),
                Err(error) => last = Some(error),
            }
        }
        Err(last.map_or_else(|| Failure::new(format!("The host of {url} has no address.")), Failure::from))
    }

    /// What the server granted.
    pub fn grant(&self) -> &raio_transport::handshake::Grant {
        self.client.grant()
    }

    /// One ping: how long its answer took.
    pub fn ping(&mut self, timeout: Duration) -> Result<Duration, Failure> {
        let started = Instant::now();
        let deadline = started + timeout;
        self.client.ping(timeout);
        let mut replies = Vec::new();
        loop {
            if self.client.receive(&mut replies) {
                return Ok(started.elapsed());
            }
            if let Some(error) = self.client.failure() {
                let text = error.to_string();
                return Err(Failure::of(crate::failure::Kind::Unreachable, format!("No answer: {text}.")));
            }
            match self.client.wait(Some(deadline)) {
                Err(error) if error.errno() != libc::EINTR => return Err(error.into()),
                _ if Instant::now() >= deadline => {
                    let text = format!("No answer within {} s. Check the server.", timeout.as_secs_f64());
                    return Err(Failure::of(crate::failure::Kind::Unreachable, text));
                }
                _ => {}
            }
        }
    }
}
