//! The file of `raio_server --trace` on a file system that is full, and on one that hangs: the log says so,
//! and the server goes on.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use raio::{Buffer, Buffers, Options, Session};
use raio_e2e::{LoopDevice, PATIENCE, Server, await_log, binary, needs_root};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::Signal;
use serde_json::Value;

/// A server with one worker, whose trace goes to `trace` and whose log to a file.
struct Traced {
    server: Server,
    session: Session,
    trace: PathBuf,
    log: PathBuf,
    _directory: tempfile::TempDir,
}

impl Traced {
    fn start(trace: PathBuf) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let log = directory.path().join("log");
        let mut command = Command::new(binary("raio_server"));
        command
            .args(["--listen", "tcp://127.0.0.1:0", "--export", "m=mem:1M,rw", "--workers", "1"])
            .arg("--trace")
            .arg(&trace)
            .stderr(Stdio::from(File::create(&log).expect("a log")));
        let server = Server::spawn(command);
        let session = Session::connect(&server.url(), &Options::default()).expect("a session");
        Self { server, session, trace, log, _directory: directory }
    }

    /// So many writes, each traced in four records or so.
    fn work(&self, writes: usize) {
        let file = self.session.open("/m", libc::O_RDWR, 0).expect("a file");
        let mut context = self.session.context(8).expect("a context");
        for _ in 0..writes {
            let buffers = Buffers::One(Buffer::Owned(vec![7; 4096].into()));
            let write = raio::Operation::Write { offset: 0, buffers };
            context.submit(&file, write, 0).expect("there is room");
            context.wait(1, 1, Some(PATIENCE)).expect("the server lives");
            context.next().expect("it ends in time").result.expect("success");
        }
    }

    fn log_until(&self, text: &str) -> String {
        await_log(&self.log, text)
    }

    /// Ends the server in good order. Returns what the trace has.
    fn stop(mut self) -> Value {
        drop(self.session);
        self.server.signal(Signal::TERM);
        assert!(self.server.wait().success());
        let text = std::fs::read_to_string(&self.trace).expect("the trace");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }
}

/// How many writes have ended in a trace.
fn writes(trace: &Value) -> usize {
    let events = trace["traceEvents"].as_array().expect("events");
    events.iter().filter(|event| event["name"] == "write" && event["ph"] == "e").count()
}

/// A file system in memory with hardly any room.
struct Full(tempfile::TempDir);

impl Full {
    fn mount() -> Self {
        let directory = tempfile::tempdir().expect("a mount point");
        mount("raio-e2e", directory.path(), "tmpfs", MountFlags::empty(), Some(c"size=64k"))
            .expect("a tmpfs");
        Self(directory)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_disk_costs_the_records_that_do_not_fit_and_nothing_else() {
    if !needs_root("the trace on a full disk") {
        return;
    }
    let full = Full::mount();
    let traced = Traced::start(full.path().join("trace"));
    traced.work(10);
    traced.server.signal(Signal::USR2);
    traced.log_until("records of a worker were written to the trace");
    traced.work(1000);
    traced.server.signal(Signal::USR2);
    let log = traced.log_until("They are lost, and the server goes on. Make room for later ones.");
    assert!(log.contains("No space left on device"), "{log}");
    traced.work(20);
    let trace = traced.stop();
    assert_eq!(writes(&trace), 30, "what fits is there");
    let dropped = trace["otherData"]["dropped"].as_u64().expect("a number");
    assert!((3000..10_000).contains(&dropped), "{dropped}");
}

#[test]
fn a_disk_that_hangs_holds_up_the_trace_and_nothing_else() {
    if !needs_root("the trace on a disk that hangs") {
        return;
    }
    let mounted = LoopDevice::new(64 << 20).mount("ext4");
    let traced = Traced::start(mounted.path().join("trace"));
    {
        let _frozen = mounted.freeze();
        // One is being written, one waits, and there is no room for the third.
        for _ in 0..10 {
            traced.work(10);
            traced.server.signal(Signal::USR2);
            std::thread::sleep(Duration::from_millis(20));
        }
        traced.log_until("earlier ones are still being written. Send SIGUSR2 again later.");
        traced.work(10);
    }
    traced.log_until("records of a worker were written to the trace");
    let trace = traced.stop();
    assert_eq!((writes(&trace), &trace["otherData"]["dropped"]), (110, &Value::from(0)), "nothing is lost");
}
