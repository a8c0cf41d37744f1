//! Names, directories and whole small files on a server, against a local directory that the same is done to.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use raio::{
    Answer, Attributes, Buffer, Buffers, Completion, Context, DirEntry, Error, FileStatus, Options,
    PathOperation, PutOptions, ReadDir, Session, SubmitOptions,
};
use raio_e2e::{Client, Direction, Ending, Proxy, Random, Server, Treatment, completion, number};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;
use tempfile::TempDir;

/// Something that is done to names beneath a directory.
#[derive(Clone, Debug)]
enum Step {
    Mkdir(PathBuf, u32),
    Rmdir(PathBuf),
    Unlink(PathBuf),
    Rename(PathBuf, PathBuf, bool),
    Link(PathBuf, PathBuf),
    Symlink(PathBuf, PathBuf),
    Readlink(PathBuf),
    Put(PathBuf, u16, u32, bool, Option<i64>),
    Get(PathBuf, u16),
    Stat(PathBuf, bool),
    List(PathBuf),
    Set(PathBuf, Option<u32>, Option<u16>, Option<i64>),
    SetXattr(PathBuf, u16),
    GetXattr(PathBuf),
    ListXattr(PathBuf),
    RemoveXattr(PathBuf),
}

/// What comes of it, as far as both sides must agree.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    Failed(i32),
    Status(u32, u64, u32, Option<i64>),
    Bytes(Vec<u8>),
    Names(BTreeMap<OsString, (u32, u64)>),
}

/// Sizes of directories, and permissions of links, are the file system's business.
fn outcome_of(mode: u32, size: u64, links: u32, modified_ns: i64) -> Outcome {
    let is_file = mode & libc::S_IFMT == libc::S_IFREG;
    let (size, links) = if is_file { (size, links) } else { (0, 0) };
    // Of what was just written the times differ a little.
    let modified = (modified_ns < 1_000_000_000_000_000_000).then_some(modified_ns);
    Outcome::Status(mode, size, links, modified)
}

fn bytes(seed: u16) -> Vec<u8> {
    (0..u32::from(seed) % 5000).map(|n| (n ^ u32::from(seed)) as u8).collect()
}

/// A server with an export `d`, a session, and the directory.
struct Site {
    directory: TempDir,
    session: Session,
    server: Server,
}

impl Site {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let server = Server::start(&[&format!("d={},rw", directory.path().display())]);
        let session = Session::connect(&server.url(), &Options::default()).expect("it is there");
        Self { directory, session, server }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

fn remote(session: &Session, base: &Path, step: &Step) -> Outcome {
    // Slashes at the end count, and `join` keeps them.
    let at = |path: &Path| base.join(path);
    let done = |result: Result<(), Error>| result.map(|()| Outcome::Done);
    let status = |status: FileStatus| {
        outcome_of(status.mode.get(), status.size.get(), status.links.get(), status.modified_ns.get())
    };
    let result = match step {
        Step::Mkdir(path, mode) => done(session.create_dir(at(path), *mode)),
        Step::Rmdir(path) => done(session.remove_dir(at(path))),
        Step::Unlink(path) => done(session.remove_file(at(path))),
        Step::Rename(from, to, false) => done(session.rename(at(from), at(to))),
        Step::Rename(from, to, true) => done(session.rename_no_replace(at(from), at(to))),
        Step::Link(from, to) => done(session.hard_link(at(from), at(to))),
        Step::Symlink(target, link) => done(session.symlink(target, at(link))),
        Step::Readlink(path) => {
            session.read_link(at(path)).map(|target| Outcome::Bytes(target.into_os_string().into_vec()))
        }
        Step::Put(path, seed, mode, exclusive, modified_ns) => {
            let options = PutOptions {
                mode: *mode,
                exclusive: *exclusive,
                modified_ns: *modified_ns,
                fsync: seed % 8 == 0,
            };
            done(session.put(at(path), &bytes(*seed), &options))
        }
        Step::Get(path, length) => {
            session.get(at(path), usize::from(*length)).map(|(bytes, _)| Outcome::Bytes(bytes))
        }
        Step::Stat(path, true) => session.metadata(at(path)).map(status),
        Step::Stat(path, false) => session.symlink_metadata(at(path)).map(status),
        Step::List(path) => Ok(names_of(session.read_dir(at(path)).and_then(Iterator::collect))),
        Step::Set(path, mode, size, modified_ns) => {
            let size = size.map(u64::from);
            let attributes = Attributes { mode: *mode, size, modified_ns: *modified_ns, nofollow: false };
            done(session.set_attributes(at(path), &attributes))
        }
        Step::SetXattr(path, seed) => {
            done(session.set_xattr(at(path), "user.test", &bytes(*seed % 100), false))
        }
        Step::GetXattr(path) => session.get_xattr(at(path), "user.test").map(Outcome::Bytes),
        Step::ListXattr(path) => session.list_xattr(at(path)).map(|names| {
            Outcome::Bytes(names.into_iter().map(OsString::into_vec).collect::<Vec<_>>().concat())
        }),
        Step::RemoveXattr(path) => done(session.remove_xattr(at(path), "user.test")),
    };
    result.unwrap_or_else(|error| Outcome::Failed(error.errno()))
}

/// The same as operations of a context.
fn queued(context: &mut Context, base: &Path, step: &Step) -> Outcome {
    let at = |path: &Path| base.join(path);
    let operation = match step {
        Step::Mkdir(path, mode) => PathOperation::Mkdir { path: at(path), mode: *mode },
        Step::Rmdir(path) => PathOperation::Rmdir { path: at(path) },
        Step::Unlink(path) => PathOperation::Unlink { path: at(path) },
        Step::Rename(from, to, no_replace) => {
            PathOperation::Rename { from: at(from), to: at(to), no_replace: *no_replace }
        }
        Step::Link(from, to) => PathOperation::Link { original: at(from), link: at(to) },
        Step::Symlink(target, link) => PathOperation::Symlink { target: target.clone(), link: at(link) },
        Step::Readlink(path) => PathOperation::Readlink { path: at(path) },
        Step::Put(path, seed, mode, exclusive, modified_ns) => {
            let (mode, exclusive, modified_ns) = (*mode, *exclusive, *modified_ns);
            let options = PutOptions { mode, exclusive, modified_ns, fsync: seed % 8 == 0 };
            let buffers = Buffers::One(Buffer::Owned(bytes(*seed).into()));
            PathOperation::Put { path: at(path), buffers, options }
        }
        Step::Get(path, length) => {
            let buffers = Buffers::One(Buffer::Owned(vec![0; usize::from(*length)].into()));
            PathOperation::Get { path: at(path), buffers }
        }
        Step::Stat(path, follows) => PathOperation::Stat { path: at(path), nofollow: !follows },
        Step::Set(path, mode, size, modified_ns) => {
            let (mode, size, modified_ns) = (*mode, size.map(u64::from), *modified_ns);
            let attributes = Attributes { mode, size, modified_ns, nofollow: false };
            PathOperation::SetAttributes { path: at(path), attributes }
        }
        Step::List(path) => PathOperation::List { path: at(path) },
        Step::SetXattr(path, seed) => {
            let buffers = Buffers::One(Buffer::Owned(bytes(*seed % 100).into()));
            PathOperation::SetXattr { path: at(path), name: "user.test".into(), buffers, exclusive: false }
        }
        Step::GetXattr(path) => PathOperation::GetXattr { path: at(path), name: "user.test".into() },
        Step::ListXattr(path) => PathOperation::ListXattr { path: at(path) },
        Step::RemoveXattr(path) => PathOperation::RemoveXattr { path: at(path), name: "user.test".into() },
    };
    let is_get = matches!(operation, PathOperation::Get { .. });
    let completion = match run(context, operation) {
        Ok(completion) => completion,
        Err(error) => return Outcome::Failed(error.errno()),
    };
    match (completion.result, completion.answer.map(|answer| *answer)) {
        (Err(error), _) => Outcome::Failed(error.errno()),
        (Ok(count), _) if is_get => {
            let buffers = completion.buffers.expect("they come back");
            Outcome::Bytes(buffers.slices(0..count as usize).flatten().copied().collect())
        }
        (Ok(_), Some(Answer::Status(status))) => {
            outcome_of(status.mode.get(), status.size.get(), status.links.get(), status.modified_ns.get())
        }
        (Ok(_), Some(Answer::Link(target))) => Outcome::Bytes(target.into_os_string().into_vec()),
        (Ok(_), Some(Answer::Xattr(value))) => Outcome::Bytes(value),
        (Ok(_), Some(Answer::XattrNames(names))) => {
            Outcome::Bytes(names.into_iter().map(OsString::into_vec).collect::<Vec<_>>().concat())
        }
        (Ok(_), Some(Answer::Entries(entries))) => names_of(all_queued(context, entries)),
        (Ok(_), None) => Outcome::Done,
        (Ok(_), other) => panic!("{other:?} of {step:?}"),
    }
}

/// Does one operation.
fn run(context: &mut Context, operation: PathOperation) -> Result<Completion, Error> {
    context.submit_path(operation, SubmitOptions::default(), 0).map_err(|rejected| rejected.error)?;
    Ok(completion(context).expect("the server is there"))
}

fn entries_of(completion: Completion) -> ReadDir {
    match completion.answer.map(|answer| *answer) {
        Some(Answer::Entries(entries)) => entries,
        other => panic!("{other:?} of {:?}", completion.result),
    }
}

/// All entries of a list that has begun, without a call that waits for the server.
fn all_queued(context: &mut Context, mut entries: ReadDir) -> Result<Vec<DirEntry>, Error> {
    let mut all = Vec::new();
    while entries.buffered() > 0 {
        let here = entries.buffered();
        all.extend(entries.by_ref().take(here).map(|entry| entry.expect("it is here")));
        let next = run(context, PathOperation::ListNext { entries })?;
        next.result.clone()?;
        entries = entries_of(next);
    }
    assert!(entries.is_complete());
    Ok(all)
}

/// What a list has found, as far as both sides must agree.
fn names_of(entries: Result<Vec<DirEntry>, Error>) -> Outcome {
    let name = |entry: DirEntry| {
        let size = if entry.is_file() { entry.size } else { 0 };
        (entry.name, (entry.mode, size))
    };
    match entries {
        Ok(entries) => Outcome::Names(entries.into_iter().map(name).collect()),
        Err(error) => Outcome::Failed(error.errno()),
    }
}

fn local(base: &Path, step: &Step) -> Outcome {
    let at = |path: &Path| base.join(path);
    let done = |result: Result<(), Errno>| result.map(|()| Outcome::Done);
    let result = match step {
        Step::Mkdir(path, mode) => done(rustix::fs::mkdirat(CWD, at(path), Mode::from_raw_mode(*mode))),
        Step::Rmdir(path) => done(rustix::fs::unlinkat(CWD, at(path), AtFlags::REMOVEDIR)),
        Step::Unlink(path) => done(rustix::fs::unlinkat(CWD, at(path), AtFlags::empty())),
        Step::Rename(from, to, no_replace) => {
            let flags = if *no_replace { RenameFlags::NOREPLACE } else { RenameFlags::empty() };
            done(rustix::fs::renameat_with(CWD, at(from), CWD, at(to), flags))
        }
        Step::Link(from, to) => done(rustix::fs::linkat(CWD, at(from), CWD, at(to), AtFlags::empty())),
        Step::Symlink(target, link) => done(rustix::fs::symlinkat(target, CWD, at(link))),
        Step::Readlink(path) => rustix::fs::readlinkat(CWD, at(path), Vec::new())
            .map(|target| Outcome::Bytes(target.into_bytes())),
        Step::Put(path, seed, mode, exclusive, modified_ns) => {
            done(local_put(&at(path), &bytes(*seed), *mode, *exclusive, *modified_ns))
        }
        Step::Get(path, length) => local_get(&at(path), usize::from(*length)).map(Outcome::Bytes),
        Step::Stat(path, follows) => {
            let flags = if *follows { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW };
            rustix::fs::statat(CWD, at(path), flags).map(|stat| {
                let modified_ns = stat.st_mtime * 1_000_000_000 + stat.st_mtime_nsec as i64;
                outcome_of(stat.st_mode, stat.st_size as u64, stat.st_nlink as u32, modified_ns)
            })
        }
        Step::List(path) => local_list(&at(path)).map(Outcome::Names),
        Step::Set(path, mode, size, modified_ns) => done(local_set(&at(path), *mode, *size, *modified_ns)),
        Step::SetXattr(path, seed) => {
            let flags = rustix::fs::XattrFlags::empty();
            done(rustix::fs::setxattr(at(path), "user.test", &bytes(*seed % 100), flags))
        }
        Step::GetXattr(path) => {
            let mut value = vec![0; 5000];
            rustix::fs::getxattr(at(path), "user.test", &mut value[..])
                .map(|len| Outcome::Bytes(value[..len].to_vec()))
        }
        Step::ListXattr(path) => {
            let mut names = vec![0; 5000];
            rustix::fs::listxattr(at(path), &mut names[..])
                .map(|len| Outcome::Bytes(names[..len].iter().copied().filter(|&byte| byte != 0).collect()))
        }
        Step::RemoveXattr(path) => done(rustix::fs::removexattr(at(path), "user.test")),
    };
    result.unwrap_or_else(|errno| Outcome::Failed(errno.raw_os_error()))
}

/// A put is a new file that is renamed.
fn local_put(
    path: &Path,
    bytes: &[u8],
    mode: u32,
    exclusive: bool,
    modified_ns: Option<i64>,
) -> Result<(), Errno> {
    let text = path.as_os_str().as_bytes();
    let end = text.iter().rposition(|&byte| byte != b'/').map_or(0, |at| at + 1);
    let start = text[..end].iter().rposition(|&byte| byte == b'/').map_or(0, |at| at + 1);
    let is_dots = matches!(&text[start..end], b"." | b"..");
    let looked_up = if is_dots { text } else { &text[..start] };
    rustix::fs::statat(CWD, OsStr::from_bytes(looked_up), AtFlags::empty())?;
    if is_dots || end < text.len() {
        return Err(Errno::ISDIR);
    }
    let new = Path::new(OsStr::from_bytes(&text[..start])).join(".new");
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
    let file = rustix::fs::open(&new, flags, Mode::from_raw_mode(mode))?;
    rustix::io::write(&file, bytes)?;
    if let Some(modified_ns) = modified_ns {
        rustix::fs::futimens(&file, &times(modified_ns))?;
    }
    let flags = if exclusive { RenameFlags::NOREPLACE } else { RenameFlags::empty() };
    rustix::fs::renameat_with(CWD, &new, CWD, path, flags).inspect_err(|_| {
        let _ = fs::remove_file(&new);
    })
}

fn local_get(path: &Path, length: usize) -> Result<Vec<u8>, Errno> {
    let file = rustix::fs::open(path, OFlags::RDONLY, Mode::empty())?;
    if rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode)
        == rustix::fs::FileType::Directory
    {
        return Err(Errno::ISDIR);
    }
    let mut bytes = vec![0; length];
    let read = rustix::io::read(&file, &mut bytes[..])?;
    bytes.truncate(read);
    Ok(bytes)
}

fn local_list(path: &Path) -> Result<BTreeMap<OsString, (u32, u64)>, Errno> {
    let errno = |error: std::io::Error| Errno::from_io_error(&error).expect("an errno");
    let entries = fs::read_dir(path).map_err(errno)?;
    let entry = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.map_err(errno)?;
        let metadata = entry.metadata().map_err(errno)?;
        let size = if metadata.is_file() { metadata.len() } else { 0 };
        Ok((entry.file_name(), (metadata.mode(), size)))
    };
    entries.map(entry).collect()
}

fn local_set(
    path: &Path,
    mode: Option<u32>,
    size: Option<u16>,
    modified_ns: Option<i64>,
) -> Result<(), Errno> {
    // What there is decides first.
    rustix::fs::statat(CWD, path, AtFlags::empty())?;
    if let Some(size) = size {
        let file = rustix::fs::open(path, OFlags::WRONLY, Mode::empty())?;
        rustix::fs::ftruncate(&file, size.into())?;
    }
    if let Some(mode) = mode {
        rustix::fs::chmodat(CWD, path, Mode::from_raw_mode(mode), AtFlags::empty())?;
    }
    modified_ns.map_or(Ok(()), |ns| rustix::fs::utimensat(CWD, path, &times(ns), AtFlags::empty()))
}

fn times(modified_ns: i64) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec {
            tv_sec: modified_ns.div_euclid(1_000_000_000),
            tv_nsec: modified_ns.rem_euclid(1_000_000_000),
        },
    }
}

fn name() -> impl Strategy<Value = OsString> {
    prop_oneof![
        4 => Just(OsString::from("a")),
        4 => Just(OsString::from("b")),
        2 => Just(OsString::from("c")),
        1 => Just(OsString::from("n".repeat(255))),
        1 => Just(OsString::from("n".repeat(256))),
        1 => Just(OsString::from_vec(vec![0xff, 0xfe, b'x'])),
        1 => Just(OsString::from("new\nline \u{1b}[1m")),
        1 => Just(OsString::from(".")),
        1 => Just(OsString::from("..")),
    ]
}

/// A path that does not lead out of where it begins.
fn path() -> impl Strategy<Value = PathBuf> {
    let names = prop::collection::vec(name(), 1..4);
    (names, prop::bool::weighted(0.1)).prop_filter_map("it leads out", |(names, has_slash)| {
        let mut depth = 0;
        for name in &names {
            depth += match name.as_bytes() {
                b"." => 0,
                b".." => -1,
                _ => 1,
            };
            if depth < 0 {
                return None;
            }
        }
        let mut path = names.join(OsStr::new("/"));
        if has_slash {
            path.push("/");
        }
        Some(PathBuf::from(path))
    })
}

fn target() -> impl Strategy<Value = PathBuf> {
    prop::sample::select(vec!["a", "b", "c", "a/b", "./b", "missing"]).prop_map(PathBuf::from)
}

fn time() -> impl Strategy<Value = i64> {
    prop_oneof![Just(0), Just(-1), Just(1_500_000_000), Just(123_456_789_123_456_789)]
}

fn step() -> impl Strategy<Value = Step> {
    let mode = || prop_oneof![Just(0o755_u32), Just(0o700), Just(0o644), Just(0o600)];
    prop_oneof![
        4 => (path(), mode()).prop_map(|(path, mode)| Step::Mkdir(path, mode | 0o700)),
        1 => path().prop_map(Step::Rmdir),
        1 => path().prop_map(Step::Unlink),
        3 => (path(), path(), any::<bool>()).prop_map(|(from, to, only)| Step::Rename(from, to, only)),
        2 => (path(), path()).prop_map(|(from, to)| Step::Link(from, to)),
        2 => (target(), path()).prop_map(|(target, link)| Step::Symlink(target, link)),
        1 => path().prop_map(Step::Readlink),
        6 => (path(), any::<u16>(), mode(), prop::bool::weighted(0.2), prop::option::of(time()))
            .prop_map(|(path, seed, mode, exclusive, time)| Step::Put(path, seed, mode, exclusive, time)),
        2 => (path(), any::<u16>()).prop_map(|(path, length)| Step::Get(path, length)),
        2 => (path(), any::<bool>()).prop_map(|(path, follows)| Step::Stat(path, follows)),
        1 => path().prop_map(Step::List),
        2 => (path(), prop::option::of(mode()), prop::option::of(any::<u16>()), prop::option::of(time()))
            .prop_map(|(path, mode, size, time)| Step::Set(path, mode.map(|mode| mode | 0o700), size, time)),
        1 => (path(), any::<u16>()).prop_map(|(path, seed)| Step::SetXattr(path, seed)),
        1 => path().prop_map(Step::GetXattr),
        1 => path().prop_map(Step::ListXattr),
        1 => path().prop_map(Step::RemoveXattr),
    ]
}

/// Everything beneath a directory: what it is, its permissions, and what it holds.
fn tree(directory: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let mut left = vec![directory.to_owned()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(&next).expect("a directory") {
            let path = entry.expect("an entry").path();
            let metadata = path.symlink_metadata().expect("it is there");
            let held = if metadata.is_dir() {
                left.push(path.clone());
                Vec::new()
            } else if metadata.is_symlink() {
                path.read_link().expect("a link").into_os_string().into_vec()
            } else {
                fs::read(&path).expect("a file")
            };
            let beneath = path.strip_prefix(directory).expect("it is beneath").to_owned();
            all.insert(beneath, (metadata.mode(), held));
        }
    }
    all
}

#[test]
fn the_server_does_what_a_local_directory_does_with_the_same_answers_and_errnos() {
    let site = Site::new();
    let model = tempfile::tempdir().expect("a directory");
    let case = AtomicU32::new(0);
    let cases = number("RAIO_NAMES_CASES", 200) as u32;
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let steps = prop::collection::vec(step(), 1..40);
    let context = RefCell::new(site.session.context(4).expect("a context"));
    let result = runner.run(&steps, |steps| {
        let name = format!("case{}", case.fetch_add(1, Ordering::Relaxed));
        let (here, there) = (model.path().join(&name), Path::new("/d").join(&name));
        fs::create_dir(&here).expect("a directory");
        let (name_queued, there_queued) = (format!("{name}.queued"), there.with_extension("queued"));
        site.session.create_dir(&there, 0o755).expect("a directory");
        site.session.create_dir(&there_queued, 0o755).expect("a directory");
        for step in &steps {
            let expected = local(&here, step);
            let got = remote(&site.session, &there, step);
            prop_assert_eq!(&got, &expected, "{:?} of {:?}", step, steps);
            let got = queued(&mut context.borrow_mut(), &there_queued, step);
            prop_assert_eq!(&got, &expected, "{:?} of {:?}, queued", step, steps);
        }
        prop_assert_eq!(tree(&site.path(&name_queued)), tree(&here));
        prop_assert_eq!(tree(&site.path(&name)), tree(&here));
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

// Where names lead
// --------------------------------------------------------------------------------------------------------

fn errno<T: std::fmt::Debug>(result: Result<T, Error>) -> i32 {
    result.expect_err("it is rejected").errno()
}

/// Everything that changes a name, at this path. `/d/there` is a directory, and `/d/file` a file.
fn changes(session: &Session, path: &str) -> Vec<(&'static str, Result<(), Error>)> {
    vec![
        ("put", session.put(path, b"new", &PutOptions::default())),
        ("mkdir", session.create_dir(path, 0o755)),
        ("rmdir", session.remove_dir(path)),
        ("unlink", session.remove_file(path)),
        ("rename from", session.rename(path, "/d/there/other")),
        ("rename to", session.rename("/d/file", path)),
        ("link from", session.hard_link(path, "/d/there/other")),
        ("link to", session.hard_link("/d/file", path)),
        ("symlink", session.symlink("target", path)),
        ("set size", session.set_attributes(path, &Attributes { size: Some(0), ..Attributes::default() })),
        (
            "set mode",
            session.set_attributes(path, &Attributes { mode: Some(0o600), ..Attributes::default() }),
        ),
        ("set xattr", session.set_xattr(path, "user.a", b"b", false)),
    ]
}

/// Everything that looks at a name.
fn looks(session: &Session, path: &str) -> Vec<(&'static str, i32)> {
    let errno = |result: Result<(), Error>| result.map_or_else(|error| error.errno(), |()| 0);
    vec![
        ("stat", errno(session.metadata(path).map(drop))),
        ("get", errno(session.get(path, 100).map(drop))),
        ("list", errno(session.read_dir(path).map(drop))),
        ("statfs", errno(session.statfs(path).map(drop))),
        ("get xattr", errno(session.get_xattr(path, "user.a").map(drop))),
        ("list xattr", errno(session.list_xattr(path).map(drop))),
    ]
}

#[test]
fn no_path_leads_out_of_the_export() {
    let site = Site::new();
    let outside = tempfile::tempdir().expect("a directory");
    fs::write(outside.path().join("file"), "secret").expect("a file");
    fs::create_dir(outside.path().join("directory")).expect("a directory");
    let before = tree(outside.path());
    fs::create_dir(site.path("there")).expect("a directory");
    fs::write(site.path("file"), "data").expect("a file");
    let relative = format!("../../../../../../../..{}", outside.path().display());
    for (name, target) in [("absolute", outside.path()), ("relative", Path::new(&relative))] {
        std::os::unix::fs::symlink(target, site.path(name)).expect("a link");
        for path in ["file", "directory", "missing"] {
            let path = format!("/d/{name}/{path}");
            for (what, errno) in looks(&site.session, &path) {
                assert_eq!(errno, libc::EXDEV, "{what} {path}");
            }
            for (what, result) in changes(&site.session, &path) {
                assert_eq!(errno(result), libc::EXDEV, "{what} {path}");
            }
        }
    }
    for path in ["/d/../file", "/d/there/../../file", "/d/.."] {
        for (what, errno) in looks(&site.session, path) {
            assert!(matches!(errno, libc::EXDEV | libc::ENOENT), "{what} {path}: {errno}");
        }
    }
    assert_eq!(tree(outside.path()), before);
    assert_eq!(fs::read_dir(site.path("there")).expect("a directory").count(), 0);
}

#[test]
fn a_directory_that_is_swapped_for_a_link_at_any_moment_leads_nowhere_else() {
    let site = Site::new();
    let outside = tempfile::tempdir().expect("a directory");
    fs::write(outside.path().join("file"), "secret").expect("a file");
    let before = tree(outside.path());
    for name in ["real", "kept"] {
        fs::create_dir(site.path(name)).expect("a directory");
    }
    std::os::unix::fs::symlink(outside.path(), site.path("link")).expect("a link");
    let (one, other) = (site.path("real"), site.path("link"));
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE)
                    .expect("both are there");
            }
        });
        for round in 0..300 {
            let path = |name: &str| format!("/d/real/{name}{round}");
            let _ = site.session.put(path("put"), b"new", &PutOptions::default());
            let _ = site.session.create_dir(path("directory"), 0o755);
            let _ = site.session.symlink("x", path("symlink"));
            let _ = site.session.rename(path("put"), path("renamed"));
            let _ = site.session.hard_link("/d/real/file", "/d/kept/stolen");
            let _ = site.session.rename("/d/real/file", "/d/kept/stolen");
            let _ = site.session.remove_file("/d/real/file");
            let _ = site
                .session
                .set_attributes("/d/real/file", &Attributes { size: Some(0), ..Attributes::default() });
            if let Ok((bytes, _)) = site.session.get("/d/real/file", 100) {
                panic!("{:?} was read", String::from_utf8_lossy(&bytes));
            }
        }
        is_over.store(true, Ordering::Relaxed);
    });
    assert_eq!(tree(outside.path()), before);
    assert_eq!(fs::read_dir(site.path("kept")).expect("a directory").count(), 0);
}

#[test]
fn exports_that_are_read_only_or_no_directories_refuse_what_changes_names() {
    let directory = tempfile::tempdir().expect("a directory");
    fs::create_dir(directory.path().join("there")).expect("a directory");
    fs::write(directory.path().join("file"), "data").expect("a file");
    let path = directory.path().display();
    let exports = [format!("d={path}"), format!("f={path}/file,rw"), "m=mem:1M".to_owned()];
    let server = Server::start(&exports.each_ref().map(String::as_str));
    let session = Session::connect(&server.url(), &Options::default()).expect("it is there");
    let before = tree(directory.path());
    for name in ["/d/file", "/d/there", "/d/new"] {
        for (what, result) in changes(&session, name) {
            assert_eq!(errno(result), libc::EROFS, "{what} {name}");
        }
    }
    assert_eq!(tree(directory.path()), before);
    // An export that is a file can be changed, and stays where it is.
    let (bytes, status) = session.get("/f", 100).expect("a file");
    assert_eq!((&bytes[..], status.size.get()), (&b"data"[..], 4));
    for (what, result) in [
        ("put", session.put("/f", b"new", &PutOptions::default())),
        ("unlink", session.remove_file("/f")),
        ("rename", session.rename("/f", "/f")),
        ("mkdir beneath", session.create_dir("/f/new", 0o755)),
    ] {
        assert!(result.is_err(), "{what}");
    }
    session.set_attributes("/f", &Attributes { size: Some(2), ..Attributes::default() }).expect("it is ours");
    assert_eq!(fs::read(directory.path().join("file")).expect("a file"), b"da");
    assert_eq!(session.metadata("/m").expect("it is there").size.get(), 1 << 20);
    assert_eq!(errno(session.get("/m", 100)), libc::EOPNOTSUPP);
    assert_eq!(errno(session.statfs("/m")), libc::EOPNOTSUPP);
    // The list of exports is a directory like any other.
    let names: Vec<_> =
        session.read_dir("/").expect("a list").map(|entry| entry.expect("an entry").name).collect();
    assert_eq!(names, ["d", "f", "m"]);
    assert_eq!(session.metadata("/").expect("a directory").mode.get() & libc::S_IFMT, libc::S_IFDIR);
    for (what, result) in changes(&session, "/") {
        assert!(result.is_err(), "{what}");
    }
}

// Puts
// --------------------------------------------------------------------------------------------------------

/// A name of an unfinished file of a server.
fn unfinished(digit: char) -> String {
    format!(".raio-put-{}", String::from(digit).repeat(32))
}

#[test]
fn who_gets_a_file_that_is_put_again_and_again_finds_one_version_of_it() {
    let site = Site::new();
    let version = |n: u8| vec![n; 20_000 + usize::from(n)];
    let put = |n| site.session.put("/d/file", &version(n), &PutOptions::default()).expect("there is room");
    put(0);
    let reader = Session::connect(&site.server.url(), &Options::default()).expect("it is there");
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            for n in 1..=200 {
                put(n);
            }
        });
        while !thread.is_finished() {
            let (bytes, status) = reader.get("/d/file", 100_000).expect("there is always one");
            assert_eq!(bytes, version(bytes[0]));
            assert_eq!(status.size.get(), bytes.len() as u64);
            let names: Vec<_> =
                reader.read_dir("/d").expect("a list").map(|it| it.expect("an entry").name).collect();
            assert_eq!(names, ["file"]);
        }
    });
    assert_eq!(fs::read_dir(site.directory.path()).expect("a directory").count(), 1);
}

#[test]
fn what_a_server_that_was_killed_has_left_of_puts_is_not_seen_and_removed() {
    let site = Site::new();
    fs::create_dir(site.path("directory")).expect("a directory");
    for path in [unfinished('a'), format!("directory/{}", unfinished('b'))] {
        fs::write(site.path(&path), "half").expect("a file");
        let remote = format!("/d/{path}");
        assert_eq!(looks(&site.session, &remote), looks(&site.session, "/d/missing"));
        assert_eq!(errno(site.session.open(&remote, libc::O_RDONLY, 0)), libc::ENOENT);
        assert_eq!(errno(site.session.open(&remote, libc::O_RDWR | libc::O_CREAT, 0o644)), libc::EINVAL);
        assert_eq!(errno(site.session.put(&remote, b"", &PutOptions::default())), libc::EINVAL);
        assert_eq!(errno(site.session.rename("/d/directory", &remote)), libc::EINVAL);
        assert_eq!(errno(site.session.remove_file(&remote)), libc::ENOENT);
    }
    assert_eq!(site.session.read_dir("/d").expect("a list").count(), 1);
    assert!(!site.path(&unfinished('a')).exists());
    site.session.remove_dir("/d/directory").expect("it seems to be empty, and so it is");
}

#[test]
fn a_put_can_be_durable_new_and_of_a_given_age() {
    let site = Site::new();
    let options = PutOptions { mode: 0o640, modified_ns: Some(-1_500_000_000), exclusive: true, fsync: true };
    site.session.put("/d/file", b"data", &options).expect("it is new");
    assert_eq!(errno(site.session.put("/d/file", b"other", &options)), libc::EEXIST);
    let metadata = fs::metadata(site.path("file")).expect("it is there");
    assert_eq!((metadata.mode() & 0o777, metadata.mtime(), metadata.mtime_nsec()), (0o640, -2, 500_000_000));
    assert_eq!(fs::read(site.path("file")).expect("a file"), b"data");
    let special = PutOptions { mode: 0o4755, ..PutOptions::default() };
    assert_eq!(errno(site.session.put("/d/special", b"", &special)), libc::EPERM);
    assert_eq!(errno(site.session.create_dir("/d/special", 0o2755)), libc::EPERM);
    // As large as a request can be, and one byte more.
    let largest = vec![7; 1 << 20];
    site.session.put("/d/large", &largest, &PutOptions::default()).expect("it fits");
    assert_eq!(fs::read(site.path("large")).expect("a file"), largest);
    let error = site.session.put("/d/large", &vec![7; (1 << 20) + 1], &PutOptions::default());
    assert_eq!(errno(error), libc::EFBIG);
    let (bytes, status) = site.session.get("/d/large", usize::MAX).expect("a file");
    assert_eq!((bytes.len(), status.size.get()), (1 << 20, 1 << 20));
}

#[test]
fn file_types_in_a_mode_are_ignored_and_names_of_attributes_that_are_too_long_fail_alone() {
    let site = Site::new();
    site.session.create_dir("/d/directory", 0o40_750).expect("a mode as of a stat");
    assert_eq!(fs::metadata(site.path("directory")).expect("it is there").mode(), 0o40_750);
    let options = PutOptions { mode: 0o100_640, ..PutOptions::default() };
    site.session.put("/d/file", b"", &options).expect("a mode as of a stat");
    let attributes = Attributes { mode: Some(0o100_600), ..Attributes::default() };
    site.session.set_attributes("/d/file", &attributes).expect("a mode as of a stat");
    assert_eq!(fs::metadata(site.path("file")).expect("it is there").mode(), 0o100_600);
    for length in [256, 4000] {
        let name = format!("user.{}", "n".repeat(length - 5));
        assert_eq!(errno(site.session.set_xattr("/d/file", &name, b"value", false)), libc::ERANGE);
        assert_eq!(errno(site.session.get_xattr("/d/file", &name)), libc::ERANGE);
        assert_eq!(errno(site.session.remove_xattr("/d/file", &name)), libc::ERANGE);
    }
    let longest = format!("user.{}", "n".repeat(250));
    site.session.set_xattr("/d/file", &longest, b"value", false).expect("255 bytes");
    assert_eq!(site.session.get_xattr("/d/file", &longest).expect("it was set"), b"value");
}

// Lists
// --------------------------------------------------------------------------------------------------------

#[test]
fn a_large_directory_is_listed_page_by_page_with_each_name_once() {
    const FILES: usize = 20_000;
    let mut site = Site::new();
    fs::create_dir(site.path("large")).expect("a directory");
    let name = |n: usize| format!("file{n:0width$}", width = n % 90);
    for n in 0..FILES {
        fs::write(site.path(&format!("large/{}", name(n))), &[0; 3][..n % 4]).expect("a file");
    }
    let before = site.server.descriptors().len();
    let mut expected: Vec<_> = (0..FILES).map(|n| (name(n), n as u64 % 4)).collect();
    expected.sort();
    let check = |entries: Result<Vec<DirEntry>, Error>| {
        let entry = |entry: DirEntry| {
            assert!(entry.is_file() && entry.has_status);
            (entry.name.into_string().expect("UTF-8"), entry.size)
        };
        let mut seen: Vec<_> = entries.expect("a list").into_iter().map(entry).collect();
        seen.sort();
        assert!(seen == expected, "{} of {}", seen.len(), expected.len());
    };
    check(site.session.read_dir("/d/large").and_then(Iterator::collect));
    let mut context = site.session.context(8).expect("a context");
    let list = || PathOperation::List { path: "/d/large".into() };
    let begun = entries_of(run(&mut context, list()).expect("it is taken"));
    check(all_queued(&mut context, begun));
    // It has been read to its end, and what is given up early is over, too.
    for _ in 0..40 {
        let mut listing = site.session.read_dir("/d/large").expect("a list");
        listing.next().expect("an entry").expect("an entry");
    }
    // In a context a list can end with its page under way, without one, and before it has begun.
    for n in 0..40 {
        let entries = entries_of(run(&mut context, list()).expect("it is taken"));
        let next = PathOperation::ListNext { entries };
        let next = context.submit_path(next, SubmitOptions::default(), 0).expect("it is taken");
        if n % 2 == 0 {
            let _ = context.cancel(next);
        }
        let timeout = Some(std::time::Duration::from_micros(n * 20));
        let options = SubmitOptions { timeout, ..SubmitOptions::default() };
        context.submit_path(list(), options, 0).expect("it is taken");
        while context.stats().in_flight > 0 {
            context.wait(1, usize::MAX, None).expect("the server is there");
            while context.next().is_some() {}
        }
    }
    context.close();
    site.server.statistics_when(|_| true);
    let deadline = std::time::Instant::now() + raio_e2e::PATIENCE;
    while site.server.descriptors().len() > before {
        assert!(std::time::Instant::now() < deadline, "{:?}", site.server.descriptors());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn a_session_that_begins_too_many_lists_loses_the_oldest() {
    let site = Site::new();
    for n in 0..2000 {
        fs::write(site.path(&format!("a-file-with-a-long-name-{n}")), "").expect("a file");
    }
    let mut listings: Vec<_> = (0..17).map(|_| site.session.read_dir("/d").expect("a list")).collect();
    let oldest = listings.remove(0);
    let lost = oldest.filter_map(Result::err).next().expect("it cannot go on");
    assert_eq!(lost.errno(), libc::ESTALE, "{lost}");
    for listing in listings {
        assert_eq!(listing.filter_map(Result::ok).count(), 2000);
    }
}

// Broken connections, and servers that are started again
// --------------------------------------------------------------------------------------------------------

#[test]
fn however_often_the_connection_breaks_each_change_is_made_once() {
    let site = Site::new();
    let proxy = Proxy::start(site.server.address());
    let session = Session::connect(&proxy.url(), &Options::default()).expect("it is there");
    let mut random = Random::new();
    session.put("/d/moving0", b"data", &PutOptions::default()).expect("there is room");
    session.create_dir("/d/many", 0o755).expect("it is new");
    for n in 0..150_u64 {
        // Within the bytes of the next few requests and answers, or of the handshake.
        let direction = if random.below(2) == 0 { Direction::Up } else { Direction::Down };
        let ending = if random.below(2) == 0 { Ending::Fin } else { Ending::Reset };
        let cut = Some((direction, random.below(600) + 1, ending));
        proxy.plan([Treatment { cut, ..Treatment::default() }]);
        proxy.end_all(ending);
        let next = n + 1;
        session.rename(format!("/d/moving{n}"), format!("/d/moving{next}")).expect("it is there once");
        session.create_dir(format!("/d/many/{n}"), 0o755).expect("it is new");
        session
            .put(
                format!("/d/many/{n}/file"),
                &bytes(n as u16),
                &PutOptions { exclusive: true, ..PutOptions::default() },
            )
            .expect("it is new");
        session.hard_link(format!("/d/many/{n}/file"), format!("/d/many/{n}/link")).expect("it is new");
        session.remove_file(format!("/d/many/{n}/file")).expect("it is there");
        if n % 2 == 1 {
            session.remove_file(format!("/d/many/{n}/link")).expect("it is there");
            session.remove_dir(format!("/d/many/{n}")).expect("it is empty");
        }
        let (got, _) = session.get(format!("/d/moving{next}"), 100).expect("it is there");
        assert_eq!(got, b"data");
        let listed = session.read_dir("/d/many").expect("a list").filter_map(Result::ok).count();
        assert_eq!(listed as u64, next.div_ceil(2), "round {n}");
    }
    assert_eq!(fs::read_dir(site.path("many")).expect("a directory").count(), 75);
    assert!(proxy.passed(150, Direction::Up) > 0, "there were many connections");
}

#[test]
fn a_list_goes_on_over_a_connection_that_breaks_and_not_with_another_server() {
    let directory = tempfile::tempdir().expect("a directory");
    for n in 0..20_000 {
        fs::write(directory.path().join(format!("a-file-with-a-long-name-{n}")), "").expect("a file");
    }
    let export = format!("d={}", directory.path().display());
    let mut server = Server::start(&[&export]);
    let proxy = Proxy::start(server.address());
    let session = Session::connect(&proxy.url(), &Options::default()).expect("it is there");
    let mut names = std::collections::BTreeSet::new();
    for (n, entry) in session.read_dir("/d").expect("a list").enumerate() {
        if n % 1500 == 0 {
            proxy.end_all(Ending::Reset);
        }
        assert!(names.insert(entry.expect("an entry").name), "each comes once");
    }
    assert_eq!(names.len(), 20_000);

    let listing = session.read_dir("/d").expect("a list");
    let address = server.address();
    server.kill();
    let _server = Server::start_with(&[&export], &["--listen", &format!("tcp://{address}")]);
    let lost = listing.filter_map(Result::err).next().expect("it cannot go on");
    assert_eq!(lost.errno(), libc::ESTALE, "{lost}");
    assert_eq!(session.read_dir("/d").expect("a list").count(), 20_000);
}

// Clients with keys
// --------------------------------------------------------------------------------------------------------

#[test]
fn a_client_that_has_a_directory_changes_names_there_alone() {
    let (confined, reader, whole) = (Client::new(), Client::new(), Client::new());
    let clients = confined.entry("confined", "exports = { data = { access = 'rw', path = 'own' } }")
        + &reader.entry("reader", "exports = { data = 'ro', other = 'rw' }")
        + &whole.entry("whole", "exports = { data = 'rw' }");
    let site = raio_e2e::Site::new(&clients);
    for name in ["own", "theirs"] {
        fs::create_dir(site.path("data").join(name)).expect("a directory");
        fs::write(site.path("data").join(name).join("file"), name).expect("a file");
    }
    let session = confined.connect(&site).expect("a session");
    session.rename("/data/own/file", "/data/own/renamed").expect("it is its own");
    session.create_dir("/data/own/new", 0o755).expect("it is its own");
    let count = |session: &Session, path: &str| session.read_dir(path).expect("a list").count();
    assert_eq!((count(&session, "/"), count(&session, "/data/own")), (1, 2));
    let before = tree(&site.path("data"));
    for path in ["/data/theirs/file", "/data/file", "/data", "/data/own/../theirs/file", "/logs/file"] {
        for (what, errno) in looks(&session, path) {
            assert_eq!(errno, libc::ENOENT, "{what} {path}");
        }
        for (what, result) in [
            ("unlink", session.remove_file(path)),
            ("rename from", session.rename(path, "/data/own/stolen")),
            ("rename to", session.rename("/data/own/renamed", path)),
            ("link from", session.hard_link(path, "/data/own/stolen")),
            ("link to", session.hard_link("/data/own/renamed", path)),
            ("put", session.put(path, b"", &PutOptions::default())),
        ] {
            assert_eq!(errno(result), libc::ENOENT, "{what} {path}");
        }
    }
    assert_eq!(tree(&site.path("data")), before);

    // What one may only read gets no name where one may write.
    let session = reader.connect(&site).expect("a session");
    assert_eq!(session.get("/data/theirs/file", 100).expect("it may be read").0, b"theirs");
    assert_eq!(errno(session.hard_link("/data/theirs/file", "/other/stolen")), libc::EROFS);
    assert_eq!(errno(session.rename("/data/theirs/file", "/other/stolen")), libc::EROFS);
    assert_eq!(errno(session.rename("/other/file", "/data/own/new")), libc::EROFS);
    let session = whole.connect(&site).expect("a session");
    assert_eq!(
        errno(session.rename("/data/file", "/logs/file")),
        libc::ENOENT,
        "there is no such export for it"
    );
    assert_eq!(tree(&site.path("data")), before);
    assert_eq!(count(&session, "/data"), 3);
}

#[test]
fn bytes_that_names_hold_are_counted_where_they_are_limited() {
    let client = Client::new();
    let clients =
        client.entry("one", "exports = { data = { access = 'rw', path = 'own', stored = '100k' } }");
    let (site, log) =
        raio_e2e::Site::configured(&clients, "[export.data]\npath = 'DIRECTORY/data'\naccess = 'rw'\n");
    fs::create_dir(site.path("data/own")).expect("a directory");
    drop(site.server);
    let site = raio_e2e::Site {
        server: raio_e2e::Site::start_configured(&site.directory),
        directory: site.directory,
    };
    raio_e2e::await_log(&log, "0 files have 0 bytes");
    let session = client.connect(&site).expect("a session");
    let put = |name: &str, kib: usize| {
        session.put(format!("/data/own/{name}"), &vec![1; kib << 10], &PutOptions::default())
    };
    put("a", 60).expect("there is room");
    assert_eq!(errno(put("b", 41)), libc::EDQUOT);
    assert_eq!(session.read_dir("/data/own").expect("a list").count(), 1);
    put("b", 40).expect("there is room");
    // What is replaced makes room.
    put("a", 60).expect("it has as many bytes as before");
    put("a", 10).expect("it has fewer");
    session.hard_link("/data/own/a", "/data/own/also").expect("it is its own");
    session.remove_file("/data/own/a").expect("it is its own");
    assert_eq!(errno(put("c", 51)), libc::EDQUOT, "the file has another name still");
    session.remove_file("/data/own/also").expect("it is its own");
    put("c", 60).expect("there is room");
    let size = |size| Attributes { size: Some(size), ..Attributes::default() };
    assert_eq!(errno(session.set_attributes("/data/own/c", &size(61 << 10))), libc::EDQUOT);
    session.set_attributes("/data/own/c", &size(1 << 10)).expect("it is shorter");
    session.rename("/data/own/c", "/data/own/b").expect("it is its own");
    put("d", 99).expect("all else is gone");
    assert_eq!(errno(put("e", 1)), libc::EDQUOT);
}
