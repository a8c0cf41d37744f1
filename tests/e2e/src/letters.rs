//! A client that writes blocks full of one letter.

use std::time::{Duration, Instant};

use raio::{Buffer, Buffers, Context, Error, File, Operation, Options, Session};

use crate::server::PATIENCE;

/// The length of a block.
pub const LETTER_BYTES: usize = 4096;
/// How many blocks of each file are written.
pub const LETTERS: usize = 16;
/// On as many connections, so that each worker has some of them.
const CONTEXTS: usize = 2;

/// A session with some files, whose blocks it writes on several connections. Dropping it gives up what is
/// under way.
pub struct Letters {
    contexts: Vec<Context>,
    files: Vec<File>,
    _session: Session,
}

impl Letters {
    /// One that opens these files, or creates them.
    pub fn connect(url: &str, paths: &[&str], options: &Options) -> Result<Self, Error> {
        let session = Session::connect(url, options)?;
        let open = |path: &&str| session.open(path, libc::O_RDWR | libc::O_CREAT, 0o600);
        let files = paths.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let context = |_| session.context(files.len() * LETTERS);
        let contexts = (0..CONTEXTS).map(context).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { contexts, files, _session: session })
    }

    /// Begins to write every block of one of the files, and does not wait.
    pub fn begin(&mut self, file: usize, letter: u8) -> Result<(), Error> {
        for block in 0..LETTERS {
            let buffers = Buffers::One(Buffer::Owned(vec![letter; LETTER_BYTES].into()));
            let offset = (block * LETTER_BYTES) as u64;
            let context = &mut self.contexts[block % CONTEXTS];
            let operation = Operation::Write { offset, buffers };
            context.submit(&self.files[file], operation, block as u64).map_err(|rejected| rejected.error)?;
        }
        self.contexts.iter_mut().for_each(Context::flush);
        Ok(())
    }

    /// Waits for these many outcomes, each of which comes once.
    pub fn outcomes(&mut self, count: usize) -> Vec<Result<u64, Error>> {
        let mut all = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while all.len() < count {
            assert!(Instant::now() < deadline, "{} of {count} have ended", all.len());
            for context in &mut self.contexts {
                // Fails when the session was given up and nothing is left.
                let _ = context.wait(0, LETTERS, Some(Duration::from_millis(1)));
                all.extend(std::iter::from_fn(|| context.next()).map(|completion| completion.result));
            }
        }
        all
    }

    /// Writes every block of one of the files, and has them made durable. All of it succeeds.
    pub fn write(&mut self, file: usize, letter: u8) {
        self.begin(file, letter).expect("there is room");
        for written in self.outcomes(LETTERS) {
            assert_eq!(written.expect("a write succeeds"), LETTER_BYTES as u64);
        }
        self.sync(file);
    }

    /// Has what was written to one of the files made durable.
    pub fn sync(&mut self, file: usize) {
        let fsync = Operation::Fsync { data_only: true };
        self.contexts[0].submit(&self.files[file], fsync, 0).expect("there is room");
        self.contexts[0].flush();
        for synced in self.outcomes(1) {
            synced.expect("nothing is lost");
        }
    }
}
