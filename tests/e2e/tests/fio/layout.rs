//! What a job leaves in its files is what the same job of fio's own psync engine leaves: layout, which makes
//! a file as large as the job needs it, neither destroys bytes that psync keeps nor gives a file another
//! size.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use raio_e2e::{FuseCall, FuseFs, FuseOptions, Server, needs_root};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::{TempDir, tempdir};

use crate::fio::{engine, fio, fio_raio, said, succeed};

const FILE_BYTES: usize = 256 << 10;

/// Jobs that read, write or append, of few I/Os, so that what layout did remains visible.
const RW: &[&str] = &["write", "randwrite", "read", "randrw", "randtrim", "trimwrite"];
const FALLOCATE: &[&str] = &["none", "native", "posix", "keep", "truncate"];
const SIZES: &[&str] = &[
    "size=64k",
    "size=512k",
    "filesize=64k-128k",
    "filesize=300k-600k",
    "filesize=100k-1m",
    "filesize=512k\nsize=64k",
    "size=50%\nfilesize=512k",
    "offset=128k\nsize=256k",
];
const EITHER: &[bool] = &[false, true];

/// One job, and whether its file exists before.
struct Job {
    options: String,
    exists: bool,
}

#[derive(Clone, Copy)]
struct Matrix {
    fallocate: &'static [&'static str],
    sizes: &'static [&'static str],
    /// overwrite and create_on_open
    either: &'static [bool],
    exists: &'static [bool],
}

impl Matrix {
    fn jobs(self) -> Vec<Job> {
        let mut jobs = Vec::new();
        let flag = u8::from;
        for rw in RW {
            for fallocate in self.fallocate {
                for size in self.sizes {
                    for &append in EITHER {
                        for &overwrite in self.either {
                            for &on_open in self.either {
                                for &exists in self.exists {
                                    let mut options = format!(
                                        "rw={rw}\nfallocate={fallocate}\n\
                                         {size}\nfile_append={}\noverwrite={}\n\
                                         create_on_open={}\n",
                                        flag(append),
                                        flag(overwrite),
                                        flag(on_open)
                                    );
                                    // psync cannot trim a regular file: there the layout alone is compared
                                    let last =
                                        if rw.contains("trim") { "create_only=1" } else { "number_ios=3" };
                                    options.push_str(last);
                                    // A read at the end of a file ends the job of a synchronous engine only:
                                    // here none is made of a file that was not laid out.
                                    if *rw == "randrw" && on_open {
                                        options.push_str("\nrwmixread=0");
                                    }
                                    jobs.push(Job { options, exists });
                                }
                            }
                        }
                    }
                }
            }
        }
        jobs
    }
}

fn old_bytes() -> Vec<u8> {
    (0..FILE_BYTES).map(|at| u8::try_from(at / 7 % 251 + 1).expect("at most 251")).collect()
}

/// Runs the jobs in one fio, each on a file of its own named after its number.
fn run(jobs: &[Job], engine: &str, names: &str, directory: &Path, scratch: &Path) {
    // without scrambling, which puts the time into what is written, all follows from the seed
    let mut text = format!("[global]\n{engine}\nbs=4k\nscramble_buffers=0\n");
    for (number, job) in jobs.iter().enumerate() {
        write!(text, "[{number}]\nfilename={names}/{number}\n{}\n", job.options).expect("a string grows");
        if job.exists {
            fs::write(directory.join(number.to_string()), old_bytes()).expect("a file");
        }
    }
    let file = scratch.join("jobs.fio");
    fs::write(&file, text).expect("a job file");
    // Some of these jobs are ones that fio itself rejects, so its status says nothing; the files do.
    let output = fio().arg("--minimal").arg(&file).output().expect("fio");
    let said = said(&output);
    assert!(!said.contains("got signal"), "{said}");
}

/// What differs in the files of two runs, a line for each job.
fn differences(jobs: &[Job], ours: &Path, theirs: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    for (number, job) in jobs.iter().enumerate() {
        let ours = fs::read(ours.join(number.to_string())).ok();
        let theirs = fs::read(theirs.join(number.to_string())).ok();
        if ours == theirs {
            continue;
        }
        let describe = |bytes: &Option<Vec<u8>>| match bytes {
            None => "no file".to_owned(),
            Some(bytes) => format!("{} bytes", bytes.len()),
        };
        let at = match (&ours, &theirs) {
            (Some(ours), Some(theirs)) => ours.iter().zip(theirs).position(|(one, other)| one != other),
            _ => None,
        };
        lines.push(format!(
            "{} {}: raio {}, psync {}, first difference at {at:?}",
            job.options.replace('\n', " "),
            if job.exists { "existing" } else { "missing" },
            describe(&ours),
            describe(&theirs)
        ));
    }
    lines
}

/// Runs the jobs, many at a time, with both engines, in directories beneath these two. Returns what differs.
fn compare_with_psync(jobs: &[Job], ours: &Path, theirs: &Path) -> Vec<String> {
    let server = Server::start(&[&format!("disk={},rw", ours.display())]);
    let mut lines = Vec::new();
    // Two connections each: where RDMA is emulated a hundred jobs have not connected before the first of them
    // gives up.
    let at_a_time = if server.url().starts_with("raio+rdma") { 10 } else { 100 };
    for (number, jobs) in jobs.chunks(at_a_time).enumerate() {
        let scratch = tempdir().expect("a directory");
        let name = number.to_string();
        let (ours, theirs) = (ours.join(&name), theirs.join(&name));
        fs::create_dir(&theirs).expect("a directory");
        fs::create_dir(&ours).expect("a directory");
        let local = theirs.display().to_string();
        run(jobs, "ioengine=psync", &local, &theirs, scratch.path());
        let raio = format!("ioengine=external:{}\nraio_url={}", engine().display(), server.url());
        run(jobs, &raio, &format!("/disk/{number}"), &ours, scratch.path());
        lines.extend(differences(jobs, &ours, &theirs));
        fs::remove_dir_all(ours).expect("the directory");
        fs::remove_dir_all(theirs).expect("the directory");
    }
    lines
}

fn leaves_what_psync_leaves(jobs: &[Job]) {
    let (ours, theirs) = (tempdir().expect("a directory"), tempdir().expect("a directory"));
    let lines = compare_with_psync(jobs, ours.path(), theirs.path());
    assert!(lines.is_empty(), "{} of {} differ:\n{}", lines.len(), jobs.len(), lines.join("\n"));
}

#[test]
fn fio_layout_keeps_what_psync_keeps_in_the_commonest_jobs() {
    let matrix = Matrix {
        fallocate: &["none", "native", "keep"],
        sizes: &["size=64k", "size=512k", "filesize=300k-600k"],
        either: &[false],
        exists: &[true],
    };
    leaves_what_psync_leaves(&matrix.jobs());
}

#[test]
#[ignore = "long"]
fn fio_layout_keeps_what_psync_keeps_in_every_job() {
    let matrix = Matrix { fallocate: FALLOCATE, sizes: SIZES, either: EITHER, exists: EITHER };
    leaves_what_psync_leaves(&matrix.jobs());
}

#[test]
fn fio_trims_of_a_job_larger_than_its_file_change_only_what_they_trim() {
    let directory = tempdir().expect("a directory");
    let server = Server::start(&[&format!("disk={},rw", directory.path().display())]);
    let file = directory.path().join("file");
    for fallocate in FALLOCATE {
        fs::write(&file, old_bytes()).expect("a file");
        let fallocate_option = format!("--fallocate={fallocate}");
        succeed(fio_raio(&server).args([
            "--filename=/disk/file",
            "--rw=randtrim",
            "--number_ios=1",
            "--size=512k",
            "--bs=4k",
            &fallocate_option,
        ]));
        let bytes = fs::read(&file).expect("the file");
        let old = old_bytes();
        let grows = !["none", "keep"].contains(fallocate);
        assert_eq!(bytes.len(), if grows { 2 * FILE_BYTES } else { FILE_BYTES }, "{fallocate}");
        let changed = old.iter().zip(&bytes).filter(|(old, new)| old != new).count();
        assert!(changed == 0 || changed == 4_096, "{fallocate}: {changed} bytes of the file changed");
        assert!(bytes[FILE_BYTES..].iter().all(|&byte| byte == 0), "{fallocate}");
    }
}

/// One job with either engine on a file in `directory`, which is the server's export too. Whether it
/// succeeded, and what was said.
fn one_job(server: Option<&Server>, directory: &Path, options: &[&str]) -> (bool, String) {
    let (mut command, path) = match server {
        Some(server) => (fio_raio(server), "/disk/job".to_owned()),
        None => (psync(), directory.join("job").display().to_string()),
    };
    let output = command.args(options).arg("--filename").arg(path).output().expect("fio");
    (output.status.success(), said(&output))
}

fn psync() -> Command {
    let mut command = fio();
    command.args(["--name=job", "--ioengine=psync"]);
    command
}

#[test]
fn fio_layout_changes_no_byte_that_a_file_has_by_another_name() {
    // whether psync gives the name to a new file
    const JOBS: &[(&[&str], bool)] = &[
        (&["--rw=write", "--number_ios=1"], true),
        (&["--rw=read"], true),
        (&["--rw=randrw", "--number_ios=1"], true),
        (&["--rw=write", "--overwrite=1", "--number_ios=1"], true),
        (&["--rw=write", "--file_append=1", "--number_ios=1"], false),
        (&["--rw=randtrim", "--create_only=1"], false),
    ];
    let directory = tempdir().expect("a directory");
    let server = Server::start(&[&format!("disk={},rw", directory.path().display())]);
    let (kept, job) = (directory.path().join("kept"), directory.path().join("job"));
    for (name, link) in [
        ("has hard links", Box::new(|| fs::hard_link(&kept, &job)) as Box<dyn Fn() -> _>),
        ("is a symbolic link", Box::new(|| std::os::unix::fs::symlink("kept", &job))),
    ] {
        for &(options, is_new) in JOBS {
            for server in [None, Some(&server)] {
                let _ = fs::remove_file(&job);
                fs::write(&kept, old_bytes()).expect("a file");
                link().expect("a link");
                let (succeeded, said) =
                    one_job(server, directory.path(), &[options, &["--size=512k", "--bs=4k"]].concat());
                let bytes = fs::read(&kept).expect("the file");
                let why = format!(
                    "{options:?}, {name}, {}:\n{said}",
                    if server.is_some() { "raio" } else { "psync" }
                );
                assert!(bytes.starts_with(&old_bytes()), "bytes are lost: {why}");
                if is_new {
                    assert_eq!(bytes.len(), FILE_BYTES, "{why}");
                }
                // The engine cannot remove a name: it says what to do.
                let is_rejected = is_new && server.is_some();
                assert_eq!(succeeded, !is_rejected, "{why}");
                assert_eq!(said.contains(&format!("/disk/job {name}")), is_rejected, "{why}");
            }
        }
    }
}

/// Appends eights of ones to each of the files, until it has been laid out. Returns how many bytes to each.
fn append_until_laid_out(files: &[PathBuf], bytes: u64) -> Vec<usize> {
    let append = |path: &PathBuf| {
        let mut file = fs::File::options().append(true).open(path).expect("a file");
        let mut written = 0;
        while file.metadata().expect("its status").len() < bytes {
            written += file.write(&[1; 8]).expect("an append");
        }
        written
    };
    files.iter().map(append).collect()
}

#[test]
fn fio_layout_keeps_what_another_writer_appends_meanwhile() {
    const BYTES: u64 = 32 << 20;
    let directory = tempdir().expect("a directory");
    let server = Server::start(&[&format!("disk={},rw", directory.path().display())]);
    for fallocate in ["native", "posix", "truncate"] {
        // laid out one after another
        let names: Vec<_> = (0..8).map(|number| format!("{fallocate}{number}")).collect();
        let files: Vec<_> = names.iter().map(|name| directory.path().join(name)).collect();
        for file in &files {
            fs::write(file, "").expect("a file");
        }
        let paths: Vec<_> = names.iter().map(|name| format!("/disk/{name}")).collect();
        let mut fio = fio_raio(&server);
        fio.args(["--rw=write", "--file_append=1", "--create_only=1", "--bs=4k"]);
        fio.arg(format!("--size={}", BYTES * 8)).arg(format!("--fallocate={fallocate}"));
        fio.arg(format!("--filename={}", paths.join(":")));
        let appended = std::thread::scope(|scope| {
            let appender = scope.spawn(|| append_until_laid_out(&files, BYTES));
            succeed(&mut fio);
            appender.join().expect("the appender")
        });
        for (file, appended) in files.iter().zip(appended) {
            let bytes = fs::read(file).expect("the file");
            let found = bytes.iter().filter(|&&byte| byte != 0).count();
            assert_eq!(found, appended, "{fallocate}: bytes appended to {} are lost", file.display());
            fs::remove_file(file).expect("the file");
        }
    }
}

/// A tmpfs of its own, where room for a file is there or not: no part of it is taken.
struct Tmpfs(TempDir);

impl Tmpfs {
    fn new(size: &str) -> Self {
        let directory = tempdir().expect("a mount point");
        let options = std::ffi::CString::new(format!("size={size}")).expect("no zero in it");
        mount("none", directory.path(), "tmpfs", MountFlags::empty(), Some(&*options)).expect("a tmpfs");
        Self(directory)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn fio_layout_without_room_leaves_what_psync_leaves() {
    if !needs_root("a small tmpfs") {
        return;
    }
    let mut jobs = Vec::new();
    for (rw, last) in
        [("write", "number_ios=3"), ("randwrite", "number_ios=3"), ("randtrim", "create_only=1")]
    {
        for fallocate in FALLOCATE {
            for append in 0..2 {
                for exists in [false, true] {
                    let options =
                        format!("rw={rw}\nsize=64m\nfallocate={fallocate}\nfile_append={append}\n{last}");
                    jobs.push(Job { options, exists });
                }
            }
        }
    }
    let (ours, theirs) = (Tmpfs::new("32m"), Tmpfs::new("32m"));
    let lines = compare_with_psync(&jobs, ours.0.path(), theirs.0.path());
    assert!(lines.is_empty(), "{} of {} differ:\n{}", lines.len(), jobs.len(), lines.join("\n"));

    // and the outcome is the same, but that a truncate needs no room
    let server = Server::start(&[&format!("disk={},rw", ours.0.path().display())]);
    for fallocate in FALLOCATE {
        let fallocate = format!("--fallocate={fallocate}");
        let options = ["--rw=write", "--file_append=1", "--create_only=1", "--size=64m", &fallocate];
        let (expected, said_locally) = one_job(None, theirs.0.path(), &options);
        let (succeeded, said) = one_job(Some(&server), ours.0.path(), &options);
        assert_eq!(succeeded, expected, "{fallocate}:\n{said}\npsync:\n{said_locally}");
        let word = "No space left on device";
        assert_eq!(
            said.contains(word),
            said_locally.contains(word),
            "{fallocate}:\n{said}\npsync:\n{said_locally}"
        );
    }
}

#[test]
fn fio_layout_says_why_the_rest_of_a_write_could_not_be_written() {
    if !needs_root("a small tmpfs") {
        return;
    }
    let disk = Tmpfs::new("1m");
    let server = Server::start(&[&format!("disk={},rw", disk.0.path().display())]);
    // the second block fits in part
    let (succeeded, said) =
        one_job(Some(&server), disk.0.path(), &["--rw=read", "--size=1536k", "--bs=768k"]);
    assert!(!succeeded, "{said}");
    assert!(
        said.contains("raio: /disk/job: Writing failed on the server: No space left on device"),
        "{said}"
    );
}

#[test]
fn fio_layout_reports_what_closing_its_file_came_to() {
    let Some(disk) = FuseFs::mount("an error of close", FuseOptions::default(), &[]) else { return };
    let server = Server::start(&[&format!("disk={},rw", disk.path().display())]);
    disk.fail(FuseCall::Flush, libc::EDQUOT);
    let (succeeded, said) =
        one_job(Some(&server), disk.path(), &["--rw=read", "--size=64k", "--create_only=1"]);
    assert!(!succeeded, "{said}");
    assert!(said.contains("Disk quota exceeded") && said.contains("raio: /disk/job: "), "{said}");
}
