//! `flood URL PATH`: keeps 128 reads and writes of 4 KiB to 256 KiB in flight until it is killed. Prints "full" when the queue is full.

use raio::{Buffer, Buffers, Operation, Options, Session};

const DEPTH: u64 = 128;
const FILE_BYTES: u64 = 32 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, url, path] = arguments.as_slice() else { return Err("usage: flood URL PATH".into()) };
    let session = Session::connect(url, &Options::default())?;
    let file = session.open(path, libc::O_RDWR, 0)?;
    let mut context = session.context(DEPTH as usize)?;
    let mut n = 0u64;
    let mut in_flight = 0;
    let mut is_announced = false;
    loop {
        while in_flight < DEPTH {
            n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let length = 4096u64 << (n >> 61).min(6);
            let offset = (n >> 20) % (FILE_BYTES - length);
            let buffers = Buffers::One(Buffer::Owned(vec![n as u8; length as usize].into()));
            let operation = if n & (1 << 40) == 0 {
                Operation::Read { offset, buffers }
            } else {
                Operation::Write { offset, buffers }
            };
            context.submit(&file, operation, n).map_err(|refused| refused.error)?;
            in_flight += 1;
        }
        context.flush();
        if !std::mem::replace(&mut is_announced, true) {
            println!("full");
        }
        context.wait(1, DEPTH as usize, None)?;
        while let Some(completion) = context.next() {
            completion.result?;
            in_flight -= 1;
        }
    }
}
