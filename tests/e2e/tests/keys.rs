//! Clients with keys, as users have them: the command `raio`, key directories, libraio and raio load, with a
//! server in this process, or on another host.

use std::net::SocketAddr;
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use raio::{Crc, Error, File, Keys, Options, Scheme, Session};
use raio_e2e::{Cable, End, KeyedServer, PATIENCE, Server, binary, copy_program, load_command};
use raio_transport::handshake::Identity;
use raio_transport::keys::{PublicKey, SecretKey};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, recv, socket_with, sockopt};
use rustix::process::Signal;

/// A client's key directory. It is removed at the end.
struct Client {
    home: tempfile::TempDir,
}

impl Client {
    fn new() -> Self {
        Self { home: tempfile::tempdir().expect("a directory") }
    }

    /// One that has a key.
    fn with_key() -> (Self, PublicKey) {
        let this = Self::new();
        let made = this.raio(&["key", "new"]);
        assert_eq!(made.status.code(), Some(0), "{}", text(&made.stderr));
        let key = text(&made.stdout).trim_end().parse().expect("a public key alone");
        (this, key)
    }

    /// One that has a key, and this in its file of servers.
    fn with_servers(servers: &str) -> (Self, PublicKey) {
        let (this, key) = Self::with_key();
        std::fs::write(this.servers(), servers).expect("a file");
        (this, key)
    }

    fn path(&self) -> PathBuf {
        self.home.path().join("config/raio")
    }

    fn servers(&self) -> PathBuf {
        self.path().join("servers")
    }

    /// Runs `raio`, which has no terminal.
    fn raio(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(binary("raio"));
        command.args(arguments).env_clear().env("XDG_CONFIG_HOME", self.home.path().join("config"));
        command.stdin(Stdio::null()).output().expect("raio runs")
    }

    fn options(&self) -> Options {
        let keys = Keys::Directory(self.path());
        Options { keys, reconnect: Duration::from_secs(10), ..Options::default() }
    }

    fn connect(&self, server: &KeyedServer) -> Result<Session, Error> {
        Session::connect(&server.url(), &self.options())
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn mode(path: &Path) -> u32 {
    path.metadata().expect("it is there").permissions().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("it is ours");
}

/// Opens a file, and does something with it on a connection of its own.
fn work(session: &Session) -> File {
    let file = session.open("/e/file", libc::O_RDONLY, 0).expect("it opens");
    let mut context = session.context(4).expect("a context");
    for _ in 0..3 {
        fsync(&mut context, &file).expect("it works");
    }
    file
}

fn fsync(context: &mut raio::Context, file: &File) -> Result<u64, Error> {
    context.submit(file, raio::Operation::Fsync { data_only: true }, 0).expect("there is room");
    while context.wait(1, 1, None)? == 0 {}
    context.next().expect("it has ended").result
}

#[test]
fn a_client_with_a_new_key_trusts_a_server_and_works_with_it() {
    let (client, key) = Client::with_key();
    assert_eq!((mode(&client.path()), mode(&client.path().join("key"))), (0o700, 0o600));
    let shown = client.raio(&["key", "show"]);
    assert_eq!(text(&shown.stdout), format!("{key}\n"));
    let again = client.raio(&["key", "new"]);
    assert_eq!((again.status.code(), text(&again.stdout)), (Some(1), String::new()));
    assert!(text(&again.stderr).contains("There is a key already"), "{}", text(&again.stderr));

    let server_key = SecretKey::generate();
    let server = KeyedServer::start(&server_key, &[key]);
    let expected = server_key.public().to_string();
    let trusted = client.raio(&["key", "trust", &server.url(), "--key", &expected]);
    assert_eq!(trusted.status.code(), Some(0), "{}", text(&trusted.stderr));
    assert!(!text(&trusted.stderr).contains("does not accept"), "{}", text(&trusted.stderr));
    let line = format!("{} {expected}\n", server.address());
    assert_eq!(std::fs::read_to_string(client.servers()).expect("a file"), line);
    assert_eq!(mode(&client.servers()), 0o600);

    let before = server.clients().len();
    let session = client.connect(&server).expect("it is trusted");
    work(&session).close().expect("it closes");
    let clients = server.clients().split_off(before);
    assert_eq!(clients, [Identity::Key(key), Identity::Key(key)], "the control connection and the context's");
}

#[test]
fn a_servers_key_is_learnt_though_the_server_does_not_know_the_client() {
    let server_key = SecretKey::generate();
    let server = KeyedServer::start(&server_key, &[]);
    let (client, key) = Client::with_key();
    let trusted = client.raio(&["key", "trust", &server.url(), "--yes"]);
    assert_eq!(trusted.status.code(), Some(0), "{}", text(&trusted.stderr));
    assert!(text(&trusted.stderr).contains(&format!("Have its administrator add {key}")));
    assert!(server.refusal().contains(&key.to_string()), "its log has the key to add");
    let error = client.connect(&server).unwrap_err();
    assert_eq!(error.errno(), libc::EKEYREJECTED, "{error}");

    // So it is by one who has no key yet.
    let keyless = Client::new();
    let trusted = keyless.raio(&["key", "trust", &server.url(), "--yes"]);
    assert_eq!(trusted.status.code(), Some(0), "{}", text(&trusted.stderr));
    assert!(text(&trusted.stderr).contains("raio key new"), "{}", text(&trusted.stderr));
    let error = keyless.connect(&server).unwrap_err();
    assert_eq!(error.errno(), libc::ENOKEY, "{error}");
    assert!(error.to_string().contains("raio key new"), "{error}");
    assert!(server.clients().is_empty());
}

#[test]
fn nothing_is_trusted_that_the_user_has_not_said() {
    let [old, new] = [(); 2].map(|()| SecretKey::generate());
    let server = KeyedServer::start(&new, &[]);
    let line = format!("# mine\n{} {}\n", server.address(), old.public());
    let (client, _) = Client::with_servers(&line);
    let new = new.public().to_string();
    for (arguments, code, said) in [
        (&[][..], 2, "There is no terminal"),
        (&["--key", &old.public().to_string()], 1, "not the key which --key says"),
        (&["--yes"], 1, "WARNING: THIS IS NOT THE KEY THAT THIS SERVER HAS HAD."),
        (&["--key", &new], 1, "WARNING"),
    ] {
        let refused = client.raio(&[&["key", "trust", &server.url()], arguments].concat());
        assert_eq!(refused.status.code(), Some(code), "{arguments:?}: {}", text(&refused.stderr));
        assert!(text(&refused.stderr).contains(said), "{arguments:?}: {}", text(&refused.stderr));
        assert_eq!(std::fs::read_to_string(client.servers()).expect("a file"), line);
    }
    let replaced = client.raio(&["key", "trust", &server.url(), "--key", &new, "--replace"]);
    assert_eq!(replaced.status.code(), Some(0), "{}", text(&replaced.stderr));
    assert!(text(&replaced.stderr).contains("WARNING"));
    let line = format!("# mine\n{} {new}\n", server.address());
    assert_eq!(std::fs::read_to_string(client.servers()).expect("a file"), line);
}

#[test]
fn at_a_terminal_the_user_is_asked() {
    let server_key = SecretKey::generate();
    let server = KeyedServer::start(&server_key, &[]);
    for (said, code) in [("n", 1), ("", 1), ("y", 0)] {
        let (client, _) = Client::with_key();
        let command = format!(
            "{} key --keys {} trust {}",
            binary("raio").display(),
            client.path().display(),
            server.url()
        );
        // script(1) gives it a terminal.
        let mut script = Command::new("script")
            .args(["-qec", &command, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("script runs");
        let mut answer = script.stdin.take().expect("a pipe");
        std::io::Write::write_all(&mut answer, format!("{said}\n").as_bytes()).expect("it reads");
        let output = script.wait_with_output().expect("it ends");
        drop(answer);
        let shown = text(&output.stdout);
        assert_eq!(output.status.code(), Some(code), "{said:?}: {shown}");
        assert!(shown.contains(&server_key.public().to_string()) && shown.contains("[y/N]"), "{shown}");
        assert_eq!(client.servers().exists(), code == 0, "{said:?}");
    }
}

#[test]
fn a_server_with_another_key_is_not_connected_to() {
    let (client, key) = Client::with_key();
    let server = KeyedServer::start(&SecretKey::generate(), &[key]);
    let line = format!("{} {}\n", server.address(), SecretKey::generate().public());
    std::fs::write(client.servers(), line).expect("a file");
    let error = client.connect(&server).unwrap_err();
    assert_eq!(error.errno(), libc::EKEYREJECTED, "{error}");
    assert!(server.clients().is_empty());
}

#[test]
fn files_that_are_not_safe_or_make_no_sense_end_in_an_error_and_not_in_a_connection() {
    let server_key = SecretKey::generate();
    let (client, key) = Client::with_key();
    let server = KeyedServer::start(&server_key, &[key]);
    let line = format!("{} {}\n", server.address(), server_key.public());
    let key_file = client.path().join("key");
    let refuses = |errno, says: &str| {
        let error = client.connect(&server).unwrap_err();
        assert_eq!(error.errno(), errno, "{error}");
        assert!(error.to_string().contains(says), "{error}");
    };
    std::fs::write(client.servers(), format!("{line}other:1 ed25519:AAAA\n")).expect("a file");
    refuses(libc::EINVAL, &format!("{}:2: ", client.servers().display()));
    std::fs::write(client.servers(), &line).expect("a file");
    set_mode(&client.servers(), 0o666);
    refuses(libc::EACCES, "chmod go-w");
    set_mode(&client.servers(), 0o600);
    set_mode(&key_file, 0o644);
    refuses(libc::EACCES, "chmod 600");
    set_mode(&key_file, 0o600);
    let rdma = Session::connect_to(Scheme::Rdma, server.address(), &client.options()).unwrap_err();
    assert_eq!(rdma.errno(), libc::EPROTONOSUPPORT, "{rdma}");
    assert!(rdma.to_string().contains("neither encrypted nor authenticated"), "{rdma}");
    assert!(server.clients().is_empty());
    client.connect(&server).expect("now all is well");
    std::fs::remove_dir_all(client.path()).expect("it is ours");
    refuses(libc::ENOENT, "Cannot use the keys in");
}

#[test]
fn a_server_that_is_trusted_is_never_reached_in_the_clear() {
    let (client, key) = Client::with_key();
    let server = KeyedServer::start_at("127.0.0.1:0".parse().unwrap(), None);
    // In the clear it is reached as long as nobody says otherwise.
    work(&client.connect(&server).expect("it serves anybody"));
    assert_eq!(server.clients(), [Identity::Anonymous, Identity::Anonymous]);
    let line = format!("{} {}\n", server.address(), SecretKey::generate().public());
    std::fs::write(client.servers(), line).expect("a file");
    for url in [server.url(), format!("raio://{}", server.address()), by_name(server.address())] {
        let error = Session::connect(&url, &client.options()).unwrap_err();
        assert!(matches!(error.errno(), libc::EPROTO | libc::ECONNRESET), "{url}: {error}");
    }
    for crc in [Crc::On, Crc::Off] {
        let options = Options { crc, ..client.options() };
        assert!(Session::connect_to(Scheme::Tcp, server.address(), &options).is_err());
    }
    assert_eq!(server.clients().len(), 2, "nobody else has come");
    let trust = client.raio(&["key", "trust", &server.url(), "--yes"]);
    assert_eq!(trust.status.code(), Some(1));
    assert!(text(&trust.stderr).contains("has shown no key"), "{}", text(&trust.stderr));

    // A server that takes clients with keys alone says so.
    let server_key = SecretKey::generate();
    let server = KeyedServer::start(&server_key, &[key]);
    let line = format!("{} {}\n", server.address(), server_key.public());
    std::fs::write(client.servers(), line).expect("a file");
    let off = Options { keys: Keys::Off, ..client.options() };
    let error = Session::connect(&server.url(), &off).unwrap_err();
    assert_eq!(error.errno(), libc::ENOKEY, "{error}");
    // Its address is in the file, and its name is not.
    let session = Session::connect(&by_name(server.address()), &client.options()).expect("it is trusted");
    work(&session);
    assert_eq!(server.clients(), [Identity::Key(key), Identity::Key(key)]);
}

fn by_name(address: SocketAddr) -> String {
    format!("raio://localhost:{}", address.port())
}

#[test]
fn a_session_goes_on_by_tls_and_not_with_a_server_in_the_clear() {
    let server_key = SecretKey::generate();
    let (client, key) = Client::with_key();
    let server = KeyedServer::start(&server_key, &[key]);
    let line = format!("{} {}\n", server.address(), server_key.public());
    std::fs::write(client.servers(), line).expect("a file");
    let options = Options { reconnect: Duration::from_secs(4), ..client.options() };
    let session = Session::connect(&server.url(), &options).expect("it is trusted");
    // What the file says later does not matter to a session.
    std::fs::remove_file(client.servers()).expect("it is ours");
    let file = session.open("/e/file", libc::O_RDONLY, 0).expect("it opens");
    let mut context = session.context(4).expect("a context");
    for n in 0..3 {
        fsync(&mut context, &file).unwrap_or_else(|error| panic!("{n}: {error}"));
        file.status().expect("it goes on");
        server.cut();
    }
    fsync(&mut context, &file).expect("it goes on");
    let clients = server.clients();
    assert!(clients.len() >= 5, "{clients:?}");
    assert!(clients.iter().all(|client| *client == Identity::Key(key)), "{clients:?}");

    let address = server.address();
    drop(server);
    let server = KeyedServer::start_at(address, None);
    let error = fsync(&mut context, &file).unwrap_err();
    assert_ne!(error.errno(), 0, "{error}");
    assert!(session.context(4).is_err());
    assert!(server.clients().is_empty());
}

#[test]
fn raio_load_uses_keys_as_libraio_does() {
    type Variables<'a> = &'a [(&'a str, &'a Path)];
    let server_key = SecretKey::generate();
    let (client, key) = Client::with_key();
    let server = KeyedServer::start(&server_key, &[key]);
    let line = format!("{} {}\n", server.address(), server_key.public());
    std::fs::write(client.servers(), line).expect("a file");
    let load = |variables: Variables<'_>, arguments: &[&str]| {
        let mut command = load_command();
        command.args([&server.url(), "/e/file", "--sessions", "3", "--rounds", "2"]).args(arguments);
        command.env_clear().envs(variables.iter().copied()).output().expect("raio load runs")
    };
    let path = client.path();
    let ways: [(Variables<'_>, &[&str]); 3] = [
        (&[], &["--keys", path.to_str().expect("text")]),
        (&[("RAIO_KEYS", &path)], &[]),
        (&[("XDG_CONFIG_HOME", path.parent().expect("a directory"))], &[]),
    ];
    for (n, (variables, arguments)) in ways.into_iter().enumerate() {
        let done = load(variables, arguments);
        assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
        assert_eq!(server.clients(), vec![Identity::Key(key); 3 * (n + 1)]);
    }
    let without = load(&[], &[]);
    assert_eq!(without.status.code(), Some(1));
    assert!(text(&without.stderr).contains("raio key new"), "{}", text(&without.stderr));
}

/// Where libraio.so is.
fn library_path() -> PathBuf {
    binary("libraio.so").parent().expect("a file is in a directory").to_owned()
}

/// One of the examples in C, built into this directory.
fn example(name: &str, directory: &Path) -> PathBuf {
    let program = directory.join(name);
    let make = Command::new("make")
        .args(["-s", "-C", concat!(env!("CARGO_MANIFEST_DIR"), "/../../libraio/examples")])
        .arg(&program)
        .arg(format!("O={}", directory.display()))
        .arg(format!("RAIO={}", library_path().display()))
        .output()
        .expect("make runs");
    assert!(make.status.success(), "{}", text(&make.stderr));
    program
}

#[test]
fn a_program_in_c_uses_the_keys_of_its_environment() {
    let server_key = SecretKey::generate();
    let (client, key) = Client::with_key();
    let server = KeyedServer::start(&server_key, &[key]);
    let line = format!("{} {}\n", server.address(), server_key.public());
    std::fs::write(client.servers(), line).expect("a file");
    let program = example("raio_cat", client.home.path());
    let directory = library_path();
    let cat = |variable: &str| {
        let mut command = Command::new(&program);
        command.args([&format!("{}/e/file", server.url())]).env_clear();
        command.env("LD_LIBRARY_PATH", &directory).env(variable, client.path()).output().expect("it runs")
    };
    let with = cat("RAIO_KEYS");
    assert_eq!((with.status.code(), with.stdout.len()), (Some(0), 64 << 10), "{}", text(&with.stderr));
    assert!(server.clients().iter().all(|client| *client == Identity::Key(key)));
    let without = cat("RAIO_NO_KEYS");
    assert_eq!((without.status.code(), without.stdout.len()), (Some(1), 0));
    assert!(text(&without.stderr).contains("raio key new"), "{}", text(&without.stderr));
}

#[test]
fn a_program_with_the_rights_of_another_user_has_no_keys_from_the_environment() {
    if !raio_e2e::needs_root("a set-user-ID program") {
        return;
    }
    let (client, _) = Client::with_key();
    let program = client.home.path().join("raio");
    copy_program(&binary("raio"), &program);
    set_mode(client.home.path(), 0o755);
    const ANOTHER_USER: u32 = 65534;
    std::os::unix::fs::chown(&program, Some(ANOTHER_USER), None).expect("root may");
    set_mode(&program, 0o4755);
    let show = Command::new(&program).args(["key", "show"]).env("RAIO_KEYS", client.path()).output();
    let show = show.expect("it runs");
    assert_eq!(show.status.code(), Some(2), "{}", text(&show.stderr));
    assert!(text(&show.stderr).contains("--keys DIRECTORY"), "{}", text(&show.stderr));
}

/// Everything that a host sends and receives.
struct Capture {
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<Vec<u8>>,
}

impl Capture {
    fn start(cable: &Cable, end: End) -> Self {
        const ALL: u16 = 3;
        const BUFFER_BYTES: usize = 64 << 20;
        let socket: OwnedFd = cable.on(end, || {
            let protocol = NonZero::new(u16::to_be(ALL).into()).map(Protocol::from_raw);
            socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, protocol)
                .expect("root may")
        });
        sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER_BYTES).expect("root may");
        let timeout = Some(Duration::from_millis(50));
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, timeout).expect("a socket");
        let is_over = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&is_over);
        let thread = std::thread::spawn(move || {
            let mut all = Vec::new();
            let mut packet = vec![0; 256 << 10];
            loop {
                // What came before the end is taken, too.
                let is_over = until.load(Ordering::Relaxed);
                match recv(&socket, &mut packet[..], RecvFlags::empty()) {
                    Ok((n, _)) => all.extend_from_slice(&packet[..n]),
                    Err(_) if is_over => return all,
                    Err(_) => {}
                }
            }
        });
        Self { is_over, thread }
    }

    /// All packets, one behind the other.
    fn end(self) -> Vec<u8> {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().expect("it does not panic")
    }
}

fn has(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn a_file_is_copied_between_two_hosts_with_keys_and_nobody_in_between_can_read_it() {
    let Some(cable) = Cable::new("two hosts with keys") else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name);
    for (client, name) in [("me", "key"), ("stranger", "key"), ("nobody", "none")] {
        std::fs::create_dir_all(at(client).join(name)).expect("a directory");
    }
    std::fs::create_dir(at("data")).expect("a directory");
    const LINE: &[u8] = b"nobody else reads this line\n";
    let content = LINE.repeat((1 << 20) / LINE.len());
    std::fs::write(at("original"), &content).expect("a file");
    let programs = ["raio_cp", "raio_cat"].map(|name| example(name, directory.path()));
    let run = |client: &str, program: &Path, arguments: &[&str]| {
        let mut command = cable.command(End::B, program);
        command.args(arguments).env_remove("RAIO_KEYS").env("XDG_CONFIG_HOME", at(client));
        command.env("LD_LIBRARY_PATH", library_path()).stdin(Stdio::null()).output().expect("it runs")
    };
    let raio = |client: &str, arguments: &[&str]| {
        let done = run(client, &binary("raio"), arguments);
        assert_eq!(done.status.code(), Some(0), "{arguments:?}: {}", text(&done.stderr));
        text(&done.stdout).trim_end().to_owned()
    };
    let [copy, cat] = &programs;
    let capture = Capture::start(&cable, End::A);

    // The steps of README.md.
    let key = raio("me", &["key", "new"]);
    let mut command = cable.command(End::A, binary("raio_server"));
    command.arg("--keys").arg(at("keys")).args(["--listen", "tcp://10.78.0.1:0"]);
    command.args(["--export", &format!("safe={},rw", at("data").display())]);
    let server = Server::spawn(command);
    let entry = format!("[client.me]\nkeys = [\"{key}\"]\nexports = {{ safe = \"rw\" }}\n");
    let clients = at("keys/clients.toml");
    let before = std::fs::read_to_string(&clients).expect("the server has made it");
    std::fs::write(&clients, before + &entry).expect("a file");
    server.signal(Signal::HUP);
    let host_key = SecretKey::load(&at("keys/host.key")).expect("the server has made it").public();
    let url = format!("raio://{}", server.address());
    let trust = ["key", "trust", &url, "--key", &host_key.to_string()];
    raio("me", &trust);
    // SIGHUP takes a moment.
    let deadline = Instant::now() + PATIENCE;
    while text(&run("me", &binary("raio"), &trust).stderr).contains("does not accept") {
        assert!(Instant::now() < deadline, "the server does not read clients.toml again");
    }
    let (original, file) = (at("original").display().to_string(), format!("{url}/safe/file"));
    let copied = run("me", copy, &[&original, &file]);
    assert_eq!(copied.status.code(), Some(0), "{}", text(&copied.stderr));
    let is_same = std::fs::read(at("data/file")).expect("the copy") == content;
    assert!(is_same, "the copy is not the original");
    let read = run("me", cat, &[&file]);
    assert_eq!(read.status.code(), Some(0), "{}", text(&read.stderr));
    assert!(read.stdout == content, "what is read is not the original");

    // Nobody else gets in.
    raio("stranger", &["key", "new"]);
    raio("stranger", &trust);
    let other = format!("{url}/safe/other");
    for (client, why) in [("stranger", "does not accept this client's key"), ("nobody", "raio key new")] {
        for (program, arguments) in [(copy, &[&*original, &*other][..]), (cat, &[&*file])] {
            let refused = run(client, program, arguments);
            assert_eq!((refused.status.code(), refused.stdout.len()), (Some(1), 0), "{client}");
            assert!(text(&refused.stderr).contains(why), "{client}: {}", text(&refused.stderr));
        }
    }
    assert!(!at("data/other").exists());

    let packets = capture.end();
    assert!(packets.len() > 2 * content.len(), "only {} bytes were captured", packets.len());
    assert!(has(&packets, b"raio/2"), "a hello is in the clear, and is not in what was captured");
    assert!(!has(&packets, &LINE[..16]), "the file can be read on its way");
}
