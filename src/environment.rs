//! Variables of the environment, as a library may use them.

use std::ffi::OsString;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_program_has_its_variables() {
        assert!(!is_secure());
        assert_eq!(variable("PATH"), std::env::var_os("PATH"));
        assert_eq!(variable("RAIO_THERE_IS_NO_SUCH_VARIABLE"), None);
    }
}
