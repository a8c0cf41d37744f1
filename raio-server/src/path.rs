//! Paths, as the bytes that they are.

/// The last component of a path, without the slashes that may follow.
pub fn last_name(path: &[u8]) -> Option<&[u8]> {
    path.rsplit(|&byte| byte == b'/').find(|name| !name.is_empty())
}

/// The directory of a path, and what is to be found there. A path that ends with `.` or `..` names nothing
/// that could be created, and stays as it is.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let end = path.iter().rposition(|&byte| byte != b'/').map_or(0, |at| at + 1);
    let start = path[..end].iter().rposition(|&byte| byte == b'/').map_or(0, |at| at + 1);
    match &path[start..end] {
        b"" | b"." | b".." => (b".", path),
        _ if start == 0 => (b".", path),
        _ => path.split_at(start),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_split_before_its_last_name() {
        for (path, parent, name) in [
            ("a", ".", "a"),
            ("a/", ".", "a/"),
            ("a/b", "a/", "b"),
            ("a//b//", "a//", "b//"),
            ("../a", "../", "a"),
            (".", ".", "."),
            ("a/..", ".", "a/.."),
            ("a/./", ".", "a/./"),
        ] {
            let expected = (parent.as_bytes(), name.as_bytes());
            assert_eq!(split(path.as_bytes()), expected, "{path}");
        }
    }
}
