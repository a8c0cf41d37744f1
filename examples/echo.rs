//! Echo, with bulk data: the client puts data of any size and gets it back.
//!
//! ```text
//! cargo run --release --example echo                                  both sides, in one program
//! cargo run --release --example echo server ADDRESS                   one side each:
//! cargo run --release --example echo client ADDRESS [BYTES [COUNT [DEPTH]]]
//! ```
//!
//! The server receives the data into a slot of its arena and later sends it from that same slot. On the
//! client the same buffer goes out, comes back with the reply, and goes out again as room for the data.
//! Buffers move; nothing is copied.

use std::collections::HashMap;
use std::error::Error;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use raio_transport::Status;
use raio_transport::address::Endpoint;
use raio_transport::event_loop::EventLoop;
use raio_transport::handshake::{Offer, Policy};
use raio_transport::memory::{Arena, Buffer, Buffers};
use raio_transport::reactor::Wait;
use raio_transport::tcp;
use raio_transport::transport::{
    Body, Bulk, ClientTransport, RequestKey, Response, SendOptions, ServerEvent, SlotRange,
};

const ARENA_BYTES: usize = 64 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [] => {
            let (listener, address) = tcp::listen("127.0.0.1:0".parse::<SocketAddr>()?)?;
            thread::spawn(move || serve(listener).expect("the server serves"));
            for bytes in [64, 4 << 10, 64 << 10, 1 << 20] {
                echo(address.clone(), bytes, (256 << 20) / bytes.max(16 << 10), 16)?;
            }
            Ok(())
        }
        ["server", address] => {
            let (listener, address) = tcp::listen(address.parse::<SocketAddr>()?)?;
            println!("listening on {address}");
            serve(listener)
        }
        ["client", address, ref rest @ ..] if rest.len() <= 3 => {
            let number = |n: usize, default| rest.get(n).map_or(Ok(default), |text| text.parse());
            echo(address.parse::<SocketAddr>()?, number(0, 4096)?, number(1, 10_000)?, number(2, 16)?.max(1))
        }
        _ => Err("usage: echo [server ADDRESS | client ADDRESS [BYTES [COUNT [DEPTH]]]]".into()),
    }
}

/// A command: what to do, and the name that the data has.
fn command(verb: u8, name: u64) -> [u8; 16] {
    let mut command = [0; 16];
    command[0] = verb;
    command[8..].copy_from_slice(&name.to_le_bytes());
    command
}

fn parse(command: &[u8]) -> Option<(u8, u64)> {
    Some((*command.first()?, u64::from_le_bytes(command.get(8..16)?.try_into().ok()?)))
}

fn serve(listener: OwnedFd) -> Result<(), Box<dyn Error>> {
    let policy = Policy::default();
    let mut arena = Arena::new(ARENA_BYTES, policy.data_bytes_max as usize)?;
    let mut server = EventLoop::new(tcp::TcpServer::new(0, Arc::new(policy)))?;
    server.listen(listener);
    // What was put and not yet got back.
    let mut kept = HashMap::new();
    // Requests whose data is on the way, and its name.
    let mut coming = HashMap::new();
    loop {
        server.run_once(Wait::Block)?;
        while let Some(event) = server.next_event() {
            match event {
                ServerEvent::Request(request) => match parse(&request.body) {
                    // Put: the data has not come yet. It is told where to go, or, without memory for it,
                    // discarded.
                    Some((b'p', name)) => match arena.alloc(request.data_len as usize) {
                        Some(slot) if request.data_len > 0 => {
                            coming.insert(request.key, name);
                            server.fetch(request.key, slot, 0);
                        }
                        Some(slot) => {
                            kept.insert((request.key.connection, name), SlotRange { slot, start: 0, len: 0 });
                            server.respond(request.key, answer(Status::OK, None));
                        }
                        None => server.respond(request.key, answer(Status::storage(libc::ENOBUFS), None)),
                    },
                    // Get.
                    Some((b'g', name)) => match kept.remove(&(request.key.connection, name)) {
                        Some(data) if data.len <= request.region_len as usize => {
                            server.respond(request.key, answer(Status::OK, Some(data)));
                        }
                        _ => server.respond(request.key, answer(Status::storage(libc::ENOENT), None)),
                    },
                    _ => server.respond(request.key, answer(Status::protocol(libc::EINVAL), None)),
                },
                ServerEvent::Fetched(key, data) => {
                    if let Some(name) = coming.remove(&key) {
                        kept.insert((key.connection, name), data);
                    }
                    server.respond(key, answer(Status::OK, None));
                }
                ServerEvent::Damaged(key, _) => {
                    coming.remove(&key);
                    server.respond(key, answer(Status::DAMAGED, None));
                }
                ServerEvent::Opened(..) | ServerEvent::Moved(..) => {}
                ServerEvent::OneWay(..)
                | ServerEvent::Receipt(..)
                | ServerEvent::Refused(_)
                | ServerEvent::Answered(..) => unreachable!("its policy grants none"),
                ServerEvent::Closed(connection, _) => {
                    kept.retain(|(owner, _), _| *owner != connection);
                    coming.retain(|key: &RequestKey, _| key.connection != connection);
                }
            }
        }
    }
}

fn answer(status: Status, data: Option<SlotRange>) -> Response {
    let result = data.as_ref().map_or(0, |data| data.len as u64);
    Response { status, result, body: Body::from(&[][..]), data }
}

/// Puts data and gets it back `count` times, `depth` at a time, and prints how fast that went.
fn echo(server: impl Into<Endpoint>, bytes: usize, count: usize, depth: usize) -> Result<(), Box<dyn Error>> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut client = tcp::TcpClient::connect(server, &Offer::new("echo"), deadline)?;
    let data_bytes_max = client.grant().data_bytes_max as usize;
    if bytes > data_bytes_max {
        return Err(format!("the server takes at most {data_bytes_max} bytes; ask for less").into());
    }
    let depth = depth.min(client.credits());
    let fill = |name: u64| vec![name as u8 | 1; bytes];

    let began = Instant::now();
    let (mut begun, mut done, mut replies) = (0, 0, Vec::new());
    while done < count {
        while begun < count && begun - done < depth {
            let data = Buffers::One(Buffer::Owned(fill(begun as u64).into()));
            let sent =
                client.send(begun as u64, &command(b'p', begun as u64), Bulk::Out(data), SendOptions::PLAIN);
            sent.expect("no more than its credits");
            begun += 1;
        }
        client.flush();
        client.wait(None)?;
        client.receive(&mut replies);
        for reply in replies.drain(..) {
            if !reply.status.is_ok() {
                let why = std::io::Error::from_raw_os_error(reply.status.errno);
                return Err(format!("echo {} failed: {why}", reply.tag).into());
            }
            match reply.bulk {
                // It is there: now get it back, into the same memory.
                Bulk::Out(mut buffers) => {
                    buffers.slices_mut(0..bytes).for_each(|slice| slice.fill(0));
                    let sent = client.send(
                        reply.tag,
                        &command(b'g', reply.tag),
                        Bulk::In(buffers),
                        SendOptions::PLAIN,
                    );
                    sent.expect("no more than its credits");
                }
                Bulk::In(buffers) => {
                    let expected = fill(reply.tag);
                    assert!(
                        buffers.slices(0..bytes).flatten().eq(&expected),
                        "the echo is not what was said"
                    );
                    done += 1;
                }
                Bulk::None => unreachable!("every request has buffers"),
            }
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let rate = count as f64 / seconds;
    println!(
        "{count} echoes of {bytes} bytes, {depth} at a time: {rate:.0} a second, {:.1} MiB/s each way",
        rate * bytes as f64 / f64::from(1 << 20),
    );
    Ok(())
}
