//! How many operations and bytes a second clients have, and how many bytes they may store.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Context, File, Operation, Options, Session};
use raio_e2e::{Client, PATIENCE, Server, Site, await_log, binary, carry_out, is_at_rest};
use rustix::process::Signal;

/// A client that always has requests in flight, in several contexts of one session. Dropping it ends it.
struct Busy {
    answered: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Busy {
    /// `depth` requests in flight in each of the contexts.
    fn start(
        session: &Session,
        path: &str,
        contexts: usize,
        depth: usize,
        bytes: usize,
        writes: bool,
    ) -> Self {
        let (answered, is_over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let start = |_| {
            let mut context = session.context(depth).expect("a context");
            let file = session.open(path, libc::O_RDWR, 0).expect("a file");
            let (answered, is_over) = (Arc::clone(&answered), Arc::clone(&is_over));
            std::thread::spawn(move || {
                let mut in_flight = 0;
                loop {
                    while !is_over.load(Ordering::Relaxed) && !context.is_full() {
                        begin(&mut context, &file, bytes, writes);
                        in_flight += 1;
                    }
                    if in_flight == 0 {
                        break;
                    }
                    context.wait(1, depth, Some(Duration::from_millis(100))).expect("it is connected");
                    while let Some(completion) = context.next() {
                        completion.result.expect("it is carried out");
                        in_flight -= 1;
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        };
        let threads = (0..contexts).map(start).collect();
        Self { answered, is_over, threads }
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().expect("it has not failed"));
    }
}

fn begin(context: &mut Context, file: &File, bytes: usize, writes: bool) {
    let buffers = Buffers::One(Buffer::Owned(vec![b'x'; bytes].into()));
    let operation =
        if writes { Operation::Write { offset: 0, buffers } } else { Operation::Read { offset: 0, buffers } };
    context.submit(file, operation, 0).expect("there is room");
}

/// How many requests of each are answered in a second, over three of them. A machine that is busy delays
/// them, which they may catch up with: what they have had before counts, too.
fn per_second<'a>(clients: &HashMap<&'a str, Busy>) -> HashMap<&'a str, f64> {
    const TIME: Duration = Duration::from_secs(3);
    let began = Instant::now();
    let before: HashMap<_, _> = clients.iter().map(|(name, busy)| (*name, busy.answered())).collect();
    std::thread::sleep(TIME);
    let seconds = began.elapsed().as_secs_f64();
    clients.iter().map(|(name, busy)| (*name, (busy.answered() - before[name]) as f64 / seconds)).collect()
}

fn assert_within_a_tenth(rate: f64, expected: f64, what: &str) {
    assert!((rate - expected).abs() <= expected / 10.0, "{what}: {rate:.1} a second, not {expected}");
}

#[test]
fn clients_have_their_rates_and_share_an_exports_by_their_weights() {
    let clients: HashMap<_, _> =
        ["few", "bytes", "light", "heavy"].into_iter().map(|name| (name, Client::new())).collect();
    let entries = |few: u32| {
        let rest = [
            ("few", format!("exports = {{ data = {{ access = 'rw', iops = {few}, burst = 0.5 }} }}")),
            (
                "bytes",
                "exports = { data = 'rw', logs = 'rw' }\nlimits = { bandwidth = '2M', burst = 0.5 }"
                    .to_owned(),
            ),
            ("light", "exports = { other = 'rw' }".to_owned()),
            ("heavy", "exports = { other = { access = 'rw', weight = 3 } }".to_owned()),
        ];
        rest.iter().map(|(name, rest)| clients[name].entry(name, rest)).collect::<String>()
    };
    let exports = "[export.data]\npath = 'DIRECTORY/data'\naccess = 'rw'\n\
                   [export.logs]\npath = 'DIRECTORY/logs'\naccess = 'rw'\n\
                   [export.other]\npath = 'DIRECTORY/other'\naccess = 'rw'\niops = 400\nburst = 0.5\n";
    let (mut site, _) = Site::configured(&entries(200), exports);
    for name in ["data", "logs", "other"] {
        fs::write(site.path(name).join("file"), vec![0; 64 << 10]).expect("a file");
    }
    let sessions: HashMap<_, _> =
        clients.iter().map(|(name, client)| (*name, client.connect(&site).expect("a session"))).collect();
    let busy = HashMap::from([
        ("few", Busy::start(&sessions["few"], "/data/file", 2, 16, 4096, true)),
        ("bytes", Busy::start(&sessions["bytes"], "/data/file", 1, 4, 16 << 10, true)),
        ("more_bytes", Busy::start(&sessions["bytes"], "/logs/file", 1, 4, 16 << 10, false)),
        ("light", Busy::start(&sessions["light"], "/other/file", 2, 32, 4096, false)),
        // Its queue must never be empty, because an unused share is lost. Writes may wait for a journal.
        ("heavy", Busy::start(&sessions["heavy"], "/other/file", 1, 32, 4096, false)),
    ]);
    // The bursts.
    std::thread::sleep(Duration::from_secs(1));
    let rates = per_second(&busy);
    assert_within_a_tenth(rates["few"], 200.0, "few");
    assert_within_a_tenth(rates["bytes"] + rates["more_bytes"], 128.0, "bytes, on two exports");
    assert_within_a_tenth(rates["light"] + rates["heavy"], 400.0, "all on other");
    assert_within_a_tenth(rates["light"], 100.0, "light");
    assert_within_a_tenth(rates["heavy"], 300.0, "heavy");
    let statistics = site.server.statistics();
    let (waits, exports) = (&statistics["waits"], &statistics["exports"]);
    for counter in [&waits["client_rate"], &waits["export_rate"], &exports["other"]["throttled"]] {
        assert!(counter.as_u64().expect("a number") > 100, "{statistics}");
    }
    assert!(exports["other"]["throttled_us"].as_u64().expect("a number") > 1_000_000, "{statistics}");

    site.set_clients(&entries(600));
    std::thread::sleep(Duration::from_secs(1));
    assert_within_a_tenth(per_second(&busy)["few"], 600.0, "few, which may have more now");
    drop((busy, sessions));
    site.server.statistics_when(is_at_rest);
}

#[test]
fn requests_that_wait_for_a_rate_can_be_cancelled_and_end_with_their_client_or_their_server() {
    let client = Client::new();
    let entry = client.entry("one", "exports = { data = { access = 'rw', iops = 1 } }");
    let (mut site, _) = Site::configured(&entry, "[export.data]\npath = 'DIRECTORY/data'\naccess = 'rw'\n");
    fs::write(site.path("data/file"), vec![0; 4096]).expect("a file");
    let session = client.connect(&site).expect("a session");
    let mut context = session.context(16).expect("a context");
    let file = session.open("/data/file", libc::O_RDWR, 0).expect("a file");
    let tickets: Vec<_> = (0..16)
        .map(|n| {
            let buffers = Buffers::One(Buffer::Owned(vec![0; 4096].into()));
            context.submit(&file, Operation::Read { offset: 0, buffers }, n).expect("there is room")
        })
        .collect();
    context.flush();
    site.server.statistics_when(|statistics| statistics["waits"]["client_rate"].as_u64() > Some(10));
    for ticket in &tickets[4..12] {
        let completion = context.cancel(*ticket).expect("it can be cancelled");
        let error = completion.result.expect_err("it was not begun");
        assert_eq!(error.errno(), libc::ECANCELED, "{error}");
    }
    // The last ones wait on, and end with the session.
    drop((context, file, session));
    site.server.statistics_when(is_at_rest);

    let session = client.connect(&site).expect("a session");
    let file = session.open("/data/file", libc::O_RDWR, 0).expect("a file");
    let _busy = (0..2)
        .map(|_| {
            let mut context = session.context(32).expect("a context");
            (0..32).for_each(|_| begin(&mut context, &file, 4096, false));
            context.flush();
            context
        })
        .collect::<Vec<_>>();
    site.server.statistics_when(|statistics| statistics["waits"]["client_rate"].as_u64() > Some(40));
    site.server.signal(Signal::TERM);
    assert!(site.server.wait().success(), "all was answered");
}

#[test]
fn the_requests_of_all_sessions_of_a_client_are_limited_together() {
    let client = Client::new();
    // All but the first wait.
    let entry = client.entry("one", "exports = { data = 'ro' }\nlimits = { requests = 3, iops = 1 }");
    let (mut site, _) = Site::configured(&entry, "[export.data]\npath = 'DIRECTORY/data'\n");
    fs::write(site.path("data/file"), vec![0; 4096]).expect("a file");
    let sessions = [(); 2].map(|()| client.connect(&site).expect("a session"));
    let mut contexts = sessions.each_ref().map(|session| session.context(8).expect("a context"));
    let files = sessions.each_ref().map(|session| session.open("/data/file", libc::O_RDONLY, 0));
    let files = files.map(|file| file.expect("a file"));
    for (context, file) in contexts.iter_mut().zip(&files) {
        (0..4).for_each(|_| begin(context, file, 4096, false));
        context.flush();
    }
    let statistics = site.server.statistics_when(|it| it["rejected"]["client_requests"].as_u64() > Some(2));
    assert!(statistics["in_flight"]["need_slot"].as_u64() <= Some(3), "{statistics}");
    drop((contexts, files, sessions));
    site.server.statistics_when(is_at_rest);
}

#[test]
#[ignore = "long"] // three quarters of a minute
fn a_write_that_waits_for_its_rate_for_long_is_carried_out_over_the_same_connection() {
    let client = Client::new();
    let entry = client.entry("one", "exports = { data = { access = 'rw', bandwidth = '64k' } }");
    let (mut site, _) = Site::configured(&entry, "[export.data]\npath = 'DIRECTORY/data'\naccess = 'rw'\n");
    fs::write(site.path("data/file"), b"").expect("a file");
    let session = client.connect(&site).expect("a session");
    let mut context = session.context(4).expect("a context");
    let file = session.open("/data/file", libc::O_RDWR, 0).expect("a file");
    const BYTES: usize = 1 << 20;
    for block in 0..4 {
        let buffers = Buffers::One(Buffer::Owned(vec![b'a' + block; BYTES].into()));
        let offset = u64::from(block) * BYTES as u64;
        context.submit(&file, Operation::Write { offset, buffers }, block.into()).expect("there is room");
    }
    let began = Instant::now();
    for block in 0..4 {
        while context.next().map(|completion| completion.result.expect("it is carried out")).is_none() {
            context.wait(1, 1, Some(Duration::from_secs(1))).expect("it is connected");
        }
        let waited = began.elapsed().as_secs();
        assert!(waited + 1 >= 16 * block && waited < 16 * block + PATIENCE.as_secs(), "{block}: {waited} s");
    }
    let written = fs::read(site.path("data/file")).expect("the file");
    assert!(
        written.chunks(BYTES).zip(b'a'..).all(|(block, letter)| block.iter().all(|&byte| byte == letter))
    );
    assert_eq!(written.len(), 4 * BYTES);
    drop((context, file, session));
    let statistics = site.server.statistics_when(is_at_rest);
    assert_eq!(statistics["channels"]["broken"], 0, "{statistics}");
}

#[test]
fn without_keys_the_clients_of_an_address_share_what_an_export_has() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("raio.toml");
    fs::write(&path, "[export.zeros]\nnull = '1M'\niops = 100\nburst = 0.5\n").expect("a file");
    let mut command = std::process::Command::new(binary("raio_server"));
    command.args(["--listen", "tcp://127.0.0.1:0", "--config"]).arg(path);
    let server = Server::spawn(command);
    let sessions = [(); 2].map(|()| Session::connect(&server.url(), &Options::default()).expect("a session"));
    let [first, second] = &sessions;
    let busy = HashMap::from([
        ("first", Busy::start(first, "/zeros", 1, 4, 4096, false)),
        ("second", Busy::start(second, "/zeros", 1, 4, 4096, true)),
    ]);
    std::thread::sleep(Duration::from_secs(1));
    let rates = per_second(&busy);
    assert_within_a_tenth(rates["first"] + rates["second"], 100.0, "both");
}

fn write_at(context: &mut Context, file: &File, offset: u64, bytes: usize) -> Result<u64, i32> {
    let buffers = Buffers::One(Buffer::Owned(vec![b'x'; bytes].into()));
    let completion = carry_out(context, file, Operation::Write { offset, buffers }).expect("it is begun");
    completion.result.map_err(|error| error.errno())
}

#[test]
fn clients_store_no_more_than_they_may_and_what_is_emptied_can_be_stored_again() {
    let (one, other) = (Client::new(), Client::new());
    let limit = |stored: &str| {
        one.entry(
            "one",
            &format!("exports = {{ data = {{ access = 'rw', path = 'one', stored = '{stored}' }} }}"),
        ) + &other.entry("two", "exports = { data = 'rw' }")
    };
    let data = "[export.data]\npath = 'DIRECTORY/data'\naccess = 'rw'\n";
    let (site, log) = Site::configured(&limit("100k"), data);
    // It is counted when it is there.
    await_log(&log, "cannot be counted");
    fs::create_dir_all(site.path("data/one/deep")).expect("a directory");
    fs::write(site.path("data/one/deep/old"), vec![0; 40 << 10]).expect("a file");
    drop(site.server);
    let mut site = Site { server: Site::start_configured(&site.directory), directory: site.directory };
    await_log(&log, "1 files have 40960 bytes");

    let session = one.connect(&site).expect("a session");
    let mut context = session.context(4).expect("a context");
    let create = |name: &str, flags| session.open(name, libc::O_RDWR | libc::O_CREAT | flags, 0o644);
    let file = create("/data/one/new", 0).expect("a file");
    assert_eq!(write_at(&mut context, &file, 0, 50 << 10), Ok(50 << 10));
    assert_eq!(write_at(&mut context, &file, 0, 50 << 10), Ok(50 << 10));
    let second = create("/data/one/second", 0).expect("a file");
    assert_eq!(write_at(&mut context, &second, 0, 11 << 10), Err(libc::EDQUOT));
    assert_eq!(write_at(&mut context, &second, 0, 10 << 10), Ok(10 << 10));
    assert_eq!(write_at(&mut context, &file, 50 << 10, 1), Err(libc::EDQUOT));
    // Holes count.
    assert_eq!(write_at(&mut context, &file, 1 << 40, 1), Err(libc::EDQUOT));
    for operation in [
        Operation::Allocate { offset: 0, length: 1 << 20, keep_size: true },
        Operation::WriteZeroes { offset: 50 << 10, length: 4096 },
    ] {
        let result = carry_out(&mut context, &file, operation).expect("it is begun").result;
        let error = result.expect_err("there is no room");
        assert_eq!(error.errno(), libc::EDQUOT, "{error}");
    }
    drop(create("/data/one/deep/old", libc::O_TRUNC).expect("it is emptied"));
    assert_eq!(write_at(&mut context, &file, 50 << 10, 40 << 10), Ok(40 << 10));
    assert_eq!(write_at(&mut context, &file, 90 << 10, 1), Err(libc::EDQUOT));

    // Another client has the rest of the export, and a higher limit counts for what is opened then.
    let all = other.connect(&site).expect("a session");
    let free = all.open("/data/file", libc::O_RDWR | libc::O_CREAT, 0o644).expect("a file");
    let mut its = all.context(1).expect("a context");
    assert_eq!(write_at(&mut its, &free, 0, 200 << 10), Ok(200 << 10));
    site.set_clients(&limit("101k"));
    await_log(&log, "Read clients.toml again");
    let again = create("/data/one/new", 0).expect("a file");
    assert_eq!(write_at(&mut context, &again, 90 << 10, 1 << 10), Ok(1 << 10));
    drop((context, file, second, again, free, its, session, all));
    site.server.statistics_when(is_at_rest);
}
