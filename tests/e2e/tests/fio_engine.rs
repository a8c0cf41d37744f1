//! What a user of fio expects of an engine beside reading and writing: layout, sizes, options, clear
//! refusals, and that no local file of the same name is ever touched.

mod fio;
#[path = "fio/layout.rs"]
mod layout;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use fio::{assert_same_bytes, engine, fio_local, fio_raio, said, seed, succeed};
use raio_e2e::{FuseCall, FuseFs, FuseOptions, PATIENCE, Server, binary, needs_root};
use rustix::process::Signal;
use tempfile::{TempDir, tempdir};

/// An export `/disk` in a directory of its own.
fn export() -> (TempDir, Server) {
    let directory = tempdir().expect("a directory");
    let server = Server::start(&[&format!("disk={},rw", directory.path().display())]);
    (directory, server)
}

#[test]
fn fio_lays_out_a_missing_file_for_a_read_job_as_it_does_locally() {
    let seed = seed();
    let (directory, server) = export();
    let local = directory.path().join("local");
    // 10,000 KiB is no multiple of the batches in which the layout is written, and 12 KiB none of either
    let job = [
        "--rw=randread".into(),
        "--bs=12k".into(),
        "--size=10000k".into(),
        "--iodepth=4".into(),
        format!("--randseed={seed}"),
    ];
    succeed(fio_raio(&server).args(&job).arg("--filename=/disk/remote"));
    succeed(fio_local().args(&job).arg(format!("--filename={}", local.display())));
    assert_same_bytes(&directory.path().join("remote"), &local, "layout");
}

#[test]
fn fio_creates_and_sizes_several_files_of_several_jobs() {
    let (directory, server) = export();
    succeed(fio_raio(&server).args([
        "--filename_format=/disk/$jobnum.$filenum",
        "--nrfiles=5",
        "--openfiles=2",
        "--numjobs=3",
        "--size=10m",
        "--bs=4k",
        "--rw=randrw",
        "--iodepth=16",
        "--verify=crc32c",
    ]));
    for job in 0..3 {
        for file in 0..5 {
            let name = directory.path().join(format!("{job}.{file}"));
            assert_eq!(fs::metadata(&name).expect("a file of the job").len(), 2 << 20, "{name:?}");
        }
    }
}

#[test]
fn fio_takes_an_escaped_colon_in_a_file_name() {
    let (directory, server) = export();
    succeed(fio_raio(&server).args(["--filename=/disk/a\\:b:/disk/c", "--size=128k", "--rw=write"]));
    assert_eq!(fs::metadata(directory.path().join("a:b")).expect("a:b").len(), 64 << 10);
    assert_eq!(fs::metadata(directory.path().join("c")).expect("c").len(), 64 << 10);
}

#[test]
fn fio_with_create_on_open_creates_without_laying_out() {
    let (directory, server) = export();
    succeed(fio_raio(&server).args([
        "--filename=/disk/file",
        "--size=1m",
        "--rw=write",
        "--create_on_open=1",
        "--number_ios=4",
        "--bs=4k",
    ]));
    assert_eq!(fs::metadata(directory.path().join("file")).expect("the file").len(), 4 * 4_096);
}

#[test]
fn fio_trims_punch_holes_into_files() {
    let (directory, server) = export();
    let file = directory.path().join("file");
    fs::write(&file, vec![0xa5; 8 << 20]).expect("a file");
    succeed(fio_raio(&server).args([
        "--filename=/disk/file",
        "--size=4m",
        "--rw=randtrim",
        "--bs=64k",
        "--iodepth=8",
        "--end_fsync=1",
    ]));
    let (trimmed, kept) = {
        let bytes = fs::read(&file).expect("the file");
        assert_eq!(bytes.len(), 8 << 20, "a trim does not change the size");
        (bytes[..4 << 20].iter().all(|&byte| byte == 0), bytes[4 << 20..].iter().all(|&byte| byte == 0xa5))
    };
    assert!(trimmed && kept);
    assert!(fs::metadata(&file).expect("the file").blocks() * 512 <= 5 << 20, "the space is given back");
}

#[test]
fn fio_syncs_of_every_kind_reach_the_server() {
    let (_directory, server) = export();
    succeed(fio_raio(&server).args([
        "--filename=/disk/file",
        "--size=2m",
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=8",
        "--fsync=16",
        "--fdatasync=12",
        "--sync_file_range=write:8",
        "--sync=1",
        "--verify=crc32c",
    ]));
}

#[test]
fn fio_touches_no_local_file_of_the_same_name() {
    // the export has the name of a directory here, so that each remote path is a local path as well
    let remote = tempdir().expect("a directory");
    let local = tempdir().expect("a directory");
    let name = local.path().file_name().expect("a name").to_str().expect("plain");
    let server = Server::start(&[&format!("tmp={},rw", remote.path().display())]);
    let inside = remote.path().join(name);
    fs::create_dir(&inside).expect("a directory");
    let path = format!("/tmp/{name}/file");
    if std::env::temp_dir() != std::path::Path::new("/tmp") {
        println!("TMPDIR is not /tmp: this run compares with a local path that does not exist");
    } else {
        fs::write(&path, b"mine").expect("a local file");
    }
    for rw in ["write", "randread", "randtrim"] {
        let job = ["--size=1m", "--bs=4k", "--iodepth=4", &format!("--rw={rw}")];
        succeed(fio_raio(&server).args(job).arg(format!("--filename={path}")));
        let output = fio_raio(&server).args(job).arg(format!("--filename={path}")).arg("--unlink=1").output();
        let output = output.expect("fio");
        assert!(!output.status.success());
        assert!(said(&output).contains("does not support unlink="), "{}", said(&output));
    }
    assert_eq!(fs::metadata(inside.join("file")).expect("the remote file").len(), 1 << 20);
    if std::env::temp_dir() == std::path::Path::new("/tmp") {
        assert_eq!(fs::read(&path).expect("the local file"), b"mine");
    }
}

#[test]
fn fio_jobs_that_cannot_work_are_refused_with_a_sentence() {
    let (_directory, server) = export();
    let plain = ["--filename=/disk/file", "--size=4m", "--bs=4k", "--rw=write"];
    let refusals: &[(&[&str], &str)] = &[
        (&["--pre_read=1"], "does not support pre_read="),
        (&["--fsync_on_close=1"], "Use end_fsync=1"),
        (&["--fill_device=1"], "Give size="),
        (&["--filename=relative"], "Give filename=/EXPORT/path"),
        (&["--raio_url=raio://127.0.0.1:1"], "raio://127.0.0.1:1"),
        (&["--raio_url=nonsense"], "nonsense"),
        (&["--filename=/nowhere/file"], "nowhere"),
        (&["--filename=/disk/../file"], "/disk/../file"),
    ];
    for (options, sentence) in refusals {
        let output = fio_raio(&server).args(plain).args(*options).output().expect("fio");
        assert!(!output.status.success(), "{options:?} is rejected");
        assert!(said(&output).contains(sentence), "{options:?}: expected {sentence:?} in\n{}", said(&output));
    }
    let output = Command::new("fio")
        .args(["--name=job", &format!("--ioengine=external:{}", engine().display())])
        .args(plain)
        .output()
        .expect("fio");
    assert!(!output.status.success());
    assert!(said(&output).contains("Give raio_url=raio://HOST:PORT"), "{}", said(&output));
}

#[test]
fn fio_reads_a_read_only_export_and_does_not_write_it() {
    let directory = tempdir().expect("a directory");
    fs::write(directory.path().join("file"), vec![7; 1 << 20]).expect("a file");
    let server = Server::start(&[&format!("disk={}", directory.path().display())]);
    succeed(fio_raio(&server).args(["--filename=/disk/file", "--rw=randread", "--bs=4k", "--iodepth=8"]));
    for job in [["--filename=/disk/file", "--rw=write"], ["--filename=/disk/missing", "--rw=read"]] {
        let output = fio_raio(&server).args(job).arg("--size=1m").output().expect("fio");
        assert!(!output.status.success());
        assert!(said(&output).contains("Read-only file system"), "{}", said(&output));
    }
}

#[test]
fn fio_ends_with_an_error_when_its_server_dies() {
    let (_directory, mut server) = export();
    let mut fio = fio_raio(&server);
    fio.args([
        "--filename=/disk/file",
        "--size=4m",
        "--rw=randread",
        "--bs=4k",
        "--iodepth=64",
        "--numjobs=2",
    ]);
    fio.args(["--time_based", "--runtime=60", "--raio_reconnect=0"]);
    let fio =
        fio.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().expect("fio");
    // Both jobs have laid out the file by then.
    server.statistics_when(|statistics| statistics["read_bytes"].as_u64() > Some(4 << 20));
    server.kill();
    let output = fio.wait_with_output().expect("fio");
    assert!(!output.status.success());
    let said = said(&output);
    assert!(said.contains("io_u error on file /disk/file"), "{said}");
}

#[test]
fn fio_memory_of_another_kind_is_rejected_with_a_sentence() {
    let (directory, server) = export();
    fs::write(directory.path().join("file"), vec![7; 64 << 10]).expect("a file");
    let kinds = ["malloc", "shm", "shmhuge", "mmap", "mmaphuge", "mmapshared", "mmap:/dev/zero"];
    let options = kinds.map(|kind| (format!("--mem={kind}"), "--rw=write"));
    for (option, rw) in options.into_iter().chain([("--iomem=malloc".to_owned(), "--rw=read")]) {
        let job = ["--filename=/disk/file", "--size=64k", rw, &option];
        let output = fio_raio(&server).args(job).output().expect("fio");
        let said = said(&output);
        assert!(output.status.code().is_some_and(|code| code != 0), "{option}: {said}");
        assert!(said.contains("does not support mem="), "{option}: {said}");
        assert!(!said.contains("got signal"), "{option}: {said}");
    }
}

#[test]
fn fio_without_memory_for_its_buffers_ends_with_a_sentence() {
    let (_directory, server) = export();
    let job = fio_raio(&server);
    let mut fio = Command::new("prlimit");
    fio.args(["--as=4294967296", "fio"]).args(job.get_args());
    fio.args(["--filename=/disk/file", "--size=1m", "--rw=write", "--bs=1m", "--iodepth=16384"]);
    let said = said(&fio.output().expect("prlimit"));
    assert!(said.contains("no memory for the I/O buffers"), "{said}");
    assert!(!said.contains("got signal"), "{said}");
}

#[test]
fn fio_asks_a_server_that_hangs_nothing_more() {
    const TIMEOUT: Duration = Duration::from_secs(1);
    let (_directory, mut server) = export();
    let mut fio = fio_raio(&server);
    fio.args(["--filename=/disk/a:/disk/b", "--size=1m", "--rw=randread", "--bs=4k", "--iodepth=8"]);
    fio.args(["--time_based", "--runtime=600", "--raio_reconnect=0"]);
    fio.arg(format!("--raio_request_timeout_ms={}", TIMEOUT.as_millis()));
    let fio = fio.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("fio");
    // the job has laid out its files by then
    server.statistics_when(|statistics| statistics["read_bytes"].as_u64() > Some(4 << 20));
    server.signal(Signal::STOP);
    let started = Instant::now();
    let output = fio.wait_with_output().expect("fio");
    let waited = started.elapsed();
    server.signal(Signal::CONT);
    let said = said(&output);
    assert!(!output.status.success(), "{said}");
    assert!(waited < 10 * TIMEOUT, "{waited:?} until the job ended:\n{said}");
    // Whatever else it had asked, an open or a close, would have waited for another timeout and been
    // reported.
    assert!(said.contains("io_u error on file /disk/"), "{said}");
    assert!(!said.contains("raio: /disk/"), "{said}");
}

#[test]
fn fio_reports_what_closing_a_file_came_to() {
    let files: &[(&str, &[u8])] = &[("file", &[7; 64 << 10])];
    let Some(disk) = FuseFs::mount("an error of close", FuseOptions::default(), files) else { return };
    let server = Server::start(&[&format!("disk={},rw", disk.path().display())]);
    disk.fail(FuseCall::Flush, libc::EDQUOT);
    let output =
        fio_raio(&server).args(["--filename=/disk/file", "--rw=write", "--bs=4k"]).output().expect("fio");
    let said = said(&output);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("raio: /disk/file: ") && said.contains("Disk quota exceeded"), "{said}");
}

#[test]
fn fio_says_of_each_failed_io_why_it_failed() {
    let files: &[(&str, &[u8])] = &[("file", &[7; 1 << 20])];
    let Some(disk) = FuseFs::mount("reads and writes that fail", FuseOptions::default(), files) else {
        return;
    };
    let server = Server::start(&[&format!("disk={},rw", disk.path().display())]);
    disk.fail(FuseCall::Read, libc::EIO);
    disk.fail(FuseCall::Write, libc::ENOSPC);
    let mut fio = fio_raio(&server);
    fio.args(["--filename=/disk/file", "--rw=randrw", "--bs=4k", "--iodepth=64", "--io_size=1m"]);
    let output = fio.arg("--iodepth_batch_complete_min=16").output().expect("fio");
    let said = said(&output);
    let lines: Vec<_> = said.lines().collect();
    let (mut reads, mut writes) = (0, 0);
    for pair in lines.windows(2).filter(|pair| pair[0].contains("io_u error on file /disk/file")) {
        let expected = if pair[0].contains(": read offset") {
            reads += 1;
            "Reading failed on the server: Input/output error"
        } else {
            writes += 1;
            "Writing failed on the server: No space left on device"
        };
        assert!(pair[1].contains(expected), "{}\n{}", pair[0], pair[1]);
    }
    assert!(reads > 4 && writes > 4, "{said}");
}

#[test]
fn fio_ends_at_a_signal_while_the_storage_hangs_in_layout() {
    let Some(disk) = FuseFs::mount("storage that hangs", FuseOptions::default(), &[("old", b"old")]) else {
        return;
    };
    let server = Server::start(&[&format!("disk={},rw", disk.path().display())]);
    let forks = server.url().replace("raio+tcp://", "raio://");
    // over TCP fio's own process lays out, else a child of it
    let read: &[&str] = &["--filename=/disk/new", "--rw=read"];
    let append: &[&str] = &["--filename=/disk/old", "--rw=write", "--file_append=1"];
    for (call, job, url) in [
        (FuseCall::Write, read, server.url()),
        (FuseCall::Fsync, read, server.url()),
        (FuseCall::Fallocate, append, server.url()),
        (FuseCall::Write, read, forks.clone()),
        (FuseCall::Lookup, read, forks),
    ] {
        disk.hang(call);
        let mut fio = fio_raio(&server);
        fio.args(job).args(["--size=1m", "--bs=64k", "--create_fsync=1"]).arg(format!("--raio_url={url}"));
        let mut fio = fio.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("fio");
        disk.wait_for_hanging(call, 1);
        let pid = rustix::process::Pid::from_child(&fio);
        rustix::process::kill_process(pid, Signal::TERM).expect("a signal");
        let started = Instant::now();
        let is_over = loop {
            if fio.try_wait().expect("fio").is_some() {
                break true;
            }
            if started.elapsed() > PATIENCE {
                break false;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        // Before anything else, or the file system could not be unmounted.
        disk.mend(call);
        if !is_over {
            let _ = fio.kill();
            let _ = fio.wait();
        }
        assert!(is_over, "{call:?} {url}: fio went on for {:?}", started.elapsed());
        let _ = fs::remove_file(disk.file("new"));
    }
}

#[test]
#[ignore = "long"]
fn fio_examples_run_as_they_are_written() {
    if !needs_root("a network namespace for the examples' port") {
        return;
    }
    let directory = tempdir().expect("a directory");
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let built = root.join("target/release/libraio_fio.so");
    assert!(built.exists(), "The examples load {}. Run scripts/build-fio-engine.", built.display());
    let mut server = Command::new("unshare");
    server.args(["--net", "sh", "-c", "ip link set lo up && exec \"$@\"", "sh"]);
    server.arg(binary("raio_server")).args(["--workers", "4", "--export"]);
    let server = Server::spawn({
        server.arg(format!("demo={},rw", directory.path().display()));
        server
    });
    let mut running = Vec::new();
    for entry in fs::read_dir(root.join("fio-engine/examples")).expect("the examples") {
        let path = entry.expect("an example").path();
        let text = fs::read_to_string(&path).expect("an example");
        let line =
            text.lines().find_map(|line| line.strip_prefix("#   ").filter(|it| it.starts_with("fio ")));
        let line = line.unwrap_or_else(|| panic!("{} does not say how to run it", path.display()));
        let mut shell = Command::new("nsenter");
        shell.args(["--net", "--target", &server.pid().to_string(), "sh", "-c", line]).current_dir(&root);
        let shell = shell.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("nsenter");
        running.push((line.to_owned(), shell));
    }
    assert!(!running.is_empty());
    for (line, fio) in running {
        let output = fio.wait_with_output().expect("fio");
        assert!(output.status.success(), "{line}: {}", said(&output));
    }
}

#[test]
fn fio_of_another_version_is_refused_by_the_engine() {
    let scratch = tempdir().expect("a directory");
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let headers = succeed(&mut Command::new(root.join("scripts/fio-headers")));
    let headers = String::from_utf8_lossy(&headers.stdout).trim().to_owned();
    // the engine as built for another fio; unresolved libraio functions do not matter as long as nobody calls
    // them
    let glue = scratch.path().join("glue.c");
    fs::write(
        &glue,
        "void *raio_fio_ioengine(void);\nvoid get_ioengine(void **ops) { *ops = raio_fio_ioengine(); }\n",
    )
    .expect("a source file");
    let engine = scratch.path().join("engine.so");
    succeed(
        Command::new("cc")
            .args([
                "-std=gnu99",
                "-shared",
                "-fPIC",
                "-D_GNU_SOURCE",
                "-DRAIO_FIO_VERSION=\"fio-0.1\"",
                "-isystem",
            ])
            .args([&headers, "-include", &format!("{headers}/config-host.h"), "-I"])
            .arg(root.join("libraio/include"))
            .args([&root.join("fio-engine/engine.c"), &glue])
            .arg("-o")
            .arg(&engine),
    );
    let output = Command::new("fio")
        .args(["--name=job", &format!("--ioengine=external:{}", engine.display())])
        .args(["--size=1m", "--filename=/disk/file", "--raio_url=raio://127.0.0.1"])
        .output()
        .expect("fio");
    assert!(!output.status.success());
    let said = said(&output);
    assert!(said.contains("was built for fio-0.1, but this is fio-"), "{said}");
    assert!(said.contains("Rebuild it with scripts/build-fio-engine"), "{said}");
}
