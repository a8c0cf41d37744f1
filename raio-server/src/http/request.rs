//! Reads the head of a request (RFC 9112). Whatever is not plainly right is rejected: nothing that is meant
//! for this server needs the odd forms.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::tuning::http::HEAD_BYTES_MAX;

/// The head of a request, in the bytes that it was read from.
#[derive(Debug, PartialEq, Eq)]
pub struct Head<'a> {
    /// The method, in capitals.
    pub method: &'a str,
    /// Where to, from the `/` on and up to a `?`.
    pub path: &'a str,
    /// What comes after the `?`.
    pub query: &'a str,
    /// By which name the client knows this server.
    pub host: Option<&'a str>,
    /// The header `Authorization`.
    pub authorization: Option<&'a str>,
    /// It is HTTP/1.0: there are no chunks, and the connection ends with the response.
    pub is_old: bool,
    /// The client sends nothing more.
    pub is_last: bool,
}

/// Why a request is rejected.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    /// The status of HTTP.
    pub status: u16,
    /// What to do about it.
    pub text: &'static str,
}

const fn fault(status: u16, text: &'static str) -> Fault {
    Fault { status, text }
}

/// Reads a head, with the number of bytes that it takes. None: it has not come completely.
pub fn parse(input: &[u8]) -> Result<Option<(Head<'_>, usize)>, Fault> {
    let end = end_of_head(input)?;
    let Some(end) = end else {
        return if input.len() < HEAD_BYTES_MAX {
            Ok(None)
        } else {
            Err(fault(431, "The head of the request is longer than 8 KiB. Send fewer headers."))
        };
    };
    let mut lines =
        input[..end].split(|&byte| byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let mut head = parse_request_line(lines.next().unwrap_or_default())?;
    for line in lines {
        parse_header(line, &mut head)?;
    }
    if !head.is_old && head.host.is_none() {
        return Err(fault(400, "HTTP/1.1 needs the header Host."));
    }
    Ok(Some((head, end + 4)))
}

/// Where the empty line begins that ends a head. An error if there is a byte before that has no place in one:
/// what speaks another protocol is told early.
fn end_of_head(input: &[u8]) -> Result<Option<usize>, Fault> {
    let mut before = 0;
    for (at, &byte) in input.iter().enumerate() {
        if (byte == b'\n') != (before == b'\r') || (byte < b' ' && !matches!(byte, b'\r' | b'\n' | b'\t')) {
            return Err(fault(400, "This is not HTTP/1.1. Use http://, not https://."));
        }
        if at >= HEAD_BYTES_MAX {
            return Ok(None);
        }
        if input[..=at].ends_with(b"\r\n\r\n") {
            return Ok(Some(at - 3));
        }
        before = byte;
    }
    Ok(None)
}

fn parse_request_line(line: &[u8]) -> Result<Head<'_>, Fault> {
    const FORM: Fault = fault(400, "The first line is not that of a request. Write GET /PATH HTTP/1.1.");
    let line = std::str::from_utf8(line).map_err(|_| FORM)?;
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(FORM);
    };
    if method.is_empty() || !method.bytes().all(|byte| byte.is_ascii_uppercase()) {
        return Err(FORM);
    }
    let is_old = match version {
        "HTTP/1.1" => false,
        "HTTP/1.0" => true,
        _ if version.starts_with("HTTP/") => return Err(fault(505, "Use HTTP/1.1.")),
        _ => return Err(FORM),
    };
    if !target.starts_with('/') || !target.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(fault(400, "The target is not a path. Write /PATH, and no URL."));
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    Ok(Head { method, path, query, host: None, authorization: None, is_old, is_last: is_old })
}

fn parse_header<'a>(line: &'a [u8], head: &mut Head<'a>) -> Result<(), Fault> {
    const FORM: Fault = fault(400, "A header is not of the form NAME: VALUE.");
    let colon = line.iter().position(|&byte| byte == b':').ok_or(FORM)?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    if name.is_empty() || !name.iter().all(is_name) {
        return Err(FORM);
    }
    let is = |other: &str| name.eq_ignore_ascii_case(other.as_bytes());
    // Text that is no UTF-8 is fine where nobody reads it.
    let value = || std::str::from_utf8(value.trim_ascii()).map_err(|_| FORM);
    if is("host") {
        if head.host.replace(value()?).is_some() {
            return Err(fault(400, "There are two headers Host."));
        }
    } else if is("authorization") {
        if head.authorization.replace(value()?).is_some() {
            return Err(fault(400, "There are two headers Authorization."));
        }
    } else if is("connection") {
        head.is_last |= value()?.split(',').any(|option| option.trim().eq_ignore_ascii_case("close"));
    } else if is("transfer-encoding") || (is("content-length") && value()? != "0") {
        return Err(fault(413, "Nothing here takes a body. Send none."));
    }
    Ok(())
}

/// Whether a client means this server: a browser that was made to ask it by a page of somebody else's says
/// the name of that. An IP address and `localhost` are nobody's names, and these are others of this server.
pub fn is_our_name(host: &str, names: &[String]) -> bool {
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    if let Some(rest) = host.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else { return false };
        return address.parse::<Ipv6Addr>().is_ok()
            && port.strip_prefix(':').map_or(port.is_empty(), is_port);
    }
    let name = match host.rsplit_once(':') {
        Some((name, port)) if is_port(port) => name,
        Some(_) => return false,
        None => host,
    };
    name.parse::<Ipv4Addr>().is_ok()
        || name.eq_ignore_ascii_case("localhost")
        || names.iter().any(|ours| ours.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn status(input: &[u8]) -> u16 {
        match parse(input) {
            Ok(Some(_)) => 200,
            Ok(None) => 0,
            Err(fault) => fault.status,
        }
    }

    #[test]
    fn a_head_is_read_and_what_follows_is_left() {
        let input =
            b"GET /a/b?c=d?e HTTP/1.1\r\nHost: x:1\r\nAccept:\r\nAUTHORIZATION:  Bearer y\t\r\n\r\nGET";
        let (head, len) = parse(input).unwrap().unwrap();
        let expected = Head {
            method: "GET",
            path: "/a/b",
            query: "c=d?e",
            host: Some("x:1"),
            authorization: Some("Bearer y"),
            is_old: false,
            is_last: false,
        };
        assert_eq!((head, &input[len..]), (expected, &b"GET"[..]));
        let (head, _) = parse(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: a, Close\r\n\r\n").unwrap().unwrap();
        assert!(head.is_last && !head.is_old);
        let (head, _) = parse(b"POST / HTTP/1.0\r\nContent-Length: 0\r\n\r\n").unwrap().unwrap();
        assert!(head.is_last && head.is_old && head.host.is_none());
    }

    #[test]
    fn whatever_is_odd_is_rejected() {
        let with = |header: &str| status(format!("GET / HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n").as_bytes());
        assert_eq!(with("A: b"), 200);
        for header in [
            "A : b",
            " A: b",
            "A",
            ": b",
            "A: b\r\n c",
            "A: b\0",
            "A: \x7f\x01",
            "A: b\nC: d",
            "A: b\rC: d",
            "Host: y",
            "Authorization: a\r\nAuthorization: b",
        ] {
            assert_eq!(with(header), 400, "{header:?}");
        }
        for header in ["Content-Length: 1", "Content-Length: +0", "Transfer-Encoding: chunked"] {
            assert_eq!(with(header), 413, "{header:?}");
        }
        for line in [
            "GET / HTTP/1.1",
            "GET  / HTTP/1.1",
            "get / HTTP/1.1",
            " / HTTP/1.1",
            "GET x HTTP/1.1",
            "GET http://x/ HTTP/1.1",
            "GET /\u{e4} HTTP/1.1",
            "GET / HTTP/1.1 ",
            "GET / FTP/1.1",
            "GET /",
            "",
        ] {
            assert_eq!(status(format!("{line}\r\n\r\n").as_bytes()), 400, "{line:?}");
        }
        assert_eq!(status(b"PRI * HTTP/2.0\r\n\r\n"), 505);
    }

    #[test]
    fn another_protocol_is_told_before_its_head_has_ended() {
        assert_eq!(status(b"\x16\x03\x01\x02\x00\x01"), 400);
        assert_eq!(status(b"GET / HTTP/1.1\0"), 400);
        assert_eq!(status(b"GET /\n"), 400);
        assert_eq!(status(b"GET / HTTP/1.1\r"), 0);
    }

    #[test]
    fn a_head_has_8_kib() {
        let of_len = |len: usize| {
            let head = "GET / HTTP/1.1\r\nHost: x\r\nA: ";
            format!("{head}{}\r\n\r\n", "a".repeat(len - head.len() - 4)).into_bytes()
        };
        assert_eq!(status(&of_len(HEAD_BYTES_MAX)), 200);
        assert_eq!(status(&of_len(HEAD_BYTES_MAX + 1)), 431);
        assert_eq!(status(&of_len(HEAD_BYTES_MAX + 1)[..HEAD_BYTES_MAX - 1]), 0);
    }

    #[test]
    fn names_that_a_foreign_page_can_have_are_not_ours() {
        let names = ["Store.example".to_owned()];
        for host in ["127.0.0.1", "10.0.0.1:7241", "[::1]", "[fe80::1]:80", "localhost:1", "LOCALHOST"] {
            assert!(is_our_name(host, &names), "{host}");
        }
        assert!(is_our_name("store.EXAMPLE:7241", &names) && !is_our_name("store.example", &[]));
        for host in [
            "",
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "127.0.0.1:80:80",
            "::1",
            "[::1",
            "[::1]x",
            "[::1]:x",
            "[127.0.0.1]",
            "localhost:x",
            "evil.example@localhost",
            "1",
        ] {
            assert!(!is_our_name(host, &names), "{host}");
        }
    }

    fn pieces() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            Just(b"GET /metrics?a=b HTTP/1.1\r\n".to_vec()),
            Just(b"Host: localhost\r\n".to_vec()),
            Just(b"Authorization: Bearer x\r\n".to_vec()),
            Just(b"Content-Length: 0\r\n".to_vec()),
            Just(b"Connection: close\r\n".to_vec()),
            Just(b"\r\n".to_vec()),
            Just(vec![b'x'; HEAD_BYTES_MAX / 2]),
            prop::collection::vec(any::<u8>(), 0..20),
        ];
        prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn what_is_decided_does_not_depend_on_how_it_arrives(input in pieces(), cut in any::<prop::sample::Index>()) {
            let cut = cut.index(input.len() + 1);
            match (parse(&input[..cut]), parse(&input)) {
                // What has come so far decides.
                (Ok(Some(early)), late) => prop_assert_eq!(late, Ok(Some(early))),
                (Err(early), late) => prop_assert_eq!(late, Err(early)),
                (Ok(None), Ok(Some((head, len)))) => {
                    prop_assert!(cut < len && len <= input.len() && len <= HEAD_BYTES_MAX);
                    prop_assert!(input[..len].ends_with(b"\r\n\r\n"));
                    prop_assert!(head.path.starts_with('/') && !head.path.contains(char::is_whitespace));
                }
                (Ok(None), Ok(None)) => prop_assert!(input.len() < HEAD_BYTES_MAX),
                (Ok(None), Err(fault)) => prop_assert!((400..=505).contains(&fault.status)),
            }
        }
    }
}
