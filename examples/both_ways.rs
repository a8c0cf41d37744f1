//! Messages both ways: a server that asks its client, and one-way messages in both directions.
//!
//! ```text
//! cargo run --example both_ways [NUMBER]
//! ```
//!
//! The client thinks of a number, and requests that the server find it. The server sends requests of its own:
//! whether the number is smaller than another one. After each answer it says by a one-way message how far it
//! is, which nobody answers. In the end it answers the client's request with the number. The client thanks it
//! by a one-way message, and waits for the receipt: the server's program has taken it.

use std::collections::HashMap;
use std::error::Error;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use raio_transport::Status;
use raio_transport::event_loop::EventLoop;
use raio_transport::handshake::{Offer, Policy, PushWindows};
use raio_transport::reactor::Wait;
use raio_transport::tcp;
use raio_transport::transport::{
    Body, Bulk, ClientEvent, ClientTransport, ConnectionId, OneWay, Push, RequestKey, Response, SendOptions,
    ServerEvent,
};

/// How many messages of each kind may be under way: the client offers it, and the server grants it.
const WINDOWS: PushWindows = PushWindows { to_server: 4, to_client: 16, requests: 1 };
const LIMIT: u64 = 1000;

fn main() -> Result<(), Box<dyn Error>> {
    let number = std::env::args().nth(1).map_or(Ok(617), |text| text.parse())?;
    if number >= LIMIT {
        return Err(format!("{number} is too large; think of a number below {LIMIT}").into());
    }
    let (listener, address) = tcp::listen("127.0.0.1:0".parse::<SocketAddr>()?)?;
    thread::spawn(move || serve(listener).expect("the server serves"));
    find(address.ip().expect("it listens at an IP address"), number)
}

/// Has the server find the number.
fn find(server: SocketAddr, number: u64) -> Result<(), Box<dyn Error>> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let offer = Offer { push: WINDOWS, ..Offer::new("both ways") };
    let mut client = tcp::TcpClient::connect(server, &offer, deadline)?;
    client.send(1, b"find it", Bulk::None, SendOptions::PLAIN).expect("a new connection has credits");
    let mut replies = Vec::new();
    let mut has_receipt = false;
    while !has_receipt {
        client.flush();
        client.wait(Some(deadline))?;
        client.receive(&mut replies);
        while let Some(event) = client.next_event() {
            match event {
                ClientEvent::Request(request, body) => {
                    let is_smaller = number < u64_of(&body);
                    client.answer(request, Status::OK, is_smaller.into(), &[]);
                }
                ClientEvent::OneWay(body) => {
                    println!("client: the server has {} numbers left", u64_of(&body));
                    // Makes room for the next one.
                    client.release();
                }
                ClientEvent::Receipt(_) => has_receipt = true,
                ClientEvent::Refused => return Err("the server takes no thanks".into()),
            }
        }
        for reply in replies.drain(..) {
            println!("client: it is {}", reply.result);
            client.send_one_way(OneWay { message: b"Thank you!", tag: 0, wants_receipt: true })?;
        }
        if let Some(failure) = client.failure() {
            return Err(failure.to_string().into());
        }
        if Instant::now() >= deadline {
            return Err("the server is too slow".into());
        }
    }
    println!("client: the server has taken the thanks");
    Ok(())
}

fn u64_of(body: &[u8]) -> u64 {
    u64::from_le_bytes(body[..8].try_into().expect("a number has 8 bytes"))
}

fn serve(listener: OwnedFd) -> Result<(), Box<dyn Error>> {
    let policy = Policy { push: WINDOWS, ..Policy::default() };
    let mut server = EventLoop::new(tcp::TcpServer::new(0, Arc::new(policy)))?;
    server.listen(listener);
    // What each client has requested, and where its number is.
    let mut searches: HashMap<ConnectionId, (RequestKey, Range<u64>)> = HashMap::new();
    loop {
        server.run_once(Wait::Block)?;
        while let Some(event) = server.next_event() {
            match event {
                ServerEvent::Request(request) => {
                    let connection = request.key.connection;
                    if searches.contains_key(&connection) {
                        server.respond(request.key, response(Status::storage(libc::EBUSY), 0));
                        continue;
                    }
                    searches.insert(connection, (request.key, 0..LIMIT));
                    ask(&mut server, connection, LIMIT / 2);
                }
                ServerEvent::Answered(connection, answer) => {
                    let Some((key, range)) = searches.get_mut(&connection) else { continue };
                    // The tag is what was asked about.
                    if answer.result != 0 {
                        range.end = answer.tag;
                    } else {
                        range.start = answer.tag;
                    }
                    let left = range.end.saturating_sub(range.start);
                    let message = &left.to_le_bytes()[..];
                    let progress = OneWay { message, tag: 0, wants_receipt: false };
                    // A client that is behind with these misses some.
                    let _ = server.push(connection, Push::OneWay(progress));
                    if left > 1 {
                        let middle = range.start + left / 2;
                        ask(&mut server, connection, middle);
                    } else {
                        let (key, found) = (*key, range.start);
                        searches.remove(&connection);
                        server.respond(key, response(Status::OK, found));
                    }
                }
                ServerEvent::OneWay(connection, message) => {
                    println!("server: it says {:?}", String::from_utf8_lossy(&message));
                    server.release(connection);
                }
                ServerEvent::Closed(connection, _) => drop(searches.remove(&connection)),
                ServerEvent::Fetched(key, _) | ServerEvent::Damaged(key, _) => {
                    server.respond(key, response(Status::protocol(libc::EINVAL), 0));
                }
                ServerEvent::Opened(..)
                | ServerEvent::Moved(..)
                | ServerEvent::Receipt(..)
                | ServerEvent::Refused(_) => {}
            }
        }
    }
}

/// Asks the client whether its number is smaller than this.
fn ask(server: &mut EventLoop<tcp::TcpServer>, connection: ConnectionId, middle: u64) {
    // One request at a time is always within the window, unless the client has granted none.
    if server.push(connection, Push::Request(middle, &middle.to_le_bytes())).is_err() {
        server.close(connection, Status::policy(libc::EPERM), "The client does not answer requests.");
    }
}

fn response(status: Status, result: u64) -> Response {
    Response { status, result, body: Body::default(), data: None }
}
