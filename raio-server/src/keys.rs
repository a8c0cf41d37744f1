//! Who may connect, and what for: the server's own key, and its clients' keys with what each may open.
//!
//! A directory has both: `host.key`, which is made at the first start, and `clients.toml`:
//!
//! ```toml
//! [client.db1]
//! keys = ["ed25519:...", { key = "ed25519:...", expires = 2027-06-30 }]
//! exports = { data = "rw", logs = "ro" }
//! rdma = "clear"
//! ```

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, anyhow, bail};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use raio_transport::handshake::Identity;
use raio_transport::keys::{PublicKey, SecretKey};
use raio_transport::sync::lock;
use serde::Deserialize;
use toml::Spanned;
use toml::value::Datetime;

use crate::config::place;

const HOST_KEY: &str = "host.key";
const CLIENTS: &str = "clients.toml";

/// What is in `clients.toml` at first.
const CLIENTS_AT_FIRST: &str = "\
# Who may connect, and what each may open. After a change: kill -HUP the server. See raio_server(8).
#
# [client.NAME]
# keys = [\"ed25519:...\"]
# exports = { EXPORT = \"ro\", OTHER = \"rw\" }
";

/// What a client may open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Every export, as it is exported: there are no keys.
    All,
    /// These, each for reading, or also for writing.
    Of(Arc<Client>),
    /// Nothing.
    None,
}

impl Rights {
    /// Whether an export exists for the client, and if so whether it may write.
    pub fn of_export(&self, name: &str) -> Option<bool> {
        match self {
            Self::All => Some(true),
            Self::Of(client) => client.exports.get(name).map(|&access| access == Access::ReadWrite),
            Self::None => None,
        }
    }
}

/// A client of the file.
#[derive(Debug, PartialEq, Eq)]
pub struct Client {
    /// What the file calls it.
    pub name: String,
    exports: BTreeMap<String, Access>,
    /// Its data may go over RDMA, where it is not sealed.
    pub may_use_rdma: bool,
}

impl Client {
    /// Whether it may do all that another one may.
    fn covers(&self, other: &Self) -> bool {
        let covers = |name: &String, access| self.exports.get(name).is_some_and(|ours| *ours >= access);
        (self.may_use_rdma || !other.may_use_rdma)
            && other.exports.iter().all(|(name, &access)| covers(name, access))
    }
}

/// How a client may use an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
enum Access {
    #[serde(rename = "ro")]
    ReadOnly,
    #[serde(rename = "rw")]
    ReadWrite,
}

/// A client's key.
#[derive(Debug)]
struct Entry {
    client: Arc<Client>,
    expires: Option<Timestamp>,
}

impl Entry {
    fn is_valid(&self, now: Timestamp) -> bool {
        self.expires.is_none_or(|expires| now < expires)
    }
}

/// All clients' keys, at a time.
#[derive(Debug, Default)]
struct Clients(HashMap<PublicKey, Entry>);

/// See the module documentation.
#[derive(Debug)]
pub struct Keys {
    directory: PathBuf,
    host: SecretKey,
    /// Replaced whole.
    clients: Mutex<Arc<Clients>>,
}

impl Keys {
    /// Reads the directory. With `make`, makes what is missing: the directory, the key, and a file without
    /// clients.
    pub fn open(directory: &Path, make: bool) -> anyhow::Result<Self> {
        let cannot = || format!("Cannot use the directory of keys, {}", directory.display());
        if make {
            // A server that has given up root reads who may connect; its key alone is a secret.
            std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory).with_context(cannot)?;
        }
        let path = directory.join(HOST_KEY);
        let host = match SecretKey::load(&path) {
            Err(error) if error.errno() == libc::ENOENT && make => SecretKey::create(&path),
            loaded => loaded,
        };
        let clients = directory.join(CLIENTS);
        if make {
            let mut options = std::fs::OpenOptions::new();
            match options.write(true).create_new(true).mode(0o644).open(&clients) {
                Ok(mut file) => {
                    file.write_all(CLIENTS_AT_FIRST.as_bytes()).with_context(cannot)?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).with_context(cannot),
            }
        }
        let clients = Mutex::new(Arc::new(Clients::read(&clients)?));
        Ok(Self { directory: directory.to_owned(), host: host?, clients })
    }

    fn clients(&self) -> Arc<Clients> {
        Arc::clone(&lock(&self.clients))
    }

    /// The server's key.
    pub fn host(&self) -> &SecretKey {
        &self.host
    }

    /// How many keys clients may have.
    pub fn len(&self) -> usize {
        self.clients().0.len()
    }

    /// The client that has this key, unless that has expired.
    pub fn client(&self, key: &PublicKey) -> Option<Arc<Client>> {
        let clients = self.clients();
        let entry = clients.0.get(key).filter(|entry| entry.is_valid(Timestamp::now()))?;
        Some(Arc::clone(&entry.client))
    }

    /// What a client may open.
    pub fn rights(&self, identity: &Identity) -> Rights {
        match identity {
            Identity::Anonymous => Rights::None,
            Identity::Key(key) => self.client(key).map_or(Rights::None, Rights::Of),
        }
    }

    /// Reads `clients.toml` again. Returns the keys that may do less than before; after an error all is as
    /// it was.
    pub fn reread(&self) -> anyhow::Result<HashSet<PublicKey>> {
        let new = Arc::new(Clients::read(&self.directory.join(CLIENTS))?);
        let old = std::mem::replace(&mut *lock(&self.clients), Arc::clone(&new));
        let now = Timestamp::now();
        let is_less = |(key, entry): &(&PublicKey, &Entry)| {
            let new = new.0.get(key).filter(|new| new.is_valid(now));
            !new.is_some_and(|new| new.client.covers(&entry.client))
        };
        Ok(old.0.iter().filter(is_less).map(|(key, _)| *key).collect())
    }

    /// The keys that have expired.
    pub fn expired(&self) -> HashSet<PublicKey> {
        let now = Timestamp::now();
        let clients = self.clients();
        clients.0.iter().filter(|(_, entry)| !entry.is_valid(now)).map(|(key, _)| *key).collect()
    }

    /// When the next key expires.
    pub fn next_expiry(&self) -> Option<Timestamp> {
        let now = Timestamp::now();
        let clients = self.clients();
        clients.0.values().filter_map(|entry| entry.expires).filter(|&expires| expires > now).min()
    }

    /// The exports that clients may open by the file, and that are none of these.
    pub fn unknown_exports<'a>(&self, exports: impl Iterator<Item = &'a str>) -> Vec<String> {
        let known: HashSet<&str> = exports.collect();
        let clients = self.clients();
        let named = clients.0.values().flat_map(|entry| entry.client.exports.keys());
        let mut unknown: Vec<_> = named.filter(|name| !known.contains(name.as_str())).cloned().collect();
        unknown.sort();
        unknown.dedup();
        unknown
    }
}

// The file
// --------------------------------------------------------------------------------------------------------

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    client: BTreeMap<String, ClientTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClientTable {
    keys: Vec<Spanned<KeyOrTable>>,
    #[serde(default)]
    exports: BTreeMap<String, Access>,
    #[serde(default)]
    rdma: Rdma,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum KeyOrTable {
    Key(String),
    Table { key: String, expires: Option<Datetime> },
}

/// Whether data may go over RDMA, where it is not sealed.
#[derive(Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Rdma {
    #[default]
    No,
    Clear,
}

impl Clients {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("Cannot read who may connect, {}", path.display()))?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> anyhow::Result<Self> {
        let file: File = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(path.display().to_string(), |span| place(path, text, span.start));
            anyhow!("{at}: {}\nSee raio_server(8) for the form of {CLIENTS}.", error.message())
        })?;
        let mut all: HashMap<PublicKey, Entry> = HashMap::new();
        for (name, table) in file.client {
            let may_use_rdma = table.rdma == Rdma::Clear;
            let client = Arc::new(Client { name, exports: table.exports, may_use_rdma });
            for key in table.keys {
                let at = place(path, text, key.span().start);
                let (key, expires) = match key.into_inner() {
                    KeyOrTable::Key(key) => (key, None),
                    KeyOrTable::Table { key, expires } => (key, expires),
                };
                let expires = expires.map(expiry).transpose().map_err(|why| anyhow!("{at}: {why}."))?;
                let key: PublicKey = key.parse().map_err(|why| anyhow!("{at}: {key:?} is no key: {why}."))?;
                if let Some(before) = all.get(&key) {
                    bail!("{at}: {key} is a key of client {} already.", before.client.name);
                }
                all.insert(key, Entry { client: Arc::clone(&client), expires });
            }
        }
        Ok(Self(all))
    }
}

/// The moment from which on a key is not valid: a date is midnight in UTC, as its day begins.
fn expiry(datetime: Datetime) -> Result<Timestamp, String> {
    let text = datetime.to_string();
    let with_offset = text.parse::<Timestamp>();
    let date = text.parse::<jiff::civil::Date>();
    match (datetime.offset, datetime.time, date) {
        (Some(_), ..) => with_offset.map_err(|error| error.to_string()),
        (None, None, Ok(date)) => date
            .to_zoned(TimeZone::UTC)
            .map(|midnight| midnight.timestamp())
            .map_err(|error| error.to_string()),
        _ => Err(format!(
            "{text} is not a moment: write a date such as 2027-06-30, or a date and a time with its offset, \
             such as 2027-06-30T12:00:00Z"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> PublicKey {
        SecretKey::generate().public()
    }

    fn parse(text: &str) -> anyhow::Result<Clients> {
        Clients::parse(Path::new("clients.toml"), text)
    }

    #[test]
    fn clients_have_keys_and_exports() {
        let keys = [key(), key(), key(), key()];
        let text = format!(
            "[client.db1]\nkeys = ['{}', {{ key = '{}', expires = 2999-01-01 }},\n\
             {{ key = '{}', expires = 1999-12-31T23:59:59+01:00 }}]\n\
             exports = {{ data = 'rw', logs = 'ro' }}\nrdma = 'clear'\n[client.other]\nkeys = ['{}']\n",
            keys[0], keys[1], keys[2], keys[3]
        );
        let clients = parse(&text).unwrap();
        let now = Timestamp::now();
        assert_eq!(keys.map(|key| clients.0[&key].is_valid(now)), [true, true, false, true]);
        let rights = |key: &PublicKey| Rights::Of(Arc::clone(&clients.0[key].client));
        for key in &keys[..3] {
            let exports = ["data", "logs", "other"].map(|name| rights(key).of_export(name));
            assert_eq!(exports, [Some(true), Some(false), None]);
            assert!(clients.0[key].client.may_use_rdma);
        }
        assert_eq!(rights(&keys[3]).of_export("data"), None);
        assert!(!clients.0[&keys[3]].client.may_use_rdma);
        assert_eq!(parse("").unwrap().0.len(), 0);
    }

    #[test]
    fn mistakes_are_told_with_line_and_column() {
        let key = key();
        for (text, at, needle) in [
            ("[client.a]\nkeys = ['rsa:x']".to_owned(), "2:9", "no key"),
            ("[client.a]\nexports = {}".into(), "1:1", "keys"),
            (format!("[client.a]\nkeys = ['{key}']\nexports = {{ x = 'RW' }}"), "3:17", "`rw`"),
            (format!("[client.a]\nkeys = ['{key}']\nrdma = 'yes'"), "3:8", "`clear`"),
            (format!("[client.a]\nkeys = ['{key}']\nexport = {{}}"), "3:1", "export"),
            (
                format!("[client.a]\nkeys = ['{key}']\n[client.b]\nkeys = [\n'{key}']"),
                "5:1",
                "client a already",
            ),
            (format!("[client.a]\nkeys = [{{ key = '{key}', expires = 10:00:00 }}]"), "2:9", "not a moment"),
            (format!("[clients.a]\nkeys = ['{key}']"), "1:2", "clients"),
        ] {
            let error = parse(&text).unwrap_err().to_string();
            let at = format!("clients.toml:{at}: ");
            assert!(error.starts_with(&at) && error.contains(needle), "{text} ({at}): {error}");
        }
    }

    #[test]
    fn a_directory_is_made_at_the_first_start_and_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        assert!(Keys::open(&path, false).is_err());
        let first = Keys::open(&path, true).unwrap();
        assert_eq!(first.len(), 0);
        let again = Keys::open(&path, true).unwrap();
        assert_eq!(first.host().public(), again.host().public());
        assert!(Keys::open(&path, false).is_ok());
    }

    #[test]
    fn those_who_may_do_less_than_before_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        let keys = Keys::open(&path, true).unwrap();
        let all = [key(), key(), key(), key(), key()];
        let write = |clients: &[(usize, &str)]| {
            let table =
                |&(n, rest): &(usize, &str)| format!("[client.c{n}]\nkeys = ['{}']\n{rest}\n", all[n]);
            let text: String = clients.iter().map(table).collect();
            std::fs::write(path.join(CLIENTS), text).unwrap();
        };
        write(&[
            (0, "exports = { a = 'rw' }"),
            (1, "exports = { a = 'rw' }"),
            (2, "exports = { a = 'ro' }"),
            (3, "exports = { a = 'ro', b = 'ro' }"),
            (4, "rdma = 'clear'"),
        ]);
        assert!(keys.reread().unwrap().is_empty());
        assert_eq!(keys.rights(&Identity::Key(all[1])).of_export("a"), Some(true));
        write(&[
            (1, "exports = { a = 'ro' }"),
            (2, "exports = { a = 'rw', b = 'ro' }"),
            (3, "exports = { a = 'ro' }"),
            (4, ""),
        ]);
        let less = HashSet::from([all[0], all[1], all[3], all[4]]);
        assert_eq!(keys.reread().unwrap(), less);
        assert_eq!(keys.rights(&Identity::Key(all[0])), Rights::None);
        assert_eq!(keys.rights(&Identity::Key(all[1])).of_export("a"), Some(false));
        // A mistake changes nothing.
        std::fs::write(path.join(CLIENTS), "[client").unwrap();
        assert!(keys.reread().is_err());
        assert_eq!(keys.len(), 4);
        assert_eq!(keys.rights(&Identity::Anonymous), Rights::None);
    }
}
