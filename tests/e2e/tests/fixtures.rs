//! The fixtures do what they say.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use raio_e2e::{
    Cable, Demand, End, FuseCall, FuseFs, FuseOptions, Herd, LoopDevice, PATIENCE, Restless, Server, TCP,
    is_at_rest, needs_root, numbers, sandboxed,
};

/// So long nothing happens, where it would happen at once.
const A_WHILE: Duration = Duration::from_millis(100);

/// These tests run one after another. A process that one of them starts has copies of the files that another
/// has open, until it has become another program: closing those asks their FUSE file system, which may be
/// hanging or ending, and of which it has a copy too.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_mounted(path: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
    mounts.lines().any(|line| line.split(' ').nth(1) == path.to_str())
}

#[test]
fn a_fuse_file_system_reads_writes_hangs_and_fails_as_told() {
    let _alone = alone();
    for options in [
        FuseOptions::default(),
        FuseOptions { async_read: false, direct_io: false },
        FuseOptions { async_read: true, direct_io: true },
    ] {
        let content = vec![7; 10_000];
        let Some(fuse) = FuseFs::mount("a FUSE file system", options, &[("file", &content)]) else { return };
        assert_eq!(std::fs::read(fuse.file("file")).expect("it can be read"), content);
        let names: Vec<_> = std::fs::read_dir(fuse.path())
            .expect("a directory")
            .map(|e| e.expect("an entry").file_name())
            .collect();
        assert_eq!(names, ["file"]);
        std::fs::write(fuse.file("new"), &content).expect("it can be written");
        assert_eq!(std::fs::read(fuse.file("new")).expect("it can be read"), content);
        assert_eq!(std::fs::metadata(fuse.file("none")).expect_err("none").kind(), ErrorKind::NotFound);

        fuse.fail(FuseCall::Fsync, libc::EIO);
        fuse.fail(FuseCall::Open, libc::EMFILE);
        let file = File::create(fuse.file("other")).expect("creating is another call");
        assert_eq!(file.sync_all().expect_err("told to fail").raw_os_error(), Some(libc::EIO));
        assert_eq!(
            File::open(fuse.file("other")).expect_err("told to fail").raw_os_error(),
            Some(libc::EMFILE)
        );
        fuse.mend(FuseCall::Fsync);
        file.sync_all().expect("it works again");

        fuse.hang(FuseCall::Write);
        let (sender, written) = channel();
        std::thread::scope(|scope| {
            scope.spawn(|| sender.send(file.write_at(b"late", 0)));
            fuse.wait_for_hanging(FuseCall::Write, 1);
            assert!(written.recv_timeout(A_WHILE).is_err(), "a write that hangs has ended");
            // What does not hang goes on beside it.
            assert_eq!(std::fs::metadata(fuse.file("other")).expect("its size").len(), 0);
            fuse.mend(FuseCall::Write);
            assert_eq!(written.recv_timeout(PATIENCE).expect("it ends").expect("with success"), 4);
        });
        assert_eq!((fuse.hanging(FuseCall::Write), fuse.calls(FuseCall::Fsync)), (0, 2));
    }
}

#[test]
fn a_fuse_file_system_tells_asynchronous_reads_from_others() {
    let _alone = alone();
    // Two reads of one file: only ASYNC_READ lets readahead go on by itself, in more than one request at a
    // time.
    for (async_read, fast_path) in [(true, true), (false, false)] {
        let content = vec![7; 1 << 20];
        let options = FuseOptions { async_read, direct_io: false };
        let Some(fuse) = FuseFs::mount("asynchronous reads", options, &[("file", &content)]) else { return };
        fuse.hang(FuseCall::Read);
        let file = File::open(fuse.file("file")).expect("a file");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential).expect("advice");
                let mut buffer = vec![0; 1 << 20];
                assert_eq!(file.read_at(&mut buffer, 0).expect("a read"), buffer.len());
                assert_eq!(buffer, content);
            });
            fuse.wait_for_hanging(FuseCall::Read, 1);
            let deadline = Instant::now() + if fast_path { PATIENCE } else { A_WHILE };
            while fuse.hanging(FuseCall::Read) < 2 && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            let hanging = fuse.hanging(FuseCall::Read);
            fuse.mend(FuseCall::Read);
            assert_eq!(hanging > 1, fast_path, "{hanging} reads at once");
        });
    }
}

#[test]
fn a_fuse_file_system_that_hangs_is_taken_down_with_its_test_and_lets_go_of_who_is_killed() {
    let _alone = alone();
    let Some(fuse) = FuseFs::mount("a FUSE file system", FuseOptions::default(), &[("file", b"content")])
    else {
        return;
    };
    let path = fuse.path().to_owned();
    fuse.hang(FuseCall::Read);
    let cat = || {
        let mut command = Command::new("cat");
        command.arg(path.join("file")).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("cat")
    };
    let mut killed = cat();
    fuse.wait_for_hanging(FuseCall::Read, 1);
    killed.kill().expect("it runs");
    // Nothing but the fixture lets go of it.
    killed.wait().expect("it ends");
    let left = cat();
    fuse.wait_for_hanging(FuseCall::Read, 1);
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _fuse = fuse;
        panic!("a test fails while a call hangs");
    }));
    panic.expect_err("it panics");
    let output = left.wait_with_output().expect("it ends");
    assert!(!output.status.success(), "a read that nobody answers fails: {output:?}");
    assert!(!is_mounted(&path) && !path.exists());
}

#[test]
fn a_frozen_file_system_holds_writes_until_it_is_thawed() {
    let _alone = alone();
    if !needs_root("freezing a file system") {
        return;
    }
    for file_system in ["ext4", "xfs"] {
        let mounted =
            LoopDevice::new(if file_system == "xfs" { 320 << 20 } else { 32 << 20 }).mount(file_system);
        let file = File::create(mounted.path().join("file")).expect("a file");
        let (sender, written) = channel();
        std::thread::scope(|scope| {
            let frozen = mounted.freeze();
            scope.spawn(|| sender.send(file.write_at(b"late", 0)));
            assert!(written.recv_timeout(A_WHILE).is_err(), "a write to frozen {file_system} has ended");
            drop(frozen);
            assert_eq!(written.recv_timeout(PATIENCE).expect("it ends").expect("with success"), 4);
        });
    }
}

#[test]
fn deaf_clients_hold_what_they_asked_for_and_slow_and_restless_ones_go_on() {
    let _alone = alone();
    const MIB: u64 = 1 << 20;
    let (_directory, export) = numbers();
    let mut server = Server::start_with(&[&export], &["--listen", TCP, "--memory", "128M"]);
    let (url, path) = (server.url(), "/d/numbers");
    let demand = Demand { reads: 16, bytes: MIB as u32 };
    let mut deaf = Herd::connect(&url, path, 3, demand).expect("three clients");
    assert_eq!((deaf.len(), deaf.closed()), (3, 0));
    let statistics = server.statistics_when(|statistics| statistics["slot_bytes"].as_u64() >= Some(3 * MIB));
    assert_eq!(statistics["connections"], 3);
    let deadline = Instant::now() + PATIENCE;
    let mut sips = 0;
    while sips < 3 {
        assert!(Instant::now() < deadline, "no answer has come to anybody");
        sips += deaf.sip();
    }
    drop(deaf);
    server.statistics_when(is_at_rest);

    let small = Demand { reads: 1, bytes: 4096 };
    let accepted = |server: &mut Server| server.statistics()["accepted"].as_u64().expect("a count");
    let before = accepted(&mut server);
    let restless = Restless::reconnecting(&url, path, 5, small, Duration::from_millis(1)).expect("five");
    let slow = Restless::slow(&url, path, 2, demand).expect("two");
    let deadline = Instant::now() + PATIENCE;
    while restless.rounds() < 3 || slow.rounds() < 1 {
        assert!(Instant::now() < deadline, "{} and {} rounds", restless.rounds(), slow.rounds());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(accepted(&mut server) >= before + 2 + 4 * 5, "five that came back three times, and two");
    drop((restless, slow));
    server.statistics_when(is_at_rest);

    let deaf = Herd::connect(&url, path, 2, small).expect("two clients");
    server.kill();
    let deadline = Instant::now() + PATIENCE;
    while deaf.closed() < 2 {
        assert!(Instant::now() < deadline, "they do not notice that the server is gone");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_sandbox_denies_the_calls_it_names_with_the_errnos_it_names() {
    let _alone = alone();
    let denied =
        [(libc::SYS_uname, libc::ENOSYS), (libc::SYS_chdir, libc::EACCES), (libc::SYS_fchdir, libc::EACCES)];
    let output = sandboxed(Path::new("uname"), &denied).output().expect("uname runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("not implemented"), "{said}");
    let output = sandboxed(Path::new("sh"), &denied).args(["-c", "cd /; true"]).output().expect("sh runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.to_lowercase().contains("can't cd") || said.contains("ermission denied"), "{said}");
    let output = sandboxed(Path::new("echo"), &denied).arg("fine").output().expect("echo runs");
    assert_eq!(output.stdout, b"fine\n");
}

#[test]
fn a_cable_that_is_pulled_loses_nothing_that_its_ends_still_want_and_says_nothing_of_who_vanishes() {
    let _alone = alone();
    let Some(cable) = Cable::new("pulling a cable") else { return };
    let listener = cable.on(End::A, || TcpListener::bind((cable.address(End::A), 0))).expect("a listener");
    let address = listener.local_addr().expect("an address");
    let mut client = cable.on(End::B, || TcpStream::connect(address)).expect("they are joined");
    let (mut served, _) = listener.accept().expect("a client");

    cable.pull();
    client.write_all(b"late").expect("the socket takes it");
    served.set_read_timeout(Some(A_WHILE)).expect("a timeout");
    let mut answer = [0; 4];
    let error = served.read(&mut answer).expect_err("nothing comes through");
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    cable.plug();
    served.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    served.read_exact(&mut answer).expect("it comes then");
    assert_eq!(&answer, b"late");

    // Whoever goes while the cable is out is not seen to go.
    cable.pull();
    drop(client);
    served.set_read_timeout(Some(A_WHILE)).expect("a timeout");
    assert_eq!(served.read(&mut answer).expect_err("nobody said goaway").kind(), ErrorKind::WouldBlock);

    let mut where_am_i = cable.command(End::B, "ip");
    let output = where_am_i.args(["-brief", "address"]).output().expect("ip runs there");
    assert!(String::from_utf8_lossy(&output.stdout).contains(cable.address(End::B)), "{output:?}");
    drop(cable);
    let left = Command::new("ip").args(["netns", "list"]).output().expect("ip runs").stdout;
    let mine = format!("raio-{}-", std::process::id());
    assert!(!String::from_utf8_lossy(&left).contains(&mine), "the namespaces are gone");
}
