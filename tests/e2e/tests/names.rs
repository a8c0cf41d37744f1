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
    Answer, Attributes, Buffer, Buffers, Context, Error, FileStatus, Options, PathOperation, PutOptions,
    Session, SubmitOptions,
};
use raio_e2e::{Server, number};
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
    _server: Server,
}

impl Site {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let server = Server::start(&[&format!("d={},rw", directory.path().display())]);
        let session = Session::connect(&server.url(), &Options::default()).expect("it is there");
        Self { directory, session, _server: server }
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
        Step::List(path) => session.read_dir(at(path)).and_then(|entries| {
            let entries = entries.map(|entry| {
                let entry = entry?;
                let size = if entry.is_file() { entry.size } else { 0 };
                Ok((entry.name, (entry.mode, size)))
            });
            entries.collect::<Result<_, Error>>().map(Outcome::Names)
        }),
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

/// The same as operations of a context. What there is only as calls is done by those.
fn queued(session: &Session, context: &mut Context, base: &Path, step: &Step) -> Outcome {
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
        Step::List(_)
        | Step::SetXattr(..)
        | Step::GetXattr(_)
        | Step::ListXattr(_)
        | Step::RemoveXattr(_) => return remote(session, base, step),
    };
    let is_get = matches!(operation, PathOperation::Get { .. });
    if let Err(rejected) = context.submit_path(operation, SubmitOptions::default(), 0) {
        return Outcome::Failed(rejected.error.errno());
    }
    context.wait(1, 1, None).expect("the server is there");
    let completion = context.next().expect("it was waited for");
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
        (Ok(_), None) => Outcome::Done,
        (Ok(_), other) => panic!("{other:?} of {step:?}"),
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
            let got = queued(&site.session, &mut context.borrow_mut(), &there_queued, step);
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
