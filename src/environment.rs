//! What a process gets from the one that has started it: variables, as a library may use them, and
//! descriptors.

use std::ffi::OsString;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// The value of a variable, unless it is empty. As secure_getenv(3): there is none in a program that runs
/// with rights that its user does not have, such as a set-user-ID program.
pub fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty() && !is_secure())
}

/// Whether the kernel says that this program has rights that its user does not have.
fn is_secure() -> bool {
    // SAFETY: it reads what the kernel has told the process at its start.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

/// A copy of a descriptor that this process had when it began, such as a socket that a service manager
/// passes. The original stays open.
pub fn passed_descriptor(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: it takes no memory, and changes nothing about the descriptor that it copies, if there is one.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn an_ordinary_program_has_its_variables() {
        assert!(!is_secure());
        assert_eq!(variable("PATH"), std::env::var_os("PATH"));
        assert_eq!(variable("RAIO_THERE_IS_NO_SUCH_VARIABLE"), None);
    }

    #[test]
    fn a_descriptor_is_copied_and_one_that_is_not_there_is_an_error() {
        let copy = passed_descriptor(2).expect("standard error is there");
        assert!(copy.as_raw_fd() > 2);
        assert_eq!(passed_descriptor(i32::MAX).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}
