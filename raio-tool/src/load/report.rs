//! What is said: a line of progress, and the report at the end, for people or in JSON.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use serde_json::{Value, json};

use super::options::Plan;
use super::traffic::{Outcome, Tally};
use crate::failure::Kind;
use crate::output::per_second;

/// Says how it goes: on a terminal in one line that changes, else in a line each time.
pub struct Progress {
    is_terminal: bool,
    /// How long the line on the terminal is.
    shown: usize,
    ios: u64,
}

impl Progress {
    /// On standard error.
    pub fn new() -> Self {
        Self { is_terminal: std::io::stderr().is_terminal(), shown: 0, ios: 0 }
    }

    /// A line that takes the place of the last one.
    pub fn say(&mut self, text: &str) {
        let mut stderr = std::io::stderr().lock();
        let _ = if self.is_terminal {
            let width = self.shown.max(text.len());
            write!(stderr, "\r{text:width$}").and_then(|()| stderr.flush())
        } else {
            writeln!(stderr, "{text}")
        };
        self.shown = text.len();
    }

    /// The line stays.
    pub fn end_line(&mut self) {
        if self.is_terminal && std::mem::take(&mut self.shown) > 0 {
            eprintln!();
        }
    }

    /// Once a second.
    pub fn load(&mut self, outcome: &Outcome, elapsed: Duration) {
        let ios = outcome.reads.ios + outcome.writes.ios;
        let bad = outcome.errors + outcome.wrong;
        let bad = if bad > 0 { format!(", {} went wrong", grouped(bad)) } else { String::new() };
        self.say(&format!(
            "{:.0} s: {} reads and writes in the last second, {} in all{bad}",
            elapsed.as_secs_f64(),
            grouped(ios - self.ios),
            grouped(ios)
        ));
        self.ios = ios;
    }
}

/// What opening the sessions came to.
#[derive(Debug, Default)]
pub struct Opened {
    /// How many were opened.
    pub count: usize,
    /// How long all but the first took.
    pub elapsed: Duration,
    /// How many the server rejected.
    pub rejected: usize,
    /// Its sentence.
    pub first_refusal: Option<String>,
    /// Why no more were opened.
    pub error: Option<String>,
}

/// What happened.
#[derive(Debug)]
pub struct Report {
    /// The sessions.
    pub opened: Opened,
    /// Reads and writes.
    pub outcome: Outcome,
    /// How long closing the sessions took.
    pub closed_in: Duration,
}

/// 1234567 as 1,234,567.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

const PERCENTILES: [(&str, f64); 5] =
    [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9), ("p99.99", 99.99)];

impl Report {
    /// What the program exits with.
    pub fn exit_code(&self) -> u8 {
        match &self.outcome {
            outcome if outcome.wrong > 0 => Kind::Unverified as u8,
            outcome if outcome.errors > 0 || outcome.lost > 0 => 1,
            _ if self.opened.rejected > 0 || self.opened.error.is_some() => 1,
            _ => 0,
        }
    }

    fn open_rate(&self) -> f64 {
        // The first one is open when the time begins.
        per_second(self.opened.count.saturating_sub(1) as u64, self.opened.elapsed)
    }

    /// One object.
    pub fn json(&self, plan: &Plan) -> Value {
        let outcome = &self.outcome;
        let tally = |tally: &Tally| {
            let latency = &tally.latency_ns;
            let us = |ns: u64| ns as f64 / 1e3;
            let mut times = json!({
                "min": if tally.ios > 0 { us(latency.min()) } else { 0.0 },
                "mean": latency.mean() / 1e3,
                "max": us(latency.max()),
            });
            for (name, percent) in PERCENTILES {
                times[name] = us(latency.value_at_percentile(percent)).into();
            }
            json!({
                "ios": tally.ios,
                "bytes": tally.bytes,
                "ios_per_second": per_second(tally.ios, outcome.elapsed),
                "bytes_per_second": per_second(tally.bytes, outcome.elapsed),
                "latency_us": times,
            })
        };
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "sessions": {
                "wanted": plan.sessions,
                "opened": self.opened.count,
                "opened_per_second": self.open_rate(),
                "active": plan.active.min(self.opened.count),
                "rejected": self.opened.rejected,
                "rejection": self.opened.first_refusal,
                "error": self.opened.error,
                "lost": outcome.lost,
                "closed_in_seconds": self.closed_in.as_secs_f64(),
                "ios_min": outcome.ios_per_session.0,
                "ios_max": outcome.ios_per_session.1,
            },
            "seconds": outcome.elapsed.as_secs_f64(),
            "read": tally(&outcome.reads),
            "write": tally(&outcome.writes),
            "verified_bytes": if plan.verify { outcome.reads.bytes } else { 0 },
            "errors": outcome.errors,
            "unknown": outcome.unknown,
            "reconnects": outcome.reconnects,
            "error": outcome.first_error,
            "wrong": outcome.wrong,
            "wrong_where": outcome.first_wrong,
        })
    }

    /// For people.
    pub fn text(&self, plan: &Plan) -> String {
        let outcome = &self.outcome;
        let mut text = format!(
            "sessions  {} opened ({:.0} a second), {} active with {} to {} reads and writes each, {} \
             rejected, {} lost, closed in {:.1} s\n",
            grouped(self.opened.count as u64),
            self.open_rate(),
            grouped(plan.active.min(self.opened.count) as u64),
            grouped(outcome.ios_per_session.0),
            grouped(outcome.ios_per_session.1),
            grouped(self.opened.rejected as u64),
            grouped(outcome.lost as u64),
            self.closed_in.as_secs_f64()
        );
        for (name, tally) in [("reads   ", &outcome.reads), ("writes  ", &outcome.writes)] {
            if tally.ios == 0 {
                continue;
            }
            text += &format!(
                "{name}  {} in {:.1} s: {} a second, {:.1} MiB/s\n",
                grouped(tally.ios),
                outcome.elapsed.as_secs_f64(),
                grouped(per_second(tally.ios, outcome.elapsed) as u64),
                per_second(tally.bytes, outcome.elapsed) / f64::from(1 << 20)
            );
            text += &format!("          µs: mean {:.1}", tally.latency_ns.mean() / 1e3);
            for (percentile, percent) in PERCENTILES {
                let us = tally.latency_ns.value_at_percentile(percent) as f64 / 1e3;
                text += &format!(", {percentile} {us:.1}");
            }
            text += &format!(", max {:.1}\n", tally.latency_ns.max() as f64 / 1e3);
        }
        if plan.verify {
            text += &format!(
                "verified  {} bytes right, {} reads wrong\n",
                grouped(outcome.reads.bytes),
                grouped(outcome.wrong)
            );
        }
        text += &format!("failed    {} reads and writes\n", grouped(outcome.errors));
        if !plan.reconnect.is_zero() {
            text += &format!(
                "resumed   {} connections, {} writes of unknown outcome\n",
                grouped(outcome.reconnects),
                grouped(outcome.unknown)
            );
        }
        text
    }

    /// What went wrong, in sentences.
    pub fn complaints(&self) -> Vec<String> {
        let outcome = &self.outcome;
        let rejected =
            self.opened.first_refusal.as_ref().map(|text| {
                format!("{} sessions were not opened: {text}", grouped(self.opened.rejected as u64))
            });
        let stopped = self.opened.error.as_ref().map(|text| {
            format!("After {} sessions no more were opened: {text}", grouped(self.opened.count as u64))
        });
        [&rejected, &stopped, &outcome.first_wrong, &outcome.first_error]
            .into_iter()
            .flatten()
            .map(|text| format!("{}.", text.trim_end_matches('.')))
            .collect()
    }
}
