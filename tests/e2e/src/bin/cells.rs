//! `cells URL LOG CLIENT SEED [crc]`: reads, writes and syncs cells of the files /d/0, /d/1, ... at random,
//! by two contexts of a session, and logs what happened, until its standard input ends. When its session is
//! given up, it opens a new one. It may be killed at any time: what it has logged by then is whole. Beside
//! that it changes names in directories of its own, and ends if they are not as they must be.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use raio::{Buffer, Buffers, Class, Completion, Context, Error, File, Operation, Options, Session};
use raio_e2e::{
    CELL_BYTES, CellPlace, CellRead, CellValue, CellWrite, FILE_CELLS, FILES, FOREVER, FileSync, LogLine,
    Outcome, Random, SESSION_GIVEN_UP, WRITES_LOST, change_names, decode_cell, encode_cell, monotonic_ns,
};

/// Contexts of a session.
const CONTEXTS: usize = 2;
/// Operations in flight, of each context.
const DEPTH: usize = 4;
/// How long a round takes at least, in which each context begins an operation: what bounds the log.
const ROUND: Duration = Duration::from_millis(2);
/// A server that says nothing for so long is lost.
const SILENCE_MAX: Duration = Duration::from_secs(1);
/// The reconnect window: longer than a sequence of faults can keep the server out of reach, because no test
/// of chaos is about a client that gives up.
const AWAY_MAX: Duration = Duration::from_secs(600);
/// Most operations are on these first cells of a file, so that they meet.
const HOT_CELLS: u64 = 64;
const WARM_CELLS: u64 = 4096;

static IS_OVER: AtomicBool = AtomicBool::new(false);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (url, log, number, seed, crc) = match &arguments[..] {
        [url, log, number, seed] => (url, log, number.parse()?, seed.parse()?, false),
        [url, log, number, seed, crc] if crc == "crc" => (url, log, number.parse()?, seed.parse()?, true),
        _ => return Err("usage: cells URL LOG CLIENT SEED [crc]".into()),
    };
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        IS_OVER.store(true, Ordering::Relaxed);
    });
    let log = OpenOptions::new().append(true).create(true).open(log)?;
    let mut client =
        Client { number, sequence: 0, random: Random::with_seed(seed), log, lines: String::new() };
    let options = Options {
        connect_timeout: SILENCE_MAX,
        call_timeout: SILENCE_MAX * 5,
        request_timeout: Some(SILENCE_MAX),
        reconnect: AWAY_MAX,
        crc: if crc { raio::Crc::On } else { raio::Crc::Off },
        ..Options::default()
    };
    let (url_of_names, options_of_names) = (url.clone(), options.clone());
    let names = std::thread::spawn(move || {
        let mut random = Random::with_seed(seed ^ 1);
        for n in 0.. {
            if IS_OVER.load(Ordering::Relaxed) {
                return;
            }
            if let Ok(session) = Session::connect(&url_of_names, &options_of_names) {
                let directory = format!("/d/names-{number}-{n}");
                let changes = || change_names(&session, &directory, &mut random, &IS_OVER);
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(changes)).is_err() {
                    std::process::exit(1);
                }
            }
            std::thread::sleep(ROUND * 10);
        }
    });
    while !IS_OVER.load(Ordering::Relaxed) {
        // Whatever goes wrong: on from the start.
        if let Ok(session) = Session::connect(url, &options) {
            let _ = client.work(&session);
        }
        client.write_log();
        std::thread::sleep(ROUND * 10);
    }
    let _ = names.join();
    Ok(())
}

struct Client {
    number: u32,
    sequence: u32,
    random: Random,
    log: std::fs::File,
    /// To be logged.
    lines: String,
}

/// What an operation is.
#[derive(Clone, Copy)]
enum Kind {
    Read { place: CellPlace, count: u32 },
    Write { place: CellPlace, count: u32, value: CellValue },
    Fsync { file: u32 },
}

/// A context and what it has in flight.
struct Queue {
    context: Context,
    in_flight: HashMap<u64, (Kind, u64)>,
    next: u64,
}

impl Client {
    fn say(&mut self, line: LogLine) {
        let _ = writeln!(self.lines, "{line}");
    }

    fn write_log(&mut self) {
        self.log.write_all(self.lines.as_bytes()).expect("the log can be written");
        self.lines.clear();
    }

    /// Works until a connection is lost or the work is over, and nothing is in flight any more.
    fn work(&mut self, session: &Session) -> Result<(), Error> {
        let files = (0..FILES).map(|n| session.open(format!("/d/{n}"), libc::O_RDWR, 0));
        let files = files.collect::<Result<Vec<_>, _>>()?;
        let queue = || Ok(Queue { context: session.context(DEPTH)?, in_flight: HashMap::new(), next: 0 });
        let mut queues = (0..CONTEXTS).map(|_| queue()).collect::<Result<Vec<_>, Error>>()?;
        loop {
            let failure = queues.iter().find_map(|queue| queue.context.failure());
            let is_last = failure.is_some() || IS_OVER.load(Ordering::Relaxed);
            for queue in &mut queues {
                if !is_last && queue.in_flight.len() < DEPTH {
                    self.begin(queue, &files);
                }
                queue.context.flush();
                // Fails when the connection has ended and nothing is left.
                let _ = queue.context.wait(DEPTH, DEPTH, Some(ROUND / CONTEXTS as u32));
                while let Some(completion) = queue.context.next() {
                    self.end(queue, completion);
                }
            }
            self.write_log();
            // However long it takes: a lost connection comes back, or is given up.
            if is_last && queues.iter().all(|queue| queue.in_flight.is_empty()) {
                if let Some(error) = failure {
                    self.say(LogLine::Note(format!("{SESSION_GIVEN_UP} {error}")));
                }
                return Ok(());
            }
        }
    }

    fn begin(&mut self, queue: &mut Queue, files: &[File]) {
        let file = self.random.below(FILES.into()) as u32;
        let (cells, count) = match self.random.below(64) {
            0..40 => (HOT_CELLS, 1 + self.random.below(4)),
            40..60 => (WARM_CELLS, 1 + self.random.below(8)),
            60 => (WARM_CELLS, 1 + self.random.below(200)),
            // Where there is nothing yet, and perhaps no space.
            _ => (FILE_CELLS.into(), 1),
        };
        let place = CellPlace { file, cell: self.random.below(cells - count + 1) as u32 };
        let count = count as u32;
        let kind = match self.random.below(100) {
            0..45 => {
                self.sequence += 1;
                let value = CellValue { client: self.number, sequence: self.sequence };
                Kind::Write { place, count, value }
            }
            45..95 => Kind::Read { place, count },
            _ => Kind::Fsync { file },
        };
        let begin = monotonic_ns();
        let offset = place.offset();
        let one = |bytes: Vec<u8>| Buffers::One(Buffer::Owned(bytes.into()));
        let operation = match kind {
            Kind::Read { .. } => {
                Operation::Read { offset, buffers: one(vec![0; count as usize * CELL_BYTES]) }
            }
            Kind::Write { value, .. } => {
                // In the log before anything can happen.
                self.say(LogLine::Begin { place, count, value, begin });
                self.write_log();
                let bytes = cells_of(place, count).flat_map(|place| encode_cell(place, value)).collect();
                Operation::Write { offset, buffers: one(bytes) }
            }
            Kind::Fsync { .. } => Operation::Fsync { data_only: begin.is_multiple_of(2) },
        };
        let token = queue.next;
        queue.next += 1;
        match queue.context.submit(&files[file as usize], operation, token) {
            Ok(_) => {
                queue.in_flight.insert(token, (kind, begin));
            }
            Err(_) => self.log_end(kind, begin, 0, (Outcome::Failed, monotonic_ns()), &[]),
        }
    }

    fn end(&mut self, queue: &mut Queue, completion: Completion) {
        let (kind, begin) = queue.in_flight.remove(&completion.token).expect("it is in flight");
        let now = monotonic_ns();
        let (bytes, rest) = match &completion.result {
            Ok(_) if matches!(kind, Kind::Fsync { .. }) => (0, (Outcome::Ok, now)),
            // Less is done if what is behind failed.
            Ok(bytes) => (*bytes, (Outcome::Failed, now)),
            // Nothing is dropped because of it.
            Err(error) if matches!(kind, Kind::Fsync { .. }) && error.status.class == Class::Transport => {
                (0, (Outcome::Unknown, now))
            }
            Err(error) => (0, outcome(error, now)),
        };
        match &completion.result {
            Err(error) if error.is_lost => self.say(LogLine::Note(WRITES_LOST.into())),
            Err(error) if !error.is_unknown && error.errno() != libc::ENOSPC => {
                self.say(LogLine::Note(format!("failed ({}): {error}", error.errno())));
            }
            _ => {}
        }
        let data = match &completion.buffers {
            Some(buffers) if completion.result.is_ok() => buffers.pieces()[0].bytes().to_vec(),
            _ => Vec::new(),
        };
        self.log_end(kind, begin, bytes, rest, &data);
    }

    /// Logs the end of an operation: `bytes` of it are done, and of the rest the outcome is this, at that
    /// time.
    fn log_end(&mut self, kind: Kind, begin: u64, bytes: u64, rest: (Outcome, u64), data: &[u8]) {
        let now = monotonic_ns();
        match kind {
            Kind::Fsync { file } => {
                self.say(LogLine::Fsync(FileSync { file, begin, end: now, outcome: rest.0 }));
            }
            Kind::Write { place, count, value } => {
                for (place, at) in cells_of(place, count).zip((0..).step_by(CELL_BYTES)) {
                    let (outcome, end) = if at + CELL_BYTES as u64 <= bytes {
                        (Outcome::Ok, now)
                    } else if at < bytes {
                        (Outcome::Unknown, now)
                    } else {
                        rest
                    };
                    self.say(LogLine::Write(CellWrite { place, value, begin, end, outcome }));
                }
            }
            Kind::Read { place, count } => {
                let (cells, _) = data[..bytes as usize].as_chunks::<CELL_BYTES>();
                for (place, cell) in cells_of(place, count).zip(cells) {
                    match decode_cell(place, cell) {
                        Some(value) => self.say(LogLine::Read(CellRead { place, value, begin, end: now })),
                        None => {
                            let hex = cell.iter().map(|byte| format!("{byte:02x}")).collect();
                            self.say(LogLine::Broken { place, hex, begin, end: now });
                        }
                    }
                }
            }
        }
    }
}

fn cells_of(place: CellPlace, count: u32) -> impl Iterator<Item = CellPlace> {
    (place.cell..place.cell + count).map(move |cell| CellPlace { cell, ..place })
}

/// How an operation ended that failed so, and by when it was done if it was.
fn outcome(error: &Error, now: u64) -> (Outcome, u64) {
    match error.status.class {
        // Then the server has said that nothing of it happens any more.
        _ if error.is_unknown && error.errno() == libc::ECONNRESET => (Outcome::Unknown, now),
        _ if error.is_unknown => (Outcome::Unknown, FOREVER),
        // Of other failures of the storage it is not known how far it came.
        Class::Storage if error.errno() != libc::ENOSPC => (Outcome::Unknown, now),
        _ => (Outcome::Failed, now),
    }
}
