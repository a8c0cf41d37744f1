//! Clients and servers that come, go and die: nothing is left behind, and nothing is done when there is
//! nothing to do.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use raio::{Buffer, Buffers, Operation, Options, Session};
use raio_e2e::{Server, binary, is_at_rest};
use serde_json::Value;

#[test]
fn killing_a_client_at_full_depth_leaks_no_slot_descriptor_or_memory() {
    for backend in ["uring", "threads"] {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("file"), vec![1; 32 << 20]).expect("a file");
        let export = format!("d={},rw", directory.path().display());
        let mut server =
            Server::start_with(&[&export], &["--backend", backend, "--memory", "64M", "--linger", "0"]);
        let mut before = None;
        for round in 0..30 {
            let mut flood = Command::new(binary("flood"))
                .args([&server.url(), "/d/file"])
                .stdout(Stdio::piped())
                .spawn()
                .expect("flood starts");
            let mut line = String::new();
            let mut stdout = BufReader::new(flood.stdout.take().expect("stdout is piped"));
            stdout.read_line(&mut line).expect("flood says when its queue is full");
            assert_eq!(line.trim(), "full");
            // At different moments of its life.
            std::thread::sleep(Duration::from_millis(round % 10));
            flood.kill().and_then(|()| flood.wait()).expect("flood is killed");
            let statistics = server.statistics_when(is_at_rest);
            assert!(statistics["requests"]["read"].as_u64() > Some(0), "{statistics}");
            // The first rounds start threads, and touch memory for the first time.
            if round == 9 {
                before = Some((server.descriptors(), server.taken_bytes()));
            }
        }
        let (descriptors, bytes) = before.expect("ten rounds have been");
        assert_eq!(server.descriptors(), descriptors, "{backend}");
        let grown = server.taken_bytes().saturating_sub(bytes);
        assert!(grown < 4 << 20, "{backend}: {grown} bytes more after 20 more clients");
    }
}

#[test]
fn a_forked_child_that_uses_what_is_its_parents_gets_errors_and_disturbs_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("file"), vec![1; 1 << 20]).expect("a file");
    let server = Server::start(&[&format!("d={},rw", directory.path().display())]);
    let forked =
        Command::new(binary("forked")).args([&server.url(), "/d/file"]).output().expect("forked runs");
    assert!(forked.status.success(), "{}", String::from_utf8_lossy(&forked.stderr));
}

#[test]
fn many_sessions_leave_the_server_where_it_began() {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("file"), "content").expect("a file");
    let mut server = Server::start(&[&format!("d={}", directory.path().display())]);
    let url = server.url();
    // Emulated processors take long for each. What one leaks is more there.
    let sessions = if url.starts_with("raio+rdma") { 200 } else { 1000 };
    let cycle = |n: usize| {
        let session = Session::connect(&url, &Options::default()).expect("a session");
        let file = session.open("/d/file", libc::O_RDONLY, 0).expect("a file");
        if n.is_multiple_of(10) {
            let mut context = session.context(1).expect("a context");
            let buffers = Buffers::One(Buffer::Owned(vec![0; 16].into()));
            context.submit(&file, Operation::Read { offset: 0, buffers }, 0).expect("room for one");
            context.wait(1, 1, None).expect("an answer");
            assert_eq!(context.next().expect("a completion").result.expect("success"), 7);
        }
        if n.is_multiple_of(2) {
            file.close().expect("closed");
        }
    };
    // The first sessions touch memory for the first time.
    (0..sessions).for_each(cycle);
    server.statistics_when(is_at_rest);
    let (descriptors, bytes) = (server.descriptors(), server.taken_bytes());
    (0..sessions).for_each(cycle);
    let statistics = server.statistics_when(is_at_rest);
    assert!(statistics["accepted"].as_u64() >= Some(2 * sessions as u64), "{statistics}");
    assert_eq!(server.descriptors(), descriptors);
    let grown = server.taken_bytes().saturating_sub(bytes);
    assert!(grown < 4 << 20, "{grown} bytes more after {sessions} more sessions");
}

#[test]
fn an_idle_server_sleeps_even_with_clients_connected() {
    let mut server = Server::start(&["null=null:1M"]);
    let session = Session::connect(&server.url(), &Options::default()).expect("a session");
    let _context = session.context(8).expect("a context");
    std::thread::sleep(Duration::from_millis(200));
    let iterations = |statistics: Value| statistics["iterations"].as_u64().expect("iterations are counted");
    let before = iterations(server.statistics());
    std::thread::sleep(Duration::from_secs(2));
    let after = iterations(server.statistics());
    // Each of the two questions may wake each worker once or twice.
    assert!(after - before <= 10, "{} iterations in two idle seconds", after - before);
}

#[test]
fn sessions_do_not_see_each_others_handles() {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("secret"), "secret").expect("a file");
    let server = Server::start(&[&format!("d={}", directory.path().display())]);
    let connect = || Session::connect(&server.url(), &Options::default()).expect("a session");
    let (owner, other) = (connect(), connect());
    let file = owner.open("/d/secret", libc::O_RDONLY, 0).expect("a file");
    let mut context = other.context(1).expect("a context");
    let buffers = Buffers::One(Buffer::Owned(vec![0; 16].into()));
    let rejected =
        context.submit(&file, Operation::Read { offset: 0, buffers }, 0).expect_err("not its file");
    assert_eq!(rejected.error.errno(), libc::EBADF);
}

#[test]
fn after_a_server_has_been_killed_and_started_again_a_new_session_works() {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("file"), "content").expect("a file");
    let export = format!("d={}", directory.path().display());
    let mut server = Server::start(&[&export]);
    let listen = server.listen_url();
    let options = Options { reconnect: Duration::ZERO, ..Options::default() };
    let session = Session::connect(&server.url(), &options).expect("a session");
    let file = session.open("/d/file", libc::O_RDONLY, 0).expect("a file");
    server.kill();
    let lost = file.status().expect_err("the server is gone").errno();
    assert!([libc::ENOTCONN, libc::ECONNRESET, libc::EPIPE].contains(&lost), "errno {lost}");
    let server = Server::start_with(&[&export], &["--listen", &listen]);
    let session = Session::connect(&server.url(), &Options::default()).expect("a new session");
    assert_eq!(
        session.open("/d/file", libc::O_RDONLY, 0).and_then(|file| file.status()).expect("a file").size,
        7
    );
}
