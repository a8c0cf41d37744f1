//! A server that takes only clients with keys: who may connect, what each may open, and how that changes.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Context, Error, File, Keys, Operation, Options, Session};
use raio_e2e::{
    Client, FuseCall, FuseFs, FuseOptions, PATIENCE, Server, Site, await_log, binary, carry_out, is_at_rest,
    needs_root, needs_wire,
};
use raio_transport::handshake::{ChannelOffer, Offer};
use raio_transport::keys::{PublicKey, SecretKey};
use raio_transport::message::SessionId;
use raio_transport::tcp::TcpClient;
use raio_transport::tls::ClientTls;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
use rustix::process::Signal;
use tempfile::TempDir;

fn errno<T>(result: Result<T, Error>) -> i32 {
    result.map(drop).expect_err("it is not allowed").errno()
}

fn open(session: &Session, path: &str, flags: i32) -> Result<File, Error> {
    session.open(path, flags, 0o644)
}

/// Writes ten bytes, and says how that ended.
fn write(context: &mut Context, file: &File) -> Result<u64, Error> {
    let buffers = Buffers::One(Buffer::Owned(b"abcdefghij".to_vec().into()));
    carry_out(context, file, Operation::Write { offset: 0, buffers })?.result
}

#[test]
fn each_client_has_the_exports_of_its_entry_and_no_others() {
    let (one, other) = (Client::new(), Client::new());
    let clients =
        one.entry("one", "exports = { data = 'rw', logs = 'ro' }") + &other.entry("two", "exports = {}");
    let site = Site::new(&clients);
    let session = one.connect(&site).expect("it has a key");
    let file = open(&session, "/data/file", libc::O_RDWR).expect("it may write");
    let mut context = session.context(4).expect("a context");
    assert_eq!(write(&mut context, &file).expect("it may write"), 10);
    assert_eq!(fs::read(site.path("data/file")).expect("the file"), b"abcdefghij");
    assert!(open(&session, "/logs/file", libc::O_RDONLY).is_ok());
    for flags in
        [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_CREAT, libc::O_WRONLY | libc::O_TRUNC]
    {
        assert_eq!(errno(open(&session, "/logs/file", flags)), libc::EROFS);
    }
    // As if there were none of that name.
    let hidden = open(&session, "/other/file", libc::O_RDONLY).expect_err("it is not there");
    let none = open(&session, "/there-is-none/file", libc::O_RDONLY).expect_err("it is not there");
    assert_eq!(hidden.errno(), libc::ENOENT);
    assert_eq!(hidden.to_string(), none.to_string().replace("there-is-none", "other"));
    let session = other.connect(&site).expect("it has a key");
    assert_eq!(errno(open(&session, "/data/file", libc::O_RDONLY)), libc::ENOENT);
}

/// What a client hears of a path that is not there.
fn not_there(session: &Session, path: &str, flags: i32) -> String {
    let error = open(session, path, flags).map(drop).expect_err("it is not there");
    assert_eq!(error.errno(), libc::ENOENT, "{path} with {flags:#x}: {error}");
    error.to_string()
}

const ONE_DIRECTORY: &str = "exports = { data = { access = 'rw', path = 'db1/files' } }";

#[test]
fn a_client_with_a_path_opens_what_is_beneath_it_by_the_usual_names_and_hears_of_nothing_else() {
    let client = Client::new();
    let site = Site::new(&client.entry("one", ONE_DIRECTORY));
    let inside = site.path("data/db1/files");
    fs::create_dir_all(inside.join("sub")).expect("a directory");
    fs::write(inside.join("x"), b"0123456789").expect("a file");
    fs::write(site.path("data/db1/secret"), b"secret").expect("a file");
    let absolute = site.path("data/db1/secret").display().to_string();
    for (link, target) in [
        ("in", "sub/../x"),
        ("up", ".."),
        ("out-there", "../secret"),
        ("out-none", "../secre2"),
        ("far-there", "sub/../../../file"),
        ("far-none", "sub/../../../fil2"),
        ("absolute-there", &absolute),
        ("absolute-none", "/there/is/none"),
    ] {
        symlink(target, inside.join(link)).expect("a link");
    }
    let session = client.connect(&site).expect("it has a key");
    let mut context = session.context(4).expect("a context");
    for path in ["x", "in", "sub/../x"].map(|name| format!("/data/db1/files/{name}")) {
        let file = open(&session, &path, libc::O_RDWR).expect("it is there");
        assert_eq!(write(&mut context, &file).expect("it may write"), 10);
    }
    open(&session, "/data//db1/./files//new", libc::O_RDWR | libc::O_CREAT).expect("it may create");
    assert!(inside.join("new").exists());
    assert_eq!(errno(open(&session, "/data/db1/files", libc::O_RDONLY)), libc::EISDIR);

    // Outside it makes no difference whether there is something.
    let missing = not_there(&session, "/data/db1/files/none", libc::O_RDONLY);
    let (create, truncate) = (libc::O_WRONLY | libc::O_CREAT, libc::O_WRONLY | libc::O_TRUNC);
    let all = [libc::O_RDONLY, libc::O_RDWR, create, truncate];
    for (there, none) in [
        ("file", "fil2"),
        ("db1", "db2"),
        ("db1/secret", "db1/secre2"),
        ("../data/db1/files/x", "../dat2/db1/files/x"),
        ("db1/../db1/files/x", "db2/../db1/files/x"),
        ("db1/files/../secret", "db1/files/../secre2"),
        ("db1/files/../files/x", "db1/files/../file2/x"),
        ("db1/files/sub/../../../file", "db1/files/sub/../../../fil2"),
        ("db1/files/up/secret", "db1/files/up/secre2"),
    ] {
        for flags in [&all[..], &[create | libc::O_EXCL, libc::O_RDONLY | libc::O_NOFOLLOW]].concat() {
            for path in [there, none] {
                let heard = not_there(&session, &format!("/data/{path}"), flags);
                assert_eq!(heard, missing.replace("db1/files/none", path));
            }
        }
    }
    not_there(&session, "/data", libc::O_RDONLY);
    for link in ["out", "far", "absolute"] {
        for flags in all {
            for path in ["there", "none"].map(|kind| format!("db1/files/{link}-{kind}")) {
                let heard = not_there(&session, &format!("/data/{path}"), flags);
                assert_eq!(heard, missing.replace("db1/files/none", &path));
            }
        }
    }
    assert_eq!(fs::read(site.path("data/db1/secret")).expect("the file"), b"secret");
    assert_eq!(fs::read(site.path("data/file")).expect("the file"), b"0123456789");
    for new in ["fil2", "db2", "db1/secre2", "db1/file2"] {
        assert!(!site.path("data").join(new).exists(), "{new}");
    }
}

#[test]
fn renames_do_not_lead_a_client_with_a_path_out_of_it() {
    let client = Client::new();
    let site = Site::new(&client.entry("one", ONE_DIRECTORY));
    let inside = site.path("data/db1/files");
    fs::create_dir_all(inside.join("a/deep")).expect("a directory");
    fs::create_dir_all(site.path("data/outside/a/deep")).expect("a directory");
    for (directory, content) in [(inside.clone(), "inside"), (site.path("data/outside"), "not inside")] {
        for name in ["x", "a/x"] {
            fs::write(directory.join(name), content).expect("a file");
        }
    }
    symlink("../../outside/a", inside.join("b")).expect("a link");
    symlink("../outside", site.path("data/db1/link")).expect("a link");
    let session = client.connect(&site).expect("it has a key");
    let is_over = AtomicBool::new(false);
    // A directory and a link that leads out change places: beneath the path, and at it.
    for (one, other) in [("db1/files/a", "db1/files/b"), ("db1/files", "db1/link")] {
        let (one, other) = (site.path("data").join(one), site.path("data").join(other));
        is_over.store(false, Ordering::Relaxed);
        let (mut opened, mut rejected) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    for _there_and_back in 0..2 {
                        renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE).expect("both are there");
                    }
                }
            });
            let begin = Instant::now();
            let mut led_out = None;
            while begin.elapsed() < Duration::from_millis(500) && led_out.is_none() {
                for path in ["a/x", "a/deep/../x", "a/deep/../../x"] {
                    let path = format!("/data/db1/files/{path}");
                    match open(&session, &path, libc::O_RDONLY) {
                        Ok(file) => {
                            let size = file.status().expect("its status").size.get();
                            if size != 6 {
                                led_out = Some(format!("{path}: {size} bytes"));
                            }
                            opened += 1;
                        }
                        Err(error) if [libc::ENOENT, libc::EAGAIN].contains(&error.errno()) => rejected += 1,
                        Err(error) => led_out = Some(format!("{path}: {error}")),
                    }
                }
            }
            is_over.store(true, Ordering::Relaxed);
            assert_eq!(led_out, None);
        });
        assert!(opened > 0 && rejected > 0, "{opened} opened, {rejected} rejected");
    }
}

#[test]
fn files_are_opened_again_after_a_restart_where_the_client_still_has_their_directory() {
    for (path, goes_on) in [("db1/files", true), ("db1", true), ("db1/other", false)] {
        let client = Client::new();
        let mut site = Site::new(&client.entry("one", ONE_DIRECTORY));
        fs::create_dir_all(site.path("data/db1/files")).expect("a directory");
        fs::create_dir_all(site.path("data/db1/other")).expect("a directory");
        let session = client.connect(&site).expect("a session");
        let flags = libc::O_RDWR | libc::O_CREAT;
        let file = open(&session, "/data/db1/files/x", flags).expect("a file");
        let mut context = session.context(4).expect("a context");
        assert_eq!(write(&mut context, &file).expect("it may"), 10);
        let listen = site.server.listen_url();
        site.server.kill();
        let entry = client.entry("one", &ONE_DIRECTORY.replace("db1/files", path));
        fs::write(site.path("keys/clients.toml"), entry).expect("a file");
        site.server = Site::start(&site.directory, &listen);
        let written = write(&mut context, &file);
        assert_eq!(written.is_ok(), goes_on, "{path}: {written:?}");
    }
}

#[test]
fn a_path_that_becomes_narrower_ends_sessions_and_a_wider_one_does_not() {
    let client = Client::new();
    let entry = |path: &str| client.entry("one", &ONE_DIRECTORY.replace("db1/files", path));
    let site = Site::new(&entry("db1/files"));
    fs::create_dir_all(site.path("data/db1/files")).expect("a directory");
    fs::write(site.path("data/db1/y"), b"").expect("a file");
    let session = client.connect(&site).expect("a session");
    let flags = libc::O_RDWR | libc::O_CREAT;
    let file = open(&session, "/data/db1/files/x", flags).expect("a file");
    let mut context = session.context(4).expect("a context");
    site.set_clients(&entry("db1"));
    let deadline = Instant::now() + PATIENCE;
    let further = loop {
        match open(&session, "/data/db1/y", libc::O_RDWR) {
            Ok(file) => break file,
            Err(_) => assert!(Instant::now() < deadline, "the new right does not come"),
        }
    };
    for file in [&file, &further] {
        assert_eq!(write(&mut context, file).expect("it may"), 10);
    }
    site.set_clients(&entry("db1/files"));
    let begin = Instant::now();
    while write(&mut context, &further).is_ok() {
        assert!(begin.elapsed() < Duration::from_secs(1), "it goes on");
    }
    let session = client.connect(&site).expect("a session");
    not_there(&session, "/data/db1/y", libc::O_RDONLY);
}

#[test]
fn a_path_on_what_is_no_directory_is_an_error() {
    let client = Client::new();
    let directory = tempfile::tempdir().expect("a directory");
    let keys = directory.path().join("keys");
    fs::create_dir(&keys).expect("a directory");
    SecretKey::create(&keys.join("host.key")).expect("a key");
    for (export, code) in [("d", Some(2)), ("there-is-none", Some(0))] {
        let entry = client.entry("one", &format!("exports.{export} = {{ access = 'ro', path = 'a' }}"));
        fs::write(keys.join("clients.toml"), entry).expect("a file");
        let output = Command::new(binary("raio_server"))
            .args(["--check", "--sandbox=off", "--export", "d=mem:1M", "--keys"])
            .arg(&keys)
            .output()
            .expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), code, "{said}");
        assert_eq!(said.contains("clients.toml:3:37: export d is no directory"), code == Some(2), "{said}");
    }
}

/// Users that each Debian has: `nobody`, and `daemon` with its group.
const ORDINARY: u32 = 65534;
const DAEMON: u32 = 1;

/// A directory that is this user's.
fn directory_of(uid: u32) -> TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    chown(directory.path(), Some(uid), Some(uid)).expect("this is root");
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).expect("this is root");
    directory
}

/// The effective capabilities of each thread of a server.
fn capabilities(server: &Server) -> Vec<u64> {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).expect("it runs");
    let status = |task: fs::DirEntry| fs::read_to_string(task.path().join("status")).ok();
    let effective = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?.trim();
        u64::from_str_radix(line, 16).ok()
    };
    tasks.filter_map(|task| status(task.expect("a thread"))).filter_map(effective).collect()
}

#[test]
fn what_a_client_creates_belongs_to_its_owner_and_group_and_else_to_the_server() {
    if !needs_root("giving files to users") {
        return;
    }
    let [alice, group, plain] = [Client::new(), Client::new(), Client::new()];
    let exports = "exports = { data = 'rw' }";
    let clients = alice.entry("alice", &format!("{exports}\nowner = 'daemon'\ngroup = 7"))
        + &group.entry("group", &format!("{exports}\ngroup = 'daemon'"))
        + &plain.entry("plain", exports);
    for (arguments, server_user) in [
        (&["--user", "nobody"][..], ORDINARY),
        (&["--user", "nobody", "--sandbox=off"], ORDINARY),
        (&[], 0),
        (&["--sandbox=off"], 0),
    ] {
        let data = directory_of(server_user);
        let site = Site::open_to_users(&clients, data.path(), arguments, None);
        for (client, name, owner) in [
            (&alice, "a", (DAEMON, 7)),
            (&group, "g", (server_user, DAEMON)),
            (&plain, "p", (server_user, server_user)),
        ] {
            let session = client.connect(&site).expect("a session");
            let path = format!("/data/{name}");
            let file = open(&session, &path, libc::O_RDWR | libc::O_CREAT | libc::O_EXCL).expect("a file");
            let status = file.status().expect("its status");
            assert_eq!((status.uid.get(), status.gid.get()), owner, "{name} {arguments:?}");
            let mut context = session.context(4).expect("a context");
            assert_eq!(write(&mut context, &file).expect("it may write"), 10);
            // It is its own only once.
            open(&session, &path, libc::O_RDONLY | libc::O_CREAT).expect("it is there");
            let found = data.path().join(name).metadata().expect("the file");
            assert_eq!((found.uid(), found.gid()), owner);
        }
        let found = capabilities(&site.server);
        if arguments != ["--sandbox=off"] {
            assert!(found.len() > 3 && found.iter().all(|&effective| effective == 1), "CAP_CHOWN: {found:?}");
        }
    }
}

#[test]
fn a_file_that_cannot_be_given_to_its_owner_is_not_there_afterwards() {
    let options = FuseOptions::default();
    let Some(fuse) = FuseFs::mount("a file system without owners", options, &[("old", b"old")]) else {
        return;
    };
    let client = Client::new();
    let clients = client.entry("one", "exports = { data = 'rw' }\nowner = 'daemon'");
    let site = Site::open_to_users(&clients, fuse.path(), &[], None);
    let session = client.connect(&site).expect("a session");
    fuse.fail(FuseCall::Setattr, libc::EPERM);
    let error = open(&session, "/data/new", libc::O_RDWR | libc::O_CREAT).map(drop).expect_err("no owner");
    assert_eq!(error.errno(), libc::EPERM);
    let text = error.to_string();
    assert!(text.contains("user 1") && text.contains("clients.toml") && !text.contains("left"), "{text}");
    assert!(!fuse.file("new").exists());
    open(&session, "/data/old", libc::O_RDWR | libc::O_CREAT).expect("it is nobody's to give");
    fuse.mend(FuseCall::Setattr);
    open(&session, "/data/new", libc::O_RDWR | libc::O_CREAT).expect("now it can be given");
    assert!(fuse.file("new").exists());
}

#[test]
fn a_server_that_has_given_up_the_power_to_give_files_must_be_started_anew() {
    if !needs_root("giving files to users") {
        return;
    }
    let client = Client::new();
    let rights = "exports = { data = 'rw' }";
    let data = directory_of(ORDINARY);
    let log = data.path().join("log");
    let to_log = fs::File::create(&log).expect("a log");
    let clients = client.entry("one", rights);
    let arguments = ["--user", "nobody"];
    let mut site = Site::open_to_users(&clients, data.path(), &arguments, Some(to_log));
    assert!(capabilities(&site.server).iter().all(|&effective| effective == 0));
    let session = client.connect(&site).expect("a session");
    site.set_clients(&client.entry("one", &format!("{rights}\nowner = 1")));
    await_log(&log, "clients.toml:4:9: the server cannot give files to user 1");
    await_log(&log, "start the server anew");
    let file = open(&session, "/data/new", libc::O_RDWR | libc::O_CREAT).expect("all is as it was");
    assert_eq!(file.status().expect("its status").uid.get(), ORDINARY);
    // Its own user takes no power.
    site.set_clients(&client.entry("one", &format!("{rights}\nowner = 'nobody'")));
    await_log(&log, "Read clients.toml again");
    // Who never had it is told so.
    site.server.signal(Signal::TERM);
    site.server.wait();
    fs::write(site.path("keys/clients.toml"), client.entry("one", "owner = 0")).expect("a file");
    let output = Command::new("setpriv")
        .args(["--bounding-set=-chown", "--inh-caps=-chown"])
        .arg(binary("raio_server"))
        .args(["--check", "--export", "n=null:1M", "--user", "nobody", "--keys"])
        .arg(site.path("keys"))
        .output()
        .expect("setpriv runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("started without CAP_CHOWN"), "{said}");
}

#[test]
fn the_sessions_of_a_client_share_its_limits_and_other_clients_have_their_own() {
    let (one, other) = (Client::new(), Client::new());
    let rights = "exports = { data = 'rw' }\nlimits = { connections = 2, files = 1, memory = '8M' }";
    let mut site = Site::new(&(one.entry("one", rights) + &other.entry("two", rights)));
    let sessions = [&one, &one, &other].map(|client| client.connect(&site).expect("a session"));
    let error = one.connect(&site).map(drop).expect_err("a third connection");
    assert_eq!(error.errno(), libc::EUSERS, "{error}");
    let needle = "raise connections of its limits in the server's clients.toml";
    assert!(error.to_string().contains(needle), "{error}");
    let file = open(&sessions[0], "/data/file", libc::O_RDONLY).expect("a file");
    let error = open(&sessions[1], "/data/file", libc::O_RDONLY).map(drop).expect_err("a second file");
    assert_eq!(error.errno(), libc::EMFILE, "{error}");
    assert!(error.to_string().contains("raise files of its limits"), "{error}");
    open(&sessions[2], "/data/file", libc::O_RDONLY).expect("it has a limit of its own");
    let rejected = &site.server.statistics()["rejected"];
    assert_eq!((&rejected["client_connections"], &rejected["client_files"]), (&1.into(), &1.into()));
    file.close().expect("it is closed");
    open(&sessions[1], "/data/file", libc::O_RDONLY).expect("there is room again");
    drop((file, sessions));
    site.server.statistics_when(is_at_rest);
    one.connect(&site).expect("there is room again");
}

#[test]
fn who_has_no_accepted_key_does_not_get_in() {
    let (client, stranger, expired) = (Client::new(), Client::new(), Client::new());
    let clients = client.entry("one", "exports = { data = 'ro' }")
        + &format!("[client.late]\nkeys = [{{ key = '{}', expires = 2001-01-01 }}]\n", expired.key);
    let mut site = Site::new(&clients);
    assert_eq!(errno(stranger.connect(&site)), libc::EKEYREJECTED);
    assert_eq!(errno(expired.connect(&site)), libc::EKEYREJECTED);
    // In the clear.
    let none = Options { keys: Keys::Off, ..Options::default() };
    let error = Session::connect(&site.server.url(), &none).map(drop).expect_err("it has no key");
    assert_eq!(error.errno(), libc::ENOKEY, "{error}");
    // A server that has another key than the pinned one.
    client.connect(&site).expect("it has a key");
    fs::remove_file(site.path("keys/host.key")).expect("it is there");
    let listen = site.server.listen_url();
    site.server.signal(Signal::TERM);
    site.server.wait();
    site.server = Site::start(&site.directory, &listen);
    let keys = Keys::Directory(client.keys.path().to_owned());
    let again = Session::connect(&site.server.url(), &Options { keys, ..Options::default() });
    assert_eq!(errno(again), libc::EKEYREJECTED);
    site.server.statistics_when(is_at_rest);
}

#[test]
fn a_key_that_is_revoked_ends_its_sessions_within_a_second_and_no_others() {
    let (one, other) = (Client::new(), Client::new());
    let rights = "exports = { data = 'rw' }";
    let site = Site::new(&(one.entry("one", rights) + &other.entry("two", rights)));
    let (revoked, stays) = (one.connect(&site).expect("a session"), other.connect(&site).expect("a session"));
    let files = [&revoked, &stays].map(|session| open(session, "/data/file", libc::O_RDWR).expect("a file"));
    let mut contexts = [&revoked, &stays].map(|session| session.context(4).expect("a context"));
    for (context, file) in contexts.iter_mut().zip(&files) {
        assert_eq!(write(context, file).expect("it may"), 10);
    }
    site.set_clients(&other.entry("two", rights));
    let begin = Instant::now();
    while write(&mut contexts[0], &files[0]).is_ok() {
        assert!(begin.elapsed() < Duration::from_secs(1), "it goes on");
    }
    assert_eq!(write(&mut contexts[1], &files[1]).expect("it may"), 10);
    assert_eq!(errno(one.connect(&site)), libc::EKEYREJECTED);
}

#[test]
fn rights_that_shrink_end_sessions_and_rights_that_grow_do_not() {
    let client = Client::new();
    let site = Site::new(&client.entry("one", "exports = { data = 'rw' }"));
    let session = client.connect(&site).expect("a session");
    let file = open(&session, "/data/file", libc::O_RDWR).expect("a file");
    let mut context = session.context(4).expect("a context");
    site.set_clients(&client.entry("one", "exports = { data = 'rw', logs = 'ro' }"));
    let deadline = Instant::now() + PATIENCE;
    while open(&session, "/logs/file", libc::O_RDONLY).is_err() {
        assert!(Instant::now() < deadline, "the new right does not come");
    }
    assert_eq!(write(&mut context, &file).expect("it may"), 10);
    site.set_clients(&client.entry("one", "exports = { data = 'ro', logs = 'ro' }"));
    let begin = Instant::now();
    while write(&mut context, &file).is_ok() {
        assert!(begin.elapsed() < Duration::from_secs(1), "it goes on");
    }
    let session = client.connect(&site).expect("it may still read");
    assert!(open(&session, "/data/file", libc::O_RDONLY).is_ok());
    assert_eq!(errno(open(&session, "/data/file", libc::O_RDWR)), libc::EROFS);
    // A mistake in the file changes nothing.
    site.set_clients("[client.one]\nkeys = 7\n");
    std::thread::sleep(Duration::from_millis(100));
    assert!(open(&session, "/data/file", libc::O_RDONLY).is_ok());
    client.connect(&site).expect("it may still connect");
}

#[test]
fn keys_are_changed_without_a_gap() {
    let (mut client, next) = (Client::new(), Client::new());
    let entry = |keys: &[PublicKey]| {
        let keys: Vec<_> = keys.iter().map(|key| format!("'{key}'")).collect();
        format!("[client.one]\nkeys = [{}]\nexports = {{ data = 'rw' }}\n", keys.join(", "))
    };
    let site = Site::new(&entry(&[client.key]));
    client.connect(&site).expect("the old key is good");
    site.set_clients(&entry(&[client.key, next.key]));
    let deadline = Instant::now() + PATIENCE;
    while next.connect(&site).is_err() {
        assert!(Instant::now() < deadline, "the new key is not accepted");
    }
    let session = client.connect(&site).expect("and so is the old one, still");
    site.set_clients(&entry(&[next.key]));
    let deadline = Instant::now() + PATIENCE;
    while client.connect(&site).is_ok() {
        assert!(Instant::now() < deadline, "the old key is accepted");
    }
    drop(session);
    client = next;
    client.connect(&site).expect("the new key is good");
}

#[test]
fn a_session_goes_on_after_a_restart_with_keys() {
    let client = Client::new();
    let mut site = Site::new(&client.entry("one", "exports = { data = 'rw' }"));
    let session = client.connect(&site).expect("a session");
    let file = open(&session, "/data/file", libc::O_RDWR).expect("a file");
    let mut context = session.context(4).expect("a context");
    assert_eq!(write(&mut context, &file).expect("it may"), 10);
    let listen = site.server.listen_url();
    site.server.kill();
    site.server = Site::start(&site.directory, &listen);
    assert_eq!(write(&mut context, &file).expect("it goes on"), 10);
    assert_eq!(context.stats().reconnects, 1);
}

/// A connection that says it is of this session.
fn join(
    site: &Site,
    client: &Client,
    session: SessionId,
    epoch: u64,
) -> Result<TcpClient, raio_transport::Error> {
    let channel = ChannelOffer { number: 1, epoch, linger: Duration::from_secs(10) };
    let tls = ClientTls::new(&client.secret(), &[site.host_key()]);
    let offer = Offer { session, channel: Some(channel), tls: Some(tls), ..Offer::new("test") };
    TcpClient::connect(site.server.address(), &offer, Instant::now() + PATIENCE)
}

#[test]
fn the_session_id_of_another_client_names_nothing() {
    let (one, other) = (Client::new(), Client::new());
    let mut site = Site::new(&(one.entry("one", "") + &other.entry("two", "")));
    let id = SessionId::random();
    let of_one = join(&site, &one, id, 7).expect("a session");
    // The same client must come with a higher epoch; to the other one it is a session of its own.
    assert_eq!(join(&site, &one, id, 7).map(drop).expect_err("it is stale").errno(), libc::ESTALE);
    let of_other = join(&site, &other, id, 7).expect("a session");
    assert_eq!(site.server.statistics()["sessions"], 2);
    drop((of_one, of_other));
}

#[test]
fn who_begins_handshakes_and_does_not_end_them_keeps_nobody_out() {
    let client = Client::new();
    let mut site = Site::new(&client.entry("one", "exports = { data = 'ro' }"));
    let mut half_open: Vec<TcpStream> = (0..300)
        .map(|n| {
            let mut stream = TcpStream::connect(site.server.address()).expect("it is accepted");
            // The front of a hello, or nothing.
            if n % 2 == 0 {
                let _ = stream.write_all(&[22, 3, 1, 2, 0, 1]);
            }
            stream
        })
        .collect();
    let begin = Instant::now();
    client.connect(&site).expect("it is let in");
    assert!(begin.elapsed() < Duration::from_secs(4), "it waited for the others to time out");
    // Those go after five seconds at the latest.
    for stream in &mut half_open {
        stream.set_read_timeout(Some(PATIENCE)).expect("it can be set");
        assert!(!matches!(stream.read(&mut [0]), Ok(1..)), "they hear nothing");
    }
    drop(half_open.into_iter().map(OwnedFd::from).collect::<Vec<_>>());
    site.server.statistics_when(is_at_rest);
}

/// A connection to there from this address of the loopback device.
fn connect_from(host: u8, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddr::from((Ipv4Addr::new(127, 0, 0, host), 0)))?;
    connect(&socket, &to)?;
    Ok(TcpStream::from(socket))
}

/// Clients without an accepted key. From one address they shake hands, so many a minute. From another one
/// they begin so many handshakes, begin others when the server has closed them, and go on with none.
struct Strangers {
    is_over: Arc<AtomicBool>,
    shaking: Vec<JoinHandle<usize>>,
    half_open: JoinHandle<usize>,
}

impl Strangers {
    const HANDSHAKES_A_MINUTE: u32 = 10_000;
    const HALF_OPEN: usize = 256;

    fn start(site: &Site) -> Self {
        const THREADS: u32 = 4;
        let is_over = Arc::new(AtomicBool::new(false));
        let (to, host_key) = (site.server.address(), site.host_key());
        let shaking = (0..THREADS)
            .map(|_| {
                let is_over = Arc::clone(&is_over);
                std::thread::spawn(move || {
                    let every = Duration::from_secs(60) * THREADS / Self::HANDSHAKES_A_MINUTE;
                    let tls = ClientTls::new(&SecretKey::generate(), &[host_key]);
                    let offer = Offer { tls: Some(tls), ..Offer::new("stranger") };
                    let (mut count, mut next) = (0, Instant::now());
                    while !is_over.load(Ordering::Relaxed) {
                        let stream = connect_from(3, to).expect("it is accepted");
                        let rejected = TcpClient::from_stream(stream, &offer, Instant::now() + PATIENCE);
                        assert_eq!(
                            rejected.map(drop).expect_err("it has no key").errno(),
                            libc::EKEYREJECTED
                        );
                        count += 1;
                        next += every;
                        std::thread::sleep(next.saturating_duration_since(Instant::now()));
                    }
                    count
                })
            })
            .collect();
        let half_open = {
            let is_over = Arc::clone(&is_over);
            std::thread::spawn(move || {
                let (mut streams, mut count) = (Vec::new(), 0);
                while !is_over.load(Ordering::Relaxed) {
                    streams.retain_mut(|stream: &mut TcpStream| {
                        let read = stream.read(&mut [0; 64]);
                        read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
                    });
                    while streams.len() < Self::HALF_OPEN {
                        let mut stream = connect_from(2, to).expect("it is accepted");
                        // The front of a hello, or nothing.
                        if count % 2 == 0 {
                            let _ = stream.write_all(&[22, 3, 1, 2, 0, 1]);
                        }
                        stream.set_nonblocking(true).expect("a socket");
                        streams.push(stream);
                        count += 1;
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                count
            })
        };
        Self { is_over, shaking, half_open }
    }

    /// Has them go. How many handshakes were rejected, and how many were begun only.
    fn end(self) -> (usize, usize) {
        self.is_over.store(true, Ordering::Relaxed);
        let shaking = self.shaking.into_iter().map(|thread| thread.join().expect("it does not panic")).sum();
        (shaking, self.half_open.join().expect("it does not panic"))
    }
}

fn read(context: &mut Context, file: &File) -> Result<Vec<u8>, Error> {
    let buffers = Buffers::One(Buffer::Owned(vec![0; 10].into()));
    let completion = carry_out(context, file, Operation::Read { offset: 0, buffers })?;
    completion.result?;
    Ok(completion.buffers.expect("they come back").pieces()[0].bytes().to_vec())
}

/// For so long, honest clients connect and work while strangers come.
fn work_among_strangers(site: &Site, client: &Client, time: Duration) {
    let options = Options {
        keys: Keys::Directory(client.keys.path().to_owned()),
        connect_timeout: PATIENCE,
        reconnect: Duration::ZERO,
        ..Options::default()
    };
    let begin = || {
        let session = Session::connect(&site.server.url(), &options).expect("it is let in");
        let file = open(&session, "/data/file", libc::O_RDWR).expect("it may");
        let context = session.context(4).expect("a context");
        (session, file, context)
    };
    let work = |context: &mut Context, file: &File| {
        assert_eq!(write(context, file).expect("it may"), 10);
        assert_eq!(read(context, file).expect("it may"), b"abcdefghij");
    };
    let (_session, file, mut context) = begin();
    let strangers = Strangers::start(site);
    let (begun, mut count) = (Instant::now(), 0);
    while count < 3 || begun.elapsed() < time {
        let (_session, file, mut context) = begin();
        work(&mut context, &file);
        count += 1;
        std::thread::sleep(Duration::from_millis(50));
    }
    // One that was there before notices nothing.
    work(&mut context, &file);
    let (rejected, half_open) = strangers.end();
    eprintln!("{count} sessions, {rejected} handshakes rejected, {half_open} begun only");
}

fn honest_clients_are_served_among_strangers(time: Duration) {
    let client = Client::new();
    let mut site = Site::new(&client.entry("one", "exports = { data = 'rw' }"));
    client.trust(&site);
    let sockets = |site: &Site| {
        site.server.descriptors().iter().filter(|descriptor| descriptor.starts_with("socket:")).count()
    };
    let at_first = sockets(&site);
    // The first ones touch memory for the first time.
    work_among_strangers(&site, &client, Duration::from_secs(1));
    site.server.statistics_when(is_at_rest);
    let settle = |site: &Site| {
        let deadline = Instant::now() + PATIENCE;
        while sockets(site) > at_first {
            assert!(Instant::now() < deadline, "there are {:?}", site.server.descriptors());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    settle(&site);
    let descriptors = site.server.descriptors();
    let taken = site.server.taken_bytes();
    work_among_strangers(&site, &client, time);
    site.server.statistics_when(is_at_rest);
    settle(&site);
    assert_eq!(site.server.descriptors(), descriptors);
    let grown = site.server.taken_bytes().saturating_sub(taken);
    assert!(grown < 4 << 20, "{grown} bytes more");
}

#[test]
fn strangers_who_shake_hands_all_the_time_keep_nobody_out_and_leave_nothing() {
    honest_clients_are_served_among_strangers(Duration::from_secs(5));
}

#[test]
#[ignore = "long"]
fn strangers_who_shake_hands_for_a_minute_keep_nobody_out_and_leave_nothing() {
    honest_clients_are_served_among_strangers(Duration::from_secs(60));
}

#[test]
fn key_files_that_others_can_read_are_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let keys = directory.path().join("keys");
    fs::create_dir(&keys).expect("a directory");
    fs::write(keys.join("clients.toml"), "").expect("a file");
    SecretKey::create(&keys.join("host.key")).expect("a key");
    let loose = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    fs::set_permissions(keys.join("host.key"), loose).expect("it is ours");
    let (code, said) = check(directory.path(), &keys);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("chmod 600"), "{said}");
    fs::remove_file(keys.join("host.key")).expect("it is there");
    let (code, said) = check(directory.path(), &keys);
    assert_eq!(code, Some(2), "a check makes nothing: {said}");
}

/// What `raio_server --check` says.
fn check(directory: &Path, keys: &Path) -> (Option<i32>, String) {
    let export = format!("d={}", directory.display());
    let output = Command::new(binary("raio_server"))
        .args(["--check", "--export", &export, "--keys"])
        .arg(keys)
        .output()
        .expect("it runs");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn over_rdma_goes_what_a_client_may_send_in_the_clear_and_nothing_else() {
    let Some(_wire) = needs_wire("clients with keys that may use RDMA") else { return };
    let (one, other) = (Client::new(), Client::new());
    let rights = "exports = { data = 'rw' }";
    let clients = one.entry("one", &format!("{rights}\nrdma = 'clear'")) + &other.entry("two", rights);
    let site = Site::at(&clients, "tcp://10.77.0.1:0");
    let url = site.server.url().replace("raio+tcp", "raio");
    for (client, moves) in [(&one, true), (&other, false)] {
        client.trust(&site);
        let keys = Keys::Directory(client.keys.path().to_owned());
        let session = Session::connect(&url, &Options { keys, ..Options::default() }).expect("a session");
        assert_eq!(session.why_tcp().is_none(), moves, "{:?}", session.why_tcp());
        let file = open(&session, "/data/file", libc::O_RDWR).expect("a file");
        let mut context = session.context(4).expect("a context");
        assert_eq!(write(&mut context, &file).expect("it may"), 10);
    }
}
