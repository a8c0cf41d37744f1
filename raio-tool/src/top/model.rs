//! What is shown, from two samples: rates, and the rows of a table. No terminal, no clock, no I/O.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Map, Value};

use super::answer::{Latency, Sample, Stalled, Stats};
use crate::output;

/// Which table is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum View {
    Sessions,
    Exports,
    Workers,
    Disks,
    Slow,
}

impl View {
    pub const ALL: [Self; 5] = [Self::Sessions, Self::Exports, Self::Workers, Self::Disks, Self::Slow];

    /// The key that shows it.
    pub fn key(self) -> char {
        match self {
            Self::Sessions => 's',
            Self::Exports => 'e',
            Self::Workers => 'w',
            Self::Disks => 'd',
            Self::Slow => 'l',
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::Sessions => "sessions",
            Self::Exports => "exports",
            Self::Workers => "workers",
            Self::Disks => "disks",
            Self::Slow => "slow requests",
        }
    }

    /// The names of the fields and the titles of the columns, the most important first.
    fn columns(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Sessions => &[
                ("name", "session"),
                ("requests_per_second", "req/s"),
                ("read_bytes_per_second", "read"),
                ("written_bytes_per_second", "written"),
                ("latency_us", "latency"),
                ("in_flight", "flight"),
                ("errors_per_second", "err/s"),
                ("open_files", "files"),
                ("age_seconds", "age"),
                ("transports", "over"),
                ("peer", "peer"),
                ("id", "id"),
            ],
            Self::Exports => &[
                ("name", "export"),
                ("requests_per_second", "req/s"),
                ("read_bytes_per_second", "read"),
                ("written_bytes_per_second", "written"),
                ("read_p99_us", "read p99"),
                ("write_p99_us", "write p99"),
                ("errors_per_second", "err/s"),
                ("lanes", "lanes"),
            ],
            Self::Workers => &[
                ("name", "worker"),
                ("busy", "busy"),
                ("requests_per_second", "req/s"),
                ("state", "state"),
                ("connections", "conns"),
                ("in_flight", "flight"),
                ("slot_bytes", "memory"),
                ("arena_bytes", "of"),
                ("need_slot", "waiting"),
                ("cpu", "cpu"),
            ],
            Self::Disks => &[
                ("name", "disk"),
                ("busy", "busy"),
                ("requests_per_second", "req/s"),
                ("read_bytes_per_second", "read"),
                ("written_bytes_per_second", "written"),
                ("in_flight", "flight"),
                ("exports", "exports"),
            ],
            Self::Slow => &[
                ("time", "time"),
                ("total_us", "took"),
                ("operation", "operation"),
                ("export", "export"),
                ("bytes", "size"),
                ("result", "result"),
                ("client", "client"),
                ("stages", "stages"),
            ],
        }
    }
}

/// What the rows are sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    Requests,
    Bytes,
    Time,
    Flight,
    Errors,
    Name,
}

impl Sort {
    pub const ALL: [Self; 6] =
        [Self::Requests, Self::Bytes, Self::Time, Self::Flight, Self::Errors, Self::Name];

    /// The key that chooses it.
    pub fn key(self) -> char {
        match self {
            Self::Requests => 'r',
            Self::Bytes => 'b',
            Self::Time => 't',
            Self::Flight => 'i',
            Self::Errors => 'x',
            Self::Name => 'n',
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Bytes => "bytes",
            Self::Time => "time",
            Self::Flight => "in flight",
            Self::Errors => "errors",
            Self::Name => "name",
        }
    }
}

/// A value of a table. None: not known, because there was no sample before.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    Text(String),
    /// Per second.
    Rate(Option<f64>),
    /// Bytes per second.
    Throughput(Option<f64>),
    Bytes(u64),
    Count(u64),
    /// Microseconds.
    Time(Option<f64>),
    /// Of one.
    Share(Option<f64>),
    Age(f64),
}

impl Cell {
    /// For people.
    pub fn text(&self, exact: bool) -> String {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        match self {
            Self::Text(text) => output::visible(text.as_bytes()),
            Self::Rate(rate) => or_dash(rate.map(number)),
            Self::Throughput(rate) => or_dash(rate.map(|rate| throughput(rate, exact))),
            Self::Bytes(bytes) => output::size(*bytes, exact),
            Self::Count(count) => count.to_string(),
            Self::Time(us) => or_dash(us.map(time)),
            Self::Share(share) => or_dash(share.map(|share| format!("{:.0} %", share * 100.0))),
            Self::Age(seconds) => age(*seconds),
        }
    }

    /// Words are aligned to the left, numbers to the right.
    pub fn is_text(&self) -> bool {
        matches!(self, Self::Text(_))
    }

    fn json(&self) -> Value {
        match self {
            Self::Text(text) => text.as_str().into(),
            Self::Rate(number) | Self::Throughput(number) | Self::Time(number) | Self::Share(number) => {
                (*number).into()
            }
            Self::Bytes(number) | Self::Count(number) => (*number).into(),
            Self::Age(seconds) => (*seconds).into(),
        }
    }
}

/// A row of a table.
#[derive(Clone, Debug)]
pub struct Row {
    /// One for each column of its view.
    pub cells: Vec<Cell>,
    /// Something is wrong with it now.
    pub is_bad: bool,
    sorted_by: SortedBy,
}

/// What a row is sorted by.
#[derive(Clone, Debug, Default)]
struct SortedBy {
    requests: f64,
    bytes: f64,
    time: f64,
    flight: u64,
    errors: f64,
}

impl Row {
    fn name(&self) -> String {
        self.cells[0].text(false)
    }

    /// Those with the most first, but names from a to z.
    fn order(&self, other: &Self, by: Sort) -> Ordering {
        let (a, b) = (&self.sorted_by, &other.sorted_by);
        let order = match by {
            Sort::Requests => b.requests.total_cmp(&a.requests),
            Sort::Bytes => b.bytes.total_cmp(&a.bytes),
            Sort::Time => b.time.total_cmp(&a.time),
            Sort::Flight => b.flight.cmp(&a.flight),
            Sort::Errors => b.errors.total_cmp(&a.errors),
            Sort::Name => Ordering::Equal,
        };
        order.then_with(|| {
            let (a, b) = (self.name(), other.name());
            // Workers are numbers.
            a.parse::<u64>().ok().cmp(&b.parse().ok()).then(a.cmp(&b))
        })
    }
}

/// The table of a view.
#[derive(Clone, Debug)]
pub struct Table {
    pub view: View,
    pub rows: Vec<Row>,
}

impl Table {
    pub fn titles(&self) -> Vec<&'static str> {
        self.view.columns().iter().map(|&(_, title)| title).collect()
    }

    /// By what it is looked at for, if nothing is said: the latest slow requests, the busiest of others.
    pub fn sort(&mut self, by: Option<Sort>, is_reversed: bool) {
        let is_descending = is_reversed != (by.is_none() && self.view == View::Slow);
        let by = by.unwrap_or(match self.view {
            View::Sessions | View::Exports | View::Disks => Sort::Bytes,
            View::Workers | View::Slow => Sort::Name,
        });
        self.rows.sort_by(|a, b| if is_descending { b.order(a, by) } else { a.order(b, by) });
    }

    /// An object for each row.
    fn json(&self) -> Vec<Value> {
        let columns = self.view.columns();
        let object = |row: &Row| {
            let fields = columns.iter().zip(&row.cells);
            Value::Object(fields.map(|(&(key, _), cell)| (key.into(), cell.json())).collect::<Map<_, _>>())
        };
        self.rows.iter().map(object).collect()
    }
}

/// What a whole server does, from two samples. Its fields are those of `--json`.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Between the two samples; 0: there was none before, and rates are not known.
    pub seconds: f64,
    pub version: String,
    pub backend: String,
    pub phase: String,
    pub uptime_seconds: f64,
    pub sessions: u64,
    pub connections: u64,
    pub open_files: u64,
    pub in_flight: u64,
    pub reads_per_second: Option<f64>,
    pub writes_per_second: Option<f64>,
    pub requests_per_second: Option<f64>,
    pub read_bytes_per_second: Option<f64>,
    pub written_bytes_per_second: Option<f64>,
    pub errors_per_second: Option<f64>,
    pub read_p50_us: Option<f64>,
    pub read_p99_us: Option<f64>,
    pub write_p50_us: Option<f64>,
    pub write_p99_us: Option<f64>,
    pub stalled: Vec<String>,
}

/// A difference per second. A total that has become smaller is that of another server.
fn rate(now: u64, before: Option<u64>, time: Duration) -> Option<f64> {
    now.checked_sub(before?).filter(|_| !time.is_zero()).map(|count| output::per_second(count, time))
}

/// The quantile of what was counted between two answers.
fn quantile(now: Option<&Latency>, before: Option<&Latency>, part: f64) -> Option<f64> {
    let before: HashMap<u64, u64> =
        before?.buckets.iter().map(|&(end, count)| (end.to_bits(), count)).collect();
    let new = |&(end, count): &(f64, u64)| {
        (end, count.saturating_sub(before.get(&end.to_bits()).copied().unwrap_or(0)))
    };
    let buckets: Vec<_> = now?.buckets.iter().map(new).collect();
    let wanted = (buckets.iter().map(|&(_, count)| count).sum::<u64>() as f64 * part).ceil() as u64;
    let mut seen = 0;
    let reaches = |&&(_, count): &&(f64, u64)| {
        seen += count;
        seen >= wanted
    };
    buckets.iter().filter(|&&(_, count)| count > 0).find(reaches).map(|&(end, _)| end)
}

/// A sample, and the one before of the same server, if there is one.
pub struct Pair<'a> {
    now: &'a Sample,
    before: Option<&'a Sample>,
    time: Duration,
}

impl<'a> Pair<'a> {
    pub fn new(now: &'a Sample, before: Option<&'a Sample>) -> Self {
        let is_same = |before: &&Sample| {
            before.stats.uptime_seconds <= now.stats.uptime_seconds
                && before.stats.answered <= now.stats.answered
        };
        let before = before.filter(is_same);
        let time = before.map_or(Duration::ZERO, |before| now.at.duration_since(before.at));
        Self { now, before, time }
    }

    fn rate(&self, now: u64, before: Option<u64>) -> Option<f64> {
        rate(now, before, self.time)
    }

    pub fn summary(&self) -> Summary {
        let stats = &self.now.stats;
        let before = self.before.map(|before| &before.stats);
        let per = |of: fn(&Stats) -> u64| self.rate(of(stats), before.map(of));
        let operation = |name: &str| {
            let of = |stats: &Stats| stats.requests.get(name).copied().unwrap_or(0);
            self.rate(of(stats), before.map(of))
        };
        let latency = |name: &str, part: f64| {
            let earlier = Latency::default();
            let before = before.map(|before| before.latency_us.get(name).unwrap_or(&earlier));
            quantile(stats.latency_us.get(name), before, part)
        };
        Summary {
            seconds: self.time.as_secs_f64(),
            version: stats.version.clone(),
            backend: stats.backend.clone(),
            phase: stats.phase.clone(),
            uptime_seconds: stats.uptime_seconds,
            sessions: stats.sessions,
            connections: stats.connections,
            open_files: stats.open_files,
            in_flight: stats.in_flight.values().sum(),
            reads_per_second: operation("read"),
            writes_per_second: operation("write"),
            requests_per_second: per(|stats| stats.answered),
            read_bytes_per_second: per(|stats| stats.read_bytes),
            written_bytes_per_second: per(|stats| stats.written_bytes),
            errors_per_second: per(|stats| stats.errors),
            read_p50_us: latency("read", 0.5),
            read_p99_us: latency("read", 0.99),
            write_p50_us: latency("write", 0.5),
            write_p99_us: latency("write", 0.99),
            stalled: stats.stalled.iter().map(stalled).collect(),
        }
    }

    pub fn table(&self, view: View) -> Table {
        let rows = match view {
            View::Sessions => self.sessions(),
            View::Exports => self.exports(),
            View::Workers => self.workers(),
            View::Disks => self.disks(),
            View::Slow => self.slow(),
        };
        Table { view, rows }
    }

    fn sessions(&self) -> Vec<Row> {
        let before: HashMap<_, _> =
            self.before.iter().flat_map(|before| &before.sessions).map(|it| (it.id.as_str(), it)).collect();
        let row = |it: &super::answer::Session| {
            let last = before.get(it.id.as_str());
            let requests = self.rate(it.requests, last.map(|last| last.requests));
            let read = self.rate(it.read_bytes, last.map(|last| last.read_bytes));
            let written = self.rate(it.written_bytes, last.map(|last| last.written_bytes));
            let errors = self.rate(it.errors, last.map(|last| last.errors));
            let spent = |mean: &super::answer::Mean| mean.mean * mean.count as f64;
            let latency = last.and_then(|last| {
                let count = it.latency_us.count.checked_sub(last.latency_us.count).filter(|&count| count > 0);
                count.map(|count| (spent(&it.latency_us) - spent(&last.latency_us)).max(0.0) / count as f64)
            });
            Row {
                cells: vec![
                    Cell::Text(it.client.clone().unwrap_or_else(|| it.peer.clone())),
                    Cell::Rate(requests),
                    Cell::Throughput(read),
                    Cell::Throughput(written),
                    Cell::Time(latency),
                    Cell::Count(it.in_flight),
                    Cell::Rate(errors),
                    Cell::Count(it.open_files),
                    Cell::Age(it.age_seconds),
                    Cell::Text(format!("{} x {}", it.transports.join(","), it.connections)),
                    Cell::Text(it.peer.clone()),
                    Cell::Text(it.id.clone()),
                ],
                is_bad: errors > Some(0.0),
                sorted_by: SortedBy {
                    requests: requests.unwrap_or(0.0),
                    bytes: read.unwrap_or(0.0) + written.unwrap_or(0.0),
                    time: latency.unwrap_or(0.0),
                    flight: it.in_flight,
                    errors: errors.unwrap_or(0.0),
                },
            }
        };
        self.now.sessions.iter().map(row).collect()
    }

    fn exports(&self) -> Vec<Row> {
        let row = |(name, it): (&String, &super::answer::Export)| {
            let last = self.before.and_then(|before| before.stats.exports.get(name));
            let requests = self.rate(it.requests, last.map(|last| last.requests));
            let read = self.rate(it.read_bytes, last.map(|last| last.read_bytes));
            let written = self.rate(it.written_bytes, last.map(|last| last.written_bytes));
            let errors = self.rate(it.errors, last.map(|last| last.errors));
            let p99 = |name: &str| it.latency_us.get(name).map(|latency| latency.p99);
            let (read_p99, write_p99) = (p99("read"), p99("write"));
            let oldest = it.lanes.values().map(|lane| lane.oldest_ms).max().unwrap_or(0);
            Row {
                cells: vec![
                    Cell::Text(name.clone()),
                    Cell::Rate(requests),
                    Cell::Throughput(read),
                    Cell::Throughput(written),
                    Cell::Time(read_p99),
                    Cell::Time(write_p99),
                    Cell::Rate(errors),
                    Cell::Text(lanes(it)),
                ],
                is_bad: errors > Some(0.0) || oldest >= LATE_MS,
                sorted_by: SortedBy {
                    requests: requests.unwrap_or(0.0),
                    bytes: read.unwrap_or(0.0) + written.unwrap_or(0.0),
                    time: read_p99.unwrap_or(0.0).max(write_p99.unwrap_or(0.0)),
                    flight: it.lanes.values().map(|lane| lane.running + lane.waiting).sum(),
                    errors: errors.unwrap_or(0.0),
                },
            }
        };
        self.now.stats.exports.iter().map(row).collect()
    }

    fn workers(&self) -> Vec<Row> {
        let row = |it: &super::answer::Worker| {
            let before =
                self.before.and_then(|before| before.workers.iter().find(|last| last.index == it.index));
            let busy = before.and_then(|last| {
                let busy = it.busy_us.checked_sub(last.busy_us)? as f64;
                let all = busy + it.idle_us.checked_sub(last.idle_us)? as f64;
                (all > 0.0).then(|| busy / all)
            });
            let requests = self.rate(it.answered, before.map(|last| last.answered));
            let flight = it.fetching + it.executing;
            let state = match it.stuck {
                true => format!("stuck {}", time(it.stuck_ms as f64 * 1e3)),
                false => "runs".into(),
            };
            Row {
                cells: vec![
                    Cell::Text(it.index.to_string()),
                    Cell::Share(busy),
                    Cell::Rate(requests),
                    Cell::Text(state),
                    Cell::Count(it.connections),
                    Cell::Count(flight),
                    Cell::Bytes(it.slot_bytes),
                    Cell::Bytes(it.arena_bytes),
                    Cell::Count(it.need_slot),
                    Cell::Text(it.cpu.map_or_else(|| "any".into(), |cpu| cpu.to_string())),
                ],
                is_bad: it.stuck,
                sorted_by: SortedBy {
                    requests: requests.unwrap_or(0.0),
                    bytes: it.slot_bytes as f64,
                    time: busy.unwrap_or(0.0),
                    flight,
                    errors: it.stuck_ms as f64,
                },
            }
        };
        self.now.workers.iter().map(row).collect()
    }

    fn disks(&self) -> Vec<Row> {
        let row = |it: &super::answer::Disk| {
            let last =
                self.before.and_then(|before| before.stats.disks.iter().find(|last| last.name == it.name));
            let requests = self.rate(it.reads + it.writes, last.map(|last| last.reads + last.writes));
            let read = self.rate(it.read_bytes, last.map(|last| last.read_bytes));
            let written = self.rate(it.written_bytes, last.map(|last| last.written_bytes));
            let busy = self.rate(it.busy_ms, last.map(|last| last.busy_ms)).map(|ms| (ms / 1e3).min(1.0));
            Row {
                cells: vec![
                    Cell::Text(it.name.clone()),
                    Cell::Share(busy),
                    Cell::Rate(requests),
                    Cell::Throughput(read),
                    Cell::Throughput(written),
                    Cell::Count(it.in_flight),
                    Cell::Text(it.exports.join(",")),
                ],
                is_bad: false,
                sorted_by: SortedBy {
                    requests: requests.unwrap_or(0.0),
                    bytes: read.unwrap_or(0.0) + written.unwrap_or(0.0),
                    time: busy.unwrap_or(0.0),
                    flight: it.in_flight,
                    errors: 0.0,
                },
            }
        };
        self.now.stats.disks.iter().map(row).collect()
    }

    fn slow(&self) -> Vec<Row> {
        let row = |it: &super::answer::Slow| {
            let stage = |stage: &super::answer::Stage| format!("{} {}", stage.name, time(stage.us));
            let stages: Vec<_> = it.stages.iter().map(stage).collect();
            let result = match (&it.result, it.is_running) {
                (_, true) => "runs".into(),
                (Some(errno), _) => errno.clone(),
                (None, _) => "ok".into(),
            };
            Row {
                cells: vec![
                    Cell::Text(it.time.clone()),
                    Cell::Time(Some(it.total_us)),
                    Cell::Text(it.operation.clone()),
                    Cell::Text(it.export.clone().unwrap_or_default()),
                    Cell::Bytes(it.bytes),
                    Cell::Text(result),
                    Cell::Text(it.client.clone().unwrap_or_else(|| it.peer.clone())),
                    Cell::Text(stages.join(", ")),
                ],
                is_bad: it.result.is_some(),
                sorted_by: SortedBy { bytes: it.bytes as f64, time: it.total_us, ..SortedBy::default() },
            }
        };
        self.now.slow.iter().map(row).collect()
    }
}

/// Milliseconds from which on the oldest job of a lane is late.
const LATE_MS: u64 = 5000;

fn lanes(export: &super::answer::Export) -> String {
    let busy = export.lanes.iter().filter(|(_, lane)| lane.running + lane.waiting > 0);
    let text = |(name, lane): (&String, &super::answer::Lane)| {
        let waiting = if lane.waiting > 0 { format!("+{}", lane.waiting) } else { String::new() };
        let oldest = match lane.oldest_ms {
            0..1000 => String::new(),
            ms => format!(" {}", age(ms as f64 / 1e3)),
        };
        format!("{name} {}{waiting}{oldest}", lane.running)
    };
    busy.map(text).collect::<Vec<_>>().join(", ")
}

fn stalled(it: &Stalled) -> String {
    let text = format!("{} {} for {}: {}", it.what, it.name, age(it.since_ms as f64 / 1e3), it.why);
    output::visible(text.as_bytes())
}

/// An object of `--json`.
pub fn json(time: &str, summary: &Summary, table: &Table) -> Result<Value, serde_json::Error> {
    let mut object = serde_json::to_value(summary)?;
    object["time"] = time.into();
    object["view"] = serde_json::to_value(table.view)?;
    object["rows"] = table.json().into();
    Ok(object)
}

/// A number that may be large, such as 53.5k.
pub fn number(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        value if value < 9.95 => format!("{value:.1}"),
        value if value < 9_999.5 => format!("{value:.0}"),
        value if value < 999.95e3 => format!("{:.1}k", value / 1e3),
        value => format!("{:.2}M", value / 1e6),
    }
}

/// Bytes per second.
pub fn throughput(rate: f64, exact: bool) -> String {
    format!("{}/s", output::size(rate as u64, exact))
}

/// Microseconds.
pub fn time(us: f64) -> String {
    match us {
        us if us < 999.5 => format!("{us:.0} us"),
        us if us < 999.95e3 => format!("{:.1} ms", us / 1e3),
        us => format!("{:.1} s", us / 1e6),
    }
}

/// How long something has been there.
pub fn age(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
pub mod tests {
    use std::time::Instant;

    use super::super::answer::{Sessions, SlowRequests, Workers};
    use super::*;

    /// A second of a busy server: the sample before, and the one now.
    pub fn samples() -> [Sample; 2] {
        let start = Instant::now();
        [0_u64, 1].map(|second| {
            let n = second * 1000;
            let stats = format!(
                r#"{{"version":"0.2.0","backend":"uring","phase":"serving","uptime_seconds":{},"sessions":2,
                "connections":3,"open_files":4,"answered":{},"errors":{second},"read_bytes":{},
                "written_bytes":0,"in_flight":{{"executing":5,"fetching":1}},
                "requests":{{"read":{n},"write":0}},
                "latency_us":{{"read":{{"p99":9000,"buckets":[[100,50],[200.5,{n}],[5000,{}]]}}}},
                "exports":{{"data":{{"requests":{n},"errors":{second},"read_bytes":{},
                    "latency_us":{{"read":{{"p99":9000}}}},
                    "lanes":{{"sync":{{"running":8,"waiting":37,
                    "oldest_ms":48000}},"open":{{}}}}}},"b":{{}}}},
                "disks":[{{"name":"sda","reads":{n},"busy_ms":{},"in_flight":7,"exports":["data","b"]}}],
                "stalled":[{{"what":"lane","name":"data/sync","since_ms":48000,"why":"No\u001b answer."}}],
                "newer":[1]}}"#,
                100 + second,
                100 + n,
                n << 12,
                5 * second,
                n << 12,
                second * 620,
            );
            let sessions = format!(
                r#"{{"sessions":[{{"id":"aa","client":"quick","peer":"10.0.0.1:5",
                "requests":{n},"in_flight":1,
                "read_bytes":{},"transports":["rdma"],"connections":2,
                "latency_us":{{"count":{},"mean":{}}}}},
                {{"id":"bb","peer":"10.0.0.2:5","requests":{},"in_flight":9,"age_seconds":61}}]}}"#,
                n << 12,
                10 + n,
                if second == 0 { 5000.0 } else { (50_000.0 + 100_000.0) / 1010.0 },
                second * 9
            );
            let workers = format!(
                r#"{{"workers":[{{"index":0,"busy_us":{},"idle_us":{},"stuck":true,"stuck_ms":2300}}]}}"#,
                second * 250,
                second * 750
            );
            let slow = r#"{"slow":[{"time":"2026-11-30T16:00:00Z","operation":"read","total_us":120000,
                "peer":"p",
                "result":"EIO","stages":[{"name":"executing","us":119000}]}]}"#;
            Sample {
                at: start + Duration::from_secs(second),
                stats: serde_json::from_str(&stats).unwrap(),
                sessions: serde_json::from_str::<Sessions>(&sessions).unwrap().sessions,
                workers: serde_json::from_str::<Workers>(&workers).unwrap().workers,
                slow: serde_json::from_str::<SlowRequests>(slow).unwrap().slow,
            }
        })
    }

    fn texts(table: &Table) -> Vec<Vec<String>> {
        table.rows.iter().map(|row| row.cells.iter().map(|cell| cell.text(false)).collect()).collect()
    }

    #[test]
    fn rates_are_differences_and_what_was_before_does_not_count() {
        let [before, now] = samples();
        let summary = Pair::new(&now, Some(&before)).summary();
        assert_eq!(summary.reads_per_second, Some(1000.0));
        assert_eq!(summary.read_bytes_per_second, Some(4096e3));
        assert_eq!((summary.errors_per_second, summary.in_flight), (Some(1.0), 6));
        // 50 requests of 100 µs were before.
        assert_eq!((summary.read_p50_us, summary.read_p99_us), (Some(200.5), Some(200.5)));
        assert_eq!(summary.write_p99_us, None);
        assert_eq!(summary.stalled, ["lane data/sync for 48s: No\\x1b answer."]);
    }

    #[test]
    fn without_a_sample_before_and_after_a_restart_no_rate_is_known() {
        let [mut before, now] = samples();
        assert_eq!(Pair::new(&now, None).summary().reads_per_second, None);
        before.stats.uptime_seconds = 1000.0;
        let pair = Pair::new(&now, Some(&before));
        assert_eq!((pair.summary().reads_per_second, pair.summary().read_p99_us), (None, None));
        assert!(texts(&pair.table(View::Exports)).iter().all(|row| row[1] == "-"));
    }

    #[test]
    fn each_table_has_a_cell_for_each_column() {
        let [before, now] = samples();
        let pair = Pair::new(&now, Some(&before));
        for view in View::ALL {
            let table = pair.table(view);
            assert!(!table.rows.is_empty(), "{view:?}");
            assert!(table.rows.iter().all(|row| row.cells.len() == table.titles().len()), "{view:?}");
            let object = json("now", &pair.summary(), &table).unwrap();
            assert_eq!(object["rows"].as_array().unwrap().len(), table.rows.len());
            assert_eq!(object["view"], view.to_possible_value().unwrap().get_name());
        }
        let rows = texts(&pair.table(View::Workers));
        assert_eq!(rows[0][..4], ["0", "25 %", "0", "stuck 2.3 s"]);
        let rows = texts(&pair.table(View::Disks));
        assert_eq!(rows[0][..3], ["sda", "62 %", "1000"]);
        let rows = texts(&pair.table(View::Exports));
        assert_eq!(rows[1][7], "sync 8+37 48s");
        let rows = texts(&pair.table(View::Slow));
        assert_eq!(rows[0][1..], ["120.0 ms", "read", "", "0 B", "EIO", "p", "executing 119.0 ms"]);
    }

    #[test]
    fn sessions_are_sorted_by_what_they_do_now() {
        let [before, now] = samples();
        let mut table = Pair::new(&now, Some(&before)).table(View::Sessions);
        let first = |table: &Table| table.rows[0].name();
        for (sort, name) in [
            (Sort::Requests, "quick"),
            (Sort::Bytes, "quick"),
            (Sort::Time, "quick"),
            (Sort::Flight, "10.0.0.2:5"),
            (Sort::Name, "10.0.0.2:5"),
        ] {
            table.sort(Some(sort), false);
            assert_eq!(first(&table), name, "{sort:?}");
            table.sort(Some(sort), true);
            assert_ne!(first(&table), name, "{sort:?}");
        }
        table.sort(None, false);
        // The mean of what was answered since: the 10 before had 5 ms.
        assert_eq!(texts(&table)[0][4], "100 us");
    }

    #[test]
    fn numbers_keep_three_digits_or_so() {
        assert_eq!(
            [0.0, 0.25, 12.3, 9_999.0, 53_512.0, 999_990.0].map(number),
            ["0", "0.2", "12", "9999", "53.5k", "1.00M"]
        );
        assert_eq!([0.4, 999.4, 999.6, 1e6].map(time), ["0 us", "999 us", "1.0 ms", "1.0 s"]);
        assert_eq!([9.9, 61.0, 3_700.0, 90_000.0].map(age), ["9s", "1m 01s", "1h 01m", "1d 01h"]);
    }
}
