//! Clients whose host vanishes while they are connected, and a client that only takes nothing, with the
//! server's real timeouts.

use std::io::Read;
use std::time::{Duration, Instant};

use raio_e2e::{Cable, End, Raw, Server, binary, is_at_rest};
use raio_transport::protocol::OPEN_READ;
use rustix::process::Signal;

const BLOCK: usize = 1 << 20;
/// More of them than fit into the sockets.
const BLOCKS: usize = 32;

fn content() -> Vec<u8> {
    (0..BLOCKS * BLOCK).map(|at| (at ^ at >> 8 ^ at >> 16) as u8).collect()
}

fn ask_for_everything(client: &mut Raw) {
    for n in 0..BLOCKS {
        client.send_read(n as u64, (n * BLOCK) as u64, BLOCK as u32).expect("the kernel takes it");
    }
}

#[test]
#[ignore = "long"]
fn clients_whose_host_has_vanished_are_closed_with_a_line_in_the_log() {
    let Some(cable) = Cable::new("a host that vanishes") else { return };
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("file"), content()).expect("a file");
    let log = directory.path().join("log");
    let mut command = cable.command(End::A, binary("raio_server"));
    command.args(["--listen", &format!("tcp://{}:0", cable.address(End::A))]);
    command.args(["--export", &format!("f={}", directory.path().join("file").display())]);
    command.stderr(std::fs::File::create(&log).expect("a log"));
    let mut server = Server::spawn(command);
    let url = server.url();
    let open = || cable.on(End::B, || Raw::open(&url, "/f", OPEN_READ)).expect("a file");

    // One is idle, one takes none of its responses, and one gets its response when it has gone.
    let _idle = open();
    let mut full = open();
    ask_for_everything(&mut full);
    let mut waiting = open();
    std::thread::sleep(Duration::from_secs(1));
    server.hold_up();
    waiting.send_read(0, 0, 4096).expect("the kernel takes it");
    std::thread::sleep(Duration::from_secs(1));
    cable.pull();
    server.signal(Signal::CONT);

    let begin = Instant::now();
    let mut wait_until_closed = |count: u64, limit: Duration| loop {
        let statistics = server.statistics();
        if statistics["closes"]["unreachable"].as_u64() >= Some(count) {
            break (begin.elapsed(), statistics);
        }
        assert!(begin.elapsed() < limit, "{statistics}");
        std::thread::sleep(Duration::from_millis(500));
    };
    let (first, _) = wait_until_closed(1, Duration::from_secs(60));
    assert!(first > Duration::from_secs(29), "{first:?}");
    let (second, _) = wait_until_closed(2, Duration::from_secs(90));
    let (last, statistics) = wait_until_closed(3, Duration::from_secs(180));
    eprintln!("They were closed after {first:?}, {second:?} and, the idle one, {last:?}.");
    assert!(is_at_rest(&statistics), "{statistics}");
    let log = std::fs::read_to_string(log).expect("a log");
    let lines = log.lines().filter(|line| line.contains("nothing has come from its host"));
    assert!(
        lines.clone().count() > 0 && lines.clone().all(|line| line.contains(cable.address(End::B))),
        "{log}"
    );
}

#[test]
#[ignore = "long"]
fn a_client_that_takes_nothing_for_two_minutes_is_kept_and_then_gets_every_byte() {
    let directory = tempfile::tempdir().expect("a directory");
    let content = content();
    std::fs::write(directory.path().join("file"), &content).expect("a file");
    let export = format!("f={}", directory.path().join("file").display());
    let mut server = Server::start(&[&export]);
    let mut client = Raw::open(&server.url(), "/f", OPEN_READ).expect("a file");
    ask_for_everything(&mut client);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(120) {
        let statistics = server.statistics();
        assert_eq!(statistics["connections"], 1, "after {:?}: {statistics}", begin.elapsed());
        std::thread::sleep(Duration::from_secs(1));
    }
    let mut data = vec![0; BLOCK];
    for _ in 0..BLOCKS {
        let (response, _) = client.response().expect("a response");
        assert!(response.status.is_ok(), "{response:?}");
        client.stream.read_exact(&mut data).expect("its data");
        let at = response.id as usize * BLOCK;
        assert!(data == content[at..at + BLOCK], "the response to {}", response.id);
    }
}
