//! Counters: what the server did, and what it is at.
//!
//! Each worker has its own, written by itself alone with plain loads and stores; whoever asks adds them up.
//! What is read while workers run is not one moment's truth, but each number is right.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use raio_transport::protocol::{OPERATIONS, Opcode};
use raio_transport::transport::CloseReason;

use crate::limits::Who;

/// A number that one thread writes and others read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds. Only its own thread may.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed) + n, Ordering::Relaxed);
    }

    /// Sets. Only its own thread may.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// Reads, from any thread.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Why connections close, by [`CloseReason::name`]. Handshakes that fail are among them.
const REASONS: [&str; 20] = [
    "finished",
    "lost",
    "local",
    "rejected",
    "evicted",
    "unreachable",
    "magic",
    "version",
    "handshake_timeout",
    "handshake_too_long",
    "required_option",
    "checksum",
    "kind",
    "reserved",
    "length",
    "credits",
    "request_id",
    "field",
    "silent",
    "stalled",
];

/// What one worker counts.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections now, those in their handshake among them.
    pub connections: Counter,
    /// Requests that wait for memory now.
    pub need_slot: Counter,
    /// Requests whose data is under way now.
    pub fetching: Counter,
    /// Requests in the engine now, and files that are being closed after their session.
    pub executing: Counter,
    /// Requests answered.
    pub answered: Counter,
    /// Of these, with a failure.
    pub errors: Counter,
    /// Bytes read and answered.
    pub read_bytes: Counter,
    /// Bytes written.
    pub written_bytes: Counter,
    /// Bytes of the arena in slots now.
    pub slot_bytes: Counter,
    /// Bytes of the arena.
    pub arena_bytes: Counter,
    /// Bytes that messages take beyond what each connection has for them.
    pub heap_bytes: Counter,
    /// Times that a connection was not read from because its messages took too many.
    pub message_waits: Counter,
    /// The most bytes of the arena that one iteration has given out.
    pub iteration_bytes_max: Counter,
    /// Connections that were rejected because their session has as many as it may.
    pub rejected_connections: Counter,
    /// Queue pairs for which there was no memory.
    pub rejected_queue_pairs: Counter,
    /// Opens that were rejected because there were as many open files as there may be, by [`Who`] has them.
    pub rejected_files: [Counter; 2],
    /// Requests that were rejected because there were as many in flight as there may be.
    pub rejected_requests: [Counter; 2],
    /// Times that a request had to wait for memory.
    pub slot_waits: Counter,
    /// Times that one had to because its session, or its address, has as much as it may.
    pub memory_waits: [Counter; 2],
    /// Turns of the loop.
    pub iterations: Counter,
    /// Times that the loop went to sleep.
    pub sleeps: Counter,
    requests: [Counter; OPERATIONS.len()],
    closes: [Counter; REASONS.len()],
}

impl Counters {
    /// A request with this opcode has come.
    pub fn request(&self, opcode: Opcode) {
        self.requests[opcode as usize - 1].add(1);
    }

    /// A connection has closed.
    pub fn close(&self, reason: &str) {
        if let Some(index) = REASONS.iter().position(|&name| name == reason) {
            self.closes[index].add(1);
        } else {
            debug_assert!(false, "close reason {reason} has no counter");
        }
    }

    /// A connection has closed by itself, by its peer or by its transport.
    pub fn close_reason(&self, reason: &CloseReason) {
        self.close(reason.name());
    }
}

/// One line of JSON: the sums over all workers, with what only the whole server knows.
pub fn json<'a>(
    workers: impl Iterator<Item = &'a Counters> + Clone,
    backend: &str,
    accepted: u64,
    rejected_by_address: u64,
    sessions: usize,
    open_files: usize,
    data_connections: &[usize],
) -> String {
    let sum =
        |counter: fn(&Counters) -> &Counter| workers.clone().map(|worker| counter(worker).get()).sum::<u64>();
    let mut out = format!("{{\"version\":\"{}\",\"backend\":\"{backend}\"", env!("CARGO_PKG_VERSION"));
    let mut number = |name: &str, value: u64| {
        let _ = write!(out, ",\"{name}\":{value}");
    };
    number("workers", workers.clone().count() as u64);
    number("accepted", accepted);
    number("connections", sum(|c| &c.connections));
    number("sessions", sessions as u64);
    number("open_files", open_files as u64);
    number("answered", sum(|c| &c.answered));
    number("errors", sum(|c| &c.errors));
    number("read_bytes", sum(|c| &c.read_bytes));
    number("written_bytes", sum(|c| &c.written_bytes));
    number("slot_bytes", sum(|c| &c.slot_bytes));
    number("arena_bytes", sum(|c| &c.arena_bytes));
    number("heap_bytes", sum(|c| &c.heap_bytes));
    number("slot_waits", sum(|c| &c.slot_waits));
    number(
        "iteration_bytes_max",
        workers.clone().map(|worker| worker.iteration_bytes_max.get()).max().unwrap_or(0),
    );
    number("iterations", sum(|c| &c.iterations));
    number("sleeps", sum(|c| &c.sleeps));
    number("log_lines_lost", crate::log::lost());
    let mut object = |name: &str, fields: &mut dyn Iterator<Item = (&str, u64)>| {
        let fields: Vec<_> = fields.map(|(name, value)| format!("\"{name}\":{value}")).collect();
        let _ = write!(out, ",\"{name}\":{{{}}}", fields.join(","));
    };
    object(
        "rejected",
        &mut [
            ("address_connections", rejected_by_address),
            ("address_files", sum(|c| &c.rejected_files[Who::Address as usize])),
            ("address_requests", sum(|c| &c.rejected_requests[Who::Address as usize])),
            ("queue_pairs", sum(|c| &c.rejected_queue_pairs)),
            ("session_connections", sum(|c| &c.rejected_connections)),
            ("session_files", sum(|c| &c.rejected_files[Who::Session as usize])),
            ("session_requests", sum(|c| &c.rejected_requests[Who::Session as usize])),
        ]
        .into_iter(),
    );
    object(
        "waits",
        &mut [
            ("address_memory", sum(|c| &c.memory_waits[Who::Address as usize])),
            ("messages", sum(|c| &c.message_waits)),
            ("session_memory", sum(|c| &c.memory_waits[Who::Session as usize])),
        ]
        .into_iter(),
    );
    object(
        "in_flight",
        &mut [
            ("need_slot", sum(|c| &c.need_slot)),
            ("fetching", sum(|c| &c.fetching)),
            ("executing", sum(|c| &c.executing)),
        ]
        .into_iter(),
    );
    object(
        "requests",
        &mut OPERATIONS.iter().enumerate().map(|(index, operation)| {
            (operation.name, workers.clone().map(|worker| worker.requests[index].get()).sum())
        }),
    );
    object(
        "closes",
        &mut REASONS
            .into_iter()
            .enumerate()
            .map(|(index, name)| (name, workers.clone().map(|worker| worker.closes[index].get()).sum())),
    );
    out.push_str(",\"per_worker\":[");
    for (at, (worker, data_connections)) in workers.zip(data_connections).enumerate() {
        let comma = if at > 0 { "," } else { "" };
        let _ = write!(
            out,
            "{comma}{{\"connections\":{},\"data_connections\":{data_connections},\"answered\":{}}}",
            worker.connections.get(),
            worker.answered.get()
        );
    }
    out.push_str("]}");
    out
}

#[cfg(test)]
mod tests {
    use raio_transport::Violation;

    use super::*;

    #[test]
    fn workers_add_up() {
        let workers = [Counters::default(), Counters::default()];
        for worker in &workers {
            worker.read_bytes.add(5);
            worker.iteration_bytes_max.set(7);
            worker.request(Opcode::Cancel);
            worker.close_reason(&CloseReason::Violation(Violation::Stalled));
        }
        let json = json(workers.iter(), "uring", 3, 4, 1, 2, &[4, 5]);
        assert!(json.starts_with('{') && json.ends_with("}]}") && !json.contains('\n'));
        for part in [
            "\"read_bytes\":10",
            "\"iteration_bytes_max\":7",
            "\"cancel\":2",
            "\"stalled\":2",
            "\"accepted\":3",
            "\"address_connections\":4",
            "\"open_files\":2",
            "\"read\":0",
            "\"per_worker\":[{\"connections\":0,\"data_connections\":4,",
        ] {
            assert!(json.contains(part), "{part} is not in {json}");
        }
    }

    #[test]
    fn every_reason_to_close_has_a_counter() {
        use Violation as V;
        let violations = [
            V::Magic,
            V::Version { min: 0, max: 0, ours: 0 },
            V::HandshakeTimeout,
            V::HandshakeTooLong,
            V::RequiredOption(0),
            V::Checksum,
            V::Kind(0),
            V::Reserved,
            V::Length,
            V::Credits,
            V::RequestId,
            V::Field,
            V::Silent,
            V::Stalled,
        ];
        let reasons = [
            CloseReason::Finished,
            CloseReason::Lost(0),
            CloseReason::Local,
            CloseReason::Rejected,
            CloseReason::Evicted,
            CloseReason::Unreachable,
        ];
        for reason in reasons.into_iter().chain(violations.map(CloseReason::Violation)) {
            assert!(REASONS.contains(&reason.name()), "{reason:?}");
        }
    }
}
