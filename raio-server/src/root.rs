//! Where an export's files lie, and which of them are served.

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use anyhow::ensure;
use raio_transport::Status;
use raio_transport::protocol::FileStatus;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Statx, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use crate::claim::Claim;
use crate::disks::DeviceNumber;
use crate::export_spec::ExportSpec;
use crate::file_identity;
use crate::rejection::Rejection;
use crate::sandbox::Grant;
use crate::syscalls::openat2;
use crate::volume::SizeLimit;
use raio_transport::sync::lock;

/// The types of file systems that are served: those that hold files, and none that stand for the kernel's or
/// a process's state, the server's own memory among it. By `f_type` of statfs(2); raio_server(8) names them.
const SERVED: [libc::__fsword_t; 42] = [
    libc::EXT4_SUPER_MAGIC,
    libc::XFS_SUPER_MAGIC,
    libc::BTRFS_SUPER_MAGIC,
    libc::F2FS_SUPER_MAGIC,
    libc::TMPFS_MAGIC,
    libc::OVERLAYFS_SUPER_MAGIC,
    libc::ECRYPTFS_SUPER_MAGIC,
    libc::NFS_SUPER_MAGIC,
    libc::SMB_SUPER_MAGIC,
    libc::AFS_SUPER_MAGIC,
    libc::CODA_SUPER_MAGIC,
    libc::FUSE_SUPER_MAGIC,
    libc::MSDOS_SUPER_MAGIC,
    libc::ISOFS_SUPER_MAGIC,
    libc::REISERFS_SUPER_MAGIC,
    libc::NILFS_SUPER_MAGIC,
    libc::JFFS2_SUPER_MAGIC,
    // ramfs, bcachefs, JFS, ZFS, CIFS, SMB2, Ceph, 9P, GFS2, OCFS2, exFAT, NTFS3, NTFS, UDF, SquashFS, EROFS,
    // HFS, HFS+, UBIFS, zonefs, Lustre, GPFS, BeeGFS, OrangeFS, VirtualBox's.
    0x8584_58f6,
    0xca45_1a4e,
    0x3153_464a,
    0x2fc1_2fc1,
    0xff53_4d42,
    0xfe53_4d42,
    0x00c3_6400,
    0x0102_1997,
    0x0116_1970,
    0x7461_636f,
    0x2011_bab0,
    0x7366_746e,
    0x5346_544e,
    0x1501_3346,
    0x7371_7368,
    0xe0f5_e1e2,
    0x4244,
    0x482b,
    0x2405_1905,
    0x5a4f_4653,
    0x0bd0_0bd0,
    0x4750_4653,
    0x1983_0326,
    0x2003_0528,
    0x786f_4256,
];

/// A directory, file or block device that is exported. It is looked up anew by each open, so that what is
/// mounted over it, or takes its place, is seen.
#[derive(Debug)]
pub struct Root {
    path: CString,
    kind: FileType,
    must_be_mountpoint: bool,
    has_devices: bool,
    crosses_mounts: bool,
    bytes_max: Option<u64>,
    /// What one file may grow to, if it must not grow: the largest size that it was seen to have.
    largest: Option<AtomicU64>,
    seen: Mutex<Option<Identity>>,
    /// The device that it lay on, or was, when it was last looked up: as of makedev(3); 0 before that.
    device: AtomicU64,
    /// What was there when the sandbox was told what may be opened.
    granted: OnceLock<Identity>,
    /// The sandbox allows to open that, and nothing else that gets to the path.
    is_confined: AtomicBool,
}

/// What tells a directory, or a device, from another at the same path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: (u32, u32),
    inode: u64,
    mount: u64,
}

impl Identity {
    fn of(stat: &Statx) -> Self {
        Self { device: (stat.stx_dev_major, stat.stx_dev_minor), inode: stat.stx_ino, mount: stat.stx_mnt_id }
    }
}

fn statx(fd: impl AsFd) -> Result<Statx, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    rustix::fs::statx(fd, c"", flags, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)
}

impl Root {
    /// What is at `path`, an absolute one without symbolic links (but for devices, whose links are followed
    /// by each open).
    pub fn new(path: &Path, kind: FileType, spec: &ExportSpec) -> anyhow::Result<Self> {
        let keeps_size = kind == FileType::RegularFile && !spec.may_grow;
        let this = Self {
            path: CString::new(path.as_os_str().as_bytes())?,
            kind,
            must_be_mountpoint: spec.must_be_mountpoint,
            has_devices: spec.has_devices,
            crosses_mounts: spec.crosses_mounts,
            bytes_max: spec.file_bytes_max,
            largest: keeps_size.then(AtomicU64::default),
            seen: Mutex::new(None),
            device: AtomicU64::new(0),
            granted: OnceLock::new(),
            is_confined: AtomicBool::new(false),
        };
        if kind == FileType::Directory {
            match this.enter(&spec.name) {
                Ok(directory) => {
                    let checked = directory.map_or(Ok(()), |at| check_file_system(at).map(drop));
                    checked.map_err(|(_, why)| anyhow::anyhow!(why))?;
                }
                Err(Rejection { text, .. }) => {
                    ensure!(this.must_be_mountpoint, "{text}");
                    tracing::warn!("{text}");
                }
            }
        } else {
            let node = openat2(CWD, &this.path, OFlags::PATH, Mode::empty(), this.resolve())?;
            this.check(&spec.name, &node).map_err(|(_, why)| anyhow::anyhow!(why))?;
        }
        Ok(this)
    }

    /// The path, for an open of what is no directory.
    pub fn path(&self) -> &CString {
        &self.path
    }

    /// What no other server may write to while this one does. `name` is the export's.
    pub fn claim(&self, name: &str) -> anyhow::Result<Claim> {
        Claim::of(name, self.as_path(), self.crosses_mounts, self.must_be_mountpoint)
    }

    /// What openat2(2) is to mind.
    pub fn resolve(&self) -> ResolveFlags {
        match self.kind {
            FileType::Directory => {
                let mounts = if self.crosses_mounts { ResolveFlags::empty() } else { ResolveFlags::NO_XDEV };
                ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | mounts
            }
            // /dev/disk/by-id and the like, which udev keeps up to date.
            FileType::BlockDevice => ResolveFlags::NO_MAGICLINKS,
            _ => ResolveFlags::NO_SYMLINKS,
        }
    }

    /// The files that the sandbox must allow to open: the present target of the path. `name` is the export's.
    ///
    /// Landlock knows files and directories, and not paths. What will be mounted on a directory that is set
    /// to `mountpoint` is not there yet, so that it takes the directory above.
    pub fn grants(&self, name: &str, is_writable: bool) -> anyhow::Result<Vec<Grant>> {
        let mut grants = Vec::new();
        let has_devices = self.has_devices || self.is_device();
        let path = self.as_path().to_owned();
        let grant = |at| Grant::of_export(at, is_writable, has_devices);
        let resolve = if self.is_directory() { ResolveFlags::NO_SYMLINKS } else { self.resolve() };
        match openat2(CWD, &self.path, OFlags::PATH, Mode::empty(), resolve) {
            Ok(at) => {
                if let Ok(stat) = statx(&at) {
                    let _ = self.granted.set(Identity::of(&stat));
                }
                grants.push(grant(at)?);
            }
            Err(_) if self.must_be_mountpoint => {}
            Err(errno) => return Err(errno.into()),
        }
        if let Some(above) = path.parent().filter(|_| self.must_be_mountpoint) {
            let at = openat2(CWD, above, OFlags::PATH, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
            grants.push(grant(at)?);
            tracing::info!(
                "Export {name}: what will be mounted on {} is not known yet, so the sandbox allows all of \
                 {}.",
                path.display(),
                above.display()
            );
        }
        if self.is_device() {
            // A disk is known by the file that it lies in.
            for file in file_identity::backing_files(&path) {
                grants.extend(Grant::to_read(&file).ok());
            }
        }
        Ok(grants)
    }

    /// From now on nothing can be opened but what was granted.
    pub fn confine(&self) {
        self.is_confined.store(!self.must_be_mountpoint, Ordering::Relaxed);
    }

    fn is_confined(&self) -> bool {
        self.is_confined.load(Ordering::Relaxed)
    }

    /// Adds the reason to a rejection if the sandbox does not know the file that is at the path now.
    /// `name` is the export's.
    pub fn explain(&self, name: &str, rejection: Rejection) -> Rejection {
        if !self.is_confined() || rejection.status.errno != libc::EACCES {
            return rejection;
        }
        let mask = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let at = rustix::fs::statx(CWD, &self.path, AtFlags::empty(), mask);
        let now = at.ok().map(|stat| Identity::of(&stat));
        if self.granted.get().is_some_and(|granted| Some(granted) == now.as_ref()) {
            // A file system that is mounted again, and has got the same numbers, is another one to Landlock.
            let text = format!(
                "{} If its permissions allow it, then the file system was mounted anew, and the sandbox of \
                 the server does not know it: the server must be started anew.",
                rejection.text.trim_end()
            );
            return Rejection { text, ..rejection };
        }
        let text = format!(
            "Export {name} is not what it was when the server started (something was mounted, unmounted, \
             replaced or removed), and the sandbox of the server allows nothing else. The server must be \
             started anew; with `mountpoint = true` it would follow what is mounted."
        );
        Rejection { text, ..rejection }
    }

    /// The path.
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(self.path.as_bytes()))
    }

    /// What it was at the start.
    pub fn kind(&self) -> FileType {
        self.kind
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind == FileType::Directory
    }

    /// Its path if it is a directory, whatever is mounted there.
    pub fn lasting_directory(&self) -> Option<&CStr> {
        (self.is_directory() && !self.must_be_mountpoint).then_some(&*self.path)
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.kind == FileType::BlockDevice
    }

    /// How large clients may make a file of it that has just been looked up.
    pub fn size_limit(&self) -> Option<SizeLimit> {
        match &self.largest {
            Some(largest) => Some(SizeLimit { bytes: largest.load(Ordering::Relaxed), errno: libc::ENOSPC }),
            None => self.bytes_max.map(|bytes| SizeLimit { bytes, errno: libc::EFBIG }),
        }
    }

    /// The directory as it is now, of a root that is one. `name` is the export's, for messages.
    pub fn enter(&self, name: &str) -> Result<Option<OwnedFd>, Rejection> {
        if !self.is_directory() {
            return Ok(None);
        }
        let reject = |errno, why: &str| Rejection {
            status: Status::storage(errno),
            text: format!("Export {name} cannot be served now: {why}."),
        };
        let failed = |errno: Errno| match errno {
            Errno::NOENT => reject(libc::ENOENT, "its directory is not there"),
            Errno::NOTDIR | Errno::LOOP => reject(libc::ENOTDIR, "it is no directory any more"),
            errno => reject(errno.raw_os_error(), &errno.to_string()),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let directory = openat2(CWD, &self.path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS);
        let directory = directory.map_err(failed)?;
        let stat = statx(&directory).map_err(failed)?;
        if self.must_be_mountpoint && !stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return Err(reject(
                libc::ENXIO,
                "nothing is mounted on its directory, and it is set to `mountpoint`",
            ));
        }
        self.take_in(name, Identity::of(&stat));
        Ok(Some(directory))
    }

    /// The device that it lies on, or is.
    pub fn device(&self) -> Option<DeviceNumber> {
        let device = self.device.load(Ordering::Relaxed);
        (device != 0).then(|| (libc::major(device), libc::minor(device)))
    }

    fn lies_on(&self, (major, minor): DeviceNumber) {
        self.device.store(libc::makedev(major, minor), Ordering::Relaxed);
    }

    /// Takes in what is at the path.
    fn take_in(&self, name: &str, now: Identity) {
        self.lies_on(now.device);
        let mut seen = lock(&self.seen);
        let before = seen.replace(now);
        if before.is_some_and(|before| before != now) {
            tracing::warn!(
                "Export {name}: {:?} is another {} than before (something was mounted, unmounted or \
                 replaced), and served from now on{}. Files that are open stay what they are.",
                self.path,
                if self.is_directory() { "directory" } else { "device" },
                if self.is_confined() && self.is_directory() && self.granted.get() != Some(&now) {
                    ", unless the sandbox denies it, which knows only what was there at the start: then \
                     start the server anew, or set the export to `mountpoint`"
                } else {
                    ""
                }
            );
        }
    }

    /// Whether a directory with this status is the one that was at the path when it was last entered.
    pub fn has_seen(&self, status: &FileStatus) -> bool {
        let seen = *lock(&self.seen);
        let device = |(major, minor)| libc::makedev(major, minor);
        seen.is_some_and(|seen| {
            (device(seen.device), seen.inode) == (status.device.get(), status.inode.get())
        })
    }

    /// The type of what a lookup has found, and that of its file system, if it may be opened; the errno and
    /// the reason if not. `name` is the export's, for the log.
    pub fn check(
        &self,
        name: &str,
        node: &OwnedFd,
    ) -> Result<(FileType, libc::__fsword_t), (i32, &'static str)> {
        let failed = |errno: Errno| (errno.raw_os_error(), "");
        let stat = statx(node).map_err(failed)?;
        let found = FileType::from_raw_mode(stat.stx_mode.into());
        match found {
            _ if self.is_device() && found != FileType::BlockDevice => {
                return Err((libc::ENXIO, "It was a block device when the server started."));
            }
            FileType::RegularFile => {
                if !self.is_directory() {
                    self.lies_on((stat.stx_dev_major, stat.stx_dev_minor));
                }
            }
            FileType::BlockDevice if self.is_device() => {
                let device = (stat.stx_rdev_major, stat.stx_rdev_minor);
                self.take_in(name, Identity { device, inode: 0, mount: 0 });
            }
            FileType::BlockDevice if self.has_devices => {}
            FileType::BlockDevice if self.is_directory() => {
                return Err((libc::ENODEV, "It is a block device; `devices = true` would serve it."));
            }
            FileType::Directory => return Err((libc::EISDIR, "")),
            FileType::Symlink => return Err((libc::ELOOP, "")),
            _ => return Err((libc::ENODEV, "It is neither a regular file nor a block device.")),
        }
        let file_system = check_file_system(node)?;
        if let Some(largest) = &self.largest {
            largest.fetch_max(stat.stx_size, Ordering::Relaxed);
        }
        Ok((found, file_system))
    }
}

/// The type of the file system that this lies on, if its files are served; the errno and the reason if not.
pub fn check_file_system(fd: impl AsFd) -> Result<libc::__fsword_t, (i32, &'static str)> {
    match rustix::fs::fstatfs(fd) {
        Ok(info) if SERVED.contains(&info.f_type) => Ok(info.f_type),
        Ok(_) => Err((libc::EXDEV, "Its file system is of a type that is not served: see raio_server(8).")),
        Err(errno) => Err((errno.raw_os_error(), "")),
    }
}
