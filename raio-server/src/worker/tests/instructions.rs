//! Requests to be counted: what a 4 KiB read or write costs in instructions, from the client's `send` to its
//! reply.
//!
//! A worker with everything it has (transport, ring, arena, memory export) and a client are in one thread and
//! take turns, so that every run goes the same way and no time and no other processor has a say in it. As a
//! test it sees to it that the requests succeed; `tests/instructions/run` has callgrind count them, by the
//! names of [`serve`], [`submit`] and [`collect`], with a dump at the end of each [`scenario`]. The kernel's
//! work is not in it.

use super::*;

const BLOCK_BYTES: usize = 4096;
const FILE_BLOCKS: u64 = 1024;
/// In each scenario. What is done for the first time only is spread over all of them.
const REQUESTS: u64 = 1024;
/// Set if the worker is to trace the requests.
const TRACED: &str = "RAIO_COUNT_TRACED";
/// How often to look whether the pool has done its part.
const POOL: Duration = Duration::from_micros(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

#[inline(never)]
fn serve(worker: &mut Worker) {
    run_once(worker);
}

#[inline(never)]
fn submit(
    client: &mut TcpClient,
    direction: Direction,
    file: FileHandle,
    first: u64,
    buffers: &mut Vec<Buffers>,
) {
    let mut body = Vec::with_capacity(64);
    for at in 0..buffers.len() as u64 {
        let buffer = buffers.pop().expect("one for each request");
        let (offset, length) = ((first + at) % FILE_BLOCKS * BLOCK_BYTES as u64, BLOCK_BYTES as u32);
        body.clear();
        let bulk = match direction {
            Direction::Read => {
                Command::Read { file, offset, length }.encode(&mut body);
                Bulk::In(buffer)
            }
            Direction::Write => {
                Command::Write { file, offset, length }.encode(&mut body);
                Bulk::Out(buffer)
            }
        };
        client.send(at, &body, bulk, SendOptions::PLAIN).expect("a credit is left");
    }
    client.flush();
}

#[inline(never)]
fn collect(client: &mut TcpClient, replies: &mut Vec<Reply>) {
    client.receive(replies);
}

/// So many requests, `depth` at a time.
#[inline(never)]
fn scenario(
    worker: &mut Worker,
    client: &mut TcpClient,
    file: FileHandle,
    direction: Direction,
    depth: usize,
) {
    let block = || Buffers::One(Buffer::Owned(vec![7; BLOCK_BYTES].into()));
    let mut buffers: Vec<_> = (0..depth).map(|_| block()).collect();
    let mut replies = Vec::with_capacity(depth);
    let mut first = 0;
    while first < REQUESTS {
        submit(client, direction, file, first, &mut buffers);
        while replies.len() < depth {
            // Or the worker would look in vain now and then, and be counted.
            while !worker.shared.exports.current().all()[0].lanes().data.is_idle() {
                std::thread::sleep(POOL);
            }
            serve(worker);
            collect(client, &mut replies);
        }
        for reply in replies.drain(..) {
            assert_eq!((reply.status, reply.result), (Status::OK, BLOCK_BYTES as u64), "{direction:?}");
            let (Bulk::In(buffer) | Bulk::Out(buffer)) = reply.bulk else { unreachable!("it had a buffer") };
            buffers.push(buffer);
        }
        first += depth as u64;
    }
}

#[test]
fn requests_to_be_counted_succeed() {
    let mut worker = worker("m=mem:4M,rw", "0");
    if std::env::var_os(TRACED).is_some() {
        worker.tracer = Tracer::in_memory();
    }
    let mut client = connect(&mut worker);
    let file = open(&mut worker, &mut client, OPEN_READ | OPEN_WRITE, b"/m");
    for direction in [Direction::Write, Direction::Read] {
        for depth in [1, 16] {
            scenario(&mut worker, &mut client, file, direction, depth);
        }
    }
}
