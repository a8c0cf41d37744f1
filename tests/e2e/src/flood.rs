//! Clients in processes of their own.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::server::{PATIENCE, binary};

/// A client that keeps its queue full of reads, and checks what it reads. Killed when dropped.
pub struct Flood(Child);

impl Flood {
    /// One that reads this file, whose 64-bit words are their own number. Its queue has been full when this
    /// returns.
    pub fn start(url: &str, path: &str) -> Self {
        let mut child = Command::new(binary("flood"))
            .args([url, path, "check"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("flood starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("stdout is piped"))
            .read_line(&mut line)
            .expect("flood says when its queue is full");
        let mut this = Self(child);
        assert_eq!(line.trim(), "full", "{}", if line.is_empty() { this.fails() } else { String::new() });
        this
    }

    /// Whether it goes on.
    pub fn is_alive(&mut self) -> bool {
        self.0.try_wait().expect("flood can be waited for").is_none()
    }

    /// Waits until it fails, and gives what it says.
    pub fn fails(&mut self) -> String {
        let mut said = String::new();
        if let Some(stderr) = &mut self.0.stderr {
            stderr.read_to_string(&mut said).expect("flood ends");
        }
        let status = self.0.wait().expect("flood can be waited for");
        assert_eq!(status.code(), Some(1), "{status}: {said}");
        said
    }

    /// Kills it, and gives how it ended.
    pub fn kill(&mut self) -> ExitStatus {
        let _ = self.0.kill();
        self.0.wait().expect("flood can be waited for")
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A client that is no good neighbour: see `src/bin/hostile.rs` for the kinds. Killed when dropped.
pub struct Hostile(Child);

impl Hostile {
    /// One that has begun when this returns.
    pub fn start(kind: &str, url: &str, path: &str) -> Self {
        let mut child = Command::new(binary("hostile"))
            .args([kind, url, path])
            .stdout(Stdio::piped())
            .spawn()
            .expect("hostile starts");
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let read = stdout.read_line(&mut line);
        let this = Self(child);
        assert!(read.is_ok() && line == "ready\n", "hostile {kind} said {line:?} instead of being ready");
        this
    }

    /// Whether it goes on.
    pub fn is_alive(&mut self) -> bool {
        self.0.try_wait().expect("hostile can be waited for").is_none()
    }

    /// Waits for it to notice.
    pub fn learns_that_it_was_closed(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while self.is_alive() {
            assert!(Instant::now() < deadline, "its connection goes on for it");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
