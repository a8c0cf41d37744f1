//! The structures, numbers and version of `include/libraio.h`. `tests/c/layout.c` holds the two together.

use std::ffi::{c_int, c_longlong, c_uint, c_ulong, c_ulonglong, c_void};

use raio_transport::protocol::FileStatus;

use super::state::raio_mr;

pub(super) const ABI_VERSION: c_uint = 4;
pub(super) const IOV_MAX: u64 = 1_024;

pub(super) const CMD_PREAD: c_int = 0;
pub(super) const CMD_PWRITE: c_int = 1;
pub(super) const CMD_PREADV: c_int = 2;
pub(super) const CMD_PWRITEV: c_int = 3;
pub(super) const CMD_FSYNC: c_int = 4;
pub(super) const CMD_DISCARD: c_int = 5;
pub(super) const CMD_WRITE_ZEROES: c_int = 6;
pub(super) const CMD_ALLOCATE: c_int = 7;

pub(super) const IOCB_EVENTFD: c_uint = 1 << 0;
pub(super) const IOCB_DATASYNC: c_uint = 1 << 1;
pub(super) const IOCB_KEEP_SIZE: c_uint = 1 << 2;
pub(super) const IOCB_CRC: c_uint = 1 << 3;
pub(super) const IOCB_TIMEOUT_SHIFT: u32 = 12;
pub(super) const IOCB_TIMEOUT_MAX: c_uint = 0xf_ffff;

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

const _: () = {
    assert!(size_of::<raio_stat>() == 120);
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

/// See libraio.h.
#[unsafe(no_mangle)]
pub extern "C" fn raio_abi_version() -> c_uint {
    ABI_VERSION
}
