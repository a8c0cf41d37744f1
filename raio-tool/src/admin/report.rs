//! How what the server answers looks: its own JSON with `--json`, and tables for people.
//!
//! A server that is older or newer may leave fields out, or add some: what is missing is shown as nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::failure::Failure;
use crate::global::Global;
use crate::output;

/// A session, as the server tells of it. Numbers are totals since it began.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Session {
    id: String,
    client: Option<String>,
    peer: String,
    age_seconds: f64,
    connections: u64,
    transports: Vec<String>,
    open_files: u64,
    in_flight: u64,
    requests: u64,
    errors: u64,
    read_bytes: u64,
    written_bytes: u64,
    latency_us: Latency,
}

/// How long requests took, of those that were measured.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Latency {
    mean: f64,
    max: f64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Export {
    name: String,
    path: Option<String>,
    access: String,
    direct: bool,
    state: String,
    why: Option<String>,
    open_files: u64,
    requests: u64,
    errors: u64,
    read_bytes: u64,
    written_bytes: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Worker {
    index: u64,
    cpu: Option<u64>,
    connections: u64,
    answered: u64,
    busy_us: u64,
    idle_us: u64,
    stuck_ms: u64,
    stuck: bool,
    slot_bytes: u64,
    arena_bytes: u64,
    need_slot: u64,
    fetching: u64,
    executing: u64,
}

/// A request that has taken long.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Slow {
    time: String,
    worker: u64,
    client: Option<String>,
    peer: String,
    operation: String,
    export: Option<String>,
    bytes: u64,
    total_us: u64,
    result: Option<String>,
    is_running: bool,
    stages: Vec<SlowStage>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct SlowStage {
    name: String,
    us: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Stats {
    version: String,
    phase: String,
    uptime_seconds: f64,
    workers: u64,
    connections: u64,
    sessions: u64,
    open_files: u64,
    answered: u64,
    errors: u64,
    read_bytes: u64,
    written_bytes: u64,
    in_flight: BTreeMap<String, u64>,
    stalled: Vec<Stalled>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Stalled {
    why: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Reloaded {
    changed: Vec<String>,
}

fn parse<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, Failure> {
    serde_json::from_str(text).map_err(|error| unexpected(&error))
}

fn unexpected(error: &serde_json::Error) -> Failure {
    Failure::new(format!("The server has answered something else than this version expects ({error})."))
}

/// Shows a list: the items of the member with this name, each a line with `--json`.
pub fn list(global: &Global, answer: &str, name: &str) -> Result<(), Failure> {
    let answer: BTreeMap<String, Box<RawValue>> = parse(answer)?;
    let items = answer.get(name).map_or("[]", |items| items.get());
    if global.json {
        let items: Vec<Box<RawValue>> = parse(items)?;
        return output::print(&items.iter().map(|item| format!("{}\n", item.get())).collect::<String>());
    }
    let exact = global.bytes;
    let table = match name {
        "sessions" => sessions(items_of(items)?, exact),
        "exports" => exports(items_of(items)?, exact),
        "workers" => workers(items_of(items)?, exact),
        _ => slow(items_of(items)?, exact),
    };
    output::print(&table)
}

fn items_of<T: DeserializeOwned>(items: &str) -> Result<Vec<T>, Failure> {
    parse(items)
}

/// A table: the columns are as wide as what is in them, and numbers stand to the right.
fn table<const N: usize>(head: [&str; N], rows: Vec<[String; N]>) -> String {
    let is_left = head.map(|title| title.starts_with('<'));
    let head = head.map(|title| title.trim_start_matches('<').to_owned());
    let rows: Vec<_> =
        std::iter::once(head).chain(rows.into_iter().map(|row| row.map(|cell| visible(&cell)))).collect();
    let widths: [usize; N] =
        std::array::from_fn(|at| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (at, cell) in row.iter().enumerate() {
            let width = widths[at];
            line += &if is_left[at] { format!("{cell:<width$}  ") } else { format!("{cell:>width$}  ") };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// Clients choose their names.
fn visible(text: &str) -> String {
    output::visible(text.as_bytes())
}

fn age(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match () {
        () if days > 0 => format!("{days}d {:02}h", hours % 24),
        () if hours > 0 => format!("{hours}h {:02}m", minutes % 60),
        () if minutes > 0 => format!("{minutes}m {:02}s", seconds % 60),
        () => format!("{seconds}s"),
    }
}

/// A time in microseconds.
fn time(us: f64) -> String {
    match us {
        us if us >= 1e6 => format!("{:.1} s", us / 1e6),
        us if us >= 1e3 => format!("{:.1} ms", us / 1e3),
        us => format!("{us:.0} us"),
    }
}

fn or_dash(text: Option<String>) -> String {
    text.filter(|text| !text.is_empty()).unwrap_or_else(|| "-".to_owned())
}

fn sessions(mut all: Vec<Session>, exact: bool) -> String {
    // What was done since another time is not known: who has done most comes first.
    all.sort_by_key(|session| {
        std::cmp::Reverse(session.read_bytes.saturating_add(session.written_bytes).max(session.requests))
    });
    let head = [
        "<session",
        "<client",
        "<from",
        "age",
        "conns",
        "<by",
        "files",
        "in flight",
        "requests",
        "errors",
        "read",
        "written",
        "mean",
        "max",
    ];
    let row = |it: Session| {
        [
            it.id,
            or_dash(it.client),
            it.peer,
            age(it.age_seconds),
            it.connections.to_string(),
            or_dash(Some(it.transports.join(","))),
            it.open_files.to_string(),
            it.in_flight.to_string(),
            it.requests.to_string(),
            it.errors.to_string(),
            output::size(it.read_bytes, exact),
            output::size(it.written_bytes, exact),
            time(it.latency_us.mean),
            time(it.latency_us.max),
        ]
    };
    table(head, all.into_iter().map(row).collect())
}

fn exports(all: Vec<Export>, exact: bool) -> String {
    let head = ["<export", "<access", "<state", "files", "requests", "errors", "read", "written", "<path"];
    let row = |it: Export| {
        let state = it.why.map_or(it.state.clone(), |why| format!("{}: {why}", it.state));
        [
            it.name,
            if it.direct { format!("{}, direct", it.access) } else { it.access },
            state,
            it.open_files.to_string(),
            it.requests.to_string(),
            it.errors.to_string(),
            output::size(it.read_bytes, exact),
            output::size(it.written_bytes, exact),
            or_dash(it.path),
        ]
    };
    table(head, all.into_iter().map(row).collect())
}

fn workers(all: Vec<Worker>, exact: bool) -> String {
    let head =
        ["worker", "cpu", "conns", "answered", "busy", "<state", "memory", "of", "wait", "fetch", "execute"];
    let row = |it: Worker| {
        let all = it.busy_us + it.idle_us;
        let busy = if all == 0 { 0.0 } else { 100.0 * it.busy_us as f64 / all as f64 };
        let stuck = Duration::from_millis(it.stuck_ms);
        [
            it.index.to_string(),
            or_dash(it.cpu.map(|cpu| cpu.to_string())),
            it.connections.to_string(),
            it.answered.to_string(),
            format!("{busy:.0} %"),
            if it.stuck { format!("stuck for {:.1} s", stuck.as_secs_f64()) } else { "ok".to_owned() },
            output::size(it.slot_bytes, exact),
            output::size(it.arena_bytes, exact),
            it.need_slot.to_string(),
            it.fetching.to_string(),
            it.executing.to_string(),
        ]
    };
    table(head, all.into_iter().map(row).collect())
}

fn slow(all: Vec<Slow>, exact: bool) -> String {
    let head = ["<time", "worker", "<client", "<operation", "<export", "bytes", "took", "<result", "<stages"];
    let row = |it: Slow| {
        let stages: Vec<_> =
            it.stages.iter().map(|stage| format!("{} {}", stage.name, time(stage.us as f64))).collect();
        let result = if it.is_running { "runs".to_owned() } else { it.result.unwrap_or("ok".to_owned()) };
        [
            it.time,
            it.worker.to_string(),
            it.client.unwrap_or(it.peer),
            it.operation,
            or_dash(it.export),
            output::size(it.bytes, exact),
            time(it.total_us as f64),
            result,
            stages.join(", "),
        ]
    };
    table(head, all.into_iter().map(row).collect())
}

/// Shows of the statistics what is looked at first.
pub fn stats(global: &Global, answer: Value) -> Result<(), Failure> {
    let it = Stats::deserialize(answer).map_err(|error| unexpected(&error))?;
    let in_flight: u64 = it.in_flight.values().sum();
    let size = |bytes| output::size(bytes, global.bytes);
    let mut text = String::new();
    for (name, value) in [
        ("version", it.version),
        ("state", format!("{} for {}", it.phase, age(it.uptime_seconds))),
        ("workers", it.workers.to_string()),
        ("sessions", it.sessions.to_string()),
        ("connections", it.connections.to_string()),
        ("open files", it.open_files.to_string()),
        ("in flight", in_flight.to_string()),
        ("answered", it.answered.to_string()),
        ("errors", it.errors.to_string()),
        ("read", size(it.read_bytes)),
        ("written", size(it.written_bytes)),
    ] {
        text += &format!("{name:<12} {}\n", visible(&value));
    }
    for stalled in it.stalled {
        text += &format!("{:<12} {}\n", "stalled", visible(&stalled.why));
    }
    output::print(&text)
}

/// Shows what a server has changed.
pub fn reloaded(global: &Global, answer: Value) -> Result<(), Failure> {
    if global.json {
        return output::print_json(&answer);
    }
    let Reloaded { changed } = Reloaded::deserialize(answer).map_err(|error| unexpected(&error))?;
    if changed.is_empty() {
        return output::print("Nothing has changed.\n");
    }
    output::print(&changed.iter().map(|text| format!("{}\n", visible(text))).collect::<String>())
}

/// Says that it was done.
pub fn done(global: &Global, answer: &Value, text: &str) -> Result<(), Failure> {
    if global.json { output::print_json(answer) } else { output::print(&format!("{text}\n")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let text = table(["<name", "n"], vec![["a\x1b".into(), "1000".into()], ["long".into(), "1".into()]]);
        assert_eq!(text, "name      n\na\\x1b  1000\nlong      1\n");
    }

    #[test]
    fn ages_and_times_have_the_unit_that_keeps_them_short() {
        assert_eq!([0.5, 61.0, 3_661.0, 90_000.0].map(age), ["0s", "1m 01s", "1h 01m", "1d 01h"]);
        assert_eq!([0.0, 999.0, 1_500.0, 2.5e6].map(time), ["0 us", "999 us", "1.5 ms", "2.5 s"]);
    }

    #[test]
    fn who_has_done_most_comes_first_and_what_is_missing_is_nothing() {
        let text = r#"[{"id":"aa"},{"id":"bb","read_bytes":2048,"transports":["tcp"],"new":{}}]"#;
        let shown = sessions(items_of(text).unwrap(), false);
        let lines: Vec<_> = shown.lines().collect();
        assert!(lines[1].starts_with("bb") && lines[1].contains("2.0 KiB") && lines[2].starts_with("aa"));
        assert!(items_of::<Session>("[{\"id\":1}]").is_err());
    }

    #[test]
    fn a_slow_request_shows_where_the_time_went() {
        let text = r#"[
            {"operation":"read","export":"data","total_us":1200000,"peer":"10.0.0.1:5","bytes":4096,
             "result":null,"stages":[{"name":"executing","us":1199000}]},
            {"operation":"fsync","is_running":true}]"#;
        let shown = slow(items_of(text).unwrap(), false);
        assert!(shown.contains("1.2 s  ok") && shown.contains("executing 1.2 s"), "{shown}");
        assert!(shown.lines().nth(2).unwrap().contains("runs"), "{shown}");
    }
}
