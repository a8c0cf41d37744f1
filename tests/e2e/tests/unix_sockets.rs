//! Servers that listen on Unix sockets: for whom, and what is different there.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Context, Error, File, Operation, Options, Session};
use raio_e2e::{PATIENCE, Server, binary, carry_out, load_command, needs_root};
use raio_transport::address::Endpoint;
use raio_transport::handshake::{ChannelOffer, Offer};
use raio_transport::message::SessionId;
use raio_transport::tcp::TcpClient;
use rustix::fs::Uid;
use rustix::process::{Gid, Signal};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use tempfile::TempDir;

/// A server that listens on a Unix socket, with exports `data` and `logs`, both of them writable.
struct Site {
    directory: TempDir,
    server: Server,
}

impl Site {
    fn new() -> Self {
        Self::with(&[])
    }

    /// One that knows its clients, as `clients.toml` says.
    fn of_clients(clients: &str) -> Self {
        Self::with(&[clients])
    }

    fn with(clients: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        for path in
            [directory.path().to_owned(), directory.path().join("data"), directory.path().join("logs")]
        {
            fs::create_dir_all(&path).expect("a directory");
            fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("it is ours");
            fs::write(path.join("file"), b"0123456789").expect("a file");
        }
        if let [clients] = clients {
            fs::create_dir(directory.path().join("keys")).expect("a directory");
            fs::write(directory.path().join("keys/clients.toml"), clients).expect("a file");
        }
        let server = Self::start(&directory);
        Self { directory, server }
    }

    fn start(directory: &TempDir) -> Server {
        let at = |name: &str| directory.path().join(name).display().to_string();
        let exports = ["data", "logs"].map(|name| format!("{name}={},rw", at(name)));
        let listen = format!("unix://{}", at("socket"));
        let mut arguments = vec!["--listen", &listen];
        let keys = at("keys");
        if fs::exists(&keys).expect("it can be seen") {
            arguments.extend(["--keys", &keys]);
        }
        Server::start_with(&exports.each_ref().map(String::as_str), &arguments)
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn connect(&self) -> Result<Session, Error> {
        Session::connect(&self.server.url(), &Options::default())
    }
}

/// What a thread does as this user, with this group and more groups.
fn as_user<T: Send>(uid: u32, gid: u32, groups: &[u32], work: impl FnOnce() -> T + Send) -> T {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    let groups: Vec<_> = groups.iter().map(|&group| Gid::from_raw(group)).collect();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            set_thread_groups(&groups).expect("this is root");
            set_thread_res_gid(gid, gid, gid).expect("this is root");
            set_thread_res_uid(uid, uid, uid).expect("this is root");
            work()
        });
        thread.join().expect("it does not panic")
    })
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
fn files_are_written_and_read_over_a_unix_socket() {
    let site = Site::new();
    assert!(fs::symlink_metadata(site.socket()).expect("it is there").file_type().is_socket());
    let url = site.server.url();
    let report = load_command()
        .args([&url, "/data/load", "--size", "8M", "--fill", "--verify", "--pattern", "randrw"])
        .args(["--rounds", "64", "--depth", "8", "--sessions", "4", "--io-size", "128K"])
        .output()
        .expect("raio load runs");
    assert!(report.status.success(), "{}", String::from_utf8_lossy(&report.stderr));
    assert_eq!(fs::metadata(site.directory.path().join("data/load")).expect("a file").len(), 8 << 20);
}

#[test]
fn a_session_goes_on_after_the_server_was_killed_and_has_come_back() {
    let mut site = Site::new();
    let session = site.connect().expect("a session");
    let file = open(&session, "/data/file", libc::O_RDWR).expect("a file");
    let mut context = session.context(4).expect("a context");
    assert_eq!(write(&mut context, &file).expect("it is written"), 10);
    site.server.kill();
    assert!(site.socket().exists());
    site.server = Site::start(&site.directory);
    assert_eq!(write(&mut context, &file).expect("it goes on"), 10);
    assert_eq!(context.stats().reconnects, 1);
}

#[test]
fn a_socket_at_which_a_server_listens_is_not_taken_from_it() {
    let site = Site::new();
    let listen = site.server.listen_url();
    let second = Command::new(binary("raio_server"))
        .args(["--listen", &listen, "--export", "n=null:1M", "--sandbox=off"])
        .output()
        .expect("raio_server runs");
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success() && said.contains("Another process listens there"), "{said}");
    site.connect().expect("the first one still serves");
    let file = site.directory.path().join("data/file").display().to_string();
    let third = Command::new(binary("raio_server"))
        .args(["--listen", &format!("unix://{file}"), "--export", "n=null:1M", "--sandbox=off"])
        .output()
        .expect("raio_server runs");
    assert!(!third.status.success());
    assert_eq!(fs::read(file).expect("it is still there"), b"0123456789");
}

#[test]
fn without_clients_in_a_file_the_permissions_of_the_socket_decide() {
    if !needs_root("becoming another user") {
        return;
    }
    let site = Site::new();
    let other = || as_user(1234, 1234, &[], || site.connect());
    let error = other().map(drop).expect_err("it may not write to the socket");
    assert_eq!(error.errno(), libc::EACCES, "{error}");
    assert!(error.to_string().contains("write permission"), "{error}");
    fs::set_permissions(site.socket(), Permissions::from_mode(0o666)).expect("it is ours");
    let session = other().expect("it may now");
    open(&session, "/data/file", libc::O_RDWR).expect("everything is allowed");
}

#[test]
fn users_and_groups_may_open_what_their_clients_have() {
    if !needs_root("becoming another user") {
        return;
    }
    let site = Site::of_clients(
        "[client.me]\nusers = [1234]\nexports = { data = 'rw' }\n\
         [client.staff]\ngroups = [50]\nexports = { logs = 'ro' }\n\
         [client.backup]\ngroups = [34]\nexports = { data = 'ro' }\n",
    );
    let (none, ro) = (libc::ENOENT, libc::EROFS);
    for (uid, gid, groups, data, logs) in [
        (1234, 1234, &[][..], [0, 0], [none; 2]),
        // Its own entry counts, and not those of its groups.
        (1234, 50, &[34], [0, 0], [none; 2]),
        (77, 50, &[], [none; 2], [0, ro]),
        (77, 1, &[2, 34], [0, ro], [none; 2]),
        (77, 1, &[50, 34], [0, ro], [0, ro]),
    ] {
        let found = as_user(uid, gid, groups, || {
            let session = site.connect().expect("a session");
            ["/data/file", "/logs/file"].map(|path| {
                [libc::O_RDONLY, libc::O_RDWR]
                    .map(|flags| open(&session, path, flags).map_or_else(|error| error.errno(), |_| 0))
            })
        });
        assert_eq!(found, [data, logs], "{uid} {gid} {groups:?}");
    }
    // Root is nobody in particular, and the user without a number is nobody at all.
    for (uid, gid) in [(0, 0), (77, 77), (65534, 50), (65534, 65534)] {
        let error = as_user(uid, gid, &[], || site.connect()).map(drop).expect_err("it is no client");
        assert_eq!(error.errno(), libc::EKEYREJECTED, "{uid}: {error}");
        assert!(error.to_string().contains("clients.toml"), "{error}");
    }
}

#[test]
fn the_session_of_a_user_that_may_do_less_ends() {
    if !needs_root("becoming another user") {
        return;
    }
    let clients = |groups: &str| {
        format!(
            "[client.me]\nusers = [1234]\nexports = {{ data = 'rw' }}\n\
             [client.staff]\ngroups = {groups}\nexports = {{ data = 'rw' }}\n"
        )
    };
    let site = Site::of_clients(&clients("[50, 51]"));
    let options = Options { reconnect: Duration::ZERO, ..Options::default() };
    let connect = |uid, gid| {
        as_user(uid, gid, &[], || {
            let session = Session::connect(&site.server.url(), &options).expect("a session");
            let file = open(&session, "/data/file", libc::O_RDWR).expect("a file");
            let context = session.context(4).expect("a context");
            (session, file, context)
        })
    };
    let (_me, my_file, mut mine) = connect(1234, 1234);
    let (_staff, their_file, mut theirs) = connect(7, 51);
    assert_eq!(write(&mut theirs, &their_file).expect("it may"), 10);
    fs::write(site.directory.path().join("keys/clients.toml"), clients("[50]")).expect("a file");
    site.server.signal(Signal::HUP);
    let begin = Instant::now();
    while write(&mut theirs, &their_file).is_ok() {
        assert!(begin.elapsed() < Duration::from_secs(1), "its session goes on");
    }
    assert_eq!(write(&mut mine, &my_file).expect("it still may"), 10);
}

#[test]
fn the_session_id_of_another_user_names_nothing() {
    if !needs_root("becoming another user") {
        return;
    }
    let mut site = Site::new();
    fs::set_permissions(site.socket(), Permissions::from_mode(0o666)).expect("it is ours");
    let id = SessionId::random();
    let join = |uid| {
        let channel = ChannelOffer { number: 1, epoch: 7, linger: Duration::from_secs(10) };
        let offer = Offer { session: id, channel: Some(channel), ..Offer::new("test") };
        as_user(uid, uid, &[], || {
            TcpClient::connect(Endpoint::Unix(site.socket()), &offer, Instant::now() + PATIENCE)
        })
    };
    let first = join(1234).expect("a session");
    assert_eq!(join(1234).map(drop).expect_err("it is stale").errno(), libc::ESTALE);
    let second = join(1235).expect("a session of its own");
    assert_eq!(site.server.statistics()["sessions"], 2);
    drop((first, second));
}
