//! The metrics, in Prometheus's text format 0.0.4. How many there are depends on exports, workers and
//! operations, and not on sessions.

use std::fmt::{Display, Write};
use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::errno::Errno;
use raio_transport::protocol::{OPERATIONS, Opcode};

use super::Observed;
use crate::stalled::lanes;
use crate::stats::{Counter, Counters, Histogram, latencies_of};

/// The media type.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Operations whose requests are shown before there are any, so that the first ones are seen to be new.
const ALWAYS: [Opcode; 2] = [Opcode::Read, Opcode::Write];
/// What takes longer than the last but one octave of a histogram is in `+Inf` alone: the last one has all
/// that takes longer, too.
const OCTAVES: usize = 25;

/// Writes families of samples.
#[derive(Debug, Default)]
struct Writer {
    text: String,
    family: &'static str,
}

impl Writer {
    /// Begins a family. Its samples follow.
    fn family(&mut self, name: &'static str, kind: &str, help: &str) {
        self.family = name;
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// A sample of the family.
    fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        self.suffixed("", labels, value);
    }

    fn suffixed(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.text, "{}{suffix}", self.family);
        for (at, (name, value)) in labels.iter().enumerate() {
            let begin = if at == 0 { '{' } else { ',' };
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.text, "{begin}{name}=\"{value}\"");
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.text, "{end} {value}");
    }

    /// A family of one sample.
    fn single(&mut self, name: &'static str, kind: &str, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.sample(&[], value);
    }

    /// The samples of a histogram.
    fn histogram(&mut self, labels: &[(&str, &str)], histogram: &Histogram) {
        for (end, count) in histogram.octaves().take(OCTAVES) {
            let end = end.as_secs_f64().to_string();
            self.suffixed("_bucket", &[labels, &[("le", &end)]].concat(), count);
        }
        let count = histogram.count();
        self.suffixed("_bucket", &[labels, &[("le", "+Inf")]].concat(), count);
        self.suffixed("_sum", labels, histogram.sum().as_secs_f64());
        self.suffixed("_count", labels, count);
    }
}

/// All of them.
pub fn metrics(of: &Observed) -> String {
    let mut out = Writer::default();
    write_server(&mut out, of);
    write_requests(&mut out, of);
    write_latencies(&mut out, of);
    write_workers(&mut out, of);
    write_lanes(&mut out, of);
    write_clients(&mut out, of);
    out.text
}

fn write_server(out: &mut Writer, of: &Observed) {
    let sum = |counter: fn(&Counters) -> &Counter| of.counters().map(|it| counter(it).get()).sum::<u64>();
    out.family("raio_build_info", "gauge", "Always 1; which version this is, and how it does file I/O.");
    out.sample(&[("version", env!("CARGO_PKG_VERSION")), ("backend", of.backend)], 1);
    let started = of.main.started_at.as_millisecond() as f64 / 1000.0;
    out.single("raio_start_time_seconds", "gauge", "When the server started, in Unix time.", started);
    let help = "Connections now, those in their handshake among them.";
    out.single("raio_connections", "gauge", help, sum(|c| &c.connections));
    let help = "Connections that were accepted.";
    out.single("raio_connections_accepted_total", "counter", help, of.main.accepted.get());
    out.single("raio_sessions", "gauge", "Sessions of clients now.", of.shared.sessions.len());
    let help = "The maximum number of sessions at a time.";
    out.single("raio_sessions_max", "gauge", help, of.shared.sessions.max());
    out.single("raio_open_files", "gauge", "Files that clients have open.", of.shared.sessions.open_files());
    let help = "Bytes of the buffers for data that are in use.";
    out.single("raio_slot_bytes", "gauge", help, sum(|c| &c.slot_bytes));
    out.single("raio_arena_bytes", "gauge", "Bytes of all buffers for data.", sum(|c| &c.arena_bytes));
    let help = "Requests that had to wait for a buffer for their data.";
    out.single("raio_slot_waits_total", "counter", help, sum(|c| &c.slot_waits));
    out.family(
        "raio_requests_in_flight",
        "gauge",
        "Requests that are not answered yet, by what they wait for.",
    );
    out.sample(&[("state", "need_slot")], sum(|c| &c.need_slot));
    out.sample(&[("state", "fetching")], sum(|c| &c.fetching));
    out.sample(&[("state", "executing")], sum(|c| &c.executing));
    out.family("raio_connection_closes_total", "counter", "Connections that have ended, by the reason.");
    for (reason, _) in Counters::default().closes() {
        let count =
            |worker: &Counters| worker.closes().find(|(name, _)| *name == reason).map_or(0, |it| it.1);
        out.sample(&[("reason", reason)], of.counters().map(count).sum::<u64>());
    }
    let help = "Lines of the log that were lost, because nobody took them in time.";
    out.single("raio_log_lines_lost_total", "counter", help, crate::log::lost());
    if let Some(audit) = &of.shared.audit {
        let [written, lost] = audit.counts();
        out.family(
            "raio_audit_records_total",
            "counter",
            "Records of the audit log, by what became of them.",
        );
        out.sample(&[("outcome", "written")], written);
        out.sample(&[("outcome", "lost")], lost);
    }
    let help = "Which configuration this is: 1 at the start, and one more with each that was read again.";
    out.single("raio_config_generation", "gauge", help, of.shared.config_generation.load(Ordering::Relaxed));
    let help = "Whether the configuration that was read last could be used.";
    let is_good = !of.shared.last_reload_failed.load(Ordering::Relaxed);
    out.single("raio_config_last_reload_success", "gauge", help, u8::from(is_good));
}

/// The exports' places with their names; last what is on none.
fn exports(of: &Observed) -> Vec<(Option<usize>, String)> {
    let exports = of.shared.exports.current();
    let named = exports.all().iter().map(|export| (Some(export.place()), export.name().to_owned()));
    named.chain([(None, String::new())]).collect()
}

fn write_requests(out: &mut Writer, of: &Observed) {
    let help = "Requests that were answered, by operation and export. Those on no export, such as closes, \
                and those that were answered before they began, have none.";
    out.family("raio_requests_total", "counter", help);
    for (export, name) in exports(of) {
        for operation in &OPERATIONS {
            let count = |worker: &Counters| worker.export(export).requests(operation.opcode);
            let count = of.counters().map(count).sum::<u64>();
            if count > 0 || (export.is_some() && ALWAYS.contains(&operation.opcode)) {
                out.sample(&[("op", operation.name), ("export", &name)], count);
            }
        }
    }
    let help = "Requests that have failed, by operation and errno.";
    out.family("raio_request_errors_total", "counter", help);
    let mut failures: Vec<(Opcode, i32, u64)> = Vec::new();
    for (opcode, errno, count) in of.counters().flat_map(Counters::failures) {
        match failures.iter_mut().find(|known| (known.0, known.1) == (opcode, errno)) {
            Some((.., sum)) => *sum += count,
            None => failures.push((opcode, errno, count)),
        }
    }
    failures.sort_by_key(|&(opcode, errno, _)| (opcode as u8, errno));
    for (opcode, errno, count) in failures {
        let errno = format!("{:?}", Errno::from_raw(errno));
        out.sample(&[("op", opcode.operation().name), ("errno", &errno)], count);
    }
    out.family("raio_read_bytes_total", "counter", "Bytes that were read and answered, by export.");
    for (export, name) in exports(of).into_iter().filter(|(export, _)| export.is_some()) {
        let bytes: u64 = of.counters().map(|worker| worker.export(export).read_bytes.get()).sum();
        out.sample(&[("export", &name)], bytes);
    }
    out.family("raio_written_bytes_total", "counter", "Bytes that were written, by export.");
    for (export, name) in exports(of).into_iter().filter(|(export, _)| export.is_some()) {
        let bytes: u64 = of.counters().map(|worker| worker.export(export).written_bytes.get()).sum();
        out.sample(&[("export", &name)], bytes);
    }
}

fn write_latencies(out: &mut Writer, of: &Observed) {
    let help = "How long requests took, from their arrival to their answer. Of reads, writes and status \
                queries one in 16 is measured: _count has those that were; raio_requests_total has all.";
    out.family("raio_request_seconds", "histogram", help);
    for (export, name) in exports(of) {
        for (opcode, histogram) in latencies_of(of.counters(), export) {
            out.histogram(&[("op", opcode.operation().name), ("export", &name)], &histogram);
        }
    }
}

fn write_workers(out: &mut Writer, of: &Observed) {
    let help =
        "How long each worker was busy, and how long it waited for something to do, spinning or asleep.";
    out.family("raio_worker_seconds_total", "counter", help);
    let now = Instant::now();
    of.control.look(now);
    for (index, worker) in of.counters().enumerate() {
        let (idle, busy) = worker.idle.read(now);
        for (mode, time) in [("busy", busy), ("idle", idle)] {
            out.sample(&[("worker", &index.to_string()), ("mode", mode)], time.as_secs_f64());
        }
    }
    out.family(
        "raio_worker_stuck",
        "gauge",
        "Whether a worker does not take the connections that it is given.",
    );
    for (index, is_stuck) in of.stuck_workers().into_iter().enumerate() {
        out.sample(&[("worker", &index.to_string())], u8::from(is_stuck));
    }
}

fn write_lanes(out: &mut Writer, of: &Observed) {
    let exports = of.shared.exports.current();
    let lanes: Vec<_> = exports.all().iter().map(|export| (export.name(), lanes(export.lanes()))).collect();
    let all = || lanes.iter().flat_map(|(export, lanes)| lanes.iter().map(move |lane| (*export, lane)));
    out.family("raio_lane_jobs", "gauge", "File operations that threads carry out, and that wait for them.");
    for (export, (lane, load)) in all() {
        for (state, jobs) in [("running", load.running), ("waiting", load.waiting)] {
            out.sample(&[("export", export), ("lane", lane), ("state", state)], jobs);
        }
    }
    out.family("raio_lane_oldest_seconds", "gauge", "For how long the oldest of those has not ended.");
    for (export, (lane, load)) in all() {
        let oldest = load.oldest.unwrap_or_default().as_secs_f64();
        out.sample(&[("export", export), ("lane", lane)], oldest);
    }
}

fn write_clients(out: &mut Writer, of: &Observed) {
    if of.shared.keys.is_none() {
        return;
    }
    let clients = of.shared.clients.busiest();
    let help = "Requests of the busiest clients that have keys.";
    out.family("raio_client_requests_total", "counter", help);
    clients.iter().for_each(|client| out.sample(&[("client", &client.name)], client.requests));
    let help = "Bytes that the busiest clients have read.";
    out.family("raio_client_read_bytes_total", "counter", help);
    clients.iter().for_each(|client| out.sample(&[("client", &client.name)], client.read_bytes));
    let help = "Bytes that the busiest clients have written.";
    out.family("raio_client_written_bytes_total", "counter", help);
    clients.iter().for_each(|client| out.sample(&[("client", &client.name)], client.written_bytes));
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn labels_and_help_are_escaped_as_the_format_has_it() {
        let mut out = Writer::default();
        out.family("a_total", "counter", "One\\two\nthree \"four\".");
        out.sample(&[("x", "a\\b\"c\nd{},="), ("y", "")], 5);
        out.sample(&[], 0.25);
        let expected = "# HELP a_total One\\\\two\\nthree \"four\".\n# TYPE a_total counter\n\
                        a_total{x=\"a\\\\b\\\"c\\nd{},=\",y=\"\"} 5\na_total 0.25\n";
        assert_eq!(out.text, expected);
    }

    #[test]
    fn a_histogram_has_cumulative_buckets_a_sum_and_a_count() {
        let histogram = Histogram::default();
        histogram.record(Duration::from_micros(3), 2);
        histogram.record(Duration::from_secs(3600), 1);
        let mut out = Writer::default();
        out.family("t_seconds", "histogram", "Times.");
        out.histogram(&[("op", "read")], &histogram);
        let lines: Vec<_> = out.text.lines().skip(2).collect();
        assert_eq!(lines.len(), OCTAVES + 3);
        assert_eq!(lines[0], "t_seconds_bucket{op=\"read\",le=\"0.000002048\"} 0");
        assert_eq!(lines[1], "t_seconds_bucket{op=\"read\",le=\"0.000004096\"} 2");
        assert_eq!(lines[OCTAVES - 1], "t_seconds_bucket{op=\"read\",le=\"34.359738368\"} 2");
        assert_eq!(
            lines[OCTAVES..],
            [
                "t_seconds_bucket{op=\"read\",le=\"+Inf\"} 3",
                "t_seconds_sum{op=\"read\"} 3600.000006",
                "t_seconds_count{op=\"read\"} 3",
            ]
        );
    }
}
