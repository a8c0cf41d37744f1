//! Manual pages and completions, from the same source as `--help`.
//!
//! The long text behind a command's options (`after_long_help`, the files of `help/`) is plain: a line that
//! ends with a colon, with no empty line behind it, begins a section, indented lines stay as they are, the
//! others are paragraphs.

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use crate::cli::{Cli, CompletionOptions, ManualOptions};
use crate::failure::Failure;
use crate::output;

/// Prints the completions of a shell.
pub fn complete(options: &CompletionOptions) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut Cli::command(), "raio", &mut script);
    output::print(&String::from_utf8_lossy(&script))
}

/// Writes the pages, one for each command.
pub fn write(options: &ManualOptions) -> Result<(), Failure> {
    for (name, page) in pages()? {
        let path = options.directory.join(name);
        std::fs::write(&path, page)
            .map_err(|error| Failure::io(format!("Cannot write {}", path.display()), &error))?;
    }
    Ok(())
}

/// The pages, by the name of their file.
fn pages() -> Result<Vec<(String, String)>, Failure> {
    let mut tool = Cli::command().disable_help_subcommand(true);
    tool.build();
    let mut pages = vec![("raio.1".to_owned(), page(&tool, &tool, "raio")?)];
    for command in tool.get_subcommands().filter(|command| !command.is_hide_set()) {
        let name = format!("raio-{}", command.get_name());
        pages.push((format!("{name}.1"), page(&tool, command, &name)?));
    }
    Ok(pages)
}

/// The page of one command of the tool, or of the tool itself.
fn page(tool: &Command, command: &Command, name: &str) -> Result<String, Failure> {
    let long = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
    // Options that every command has are described in the page of the tool.
    let mut shown = command.clone().name(name.to_owned()).after_long_help("").after_help("");
    if name != "raio" {
        shown = shown.mut_args(|argument| {
            let is_of_tool = tool.get_arguments().any(|other| other.get_id() == argument.get_id());
            let is_hidden = argument.is_global_set() && is_of_tool;
            argument.hide(is_hidden)
        });
    }
    let man =
        Man::new(shown).title(name.to_uppercase()).section("1").date(DATE).source("raio").manual("raio");
    let failed = |error: std::io::Error| Failure::io(format!("Cannot make the page {name}"), &error);
    let mut text = Vec::new();
    man.render_title(&mut text).map_err(failed)?;
    man.render_name_section(&mut text).map_err(failed)?;
    man.render_synopsis_section(&mut text).map_err(failed)?;
    if !long.starts_with("Description:") {
        man.render_description_section(&mut text).map_err(failed)?;
    }
    man.render_options_section(&mut text).map_err(failed)?;
    if command.get_subcommands().any(|one| !one.is_hide_set()) {
        let mut commands = Roff::new();
        commands.control("SH", ["COMMANDS"]);
        for one in command.get_subcommands().filter(|one| !one.is_hide_set()) {
            commands.control("TP", []);
            commands.text([clap_mangen::roff::bold(one.get_name())]);
            commands.text([roman(one.get_about().map(ToString::to_string).unwrap_or_default())]);
        }
        commands.to_writer(&mut text).map_err(failed)?;
    }
    // What it makes of possible values has breaks that do nothing.
    let mut page = String::from_utf8_lossy(&text).replace(".br\n\n.br\n", ".sp\n");
    page.push_str(&sections(&long));
    if name != "raio" {
        page.push_str(&sections(COMMON));
    }
    Ok(format!(".\\\" SPDX-License-Identifier: MIT OR Apache-2.0\n{page}"))
}

/// When the pages were last changed. Not today: they are the same whenever they are made.
const DATE: &str = "2026-11-30";

/// What every page but that of the tool ends with.
const COMMON: &str = "\
Exit status:
0 if it was done, else a number that tells why: see raio(1), which also has the global options.

See also:
raio(1), libraio(3), raio_server(8)
";

/// The sections of a plain text.
fn sections(text: &str) -> String {
    let mut roff = Roff::new();
    let mut block: Vec<&str> = Vec::new();
    // Behind the heading of a section, which begins a paragraph by itself.
    let mut is_first = false;
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let next = lines.peek().copied().unwrap_or_default();
        if line.starts_with(' ') {
            block.push(line.trim_end());
            let goes_on = next.starts_with(' ') || next.is_empty() && followed_by_indent(&lines);
            if !goes_on {
                if !is_first {
                    roff.control("PP", []);
                }
                is_first = false;
                display(&mut roff, &block);
                block.clear();
            }
        } else if line.is_empty() {
            if block.is_empty() { continue } else { block.push("") }
        } else if let Some(title) = line.strip_suffix(':').filter(|_| !next.is_empty()) {
            roff.control("SH", [title.to_uppercase().as_str()]);
            is_first = true;
        } else {
            let mut paragraph = line.to_owned();
            while lines.peek().is_some_and(|next| !next.is_empty() && !next.starts_with(' ')) {
                paragraph.push(' ');
                paragraph.push_str(lines.next().unwrap_or_default());
            }
            if !is_first {
                roff.control("PP", []);
            }
            is_first = false;
            roff.text([roman(paragraph)]);
        }
    }
    roff.to_roff()
}

/// Whether an indented line comes behind the empty one that is next.
fn followed_by_indent(lines: &std::iter::Peekable<std::str::Lines<'_>>) -> bool {
    lines.clone().nth(1).is_some_and(|line| line.starts_with(' '))
}

/// Lines that stay as they are.
fn display(roff: &mut Roff, lines: &[&str]) {
    let indent = lines.iter().filter(|line| !line.is_empty()).map(|line| indent_of(line)).min();
    roff.control("RS", ["4"]);
    roff.control("nf", []);
    for line in lines {
        roff.text([roman(line.get(indent.unwrap_or(0)..).unwrap_or_default())]);
    }
    roff.control("fi", []);
    roff.control("RE", []);
}

fn indent_of(line: &str) -> usize {
    line.len() - line.trim_start().len()
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use clap_complete::Shell;

    use super::*;

    /// Where the pages are kept.
    fn kept() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/man")
    }

    #[test]
    fn the_pages_in_docs_are_those_that_this_program_writes() {
        for (name, page) in pages().unwrap() {
            let there = std::fs::read_to_string(kept().join(&name)).unwrap_or_default();
            assert!(there == page, "docs/man/{name} is out of date. Run `target/debug/raio man docs/man`.");
        }
    }

    #[test]
    fn plain_text_becomes_sections_paragraphs_and_displays() {
        let text = "Examples:\nCopy it\nthere:\n  $ raio cp a b\n\n  -n 1\n\nSee also:\nraio(1)\n";
        let roff = sections(text);
        for needle in [
            ".SH EXAMPLES\n",
            "Copy it there:\n",
            ".nf\n$ raio cp a b\n\n\\-n 1\n.fi\n",
            ".SH \"SEE ALSO\"\n",
        ] {
            assert!(roff.contains(needle), "{needle:?} is not in {roff}");
        }
    }

    #[test]
    fn every_command_has_completions_in_every_shell() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "raio", &mut script);
            let script = String::from_utf8(script).unwrap();
            let tool = Cli::command();
            for command in tool.get_subcommands().filter(|command| !command.is_hide_set()) {
                assert!(script.contains(command.get_name()), "{shell}: {}", command.get_name());
            }
        }
    }
}
