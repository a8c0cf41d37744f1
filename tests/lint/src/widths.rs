//! No line is wider than rustfmt's `max_width`: rustfmt leaves comments, strings and documents as they are.

use std::fs;

use anyhow::Context;

use crate::Finding;

/// Appends lines that are too wide. In documents, tables, code and lines without a space to break at may be.
pub fn check(findings: &mut Vec<Finding>) -> anyhow::Result<()> {
    let settings = fs::read_to_string("rustfmt.toml").context("Cannot read rustfmt.toml")?;
    let width = settings
        .lines()
        .find_map(|line| line.strip_prefix("max_width = ")?.parse::<usize>().ok())
        .context("rustfmt.toml has no max_width")?;
    for file in crate::tracked(&[".rs", ".md"])? {
        let text = fs::read_to_string(&file).with_context(|| format!("Cannot read {}", file.display()))?;
        let is_document = file.extension().is_some_and(|extension| extension == "md");
        let mut is_code = false;
        for (at, line) in text.lines().enumerate() {
            is_code ^= is_document && line.trim_start().starts_with("```");
            let may_be_wide = is_document && (is_code || line.trim_start().starts_with('|'));
            let can_break = line.trim().chars().take(width).any(char::is_whitespace);
            let len = line.chars().count();
            if len > width && !may_be_wide && (can_break || !is_document) {
                findings.push(Finding::new(&file, at + 1, format!("{len} columns; at most {width}")));
            }
        }
    }
    Ok(())
}
