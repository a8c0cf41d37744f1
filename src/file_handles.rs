//! What a file system says that tells its files from all others, for as long as it exists: calls that no safe
//! wrapper has. Both may wait for the file system.

use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;
use rustix::ioctl::{Getter, ioctl, opcode};

/// The most that a file system makes a handle of (MAX_HANDLE_SZ).
const HANDLE_BYTES_MAX: usize = 128;
/// The handle is only to be compared, so that file systems that open none by it make one, too (Linux 6.5).
const AT_HANDLE_FID: i32 = 0x200;

/// `struct fsuuid2`.
#[repr(C)]
struct FsUuid {
    len: u8,
    uuid: [u8; 16],
}

/// `struct file_handle`, with room for what follows it.
#[repr(C)]
struct RawHandle {
    bytes: u32,
    kind: i32,
    handle: [u8; HANDLE_BYTES_MAX],
}

/// The UUID of the file system that an open file lies on (FS_IOC_GETFSUUID, Linux 6.9). Fails with ENOTTY if
/// it has none, or the kernel does not tell; with EBADF for a descriptor opened with O_PATH.
pub fn file_system_uuid(fd: impl AsFd) -> Result<Vec<u8>, Errno> {
    type Call = Getter<{ opcode::read::<FsUuid>(0x15, 0) }, FsUuid>;
    // SAFETY: this opcode fills a `struct fsuuid2`, and 17 bytes of it are part of the opcode.
    let FsUuid { len, uuid } = unsafe { ioctl(fd, Call::new()) }?;
    Ok(uuid[..usize::from(len).min(uuid.len())].to_vec())
}

/// The handle of an open file within its file system, whose bytes mean nothing but to be compared, and its
/// kind. No other file has it, not even one that gets the same inode number later.
pub fn file_handle(fd: impl AsFd) -> Result<(i32, Vec<u8>), Errno> {
    let handle = |flags: i32| {
        let mut raw = RawHandle { bytes: HANDLE_BYTES_MAX as u32, kind: 0, handle: [0; HANDLE_BYTES_MAX] };
        let mut mount = 0i32;
        // SAFETY: the path is a string, `raw` has room for as many bytes as it says, and both it and `mount`
        // are written to during the call only.
        let result = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                fd.as_fd().as_raw_fd(),
                c"".as_ptr(),
                &raw mut raw,
                &raw mut mount,
                libc::AT_EMPTY_PATH | flags,
            )
        };
        if result == 0 { Ok(raw) } else { Err(last_errno()) }
    };
    let raw = match handle(AT_HANDLE_FID) {
        // An older kernel.
        Err(Errno::INVAL) => handle(0),
        result => result,
    }?;
    Ok((raw.kind, raw.handle[..(raw.bytes as usize).min(HANDLE_BYTES_MAX)].to_vec()))
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

const _: () = assert!(size_of::<FsUuid>() == 17 && size_of::<RawHandle>() == 8 + HANDLE_BYTES_MAX);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_one_handle_and_its_neighbour_another() {
        let directory = tempfile_directory();
        let open = |name: &str| std::fs::File::create(directory.join(name)).unwrap();
        let (a, b) = (open("a"), open("b"));
        if let Ok(handle) = file_handle(&a) {
            assert_eq!(file_handle(std::fs::File::open(directory.join("a")).unwrap()), Ok(handle.clone()));
            assert_ne!(file_handle(&b), Ok(handle));
        }
        assert_eq!(file_system_uuid(&a), file_system_uuid(&b));
        std::fs::remove_dir_all(directory).unwrap();
    }

    fn tempfile_directory() -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("raio-file-handles-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }
}
