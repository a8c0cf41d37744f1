//! Admission alone, with an arena and no transport: unsent responses are numbers here.

use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;

const KIB: usize = 1 << 10;
const SLOT_BYTES_MAX: usize = 1 << 20;
const NO_CAPS: [usize; 2] = [usize::MAX; 2];

/// A worker's arena, and its connections' unsent responses.
struct Bench {
    admission: Admission,
    arena: Arena,
    unsent: Vec<usize>,
    /// Slots that requests hold: connection, export, slot.
    held: Vec<(usize, Option<usize>, Slot)>,
    demands: HashMap<usize, Demand>,
    next_request: usize,
}

impl Bench {
    /// Connections `0..connections`, each of the session of its own number, from no known address.
    fn new(arena_bytes: usize, connections: usize) -> Self {
        let mut bench = Self::with_caps(arena_bytes, NO_CAPS);
        for connection in 0..connections {
            bench.open(connection, connection, None);
        }
        bench
    }

    fn with_caps(arena_bytes: usize, caps: [usize; 2]) -> Self {
        let arena = Arena::new(arena_bytes, SLOT_BYTES_MAX).unwrap();
        let admission = Admission::new(&arena, SLOT_BYTES_MAX / 2, 2, caps);
        Self {
            admission,
            arena,
            unsent: Vec::new(),
            held: Vec::new(),
            demands: HashMap::new(),
            next_request: 0,
        }
    }

    fn open(&mut self, connection: usize, session: usize, ip: Option<u8>) {
        self.unsent.resize(self.unsent.len().max(connection + 1), 0);
        let ip = ip.map(|last| Origin::Ip(Ipv4Addr::new(192, 0, 2, last).into()));
        self.admission.open(connection, session, ip);
    }

    fn decide(&mut self, connection: usize, bytes: usize) -> Decision {
        let demand = Demand { connection, bytes, export: None };
        self.admission.decide(&demand, &self.arena, &|connection| self.unsent[connection])
    }

    /// A request comes. Whether it gets its memory at once.
    fn request(&mut self, connection: usize, bytes: usize, export: Option<usize>) -> bool {
        let demand = Demand { connection, bytes, export };
        let request = self.next_request;
        self.next_request += 1;
        match self.admission.admit(&demand, &mut self.arena, &|connection| self.unsent[connection]) {
            Some(slot) => {
                self.held.push((connection, export, slot));
                true
            }
            None => {
                self.demands.insert(request, demand);
                self.admission.wait(request, demand);
                false
            }
        }
    }

    /// A new iteration. Returns whose waiting requests get memory, in order.
    fn iterate(&mut self) -> Vec<usize> {
        self.admission.begin_iteration();
        let mut admitted = Vec::new();
        while let Some((request, slot)) =
            self.admission.next(&mut self.arena, &|connection| self.unsent[connection])
        {
            let Demand { connection, export, .. } = self.demands[&request];
            self.held.push((connection, export, slot));
            admitted.push(connection);
        }
        admitted
    }

    /// The oldest request of a connection that has memory ends.
    fn finish(&mut self, connection: usize) {
        let at = self.held.iter().position(|&(owner, ..)| owner == connection).expect("it holds a slot");
        let (_, export, slot) = self.held.remove(at);
        self.admission.release(Some(connection), export, slot.len());
    }

    /// Has a connection hold as much as it may, an iteration for each request.
    fn fill(&mut self, connection: usize, bytes: usize) {
        while self.request(connection, bytes, None) {
            self.admission.begin_iteration();
        }
    }
}

#[test]
fn a_connection_holds_its_quota_and_another_gets_its_own() {
    let mut bench = Bench::new(64 << 20, 2);
    bench.fill(0, SLOT_BYTES_MAX);
    assert_eq!(bench.held.len(), 8, "an eighth of the arena");
    assert_eq!(bench.decide(0, SLOT_BYTES_MAX), Decision::OverQuota);
    assert_eq!(bench.decide(1, SLOT_BYTES_MAX), Decision::Admit);
    bench.finish(0);
    assert_eq!(bench.iterate(), [0]);
}

#[test]
fn what_a_client_does_not_take_counts_as_what_its_requests_hold() {
    let mut bench = Bench::new(64 << 20, 1);
    bench.unsent[0] = 8 << 20;
    assert_eq!(bench.decide(0, SLOT_BYTES_MAX), Decision::OverQuota);
    bench.unsent[0] = 7 << 20;
    assert_eq!(bench.decide(0, SLOT_BYTES_MAX), Decision::Admit);
}

#[test]
fn the_quota_shrinks_once_half_of_the_arena_is_in_use() {
    let mut bench = Bench::new(64 << 20, 10);
    for connection in 0..6 {
        bench.fill(connection, SLOT_BYTES_MAX);
    }
    let held = |bench: &Bench, of| bench.held.iter().filter(|&&(owner, ..)| owner == of).count();
    assert!((0..4).all(|connection| held(&bench, connection) == 8));
    assert!(held(&bench, 4) < 8, "dynamic thresholds");
    assert!(held(&bench, 5) < held(&bench, 4) && held(&bench, 5) > 0);
}

#[test]
fn the_reserve_is_for_small_requests() {
    let mut bench = Bench::new(8 << 20, 9);
    for connection in 0..8 {
        bench.fill(connection, SLOT_BYTES_MAX);
    }
    assert!(bench.arena.free_bytes() <= 2 << 20);
    assert_eq!(bench.decide(8, SLOT_BYTES_MAX), Decision::NoMemory);
    assert_eq!(bench.decide(8, 4 * KIB), Decision::Admit);
    // Not for whoever has something already.
    bench.unsent[8] = 256 * KIB;
    assert_ne!(bench.decide(8, 4 * KIB), Decision::Admit);
}

#[test]
fn an_iteration_gives_out_so_much_or_one_request_for_more() {
    let mut bench = Bench::new(64 << 20, 2);
    assert!(bench.request(0, SLOT_BYTES_MAX, None));
    assert_eq!(bench.decide(1, 4 * KIB), Decision::NextIteration);
    assert!(bench.admission.is_exhausted());
    bench.admission.begin_iteration();
    assert!(!bench.admission.is_exhausted());
    for _ in 0..2 {
        assert!(bench.request(1, 128 * KIB, None));
    }
    assert_eq!(bench.decide(0, 4 * KIB), Decision::NextIteration);
    assert_eq!(bench.admission.iteration_bytes(), 256 * KIB);
}

#[test]
fn the_fast_path_has_an_iterations_budget_and_lets_responses_leave_in_between() {
    let mut bench = Bench::new(64 << 20, 1);
    let mut flushes = 0;
    let mut count = 0;
    while bench.admission.has_budget() {
        flushes += usize::from(bench.admission.spend(4 * KIB));
        count += 1;
    }
    assert_eq!((count, flushes), (61, 7));
    assert_eq!(bench.decide(0, 16 * KIB), Decision::NextIteration);
}

#[test]
fn connections_that_wait_take_turns_whatever_each_asks_for() {
    let mut bench = Bench::new(64 << 20, 4);
    assert!(bench.request(3, SLOT_BYTES_MAX, None));
    for _ in 0..3 {
        for connection in [0, 0, 0, 0, 1, 2] {
            assert!(!bench.request(connection, 64 * KIB, None));
        }
    }
    // 256 KiB each, so four requests.
    assert_eq!(bench.iterate(), [0, 1, 2, 0]);
    assert_eq!(bench.iterate(), [1, 2, 0, 1]);
    assert_eq!(bench.iterate(), [2, 0, 0, 0]);
    assert!(bench.admission.is_waiting(0) && !bench.admission.is_waiting(1));
}

#[test]
fn a_request_does_not_overtake_those_of_its_connection() {
    let mut bench = Bench::new(64 << 20, 2);
    assert!(bench.request(0, SLOT_BYTES_MAX, None));
    assert!(!bench.request(1, SLOT_BYTES_MAX, None));
    bench.admission.begin_iteration();
    assert!(!bench.request(1, 4 * KIB, None));
    assert_eq!(bench.iterate(), [1]);
    assert_eq!(bench.iterate(), [1]);
}

#[test]
fn whoever_has_starved_longest_goes_before_all_but_the_small() {
    let mut bench = Bench::new(8 << 20, 4);
    for connection in 0..2 {
        bench.fill(connection, SLOT_BYTES_MAX);
    }
    bench.unsent[0] = 0;
    while bench.arena.free_bytes() > 0 {
        let order = if bench.arena.free_bytes() >= SLOT_BYTES_MAX { SLOT_BYTES_MAX } else { 4 * KIB };
        let Some(slot) = bench.arena.alloc(order) else { break };
        bench.held.push((0, None, slot));
    }
    assert!(!bench.request(2, SLOT_BYTES_MAX, None));
    assert!(bench.iterate().is_empty(), "starved");
    // Two large slots come free, which is enough for one beyond the reserve.
    let free = |bench: &mut Bench, count| {
        for _ in 0..count {
            let at = bench.held.iter().rposition(|(.., slot)| slot.len() == SLOT_BYTES_MAX).unwrap();
            bench.held.remove(at);
        }
        bench.arena.used_bytes();
    };
    free(&mut bench, 2);
    assert_eq!(bench.decide(3, SLOT_BYTES_MAX), Decision::NoMemory, "another waits with nothing");
    assert_eq!(bench.decide(3, 4 * KIB), Decision::Admit, "a little is for everybody");
    assert_eq!(bench.iterate(), [2]);
    free(&mut bench, 2);
    assert_eq!(bench.decide(3, SLOT_BYTES_MAX), Decision::NextIteration);
    bench.admission.begin_iteration();
    assert_eq!(bench.decide(3, SLOT_BYTES_MAX), Decision::Admit, "nobody does any more");
}

#[test]
fn a_session_has_a_share_while_others_wait_however_many_connections_it_has() {
    let mut bench = Bench::with_caps(32 << 20, NO_CAPS);
    for connection in 0..8 {
        bench.open(connection, 0, None);
    }
    bench.open(8, 1, None);
    // While nobody else waits it may have more than a quarter.
    for connection in 0..6 {
        bench.fill(connection, SLOT_BYTES_MAX);
    }
    let held = bench.held.len();
    assert!(held > 16, "{held} MiB");
    bench.admission.begin_iteration();
    bench.unsent[8] = 4 << 20;
    bench.admission.wait(usize::MAX, Demand { connection: 8, bytes: SLOT_BYTES_MAX, export: None });
    assert_eq!(bench.decide(7, SLOT_BYTES_MAX), Decision::OverShare(Who::Session));
    assert!(!bench.request(7, SLOT_BYTES_MAX, None));
    assert!(bench.iterate().is_empty());
    assert_eq!(bench.admission.share_waits()[Who::Session as usize], 7, "each connection's next, once");
    bench.iterate();
    assert_eq!(bench.admission.share_waits()[Who::Session as usize], 7);
    // Not if the one that waits is of the session itself.
    bench.admission.close(8);
    bench.admission.begin_iteration();
    assert_ne!(bench.decide(7, SLOT_BYTES_MAX), Decision::OverShare(Who::Session));
}

#[test]
fn an_option_limits_a_session_and_an_address_at_any_time() {
    let mut bench = Bench::with_caps(64 << 20, [2 << 20, 3 << 20]);
    bench.open(0, 0, Some(1));
    bench.open(1, 1, Some(1));
    bench.open(2, 2, Some(2));
    bench.fill(0, SLOT_BYTES_MAX);
    assert_eq!(bench.held.len(), 2);
    bench.admission.begin_iteration();
    assert_eq!(bench.decide(0, 4 * KIB), Decision::OverShare(Who::Session));
    bench.fill(1, SLOT_BYTES_MAX);
    assert_eq!(bench.held.len(), 3);
    bench.admission.begin_iteration();
    assert_eq!(bench.decide(1, 4 * KIB), Decision::OverShare(Who::Address));
    assert_eq!(bench.decide(2, SLOT_BYTES_MAX), Decision::Admit);
    assert_eq!(bench.admission.share_waits(), [1, 1, 0]);
    bench.finish(0);
    assert_eq!(bench.iterate(), [0]);
}

#[test]
fn the_sessions_of_a_client_hold_no_more_together_than_it_may() {
    let mut bench = Bench::with_caps(64 << 20, NO_CAPS);
    for (connection, client) in [(0, "one"), (1, "one"), (2, "two"), (3, "")] {
        bench.open(connection, connection, Some(connection as u8));
        if !client.is_empty() {
            bench.admission.limit_client(connection, client, 2 << 20);
        }
    }
    for connection in [0, 1] {
        assert!(bench.request(connection, SLOT_BYTES_MAX, None));
        bench.admission.begin_iteration();
    }
    for connection in [0, 1] {
        bench.admission.begin_iteration();
        assert_eq!(bench.decide(connection, 4 * KIB), Decision::OverShare(Who::Client));
    }
    assert!(!bench.request(1, 4 * KIB, None));
    assert_eq!(bench.admission.share_waits(), [0, 0, 1]);
    for connection in [2, 3] {
        bench.admission.begin_iteration();
        assert_eq!(bench.decide(connection, SLOT_BYTES_MAX), Decision::Admit);
    }
    bench.finish(0);
    assert_eq!(bench.iterate(), [1]);
    bench.admission.close(0);
    bench.admission.close(2);
    assert_eq!(bench.admission.clients.len(), 1, "a client is forgotten with its last connection");
}

#[test]
fn an_export_whose_requests_hang_leaves_as_much_for_others() {
    let mut bench = Bench::new(64 << 20, 64);
    for connection in 0..62 {
        bench.admission.begin_iteration();
        bench.request(connection, SLOT_BYTES_MAX, Some(0));
    }
    let held = bench.held.len() << 20;
    assert!(held <= 32 << 20, "{held} bytes");
    bench.admission.begin_iteration();
    let demand = |export| Demand { connection: 63, bytes: SLOT_BYTES_MAX, export: Some(export) };
    let unsent = |_| 0;
    assert_eq!(bench.admission.decide(&demand(0), &bench.arena, &unsent), Decision::OverExport(0));
    assert_eq!(bench.admission.decide(&demand(1), &bench.arena, &unsent), Decision::Admit);
    // It is nobody's fault, unless a client keeps its data back.
    bench.iterate();
    assert!(!bench.admission.may_be_stalled());
    bench.admission.set_fetching(Some(0), true);
    bench.iterate();
    assert!(bench.admission.may_be_stalled());
}

#[test]
fn memory_of_a_connection_that_has_gone_stays_on_its_exports_account() {
    let mut bench = Bench::new(64 << 20, 2);
    assert!(bench.request(0, SLOT_BYTES_MAX, Some(0)));
    bench.admission.close(0);
    assert_eq!(bench.admission.exports[0].held, SLOT_BYTES_MAX);
    bench.open(0, 7, None);
    bench.admission.begin_iteration();
    assert_eq!(bench.admission.accounts[0].slot_bytes, 0, "the next with this key owes nothing");
    bench.admission.release(None, Some(0), SLOT_BYTES_MAX);
    assert_eq!(bench.admission.exports[0].held, 0);
}

#[test]
fn a_request_that_is_cancelled_or_whose_connection_closes_waits_no_more() {
    let mut bench = Bench::new(64 << 20, 3);
    assert!(bench.request(0, SLOT_BYTES_MAX, None));
    assert!(!bench.request(1, SLOT_BYTES_MAX, None));
    assert!(!bench.request(2, SLOT_BYTES_MAX, None));
    bench.admission.cancel(1, 1);
    assert_eq!(bench.iterate(), [2]);
    assert!(!bench.admission.is_waiting(1));
    assert!(!bench.request(2, SLOT_BYTES_MAX, None));
    bench.admission.close(2);
    assert_eq!(bench.admission.waiting().count(), 0);
    assert!(bench.iterate().is_empty());
}

#[test]
fn who_holds_memory_without_progress_is_looked_for_twice() {
    let now = Instant::now();
    let timeout = Duration::from_secs(2);
    let mut bench = Bench::new(8 << 20, 3);
    assert_eq!(bench.admission.check_stalled(now, timeout), None);
    bench.held.extend((0..7).map(|_| (0, None, bench.arena.alloc(SLOT_BYTES_MAX).unwrap())));
    assert!(!bench.request(2, SLOT_BYTES_MAX, None));
    bench.iterate();
    let next = now + timeout;
    assert_eq!(bench.admission.check_stalled(now, timeout), Some(StallCheck { close: false, next }));
    bench.iterate();
    assert_eq!(bench.admission.check_stalled(now + timeout / 2, timeout), None);
    let last = next + timeout;
    assert_eq!(bench.admission.check_stalled(next, timeout), Some(StallCheck { close: true, next: last }));
    // Then memory comes.
    bench.held.clear();
    bench.iterate();
    assert_eq!(bench.admission.check_stalled(last, timeout), None);
    assert!(!bench.admission.may_be_stalled());
}

#[test]
fn those_who_wait_are_shown_that_the_server_lives_once_in_a_period() {
    let now = Instant::now();
    let period = Duration::from_secs(1);
    let mut bench = Bench::new(8 << 20, 1);
    assert!(!bench.admission.take_life_sign(now + period));
    assert_eq!(bench.admission.arm_life_sign(now, period), Some(now + period));
    assert_eq!(bench.admission.arm_life_sign(now + period / 2, period), None, "there is a timer");
    assert!(!bench.admission.take_life_sign(now + period / 2));
    assert!(bench.admission.take_life_sign(now + period));
    assert!(!bench.admission.has_life_sign());
}

proptest! {
    /// Whatever connections do: nobody exceeds what there is, everything that waits is served once the others
    /// are done, and nothing stays on any account.
    #[test]
    fn every_request_gets_its_memory_in_the_end(
        steps in prop::collection::vec((0..6_usize, 0..3_u8, 1..SLOT_BYTES_MAX, 0..3_usize), 1..200),
    ) {
        let mut bench = Bench::with_caps(8 << 20, NO_CAPS);
        for connection in 0..6 {
            bench.open(connection, connection / 2, Some(connection as u8 / 3));
        }
        for (connection, what, bytes, export) in steps {
            match what {
                0 => {
                    bench.request(connection, bytes, (export < 2).then_some(export));
                }
                1 if bench.held.iter().any(|&(owner, ..)| owner == connection) => bench.finish(connection),
                _ => {
                    let admitted = bench.iterate();
                    let given: usize = bench.admission.iteration_bytes();
                    prop_assert!(given <= ITERATION_BYTES_MAX || admitted.len() == 1);
                }
            }
        }
        for _ in 0..bench.next_request {
            while let Some(&(connection, ..)) = bench.held.first() {
                bench.finish(connection);
            }
            bench.iterate();
        }
        prop_assert_eq!(bench.admission.waiting().count(), 0);
        while let Some(&(connection, ..)) = bench.held.first() {
            bench.finish(connection);
        }
        for connection in 0..6 {
            bench.admission.close(connection);
        }
        prop_assert!(bench.admission.accounts.iter().all(|account| account.slot_bytes == 0));
        prop_assert!(bench.admission.sessions.iter().all(|group| group.held == 0 && group.waiting == 0));
        prop_assert!(bench.admission.addresses.is_empty() && bench.admission.holding.is_empty());
        prop_assert!(bench.admission.exports.iter().all(|export| export.held == 0));
    }
}
