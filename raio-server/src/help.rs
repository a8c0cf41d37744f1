//! `--help`: the options under headings, with examples at the end.

use clap::{CommandFactory, FromArgMatches};

use crate::config::Options;

/// Options by their long names. The order of headings in the help is that of the options in [`Options`].
const HEADINGS: [(&str, &[&str]); 7] = [
    ("What is exported", &["export", "exports-beneath"]),
    ("Network", &["listen", "stall-timeout"]),
    ("Clients and security", &["keys", "ktls", "clear", "user", "sandbox", "audit", "audit-full"]),
    (
        "Limits",
        &["max-sessions", "limits-per-session", "limits-per-address", "queue-depth", "io-max", "memory"],
    ),
    ("Performance", &["workers", "spin-us", "backend"]),
    ("Restart and hand-over", &["state", "strict", "hand-over", "linger"]),
    (
        "Log and monitoring",
        &["log", "log-format", "http", "http-token", "http-host", "admin", "slow", "trace"],
    ),
];

const EXAMPLES: &str = "\
Examples:
  A directory for programs on this machine, for reading and writing:
      raio_server --export data=/srv/data,rw

  A directory for reading, for clients of other machines that have keys:
      raio_server --listen tcp://0.0.0.0:7240 --keys /etc/raio/keys --export data=/srv/data

  What the packages' service does:
      raio_server --config /etc/raio/raio.toml

See raio_server(8) and raio.toml(5) for more.";

/// What the process's arguments say. The error may also be what was asked for: the help, or the version.
pub fn parse() -> Result<Options, clap::Error> {
    let mut command = command();
    let matches = command.try_get_matches_from_mut(std::env::args_os())?;
    Options::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
}

fn command() -> clap::Command {
    Options::command().after_help(EXAMPLES).mut_args(|option| {
        let heading = option.get_long().and_then(heading_of);
        if heading.is_some() { option.help_heading(heading) } else { option }
    })
}

fn heading_of(option: &str) -> Option<&'static str> {
    HEADINGS.iter().find(|(_, options)| options.contains(&option)).map(|(heading, _)| *heading)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Options that stand before the headings.
    const WITHOUT_HEADING: [&str; 5] = ["config", "check", "list-devices", "help", "version"];

    #[test]
    fn each_option_has_a_heading() {
        let mut command = command();
        command.build();
        let options = command.get_arguments().filter_map(clap::Arg::get_long);
        let without: Vec<&str> = options
            .filter(|option| heading_of(option).is_none() && !WITHOUT_HEADING.contains(option))
            .collect();
        assert!(without.is_empty(), "add {without:?} to HEADINGS in {}", file!());
        let help = command.render_long_help().to_string();
        for (heading, _) in HEADINGS {
            assert!(help.contains(&format!("\n{heading}:\n")), "{heading}: {help}");
        }
        assert!(help.ends_with(&format!("{EXAMPLES}\n")), "{help}");
    }
}
