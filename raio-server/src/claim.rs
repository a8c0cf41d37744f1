//! What a server exports for writing, and how no two servers do that with the same files: not even a server
//! that has been killed, as long as I/O of it is in flight in the kernel.
//!
//! Each server has a file in the state directory that says what it claims, and holds a flock(2) on it. The
//! descriptor is registered with every worker's ring, so the lock is held until nothing of them is in flight
//! any more, however the process ends. A server whose claim another one has waits for that lock. Servers that
//! start do so one after another, behind a lock on the file `lock`.

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, anyhow, ensure};
use rustix::fs::{AtFlags, CWD, FlockOperation, OFlags, StatxFlags, flock};
use rustix::io::Errno;

use crate::file_identity::disk_of;
use crate::state_directory::{StateDirectory, read_text};

const HEADING: &str = "raio server, version 1";
const PREFIX: &str = "server.";

/// An export for writing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// The export's name.
    pub name: String,
    /// Its path.
    pub path: String,
    /// It has the file systems that are mounted beneath it, too.
    pub crosses_mounts: bool,
    /// What it is: each of these names it.
    pub objects: Vec<String>,
    /// What it lies in: the directories above it on the same mount, or its disk.
    pub near: Vec<String>,
    /// The directories above these.
    pub far: Vec<String>,
}

impl Claim {
    /// Of an export whose path is this, absolute and without symbolic links. `is_mountpoint`: something else
    /// may be mounted there at any time.
    pub fn of(name: &str, path: &Path, crosses_mounts: bool, is_mountpoint: bool) -> anyhow::Result<Self> {
        let mut claim = Self {
            name: escaped(name.as_bytes()),
            path: escaped(path.as_os_str().as_bytes()),
            crosses_mounts,
            ..Self::default()
        };
        let metadata = path.metadata()?;
        if metadata.file_type().is_block_device() {
            let numbers = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
            claim.objects.push(device(numbers));
            claim.near.extend(disk_of(numbers).map(device));
            return Ok(claim);
        }
        if is_mountpoint {
            claim.objects.push(format!("path:{}", claim.path));
        }
        let (object, mount) = inode(path)?;
        claim.objects.push(object);
        for above in path.ancestors().skip(1) {
            let (object, of_mount) = inode(above)?;
            let is_near = of_mount == mount && claim.far.is_empty();
            if is_near { &mut claim.near } else { &mut claim.far }.push(object);
        }
        Ok(claim)
    }

    /// Whether what one of them has the other one has as well, or a part of it.
    pub fn conflicts(&self, other: &Self) -> bool {
        let is_same = self.objects.iter().any(|object| other.objects.contains(object));
        is_same || self.holds(other) || other.holds(self)
    }

    /// Whether the other one lies in this one.
    fn holds(&self, other: &Self) -> bool {
        let holds = |above: &[String]| self.objects.iter().any(|object| above.contains(object));
        holds(&other.near) || self.crosses_mounts && holds(&other.far)
    }

    /// Whether a directory lies in it, as far as that can be told.
    pub fn contains(&self, directory: &Path) -> bool {
        let directory = directory.canonicalize().ok();
        let inner = directory.and_then(|path| Self::of("", &path, false, false).ok());
        inner.is_some_and(|inner| self.conflicts(&inner) && !inner.holds(self))
    }

    /// A name for a file of the export, without its directory: of what it is, whatever it is called.
    pub fn key(&self) -> String {
        let key: String = self.objects.first().map_or("", |object| object).replace('/', "-");
        let hash = key.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        if key.len() <= 64 && !key.contains('%') { key } else { format!("path-{hash:016x}") }
    }
}

fn device((major, minor): (u32, u32)) -> String {
    format!("device:{major}:{minor}")
}

/// What names a file or directory, and the id of its mount.
fn inode(path: &Path) -> anyhow::Result<(String, u64)> {
    let mask = StatxFlags::INO | StatxFlags::MNT_ID;
    let stat = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, mask)
        .with_context(|| format!("Cannot look at {}", path.display()))?;
    let object = format!("{}:{}/{}", stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino);
    Ok((object, stat.stx_mnt_id))
}

/// Text without spaces, commas, line ends and the like, as in a URL.
pub fn escaped(bytes: &[u8]) -> String {
    let mut text = String::new();
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"/._-:".contains(&byte) {
            text.push(byte as char);
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

// The file
// -------------------------------------------------------------------------------------------------------

/// What a server claims, and its process.
fn print(claims: &[Claim], pid: u32) -> String {
    let list = |items: &[String]| if items.is_empty() { "-".to_owned() } else { items.join(",") };
    let mut text = format!("{HEADING}\npid {pid}\n");
    for Claim { name, path, crosses_mounts, objects, near, far } in claims {
        let mounts = if *crosses_mounts { "all-mounts" } else { "one-mount" };
        let (objects, near, far) = (list(objects), list(near), list(far));
        let _ = writeln!(text, "export {name} {path} {mounts} {objects} {near} {far}");
    }
    text
}

fn parse(text: &str) -> anyhow::Result<(Vec<Claim>, u32)> {
    let wrong = |line: usize, what: &str| anyhow!("line {line} is not {what}");
    let mut lines = text.lines().zip(1..);
    ensure!(lines.next().is_some_and(|(line, _)| line == HEADING), wrong(1, &format!("{HEADING:?}")));
    let pid = lines.next().and_then(|(line, _)| line.strip_prefix("pid ")?.parse().ok());
    let pid = pid.ok_or_else(|| wrong(2, "\"pid\" and a number"))?;
    let list = |item: &str| match item {
        "-" => Vec::new(),
        items => items.split(',').map(str::to_owned).collect(),
    };
    let claim = |(line, at): (&str, usize)| {
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            ["export", name, path, mounts @ ("all-mounts" | "one-mount"), objects, near, far] => Ok(Claim {
                name: name.to_owned(),
                path: path.to_owned(),
                crosses_mounts: mounts == "all-mounts",
                objects: list(objects),
                near: list(near),
                far: list(far),
            }),
            _ => Err(wrong(at, "an export and what it is")),
        }
    };
    Ok((lines.map(claim).collect::<anyhow::Result<_>>()?, pid))
}

// The lock
// -------------------------------------------------------------------------------------------------------

/// What came of a try to lock.
#[derive(Debug)]
pub enum Attempt {
    /// Nobody else claims any of it as long as this is open, here or in the kernel.
    Locked(Arc<OwnedFd>),
    /// Somebody else does: why this server cannot start yet, for people.
    Busy(String),
}

/// Claims all of these, or none. What this server has claimed already, with `own`, is no obstacle.
pub fn try_claim(
    directory: &StateDirectory,
    claims: &[Claim],
    own: &[Arc<OwnedFd>],
) -> anyhow::Result<Attempt> {
    let own = own.iter().map(rustix::fs::fstat).collect::<Result<Vec<_>, _>>()?;
    let lock = "lock";
    let cannot = || format!("Cannot lock {}", directory.path(lock).display());
    let gate = directory.open_file(lock, OFlags::RDWR | OFlags::CREATE).with_context(cannot)?;
    if !try_flock(&gate).with_context(cannot)? {
        return Ok(Attempt::Busy("another server with the same state directory starts".to_owned()));
    }
    for name in directory.names(PREFIX)? {
        let cannot = || format!("Cannot look into {}", directory.path(&name).display());
        let file = match directory.open_file(&name, OFlags::RDWR) {
            Err(Errno::NOENT) => continue,
            file => file.with_context(cannot)?,
        };
        if try_flock(&file).with_context(cannot)? {
            // Its server, and all that it had begun, has ended.
            directory.remove(&name)?;
            continue;
        }
        let stat = rustix::fs::fstat(&file).with_context(cannot)?;
        if own.iter().any(|own| (own.st_dev, own.st_ino) == (stat.st_dev, stat.st_ino)) {
            continue;
        }
        let theirs = read_text(file).and_then(|text| parse(&text)).with_context(|| {
            format!(
                "{} is no file of a running server as this version writes it. Stop that server, or use \
                 another state directory",
                directory.path(&name).display()
            )
        })?;
        if let Some(busy) = conflict(claims, &theirs.0) {
            return Ok(Attempt::Busy(describe(busy, theirs.1)));
        }
    }
    let pid = std::process::id();
    for number in 0.. {
        let name = format!("{PREFIX}{pid}.{number}");
        let cannot = || format!("Cannot create {}", directory.path(&name).display());
        match directory.open_file(&name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL) {
            // In another PID namespace there is one with the same id.
            Err(Errno::EXIST) => {}
            file => {
                let mut file = std::fs::File::from(file.with_context(cannot)?);
                ensure!(try_flock(&file).with_context(cannot)?, "{}", cannot());
                file.write_all(print(claims, pid).as_bytes()).with_context(cannot)?;
                return Ok(Attempt::Locked(Arc::new(file.into())));
            }
        }
    }
    unreachable!("the loop tries every number until a file can be created")
}

fn conflict<'a>(ours: &'a [Claim], theirs: &'a [Claim]) -> Option<(&'a Claim, &'a Claim)> {
    let pairs = ours.iter().flat_map(|our| theirs.iter().map(move |their| (our, their)));
    pairs.into_iter().find(|(our, their)| our.conflicts(their))
}

fn describe((our, their): (&Claim, &Claim), pid: u32) -> String {
    // Of a process whose threads hang in the kernel the first one has ended.
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok();
    let state = state.as_deref().and_then(|stat| stat.rsplit_once(") ")?.1.chars().next());
    let who = match state {
        None | Some('Z' | 'X') => {
            format!("I/O of a raio_server that has been killed (process {pid}) is still in flight")
        }
        Some(_) => format!("a raio_server that is running (process {pid}) has it. Stop that one first"),
    };
    format!("export {} ({}) overlaps with {} ({}), and {who}", our.name, our.path, their.name, their.path)
}

fn try_flock(fd: impl std::os::fd::AsFd) -> Result<bool, Errno> {
    match flock(fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(path: &Path) -> Claim {
        Claim::of("name of it", &path.canonicalize().unwrap(), false, false).unwrap()
    }

    fn directory() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("a/b")).unwrap();
        std::fs::create_dir(directory.path().join("c")).unwrap();
        std::fs::write(directory.path().join("a/file"), "").unwrap();
        directory
    }

    #[test]
    fn exports_conflict_if_one_lies_in_the_other() {
        let directory = directory();
        let path = |name: &str| directory.path().join(name);
        std::fs::hard_link(path("a/file"), path("c/link")).unwrap();
        std::os::unix::fs::symlink("a", path("d")).unwrap();
        assert!(claim(&path("a")).contains(&path("a/b")) && !claim(&path("a")).contains(&path("c")));
        assert!(!claim(&path("a/b")).contains(&path("a")));
        for (one, other, expected) in [
            ("a", "a", true),
            ("a", "d", true),
            ("a", "a/b", true),
            ("", "a/b", true),
            ("a", "a/file", true),
            ("a", "c", false),
            ("a/b", "a/file", false),
            ("a/file", "c/link", true),
            ("a/b", "c", false),
        ] {
            let (one, other) = (claim(&path(one)), claim(&path(other)));
            assert_eq!(one.conflicts(&other), expected, "{one:?} {other:?}");
            assert_eq!(other.conflicts(&one), expected, "{other:?} {one:?}");
        }
    }

    #[test]
    fn what_is_mounted_beneath_an_export_is_its_own_only_if_it_crosses_mounts() {
        let text = |text: &str| vec![text.to_owned()];
        let inner = Claim { objects: text("2:1/5"), far: text("1:1/7"), ..Claim::default() };
        let mut outer = Claim { objects: text("1:1/7"), far: text("1:1/2"), ..Claim::default() };
        assert!(!outer.conflicts(&inner) && !inner.conflicts(&outer));
        outer.crosses_mounts = true;
        assert!(outer.conflicts(&inner) && inner.conflicts(&outer));
        let partition = Claim { objects: text("device:8:1"), near: text("device:8:0"), ..Claim::default() };
        let disk = Claim { objects: text("device:8:0"), ..Claim::default() };
        assert!(partition.conflicts(&disk) && disk.conflicts(&partition));
    }

    #[test]
    fn the_file_says_what_is_claimed() {
        let directory = directory();
        let path = directory.path().canonicalize().unwrap();
        let claims = [claim(&path.join("a")), Claim::of("x,\n y", &path.join("c"), true, true).unwrap()];
        assert_eq!(parse(&print(&claims, 7)).unwrap(), (claims.to_vec(), 7));
        for (text, line) in [
            ("", 1),
            ("raio server, version 2\n", 1),
            ("raio server, version 1\nexport\n", 2),
            ("raio server, version 1\npid 1\nexport a b c d e f\n", 3),
            ("raio server, version 1\npid 1\nexport a b one-mount d e\n", 3),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("line {line} ")), "{error}");
        }
    }

    #[test]
    fn what_one_has_no_other_gets_until_it_has_gone() {
        let files = directory();
        let state = tempfile::tempdir().unwrap();
        let state = StateDirectory::open(state.path()).unwrap();
        let (a, b, c) = (
            claim(&files.path().join("a")),
            claim(&files.path().join("a/b")),
            claim(&files.path().join("c")),
        );
        let Attempt::Locked(of_a) = try_claim(&state, &[a], &[]).unwrap() else { panic!("nobody has it") };
        let Attempt::Busy(why) = try_claim(&state, std::slice::from_ref(&b), &[]).unwrap() else {
            panic!("it has two owners")
        };
        let pid = format!("process {}", std::process::id());
        assert!(why.contains(&pid) && why.contains("name%20of%20it"), "{why}");
        let Attempt::Locked(_of_c) = try_claim(&state, &[c], &[]).unwrap() else { panic!("nobody has it") };
        drop(of_a);
        let Attempt::Locked(_) = try_claim(&state, &[b], &[]).unwrap() else { panic!("nobody has it") };
        // Those of servers that have gone do not stay.
        assert_eq!(state.names(PREFIX).unwrap().len(), 2);
    }

    #[test]
    fn a_running_servers_file_that_nobody_understands_is_an_error_that_names_it() {
        let state = tempfile::tempdir().unwrap();
        let state = StateDirectory::open(state.path()).unwrap();
        state.replace("server.1.0", "nonsense").unwrap();
        let file = state.open_file("server.1.0", OFlags::RDWR).unwrap();
        assert!(try_flock(&file).unwrap());
        let error = format!("{:#}", try_claim(&state, &[], &[]).unwrap_err());
        assert!(error.contains("server.1.0"), "{error}");
        drop(file);
        assert!(matches!(try_claim(&state, &[], &[]), Ok(Attempt::Locked(_))));
    }
}
