//! fio writes through raio and reads back with verify=crc32c; then the server's file is compared byte by byte
//! with the file of the same job run locally.
//!
//! fio puts a time stamp into each verify header, taken from the latency clock: gtod_reduce=1 turns that
//! clock off, and everything else that a job writes follows from its seed. No job writes a block twice (fio's
//! random map), so the order in which a deep queue completes does not show either.

mod fio;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use fio::{assert_same_bytes, fio_local, fio_raio, said, seed, succeed};
use raio_e2e::{LISTEN, LoopDevice, Server, Shaped, needs_root, needs_wire};

const MIB: u64 = 1 << 20;
const FILE_BYTES: u64 = 24 * MIB;

/// 512 B to 1 MiB, and odd numbers of sectors between.
const SIZES: &str = "--bssplit=512/20:3k/15:4k/25:13k/10:64k/10:300k/15:1m/5";

/// On a wire that loses packets: reads, and writes that are sent inline. Soft-RoCE (Linux 6.12) breaks the
/// queue pair when two packets of what an RDMA READ brings are lost within a round trip (the warning in
/// rxe_comp.c), and gives a WRITE up that loses seven between two acknowledgements: one run in eight failed
/// with writes of 300 KiB, one in seventy with reads of 1 MiB, and none of sixty with these.
const LOSSY_SIZES: &str = "--bssplit=512/20:3k/20:4k/30:13k/20:64k/10,512/30:3k/30:4k/40";

struct Job {
    depth: u32,
    jobs: u32,
    direct: bool,
    /// in threads of one process, or in processes
    thread: bool,
    extra: &'static [&'static str],
}

const JOBS: &[Job] = &[
    Job { depth: 1, jobs: 1, direct: false, thread: false, extra: &["--rw=randwrite"] },
    Job { depth: 128, jobs: 1, direct: false, thread: false, extra: &["--rw=randwrite"] },
    Job { depth: 32, jobs: 3, direct: false, thread: true, extra: &["--rw=randwrite", "--fdatasync=40"] },
    Job { depth: 16, jobs: 2, direct: false, thread: false, extra: &["--rw=randrw", "--rwmixread=30"] },
    Job {
        depth: 1,
        jobs: 1,
        direct: true,
        thread: false,
        extra: &["--rw=randwrite", "--sync=dsync", "--io_size=4m"],
    },
    Job { depth: 128, jobs: 2, direct: true, thread: true, extra: &["--rw=randwrite"] },
    Job {
        depth: 64,
        jobs: 3,
        direct: true,
        thread: false,
        extra: &[
            "--rw=write",
            "--iodepth_batch_submit=16",
            "--iodepth_batch_complete_min=8",
            "--iodepth_batch_complete_max=32",
        ],
    },
    Job { depth: 8, jobs: 1, direct: false, thread: false, extra: &["--rw=trimwrite"] },
];

impl Job {
    /// Each of the jobs has its own part of one file.
    fn give(&self, fio: &mut Command, seed: u64) {
        fio.args(["--verify=crc32c", "--verify_fatal=1", "--gtod_reduce=1", "--end_fsync=1", SIZES]);
        fio.args(self.extra);
        fio.arg(format!("--randseed={seed}"));
        fio.arg(format!("--size={FILE_BYTES}")).arg(format!("--offset_increment={FILE_BYTES}"));
        fio.arg(format!("--iodepth={}", self.depth)).arg(format!("--numjobs={}", self.jobs));
        fio.arg(format!("--direct={}", u8::from(self.direct)));
        if self.thread {
            fio.arg("--thread");
        }
    }

    fn describe(&self) -> String {
        let how = if self.direct { "O_DIRECT" } else { "buffered" };
        let who = if self.thread { "threads" } else { "processes" };
        format!("{} {who}, depth {}, {how}, {:?}", self.jobs, self.depth, self.extra)
    }

    /// Whether the same job leaves the same bytes each time. Where a write has to wait for a trim in flight,
    /// fio makes its contents anew, and how often that happens is a matter of time.
    fn is_repeatable(&self) -> bool {
        !self.extra.iter().any(|option| option.contains("trim"))
    }
}

fn file_system_matches(kind: &str, server_arguments: &[&str]) {
    if !needs_root("fio on loop devices") {
        return;
    }
    let seed = seed();
    let mount = LoopDevice::new(512 * MIB).mount(kind);
    let server = Server::start_with(&[&format!("disk={},rw", mount.path().display())], server_arguments);
    let (remote, local) = (mount.path().join("remote"), mount.path().join("local"));
    for (job, seed) in JOBS.iter().zip(seed..) {
        let why = format!("{kind}, seed {seed}: {}", job.describe());
        println!("{why}");
        let mut fio = fio_raio(&server);
        job.give(&mut fio, seed);
        succeed(fio.arg("--filename=/disk/remote"));
        if job.is_repeatable() {
            let mut fio = fio_local();
            job.give(&mut fio, seed);
            succeed(fio.arg(format!("--filename={}", local.display())));
            assert_same_bytes(&remote, &local, &why);
            std::fs::remove_file(&local).expect("the local file");
        }
        std::fs::remove_file(&remote).expect("the file that fio made on the server");
    }
}

#[test]
fn fio_jobs_verify_on_ext4_and_leave_the_bytes_that_they_leave_locally() {
    file_system_matches("ext4", &[]);
}

#[test]
fn fio_jobs_verify_on_xfs_and_leave_the_bytes_that_they_leave_locally() {
    file_system_matches("xfs", &[]);
}

#[test]
fn fio_jobs_verify_with_a_server_that_has_no_io_uring() {
    file_system_matches("ext4", &["--backend", "threads"]);
}

#[test]
fn fio_jobs_verify_on_a_block_device_and_leave_the_bytes_that_they_leave_locally() {
    if !needs_root("fio on loop devices") {
        return;
    }
    let seed = seed();
    for (job, seed) in JOBS.iter().zip(seed..) {
        let why = format!("block device, seed {seed}: {}", job.describe());
        println!("{why}");
        // new ones each time: what a job does not write is zero on both
        let (remote, local) = (LoopDevice::new(80 * MIB), LoopDevice::new(80 * MIB));
        let server = Server::start(&[&format!("disk={},rw", remote.path().display())]);
        let mut fio = fio_raio(&server);
        job.give(&mut fio, seed);
        succeed(fio.arg("--filename=/disk"));
        if job.is_repeatable() {
            let mut fio = fio_local();
            job.give(&mut fio, seed);
            succeed(fio.arg(format!("--filename={}", local.path().display())));
            assert_same_bytes(remote.path(), local.path(), &why);
        }
    }
}

#[test]
fn fio_trims_on_a_block_device_leave_the_bytes_that_they_leave_locally() {
    if !needs_root("fio on loop devices") {
        return;
    }
    let seed = seed();
    let (remote, local) = (LoopDevice::new(80 * MIB), LoopDevice::new(80 * MIB));
    let server = Server::start(&[&format!("disk={},rw", remote.path().display())]);
    let fill: &[&str] = &["--rw=write", "--bs=1m", "--size=80m", "--verify=crc32c", "--gtod_reduce=1"];
    let trim: &[&str] = &["--rw=randtrim", "--bs=64k", "--io_size=30m"];
    for job in [fill, trim] {
        let common = ["--iodepth=8", "--end_fsync=1", &format!("--randseed={seed}")];
        succeed(fio_raio(&server).args(job).args(common).arg("--filename=/disk"));
        let filename = format!("--filename={}", local.path().display());
        succeed(fio_local().args(job).args(common).arg(filename));
        assert_same_bytes(remote.path(), local.path(), &format!("{job:?}"));
    }
    let bytes = std::fs::read(remote.path()).expect("the device");
    let zero = bytes.chunks(64 << 10).filter(|block| block.iter().all(|&byte| byte == 0)).count();
    assert_eq!(zero, 30 * 16, "as many blocks are zero as were trimmed");
}

#[test]
fn fio_verifies_blocks_that_are_larger_than_a_request() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = Server::start_with(
        &[&format!("disk={},rw", directory.path().display())],
        &["--io-max", "1M", "--memory", "64M"],
    );
    for rw in ["write", "randrw"] {
        let mut fio = fio_raio(&server);
        fio.args(["--filename=/disk/file", "--size=64m", "--bs=4m", "--iodepth=4", "--verify=crc32c"]);
        succeed(fio.args([&format!("--rw={rw}"), "--verify_fatal=1"]));
    }
}

#[test]
fn fio_jobs_verify_over_a_wire_that_loses_and_delays_packets() {
    let Some(_wire) = needs_wire("a bad wire") else { return };
    let seed = seed();
    let directory = tempfile::tempdir().expect("a directory");
    let server =
        Server::start_with(&[&format!("disk={},rw", directory.path().display())], &["--listen", LISTEN]);
    // No jitter: netem would make of it a wire that reorders packets, which Ethernet does not do.
    for netem in ["loss 1%", "loss 1% delay 2ms"] {
        let _shaped = Shaped::new(netem);
        println!("{netem}");
        let mut fio = fio_raio(&server);
        fio.args([
            "--filename=/disk/file",
            "--size=8m",
            "--rw=randrw",
            LOSSY_SIZES,
            "--iodepth=32",
            "--numjobs=2",
        ]);
        fio.args([
            "--offset_increment=8m",
            "--verify=crc32c",
            "--verify_fatal=1",
            &format!("--randseed={seed}"),
        ]);
        succeed(&mut fio);
    }
}

#[test]
fn fio_verification_reads_the_server_and_notices_one_wrong_byte() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = Server::start(&[&format!("disk={},rw", directory.path().display())]);
    let run = |verify_only: bool| {
        let mut fio = fio_raio(&server);
        fio.args([
            "--filename=/disk/file",
            "--size=4m",
            "--bs=4k",
            "--rw=write",
            "--iodepth=8",
            "--verify=crc32c",
        ]);
        if verify_only {
            fio.arg("--verify_only=1");
        }
        fio.output().expect("fio")
    };
    assert!(run(false).status.success());
    assert!(run(true).status.success(), "what was written verifies");

    flip_one_byte(&directory.path().join("file"), 2 * MIB + 1_000);
    let output = run(true);
    assert!(!output.status.success(), "a wrong byte on the server must fail verification");
    assert!(said(&output).contains("crc32c: verify failed"), "{}", said(&output));
}

fn flip_one_byte(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).expect("the server's file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("a byte");
    file.write_all_at(&[byte[0] ^ 1], offset).expect("a byte");
}
