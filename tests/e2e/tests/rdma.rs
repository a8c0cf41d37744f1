//! What can happen to RDMA connections: processes that are killed while devices reach into each other's
//! memory, a wire that is cut, idleness, too little memory to lock, several devices. They need the wire of
//! scripts/rdma-vm.
//!
//! RAIO_TEST_KILLS says how many processes are killed, half of them clients and half servers (12).

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Context, Operation, Options, Session};
use raio_e2e::{
    Cut, Flood, LISTEN, NUMBERS_BYTES, PATIENCE, Random, Server, Silenced, TCP, binary, copy_program,
    is_at_rest, needs_wire, numbers, resources, resources_return_to,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Signal;

const KIB: usize = 1 << 10;

fn kills() -> usize {
    raio_e2e::number("RAIO_TEST_KILLS", 12) / 2
}

/// Reads 300 pieces of the file, and finds them right.
fn reads_right(url: &str) {
    let output =
        Command::new(binary("flood")).args([url, "/d/numbers", "check", "300"]).output().expect("flood");
    assert!(output.status.success(), "{url}: {output:?}");
}

fn buffer(len: usize) -> Buffers {
    Buffers::One(Buffer::Owned(vec![0; len].into()))
}

/// A sentence of a connection that has ended, and an errno that says so.
fn assert_lost(error: &raio::Error) {
    let errnos = [libc::ENOTCONN, libc::ECONNRESET, libc::EPIPE, libc::ETIMEDOUT, libc::ENODEV, libc::EIO];
    assert!(errnos.contains(&error.errno()), "errno {}: {error}", error.errno());
    assert!(error.text.contains(' ') && error.text.len() > 20, "{error:?}");
}

#[test]
fn clients_killed_while_the_server_writes_into_their_memory_leave_nothing_behind() {
    let Some(_wire) = needs_wire("killing clients") else { return };
    let mut random = Random::new();
    let (_directory, export) = numbers();
    let without_server = resources();
    let mut server =
        Server::start_with(&[&export], &["--memory", "64M", "--linger", "0", "--listen", LISTEN]);
    let idle = resources();
    let mut before = None;
    for round in 0..kills() {
        let mut flood = Flood::start(&server.url(), "/d/numbers");
        std::thread::sleep(Duration::from_millis(random.below(40)));
        let status = flood.kill();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "it was in the middle of it: {status}");
        let statistics = server.statistics_when(is_at_rest);
        assert_eq!(statistics["requests"]["write"], 0, "{statistics}");
        resources_return_to(&idle);
        // The first rounds touch memory for the first time.
        if round == 4 {
            before = Some((server.descriptors(), server.taken_bytes()));
        }
    }
    if let Some((descriptors, bytes)) = before {
        assert_eq!(server.descriptors(), descriptors);
        let grown = server.taken_bytes().saturating_sub(bytes);
        assert!(grown < 4 << 20, "{grown} bytes more after {} more clients", kills() - 5);
    }
    reads_right(&server.url());
    drop(server);
    resources_return_to(&without_server);
}

/// Blocks that are written again and again, each by one write at a time. Every word says in which version and
/// where it belongs.
struct Blocks {
    file: File,
    /// The last version that was acknowledged, and the one that is being written.
    acknowledged: Vec<u32>,
    writing: Vec<Option<u32>>,
}

impl Blocks {
    const COUNT: usize = 128;
    /// Beyond what travels inline.
    const BYTES: usize = 64 * KIB;

    fn new(directory: &Path) -> Self {
        let path = directory.join("blocks");
        let bytes: Vec<u8> = (0..Self::COUNT).flat_map(|block| Self::content(block, 0).into_vec()).collect();
        std::fs::write(&path, bytes).expect("a file");
        let file = File::open(path).expect("the file");
        Self { file, acknowledged: vec![0; Self::COUNT], writing: vec![None; Self::COUNT] }
    }

    fn word(block: usize, version: u32, n: usize) -> u64 {
        u64::from(version) << 32 | (block << 16 | n) as u64
    }

    fn content(block: usize, version: u32) -> Box<[u8]> {
        (0..Self::BYTES / 8).flat_map(|n| Self::word(block, version, n).to_le_bytes()).collect()
    }

    /// Begins to write the next version of a block.
    fn submit(&mut self, context: &mut Context, file: &raio::File, block: usize) -> Result<(), raio::Error> {
        // A version whose outcome nobody knows is not written again.
        let version = self.writing[block].unwrap_or(self.acknowledged[block]) + 1;
        let buffers = Buffers::One(Buffer::Owned(Self::content(block, version)));
        let operation = Operation::Write { offset: (block * Self::BYTES) as u64, buffers };
        context.submit(file, operation, block as u64).map_err(|rejected| rejected.error)?;
        self.writing[block] = Some(version);
        Ok(())
    }

    fn acknowledge(&mut self, block: usize) {
        self.acknowledged[block] = self.writing[block].take().expect("it was being written");
    }

    /// The file holds of each block what was acknowledged. Where a write has no outcome each page may have
    /// come from it as well: that is taken for acknowledged as it is from then on.
    fn check(&mut self) {
        let mut bytes = vec![0; Self::BYTES];
        for block in 0..Self::COUNT {
            self.file.read_exact_at(&mut bytes, (block * Self::BYTES) as u64).expect("the block");
            let unknown = self.writing[block].take();
            for (page, words) in bytes.chunks_exact(4 * KIB).enumerate() {
                let is = |version: u32| {
                    words
                        .chunks_exact(8)
                        .enumerate()
                        .all(|(n, word)| word == Self::word(block, version, page * 512 + n).to_le_bytes())
                };
                assert!(
                    is(self.acknowledged[block]) || unknown.is_some_and(is),
                    "block {block}, page {page}: not version {} which was acknowledged, nor {unknown:?}, but \
                     {:x?}",
                    self.acknowledged[block],
                    &words[..16]
                );
            }
        }
    }

    /// Writes all blocks once, so that the version of each is known.
    fn write_all(&mut self, context: &mut Context, file: &raio::File) {
        for block in 0..Self::COUNT {
            self.submit(context, file, block).expect("room for all");
        }
        for left in (1..=Self::COUNT).rev() {
            context.wait(1, left, None).expect("an acknowledgement");
            let completion = context.next().expect("a completion");
            assert_eq!(completion.result, Ok(Self::BYTES as u64));
            self.acknowledge(completion.token as usize);
        }
    }
}

#[test]
fn servers_killed_while_they_read_from_their_clients_memory_lose_nothing_that_they_acknowledged() {
    let Some(_wire) = needs_wire("killing servers") else { return };
    let mut random = Random::new();
    let directory = tempfile::tempdir().expect("a directory");
    let export = format!("d={},rw", directory.path().display());
    let mut blocks = Blocks::new(directory.path());
    let mut before = None;
    for _ in 0..kills() {
        let mut server =
            Server::start_with(&[&export], &["--memory", "32M", "--linger", "0", "--listen", LISTEN]);
        let session =
            Session::connect(&server.url(), &Options { reconnect: Duration::ZERO, ..Options::default() })
                .expect("a session");
        let file = session.open("/d/blocks", libc::O_RDWR, 0).expect("a file");
        let mut context = session.context(Blocks::COUNT).expect("a context");
        blocks.write_all(&mut context, &file);
        blocks.check();
        for block in 0..Blocks::COUNT {
            blocks.submit(&mut context, &file, block).expect("room for all");
        }
        let mut in_flight = Blocks::COUNT;
        let mut until_kill = random.below(200);
        let mut lost = 0;
        std::thread::scope(|scope| {
            let mut server = Some(&mut server);
            let mut killer = None;
            while in_flight > 0 {
                context.flush();
                if until_kill == 0
                    && let Some(server) = server.take()
                {
                    // Meanwhile there is always more to do, so that it is killed in the middle of it.
                    killer = Some(scope.spawn(move || {
                        server.statistics_when(|now| now["in_flight"]["fetching"].as_u64() > Some(0));
                        server.kill();
                    }));
                }
                context.wait(1, Blocks::COUNT, Some(PATIENCE)).expect("a completion");
                let completion = context.next().expect("each operation ends");
                in_flight -= 1;
                let block = completion.token as usize;
                match completion.result {
                    Ok(n) => {
                        assert_eq!((n, lost), (Blocks::BYTES as u64, 0), "after the first failure all fail");
                        blocks.acknowledge(block);
                        until_kill = until_kill.saturating_sub(1);
                        let submitted = blocks.submit(&mut context, &file, block);
                        assert!(submitted.is_ok() || killer.is_some(), "the server lives");
                        in_flight += usize::from(submitted.is_ok());
                    }
                    Err(error) => {
                        assert!(killer.is_some(), "the connection broke while the server lived: {error}");
                        assert_lost(&error);
                        lost += 1;
                    }
                }
            }
            killer.expect("the server was killed").join().expect("RDMA READs were under way");
        });
        assert!(lost > 0, "it was killed when it had done all");
        // Nothing ends twice.
        assert_eq!(context.wait(0, 1, None).expect_err("no connection").errno(), libc::ENOTCONN);
        assert!(context.next().is_none());
        blocks.check();
        drop((context, file, session, server));
        // The first time, this process opens the devices.
        match &before {
            Some(before) => resources_return_to(before),
            None => before = Some(resources()),
        }
    }
}

#[test]
fn when_the_wire_is_cut_each_operation_ends_once_and_the_server_serves_on() {
    let Some(_wire) = needs_wire("cutting the wire") else { return };
    let (_directory, export) = numbers();
    let mut server = Server::start_with(
        &[&export],
        &["--memory", "64M", "--linger", "0", "--listen", LISTEN, "--listen", TCP],
    );
    let [rdma, tcp] = &server.urls()[..] else { panic!("two addresses") };
    let (rdma, tcp) = (rdma.clone(), tcp.clone());
    let instantly = Options { reconnect: Duration::ZERO, ..Options::default() };
    let session = Session::connect(&rdma, &instantly).expect("a session");
    let file = session.open("/d/numbers", libc::O_RDWR, 0).expect("a file");
    let mut context = session.context(64).expect("a context");
    let submit = |context: &mut Context, n: u64| {
        let offset = n * 64 * KIB as u64 % NUMBERS_BYTES;
        let operation = if n.is_multiple_of(2) {
            Operation::Read { offset, buffers: buffer(64 * KIB) }
        } else {
            let bytes = (offset / 8..).take(8 * KIB).flat_map(u64::to_le_bytes).collect();
            Operation::Write { offset, buffers: Buffers::One(Buffer::Owned(bytes)) }
        };
        context.submit(&file, operation, n).map_err(|rejected| rejected.error)
    };
    let mut in_flight = HashSet::new();
    let mut next = 0;
    let (mut cut, mut lost) = (None, 0);
    let deadline = Instant::now() + 3 * PATIENCE;
    loop {
        while lost == 0 && in_flight.len() < 64 && submit(&mut context, next).is_ok() {
            in_flight.insert(next);
            next += 1;
        }
        if in_flight.is_empty() {
            break;
        }
        if next > 500 && cut.is_none() {
            cut = Some(Silenced::new());
        }
        assert!(Instant::now() < deadline, "{} operations never end", in_flight.len());
        context.wait(1, 64, Some(PATIENCE)).expect("completions");
        while let Some(completion) = context.next() {
            assert!(in_flight.remove(&completion.token), "operation {} ends twice", completion.token);
            if let Err(error) = completion.result {
                if lost == 0 {
                    println!("{error}");
                }
                assert_lost(&error);
                lost += 1;
            }
        }
    }
    assert!(lost > 0);
    assert_lost(&submit(&mut context, 0).expect_err("no connection"));
    let rejected =
        Session::connect(&rdma, &Options { connect_timeout: Duration::from_secs(2), ..Options::default() });
    assert!(rejected.expect_err("there is no way").text.contains(&rdma["raio+rdma://".len()..]));
    reads_right(&tcp);
    // Of the two connections one may have been idle, so that nothing failed on it.
    drop((context, file, session));
    server.statistics_when(is_at_rest);
    drop(cut);
    reads_right(&rdma);
    server.statistics_when(is_at_rest);
}

#[test]
fn idle_servers_and_clients_use_no_processor() {
    let Some(_wire) = needs_wire("idleness") else { return };
    let (_directory, export) = numbers();
    let server = Server::start_with(&[&export], &["--memory", "64M", "--linger", "0", "--listen", LISTEN]);
    let read = |context: &mut Context, file: &raio::File| {
        context.submit(file, Operation::Read { offset: 0, buffers: buffer(4096) }, 0).expect("room");
        context.flush();
    };
    let connect = || {
        let session = Session::connect(&server.url(), &Options::default()).expect("a session");
        let file = session.open("/d/numbers", libc::O_RDONLY, 0).expect("a file");
        let mut context = session.context(8).expect("a context");
        read(&mut context, &file);
        context.wait(1, 1, None).expect("an answer");
        assert_eq!(context.next().expect("a completion").result, Ok(4096));
        (session, file, context)
    };
    let mut clients = [connect(), connect(), connect()];
    assert_idle("the server", || server.cpu_time());

    // An answer that does not come.
    server.hold_up();
    let [(_, file, context), (_, polled_file, polled_context), _] = &mut clients;
    let (sender, ids) = mpsc::channel();
    std::thread::scope(|scope| {
        let other = sender.clone();
        let waiting = scope.spawn(move || {
            read(context, file);
            sender.send(rustix::thread::gettid()).expect("the test runs");
            context.wait(1, 1, None).expect("an answer");
            context.next().expect("a completion").result
        });
        let polling = scope.spawn(move || {
            read(polled_context, polled_file);
            other.send(rustix::thread::gettid()).expect("the test runs");
            loop {
                let fd = polled_context.poll_fd().expect("a descriptor");
                poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None).expect("something");
                if polled_context.wait(0, 1, Some(Duration::ZERO)).expect("a live connection") > 0 {
                    break polled_context.next().expect("a completion").result;
                }
            }
        });
        for who in ["one of the clients", "the other"] {
            let id = ids.recv().expect("a thread");
            let stat = format!("/proc/self/task/{}/stat", id.as_raw_nonzero());
            assert_idle(who, || raio_e2e::cpu_time(&stat));
        }
        server.signal(Signal::CONT);
        assert_eq!(waiting.join().expect("a result"), Ok(4096));
        assert_eq!(polling.join().expect("a result"), Ok(4096));
    });
}

/// Looks at processor time for three seconds, once all is quiet. Two ticks are allowed for being looked at.
fn assert_idle(who: &str, cpu_time: impl Fn() -> Duration) {
    std::thread::sleep(Duration::from_millis(500));
    let before = cpu_time();
    std::thread::sleep(Duration::from_secs(3));
    let used = cpu_time() - before;
    assert!(used <= Duration::from_millis(20), "{who} used {used:?} in three idle seconds");
}

/// Runs a program of this workspace as an ordinary user who may lock 64 KiB.
fn as_nobody(program: &str, arguments: &[&str]) -> Output {
    // The workspace may be where that user may not look.
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).expect("permissions");
    let copy = directory.path().join(program);
    copy_program(&binary(program), &copy);
    Command::new("bash")
        .args(["-c", "ulimit -l 64; exec setpriv --reuid nobody --clear-groups -- \"$@\"", "bash"])
        .arg(copy)
        .args(arguments)
        .current_dir("/")
        .output()
        .expect("bash")
}

#[test]
fn who_may_lock_too_little_memory_is_told_how_much_and_how_to_get_more() {
    let Some(_wire) = needs_wire("a memlock limit") else { return };
    let (_directory, export) = numbers();
    let server = Server::start_with(&[&export], &["--memory", "64M", "--linger", "0", "--listen", LISTEN]);
    for output in [
        as_nobody(
            "raio_server",
            &["--export", "null=null:1M", "--memory", "32M", "--clear", "--listen", LISTEN],
        ),
        as_nobody("flood", &[&server.url(), "/d/numbers"]),
    ] {
        assert!(!output.status.success(), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("Cannot lock ") && said.contains("the memlock limit is 64 KiB"), "{said}");
        assert!(said.contains("`ulimit -l`") && said.contains("LimitMEMLOCK="), "{said}");
    }
    reads_right(&server.url());
}

fn list_devices() -> (bool, String) {
    let output = Command::new(binary("raio_server")).arg("--list-devices").output().expect("raio_server");
    let said = String::from_utf8_lossy(if output.status.success() { &output.stdout } else { &output.stderr });
    (output.status.success(), said.into_owned())
}

#[test]
fn the_devices_are_listed_with_their_ports_and_addresses_and_why_one_is_not_usable() {
    let Some(_wire) = needs_wire("listing devices") else { return };
    let (success, said) = list_devices();
    assert!(success && !said.contains("Not usable"), "{said}");
    for (device, address) in [("rxe0", "10.77.0.1"), ("rxe1", "10.77.0.2")] {
        assert!(said.contains(&format!("{device} port 1: active, Ethernet, MTU 4096\n")), "{said}");
        assert!(said.contains(&format!("GID 1: ::ffff:{address} (RoCE v2)\n")), "{said}");
        assert!(said.contains("    Memory windows: yes\n"), "{said}");
    }
    let cut = Cut::new();
    let (success, said) = list_devices();
    assert!(success && said.contains("rxe0 port 1: down, Ethernet"), "{said}");
    assert!(said.contains("Not usable: The port is down. Bring up its link"), "{said}");
    drop(cut);
    let (_, said) = list_devices();
    assert!(!said.contains("Not usable"), "{said}");
}

#[test]
fn where_there_is_no_device_the_list_says_so() {
    if std::fs::read_dir("/sys/class/infiniband").is_ok_and(|mut entries| entries.next().is_some()) {
        eprintln!("SKIPPED: there are RDMA devices here. Run this without scripts/rdma-vm too.");
        return;
    }
    let (success, said) = list_devices();
    assert!(!success && said.contains("There is no RDMA here"), "{said}");
    assert!(said.contains("Use TCP"), "{said}");
}

#[test]
fn a_server_serves_several_devices_and_tcp_at_once() {
    let Some(_wire) = needs_wire("several devices") else { return };
    let (_directory, export) = numbers();
    let listens = [LISTEN, "rdma://10.77.0.2:0", TCP].map(|url| ["--listen", url]).concat();
    let mut server =
        Server::start_with(&[&export], &[&["--memory", "64M", "--linger", "0"], &listens[..]].concat());
    let urls = server.urls();
    assert_eq!(urls.len(), 3);
    let mut floods: HashMap<_, _> = urls.iter().map(|url| (url, Flood::start(url, "/d/numbers"))).collect();
    let statistics = server.statistics_when(|statistics| statistics["read_bytes"].as_u64() > Some(32 << 20));
    assert_eq!(statistics["connections"], 6, "a session and a context each: {statistics}");
    for (url, flood) in &mut floods {
        assert!(flood.is_alive(), "{url}");
    }
    drop(floods);
    urls.iter().for_each(|url| reads_right(url));
    server.statistics_when(is_at_rest);
}

/// A session, with a context that has read.
fn client(url: &str) -> Result<(Session, Context), raio::Error> {
    let session = Session::connect(url, &Options::default())?;
    let file = session.open("/d/numbers", libc::O_RDONLY, 0)?;
    let mut context = session.context(128)?;
    let operation = Operation::Read { offset: 0, buffers: buffer(64 * KIB) };
    context.submit(&file, operation, 0).map_err(|rejected| rejected.error)?;
    context.flush();
    context.wait(1, 1, Some(PATIENCE))?;
    assert_eq!(context.next().expect("a completion").result, Ok(64 * KIB as u64));
    Ok((session, context))
}

#[test]
fn queue_pairs_take_no_more_memory_than_there_is_and_who_gets_none_stays_on_tcp_or_is_told() {
    /// Three eighths of it are for connections, open files and queue pairs.
    const MEMORY_BYTES: u64 = 64 << 20;
    let Some(_wire) = needs_wire("memory for queue pairs") else { return };
    let (_directory, export) = numbers();
    let memory = MEMORY_BYTES.to_string();
    let listens = ["--listen", LISTEN, "--listen", "tcp://10.77.0.1:0"];
    let mut server =
        Server::start_with(&[&export], &[&["--memory", &memory, "--linger", "0"], &listens[..]].concat());
    let urls = server.urls();
    let rdma = &urls[0];
    let any = urls[1].replace("raio+tcp://", "raio://");
    let (session, context) = client(rdma).expect("there is memory");
    drop((session, context));
    server.statistics_when(is_at_rest);
    let before = server.taken_bytes();

    let mut clients = Vec::new();
    let why = loop {
        let (session, context) = client(&any).expect("over TCP if not by RDMA");
        let why = session.why_tcp().map(str::to_owned);
        clients.push((session, context));
        if let Some(why) = why {
            break why;
        }
        assert!(clients.len() < 100, "{}", server.statistics());
    };
    let grown = server.taken_bytes().saturating_sub(before);
    println!("{} clients, {} KiB, then: {why}", clients.len(), grown >> 10);
    assert!(why.contains("no memory for another queue pair") && why.contains("--memory"), "{why}");
    assert!(clients.len() > 4, "{why}");
    assert!(grown < MEMORY_BYTES / 8 * 3, "{grown} bytes");
    let statistics = server.statistics();
    assert!(statistics["rejected"]["queue_pairs"].as_u64() > Some(0), "{statistics}");

    let text = client(rdma).expect_err("there is no memory").text;
    println!("{text}");
    assert!(text.contains("--memory") && text.contains("Use TCP"), "{text}");
    drop(clients);
    server.statistics_when(is_at_rest);
    drop(client(rdma).expect("there is memory again"));
    assert_eq!(client(&any).expect("there is memory again").0.why_tcp(), None);
    server.statistics_when(is_at_rest);
}
