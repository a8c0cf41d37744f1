//! A new configuration while the server runs.

use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use raio_transport::handshake::Offer;
use raio_transport::protocol::OPEN_READ;
use rustix::process::Signal;

use crate::common::{Client, NEW, RW, Server, TIMEOUT, Variant, each, until};
use crate::random::Random;

/// A server with a configuration file, beside directories `a`, `b` and `c`. Each has a file `who` that has
/// its name.
struct Run {
    server: Server,
    config: PathBuf,
}

/// What ends the lines of the log about a reload.
const ENDS: [&str; 3] = ["is applied", "Nothing has changed", "is not applied"];

impl Run {
    fn start(variant: Variant, arguments: &[&str], config: impl Fn(&Path) -> String) -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        for name in ["a", "b", "c"] {
            std::fs::create_dir_all(directory.path().join("exports").join(name)).unwrap();
            std::fs::write(directory.path().join("exports").join(name).join("who"), name).unwrap();
        }
        std::fs::create_dir(directory.path().join("etc")).unwrap();
        let path = directory.path().join("etc/raio.toml");
        std::fs::write(&path, config(&directory.path().join("exports"))).unwrap();
        let mut process = Process::new(env!("CARGO_BIN_EXE_raio_server"));
        process.args(["--listen", "tcp://127.0.0.1:0", "--workers", "2", "--config"]).arg(&path);
        if variant == Variant::Threads {
            process.args(["--backend", "threads"]);
        }
        process.args(arguments);
        Self { server: Server::spawn(process, directory), config: path }
    }

    fn exports(&self) -> PathBuf {
        self.server.directory.path().join("exports")
    }

    /// Has the server read another file. Returns what it says of it.
    fn reload(&self, config: &str) -> String {
        // As editors do it.
        let new = self.config.with_extension("new");
        std::fs::write(&new, config).unwrap();
        std::fs::rename(&new, &self.config).unwrap();
        self.hang_up()
    }

    fn hang_up(&self) -> String {
        let before = self.server.log().len();
        self.server.signal(Signal::HUP);
        let said = || self.server.log()[before..].to_owned();
        until(said, || ENDS.iter().any(|end| said().contains(end)));
        said()
    }

    fn applies(&self, config: &str) -> String {
        let said = self.reload(config);
        assert!(!said.contains("is not applied"), "{said}");
        said
    }

    fn rejects(&self, config: &str, needle: &str) {
        let said = self.reload(config);
        assert!(said.contains("is not applied") && said.contains(needle), "{needle}: {said}");
    }
}

fn export(name: &str, path: &Path, access: &str) -> String {
    format!("[export.{name}]\npath = '{}'\naccess = '{access}'\n", path.display())
}

#[test]
fn exports_come_change_and_go_while_clients_use_others() {
    each(|variant| {
        let all = |root: &Path, more: &str| {
            format!("exports-beneath = ['{}']\n{}{more}", root.display(), export("a", &root.join("a"), "rw"))
        };
        let run = Run::start(variant, &[], |root| all(root, ""));
        let (root, stop) = (run.exports(), AtomicBool::new(false));
        let b = |access: &str| export("b", &root.join("b"), access);
        std::thread::scope(|scope| {
            for n in 0..3 {
                let (address, stop) = (run.server.address, &stop);
                scope.spawn(move || {
                    let mut client = Client::connect(address, &Offer::new("writer"));
                    let file = client.open(&format!("/a/{n}"), NEW).unwrap();
                    let mut count = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        client.write(file, 0, &count.to_le_bytes()).unwrap();
                        assert_eq!(client.read(file, 0, 8).unwrap(), count.to_le_bytes());
                        count += 1;
                    }
                    assert!(count > 0);
                });
            }
            let mut client = run.server.client();
            assert_eq!(client.open("/b/who", OPEN_READ), Err(libc::ENOENT));
            let fds = |file: &str| {
                let fds = Path::new("/proc").join(run.server.child.id().to_string()).join("fd");
                let links = fds.read_dir().unwrap().flatten().flat_map(|fd| std::fs::read_link(fd.path()));
                links.filter(|link| link.starts_with(root.join(file))).count()
            };
            let said = run.applies(&all(&root, &b("rw")));
            assert!(said.contains("Export b was added"), "{said}");
            let file = client.open("/b/new", NEW).unwrap();
            client.write(file, 0, b"new").unwrap();

            // It may do less: files are closed before the server says so.
            let said = run.applies(&all(&root, &b("ro")));
            assert!(said.contains("Export b was changed"), "{said}");
            assert_eq!(fds("b"), 0);
            assert_eq!(client.write(file, 0, b"no"), Err(libc::ESTALE));
            assert_eq!(client.read(file, 0, 3), Err(libc::ESTALE));
            assert_eq!(client.fsync(file, false), Err(libc::ESTALE));
            assert_eq!(client.open("/b/new", RW), Err(libc::EROFS));
            let again = client.open("/b/new", OPEN_READ).unwrap();
            assert_ne!(again, file, "the old handle is not another file's");
            assert_eq!(client.read(again, 0, 9).unwrap(), b"new");
            client.close(file).unwrap();

            // It may do more: files stay open.
            run.applies(&all(&root, &b("rw")));
            assert_eq!(client.read(again, 0, 9).unwrap(), b"new");
            assert!(client.open("/b/new", RW).is_ok());

            // It lies elsewhere.
            run.applies(&all(&root, &export("b", &root.join("c"), "ro")));
            assert_eq!(fds("b"), 0);
            assert_eq!(client.read(again, 0, 9), Err(libc::ESTALE));
            let who = client.open("/b/who", OPEN_READ).unwrap();
            assert_eq!(client.read(who, 0, 9).unwrap(), b"c");

            let said = run.applies(&all(&root, "[export.m]\nmemory = '1M'\naccess = 'rw'\n"));
            assert!(said.contains("Export b was removed") && said.contains("Export m was added"), "{said}");
            assert_eq!((fds("b"), fds("c")), (0, 0));
            assert_eq!(client.read(who, 0, 9), Err(libc::ESTALE));
            assert_eq!(client.open("/b/who", OPEN_READ), Err(libc::ENOENT));
            let memory = client.open("/m", RW).unwrap();
            client.write(memory, 5, b"kept").unwrap();
            // What is in memory stays there.
            run.applies(&all(&root, "[export.m]\nmemory = '1M'\naccess = 'rw'\niops = 1000\n"));
            assert_eq!(client.read(memory, 5, 4).unwrap(), b"kept");
            stop.store(true, Ordering::Relaxed);
        });
    });
}

#[test]
fn a_configuration_with_a_mistake_is_not_applied_at_all() {
    let text = |root: &Path| export("a", &root.join("a"), "rw");
    let run = Run::start(Variant::Uring, &["--sandbox=off", "--queue-depth", "64"], text);
    let (root, file) = (run.exports(), run.config.display().to_string());
    let two = text(&root) + &export("b", &root.join("b"), "rw");
    for (more, needle) in [
        ("share = 1\n".to_owned(), format!("{file}:7:1: ")),
        (export("c", Path::new("/no/such"), "rw"), "/no/such".to_owned()),
        (export("c", Path::new("/proc"), "rw"), "of a type that is not served".to_owned()),
        (export("a", Path::new("/tmp"), "rw"), format!("{file}:7:")),
    ] {
        run.rejects(&format!("{two}{more}"), &needle);
    }
    for (key, place) in [
        ("workers = 3", "workers"),
        ("memory = '900M'", "memory"),
        ("io-max = '2M'", "io-max"),
        ("backend = 'threads'", "backend"),
        ("state = '/tmp/x'", "state"),
        ("keys = '/tmp/x'", "keys"),
        ("exports-beneath = ['/srv']", "exports-beneath"),
        ("trace = '/tmp/x'", "trace"),
        ("strict = true", "strict"),
    ] {
        let needle = match place {
            // The command line has it.
            "workers" => "to no effect".to_owned(),
            _ => format!("{file}:1:1: {place} can only be changed by a restart"),
        };
        let said = run.reload(&format!("{key}\n{}", text(&root)));
        assert!(said.contains(&needle), "{key}: {said}");
    }
    run.rejects(
        &format!("[export.a]\npath = '{}'\n[limits-per-session]\nrequests = 5\n", root.display()),
        "does not count requests",
    );
    let mut client = run.server.client();
    assert_eq!(client.open("/b/who", OPEN_READ), Err(libc::ENOENT));
    assert!(client.open("/a/who", RW).is_ok());
    // Afterwards everything is as ever.
    run.applies(&two);
    assert!(client.open("/b/who", RW).is_ok());
    std::fs::remove_file(&run.config).unwrap();
    assert!(run.hang_up().contains("Cannot read the file"));
}

#[test]
fn limits_and_the_log_level_change() {
    let text = |more: &str, root: &Path| format!("{more}\n{}", export("a", &root.join("a"), "rw"));
    let run = Run::start(Variant::Uring, &["--sandbox=off"], |root| text("", root));
    let root = run.exports();
    let mut first = run.server.client();
    let file = first.open("/a/1", NEW).unwrap();
    let said = run.applies(&text(
        "max-sessions = 1\nlinger = 5\nspin-us = 10\nstall-timeout = 3\nlog = 'debug'",
        &root,
    ));
    for change in ["max-sessions is 1", "linger is 5", "spin-us is 10", "stall-timeout is 3", "log is debug"]
    {
        assert!(said.contains(change), "{change}: {said}");
    }
    first.write(file, 0, b"x").unwrap();
    first.close(file).unwrap();
    first.open("/a/1", NEW).unwrap();
    run.server.log_until("A client opens");
    run.applies(&text("limits-per-session = { files = 2 }\nlog = 'info'", &root));
    first.open("/a/2", NEW).unwrap();
    assert_eq!(first.open("/a/3", NEW), Err(libc::EMFILE));
    let before = run.server.log().matches("A client opens").count();
    run.applies(&text("", &root));
    first.open("/a/3", NEW).unwrap();
    assert_eq!(run.server.log().matches("A client opens").count(), before);
}

#[test]
fn in_its_sandbox_a_server_gets_exports_only_where_that_was_foreseen() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIPPED: the sandbox, because only root could look into the server then");
    }
    let text = |more: &str, root: &Path| {
        format!("exports-beneath = ['{}']\n{more}", root.join("a").display())
            + &export("b", &root.join("b"), "ro")
    };
    let run = Run::start(Variant::Uring, &[], |root| text("", root));
    let root = run.exports();
    if run.server.log().contains("there is no Landlock") {
        return eprintln!("SKIPPED: there is no Landlock here");
    }
    std::fs::create_dir(root.join("a/deep")).unwrap();
    run.rejects(&(text("", &root) + &export("c", &root.join("c"), "ro")), "exports-beneath");
    // That of the start was granted for reading.
    run.rejects(&text("", &root).replace("'ro'", "'rw'"), "exports-beneath");
    run.applies(&(text("", &root) + &export("d", &root.join("a/deep"), "rw") + "[export.n]\nnull = '1M'\n"));
    let mut client = run.server.client();
    let file = client.open("/d/f", NEW).unwrap();
    client.write(file, 0, b"x").unwrap();
    assert!(client.open("/n", RW).is_ok());
}

#[test]
fn what_another_server_writes_to_is_not_added() {
    let state = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let arguments = ["--sandbox=off", "--state", state.path().to_str().unwrap()];
    let one = Run::start(Variant::Uring, &arguments, |root| export("a", &root.join("a"), "ro"));
    let root = one.exports();
    let other = Run::start(Variant::Uring, &arguments, |_| export("a", &root.join("a"), "rw"));
    let both = export("b", &root.join("b"), "rw") + &export("a", &root.join("a"), "rw");
    one.rejects(&both, "overlaps");
    // What is its own does not stand in its way.
    one.applies(&(export("a", &root.join("a"), "ro") + &export("b", &root.join("b"), "rw")));
    let inner = export("c", &root.join("b/../b"), "rw");
    one.applies(&(export("a", &root.join("a"), "ro") + &export("b", &root.join("b"), "rw") + &inner));
    let mut client = one.server.client();
    let file = client.open("/b/f", NEW).unwrap();
    client.write(file, 0, b"x").unwrap();
    other.rejects(&(export("a", &root.join("a"), "rw") + &export("b", &root.join("b"), "rw")), "overlaps");
    // The first one gives it up.
    one.applies(&export("a", &root.join("a"), "ro"));
    let said = || other.reload(&(export("a", &root.join("a"), "rw") + &export("b", &root.join("b"), "rw")));
    // A worker may take a moment to let it go.
    until(said, || !said().contains("is not applied"));
    let mut client = other.server.client();
    assert!(client.open("/b/f", RW).is_ok());
}

#[test]
fn a_file_system_can_be_unmounted_once_its_export_is_removed() {
    let text = |root: &Path| export("a", &root.join("a"), "rw");
    let run = Run::start(Variant::Uring, &["--sandbox=off"], text);
    let root = run.exports();
    let mount = |program: &str, arguments: &[&str]| {
        let at = root.join("b");
        let mut process = Process::new(program);
        process.args(arguments).arg(at).stderr(Stdio::null());
        process.status().is_ok_and(|status| status.success())
    };
    if !mount("mount", &["-t", "tmpfs", "-o", "size=64m", "raio-test"]) {
        return eprintln!("SKIPPED: nothing can be mounted here");
    }
    run.applies(&(text(&root) + &export("b", &root.join("b"), "rw")));
    let (stop, begun) = (AtomicBool::new(false), [const { AtomicBool::new(false) }; 4]);
    std::thread::scope(|scope| {
        for (n, begun) in begun.iter().enumerate() {
            let (address, stop) = (run.server.address, &stop);
            scope.spawn(move || {
                let mut client = Client::connect(address, &Offer::new("writer"));
                let file = client.open(&format!("/b/{n}"), NEW).unwrap();
                let data = vec![n as u8; 300_000];
                while !stop.load(Ordering::Relaxed) {
                    // Several at a time, of which some wait.
                    let tags: Vec<_> =
                        (0..8).map(|at| client.send_write(file, at * 300_000, &data)).collect();
                    let replies: Vec<_> = tags.into_iter().map(|tag| client.wait(tag)).collect();
                    begun.store(true, Ordering::Relaxed);
                    if replies.iter().any(|reply| !reply.status.is_ok()) {
                        let errno = replies.iter().map(|reply| reply.status.errno).max();
                        assert_eq!(errno, Some(libc::ESTALE));
                        return;
                    }
                }
            });
        }
        until(|| "no client writes".to_owned(), || begun.iter().all(|begun| begun.load(Ordering::Relaxed)));
        run.applies(&text(&root));
        let is_unmounted = mount("umount", &[]);
        stop.store(true, Ordering::Relaxed);
        if !is_unmounted {
            mount("umount", &["-l"]);
        }
        assert!(is_unmounted, "something of it is still open");
    });
}

#[test]
fn requests_that_wait_on_an_export_that_goes_are_answered() {
    let text = |rates: &str, root: &Path| format!("{}{rates}", export("a", &root.join("a"), "rw"));
    let run = Run::start(Variant::Uring, &["--sandbox=off"], |root| text("iops = 1\n", root));
    let mut client = run.server.client();
    let file = client.open("/a/f", NEW).unwrap();
    // Most of these wait for the rate.
    let tags: Vec<_> = (0..20).map(|at| client.send_write(file, at, b"x")).collect();
    let began = Instant::now();
    run.applies("[export.n]\nnull = '1M'\n");
    let ended: Vec<_> = tags.into_iter().map(|tag| client.wait(tag).status.errno).collect();
    assert!(ended.iter().filter(|&&errno| errno == libc::ESTALE).count() >= 10, "{ended:?}");
    assert!(ended.iter().all(|errno| [0, libc::ESTALE].contains(errno)), "{ended:?}");
    assert!(began.elapsed() < TIMEOUT);
    client.close(file).unwrap();
}

#[test]
fn whatever_the_file_says_is_what_is_served() {
    let run = Run::start(Variant::Uring, &["--sandbox=off"], |_| "[export.n]\nnull = '1M'\n".to_owned());
    let (root, mut random) = (run.exports(), Random::new());
    let mut served: Vec<(String, String, &str)> = Vec::new();
    let mut held = Vec::new();
    let mut client = run.server.client();
    for _ in 0..40 {
        let mut text = "[export.n]\nnull = '1M'\n".to_owned();
        let mut wanted = Vec::new();
        for name in ["x", "y", "z"] {
            if random.below(3) == 0 {
                continue;
            }
            let at = ["a", "b", "c"][random.index(3)];
            let access = ["ro", "rw"][random.index(2)];
            text += &export(name, &root.join(at), access);
            wanted.push((name.to_owned(), at.to_owned(), access));
        }
        let is_wrong = random.below(4) == 0;
        if is_wrong {
            text += ["[export.w]\npath = '/no/such'\n", "workers = [\n", "[export.w]\n"][random.index(3)];
        }
        let said = run.reload(&text);
        assert_eq!(said.contains("is not applied"), is_wrong, "{text}\n{said}");
        if !is_wrong {
            served = wanted;
        }
        for name in ["x", "y", "z"] {
            let expected = served.iter().find(|(served, ..)| served == name);
            let path = format!("/{name}/who");
            let Some((_, at, access)) = expected else {
                assert_eq!(client.open(&path, OPEN_READ), Err(libc::ENOENT), "{text}");
                continue;
            };
            let file = client.open(&path, OPEN_READ).unwrap();
            assert_eq!(client.read(file, 0, 9).unwrap(), at.as_bytes(), "{text}");
            let for_writing = client.open(&path, RW);
            assert_eq!(for_writing.is_ok(), *access == "rw", "{text}");
            held.push((name, at.clone(), *access, file));
            for_writing.iter().for_each(|&file| held.push((name, at.clone(), "rw", file)));
        }
        // A file that was opened under another configuration can be read only where that is still served.
        for (name, at, opened_for, file) in &held {
            if let Ok(bytes) = client.read(*file, 0, 9) {
                let now = served.iter().find(|(served, ..)| served == name);
                assert_eq!(bytes, at.as_bytes());
                assert!(now.is_some_and(|(_, now, _)| now == at), "{name} {at} {opened_for}: {text}");
            }
        }
        held.drain(..).for_each(|(.., file)| _ = client.close(file).unwrap());
        let other = Client::connect(run.server.address, &Offer::new("other"));
        drop(other);
    }
}

#[test]
fn who_may_connect_changes_together_with_the_exports_or_not_at_all() {
    let text = |root: &Path| export("a", &root.join("a"), "rw");
    let keys = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let clients = keys.path().join("clients.toml");
    std::fs::write(&clients, "").unwrap();
    let arguments = ["--sandbox=off", "--keys", keys.path().to_str().unwrap()];
    let run = Run::start(Variant::Uring, &arguments, text);
    let two = text(&run.exports()) + &export("b", &run.exports().join("b"), "rw");
    std::fs::write(&clients, "[client.x]\nkye = 1\n").unwrap();
    run.rejects(&two, "clients.toml:2:");
    // What is right in one file does not count while the other one is wrong.
    std::fs::write(&clients, "[client.x]\nusers = [4000000]\nexports = { b = 'rw' }\n").unwrap();
    run.rejects(&format!("{two}[export.c]\npath = '/no/such'\n"), "/no/such");
    let said = run.applies(&two);
    assert!(said.contains("Export b was added") && said.contains("1 clients may connect"), "{said}");
    assert!(!said.contains("an export that there is not"), "{said}");
    let said = run.applies(&text(&run.exports()));
    let unknown = "clients.toml names an export that there is not";
    assert!(said.contains(unknown) && said.contains("export=b"), "{said}");
}
