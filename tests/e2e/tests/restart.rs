//! Servers that are killed and started anew: what a file is, whether writes were lost, and who may write.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Context, Error, Operation, Options, Session};
use raio_e2e::{
    FuseCall, FuseFs, FuseOptions, LoopDevice, PATIENCE, Raw, Server, await_log, binary, needs_root,
};
use raio_transport::protocol::{Command, FileHandle, OPEN_CREATE, OPEN_DIRECT, OPEN_READ, OPEN_WRITE};
use rustix::process::{Signal, kill_process};

const BLOCK: usize = 4096;
const READ_WRITE: u32 = OPEN_READ | OPEN_WRITE;

/// A place for the state and the logs of servers that follow one another.
struct Place {
    directory: tempfile::TempDir,
    listen: String,
    arguments: Vec<String>,
}

impl Place {
    /// For servers with these exports.
    fn new(exports: &[String]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let arguments = exports.iter().flat_map(|export| ["--export".to_owned(), export.clone()]).collect();
        Self { directory, listen: "tcp://127.0.0.1:0".into(), arguments }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn state(&self) -> PathBuf {
        self.path("state")
    }

    /// A server that keeps its state here, yet to be started.
    fn process(&self) -> Process {
        let mut process = self.process_without_state();
        process.arg("--state").arg(self.state());
        process
    }

    fn process_without_state(&self) -> Process {
        let log = File::options().create(true).append(true).open(self.path("log")).expect("a log");
        let mut process = Process::new(binary("raio_server"));
        process.args(["--listen", &self.listen, "--workers", "2"]).args(&self.arguments).stderr(log);
        process
    }

    fn start(&self) -> Server {
        Server::spawn(self.process())
    }

    /// Starts a server that will be ready at some time.
    fn begin(&self) -> JoinHandle<Server> {
        let process = self.process();
        std::thread::spawn(move || Server::spawn(process))
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).expect("there is a log")
    }

    fn log_until(&self, text: &str) {
        await_log(&self.path("log"), text);
    }
}

/// The identity and the verifier of a file, as an open of it tells.
fn facts(server: &Server, path: &str) -> ([u8; 16], u64) {
    let file = Raw::open(&server.url(), path, OPEN_READ).expect("a file");
    assert_ne!(file.status.identity, [0; 16], "{path}");
    assert_ne!(file.status.verifier.get(), 0, "{path}");
    (file.status.identity, file.status.verifier.get())
}

fn errno(result: io::Result<u64>) -> Option<i32> {
    result.expect_err("it fails").raw_os_error()
}

#[test]
fn a_file_keeps_its_identity_and_its_verifier_when_the_server_is_killed_and_started_anew() {
    if !needs_root("a file system of a kind") {
        return;
    }
    for kind in ["ext4", "xfs"] {
        let mounted = LoopDevice::new(320 << 20).mount(kind);
        let path = mounted.path().to_owned();
        std::fs::write(path.join("file"), "one").expect("a file");
        std::fs::write(path.join("other"), "two").expect("a file");
        let device = LoopDevice::new(1 << 20);
        let place = Place::new(&[
            format!("d={},rw", path.display()),
            format!("dev={},rw", device.path().display()),
            "m=mem:1M,rw".to_owned(),
        ]);
        let all = |server: &Server| ["/d/file", "/dev", "/d/other"].map(|path| facts(server, path));

        let mut server = place.start();
        let before = all(&server);
        let memory = facts(&server, "/m");
        assert_ne!(before[0].0, before[2].0, "{kind}: two files are one");
        server.kill();

        let mut server = place.start();
        assert_eq!(all(&server), before, "{kind}");
        let now = facts(&server, "/m");
        assert!(now.0 != memory.0 && now.1 != memory.1, "{kind}: memory outlives its server");
        server.kill();

        // The service manager may give each server mounts of its own.
        let mut process = Process::new("unshare");
        process.args(["--mount", "--"]).arg(binary("raio_server")).args(place.process().get_args());
        let mut server = Server::spawn(process);
        assert_eq!(all(&server), before, "{kind}");
        server.kill();

        // After a reboot what had not been flushed is lost.
        std::fs::write(place.path("boot"), "another").expect("a file");
        let mut process = place.process();
        process.env("RAIO_TEST_BOOT_ID", place.path("boot"));
        let mut server = Server::spawn(process);
        for ((identity, verifier), before) in all(&server).into_iter().zip(before) {
            assert!(identity == before.0 && verifier != before.1, "{kind}: as if there had been no reboot");
        }
        server.kill();

        // Without a state directory nobody knows what the last server knew.
        let before = {
            let mut server = Server::spawn(place.process_without_state());
            let before = all(&server);
            server.kill();
            before
        };
        let mut server = Server::spawn(place.process_without_state());
        for ((identity, verifier), before) in all(&server).into_iter().zip(before) {
            assert!(identity == before.0 && verifier != before.1, "{kind}: no state, and yet remembered");
        }
        server.kill();
        drop(server);

        let mut server = place.start();
        let before = facts(&server, "/d/file");
        let other = facts(&server, "/d/other");
        server.kill();
        drop(server);
        let mounted = mounted.remount();
        let mut server = place.start();
        let now = facts(&server, "/d/file");
        assert!(now.0 == before.0 && now.1 != before.1, "{kind}: as if it had not been mounted anew");
        server.kill();
        drop(server);

        std::fs::rename(mounted.path().join("other"), mounted.path().join("file")).expect("renamed");
        assert_eq!(facts(&place.start(), "/d/file").0, other.0, "{kind}");
    }
}

#[test]
fn a_failed_fsync_changes_the_verifier_for_this_server_and_the_next_one() {
    let Some(fuse) = FuseFs::mount("a failing fsync", FuseOptions::default(), &[("file", b"content")]) else {
        return;
    };
    let place = Place::new(&[format!("d={},rw", fuse.path().display())]);
    let mut server = place.start();
    let mut file = Raw::open(&server.url(), "/d/file", READ_WRITE).expect("a file");
    let first = file.fsync().expect("it is flushed");
    assert_eq!(first, file.status.verifier.get());
    assert_eq!(file.fsync().expect("it is flushed"), first);
    fuse.fail(FuseCall::Fsync, libc::EIO);
    assert_eq!(errno(file.fsync()), Some(libc::EIO));
    fuse.mend(FuseCall::Fsync);
    let second = file.fsync().expect("it is flushed");
    assert_ne!(second, first);
    assert_eq!(facts(&server, "/d/file").1, second);
    server.kill();
    assert_eq!(facts(&place.start(), "/d/file").1, second);
}

#[test]
fn a_direct_write_to_a_full_disk_changes_the_verifier() {
    if !needs_root("a file system that is full") {
        return;
    }
    for backend in ["uring", "threads"] {
        let mounted = LoopDevice::new(16 << 20).mount("ext4");
        let mut place = Place::new(&[format!("d={},rw", mounted.path().display())]);
        place.arguments.extend(["--backend", backend].map(str::to_owned));
        let mut filler = File::create(mounted.path().join("filler")).expect("a file");
        while filler.write_all(&[0; BLOCK]).is_ok() {}
        let server = place.start();
        let flags = READ_WRITE | OPEN_CREATE | OPEN_DIRECT;
        let mut file = Raw::open(&server.url(), "/d/file", flags).expect("a file");
        let before = file.status.verifier.get();
        file.send_write_header(1, 0, BLOCK as u32).expect("the server is there");
        file.stream.write_all(&[b'x'; BLOCK]).expect("the server is there");
        let (response, _) = file.response().expect("an answer");
        assert_eq!(response.status.errno, libc::ENOSPC, "{backend}");
        assert_ne!(facts(&server, "/d/file").1, before, "{backend}");
    }
}

/// Writes a block full of one letter, straight to the disk, and does not wait for the answer.
fn begin_write(server: &Server, path: &str) -> Raw {
    let mut file = Raw::open(&server.url(), path, READ_WRITE | OPEN_DIRECT).expect("a file");
    file.send_write_header(1, 0, BLOCK as u32).expect("the server is there");
    file.stream.write_all(&[b'o'; BLOCK]).expect("the server is there");
    file
}

/// Waits until something hangs in the kernel: a write to a disk, or a thread of the server.
fn wait_until_it_hangs(server: &Server, disk: Option<&LoopDevice>) {
    let hangs = || match disk {
        Some(disk) => {
            let name = disk.path().file_name().expect("a name").to_string_lossy().into_owned();
            let in_flight = std::fs::read_to_string(format!("/sys/block/{name}/inflight")).expect("a disk");
            in_flight.split_whitespace().nth(1).is_some_and(|writes| writes != "0")
        }
        None => std::fs::read_dir(format!("/proc/{}/task", server.pid()))
            .expect("it runs")
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok())
            .any(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))),
    };
    let deadline = Instant::now() + PATIENCE;
    // A thread may be there for a moment for another reason.
    let mut looks = 0;
    while looks < 10 {
        looks = if hangs() { looks + 1 } else { 0 };
        assert!(Instant::now() < deadline, "nothing hangs");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn first_byte(path: &Path) -> u8 {
    let mut bytes = [0];
    File::open(path).and_then(|file| file.read_exact_at(&mut bytes, 0)).expect("it can be read");
    bytes[0]
}

#[test]
fn a_server_is_ready_only_when_what_a_killed_one_has_begun_is_over() {
    if !needs_root("freezing a file system") {
        return;
    }
    // What is written to a disk is in the ring, and the process is gone at once. What is written to a file
    // hangs in a thread, and the process with it.
    for is_disk in [true, false] {
        let mounted = LoopDevice::new(64 << 20).mount("ext4");
        let path = mounted.path().join("file");
        std::fs::write(&path, vec![b'.'; 1 << 20]).expect("a file");
        let device = is_disk.then(|| LoopDevice::over(&path));
        let (export, name) = match &device {
            Some(device) => (format!("d={},rw", device.path().display()), "/d"),
            None => (format!("d={},rw", mounted.path().display()), "/d/file"),
        };
        let place = Place::new(&[export]);
        let mut server = place.start();
        let frozen = mounted.freeze();
        let _file = begin_write(&server, name);
        wait_until_it_hangs(&server, device.as_ref());
        server.signal(Signal::KILL);
        if is_disk {
            server.wait();
        }
        let next = place.begin();
        place.log_until("is still in flight");
        assert!(!next.is_finished(), "it does not wait");
        let begun = Instant::now();
        drop(frozen);
        let server = next.join().expect("it is ready");
        assert!(begun.elapsed() < PATIENCE);
        // Whatever the old one had begun is there before the new one is.
        let mut content = [0; BLOCK];
        let mut file = Raw::open(&server.url(), name, OPEN_READ | OPEN_DIRECT).expect("a file");
        file.send_read(1, 0, BLOCK as u32).expect("the server is there");
        file.response().expect("an answer");
        io::Read::read_exact(&mut file.stream, &mut content).expect("data");
        if is_disk {
            assert_eq!(content, [b'o'; BLOCK]);
            assert_eq!(first_byte(device.as_ref().expect("a disk").path()), b'o');
        }
    }
}

#[test]
fn two_servers_do_not_write_to_the_same_files_and_the_second_one_says_who_does() {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(directory.path().join("beneath")).expect("a directory");
    std::fs::write(directory.path().join("beneath/file"), "content").expect("a file");
    let of = |path: &str, access| format!("x={},{access}", directory.path().join(path).display());
    let first_place = Place::new(&[of("", "rw")]);
    let mut first = first_place.start();
    let in_the_same_state = |export| {
        let mut place = Place::new(&[export]);
        place.arguments.extend(["--state".to_owned(), first_place.state().display().to_string()]);
        place
    };
    // A reader disturbs nobody.
    drop(Server::spawn(in_the_same_state(of("", "ro")).process_without_state()));

    for path in ["", "beneath", "beneath/file"] {
        let place = in_the_same_state(of(path, "rw"));
        let mut child = place.process_without_state().stdout(Stdio::piped()).spawn().expect("it starts");
        place.log_until(&format!("running (process {})", first.pid()));
        kill_process(rustix::process::Pid::from_child(&child), Signal::TERM).expect("it waits");
        assert_eq!(child.wait().expect("it ends").code(), Some(0), "{}", place.log());
    }

    let place = in_the_same_state(of("beneath", "rw"));
    let process = place.process_without_state();
    let second = std::thread::spawn(move || Server::spawn(process));
    place.log_until("Not ready yet");
    first.signal(Signal::TERM);
    first.wait();
    second.join().expect("it is ready once the first one has ended");
}

#[test]
fn without_a_state_directory_a_strict_server_lets_nobody_write() {
    let directory = tempfile::tempdir().expect("a directory");
    for access in ["rw", "ro"] {
        let place = Place::new(&[format!("d={},{access}", directory.path().display())]);
        if access == "ro" {
            let mut process = place.process_without_state();
            process.arg("--strict");
            drop(Server::spawn(process));
            continue;
        }
        std::fs::write(place.path("file"), "").expect("a file");
        for state in [None, Some(place.path("file")), Some(place.path("no/such/directory"))] {
            let mut process = place.process_without_state();
            process.arg("--strict");
            if let Some(state) = &state {
                process.arg("--state").arg(state);
            }
            assert_eq!(process.status().expect("it runs").code(), Some(1), "{state:?}");
            assert!(place.log().contains("Name one that the server may write to with --state"));
            // Others say so, and serve.
            let mut process = place.process_without_state();
            if let Some(state) = &state {
                process.arg("--state").arg(state);
            }
            drop(Server::spawn(process));
            place.log_until("fails once. Name one with --state.");
        }
    }
}

#[test]
fn a_verifier_that_nobody_has_written_keeps_the_server_from_starting() {
    let directory = tempfile::tempdir().expect("a directory");
    let place = Place::new(&[format!("d={},rw", directory.path().display())]);
    place.start().kill();
    let verifiers: Vec<_> = std::fs::read_dir(place.state())
        .expect("there is a state")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("verifier.")))
        .collect();
    let [path] = &verifiers[..] else { panic!("{verifiers:?}") };
    let content = std::fs::read_to_string(path).expect("text");
    std::fs::write(path, content.replace("value ", "value x")).expect("written");
    assert_eq!(place.process().status().expect("it runs").code(), Some(1));
    let log = place.log();
    assert!(log.contains(&*path.to_string_lossy()) && log.contains("line 4"), "{log}");
    std::fs::remove_file(path).expect("removed");
    drop(place.start());
}

/// Opens a file under the handle that an earlier server gave it.
fn reopen(client: &mut Raw, path: &str, flags: u32, of: (FileHandle, [u8; 16])) -> io::Result<FileHandle> {
    client.enter(&Command::Reopen { flags, file: of.0, identity: of.1, path: path.as_bytes() })?;
    Ok(client.file)
}

fn read(client: &mut Raw, bytes: u32) -> Vec<u8> {
    client.send_read(1, 0, bytes).expect("the server is there");
    let (response, _) = client.response().expect("an answer");
    assert!(response.status.is_ok(), "{:?}", response.status);
    let mut content = vec![0; response.data_len as usize];
    io::Read::read_exact(&mut client.stream, &mut content).expect("data");
    content
}

#[test]
fn a_file_is_reopened_under_its_handle_if_it_is_the_same_and_under_no_other() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    for name in ["first", "file", "other"] {
        std::fs::write(directory.path().join(name), name).expect("a file");
    }
    let place = Place::new(&[format!("d={},rw", directory.path().display()), "m=mem:4k,rw".to_owned()]);
    let mut server = place.start();
    let mut client = Raw::open(&server.url(), "/d/first", OPEN_READ).expect("a file");
    let mut opened = |path: &str| {
        client.enter(&Command::Open { flags: READ_WRITE, mode: 0, path: path.as_bytes() }).expect("a file");
        (client.file, client.status.identity)
    };
    let (file, other, memory) = (opened("/d/file"), opened("/d/other"), opened("/m"));
    server.kill();

    let server = place.start();
    let mut client = Raw::open(&server.url(), "/d/first", OPEN_READ).expect("a file");
    let client = &mut client;
    let errno = |result: io::Result<FileHandle>| result.expect_err("it fails").raw_os_error();
    // However often: the answer may have been lost.
    for _ in 0..3 {
        assert_eq!(reopen(client, "/d/file", READ_WRITE, file).expect("the same file"), file.0);
        assert_eq!((client.status.identity, client.file_bytes), (file.1, 4));
        assert_eq!(read(client, 100), b"file");
    }
    // Also if it has another name by now.
    std::fs::rename(directory.path().join("file"), directory.path().join("renamed")).expect("renamed");
    assert_eq!(reopen(client, "/d/file", READ_WRITE, file).expect("it is open"), file.0);

    let taken = (file.0, other.1);
    assert_eq!(errno(reopen(client, "/d/other", READ_WRITE, taken)), Some(libc::EEXIST));
    assert_eq!(errno(reopen(client, "/d/renamed", OPEN_READ, file)), Some(libc::EEXIST));
    let next_generation = (FileHandle(file.0.0 ^ 1 << 20), file.1);
    assert_eq!(errno(reopen(client, "/d/renamed", READ_WRITE, next_generation)), Some(libc::EEXIST));

    std::fs::copy(directory.path().join("other"), directory.path().join("copy")).expect("copied");
    std::fs::rename(directory.path().join("copy"), directory.path().join("other")).expect("renamed");
    assert_eq!(errno(reopen(client, "/d/other", READ_WRITE, other)), Some(libc::ESTALE));
    assert_eq!(errno(reopen(client, "/m", READ_WRITE, memory)), Some(libc::ESTALE));
    assert_eq!(errno(reopen(client, "/d/none", READ_WRITE, other)), Some(libc::ENOENT));
    let nothing = (FileHandle(5), file.1);
    assert_eq!(errno(reopen(client, "/d/renamed", READ_WRITE, nothing)), Some(libc::EINVAL));

    // Wherever a client wants its file, it has it there, and the next one has another handle.
    let far = (FileHandle(u32::MAX), file.1);
    assert_eq!(reopen(client, "/d/renamed", READ_WRITE, far).expect("the same file"), far.0);
    assert_eq!(read(client, 100), b"file");
    client.call(&Command::Close(far.0)).expect("it is open");
    client.send_read(1, 0, 1).expect("the server is there");
    assert_eq!(client.response().expect("an answer").0.status.errno, libc::EBADF);
}

/// Does one operation of a client, and waits for it.
fn perform(context: &mut Context, file: &raio::File, operation: Operation) -> Result<u64, Error> {
    context.submit(file, operation, 0).expect("there is room");
    context.flush();
    let deadline = Instant::now() + PATIENCE;
    while context.wait(1, 1, Some(Duration::from_millis(100))).expect("it goes on") == 0 {
        assert!(Instant::now() < deadline, "it does not end: {:?}", context.stats());
    }
    context.next().expect("it has ended").result
}

fn write(block: u64, letter: u8) -> Operation {
    let buffers = Buffers::One(Buffer::Owned(vec![letter; BLOCK].into()));
    Operation::Write { offset: block * BLOCK as u64, buffers }
}

#[test]
fn after_a_crash_of_the_machine_a_client_goes_on_and_the_first_fsync_says_that_writes_are_lost() {
    const FSYNC: Operation = Operation::Fsync { data_only: false };
    if !needs_root("a file system that is copied as a crash leaves it") {
        return;
    }
    // A clone of the image is what is on the disk at one moment, in the middle of whatever.
    let outer = LoopDevice::new(512 << 20).mount("xfs");
    let (image, crashed) = (outer.path().join("image"), outer.path().join("crashed"));
    File::create(&image).and_then(|file| file.set_len(32 << 20)).expect("a sparse image");
    let mut mounted = LoopDevice::over(&image).mount("ext4");
    let mut place = Place::new(&[format!("d={},rw", mounted.path().display())]);
    let mut server = place.start();
    place.listen = server.listen_url();

    let session = Session::connect(&server.url(), &Options::default()).expect("a session");
    let open = |path| session.open(path, libc::O_RDWR | libc::O_CREAT, 0o644).expect("a file");
    let (file, synced) = (open("/d/file"), open("/d/synced"));
    let mut context = session.context(4).expect("a context");
    let context = &mut context;
    for (file, block, letter) in [(&file, 0, b'A'), (&synced, 0, b'S')] {
        assert_eq!(perform(context, file, write(block, letter)), Ok(BLOCK as u64));
        assert_eq!(perform(context, file, FSYNC), Ok(0));
    }
    for (block, letter) in [(0, b'B'), (1, b'C')] {
        assert_eq!(perform(context, &file, write(block, letter)), Ok(BLOCK as u64));
    }

    let clone = File::create(&crashed).expect("a file");
    rustix::fs::ioctl_ficlone(&clone, File::open(&image).expect("the image")).expect("xfs clones");
    server.kill();
    mounted = mounted.replace(LoopDevice::over(&crashed));
    let found = std::fs::read(mounted.path().join("file")).expect("it was synced");
    assert_eq!(found, [b'A'; BLOCK], "the crash has lost nothing");
    std::fs::write(place.path("boot"), "another").expect("a file");
    let mut process = place.process();
    process.env("RAIO_TEST_BOOT_ID", place.path("boot"));
    let server = Server::spawn(process);

    assert_eq!(perform(context, &synced, FSYNC), Ok(0), "nothing of this file was lost");
    let lost = perform(context, &file, FSYNC).expect_err("writes were lost");
    assert!(lost.is_lost && !lost.is_unknown && lost.errno() == libc::EIO, "{lost:?}");
    assert!(lost.text.contains("has lost writes that were acknowledged before this fsync"), "{lost}");
    assert_eq!(perform(context, &file, FSYNC), Ok(0), "it is said once");
    assert_eq!(perform(context, &file, write(1, b'C')), Ok(BLOCK as u64));
    assert_eq!(perform(context, &file, FSYNC), Ok(0));
    let stats = context.stats();
    assert_eq!((stats.reconnects, stats.lost, stats.unknown, stats.failed), (1, 1, 0, 1));
    let found = std::fs::read(mounted.path().join("file")).expect("it was synced");
    assert_eq!(found, [[b'A'; BLOCK], [b'C'; BLOCK]].concat());
    drop(server);
}

#[test]
fn a_failed_fsync_of_one_client_is_told_once_to_each_other_that_has_written() {
    const FSYNC: Operation = Operation::Fsync { data_only: false };
    let Some(fuse) = FuseFs::mount("a failing fsync", FuseOptions::default(), &[("file", &[b'.'; BLOCK])])
    else {
        return;
    };
    let place = Place::new(&[format!("d={},rw", fuse.path().display())]);
    let server = place.start();
    let clients: Vec<_> = (0..3)
        .map(|_| {
            let session = Session::connect(&server.url(), &Options::default()).expect("a session");
            let file = session.open("/d/file", libc::O_RDWR, 0).expect("a file");
            (session.context(1).expect("a context"), file)
        })
        .collect();
    let [(one, of_one), (other, of_other), (reader, of_reader)] = &mut clients.try_into().expect("three");
    for (context, file) in [(&mut *one, &*of_one), (&mut *other, &*of_other)] {
        assert_eq!(perform(context, file, write(0, b'x')), Ok(BLOCK as u64));
    }
    fuse.fail(FuseCall::Fsync, libc::EIO);
    let failed = perform(one, of_one, FSYNC).expect_err("the disk fails");
    assert!(failed.errno() == libc::EIO && !failed.is_lost, "{failed:?}");
    fuse.mend(FuseCall::Fsync);
    let lost = perform(other, of_other, FSYNC).expect_err("nobody knows what has become of its write");
    assert!(lost.errno() == libc::EIO && lost.is_lost, "{lost:?}");
    for (context, file) in [(other, of_other), (reader, of_reader)] {
        assert_eq!(perform(context, file, FSYNC), Ok(0));
    }
}

#[test]
fn a_file_that_was_replaced_while_the_server_was_away_is_not_touched() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let path = |name: &str| directory.path().join(name);
    for name in ["replaced", "removed", "same"] {
        std::fs::write(path(name), [b'.'; BLOCK]).expect("a file");
    }
    let mut place = Place::new(&[format!("d={},rw", directory.path().display())]);
    let mut server = place.start();
    place.listen = server.listen_url();
    let session = Session::connect(&server.url(), &Options::default()).expect("a session");
    let files = ["replaced", "removed", "same"]
        .map(|name| session.open(format!("/d/{name}"), libc::O_RDWR, 0).expect("a file"));
    let mut context = session.context(4).expect("a context");
    server.kill();
    std::fs::write(path("another"), [b'o'; BLOCK]).expect("a file");
    std::fs::rename(path("another"), path("replaced")).expect("renamed");
    std::fs::remove_file(path("removed")).expect("removed");
    let _server = place.start();
    let [replaced, removed, same] = &files;
    for file in [replaced, removed] {
        for _ in 0..2 {
            let error = perform(&mut context, file, write(0, b'x')).expect_err("it is another one");
            assert!(error.errno() == libc::ESTALE && !error.is_unknown, "{error:?}");
        }
    }
    assert_eq!(perform(&mut context, same, write(0, b'x')), Ok(BLOCK as u64));
    assert_eq!(first_byte(&path("replaced")), b'o');
    assert!(!path("removed").exists());
    let again = session.open("/d/replaced", libc::O_RDWR, 0).expect("the other file");
    assert_eq!(perform(&mut context, &again, write(0, b'x')), Ok(BLOCK as u64));
    assert_eq!(first_byte(&path("replaced")), b'x');
}
