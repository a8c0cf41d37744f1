//! `hostile KIND URL PATH`: a client that is no good neighbour, until it is killed or closed. Prints "ready" when it has begun.
//!
//! `greedy`: keeps 128 reads of 1 MiB in flight, and has the kernel throw the data away, so that it costs little time of its own.
//! `deaf`: asks for as much, and never reads an answer.
//! `slow`: announces a write of 1 MiB, and sends a byte of it a second.
//! `slow-request`: sends a byte a second of a request, the one to open a file with a long name.

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
        return Err("usage: hostile greedy|deaf|slow|slow-request URL PATH".into());
    };
    let flags = if kind == "slow" { OPEN_READ | OPEN_WRITE } else { OPEN_READ };
    let mut raw = Raw::open(url, path, flags)?;
    match kind.as_str() {
        "greedy" => greedy(&mut raw),
        "deaf" => {
            for id in 0..DEPTH {
                raw.send_read(id, offset(&raw, id), READ_BYTES as u32)?;
            }
            println!("ready");
            let mut fds = [PollFd::new(&raw.stream, PollFlags::empty())];
            poll(&mut fds, None)?;
            Err(format!("the connection has ended: {:?}", fds[0].revents()).into())
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
