//! Writes the trace file (`--trace`) in a thread of its own, so that no worker waits for a disk. Workers send
//! their rings of records to it through a bounded queue, at most one ring per worker. The file format is in
//! [`raio_transport::trace`].

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use raio_transport::sync::lock;
use raio_transport::trace::{Clock, Ring, TraceFile};

use crate::tuning::statistics::{TRACE_RECORDS, TRACE_TIMEOUT};

#[derive(Debug)]
enum Message {
    /// What this worker has recorded.
    Ring(usize, Ring),
    /// Everything before it has been written.
    Flush(SyncSender<()>),
}

/// See the module documentation.
#[derive(Debug)]
pub struct Trace {
    clock: Clock,
    sender: SyncSender<Message>,
    /// Records that the queue had no room for, and that the file does not tell of yet.
    dropped: Arc<AtomicU64>,
    /// What the thread will have that is not started yet.
    unstarted: Mutex<Option<(Writer, Receiver<Message>)>>,
}

impl Trace {
    /// Creates the file. The records are of this clock. [`Trace::start`] is to follow.
    pub fn create(path: &Path, clock: Clock, workers: usize) -> anyhow::Result<Self> {
        let file = TraceFile::of_server(path, "raio_server", clock).with_context(|| {
            format!(
                "Cannot create {} for --trace. Name a file that does not exist yet, in a directory that \
                 raio_server may write to",
                path.display()
            )
        })?;
        let (sender, receiver) = sync_channel(workers);
        let dropped = Arc::new(AtomicU64::new(0));
        let writer = Writer { path: path.to_owned(), file, dropped: Arc::clone(&dropped) };
        Ok(Self { clock, sender, dropped, unstarted: Mutex::new(Some((writer, receiver))) })
    }

    /// Starts the thread that writes to the file.
    pub fn start(&self) -> anyhow::Result<()> {
        let Some((mut writer, receiver)) = lock(&self.unstarted).take() else { return Ok(()) };
        std::thread::Builder::new()
            .name("raio-trace".into())
            .spawn(move || writer.run(&receiver))
            .context("Cannot start a thread for --trace. Raise the limit on processes with `ulimit -u`")?;
        Ok(())
    }

    /// The clock of all records.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// An empty ring for a worker.
    pub fn ring(&self) -> Ring {
        Ring::new(TRACE_RECORDS)
    }

    /// Queues a worker's records to be written. Never blocks: if the queue is full, the worker gets its ring
    /// back and continues to use it.
    pub fn write(&self, worker: usize, ring: Ring) -> Result<(), Ring> {
        self.push(worker, ring).inspect_err(|_| {
            tracing::warn!(
                name: "trace-busy",
                worker,
                "The trace has no more records of a worker yet: earlier ones are still being written. \
                 Send SIGUSR2 again later."
            );
        })
    }

    /// Has the last records of a worker written that ends. They are lost if what was handed over before is
    /// still being written.
    pub fn write_last(&self, worker: usize, ring: Ring) {
        if let Err(ring) = self.push(worker, ring) {
            self.dropped.fetch_add(ring.len(), Ordering::Relaxed);
            tracing::warn!(
                name: "trace-lacks-last",
                worker,
                "The last {records} records of a worker are not in the trace: earlier ones are still being \
                 written.",
                records = ring.len()
            );
        }
    }

    fn push(&self, worker: usize, ring: Ring) -> Result<(), Ring> {
        match self.sender.try_send(Message::Ring(worker, ring)) {
            Err(
                TrySendError::Full(Message::Ring(_, ring))
                | TrySendError::Disconnected(Message::Ring(_, ring)),
            ) => Err(ring),
            _ => Ok(()),
        }
    }

    /// Waits until they have been, for a while at most. For the end of the process.
    pub fn flush(&self) {
        self.flush_until(Instant::now() + TRACE_TIMEOUT);
    }

    fn flush_until(&self, deadline: Instant) {
        let (sender, done) = sync_channel(1);
        let is_full =
            || matches!(self.sender.try_send(Message::Flush(sender.clone())), Err(TrySendError::Full(_)));
        while is_full() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        if done.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_err() {
            tracing::warn!(
                name: "trace-incomplete",
                "The trace is incomplete: its file cannot be written in {TRACE_TIMEOUT:?}."
            );
        }
    }
}

/// What the thread has.
#[derive(Debug)]
struct Writer {
    path: PathBuf,
    file: TraceFile,
    dropped: Arc<AtomicU64>,
}

impl Writer {
    fn run(&mut self, receiver: &Receiver<Message>) {
        while let Ok(message) = receiver.recv() {
            match message {
                Message::Ring(worker, ring) => {
                    self.append(worker, &ring);
                    self.note_dropped();
                }
                Message::Flush(done) => {
                    self.note_dropped();
                    let _ = done.send(());
                }
            }
        }
    }

    fn append(&mut self, worker: usize, ring: &Ring) {
        let (records, path) = (ring.len(), self.path.display());
        match self.file.append(worker as u32, &format!("worker {worker}"), ring) {
            Ok(()) => {
                tracing::info!(
                    name: "trace-written",
                    worker,
                    "{records} records of a worker were written to the trace {path}."
                );
            }
            Err(error) => {
                self.dropped.fetch_add(records, Ordering::Relaxed);
                tracing::warn!(
                    name: "trace-not-written",
                    worker,
                    "Cannot write {records} records of a worker to the trace {path}: {error}. They \
                     are lost, and the server goes on. Make room for later ones."
                );
            }
        }
    }

    /// Has the file tell how many records were lost.
    fn note_dropped(&mut self) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0
            && let Err(error) = self.file.add_dropped(dropped)
        {
            tracing::warn!(
                name: "trace-loss-not-noted",
                "Cannot note in the trace {path} what was lost: {error}.",
                path = self.path.display()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use raio_transport::trace::{Phase, Record};

    fn ring_of(records: usize) -> Ring {
        let mut ring = Ring::new(TRACE_RECORDS);
        let record =
            Record { time_ns: 0, name: "read", phase: Phase::Begin, connection: 1, request: 1, bytes: 1 };
        (0..records).for_each(|_| ring.push(record));
        ring
    }

    #[test]
    fn a_worker_keeps_its_ring_while_the_queue_is_full_and_its_last_records_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace");
        let file = TraceFile::of_server(&path, "raio_server", Clock::new()).unwrap();
        // Its thread is held up: it does not run yet.
        let (sender, receiver) = sync_channel(2);
        let dropped = Arc::new(AtomicU64::new(0));
        let trace =
            Trace { clock: file.clock(), sender, dropped: Arc::clone(&dropped), unstarted: Mutex::default() };
        assert!(trace.write(0, ring_of(3)).is_ok() && trace.write(1, ring_of(4)).is_ok());
        let kept = trace.write(0, ring_of(5)).unwrap_err();
        assert_eq!(kept.len(), 5);
        trace.write_last(0, kept);
        trace.flush_until(Instant::now() + Duration::from_millis(50));
        let mut writer = Writer { path: path.clone(), file, dropped };
        let thread = std::thread::spawn(move || writer.run(&receiver));
        trace.flush();
        drop(trace);
        thread.join().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.matches("\"ph\":\"b\"").count(), 7, "{text}");
        assert!(text.contains("\"dropped\":5}"), "{text}");
    }
}
