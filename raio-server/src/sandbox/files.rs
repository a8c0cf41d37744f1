//! Which files can be opened: a Landlock domain. It is about opening, creating, renaming and removing; what
//! is open already, and what stat(2) tells, is not restricted.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope, make_bitflags,
};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

/// The newest version whose rights are all denied unless granted. Older kernels have fewer.
const NEWEST: ABI = ABI::V7;
/// What came after the first version, and with which one. Before version 2 renames to another directory are
/// denied always.
const LATER: [(i32, &str); 4] =
    [(3, "truncating"), (4, "TCP"), (5, "ioctls of devices"), (6, "signals and abstract sockets")];

/// Something that can still be opened, with everything beneath it.
#[derive(Debug)]
pub struct Grant {
    at: OwnedFd,
    access: BitFlags<AccessFs>,
}

impl Grant {
    /// What this descriptor refers to (it may be open with O_PATH), for these rights as far as they have a
    /// meaning there.
    fn new(at: OwnedFd, access: BitFlags<AccessFs>) -> Result<Self, Errno> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&at)?.st_mode);
        let of_file = AccessFs::from_file(NEWEST);
        let access = if kind == FileType::Directory { access } else { access & of_file };
        Ok(Self { at, access })
    }

    /// Files of an export.
    pub fn of_export(at: OwnedFd, is_writable: bool, has_devices: bool) -> Result<Self, Errno> {
        let mut access = make_bitflags!(AccessFs::{ReadFile | ReadDir});
        if is_writable {
            access |= make_bitflags!(AccessFs::{
                WriteFile | Truncate | MakeReg | MakeDir | MakeSym | RemoveFile | RemoveDir | Refer
            });
        }
        if has_devices {
            access |= AccessFs::IoctlDev;
        }
        Self::new(at, access)
    }

    /// The files of the state directory, which are replaced by renaming.
    pub fn of_state(at: BorrowedFd<'_>) -> Result<Self, Errno> {
        let access = make_bitflags!(AccessFs::{
            ReadFile | ReadDir | WriteFile | Truncate | MakeReg | RemoveFile
        });
        Self::new(rustix::io::fcntl_dupfd_cloexec(at, 0)?, access)
    }

    /// The directory of a log, whose file is made anew when it was moved away.
    pub fn of_log(at: OwnedFd) -> Result<Self, Errno> {
        Self::new(at, make_bitflags!(AccessFs::{WriteFile | MakeReg}))
    }

    /// The files of a directory at this path, for reading: an editor may put another one in the place of a
    /// file.
    pub fn to_read_files(path: &Path) -> Result<Self, Errno> {
        Self::new(at(path)?, make_bitflags!(AccessFs::{ReadFile}))
    }

    /// A file or directory at this path, for reading.
    pub fn to_read(path: &Path) -> Result<Self, Errno> {
        Self::new(at(path)?, make_bitflags!(AccessFs::{ReadFile | ReadDir}))
    }

    /// The device nodes in a directory at this path.
    pub fn of_devices(path: &Path) -> Result<Self, Errno> {
        Self::new(at(path)?, make_bitflags!(AccessFs::{ReadFile | WriteFile | ReadDir | IoctlDev}))
    }
}

fn at(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// Confines this thread, and those that it starts. Returns the version of Landlock; the error is why there is
/// none, for people.
pub fn confine(grants: &[Grant]) -> Result<i32, String> {
    let restricted = || {
        let mut ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?;
        for Grant { at, access } in grants {
            ruleset = ruleset.add_rule(PathBeneath::new(at.as_fd(), *access))?;
        }
        ruleset.restrict_self()
    };
    let status = restricted().map_err(|error: landlock::RulesetError| error.to_string())?;
    match status.landlock {
        LandlockStatus::Available { effective_abi, .. } if status.ruleset != RulesetStatus::NotEnforced => {
            Ok(effective_abi as i32)
        }
        LandlockStatus::NotEnabled => Err("it is turned off: add landlock to the kernel's lsm= list".into()),
        _ => Err("this kernel was built without it, or a seccomp profile forbids it".into()),
    }
}

/// What this version of Landlock does not restrict.
pub fn missing(abi: i32) -> Vec<&'static str> {
    LATER.into_iter().filter(|&(since, _)| abi < since).map(|(_, what)| what).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_versions_lack_what_came_later() {
        assert_eq!(missing(1), ["truncating", "TCP", "ioctls of devices", "signals and abstract sockets"]);
        assert_eq!(missing(4), ["ioctls of devices", "signals and abstract sockets"]);
        assert!(missing(6).is_empty() && missing(NEWEST as i32).is_empty());
    }

    #[test]
    fn what_is_granted_depends_on_the_export_and_on_what_lies_there() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let grant = |path: &Path, is_writable, has_devices| {
            Grant::of_export(at(path).unwrap(), is_writable, has_devices).unwrap().access
        };
        let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
        assert_eq!(grant(directory.path(), false, false), read);
        assert!(grant(directory.path(), true, false).contains(AccessFs::MakeReg));
        assert!(!grant(directory.path(), true, false).contains(AccessFs::IoctlDev));
        assert!(grant(directory.path(), false, true).contains(AccessFs::IoctlDev));
        let of_file = make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate});
        assert_eq!(grant(&file, true, false), of_file);
        for access in [
            AccessFs::Execute,
            AccessFs::MakeFifo,
            AccessFs::MakeSock,
            AccessFs::MakeChar,
            AccessFs::MakeBlock,
        ] {
            assert!(!grant(directory.path(), true, true).contains(access), "{access:?}");
        }
    }

    #[test]
    fn only_what_is_granted_can_be_opened() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["ro", "rw"] {
            std::fs::create_dir(path(name)).unwrap();
            std::fs::write(path(name).join("file"), "x").unwrap();
        }
        let grants = [("ro", false), ("rw", true)]
            .map(|(name, is_writable)| Grant::of_export(at(&path(name)).unwrap(), is_writable, false));
        let grants = grants.map(Result::unwrap);
        let denied = |result: std::io::Result<()>| {
            assert_eq!(result.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
        };
        let confined = || {
            if let Err(why) = confine(&grants) {
                return eprintln!("SKIPPED: there is no Landlock here ({why})");
            }
            std::fs::read(path("ro/file")).unwrap();
            std::fs::read(path("rw/file")).unwrap();
            std::fs::write(path("rw/new"), "y").unwrap();
            denied(std::fs::write(path("ro/file"), "y"));
            denied(std::fs::write(path("ro/new"), "y"));
            denied(std::fs::read("/etc/passwd").map(drop));
            std::fs::create_dir(path("rw/directory")).unwrap();
            std::fs::rename(path("rw/new"), path("rw/directory/new")).unwrap();
            std::fs::remove_file(path("rw/directory/new")).unwrap();
            denied(std::fs::remove_file(path("ro/file")));
            denied(std::fs::create_dir(path("ro/directory")));
            denied(rustix::fs::mkfifoat(CWD, path("rw/fifo"), Mode::RWXU).map_err(std::io::Error::from));
        };
        // A domain cannot be left: in a thread of its own.
        std::thread::scope(|scope| scope.spawn(confined).join().unwrap());
    }
}
