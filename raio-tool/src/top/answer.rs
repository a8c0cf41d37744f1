//! What a server answers, as far as it is shown. A server that is older or newer may leave fields out, or add
//! some.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Deserialize;

/// `/stats`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Stats {
    pub version: String,
    pub backend: String,
    pub phase: String,
    pub uptime_seconds: f64,
    pub connections: u64,
    pub sessions: u64,
    pub open_files: u64,
    pub answered: u64,
    pub errors: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub in_flight: BTreeMap<String, u64>,
    pub requests: BTreeMap<String, u64>,
    pub latency_us: BTreeMap<String, Latency>,
    pub exports: BTreeMap<String, Export>,
    pub disks: Vec<Disk>,
    pub stalled: Vec<Stalled>,
}

/// How long the requests of an operation have taken since the start of the server, in microseconds.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Latency {
    pub p99: f64,
    /// Pairs of the upper end of a bucket and how many are in it; those without any are left out.
    pub buckets: Vec<(f64, u64)>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Export {
    pub requests: u64,
    pub errors: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub latency_us: BTreeMap<String, Latency>,
    pub lanes: BTreeMap<String, Lane>,
}

/// Jobs of an export that may wait for its storage.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Lane {
    pub running: u64,
    pub waiting: u64,
    pub oldest_ms: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Disk {
    pub name: String,
    pub exports: Vec<String>,
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub busy_ms: u64,
    pub in_flight: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Stalled {
    pub what: String,
    pub name: String,
    pub since_ms: u64,
    pub why: String,
}

/// One of `/sessions`. Numbers are totals since it began.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Session {
    pub id: String,
    pub client: Option<String>,
    pub peer: String,
    pub age_seconds: f64,
    pub connections: u64,
    pub transports: Vec<String>,
    pub open_files: u64,
    pub in_flight: u64,
    pub requests: u64,
    pub errors: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub latency_us: Mean,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Mean {
    pub count: u64,
    pub mean: f64,
}

/// One of `/workers`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Worker {
    pub index: u64,
    pub cpu: Option<u64>,
    pub connections: u64,
    pub answered: u64,
    pub busy_us: u64,
    pub idle_us: u64,
    pub stuck: bool,
    pub stuck_ms: u64,
    pub slot_bytes: u64,
    pub arena_bytes: u64,
    pub need_slot: u64,
    pub fetching: u64,
    pub executing: u64,
}

/// One of `/slow`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Slow {
    pub time: String,
    pub client: Option<String>,
    pub peer: String,
    pub operation: String,
    pub export: Option<String>,
    pub bytes: u64,
    pub total_us: f64,
    pub result: Option<String>,
    pub is_running: bool,
    pub stages: Vec<Stage>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Stage {
    pub name: String,
    pub us: f64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Sessions {
    pub sessions: Vec<Session>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Workers {
    pub workers: Vec<Worker>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct SlowRequests {
    pub slow: Vec<Slow>,
}

/// What was answered at about one time.
#[derive(Clone, Debug)]
pub struct Sample {
    pub at: Instant,
    pub stats: Stats,
    /// Of the table that was asked for, as far as it is not in the statistics.
    pub sessions: Vec<Session>,
    pub workers: Vec<Worker>,
    pub slow: Vec<Slow>,
}
