//! A connection that is cut anywhere leaves nothing behind that was not said, and nothing that was answered
//! is missing: a fixed script (hello, open, three writes, fsync, read) through a proxy, cut at each byte of
//! each header and now and then in the data, both ways, by an end, a reset and silence. With checksums the
//! same is true of a connection on which a bit is flipped.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Context, Crc, File, Operation, Options, Scheme, Session};
use raio_e2e::{Direction, Ending, PATIENCE, Proxy, Random, Raw, Server, Treatment, is_at_rest};
use raio_transport::handshake::Offer;
use raio_transport::protocol::{OPEN_CREATE, OPEN_READ, OPEN_WRITE};

const BLOCK: u64 = 4096;
const WRITES: u64 = 3;
/// The length of the header of a request and the command behind it.
const REQUEST_BYTES: u64 = 64;
const ENDINGS: [Ending; 3] = [Ending::Fin, Ending::Reset, Ending::Silence];
/// How long a client waits that hears nothing.
const SILENCE: Duration = Duration::from_millis(40);
/// Runs at the same time: most only wait.
const THREADS: usize = 8;

/// What block n is filled with.
fn letter(n: u64) -> u8 {
    b'A' + n as u8
}

/// How far a run of the script came.
#[derive(Debug, Default)]
struct Progress {
    /// libraio has a session, and a context.
    has_session: bool,
    has_context: bool,
    is_open: bool,
    /// Writes that were answered.
    written: u64,
    /// Writes that were sent, or may have been.
    sent: u64,
    is_synced: bool,
    is_read: bool,
    /// Requests of the context whose data arrived damaged.
    checksum_errors: u64,
}

/// The script, byte by byte.
fn run_raw(stream: TcpStream, path: &str, progress: &mut Progress) -> io::Result<()> {
    let flags = OPEN_READ | OPEN_WRITE | OPEN_CREATE;
    let mut client = Raw::open_on(stream, &Offer::new("cut"), path, flags)?;
    progress.is_open = true;
    for n in 0..WRITES {
        progress.sent = n + 1;
        client.send_write_header(n, n * BLOCK, BLOCK as u32)?;
        client.stream.write_all(&[letter(n); BLOCK as usize])?;
        let (response, _) = client.response()?;
        assert_eq!((response.id, response.result, response.status.errno), (n, BLOCK, 0));
        progress.written = n + 1;
    }
    client.send_fsync(WRITES)?;
    let (response, _) = client.response()?;
    assert_eq!((response.id, response.status.errno), (WRITES, 0));
    progress.is_synced = true;
    client.send_read(WRITES + 1, 0, BLOCK as u32)?;
    let (response, _) = client.response()?;
    assert_eq!((response.result, response.data_len, response.status.errno), (BLOCK, BLOCK as u32, 0));
    let mut data = vec![0; BLOCK as usize];
    client.stream.read_exact(&mut data)?;
    assert!(data.iter().all(|&byte| byte == letter(0)));
    progress.is_read = true;
    Ok(())
}

fn run(
    context: &mut Context,
    file: &File,
    operation: Operation,
) -> Result<(u64, Option<Buffers>), raio::Error> {
    context.submit(file, operation, 0).map_err(|rejected| rejected.error)?;
    while context.wait(1, 1, None)? == 0 {}
    let completion = context.next().expect("it is there");
    Ok((completion.result?, completion.buffers))
}

/// The script by libraio. Its pings, if any, are not part of it.
fn run_library(
    proxy: &Proxy,
    path: &str,
    options: &Options,
    progress: &mut Progress,
) -> Result<(), raio::Error> {
    let session = Session::connect_to(Scheme::Tcp, proxy.address(), options)?;
    progress.has_session = true;
    let file = session.open(path, libc::O_RDWR | libc::O_CREAT, 0o644)?;
    progress.is_open = true;
    let mut context = session.context(4)?;
    progress.has_context = true;
    for n in 0..WRITES {
        progress.sent = n + 1;
        let buffers = Buffers::One(Buffer::Owned(vec![letter(n); BLOCK as usize].into()));
        assert_eq!(run(&mut context, &file, Operation::Write { offset: n * BLOCK, buffers })?.0, BLOCK);
        progress.written = n + 1;
    }
    run(&mut context, &file, Operation::Fsync { data_only: false })?;
    progress.is_synced = true;
    let buffers = Buffers::One(Buffer::Owned(vec![0; BLOCK as usize].into()));
    let (count, buffers) = run(&mut context, &file, Operation::Read { offset: 0, buffers })?;
    assert_eq!(count, BLOCK);
    let buffers = buffers.expect("a read gives its buffer back");
    assert!(buffers.pieces()[0].bytes().iter().all(|&byte| byte == letter(0)));
    progress.is_read = true;
    progress.checksum_errors = context.stats().checksum_errors;
    Ok(())
}

/// What is done to a connection.
#[derive(Clone, Copy, Debug)]
enum Harm {
    Cut(Ending),
    /// This bit of the next byte is flipped.
    Flip(u64),
}

/// Where it is done: to the connection with this number, in this direction, after so many bytes.
#[derive(Clone, Copy, Debug)]
struct Place {
    connection: usize,
    direction: Direction,
    after: u64,
    harm: Harm,
}

impl Place {
    /// The treatments of the connections up to this one.
    fn treatments(self) -> Vec<Treatment> {
        let mut treatments = vec![Treatment::default(); self.connection + 1];
        let treatment = &mut treatments[self.connection];
        match self.harm {
            Harm::Cut(ending) => treatment.cut = Some((self.direction, self.after, ending)),
            Harm::Flip(bit) => treatment.flip = Some((self.direction, self.after * 8 + bit)),
        }
        treatments
    }
}

/// Every number of bytes up to `total`, but in `data`, of which there are several ranges, each 64th.
fn positions(total: u64, data: &[std::ops::Range<u64>]) -> impl Iterator<Item = u64> {
    let is_within = |at: u64| {
        data.iter()
            .find(|range| range.contains(&at))
            .is_some_and(|range| !(at - range.start).is_multiple_of(64))
    };
    (0..total).filter(move |&at| !is_within(at))
}

/// Where the data of the writes is, after a hello and so on of so many bytes.
fn written_data(first: u64) -> Vec<std::ops::Range<u64>> {
    let begin = |n| first + n * (REQUEST_BYTES + BLOCK) + REQUEST_BYTES;
    (0..WRITES).map(|n| begin(n)..begin(n) + BLOCK).collect()
}

/// What the file that a run wrote must be: `complete` writes at most had reached the server whole.
fn check(path: &Path, progress: &Progress, can_be_open: bool, complete: u64) {
    let content = match std::fs::read(path) {
        Ok(content) => content,
        Err(error) => {
            assert!(error.kind() == io::ErrorKind::NotFound && !progress.is_open, "{error}");
            return;
        }
    };
    assert!(can_be_open, "it was opened by half a request");
    let blocks: Vec<&[u8]> = content.chunks(BLOCK as usize).collect();
    assert!(blocks.len() as u64 >= progress.written, "a write that was answered is missing");
    assert!(blocks.len() as u64 <= complete.min(progress.sent), "half a write was done, or one never sent");
    for (n, block) in (0..).zip(blocks) {
        assert!(
            block.len() as u64 == BLOCK && block.iter().all(|&byte| byte == letter(n)),
            "half of block {n}"
        );
    }
}

/// One test at a time has the processors: its clients give up a server that is silent for [`SILENCE`].
static TURN: Mutex<()> = Mutex::new(());

/// A server of a directory, runs that are cut, and what must be true of each in the end.
struct Bench {
    _turn: MutexGuard<'static, ()>,
    directory: tempfile::TempDir,
    server: Server,
}

impl Bench {
    fn new() -> Self {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let directory = tempfile::tempdir().expect("a directory");
        let export = format!("d={},rw", directory.path().display());
        let server = Server::start_with(&[&export], &["--log", "error"]);
        Self { _turn, directory, server }
    }

    fn path(&self, n: usize) -> String {
        format!("/d/file{n:05}")
    }

    /// Has each run done, and checks them once the server is at rest, if it comes to that. `limits` says of a
    /// place whether the open can be complete, and how many writes can.
    fn harm_at(
        &mut self,
        places: &[Place],
        comes_to_rest: bool,
        script: impl Fn(&Proxy, Place, &str, &mut Progress) + Sync,
        limits: impl Fn(Place) -> (bool, u64),
    ) {
        let next = AtomicUsize::new(0);
        let begin = Instant::now();
        let all: Vec<(usize, Progress)> = std::thread::scope(|scope| {
            let work = || {
                let mut mine = Vec::new();
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some(&place) = places.get(n) else { return mine };
                    // One of its own: a connection that the run before had given up may come late.
                    let proxy = Proxy::start(self.server.address());
                    proxy.plan(place.treatments());
                    let mut progress = Progress::default();
                    let began = Instant::now();
                    script(&proxy, place, &self.path(n), &mut progress);
                    assert!(began.elapsed() < PATIENCE, "{place:?} took {:?}", began.elapsed());
                    mine.push((n, progress));
                }
            };
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("no run fails")).collect()
        });
        assert_eq!(all.len(), places.len());
        if comes_to_rest {
            self.server.statistics_when(is_at_rest);
        }
        for (n, progress) in &all {
            let (can_be_open, complete) = limits(places[*n]);
            let file = self.directory.path().join(format!("file{n:05}"));
            let checked = std::panic::catch_unwind(|| check(&file, progress, can_be_open, complete));
            assert!(checked.is_ok(), "{:?}: {progress:?}", places[*n]);
        }
        eprintln!("{} runs took {:?}", places.len(), begin.elapsed());
    }
}

/// Cuts with each ending, or with one, by turns.
fn with_endings(
    connection: usize,
    direction: Direction,
    positions: impl Iterator<Item = u64>,
    is_each: bool,
) -> Vec<Place> {
    let each = positions.enumerate().flat_map(move |(n, after)| {
        let endings = if is_each { &ENDINGS[..] } else { &ENDINGS[n % 3..][..1] };
        endings.iter().map(move |&ending| Place { connection, direction, after, harm: Harm::Cut(ending) })
    });
    each.collect()
}

#[test]
fn a_connection_cut_at_any_byte_leaves_on_the_disk_what_was_answered_and_nothing_by_halves() {
    let mut bench = Bench::new();
    // One run that is not cut tells where everything is.
    let proxy = Proxy::start(bench.server.address());
    let connect = |proxy: &Proxy, patience| {
        let stream = TcpStream::connect(proxy.address()).expect("the proxy listens");
        stream.set_read_timeout(Some(patience)).expect("a socket");
        stream
    };
    let mut progress = Progress::default();
    run_raw(connect(&proxy, PATIENCE), &bench.path(99_999), &mut progress).expect("it is not cut");
    let [up, down] = [Direction::Up, Direction::Down].map(|direction| proxy.passed(0, direction));
    drop(proxy);
    // The fsync and the read are behind the writes.
    let first = up - 2 * REQUEST_BYTES - WRITES * (REQUEST_BYTES + BLOCK);
    let data = written_data(first);
    let read = down - BLOCK..down;
    let mut places = with_endings(0, Direction::Up, positions(up, &data), true);
    places.extend(with_endings(0, Direction::Down, positions(down, &[read]), true));
    bench.harm_at(
        &places,
        true,
        |proxy, _, path, progress| {
            let ended = run_raw(connect(proxy, SILENCE), path, progress);
            assert!(ended.is_err() && !progress.is_read, "it was cut");
        },
        |place| match place.direction {
            Direction::Up => {
                let complete = data.iter().filter(|range| range.end <= place.after).count();
                (place.after >= first, complete as u64)
            }
            Direction::Down => (true, WRITES),
        },
    );
}

/// A server, and where in the connections of libraio what is.
struct LibraryBench {
    bench: Bench,
    /// How many bytes the control connection brings each way, up to the end of the open.
    opened: [u64; 2],
    /// The same in all, of the control connection and of the context's.
    all: [[u64; 2]; 2],
    /// Where the context's connection has the data of writes, and ends its last request.
    written: Vec<std::ops::Range<u64>>,
    requests_end: u64,
    options: Options,
}

impl LibraryBench {
    fn new(crc: bool) -> Self {
        let bench = Bench::new();
        // At an address that no run has: a session that was given up at the same address and port would be
        // named in the first message of this one, and make that longer than those of the runs.
        let proxy = Proxy::start_on(Ipv4Addr::new(127, 0, 0, 2), bench.server.address());
        let passed = |connection| {
            [Direction::Up, Direction::Down].map(|direction| proxy.passed(connection, direction))
        };
        let crc = if crc { Crc::On } else { Crc::Off };
        let options = Options { crc, reconnect: Duration::ZERO, ..Options::default() };
        let session = Session::connect_to(Scheme::Tcp, proxy.address(), &options).expect("a session");
        let file = session.open(bench.path(99_998), libc::O_RDWR | libc::O_CREAT, 0o644).expect("a file");
        let opened = passed(0);
        drop(session.context(4).expect("a context"));
        let written = written_data(passed(1)[0]);
        drop((file, session));
        run_library(&proxy, &bench.path(99_999), &options, &mut Progress::default())
            .expect("nothing is done to it");
        let all = [passed(2), passed(3)];
        let requests_end = written[WRITES as usize - 1].end + 2 * REQUEST_BYTES;
        drop(proxy);
        // Only now: a server that is slow would be pinged.
        let options = Options {
            connect_timeout: SILENCE * 2,
            call_timeout: SILENCE * 2,
            request_timeout: Some(SILENCE),
            ..options
        };
        Self { bench, opened, all, written, requests_end, options }
    }

    /// The places for harm in a connection.
    fn positions(&self, connection: usize, direction: Direction) -> Vec<u64> {
        let total = self.all[connection][direction as usize];
        let data = match (connection, direction) {
            (0, _) => Vec::new(),
            (_, Direction::Up) => self.written.clone(),
            (_, Direction::Down) => std::iter::once(total - BLOCK..total).collect(),
        };
        positions(total, &data).collect()
    }

    fn harm_at(&mut self, places: &[Place]) {
        let Self { bench, opened, written, requests_end, options, .. } = self;
        bench.harm_at(
            places,
            true,
            |proxy, place, path, progress| {
                let ended = run_library(proxy, path, options, progress);
                let is_before_the_end = match (place.connection, place.direction) {
                    (0, direction) => place.after < opened[direction as usize],
                    (_, Direction::Up) => place.after < *requests_end,
                    (_, Direction::Down) => true,
                };
                // The last bytes of the control connection are those of closing, of which nothing is heard.
                let is_noticed = ended.is_err() || progress.checksum_errors == 1;
                assert!(is_noticed || !is_before_the_end, "{place:?} has no consequence");
            },
            |place| match (place.connection, place.direction) {
                // The other connection says nothing before the open has been answered.
                (0, Direction::Up) if place.after < opened[0] => (false, 0),
                // A write whose data is damaged is sent again.
                (1, Direction::Up) if matches!(place.harm, Harm::Cut(_)) => {
                    let complete = written.iter().filter(|range| range.end <= place.after).count();
                    (true, complete as u64)
                }
                _ => (true, WRITES),
            },
        );
    }
}

const WAYS: [(usize, Direction); 4] =
    [(0, Direction::Up), (0, Direction::Down), (1, Direction::Up), (1, Direction::Down)];

/// `is_each`: with each ending at each place.
fn cut_the_library(is_each: bool) {
    let mut bench = LibraryBench::new(false);
    let places = WAYS.map(|(connection, direction)| {
        let positions = bench.positions(connection, direction);
        with_endings(connection, direction, positions.into_iter(), is_each)
    });
    bench.harm_at(&places.concat());
}

#[test]
fn libraio_cut_at_any_byte_says_of_no_write_that_it_was_done_if_it_was_not() {
    cut_the_library(false);
}

/// As above, but libraio goes on by itself: once it has a session, or a context, nothing fails that goes over
/// it.
fn go_on_in_the_library(is_each: bool) {
    let mut bench = LibraryBench::new(false);
    let places = WAYS.map(|(connection, direction)| {
        let positions = bench.positions(connection, direction);
        with_endings(connection, direction, positions.into_iter(), is_each)
    });
    let options = Options { call_timeout: PATIENCE, reconnect: PATIENCE, ..bench.options.clone() };
    bench.bench.harm_at(
        &places.concat(),
        // A goaway may be cut, too, and then the session lingers.
        false,
        |proxy, place, path, progress| {
            let ended = run_library(proxy, path, &options, progress);
            let is_made = if place.connection == 0 { progress.has_session } else { progress.has_context };
            assert!(ended.is_ok() || !is_made, "{place:?}: {ended:?} {progress:?}");
        },
        |_| (true, WRITES),
    );
}

#[test]
fn libraio_cut_at_any_byte_goes_on_and_does_everything() {
    go_on_in_the_library(false);
}

#[test]
#[ignore = "long"]
fn libraio_cut_at_any_byte_in_every_way_goes_on_and_does_everything() {
    go_on_in_the_library(true);
}

#[test]
#[ignore = "long"]
fn libraio_cut_at_any_byte_in_every_way_says_of_no_write_that_it_was_done_if_it_was_not() {
    cut_the_library(true);
}

/// With each of these bits of a byte.
fn flip_in_the_library(bits: impl Fn(u64) -> std::ops::Range<u64>) {
    let mut bench = LibraryBench::new(true);
    let mut places = Vec::new();
    for (connection, direction) in WAYS {
        for after in bench.positions(connection, direction) {
            let flips = bits(after).map(Harm::Flip);
            places.extend(flips.map(|harm| Place { connection, direction, after, harm }));
        }
    }
    bench.harm_at(&places);
}

#[test]
fn with_checksums_a_bit_flipped_at_any_byte_is_noticed_and_nothing_wrong_is_written_or_read() {
    let mut random = Random::new();
    let any: Vec<u64> = (0..1000).map(|_| random.below(8)).collect();
    flip_in_the_library(|at| {
        let bit = any[at as usize % any.len()];
        bit..bit + 1
    });
}

#[test]
#[ignore = "long"]
fn with_checksums_any_bit_flipped_is_noticed_and_nothing_wrong_is_written_or_read() {
    flip_in_the_library(|_| 0..8);
}
