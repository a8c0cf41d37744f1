//! Hello, many times over: several client threads, and a server of several workers.
//!
//! ```text
//! cargo run --example hello_mt [WORKERS [CLIENTS [GREETINGS]]]
//! ```
//!
//! Nothing is shared: each worker has a reactor and a transport of its own. One thread accepts, and hands
//! each new socket, handshake and all, to the next worker through that worker's mailbox. So a client that is
//! slow to shake hands delays nobody.

use std::error::Error;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use raio_transport::Status;
use raio_transport::event_loop::EventLoop;
use raio_transport::handshake::{Offer, Policy};
use raio_transport::message::text;
use raio_transport::reactor::{Receiver, Sender, Wait, mailbox};
use raio_transport::tcp;
use raio_transport::transport::{
    Accepted, AcceptedStream, Body, Bulk, ClientTransport, Response, SendOptions, ServerEvent,
};

/// What a worker finds in its mailbox.
enum Mail {
    Client(OwnedFd),
    Stop,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<usize>());
    let mut argument = |default| arguments.next().unwrap_or(Ok(default));
    let (workers, clients, greetings) = (argument(2)?.max(1), argument(6)?, argument(10_000)?);

    // The workers. A mailbox belongs to its reactor, and a reactor to its thread: so the thread makes both.
    let policy = Arc::new(Policy::default());
    let (ready, mut mailboxes) = (mpsc::channel(), Vec::new());
    let threads: Vec<_> = (0..workers)
        .map(|_| {
            let (policy, ready) = (Arc::clone(&policy), ready.0.clone());
            thread::spawn(move || {
                let server = EventLoop::new(tcp::TcpServer::new(0, policy))
                    .map_err(|source| raio_transport::Error::io("Cannot make an event loop", source))?;
                let (sender, receiver) = mailbox(server.waker());
                ready.send(sender).expect("main waits for it");
                work(server, &receiver)
            })
        })
        .collect();
    drop(ready.0);
    mailboxes.extend(ready.1.iter().take(workers));

    // The thread that accepts.
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let accepting = mailboxes.clone();
    thread::spawn(move || accept(&listener, &accepting).expect("the listener listens"));

    // The clients.
    let began = Instant::now();
    thread::scope(|scope| {
        let clients: Vec<_> =
            (0..clients).map(|n| scope.spawn(move || greet(address, n, greetings))).collect();
        clients.into_iter().try_for_each(|client| client.join().expect("no client panics"))
    })?;
    let rate = (clients * greetings) as f64 / began.elapsed().as_secs_f64();

    mailboxes.iter().for_each(|mailbox| mailbox.send(Mail::Stop));
    for (n, thread) in threads.into_iter().enumerate() {
        let (clients, greetings) = thread.join().expect("no worker panics")?;
        println!("worker {n}: {greetings} greetings of {clients} clients");
    }
    println!("{rate:.0} greetings a second");
    Ok(())
}

/// Hands each connection to the next worker.
fn accept(listener: &TcpListener, workers: &[Sender<Mail>]) -> std::io::Result<()> {
    for (stream, worker) in listener.incoming().zip(workers.iter().cycle()) {
        let stream = stream?;
        stream.set_nonblocking(true)?;
        worker.send(Mail::Client(stream.into()));
    }
    Ok(())
}

/// Serves until it is stopped. Returns how many clients it had and how often it was greeted.
fn work(
    mut server: EventLoop<tcp::TcpServer>,
    mailbox: &Receiver<Mail>,
) -> Result<(usize, usize), raio_transport::Error> {
    let (mut clients, mut greetings) = (0, 0);
    loop {
        server.run_once(Wait::Block).map_err(|source| raio_transport::Error::io("Cannot go on", source))?;
        while let Some(mail) = mailbox.take() {
            match mail {
                Mail::Client(stream) => {
                    server.adopt(Accepted::Stream(AcceptedStream::new(stream)))?;
                }
                Mail::Stop => return Ok((clients, greetings)),
            }
        }
        while let Some(event) = server.next_event() {
            match event {
                ServerEvent::Opened(..) => clients += 1,
                ServerEvent::Request(request) => {
                    greetings += 1;
                    let answer = format!("Hello, {}!", text(&request.body));
                    let body = Body::from(answer.as_bytes());
                    server.respond(request.key, Response { status: Status::OK, result: 0, body, data: None });
                }
                ServerEvent::Moved(..) | ServerEvent::Closed(..) => {}
                ServerEvent::Fetched(..) | ServerEvent::Damaged(..) => unreachable!("no data is fetched"),
                ServerEvent::OneWay(..)
                | ServerEvent::Receipt(..)
                | ServerEvent::Refused(_)
                | ServerEvent::Answered(..) => unreachable!("its policy grants none"),
            }
        }
    }
}

/// One client: sends its name as often as it has credits, until it has been greeted `greetings` times.
fn greet(address: SocketAddr, n: usize, greetings: usize) -> Result<(), raio_transport::Error> {
    let name = format!("client {n}");
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut client = tcp::TcpClient::connect(address, &Offer::new(&name), deadline)?;
    let (mut sent, mut greeted, mut replies) = (0, 0, Vec::new());
    while greeted < greetings {
        while sent < greetings
            && client.send(sent as u64, name.as_bytes(), Bulk::None, SendOptions::PLAIN).is_ok()
        {
            sent += 1;
        }
        client.flush();
        client.wait(None)?;
        client.receive(&mut replies);
        for reply in replies.drain(..) {
            if !reply.status.is_ok() {
                return Err(raio_transport::Error::Closed {
                    errno: reply.status.errno,
                    text: format!("{name} was not greeted. See what the server says"),
                });
            }
            assert_eq!(text(&reply.body), format!("Hello, {name}!"));
            greeted += 1;
        }
    }
    Ok(())
}
