//! The flags of open(2) as the protocol has them.

use raio_transport::protocol;

use crate::error::Error;

/// Translates the flags of open(2).
pub(crate) fn open_flags(flags: i32) -> Result<u32, Error> {
    // libc's O_LARGEFILE is 0 where file offsets have 64 bits anyway, but the kernel's value is what a
    // program may pass.
    const LARGEFILE: i32 = 0o100_000;
    let mut wire = match flags & libc::O_ACCMODE {
        libc::O_RDONLY => protocol::OPEN_READ,
        libc::O_WRONLY => protocol::OPEN_WRITE,
        libc::O_RDWR => protocol::OPEN_READ | protocol::OPEN_WRITE,
        _ => {
            return Err(Error::call(
                libc::EINVAL,
                "The access mode is invalid. Use O_RDONLY, O_WRONLY or O_RDWR.",
            ));
        }
    };
    let mut left = flags
        & !(libc::O_ACCMODE
            | libc::O_CLOEXEC
            | libc::O_LARGEFILE
            | LARGEFILE
            | libc::O_NOCTTY
            | libc::O_NONBLOCK);
    for (flag, bit) in [
        (libc::O_CREAT, protocol::OPEN_CREATE),
        (libc::O_EXCL, protocol::OPEN_EXCLUSIVE),
        (libc::O_TRUNC, protocol::OPEN_TRUNCATE),
        (libc::O_DIRECT, protocol::OPEN_DIRECT),
        // O_SYNC has the bit of O_DSYNC in it, so it comes first.
        (libc::O_SYNC, protocol::OPEN_SYNC),
        (libc::O_DSYNC, protocol::OPEN_DSYNC),
        (libc::O_NOFOLLOW, protocol::OPEN_NOFOLLOW),
    ] {
        if left & flag == flag {
            wire |= bit;
            left &= !flag;
        }
    }
    if left & libc::O_APPEND != 0 {
        return Err(Error::call(
            libc::EINVAL,
            "O_APPEND is not supported, because each write names its offset. Leave it out; raio_fstat() \
             returns the file's size.",
        ));
    }
    if left != 0 {
        return Err(Error::call(
            libc::EINVAL,
            format!("Flags {left:#o} of open(2) are not supported for remote files. Leave them out."),
        ));
    }
    Ok(wire)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_translated_or_rejected() {
        for (flags, wire) in [
            (libc::O_RDONLY, protocol::OPEN_READ),
            (libc::O_WRONLY | libc::O_CLOEXEC | 0o100_000, protocol::OPEN_WRITE),
            (libc::O_RDWR | libc::O_SYNC, protocol::OPEN_READ | protocol::OPEN_WRITE | protocol::OPEN_SYNC),
            (libc::O_RDONLY | libc::O_DSYNC, protocol::OPEN_READ | protocol::OPEN_DSYNC),
            (libc::O_RDONLY | libc::O_DIRECT | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY, 0x121),
        ] {
            assert_eq!(open_flags(flags), Ok(wire), "{flags:#o}");
        }
        for flags in [
            libc::O_APPEND,
            libc::O_DIRECTORY,
            libc::O_PATH,
            libc::O_TMPFILE,
            libc::O_ASYNC,
            libc::O_NOATIME,
            libc::O_ACCMODE,
            1 << 30,
            -1,
        ] {
            assert_eq!(open_flags(flags).unwrap_err().errno(), libc::EINVAL, "{flags:#o}");
        }
    }
}
