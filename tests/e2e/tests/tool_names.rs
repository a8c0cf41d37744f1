//! The commands of `raio` on names: ls, find, du, df, rm, mkdir, mv, ln, truncate and stat.

mod tool_site;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use serde_json::Value;
use tool_site::{Site, assert_documented, bytes, code};

/// What it prints, line by line.
fn lines(site: &Site, arguments: &[&str]) -> Vec<String> {
    let text = String::from_utf8(site.run(arguments)).expect("UTF-8");
    text.lines().map(str::to_owned).collect()
}

/// What it prints with `--json`, line by line; the manual has each field.
fn objects(site: &Site, arguments: &[&str]) -> Vec<Value> {
    let lines = lines(site, &[arguments, &["--json"]].concat());
    let objects: Vec<Value> = lines.iter().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    for object in &objects {
        assert_documented(arguments[0], object);
    }
    objects
}

/// A server with a few names: `d/f` of 5 bytes, `d/e/g` of 2000, a link `d/l` to f.
fn site() -> Site {
    let site = Site::new();
    fs::create_dir_all(site.there("d/e")).expect("directories");
    fs::write(site.there("d/f"), "12345").expect("a file");
    fs::write(site.there("d/e/g"), bytes(2000)).expect("a file");
    symlink("f", site.there("d/l")).expect("a link");
    site
}

#[test]
fn ls_lists_exports_directories_and_files() {
    let site = site();
    assert_eq!(lines(&site, &["ls"]), ["e", "null", "ro"]);
    assert_eq!(lines(&site, &["ls", &site.server.url()]), ["e", "null", "ro"]);
    assert_eq!(lines(&site, &["ls", ":/e/d"]), ["e", "f", "l"]);
    assert_eq!(lines(&site, &["ls", ":/e/d/f"]), [":/e/d/f"]);
    let all = [":/e/d:", "e", "f", "l", "", ":/e/d/e:", "g", ""];
    assert_eq!(lines(&site, &["ls", "-R", ":/e/d"]), all);
    let long = lines(&site, &["ls", "-la", "--bytes", ":/e/d"]);
    assert!(
        long[1].starts_with("-rw-") && long[1].contains("  5 20") && long[1].ends_with("Z f"),
        "{long:?}"
    );
    let objects = objects(&site, &["ls", ":/e/d"]);
    let file = objects.iter().find(|it| it["name"] == "f").expect("f is there");
    assert_eq!((&file["size"], &file["type"], &file["path"]), (&5.into(), &"file".into(), &":/e/d/f".into()));
    fs::write(site.there("d/e").join(OsStr::from_bytes(b"\x1b[2J\xff")), "").expect("a file");
    assert_eq!(lines(&site, &["ls", ":/e/d/e"]), [r"\x1b[2J\xff", "g"], "no name commands the terminal");
}

#[test]
fn find_prints_the_paths_that_meet_its_conditions() {
    let site = site();
    let find = |conditions: &[&str]| lines(&site, &[&["find", ":/e"], conditions].concat());
    assert_eq!(find(&[]), [":/e/d", ":/e/d/e", ":/e/d/e/g", ":/e/d/f", ":/e/d/l"]);
    assert_eq!(find(&["--type", "directory"]), [":/e/d", ":/e/d/e"]);
    assert_eq!(find(&["--name", "[fg]", "--min-size", "6"]), [":/e/d/e/g"]);
    assert_eq!(find(&["--type", "f", "--max-size", "5"]), [":/e/d/f"]);
    assert_eq!(find(&["--max-depth", "1"]), [":/e/d"]);
    let old = fs::File::options().write(true).open(site.there("d/f")).expect("a file");
    old.set_modified(std::time::UNIX_EPOCH).expect("a time");
    assert_eq!(find(&["--older-than", "7d"]), [":/e/d/f"]);
    assert_eq!(find(&["--newer-than", "7d", "--type", "f"]), [":/e/d/e/g"]);
    let odd = OsStr::from_bytes(b"d/\xff\n");
    fs::write(site.directory.path().join("export").join(odd), "").expect("a file");
    let found = site.run(&["find", ":/e/d", "--print0", "--name", "??"]);
    assert_eq!(found, b":/e/d/\xff\n\0", "every byte of a name is there");
    for (wrong, status) in [("raio://127.0.0.1:1/e", 5), ("-", 2)] {
        let output = site.raio(&["find", wrong, ":/e/d/e"]).output().expect("raio runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(code(&output), Some(status), "{said}");
        assert_eq!(output.stdout, b":/e/d/e/g\n", "the other path is searched: {said}");
    }
    let objects = objects(&site, &["find", ":/e/d/e"]);
    assert_eq!(objects.len(), 1);
    assert_eq!((&objects[0]["path"], &objects[0]["size"]), (&":/e/d/e/g".into(), &2000.into()));
}

#[test]
fn du_sums_up_and_df_shows_the_room() {
    let site = site();
    let sums = objects(&site, &["du", ":/e/d"]);
    let sizes: Vec<_> = sums.iter().map(|it| (it["path"].as_str(), it["size"].as_u64())).collect();
    assert_eq!(sizes, [(Some(":/e/d/e"), Some(2000)), (Some(":/e/d"), Some(2005))]);
    assert_eq!(objects(&site, &["du", "-d", "0", ":/e/d"]).len(), 1);
    assert_eq!(lines(&site, &["du", "-d", "0", "--bytes", ":/e/d"]), ["      2005  :/e/d"]);
    let room = objects(&site, &["df", ":/e"]).remove(0);
    let (size, used) = (room["size"].as_u64().expect("a number"), room["used"].as_u64().expect("a number"));
    assert!(size > used && used > 0, "{room}");
    assert_eq!(lines(&site, &["df", ":/e", ":/e/d"]).len(), 3);
}

#[test]
fn directories_are_created_and_removed_with_what_is_in_them() {
    let site = site();
    site.run(&["mkdir", "-p", "-m", "707", ":/e/a/b/c"]);
    site.run(&["mkdir", "-p", ":/e/a/b/c"]);
    let mode = |name| fs::metadata(site.there(name)).expect("a directory").permissions().mode() & 0o777;
    assert_eq!((mode("a/b/c"), mode("a/b")), (0o707, 0o755));
    site.run(&["rm", ":/e/d/l"]);
    assert!(site.there("d/f").exists(), "a link is removed, and not what it leads to");
    site.run(&["rm", "-r", ":/e/d", ":/e/a"]);
    assert!(!site.there("d").exists() && !site.there("a").exists());
    site.run(&["rm", "-f", ":/e/d", ":/e/none"]);
}

#[test]
fn files_are_renamed_linked_and_cut() {
    let site = site();
    site.run(&["mv", ":/e/d/f", ":/e/d/h"]);
    site.run(&["mv", ":/e/d/h", ":/e/d/e/g", ":/e"]);
    assert_eq!(fs::read(site.there("h")).expect("a file"), b"12345");
    assert!(site.there("g").exists() && !site.there("d/e/g").exists());
    site.run(&["ln", ":/e/h", ":/e/i"]);
    assert_eq!(fs::metadata(site.there("h")).expect("a file").nlink(), 2);
    site.run(&["ln", "-s", "../h", ":/e/d/"]);
    assert_eq!(fs::read_link(site.there("d/h")).expect("a link").to_str(), Some("../h"));
    assert_eq!(site.run(&["cat", ":/e/d/h"]), b"12345");
    site.run(&["truncate", "--size", "3", ":/e/h"]);
    assert_eq!(fs::read(site.there("h")).expect("a file"), b"123");
    site.run(&["truncate", "--size", "1k", ":/e/h"]);
    assert_eq!(fs::metadata(site.there("h")).expect("a file").len(), 1024);
    let stat = |arguments: &[&str]| objects(&site, &[&["stat"], arguments].concat()).remove(0);
    assert_eq!(stat(&[":/e/d/h"])["type"], "symlink");
    assert_eq!(stat(&["-L", ":/e/d/h"])["size"], 1024);
    assert_eq!(stat(&[":/e/d"])["type"], "directory");
    assert_eq!(stat(&[":/"])["type"], "directory");
}

#[test]
fn exit_codes_tell_what_keeps_a_name_from_changing() {
    let site = site();
    let dead = "raio://127.0.0.1:1";
    for (arguments, status, needle) in [
        (&["ls", ":/e/none"][..], 3, "Cannot examine :/e/none"),
        (&["ls", ":/none"], 3, "none"),
        (&["ls", "."], 2, "not on a server"),
        (&["ls", dead], 5, "Connection refused"),
        (&["find", ":/e/none"], 3, "Cannot list"),
        (&["find", ":/e", "--newer-than", "7"], 2, "no time"),
        (&["du", "/tmp"], 2, "not on a server"),
        (&["stat", ":/e/none"], 3, "none"),
        (&["rm", ":/e/none"], 3, "No such file"),
        (&["rm", ":/e/none", ":/e/nothing"], 3, "2 have failed"),
        (&["rm", ":/e/d"], 1, "Use -r"),
        (&["rm", "-r", ":/ro/d"], 4, "read-only"),
        (&["mkdir", ":/e/d"], 1, "exists"),
        (&["mkdir", ":/e/none/x"], 3, "No such file"),
        (&["mkdir", "-p", ":/none/x"], 3, "none"),
        (&["mkdir", ":/ro/x"], 4, "read-only"),
        (&["mkdir", "--mode", "9", ":/e/x"], 2, "no permissions"),
        (&["mv", "-n", ":/e/d/f", ":/e/d/l"], 1, "exists"),
        (&["mv", ":/e/d/f", "raio://127.0.0.1:1/e/f"], 5, "Connection refused"),
        (&["mv", ":/e/d/f", "f"], 2, "not on a server"),
        (&["ln", ":/e/none", ":/e/x"], 3, "No such file"),
        (&["truncate", "--size", "0", ":/ro/d/f"], 4, "read-only"),
        (&["df", ":/none"], 3, "none"),
    ] {
        let output = site.raio(arguments).output().expect("raio runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(code(&output), Some(status), "raio {arguments:?}: {said}");
        assert!(said.contains(needle), "raio {arguments:?}: {said}");
    }
    assert_eq!(fs::read(site.there("d/f")).expect("a file"), b"12345", "nothing was changed");
    let info = site.json(&["info", "--json"]);
    assert_eq!(info["exports"], serde_json::json!(["e", "null", "ro"]));
}
