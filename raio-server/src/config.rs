//! What the server is told: command line and TOML file, merged and checked.
//!
//! Both have the same names. What the command line gives takes the place of what the file says. Every error is a sentence that
//! names the option.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Parser, ValueEnum};
use raio_transport::address::{Address, Scheme};
use raio_transport::size;
use serde::Deserialize;

use crate::export::ExportSpec;

const LISTEN_DEFAULT: &str = "tcp://127.0.0.1:7240";
const QUEUE_DEPTH_DEFAULT: u32 = 128;
/// What the wire's credits can count.
const QUEUE_DEPTH_MAX: u32 = 65_534;
const IO_BYTES_DEFAULT: u64 = 1 << 20;
const IO_BYTES_MIN: u64 = 4 << 10;
const IO_BYTES_MAX: u64 = 256 << 20;
const MEMORY_BYTES_DEFAULT: u64 = 128 << 20;
const SPIN_US_DEFAULT: u64 = 50;
const SPIN_US_MAX: u64 = 1_000_000;
const WORKERS_MAX: usize = 1024;
/// More than a process can have open files.
const SESSIONS_MAX: usize = 1 << 24;

/// Serves directories, files and block devices to raio clients.
#[derive(Debug, Default, Parser, Deserialize)]
#[command(name = "raio_server", version, after_help = "See raio_server(8) for more.")]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Options {
    /// Accept connections there, tcp://HOST:PORT or rdma://HOST:PORT; repeatable; port 0 takes a free one [default:
    /// tcp://127.0.0.1:7240]
    #[arg(long, value_name = "URL")]
    listen: Vec<String>,
    /// Give clients something to open as /NAME; read-only unless rw; repeatable. PATH is a directory, a regular file or a block
    /// device, or null:SIZE (zeros, nothing kept) or mem:SIZE (memory)
    #[arg(long, value_name = "NAME=PATH[,rw][,direct]")]
    export: Vec<String>,
    /// Threads that serve connections [default: one for each core]
    #[arg(long, value_name = "NUMBER")]
    workers: Option<usize>,
    /// Requests that one connection may have outstanding [default: 128]
    #[arg(long, value_name = "NUMBER")]
    queue_depth: Option<u32>,
    /// Sessions that clients may have at a time; who comes beyond is turned away [default: a quarter of the open files that the
    /// process may have]
    #[arg(long, value_name = "NUMBER")]
    max_sessions: Option<usize>,
    /// Largest read or write in one request [default: 1M]
    #[arg(long, value_name = "SIZE")]
    io_max: Option<Size>,
    /// How long an idle worker looks for work before it sleeps [default: 50]
    #[arg(long, value_name = "MICROSECONDS")]
    spin_us: Option<u64>,
    /// Buffers for data in flight, shared out among the workers [default: 128M]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// How files are read and written [default: uring where the system allows it, else threads]
    #[arg(long, value_enum)]
    backend: Option<BackendKind>,
    /// Show each RDMA device with its ports and addresses, and why one cannot be used; then exit
    #[arg(long)]
    #[serde(skip)]
    pub list_devices: bool,
    /// What to log to standard error [default: info]
    #[arg(long, value_enum)]
    log: Option<LogLevel>,
    /// Read options from this TOML file; they have the names of these, without the dashes in front
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
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

/// How much to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// What went wrong.
    Error,
    /// And what looks wrong.
    Warn,
    /// And what an operator may like to know.
    Info,
    /// And each connection and session.
    Debug,
    /// And everything.
    Trace,
}

/// A number of bytes: `4096`, `64k`, `1M`, `2G`, `1T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "SizeText")]
pub struct Size(pub u64);

#[derive(Deserialize)]
#[serde(untagged)]
enum SizeText {
    Number(u64),
    Text(String),
}

impl TryFrom<SizeText> for Size {
    type Error = String;

    fn try_from(text: SizeText) -> Result<Self, String> {
        match text {
            SizeText::Number(bytes) => Ok(Self(bytes)),
            SizeText::Text(text) => text.parse(),
        }
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        size::parse(text).map(Self)
    }
}

/// The configuration, checked.
#[derive(Debug)]
pub struct Config {
    /// Where to listen, and for what.
    pub listen: Vec<(Scheme, SocketAddr)>,
    /// What to export.
    pub exports: Vec<ExportSpec>,
    /// How many worker threads.
    pub workers: usize,
    /// Requests outstanding on a connection, at most.
    pub queue_depth: u32,
    /// Sessions at a time, at most. None: what the limit on open files allows.
    pub sessions_max: Option<usize>,
    /// Data of a request, at most.
    pub io_bytes_max: u32,
    /// How long to spin before sleeping.
    pub spin: Duration,
    /// Each worker's arena.
    pub arena_bytes: usize,
    /// What was asked for.
    pub backend: BackendKind,
    /// How much to log.
    pub log: LogLevel,
}

impl Options {
    /// Reads the configuration file if one is named, and fills in what the command line left out.
    fn merged(mut self) -> anyhow::Result<Self> {
        let Some(path) = self.config.take() else { return Ok(self) };
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("Cannot read the file that --config names, {}", path.display()))?;
        let file: Self = toml::from_str(&text).map_err(|error| {
            anyhow::anyhow!(
                "The configuration file {} makes no sense: {error}\nIts keys are the names of the options without the \
                 dashes in front, see `raio_server --help`.",
                path.display()
            )
        })?;
        let or = |mine: Vec<String>, file| if mine.is_empty() { file } else { mine };
        Ok(Self {
            listen: or(self.listen, file.listen),
            export: or(self.export, file.export),
            workers: self.workers.or(file.workers),
            queue_depth: self.queue_depth.or(file.queue_depth),
            max_sessions: self.max_sessions.or(file.max_sessions),
            io_max: self.io_max.or(file.io_max),
            spin_us: self.spin_us.or(file.spin_us),
            memory: self.memory.or(file.memory),
            backend: self.backend.or(file.backend),
            log: self.log.or(file.log),
            list_devices: false,
            config: None,
        })
    }

    /// Merges, fills in the defaults and checks everything that can be checked without opening anything. `cores` is how many the
    /// process may use.
    pub fn check(self, cores: usize) -> anyhow::Result<Config> {
        let options = self.merged()?;
        let mut urls = options.listen;
        if urls.is_empty() {
            urls.push(LISTEN_DEFAULT.to_owned());
        }
        let mut listen = Vec::new();
        for url in &urls {
            listen.extend(listen_addresses(url)?);
        }

        ensure!(
            !options.export.is_empty(),
            "There is nothing to serve. Say what with --export NAME=PATH (a directory, a regular file or a block device; add \
             `,rw` to let clients write), or put `export = [\"NAME=PATH\"]` into the configuration file."
        );
        let mut exports = Vec::new();
        for text in &options.export {
            let export: ExportSpec = text.parse().map_err(anyhow::Error::msg)?;
            ensure!(
                exports.iter().all(|other: &ExportSpec| other.name != export.name),
                "--export names {:?} twice. Give each export a name of its own.",
                export.name
            );
            exports.push(export);
        }

        let workers = options.workers.unwrap_or(cores.clamp(1, WORKERS_MAX));
        ensure!(
            (1..=WORKERS_MAX).contains(&workers),
            "--workers is {workers}. Give a number from 1 to {WORKERS_MAX}."
        );
        let queue_depth = options.queue_depth.unwrap_or(QUEUE_DEPTH_DEFAULT);
        ensure!(
            (1..=QUEUE_DEPTH_MAX).contains(&queue_depth),
            "--queue-depth is {queue_depth}. Give a number from 1 to {QUEUE_DEPTH_MAX}."
        );
        if let Some(sessions) = options.max_sessions {
            ensure!(
                (1..=SESSIONS_MAX).contains(&sessions),
                "--max-sessions is {sessions}. Give a number from 1 to {SESSIONS_MAX}."
            );
        }
        let io_bytes = options.io_max.map_or(IO_BYTES_DEFAULT, |size| size.0);
        ensure!(
            (IO_BYTES_MIN..=IO_BYTES_MAX).contains(&io_bytes),
            "--io-max is {io_bytes} bytes. Give a size from {}k to {}M.",
            IO_BYTES_MIN >> 10,
            IO_BYTES_MAX >> 20
        );
        let spin_us = options.spin_us.unwrap_or(SPIN_US_DEFAULT);
        ensure!(spin_us <= SPIN_US_MAX, "--spin-us is {spin_us}. Give a number from 0 to {SPIN_US_MAX}.");
        // A worker must be able to hold two requests, for one alone could be held up by a peer that does not take its answer.
        let memory_min = workers as u64 * 2 * io_bytes;
        let memory = options.memory.map_or(MEMORY_BYTES_DEFAULT.max(memory_min), |size| size.0);
        ensure!(
            memory >= memory_min,
            "--memory is {memory} bytes, too little for {workers} workers with an --io-max of {io_bytes} bytes. Give at least \
             {memory_min} bytes (two of the largest requests for each worker), or fewer --workers, or a smaller --io-max."
        );
        Ok(Config {
            listen,
            exports,
            workers,
            queue_depth,
            sessions_max: options.max_sessions,
            io_bytes_max: io_bytes as u32,
            spin: Duration::from_micros(spin_us),
            arena_bytes: (memory / workers as u64) as usize,
            backend: options.backend.unwrap_or(BackendKind::Uring),
            log: options.log.unwrap_or(LogLevel::Info),
        })
    }
}

fn listen_addresses(url: &str) -> anyhow::Result<Vec<(Scheme, SocketAddr)>> {
    let address: Address = url.parse().context("--listen")?;
    if address.scheme == Scheme::Any {
        bail!("--listen {url}: a listener has one transport. Write tcp://HOST:PORT or rdma://HOST:PORT.");
    }
    let found = address.resolve().context("--listen")?;
    Ok(found.into_iter().map(|found| (address.scheme, found)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(arguments: &[&str]) -> Options {
        Options::try_parse_from(["raio_server"].iter().chain(arguments)).unwrap()
    }

    fn error(arguments: &[&str]) -> String {
        format!("{:#}", options(arguments).check(2).unwrap_err())
    }

    #[test]
    fn the_defaults_are_those_of_the_manual() {
        let config = options(&["--export", "a=/tmp"]).check(2).unwrap();
        assert_eq!(config.listen, [(Scheme::Tcp, "127.0.0.1:7240".parse().unwrap())]);
        assert_eq!((config.workers, config.queue_depth, config.io_bytes_max), (2, 128, 1 << 20));
        assert_eq!(config.sessions_max, None);
        assert_eq!((config.spin, config.arena_bytes), (Duration::from_micros(50), 64 << 20));
        assert_eq!((config.backend, config.log), (BackendKind::Uring, LogLevel::Info));
    }

    #[test]
    fn the_command_line_goes_before_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("raio.toml");
        let text = "listen = ['tcp://127.0.0.2:1', 'tcp://[::1]:2']\nexport = ['a=/tmp']\nio-max = '64k'\nmemory = 8388608\n\
                    queue-depth = 7\nbackend = 'threads'\nlog = 'debug'\nspin-us = 0\nworkers = 3\n\
                    max-sessions = 5\n";
        std::fs::write(&path, text).unwrap();
        let path = path.to_str().unwrap();
        let config = options(&["--config", path]).check(2).unwrap();
        assert_eq!(config.listen.len(), 2);
        assert_eq!((config.workers, config.queue_depth, config.io_bytes_max), (3, 7, 64 << 10));
        assert_eq!((config.spin, config.arena_bytes), (Duration::ZERO, 8_388_608 / 3));
        assert_eq!(config.sessions_max, Some(5));
        assert_eq!((config.backend, config.log), (BackendKind::Threads, LogLevel::Debug));
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
            (&["--export", "a=/", "--export", "a=/tmp"], "--export names \"a\" twice"),
            (&["--export", "a"], "--export a"),
            (&["--export", "a=/", "--workers", "0"], "--workers is 0"),
            (&["--export", "a=/", "--queue-depth", "65535"], "--queue-depth is 65535"),
            (&["--export", "a=/", "--max-sessions", "0"], "--max-sessions is 0"),
            (&["--export", "a=/", "--io-max", "1"], "--io-max is 1 bytes"),
            (&["--export", "a=/", "--memory", "1M"], "--memory is 1048576 bytes"),
            (&["--export", "a=/", "--spin-us", "1000001"], "--spin-us is 1000001"),
            (&["--export", "a=/", "--listen", "7240"], "--listen"),
            (&["--export", "a=/", "--listen", "raio://0.0.0.0"], "tcp://HOST:PORT"),
            (&["--config", "/no/such/file"], "--config"),
        ] {
            let error = error(arguments);
            assert!(error.contains(needle), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn an_unknown_key_or_a_wrong_value_in_the_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("raio.toml");
        for (text, needle) in
            [("io_max = 1", "io_max"), ("memory = '1x'", "memory"), ("workers = -1", "workers")]
        {
            std::fs::write(&path, text).unwrap();
            let error = error(&["--config", path.to_str().unwrap()]);
            assert!(error.contains(needle) && error.contains("raio.toml"), "{error}");
        }
    }

    #[test]
    fn the_default_memory_grows_with_the_workers() {
        let config = options(&["--export", "a=/", "--workers", "1024"]).check(2).unwrap();
        assert_eq!(config.arena_bytes, 2 << 20);
    }

    #[test]
    fn sizes_are_numbers_with_a_unit() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("64k", 64 << 10), ("1M", 1 << 20), ("2g", 2 << 30), ("1T", 1 << 40)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "k", "-1", "1.5M", "+1", "1kB", "0x10", "9999999T", "18446744073709551616", "ä"] {
            assert!(text.parse::<Size>().unwrap_err().ends_with('.'), "{text}");
        }
    }
}
