//! The names of files that puts have not finished: a put writes its data to such a file, and renames it to
//! where it belongs.
//!
//! Clients do not see them. What a server has left behind that was killed is removed when the directory is
//! listed, or is to be removed.

use crate::path::last_name;

/// What the names begin with.
const PUT_PREFIX: &[u8] = b".raio-put-";
/// What follows: two numbers.
const PUT_DIGITS: usize = 32;

/// Whether a name is of a file that a put has not finished. Clients do not see those.
pub fn is_unfinished_put(name: &[u8]) -> bool {
    name.strip_prefix(PUT_PREFIX)
        .is_some_and(|rest| rest.len() == PUT_DIGITS && rest.iter().all(u8::is_ascii_hexdigit))
}

/// Whether the last name of a path is one of those.
pub fn ends_with_unfinished_put(path: &[u8]) -> bool {
    last_name(path).is_some_and(is_unfinished_put)
}

/// The name of an unfinished file of the server with this number.
pub fn unfinished_put(server: u64, number: u64) -> Vec<u8> {
    [PUT_PREFIX, format!("{server:016x}{number:016x}").as_bytes()].concat()
}

/// Whether a name is of a file that a put of another server than the one with this number has not finished.
pub fn is_of_another_server(name: &[u8], server: u64) -> bool {
    is_unfinished_put(name) && !name[PUT_PREFIX.len()..].starts_with(format!("{server:016x}").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unfinished_files_are_known_by_their_names() {
        let name = unfinished_put(7, 8);
        assert!(is_unfinished_put(&name));
        assert!(!is_of_another_server(&name, 7) && is_of_another_server(&name, 8));
        let path = [b"a/", &name[..], b"//"].concat();
        assert!(ends_with_unfinished_put(&path) && ends_with_unfinished_put(&name));
        for other in [&name[1..], &name[..name.len() - 1], &[&name[..], b"0"].concat(), b".raio-put-", b""] {
            assert!(!is_unfinished_put(other));
        }
        assert!(!ends_with_unfinished_put(&[&name[..], b"/x"].concat()));
    }
}
