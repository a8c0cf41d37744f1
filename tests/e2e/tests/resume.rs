//! Clients of libraio whose connections are cut, and whose servers are started anew, over and over: nothing
//! fails that need not, nothing is done twice or too late, and what is there is what was said.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use raio::{
    Buffer, Buffers, Context, Crc, Error, File, Operation, OperationCrc, Options, Session, SubmitOptions,
};
use raio_e2e::{
    Cable, Direction, End, Ending, LISTEN, PATIENCE, Proxy, Server, Silenced, Treatment, binary, needs_wire,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

const BLOCK: usize = 4096;
const BLOCKS: u64 = 64;
const CUTS: usize = 40;
/// Of each kind of request.
const RESETS: usize = 100;
const RESTARTS: usize = 8;

fn write(block: u64, byte: u8) -> Operation {
    let buffers = Buffers::One(Buffer::Owned(vec![byte; BLOCK].into()));
    Operation::Write { offset: block * BLOCK as u64, buffers }
}

fn read(block: u64) -> Operation {
    let buffers = Buffers::One(Buffer::Owned(vec![0; BLOCK].into()));
    Operation::Read { offset: block * BLOCK as u64, buffers }
}

/// A server that may follow others at the same place.
fn serve(directory: &Path, listen: &str) -> Server {
    serve_at(directory, &[listen])
}

fn serve_at(directory: &Path, listens: &[&str]) -> Server {
    serve_by(Command::new(binary("raio_server")), directory, listens)
}

fn serve_by(mut command: Command, directory: &Path, listens: &[&str]) -> Server {
    for listen in listens {
        command.args(["--listen", listen]);
    }
    command.args(["--workers", "2", "--state"]).arg(directory.join("state"));
    command.arg("--export").arg(format!("d={},rw", directory.join("files").display()));
    Server::spawn(command)
}

fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(directory.path().join("files")).expect("a directory");
    directory
}

/// How a program waits for what ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    /// In calls that block.
    InCalls,
    /// For a descriptor alone, with calls that do not.
    ForDescriptor,
}

const WAITS: [Waits; 2] = [Waits::InCalls, Waits::ForDescriptor];

/// A file, and what is in each of its blocks.
struct Model {
    waits: Waits,
    file: File,
    context: Context,
    /// What was acknowledged last, and what may be there besides.
    blocks: Vec<(u8, Option<u8>)>,
    unknown: u64,
}

impl Model {
    fn new(session: &Session, waits: Waits) -> Self {
        let file = session.open("/d/file", libc::O_RDWR | libc::O_CREAT, 0o644).expect("a file");
        let context = session.context(BLOCKS as usize).expect("a context");
        Self { waits, file, context, blocks: vec![(0, None); BLOCKS as usize], unknown: 0 }
    }

    /// Writes every block, and has something happen meanwhile. How long it took.
    fn write_all(&mut self, byte: u8, meanwhile: impl FnOnce()) -> Duration {
        for block in 0..BLOCKS {
            self.context.submit(&self.file, write(block, byte), block).expect("there is room");
        }
        self.context.flush();
        let begin = Instant::now();
        meanwhile();
        for (block, result) in self.collect() {
            match result {
                Ok(_) => self.blocks[block] = (byte, None),
                Err(error) => {
                    assert!(error.is_unknown && error.errno() == libc::ECONNRESET, "{error:?}");
                    self.blocks[block].1 = Some(byte);
                    self.unknown += 1;
                }
            }
        }
        begin.elapsed()
    }

    /// Waits for at least one completion, for a while.
    fn wait(&mut self) {
        match self.waits {
            Waits::InCalls => {
                self.context.wait(1, usize::MAX, Some(Duration::from_millis(100))).expect("it goes on");
            }
            Waits::ForDescriptor => {
                let fd = self.context.poll_fd().expect("a descriptor");
                // Longer than anything takes: it is readable whenever there is something to do.
                let timeout = Timespec::try_from(PATIENCE).expect("it is short");
                let ready = poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout));
                assert_eq!(ready, Ok(1), "nothing happens: {:?}", self.context.stats());
                self.context.wait(0, usize::MAX, Some(Duration::ZERO)).expect("it goes on");
            }
        }
    }

    /// The outcomes of an operation on each block, each of which comes once.
    fn collect(&mut self) -> Vec<(usize, Result<u64, Error>)> {
        let mut all = Vec::new();
        let mut seen = [false; BLOCKS as usize];
        // Emulated devices that have lost packets take their time.
        let deadline = Instant::now() + 3 * PATIENCE;
        while all.len() < BLOCKS as usize {
            let context = &self.context;
            let (stats, why) = (context.stats(), context.reconnecting());
            assert!(Instant::now() < deadline, "{} of {BLOCKS}: {stats:?}, {why:?}", all.len());
            self.wait();
            while let Some(completion) = self.context.next() {
                if let Some(buffers) = &completion.buffers
                    && completion.result.is_ok()
                {
                    let byte = buffers.pieces()[0].bytes()[0];
                    assert!(buffers.pieces()[0].bytes().iter().all(|&other| other == byte), "a torn block");
                }
                let block = completion.token as usize;
                assert!(!std::mem::replace(&mut seen[block], true), "block {block} ends twice");
                all.push((block, completion.result));
            }
        }
        all
    }

    fn fsync(&mut self) {
        self.context.submit(&self.file, Operation::Fsync { data_only: true }, 0).expect("there is room");
        self.context.flush();
        let deadline = Instant::now() + PATIENCE;
        let completion = loop {
            assert!(Instant::now() < deadline);
            self.wait();
            if let Some(completion) = self.context.next() {
                break completion;
            }
        };
        completion.result.expect("nothing is lost");
    }

    /// What is on the disk.
    fn check(&self, directory: &Path) {
        let bytes = std::fs::read(directory.join("files/file")).expect("the file");
        for (block, &(byte, perhaps)) in self.blocks.iter().enumerate() {
            let found = &bytes[block * BLOCK..][..BLOCK];
            let is = |byte: u8| found.iter().all(|&other| other == byte);
            assert!(is(byte) || perhaps.is_some_and(is), "block {block}: {:?}", &found[..4]);
        }
    }
}

#[test]
fn on_a_server_that_lives_no_operation_is_unknown_however_often_the_cable_is_cut() {
    WAITS.into_iter().for_each(cut_often);
}

fn cut_often(waits: Waits) {
    let directory = directory();
    let server = serve(directory.path(), "tcp://127.0.0.1:0");
    let proxy = Proxy::start(server.address());
    let session = Session::connect(&proxy.url(), &Options::default()).expect("a session");
    let mut model = Model::new(&session, waits);
    let mut times = Vec::new();
    for round in 0..CUTS {
        let ending = if round % 2 == 0 { Ending::Reset } else { Ending::Fin };
        let took = model.write_all(round as u8 + 1, || {
            std::thread::sleep(Duration::from_micros(100 * (round as u64 % 7)));
            proxy.end_all(ending);
        });
        times.push(took);
        model.check(directory.path());
        assert_eq!(model.file.status().expect("the status").size.get(), BLOCKS * BLOCK as u64);
    }
    model.fsync();
    let stats = model.context.stats();
    assert_eq!((model.unknown, stats.unknown, stats.failed, stats.lost), (0, 0, 0, 0));
    assert!(stats.reconnects as usize > CUTS / 2, "{stats:?}");
    times.sort_unstable();
    eprintln!("a round of {BLOCKS} writes with a cut took {:?}, half of them", times[CUTS / 2]);
}

#[test]
fn each_reset_with_a_request_in_flight_is_one_more_connection_and_no_failure() {
    let directory = directory();
    let server = serve(directory.path(), "tcp://127.0.0.1:0");
    let proxy = Proxy::start(server.address());
    let session = Session::connect(&proxy.url(), &Options::default()).expect("a session");
    let mut model = Model::new(&session, Waits::InCalls);
    model.write_all(1, || {});
    for (what, operation) in [("read", read as fn(u64) -> Operation), ("write", |block| write(block, 1))] {
        let mut times = Vec::new();
        let before = model.context.stats().reconnects;
        for _ in 0..RESETS {
            proxy.stall(true);
            model.context.submit(&model.file, operation(0), 0).expect("there is room");
            model.context.flush();
            let begin = Instant::now();
            proxy.end_all(Ending::Reset);
            proxy.stall(false);
            while model.context.wait(1, 1, Some(PATIENCE)).expect("it goes on") == 0 {}
            times.push(begin.elapsed());
            model.context.next().expect("it is there").result.expect("it has only to be sent again");
        }
        assert_eq!(model.context.stats().reconnects - before, RESETS as u64, "{what}");
        times.sort_unstable();
        let (median, p99) = (times[RESETS / 2], times[RESETS * 99 / 100]);
        eprintln!("from a reset to the end of a {what} in flight: median {median:?}, p99 {p99:?}");
    }
    assert_eq!(model.context.stats().unknown, 0);
}

#[test]
fn servers_that_are_killed_lose_nothing_and_leave_at_most_what_was_under_way_unknown() {
    WAITS.into_iter().for_each(killed);
}

fn killed(waits: Waits) {
    let directory = directory();
    let mut server = serve(directory.path(), "tcp://127.0.0.1:0");
    let listen = server.listen_url();
    let session = Session::connect(&server.url(), &Options::default()).expect("a session");
    let mut model = Model::new(&session, waits);
    model.write_all(100, || {});
    for round in 0..RESTARTS {
        model.write_all(2 * round as u8 + 1, || {
            server.kill();
            server = serve(directory.path(), &listen);
        });
        model.check(directory.path());
        // What was acknowledged is there, and what is read is what is there.
        for block in 0..BLOCKS {
            model.context.submit(&model.file, read(block), block).expect("there is room");
        }
        for (_, result) in model.collect() {
            assert_eq!(result.expect("a read is sent again"), BLOCK as u64);
        }
        model.fsync();
        let before = model.unknown;
        model.write_all(2 * round as u8 + 2, || {});
        assert_eq!(model.unknown, before, "nothing happened to these");
        model.check(directory.path());
    }
    assert!(model.context.stats().reconnects as usize >= RESTARTS);
    assert_eq!(model.context.stats().unknown, model.unknown);
    assert!(model.unknown <= RESTARTS as u64 * BLOCKS, "more than was in flight at the kills");
}

#[test]
fn servers_that_are_stopped_in_good_order_and_started_again_cost_a_pause_and_nothing_else() {
    WAITS.into_iter().for_each(stopped);
}

fn stopped(waits: Waits) {
    let directory = directory();
    let mut server = serve(directory.path(), "tcp://127.0.0.1:0");
    let listen = server.listen_url();
    let session = Session::connect(&server.url(), &Options::default()).expect("a session");
    let mut model = Model::new(&session, waits);
    for round in 0..RESTARTS {
        std::thread::scope(|scope| {
            let (server, listen, path) = (&mut server, &listen, directory.path());
            let restart = scope.spawn(move || {
                server.signal(Signal::TERM);
                assert!(server.wait().success());
                *server = serve(path, listen);
            });
            let mut byte = 0;
            while !restart.is_finished() || byte == 0 {
                byte = byte % 100 + 1;
                model.write_all(byte + round as u8, || {});
            }
        });
        model.fsync();
        model.check(directory.path());
    }
    let stats = model.context.stats();
    assert_eq!((stats.unknown, stats.failed, stats.lost), (0, 0, 0));
    assert!(stats.reconnects as usize >= RESTARTS);
}

#[test]
fn idle_clients_do_not_delay_the_end_of_a_server_and_read_its_goaway_later() {
    let directory = directory();
    let mut server = serve(directory.path(), "tcp://127.0.0.1:0");
    let listen = server.listen_url();
    let options = Options { reconnect: Duration::ZERO, ..Options::default() };
    // Neither looks at its connections meanwhile.
    let session = Session::connect(&server.url(), &options).expect("a session");
    let mut model = Model::new(&session, Waits::InCalls);
    model.write_all(1, || {});
    let resumed = Session::connect(&server.url(), &Options::default()).expect("a session");
    let mut resumed = Model::new(&resumed, Waits::InCalls);
    resumed.write_all(1, || {});

    let begin = Instant::now();
    server.signal(Signal::TERM);
    assert!(server.wait().success());
    let took = begin.elapsed();
    assert!(took < Duration::from_millis(700), "it took {took:?}");

    let error = loop {
        match model.context.submit(&model.file, write(0, 2), 0) {
            Err(rejected) => break rejected.error,
            Ok(_) => match model.context.wait(1, 1, Some(PATIENCE)) {
                Err(error) => break error,
                Ok(_) => {
                    let completion = model.context.next().expect("it is over");
                    let error = completion.result.expect_err("there is no server");
                    assert!(!error.is_unknown, "the server has said that it does nothing more: {error:?}");
                }
            },
        }
    };
    assert!(error.text.contains("The server is shutting down"), "{error}");
    let _server = serve(directory.path(), &listen);
    resumed.write_all(2, || {});
    assert_eq!(resumed.unknown, 0);
    resumed.check(directory.path());
}

#[test]
fn an_idle_channel_that_breaks_long_after_its_last_loss_has_a_window_of_its_own() {
    let directory = directory();
    let server = serve(directory.path(), "tcp://127.0.0.1:0");
    let proxy = Proxy::start(server.address());
    let window = Duration::from_millis(300);
    let options = Options { reconnect: window, ..Options::default() };
    let session = Session::connect(&proxy.url(), &options).expect("a session");
    let mut model = Model::new(&session, Waits::InCalls);
    for round in 1..4 {
        proxy.end_all(Ending::Reset);
        let deadline = Instant::now() + PATIENCE;
        while model.context.stats().reconnects < round {
            assert!(Instant::now() < deadline, "it does not notice");
            model.context.wait(0, 1, Some(Duration::from_millis(1))).expect("it goes on");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(window * 2);
    }
    model.write_all(1, || {});
    model.check(directory.path());
}

#[test]
fn a_client_whose_address_changes_goes_on() {
    let Some(cable) = Cable::new("a client whose address changes") else { return };
    let directory = directory();
    let command = cable.command(End::A, binary("raio_server"));
    let listen = format!("tcp://{}:0", cable.address(End::A));
    let mut server = serve_by(command, directory.path(), &[&listen]);
    let options = Options { request_timeout: Some(Duration::from_millis(300)), ..Options::default() };
    cable.on(End::B, || {
        let session = Session::connect(&server.url(), &options).expect("a session");
        let mut model = Model::new(&session, Waits::InCalls);
        model.write_all(1, || {});
        cable.renumber();
        model.write_all(2, || {});
        assert_eq!(model.file.status().expect("the status").size.get(), BLOCKS * BLOCK as u64);
        model.check(directory.path());
        let stats = model.context.stats();
        assert_eq!((model.unknown, stats.unknown, stats.failed, stats.reconnects), (0, 0, 0, 1));
    });
    assert!(server.statistics()["channels"]["resumed"].as_u64() >= Some(2), "the context and the session");
}

/// For connections by emulated devices.
fn over_rdma() -> Options {
    Options { request_timeout: Some(Duration::from_secs(1)), ..Options::default() }
}

#[test]
fn over_rdma_no_operation_is_unknown_however_often_the_wire_is_cut() {
    let Some(_wire) = needs_wire("resuming over RDMA") else { return };
    let directory = directory();
    let server = serve(directory.path(), LISTEN);
    let session = Session::connect(&server.url(), &over_rdma()).expect("a session");
    for waits in WAITS {
        let mut model = Model::new(&session, waits);
        for round in 0..3 {
            std::thread::scope(|scope| {
                let cut = scope.spawn(|| {
                    let _cut = Silenced::new();
                    std::thread::sleep(Duration::from_secs(2));
                });
                let mut byte = 0;
                while !cut.is_finished() || byte == 0 {
                    byte = byte % 100 + 1;
                    model.write_all(byte + round, || {});
                }
            });
            model.check(directory.path());
        }
        model.fsync();
        let stats = model.context.stats();
        eprintln!("{waits:?}: {stats:?}");
        assert_eq!((model.unknown, stats.unknown, stats.failed, stats.lost), (0, 0, 0, 0));
        assert!(stats.reconnects > 0, "{stats:?}");
    }
}

#[test]
fn where_rdma_does_not_come_back_a_session_goes_on_over_tcp() {
    let Some(_wire) = needs_wire("a wire without RDMA") else { return };
    let directory = directory();
    let server = serve_at(directory.path(), &[LISTEN, "tcp://10.77.0.1:0"]);
    let url = server.urls()[1].replace("raio+tcp", "raio");
    let session = Session::connect(&url, &over_rdma()).expect("a session");
    assert_eq!(session.why_tcp(), None);
    let mut model = Model::new(&session, Waits::InCalls);
    model.write_all(1, || {});
    let without = Silenced::without_rdma();
    for byte in 2..5 {
        model.write_all(byte, || {});
        model.check(directory.path());
    }
    model.fsync();
    drop(without);
    model.write_all(5, || {});
    model.check(directory.path());
    let stats = model.context.stats();
    eprintln!("{stats:?}");
    assert_eq!((model.unknown, stats.unknown, stats.failed, stats.lost), (0, 0, 0, 0));
    assert!(stats.reconnects > 0, "{stats:?}");
}

#[test]
fn a_bit_that_flips_in_data_costs_one_request_more_and_no_connection() {
    const LENGTH: usize = 64 << 10;
    // All messages have checksums, or single operations.
    for (direction, crc) in
        [Direction::Up, Direction::Down].into_iter().flat_map(|one| [(one, Crc::On), (one, Crc::Off)])
    {
        let directory = directory();
        let mut server = serve(directory.path(), "tcp://127.0.0.1:0");
        let proxy = Proxy::start(server.address());
        let flip = Some((direction, 8 * LENGTH as u64 / 2));
        // The session's own connection is the first.
        proxy.plan([Treatment::default(), Treatment { flip, ..Treatment::default() }]);
        let session = Session::connect(&proxy.url(), &Options { crc, ..Options::default() });
        let session = session.expect("a session");
        let file = session.open("/d/file", libc::O_RDWR | libc::O_CREAT, 0o644).expect("a file");
        let mut context = session.context(4).expect("a context");
        let crc = match crc {
            Crc::Off => OperationCrc::Computed,
            _ => OperationCrc::AsSession,
        };
        let mut call = |operation| {
            let options = SubmitOptions { crc, ..SubmitOptions::default() };
            context.submit_with(&file, operation, options, 0).expect("there is room");
            assert_eq!(context.wait(1, 1, Some(PATIENCE)), Ok(1));
            let completion = context.next().expect("it is there");
            assert_eq!(completion.result, Ok(LENGTH as u64));
            completion.buffers.expect("its buffers").pieces()[0].bytes().to_vec()
        };
        let one = |bytes: Vec<u8>| Buffers::One(Buffer::Owned(bytes.into()));
        let bytes: Vec<u8> = (0..LENGTH).map(|n| (n / 7) as u8).collect();
        call(Operation::Write { offset: 0, buffers: one(bytes.clone()) });
        assert!(std::fs::read(directory.path().join("files/file")).expect("the file") == bytes);
        assert!(call(Operation::Read { offset: 0, buffers: one(vec![0; LENGTH]) }) == bytes);
        let stats = context.stats();
        assert_eq!(
            (stats.checksum_errors, stats.reconnects, stats.failed),
            (1, 0, 0),
            "{direction:?} {crc:?}"
        );
        assert_eq!(server.statistics()["checksum_errors"], u64::from(direction == Direction::Up));
    }
}

#[test]
fn sessions_have_checksums_by_default_where_there_is_a_network() {
    let Some(cable) = Cable::new("a session with another host") else { return };
    let directory = directory();
    let listen = format!("tcp://{}:0", cable.address(End::A));
    let server = serve_by(cable.command(End::A, binary("raio_server")), directory.path(), &[&listen]);
    let has_crc = |crc| {
        let options = Options { crc, ..Options::default() };
        let session = Session::connect(&server.url(), &options).expect("a session");
        session.context(1).expect("a context").stats().has_crc
    };
    for (end, expected) in [(End::A, [false, true, false]), (End::B, [true, true, false])] {
        assert_eq!(cable.on(end, || [Crc::Auto, Crc::On, Crc::Off].map(has_crc)), expected, "{end:?}");
    }
}
