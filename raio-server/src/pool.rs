//! Threads for everything that may wait for a disk or a file system: one pool for the process, shared out in
//! lanes.
//!
//! A lane runs a bounded number of jobs at a time; others wait in its FIFO. Threads start on demand, one for
//! each job that runs and at least one that waits for work, and end when they have been idle for a while. So
//! jobs that hang hold up their own lane and no other. Each export has its own lanes: a bound on the whole
//! pool is the number of exports times the widths of their lanes.
//!
//! Threads are started by a thread of their own, so that they inherit neither a worker's place on a CPU nor
//! what else it has set up. That one is started once the server has its user and its sandbox, which they
//! inherit.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::log;
use crate::tuning::pool::{IDLE_TIMEOUT, START_RETRY, START_TIMEOUT};
use raio_transport::sync::lock;

/// What a pool's threads run.
pub trait Job: Send + Sized + 'static {
    /// Does the work. It may take for ever. It does not panic: its lane would be narrower from then on.
    fn run(self);

    /// It begins, and [`Job::run`] comes later: what would stop it before it has begun does not any more.
    #[cfg(any(test, feature = "test-worker"))]
    fn begin(&mut self) {}

    /// Whether nothing is left to do, because all of it has been taken back.
    fn is_empty(&self) -> bool;

    /// There is no thread for it. It comes back if it cannot be rejected: then it goes on waiting.
    fn reject(self) -> Option<Self>;
}

/// What a job is found by while it waits. Lower ones go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

/// The threads, and what they are to do. It lives as long as the process.
#[derive(Debug)]
pub struct Pool<J> {
    state: Mutex<State<J>>,
    next_ticket: AtomicU64,
    /// There is a job for an idle thread.
    work: Condvar,
    /// There are fewer idle threads than jobs for them.
    too_few: Condvar,
}

#[derive(Debug)]
struct State<J> {
    lanes: Vec<Queue<J>>,
    /// Jobs that may run as soon as there is a thread.
    ready: VecDeque<Ready<J>>,
    /// Threads that run no job, those about to start included.
    idle: usize,
}

#[derive(Debug)]
struct Ready<J> {
    lane: usize,
    /// When it could have run for the first time.
    since: Instant,
    ticket: Ticket,
    job: J,
}

#[derive(Debug)]
struct Queue<J> {
    width: usize,
    /// Jobs that run or are ready.
    running: usize,
    /// When those were submitted, as many as are running.
    submitted: Vec<(Ticket, Instant)>,
    /// With the time when it was submitted. A cancelled job leaves at once, so there are no more than
    /// requests in flight.
    waiting: BTreeMap<Ticket, (Instant, J)>,
}

/// What a lane has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Jobs that run, or would if there were a thread.
    pub running: usize,
    /// Jobs that wait for those.
    pub waiting: usize,
    /// How long ago the oldest of both was submitted.
    pub oldest: Option<Duration>,
}

/// A job that a test has begun.
#[cfg(any(test, feature = "test-worker"))]
#[derive(Debug)]
pub struct Begun<J> {
    lane: usize,
    ticket: Ticket,
    job: J,
}

/// A share of the pool.
#[derive(Debug)]
pub struct Lane<J: 'static> {
    pool: &'static Pool<J>,
    index: usize,
}

impl<J> Clone for Lane<J> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<J> Copy for Lane<J> {}

impl<J> PartialEq for Lane<J> {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.pool, other.pool) && self.index == other.index
    }
}

impl<J: Job> Pool<J> {
    /// A pool. Jobs wait until it is started.
    pub fn new() -> &'static Self {
        Self::with_idle(1)
    }

    /// Starts the first thread, and the one that starts the others. Once.
    pub fn start_first(&'static self) -> io::Result<()> {
        self.spawn()?;
        std::thread::Builder::new().name("raio-pool".into()).spawn(|| self.start_threads())?;
        Ok(())
    }

    /// A pool that has been started.
    #[cfg(test)]
    pub fn start() -> io::Result<&'static Self> {
        let pool = Self::new();
        pool.start_first()?;
        Ok(pool)
    }

    /// A pool without threads: the caller runs its jobs, with [`Pool::run_one`].
    #[cfg(any(test, feature = "test-worker"))]
    pub fn without_threads() -> &'static Self {
        // Keeps it reachable: no thread refers to it, so LeakSanitizer would report it as a leak.
        static ALL: Mutex<Vec<usize>> = Mutex::new(Vec::new());
        // As if there were always an idle one, so that none is asked for.
        let pool = Self::with_idle(usize::MAX);
        lock(&ALL).push(std::ptr::from_ref(pool).addr());
        pool
    }

    /// A pool that counts this number of threads as idle. They are yet to be started.
    fn with_idle(idle: usize) -> &'static Self {
        let state = State { lanes: Vec::new(), ready: VecDeque::new(), idle };
        Box::leak(Box::new(Self {
            state: Mutex::new(state),
            next_ticket: AtomicU64::new(0),
            work: Condvar::new(),
            too_few: Condvar::new(),
        }))
    }

    /// Runs one of the jobs that may run, the oldest if `which` is 0, in this thread. Returns false if there
    /// is none.
    #[cfg(any(test, feature = "test-worker"))]
    pub fn run_one(&self, which: usize) -> bool {
        let begun = self.begin_one(which);
        begun.map(|begun| self.end_one(begun)).is_some()
    }

    /// Begins one of the jobs that may run. It is for the caller to end it, with [`Pool::end_one`].
    #[cfg(any(test, feature = "test-worker"))]
    pub fn begin_one(&self, which: usize) -> Option<Begun<J>> {
        let mut state = self.lock();
        let at = which.checked_rem(state.ready.len()).unwrap_or(0);
        let Ready { lane, ticket, job, .. } = state.ready.remove(at)?;
        drop(state);
        let mut begun = Begun { lane, ticket, job };
        begun.job.begin();
        Some(begun)
    }

    /// Runs a job that was begun.
    #[cfg(any(test, feature = "test-worker"))]
    pub fn end_one(&self, Begun { lane, ticket, job }: Begun<J>) {
        job.run();
        self.lock().finished(lane, ticket);
    }

    /// Jobs that have not ended.
    #[cfg(any(test, feature = "test-worker"))]
    pub fn unfinished(&self) -> usize {
        self.lock().lanes.iter().map(|lane| lane.running + lane.waiting.len()).sum()
    }

    /// A new lane, which runs at most `width` jobs at a time.
    pub fn lane(&'static self, width: usize) -> Lane<J> {
        let mut state = self.lock();
        let (submitted, waiting) = (Vec::with_capacity(width), BTreeMap::new());
        state.lanes.push(Queue { width, running: 0, submitted, waiting });
        Lane { pool: self, index: state.lanes.len() - 1 }
    }

    /// No job runs while this is locked, so nobody waits for it for long.
    fn lock(&self) -> MutexGuard<'_, State<J>> {
        lock(&self.state)
    }

    fn spawn(&'static self) -> io::Result<()> {
        std::thread::Builder::new().name("raio-io".into()).spawn(|| self.work()).map(|_| ())
    }

    /// The life of a thread that runs jobs.
    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(Ready { lane, ticket, job, .. }) = state.ready.pop_front() {
                state.idle -= 1;
                drop(state);
                job.run();
                state = self.lock();
                state.idle += 1;
                state.finished(lane, ticket);
                continue;
            }
            let waited;
            (state, waited) =
                self.work.wait_timeout(state, IDLE_TIMEOUT).unwrap_or_else(PoisonError::into_inner);
            if waited.timed_out() && state.ready.is_empty() && state.idle > 1 {
                state.idle -= 1;
                return;
            }
        }
    }

    /// The life of the thread that starts the others.
    fn start_threads(&'static self) {
        let mut state = self.lock();
        loop {
            while state.ready.len() <= state.idle {
                state = self.too_few.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.idle += 1;
            drop(state);
            let started = self.spawn();
            state = self.lock();
            let Err(error) = started else { continue };
            state.idle -= 1;
            let overdue = state.overdue();
            drop(state);
            if log::permit(None, "threads that cannot be started") {
                tracing::warn!(
                    "Cannot start a thread for file operations ({error}), so some wait. Raise the limit on \
                     processes with `ulimit -u`, \
                     or TasksMax= in the unit."
                );
            }
            for Ready { lane, ticket, job, .. } in overdue {
                if let Some(job) = job.reject() {
                    Lane { pool: self, index: lane }.submit(ticket, job);
                }
            }
            state = self.lock();
            (state, _) =
                self.too_few.wait_timeout(state, START_RETRY).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<J> State<J> {
    /// A job of this lane has ended: the next one may run.
    fn finished(&mut self, lane: usize, ticket: Ticket) {
        let queue = &mut self.lanes[lane];
        queue.end(ticket);
        if let Some((ticket, (submitted, job))) = queue.waiting.pop_first() {
            queue.begin(ticket, submitted);
            self.ready.push_back(Ready { lane, since: Instant::now(), ticket, job });
        }
    }

    /// Takes out the jobs of lanes that have waited too long for a thread.
    fn overdue(&mut self) -> Vec<Ready<J>> {
        let mut overdue = Vec::new();
        while self.ready.front().is_some_and(|ready| ready.since.elapsed() >= START_TIMEOUT)
            && let Some(ready) = self.ready.pop_front()
        {
            let Ready { lane, since, ticket, .. } = ready;
            let queue = &mut self.lanes[lane];
            queue.end(ticket);
            overdue.push(ready);
            let waiting = std::mem::take(&mut queue.waiting);
            overdue.extend(waiting.into_iter().map(|(ticket, (_, job))| Ready { lane, since, ticket, job }));
        }
        overdue
    }
}

impl<J> Queue<J> {
    /// A job that was submitted then may run.
    fn begin(&mut self, ticket: Ticket, submitted: Instant) {
        self.running += 1;
        self.submitted.push((ticket, submitted));
    }

    /// One has ended, or will not run.
    fn end(&mut self, ticket: Ticket) {
        self.running -= 1;
        if let Some(at) = self.submitted.iter().position(|&(one, _)| one == ticket) {
            self.submitted.swap_remove(at);
        }
    }
}

impl<J: Job> Lane<J> {
    /// A ticket for one job.
    pub fn ticket(&self) -> Ticket {
        Ticket(self.pool.next_ticket.fetch_add(1, Ordering::Relaxed))
    }

    /// Runs a job once the lane has room for it.
    pub fn submit(&self, ticket: Ticket, job: J) {
        let now = Instant::now();
        let mut state = self.pool.lock();
        let queue = &mut state.lanes[self.index];
        if queue.running == queue.width {
            queue.waiting.insert(ticket, (now, job));
            return;
        }
        queue.begin(ticket, now);
        state.ready.push_back(Ready { lane: self.index, since: now, ticket, job });
        let enough = state.ready.len() <= state.idle;
        drop(state);
        if enough { self.pool.work.notify_one() } else { self.pool.too_few.notify_one() }
    }

    /// What it has to do.
    pub fn load(&self) -> Load {
        let state = self.pool.lock();
        let Queue { running, submitted, waiting, .. } = &state.lanes[self.index];
        // The first to wait has waited longest.
        let first = waiting.first_key_value().map(|(_, (submitted, _))| *submitted);
        let oldest = submitted.iter().map(|&(_, submitted)| submitted).chain(first).min();
        Load { running: *running, waiting: waiting.len(), oldest: oldest.map(|oldest| oldest.elapsed()) }
    }

    /// Whether all that was submitted has ended.
    #[cfg(test)]
    pub fn is_idle(&self) -> bool {
        self.pool.lock().lanes[self.index].running == 0
    }

    /// Takes something back from a job that has not begun.
    pub fn take_back<T>(&self, ticket: Ticket, take: impl FnOnce(&mut J) -> Option<T>) -> Option<T> {
        let mut state = self.pool.lock();
        let State { lanes, ready, .. } = &mut *state;
        if let Entry::Occupied(mut job) = lanes[self.index].waiting.entry(ticket) {
            let taken = take(&mut job.get_mut().1);
            if job.get().1.is_empty() {
                job.remove();
            }
            return taken;
        }
        // There are as many as lanes are wide, at most, and hardly any while threads can be started.
        take(&mut ready.iter_mut().find(|ready| ready.ticket == ticket)?.job)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use super::*;

    /// Says that it runs, and goes on running until it is let go.
    struct Held {
        name: u32,
        begun: Sender<u32>,
        go: Receiver<()>,
        is_taken: bool,
    }

    impl Job for Held {
        fn run(self) {
            let _ = self.begun.send(self.name);
            let _ = self.go.recv();
        }

        fn is_empty(&self) -> bool {
            self.is_taken
        }

        fn reject(self) -> Option<Self> {
            unreachable!("there are threads enough")
        }
    }

    struct Bench {
        pool: &'static Pool<Held>,
        begun: (Sender<u32>, Receiver<u32>),
    }

    impl Bench {
        fn new() -> Self {
            Self { pool: Pool::start().unwrap(), begun: channel() }
        }

        /// Submits a job; it runs until what is returned is dropped.
        fn submit(&self, lane: Lane<Held>, name: u32) -> Sender<()> {
            self.submit_as(lane.ticket(), lane, name)
        }

        fn submit_as(&self, ticket: Ticket, lane: Lane<Held>, name: u32) -> Sender<()> {
            let (end, go) = channel();
            lane.submit(ticket, Held { name, begun: self.begun.0.clone(), go, is_taken: false });
            end
        }

        fn next(&self) -> u32 {
            self.begun.1.recv_timeout(Duration::from_secs(30)).expect("a job begins")
        }
    }

    #[test]
    fn a_lane_runs_as_many_jobs_as_it_is_wide_and_the_others_in_their_order() {
        let bench = Bench::new();
        let lane = bench.pool.lane(2);
        let mut ends: VecDeque<_> = (0..10).map(|name| bench.submit(lane, name)).collect();
        let mut first = [bench.next(), bench.next()];
        first.sort_unstable();
        assert_eq!(first, [0, 1]);
        for name in 2..10 {
            assert!(bench.begun.1.try_recv().is_err(), "too many at a time");
            ends.pop_front();
            assert_eq!(bench.next(), name);
        }
    }

    #[test]
    fn a_lane_tells_what_it_has_to_do_and_for_how_long() {
        let bench = Bench::new();
        let (lane, other) = (bench.pool.lane(2), bench.pool.lane(2));
        assert_eq!(lane.load(), Load::default());
        let began = Instant::now();
        let mut ends: VecDeque<_> = (0..3).map(|name| bench.submit(lane, name)).collect();
        let mut running = [bench.next(), bench.next()];
        running.sort_unstable();
        assert_eq!(running, [0, 1]);
        std::thread::sleep(Duration::from_millis(20));
        let Load { running, waiting, oldest } = lane.load();
        assert_eq!((running, waiting, other.load()), (2, 1, Load::default()));
        assert!(oldest.is_some_and(|oldest| (Duration::from_millis(20)..=began.elapsed()).contains(&oldest)));
        ends.clear();
        bench.next();
        while lane.load() != Load::default() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn lanes_that_hang_hold_up_no_other() {
        let bench = Bench::new();
        let mut ends = Vec::new();
        for at in 0..20 {
            let lane = bench.pool.lane(4);
            ends.extend((0..8).map(|name| bench.submit(lane, at * 8 + name)));
            let mut begun: Vec<_> = (0..4).map(|_| bench.next()).collect();
            begun.sort_unstable();
            assert_eq!(begun, (at * 8..at * 8 + 4).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_waits_can_be_taken_back_and_what_runs_cannot() {
        let bench = Bench::new();
        let lane = bench.pool.lane(1);
        let tickets: Vec<_> = (0..4).map(|_| lane.ticket()).collect();
        let ends: Vec<_> = (0..4).map(|name| bench.submit_as(tickets[name as usize], lane, name)).collect();
        assert_eq!(bench.next(), 0);
        let take = |name: usize, all| {
            lane.take_back(tickets[name], |job| {
                job.is_taken = all;
                Some(job.name)
            })
        };
        assert_eq!(take(0, true), None);
        assert_eq!(take(1, true), Some(1));
        assert_eq!(take(1, true), None, "of what is empty nothing stays");
        assert_eq!(take(2, false), Some(2));
        drop(ends);
        assert_eq!((bench.next(), bench.next()), (2, 3));
    }
}
