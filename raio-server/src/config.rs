//! What the server is told: command line and TOML file, merged and checked.
//!
//! Both have the same names. Command-line options override the file. Every error message names the
//! option, or the file with line and column, and the right form.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use clap::{Parser, ValueEnum};
use raio_transport::address::{Address, Endpoint, Scheme};
use raio_transport::rdma;
use serde::Deserialize;

use crate::export_spec::{self, ExportSpec};
use crate::limits::{Caps, session_bytes};
pub use crate::log::{LogFormat, LogLevel};
use crate::machine::{MemoryLimit, memory_limit};
use crate::size::Size;
use crate::tuning::options::{
    ARENAS_BYTES_DEFAULT, HEAP_BYTES_DEFAULT, HEAP_BYTES_DEFAULT_PER_WORKER, IO_BYTES_DEFAULT, IO_BYTES_MAX,
    IO_BYTES_MIN, LINGER_DEFAULT, LINGER_MAX, QUEUE_DEPTH_DEFAULT, SESSIONS_DEFAULT, SESSIONS_MAX,
    SPIN_US_DEFAULT, SPIN_US_MAX, STALL_TIMEOUT_DEFAULT, STALL_TIMEOUT_MAX, WORKERS_MAX,
};
use crate::tuning::slow;

const LISTEN_DEFAULT: &str = "tcp://127.0.0.1:7240";
/// What sun_path has room for.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Descriptors in a message (SCM_MAX_FD), without that of the Unix socket at which servers hand over.
pub const HANDED_OVER_MAX: usize = 252;
/// What the wire's credits can count.
const QUEUE_DEPTH_MAX: u32 = 65_534;

/// Serves directories, files and block devices to raio clients.
#[derive(Clone, Debug, Default, Parser, Deserialize)]
#[command(name = "raio_server", version)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Options {
    /// Accept connections there, tcp://HOST:PORT or rdma://HOST:PORT; repeatable; port 0 takes a free one
    /// [default: tcp://127.0.0.1:7240]
    #[arg(long, value_name = "URL")]
    listen: Vec<String>,
    /// Give clients something to open as /NAME; read-only unless rw; repeatable. PATH is a directory, a
    /// regular file or a block device, or null:SIZE (zeros, nothing kept) or mem:SIZE (memory). A comma
    /// begins an option: a path with one goes into the configuration file
    #[arg(long, value_name = "NAME=PATH[,ro|,rw][,direct]")]
    #[serde(deserialize_with = "export_spec::from_file")]
    export: Vec<ExportSpec>,
    /// Let exports be added beneath this directory while the server runs: its sandbox allows all of it from
    /// the start; repeatable
    #[arg(long, value_name = "DIRECTORY")]
    exports_beneath: Vec<PathBuf>,
    /// Threads that serve connections [default: one for each core]
    #[arg(long, value_name = "NUMBER", value_parser = number::<usize>)]
    workers: Option<usize>,
    /// Requests that one connection may have outstanding [default: 128]
    #[arg(long, value_name = "NUMBER", value_parser = number::<u32>)]
    queue_depth: Option<u32>,
    /// Sessions that clients may have at a time; who comes beyond is rejected [default: a quarter of the open
    /// files that the process may have]
    #[arg(long, value_name = "NUMBER", value_parser = number::<usize>)]
    max_sessions: Option<usize>,
    /// What one session may have: connections, open files, requests in flight, memory for data in flight
    /// [default: no limits while there is enough for others]
    #[arg(long, value_name = "connections=NUMBER,files=NUMBER,requests=NUMBER,memory=SIZE")]
    limits_per_session: Option<Caps>,
    /// What the clients of one address may have together; as above
    #[arg(long, value_name = "connections=NUMBER,files=NUMBER,requests=NUMBER,memory=SIZE")]
    limits_per_address: Option<Caps>,
    /// Largest read or write in one request [default: 1M]
    #[arg(long, value_name = "SIZE")]
    io_max: Option<Size>,
    /// How long an idle worker looks for work before it sleeps [default: 50]
    #[arg(long, value_name = "MICROSECONDS", value_parser = number::<u64>)]
    spin_us: Option<u64>,
    /// Memory that clients may cause, half of it for data in flight [default: 704M, or what more sessions or
    /// workers need; at most half of what there is]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// While others wait for memory, close a connection that has taken no responses, or has not continued a
    /// message, for this time [default: 2]
    #[arg(long, value_name = "SECONDS", value_parser = number::<u64>)]
    stall_timeout: Option<u64>,
    /// Note a request that takes this long among the slow ones, which the admin socket shows [default: 100]
    #[arg(long, value_name = "MILLISECONDS", value_parser = number::<u64>)]
    slow: Option<u64>,
    /// How long the session of a client whose connection has broken is kept for it, at most [default: 90]
    #[arg(long, value_name = "SECONDS", value_parser = number::<u64>)]
    linger: Option<u64>,
    /// How files are read and written [default: uring where the system allows it, else threads]
    #[arg(long, value_enum)]
    backend: Option<BackendKind>,
    /// Show each RDMA device with its ports and addresses, and why one cannot be used; then exit
    #[arg(long)]
    #[serde(skip)]
    pub list_devices: bool,
    /// Check the options and the configuration file, open each export, and exit: with 0 if the server could
    /// start, else with 2
    #[arg(long)]
    #[serde(skip)]
    pub check: bool,
    /// What to log to standard error [default: info]
    #[arg(long, value_enum)]
    log: Option<LogLevel>,
    /// How the log is written [default: auto, which is journald if standard error goes to the journal, else
    /// human]
    #[arg(long, value_enum)]
    log_format: Option<LogFormat>,
    /// Record what becomes of each request, and write it to this new file at SIGUSR2 and at the end: JSON for
    /// ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Keep there what a restart needs: who writes to which export, and write verifiers; it is made if there
    /// is none [default: nothing is kept]
    #[arg(long, value_name = "DIRECTORY")]
    state: Option<PathBuf>,
    /// Take the listening sockets of the server that runs and listens at this Unix socket, and have it end;
    /// then listen there for the next server [default: nothing is handed over]
    #[arg(long, value_name = "PATH")]
    hand_over: Option<PathBuf>,
    /// Serve metrics and a status page over HTTP there, HOST:PORT [default: nothing is served by HTTP]
    #[arg(long, value_name = "HOST:PORT")]
    http: Option<String>,
    /// A name by which browsers and scrapers reach what --http serves, beside IP addresses and localhost;
    /// repeatable
    #[arg(long, value_name = "NAME")]
    http_host: Vec<String>,
    /// Let those who send what this file holds, as a bearer token, read over HTTP who the clients are and
    /// what they do [default: the admin socket alone tells that]
    #[arg(long, value_name = "FILE")]
    http_token: Option<PathBuf>,
    /// Serve the same at this Unix socket, and take commands there, from root and the user of the server
    /// [default: there is none]
    #[arg(long, value_name = "PATH")]
    admin: Option<PathBuf>,
    /// Take only clients that have keys, over TLS: DIRECTORY has the server's own key, which is made at the
    /// first start, and who may connect, clients.toml [default: clients need no keys, and nothing is sealed]
    #[arg(long, value_name = "DIRECTORY")]
    keys: Option<PathBuf>,
    /// Have the kernel encrypt and decrypt what goes over TLS: it needs its module `tls`
    #[arg(long)]
    ktls: bool,
    /// Let everybody who reaches it use the server without a key, also from other machines, and nothing be
    /// sealed
    #[arg(long)]
    clear: bool,
    /// Append who connects, what each opens, and how that ends to FILE, a JSON object a line; or send it to
    /// journald [default: this is not recorded]
    #[arg(long, value_name = "FILE|journald")]
    audit: Option<PathBuf>,
    /// What happens when the audit log cannot be written as fast as it grows [default: lose records, and
    /// count them]
    #[arg(long, value_enum)]
    audit_full: Option<WhenFull>,
    /// Do not start if clients may write and the state directory cannot be used
    #[arg(long)]
    strict: bool,
    /// Become this user, with its groups, before anything is opened [default: the user that starts it]
    #[arg(long, value_name = "NAME|UID")]
    user: Option<String>,
    /// Give up what a server does not need: other files, system calls, capabilities [default: on]
    #[arg(long, value_enum)]
    sandbox: Option<SandboxMode>,
    /// Read options from this TOML file; they have the names of these, without the dashes in front. SIGHUP
    /// has it read again
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    #[arg(skip)]
    #[serde(skip)]
    places: Places,
    /// Where the sockets listen that the service manager passes.
    #[arg(skip)]
    #[serde(skip)]
    passed: Vec<Endpoint>,
}

/// Where the configuration file has each of its top-level keys: `FILE:LINE:COLUMN: KEY`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places(HashMap<String, String>);

/// What a configuration was made of.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    /// The command line.
    options: Options,
    /// How many cores the process may use.
    cores: usize,
    /// The memory that there is.
    available: MemoryLimit,
    /// `--listen`, or its default.
    urls: Vec<String>,
    /// `--memory`.
    memory: Option<Size>,
    /// Where the file has its keys.
    places: Places,
    /// What the file says where the command line says otherwise, by the key.
    overridden: BTreeMap<String, String>,
}

impl Places {
    /// Finds them in the text of a file that has been parsed before.
    fn find(path: &Path, text: &str) -> Self {
        let Ok(table) = toml::de::DeTable::parse(text) else { return Self::default() };
        let place = |key: &toml::Spanned<toml::de::DeString<'_>>| {
            let name = key.get_ref().to_string();
            let place = format!("{}: {name}", place(path, text, key.span().start));
            (name, place)
        };
        Self(table.get_ref().keys().map(place).collect())
    }

    /// The name of an option, for an error: as on the command line, or in the file.
    fn name(&self, option: &str) -> String {
        self.0.get(option).cloned().unwrap_or_else(|| format!("--{option}"))
    }
}

/// `FILE:LINE:COLUMN` of a byte of the file.
pub(crate) fn place(path: &Path, text: &str, at: usize) -> String {
    let before = text.get(..at).unwrap_or(text);
    let line = before.bytes().filter(|&b| b == b'\n').count() + 1;
    let column = before.chars().rev().take_while(|&c| c != '\n').count() + 1;
    format!("{}:{line}:{column}", path.display())
}

/// A whole number on the command line.
fn number<T: FromStr>(text: &str) -> Result<T, String> {
    let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let number = if is_number { text.parse().ok() } else { None };
    number.ok_or_else(|| "it is not a whole number that fits. Write digits alone, such as 4.".into())
}

/// How files are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendKind {
    /// io_uring.
    Uring,
    /// A pool of threads.
    Threads,
}

/// Whether the server confines itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SandboxMode {
    /// As far as the kernel can do it.
    On,
    /// Not at all.
    Off,
}

/// Where the audit log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuditTarget {
    /// To the end of a file.
    File(PathBuf),
    /// To journald.
    Journald,
}

impl From<PathBuf> for AuditTarget {
    fn from(path: PathBuf) -> Self {
        if path.as_os_str() == "journald" { Self::Journald } else { Self::File(path) }
    }
}

/// What happens when the audit log cannot be written as fast as it grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhenFull {
    /// Records are lost, and counted.
    #[default]
    Lose,
    /// Opens wait.
    Wait,
}

/// The configuration, checked.
#[derive(Debug)]
pub struct Config {
    /// Where to listen, and for what.
    pub listen: Vec<(Scheme, Endpoint)>,
    /// What to export.
    pub exports: Vec<ExportSpec>,
    /// Where exports may be added while the server runs.
    pub exports_beneath: Vec<PathBuf>,
    /// How many worker threads.
    pub workers: usize,
    /// Requests outstanding on a connection, at most.
    pub queue_depth: u32,
    /// Sessions at a time, at most. None: what the limit on open files allows.
    pub sessions_max: Option<usize>,
    /// What one session may have.
    pub session_caps: Caps,
    /// What the clients of one address may have.
    pub address_caps: Caps,
    /// Data of a request, at most.
    pub io_bytes_max: u32,
    /// How long to spin before sleeping.
    pub spin: Duration,
    /// Each worker's arena.
    pub arena_bytes: usize,
    /// What the messages of each worker's connections may take beside it.
    pub heap_bytes: usize,
    /// What all connections and open files may take besides.
    pub places_bytes: usize,
    /// While others wait for memory, a connection that makes no progress for so long is closed.
    pub stall_timeout: Duration,
    /// A request that takes this long is slow.
    pub slow: Duration,
    /// The longest that a channel whose connection has broken is kept.
    pub linger: Duration,
    /// What was asked for.
    pub backend: BackendKind,
    /// How much to log.
    pub log: LogLevel,
    /// How it is written.
    pub log_format: LogFormat,
    /// Where to trace requests to.
    pub trace: Option<PathBuf>,
    /// Where to keep what a restart needs.
    pub state: Option<PathBuf>,
    /// Where servers hand over to one another.
    pub hand_over: Option<PathBuf>,
    /// Where HTTP is served over TCP.
    pub http: Vec<SocketAddr>,
    /// The names of the server in HTTP.
    pub http_names: Vec<String>,
    /// Where the token is for what is private.
    pub http_token: Option<PathBuf>,
    /// Where the admin socket is.
    pub admin: Option<PathBuf>,
    /// Where the server's key is, and who may connect. None: anybody.
    pub keys: Option<PathBuf>,
    /// The kernel seals and opens the records of TLS.
    pub has_kernel_tls: bool,
    /// Clients of other machines need no key.
    pub is_open_to_others: bool,
    /// Where the audit log goes.
    pub audit: Option<AuditTarget>,
    /// What happens when it cannot be written.
    pub audit_full: WhenFull,
    /// Nothing is exported for writing without a state directory.
    pub is_strict: bool,
    /// Whom to become: a name, or a number.
    pub user: Option<String>,
    /// The server confines itself.
    pub is_sandboxed: bool,
    /// What it was made of, for [`Config::read_again`].
    pub(crate) made: Box<Made>,
}

impl Config {
    /// The configuration file, if there is one.
    pub fn path(&self) -> Option<&Path> {
        self.made.options.config.as_deref()
    }

    /// The name of an option, for an error: as on the command line, or in the file with the place there.
    pub fn name(&self, option: &str) -> String {
        self.made.places.name(option)
    }

    /// Reads the file again, and checks it like the one that the server runs with. The error is one if the
    /// file changes what does not change while a server runs.
    pub fn read_again(&self) -> anyhow::Result<Self> {
        let new = self.made.options.clone().check_after(self.made.cores, Some(self))?;
        macro_rules! must_stay {
            ($($same:expr => $key:literal),* $(,)?) => {
                $(ensure!($same, "{}", only_at_the_start(&new.name($key)));)*
            };
        }
        must_stay!(
            self.workers == new.workers => "workers",
            self.made.memory == new.made.memory => "memory",
            self.queue_depth == new.queue_depth => "queue-depth",
            self.io_bytes_max == new.io_bytes_max => "io-max",
            self.backend == new.backend => "backend",
            self.trace == new.trace => "trace",
            self.state == new.state => "state",
            self.hand_over == new.hand_over => "hand-over",
            self.keys == new.keys => "keys",
            self.has_kernel_tls == new.has_kernel_tls => "ktls",
            self.is_open_to_others == new.is_open_to_others => "clear",
            self.audit == new.audit => "audit",
            self.audit_full == new.audit_full => "audit-full",
            self.is_strict == new.is_strict => "strict",
            self.user == new.user => "user",
            self.is_sandboxed == new.is_sandboxed => "sandbox",
            self.exports_beneath == new.exports_beneath => "exports-beneath",
        );
        Ok(new)
    }

    /// Keys of the file that another one has changed, and that the command line overrides.
    pub fn changed_in_vain<'a>(&'a self, new: &'a Self) -> impl Iterator<Item = &'a str> {
        let (old, new) = (&self.made.overridden, &new.made.overridden);
        let keys: BTreeSet<_> = old.keys().chain(new.keys()).collect();
        keys.into_iter().filter(|&key| old.get(key) != new.get(key)).map(String::as_str)
    }

    /// What each worker has of an amount of memory that all have together; all there is if none is given.
    pub fn each_workers(&self, bytes: Option<Size>) -> usize {
        bytes.map_or(usize::MAX, |Size(bytes)| (bytes / self.workers as u64) as usize)
    }
}

/// What `--memory` is made of: bytes for all workers together.
struct Memory {
    arenas: u64,
    heap: u64,
    places: u64,
}

impl Memory {
    /// Of `all` bytes, or of what is the default: no more than `most` unless more is needed. Connections have
    /// an eighth for their messages, and three eighths for themselves, or what the given number of sessions
    /// takes if that is more.
    fn split(all: Option<u64>, sessions: Option<usize>, workers: usize, arenas_min: u64, most: u64) -> Self {
        let of_sessions = sessions.map(|sessions| Self::places(sessions, workers));
        let default = Self {
            arenas: ARENAS_BYTES_DEFAULT.max(arenas_min),
            heap: HEAP_BYTES_DEFAULT.max(workers as u64 * HEAP_BYTES_DEFAULT_PER_WORKER),
            places: of_sessions.unwrap_or(0).max(Self::places(SESSIONS_DEFAULT, workers)),
        };
        let all = match all {
            None if default.all() <= most || of_sessions >= Some(default.places) => return default,
            None => most.max(Self::least(sessions, workers, arenas_min)),
            Some(all) => all,
        };
        let heap = all / 8;
        let places = of_sessions.map_or(all / 8 * 3, |least| {
            least.max((all / 8 * 3).min((all - heap).saturating_sub(arenas_min)))
        });
        Self { arenas: all.saturating_sub(heap.saturating_add(places)), heap, places }
    }

    fn places(sessions: usize, workers: usize) -> u64 {
        sessions as u64 * session_bytes(workers) as u64
    }

    /// The least for this number of sessions, if it is given, and these arenas.
    fn least(sessions: Option<usize>, workers: usize, arenas: u64) -> u64 {
        sessions.map_or(2 * arenas, |sessions| (arenas + Self::places(sessions, workers)).div_ceil(7) * 8)
    }

    fn all(&self) -> u64 {
        self.arenas.saturating_add(self.heap).saturating_add(self.places)
    }
}

impl Options {
    /// Reads the configuration file if one is named, and fills in what the command line left out. Returns
    /// also what the file says in vain.
    fn merged(self) -> anyhow::Result<(Self, BTreeMap<String, String>)> {
        let mut overridden = BTreeMap::new();
        let Some(path) = self.config.clone() else { return Ok((self, overridden)) };
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("Cannot read the file that --config names, {}", path.display()))?;
        let mut file: Self = toml::from_str(&text).map_err(|error| {
            let place =
                error.span().map_or(path.display().to_string(), |span| place(&path, &text, span.start));
            anyhow!(
                "{place}: {}\nThe keys of the file are the names of the options without the dashes in \
                 front, and tables \
                 [export.NAME], see raio_server(8).",
                error.message()
            )
        })?;
        let mut places = Places::find(&path, &text);
        // Takes from the command line what it has.
        macro_rules! override_with {
            ($($option:ident unless $is_absent:ident),*) => {
                $(if !self.$option.$is_absent() {
                    let key = stringify!($option).replace('_', "-");
                    if places.0.remove(&key).is_some() {
                        overridden.insert(key, format!("{:?}", file.$option));
                    }
                    file.$option = self.$option;
                })*
            };
        }
        override_with!(
            listen unless is_empty,
            export unless is_empty,
            exports_beneath unless is_empty,
            workers unless is_none,
            queue_depth unless is_none,
            max_sessions unless is_none,
            limits_per_session unless is_none,
            limits_per_address unless is_none,
            io_max unless is_none,
            spin_us unless is_none,
            memory unless is_none,
            stall_timeout unless is_none,
            slow unless is_none,
            linger unless is_none,
            backend unless is_none,
            log unless is_none,
            log_format unless is_none,
            trace unless is_none,
            state unless is_none,
            hand_over unless is_none,
            http unless is_none,
            http_host unless is_empty,
            http_token unless is_none,
            admin unless is_none,
            keys unless is_none,
            audit unless is_none,
            audit_full unless is_none,
            user unless is_none,
            sandbox unless is_none
        );
        file.strict |= self.strict;
        file.clear |= self.clear;
        file.ktls |= self.ktls;
        Ok((Self { places, passed: self.passed, ..file }, overridden))
    }

    /// The same, and where the sockets listen that the service manager passes: those are listened on if no
    /// others are named.
    pub fn with_passed(self, passed: Vec<Endpoint>) -> Self {
        Self { passed, ..self }
    }

    /// Merges, fills in the defaults and checks everything that can be checked without opening anything.
    /// `cores` is how many the process may use.
    pub fn check(self, cores: usize) -> anyhow::Result<Config> {
        self.check_after(cores, None)
    }

    /// The same for a server that runs with a configuration: what that was made of is not looked up again,
    /// for in its sandbox the server cannot do that.
    fn check_after(self, cores: usize, running: Option<&Config>) -> anyhow::Result<Config> {
        let command_line = self.clone();
        let (options, overridden) = self.merged()?;
        let name = |option| options.places.name(option);
        let mut urls = options.listen.clone();
        let mut listen = Vec::new();
        if urls.is_empty() {
            listen.extend(options.passed.iter().cloned().map(of_stream));
        }
        if urls.is_empty() && listen.is_empty() {
            urls.push(LISTEN_DEFAULT.to_owned());
        }
        if let Some(running) = running {
            ensure!(urls == running.made.urls, "{}", only_at_the_start(&name("listen")));
            listen.clone_from(&running.listen);
        }
        for url in urls.iter().filter(|_| running.is_none()) {
            listen.extend(listen_addresses(url).map_err(|why| anyhow!("{} {url}: {why}", name("listen")))?);
        }
        if listen.iter().any(|(scheme, _)| *scheme == Scheme::Rdma)
            && let Some(reason) = rdma::load()
        {
            bail!(
                "{} rdma://: there is no RDMA here ({reason}). Install it (--list-devices shows what there \
                 is), or listen on \
                 tcp://HOST:PORT.",
                name("listen")
            );
        }

        ensure!(
            options.keys.is_none() || listen.iter().all(|(scheme, _)| *scheme != Scheme::Rdma),
            "{} rdma:// does not go with keys: connections that rdma_cm makes are neither sealed nor \
             authenticated. Listen on tcp://HOST:PORT. Clients of raio:// show their keys there, and those \
             that may (rdma = \"clear\" in clients.toml) go on by RDMA.",
            name("listen")
        );
        let is_reachable = |endpoint: &&Endpoint| {
            endpoint.ip().is_some_and(|address| !address.ip().to_canonical().is_loopback())
        };
        let reachable = listen.iter().map(|(_, endpoint)| endpoint).find(is_reachable);
        let is_open_to_others = reachable.is_some() && options.keys.is_none();
        if let Some(endpoint) = reachable
            && is_open_to_others
            && !options.clear
        {
            bail!(
                "{} {endpoint}: other machines reach this address, and there are no keys: everybody in the \
                 network could read and write everything. Give clients keys with --keys DIRECTORY, or \
                 say --clear if everybody in that network may do that.",
                name("listen")
            );
        }
        ensure!(
            !(options.clear && options.keys.is_some()),
            "{} does not go with keys: clients that have none are not taken. Leave one of the two out.",
            name("clear")
        );
        ensure!(
            !options.ktls || options.keys.is_some(),
            "{} needs keys: without them there is no TLS, and nothing is encrypted. Give clients keys with \
             --keys DIRECTORY.",
            name("ktls")
        );
        // A file may get some while the server runs.
        ensure!(
            !options.export.is_empty() || command_line.config.is_some(),
            "There is nothing to serve. Say what with --export NAME=PATH (a directory, a regular file or a \
             block device; add `,rw` to let clients write), or with an [export.NAME] table of a \
             configuration file."
        );
        let mut names = HashSet::new();
        for export in &options.export {
            ensure!(
                names.insert(&export.name),
                "{} has the name {:?} twice. Give each export a name of its own.",
                name("export"),
                export.name
            );
        }

        let http = match &options.http {
            Some(place) => http_addresses(place).map_err(|why| anyhow!("{} {place}: {why}", name("http")))?,
            None => Vec::new(),
        };
        for (option, is_given) in
            [("http-host", !options.http_host.is_empty()), ("http-token", options.http_token.is_some())]
        {
            ensure!(
                !is_given || options.http.is_some(),
                "{} is about what --http serves, and that is not given. Add --http HOST:PORT, or leave this \
                 out.",
                name(option)
            );
        }
        for host in &options.http_host {
            let is_name = !host.is_empty()
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
            ensure!(
                is_name,
                "{} {host:?} is not a host name. Write it without scheme and port, such as \
                 store.example.com.",
                name("http-host")
            );
        }
        if let Some(path) = &options.admin {
            let is_taken = options.hand_over.as_ref() == Some(path)
                || listen.iter().any(|(_, at)| *at == Endpoint::Unix(path.clone()));
            ensure!(
                !is_taken,
                "{}: {} is used by another option, too. Give a path of its own.",
                name("admin"),
                path.display()
            );
            check_socket_path(path).map_err(|why| anyhow!("{}: {why}", name("admin")))?;
        }
        if let Some(path) = &options.hand_over {
            let http_sockets = http.len() + usize::from(options.admin.is_some());
            check_hand_over(path, &listen, http_sockets)
                .map_err(|why| anyhow!("{}: {why}", name("hand-over")))?;
        }

        let workers = options.workers.unwrap_or(cores.clamp(1, WORKERS_MAX));
        ensure!(
            (1..=WORKERS_MAX).contains(&workers),
            "{} is {workers}. Give a number from 1 to {WORKERS_MAX}.",
            name("workers")
        );
        let queue_depth = options.queue_depth.unwrap_or(QUEUE_DEPTH_DEFAULT);
        ensure!(
            (1..=QUEUE_DEPTH_MAX).contains(&queue_depth),
            "{} is {queue_depth}. Give a number from 1 to {QUEUE_DEPTH_MAX}.",
            name("queue-depth")
        );
        if let Some(sessions) = options.max_sessions {
            ensure!(
                (1..=SESSIONS_MAX).contains(&sessions),
                "{} is {sessions}. Give a number from 1 to {SESSIONS_MAX}.",
                name("max-sessions")
            );
        }
        let io_bytes = options.io_max.map_or(IO_BYTES_DEFAULT, |size| size.0);
        ensure!(
            (IO_BYTES_MIN..=IO_BYTES_MAX).contains(&io_bytes),
            "{} is {io_bytes} bytes. Give a size from {}k to {}M.",
            name("io-max"),
            IO_BYTES_MIN >> 10,
            IO_BYTES_MAX >> 20
        );
        let spin_us = options.spin_us.unwrap_or(SPIN_US_DEFAULT);
        ensure!(
            spin_us <= SPIN_US_MAX,
            "{} is {spin_us}. Give a number from 0 to {SPIN_US_MAX}.",
            name("spin-us")
        );
        // A worker must be able to hold two requests, for one alone could be held up by a peer that does not
        // take its answer.
        let arenas_min = workers as u64 * 2 * io_bytes;
        let available = running.map_or_else(memory_limit, |running| running.made.available);
        let split = Memory::split(
            options.memory.map(|size| size.0),
            options.max_sessions,
            workers,
            arenas_min,
            available.bytes / 2,
        );
        let memory = split.all();
        ensure!(
            split.arenas >= arenas_min,
            "{} is {memory} bytes, too little for {workers} workers with an --io-max of {io_bytes} bytes{}. \
             Give at least {} bytes, \
             or fewer --workers{}, or a smaller --io-max.",
            name("memory"),
            options.max_sessions.map_or(String::new(), |sessions| format!(" and --max-sessions {sessions}")),
            Memory::least(options.max_sessions, workers, arenas_min),
            if options.max_sessions.is_some() { ", or fewer --max-sessions" } else { "" }
        );
        ensure!(
            memory <= available.bytes,
            "{} is {memory} bytes, but {} has {} bytes. Give a smaller --memory, and leave some for the \
             page cache.",
            name("memory"),
            available.of,
            available.bytes
        );
        let session_caps = options.limits_per_session.unwrap_or_default();
        let address_caps = options.limits_per_address.unwrap_or_default();
        for (option, caps) in [("limits-per-session", session_caps), ("limits-per-address", address_caps)] {
            let name = name(option);
            if let Some(key) = caps.zero() {
                bail!("{name}: {key} is 0. Give a number from 1 on, or leave it out.");
            }
            let Some(Size(bytes)) = caps.memory else { continue };
            ensure!(
                bytes >= arenas_min,
                "{name}: memory is {bytes} bytes, too little for {workers} workers with an --io-max of \
                 {io_bytes} bytes. Give at \
                 least {arenas_min} bytes, or leave it out."
            );
            ensure!(
                bytes <= available.bytes,
                "{name}: memory is {bytes} bytes, but {} has {} bytes. Give less, or leave it out.",
                available.of,
                available.bytes
            );
        }
        let stall_timeout = options.stall_timeout.unwrap_or(STALL_TIMEOUT_DEFAULT);
        ensure!(
            (1..=STALL_TIMEOUT_MAX).contains(&stall_timeout),
            "{} is {stall_timeout}. Give a number of seconds from 1 to {STALL_TIMEOUT_MAX}.",
            name("stall-timeout")
        );
        let slow = options.slow.unwrap_or(slow::DEFAULT_MS);
        ensure!(slow > 0, "{} is 0. Give a number of milliseconds.", name("slow"));
        let linger = options.linger.unwrap_or(LINGER_DEFAULT);
        ensure!(
            linger <= LINGER_MAX,
            "{} is {linger}. Give a number of seconds from 0 to {LINGER_MAX}.",
            name("linger")
        );
        for directory in &options.exports_beneath {
            ensure!(
                directory.is_absolute(),
                "{}: {} is not a path from / on. Write it whole.",
                name("exports-beneath"),
                directory.display()
            );
        }
        let made = Made {
            options: command_line,
            cores,
            available,
            urls,
            memory: options.memory,
            places: options.places,
            overridden,
        };
        Ok(Config {
            listen,
            exports: options.export,
            exports_beneath: options.exports_beneath,
            workers,
            queue_depth,
            sessions_max: options.max_sessions,
            session_caps,
            address_caps,
            io_bytes_max: io_bytes as u32,
            spin: Duration::from_micros(spin_us),
            arena_bytes: (split.arenas / workers as u64) as usize,
            heap_bytes: (split.heap / workers as u64) as usize,
            places_bytes: split.places as usize,
            stall_timeout: Duration::from_secs(stall_timeout),
            slow: Duration::from_millis(slow),
            linger: Duration::from_secs(linger),
            backend: options.backend.unwrap_or(BackendKind::Uring),
            log: options.log.unwrap_or(LogLevel::Info),
            log_format: options.log_format.unwrap_or_default(),
            trace: options.trace,
            state: options.state,
            hand_over: options.hand_over,
            http,
            http_names: options.http_host,
            http_token: options.http_token,
            admin: options.admin,
            is_open_to_others,
            keys: options.keys,
            has_kernel_tls: options.ktls,
            audit: options.audit.map(AuditTarget::from),
            audit_full: options.audit_full.unwrap_or_default(),
            is_strict: options.strict,
            user: options.user,
            is_sandboxed: options.sandbox != Some(SandboxMode::Off),
            made: Box::new(made),
        })
    }
}

/// An endpoint of a stream socket, with what a URL for it says.
fn of_stream(endpoint: Endpoint) -> (Scheme, Endpoint) {
    (if endpoint.ip().is_some() { Scheme::Tcp } else { Scheme::Unix }, endpoint)
}

/// Why a change of this key is rejected.
fn only_at_the_start(key: &str) -> String {
    format!(
        "{key} can only be changed by a restart: start the server anew, or its successor (--hand-over); \
         sessions go on. Or leave it as it was"
    )
}

/// Whether a Unix socket can be at this path, for other processes to find.
fn check_socket_path(path: &Path) -> anyhow::Result<()> {
    ensure!(
        path.is_absolute(),
        "{} is not a path from / on. Other processes would look for it in their own directory. Write it \
         whole.",
        path.display()
    );
    ensure!(
        path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX,
        "{} is longer than {SOCKET_PATH_BYTES_MAX} bytes. Give a shorter path.",
        path.display()
    );
    Ok(())
}

/// Whether servers that listen there, and at a number of sockets for HTTP, can hand over at this path.
fn check_hand_over(path: &Path, listen: &[(Scheme, Endpoint)], http_sockets: usize) -> anyhow::Result<()> {
    check_socket_path(path)?;
    let sockets = listen.iter().filter(|(scheme, _)| *scheme != Scheme::Rdma).count() + http_sockets;
    ensure!(
        sockets <= HANDED_OVER_MAX,
        "no more than {HANDED_OVER_MAX} listening sockets can be handed over, and there are {sockets}. \
         Listen on fewer addresses, such as 0.0.0.0 for all, or leave this out."
    );
    Ok(())
}

/// The addresses of `--http`. The error says why not, and the right form.
fn http_addresses(place: &str) -> anyhow::Result<Vec<SocketAddr>> {
    const FORM: &str = "Write HOST:PORT, such as 127.0.0.1:7241";
    ensure!(!place.contains("://") && place.contains(':'), "it is not an address with a port. {FORM}.");
    let address = Address::parse(&format!("tcp://{place}")).map_err(|why| anyhow!("{why}. {FORM}."))?;
    let found = address.resolve().map_err(|error| {
        anyhow!("{error}. Give an address or a host name of this machine, or 0.0.0.0 or [::] for all.")
    })?;
    Ok(found.iter().filter_map(Endpoint::ip).collect())
}

/// The addresses of a URL to listen on. The error says why not, and the right form.
fn listen_addresses(url: &str) -> anyhow::Result<Vec<(Scheme, Endpoint)>> {
    const FORM: &str = "Write tcp://HOST:PORT, unix://PATH or rdma://HOST:PORT";
    if !url.contains("://") {
        if url.parse::<u16>().is_ok() {
            bail!(
                "it is a port alone. Write tcp://127.0.0.1:{url} for clients on this machine, or \
                 tcp://0.0.0.0:{url} and --keys for all."
            );
        }
        let meant = format!("tcp://{url}");
        if Address::parse(&meant).is_ok() {
            bail!("it has no scheme. Write {meant}.");
        }
    }
    let address = Address::parse(url).map_err(|why| anyhow!("{why}. {FORM}."))?;
    let scheme = address.scheme();
    if scheme == Scheme::Any {
        bail!("a listener has one transport. {FORM}.");
    }
    let found = address.resolve().map_err(|error| {
        anyhow!(
            "{error}. Give an address or a host name of this machine, or 0.0.0.0 or [::] for all its \
             addresses."
        )
    })?;
    Ok(found.into_iter().map(|found| (scheme, found)).collect())
}

/// What people try for an option of another name, and the option for it.
const OTHER_NAMES: [(&[&str], &str); 6] = [
    (
        &["--port", "--host", "--bind", "--address", "--addr", "--ip", "-p"],
        "The port is part of --listen: write --listen tcp://HOST:PORT.",
    ),
    (&["--threads", "--jobs", "--cpus", "-t", "-j"], "Write --workers NUMBER."),
    (
        &["--path", "--root", "--dir", "--directory", "--file", "--device", "--share", "--volume"],
        "Write --export NAME=PATH.",
    ),
    (
        &["--rw", "--ro", "--readonly", "--read-only"],
        "It belongs to an export: write --export NAME=PATH,rw or ,ro.",
    ),
    (
        &["--verbose", "--debug", "--quiet", "--log-level", "-v", "-d", "-q"],
        "Write --log debug, or another of its levels.",
    ),
    (
        &["--daemon", "--daemonize", "--background"],
        "The server stays in the foreground: let a unit of systemd start it.",
    ),
];

/// What to add to an error of the command line's: the right form, where clap does not know it.
pub fn advice(error: &clap::Error) -> Option<String> {
    let argument = match error.get(clap::error::ContextKind::InvalidArg)? {
        clap::error::ContextValue::String(text) => text.split('=').next()?,
        _ => return None,
    };
    if error.kind() != clap::error::ErrorKind::UnknownArgument {
        return None;
    }
    let known = OTHER_NAMES.iter().find(|(names, _)| names.contains(&argument));
    match known {
        Some((_, advice)) => Some(format!("There is no option {argument}. {advice}")),
        None if argument.starts_with('-') => None,
        None => Some(format!(
            "{argument:?} stands alone. To export it write --export NAME=PATH, and an option's value behind \
             the option."
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::export_spec::Source;
    use crate::size::Size;
    use crate::throttle::Rates;

    fn options(arguments: &[&str]) -> Options {
        Options::try_parse_from(["raio_server"].iter().chain(arguments)).unwrap()
    }

    fn error(arguments: &[&str]) -> String {
        format!("{:#}", options(arguments).check(2).unwrap_err())
    }

    #[test]
    fn the_defaults_are_those_of_the_manual() {
        let config = options(&["--export", "a=/tmp"]).check(2).unwrap();
        assert_eq!(config.listen, [(Scheme::Tcp, "127.0.0.1:7240".parse::<SocketAddr>().unwrap().into())]);
        assert_eq!((config.workers, config.queue_depth, config.io_bytes_max), (2, 128, 1 << 20));
        assert_eq!(config.sessions_max, None);
        assert_eq!((config.spin, config.arena_bytes), (Duration::from_micros(50), 64 << 20));
        assert_eq!((config.backend, config.log), (BackendKind::Uring, LogLevel::Info));
        assert!(config.is_sandboxed && config.user.is_none());
    }

    #[test]
    fn only_keys_or_a_word_of_the_administrator_let_other_machines_in() {
        let is_open = |arguments: &[&str]| {
            let all = [&["--export", "a=/tmp"], arguments].concat();
            options(&all).check(2).map(|config| config.is_open_to_others).ok()
        };
        for local in ["tcp://127.9.0.1:1", "tcp://[::1]:1", "tcp://[::ffff:127.0.0.1]:1", "unix:///s"] {
            assert_eq!(is_open(&["--listen", local]), Some(false), "{local}");
            assert_eq!(is_open(&["--clear", "--listen", local]), Some(false), "{local}");
        }
        for reachable in ["tcp://10.0.0.1:1", "tcp://0.0.0.0:1", "tcp://[::]:1", "tcp://[fe80::1]:1"] {
            assert_eq!(is_open(&["--listen", reachable]), None, "{reachable}");
            assert_eq!(is_open(&["--listen", "unix:///s", "--listen", reachable]), None, "{reachable}");
            assert_eq!(is_open(&["--listen", reachable, "--clear"]), Some(true), "{reachable}");
            assert_eq!(is_open(&["--listen", reachable, "--keys", "/k"]), Some(false), "{reachable}");
        }
    }

    #[test]
    fn http_is_served_where_that_is_said_and_with_what_goes_with_it() {
        let check = |arguments: &[&str]| options(&[&["--export", "a=/tmp"], arguments].concat()).check(2);
        let config = check(&[]).unwrap();
        assert!(config.http.is_empty() && config.admin.is_none());
        let config = check(&["--http", "[::1]:7241", "--http-host", "a.b", "--admin", "/run/a"]).unwrap();
        assert_eq!(config.http, ["[::1]:7241".parse().unwrap()]);
        assert_eq!((config.http_names, config.admin), (vec!["a.b".to_owned()], Some("/run/a".into())));
        for (arguments, said) in [
            (&["--http", "7241"][..], "Write HOST:PORT, such as 127.0.0.1:7241."),
            (&["--http", "http://127.0.0.1:7241"], "--http http://127.0.0.1:7241: "),
            (&["--http", "127.0.0.1"], "Write HOST:PORT"),
            (&["--http-host", "a"], "Add --http HOST:PORT"),
            (&["--http-token", "/t"], "Add --http HOST:PORT"),
            (&["--http", "127.0.0.1:1", "--http-host", "http://a"], "without scheme and port"),
            (&["--admin", "run/a"], "--admin: run/a is not a path from / on."),
            (&["--admin", "/a", "--hand-over", "/a"], "Give a path of its own."),
            (&["--admin", "/a", "--listen", "unix:///a"], "Give a path of its own."),
        ] {
            let error = error(&[&["--export", "a=/tmp"], arguments].concat());
            assert!(error.contains(said), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn the_kernel_seals_only_if_that_is_said() {
        let config = options(&["--export", "a=/tmp", "--keys", "/k"]).check(2).unwrap();
        assert!(!config.has_kernel_tls);
        let config = options(&["--export", "a=/tmp", "--keys", "/k", "--ktls"]).check(2).unwrap();
        assert!(config.has_kernel_tls);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("raio.toml");
        std::fs::write(&path, "export = ['a=/tmp']\nkeys = '/k'\nktls = true\n").unwrap();
        assert!(options(&["--config", path.to_str().unwrap()]).check(2).unwrap().has_kernel_tls);
    }

    #[test]
    fn the_command_line_goes_before_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("raio.toml");
        let text = "listen = ['tcp://127.0.0.2:1', 'tcp://[::1]:2']\nexport = ['a=/tmp']\nio-max = \
        '64k'\nmemory = 8388608\n\
                    queue-depth = 7\nbackend = 'threads'\nlog = 'debug'\nspin-us = 0\nworkers = 3\n\
                    max-sessions = 5\nuser = 'nobody'\nsandbox = 'off'\n";
        std::fs::write(&path, text).unwrap();
        let path = path.to_str().unwrap();
        let config = options(&["--config", path]).check(2).unwrap();
        assert_eq!(config.listen.len(), 2);
        assert_eq!((config.workers, config.queue_depth, config.io_bytes_max), (3, 7, 64 << 10));
        assert_eq!((config.spin, config.arena_bytes), (Duration::ZERO, (4 << 20) / 3));
        assert_eq!(config.sessions_max, Some(5));
        assert_eq!((config.backend, config.log), (BackendKind::Threads, LogLevel::Debug));
        assert_eq!((config.user.as_deref(), config.is_sandboxed), (Some("nobody"), false));
        let config = options(&["--config", path, "--user", "0", "--sandbox=on"]).check(2).unwrap();
        assert_eq!((config.user.as_deref(), config.is_sandboxed), (Some("0"), true));
        let config =
            options(&["--config", path, "--queue-depth", "9", "--export", "b=/", "--backend", "uring"]);
        let config = config.check(2).unwrap();
        assert_eq!(
            (config.queue_depth, config.io_bytes_max, config.backend),
            (9, 64 << 10, BackendKind::Uring)
        );
        assert_eq!(config.exports.iter().map(|export| export.name.as_str()).collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn every_error_names_the_option_and_says_what_to_write() {
        for (arguments, needle) in [
            (&[][..], "--export NAME=PATH"),
            (&["--export", "a=/", "--export", "a=/tmp"], "--export has the name \"a\" twice"),
            (&["--export", "a=/", "--workers", "0"], "--workers is 0"),
            (&["--export", "a=/", "--queue-depth", "65535"], "--queue-depth is 65535"),
            (&["--export", "a=/", "--max-sessions", "0"], "--max-sessions is 0"),
            (&["--export", "a=/", "--io-max", "1"], "--io-max is 1 bytes"),
            (&["--export", "a=/", "--memory", "1M"], "--memory is 1048576 bytes"),
            (&["--export", "a=/", "--memory", "8388607G"], "Give a smaller --memory"),
            (&["--export", "a=/", "--stall-timeout", "0"], "--stall-timeout is 0"),
            (&["--export", "a=/", "--slow", "0"], "--slow is 0"),
            (&["--export", "a=/", "--linger", "86401"], "--linger is 86401"),
            (&["--export", "a=/", "--limits-per-session", "files=0"], "--limits-per-session: files is 0"),
            (
                &["--export", "a=/", "--limits-per-address", "memory=1M"],
                "memory is 1048576 bytes, too little",
            ),
            (&["--export", "a=/", "--limits-per-address", "memory=8388607G"], "Give less"),
            (&["--export", "a=/", "--spin-us", "1000001"], "--spin-us is 1000001"),
            (&["--export", "a=/", "--listen", "7240"], "tcp://127.0.0.1:7240"),
            (&["--export", "a=/", "--listen", "localhost:7240"], "Write tcp://localhost:7240"),
            (&["--export", "a=/", "--listen", "tcp://no-such-host.invalid:1"], "no-such-host.invalid"),
            (&["--export", "a=/", "--listen", "raio://0.0.0.0"], "tcp://HOST:PORT"),
            (&["--export", "a=/", "--listen", "unix://here"], "does not begin with /"),
            (&["--export", "a=/", "--listen", "tcp://10.0.0.1:1"], "10.0.0.1:1: other machines"),
            (&["--export", "a=/", "--listen", "tcp://[::]:1"], "[::]:1: other machines"),
            (&["--export", "a=/", "--clear", "--keys", "/k"], "--clear does not go with keys"),
            (&["--export", "a=/", "--hand-over", "here"], "--hand-over: here is not a path from / on"),
            (&["--export", "a=/", "--ktls"], "--ktls needs keys"),
            (&["--export", "a=/", "--ktls", "--clear"], "--ktls needs keys"),
            (&["--config", "/no/such/file"], "--config"),
        ] {
            let error = error(arguments);
            assert!(error.contains(needle), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn tables_of_exports_have_all_keys() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("raio.toml");
        let text = "[export.a]\npath = '/srv,x'\naccess = 'rw'\ndirect = true\nmountpoint = true\ndevices = \
        true\n\
                    grow = true\nmax-file-size = '1G'\ncross-mounts = true\niops = 100\nbandwidth = '1M'\n\
                    burst = 2\n[export.n]\nnull = '1M'\n\
                    [export.m]\nmemory = 4096\naccess = 'ro'\n";
        std::fs::write(&path, text).unwrap();
        let config = options(&["--config", path.to_str().unwrap()]).check(2).unwrap();
        let spec = |name: &str| config.exports.iter().find(|export| export.name == name).unwrap();
        let a = ExportSpec {
            name: "a".into(),
            source: Source::Path("/srv,x".into()),
            is_writable: true,
            is_direct: true,
            must_be_mountpoint: true,
            has_devices: true,
            may_grow: true,
            file_bytes_max: Some(1 << 30),
            crosses_mounts: true,
            rates: Rates::new(Some(100), Some(Size(1 << 20)), Some(2.0)).unwrap(),
        };
        assert_eq!(*spec("a"), a);
        assert_eq!(spec("n").source, Source::Null(1 << 20));
        assert_eq!((&spec("m").source, spec("m").is_writable), (&Source::Memory(4096), false));
    }

    #[test]
    fn mistakes_in_the_file_are_told_with_line_and_column() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("raio.toml");
        for (text, place, needle) in [
            ("\n io_max = 1", "2:2", "io_max"),
            ("memory = '1x'", "1:10", "not a size"),
            ("memory = true", "1:10", "such as \"64k\""),
            ("workers = -1", "1:11", "-1"),
            ("listen = [", "1:11", ""),
            ("export = ['a=/']\n  workers = 0", "2:3", "workers is 0"),
            ("export = ['a=/']\nlisten = ['7']", "2:1", "tcp://127.0.0.1:7"),
            ("export = ['a=/']\nktls = true", "2:1", "ktls needs keys"),
            ("export = ['a=/,RW']", "1:10", "`,rw`"),
            ("[export.a]\npath = '/'\naccess = 'RW'", "3:10", "`rw`"),
            ("[export.a]\npath = '/'\nacess = 'rw'", "3:1", "acess"),
            ("[export.a]\npath = '/'\nnull = '1M'", "1:1", "one source"),
            ("[export.a]\naccess = 'rw'", "1:1", "one source"),
            ("[export.a]\nnull = '1M'\ngrow = true", "1:1", "`grow`"),
            ("[export.a]\nnull = '1M'\niops = 0", "1:1", "iops is 0"),
            ("[export.a]\nnull = '1M'\niops = -1", "3:8", "-1"),
            ("[export.a]\nnull = '1M'\nburst = 1.5", "1:1", "without iops or bandwidth"),
            ("[export.'a/b']\nnull = '1M'", "1:9", "cannot name"),
            ("[export.a]\nmemory = 0", "1:1", "size is 0"),
            ("[export.a]\nnull = '1M'\n[export.a]\nnull = '1M'", "3:9", "duplicate"),
            ("export = ['a=/']\n[limits-per-session]\nfiles = 0", "2:2", "limits-per-session: files is 0"),
            ("export = ['a=/']\n[limits-per-address]\nfile = 1", "3:1", "file"),
            ("export = ['a=/']\n[limits-per-address]\nmemory = '1x'", "3:10", "not a size"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = error(&["--config", path.to_str().unwrap()]);
            let place = format!("{}:{place}: ", path.display());
            assert!(error.contains(needle) && error.starts_with(&place), "{text:?} ({place}): {error}");
        }
    }

    #[test]
    fn memory_is_for_data_and_for_connections_and_their_messages() {
        const MIB: u64 = 1 << 20;
        let split = |all, sessions, most| {
            let Memory { arenas, heap, places } = Memory::split(all, sessions, 2, 4 * MIB, most);
            [arenas, heap, places].map(|bytes| bytes / MIB)
        };
        assert_eq!(split(None, None, u64::MAX), [128, 32, 544]);
        assert_eq!(split(None, Some(65_536), 0), [128, 32, 1088], "that number of sessions was asked for");
        let many = Memory::split(None, None, 1024, 2048 * MIB, u64::MAX);
        assert_eq!((many.arenas, many.heap), (2048 * MIB, 4096 * MIB), "it grows with the workers");
        assert_eq!(split(None, None, 128 * MIB), [64, 16, 48], "on a small machine there is less");
        assert_eq!(split(None, None, 1), [4, 1, 3]);
        assert_eq!(split(Some(64 * MIB), None, 1), [32, 8, 24]);
        assert_eq!(split(Some(64 * MIB), Some(2048), 1), [22, 8, 34]);
        assert_eq!(
            split(Some(64 * MIB), Some(1), 1),
            [32, 8, 24],
            "what few sessions leave is for queue pairs"
        );
        assert_eq!(split(Some(8 * MIB), Some(1), 1), [4, 1, 3]);
        assert_eq!(split(None, Some(1), u64::MAX), [128, 32, 544]);
        let least = Memory::least(Some(1024), 2, 4 * MIB);
        assert!(Memory::split(Some(least), Some(1024), 2, 4 * MIB, 0).arenas >= 4 * MIB);
        assert!(Memory::split(Some(least - 8), Some(1024), 2, 4 * MIB, 0).arenas < 4 * MIB);
    }

    /// All keys of the last release: see tests/compat/baseline.
    const KEYS_OF_THE_LAST_RELEASE: &str = "
        listen = ['tcp://127.0.0.1:0']
        workers = 2
        queue-depth = 64
        max-sessions = 100
        limits-per-session = { connections = 8, files = 100, requests = 200, memory = '64M' }
        limits-per-address = { connections = 80, files = 1000, requests = 2000, memory = '128M' }
        io-max = '1M'
        spin-us = 20
        memory = '512M'
        stall-timeout = 5
        linger = 60
        backend = 'threads'
        log = 'warn'
        trace = '/trace'
        state = '/state'
        strict = true
        [export.d]
        path = '/srv'
        access = 'rw'
        direct = true
        mountpoint = true
        devices = true
        max-file-size = '1G'
        cross-mounts = true
        [export.f]
        path = '/srv/f'
        access = 'ro'
        grow = true
        [export.m]
        memory = '1M'
        [export.n]
        null = '1G'
    ";

    /// A configuration of this text, and what becomes of it when the file has another one.
    fn read_again(arguments: &[&str], before: &str, after: &str) -> (Config, anyhow::Result<Config>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("raio.toml");
        std::fs::write(&path, before).unwrap();
        let arguments = [&["--config", path.to_str().unwrap()], arguments].concat();
        let config = options(&arguments).check(2).unwrap();
        std::fs::write(&path, after).unwrap();
        let again = config.read_again();
        (config, again)
    }

    #[test]
    fn a_file_of_the_last_release_is_accepted() {
        let (_, again) = read_again(&[], KEYS_OF_THE_LAST_RELEASE, KEYS_OF_THE_LAST_RELEASE);
        assert_eq!(again.unwrap().exports.len(), 4);
    }

    #[test]
    fn a_file_that_is_read_again_may_change_what_can_change_and_nothing_else() {
        let base = "[export.n]\nnull = '1G'\n";
        for line in
            ["max-sessions = 9", "linger = 1", "stall-timeout = 1", "spin-us = 1", "log = 'debug'", ""]
        {
            let (_, again) = read_again(&[], base, &format!("{line}\n{base}"));
            again.unwrap();
        }
        for line in [
            "listen = ['tcp://127.0.0.1:0']",
            "workers = 1",
            "queue-depth = 1",
            "io-max = '2M'",
            "memory = '256M'",
            "backend = 'threads'",
            "trace = '/x'",
            "state = '/x'",
            "hand-over = '/x'",
            "keys = '/x'",
            "audit = '/x'",
            "audit-full = 'wait'",
            "strict = true",
            "user = 'nobody'",
            "sandbox = 'off'",
            "exports-beneath = ['/x']",
        ] {
            let (_, again) = read_again(&[], base, &format!("{line}\n{base}"));
            let error = again.expect_err(line).to_string();
            let key = line.split(' ').next().unwrap();
            let expected = format!("raio.toml:1:1: {key} can only be changed by a restart");
            assert!(error.contains(&expected), "{error}");
        }
    }

    #[test]
    fn what_the_command_line_overrides_changes_in_vain() {
        let base = "[export.n]\nnull = '1G'\n";
        let arguments = ["--workers", "1", "--linger", "7"];
        let (old, again) =
            read_again(&arguments, base, &format!("workers = 2\nlinger = 3\nspin-us = 1\n{base}"));
        let new = again.unwrap();
        assert_eq!((new.workers, new.linger), (1, Duration::from_secs(7)));
        assert_eq!(old.changed_in_vain(&new).collect::<Vec<_>>(), ["linger", "workers"]);
    }
}
