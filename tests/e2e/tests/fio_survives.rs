//! A fio job that verifies what it writes sees not one error while its server is restarted, hands over to
//! another one, or is killed, or the cable is pulled, over and over.

mod fio;

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fio::engine;
use raio_e2e::{Cable, End, PATIENCE, Server, binary};
use rustix::process::{Pid, Signal, kill_process};

/// How often each thing happens to one job.
const TIMES: usize = 20;
/// So long the job works undisturbed in between.
const BETWEEN: Duration = Duration::from_millis(100);
const PULLED: Duration = Duration::from_millis(200);
/// A server that says nothing for so long is lost: less than the cable is out.
const SILENCE_MAX_MS: u64 = 100;
/// For how long a job works if it is not told to end, in seconds.
const JOB_SECONDS_MAX: u64 = 100;

fn serve(mut command: Command, directory: &Path, listen: &str) -> Server {
    command.args(["--listen", listen, "--workers", "2", "--state"]).arg(directory.join("state"));
    command.arg("--export").arg(format!("disk={},rw", directory.join("files").display()));
    Server::spawn(command)
}

fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(directory.path().join("files")).expect("a directory");
    // It is there already, so that fio does not make it in a session before.
    std::fs::write(directory.path().join("files/file"), vec![0; 16 << 20]).expect("a file");
    directory
}

/// A job that writes, and reads back what it has written a little before, until it is told to end. Killed
/// when dropped.
struct Job(Child);

impl Job {
    /// Unless told to, it does not write again what may have been written: that is an error, too.
    fn begin(mut fio: Command, url: &str, more: &[String]) -> Self {
        fio.current_dir(std::env::temp_dir());
        fio.args(["--name=job", "--verify_state_save=0", "--filename=/disk/file", "--size=16m"]);
        fio.arg(format!("--ioengine=external:{}", engine().display())).arg(format!("--raio_url={url}"));
        fio.args(["--rw=randwrite", "--bsrange=4k-64k", "--iodepth=16", "--fdatasync=64"]);
        fio.args(["--verify=crc32c", "--verify_backlog=128", "--rate_iops=3000", "--raio_redo=0"]);
        fio.args(["--time_based", &format!("--runtime={JOB_SECONDS_MAX}")]);
        fio.args(more).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(fio.spawn().expect("fio starts"))
    }

    /// It is at work; otherwise it says why not.
    fn check(&mut self) {
        if self.0.try_wait().expect("fio can be waited for").is_some() {
            panic!("fio has ended: {}", self.said());
        }
    }

    /// Waits until it has written something.
    fn works(&mut self, server: &mut Server) {
        let deadline = Instant::now() + PATIENCE;
        while server.statistics()["requests"]["write"] == 0 {
            self.check();
            assert!(Instant::now() < deadline, "fio does not write");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until it has ended. Whether it says that it has succeeded, and all that it said.
    fn end(mut self) -> (bool, String) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.0.try_wait().expect("fio can be waited for") {
                return (status.success(), self.said());
            }
            assert!(Instant::now() < deadline, "fio does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Told to end, it does, without an error.
    fn succeeds(mut self) {
        self.check();
        kill_process(Pid::from_child(&self.0), Signal::INT).expect("it is not waited for");
        let (_, said) = self.end();
        assert!(said.contains("terminating on signal 2"), "{said}");
        assert!(said.contains("err= 0") && !said.contains("verify failed"), "{said}");
    }

    fn said(&mut self) -> String {
        let mut said = String::new();
        self.0.stdout.take().expect("piped").read_to_string(&mut said).expect("text");
        self.0.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
        said
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Has a server end in this way, and another one take its place, over and over beneath a job.
fn restarted(more: &[String], end: impl Fn(&mut Server)) {
    let directory = directory();
    let command = || Command::new(binary("raio_server"));
    let mut server = serve(command(), directory.path(), "tcp://127.0.0.1:0");
    let listen = server.listen_url();
    let mut job = Job::begin(Command::new("fio"), &server.url(), more);
    for _ in 0..TIMES {
        job.works(&mut server);
        std::thread::sleep(BETWEEN);
        end(&mut server);
        server = serve(command(), directory.path(), &listen);
    }
    job.works(&mut server);
    job.succeeds();
}

#[test]
fn fio_sees_no_error_when_the_server_is_restarted_in_good_order_twenty_times() {
    restarted(&[], |server| {
        server.signal(Signal::TERM);
        assert!(server.wait().success());
    });
}

#[test]
fn fio_sees_no_error_when_ten_servers_hand_over_one_after_another() {
    let directory = directory();
    let command = || {
        let mut command = Command::new(binary("raio_server"));
        command.arg("--hand-over").arg(directory.path().join("hand-over"));
        command
    };
    let start = || serve(command(), directory.path(), "tcp://127.0.0.1:0");
    let mut server = start();
    let mut job = Job::begin(Command::new("fio"), &server.url(), &[]);
    for _ in 0..10 {
        job.works(&mut server);
        std::thread::sleep(BETWEEN);
        let next = start();
        assert_eq!(next.url(), server.url(), "it has the port");
        assert!(server.wait().success());
        server = next;
    }
    job.works(&mut server);
    job.succeeds();
}

#[test]
fn fio_that_writes_again_what_it_must_sees_no_error_when_the_server_is_killed_twenty_times() {
    restarted(&["--raio_redo=1".into()], Server::kill);
}

/// Kills the server of a job with requests under way, and starts another one if it is to go on. All that the
/// job said when it failed.
fn killed(more: &[&str], is_started_again: bool) -> String {
    let directory = directory();
    let command = || Command::new(binary("raio_server"));
    let mut server = serve(command(), directory.path(), "tcp://127.0.0.1:0");
    let more: Vec<_> = ["--bsrange=4k-4k", "--fdatasync=0", "--verify=0"]
        .iter()
        .chain(more)
        .map(ToString::to_string)
        .collect();
    let mut job = Job::begin(Command::new("fio"), &server.url(), &more);
    job.works(&mut server);
    let listen = server.listen_url();
    server.hold_up();
    // As long as any: by then fio's queue is full of writes that are sent and not answered.
    std::thread::sleep(BETWEEN);
    server.kill();
    let _next = is_started_again.then(|| serve(command(), directory.path(), &listen));
    let (has_succeeded, said) = job.end();
    assert!(!has_succeeded, "{said}");
    said
}

#[test]
fn fio_fails_when_the_server_is_away_for_longer_than_it_may_be_and_says_which_option_changes_that() {
    let said = killed(&["--raio_reconnect=1"], false);
    assert!(said.contains(&format!("err={}", libc::ETIMEDOUT)), "{said}");
    assert!(said.contains("away for longer than the reconnect window of 1 s"), "{said}");
    assert!(said.contains("With a longer raio_reconnect= the job waits longer"), "{said}");
}

#[test]
fn fio_that_does_not_write_again_fails_when_the_server_is_killed_and_says_which_option_changes_that() {
    let said = killed(&[], true);
    assert!(said.contains(&format!("err={}", libc::ECONNRESET)), "{said}");
    assert!(said.contains("it may have been done. It will not be done later."), "{said}");
    assert!(said.contains("With raio_redo=1 the job does it again."), "{said}");
}

#[test]
fn fio_sees_no_error_when_the_cable_is_pulled_twenty_times() {
    let Some(cable) = Cable::new("pulling the cable beneath fio") else { return };
    let directory = directory();
    let command = cable.command(End::A, binary("raio_server"));
    let listen = format!("tcp://{}:0", cable.address(End::A));
    let mut server = serve(command, directory.path(), &listen);
    let more = [format!("--raio_request_timeout_ms={SILENCE_MAX_MS}")];
    let mut job = Job::begin(cable.command(End::B, "fio"), &server.url(), &more);
    job.works(&mut server);
    for _ in 0..TIMES {
        std::thread::sleep(BETWEEN);
        cable.pull();
        std::thread::sleep(PULLED);
        cable.plug();
    }
    // It may have had no luck so far: what it sends to connect is lost, too, and sent again after a second.
    server.statistics_when(|now| now["channels"]["resumed"].as_u64() > Some(0));
    job.succeeds();
}
