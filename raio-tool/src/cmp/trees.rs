//! `raio cmp -r`: whether two directories are the same.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::contents::same_contents;
use crate::failure::{Failure, Kind};
use crate::global::Global;
use crate::interrupt::Interrupt;
use crate::location::Location;
use crate::output;
use crate::tree::{self, Access, Tree, TreeEntry};

/// Something that differs, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Difference {
    path: String,
    differs: Differs,
}

/// How it differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Differs {
    /// Only the first directory has it.
    Missing,
    /// Only the second directory has it.
    Extra,
    Type,
    /// The bytes of a file, or the target of a link.
    Contents,
}

/// Compares names, types, and the bytes of files, but neither permissions nor times.
pub fn compare(
    global: &Global,
    one: &Location,
    other: &Location,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let access = Access { follows: false, is_root_followed: true, tag: String::new() };
    let mut trees = [tree::open(global, one, &access)?, tree::open(global, other, &access)?];
    let mut differences = 0;
    let mut rest = vec![PathBuf::new()];
    while let Some(directory) = rest.pop() {
        interrupt.check()?;
        let [here, there] = &mut trees;
        let mut there = by_name(there.entries(&directory)?);
        for entry in here.entries(&directory)? {
            let path = directory.join(&entry.name);
            let other = there.remove(&entry.name);
            match difference(&mut trees, &path, &entry, other.as_ref(), interrupt)? {
                Some(differs) => tell(global, &path, differs, &mut differences)?,
                None if entry.is_dir() => rest.push(path),
                None => {}
            }
        }
        for name in there.into_keys() {
            tell(global, &directory.join(name), Differs::Extra, &mut differences)?;
        }
    }
    if differences == 0 {
        return Ok(());
    }
    Err(Failure::of(Kind::Unverified, format!("{one} and {other} have {differences} differences.")))
}

fn by_name(entries: Vec<TreeEntry>) -> BTreeMap<OsString, TreeEntry> {
    entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect()
}

fn difference(
    [here, there]: &mut [Box<dyn Tree>; 2],
    path: &Path,
    entry: &TreeEntry,
    other: Option<&TreeEntry>,
    interrupt: &Interrupt,
) -> Result<Option<Differs>, Failure> {
    let Some(other) = other else { return Ok(Some(Differs::Missing)) };
    if entry.mode & libc::S_IFMT != other.mode & libc::S_IFMT {
        return Ok(Some(Differs::Type));
    }
    let is_same = if entry.is_file() {
        entry.size == other.size && same_contents(&mut **here, &mut **there, path, interrupt)?
    } else if entry.is_link() {
        here.read_link(path)? == there.read_link(path)?
    } else {
        true
    };
    Ok((!is_same).then_some(Differs::Contents))
}

fn tell(global: &Global, path: &Path, differs: Differs, differences: &mut u64) -> Result<(), Failure> {
    *differences += 1;
    if global.json {
        return output::print_json(&Difference { path: path.to_string_lossy().into_owned(), differs });
    }
    let word = format!("{differs:?}").to_lowercase();
    let path = output::visible(path.as_os_str().as_encoded_bytes());
    output::print(&format!("{word:8} {path}\n"))
}
