//! A part of an export that a client may use: a directory, and everything beneath it.
//!
//! Here paths are compared as they are written: that decides which subtree a path is in, if in any. Where the
//! path leads is for the kernel to say: [`crate::open`] opens the directory beneath the export, and resolves
//! the rest of the path beneath the directory.

use serde::Deserialize;

/// How a client may use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub enum Access {
    #[serde(rename = "ro")]
    ReadOnly,
    #[serde(rename = "rw")]
    ReadWrite,
}

/// To whom the files belong that a client creates. None: to the server's user, and group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub uid: Option<u32>,
    /// The group.
    pub gid: Option<u32>,
}

/// See the module documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subtree {
    /// Names with `/` between them; empty for the whole export.
    directory: String,
    access: Access,
    owner: Owner,
    /// How many bytes its files may have together when the client makes one longer.
    bytes_max: Option<u64>,
}

impl Subtree {
    /// All of an export.
    pub const fn whole(access: Access, owner: Owner) -> Self {
        Self { directory: String::new(), access, owner, bytes_max: None }
    }

    /// The same, with a limit on the bytes of all its files together.
    pub fn with_bytes_max(self, bytes_max: Option<u64>) -> Self {
        Self { bytes_max, ..self }
    }

    /// How many bytes its files may have together. None: as many as there is room for.
    pub fn bytes_max(&self) -> Option<u64> {
        self.bytes_max
    }

    /// A directory of it. The error is a clause.
    pub fn beneath(directory: &str, access: Access, owner: Owner) -> Result<Self, String> {
        let is_name = |name: &str| !matches!(name, "" | "." | "..") && !name.contains('\0');
        if !directory.split('/').all(is_name) {
            return Err(format!(
                "{directory:?} is no directory of an export: write names with `/` between them, such as \
                 \"db1/files\", or leave `path` out for all of the export"
            ));
        }
        Ok(Self { directory: directory.to_owned(), access, owner, bytes_max: None })
    }

    /// The directory, relative to the export; None if it is the whole export.
    pub fn directory(&self) -> Option<&str> {
        (!self.directory.is_empty()).then_some(&self.directory)
    }

    /// Whether the client may write there.
    pub fn is_writable(&self) -> bool {
        self.access == Access::ReadWrite
    }

    /// To whom the files belong that the client creates there.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// Whether it allows all that another one does.
    pub fn covers(&self, other: &Self) -> bool {
        let rest = other.directory.strip_prefix(&self.directory);
        let has =
            rest.is_some_and(|rest| self.directory.is_empty() || rest.is_empty() || rest.starts_with('/'));
        has && self.access >= other.access
    }

    /// Which of these subtrees a path is to be opened in, and where in the path its rest begins. Of those
    /// that allow what is asked it is the one highest up, so that several allow whatever one of them does;
    /// of equals the first. If none allows to write it is one for reading. None: the path is in no subtree.
    pub fn find<'a>(all: &'a [Self], path: &[u8], writes: bool) -> Option<(&'a Self, usize)> {
        let holding = all.iter().filter_map(|subtree| Some((subtree, subtree.rest_of(path)?)));
        holding.min_by_key(|(subtree, _)| (writes && !subtree.is_writable(), subtree.directory.len()))
    }

    /// Where the rest of a path begins that is beneath the directory, as it is written.
    fn rest_of(&self, path: &[u8]) -> Option<usize> {
        let mut at = 0;
        for name in self.directory.split('/').filter(|name| !name.is_empty()) {
            loop {
                let rest = path.get(at..).filter(|rest| !rest.is_empty())?;
                let end = rest.iter().position(|&byte| byte == b'/').unwrap_or(rest.len());
                at = (at + end + 1).min(path.len());
                match &rest[..end] {
                    b"" | b"." => {}
                    component if component == name.as_bytes() => break,
                    _ => return None,
                }
            }
        }
        // What is left must not begin with a slash.
        Some(at + path[at..].iter().take_while(|&&byte| byte == b'/').count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subtree(directory: &str, access: Access) -> Subtree {
        match directory {
            "" => Subtree::whole(access, Owner::default()),
            directory => Subtree::beneath(directory, access, Owner::default()).unwrap(),
        }
    }

    #[test]
    fn a_path_is_beneath_a_directory_as_it_is_written() {
        let subtree = subtree("db1/files", Access::ReadOnly);
        let rest = |path: &'static str| subtree.rest_of(path.as_bytes()).map(|at| &path[at..]);
        for (path, expected) in [
            ("db1/files/x", Some("x")),
            ("db1/files", Some("")),
            ("db1/files/", Some("")),
            ("db1//.///files///x//y", Some("x//y")),
            ("./db1/files/../files/x", Some("../files/x")),
            ("db1/files/../../x", Some("../../x")),
            ("", None),
            (".", None),
            ("db1", None),
            ("db1/", None),
            ("db1/files2/x", None),
            ("db1/file/x", None),
            ("db1/../db1/files/x", None),
            ("../db1/files/x", None),
            ("other/db1/files/x", None),
        ] {
            assert_eq!(rest(path), expected, "{path:?}");
        }
    }

    #[test]
    fn several_subtrees_allow_what_any_of_them_does() {
        let (ro, rw) = (Access::ReadOnly, Access::ReadWrite);
        let all = [subtree("a/b", rw), subtree("a", ro), subtree("c", rw), subtree("c", rw)];
        let find = |path: &str, writes| {
            let (found, rest) = Subtree::find(&all, path.as_bytes(), writes)?;
            let at = all.iter().position(|subtree| std::ptr::eq(subtree, found)).unwrap();
            Some((at, path[rest..].to_owned()))
        };
        for (path, writes, expected) in [
            ("a/b/x", false, Some((1, "b/x"))),
            ("a/b/x", true, Some((0, "x"))),
            ("a/x", true, Some((1, "x"))),
            ("c/x", true, Some((2, "x"))),
            ("d/x", false, None),
        ] {
            let expected = expected.map(|(at, rest): (usize, &str)| (at, rest.to_owned()));
            assert_eq!(find(path, writes), expected, "{path} {writes}");
        }
        assert_eq!(Subtree::find(&[subtree("", ro)], b"x", true).map(|(_, rest)| rest), Some(0));
    }

    #[test]
    fn a_subtree_covers_what_is_beneath_it_for_no_more_than_it_allows() {
        let (ro, rw) = (Access::ReadOnly, Access::ReadWrite);
        for (one, other, covers) in [
            (("", rw), ("a", rw), true),
            (("a", rw), ("", ro), false),
            (("a", rw), ("a", ro), true),
            (("a", ro), ("a", rw), false),
            (("a", ro), ("a/b", ro), true),
            (("a/b", ro), ("a", ro), false),
            (("a", ro), ("ab", ro), false),
        ] {
            let [first, second] = [one, other].map(|(directory, access)| subtree(directory, access));
            assert_eq!(first.covers(&second), covers, "{one:?} {other:?}");
        }
    }

    #[test]
    fn a_directory_is_written_as_names() {
        for wrong in ["", "/", "/a", "a/", "a//b", ".", "a/..", "../a", "a\0b"] {
            let error = Subtree::beneath(wrong, Access::ReadOnly, Owner::default()).unwrap_err();
            assert!(error.contains("db1/files"), "{wrong:?}: {error}");
        }
    }
}
