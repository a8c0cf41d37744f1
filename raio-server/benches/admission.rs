//! What admission takes: a request alone, one of many that wait, and a round with no memory for anybody.

use divan::Bencher;
use divan::counter::ItemsCount;
use raio_server::{Admission, Demand};
use raio_transport::memory::{Arena, Slot};

const ARENA_BYTES: usize = 64 << 20;
const SLOT_BYTES_MAX: usize = 1 << 20;
const WAITING: usize = 1000;

fn main() {
    divan::main();
}

/// Each connection has a session of its own, and no option limits sessions or addresses.
fn admission(arena: &Arena, connections: usize) -> Admission {
    let mut admission = Admission::new(arena, SLOT_BYTES_MAX, 1, [usize::MAX; 2]);
    (0..connections).for_each(|connection| admission.open(connection, connection, None));
    admission
}

fn arena() -> Arena {
    Arena::new(ARENA_BYTES, SLOT_BYTES_MAX).expect("an arena")
}

/// A request of 4 KiB. There is but one export, so it is on no account besides.
fn demand(connection: usize) -> Demand {
    Demand { connection, bytes: 4096, export: None }
}

/// The clients have taken all responses.
fn unsent(_: usize) -> usize {
    0
}

/// Per request: one comes alone in an iteration, gets its memory at once, and gives it back.
#[divan::bench(sample_size = 1000)]
fn request(bencher: Bencher) {
    let mut arena = arena();
    let mut admission = admission(&arena, 1);
    bencher.bench_local(|| {
        admission.begin_iteration();
        let slot = admission.admit(&demand(0), &mut arena, &unsent).expect("memory");
        admission.release(Some(0), None, slot.len());
    });
}

/// Per request: of 1,000 connections that wait the next gets its memory, gives it back, and waits again.
#[divan::bench(sample_size = 1000)]
fn next_of_1000(bencher: Bencher) {
    let mut arena = arena();
    let mut admission = admission(&arena, WAITING);
    (0..WAITING).for_each(|connection| admission.wait(connection, demand(connection)));
    bencher.bench_local(|| {
        admission.begin_iteration();
        let (connection, slot) = admission.next(&mut arena, &unsent).expect("memory");
        admission.release(Some(connection), None, slot.len());
        admission.wait(connection, demand(connection));
    });
}

/// Per iteration: each of 1,000 connections that wait is looked at, and there is no memory for any.
#[divan::bench(sample_size = 1000)]
fn none_of_1000(bencher: Bencher) {
    let mut arena = arena();
    let mut admission = admission(&arena, WAITING);
    (0..WAITING).for_each(|connection| admission.wait(connection, demand(connection)));
    let _in_use: Vec<Slot> = std::iter::from_fn(|| arena.alloc(SLOT_BYTES_MAX)).collect();
    bencher.counter(ItemsCount::new(WAITING)).bench_local(|| {
        admission.begin_iteration();
        assert!(admission.next(&mut arena, &unsent).is_none());
    });
}
