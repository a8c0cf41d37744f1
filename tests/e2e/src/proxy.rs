//! A TCP proxy that cuts, delays, stalls and corrupts connections as it is told.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

/// How much a direction of a connection has under way at most, and if everything is delayed: then it is what
/// the link holds, and is not to bound what goes through.
const QUEUE_BYTES_MAX: usize = 256 << 10;
const LINK_BYTES_MAX: usize = 8 << 20;
const CHUNK_BYTES: usize = 64 << 10;

/// How the proxy ends a connection, for both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By the end of the stream.
    Fin,
    /// By a reset.
    Reset,
    /// Not at all: nothing comes through any more. Once the client has gone, the server gets a reset.
    Silence,
}

/// A direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
}

/// What happens to a connection. By default all comes through at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Treatment {
    /// It ends after this number of bytes has come through in this direction.
    pub cut: Option<(Direction, u64, Ending)>,
    /// How long everything takes.
    pub delay: Duration,
    /// This bit of what comes through in this direction is flipped.
    pub flip: Option<(Direction, u64)>,
}

impl Treatment {
    fn queue_bytes_max(&self) -> usize {
        if self.delay.is_zero() { QUEUE_BYTES_MAX } else { LINK_BYTES_MAX }
    }
}

/// The proxy. Its connections are reset when it is dropped.
pub struct Proxy {
    address: SocketAddr,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

struct Control {
    state: Mutex<Orders>,
    wake: OwnedFd,
}

#[derive(Default)]
struct Orders {
    /// For connections to come, one each.
    planned: VecDeque<Treatment>,
    /// For those beyond.
    otherwise: Treatment,
    is_stalled: bool,
    is_refusing: bool,
    /// For all connections that there are.
    end: Option<Ending>,
    /// For whichever connection has data next: which bit of it.
    flip: Option<(Direction, u64)>,
    connections: usize,
    /// How many bytes have come from the client and from the server, of each connection that there has been.
    passed: Vec<[u64; 2]>,
    stop: bool,
}

impl Proxy {
    /// One for a server, on the loopback address.
    pub fn start(server: SocketAddr) -> Self {
        Self::start_on(Ipv4Addr::LOCALHOST, server)
    }

    /// One that listens on this address. It lives in the network namespace of the thread that starts it.
    pub fn start_on(address: Ipv4Addr, server: SocketAddr) -> Self {
        let listener = TcpListener::bind((address, 0)).expect("a port");
        listener.set_nonblocking(true).expect("a socket");
        let address = listener.local_addr().expect("an address");
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        let control = Arc::new(Control { state: Mutex::default(), wake });
        let shared = Arc::clone(&control);
        let thread =
            std::thread::spawn(move || Relay { listener, server, connections: Vec::new() }.run(&shared));
        Self { address, control, thread: Some(thread) }
    }

    /// Where it listens, for clients.
    pub fn url(&self) -> String {
        format!("raio+tcp://{}", self.address)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn order<T>(&self, change: impl FnOnce(&mut Orders) -> T) -> T {
        let result = change(&mut self.control.orders());
        let _ = rustix::io::write(&self.control.wake, &1u64.to_ne_bytes());
        result
    }

    /// The next connections are treated so, one each.
    pub fn plan(&self, treatments: impl IntoIterator<Item = Treatment>) {
        self.order(|orders| orders.planned = treatments.into_iter().collect());
    }

    /// New connections for which there is no plan are treated so.
    pub fn treat(&self, treatment: Treatment) {
        self.order(|orders| orders.otherwise = treatment);
    }

    /// Ends all connections.
    pub fn end_all(&self, ending: Ending) {
        self.order(|orders| orders.end = Some(ending));
    }

    /// Nothing comes through until this is called with false.
    pub fn stall(&self, is_stalled: bool) {
        self.order(|orders| orders.is_stalled = is_stalled);
    }

    /// New connections are reset at once until this is called with false.
    pub fn refuse(&self, is_refusing: bool) {
        self.order(|orders| orders.is_refusing = is_refusing);
    }

    /// Flips a bit of what comes next in this direction, of whichever connection: this one, or if so much
    /// does not come, that one modulo what comes.
    pub fn flip(&self, direction: Direction, bit: u64) {
        self.order(|orders| orders.flip = Some((direction, bit)));
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.order(|orders| orders.connections)
    }

    /// How many bytes have come in this direction, on the connection with this number; from 0 on.
    pub fn passed(&self, connection: usize, direction: Direction) -> u64 {
        self.order(|orders| orders.passed.get(connection).map_or(0, |passed| passed[direction as usize]))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.order(|orders| orders.stop = true);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the proxy panicked");
        }
    }
}

impl Control {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread has.
struct Relay {
    listener: TcpListener,
    server: SocketAddr,
    connections: Vec<Relayed>,
}

impl Relay {
    fn run(mut self, control: &Control) {
        let mut is_stalled = false;
        loop {
            let ready = self.wait(control, is_stalled);
            let _ = rustix::io::read(&control.wake, &mut [0; 8]);
            // What was ordered before something came counts for that already.
            let (ending, is_stopped) = {
                let mut orders = control.orders();
                is_stalled = orders.is_stalled;
                (orders.end.take(), orders.stop)
            };
            for (connection, ready) in self.connections.iter_mut().zip(ready) {
                if let Some(ending) = ending.or(is_stopped.then_some(Ending::Reset)) {
                    connection.end(ending);
                }
                connection.proceed(ready, is_stalled, control);
            }
            if is_stopped {
                return;
            }
            self.accept(control);
            self.connections.retain(|connection| connection.phase != Phase::Over);
            control.orders().connections = self.connections.len();
        }
    }

    /// Waits until something can go on. Returns what is ready at the client's and the server's end of each
    /// connection.
    fn wait(&self, control: &Control, is_stalled: bool) -> Vec<[PollFlags; 2]> {
        let mut fds =
            vec![PollFd::new(&control.wake, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
        let mut due: Option<Instant> = None;
        let mut places = Vec::new();
        for connection in &self.connections {
            places.push(connection.interests(is_stalled).map(|flags| {
                let (end, flags) = flags?;
                fds.push(PollFd::from_borrowed_fd(connection.ends[end].as_fd(), flags));
                Some(fds.len() - 1)
            }));
            if !is_stalled && connection.phase == Phase::Passing {
                let dues = connection.pipes.iter().filter_map(|pipe| Some(pipe.chunks.front()?.due));
                due = dues.chain(due).min();
            }
        }
        let now = Instant::now();
        // What is due and cannot be sent waits for the socket.
        let left = due.filter(|&due| due > now).map(|due| due - now + Duration::from_micros(100));
        let timeout = left.map(|left| Timespec::try_from(left).expect("a short time"));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
        let ready = |at: Option<usize>| at.map_or(PollFlags::empty(), |at| fds[at].revents());
        places.into_iter().map(|pair| pair.map(ready)).collect()
    }

    fn accept(&mut self, control: &Control) {
        while let Ok((client, _)) = self.listener.accept() {
            let number;
            let treatment = {
                let mut orders = control.orders();
                orders.passed.push([0; 2]);
                number = orders.passed.len() - 1;
                if orders.is_refusing {
                    reset(client);
                    continue;
                }
                orders.planned.pop_front().unwrap_or(orders.otherwise)
            };
            match Relayed::new(client, self.server, treatment, number) {
                Ok(connection) => self.connections.push(connection),
                Err(client) => reset(client),
            }
        }
    }
}

fn reset(stream: TcpStream) {
    let _ = sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The way to the server is not open yet.
    Connecting,
    Passing,
    /// Both sides have been told of the end; what they still send is thrown away.
    Ending,
    Silent,
    Over,
}

/// A connection.
struct Relayed {
    /// The client's, and the server's.
    ends: [TcpStream; 2],
    /// From the client, and from the server.
    pipes: [Pipe; 2],
    treatment: Treatment,
    number: usize,
    phase: Phase,
}

struct Chunk {
    due: Instant,
    bytes: Vec<u8>,
    sent: usize,
}

/// A direction of a connection.
#[derive(Default)]
struct Pipe {
    chunks: VecDeque<Chunk>,
    queued: usize,
    /// How many bytes have come.
    taken: u64,
    /// No more comes.
    has_ended: bool,
    /// The other side knows.
    is_shut: bool,
}

fn direction(pipe: usize) -> Direction {
    if pipe == 0 { Direction::Up } else { Direction::Down }
}

impl Relayed {
    fn new(
        client: TcpStream,
        server: SocketAddr,
        treatment: Treatment,
        number: usize,
    ) -> Result<Self, TcpStream> {
        let family = if server.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let Ok(socket) = socket_with(family, SocketType::STREAM, flags, None) else { return Err(client) };
        if !matches!(connect(&socket, &server), Ok(()) | Err(Errno::INPROGRESS)) {
            return Err(client);
        }
        let ends = [client, TcpStream::from(socket)];
        for end in &ends {
            if end.set_nonblocking(true).and(end.set_nodelay(true)).is_err() {
                let [client, _] = ends;
                return Err(client);
            }
        }
        Ok(Self { ends, pipes: Default::default(), treatment, number, phase: Phase::Connecting })
    }

    /// How many more bytes this pipe may take before the connection is cut.
    fn left(&self, pipe: usize) -> u64 {
        match self.treatment.cut {
            Some((to_cut, after, _)) if to_cut == direction(pipe) => after - self.pipes[pipe].taken,
            _ => u64::MAX,
        }
    }

    /// What to wait for at each end, if at all.
    fn interests(&self, is_stalled: bool) -> [Option<(usize, PollFlags)>; 2] {
        [0, 1].map(|end| {
            let (from, to) = (&self.pipes[end], &self.pipes[1 - end]);
            let flags = match self.phase {
                Phase::Over => return None,
                Phase::Connecting => [PollFlags::RDHUP, PollFlags::OUT][end],
                Phase::Silent => [PollFlags::RDHUP, PollFlags::empty()][end],
                // An end that has ended is ready for ever.
                Phase::Ending if from.has_ended => return None,
                Phase::Ending => PollFlags::IN,
                Phase::Passing if is_stalled => PollFlags::empty(),
                Phase::Passing => {
                    let mut flags = PollFlags::empty();
                    let has_room = from.queued < self.treatment.queue_bytes_max() && self.left(end) > 0;
                    flags.set(PollFlags::IN, !from.has_ended && has_room);
                    let is_due = to.chunks.front().is_some_and(|chunk| chunk.due <= Instant::now());
                    flags.set(PollFlags::OUT, is_due);
                    flags
                }
            };
            Some((end, flags))
        })
    }

    fn proceed(&mut self, ready: [PollFlags; 2], is_stalled: bool, control: &Control) {
        let is_broken = |flags: PollFlags| flags.intersects(PollFlags::ERR | PollFlags::HUP);
        match self.phase {
            Phase::Over => {}
            Phase::Connecting => {
                if is_broken(ready[0]) || ready[1].contains(PollFlags::ERR) {
                    self.end(Ending::Reset);
                } else if ready[1].contains(PollFlags::OUT) {
                    self.phase = Phase::Passing;
                    self.cut_if_due();
                }
            }
            Phase::Silent => {
                if is_broken(ready[0]) || ready[0].contains(PollFlags::RDHUP) {
                    self.end(Ending::Reset);
                }
            }
            Phase::Ending => {
                for (n, flags) in ready.iter().enumerate() {
                    if !flags.is_empty() {
                        self.pipes[n].has_ended |= throw_away(&mut self.ends[n]);
                    }
                }
                if self.pipes.iter().all(|pipe| pipe.has_ended) {
                    self.phase = Phase::Over;
                }
            }
            // A reset is passed on even then, or it would be reported for ever.
            Phase::Passing if is_stalled => {
                if ready.iter().any(|&flags| is_broken(flags)) {
                    self.end(Ending::Reset);
                }
            }
            Phase::Passing => {
                if ready.iter().any(|flags| flags.contains(PollFlags::ERR)) {
                    // What came before a reset has come.
                    for (n, flags) in ready.iter().enumerate() {
                        let is_reset = flags.contains(PollFlags::ERR);
                        while is_reset && self.take(n, control).is_ok_and(|count| count > 0) {
                            let _ = self.pass(n);
                        }
                    }
                    return self.end(Ending::Reset);
                }
                for (n, flags) in ready.iter().enumerate() {
                    if flags.intersects(PollFlags::IN | PollFlags::HUP) && self.take(n, control).is_err()
                        || self.pass(n).is_err()
                    {
                        return self.end(Ending::Reset);
                    }
                }
                self.cut_if_due();
                if self.pipes.iter().all(|pipe| pipe.is_shut) {
                    self.phase = Phase::Over;
                }
            }
        }
    }

    /// Receives what has come. Returns how many bytes that is.
    fn take(&mut self, n: usize, control: &Control) -> std::io::Result<usize> {
        let (left, queue_bytes_max) = (self.left(n), self.treatment.queue_bytes_max());
        let pipe = &mut self.pipes[n];
        if pipe.has_ended || pipe.queued >= queue_bytes_max || left == 0 {
            return Ok(0);
        }
        let mut bytes = vec![0; (CHUNK_BYTES as u64).min(left) as usize];
        let count = match self.ends[n].read(&mut bytes) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
            Err(error) => return Err(error),
        };
        bytes.truncate(count);
        pipe.has_ended = count == 0;
        let mut flip = |bit: u64| bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
        if let Some((to_flip, bit)) = self.treatment.flip
            && to_flip == direction(n)
            && (pipe.taken..pipe.taken + count as u64).contains(&(bit / 8))
        {
            flip(bit - pipe.taken * 8);
        }
        if count > 0 {
            let mut orders = control.orders();
            if let Some((_, bit)) = orders.flip.take_if(|(to_flip, _)| *to_flip == direction(n)) {
                flip(bit % (count as u64 * 8));
            }
            orders.passed[self.number][n] += count as u64;
        }
        pipe.taken += count as u64;
        pipe.queued += count;
        if count > 0 {
            pipe.chunks.push_back(Chunk { due: Instant::now() + self.treatment.delay, bytes, sent: 0 });
        }
        Ok(count)
    }

    /// Sends on what is due.
    fn pass(&mut self, n: usize) -> std::io::Result<()> {
        let (pipe, to) = (&mut self.pipes[n], &mut self.ends[1 - n]);
        while let Some(chunk) = pipe.chunks.front_mut().filter(|chunk| chunk.due <= Instant::now()) {
            match to.write(&chunk.bytes[chunk.sent..]) {
                Ok(count) => {
                    chunk.sent += count;
                    pipe.queued -= count;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
            if chunk.sent == chunk.bytes.len() {
                pipe.chunks.pop_front();
            }
        }
        if pipe.has_ended && pipe.chunks.is_empty() && !pipe.is_shut {
            pipe.is_shut = true;
            to.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }

    fn cut_if_due(&mut self) {
        if let Some((to_cut, after, ending)) = self.treatment.cut {
            let pipe = &self.pipes[to_cut as usize];
            if pipe.taken >= after && pipe.chunks.is_empty() {
                self.end(ending);
            }
        }
    }

    fn end(&mut self, ending: Ending) {
        if self.phase == Phase::Over {
            return;
        }
        match ending {
            Ending::Silence if self.phase == Phase::Ending => {}
            Ending::Silence => self.phase = Phase::Silent,
            Ending::Fin if self.phase == Phase::Passing => {
                for end in &self.ends {
                    let _ = end.shutdown(Shutdown::Write);
                }
                self.phase = Phase::Ending;
            }
            Ending::Fin | Ending::Reset => {
                for end in &self.ends {
                    let _ = sockopt::set_socket_linger(end, Some(Duration::ZERO));
                }
                self.phase = Phase::Over; // and so it is dropped
            }
        }
    }
}

/// Whether nothing more comes.
fn throw_away(stream: &mut TcpStream) -> bool {
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != ErrorKind::WouldBlock,
        }
    }
}
