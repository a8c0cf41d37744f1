//! What a server gives up before it serves, and that it serves all the same.

use std::collections::HashMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command as Process;

use raio_transport::protocol::OPEN_READ;
use tempfile::TempDir;

use crate::common::{NEW, Server, Variant, without};
use crate::startup::program_in;

/// A user that each Debian has.
const ORDINARY: u32 = 65534;

fn temporary() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn is_root(what: &str) -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("SKIPPED: {what} needs root");
    }
    is_root
}

/// Whether the log says that there is Landlock; a test that needs it says that it is skipped.
fn has_landlock(server: &Server) -> bool {
    let has = server.log_until("The sandbox is on").contains("Landlock (ABI");
    if !has {
        eprintln!("SKIPPED: this kernel has no Landlock");
    }
    has
}

/// The status of each thread of a process, by key.
fn threads(server: &Server) -> Vec<HashMap<String, String>> {
    let tasks = Path::new("/proc").join(server.child.id().to_string()).join("task").read_dir().unwrap();
    let status = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("status")).ok();
    let parsed = |status: String| {
        let lines = status.lines().filter_map(|line| line.split_once(':'));
        lines.map(|(key, value)| (key.to_owned(), value.trim().replace('\t', " "))).collect()
    };
    tasks.filter_map(|task| status(task.unwrap())).map(parsed).collect()
}

/// Writes a file, reads it back, and closes it.
fn serves(server: &Server) {
    let mut client = server.client();
    let file = client.open("/d/new", NEW).unwrap();
    assert_eq!(client.write(file, 0, b"hello"), Ok(5));
    client.fsync(file, false).unwrap();
    assert_eq!(client.read(file, 0, 10).unwrap(), b"hello");
    client.close(file).unwrap();
}

#[test]
fn every_thread_is_without_capabilities_and_filtered_and_the_server_serves() {
    for variant in [Variant::Uring, Variant::Threads, Variant::Forbidden] {
        let server = Server::start(variant, &["--sandbox=on"]);
        serves(&server);
        let threads = threads(&server);
        assert!(threads.len() > 5, "{} threads", threads.len());
        for status in threads {
            for key in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
                assert_eq!(status[key], "0000000000000000", "{key} {status:?}");
            }
            assert_eq!((&*status["NoNewPrivs"], &*status["Seccomp"]), ("1", "2"), "{status:?}");
        }
        let log = server.log();
        assert_eq!(log.matches("The sandbox is on").count(), 1, "{log}");
        assert_eq!(log.contains("restricted rings"), variant != Variant::Forbidden, "{log}");
    }
}

#[test]
fn without_a_sandbox_it_warns_and_keeps_what_it_has() {
    let server = Server::start(Variant::Uring, &["--sandbox=off"]);
    serves(&server);
    let log = server.log();
    assert!(log.contains("WARN The sandbox is off (--sandbox=off)"), "{log}");
    assert!(!log.contains("The sandbox is on"), "{log}");
    // A test puts a filter on each worker.
    let main = &threads(&server)[0];
    assert_eq!((&*main["NoNewPrivs"], &*main["Seccomp"]), ("0", "0"), "{main:?}");
}

#[test]
fn what_the_kernel_lacks_is_said_in_one_line_and_the_rest_is_on() {
    for errno in [libc::ENOSYS, libc::EOPNOTSUPP] {
        let directory = temporary();
        let export = format!("d={},rw", directory.path().display());
        let arguments = ["--listen", "tcp://127.0.0.1:0", "--export", &export];
        let server = Server::spawn(without(libc::SYS_landlock_create_ruleset, errno, &arguments), directory);
        serves(&server);
        let log = server.log();
        let lacking: Vec<_> = log.lines().filter(|line| line.contains("The sandbox lacks")).collect();
        assert!(lacking.len() == 1 && lacking[0].contains("there is no Landlock"), "{log}");
        assert!(log.contains("The sandbox is on: restricted rings, "), "{log}");
        assert!(threads(&server).iter().all(|status| status["NoNewPrivs"] == "1"));
    }
}

/// What the workers of a server with these arguments tried, and how each ended.
fn attacks(arguments: &[&str]) -> Vec<(String, i32)> {
    let directory = temporary();
    let export = format!("d={},rw", directory.path().display());
    let mut process = Process::new(env!("CARGO_BIN_EXE_raio_server"));
    process.args(["--listen", "tcp://127.0.0.1:0", "--workers", "2", "--export", &export]).args(arguments);
    let server = Server::spawn(process.env("RAIO_TEST_ATTACK", "1"), directory);
    let attack = |line: &String| {
        let (name, errno) = line.strip_prefix("attack ")?.rsplit_once(' ')?;
        Some((name.to_owned(), errno.parse().ok()?))
    };
    let attacks: Vec<_> = server.others.iter().filter_map(attack).collect();
    assert!(attacks.len() >= 2 * 15, "each worker attacks: {attacks:?}");
    attacks
}

#[test]
fn a_worker_that_is_not_the_servers_own_any_more_can_do_nothing() {
    let log_has_landlock = has_landlock(&Server::start(Variant::Uring, &["--sandbox=on"]));
    for (name, errno) in attacks(&[]) {
        let denied = match &*name {
            "by a call: clone3" => libc::ENOSYS,
            name if name.contains("open") || name.contains("create") => {
                if !log_has_landlock && !name.contains("ring") {
                    continue;
                }
                libc::EACCES
            }
            name if name.starts_with("through the ring") => libc::EACCES,
            _ => libc::EPERM,
        };
        assert_eq!(errno, denied, "{name}");
    }
}

/// Else the test above would show nothing.
#[test]
fn without_a_sandbox_the_same_attacks_succeed() {
    let attacks: HashMap<_, _> = attacks(&["--sandbox=off"]).into_iter().collect();
    let through_the_ring = ["nop", "socket", "register eventfd", "poll with ASYNC"];
    let by_calls = ["open /proc/self/mem", "socket", "io_uring_setup", "unshare", "mprotect to execute"];
    if attacks.keys().any(|name| name.contains("ring")) {
        for name in through_the_ring {
            assert_eq!(attacks[&format!("through the ring: {name}")], 0, "{name}");
        }
    }
    for name in by_calls {
        assert_eq!(attacks[&format!("by a call: {name}")], 0, "{name}");
    }
    assert_eq!(attacks["by a call: execve"], libc::ENOENT);
    if is_root("reading /etc/shadow") {
        assert_eq!(attacks["by a call: open /etc/shadow"], 0);
    }
}

#[test]
fn what_takes_the_place_of_an_export_is_not_opened_and_the_reason_is_told() {
    let directory = temporary();
    let path = |name: &str| directory.path().join(name);
    for name in ["root", "next"] {
        std::fs::create_dir(path(name)).unwrap();
        std::fs::write(path(name).join("f"), name).unwrap();
    }
    std::fs::write(path("file"), "x").unwrap();
    let exports =
        [("r", "root"), ("i", "file")].map(|(name, at)| format!("{name}={},rw", path(at).display()));
    let arguments = ["--sandbox=on", "--export", &exports[0], "--export", &exports[1]];
    let server = Server::start(Variant::Uring, &arguments);
    if !has_landlock(&server) {
        return;
    }
    let mut client = server.client();
    let open = client.open("/r/f", OPEN_READ).unwrap();
    std::fs::rename(path("root"), path("before")).unwrap();
    std::fs::rename(path("next"), path("root")).unwrap();
    std::fs::remove_file(path("file")).unwrap();
    for (name, flags) in [("/r/f", OPEN_READ), ("/r/new", NEW), ("/i", NEW)] {
        let open = raio_transport::protocol::Command::Open { flags, mode: 0o600, path: name.as_bytes() };
        let reply = client.call(&open, raio_transport::transport::Bulk::None);
        let text = raio_transport::message::text(&reply.body);
        assert_eq!(reply.status.errno, libc::EACCES, "{name}: {text}");
        assert!(text.contains("sandbox") && text.contains("started anew"), "{name}: {text}");
    }
    assert_eq!(client.read(open, 0, 10).unwrap(), b"root", "what is open stays what it is");
    server.log_until("unless the sandbox denies it, which knows only what was there at the start");
}

#[test]
fn a_server_becomes_the_user_that_it_is_told() {
    if !is_root("becoming another user") {
        return;
    }
    for user in ["nobody", "65534"] {
        let directory = tempfile::tempdir_in("/tmp").unwrap();
        chown(directory.path(), Some(ORDINARY), Some(ORDINARY)).unwrap();
        let state = TempDir::new_in("/tmp").unwrap();
        std::fs::set_permissions(state.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let state_path = state.path().join("state");
        let export = format!("d={},rw", directory.path().display());
        let mut process = Process::new(env!("CARGO_BIN_EXE_raio_server"));
        process.args(["--listen", "tcp://127.0.0.1:0", "--strict", "--user", user, "--export", &export]);
        process.arg("--state").arg(&state_path);
        let server = Server::spawn(&mut process, directory);
        serves(&server);
        assert_eq!(server.path("new").metadata().unwrap().uid(), ORDINARY);
        assert_eq!(state_path.metadata().unwrap().uid(), ORDINARY);
        for status in threads(&server) {
            let ids = format!("{ORDINARY} {ORDINARY} {ORDINARY} {ORDINARY}");
            assert_eq!((&status["Uid"], &status["Gid"]), (&ids, &ids));
            assert!(matches!(&*status["Groups"], "" | "65534"), "{status:?}");
            assert_eq!(status["CapBnd"], "0000000000000000", "{status:?}");
        }
        let log = server.log();
        assert!(!log.contains("runs as root"), "{log}");
    }
}

#[test]
fn a_user_that_cannot_be_had_or_cannot_serve_is_an_error() {
    let run = |process: &mut Process| {
        let output = process.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let server = || Process::new(env!("CARGO_BIN_EXE_raio_server"));
    let (code, text) = run(server().args(["--user", "no-such-user", "--export", "n=null:1M"]));
    assert!(code == Some(1) && text.contains("There is no user \"no-such-user\""), "{code:?} {text}");
    if !is_root("becoming another user") {
        return;
    }
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    let mut program = Process::new(program_in(directory.path()));
    let ordinary = program.args(["--user", "root", "--export", "n=null:1M"]).uid(ORDINARY).gid(ORDINARY);
    let (code, text) = run(ordinary);
    assert!(code == Some(1) && text.contains("Start the server as root"), "{code:?} {text}");
    // Root could search this, if it had privileges.
    let private = directory.path().join("private");
    std::fs::create_dir(&private).unwrap();
    std::fs::set_permissions(&private, PermissionsExt::from_mode(0o700)).unwrap();
    let export = format!("d={}", private.display());
    chown(&private, Some(1), Some(1)).unwrap();
    let (code, text) = run(server().args(["--check", "--export", &export]));
    assert!(code == Some(2) && text.contains("In its sandbox root may do no more"), "{code:?} {text}");
    assert_eq!(run(server().args(["--check", "--sandbox=off", "--export", &export])), (Some(0), "".into()));
    for arguments in [&["--check"][..], &["--listen", "tcp://127.0.0.1:0"]] {
        let (code, text) = run(server().args(["--user", "nobody", "--export", &export]).args(arguments));
        assert!(code != Some(0) && text.contains("searched"), "{code:?} {text}");
    }
}
