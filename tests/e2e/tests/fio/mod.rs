//! What the fio tests share: where the engine is, and one fio run.

// Not every program uses all of it.
#![allow(dead_code, unused_imports)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use raio_e2e::Server;
pub use raio_e2e::seed;

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

/// `fio` with the engine, talking to this server.
pub fn fio_raio(server: &Server) -> Command {
    let mut fio = fio();
    fio.arg("--name=job");
    fio.arg(format!("--ioengine=external:{}", engine().display()));
    fio.arg(format!("--raio_url={}", server.url()));
    fio
}

/// `fio` on local files.
pub fn fio_local() -> Command {
    let mut fio = fio();
    fio.args(["--name=job", "--ioengine=libaio"]);
    fio
}

/// `fio` with no engine named.
pub fn fio() -> Command {
    let mut fio = Command::new("fio");
    // it leaves verify state files where it runs
    fio.current_dir(std::env::temp_dir()).arg("--verify_state_save=0");
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
