//! `flood URL PATH`: keeps 128 reads and writes of 4 KiB to 256 KiB in flight until it is killed. Prints
//! "full" when the queue is full.
//!
//! `flood URL PATH check [COUNT]`: the same with reads only, of a file whose 64-bit words are their own
//! number; ends after COUNT of them. A wrong word is an error.

use std::time::Duration;

use raio::{Buffer, Buffers, Operation, Options, Session};

const DEPTH: u64 = 128;
const FILE_BYTES: u64 = 32 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (url, path, count) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [url, path] => (url, path, None),
        [url, path, "check"] => (url, path, Some(u64::MAX)),
        [url, path, "check", count] => (url, path, Some(count.parse()?)),
        _ => return Err("usage: flood URL PATH [check [COUNT]]".into()),
    };
    // Its tests want to see that it has lost its connection.
    let options = Options { reconnect: Duration::ZERO, ..Options::default() };
    let session = Session::connect(url, &options)?;
    let file = session.open(path, libc::O_RDWR, 0)?;
    let mut context = session.context(DEPTH as usize)?;
    let mut n = 0u64;
    let (mut in_flight, mut done) = (0, 0);
    let mut is_announced = false;
    while count.is_none_or(|count| done < count) {
        while in_flight < DEPTH {
            n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let length = 4096u64 << (n >> 61).min(6);
            let offset = ((n >> 20) % (FILE_BYTES - length)) & !7;
            let buffers = Buffers::One(Buffer::Owned(vec![n as u8; length as usize].into()));
            let operation = if count.is_some() || n & (1 << 40) == 0 {
                Operation::Read { offset, buffers }
            } else {
                Operation::Write { offset, buffers }
            };
            context.submit(&file, operation, offset).map_err(|rejected| rejected.error)?;
            in_flight += 1;
        }
        context.flush();
        if !std::mem::replace(&mut is_announced, true) {
            println!("full");
        }
        context.wait(1, DEPTH as usize, None)?;
        while let Some(completion) = context.next() {
            let len = completion.result? as usize;
            in_flight -= 1;
            done += 1;
            if count.is_some() {
                let buffers = completion.buffers.ok_or("a read without its buffer")?;
                check(buffers.pieces()[0].bytes(), len, completion.token)?;
            }
        }
    }
    Ok(())
}

fn check(bytes: &[u8], len: usize, offset: u64) -> Result<(), String> {
    if len != bytes.len() {
        return Err(format!("{len} bytes were read at {offset}, not {}", bytes.len()));
    }
    for (word, number) in bytes.chunks_exact(8).zip(offset / 8..) {
        if word != number.to_le_bytes() {
            return Err(format!("word {number} is {word:x?}"));
        }
    }
    Ok(())
}
