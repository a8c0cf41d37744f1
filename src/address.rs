//! Addresses: `raio://host:port` for clients, `tcp://host:port` for servers.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;

use crate::error::Error;

/// The port when a URL names none.
pub const PORT_DEFAULT: u16 = 7240;

/// Which transport a URL asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// `raio://`: TCP first, moving to RDMA if both ends have it.
    Any,
    /// `raio+tcp://`, `tcp://`: TCP only. For a listener: clients of `raio://` come here, and may move to
    /// RDMA.
    Tcp,
    /// `raio+rdma://`, `rdma://`: RDMA only, by rdma_cm.
    Rdma,
}

/// A parsed URL: transport, host and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The transport.
    pub scheme: Scheme,
    /// A host name or an IP address, IPv6 without its brackets.
    pub host: String,
    /// The port; 0 lets a listener choose.
    pub port: u16,
}

impl Address {
    /// Parses a URL. The error says what is wrong with it; which forms are right is for the caller to say.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let (scheme, rest) = text.split_once("://").ok_or("it has no scheme")?;
        let scheme = match scheme {
            "raio" => Scheme::Any,
            "raio+tcp" | "tcp" => Scheme::Tcp,
            "raio+rdma" | "rdma" => Scheme::Rdma,
            _ => return Err("its scheme is unknown"),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        if rest.contains('/') {
            return Err("it has a path, which belongs to the file and not to the server");
        }
        let (host, port) = if let Some(inner) = rest.strip_prefix('[') {
            let (host, tail) = inner.split_once(']').ok_or("a bracket is not closed")?;
            match tail.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if tail.is_empty() => (host, None),
                None => return Err("something other than a port follows the bracket"),
            }
        } else {
            match rest.rsplit_once(':') {
                Some((host, _)) if host.contains(':') => return Err("IPv6 addresses go in brackets"),
                Some((host, port)) => (host, Some(port)),
                None => (rest, None),
            }
        };
        if host.is_empty() {
            return Err("it names no host");
        }
        if host.contains(['[', ']']) {
            return Err("brackets go around an IPv6 address, and nowhere else");
        }
        let port = match port {
            None => PORT_DEFAULT,
            Some(port) if port.bytes().all(|b| b.is_ascii_digit()) => {
                port.parse().map_err(|_| "its port is not a number from 0 to 65535")?
            }
            Some(_) => return Err("its port is not a number from 0 to 65535"),
        };
        Ok(Self { scheme, host: host.to_owned(), port })
    }

    /// Looks the host up. At least one address on success.
    pub fn resolve(&self) -> Result<Vec<SocketAddr>, Error> {
        let found: Vec<_> = (self.host.as_str(), self.port)
            .to_socket_addrs()
            .map_err(|source| {
                // getaddrinfo's own errors carry no errno.
                let errno = source.raw_os_error().unwrap_or(libc::ENOENT);
                Error::Io {
                    context: format!("Cannot look up host {:?} ({source})", self.host),
                    source: std::io::Error::from_raw_os_error(errno),
                }
            })?
            .collect();
        if found.is_empty() {
            return Err(Error::io(
                format!("Host {:?} has no address", self.host),
                std::io::Error::from_raw_os_error(libc::ENOENT),
            ));
        }
        Ok(found)
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(text).map_err(|why| {
            Error::Address(format!(
                "{text:?} is not an address: {why}. Write raio://HOST:PORT, raio+tcp://HOST:PORT or, for a \
                 listener, tcp://HOST:PORT."
            ))
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.scheme {
            Scheme::Any => "raio",
            Scheme::Tcp => "tcp",
            Scheme::Rdma => "rdma",
        };
        if self.host.contains(':') {
            write!(f, "{scheme}://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{scheme}://{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_parse_and_print() {
        for (text, scheme, host, port) in [
            ("raio://h", Scheme::Any, "h", 7240),
            ("raio+tcp://127.0.0.1:1/", Scheme::Tcp, "127.0.0.1", 1),
            ("tcp://[::1]:0", Scheme::Tcp, "::1", 0),
            ("rdma://[fe80::1]", Scheme::Rdma, "fe80::1", 7240),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!((address.scheme, address.host.as_str(), address.port), (scheme, host, port), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_a_sentence() {
        for text in [
            "",
            "h:1",
            "http://h",
            "raio://",
            "raio://:1",
            "raio://h:",
            "raio://h:65536",
            "raio://h:+1",
            "raio://::1:2",
            "raio://[::1",
            "raio://[::1]x",
            "raio://[[x]",
            "raio://a]:1",
            "raio://h/export/file",
        ] {
            let error = text.parse::<Address>().unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL, "{text}");
            assert!(error.to_string().ends_with('.'), "{error}");
        }
    }
}
