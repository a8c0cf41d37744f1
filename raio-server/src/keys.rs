//! Who may connect, and what for: the server's own key, and its clients' keys with what each may open.
//!
//! A directory has both: `host.key`, which is made at the first start, and `clients.toml`:
//!
//! ```toml
//! [client.db1]
//! keys = ["ed25519:...", { key = "ed25519:...", expires = 2027-06-30 }]
//! users = ["postgres", 1001]
//! groups = ["backup"]
//! exports = { data = "rw", logs = "ro", home = { access = "rw", path = "db1/files" } }
//! owner = "postgres"
//! group = "data"
//! limits = { connections = 16, files = 1000, requests = 256, memory = "64M", iops = 5000 }
//! rdma = "clear"
//! ```
//!
//! Keys are for clients over a network; users and groups for those on this machine, over a Unix socket. A
//! user goes before its groups. One whose groups are those of several clients may do what any of them may.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, anyhow, bail, ensure};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use nix::unistd::{Group, User};
use raio_transport::credentials::Credentials;
use raio_transport::handshake::Identity;
use raio_transport::keys::{PublicKey, SecretKey};
use raio_transport::sync::lock;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, IntoDeserializer, MapAccess, Visitor};
use toml::Spanned;
use toml::value::Datetime;

use crate::config::place;
use crate::limits::Caps;
use crate::privileges::Giving;
use crate::size::Size;
use crate::subtree::{Access, Owner, Subtree};
use crate::throttle::{ClientRates, Rates, Share};

const HOST_KEY: &str = "host.key";
const CLIENTS: &str = "clients.toml";

/// What is in `clients.toml` at first.
const CLIENTS_AT_FIRST: &str = "\
# Who may connect, and what each may open. After a change: kill -HUP the server. See raio.toml(5).
#
# [client.NAME]
# keys = [\"ed25519:...\"]
# users = [\"USER\"]
# groups = [\"GROUP\"]
# exports = { EXPORT = \"ro\", OTHER = { access = \"rw\", path = \"DIRECTORY\" } }
";

/// What a client may open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Every export, as it is exported: there are no keys.
    All,
    /// What its entry says.
    Of(Arc<Client>),
    /// Nothing.
    None,
}

impl Rights {
    /// What the client may use of an export. Nothing: there is no such export for it.
    pub fn of_export(&self, name: &str) -> &[Subtree] {
        static EVERYTHING: [Subtree; 1] = [Subtree::whole(Access::ReadWrite, Owner { uid: None, gid: None })];
        match self {
            Self::All => &EVERYTHING,
            Self::Of(client) => client.exports.get(name).map_or(&[], |part| &part.subtrees),
            Self::None => &[],
        }
    }

    /// The client's name, and what its sessions may have together.
    pub fn limits(&self) -> Option<(&str, Caps)> {
        match self {
            Self::Of(client) => Some((client.name.as_str(), client.limits)),
            Self::All | Self::None => None,
        }
    }

    /// The client's name, and its rates on an export that it may use.
    pub fn rates(&self, export: &str) -> Option<(&str, ClientRates)> {
        match self {
            Self::Of(client) => Some((client.name.as_str(), client.rates_on(export)?)),
            Self::All | Self::None => None,
        }
    }

    /// Those of a client that has a directory of an export.
    #[cfg(test)]
    pub fn of_directory(export: &str, directory: &str) -> Self {
        let subtree = Subtree::beneath(directory, Access::ReadWrite, Owner::default()).unwrap();
        let part = ExportPart { subtrees: vec![subtree], share: Share::DEFAULT };
        Self::Of(Arc::new(Client {
            name: "test".into(),
            exports: [(export.to_owned(), part)].into(),
            limits: Caps::default(),
            rates: Rates::NONE,
            may_use_rdma: false,
        }))
    }
}

/// A client of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// What the file calls it.
    pub name: String,
    /// What it may use of each export.
    exports: BTreeMap<String, ExportPart>,
    /// What its sessions may have together.
    limits: Caps,
    /// How many operations and bytes a second they may have together, on all exports.
    rates: Rates,
    /// Its data may go over RDMA, where it is not sealed.
    pub may_use_rdma: bool,
}

/// What a client may use of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ExportPart {
    subtrees: Vec<Subtree>,
    share: Share,
}

impl Client {
    fn rates_on(&self, export: &str) -> Option<ClientRates> {
        self.exports.get(export).map(|part| ClientRates { all: self.rates, share: part.share })
    }

    /// Whether it may do all that another one may.
    fn covers(&self, other: &Self) -> bool {
        let covers = |name, subtree| {
            self.exports
                .get(name)
                .is_some_and(|ours: &ExportPart| ours.subtrees.iter().any(|own| own.covers(subtree)))
        };
        let mut subtrees =
            other.exports.iter().flat_map(|(name, part)| part.subtrees.iter().map(move |one| (name, one)));
        (self.may_use_rdma || !other.may_use_rdma) && subtrees.all(|(name, subtree)| covers(name, subtree))
    }

    /// One that may do and have what either may.
    fn or(&self, other: &Self) -> Self {
        let mut exports = self.exports.clone();
        for (name, part) in &other.exports {
            let merge = |ours: &mut ExportPart| {
                ours.subtrees.extend_from_slice(&part.subtrees);
                ours.share = ours.share.or(&part.share);
            };
            exports.entry(name.clone()).and_modify(merge).or_insert_with(|| part.clone());
        }
        Self {
            name: format!("{}+{}", self.name, other.name),
            exports,
            limits: self.limits.or(&other.limits),
            rates: self.rates.or(&other.rates),
            may_use_rdma: self.may_use_rdma || other.may_use_rdma,
        }
    }
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

/// All clients, at a time.
#[derive(Debug, Default)]
struct Clients {
    /// How many.
    len: usize,
    by_key: HashMap<PublicKey, Entry>,
    by_uid: HashMap<u32, Arc<Client>>,
    by_gid: HashMap<u32, Arc<Client>>,
    requirements: Vec<Requirement>,
    unnamed: UnnamedIds,
}

/// Something in the file that not every server can do.
#[derive(Debug)]
struct Requirement {
    /// Where in the file.
    at: String,
    required: Required,
}

#[derive(Debug)]
enum Required {
    /// This export is a directory, if there is one.
    Directory(String),
    /// Files can be given to this user or group.
    Giving(NameKind, u32),
    /// Requests of a client are limited, and therefore counted.
    CountedRequests,
    /// What clients store in a directory (empty: all) of this export is limited, and therefore counted.
    CountedBytes(String, String),
}

/// The numbers that the kernel gives for users and groups that have none in this process's user namespace:
/// they are nobody's in particular.
#[derive(Clone, Copy, Debug)]
struct UnnamedIds {
    uid: u32,
    gid: u32,
}

impl Default for UnnamedIds {
    fn default() -> Self {
        let read = |name| {
            let text = std::fs::read_to_string(format!("/proc/sys/kernel/{name}"));
            text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(65534)
        };
        Self { uid: read("overflowuid"), gid: read("overflowgid") }
    }
}

/// Whose rights have become less, by a change of the file or with time.
#[derive(Debug)]
pub struct Revocation {
    old: Arc<Clients>,
    new: Arc<Clients>,
    now: Timestamp,
}

impl Revocation {
    /// Whether a session of this client is to end, because it may do less than it might.
    pub fn concerns(&self, identity: &Identity) -> bool {
        let Some(new) = self.new.valid(identity, self.now) else { return true };
        self.old.find(identity).is_some_and(|(old, _)| !new.covers(&old))
    }
}

/// See the module documentation.
#[derive(Debug)]
pub struct Keys {
    directory: PathBuf,
    host: SecretKey,
    /// Replaced whole.
    clients: Mutex<Arc<Clients>>,
    names: Names,
    server: Option<Abilities>,
}

/// What a server can do, by which the file is checked.
#[derive(Debug)]
pub struct Abilities {
    /// Its exports, and which of them are directories.
    pub exports: HashMap<String, bool>,
    /// To whom it can give files.
    pub giving: Giving,
    /// Whether it counts requests.
    pub counts_requests: bool,
    /// The exports where it can count what is stored.
    pub counted_exports: Vec<String>,
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
        let names = Names::default();
        let clients = Mutex::new(Arc::new(Clients::read(&clients, &names)?));
        Ok(Self { directory: directory.to_owned(), host: host?, clients, names, server: None })
    }

    /// Checks the file by what the server can do, now and each time that it is read again.
    pub fn check_by(&mut self, server: Abilities) -> anyhow::Result<()> {
        self.clients().check(&server)?;
        self.server = Some(server);
        Ok(())
    }

    /// The users and the groups to whom clients' files are to be given.
    pub fn owners(&self) -> (Vec<u32>, Vec<u32>) {
        let clients = self.clients();
        let of_kind = |wanted: NameKind| {
            let ids = clients.requirements.iter().filter_map(|requirement| match requirement.required {
                Required::Giving(kind, id) if kind == wanted => Some(id),
                _ => None,
            });
            ids.collect()
        };
        (of_kind(NameKind::User), of_kind(NameKind::Group))
    }

    /// The directories, with their exports, whose stored bytes are limited.
    pub fn counted_directories(&self) -> Vec<(String, String)> {
        let clients = self.clients();
        let counted = clients.requirements.iter().filter_map(|one| match &one.required {
            Required::CountedBytes(export, directory) => Some((export.clone(), directory.clone())),
            _ => None,
        });
        counted.collect()
    }

    /// The exports that these directories are of.
    pub fn counted_exports(&self) -> Vec<String> {
        self.counted_directories().into_iter().map(|(export, _)| export).collect()
    }

    /// Whether requests of a client are limited.
    pub fn limits_requests(&self) -> bool {
        self.clients().requirements.iter().any(|one| matches!(one.required, Required::CountedRequests))
    }

    /// Whether requests are counted: that is decided at the start.
    pub fn counts_requests(&self) -> bool {
        self.server.as_ref().is_some_and(|server| server.counts_requests)
    }

    fn clients(&self) -> Arc<Clients> {
        Arc::clone(&lock(&self.clients))
    }

    /// The server's key.
    pub fn host(&self) -> &SecretKey {
        &self.host
    }

    /// How many clients there are.
    pub fn count(&self) -> usize {
        self.clients().len
    }

    /// The client that this is, unless its key has expired.
    pub fn client(&self, identity: &Identity) -> Option<Arc<Client>> {
        self.clients().valid(identity, Timestamp::now())
    }

    /// What a client may open.
    pub fn rights(&self, identity: &Identity) -> Rights {
        self.client(identity).map_or(Rights::None, Rights::Of)
    }

    /// The rates on an export of the client that the file gives this name.
    pub fn rates(&self, client: &str, export: &str) -> Option<ClientRates> {
        self.clients().all().find(|one| one.name == client)?.rates_on(export)
    }

    /// Reads `clients.toml` again. Returns who may do less than before; after an error all is as it was.
    pub fn reread(&self) -> anyhow::Result<Revocation> {
        let new = Arc::new(Clients::read(&self.directory.join(CLIENTS), &self.names)?);
        self.server.as_ref().map_or(Ok(()), |server| new.check(server))?;
        let old = std::mem::replace(&mut *lock(&self.clients), Arc::clone(&new));
        Ok(Revocation { old, new, now: Timestamp::now() })
    }

    /// Whose keys have expired. None: nobody's.
    pub fn expired(&self) -> Option<Revocation> {
        let (clients, now) = (self.clients(), Timestamp::now());
        let has_expired = clients.by_key.values().any(|entry| !entry.is_valid(now));
        has_expired.then(|| Revocation { old: Arc::clone(&clients), new: clients, now })
    }

    /// When the next key expires.
    pub fn next_expiry(&self) -> Option<Timestamp> {
        let now = Timestamp::now();
        let clients = self.clients();
        clients.by_key.values().filter_map(|entry| entry.expires).filter(|&expires| expires > now).min()
    }

    /// The exports that clients may open by the file, and that the server does not have.
    pub fn unknown_exports(&self) -> Vec<String> {
        let is_known =
            |name: &str| self.server.as_ref().is_some_and(|server| server.exports.contains_key(name));
        let clients = self.clients();
        let named = clients.all().flat_map(|client| client.exports.keys());
        let mut unknown: Vec<_> = named.filter(|name| !is_known(name)).cloned().collect();
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
    client: BTreeMap<String, Spanned<ClientTable>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClientTable {
    #[serde(default)]
    keys: Vec<Spanned<KeyOrTable>>,
    #[serde(default)]
    users: Vec<Spanned<NameOrId>>,
    #[serde(default)]
    groups: Vec<Spanned<NameOrId>>,
    #[serde(default)]
    exports: BTreeMap<String, ExportEntry>,
    owner: Option<Spanned<NameOrId>>,
    group: Option<Spanned<NameOrId>>,
    limits: Option<Spanned<Limits>>,
    #[serde(default)]
    rdma: Rdma,
}

/// What the sessions of a client may have together.
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "LimitsTable")]
struct Limits {
    caps: Caps,
    rates: Rates,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitsTable {
    connections: Option<usize>,
    files: Option<usize>,
    requests: Option<usize>,
    memory: Option<Size>,
    iops: Option<u64>,
    bandwidth: Option<Size>,
    burst: Option<f64>,
}

impl TryFrom<LimitsTable> for Limits {
    type Error = String;

    fn try_from(table: LimitsTable) -> Result<Self, String> {
        let LimitsTable { connections, files, requests, memory, iops, bandwidth, burst } = table;
        let caps = Caps { connections, files, requests, memory };
        if let Some(key) = caps.zero() {
            return Err(format!("{key} is 0. Give a number from 1 on, or leave it out."));
        }
        Ok(Self { caps, rates: Rates::new(iops, bandwidth, burst)? })
    }
}

/// What a client may do with an export: `"ro"`, `"rw"`, or a table.
struct ExportEntry {
    access: Access,
    path: Option<Spanned<String>>,
    share: Share,
    stored: Option<Spanned<Size>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ExportTable {
    access: Access,
    path: Option<Spanned<String>>,
    iops: Option<u64>,
    bandwidth: Option<Size>,
    burst: Option<f64>,
    weight: Option<u32>,
    stored: Option<Spanned<Size>>,
}

impl<'de> Deserialize<'de> for ExportEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ExportVisitor)
    }
}

struct ExportVisitor;

impl<'de> Visitor<'de> for ExportVisitor {
    type Value = ExportEntry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"ro\", \"rw\", or a table with `access` and `path`")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<ExportEntry, E> {
        let access = Access::deserialize(text.into_deserializer())?;
        Ok(ExportEntry { access, path: None, share: Share::DEFAULT, stored: None })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ExportEntry, A::Error> {
        let ExportTable { access, path, iops, bandwidth, burst, weight, stored } =
            ExportTable::deserialize(MapAccessDeserializer::new(map))?;
        let rates = Rates::new(iops, bandwidth, burst).map_err(de::Error::custom)?;
        let share = Share::new(rates, weight).map_err(de::Error::custom)?;
        Ok(ExportEntry { access, path, share, stored })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(untagged, expecting = "a name or a number is expected")]
enum NameOrId {
    Id(u32),
    Name(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum NameKind {
    User,
    Group,
}

impl fmt::Display for NameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::User => "user",
            Self::Group => "group",
        })
    }
}

/// The numbers of names that have been looked up: in its sandbox the server cannot look up others.
#[derive(Debug, Default)]
struct Names(Mutex<HashMap<(NameKind, String), u32>>);

impl Names {
    fn id(&self, kind: NameKind, name: &NameOrId) -> Result<u32, String> {
        let name = match name {
            NameOrId::Id(id) => return Ok(*id),
            NameOrId::Name(name) => name,
        };
        let mut known = lock(&self.0);
        if let Some(&id) = known.get(&(kind, name.clone())) {
            return Ok(id);
        }
        let found = match kind {
            NameKind::User => User::from_name(name).map(|user| user.map(|user| user.uid.as_raw())),
            NameKind::Group => Group::from_name(name).map(|group| group.map(|group| group.gid.as_raw())),
        };
        let Ok(Some(id)) = found else {
            return Err(format!(
                "the server finds no {kind} {name:?}. If there is one, write its number, or start the server \
                 anew: its sandbox keeps it from looking up names later"
            ));
        };
        known.insert((kind, name.clone()), id);
        Ok(id)
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a key is expected, or a table with `key` and `expires`")]
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
    fn read(path: &Path, names: &Names) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("Cannot read who may connect, {}", path.display()))?;
        Self::parse(path, &text, names)
    }

    fn parse(path: &Path, text: &str, names: &Names) -> anyhow::Result<Self> {
        let file: File = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(path.display().to_string(), |span| place(path, text, span.start));
            anyhow!("{at}: {}\nSee raio.toml(5) for the form of {CLIENTS}.", error.message())
        })?;
        let all = Self { len: file.client.len(), ..Self::default() };
        let mut reading = Reading { path, text, names, all };
        for (name, table) in file.client {
            reading.client(name, table)?;
        }
        Ok(reading.all)
    }

    /// Whether a server can do what the file requires of it.
    fn check(&self, server: &Abilities) -> anyhow::Result<()> {
        for Requirement { at, required } in &self.requirements {
            match required {
                Required::Directory(export) if server.exports.get(export) == Some(&false) => bail!(
                    "{at}: export {export} is no directory, so there is nothing beneath it. Leave `path` and \
                     `stored` out."
                ),
                Required::Directory(_) => {}
                Required::CountedRequests => ensure!(
                    server.counts_requests,
                    "{at}: the server does not count requests, because no client had a limit on them when it \
                     started. Start the server anew, or leave `requests` out."
                ),
                Required::CountedBytes(export, _) => ensure!(
                    server.counted_exports.contains(export) || !server.exports.contains_key(export),
                    "{at}: the server does not count what is stored in export {export}, because no client \
                     had a limit on it when it started. Start the server anew, or leave `stored` out."
                ),
                &Required::Giving(kind, id) => {
                    let can_give = match kind {
                        NameKind::User => server.giving.can_give_to_user(id),
                        NameKind::Group => server.giving.can_give_to_group(id),
                    };
                    can_give.map_err(|why| {
                        anyhow!("{at}: the server cannot give files to {kind} {id}: {why}.")
                    })?;
                }
            }
        }
        Ok(())
    }

    fn all(&self) -> impl Iterator<Item = &Arc<Client>> {
        let of_keys = self.by_key.values().map(|entry| &entry.client);
        of_keys.chain(self.by_uid.values()).chain(self.by_gid.values())
    }

    /// The client that this is, and when that ends.
    fn find(&self, identity: &Identity) -> Option<(Arc<Client>, Option<Timestamp>)> {
        match identity {
            Identity::Anonymous => None,
            Identity::Key(key) => {
                self.by_key.get(key).map(|entry| (Arc::clone(&entry.client), entry.expires))
            }
            Identity::User(user) => self.of_user(user).map(|client| (client, None)),
        }
    }

    fn of_user(&self, user: &Credentials) -> Option<Arc<Client>> {
        if user.uid == self.unnamed.uid {
            return None;
        }
        if let Some(client) = self.by_uid.get(&user.uid) {
            return Some(Arc::clone(client));
        }
        let groups: BTreeSet<_> = std::iter::once(&user.gid).chain(&user.groups).collect();
        let mut clients: Vec<_> = groups.into_iter().filter_map(|gid| self.by_gid.get(gid)).collect();
        clients.sort_by_key(|client| &client.name);
        clients.dedup();
        clients.into_iter().cloned().reduce(|all, client| Arc::new(all.or(&client)))
    }

    fn valid(&self, identity: &Identity, now: Timestamp) -> Option<Arc<Client>> {
        let (client, expires) = self.find(identity)?;
        expires.is_none_or(|expires| now < expires).then_some(client)
    }
}

/// A file that is being read.
struct Reading<'a> {
    path: &'a Path,
    text: &'a str,
    names: &'a Names,
    /// What it comes to.
    all: Clients,
}

impl Reading<'_> {
    /// Where in the file something is.
    fn place<T>(&self, of: &Spanned<T>) -> String {
        place(self.path, self.text, of.span().start)
    }

    fn require(&mut self, at: String, required: Required) {
        self.all.requirements.push(Requirement { at, required });
    }

    fn client(&mut self, name: String, table: Spanned<ClientTable>) -> anyhow::Result<()> {
        let at = self.place(&table);
        let table = table.into_inner();
        if table.keys.is_empty() && table.users.is_empty() && table.groups.is_empty() {
            bail!("{at}: client {name} has no keys, users or groups, so it can never connect.");
        }
        let owner = Owner {
            uid: self.owner(NameKind::User, table.owner)?,
            gid: self.owner(NameKind::Group, table.group)?,
        };
        let exports = self.exports(table.exports, owner)?;
        let Limits { caps: limits, rates } = self.limits(table.limits);
        let may_use_rdma = table.rdma == Rdma::Clear;
        let client = Arc::new(Client { name, exports, limits, rates, may_use_rdma });
        self.keys(table.keys, &client)?;
        self.members(NameKind::User, table.users, &client)?;
        self.members(NameKind::Group, table.groups, &client)
    }

    fn owner(&mut self, kind: NameKind, name: Option<Spanned<NameOrId>>) -> anyhow::Result<Option<u32>> {
        let Some(name) = name else { return Ok(None) };
        let at = self.place(&name);
        let id = self.names.id(kind, name.get_ref()).map_err(|why| anyhow!("{at}: {why}."))?;
        // What chown(2) takes for none.
        ensure!(id != u32::MAX, "{at}: no {kind} can have the number {id}.");
        self.require(at, Required::Giving(kind, id));
        Ok(Some(id))
    }

    fn exports(
        &mut self,
        tables: BTreeMap<String, ExportEntry>,
        owner: Owner,
    ) -> anyhow::Result<BTreeMap<String, ExportPart>> {
        let mut exports = BTreeMap::new();
        for (export, ExportEntry { access, path, share, stored }) in tables {
            let subtree = match path {
                None => Subtree::whole(access, owner),
                Some(path) => {
                    let at = self.place(&path);
                    let subtree = Subtree::beneath(path.get_ref(), access, owner);
                    let subtree = subtree.map_err(|why| anyhow!("{at}: {why}."))?;
                    self.require(at, Required::Directory(export.clone()));
                    subtree
                }
            };
            let subtree = match stored {
                None => subtree,
                Some(stored) => {
                    let at = self.place(&stored);
                    let directory = subtree.directory().unwrap_or_default().to_owned();
                    self.require(at.clone(), Required::Directory(export.clone()));
                    self.require(at, Required::CountedBytes(export.clone(), directory));
                    subtree.with_bytes_max(Some(stored.into_inner().0))
                }
            };
            exports.insert(export, ExportPart { subtrees: vec![subtree], share });
        }
        Ok(exports)
    }

    fn limits(&mut self, limits: Option<Spanned<Limits>>) -> Limits {
        let Some(limits) = limits else { return Limits { caps: Caps::default(), rates: Rates::NONE } };
        let at = self.place(&limits);
        let limits = limits.into_inner();
        if limits.caps.requests.is_some() {
            self.require(at, Required::CountedRequests);
        }
        limits
    }

    fn keys(&mut self, keys: Vec<Spanned<KeyOrTable>>, client: &Arc<Client>) -> anyhow::Result<()> {
        for key in keys {
            let at = self.place(&key);
            let (key, expires) = match key.into_inner() {
                KeyOrTable::Key(key) => (key, None),
                KeyOrTable::Table { key, expires } => (key, expires),
            };
            let expires = expires.map(expiry).transpose().map_err(|why| anyhow!("{at}: {why}."))?;
            let key: PublicKey = key.parse().map_err(|why| anyhow!("{at}: {key:?} is no key: {why}."))?;
            if let Some(before) = self.all.by_key.get(&key) {
                bail!("{at}: {key} is a key of client {} already.", before.client.name);
            }
            self.all.by_key.insert(key, Entry { client: Arc::clone(client), expires });
        }
        Ok(())
    }

    /// Those who are a client when they connect over a Unix socket.
    fn members(
        &mut self,
        kind: NameKind,
        listed: Vec<Spanned<NameOrId>>,
        client: &Arc<Client>,
    ) -> anyhow::Result<()> {
        for name in listed {
            let at = self.place(&name);
            let id = self.names.id(kind, name.get_ref()).map_err(|why| anyhow!("{at}: {why}."))?;
            let Clients { by_uid, by_gid, unnamed, .. } = &mut self.all;
            let (by_id, unnamed) = match kind {
                NameKind::User => (by_uid, unnamed.uid),
                NameKind::Group => (by_gid, unnamed.gid),
            };
            if id == unnamed {
                bail!(
                    "{at}: {kind} {id} is what the kernel calls every {kind} that has no number here: it may \
                     be anybody."
                );
            }
            if let Some(before) = by_id.insert(id, Arc::clone(client)) {
                bail!("{at}: {kind} {id} belongs to client {} already.", before.name);
            }
        }
        Ok(())
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
    use crate::privileges::Chown;

    fn key() -> PublicKey {
        SecretKey::generate().public()
    }

    fn parse(text: &str) -> anyhow::Result<Clients> {
        Clients::parse(Path::new("clients.toml"), text, &Names::default())
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
        assert_eq!(keys.map(|key| clients.by_key[&key].is_valid(now)), [true, true, false, true]);
        let rights = |key: &PublicKey| Rights::Of(Arc::clone(&clients.by_key[key].client));
        for key in &keys[..3] {
            let exports = ["data", "logs", "other"].map(|name| may_write(&rights(key), name));
            assert_eq!(exports, [Some(true), Some(false), None]);
            assert!(clients.by_key[key].client.may_use_rdma);
        }
        assert_eq!(may_write(&rights(&keys[3]), "data"), None);
        assert!(!clients.by_key[&keys[3]].client.may_use_rdma);
        assert_eq!(parse("").unwrap().len, 0);
    }

    /// Whether an export exists for a client, and if so whether it may write there.
    fn may_write(rights: &Rights, name: &str) -> Option<bool> {
        rights.of_export(name).iter().map(Subtree::is_writable).max()
    }

    /// Those of a server that can do everything with these exports.
    fn abilities(exports: HashMap<String, bool>) -> Abilities {
        let counted_exports = exports.keys().cloned().collect();
        Abilities { exports, giving: Giving::to_anybody(), counts_requests: true, counted_exports }
    }

    /// A process of this user with these groups.
    fn user(uid: u32, gid: u32, groups: &[u32]) -> Identity {
        Identity::User(Arc::new(Credentials { uid, gid, groups: groups.to_vec() }))
    }

    #[test]
    fn users_go_before_their_groups_and_may_do_what_any_group_may() {
        let text = "[client.me]\nusers = ['root', 1001]\nexports = { a = 'ro' }\n\
                    [client.staff]\ngroups = [50]\nexports = { a = 'rw', b = 'ro' }\n\
                    [client.backup]\ngroups = [34, 35]\nexports = { b = 'rw', c = 'ro' }\nrdma = 'clear'\n";
        let clients = parse(text).unwrap();
        let now = Timestamp::now();
        let UnnamedIds { uid, gid } = clients.unnamed;
        let (ro, rw) = (Some(false), Some(true));
        for (identity, name, exports) in [
            (user(0, 50, &[]), Some("me"), [ro, None, None]),
            (user(1001, 50, &[34]), Some("me"), [ro, None, None]),
            (user(7, 50, &[]), Some("staff"), [rw, ro, None]),
            (user(7, 7, &[8, 35, 34]), Some("backup"), [None, rw, ro]),
            (user(7, 34, &[50]), Some("backup+staff"), [rw, rw, ro]),
            (user(7, 7, &[7]), None, [None; 3]),
            (user(uid, 50, &[34]), None, [None; 3]),
            (user(7, gid, &[gid]), None, [None; 3]),
            (Identity::Anonymous, None, [None; 3]),
        ] {
            let client = clients.valid(&identity, now);
            assert_eq!(client.as_ref().map(|client| client.name.as_str()), name, "{identity:?}");
            let rights = client.map_or(Rights::None, Rights::Of);
            assert_eq!(["a", "b", "c"].map(|name| may_write(&rights, name)), exports, "{identity:?}");
        }
    }

    #[test]
    fn mistakes_are_told_with_line_and_column() {
        let key = key();
        for (text, at, needle) in [
            ("[client.a]\nkeys = ['rsa:x']".to_owned(), "2:9", "no key"),
            ("[client.a]\nexports = {}".into(), "1:1", "no keys"),
            ("[client.a]\nusers = ['no such user']".into(), "2:10", "no user"),
            ("[client.a]\ngroups = [1, 'no such group']".into(), "2:14", "no group"),
            ("[client.a]\nusers = [-1]".into(), "2:9", "a name or a number"),
            ("[client.a]\nkeys = [1]".into(), "2:8", "a key is expected"),
            (format!("[client.a]\nusers = [1, {}]", UnnamedIds::default().uid), "2:13", "may be anybody"),
            ("[client.a]\ngroups = [7]\n[client.b]\ngroups = ['7', 7]".into(), "4:11", "no group"),
            ("[client.a]\ngroups = [7]\n[client.b]\ngroups = [8, 7]".into(), "4:14", "client a already"),
            (format!("[client.a]\nkeys = ['{key}']\nexports = {{ x = 'RW' }}"), "3:17", "`rw`"),
            (format!("[client.a]\nkeys = ['{key}']\nexports = {{ x = 7 }}"), "3:17", "`access` and `path`"),
            (
                format!("[client.a]\nkeys = ['{key}']\nexports = {{ x = {{ access = 'r', path = 'a' }} }}"),
                "3:28",
                "`rw`",
            ),
            (format!("[client.a]\nkeys = ['{key}']\n[client.a.exports.x]\npath = 'a'"), "3:1", "access"),
            (
                format!("[client.a]\nkeys = ['{key}']\n[client.a.exports.x]\naccess = 'rw'\npaht = 'a'"),
                "5:1",
                "paht",
            ),
            (
                format!("[client.a]\nkeys = ['{key}']\n[client.a.exports.x]\naccess = 'rw'\npath = '../a'"),
                "5:8",
                "no directory",
            ),
            (format!("[client.a]\nkeys = ['{key}']\nrdma = 'yes'"), "3:8", "`clear`"),
            (format!("[client.a]\nkeys = ['{key}']\nexport = {{}}"), "3:1", "export"),
            (
                format!("[client.a]\nkeys = ['{key}']\n[client.b]\nkeys = [\n'{key}']"),
                "5:1",
                "client a already",
            ),
            (format!("[client.a]\nkeys = [{{ key = '{key}', expires = 10:00:00 }}]"), "2:9", "not a moment"),
            (format!("[client.a]\nkeys = ['{key}']\nowner = 'no such user'"), "3:9", "no user"),
            (format!("[client.a]\nkeys = ['{key}']\ngroup = 'no such group'"), "3:9", "no group"),
            (format!("[client.a]\nkeys = ['{key}']\nowner = 4294967295"), "3:9", "no user can have"),
            (format!("[client.a]\nkeys = ['{key}']\ngroup = -1"), "3:9", "a name or a number"),
            (format!("[client.a]\nkeys = ['{key}']\nlimits = {{ files = 0 }}"), "3:10", "files is 0"),
            (format!("[client.a]\nkeys = ['{key}']\nlimits = {{ memory = 0 }}"), "3:10", "memory is 0"),
            (format!("[client.a]\nkeys = ['{key}']\nlimits = {{ file = 1 }}"), "3:12", "file"),
            (format!("[client.a]\nkeys = ['{key}']\nlimits = {{ iops = 0 }}"), "3:10", "iops is 0"),
            (format!("[client.a]\nkeys = ['{key}']\nlimits = {{ burst = 1 }}"), "3:10", "without iops"),
            (
                format!("[client.a]\nkeys = ['{key}']\nexports = {{ x = {{ access = 'rw', weight = 0 }} }}"),
                "3:17",
                "weight is 0",
            ),
            (
                format!(
                    "[client.a]\nkeys = ['{key}']\nexports = {{ x = {{ access = 'rw', bandwidth = 1 }} }}"
                ),
                "3:17",
                "bandwidth is 1",
            ),
            (format!("[clients.a]\nkeys = ['{key}']"), "1:2", "clients"),
        ] {
            let error = parse(&text).unwrap_err().to_string();
            let at = format!("clients.toml:{at}: ");
            assert!(error.starts_with(&at) && error.contains(needle), "{text} ({at}): {error}");
        }
    }

    #[test]
    fn a_client_may_have_a_directory_of_an_export_and_groups_have_those_of_each_other() {
        let text = "[client.staff]\ngroups = [50]\n\
                    exports = { a = { access = 'ro', path = 'x' }, b = 'rw' }\n\
                    [client.backup]\ngroups = [34]\nexports.a = { access = 'rw', path = 'x/y' }\n\
                    [client.all]\ngroups = [35]\nexports = { a = { access = 'rw' }, b = 'ro' }\n";
        let clients = parse(text).unwrap();
        let rights = |groups: &[u32]| {
            clients.valid(&user(7, 7, groups), Timestamp::now()).map_or(Rights::None, Rights::Of)
        };
        for (groups, path, writes, found) in [
            (&[50][..], "x/y/z", false, Some((Some("x"), false))),
            (&[50], "x/y/z", true, Some((Some("x"), false))),
            (&[50], "y", false, None),
            (&[34], "x/z", false, None),
            (&[34, 50], "x/y/z", false, Some((Some("x"), false))),
            (&[34, 50], "x/y/z", true, Some((Some("x/y"), true))),
            (&[34, 50], "y", true, None),
            (&[34, 35, 50], "x/y/z", true, Some((None, true))),
        ] {
            let rights = rights(groups);
            let subtree = Subtree::find(rights.of_export("a"), path.as_bytes(), writes);
            let subtree = subtree.map(|(subtree, _)| (subtree.directory(), subtree.is_writable()));
            assert_eq!(subtree, found, "{groups:?} {path} {writes}");
        }
    }

    #[test]
    fn what_a_client_creates_belongs_to_the_owner_of_the_entry_that_allows_it() {
        let text = "[client.a]\ngroups = [50]\nexports = { x = 'ro', y = 'rw' }\nowner = 'root'\n\
                    [client.b]\ngroups = [51]\nexports = { x = 'rw', y = 'rw' }\nowner = 7\ngroup = 8\n";
        let clients = parse(text).unwrap();
        let owner = |groups: &[u32], export: &str| {
            let client = clients.valid(&user(7, 7, groups), Timestamp::now()).unwrap();
            let rights = Rights::Of(client);
            Subtree::find(rights.of_export(export), b"new", true).unwrap().0.owner()
        };
        let of_a = Owner { uid: Some(0), gid: None };
        let of_b = Owner { uid: Some(7), gid: Some(8) };
        assert_eq!(owner(&[50], "y"), of_a);
        assert_eq!([owner(&[51], "x"), owner(&[50, 51], "x")], [of_b; 2]);
        assert_eq!(owner(&[51, 50], "y"), of_a, "of several the first by name");
        assert_eq!(Rights::All.of_export("y")[0].owner(), Owner::default());
    }

    #[test]
    fn an_owner_to_whom_the_server_cannot_give_files_is_an_error_with_a_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        let mut keys = Keys::open(&path, true).unwrap();
        let write = |owner: &str| {
            let text = format!("[client.a]\nkeys = ['{}']\n{owner}\n", key());
            std::fs::write(path.join(CLIENTS), text).unwrap();
        };
        let giving = Giving::by(5, &[6, 7], Chown::GivenUp);
        keys.check_by(Abilities { giving, ..abilities(HashMap::new()) }).unwrap();
        write("owner = 5\ngroup = 7");
        keys.reread().unwrap();
        assert_eq!(keys.owners(), (vec![5], vec![7]));
        for (owner, whom) in [("owner = 6", "user 6"), ("group = 5", "group 5"), ("owner = 0", "user 0")] {
            write(owner);
            let error = keys.reread().unwrap_err().to_string();
            assert!(error.contains("clients.toml:3:9: ") && error.contains(whom), "{error}");
            assert!(error.contains("start the server anew"), "{error}");
        }
        assert_eq!(keys.owners(), (vec![5], vec![7]), "all is as it was");
    }

    #[test]
    fn a_client_has_limits_and_several_groups_have_the_largest_of_each() {
        let text = "[client.a]\ngroups = [50]\nlimits = { files = 3, connections = 4, requests = 9 }\n\
                    [client.b]\ngroups = [51]\nlimits = { files = 5, memory = '1M', requests = 8 }\n";
        let clients = parse(text).unwrap();
        let limits = |groups: &[u32]| {
            let rights = Rights::Of(clients.valid(&user(7, 7, groups), Timestamp::now()).unwrap());
            let (name, caps) = rights.limits().unwrap();
            (name.to_owned(), caps)
        };
        let caps = |text: &str| text.parse::<Caps>().unwrap();
        assert_eq!(limits(&[50]), ("a".to_owned(), caps("files=3,connections=4,requests=9")));
        assert_eq!(limits(&[50, 51]), ("a+b".to_owned(), caps("files=5,requests=9")));
        assert_eq!(Rights::All.limits(), None);
        let uncounted = Abilities { counts_requests: false, ..abilities(HashMap::new()) };
        let error = clients.check(&uncounted).unwrap_err().to_string();
        assert!(
            error.starts_with("clients.toml:3:10: ") && error.contains("Start the server anew"),
            "{error}"
        );
        clients.check(&abilities(HashMap::new())).unwrap();
    }

    #[test]
    fn a_client_has_rates_and_a_weight_and_several_groups_have_the_largest_of_each() {
        let text = "[client.a]\ngroups = [50]\nlimits = { iops = 10, bandwidth = '1M' }\n\
                    exports = { x = { access = 'rw', iops = 5, weight = 3 }, y = 'ro' }\n\
                    [client.b]\ngroups = [51]\nlimits = { iops = 20, burst = 2 }\n\
                    exports = { x = { access = 'ro', iops = 7, weight = 2, stored = '1G' } }\n";
        let clients = parse(text).unwrap();
        let rates = |groups: &[u32], export: &str| {
            let rights = Rights::Of(clients.valid(&user(7, 7, groups), Timestamp::now()).unwrap());
            rights.rates(export).map(|(_, rates)| rates)
        };
        let iops = |iops, burst| Rates::new(Some(iops), None, burst).unwrap();
        let own = rates(&[50], "x").unwrap();
        assert_eq!(own.all, Rates::new(Some(10), Some(Size(1 << 20)), None).unwrap());
        assert_eq!(own.share, Share { rates: iops(5, None), weight: 3 });
        assert_eq!(rates(&[50], "y").unwrap().share, Share::DEFAULT);
        assert!(rates(&[51], "y").is_none() && Rights::All.rates("x").is_none());
        let both = rates(&[50, 51], "x").unwrap();
        assert_eq!((both.all, both.share), (iops(20, Some(2.0)), Share { rates: iops(7, None), weight: 3 }));
        let uncounted = Abilities {
            counted_exports: Vec::new(),
            ..abilities([("x".to_owned(), true), ("y".to_owned(), true)].into())
        };
        let error = clients.check(&uncounted).unwrap_err().to_string();
        assert!(
            error.starts_with("clients.toml:8:65: ") && error.contains("Start the server anew"),
            "{error}"
        );
    }

    #[test]
    fn only_directories_have_something_beneath_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        let mut keys = Keys::open(&path, true).unwrap();
        let write = |export: &str| {
            let text = format!(
                "[client.a]\nkeys = ['{}']\nexports.{export} = {{ access = 'ro', path = 'x' }}\n",
                key()
            );
            std::fs::write(path.join(CLIENTS), text).unwrap();
        };
        let exports = [("files", true), ("disk", false)];
        let exports = || exports.map(|(name, is_directory)| (name.to_owned(), is_directory)).into();
        keys.check_by(abilities(exports())).unwrap();
        for (export, is_right) in [("files", true), ("there-is-none", true), ("disk", false)] {
            write(export);
            let result = keys.reread();
            assert_eq!(result.is_ok(), is_right, "{export}: {result:?}");
        }
        assert_eq!(keys.unknown_exports(), ["there-is-none"], "what is wrong changes nothing");
        write("disk");
        let server = abilities(exports());
        let error = Keys::open(&path, true).unwrap().check_by(server).unwrap_err().to_string();
        assert!(error.contains("clients.toml:3:40: ") && error.contains("no directory"), "{error}");
    }

    #[test]
    fn a_directory_is_made_at_the_first_start_and_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        assert!(Keys::open(&path, false).is_err());
        let first = Keys::open(&path, true).unwrap();
        assert_eq!(first.count(), 0);
        let again = Keys::open(&path, true).unwrap();
        assert_eq!(first.host().public(), again.host().public());
        assert!(Keys::open(&path, false).is_ok());
    }

    #[test]
    fn those_who_may_do_less_than_before_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        let keys = Keys::open(&path, true).unwrap();
        let all = [key(), key(), key(), key(), key(), key(), key()];
        let concerned = |revocation: &Revocation| all.map(|key| revocation.concerns(&Identity::Key(key)));
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
            (5, "exports.a = { access = 'rw', path = 'x' }"),
            (6, "exports.a = { access = 'rw', path = 'x/y' }"),
        ]);
        let revocation = keys.reread().unwrap();
        assert_eq!(concerned(&revocation), [false; 7]);
        assert_eq!(may_write(&keys.rights(&Identity::Key(all[1])), "a"), Some(true));
        write(&[
            (1, "exports = { a = 'ro' }"),
            (2, "exports = { a = 'rw', b = 'ro' }"),
            (3, "exports = { a = 'ro' }"),
            (4, ""),
            (5, "exports.a = { access = 'rw', path = 'x/y' }"),
            (6, "exports.a = { access = 'rw', path = 'x' }"),
        ]);
        assert_eq!(concerned(&keys.reread().unwrap()), [true, true, false, true, true, true, false]);
        assert_eq!(keys.rights(&Identity::Key(all[0])), Rights::None);
        assert_eq!(may_write(&keys.rights(&Identity::Key(all[1])), "a"), Some(false));
        // A mistake changes nothing.
        std::fs::write(path.join(CLIENTS), "[client").unwrap();
        assert!(keys.reread().is_err());
        assert_eq!(keys.count(), 6);
        assert_eq!(keys.rights(&Identity::Anonymous), Rights::None);
    }
}
