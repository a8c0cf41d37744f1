//! What hangs on one export is that export's: no other waits for it. The servers' workers carry a filter that
//! ends the server if one of them makes a system call that may wait for a disk (`RAIO_TEST_WORKER_FILTER`).

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Completion, Context, File, Operation, Options, Session, SubmitOptions};
use raio_e2e::{
    FuseCall, FuseFs, FuseOptions, LoopDevice, Mounted, PATIENCE, Raw, Server, is_at_rest, needs_root,
    raw_request,
};
use raio_transport::protocol::{Command, OPEN_READ, OPEN_WRITE};
use serde_json::Value;

const BACKENDS: [&str; 2] = ["uring", "threads"];
const BLOCK: usize = 4096;

fn block() -> Buffers {
    Buffers::One(Buffer::Owned(vec![7; BLOCK].into()))
}

/// A client with one open file.
struct Client {
    session: Session,
    file: File,
    context: Context,
}

impl Client {
    fn new(server: &Server, path: &str) -> Self {
        Self::with(server, path, &Options::default())
    }

    fn with(server: &Server, path: &str, options: &Options) -> Self {
        let session = Session::connect(&server.url(), options).expect("a session");
        let file = session.open(path, libc::O_RDWR, 0).expect("a file");
        let context = session.context(128).expect("a context");
        Self { session, file, context }
    }

    fn submit(&mut self, operation: Operation, token: u64) -> raio::Ticket {
        let ticket = self.context.submit(&self.file, operation, token).expect("there is room");
        self.context.flush();
        ticket
    }

    fn next(&mut self) -> Completion {
        self.context.wait(1, 1, Some(PATIENCE)).expect("the server lives");
        self.context.next().expect("it ends in time")
    }

    fn run(&mut self, operation: Operation) {
        self.submit(operation, 0);
        self.next().result.expect("success");
    }

    /// So many operations end with success.
    fn collect(&mut self, count: usize) {
        for _ in 0..count {
            self.next().result.expect("success");
        }
    }

    /// The median time of a write, a read and an open.
    fn latency(&mut self) -> Duration {
        let mut times: Vec<_> = (0..101u64)
            .map(|at| {
                let begin = Instant::now();
                self.run(Operation::Write { offset: at * BLOCK as u64, buffers: block() });
                self.run(Operation::Read { offset: at * BLOCK as u64, buffers: block() });
                drop(self.session.open("/well/file", libc::O_RDONLY, 0).expect("a file"));
                begin.elapsed()
            })
            .collect();
        times.sort_unstable();
        times[times.len() / 2]
    }
}

/// Where a healthy file system is.
fn healthy() -> tempfile::TempDir {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    std::fs::write(directory.path().join("file"), vec![1; 1 << 20]).expect("a file");
    directory
}

/// A file system of its own, with the same file, that can be frozen.
fn freezable() -> Mounted {
    let mounted = LoopDevice::new(64 << 20).mount("ext4");
    std::fs::write(mounted.path().join("file"), vec![1; 1 << 20]).expect("a file");
    mounted
}

fn server(backend: &str, workers: &str, exports: &[(&str, &Path)]) -> Server {
    server_with(backend, workers, exports, &[])
}

fn server_with(backend: &str, workers: &str, exports: &[(&str, &Path)], more: &[&str]) -> Server {
    let exports: Vec<_> =
        exports.iter().map(|(name, path)| format!("{name}={},rw", path.display())).collect();
    let exports: Vec<_> = exports.iter().map(String::as_str).collect();
    Server::start_with(&exports, &[&["--backend", backend, "--workers", workers], more].concat())
}

/// A file system on a disk of this size, and the file system that stands for that disk. Where that is
/// impossible, says that `what` is skipped.
fn on_a_disk(what: &str, file_system: &str, bytes: u64) -> Option<(FuseFs, Mounted)> {
    if !needs_root(what) {
        return None;
    }
    // No page cache: every read of the disk is one of the file system that stands for it.
    let options = FuseOptions { async_read: true, direct_io: true };
    let disk = FuseFs::mount(what, options, &[("image", b"")])?;
    let image = std::fs::File::options().write(true).open(disk.file("image")).expect("a file");
    image.set_len(bytes).expect("room");
    let mounted = LoopDevice::over(&disk.file("image")).mount(file_system);
    Some((disk, mounted))
}

/// Calls of a disk that hang until this is dropped, also by a test that fails: a server that waits for a disk
/// cannot be ended.
struct Hanging<'disk>(&'disk FuseFs, FuseCall);

impl<'disk> Hanging<'disk> {
    fn new(disk: &'disk FuseFs, call: FuseCall) -> Self {
        disk.hang(call);
        Self(disk, call)
    }
}

impl Drop for Hanging<'_> {
    fn drop(&mut self) {
        self.0.mend(self.1);
    }
}

/// No worker waits, and others keep their latency within a factor of two; here of twenty, for the machine may
/// be busy.
fn assert_unharmed(server: &Server, well: &mut Client, before: Duration, what: &str) {
    assert_eq!(server.blocked_workers(), [""; 0], "{what}");
    let now = well.latency();
    assert!(now < before.max(Duration::from_millis(1)) * 20, "{what}: {before:?} became {now:?}");
}

#[test]
fn a_frozen_file_system_holds_up_its_own_writes_and_no_other_export() {
    if !needs_root("freezing a file system") {
        return;
    }
    for backend in BACKENDS {
        let (mounted, directory) = (freezable(), healthy());
        let server = server(backend, "1", &[("well", directory.path()), ("stuck", mounted.path())]);
        let (mut well, mut stuck) = (Client::new(&server, "/well/file"), Client::new(&server, "/stuck/file"));
        let before = well.latency();
        let frozen = mounted.freeze();
        stuck.submit(Operation::Write { offset: 0, buffers: block() }, 0);
        assert_unharmed(&server, &mut well, before, "one write");
        for at in 1..64 {
            stuck.submit(Operation::Write { offset: at * BLOCK as u64, buffers: block() }, at);
        }
        let mut opens = Opens::new(&server, "/stuck/file");
        opens.send(64, "/stuck/file", OPEN_WRITE);
        assert_unharmed(&server, &mut well, before, "64 writes and opens");
        assert_eq!(stuck.context.wait(1, 1, Some(Duration::ZERO)).expect("it lives"), 0, "a write has ended");
        drop(frozen);
        stuck.collect(64);
        opens.collect(64);
        let file = std::fs::File::open(mounted.path().join("file")).expect("a file");
        let mut bytes = vec![0; 64 * BLOCK];
        file.read_exact_at(&mut bytes, 0).expect("its content");
        assert!(bytes.iter().all(|&byte| byte == 7), "{backend}: what was written late is not there");
    }
}

#[test]
fn a_cancel_of_what_hangs_ends_in_time_and_the_context_goes_on_behind_it() {
    const TIMEOUT: Duration = Duration::from_millis(300);
    if !needs_root("freezing a file system") {
        return;
    }
    for backend in BACKENDS {
        let (mounted, directory) = (freezable(), healthy());
        let mut server = server(backend, "2", &[("well", directory.path()), ("stuck", mounted.path())]);
        let mut well = Client::new(&server, "/well/file");
        let before = well.latency();
        let options = Options { request_timeout: Some(TIMEOUT), ..Options::default() };
        let mut stuck = Client::with(&server, "/stuck/file", &options);
        stuck.run(Operation::Write { offset: 0, buffers: block() });

        let frozen = mounted.freeze();
        let write = |at: u64| Operation::Write { offset: at * BLOCK as u64, buffers: block() };
        let tickets: Vec<_> = (1..9).map(|at| stuck.submit(write(at), at)).collect();
        server.statistics_when(|now| now["in_flight"]["executing"] == 8);
        // What only waits for its turn can be cancelled.
        server.wait_for_blocked_thread();
        let begin = Instant::now();
        let error = stuck.context.cancel(tickets[0]).expect_err("the server cannot stop it");
        let took = begin.elapsed();
        assert_eq!(error.errno(), libc::EAGAIN, "{backend}: {error}");
        assert!(took >= TIMEOUT && took < PATIENCE, "{backend}: it took {took:?}");
        // The next connection is there, and waits for what the one before has left.
        stuck.submit(write(9), 9);
        let begin = Instant::now();
        while server.statistics()["channels"]["resumed"] == 0 {
            assert!(begin.elapsed() < PATIENCE, "{backend}: it does not connect again");
            stuck.context.wait(0, 1, Some(Duration::ZERO)).expect("it goes on");
        }
        // A server that answers pings is not given up, however long it takes.
        let waited = stuck.context.wait(1, 1, Some(2 * TIMEOUT)).expect("it goes on");
        assert_eq!((waited, stuck.context.stats().reconnects), (0, 0), "{backend}: nothing can have ended");
        assert_eq!(server.statistics()["channels"]["resumed"], 1, "{backend}");
        assert_unharmed(&server, &mut well, before, "a cancel");

        drop(frozen);
        let mut ended: Vec<_> = (1..10)
            .map(|_| {
                let completion = stuck.next();
                assert_eq!(completion.result, Ok(BLOCK as u64), "{backend}");
                completion.token
            })
            .collect();
        ended.sort_unstable();
        assert_eq!(ended, Vec::from_iter(1..10), "{backend}: each ends once");
        let stats = stuck.context.stats();
        assert_eq!((stats.reconnects, stats.unknown, stats.in_flight), (1, 0, 0), "{backend}");
        stuck.run(Operation::Fsync { data_only: false });
        let content = std::fs::read(mounted.path().join("file")).expect("the file");
        assert!(content[..10 * BLOCK].iter().all(|&byte| byte == 7), "{backend}: a write is missing");
        assert_eq!(
            server.statistics()["exports"]["stuck"]["written_bytes"],
            10 * BLOCK,
            "{backend}: more than once"
        );
        drop((well, stuck));
        server.statistics_when(is_at_rest);
    }
}

#[test]
fn a_frozen_file_system_leaves_memory_for_other_exports_whoever_writes_there() {
    /// For data: half of `--memory`.
    const MEMORY_BYTES: u64 = 16 << 20;
    const CLIENTS: u64 = 40;
    const WRITES: u64 = 8;
    const WRITE_BYTES: u64 = 64 << 10;
    if !needs_root("freezing a file system") {
        return;
    }
    for backend in BACKENDS {
        let mounted = LoopDevice::new(64 << 20).mount("ext4");
        std::fs::write(mounted.path().join("file"), vec![1; 4 << 20]).expect("a file");
        let directory = healthy();
        let memory = (2 * MEMORY_BYTES).to_string();
        let exports = [("well", directory.path()), ("stuck", mounted.path())];
        let mut server = server_with(backend, "1", &exports, &["--memory", &memory]);
        let mut well = Client::new(&server, "/well/file");
        let mut writers: Vec<_> = (0..CLIENTS)
            .map(|_| Raw::open(&server.url(), "/stuck/file", OPEN_WRITE).expect("a client"))
            .collect();
        let frozen = mounted.freeze();
        // More than all memory, a little for each. Half of the clients do not wait for the end.
        for raw in &mut writers {
            raw.stream.set_write_timeout(Some(PATIENCE)).expect("a socket");
            for id in 1..=WRITES {
                raw.send_write_header(id, id * WRITE_BYTES, WRITE_BYTES as u32).expect("room");
                std::io::Write::write_all(&mut raw.stream, &[7; WRITE_BYTES as usize]).expect("room");
            }
        }
        let has_filled =
            |now: &Value| now["in_flight"]["need_slot"] != 0 && now["in_flight"]["fetching"] == 0;
        server.statistics_when(has_filled);
        writers.drain(..CLIENTS as usize / 2);
        let statistics =
            server.statistics_when(|now| has_filled(now) && now["connections"] == CLIENTS / 2 + 2);
        let held = statistics["slot_bytes"].as_u64().expect("a number");
        assert!(held <= MEMORY_BYTES / 2, "{backend}: {statistics}");
        for _ in 0..4 {
            let all = || Buffers::One(Buffer::Owned(vec![7; 1 << 20].into()));
            well.run(Operation::Write { offset: 0, buffers: all() });
            well.run(Operation::Read { offset: 0, buffers: all() });
        }
        drop(frozen);
        for raw in &mut writers {
            raw.stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            for _ in 0..WRITES {
                assert!(raw.response().expect("an answer").0.status.is_ok());
            }
        }
        drop((well, writers));
        server.statistics_when(is_at_rest);
    }
}

#[test]
fn a_file_system_that_hangs_holds_up_its_own_requests_and_no_other_export() {
    // Without ASYNC_READ, and without a page cache: there io_uring reads inline.
    let options = [
        FuseOptions { async_read: false, direct_io: false },
        FuseOptions { async_read: true, direct_io: true },
    ];
    for (backend, options) in
        BACKENDS.into_iter().flat_map(|backend| options.map(|options| (backend, options)))
    {
        let content = vec![1; 1 << 20];
        let Some(fuse) = FuseFs::mount("a file system that hangs", options, &[("file", &content)]) else {
            return;
        };
        let directory = healthy();
        let mut server = server(backend, "1", &[("well", directory.path()), ("stuck", fuse.path())]);
        let (mut well, mut stuck) = (Client::new(&server, "/well/file"), Client::new(&server, "/stuck/file"));
        let mut opens = Opens::new(&server, "/stuck/file");
        let before = well.latency();

        fuse.hang(FuseCall::Read);
        stuck.submit(Operation::Read { offset: 0, buffers: block() }, 0);
        fuse.wait_for_hanging(FuseCall::Read, 1);
        assert_unharmed(&server, &mut well, before, "one read");

        fuse.hang(FuseCall::Fsync);
        let tickets: Vec<_> =
            (0..64).map(|_| stuck.submit(Operation::Fsync { data_only: false }, 1)).collect();
        // The kernel lets through one for a file at a time.
        fuse.wait_for_hanging(FuseCall::Fsync, 1);
        assert_unharmed(&server, &mut well, before, "64 fsyncs");
        // Those fsyncs do not stop its other operations.
        stuck.file.status().expect("its status");
        let cancelled =
            stuck.context.cancel(tickets[63]).expect("one that waits for its turn can be cancelled");
        assert_eq!(cancelled.result.expect_err("it did nothing").errno(), libc::ECANCELED);

        fuse.hang(FuseCall::Open);
        opens.send(64, "/stuck/file", OPEN_READ);
        fuse.wait_for_hanging(FuseCall::Open, 1);
        assert_unharmed(&server, &mut well, before, "64 opens");

        for call in [FuseCall::Open, FuseCall::Read, FuseCall::Fsync] {
            fuse.mend(call);
        }
        opens.collect(64);
        stuck.collect(64);
        drop(opens);

        fuse.hang(FuseCall::Flush);
        drop(stuck);
        fuse.wait_for_hanging(FuseCall::Flush, 1);
        assert_unharmed(&server, &mut well, before, "a close");
        // Its session has ended, and its descriptor counts until close(2) has returned.
        let statistics = server.statistics_when(|now| now["sessions"] == 1);
        assert!(statistics["open_files"].as_u64() > Some(1), "{backend}: {statistics}");
        fuse.mend(FuseCall::Flush);
        drop(well);
        server.statistics_when(is_at_rest);
    }
}

#[test]
fn operations_on_a_disk_that_hangs_end_with_their_timeouts_and_their_context_goes_on() {
    const TIMEOUT: Duration = Duration::from_millis(100);
    for backend in BACKENDS {
        let options = FuseOptions { async_read: true, direct_io: true };
        let content = vec![1; 1 << 20];
        let Some(fuse) = FuseFs::mount("timeouts on a disk that hangs", options, &[("file", &content)])
        else {
            return;
        };
        let directory = healthy();
        let mut server = server(backend, "1", &[("well", directory.path()), ("stuck", fuse.path())]);
        let mut stuck = Client::new(&server, "/stuck/file");
        let well = stuck.session.open("/well/file", libc::O_RDWR, 0).expect("a file");
        let options = SubmitOptions { timeout: Some(TIMEOUT), ..SubmitOptions::default() };
        let data = |byte, len| Buffers::One(Buffer::Owned(vec![byte; len].into()));

        let hanging = [FuseCall::Read, FuseCall::Write].map(|call| Hanging::new(&fuse, call));
        // One at a time, and one in parts.
        for (at, len) in [BLOCK, 3 << 20].into_iter().enumerate() {
            let begin = Instant::now();
            let offset = (at << 16) as u64;
            let operations = [
                Operation::Read { offset, buffers: data(7, len) },
                Operation::Write { offset, buffers: data(8, len) },
            ];
            for (token, operation) in operations.into_iter().enumerate() {
                stuck.context.submit_with(&stuck.file, operation, options, token as u64).expect("room");
            }
            stuck.context.flush();
            for _ in 0..2 {
                let completion = stuck.next();
                let error = completion.result.expect_err("the disk hangs");
                assert_eq!(error.errno(), libc::ETIMEDOUT, "{backend}: {error}");
                // It may be that the write still waits behind the read.
                assert!(completion.token == 1 || !error.is_unknown, "{backend}: {error}");
                let buffers = completion.buffers.expect("they come back");
                let expected = 7 + completion.token as u8;
                assert!(buffers.slices(0..len).all(|piece| piece.iter().all(|&byte| byte == expected)));
            }
            let elapsed = begin.elapsed();
            assert!((TIMEOUT..PATIENCE / 2).contains(&elapsed), "{backend}: {elapsed:?}");
            let read = Operation::Read { offset: 0, buffers: block() };
            stuck.context.submit_with(&well, read, options, 9).expect("room");
            assert_eq!(stuck.next().result, Ok(BLOCK as u64), "{backend}");
        }
        drop(hanging);
        stuck.run(Operation::Write { offset: 0, buffers: data(9, BLOCK) });
        // A context that ends before it hears what became of a write leaves its session behind. The answer to
        // the read comes after all others.
        server.statistics_when(|now| now["in_flight"]["executing"] == 0);
        stuck.submit(Operation::Read { offset: 0, buffers: block() }, 0);
        let read = stuck.next();
        assert_eq!(read.result, Ok(BLOCK as u64));
        drop((well, stuck));
        server.statistics_when(is_at_rest);
    }
}

#[test]
fn a_write_that_holds_the_lock_of_an_xfs_file_holds_up_its_reads_and_no_other_export() {
    for backend in BACKENDS {
        // The smallest that mkfs.xfs makes.
        let Some((disk, mounted)) = on_a_disk("XFS on a disk that hangs", "xfs", 300 << 20) else { return };
        std::fs::write(mounted.path().join("file"), vec![1; 1 << 20]).expect("a file");
        let mounted = mounted.remount();
        let directory = healthy();
        let server = server(backend, "1", &[("well", directory.path()), ("stuck", mounted.path())]);
        let (mut well, mut stuck) = (Client::new(&server, "/well/file"), Client::new(&server, "/stuck/file"));
        let before = well.latency();

        let hanging = Hanging::new(&disk, FuseCall::Read);
        // A part of a block, so that the rest of it must be read.
        let part = Buffers::One(Buffer::Owned(vec![7; 16].into()));
        stuck.submit(Operation::Write { offset: 0, buffers: part }, 0);
        disk.wait_for_hanging(FuseCall::Read, 1);
        for at in 1..=16 {
            stuck.submit(Operation::Read { offset: at << 15, buffers: block() }, at);
        }
        assert_unharmed(&server, &mut well, before, backend);
        drop(hanging);
        stuck.collect(17);
    }
}

#[test]
fn requests_that_are_cancelled_while_they_wait_leave_nothing_behind() {
    for backend in BACKENDS {
        let Some(fuse) = FuseFs::mount("a file system that hangs", FuseOptions::default(), &[("file", b"x")])
        else {
            return;
        };
        let server = server(backend, "1", &[("stuck", fuse.path())]);
        let mut stuck = Client::new(&server, "/stuck/file");
        let fsync = || Operation::Fsync { data_only: false };
        fuse.hang(FuseCall::Fsync);
        for _ in 0..9 {
            stuck.submit(fsync(), 0);
        }
        fuse.wait_for_hanging(FuseCall::Fsync, 1);
        let mut cancel = |count| {
            for _ in 0..count {
                let ticket = stuck.submit(fsync(), 1);
                let cancelled = stuck.context.cancel(ticket).expect("it waits for its turn");
                assert_eq!(cancelled.result.expect_err("it did nothing").errno(), libc::ECANCELED);
            }
        };
        cancel(100);
        let before = server.taken_bytes();
        cancel(10_000);
        let more = server.taken_bytes().saturating_sub(before);
        assert!(more < 512 << 10, "{backend}: {more} bytes more");
        fuse.mend(FuseCall::Fsync);
        stuck.collect(9);
    }
}

/// A connection of its own, on which many opens are sent at once.
struct Opens {
    raw: Raw,
    next: u64,
}

impl Opens {
    fn new(server: &Server, path: &str) -> Self {
        Self { raw: Raw::open(&server.url(), path, OPEN_READ).expect("a file"), next: 1 }
    }

    fn send(&mut self, count: u64, path: &str, flags: u32) {
        for id in self.next..self.next + count {
            let command = Command::Open { flags, mode: 0, path: path.as_bytes() };
            std::io::Write::write_all(&mut self.raw.stream, &raw_request(id, &command, 0))
                .expect("it is sent");
        }
        self.next += count;
    }

    fn collect(&mut self, count: usize) {
        self.raw.stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        for _ in 0..count {
            let (response, _) = self.raw.response().expect("an answer");
            assert!(response.status.is_ok(), "{:?}", response.status);
        }
    }
}

#[test]
fn closing_an_unlinked_gigabyte_in_memory_stalls_nobody() {
    for backend in BACKENDS {
        let memory = match tempfile::tempdir_in("/dev/shm") {
            Ok(memory) => memory,
            Err(error) => return eprintln!("SKIPPED: no tmpfs at /dev/shm: {error}"),
        };
        let path = memory.path().join("file");
        let file = std::fs::File::create(&path).expect("a file");
        if let Err(error) = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 1 << 30) {
            return eprintln!("SKIPPED: no gigabyte of memory at /dev/shm: {error}");
        }
        drop(file);
        let directory = healthy();
        let server = server(backend, "1", &[("well", directory.path()), ("shm", memory.path())]);
        let (mut well, big) = (Client::new(&server, "/well/file"), Client::new(&server, "/shm/file"));
        std::fs::remove_file(path).expect("it is there");
        let (sender, closed) = channel();
        let mut meanwhile = 0;
        std::thread::scope(|scope| {
            let file = &big.file;
            scope.spawn(move || sender.send(file.close()));
            while closed.try_recv().map(|result| result.expect("closed")).is_err() {
                well.run(Operation::Read { offset: 0, buffers: block() });
                meanwhile += 1;
            }
        });
        assert!(meanwhile >= 5, "{backend}: {meanwhile} reads in the time of a close");
    }
}

#[test]
fn a_close_reports_what_the_file_system_says_whichever_worker_used_the_file_last() {
    for backend in BACKENDS {
        let Some(fuse) = FuseFs::mount("errors of close", FuseOptions::default(), &[("file", b"content")])
        else {
            return;
        };
        let server = server(backend, "2", &[("fuse", fuse.path())]);
        for (round, errno) in [libc::EDQUOT, libc::EIO, 0].into_iter().cycle().take(12).enumerate() {
            let mut client = Client::new(&server, "/fuse/file");
            // Contexts take turns on the workers, so both use the file.
            let mut contexts: Vec<_> =
                (0..3).map(|_| client.session.context(1).expect("a context")).collect();
            for context in &mut contexts {
                let write = Operation::Write { offset: 0, buffers: block() };
                context.submit(&client.file, write, 0).expect("there is room");
                context.wait(1, 1, Some(PATIENCE)).expect("the server lives");
                context.next().expect("it ends").result.expect("success");
            }
            client.run(Operation::Fsync { data_only: true });
            if errno == 0 {
                fuse.mend(FuseCall::Flush)
            } else {
                fuse.fail(FuseCall::Flush, errno)
            }
            let result = client.file.close().map_err(|error| error.errno());
            assert_eq!(result, if errno == 0 { Ok(()) } else { Err(errno) }, "{backend}, round {round}");
        }
    }
}

/// A block each, with a hole behind it: more extents than one block of ext4's extent tree has room for.
const EXTENTS: u64 = 2000;

#[test]
fn a_disk_that_hangs_holds_up_its_own_requests_and_no_other_export() {
    for backend in BACKENDS {
        let Some((disk, mounted)) = on_a_disk("a disk that hangs", "ext4", 64 << 20) else { return };
        let path = mounted.path().join("file");
        let file = std::fs::File::create(&path).expect("a file");
        for at in 0..EXTENTS {
            file.write_all_at(&[3; BLOCK], at * 2 * BLOCK as u64).expect("written");
        }
        file.sync_all().expect("on the disk");
        drop(file);
        let mounted = mounted.remount();
        let directory = healthy();
        let server = server(backend, "1", &[("well", directory.path()), ("stuck", mounted.path())]);
        let (mut well, mut stuck) = (Client::new(&server, "/well/file"), Client::new(&server, "/stuck/file"));
        let before = well.latency();

        let hanging = Hanging::new(&disk, FuseCall::Read);
        let mut others: Vec<_> = (0..3).map(|_| Client::new(&server, "/stuck/file")).collect();
        let mut at = 0;
        // More than the disk takes (`nr_requests` of a loop device is 128), and each extent is a request.
        for _ in 0..128 {
            for client in others.iter_mut().chain([&mut stuck]) {
                client.submit(Operation::Read { offset: at * 2 * BLOCK as u64, buffers: block() }, at);
                at += 3;
            }
        }
        disk.wait_for_hanging(FuseCall::Read, 1);
        assert_unharmed(&server, &mut well, before, "512 reads");
        drop(hanging);
        for client in others.iter_mut().chain([&mut stuck]) {
            client.collect(128);
        }

        // The journal hangs with the file's inode in it, and a read would change the time of access: that of
        // the last change is later.
        let file = std::fs::File::options().write(true).open(&path).expect("a file");
        file.set_modified(std::time::SystemTime::now()).expect("a change");
        file.sync_all().expect("the journal has begun");
        let hanging = Hanging::new(&disk, FuseCall::Write);
        file.set_modified(std::time::SystemTime::now()).expect("a change");
        stuck.submit(Operation::Fsync { data_only: false }, 0);
        disk.wait_for_hanging(FuseCall::Write, 1);
        assert_unharmed(&server, &mut well, before, "an fsync");
        for at in 0..32 {
            let offset = at * (EXTENTS / 64) * 2 * BLOCK as u64;
            stuck.submit(Operation::Read { offset, buffers: block() }, at);
        }
        assert_unharmed(&server, &mut well, before, "32 reads of what is in memory");
        drop(hanging);
        stuck.collect(33);
    }
}

#[test]
fn names_on_a_file_system_that_hangs_hold_up_no_other_export() {
    for backend in BACKENDS {
        for call in [FuseCall::Lookup, FuseCall::Getattr, FuseCall::Open, FuseCall::Unlink] {
            let Some(fuse) =
                FuseFs::mount("a file system that hangs", FuseOptions::default(), &[("file", b"x")])
            else {
                return;
            };
            let directory = healthy();
            let server = server(backend, "1", &[("stuck", fuse.path()), ("well", directory.path())]);
            let connect = || Session::connect(&server.url(), &Options::default()).expect("a session");
            let (stuck, well) = (connect(), connect());
            // What the worker has learned of one mount is not taken for the other.
            for path in ["/stuck/file", "/well/file", "/stuck/file"] {
                well.metadata(path).expect("it is there");
                well.get(path, 100).expect("it is there");
            }
            fuse.hang(call);
            std::thread::scope(|scope| {
                let thread = scope.spawn(|| match call {
                    FuseCall::Unlink => stuck.remove_file("/stuck/file"),
                    _ => stuck.get("/stuck/file", 100).map(drop),
                });
                fuse.wait_for_hanging(call, 1);
                for n in 0..100 {
                    let name = format!("/well/new{n}");
                    well.put(&name, b"data", &Default::default()).expect("there is room");
                    assert_eq!(well.get(&name, 100).expect("it is there").0, b"data");
                    well.metadata(&name).expect("it is there");
                    well.remove_file(&name).expect("it is there");
                    assert_eq!(well.read_dir("/well").expect("a list").count(), 1);
                }
                assert!(!thread.is_finished());
                fuse.mend(call);
                let ended = thread.join().expect("it ends");
                assert!(ended.is_ok() || call == FuseCall::Unlink, "{backend} {call:?}: {ended:?}");
            });
        }
    }
}
