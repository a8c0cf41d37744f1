//! Measures what is done to many small files: on a server, and on the local directory that it exports.
//!
//! ```text
//! cargo run --release -p libraio --example small_files -- URL EXPORT DIRECTORY WHAT DEPTH SECONDS
//! ```
//!
//! DIRECTORY is that of /EXPORT; its files are read, and it should hold a few thousand of one size. WHAT is
//!
//! ```text
//! get, stat                         each file by its path
//! open-read-close                   three operations for each file
//! read, read16, stat-open           4 KiB, 16 KiB or the status of the first file, which is open
//! list                              all names with their sizes
//! local-read, local-stat, local-list   the same here, one at a time: open, read, close
//! ```
//!
//! Prints how many files a second; of a list how many names.

use std::error::Error;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use raio::{Answer, Buffer, Buffers, Context, Operation, Options, PathOperation, Session, SubmitOptions};

/// The largest file that is read in one request.
const FILE_BYTES: usize = 16 << 10;
const BLOCK_BYTES: usize = 4 << 10;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, export, directory, what, depth, seconds] = &arguments[..] else {
        return Err("usage: small_files URL EXPORT DIRECTORY WHAT DEPTH SECONDS".into());
    };
    let (depth, limit) = (depth.parse()?, Duration::from_secs_f64(seconds.parse()?));
    let directory = Path::new(directory);
    let names: Vec<_> = names(directory)?.collect();
    let mut remote = match what.starts_with("local-") {
        true => None,
        false => Some(Remote::new(url, export, &names, depth)?),
    };
    let begin = Instant::now();
    let mut done = 0;
    while begin.elapsed() < limit {
        done += match (what.as_str(), &mut remote) {
            ("local-read", _) => read_all(directory, &names)?,
            ("local-stat", _) => stat_all(directory, &names)?,
            ("local-list", _) => list(directory)?,
            (_, Some(remote)) => remote.pass(what, &names)?,
            (other, None) => return Err(format!("{other} is none of what can be measured").into()),
        };
    }
    println!("{:.0}", done as f64 / begin.elapsed().as_secs_f64());
    Ok(())
}

fn names(directory: &Path) -> std::io::Result<impl Iterator<Item = PathBuf>> {
    Ok(fs::read_dir(directory)?.filter_map(|entry| Some(entry.ok()?.file_name().into())))
}

// Here
// --------------------------------------------------------------------------------------------------------

fn read_all(directory: &Path, names: &[PathBuf]) -> std::io::Result<usize> {
    let mut bytes = vec![0; FILE_BYTES];
    for name in names {
        let read = fs::File::open(directory.join(name))?.read(&mut bytes)?;
        std::hint::black_box(read);
    }
    Ok(names.len())
}

fn stat_all(directory: &Path, names: &[PathBuf]) -> std::io::Result<usize> {
    for name in names {
        std::hint::black_box(fs::symlink_metadata(directory.join(name))?);
    }
    Ok(names.len())
}

/// As `find -printf '%s %p\n'`.
fn list(directory: &Path) -> std::io::Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(directory)? {
        std::hint::black_box(entry?.metadata()?.len());
        count += 1;
    }
    Ok(count)
}

// There
// --------------------------------------------------------------------------------------------------------

struct Remote {
    session: Session,
    context: Context,
    directory: PathBuf,
    depth: usize,
    first: raio::File,
    /// Those that are not in use.
    buffers: Vec<Buffers>,
}

impl Remote {
    fn new(url: &str, export: &str, names: &[PathBuf], depth: usize) -> Result<Self, Box<dyn Error>> {
        let session = Session::connect(url, &Options::default())?;
        let directory = Path::new("/").join(export);
        let name = names.first().ok_or("the directory is empty")?;
        let first = session.open(directory.join(name), libc::O_RDONLY, 0)?;
        let context = session.context(depth)?;
        Ok(Self { session, context, directory, depth, first, buffers: Vec::new() })
    }

    /// One pass over all files.
    fn pass(&mut self, what: &str, names: &[PathBuf]) -> Result<usize, Box<dyn Error>> {
        if what == "list" {
            let entries = self.session.read_dir(&self.directory)?;
            return Ok(entries.filter(|entry| entry.as_ref().is_ok_and(|entry| entry.has_status)).count());
        }
        if what == "open-read-close" {
            return self.open_read_close(names);
        }
        let (mut next, mut done, mut in_flight) = (0, 0, 0);
        while done < names.len() {
            while in_flight < self.depth && next < names.len() {
                let path = self.directory.join(&names[next]);
                match what {
                    "get" => {
                        let buffers = self.buffer(FILE_BYTES);
                        self.submit(PathOperation::Get { path, buffers }, 0)?;
                    }
                    "stat" => self.submit(PathOperation::Stat { path, nofollow: true }, 0)?,
                    "read" | "read16" => {
                        let buffers = self.buffer(if what == "read" { BLOCK_BYTES } else { FILE_BYTES });
                        on(&mut self.context, &self.first, Operation::Read { offset: 0, buffers }, 0)?;
                    }
                    "stat-open" => on(&mut self.context, &self.first, Operation::Stat, 0)?,
                    other => return Err(format!("{other} is none of what can be measured").into()),
                }
                (next, in_flight) = (next + 1, in_flight + 1);
            }
            self.context.flush();
            self.context.wait(1, usize::MAX, None)?;
            while let Some(completion) = self.context.next() {
                let result = completion.result?;
                std::hint::black_box(result);
                self.buffers.extend(completion.buffers);
                (done, in_flight) = (done + 1, in_flight - 1);
            }
        }
        Ok(done)
    }

    /// The same, by three operations for each file, one after another.
    fn open_read_close(&mut self, names: &[PathBuf]) -> Result<usize, Box<dyn Error>> {
        let count = names.len();
        let mut names = names.iter();
        let mut files: Vec<Option<raio::File>> = Vec::new();
        files.resize_with(self.depth, || None);
        for place in 0..self.depth {
            self.open_next(&mut names, place)?;
        }
        let mut done = 0;
        while done < count {
            self.context.flush();
            self.context.wait(1, usize::MAX, None)?;
            while let Some(completion) = self.context.next() {
                let place = completion.token as usize;
                std::hint::black_box(completion.result?);
                if let Some(Answer::File(file)) = completion.answer.map(|answer| *answer) {
                    let buffers = self.buffer(FILE_BYTES);
                    on(&mut self.context, &file, Operation::Read { offset: 0, buffers }, completion.token)?;
                    files[place] = Some(file);
                } else if let Some(buffers) = completion.buffers {
                    self.buffers.push(buffers);
                    let file = files[place].take().ok_or("a read of no file")?;
                    on(&mut self.context, &file, Operation::Close, completion.token)?;
                } else {
                    done += 1;
                    self.open_next(&mut names, place)?;
                }
            }
        }
        Ok(done)
    }

    fn open_next(
        &mut self,
        names: &mut std::slice::Iter<'_, PathBuf>,
        place: usize,
    ) -> Result<(), Box<dyn Error>> {
        let Some(name) = names.next() else { return Ok(()) };
        let path = self.directory.join(name);
        self.submit(PathOperation::Open { path, flags: libc::O_RDONLY, mode: 0 }, place as u64)
    }

    fn buffer(&mut self, len: usize) -> Buffers {
        self.buffers.pop().unwrap_or_else(|| Buffers::One(Buffer::Owned(vec![0; len].into())))
    }

    fn submit(&mut self, operation: PathOperation, token: u64) -> Result<(), Box<dyn Error>> {
        let submitted = self.context.submit_path(operation, SubmitOptions::default(), token);
        submitted.map(drop).map_err(|rejected| rejected.error.to_string().into())
    }
}

/// Submits an operation on an open file.
fn on(
    context: &mut Context,
    file: &raio::File,
    operation: Operation,
    token: u64,
) -> Result<(), Box<dyn Error>> {
    let submitted = context.submit(file, operation, token);
    submitted.map(drop).map_err(|rejected| rejected.error.into())
}
