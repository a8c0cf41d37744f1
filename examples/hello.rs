//! Hello, world: a server that answers a greeting and a client that sends one, in one program.
//!
//! ```text
//! cargo run --example hello
//! ```
//!
//! A command is whatever your client and your server agree on. Here it is a line of text, and so is the
//! answer.

use std::error::Error;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use raio_transport::Status;
use raio_transport::event_loop::EventLoop;
use raio_transport::handshake::{Offer, Policy};
use raio_transport::message::text;
use raio_transport::reactor::Wait;
use raio_transport::tcp;
use raio_transport::transport::{Body, Bulk, ClientTransport, Response, SendOptions, ServerEvent};

fn main() -> Result<(), Box<dyn Error>> {
    // Port 0: whichever is free.
    let (listener, address) = tcp::listen("127.0.0.1:0".parse::<SocketAddr>()?)?;
    thread::spawn(move || serve(listener).expect("the server serves"));

    let deadline = Instant::now() + Duration::from_secs(5);
    let mut client = tcp::TcpClient::connect(address, &Offer::new("hello"), deadline)?;
    client.send(1, b"Hello, server!", Bulk::None, SendOptions::PLAIN).expect("a new connection has credits");
    client.flush();

    let mut replies = Vec::new();
    while replies.is_empty() {
        client.wait(None)?;
        client.receive(&mut replies);
    }
    println!("client: the server says {:?}", text(&replies[0].body));
    Ok(())
}

/// One thread that accepts, receives and answers, for any number of clients.
fn serve(listener: OwnedFd) -> std::io::Result<()> {
    let mut server = EventLoop::new(tcp::TcpServer::new(0, Arc::new(Policy::default())))?;
    server.listen(listener);
    loop {
        // Sends the answers, and waits until something has happened.
        server.run_once(Wait::Block)?;
        while let Some(event) = server.next_event() {
            match event {
                ServerEvent::Opened(_, peer) => println!("server: {:?} is here", peer.name),
                ServerEvent::Request(request) => {
                    println!("server: it says {:?}", text(&request.body));
                    let body = Body::from(&b"Hello, client!"[..]);
                    server.respond(request.key, Response { status: Status::OK, result: 0, body, data: None });
                }
                ServerEvent::Closed(_, reason) => println!("server: it left ({})", reason.name()),
                ServerEvent::Fetched(..) | ServerEvent::Damaged(..) => {
                    unreachable!("greetings bring no data")
                }
                ServerEvent::Moved(..) => unreachable!("there is one transport"),
                ServerEvent::OneWay(..)
                | ServerEvent::Receipt(..)
                | ServerEvent::Refused(_)
                | ServerEvent::Answered(..) => unreachable!("its policy grants none"),
            }
        }
    }
}
