//! A server with little power does its work: as another user, on a file system and on a device, across a
//! restart. What it cannot do is for `raio-server/tests/server/sandbox.rs`.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::process::Command;

use raio_e2e::{LoopDevice, Raw, Server, await_log, binary, needs_root};
use raio_transport::protocol::{OPEN_CREATE, OPEN_DIRECT, OPEN_READ, OPEN_WRITE};

const BLOCK: usize = 4096;
/// `nobody`.
const USER: u32 = 65534;

/// Writes a block to a file, flushes it, and reads it back. Returns the file's identity and
/// verifier.
fn works_on(server: &Server, path: &str, flags: u32) -> ([u8; 16], u64) {
    let mut file = Raw::open(&server.url(), path, OPEN_READ | OPEN_WRITE | flags).expect("a file");
    file.send_write_header(1, 0, BLOCK as u32).expect("the server is there");
    file.stream.write_all(&[b'x'; BLOCK]).expect("the server is there");
    assert!(file.response().expect("an answer").0.status.is_ok(), "{path}");
    let verifier = file.fsync().expect("it is flushed");
    file.send_read(2, 0, BLOCK as u32).expect("the server is there");
    let (response, _) = file.response().expect("an answer");
    assert!(response.status.is_ok() && response.result == BLOCK as u64, "{path}: {response:?}");
    let mut bytes = [0; BLOCK];
    std::io::Read::read_exact(&mut file.stream, &mut bytes).expect("the data");
    assert_eq!(bytes, [b'x'; BLOCK], "{path}");
    (file.status.identity, verifier)
}

#[test]
fn a_server_that_becomes_another_user_works_on_files_and_devices_and_is_restarted() {
    if !needs_root("becoming another user") {
        return;
    }
    let mounted = LoopDevice::new(64 << 20).mount("ext4");
    let device = LoopDevice::new(1 << 20);
    for path in [mounted.path(), device.path()] {
        chown(path, Some(USER), Some(USER)).expect("they are root's");
    }
    let state = tempfile::tempdir().expect("a directory");
    chown(state.path(), Some(USER), Some(USER)).expect("it is root's");
    let exports = [("m", mounted.path()), ("disk", device.path())]
        .map(|(name, path)| format!("{name}={},rw", path.display()));
    let state_path = state.path().join("state").display().to_string();
    let start = || {
        let arguments = ["--user", "nobody", "--strict", "--state", &state_path];
        Server::start_with(&[&exports[0], &exports[1]], &arguments)
    };
    let work = |server: &Server| {
        let in_memory = works_on(server, "/m/file", OPEN_CREATE);
        [in_memory, works_on(server, "/m/file", OPEN_DIRECT), works_on(server, "/disk", OPEN_DIRECT)]
    };
    let mut first = start();
    let facts = work(&first);
    assert_eq!(mounted.path().join("file").metadata().expect("a file").uid(), USER);
    first.kill();
    assert_eq!(work(&start()), facts, "it is the same to clients after a restart");
    chown(device.path(), Some(0), None).expect("the machine has the node after this");
}

/// A server whose log is a file, until the log says so.
fn log_of(arguments: &[&str], directory: &Path, says: &str) -> String {
    let path = directory.join("log");
    let mut command = Command::new(binary("raio_server"));
    command.args(["--listen", "tcp://127.0.0.1:0", "--export", "n=null:1M"]).args(arguments);
    command.stderr(File::create(&path).expect("a log"));
    let _server = Server::spawn(command);
    await_log(&path, says)
}

#[test]
fn the_log_says_what_the_sandbox_has_or_that_there_is_none() {
    let directory = tempfile::tempdir().expect("a directory");
    let on = log_of(&[], directory.path(), "INFO The sandbox is on: ");
    let lines = on.lines().filter(|line| line.contains("sandbox") && !line.contains("The sandbox lacks"));
    assert_eq!(lines.count(), 1, "{on}");
    assert!(on.contains("system calls"), "{on}");
    let off = log_of(&["--sandbox=off"], directory.path(), "WARN The sandbox is off (--sandbox=off)");
    assert!(!off.contains("The sandbox is on"), "{off}");
}
