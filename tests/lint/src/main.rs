//! `cargo run -p raio-lint`: checks what neither rustc nor clippy does. Prints each finding with file and
//! line, and fails if there is one. With `--graph` it prints which module uses which instead, and
//! with `--catalog` the catalog of messages for journald.
//!
//! - [`layers`]: modules depend on one another in one direction only, as docs/ARCHITECTURE.md's tables say.
//! - [`messages`]: each message of the log has an id, and docs/MESSAGES.md explains it.
//! - [`names`]: no two public types of a library have the same name, and no name that was given up comes
//!   back.
//! - [`widths`]: lines of source, comments and documents are no wider than rustfmt's `max_width`.

mod layers;
mod messages;
mod modules;
mod names;
mod widths;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, ensure};

/// What is wrong, and where.
#[derive(PartialEq)]
struct Finding {
    place: String,
    text: String,
}

impl Finding {
    fn new(file: &Path, line: usize, text: impl Into<String>) -> Self {
        Self { place: format!("{}:{line}", file.display()), text: text.into() }
    }
}

/// What git says.
fn git(arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("git").args(arguments).output().context("Cannot run git")?;
    ensure!(output.status.success(), "git {arguments:?} failed: run this in a clone of the repository");
    Ok(String::from_utf8(output.stdout)?)
}

/// The tracked files whose names end with one of these, relative to the repository's root.
fn tracked(endings: &[&str]) -> anyhow::Result<Vec<PathBuf>> {
    let files = git(&["ls-files"])?;
    let has_ending = |file: &&str| endings.iter().any(|ending| file.ends_with(ending));
    Ok(files.lines().filter(has_ending).map(PathBuf::from).filter(|file| file.exists()).collect())
}

fn main() -> anyhow::Result<ExitCode> {
    let root = git(&["rev-parse", "--show-toplevel"])?;
    std::env::set_current_dir(root.trim()).with_context(|| format!("There is no {root}"))?;
    let mut findings = Vec::new();
    let option = std::env::args().nth(1);
    if option.as_deref() == Some("--catalog") {
        messages::print_catalog()?;
        return Ok(ExitCode::SUCCESS);
    }
    let prints_graph = option.as_deref() == Some("--graph");
    for krate in layers::CRATES {
        let modules = modules::read(Path::new(krate.root))?;
        if prints_graph {
            layers::print(krate, &modules);
            continue;
        }
        layers::check(krate, &modules, &mut findings)?;
        if krate.is_library {
            names::check_public_types(krate, &modules, &mut findings);
        }
    }
    if prints_graph {
        return Ok(ExitCode::SUCCESS);
    }
    names::check_old_names(&mut findings)?;
    messages::check(&mut findings)?;
    widths::check(&mut findings)?;
    findings.dedup();
    for Finding { place, text } in &findings {
        println!("{place}: {text}");
    }
    println!("raio-lint: {} findings", findings.len());
    Ok(if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
