//! How much memory this process may use: the machine's, or less in a control group.

use std::fs;
use std::path::Path;

/// How much memory there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// Bytes; the most there can be where nothing says how much.
    pub bytes: u64,
    /// Who has it, for an error: "this machine", or its control group.
    pub of: &'static str,
}

/// The least of what the machine has and what the control groups (version 1 or 2) that the process is in, at
/// any level, allow.
pub fn memory_limit() -> MemoryLimit {
    memory_limit_beneath(Path::new("/"))
}

fn memory_limit_beneath(root: &Path) -> MemoryLimit {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let machine = machine_bytes(&read("proc/meminfo")).unwrap_or(u64::MAX);
    // A line for each hierarchy: NUMBER:CONTROLLERS:PATH. That of version 2 has no controllers.
    let groups = read("proc/self/cgroup");
    let limits = groups.lines().flat_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let (mount, file) = if controllers.is_empty() {
            ("sys/fs/cgroup", "memory.max")
        } else if controllers.split(',').any(|name| name == "memory") {
            ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
        } else {
            return Vec::new();
        };
        // In a container the path may be the host's, of which only the root is to be seen.
        let levels = Path::new(path.trim_start_matches('/')).ancestors();
        levels.map(|level| root.join(mount).join(level).join(file)).collect()
    });
    let group = limits.filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok()).min();
    match group {
        Some(bytes) if bytes < machine => MemoryLimit { bytes, of: "the control group of this process" },
        _ => MemoryLimit { bytes: machine, of: "this machine" },
    }
}

fn machine_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_counts_whichever_version_of_control_groups_sets_it_at_whichever_level() {
        const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal:       1000 kB\nMemFree: 5 kB\n");
        type Files<'a> = &'a [(&'a str, &'a str)];
        let cases: [(Files<'_>, u64, &str); 6] = [
            (&[], u64::MAX, "this machine"),
            (&[MEMINFO], 1000 << 10, "this machine"),
            (
                &[MEMINFO, ("proc/self/cgroup", "0::/a/b\n"), ("sys/fs/cgroup/a/b/memory.max", "max\n")],
                1000 << 10,
                "this machine",
            ),
            (
                &[
                    MEMINFO,
                    ("proc/self/cgroup", "0::/a/b\n"),
                    ("sys/fs/cgroup/a/b/memory.max", "9000\n"),
                    ("sys/fs/cgroup/a/memory.max", "7000\n"),
                ],
                7000,
                "the control group of this process",
            ),
            // A container: the path is the host's.
            (
                &[MEMINFO, ("proc/self/cgroup", "0::/../x\n"), ("sys/fs/cgroup/memory.max", "6000\n")],
                6000,
                "the control group of this process",
            ),
            (
                &[
                    MEMINFO,
                    ("proc/self/cgroup", "5:cpu:/\n4:blkio,memory:/s\n0::/\n"),
                    ("sys/fs/cgroup/memory/s/memory.limit_in_bytes", "5000\n"),
                    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
                ],
                5000,
                "the control group of this process",
            ),
        ];
        for (files, bytes, of) in cases {
            let root = tempfile::tempdir().unwrap();
            for (path, text) in files {
                let path = root.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            assert_eq!(memory_limit_beneath(root.path()), MemoryLimit { bytes, of }, "{files:?}");
        }
    }
}
