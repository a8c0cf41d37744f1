//! A server whose kernel seals and opens the records of TLS, besides the contract: transfers over each event
//! loop, keys that are used up, and records that are no data. Each test is skipped where the kernel cannot do
//! that.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Instant;

use raio_transport::error::Violation;
use raio_transport::handshake::{Identity, Offer};
use raio_transport::keys::SecretKey;
use raio_transport::message::{HANDSHAKE_BYTES, RequestHeader};
use raio_transport::tcp::TcpClient;
use raio_transport::tls::{ClientTls, ServerTls};
use raio_transport::transport::{Bulk, CloseReason, SendOptions};
use rustls::{ClientConnection, StreamOwned};

use crate::harness::{
    Client, Op, PATIENCE, Server, Setup, Transport, bytes_of, command, data, has_kernel_tls, pattern, room,
    serve_plain, tcp_pair,
};
use crate::tls::takes_in_what_comes_with_the_handshake;
use crate::tls_peer::{self, CLIENT_KEY, SERVER_KEY, accept, kernel_server_tls, lasting_client_tls};

const LARGE: usize = 256 << 10;

/// A client that connects with this to a server with that.
fn connect(server: &Server, client: ClientTls, tls: ServerTls) -> Client {
    let (ours, theirs) = tcp_pair();
    server.shake_hands(theirs, tls);
    let offer = Offer { tls: Some(client), ..Offer::new("test") };
    Client::over(Box::new(TcpClient::from_stream(ours, &offer, Instant::now() + PATIENCE).unwrap()))
}

#[test]
fn data_of_every_length_goes_both_ways_over_each_event_loop() {
    if !has_kernel_tls() {
        return;
    }
    for event_loop in Transport::TCP {
        let setup = Setup { event_loop: Some(event_loop), ..Setup::default() };
        let server = Server::start(Transport::KernelTls, setup);
        let mut client = server.client();
        client.works();
        // About the lengths of records, and of what is received straight into its place.
        for len in [1, 16_383, 16_384, 16_385, 32_767, 32_768, 33_000, 100_000, LARGE] {
            client.put(len as u64, len);
            client.get(len as u64, len);
        }
        // Many at a time.
        for tag in 0..8 {
            let (op, bulk) =
                if tag % 2 == 0 { (Op::Get, room(LARGE)) } else { (Op::Put, data(pattern(tag, LARGE))) };
            client.send(tag, &command(op, tag), bulk);
        }
        for _ in 0..8 {
            let reply = client.next();
            assert_eq!((reply.status.is_ok(), reply.result), (true, LARGE as u64));
            assert!(bytes_of(&reply.bulk) == pattern(reply.tag, LARGE), "{} came over wrong", reply.tag);
        }
        let identity = server.until("a client", |seen| Some(seen.opened.first()?.1.identity.clone()));
        assert_eq!(identity, Identity::Key(CLIENT_KEY.public()));
        drop(client);
        assert_eq!(server.closed(0), CloseReason::Finished);
        server.until_empty(0);
    }
}

#[test]
fn what_comes_with_the_handshake_is_left_to_the_kernel() {
    if has_kernel_tls() {
        takes_in_what_comes_with_the_handshake(Transport::KernelTls);
    }
}

#[test]
fn those_who_may_not_connect_hear_why() {
    if !has_kernel_tls() {
        return;
    }
    let stranger = ClientTls::new(&SecretKey::generate(), &[SERVER_KEY.public()]);
    for (client, errno) in [(None, libc::ENOKEY), (Some(stranger), libc::EKEYREJECTED)] {
        let (ours, theirs) = tcp_pair();
        let accepted = std::thread::spawn(move || accept(theirs, &kernel_server_tls()).map(drop));
        let offer = Offer { tls: client, ..Offer::new("test") };
        let error = TcpClient::from_stream(ours, &offer, Instant::now() + PATIENCE).unwrap_err();
        assert_eq!(error.errno(), errno, "{error}");
        assert_eq!(accepted.join().unwrap().unwrap_err().errno(), errno);
    }
}

/// Has commands come back until the connection ends. Returns how many have.
fn echo_until_it_ends(client: &mut Client) -> u64 {
    let deadline = Instant::now() + PATIENCE;
    let (mut count, mut replies) = (0, Vec::new());
    while client.transport.failure().is_none() {
        let body = command(Op::Echo, count);
        if client.transport.send(count, &body, Bulk::None, SendOptions::PLAIN).is_err() {
            break;
        }
        client.transport.flush();
        while replies.is_empty() && client.transport.failure().is_none() {
            assert!(Instant::now() < deadline, "after {count} nothing comes");
            client.transport.wait(Some(deadline)).unwrap();
            client.transport.receive(&mut replies);
        }
        for reply in replies.drain(..).filter(|reply| reply.status.is_ok()) {
            assert_eq!(&*reply.body, &command(Op::Echo, count)[..]);
            count += 1;
        }
    }
    count
}

/// It ended since a key was used up, and says so; others are served.
fn was_used_up(server: &Server, client: &Client) {
    let failure = client.transport.failure().expect("it has ended").to_string();
    assert!(failure.contains("Connect again"), "{failure}");
    assert_eq!(server.closed(0), CloseReason::KeyUsedUp);
    server.serves_others();
}

#[test]
fn a_client_that_changes_its_key_is_told_to_connect_again() {
    if !has_kernel_tls() {
        return;
    }
    let server = serve_plain(Transport::KernelTls);
    // Another key after 20 records. The first of them was the hello.
    let mut client = connect(&server, tls_peer::client_tls(), kernel_server_tls());
    let count = echo_until_it_ends(&mut client);
    assert!((10..20).contains(&count), "{count} came back");
    was_used_up(&server, &client);
}

#[test]
fn a_server_ends_a_connection_whose_key_it_has_used_up() {
    if !has_kernel_tls() {
        return;
    }
    let server = serve_plain(Transport::KernelTls);
    // The first of 20 records is the welcome.
    let mut client = connect(&server, lasting_client_tls(), tls_peer::server_tls().in_kernel());
    let count = echo_until_it_ends(&mut client);
    assert!((10..20).contains(&count), "{count} came back");
    was_used_up(&server, &client);
}

/// A client by rustls that was welcomed.
fn rustls_client(server: &Server) -> StreamOwned<ClientConnection, TcpStream> {
    let (ours, theirs) = tcp_pair();
    server.serve(theirs);
    let connection = ClientConnection::new(lasting_client_tls().config(), "raio".try_into().unwrap());
    let mut stream = StreamOwned::new(connection.unwrap(), ours);
    stream.sock.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&Offer::new("test").hello()).unwrap();
    let mut welcome = vec![0; HANDSHAKE_BYTES];
    stream.read_exact(&mut welcome).unwrap();
    let options = u32::from_le_bytes(welcome[12..16].try_into().unwrap()) as usize;
    stream.read_exact(&mut vec![0; options]).unwrap();
    stream
}

#[test]
fn the_end_of_a_connection_is_announced_on_both_sides() {
    if !has_kernel_tls() {
        return;
    }
    let server = serve_plain(Transport::KernelTls);
    let mut stream = rustls_client(&server);
    stream.conn.send_close_notify();
    stream.flush().unwrap();
    stream.sock.shutdown(Shutdown::Write).unwrap();
    assert_eq!(server.closed(0), CloseReason::Finished);

    let mut stream = rustls_client(&server);
    let mut request = Vec::new();
    let header = RequestHeader::of_command(1);
    header.encode(&command(Op::Close, 0), false, &mut request);
    stream.write_all(&request).unwrap();
    let mut last = Vec::new();
    // Without close_notify this is an error.
    stream.read_to_end(&mut last).expect("the server says that it ends the connection");
    assert!(String::from_utf8_lossy(&last).contains("Come back tomorrow."));
    drop(stream);
    server.until_empty(0);
}

#[test]
fn a_record_that_the_kernel_cannot_open_closes_its_connection() {
    if !has_kernel_tls() {
        return;
    }
    let server = serve_plain(Transport::KernelTls);
    let mut stream = rustls_client(&server);
    let record = [&[23, 3, 3, 0, 40][..], &[7; 40]].concat();
    stream.sock.write_all(&record).unwrap();
    assert_eq!(server.closed(0), CloseReason::Violation(Violation::Record));
    server.serves_others();
}
