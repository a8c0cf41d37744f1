//! The file of `--trace`: a thread of its own writes what workers hand to it, so that none of them waits for
//! a disk. See [`raio_transport::trace`] for what is in it.

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use anyhow::Context;
use raio_transport::trace::{Clock, Ring, TraceFile};

use crate::tuning::statistics::{TRACE_RECORDS, TRACE_TIMEOUT};

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
    sender: Sender<Message>,
}

impl Trace {
    /// Creates the file, and starts the thread that writes to it.
    pub fn start(path: &Path) -> anyhow::Result<Self> {
        let file = TraceFile::create(path, "raio_server").with_context(|| {
            format!("Cannot create {} for --trace. Name a file that does not exist yet", path.display())
        })?;
        let clock = file.clock();
        let (sender, receiver) = channel();
        std::thread::Builder::new()
            .name("raio-trace".into())
            .spawn(move || write(file, &receiver))
            .context("Cannot start a thread for --trace. Raise the limit on processes with `ulimit -u`")?;
        Ok(Self { clock, sender })
    }

    /// The clock of all records.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// An empty ring for a worker.
    pub fn ring(&self) -> Ring {
        Ring::new(TRACE_RECORDS)
    }

    /// Has a worker's records written.
    pub fn write(&self, worker: usize, ring: Ring) {
        let _ = self.sender.send(Message::Ring(worker, ring));
    }

    /// Waits until they have been, for a while at most. For the end of the process.
    pub fn flush(&self) {
        let (sender, done) = sync_channel(1);
        if self.sender.send(Message::Flush(sender)).is_err() || done.recv_timeout(TRACE_TIMEOUT).is_err() {
            tracing::warn!("The trace is incomplete: its file cannot be written in {TRACE_TIMEOUT:?}.");
        }
    }
}

fn write(mut file: TraceFile, receiver: &Receiver<Message>) {
    while let Ok(message) = receiver.recv() {
        match message {
            Message::Ring(worker, ring) => {
                if let Err(error) = file.append(worker as u32, &format!("worker {worker}"), &ring) {
                    tracing::warn!(
                        "Cannot write the trace: {error}. Make room for it, or name another file."
                    );
                }
            }
            Message::Flush(done) => drop(done.send(())),
        }
    }
}
