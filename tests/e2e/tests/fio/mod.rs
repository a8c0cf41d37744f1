//! What the fio tests share: a directory, a server, the engine, and one fio run.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory of this test's own.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("raio-fio-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("a scratch directory");
        Scratch(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A raio_server on a port of its own, killed when it is dropped.
pub struct Server {
    child: Child,
    pub port: u16,
}

impl Server {
    /// `export` as the server takes it: NAME=PATH[,rw][,direct]. Which server: `RAIO_SERVER`, or the one that cargo
    /// built beside this test.
    pub fn start(export: &str) -> Server {
        let program = std::env::var_os("RAIO_SERVER").map(PathBuf::from).unwrap_or_else(|| {
            let test = std::env::current_exe().expect("this test's path");
            test.ancestors().nth(2).expect("target/PROFILE").join("raio_server")
        });
        let mut child = Command::new(&program)
            .args(["--listen", "tcp://127.0.0.1:0", "--export", export])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}. Run `cargo build` first.", program.display()));
        let mut ready = String::new();
        let output = child.stdout.take().expect("a pipe");
        BufReader::new(output).read_line(&mut ready).expect("the server's first line");
        let port = ready.trim().rsplit_once(':').and_then(|(_, port)| port.parse().ok());
        Server { child, port: port.unwrap_or_else(|| panic!("{ready:?} names no port")) }
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Where `libraio_fio.so` is: `RAIO_FIO_ENGINE`, or what scripts/build-fio-engine builds.
pub fn engine() -> &'static Path {
    static ENGINE: OnceLock<PathBuf> = OnceLock::new();
    ENGINE.get_or_init(|| match std::env::var_os("RAIO_FIO_ENGINE") {
        Some(path) => path.into(),
        None => {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/build-fio-engine");
            let output = succeed(Command::new(script).arg("--quiet"));
            String::from_utf8_lossy(&output.stdout).trim().into()
        }
    })
}

/// `fio` with the engine, talking to the server on this port of loopback.
pub fn fio_raio(port: u16) -> Command {
    let mut fio = fio();
    fio.arg(format!("--ioengine=external:{}", engine().display()));
    fio.arg(format!("--raio_url=raio://127.0.0.1:{port}"));
    fio
}

/// `fio` on local files.
pub fn fio_local() -> Command {
    let mut fio = fio();
    fio.arg("--ioengine=libaio");
    fio
}

fn fio() -> Command {
    let mut fio = Command::new("fio");
    // it leaves verify state files where it runs
    fio.current_dir(std::env::temp_dir()).args(["--verify_state_save=0", "--name=job"]);
    fio
}

/// Runs it, and panics with all that it said if it fails.
pub fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{:?}: {error}", command.get_program()));
    assert!(output.status.success(), "{command:?} failed, {}:\n{}", output.status, said(&output));
    output
}

/// Everything on both streams.
pub fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Fails with the first offset at which two files or devices differ, or if one is longer.
pub fn assert_same_bytes(one: &Path, other: &Path, why: &str) {
    let output =
        Command::new("cmp").args([OsStr::new("--"), one.as_ref(), other.as_ref()]).output().expect("cmp");
    assert!(output.status.success(), "{why}: {}", said(&output));
}

/// The seed for this run: `RAIO_TEST_SEED`, or one from the clock. Printed, so that a failure can be replayed.
pub fn seed() -> u64 {
    let seed = match std::env::var("RAIO_TEST_SEED") {
        Ok(text) => text.parse().expect("RAIO_TEST_SEED is a number"),
        Err(_) => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.expect("a clock after 1970").subsec_nanos().into()
        }
    };
    println!("replay with RAIO_TEST_SEED={seed}");
    seed
}
