//! The structures, numbers and version of `include/libraio.h`. `tests/c/layout.c` holds the two together.

use std::ffi::{c_char, c_int, c_longlong, c_uint, c_ulong, c_ulonglong, c_void};
use std::os::unix::ffi::OsStrExt;

use raio_transport::protocol::{FileStatus, FileSystemStatus};

use super::errors::invalid;
use super::state::raio_mr;
use crate::error::Error;
use crate::names::DirEntry;
use crate::operation::{Checksum, ChecksumAlgorithm, Lock};

pub(super) const ABI_VERSION: c_uint = 6;
pub(super) const IOV_MAX: u64 = 1_024;

pub(super) const CMD_PREAD: c_int = 0;
pub(super) const CMD_PWRITE: c_int = 1;
pub(super) const CMD_PREADV: c_int = 2;
pub(super) const CMD_PWRITEV: c_int = 3;
pub(super) const CMD_FSYNC: c_int = 4;
pub(super) const CMD_DISCARD: c_int = 5;
pub(super) const CMD_WRITE_ZEROES: c_int = 6;
pub(super) const CMD_ALLOCATE: c_int = 7;
pub(super) const CMD_OPEN: c_int = 8;
pub(super) const CMD_CLOSE: c_int = 9;
pub(super) const CMD_STAT_FD: c_int = 10;
pub(super) const CMD_FTRUNCATE: c_int = 11;
pub(super) const CMD_STAT_PATH: c_int = 12;
pub(super) const CMD_GET: c_int = 13;
pub(super) const CMD_PUT: c_int = 14;
pub(super) const CMD_MKDIR: c_int = 15;
pub(super) const CMD_RMDIR: c_int = 16;
pub(super) const CMD_UNLINK: c_int = 17;
pub(super) const CMD_RENAME: c_int = 18;
pub(super) const CMD_LINK: c_int = 19;
pub(super) const CMD_SYMLINK: c_int = 20;
pub(super) const CMD_READLINK: c_int = 21;
pub(super) const CMD_SET_ATTRIBUTES: c_int = 22;
pub(super) const CMD_STATFS: c_int = 23;
pub(super) const CMD_GETXATTR: c_int = 24;
pub(super) const CMD_SETXATTR: c_int = 25;
pub(super) const CMD_LISTXATTR: c_int = 26;
pub(super) const CMD_REMOVEXATTR: c_int = 27;
pub(super) const CMD_OPENDIR: c_int = 28;
pub(super) const CMD_READDIR: c_int = 29;
pub(super) const CMD_COPY_FILE_RANGE: c_int = 30;
pub(super) const CMD_CHECKSUM: c_int = 31;
pub(super) const CMD_FLOCK: c_int = 32;

pub(super) const CHECKSUM_CRC32C: c_uint = 1;
pub(super) const CHECKSUM_BLAKE3: c_uint = 2;

pub(super) const PATH_NOFOLLOW: c_uint = 1 << 0;
pub(super) const PATH_EXCL: c_uint = 1 << 1;
pub(super) const PATH_FSYNC: c_uint = 1 << 2;
pub(super) const PATH_MTIME: c_uint = 1 << 3;
pub(super) const PATH_MODE: c_uint = 1 << 4;
pub(super) const PATH_SIZE: c_uint = 1 << 5;

pub(super) const IOCB_EVENTFD: c_uint = 1 << 0;
pub(super) const IOCB_DATASYNC: c_uint = 1 << 1;
pub(super) const IOCB_KEEP_SIZE: c_uint = 1 << 2;
pub(super) const IOCB_CRC: c_uint = 1 << 3;
pub(super) const IOCB_TIMEOUT_SHIFT: u32 = 12;
pub(super) const IOCB_TIMEOUT_MAX: c_uint = 0xf_ffff;
/// The bits of the timeout.
pub(super) const IOCB_TIMEOUT: c_uint = IOCB_TIMEOUT_MAX << IOCB_TIMEOUT_SHIFT;

pub(super) const RES2_RETRYABLE: c_ulong = 0x100;
pub(super) const RES2_UNKNOWN: c_ulong = 0x200;
pub(super) const RES2_LOST: c_ulong = 0x400;

pub(super) const OPT_CRC: c_uint = 1 << 0;
pub(super) const OPT_NO_SPIN: c_uint = 1 << 1;
pub(super) const OPT_REDO: c_uint = 1 << 2;
pub(super) const OPT_NO_RECONNECT: c_uint = 1 << 3;
pub(super) const OPT_NO_CRC: c_uint = 1 << 4;
pub(super) const OPT_NO_KEYS: c_uint = 1 << 5;
pub(super) const OPT_FD_ALWAYS: c_uint = 1 << 6;

/// `struct raio_iocb_common`
#[repr(C)]
pub struct raio_iocb_common {
    pub(super) buf: *mut c_void,
    pub(super) nbytes: c_ulonglong,
    pub(super) offset: i64,
    pub(super) mr: *mut raio_mr,
    pub(super) flags: c_uint,
    pub(super) resfd: c_uint,
}

/// `struct raio_iocb`
#[repr(C)]
pub struct raio_iocb {
    pub(super) data: *mut c_void,
    pub(super) key: c_uint,
    pub(super) raio_fildes: c_int,
    pub(super) raio_lio_opcode: c_int,
    /// `pad` without [`IOCB_CRC`].
    pub(super) crc: c_uint,
    pub(super) c: raio_iocb_common,
}

/// `struct raio_event`
#[repr(C)]
pub struct raio_event {
    pub(super) data: *mut c_void,
    pub(super) obj: *mut raio_iocb,
    pub(super) handle: c_ulonglong,
    pub(super) res: c_ulong,
    pub(super) res2: c_ulong,
}

/// `struct raio_options`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct raio_options {
    pub(super) size: c_uint,
    pub(super) flags: c_uint,
    pub(super) queue_depth: c_uint,
    pub(super) connect_timeout_ms: c_uint,
    pub(super) request_timeout_ms: c_uint,
    pub(super) spin_us: c_uint,
    pub(super) reconnect_ms: c_uint,
    pub(super) call_timeout_ms: c_uint,
    pub(super) reserved: [c_uint; 8],
}

/// `struct raio_stats`
#[repr(C)]
pub struct raio_stats {
    pub(super) size: c_ulonglong,
    pub(super) submitted: c_ulonglong,
    pub(super) completed: c_ulonglong,
    pub(super) failed: c_ulonglong,
    pub(super) bytes_read: c_ulonglong,
    pub(super) bytes_written: c_ulonglong,
    pub(super) bounced_bytes: c_ulonglong,
    pub(super) sends: c_ulonglong,
    pub(super) receives: c_ulonglong,
    pub(super) sleeps: c_ulonglong,
    pub(super) reconnects: c_ulonglong,
    pub(super) in_flight: c_ulonglong,
    pub(super) queue_depth: c_ulonglong,
    pub(super) io_bytes_max: c_ulonglong,
    pub(super) resent: c_ulonglong,
    pub(super) unknown: c_ulonglong,
    pub(super) lost: c_ulonglong,
    pub(super) checksum_errors: c_ulonglong,
    pub(super) crc: c_ulonglong,
}

/// `struct raio_stat`
#[repr(C)]
pub struct raio_stat {
    pub(super) size: c_ulonglong,
    pub(super) file_bytes: c_ulonglong,
    pub(super) blocks: c_ulonglong,
    pub(super) inode: c_ulonglong,
    pub(super) device: c_ulonglong,
    pub(super) rdevice: c_ulonglong,
    pub(super) accessed_ns: c_longlong,
    pub(super) modified_ns: c_longlong,
    pub(super) changed_ns: c_longlong,
    pub(super) mode: c_uint,
    pub(super) links: c_uint,
    pub(super) uid: c_uint,
    pub(super) gid: c_uint,
    pub(super) block_bytes: c_uint,
    pub(super) direct_align: c_uint,
    pub(super) identity: [u8; 16],
    pub(super) verifier: c_ulonglong,
}

/// `struct raio_path_args`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct raio_path_args {
    pub(super) path: *const c_char,
    pub(super) other: *const c_char,
    pub(super) buf: *mut c_void,
    pub(super) nbytes: c_ulonglong,
    pub(super) stat: *mut raio_stat,
    pub(super) stat_size: c_ulonglong,
    pub(super) modified_ns: c_longlong,
    pub(super) flags: c_uint,
    pub(super) mode: c_uint,
    pub(super) reserved: [c_ulonglong; 2],
}

/// `struct raio_copy_args`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct raio_copy_args {
    pub(super) fd: c_int,
    pub(super) reserved_0: c_uint,
    pub(super) offset: i64,
    pub(super) reserved: [c_ulonglong; 2],
}

/// `struct raio_checksum`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct raio_checksum {
    pub(super) type_: c_uint,
    pub(super) crc32c: c_uint,
    pub(super) blake3: [u8; 32],
}

impl raio_checksum {
    /// Which is asked for.
    pub(super) fn algorithm(self) -> Result<ChecksumAlgorithm, Error> {
        match self.type_ {
            CHECKSUM_CRC32C => Ok(ChecksumAlgorithm::Crc32c),
            CHECKSUM_BLAKE3 => Ok(ChecksumAlgorithm::Blake3),
            other => Err(invalid(format!(
                "There is no checksum of type {other}. Use RAIO_CHECKSUM_CRC32C or RAIO_CHECKSUM_BLAKE3."
            ))),
        }
    }

    /// The same, with what it is.
    pub(super) fn with(self, checksum: Checksum) -> Self {
        match checksum {
            Checksum::Crc32c(crc32c) => Self { crc32c, ..self },
            Checksum::Blake3(blake3) => Self { blake3, ..self },
        }
    }
}

/// What the operation of flock(2) asks for. It never waits, with LOCK_NB or without.
pub(super) fn lock_of(operation: c_int) -> Result<Lock, Error> {
    match operation & !libc::LOCK_NB {
        libc::LOCK_SH => Ok(Lock::Shared),
        libc::LOCK_EX => Ok(Lock::Exclusive),
        libc::LOCK_UN => Ok(Lock::Unlock),
        _ => Err(invalid("There is no such lock. Pass LOCK_SH, LOCK_EX or LOCK_UN.")),
    }
}

/// `struct raio_statfs`
#[repr(C)]
pub struct raio_statfs {
    pub(super) size: c_ulonglong,
    pub(super) block_bytes: c_ulonglong,
    pub(super) blocks: c_ulonglong,
    pub(super) blocks_free: c_ulonglong,
    pub(super) blocks_available: c_ulonglong,
    pub(super) files: c_ulonglong,
    pub(super) files_free: c_ulonglong,
    pub(super) name_bytes_max: c_ulonglong,
}

/// `struct raio_extent`
#[repr(C)]
pub struct raio_extent {
    pub(super) offset: c_ulonglong,
    pub(super) length: c_ulonglong,
}

/// `struct raio_dirent`
#[repr(C)]
pub struct raio_dirent {
    pub(super) size: c_ulonglong,
    pub(super) file_bytes: c_ulonglong,
    pub(super) modified_ns: c_longlong,
    pub(super) inode: c_ulonglong,
    pub(super) mode: c_uint,
    pub(super) has_status: c_uint,
    pub(super) name: [u8; 256],
}

const _: () = {
    assert!(size_of::<raio_stat>() == 120 && size_of::<raio_path_args>() == 80);
    assert!(size_of::<raio_statfs>() == 64 && size_of::<raio_dirent>() == 296);
    assert!(size_of::<raio_copy_args>() == 32 && size_of::<raio_checksum>() == 40);
    assert!(size_of::<raio_iocb>() == 64 && std::mem::offset_of!(raio_iocb, c) == 24);
    assert!(
        size_of::<raio_event>() == 40 && size_of::<raio_options>() == 64 && size_of::<raio_stats>() == 152
    );
};

impl From<&FileStatus> for raio_stat {
    fn from(status: &FileStatus) -> Self {
        Self {
            size: size_of::<Self>() as c_ulonglong,
            file_bytes: status.size.get(),
            blocks: status.blocks.get(),
            inode: status.inode.get(),
            device: status.device.get(),
            rdevice: status.rdevice.get(),
            accessed_ns: status.accessed_ns.get(),
            modified_ns: status.modified_ns.get(),
            changed_ns: status.changed_ns.get(),
            mode: status.mode.get(),
            links: status.links.get(),
            uid: status.uid.get(),
            gid: status.gid.get(),
            block_bytes: status.block_bytes.get(),
            direct_align: status.direct_align.get(),
            identity: status.identity,
            verifier: status.verifier.get(),
        }
    }
}

impl From<&FileSystemStatus> for raio_statfs {
    fn from(status: &FileSystemStatus) -> Self {
        Self {
            size: size_of::<Self>() as c_ulonglong,
            block_bytes: status.block_bytes.get(),
            blocks: status.blocks.get(),
            blocks_free: status.blocks_free.get(),
            blocks_available: status.blocks_available.get(),
            files: status.files.get(),
            files_free: status.files_free.get(),
            name_bytes_max: status.name_bytes_max.get(),
        }
    }
}

impl From<&DirEntry> for raio_dirent {
    fn from(entry: &DirEntry) -> Self {
        let mut name = [0; 256];
        // A name has at most 255 bytes.
        let bytes = entry.name.as_bytes();
        name[..bytes.len()].copy_from_slice(bytes);
        Self {
            size: size_of::<Self>() as c_ulonglong,
            file_bytes: entry.size,
            modified_ns: entry.modified_ns,
            inode: entry.inode,
            mode: entry.mode,
            has_status: entry.has_status.into(),
            name,
        }
    }
}

/// A struct of the header that begins with how many of its bytes were filled in.
///
/// # Safety
/// Its first field is that number, with 64 bits, and all its bytes are initialized.
pub(super) unsafe trait Sized64: Sized {}

// SAFETY: as the header has them; none has padding.
unsafe impl Sized64 for raio_stat {}
// SAFETY: as above.
unsafe impl Sized64 for raio_statfs {}
// SAFETY: as above.
unsafe impl Sized64 for raio_dirent {}

/// Whether the caller's struct has room for more than its first field.
pub(super) fn check_sized<T: Sized64>(to: *mut T, size: usize) -> Result<(), Error> {
    if to.is_null() || size <= size_of::<u64>() {
        return Err(invalid("The struct to be filled in is NULL or too small. Pass one, and its sizeof."));
    }
    Ok(())
}

/// Fills in a struct of the caller's, as many bytes as it has.
///
/// # Safety
/// [`check_sized`] has passed, and `to` has room for `size` bytes.
pub(super) unsafe fn fill_in<T: Sized64>(mut from: T, to: *mut T, size: usize) {
    let size = size.min(size_of::<T>());
    // SAFETY: the first field is the size, `size` bytes are within `from`, and the caller vouches for `to`.
    unsafe {
        (&raw mut from).cast::<u64>().write(size as u64);
        std::ptr::copy_nonoverlapping((&raw const from).cast::<u8>(), to.cast::<u8>(), size);
    }
}

/// See libraio.h.
#[unsafe(no_mangle)]
pub extern "C" fn raio_abi_version() -> c_uint {
    ABI_VERSION
}
