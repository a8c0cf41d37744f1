//! What the disks do that exports lie on: the kernel's counters, which reading does not wait for.

use std::path::{Path, PathBuf};

/// The number of a block device.
pub type DeviceNumber = (u32, u32);

/// A disk, or a part of one, on which exports lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// What the kernel calls it.
    pub name: String,
    /// The exports.
    pub exports: Vec<String>,
    /// Reads that have ended.
    pub reads: u64,
    /// Bytes that they have read.
    pub read_bytes: u64,
    /// Writes that have ended.
    pub writes: u64,
    /// Bytes that they have written.
    pub written_bytes: u64,
    /// For how long it had something to do, in milliseconds.
    pub busy_ms: u64,
    /// Requests that it has now.
    pub in_flight: u64,
}

/// The disks of these exports, each once. What lies on no disk (a network, memory) has none.
pub fn disks_of<'a>(exports: impl Iterator<Item = (&'a str, DeviceNumber)>) -> Vec<Disk> {
    let mut found: Vec<(DeviceNumber, Vec<String>)> = Vec::new();
    for (name, number) in exports {
        match found.iter_mut().find(|(known, _)| *known == number) {
            Some((_, names)) => names.push(name.to_owned()),
            None => found.push((number, vec![name.to_owned()])),
        }
    }
    found.into_iter().filter_map(|(number, exports)| read(number, exports)).collect()
}

fn read((major, minor): DeviceNumber, exports: Vec<String>) -> Option<Disk> {
    let at = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let name = std::fs::read_link(&at).ok()?.file_name()?.to_str()?.to_owned();
    let text = std::fs::read_to_string(at.join(Path::new("stat"))).ok()?;
    parse(&text, name, exports)
}

/// Of a file `stat` of sysfs: see Documentation/block/stat.rst of the kernel.
fn parse(text: &str, name: String, exports: Vec<String>) -> Option<Disk> {
    const SECTOR_BYTES: u64 = 512;
    let numbers: Vec<u64> = text.split_ascii_whitespace().map_while(|number| number.parse().ok()).collect();
    let &[reads, _, sectors_read, _, writes, _, sectors_written, _, in_flight, busy_ms, ..] = &numbers[..]
    else {
        return None;
    };
    Some(Disk {
        name,
        exports,
        reads,
        read_bytes: sectors_read.saturating_mul(SECTOR_BYTES),
        writes,
        written_bytes: sectors_written.saturating_mul(SECTOR_BYTES),
        busy_ms,
        in_flight,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_counters_are_read() {
        let text =
            "     10        2      160       7      20      0     320     9      3      41      16  0 0 0 0";
        let disk = parse(text, "sda1".into(), vec!["a".into()]).unwrap();
        let expected = Disk {
            name: "sda1".into(),
            exports: vec!["a".into()],
            reads: 10,
            read_bytes: 160 * 512,
            writes: 20,
            written_bytes: 320 * 512,
            busy_ms: 41,
            in_flight: 3,
        };
        assert_eq!(disk, expected);
        assert_eq!(parse("1 2 3", "x".into(), Vec::new()), None);
        assert_eq!(disks_of([("a", (0, 1)), ("b", (0, 1))].into_iter()), []);
    }
}
