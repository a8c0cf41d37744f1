//! A deterministic simulation of everything that survives a broken connection: clients with their channels,
//! a server of two workers, and a disk with a cache, in one thread, on one virtual clock.
//!
//! The code is that of programs and of the daemon, down to the sockets: `Channel` with its decisions, the TCP
//! transports of both sides, the workers with sessions, fences and the orphan guard. Around it everything
//! is simulated: the network ([`network`]) delivers what the sockets were given in pieces, late, or never;
//! the disk ([`disk`]) ends operations when, and in the order in which, it likes; and time passes when
//! the run says so. What happens next is drawn from a seed, and so is what breaks: connections, clients, the
//! server, the machine. The same seed makes the same run.
//!
//! Checked is, at once: that each request ends once, with its own buffer; that no write is done twice, or
//! after its client was told how it has ended; that what an fsync covers is durable, and that it says so if
//! writes were lost; that no outcome is unknown unless the server was started again; that nothing is written
//! beside what a client that has gone has left behind. (That nobody writes to a buffer whose request is over
//! is the compiler's: they are owned here.) Afterwards: that each cell was a linearizable register
//! between crashes, and held after each what was synced before ([`crate::history`]); that everything ends
//! within a bounded time once nothing breaks any more; and that the server keeps nothing.
//!
//! `RAIO_TEST_SEED=N` runs one seed and prints what happened if it fails. `RAIO_TEST_SIMULATION_SECONDS` says
//! for how long to try seeds, in seconds of a processor: `scripts/test` does so for a minute, beside a step
//! that leaves a processor idle.

mod client;
mod disk;
mod network;
mod server;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use raio_transport::message::SessionId;
use raio_transport::sync::lock;

use self::client::{Client, Habits};
use self::disk::{CELLS, Disk, FILES};
use self::network::{CLIENT, Network, SERVER};
use self::server::{Server, WORKERS};
use crate::history::cells::{CellPlace, INITIAL};
use crate::history::{CellWrite, CrashImage, FileSync, History, LogLine, Outcome};
use crate::random::Random;
use crate::worker::driven;

/// For how long seeds are tried where nothing else is said.
const SECONDS_DEFAULT: u64 = 2;
/// Once nothing breaks any more everything ends within this time: a window, and then some.
const PROGRESS: Duration = Duration::from_secs(150);
/// Longer than any channel is kept.
const LINGER: Duration = Duration::from_secs(210);

thread_local! {
    /// The time of the run.
    static CLOCK: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// The time, for all in the run.
fn clock() -> Instant {
    CLOCK.get().expect("a run has set it")
}

/// What everybody in a run shares.
struct Env {
    random: Random,
    /// Counts what happens: the time of the history.
    ticks: u64,
    disk: Arc<Mutex<Disk>>,
    network: Arc<Mutex<Network>>,
    /// Servers that have been started.
    starts: u64,
    /// A server may forget a channel to which its client comes back.
    may_forget: bool,
    lines: Vec<String>,
    hash: u64,
    ended: u64,
    unknown: u64,
    lost: u64,
    reconnects: u64,
}

impl Env {
    fn tick(&mut self) -> u64 {
        self.ticks += 1;
        self.ticks
    }

    /// Something has happened.
    fn say(&mut self, line: String) {
        // FNV-1a.
        for &byte in line.as_bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        self.lines.push(line);
    }

    fn session_id(&mut self) -> SessionId {
        SessionId(std::array::from_fn(|_| self.random.below(256) as u8))
    }
}

/// Mistakes that a run must notice.
#[derive(Clone, Copy, Debug, Default)]
struct Mistakes {
    /// Nobody waits for what connections leave behind.
    forgets_orphans: bool,
    /// A server begins before what a killed one has begun is over.
    no_barrier: bool,
    /// The disk says that it has synced, and has not.
    forgets_syncs: bool,
}

/// What may happen in a run. Few things in each run are more than all of them in all.
#[derive(Clone, Copy, Debug)]
struct Plan {
    clients: usize,
    steps: u64,
    habits: Habits,
    cuts: bool,
    silence: bool,
    client_kills: bool,
    server_kills: bool,
    crashes: bool,
    drains: bool,
    late_mail: bool,
    failing_syncs: bool,
    /// One step in `fault_every` breaks something.
    fault_every: u64,
}

impl Plan {
    fn draw(random: &mut Random) -> Self {
        let mut one_in = |n| random.below(n) == 0;
        let habits = Habits {
            redo: one_in(8),
            short_linger: one_in(8),
            cancels: one_in(3),
            abandons: one_in(3),
            ..Habits::default()
        };
        let habits = Habits { abandons: habits.abandons && !habits.short_linger, ..habits };
        let habits =
            Habits { window: if one_in(6) { Duration::from_secs(3) } else { habits.window }, ..habits };
        Self {
            habits,
            cuts: !one_in(4),
            silence: one_in(2),
            client_kills: one_in(3),
            server_kills: one_in(3),
            crashes: one_in(3),
            drains: one_in(4),
            late_mail: one_in(2),
            failing_syncs: one_in(6),
            clients: 1 + random.index(3),
            steps: 300 + random.below(2000),
            fault_every: 20 + random.below(60),
        }
    }
}

struct World {
    env: Env,
    plan: Plan,
    mistakes: Mistakes,
    server: Option<Server>,
    clients: Vec<Client>,
    next_client: u32,
    kills: u32,
    /// Logs of this era whose clients have gone, and what was there when it began.
    logs: Vec<String>,
    began: Instant,
}

/// What became of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Summary {
    hash: u64,
    ended: u64,
    unknown: u64,
    lost: u64,
    reconnects: u64,
    starts: u64,
    time: Duration,
}

impl World {
    fn new(seed: u64, mistakes: Mistakes) -> Self {
        let mut random = Random::with_seed(seed);
        let plan = Plan::draw(&mut random);
        let began = Instant::now();
        CLOCK.set(Some(began));
        let mut disk = Disk::new(random.below(u64::MAX));
        disk.may_repeat = plan.habits.redo;
        disk.may_fail = plan.failing_syncs;
        disk.forgets_syncs = mistakes.forgets_syncs;
        let env = Env {
            random,
            ticks: 0,
            disk: Arc::new(Mutex::new(disk)),
            network: Arc::default(),
            starts: 0,
            may_forget: plan.habits.short_linger,
            lines: Vec::new(),
            hash: 0xcbf2_9ce4_8422_2325,
            ended: 0,
            unknown: 0,
            lost: 0,
            reconnects: 0,
        };
        let mut world = Self {
            env,
            plan,
            mistakes,
            server: None,
            clients: Vec::new(),
            next_client: 1,
            kills: 0,
            logs: Vec::new(),
            began,
        };
        world.env.say(format!("{plan:?}"));
        world.start_server();
        for _ in 0..plan.clients {
            world.add_client();
        }
        world
    }

    fn run(&mut self) -> Summary {
        for _ in 0..self.plan.steps {
            self.step();
        }
        self.end();
        self.summary()
    }

    fn summary(&self) -> Summary {
        let Env { hash, ended, unknown, lost, reconnects, starts, .. } = self.env;
        Summary { hash, ended, unknown, lost, reconnects, starts, time: clock() - self.began }
    }

    fn add_client(&mut self) {
        let client = Client::new(self.next_client, self.plan.habits, &mut self.env);
        self.next_client += 1;
        self.clients.push(client);
    }

    fn advance(&mut self, by: Duration) {
        CLOCK.set(Some(clock() + by));
        self.env.say(format!("{by:?} pass"));
    }

    // The server
    // ------------------------------------------------------------------------------------------------------

    fn start_server(&mut self) {
        if !self.mistakes.no_barrier {
            lock(&self.env.disk).settle();
        }
        self.env.starts += 1;
        let generation = 1 + self.env.random.below(4000) as u32;
        self.server = Some(Server::start(&self.env.disk, generation, self.mistakes.forgets_orphans));
        lock(&self.env.network).is_down = false;
        self.env.say(format!("server {} begins", self.env.starts));
    }

    fn kill_server(&mut self) {
        lock(&self.env.disk).server_was_killed();
        self.server = None;
        let mut network = lock(&self.env.network);
        network.kill(SERVER, None);
        network.is_down = true;
        drop(network);
        self.env.say("the server has ended".into());
    }

    fn crash(&mut self) {
        self.kill_server();
        let Env { disk, ticks, .. } = &mut self.env;
        let image = lock(disk).crash(|| {
            *ticks += 1;
            *ticks
        });
        self.env.say("the machine has crashed".into());
        self.check_history(Some(&image));
        // What is there from now on.
        let mut base = String::new();
        let at = self.env.tick();
        let mut cells: Vec<_> = image.cells.iter().map(|(&place, value)| (place, value.unwrap())).collect();
        cells.sort_unstable();
        for (place, value) in cells.into_iter().filter(|&(_, value)| value != INITIAL) {
            let write = CellWrite { place, value, begin: at, end: at, outcome: Outcome::Ok };
            let begin = LogLine::Begin { place, count: 1, value, begin: at };
            base.push_str(&format!("{begin}\n{}\n", LogLine::Write(write)));
        }
        self.logs = vec![base];
        let image = CrashImage { end: at, ..image };
        self.env.ticks += 1;
        self.clients.iter_mut().for_each(|client| client.begin_era(&image));
    }

    /// Checks what has happened since the last crash.
    fn check_history(&mut self, image: Option<&CrashImage>) {
        let mut logs = std::mem::take(&mut self.logs);
        logs.extend(self.clients.iter_mut().flat_map(Client::logs));
        let mut history = History::default();
        for log in &logs {
            history.add_log(log).expect("a log");
        }
        if self.plan.habits.redo {
            // Who has a write repeated may see its value come back.
            return;
        }
        let faults = history.check();
        let images = history.check_images(image.map_or(&[][..], std::slice::from_ref));
        let images = images.into_iter().map(|(_, violation)| violation);
        if let Some(violation) = faults.into_iter().chain(images).next() {
            panic!("{violation}\n{}", history.of_cell(violation.place));
        }
    }

    // What happens
    // ------------------------------------------------------------------------------------------------------

    fn step(&mut self) {
        if self.server.is_none() && self.env.random.below(20) == 0 {
            self.start_server();
        }
        if self.server.as_mut().is_some_and(Server::has_drained) {
            self.kill_server();
        }
        match self.env.random.below(100) {
            0..30 => self.deliver_some(),
            30..50 => self.run_worker(),
            50..65 => _ = self.disk_step(),
            65..95 => {
                let (at, slot) = (self.env.random.index(self.clients.len()), self.env.random.index(2));
                self.clients[at].act(slot, &mut self.env, false);
            }
            95..97 => {
                let by = [1, 10, 100, 1000, 5000][self.env.random.index(5)];
                self.advance(Duration::from_millis(by));
                // None is held up for long.
                self.clients.iter_mut().for_each(|client| client.look(&mut self.env));
            }
            _ if self.env.random.below(self.plan.fault_every) < 10 => self.break_something(),
            _ => {}
        }
    }

    fn deliver_some(&mut self) {
        let mut network = lock(&self.env.network);
        network.forget_dead();
        if network.links.is_empty() {
            return;
        }
        let at = self.env.random.index(network.links.len());
        let link = &mut network.links[at];
        if let Some(server) = &self.server
            && let Some(socket) = link.accept()
        {
            let worker = self.env.random.index(WORKERS);
            server.accept(worker, socket);
            let text = format!("link {} is accepted by worker {worker}", link.id);
            drop(network);
            return self.env.say(text);
        }
        let from = self.env.random.index(2);
        let Some(from) = [from, 1 - from].into_iter().find(|&from| link.can_deliver(from)) else { return };
        let max = match self.env.random.below(4) {
            0 => 1 + self.env.random.index(200),
            _ => usize::MAX,
        };
        let text = link.deliver(from, max);
        drop(network);
        self.env.say(text);
    }

    fn run_worker(&mut self) {
        let at = self.env.random.index(WORKERS);
        let is_late = self.plan.late_mail && self.env.random.below(4) == 0;
        if let Some(server) = &mut self.server {
            server.run(at, is_late);
        }
    }

    /// Whether there was something to do.
    fn disk_step(&mut self) -> bool {
        let mut disk = lock(&self.env.disk);
        let text = disk.step();
        let failed = std::mem::take(&mut disk.failed);
        drop(disk);
        for file in failed {
            let (begin, end) = (self.env.tick(), self.env.tick());
            let sync = LogLine::Fsync(FileSync { file, begin, end, outcome: Outcome::Failed });
            self.logs.push(format!("{sync}\n"));
        }
        let Some(text) = text else { return false };
        self.env.say(text);
        true
    }

    fn break_something(&mut self) {
        let Plan { cuts, silence, client_kills, server_kills, crashes, drains, .. } = self.plan;
        match self.env.random.below(12) {
            0..4 if cuts => self.cut(),
            4..6 if silence => {
                let mut network = lock(&self.env.network);
                if !network.links.is_empty() {
                    let at = self.env.random.index(network.links.len());
                    let link = &mut network.links[at];
                    link.is_silent = !link.is_silent;
                    let text = format!("link {} is silent: {}", link.id, link.is_silent);
                    drop(network);
                    self.env.say(text);
                }
            }
            6..8 if client_kills && self.kills < 8 => {
                self.kills += 1;
                let at = self.env.random.index(self.clients.len());
                let mut client = self.clients.remove(at);
                self.env.say(format!("client {} is killed", client.number));
                lock(&self.env.network).kill(CLIENT, Some(client.number));
                self.logs.extend(client.logs());
                drop(client);
                self.add_client();
            }
            8..10 if self.server.is_some() && server_kills => self.kill_server(),
            10 if self.server.is_some() && crashes => self.crash(),
            11 if drains => {
                if let Some(server) = &mut self.server {
                    server.drain(Duration::from_secs(5));
                    self.env.say("the server is told to stop".into());
                }
            }
            _ => {}
        }
    }

    /// A connection breaks, and one side or both see it.
    fn cut(&mut self) {
        let mut network = lock(&self.env.network);
        if network.links.is_empty() {
            return;
        }
        let at = self.env.random.index(network.links.len());
        let link = &mut network.links[at];
        let seen = self.env.random.below(3);
        if seen != 0 {
            link.end(CLIENT);
        }
        if seen != 1 {
            link.end(SERVER);
        }
        let text = format!("link {} is cut, seen by {seen}", link.id);
        drop(network);
        self.env.say(text);
    }

    // The end
    // ------------------------------------------------------------------------------------------------------

    /// Everything that can go on does. Whether there was anything.
    fn go_on(&mut self) -> bool {
        if self.server.as_mut().is_some_and(Server::has_drained) {
            self.kill_server();
        }
        if self.server.is_none() {
            self.start_server();
        }
        let server = self.server.as_mut().expect("it has been started");
        let mut network = lock(&self.env.network);
        network.forget_dead();
        let mut texts = Vec::new();
        for link in &mut network.links {
            if let Some(socket) = link.accept() {
                server.accept(0, socket);
                texts.push(format!("link {} is accepted", link.id));
            }
            for from in [CLIENT, SERVER] {
                if link.can_deliver(from) {
                    texts.push(link.deliver(from, usize::MAX));
                }
            }
        }
        drop(network);
        for at in 0..WORKERS {
            server.run(at, false);
        }
        let mut has_happened = !texts.is_empty();
        texts.into_iter().for_each(|text| self.env.say(text));
        while self.disk_step() {
            has_happened = true;
        }
        has_happened
    }

    /// Goes on until it is so, within a bounded time.
    fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        let end = clock() + PROGRESS;
        loop {
            let has_happened = self.go_on();
            for client in &mut self.clients {
                for slot in 0..2 {
                    client.act(slot, &mut self.env, true);
                }
            }
            if is_so(self) {
                return;
            }
            assert!(clock() < end, "{what}: not within {PROGRESS:?}");
            self.advance(Duration::from_millis(if has_happened { 1 } else { 500 }));
        }
    }

    /// Nothing breaks any more.
    fn end(&mut self) {
        self.env.say("nothing breaks any more".into());
        let mut network = lock(&self.env.network);
        for link in network.links.iter_mut().filter(|link| link.is_silent) {
            link.is_silent = false;
            if self.env.random.below(2) == 0 {
                link.end(SERVER);
            }
        }
        drop(network);
        self.until("all requests end", |world| world.clients.iter().all(Client::is_idle));
        // Somebody new is served, and finds what is there.
        self.add_client();
        self.until("all clients can go on", |world| {
            let last = world.clients.len() - 1;
            if !world.clients[last].is_up() && world.env.random.below(2) == 0 {
                for slot in 0..2 {
                    world.clients[last].act(slot, &mut world.env, false);
                }
            }
            world.clients.iter().all(|client| client.is_idle()) && world.clients[last].is_up()
        });
        let last = self.clients.len() - 1;
        for file in 0..FILES as u32 {
            self.clients[last].read_all(file, &mut self.env);
        }
        self.until("it is answered", |world| world.clients[last].is_idle());
        for file in 0..FILES as u32 {
            for cell in 0..CELLS {
                let value = lock(&self.env.disk).value(CellPlace { file, cell });
                self.env.say(format!("cell {cell} of file {file} is {value}"));
            }
        }
        self.check_history(None);
        self.clients.clear();
        self.until("what clients have sent arrives", |world| lock(&world.env.network).links.is_empty());
        let end = clock() + LINGER;
        while clock() < end {
            self.go_on();
            self.advance(Duration::from_secs(5));
        }
        let server = self.server.as_ref().expect("it runs");
        assert_eq!(server.left(), [0; 5], "the server keeps something");
    }
}

/// Runs a seed. The error is what happened until then.
fn run(seed: u64, mistakes: Mistakes) -> Result<Summary, Vec<String>> {
    let mut world = World::new(seed, mistakes);
    let run = catch_unwind(AssertUnwindSafe(|| world.run()));
    run.map_err(|_| std::mem::take(&mut world.env.lines))
}

/// Runs a seed that must not fail.
fn check(seed: u64) -> Summary {
    run(seed, Mistakes::default()).unwrap_or_else(|lines| {
        lines.iter().for_each(|line| println!("{line}"));
        panic!("replay with RAIO_TEST_SEED={seed} cargo test -p raio-server simulation")
    })
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// What this thread has had of a processor.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn simulation() {
    if let Some(seed) = number("RAIO_TEST_SEED") {
        println!("{:?}", check(seed));
        return;
    }
    let began = processor_time();
    let limit = Duration::from_secs(number("RAIO_TEST_SIMULATION_SECONDS").unwrap_or(SECONDS_DEFAULT));
    let first = crate::random::seed() << 20;
    let (mut seeds, mut sum) = (0, Summary::default());
    while processor_time() - began < limit {
        let summary = check(first + seeds);
        seeds += 1;
        sum.ended += summary.ended;
        sum.unknown += summary.unknown;
        sum.lost += summary.lost;
        sum.reconnects += summary.reconnects;
        sum.starts += summary.starts;
        sum.time += summary.time;
    }
    let hours = sum.time.as_secs_f64() / 3600.0;
    println!("{seeds} seeds, {hours:.1} hours of virtual time: {sum:?}");
}

#[test]
fn the_same_seed_makes_the_same_run() {
    for seed in 1..20 {
        let (first, second) = (check(seed), check(seed));
        assert_eq!(first, second, "seed {seed}");
    }
}

#[test]
fn a_mistake_is_noticed() {
    let mistakes = [
        Mistakes { forgets_orphans: true, ..Mistakes::default() },
        Mistakes { no_barrier: true, ..Mistakes::default() },
        Mistakes { forgets_syncs: true, ..Mistakes::default() },
    ];
    for mistakes in mistakes {
        let is_noticed = |&seed: &u64| run(seed, mistakes).is_err() && run(seed, Mistakes::default()).is_ok();
        let found = (0..1000).find(is_noticed);
        println!("{mistakes:?}: seed {}", found.expect("some seed notices it"));
    }
}
