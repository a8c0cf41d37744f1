//! Small files that the kernel has in memory: see [`crate::cached`].

use raio_transport::protocol::path::PathCommand;
use raio_transport::protocol::{FileStatus, OPEN_WRITE, Opcode};
use rustix::fs::{CWD, FileType, Mode};
use zerocopy::FromBytes;

use super::*;

const CONTENTS: &[u8] = b"a small file";

/// A worker whose pool runs in the test's thread, and a client of it.
struct Pooled {
    bench: Bench,
    pool: &'static Pool<engine::Job>,
}

impl Pooled {
    /// The worker knows the mount of an export with a `small` file, which the pool has opened. Its status is
    /// the second part.
    fn new() -> (Self, FileStatus) {
        let directory = directory_of_blocks();
        std::fs::write(directory.path().join("small"), CONTENTS).unwrap();
        let export = format!("d={},rw", directory.path().display());
        let options = ["raio_server", "--export", &export, "--memory", "128M"];
        let config = Options::parse_from(options).check(1).expect("the options make sense");
        let pool = Pool::without_threads();
        let exports = Exports::open(&config.exports, pool).expect("it can be exported");
        let mut worker = worker_of(exports, &config);
        let client = connect(&mut worker);
        let bench = Bench { worker, client, file: FileHandle(0), next_block: 0, _directory: Some(directory) };
        let mut pooled = Self { bench, pool };
        let (opened, jobs) = pooled.ask(&open_of("/d/small", OPEN_READ));
        assert_eq!(jobs, 1, "the pool knows more of a mount than the worker");
        (pooled, status_of(&opened))
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.bench._directory.as_ref().expect("files").path().join(name)
    }

    /// The reply to a command, and how many jobs the pool has had of it.
    fn ask(&mut self, command: &Command<'_>) -> (Reply, usize) {
        self.bench.send(7, command);
        let (mut replies, mut jobs) = (Vec::new(), 0);
        while replies.is_empty() {
            run_once(&mut self.bench.worker);
            self.bench.client.receive(&mut replies);
            if replies.is_empty() {
                jobs += usize::from(self.pool.run_one(0));
            }
        }
        (replies.pop().expect("one"), jobs)
    }

    fn open(&mut self, path: &str) -> FileHandle {
        let (opened, _) = self.ask(&open_of(path, OPEN_READ));
        assert_eq!(opened.status, Status::OK);
        FileHandle(opened.result as u32)
    }
}

fn open_of(path: &str, flags: u32) -> Command<'_> {
    Command::Open { flags, mode: 0, path: path.as_bytes() }
}

fn status_of(reply: &Reply) -> FileStatus {
    assert_eq!(reply.status, Status::OK);
    FileStatus::read_from_prefix(&reply.body).expect("a status").0
}

#[test]
fn small_files_are_opened_read_and_closed_without_the_pool() {
    let (mut pooled, by_the_pool) = Pooled::new();
    let (opened, jobs) = pooled.ask(&open_of("/d/small", OPEN_READ));
    let status = status_of(&opened);
    assert_eq!(jobs, 0);
    assert_ne!(status.identity, [0; 16]);
    assert_eq!(
        (status.identity, status.verifier, status.size, status.inode, status.modified_ns),
        (
            by_the_pool.identity,
            by_the_pool.verifier,
            by_the_pool.size,
            by_the_pool.inode,
            by_the_pool.modified_ns
        )
    );
    let file = FileHandle(opened.result as u32);
    let buffer = Buffers::One(Buffer::Owned(vec![0; CONTENTS.len()].into()));
    let mut body = Vec::new();
    Command::Read { file, offset: 0, length: CONTENTS.len() as u32 }.encode(&mut body);
    let bench = &mut pooled.bench;
    bench.client.send(8, &body, Bulk::In(buffer), SendOptions::PLAIN).expect("a credit is left");
    bench.client.flush();
    let read = bench.replies(1).pop().expect("one");
    assert!(matches!(&read.bulk, Bulk::In(Buffers::One(Buffer::Owned(bytes))) if **bytes == *CONTENTS));
    let (closed, jobs) = pooled.ask(&Command::Close(file));
    assert_eq!((closed.status, jobs), (Status::OK, 0));
    assert_eq!(pooled.ask(&Command::Stat(file)).0.status.errno, libc::EBADF);
    assert_eq!(pooled.pool.unfinished(), 0);
}

#[test]
fn what_may_wait_is_opened_by_the_pool() {
    let (mut pooled, _) = Pooled::new();
    for (path, flags) in [("/d/small", OPEN_READ | OPEN_WRITE), ("/d/file", OPEN_READ)] {
        let (opened, jobs) = pooled.ask(&open_of(path, flags));
        assert_eq!((opened.status, jobs > 0), (Status::OK, true), "{path}, {flags}");
    }
    for (path, errno) in [("/d/missing", libc::ENOENT), ("/d/small/", libc::ENOTDIR), ("/d/", libc::EISDIR)] {
        assert_eq!(pooled.ask(&open_of(path, OPEN_READ)).0.status.errno, errno, "{path}");
    }
}

#[test]
fn a_file_that_has_lost_its_name_is_closed_by_the_pool() {
    let (mut pooled, _) = Pooled::new();
    let file = pooled.open("/d/small");
    std::fs::remove_file(pooled.path("small")).unwrap();
    let (closed, jobs) = pooled.ask(&Command::Close(file));
    assert_eq!((closed.status, jobs), (Status::OK, 1));
}

#[test]
fn a_file_that_another_request_is_on_is_closed_after_it() {
    let (mut pooled, _) = Pooled::new();
    let file = pooled.open("/d/small");
    pooled.bench.send(8, &Command::Fsync { file, data_only: false });
    pooled.bench.send(9, &Command::Close(file));
    for _ in 0..10 {
        run_once(&mut pooled.bench.worker);
    }
    let mut replies = Vec::new();
    pooled.bench.client.receive(&mut replies);
    assert!(replies.is_empty(), "the fsync has not been carried out");
    assert!(pooled.pool.run_one(0));
    while replies.len() < 2 {
        run_once(&mut pooled.bench.worker);
        pooled.bench.client.receive(&mut replies);
        pooled.pool.run_one(0);
    }
    let ended: Vec<_> = replies.iter().map(|reply| (reply.tag, reply.status.errno)).collect();
    assert_eq!(ended, [(8, 0), (9, 0)]);
}

#[test]
fn no_fifo_gets_a_reader() {
    let (mut pooled, _) = Pooled::new();
    let fifo = pooled.path("fifo");
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let writer = std::thread::spawn({
        let fifo = fifo.clone();
        move || std::fs::OpenOptions::new().write(true).open(fifo).map(drop)
    });
    for _ in 0..20 {
        let (opened, _) = pooled.ask(&open_of("/d/fifo", OPEN_READ));
        assert_eq!(opened.status.errno, libc::ENODEV);
        let get = PathCommand::new(Opcode::Get, b"/d/fifo");
        assert_ne!(pooled.ask(&Command::Path(get)).0.status.errno, 0);
        assert!(!writer.is_finished(), "something has opened the FIFO");
    }
    std::fs::File::open(&fifo).unwrap();
    writer.join().expect("it does not panic").unwrap();
}
