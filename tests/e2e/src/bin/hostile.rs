//! `hostile KIND URL PATH`: a client that is no good neighbour, until it is killed or closed. Prints "ready"
//! when it has begun.
//!
//! `greedy`: keeps 128 reads of 1 MiB in flight, and has the kernel throw the data away, so that it costs
//! little time of its own. `deaf`: asks for as much, and never reads an answer. `deaf-crowd`: 64 clients that
//! each ask for 64 reads of 1 MiB, never read an answer, and connect again as soon as they are closed.
//! `slow`: announces a write of 1 MiB, and sends a byte of it a second. `slow-request`: sends a byte a second
//! of a request, the one to open a file with a long name.

use std::io::Write;
use std::time::Duration;

use raio_e2e::{Raw, raw_request};
use raio_transport::protocol::{Command, OPEN_READ, OPEN_WRITE, PATH_BYTES_MAX};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, recv};

const DEPTH: u64 = 128;
const READ_BYTES: u64 = 1 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, url, path] = &arguments[..] else {
        return Err("usage: hostile greedy|deaf|deaf-crowd|slow|slow-request URL PATH".into());
    };
    if kind == "deaf-crowd" {
        return deaf_crowd(url, path);
    }
    let flags = if kind == "slow" { OPEN_READ | OPEN_WRITE } else { OPEN_READ };
    let mut raw = Raw::open(url, path, flags)?;
    match kind.as_str() {
        "greedy" => greedy(&mut raw),
        "deaf" => {
            for id in 0..DEPTH {
                raw.send_read(id, offset(&raw, id), READ_BYTES as u32)?;
            }
            println!("ready");
            Err(format!("the connection has ended: {:?}", until_closed(&raw)?).into())
        }
        "slow" => {
            raw.send_write_header(0, 0, READ_BYTES as u32)?;
            trickle(&mut raw, std::iter::repeat(0))
        }
        "slow-request" => {
            let request = raw_request(0, &Command::Open { flags, mode: 0, path: &[b'x'; PATH_BYTES_MAX] }, 0);
            trickle(&mut raw, request.into_iter())
        }
        _ => Err(format!("{kind:?} is no kind").into()),
    }
}

/// Waits for the end of its connection without reading.
fn until_closed(raw: &Raw) -> rustix::io::Result<PollFlags> {
    let mut fds = [PollFd::new(&raw.stream, PollFlags::empty())];
    poll(&mut fds, None)?;
    Ok(fds[0].revents())
}

fn deaf_crowd(url: &str, path: &str) -> Result<(), Box<dyn std::error::Error>> {
    const CLIENTS: usize = 64;
    let have_asked = std::sync::Barrier::new(CLIENTS + 1);
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let mut is_first = true;
                loop {
                    if let Ok(mut raw) = Raw::open(url, path, OPEN_READ) {
                        let asked =
                            (0..64).try_for_each(|id| raw.send_read(id, offset(&raw, id), READ_BYTES as u32));
                        if std::mem::take(&mut is_first) {
                            have_asked.wait();
                        }
                        if asked.is_ok() {
                            let _ = until_closed(&raw);
                        }
                    }
                    // Each of them at most a hundred times a second.
                    std::thread::sleep(Duration::from_millis(10));
                }
            });
        }
        have_asked.wait();
        println!("ready");
    });
    Ok(())
}

fn offset(raw: &Raw, id: u64) -> u64 {
    id % (raw.file_bytes / READ_BYTES) * READ_BYTES
}

fn greedy(raw: &mut Raw) -> Result<(), Box<dyn std::error::Error>> {
    for id in 0..DEPTH {
        raw.send_read(id, offset(raw, id), READ_BYTES as u32)?;
    }
    println!("ready");
    let mut nothing = vec![0; READ_BYTES as usize];
    for next in DEPTH.. {
        let (response, _) = raw.response()?;
        if !response.status.is_ok() || response.result != READ_BYTES {
            return Err(format!("{response:?}").into());
        }
        let mut left = response.data_len as usize;
        while left > 0 {
            let (_, n) = recv(&raw.stream, &mut nothing[..left], RecvFlags::TRUNC)?;
            if n == 0 {
                return Err("the connection has ended".into());
            }
            left -= n;
        }
        raw.send_read(next, offset(raw, next), READ_BYTES as u32)?;
    }
    Ok(())
}

fn trickle(raw: &mut Raw, bytes: impl Iterator<Item = u8>) -> Result<(), Box<dyn std::error::Error>> {
    println!("ready");
    for byte in bytes {
        raw.stream.write_all(&[byte])?;
        std::thread::sleep(Duration::from_secs(1));
    }
    Err("it should have been closed before it could say all this".into())
}
