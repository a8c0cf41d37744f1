//! What a job leaves in its files is what the same job of fio's own psync engine leaves: layout, which makes a file as
//! large as the job needs it, neither destroys bytes that psync keeps nor gives a file another size.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use raio_e2e::Server;
use tempfile::tempdir;

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
                                        "rw={rw}\nfallocate={fallocate}\n{size}\nfile_append={}\noverwrite={}\n\
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

fn leaves_what_psync_leaves(jobs: &[Job]) {
    let server_directory = tempdir().expect("a directory");
    let server = Server::start(&[&format!("disk={},rw", server_directory.path().display())]);
    let mut lines = Vec::new();
    for (number, jobs) in jobs.chunks(100).enumerate() {
        let scratch = tempdir().expect("a directory");
        let theirs = scratch.path().join("psync");
        let ours = server_directory.path().join(number.to_string());
        fs::create_dir(&theirs).expect("a directory");
        fs::create_dir(&ours).expect("a directory");
        let local = theirs.display().to_string();
        run(jobs, "ioengine=psync", &local, &theirs, scratch.path());
        let raio = format!("ioengine=external:{}\nraio_url={}", engine().display(), server.url());
        run(jobs, &raio, &format!("/disk/{number}"), &ours, scratch.path());
        lines.extend(differences(jobs, &ours, &theirs));
    }
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
