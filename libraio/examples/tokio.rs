//! Reads a file of a raio_server with tokio, 32 blocks at a time:
//!
//! ```text
//! cargo run --example tokio -- raio://127.0.0.1 /scratch/data
//! ```

use std::sync::Arc;

use raio::{AsyncContext, Buffer, Buffers, OpenOptions, Options, Progress, Session};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinSet;

const BLOCK_BYTES: u64 = 64 << 10;
const READERS: u64 = 32;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Wakes the futures of a context when their operations are over.
async fn drive(context: AsyncContext) -> Result<()> {
    #[expect(deprecated, reason = "the other constructor is unsafe, and this context keeps its descriptor")]
    let readiness = AsyncFd::with_interest(context.clone(), Interest::READABLE)?;
    loop {
        let mut ready = readiness.readable().await?;
        if context.run_once()? == Progress::Drained {
            ready.clear_ready();
        }
    }
}

async fn read_all(context: AsyncContext, file: Arc<raio::File>, size: u64) -> Result<u64> {
    let driver = tokio::spawn(drive(context.clone()));
    let mut readers = JoinSet::new();
    for first in 0..READERS {
        let (context, file) = (context.clone(), Arc::clone(&file));
        readers.spawn(async move {
            let mut buffers = Buffers::One(Buffer::Owned(vec![0; BLOCK_BYTES as usize].into()));
            let mut total = 0;
            for offset in (first * BLOCK_BYTES..size).step_by((READERS * BLOCK_BYTES) as usize) {
                let (read, same) = context.read(&file, offset, buffers).await;
                buffers = same;
                total += read?;
            }
            Ok::<u64, raio::Error>(total)
        });
    }
    let mut total = 0;
    while let Some(read) = readers.join_next().await {
        total += read??;
    }
    driver.abort();
    Ok(total)
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(url), Some(path)) = (arguments.next(), arguments.next()) else {
        return Err("usage: tokio URL /EXPORT/FILE".into());
    };
    // These block for a round trip each.
    let session = Session::connect(&url, &Options::default())?;
    let file = Arc::new(OpenOptions::new().read(true).open(&session, &path)?);
    let size = file.status()?.size.get();
    let context = AsyncContext::new(session.context(READERS as usize)?)?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let total = runtime.block_on(read_all(context, file, size))?;
    println!("{total} bytes");
    Ok(())
}
