//! Small reads of what the page cache has: see [`crate::worker::fast_path`].

use super::*;
use crate::tuning::memory::ITERATION_BYTES_MAX;

/// Twice what one iteration does.
const DEPTH: usize = 128;

fn bench(spin_us: &str) -> Bench {
    let directory = directory_of_blocks();
    Bench::new(worker(&export(&directory), spin_us), directory, OPEN_READ)
}

#[test]
fn what_an_iteration_has_no_budget_for_waits_for_the_next_and_for_nothing_else() {
    // With and without answers that leave early.
    for spin_us in ["50", "0"] {
        let mut bench = bench(spin_us);
        for _ in 0..20 {
            bench.read(DEPTH);
            until(&mut bench.worker, "the first iteration is over", |worker| !worker.deferred.is_empty());
            assert!(
                (ITERATION_BYTES_MAX / 2..=ITERATION_BYTES_MAX)
                    .contains(&bench.worker.admission.iteration_bytes())
            );
            assert!(bench.worker.is_busy, "the next iteration does not come at once");
            assert!(bench.collect(DEPTH).is_empty());
            assert!(bench.worker.deferred.is_empty() && bench.worker.requests.is_empty());
        }
        assert_eq!(bench.worker.counters.slot_waits.get(), 0);
    }
}

#[test]
fn a_client_that_goes_takes_along_what_waits() {
    let mut bench = bench("50");
    bench.read(DEPTH);
    until(&mut bench.worker, "the first iteration is over", |worker| !worker.deferred.is_empty());
    drop(bench.client);
    until(&mut bench.worker, "nothing of it is left", |worker| {
        worker.transport.connections() == 0 && worker.deferred.is_empty()
    });
    assert_eq!(bench.worker.arena.used_bytes(), 0);
}
