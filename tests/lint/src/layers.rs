//! Modules depend on one another in one direction only.
//!
//! docs/ARCHITECTURE.md has a table of layers for each crate: a top-level module may use those of lower
//! layers. Within a module, its children must not use one another in a circle.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};

use crate::Finding;
use crate::modules::{Modules, module_of};

const DOCUMENT: &str = "docs/ARCHITECTURE.md";

/// A crate to be checked.
pub struct Crate {
    /// Its name in [`DOCUMENT`].
    pub name: &'static str,
    /// Its root module.
    pub root: &'static str,
    /// Others use it.
    pub is_library: bool,
}

/// The crates of the workspace that have more than one module.
pub const CRATES: &[Crate] = &[
    Crate { name: "raio-transport", root: "src/lib.rs", is_library: true },
    Crate { name: "libraio", root: "libraio/src/lib.rs", is_library: true },
    Crate { name: "raio-server", root: "raio-server/src/lib.rs", is_library: true },
    Crate { name: "raio-tool", root: "raio-tool/src/main.rs", is_library: false },
];

/// The layer of each top-level module, from the rows `| NUMBER | `module`, `module` | ...` below a line that
/// begins with `### NAME (`.
fn layers(name: &str) -> anyhow::Result<HashMap<String, usize>> {
    let document = fs::read_to_string(DOCUMENT).with_context(|| format!("Cannot read {DOCUMENT}"))?;
    let heading = format!("### {name} (");
    let rows = document.lines().skip_while(|line| !line.starts_with(&heading)).skip(1);
    let mut layers = HashMap::new();
    for row in rows.skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|')) {
        let mut cells = row.split('|').skip(1);
        let Some(layer) = cells.next().and_then(|cell| cell.trim().parse().ok()) else { continue };
        for module in cells.next().unwrap_or_default().split('`').skip(1).step_by(2) {
            layers.insert(module.to_owned(), layer);
        }
    }
    ensure!(!layers.is_empty(), "{DOCUMENT} has no table of layers under \"{heading}\"");
    Ok(layers)
}

/// Appends what is wrong with a crate's dependencies.
pub fn check(krate: &Crate, modules: &Modules, findings: &mut Vec<Finding>) -> anyhow::Result<()> {
    let layers = layers(krate.name)?;
    for (path, module) in modules.iter().filter(|(path, _)| path.len() == 1) {
        if !layers.contains_key(&path[0]) {
            findings.push(Finding::new(
                &module.file,
                1,
                format!("module `{}` has no layer in {DOCUMENT}", path[0]),
            ));
        }
    }
    for module in layers.keys().filter(|&module| !modules.contains_key(std::slice::from_ref(module))) {
        let text = format!("the layers of {} name `{module}`, which is no module", krate.name);
        findings.push(Finding::new(Path::new(DOCUMENT), 1, text));
    }
    let mut graphs: BTreeMap<&[String], Uses> = BTreeMap::new();
    for (from, module) in modules {
        for (used, line) in &module.uses {
            let to = module_of(modules, used);
            let common = from.iter().zip(to).take_while(|(a, b)| a == b).count();
            let (Some(a), Some(b)) = (from.get(common), to.get(common)) else { continue };
            let place = (module.file.as_path(), *line);
            if common == 0
                && let (Some(from), Some(to)) = (layers.get(a), layers.get(b))
                && to >= from
            {
                let text = format!("`{a}` (layer {from}) uses `{b}` (layer {to}): see {DOCUMENT}");
                findings.push(Finding::new(place.0, place.1, text));
            }
            graphs.entry(&from[..common]).or_default().entry((a, b)).or_insert(place);
        }
    }
    for (parent, graph) in graphs {
        if let Some(circle) = circle(&graph.keys().copied().collect()) {
            let (file, line) = graph[&(circle[0], circle[1])];
            let text = format!(
                "modules of `{}` use one another in a circle: {}",
                parent.join("::"),
                circle.join(" → ")
            );
            findings.push(Finding::new(file, line, text));
        }
    }
    Ok(())
}

/// Which child of a module uses which, and where first.
type Uses<'a> = BTreeMap<(&'a str, &'a str), (&'a Path, usize)>;

/// Prints which top-level module uses which.
pub fn print(krate: &Crate, modules: &Modules) {
    let mut graph = BTreeMap::<&str, BTreeSet<&str>>::new();
    for (from, module) in modules.iter().filter(|(from, _)| !from.is_empty()) {
        let used = module.uses.iter().filter_map(|(path, _)| module_of(modules, path).first());
        graph.entry(&from[0]).or_default().extend(used.filter(|&to| *to != from[0]).map(String::as_str));
    }
    for (from, used) in graph {
        println!("{}: {from} -> {}", krate.name, used.into_iter().collect::<Vec<_>>().join(" "));
    }
}

/// A circle in a graph, its first node repeated at its end.
fn circle<'a>(edges: &BTreeSet<(&'a str, &'a str)>) -> Option<Vec<&'a str>> {
    fn walk<'a>(
        node: &'a str,
        edges: &BTreeSet<(&'a str, &'a str)>,
        path: &mut Vec<&'a str>,
        done: &mut BTreeSet<&'a str>,
    ) -> bool {
        if let Some(at) = path.iter().position(|&other| other == node) {
            path.drain(..at);
            path.push(node);
            return true;
        }
        if done.contains(node) {
            return false;
        }
        path.push(node);
        for &(_, to) in edges.iter().filter(|(from, _)| *from == node) {
            if walk(to, edges, path, done) {
                return true;
            }
        }
        path.pop();
        done.insert(node);
        false
    }
    let mut done = BTreeSet::new();
    edges.iter().find_map(|&(from, _)| {
        let mut path = Vec::new();
        walk(from, edges, &mut path, &mut done).then_some(path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_circle_is_found_wherever_it_is() {
        assert_eq!(circle(&BTreeSet::from([("a", "b"), ("b", "c"), ("a", "c")])), None);
        let edges = BTreeSet::from([("a", "b"), ("b", "c"), ("c", "d"), ("d", "b")]);
        assert_eq!(circle(&edges), Some(vec!["b", "c", "d", "b"]));
    }
}
