//! Patterns of names, as a shell has them.

use std::ffi::OsStr;
use std::path::Path;

use globset::{GlobBuilder, GlobMatcher};

/// A pattern. `*` and `?` match no slash, `**` does; names may have any bytes.
#[derive(Clone, Debug)]
pub struct Pattern {
    matcher: GlobMatcher,
    /// It has a slash, so it is about paths.
    has_slash: bool,
}

impl Pattern {
    /// The pattern that a text stands for. One that begins with a slash is about paths; the slash is the
    /// directory that everything is beneath.
    pub fn parse(text: &str) -> Result<Self, String> {
        let has_slash = text.contains('/');
        let glob = GlobBuilder::new(text.trim_start_matches('/'))
            .literal_separator(true)
            .backslash_escape(true)
            .build()
            .map_err(|error| format!("{text:?} is no pattern: {}.", error.kind()))?;
        Ok(Self { matcher: glob.compile_matcher(), has_slash })
    }

    /// Whether a name matches.
    pub fn matches_name(&self, name: &OsStr) -> bool {
        self.matcher.is_match(Path::new(name))
    }

    /// Whether a path beneath a directory matches: as a whole if the pattern has a slash, else by its name.
    pub fn matches(&self, path: &Path) -> bool {
        match (self.has_slash, path.file_name()) {
            (false, Some(name)) => self.matches_name(name),
            _ => self.matcher.is_match(path),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn a_pattern_without_a_slash_is_about_names_and_one_with_a_slash_about_paths() {
        let matches = |pattern: &str, path: &str| Pattern::parse(pattern).unwrap().matches(Path::new(path));
        assert!(matches("*.o", "a.o") && matches("*.o", "d/e/a.o") && !matches("*.o", "a.c"));
        assert!(matches("/build", "build") && !matches("/build", "d/build"));
        assert!(matches("d/*", "d/a") && !matches("d/*", "d/e/a") && matches("d/**", "d/e/a"));
        assert!(matches("[ab]?", "a1") && !matches("[ab]?", "c1"));
        assert!(Pattern::parse("[").is_err());
    }

    #[test]
    fn names_may_have_any_bytes() {
        let name = OsStr::from_bytes(b"\xff\n.o");
        assert!(Pattern::parse("*.o").unwrap().matches_name(name));
        assert!(Pattern::parse("??.o").unwrap().matches_name(name));
    }
}
