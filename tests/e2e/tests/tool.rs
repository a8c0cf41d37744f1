//! The tool `raio` as a program: copies of every shape, exit codes, JSON, pipes, terminals, and copies that
//! are interrupted or killed and go on.

mod tool_site;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use raio_e2e::{Client, LoopDevice, PATIENCE, Random, needs_root, seed};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;

use tool_site::{Site, assert_documented, bytes, code};

#[test]
fn a_file_of_any_size_arrives_whole_in_every_direction() {
    let site = Site::new();
    for length in [0, 1, 4095, (1 << 20) - 1, 1 << 20, (3 << 20) + 7] {
        let content = bytes(length);
        fs::write(site.here("a"), &content).expect("a file");
        site.run(&["cp", "a", ":/e/a"]);
        assert_eq!(fs::read(site.there("a")).expect("a file"), content, "to the server");
        site.run(&["cp", ":/e/a", "b"]);
        assert_eq!(fs::read(site.here("b")).expect("a file"), content, "from the server");
        site.run(&["cp", ":/e/a", ":/e/c"]);
        assert_eq!(fs::read(site.there("c")).expect("a file"), content, "within the server");
        site.run(&["cp", "a", "d"]);
        assert_eq!(fs::read(site.here("d")).expect("a file"), content, "on this machine");
        assert_eq!(site.run(&["cat", ":/e/a"]), content, "to standard output");
        let mut child = site.raio(&["cp", "-", ":/e/f"]).stdin(Stdio::piped()).spawn().expect("raio starts");
        child.stdin.take().expect("it is piped").write_all(&content).expect("raio reads");
        assert!(child.wait().expect("it ends").success());
        assert_eq!(fs::read(site.there("f")).expect("a file"), content, "from standard input");
        site.run(&["cmp", "a", ":/e/f"]);
    }
    assert_eq!(site.left_here(), ["a", "b", "d"].map(String::from).into(), "and nothing else is left");
}

#[test]
fn a_large_file_arrives_whole_over_several_connections_of_small_depth() {
    let site = Site::new();
    let content = bytes((24 << 20) + 5);
    fs::write(site.there("a"), &content).expect("a file");
    for (connections, depth, block) in [("1", "1", "4M"), ("5", "3", "64k"), ("2", "32", "256k")] {
        let shape = ["--connections", connections, "--depth", depth, "--block-size", block];
        site.run(&[&["cp", ":/e/a", "b", "--verify"], &shape[..]].concat());
        assert!(fs::read(site.here("b")).expect("a file") == content, "{shape:?}");
        site.run(&[&["cp", "b", ":/e/c", "--verify", "--fsync"], &shape[..]].concat());
        assert!(fs::read(site.there("c")).expect("a file") == content, "{shape:?}");
    }
    assert_eq!(site.left_here(), ["b"].map(String::from).into());
}

#[test]
fn holes_and_zeros_take_no_space_at_the_destination_unless_they_are_to() {
    let site = Site::new();
    let file = File::create(site.here("a")).expect("a file");
    file.set_len((40 << 20) + 1).expect("a size");
    file.write_all_at(b"data", 20 << 20).expect("a write");
    for (from, to) in [("a", ":/e/b"), (":/e/b", "c"), ("a", "d")] {
        let report = site.json(&["cp", "--json", "--verify", from, to]);
        assert_eq!(report["bytes"], (40 << 20) + 1, "{report}");
        assert!(report["zero_bytes"].as_u64() > Some(38 << 20), "{report}");
        assert!(report["copied_bytes"].as_u64() <= Some(1 << 20), "holes are not read: {report}");
    }
    let same = |path: &Path| fs::read(path).expect("a file") == fs::read(site.here("a")).expect("a file");
    for path in [site.there("b"), site.here("c"), site.here("d")] {
        assert!(same(&path), "{}", path.display());
        let allocated = path.metadata().expect("a file").blocks() * 512;
        assert!(allocated <= 2 << 20, "{} has {allocated} bytes of storage", path.display());
    }
    site.run(&["cp", "--no-sparse", ":/e/b", "c"]);
    assert!(same(&site.here("c")));
    assert!(site.here("c").metadata().expect("a file").blocks() * 512 >= 40 << 20);
}

#[test]
fn what_was_at_the_destination_is_gone_even_if_it_was_longer() {
    let site = Site::new();
    for (old, new) in [(5 << 20, 3), (3, 5 << 20), (2 << 20, 2 << 20)] {
        let content = bytes(new);
        fs::write(site.here("a"), &content).expect("a file");
        for path in [site.there("b"), site.here("c"), site.here("d")] {
            fs::write(path, vec![7; old]).expect("a file");
        }
        for arguments in
            [&["cp", "a", ":/e/b"][..], &["cp", ":/e/b", "c"], &["cp", "--inplace", ":/e/b", "d"]]
        {
            site.run(arguments);
        }
        for path in [site.there("b"), site.here("c"), site.here("d")] {
            assert!(fs::read(&path).expect("a file") == content, "{}: {old} to {new}", path.display());
        }
    }
}

#[test]
fn a_device_has_the_source_and_zeros_in_the_place_of_what_it_had() {
    if !needs_root("a copy to a block device") {
        return;
    }
    let site = Site::new();
    let device = LoopDevice::new(32 << 20);
    let path = device.path().to_str().expect("UTF-8");
    fs::write(path, vec![0xff; 32 << 20]).expect("a device");
    let source = File::create(site.here("a")).expect("a file");
    source.set_len(20 << 20).expect("a size");
    source.write_all_at(&bytes(3 << 20), 7 << 20).expect("a write");
    site.run(&["cp", "--fsync", "--verify", "a", path]);
    let mut found = vec![0; 20 << 20];
    File::open(path).and_then(|it| it.read_exact_at(&mut found, 0)).expect("a device");
    assert!(found == fs::read(site.here("a")).expect("a file"));
    let mut next = [0; 8];
    File::open(path).and_then(|it| it.read_exact_at(&mut next, 20 << 20)).expect("a device");
    assert_eq!(next, [0xff; 8], "what is behind stays");
    let report = site.json(&["cp", "--json", path, ":/e/image"]);
    assert_eq!(report["bytes"], 32 << 20);
    fs::write(site.here("large"), vec![1; 33 << 20]).expect("a file");
    let output = site.raio(&["cp", "large", path]).output().expect("raio runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(code(&output) == Some(1) && said.contains("larger device"), "{said}");
}

#[test]
fn exit_codes_and_messages_tell_what_is_to_be_done() {
    let site = Site::new();
    fs::write(site.here("a"), "1234").expect("a file");
    fs::write(site.there("b"), "12x4").expect("a file");
    for (arguments, status, needle) in [
        (&["cp", "a", "b"][..], 0, ""),
        (&["cp", "a"], 2, "PATH"),
        (&["cp", "a", "a"], 2, "same file"),
        (&["cp", "a", "null:", "--verify"], 2, "--verify needs a file"),
        (&["cp", "a", ":/e/x", "--preserve"], 0, ""),
        (&["cp", "-", "c", "--resume"], 2, "--resume needs"),
        (&["cp", "a", "b", "c"], 2, "not a directory"),
        (&["cp", "raio://127.0.0.1", "c"], 2, "no file there"),
        (&["cp", "null:", "c"], 2, "only a destination"),
        (&["cat", "--url", "nonsense", ":/e/b"], 2, "no scheme"),
        (&["cat", ":/e/none"], 3, "No such file"),
        (&["cat", "none"], 3, "No such file"),
        (&["cp", "a", ":/e/none/c"], 3, "No such file"),
        (&["stat", ":/none/c"], 3, "none"),
        (&["cp", "a", "/dev/no-such-disk"], 3, "no device"),
        (&["cp", "a", "/dev/null"], 0, ""),
        (&["cp", "a", ":/ro/c"], 4, "read-only"),
        (&["discard", "--all", ":/ro/b"], 4, "read-only"),
        (&["cat", "--url", "raio://127.0.0.1:1", ":/e/b"], 5, "Connection refused"),
        (&["ping", "raio://127.0.0.1:1"], 5, "Connection refused"),
        (&["cmp", "a", ":/e/b"], 6, "differ at byte 2"),
    ] {
        let output = site.raio(arguments).output().expect("raio runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(code(&output), Some(status), "raio {arguments:?}: {said}");
        assert!(said.contains(needle), "raio {arguments:?}: {said}");
        assert!(output.stdout.is_empty(), "raio {arguments:?}: errors go to standard error");
    }
    assert_eq!(site.left_here(), ["a", "b"].map(String::from).into(), "failures leave nothing");
    let mut without = site.raio(&["cat", ":/e/b"]);
    let output = without.env_remove("RAIO_URL").output().expect("raio runs");
    assert!(code(&output) == Some(2) && String::from_utf8_lossy(&output.stderr).contains("RAIO_URL"));
}

#[test]
fn names_may_be_as_long_as_they_can_and_have_any_bytes() {
    let site = Site::new();
    let long = "n".repeat(255);
    let odd = OsStr::from_bytes(b"\xff\n -x");
    let content = bytes(17 << 20);
    for name in [OsStr::new(&long), odd] {
        let mut remote = OsString::from(":/e/");
        remote.push(name);
        fs::write(site.here("a"), &content).expect("a file");
        let copy = |from: &OsStr, to: &OsStr| {
            let output = site.raio(&["cp"]).args([from, to]).output().expect("raio runs");
            assert!(output.status.success(), "{from:?} {to:?}: {}", String::from_utf8_lossy(&output.stderr));
        };
        copy(OsStr::new("a"), &remote);
        copy(&remote, name);
        assert!(fs::read(site.directory.path().join("here").join(name)).expect("a file") == content);
    }
}

#[test]
fn a_file_is_not_copied_over_itself_by_whatever_name() {
    let site = Site::new();
    fs::write(site.there("a"), "precious").expect("a file");
    fs::hard_link(site.there("a"), site.there("b")).expect("a link");
    let local = site.there("a").to_str().expect("UTF-8").to_owned();
    let other = format!("{}/e/a", site.server.url());
    for (from, to) in [(":/e/a", ":/e/b"), (&other, ":/e/a"), (&local, ":/e/a"), (":/ro/a", ":/e/b")] {
        let output = site.raio(&["cp", from, to]).output().expect("raio runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(code(&output) == Some(2) && said.contains("same file"), "{from} {to}: {said}");
        assert_eq!(fs::read(site.there("a")).expect("a file"), b"precious", "{from} {to}");
    }
}

#[test]
fn checksums_of_a_servers_files_are_computed_there() {
    let mut site = Site::new();
    let contents = bytes((9 << 20) + 7);
    fs::write(site.there("f"), &contents).expect("a file");
    fs::write(site.here("f"), &contents).expect("a file");
    for algorithm in ["crc32c", "blake3"] {
        let sum = |path: &str| {
            site.json(&["checksum", path, "--algorithm", algorithm, "--json"])["checksum"].clone()
        };
        assert_eq!(sum(":/e/f"), sum("f"), "{algorithm}");
    }
    assert_eq!(site.json(&["cmp", "f", ":/e/f", "--json"])["bytes"], contents.len());
    let statistics = site.server.statistics();
    // Read once for each, and by nobody else.
    assert_eq!(
        (&statistics["requests"]["checksum"], &statistics["read_bytes"]),
        (&3.into(), &(3 * contents.len()).into())
    );
}

#[test]
fn a_copy_of_a_servers_file_on_the_same_server_is_made_there() {
    let mut site = Site::new();
    let mut contents = bytes((70 << 20) + 7);
    contents[1 << 20..9 << 20].fill(0);
    let source = fs::File::create(site.there("f")).expect("a file");
    source.write_all_at(&contents[..1 << 20], 0).expect("it is written");
    source.write_all_at(&contents[9 << 20..], 9 << 20).expect("it is written");
    let report = site.json(&["cp", ":/e/f", ":/e/copy", "--json"]);
    assert_eq!(report["bytes"], contents.len());
    assert_eq!(
        report["copied_bytes"].as_u64().zip(report["zero_bytes"].as_u64()).map(|(a, b)| a + b),
        Some(contents.len() as u64)
    );
    assert!(fs::read(site.there("copy")).expect("a file") == contents);
    assert!(fs::metadata(site.there("copy")).expect("a file").blocks() * 512 < contents.len() as u64);
    // What was there is replaced.
    site.run(&["cp", ":/ro/f", ":/e/copy"]);
    assert!(fs::read(site.there("copy")).expect("a file") == contents);
    let statistics = site.server.statistics();
    assert_eq!((&statistics["requests"]["copy"], &statistics["requests"]["write"]), (&6.into(), &0.into()));
    // What is to be verified comes here.
    site.run(&["cp", "--verify", ":/e/f", ":/e/copy"]);
    assert_ne!(site.server.statistics()["requests"]["write"], 0);
    assert!(fs::read(site.there("copy")).expect("a file") == contents);
    assert!(fs::read_dir(site.there("")).expect("a directory").count() == 2, "nothing else is left");
}

#[test]
fn results_in_json_are_right_and_their_fields_documented() {
    let site = Site::new();
    fs::write(site.there("digits"), "123456789").expect("a file");
    fs::write(site.there("large"), bytes(4 << 20)).expect("a file");
    let mut seen = Vec::new();
    let mut json = |arguments: &[&str]| {
        let object = site.json(&[arguments, &["--json"]].concat());
        assert_documented(arguments[0], &object);
        seen.push(arguments[0].to_owned());
        object
    };
    let stat = json(&["stat", ":/e/digits"]);
    assert_eq!((&stat["type"], &stat["size"]), (&"file".into(), &9.into()));
    let crc = json(&["checksum", ":/e/digits", "--algorithm", "crc32c"]);
    assert_eq!((&crc["checksum"], &crc["bytes"]), (&"e3069283".into(), &9.into()));
    let blake3 = json(&["checksum", ":/e/digits"]);
    assert_eq!(blake3["checksum"].as_str().map(str::len), Some(64));
    let copy = json(&["cp", ":/e/digits", "here"]);
    assert_eq!((&copy["bytes"], &copy["copied_bytes"]), (&9.into(), &9.into()));
    let same = json(&["cmp", ":/e/digits", "here"]);
    assert_eq!((&same["same"], &same["differs_at"]), (&true.into(), &Value::Null));
    let info = json(&["info"]);
    assert_eq!(info["io_bytes_max"], 1 << 20);
    assert!(info["operations"].as_array().is_some_and(|all| all.contains(&"read".into())), "{info}");
    let ping = json(&["ping", "--count", "20"]);
    assert_eq!((&ping["what"], &ping["count"]), (&"ping".into(), &20.into()));
    let read = json(&["ping", "--count", "20", ":/e/large"]);
    assert_eq!((&read["what"], &read["count"]), (&"read".into(), &20.into()));
    let bench = json(&["bench", ":/e/large", "--sizes", "4k", "--depths", "4", "--seconds", "0.1"]);
    assert!(bench["ios"].as_u64() > Some(10) && bench["operation"] == "read", "{bench}");
    let discard = json(&["discard", ":/e/large", "--offset", "1M", "--length", "2M"]);
    assert_eq!(discard["bytes"], 2 << 20);
    let left = fs::read(site.there("large")).expect("a file");
    assert!(
        left[1 << 20..3 << 20].iter().all(|&byte| byte == 0) && left[..1 << 20] == bytes(4 << 20)[..1 << 20]
    );
    let findings = String::from_utf8(site.run(&["doctor", "--json", "--bundle", "bundle"])).expect("UTF-8");
    for line in findings.lines() {
        assert_documented("doctor", &serde_json::from_str(line).expect("JSON"));
    }
    let bundle: Value =
        serde_json::from_slice(&fs::read(site.here("bundle")).expect("a bundle")).expect("JSON");
    assert_documented("doctor", &bundle);
    assert_eq!(bundle["findings"].as_array().map(Vec::len), Some(findings.lines().count()));
}

#[test]
fn a_part_of_a_file_is_written_to_standard_output() {
    let site = Site::new();
    let content = bytes(3 << 20);
    fs::write(site.there("a"), &content).expect("a file");
    let part =
        |offset: &str, length: &str| site.run(&["cat", ":/e/a", "--offset", offset, "--length", length]);
    assert!(part("1000", "2M") == content[1000..1000 + (2 << 20)]);
    assert!(part("3145720", "100") == content[3_145_720..]);
    assert!(part("4M", "1").is_empty());
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let site = Site::new();
    fs::write(site.there("a"), bytes(8 << 20)).expect("a file");
    for arguments in [&["cat", ":/e/a"][..], &["cp", ":/e/a", "-"], &["bench", "--seconds", "0.1", ":/e/a"]] {
        let mut command = site.raio(arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("raio starts");
        let mut stdout = child.stdout.take().expect("it is piped");
        stdout.read_exact(&mut [0; 10]).expect("some bytes");
        drop(stdout);
        let output = child.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{arguments:?}: {} {said}", output.status);
    }
}

/// Starts it in a terminal of its own. Returns the terminal's other end.
fn in_terminal(command: &Command) -> (Child, File) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudo-terminal");
    grantpt(&master).and_then(|()| unlockpt(&master)).expect("it is ours");
    let name = ptsname(&master, Vec::new()).expect("a name").into_string().expect("UTF-8");
    let slave = || File::options().read(true).write(true).open(&name).expect("the terminal");
    // Its standard input becomes the controlling terminal, so that Ctrl-C is a signal.
    let mut inside = Command::new("setsid");
    inside.args(["--ctty", "--wait"]).arg(command.get_program()).args(command.get_args());
    inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?)))).env("TERM", "xterm");
    inside.current_dir(command.get_current_dir().expect("it has one"));
    let child = inside.stdin(slave()).stdout(slave()).stderr(slave()).spawn().expect("setsid runs");
    (child, File::from(master))
}

/// Reads from a terminal until this text has come, or it has ended. Returns all that was read.
fn read_until(terminal: &mut File, text: &str) -> String {
    let (mut all, mut piece) = (String::new(), [0; 4096]);
    while !all.contains(text) {
        match terminal.read(&mut piece) {
            Ok(length) if length > 0 => all += &String::from_utf8_lossy(&piece[..length]),
            _ => break,
        }
    }
    all
}

#[test]
fn ctrl_c_at_a_terminal_leaves_a_copy_that_goes_on() {
    let site = Site::new();
    let content = bytes(24 << 20);
    fs::write(site.there("a"), &content).expect("a file");
    let slow = site.raio(&["cp", ":/e/a", "b", "--bwlimit", "16M"]);
    let (mut child, mut terminal) = in_terminal(&slow);
    let shown = read_until(&mut terminal, "left");
    assert!(shown.contains("copy") && shown.contains('%'), "there is a bar with rate and ETA: {shown:?}");
    await_blocks(&site, 2);
    terminal.write_all(b"\x03").expect("Ctrl-C");
    let status = child.wait().expect("it ends");
    let said = read_until(&mut terminal, "\0");
    assert_eq!(status.code(), Some(130), "{said}");
    assert!(said.contains("Interrupted.") && said.contains("--resume"), "{said}");
    assert!(!site.here("b").exists() && site.left_here().len() == 2, "{:?}", site.left_here());
    let report = site.json(&["cp", ":/e/a", "b", "--resume", "--json"]);
    let resumed = report["resumed_bytes"].as_u64().expect("a number");
    assert!(resumed >= 2 << 20, "{report}");
    assert_eq!(report["copied_bytes"].as_u64(), Some((24 << 20) - resumed), "{report}");
    assert!(fs::read(site.here("b")).expect("a file") == content);
    assert_eq!(site.left_here(), ["b"].map(String::from).into());
}

#[test]
fn output_has_colours_at_a_terminal_unless_they_are_not_wanted() {
    let site = Site::new();
    let doctor = |no_color: bool| {
        let mut command = site.raio(&["doctor"]);
        if no_color {
            command.env("NO_COLOR", "1");
        }
        let (mut child, mut terminal) = in_terminal(&command);
        let shown = read_until(&mut terminal, "MTU");
        child.wait().expect("it ends");
        shown
    };
    assert!(doctor(false).contains("\x1b[32m"));
    assert!(!doctor(true).contains('\x1b'));
    assert!(!String::from_utf8_lossy(&site.run(&["doctor"])).contains('\x1b'), "and none in a pipe");
}

/// The journal of a copy of `a`, beside `b` or of a file of the server.
fn journal(site: &Site) -> Option<PathBuf> {
    [site.here(""), site.directory.path().join("state/raio")]
        .iter()
        .filter_map(|directory| fs::read_dir(directory).ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|it| it == "journal"))
}

/// Waits until a copy has noted this number of blocks.
fn await_blocks(site: &Site, blocks: u64) {
    let deadline = Instant::now() + PATIENCE;
    // Behind the first line, which is of the subject, each block has 16 bytes.
    let noted = || {
        let bytes = fs::read(journal(site)?).ok()?;
        let line = bytes.iter().position(|&byte| byte == b'\n')?;
        Some((bytes.len() - line) as u64 / 16)
    };
    while noted() < Some(blocks) {
        assert!(Instant::now() < deadline, "the copy does not get on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_copy_that_is_killed_at_random_moments_goes_on_and_is_right() {
    let seed = seed();
    let mut random = Random::with_seed(seed);
    for (from, to) in [(":/e/a", "b"), ("a", ":/e/b")] {
        let site = Site::new();
        let mut content = bytes(32 << 20);
        // Some of it is zeros.
        content[9 << 20..12 << 20].fill(0);
        let (source, copy) = match to {
            "b" => (site.there("a"), site.here("b")),
            _ => (site.here("a"), site.there("b")),
        };
        fs::write(&source, &content).expect("a file");
        let mut kills = 0;
        let report = loop {
            let mut command = site.raio(&["cp", from, to, "--resume", "--json", "--bwlimit", "64M"]);
            let mut child =
                command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("raio starts");
            std::thread::sleep(Duration::from_millis(random.below(200)));
            if kills < 8 {
                kill_process(Pid::from_child(&child), Signal::KILL).expect("it is there, or a zombie");
                kills += 1;
                if !child.wait().expect("it ends").success() {
                    continue;
                }
                break Value::Null;
            }
            let output = child.wait_with_output().expect("it ends");
            assert!(output.status.success(), "seed {seed}");
            break serde_json::from_slice(&output.stdout).expect("JSON");
        };
        assert!(fs::read(&copy).expect("a file") == content, "seed {seed}, {from} to {to}: {report}");
        assert_eq!(journal(&site), None, "nothing is left");
    }
}

#[test]
fn what_was_damaged_since_an_interruption_is_copied_again() {
    for (from, to) in [(":/e/a", "b"), ("a", ":/e/b")] {
        let site = Site::new();
        let content = bytes(24 << 20);
        let source = if to == "b" { site.there("a") } else { site.here("a") };
        fs::write(source, &content).expect("a file");
        let mut child = site.raio(&["cp", from, to, "--bwlimit", "32M"]).spawn().expect("raio starts");
        await_blocks(&site, 8);
        child.kill().and_then(|()| child.wait()).expect("it is killed");
        let partial = match to {
            "b" => site.left_here().into_iter().find(|it| !it.ends_with("journal")).map(|it| site.here(&it)),
            _ => {
                let entries = fs::read_dir(site.there("")).expect("a directory");
                let mut paths = entries.map(|entry| entry.expect("an entry").path());
                paths.find(|path| path.to_string_lossy().contains(".partial-"))
            }
        };
        let partial = File::options().read(true).write(true).open(partial.expect("a file")).expect("a file");
        // Of the same size, and the journal says that these bytes were written.
        partial.write_all_at(b"damage", 100).expect("a write");
        let output = site.raio(&["cp", from, to, "--resume", "--json"]).output().expect("raio runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("copied again"), "{said}");
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert!(report["resumed_bytes"].as_u64() >= Some(4 << 20), "{report}");
        site.run(&["cmp", from, to]);
    }
}

#[test]
fn a_source_that_was_changed_is_copied_from_its_start() {
    let site = Site::new();
    fs::write(site.there("a"), bytes(24 << 20)).expect("a file");
    let mut child = site.raio(&["cp", ":/e/a", "b", "--bwlimit", "32M"]).spawn().expect("raio starts");
    await_blocks(&site, 4);
    child.kill().and_then(|()| child.wait()).expect("it is killed");
    let mut content = bytes(24 << 20);
    content.reverse();
    fs::write(site.there("a"), &content).expect("a file");
    let output = site.raio(&["cp", ":/e/a", "b", "--resume", "--json"]).output().expect("raio runs");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["resumed_bytes"], 0, "{report}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("nothing to resume"));
    assert!(fs::read(site.here("b")).expect("a file") == content);
}

#[test]
fn copies_go_on_when_the_server_is_started_again() {
    let mut site = Site::new();
    let content = bytes(32 << 20);
    fs::write(site.there("a"), &content).expect("a file");
    fs::write(site.here("c"), &content).expect("a file");
    let listen = site.server.listen_url();
    let down = site.raio(&["cp", ":/e/a", "b", "--bwlimit", "16M"]).spawn().expect("raio starts");
    let up = site.raio(&["cp", "c", ":/e/d", "--bwlimit", "16M"]).spawn().expect("raio starts");
    for signal in [Signal::TERM, Signal::KILL] {
        std::thread::sleep(Duration::from_millis(400));
        site.server.signal(signal);
        site.server.wait();
        site.server = Site::serve(site.directory.path(), &listen);
    }
    for child in [down, up] {
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{}", output.status);
    }
    assert!(fs::read(site.here("b")).expect("a file") == content);
    assert!(fs::read(site.there("d")).expect("a file") == content);
}

#[test]
fn the_destination_has_its_old_content_until_the_copy_is_whole() {
    let site = Site::new();
    let content = bytes(17 << 20);
    fs::write(site.there("a"), &content).expect("a file");
    fs::write(site.here("b"), "old").expect("a file");
    let mut child = site.raio(&["cp", ":/e/a", "b", "--bwlimit", "64M"]).spawn().expect("raio starts");
    await_blocks(&site, 3);
    assert_eq!(fs::read(site.here("b")).expect("a file"), b"old");
    let second = site.raio(&["cp", ":/e/a", "b"]).output().expect("raio runs");
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(code(&second) == Some(1) && said.contains("Another raio cp"), "{said}");
    assert!(child.wait().expect("it ends").success());
    assert!(fs::read(site.here("b")).expect("a file") == content);
}

#[test]
fn attributes_are_preserved_if_that_is_wanted() {
    let site = Site::new();
    fs::write(site.there("a"), "x").expect("a file");
    let file = File::options().write(true).open(site.there("a")).expect("a file");
    let long_ago = std::time::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    file.set_modified(long_ago).expect("a time");
    fs::set_permissions(site.there("a"), fs::Permissions::from_mode(0o751)).expect("it is ours");
    site.run(&["cp", "--preserve", ":/e/a", "b"]);
    let copy = site.here("b").metadata().expect("a file");
    assert_eq!((copy.mode() & 0o7777, copy.modified().expect("a time")), (0o751, long_ago));
    site.run(&["cp", ":/e/a", "c"]);
    assert_ne!(site.here("c").metadata().expect("a file").modified().expect("a time"), long_ago);
}

#[test]
fn progress_in_json_has_rate_and_eta() {
    let site = Site::new();
    fs::write(site.there("a"), bytes(5 << 20)).expect("a file");
    let arguments = ["cp", ":/e/a", "b", "--bwlimit", "2M", "--progress", "json"];
    let output = site.raio(&arguments).output().expect("raio runs");
    let said = String::from_utf8(output.stderr).expect("UTF-8");
    let lines: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(!lines.is_empty() && output.status.success(), "{said}");
    for line in &lines {
        assert_documented("cp", line);
        assert_eq!((&line["progress"], &line["size"]), (&"copy".into(), &(5 << 20).into()));
        assert!(line["eta_seconds"].as_f64().is_some_and(|it| (0.0..10.0).contains(&it)), "{line}");
    }
}

#[test]
fn a_unix_socket_is_named_in_the_url_behind_the_path() {
    let mut site = Site::new();
    let socket = site.directory.path().join("socket");
    site.server = Site::serve(site.directory.path(), &format!("unix://{}", socket.display()));
    let content = bytes(3 << 20);
    fs::write(site.here("a"), &content).expect("a file");
    let there = format!("raio+unix:///e/a?socket={}", socket.display());
    site.run(&["cp", "--verify", "a", &there]);
    assert!(site.run(&["cat", ":/e/a"]) == content, "and RAIO_URL may be one");
    assert_eq!(site.json(&["info", "--json"])["transport"], "unix");
    site.run(&["ping", "--count", "10"]);
}

#[test]
fn keys_encrypt_what_is_copied_and_who_has_none_is_refused() {
    let client = Client::new();
    let keyed = raio_e2e::Site::new(&client.entry("me", r#"exports = { data = "rw", logs = "ro" }"#));
    client.trust(&keyed);
    let site = Site::new();
    let url = keyed.server.url();
    let keys = client.keys.path().to_str().expect("UTF-8");
    let with = ["--keys", keys, "--url", &url];
    let content = bytes(3 << 20);
    fs::write(site.here("a"), &content).expect("a file");
    site.run(&[&["cp", "--verify", "a", ":/data/a"], &with[..]].concat());
    assert!(site.run(&[&["cat", ":/data/a"], &with[..]].concat()) == content);
    let info = site.json(&[&["info", "--json"], &with[..]].concat());
    assert_eq!(info["encrypted"], true, "{info}");
    assert_eq!(info["client_key"], client.key.to_string(), "{info}");
    assert_eq!(info["trusted_keys"], serde_json::json!([keyed.host_key().to_string()]), "{info}");
    site.run(&[&["ping", "--count", "10"], &with[..]].concat());
    let stranger = Client::new();
    stranger.trust(&keyed);
    let stranger = stranger.keys.path().to_str().expect("UTF-8");
    for (arguments, keys) in [
        (["cp", "a", ":/logs/a"], keys),
        (["cp", "a", ":/data/a"], stranger),
        (["cmp", "a", ":/data/a"], stranger),
    ] {
        let output = site.raio(&arguments).args(["--keys", keys, "--url", &url]).output().expect("raio runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(code(&output), Some(4), "{arguments:?}: {said}");
    }
}
