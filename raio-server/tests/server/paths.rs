//! Paths: nothing outside an export is ever reached, whatever the client names and whatever is renamed
//! meanwhile.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::process::Command as Process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use raio_transport::protocol::{
    OPEN_CREATE, OPEN_EXCLUSIVE, OPEN_NOFOLLOW, OPEN_READ, OPEN_TRUNCATE, OPEN_WRITE, PATH_BYTES_MAX,
};
use rustix::fs::{CWD, FileType, Mode, RenameFlags};

use crate::common::{RW, Server, each};

#[test]
fn what_leads_out_of_the_export_is_refused() {
    each(|variant| {
        let outside = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        std::fs::write(outside.path().join("secret"), "secret").unwrap();
        let server = Server::start(variant, &[]);
        std::fs::create_dir_all(server.path("a/b")).unwrap();
        std::fs::write(server.path("inside"), "inside").unwrap();
        let name = outside.path().file_name().unwrap().to_str().unwrap();
        symlink(outside.path(), server.path("absolute")).unwrap();
        symlink(outside.path().join("secret"), server.path("absolute-file")).unwrap();
        symlink(format!("../{name}"), server.path("relative")).unwrap();
        symlink(format!("../../../{name}/secret"), server.path("a/b/relative-file")).unwrap();
        symlink(server.path("inside"), server.path("absolute-inside")).unwrap();
        symlink("../../inside", server.path("a/b/good")).unwrap();
        symlink("loop", server.path("loop")).unwrap();
        let mut client = server.client();
        let up = "../".repeat(40);
        for (path, errno) in [
            (format!("/d/../{name}/secret"), libc::EXDEV),
            (format!("/d/a/../../{name}/secret"), libc::EXDEV),
            (format!("/d/{up}etc/passwd"), libc::EXDEV),
            (format!("/d//../{name}/secret"), libc::EXDEV),
            ("/d/absolute/secret".into(), libc::EXDEV),
            ("/d/absolute-file".into(), libc::EXDEV),
            ("/d/absolute-inside".into(), libc::EXDEV),
            ("/d/relative/secret".into(), libc::EXDEV),
            ("/d/a/b/relative-file".into(), libc::EXDEV),
            ("/d/loop".into(), libc::ELOOP),
            ("/../etc/passwd".into(), libc::ENOENT),
            ("/etc/passwd".into(), libc::ENOENT),
            ("etc/passwd".into(), libc::ENOENT),
            ("/d/etc/passwd".into(), libc::ENOENT),
            ("/".into(), libc::ENOENT),
            ("//".into(), libc::ENOENT),
        ] {
            for flags in [OPEN_READ, OPEN_WRITE | OPEN_CREATE, OPEN_WRITE | OPEN_TRUNCATE] {
                assert_eq!(client.open(&path, flags), Err(errno), "{path} with {flags:#x}");
            }
        }
        for path in ["/d/a/b/good", "/d/inside", "//d///inside", "/d/a/../inside", "/d/./inside"] {
            let file = client.open(path, OPEN_READ).unwrap();
            assert_eq!(client.read(file, 0, 100).unwrap(), b"inside", "{path}");
        }
        assert_eq!(client.open("/d/a/b/good", OPEN_READ | OPEN_NOFOLLOW), Err(libc::ELOOP));
        assert_eq!(std::fs::read(outside.path().join("secret")).unwrap(), b"secret", "nobody truncated it");
    });
}

#[test]
fn renames_in_between_do_not_help() {
    each(|variant| {
        let outside = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        std::fs::create_dir(outside.path().join("deep")).unwrap();
        std::fs::write(outside.path().join("file"), "secret").unwrap();
        let server = Server::start(variant, &[]);
        std::fs::create_dir_all(server.path("x/deep")).unwrap();
        std::fs::write(server.path("x/file"), "inside").unwrap();
        symlink(outside.path(), server.path("y")).unwrap();
        let (x, y) = (server.path("x"), server.path("y"));
        let stop = AtomicBool::new(false);
        let (mut good, mut rejected) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // The directory and the link that leads out change places.
                    rustix::fs::renameat_with(CWD, &x, CWD, &y, RenameFlags::EXCHANGE).unwrap();
                }
            });
            let mut client = server.client();
            let deadline = Instant::now() + Duration::from_secs(1);
            while Instant::now() < deadline {
                for path in ["/d/x/file", "/d/x/deep/../file", "/d/y/deep/../file"] {
                    match client.open(path, OPEN_READ) {
                        Ok(file) => {
                            let bytes = client.read(file, 0, 100).unwrap();
                            client.close(file).unwrap();
                            if bytes != b"inside" {
                                stop.store(true, Ordering::Relaxed);
                                panic!("{path} led to {:?}", String::from_utf8_lossy(&bytes));
                            }
                            good += 1;
                        }
                        Err(libc::EXDEV | libc::EAGAIN) => rejected += 1,
                        Err(errno) => {
                            stop.store(true, Ordering::Relaxed);
                            panic!("{path}: {errno}");
                        }
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        eprintln!("{good} opened, {rejected} rejected");
        assert!(good > 0 && rejected > 0, "the race was never on");
    });
}

#[test]
fn only_regular_files_are_served_and_an_open_never_hangs() {
    each(|variant| {
        let server = Server::start(variant, &[]);
        std::fs::create_dir(server.path("directory")).unwrap();
        rustix::fs::mknodat(CWD, server.path("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(server.path("socket")).unwrap();
        let device = libc::makedev(1, 5);
        let has_device =
            rustix::fs::mknodat(CWD, server.path("zero"), FileType::CharacterDevice, Mode::RUSR, device)
                .is_ok();
        let mut client = server.client();
        assert_eq!(client.open("/d/directory", OPEN_READ), Err(libc::EISDIR));
        assert_eq!(client.open("/d/directory", OPEN_WRITE), Err(libc::EISDIR));
        assert_eq!(client.open("/d", OPEN_READ), Err(libc::EISDIR));
        assert_eq!(client.open("/d/fifo", OPEN_READ), Err(libc::ENODEV));
        assert_eq!(client.open("/d/fifo", RW), Err(libc::ENODEV));
        assert_eq!(client.open("/d/fifo", OPEN_WRITE), Err(libc::ENODEV));
        assert_eq!(client.open("/d/fifo", OPEN_WRITE | OPEN_CREATE | OPEN_TRUNCATE), Err(libc::ENODEV));
        assert_eq!(client.open("/d/socket", OPEN_READ), Err(libc::ENODEV));
        if has_device {
            assert_eq!(client.open("/d/zero", OPEN_READ), Err(libc::ENODEV));
        } else {
            eprintln!("SKIPPED for devices: this user cannot make one");
        }
        assert_eq!(client.open("/d/none", OPEN_READ), Err(libc::ENOENT));
        let long = format!("/d/{}", "x".repeat(256));
        assert_eq!(client.open(&long, OPEN_READ), Err(libc::ENAMETOOLONG));
        let longest = format!("/d/{}", "x/".repeat(PATH_BYTES_MAX / 2 - 2));
        assert_eq!(client.open(&longest, OPEN_READ), Err(libc::ENOENT));
    });
}

#[test]
fn a_read_only_export_is_not_changed() {
    each(|variant| {
        let other = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        std::fs::write(other.path().join("f"), "old").unwrap();
        let export = format!("r={}", other.path().display());
        let server = Server::start(variant, &["--export", &export]);
        let mut client = server.client();
        for flags in [
            OPEN_WRITE,
            RW,
            OPEN_READ | OPEN_CREATE,
            OPEN_READ | OPEN_TRUNCATE,
            OPEN_WRITE | OPEN_CREATE | OPEN_EXCLUSIVE,
        ] {
            for path in ["/r/f", "/r/new"] {
                assert_eq!(client.open(path, flags), Err(libc::EROFS), "{path} {flags:#x}");
            }
        }
        let file = client.open("/r/f", OPEN_READ).unwrap();
        assert_eq!(client.write(file, 0, b"new"), Err(libc::EBADF));
        assert_eq!(std::fs::read(other.path().join("f")).unwrap(), b"old");
        assert!(!other.path().join("new").exists());
    });
}

#[test]
fn the_server_can_do_no_more_than_its_user() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIPPED: only root can start the server as another user");
    }
    let nobody = 65534;
    let directory =
        tempfile::Builder::new().permissions(PermissionsExt::from_mode(0o777)).tempdir_in("/tmp").unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("secret"), "secret").unwrap();
    std::fs::set_permissions(path("secret"), PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::write(path("public"), "public").unwrap();
    std::fs::set_permissions(path("public"), PermissionsExt::from_mode(0o644)).unwrap();
    std::fs::create_dir(path("theirs")).unwrap();
    // Where that user can reach it, wherever this was built.
    let program = path("raio_server");
    // Not by this process: what it forks meanwhile would have the copy open for writing, and nobody could run
    // it.
    let copied =
        Process::new("cp").args([env!("CARGO_BIN_EXE_raio_server").as_ref(), program.as_os_str()]).status();
    assert!(copied.unwrap().success());
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let mut process = Process::new(&program);
    let export = format!("d={},rw", directory.path().display());
    process.args(["--listen", "tcp://127.0.0.1:0", "--export", &export]).uid(nobody).gid(nobody);
    let server = Server::spawn(process, directory);
    let mut client = server.client();
    assert_eq!(client.open("/d/secret", OPEN_READ), Err(libc::EACCES));
    assert_eq!(client.open("/d/public", OPEN_WRITE), Err(libc::EACCES));
    assert_eq!(client.open("/d/theirs/new", OPEN_WRITE | OPEN_CREATE), Err(libc::EACCES));
    let file = client.open("/d/public", OPEN_READ).unwrap();
    assert_eq!(client.read(file, 0, 100).unwrap(), b"public");
}
