//! `raio doctor`: what on this machine keeps raio from its best, each with its remedy.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use raio_transport::{rdma, reactor, tcp};
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use crate::failure::Failure;
use crate::global::Global;
use crate::output::{self, Colour};

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// Also write all that was found, and what the machine is, to a file for support. It has no keys, no
    /// paths and no data
    #[arg(long, value_name = "FILE")]
    bundle: Option<PathBuf>,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it should be.
    Ok,
    /// raio works, and could be quicker or has fewer features.
    Hint,
    /// Something does not work.
    Problem,
}

/// One thing that was examined, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    state: State,
    found: String,
    /// What to do; empty if there is nothing to do.
    remedy: String,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, state: State::Ok, found: found.into(), remedy: String::new() }
    }

    fn hint(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, state: State::Hint, found: found.into(), remedy: remedy.into() }
    }

    fn problem(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, state: State::Problem, found: found.into(), remedy: remedy.into() }
    }
}

/// What is written with `--bundle`.
#[derive(Debug, Serialize)]
struct Bundle<'a> {
    raio: &'static str,
    kernel: String,
    architecture: &'static str,
    processors: usize,
    memory_kib: Option<u64>,
    findings: &'a [Finding],
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let root = Path::new("/");
    let mut findings = vec![kernel(), io_uring(), seccomp(root), memlock(), open_files()];
    findings.extend(rdma_devices());
    findings.extend([kernel_tls(), governor(root), huge_pages(root), clock(root), mtu(root)]);
    if let Some(path) = &options.bundle {
        let bundle = Bundle {
            raio: env!("CARGO_PKG_VERSION"),
            kernel: release(),
            architecture: std::env::consts::ARCH,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory_kib: memory_kib(root),
            findings: &findings,
        };
        let text = serde_json::to_string_pretty(&bundle).map_err(|error| Failure::new(error.to_string()))?;
        fs::write(path, text + "\n")
            .map_err(|error| Failure::io(format!("Cannot write {}", path.display()), &error))?;
    }
    for finding in &findings {
        if global.json {
            output::print_json(finding)?;
        } else {
            output::print(&text(finding))?;
        }
    }
    let problems = findings.iter().filter(|finding| finding.state == State::Problem).count();
    match problems {
        0 => Ok(()),
        _ => Err(Failure::new(format!("{problems} of {} checks found a problem.", findings.len()))),
    }
}

fn text(finding: &Finding) -> String {
    let state = match finding.state {
        State::Ok => output::coloured("ok     ", Colour::Green),
        State::Hint => output::coloured("hint   ", Colour::Yellow),
        State::Problem => output::coloured("problem", Colour::Red),
    };
    let mut text = format!("{state} {:<12} {}\n", finding.check, finding.found);
    if !finding.remedy.is_empty() {
        text += &format!("{:21}{}\n", "", finding.remedy);
    }
    text
}

fn read(root: &Path, path: &str) -> Option<String> {
    fs::read_to_string(root.join(path)).ok().map(|text| text.trim().to_owned())
}

fn release() -> String {
    read(Path::new("/"), "proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into())
}

/// The first two numbers of a release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn kernel() -> Finding {
    let release = release();
    match version(&release) {
        Some(version) if version < (6, 1) => Finding::hint(
            "kernel",
            format!("Linux {release}"),
            "raio is made for Linux 6.1 or newer. Update.",
        ),
        _ => Finding::ok("kernel", format!("Linux {release}")),
    }
}

fn io_uring() -> Finding {
    // As a server makes it.
    let made = reactor::Reactor::new(&reactor::Config::default());
    match &made {
        Ok(made) => match made.fallback_reason() {
            None => Finding::ok("io_uring", "works"),
            Some(why) => Finding::hint(
                "io_uring",
                format!("does not work ({why}); a server here uses epoll and threads"),
                "Set kernel.io_uring_disabled to 0, and allow io_uring in the container's seccomp profile.",
            ),
        },
        Err(error) => Finding::problem(
            "io_uring",
            format!("neither io_uring nor epoll works: {error}"),
            "Raise the limits on open files and locked memory, and allow both in the seccomp profile.",
        ),
    }
}

fn seccomp(root: &Path) -> Finding {
    let status = read(root, "proc/self/status").unwrap_or_default();
    let mode = status.lines().find_map(|line| line.strip_prefix("Seccomp:")).map(str::trim);
    match mode {
        Some("2") => Finding::hint(
            "seccomp",
            "a filter is on, as in a container",
            "If io_uring is missing above, start the container with a profile that allows it.",
        ),
        _ => Finding::ok("seccomp", "no filter"),
    }
}

fn memlock() -> Finding {
    let limit = getrlimit(Resource::Memlock).current;
    match limit {
        Some(bytes) if bytes < 64 << 20 => Finding::hint(
            "memlock",
            format!("{} may be locked", output::size(bytes, false)),
            "RDMA locks the memory of requests. Raise it: `ulimit -l`, or LimitMEMLOCK= in a unit.",
        ),
        Some(bytes) => Finding::ok("memlock", format!("{} may be locked", output::size(bytes, false))),
        None => Finding::ok("memlock", "no limit"),
    }
}

fn open_files() -> Finding {
    let limit = getrlimit(Resource::Nofile);
    match limit.maximum {
        Some(most) if most < 4096 => Finding::hint(
            "open files",
            format!("at most {most}"),
            "A server needs one for each connection. Raise it: `ulimit -Hn`, or LimitNOFILE= in a unit.",
        ),
        Some(most) => Finding::ok("open files", format!("at most {most}")),
        None => Finding::ok("open files", "no limit"),
    }
}

fn rdma_devices() -> Vec<Finding> {
    if let Some(why) = rdma::unavailable() {
        let found = format!("not available: {}", why.trim_end_matches('.'));
        let remedy =
            "Connections use TCP. For an RDMA device install libibverbs1, librdmacm1, ibverbs-providers.";
        return vec![Finding::hint("rdma", found, remedy)];
    }
    let devices = match rdma::devices() {
        Ok(devices) => devices,
        Err(error) => return vec![Finding::hint("rdma", error.to_string(), "Connections use TCP.")],
    };
    let mut findings = Vec::new();
    for device in devices {
        for port in &device.ports {
            let found = format!("{} port {}: {}, MTU {}", device.name, port.number, port.state, port.mtu);
            findings.push(match port.problem() {
                Some(remedy) => Finding::hint("rdma", found, remedy),
                None if !device.has_windows => Finding::hint(
                    "rdma",
                    found + ", no memory windows",
                    "A server can reach all memory that a client registers. Trust it, or use TLS over TCP.",
                ),
                None => Finding::ok("rdma", found),
            });
        }
    }
    findings
}

fn kernel_tls() -> Finding {
    match tcp::no_kernel_tls() {
        None => Finding::ok("kernel TLS", "works"),
        Some(why) => Finding::hint(
            "kernel TLS",
            "does not work here",
            format!("Only servers with --ktls need it. {}.", why.trim_end_matches('.')),
        ),
    }
}

fn governor(root: &Path) -> Finding {
    match read(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").as_deref() {
        Some("performance") | None => Finding::ok("governor", "the processor does not slow down by itself"),
        Some(other) => Finding::hint(
            "governor",
            format!("{other}: latency grows while the processor is slow"),
            "`cpupower frequency-set -g performance`.",
        ),
    }
}

fn huge_pages(root: &Path) -> Finding {
    match read(root, "sys/kernel/mm/transparent_hugepage/enabled") {
        Some(modes) if modes.contains("[never]") => Finding::hint(
            "huge pages",
            "transparent huge pages are off",
            "`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled` saves a server's TLB entries.",
        ),
        Some(_) => Finding::ok("huge pages", "on, or on request"),
        None => Finding::ok("huge pages", "this kernel has none"),
    }
}

fn clock(root: &Path) -> Finding {
    match read(root, "sys/devices/system/clocksource/clocksource0/current_clocksource").as_deref() {
        Some(slow @ ("hpet" | "acpi_pm")) => Finding::hint(
            "clock",
            format!("{slow}, which takes a microsecond to read"),
            "Boot with clocksource=tsc if the processor's counter is stable.",
        ),
        Some(other) => Finding::ok("clock", other),
        None => Finding::ok("clock", "not known"),
    }
}

fn mtu(root: &Path) -> Finding {
    let interfaces = fs::read_dir(root.join("sys/class/net")).into_iter().flatten().flatten();
    let mut small = Vec::new();
    for interface in interfaces {
        let number = |file| read(&interface.path(), file).and_then(|text| text.parse::<i64>().ok());
        // In Mbit/s; virtual interfaces have none.
        if let (Some(speed), Some(mtu)) = (number("speed"), number("mtu"))
            && speed >= 10_000
            && mtu < 9000
        {
            small.push(format!("{} has {mtu}", interface.file_name().to_string_lossy()));
        }
    }
    if small.is_empty() {
        return Finding::ok("MTU", "no fast interface has small packets");
    }
    Finding::hint(
        "MTU",
        small.join(", "),
        "Large packets save time: `ip link set DEVICE mtu 9000`, if every host and switch allows it.",
    )
}

fn memory_kib(root: &Path) -> Option<u64> {
    let all = read(root, "proc/meminfo")?;
    all.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn what_is_slow_has_a_remedy_and_what_is_well_has_none() {
        let slow = machine(&[
            ("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "powersave\n"),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n"),
            ("sys/devices/system/clocksource/clocksource0/current_clocksource", "hpet\n"),
            ("sys/class/net/eth0/speed", "25000\n"),
            ("sys/class/net/eth0/mtu", "1500\n"),
            ("proc/self/status", "Name:\traio\nSeccomp:\t2\n"),
        ]);
        let well = machine(&[
            ("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n"),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
            ("sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc\n"),
            ("sys/class/net/eth0/speed", "25000\n"),
            ("sys/class/net/eth0/mtu", "9000\n"),
            ("sys/class/net/eth1/speed", "1000\n"),
            ("sys/class/net/eth1/mtu", "1500\n"),
            ("proc/self/status", "Name:\traio\nSeccomp:\t0\n"),
        ]);
        for check in [governor, huge_pages, clock, mtu, seccomp] {
            let (slow, well) = (check(slow.path()), check(well.path()));
            assert!(slow.state == State::Hint && !slow.remedy.is_empty(), "{slow:?}");
            assert!(well.state == State::Ok && well.remedy.is_empty(), "{well:?}");
        }
    }

    #[test]
    fn a_release_begins_with_its_version() {
        assert_eq!(version("6.1.0-13-amd64"), Some((6, 1)));
        assert_eq!(version("5.10"), Some((5, 10)));
        assert_eq!(version("rolling"), None);
    }
}
