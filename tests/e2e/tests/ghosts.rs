//! Requests of clients that are gone do not start.

use std::io::Write;
use std::time::Duration;

use raio_e2e::{FuseCall, FuseFs, FuseOptions, Raw, Server, is_at_rest};
use raio_transport::protocol::{OPEN_CREATE, OPEN_READ, OPEN_WRITE};
use rustix::net::sockopt;
use rustix::process::Signal;

const BLOCK: u64 = 4096;
/// Writes of one client, at once.
const WRITES: u64 = 100;
/// So many the server may have begun: as many as an export has threads for, which wait for one another in the
/// kernel.
const BEGUN_MAX: u64 = 16;
const READ_WRITE: u32 = OPEN_READ | OPEN_WRITE;

/// Sends writes of blocks full of one letter, all at once.
fn send_writes(client: &mut Raw, blocks: std::ops::Range<u64>, letter: u8) {
    for n in blocks {
        client.send_write_header(n, n * BLOCK, BLOCK as u32).expect("the kernel takes it");
        client.stream.write_all(&[letter; BLOCK as usize]).expect("the kernel takes it");
    }
}

/// Ends the connection as a client does that gives up: by a reset.
fn reset(client: Raw) {
    sockopt::set_socket_linger(&client.stream, Some(Duration::ZERO)).expect("a TCP socket");
}

#[test]
fn what_a_client_sent_before_it_gave_up_does_not_land_after_the_server_was_held_up() {
    for backend in ["uring", "threads"] {
        let directory = tempfile::tempdir().expect("a directory");
        let export = format!("d={},rw", directory.path().display());
        let mut server = Server::start_with(&[&export], &["--backend", backend, "--workers", "2"]);
        for round in 0..8 {
            let name = format!("file{round}");
            let path = format!("/d/{name}");
            let open = || Raw::open(&server.url(), &path, READ_WRITE | OPEN_CREATE).expect("a file");
            // Whichever worker has the one or the other.
            let (mut old, mut new) = if round % 2 == 0 {
                let old = open();
                (old, open())
            } else {
                let new = open();
                (open(), new)
            };
            server.hold_up();
            // The first blocks are written by both, the others by the one that gives up alone.
            send_writes(&mut old, 0..16, b'o');
            reset(old);
            send_writes(&mut new, 0..8, b'N');
            server.signal(Signal::CONT);
            for _ in 0..8 {
                assert!(new.response().expect("an answer").0.status.is_ok());
            }
            server.statistics_when(|now| now["connections"] == 1);
            let content = std::fs::read(directory.path().join(&name)).expect("a file");
            assert_eq!(content.len() as u64, 8 * BLOCK, "{backend}, round {round}");
            assert!(content.iter().all(|&byte| byte == b'N'), "{backend}, round {round}");
        }
        server.statistics_when(is_at_rest);
    }
}

#[test]
fn what_waits_behind_a_stuck_write_does_not_start_after_its_client_has_gone() {
    let content = vec![b'.'; WRITES as usize * BLOCK as usize];
    for backend in ["uring", "threads"] {
        // With the second the server does not see the end of the connection before the file system goes on.
        for is_held_up in [false, true] {
            let files: [(&str, &[u8]); 1] = [("file", &content)];
            let Some(fuse) = FuseFs::mount("a stuck write", FuseOptions::default(), &files) else { return };
            let export = format!("d={},rw", fuse.path().display());
            let mut server = Server::start_with(&[&export], &["--backend", backend]);
            let mut client = Raw::open(&server.url(), "/d/file", READ_WRITE).expect("a file");
            fuse.hang(FuseCall::Write);
            send_writes(&mut client, 0..WRITES, b'o');
            fuse.wait_for_hanging(FuseCall::Write, 1);
            server.statistics_when(|now| now["requests"]["write"] == WRITES);
            if is_held_up {
                server.signal(Signal::STOP);
            }
            reset(client);
            if !is_held_up {
                server.statistics_when(|now| now["connections"] == 0);
            }
            fuse.mend(FuseCall::Write);
            if is_held_up {
                server.signal(Signal::CONT);
            }
            server.statistics_when(is_at_rest);
            let case = format!("{backend}, held up: {is_held_up}");
            assert!(fuse.calls(FuseCall::Write) <= BEGUN_MAX, "{case}");
            let content = std::fs::read(fuse.file("file")).expect("a file");
            let written = content.chunks(BLOCK as usize).filter(|block| block[0] == b'o').count();
            assert!(written as u64 <= BEGUN_MAX, "{case}: {written}");
        }
    }
}
