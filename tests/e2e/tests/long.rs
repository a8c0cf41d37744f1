//! Reads and writes that are longer than a request may be, against real servers.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Completion, Context, File, Operation, Options, Scheme, Session};
use raio_e2e::{Ending, PATIENCE, Proxy, Server, binary};
use rustix::process::Signal;

const IO_MAX: usize = 64 << 10;
const LENGTHS: [usize; 5] = [IO_MAX + 1, 1 << 20, (1 << 20) + 4097, (3 << 20) - 1, 16 << 20];

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251 + seed) as u8).collect()
}

fn start(directory: &Path) -> Server {
    Server::start_with(
        &[&format!("d={},rw", directory.display()), "m=mem:1M,rw"],
        &["--io-max", "64K", "--listen", "tcp://127.0.0.1:0"],
    )
}

/// These bytes in pieces of no regular length.
fn pieces(mut bytes: &[u8]) -> Buffers {
    let mut all = Vec::new();
    let mut len = 1;
    while !bytes.is_empty() {
        let (now, later) = bytes.split_at(len.min(bytes.len()));
        all.push(Buffer::Owned(now.into()));
        (bytes, len) = (later, len * 3 % 1_000_003 + 1);
    }
    Buffers::Many(all)
}

fn whole(bytes: Vec<u8>) -> Buffers {
    Buffers::One(Buffer::Owned(bytes.into()))
}

fn bytes(completion: Completion) -> Vec<u8> {
    let buffers = completion.buffers.expect("they come back");
    buffers.slices(0..buffers.len()).flatten().copied().collect()
}

fn run(context: &mut Context, file: &File, operation: Operation) -> Completion {
    context.submit(file, operation, 0).expect("it is taken");
    let deadline = Instant::now() + PATIENCE;
    while context.wait(1, 1, Some(Duration::from_secs(1))).expect("it goes on") == 0 {
        assert!(Instant::now() < deadline);
    }
    context.next().expect("it is there")
}

#[test]
fn what_is_written_in_parts_is_read_in_parts() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = start(directory.path());
    let session = Session::connect(&server.url(), &Options::default()).expect("a session");
    let mut context = session.context(8).expect("a context");
    for (n, length) in LENGTHS.into_iter().enumerate() {
        let path = format!("/d/{n}");
        let file = session.open(&path, libc::O_RDWR | libc::O_CREAT, 0o600).expect("a file");
        let data = pattern(length, n);
        let buffers = if n % 2 == 0 { pieces(&data) } else { whole(data.clone()) };
        let written = run(&mut context, &file, Operation::Write { offset: 3, buffers });
        assert_eq!(written.result, Ok(length as u64));
        let there = std::fs::read(directory.path().join(n.to_string())).expect("the file");
        assert!(there[3..] == data && there.len() == length + 3);
        for vectored in [false, true] {
            let room = vec![0; length];
            let buffers = if vectored { pieces(&room) } else { whole(room) };
            let was_read = run(&mut context, &file, Operation::Read { offset: 3, buffers });
            assert_eq!(was_read.result, Ok(length as u64));
            assert!(bytes(was_read) == data);
        }
    }
}

#[test]
fn the_count_is_exact_at_the_end_of_a_file_and_of_the_storage() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = start(directory.path());
    let session = Session::connect(&server.url(), &Options::default()).expect("a session");
    let mut context = session.context(8).expect("a context");
    let length = 10 * IO_MAX;
    for boundary in [0, 4096, IO_MAX, 5 * IO_MAX, 10 * IO_MAX] {
        for end in boundary.saturating_sub(1)..boundary + 2 {
            let data = pattern(end, boundary);
            std::fs::write(directory.path().join("short"), &data).expect("a file");
            let file = session.open("/d/short", libc::O_RDONLY, 0).expect("it");
            let buffers = whole(vec![0; length]);
            let was_read = run(&mut context, &file, Operation::Read { offset: 0, buffers });
            let count = end.min(length);
            assert_eq!(was_read.result, Ok(count as u64));
            assert!(bytes(was_read)[..count] == data[..count]);
        }
    }
    // The memory ends in the middle of it.
    let file = session.open("/m", libc::O_RDWR, 0).expect("memory");
    for left in [1, 4096, IO_MAX, IO_MAX + 5, 3 * IO_MAX] {
        let data = pattern(length, left);
        let offset = (1 << 20) - left as u64;
        let buffers = whole(data.clone());
        let written = run(&mut context, &file, Operation::Write { offset, buffers });
        // A request that does not fit is rejected as a whole.
        let count = left - left % IO_MAX;
        match written.result {
            Ok(n) => assert!(n == count as u64 && n > 0, "{n} of {left}"),
            Err(error) => assert_eq!((count, error.errno()), (0, libc::ENOSPC)),
        }
        let buffers = whole(vec![0; length]);
        let was_read = run(&mut context, &file, Operation::Read { offset, buffers });
        assert_eq!(was_read.result, Ok(left as u64));
        assert!(bytes(was_read)[..count] == data[..count]);
    }
}

#[test]
fn over_connections_that_are_cut_each_part_is_done_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut server = start(directory.path());
    let proxy = Proxy::start(server.address());
    let session = Session::connect_to(Scheme::Tcp, proxy.address(), &Options::default()).expect("a session");
    let mut context = session.context(8).expect("a context");
    let file = session.open("/d/file", libc::O_RDWR | libc::O_CREAT, 0o600).expect("a file");
    let length = 16 << 20;
    for round in 1..6 {
        let data = pattern(length, round);
        context.submit(&file, Operation::Write { offset: 0, buffers: pieces(&data) }, 0).expect("taken");
        let mut cuts = 0;
        while context.wait(1, 1, Some(Duration::from_millis(3))).expect("it goes on") == 0 {
            if cuts < 3 {
                proxy.end_all(Ending::Reset);
                cuts += 1;
            }
        }
        assert_eq!(context.next().expect("it is over").result, Ok(length as u64));
        assert!(std::fs::read(directory.path().join("file")).expect("the file") == data);
    }
    assert!(context.stats().reconnects > 0);
    // A part that the server has executed is not executed again, however often the connection breaks.
    let statistics = server.statistics();
    assert_eq!(statistics["exports"]["d"]["written_bytes"], 5 * length as u64, "once");
}

#[test]
fn a_server_that_is_started_anew_in_the_middle_may_take_less_in_a_request() {
    for redo in [false, true] {
        let directory = tempfile::tempdir().expect("a directory");
        let spawn = |listen: &str, io_max: &str| {
            let mut command = Command::new(binary("raio_server"));
            command.args(["--listen", listen, "--io-max", io_max, "--memory", "16M"]);
            command.args(["--export", &format!("d={},rw", directory.path().display())]);
            Server::spawn(command)
        };
        let mut server = spawn("tcp://127.0.0.1:0", "1M");
        let (listen, url) = (server.listen_url(), server.url());
        let session = Session::connect(&url, &Options { redo, ..Options::default() }).expect("a session");
        let mut context = session.context(8).expect("a context");
        let file = session.open("/d/file", libc::O_RDWR | libc::O_CREAT, 0o600).expect("a file");
        let length = 64 << 20;
        let data = pattern(length, 1);
        context
            .submit(&file, Operation::Write { offset: 0, buffers: whole(data.clone()) }, 0)
            .expect("taken");
        let buffers = whole(vec![0; 1 << 20]);
        context.submit(&file, Operation::Read { offset: 0, buffers }, 1).expect("taken");
        let _ = context.wait(2, 2, Some(Duration::from_millis(3))).expect("it goes on");
        // In the middle of it, on any machine but one that writes 64 MiB in 3 ms.
        server.signal(Signal::STOP);
        server.kill();
        let _server = spawn(&listen, "64K");
        let mut over = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while over.len() < 2 {
            assert!(Instant::now() < deadline);
            context.wait(1, 2, Some(Duration::from_secs(1))).expect("it goes on");
            over.extend(std::iter::from_fn(|| context.next()));
        }
        over.sort_by_key(|completion| completion.token);
        over.pop().expect("the read").result.expect("it is done");
        match over.pop().expect("the write").result {
            Ok(count) => {
                assert_eq!(count, length as u64);
                assert!(std::fs::read(directory.path().join("file")).expect("the file") == data);
            }
            Err(error) => assert!(!redo && error.is_unknown, "{error:?}"),
        }
        assert_eq!(context.io_bytes_max(), IO_MAX);
        let buffers = whole(data.clone());
        assert_eq!(
            run(&mut context, &file, Operation::Write { offset: 0, buffers }).result,
            Ok(length as u64)
        );
        assert!(std::fs::read(directory.path().join("file")).expect("the file") == data);
    }
}
