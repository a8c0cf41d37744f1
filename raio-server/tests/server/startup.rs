//! How the server starts, and what it says when it cannot.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command as Process, Output};

use raio_transport::protocol::OPEN_WRITE;

use crate::common::{NEW, Server, Variant, without};

fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } =
        Process::new(env!("CARGO_BIN_EXE_raio_server")).args(arguments).output().unwrap();
    assert!(stdout.is_empty(), "standard output is for the ready line: {}", String::from_utf8_lossy(&stdout));
    (status.code(), String::from_utf8(stderr).unwrap())
}

#[test]
fn what_makes_no_sense_is_said_and_exits_with_2() {
    for (arguments, needle) in [
        (&[][..], "--export NAME=PATH"),
        (&["--export", "x"], "NAME=PATH"),
        (&["--export", "a=/tmp,RW"], "Write `,rw`"),
        (&["--export", "a=/tmp,sync"], "ro, rw and direct"),
        (&["--export", "a=/tmp rw"], "a=/tmp,rw"),
        (&["--export", "/tmp rw"], "NAME=PATH"),
        (&["--port", "26100"], "--listen tcp://HOST:PORT"),
        (&["/tmp"], "--export NAME=PATH"),
        (
            &["--export", "a=/tmp", "--listen", "26100"],
            "--listen 26100: it is a port alone. Write tcp://127.0.0.1:26100",
        ),
        (
            &["--export", "a=/tmp", "--listen", "tcp://no-such-host.invalid"],
            "--listen tcp://no-such-host.invalid",
        ),
        (&["--export", "a=/tmp", "--listen", "tcp://0.0.0.0:0"], "--keys DIRECTORY"),
        (&["--export", "a=/tmp", "--workers=many"], "not a whole number"),
        (&["--export", "a=null:1M", "--memory", "4k"], "--memory"),
        (&["--export", "a=null:1M", "--queue-depth", "zero"], "--queue-depth"),
        (&["--no-such-option"], "--no-such-option"),
    ] {
        let (code, text) = run(arguments);
        assert_eq!(code, Some(2), "{text}");
        assert!(text.contains(needle), "{text}");
    }
}

#[test]
fn a_check_opens_the_exports_and_starts_nothing() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("tcp://{}", taken.local_addr().unwrap());
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("raio.toml");
    std::fs::write(&file, "[export.a]\npath = '/'\ncross-mounts = true\n[export.m]\nmemory = '1M'\n")
        .unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(run(&["--check", "--listen", &url, "--config", file]), (Some(0), String::new()));
    for (arguments, needle) in [
        (&["--check", "--export", "a=/no/such"][..], "/no/such"),
        (&["--check", "--export", "a=/dev/null"], "neither a directory"),
        (&["--check", "--export", "a=/proc"], "of a type that is not served"),
        (&["--check", "--export", "a=/sys/kernel"], "of a type that is not served"),
        (&["--check", "--export", "a=/proc/version"], "of a type that is not served"),
        (&["--check", "--export", "a=/sys/fs/cgroup/.."], "of a type that is not served"),
        (&["--check", "--config", file, "--workers", "0"], "--workers is 0"),
    ] {
        let (code, text) = run(arguments);
        assert_eq!(code, Some(2), "{text}");
        assert!(text.contains(needle), "{text}");
    }
    std::fs::write(file, "[export.a]\npath = '/'\nshare = true\n").unwrap();
    let (code, text) = run(&["--check", "--config", file]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains(&format!("{file}:3:1: ")) && text.contains("share"), "{text}");
    std::fs::write(file, "[export.a]\npath = '/'\ngrow = true\n").unwrap();
    let (code, text) = run(&["--check", "--config", file]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("`grow`"), "{text}");
}

#[test]
fn what_cannot_be_had_is_said_and_exits_with_1() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("tcp://{}", taken.local_addr().unwrap());
    for (arguments, needle) in [
        (&["--export", "a=null:1M", "--listen", &url][..], url.trim_start_matches("tcp://")),
        (
            &["--export", "a=null:1M", "--clear", "--listen", "tcp://192.0.2.1:0"],
            "an address of this machine",
        ),
        (&["--export", "a=null:1M", "--listen", "unix:///no/such/socket"], "The directory of a Unix socket"),
        (&["--listen", "tcp://127.0.0.1:0", "--export", "a=/no/such/directory"], "/no/such/directory"),
    ] {
        let (code, text) = run(arguments);
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains(needle), "{text}");
        assert!(text.matches("(os error ").count() <= 1, "twice: {text}");
    }
}

#[test]
fn an_address_that_is_taken_is_waited_for() {
    let taken = std::net::TcpListener::bind("127.0.0.3:0").unwrap();
    let url = format!("tcp://{}", taken.local_addr().unwrap());
    let starts = std::thread::spawn(move || Server::start(Variant::Uring, &["--listen", &url]));
    std::thread::sleep(std::time::Duration::from_millis(300));
    drop(taken);
    assert!(starts.join().unwrap().ready.contains("tcp://127.0.0.3:"));
}

#[test]
fn a_directory_that_cannot_be_used_is_an_error_at_the_start() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIPPED: only root can start the server as another user");
    }
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    let program = program_in(directory.path());
    let root = directory.path().join("root");
    std::fs::create_dir(&root).unwrap();
    std::fs::set_permissions(&root, PermissionsExt::from_mode(0o700)).unwrap();
    let export = format!("d={}", root.display());
    let mut process = Process::new(&program);
    process.args(["--listen", "tcp://127.0.0.1:0", "--export", &export]).uid(65534).gid(65534);
    let output = process.output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("searched") && text.contains("permissions"), "{text}");
}

#[test]
fn a_server_of_root_says_so_once_and_keeps_no_set_user_id_bits() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIPPED: only root keeps them");
    }
    for variant in [Variant::Uring, Variant::Threads] {
        let server = Server::start(variant, &[]);
        assert_eq!(server.log().matches("runs as root").count(), 1, "{}", server.log());
        let mut client = server.client();
        for (name, bytes) in [("aligned", 4096), ("odd", 5), ("large", 1 << 20)] {
            let path = server.path(name);
            std::fs::write(&path, "x").unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o6755)).unwrap();
            let file = client.open(&format!("/d/{name}"), OPEN_WRITE).unwrap();
            assert_eq!(client.write(file, 0, &vec![1; bytes]), Ok(bytes as u64));
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o755, "{name} {variant:?}");
        }
    }
}

#[test]
fn the_ready_line_names_every_address_with_its_port() {
    let server = Server::start(Variant::Uring, &["--listen", "tcp://127.0.0.2:0"]);
    let urls: Vec<_> = server.ready.strip_prefix("raio_server: ready on ").unwrap().split(' ').collect();
    assert_eq!(urls.len(), 2, "{}", server.ready);
    for url in urls {
        let address: std::net::SocketAddr = url.strip_prefix("tcp://").unwrap().parse().unwrap();
        assert_ne!(address.port(), 0);
        std::net::TcpStream::connect(address).unwrap();
    }
}

#[test]
fn where_io_uring_is_forbidden_it_says_so_once_with_the_remedy_and_works() {
    let server = Server::start(Variant::Forbidden, &["--workers", "3"]);
    let mut client = server.client();
    let file = client.open("/d/f", NEW).unwrap();
    assert_eq!(client.write(file, 0, b"hello"), Ok(5));
    assert_eq!(client.read(file, 0, 10).unwrap(), b"hello");
    let log = server.log();
    assert_eq!(log.matches("io_uring is not used").count(), 1, "{log}");
    assert!(log.contains("EPERM") && log.contains("seccomp") && log.contains("threads"), "{log}");
}

/// A copy of the server that everybody may run.
pub fn program_in(directory: &std::path::Path) -> std::path::PathBuf {
    std::fs::set_permissions(directory, PermissionsExt::from_mode(0o777)).unwrap();
    let program = directory.join("raio_server");
    // Not by this process: what it forks meanwhile would have the copy open for writing, and nobody could run
    // it.
    let copied =
        Process::new("cp").args([env!("CARGO_BIN_EXE_raio_server").as_ref(), program.as_os_str()]).status();
    assert!(copied.unwrap().success());
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    program
}

#[test]
fn a_system_call_that_a_sandbox_forbids_is_done_without_or_named() {
    for errno in [libc::EPERM, libc::ENOSYS] {
        for (name, call, is_needed) in [
            ("openat2", libc::SYS_openat2, true),
            ("statx", libc::SYS_statx, true),
            ("preadv2", libc::SYS_preadv2, false),
            ("pwritev2", libc::SYS_pwritev2, false),
            ("io_uring_setup", libc::SYS_io_uring_setup, false),
            ("io_uring_enter", libc::SYS_io_uring_enter, false),
            ("io_uring_register", libc::SYS_io_uring_register, false),
        ] {
            let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let export = format!("d={},rw", directory.path().display());
            let mut arguments = vec!["--listen", "tcp://127.0.0.1:0", "--workers", "1", "--export", &export];
            // A check needs the same, and ends in any case.
            arguments.extend(is_needed.then_some("--check"));
            let mut process = without(call, errno, &arguments);
            if is_needed {
                let Output { status, stderr, .. } = process.output().unwrap();
                let text = String::from_utf8(stderr).unwrap();
                assert_eq!(status.code(), Some(2), "{name}: {text}");
                assert!(text.contains(name) && text.contains("seccomp"), "{name}: {text}");
                continue;
            }
            let server = Server::spawn(process, directory);
            let log = server.log();
            assert!(name == "pwritev2" || (log.contains(name) && log.contains("seccomp")), "{name}: {log}");
            let mut client = server.client();
            let file = client.open("/d/f", NEW).unwrap();
            for len in [5, 4096, 1 << 20] {
                let bytes = vec![7; len];
                assert_eq!(client.write(file, 0, &bytes), Ok(len as u64), "{name}");
                assert_eq!(client.read(file, 0, len).unwrap(), bytes, "{name}");
            }
            assert_eq!(client.status(file).unwrap().size.get(), 1 << 20);
        }
    }
}

#[test]
fn an_ordinary_user_with_little_lockable_memory_can_run_it() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIPPED: only root can start the server as another user");
    }
    let nobody = 65534;
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    let program = program_in(directory.path());
    let export = format!("d={},rw", directory.path().display());
    let mut process = Process::new("/bin/sh");
    process
        .args(["-c", "ulimit -l 1024; exec \"$@\"", "sh"])
        .arg(&program)
        .args(["--listen", "tcp://127.0.0.1:0", "--workers", "2", "--export", &export])
        .uid(nobody)
        .gid(nobody);
    let server = Server::spawn(process, directory);
    let mut client = server.client();
    let file = client.open("/d/f", NEW).unwrap();
    assert_eq!(client.write(file, 0, b"hello"), Ok(5));
    assert_eq!(client.read(file, 0, 10).unwrap(), b"hello");
    let log = server.log();
    assert_eq!(log.matches("memlock limit is 1024 KiB").count(), 1, "{log}");
    assert!(log.contains("LimitMEMLOCK="), "{log}");
}
