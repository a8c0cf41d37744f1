//! Whole directories by `raio`: `cp -r` and `sync`, there and back, changed, killed, and with failures.

mod tool_site;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use raio_e2e::{PATIENCE, Proxy, Random, Server, Treatment, seed};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tool_site::{Site, assert_documented, bytes, code};

/// What a tree consists of: for each path type and permissions, time, and contents.
type Tree = BTreeMap<PathBuf, (u32, i64, Vec<u8>)>;

/// All that is in a directory. With `with_times` also when it was changed.
fn tree(root: &Path, with_times: bool) -> Tree {
    fn add(root: &Path, below: &Path, with_times: bool, all: &mut Tree) {
        let path = root.join(below);
        let it = fs::symlink_metadata(&path).expect("it is there");
        let content = match it.mode() & libc::S_IFMT {
            libc::S_IFREG => fs::read(&path).expect("a file"),
            libc::S_IFLNK => fs::read_link(&path).expect("a link").into_os_string().into_vec(),
            _ => Vec::new(),
        };
        let time = if with_times { it.mtime() * 1_000_000_000 + it.mtime_nsec() } else { 0 };
        all.insert(below.to_owned(), (it.mode(), time, content));
        if it.is_dir() {
            for entry in fs::read_dir(&path).expect("a directory") {
                add(root, &below.join(entry.expect("an entry").file_name()), with_times, all);
            }
        }
    }
    let mut all = Tree::new();
    add(root, Path::new(""), with_times, &mut all);
    all
}

/// Asserts that two trees are the same, and says where they are not.
fn assert_same(one: &Tree, other: &Tree, what: &str) {
    let short = |it: Option<&(u32, i64, Vec<u8>)>| it.map(|(mode, time, all)| (*mode, *time, all.len()));
    for path in one.keys().chain(other.keys()) {
        let (a, b) = (one.get(path), other.get(path));
        assert!(a == b, "{what}: {} differs: {:?} and {:?}", path.display(), short(a), short(b));
    }
}

fn set_time(path: &Path, seconds: i64, ns: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: ns };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).expect("it is ours");
}

/// Makes a tree of everything that a tree may have, by the numbers of `random`.
fn grow(root: &Path, random: &mut Random) {
    fs::create_dir(root).expect("a directory");
    let mut directories = vec![root.to_owned()];
    let name = |random: &mut Random, number: u64| {
        let mut name = number.to_string().into_bytes();
        match random.below(4) {
            0 => name.resize(255, b'n'),
            1 => name.extend_from_slice(b"\xff\xfe \n\"*"),
            _ => {}
        }
        OsString::from_vec(name)
    };
    for number in 0..120 {
        let place = random.below(directories.len() as u64) as usize;
        let long = directories[place].as_os_str().len() > 2500;
        let name = if long { OsString::from(number.to_string()) } else { name(random, number) };
        let path = directories[place].join(name);
        match random.below(8) {
            0 | 1 => {
                fs::create_dir(&path).expect("a directory");
                directories.push(path);
            }
            2 => symlink(OsStr::from_bytes(b"nowhere/\xff"), &path).expect("a link"),
            3 => {
                let file = File::create(&path).expect("a file");
                file.set_len(3 << 20).expect("a size");
                file.write_all_at(b"data", random.below(3 << 20)).expect("a write");
            }
            _ => {
                let sizes = [0, 1, 4095, 70_000, 1 << 20, (1 << 20) + 1];
                fs::write(&path, bytes(sizes[random.below(6) as usize])).expect("a file");
            }
        }
    }
    let mut deep = root.join("deep");
    for level in 0..40 {
        fs::create_dir(&deep).expect("a directory");
        fs::write(deep.join("f"), [level]).expect("a file");
        directories.push(deep.clone());
        deep.push(format!("level {level}"));
    }
    // Times last, and those of directories after what is in them.
    let mut paths: Vec<_> = tree(root, false).into_iter().collect();
    paths.reverse();
    for (below, (mode, ..)) in paths {
        let path = root.join(below);
        if mode & libc::S_IFMT != libc::S_IFLNK {
            // The server can read all of it.
            let others = if mode & libc::S_IFMT == libc::S_IFDIR { 0o750 } else { 0o640 };
            let permissions = [0o755, 0o700, others, 0o777, 0o555][random.below(5) as usize];
            fs::set_permissions(&path, fs::Permissions::from_mode(permissions)).expect("it is ours");
        }
        set_time(&path, 1_000_000_000 + random.below(1 << 29) as i64, random.below(1_000_000_000) as i64);
    }
}

#[test]
fn a_tree_is_the_same_after_the_way_to_a_server_to_another_place_there_and_back() {
    let seed = seed();
    let mut random = Random::with_seed(seed);
    for (command, options) in [("cp", &["-r", "--preserve"][..]), ("sync", &["--connections", "3"])] {
        let site = Site::new();
        grow(&site.here("a"), &mut random);
        for (from, to) in [("a", ":/e/b"), (":/e/b", ":/e/c"), (":/e/c", "d"), ("d", "e")] {
            let output = site.raio(&[&[command], options, &[from, to]].concat()).output().expect("raio runs");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && said.is_empty(), "seed {seed}: {from} {to}: {said}");
        }
        let original = tree(&site.here("a"), true);
        for copy in [site.there("b"), site.there("c"), site.here("d"), site.here("e")] {
            assert_same(
                &original,
                &tree(&copy, true),
                &format!("seed {seed}, {command}: {}", copy.display()),
            );
        }
        let is_sparse =
            |path: &PathBuf| site.here("a").join(path).symlink_metadata().expect("it").len() == 3 << 20;
        for path in original.keys().filter(|path| is_sparse(path)) {
            let it = site.there("b").join(path).metadata().expect("a file");
            assert!(it.blocks() * 512 <= 2 << 20, "{} has lost its holes", path.display());
        }
    }
}

#[test]
fn a_directory_goes_into_one_that_is_there_and_becomes_one_that_is_not() {
    let site = Site::new();
    fs::create_dir_all(site.here("a/b")).expect("directories");
    fs::write(site.here("a/b/f"), "1").expect("a file");
    fs::write(site.here("g"), "2").expect("a file");
    site.run(&["cp", "-r", "a", ":/e/new"]);
    assert_eq!(fs::read(site.there("new/b/f")).expect("a file"), b"1");
    site.run(&["cp", "-r", "a", "g", ":/e/new"]);
    assert_eq!(fs::read(site.there("new/a/b/f")).expect("a file"), b"1");
    assert_eq!(fs::read(site.there("new/g")).expect("a file"), b"2");
    fs::write(site.there("new/b/f"), "old and longer").expect("a file");
    fs::write(site.there("new/b/other"), "stays").expect("a file");
    site.run(&["cp", "-r", ":/e/new/a", "c"]);
    fs::create_dir(site.here("new")).expect("a directory");
    fs::rename(site.here("a"), site.here("new/b2")).expect("it is ours");
    fs::rename(site.here("new/b2/b"), site.here("new/b")).expect("it is ours");
    site.run(&["cp", "-r", "new", ":/e/"]);
    assert_eq!(fs::read(site.there("new/b/f")).expect("a file"), b"1", "it is replaced");
    assert_eq!(fs::read(site.there("new/b/other")).expect("a file"), b"stays");
}

#[test]
fn links_are_followed_if_that_is_wanted_but_not_for_ever() {
    let site = Site::new();
    fs::create_dir_all(site.here("a/d")).expect("directories");
    fs::write(site.here("a/d/f"), "1").expect("a file");
    symlink("d", site.here("a/to_directory")).expect("a link");
    symlink("d/f", site.here("a/to_file")).expect("a link");
    site.run(&["cp", "-rL", "a", ":/e/a"]);
    for name in ["a/to_directory/f", "a/to_file"] {
        assert_eq!(fs::read(site.there(name)).expect("a file"), b"1", "{name}");
        assert!(!site.there(name).is_symlink());
    }
    symlink("..", site.here("a/d/up")).expect("a link");
    symlink("none", site.here("a/dangling")).expect("a link");
    let output = site.raio(&["cp", "-rL", "a", ":/e/b"]).output().expect("raio runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(code(&output), Some(1), "{said}");
    assert!(said.contains("to a directory above it") && said.contains("dangling symbolic link"), "{said}");
    assert_eq!(fs::read(site.there("b/to_file")).expect("a file"), b"1", "the others went on");
}

#[test]
fn nothing_is_written_where_a_link_in_the_destination_leads() {
    let site = Site::new();
    fs::create_dir_all(site.there("a/d")).expect("directories");
    fs::write(site.there("a/d/f"), "new").expect("a file");
    fs::create_dir_all(site.here("outside")).expect("a directory");
    fs::create_dir_all(site.here("copy")).expect("a directory");
    symlink("../outside", site.here("copy/d")).expect("a link");
    let output = site.raio(&["cp", "-r", ":/e/a/d", "copy"]).output().expect("raio runs");
    assert_ne!(code(&output), Some(0), "the name is taken by a link");
    fs::create_dir(site.here("copy/a")).expect("a directory");
    symlink("../../outside", site.here("copy/a/d")).expect("a link");
    let output = site.raio(&["cp", "-r", ":/e/a", "copy"]).output().expect("raio runs");
    assert_eq!(code(&output), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::read_dir(site.here("outside")).expect("a directory").count(), 0);
    site.run(&["sync", ":/e/a", "copy/a"]);
    assert_eq!(fs::read(site.here("copy/a/d/f")).expect("a file"), b"new", "sync takes the link away");
    assert_eq!(fs::read_dir(site.here("outside")).expect("a directory").count(), 0);
}

/// What `raio sync --json` counted.
fn sync(site: &Site, arguments: &[&str]) -> Value {
    let stdout = site.run(&[&["sync", "--json"], arguments].concat());
    let text = String::from_utf8(stdout).expect("UTF-8");
    for line in text.lines() {
        assert_documented("sync", &serde_json::from_str(line).expect("JSON"));
    }
    serde_json::from_str(text.lines().last().expect("a line")).expect("JSON")
}

#[test]
fn a_sync_of_what_is_unchanged_does_nothing_and_of_what_changed_only_that() {
    let site = Site::new();
    let mut random = Random::with_seed(7);
    grow(&site.here("a"), &mut random);
    let first = sync(&site, &["a", ":/e/a"]);
    assert!(first["copied"].as_u64() > Some(40) && first["unchanged"] == 0, "{first}");
    let before = tree(&site.there("a"), true);
    let inode = |name| site.there(name).metadata().expect("a file").ino();
    let kept = inode("a/deep/f");
    let second = sync(&site, &["a", ":/e/a"]);
    assert_eq!((&second["copied"], &second["links"], &second["deleted"]), (&0.into(), &0.into(), &0.into()));
    assert_eq!(second["files"], first["files"], "{second}");
    assert_eq!(inode("a/deep/f"), kept);
    assert_same(&before, &tree(&site.there("a"), true), "nothing was changed");
    let set = |name| fs::set_permissions(site.here(name), fs::Permissions::from_mode(0o755)).expect("ours");
    set("a/deep");
    fs::write(site.here("a/deep/f"), "changed").expect("a file");
    fs::write(site.here("a/deep/new"), "new").expect("a file");
    fs::create_dir(site.here("a/deep/empty")).expect("a directory");
    let third = sync(&site, &["a", ":/e/a"]);
    assert_eq!(third["copied"], 2, "{third}");
    assert_same(&tree(&site.here("a"), true), &tree(&site.there("a"), true), "what changed has arrived");
    let back = sync(&site, &[":/e/a", "b"]);
    assert_eq!(back["files"], third["files"], "{back}");
    assert_eq!(sync(&site, &[":/e/a", "b"])["copied"], 0);
}

#[test]
fn contents_are_compared_if_that_is_wanted() {
    let site = Site::new();
    fs::create_dir(site.here("a")).expect("a directory");
    let large = bytes(3 << 20);
    fs::write(site.here("a/large"), &large).expect("a file");
    fs::write(site.here("a/small"), "1234").expect("a file");
    sync(&site, &["a", ":/e/a"]);
    let mut other = large.clone();
    other[2 << 20] ^= 1;
    for (name, content) in [("a/large", &other[..]), ("a/small", b"12x4")] {
        let time = site.there(name).metadata().expect("a file").modified().expect("a time");
        fs::write(site.there(name), content).expect("a file");
        File::options()
            .write(true)
            .open(site.there(name))
            .and_then(|it| it.set_modified(time))
            .expect("a time");
    }
    assert_eq!(sync(&site, &["a", ":/e/a"])["copied"], 0, "sizes and times are the same");
    assert_eq!(sync(&site, &["--checksum", "a", ":/e/a"])["copied"], 2);
    assert!(fs::read(site.there("a/large")).expect("a file") == large);
    set_time(&site.there("a/large"), 5, 0);
    let only_time = sync(&site, &["--checksum", "a", ":/e/a"]);
    assert_eq!((&only_time["copied"], &only_time["unchanged"]), (&0.into(), &2.into()));
    assert_ne!(site.there("a/large").metadata().expect("a file").mtime(), 5, "its time is set");
}

#[test]
fn what_the_source_does_not_have_is_removed_only_if_that_is_wanted() {
    let site = Site::new();
    for name in ["a/d", "a/was_file"] {
        fs::create_dir_all(site.here(name)).expect("directories");
    }
    fs::write(site.here("a/d/f"), "1").expect("a file");
    fs::write(site.here("a/was_directory"), "1").expect("a file");
    for name in ["a/extra/deep", "a/was_directory/x", "a/kept"] {
        fs::create_dir_all(site.there(name)).expect("directories");
    }
    fs::write(site.there("a/extra/deep/f.tmp"), "").expect("a file");
    fs::write(site.there("a/extra/deep/g"), "").expect("a file");
    fs::write(site.there("a/was_file"), "").expect("a file");
    let before = tree(&site.there("a"), true);
    let arguments =
        ["sync", "--delete", "--dry-run", "--exclude", "*.tmp", "--exclude", "/kept", "a", ":/e/a"];
    let shown = String::from_utf8(site.run(&arguments)).expect("UTF-8");
    for line in [
        "copy   d/f",
        "mkdir  d",
        "delete extra/deep/g",
        "delete was_directory/x",
        "copy   was_directory",
        "delete was_file",
    ] {
        assert!(shown.lines().any(|it| it == line), "{line:?} is not in {shown}");
    }
    assert!(!shown.contains("f.tmp") && !shown.contains("kept"), "{shown}");
    assert_same(&before, &tree(&site.there("a"), true), "--dry-run changes nothing");
    assert!(!site.directory.path().join("state/raio").exists(), "it creates no directory for journals");
    let output = site.raio(&["sync", "a", ":/e/a"]).output().expect("raio runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(code(&output) == Some(1) && said.contains("--delete removes it"), "{said}");
    assert!(site.there("a/extra/deep/g").exists() && site.there("a/d/f").exists());
    site.run(&[&["sync", "--delete"], &arguments[3..]].concat());
    assert!(site.there("a/extra/deep/f.tmp").exists() && site.there("a/kept").exists());
    assert!(!site.there("a/extra/deep/g").exists() && site.there("a/was_file").is_dir());
    sync(&site, &["--delete", "a", ":/e/a"]);
    assert_same(&tree(&site.here("a"), true), &tree(&site.there("a"), true), "it is like the source");
}

#[test]
fn a_copy_of_a_tree_that_is_killed_is_whole_after_a_second_run() {
    let seed = seed();
    let mut random = Random::with_seed(seed);
    for (from, to) in [("a", ":/e/b"), (":/e/a", "b")] {
        let site = Site::new();
        let (source, copy) = match to {
            "b" => (site.there("a"), site.here("b")),
            _ => (site.here("a"), site.there("b")),
        };
        grow(&source, &mut random);
        let mut kills = 0;
        while kills < 5 {
            let mut command = site.raio(&["cp", "-r", "--preserve", from, to]);
            // It would go into the copy that is there.
            if kills > 0 {
                command = site.raio(&["sync", from, to]);
            }
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("raio starts");
            let deadline = Instant::now() + PATIENCE;
            while kills == 0 && !copy.exists() && child.try_wait().expect("a child").is_none() {
                assert!(Instant::now() < deadline, "the copy does not begin");
            }
            std::thread::sleep(Duration::from_millis(random.below(60)));
            kill_process(Pid::from_child(&child), Signal::KILL).expect("it is there, or a zombie");
            child.wait().expect("it ends");
            kills += 1;
        }
        site.run(&["sync", "--delete", from, to]);
        assert_same(&tree(&source, true), &tree(&copy, true), &format!("seed {seed}, {from} to {to}"));
    }
}

/// The partial files and links in a directory.
fn partials(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let of_a_file = |path: &PathBuf| {
        let name = path.to_string_lossy();
        name.contains(".partial-") && !name.contains(".journal")
    };
    paths.filter(of_a_file).collect()
}

/// Runs a copy over a long way, and kills it when there are this many partial files in a directory.
fn kill_in_the_middle(proxy: &Proxy, mut command: Command, directory: &Path, count: usize) {
    proxy.treat(Treatment { delay: Duration::from_millis(50), ..Treatment::default() });
    let mut child = command.env("RAIO_URL", proxy.url()).stderr(Stdio::null()).spawn().expect("raio starts");
    let deadline = Instant::now() + PATIENCE;
    while partials(directory).len() < count {
        let runs = child.try_wait().expect("a child").is_none();
        assert!(runs && Instant::now() < deadline, "no partial files");
        std::thread::sleep(Duration::from_millis(1));
    }
    kill_process(Pid::from_child(&child), Signal::KILL).expect("it is there, or a zombie");
    child.wait().expect("it ends");
    proxy.treat(Treatment::default());
}

#[test]
fn a_sync_that_deletes_does_not_delete_the_partial_files_that_it_writes_itself() {
    let site = Site::new();
    fs::create_dir(site.here("a")).expect("a directory");
    for number in 0..64 {
        fs::write(site.here(&format!("a/{number}")), bytes((1 << 20) + 1)).expect("a file");
    }
    let sync = ["sync", "--connections", "32", "a", ":/e/b"];
    let proxy = Proxy::start(site.server.address());
    kill_in_the_middle(&proxy, site.raio(&sync), &site.there("b"), 4);
    site.run(&[&sync[..], &["--delete"]].concat());
    assert_same(&tree(&site.here("a"), true), &tree(&site.there("b"), true), "the copy");
}

#[test]
fn a_copy_of_read_only_files_that_is_killed_goes_on_without_privileges() {
    for (arguments, source, copy, directory) in [
        (&["sync", "a", ":/e/b"][..], "here/a", "there/b", "there/b"),
        (&["sync", ":/e/a", "b"], "there/a", "here/b", "here/b"),
        (&["cp", "a/0", ":/e/b"], "here/a", "there/b", "there"),
        (&["cp", ":/e/a/0", "b"], "there/a", "here/b", "here"),
    ] {
        let site = Site::new();
        let path = |name: &str| match name.split_once('/').unwrap_or((name, "")) {
            ("here", name) => site.here(name),
            (_, name) => site.there(name),
        };
        fs::create_dir(path(source)).expect("a directory");
        for number in 0..2 {
            let file = path(source).join(number.to_string());
            fs::write(&file, bytes(17 << 20)).expect("a file");
            fs::set_permissions(&file, fs::Permissions::from_mode(0o444)).expect("it is ours");
        }
        let proxy = Proxy::start(site.server.address());
        kill_in_the_middle(&proxy, site.raio(arguments), &path(directory), 1);
        for partial in partials(&path(directory)) {
            let mode = fs::metadata(&partial).expect("it is there").mode();
            assert_eq!(mode & 0o700, 0o600, "{arguments:?} can go on");
            // Just before it is renamed it has them.
            fs::set_permissions(&partial, fs::Permissions::from_mode(0o444)).expect("it is ours");
        }
        // Root may write to all files with this capability.
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set=-dac_override", "--inh-caps=-dac_override"]);
        let raio = site.raio(arguments);
        command.arg(raio.get_program()).args(raio.get_args());
        command.current_dir(raio.get_current_dir().expect("the site's"));
        command.envs(raio.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let output = command.env("RAIO_URL", proxy.url()).output().expect("setpriv runs");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        let whole = path(copy);
        let whole = if whole.is_dir() { whole.join("0") } else { whole };
        let same = fs::read(&whole).expect("a file") == fs::read(path(source).join("0")).expect("a file");
        let mode = fs::metadata(&whole).expect("a file").mode();
        assert!(same && mode & 0o777 == 0o444, "{arguments:?}: {mode:o}");
        assert_eq!(partials(&path(directory)), [] as [PathBuf; 0], "{arguments:?}");
    }
}

#[test]
fn failures_of_single_files_are_counted_and_the_others_go_on() {
    let site = Site::new();
    fs::create_dir_all(site.here("a/d")).expect("directories");
    for name in ["a/1", "a/2", "a/d/3"] {
        fs::write(site.here(name), name).expect("a file");
    }
    rustix::fs::mkfifoat(CWD, site.here("a/d/pipe"), rustix::fs::Mode::RUSR).expect("a pipe");
    // A directory is where a file is to go.
    fs::create_dir_all(site.there("b/a/1/x")).expect("directories");
    let output = site.raio(&["cp", "-r", "--json", "a", ":/e/b"]).output().expect("raio runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(code(&output), Some(1), "{said}");
    assert!(
        said.contains("neither a file") && said.contains("b/a/1") && said.contains("2 of a have"),
        "{said}"
    );
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_documented("cp", &report);
    assert_eq!((&report["failed"], &report["copied"]), (&2.into(), &2.into()), "{report}");
    assert_eq!(fs::read(site.there("b/a/d/3")).expect("a file"), b"a/d/3");
    let output = site.raio(&["cp", "-r", "--fail-fast", "a", ":/e/b"]).output().expect("raio runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(code(&output) == Some(1) && !said.contains("have failed"), "{said}");
    for (arguments, status, needle) in [
        (&["cp", "a", ":/e/c"][..], 2, "copy with -r"),
        (&["cp", "-r", "none", ":/e/c"], 3, "No such file"),
        (&["cp", "-r", ":/e/none", "c"], 3, "No such file"),
        (&["cp", "-r", "a", ":/e/none/c"], 3, "No such file"),
        (&["cp", "-r", "a", ":/ro/c"], 4, "ead-only"),
        (&["cp", "-r", "a", ":/ro/b"], 4, "ead-only"),
        (&["cp", "-r", "a", "raio://127.0.0.1:1/e/c"], 5, "Connection refused"),
        (&["cp", "-r", "--inplace", "a", ":/e/c"], 2, "single files"),
        (&["cp", "-r", "--resume", "a", ":/e/b"], 2, "With --resume write :/e/b/"),
        (&["cp", "-r", "a", "a/d/e"], 2, "one is in the other"),
        (&["cp", "-r", ":/e/b", ":/e/b/a/c"], 2, "one is in the other"),
        (&["sync", "a", "a"], 2, "one is in the other"),
        (&["sync", "none", ":/e/c"], 3, "does not exist"),
        (&["sync", ":/e/none", "c"], 3, "does not exist"),
        (&["sync", "a", ":/ro/c"], 4, "ead-only"),
        (&["sync", "a/1", ":/e/c"], 3, "Not a directory"),
        (&["sync", "raio://127.0.0.1:1/e/c", "c"], 5, "Connection refused"),
        (&["sync", "-", ":/e/c"], 2, "no directory"),
    ] {
        let output = site.raio(arguments).output().expect("raio runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(code(&output), Some(status), "raio {arguments:?}: {said}");
        assert!(said.contains(needle), "raio {arguments:?}: {said}");
    }
}

#[test]
fn directories_are_compared_and_their_files_have_checksums() {
    let site = Site::new();
    let mut random = Random::with_seed(11);
    grow(&site.here("a"), &mut random);
    sync(&site, &["a", ":/e/a"]);
    site.run(&["cmp", "-r", "a", ":/e/a"]);
    let sums = |root: &str| {
        let text = site.run(&["checksum", "-r", root]);
        let text = String::from_utf8_lossy(&text).into_owned();
        text.replace(&format!("  {root}/"), "  ")
    };
    let files =
        tree(&site.here("a"), false).values().filter(|it| it.0 & libc::S_IFMT == libc::S_IFREG).count();
    assert!(sums("a") == sums(":/e/a") && sums("a").matches("  ").count() >= files, "{}", sums("a"));
    let deep = site.there("a/deep");
    fs::set_permissions(&deep, fs::Permissions::from_mode(0o755)).expect("it is ours");
    fs::write(deep.join("f"), "y").expect("a file");
    fs::write(deep.join("extra"), "").expect("a file");
    fs::remove_dir_all(deep.join("level 0/level 1")).expect("a directory");
    fs::write(deep.join("level 0/level 1"), "").expect("a file");
    let output = site.raio(&["cmp", "-r", "--json", "a", ":/e/a"]).output().expect("raio runs");
    assert_eq!(code(&output), Some(6), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).expect("UTF-8");
    let mut found: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    found.iter().for_each(|object| assert_documented("cmp", object));
    found.sort_by_key(|it| it["path"].to_string());
    let found: Vec<_> = found.iter().map(|it| (it["path"].as_str(), it["differs"].as_str())).collect();
    let expected = [("deep/extra", "extra"), ("deep/f", "contents"), ("deep/level 0/level 1", "type")];
    assert_eq!(found, expected.map(|(path, differs)| (Some(path), Some(differs))));
    let output = site.raio(&["cmp", "-r", "none", ":/e/a"]).output().expect("raio runs");
    assert_eq!(code(&output), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_sync_goes_on_when_the_server_is_started_again_and_ends_soon_when_it_is_gone() {
    let mut site = Site::new();
    fs::create_dir(site.here("a")).expect("a directory");
    for number in 0..1500 {
        fs::write(site.here(&format!("a/{number}")), bytes(100 + number)).expect("a file");
    }
    let listen = site.server.listen_url();
    let arguments = ["sync", "a", ":/e/a", "--connections", "2", "--fsync"];
    let child = site.raio(&arguments).stderr(Stdio::piped()).spawn().expect("raio starts");
    let deadline = Instant::now() + PATIENCE;
    while fs::read_dir(site.there("a")).map_or(0, Iterator::count) < 20 {
        assert!(Instant::now() < deadline, "the sync does not begin");
    }
    site.server.signal(Signal::TERM);
    site.server.wait();
    site.server = Site::serve(site.directory.path(), &listen);
    let output = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_same(&tree(&site.here("a"), true), &tree(&site.there("a"), true), "all has arrived");
    fs::remove_dir_all(site.there("a")).expect("a directory");
    let mut command = site.raio(&[&arguments[..], &["--timeout", "1"]].concat());
    let deadline = Instant::now() + PATIENCE;
    let child = command.stderr(Stdio::piped()).spawn().expect("raio starts");
    while fs::read_dir(site.there("a")).map_or(0, Iterator::count) < 20 {
        assert!(Instant::now() < deadline, "the sync does not begin");
    }
    site.server.signal(Signal::KILL);
    site.server.wait();
    let output = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(code(&output), Some(5), "{said}");
    assert!(said.lines().count() < 10, "it does not try every file: {said}");
}

#[test]
fn ctrl_c_leaves_no_partial_file_and_whole_files_only() {
    let site = Site::new();
    fs::create_dir(site.here("a")).expect("a directory");
    let content = bytes(5 << 20);
    for number in 0..20 {
        fs::write(site.here(&format!("a/{number}")), &content).expect("a file");
    }
    for (from, to) in [("a", ":/e/b"), ("a", "b")] {
        let copy = if to == "b" { site.here("b") } else { site.there("b") };
        let child = site.raio(&["cp", "-r", from, to, "--bwlimit", "20M"]).spawn().expect("raio starts");
        let deadline = Instant::now() + PATIENCE;
        while fs::read_dir(&copy).map_or(0, Iterator::count) < 2 {
            assert!(Instant::now() < deadline, "the copy does not begin");
        }
        kill_process(Pid::from_child(&child), Signal::INT).expect("it is there");
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(code(&output), Some(130));
        let left = tree(&copy, false);
        assert!((2..20).contains(&left.len()), "{:?}", left.keys());
        for (path, (mode, _, found)) in &left {
            let is_file = mode & libc::S_IFMT == libc::S_IFREG;
            assert!(!is_file || *found == content, "{} is not whole", path.display());
        }
    }
}

/// Runs `raio`, which must succeed. Returns the trace of libraio.
fn traced(site: &Site, command: &mut Command) -> Value {
    let trace = site.here("trace");
    let output = command.env("RAIO_TRACE", &trace).output().expect("raio runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = fs::read_to_string(&trace).expect("a trace");
    fs::remove_file(trace).expect("a trace");
    serde_json::from_str(&text).expect("JSON")
}

/// How many requests of this name were in flight at once at most, by a trace, and how many there were.
fn in_flight(trace: &Value, name: &str) -> (usize, usize) {
    let events = trace["traceEvents"].as_array().expect("events");
    let mut steps: Vec<(f64, bool)> = events
        .iter()
        .filter(|event| event["name"] == name && (event["ph"] == "b" || event["ph"] == "e"))
        .map(|event| (event["ts"].as_f64().expect("a time"), event["ph"] == "b"))
        .collect();
    steps.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let (mut now, mut most, mut all) = (0, 0, 0);
    for (_, begins) in steps {
        now = if begins { now + 1 } else { now - 1 };
        all += usize::from(begins);
        most = most.max(now);
    }
    (most, all)
}

#[test]
fn small_files_and_directories_do_not_wait_for_one_another_over_a_long_way() {
    let site = Site::new();
    fs::create_dir(site.here("a")).expect("a directory");
    for number in 0..200 {
        fs::write(site.here(&format!("a/{number}")), bytes(number * 7)).expect("a file");
    }
    for number in 0..40 {
        fs::create_dir(site.here(&format!("a/d{number}"))).expect("a directory");
        fs::write(site.here(&format!("a/d{number}/f")), [7; 9]).expect("a file");
    }
    let proxy = Proxy::start(site.server.address());
    proxy.treat(Treatment { delay: Duration::from_millis(20), ..Treatment::default() });
    for (from, to, counted) in [
        ("a", ":/e/b", &[("put", 240), ("mkdir", 40)][..]),
        (":/e/b", ":/e/c", &[("get", 240), ("put", 240), ("mkdir", 40)]),
        (":/e/c", "d", &[("get", 240)]),
    ] {
        let mut command = site.raio(&["cp", "-r", "--preserve", "--connections", "1", from, to]);
        let trace = traced(&site, command.env("RAIO_URL", proxy.url()));
        for &(name, number) in counted {
            let (most, all) = in_flight(&trace, name);
            assert_eq!(all, number, "{name} from {from} to {to}");
            assert!((20..=32).contains(&most), "{name} from {from} to {to}: {most} at once");
        }
    }
    assert_same(&tree(&site.here("a"), true), &tree(&site.here("d"), true), "there and back");
    for number in 0..200 {
        let read_only = fs::Permissions::from_mode(0o444);
        fs::set_permissions(site.here(&format!("a/{number}")), read_only).expect("it is ours");
    }
    let mut command = site.raio(&["sync", "--connections", "1", "a", ":/e/b"]);
    let trace = traced(&site, command.env("RAIO_URL", proxy.url()));
    let (most, all) = in_flight(&trace, "set_attributes");
    assert!(all == 200 && (20..=32).contains(&most), "{most} of {all} at once");
    assert_same(&tree(&site.here("a"), true), &tree(&site.there("b"), true), "attributes");
}

#[test]
fn links_and_what_is_removed_do_not_wait_for_one_another_over_a_long_way() {
    const COUNT: usize = 100;
    let site = Site::new();
    fs::create_dir(site.here("a")).expect("a directory");
    for number in 0..COUNT {
        symlink(format!("target {number}"), site.here(&format!("a/{number}"))).expect("a link");
    }
    let proxy = Proxy::start(site.server.address());
    proxy.treat(Treatment { delay: Duration::from_millis(20), ..Treatment::default() });
    let check = |arguments: &[&str], counted: &[(&str, usize)]| {
        let trace = traced(&site, site.raio(arguments).env("RAIO_URL", proxy.url()));
        for &(name, number) in counted {
            let (most, all) = in_flight(&trace, name);
            assert!(all == number && (20..=32).contains(&most), "{arguments:?}: {name}: {most} of {all}");
        }
    };
    // The directory gets its attributes, too.
    let counted = [("symlink", COUNT), ("set_attributes", COUNT + 1), ("rename", COUNT)];
    check(&["cp", "-r", "--preserve", "--connections", "1", "a", ":/e/b"], &counted);
    check(&["cp", "-r", "--preserve", "--connections", "1", ":/e/b", "c"], &[("readlink", COUNT)]);
    assert_same(&tree(&site.here("a"), true), &tree(&site.here("c"), true), "there and back");
    fs::create_dir(site.here("none")).expect("a directory");
    check(&["sync", "--delete", "--connections", "1", "none", ":/e/b"], &[("unlink", COUNT)]);
    assert_eq!(tree(&site.there("b"), false).len(), 1, "the directory itself");
    for number in 0..COUNT {
        fs::create_dir_all(site.there("b/d/e")).expect("a directory");
        fs::write(site.there(&format!("b/d/{number}")), "x").expect("a file");
    }
    check(&["rm", "-r", ":/e/b"], &[("unlink", COUNT)]);
    assert!(!site.there("b").exists());
}

#[test]
fn links_that_a_killed_run_has_left_beside_their_places_go_away() {
    let mut site = Site::new();
    fs::create_dir(site.here("a")).expect("a directory");
    for number in 0..200 {
        symlink("x", site.here(&format!("a/{number}"))).expect("a link");
    }
    let proxy = Proxy::start(site.server.address());
    proxy.treat(Treatment { delay: Duration::from_millis(20), ..Treatment::default() });
    let mut copy = site.raio(&["cp", "-r", "--preserve", "a", ":/e/b/"]);
    fs::create_dir(site.there("b")).expect("a directory");
    let mut child = copy.env("RAIO_URL", proxy.url()).spawn().expect("raio starts");
    let place = site.there("b/a");
    let deadline = Instant::now() + PATIENCE;
    while partials(&place).is_empty() {
        assert!(Instant::now() < deadline, "no link is created");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().expect("it runs");
    child.wait().expect("it ends");
    // What is on its way arrives.
    site.server.statistics_when(|now| now["connections"] == 0 && now["in_flight"]["executing"] == 0);
    assert_ne!(partials(&place).len(), 0, "it was too late");
    site.json(&["cp", "-r", "--preserve", "--json", "a", ":/e/b/"]);
    assert_eq!(partials(&place).len(), 0);
    assert_same(&tree(&site.here("a"), true), &tree(&site.there("b/a"), true), "all is there");
}

/// Copies a directory until its large file has been copied in part, and kills the copy.
fn interrupt(site: &Site, arguments: &[&str]) {
    let mut child = site.raio(arguments).spawn().expect("raio starts");
    let journals = site.directory.path().join("state/raio");
    let deadline = Instant::now() + PATIENCE;
    let has_some = || {
        let mut entries = fs::read_dir(&journals).into_iter().flatten();
        entries.any(|entry| entry.is_ok_and(|it| it.metadata().is_ok_and(|it| it.len() > 500)))
    };
    while !has_some() {
        assert!(Instant::now() < deadline, "the copy does not begin");
        assert!(child.try_wait().expect("a child").is_none(), "the copy has ended too soon");
    }
    kill_process(Pid::from_child(&child), Signal::KILL).expect("it is there");
    child.wait().expect("it ends");
}

#[test]
fn an_interrupted_copy_of_a_tree_goes_on_within_its_large_files() {
    for (from, to, again, moved) in [
        ("a", ":/e/b/", &["cp", "-r", "--resume", "a", ":/e/b/"][..], "write"),
        (":/e/a", "b/", &["cp", "-r", "--resume", ":/e/a", "b/"], "read"),
        ("a", ":/e/b/", &["sync", "--delete", "a", ":/e/b/a"], "write"),
    ] {
        let site = Site::new();
        let (source, destination) = match to {
            "b/" => (site.there("a"), site.here("b")),
            _ => (site.here("a"), site.there("b")),
        };
        fs::create_dir(&destination).expect("a directory");
        fs::create_dir(&source).expect("a directory");
        fs::write(source.join("large"), bytes(40 << 20)).expect("a file");
        for number in 0..30 {
            fs::write(source.join(number.to_string()), bytes(number)).expect("a file");
        }
        interrupt(&site, &["cp", "-r", "--resume", "--bwlimit", "40M", from, to]);
        let (_, blocks) = in_flight(&traced(&site, &mut site.raio(again)), moved);
        assert!((1..35).contains(&blocks), "{again:?}: {blocks} of 40 blocks were moved again");
        assert_same(&tree(&source, true), &tree(&destination.join("a"), true), "all is there");
        let report = site.json(&["cp", "-r", "--resume", "--json", from, to]);
        assert_eq!((&report["copied"], &report["unchanged"]), (&0.into(), &31.into()), "{report}");
    }
}

#[test]
fn files_of_a_tree_are_verified_and_their_holes_are_not_read() {
    let site = Site::new();
    grow(&site.here("a"), &mut Random::with_seed(3));
    let reads = |from: &str, to: &str, options: &[&str]| {
        let arguments = [&["cp", "-r", "--preserve", from, to], options].concat();
        in_flight(&traced(&site, &mut site.raio(&arguments)), "read").1
    };
    assert!(reads("a", ":/e/b", &["--verify"]) > 40, "each file is read again");
    reads(":/e/b", "c", &["--verify"]);
    for copy in [site.there("b"), site.here("c")] {
        assert_same(&tree(&site.here("a"), true), &tree(&copy, true), "verified");
    }
    let sparse = File::create(site.there("sparse")).expect("a file");
    sparse.set_len(40 << 20).expect("a size");
    sparse.write_all_at(b"data", 20 << 20).expect("a write");
    fs::create_dir(site.there("d")).expect("a directory");
    fs::rename(site.there("sparse"), site.there("d/sparse")).expect("it is ours");
    assert_eq!(reads(":/e/d", "d", &[]), 1);
    assert_same(&tree(&site.there("d"), true), &tree(&site.here("d"), true), "the holes are there");
}

#[test]
fn files_that_are_too_large_for_a_request_of_the_server_are_copied_in_parts() {
    let mut site = Site::new();
    let export = format!("e={},rw", site.directory.path().join("export").display());
    site.server = Server::start_with(&[&export], &["--listen", "tcp://127.0.0.1:0", "--io-max", "64k"]);
    fs::create_dir(site.here("a")).expect("a directory");
    for size in [0, 1, 65_535, 65_536, 65_537, 200_000, (1 << 20) + 1] {
        fs::write(site.here(&format!("a/{size}")), bytes(size)).expect("a file");
    }
    for (from, to) in [("a", ":/e/b"), (":/e/b", ":/e/c"), (":/e/c", "d")] {
        site.run(&["cp", "-r", "--preserve", from, to]);
    }
    assert_same(&tree(&site.here("a"), true), &tree(&site.here("d"), true), "there and back");
}
