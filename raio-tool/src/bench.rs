//! `raio bench`: a table of reads, and of writes, by size and depth, over one connection.

use std::ffi::OsString;
use std::time::{Duration, Instant};

use clap::{Args, ValueHint};
use hdrhistogram::Histogram;
use raio::{Buffer, Buffers, Context, File, Operation};
use raio_transport::random::SplitMix64;
use raio_transport::size;
use serde::Serialize;

use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::output::{self, per_second};
use crate::place::{Place, RemoteFile};

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// A file or device of a server
    #[arg(value_name = "PATH", value_hint = ValueHint::AnyPath)]
    path: OsString,
    /// Write, too: what is in the file is lost
    #[arg(long)]
    write: bool,
    /// Sizes of reads and writes
    #[arg(long, value_name = "SIZES", default_value = "4k,64k,1M", value_delimiter = ',')]
    #[arg(value_parser = size::parse)]
    sizes: Vec<u64>,
    /// Requests in flight
    #[arg(long, value_name = "NUMBERS", default_value = "1,32", value_delimiter = ',')]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    depths: Vec<u16>,
    /// How long each takes
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    seconds: f64,
}

/// A row of the table, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Row {
    /// read or write.
    operation: &'static str,
    io_bytes: u64,
    depth: u16,
    ios: u64,
    ios_per_second: f64,
    bytes_per_second: f64,
    mean_us: f64,
    p50_us: f64,
    p99_us: f64,
    max_us: f64,
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    if !(0.01..=3600.0).contains(&options.seconds) {
        return Err(Failure::usage(format!(
            "--seconds is {}. Give a time from 0.01 to 3600.",
            options.seconds
        )));
    }
    let location = Location::parse(&options.path)?;
    let flags = if options.write { libc::O_RDWR } else { libc::O_RDONLY };
    let file = RemoteFile::open(global, &location, flags, 0)?;
    let size = file.facts()?.size.unwrap_or(0);
    let largest = options.sizes.iter().copied().max().unwrap_or(0);
    if largest > size || options.sizes.contains(&0) {
        return Err(Failure::usage(format!(
            "{location} has {size} bytes, which is less than the largest of --sizes. Give smaller ones, or a \
             larger file."
        )));
    }
    if !global.json {
        output::print(&format!(
            "{:<6}{:>10}{:>7}{:>12}{:>14}{:>11}{:>11}{:>11}\n",
            "", "size", "depth", "IO/s", "", "mean µs", "p50 µs", "p99 µs"
        ))?;
    }
    let operations: &[&'static str] = if options.write { &["read", "write"] } else { &["read"] };
    for &operation in operations {
        for &io_bytes in &options.sizes {
            for &depth in &options.depths {
                let (context, handle) = file.context(depth.into())?;
                let time = Duration::from_secs_f64(options.seconds);
                let cell = Cell { name: &location, operation, io_bytes, depth, size, time };
                let row = cell.measure(context, &handle)?;
                if global.json {
                    output::print_json(&row)?;
                } else {
                    output::print(&row.text(global.bytes))?;
                }
            }
        }
    }
    Ok(())
}

/// One row that is measured.
struct Cell<'a> {
    name: &'a Location,
    operation: &'static str,
    io_bytes: u64,
    depth: u16,
    /// Of the file.
    size: u64,
    time: Duration,
}

impl Cell<'_> {
    fn measure(&self, mut context: Context, file: &File) -> Result<Row, Failure> {
        let failed =
            |error: &raio::Error| Failure::remote(format!("Cannot {} {}", self.operation, self.name), error);
        let mut random = SplitMix64::new(1);
        let mut times =
            Histogram::<u64>::new(3).map_err(|error| Failure::new(format!("No histogram: {error}.")))?;
        let mut submitted = vec![Instant::now(); self.depth.into()];
        let mut begin = |context: &mut Context, token: usize, data: Box<[u8]>, at: &mut Instant| {
            let offset = random.next_u64() % (self.size / self.io_bytes) * self.io_bytes;
            let buffers = Buffers::One(Buffer::Owned(data));
            let operation = match self.operation {
                "read" => Operation::Read { offset, buffers },
                _ => Operation::Write { offset, buffers },
            };
            *at = Instant::now();
            context
                .submit(file, operation, token as u64)
                .map(drop)
                .map_err(|rejected| failed(&rejected.error))
        };
        let started = Instant::now();
        for (token, at) in submitted.iter_mut().enumerate() {
            // Zeros could be stored without being written.
            let data = vec![0xa5; self.io_bytes as usize].into();
            begin(&mut context, token, data, at)?;
        }
        let mut in_flight = usize::from(self.depth);
        while in_flight > 0 {
            context.wait(1, usize::MAX, None).map_err(|error| failed(&error))?;
            while let Some(completion) = context.next() {
                let token = completion.token as usize;
                let moved = completion.result.map_err(|error| failed(&error))?;
                if moved < self.io_bytes {
                    return Err(Failure::new(format!("{} has become shorter. Start again.", self.name)));
                }
                // It grows as it must.
                let _ = times.record(submitted[token].elapsed().as_nanos() as u64);
                match completion.buffers {
                    Some(Buffers::One(Buffer::Owned(data))) if started.elapsed() < self.time => {
                        begin(&mut context, token, data, &mut submitted[token])?;
                    }
                    _ => in_flight -= 1,
                }
            }
        }
        let elapsed = started.elapsed();
        let us = |ns: u64| ns as f64 / 1e3;
        Ok(Row {
            operation: self.operation,
            io_bytes: self.io_bytes,
            depth: self.depth,
            ios: times.len(),
            ios_per_second: per_second(times.len(), elapsed),
            bytes_per_second: per_second(times.len() * self.io_bytes, elapsed),
            mean_us: times.mean() / 1e3,
            p50_us: us(times.value_at_quantile(0.5)),
            p99_us: us(times.value_at_quantile(0.99)),
            max_us: us(times.max()),
        })
    }
}

impl Row {
    fn text(&self, is_exact: bool) -> String {
        format!(
            "{:<6}{:>10}{:>7}{:>12.0}{:>14}{:>11.1}{:>11.1}{:>11.1}\n",
            self.operation,
            output::size(self.io_bytes, is_exact),
            self.depth,
            self.ios_per_second,
            format!("{}/s", output::size(self.bytes_per_second as u64, is_exact)),
            self.mean_us,
            self.p50_us,
            self.p99_us
        )
    }
}
