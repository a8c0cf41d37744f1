//! A client's keys in files: its own secret key, and the public keys of the servers that it trusts.
//!
//! - `key`: the client's secret key ([`SecretKey::load`]).
//! - `servers`: a line for each server, `HOST:PORT ed25519:KEY`, and behind it further keys that the server
//!   may have. `#` begins a comment.
//!
//! A server that has a line is *pinned*: it is reached by TLS alone, and only if it has one of these keys.

use std::fmt;
use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::address::Address;
use crate::environment;
use crate::error::Error;
use crate::keys::{PublicKey, SecretKey, check_owner};
use crate::random;
use crate::tls::ClientTls;
use crate::tuning::SERVERS_FILE_BYTES_MAX as FILE_BYTES_MAX;

/// A directory with a client's key and the keys of its servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyDirectory {
    path: PathBuf,
    /// Somebody has named it, so it is an error if there is none.
    is_named: bool,
}

impl KeyDirectory {
    /// The directory at this path. It is an error if there is none.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), is_named: true }
    }

    /// The directory that the environment names: `$RAIO_KEYS`, else `raio` in `$XDG_CONFIG_HOME` or in
    /// `$HOME/.config`. None without these variables, and in a program that has rights which its user does
    /// not have.
    pub fn from_environment() -> Option<Self> {
        Self::from_variables(environment::variable)
    }

    fn from_variables(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> Option<Self> {
        if let Some(path) = variable("RAIO_KEYS") {
            return Some(Self::new(path));
        }
        // The specification has relative paths ignored.
        let configuration = variable("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
        let configuration = configuration.or_else(|| Some(Path::new(&variable("HOME")?).join(".config")))?;
        Some(Self { path: configuration.join("raio"), is_named: false })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file with the client's secret key.
    pub fn key_file(&self) -> PathBuf {
        self.path.join("key")
    }

    /// The file with the servers' public keys.
    pub fn servers_file(&self) -> PathBuf {
        self.path.join("servers")
    }

    /// Makes it, for this user alone, if there is none.
    pub fn create(&self) -> Result<(), Error> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.path);
        made.map_err(|source| Error::io(format!("Cannot make the directory {}", self.path.display()), source))
    }

    /// The client's secret key. The error ENOKEY says how to make one.
    pub fn key(&self) -> Result<SecretKey, Error> {
        let path = self.key_file();
        SecretKey::load(&path).map_err(|error| match error.errno() {
            libc::ENOENT => {
                Error::io(format!("There is no key {}; make one with `raio key new`", path.display()), NO_KEY)
            }
            _ => error,
        })
    }

    /// The keys that a server may have; none if it is not pinned. `host` is as in a URL, IPv6 addresses
    /// without brackets.
    pub fn trusted(&self, host: &str, port: u16) -> Result<Vec<PublicKey>, Error> {
        let servers = parse(&self.read_servers()?).map_err(|error| self.malformed(error))?;
        let name = ServerName::new(host, port);
        Ok(servers
            .into_iter()
            .find(|server| server.name == name)
            .map(|server| server.keys)
            .unwrap_or_default())
    }

    /// How a server is connected to: None if it is not pinned. It is an error, ENOKEY, if it is and there is
    /// no key to reach it with.
    pub fn tls(&self, host: &str, port: u16) -> Result<Option<ClientTls>, Error> {
        let trusted = self.trusted(host, port)?;
        if trusted.is_empty() {
            return Ok(None);
        }
        let key = self.key().map_err(|error| match error {
            Error::Io { source, .. } if source.raw_os_error() == Some(libc::ENOKEY) => {
                let text = format!(
                    "{} is in {}, so it is reached with a key alone, and there is no key {}; make one with \
                     `raio key new`, and have the server's administrator add it",
                    ServerName::new(host, port),
                    self.servers_file().display(),
                    self.key_file().display()
                );
                Error::io(text, NO_KEY)
            }
            error => error,
        })?;
        Ok(Some(ClientTls::new(&key, &trusted)))
    }

    /// Pins a server to this key alone from now on. Makes the directory and the file if there are none. A
    /// reader, or a crash, finds either all of the old file or all of the new one.
    pub fn pin(&self, host: &str, port: u16, key: PublicKey) -> Result<(), Error> {
        self.create()?;
        let cannot = |source: Errno| {
            Error::io(format!("Cannot write {}", self.servers_file().display()), io::Error::from(source))
        };
        let cannot_io = |source| Error::io(format!("Cannot write {}", self.servers_file().display()), source);
        let directory = File::open(&self.path).map_err(cannot_io)?;
        // Another one who pins a server waits.
        flock(&directory, FlockOperation::LockExclusive).map_err(cannot)?;
        let text = pinned(&self.read_servers()?, &ServerName::new(host, port), key);
        let text = text.map_err(|error| self.malformed(error))?;
        if text.len() as u64 > FILE_BYTES_MAX {
            // It would not be read, so no server could be reached any more.
            let kib = FILE_BYTES_MAX >> 10;
            let path = self.servers_file();
            let what = format!("Cannot write {}; it would have more than {kib} KiB", path.display());
            return Err(Error::io(what, Errno::FBIG));
        }
        let new = self.path.join(format!(".servers-{}-{:016x}", std::process::id(), random::number()));
        let written =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new).and_then(|mut file| {
                file.write_all(text.as_bytes())?;
                file.sync_all()?;
                std::fs::rename(&new, self.servers_file())
            });
        written.and_then(|()| directory.sync_all()).map_err(|source| {
            let _ = std::fs::remove_file(&new);
            cannot_io(source)
        })
    }

    /// The text of `servers`; "" if there is no such file.
    fn read_servers(&self) -> Result<String, Error> {
        if !self.is_there()? {
            return Ok(String::new());
        }
        let path = self.servers_file();
        let cannot = |source: io::Error| Error::io(format!("Cannot read {}", path.display()), source);
        // A FIFO is not waited for.
        let mut options = OpenOptions::new();
        let file = match options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(String::new()),
            Err(error) if error.kind() == ErrorKind::PermissionDenied && !self.is_named && !self.is_own() => {
                return Ok(String::new());
            }
            file => file.map_err(cannot)?,
        };
        let metadata = file.metadata().map_err(cannot)?;
        if !metadata.is_file() {
            return Err(not_used(&path, libc::EACCES, "it is no regular file"));
        }
        check_safe(&path, &metadata)?;
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(cannot)?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            let why = format!("it has more than {} KiB", FILE_BYTES_MAX >> 10);
            return Err(not_used(&path, libc::EFBIG, &why));
        }
        String::from_utf8(bytes).map_err(|_| not_used(&path, libc::EINVAL, "it is not text in UTF-8"))
    }

    /// Whether there is a directory. Where it was not named, none is needed: a program may have a $HOME that
    /// is missing, or another user's. Who can write to it could take the file away, and with it all pins.
    fn is_there(&self) -> Result<bool, Error> {
        use ErrorKind::{NotADirectory, NotFound, PermissionDenied};
        match self.path.metadata() {
            Ok(metadata) => check_safe(&self.path, &metadata).map(|()| true),
            Err(error)
                if !self.is_named && matches!(error.kind(), NotFound | NotADirectory | PermissionDenied) =>
            {
                Ok(false)
            }
            Err(source) => Err(Error::io(format!("Cannot use the keys in {}", self.path.display()), source)),
        }
    }

    /// Whether it belongs to this user, as far as this user may see that.
    fn is_own(&self) -> bool {
        self.path.metadata().is_ok_and(|metadata| metadata.uid() == rustix::process::geteuid().as_raw())
    }

    fn malformed(&self, Malformed { line, why }: Malformed) -> Error {
        let text = format!(
            "{}:{line}: {why}; write HOST:PORT ed25519:KEY, with more keys behind it if there are",
            self.servers_file().display()
        );
        Error::io(text, Errno::INVAL)
    }
}

const NO_KEY: Errno = Errno::NOKEY;

fn not_used(path: &Path, errno: i32, why: &str) -> Error {
    Error::io(format!("{} is not used: {why}", path.display()), io::Error::from_raw_os_error(errno))
}

/// Checks that nobody but this user, and root, can change what has this metadata.
fn check_safe(path: &Path, metadata: &Metadata) -> Result<(), Error> {
    check_owner(metadata).map_err(|why| not_used(path, libc::EACCES, &why))?;
    if metadata.mode() & 0o022 != 0 {
        let mode = metadata.mode() & 0o777;
        let why = format!("others may write to it (mode {mode:03o}); use `chmod go-w`");
        return Err(not_used(path, libc::EACCES, &why));
    }
    Ok(())
}

/// What a server is known by.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ServerName {
    /// In lower case; addresses in the form that the standard library prints.
    host: String,
    port: u16,
}

impl ServerName {
    fn new(host: &str, port: u16) -> Self {
        let host = match host.parse::<IpAddr>() {
            Ok(ip) => ip.to_canonical().to_string(),
            // The dot that ends a complete domain name does not make it another one.
            Err(_) => host.strip_suffix('.').unwrap_or(host).to_lowercase(),
        };
        Self { host, port }
    }

    fn parse(text: &str) -> Result<Self, &'static str> {
        if text.parse::<PublicKey>().is_ok() {
            return Err("a key stands where the server is to be named");
        }
        if text.contains('/') {
            return Err("a server is named without a scheme or a path");
        }
        if !text.contains(':') || text.ends_with(']') {
            return Err("the server has no port");
        }
        let address = Address::parse(&format!("raio://{text}")).map_err(|why| match why {
            "it names no host" => "the server has no host",
            "its port is not a number from 0 to 65535" => "the server's port is not a number up to 65535",
            why => why,
        })?;
        match address.host() {
            Some((host, port @ 1..)) => Ok(Self::new(host, port)),
            _ => Err("no server has port 0"),
        }
    }
}

impl fmt::Display for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

/// A line of `servers`.
#[derive(Debug, PartialEq, Eq)]
struct Server {
    /// Which line it is.
    line: usize,
    name: ServerName,
    /// At least one.
    keys: Vec<PublicKey>,
}

/// What is wrong with `servers`.
#[derive(Debug, PartialEq, Eq)]
struct Malformed {
    line: usize,
    why: String,
}

/// Reads the text of `servers`.
fn parse(text: &str) -> Result<Vec<Server>, Malformed> {
    let mut servers = Vec::<Server>::new();
    for (at, line) in text.lines().enumerate() {
        let line_number = at + 1;
        let malformed = |why: String| Malformed { line: line_number, why };
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let Some(name) = words.next() else { continue };
        let name = ServerName::parse(name).map_err(|why| malformed(why.into()))?;
        let keys = words.map(|word| {
            word.parse().map_err(|why| malformed(format!("{word:?} is not a public key: {why}")))
        });
        let keys = keys.collect::<Result<Vec<_>, _>>()?;
        if keys.is_empty() {
            return Err(malformed(format!("{name} has no key")));
        }
        if let Some(other) = servers.iter().find(|other| other.name == name) {
            return Err(malformed(format!("line {} has {name} already", other.line)));
        }
        servers.push(Server { line: line_number, name, keys });
    }
    Ok(servers)
}

/// The text of `servers` with this server pinned to that key. All other lines stay as they are.
fn pinned(text: &str, name: &ServerName, key: PublicKey) -> Result<String, Malformed> {
    let servers = parse(text)?;
    let own = servers.iter().find(|server| server.name == *name).map(|server| server.line);
    let pin = format!("{name} {key}");
    let lines = text.lines().enumerate();
    let lines = lines.map(|(at, line)| if own == Some(at + 1) { pin.as_str() } else { line });
    let appended = own.is_none().then_some(pin.as_str());
    Ok(lines.chain(appended).flat_map(|line| [line, "\n"]).collect())
}

#[cfg(test)]
mod tests;
