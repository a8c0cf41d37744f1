//! Copies, checksums and locks on the server: between file systems, at a rate, over connections that break,
//! and when clients and servers end.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use raio::{
    Answer, Checksum, ChecksumAlgorithm, Context, Error, Lock, Operation, Options, Session, SubmitOptions,
};
use raio_e2e::{
    Client, Ending, LoopDevice, PATIENCE, Proxy, Server, Site, carry_out, completion, is_at_rest, needs_root,
};
use rustix::process::Signal;

/// As much as the server copies at once.
const PIECE: u64 = 8 << 20;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8 ^ (at >> 12) as u8).collect()
}

fn copy(source: &raio::File, source_offset: u64, offset: u64, length: u64) -> Operation {
    Operation::Copy { offset, source: source.as_source(), source_offset, length }
}

fn checksum(context: &mut Context, file: &raio::File, length: u64) -> (u64, Checksum) {
    let operation = Operation::Checksum { offset: 0, length, algorithm: ChecksumAlgorithm::Blake3 };
    let completion = carry_out(context, file, operation).expect("it is begun");
    let Some(Answer::Checksum(checksum)) = completion.answer.map(|answer| *answer) else {
        panic!("{:?}", completion.result)
    };
    (completion.result.expect("it has succeeded"), checksum)
}

fn open(session: &Session, path: &str, flags: i32) -> raio::File {
    session.open(path, libc::O_RDWR | libc::O_CREAT | flags, 0o644).expect("a file")
}

fn result_of(context: &mut Context, file: &raio::File, operation: Operation) -> Result<u64, Error> {
    carry_out(context, file, operation).expect("it is begun").result
}

fn errno_of(context: &mut Context, file: &raio::File, operation: Operation) -> i32 {
    result_of(context, file, operation).expect_err("it fails").errno()
}

#[test]
fn files_and_devices_of_all_kinds_are_copied_to_one_another() {
    if !needs_root("file systems of several kinds") {
        return;
    }
    let (ext4, xfs) = (LoopDevice::new(200 << 20).mount("ext4"), LoopDevice::new(320 << 20).mount("xfs"));
    let device = LoopDevice::new(64 << 20);
    let contents = pattern((2 * PIECE) as usize + 12_345);
    std::fs::write(ext4.path().join("source"), &contents).expect("a file");
    let exports = [
        format!("ext4={},rw", ext4.path().display()),
        format!("xfs={},rw", xfs.path().display()),
        format!("device={},rw", device.path().display()),
        "memory=mem:64M,rw".to_owned(),
    ];
    let mut server = Server::start(&exports.each_ref().map(String::as_str));
    let session = Session::connect(&server.url(), &Options::default()).expect("a session");
    let mut context = session.context(4).expect("a context");
    let length = contents.len() as u64;
    // Each from the one before.
    let mut source = open(&session, "/ext4/source", 0);
    let (_, expected) = checksum(&mut context, &source, u64::MAX >> 1);
    for (path, flags) in [
        ("/xfs/one", 0),
        ("/xfs/two", libc::O_DIRECT),
        ("/device", 0),
        ("/ext4/three", libc::O_DSYNC),
        ("/device", libc::O_DIRECT),
        ("/memory", 0),
        ("/ext4/four", libc::O_DIRECT),
    ] {
        let file = open(&session, path, flags);
        assert_eq!(result_of(&mut context, &file, copy(&source, 0, 0, length)), Ok(length), "{path}");
        assert_eq!(checksum(&mut context, &file, length), (length, expected), "{path}");
        source = file;
    }
    assert!(std::fs::read(ext4.path().join("four")).expect("a file") == contents);
    assert!(std::fs::read(xfs.path().join("two")).expect("a file") == contents);
    drop((context, source, session));
    server.statistics_when(is_at_rest);
}

#[test]
fn each_piece_of_a_copy_counts_for_the_rates_and_what_is_done_is_said() {
    let client = Client::new();
    let entry = client.entry("one", "exports = { data = { access = 'rw', bandwidth = '64M' } }");
    let (mut site, _) = Site::configured(&entry, "[export.data]\npath = 'DIRECTORY/data'\naccess = 'rw'\n");
    File::create(site.path("data/file")).and_then(|file| file.set_len(1 << 30)).expect("a file");
    let session = client.connect(&site).expect("a session");
    let mut context = session.context(4).expect("a context");
    let (source, file) = (open(&session, "/data/file", 0), open(&session, "/data/copy", 0));
    // Read and written: the sixth piece begins after ten times 8 MiB, but for the burst.
    let began = Instant::now();
    assert_eq!(result_of(&mut context, &file, copy(&source, 0, 0, 6 * PIECE)), Ok(6 * PIECE));
    assert!(began.elapsed() >= Duration::from_millis(1_000), "{:?}", began.elapsed());
    let began = Instant::now();
    checksum(&mut context, &source, 8 * PIECE);
    assert!(began.elapsed() >= Duration::from_millis(700), "{:?}", began.elapsed());

    // One that takes too long ends with what is done by then.
    let timeout = Some(Duration::from_millis(1_500));
    let options = SubmitOptions { timeout, ..SubmitOptions::default() };
    context.submit_with(&file, copy(&source, 0, 0, 1 << 30), options, 0).expect("it is begun");
    let done = completion(&mut context).and_then(|completion| completion.result).expect("a part of it");
    assert!((PIECE..1 << 30).contains(&done) && done.is_multiple_of(PIECE), "{done}");

    // So does one that runs when its server ends, and the server does not wait for it.
    context.submit(&file, copy(&source, 0, 0, 1 << 30), 0).expect("it is begun");
    context.flush();
    site.server.statistics_when(|it| it["in_flight"]["need_slot"].as_u64() > Some(0));
    std::thread::sleep(Duration::from_millis(500));
    let began = Instant::now();
    site.server.signal(Signal::TERM);
    assert!(site.server.wait().success(), "all was answered");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let done = completion(&mut context).and_then(|completion| completion.result).expect("a part of it");
    assert!((PIECE..1 << 30).contains(&done), "{done}");
}

#[test]
fn a_copy_and_a_checksum_go_on_over_broken_connections_and_nothing_is_unknown() {
    let directory = tempfile::tempdir().expect("a directory");
    const LENGTH: u64 = 40 * PIECE;
    let contents = pattern(LENGTH as usize);
    std::fs::write(directory.path().join("file"), &contents).expect("a file");
    let mut server = Server::start(&[&format!("d={},rw", directory.path().display())]);
    let proxy = Proxy::start(server.address());
    let session = Session::connect(&proxy.url(), &Options::default()).expect("a session");
    let mut context = session.context(4).expect("a context");
    let (source, file) = (open(&session, "/d/file", 0), open(&session, "/d/copy", 0));
    let mut run = |file: &raio::File, operation| {
        context.submit(file, operation, 0).expect("there is room");
        context.flush();
        let deadline = Instant::now() + PATIENCE;
        for round in 0.. {
            assert!(Instant::now() < deadline, "it does not end");
            context.wait(1, 1, Some(Duration::from_millis(100))).expect("it goes on");
            if let Some(completion) = context.next() {
                assert!(completion.result.is_ok(), "{:?}", completion.result);
                return completion;
            }
            if round < 10 {
                proxy.end_all(if round % 2 == 0 { Ending::Reset } else { Ending::Fin });
            }
        }
        unreachable!()
    };
    let mut done = 0;
    while done < LENGTH {
        let n = run(&file, copy(&source, done, done, LENGTH - done)).result.expect("it was looked at");
        assert!(n > 0, "it stops at {done}");
        done += n;
    }
    assert!(std::fs::read(directory.path().join("copy")).expect("a file") == contents);
    let operation = Operation::Checksum { offset: 0, length: LENGTH, algorithm: ChecksumAlgorithm::Crc32c };
    let answer = run(&file, operation).answer.map(|answer| *answer);
    let crc = raio_transport::message::data_crc(&contents);
    assert!(matches!(answer, Some(Answer::Checksum(Checksum::Crc32c(found))) if found == crc), "{answer:?}");
    let stats = context.stats();
    assert!(stats.reconnects > 2 && stats.unknown == 0, "{stats:?}");
    assert!(server.statistics()["requests"]["copy"].as_u64() > Some(1), "the copy was never interrupted");
}

const HOLDER: &str = "RAIO_TEST_LOCKS_AT";

/// Not a test of anything: run in a process of its own, it has a lock until it is killed.
#[test]
fn holds_a_lock_if_asked() {
    let Ok(url) = std::env::var(HOLDER) else { return };
    let second = Duration::from_secs(1);
    let options = Options { reconnect: second, request_timeout: Some(second), ..Options::default() };
    let session = Session::connect(&url, &options).expect("a session");
    let file = open(&session, "/d/file", 0);
    let mut context = session.context(1).expect("a context");
    let locked = result_of(&mut context, &file, Operation::Lock(Lock::Exclusive));
    println!("\nlocked: {}", locked.is_ok());
    std::thread::sleep(PATIENCE);
}

#[test]
fn a_lock_ends_with_a_client_that_is_killed_and_is_lost_with_its_server() {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("file"), "x").expect("a file");
    let export = format!("d={},rw", directory.path().display());
    let mut server = Server::start(&[&export]);
    let mut holder = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "holds_a_lock_if_asked", "--nocapture"])
        .env(HOLDER, server.url())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut lines = BufReader::new(holder.stdout.take().expect("stdout is piped")).lines();
    assert!(lines.any(|line| line.is_ok_and(|line| line == "locked: true")), "it has no lock");

    let session = Session::connect(&server.url(), &Options::default()).expect("a session");
    let mut context = session.context(1).expect("a context");
    let file = open(&session, "/d/file", 0);
    assert_eq!(errno_of(&mut context, &file, Operation::Lock(Lock::Shared)), libc::EAGAIN);
    holder.kill().and_then(|()| holder.wait()).expect("it is killed");
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = result_of(&mut context, &file, Operation::Lock(Lock::Exclusive)) {
        assert_eq!(error.errno(), libc::EAGAIN, "{error}");
        assert!(Instant::now() < deadline, "the lock outlives its client");
        std::thread::sleep(Duration::from_millis(20));
    }

    let listen = server.listen_url();
    server.kill();
    let _server = Server::start_with(&[&export], &["--listen", &listen]);
    assert_eq!(errno_of(&mut context, &file, Operation::Stat), libc::ENOLCK);
    assert_eq!(errno_of(&mut context, &file, Operation::Lock(Lock::Exclusive)), libc::ENOLCK);
    let again = open(&session, "/d/file", 0);
    assert_eq!(result_of(&mut context, &again, Operation::Lock(Lock::Exclusive)), Ok(0));
}
