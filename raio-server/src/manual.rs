//! raio.toml(5) and the program have the same keys. Each list of the page begins with a comment that says
//! whose keys they are.

use std::collections::BTreeSet;

use crate::config::Options;
use crate::keys::Keys;

const PAGE: &str = include_str!("../../docs/man/raio.toml.5");

/// What no key has as its name: the error for it lists those that there are.
const NO_KEY: &str = "no-such-key = 1";

/// The keys of the list behind `.\" Keys of OWNER`.
fn documented(owner: &str) -> BTreeSet<String> {
    let begin = format!(".\\\" Keys of {owner}\n");
    let (_, list) = PAGE.split_once(&begin).unwrap_or_else(|| panic!("raio.toml.5 has no line {begin:?}"));
    let list = list.lines().take_while(|line| !line.starts_with(".Sh") && !line.starts_with(".\\\" Keys of"));
    list.filter_map(|line| line.strip_prefix(".It Cm "))
        .flat_map(|names| names.split(" , "))
        .map(str::to_owned)
        .collect()
}

/// The keys that an error names as those that are expected.
fn expected(error: &str) -> BTreeSet<String> {
    let (_, names) = error.split_once(", expected").unwrap_or_else(|| panic!("it lists no keys: {error}"));
    names.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn of_configuration(text: &str) -> BTreeSet<String> {
    expected(&toml::from_str::<Options>(text).unwrap_err().to_string())
}

fn of_clients(text: &str) -> BTreeSet<String> {
    let directory = tempfile::tempdir().unwrap();
    Keys::open(directory.path(), true).unwrap();
    std::fs::write(directory.path().join("clients.toml"), text).unwrap();
    expected(&format!("{:#}", Keys::open(directory.path(), false).unwrap_err()))
}

#[test]
fn the_page_and_the_program_have_the_same_keys() {
    let client = |table: &str| of_clients(&format!("[client.a]\n{table}"));
    let mut faults = Vec::new();
    for (owner, accepted) in [
        ("raio.toml", of_configuration(NO_KEY)),
        ("limits-per-session", of_configuration(&format!("[limits-per-session]\n{NO_KEY}"))),
        ("[export.NAME]", of_configuration(&format!("[export.a]\n{NO_KEY}"))),
        ("[client.NAME]", client(NO_KEY)),
        ("[client.NAME] exports", client(&format!("exports = {{ e = {{ {NO_KEY} }} }}"))),
        ("[client.NAME] limits", client(&format!("limits = {{ {NO_KEY} }}"))),
    ] {
        let documented = documented(owner);
        for key in accepted.difference(&documented) {
            faults.push(format!(
                "{owner}: the program takes {key}, and docs/man/raio.toml.5 does not have it. Add \".It Cm \
                 {key}\" below \"Keys of {owner}\", with its type, its default, and whether a reload or a \
                 restart changes it"
            ));
        }
        for key in documented.difference(&accepted) {
            faults.push(format!(
                "{owner}: docs/man/raio.toml.5 has {key}, and the program does not take it. Remove \".It Cm \
                 {key}\" from the page"
            ));
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn the_example_of_the_page_is_accepted() {
    let (_, examples) = PAGE.split_once(".Sh EXAMPLES\n.Bd -literal -offset indent\n").unwrap();
    let (text, _) = examples.split_once(".Ed").unwrap();
    toml::from_str::<Options>(text).unwrap();
}
