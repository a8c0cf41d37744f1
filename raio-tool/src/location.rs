//! What an argument of the command line stands for: a file of this machine, of a server, a stream.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::failure::Failure;

/// A file, as the user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// `-`: standard input or output.
    Stream,
    /// `null:`: what is written there is thrown away.
    Null,
    /// On this machine.
    Local(PathBuf),
    /// On the server at this URL, or at the one in RAIO_URL; the path is /EXPORT/path/beneath/it.
    Remote {
        /// None: the server in RAIO_URL.
        server: Option<String>,
        /// The file's name there; any bytes.
        path: PathBuf,
    },
}

impl Location {
    /// What an argument stands for. One with a raio scheme, or a colon in front of a slash, is remote;
    /// everything else is local.
    pub fn parse(argument: &OsString) -> Result<Self, Failure> {
        Self::parse_as(argument, false)
    }

    /// The same; a server's URL alone, or `:/`, is the list of its exports.
    pub fn parse_directory(argument: &OsString) -> Result<Self, Failure> {
        Self::parse_as(argument, true)
    }

    fn parse_as(argument: &OsString, may_be_server: bool) -> Result<Self, Failure> {
        let bytes = argument.as_bytes();
        if bytes == b"-" {
            return Ok(Self::Stream);
        }
        if bytes == b"null:" {
            return Ok(Self::Null);
        }
        if bytes.starts_with(b":/") {
            return Ok(Self::Remote { server: None, path: path(&bytes[1..]) });
        }
        let is_remote = bytes.starts_with(b"raio://") || bytes.starts_with(b"raio+");
        let Some(at) = bytes.windows(3).position(|it| it == b"://").filter(|_| is_remote) else {
            return Ok(Self::Local(path(bytes)));
        };
        let (scheme, rest) = (&bytes[..at + 3], &bytes[at + 3..]);
        let needs_path = || {
            Failure::usage(format!(
                "{} names a server, but no file there. Write the file's path behind it, /EXPORT/PATH.",
                argument.to_string_lossy()
            ))
        };
        let slash = rest.iter().position(|&it| it == b'/').ok_or_else(needs_path);
        let slash = if may_be_server { slash.unwrap_or(rest.len()) } else { slash? };
        let (host, file) = rest.split_at(slash);
        let file = if file.is_empty() { b"/" } else { file };
        let (file, query) = match host {
            // raio+unix:///EXPORT/path?socket=PATH
            b"" => match file.windows(8).position(|it| it == b"?socket=") {
                Some(at) => (&file[..at], Some(&file[at..])),
                None => (file, None),
            },
            _ => (file, None),
        };
        if file == b"/" && !may_be_server {
            return Err(needs_path());
        }
        let mut server = scheme.to_vec();
        server.extend_from_slice(host);
        if let Some(query) = query {
            server.push(b'/');
            server.extend_from_slice(query);
        }
        let server = String::from_utf8(server).map_err(|_| {
            Failure::usage(format!("The server in {} is not UTF-8.", argument.to_string_lossy()))
        })?;
        Ok(Self::Remote { server: Some(server), path: path(file) })
    }

    /// Where something goes that is to have this place: itself, or if it is a directory its name in there.
    /// `several` are to go there.
    pub fn for_source(&self, from: &Self, is_directory: bool, several: bool) -> Result<Self, Failure> {
        let name = || {
            let (Self::Local(path) | Self::Remote { path, .. }) = from else {
                let text = format!("{from} has no name, so {self} cannot be a directory.");
                return Err(Failure::usage(text));
            };
            path.file_name().ok_or_else(|| Failure::usage(format!("{from} has no file name.")))
        };
        match self {
            Self::Null => Ok(Self::Null),
            _ if is_directory => Ok(self.join(Path::new(name()?))),
            _ if several => Err(Failure::usage(format!(
                "{self} is not a directory, so it cannot have several files. Name a directory."
            ))),
            other => Ok(other.clone()),
        }
    }

    /// What is at this path below it; a stream has nothing below.
    pub fn join(&self, below: &Path) -> Self {
        let joined = |path: &PathBuf| {
            if below.as_os_str().is_empty() { path.clone() } else { path.join(below) }
        };
        match self {
            Self::Local(path) => Self::Local(joined(path)),
            Self::Remote { server, path } => Self::Remote { server: server.clone(), path: joined(path) },
            Self::Stream | Self::Null => self.clone(),
        }
    }

    /// What a command line would have for it: as it is displayed, with every byte of its path.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (before, path, behind) = match self {
            Self::Stream => return b"-".into(),
            Self::Null => return b"null:".into(),
            Self::Local(path) => ("", path, None),
            Self::Remote { server: None, path } => (":", path, None),
            Self::Remote { server: Some(server), path } => match server.split_once("/?") {
                Some((scheme, query)) => (scheme, path, Some(query)),
                None => (server.as_str(), path, None),
            },
        };
        let mut bytes = [before.as_bytes(), path.as_os_str().as_bytes()].concat();
        if let Some(query) = behind {
            bytes.push(b'?');
            bytes.extend_from_slice(query.as_bytes());
        }
        bytes
    }
}

fn path(bytes: &[u8]) -> PathBuf {
    OsString::from_vec(bytes.to_vec()).into()
}

impl FromStr for Location {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        Self::parse(&text.into())
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stream => f.write_str("-"),
            Self::Null => f.write_str("null:"),
            Self::Local(path) => path.display().fmt(f),
            Self::Remote { server: None, path } => write!(f, ":{}", path.display()),
            Self::Remote { server: Some(server), path } => match server.split_once("/?") {
                Some((scheme, query)) => write!(f, "{scheme}{}?{query}", path.display()),
                None => write!(f, "{server}{}", path.display()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(server: Option<&str>, path: &str) -> Location {
        Location::Remote { server: server.map(Into::into), path: path.into() }
    }

    #[test]
    fn a_raio_scheme_or_a_colon_and_a_slash_make_it_remote_and_everything_else_is_local() {
        for (text, location) in [
            ("raio://h/e/f", remote(Some("raio://h"), "/e/f")),
            ("raio+tcp://[::1]:7/e", remote(Some("raio+tcp://[::1]:7"), "/e")),
            ("raio+unix:///e/f?socket=/run/s", remote(Some("raio+unix:///?socket=/run/s"), "/e/f")),
            (":/e/f", remote(None, "/e/f")),
            ("-", Location::Stream),
            ("null:", Location::Null),
        ] {
            assert_eq!(text.parse::<Location>().unwrap(), location, "{text}");
            assert_eq!(location.to_string(), text);
        }
        for text in ["f", "./-", "./:/e", ":f", "http://h/f", "raio", "raio:/x", "/raio://h/e"] {
            assert_eq!(text.parse::<Location>().unwrap(), Location::Local(text.into()), "{text}");
        }
    }

    #[test]
    fn a_server_without_a_file_is_refused() {
        for text in ["raio://h", "raio://h/", "raio+unix:///?socket=/run/s"] {
            let failure = text.parse::<Location>().unwrap_err();
            assert!(failure.to_string().contains("no file there"), "{text}: {failure}");
        }
    }

    #[test]
    fn a_server_alone_is_the_list_of_its_exports_where_that_makes_sense() {
        for (text, location) in [
            ("raio://h", remote(Some("raio://h"), "/")),
            ("raio://h/", remote(Some("raio://h"), "/")),
            (":/", remote(None, "/")),
            ("raio+unix:///?socket=/run/s", remote(Some("raio+unix:///?socket=/run/s"), "/")),
        ] {
            assert_eq!(Location::parse_directory(&text.into()).unwrap(), location, "{text}");
        }
    }

    #[test]
    fn what_is_below_a_place_has_a_name_that_leads_there() {
        for (text, below) in [
            ("raio://h/e", "raio://h/e/a/b"),
            (":/", ":/a/b"),
            ("d", "d/a/b"),
            ("raio+unix:///e?socket=/s", "raio+unix:///e/a/b?socket=/s"),
        ] {
            let location = Location::parse_directory(&text.into()).unwrap().join(Path::new("a/b"));
            assert_eq!(location.to_bytes(), below.as_bytes());
            assert_eq!(location.to_string(), below);
        }
    }

    #[test]
    fn in_a_directory_a_file_keeps_its_name() {
        let at = |text: &str| text.parse::<Location>().unwrap();
        let from = at(":/e/a/f");
        assert_eq!(at("d").for_source(&from, true, true).unwrap(), at("d/f"));
        assert_eq!(at(":/e/d/").for_source(&from, true, false).unwrap().to_string(), ":/e/d/f");
        assert_eq!(at("g").for_source(&from, false, false).unwrap(), at("g"));
        assert!(at("g").for_source(&from, false, true).is_err(), "several files into one");
        assert!(at("d").for_source(&Location::Stream, true, false).is_err(), "a stream has no name");
    }

    #[test]
    fn paths_may_have_any_bytes() {
        let name = OsString::from_vec(b":/e/\xff".to_vec());
        let Location::Remote { path, .. } = Location::parse(&name).unwrap() else { panic!("not remote") };
        assert_eq!(path.as_os_str().as_bytes(), b"/e/\xff");
    }
}
