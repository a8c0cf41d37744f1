//! Moving from TCP to a queue pair: what each side makes of what the other says of its own, and what ends
//! with what. That everything else is as ever is for the whole suite to show, which runs over such
//! connections too.

use std::io::Read;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use raio_transport::address::Scheme;
use raio_transport::error::{Class, Violation};
use raio_transport::handshake::{ChannelOffer, Offer, Policy};
use raio_transport::message::{self, HEADER_BYTES, Link, Parsed, QueuePairAddress};
use raio_transport::mux::{self, Reached};
use raio_transport::transport::{Bulk, ClientTransport, CloseReason};

use crate::harness::{
    Client, Op, PATIENCE, Server, Transport, command, has_rdma, room, serve_plain, tcp_pair, tcp_pair_by_rdma,
};
use crate::raw::{Got, Raw};

/// Within bounds, and nowhere.
pub const SOME_ADDRESS: QueuePairAddress = QueuePairAddress {
    gid: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1],
    qpn: 77,
    psn: 1,
    peer_psn: 2,
    mtu: 1024,
    lid: 0,
    reads: 1,
    link: Link::Ethernet,
};

/// A server, if there is a device.
fn server() -> Option<Server> {
    has_rdma().then(|| serve_plain(Transport::RdmaAfterTcp))
}

fn offer(name: &str) -> Offer {
    Offer { queue_pair: true, ..Offer::new(name) }
}

fn encoded(address: &QueuePairAddress) -> Vec<u8> {
    let mut bytes = Vec::new();
    message::encode_queue_pair(Ok(address), false, &mut bytes);
    bytes
}

/// A client that has shaken hands, may move and has not said anything.
fn unmoved(server: &Server, name: &str) -> Raw {
    let mut raw = Raw::client(server);
    raw.send(&offer(name).hello());
    let bytes = raw.handshake_bytes().expect("a welcome comes");
    let Ok(Parsed::Item(grant, _)) = offer(name).grant(&bytes) else { panic!("no grant") };
    assert!(grant.queue_pair, "the server offers to move");
    raw.limits = grant.limits();
    raw
}

#[test]
fn what_makes_no_sense_closes_the_connection_that_said_it() {
    let Some(server) = server() else { return };
    let mut bystander = server.bystander();
    let body = |at: usize, bytes: &[u8]| (HEADER_BYTES + at, bytes.to_vec());
    for (n, (what, (at, bytes), violation)) in [
        ("no GID", body(0, &[0; 16]), Violation::Field),
        ("the GID of a group", body(0, &[0xff]), Violation::Field),
        ("InfiniBand's own queue pair", body(16, &[1, 0, 0, 0]), Violation::Field),
        ("a number of 25 bits", body(16, &[0, 0, 0, 1]), Violation::Field),
        ("a packet number of 25 bits", body(20, &[0, 0, 0, 1]), Violation::Field),
        ("a packet number of 32 bits for the server", body(24, &[0xff; 4]), Violation::Field),
        ("packets of 1500 bytes", body(28, &[0xdc, 5, 0, 0]), Violation::Field),
        ("packets of no bytes", body(28, &[0; 4]), Violation::Field),
        ("a LID on Ethernet", body(32, &[1, 0]), Violation::Field),
        ("no link", body(36, &[0, 0]), Violation::Field),
        ("an unknown link", body(36, &[3, 0]), Violation::Field),
        ("InfiniBand without a LID", body(36, &[1, 0]), Violation::Field),
        ("something reserved", body(38, &[1, 0]), Violation::Reserved),
        ("a flag", (1, vec![1]), Violation::Field),
        ("an id", (8, vec![1]), Violation::Reserved),
        ("half an address", (2, vec![32]), Violation::Length),
        ("data", (4, vec![1]), Violation::Reserved),
        ("a failure", (16, vec![5, 0, 1]), Violation::Field),
    ]
    .into_iter()
    .enumerate()
    {
        let mut raw = unmoved(&server, what);
        let (_end, ours) = raw.unjoined();
        let mut message = encoded(&ours);
        message[at..at + bytes.len()].copy_from_slice(&bytes);
        raw.send(&message);
        assert_eq!(server.closed(n), CloseReason::Violation(violation), "{what}");
        assert!(raw.goaway().is_some(), "{what}: it is told why");
        bystander.works();
    }
    server.until_empty(1);
}

#[test]
fn a_queue_pair_that_cannot_be_reached_is_refused_with_the_reason_and_the_connection_goes_on() {
    let Some(server) = server() else { return };
    let mut bystander = server.bystander();
    type Change = fn(&mut QueuePairAddress);
    let cases: [(&str, Change, &str); 3] = [
        ("another network", |ours| (ours.link, ours.lid) = (Link::InfiniBand, 5), "another network"),
        ("somebody else's address", |ours| ours.gid[15] ^= 0x40, "is not its address"),
        ("no READs", |ours| ours.reads = 0, "no RDMA READ"),
    ];
    for (what, change, said) in cases {
        let mut raw = unmoved(&server, what);
        let (_end, mut ours) = raw.unjoined();
        change(&mut ours);
        raw.send_queue_pair(&ours);
        let Got::QueuePair(Err((status, text))) = raw.next() else { panic!("{what}: not rejected") };
        assert!(status.errno != 0 && status.class == Class::Transport, "{status:?}");
        assert!(
            text.contains(said) && text.contains(" port 1, GID ::ffff:") && text.ends_with('.'),
            "{text}"
        );
        for id in 0..3 {
            raw.request(id, &command(Op::Echo, id), &[]);
            assert!(matches!(raw.next(), Got::Response(..)), "{what}");
        }
        // It was asked once.
        raw.send_queue_pair(&ours);
        assert!(raw.goaway().is_some_and(|(_, text)| text.contains('6')), "{what}");
        bystander.works();
    }
}

#[test]
fn a_connection_moves_before_its_first_request_or_not_at_all() {
    let Some(server) = server() else { return };
    let mut bystander = server.bystander();
    let mut late = unmoved(&server, "late");
    late.request(1, &command(Op::Echo, 0), &[]);
    assert!(matches!(late.next(), Got::Response(..)));
    late.send(&encoded(&SOME_ADDRESS));
    assert_eq!(server.closed(0), CloseReason::Violation(Violation::Kind(6)));

    let mut twice = unmoved(&server, "twice");
    let (_end, ours) = twice.unjoined();
    twice.send(&[encoded(&ours), encoded(&ours)].concat());
    assert_eq!(server.closed(1), CloseReason::Violation(Violation::Kind(6)));

    // It does not wait for the answer.
    let mut hasty = unmoved(&server, "hasty");
    let (_end, ours) = hasty.unjoined();
    hasty.send_queue_pair(&ours);
    hasty.request(1, &command(Op::Echo, 0), &[]);
    assert_eq!(server.closed(2), CloseReason::Violation(Violation::Kind(1)));

    // It has moved, and asks where it was.
    let mut confused = unmoved(&server, "confused");
    let (end, ours) = confused.unjoined();
    confused.send_queue_pair(&ours);
    let theirs = confused.next_queue_pair();
    assert_eq!((theirs.psn, theirs.peer_psn, theirs.reads), (ours.peer_psn, ours.psn, 0));
    confused.request(1, &command(Op::Echo, 0), &[]);
    assert_eq!(server.closed(3), CloseReason::Violation(Violation::Kind(1)));
    drop(end);
    bystander.works();
    server.until_empty(1);
}

#[test]
fn a_ping_is_answered_wherever_it_comes() {
    let Some(server) = server() else { return };
    let (mut raw, _) = Raw::open_client(&server, &Offer::new("both"));
    let mut ping = Vec::new();
    message::encode_ping(5, false, &mut ping);
    raw.send(&ping);
    assert_eq!(raw.next(), Got::Pong(5));
    let mut stream = raw.stream().try_clone().unwrap();
    stream.set_nonblocking(false).unwrap();
    std::io::Write::write_all(&mut stream, &ping).unwrap();
    let mut pong = vec![0; HEADER_BYTES];
    stream.read_exact(&mut pong).unwrap();
    assert_eq!(pong[0], 4);
    stream.set_nonblocking(true).unwrap();
    raw.request(1, &command(Op::Echo, 0), &[]);
    assert!(matches!(raw.next(), Got::Response(..)));
}

#[test]
fn the_end_of_a_clients_tcp_connection_is_the_end() {
    let Some(server) = server() else { return };
    let mut bystander = server.bystander();
    let (mut idle, _) = Raw::open_client(&server, &Offer::new("idle"));
    idle.stream().shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(server.closed(0), CloseReason::Finished);
    let (mut busy, _) = Raw::open_client(&server, &Offer::new("busy"));
    busy.request(1, &command(Op::Hold, 0), &[]);
    server.until("the request", |seen| (seen.requests == 1).then_some(()));
    busy.stream().shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(server.closed(1), CloseReason::Lost(0));
    server.until_empty(1);
    bystander.works();
}

#[test]
fn the_end_of_a_clients_queue_pair_is_the_end() {
    let Some(server) = server() else { return };
    let mut bystander = server.bystander();
    let mut raw = unmoved(&server, "deaf");
    let (end, ours) = raw.unjoined();
    raw.send_queue_pair(&ours);
    let theirs = raw.next_queue_pair();
    raw.join(end, &ours, &theirs);
    // It has two receives: the third answer finds none, while the TCP connection is as well as ever.
    for id in 0..3 {
        raw.request(id, &command(Op::Echo, 0), &[]);
        server.until("the answer", |seen| (seen.rdma.responses > id).then_some(()));
    }
    assert_eq!(server.closed(0), CloseReason::Violation(Violation::Stalled));
    let stream = raw.stream();
    stream.set_nonblocking(false).unwrap();
    stream.read_to_end(&mut Vec::new()).expect("it ends too");
    drop(raw);
    server.until_empty(1);
    bystander.works();
}

#[test]
fn the_end_of_a_servers_tcp_connection_ends_every_request_once() {
    if !has_rdma() {
        return;
    }
    let (mut client, mut raw) = Raw::server(Transport::RdmaAfterTcp, &Policy::default(), 0);
    for tag in 0..4 {
        client.send(tag, &command(Op::Get, tag), room(5000));
    }
    client.transport.flush();
    // What was answered before comes.
    let first = raw.next_request();
    raw.respond(&first, &[]);
    raw.stream().shutdown(std::net::Shutdown::Both).unwrap();
    let began = Instant::now();
    let replies = client.until_failed();
    assert_eq!(replies.len(), 4);
    assert_eq!(replies.iter().filter(|reply| reply.status.is_ok()).count(), 1);
    assert!(began.elapsed() < PATIENCE / 2);
    assert_eq!(client.transport.failure().map(|failure| failure.errno()), Some(libc::ECONNRESET));
}

#[test]
fn the_end_of_a_servers_queue_pair_ends_the_tcp_connection() {
    if !has_rdma() {
        return;
    }
    let (mut client, mut raw) = Raw::server(Transport::RdmaAfterTcp, &Policy::default(), 0);
    let mut stream = raw.stream().try_clone().unwrap();
    drop(raw);
    client.send(0, &command(Op::Echo, 0), Bulk::None);
    client.transport.flush();
    let replies = client.until_failed();
    assert_eq!((replies.len(), replies[0].status.class), (1, Class::Transport));
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).expect("it ends too");
}

/// What [`mux::connect`] makes of a server at a listener of `pair`'s kind.
fn reach(server: &Server, listener: TcpListener) -> Reached {
    let address = listener.local_addr().unwrap();
    let client = std::thread::spawn(move || {
        mux::connect(Scheme::Any, address, &Offer::new("any"), Instant::now() + PATIENCE)
    });
    while !client.is_finished() {
        listener.set_nonblocking(true).unwrap();
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true).unwrap();
                server.serve(stream);
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    client.join().unwrap().unwrap()
}

/// The same, of one that is over TCP, and why.
fn reach_over_tcp(server: &Server, listener: TcpListener) -> (Box<dyn ClientTransport>, String) {
    let Reached { transport, why_tcp } = reach(server, listener);
    (transport, why_tcp.expect("there is a reason"))
}

fn listener_by_rdma() -> TcpListener {
    let (_, server) = tcp_pair_by_rdma();
    TcpListener::bind((server.local_addr().unwrap().ip(), 0)).unwrap()
}

#[test]
fn a_client_that_leaves_it_open_gets_rdma_where_both_sides_have_it() {
    let Some(server) = server() else { return };
    let reached = reach(&server, listener_by_rdma());
    assert_eq!(reached.why_tcp, None);
    Client::over(reached.transport).works();
    server.until("the answers", |seen| (seen.rdma.responses == 3).then_some(()));
}

#[test]
fn a_client_that_leaves_it_open_is_told_why_it_stays_on_tcp() {
    if !has_rdma() {
        // There is a reason all the same.
        let server = serve_plain(Transport::TcpEpoll);
        let (client, why) = reach_over_tcp(&server, TcpListener::bind("127.0.0.1:0").unwrap());
        assert!(why.starts_with("Connected over TCP, not RDMA: there is no RDMA here ("), "{why}");
        return Client::over(client).works();
    }
    // Loopback belongs to no device.
    let server = serve_plain(Transport::RdmaAfterTcp);
    let (client, why) = reach_over_tcp(&server, TcpListener::bind("127.0.0.1:0").unwrap());
    assert!(
        why.contains("GID ::ffff:127.0.0.1 on ") && why.contains("port 1") && why.ends_with('.'),
        "{why}"
    );
    Client::over(client).works();
    // The server has none, though its address is right.
    let server = serve_plain(Transport::TcpEpoll);
    let (client, why) = reach_over_tcp(&server, listener_by_rdma());
    assert!(why.contains("the server has no RDMA"), "{why}");
    Client::over(client).works();
}

#[test]
fn a_server_that_sees_no_device_at_the_address_says_so() {
    let Some(server) = server() else { return };
    let (client, ours) = tcp_pair();
    ours.set_nonblocking(true).unwrap();
    server.serve(ours);
    let mut raw = Raw::over_stream(client);
    raw.send(&offer("loopback").hello());
    raw.handshake_bytes().expect("a welcome comes");
    raw.send(&encoded(&SOME_ADDRESS));
    let Got::QueuePair(Err((_, text))) = raw.next() else { panic!("not rejected") };
    assert!(text.contains("127.0.0.1") && text.contains(" port 1"), "{text}");
    raw.request(1, &command(Op::Echo, 0), &[]);
    assert!(matches!(raw.next(), Got::Response(..)));
}

/// What a client makes of a server that says this of its queue pair: how the upgrade fails.
fn answered(change: impl FnOnce(&mut QueuePairAddress)) -> (bool, String) {
    let policy = Policy { queue_pair: true, ..Policy::default() };
    let (client, mut raw) = Raw::server_before_handshake(Transport::RdmaAfterTcp, Offer::new("careful"));
    let hello = raw.handshake_bytes().expect("a hello comes");
    let Ok(Parsed::Item((_, welcome), _)) = policy.welcome(&hello) else { panic!("half a hello") };
    raw.send(&welcome);
    let theirs = raw.next_queue_pair();
    let (_end, ours) = raw.unjoined();
    let mut ours = QueuePairAddress { psn: theirs.peer_psn, peer_psn: theirs.psn, reads: 0, ..ours };
    change(&mut ours);
    raw.send_queue_pair(&ours);
    let error = client.join().unwrap().map(|_| ()).unwrap_err();
    (raw.goaway().is_some(), error.to_string())
}

#[test]
fn a_client_gives_up_a_server_whose_queue_pair_makes_no_sense() {
    if !has_rdma() {
        return;
    }
    type Change = fn(&mut QueuePairAddress);
    let cases: [(&str, Change); 4] = [
        ("numbers that were not chosen", |ours| ours.psn ^= 1),
        ("numbers that were not chosen for it", |ours| ours.peer_psn ^= 1),
        ("READs that nobody may ask for", |ours| ours.reads = 1),
        ("another network", |ours| (ours.link, ours.lid) = (Link::InfiniBand, 5)),
    ];
    for (what, change) in cases {
        let (is_told, text) = answered(change);
        assert!(is_told, "{what}: the server is told why");
        assert!(text.contains("value without meaning"), "{what}: {text}");
    }
    let (_, text) = answered(|ours| ours.qpn ^= 0x10_0000);
    assert!(text.contains("does not answer over the queue pair") && text.contains("GID ::ffff:"), "{text}");
}

#[test]
fn a_server_that_is_busy_has_a_while_to_answer_over_the_queue_pair() {
    if !has_rdma() {
        return;
    }
    let (client, _server) =
        Raw::busy_server(Transport::RdmaAfterTcp, &Policy::default(), 0, Duration::from_millis(1500));
    assert!(client.transport.failure().is_none());
}

#[test]
fn a_queue_pair_over_which_nothing_comes_is_given_up_for_a_new_tcp_connection() {
    if !has_rdma() {
        return;
    }
    let listener = listener_by_rdma();
    let address = listener.local_addr().unwrap();
    let channel = ChannelOffer { number: 1, epoch: 5, linger: Duration::from_secs(10) };
    let offer = Offer { channel: Some(channel), ..Offer::new("any") };
    let client =
        std::thread::spawn(move || mux::connect(Scheme::Any, address, &offer, Instant::now() + PATIENCE));
    let policy = Policy { queue_pair: true, ..Policy::default() };
    let welcome = || {
        let mut raw = Raw::over_stream(listener.accept().unwrap().0);
        let hello = raw.handshake_bytes().expect("a hello comes");
        let Ok(Parsed::Item((peer, welcome), _)) = policy.welcome(&hello) else { panic!("half a hello") };
        raw.send(&welcome);
        (raw, peer.grant.queue_pair, peer.channel.expect("it has one").epoch)
    };
    let (mut first, moves, epoch) = welcome();
    assert!(moves, "it is asked for");
    assert_eq!(epoch, 5);
    let theirs = first.next_queue_pair();
    let (_end, ours) = first.unjoined();
    // Nobody is there.
    first.send_queue_pair(&QueuePairAddress { psn: theirs.peer_psn, peer_psn: theirs.psn, reads: 0, ..ours });
    first.goaway();
    let (_second, moves, second_epoch) = welcome();
    assert!(!moves, "it is not asked for again");
    assert_eq!(second_epoch, 6, "a server takes no epoch twice");
    let Reached { transport, why_tcp } = client.join().unwrap().unwrap();
    assert!(transport.failure().is_none());
    let why = why_tcp.expect("it is over TCP");
    assert!(why.contains("does not answer over the queue pair"), "{why}");
}

#[test]
fn connections_that_moved_count_once_and_leave_nothing() {
    let Some(server) = server() else { return };
    let mut clients: Vec<_> = (0..10).map(|_| server.client()).collect();
    clients.iter_mut().for_each(Client::works);
    server.until("ten connections", |seen| (seen.connections == 10).then_some(()));
    drop(clients);
    server.until_empty(0);
    server.each_seen(|seen| assert_eq!(seen.reasons(), ["finished"; 10]));
}
