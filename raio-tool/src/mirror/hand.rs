//! A thread that makes a tree like another one. It has requests in flight on both sides: what would cost a
//! round trip for each small file is done for many of them in one.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Deed, Item, Node, Run, count};
use crate::failure::Failure;
use crate::place::Sessions;
use crate::rate::RateLimiter;
use crate::transfer::wait_for_either;
use crate::tree::{Answer, Ended, New, Request, Tree, TreeEntry};
use crate::tuning::{REQUESTS_IN_FLIGHT, SMALL_BYTES_IN_FLIGHT, STOP_CHECK_INTERVAL};

/// A thread's way to both trees, and what it has in flight there.
pub struct Hand<'a> {
    pub(super) run: &'a Run<'a>,
    pub(super) source: Box<dyn Tree>,
    pub(super) destination: Box<dyn Tree>,
    /// For reading a copy again.
    pub(super) sessions: Sessions<'a>,
    /// What the requests are for, by their tokens.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// How many requests the source and the destination have.
    reading: usize,
    writing: usize,
    /// Of the small files in flight, by the list of their directory.
    bytes: u64,
    /// For small files.
    limiter: RateLimiter,
}

/// What a request is for.
enum Job {
    /// A small file of a directory, which is read and then written.
    File(Arc<Node>, TreeEntry),
    /// A symbolic link in a directory: its target is read.
    Link(Arc<Node>, TreeEntry),
    /// The last request for an entry of this directory: creates a link, removes the entry, or sets its
    /// attributes. None: the entry is the root.
    Last(Option<Arc<Node>>),
    /// A directory is created, and comes into the queue.
    Create(Arc<Node>),
}

impl<'a> Hand<'a> {
    pub(super) fn new(run: &'a Run<'a>, source: Box<dyn Tree>, destination: Box<dyn Tree>) -> Self {
        Self {
            run,
            source,
            destination,
            sessions: Sessions::new(run.mirror.global),
            jobs: (0..REQUESTS_IN_FLIGHT).map(|_| None).collect(),
            free: (0..REQUESTS_IN_FLIGHT).collect(),
            reading: 0,
            writing: 0,
            bytes: 0,
            limiter: RateLimiter::new(run.plan.settings.rate),
        }
    }

    /// Takes items of the queue until all is done, or was stopped.
    pub(super) fn work(mut self) -> Result<(), Failure> {
        let queue = &self.run.queue;
        // What is in flight may add items, so others wait for it.
        let mut taken = 0;
        loop {
            let item = if self.is_idle() {
                queue.done(std::mem::take(&mut taken));
                match queue.next() {
                    None => return Ok(()),
                    item => item,
                }
            } else if queue.is_stopped() {
                return Ok(());
            } else if self.has_room() {
                queue.take()
            } else {
                None
            };
            self.run.mirror.interrupt.check()?;
            match item {
                Some(item) => {
                    taken += 1;
                    // It may block on a directory listing: send the queued requests first.
                    self.take_in()?;
                    self.begin(item)?;
                }
                None => self.progress()?,
            }
        }
    }

    fn begin(&mut self, item: Item) -> Result<(), Failure> {
        match item {
            Item::Directory(node) => {
                let ended = self.directory(&node);
                // Without the first directory there is nothing.
                let ended = if node.parent().is_none() { Ok(ended?) } else { ended };
                if !self.run.note(ended)? {
                    node.has_failed();
                }
                self.make_room()?;
                self.finish(&node)
            }
            Item::Files(node, files) => {
                for (entry, there) in files {
                    self.make_room()?;
                    match self.file(&node, &entry, there.as_ref()) {
                        Ok(false) => {}
                        ended => self.ended(&node, ended.map(drop))?,
                    }
                }
                Ok(())
            }
            Item::Large(node, entry) => {
                // Otherwise their answers would not be processed until the large file is copied.
                while !self.is_idle() {
                    self.progress()?;
                }
                let copied = self.copy_large(&node.path().join(&entry.name));
                let copied = copied.map(|bytes| self.was_copied(bytes));
                self.ended(&node, copied)
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.reading + self.writing == 0
    }

    fn has_room(&self) -> bool {
        !self.free.is_empty() && self.bytes < SMALL_BYTES_IN_FLIGHT && self.limiter.until_due().is_zero()
    }

    /// Waits until there is room for another request.
    pub(super) fn make_room(&mut self) -> Result<(), Failure> {
        while !self.has_room() {
            self.progress()?;
        }
        Ok(())
    }

    /// Begins to read a small file. There has to be room.
    pub(super) fn begin_file(&mut self, node: &Arc<Node>, path: PathBuf, entry: &TreeEntry) {
        self.bytes += entry.size;
        self.limiter.charge(entry.size);
        self.reading += 1;
        let token = self.token(Job::File(Arc::clone(node), entry.clone()));
        // If it has become longer, its status says so.
        self.source.start(token, Request::Read { path, length: entry.size.max(1) });
    }

    /// Begins to create a directory. There has to be room.
    pub(super) fn begin_dir(&mut self, node: Arc<Node>) {
        // It can be written to until everything is in it.
        let (path, mode) = (node.path().to_owned(), node.source().permissions() | 0o700);
        self.write(Job::Create(node), Request::CreateDir { path, mode });
    }

    /// Begins to set the attributes of something in the directory `parent`. There has to be room.
    pub(super) fn begin_attributes(
        &mut self,
        parent: Option<&Arc<Node>>,
        path: PathBuf,
        mode: Option<u32>,
        modified_ns: Option<i64>,
    ) {
        self.write(Job::Last(parent.cloned()), Request::Set { path, mode, modified_ns });
    }

    /// Begins to copy a link. There has to be room.
    pub(super) fn begin_link(&mut self, node: &Arc<Node>, path: PathBuf, entry: &TreeEntry) {
        self.reading += 1;
        let token = self.token(Job::Link(Arc::clone(node), entry.clone()));
        self.source.start(token, Request::ReadLink { path });
    }

    /// Begins to remove something from a directory, which is no directory itself. There has to be room.
    pub(super) fn begin_remove(&mut self, node: &Arc<Node>, path: PathBuf) {
        node.awaits(1);
        self.write(Job::Last(Some(Arc::clone(node))), Request::Remove { path });
    }

    fn write(&mut self, job: Job, request: Request) {
        self.writing += 1;
        let token = self.token(job);
        self.destination.start(token, request);
    }

    fn token(&mut self, job: Job) -> usize {
        // Where there is no room nothing is begun.
        let token = self.free.pop().unwrap_or_default();
        self.jobs[token] = Some(job);
        token
    }

    fn job(&mut self, token: usize) -> Option<Job> {
        let job = self.jobs.get_mut(token)?.take();
        self.free.extend(job.is_some().then_some(token));
        if let Some(Job::File(_, entry)) = &job {
            self.bytes -= entry.size;
        }
        job
    }

    /// Sends the queued requests, and processes completions. Does not wait. Returns whether there were any
    /// completions.
    fn take_in(&mut self) -> Result<bool, Failure> {
        let mut has_ended = false;
        while let Some(ended) = self.source.next()? {
            has_ended = true;
            self.was_read(ended)?;
        }
        while let Some(ended) = self.destination.next()? {
            has_ended = true;
            self.was_written(ended)?;
        }
        Ok(has_ended)
    }

    /// Takes in what has ended, or waits for it.
    fn progress(&mut self) -> Result<(), Failure> {
        self.run.mirror.interrupt.check()?;
        if self.take_in()? {
            return Ok(());
        }
        let due = self.limiter.until_due();
        let interval = if due.is_zero() { STOP_CHECK_INTERVAL } else { due.min(STOP_CHECK_INTERVAL) };
        match (self.reading, self.writing) {
            (0, 0) => {
                std::thread::sleep(due.min(interval));
                Ok(())
            }
            (_, 0) => self.source.wait(interval),
            (0, _) => self.destination.wait(interval),
            _ => wait_for_either(self.source.poll_fd()?, self.destination.poll_fd()?, interval),
        }
    }

    /// A small file, or a link, was read: it is written.
    fn was_read(&mut self, Ended { token, result }: Ended) -> Result<(), Failure> {
        self.reading -= 1;
        let (node, entry) = match self.job(token) {
            Some(Job::File(node, entry) | Job::Link(node, entry)) => (node, entry),
            _ => return Ok(()),
        };
        match result {
            Ok(Answer::Link(target)) => {
                let path = node.path().join(&entry.name);
                let modified_ns = self.run.plan.preserves.then_some(entry.modified_ns);
                self.write(Job::Last(Some(node)), Request::Symlink { path, target, modified_ns });
                Ok(())
            }
            Ok(Answer::Read(bytes, now)) if now.size == bytes.len() as u64 => {
                let plan = self.run.plan;
                let new = New {
                    mode: now.permissions(),
                    is_exact: plan.preserves,
                    modified_ns: plan.preserves.then_some(now.modified_ns),
                    is_durable: plan.is_durable,
                };
                let path = node.path().join(&entry.name);
                self.bytes += now.size;
                self.write(
                    Job::File(node, TreeEntry { size: now.size, ..entry }),
                    Request::Put { path, bytes, new },
                );
                Ok(())
            }
            // It has become longer, or the server brings less with one request.
            Ok(_) => {
                self.queue_large(node, entry);
                Ok(())
            }
            Err(failure) => self.ended(&node, Err(failure)),
        }
    }

    fn was_written(&mut self, Ended { token, result }: Ended) -> Result<(), Failure> {
        self.writing -= 1;
        match (self.job(token), result) {
            (Some(Job::File(node, entry)), Ok(Answer::TooLarge)) => {
                self.queue_large(node, entry);
                Ok(())
            }
            (Some(Job::File(node, entry)), result) => {
                let copied = result.map(|_| self.was_copied(entry.size));
                self.ended(&node, copied)
            }
            (Some(Job::Last(parent)), result) => {
                self.run.note(result.map(drop))?;
                parent.map_or(Ok(()), |parent| self.finish(&parent))
            }
            (Some(Job::Create(node)), Ok(answer)) => {
                node.was_made(matches!(answer, Answer::Done));
                self.run.queue.add(vec![Item::Directory(node)]);
                Ok(())
            }
            (Some(Job::Create(node)), Err(failure)) => {
                node.has_failed();
                self.ended(&node, Err(failure))
            }
            // Links are read.
            (Some(Job::Link(..)) | None, _) => Ok(()),
        }
    }

    /// Queues a file that is too large for one request. Any thread may copy it.
    pub(super) fn queue_large(&self, node: Arc<Node>, entry: TreeEntry) {
        self.run.queue.add(vec![Item::Large(node, entry)]);
    }

    /// A file has been copied.
    pub(super) fn was_copied(&self, bytes: u64) {
        let run = self.run;
        count(&run.counts.copied);
        let all = run.counts.copied_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        run.mirror.progress.show(all);
    }

    /// Something in a directory has ended. There has to be room for a request.
    fn ended(&mut self, node: &Arc<Node>, ended: Result<(), Failure>) -> Result<(), Failure> {
        self.run.note(ended)?;
        self.finish(node)
    }

    /// Something in a directory, or its list, is done. After the last one the directory gets its attributes,
    /// and is done itself. There has to be room for a request.
    fn finish(&mut self, node: &Arc<Node>) -> Result<(), Failure> {
        let mut node = node;
        while node.is_last() {
            let is_begun = self.begin_set(node);
            match is_begun {
                // It is done when it has its attributes.
                Ok(true) => return Ok(()),
                is_begun => self.run.note(is_begun.map(drop))?,
            };
            match node.parent() {
                Some(parent) => node = parent,
                None => break,
            }
        }
        Ok(())
    }

    /// Begins to set the attributes of a directory. Returns whether there is something to set.
    fn begin_set(&mut self, node: &Arc<Node>) -> Result<bool, Failure> {
        let run = self.run;
        let Some((mode, modified_ns)) = node.attributes(run.plan.preserves) else { return Ok(false) };
        if !node.is_new() && !run.begins(Deed::Set, node.path(), None)? || run.plan.is_dry {
            return Ok(false);
        }
        let mode = match run.plan.preserves {
            true => Some(mode),
            // What the umask has taken stays away.
            false => {
                let found = self.destination.entry(node.path(), false)?.map_or(mode, |it| it.permissions());
                Some(found & mode)
            }
        };
        self.begin_attributes(node.parent(), node.path().to_owned(), mode, modified_ns);
        Ok(true)
    }
}
