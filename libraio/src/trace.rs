//! `RAIO_TRACE=FILE`: what each request did when, in a file that Perfetto opens (see
//! `raio_transport::trace`).
//!
//! A context has a ring of records. It is written when the context ends, or when the program exits by exit(3)
//! or from main (programs in C only: see `ffi`). Off, it costs the data path a branch for each step.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::Instant;

use raio_transport::channel::Channel;
use raio_transport::environment;
use raio_transport::memory::process;
use raio_transport::trace::{Clock, Phase, Record, Ring, TraceFile};
use raio_transport::transport::RequestId;

use crate::error::Error;
use crate::tuning::{CLOCK_PINGS, TRACE_RECORDS};
use raio_transport::sync::lock;

/// The trace of this process, once a context was made with `RAIO_TRACE` set. A thread holds the lock while it
/// writes a file, so a child that is forked meanwhile never gets it: see [`OWNER`].
static TRACE: Mutex<Option<ProcessTrace>> = Mutex::new(None);
/// The process that has locked [`TRACE`] first (see [`process`]), 0: none. Others, its children, do not wait
/// for the lock.
static OWNER: AtomicU64 = AtomicU64::new(0);

#[derive(Debug)]
struct ProcessTrace {
    /// The process that made it: see [`process`]. Its children do not write to its file.
    process: u64,
    file: TraceFile,
    /// Of contexts that live, with their numbers.
    rings: Vec<(u32, Arc<Mutex<Ring>>)>,
    /// The number of the latest context.
    last: u32,
}

impl ProcessTrace {
    /// Writes a ring. Errors are ignored, because there is no caller to report them to.
    fn write(&mut self, number: u32, ring: &Ring) {
        let _ = self.file.append(number, &format!("context {number}"), ring);
    }
}

/// The id of an outage among those of the requests of the connection that was lost. No request has it: its
/// slot is beyond any queue depth.
const RECONNECT: u32 = u32::MAX;

/// What a request is called in the trace.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TraceId {
    connection: u16,
    request: u32,
}

/// Records what a context's requests do.
#[derive(Debug)]
pub(crate) struct Tracer {
    /// The process that made it.
    process: u64,
    clock: Clock,
    connection: u16,
    number: u32,
    ring: Arc<Mutex<Ring>>,
}

impl Tracer {
    /// A tracer for a context with this connection, if `RAIO_TRACE` is set. It asks the server for its time
    /// until `deadline`. A connection without a local port goes by the context's number, and is not found in
    /// the server's trace.
    pub(crate) fn for_context(channel: &mut Channel, deadline: Instant) -> Result<Option<Box<Self>>, Error> {
        let path = path();
        let Some(path) = path else { return Ok(None) };
        // Before anything is locked: it waits for the server.
        compare_clocks(channel, deadline);
        let me = process();
        let owner = OWNER.compare_exchange(0, me, Ordering::Relaxed, Ordering::Relaxed);
        let mut trace = if owner == Ok(0) || owner == Err(me) {
            lock(&TRACE)
        } else {
            match TRACE.try_lock() {
                Ok(trace) => trace,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                // Forked while its parent wrote: it has no trace.
                Err(TryLockError::WouldBlock) => return Ok(None),
            }
        };
        OWNER.store(me, Ordering::Relaxed);
        let trace = match &mut *trace {
            Some(trace) if trace.process == me => trace,
            trace => {
                let file = TraceFile::of_client(Path::new(&path), "libraio").map_err(|error| {
                    Error::call(
                        error.raw_os_error().unwrap_or(libc::EINVAL),
                        format!(
                            "RAIO_TRACE: cannot create {path:?} ({error}). Name a file that does not exist; \
                             %p in its name becomes the process id."
                        ),
                    )
                })?;
                trace.insert(ProcessTrace { process: me, file, rings: Vec::new(), last: 0 })
            }
        };
        trace.last += 1;
        let number = trace.last;
        let ring = Arc::new(Mutex::new(Ring::new(TRACE_RECORDS)));
        trace.rings.push((number, Arc::clone(&ring)));
        let connection = channel.local_port().unwrap_or(number as u16);
        if let Some(sample) = channel.clock_sample() {
            // As with its rings: there is no caller to report an error to.
            let _ = trace.file.set_offset(&sample);
        }
        Ok(Some(Box::new(Self { process: me, clock: trace.file.clock(), connection, number, ring })))
    }

    pub(crate) fn now_ns(&self) -> u64 {
        self.clock.now_ns()
    }

    /// A request with this id on the wire was handed to the transport, for an operation that was submitted at
    /// `submitted_ns`. Returns what it is called from now on, also if it is sent again by another connection.
    pub(crate) fn sent(&self, name: &'static str, submitted_ns: u64, id: RequestId, bytes: u64) -> TraceId {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let trace_id = TraceId { connection: self.connection, request: id.0 as u32 };
        let TraceId { connection, request } = trace_id;
        let begin = Record { time_ns: submitted_ns, name, phase: Phase::Begin, connection, request, bytes };
        let mut ring = lock(&self.ring);
        ring.push(begin);
        ring.push(Record { time_ns: self.now_ns(), name: "sent", phase: Phase::Point, ..begin });
        trace_id
    }

    /// Its response has arrived, or it was lost with the connection.
    pub(crate) fn answered(&self, id: TraceId, bytes: u64) {
        self.push("answered", Phase::Point, id, bytes);
    }

    /// The program has collected its completion.
    pub(crate) fn collected(&self, name: &'static str, id: TraceId, bytes: u64) {
        self.push(name, Phase::End, id, bytes);
    }

    /// The context has another connection, after an outage that began and ended then.
    pub(crate) fn reconnected(&mut self, channel: &Channel) {
        let Some((lost_at, connected_at)) = channel.outage() else { return };
        let begin = Record {
            time_ns: self.clock.at_ns(lost_at),
            name: "reconnect",
            phase: Phase::Begin,
            connection: self.connection,
            request: RECONNECT,
            bytes: 0,
        };
        let mut ring = lock(&self.ring);
        ring.push(begin);
        ring.push(Record { time_ns: self.clock.at_ns(connected_at), phase: Phase::End, ..begin });
        drop(ring);
        self.connection = channel.local_port().unwrap_or(self.connection);
    }

    fn push(&self, name: &'static str, phase: Phase, id: TraceId, bytes: u64) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let (time_ns, TraceId { connection, request }) = (self.now_ns(), id);
        lock(&self.ring).push(Record { time_ns, name, phase, connection, request, bytes });
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        if self.process != process() {
            return;
        }
        let mut trace = lock(&TRACE);
        let Some(trace) = trace.as_mut().filter(|trace| trace.process == process()) else { return };
        // Not if it was written at exit.
        if let Some(at) = trace.rings.iter().position(|(number, _)| *number == self.number) {
            trace.rings.swap_remove(at);
            trace.write(self.number, &lock(&self.ring));
        }
    }
}

/// Pings the server a few times, if its pongs have its time. If the connection ends meanwhile, the next
/// operation on it says so. A pong that has not come by the deadline is no sample.
fn compare_clocks(channel: &mut Channel, deadline: Instant) {
    if !channel.grant().pong_time() {
        return;
    }
    for _ in 0..CLOCK_PINGS {
        let asked = Instant::now();
        if asked >= deadline {
            return;
        }
        channel.ping(channel.request_timeout());
        while channel.last_rx().is_some_and(|at| at < asked) && Instant::now() < deadline {
            // No request is outstanding, so there is no reply.
            channel.receive(&mut Vec::new());
            if channel.last_rx().is_some_and(|at| at < asked) {
                let _ = channel.wait(Some(deadline));
            }
        }
    }
}

/// Whether requests are to be traced.
pub(crate) fn is_wanted() -> bool {
    path().is_some()
}

/// Whether this process has a trace.
pub(crate) fn is_on() -> bool {
    OWNER.load(Ordering::Relaxed) == process()
}

/// Writes the rings of contexts that were not ended. For the end of the process: another thread that is about
/// to record something is not waited for.
pub(crate) fn write_all() {
    let Ok(mut trace) = TRACE.try_lock() else { return };
    let Some(trace) = trace.as_mut().filter(|trace| trace.process == process()) else { return };
    for (number, ring) in std::mem::take(&mut trace.rings) {
        if let Ok(ring) = ring.try_lock() {
            trace.write(number, &ring);
        }
    }
}

/// The file that is asked for.
fn path() -> Option<OsString> {
    Some(expand(environment::variable("RAIO_TRACE")?.as_bytes(), std::process::id()))
}

/// Puts the process id in the place of each `%p`.
fn expand(name: &[u8], pid: u32) -> OsString {
    let pid = pid.to_string();
    let mut expanded = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some(at) = rest.windows(2).position(|pair| pair == b"%p") {
        expanded.extend_from_slice(&rest[..at]);
        expanded.extend_from_slice(pid.as_bytes());
        rest = &rest[at + 2..];
    }
    expanded.extend_from_slice(rest);
    OsString::from_vec(expanded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_id_takes_the_place_of_percent_p() {
        for (name, path) in [("a", "a"), ("%p", "7"), ("/t/%p-%p.json", "/t/7-7.json"), ("%%p%", "%7%")] {
            assert_eq!(expand(name.as_bytes(), 7), path);
        }
    }
}
