//! What people write: URLs, exports in their short form, sizes, configuration files, command lines.
//!
//! Each is taken or rejected with an error message, and what is taken makes sense.

#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use clap::Parser;
use libfuzzer_sys::fuzz_target;
use raio_server::config::{Config, Options};
use raio_server::export_spec::{ExportSpec, Source};
use raio_transport::address::Address;

fuzz_target!(|input: &[u8]| {
    let Some((&kind, bytes)) = input.split_first() else { return };
    match (kind % 4, std::str::from_utf8(bytes)) {
        (0, Ok(text)) => url(text),
        (1, Ok(text)) => {
            if let Ok(spec) = text.parse::<ExportSpec>() {
                export(&spec);
            }
        }
        (2, _) => file(bytes),
        (3, Ok(text)) => command_line(text),
        _ => {}
    }
});

fn url(text: &str) {
    match Address::parse(text) {
        Ok(address) => assert_eq!(Address::parse(&address.to_string()).as_ref(), Ok(&address), "{text:?}"),
        Err(why) => assert!(!why.is_empty()),
    }
}

fn export(spec: &ExportSpec) {
    let name = &spec.name;
    assert!(!name.is_empty() && !name.contains(['/', '\0']) && name != "." && name != "..", "{name:?}");
    match &spec.source {
        Source::Path(path) => assert!(!path.as_os_str().is_empty()),
        Source::Null(bytes) | Source::Memory(bytes) => {
            assert!(*bytes > 0 && !spec.is_direct && !spec.may_grow)
        }
    }
}

fn configured(arguments: &[&str]) {
    let Ok(options) = Options::try_parse_from(arguments) else { return };
    match options.check(4) {
        Ok(config) => {
            let Config { exports, arena_bytes, workers, io_bytes_max, .. } = &config;
            exports.iter().for_each(export);
            assert!(!exports.is_empty() && !config.listen.is_empty());
            assert!(*workers > 0 && *arena_bytes >= 2 * *io_bytes_max as usize);
        }
        Err(error) => assert!(format!("{error:#}").len() > 10, "{error:#}"),
    }
}

fn file(bytes: &[u8]) {
    let name = c"raio_server.toml";
    let memory = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).expect("a file in memory");
    let memory = File::from(memory);
    memory.write_all_at(bytes, 0).expect("room");
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    // Nothing is looked up in the network.
    configured(&["raio_server", "--listen", "tcp://127.0.0.1:0", "--config", &path]);
}

fn command_line(text: &str) {
    // No file is read, and nothing is looked up in the network.
    if text.contains("--c") || text.contains("--li") {
        return;
    }
    let words = text.split('\n');
    configured(
        &["raio_server", "--listen", "tcp://127.0.0.1:0"].into_iter().chain(words).collect::<Vec<_>>(),
    );
}
