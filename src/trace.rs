//! Request tracing: a ring of fixed-size records in memory, written as JSON in the Trace Event Format, which
//! <https://ui.perfetto.dev> opens.
//!
//! Both sides name a request alike: category `request`, id `CONNECTION-REQUEST`, where CONNECTION is the
//! client's local port and REQUEST the request's id on the wire in hex. So the files of a client and of a
//! server, put together, show each request on both sides:
//!
//! ```text
//! jq -s '{traceEvents: map(.traceEvents) | add}' client.json server.json > both.json
//! ```
//!
//! Times are microseconds of CLOCK_REALTIME: one pair of it and the monotonic clock is read at the start, and
//! the rest is measured by the monotonic clock. Between two hosts the clocks differ by what NTP or PTP
//! leaves. `otherData.clock_offset_us` has what must be added to this file's times to compare them with the
//! other side's: 0, which is right on one host.
//!
//! A trace has no session ids, no paths and no data in it.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// What a record says about its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It begins here.
    Begin,
    /// It has come to this point.
    Point,
    /// It ends here. The name is that of its beginning.
    End,
}

/// One record.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// From [`Clock::now_ns`].
    pub time_ns: u64,
    /// For a beginning and an end the operation, for a point what was reached.
    pub name: &'static str,
    /// Whether it begins, goes on or ends.
    pub phase: Phase,
    /// The client's port of the connection that the request is on.
    pub connection: u16,
    /// Its id on the wire.
    pub request: u32,
    /// How many bytes it is to move, or at its end has moved.
    pub bytes: u32,
}

/// Turns instants into times of a trace.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    monotonic: Instant,
    realtime_ns: u64,
}

impl Clock {
    /// Reads both clocks.
    pub fn new() -> Self {
        let realtime = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { monotonic: Instant::now(), realtime_ns: realtime.as_nanos() as u64 }
    }

    /// The time now, in nanoseconds since this clock was made.
    pub fn now_ns(&self) -> u64 {
        self.at_ns(Instant::now())
    }

    /// The time of an instant, in nanoseconds since this clock was made.
    pub fn at_ns(&self, instant: Instant) -> u64 {
        instant.saturating_duration_since(self.monotonic).as_nanos() as u64
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

/// The last records of one thread. Belongs to that thread, and allocates only when it is made.
#[derive(Debug)]
pub struct Ring {
    records: Vec<Record>,
    capacity: usize,
    /// How many were ever pushed.
    pushed: u64,
}

impl Ring {
    /// For this many records, of 40 bytes each.
    pub fn new(capacity: usize) -> Self {
        assert!(capacity > 0);
        Self { records: Vec::with_capacity(capacity), capacity, pushed: 0 }
    }

    /// Adds a record, over the oldest one if the ring is full.
    pub fn push(&mut self, record: Record) {
        if self.records.len() < self.capacity {
            self.records.push(record);
        } else {
            let at = (self.pushed % self.capacity as u64) as usize;
            self.records[at] = record;
        }
        self.pushed += 1;
    }

    /// The records, the oldest first.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        let oldest = if self.records.len() < self.capacity {
            0
        } else {
            (self.pushed % self.capacity as u64) as usize
        };
        let (newer, older) = self.records.split_at(oldest);
        older.iter().chain(newer)
    }

    /// How many records were overwritten.
    pub fn overwritten(&self) -> u64 {
        self.pushed - self.records.len() as u64
    }
}

/// What ends the file, and is overwritten by the next events: the file is valid at any time.
const TAIL: &str = "\n]}\n";

/// A trace in a file.
#[derive(Debug)]
pub struct TraceFile {
    file: File,
    clock: Clock,
}

impl TraceFile {
    /// Creates the file: readable by its owner alone, and an error if there is anything of that name.
    pub fn create(path: &Path, process_name: &str) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)?;
        let clock = Clock::new();
        let pid = std::process::id();
        write!(
            file,
            "{{\"displayTimeUnit\":\"ns\",\"otherData\":{{\"process\":{process_name:?},\
             \"clock\":\"realtime\",\"clock_offset_us\":0}},\"traceEvents\":[\n\
             {{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":{pid},\
             \"args\":{{\"name\":{process_name:?}}}}}{TAIL}"
        )?;
        Ok(Self { file, clock })
    }

    /// The clock of all records of this file.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// Appends what a thread's ring has, in one write. The name is plain ASCII.
    pub fn append(&mut self, thread: u32, thread_name: &str, ring: &Ring) -> io::Result<()> {
        let pid = std::process::id();
        let mut text = format!(
            ",\n{{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":{pid},\"tid\":{thread},\
             \"args\":{{\"name\":{thread_name:?},\"overwritten\":{}}}}}",
            ring.overwritten()
        );
        for record in ring.records() {
            let phase = match record.phase {
                Phase::Begin => 'b',
                Phase::Point => 'n',
                Phase::End => 'e',
            };
            let ns = self.clock.realtime_ns + record.time_ns;
            // Writing to a string cannot fail.
            let _ = write!(
                text,
                ",\n{{\"name\":{:?},\"cat\":\"request\",\"ph\":\"{phase}\",\"id\":\"{}-{:x}\",\"pid\":{pid},\
                 \"tid\":{thread},\"ts\":{}.{:03},\"args\":{{\"bytes\":{}}}}}",
                record.name,
                record.connection,
                record.request,
                ns / 1000,
                ns % 1000,
                record.bytes
            );
        }
        text.push_str(TAIL);
        let end = self.file.seek(SeekFrom::End(-(TAIL.len() as i64)))?;
        self.file.write_all(text.as_bytes()).inspect_err(|_| {
            // A full disk: what was there stays a whole file.
            let _ = self.file.set_len(end).and_then(|()| self.file.seek(SeekFrom::Start(end)));
            let _ = self.file.write_all(TAIL.as_bytes());
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(n: u64, phase: Phase) -> Record {
        Record { time_ns: n, name: "read", phase, connection: 40_000, request: 0x1_0002, bytes: 4096 }
    }

    #[test]
    fn a_ring_keeps_the_newest_records_in_order() {
        let mut ring = Ring::new(3);
        for n in 0..8 {
            assert_eq!(ring.records().count() as u64, n.min(3));
            ring.push(record(n, Phase::Point));
        }
        assert_eq!(ring.records().map(|record| record.time_ns).collect::<Vec<_>>(), [5, 6, 7]);
        assert_eq!(ring.overwritten(), 5);
    }

    #[test]
    fn a_file_is_whole_after_each_append_private_and_never_overwrites() {
        let path = std::env::temp_dir().join(format!("raio-trace-{}-{:p}", std::process::id(), &0));
        let _ = std::fs::remove_file(&path);
        let mut file = TraceFile::create(&path, "test").unwrap();
        assert_eq!(TraceFile::create(&path, "test").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        let mut ring = Ring::new(4);
        ring.push(record(1_500, Phase::Begin));
        ring.push(record(2_500, Phase::End));
        for thread in 0..2 {
            file.append(thread, "context", &ring).unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.starts_with("{\"displayTimeUnit\"") && text.ends_with("}}\n]}\n"), "{text}");
            assert_eq!(text.matches("]}").count(), 1);
            assert_eq!(text.matches('{').count(), text.matches('}').count());
            assert_eq!(text.matches("\"ph\":\"b\",\"id\":\"40000-10002\"").count(), thread as usize + 1);
        }
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/nowhere", &path).unwrap();
        assert!(TraceFile::create(&path, "test").is_err(), "links are not followed");
        std::fs::remove_file(&path).unwrap();
    }
}
