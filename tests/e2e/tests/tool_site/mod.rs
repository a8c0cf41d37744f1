//! What the tests of the tool have in common: a server, directories, and `raio` in one of them.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use raio_e2e::{Random, Server, binary};
use serde_json::Value;
use tempfile::TempDir;

/// A server with exports `e`, `ro` (the same, read-only) and `null`, and a directory beside.
pub struct Site {
    pub server: Server,
    pub directory: TempDir,
}

impl Site {
    pub fn new() -> Self {
        // On a disk: files of /tmp may be in memory, without holes and direct reads.
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        for name in ["export", "state", "here"] {
            fs::create_dir(directory.path().join(name)).expect("a directory");
        }
        let server = Self::serve(directory.path(), "tcp://127.0.0.1:0");
        Self { server, directory }
    }

    pub fn serve(directory: &Path, listen: &str) -> Server {
        let export = directory.join("export");
        let (rw, ro) = (format!("e={},rw", export.display()), format!("ro={}", export.display()));
        Server::start_with(&[&rw, &ro, "null=null:1G,rw"], &["--listen", listen])
    }

    /// A file in the export, or beside it.
    pub fn there(&self, name: &str) -> PathBuf {
        self.directory.path().join("export").join(name)
    }

    pub fn here(&self, name: &str) -> PathBuf {
        self.directory.path().join("here").join(name)
    }

    /// `raio`, in the directory `here`.
    pub fn raio(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary("raio"));
        command.args(arguments).current_dir(self.directory.path().join("here"));
        command.env("RAIO_URL", self.server.url()).env("XDG_STATE_HOME", self.directory.path().join("state"));
        command.stdin(Stdio::null());
        command
    }

    /// Runs it. It must succeed, and say nothing on standard error.
    pub fn run(&self, arguments: &[&str]) -> Vec<u8> {
        let output = self.raio(arguments).output().expect("raio runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "raio {arguments:?}: {} {said}", output.status);
        output.stdout
    }

    /// Runs it, and returns its JSON.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let stdout = self.run(arguments);
        serde_json::from_slice(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout:?}"))
    }

    pub fn left_here(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.directory.path().join("here")).expect("a directory");
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect()
    }
}

pub fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

/// Bytes that compress badly, another sequence for each length.
pub fn bytes(length: usize) -> Vec<u8> {
    let mut random = Random::with_seed(length as u64);
    let mut bytes: Vec<u8> =
        (0..length.div_ceil(8)).flat_map(|_| random.below(u64::MAX).to_le_bytes()).collect();
    bytes.truncate(length);
    bytes
}

/// Asserts that the manual page of a command names each field of its JSON.
pub fn assert_documented(command: &str, object: &Value) {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../docs/man/raio-{command}.1"));
    let page = fs::read_to_string(page).expect("a page").replace("\\-", "-");
    for field in object.as_object().expect("an object").keys() {
        let mut words = page.split(|c: char| !c.is_alphanumeric() && c != '_');
        assert!(words.any(|word| word == field), "{field} of raio {command} --json is not in its manual");
    }
}
