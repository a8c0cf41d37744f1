//! The other side of a TLS connection by rustls alone, records included: what is written here in the clear
//! goes there sealed, and the other way round. So the suite's peers by hand speak TLS, too.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use raio_transport::Error;
use raio_transport::connecting::Connecting;
use raio_transport::handshake::Policy;
use raio_transport::keys::SecretKey;
use raio_transport::tcp::Accepting;
use raio_transport::tls::{ClientTls, ServerTls};
use raio_transport::transport::AcceptedStream;
use rustix::event::{PollFd, PollFlags, poll};
use rustls::{ClientConnection, Connection, ServerConnection};

use crate::harness::{PATIENCE, tcp_pair};

pub static SERVER_KEY: LazyLock<SecretKey> = LazyLock::new(SecretKey::generate);
pub static CLIENT_KEY: LazyLock<SecretKey> = LazyLock::new(SecretKey::generate);

/// Keys are used up all the time.
const RECORDS_PER_KEY: u64 = 20;

pub fn client_tls() -> ClientTls {
    ClientTls::new(&CLIENT_KEY, &[SERVER_KEY.public()]).with_records_per_key(RECORDS_PER_KEY)
}

pub fn server_tls() -> ServerTls {
    ServerTls::new(&SERVER_KEY, |key| *key == CLIENT_KEY.public()).with_records_per_key(RECORDS_PER_KEY)
}

/// A client that does not change its key.
pub fn lasting_client_tls() -> ClientTls {
    client_tls().with_records_per_key(u64::MAX)
}

/// A server whose kernel seals and opens, and does not change keys.
pub fn kernel_server_tls() -> ServerTls {
    server_tls().with_records_per_key(u64::MAX).in_kernel()
}

/// A client by rustls.
pub fn client() -> Connection {
    let name = "raio".try_into().unwrap();
    ClientConnection::new(client_tls().config(), name).unwrap().into()
}

/// A server by rustls.
pub fn server() -> Connection {
    ServerConnection::new(server_tls().config()).unwrap().into()
}

/// Shakes hands with a client, as a server does before a worker gets its connection.
pub fn accept(stream: TcpStream, tls: &ServerTls) -> Result<AcceptedStream, Error> {
    let deadline = Instant::now() + PATIENCE;
    let policy = Arc::new(Policy::default());
    stream.set_nonblocking(true).unwrap();
    let mut accepting =
        Accepting::new(AcceptedStream::new(std::os::fd::OwnedFd::from(stream)), tls, policy, deadline)?;
    loop {
        if let Some(outcome) = accepting.step(Instant::now()) {
            return outcome;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A stream in the clear that leads to what is sealed on the other one.
pub fn unsealed(sealed: TcpStream, connection: Connection) -> TcpStream {
    let (clear, ours) = tcp_pair();
    clear.set_nonblocking(false).unwrap();
    ours.set_nodelay(true).unwrap();
    sealed.set_nodelay(true).unwrap();
    for stream in [&ours, &sealed] {
        stream.set_nonblocking(true).unwrap();
    }
    std::thread::spawn(move || {
        let mut bridge = Bridge { clear: ours, sealed, connection, pending: Vec::new(), ended: [false; 2] };
        if bridge.run().is_err() {
            // A reset on the one side is one on the other.
            for stream in [&bridge.clear, &bridge.sealed] {
                let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
            }
        }
    });
    clear
}

struct Bridge {
    clear: TcpStream,
    sealed: TcpStream,
    connection: Connection,
    /// Opened, and not yet written.
    pending: Vec<u8>,
    /// Nothing more comes in the clear, and sealed.
    ended: [bool; 2],
}

impl Bridge {
    /// Until both directions have ended.
    fn run(&mut self) -> std::io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            if ready(self.connection.wants_write().then(|| self.connection.write_tls(&mut self.sealed)))? > 0
            {
                continue;
            }
            if !self.pending.is_empty() {
                let n = ready(Some((&self.clear).write(&self.pending)))?;
                self.pending.drain(..n);
            }
            if self.ended == [true; 2] && self.pending.is_empty() && !self.connection.wants_write() {
                return Ok(());
            }
            self.wait();
            if !self.ended[0] && !self.connection.is_handshaking() && !self.connection.wants_write() {
                match (&self.clear).read(&mut buffer) {
                    Ok(0) => {
                        self.ended[0] = true;
                        self.connection.send_close_notify();
                        while self.connection.wants_write() {
                            ready(Some(self.connection.write_tls(&mut self.sealed)))?;
                        }
                        let _ = self.sealed.shutdown(Shutdown::Write);
                    }
                    read => {
                        let n = ready(Some(read))?;
                        self.connection.writer().write_all(&buffer[..n])?;
                    }
                }
            }
            if !self.ended[1] && self.pending.is_empty() {
                match self.connection.read_tls(&mut self.sealed) {
                    Ok(0) => {
                        self.ended[1] = true;
                        let _ = self.clear.shutdown(Shutdown::Write);
                    }
                    read => {
                        ready(Some(read))?;
                        let state = self.connection.process_new_packets();
                        let state = state.map_err(|error| std::io::Error::other(error.to_string()))?;
                        let mut opened = vec![0; state.plaintext_bytes_to_read()];
                        self.connection.reader().read_exact(&mut opened)?;
                        self.pending = opened;
                    }
                }
            }
        }
    }

    fn wait(&self) {
        let mut fds = Vec::new();
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, !self.ended[0] && !self.connection.is_handshaking());
        flags.set(PollFlags::OUT, !self.pending.is_empty());
        fds.push(PollFd::from_borrowed_fd(self.clear.as_fd(), flags));
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, !self.ended[1] && self.pending.is_empty());
        flags.set(PollFlags::OUT, self.connection.wants_write());
        fds.push(PollFd::from_borrowed_fd(self.sealed.as_fd(), flags));
        let _ = poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 50_000_000 }));
    }
}

/// How much was moved, 0 if nothing can be now.
fn ready(moved: Option<std::io::Result<usize>>) -> std::io::Result<usize> {
    match moved {
        Some(Err(error)) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        Some(moved) => moved,
        None => Ok(0),
    }
}
