//! What tells a file from all others, also after a restart of the server and of the machine, and what tells
//! its storage from what was there before a reboot, a remount or another disk. By system calls that may wait:
//! for a thread of the pool, once for each open.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use raio_transport::file_handles::{file_handle, file_system_uuid};
use raio_transport::random;
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags};
use rustix::io::Errno;

use crate::syscalls::UNIQUE_MOUNT;

/// A disk may lie in a file that lies on a disk, and so on: as deep as anybody nests them.
const DEPTH_MAX: u32 = 4;

/// [`raio_transport::protocol::FileStatus::identity`].
pub type FileIdentity = [u8; 16];

/// By what a file is told from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Basis {
    /// The UUID of its file system, and its handle in it.
    Handle = 1,
    /// The numbers of its device and inode, and when it was created.
    Inode = 2,
    /// Identifiers of the disk.
    Disk = 4,
    /// The number of the device, in this boot.
    DeviceNumber = 8,
}

/// What is known of an open file.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// The same for the same file, and different for any other.
    pub identity: FileIdentity,
    /// Changes when what was not yet on the disk is lost: with the boot, the mount, the device.
    pub storage: u64,
    /// What the identity is made of.
    pub basis: Basis,
    /// What it has in common with all files of its mount, if that is enough to know others by their handles.
    pub file_system: Option<FileSystem>,
}

/// What the files of a mounted file system have in common. It does not change while that is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSystem {
    handles: Digest,
    /// [`Facts::storage`].
    pub storage: u64,
}

impl FileSystem {
    /// [`Facts::identity`] of an open file that lies on it. Waits for nothing on file systems that have what
    /// they make handles of in memory.
    pub fn identity(&self, fd: impl AsFd) -> Result<FileIdentity, Errno> {
        let (kind, handle) = file_handle(fd)?;
        Ok(self.handles.of_handle(kind, &handle).identity())
    }
}

/// A hash that stays as it is for ever: FNV-1a of 128 bits. Nothing that a client could choose is hashed but
/// which file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Digest(u128);

impl Digest {
    fn of(what: &str) -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d).and(what.as_bytes())
    }

    /// And these bytes, and how many they are.
    fn and(self, bytes: &[u8]) -> Self {
        let len = (bytes.len() as u64).to_le_bytes();
        let step = |hash: u128, &byte: &u8| {
            (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
        };
        Self(bytes.iter().chain(&len).fold(self.0, step))
    }

    fn number(self, number: u64) -> Self {
        self.and(&number.to_le_bytes())
    }

    fn of_handle(self, kind: i32, handle: &[u8]) -> Self {
        self.number(kind as u64).and(handle)
    }

    /// Not 0, which says that nothing is known.
    fn identity(self) -> FileIdentity {
        self.0.max(1).to_le_bytes()
    }

    fn storage(self) -> u64 {
        (self.0 >> 64) as u64 ^ self.0 as u64
    }
}

/// The id of this boot of the machine; a random one where it is not to be had.
pub fn boot() -> &'static str {
    static BOOT: OnceLock<String> = OnceLock::new();
    BOOT.get_or_init(|| {
        let path = PathBuf::from("/proc/sys/kernel/random/boot_id");
        // A test reboots the machine by another file.
        #[cfg(debug_assertions)]
        let path = std::env::var_os("RAIO_TEST_BOOT_ID").map_or(path, PathBuf::from);
        read(&path).ok().flatten().unwrap_or_else(|| format!("unknown-{:016x}", random::number()))
    })
}

/// The text of a file below /sys or /proc, if there is any.
fn read(path: &Path) -> Result<Option<String>, Errno> {
    let text = if_there(std::fs::read_to_string(path))?.unwrap_or_default();
    let text = text.trim();
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

/// None if something is not to be had here. A shortage is an error: it will be over, and until then a file
/// must not be taken for another one.
fn if_there<T>(result: io::Result<T>) -> Result<Option<T>, Errno> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) => match Errno::from_io_error(&error) {
            Some(errno @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::AGAIN)) => Err(errno),
            _ => Ok(None),
        },
    }
}

/// An identity that no other has.
pub fn random() -> FileIdentity {
    u128::from_le_bytes(random::bytes()).max(1).to_le_bytes()
}

impl Facts {
    /// Of an open file or block device, which may not be open with O_PATH.
    pub fn of(fd: impl AsFd) -> Result<Self, Errno> {
        Self::within(fd, 0)
    }

    fn within(fd: impl AsFd, depth: u32) -> Result<Self, Errno> {
        let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID | UNIQUE_MOUNT;
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = rustix::fs::statx(&fd, c"", flags, mask)?;
        if FileType::from_raw_mode(stat.stx_mode.into()) == FileType::BlockDevice {
            return Self::of_device((stat.stx_rdev_major, stat.stx_rdev_minor), depth);
        }
        let uuid = if_there(file_system_uuid(&fd).map_err(io::Error::from))?;
        let handle = match uuid {
            Some(_) => if_there(file_handle(&fd).map_err(io::Error::from))?,
            None => None,
        };
        let handles = uuid.as_ref().map(|uuid| Digest::of("handle").and(uuid));
        let (basis, identity) = match (handles, handle) {
            (Some(handles), Some((kind, handle))) => (Basis::Handle, handles.of_handle(kind, &handle)),
            _ => (Basis::Inode, by_inode(&stat)),
        };
        let device = (stat.stx_dev_major, stat.stx_dev_minor);
        let uuid = uuid.unwrap_or_default();
        let instance = match superblock(device, &uuid) {
            Some(number) => Digest::of("superblock").number(number),
            // Another mount gets the same id on older kernels, but hardly of a disk that was there all the
            // time.
            None => Digest::of("mount").number(stat.stx_mnt_id),
        };
        let storage = instance.and(boot().as_bytes()).and(device_sequence(device)?.as_bytes()).and(&uuid);
        let storage = storage.storage();
        let handles = handles.filter(|_| basis == Basis::Handle);
        let file_system = handles.map(|handles| FileSystem { handles, storage });
        Ok(Self { identity: identity.identity(), storage, basis, file_system })
    }

    fn of_device(device: (u32, u32), depth: u32) -> Result<Self, Errno> {
        let sequence = device_sequence(device)?;
        let in_this_boot = |what| {
            Digest::of(what)
                .and(boot().as_bytes())
                .number(libc::makedev(device.0, device.1))
                .and(sequence.as_bytes())
        };
        let storage = in_this_boot("device").storage();
        let (basis, identity) = match disk_identifiers(device, depth)? {
            Some(identity) => (Basis::Disk, identity),
            None => (Basis::DeviceNumber, in_this_boot("number")),
        };
        Ok(Self { identity: identity.identity(), storage, basis, file_system: None })
    }
}

fn by_inode(stat: &Statx) -> Digest {
    let has_birth = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
    let birth = if has_birth { (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec) } else { (0, 0) };
    Digest::of("inode")
        .number(libc::makedev(stat.stx_dev_major, stat.stx_dev_minor))
        .number(stat.stx_ino)
        .number(birth.0 as u64)
        .number(birth.1.into())
}

/// A number of a mounted file system that no other has in this boot, not even the same one after it was
/// unmounted; of those that the kernel describes. Unlike the id of a mount it is the same in all mount
/// namespaces: a service manager may start a server in another one each time.
fn superblock((major, minor): (u32, u32), uuid: &[u8]) -> Option<u64> {
    let name = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}"));
    // What is below /sys gets inode numbers that are used once.
    let number = |path: PathBuf| std::fs::metadata(path).ok().map(|metadata| metadata.ino());
    match name {
        Ok(name) => ["ext4", "xfs", "f2fs"]
            .iter()
            .find_map(|kind| number(Path::new("/sys/fs").join(kind).join(name.file_name()?))),
        Err(_) => {
            let mut text: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
            for at in [8, 13, 18, 23] {
                if at < text.len() {
                    text.insert(at, '-');
                }
            }
            number(Path::new("/sys/fs/btrfs").join(text))
        }
    }
}

/// Where the kernel describes a device, and its disk if it is a partition.
fn described((major, minor): (u32, u32)) -> (PathBuf, PathBuf) {
    let device = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let is_partition = device.join("partition").exists();
    let disk = if is_partition { device.join("..") } else { device.clone() };
    (device, disk)
}

/// The number of the whole disk that a device is a partition of.
pub fn disk_of(device: (u32, u32)) -> Option<(u32, u32)> {
    let (path, disk) = described(device);
    if path == disk {
        return None;
    }
    let numbers = read(&disk.join("dev")).ok()??;
    let (major, minor) = numbers.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The files that a disk lies in by which it is known, if it is a loop device.
pub fn backing_files(device: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut at = device.to_owned();
    while let Ok(metadata) = std::fs::metadata(&at)
        && metadata.file_type().is_block_device()
        && files.len() < DEPTH_MAX as usize
    {
        let (_, disk) = described((libc::major(metadata.rdev()), libc::minor(metadata.rdev())));
        let Ok(Some(backing)) = read(&disk.join("loop/backing_file")) else { break };
        at = backing.into();
        files.push(at.clone());
    }
    files
}

/// A number that changes when another disk takes the place of one. Empty if there is no disk.
fn device_sequence(device: (u32, u32)) -> Result<String, Errno> {
    Ok(read(&described(device).1.join("diskseq"))?.unwrap_or_default())
}

/// What the disk, and the partition on it, say of themselves.
fn disk_identifiers(device: (u32, u32), depth: u32) -> Result<Option<Digest>, Errno> {
    const NAMES: [&str; 6] = ["dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial"];
    let (path, disk) = described(device);
    let mut whole = None;
    if let Some(backing) = read(&disk.join("loop/backing_file"))? {
        let nonblock = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = if_there(File::options().read(true).custom_flags(nonblock).open(backing))?;
        if let Some(file) = file.filter(|_| depth < DEPTH_MAX) {
            let Facts { identity, .. } = Facts::within(file, depth + 1)?;
            let offset = read(&disk.join("loop/offset"))?.unwrap_or_default();
            whole = Some(Digest::of("loop").and(&identity).and(offset.as_bytes()));
        }
    } else {
        for name in NAMES {
            if let Some(text) = read(&disk.join(name))? {
                whole = Some(Digest::of(name).and(text.as_bytes()));
                break;
            }
        }
    }
    let Some(whole) = whole.filter(|_| path != disk) else { return Ok(whole) };
    let of_partition = |name| Ok(read(&path.join(name))?.unwrap_or_default());
    Ok(Some(whole.and(of_partition("partition")?.as_bytes()).and(of_partition("start")?.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(path: &Path) -> Facts {
        Facts::of(File::open(path).unwrap()).unwrap()
    }

    #[test]
    fn a_file_keeps_its_identity_whatever_is_done_with_it_and_no_other_has_it() {
        // Not in /tmp, which may be a tmpfs.
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("a"), "one").unwrap();
        let before = facts(&path("a"));
        assert_ne!(before.identity, [0; 16]);
        std::fs::write(path("a"), "another content").unwrap();
        std::fs::rename(path("a"), path("b")).unwrap();
        std::fs::hard_link(path("b"), path("c")).unwrap();
        let after = facts(&path("c"));
        assert_eq!((after.identity, after.storage), (before.identity, before.storage));
        std::fs::remove_file(path("b")).unwrap();
        std::fs::remove_file(path("c")).unwrap();
        // Most likely it gets the inode of the one that has gone.
        for name in ["d", "e", "f"] {
            std::fs::write(path(name), "one").unwrap();
            assert_ne!(facts(&path(name)).identity, before.identity);
            assert_eq!(facts(&path(name)).storage, before.storage);
        }
    }

    #[test]
    fn a_digest_tells_how_its_parts_are_divided_and_stays_what_it_is() {
        let digest = Digest::of("a").and(b"bc").and(b"d").0;
        assert_ne!(digest, Digest::of("a").and(b"b").and(b"cd").0);
        assert_ne!(digest, Digest::of("ab").and(b"c").and(b"d").0);
        // Identities outlive the server's version: this may never change.
        assert_eq!(Digest::of("handle").number(7).identity(), KEPT);
    }

    const KEPT: FileIdentity = [82, 81, 103, 211, 59, 210, 148, 175, 143, 208, 247, 73, 160, 75, 31, 28];

    #[test]
    fn a_shortage_is_told_from_what_is_not_there() {
        let failed = |errno| if_there::<()>(Err(io::Error::from_raw_os_error(errno)));
        for errno in [libc::ENOENT, libc::ENODEV, libc::EACCES, libc::EINVAL] {
            assert_eq!(failed(errno), Ok(None));
        }
        for errno in [libc::EMFILE, libc::ENFILE, libc::ENOMEM] {
            assert_eq!(failed(errno).unwrap_err().raw_os_error(), errno);
        }
    }

    #[test]
    fn random_identities_differ() {
        assert_ne!(random(), random());
    }
}
