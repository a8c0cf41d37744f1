//! What one session or one address may have: whoever takes all is rejected, with an error that says why, and the next client is not.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::Command;

use raio_e2e::{Raw, Server, binary, raw_request};
use raio_transport::handshake::Offer;
use raio_transport::message::{self, HANDSHAKE_BYTES, Parsed};
use raio_transport::protocol::{Command as Ask, OPEN_READ};

const OPEN_FILES: usize = 700;

/// A server that may have so many open files and no more.
fn start(arguments: &str) -> Server {
    let server = binary("raio_server");
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!(
        "ulimit -n {OPEN_FILES} && exec {} --workers 2 --listen tcp://127.0.0.1:0 --export n=null:1M --export etc=/etc {arguments}",
        server.display()
    ));
    Server::spawn(command)
}

/// A further connection of a session. The error is the server's.
fn connect(server: &Server, offer: &Offer) -> Result<TcpStream, String> {
    let failed = |error: io::Error| error.to_string();
    let mut stream = TcpStream::connect(server.address()).map_err(failed)?;
    // A rejected client may find the connection closed before it has said anything.
    let _ = stream.write_all(&offer.hello());
    let mut welcome = vec![0; HANDSHAKE_BYTES];
    stream.read_exact(&mut welcome).map_err(failed)?;
    loop {
        match offer.grant(&welcome).map_err(|error| error.to_string())? {
            Parsed::Need(n) => {
                let have = welcome.len();
                welcome.resize(n, 0);
                stream.read_exact(&mut welcome[have..]).map_err(failed)?;
            }
            Parsed::Item(..) => return Ok(stream),
        }
    }
}

/// Opens the file until the server rejects that. Gives how often it did not, and its error.
fn open_all(raw: &mut Raw, path: &str) -> (usize, i32, String) {
    for opened in 0..2 * OPEN_FILES {
        let ask = Ask::Open { flags: OPEN_READ, mode: 0, path: path.as_bytes() };
        raw.stream.write_all(&raw_request(1, &ask, 0)).expect("the connection goes on");
        let (response, body) = raw.response().expect("an answer");
        if !response.status.is_ok() {
            return (opened, response.status.errno, message::text(&body).to_owned());
        }
    }
    panic!("it may have any number of files");
}

fn rejected(server: &mut Server, what: &str) -> u64 {
    let statistics = server.statistics();
    statistics["rejected"][what].as_u64().unwrap_or_else(|| panic!("{what} is not in {statistics}"))
}

#[test]
fn a_session_that_takes_every_file_and_every_connection_is_rejected_and_the_next_session_is_not() {
    let mut server = start("");
    let url = server.url();
    let mut greedy = Raw::open(&url, "/etc/passwd", OPEN_READ).expect("a client");
    let (opened, errno, text) = open_all(&mut greedy, "/etc/passwd");
    println!("{opened} files, then: {text}");
    assert_eq!(errno, libc::EMFILE, "{text}");
    assert!(opened > OPEN_FILES / 4, "only {opened} files: nobody else wanted any");
    assert_eq!(rejected(&mut server, "session_files"), 1);
    drop(Raw::open(&url, "/etc/passwd", OPEN_READ).expect("another session has its file"));

    let offer = Offer::new("greedy");
    let mut connections = Vec::new();
    let text = loop {
        match connect(&server, &offer) {
            Ok(stream) => connections.push(stream),
            Err(text) => break text,
        }
        assert!(connections.len() < OPEN_FILES, "it may have any number of connections");
    };
    println!("{} connections, then: {text}", connections.len());
    assert!(text.contains("this session's"), "{text}");
    assert!(rejected(&mut server, "session_connections") > 0);
    let others: Vec<_> = (0..3)
        .map(|_| Raw::open(&url, "/etc/passwd", OPEN_READ).expect("other sessions have their places"))
        .collect();

    drop((others, connections, greedy));
    server.statistics_when(raio_e2e::is_at_rest);
    drop(connect(&server, &offer).expect("there are places again"));
}

#[test]
fn caps_reject_only_who_exceeds_them() {
    let mut server =
        start("--max-connections-per-session 3 --max-files-per-session 5 --max-connections-per-address 8");
    let url = server.url();
    let mut raw = Raw::open(&url, "/n", OPEN_READ).expect("a client");
    let (opened, errno, text) = open_all(&mut raw, "/n");
    assert_eq!((opened, errno), (4, libc::EMFILE));
    assert!(text.contains("--max-files-per-session"), "{text}");

    let offer = Offer::new("many");
    let connections: Vec<_> = (0..3).map(|_| connect(&server, &offer).expect("it may have three")).collect();
    let text = connect(&server, &offer).expect_err("it may have three");
    assert!(text.contains("--max-connections-per-session"), "{text}");

    server.statistics_when(|statistics| statistics["connections"] == 4);
    let others: Vec<_> =
        (0..4).map(|_| connect(&server, &Offer::new("other")).expect("the address may have eight")).collect();
    let text = connect(&server, &offer).expect_err("the address may have eight");
    assert!(text.contains("--max-connections-per-address"), "{text}");
    for (what, count) in [("session_files", 1), ("session_connections", 1), ("address_connections", 1)] {
        assert_eq!(rejected(&mut server, what), count, "{what}");
    }
    drop((others, connections, raw));
    server.statistics_when(raio_e2e::is_at_rest);
    drop(connect(&server, &offer).expect("there are places again"));
}

#[test]
fn a_connection_that_pings_and_never_reads_costs_little() {
    const CLIENTS: usize = 128;
    /// Pongs that are being sent, others behind them, and what was received behind those.
    const BYTES_MAX: u64 = 24 << 10;
    let mut server = start("");
    let url = server.url();
    let mut pings = Vec::new();
    (0..4096).for_each(|id| message::encode_ping(id, false, &mut pings));
    let mut clients: Vec<_> =
        (0..CLIENTS).map(|_| Raw::open(&url, "/n", OPEN_READ).expect("a client")).collect();
    let mut fill = |clients: &mut [Raw]| {
        for raw in clients {
            raw.stream.set_nonblocking(true).expect("a socket");
            let mut sent = 0;
            // Until the server takes no more: it receives whatever it has not yet stopped to.
            while let Ok(n) = raw.stream.write(&pings[sent % pings.len()..]) {
                sent += n;
            }
        }
    };
    let (first, rest) = clients.split_at_mut(CLIENTS / 2);
    let is_full = |server: &mut Server, clients: &mut [Raw], fill: &mut dyn FnMut(&mut [Raw])| {
        let mut last = u64::MAX;
        loop {
            fill(clients);
            std::thread::sleep(std::time::Duration::from_millis(50));
            let turns = server.statistics()["turns"].as_u64().expect("a number");
            if turns.wrapping_sub(last) < 8 {
                break;
            }
            last = turns;
        }
    };
    is_full(&mut server, first, &mut fill);
    let before = server.resident_bytes();
    is_full(&mut server, rest, &mut fill);
    let each = server.resident_bytes().saturating_sub(before) / (CLIENTS / 2) as u64;
    println!("{} KiB for each connection that pings", each >> 10);
    assert!(each < BYTES_MAX, "{each} bytes for each connection");
}
