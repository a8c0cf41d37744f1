//! Messages of the log: each of level info and above has an id, and docs/MESSAGES.md explains each.
//!
//! A section of the index is `### ID`, then `> LEVEL TEXT` as in the source (with `{name}` for what differs
//! from time to time), then what it means and what to do. `--catalog` prints the same for journald:
//! `journalctl -x` then shows it below each message.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use proc_macro2::{Delimiter, Span, TokenStream, TokenTree};

use crate::Finding;

const INDEX: &str = "docs/MESSAGES.md";
const CATALOG: &str = "systemd/raio.catalog";
const LEVELS: [&str; 3] = ["error", "warn", "info"];

/// A message, in the source or in the index.
#[derive(Debug, PartialEq)]
struct Message {
    id: String,
    /// In capitals.
    level: String,
    text: String,
    line: usize,
}

/// A section of the index.
struct Section {
    message: Message,
    /// Its lines, none of them empty.
    explanation: Vec<String>,
}

/// Appends messages without an id or with a bad one, and where the index differs from the source.
pub fn check(findings: &mut Vec<Finding>) -> anyhow::Result<()> {
    let mut messages = Vec::new();
    for file in crate::tracked(&[".rs"])? {
        if !file.starts_with("src") && !file.starts_with("raio-server/src") {
            continue;
        }
        let text = fs::read_to_string(&file).with_context(|| format!("Cannot read {}", file.display()))?;
        let tokens = text.parse().map_err(|error| anyhow!("Cannot parse {}: {error}", file.display()))?;
        let mut found = Vec::new();
        collect(&tokens, &mut found);
        for message in found {
            match message {
                Ok(message) => messages.push((file.clone(), message)),
                Err((line, text)) => findings.push(Finding::new(&file, line, text)),
            }
        }
    }
    let index = fs::read_to_string(INDEX).with_context(|| format!("Cannot read {INDEX}"))?;
    let sections = sections(&index);
    compare(&messages, &sections, findings);
    if fs::read_to_string(CATALOG).unwrap_or_default() != catalog(&sections) {
        let text = format!("it differs from {INDEX}: cargo run -q -p raio-lint -- --catalog >{CATALOG}");
        findings.push(Finding::new(Path::new(CATALOG), 1, text));
    }
    Ok(())
}

/// Prints the catalog of what the index has.
pub fn print_catalog() -> anyhow::Result<()> {
    let index = fs::read_to_string(INDEX).with_context(|| format!("Cannot read {INDEX}"))?;
    print!("{}", catalog(&sections(&index)));
    Ok(())
}

/// The sections as journald's catalog has them.
fn catalog(sections: &[Section]) -> String {
    let mut catalog = format!("# Made from {INDEX} by raio-lint --catalog.\n");
    for Section { message: Message { id, .. }, explanation } in sections {
        // The same as in raio-server/src/log/entry.rs.
        let hash = blake3::hash(format!("raio_server message {id}").as_bytes()).to_hex();
        let lines = explanation.join("\n");
        catalog += &format!("\n-- {}\nSubject: {id}\nDefined-By: raio_server\n\n{lines}\n", &hash[..32]);
    }
    catalog
}

fn compare(messages: &[(PathBuf, Message)], sections: &[Section], findings: &mut Vec<Finding>) {
    let mut known = BTreeMap::new();
    for Section { message: section, explanation } in sections {
        if known.insert(&section.id, section).is_some() {
            findings.push(Finding::new(Path::new(INDEX), section.line, "the id is there twice"));
        }
        if explanation.is_empty() {
            let text = format!("{} is not explained", section.id);
            findings.push(Finding::new(Path::new(INDEX), section.line, text));
        }
        if !messages.iter().any(|(_, message)| message.id == section.id) {
            let text = format!("no message has the id {}", section.id);
            findings.push(Finding::new(Path::new(INDEX), section.line, text));
        }
    }
    for (file, message) in messages {
        let Message { id, level, text, line } = message;
        let problem = match known.get(id) {
            None => "has no section",
            Some(section) if (&section.level, &section.text) != (level, text) => "differs",
            Some(_) => continue,
        };
        let text = format!("{id} {problem} in {INDEX}, which needs \"### {id}\" and \"> {level} {text}\"");
        findings.push(Finding::new(file, *line, text));
    }
}

fn sections(index: &str) -> Vec<Section> {
    let mut sections = Vec::<Section>::new();
    let mut is_in_one = false;
    for (at, line) in index.lines().enumerate() {
        if line.starts_with('#') {
            is_in_one = line.starts_with("### ");
            if let Some(id) = line.strip_prefix("### ") {
                let (id, level, text) = (id.to_owned(), String::new(), String::new());
                let message = Message { id, level, text, line: at + 1 };
                sections.push(Section { message, explanation: Vec::new() });
            }
            continue;
        }
        let Some(Section { message, explanation }) = sections.last_mut().filter(|_| is_in_one) else {
            continue;
        };
        match line.strip_prefix("> ") {
            Some(text) if message.level.is_empty() => {
                let (level, text) = text.split_once(' ').unwrap_or((text, ""));
                (message.level, message.text) = (level.to_owned(), text.to_owned());
            }
            Some(text) => message.text = format!("{} {text}", message.text),
            None if line.is_empty() => {}
            None => explanation.push(line.to_owned()),
        }
    }
    sections
}

type Found = Result<Message, (usize, String)>;

/// Appends the messages in a stream of tokens, and in its groups.
fn collect(tokens: &TokenStream, found: &mut Vec<Found>) {
    let trees: Vec<_> = tokens.clone().into_iter().collect();
    for (at, tree) in trees.iter().enumerate() {
        let TokenTree::Group(group) = tree else { continue };
        let (before, line) = (words(&trees[at.saturating_sub(5)..at]), line_of(group.span_open()));
        let macro_level =
            LEVELS.iter().find(|level| before.ends_with(&format!("tracing :: {level} !"))).copied();
        let arguments = split(&group.stream());
        if let Some(level) = macro_level {
            found.push(traced(level, &arguments, line));
        } else if before.ends_with("log_client !") && group.delimiter() == Delimiter::Parenthesis {
            found.extend(about_client(&arguments, line));
        } else if before.ends_with("Entry :: plain") {
            found.extend(plain(&arguments, line));
        }
        collect(&group.stream(), found);
    }
}

/// `name: "ID", fields, "TEXT", arguments`.
fn traced(level: &str, arguments: &[Vec<TokenTree>], line: usize) -> Found {
    let id = arguments
        .first()
        .filter(|first| words(first).starts_with("name : "))
        .and_then(|first| literal(first.last()?));
    let text = arguments.iter().find_map(|argument| alone(argument));
    message(level, id, text, line)
}

/// `LEVEL, peer, "ID", fields, "TEXT", arguments`. None: it is in the definition of the macro.
fn about_client(arguments: &[Vec<TokenTree>], line: usize) -> Option<Found> {
    let level = words(arguments.first()?);
    if !LEVELS.contains(&level.as_str()) {
        return None;
    }
    let mut literals = arguments.iter().filter_map(|argument| alone(argument));
    Some(message(&level, literals.next(), literals.next(), line))
}

/// `Level::LEVEL, "ID", &format!("TEXT")`. None: it is the definition of the function, or a test.
fn plain(arguments: &[Vec<TokenTree>], line: usize) -> Option<Found> {
    let [level, id, text, ..] = arguments else { return None };
    let [.., TokenTree::Group(text)] = &text[..] else { return None };
    let text = text.stream().into_iter().next().and_then(|first| literal(&first));
    Some(message(&level.last()?.to_string().to_lowercase(), alone(id), text, line))
}

fn message(level: &str, id: Option<String>, text: Option<String>, line: usize) -> Found {
    let Some(id) = id else {
        return Err((
            line,
            format!("a message of level {level} has no id: write name: \"ID\" in front, see {INDEX}"),
        ));
    };
    if !id.chars().all(|char| char.is_ascii_lowercase() || char.is_ascii_digit() || char == '-') {
        return Err((line, format!("\"{id}\": an id has small letters, digits and hyphens")));
    }
    let Some(text) = text else { return Err((line, format!("{id} has no text"))) };
    if text.contains("{}") || text.contains("{:") {
        return Err((line, format!("{id}: give what it quotes a name, \"{{name}}\", for {INDEX}")));
    }
    Ok(Message { id, level: level.to_uppercase(), text: without_formats(&text), line })
}

/// The text with `{name}` for `{name:?}`.
fn without_formats(text: &str) -> String {
    let mut parts = text.split('{');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, rest) = part.split_once('}').unwrap_or((part, ""));
        let name = name.split(':').next().unwrap_or_default();
        plain.push_str(&format!("{{{name}}}{rest}"));
    }
    plain
}

/// The parts between commas.
fn split(tokens: &TokenStream) -> Vec<Vec<TokenTree>> {
    let is_comma = |tree: &TokenTree| matches!(tree, TokenTree::Punct(punct) if punct.as_char() == ',');
    let trees: Vec<_> = tokens.clone().into_iter().collect();
    trees.split(is_comma).map(<[_]>::to_vec).collect()
}

/// The text, if there is nothing but a literal.
fn alone(argument: &[TokenTree]) -> Option<String> {
    let [only] = argument else { return None };
    literal(only)
}

fn literal(tree: &TokenTree) -> Option<String> {
    syn::parse_str::<syn::LitStr>(&tree.to_string()).ok().map(|text| text.value())
}

/// Tokens with a space between any two, `::` as one word.
fn words(trees: &[TokenTree]) -> String {
    let words: Vec<_> = trees.iter().map(ToString::to_string).collect();
    words.join(" ").replace(": :", "::")
}

fn line_of(span: Span) -> usize {
    span.start().line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(source: &str) -> Vec<Found> {
        let mut found = Vec::new();
        collect(&source.parse().unwrap(), &mut found);
        found
    }

    fn expected(id: &str, level: &str, text: &str) -> Message {
        Message { id: id.into(), level: level.into(), text: text.into(), line: 1 }
    }

    #[test]
    fn messages_are_found_however_they_are_logged() {
        let source =
            r#"fn f() { tracing::warn!(name: "a-b", peer, n = g("x"), "It {is:?} {so}.", so = 1); }"#;
        assert_eq!(found(source), [Ok(expected("a-b", "WARN", "It {is} {so}."))]);
        let source = r#"match x { _ => log_client!(info, origin o, "c", name = n, "So \
                        it is."), }"#;
        assert_eq!(found(source), [Ok(expected("c", "INFO", "So it is."))]);
        let source = r#"Entry::plain(Level::ERROR, "d", &format!("{n} lines"),)"#;
        assert_eq!(found(source), [Ok(expected("d", "ERROR", "{n} lines"))]);
        assert_eq!(found(r#"tracing::debug!("x"); $crate::log::log_client!(@ $level, $id, "x")"#), []);
    }

    #[test]
    fn messages_without_an_id_or_with_nameless_arguments_are_findings() {
        for (source, problem) in [
            (r#"tracing::info!("x");"#, "has no id"),
            (r#"tracing::info!(name: "A b", "x");"#, "an id has small letters"),
            (r#"tracing::info!(name: "a", "x {} y", 1);"#, "give what it quotes a name"),
            (r#"tracing::info!(name: "a", peer);"#, "has no text"),
        ] {
            let [Err((1, text))] = &found(source)[..] else { panic!("{source}") };
            assert!(text.contains(problem), "{text}");
        }
    }

    #[test]
    fn what_is_missing_or_differs_on_either_side_is_a_finding() {
        let index =
            "# Log\n> no\n### a\n\n> WARN It is\n> so.\n\nWhy.\n\n### b\n> INFO B.\n\n## More\nText\n";
        let sections = sections(index);
        let catalog = catalog(&sections);
        assert!(catalog.contains("\nSubject: a\nDefined-By: raio_server\n\nWhy.\n\n-- "), "{catalog}");
        let mut a = expected("a", "WARN", "It is so.");
        let problems = |messages: Vec<Message>| {
            let messages: Vec<_> =
                messages.into_iter().map(|message| (PathBuf::from("x.rs"), message)).collect();
            let mut findings = Vec::new();
            compare(&messages, &sections, &mut findings);
            findings.into_iter().map(|Finding { place, text }| format!("{place}: {text}")).collect::<Vec<_>>()
        };
        let b_is_not_explained = format!("{INDEX}:10: b is not explained");
        let b = || expected("b", "INFO", "B.");
        assert_eq!(problems(vec![expected("a", "WARN", "It is so."), b()]), [&b_is_not_explained[..]]);
        a.text = "It is not so.".into();
        let [first, second] = &problems(vec![a, b()])[..] else { panic!() };
        assert_eq!(*first, b_is_not_explained);
        assert!(second.starts_with("x.rs:1: a differs in"), "{second}");
        let missing = problems(vec![b(), expected("c", "INFO", "C.")]);
        assert!(missing[0].ends_with("no message has the id a"), "{missing:?}");
        assert!(missing[2].starts_with("x.rs:1: c has no section"), "{missing:?}");
    }
}
