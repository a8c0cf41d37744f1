//! What an administrator sees and changes by the admin socket, with `raio admin`.

mod tool_site;

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Operation, Options, Session};
use raio_e2e::{FuseCall, FuseFs, FuseOptions, PATIENCE, Server, binary, carry_out, completion, needs_root};
use serde_json::Value;
use tempfile::TempDir;
use tool_site::{assert_documented, code};

/// A server with an admin socket.
struct Site {
    server: Server,
    directory: TempDir,
}

impl Site {
    fn new(exports: &[&str], arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let [socket, audit] =
            ["admin", "audit"].map(|name| directory.path().join(name).display().to_string());
        let own = ["--admin", &socket, "--audit", &audit];
        let server = Server::start_with(exports, &[&own, arguments].concat());
        Self { server, directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn session(&self) -> Session {
        Session::connect(&self.server.url(), &Options::default()).expect("a session")
    }

    fn admin(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary("raio"));
        command.arg("admin").args(arguments).env("RAIO_ADMIN", self.path("admin"));
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.admin(arguments).output().expect("raio runs")
    }

    /// What it prints. It must succeed, and say nothing on standard error.
    fn print(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "raio admin {arguments:?}: {said}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// Lines of JSON.
    fn list(&self, what: &str) -> Vec<Value> {
        let lines = self.print(&[what, "--json"]);
        lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// The same, once there is something like this.
    fn list_when(&self, what: &str, is_there: impl Fn(&Value) -> bool) -> Vec<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let list = self.list(what);
            if list.iter().any(&is_there) {
                return list;
            }
            assert!(Instant::now() < deadline, "{list:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn block() -> Buffers {
    Buffers::One(Buffer::Owned(vec![7; 4096].into()))
}

#[test]
fn a_session_is_seen_and_killed_and_the_others_go_on_until_the_server_is_drained() {
    let mut site = Site::new(&["m=mem:1M,rw"], &[]);
    let [victim, other] = [(); 2].map(|()| site.session());
    let mut files = [&victim, &other].map(|session| {
        (session.open("/m", libc::O_RDWR, 0).expect("a file"), session.context(4).expect("a context"))
    });
    let mut write = |at: usize| {
        let (file, context) = &mut files[at];
        let completion = carry_out(context, file, Operation::Write { offset: 0, buffers: block() })?;
        completion.result
    };
    write(0).expect("it is written");
    let sessions = site.list_when("sessions", |it| it["written_bytes"] == 4096);
    assert_eq!(sessions.len(), 2, "{sessions:?}");
    let it = sessions.iter().find(|it| it["written_bytes"] == 4096).expect("it is there");
    assert_documented("admin", it);
    assert_eq!((it["open_files"].as_u64(), it["errors"].as_u64()), (Some(1), Some(0)), "{it}");
    assert!(it["peer"].as_str().is_some_and(|peer| peer.starts_with("127.0.0.1:")), "{it}");
    let id = it["id"].as_str().expect("an id").to_owned();
    for (what, needle) in
        [("sessions", &*id), ("exports", "m"), ("workers", "ok"), ("stats", "sessions     2")]
    {
        let table = site.print(&[what]);
        assert!(table.contains(needle), "{what}: {table}");
    }
    for what in ["exports", "workers"] {
        assert_documented("admin", &site.list(what)[0]);
    }
    assert_eq!(site.list("exports")[0]["open_files"], 2);

    assert!(site.print(&["kill", &id]).contains("has ended"));
    let error = write(0).expect_err("its session has ended");
    assert!(error.to_string().contains("An administrator of the server has ended the session"), "{error}");
    let again = victim.open("/m", libc::O_RDONLY, 0).expect_err("it has ended for good");
    assert!(again.to_string().contains("administrator"), "{again}");
    write(1).expect("the other one goes on");
    assert_eq!(code(&site.run(&["kill", &id])), Some(3));
    drop(site.session());
    let record = fs::read_to_string(site.path("audit")).expect("a log");
    let kill = record.lines().find(|line| line.contains("\"event\":\"kill\"")).expect("it is recorded");
    let uid = rustix::process::geteuid().as_raw();
    assert!(kill.contains(&id[..8]) && kill.contains(&format!("\"by\":\"user {uid}\"")), "{kill}");

    let trace: Value = serde_json::from_str(&site.print(&["trace"])).expect("JSON");
    assert!(trace["traceEvents"].as_array().is_some_and(|events| events.len() >= 2), "{trace}");
    drop((files, victim, other));
    assert!(site.print(&["drain"]).contains("ends"));
    assert!(site.server.wait().success());
    let late = site.run(&["stats"]);
    assert_eq!(code(&late), Some(5), "{}", said(&late));
}

#[test]
fn a_request_that_hangs_is_slow_while_it_runs_and_after_it_has_ended() {
    let options = FuseOptions { direct_io: true, ..FuseOptions::default() };
    let Some(fuse) = FuseFs::mount("a slow request", options, &[("file", &[1; 4096])]) else { return };
    let site = Site::new(&[&format!("slow={},rw", fuse.path().display()), "m=mem:1M,rw"], &["--slow", "20"]);
    let session = site.session();
    let file = session.open("/slow/file", libc::O_RDONLY, 0).expect("a file");
    let quick = session.open("/m", libc::O_RDWR, 0).expect("a file");
    let mut context = session.context(4).expect("a context");
    carry_out(&mut context, &quick, Operation::Write { offset: 0, buffers: block() }).expect("it is begun");
    fuse.hang(FuseCall::Read);
    context.submit(&file, Operation::Read { offset: 0, buffers: block() }, 0).expect("it is begun");
    context.flush();
    fuse.wait_for_hanging(FuseCall::Read, 1);
    let of_read = |it: &Value| it["operation"] == "read" && it["export"] == "slow";
    let slow = site.list_when("slow", of_read);
    let running = slow.iter().find(|it| of_read(it)).expect("it is there");
    assert_documented("admin", running);
    assert_eq!(running["is_running"], true, "{running}");
    assert!(!slow.iter().any(|it| it["export"] == "m"), "{slow:?}");
    assert!(site.list("sessions").iter().any(|it| it["in_flight"].as_u64() > Some(0)));
    fuse.mend(FuseCall::Read);
    assert!(completion(&mut context).expect("it ends").result.is_ok());
    let slow = site.list_when("slow", |it| of_read(it) && it["is_running"] == false);
    let ended = slow.iter().find(|it| of_read(it)).expect("it is there");
    let stages = ended["stages"].as_array().expect("a list");
    let executing = stages.iter().find(|stage| stage["name"] == "executing").expect("where its time went");
    assert!(executing["us"].as_u64() >= Some(20_000) && ended["result"].is_null(), "{ended}");
    assert!(site.print(&["slow"]).contains("executing"));
}

#[test]
fn who_may_not_and_who_finds_no_server_is_told_what_to_do() {
    let site = Site::new(&["m=mem:1M"], &[]);
    let nothing = site.admin(&["--socket", "/nonexistent/admin", "stats"]).output().expect("raio runs");
    assert_eq!(code(&nothing), Some(3));
    assert!(said(&nothing).contains("Start raio_server with --admin PATH"), "{}", said(&nothing));
    let wrong = site.run(&["kill", "not-hex"]);
    assert_eq!(code(&wrong), Some(2), "{}", said(&wrong));
    let refused = site.run(&["trace", "--seconds", "61"]);
    assert_eq!(code(&refused), Some(2), "{}", said(&refused));
    if !needs_root("another user at the admin socket") {
        return;
    }
    // The socket is its own guard, and the server looks, too.
    for is_open in [false, true] {
        if is_open {
            let all = std::os::unix::fs::PermissionsExt::from_mode(0o777);
            fs::set_permissions(site.path("admin"), all).expect("it is ours");
            let all = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(site.directory.path(), all).expect("it is ours");
        }
        let output = site.admin(&["stats"]).uid(65_534).gid(65_534).output().expect("raio runs");
        let expected = if is_open { 5 } else { 4 };
        assert_eq!(code(&output), Some(expected), "{}", said(&output));
        assert_eq!(output.stdout, b"");
    }
}
