//! Addresses: `raio://host:port` for clients, `tcp://host:port` for servers, and the paths of Unix sockets
//! for both.

use std::ffi::OsString;
use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, percent_encode};
use socket2::SockAddr;

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
    /// `raio+unix://`, `unix://`: a Unix socket.
    Unix,
}

/// A parsed URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A host and a port.
    Host {
        /// The transport.
        scheme: Scheme,
        /// A host name or an IP address, IPv6 without its brackets.
        host: String,
        /// The port; 0 lets a listener choose.
        port: u16,
    },
    /// The path of a Unix socket.
    Unix(PathBuf),
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// An IP address and a port.
    Ip(SocketAddr),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

/// What a path must have encoded in a URL to be read back.
const ENCODED: AsciiSet =
    CONTROLS.add(b' ').add(b'"').add(b'#').add(b'%').add(b'&').add(b'<').add(b'>').add(b'?');

const PATH_IN_URL: &str = "it has a path, which belongs to the file and not to the server";

impl Endpoint {
    /// Its IP address and port. None: it is a Unix socket.
    pub fn ip(&self) -> Option<SocketAddr> {
        match self {
            Self::Ip(address) => Some(*address),
            Self::Unix(_) => None,
        }
    }

    /// For bind(2) and connect(2).
    pub(crate) fn to_socket_address(&self) -> std::io::Result<SockAddr> {
        match self {
            Self::Ip(address) => Ok((*address).into()),
            Self::Unix(path) => SockAddr::unix(path),
        }
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self::Ip(address)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// The path of a Unix socket, as it is written in a URL.
fn socket_path(text: &str) -> Result<PathBuf, &'static str> {
    let path = OsString::from_vec(percent_decode_str(text).collect());
    if !path.as_bytes().starts_with(b"/") {
        return Err("the path of its socket does not begin with /");
    }
    if path.as_bytes().contains(&0) {
        return Err("the path of its socket has a NUL");
    }
    SockAddr::unix(&path).map_err(|_| "the path of its socket is longer than 107 bytes")?;
    Ok(path.into())
}

impl Address {
    /// Parses a URL. The error says what is wrong with it; which forms are right is for the caller to say.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let (scheme, rest) = text.split_once("://").ok_or("it has no scheme")?;
        let scheme = match scheme {
            "raio" => Scheme::Any,
            "raio+tcp" | "tcp" => Scheme::Tcp,
            "raio+rdma" | "rdma" => Scheme::Rdma,
            "unix" => return socket_path(rest).map(Self::Unix),
            "raio+unix" => {
                let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
                if !matches!(path, "" | "/") {
                    return Err(PATH_IN_URL);
                }
                return match query.split_once('=') {
                    Some(("socket", path)) if !path.contains('&') => socket_path(path).map(Self::Unix),
                    _ => Err("its one parameter is ?socket=PATH"),
                };
            }
            _ => return Err("its scheme is unknown"),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        if rest.contains('/') {
            return Err(PATH_IN_URL);
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
        Ok(Self::Host { scheme, host: host.to_owned(), port })
    }

    /// The transport.
    pub fn scheme(&self) -> Scheme {
        match self {
            Self::Host { scheme, .. } => *scheme,
            Self::Unix(_) => Scheme::Unix,
        }
    }

    /// The host and the port, if it has such.
    pub fn host(&self) -> Option<(&str, u16)> {
        match self {
            Self::Host { host, port, .. } => Some((host, *port)),
            Self::Unix(_) => None,
        }
    }

    /// Where this is: a host is looked up. At least one on success.
    pub fn resolve(&self) -> Result<Vec<Endpoint>, Error> {
        let (host, port) = match self {
            Self::Host { host, port, .. } => (host.as_str(), *port),
            Self::Unix(path) => return Ok(vec![Endpoint::Unix(path.clone())]),
        };
        let found: Vec<_> = (host, port)
            .to_socket_addrs()
            .map_err(|source| {
                // getaddrinfo's own errors carry no errno.
                let errno = source.raw_os_error().unwrap_or(libc::ENOENT);
                Error::Io {
                    context: format!("Cannot look up host {host:?} ({source})"),
                    source: std::io::Error::from_raw_os_error(errno),
                }
            })?
            .map(Endpoint::Ip)
            .collect();
        if found.is_empty() {
            return Err(Error::io(
                format!("Host {host:?} has no address"),
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
                "{text:?} is not an address: {why}. Write raio://HOST:PORT, raio+tcp://HOST:PORT, \
                 raio+unix:///?socket=PATH or, for a listener, tcp://HOST:PORT or unix://PATH."
            ))
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, host, port) = match self {
            Self::Host { scheme, host, port } => (scheme, host, port),
            Self::Unix(path) => {
                return write!(f, "unix://{}", percent_encode(path.as_os_str().as_bytes(), &ENCODED));
            }
        };
        let scheme = match scheme {
            Scheme::Any => "raio",
            Scheme::Tcp => "tcp",
            Scheme::Rdma => "rdma",
            Scheme::Unix => "unix",
        };
        if host.contains(':') {
            write!(f, "{scheme}://[{host}]:{port}")
        } else {
            write!(f, "{scheme}://{host}:{port}")
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
            let expected = Address::Host { scheme, host: host.into(), port };
            assert_eq!(text.parse::<Address>().unwrap(), expected, "{text}");
            assert_eq!(expected.to_string().parse::<Address>().unwrap(), expected);
        }
        for (text, path) in [
            ("unix:///run/raio.sock", "/run/raio.sock"),
            ("raio+unix://?socket=/run/raio.sock", "/run/raio.sock"),
            ("raio+unix:///?socket=/a%20%3fb=c", "/a ?b=c"),
            ("unix:///%E2%82%AC%25", "/\u{20ac}%"),
        ] {
            let expected = Address::Unix(path.into());
            assert_eq!(text.parse::<Address>().unwrap(), expected, "{text}");
            assert_eq!(expected.to_string().parse::<Address>().unwrap(), expected);
            assert_eq!(expected.resolve().unwrap(), [Endpoint::Unix(path.into())]);
        }
        let bytes = Address::Unix(OsString::from_vec(b"/\xff\n".to_vec()).into());
        assert_eq!(bytes.to_string().parse::<Address>().unwrap(), bytes);
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
            "unix://run/raio.sock",
            "unix://",
            "unix:///a%00b",
            "raio+unix:///run/raio.sock",
            "raio+unix:///export/file?socket=/run/raio.sock",
            "raio+unix://?path=/run/raio.sock",
            "raio+unix://?socket=",
            "raio+unix://?socket=/a&b=c",
            &format!("unix:///{}", "x".repeat(107)),
        ] {
            let error = text.parse::<Address>().unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL, "{text}");
            assert!(error.to_string().ends_with('.'), "{error}");
        }
    }
}
