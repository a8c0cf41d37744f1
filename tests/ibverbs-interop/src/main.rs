//! `ibverbs-interop [--write BYTES] ADDRESS:PORT /EXPORT/path`: a raio client over RDMA that shares nothing
//! with raio's own.
//!
//! It shows that docs/PROTOCOL.md is enough to write one. It says hello over TCP, moves to a queue pair made
//! with the crate `ibverbs`, reads the file in pieces of many sizes with many of them outstanding, and prints
//! it. With `--write` it first makes the file anew: its own bytes, by inline writes and by larger ones that
//! the server fetches; what comes back must be they. What it counted goes to standard error.

mod queue_pair;
mod wire;

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use ibverbs::MemoryRegion;

use crate::queue_pair::{Channel, Event, device_of};
use crate::wire::{Message, RESPONSE, Region, Welcome, command, request, size_in_status, violation};

/// A sentence for whoever runs this, or what went wrong below.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const USAGE: &str = "usage: ibverbs-interop [--write BYTES] ADDRESS:PORT /EXPORT/path";
const QUEUE_DEPTH: u32 = 32;
/// How long the server may take over the handshake.
const PATIENCE: Duration = Duration::from_secs(10);
/// The whole file is in memory; this is a test.
const FILE_MAX: u64 = 1 << 30;
/// What lies in memory where the server has placed nothing.
const UNTOUCHED: u8 = 0xa5;

fn main() -> ExitCode {
    match run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ibverbs-interop: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<()> {
    let (write, rest) = match arguments {
        [option, bytes, rest @ ..] if option == "--write" => {
            (Some(bytes.parse::<u64>().map_err(|_| USAGE)?), rest)
        }
        rest => (None, rest),
    };
    let [server, path] = rest else { return Err(USAGE.into()) };
    if write.is_some_and(|bytes| bytes > FILE_MAX) {
        return Err(format!("--write takes at most {FILE_MAX} bytes.").into());
    }
    let server: SocketAddr = server.parse().map_err(|_| USAGE)?;

    let mut stream = TcpStream::connect_timeout(&server, PATIENCE)
        .map_err(|error| format!("Cannot connect to {server}: {error}. Is raio_server there?"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut session = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut session)?;
    stream.write_all(&wire::hello(session, QUEUE_DEPTH))?;
    let welcome = Welcome::read(&mut stream)?;
    if !welcome.upgrade {
        return Err(
            "The server has no RDMA, or does not move to queue pairs. See raio_server --list-devices.".into(),
        );
    }
    if welcome.queue_depth > QUEUE_DEPTH {
        return Err(violation("more credits than were asked for"));
    }

    let (context, gid_index) = device_of(&stream)?;
    let domain = context.alloc_pd()?;
    let receives = welcome.queue_depth as usize + 1 + 8;
    let completions = context.create_cq(2 * receives as i32, 0)?;
    let channel = Channel::open(
        stream,
        &domain,
        &completions,
        gid_index,
        receives,
        wire::MESSAGE_MAX + welcome.inline_bytes_max as usize,
        Duration::from_millis(welcome.keepalive_ms.into()),
    )?;
    let mut client = Client {
        channel,
        credits: welcome.queue_depth + 1,
        granted: welcome.queue_depth + 1,
        // every byte of it differs, so that one in the wrong order shows
        next_id: 0xfe01_0203,
        outstanding: HashMap::new(),
        unsent: Vec::new(),
        ended: VecDeque::new(),
        data_bytes_max: u64::from(welcome.data_bytes_max),
        inline_bytes_max: u64::from(welcome.inline_bytes_max),
    };

    let mut flags = wire::OPEN_READ;
    if write.is_some() {
        flags |= wire::OPEN_WRITE | wire::OPEN_CREATE | wire::OPEN_TRUNCATE;
    }
    let opened = client.call(wire::open(path, flags))?;
    let file = u32::try_from(opened.result).map_err(|_| violation("a handle of more than 32 bits"))?;
    let opened_size = size_in_status(&opened.body)?;
    let written = match write {
        Some(len) => Some(client.write_file(&domain, file, len)?),
        None => None,
    };
    let size = written.as_ref().map_or(opened_size, |written| written.len() as u64);
    client.check_size(file, size)?;
    let bytes = client.read_file(&domain, file, size)?;
    client.call(command(wire::CLOSE, file, 0, 0))?;
    if written.is_some_and(|written| written != bytes) {
        return Err("What came back is not what was written.".into());
    }
    let counts = client.channel.close()?;
    std::io::stdout().write_all(&bytes)?;
    eprintln!(
        "read {} bytes over RDMA: {} messages in {} SENDs, and {} answers as immediate data",
        bytes.len(),
        counts.messages_received,
        counts.sends_received,
        counts.immediates
    );
    Ok(())
}

/// How a request ended.
struct Answer {
    id: u32,
    result: u64,
    /// Bytes placed.
    len: u32,
    body: Vec<u8>,
}

/// Requests and their answers: credits, ids, and what may come when.
struct Client<'res> {
    channel: Channel<'res>,
    credits: u32,
    granted: u32,
    next_id: u32,
    /// For each request how much may be placed.
    outstanding: HashMap<u32, u32>,
    /// Requests, one behind the other.
    unsent: Vec<u8>,
    /// Answered, and not yet asked for.
    ended: VecDeque<Answer>,
    data_bytes_max: u64,
    inline_bytes_max: u64,
}

impl Client<'_> {
    /// Adds a request to the next SEND; its id. Of the credits one is left for control commands.
    fn submit(&mut self, region: Region, inline: &[u8], command: Vec<u8>) -> Result<u32> {
        while self.credits < 2 {
            let answer = self.hear()?;
            self.ended.push_back(answer);
        }
        self.credits -= 1;
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let mut message = request(id.into(), region, inline.len() as u32, command);
        message.extend(inline);
        if self.unsent.len() + message.len() > self.channel.send_bytes_max() {
            self.flush()?;
        }
        self.unsent.extend(message);
        self.outstanding.insert(id, if let Region::Place { len, .. } = region { len } else { 0 });
        Ok(id)
    }

    /// Sends the requests that share a SEND.
    fn flush(&mut self) -> Result<()> {
        if !self.unsent.is_empty() {
            self.channel.send(&self.unsent)?;
            self.unsent.clear();
        }
        Ok(())
    }

    /// The next answer.
    fn next(&mut self) -> Result<Answer> {
        match self.ended.pop_front() {
            Some(answer) => Ok(answer),
            None => self.hear(),
        }
    }

    fn hear(&mut self) -> Result<Answer> {
        self.flush()?;
        let (answer, credits) = match self.channel.wait()? {
            Event::Placed { id, len } => (Answer { id, result: len.into(), len, body: Vec::new() }, 1),
            Event::Message(message) if message.kind == RESPONSE => {
                if message.errno() != 0 {
                    return Err(message.failure("A request failed").into());
                }
                let id = u32::try_from(message.id).map_err(|_| violation("a response to no request"))?;
                let credits = message.credits();
                let Message { tail, data_len, body, .. } = message;
                (Answer { id, result: tail, len: data_len, body }, u32::from(credits))
            }
            Event::Message(message) => return Err(violation(format!("a message of kind {}", message.kind))),
        };
        let room =
            self.outstanding.remove(&answer.id).ok_or_else(|| violation("a response to no request"))?;
        if answer.len > room {
            return Err(violation(format!("{} bytes to a region of {room}", answer.len)));
        }
        self.credits += credits;
        if credits != 1 || self.credits > self.granted {
            return Err(violation("credits that were never spent"));
        }
        Ok(answer)
    }

    /// One request with neither data nor region, with nothing else outstanding.
    fn call(&mut self, command: Vec<u8>) -> Result<Answer> {
        self.submit(Region::None, &[], command)?;
        self.next()
    }

    /// Asks for the size as often as there are credits, at once, so that requests share a SEND and answers
    /// may.
    fn check_size(&mut self, file: u32, size: u64) -> Result<()> {
        let count = self.credits - 1;
        for _ in 0..count {
            self.submit(Region::None, &[], command(wire::STAT, file, 0, 0))?;
        }
        for _ in 0..count {
            let said = size_in_status(&self.next()?.body)?;
            if said != size {
                return Err(
                    format!("The server says that the file has {said} bytes, and it has {size}.").into()
                );
            }
        }
        Ok(())
    }

    /// Writes `len` bytes of its own making, by turns inline and from a region, and makes them durable.
    fn write_file(&mut self, domain: &ibverbs::ProtectionDomain<'_>, file: u32, len: u64) -> Result<Vec<u8>> {
        let mut memory: MemoryRegion<u8> = domain.allocate((len as usize).max(1))?;
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        for byte in memory.iter_mut() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state as u8;
        }
        let inline = self.inline_bytes_max.max(1);
        let lens = [inline, inline + 1, 1, self.data_bytes_max, 65_536, 4096];
        let mut asked = HashMap::new();
        for (offset, piece) in pieces(len, &lens) {
            let command = command(wire::WRITE, file, offset, piece);
            let bytes = &memory[offset as usize..(offset + piece) as usize];
            let id = if piece <= self.inline_bytes_max {
                self.submit(Region::None, bytes, command)?
            } else {
                let address = bytes.as_ptr() as u64;
                self.submit(
                    Region::Fetch { address, key: memory.rkey().key, len: piece as u32 },
                    &[],
                    command,
                )?
            };
            asked.insert(id, piece);
        }
        while !asked.is_empty() {
            let answer = self.next()?;
            if asked.remove(&answer.id) != Some(answer.result) {
                return Err(violation(format!(
                    "{} bytes written, which is not what was asked",
                    answer.result
                )));
            }
        }
        self.call(command(wire::FSYNC, file, 0, 0))?;
        Ok(memory[..len as usize].to_vec())
    }

    /// Reads all of the file, in pieces that the server places side by side, and one beyond its end.
    fn read_file(&mut self, domain: &ibverbs::ProtectionDomain<'_>, file: u32, size: u64) -> Result<Vec<u8>> {
        if size > FILE_MAX {
            return Err(format!(
                "The file has {size} bytes, and this reads at most {FILE_MAX}. Take a smaller one."
            )
            .into());
        }
        let lens = [4096, 65_536, 1, 512, self.data_bytes_max, 4096, 4096, 12_345, 4096];
        let mut all: Vec<_> = pieces(size, &lens).collect();
        // the last asks for more than is there, and another finds nothing
        if let Some(last) = all.last_mut() {
            last.1 = self.data_bytes_max;
        }
        all.push((size, 4096));
        let mut memory: MemoryRegion<u8> = domain.allocate((size + self.data_bytes_max) as usize)?;
        memory.fill(UNTOUCHED);
        let mut asked = HashMap::new();
        for (offset, piece) in all {
            let address = memory.as_ptr() as u64
                + if offset < size { offset } else { size + self.data_bytes_max - piece };
            let region = Region::Place { address, key: memory.rkey().key, len: piece as u32 };
            let id = self.submit(region, &[], command(wire::READ, file, offset, piece))?;
            asked.insert(id, piece.min(size - offset));
        }
        while !asked.is_empty() {
            let answer = self.next()?;
            if asked.remove(&answer.id) != Some(answer.result) || u64::from(answer.len) != answer.result {
                return Err(violation(format!("{} bytes read, which is not what is there", answer.result)));
            }
        }
        if memory[size as usize..].iter().any(|byte| *byte != UNTOUCHED) {
            return Err(violation("data beyond what it says to have placed"));
        }
        Ok(memory[..size as usize].to_vec())
    }
}

/// Cuts `len` bytes into (offset, length), the lengths in turn those of `lens`.
fn pieces(len: u64, lens: &[u64]) -> impl Iterator<Item = (u64, u64)> {
    let mut offset = 0;
    lens.iter().cycle().map_while(move |piece| {
        let piece = (*piece).min(len - offset);
        offset += piece;
        (piece > 0).then_some((offset - piece, piece))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_all_once() {
        assert_eq!(pieces(10, &[4, 1]).collect::<Vec<_>>(), [(0, 4), (4, 1), (5, 4), (9, 1)]);
        assert_eq!(pieces(0, &[4]).count(), 0);
    }
}
