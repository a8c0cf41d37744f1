//! The proxy does to connections what it is told.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use raio_e2e::{Direction, Ending, PATIENCE, Proxy, Treatment};

/// So long nothing happens, where it would happen at once.
const A_WHILE: Duration = Duration::from_millis(50);

/// A proxy, and how to connect through it: the client's end and the server's.
struct Way {
    proxy: Proxy,
    listener: TcpListener,
}

impl Way {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        Self { proxy: Proxy::start(listener.local_addr().expect("an address")), listener }
    }

    fn connect(&self, treatment: Treatment) -> [TcpStream; 2] {
        self.proxy.plan([treatment]);
        let client = TcpStream::connect(self.proxy.address()).expect("the proxy listens");
        let (server, _) = self.listener.accept().expect("the proxy connects");
        for end in [&client, &server] {
            end.set_read_timeout(Some(PATIENCE)).expect("a socket");
        }
        [client, server]
    }
}

/// What comes until the end, and how that comes.
fn receive(mut stream: &TcpStream) -> (Vec<u8>, Option<ErrorKind>) {
    let mut bytes = Vec::new();
    let end = stream.read_to_end(&mut bytes);
    (bytes, end.err().map(|error| error.kind()))
}

#[test]
fn what_is_not_cut_comes_through_in_order_and_its_end_too() {
    let way = Way::new();
    let [client, server] = way.connect(Treatment::default());
    let data: Vec<u8> = (0..3_000_000u32).map(|n| (n ^ n >> 8 ^ n >> 16) as u8).collect();
    for (mut from, to) in [(&client, &server), (&server, &client)] {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                from.write_all(&data).expect("it takes it");
                from.shutdown(std::net::Shutdown::Write).expect("a socket");
            });
            let (received, end) = receive(to);
            assert!(received == data && end.is_none(), "{} bytes, {end:?}", received.len());
        });
    }
    assert_eq!(way.proxy.passed(0, Direction::Up), 3_000_000);
    assert_eq!(way.proxy.passed(0, Direction::Down), 3_000_000);
}

#[test]
fn a_connection_is_cut_after_so_many_bytes_for_both_sides() {
    let way = Way::new();
    for direction in [Direction::Up, Direction::Down] {
        for after in [0, 1, 999, 1000] {
            for ending in [Ending::Fin, Ending::Reset, Ending::Silence] {
                let what = format!("{direction:?} {after} {ending:?}");
                let cut = Some((direction, after, ending));
                let [client, server] = way.connect(Treatment { cut, ..Treatment::default() });
                let (mut from, to) =
                    if direction == Direction::Up { (client, server) } else { (server, client) };
                if ending == Ending::Silence {
                    to.set_read_timeout(Some(A_WHILE)).expect("a socket");
                    from.set_read_timeout(Some(A_WHILE)).expect("a socket");
                }
                // It may be over before that, and then the error has been told.
                let is_sent = from.write_all(&[7; 1000]).is_ok();
                let (received, end) = receive(&to);
                assert_eq!(received, vec![7; after as usize], "{what}");
                let expected = match ending {
                    Ending::Fin => None,
                    Ending::Reset => Some(ErrorKind::ConnectionReset),
                    Ending::Silence => Some(ErrorKind::WouldBlock),
                };
                assert_eq!(end, expected, "{what}");
                if ending != Ending::Fin && is_sent {
                    assert_eq!(receive(&from).1, expected, "{what}");
                }
            }
        }
    }
    // A client that has gone from a silent connection is no longer there for the server.
    let cut = Some((Direction::Up, 0, Ending::Silence));
    let [client, server] = way.connect(Treatment { cut, ..Treatment::default() });
    drop(client);
    assert_eq!(receive(&server).1, Some(ErrorKind::ConnectionReset));
}

#[test]
fn one_bit_is_flipped_and_no_other() {
    let way = Way::new();
    let planned = Treatment { flip: Some((Direction::Up, 8 * 500 + 3)), ..Treatment::default() };
    for is_planned in [true, false] {
        let [mut client, mut server] = way.connect(if is_planned { planned } else { Treatment::default() });
        if !is_planned {
            way.proxy.flip(Direction::Up, 8 * 500 + 3);
        }
        let mut received = [0; 1000];
        client.write_all(&[0; 1000]).expect("it takes it");
        server.read_exact(&mut received).expect("it comes");
        let mut expected = [0; 1000];
        expected[500] = 1 << 3;
        assert_eq!(received, expected);
        client.write_all(&[0; 1000]).expect("it takes it");
        server.write_all(&[0; 1000]).expect("it takes it");
        for end in [&mut client, &mut server] {
            end.read_exact(&mut received).expect("it comes");
            assert_eq!(received, [0; 1000]);
        }
    }
}

#[test]
fn a_delay_is_kept_to_and_a_stalled_proxy_lets_nothing_through() {
    let way = Way::new();
    let [mut client, mut server] = way.connect(Treatment { delay: A_WHILE, ..Treatment::default() });
    let begin = Instant::now();
    client.write_all(b"x").expect("it takes it");
    server.read_exact(&mut [0]).expect("it comes");
    assert!(begin.elapsed() >= A_WHILE);

    let [mut client, mut server] = way.connect(Treatment::default());
    way.proxy.stall(true);
    client.write_all(b"x").expect("it takes it");
    server.set_read_timeout(Some(A_WHILE)).expect("a socket");
    assert_eq!(receive(&server), (Vec::new(), Some(ErrorKind::WouldBlock)));
    way.proxy.stall(false);
    server.set_read_timeout(Some(PATIENCE)).expect("a socket");
    server.read_exact(&mut [0]).expect("it comes");
}

#[test]
fn all_connections_end_at_once_and_new_ones_are_refused_as_told() {
    let way = Way::new();
    let all: Vec<_> = (0..10).flat_map(|_| way.connect(Treatment::default())).collect();
    way.proxy.end_all(Ending::Reset);
    for end in &all {
        assert_eq!(receive(end).1, Some(ErrorKind::ConnectionReset));
    }
    way.proxy.refuse(true);
    let refused = TcpStream::connect(way.proxy.address()).and_then(|mut stream| stream.read(&mut [0]));
    assert_eq!(refused.expect_err("refused").kind(), ErrorKind::ConnectionReset);
    way.proxy.refuse(false);
    let [mut client, mut server] = way.connect(Treatment::default());
    client.write_all(b"x").expect("it takes it");
    server.read_exact(&mut [0]).expect("it comes");
}
