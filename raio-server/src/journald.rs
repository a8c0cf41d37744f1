//! journald, by its native protocol: a datagram for each record, with as many fields as one likes.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};

/// Where it listens.
pub const SOCKET: &str = "/run/systemd/journal/socket";

/// A connection to whoever listens there. It outlives journald itself: systemd keeps the other end.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::UNIX, SocketType::DGRAM, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// A record of the server, as journald takes it.
#[derive(Debug)]
pub struct Datagram(pub Vec<u8>);

impl Datagram {
    /// One of this priority, as syslog(3) counts them.
    pub fn new(priority: u8) -> Self {
        Self(format!("PRIORITY={priority}\nSYSLOG_IDENTIFIER=raio_server\n").into_bytes())
    }

    /// Adds a field. Its name has capital letters, digits and underscores.
    pub fn push(&mut self, name: &str, value: &[u8]) {
        self.0.extend_from_slice(name.as_bytes());
        if value.contains(&b'\n') {
            // So that no value looks like another field.
            self.0.push(b'\n');
            self.0.extend_from_slice(&(value.len() as u64).to_le_bytes());
        } else {
            self.0.push(b'=');
        }
        self.0.extend_from_slice(value);
        self.0.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_value_looks_like_another_field() {
        let mut datagram = Datagram::new(6);
        datagram.push("MESSAGE", "plain = ä".as_bytes());
        datagram.push("RAIO_NAME", b"a\nPRIORITY=0");
        let before = "PRIORITY=6\nSYSLOG_IDENTIFIER=raio_server\nMESSAGE=plain = ä\n";
        let name = "RAIO_NAME\n\x0c\0\0\0\0\0\0\0a\nPRIORITY=0\n";
        assert_eq!(String::from_utf8(datagram.0).unwrap(), format!("{before}{name}"));
    }
}
