//! Request tracing: a ring of fixed-size records in memory, written as JSON in the Trace Event Format, which
//! <https://ui.perfetto.dev> opens.
//!
//! Both sides name a request alike: category `request`, id `CONNECTION-REQUEST`, where CONNECTION is the
//! client's local port and REQUEST the request's id on the wire in hex. So the files of a client and of a
//! server, put together, show each request on both sides:
//!
//! ```text
//! jq -s '{traceEvents: map(.otherData.clock_offset_us as $offset |
//!   .traceEvents[] | if .ts then .ts += $offset else . end)}' client.json server.json > both.json
//! ```
//!
//! Times are microseconds of CLOCK_REALTIME: one pair of it and the monotonic clock is read at the start, and
//! the rest is measured by the monotonic clock. The clocks of two hosts differ. A client that traces pings
//! the server, whose pongs have the time of the server's trace ([`ClockSample`]).
//! `otherData.clock_offset_us` has what must be added to the times of the file to compare them with those of
//! the server: 0 in a server's file, null if the server did not tell its time. It is wrong by at most
//! `otherData.clock_error_us`.
//!
//! A trace has no session ids, no paths and no data in it.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

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

/// Turns instants into times of a trace. It goes on with the monotonic clock: when the system's time is set,
/// it does not follow.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    monotonic: Instant,
    realtime_ns: u64,
}

impl Clock {
    /// Reads both clocks, several times: the thread may be preempted in between.
    pub fn new() -> Self {
        let read = || {
            let before = Instant::now();
            let realtime = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let took = before.elapsed();
            (took, Self { monotonic: before + took / 2, realtime_ns: realtime.as_nanos() as u64 })
        };
        let readings: [_; 4] = std::array::from_fn(|_| read());
        let [first, ..] = readings;
        readings.into_iter().fold(first, |best, next| if next.0 < best.0 { next } else { best }).1
    }

    /// A clock that is ahead of this one by so much: for tests.
    #[must_use]
    pub fn ahead(self, by: Duration) -> Self {
        Self { realtime_ns: self.realtime_ns + by.as_nanos() as u64, ..self }
    }

    /// The time now, in nanoseconds since this clock was made.
    pub fn now_ns(&self) -> u64 {
        self.at_ns(Instant::now())
    }

    /// The time of an instant, in nanoseconds since this clock was made.
    pub fn at_ns(&self, instant: Instant) -> u64 {
        instant.saturating_duration_since(self.monotonic).as_nanos() as u64
    }

    /// The time of an instant, in nanoseconds since the Epoch.
    pub fn realtime_ns(&self, instant: Instant) -> u64 {
        let before = self.monotonic.saturating_duration_since(instant).as_nanos() as u64;
        self.realtime_ns + self.at_ns(instant) - before
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

/// What a pong tells about the clock of a peer: at some moment within a round trip it showed this time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockSample {
    sent: Instant,
    /// From the ping to the pong.
    pub round_trip: Duration,
    peer_ns: u64,
}

impl ClockSample {
    /// From a pong that arrived by `received`, to a ping that was sent at `sent` or after it. `peer_ns` is
    /// the time in the pong, in nanoseconds since the Epoch.
    pub fn new(sent: Instant, received: Instant, peer_ns: u64) -> Self {
        Self { sent, round_trip: received.saturating_duration_since(sent), peer_ns }
    }

    /// How far the peer's clock is ahead of this one, in nanoseconds. The peer is taken to have read it in
    /// the middle of the round trip, so the error is at most half of that.
    pub fn offset_ns(&self, clock: &Clock) -> i64 {
        self.peer_ns.wrapping_sub(clock.realtime_ns(self.sent + self.round_trip / 2)) as i64
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

    /// How many records it has.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> u64 {
        self.records.len() as u64
    }

    /// How many records were overwritten.
    pub fn overwritten(&self) -> u64 {
        self.pushed - self.records.len() as u64
    }
}

/// A trace as text, for those who write it to something else than a file: [`TraceText::head`], then of each
/// thread its name and its records, then [`TraceText::TAIL`].
#[derive(Clone, Copy, Debug)]
pub struct TraceText {
    process_name: &'static str,
    clock: Clock,
}

impl TraceText {
    /// What comes last.
    pub const TAIL: &'static str = TAIL;

    /// Of a process whose records are of this clock.
    pub fn new(process_name: &'static str, clock: Clock) -> Self {
        Self { process_name, clock }
    }

    /// What comes first, if no clock is to be compared with another one.
    pub fn head(&self) -> String {
        let head = head(self.process_name, Some((0, 0)), 0);
        format!("{head}{EVENTS}{}", self.process())
    }

    fn process(&self) -> String {
        let (pid, name) = (std::process::id(), self.process_name);
        format!("{{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":{pid},\"args\":{{\"name\":{name:?}}}}}")
    }

    /// A thread, whose records follow. The name is plain ASCII.
    pub fn thread(&self, thread: u32, name: &str, ring: &Ring) -> String {
        format!(
            ",\n{{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":{},\"tid\":{thread},\
             \"args\":{{\"name\":{name:?},\"overwritten\":{}}}}}",
            std::process::id(),
            ring.overwritten()
        )
    }

    /// Records of a thread.
    pub fn records<'a>(&self, thread: u32, records: impl Iterator<Item = &'a Record>) -> String {
        let (pid, mut text) = (std::process::id(), String::new());
        for record in records {
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
        text
    }
}

/// What comes before the events: how far the server's clock is ahead, and by how much that may be wrong, in
/// nanoseconds; and how many records were lost.
fn head(process_name: &str, offset_ns: Option<(i64, u64)>, dropped: u64) -> String {
    let (offset, error) = match offset_ns {
        Some((offset, error)) => (micros(offset), micros(error as i64)),
        None => ("null".into(), "null".into()),
    };
    format!(
        "{{\"displayTimeUnit\":\"ns\",\"otherData\":{{\"process\":{process_name:?},\"clock\":\"realtime\",\
         \"clock_offset_us\":{offset},\"clock_error_us\":{error},\"dropped\":{dropped}}},"
    )
}

/// Before the first event.
const EVENTS: &str = "\"traceEvents\":[\n";
/// What ends the file, and is overwritten by the next events: the file is valid at any time.
const TAIL: &str = "\n]}\n";
/// Bytes before the first event. What is not needed of them is filled with spaces, so that they can be
/// written again.
const HEAD_BYTES: usize = 256;

/// A trace in a file.
#[derive(Debug)]
pub struct TraceFile {
    file: File,
    process_name: &'static str,
    clock: Clock,
    /// How far the server's clock is ahead, and by how much that may be wrong, in nanoseconds.
    offset_ns: Option<(i64, u64)>,
    /// How many records were lost, beside those that were overwritten in a ring.
    dropped: u64,
    /// Where [`TAIL`] begins.
    end: u64,
}

impl TraceFile {
    /// Creates the file of a server, whose times those of clients are compared with. It is readable by its
    /// owner alone, and it is an error if there is anything of that name. All records are of this clock.
    pub fn of_server(path: &Path, process_name: &'static str, clock: Clock) -> io::Result<Self> {
        Self::create(path, process_name, clock, Some((0, 0)))
    }

    /// The same of a client, which is to pass what it finds out of the server's clock to
    /// [`TraceFile::set_offset`].
    pub fn of_client(path: &Path, process_name: &'static str) -> io::Result<Self> {
        Self::create(path, process_name, Clock::new(), None)
    }

    fn create(
        path: &Path,
        process_name: &'static str,
        clock: Clock,
        offset_ns: Option<(i64, u64)>,
    ) -> io::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)?;
        let mut this = Self { file, process_name, clock, offset_ns, dropped: 0, end: HEAD_BYTES as u64 };
        this.write_head()?;
        this.append_text(&this.text().process())?;
        Ok(this)
    }

    fn text(&self) -> TraceText {
        TraceText::new(self.process_name, self.clock)
    }

    /// The clock of all records of this file.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// Notes how the server's clock stands to this one, unless that is known better.
    pub fn set_offset(&mut self, sample: &ClockSample) -> io::Result<()> {
        let error = sample.round_trip.as_nanos().div_ceil(2) as u64;
        if self.offset_ns.is_some_and(|(_, known)| known <= error) {
            return Ok(());
        }
        self.offset_ns = Some((sample.offset_ns(&self.clock), error));
        self.write_head()
    }

    /// Notes that so many more records were lost.
    pub fn add_dropped(&mut self, records: u64) -> io::Result<()> {
        self.dropped += records;
        self.write_head()
    }

    fn write_head(&self) -> io::Result<()> {
        let head = head(self.process_name, self.offset_ns, self.dropped);
        let padded = format!("{head:<0$}{EVENTS}", HEAD_BYTES - EVENTS.len());
        self.file.write_all_at(padded.as_bytes(), 0)
    }

    /// Appends what a thread's ring has, in one write. The name is plain ASCII. If that fails, the file stays
    /// as it was.
    pub fn append(&mut self, thread: u32, thread_name: &str, ring: &Ring) -> io::Result<()> {
        let text = self.text();
        let records = text.records(thread, ring.records());
        self.append_text(&(text.thread(thread, thread_name, ring) + &records))
    }

    fn append_text(&mut self, text: &str) -> io::Result<()> {
        let whole = format!("{text}{TAIL}");
        self.file.write_all_at(whole.as_bytes(), self.end).inspect_err(|_| {
            // A full disk: what was there stays a whole file.
            let _ = self.file.set_len(self.end);
            let _ = self.file.write_all_at(TAIL.as_bytes(), self.end);
        })?;
        self.end += text.len() as u64;
        Ok(())
    }
}

/// Nanoseconds as microseconds, in JSON.
fn micros(ns: i64) -> String {
    let sign = if ns < 0 { "-" } else { "" };
    format!("{sign}{}.{:03}", ns.unsigned_abs() / 1000, ns.unsigned_abs() % 1000)
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
        let mut file = TraceFile::of_client(&path, "test").unwrap();
        let again = TraceFile::of_client(&path, "test").unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
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
        assert!(TraceFile::of_client(&path, "test").is_err(), "links are not followed");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_trace_in_parts_is_the_same_as_one_in_a_file() {
        let path = std::env::temp_dir().join(format!("raio-parts-{}-{:p}", std::process::id(), &0));
        let _ = std::fs::remove_file(&path);
        let clock = Clock::new();
        let mut file = TraceFile::of_server(&path, "test", clock).unwrap();
        let mut ring = Ring::new(4);
        (0..6).for_each(|n| ring.push(record(n, Phase::Point)));
        file.append(3, "worker 3", &ring).unwrap();
        let text = TraceText::new("test", clock);
        let mut parts = text.head() + &text.thread(3, "worker 3", &ring);
        ring.records().for_each(|record| parts += &text.records(3, std::iter::once(record)));
        parts += TraceText::TAIL;
        let without_spaces = |text: &str| text.replace(' ', "");
        assert_eq!(without_spaces(&parts), without_spaces(&std::fs::read_to_string(&path).unwrap()));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn the_offset_of_a_clock_is_found_to_within_half_a_round_trip() {
        let ours = Clock::new();
        let start = Instant::now();
        for (ahead_ms, there_us, back_us) in [(0, 10, 10), (250, 10, 90), (250, 90, 10), (86_400_000, 0, 400)]
        {
            let theirs = ours.ahead(Duration::from_millis(ahead_ms));
            let read = start + Duration::from_micros(there_us);
            let received = read + Duration::from_micros(back_us);
            let sample = ClockSample::new(start, received, theirs.realtime_ns(read));
            assert_eq!(sample.round_trip, received - start);
            let error = sample.offset_ns(&ours) - ahead_ms as i64 * 1_000_000;
            assert_eq!(error, (there_us as i64 - back_us as i64) * 500, "{ahead_ms} ms");
            // And the other way round.
            let sample = ClockSample::new(start, received, ours.realtime_ns(read));
            assert_eq!(sample.offset_ns(&theirs), error - ahead_ms as i64 * 1_000_000);
        }
    }

    #[test]
    fn a_clock_has_times_from_before_it_was_made() {
        let before = Instant::now();
        std::thread::sleep(Duration::from_millis(2));
        let clock = Clock::new();
        assert_eq!(clock.at_ns(before), 0);
        assert!(clock.realtime_ns - clock.realtime_ns(before) >= 2_000_000);
    }

    #[test]
    fn the_head_is_written_again_with_what_is_found_out() {
        let path = std::env::temp_dir().join(format!("raio-head-{}-{:p}", std::process::id(), &0));
        let _ = std::fs::remove_file(&path);
        let mut file = TraceFile::of_client(&path, "libraio").unwrap();
        let text = || std::fs::read_to_string(&path).unwrap();
        assert!(
            text().contains("\"clock_offset_us\":null,\"clock_error_us\":null,\"dropped\":0}"),
            "{}",
            text()
        );
        let (sent, clock) = (Instant::now(), file.clock());
        let sample = |us: u64, offset_ns: i64| {
            let received = sent + Duration::from_micros(us);
            let middle = clock.realtime_ns(sent + Duration::from_micros(us) / 2);
            ClockSample::new(sent, received, middle.wrapping_add_signed(offset_ns))
        };
        file.set_offset(&sample(30, -1_234_567)).unwrap();
        let first = "\"clock_offset_us\":-1234.567,\"clock_error_us\":15.000";
        assert!(text().contains(first), "{}", text());
        file.set_offset(&sample(40, 0)).unwrap();
        assert!(text().contains(first), "a worse sample does not count: {}", text());
        file.set_offset(&sample(20, i64::MAX / 2)).unwrap();
        file.add_dropped(u64::MAX / 2).unwrap();
        assert!(text().contains("\"clock_offset_us\":4611686018427387.903,\"clock_error_us\":10.000"));
        assert!(text().contains("\"dropped\":9223372036854775807}"), "{}", text());
        assert!(text().find("\"traceEvents\":[\n{\"name\":\"process_name\"") > Some(200), "{}", text());
        std::fs::remove_file(&path).unwrap();
    }
}
