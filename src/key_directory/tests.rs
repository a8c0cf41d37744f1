use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn key() -> PublicKey {
    SecretKey::generate().public()
}

/// A directory that does not exist yet, and is removed with all that came into it.
struct Scratch(KeyDirectory);

impl Scratch {
    fn new() -> Self {
        let name = format!("raio-keys-{}-{}", std::process::id(), random::number());
        Self(KeyDirectory::new(std::env::temp_dir().join(name)))
    }

    fn with(servers: &str) -> Self {
        let scratch = Self::new();
        scratch.0.create().unwrap();
        scratch.write(servers.as_bytes());
        scratch
    }

    fn write(&self, servers: &[u8]) {
        std::fs::write(self.0.servers_file(), servers).unwrap();
        self.set_mode(0o644);
    }

    fn set_mode(&self, mode: u32) {
        std::fs::set_permissions(self.0.servers_file(), PermissionsExt::from_mode(mode)).unwrap();
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0.path);
    }
}

#[test]
fn the_environment_names_the_directory() {
    let directory = |variables: &[(&str, &str)]| {
        let variables: HashMap<_, _> = variables.iter().copied().collect();
        let directory = KeyDirectory::from_variables(|name| variables.get(name).map(OsString::from));
        directory.map(|directory| (directory.path.display().to_string(), directory.is_named))
    };
    let home = ("HOME", "/home/me");
    assert_eq!(directory(&[]), None);
    assert_eq!(directory(&[home]), Some(("/home/me/.config/raio".into(), false)));
    assert_eq!(directory(&[home, ("XDG_CONFIG_HOME", "/c")]), Some(("/c/raio".into(), false)));
    assert_eq!(directory(&[home, ("XDG_CONFIG_HOME", "c")]), Some(("/home/me/.config/raio".into(), false)));
    assert_eq!(directory(&[home, ("RAIO_KEYS", "/k")]), Some(("/k".into(), true)));
}

#[test]
fn a_server_is_found_by_each_way_to_write_its_name() {
    let (one, other, third) = (key(), key(), key());
    let text = format!(
        "# my servers\n\n  Db1.Example:7240 {one} {other} # two of them\n\
         [2001:DB8::0:1]:1\t{other}\r\n10.0.0.1:65535 {third}"
    );
    let directory = Scratch::with(&text);
    for (host, port, keys) in [
        ("db1.example", 7240, vec![one, other]),
        ("DB1.EXAMPLE.", 7240, vec![one, other]),
        ("db1.example", 7241, vec![]),
        ("db1", 7240, vec![]),
        ("2001:db8::1", 1, vec![other]),
        ("2001:db8:0:0::1", 1, vec![other]),
        ("10.0.0.1", 65535, vec![third]),
        ("::ffff:10.0.0.1", 65535, vec![third]),
        ("", 1, vec![]),
    ] {
        assert_eq!(directory.0.trusted(host, port).unwrap(), keys, "{host} {port}");
    }
}

#[test]
fn a_malformed_line_is_an_error_that_says_where_it_is() {
    let key = key();
    for (line, why) in [
        ("h:1".to_owned(), "h:1 has no key"),
        (format!("h {key}"), "the server has no port"),
        (format!("[::1] {key}"), "the server has no port"),
        (format!("::1:1 {key}"), "IPv6 addresses go in brackets"),
        (format!("raio://h:1 {key}"), "without a scheme"),
        (format!("h:1/ {key}"), "without a scheme"),
        (format!(":1 {key}"), "the server has no host"),
        (format!("h:65536 {key}"), "not a number up to 65535"),
        (format!("h:0 {key}"), "no server has port 0"),
        (SecretKey::generate().public().to_string(), "a key stands where the server"),
        (format!("h:1 {key} {}", &key.to_string()[..20]), "is not a public key"),
        ("h:1 AAAA".into(), "is not a public key"),
        (format!("H:1 {key}\nh:01 {key}"), "line 2 has h:1 already"),
    ] {
        let directory = Scratch::with(&format!("# a comment\n{line}\n"));
        let lines = 1 + line.lines().count();
        // Also for a server that has nothing to do with the line.
        for error in [directory.0.trusted("other", 1), directory.0.tls("other", 1).map(|_| Vec::new())] {
            let error = error.unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL, "{line}");
            let place = format!("{}:{lines}: ", directory.0.servers_file().display());
            let text = error.to_string();
            assert!(text.starts_with(&place) && text.contains(why), "{line}: {text}");
        }
        assert_eq!(directory.0.pin("other", 1, key).unwrap_err().errno(), libc::EINVAL, "{line}");
    }
}

#[test]
fn a_file_that_others_can_write_to_is_not_used() {
    let directory = Scratch::with(&format!("h:1 {}\n", key()));
    for mode in [0o664, 0o646, 0o622] {
        directory.set_mode(mode);
        let error = directory.0.tls("h", 1).unwrap_err();
        assert_eq!(error.errno(), libc::EACCES, "{mode:o}");
        assert!(error.to_string().contains("chmod go-w"), "{error}");
    }
    directory.set_mode(0o444);
    assert_eq!(directory.0.trusted("h", 1).unwrap().len(), 1);
    for mode in [0o770, 0o702, 0o1777] {
        std::fs::set_permissions(&directory.0.path, PermissionsExt::from_mode(mode)).unwrap();
        let error = directory.0.tls("h", 1).unwrap_err();
        assert_eq!(error.errno(), libc::EACCES, "{mode:o}");
        assert!(error.to_string().starts_with(&format!("{} is not", directory.0.path.display())), "{error}");
    }
    std::fs::set_permissions(&directory.0.path, PermissionsExt::from_mode(0o755)).unwrap();
    assert_eq!(directory.0.trusted("h", 1).unwrap().len(), 1);
    std::fs::remove_file(directory.0.servers_file()).unwrap();
    std::fs::create_dir(directory.0.servers_file()).unwrap();
    assert_eq!(directory.0.tls("h", 1).unwrap_err().errno(), libc::EACCES);
}

#[test]
fn a_file_that_is_too_long_or_no_text_is_not_used() {
    let directory = Scratch::with("");
    directory.write(&vec![b'#'; FILE_BYTES_MAX as usize]);
    assert!(directory.0.tls("h", 1).unwrap().is_none());
    directory.write(&vec![b'#'; FILE_BYTES_MAX as usize + 1]);
    assert_eq!(directory.0.tls("h", 1).unwrap_err().errno(), libc::EFBIG);
    directory.write(b"# \xff\n");
    assert_eq!(directory.0.tls("h", 1).unwrap_err().errno(), libc::EINVAL);
}

#[test]
fn without_a_line_there_is_no_tls_and_with_one_and_without_a_key_there_is_an_error() {
    let directory = Scratch::new();
    assert_eq!(directory.0.tls("h", 1).unwrap_err().errno(), libc::ENOENT, "it was named");
    for path in [directory.0.path.clone(), "/dev/null/.config/raio".into()] {
        let unnamed = KeyDirectory { is_named: false, path };
        assert!(unnamed.tls("h", 1).unwrap().is_none());
    }
    directory.0.create().unwrap();
    assert!(directory.0.tls("h", 1).unwrap().is_none());
    directory.write(format!("h:1 {}\n", key()).as_bytes());
    let error = directory.0.tls("h", 1).unwrap_err();
    assert_eq!(error.errno(), libc::ENOKEY);
    assert!(error.to_string().contains("raio key new"), "{error}");
    assert!(directory.0.tls("h", 2).unwrap().is_none(), "that one needs no key");
    SecretKey::create(&directory.0.key_file()).unwrap();
    assert!(directory.0.tls("h", 1).unwrap().is_some());
    std::fs::set_permissions(directory.0.key_file(), PermissionsExt::from_mode(0o640)).unwrap();
    assert_eq!(directory.0.tls("h", 1).unwrap_err().errno(), libc::EACCES);
}

#[test]
fn pinning_replaces_a_servers_line_and_leaves_the_others_alone() {
    let (old, new) = (key(), key());
    let name = ServerName::new("H", 1);
    for (before, after) in [
        (String::new(), format!("h:1 {new}\n")),
        ("# no line end".into(), format!("# no line end\nh:1 {new}\n")),
        (format!("# c\nh:1 {old} # x\n\ng:1  {old}\n"), format!("# c\nh:1 {new}\n\ng:1  {old}\n")),
        (format!("h:2 {old}\n"), format!("h:2 {old}\nh:1 {new}\n")),
    ] {
        assert_eq!(pinned(&before, &name, new), Ok(after));
    }
    assert_eq!(pinned("", &ServerName::new("::1", 1), new), Ok(format!("[::1]:1 {new}\n")));
}

#[test]
fn pinning_does_not_make_a_file_that_is_too_long_to_be_read() {
    let directory = Scratch::with("");
    let full = vec![b'#'; FILE_BYTES_MAX as usize];
    directory.write(&full);
    assert_eq!(directory.0.pin("h", 1, key()).unwrap_err().errno(), libc::EFBIG);
    assert_eq!(std::fs::read(directory.0.servers_file()).unwrap(), full);
    directory.write(&full[100..]);
    directory.0.pin("h", 1, key()).unwrap();
    assert_eq!(directory.0.trusted("h", 1).unwrap().len(), 1);
}

#[test]
fn pinning_makes_the_directory_and_leaves_one_file_for_this_user_alone() {
    let directory = Scratch::new();
    let (first, second) = (key(), key());
    directory.0.pin("h", 1, first).unwrap();
    assert_eq!(directory.0.path.metadata().unwrap().mode() & 0o7777, 0o700);
    directory.0.pin("h", 1, second).unwrap();
    directory.0.pin("::1", 1, first).unwrap();
    assert_eq!(directory.0.servers_file().metadata().unwrap().mode() & 0o7777, 0o600);
    assert_eq!(directory.0.trusted("h", 1).unwrap(), [second]);
    assert_eq!(directory.0.trusted("::1", 1).unwrap(), [first]);
    assert_eq!(directory.0.path.read_dir().unwrap().count(), 1);
}

#[test]
fn those_who_pin_at_the_same_time_wait_for_each_other() {
    let directory = Scratch::new();
    std::thread::scope(|scope| {
        for n in 1..9 {
            let directory = &directory.0;
            scope.spawn(move || directory.pin(&format!("h{n}"), 1, key()).unwrap());
        }
    });
    assert_eq!(parse(&directory.0.read_servers().unwrap()).unwrap().len(), 8);
}
