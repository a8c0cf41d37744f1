//! Names: each public type of a library has one of its own, and names that were given up do not come back.

use std::collections::BTreeMap;
use std::fs;

use anyhow::Context;

use crate::Finding;
use crate::layers::Crate;
use crate::modules::{Modules, module_of};

/// `OLD NEW...` in each line: a word that is not used any more, and what the field says. Lines that begin
/// with `#` are comments.
const OLD_NAMES: &str = "tests/lint/old-names";

/// Appends the public types of a crate that have the same name.
pub fn check_public_types(krate: &Crate, modules: &Modules, findings: &mut Vec<Finding>) {
    let mut places = BTreeMap::<&str, Vec<String>>::new();
    for (path, module) in modules {
        for (name, line) in &module.types {
            let is_reexported = modules.values().filter(|other| other.is_public).any(|other| {
                other.reexports.iter().any(|(exported, target, is_public)| {
                    *is_public
                        && (module_of(modules, target) == path
                            && (target.last() == Some(name) || exported == "*"))
                })
            });
            if module.is_public || is_reexported {
                let place = format!("{}:{line}", module.file.display());
                places.entry(name).or_default().push(place);
            }
        }
    }
    for (name, places) in places.into_iter().filter(|(_, places)| places.len() > 1) {
        let text =
            format!("{} has several public types `{name}`: also {}", krate.name, places[1..].join(", "));
        findings.push(Finding { place: places[0].clone(), text });
    }
}

/// Appends where a tracked file has a name that was given up.
pub fn check_old_names(findings: &mut Vec<Finding>) -> anyhow::Result<()> {
    let list = fs::read_to_string(OLD_NAMES).with_context(|| format!("Cannot read {OLD_NAMES}"))?;
    let names: Vec<_> = list
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| line.split_once('\t').unwrap_or((line, "")))
        .collect();
    for file in crate::tracked(&[".rs", ".md", ".h", ".c", ".1", ".3", ".8", "README"])? {
        if file.ends_with("CHANGELOG.md") || file.starts_with("tests/lint") {
            continue;
        }
        let text = fs::read_to_string(&file).with_context(|| format!("Cannot read {}", file.display()))?;
        for (at, line) in text.lines().enumerate() {
            for (old, new) in names.iter().filter(|(old, _)| has_word(line, old)) {
                findings.push(Finding::new(&file, at + 1, format!("\"{old}\": say {new}")));
            }
        }
    }
    Ok(())
}

/// Whether `line` has `word` with neither a letter, a digit nor an underscore at its ends.
fn has_word(line: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(is_part) && !line[at + word.len()..].starts_with(is_part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_found_as_a_whole() {
        assert!(has_word("the pace, it was", "pace"));
        assert!(has_word("self.pace()", "pace"));
        assert!(!has_word("a space", "pace"));
        assert!(!has_word("is_pace", "pace"));
    }
}
