//! What is served and what is not: devices, mounts, sizes. The tests that make devices or mounts need root,
//! and skip aloud without.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::time::{Duration, Instant};

use raio_transport::handshake::Offer;
use raio_transport::protocol::{
    Command, FileHandle, OPEN_DIRECT, OPEN_EXCLUSIVE, OPEN_NOFOLLOW, OPEN_READ, OPEN_TRUNCATE, OPEN_WRITE,
};
use raio_transport::transport::Bulk;
use rustix::fs::{CWD, FileType, Mode};
use tempfile::TempDir;

use crate::common::{Client, NEW, RW, Server, TIMEOUT, Variant, each, until};

/// A server with these `[export.NAME]` tables.
fn serve(tables: &str) -> Server {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let config = directory.path().join("raio.toml");
    std::fs::write(&config, tables).unwrap();
    let mut process = Process::new(env!("CARGO_BIN_EXE_raio_server"));
    process.args(["--listen", "tcp://127.0.0.1:0", "--config"]).arg(config);
    Server::spawn(process, directory)
}

fn temporary() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn needs_root(what: &str) -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("SKIPPED: {what} needs root");
    }
    is_root
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Process::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A loop device, detached when it is dropped.
struct LoopDevice {
    path: PathBuf,
    _directory: TempDir,
}

impl LoopDevice {
    fn new(bytes: u64) -> Self {
        let directory = temporary();
        let image = directory.path().join("image");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        let path = run("losetup", &["--find", "--show", image.to_str().unwrap()]).into();
        Self { path, _directory: directory }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Process::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

/// A mount, undone when it is dropped.
struct Mount(PathBuf);

impl Mount {
    fn new(arguments: &[&str], at: &Path) -> Self {
        run("mount", &[arguments, &[at.to_str().unwrap()]].concat());
        Self(at.into())
    }

    /// Of a new file system.
    fn of(device: &LoopDevice, kind: &str, at: &Path) -> Self {
        let device = device.path.to_str().unwrap();
        run(&format!("mkfs.{kind}"), &["-q", "-F", device]);
        Self::new(&["-t", kind, device], at)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Process::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// The error message of an open that fails.
fn why(client: &mut Client, path: &str, flags: u32) -> (i32, String) {
    let reply = client.call(&Command::Open { flags, mode: 0o644, path: path.as_bytes() }, Bulk::None);
    (reply.status.errno, String::from_utf8_lossy(&reply.body).into_owned())
}

fn zero(client: &mut Client, file: FileHandle, offset: u64, length: u64) -> Result<u64, i32> {
    client.do_it(&Command::WriteZeroes { file, offset, length })
}

#[test]
fn a_local_writer_on_a_fifo_is_not_released_by_clients() {
    each(|variant| {
        let server = Server::start(variant, &[]);
        let fifo = server.path("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let writer = std::thread::spawn({
            let fifo = fifo.clone();
            move || File::options().write(true).open(fifo).unwrap().write_all(b"for the reader").unwrap()
        });
        let mut client = server.client();
        for flags in [OPEN_READ, OPEN_WRITE, RW, NEW, NEW | OPEN_TRUNCATE, RW | OPEN_NOFOLLOW] {
            assert_eq!(client.open("/d/fifo", flags), Err(libc::ENODEV), "{flags:#x}");
        }
        assert_eq!(client.open("/d/fifo", NEW | OPEN_EXCLUSIVE), Err(libc::EEXIST));
        let mut message = String::new();
        File::open(&fifo).unwrap().read_to_string(&mut message).unwrap();
        assert_eq!(message, "for the reader");
        writer.join().unwrap();
    });
}

#[test]
fn creation_does_what_open_2_does() {
    each(|variant| {
        let server = Server::start(variant, &[]);
        let mut client = server.client();
        std::fs::create_dir(server.path("directory")).unwrap();
        std::fs::write(server.path("old"), "old").unwrap();
        symlink("old", server.path("to-old")).unwrap();
        symlink("directory/made", server.path("dangling")).unwrap();
        symlink("../made-above", server.path("directory/up")).unwrap();
        symlink("nowhere/made", server.path("lost")).unwrap();
        symlink("../outside", server.path("out")).unwrap();
        symlink("/tmp/outside", server.path("absolute")).unwrap();
        symlink("loop", server.path("loop")).unwrap();
        for (path, flags, expected) in [
            ("/d/old", NEW | OPEN_EXCLUSIVE, Err(libc::EEXIST)),
            ("/d/to-old", NEW | OPEN_EXCLUSIVE, Err(libc::EEXIST)),
            ("/d/to-old", NEW | OPEN_NOFOLLOW, Err(libc::ELOOP)),
            ("/d/dangling", NEW | OPEN_EXCLUSIVE, Err(libc::EEXIST)),
            ("/d/dangling", NEW | OPEN_NOFOLLOW, Err(libc::ELOOP)),
            ("/d/dangling", RW, Err(libc::ENOENT)),
            ("/d/lost", NEW, Err(libc::ENOENT)),
            ("/d/out", NEW, Err(libc::EXDEV)),
            ("/d/absolute", NEW, Err(libc::EXDEV)),
            ("/d/loop", NEW, Err(libc::ELOOP)),
            ("/d/directory", NEW, Err(libc::EISDIR)),
            ("/d/new/", NEW, Err(libc::EISDIR)),
            ("/d/old/", NEW, Err(libc::EISDIR)),
            ("/d/old/", RW, Err(libc::ENOTDIR)),
            ("/d/old/new", NEW, Err(libc::ENOTDIR)),
            ("/d/none/new", NEW, Err(libc::ENOENT)),
            ("/d/to-old", NEW, Ok(3)),
            ("/d/dangling", NEW, Ok(0)),
            ("/d/directory/up", NEW, Ok(0)),
            ("/d/new", NEW | OPEN_EXCLUSIVE, Ok(0)),
            ("/d/to-old", NEW | OPEN_TRUNCATE, Ok(0)),
        ] {
            let result = client.open_as(path, flags, 0o640).map(|(_, status)| status.size.get());
            assert_eq!(result, expected, "{path} {flags:#x}");
        }
        for made in ["directory/made", "made-above", "new"] {
            assert_eq!(server.path(made).metadata().unwrap().permissions().mode() & 0o777, 0o640, "{made}");
        }
        assert!(!server.directory.path().with_file_name("outside").exists());
        assert!(why(&mut client, "/d/absolute", OPEN_READ).1.contains("absolute symbolic link"));
    });
}

/// A process that holds leases on files, until its standard input ends. It gives them up when it is asked to,
/// if `on_request`.
fn lease_holder(paths: &[PathBuf], on_request: bool) -> Child {
    // A signal writes into the pipe at once. Python runs a handler only between two of its instructions, so
    // one that came right before a blocking read would wait for ever.
    let holder = "import fcntl, os, select, signal, sys\n\
                  fds = [os.open(path, os.O_RDWR) for path in sys.argv[2:]]\n\
                  lease = lambda kind: [fcntl.fcntl(fd, fcntl.F_SETLEASE, kind) for fd in fds]\n\
                  requested, request = os.pipe()\n\
                  os.set_blocking(request, False)\n\
                  signal.set_wakeup_fd(request)\n\
                  signal.signal(signal.SIGIO, lambda *_: None)\n\
                  lease(fcntl.F_WRLCK)\n\
                  print('held', flush=True)\n\
                  while sys.stdin not in select.select([sys.stdin, requested], [], [])[0]:\n\
                  \tos.read(requested, 99)\n\
                  \tif sys.argv[1] == 'true':\n\
                  \t\tlease(fcntl.F_UNLCK)\n";
    let mut python = Process::new("python3");
    python.args(["-c", holder, &on_request.to_string()]).args(paths);
    let mut python = python.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python3 runs");
    let mut line = String::new();
    BufReader::new(python.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "held\n");
    python
}

#[test]
fn an_open_waits_for_the_holder_of_a_lease() {
    each(|variant| {
        let server = Server::start(variant, &[]);
        std::fs::write(server.path("leased"), "leased").unwrap();
        for flags in [OPEN_READ, RW | OPEN_TRUNCATE] {
            let mut holder = lease_holder(&[server.path("leased")], true);
            let opened = server.client().open("/d/leased", flags);
            drop(holder.stdin.take());
            holder.wait().unwrap();
            assert!(opened.is_ok(), "{opened:?}");
        }
    });
}

#[test]
fn opens_that_wait_for_the_holder_of_a_lease_hold_up_no_other_open() {
    each(|variant| {
        let server = Server::start(variant, &[]);
        let leased: Vec<_> = (0..10).map(|n| server.path(&n.to_string())).collect();
        leased.iter().for_each(|path| std::fs::write(path, "leased").unwrap());
        let mut holder = lease_holder(&leased, false);
        std::fs::write(server.path("other"), "other").unwrap();
        let mut waits = server.client();
        let tags: Vec<_> = (0..40)
            .map(|n| {
                let path = format!("/d/{}", n % leased.len());
                waits.send(&Command::Open { flags: RW, mode: 0, path: path.as_bytes() }, Bulk::None).0
            })
            .collect();
        std::thread::sleep(Duration::from_millis(200));
        let started = Instant::now();
        let mut client = server.client();
        let other = client.open("/d/other", OPEN_READ).unwrap();
        assert_eq!(client.status(other).unwrap().size.get(), 5);
        let lease_break_time: u64 = std::fs::read_to_string("/proc/sys/fs/lease-break-time")
            .ok()
            .and_then(|seconds| seconds.trim().parse().ok())
            .unwrap_or(45);
        assert!(started.elapsed().as_secs() < lease_break_time / 4, "it took {:?}", started.elapsed());
        drop(holder.stdin.take());
        holder.wait().unwrap();
        for tag in tags {
            assert!(waits.wait(tag).status.is_ok());
        }
    });
}

#[test]
fn a_low_limit_on_processes_cancels_nothing() {
    if !needs_root("running the server as another user") {
        return;
    }
    // Nobody else's, for threads are counted by user.
    let user = 54_321;
    let directory =
        tempfile::Builder::new().permissions(PermissionsExt::from_mode(0o777)).tempdir_in("/tmp").unwrap();
    let program = directory.path().join("raio_server");
    run("cp", &[env!("CARGO_BIN_EXE_raio_server"), program.to_str().unwrap()]);
    for variant in ["uring", "threads"] {
        let export = directory.path().join(variant);
        std::fs::create_dir(&export).unwrap();
        std::os::unix::fs::chown(&export, Some(user), None).unwrap();
        let mut process = Process::new("prlimit");
        process.args(["--nproc=8", "setpriv", "--clear-groups"]);
        process.args([format!("--reuid={user}"), format!("--regid={user}")]);
        process.arg(&program).args(["--backend", variant, "--workers", "1", "--listen", "tcp://127.0.0.1:0"]);
        process.args(["--export", &format!("d={},rw", export.display())]);
        let server = Server::spawn(process, temporary());
        let mut client = server.client();
        let tags: Vec<_> = (0..64)
            .map(|i| {
                let path = format!("/d/{i}");
                client.send(&Command::Open { flags: NEW, mode: 0o644, path: path.as_bytes() }, Bulk::None).0
            })
            .collect();
        for tag in tags {
            let reply = client.wait(tag);
            assert!(reply.status.is_ok(), "{variant}: {reply:?}\n{}", server.log());
            let file = FileHandle(reply.result as u32);
            assert_eq!(client.write(file, 0, b"x"), Ok(1));
            client.fsync(file, false).unwrap();
        }
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.child.id())).unwrap();
        let limit = limits.lines().find(|line| line.starts_with("Max processes")).unwrap();
        assert_eq!(limit.split_whitespace().nth(2), Some("8"), "{limits}");
    }
}

#[test]
fn the_state_of_processes_is_not_served_though_it_lies_beneath_an_export() {
    let server = serve(
        "[export.root]\npath = '/'\naccess = 'rw'\n\
         [export.all]\npath = '/'\naccess = 'rw'\ncross-mounts = true\n",
    );
    let mut client = server.client();
    let pid = server.child.id();
    for export in ["root/proc", "all/proc"] {
        for file in ["mem", "environ", "maps"] {
            for process in ["self", &pid.to_string()] {
                let path = format!("/{export}/{process}/{file}");
                for flags in [OPEN_READ, RW, NEW] {
                    assert_eq!(client.open(&path, flags), Err(libc::EXDEV), "{path}");
                }
            }
        }
    }
    // Magic links: they would lead to whatever the process has open, or to its root.
    for path in ["root/etc/passwd", "cwd/x", "exe", "fd/0"] {
        let errno = client.open(&format!("/all/proc/self/{path}"), OPEN_READ).unwrap_err();
        assert!(matches!(errno, libc::ELOOP | libc::EXDEV), "{path}: {errno}");
    }
    for path in ["/root/sys/kernel/mm/transparent_hugepage/enabled", "/all/sys/kernel/uevent_seqnum"] {
        assert_eq!(client.open(path, OPEN_READ), Err(libc::EXDEV), "{path}");
    }
    assert_eq!(client.open("/all/dev/zero", OPEN_READ), Err(libc::ENODEV));
}

#[test]
fn nothing_is_created_on_a_file_system_that_is_not_served() {
    if !needs_root("mounting") {
        return;
    }
    let directory = temporary();
    let queues = directory.path().join("queues");
    std::fs::create_dir(&queues).unwrap();
    let mounted = Process::new("mount").args(["-t", "mqueue", "none"]).arg(&queues).status().unwrap();
    if !mounted.success() {
        return eprintln!("SKIPPED: this kernel has no message queues");
    }
    let _mount = Mount(queues.clone());
    let path = directory.path().display();
    let server = serve(&format!("[export.d]\npath = '{path}'\naccess = 'rw'\ncross-mounts = true\n"));
    // Others have queues there, too.
    let new = format!("raio-test-{}", std::process::id());
    symlink(format!("queues/{new}"), directory.path().join("link")).unwrap();
    let (mut client, mut opened) = (server.client(), Vec::new());
    for file in [&*format!("queues/{new}"), &*format!("queues/../queues/{new}"), "link"] {
        for flags in [NEW, NEW | OPEN_EXCLUSIVE] {
            // With O_EXCL the link itself is in the way.
            let expected = if file == "link" && flags != NEW { libc::EEXIST } else { libc::EXDEV };
            opened.push((file.to_owned(), flags, client.open(&format!("/d/{file}"), flags), Err(expected)));
        }
    }
    let removed = std::fs::remove_file(queues.join(new)).map_err(|error| error.kind());
    assert_eq!(removed, Err(std::io::ErrorKind::NotFound), "it was created");
    for (file, flags, result, expected) in opened {
        assert_eq!(result, expected, "{file} {flags:#x}");
    }
}

#[test]
fn mounts_beneath_an_export_are_crossed_only_if_that_is_asked_for() {
    if !needs_root("mounting") {
        return;
    }
    let directory = temporary();
    let beneath = directory.path().join("beneath");
    std::fs::create_dir(&beneath).unwrap();
    let _mount = Mount::new(&["-t", "tmpfs", "none"], &beneath);
    std::fs::write(beneath.join("file"), "x").unwrap();
    let path = directory.path().display();
    let server = serve(&format!(
        "[export.in]\npath = '{path}'\naccess = 'rw'\n\
         [export.over]\npath = '{path}'\naccess = 'rw'\ncross-mounts = true\n"
    ));
    let mut client = server.client();
    for (file, flags) in [("file", OPEN_READ), ("new", NEW), ("new", NEW | OPEN_EXCLUSIVE)] {
        let (errno, text) = why(&mut client, &format!("/in/beneath/{file}"), flags);
        assert!(errno == libc::EXDEV && text.contains("cross-mounts"), "{errno}: {text}");
    }
    assert!(!beneath.join("new").exists());
    assert!(client.open("/over/beneath/file", RW).is_ok());
    assert!(client.open("/over/beneath/new", NEW).is_ok());
}

#[test]
fn a_device_export_never_becomes_a_file() {
    if !needs_root("a loop device") {
        return;
    }
    let device = LoopDevice::new(1 << 20);
    let directory = temporary();
    let node = directory.path().join("disk");
    let make = || {
        let number = device.path.metadata().unwrap().rdev();
        rustix::fs::mknodat(CWD, &node, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, number).unwrap();
    };
    make();
    symlink("disk", directory.path().join("by-id")).unwrap();
    let path = directory.path().display();
    let server = serve(&format!(
        "[export.disk]\npath = '{path}/disk'\naccess = 'rw'\n\
         [export.link]\npath = '{path}/by-id'\naccess = 'rw'\n\
         [export.no]\npath = '{path}'\naccess = 'rw'\n\
         [export.yes]\npath = '{path}'\naccess = 'rw'\ndevices = true\n"
    ));
    let mut client = server.client();
    let all = ["/disk", "/link", "/yes/disk"];
    for path in all {
        let (file, status) = client.open_as(path, NEW | OPEN_TRUNCATE, 0o644).unwrap();
        assert_eq!(status.size.get(), 1 << 20, "{path}");
        client.close(file).unwrap();
        assert_eq!(client.open(path, NEW | OPEN_EXCLUSIVE), Err(libc::EEXIST), "{path}");
    }
    let (errno, text) = why(&mut client, "/no/disk", OPEN_READ);
    assert!(errno == libc::ENODEV && text.contains("devices"), "{text}");
    std::fs::remove_file(&node).unwrap();
    for path in ["/disk", "/link"] {
        for flags in [OPEN_READ, RW, NEW, NEW | OPEN_TRUNCATE, NEW | OPEN_EXCLUSIVE] {
            assert_eq!(client.open(path, flags), Err(libc::ENXIO), "{path} {flags:#x}");
        }
    }
    assert!(!node.exists());
    // Something else in its place.
    std::fs::write(&node, "a file").unwrap();
    for path in ["/disk", "/link"] {
        assert_eq!(client.open(path, NEW | OPEN_TRUNCATE), Err(libc::ENXIO), "{path}");
    }
    assert_eq!(std::fs::read(&node).unwrap(), b"a file");
    std::fs::remove_file(&node).unwrap();
    make();
    for path in all {
        assert!(client.open(path, RW).is_ok(), "{path}");
    }
}

#[test]
fn a_file_export_whose_target_changes_its_type_is_not_served() {
    let directory = temporary();
    let image = directory.path().join("image");
    std::fs::write(&image, "image").unwrap();
    std::fs::write(directory.path().join("other"), "other").unwrap();
    // Which would not open what takes the place of the file.
    let off = ["--sandbox=off", "--export", &format!("i={},rw", image.display())];
    let server = Server::start(Variant::Uring, &off);
    let mut client = server.client();
    std::fs::remove_file(&image).unwrap();
    assert_eq!(client.open("/i", RW), Err(libc::ENOENT));
    symlink("other", &image).unwrap();
    assert_eq!(client.open("/i", NEW | OPEN_TRUNCATE), Err(libc::ELOOP));
    std::fs::remove_file(&image).unwrap();
    std::fs::create_dir(&image).unwrap();
    assert_eq!(client.open("/i", NEW), Err(libc::EISDIR));
    std::fs::remove_dir(&image).unwrap();
    rustix::fs::mknodat(CWD, &image, FileType::Fifo, Mode::RUSR, 0).unwrap();
    assert_eq!(client.open("/i", OPEN_READ), Err(libc::ENODEV));
    assert_eq!(std::fs::read(directory.path().join("other")).unwrap(), b"other");
    std::fs::remove_file(&image).unwrap();
    assert!(client.open("/i", NEW).is_ok());
    assert!(image.is_file());
}

#[test]
fn a_changed_root_is_noticed_and_a_recreated_one_works() {
    let directory = temporary();
    let root = directory.path().join("root");
    std::fs::create_dir(&root).unwrap();
    std::fs::write(root.join("f"), "first").unwrap();
    // Which would not open what takes the place of the directory: see `sandbox`.
    let off = ["--sandbox=off", "--export", &format!("r={},rw", root.display())];
    let server = Server::start(Variant::Uring, &off);
    let mut client = server.client();
    let mut content = |expected: &[u8]| {
        let file = client.open("/r/f", OPEN_READ).unwrap();
        assert_eq!(client.read(file, 0, 100).unwrap(), expected);
    };
    // The log is written behind the server's back.
    let noticed = |times| {
        until(
            || format!("not {times} times in the log:\n{}", server.log()),
            || server.log().matches("another directory").count() == times,
        );
    };
    content(b"first");
    noticed(0);
    // Made while the old one is there, so that it does not have its inode number.
    let next = directory.path().join("next");
    std::fs::create_dir(&next).unwrap();
    std::fs::write(next.join("f"), "second").unwrap();
    std::fs::remove_dir_all(&root).unwrap();
    assert_eq!(server.client().open("/r/f", NEW), Err(libc::ENOENT));
    std::fs::rename(&next, &root).unwrap();
    content(b"second");
    noticed(1);
    if needs_root("mounting") {
        let mount = Mount::new(&["-t", "tmpfs", "none"], &root);
        std::fs::write(root.join("f"), "mounted").unwrap();
        content(b"mounted");
        noticed(2);
        drop(mount);
        content(b"second");
    }
}

#[test]
fn an_export_of_a_mount_point_is_served_only_while_something_is_mounted() {
    if !needs_root("mounting") {
        return;
    }
    let directory = temporary();
    let root = directory.path().join("root");
    std::fs::create_dir(&root).unwrap();
    std::fs::write(root.join("f"), "below").unwrap();
    let path = root.display();
    let server = serve(&format!("[export.m]\npath = '{path}'\naccess = 'rw'\nmountpoint = true\n"));
    let mut client = server.client();
    for _ in 0..2 {
        for flags in [OPEN_READ, NEW] {
            let (errno, text) = why(&mut client, "/m/f", flags);
            assert!(errno == libc::ENXIO && text.contains("mount"), "{errno}: {text}");
        }
        let mount = Mount::new(&["-t", "tmpfs", "none"], &root);
        let file = client.open("/m/f", NEW).unwrap();
        assert_eq!(client.write(file, 0, b"above"), Ok(5));
        client.close(file).unwrap();
        drop(mount);
    }
    assert_eq!(std::fs::read(root.join("f")).unwrap(), b"below");
    // A directory bound to itself is a mount point too.
    let _mount = Mount::new(&["--bind", root.to_str().unwrap()], &root);
    assert!(client.open("/m/f", OPEN_READ).is_ok());
}

#[test]
fn files_do_not_grow_beyond_what_the_configuration_says() {
    const MIB: u64 = 1 << 20;
    let directory = temporary();
    let path = |name: &str| directory.path().join(name);
    for name in ["fixed", "grows", "old"] {
        std::fs::write(path(name), vec![1; MIB as usize]).unwrap();
    }
    let d = directory.path().display();
    let server = serve(&format!(
        "[export.fixed]\npath = '{d}/fixed'\naccess = 'rw'\n\
         [export.grows]\npath = '{d}/grows'\naccess = 'rw'\ngrow = true\n\
         [export.d]\npath = '{d}'\naccess = 'rw'\nmax-file-size = 524288\n"
    ));
    let mut client = server.client();
    let fixed = client.open("/fixed", RW).unwrap();
    assert_eq!(client.write(fixed, MIB - 1, b"x"), Ok(1));
    assert_eq!(client.write(fixed, MIB - 1, b"xx"), Err(libc::ENOSPC));
    assert_eq!(zero(&mut client, fixed, 0, 1 << 40), Err(libc::ENOSPC));
    assert_eq!(zero(&mut client, fixed, MIB, 1), Err(libc::ENOSPC));
    assert_eq!(path("fixed").metadata().unwrap().len(), MIB);
    // Emptied, it may become as large as it was; made larger here, it may be written to its end.
    let fixed = client.open("/fixed", NEW | OPEN_TRUNCATE).unwrap();
    assert_eq!(client.write(fixed, MIB - 1, b"x"), Ok(1));
    assert_eq!(client.write(fixed, MIB, b"x"), Err(libc::ENOSPC));
    File::options().write(true).open(path("fixed")).unwrap().set_len(2 * MIB).unwrap();
    let fixed = client.open("/fixed", RW).unwrap();
    assert_eq!(client.write(fixed, 2 * MIB - 1, b"x"), Ok(1));
    assert_eq!(client.write(fixed, 2 * MIB, b"x"), Err(libc::ENOSPC));

    let grows = client.open("/grows", RW).unwrap();
    assert_eq!(client.write(grows, 2 * MIB, b"x"), Ok(1));
    assert_eq!(zero(&mut client, grows, 2 * MIB, MIB), Ok(0));
    assert_eq!(path("grows").metadata().unwrap().len(), 3 * MIB);

    let new = client.open("/d/new", NEW).unwrap();
    assert_eq!(client.write(new, MIB / 2 - 1, b"x"), Ok(1));
    assert_eq!(client.write(new, MIB / 2 - 1, b"xx"), Err(libc::EFBIG));
    assert_eq!(zero(&mut client, new, 0, MIB / 2 + 1), Err(libc::EFBIG));
    assert_eq!(path("new").metadata().unwrap().len(), MIB / 2);
    let old = client.open("/d/old", RW).unwrap();
    assert_eq!(client.write(old, MIB / 2, b"x"), Err(libc::EFBIG));
}

/// Zeroes odd and even ranges of a file that has 200,000 bytes of `0xaa`, as a client and in a model, and
/// compares.
fn zeroes_like_the_model(client: &mut Client, open: &str, flags: u32, local: &Path, may_grow: bool) {
    let mut model = vec![0xaa; 200_000];
    File::options().write(true).open(local).unwrap().write_all_at(&model, 0).unwrap();
    let file = client.open(open, flags).unwrap();
    let mut ranges = vec![(0, 1), (4095, 2), (8192, 4096), (10_000, 512), (20_000, 100_001), (199_999, 1)];
    if may_grow {
        ranges.extend([(199_000, 2_000), (300_000, 5), (310_000, 70_000)]);
    }
    for (offset, length) in ranges {
        assert_eq!(zero(client, file, offset, length), Ok(0), "{open} {flags:#x}: {offset} {length}");
        let (start, end) = (offset as usize, (offset + length) as usize);
        model.resize(model.len().max(end), 0);
        model[start..end].fill(0);
    }
    client.fsync(file, false).unwrap();
    let mut found = vec![1; model.len()];
    let size = client.status(file).unwrap().size.get();
    assert!(!may_grow || size == model.len() as u64, "{open}: {size}");
    File::open(local).unwrap().read_exact_at(&mut found, 0).unwrap();
    assert!(found == model, "{open} {flags:#x}");
    client.close(file).unwrap();
}

#[test]
fn zeroed_ranges_read_as_zeros_whatever_the_file_system_or_device_can() {
    if !needs_root("mounting") {
        return;
    }
    let directory = temporary();
    let at = |name: &str| {
        let path = directory.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let file_systems = ["tmpfs", "ramfs", "ext2", "ext4"].map(|name| (name, at(name)));
    let disks = [LoopDevice::new(16 << 20), LoopDevice::new(16 << 20)];
    let _mounts = [
        Mount::new(&["-t", "tmpfs", "none"], &file_systems[0].1),
        Mount::new(&["-t", "ramfs", "none"], &file_systems[1].1),
        Mount::of(&disks[0], "ext2", &file_systems[2].1),
        Mount::of(&disks[1], "ext4", &file_systems[3].1),
    ];
    let device = LoopDevice::new(1 << 20);
    let exports: Vec<_> = file_systems
        .iter()
        .map(|(name, path)| (*name, path))
        .chain([("device", &device.path)])
        .flat_map(|(name, path)| ["--export".into(), format!("{name}={},rw", path.display())])
        .collect();
    let exports: Vec<_> = exports.iter().map(String::as_str).collect();
    for variant in [Variant::Uring, Variant::Threads] {
        let server = Server::start(variant, &exports);
        let mut client = server.client();
        for (name, path) in &file_systems {
            let local = path.join("f");
            for flags in [RW, RW | OPEN_DIRECT] {
                let _ = std::fs::remove_file(&local);
                std::fs::write(&local, "").unwrap();
                if flags & OPEN_DIRECT != 0 && client.open(&format!("/{name}/f"), flags).is_err() {
                    continue;
                }
                zeroes_like_the_model(&mut client, &format!("/{name}/f"), flags, &local, true);
            }
            let file = client.open(&format!("/{name}/f"), RW).unwrap();
            let discarded = client.do_it(&Command::Discard { file, offset: 0, length: 1 << 50 });
            // ext2 is ext4's driver on some kernels, and then has holes.
            assert!(
                discarded == Ok(0) && *name != "ramfs"
                    || discarded == Err(libc::EOPNOTSUPP) && *name != "ext4",
                "{name}: {discarded:?}"
            );
            if discarded.is_ok() {
                assert_eq!(client.read(file, 0, 100_000).unwrap(), vec![0; 100_000], "{name}");
            }
            // A huge range ends soon, and what there is no room for leaves neither a longer file nor less
            // room.
            let free = || rustix::fs::statvfs(path).unwrap().f_bfree;
            let (size, before) = (local.metadata().unwrap().len(), free());
            for (offset, length) in [(size, 40 << 20), (100, 1 << 40), (0, (1 << 62) + 1)] {
                let started = Instant::now();
                let reply = client.call(&Command::WriteZeroes { file, offset, length }, Bulk::None);
                assert!(started.elapsed() < TIMEOUT / 2, "{name}: {length} took {:?}", started.elapsed());
                if reply.status.is_ok() {
                    assert_eq!(local.metadata().unwrap().len(), offset + length, "{name}");
                    File::options().write(true).open(&local).unwrap().set_len(size).unwrap();
                    continue;
                }
                assert!(matches!(reply.status.errno, libc::ENOSPC | libc::EFBIG), "{name}: {reply:?}");
                assert!(reply.result <= size - offset, "{name}: {reply:?}");
                assert_eq!(local.metadata().unwrap().len(), size, "{name} {length}");
                // But for a few blocks of the file system's own.
                assert!(free() + 64 >= before, "{name} {length}: {} of {before} blocks", free());
            }
        }
        for flags in [RW, RW | OPEN_DIRECT] {
            zeroes_like_the_model(&mut client, "/device", flags, &device.path, false);
            let file = client.open("/device", flags).unwrap();
            assert_eq!(zero(&mut client, file, (1 << 20) - 5, 6), Err(libc::ENOSPC));
            assert_eq!(client.do_it(&Command::Discard { file, offset: 1, length: 5 }), Err(libc::EOPNOTSUPP));
        }
    }
}

/// A server of a new ext4 that has one file.
fn serve_ext4(bytes: u64, content: &[u8]) -> (Server, Mount, LoopDevice, TempDir) {
    let (directory, disk) = (temporary(), LoopDevice::new(bytes));
    let mount = Mount::of(&disk, "ext4", directory.path());
    std::fs::write(directory.path().join("f"), content).unwrap();
    let server =
        Server::start(Variant::Uring, &["--export", &format!("m={},rw", directory.path().display())]);
    (server, mount, disk, directory)
}

#[test]
fn a_file_system_that_is_mounted_anew_is_another_one_to_the_sandbox() {
    if !needs_root("mounting") {
        return;
    }
    let (server, mount, disk, directory) = serve_ext4(64 << 20, b"x");
    if !server.log_until("The sandbox is on").contains("Landlock (ABI") {
        return eprintln!("SKIPPED: this kernel has no Landlock");
    }
    let mut client = server.client();
    let file = client.open("/m/f", OPEN_READ).unwrap();
    client.close(file).unwrap();
    until(
        || "it is in use".into(),
        || Process::new("umount").arg(directory.path()).status().unwrap().success(),
    );
    drop(mount); // which finds it done
    let _mount = Mount::new(&["-t", "ext4", disk.path.to_str().unwrap()], directory.path());
    let (errno, text) = why(&mut client, "/m/f", OPEN_READ);
    assert!(errno == libc::EACCES && text.contains("sandbox"), "{errno}: {text}");
}

#[test]
fn zeroing_that_fails_cuts_off_nothing_that_others_append() {
    if !needs_root("mounting") {
        return;
    }
    const APPEND: u64 = 64 << 10;
    let (server, _mount, _disk, directory) = serve_ext4(64 << 20, b"");
    let (address, until) = (server.address, Instant::now() + Duration::from_secs(2));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut client = Client::connect(address, &Offer::new("zeroes"));
            let file = client.open("/m/f", RW).unwrap();
            while Instant::now() < until {
                let zeroes = Command::WriteZeroes { file, offset: 0, length: 1 << 40 };
                let tags = [(); 4].map(|()| client.send(&zeroes, Bulk::None).0);
                assert!(tags.map(|tag| client.wait(tag).status.errno) == [libc::ENOSPC; 4]);
            }
        });
        let mut client = server.client();
        let file = client.open("/m/f", RW).unwrap();
        let mut lost = 0;
        for n in (0..256).cycle().take_while(|_| Instant::now() < until) {
            if n == 0 {
                client.open("/m/f", RW | OPEN_TRUNCATE).unwrap();
            }
            assert_eq!(client.write(file, n * APPEND, &[7; APPEND as usize]), Ok(APPEND));
            lost += u32::from(directory.path().join("f").metadata().unwrap().len() < (n + 1) * APPEND);
        }
        assert_eq!(lost, 0, "appends that were answered and then cut off");
    });
}

#[test]
fn zeroing_that_its_client_gives_up_leaves_no_storage_beyond_the_end() {
    if !needs_root("mounting") {
        return;
    }
    let (mut server, _mount, _disk, directory) = serve_ext4(6 << 30, &[1; 4096]);
    let local = directory.path().join("f");
    for ms in 0..8 {
        let mut client = server.client();
        let file = client.open("/m/f", RW).unwrap();
        client.send(&Command::WriteZeroes { file, offset: 0, length: 5 << 30 }, Bulk::None);
        std::thread::sleep(Duration::from_millis(ms));
        drop(client);
        server.stats_until("idle", |stats| stats.is_idle());
        let status = local.metadata().unwrap();
        // But for a block of the file system's own.
        assert!(status.blocks() * 512 <= status.len() + 8192, "{ms}: {} {}", status.len(), status.blocks());
        File::options().write(true).open(&local).unwrap().set_len(4096).unwrap();
    }
}

#[test]
fn zeroing_leaves_the_last_blocks_to_others_whoever_the_server_is() {
    if !needs_root("running the server as another user") {
        return;
    }
    let user = 54_321;
    let (directory, disk) = (temporary(), LoopDevice::new(64 << 20));
    let mounted = directory.path().join("m");
    std::fs::create_dir(&mounted).unwrap();
    // Half of it is root's reserve.
    run("mkfs.ext4", &["-q", "-F", "-m", "50", disk.path.to_str().unwrap()]);
    let _mount = Mount::new(&["-t", "ext4", disk.path.to_str().unwrap()], &mounted);
    std::os::unix::fs::chown(&mounted, Some(user), None).unwrap();
    let program = directory.path().join("raio_server");
    run("cp", &[env!("CARGO_BIN_EXE_raio_server"), program.to_str().unwrap()]);
    let mut process = Process::new("setpriv");
    process.args(["--clear-groups", &format!("--reuid={user}"), &format!("--regid={user}")]).arg(program);
    process.args(["--listen", "tcp://127.0.0.1:0", "--export", &format!("m={},rw", mounted.display())]);
    let server = Server::spawn(process, directory);
    let mut client = server.client();
    let file = client.open("/m/f", NEW).unwrap();
    let available = || {
        let fs = rustix::fs::statvfs(&mounted).unwrap();
        fs.f_bavail * fs.f_frsize
    };
    let before = available();
    assert_eq!(zero(&mut client, file, 0, before + (4 << 20)), Err(libc::ENOSPC));
    assert_eq!((mounted.join("f").metadata().unwrap().len(), available()), (0, before));
    assert_eq!(zero(&mut client, file, 0, before / 2), Ok(0));
}
