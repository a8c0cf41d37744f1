//! What the program is told, checked.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use raio_transport::address::{Address, Endpoint, Scheme};
use raio_transport::size;
use raio_transport::tls::ClientTls;

use super::content::WORD_BYTES;
use super::tuning::{DEPTH_MAX, IO_BYTES_MAX, LOOPBACK_SOURCES, OPEN_TIMEOUT, SESSIONS_MAX};
use crate::global::Global;

// Headings of the help.
const SESSIONS: &str = "Options for sessions";
const REQUESTS: &str = "Options for reads and writes";

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// The server: raio://HOST, raio://HOST:PORT or raio+tcp://HOST:PORT; always over TCP
    url: String,
    /// The file that each session opens, /EXPORT/path/beneath/it
    path: String,
    /// How many sessions
    #[arg(long, value_name = "NUMBER", default_value_t = 1, help_heading = SESSIONS)]
    sessions: usize,
    /// Open this number a second, evenly; 0: as fast as it goes
    #[arg(long, value_name = "NUMBER", default_value_t = 0, help_heading = SESSIONS)]
    rate: u32,
    /// Connect from this address; repeatable: in turn [default: the system's choice, or many of 127.0.0.0/8
    /// if the server is there]
    #[arg(long, value_name = "ADDRESS", help_heading = SESSIONS)]
    source: Vec<IpAddr>,
    /// Use the file's first SIZE bytes [default: all]
    #[arg(long, value_name = "SIZE", value_parser = size::parse, help_heading = REQUESTS)]
    size: Option<u64>,
    /// Before all else make the file, or write its first --size bytes, so that --verify knows what they are
    #[arg(long, help_heading = REQUESTS)]
    fill: bool,
    /// Length of each read and write
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = size::parse)]
    #[arg(help_heading = REQUESTS)]
    io_size: u64,
    /// Which reads and writes; rw and randrw are half of each
    #[arg(long, value_enum, default_value_t = Pattern::Randread, help_heading = REQUESTS)]
    pattern: Pattern,
    /// Requests that a session has in flight
    #[arg(long, value_name = "NUMBER", default_value_t = 1, help_heading = REQUESTS)]
    depth: u32,
    /// Requests that all sessions together have in flight, at most
    #[arg(long, value_name = "NUMBER", default_value_t = 1024, help_heading = REQUESTS)]
    in_flight: usize,
    /// How many of the sessions have work; the others are open and idle
    #[arg(long, value_name = "PERCENT", default_value_t = 100.0, help_heading = SESSIONS)]
    active: f64,
    /// For how long
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, conflicts_with = "rounds")]
    seconds: f64,
    /// Not for a time, but until each active session has done this number of reads and writes
    #[arg(long, value_name = "NUMBER")]
    rounds: Option<u64>,
    /// Let sessions whose connection is lost try this long to go on; 0: they are lost
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0, help_heading = SESSIONS)]
    reconnect: f64,
    /// Check every byte that is read, and write what is there already
    #[arg(long, help_heading = REQUESTS)]
    verify: bool,
    /// When all sessions are open, wait until there is a line, or the end, on standard input
    #[arg(long, help_heading = SESSIONS)]
    hold: bool,
    /// Chooses the offsets of random patterns
    #[arg(long, value_name = "NUMBER", default_value_t = 1, help_heading = REQUESTS)]
    seed: u64,
}

/// Which reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum Pattern {
    Read,
    Write,
    Rw,
    Randread,
    Randwrite,
    Randrw,
}

impl Pattern {
    /// Whether offsets are random.
    pub fn is_random(self) -> bool {
        matches!(self, Self::Randread | Self::Randwrite | Self::Randrw)
    }

    /// Whether it has reads, and writes.
    pub fn directions(self) -> (bool, bool) {
        match self {
            Self::Read | Self::Randread => (true, false),
            Self::Write | Self::Randwrite => (false, true),
            Self::Rw | Self::Randrw => (true, true),
        }
    }
}

/// When the reads and writes end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Until {
    /// After a time.
    Elapsed(Duration),
    /// When each active session has done this number.
    Rounds(u64),
}

/// What is to be done.
#[derive(Debug)]
pub struct Plan {
    /// The server.
    pub server: Endpoint,
    /// How its connections are secured; None: they are not.
    pub tls: Option<ClientTls>,
    /// The file.
    pub path: String,
    /// How many sessions.
    pub sessions: usize,
    /// How many of them have work.
    pub active: usize,
    /// New sessions in a second; 0: no limit.
    pub rate: u32,
    /// Where to connect from, in turn; none: the system chooses.
    pub sources: Vec<IpAddr>,
    /// How much of the file; None: all of it.
    pub size: Option<u64>,
    /// Write it first.
    pub fill: bool,
    /// Length of each read and write.
    pub io_bytes: u32,
    /// Which.
    pub pattern: Pattern,
    /// In flight for each session.
    pub depth: u32,
    /// In flight in all.
    pub in_flight_max: usize,
    /// For how long.
    pub until: Until,
    /// How long a session whose connection was lost tries to go on; zero: not at all.
    pub reconnect: Duration,
    /// Check what is read.
    pub verify: bool,
    /// Wait when all are open.
    pub hold: bool,
    /// For random offsets.
    pub seed: u64,
    /// How long connecting, the handshake and the open may take, each.
    pub open_timeout: Duration,
}

impl Options {
    /// Checks everything that can be checked before anything is connected.
    pub fn check(self, global: &Global) -> anyhow::Result<Plan> {
        let address: Address = self.url.parse()?;
        ensure!(
            address.scheme() != Scheme::Rdma,
            "{} asks for RDMA, and raio load measures sessions over TCP. Write raio+tcp://HOST:PORT.",
            self.url
        );
        ensure!(
            address.host().is_none_or(|(_, port)| port != 0),
            "{} names port 0. Give the port that raio_server printed.",
            self.url
        );
        ensure!(
            (1..=SESSIONS_MAX).contains(&self.sessions),
            "--sessions is {}. Give a number from 1 to {SESSIONS_MAX}.",
            self.sessions
        );
        ensure!(
            self.io_size > 0
                && self.io_size.is_multiple_of(WORD_BYTES as u64)
                && self.io_size <= IO_BYTES_MAX,
            "--io-size is {} bytes. Give a multiple of {WORD_BYTES}, at most {}M.",
            self.io_size,
            IO_BYTES_MAX >> 20
        );
        ensure!(
            self.size.is_none_or(|size| size >= self.io_size),
            "--size is less than --io-size. Give at least {} bytes.",
            self.io_size
        );
        ensure!(!self.fill || self.size.is_some(), "--fill does not know how much. Say it with --size.");
        ensure!(
            (1..=DEPTH_MAX).contains(&self.depth),
            "--depth is {}. Give a number from 1 to {DEPTH_MAX}.",
            self.depth
        );
        ensure!(self.in_flight > 0, "--in-flight is 0. Give at least 1.");
        ensure!(
            self.active > 0.0 && self.active <= 100.0,
            "--active is {} percent. Give more than 0, and at most 100.",
            self.active
        );
        ensure!(
            self.seconds > 0.0 && self.seconds <= 1e6,
            "--seconds is {}. Give more than 0, and at most a million.",
            self.seconds
        );
        ensure!(
            (0.0..=1e6).contains(&self.reconnect),
            "--reconnect is {}. Give 0, or at most a million seconds.",
            self.reconnect
        );
        let server = address.resolve()?.into_iter().next().context("The host has no address")?;
        let tls = global.tls(&address, &server)?;
        let sources = match server.ip().map(|server| server.ip()) {
            _ if !self.source.is_empty() => self.source,
            Some(IpAddr::V4(ip)) if ip.is_loopback() => loopback_sources(self.sessions),
            _ => Vec::new(),
        };
        Ok(Plan {
            server,
            tls,
            path: self.path,
            sessions: self.sessions,
            active: ((self.sessions as f64 * self.active / 100.0).round() as usize).clamp(1, self.sessions),
            rate: self.rate,
            sources,
            size: self.size,
            fill: self.fill,
            io_bytes: self.io_size as u32,
            pattern: self.pattern,
            depth: self.depth,
            in_flight_max: self.in_flight,
            until: self.rounds.map_or(Until::Elapsed(Duration::from_secs_f64(self.seconds)), Until::Rounds),
            reconnect: Duration::from_secs_f64(self.reconnect),
            verify: self.verify,
            hold: self.hold,
            seed: self.seed,
            open_timeout: global.timeout.unwrap_or(OPEN_TIMEOUT),
        })
    }
}

/// 127.0.1.1 and on.
fn loopback_sources(sessions: usize) -> Vec<IpAddr> {
    let count = LOOPBACK_SOURCES.min(sessions as u32);
    (1..=count).map(|n| Ipv4Addr::from(0x7f00_0100 + n).into()).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn plan(arguments: &[&str]) -> anyhow::Result<Plan> {
        let all = ["load", "raio://127.0.0.1:7240", "/x"];
        Line::try_parse_from(all.iter().chain(arguments))?.options.check(&Global::default())
    }

    #[test]
    fn the_defaults_are_those_of_the_manual() {
        let plan = plan(&[]).unwrap();
        assert_eq!((plan.sessions, plan.active, plan.rate, plan.depth, plan.io_bytes), (1, 1, 0, 1, 4096));
        assert_eq!(plan.in_flight_max, 1024);
        assert_eq!((plan.pattern, plan.until), (Pattern::Randread, Until::Elapsed(Duration::from_secs(10))));
        assert_eq!((plan.size, plan.fill, plan.verify, plan.hold), (None, false, false, false));
        assert_eq!(plan.reconnect, Duration::ZERO);
    }

    #[test]
    fn sessions_to_loopback_come_from_many_addresses_and_others_from_where_they_are_told() {
        let loopback = plan(&["--sessions", "32768"]).unwrap().sources;
        assert_eq!(loopback.len(), LOOPBACK_SOURCES as usize);
        assert!(loopback.iter().all(IpAddr::is_loopback));
        assert!(loopback.iter().enumerate().all(|(n, source)| !loopback[..n].contains(source)));
        let told = plan(&["--source", "127.0.0.9"]).unwrap().sources;
        assert_eq!(told, ["127.0.0.9".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn a_part_of_the_sessions_is_at_least_one() {
        for (sessions, percent, active) in
            [("32768", "1", 328), ("1", "1", 1), ("10", "100", 10), ("1000", "0.1", 1)]
        {
            assert_eq!(plan(&["--sessions", sessions, "--active", percent]).unwrap().active, active);
        }
    }

    #[test]
    fn every_error_names_the_option_and_says_what_to_write() {
        for (arguments, needle) in [
            (&["--sessions", "0"][..], "--sessions is 0"),
            (&["--io-size", "12"], "--io-size is 12 bytes"),
            (&["--io-size", "1x"], "is not a size"),
            (&["--size", "512"], "--size is less than --io-size"),
            (&["--fill"], "--size"),
            (&["--depth", "0"], "--depth is 0"),
            (&["--in-flight", "0"], "--in-flight is 0"),
            (&["--active", "0"], "--active is 0"),
            (&["--active", "101"], "--active is 101"),
            (&["--seconds", "0"], "--seconds is 0"),
            (&["--reconnect=-1"], "--reconnect is -1"),
            (&["--seconds", "1", "--rounds", "1"], "cannot be used with"),
        ] {
            let error = format!("{:#}", plan(arguments).unwrap_err());
            assert!(error.contains(needle), "{arguments:?}: {error}");
        }
        let rdma = Line::try_parse_from(["load", "raio+rdma://127.0.0.1", "/x"]).unwrap().options;
        assert!(rdma.check(&Global::default()).unwrap_err().to_string().contains("raio+tcp://"));
    }
}
