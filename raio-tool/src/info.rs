//! `raio info`: what a server grants, and by which transport it is reached.

use clap::Args;
use raio_transport::address::{Address, Scheme};
use raio_transport::protocol::OPERATIONS;
use serde::Serialize;

use crate::failure::Failure;
use crate::global::Global;
use crate::output;
use crate::place::connect;
use crate::target::Probe;

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// The server [default: $RAIO_URL]
    #[arg(value_name = "URL")]
    url: Option<String>,
}

/// The result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    url: String,
    /// tcp, rdma or unix.
    transport: &'static str,
    /// Why it is not rdma, if it could have been.
    why_not_rdma: Option<String>,
    encrypted: bool,
    /// This client's public key, if it has one.
    client_key: Option<String>,
    /// The server's keys that this client trusts.
    trusted_keys: Vec<String>,
    /// Of this tool and its library.
    client_version: &'static str,
    /// Another one after each start of the server.
    server_incarnation: String,
    protocol_version: u16,
    /// Data has checksums on its way.
    checksums: bool,
    /// The most requests in flight on a connection.
    queue_depth: u32,
    /// The largest read or write that is one request.
    io_bytes_max: u32,
    keepalive_seconds: f64,
    connect_seconds: f64,
    /// What the server exports to this client, by name.
    exports: Vec<String>,
    /// Operations that the server has, by name.
    operations: Vec<&'static str>,
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let url = &options.url.clone().map_or_else(|| global.url(), Ok)?;
    let address: Address = url.parse()?;
    let session = connect(global, url)?;
    let context = session.context(1);
    let context = context.map_err(|error| Failure::remote(format!("Cannot connect to {url}"), &error))?;
    let checksums = context.stats().has_crc;
    let probe = Probe::connect(global, url)?;
    let grant = probe.grant();
    let directory = global.key_directory();
    let trusted = match (&directory, address.host()) {
        (Some(directory), Some((host, port))) => directory.trusted(host, port).unwrap_or_default(),
        _ => Vec::new(),
    };
    let why_not_rdma = match address.scheme() {
        Scheme::Any => session.why_tcp().map(str::to_owned),
        Scheme::Tcp => Some("The URL asks for TCP. Write raio:// for RDMA.".into()),
        Scheme::Rdma | Scheme::Unix => None,
    };
    // A server of before 0.3 does not tell.
    let listed = session.read_dir("/").and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let exports = listed.unwrap_or_default();
    let mut exports: Vec<_> = exports.iter().map(|it| it.name.to_string_lossy().into_owned()).collect();
    exports.sort_unstable();
    let report = Report {
        url: url.to_owned(),
        transport: match address.scheme() {
            Scheme::Unix => "unix",
            Scheme::Any | Scheme::Rdma if why_not_rdma.is_none() => "rdma",
            _ => "tcp",
        },
        why_not_rdma,
        encrypted: probe.is_encrypted,
        client_key: directory.and_then(|it| it.key().ok()).map(|key| key.public().to_string()),
        trusted_keys: trusted.iter().map(ToString::to_string).collect(),
        client_version: env!("CARGO_PKG_VERSION"),
        server_incarnation: grant.server.iter().map(|byte| format!("{byte:02x}")).collect(),
        protocol_version: grant.version,
        checksums,
        queue_depth: grant.queue_depth,
        io_bytes_max: grant.data_bytes_max,
        keepalive_seconds: grant.keepalive.as_secs_f64(),
        connect_seconds: probe.connected_in.as_secs_f64(),
        exports,
        operations: OPERATIONS.iter().filter(|it| it.is_granted(grant.features)).map(|it| it.name).collect(),
    };
    if global.json { output::print_json(&report) } else { output::print(&report.text(global.bytes)) }
}

impl Report {
    fn text(&self, is_exact: bool) -> String {
        let mut text = format!("server      {} (incarnation {})\n", self.url, self.server_incarnation);
        text += &format!("protocol    {}; this is raio {}\n", self.protocol_version, self.client_version);
        text += &match &self.why_not_rdma {
            Some(why) => format!("transport   {}. {}.\n", self.transport, why.trim_end_matches('.')),
            None => format!("transport   {}\n", self.transport),
        };
        let key = self.client_key.as_deref().unwrap_or("none; `raio key new` makes one");
        text += &format!("encrypted   {}\n", if self.encrypted { "yes, TLS 1.3" } else { "no" });
        text += &format!("own key     {key}\n");
        for trusted in &self.trusted_keys {
            text += &format!("trusted     {trusted}\n");
        }
        text += &format!("checksums   {}\n", if self.checksums { "yes" } else { "no" });
        text += &format!(
            "limits      {} requests in flight, {} each\n",
            self.queue_depth,
            output::size(self.io_bytes_max.into(), is_exact)
        );
        text += &format!("keepalive   {} s\n", self.keepalive_seconds);
        text += &format!("connecting  {:.3} ms\n", self.connect_seconds * 1e3);
        text += &format!("exports     {}\n", self.exports.join(" "));
        text + &format!("operations  {}\n", self.operations.join(" "))
    }
}
