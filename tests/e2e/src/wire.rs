//! The wire of `scripts/rdma-vm`: two RDMA devices, rxe0 (10.77.0.1 on v0) and rxe1 (10.77.0.2 on v1), one at
//! each end. A machine that has none skips, aloud.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::device::run;
use crate::server::PATIENCE;

/// A server at one end. Whoever connects there comes from the other end.
pub const LISTEN: &str = "rdma://10.77.0.1:0";

/// A server for clients by TCP beside that.
pub const TCP: &str = "tcp://127.0.0.1:0";
/// The length of [`numbers`].
pub const NUMBERS_BYTES: u64 = 32 << 20;

/// A directory with a file `numbers`, whose 64-bit words are their own number, and the way to export it as
/// /d.
pub fn numbers() -> (TempDir, String) {
    let directory = tempfile::tempdir().expect("a directory");
    let bytes: Vec<u8> = (0..NUMBERS_BYTES / 8).flat_map(u64::to_le_bytes).collect();
    std::fs::write(directory.path().join("numbers"), bytes).expect("a file");
    let export = format!("d={},rw", directory.path().display());
    (directory, export)
}

/// One test at a time has the wire.
static WIRE: Mutex<()> = Mutex::new(());

/// The wire for the time of a test. Where there is none, says that `what` is skipped. It does not open the
/// devices: a process that has one open keeps it from being removed.
pub fn needs_wire(what: &str) -> Option<MutexGuard<'static, ()>> {
    if ["rxe0", "rxe1"].iter().all(|name| Path::new("/sys/class/infiniband").join(name).exists()) {
        let wire = WIRE.lock().unwrap_or_else(PoisonError::into_inner);
        prepare();
        return Some(wire);
    }
    eprintln!("SKIPPED: {what} needs two RDMA devices on a wire. Run the tests with scripts/rdma-vm.");
    None
}

const ENDS: [&str; 2] = ["v0", "v1"];

fn tc(arguments: &str) {
    run("tc", &arguments.split_whitespace().collect::<Vec<_>>());
}

/// Gives each end three bands before anything is sent: the first sends, the second loses all, and the third
/// does as [`Shaped`] says. All is for the first until a filter says otherwise. Filters come and go without
/// harm; while the queueing discipline itself is exchanged, sending fails, and Soft-RoCE then ends the queue
/// pair that sends for good, even the kernel's own, through which connections are made.
fn prepare() {
    for end in ENDS {
        tc(&format!(
            "qdisc replace dev {end} root handle 1: prio bands 3 priomap 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0"
        ));
        tc(&format!("qdisc replace dev {end} parent 1:2 handle 2: netem loss 100%"));
    }
}

/// Has a band have the packets that match, in both directions.
fn redirect(band: u8, packets: &str) {
    for end in ENDS {
        tc(&format!("filter add dev {end} parent 1: protocol ip prio 1 u32 match {packets} flowid 1:{band}"));
    }
}

/// Both directions of the wire carry all that is sent, again.
fn restore() {
    for end in ENDS {
        let _ = Command::new("tc").args(["filter", "del", "dev", end, "parent", "1:"]).status();
    }
}

/// Both directions of the wire lose or delay packets, as tc-netem(8) says, until this is dropped.
pub struct Shaped(());

impl Shaped {
    /// By these arguments of netem.
    pub fn new(netem: &str) -> Self {
        let this = Self(());
        for end in ENDS {
            tc(&format!("qdisc replace dev {end} parent 1:3 handle 3: netem {netem}"));
        }
        redirect(3, "u32 0 0");
        this
    }
}

impl Drop for Shaped {
    fn drop(&mut self) {
        restore();
    }
}

/// The wire carries nothing, or nothing of one kind, until this is dropped.
pub struct Silenced(());

impl Silenced {
    /// Nothing.
    pub fn new() -> Self {
        Self::of("u32 0 0")
    }

    /// Nothing of RoCE v2; TCP as before.
    pub fn without_rdma() -> Self {
        Self::of("ip dport 4791 0xffff")
    }

    /// Loses what matches.
    fn of(packets: &str) -> Self {
        let this = Self(());
        redirect(2, packets);
        this
    }
}

impl Default for Silenced {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Silenced {
    fn drop(&mut self) {
        restore();
    }
}

/// The wire is cut at 10.77.0.1's end, until this is dropped.
pub struct Cut(());

impl Cut {
    /// Takes the link down.
    pub fn new() -> Self {
        let this = Self(());
        run("ip", &["link", "set", "v0", "down"]);
        this
    }
}

impl Default for Cut {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        let ip = |arguments: &str| Command::new("ip").args(arguments.split_whitespace()).status();
        let _ = ip("link set v0 up");
        // The route went with the link.
        let _ = ip("route replace 10.77.0.2 dev v0 src 10.77.0.1 table 101");
    }
}

/// Makes the devices anew; a process that has them open keeps this waiting. Soft-RoCE needs it after a link
/// was down: the queue pair through which connections are made does not survive that there was no route.
pub fn replug() {
    for (device, end, gid) in [("rxe0", "v0", "0a4d:0001"), ("rxe1", "v1", "0a4d:0002")] {
        let _ = Command::new("rdma").args(["link", "delete", device]).status();
        run("rdma", &["link", "add", device, "type", "rxe", "netdev", end]);
        // The address becomes a GID a little later.
        let deadline = Instant::now() + PATIENCE;
        let path = format!("/sys/class/infiniband/{device}/ports/1/gids/1");
        while !std::fs::read_to_string(&path).is_ok_and(|text| text.trim().ends_with(gid)) {
            assert!(Instant::now() < deadline, "{device} gets no GID");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Makes the devices anew when it is dropped, so that a test that fails leaves them to those after it. To be
/// made before what uses them.
pub struct Replug;

impl Drop for Replug {
    fn drop(&mut self) {
        replug();
    }
}

/// How many there are of everything that the kernel keeps for users of the devices: "rxe0 qp" and so on.
pub fn resources() -> BTreeMap<String, u64> {
    let text = run("rdma", &["-j", "resource", "show"]);
    let devices: Vec<Value> =
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text:?}"));
    let mut counts = BTreeMap::new();
    for device in &devices {
        let name = device["ifname"].as_str().expect("a device has a name");
        for kind in ["pd", "cq", "qp", "cm_id", "mr", "ctx"] {
            let count = device[kind].as_u64().unwrap_or_else(|| panic!("no count of {kind} in {device}"));
            counts.insert(format!("{name} {kind}"), count);
        }
    }
    assert_eq!(counts.len(), 12, "rxe0 and rxe1: {text}");
    counts
}

/// Waits until the kernel keeps as much as it did then: what a killed process had goes a little after it.
pub fn resources_return_to(before: &BTreeMap<String, u64>) {
    let deadline = Instant::now() + PATIENCE;
    while resources() != *before {
        assert!(Instant::now() < deadline, "there were {before:?}, and there are {:?}", resources());
        std::thread::sleep(Duration::from_millis(50));
    }
}
