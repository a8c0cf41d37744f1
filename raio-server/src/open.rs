//! Opening a file of an export, by blocking system calls: for a thread of the pool.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use raio_transport::Status;
use raio_transport::reactor::OpenHow;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::{Errno, retry_on_intr};

use crate::backend::{Descriptor, FileInfo, stat};
use crate::export::{Export, Refusal, Shown};
use crate::session::{Access, FileKind, OpenFile};

/// How often an open is tried again when the kernel cannot tell whether a rename led it out of the export.
const RETRIES_MAX: u32 = 32;
/// The alignment for O_DIRECT where nobody says what it is: enough for every disk.
const DIRECT_ALIGN_DEFAULT: u32 = 4096;

/// A file to be opened.
#[derive(Clone, Debug)]
pub struct Opening {
    /// In the directory of which export.
    pub export: usize,
    /// Relative to it.
    pub path: CString,
    /// How.
    pub how: OpenHow,
    /// For what.
    pub access: Access,
}

/// A file that has been opened.
#[derive(Debug)]
pub struct Opened {
    /// The file.
    pub file: OpenFile,
    /// Its status.
    pub info: FileInfo,
}

impl Opening {
    /// Opens the file.
    pub fn open(&self, export: &Export) -> Result<Opened, Refusal> {
        let is_direct = self.how.flags & libc::O_DIRECT as u64 != 0;
        let (fd, info) =
            self.openat(export).and_then(|fd| stat(&fd).map(|info| (fd, info))).map_err(|errno| {
                let hint = match errno {
                    Errno::XDEV => " The path leads out of the export.",
                    Errno::INVAL if is_direct => " Its file system may not have O_DIRECT.",
                    Errno::MFILE | Errno::NFILE => {
                        " Raise the server's limit with `ulimit -n` or LimitNOFILE=."
                    }
                    _ => "",
                };
                self.refusal(errno.raw_os_error(), hint)
            })?;
        let mode = info.status.mode.get();
        export.check_type(mode).map_err(|errno| self.refusal(errno, ""))?;
        // It was there so that a FIFO could not hold up the open. On the ring it would make reads fail that have to wait.
        if let Ok(flags) = rustix::fs::fcntl_getfl(&fd) {
            let _ = rustix::fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK);
        }
        let is_device = mode & libc::S_IFMT == libc::S_IFBLK;
        let direct_align = if is_direct {
            let sector = || rustix::fs::ioctl_blksszget(fd.as_fd()).ok().filter(|_| is_device);
            info.direct_align.or_else(sector).unwrap_or(DIRECT_ALIGN_DEFAULT).max(1)
        } else {
            1
        };
        let fd = Descriptor::new(fd, *export.lanes());
        let kind = if is_device { FileKind::Device(fd) } else { FileKind::Regular(fd) };
        Ok(Opened { file: OpenFile::new(kind, self.access, direct_align), info })
    }

    fn openat(&self, export: &Export) -> Result<OwnedFd, Errno> {
        let directory = export.directory().ok_or(Errno::NOTDIR)?;
        let OpenHow { flags, mode, resolve } = self.how;
        let flags = OFlags::from_bits_retain(flags as u32);
        let (mode, resolve) = (Mode::from_bits_retain(mode as u32), ResolveFlags::from_bits_retain(resolve));
        let mut retries = RETRIES_MAX;
        loop {
            match retry_on_intr(|| rustix::fs::openat2(directory, &self.path, flags, mode, resolve)) {
                Err(Errno::AGAIN) if retries > 0 => retries -= 1,
                result => return result,
            }
        }
    }

    fn refusal(&self, errno: i32, hint: &str) -> Refusal {
        let error = std::io::Error::from_raw_os_error(errno);
        let path = Shown(self.path.as_bytes());
        Refusal {
            status: Status::storage(errno),
            text: format!("Cannot open {path} on the server: {error}.{hint}"),
        }
    }
}
