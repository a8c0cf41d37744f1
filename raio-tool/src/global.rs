//! The options that every command has.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueHint};
use raio_transport::address::{Address, Endpoint};
use raio_transport::key_directory::KeyDirectory;
use raio_transport::tls::ClientTls;

use crate::failure::Failure;

/// Options that may be given before and after the name of a command.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// The server of paths that begin with ":/" [default: $RAIO_URL]
    #[arg(long = "url", id = "server_url", value_name = "URL", value_hint = ValueHint::Url, global = true)]
    pub url: Option<String>,
    /// Where this client's key is, and the keys of the servers that it trusts [default: $RAIO_KEYS, else
    /// $XDG_CONFIG_HOME/raio, else ~/.config/raio]
    #[arg(long, value_name = "DIRECTORY", value_hint = ValueHint::DirPath, global = true)]
    pub keys: Option<PathBuf>,
    /// How long connecting and each call may take, and how long a lost connection is tried again [default:
    /// 5, 30 and 60]
    #[arg(long, value_name = "SECONDS", value_parser = seconds, global = true)]
    pub timeout: Option<Duration>,
    /// Print the result as JSON, one object in a line
    #[arg(long, global = true)]
    pub json: bool,
    /// Print sizes in bytes, rather than as 1.5 GiB
    #[arg(long, global = true)]
    pub bytes: bool,
}

/// Seconds, with a fraction or without.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: Option<f64> = text.parse().ok().filter(|seconds| (0.001..=1e6).contains(seconds));
    seconds
        .map(Duration::from_secs_f64)
        .ok_or_else(|| format!("{text:?} is no time. Write seconds, from 0.001 to a million."))
}

impl Global {
    /// The server of paths that name none.
    pub fn url(&self) -> Result<String, Failure> {
        let url = self.url.clone().or_else(|| std::env::var("RAIO_URL").ok());
        url.filter(|url| !url.is_empty()).ok_or_else(|| {
            Failure::usage(
                "No server is named. Write raio://HOST[:PORT]/EXPORT/PATH, or set RAIO_URL (or --url) to \
                 raio://HOST[:PORT].",
            )
        })
    }

    /// Where the keys are; None: nothing says so.
    pub fn key_directory(&self) -> Option<KeyDirectory> {
        self.keys.clone().map(KeyDirectory::new).or_else(KeyDirectory::from_environment)
    }

    /// How a connection to a server is secured, which was found at `endpoint`; None: it is not.
    pub fn tls(
        &self,
        address: &Address,
        endpoint: &Endpoint,
    ) -> Result<Option<ClientTls>, raio_transport::Error> {
        let Some(directory) = self.key_directory() else { return Ok(None) };
        // By its name, else by where that leads to.
        let by_name = address.host().map_or(Ok(None), |(host, port)| directory.tls(host, port))?;
        match (by_name, endpoint.ip()) {
            (None, Some(ip)) => directory.tls(&ip.ip().to_string(), ip.port()),
            (by_name, _) => Ok(by_name),
        }
    }

    /// How sessions are opened.
    pub fn session_options(&self) -> raio::Options {
        let keys = self.keys.clone().map_or(raio::Keys::Auto, raio::Keys::Directory);
        // A copy writes the same bytes again if it does not know whether they were written.
        let options = raio::Options { keys, redo: true, ..raio::Options::default() };
        match self.timeout {
            Some(timeout) => raio::Options {
                connect_timeout: timeout,
                call_timeout: timeout,
                reconnect: timeout,
                ..options
            },
            None => options,
        }
    }
}
