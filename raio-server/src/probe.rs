//! What the server needs of the kernel, tried at the start: what a sandbox or an old kernel does not allow is
//! named then, with the remedy, rather than by each request that fails. io_uring is tried by the reactor,
//! which does without.

use std::io::IoSliceMut;

use anyhow::bail;
use raio_transport::tcp;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::{Errno, ReadWriteFlags};

/// The error names what is missing for the kernel to seal and open the records of TLS. No server that was
/// told to have that done starts without.
pub fn for_kernel_tls() -> anyhow::Result<()> {
    match tcp::no_kernel_tls() {
        None => Ok(()),
        Some(why) => bail!("--ktls: the kernel cannot do that. {why}; or start the server without --ktls."),
    }
}

/// The error names the first thing that is missing for serving files.
pub fn for_files() -> anyhow::Result<()> {
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let missing = |what: &str, why: &str, error: Errno| {
        format!(
            "{what} does not work here ({error}), and {why}. Linux 5.6 or newer has it; in a container or a \
             unit, allow it in \
             the seccomp profile (SystemCallFilter=)."
        )
    };
    if let Err(error) = rustix::fs::openat2(CWD, "/", directory, Mode::empty(), ResolveFlags::NO_MAGICLINKS) {
        bail!(missing("openat2(2)", "with it paths are kept beneath their export", error));
    }
    if let Err(error) = rustix::fs::statx(CWD, "/", AtFlags::empty(), StatxFlags::BASIC_STATS) {
        bail!(missing("statx(2)", "with it clients learn a file's size", error));
    }
    if let Err(error) = rustix::fs::open("/proc/self/fd", directory, Mode::empty()) {
        bail!(
            "/proc/self/fd cannot be used ({error}), and by it files are opened once their type is known. \
             Mount /proc: \
             `mount -t proc proc /proc`, or allow it in the container or unit (ProcSubset=all)."
        );
    }
    // Reads of the page cache go through the ring then, a little slower.
    let zero = rustix::fs::open("/dev/zero", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let mut byte = [0];
    if let Ok(zero) = zero
        && let Err(error @ (Errno::PERM | Errno::NOSYS)) =
            rustix::io::preadv2(zero, &mut [IoSliceMut::new(&mut byte)], 0, ReadWriteFlags::empty())
    {
        tracing::warn!(
            name: "preadv2-missing",
            "preadv2(2) does not work here ({error}), so that reads take longer. Allow it in the seccomp \
             profile."
        );
    }
    Ok(())
}
