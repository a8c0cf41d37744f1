//! Many clients that are no good neighbours, in one process: they send, and do not take what they asked for.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use raio_transport::protocol::OPEN_READ;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::raw::Raw;

/// What each client asks for as soon as it is connected.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// So many reads, from the beginning of the file on, and round and round.
    pub reads: u64,
    /// Of so many bytes each.
    pub bytes: u32,
}

/// Clients that never read an answer, until they are told to.
pub struct Herd {
    members: Vec<Raw>,
}

impl Herd {
    /// So many, each a session of its own that has asked for this much. Those that the server rejects are
    /// missing; it is an error if all are.
    pub fn connect(url: &str, path: &str, count: usize, demand: Demand) -> io::Result<Self> {
        let mut last = None;
        let mut members = Vec::new();
        for _ in 0..count {
            let asked = Raw::open(url, path, OPEN_READ).and_then(|mut raw| {
                let blocks = (raw.file_bytes / u64::from(demand.bytes)).max(1);
                for id in 0..demand.reads {
                    raw.send_read(id, id % blocks * u64::from(demand.bytes), demand.bytes)?;
                }
                Ok(raw)
            });
            match asked {
                Ok(raw) => members.push(raw),
                Err(error) => last = Some(error),
            }
        }
        match last {
            Some(error) if members.is_empty() => Err(error),
            _ => Ok(Self { members }),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Each takes one byte of its answers, if one is there. How many did.
    pub fn sip(&mut self) -> usize {
        let takes = |raw: &mut Raw| {
            raw.stream.set_nonblocking(true).is_ok() && matches!(raw.stream.read(&mut [0]), Ok(1))
        };
        self.members.iter_mut().map(takes).filter(|took| *took).count()
    }

    /// How many the server has closed.
    pub fn closed(&self) -> usize {
        let is_closed = |raw: &Raw| {
            let mut fds = [PollFd::new(&raw.stream, PollFlags::RDHUP)];
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            matches!(poll(&mut fds, Some(&now)), Ok(1))
        };
        self.members.iter().filter(|raw| is_closed(raw)).count()
    }
}

/// A herd that keeps at it in threads of its own, until this is dropped.
pub struct Restless {
    is_over: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Restless {
    /// Clients that read a byte a second each. They are connected when this returns.
    pub fn slow(url: &str, path: &str, count: usize, demand: Demand) -> io::Result<Self> {
        let mut herd = Herd::connect(url, path, count, demand)?;
        Ok(Self::start(Duration::from_secs(1), move || {
            herd.sip();
        }))
    }

    /// Deaf clients that vanish and come back, all of them, every so often.
    pub fn reconnecting(
        url: &str,
        path: &str,
        count: usize,
        demand: Demand,
        every: Duration,
    ) -> io::Result<Self> {
        let mut herds = vec![Herd::connect(url, path, count, demand)?];
        let (url, path) = (url.to_owned(), path.to_owned());
        Ok(Self::start(every, move || {
            herds.clear();
            herds.extend(Herd::connect(&url, &path, count, demand));
        }))
    }

    fn start(every: Duration, mut act: impl FnMut() + Send + 'static) -> Self {
        let (is_over, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (until, counter) = (is_over.clone(), rounds.clone());
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                std::thread::park_timeout(every);
                act();
                counter.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { is_over, rounds, thread: Some(thread) }
    }

    /// How often each has read a byte, or all have come back.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }
}

impl Drop for Restless {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}
