//! A server whose clients have keys, and such clients.

use std::fs::{self, File, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use raio::{Error, Keys, Options, Session};
use raio_transport::key_directory::KeyDirectory;
use raio_transport::keys::{PublicKey, SecretKey};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::server::{Server, binary};

/// A server with exports `data`, `logs` and `other`, all of them writable, and its keys.
pub struct Site {
    /// Its exports and keys.
    pub directory: TempDir,
    /// The server.
    pub server: Server,
}

impl Site {
    /// With these clients, as `clients.toml` says.
    pub fn new(clients: &str) -> Self {
        Self::at(clients, "tcp://127.0.0.1:0")
    }

    /// The same, listening there.
    pub fn at(clients: &str, listen: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        for name in ["data", "logs", "other"] {
            fs::create_dir(directory.path().join(name)).expect("a directory");
            fs::write(directory.path().join(name).join("file"), b"0123456789").expect("a file");
        }
        let keys = directory.path().join("keys");
        fs::create_dir(&keys).expect("a directory");
        fs::write(keys.join("clients.toml"), clients).expect("a file");
        let server = Self::start(&directory, listen);
        Self { directory, server }
    }

    /// Starts one over this directory.
    pub fn start(directory: &TempDir, listen: &str) -> Server {
        let path = directory.path();
        let exports = ["data", "logs", "other"].map(|name| format!("{name}={}/{name},rw", path.display()));
        let keys = path.join("keys");
        let exports = exports.each_ref().map(String::as_str);
        Server::start_with(&exports, &["--listen", listen, "--keys", keys.to_str().expect("UTF-8")])
    }

    /// With these clients, and with this `data`. Other users can reach it, and files can be given to them.
    pub fn open_to_users(clients: &str, data: &Path, arguments: &[&str], log: Option<File>) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).expect("it is ours");
        let keys = directory.path().join("keys");
        fs::create_dir(&keys).expect("a directory");
        fs::write(keys.join("clients.toml"), clients).expect("a file");
        let mut command = Command::new(binary("raio_server"));
        command.args(["--listen", "tcp://127.0.0.1:0", "--export", &format!("data={},rw", data.display())]);
        command.arg("--keys").arg(keys).args(arguments);
        if let Some(log) = log {
            command.stderr(log);
        }
        Self { server: Server::spawn(command), directory }
    }

    /// With these clients, and these exports, as tables of the configuration file. They lie in `DIRECTORY`,
    /// which has directories `data`, `logs` and `other`. Returns also the server's log.
    pub fn configured(clients: &str, exports: &str) -> (Self, PathBuf) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        for name in ["data", "logs", "other", "keys"] {
            fs::create_dir(path(name)).expect("a directory");
        }
        fs::write(path("keys/clients.toml"), clients).expect("a file");
        let exports = exports.replace("DIRECTORY", directory.path().to_str().expect("UTF-8"));
        fs::write(path("raio.toml"), exports).expect("a file");
        let log = path("log");
        let server = Self::start_configured(&directory);
        (Self { directory, server }, log)
    }

    /// Starts one over the directory of [`Site::configured`], whose log goes behind that of others before it.
    pub fn start_configured(directory: &TempDir) -> Server {
        let path = |name: &str| directory.path().join(name);
        let mut command = Command::new(binary("raio_server"));
        command.args(["--listen", "tcp://127.0.0.1:0", "--workers", "2", "--config"]).arg(path("raio.toml"));
        command.arg("--keys").arg(path("keys"));
        command.stderr(File::options().create(true).append(true).open(path("log")).expect("a file"));
        Server::spawn(command)
    }

    /// The server's public key.
    pub fn host_key(&self) -> PublicKey {
        let path = self.directory.path().join("keys/host.key");
        SecretKey::load(&path).expect("the server has made it").public()
    }

    /// Has the server read again who may connect.
    pub fn set_clients(&self, clients: &str) {
        fs::write(self.directory.path().join("keys/clients.toml"), clients).expect("a file");
        self.server.signal(Signal::HUP);
    }

    /// Where this is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// Has the clients whose keys are in a directory trust the server that they reach at an address.
pub fn pin(keys: &Path, address: SocketAddr, host: PublicKey) {
    KeyDirectory::new(keys).pin(&address.ip().to_string(), address.port(), host).expect("it is pinned");
}

/// A client with a key of its own, that trusts a server.
pub struct Client {
    /// Its directory of keys.
    pub keys: TempDir,
    /// Its public key.
    pub key: PublicKey,
}

#[allow(clippy::new_without_default)] // each is another one
impl Client {
    /// With a new key.
    pub fn new() -> Self {
        let keys = tempfile::tempdir().expect("a directory");
        let key = SecretKey::create(&keys.path().join("key")).expect("a key").public();
        Self { keys, key }
    }

    /// Its table in `clients.toml`.
    pub fn entry(&self, name: &str, rest: &str) -> String {
        format!("[client.{name}]\nkeys = ['{}']\n{rest}\n", self.key)
    }

    /// Its key.
    pub fn secret(&self) -> SecretKey {
        SecretKey::load(&self.keys.path().join("key")).expect("it is there")
    }

    /// Trusts a server.
    pub fn trust(&self, site: &Site) {
        pin(self.keys.path(), site.server.address(), site.host_key());
    }

    /// Connects to a server, which it trusts.
    pub fn connect(&self, site: &Site) -> Result<Session, Error> {
        self.trust(site);
        let keys = Keys::Directory(self.keys.path().to_owned());
        Session::connect(&site.server.url(), &Options { keys, ..Options::default() })
    }
}
