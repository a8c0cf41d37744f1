//! What people write: URLs, exports in their short form, sizes, configuration files, command lines, the
//! servers that a client trusts, and a server's clients.
//!
//! Each is taken or rejected with an error message, and what is taken makes sense.

#![no_main]

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use clap::Parser;
use libfuzzer_sys::fuzz_target;
use raio_server::config::{Config, Options};
use raio_server::export_spec::{ExportSpec, Source};
use raio_server::keys::{Keys, Rights};
use raio_transport::address::Address;
use raio_transport::credentials::Credentials;
use raio_transport::handshake::Identity;
use raio_transport::key_directory::KeyDirectory;
use raio_transport::keys::PublicKey;

fuzz_target!(|input: &[u8]| {
    let Some((&kind, bytes)) = input.split_first() else { return };
    match (kind % 6, std::str::from_utf8(bytes)) {
        (0, Ok(text)) => url(text),
        (1, Ok(text)) => {
            if let Ok(spec) = text.parse::<ExportSpec>() {
                export(&spec);
            }
        }
        (2, _) => file(bytes),
        (3, Ok(text)) => command_line(text),
        (4, _) => servers(bytes),
        (5, _) => clients(bytes),
        _ => {}
    }
});

fn url(text: &str) {
    match Address::parse(text) {
        Ok(address) => assert_eq!(Address::parse(&address.to_string()).as_ref(), Ok(&address), "{text:?}"),
        Err(why) => assert!(!why.is_empty()),
    }
}

fn export(spec: &ExportSpec) {
    let name = &spec.name;
    assert!(!name.is_empty() && !name.contains(['/', '\0']) && name != "." && name != "..", "{name:?}");
    match &spec.source {
        Source::Path(path) => assert!(!path.as_os_str().is_empty()),
        Source::Null(bytes) | Source::Memory(bytes) => {
            assert!(*bytes > 0 && !spec.is_direct && !spec.may_grow)
        }
    }
}

fn configured(arguments: &[&str]) {
    let Ok(options) = Options::try_parse_from(arguments) else { return };
    match options.check(4) {
        Ok(config) => {
            let Config { exports, arena_bytes, workers, io_bytes_max, .. } = &config;
            exports.iter().for_each(export);
            // A file may get some while the server runs.
            assert!(!exports.is_empty() || config.path().is_some());
            assert!(!config.listen.is_empty());
            assert!(*workers > 0 && *arena_bytes >= 2 * *io_bytes_max as usize);
        }
        Err(error) => assert!(format!("{error:#}").len() > 10, "{error:#}"),
    }
}

fn file(bytes: &[u8]) {
    let name = c"raio_server.toml";
    let memory = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).expect("a file in memory");
    let memory = File::from(memory);
    memory.write_all_at(bytes, 0).expect("room");
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    // Nothing is looked up in the network.
    configured(&["raio_server", "--listen", "tcp://127.0.0.1:0", "--config", &path]);
}

fn command_line(text: &str) {
    // No file is read, and nothing is looked up in the network.
    if text.contains("--c") || text.contains("--li") {
        return;
    }
    let words = text.split('\n');
    configured(
        &["raio_server", "--listen", "tcp://127.0.0.1:0"].into_iter().chain(words).collect::<Vec<_>>(),
    );
}

/// Two of the seeds' keys.
static KNOWN: LazyLock<[PublicKey; 2]> =
    LazyLock::new(|| raio_fuzz::PUBLIC_KEYS.map(|key| key.parse().unwrap()));

/// A directory for this process; scripts/fuzz removes what it lies in.
fn directory(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
    KeyDirectory::new(&path).create().expect("a directory");
    path
}

fn servers(bytes: &[u8]) {
    static DIRECTORY: LazyLock<KeyDirectory> = LazyLock::new(|| KeyDirectory::new(directory("servers")));
    let directory = &*DIRECTORY;
    // As `pin` makes it: one that others may write to is not read.
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(directory.servers_file());
    file.and_then(|file| file.write_all_at(bytes, 0)).expect("room");
    let other = directory.trusted("other", 2);
    let pinned = directory.pin("H", 1, KNOWN[0]);
    match other {
        Ok(other) => {
            pinned.expect("the file is good");
            assert_eq!(directory.trusted("h", 1).expect("it is still good"), [KNOWN[0]]);
            assert_eq!(directory.trusted("other", 2).expect("it is still good"), other);
        }
        Err(error) => {
            assert_eq!(pinned.expect_err("the file is bad").errno(), error.errno());
            assert_eq!(fs::read(directory.servers_file()).expect("it is there"), bytes);
        }
    }
}

fn clients(bytes: &[u8]) {
    static FILE: LazyLock<(PathBuf, Keys)> = LazyLock::new(|| {
        let path = directory("clients");
        let keys = Keys::open(&path, true).expect("it makes what it needs");
        (path.join("clients.toml"), keys)
    });
    let (path, keys) = &*FILE;
    let user = |uid, groups: &[u32]| {
        Identity::User(Arc::new(Credentials { uid, gid: 100, groups: groups.to_vec() }))
    };
    let known = [
        Identity::Anonymous,
        Identity::Key(KNOWN[0]),
        Identity::Key(KNOWN[1]),
        user(1000, &[50]),
        user(7, &[34, 50]),
        user(65534, &[]),
    ];
    let rights = || known.each_ref().map(|identity| keys.rights(identity));
    let before = rights();
    fs::write(path, bytes).expect("room");
    let reread = || keys.read_again(HashMap::new()).map(|new| keys.replace(new));
    match reread() {
        Ok(_) => {
            let rights = rights();
            assert!(rights[0] == Rights::None && rights[5] == Rights::None, "anybody is a client");
            // Of those who are clients nobody may do less than a moment ago.
            let again = reread().expect("it is the same");
            for (identity, rights) in known.iter().zip(rights) {
                assert_eq!(again.concerns(identity), rights == Rights::None, "{identity:?}");
            }
            let _ = (keys.unknown_exports(), keys.next_expiry(), keys.expired());
        }
        Err(error) => {
            assert!(format!("{error:#}").contains("clients.toml"), "{error:#}");
            assert_eq!(rights(), before, "a mistake has changed something");
        }
    }
}
